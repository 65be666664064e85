//! A folder of Parquet files as a source: `<table>.parquet`.
//!
//! A file declares its types, so a column is known before a row is read. A day is found by the statistics of the row groups
//! and read in batches, a few of which are in memory at a time. What this leaves out: files in several parts, and days that
//! are folders.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::{
    array::{Array, AsArray, BooleanArray, Date32Array, RecordBatch, Scalar},
    compute::{cast, kernels::cmp::eq},
    datatypes::{DataType, Date32Type, Schema},
    error::ArrowError,
};
use async_trait::async_trait;
use chrono::{NaiveDate, TimeDelta};
use futures::StreamExt;
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{
        ArrowPredicateFn, ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder, RowFilter,
        statistics::StatisticsConverter,
    },
};
use simulacro_core::{
    batch::arrow_schema,
    contract::PhysicalType,
    ports::{Column, PartitionRead, PortError, Result, TableSource},
};
use tokio::sync::mpsc;

/// Rows of a batch.
const BATCH_ROWS: usize = 65_536;
/// Batches that wait for a reader.
const QUEUED_BATCHES: usize = 2;
/// The column of the day.
const FECHA: &str = "fecha";

/// The source.
#[derive(Debug)]
pub struct ParquetSource {
    folder: PathBuf,
    files: BTreeMap<String, PathBuf>,
}

/// A file as it was when it was opened: one that is replaced meanwhile is not seen.
struct Opened {
    what: String,
    file: File,
    metadata: ArrowReaderMetadata,
}

fn days_since_1970(day: NaiveDate) -> i32 {
    (day - NaiveDate::default()).num_days() as i32
}

impl Opened {
    fn open(path: &Path, what: String) -> Result<Self> {
        let file = File::open(path).map_err(|e| PortError::permanent(what.clone()).because(e))?;
        let metadata = ArrowReaderMetadata::load(&file, ArrowReaderOptions::default())
            .map_err(|e| PortError::permanent(what.clone()).because(e))?;
        Ok(Self { what, file, metadata })
    }

    fn damaged(&self) -> impl Fn(parquet::errors::ParquetError) -> PortError + '_ {
        |e| PortError::permanent(self.what.clone()).because(e)
    }

    fn schema(&self) -> &Schema {
        self.metadata.schema()
    }

    fn builder(&self) -> Result<ParquetRecordBatchReaderBuilder<File>> {
        let file = self.file.try_clone().map_err(|e| PortError::retryable(self.what.clone()).because(e))?;
        Ok(ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone()).with_batch_size(BATCH_ROWS))
    }

    fn mask(&self, places: impl IntoIterator<Item = usize>) -> ProjectionMask {
        ProjectionMask::roots(self.metadata.metadata().file_metadata().schema_descr(), places)
    }

    /// Place of the column of days.
    fn fecha(&self) -> Result<usize> {
        let found = match self.schema().column_with_name(FECHA) {
            Some((at, field)) if field.data_type() == &DataType::Date32 => return Ok(at),
            Some((_, field)) => format!("of type {}", field.data_type()),
            None => "none".into(),
        };
        Err(PortError::permanent(format!("{}: found column {FECHA} {found}, expected one of type date", self.what)).code("42703"))
    }

    /// The row groups that may have rows of the day.
    fn groups(&self, day: NaiveDate) -> Result<Vec<usize>> {
        let metadata = self.metadata.metadata();
        let converter = StatisticsConverter::try_new(FECHA, self.schema(), metadata.file_metadata().schema_descr())
            .map_err(self.damaged())?;
        let (mins, maxes) = (
            converter.row_group_mins(metadata.row_groups()).map_err(self.damaged())?,
            converter.row_group_maxes(metadata.row_groups()).map_err(self.damaged())?,
        );
        let (mins, maxes) = (mins.as_primitive::<Date32Type>(), maxes.as_primitive::<Date32Type>());
        let day = days_since_1970(day);
        // Without statistics, all may.
        let may = |at: &usize| (mins.is_null(*at) || mins.value(*at) <= day) && (maxes.is_null(*at) || day <= maxes.value(*at));
        Ok((0..metadata.num_row_groups()).filter(may).collect())
    }

    /// Reads the day column of some row groups.
    fn each_day(&self, groups: Vec<usize>, mut see: impl FnMut(&Date32Array)) -> Result<()> {
        let builder = self.builder()?.with_projection(self.mask([self.fecha()?])).with_row_groups(groups);
        for batch in builder.build().map_err(self.damaged())? {
            let batch = batch.map_err(|e: ArrowError| PortError::permanent(self.what.clone()).because(e))?;
            see(batch.column(0).as_primitive::<Date32Type>());
        }
        Ok(())
    }

    /// The rows, of one day or all, as the asked columns.
    fn read(self, day: Option<NaiveDate>, columns: &[Column]) -> Result<(u64, Batches)> {
        let schema = arrow_schema(columns)?;
        let mut places = Vec::new();
        for (column, field) in columns.iter().zip(schema.fields()) {
            let Some((at, found)) = self.schema().column_with_name(&column.name) else {
                return Err(PortError::permanent(format!("{}: column {} is missing", self.what, column.name)).code("42703"));
            };
            if PhysicalType::of(found.data_type()) != PhysicalType::of(field.data_type()) {
                let Column { name, physical_type } = column;
                let found = named(found.data_type());
                return Err(PortError::permanent(format!(
                    "{}: column {name} has type {found}, expected {physical_type}",
                    self.what
                )));
            }
            places.push(at);
        }
        let mut builder = self.builder()?.with_projection(self.mask(places.iter().copied()));
        let rows = match day {
            None => u64::try_from(self.metadata.metadata().file_metadata().num_rows()).unwrap_or_default(),
            Some(day) => {
                let (groups, wanted) = (self.groups(day)?, days_since_1970(day));
                let mut rows = 0;
                self.each_day(groups.clone(), |days| rows += days.iter().filter(|d| *d == Some(wanted)).count() as u64)?;
                let is_wanted = move |batch: RecordBatch| -> Result<BooleanArray, ArrowError> {
                    eq(batch.column(0), &Scalar::new(Date32Array::from(vec![wanted])))
                };
                let filter = ArrowPredicateFn::new(self.mask([self.fecha()?]), is_wanted);
                builder = builder.with_row_groups(groups).with_row_filter(RowFilter::new(vec![Box::new(filter)]));
                rows
            }
        };
        let inner = builder.build().map_err(self.damaged())?;
        let what = self.what;
        let batches = inner.map(move |batch| {
            let failed = |e: ArrowError| PortError::permanent(what.clone()).because(e);
            let batch = batch.map_err(failed)?;
            let mut arrays = Vec::new();
            for field in schema.fields() {
                let at = batch.schema_ref().index_of(field.name()).map_err(failed)?;
                arrays.push(cast(batch.column(at), field.data_type()).map_err(failed)?);
            }
            RecordBatch::try_new(schema.clone(), arrays).map_err(failed)
        });
        Ok((rows, Box::new(batches)))
    }
}

