//! Tables of a source system, read a day at a time.

use std::{collections::BTreeSet, fmt};

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

use super::Result;

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
    /// The columns of `table` that the source itself keeps from being null, in order of name; `None` where it cannot tell,
    /// as for a file or a view.
    ///
    /// # Errors
    /// `Permanent` when there is no such table.
    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>>;
    /// Reads the rows whose `fecha` is the given day. Reading changes nothing and may be repeated.
    ///
    /// # Errors
    /// `Permanent` for a value that does not fit its column; the text names row, column and value.
    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead>;
    /// Reads all rows of a table, whether or not it has days. Reading changes nothing and may be repeated.
    ///
    /// # Errors
    /// As [`TableSource::read_day`]; `Permanent` with code `42P01` when there is no such table.
    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead>;
}
