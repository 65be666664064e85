//! The warehouse that analysts and the dashboard read.

use std::fmt;

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;

use super::{Commit, Result};

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
    /// Runs one SELECT over the tables named in `tables`; it must contain no values from outside.
    ///
    /// # Errors
    /// `Permanent` when a table is missing or the statement is wrong.
    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>>;
}
