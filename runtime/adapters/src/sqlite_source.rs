//! An SQLite database as a source.
//!
//! SQLite declares types and does not hold values to them, so each value is held to its column's here. Decimals that it keeps
//! as binary fractions are taken by their shortest text, which gives back every decimal of up to 15 digits. Times are RFC 3339,
//! or SQLite's own `YYYY-MM-DD HH:MM:SS`, which is in UTC. The file is only read.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;
use futures::{StreamExt, TryStreamExt};
use simulacro_core::{
    batch::arrow_schema,
    dimensions::decode::{Cell, Rows},
    ports::{Column, PartitionRead, PortError, Result, TableSource},
};
use sqlx::{
    AssertSqlSafe, Row, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteRow},
};
use tokio::sync::mpsc;

/// What every database file begins with (SQLite file format, section 1.3).
const MAGIC: &[u8; 16] = b"SQLite format 3\0";
/// Rows of a batch.
const BATCH_ROWS: u64 = 65_536;
/// Batches that wait for a reader.
const QUEUED_BATCHES: usize = 2;

/// The source.
#[derive(Debug)]
pub struct SqliteSource {
    path: PathBuf,
    pool: SqlitePool,
}

/// A column as it is declared.
struct Declared {
    column: Column,
    is_not_null: bool,
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// The contract's word for a declared type; the type itself in lower case where contracts have none.
fn physical(declared: &str) -> String {
    let text: String = declared.to_lowercase().split_whitespace().collect();
    let (name, arguments) = text.split_once('(').map_or((text.as_str(), ""), |(name, rest)| (name, rest.trim_end_matches(')')));
    match name {
        "text" | "varchar" | "char" | "clob" => "string".into(),
        "decimal" | "numeric" if !arguments.is_empty() => format!("decimal({arguments})"),
        "date" => "date".into(),
        "timestamp" | "timestamptz" | "datetime" => "timestamp".into(),
        "integer" | "int" | "bigint" => "int64".into(),
        "real" | "double" | "float" => "float64".into(),
        "boolean" => "boolean".into(),
        _ => text,
    }
}

/// SQLite's own form of a time, as RFC 3339.
fn rfc3339(text: &str) -> String {
    if text.as_bytes().get(10) == Some(&b' ') && !text.ends_with('Z') {
        format!("{}Z", text.replacen(' ', "T", 1))
    } else {
        text.to_owned()
    }
}

impl SqliteSource {
    /// Whether a file begins as a database does.
    pub fn is_database(path: &Path) -> bool {
        let mut start = [0; 16];
        File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok_and(|()| &start == MAGIC)
    }

    /// Takes a database file; asks it nothing yet.
    ///
    /// # Errors
    /// `Permanent` when the file is no database.
    pub fn open(path: &Path) -> Result<Self> {
        if !Self::is_database(path) {
            let text =
                format!("open {}: found no SQLite database, expected one or a folder of CSV or Parquet files", path.display());
            return Err(PortError::permanent(text));
        }
        let options = SqliteConnectOptions::new().filename(path).create_if_missing(false).read_only(true);
        Ok(Self { path: path.to_owned(), pool: SqlitePoolOptions::new().connect_lazy_with(options) })
    }

