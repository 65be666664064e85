//! The embedded warehouse: Delta tables of their own, queried by DataFusion.
//!
//! What it leaves out: users, grants and concurrent writers. A table `analytics.metricas_diarias` is the folder
//! `warehouse/analytics.metricas_diarias`, loaded a day at a time, or row by row, under the same epoch rules as the lakehouse.

use std::sync::Arc;

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;
use simulacro_core::ports::{Commit, Input, Lakehouse, PortError, Query, Result, UpsertRows, Warehouse};

use crate::DeltaLakehouse;

/// Warehouse tables beside the lakehouse's, in the same store.
#[derive(Debug)]
pub struct DeltaWarehouse {
    lakehouse: Arc<DeltaLakehouse>,
}

impl DeltaWarehouse {
    /// A warehouse over the lakehouse's store.
    pub fn new(lakehouse: Arc<DeltaLakehouse>) -> Self {
        Self { lakehouse }
    }
}

fn folder(table: &str) -> String {
    format!("warehouse/{table}")
}

#[async_trait]
impl Warehouse for DeltaWarehouse {
    async fn load_day(&self, table: &str, fecha: NaiveDate, epoch: i64, batches: Vec<RecordBatch>) -> Result<Commit> {
        let failed = |e| PortError::permanent(format!("load {fecha} of {table}")).because(e);
        let ctx = self.lakehouse.session()?;
        // Before the write and never after it: a log that could not be looked after is as readable as before.
        let _ = self.lakehouse.maintain(&folder(table)).await;
        let plan = ctx.read_batches(batches).map_err(failed)?.into_unoptimized_plan();
        self.lakehouse.replace_day(&folder(table), fecha, epoch, &ctx, plan).await
    }

    async fn upsert_rows(&self, rows: UpsertRows) -> Result<Commit> {
        // As above: before the write.
        let _ = self.lakehouse.maintain(&folder(&rows.table)).await;
        self.lakehouse.merge_rows(UpsertRows { table: folder(&rows.table), ..rows }).await
    }

    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        self.lakehouse.writer_epoch(&folder(table), writer).await
    }

    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>> {
        let inputs = tables.iter().map(|t| ((*t).to_owned(), Input::Delta(folder(t)))).collect();
        self.lakehouse.query(&Query { sql: sql.to_owned(), inputs }).await
    }
}
