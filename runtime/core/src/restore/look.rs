//! What a table has, compared with what the ledger knows as published.

use std::collections::{BTreeMap, BTreeSet};

use arrow::{
    array::{Array, AsArray},
    datatypes::{Date32Type, Decimal128Type, Int64Type},
};
use chrono::{DateTime, NaiveDate, Utc};

use super::Stands;
use crate::{
    batch::{MART, QUARANTINE, STAGING},
    contract::ident,
    models::{Materialization, Project},
    ports::{Disposition, Input, PortError, Ports, Query, Result, Run, RunState},
};

/// Model of the mart of daily metrics.
const DAILY: &str = "metricas_diarias";

/// A published day, as the ledger has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// Rows that were read.
    pub(super) expected: u64,
    published: u64,
    cents: i64,
    mart_rows: u64,
    models: BTreeSet<String>,
    /// Time of the run.
    pub(super) millis: Option<u64>,
}

/// The published days, each by its last run that published it.
pub(super) fn known(runs: &[Run]) -> BTreeMap<NaiveDate, Known> {
    let mut days = BTreeMap::new();
    // In order of day and epoch, so the last one of a day stays.
    for run in runs.iter().filter(|r| r.state == RunState::Succeeded && r.report.get("kind").is_none()) {
        let report = &run.report;
        let count = |value: Option<&serde_json::Value>| value.and_then(serde_json::Value::as_u64).unwrap_or(0);
        let models = report.get("models").and_then(serde_json::Value::as_object);
        let millis = run.finished_at.map(|end| end - run.started_at);
        days.insert(
            run.fecha,
            Known {
                expected: count(report.get("expected")),
                published: count(report.get("fates").and_then(|f| f.get("published"))),
                cents: report.get("revenue_cents").and_then(serde_json::Value::as_i64).unwrap_or(0),
                mart_rows: count(report.get("mart_rows")),
                models: models.into_iter().flat_map(|m| m.keys().cloned()).collect(),
                millis: millis.and_then(|m| u64::try_from(m.num_milliseconds()).ok()),
            },
        );
    }
    days
}

/// When the last run ended that published a day.
pub(super) fn last_end(runs: &[Run]) -> Option<DateTime<Utc>> {
    runs.iter().filter(|r| r.state == RunState::Succeeded).filter_map(|r| r.finished_at).max()
}

/// Whether a table has a canonical hash.
pub(super) fn has_hash(table: &str) -> bool {
    [STAGING, QUARANTINE, MART].contains(&table)
}

/// A table that a day writes.
#[derive(Debug, Clone)]
pub(super) struct Table {
    /// Its folder.
    pub(super) folder: String,
    /// The model that it is; `None` for those that come before the models.
    pub(super) model: Option<String>,
    /// A column that is counted, so that files are really read.
    counted: String,
    /// The column whose sum is known.
    sum: Option<&'static str>,
}

/// The tables that a day writes, in the order in which it writes them.
pub(super) fn tables(project: &Project) -> Vec<Table> {
    let plain = |folder: &str, counted: &str, sum| Table { folder: folder.into(), model: None, counted: counted.into(), sum };
    let mut out = vec![plain(QUARANTINE, "fate", None), plain(STAGING, "order_id", Some("monto_neto"))];
    for model in project.chosen().filter(|m| m.materialization == Materialization::Day) {
        let other = model.key.iter().find(|c| *c != "fecha");
        let counted = other.or(model.key.first()).cloned().unwrap_or_else(|| "fecha".into());
        let sum = (model.table == MART).then_some("revenue_neto");
        out.push(Table { folder: model.table.clone(), model: Some(model.name.clone()), counted, sum });
    }
    out
}

/// Rows and, where the sum is known, cents of a day.
pub(super) type Figures = BTreeMap<NaiveDate, (u64, Option<i64>)>;

impl Table {
    /// Whether the ledger keeps figures of its days.
    pub(super) fn is_counted(&self) -> bool {
        has_hash(&self.folder)
    }

    /// Whether a published day is in it.
    fn has(&self, known: &Known) -> bool {
        self.model.as_ref().is_none_or(|model| known.models.contains(model))
    }

    /// Rows and cents that it must have of a published day; `None` where the ledger keeps none.
    fn wanted(&self, known: &Known) -> Option<(u64, Option<i64>)> {
        match self.folder.as_str() {
            STAGING => Some((known.published, Some(known.cents))),
            QUARANTINE => Some((known.expected.saturating_sub(known.published), None)),
            MART if known.models.contains(DAILY) => Some((known.mart_rows, Some(known.cents))),
            _ => None,
        }
    }

