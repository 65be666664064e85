//! A schema registry behind Confluent's HTTP API: Confluent's own, Apicurio's `/apis/ccompat/v7`, and others.
//!
//! What it leaves out: caching, which the decoder does, and retries, which are the caller's: each error says whether a
//! repetition is safe.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use reqwest::{Method, StatusCode, Url};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use simulacro_core::{
    avro::{invalid_schema, schema::canonical_text},
    ports::{Compatibility, PortError, RegisteredSchema, Result, SchemaRegistry, Verdict, schema_registry::SUBJECT_NOT_FOUND},
};

const CONTENT_TYPE: &str = "application/vnd.schemaregistry.v1+json";
/// Confluent's code: nothing was set for this subject.
const LEVEL_NOT_FOUND: &str = "40408";
/// Longest answer that is read, in bytes; a schema is at most a mebibyte, and JSON escapes may double it.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Longest part of an error's text that is kept.
const MESSAGE_CHARS_MAX: usize = 500;

/// How to reach a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpRegistrySettings {
    /// Base address, with the path below which `subjects` and `schemas` are.
    pub url: String,
    /// User and password of HTTP basic authentication.
    pub credentials: Option<(String, String)>,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for a whole answer, connection included.
    pub timeout: Duration,
}

impl fmt::Debug for HttpRegistrySettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.credentials.as_ref().map(|(user, _)| user);
        let Self { url, connect_timeout, timeout, .. } = self;
        f.debug_struct("HttpRegistrySettings")
            .field("url", url)
            .field("user", &user)
            .field("connect_timeout", connect_timeout)
            .field("timeout", timeout)
            .finish()
    }
}

/// The registry.
#[derive(Debug)]
pub struct HttpRegistry {
    settings: HttpRegistrySettings,
    base: Url,
    client: reqwest::Client,
}

#[derive(Serialize)]
struct SchemaBody<'a> {
    schema: &'a str,
    #[serde(rename = "schemaType")]
    schema_type: &'static str,
}

#[derive(Deserialize)]
struct IdAnswer {
    id: u32,
}

#[derive(Deserialize)]
struct SchemaAnswer {
    schema: String,
    /// Absent for Avro.
    #[serde(rename = "schemaType", default)]
    schema_type: Option<String>,
}

#[derive(Deserialize)]
struct VersionAnswer {
    id: u32,
    version: u32,
    schema: String,
}

#[derive(Deserialize)]
struct CheckAnswer {
    is_compatible: bool,
    #[serde(default)]
    messages: Vec<String>,
}

#[derive(Serialize)]
struct LevelBody {
    compatibility: Compatibility,
}

#[derive(Deserialize)]
struct LevelAnswer {
    #[serde(rename = "compatibilityLevel", alias = "compatibility")]
    level: Compatibility,
}

#[derive(Deserialize)]
struct ErrorAnswer {
    error_code: u32,
    #[serde(default)]
    message: String,
}

