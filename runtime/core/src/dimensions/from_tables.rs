//! Dimensions that are tables of the source, such as `clientes`, beside those of an API.
//!
//! A table has no etag, so it is read whole each time; whether that brought anything new is told by its rows. What this
//! leaves out: changes since the last read, which would need the source's log.

use std::sync::Arc;

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use futures::StreamExt;

use super::decode::schema;
use crate::ports::{Column, DimensionApi, Fetched, PortError, Result, Snapshot, TableSource};

/// Dimensions from tables, and from an API for the rest.
#[derive(Debug)]
pub struct FromTables {
    /// The source.
    pub tables: Arc<dyn TableSource>,
    /// Names of the tables that are dimensions.
    pub names: Vec<String>,
    /// Where the other dimensions come from.
    pub rest: Arc<dyn DimensionApi>,
    /// Most rows that are held in memory for one table; a larger one is refused with `TOO_LARGE`.
    pub rows_max: u64,
}

#[async_trait]
impl DimensionApi for FromTables {
    fn offered(&self) -> Vec<String> {
        let mut offered = self.rest.offered();
        offered.extend(self.names.iter().cloned());
        offered.sort();
        offered.dedup();
        offered
    }

    async fn fetch(&self, dimension: &str, columns: &[Column], known_etag: Option<&str>) -> Result<Fetched> {
        if !self.names.iter().any(|n| n == dimension) {
            return self.rest.fetch(dimension, columns, known_etag).await;
        }
        let mut read = self.tables.read_table(dimension, columns).await?;
        if read.expected_rows > self.rows_max {
            let (found, most) = (read.expected_rows, self.rows_max);
            let what = format!("read dimension {dimension}: found {found} rows, expected at most {most}");
            return Err(PortError::permanent(what).code("TOO_LARGE"));
        }
        let (mut batches, mut rows): (Vec<RecordBatch>, u64) = (Vec::new(), 0);
        while let Some(batch) = read.batches.next().await {
            let batch = batch?;
            rows += batch.num_rows() as u64;
            batches.push(batch);
        }
        if rows != read.expected_rows {
            let expected = read.expected_rows;
            let what =
                format!("read dimension {dimension}: found {rows} rows, expected {expected} as counted in the same snapshot");
            return Err(PortError::retryable(what).code("INCOMPLETE_SNAPSHOT"));
        }
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(schema(columns)?));
        }
        Ok(Fetched::Snapshot(Snapshot { etag: None, as_of: None, batches }))
    }
}
