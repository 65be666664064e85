//! The raw layer: a day of a source table as immutable Parquet objects under a manifest.
//!
//! A day is cut into parts by its rows, so that no more than two of them are in memory, however large the day: one that is
//! being encoded and one that is being written. Names are deterministic, a part is created and never replaced, a
//! manifest makes its parts visible, and a corrected day is a new version beside the old one. A version names parts of
//! the one before where their bytes are equal; so a day that has not changed writes nothing.
//!
//! What this leaves out: removing old versions, and a lock. That only one run works on a day is the ledger's business; a
//! run that has lost it unawares can neither replace a part nor publish over another's version.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use arrow::{
    array::{Array, ArrayRef, AsArray, RecordBatch},
    datatypes::{DataType, Date32Type, Decimal128Type, Field, Schema, SchemaRef, TimeUnit, TimestampMicrosecondType},
};
use bytes::Bytes;
use chrono::NaiveDate;
use futures::{StreamExt, TryStreamExt, future::BoxFuture, stream::BoxStream};
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, path::Path};
use parquet::{
    arrow::ArrowWriter,
    basic::{Compression, Encoding},
    errors::ParquetError,
    file::properties::{EnabledStatistics, WriterProperties},
    schema::types::ColumnPath,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::select;

use super::{
    DayError, again,
    hash::{ContentHash, OrderFreeHash, each_row, hex},
};
use crate::{
    contract::Contract,
    ports::{Column, Disposition, PortError, Ports, Result, TableSource},
};

/// How a day is cut into objects. The same rows in the same order give the same objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawLayout {
    /// Rows of a part, at least 1; the last one has what is left.
    pub part_rows: usize,
    /// A part ends early after the batch that brings it to this many encoded bytes. It bounds the memory that long texts
    /// take.
    pub part_bytes: usize,
}

impl RawLayout {
    /// 524,288 rows or 64 MiB: about 20 MiB for a part of the reference day, which has ten of them.
    pub const STANDARD: Self = Self { part_rows: 1 << 19, part_bytes: 64 << 20 };
}

/// The definition of a content hash that a manifest without the field has.
fn first_definition() -> u32 {
    1
}

/// The definition of the content hashes that are written now.
const CONTENT_HASH_VERSION: u32 = 2;

/// What makes a version of a day visible. It is written once and never changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// 1 for the first version of a day, then rising by one.
    pub version: u64,
    /// Id of the contract that the day was read by.
    pub contract: String,
    /// Rows of all files.
    pub rows: u64,
    /// Order-free hash of the rows: 64 hexadecimal digits. Comparable where `content_hash_version` is equal.
    pub content_hash: String,
    /// How `content_hash` is defined: 1 is the sum of the sha256 of each row's text, 2 that of each row's bytes and of the
    /// schema. A manifest without this field has 1.
    #[serde(default = "first_definition")]
    pub content_hash_version: u32,
    /// The objects, in the order of the rows. Some may be those of an earlier version.
    pub files: Vec<ManifestFile>,
}

/// An object of a day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Its path in the store.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// The sha256 of its bytes: 64 hexadecimal digits.
    pub sha256: String,
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

/// A day of the raw layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawDay {
    /// What its manifest says.
    pub manifest: Manifest,
}

impl RawDay {
    /// The paths of its objects, in the order of the rows.
    pub fn paths(&self) -> Vec<String> {
        self.manifest.files.iter().map(|f| f.path.clone()).collect()
    }
}

/// The newest version of a raw day; `Ok(Err(..))` says why there is none that could be read.
///
/// # Errors
/// When the store fails.
pub(crate) async fn newest_raw(objects: &dyn ObjectStore, table: &str, fecha: NaiveDate) -> Result<Result<RawDay, String>> {
    let found = Partition::list(objects, &format!("raw/{table}/fecha={fecha}")).await?;
    let manifest = match found.newest_manifest(objects).await {
        Ok(Some(manifest)) => manifest,
        Ok(None) => return Ok(Err(format!("raw/{table} has no such day"))),
        Err(e) if e.disposition == Disposition::Permanent => return Ok(Err(e.chain())),
        Err(e) => return Err(e),
    };
    match manifest.files.iter().find(|file| !found.has(file)) {
        None => Ok(Ok(RawDay { manifest })),
        Some(file) => Ok(Err(format!("{} is gone, or not of {} bytes", file.path, file.bytes))),
    }
}

