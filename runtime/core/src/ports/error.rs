//! Errors at a port, and what a caller may do after them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a caller may do after an error; the adapter decides, because it saw the code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disposition {
    /// Nothing happened: the same call may be repeated.
    Retryable,
    /// It will never work as it stands: quarantine, alert, go on.
    Permanent,
    /// It may have happened: repeat with the same idempotency key only.
    Unknown,
}

/// An error at a port. `Display` says what was being done, without the cause, which is the `source`.
#[derive(Debug, thiserror::Error)]
#[error("{what}{}", code.as_ref().map(|c| format!(" [{c}]")).unwrap_or_default())]
pub struct PortError {
    /// What was being done, lower case, with the place and the values.
    pub what: String,
    /// The service's own code where it gave one, for example `ECONNREFUSED` or an SQLSTATE.
    pub code: Option<String>,
    /// What the caller may do now.
    pub disposition: Disposition,
    /// How long the service asked to be left alone, counted from its answer; only beside [`Disposition::Retryable`].
    pub retry_after: Option<Duration>,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl PortError {
    fn new(what: String, disposition: Disposition) -> Self {
        Self { what, code: None, disposition, retry_after: None, source: None }
    }
    /// An error that will never go away by itself.
    pub fn permanent(what: impl Into<String>) -> Self {
        Self::new(what.into(), Disposition::Permanent)
    }
    /// An error after which nothing has happened.
    pub fn retryable(what: impl Into<String>) -> Self {
        Self::new(what.into(), Disposition::Retryable)
    }
    /// An error after which the call may have taken effect.
    pub fn unknown(what: impl Into<String>) -> Self {
        Self::new(what.into(), Disposition::Unknown)
    }
    /// Adds the service's own code.
    pub fn code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
        self
    }
    /// Adds how long the service asked to be left alone.
    pub fn retry_after(mut self, wait: Option<Duration>) -> Self {
        self.retry_after = wait;
        self
    }
    /// Adds the cause.
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }
    /// The whole chain in one line, for logs and people.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

/// The result of a port call.
pub type Result<T, E = PortError> = std::result::Result<T, E>;
