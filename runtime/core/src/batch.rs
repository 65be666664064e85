//! One day of the batch pipeline: source, raw Parquet, staging, quarantine, mart.
//!
//! Every write is idempotent: a day may be run again at any time, after any crash, and gives the same tables.
//! Every row has exactly one fate, and the counts balance or the run fails.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{Array, AsArray, RecordBatch},
    datatypes::{DataType, Field, Schema, TimeUnit},
    util::display::{ArrayFormatter, FormatOptions},
};
use chrono::NaiveDate;
use futures::{StreamExt, TryStreamExt};
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, path::Path};
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    contract::Contract,
    ports::{Column, Commit, DayWrite, Disposition, Input, Lakehouse, PortError, Ports, Query, Result},
};

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
    /// Rows of the day in the mart and in the warehouse.
    pub mart_rows: u64,
    /// Size of the raw day's objects.
    pub raw_bytes: u64,
    /// Raw manifest version.
    pub raw_version: u64,
    /// Order-free hash of the raw day.
    pub raw_hash: String,
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

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    version: u64,
    contract: String,
    rows: u64,
    content_hash: String,
    files: Vec<ManifestFile>,
}

#[derive(Debug, Serialize, Deserialize)]
struct ManifestFile {
    path: String,
    bytes: u64,
    sha256: String,
}

