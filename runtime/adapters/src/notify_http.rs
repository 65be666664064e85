//! Sending an alert over HTTP: bounded in time and tries, and silent about secrets.
//!
//! What is sent again is the same body, so that the service behind it can tell a repetition by its key. An address may be a
//! secret itself, as that of a Slack webhook is, so no error and no log shows one.

use std::{fmt, sync::Arc, time::Duration};

use reqwest::{StatusCode, Url, header::RETRY_AFTER};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use simulacro_core::ports::{Env, PortError, Result};
use tracing::warn;

/// Longest part of an answer that is shown.
const ANSWER_CHARS_MAX: usize = 300;

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Secret {
    /// The value of an environment variable, which `lookup` reads.
    ///
    /// # Errors
    /// `Permanent`, naming the variable, when it is not set or empty.
    pub fn from_env(variable: &str, lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        match lookup(variable) {
            Some(value) if !value.trim().is_empty() => Ok(Self(value.trim().to_owned())),
            Some(_) => Err(PortError::permanent(format!("read a secret: environment variable {variable} is empty"))),
            None => Err(PortError::permanent(format!("read a secret: environment variable {variable} is not set"))),
        }
    }
}

/// How patient one is with a service that takes alerts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeliverySettings {
    /// Calls for one alert; at least 1.
    pub tries: u32,
    /// Seconds to wait for a connection.
    pub connect_timeout_s: u64,
    /// Seconds to wait for the whole answer.
    pub timeout_s: u64,
    /// The longest wait between two calls in seconds, also when the service asks for a longer one.
    pub wait_max_s: u64,
}

impl Default for DeliverySettings {
    fn default() -> Self {
        Self { tries: 3, connect_timeout_s: 5, timeout_s: 10, wait_max_s: 30 }
    }
}

/// Posts JSON to one address.
#[derive(Clone)]
pub(crate) struct Sender {
    /// Who is called, for people.
    pub(crate) name: &'static str,
    url: Url,
    bearer: Option<Secret>,
    client: reqwest::Client,
    env: Arc<dyn Env>,
    settings: DeliverySettings,
}

impl fmt::Debug for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("name", &self.name).field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl Sender {
    /// A sender. Opens no connection yet.
    ///
    /// # Errors
    /// `Permanent` when the address is none, which is not shown, or TLS cannot be set up.
    pub(crate) fn new(
        name: &'static str,
        url: &Secret,
        bearer: Option<Secret>,
        env: Arc<dyn Env>,
        settings: DeliverySettings,
    ) -> Result<Self> {
        let wrong = |why: &str| PortError::permanent(format!("use the address of {name}")).because(why.to_owned());
        let url = Url::parse(&url.0).map_err(|_| wrong("it is no URL"))?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(wrong("expected one that begins with https://"));
        }
        if settings.tries == 0 {
            return Err(PortError::permanent(format!("use {name}: found tries 0, expected at least 1")));
        }
        let client = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(settings.connect_timeout_s))
            .timeout(Duration::from_secs(settings.timeout_s))
            // A redirect would send keys elsewhere.
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| PortError::permanent(format!("set up {name}")).because(e.without_url()))?;
        Ok(Self { name, url, bearer, client, env, settings })
    }

    /// Posts a body until it is taken, at most so often as the settings say.
    ///
    /// # Errors
    /// The last try's. `Permanent` when it is refused as it is; `Retryable` when it has not arrived; `Unknown` otherwise.
    pub(crate) async fn post(&self, what: &str, body: &Value) -> Result<()> {
        let text = body.to_string();
        let mut tried = 0;
        loop {
            let (error, asked) = match self.call(what, text.clone()).await {
                Ok(()) => return Ok(()),
                Err(refused) => refused,
            };
            tried += 1;
            if tried >= self.settings.tries || error.disposition == simulacro_core::ports::Disposition::Permanent {
                return Err(error);
            }
            // Between half and all of a wait that doubles, so that many alerts do not come back together.
            let most = 1_000_u64 << tried.min(10);
            let drawn = Duration::from_millis(most / 2 + self.env.random() % (most / 2));
            let wait = asked.unwrap_or(drawn).min(Duration::from_secs(self.settings.wait_max_s));
            warn!(to = self.name, tried, wait_ms = wait.as_millis(), error = %error.chain(), "alert not taken, trying again");
            self.env.sleep(wait).await;
        }
    }

    /// One call; an error comes with the wait that the service asks for.
    async fn call(&self, what: &str, body: String) -> Result<(), (PortError, Option<Duration>)> {
        let what = format!("{what} at {}", self.name);
        let mut request = self.client.post(self.url.clone()).header("content-type", "application/json").body(body);
        if let Some(Secret(token)) = &self.bearer {
            request = request.bearer_auth(token);
        }
        let response = match request.send().await {
            Ok(response) => response,
            Err(e) => {
                let kind = if e.is_timeout() { "TIMEOUT" } else { "CONNECTION" };
                let error = if e.is_connect() { PortError::retryable(what) } else { PortError::unknown(what) };
                return Err((error.code(kind).because(e.without_url()), None));
            }
        };
        let status = response.status();
        if status.is_success() {
            return Ok(());
        }
        let seconds = response.headers().get(RETRY_AFTER).and_then(|v| v.to_str().ok()).and_then(|v| v.trim().parse().ok());
        let error = match status {
            StatusCode::TOO_MANY_REQUESTS => PortError::retryable(what),
            StatusCode::REQUEST_TIMEOUT => PortError::unknown(what),
            s if s.is_server_error() => PortError::unknown(what),
            _ => PortError::permanent(what),
        };
        let mut response = response;
        let mut answer = Vec::new();
        while answer.len() < ANSWER_CHARS_MAX * 4
            && let Ok(Some(chunk)) = response.chunk().await
        {
            answer.extend_from_slice(&chunk);
        }
        let answer: String = String::from_utf8_lossy(&answer).chars().take(ANSWER_CHARS_MAX).collect();
        let error = error.code(status.as_u16().to_string()).because(format!("it answers {status}: {answer}"));
        Err((error, seconds.map(Duration::from_secs)))
    }
}

/// FNV-1a of a text, 64 bits: tells keys apart where a service wants a short one.
pub(crate) fn fingerprint(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// A text of at most so many bytes, cut between characters.
pub(crate) fn cut(text: &str, bytes_max: usize) -> &str {
    let mut end = text.len().min(bytes_max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!((cut("añb", 2), cut("añb", 3), cut("añb", 99), cut("", 5)), ("a", "añ", "añb", ""));
    }

    #[test]
    fn a_secret_is_named_and_never_shown() {
        let lookup = |name: &str| (name == "CLAVE").then(|| " hunter2\n".to_owned());
        let secret = Secret::from_env("CLAVE", lookup).expect("it is set");
        assert_eq!((secret.0.as_str(), format!("{secret:?}").as_str()), ("hunter2", "***"));
        let error = Secret::from_env("OTRA", lookup).expect_err("it is not set");
        assert!(error.to_string().contains("OTRA"), "{error}");
        Secret::from_env("VACIA", |_| Some(" ".into())).expect_err("it is empty");
    }
}
