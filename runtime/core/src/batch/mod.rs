//! One day of the batch pipeline: source, raw Parquet, staging, quarantine, mart.
//!
//! Every write is idempotent: a day may be run again at any time, after any crash, and gives the same tables.
//! Every row has exactly one fate, and the counts balance or the run fails.

mod hash;
mod mean;
mod nullability;
mod publish;
mod raw;
mod tasks;
mod transform;
mod unjudged;

use std::collections::BTreeMap;

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::DataType,
};
use chrono::NaiveDate;
use serde::{Deserialize, Serialize};

pub use hash::canonical_hash;
pub(crate) use hash::{OrderFreeHash, each_row, hex};
pub use publish::Published;
pub(crate) use publish::publish;
pub use raw::{Manifest, ManifestFile, RawDay, RawLayout, arrow_schema, extract_raw};
pub(crate) use raw::{newest_raw, read_part};
pub(crate) use tasks::Tasks;
pub use tasks::{TaskOutcome, TaskReport};
pub(crate) use transform::UTC;

use crate::{
    contract::Contract,
    dimensions::{self, Dimension, DimensionUse, FetchPolicy, NotChosen, StaleDimension},
    models::Project,
    ports::{Commit, DayWrite, Disposition, Input, PortError, Ports, Query, Result, RunState},
};
use raw::extract;
use transform::{Families, classification, family_queries, staged};

/// How often an idempotent call is made before its error counts.
const CALLS: u32 = 3;

/// Folder of the validated sales.
pub const STAGING: &str = "staging/ventas_validadas";
/// Folder of the rows that are not published, each with its fate and the clause.
pub const QUARANTINE: &str = "staging/ventas_no_publicadas";
/// Table of the warehouse that the daily metrics are loaded into, for dashboards and analysts.
pub const WAREHOUSE: &str = "analytics.metricas_diarias";
/// Folder of the daily metrics.
pub const MART: &str = "marts/metricas_diarias";

/// What happened to the rows of a day. Every count is in rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DayReport {
    /// Rows counted at the source, in the snapshot they were read from.
    pub expected: u64,
    /// Rows per fate: `published`, `deduplicated`, `quarantined`, `rejected`.
    pub fates: BTreeMap<String, u64>,
    /// Rows per clause, for those that are not published.
    pub clauses: BTreeMap<String, u64>,
    /// Sum of `monto_neto` of the published rows, in cents.
    pub revenue_cents: i64,
    /// What was made of the staged day.
    #[serde(flatten)]
    pub published: Published,
    /// Size of the raw day's objects.
    pub raw_bytes: u64,
    /// Raw manifest version.
    pub raw_version: u64,
    /// Order-free hash of the raw day.
    pub raw_hash: String,
    /// The tasks of the day, in their order.
    #[serde(default)]
    pub tasks: Vec<TaskReport>,
    /// The versions of the dimensions that the day was enriched with; empty when none are set up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dimensions: Vec<DimensionUse>,
    /// Those of them that were not the present ones: what the dashboard shows as partial data.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stale_dimensions: Vec<StaleDimension>,
    /// Published rows whose customer or product a dimension does not know, by dimension.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub unknown: BTreeMap<String, u64>,
}

/// Why a day stopped before it was published. The previous version stays what it was.
#[derive(Debug, thiserror::Error)]
pub enum DayError {
    /// A port failed.
    #[error("day {fecha}")]
    Port {
        /// The day.
        fecha: NaiveDate,
        /// What failed.
        #[source]
        source: PortError,
    },
    /// A gate stopped the day.
    #[error("day {fecha} is held by {gate}: found {found}, expected {expected}")]
    Held {
        /// The day.
        fecha: NaiveDate,
        /// Which gate.
        gate: &'static str,
        /// What was found.
        found: String,
        /// What the contract asks.
        expected: String,
    },
}

