//! Rows in memory, of a writer that goes on where it stopped: what a stream writes.
//!
//! The position of the writer is its epoch in the log, and a write says where it begins. A write that does not begin where
//! the log is, is refused before anything is written, and one that another overtook loses the race for its version: so no
//! row is there twice or left out, whoever writes. What this leaves out: deciding what to do then.

use arrow::{
    array::Array,
    datatypes::{DataType, SchemaRef},
    record_batch::RecordBatch,
};
use deltalake::{
    DeltaTable,
    datafusion::{
        common::Column,
        functions::core::expr_fn::coalesce,
        logical_expr::{Expr, LogicalPlan, cast, lit},
        prelude::{DataFrame, SessionContext},
        scalar::ScalarValue,
    },
    protocol::{DeltaOperation, SaveMode},
};
use simulacro_core::ports::{AppendRows, Commit, EPOCH_MOVED, PortError, Result, UpsertRows};

use crate::{
    DeltaLakehouse,
    commit::{Start, Txn},
    read_failed,
    schema::conform,
    upsert::{Nulls, all, insert, keys_are_unique, known, merge_changed, nothing_merged, of, quoted},
};

/// Names of the two sides while rows are looked for.
const ROWS: &str = "simulacro_source";
const TABLE: &str = "simulacro_target";

fn appended() -> DeltaOperation {
    DeltaOperation::Write { mode: SaveMode::Append, partition_by: None, predicate: None }
}

fn has_rows(batches: &[RecordBatch]) -> bool {
    batches.iter().any(|b| b.num_rows() > 0)
}

/// The schema of all batches.
fn schema(what: &str, batches: &[RecordBatch]) -> Result<SchemaRef> {
    let first = batches.first().ok_or_else(|| PortError::permanent(format!("{what}: found no batch, expected at least one")))?;
    if batches.iter().any(|b| b.schema() != first.schema()) {
        return Err(PortError::permanent(format!("{what}: found batches of different schemas, expected one schema")));
    }
    Ok(first.schema())
}

/// Whether a key column has a null in these rows.
fn has_null(batches: &[RecordBatch], column: &str) -> bool {
    batches.iter().filter_map(|b| b.column_by_name(column)).any(|c| c.logical_null_count() > 0)
}

impl DeltaLakehouse {
    /// Opens a table for a write that begins at `after`.
    async fn go_on(&self, what: &str, table: &str, txn: &Txn, after: Option<i64>) -> Result<Start> {
        let existing = self.open(table).await?;
        let seen = match &existing {
            Some(existing) => Self::epoch(existing, &txn.app).await?,
            None => None,
        };
        if let Some(existing) = &existing
            && seen.is_some_and(|seen| seen >= txn.epoch)
        {
            return Ok(Start::Done(existing.version().unwrap_or(0)));
        }
        if seen != after {
            let show = |epoch: Option<i64>| epoch.map_or_else(|| "none".to_owned(), |e| e.to_string());
            let (seen, after) = (show(seen), show(after));
            let what = format!("{what}: found epoch {seen} as the writer's last, expected {after}");
            return Err(PortError::retryable(what).code(EPOCH_MOVED));
        }
        Ok(Start::From(existing))
    }

