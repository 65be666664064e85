//! The dimension API over HTTP: a transport for the client in core, which knows the pages.
//!
//! A dimension is at `<base>/<dimension>?limit=<rows>&cursor=<cursor>`. Each request has a deadline, and so has the whole
//! fetch; a body is read up to a limit, whatever its length says. What it leaves out: repeating, which is the caller's, and
//! redirects, since one would carry the token elsewhere.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use reqwest::{
    Url,
    header::{AUTHORIZATION, DATE, ETAG, HeaderMap, HeaderValue, IF_MATCH, IF_NONE_MATCH, RETRY_AFTER},
};
use simulacro_core::{
    dimensions::paged::{PageLimits, PageRequest, PageResponse, PagedApi, Transport},
    ports::{Column, DimensionApi, Fetched, PortError, Result},
};

/// How to reach the API.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpDimensionsSettings {
    /// Base address; the dimensions are below it.
    pub url: String,
    /// Sent as `Authorization: Bearer`.
    pub token: Option<String>,
    /// Names of the dimensions that the API is asked for.
    pub offered: Vec<String>,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for one whole page, connection included.
    pub call_timeout: Duration,
    /// Longest wait for a whole snapshot, all pages and begun-again readings included.
    pub fetch_timeout: Duration,
    /// Most bytes of one page.
    pub page_bytes_max: usize,
    /// Bounds of a snapshot.
    pub limits: PageLimits,
}

impl fmt::Debug for HttpDimensionsSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, token, offered, connect_timeout, call_timeout, fetch_timeout, page_bytes_max, limits } = self;
        f.debug_struct("HttpDimensionsSettings")
            .field("url", url)
            .field("token", &token.as_ref().map(|_| "set"))
            .field("offered", offered)
            .field("connect_timeout", connect_timeout)
            .field("call_timeout", call_timeout)
            .field("fetch_timeout", fetch_timeout)
            .field("page_bytes_max", page_bytes_max)
            .field("limits", limits)
            .finish()
    }
}

/// The API.
#[derive(Debug)]
pub struct HttpDimensions {
    api: PagedApi<Http>,
    fetch_timeout: Duration,
}

#[derive(Debug)]
struct Http {
    base: Url,
    client: reqwest::Client,
    page_bytes_max: usize,
}