/// Runs one day from the source to the marts, those of the project's chosen models, and says what each task came to, also of
/// a day that was not published. The caller holds the pipeline in the ledger.
///
/// # Errors
/// [`DayError::Held`] when a gate stops the day; [`DayError::Port`] otherwise. In both cases the marts of the lake and the
/// warehouse still show what they showed before, or the complete new day if only the answer was lost; a failure in the middle
/// of publishing leaves some marts with the new day, which has passed its tests. A held day is not in staging either.
pub async fn run_day(
    ports: &Ports,
    contract: &Contract,
    project: &Project,
    fecha: NaiveDate,
    epoch: i64,
    version: &str,
    fetching: FetchPolicy,
) -> (Result<DayReport, DayError>, Vec<TaskReport>) {
    let mut tasks = Tasks::begin(&*ports.env, "verificar_fuentes");
    let mut result = day(ports, contract, project, (fecha, epoch), version, fetching, &mut tasks).await;
    if matches!(result, Err(DayError::Held { .. })) {
        unjudged::held(ports, fecha).await;
    }
    let tasks = tasks.done(&result, |report| report.fates.get("published").copied().unwrap_or(0));
    if let Ok(report) = &mut result {
        report.tasks.clone_from(&tasks);
    }
    (result, tasks)
}