/// The bytes of a part, which are those that its manifest tells of.
///
/// # Errors
/// `Permanent` when they are others; otherwise when the store fails.
pub(crate) async fn read_part(objects: &dyn ObjectStore, file: &ManifestFile) -> Result<Bytes> {
    let bytes = read_all(objects, &Path::from(file.path.as_str())).await?;
    let found = hex(&Sha256::digest(&bytes));
    if found == file.sha256 {
        return Ok(bytes);
    }
    Err(PortError::permanent(format!("read {}: found sha256 {found}, expected {}", file.path, file.sha256)))
}

/// Extracts a day into the raw layer.
pub(super) async fn extract(ports: &Ports, contract: &Contract, fecha: NaiveDate) -> Result<RawDay, DayError> {
    extract_raw(ports.tables.as_ref(), ports.objects.as_ref(), contract, fecha, RawLayout::STANDARD).await
}

/// Extracts a day of a source into the raw layer of a store.
///
/// The volume is judged by the source's own count, before anything is written. When it is called again after any error or
/// crash it gives the same day, and removes what the failed attempt has left behind. A call that is dropped leaves at
/// most parts that no manifest names.
///
/// # Errors
/// [`DayError::Held`] when the count breaks the contract's volume; [`DayError::Port`] when source or store fail, or the source
/// gave other rows than it had counted (`Retryable`). The version that was published before stays what it was.
pub async fn extract_raw(
    tables: &dyn TableSource,
    objects: &dyn ObjectStore,
    contract: &Contract,
    fecha: NaiveDate,
    layout: RawLayout,
) -> Result<RawDay, DayError> {
    let at = |source| DayError::Port { fecha, source };
    let read = tables.read_day(&contract.table, fecha, &contract.columns).await.map_err(at)?;
    if !(contract.rows_min..=contract.rows_max).contains(&read.expected_rows) {
        return Err(DayError::Held {
            fecha,
            gate: "quality_gate_raw",
            found: format!("{} rows", read.expected_rows),
            expected: format!("{} to {} rows", contract.rows_min, contract.rows_max),
        });
    }
    let schema = arrow_schema(&contract.columns).map_err(at)?;
    let prefix = format!("raw/{}/fecha={fecha}", contract.table);
    let found = Partition::list(objects, &prefix).await.map_err(at)?;
    let latest = found.newest_whole(objects).await.map_err(at)?;
    found.sweep(objects, latest.as_ref()).await.map_err(at)?;

    let mut parts = Parts::new(objects, &prefix, schema, layout, &found, latest.as_ref());
    let written = async {
        let rows = parts.write(read.batches).await?;
        if rows == read.expected_rows {
            return Ok(rows);
        }
        Err(PortError::retryable(format!(
            "read {} of {fecha}: found {rows} rows, expected {} as counted in the same snapshot",
            contract.table, read.expected_rows
        )))
    };
    let rows = match written.await {
        Ok(rows) => rows,
        Err(error) => {
            // No manifest names them yet. Should this fail too, the next attempt sweeps.
            parts.discard().await;
            return Err(at(error));
        }
    };
    let content_hash = parts.hash.finish();
    let same_rows = latest.as_ref().is_some_and(|latest| match &parts.text_hash {
        Some(text_hash) => latest.content_hash == text_hash.finish(),
        None => latest.content_hash == content_hash,
    });
    let manifest = match &latest {
        // Rows that lie in another order are the same day.
        Some(latest) if same_rows && found.has_all(latest) => latest.clone(),
        _ => {
            let manifest = Manifest {
                version: parts.version,
                contract: contract.id.clone(),
                rows,
                content_hash,
                content_hash_version: CONTENT_HASH_VERSION,
                files: std::mem::take(&mut parts.files),
            };
            publish(objects, &prefix, &manifest).await.map_err(at)?;
            manifest
        }
    };
    let left = Partition::list(objects, &prefix).await.map_err(at)?;
    // A newer version than ours is somebody else's, and so is what belongs to it.
    if left.newest == Some(manifest.version) {
        left.sweep(objects, Some(&manifest)).await.map_err(at)?;
    }
    Ok(RawDay { manifest })
}

/// Code of a manifest that cannot be read.
const DAMAGED: &str = "MANIFEST_DAMAGED";

/// What lies in a day's folder.
struct Partition {
    prefix: String,
    /// Version of the newest manifest.
    newest: Option<u64>,
    /// Path and size of the parts.
    parts: BTreeMap<String, u64>,
}

/// The version in the name of a part.
fn part_version(path: &str) -> Option<u64> {
    path.rsplit('/').next()?.strip_prefix("part-v")?.split('-').next()?.parse().ok()
}

