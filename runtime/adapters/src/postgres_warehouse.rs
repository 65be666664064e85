//! The warehouse in PostgreSQL: tables that are loaded a day at a time. `analytics.metricas_diarias` is the table of that
//! name in the schema `analytics`.
//!
//! A load is one transaction: it deletes the day, copies the new rows and writes its epoch beside them, so that all of
//! it happens or nothing does, and at most once per epoch. Loads of one table wait for each other by an advisory lock.
//! When the answer to the commit is lost, the epoch decides: it is read under the same lock, which the lost
//! transaction holds until it is over, so that the answer cannot change afterwards. Rows that a stream brings are loaded
//! by key, under epochs of their own (`upsert`).
//!
//! What this leaves out: indexes other than on `fecha` or the key, changes to a table's columns, and grants.

mod upsert;

use std::sync::Arc;

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch},
    compute::{CastOptions, cast_with_options},
    datatypes::{DataType, Date32Type, Field, Schema, TimeUnit},
};
use async_trait::async_trait;
use chrono::NaiveDate;
use futures::{FutureExt, StreamExt};
use simulacro_core::ports::{Commit, Disposition, PortError, Result, UpsertRows, Warehouse};
use simulacro_lakehouse::copy::{
    CopyColumn, CopyDecoder, CopyError, CopyLimits, CopyType, numeric_scales, write_header, write_rows, write_trailer,
};
use sqlx::{AssertSqlSafe, Column as _, Executor, PgConnection, Row, SqlSafeStr, Statement, TypeInfo, postgres::PgRow};

use crate::postgres::{PostgresServer, Value, classify, classify_commit, quote, within};

/// Rows that are encoded before they are sent.
const SEND_ROWS: usize = 4_096;
/// Two processes that create the same schema or table at once would both find it missing: one waits.
const LOCK: &str = "SELECT pg_advisory_xact_lock(hashtextextended('simulacro warehouse', 0))";

/// The warehouse.
#[derive(Debug)]
pub struct PostgresWarehouse {
    server: PostgresServer,
    loads: String,
    marks: String,
    query_bytes_max: usize,
}

/// What happened inside the transaction of a load.
enum Loaded {
    /// All but the commit is done; this is the version it will have.
    Ready(u64),
    /// An equal or later epoch had been committed as this version.
    Already(u64),
}

/// The type that a table's column has for a wire type, as `format_type` writes it.
fn declared(kind: CopyType) -> String {
    match kind {
        CopyType::Text | CopyType::Uuid => "text".into(),
        CopyType::Bool => "boolean".into(),
        CopyType::Int2 => "smallint".into(),
        CopyType::Int4 => "integer".into(),
        CopyType::Int8 => "bigint".into(),
        CopyType::Float8 => "double precision".into(),
        CopyType::Numeric { precision, scale } => format!("numeric({precision},{scale})"),
        CopyType::Date => "date".into(),
        CopyType::Timestamp => "timestamp with time zone".into(),
    }
}

/// The narrowest type with a wire type that holds every value of `data_type`; the same type when there is none.
fn widened(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Utf8View | DataType::LargeUtf8 => DataType::Utf8,
        DataType::Dictionary(_, values) => widened(values),
        DataType::Int8 | DataType::UInt8 => DataType::Int16,
        DataType::UInt16 => DataType::Int32,
        DataType::UInt32 => DataType::Int64,
        DataType::Float32 => DataType::Float64,
        DataType::Timestamp(_, Some(_)) => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        other => other.clone(),
    }
}

/// The batch with columns that have a wire type.
fn widen(batch: &RecordBatch) -> Result<RecordBatch> {
    let failed = |e| PortError::permanent("prepare rows for loading").because(e);
    let options = CastOptions { safe: false, ..CastOptions::default() };
    let cast = |column: &ArrayRef| cast_with_options(column, &widened(column.data_type()), &options);
    let columns = batch.columns().iter().map(cast).collect::<std::result::Result<Vec<_>, _>>().map_err(failed)?;
    let schema = batch.schema();
    let fields = schema.fields().iter().zip(&columns).map(|(f, c)| Field::new(f.name(), c.data_type().clone(), true));
    RecordBatch::try_new(Arc::new(Schema::new(fields.collect::<Vec<_>>())), columns).map_err(failed)
}

