//! The raw layer: a day of a source table as immutable Parquet objects under a manifest.
//!
//! Names are deterministic, a manifest makes its objects visible, and a corrected day is a new version beside the old one.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, TimeUnit};
use chrono::NaiveDate;
use futures::{StreamExt, TryStreamExt};
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, path::Path};
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    DayError, again,
    hash::{OrderFreeHash, each_row, hex},
};
use crate::{
    contract::Contract,
    ports::{Column, PortError, Ports, Result},
};

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) version: u64,
    contract: String,
    pub(super) rows: u64,
    pub(super) content_hash: String,
    pub(super) files: Vec<ManifestFile>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ManifestFile {
    path: String,
    pub(super) bytes: u64,
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
pub(super) struct RawDay {
    pub(super) manifest: Manifest,
}

impl RawDay {
    pub(super) fn paths(&self) -> Vec<String> {
        self.manifest.files.iter().map(|f| f.path.clone()).collect()
    }
}

/// Extracts a day into the raw layer. The volume is judged by the source's own count, before anything is written.
pub(super) async fn extract(ports: &Ports, contract: &Contract, fecha: NaiveDate) -> Result<RawDay, DayError> {
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
