//! Writes by append and by key: rows are added, or merged into those with the same key.
//!
//! What it leaves out: history, which is in `scd2`.

use std::sync::Arc;

use arrow::{record_batch::RecordBatch, util::display::array_value_to_string};
use deltalake::{
    DeltaTable, DeltaTableError,
    datafusion::{
        common::Column,
        logical_expr::{Expr, LogicalPlan, Operator, binary_expr},
        prelude::{DataFrame, SessionContext},
    },
    protocol::{DeltaOperation, SaveMode},
};
use simulacro_core::ports::{Append, Commit, PortError, Query, Result, Upsert};

use crate::{
    DeltaLakehouse,
    commit::{Start, Txn},
    query_failed,
    schema::{conform, guarded},
};

/// Keys that an error names at most.
const NAMED_KEYS: usize = 3;

/// A name as it stands in SQL.
pub(crate) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A column of one side of a merge.
pub(crate) fn of(side: &str, name: &str) -> Expr {
    Expr::Column(Column::new(Some(side.to_owned()), name))
}

/// All of `parts`; there is at least one.
pub(crate) fn all(parts: impl IntoIterator<Item = Expr>) -> Option<Expr> {
    parts.into_iter().reduce(Expr::and)
}

/// Refuses columns that are not among those of `frame`, and an empty list.
pub(crate) fn known(what: &str, frame: &DataFrame, asked: &[String], role: &str, empty: bool) -> Result<()> {
    if asked.is_empty() && !empty {
        return Err(PortError::permanent(format!("{what}: found no {role} column, expected at least one")));
    }
    let have: Vec<_> = frame.schema().fields().iter().map(|f| f.name().as_str()).collect();
    match asked.iter().find(|name| !have.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => Err(PortError::permanent(format!("{what}: {role} column {name}: found only {}", have.join(", ")))),
    }
}

/// What a null in a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nulls {
    /// An error.
    Refused,
    /// A value like any other, equal to itself.
    Equal,
}

/// Refuses rows whose key stands twice, or has a null where that is an error.
pub(crate) async fn keys_are_unique(
    what: &str,
    ctx: &SessionContext,
    rows: &DataFrame,
    keys: &[String],
    nulls: Nulls,
) -> Result<()> {
    const VIEW: &str = "simulacro_rows";
    let failed = |e| crate::commit::write_failed(format!("{what}: look for keys that stand twice"), e);
    let list = keys.iter().map(|k| quoted(k)).collect::<Vec<_>>().join(", ");
    let null = match nulls {
        Nulls::Refused => keys.iter().map(|k| format!("{} IS NULL", quoted(k))).collect::<Vec<_>>().join(" OR "),
        Nulls::Equal => "false".to_owned(),
    };
    ctx.register_table(VIEW, rows.clone().into_view()).map_err(failed)?;
    let sql = format!(
        "SELECT {list}, count(*) AS simulacro_count FROM {VIEW} GROUP BY {list} HAVING count(*) > 1 OR {null} \
         ORDER BY {list} LIMIT {NAMED_KEYS}"
    );
    let found = match ctx.sql(&sql).await {
        Ok(frame) => frame.collect().await,
        Err(e) => Err(e),
    };
    ctx.deregister_table(VIEW).map_err(failed)?;
    let mut named = Vec::new();
    for batch in found.map_err(failed)? {
        for row in 0..batch.num_rows() {
            named.push(show(&batch, row, keys.len()));
        }
    }
    if named.is_empty() {
        return Ok(());
    }
    let (keys, named) = (keys.join(", "), named.join("; "));
    let without = if nulls == Nulls::Refused { " and without nulls" } else { "" };
    Err(PortError::permanent(format!("{what}: key ({keys}): found {named}, expected each key once{without}")).code("KEY"))
}

fn show(batch: &RecordBatch, row: usize, keys: usize) -> String {
    let cell = |i: usize| {
        let column = batch.column(i);
        if column.is_null(row) { "null".to_owned() } else { array_value_to_string(column, row).unwrap_or_default() }
    };
    let values = (0..keys).map(cell).collect::<Vec<_>>().join(", ");
    format!("({values}) {} times", cell(keys))
}

/// The rows with their key columns declared as never null.
pub(crate) fn keyed(
    ctx: &SessionContext,
    rows: DataFrame,
    keys: &[String],
) -> Result<DataFrame, deltalake::datafusion::error::DataFusionError> {
    let columns: Result<Vec<Expr>, _> = rows
        .schema()
        .fields()
        .iter()
        .map(|f| {
            let column = Expr::Column(Column::from_name(f.name()));
            if keys.contains(f.name()) && f.is_nullable() { guarded(ctx, column, f.name()) } else { Ok(column) }
        })
        .collect();
    rows.select(columns?)
}

impl DeltaLakehouse {
    /// The rows of `query` as a plan, which is not run yet.
    pub(crate) async fn rows(&self, query: &Query) -> Result<(SessionContext, DataFrame)> {
        self.plan(query).await
    }