    pub(crate) async fn add_rows(&self, rows: AppendRows) -> Result<Commit> {
        let AppendRows { table, mark, after, partition_by, batches } = rows;
        let txn = Txn::of(&table, &mark);
        let what = format!("append to {table} as {}, epoch {}", mark.writer, mark.epoch);
        schema(&what, &batches)?;
        let existing = match self.go_on(&what, &table, &txn, after).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(existing) => existing,
        };
        let is_empty = !has_rows(&batches);
        let (ctx, frame) = self.frame(&what, batches)?;
        known(&what, &frame, &partition_by, "partition", true)?;
        let plan = frame.into_unoptimized_plan();
        let result = match existing {
            None => self.create(&table, &txn, partition_by, &ctx, plan).await,
            Some(existing) => {
                let plan = conform(&ctx, &table, &existing, plan)?;
                match is_empty {
                    true => Self::commit_mark(&existing, &txn, appended()).await,
                    false => insert(existing, &txn, &ctx, plan).await,
                }
            }
        };
        self.settle(&table, &txn, what, Some(&ctx), result).await
    }

    pub(crate) async fn merge_rows(&self, rows: UpsertRows) -> Result<Commit> {
        let UpsertRows { table, mark, after, keys, batches } = rows;
        let txn = Txn::of(&table, &mark);
        let what = format!("upsert {table} as {}, epoch {}", mark.writer, mark.epoch);
        schema(&what, &batches)?;
        let existing = match self.go_on(&what, &table, &txn, after).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(existing) => existing,
        };
        let is_empty = !has_rows(&batches);
        let nulls: Vec<bool> = keys.iter().map(|k| has_null(&batches, k)).collect();
        let (ctx, frame) = self.frame(&what, batches)?;
        known(&what, &frame, &keys, "key", false)?;
        keys_are_unique(&what, &ctx, &frame, &keys, Nulls::Equal).await?;
        let plan = frame.into_unoptimized_plan();
        let result = match existing {
            None => self.create(&table, &txn, Vec::new(), &ctx, plan).await,
            Some(existing) => {
                let plan = conform(&ctx, &table, &existing, plan)?;
                match (is_empty, is_empty || self.has_keys(&what, &ctx, &existing, &plan, (&keys, &nulls)).await?) {
                    (true, _) => Self::commit_mark(&existing, &txn, nothing_merged()).await,
                    (false, false) => insert(existing, &txn, &ctx, plan).await,
                    (false, true) => {
                        let matched = all(keys.iter().zip(&nulls).map(|(key, nulls)| equal(key, *nulls)));
                        merge_changed(existing, &txn, &ctx, plan, matched, (&keys, &[])).await
                    }
                }
            }
        };
        self.settle(&table, &txn, what, Some(&ctx), result).await
    }

    /// The rows as a frame of a session of its own.
    fn frame(&self, what: &str, batches: Vec<RecordBatch>) -> Result<(SessionContext, DataFrame)> {
        let ctx = self.session()?;
        let frame = ctx.read_batches(batches).map_err(|e| PortError::permanent(what).because(e))?;
        Ok((ctx, frame))
    }

    /// Whether the table has one of the keys of `plan`. Rows that a stream brings are new as a rule, and this is cheaper
    /// than a merge: files whose statistics are out of reach are not read.
    async fn has_keys(
        &self,
        what: &str,
        ctx: &SessionContext,
        existing: &DeltaTable,
        plan: &LogicalPlan,
        (keys, nulls): (&[String], &[bool]),
    ) -> Result<bool> {
        let failed = |e| read_failed(format!("{what}: look for keys that are there"), e);
        let provider = existing.table_provider().await.map_err(failed)?;
        let rows = DataFrame::new(ctx.state(), plan.clone());
        let bounds = bounds(&rows, keys, nulls).await.map_err(failed)?;
        ctx.register_table(ROWS, rows.into_view()).map_err(failed)?;
        let mut target = ctx.read_table(provider).map_err(failed)?;
        for bound in bounds {
            target = target.filter(bound).map_err(failed)?;
        }
        ctx.register_table(TABLE, target.into_view()).map_err(failed)?;
        let side = |side: &str, key: &str| format!("{side}.{}", quoted(key));
        let on = keys.iter().zip(nulls).map(|(key, nulls)| {
            let (a, b) = (side(TABLE, key), side(ROWS, key));
            match nulls {
                false => format!("{a} = {b}"),
                true => format!(
                    "coalesce(CAST({a} AS VARCHAR), '') = coalesce(CAST({b} AS VARCHAR), '') AND ({a} IS NULL) = ({b} IS NULL)"
                ),
            }
        });
        let on = on.collect::<Vec<_>>().join(" AND ");
        let sql = format!("SELECT 1 FROM {TABLE} JOIN {ROWS} ON {on} LIMIT 1");
        let found = match ctx.sql(&sql).await {
            Ok(frame) => frame.collect().await,
            Err(e) => Err(e),
        };
        ctx.deregister_table(ROWS).map_err(failed)?;
        ctx.deregister_table(TABLE).map_err(failed)?;
        Ok(has_rows(&found.map_err(failed)?))
    }
}

/// Two sides have one value in a key column, where a null is a value.
fn equal(key: &str, nulls: bool) -> Expr {
    if !nulls {
        return of("target", key).eq(of("source", key));
    }
    let text = |side| coalesce(vec![cast(of(side, key), DataType::Utf8), lit("")]);
    text("target").eq(text("source")).and(of("target", key).is_null().eq(of("source", key).is_null()))
}

/// The least and the greatest value of each key column that has no null, as conditions for files and rows.
async fn bounds(
    rows: &DataFrame,
    keys: &[String],
    nulls: &[bool],
) -> std::result::Result<Vec<Expr>, deltalake::datafusion::error::DataFusionError> {
    use deltalake::datafusion::functions_aggregate::expr_fn::{max, min};
    let column = |key: &String| Expr::Column(Column::from_name(key));
    let bounded: Vec<&String> = keys.iter().zip(nulls).filter(|(_, nulls)| !**nulls).map(|(key, _)| key).collect();
    let both = |(i, key): (usize, &&String)| {
        [min(column(key)).alias(format!("least_{i}")), max(column(key)).alias(format!("greatest_{i}"))]
    };
    let asked: Vec<Expr> = bounded.iter().enumerate().flat_map(both).collect();
    let mut out = Vec::new();
    for batch in rows.clone().aggregate(Vec::new(), asked)?.collect().await?.iter().filter(|b| b.num_rows() == 1) {
        for (i, key) in bounded.iter().enumerate() {
            let least = ScalarValue::try_from_array(batch.column(2 * i), 0)?;
            let greatest = ScalarValue::try_from_array(batch.column(2 * i + 1), 0)?;
            out.push(column(key).between(lit(least), lit(greatest)));
        }
    }
    Ok(out)
}
