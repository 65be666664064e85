//! A schema registry in one JSON file, for a platform without services.
//!
//! Processes share the file: a change holds an advisory lock beside it, reads the newest content, and replaces the file
//! atomically, so a reader sees the old or the new content and a kill leaves one of them. What it leaves out: the network,
//! and more than one machine.
#![expect(clippy::disallowed_methods, reason = "an adapter opens files")]

use std::{
    fs::File,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use simulacro_core::{
    avro::memory::Registry,
    ports::{Compatibility, PortError, RegisteredSchema, Result, SchemaRegistry, Verdict},
};

/// How often a lock that another process holds is tried again, 10 ms apart; a change takes a few milliseconds.
const LOCK_TRIES: u32 = 200;

/// The registry.
#[derive(Debug)]
pub struct EmbeddedRegistry {
    path: PathBuf,
}

impl EmbeddedRegistry {
    /// The registry in this file. Nothing is read before the first call, and nothing is made before the first change; a
    /// file that is not there is an empty registry.
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Opens the file, or creates an empty registry with its folder.
    ///
    /// # Errors
    /// `Permanent` when the file cannot be written or is no registry; the text names it.
    pub fn open(path: &Path) -> Result<Self> {
        let registry = Self::at(path);
        registry.read()?;
        // Fails here, not at the first record, when the folder cannot be written.
        registry.lock_file()?;
        Ok(registry)
    }

    fn failed(&self, what: &str) -> PortError {
        PortError::permanent(format!("{what} registry {}", self.path.display()))
    }

    fn read(&self) -> Result<Registry> {
        match std::fs::read(&self.path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| self.failed("understand").because(e)),
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(Registry::default()),
            Err(e) => Err(self.failed("read").because(e)),
        }
    }

    fn lock_file(&self) -> Result<File> {
        if let Some(folder) = self.path.parent() {
            let cannot = |e| PortError::permanent(format!("create folder {}", folder.display())).because(e);
            std::fs::create_dir_all(folder).map_err(cannot)?;
        }
        let path = self.path.with_extension("lock");
        let cannot = |e| PortError::permanent(format!("open {}", path.display())).because(e);
        File::options().create(true).truncate(false).write(true).open(&path).map_err(cannot)
    }

    /// Holds the lock until the file is dropped.
    async fn lock(&self) -> Result<File> {
        let file = self.lock_file()?;
        for _ in 0..LOCK_TRIES {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(std::fs::TryLockError::WouldBlock) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(std::fs::TryLockError::Error(e)) => return Err(self.failed("lock").because(e)),
            }
        }
        Err(PortError::retryable(format!("lock registry {}: another process holds it", self.path.display())).code("BUSY"))
    }

    /// Replaces the file. Whatever fails, the file is whole: old or new.
    fn write(&self, registry: &Registry) -> Result<()> {
        let next = self.path.with_extension("next");
        let json = serde_json::to_vec_pretty(registry).map_err(|e| self.failed("write").because(e))?;
        let replace = || {
            let mut file = File::create(&next)?;
            file.write_all(&json)?;
            file.sync_all()?;
            std::fs::rename(&next, &self.path)?;
            let folder = self.path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder)?.sync_all()
        };
        // A failure to sync after the rename leaves the new content in place; repeating the change finds it there.
        replace().map_err(|e| PortError::unknown(format!("write registry {}", self.path.display())).because(e))
    }
}

#[async_trait]
impl SchemaRegistry for EmbeddedRegistry {
    async fn register(&self, subject: &str, schema: &str) -> Result<u32> {
        let _lock = self.lock().await?;
        let old = self.read()?;
        let mut new = old.clone();
        let id = new.register(subject, schema)?;
        if new != old {
            self.write(&new)?;
        }
        Ok(id)
    }
    async fn schema(&self, id: u32) -> Result<String> {
        self.read()?.schema(id)
    }
    async fn latest(&self, subject: &str) -> Result<RegisteredSchema> {
        self.read()?.latest(subject)
    }
    async fn version(&self, subject: &str, version: u32) -> Result<RegisteredSchema> {
        self.read()?.version(subject, version)
    }
    async fn versions(&self, subject: &str) -> Result<Vec<u32>> {
        self.read()?.versions(subject)
    }
    async fn check(&self, subject: &str, schema: &str) -> Result<Verdict> {
        self.read()?.check(subject, schema)
    }
    async fn compatibility(&self, subject: &str) -> Result<Compatibility> {
        Ok(self.read()?.compatibility(subject))
    }
    async fn set_compatibility(&self, subject: &str, level: Compatibility) -> Result<()> {
        let _lock = self.lock().await?;
        let mut registry = self.read()?;
        registry.set_compatibility(subject, level);
        self.write(&registry)
    }
}
