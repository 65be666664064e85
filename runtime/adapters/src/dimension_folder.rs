//! A folder as a service of dimensions: `productos.csv` or `productos.parquet`, and the same for the others.
//!
//! The version of a file is the hash of its bytes. A file that is not there when the folder is opened is a dimension that
//! is absent by choice; one that goes away later does not come. A file is read whole, up to a limit; what this leaves out is
//! everything larger.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use arrow::{array::RecordBatch, compute::cast};
use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use sha2::{Digest, Sha256};
use simulacro_core::{
    contract::PhysicalType,
    dimensions::{
        Dimension,
        decode::{Cell, Rows, name_differences, schema},
    },
    ports::{Column, DimensionApi, Fetched, PortError, Result, Snapshot, not_offered},
};

/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 30;
/// Rows of a batch.
const BATCH_ROWS: usize = 65_536;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Csv,
    Parquet,
}

/// The service.
#[derive(Debug)]
pub struct FolderDimensions {
    files: BTreeMap<String, (PathBuf, Format)>,
}

fn permanent(what: String) -> PortError {
    PortError::permanent(what).code("MALFORMED")
}

impl FolderDimensions {
    /// Looks which dimensions the folder has; reads none of them yet.
    ///
    /// # Errors
    /// `Permanent` when a dimension is there twice, as CSV and as Parquet.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for dimension in Dimension::ALL {
            let at = |ending: &str| folder.join(format!("{dimension}.{ending}"));
            let (csv, parquet) = (at("csv"), at("parquet"));
            let found = match (csv.exists(), parquet.exists()) {
                (false, false) => continue,
                (true, false) => (csv, Format::Csv),
                (false, true) => (parquet, Format::Parquet),
                (true, true) => {
                    let (csv, parquet) = (csv.display(), parquet.display());
                    return Err(PortError::permanent(format!(
                        "read dimension {dimension}: found {csv} and {parquet}, expected one"
                    )));
                }
            };
            files.insert(dimension.name().to_owned(), found);
        }
        Ok(Self { files })
    }
}

/// The file's bytes and when it was written.
fn read(path: &Path, what: &str) -> Result<(Bytes, Option<DateTime<Utc>>)> {
    let lost = |e: std::io::Error| {
        let code = match e.kind() {
            std::io::ErrorKind::NotFound => "404",
            std::io::ErrorKind::PermissionDenied => "403",
            _ => return PortError::retryable(what).code("EIO").because(e),
        };
        PortError::permanent(what).code(code).because(e)
    };
    let metadata = std::fs::metadata(path).map_err(lost)?;
    if metadata.len() > FILE_BYTES_MAX {
        let text = format!("{what}: found {} bytes, expected at most {FILE_BYTES_MAX}", metadata.len());
        return Err(PortError::permanent(text).code("TOO_LARGE"));
    }
    let bytes = std::fs::read(path).map_err(lost)?;
    Ok((bytes.into(), metadata.modified().ok().map(DateTime::from)))
}

fn csv_batches(bytes: &[u8], columns: &[Column], what: &str) -> Result<Vec<RecordBatch>> {
    if !bytes.ends_with(b"\n") {
        return Err(permanent(format!("{what}: found no line end after the last line, expected one: the file is truncated")));
    }
    let mut reader = csv::ReaderBuilder::new().has_headers(true).flexible(false).from_reader(bytes);
    let names: Vec<String> = match reader.headers() {
        Ok(names) => names.iter().map(str::to_owned).collect(),
        Err(e) => return Err(permanent(format!("{what}, line 1")).because(e)),
    };
    if let Some(differences) = name_differences(columns, names.iter().map(String::as_str)) {
        return Err(permanent(format!("{what}, line 1: {differences}")));
    }
    let mut batches = Vec::new();
    let mut rows = Rows::new(columns)?;
    let places: Vec<Option<usize>> = names.iter().map(|n| rows.position(n)).collect();
    for record in reader.records() {
        let record = record.map_err(|e| permanent(what.to_owned()).because(e))?;
        let line = record.position().map_or(0, csv::Position::line);
        for (place, value) in places.iter().zip(&record) {
            let cell = if value.is_empty() { Cell::Null } else { Cell::Text(value) };
            if let Some(at) = place {
                rows.push(*at, cell).map_err(|e| permanent(format!("{what}, line {line}, {e}")))?;
            }
        }
        rows.end_row();
        if rows.rows() >= BATCH_ROWS as u64 {
            batches.push(std::mem::replace(&mut rows, Rows::new(columns)?).finish()?);
        }
    }
    if rows.rows() > 0 || batches.is_empty() {
        batches.push(rows.finish()?);
    }
    Ok(batches)
}

fn parquet_batches(bytes: Bytes, columns: &[Column], what: &str) -> Result<Vec<RecordBatch>> {
    let damaged = |e: parquet::errors::ParquetError| permanent(what.to_owned()).because(e);
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(damaged)?;
    let (wanted, found) = (schema(columns)?, reader.schema().clone());
    if let Some(differences) = name_differences(columns, found.fields().iter().map(|f| f.name().as_str())) {
        return Err(permanent(format!("{what}: {differences}")));
    }
    for (column, field) in columns.iter().zip(wanted.fields()) {
        let there = found.field_with_name(&column.name).map_err(|e| permanent(what.to_owned()).because(e))?;
        if PhysicalType::of(there.data_type()) != PhysicalType::of(field.data_type()) {
            let (name, expected, found) = (&column.name, &column.physical_type, there.data_type());
            return Err(permanent(format!("{what}: column {name} has type {found}, the contract expects {expected}")));
        }
    }
    let mut batches = Vec::new();
    for batch in reader.with_batch_size(BATCH_ROWS).build().map_err(damaged)? {
        let failed = |e: arrow::error::ArrowError| permanent(what.to_owned()).because(e);
        let batch = batch.map_err(failed)?;
        let mut arrays = Vec::new();
        for field in wanted.fields() {
            let at = found.index_of(field.name()).map_err(failed)?;
            arrays.push(cast(batch.column(at), field.data_type()).map_err(failed)?);
        }
        batches.push(RecordBatch::try_new(wanted.clone(), arrays).map_err(failed)?);
    }
    if batches.is_empty() {
        batches.push(RecordBatch::new_empty(wanted));
    }
    Ok(batches)
}

#[async_trait]
impl DimensionApi for FolderDimensions {
    fn offered(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    async fn fetch(&self, dimension: &str, columns: &[Column], known_etag: Option<&str>) -> Result<Fetched> {
        let (path, format) = self.files.get(dimension).ok_or_else(|| not_offered(dimension, &self.offered()))?;
        let what = format!("read {}", path.display());
        let (bytes, as_of) = read(path, &what)?;
        let etag = format!("\"{}\"", Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect::<String>());
        if known_etag == Some(etag.as_str()) {
            return Ok(Fetched::NotModified);
        }
        let batches = match format {
            Format::Csv => csv_batches(&bytes, columns, &what)?,
            Format::Parquet => parquet_batches(bytes, columns, &what)?,
        };
        Ok(Fetched::Snapshot(Snapshot { etag: Some(etag), as_of, batches }))
    }
}
