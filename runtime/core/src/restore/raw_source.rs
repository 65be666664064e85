//! The raw layer as a source: a day as it was once extracted, for making again what was made of it.
//!
//! Only the days of one table are read from it; whole tables, such as dimensions, are still the source's. What this leaves
//! out: versions of a day before the newest.

use std::{collections::BTreeSet, fmt, sync::Arc};

use arrow::{array::RecordBatch, compute::cast};
use async_trait::async_trait;
use bytes::Bytes;
use chrono::NaiveDate;
use futures::{StreamExt, TryStreamExt};
use object_store::ObjectStore;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::{
    batch::{ManifestFile, arrow_schema, newest_raw, read_part},
    ports::{Column, PartitionRead, PortError, Result, TableSource},
};

/// Rows of a batch, at most.
const BATCH_ROWS: usize = 8_192;

/// A table whose days come from the raw layer.
pub(super) struct RawSource {
    pub(super) objects: Arc<dyn ObjectStore>,
    /// The table.
    pub(super) table: String,
    /// Its columns, as the contract has them: what was extracted under it has no others.
    pub(super) columns: Vec<Column>,
    /// The source of the other tables.
    pub(super) rest: Arc<dyn TableSource>,
}

impl fmt::Debug for RawSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the raw layer of {}", self.table)
    }
}

/// The rows of a part, with these columns in this order.
fn rows(file: &ManifestFile, bytes: Bytes, columns: &[Column]) -> Result<Vec<Result<RecordBatch>>> {
    let damaged = |e: Box<dyn std::error::Error + Send + Sync>| {
        PortError::permanent(format!("read {}: found no rows that can be decoded", file.path)).because(e)
    };
    let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|e| damaged(e.into()))?;
    let reader = reader.with_batch_size(BATCH_ROWS).build().map_err(|e| damaged(e.into()))?;
    let schema = arrow_schema(columns)?;
    let project = |batch: RecordBatch| {
        let arrays = schema.fields().iter().map(|field| {
            let missing = || PortError::permanent(format!("read {}: found no column {}, expected one", file.path, field.name()));
            let array = batch.column_by_name(field.name()).ok_or_else(missing)?;
            cast(array, field.data_type()).map_err(|e| damaged(e.into()))
        });
        RecordBatch::try_new(schema.clone(), arrays.collect::<Result<_>>()?).map_err(|e| damaged(e.into()))
    };
    Ok(reader.map(|batch| batch.map_err(|e| damaged(e.into())).and_then(project)).collect())
}

#[async_trait]
impl TableSource for RawSource {
    async fn ping(&self) -> Result<()> {
        Ok(())
    }
    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        if table == self.table { Ok(self.columns.clone()) } else { self.rest.columns(table).await }
    }
    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        // Files keep nothing from being null; the clauses of the contract judge each row.
        if table == self.table { Ok(None) } else { self.rest.not_null(table).await }
    }
    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        if table != self.table {
            return self.rest.read_day(table, fecha, columns).await;
        }
        let day = newest_raw(self.objects.as_ref(), table, fecha).await?;
        let day = day.map_err(|why| PortError::permanent(format!("read the raw day {fecha}: {why}")))?;
        let (objects, columns) = (self.objects.clone(), columns.to_vec());
        // One part after the other, so that one is in memory at a time.
        let batches = futures::stream::iter(day.manifest.files).then(move |file| {
            let (objects, columns) = (objects.clone(), columns.clone());
            async move { Ok(futures::stream::iter(rows(&file, read_part(objects.as_ref(), &file).await?, &columns)?)) }
        });
        Ok(PartitionRead { expected_rows: day.manifest.rows, batches: batches.try_flatten().boxed() })
    }
    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        self.rest.read_table(table, columns).await
    }
}
