//! Rows by key, of a writer that goes on where it stopped.
//!
//! One transaction: the rows are copied into a temporary table, those of the same keys are deleted, the new ones inserted,
//! and the writer's epoch is written beside them. The lock, and what a lost answer to the commit means, are those of a load.

use arrow::array::{Array, RecordBatch};
use simulacro_core::ports::{Commit, Disposition, EPOCH_MOVED, PortError, Result, UpsertRows};
use sqlx::{PgConnection, Row, postgres::PgRow};

use super::{Loaded, PostgresWarehouse, widen};
use crate::postgres::{Value, classify, classify_commit, quote};

/// Where the rows wait; gone with the transaction.
const WAITING: &str = "pg_temp.simulacro_rows";

impl PostgresWarehouse {
    /// Epoch and version of a writer's last write.
    async fn mark(&self, connection: &mut PgConnection, table: &str, writer: &str) -> sqlx::Result<Option<(i64, u64)>> {
        let sql = format!("SELECT epoch, version FROM {} WHERE table_name = $1::text AND writer = $2::text", self.marks);
        let rows = self.server.rows(connection, sql, &[Value::Text(table), Value::Text(writer)]).await?;
        let read = |row: &PgRow| Ok((row.try_get("epoch")?, row.try_get::<i64, _>("version")?.unsigned_abs()));
        rows.first().map(read).transpose()
    }

    pub(super) async fn last_mark(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        let mut connection = self.server.connect().await?;
        let what = || format!("read the last epoch of {writer} in {table}");
        let seen = self.mark(&mut connection, table, writer).await.map_err(|e| classify(what(), e))?;
        self.server.close(connection).await;
        Ok(seen.map(|(epoch, _)| epoch))
    }

