//! Slowly changing dimensions of type 2: a table of versions, each with the period in which it holds.
//!
//! Per key the table is a step function of time. Rows as of an effective time set it from that time to the next step,
//! and steps without a change are joined, so that the table does not depend on how often a time was applied. The
//! difference between the old steps and the new ones is computed by one statement and applied by one MERGE.
//! What it leaves out: the times at which nothing changed, which the table does not remember.

use std::sync::Arc;

use chrono::{DateTime, SecondsFormat, Utc};
use deltalake::{
    DeltaTable, DeltaTableError,
    datafusion::{
        common::Column,
        error::DataFusionError,
        logical_expr::{LogicalPlan, lit},
        prelude::{DataFrame, SessionContext},
    },
};
use simulacro_core::ports::{Absent, Commit, Effective, Period, PortError, Result, Scd2};

use crate::{
    DeltaLakehouse,
    commit::{Start, Txn},
    query_failed, read_failed,
    schema::conform,
    upsert::{Nulls, all, keyed, keys_are_unique, known, nothing_merged, of, quoted},
};

const SOURCE: &str = "simulacro_source";
const TARGET: &str = "simulacro_target";
const OPERATION: &str = "simulacro_op";

fn instant(at: DateTime<Utc>) -> String {
    let text = at.to_rfc3339_opts(SecondsFormat::Micros, true);
    format!("arrow_cast('{text}', 'Timestamp(Microsecond, Some(\"UTC\"))')")
}

/// The effective time as a literal, and no time of the same type.
fn literals(effective: Effective) -> (String, &'static str) {
    match effective {
        Effective::Date(day) => (format!("DATE '{day}'"), "CAST(NULL AS DATE)"),
        Effective::Time(at) => (instant(at), "arrow_cast(NULL, 'Timestamp(Microsecond, Some(\"UTC\"))')"),
    }
}

/// The columns of a change by their role.
struct Columns<'a> {
    keys: &'a [String],
    tracked: &'a [String],
    /// Neither key nor tracked nor the period's.
    others: Vec<String>,
    period: &'a Period,
}

impl DeltaLakehouse {
    pub(crate) async fn change_dimension(&self, change: Scd2) -> Result<Commit> {
        let Scd2 { table, mark, keys, tracked, effective, absent, period, query } = change;
        let what = format!("upsert versions of {table} as {}, epoch {}", mark.writer, mark.epoch);
        let txn = Txn::of(&table, &mark);
        let existing = match self.start(&table, &txn).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(existing) => existing,
        };
        let (ctx, rows) = self.rows(&query).await?;
        known(&what, &rows, &keys, "key", false)?;
        known(&what, &rows, &tracked, "tracked", false)?;
        let own = [&period.from, &period.to, &period.current];
        for field in rows.schema().fields() {
            if own.contains(&field.name()) {
                let found = field.name();
                return Err(PortError::permanent(format!(
                    "{what}: found column {found} among the rows, expected it to be computed"
                )));
            }
        }
        let is_other = |n: &String| !keys.contains(n) && !tracked.contains(n);
        let others = rows.schema().fields().iter().map(|f| f.name().clone()).filter(is_other).collect();
        let columns = Columns { keys: &keys, tracked: &tracked, others, period: &period };

        let wrong = |e: DataFusionError| query_failed(&query, e);
        let first = first_versions(&ctx, &rows, &columns, effective).await.map_err(wrong)?;
        let plan = match &existing {
            Some(existing) => conform(&ctx, &table, existing, first.into_unoptimized_plan())?,
            None => first.into_unoptimized_plan(),
        };
        keys_are_unique(&what, &ctx, &rows, &keys, Nulls::Refused).await?;
        if absent == Absent::Ends && rows.clone().limit(0, Some(1)).map_err(wrong)?.count().await.map_err(wrong)? == 0 {
            return Err(PortError::permanent(format!("{what}: found no rows, expected the whole dimension")));
        }
        let result = match existing {
            None => self.create(&table, &txn, Vec::new(), &ctx, plan).await,
            Some(existing) => {
                let provider = existing.table_provider().await.map_err(|e| read_failed(format!("{what}: read it"), e))?;
                ctx.register_table(TARGET, provider).map_err(wrong)?;
                ctx.register_table(SOURCE, DataFrame::new(ctx.state(), plan).into_view()).map_err(wrong)?;
                let steps = ctx.sql(&difference(&columns, effective, absent)).await.map_err(wrong)?;
                apply(existing, &txn, &ctx, steps.into_unoptimized_plan(), &columns).await
            }
        };
        self.settle(&table, &txn, what, Some(&ctx), result).await
    }
}