/// Refuses rows of another day.
fn check_day(what: &str, batch: &RecordBatch, fecha: NaiveDate) -> Result<()> {
    let Some(column) = batch.column_by_name("fecha").filter(|c| c.data_type() == &DataType::Date32) else {
        return Err(PortError::permanent(format!("{what}: found no column fecha of type date, expected one")));
    };
    let expected = (fecha - NaiveDate::default()).num_days();
    for (row, days) in column.as_primitive::<Date32Type>().iter().enumerate() {
        if days.map(i64::from) != Some(expected) {
            let found = days.map_or("null".to_owned(), |days| format!("day {days} after 1970-01-01"));
            return Err(PortError::permanent(format!("{what}: row {}, column fecha: found {found}, expected {fecha}", row + 1)));
        }
    }
    Ok(())
}

fn copy_failed(what: &str, error: CopyError) -> PortError {
    PortError::permanent(what).because(error)
}

impl PostgresWarehouse {
    /// Opens the warehouse in the server's schema and makes what is missing. A query may return at most
    /// `query_bytes_max` bytes on the wire.
    ///
    /// # Errors
    /// As for any statement; `Permanent` when the tables cannot be made.
    pub async fn open(server: PostgresServer, query_bytes_max: usize) -> Result<Self> {
        let schema = quote(&server.schema)?;
        let (loads, marks) = (server.table("_loads")?, server.table("_marks")?);
        let mut connection = server.connect().await?;
        let create = format!(
            "BEGIN; {LOCK}; CREATE SCHEMA IF NOT EXISTS {schema}; \
             CREATE TABLE IF NOT EXISTS {loads} (table_name text NOT NULL, fecha date NOT NULL, epoch bigint NOT NULL, \
             version bigint NOT NULL, PRIMARY KEY (table_name, fecha)); \
             CREATE TABLE IF NOT EXISTS {marks} (table_name text NOT NULL, writer text NOT NULL, epoch bigint NOT NULL, \
             version bigint NOT NULL, PRIMARY KEY (table_name, writer)); COMMIT"
        );
        server.run(&mut connection, create).await.map_err(|e| classify("create the tables of the warehouse", e))?;
        server.close(connection).await;
        Ok(Self { server, loads, marks, query_bytes_max })
    }

    /// Begins a transaction that no other load of the table runs beside.
    async fn lock(&self, connection: &mut PgConnection, table: &str) -> sqlx::Result<()> {
        self.server.run(connection, "BEGIN").await?;
        let lock = "SELECT pg_advisory_xact_lock(hashtextextended('simulacro load ' || $1::text, 0))";
        // A table of the same name in another schema must not wait.
        let (schema, name) = self.server.split(table);
        let key = format!("{schema}.{name}");
        self.server.rows(connection, lock, &[Value::Text(&key)]).await.map(|_| ())
    }

    /// Begins a transaction that no other load of the table runs beside, and reads epoch and version of the day.
    async fn begin(&self, connection: &mut PgConnection, table: &str, fecha: NaiveDate) -> sqlx::Result<Option<(i64, u64)>> {
        self.lock(connection, table).await?;
        let sql = format!("SELECT epoch, version FROM {} WHERE table_name = $1::text AND fecha = $2::text::date", self.loads);
        let day = fecha.to_string();
        let rows = self.server.rows(connection, sql, &[Value::Text(table), Value::Text(&day)]).await?;
        let read = |row: &PgRow| Ok((row.try_get("epoch")?, row.try_get::<i64, _>("version")?.unsigned_abs()));
        rows.first().map(read).transpose()
    }