    /// Rows that it had of a published day, as far as the ledger tells.
    fn rows(&self, known: &Known) -> u64 {
        self.wanted(known).map_or(0, |(rows, _)| rows)
    }

    /// The published days that are not among the figures as they were, each with its rows.
    pub(super) fn lost(&self, known: &BTreeMap<NaiveDate, Known>, found: &Figures) -> BTreeMap<NaiveDate, u64> {
        let nothing = (0, self.sum.map(|_| 0));
        let differs = |fecha: &NaiveDate, day: &Known| match self.wanted(day) {
            Some(wanted) => *found.get(fecha).unwrap_or(&nothing) != wanted,
            None => false,
        };
        known.iter().filter(|(f, day)| self.has(day) && differs(f, day)).map(|(f, day)| (*f, self.rows(day))).collect()
    }
}

/// Reads what an input has of a table's days, or of one.
pub(super) async fn figures(ports: &Ports, table: &Table, input: Input, fecha: Option<NaiveDate>) -> Result<Figures> {
    let sum =
        table.sum.map_or("CAST(NULL AS DECIMAL(38,2))".to_owned(), |column| format!("CAST(sum({column}) AS DECIMAL(38,2))"));
    let only = fecha.map(|fecha| format!("WHERE fecha = DATE '{fecha}' ")).unwrap_or_default();
    let counted = ident(&table.counted);
    // Counted twice: rows, and values of a column, which nobody can know without reading the files.
    let sql =
        format!("SELECT fecha, count(*) AS n, count({counted}) AS m, {sum} AS cents FROM t {only}GROUP BY fecha ORDER BY fecha");
    let mut out = Figures::new();
    for batch in ports.lakehouse.query(&Query { sql, inputs: vec![("t".into(), input)] }).await? {
        let (days, rows) = (batch.column(0).as_primitive::<Date32Type>(), batch.column(1).as_primitive::<Int64Type>());
        let cents = batch.column(3).as_primitive::<Decimal128Type>();
        for i in 0..batch.num_rows() {
            let fecha = NaiveDate::default() + chrono::Duration::days(days.value(i).into());
            let too_much = |e| PortError::permanent(format!("read {} of {fecha}", table.folder)).because(e);
            let cents = match table.sum {
                Some(_) if cents.is_valid(i) => Some(i64::try_from(cents.value(i)).map_err(too_much)?),
                Some(_) => Some(0),
                None => None,
            };
            out.insert(fecha, (rows.value(i).unsigned_abs(), cents));
        }
    }
    Ok(out)
}

/// How a table stands.
pub(super) async fn stands(ports: &Ports, table: &Table, known: &BTreeMap<NaiveDate, Known>) -> Result<Stands> {
    let days: BTreeMap<NaiveDate, u64> =
        known.iter().filter(|(_, day)| table.has(day)).map(|(f, day)| (*f, table.rows(day))).collect();
    let published = days.len() as u64;
    let (folder, input) = (table.folder.clone(), || Input::Delta(table.folder.clone()));
    // A log that cannot be read is as good as none, but only versions bring it back.
    let exists = match ports.lakehouse.exists(&folder).await {
        Err(e) if e.disposition == Disposition::Permanent => false,
        other => other?,
    };
    if !exists {
        return Ok(Stands { table: folder, exists, published, lost: days });
    }
    let lost = match figures(ports, table, input(), None).await {
        Ok(found) => table.lost(known, &found),
        Err(e) if e.disposition == Disposition::Permanent => {
            // Files are gone; which days are whole is asked one by one.
            let (mut found, mut unread) = (Figures::new(), BTreeSet::new());
            for fecha in days.keys() {
                match figures(ports, table, input(), Some(*fecha)).await {
                    Ok(day) => found.extend(day),
                    Err(e) if e.disposition == Disposition::Permanent => drop(unread.insert(*fecha)),
                    Err(e) => return Err(e),
                }
            }
            let mut lost = table.lost(known, &found);
            lost.extend(days.iter().filter(|(fecha, _)| unread.contains(fecha)).map(|(f, n)| (*f, *n)));
            lost
        }
        Err(e) => return Err(e),
    };
    Ok(Stands { table: folder, exists, published, lost })
}
