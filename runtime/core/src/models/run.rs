//! Models made for days: which days, in which order, with which epochs.
//!
//! A day of a model depends on the days that its lookback reaches. When an old day changes, every stored day that has read it
//! is made again, so the tables end up as if all days had come in order. Making a day twice gives the same rows.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use arrow::{
    array::{Array, AsArray},
    compute::cast,
    datatypes::{DataType, Int32Type},
};
use chrono::{DateTime, Days, NaiveDate, Utc};

use super::{At, Lookback, Materialization, Model, Need, Project};
use crate::{
    batch::again,
    contract::ident,
    ports::{Commit, DayWrite, Disposition, Input, Lakehouse, PortError, Query, Result, Rows},
};

/// Writes of one day that may be tried while its outcome is not known.
const ATTEMPTS_MAX: u32 = 3;

/// A run of the models.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Days whose sources have changed.
    pub days: BTreeSet<NaiveDate>,
    /// Ordinal of the run, from the ledger. A table that has seen a higher one for a day gets the next after that.
    pub epoch: i64,
    /// Time of processing.
    pub now: DateTime<Utc>,
    /// Version of the pipeline.
    pub version: String,
}

/// Rows of one day that are made and not written yet, by the folder of their table.
pub type Made = BTreeMap<String, Rows>;

/// A query as it answers once the made rows stand for their day.
pub fn with_made(query: Query, fecha: NaiveDate, made: &Made) -> Query {
    let input = |input: Input| match &input {
        Input::Delta(table) => match made.get(table) {
            Some(rows) => Input::DeltaWithDay { table: table.clone(), fecha, rows: rows.clone() },
            None => input,
        },
        Input::Parquet(_)
        | Input::DeltaVersion { .. }
        | Input::DeltaTime { .. }
        | Input::Rows(_)
        | Input::DeltaWithDay { .. } => input,
    };
    Query { sql: query.sql, inputs: query.inputs.into_iter().map(|(name, i)| (name, input(i))).collect() }
}

/// One day of one model to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Model.
    pub model: String,
    /// Day.
    pub fecha: NaiveDate,
}

/// What a run has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Each day of each model that was written, in that order, with the epoch it was written under.
    pub made: Vec<(Step, i64, Commit)>,
    /// What was not there and could be done without; the models saw no rows of it.
    pub absent: BTreeSet<Need>,
}

/// What the chosen models read and can do without, and that is not there now: optional sources, and stored models that are
/// not chosen and were never made.
///
/// # Errors
/// When the lake does not answer.
pub async fn absent(lakehouse: &dyn Lakehouse, project: &Project) -> Result<BTreeSet<Need>> {
    let mut out = BTreeSet::new();
    for need in project.read().flat_map(|m| &m.optional) {
        if let Need::Source(schema, table) = need
            && !out.contains(need)
            && !lakehouse.exists(&format!("{schema}/{table}")).await?
        {
            out.insert(need.clone());
        }
    }
    for model in project.read().filter(|m| m.materialization == Materialization::Day && !project.is_chosen(&m.name)) {
        if project.has_contract(model) && !lakehouse.exists(&model.table).await? {
            out.insert(Need::Model(model.name.clone()));
        }
    }
    Ok(out)
}

/// What has to be made of the chosen models when the sources of `days` have changed: models in order of their graph, days in
/// order of time.
///
/// A day that a table has without a row counts as stored, unless no later day of the table has any.
///
/// # Errors
/// When the lake does not answer.
pub async fn plan(lakehouse: &dyn Lakehouse, project: &Project, days: &BTreeSet<NaiveDate>) -> Result<Vec<Step>> {
    let mut changed: BTreeMap<&str, BTreeSet<NaiveDate>> = BTreeMap::new();
    let mut steps = Vec::new();
    for model in project.models() {
        let mut mine = BTreeSet::new();
        for need in &model.needs {
            match need {
                Need::Source(..) => mine.extend(days),
                Need::Model(name) => mine.extend(changed.get(name.as_str()).into_iter().flatten()),
            }
        }
        if model.materialization == Materialization::Day {
            if !project.is_chosen(&model.name) {
                // It stays as it is; whoever reads it reads what it has of these days.
                changed.insert(&model.name, mine);
                continue;
            }
            mine.extend(reached(lakehouse, model, &mine).await?);
            steps.extend(mine.iter().map(|d| Step { model: model.name.clone(), fecha: *d }));
        }
        changed.insert(&model.name, mine);
    }
    Ok(steps)
}