impl Partition {
    async fn list(objects: &dyn ObjectStore, prefix: &str) -> Result<Self> {
        let folder = Path::from(prefix);
        let mut listing = objects.list(Some(&folder));
        let mut found = Self { prefix: prefix.to_owned(), newest: None, parts: BTreeMap::new() };
        while let Some(object) = listing.try_next().await.map_err(|e| store_error(format!("list {folder}"), e))? {
            let path = object.location.to_string();
            let name = path.rsplit('/').next().unwrap_or_default();
            let manifest = name.strip_prefix('v').and_then(|n| n.strip_suffix(".json")).and_then(|n| n.parse::<u64>().ok());
            if let (Some(version), true) = (manifest, path.contains("/_manifest/")) {
                found.newest = found.newest.max(Some(version));
            } else if part_version(&path).is_some() {
                found.parts.insert(path, object.size);
            }
        }
        Ok(found)
    }

    async fn newest_manifest(&self, objects: &dyn ObjectStore) -> Result<Option<Manifest>> {
        let Some(version) = self.newest else { return Ok(None) };
        let path = manifest_path(&self.prefix, version);
        let bytes = read_all(objects, &path).await?;
        let damaged = |e| PortError::permanent(format!("read manifest {path}: found a damaged file")).code(DAMAGED).because(e);
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(damaged)?;
        if !(1..=CONTENT_HASH_VERSION).contains(&manifest.content_hash_version) {
            return Err(PortError::permanent(format!(
                "read manifest {path}: found content hash version {}, expected 1 to {CONTENT_HASH_VERSION}",
                manifest.content_hash_version
            )));
        }
        Ok(Some(manifest))
    }

    /// The newest manifest for whoever extracts the day: a damaged one names nothing that could be kept, and the next version
    /// goes above it. One of a newer program stays an error.
    async fn newest_whole(&self, objects: &dyn ObjectStore) -> Result<Option<Manifest>> {
        match self.newest_manifest(objects).await {
            Err(e) if e.code.as_deref() == Some(DAMAGED) => {
                tracing::warn!(error = %e.chain(), "the next version goes above a manifest that cannot be read");
                Ok(None)
            }
            found => found,
        }
    }

    fn has(&self, file: &ManifestFile) -> bool {
        self.parts.get(&file.path) == Some(&file.bytes)
    }

    fn has_all(&self, manifest: &Manifest) -> bool {
        manifest.files.iter().all(|file| self.has(file))
    }

    /// Removes the parts that the newest version does not name and no older one can: what dead attempts left behind.
    async fn sweep(&self, objects: &dyn ObjectStore, newest: Option<&Manifest>) -> Result<()> {
        // Those of a manifest that nobody can read stay: they are of the day, and evidence.
        let version = newest.map_or(self.newest.map_or(0, |damaged| damaged + 1), |m| m.version);
        let named: BTreeSet<&str> = newest.into_iter().flat_map(|m| &m.files).map(|f| f.path.as_str()).collect();
        let left = |path: &&String| part_version(path).is_some_and(|v| v >= version) && !named.contains(path.as_str());
        for path in self.parts.keys().filter(left) {
            remove(objects, path).await?;
        }
        Ok(())
    }
}

async fn remove(objects: &dyn ObjectStore, path: &str) -> Result<()> {
    match objects.delete(&Path::from(path)).await {
        // A try whose answer was lost has removed it.
        Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
        Err(e) => Err(store_error(format!("delete {path}"), e)),
    }
}

fn manifest_path(prefix: &str, version: u64) -> Path {
    Path::from(format!("{prefix}/_manifest/v{version:06}.json"))
}

/// Columns of which a dictionary is worth its price: those whose values repeat at least eight times in `batch`.
///
/// The encoder would find it out by itself, but only after it has built a dictionary of a megabyte.
fn repeating(batch: &RecordBatch) -> Vec<String> {
    fn distinct<T: Ord>(values: impl Iterator<Item = T>) -> usize {
        values.collect::<BTreeSet<_>>().len()
    }
    let count = |array: &ArrayRef| match array.data_type() {
        DataType::Utf8 => Some(distinct(array.as_string::<i32>().iter())),
        DataType::Decimal128(_, _) => Some(distinct(array.as_primitive::<Decimal128Type>().iter())),
        DataType::Date32 => Some(distinct(array.as_primitive::<Date32Type>().iter())),
        DataType::Timestamp(TimeUnit::Microsecond, _) => Some(distinct(array.as_primitive::<TimestampMicrosecondType>().iter())),
        // `arrow_schema` makes no others.
        _ => None,
    };
    let worth = |array: &ArrayRef| count(array).is_some_and(|distinct| distinct * 8 <= array.len());
    let columns = batch.schema_ref().fields().iter().zip(batch.columns());
    columns.filter(|(_, array)| worth(array)).map(|(field, _)| field.name().clone()).collect()
}

