//! The real adapters of the ports: system clock, a folder of CSV and Parquet files, SQLite or PostgreSQL as source, an event log in files or in
//! Kafka, schema registries, dimensions in a folder or behind an API, ledgers and a warehouse in SQLite and PostgreSQL, log notifier, history file, metrics.
#![expect(clippy::disallowed_methods, reason = "adapters are the other side of the ports: they own files and the clock")]

mod csv_source;
mod dimension_folder;
mod dimension_http;
mod embedded_log;
mod embedded_source;
#[cfg(feature = "kafka")]
mod kafka;
mod lazy_log;
mod ledger;
mod metrics;
mod notify_channels;
mod notify_http;
mod notify_router;
mod parquet_source;
mod postgres;
mod postgres_ledger;
mod postgres_source;
mod postgres_warehouse;
mod postgres_wire;
mod prefixed;
mod program;
mod read_only;
mod registry_embedded;
mod registry_http;
mod sqlite_source;
mod store;
mod system;

pub use csv_source::CsvSource;
pub use dimension_folder::FolderDimensions;
pub use dimension_http::{HttpDimensions, HttpDimensionsSettings};
pub use embedded_log::{EmbeddedLog, EmbeddedLogConfig, FileLink, open_embedded_log};
pub use embedded_source::EmbeddedSource;
#[cfg(feature = "kafka")]
pub use kafka::{KafkaConfig, KafkaLog};
pub use lazy_log::LazyLog;
pub use ledger::SqliteLedger;
pub use metrics::PrometheusMetrics;
pub use notify_http::{DeliverySettings, Secret};
pub use notify_router::{AlertRouter, AlertSettings, PagerDutySettings, SlackSettings, WebhookSettings};
pub use parquet_source::ParquetSource;
pub use postgres::{PostgresServer, disposition};
pub use postgres_ledger::PostgresLedger;
pub use postgres_source::{CopyReader, NaiveTimestamps, PostgresSource, PostgresSourceConfig};
pub use postgres_warehouse::PostgresWarehouse;
pub use prefixed::FolderOf;
pub use program::{DATA_ERROR, ExternalProgram};
pub use read_only::{NoHistory, NoSource, ReadOnlyStore, open_lake};
pub use registry_embedded::EmbeddedRegistry;
pub use registry_http::{HttpRegistry, HttpRegistrySettings};
pub use sqlite_source::SqliteSource;
pub use store::{keep_store, kept_store, open_store};
pub use system::{FileHistory, LogNotifier, SystemEnv};

use std::{path::Path, sync::Arc};

use object_store::{ObjectStore, local::LocalFileSystem};
use simulacro_core::{
    history::{RecordedStore, Recorder},
    ports::{EventLog, Metrics, NoDimensions, PortError, Ports, Result, RunLedger, SchemaRegistry, TableSource, Warehouse},
    quality::Scratch,
};
use simulacro_lakehouse::{DeltaLakehouse, DeltaWarehouse};

/// What differs between one production and another; the rest is the same everywhere.
#[derive(Debug)]
pub struct Services {
    /// Source tables.
    pub tables: Arc<dyn TableSource>,
    /// The store of raw objects and Delta tables.
    pub objects: Arc<dyn ObjectStore>,
    /// Topics of events.
    pub log: Arc<dyn EventLog>,
    /// Schemas of the events.
    pub registry: Arc<dyn SchemaRegistry>,
    /// Runs.
    pub ledger: Arc<dyn RunLedger>,
    /// The warehouse; `None` keeps it in Delta tables of the same store.
    pub warehouse: Option<Arc<dyn Warehouse>>,
    /// Counters and gauges.
    pub metrics: Arc<dyn Metrics>,
}

/// Builds the ports over these services; the history goes to a file. There are no dimensions: whoever has some puts them
/// into [`Ports::dimensions`].
///
/// # Errors
/// `Permanent` when the history cannot be written.
pub fn connect(services: Services, history: &Path) -> Result<Ports> {
    let env = Arc::new(SystemEnv::default());
    let recorder = Recorder::new(env.clone(), Arc::new(FileHistory::open(history)?));
    Ok(assemble(services, env, recorder))
}

/// Memory that one query of a run keeps for sorting, grouping and windows; what needs more spills.
pub const QUERY_MEMORY_BYTES: usize = 512 << 20;

/// Most parts of a plan that run at the same time: each has buffers of its own.
const PARTITIONS_MAX: usize = 8;

/// As many as there are cores.
fn partitions() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().min(PARTITIONS_MAX))
}

