//! The run ledger: the one truth on runs and partitions.

use std::fmt;

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};

use super::Result;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Under way, or its process died.
    Running,
    /// Published.
    Succeeded,
    /// Gave up; the previous version stays published.
    Failed,
    /// Stopped by a gate; the previous version stays published.
    Held,
}

/// One row of the ledger's runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Pipeline, for example `ecommerce_batch_daily`.
    pub pipeline: String,
    /// The day that is processed.
    pub fecha: NaiveDate,
    /// Ordinal of the run for this pipeline and day, from 1.
    pub epoch: i64,
    /// Id of the run.
    pub run_id: String,
    /// State.
    pub state: RunState,
    /// Start.
    pub started_at: DateTime<Utc>,
    /// End; `None` while running.
    pub finished_at: Option<DateTime<Utc>>,
    /// Rows by fate and other counts, as JSON.
    pub report: serde_json::Value,
}

/// The one truth on runs and partitions.
#[async_trait]
pub trait RunLedger: fmt::Debug + Send + Sync {
    /// Begins a run of `pipeline` for `fecha` with an epoch above `floor` and above every earlier one.
    ///
    /// At most one process holds a pipeline at a time; a run whose process died is closed as failed, at `now`.
    ///
    /// # Errors
    /// `Retryable` with code `BUSY` when another live process holds the pipeline; the text names it.
    async fn begin(&self, pipeline: &str, fecha: NaiveDate, run_id: &str, floor: i64, now: DateTime<Utc>) -> Result<Run>;
    /// Ends a run. Idempotent.
    async fn finish(&self, run: &Run) -> Result<()>;
    /// All runs in order of (fecha, epoch).
    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>>;
}