/// A part that is being encoded.
struct Encoder {
    writer: ArrowWriter<Vec<u8>>,
    rows: usize,
}

impl Encoder {
    /// An encoder of a part that begins with the rows of `first`, which say how it is best encoded.
    fn new(schema: SchemaRef, first: &RecordBatch) -> Result<Self, ParquetError> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_created_by("simulacro".to_owned())
            // The part is the unit that is written, read and bounded: it needs no groups of its own.
            .set_max_row_group_row_count(None)
            .set_dictionary_enabled(false);
        let repeating = repeating(first);
        let properties = schema.fields().iter().fold(properties, |properties, field| {
            let column = ColumnPath::new(vec![field.name().clone()]);
            match field.data_type() {
                _ if repeating.contains(field.name()) => properties.set_column_dictionary_enabled(column, true),
                // The least and the greatest of texts that are all different exclude no part from being read.
                DataType::Utf8 => properties.set_column_statistics_enabled(column, EnabledStatistics::None),
                // Whole numbers: differences are shorter than values, also where they are not sorted.
                DataType::Date32 | DataType::Timestamp(_, _) | DataType::Decimal128(..=18, _) => {
                    properties.set_column_encoding(column, Encoding::DELTA_BINARY_PACKED)
                }
                _ => properties,
            }
        });
        let writer = ArrowWriter::try_new(Vec::new(), schema, Some(properties.build()))?;
        Ok(Self { writer, rows: 0 })
    }

    fn write(&mut self, batch: &RecordBatch) -> Result<(), ParquetError> {
        self.rows += batch.num_rows();
        self.writer.write(batch)
    }

    fn is_full(&self, layout: RawLayout) -> bool {
        self.rows >= layout.part_rows || self.writer.in_progress_size() >= layout.part_bytes
    }
}

/// The parts of a version that is being written.
struct Parts<'a> {
    objects: &'a dyn ObjectStore,
    prefix: &'a str,
    schema: SchemaRef,
    layout: RawLayout,
    version: u64,
    /// The files of the newest version, those that are there with their size.
    published: Vec<Option<&'a ManifestFile>>,
    hash: ContentHash,
    /// Of the rows, where the newest version has a hash of the first definition.
    text_hash: Option<OrderFreeHash>,
    files: Vec<ManifestFile>,
    /// The one part that is on its way to the store, and its path.
    put: Option<(String, BoxFuture<'a, Result<()>>)>,
    /// Paths of the parts that this attempt has created.
    created: Vec<String>,
}

impl<'a> Parts<'a> {
    fn new(
        objects: &'a dyn ObjectStore,
        prefix: &'a str,
        schema: SchemaRef,
        layout: RawLayout,
        found: &Partition,
        latest: Option<&'a Manifest>,
    ) -> Self {
        let files = latest.into_iter().flat_map(|m| &m.files);
        Self {
            objects,
            prefix,
            layout,
            version: found.newest.unwrap_or(0) + 1,
            published: files.map(|file| found.has(file).then_some(file)).collect(),
            hash: ContentHash::new(&schema),
            text_hash: latest.is_some_and(|m| m.content_hash_version == 1).then(OrderFreeHash::default),
            schema,
            files: Vec::new(),
            put: None,
            created: Vec::new(),
        }
    }

    fn encode_error(&self, error: ParquetError) -> PortError {
        PortError::permanent(format!("encode {}", self.prefix)).because(error)
    }

    /// Writes all rows and gives their number. When it returns all parts are in the store.
    async fn write(&mut self, mut batches: BoxStream<'static, Result<RecordBatch>>) -> Result<u64> {
        let (mut encoder, mut rows) = (None, 0);
        loop {
            let next = match &mut self.put {
                Some((path, put)) => select! {
                    biased;
                    done = put => {
                        done?;
                        self.created.push(std::mem::take(path));
                        self.put = None;
                        continue;
                    }
                    next = batches.next() => next,
                },
                None => batches.next().await,
            };
            let Some(batch) = next else { break };
            let batch = batch?;
            rows += batch.num_rows() as u64;
            self.hash.add(&batch)?;
            if let Some(text_hash) = &mut self.text_hash {
                each_row(&batch, |row| text_hash.add(row))?;
            }
            self.encode(&mut encoder, batch).await?;
        }
        // A day without rows has a part too, so that it has a schema.
        if encoder.is_none() && self.files.is_empty() {
            let none = RecordBatch::new_empty(self.schema.clone());
            encoder = Some(Encoder::new(self.schema.clone(), &none).map_err(|e| self.encode_error(e))?);
        }
        if let Some(encoder) = encoder {
            self.finish(encoder).await?;
        }
        self.settle().await?;
        Ok(rows)
    }

