//! SQL for people over everything a lake has: raw, staging, dimensions, marts and the embedded warehouse, now or as of a time.
//!
//! A table goes by its schema and name: `raw.ventas`, `staging.ventas_validadas`, `marts.metricas_diarias`,
//! `analytics.metricas_diarias`. Only reading is possible: the statement must be one SELECT (or EXPLAIN or DESCRIBE of one),
//! and nothing that a plan could write with is in reach. Memory is bounded, and rows are handed on as they come.
//!
//! The time of a Delta version is what its writer put into the log, that of a raw day when its manifest was stored.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{datatypes::SchemaRef, record_batch::RecordBatch};
use chrono::{DateTime, Utc};
use deltalake::{
    datafusion::{
        catalog::{MemorySchemaProvider, TableProvider},
        common::TableReference,
        error::DataFusionError,
        execution::{runtime_env::RuntimeEnvBuilder, session_state::SessionStateBuilder},
        logical_expr::LogicalPlan,
        prelude::{ParquetReadOptions, SQLOptions, SessionConfig, SessionContext},
        sql::{parser::Statement as DfStatement, sqlparser::ast::Statement},
    },
    delta_datafusion::DeltaSessionContext,
};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{Error as StoreError, ObjectMeta, ObjectStore, ObjectStoreExt, path::Path};
use simulacro_core::{
    models::nearest,
    ports::{Input, PortError, Result},
};
use url::Url;

use crate::{DeltaLakehouse, ROOT, memory::Shares, read_failed};

/// Folder of the embedded warehouse, whose tables have their schema in the name of their own folder.
const WAREHOUSE: &str = "warehouse";
/// Folder of the raw layer, whose tables are days of Parquet files under manifests, unless a stream writes them.
const RAW: &str = "raw";
/// Manifests that are read at a time.
const MANIFESTS_AT_ONCE: usize = 8;

/// Which state of the tables is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AsOf {
    /// The newest.
    Now,
    /// What was committed at this time or before it.
    Time(DateTime<Utc>),
    /// This version of the one table that the statement reads.
    Version(u64),
}

/// An answer whose rows are still to come.
pub struct Answer {
    /// Columns.
    pub schema: SchemaRef,
    /// Rows, in the order that the statement asks for.
    pub batches: BoxStream<'static, Result<RecordBatch>>,
}

/// The tables of a lake, for SQL that only reads.
#[derive(Debug)]
pub struct SqlLake {
    store: Arc<dyn ObjectStore>,
    /// Opens Delta tables over the same store.
    lakehouse: DeltaLakehouse,
    memory_bytes: usize,
}

/// Where a table is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// A Delta table in this folder.
    Delta(String),
    /// A table of the raw layer in this folder.
    Raw(String),
}

impl SqlLake {
    /// Over a store that lists in order of path; a query that needs more than `memory_bytes` spills to the system's temporary folder, or fails.
    pub fn new(store: Arc<dyn ObjectStore>, memory_bytes: usize) -> Self {
        Self { lakehouse: DeltaLakehouse::new(store.clone()), store, memory_bytes }
    }

