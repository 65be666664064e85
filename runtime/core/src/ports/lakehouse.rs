//! Delta tables, and SQL over them.

use std::{fmt, sync::Arc};

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};

use super::{Column, Result};

/// The shortest retention, in hours, that VACUUM takes without being told to go below it.
pub const VACUUM_HOURS_MIN: u32 = 168;

/// Rows in memory, in their order: at least one batch, which has the columns.
pub type Rows = Arc<Vec<RecordBatch>>;

/// Where a query's input comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Parquet objects, by path.
    Parquet(Vec<String>),
    /// The newest version of a Delta table, by its folder.
    Delta(String),
    /// A Delta table as it was at a version.
    DeltaVersion {
        /// Folder of the table.
        table: String,
        /// The version; one that is not there any more, or never was, is an error that names those that are.
        version: u64,
    },
    /// A Delta table as it was at a time: the newest version that was committed at or before it, by the writers' clocks.
    DeltaTime {
        /// Folder of the table.
        table: String,
        /// The time; one before the first version that is there is an error that names that version.
        at: DateTime<Utc>,
    },
    /// Rows that are not stored.
    Rows(Rows),
    /// A Delta table, which need not be there yet, as it will be once these rows stand for a day: by it a day is judged
    /// before it is written.
    DeltaWithDay {
        /// Folder of the table.
        table: String,
        /// The day; the table's own rows of it are left out.
        fecha: NaiveDate,
        /// Rows of that day, with the columns of the table in any order.
        rows: Rows,
    },
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Parquet(files) => write!(f, "{}", files.join(", ")),
            Self::Delta(folder) => write!(f, "{folder}"),
            Self::DeltaVersion { table, version } => write!(f, "{table} at version {version}"),
            Self::DeltaTime { table, at } => write!(f, "{table} as of {}", at.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
            Self::Rows(rows) => write!(f, "{} rows in memory", count(rows)),
            Self::DeltaWithDay { table, fecha, rows } => write!(f, "{table} with {} rows for {fecha}", count(rows)),
        }
    }
}

fn count(rows: &[RecordBatch]) -> usize {
    rows.iter().map(RecordBatch::num_rows).sum()
}

/// SQL over named inputs.
///
/// Beside the functions of the engine there is `not_null(value, 'column')`: a null stops the query with an error that
/// names the column, and a table that is made from the query refuses nulls in that column from then on. There is
/// `sha256_hex(text)`, 64 hexadecimal digits, and `hash_before(text, '|')`, a 64-bit hash of what stands before the first
/// separator, or of the whole text where that is empty: equal beginnings have equal hashes, unequal ones rarely.
#[derive(Debug, Clone, PartialEq)]
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

/// Who writes what, and for the how manieth time. A write happens at most once per `(table, writer, epoch)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Pipeline and partition, for example `api_dimensiones:1997-01-01`. Writers do not disturb each other's epochs.
    pub writer: String,
    /// Ordinal of the run; higher than any that the table has seen from this writer.
    pub epoch: i64,
}

/// Rows to be added to a Delta table.
#[derive(Debug, Clone)]
pub struct Append {
    /// Folder of the table.
    pub table: String,
    /// Who writes.
    pub mark: Mark,
    /// Columns by which the table is partitioned when this call makes it; an existing table keeps its own.
    pub partition_by: Vec<String>,
    /// The query that yields the rows.
    pub query: Query,
}

/// Rows in memory to be added to a Delta table, by a writer that goes on where it stopped.
#[derive(Debug, Clone)]
pub struct AppendRows {
    /// Folder of the table.
    pub table: String,
    /// Who writes. The epoch is the writer's position after these rows, for example an offset.
    pub mark: Mark,
    /// The writer's last epoch, where these rows begin; `None` when it has never written to the table.
    pub after: Option<i64>,
    /// Columns by which the table is partitioned when this call makes it; an existing table keeps its own.
    pub partition_by: Vec<String>,
    /// The rows, at least one batch, all of one schema. Without rows the epoch alone is noted.
    pub batches: Vec<RecordBatch>,
}

/// Code of a write whose writer is not where it is expected to be: somebody else has written under its name.
pub const EPOCH_MOVED: &str = "EPOCH_MOVED";

/// Rows to be merged into a Delta table by their key.
#[derive(Debug, Clone)]
pub struct Upsert {
    /// Folder of the table.
    pub table: String,
    /// Who writes.
    pub mark: Mark,
    /// Key columns, at least one. A null in one, or two rows with equal keys, is an error that names a key.
    pub keys: Vec<String>,
    /// Columns whose difference alone is no change, such as `_loaded_at`.
    pub ignored: Vec<String>,
    /// The query that yields the rows. Rows of the table whose keys it does not have stay as they are.
    pub query: Query,
}

