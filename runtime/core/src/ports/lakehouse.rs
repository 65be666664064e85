//! Delta tables, and SQL over them.

use std::fmt;

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;
use serde::{Deserialize, Serialize};

use super::Result;

/// Where a query's input comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Input {
    /// Parquet objects, by path.
    Parquet(Vec<String>),
    /// The newest version of a Delta table, by its folder.
    Delta(String),
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parquet(files) => write!(f, "{}", files.join(", ")),
            Self::Delta(folder) => write!(f, "{folder}"),
        }
    }
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

/// A whole Delta table, to be replaced: for small tables that have no days, such as dimensions.
#[derive(Debug, Clone)]
pub struct TableWrite {
    /// Folder of the table, for example `dim/productos_dim`.
    pub table: String,
    /// Ordinal of the write; a table that has seen it, or a higher one, keeps what it has.
    pub epoch: i64,
    /// The query that yields the table's rows.
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
    /// Replaces a whole table, at most once per `(table, epoch)`.
    ///
    /// Atomic: a reader sees the old rows or the new ones. Creates the table when it is missing. An epoch below one that
    /// has committed writes nothing either, so that of two writers the older cannot win.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch.
    async fn overwrite_table(&self, write: TableWrite) -> Result<Commit>;
    /// The highest epoch that has committed for `(table, fecha)`; `None` when there is none.
    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>>;
    /// Runs `query` and returns its rows in the order it asks for, as at least one batch. An input table that does not exist is an error.
    async fn query(&self, query: &Query) -> Result<Vec<RecordBatch>>;
    /// Looks after the log of a table: a checkpoint when the log has grown since the last one. Never part of a write, since
    /// a commit that succeeded must not be reported as an error. Idempotent; a missing table is no error.
    ///
    /// # Errors
    /// `Retryable`; the table is as readable as it was before.
    async fn maintain(&self, table: &str) -> Result<()>;
    /// Whether the Delta table exists.
    async fn exists(&self, table: &str) -> Result<bool>;
}
