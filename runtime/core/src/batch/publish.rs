//! From staging to what people read: the models of the day, their tests, and the warehouse.
//!
//! The rows of the day are made in memory, tested as if they stood in their tables, and written only when they have passed:
//! neither a mart of the lake nor the warehouse ever shows a day that is held. Later days that have read this one are made
//! again after it, and are not tested once more.

use std::collections::BTreeMap;

use arrow::{
    array::{AsArray, RecordBatch},
    compute::cast,
    datatypes::{DataType, Decimal128Type},
};
use chrono::NaiveDate;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{DayError, MART, Tasks, again};
use crate::{
    contract::{Severity, check::QualityResult, ident},
    models::{
        Model, Project,
        run::{Batch, make_day, write_models},
    },
    ports::{Input, PortError, Ports, Query, Result, Rows},
    quality,
};

/// What was made of a staged day. Every count is of days, tests or rows, as its name says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// Days that were made of each model: the day itself, and later days that have read it.
    pub models: BTreeMap<String, u64>,
    /// Tests of models that were run.
    pub tests: u64,
    /// Tests that failed and may, each in a line.
    pub warnings: Vec<String>,
    /// Rows of the day in the mart of daily metrics; 0 when it was not made.
    pub mart_rows: u64,
}

/// Makes the chosen models for a staged day, tests them, and only then writes them and loads the marts among them into the
/// warehouse.
///
/// `staged_cents` is the revenue of the staged day, where the caller knows it: the mart must have the same. The task that
/// runs is `models`; afterwards it is `quality_gate_final`.
pub(crate) async fn publish(
    ports: &Ports,
    project: &Project,
    fecha: NaiveDate,
    epoch: i64,
    version: &str,
    staged_cents: Option<i64>,
    tasks: &mut Tasks<'_>,
) -> Result<Published, DayError> {
    let at = |source| DayError::Port { fecha, source };
    let mut out = Published::default();
    let batch = Batch { days: [fecha].into(), epoch, now: ports.env.now(), version: version.into() };
    let lakehouse = ports.lakehouse.as_ref();
    let rows = make_day(lakehouse, project, fecha, &batch).await.map_err(at)?;
    let count = |rows: &Rows| rows.iter().map(|b| b.num_rows() as u64).sum::<u64>();
    let made: u64 = rows.values().map(count).sum();
    tasks.end(made, 0, "model_tests");
    tasks.found(made, BTreeMap::new());
    let test = || quality::test_made(lakehouse, project, fecha, ports.env.now(), &rows);
    let tested = again(test).await.map_err(at)?;
    out.tests = tested.len() as u64;
    let results: Vec<QualityResult> = tested.iter().map(|t| t.result.clone()).collect();
    // The day is judged whether or not its outcomes can be kept.
    if let Err(e) = ports.ledger.put_quality(&results).await {
        warn!(%fecha, epoch, error = %e.chain(), "outcomes of model tests not kept");
    }
    let warnings = tested.iter().filter(|t| !t.result.passed && t.result.severity != Severity::Error);
    out.warnings = warnings.map(quality::line).collect();
    let broken: Vec<String> = quality::broken(&tested).map(quality::line).collect();
    if !broken.is_empty() {
        let expected = format!("0 rows in each of {} tests", tested.len());
        return Err(DayError::Held { fecha, gate: "model_tests", found: broken.join("; "), expected });
    }
    if let Some(mart) = rows.get(MART) {
        out.mart_rows = count(mart);
        if let Some(staged) = staged_cents {
            balance(mart, staged).map_err(at)?;
        }
    }
    let written = write_models(lakehouse, project, &batch, Some((fecha, &rows))).await.map_err(at)?.made;
    for (step, ..) in &written {
        *out.models.entry(step.model.clone()).or_default() += 1;
    }
    for (step, epoch, _) in &written {
        let Some(model) = project.model(&step.model).filter(|m| m.layer == "marts") else { continue };
        let rows = match rows.get(&model.table).filter(|_| step.fecha == fecha) {
            Some(rows) => rows.as_ref().clone(),
            None => day(ports, model, step.fecha).await.map_err(at)?,
        };
        // Analysts see the day only when the mart has it.
        let table = format!("analytics.{}", model.name);
        again(|| ports.warehouse.load_day(&table, step.fecha, *epoch, rows.clone())).await.map_err(at)?;
    }
    for table in project.tables() {
        // A log that could not be looked after is as readable as before; the history has the error.
        let _ = ports.lakehouse.maintain(table).await;
    }
    tasks.end(made, 0, "quality_gate_final");
    Ok(out)
}

/// One stored day of a model, in the order of its key.
async fn day(ports: &Ports, model: &Model, fecha: NaiveDate) -> Result<Vec<RecordBatch>> {
    let order = model.key.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ");
    let query = Query {
        sql: format!("SELECT * FROM mart WHERE fecha = DATE '{fecha}' ORDER BY {order}"),
        inputs: vec![("mart".to_owned(), Input::Delta(model.table.clone()))],
    };
    ports.lakehouse.query(&query).await
}

/// The revenue of the mart is that of the published rows, to the cent; a model that loses a row does not reach anybody.
fn balance(mart: &[RecordBatch], staged_cents: i64) -> Result<()> {
    let mut cents = 0_i128;
    for batch in mart {
        let column = batch
            .column_by_name("revenue_neto")
            .ok_or_else(|| PortError::permanent(format!("read {MART}: found no column revenue_neto, expected one")))?;
        let column = cast(column, &DataType::Decimal128(38, 2))
            .map_err(|e| PortError::permanent(format!("read revenue_neto of {MART}")).because(e))?;
        cents += column.as_primitive::<Decimal128Type>().iter().flatten().sum::<i128>();
    }
    if cents == i128::from(staged_cents) {
        Ok(())
    } else {
        Err(PortError::permanent(format!("balance {MART} with staging: found revenue of {cents} cents, expected {staged_cents}")))
    }
}