    pub(crate) async fn add(&self, append: Append) -> Result<Commit> {
        let Append { table, mark, partition_by, query } = append;
        let txn = Txn::of(&table, &mark);
        let existing = match self.start(&table, &txn).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(existing) => existing,
        };
        let what = format!("append to {table} as {}, epoch {}", mark.writer, mark.epoch);
        let (ctx, frame) = self.rows(&query).await?;
        known(&what, &frame, &partition_by, "partition", true)?;
        let plan = frame.into_unoptimized_plan();
        let result = match existing {
            None => self.create(&table, &txn, partition_by, &ctx, plan).await,
            Some(existing) => {
                let plan = conform(&ctx, &table, &existing, plan)?;
                insert(existing, &txn, &ctx, plan).await
            }
        };
        self.settle(&table, &txn, what, Some(&ctx), result).await
    }

    pub(crate) async fn merge(&self, upsert: Upsert) -> Result<Commit> {
        let Upsert { table, mark, keys, ignored, query } = upsert;
        let what = format!("upsert {table} as {}, epoch {}", mark.writer, mark.epoch);
        let txn = Txn::of(&table, &mark);
        let existing = match self.start(&table, &txn).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(existing) => existing,
        };
        let (ctx, rows) = self.rows(&query).await?;
        known(&what, &rows, &keys, "key", false)?;
        known(&what, &rows, &ignored, "ignored", true)?;
        let plan = match &existing {
            Some(existing) => conform(&ctx, &table, existing, rows.clone().into_unoptimized_plan())?,
            None => keyed(&ctx, rows.clone(), &keys).map_err(|e| query_failed(&query, e))?.into_unoptimized_plan(),
        };
        keys_are_unique(&what, &ctx, &rows, &keys, Nulls::Refused).await?;
        let result = match existing {
            None => self.create(&table, &txn, Vec::new(), &ctx, plan).await,
            Some(existing) => {
                let matched = all(keys.iter().map(|k| of("target", k).eq(of("source", k))));
                merge_changed(existing, &txn, &ctx, plan, matched, (&keys, &ignored)).await
            }
        };
        self.settle(&table, &txn, what, Some(&ctx), result).await
    }
}

/// Adds the rows of `plan` to a table that is there.
pub(crate) async fn insert(
    existing: DeltaTable,
    txn: &Txn,
    ctx: &SessionContext,
    plan: LogicalPlan,
) -> Result<DeltaTable, DeltaTableError> {
    existing
        .write(vec![])
        .with_save_mode(SaveMode::Append)
        .with_input_plan(plan)
        .with_session_state(Arc::new(ctx.state()))
        .with_commit_properties(txn.properties())
        .await
}

/// Merges the rows of `plan` into those for which `matched` holds, and touches only rows that differ.
pub(crate) async fn merge_changed(
    existing: DeltaTable,
    txn: &Txn,
    ctx: &SessionContext,
    plan: LogicalPlan,
    matched: Option<Expr>,
    (keys, ignored): (&[String], &[String]),
) -> Result<DeltaTable, DeltaTableError> {
    let names: Vec<String> = plan.schema().fields().iter().map(|f| f.name().clone()).collect();
    let source = DataFrame::new(ctx.state(), plan);
    let differs = |name: &String| binary_expr(of("target", name), Operator::IsDistinctFrom, of("source", name));
    let changed = names.iter().filter(|n| !keys.contains(n) && !ignored.contains(n)).map(differs).reduce(Expr::or);
    let Some(matched) = matched else { return Err(DeltaTableError::Generic("a merge needs a key".into())) };
    let before = existing.version();
    let mut merge = existing
        .clone()
        .merge(source, matched)
        .with_source_alias("source")
        .with_target_alias("target")
        .with_session_state(Arc::new(ctx.state()))
        .with_commit_properties(txn.properties())
        .when_not_matched_insert(|insert| {
            names.iter().fold(insert, |insert, n| insert.set(Column::from_name(n), of("source", n)))
        })?;
    // Without a column that counts, a row that is there is never changed.
    if let Some(changed) = changed {
        merge = merge.when_matched_update(|update| {
            let others = names.iter().filter(|n| !keys.contains(n));
            others.fold(update.predicate(changed), |update, n| update.update(Column::from_name(n), of("source", n)))
        })?;
    }
    let (merged, _) = merge.await?;
    if merged.version() == before { DeltaLakehouse::commit_mark(&existing, txn, nothing_merged()).await } else { Ok(merged) }
}

/// What the log says of a merge that found nothing to change.
pub(crate) fn nothing_merged() -> DeltaOperation {
    DeltaOperation::Merge {
        predicate: None,
        merge_predicate: None,
        matched_predicates: Vec::new(),
        not_matched_predicates: Vec::new(),
        not_matched_by_source_predicates: Vec::new(),
    }
}