/// From when the rows of a slowly changing dimension hold; it also decides the type of the period's columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effective {
    /// From the start of a day; the columns are dates.
    Date(NaiveDate),
    /// From an instant, to the microsecond; the columns are timestamps in UTC.
    Time(DateTime<Utc>),
}

/// What becomes of a key that the rows of a slowly changing dimension do not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// The rows are part of the dimension: the key's version goes on.
    Goes,
    /// The rows are the whole dimension: the key's version ends at the effective time, and the row stays as history.
    /// A whole dimension without rows is refused: it is more likely a source that failed.
    Ends,
}

/// Names of the columns that hold the period of a version: from `from`, inclusive, to `to`, exclusive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Period {
    /// First moment at which the values hold.
    pub from: String,
    /// First moment at which they no longer hold; null while they do.
    pub to: String,
    /// Whether `to` is null.
    pub current: String,
}

/// Rows of a slowly changing dimension of type 2, as they are from an effective time on.
#[derive(Debug, Clone)]
pub struct Scd2 {
    /// Folder of the table.
    pub table: String,
    /// Who writes.
    pub mark: Mark,
    /// Key columns, at least one. A null in one, or two rows with equal keys, is an error that names a key.
    pub keys: Vec<String>,
    /// Columns whose change begins a new version, at least one. The others are carried along from the row that began it.
    pub tracked: Vec<String>,
    /// From when the rows hold.
    pub effective: Effective,
    /// What becomes of keys that are not among the rows.
    pub absent: Absent,
    /// The period's columns, which the query does not have.
    pub period: Period,
    /// The query that yields the rows.
    pub query: Query,
}

/// Columns to be added to a Delta table; each is nullable, and null in the rows that are there.
#[derive(Debug, Clone)]
pub struct AddColumns {
    /// Folder of the table.
    pub table: String,
    /// Who changes it.
    pub mark: Mark,
    /// Name and type: `string`, `int64`, `float64`, `boolean`, `date`, `timestamp` or `decimal(p,s)`.
    pub columns: Vec<Column>,
}

/// A Delta table to be put back to an earlier version.
#[derive(Debug, Clone)]
pub struct Restore {
    /// Folder of the table.
    pub table: String,
    /// Who restores.
    pub mark: Mark,
    /// The version whose rows and columns come back.
    pub version: u64,
}

/// Files of a Delta table to be rewritten.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Optimize {
    /// Folder of the table.
    pub table: String,
    /// Columns by which rows that are near each other are put together; none only joins small files.
    pub z_order: Vec<String>,
    /// Wanted size of a file in bytes; larger ones are not joined further.
    pub target_bytes: u64,
}

/// What was rewritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rewritten {
    /// Files that hold the rows now.
    pub files_added: u64,
    /// Files that held them before.
    pub files_removed: u64,
    /// Newest version of the table afterwards; that of before when there was nothing to do.
    pub version: u64,
}

/// Files of a Delta table to be removed from the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vacuum {
    /// Folder of the table.
    pub table: String,
    /// The present, from `Env`.
    pub now: DateTime<Utc>,
    /// Hours before `now` whose versions stay readable.
    pub retention_hours: u32,
    /// Takes a retention below [`VACUUM_HOURS_MIN`], under which a reader or a writer at work can lose its files.
    pub allow_short_retention: bool,
    /// Only says what would be removed.
    pub dry_run: bool,
}

/// A version of a Delta table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableVersion {
    /// Number, from 0.
    pub version: u64,
    /// Time of the commit, by the clock of its writer.
    pub at: DateTime<Utc>,
    /// What was done, for example `WRITE`, `MERGE`, `OPTIMIZE`, `RESTORE`.
    pub operation: String,
    /// Rows in the files that the version added, rows that were only moved included; `None` when a file does not say.
    pub rows_written: Option<u64>,
    /// Files that the version added.
    pub files_added: u64,
    /// Files that the version took out.
    pub files_removed: u64,
}

