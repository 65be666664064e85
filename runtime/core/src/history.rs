//! The history: one JSON line for each port call, in production as in the simulator.
//!
//! A line holds references (paths, versions, counts), never payloads. The wrappers here are put on by
//! [`crate::platform::Platform::new`], so that no assembly can forget them. Object store calls made inside the
//! lakehouse are recorded by the store that is handed to it, see [`RecordedStore`].

mod destructive;
mod log;

use std::{
    collections::BTreeSet,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, NaiveDate, Utc};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions,
    PutPayload, PutResult, path::Path,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::contract::check::QualityResult;
use crate::ports::{
    AddColumns, Alert, Append, AppendRows, Column, Commit, DayWrite, DimensionApi, Env, Fact, Fence, Fetched, Fold, Lakehouse,
    Lease, Mark, Notifier, Optimize, PartitionRead, PipelineMetric, Ports, Query, Restore, Result, Rewritten, Run, RunLedger,
    RunStart, Scd2, TableSource, TableVersion, TableWrite, Upsert, UpsertRows, Vacuum, Warehouse, event_log::EventLog,
};
use crate::store_credentials;
use destructive::Deletes;

/// One port call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Time of the answer, from `Env`.
    pub time: DateTime<Utc>,
    /// Rises by one per event of a process.
    pub ordinal: u64,
    /// Which port.
    pub component: String,
    /// Which method.
    pub call: String,
    /// `ok`, or the disposition and the code of the error.
    pub outcome: String,
    /// What the call was about: paths, versions, counts.
    pub refs: Value,
}

/// Where events go. Appending must not fail a run: a sink that cannot write says so on its own channel.
pub trait HistorySink: fmt::Debug + Send + Sync {
    /// Appends one event.
    fn append(&self, event: Event);
}

/// Numbers events and stamps them.
#[derive(Debug, Clone)]
pub struct Recorder {
    env: Arc<dyn Env>,
    sink: Arc<dyn HistorySink>,
    next: Arc<AtomicU64>,
    deletes: Arc<Mutex<Deletes>>,
}

impl Recorder {
    /// A recorder that starts at ordinal 0.
    pub fn new(env: Arc<dyn Env>, sink: Arc<dyn HistorySink>) -> Self {
        Self { env, sink, next: Arc::new(AtomicU64::new(0)), deletes: Arc::default() }
    }
    /// Records one event.
    pub fn record(&self, component: &str, call: &str, outcome: String, refs: Value) {
        let ordinal = self.next.fetch_add(1, Ordering::SeqCst);
        self.sink.append(Event { time: self.env.now(), ordinal, component: component.into(), call: call.into(), outcome, refs });
    }
    fn port<T>(&self, component: &str, call: &str, refs: Value, result: Result<T>) -> Result<T> {
        let outcome = match &result {
            Ok(_) => "ok".to_owned(),
            Err(e) => {
                format!("{:?}{}", e.disposition, e.code.as_ref().map(|c| format!(" {c}")).unwrap_or_default()).to_lowercase()
            }
        };
        self.record(component, call, outcome, refs);
        result
    }
}

/// Puts the recording wrapper on every port. Metrics are left out: they are numbers about calls, not calls to the world.
pub fn recorded(ports: Ports) -> Ports {
    let recorder = ports.recorder.clone();
    Ports {
        tables: Arc::new(Recorded { inner: ports.tables, recorder: recorder.clone() }),
        dimensions: Arc::new(Recorded { inner: ports.dimensions, recorder: recorder.clone() }),
        lakehouse: Arc::new(Recorded { inner: ports.lakehouse, recorder: recorder.clone() }),
        warehouse: Arc::new(Recorded { inner: ports.warehouse, recorder: recorder.clone() }),
        ledger: Arc::new(Recorded { inner: ports.ledger, recorder: recorder.clone() }),
        notifier: Arc::new(Recorded { inner: ports.notifier, recorder: recorder.clone() }),
        objects: Arc::new(RecordedStore { inner: ports.objects, recorder: recorder.clone() }),
        log: Arc::new(Recorded { inner: ports.log, recorder: recorder.clone() }),
        registry: Arc::new(Recorded { inner: ports.registry, recorder: recorder.clone() }),
        env: ports.env,
        metrics: ports.metrics,
        recorder,
    }
}

/// Puts the recording wrapper on a ledger.
pub fn recorded_ledger(ledger: Arc<dyn RunLedger>, recorder: Recorder) -> Arc<dyn RunLedger> {
    Arc::new(Recorded { inner: ledger, recorder })
}