impl HttpRegistry {
    /// A client. Opens no connection yet.
    ///
    /// # Errors
    /// `Permanent` when the address is none or TLS cannot be set up.
    pub fn new(settings: HttpRegistrySettings) -> Result<Self> {
        let wrong = || PortError::permanent(format!("use schema registry {:?}", settings.url));
        let base = Url::parse(&settings.url).map_err(|e| wrong().because(e))?;
        if base.cannot_be_a_base() || !matches!(base.scheme(), "http" | "https") {
            return Err(wrong().because("the address begins with http:// or https://"));
        }
        let client = reqwest::Client::builder()
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.timeout)
            // A redirect would repeat a POST as a GET, and send the password elsewhere.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| wrong().because(e))?;
        Ok(Self { settings, base, client })
    }

    /// The address of a resource; each part is escaped.
    fn url(&self, parts: &[&str], query: Option<&str>) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url.set_query(query);
        url
    }

    /// One call. `what` says what is being done.
    async fn call<A: DeserializeOwned>(&self, method: Method, url: Url, body: Option<Vec<u8>>, what: &str) -> Result<A> {
        // Only a change can have happened without an answer; each is idempotent, so it may be repeated as it is.
        let reads = body.is_none();
        let lost = |e: reqwest::Error| {
            let kind = if e.is_timeout() { "TIMEOUT" } else { "CONNECTION" };
            let error = if reads || e.is_connect() { PortError::retryable(what) } else { PortError::unknown(what) };
            error.code(kind).because(e.without_url())
        };
        let mut request = self.client.request(method, url).header("accept", CONTENT_TYPE);
        if let Some((user, password)) = &self.settings.credentials {
            request = request.basic_auth(user, Some(password));
        }
        if let Some(body) = body {
            request = request.header("content-type", CONTENT_TYPE).body(body);
        }
        let mut response = request.send().await.map_err(lost)?;
        let status = response.status();
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(PortError::permanent(what).because(format!("the answer has more than {ANSWER_BYTES_MAX} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            return Err(refused(what, status, &bytes, reads));
        }
        serde_json::from_slice(&bytes).map_err(|e| {
            let error = if reads { PortError::retryable(what) } else { PortError::unknown(what) };
            error.code("UNEXPECTED_ANSWER").because(e)
        })
    }

    async fn get<A: DeserializeOwned>(&self, parts: &[&str], query: Option<&str>, what: &str) -> Result<A> {
        self.call(Method::GET, self.url(parts, query), None, what).await
    }

    async fn send<A: DeserializeOwned>(
        &self,
        method: Method,
        parts: &[&str],
        query: Option<&str>,
        body: &impl Serialize,
        what: &str,
    ) -> Result<A> {
        let body = serde_json::to_vec(body).map_err(|e| PortError::permanent(what).because(e))?;
        self.call(method, self.url(parts, query), Some(body), what).await
    }
}

/// The error of an answer that is no success.
fn refused(what: &str, status: StatusCode, body: &[u8], reads: bool) -> PortError {
    let answer: Option<ErrorAnswer> = serde_json::from_slice(body).ok();
    let code = answer.as_ref().map_or(u32::from(status.as_u16()), |a| a.error_code);
    let message = answer.map_or_else(|| String::from_utf8_lossy(body).into_owned(), |a| a.message);
    let message: String = message.chars().take(MESSAGE_CHARS_MAX).collect();
    let error = match status {
        // Asked too often, or too slow to be read: not carried out.
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => PortError::retryable(what),
        s if s.is_server_error() && reads => PortError::retryable(what),
        s if s.is_server_error() => PortError::unknown(what),
        _ => PortError::permanent(what),
    };
    error.code(code.to_string()).because(format!("the registry answers {status}: {message}"))
}

fn avro(schema: &str) -> SchemaBody<'_> {
    SchemaBody { schema, schema_type: "AVRO" }
}

/// What is sent: Apicurio takes texts that differ in white space for two schemas.
fn canonical(subject: &str, schema: &str) -> Result<String> {
    canonical_text(schema).map_err(|e| invalid_schema(subject, e))
}

fn is(error: &PortError, code: &str) -> bool {
    error.code.as_deref() == Some(code)
}

#[async_trait]
impl SchemaRegistry for HttpRegistry {
    async fn register(&self, subject: &str, schema: &str) -> Result<u32> {
        let what = format!("register a schema in {subject}");
        let schema = canonical(subject, schema)?;
        let answer: IdAnswer = self.send(Method::POST, &["subjects", subject, "versions"], None, &avro(&schema), &what).await?;
        Ok(answer.id)
    }

    async fn schema(&self, id: u32) -> Result<String> {
        let what = format!("read schema {id}");
        let answer: SchemaAnswer = self.get(&["schemas", "ids", &id.to_string()], None, &what).await?;
        match answer.schema_type.as_deref() {
            None | Some("AVRO") => Ok(answer.schema),
            // Handed on, it would be refused as Avro for a reason that misleads; the record is undecodable either way.
            Some(other) => Ok(serde_json::Value::String(format!("a schema of type {other}")).to_string()),
        }
    }

    async fn latest(&self, subject: &str) -> Result<RegisteredSchema> {
        let what = format!("read the newest version of {subject}");
        let VersionAnswer { id, version, schema } = self.get(&["subjects", subject, "versions", "latest"], None, &what).await?;
        Ok(RegisteredSchema { id, version, schema })
    }

    async fn version(&self, subject: &str, version: u32) -> Result<RegisteredSchema> {
        let what = format!("read version {version} of {subject}");
        let answer = self.get(&["subjects", subject, "versions", &version.to_string()], None, &what).await?;
        let VersionAnswer { id, version, schema } = answer;
        Ok(RegisteredSchema { id, version, schema })
    }