/// Stored days of a model that have read one of the changed days and are not among them.
async fn reached(lakehouse: &dyn Lakehouse, model: &Model, changed: &BTreeSet<NaiveDate>) -> Result<BTreeSet<NaiveDate>> {
    let (Some(first), Some(last)) = (changed.first(), changed.last()) else { return Ok(BTreeSet::new()) };
    if model.lookback == Lookback::Days(0) || !lakehouse.exists(&model.table).await? {
        return Ok(BTreeSet::new());
    }
    let end = match model.lookback {
        Lookback::All => NaiveDate::MAX,
        Lookback::Days(n) => last.checked_add_days(Days::new(u64::from(n))).unwrap_or(NaiveDate::MAX),
    };
    let sql = format!("SELECT DISTINCT CAST(fecha AS INT) AS fecha FROM t WHERE fecha > DATE '{first}' ORDER BY fecha");
    let query = Query { sql, inputs: vec![("t".into(), Input::Delta(model.table.clone()))] };
    let mut stored = BTreeSet::new();
    for batch in lakehouse.query(&query).await? {
        let column = cast(batch.column(0), &DataType::Int32)
            .map_err(|e| PortError::permanent(format!("read the days of {}", model.table)).because(e))?;
        let column = column.as_primitive::<Int32Type>();
        let day = |i| NaiveDate::default().checked_add_signed(chrono::TimeDelta::days(i64::from(column.value(i))));
        stored.extend((0..column.len()).filter(|i| column.is_valid(*i)).filter_map(day));
    }
    let mut out = BTreeSet::new();
    let mut day = *first;
    let horizon = stored.last().copied().unwrap_or(*first).min(end);
    while let Some(next) = day.succ_opt().filter(|d| *d <= horizon) {
        day = next;
        let reads_a_change = match model.lookback {
            Lookback::All => true,
            Lookback::Days(n) => {
                let from = day.checked_sub_days(Days::new(u64::from(n))).unwrap_or(NaiveDate::MIN);
                changed.range(from..day).next().is_some()
            }
        };
        if reads_a_change
            && !changed.contains(&day)
            && (stored.contains(&day) || lakehouse.last_epoch(&model.table, day).await?.is_some())
        {
            out.insert(day);
        }
    }
    Ok(out)
}

/// Makes the rows that every chosen model has for one day, and writes nothing: models that read others see their new rows.
/// In memory is one day of each chosen model.
///
/// # Errors
/// Any disposition, of the first query that fails.
pub async fn make_day(lakehouse: &dyn Lakehouse, project: &Project, fecha: NaiveDate, batch: &Batch) -> Result<Made> {
    let absent = absent(lakehouse, project).await?;
    let at = At { day: fecha, now: batch.now, version: &batch.version, absent: &absent };
    let mut made = Made::new();
    for model in project.chosen().filter(|m| m.materialization == Materialization::Day) {
        let query = with_made(project.render(model, &at), fecha, &made);
        let rows = again(|| lakehouse.query(&query)).await?;
        made.insert(model.table.clone(), Arc::new(rows));
    }
    Ok(made)
}

/// Makes every chosen model for the days of `batch`, and again every stored day that has read them.
///
/// May be repeated after any error or crash. The caller holds the pipeline in the ledger.
///
/// # Errors
/// Any disposition, of the first write or query that fails; what was written before stays, and is right.
pub async fn run_models(lakehouse: &dyn Lakehouse, project: &Project, batch: &Batch) -> Result<Report> {
    write_models(lakehouse, project, batch, None).await
}

/// The same as [`run_models`], where the rows of one day are there already, as [`make_day`] made them.
///
/// # Errors
/// As for [`run_models`].
pub async fn write_models(
    lakehouse: &dyn Lakehouse,
    project: &Project,
    batch: &Batch,
    made: Option<(NaiveDate, &Made)>,
) -> Result<Report> {
    let mut report = Report { made: Vec::new(), absent: absent(lakehouse, project).await? };
    for need in &report.absent {
        tracing::info!(source = %need, "not there, models see no rows of it");
    }
    for step in plan(lakehouse, project, &batch.days).await? {
        let Some(model) = project.model(&step.model) else { continue };
        let at = At { day: step.fecha, now: batch.now, version: &batch.version, absent: &report.absent };
        // Later days may have been made again on behalf of an earlier one, with epochs that the ledger has not given.
        // A repeated day has the same rows, a skipped one would have old ones.
        let seen = lakehouse.last_epoch(&model.table, step.fecha).await?;
        let epoch = batch.epoch.max(seen.map_or(i64::MIN, |e| e + 1));
        let rows = made.filter(|(day, _)| *day == step.fecha).and_then(|(_, made)| made.get(&model.table));
        let query = match rows {
            Some(rows) => Query { sql: "SELECT * FROM made".into(), inputs: vec![("made".into(), Input::Rows(rows.clone()))] },
            None => project.render(model, &at),
        };
        let query = project.guarded(model, query);
        let write = DayWrite { table: model.table.clone(), fecha: step.fecha, epoch, query };
        let mut attempts = 1;
        let commit = loop {
            match lakehouse.overwrite_day(write.clone()).await {
                Err(e) if e.disposition != Disposition::Permanent && attempts < ATTEMPTS_MAX => attempts += 1,
                other => break other?,
            }
        };
        tracing::info!(model = %model.name, fecha = %step.fecha, epoch, "model made");
        report.made.push((step, epoch, commit));
    }
    Ok(report)
}

/// The canonical rows of a model's table: sorted by key, without times of processing; for hashes and comparisons.
pub fn canonical(model: &Model, columns: &[String]) -> Query {
    let list = |names: &mut dyn Iterator<Item = &String>| names.map(|c| ident(c)).collect::<Vec<_>>().join(", ");
    let columns = list(&mut columns.iter().filter(|c| !c.starts_with('_') || *c == "_source_hash"));
    let sql = format!("SELECT {columns} FROM t ORDER BY {}", list(&mut model.key.iter()));
    Query { sql, inputs: vec![("t".into(), Input::Delta(model.table.clone()))] }
}
