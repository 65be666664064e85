//! An embedded event log that is opened by its first call.
//!
//! The log in a folder belongs to one process at a time. A platform that never touches it must not keep others out, so
//! its folder is not even made before somebody calls. An opening that failed is tried again by the next call.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use simulacro_core::ports::{
    Env, Result,
    event_log::{EventLog, GroupConsumer, GroupSpec, LogRecord, Producer, TopicPartition, TopicSpec},
};
use tokio::sync::OnceCell;

use crate::{EmbeddedLog, EmbeddedLogConfig, open_embedded_log};

/// The log.
#[derive(Debug)]
pub struct LazyLog {
    folder: PathBuf,
    env: Arc<dyn Env>,
    config: EmbeddedLogConfig,
    opened: OnceCell<EmbeddedLog>,
}

impl LazyLog {
    /// The log in `folder`, which is neither made nor locked yet.
    pub fn new(folder: &Path, env: Arc<dyn Env>, config: EmbeddedLogConfig) -> Self {
        Self { folder: folder.to_owned(), env, config, opened: OnceCell::new() }
    }

    /// The opened log; errors are those of [`open_embedded_log`].
    async fn log(&self) -> Result<&EmbeddedLog> {
        self.opened.get_or_try_init(|| open_embedded_log(&self.folder, self.env.clone(), self.config.clone())).await
    }
}

#[async_trait]
impl EventLog for LazyLog {
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        self.log().await?.create_topic(spec).await
    }
    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>> {
        self.log().await?.offsets(topic).await
    }
    async fn offsets_at(&self, topic: &str, time_ms: i64) -> Result<BTreeMap<i32, i64>> {
        self.log().await?.offsets_at(topic, time_ms).await
    }
    async fn committed(&self, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
        self.log().await?.committed(group, topic).await
    }
    async fn reset(&self, group: &str, offsets: &BTreeMap<TopicPartition, i64>) -> Result<()> {
        self.log().await?.reset(group, offsets).await
    }
    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)> {
        self.log().await?.read(partition, offset, max_records).await
    }
    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>> {
        self.log().await?.join(spec).await
    }
    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>> {
        self.log().await?.producer(transactional_id).await
    }
}