/// Puts the recording wrapper on a notifier.
pub fn recorded_notifier(notifier: Arc<dyn Notifier>, recorder: Recorder) -> Arc<dyn Notifier> {
    Arc::new(Recorded { inner: notifier, recorder })
}

/// Puts the recording wrapper on an event log.
pub fn recorded_log(log: Arc<dyn EventLog>, recorder: Recorder) -> Arc<dyn EventLog> {
    Arc::new(Recorded { inner: log, recorder })
}

#[derive(Debug)]
struct Recorded<T: ?Sized> {
    inner: Arc<T>,
    recorder: Recorder,
}

#[async_trait]
impl TableSource for Recorded<dyn TableSource> {
    async fn ping(&self) -> Result<()> {
        let result = self.inner.ping().await;
        self.recorder.port("table_source", "ping", json!({}), result)
    }
    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        let result = self.inner.columns(table).await;
        self.recorder.port("table_source", "columns", json!({ "table": table }), result)
    }
    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        let result = self.inner.read_day(table, fecha, columns).await;
        let rows = result.as_ref().ok().map(|r| r.expected_rows);
        self.recorder.port("table_source", "read_day", json!({ "table": table, "fecha": fecha, "rows": rows }), result)
    }
    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        let result = self.inner.not_null(table).await;
        let columns = result.as_ref().ok().cloned().flatten();
        self.recorder.port("table_source", "not_null", json!({ "table": table, "columns": columns }), result)
    }
    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        let result = self.inner.read_table(table, columns).await;
        let rows = result.as_ref().ok().map(|r| r.expected_rows);
        self.recorder.port("table_source", "read_table", json!({ "table": table, "rows": rows }), result)
    }
}

#[async_trait]
impl DimensionApi for Recorded<dyn DimensionApi> {
    fn offered(&self) -> Vec<String> {
        self.inner.offered()
    }
    async fn fetch(&self, dimension: &str, columns: &[Column], known_etag: Option<&str>) -> Result<Fetched> {
        let result = self.inner.fetch(dimension, columns, known_etag).await;
        let mut refs = json!({ "dimension": dimension, "known_etag": known_etag });
        match &result {
            Ok(Fetched::NotModified) => refs["not_modified"] = json!(true),
            Ok(Fetched::Snapshot(snapshot)) => {
                refs["etag"] = json!(snapshot.etag);
                refs["rows"] = json!(snapshot.batches.iter().map(RecordBatch::num_rows).sum::<usize>());
            }
            Err(_) => {}
        }
        self.recorder.port("dimension_api", "fetch", refs, result)
    }
}

impl Recorded<dyn Lakehouse> {
    /// Records a write under a mark, with the version that it came to.
    fn marked(&self, call: &str, table: &str, mark: &Mark, result: Result<Commit>) -> Result<Commit> {
        let version = result.as_ref().ok().map(|(Commit::New(version) | Commit::Already(version))| version);
        let refs = json!({ "table": table, "writer": mark.writer, "epoch": mark.epoch, "version": version });
        self.recorder.port("lakehouse", call, refs, result)
    }
}