    /// The names of all tables, sorted.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn tables(&self) -> Result<Vec<String>> {
        Ok(self.places().await?.into_keys().collect())
    }

    /// Plans a statement, and returns its rows as they come, at most `rows_max`.
    ///
    /// # Errors
    /// `Permanent` for anything but one statement that reads, for a table that is not there, and for a version or time that a
    /// table does not reach; the text names it and what there is.
    pub async fn query(&self, sql: &str, as_of: AsOf, rows_max: usize) -> Result<Answer> {
        let ctx = self.session()?;
        let failed = |e: DataFusionError| read_failed(format!("run query {}", head(sql)), e);
        let dialect = ctx.state().config().options().sql_parser.dialect;
        let statement = ctx.state().sql_to_statement(sql, &dialect).map_err(failed)?;
        reads(&statement, sql)?;
        let references = ctx.state().resolve_table_references(&statement).map_err(failed)?;
        let places = self.places().await?;
        if let AsOf::Version(version) = as_of
            && references.len() != 1
        {
            let found = references.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            return Err(PortError::permanent(format!(
                "read version {version}: found {} tables ({found}), expected one, since each table has versions of its own",
                references.len()
            )));
        }
        for reference in references {
            let name = reference.to_string();
            let place = places.get(&name).ok_or_else(|| unknown(&name, &places))?;
            match (place, as_of) {
                (Place::Raw(folder), _) => {
                    let provider = self.raw(&ctx, &name, folder, as_of).await?;
                    register(&ctx, reference, provider).map_err(failed)?;
                }
                (Place::Delta(folder), AsOf::Now) => self.lakehouse.register(&ctx, &name, &Input::Delta(folder.clone())).await?,
                (Place::Delta(folder), AsOf::Time(at)) => {
                    self.lakehouse.register(&ctx, &name, &Input::DeltaTime { table: folder.clone(), at }).await?;
                }
                (Place::Delta(folder), AsOf::Version(version)) => {
                    self.lakehouse.register(&ctx, &name, &Input::DeltaVersion { table: folder.clone(), version }).await?;
                }
            }
        }
        let plan = ctx.state().statement_to_plan(statement).await.map_err(failed)?;
        // What the statement's kind does not show: a write inside of an EXPLAIN, for example.
        let only_reads = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
        only_reads.verify_plan(&plan).map_err(|e| refused(sql).because(e))?;
        // An explanation has to stand at the top of its plan, and is short.
        let explains = matches!(plan, LogicalPlan::Explain(_) | LogicalPlan::Analyze(_));
        let frame = ctx.execute_logical_plan(plan).await.map_err(failed)?;
        let frame = if explains { frame } else { frame.limit(0, Some(rows_max)).map_err(failed)? };
        let what = format!("run query {}", head(sql));
        let rows = frame.execute_stream().await.map_err(failed)?;
        let schema = rows.schema();
        let batches = rows.map_err(move |e| read_failed(what.clone(), e)).boxed();
        Ok(Answer { schema, batches })
    }

    fn session(&self) -> Result<SessionContext> {
        let broken = |e: Box<dyn std::error::Error + Send + Sync>| PortError::permanent("make a query session").because(e);
        let delta = DeltaSessionContext::new().into_inner();
        // One partition, so that rows without ORDER BY come in the same order each time.
        let config: SessionConfig = delta.copied_config().with_target_partitions(1);
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(Shares::new(self.memory_bytes)))
            .build_arc()
            .map_err(|e| broken(e.into()))?;
        let state = SessionStateBuilder::new_from_existing(delta.state()).with_config(config).with_runtime_env(runtime).build();
        let ctx = SessionContext::new_with_state(state);
        let root = Url::parse(ROOT).map_err(|e| broken(e.into()))?;
        ctx.register_object_store(&root, self.store.clone());
        Ok(ctx)
    }

    /// Every table by its name.
    async fn places(&self) -> Result<BTreeMap<String, Place>> {
        let mut out = BTreeMap::new();
        for layer in self.folders(None).await? {
            for table in self.folders(Some(&layer)).await? {
                let (layer, name) = (layer.as_ref(), table.filename().unwrap_or_default());
                let is_delta = self.folders(Some(&table)).await?.iter().any(|f| f.filename() == Some("_delta_log"));
                // A stream writes its raw rows as Delta.
                if layer == RAW && !is_delta {
                    out.insert(format!("{RAW}.{name}"), Place::Raw(table.to_string()));
                } else if is_delta {
                    let qualified = if layer == WAREHOUSE { name.to_owned() } else { format!("{layer}.{name}") };
                    out.insert(qualified, Place::Delta(table.to_string()));
                }
            }
        }
        Ok(out)
    }

    async fn folders(&self, of: Option<&Path>) -> Result<Vec<Path>> {
        let place = of.map_or_else(|| "the lake".into(), ToString::to_string);
        let listed = self.store.list_with_delimiter(of).await.map_err(|e| read_failed(format!("list {place}"), e))?;
        let mut folders = listed.common_prefixes;
        folders.sort();
        Ok(folders)
    }

    /// The objects below a folder that `select` gives a value, sorted by path.
    async fn objects<T>(&self, folder: &Path, select: impl Fn(&ObjectMeta) -> Option<T>) -> Result<Vec<(ObjectMeta, T)>> {
        let listing = self.store.list(Some(folder)).try_filter_map(|m| {
            let value = select(&m);
            async move { Ok(value.map(|v| (m, v))) }
        });
        let mut found: Vec<_> = listing.try_collect().await.map_err(|e: StoreError| read_failed(format!("list {folder}"), e))?;
        found.sort_by(|a, b| a.0.location.cmp(&b.0.location));
        Ok(found)
    }

    async fn raw(&self, ctx: &SessionContext, name: &str, folder: &str, as_of: AsOf) -> Result<Arc<dyn TableProvider>> {
        if let AsOf::Version(version) = as_of {
            return Err(PortError::permanent(format!(
                "read version {version} of {name}: found a raw table, whose days have versions of their own; expected a time"
            )));
        }
        // Manifest v000002.json of a day after v000001.json, so the last that fits is the one to read.
        let manifest = |m: &ObjectMeta| {
            let path = m.location.to_string();
            let (day, file) = path.rsplit_once("/_manifest/")?;
            (file.ends_with(".json") && !matches!(as_of, AsOf::Time(t) if m.last_modified > t)).then(|| day.to_owned())
        };
        let found = self.objects(&Path::from(folder), manifest).await?;
        let newest: BTreeMap<String, Path> = found.into_iter().map(|(m, day)| (day, m.location)).collect();
        let reading = futures::stream::iter(newest.into_values()).map(|path| async move {
            let failed = |e: StoreError| read_failed(format!("read manifest {path}"), e);
            let bytes = self.store.get(&path).await.map_err(failed)?.bytes().await.map_err(failed)?;
            let damaged =
                || PortError::permanent(format!("read manifest {path}: found a damaged file, expected a list of files"));
            let manifest: serde_json::Value = serde_json::from_slice(&bytes).map_err(|e| damaged().because(e))?;
            let files = manifest.get("files").and_then(|f| f.as_array()).ok_or_else(damaged)?;
            let path = |f: &serde_json::Value| f.get("path").and_then(|p| p.as_str()).map(|p| format!("{ROOT}/{p}"));
            files.iter().map(|f| path(f).ok_or_else(damaged)).collect::<Result<Vec<_>>>()
        });
        let days: Vec<Vec<String>> = reading.buffered(MANIFESTS_AT_ONCE).try_collect().await?;
        let files: Vec<String> = days.into_iter().flatten().collect();
        // The newest day says which columns there are; an older one that lacks some has nulls there.
        let Some(last) = files.last().cloned() else {
            let when = if let AsOf::Time(t) = as_of { format!(" as of {t}") } else { String::new() };
            return Err(PortError::permanent(format!("read {name}{when}: found no day, expected at least one")));
        };
        let failed = |e: DataFusionError| read_failed(format!("open {name}"), e);
        let newest = last.clone();
        let unread = |e: DataFusionError| read_failed(format!("open {name}: read {newest}"), e);
        let schema = ctx.read_parquet(last, ParquetReadOptions::default()).await.map_err(unread)?;
        let schema = schema.schema().as_arrow().clone();
        let options = ParquetReadOptions::default().schema(&schema);
        Ok(ctx.read_parquet(files, options).await.map_err(failed)?.into_view())
    }
}