/// Puts the ports together.
fn assemble(services: Services, env: Arc<SystemEnv>, recorder: Recorder) -> Ports {
    let Services { tables, objects, log, registry, ledger, warehouse, metrics } = services;
    // delta-rs reaches the store below the lakehouse port, so its calls are recorded here.
    let below = Arc::new(RecordedStore { inner: objects.clone(), recorder: recorder.clone() });
    let lakehouse = Arc::new(DeltaLakehouse::new(below).with_memory(QUERY_MEMORY_BYTES).with_partitions(partitions()));
    let warehouse = warehouse.unwrap_or_else(|| Arc::new(DeltaWarehouse::new(lakehouse.clone())));
    let (dimensions, notifier) = (Arc::new(NoDimensions), Arc::new(LogNotifier));
    Ports { env, tables, dimensions, objects, log, registry, warehouse, lakehouse, ledger, notifier, metrics, recorder }
}

/// The event log and the registry of a data folder. Neither is opened before its first call, since the log belongs to one
/// process at a time, and a batch run has no use for it.
pub fn embedded_events(data: &Path) -> (Arc<dyn EventLog>, Arc<dyn SchemaRegistry>) {
    let env = Arc::new(SystemEnv::default());
    let log = LazyLog::new(&data.join("log"), env, EmbeddedLogConfig::STANDARD);
    (Arc::new(log), Arc::new(EmbeddedRegistry::at(&data.join("registry.json"))))
}

/// Connects a platform whose lake, ledger and history are in one folder, over any source.
///
/// # Errors
/// `Permanent` when a folder or a file cannot be made; the text names it.
pub async fn connect_folder(tables: Arc<dyn TableSource>, data: &Path, metrics: Arc<dyn Metrics>) -> Result<Ports> {
    let store = match kept_store(data)? {
        Some(url) => open_store(&url)?,
        None => {
            let lake = data.join("lake");
            let cannot = |what: &str| PortError::permanent(format!("{what} folder {}", lake.display()));
            std::fs::create_dir_all(&lake).map_err(|e| cannot("create").because(e))?;
            Arc::new(LocalFileSystem::new_with_prefix(&lake).map_err(|e| cannot("open").because(e))?)
        }
    };
    let ledger = Arc::new(SqliteLedger::open(&data.join("ledger.db")).await?);
    let (log, registry) = embedded_events(data);
    let services = Services { tables, objects: store, log, registry, ledger, warehouse: None, metrics };
    connect(services, &data.join("history.jsonl"))
}

/// Connects the embedded platform: a source folder, which may have dimensions beside its tables, and a data folder that holds
/// the lake, the ledger and the history.
///
/// # Errors
/// `Permanent` when a folder cannot be made or the source cannot be read; the text names it.
pub async fn connect_embedded(source: &Path, data: &Path, metrics: Arc<dyn Metrics>) -> Result<Ports> {
    // The source is read first: when it is damaged, nothing is created.
    let (tables, dimensions) = (Arc::new(EmbeddedSource::open(source)?), Arc::new(FolderDimensions::open(source)?));
    Ok(Ports { dimensions, ..connect_folder(tables, data, metrics).await? })
}

/// Connects to what a run left in a data folder, only to read it: nothing is created, appended or changed, and the history
/// does not hear of it. The event log, which makes its folder when it is first called, is left as [`connect_folder`] has it.
///
/// # Errors
/// `Permanent` with code `ENOENT`, naming the folder or the file that is not there.
pub async fn connect_existing(data: &Path, metrics: Arc<dyn Metrics>) -> Result<Ports> {
    let objects = open_lake(data)?;
    let ledger = data.join("ledger.db");
    if !ledger.is_file() {
        let what = format!("open {}: found no ledger.db in it, expected the data folder of a run", data.display());
        return Err(PortError::permanent(what).code("ENOENT"));
    }
    let ledger = Arc::new(SqliteLedger::open_existing(&ledger).await?);
    let env = Arc::new(SystemEnv::default());
    let recorder = Recorder::new(env.clone(), Arc::new(NoHistory));
    let (log, registry) = embedded_events(data);
    let services = Services { tables: Arc::new(NoSource), objects, log, registry, ledger, warehouse: None, metrics };
    Ok(assemble(services, env, recorder))
}

/// An empty folder as the place where rows of a source are judged.
///
/// # Errors
/// `Permanent` when there is no such folder.
pub fn scratch(folder: &Path) -> Result<Scratch> {
    let store = LocalFileSystem::new_with_prefix(folder)
        .map_err(|e| PortError::permanent(format!("open folder {}", folder.display())).because(e))?;
    let objects: Arc<dyn ObjectStore> = Arc::new(store);
    Ok(Scratch { objects: objects.clone(), lakehouse: Arc::new(DeltaLakehouse::new(objects)) })
}
