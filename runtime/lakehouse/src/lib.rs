//! The lakehouse: delta-rs and DataFusion over any object store, the same in production and in the simulator.
//!
//! Everything that could depend on the machine is fixed: one partition, one order. What delta-rs commits is decided
//! by the epoch in the Delta `txn` action, never by the error it returned: after any error the table is loaded again.

mod commit;
pub mod copy;
mod functions;
mod memory;
pub mod models;
pub mod query;
mod rows;
mod scd2;
mod schema;
mod upkeep;
mod upsert;
mod versions;
mod warehouse;
mod whole_table;

pub use warehouse::DeltaWarehouse;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::NaiveDate;
use deltalake::{
    DeltaTable, DeltaTableBuilder, DeltaTableError,
    datafusion::{
        catalog::TableProvider,
        common::TableReference,
        execution::{runtime_env::RuntimeEnvBuilder, session_state::SessionStateBuilder},
        logical_expr::LogicalPlan,
        prelude::{DataFrame, ParquetReadOptions, SessionConfig, SessionContext, col, lit},
        scalar::ScalarValue,
    },
    delta_datafusion::DeltaSessionContext,
    protocol::SaveMode,
};
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use simulacro_core::ports::{
    AddColumns, Append, AppendRows, Commit, DayWrite, Disposition, Input, Lakehouse, Optimize, PortError, Query, Restore, Result,
    Rewritten, Scd2, TableVersion, TableWrite, Upsert, Vacuum,
};
use url::Url;

use crate::{
    commit::{Start, Txn, app_id, causes},
    memory::Shares,
};

/// A checkpoint is written when the log has grown by this many versions.
pub const CHECKPOINT_EVERY: u64 = 10;

/// Under which address DataFusion finds the store; the host is arbitrary.
const ROOT: &str = "lake://root";

/// Delta tables under the root of one object store.
#[derive(Debug)]
pub struct DeltaLakehouse {
    store: Arc<dyn ObjectStore>,
    /// Tables that were opened before. A snapshot here is a start for the next one, never an answer by itself.
    opened: Mutex<BTreeMap<String, DeltaTable>>,
    /// The last checkpoint of a table that this process knows of.
    checkpoints: Mutex<BTreeMap<String, u64>>,
    /// Memory of one query for what it has to keep, in bytes.
    memory_bytes: Option<usize>,
    /// Parts of a plan that run at the same time.
    partitions: usize,
}

fn days_since_epoch(fecha: NaiveDate) -> Option<i32> {
    i32::try_from((fecha - NaiveDate::default()).num_days()).ok()
}

fn register(
    ctx: &SessionContext,
    name: TableReference,
    provider: Arc<dyn TableProvider>,
) -> Result<(), deltalake::datafusion::error::DataFusionError> {
    ctx.register_table(name, provider).map(|_| ())
}