/// Makes a table known under its own name.
fn register(ctx: &SessionContext, name: TableReference, provider: Arc<dyn TableProvider>) -> Result<(), DataFusionError> {
    if let Some(schema) = name.schema()
        && let Some(catalog) = ctx.catalog("datafusion")
        && catalog.schema(schema).is_none()
    {
        catalog.register_schema(schema, Arc::new(MemorySchemaProvider::new()))?;
    }
    ctx.register_table(name, provider)?;
    Ok(())
}

/// The beginning of a statement, for errors.
fn head(sql: &str) -> String {
    let words: Vec<&str> = sql.split_whitespace().take(13).collect();
    if words.len() > 12 { format!("{} ...", words[..12].join(" ")) } else { words.join(" ") }
}

fn refused(sql: &str) -> PortError {
    let word = sql.split_whitespace().next().unwrap_or("nothing").to_uppercase();
    PortError::permanent(format!("refuse {}: found {word}, expected one SELECT, since this only reads", head(sql)))
}

/// Refuses a statement that does anything but read.
fn reads(statement: &DfStatement, sql: &str) -> Result<()> {
    match statement {
        DfStatement::Statement(inner) => match inner.as_ref() {
            Statement::Query(_) | Statement::Explain { .. } | Statement::ExplainTable { .. } => Ok(()),
            _ => Err(refused(sql)),
        },
        DfStatement::Explain(explain) => reads(&explain.statement, sql),
        _ => Err(refused(sql)),
    }
}

fn unknown(name: &str, places: &BTreeMap<String, Place>) -> PortError {
    let names: Vec<&str> = places.keys().map(String::as_str).collect();
    // A name without its schema is the commonest slip.
    let whole = names.iter().copied().find(|n| n.split_once('.').is_some_and(|(_, table)| table == name));
    let longer = names.iter().copied().find(|n| n.starts_with(name));
    let near = whole.or(longer).or_else(|| nearest(name, names.iter().copied()));
    let near = near.map(|n| format!("; did you mean {n}?")).unwrap_or_default();
    let known = if names.is_empty() { "a lake with tables".to_owned() } else { format!("one of {}", names.join(", ")) };
    PortError::permanent(format!("query {name}: found no such table, expected {known}{near}"))
}