/// The rows as they are when the table does not know their keys: one open version each.
async fn first_versions(
    ctx: &SessionContext,
    rows: &DataFrame,
    columns: &Columns<'_>,
    effective: Effective,
) -> Result<DataFrame, DataFusionError> {
    ctx.register_table(SOURCE, keyed(ctx, rows.clone(), columns.keys)?.into_view())?;
    let (at, never) = literals(effective);
    let Period { from, to, current } = columns.period;
    let sql = format!("SELECT *, {at} AS {}, {never} AS {}, TRUE AS {} FROM {SOURCE}", quoted(from), quoted(to), quoted(current));
    let first = ctx.sql(&sql).await?;
    // The plan holds the view itself; the name is free again.
    ctx.deregister_table(SOURCE)?;
    Ok(first)
}

/// The statement that yields the steps to drop, to close and to put, each with its key and the start of its period.
///
/// For one key: `c` is the version that covers the effective time, `p` one that ends at it, `x` the next one. The left
/// neighbour of the new step is `c` if that began before, else `p`; the new step lasts until `c` ends, else until `x`
/// begins; it is joined with a neighbour that touches it and has the same tracked values.
fn difference(columns: &Columns<'_>, effective: Effective, absent: Absent) -> String {
    let Columns { keys, tracked, others, period } = columns;
    let (at, never) = literals(effective);
    let (from, to, current) = (quoted(&period.from), quoted(&period.to), quoted(&period.current));
    let list =
        |prefix: &str, names: &[String]| names.iter().map(|n| format!("{prefix}{}", quoted(n))).collect::<Vec<_>>().join(", ");
    let on =
        |a: &str, b: &str| keys.iter().map(|k| format!("{a}.{k} = {b}.{k}", k = quoted(k))).collect::<Vec<_>>().join(" AND ");
    let same = |side: &str| {
        let equal = tracked.iter().map(|n| format!("({side}.{n} IS NOT DISTINCT FROM o.{n})", n = quoted(n)));
        format!("({side}.{from} IS NOT NULL AND {})", equal.collect::<Vec<_>>().join(" AND "))
    };
    let key = list("", keys);
    let values: Vec<String> = tracked.iter().chain(others).cloned().collect();
    let values_list = list("", &values);
    let covering = format!("SELECT * FROM {TARGET} WHERE {from} <= {at} AND ({to} IS NULL OR {to} > {at})");
    let gone = match absent {
        Absent::Goes => String::new(),
        Absent::Ends => {
            let nulls = values.iter().map(|n| format!("NULL AS {}", quoted(n))).collect::<Vec<_>>().join(", ");
            format!(
                " UNION ALL SELECT {}, {nulls}, FALSE AS s_here FROM ({covering}) AS d LEFT ANTI JOIN {SOURCE} AS s ON {}",
                list("d.", keys),
                on("d", "s")
            )
        }
    };
    format!(
        "WITH o AS (SELECT {key}, {values_list}, TRUE AS s_here FROM {SOURCE}{gone}),
         n AS (SELECT {key}, min({from}) AS s_from FROM {TARGET} WHERE {from} > {at} GROUP BY {key}),
         j AS (
           SELECT {o_key}, {o_values}, o.s_here, c.{from} AS cf, c.{to} AS ct, p.{from} AS pf, x.{from} AS xf, x.{to} AS xt,
                  {same_c} AS same_c, {same_p} AS same_p, {same_x} AS same_x
           FROM o
           LEFT JOIN ({covering}) AS c ON {on_c}
           LEFT JOIN (SELECT * FROM {TARGET} WHERE {to} = {at}) AS p ON {on_p}
           LEFT JOIN (SELECT t.* FROM {TARGET} AS t JOIN n ON {on_n} AND t.{from} = n.s_from) AS x ON {on_x}
         ),
         r AS (
           SELECT *, CASE WHEN cf < {at} THEN cf ELSE pf END AS lf,
                  s_here AND CASE WHEN cf < {at} THEN same_c ELSE same_p END AS join_left,
                  CASE WHEN cf IS NOT NULL THEN ct ELSE xf END AS until
           FROM j
         ),
         q AS (SELECT *, s_here AND same_x AND coalesce(xf = until, FALSE) AS join_next FROM r),
         w AS (
           SELECT *, CASE WHEN join_next THEN xt ELSE until END AS stop,
                  coalesce(cf < {at}, FALSE) AS cut, coalesce(cf = {at}, FALSE) AS replaces
           FROM q
         ),
         e AS (
           SELECT {key}, {values_list}, which,
                  CASE which
                    WHEN 1 THEN CASE WHEN lf IS NOT NULL AND (cut OR join_left) THEN 'close' END
                    WHEN 2 THEN CASE WHEN s_here AND NOT join_left
                                       THEN CASE WHEN replaces AND same_c AND NOT join_next THEN NULL ELSE 'put' END
                                     WHEN replaces THEN 'drop' END
                    ELSE CASE WHEN join_next THEN 'drop' END
                  END AS {OPERATION},
                  CASE which WHEN 1 THEN lf WHEN 2 THEN {at} ELSE xf END AS {from},
                  CASE WHEN which = 1 AND NOT join_left THEN {at} ELSE stop END AS {to},
                  CASE WHEN cut THEN ct ELSE {at} END AS old
           FROM w CROSS JOIN (VALUES (1), (2), (3)) AS v(which)
         )
         SELECT {key}, {values_list}, {OPERATION}, {from}, CASE WHEN {OPERATION} = 'drop' THEN {never} ELSE {to} END AS {to},
                {to} IS NULL AS {current}
         FROM e WHERE {OPERATION} IS NOT NULL AND ({OPERATION} <> 'close' OR {to} IS DISTINCT FROM old)",
        o_key = list("o.", keys),
        o_values = list("o.", &values),
        same_c = same("c"),
        same_p = same("p"),
        same_x = same("x"),
        on_c = on("o", "c"),
        on_p = on("o", "p"),
        on_n = on("t", "n"),
        on_x = on("o", "x"),
    )
}

