//! Where alerts go.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::Result;

/// Something a person should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    /// Alerts with the same key are one incident; at most 255 bytes.
    pub dedup_key: String,
    /// `source_unavailable`, `run_failed`, `day_held`, `sla_missed`, `dimension_stale`.
    pub kind: String,
    /// P1, P2 or P3.
    pub priority: u8,
    /// One sentence.
    pub summary: String,
}

/// Where alerts go.
#[async_trait]
pub trait Notifier: fmt::Debug + Send + Sync {
    /// Raises an alert. Repeating a key does not page again.
    async fn raise(&self, alert: &Alert) -> Result<()>;
    /// Resolves the incident with this key. Idempotent.
    async fn resolve(&self, dedup_key: &str) -> Result<()>;
}