impl DeltaLakehouse {
    /// Tables are folders of `store`.
    pub fn new(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, opened: Mutex::default(), checkpoints: Mutex::default(), memory_bytes: None, partitions: 1 }
    }

    /// The same, where each query keeps at most `memory_bytes` for sorting, grouping and windows. What needs more spills to the
    /// system's temporary folder, or fails with an error that says so. The rows under way, some batches, are not counted.
    #[must_use]
    pub fn with_memory(self, memory_bytes: usize) -> Self {
        Self { memory_bytes: Some(memory_bytes), ..self }
    }

    /// The same, with plans of `partitions` parts that run at the same time, 1 at least. With more than one the rows of a table come in
    /// an order that is nobody's promise; the rows themselves are the same.
    #[must_use]
    pub fn with_partitions(self, partitions: usize) -> Self {
        Self { partitions: partitions.max(1), ..self }
    }

    /// A session whose plans do not depend on the number of cores, unless it was asked for.
    fn session(&self) -> Result<SessionContext> {
        let broken = |e: Box<dyn std::error::Error + Send + Sync>| PortError::permanent("make a query session").because(e);
        let delta = DeltaSessionContext::new().into_inner();
        let config: SessionConfig = delta
            .copied_config()
            .with_target_partitions(self.partitions)
            .set_usize("datafusion.execution.planning_concurrency", 1)
            .set_usize("datafusion.execution.meta_fetch_concurrency", 1);
        let mut state = SessionStateBuilder::new_from_existing(delta.state()).with_config(config);
        if let Some(bytes) = self.memory_bytes {
            let pool = Arc::new(Shares::new(bytes));
            let runtime = RuntimeEnvBuilder::new().with_memory_pool(pool).build_arc().map_err(|e| broken(e.into()))?;
            state = state.with_runtime_env(runtime);
        }
        let ctx = SessionContext::new_with_state(state.build());
        ctx.register_udf(schema::not_null());
        for function in functions::all() {
            ctx.register_udf(function);
        }
        let root = Url::parse(ROOT).map_err(|e| broken(e.into()))?;
        ctx.register_object_store(&root, self.store.clone());
        Ok(ctx)
    }

    /// The newest version of a table; `None` when there is no table.
    async fn open(&self, table: &str) -> Result<Option<DeltaTable>> {
        let known = self.opened.lock().unwrap_or_else(PoisonError::into_inner).get(table).cloned();
        if let Some(mut known) = known {
            match known.update_state().await {
                Ok(()) => {
                    self.remember(table, &known);
                    return Ok(Some(known));
                }
                // The log may have been replaced under us, as by a restore: begin anew.
                Err(_) => self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(table),
            };
        }
        let broken = |e: DeltaTableError| read_failed(format!("open delta table {table}"), e);
        match self.builder(table)?.load().await {
            Ok(loaded) => {
                self.remember(table, &loaded);
                Ok(Some(loaded))
            }
            Err(DeltaTableError::NotATable(_) | DeltaTableError::InvalidTableLocation(_)) => Ok(None),
            Err(e) => {
                // A missing table may come as another error; an empty log decides.
                let unloaded = self.builder(table)?.build().map_err(broken)?;
                match unloaded.verify_deltatable_existence().await {
                    Ok(false) => Ok(None),
                    _ => Err(broken(e)),
                }
            }
        }
    }

    fn checkpointed(&self, table: &str, version: u64) {
        self.checkpoints.lock().unwrap_or_else(PoisonError::into_inner).insert(table.to_owned(), version);
    }

    /// The next call begins at the newest checkpoint.
    fn forget(&self, table: &str) {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).remove(table);
    }

    fn remember(&self, table: &str, opened: &DeltaTable) {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).insert(table.to_owned(), opened.clone());
    }

    fn builder(&self, table: &str) -> Result<DeltaTableBuilder> {
        let broken = |e: DeltaTableError| PortError::permanent(format!("locate delta table {table}")).because(e);
        let url = deltalake::ensure_table_uri(format!("memory:///{table}")).map_err(broken)?;
        Ok(DeltaTableBuilder::from_url(url.clone()).map_err(broken)?.with_storage_backend(self.store.clone(), url))
    }

    async fn epoch(table: &DeltaTable, app: &str) -> Result<Option<i64>> {
        let read = |e: DeltaTableError| read_failed(format!("read the epoch of {app}"), e);
        let state = table.snapshot().map_err(read)?;
        state.snapshot().transaction_version(table.log_store().as_ref(), app).await.map_err(read)
    }

    /// Makes `input` a table of the session under `name`.
    async fn register(&self, ctx: &SessionContext, name: &str, input: &Input) -> Result<()> {
        let failed = |e: Box<dyn std::error::Error + Send + Sync>| read_failed(format!("open input {name}: {input}"), e);
        let reference = TableReference::parse_str(name);
        if let Some(schema) = reference.schema()
            && let Some(catalog) = ctx.catalog("datafusion")
            && catalog.schema(schema).is_none()
        {
            let empty = Arc::new(deltalake::datafusion::catalog::MemorySchemaProvider::new());
            catalog.register_schema(schema, empty).map_err(|e| failed(e.into()))?;
        }
        let provider = match input {
            Input::Delta(folder) => {
                let table =
                    self.open(folder).await?.ok_or_else(|| PortError::permanent(format!("query {folder}: no such table")))?;
                table.table_provider().await.map_err(|e| failed(e.into()))?
            }
            Input::DeltaVersion { table, version } => {
                self.travel(table, *version).await?.table_provider().await.map_err(|e| failed(e.into()))?
            }
            Input::DeltaTime { table, at } => {
                let version = self.version_at(table, *at).await?;
                self.travel(table, version).await?.table_provider().await.map_err(|e| failed(e.into()))?
            }
            Input::Rows(rows) => ctx.read_batches(rows.iter().cloned()).map_err(|e| failed(e.into()))?.into_view(),
            Input::DeltaWithDay { table, fecha, rows } => {
                let day = ctx.read_batches(rows.iter().cloned()).map_err(|e| failed(e.into()))?;
                let Some(table) = self.open(table).await? else {
                    return register(ctx, reference, day.into_view()).map_err(|e| failed(e.into()));
                };
                let stored = table.table_provider().await.map_err(|e| failed(e.into()))?;
                let other_days = col("fecha").not_eq(lit(ScalarValue::Date32(days_since_epoch(*fecha))));
                let others = ctx.read_table(stored).and_then(|frame| frame.filter(other_days));
                others.and_then(|frame| frame.union_by_name(day)).map_err(|e| failed(e.into()))?.into_view()
            }
            Input::Parquet(files) => {
                let paths: Vec<String> = files.iter().map(|f| format!("{ROOT}/{f}")).collect();
                let frame = ctx.read_parquet(paths, ParquetReadOptions::default()).await.map_err(|e| failed(e.into()))?;
                frame.into_view()
            }
        };
        register(ctx, reference, provider).map_err(|e| failed(e.into()))
    }

    /// Plans a query in a session of its own.
    async fn plan(&self, query: &Query) -> Result<(SessionContext, DataFrame)> {
        let ctx = self.session()?;
        for (name, input) in &query.inputs {
            self.register(&ctx, name, input).await?;
        }
        let frame = ctx.sql(&query.sql).await.map_err(|e| query_failed(query, e))?;
        Ok((ctx, frame))
    }

    /// Replaces one day of a table by the rows of `plan`; `what` is for errors.
    pub(crate) async fn replace_day(
        &self,
        table: &str,
        fecha: NaiveDate,
        epoch: i64,
        ctx: &SessionContext,
        plan: LogicalPlan,
    ) -> Result<Commit> {
        let txn = Txn { app: app_id(table, &fecha.to_string()), epoch };
        let existing = match self.start(table, &txn).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(existing) => existing,
        };
        let result = match existing {
            None => self.create(table, &txn, vec!["fecha".into()], ctx, plan).await,
            Some(existing) => {
                let only_day = col("fecha").eq(lit(ScalarValue::Date32(days_since_epoch(fecha))));
                let plan = schema::conform(ctx, table, &existing, plan)?;
                existing
                    .write(vec![])
                    .with_save_mode(SaveMode::Overwrite)
                    .with_replace_where(only_day)
                    .with_input_plan(plan)
                    .with_session_state(Arc::new(ctx.state()))
                    .with_commit_properties(txn.properties())
                    .await
            }
        };
        self.settle(table, &txn, format!("overwrite {fecha} of {table}, epoch {epoch}"), Some(ctx), result).await
    }

    /// Version of the newest checkpoint that the table's own pointer names.
    async fn last_checkpoint(&self, table: &str) -> Option<u64> {
        if let Some(known) = self.checkpoints.lock().unwrap_or_else(PoisonError::into_inner).get(table) {
            return Some(*known);
        }
        let pointer = Path::from(format!("{table}/_delta_log/_last_checkpoint"));
        let bytes = self.store.get(&pointer).await.ok()?.bytes().await.ok()?;
        serde_json::from_slice::<serde_json::Value>(&bytes).ok()?.get("version")?.as_u64()
    }
}