async fn apply(
    existing: DeltaTable,
    txn: &Txn,
    ctx: &SessionContext,
    steps: LogicalPlan,
    columns: &Columns<'_>,
) -> Result<DeltaTable, DeltaTableError> {
    let Columns { keys, tracked, others, period } = columns;
    let before = existing.version();
    let identity = keys.iter().chain([&period.from]);
    let matched = all(identity.map(|k| of("target", k).eq(of("source", k))));
    let Some(matched) = matched else { return Err(DeltaTableError::Generic("a merge needs a key".into())) };
    let is = |operation: &str| of("source", OPERATION).eq(lit(operation));
    let ends = [&period.to, &period.current];
    let (merged, _) = existing
        .clone()
        .merge(DataFrame::new(ctx.state(), steps), matched)
        .with_source_alias("source")
        .with_target_alias("target")
        .with_session_state(Arc::new(ctx.state()))
        .with_commit_properties(txn.properties())
        .when_matched_delete(|delete| delete.predicate(is("drop")))?
        .when_matched_update(|update| {
            ends.into_iter().fold(update.predicate(is("close")), |update, n| update.update(Column::from_name(n), of("source", n)))
        })?
        .when_matched_update(|update| {
            let set = tracked.iter().chain(others).chain(ends);
            set.fold(update.predicate(is("put")), |update, n| update.update(Column::from_name(n), of("source", n)))
        })?
        .when_not_matched_insert(|insert| {
            let set = keys.iter().chain(*tracked).chain(others).chain([&period.from]).chain(ends);
            set.fold(insert.predicate(is("put")), |insert, n| insert.set(Column::from_name(n), of("source", n)))
        })?
        .await?;
    if merged.version() == before { DeltaLakehouse::commit_mark(&existing, txn, nothing_merged()).await } else { Ok(merged) }
}