/// The tasks of a day, one after the other.
async fn day(
    ports: &Ports,
    contract: &Contract,
    project: &Project,
    run: (NaiveDate, i64),
    version: &str,
    fetching: FetchPolicy,
    tasks: &mut Tasks<'_>,
) -> Result<DayReport, DayError> {
    let (fecha, epoch) = run;
    let at = |source| DayError::Port { fecha, source };
    let held = |gate, found: String, expected: String| DayError::Held { fecha, gate, found, expected };

    unjudged::recover(ports, fecha).await.map_err(at)?;
    // A statement that a migration has made stale is prepared anew.
    let found = again(|| ports.tables.columns(&contract.table)).await.map_err(at)?;
    let differences = contract.differences(&found);
    if !differences.is_empty() {
        let list = differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        return Err(held("schema_unchanged", list, format!("the columns of contract {}", contract.id)));
    }
    let promised = nullability::promised(ports, contract).await.map_err(at)?;
    if !promised.gone.is_empty() {
        let found = promised.gone.iter().map(|c| format!("column {c} may be null now")).collect::<Vec<_>>().join("; ");
        let expected = format!("not null, as when a day was last published, and as contract {} requires", contract.id);
        return Err(held("schema_unchanged", found, expected));
    }

    tasks.end(0, 0, "extraer_ventas");
    // The volume is judged before the first row is read, so the raw gate takes no time of its own.
    let raw = extract(ports, contract, fecha).await?;
    let rows = raw.manifest.rows;
    tasks.found(rows, BTreeMap::new());
    tasks.end(rows, raw.manifest.files.iter().map(|f| f.bytes).sum(), "quality_gate_raw");
    tasks.found(rows, BTreeMap::new());
    tasks.end(rows, 0, "extraer_clientes");
    // The facts are safe by now, whatever becomes of the dimensions.
    let chosen = dimensions::choose(ports, fetching, fecha).await.map_err(|e| not_chosen(fecha, e))?;
    let clientes = chosen.iter().find(|c| c.dimension == Dimension::Clientes).map(|c| &c.version);
    tasks.found(clientes.map_or(0, |v| v.rows), BTreeMap::new());
    tasks.end(clientes.map_or(0, |v| v.rows), clientes.map_or(0, |v| v.bytes), "transformar");
    tasks.found(rows, BTreeMap::new());
    let inputs = vec![("ventas".to_owned(), Input::Parquet(raw.paths()))];
    let classified = classification(contract, &families(ports, &inputs, rows).await.map_err(at)?);
    let counts = Query {
        sql: format!(
            "SELECT fate, clause, count(*) AS n, CAST(sum(monto - descuento) AS DECIMAL(20,2)) AS neto
             FROM ({classified}) GROUP BY fate, clause ORDER BY fate, clause"
        ),
        inputs: inputs.clone(),
    };
    let mut report = DayReport {
        expected: rows,
        raw_version: raw.manifest.version,
        raw_hash: raw.manifest.content_hash.clone(),
        raw_bytes: raw.manifest.files.iter().map(|f| f.bytes).sum(),
        dimensions: chosen.iter().map(|c| c.reference()).collect(),
        stale_dimensions: chosen.iter().filter_map(|c| c.stale.clone()).collect(),
        ..DayReport::default()
    };
    for batch in ports.lakehouse.query(&counts).await.map_err(at)? {
        let fates = strings(&batch, 0).map_err(at)?;
        let clauses = strings(&batch, 1).map_err(at)?;
        let n = batch.column(2).as_primitive::<arrow::datatypes::Int64Type>();
        let neto = batch.column(3).as_primitive::<arrow::datatypes::Decimal128Type>();
        for i in 0..batch.num_rows() {
            *report.fates.entry(fates[i].clone()).or_default() += n.value(i) as u64;
            if fates[i] == "published" {
                report.revenue_cents += neto.value(i) as i64;
            } else {
                *report.clauses.entry(clauses[i].clone()).or_default() += n.value(i) as u64;
            }
        }
    }
    // A row without a fate, or with two, is our own mistake and must never be published.
    assert_eq!(report.fates.values().sum::<u64>(), rows, "the fates of {fecha} do not balance");

    let published = report.fates.get("published").copied().unwrap_or(0);
    let dropped = report.fates.iter().filter(|(fate, _)| *fate != "published").map(|(f, n)| (f.clone(), *n)).collect();
    tasks.found(rows, dropped);
    let quarantined = report.fates.get("quarantined").copied().unwrap_or(0);
    let (numerator, denominator) = contract.quarantine_share_max;
    let too_many = u128::from(quarantined) * u128::from(denominator) > u128::from(numerator) * u128::from(rows);

    // What is not published is kept first, so that a held day can be looked at.
    let stamp = ports.env.now().format("%Y-%m-%dT%H:%M:%S%.6fZ");
    write(ports, DayWrite {
        table: QUARANTINE.into(),
        fecha,
        epoch,
        query: Query {
            sql: format!(
                "SELECT order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, _source_hash, fate, clause,
                        arrow_cast('{stamp}', {UTC}) AS _loaded_at FROM ({classified}) WHERE fate <> 'published'"
            ),
            inputs: inputs.clone(),
        },
    })
    .await
    .map_err(at)?;
    if too_many {
        let clauses = report.clauses.iter().map(|(c, n)| format!("{c}: {n}")).collect::<Vec<_>>().join(", ");
        return Err(held(
            "quarantine_share",
            format!("{quarantined} of {rows} rows quarantined ({clauses})"),
            format!("at most {numerator}/{denominator}"),
        ));
    }
    if report.revenue_cents <= 0 {
        return Err(held("quality_gate_final", format!("revenue of {} cents", report.revenue_cents), "more than 0".into()));
    }

    if let Some((found, expected)) = mean::shifted(ports, contract, fecha, report.revenue_cents, published).await.map_err(at)? {
        return Err(held("mean_shift", found, expected));
    }

    let enrichment = dimensions::enrichment(&chosen);
    let inputs: Vec<(String, Input)> = inputs.into_iter().chain(enrichment.inputs.iter().cloned()).collect();
    if !enrichment.unknown.is_empty() {
        let counts = enrichment.unknown.values().map(|c| format!(", count(*) FILTER (WHERE {c})")).collect::<String>();
        let joins = &enrichment.joins;
        let sql = format!("SELECT count(*){counts} FROM ({classified}) AS v{joins} WHERE v.fate = 'published'");
        for batch in ports.lakehouse.query(&Query { sql, inputs: inputs.clone() }).await.map_err(at)? {
            let count = |at: usize| batch.column(at).as_primitive::<arrow::datatypes::Int64Type>().value(0) as u64;
            // A version with a key twice is refused before it is visible, so a sale that became two, or none, is our own mistake.
            assert_eq!(count(0), published, "the dimensions of {fecha} change the number of its sales");
            report.unknown = enrichment.unknown.keys().enumerate().map(|(n, name)| (name.clone(), count(n + 1))).collect();
        }
    }
    let query = Query { sql: staged(&classified, &enrichment, &stamp.to_string()).map_err(at)?, inputs };
    unjudged::note(ports, fecha, epoch).await.map_err(at)?;
    write(ports, DayWrite { table: STAGING.into(), fecha, epoch, query }).await.map_err(at)?;
    tasks.end(published, 0, "models");
    tasks.found(published, BTreeMap::new());
    report.published = publish(ports, project, fecha, epoch, version, Some(report.revenue_cents), tasks).await?;
    unjudged::judged(ports, fecha).await;
    // The day is published; a promise that is not remembered is remembered with the next one.
    if let Err(e) = nullability::remember(ports, contract, promised).await {
        tracing::warn!(%fecha, epoch, error = %e.chain(), "what the source keeps from being null is not remembered");
    }
    for table in [QUARANTINE, STAGING] {
        // A log that could not be looked after is as readable as before; the history has the error.
        let _ = ports.lakehouse.maintain(table).await;
    }
    // The revenue was judged from the same counts before anything was written, and the mart has it to the cent.
    tasks.found(published, BTreeMap::new());
    Ok(report)
}