#[async_trait]
impl Lakehouse for Recorded<dyn Lakehouse> {
    async fn overwrite_day(&self, write: DayWrite) -> Result<Commit> {
        let mut refs = json!({ "table": write.table, "fecha": write.fecha, "epoch": write.epoch });
        let result = self.inner.overwrite_day(write).await;
        if let Ok(Commit::New(version) | Commit::Already(version)) = &result {
            refs["version"] = json!(version);
        }
        self.recorder.port("lakehouse", "overwrite_day", refs, result)
    }
    async fn overwrite_table(&self, write: TableWrite) -> Result<Commit> {
        let (table, mark) = (write.table.clone(), write.mark.clone());
        let result = self.inner.overwrite_table(write).await;
        self.marked("overwrite_table", &table, &mark, result)
    }
    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>> {
        let result = self.inner.last_epoch(table, fecha).await;
        let epoch = result.as_ref().ok().copied().flatten();
        self.recorder.port("lakehouse", "last_epoch", json!({ "table": table, "fecha": fecha, "epoch": epoch }), result)
    }
    async fn append(&self, append: Append) -> Result<Commit> {
        let (table, mark) = (append.table.clone(), append.mark.clone());
        let result = self.inner.append(append).await;
        self.marked("append", &table, &mark, result)
    }
    async fn append_rows(&self, rows: AppendRows) -> Result<Commit> {
        let (table, mark) = (rows.table.clone(), rows.mark.clone());
        let result = self.inner.append_rows(rows).await;
        self.marked("append_rows", &table, &mark, result)
    }
    async fn upsert(&self, upsert: Upsert) -> Result<Commit> {
        let (table, mark) = (upsert.table.clone(), upsert.mark.clone());
        let result = self.inner.upsert(upsert).await;
        self.marked("upsert", &table, &mark, result)
    }
    async fn upsert_scd2(&self, change: Scd2) -> Result<Commit> {
        let (table, mark) = (change.table.clone(), change.mark.clone());
        let result = self.inner.upsert_scd2(change).await;
        self.marked("upsert_scd2", &table, &mark, result)
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        let result = self.inner.writer_epoch(table, writer).await;
        let epoch = result.as_ref().ok().copied().flatten();
        self.recorder.port("lakehouse", "writer_epoch", json!({ "table": table, "writer": writer, "epoch": epoch }), result)
    }
    async fn add_columns(&self, change: AddColumns) -> Result<Commit> {
        let (table, mark) = (change.table.clone(), change.mark.clone());
        let result = self.inner.add_columns(change).await;
        self.marked("add_columns", &table, &mark, result)
    }
    async fn restore(&self, restore: Restore) -> Result<Commit> {
        let (table, mark) = (restore.table.clone(), restore.mark.clone());
        let result = self.inner.restore(restore).await;
        self.marked("restore", &table, &mark, result)
    }
    async fn versions(&self, table: &str, limit: usize) -> Result<Vec<TableVersion>> {
        let result = self.inner.versions(table, limit).await;
        let found = result.as_ref().ok().map(Vec::len);
        self.recorder.port("lakehouse", "versions", json!({ "table": table, "found": found }), result)
    }
    async fn optimize(&self, optimize: Optimize) -> Result<Rewritten> {
        let mut refs = json!({ "table": optimize.table });
        let result = self.inner.optimize(optimize).await;
        if let Ok(done) = &result {
            refs["version"] = json!(done.version);
            refs["files"] = json!([done.files_removed, done.files_added]);
        }
        self.recorder.port("lakehouse", "optimize", refs, result)
    }
    async fn vacuum(&self, vacuum: Vacuum) -> Result<Vec<String>> {
        let (table, hours, dry) = (vacuum.table.clone(), vacuum.retention_hours, vacuum.dry_run);
        let _upkeep = self.recorder.upkeep(&table);
        let result = self.inner.vacuum(vacuum).await;
        let files = result.as_ref().ok().map(Vec::len);
        let refs = json!({ "table": table, "retention_hours": hours, "dry_run": dry, "files": files });
        self.recorder.port("lakehouse", "vacuum", refs, result)
    }
    async fn query(&self, query: &Query) -> Result<Vec<RecordBatch>> {
        let result = self.inner.query(query).await;
        let rows = result.as_ref().ok().map(|b| b.iter().map(|b| b.num_rows()).sum::<usize>());
        self.recorder.port("lakehouse", "query", json!({ "inputs": query.inputs.len(), "rows": rows }), result)
    }
    async fn maintain(&self, table: &str) -> Result<()> {
        let _upkeep = self.recorder.upkeep(table);
        let result = self.inner.maintain(table).await;
        self.recorder.port("lakehouse", "maintain", json!({ "table": table }), result)
    }
    async fn exists(&self, table: &str) -> Result<bool> {
        let result = self.inner.exists(table).await;
        self.recorder.port("lakehouse", "exists", json!({ "table": table }), result)
    }
}

#[async_trait]
impl Warehouse for Recorded<dyn Warehouse> {
    async fn load_day(&self, table: &str, fecha: NaiveDate, epoch: i64, batches: Vec<RecordBatch>) -> Result<Commit> {
        let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
        let result = self.inner.load_day(table, fecha, epoch, batches).await;
        self.recorder.port(
            "warehouse",
            "load_day",
            json!({ "table": table, "fecha": fecha, "epoch": epoch, "rows": rows }),
            result,
        )
    }
    async fn upsert_rows(&self, rows: UpsertRows) -> Result<Commit> {
        let mut refs = json!({ "table": rows.table, "writer": rows.mark.writer, "epoch": rows.mark.epoch });
        refs["rows"] = json!(rows.batches.iter().map(RecordBatch::num_rows).sum::<usize>());
        let result = self.inner.upsert_rows(rows).await;
        if let Ok(Commit::New(version) | Commit::Already(version)) = &result {
            refs["version"] = json!(version);
        }
        self.recorder.port("warehouse", "upsert_rows", refs, result)
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        let result = self.inner.writer_epoch(table, writer).await;
        let epoch = result.as_ref().ok().copied().flatten();
        self.recorder.port("warehouse", "writer_epoch", json!({ "table": table, "writer": writer, "epoch": epoch }), result)
    }
    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>> {
        let result = self.inner.query(sql, tables).await;
        let rows = result.as_ref().ok().map(|b| b.iter().map(RecordBatch::num_rows).sum::<usize>());
        self.recorder.port("warehouse", "query", json!({ "tables": tables, "rows": rows }), result)
    }
}