    /// Makes the table with an index on some columns, or compares its columns with those of the rows.
    async fn prepare(
        &self,
        connection: &mut PgConnection,
        what: &str,
        table: &str,
        schema: &Schema,
        indexed: &[&str],
    ) -> Result<()> {
        let failed = |e: sqlx::Error| classify(what, e);
        let mut wanted = Vec::new();
        for field in schema.fields() {
            let kind = CopyType::of(field.data_type()).ok_or_else(|| {
                let found = field.data_type();
                PortError::permanent(format!("{what}: column {} has type {found}, which PostgreSQL has not", field.name()))
            })?;
            wanted.push((field.name().clone(), declared(kind)));
        }
        let sql = "SELECT a.attname::text AS name, format_type(a.atttypid, a.atttypmod) AS declared \
                   FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid \
                   WHERE n.nspname = $1::text AND c.relname = $2::text AND a.attnum > 0 AND NOT a.attisdropped \
                   ORDER BY a.attnum";
        let (schema_name, name) = self.server.split(table);
        let values = [Value::Text(schema_name), Value::Text(name)];
        let rows = self.server.rows(connection, sql, &values).await.map_err(failed)?;
        let read = |row: &PgRow| Ok((row.try_get("name")?, row.try_get("declared")?));
        let found: Vec<(String, String)> = rows.iter().map(read).collect::<sqlx::Result<_>>().map_err(failed)?;
        if found.is_empty() {
            let columns = wanted.iter().map(|(name, declared)| Ok(format!("{} {declared}", quote(name)?)));
            let columns = columns.collect::<Result<Vec<_>>>()?.join(", ");
            let table = self.server.table(table)?;
            let indexed = indexed.iter().map(|name| quote(name)).collect::<Result<Vec<_>>>()?.join(", ");
            let create = format!(
                "{LOCK}; CREATE SCHEMA IF NOT EXISTS {}; CREATE TABLE {table} ({columns}); CREATE INDEX ON {table} ({indexed})",
                quote(schema_name)?
            );
            self.server.run(connection, create).await.map_err(failed)?;
            return Ok(());
        }
        let mut differences = Vec::new();
        for (name, declared) in &wanted {
            match found.iter().find(|(n, _)| n == name) {
                Some((_, have)) if have == declared || (declared == "text" && have.starts_with("character varying")) => {}
                Some((_, have)) => differences.push(format!("column {name} has type {have}, expected {declared}")),
                None => differences.push(format!("column {name} is missing, expected {declared}")),
            }
        }
        for (name, have) in found.iter().filter(|(n, _)| !wanted.iter().any(|(w, _)| w == n)) {
            differences.push(format!("column {name} ({have}) is not among the rows' columns"));
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(PortError::permanent(format!("{what}: {}", differences.join("; "))).code("42804"))
    }

    /// Copies the rows into the table.
    async fn copy(&self, connection: &mut PgConnection, what: &str, table: &str, batches: &[RecordBatch]) -> Result<()> {
        let bound = self.server.patience();
        let failed = |e: sqlx::Error| classify(what, e);
        let Some(first) = batches.first() else { return Ok(()) };
        let schema = first.schema();
        let names = schema.fields().iter().map(|f| quote(f.name())).collect::<Result<Vec<_>>>()?.join(", ");
        let statement = format!("COPY {} ({names}) FROM STDIN (FORMAT binary)", self.server.table(table)?);
        let mut copy = within(bound, connection.copy_in_raw(&statement)).await.map_err(failed)?;
        let mut bytes = Vec::new();
        write_header(&mut bytes);
        for batch in batches {
            for from in (0..batch.num_rows()).step_by(SEND_ROWS) {
                if let Err(error) = write_rows(batch, from, from + SEND_ROWS, &mut bytes) {
                    // The error that the server answers with is the one we ask for.
                    let _ = within(bound, copy.abort("a value cannot be written")).await;
                    return Err(copy_failed(what, error));
                }
                within(bound, copy.send(bytes.as_slice())).await.map_err(failed)?;
                bytes.clear();
            }
        }
        write_trailer(&mut bytes);
        within(bound, copy.send(bytes)).await.map_err(failed)?;
        let copied = within(bound, copy.finish()).await.map_err(failed)?;
        let rows = batches.iter().map(|b| b.num_rows() as u64).sum::<u64>();
        if copied != rows {
            return Err(PortError::permanent(format!("{what}: the server took {copied} rows, expected {rows}")));
        }
        Ok(())
    }

    /// All of a load but its commit.
    async fn load(
        &self,
        connection: &mut PgConnection,
        what: &str,
        table: &str,
        (fecha, epoch): (NaiveDate, i64),
        batches: &[RecordBatch],
    ) -> Result<Loaded> {
        let failed = |e: sqlx::Error| classify(what, e);
        if let Some((seen, version)) = self.begin(connection, table, fecha).await.map_err(failed)?
            && seen >= epoch
        {
            return Ok(Loaded::Already(version));
        }
        let Some(first) = batches.first() else {
            return Err(PortError::permanent(format!("{what}: found no batch, expected at least one")));
        };
        self.prepare(connection, what, table, &first.schema(), &["fecha"]).await?;
        let day = fecha.to_string();
        let delete = format!("DELETE FROM {} WHERE fecha = $1::text::date", self.server.table(table)?);
        self.server.rows(connection, delete, &[Value::Text(&day)]).await.map_err(failed)?;
        self.copy(connection, what, table, batches).await?;
        let sql = format!(
            "INSERT INTO {loads} AS l SELECT $1::text, $2::text::date, $3::bigint, coalesce(max(version), 0) + 1 FROM {loads} \
             WHERE table_name = $1::text \
             ON CONFLICT (table_name, fecha) DO UPDATE SET epoch = excluded.epoch, version = excluded.version RETURNING l.version",
            loads = self.loads
        );
        let values = [Value::Text(table), Value::Text(&day), Value::Integer(epoch)];
        let rows = self.server.rows(connection, sql, &values).await.map_err(failed)?;
        let version = rows.first().ok_or(sqlx::Error::RowNotFound).and_then(|row| row.try_get::<i64, _>(0)).map_err(failed)?;
        Ok(Loaded::Ready(version.unsigned_abs()))
    }

    /// After a commit whose answer was lost: what became of it.
    async fn decide(&self, lost: PortError, table: &str, fecha: NaiveDate, epoch: i64, version: u64) -> Result<Commit> {
        let Ok(mut connection) = self.server.connect().await else { return Err(lost) };
        let Ok(seen) = self.begin(&mut connection, table, fecha).await else { return Err(lost) };
        self.server.close(connection).await;
        match seen {
            Some(seen) if seen == (epoch, version) => Ok(Commit::New(version)),
            Some((later, seen)) if later >= epoch => Ok(Commit::Already(seen)),
            // The lock was free, so the transaction is over, and it has left no trace.
            _ => Err(PortError { disposition: Disposition::Retryable, ..lost }),
        }
    }
}

#[async_trait]
impl Warehouse for PostgresWarehouse {
    async fn load_day(&self, table: &str, fecha: NaiveDate, epoch: i64, batches: Vec<RecordBatch>) -> Result<Commit> {
        let what = format!("load {fecha} of {table}, epoch {epoch}");
        let batches = batches.iter().map(widen).collect::<Result<Vec<_>>>()?;
        for batch in &batches {
            check_day(&what, batch, fecha)?;
            if batches.first().is_some_and(|first| first.schema() != batch.schema()) {
                return Err(PortError::permanent(format!("{what}: found batches of different schemas, expected one schema")));
            }
        }
        let mut connection = self.server.connect().await?;
        match self.load(&mut connection, &what, table, (fecha, epoch), &batches).await? {
            Loaded::Already(version) => {
                self.server.close(connection).await;
                Ok(Commit::Already(version))
            }
            Loaded::Ready(version) => match self.server.run(&mut connection, "COMMIT").await {
                Ok(_) => {
                    self.server.close(connection).await;
                    Ok(Commit::New(version))
                }
                Err(e) => {
                    drop(connection);
                    let error = classify_commit(&what, e);
                    match error.disposition {
                        Disposition::Unknown => self.decide(error, table, fecha, epoch, version).await,
                        Disposition::Retryable | Disposition::Permanent => Err(error),
                    }
                }
            },
        }
    }