type Batches = Box<dyn Iterator<Item = Result<RecordBatch>> + Send>;

/// The contract's word for a type, or Arrow's where contracts have none.
fn named(data_type: &DataType) -> String {
    PhysicalType::of(data_type).map_or_else(|| data_type.to_string(), |t| t.to_string())
}

impl ParquetSource {
    /// Looks which tables the folder has; reads none of them yet.
    ///
    /// # Errors
    /// `Permanent` when the folder cannot be listed.
    pub fn open(folder: &Path) -> Result<Self> {
        let unreadable = |e: std::io::Error| PortError::permanent(format!("read folder {}", folder.display())).because(e);
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_some_and(|e| e == "parquet")
                && let Some(name) = path.file_stem().and_then(|s| s.to_str())
            {
                files.insert(name.to_owned(), path);
            }
        }
        Ok(Self { folder: folder.to_owned(), files })
    }

    /// The tables that have a file.
    pub fn tables(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Calls `act` with the opened file, on a thread where reading may block.
    async fn with<T: Send + 'static>(&self, table: &str, act: impl FnOnce(Opened) -> Result<T> + Send + 'static) -> Result<T> {
        let path = self.files.get(table).cloned().ok_or_else(|| {
            let place = self.folder.display();
            PortError::permanent(format!("read {place}: found no {table}.parquet in the folder, expected one")).code("42P01")
        })?;
        let what = format!("read {}", path.display());
        let lost = what.clone();
        let done = tokio::task::spawn_blocking(move || act(Opened::open(&path, what)?));
        done.await.map_err(|e| PortError::retryable(lost).because(e))?
    }

    async fn rows(&self, table: &str, day: Option<NaiveDate>, columns: &[Column]) -> Result<PartitionRead> {
        let columns = columns.to_vec();
        let (expected_rows, read) = self.with(table, move |file| file.read(day, &columns)).await?;
        let (to, from) = mpsc::channel(QUEUED_BATCHES);
        tokio::task::spawn_blocking(move || {
            for batch in read {
                // A reader that is gone wants no more.
                let is_last = batch.is_err();
                if to.blocking_send(batch).is_err() || is_last {
                    break;
                }
            }
        });
        let batches = futures::stream::unfold(from, |mut from| async move { from.recv().await.map(|batch| (batch, from)) });
        Ok(PartitionRead { expected_rows, batches: batches.boxed() })
    }

    /// The days of a table, in order.
    ///
    /// # Errors
    /// `Permanent` when there is no such table, or its file is damaged or has no days.
    pub async fn days(&self, table: &str) -> Result<Vec<NaiveDate>> {
        self.with(table, |file| {
            let mut found = BTreeSet::new();
            let all = (0..file.metadata.metadata().num_row_groups()).collect();
            file.each_day(all, |days| found.extend(days.iter().flatten()))?;
            Ok(found.into_iter().map(|days| NaiveDate::default() + TimeDelta::days(i64::from(days))).collect())
        })
        .await
    }
}

#[async_trait]
impl TableSource for ParquetSource {
    async fn ping(&self) -> Result<()> {
        let what = || format!("read folder {}", self.folder.display());
        std::fs::metadata(&self.folder).map(|_| ()).map_err(|e| PortError::permanent(what()).because(e))
    }

    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        self.with(table, |file| {
            let column = |field: &Arc<arrow::datatypes::Field>| Column {
                name: field.name().clone(),
                physical_type: named(field.data_type()),
            };
            Ok(file.schema().fields().iter().map(column).collect())
        })
        .await
    }

    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        // Most writers mark every column as one that may be null, whatever is in it.
        self.with(table, |_| Ok(None)).await
    }

    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        self.rows(table, Some(fecha), columns).await
    }

    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        self.rows(table, None, columns).await
    }
}