/// The rows of a day that have to be compared with each other.
async fn families(ports: &Ports, inputs: &[(String, Input)], rows: u64) -> Result<Families> {
    let mut found = Vec::new();
    for sql in family_queries(rows) {
        for batch in ports.lakehouse.query(&Query { sql, inputs: inputs.to_vec() }).await? {
            found.extend(batch.column(0).as_primitive::<arrow::datatypes::Int64Type>().values());
        }
    }
    Ok(Families::of(found))
}

/// How a run ends whose work came to this.
pub(crate) fn state_of<T>(result: &Result<T, DayError>) -> RunState {
    match result {
        Ok(_) => RunState::Succeeded,
        Err(DayError::Held { .. }) => RunState::Held,
        Err(DayError::Port { .. }) => RunState::Failed,
    }
}

/// What the lack of a dimension means for a day. One that may come again is worth the retries of the run; one that is refused
/// as it stands holds the day.
fn not_chosen(fecha: NaiveDate, error: NotChosen) -> DayError {
    match error {
        NotChosen::Port(source) => DayError::Port { fecha, source },
        NotChosen::TooOld { found, expected, source, .. } if source.disposition == Disposition::Permanent => {
            DayError::Held { fecha, gate: "dimensions_fresh", found: format!("{found} ({})", source.chain()), expected }
        }
        NotChosen::TooOld { found, expected, source, .. } => {
            let what = format!("use the dimensions: found {found}, expected {expected}");
            let error = PortError::retryable(what).code("DIMENSION_TOO_OLD").because(source);
            DayError::Port { fecha, source: error }
        }
    }
}

/// Writes a day under its epoch, so that a repeat is safe.
async fn write(ports: &Ports, day: DayWrite) -> Result<Commit> {
    again(|| ports.lakehouse.overwrite_day(day.clone())).await
}

/// Calls, and while nothing is known to be wrong for good calls again at once: at most [`CALLS`] calls in all. Only for
/// calls that are idempotent. Longer troubles are the retry policy's business.
pub(crate) async fn again<T, F: Future<Output = Result<T>>>(mut call: impl FnMut() -> F) -> Result<T> {
    let mut calls = 1;
    loop {
        match call().await {
            Err(e) if e.disposition != Disposition::Permanent && calls < CALLS => calls += 1,
            other => return other,
        }
    }
}

/// A string column, whichever of Arrow's string layouts it has.
///
/// # Errors
/// `Permanent` when the column is no string.
pub fn strings(batch: &RecordBatch, column: usize) -> Result<Vec<String>> {
    let array = arrow::compute::cast(batch.column(column), &DataType::Utf8)
        .map_err(|e| PortError::permanent(format!("read column {column} as text")).because(e))?;
    Ok(array.as_string::<i32>().iter().map(|v| v.unwrap_or_default().to_owned()).collect())
}
