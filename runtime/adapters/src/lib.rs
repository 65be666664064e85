//! The real adapters of the ports: system clock, a folder of CSV files, an event log in files or in Kafka,
//! SQLite ledger, log notifier, history file.

mod csv_source;
mod embedded_log;
#[cfg(feature = "kafka")]
mod kafka;
mod ledger;
mod system;

pub use csv_source::CsvSource;
pub use embedded_log::{EmbeddedLog, EmbeddedLogConfig, FileLink, open_embedded_log};
#[cfg(feature = "kafka")]
pub use kafka::{KafkaConfig, KafkaLog};
pub use ledger::SqliteLedger;
pub use system::{FileHistory, LogNotifier, SystemEnv};

use std::{path::Path, sync::Arc};

use object_store::local::LocalFileSystem;
use simulacro_core::{
    history::{RecordedStore, Recorder},
    ports::{PortError, Ports, Result},
};
use simulacro_lakehouse::DeltaLakehouse;

/// Connects the embedded platform: a source folder, and a data folder that holds the lake, the ledger and the history.
///
/// # Errors
/// `Permanent` when a folder cannot be made or the source cannot be read; the text names it.
pub async fn connect_embedded(source: &Path, data: &Path) -> Result<Ports> {
    let lake = data.join("lake");
    std::fs::create_dir_all(&lake).map_err(|e| PortError::permanent(format!("create folder {}", lake.display())).because(e))?;
    let store = LocalFileSystem::new_with_prefix(&lake)
        .map_err(|e| PortError::permanent(format!("open folder {}", lake.display())).because(e))?;
    let objects: Arc<dyn object_store::ObjectStore> = Arc::new(store);
    let env: Arc<SystemEnv> = Arc::new(SystemEnv::default());
    let history = Arc::new(FileHistory::open(&data.join("history.jsonl"))?);
    // delta-rs reaches the store below the lakehouse port, so its calls are recorded here.
    let below = Arc::new(RecordedStore { inner: objects.clone(), recorder: Recorder::new(env.clone(), history.clone()) });
    Ok(Ports {
        env,
        tables: Arc::new(CsvSource::open(source)?),
        objects,
        lakehouse: Arc::new(DeltaLakehouse::new(below)),
        ledger: Arc::new(SqliteLedger::open(&data.join("ledger.db")).await?),
        notifier: Arc::new(LogNotifier),
        history,
    })
}