    /// Encodes rows into the present part, and into new ones where it is full.
    async fn encode(&mut self, encoder: &mut Option<Encoder>, mut batch: RecordBatch) -> Result<()> {
        while batch.num_rows() > 0 {
            let mut present = match encoder.take() {
                Some(present) => present,
                None => Encoder::new(self.schema.clone(), &batch).map_err(|e| self.encode_error(e))?,
            };
            let taken = batch.num_rows().min(self.layout.part_rows.saturating_sub(present.rows).max(1));
            present.write(&batch.slice(0, taken)).map_err(|e| self.encode_error(e))?;
            batch = batch.slice(taken, batch.num_rows() - taken);
            if present.is_full(self.layout) {
                self.finish(present).await?;
            } else {
                *encoder = Some(present);
            }
        }
        Ok(())
    }

    /// Ends a part and begins to write it, unless the newest version has the same bytes in its place.
    async fn finish(&mut self, encoder: Encoder) -> Result<()> {
        let bytes = Bytes::from(encoder.writer.into_inner().map_err(|e| self.encode_error(e))?);
        let sha256 = hex(&Sha256::digest(&bytes));
        let number = self.files.len();
        if let Some(Some(published)) = self.published.get(number)
            && published.sha256 == sha256
        {
            self.files.push((*published).clone());
            return Ok(());
        }
        let path = format!("{}/part-v{:06}-{number:04}.parquet", self.prefix, self.version);
        self.files.push(ManifestFile { path: path.clone(), bytes: bytes.len() as u64, sha256 });
        self.settle().await?;
        let (objects, to) = (self.objects, Path::from(path.as_str()));
        self.put = Some((path, Box::pin(async move { again(|| create(objects, &to, &bytes)).await })));
        Ok(())
    }

    /// Waits for the part that is on its way.
    async fn settle(&mut self) -> Result<()> {
        if let Some((path, put)) = self.put.take() {
            put.await?;
            self.created.push(path);
        }
        Ok(())
    }

    /// Removes the parts that were created, as well as it can. One whose fate is unknown is left: it may be a rival's.
    async fn discard(&mut self) {
        let _ = self.settle().await;
        for path in &self.created {
            let _ = remove(self.objects, path).await;
        }
    }
}

/// Creates an object. One of the same bytes is our own, from a try whose answer was lost.
async fn create(objects: &dyn ObjectStore, path: &Path, bytes: &Bytes) -> Result<()> {
    match objects.put_opts(path, bytes.clone().into(), PutMode::Create.into()).await {
        Ok(_) => Ok(()),
        Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {
            if read_all(objects, path).await? == *bytes {
                return Ok(());
            }
            // It was swept before we began. A dead attempt's last request may have come late: the next attempt sweeps it.
            Err(PortError::retryable(format!("put {path}: found another object of this name, expected none")))
        }
        Err(e) => Err(store_error(format!("put {path}"), e)),
    }
}

/// Writes the manifest, which makes its version visible.
async fn publish(objects: &dyn ObjectStore, prefix: &str, manifest: &Manifest) -> Result<()> {
    let name = manifest_path(prefix, manifest.version);
    let body = serde_json::to_vec_pretty(manifest).map_err(|e| PortError::permanent(format!("encode {name}")).because(e))?;
    let body = Bytes::from(body);
    again(|| async {
        match objects.put_opts(&name, body.clone().into(), PutMode::Create.into()).await {
            Ok(_) => Ok(()),
            // Either our own first try, whose answer was lost, or a rival: the content tells.
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {
                if read_all(objects, &name).await? == body {
                    return Ok(());
                }
                Err(PortError::permanent(format!("put {name}: another run has published this version")))
            }
            Err(e) => Err(store_error(format!("put {name}"), e)),
        }
    })
    .await
}

async fn read_all(objects: &dyn ObjectStore, path: &Path) -> Result<Bytes> {
    let got = objects.get(path).await.map_err(|e| store_error(format!("get {path}"), e))?;
    got.bytes().await.map_err(|e| store_error(format!("get {path}"), e))
}

#[cfg(test)]
mod tests;
