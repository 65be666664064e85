//! The warehouse that analysts and the dashboard read.

use std::fmt;

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;

use super::{Commit, Mark, Result};

/// Rows to be merged into a table of the warehouse by their key, by a writer that goes on where it stopped.
#[derive(Debug, Clone)]
pub struct UpsertRows {
    /// Table, for example `realtime.metricas_clicks`.
    pub table: String,
    /// Who writes. The epoch is the writer's position after these rows, for example an offset.
    pub mark: Mark,
    /// The writer's last epoch, where these rows begin; `None` when it has never written to the table.
    pub after: Option<i64>,
    /// Columns that identify a row, at least one. Two nulls in one are equal. The batches have each key once.
    pub keys: Vec<String>,
    /// The rows, at least one batch, all of one schema. Without rows the epoch alone is noted.
    pub batches: Vec<RecordBatch>,
}

/// Tables that are loaded a day at a time and read by SQL.
#[async_trait]
pub trait Warehouse: fmt::Debug + Send + Sync {
    /// Replaces exactly one day of `table` by `batches`, at most once per `(table, fecha, epoch)`.
    ///
    /// Atomic: a reader sees the old day or the new one. The table is made from the batches' schema when it is missing;
    /// `fecha` must be one of its columns, and `batches` hold at least one batch, which may have no rows.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch, never the next.
    async fn load_day(&self, table: &str, fecha: NaiveDate, epoch: i64, batches: Vec<RecordBatch>) -> Result<Commit>;
    /// Replaces the rows whose keys the table has and inserts the others, at most once per mark, for a writer that goes on
    /// exactly where it stopped. Rows of other keys stay as they are. Atomic. The table is made from the batches' schema
    /// when it is missing.
    ///
    /// # Errors
    /// `Retryable` with code [`super::EPOCH_MOVED`] when the writer's last epoch is neither `after` nor at or above that of
    /// the mark: ask [`Warehouse::writer_epoch`] and go on from there. `Permanent` for a key column that is missing and for
    /// a key that the batches have twice. Otherwise any disposition; after `Unknown`, repeat the same call.
    async fn upsert_rows(&self, rows: UpsertRows) -> Result<Commit>;
    /// The highest epoch that has committed for `(table, writer)` by [`Warehouse::upsert_rows`]; `None` when there is none.
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>>;
    /// Runs one SELECT over the tables named in `tables`; it must contain no values from outside.
    ///
    /// # Errors
    /// `Permanent` when a table is missing or the statement is wrong.
    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>>;
}