#[async_trait]
impl RunLedger for Recorded<dyn RunLedger> {
    async fn start(&self, start: &RunStart) -> Result<Run> {
        let result = self.inner.start(start).await;
        let epoch = result.as_ref().ok().map(|r| r.epoch);
        let refs = json!({ "pipeline": start.pipeline, "fecha": start.fecha, "epoch": epoch });
        self.recorder.port("ledger", "begin", refs, result)
    }
    async fn finish(&self, run: &Run) -> Result<()> {
        let result = self.inner.finish(run).await;
        let refs = json!({ "pipeline": run.pipeline, "fecha": run.fecha, "epoch": run.epoch, "state": run.state });
        self.recorder.port("ledger", "finish", refs, result)
    }
    async fn abandon(&self, run: &Run) -> Result<()> {
        let result = self.inner.abandon(run).await;
        let refs = json!({ "pipeline": run.pipeline, "fecha": run.fecha, "epoch": run.epoch });
        self.recorder.port("ledger", "abandon", refs, result)
    }
    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        let result = self.inner.runs(pipeline).await;
        self.recorder.port("ledger", "runs", json!({ "pipeline": pipeline }), result)
    }
    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>> {
        let result = self.inner.runs_since(pipeline, from).await;
        self.recorder.port("ledger", "runs_since", json!({ "pipeline": pipeline, "from": from }), result)
    }
    async fn fold_runs(&self, fold: &Fold, fence: Option<&Fence>) -> Result<()> {
        let result = self.inner.fold_runs(fold, fence).await;
        let refs =
            json!({ "pipeline": fold.pipeline, "runs": fold.runs.len(), "topic": fold.fact.topic, "name": fold.fact.name });
        self.recorder.port("ledger", "fold_runs", refs, result)
    }
    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        let result = self.inner.acquire_lease(name, holder, ttl, now).await;
        let token = result.as_ref().ok().map(|l| l.token);
        self.recorder.port("ledger", "acquire_lease", json!({ "lease": name, "holder": holder, "token": token }), result)
    }
    async fn renew_lease(&self, lease: &Lease, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        let result = self.inner.renew_lease(lease, ttl, now).await;
        self.recorder.port("ledger", "renew_lease", json!({ "lease": lease.name, "token": lease.token }), result)
    }
    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        let result = self.inner.release_lease(lease).await;
        self.recorder.port("ledger", "release_lease", json!({ "lease": lease.name, "token": lease.token }), result)
    }
    async fn lease(&self, name: &str) -> Result<Option<Lease>> {
        let result = self.inner.lease(name).await;
        self.recorder.port("ledger", "lease", json!({ "lease": name }), result)
    }
    async fn put_fact(&self, fact: &Fact, fence: Option<&Fence>) -> Result<()> {
        let result = self.inner.put_fact(fact, fence).await;
        self.recorder.port("ledger", "put_fact", json!({ "topic": fact.topic, "name": fact.name }), result)
    }
    async fn facts(&self, topic: &str) -> Result<Vec<Fact>> {
        let result = self.inner.facts(topic).await;
        self.recorder.port("ledger", "facts", json!({ "topic": topic }), result)
    }
    async fn put_metrics(&self, metrics: &[PipelineMetric]) -> Result<()> {
        let result = self.inner.put_metrics(metrics).await;
        self.recorder.port("ledger", "put_metrics", json!({ "rows": metrics.len() }), result)
    }
    async fn metrics(&self, fecha: NaiveDate) -> Result<Vec<PipelineMetric>> {
        let result = self.inner.metrics(fecha).await;
        self.recorder.port("ledger", "metrics", json!({ "fecha": fecha }), result)
    }
    async fn put_quality(&self, results: &[QualityResult]) -> Result<()> {
        let result = self.inner.put_quality(results).await;
        let failed = results.iter().filter(|r| !r.passed).count();
        self.recorder.port("ledger", "put_quality", json!({ "rows": results.len(), "failed": failed }), result)
    }
    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64> {
        let result = self.inner.thin_quality(layer, fecha, before).await;
        let gone = result.as_ref().ok().copied();
        self.recorder.port("ledger", "thin_quality", json!({ "layer": layer, "fecha": fecha, "gone": gone }), result)
    }
    async fn quality(&self, fecha: NaiveDate) -> Result<Vec<QualityResult>> {
        let result = self.inner.quality(fecha).await;
        self.recorder.port("ledger", "quality", json!({ "fecha": fecha }), result)
    }
}