/// What may be done after reading failed: a store that did not answer may answer next time, anything else stays wrong.
fn read_failed(what: String, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> PortError {
    let error = error.into();
    let mut passing = false;
    causes(error.as_ref(), |cause| {
        if let Some(store) = cause.downcast_ref::<object_store::Error>() {
            passing = matches!(store, object_store::Error::Generic { .. } | object_store::Error::JoinError { .. });
        }
    });
    if passing { PortError::retryable(what).because(error) } else { PortError::permanent(what).because(error) }
}

fn query_failed(query: &Query, error: deltalake::datafusion::error::DataFusionError) -> PortError {
    let inputs = query.inputs.iter().map(|(name, input)| format!("{name} = {input}")).collect::<Vec<_>>().join(", ");
    let head: String = query.sql.split_whitespace().take(12).collect::<Vec<_>>().join(" ");
    read_failed(format!("run query {head} ... over {inputs}"), error)
}

#[async_trait]
impl Lakehouse for DeltaLakehouse {
    async fn overwrite_day(&self, write: DayWrite) -> Result<Commit> {
        let (ctx, frame) = self.plan(&write.query).await?;
        let plan = frame.into_unoptimized_plan();
        self.replace_day(&write.table, write.fecha, write.epoch, &ctx, plan).await
    }

    async fn overwrite_table(&self, write: TableWrite) -> Result<Commit> {
        self.replace_table(write).await
    }

    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>> {
        let app = app_id(table, &fecha.to_string());
        let Some(opened) = self.open(table).await? else { return Ok(None) };
        match Self::epoch(&opened, &app).await {
            // The log of a snapshot that was carried forward may have been deleted, which shows when it is read.
            Err(e) if e.disposition == Disposition::Permanent => {
                self.forget(table);
                match self.open(table).await? {
                    None => Ok(None),
                    Some(opened) => Self::epoch(&opened, &app).await,
                }
            }
            other => other,
        }
    }

    async fn append(&self, append: Append) -> Result<Commit> {
        self.add(append).await
    }

    async fn append_rows(&self, rows: AppendRows) -> Result<Commit> {
        self.add_rows(rows).await
    }

    async fn upsert(&self, upsert: Upsert) -> Result<Commit> {
        self.merge(upsert).await
    }

    async fn upsert_scd2(&self, change: Scd2) -> Result<Commit> {
        self.change_dimension(change).await
    }

    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        match self.open(table).await? {
            None => Ok(None),
            Some(opened) => Self::epoch(&opened, &app_id(table, writer)).await,
        }
    }

    async fn add_columns(&self, change: AddColumns) -> Result<Commit> {
        self.evolve(&change).await
    }

    async fn restore(&self, restore: Restore) -> Result<Commit> {
        self.put_back(&restore).await
    }

    async fn versions(&self, table: &str, limit: usize) -> Result<Vec<TableVersion>> {
        self.told_versions(table, limit).await
    }

    async fn optimize(&self, optimize: Optimize) -> Result<Rewritten> {
        self.rewrite(&optimize).await
    }

    async fn vacuum(&self, vacuum: Vacuum) -> Result<Vec<String>> {
        self.remove_unneeded(&vacuum).await
    }

    async fn query(&self, query: &Query) -> Result<Vec<RecordBatch>> {
        let (_, frame) = self.plan(query).await?;
        let schema = Arc::new(frame.schema().as_arrow().clone());
        let mut batches = frame.collect().await.map_err(|e| query_failed(query, e))?;
        if batches.is_empty() {
            batches.push(RecordBatch::new_empty(schema));
        }
        Ok(batches)
    }

    async fn maintain(&self, table: &str) -> Result<()> {
        self.checkpoint(table).await
    }

    async fn exists(&self, table: &str) -> Result<bool> {
        // A snapshot that is carried forward does not notice that its log was deleted, since it looks for newer entries only.
        let known = self.opened.lock().unwrap_or_else(PoisonError::into_inner).get(table).and_then(DeltaTable::version);
        if let Some(version) = known {
            let entry = Path::from(format!("{table}/_delta_log/{version:020}.json"));
            match self.store.head(&entry).await {
                Ok(_) => {}
                Err(object_store::Error::NotFound { .. }) => self.forget(table),
                Err(e) => return Err(read_failed(format!("look for {entry}"), e)),
            }
        }
        Ok(self.open(table).await?.is_some())
    }
}

