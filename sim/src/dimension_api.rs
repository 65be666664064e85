//! The simulated dimension API: a state machine, and a direct link to it with virtual latency and faults.
//!
//! [`Service::handle`] answers a request at a moment as an HTTP server would: pages by cursor, `ETag`, 304 for
//! `If-None-Match`, 412 for `If-Match`, 401 without the right token, 429 and 503 with `Retry-After`. Faults are data with a
//! count of how often they fired. What it leaves out: the network, and any row: rows are JSON that somebody put there.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use simulacro_core::{
    dimensions::paged::{PageLimits, PageRequest, PageResponse, PagedApi, Transport},
    ports::{Env, PortError, Result},
};

/// What goes wrong. Counts of requests begin at 1, when the fault is injected; a fault with `times` heals when it has struck
/// so often.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum ApiFault {
    /// No request arrives: connections are refused.
    Down {
        /// From, inclusive.
        from: DateTime<Utc>,
        /// To, exclusive.
        to: DateTime<Utc>,
    },
    /// Requests are answered with this status: 429, 500, 502, 503.
    Refused {
        /// Status.
        status: u16,
        /// Seconds in `Retry-After`, if it is sent.
        retry_after_s: Option<u64>,
        /// How often.
        times: u64,
    },
    /// The token has expired: 401, until another one is set.
    TokenExpired {
        /// From, inclusive.
        from: DateTime<Utc>,
    },
    /// Requests are taken and never answered.
    Hangs {
        /// How often.
        times: u64,
    },
    /// Bodies end in the middle.
    Truncated {
        /// How often.
        times: u64,
    },
    /// A 200 whose body is a page for people.
    Html {
        /// How often.
        times: u64,
    },
    /// A field of every row has another name.
    RenamedField {
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// A new version of the dimension is put in between the first page and the second.
    ChangesBetweenPages {
        /// How often.
        times: u64,
    },
    /// `If-Match` is not looked at, so that a page of another version is served.
    IgnoresIfMatch,
    /// The last row of a snapshot is left out, although it is counted.
    LosesLastRow {
        /// How often.
        times: u64,
    },
}

impl ApiFault {
    /// Its mode, as a scenario writes it.
    pub fn mode(&self) -> &'static str {
        match self {
            Self::Down { .. } => "down",
            Self::Refused { .. } => "refused",
            Self::TokenExpired { .. } => "token_expired",
            Self::Hangs { .. } => "hangs",
            Self::Truncated { .. } => "truncated",
            Self::Html { .. } => "html",
            Self::RenamedField { .. } => "renamed_field",
            Self::ChangesBetweenPages { .. } => "changes_between_pages",
            Self::IgnoresIfMatch => "ignores_if_match",
            Self::LosesLastRow { .. } => "loses_last_row",
        }
    }
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A whole answer.
    Response(PageResponse),
    /// The connection is refused.
    Refused,
    /// Nothing comes, ever.
    Silence,
}

#[derive(Debug, Clone)]
struct Table {
    number: u64,
    as_of: DateTime<Utc>,
    rows: Vec<Map<String, Value>>,
}

impl Table {
    fn etag(&self) -> String {
        format!("\"v{}\"", self.number)
    }
}

/// The service's state.
#[derive(Debug, Default)]
pub struct Service {
    tables: BTreeMap<String, Table>,
    token: Option<String>,
    faults: Vec<(ApiFault, u64)>,
    requests: u64,
}

impl Service {
    /// Without tables and faults. With a token, requests must carry it.
    pub fn new(token: Option<String>) -> Self {
        Self { token, ..Self::default() }
    }

    /// Puts a dimension's next version.
    pub fn put(&mut self, now: DateTime<Utc>, dimension: &str, rows: Vec<Map<String, Value>>) {
        let number = self.tables.get(dimension).map_or(0, |t| t.number) + 1;
        self.tables.insert(dimension.to_owned(), Table { number, as_of: now, rows });
    }

    /// Sets another token, which ends the expiry of the one before.
    pub fn rotate(&mut self, token: &str) {
        self.token = Some(token.to_owned());
        self.faults.retain(|(fault, _)| !matches!(fault, ApiFault::TokenExpired { .. }));
    }

    /// Adds a fault.
    pub fn inject(&mut self, fault: ApiFault) {
        self.faults.push((fault, 0));
    }

    /// Has these faults and no others, each with how often it has fired before.
    pub fn set_faults(&mut self, faults: Vec<(ApiFault, u64)>) {
        self.faults = faults;
    }

    /// Takes all faults away.
    pub fn heal(&mut self) {
        self.faults.clear();
    }

    /// The faults so far, with how often each fired.
    pub fn injected(&self) -> &[(ApiFault, u64)] {
        &self.faults
    }