    pub(super) async fn upsert(&self, rows: UpsertRows) -> Result<Commit> {
        let what = format!("upsert {} as {}, epoch {}", rows.table, rows.mark.writer, rows.mark.epoch);
        let batches = rows.batches.iter().map(widen).collect::<Result<Vec<_>>>()?;
        let Some(first) = batches.first() else {
            return Err(PortError::permanent(format!("{what}: found no batch, expected at least one")));
        };
        if batches.iter().any(|batch| batch.schema() != first.schema()) {
            return Err(PortError::permanent(format!("{what}: found batches of different schemas, expected one schema")));
        }
        let names = || first.schema().fields().iter().map(|f| f.name().clone()).collect::<Vec<_>>().join(", ");
        if rows.keys.is_empty() {
            return Err(PortError::permanent(format!("{what}: found no key column, expected at least one")));
        }
        if let Some(key) = rows.keys.iter().find(|key| first.column_by_name(key).is_none()) {
            return Err(PortError::permanent(format!("{what}: key column {key}: found only {}", names())));
        }
        let mut connection = self.server.connect().await?;
        match self.replace(&mut connection, &what, &rows, &batches).await? {
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
                        Disposition::Unknown => self.decide_mark(error, &rows, version).await,
                        Disposition::Retryable | Disposition::Permanent => Err(error),
                    }
                }
            },
        }
    }

    /// All of an upsert but its commit.
    async fn replace(
        &self,
        connection: &mut PgConnection,
        what: &str,
        rows: &UpsertRows,
        batches: &[RecordBatch],
    ) -> Result<Loaded> {
        let failed = |e: sqlx::Error| classify(what, e);
        let UpsertRows { table, mark, after, keys, .. } = rows;
        self.lock(connection, table).await.map_err(failed)?;
        let seen = self.mark(connection, table, &mark.writer).await.map_err(failed)?;
        match seen {
            Some((epoch, version)) if epoch >= mark.epoch => return Ok(Loaded::Already(version)),
            _ if seen.map(|(epoch, _)| epoch) == *after => {}
            _ => {
                let show = |epoch: Option<i64>| epoch.map_or_else(|| "none".to_owned(), |e| e.to_string());
                let (seen, after) = (show(seen.map(|(epoch, _)| epoch)), show(*after));
                let what = format!("{what}: found epoch {seen} as the writer's last, expected {after}");
                return Err(PortError::retryable(what).code(EPOCH_MOVED));
            }
        }
        let [first, ..] = batches else {
            return Err(PortError::permanent(format!("{what}: found no batch, expected at least one")));
        };
        let indexed: Vec<&str> = keys.iter().map(String::as_str).collect();
        self.prepare(connection, what, table, &first.schema(), &indexed).await?;
        let target = self.server.table(table)?;
        let create = format!("CREATE TEMPORARY TABLE simulacro_rows (LIKE {target}) ON COMMIT DROP");
        self.server.run(connection, create).await.map_err(failed)?;
        self.copy(connection, what, WAITING, batches).await?;
        let quoted = |names: &[&str]| names.iter().map(|n| quote(n)).collect::<Result<Vec<_>>>();
        let list = quoted(&indexed)?.join(", ");
        let twice = format!("SELECT concat_ws(', ', {list}) AS key FROM {WAITING} GROUP BY {list} HAVING count(*) > 1 LIMIT 1");
        if let Some(row) = self.server.rows(connection, twice, &[]).await.map_err(failed)?.first() {
            let key: String = row.try_get("key").map_err(failed)?;
            let what = format!("{what}: key ({}): found ({key}) more than once, expected each key once", keys.join(", "));
            return Err(PortError::permanent(what).code("KEY"));
        }
        // Two nulls are one value. Where the rows have none, equality says the same and can use the index.
        let has_null = |key: &str| batches.iter().filter_map(|b| b.column_by_name(key)).any(|c| c.logical_null_count() > 0);
        let equal = indexed.iter().map(|key| {
            let word = if has_null(key) { "IS NOT DISTINCT FROM" } else { "=" };
            quote(key).map(|key| format!("t.{key} {word} s.{key}"))
        });
        let equal = equal.collect::<Result<Vec<_>>>()?.join(" AND ");
        let schema = first.schema();
        let columns = quoted(&schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>())?.join(", ");
        let replace = format!(
            "DELETE FROM {target} AS t USING {WAITING} AS s WHERE {equal}; \
             INSERT INTO {target} ({columns}) SELECT {columns} FROM {WAITING}"
        );
        self.server.run(connection, replace).await.map_err(failed)?;
        let sql = format!(
            "INSERT INTO {marks} AS m SELECT $1::text, $2::text, $3::bigint, coalesce(max(version), 0) + 1 FROM {marks} \
             WHERE table_name = $1::text \
             ON CONFLICT (table_name, writer) DO UPDATE SET epoch = excluded.epoch, version = excluded.version \
             RETURNING m.version",
            marks = self.marks
        );
        let values = [Value::Text(table), Value::Text(&mark.writer), Value::Integer(mark.epoch)];
        let done = self.server.rows(connection, sql, &values).await.map_err(failed)?;
        let version = done.first().ok_or(sqlx::Error::RowNotFound).and_then(|row| row.try_get::<i64, _>(0)).map_err(failed)?;
        Ok(Loaded::Ready(version.unsigned_abs()))
    }

    /// After a commit whose answer was lost: what became of it.
    async fn decide_mark(&self, lost: PortError, rows: &UpsertRows, version: u64) -> Result<Commit> {
        let Ok(mut connection) = self.server.connect().await else { return Err(lost) };
        if self.lock(&mut connection, &rows.table).await.is_err() {
            return Err(lost);
        }
        let Ok(seen) = self.mark(&mut connection, &rows.table, &rows.mark.writer).await else { return Err(lost) };
        self.server.close(connection).await;
        match seen {
            Some(seen) if seen == (rows.mark.epoch, version) => Ok(Commit::New(version)),
            Some((later, seen)) if later >= rows.mark.epoch => Ok(Commit::Already(seen)),
            // The lock was free, so the transaction is over, and it has left no trace.
            _ => Err(PortError { disposition: Disposition::Retryable, ..lost }),
        }
    }
}