/// A whole Delta table, to be replaced: for small tables that have no days, such as dimensions.
#[derive(Debug, Clone)]
pub struct TableWrite {
    /// Folder of the table, for example `dim/productos_dim`.
    pub table: String,
    /// Who writes. Give all writers of a table one name: then an older epoch never replaces a newer one.
    pub mark: Mark,
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
///
/// **Schema.** A write has exactly the columns of its table, in any order. A missing, extra or retyped column, and a null
/// in a column that is not nullable, is a `Permanent` error that names the column, the type found and the type expected,
/// and nothing is written. Only [`Lakehouse::add_columns`] changes the columns of a table. A column of a new table is
/// nullable unless the query says that it never is null; see [`Query`].
///
/// **Dispositions of writes.** No call tries again by itself. `Retryable` when another writer was faster, `Permanent` when
/// the rows are at fault, `Unknown` when the store failed and the log does not say that the write took place.
#[async_trait]
pub trait Lakehouse: fmt::Debug + Send + Sync {
    /// Replaces exactly one day, at most once per `(table, fecha, epoch)`.
    ///
    /// Atomic: a reader sees the old day or the new one. Creates the table when it is missing.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch, never the next.
    async fn overwrite_day(&self, write: DayWrite) -> Result<Commit>;
    /// Replaces all rows of a table, at most once per mark. Atomic: a reader sees the old rows or the new ones. Creates the
    /// table when it is missing. An epoch below one that has committed writes nothing either.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch, never the next.
    async fn overwrite_table(&self, write: TableWrite) -> Result<Commit>;
    /// The highest epoch that has committed for `(table, fecha)`; `None` when there is none.
    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>>;
    /// Adds rows, at most once per mark. Atomic. Creates the table when it is missing.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch, never the next.
    async fn append(&self, append: Append) -> Result<Commit>;
    /// Adds rows of a writer that goes on exactly where it stopped, at most once per mark. Atomic. Creates the table when it
    /// is missing. Two processes that write under one name can therefore neither repeat nor skip rows: the position that
    /// the table has decides, and the slower of the two is refused.
    ///
    /// # Errors
    /// `Retryable` with code [`EPOCH_MOVED`] when the writer's last epoch is neither `after` nor at or above that of the
    /// mark: ask [`Lakehouse::writer_epoch`] and go on from there. Otherwise any disposition; after `Unknown`, repeat the
    /// same call.
    async fn append_rows(&self, rows: AppendRows) -> Result<Commit>;
    /// Inserts the rows whose keys the table does not have and replaces those whose columns differ, at most once per mark.
    /// Rows that do not differ stay as they are. Atomic. Creates the table when it is missing.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch, never the next.
    async fn upsert(&self, upsert: Upsert) -> Result<Commit>;
    /// Records how the keys of a dimension are from an effective time on, at most once per mark. Atomic. Creates the table
    /// when it is missing.
    ///
    /// Per key the periods never overlap, two that touch differ in a tracked column, and at most one is current. The
    /// rows hold until the next change that the table knows, so an effective time before the newest changes nothing after
    /// that change. Repeating an earlier time with the same rows gives the same table; after a correction of an earlier
    /// time, repeat the later ones in order, and the table is as if all had been applied in order from the start.
    ///
    /// # Errors
    /// Any disposition. After `Unknown`, repeat the same epoch, never the next.
    async fn upsert_scd2(&self, change: Scd2) -> Result<Commit>;
    /// The highest epoch that has committed for `(table, writer)`; `None` when there is none.
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>>;
    /// Adds nullable columns, at most once per mark. A column that is there with the same type is left alone.
    ///
    /// # Errors
    /// `Permanent` when the table is missing, or a column is there with another type. Otherwise as for a write.
    async fn add_columns(&self, change: AddColumns) -> Result<Commit>;
    /// Puts the rows and columns of an earlier version back, as a new version, at most once per mark. Epochs are not put
    /// back: a run that is to write a restored day again needs a higher one.
    ///
    /// # Errors
    /// `Permanent` when the version is not readable, naming those that are. Otherwise as for a write.
    async fn restore(&self, restore: Restore) -> Result<Commit>;
    /// The newest versions of a table, newest first, at most `limit`.
    ///
    /// # Errors
    /// `Permanent` when the table is missing.
    async fn versions(&self, table: &str, limit: usize) -> Result<Vec<TableVersion>>;
    /// Rewrites files; the rows stay the same. Partitions that were not written since the last call with the same columns
    /// are left alone. Each partition is a version of its own, in order of their values, so that a call that is cut off
    /// has done some of them, and a repeat does the others. Harmless to repeat.
    ///
    /// # Errors
    /// `Permanent` when the table or a column is missing. `Retryable` otherwise, also when another writer was faster: the
    /// rows are the same whether or not the call took effect.
    async fn optimize(&self, optimize: Optimize) -> Result<Rewritten>;
    /// Removes files that no version needs which was current at any time within the retention, among them what dead
    /// attempts left behind, and returns their paths below the table, sorted. Entries of the log that a checkpoint stands
    /// for go, too, when they are older than the retention and than 30 days. Harmless to repeat.
    ///
    /// # Errors
    /// `Permanent` when the table is missing or the retention is too short. `Retryable` otherwise: some of the files may be
    /// gone, and a repeat removes the rest.
    async fn vacuum(&self, vacuum: Vacuum) -> Result<Vec<String>>;
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