    async fn versions(&self, subject: &str) -> Result<Vec<u32>> {
        let mut versions: Vec<u32> =
            self.get(&["subjects", subject, "versions"], None, &format!("list the versions of {subject}")).await?;
        versions.sort_unstable();
        Ok(versions)
    }

    async fn check(&self, subject: &str, schema: &str) -> Result<Verdict> {
        let what = format!("check a schema against {subject}");
        let schema = canonical(subject, schema)?;
        // Every version, as registering does; the subject's level says how many of them count.
        let parts = ["compatibility", "subjects", subject, "versions"];
        match self.send::<CheckAnswer>(Method::POST, &parts, Some("verbose=true"), &avro(&schema), &what).await {
            Ok(answer) => Ok(Verdict { compatible: answer.is_compatible, messages: answer.messages }),
            Err(error) if is(&error, SUBJECT_NOT_FOUND) => Ok(Verdict { compatible: true, messages: Vec::new() }),
            Err(error) => Err(error),
        }
    }

    async fn compatibility(&self, subject: &str) -> Result<Compatibility> {
        let what = format!("read the compatibility of {subject}");
        match self.get::<LevelAnswer>(&["config", subject], Some("defaultToGlobal=true"), &what).await {
            Ok(answer) => Ok(answer.level),
            // Apicurio knows no default for a subject that does not exist, older servers none at all.
            Err(error) if is(&error, SUBJECT_NOT_FOUND) || is(&error, LEVEL_NOT_FOUND) => {
                Ok(self.get::<LevelAnswer>(&["config"], None, &what).await?.level)
            }
            Err(error) => Err(error),
        }
    }

    async fn set_compatibility(&self, subject: &str, level: Compatibility) -> Result<()> {
        let what = format!("set the compatibility of {subject} to {level}");
        let body = LevelBody { compatibility: level };
        let _: serde_json::Value = self.send(Method::PUT, &["config", subject], None, &body, &what).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use simulacro_core::ports::Disposition;

    use super::*;

    fn settings(url: &str) -> HttpRegistrySettings {
        let credentials = Some(("etl".to_owned(), "hunter2".to_owned()));
        HttpRegistrySettings {
            url: url.into(),
            credentials,
            connect_timeout: Duration::from_secs(1),
            timeout: Duration::from_secs(2),
        }
    }

    #[test]
    fn a_subject_is_one_escaped_part_below_the_base_path() {
        let registry = HttpRegistry::new(settings("http://registry:8081/apis/ccompat/v7/")).expect("a valid address");
        let url = registry.url(&["subjects", "a/b?c-value", "versions"], Some("verbose=true"));
        assert_eq!(url.as_str(), "http://registry:8081/apis/ccompat/v7/subjects/a%2Fb%3Fc-value/versions?verbose=true");
    }

    #[test]
    fn an_address_that_is_none_is_named_and_a_password_never() {
        let error = HttpRegistry::new(settings("registry:8081")).expect_err("no scheme");
        assert!(error.to_string().contains("registry:8081"), "{error}");
        let shown = format!("{:?}", HttpRegistry::new(settings("http://registry")).expect("a valid address"));
        assert!(!shown.contains("hunter2"), "{shown}");
    }

    #[test]
    fn an_answer_says_what_may_be_done_next() {
        let of = |status, body: &str, reads| {
            let error = refused("register", status, body.as_bytes(), reads);
            (error.disposition, error.code.unwrap_or_default())
        };
        let json = r#"{"error_code":40403,"message":"Schema not found"}"#;
        assert_eq!(of(StatusCode::NOT_FOUND, json, true), (Disposition::Permanent, "40403".into()));
        assert_eq!(of(StatusCode::UNAUTHORIZED, "<html>", true), (Disposition::Permanent, "401".into()));
        assert_eq!(of(StatusCode::TOO_MANY_REQUESTS, "", false), (Disposition::Retryable, "429".into()));
        let json = r#"{"error_code":50001,"message":"Error in the backend datastore"}"#;
        assert_eq!(of(StatusCode::INTERNAL_SERVER_ERROR, json, true), (Disposition::Retryable, "50001".into()));
        assert_eq!(of(StatusCode::INTERNAL_SERVER_ERROR, json, false), (Disposition::Unknown, "50001".into()));
    }
}