    fn failed<'a>(&self, what: &'a str) -> impl Fn(sqlx::Error) -> PortError + use<'a> {
        let place = self.path.display().to_string();
        move |e| {
            // 5 and 6: busy and locked, which pass; the low byte of an extended code.
            let code = e.as_database_error().and_then(|e| e.code()).and_then(|c| c.parse::<u32>().ok());
            let text = format!("{what} in {place}");
            let passes = code.is_some_and(|c| [5, 6].contains(&(c & 0xFF))) || matches!(e, sqlx::Error::PoolTimedOut);
            if passes { PortError::retryable(text) } else { PortError::permanent(text) }.because(e)
        }
    }

    async fn begin(&self) -> Result<Transaction<'static, Sqlite>> {
        self.pool.begin().await.map_err(self.failed("begin to read"))
    }

    async fn declared(&self, tx: &mut Transaction<'static, Sqlite>, table: &str) -> Result<Vec<Declared>> {
        let rows = sqlx::query("SELECT name, type, \"notnull\", pk FROM pragma_table_info(?) ORDER BY cid")
            .bind(table)
            .fetch_all(&mut **tx)
            .await
            .map_err(self.failed("read the columns"))?;
        if rows.is_empty() {
            let text = format!("read {}: found no table {table}, expected one", self.path.display());
            return Err(PortError::permanent(text).code("42P01"));
        }
        let declared = |row: SqliteRow| {
            let kind: String = row.try_get(1)?;
            let column = Column { name: row.try_get(0)?, physical_type: physical(&kind) };
            Ok(Declared { column, is_not_null: row.try_get::<i64, _>(2)? != 0 })
        };
        rows.into_iter().map(declared).collect::<Result<_, sqlx::Error>>().map_err(self.failed("read the columns"))
    }

    /// How rows come in the order in which they were written; nothing for what has no such order.
    async fn order(&self, tx: &mut Transaction<'static, Sqlite>, table: &str) -> Result<&'static str> {
        let sql = "SELECT count(*) FROM pragma_table_list(?) WHERE schema = 'main' AND type = 'table' AND wr = 0";
        let count: i64 =
            sqlx::query_scalar(sql).bind(table).fetch_one(&mut **tx).await.map_err(self.failed("look at the table"))?;
        Ok(if count > 0 { " ORDER BY rowid" } else { "" })
    }

    async fn rows(&self, table: &str, day: Option<NaiveDate>, columns: &[Column]) -> Result<PartitionRead> {
        let what = day.map_or_else(|| format!("read {table}"), |day| format!("read {table} of {day}"));
        arrow_schema(columns)?;
        // One transaction: count and rows are of one moment.
        let mut tx = self.begin().await?;
        let there = self.declared(&mut tx, table).await?;
        if let Some(missing) = columns.iter().find(|c| !there.iter().any(|d| d.column.name == c.name)) {
            return Err(PortError::permanent(format!("{what}: column {} is missing", missing.name)).code("42703"));
        }
        let order = self.order(&mut tx, table).await?;
        let filter = if day.is_some() { " WHERE fecha = ?" } else { "" };
        let count = AssertSqlSafe(format!("SELECT count(*) FROM {}{filter}", quoted(table)));
        let names: Vec<String> = columns.iter().map(|c| format!("CAST({} AS TEXT)", quoted(&c.name))).collect();
        let select = format!("SELECT {} FROM {}{filter}{order}", names.join(", "), quoted(table));
        let counted = day.map(|d| d.to_string()).into_iter().fold(sqlx::query_scalar(count), |query, day| query.bind(day));
        let expected_rows: i64 = counted.fetch_one(&mut *tx).await.map_err(self.failed("count the rows"))?;
        let (to, from) = mpsc::channel(QUEUED_BATCHES);
        let (columns, failed) = (columns.to_vec(), self.failed("read the rows"));
        tokio::spawn(async move {
            let end = send_rows(&mut tx, select, day, &columns, &what, &to, &failed).await;
            if let Err(e) = end {
                // A reader that is gone wants no error either.
                let _ = to.send(Err(e)).await;
            }
        });
        let batches = futures::stream::unfold(from, |mut from| async move { from.recv().await.map(|batch| (batch, from)) });
        Ok(PartitionRead { expected_rows: u64::try_from(expected_rows).unwrap_or_default(), batches: batches.boxed() })
    }

    /// The days of a table, in order.
    ///
    /// # Errors
    /// `Permanent` when there is no such table, or a day is none.
    pub async fn days(&self, table: &str) -> Result<Vec<NaiveDate>> {
        let mut tx = self.begin().await?;
        self.declared(&mut tx, table).await?;
        let sql = AssertSqlSafe(format!("SELECT DISTINCT CAST(fecha AS TEXT) FROM {} ORDER BY 1", quoted(table)));
        let days: Vec<Option<String>> =
            sqlx::query_scalar(sql).fetch_all(&mut *tx).await.map_err(self.failed("read the days"))?;
        let parsed = days.into_iter().map(|day| {
            let day = day.unwrap_or_else(|| "null".into());
            let text =
                format!("read {}: column fecha of {table} has {day:?}, expected a date such as 1997-01-31", self.path.display());
            day.parse().map_err(|e| PortError::permanent(text).because(e))
        });
        parsed.collect()
    }
}

/// Sends the rows in batches until they end or nobody wants them.
async fn send_rows(
    tx: &mut Transaction<'static, Sqlite>,
    select: String,
    day: Option<NaiveDate>,
    columns: &[Column],
    what: &str,
    to: &mpsc::Sender<Result<RecordBatch>>,
    failed: &(impl Fn(sqlx::Error) -> PortError + Send + Sync),
) -> Result<()> {
    let query = day.map(|d| d.to_string()).into_iter().fold(sqlx::query(AssertSqlSafe(select)), |query, day| query.bind(day));
    let mut found = query.fetch(&mut **tx);
    let (mut rows, mut number) = (Rows::new(columns)?, 0_u64);
    while let Some(row) = found.try_next().await.map_err(failed)? {
        number += 1;
        for (at, column) in columns.iter().enumerate() {
            let value: Option<String> = row.try_get(at).map_err(failed)?;
            let value = value.map(|v| if column.physical_type == "timestamp" { rfc3339(&v) } else { v });
            let cell = value.as_deref().map_or(Cell::Null, Cell::Text);
            rows.push(at, cell).map_err(|e| PortError::permanent(format!("{what}, row {number}, {e}")))?;
        }
        rows.end_row();
        if rows.rows() >= BATCH_ROWS && to.send(std::mem::replace(&mut rows, Rows::new(columns)?).finish()).await.is_err() {
            return Ok(());
        }
    }
    if rows.rows() > 0 || number == 0 {
        // As above: nobody may want them.
        let _ = to.send(rows.finish()).await;
    }
    Ok(())
}

#[async_trait]
impl TableSource for SqliteSource {
    async fn ping(&self) -> Result<()> {
        sqlx::query("SELECT count(*) FROM sqlite_schema")
            .fetch_one(&self.pool)
            .await
            .map(|_| ())
            .map_err(self.failed("look at the tables"))
    }

    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        let mut tx = self.begin().await?;
        Ok(self.declared(&mut tx, table).await?.into_iter().map(|d| d.column).collect())
    }

    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        let mut tx = self.begin().await?;
        let declared = self.declared(&mut tx, table).await?;
        Ok(Some(declared.into_iter().filter(|d| d.is_not_null).map(|d| d.column.name).collect()))
    }

    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        self.rows(table, Some(fecha), columns).await
    }

    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        self.rows(table, None, columns).await
    }
}