    /// How often the faults fired, by mode.
    pub fn hits(&self) -> BTreeMap<&'static str, u64> {
        let mut hits = BTreeMap::new();
        for (fault, n) in &self.faults {
            *hits.entry(fault.mode()).or_default() += n;
        }
        hits
    }

    /// Requests that arrived.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Lets the first fault strike for which `strikes` holds, given its hits so far; returns it.
    fn strike(&mut self, strikes: impl Fn(&ApiFault, u64) -> bool) -> Option<ApiFault> {
        let (fault, hits) = self.faults.iter_mut().find(|(fault, hits)| strikes(fault, *hits))?;
        *hits += 1;
        Some(fault.clone())
    }

    /// Answers a request that carries `token`.
    pub fn handle(&mut self, now: DateTime<Utc>, request: &PageRequest, token: Option<&str>) -> Answer {
        let plain = |status: u16, retry_after, body: &'static str| {
            Answer::Response(PageResponse { status, etag: None, retry_after, body: Bytes::from_static(body.as_bytes()) })
        };
        if self.strike(|f, _| matches!(f, ApiFault::Down { from, to } if (*from..*to).contains(&now))).is_some() {
            return Answer::Refused;
        }
        self.requests += 1;
        if self.strike(|f, n| matches!(f, ApiFault::Hangs { times } if n < *times)).is_some() {
            return Answer::Silence;
        }
        let refused = |f: &ApiFault, n| matches!(f, ApiFault::Refused { times, .. } if n < *times);
        if let Some(ApiFault::Refused { status, retry_after_s, .. }) = self.strike(refused) {
            return plain(status, retry_after_s.map(Duration::from_secs), "<html>please come back later</html>");
        }
        let expired = self.strike(|f, _| matches!(f, ApiFault::TokenExpired { from } if *from <= now)).is_some();
        if expired || (self.token.is_some() && self.token.as_deref() != token) {
            return plain(401, None, "{\"error\": \"invalid_token\"}");
        }
        if self.strike(|f, n| matches!(f, ApiFault::Html { times } if n < *times)).is_some() {
            let page = PageResponse {
                status: 200,
                etag: Some("\"html\"".into()),
                retry_after: None,
                body: Bytes::from_static(b"<html>maintenance</html>"),
            };
            return Answer::Response(page);
        }
        if request.cursor.is_some()
            && self.strike(|f, n| matches!(f, ApiFault::ChangesBetweenPages { times } if n < *times)).is_some()
            && let Some(table) = self.tables.get_mut(&request.dimension)
        {
            (table.number, table.as_of) = (table.number + 1, now);
            table.rows.rotate_left(1);
        }
        let Some(table) = self.tables.get(&request.dimension).cloned() else {
            return plain(404, None, "{\"error\": \"no such dimension\"}");
        };
        let etag = table.etag();
        if request.if_none_match.as_ref() == Some(&etag) {
            return Answer::Response(PageResponse { status: 304, etag: Some(etag), retry_after: None, body: Bytes::new() });
        }
        if request.if_match.as_ref().is_some_and(|wanted| *wanted != etag)
            && self.strike(|f, _| *f == ApiFault::IgnoresIfMatch).is_none()
        {
            return plain(412, None, "{\"error\": \"the version has changed\"}");
        }
        let Ok(begin) = request.cursor.as_deref().unwrap_or("0").parse::<usize>() else {
            return plain(400, None, "{\"error\": \"no such cursor\"}");
        };
        let body = self.page(&table, begin, request.rows.max(1) as usize);
        Answer::Response(PageResponse { status: 200, etag: Some(etag), retry_after: None, body: body.into() })
    }

    fn page(&mut self, table: &Table, begin: usize, rows: usize) -> Vec<u8> {
        let total = table.rows.len();
        let end = begin.saturating_add(rows).min(total);
        let mut page: Vec<Map<String, Value>> = table.rows.get(begin..end).unwrap_or_default().to_vec();
        let last = end == total;
        if last && self.strike(|f, n| matches!(f, ApiFault::LosesLastRow { times } if n < *times)).is_some() {
            page.pop();
        }
        if let Some(ApiFault::RenamedField { from, to }) = self.strike(|f, _| matches!(f, ApiFault::RenamedField { .. })) {
            for row in &mut page {
                if let Some(value) = row.remove(&from) {
                    row.insert(to.clone(), value);
                }
            }
        }
        let next = (!last).then(|| end.to_string());
        let as_of = table.as_of.to_rfc3339();
        let mut body = json!({ "as_of": as_of, "total_rows": total, "next": next, "rows": page }).to_string().into_bytes();
        if self.strike(|f, n| matches!(f, ApiFault::Truncated { times } if n < *times)).is_some() {
            body.truncate(body.len() / 2);
        }
        body
    }
}

/// A direct link to a service: latency each way in virtual time, and a deadline for an answer that does not come.
#[derive(Clone)]
pub struct DirectLink {
    /// The service, shared by all clients.
    pub service: Arc<Mutex<Service>>,
    /// The clock.
    pub env: Arc<dyn Env>,
    /// Time of one way.
    pub latency: Duration,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Token of this client.
    pub token: Option<String>,
}

impl fmt::Debug for DirectLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { latency, timeout, .. } = self;
        f.debug_struct("DirectLink").field("latency", latency).field("timeout", timeout).finish_non_exhaustive()
    }
}

/// The service behind its lock; a panic elsewhere is what the run reports.
pub fn lock(service: &Mutex<Service>) -> MutexGuard<'_, Service> {
    service.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Transport for DirectLink {
    async fn get(&self, request: &PageRequest, what: &str) -> Result<PageResponse> {
        self.env.sleep(self.latency).await;
        let answer = lock(&self.service).handle(self.env.now(), request, self.token.as_deref());
        match answer {
            Answer::Response(response) => {
                self.env.sleep(self.latency).await;
                Ok(response)
            }
            Answer::Refused => Err(PortError::retryable(what).code("CONNECTION").because("connection refused")),
            Answer::Silence => {
                self.env.sleep(self.timeout).await;
                Err(PortError::retryable(what).code("TIMEOUT").because(format!("no answer after {:?}", self.timeout)))
            }
        }
    }
}

/// A client of the simulated API.
pub type SimDimensions = PagedApi<DirectLink>;

/// A client of the simulated API that is asked for these dimensions.
pub fn client(link: DirectLink, offered: &[&str], limits: PageLimits) -> SimDimensions {
    PagedApi::new(link, offered.iter().map(|o| (*o).to_owned()), limits)
}