    async fn upsert_rows(&self, rows: UpsertRows) -> Result<Commit> {
        self.upsert(rows).await
    }

    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        self.last_mark(table, writer).await
    }

    /// Numbers without declared digits (sums, averages) come as `decimal(38, s)`, where `s` is the most digits after
    /// the point that a value of the column has. Exactly one batch comes back when there are no rows.
    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>> {
        let bound = self.server.patience();
        let what = format!("query {}", sql.chars().take(120).collect::<String>());
        let failed = |e: sqlx::Error| classify(what.clone(), e);
        let mut connection = self.server.connect().await?;
        let begin = format!("SET search_path = {}; BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", quote(&self.server.schema)?);
        self.server.run(&mut connection, begin).await.map_err(failed)?;
        for table in tables {
            let sql = "SELECT 1 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
                       WHERE n.nspname = $1::text AND c.relname = $2::text";
            let (schema, name) = self.server.split(table);
            let values = [Value::Text(schema), Value::Text(name)];
            if self.server.rows(&mut connection, sql, &values).await.map_err(failed)?.is_empty() {
                let what = format!("{what}: found no table {name} in schema {schema}");
                return Err(PortError::permanent(what).code("42P01"));
            }
        }
        // The server parses the text as one statement here; only such a text goes between the parentheses below.
        let sql = sql.trim().trim_end_matches(';');
        let prepare = connection.prepare(AssertSqlSafe(sql.to_owned()).into_sql_str());
        let statement = within(bound, prepare).await.map_err(failed)?;
        let mut columns = Vec::new();
        for column in statement.columns() {
            let kind = match column.type_info().name() {
                "TEXT" | "VARCHAR" | "CHAR" => CopyType::Text,
                "UUID" => CopyType::Uuid,
                "BOOL" => CopyType::Bool,
                "INT2" => CopyType::Int2,
                "INT4" => CopyType::Int4,
                "INT8" => CopyType::Int8,
                "FLOAT8" => CopyType::Float8,
                "NUMERIC" => CopyType::Numeric { precision: 38, scale: 0 },
                "DATE" => CopyType::Date,
                "TIMESTAMPTZ" => CopyType::Timestamp,
                other => {
                    let what = format!("{what}: column {} has type {other}, which cannot be read", column.name());
                    return Err(PortError::permanent(what).code("42804"));
                }
            };
            columns.push(CopyColumn { name: column.name().to_owned(), kind });
        }
        // A comment at the end of the statement must not hide the parenthesis.
        let copy = format!("COPY (\n{sql}\n) TO STDOUT (FORMAT binary)");
        let mut bytes = Vec::new();
        {
            let mut rows = within(bound, connection.copy_out_raw(&copy)).await.map_err(failed)?;
            loop {
                let next = match rows.next().now_or_never() {
                    Some(next) => next.transpose(),
                    None => within(bound, rows.next().map(Option::transpose)).await,
                };
                let Some(chunk) = next.map_err(failed)? else { break };
                bytes.extend_from_slice(&chunk);
                if bytes.len() > self.query_bytes_max {
                    let what = format!("{what}: found more than {} bytes, expected fewer", self.query_bytes_max);
                    return Err(PortError::permanent(what).code("54000"));
                }
            }
        }
        self.server.close(connection).await;

        let is_numeric: Vec<bool> = columns.iter().map(|c| matches!(c.kind, CopyType::Numeric { .. })).collect();
        for (column, scale) in columns.iter_mut().zip(numeric_scales(&bytes, &is_numeric)) {
            if let CopyType::Numeric { scale: kept, .. } = &mut column.kind {
                *kept = u8::try_from(scale).unwrap_or(u8::MAX);
            }
        }
        let damaged = |e: CopyError| copy_failed(&what, e);
        let mut decoder = CopyDecoder::new(columns, CopyLimits::STANDARD).map_err(damaged)?;
        let schema = decoder.schema().clone();
        let (mut batches, mut rest) = (Vec::new(), bytes.as_slice());
        while !rest.is_empty() {
            batches.extend(decoder.decode(&mut rest).map_err(damaged)?);
        }
        batches.extend(decoder.finish().map_err(damaged)?);
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(schema));
        }
        Ok(batches)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::{Date32Array, Int8Array, StringViewArray};

    use super::*;

    fn batch(days: Vec<Option<i32>>) -> RecordBatch {
        let columns: Vec<(&str, ArrayRef)> = vec![("fecha", Arc::new(Date32Array::from(days)))];
        RecordBatch::try_from_iter(columns).expect("a batch")
    }

    #[test]
    fn rows_of_another_day_are_named() {
        let day = NaiveDate::from_ymd_opt(1997, 1, 2).expect("a day");
        assert!(check_day("load", &batch(vec![Some(9_863), Some(9_863)]), day).is_ok());
        for (days, found) in [
            (vec![Some(9_863), Some(9_864)], "row 2, column fecha: found day 9864 after 1970-01-01, expected 1997-01-02"),
            (vec![Some(-9_863)], "row 1, column fecha: found day -9863 after 1970-01-01, expected 1997-01-02"),
            (vec![None], "row 1, column fecha: found null, expected 1997-01-02"),
        ] {
            let error = check_day("load", &batch(days), day).expect_err("another day");
            assert!(error.to_string().contains(found), "{error}");
        }
    }

    #[test]
    fn narrow_types_are_widened() {
        let columns: Vec<(&str, ArrayRef)> =
            vec![("a", Arc::new(Int8Array::from(vec![-3]))), ("b", Arc::new(StringViewArray::from(vec!["x"])))];
        let widened = widen(&RecordBatch::try_from_iter(columns).expect("a batch")).expect("a batch");
        assert_eq!(widened.column(0).data_type(), &DataType::Int16);
        assert_eq!(widened.column(1).data_type(), &DataType::Utf8);
    }
}