#[cfg(test)]
mod tests {
    use deltalake::datafusion::error::DataFusionError;

    use super::*;

    #[test]
    fn a_store_that_did_not_answer_is_asked_again_and_a_missing_object_is_not() {
        let generic = || object_store::Error::Generic { store: "s3", source: "503 SlowDown".into() };
        let missing = || object_store::Error::NotFound { path: "a".into(), source: "404".into() };
        let datafusion = |e| DataFusionError::Context("read".into(), Box::new(DataFusionError::ObjectStore(Box::new(e))));
        let check = |error: Box<dyn std::error::Error + Send + Sync>, expected| {
            let text = format!("{error:?}");
            assert_eq!(read_failed("read a".into(), error).disposition, expected, "{text}");
        };
        check(datafusion(generic()).into(), Disposition::Retryable);
        check(datafusion(missing()).into(), Disposition::Permanent);
        check(DeltaTableError::ObjectStore { source: generic() }.into(), Disposition::Retryable);
        check(DeltaTableError::ObjectStore { source: missing() }.into(), Disposition::Permanent);
        check(DeltaTableError::KernelError(generic().into()).into(), Disposition::Retryable);
        check(DeltaTableError::KernelError(missing().into()).into(), Disposition::Permanent);
        check(DataFusionError::Plan("no column".into()).into(), Disposition::Permanent);
    }
}
