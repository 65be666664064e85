//! Clock, log notifier and history file of a real process.

use std::{
    fs::File,
    io::Write,
    path::Path,
    sync::Mutex,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use simulacro_core::{
    history::{Event, HistorySink},
    ports::{Alert, Env, Notifier, PortError, Result},
};
use tracing::{error, info};

/// The system's clock.
#[derive(Debug, Default)]
pub struct SystemEnv {
    ids: AtomicU64,
}

#[async_trait]
impl Env for SystemEnv {
    fn now(&self) -> DateTime<Utc> {
        DateTime::from(std::time::SystemTime::now())
    }
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn random(&self) -> u64 {
        // Jitter needs no secrecy: where the kernel has no entropy to give, the clock spreads callers well enough.
        getrandom::u64().unwrap_or_else(|_| self.now().timestamp_subsec_nanos().into())
    }
    fn new_id(&self) -> String {
        let n = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("{:x}-{:x}-{n:x}", self.now().timestamp_micros(), std::process::id())
    }
}

/// Writes alerts to the log.
#[derive(Debug)]
pub struct LogNotifier;

#[async_trait]
impl Notifier for LogNotifier {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        error!(kind = %alert.kind, priority = alert.priority, key = %alert.dedup_key, "alert: {}", alert.summary);
        Ok(())
    }
    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        info!(key = %dedup_key, "alert resolved");
        Ok(())
    }
}

/// Appends events to a file, one JSON object a line.
#[derive(Debug)]
pub struct FileHistory {
    file: Mutex<File>,
}

impl FileHistory {
    /// Opens or creates the file.
    ///
    /// # Errors
    /// `Permanent`, naming the file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(path)
            .map_err(|e| PortError::permanent(format!("open {}", path.display())).because(e))?;
        Ok(Self { file: Mutex::new(file) })
    }
}

impl HistorySink for FileHistory {
    fn append(&self, event: Event) {
        let Ok(mut line) = serde_json::to_vec(&event) else { return };
        line.push(b'\n');
        let Ok(mut file) = self.file.lock() else { return };
        if let Err(e) = file.write_all(&line) {
            error!(error = %e, "history could not be written");
        }
    }
}