#[async_trait]
impl Notifier for Recorded<dyn Notifier> {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        let result = self.inner.raise(alert).await;
        self.recorder.port(
            "notifier",
            "raise",
            json!({ "key": alert.dedup_key, "kind": alert.kind, "summary": alert.summary }),
            result,
        )
    }
    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        let result = self.inner.resolve(dedup_key).await;
        self.recorder.port("notifier", "resolve", json!({ "key": dedup_key }), result)
    }
}

/// Lists in order of path: delta-rs needs it, and a local folder does not promise it.
fn sorted(listing: BoxStream<'static, object_store::Result<ObjectMeta>>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
    futures::stream::once(async move {
        let mut all: Vec<ObjectMeta> = listing.try_collect().await.map_err(|e| store_credentials::named(e, ""))?;
        all.sort_by(|a, b| a.location.cmp(&b.location));
        Ok::<_, object_store::Error>(futures::stream::iter(all.into_iter().map(Ok)))
    })
    .try_flatten()
    .boxed()
}

/// An object store that records each call with its path, and lists in order of path.
#[derive(Debug)]
pub struct RecordedStore {
    /// The store that does the work.
    pub inner: Arc<dyn ObjectStore>,
    /// Where the calls go.
    pub recorder: Recorder,
}

impl RecordedStore {
    fn note<T>(&self, call: &str, path: &str, result: object_store::Result<T>) -> object_store::Result<T> {
        let result = result.map_err(|e| store_credentials::named(e, path));
        let outcome = match &result {
            Ok(_) => "ok",
            Err(object_store::Error::NotFound { .. }) => "not_found",
            Err(object_store::Error::AlreadyExists { .. }) => "already_exists",
            Err(object_store::Error::Precondition { .. }) => "precondition",
            Err(_) => "error",
        };
        self.recorder.record("object_store", call, outcome.into(), json!({ "path": path }));
        result
    }
}

impl fmt::Display for RecordedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "recorded({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for RecordedStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> object_store::Result<PutResult> {
        let result = self.inner.put_opts(location, payload, opts).await;
        self.note("put", location.as_ref(), result)
    }
    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        let result = self.inner.put_multipart_opts(location, opts).await;
        self.note("put_multipart", location.as_ref(), result)
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        let result = self.inner.get_opts(location, options).await;
        self.note("get", location.as_ref(), result)
    }
    async fn get_ranges(&self, location: &Path, ranges: &[std::ops::Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        let result = self.inner.get_ranges(location, ranges).await;
        self.note("get_ranges", location.as_ref(), result)
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.recorder.record("object_store", "delete_stream", "ok".into(), json!({}));
        let recorder = self.recorder.clone();
        let heard = locations.inspect(move |location| {
            if let Ok(path) = location {
                recorder.deletes(path.as_ref());
            }
        });
        self.inner.delete_stream(heard.boxed())
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.recorder.record("object_store", "list", "ok".into(), json!({ "path": prefix.map(|p| p.to_string()) }));
        sorted(self.inner.list(prefix))
    }
    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.recorder.record("object_store", "list_with_offset", "ok".into(), json!({ "path": prefix.map(|p| p.to_string()) }));
        sorted(self.inner.list_with_offset(prefix, offset))
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        let result = self.inner.list_with_delimiter(prefix).await;
        self.note("list_with_delimiter", prefix.map(|p| p.as_ref()).unwrap_or(""), result)
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        let result = self.inner.copy_opts(from, to, options).await;
        self.note("copy", to.as_ref(), result)
    }
    async fn rename_opts(&self, from: &Path, to: &Path, options: object_store::RenameOptions) -> object_store::Result<()> {
        let result = self.inner.rename_opts(from, to, options).await;
        self.note("rename", to.as_ref(), result)
    }
}
