//! The ports: every way in which the platform touches the world.
//!
//! Few methods, whole batches, object-safe. No method has a default body: a fault wrapper that forgot to
//! forward one would silently inject nothing.

use std::{fmt, sync::Arc, time::Duration};

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use futures::stream::BoxStream;
use object_store::ObjectStore;
use serde::{Deserialize, Serialize};

use crate::history::HistorySink;

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
    /// The cause.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl PortError {
    /// An error that will never go away by itself.
    pub fn permanent(what: impl Into<String>) -> Self {
        Self { what: what.into(), code: None, disposition: Disposition::Permanent, source: None }
    }
    /// An error after which nothing has happened.
    pub fn retryable(what: impl Into<String>) -> Self {
        Self { what: what.into(), code: None, disposition: Disposition::Retryable, source: None }
    }
    /// An error after which the call may have taken effect.
    pub fn unknown(what: impl Into<String>) -> Self {
        Self { what: what.into(), code: None, disposition: Disposition::Unknown, source: None }
    }
    /// Adds the service's own code.
    pub fn code(mut self, code: impl Into<String>) -> Self {
        self.code = Some(code.into());
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

/// Clock, sleep and ids. The only source of time and entropy there is.
#[async_trait]
pub trait Env: fmt::Debug + Send + Sync {
    /// Now, in UTC. In the simulator this is virtual.
    fn now(&self) -> DateTime<Utc>;
    /// Waits for `duration`. Cancel-safe.
    async fn sleep(&self, duration: Duration);
    /// A new id, unique within the ledger; from the seed in the simulator.
    fn new_id(&self) -> String;
}

/// A column as the source declares it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Column {
    /// Name, exactly.
    pub name: String,
    /// Physical type in the contract's words: `string`, `decimal(10,2)`, `timestamp`, `date`.
    pub physical_type: String,
}

/// One partition of a source table, read under one snapshot.
pub struct PartitionRead {
    /// Rows counted at the source in the snapshot that the batches come from.
    pub expected_rows: u64,
    /// The rows, in the source's order, with exactly the asked columns in the asked order.
    pub batches: BoxStream<'static, Result<RecordBatch>>,
}

/// A source of tables: PostgreSQL, SQLite, a folder of files, or the simulator's.
#[async_trait]
pub trait TableSource: fmt::Debug + Send + Sync {
    /// Succeeds when the source answers.
    ///
    /// # Errors
    /// `Retryable` while it is down, `Permanent` for credentials.
    async fn ping(&self) -> Result<()>;
    /// The columns of `table` as the source declares them now.
    ///
    /// # Errors
    /// `Permanent` when there is no such table.
    async fn columns(&self, table: &str) -> Result<Vec<Column>>;
    /// Reads the rows whose `fecha` is the given day. Reading changes nothing and may be repeated.
    ///
    /// # Errors
    /// `Permanent` for a value that does not fit its column; the text names row, column and value.
    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead>;
}

/// Where a query's input comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// Parquet objects, by path.
    Parquet(Vec<String>),
    /// The newest version of a Delta table, by its folder.
    Delta(String),
}

/// SQL over named inputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// The statement; it never contains values from outside.
    pub sql: String,
    /// Table name in the statement, and where it comes from.
    pub inputs: Vec<(String, Input)>,
}

/// One day of one Delta table, to be replaced.
#[derive(Debug, Clone)]
pub struct DayWrite {
    /// Folder of the table, for example `staging/ventas_validadas`.
    pub table: String,
    /// The day; rows of another day are refused.
    pub fecha: NaiveDate,
    /// Ordinal of the run; higher than any the table has seen for this day.
    pub epoch: i64,
    /// The query that yields the day's rows, `fecha` among the columns.
    pub query: Query,
}

/// What a write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    /// This call committed the given version of the table.
    New(u64),
    /// An earlier attempt of the same epoch had committed; nothing was written.
    Already(u64),
}

/// Delta tables and SQL over them.
#[async_trait]
pub trait Lakehouse: fmt::Debug + Send + Sync {
    /// Replaces exactly one day, at most once per `(table, fecha, epoch)`.
    ///
    /// Atomic: a reader sees the old day or the new one. Creates the table when it is missing.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch, never the next.
    async fn overwrite_day(&self, write: DayWrite) -> Result<Commit>;
    /// The highest epoch that has committed for `(table, fecha)`; `None` when there is none.
    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>>;
    /// Runs `query` and returns its rows in the order it asks for. An input table that does not exist is an error.
    async fn query(&self, query: &Query) -> Result<Vec<RecordBatch>>;
    /// Whether the Delta table exists.
    async fn exists(&self, table: &str) -> Result<bool>;
}

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
    /// At most one process holds a pipeline at a time; a run whose process died is taken over.
    ///
    /// # Errors
    /// `Retryable` with code `BUSY` when another live process holds the pipeline; the text names it.
    async fn begin(&self, pipeline: &str, fecha: NaiveDate, run_id: &str, floor: i64, now: DateTime<Utc>) -> Result<Run>;
    /// Ends a run. Idempotent.
    async fn finish(&self, run: &Run) -> Result<()>;
    /// All runs in order of (fecha, epoch).
    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>>;
}

/// Something a person should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alert {
    /// Alerts with the same key are one incident; at most 255 bytes.
    pub dedup_key: String,
    /// `source_unavailable`, `run_failed`, `day_held`, `sla_missed`.
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

/// Everything the platform needs from outside. Production and simulation differ in this value alone.
#[derive(Debug, Clone)]
pub struct Ports {
    /// Clock and ids.
    pub env: Arc<dyn Env>,
    /// Source tables.
    pub tables: Arc<dyn TableSource>,
    /// Raw objects.
    pub objects: Arc<dyn ObjectStore>,
    /// Delta tables.
    pub lakehouse: Arc<dyn Lakehouse>,
    /// Runs.
    pub ledger: Arc<dyn RunLedger>,
    /// Alerts.
    pub notifier: Arc<dyn Notifier>,
    /// Where the history of port calls goes.
    pub history: Arc<dyn HistorySink>,
}