/// The Arrow schema of a table's columns.
///
/// # Errors
/// `Permanent` for a physical type that is none of `string`, `decimal(10,2)`, `timestamp`, `date`.
pub fn arrow_schema(columns: &[Column]) -> Result<Arc<Schema>> {
    let fields = columns
        .iter()
        .map(|c| {
            let data_type = match c.physical_type.as_str() {
                "string" => DataType::Utf8,
                "decimal(10,2)" => DataType::Decimal128(10, 2),
                "timestamp" => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
                "date" => DataType::Date32,
                other => {
                    return Err(PortError::permanent(format!(
                        "column {} has type {other}, which this source cannot read",
                        c.name
                    )));
                }
            };
            Ok(Field::new(&c.name, data_type, true))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Arc::new(Schema::new(fields)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Calls `visit` with each row as one unambiguous text.
fn each_row(batch: &RecordBatch, mut visit: impl FnMut(&str)) -> Result<()> {
    let options = FormatOptions::default();
    let columns = batch
        .columns()
        .iter()
        .map(|c| ArrayFormatter::try_new(c, &options))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| PortError::permanent("format rows for hashing").because(e))?;
    let mut text = String::new();
    for row in 0..batch.num_rows() {
        text.clear();
        for (array, formatter) in batch.columns().iter().zip(&columns) {
            // The length in front keeps ("a|b") apart from ("a", "b"), and null apart from "".
            if array.is_null(row) {
                text.push_str("-;");
            } else {
                let value = formatter.value(row).to_string();
                text.push_str(&format!("{}:{value};", value.len()));
            }
        }
        visit(&text);
    }
    Ok(())
}

/// Order-free hash of rows: the sum of the rows' sha256 in four 64-bit lanes, so that duplicates count.
#[derive(Debug, Default)]
struct OrderFreeHash([u64; 4]);

impl OrderFreeHash {
    fn add(&mut self, row: &str) {
        let digest = Sha256::digest(row.as_bytes());
        for (lane, chunk) in self.0.iter_mut().zip(digest.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            *lane = lane.wrapping_add(u64::from_le_bytes(word));
        }
    }
    fn finish(&self) -> String {
        hex(&self.0.iter().flat_map(|l| l.to_be_bytes()).collect::<Vec<_>>())
    }
}

fn store_error(what: String, error: StoreError) -> PortError {
    let permanent = matches!(
        error,
        StoreError::NotFound { .. }
            | StoreError::AlreadyExists { .. }
            | StoreError::PermissionDenied { .. }
            | StoreError::Unauthenticated { .. }
    );
    // A put whose answer was lost may have happened; the names are deterministic, so a repeat is safe.
    let base = if permanent { PortError::permanent(what) } else { PortError::unknown(what) };
    base.because(error)
}

/// A day of the raw layer as its manifest tells it.
struct RawDay {
    manifest: Manifest,
}

impl RawDay {
    fn paths(&self) -> Vec<String> {
        self.manifest.files.iter().map(|f| f.path.clone()).collect()
    }
}

/// Extracts a day into the raw layer. The volume is judged by the source's own count, before anything is written.
async fn extract(ports: &Ports, contract: &Contract, fecha: NaiveDate) -> Result<RawDay, DayError> {
    let at = |source| DayError::Port { fecha, source };
    let prefix = format!("raw/{}/fecha={fecha}", contract.table);
    let manifests = Path::from(format!("{prefix}/_manifest"));
    let mut read = ports.tables.read_day(&contract.table, fecha, &contract.columns).await.map_err(at)?;
    if !(contract.rows_min..=contract.rows_max).contains(&read.expected_rows) {
        return Err(DayError::Held {
            fecha,
            gate: "quality_gate_raw",
            found: format!("{} rows", read.expected_rows),
            expected: format!("{} to {} rows", contract.rows_min, contract.rows_max),
        });
    }
    let latest = latest_manifest(ports, &manifests).await.map_err(at)?;
    let version = latest.as_ref().map_or(0, |m| m.version) + 1;

    let schema = arrow_schema(&contract.columns).map_err(at)?;
    let properties =
        WriterProperties::builder().set_compression(Compression::SNAPPY).set_created_by("simulacro".to_owned()).build();
    let parquet_error = |e| at(PortError::permanent(format!("encode {prefix}")).because(e));
    let mut writer = ArrowWriter::try_new(Vec::new(), schema, Some(properties)).map_err(parquet_error)?;
    let (mut hash, mut rows) = (OrderFreeHash::default(), 0);
    while let Some(batch) = read.batches.next().await {
        let batch = batch.map_err(at)?;
        rows += batch.num_rows() as u64;
        each_row(&batch, |row| hash.add(row)).map_err(at)?;
        writer.write(&batch).map_err(parquet_error)?;
    }
    let bytes = writer.into_inner().map_err(parquet_error)?;
    if rows != read.expected_rows {
        return Err(at(PortError::retryable(format!(
            "read {} of {fecha}: found {rows} rows, expected {} as counted in the same snapshot",
            contract.table, read.expected_rows
        ))));
    }
    let content_hash = hash.finish();
    let manifest = match latest {
        Some(latest) if latest.content_hash == content_hash => latest,
        _ => publish(ports, contract, &prefix, version, rows, content_hash, bytes).await.map_err(at)?,
    };
    remove_leftovers(ports, &prefix, manifest.version).await.map_err(at)?;
    Ok(RawDay { manifest })
}

/// The newest manifest of a partition, if there is one.
async fn latest_manifest(ports: &Ports, folder: &Path) -> Result<Option<Manifest>> {
    let listing = ports.objects.list(Some(folder)).map_ok(|m| m.location);
    let mut versions: Vec<Path> = listing.try_collect().await.map_err(|e| store_error(format!("list {folder}"), e))?;
    versions.sort();
    let Some(path) = versions.last() else { return Ok(None) };
    let bytes = read_all(ports.objects.as_ref(), path).await?;
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| PortError::permanent(format!("read manifest {path}: found a damaged file")).because(e))
}

/// Writes the object and then its manifest, which makes it visible.
///
/// The object's name is free until its manifest exists, so an attempt that died here is simply written over.
async fn publish(
    ports: &Ports,
    contract: &Contract,
    prefix: &str,
    version: u64,
    rows: u64,
    content_hash: String,
    bytes: Vec<u8>,
) -> Result<Manifest> {
    let path = Path::from(format!("{prefix}/part-v{version:06}-0000.parquet"));
    let file = ManifestFile { path: path.to_string(), bytes: bytes.len() as u64, sha256: hex(&Sha256::digest(&bytes)) };
    let bytes = bytes::Bytes::from(bytes);
    again(|| async { ports.objects.put(&path, bytes.clone().into()).await.map_err(|e| store_error(format!("put {path}"), e)) })
        .await?;
    let manifest = Manifest { version, contract: contract.id.clone(), rows, content_hash, files: vec![file] };
    let name = Path::from(format!("{prefix}/_manifest/v{version:06}.json"));
    let body = serde_json::to_vec_pretty(&manifest).map_err(|e| PortError::permanent(format!("encode {name}")).because(e))?;
    let body = bytes::Bytes::from(body);
    again(|| async {
        match ports.objects.put_opts(&name, body.clone().into(), PutMode::Create.into()).await {
            Ok(_) => Ok(()),
            // Either our own first try, whose answer was lost, or a rival: the content tells.
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {
                match latest_manifest(ports, &Path::from(format!("{prefix}/_manifest"))).await? {
                    Some(there) if there.version == version && there.content_hash == manifest.content_hash => Ok(()),
                    _ => Err(PortError::permanent(format!("put {name}: another run has published this version"))),
                }
            }
            Err(e) => Err(store_error(format!("put {name}"), e)),
        }
    })
    .await?;
    Ok(manifest)
}

/// Calls, and while nothing is known to be wrong for good calls again at once: at most [`CALLS`] calls in all. Only for
/// calls that are idempotent. Longer troubles are the retry policy's business.
async fn again<T, F: Future<Output = Result<T>>>(mut call: impl FnMut() -> F) -> Result<T> {
    let mut calls = 1;
    loop {
        match call().await {
            Err(e) if e.disposition != Disposition::Permanent && calls < CALLS => calls += 1,
            other => return other,
        }
    }
}

/// Removes objects of the partition above the published version: what a dead attempt left behind.
async fn remove_leftovers(ports: &Ports, prefix: &str, version: u64) -> Result<()> {
    let prefix = Path::from(prefix);
    let listing = ports.objects.list(Some(&prefix)).map_ok(|m| m.location);
    let objects: Vec<Path> = listing.try_collect().await.map_err(|e| store_error(format!("list {prefix}"), e))?;
    let leftover = |p: &Path| {
        let number = p.filename()?.strip_prefix("part-v")?.split('-').next()?.parse::<u64>().ok()?;
        Some(number > version)
    };
    for path in objects.into_iter().filter(|p| leftover(p).unwrap_or(false)) {
        ports.objects.delete(&path).await.map_err(|e| store_error(format!("delete {path}"), e))?;
    }
    Ok(())
}

async fn read_all(store: &dyn ObjectStore, path: &Path) -> Result<bytes::Bytes> {
    let got = store.get(path).await.map_err(|e| store_error(format!("get {path}"), e))?;
    got.bytes().await.map_err(|e| store_error(format!("get {path}"), e))
}

/// The statement that gives each raw row its one fate.
///
/// Precedence: a business rule rejects, then the contract quarantines, then `_source_hash` deduplicates, then rows
/// that contradict each other under one `order_id` are all quarantined, and the rest is published.
fn classification(contract: &Contract) -> String {
    let broken = contract.clauses.iter().map(|c| c.broken_when.clone()).collect::<Vec<_>>();
    let any_broken = if broken.is_empty() { "false".to_owned() } else { broken.join(" OR ") };
    let names = contract
        .clauses
        .iter()
        .map(|c| format!("CASE WHEN {} THEN '{}' END", c.broken_when, c.name.replace('\'', "''")))
        .chain(["CAST(NULL AS VARCHAR)".to_owned()])
        .collect::<Vec<_>>()
        .join(", ");
    format!(
        "WITH hashed AS (
           SELECT order_id, user_id, product_id, monto,
                  coalesce(descuento, CAST(0 AS DECIMAL(10,2))) AS descuento, region, timestamp_venta, fecha,
                  encode(sha256(concat_ws('|', order_id, user_id, CAST(monto AS VARCHAR))), 'hex') AS _source_hash
           FROM ventas),
         judged AS (
           SELECT *, CASE WHEN coalesce(monto <= CAST(0 AS DECIMAL(10,2)), false) THEN 'rejected'
                          WHEN {any_broken} THEN 'quarantined' ELSE 'good' END AS verdict,
                  concat_ws(',', {names}) AS broken
           FROM hashed),
         numbered AS (
           SELECT *, row_number() OVER (PARTITION BY verdict, _source_hash
                       ORDER BY timestamp_venta, product_id, region, descuento) AS copy FROM judged),
         counted AS (
           SELECT *, sum(CASE WHEN verdict = 'good' AND copy = 1 THEN 1 ELSE 0 END) OVER (PARTITION BY order_id) AS versions
           FROM numbered)
         SELECT order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, _source_hash,
                CASE WHEN verdict <> 'good' THEN verdict WHEN copy > 1 THEN 'deduplicated'
                     WHEN versions > 1 THEN 'quarantined' ELSE 'published' END AS fate,
                CASE WHEN verdict = 'rejected' THEN 'monto.positive' WHEN verdict = 'quarantined' THEN broken
                     WHEN copy > 1 THEN '_source_hash.duplicate' WHEN versions > 1 THEN 'order_id.unique'
                     ELSE '' END AS clause
         FROM counted"
    )
}

const UTC: &str = "'Timestamp(Microsecond, Some(\"UTC\"))'";

/// Runs one day from the source to the mart. The caller holds the pipeline in the ledger.
///
/// # Errors
/// [`DayError::Held`] when a gate stops the day; [`DayError::Port`] otherwise. In both cases the tables still
/// show what they showed before, or the complete new day if only the answer was lost.
pub async fn run_day(
    ports: &Ports,
    contract: &Contract,
    fecha: NaiveDate,
    epoch: i64,
    version: &str,
) -> Result<DayReport, DayError> {
    let at = |source| DayError::Port { fecha, source };
    let held = |gate, found: String, expected: String| DayError::Held { fecha, gate, found, expected };

    let found = ports.tables.columns(&contract.table).await.map_err(at)?;
    let differences = contract.differences(&found);
    if !differences.is_empty() {
        let list = differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        return Err(held("schema_unchanged", list, format!("the columns of contract {}", contract.id)));
    }

    let raw = extract(ports, contract, fecha).await?;
    let rows = raw.manifest.rows;
    let inputs = vec![("ventas".to_owned(), Input::Parquet(raw.paths()))];
    let classified = classification(contract);
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

    write(
        ports,
        DayWrite {
            table: STAGING.into(),
            fecha,
            epoch,
            query: Query {
                sql: format!(
                    "SELECT order_id, user_id, product_id, monto AS monto_bruto, descuento,
                        CAST(monto - descuento AS DECIMAL(10,2)) AS monto_neto, region, timestamp_venta, fecha,
                        arrow_cast('{stamp}', {UTC}) AS _loaded_at, _source_hash,
                        CAST(NULL AS VARCHAR) AS segmento, CAST(NULL AS VARCHAR) AS pais,
                        CAST(NULL AS VARCHAR) AS categoria, CAST(NULL AS VARCHAR) AS marca
                 FROM ({classified}) WHERE fate = 'published'"
                ),
                inputs,
            },
        },
    )
    .await
    .map_err(at)?;

    write(
        ports,
        DayWrite {
            table: MART.into(),
            fecha,
            epoch,
            query: Query {
                sql: format!(
                    "SELECT fecha, region, coalesce(segmento, 'sin_segmento') AS segmento_cliente,
                        CAST(sum(monto_bruto) AS DECIMAL(12,2)) AS revenue_bruto,
                        CAST(sum(monto_neto) AS DECIMAL(12,2)) AS revenue_neto,
                        CAST(sum(descuento) AS DECIMAL(12,2)) AS descuentos_total,
                        count(*) AS transacciones, count(DISTINCT user_id) AS usuarios_unicos,
                        CAST(sum(monto_neto) / count(*) AS DECIMAL(10,2)) AS ticket_promedio,
                        CAST(NULL AS DOUBLE) AS tasa_conversion,
                        arrow_cast('{stamp}', {UTC}) AS _updated_at, '{version}' AS _pipeline_version
                 FROM staging WHERE fecha = DATE '{fecha}' GROUP BY fecha, region, coalesce(segmento, 'sin_segmento')
                 ORDER BY region, segmento_cliente"
                ),
                inputs: vec![("staging".to_owned(), Input::Delta(STAGING.into()))],
            },
        },
    )
    .await
    .map_err(at)?;
    // Analysts see the day only when the mart has it.
    let day = Query {
        sql: format!("SELECT * FROM mart WHERE fecha = DATE '{fecha}' ORDER BY region, segmento_cliente"),
        inputs: vec![("mart".to_owned(), Input::Delta(MART.into()))],
    };
    let batches = ports.lakehouse.query(&day).await.map_err(at)?;
    report.mart_rows = batches.iter().map(|b| b.num_rows() as u64).sum();
    again(|| ports.warehouse.load_day(WAREHOUSE, fecha, epoch, batches.clone())).await.map_err(at)?;
    for table in [QUARANTINE, STAGING, MART] {
        // A log that could not be looked after is as readable as before; the history has the error.
        let _ = ports.lakehouse.maintain(table).await;
    }
    Ok(report)
}

/// Writes a day under its epoch, so that a repeat is safe.
async fn write(ports: &Ports, day: DayWrite) -> Result<Commit> {
    again(|| ports.lakehouse.overwrite_day(day.clone())).await
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

/// The canonical hash of a Delta table: sha256 over its rows sorted by key, without times of processing.
///
/// # Errors
/// When the table cannot be read.
pub async fn canonical_hash(lakehouse: &dyn Lakehouse, table: &str) -> Result<String> {
    let (columns, order) = match table {
        MART => (
            "fecha, region, segmento_cliente, revenue_bruto, revenue_neto, descuentos_total, transacciones, usuarios_unicos, ticket_promedio, tasa_conversion",
            "fecha, region, segmento_cliente",
        ),
        STAGING => (
            "order_id, user_id, product_id, monto_bruto, descuento, monto_neto, region, timestamp_venta, fecha, _source_hash",
            "order_id",
        ),
        QUARANTINE => (
            "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, _source_hash, fate, clause",
            "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, fate, clause",
        ),
        other => {
            return Err(PortError::permanent(format!(
                "hash {other}: found an unknown table, expected one of {STAGING}, {QUARANTINE}, {MART}"
            )));
        }
    };
    let query = Query {
        sql: format!("SELECT {columns} FROM t ORDER BY {order}"),
        inputs: vec![("t".into(), Input::Delta(table.into()))],
    };
    let mut hash = Sha256::new();
    for batch in lakehouse.query(&query).await? {
        each_row(&batch, |row| {
            hash.update(row.as_bytes());
            hash.update(b"\n");
        })?;
    }
    Ok(hex(&hash.finalize()))
}