impl HttpDimensions {
    /// A client. Opens no connection yet.
    ///
    /// # Errors
    /// `Permanent` when the address is none, the token cannot stand in a header, or TLS cannot be set up.
    pub fn new(settings: HttpDimensionsSettings) -> Result<Self> {
        let wrong = || PortError::permanent(format!("use dimension API {:?}", settings.url));
        let base = Url::parse(&settings.url).map_err(|e| wrong().because(e))?;
        if base.cannot_be_a_base() || !matches!(base.scheme(), "http" | "https") {
            return Err(wrong().because("the address begins with http:// or https://"));
        }
        let mut headers = HeaderMap::new();
        if let Some(token) = &settings.token {
            // The cause would show the token.
            let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                .map_err(|_| wrong().because("the token has characters that cannot stand in a header"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let client = reqwest::Client::builder()
            .default_headers(headers)
            .connect_timeout(settings.connect_timeout)
            .timeout(settings.call_timeout)
            .redirect(reqwest::redirect::Policy::none())
            .build()
            .map_err(|e| wrong().because(e))?;
        let http = Http { base, client, page_bytes_max: settings.page_bytes_max };
        Ok(Self { api: PagedApi::new(http, settings.offered, settings.limits), fetch_timeout: settings.fetch_timeout })
    }
}

/// `Retry-After` as a time from the answer on: seconds, or a date, which is compared with the service's own clock where
/// it tells. A value that is neither is none.
fn retry_after(headers: &HeaderMap, now: DateTime<Utc>) -> Option<Duration> {
    let text = |name| headers.get(name).and_then(|v: &HeaderValue| v.to_str().ok()).map(str::trim);
    let asked = text(RETRY_AFTER)?;
    if let Ok(seconds) = asked.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = |text| DateTime::parse_from_rfc2822(text).ok().map(|d| d.to_utc());
    let until = date(asked)?;
    let from = text(DATE).and_then(date).unwrap_or(now);
    // A date that has passed asks for nothing.
    Some((until - from).to_std().unwrap_or_default())
}

#[async_trait]
impl Transport for Http {
    async fn get(&self, request: &PageRequest, what: &str) -> Result<PageResponse> {
        // Reading changes nothing: whatever was lost may be asked for again.
        let lost = |e: reqwest::Error| {
            let kind = if e.is_timeout() { "TIMEOUT" } else { "CONNECTION" };
            PortError::retryable(what).code(kind).because(e.without_url())
        };
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().push(&request.dimension);
        }
        url.query_pairs_mut().append_pair("limit", &request.rows.to_string());
        if let Some(cursor) = &request.cursor {
            url.query_pairs_mut().append_pair("cursor", cursor);
        }
        let mut call = self.client.get(url).header("accept", "application/json");
        if let Some(etag) = &request.if_none_match {
            call = call.header(IF_NONE_MATCH, etag);
        }
        if let Some(etag) = &request.if_match {
            call = call.header(IF_MATCH, etag);
        }
        let mut response = call.send().await.map_err(lost)?;
        let headers = response.headers();
        let etag = headers.get(ETAG).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let retry_after = retry_after(headers, Utc::now());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(lost)? {
            if body.len() + chunk.len() > self.page_bytes_max {
                let text = format!("{what}: found more than {} bytes on one page", self.page_bytes_max);
                return Err(PortError::permanent(text).code("TOO_LARGE"));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(PageResponse { status: response.status().as_u16(), etag, retry_after, body: body.into() })
    }
}

#[async_trait]
impl DimensionApi for HttpDimensions {
    fn offered(&self) -> Vec<String> {
        self.api.offered()
    }

    async fn fetch(&self, dimension: &str, columns: &[Column], known_etag: Option<&str>) -> Result<Fetched> {
        let fetch = self.api.fetch(dimension, columns, known_etag);
        tokio::time::timeout(self.fetch_timeout, fetch).await.unwrap_or_else(|_| {
            let limit = self.fetch_timeout;
            Err(PortError::retryable(format!("read dimension {dimension}: not whole after {limit:?}")).code("TIMEOUT"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(url: &str, token: &str) -> HttpDimensionsSettings {
        HttpDimensionsSettings {
            url: url.into(),
            token: Some(token.into()),
            offered: vec!["productos".into()],
            connect_timeout: Duration::from_secs(1),
            call_timeout: Duration::from_secs(1),
            fetch_timeout: Duration::from_secs(1),
            page_bytes_max: 1_000,
            limits: PageLimits::STANDARD,
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_on_the_services_own_clock() {
        let now: DateTime<Utc> = "2024-03-18T03:00:00Z".parse().expect("a time");
        let check = |headers: &[(reqwest::header::HeaderName, &'static str)], seconds: Option<u64>| {
            let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
            assert_eq!(retry_after(&headers, now), seconds.map(Duration::from_secs), "{headers:?}");
        };
        check(&[], None);
        check(&[(RETRY_AFTER, "120")], Some(120));
        check(&[(RETRY_AFTER, "Mon, 18 Mar 2024 03:02:00 GMT")], Some(120));
        // The clocks differ by an hour.
        check(&[(RETRY_AFTER, "Mon, 18 Mar 2024 04:00:30 GMT"), (DATE, "Mon, 18 Mar 2024 04:00:00 GMT")], Some(30));
        check(&[(RETRY_AFTER, "Mon, 18 Mar 2024 02:00:00 GMT")], Some(0));
        check(&[(RETRY_AFTER, "soon")], None);
        check(&[(RETRY_AFTER, "-5")], None);
    }

    #[test]
    fn a_token_is_never_shown() {
        let good = settings("http://api.local/v1", "hunter2");
        assert!(!format!("{good:?}").contains("hunter2"));
        let api = HttpDimensions::new(good).expect("a valid address");
        assert!(!format!("{api:?}").contains("hunter2"));
        let error = HttpDimensions::new(settings("http://api.local", "hunter2\n")).expect_err("a line end");
        assert!(error.chain().contains("api.local") && !error.chain().contains("hunter2"), "{}", error.chain());
        let error = HttpDimensions::new(settings("api.local", "t")).expect_err("no scheme");
        assert!(error.chain().contains("api.local"), "{}", error.chain());
    }
}
