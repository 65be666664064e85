//! The lakehouse: delta-rs and DataFusion over any object store, the same in production and in the simulator.
//!
//! Everything that could depend on the machine is fixed: one partition, one order. What delta-rs commits is decided
//! by the epoch in the Delta `txn` action, never by the error it returned: after any error the table is loaded again.

pub mod models;

use std::{num::NonZeroUsize, sync::Arc};

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;
use deltalake::{
    DeltaTable, DeltaTableBuilder, DeltaTableError,
    datafusion::{
        datasource::MemTable,
        prelude::{SessionConfig, SessionContext, col, lit},
        scalar::ScalarValue,
    },
    kernel::Transaction,
    kernel::transaction::CommitProperties,
    parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder,
    protocol::SaveMode,
};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use simulacro_core::ports::{Commit, DayWrite, Input, Lakehouse, PortError, Query, Result};

/// Delta tables under the root of one object store.
#[derive(Debug)]
pub struct DeltaLakehouse {
    store: Arc<dyn ObjectStore>,
}

fn app_id(table: &str, fecha: NaiveDate) -> String {
    format!("simulacro:{table}:{fecha}")
}

impl DeltaLakehouse {
    /// Tables are folders of `store`.
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store }
    }

    fn session() -> SessionContext {
        let partitions = NonZeroUsize::MIN.get();
        SessionContext::new_with_config(SessionConfig::new().with_target_partitions(partitions))
    }

    async fn open(&self, table: &str) -> Result<Option<DeltaTable>> {
        let broken = |e: DeltaTableError| PortError::permanent(format!("open delta table {table}")).because(e);
        match self.builder(table)?.load().await {
            Ok(t) => Ok(Some(t)),
            Err(DeltaTableError::NotATable(_) | DeltaTableError::InvalidTableLocation(_)) => Ok(None),
            Err(e) => {
                // A missing table may come as another error; an empty log decides.
                let t = self.builder(table)?.build().map_err(broken)?;
                match t.verify_deltatable_existence().await {
                    Ok(false) => Ok(None),
                    _ => Err(broken(e)),
                }
            }
        }
    }

    fn builder(&self, table: &str) -> Result<DeltaTableBuilder> {
        let broken = |e: DeltaTableError| PortError::permanent(format!("locate delta table {table}")).because(e);
        let url = deltalake::ensure_table_uri(format!("memory:///{table}")).map_err(broken)?;
        Ok(DeltaTableBuilder::from_url(url.clone()).map_err(broken)?.with_storage_backend(self.store.clone(), url))
    }

    async fn epoch(table: &DeltaTable, app: &str) -> Result<Option<i64>> {
        let read = |e: DeltaTableError| PortError::retryable(format!("read the epoch of {app}")).because(e);
        let state = table.snapshot().map_err(read)?;
        state.snapshot().transaction_version(table.log_store().as_ref(), app).await.map_err(read)
    }

    async fn run(&self, query: &Query) -> Result<(Vec<RecordBatch>, arrow::datatypes::SchemaRef)> {
        let ctx = Self::session();
        for (name, input) in &query.inputs {
            let failed =
                |e: Box<dyn std::error::Error + Send + Sync>| PortError::permanent(format!("open input {name}")).because(e);
            match input {
                Input::Delta(folder) => {
                    let table =
                        self.open(folder).await?.ok_or_else(|| PortError::permanent(format!("query {folder}: no such table")))?;
                    let provider = table.table_provider().await.map_err(|e| failed(e.into()))?;
                    ctx.register_table(name.as_str(), provider).map_err(|e| failed(e.into()))?;
                }
                Input::Parquet(files) => {
                    let (mut batches, mut schema) = (Vec::new(), None);
                    for file in files {
                        let damaged = |e: Box<dyn std::error::Error + Send + Sync>| {
                            PortError::permanent(format!("read {file}: found a damaged object, expected parquet")).because(e)
                        };
                        let got = self.store.get(&Path::from(file.as_str())).await.map_err(|e| failed(e.into()))?;
                        let bytes = got.bytes().await.map_err(|e| failed(e.into()))?;
                        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|e| damaged(e.into()))?;
                        schema = Some(reader.schema().clone());
                        for batch in reader.build().map_err(|e| damaged(e.into()))? {
                            batches.push(batch.map_err(|e| damaged(e.into()))?);
                        }
                    }
                    let schema = schema.ok_or_else(|| PortError::permanent(format!("open input {name}: no files")))?;
                    let table = MemTable::try_new(schema, vec![batches]).map_err(|e| failed(e.into()))?;
                    ctx.register_table(name.as_str(), Arc::new(table)).map_err(|e| failed(e.into()))?;
                }
            }
        }
        let failed =
            |e| PortError::permanent(format!("run query {}", query.sql.chars().take(120).collect::<String>())).because(e);
        let frame = ctx.sql(&query.sql).await.map_err(failed)?;
        let schema = Arc::new(frame.schema().as_arrow().clone());
        Ok((frame.collect().await.map_err(failed)?, schema))
    }
}

#[async_trait]
impl Lakehouse for DeltaLakehouse {
    async fn overwrite_day(&self, write: DayWrite) -> Result<Commit> {
        let app = app_id(&write.table, write.fecha);
        let existing = self.open(&write.table).await?;
        if let Some(table) = &existing
            && Self::epoch(table, &app).await?.is_some_and(|seen| seen >= write.epoch)
        {
            return Ok(Commit::Already(table.version().unwrap_or(0)));
        }
        let (mut batches, schema) = self.run(&write.query).await?;
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(schema));
        }
        let properties = CommitProperties::default()
            .with_application_transaction(Transaction::new(&app, write.epoch))
            .with_max_retries(0)
            .with_create_checkpoint(false)
            .with_cleanup_expired_logs(Some(false));
        let days = (write.fecha - NaiveDate::from_ymd_opt(1970, 1, 1).unwrap_or_default()).num_days();
        let only_day = col("fecha").eq(lit(ScalarValue::Date32(i32::try_from(days).ok())));
        let result = match existing {
            Some(table) => {
                table
                    .write(batches)
                    .with_save_mode(SaveMode::Overwrite)
                    .with_replace_where(only_day)
                    .with_commit_properties(properties)
                    .await
            }
            // The first commit of a table is its creation; a rival loses the race for version 0.
            None => {
                self.builder(&write.table)?
                    .build()
                    .map_err(|e| PortError::permanent(format!("create {}", write.table)).because(e))?
                    .write(batches)
                    .with_save_mode(SaveMode::ErrorIfExists)
                    .with_partition_columns(["fecha"])
                    .with_commit_properties(properties)
                    .await
            }
        };
        match result {
            Ok(table) => Ok(Commit::New(table.version().unwrap_or(0))),
            Err(e) => {
                // Success can be reported as an error; the log knows.
                if let Ok(Some(table)) = self.open(&write.table).await
                    && Self::epoch(&table, &app).await?.is_some_and(|seen| seen >= write.epoch)
                {
                    return Ok(Commit::Already(table.version().unwrap_or(0)));
                }
                Err(PortError::unknown(format!("overwrite {} of {}, epoch {}", write.fecha, write.table, write.epoch)).because(e))
            }
        }
    }

    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>> {
        match self.open(table).await? {
            None => Ok(None),
            Some(t) => Self::epoch(&t, &app_id(table, fecha)).await,
        }
    }

    async fn query(&self, query: &Query) -> Result<Vec<RecordBatch>> {
        Ok(self.run(query).await?.0)
    }

    async fn exists(&self, table: &str) -> Result<bool> {
        Ok(self.open(table).await?.is_some())
    }
}
