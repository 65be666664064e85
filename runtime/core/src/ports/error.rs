//! Errors at a port, and what a caller may do after them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What services and systems say when there is no room left: `ENOSPC` and `EDQUOT` by name and by glibc's texts, HTTP's 507,
/// MinIO's code, PostgreSQL's SQLSTATE `disk_full`, Kafka's error 56.
const OUT_OF_SPACE: [&str; 7] = [
    "ENOSPC",
    "No space left on device",
    "EDQUOT",
    "Disk quota exceeded",
    "507 Insufficient Storage",
    "XMinioStorageFull",
    "KAFKA_STORAGE_ERROR",
];
const DISK_FULL: &str = "53100";

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
    /// Whether there is no room left. The same call may do later, but hardly before somebody has made room.
    pub fn is_out_of_space(&self) -> bool {
        let chain = self.chain();
        self.code.as_deref() == Some(DISK_FULL) || OUT_OF_SPACE.iter().any(|said| chain.contains(said))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_room_is_told_from_other_faults_that_may_pass() {
        let disk = PortError::retryable("write a part").because(std::io::Error::from_raw_os_error(28));
        let database = PortError::retryable("begin a run").code("53100");
        let store = PortError::unknown("put a/b").because("server error: 507 Insufficient Storage");
        assert!([disk, database, store].iter().all(PortError::is_out_of_space));
        let busy = PortError::retryable("put a/b of 53100 rows").because("503 SlowDown: reduce your request rate");
        assert!(!busy.is_out_of_space());
    }
}
