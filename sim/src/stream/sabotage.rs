//! Defences that are switched off, one at a time, to see that the invariants notice: wrappers round the log that a worker
//! is given, and values of its configuration. Nothing in the job knows of it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use simulacro_core::{
    ports::{
        Result,
        event_log::{
            EventLog, GroupConsumer, GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, StartAt, TopicPartition,
            TopicSpec,
        },
    },
    streaming::config::{StreamConfig, Topics},
};

/// Which defence is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sabotage {
    /// Offsets are committed by a transaction of their own, before the output is.
    OffsetsFirst,
    /// Offsets are not committed at all.
    OffsetsDropped,
    /// Records become visible one by one as they are sent; nothing can be taken back.
    NoTransactions,
    /// Each start of a worker takes a transactional id of its own, and offsets are taken from any generation: a zombie may
    /// write.
    NoFencing,
    /// All workers share one transactional id.
    SharedId,
    /// A seek back after a failed transaction is forgotten.
    SeekForgotten,
    /// What is late is dropped.
    LateDropped,
    /// Rows of windows are sent twice.
    SentTwice,
    /// Duplicates are not recognised.
    NoDedup,
    /// A group without offsets begins at the end.
    LatestOnReset,
    /// Times far in the future are believed.
    FutureBelieved,
    /// An idle partition holds the others.
    NoIdleness,
    /// What is remembered of events is kept for ever: no horizon ends it.
    NoTtl,
    /// Nobody looks at the job, so nobody is told.
    Unwatched,
}

impl Sabotage {
    /// The configuration as it leaves it.
    pub fn config(self, config: &mut StreamConfig) {
        match self {
            Self::NoDedup => config.dedup_entries_max = 0,
            Self::LatestOnReset => config.start_at = StartAt::Latest,
            Self::FutureBelieved => config.future_bound = Duration::from_secs(7 * 86_400),
            Self::NoIdleness => config.idle_after = Duration::from_secs(7 * 86_400),
            Self::NoTtl => config.dedup_horizon = Duration::from_secs(7 * 86_400),
            Self::OffsetsFirst
            | Self::OffsetsDropped
            | Self::NoTransactions
            | Self::NoFencing
            | Self::SharedId
            | Self::SeekForgotten
            | Self::LateDropped
            | Self::SentTwice
            | Self::Unwatched => {}
        }
    }

    /// The log as it leaves it. `starts` counts the producers of all workers.
    pub fn log(self, inner: Arc<dyn EventLog>, topics: &Topics, starts: Arc<AtomicU64>) -> Arc<dyn EventLog> {
        Arc::new(Sabotaged { inner, how: self, topics: topics.clone(), starts })
    }
}

#[derive(Debug)]
struct Sabotaged {
    inner: Arc<dyn EventLog>,
    how: Sabotage,
    topics: Topics,
    starts: Arc<AtomicU64>,
}

#[async_trait]
impl EventLog for Sabotaged {
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        self.inner.create_topic(spec).await
    }
    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>> {
        self.inner.offsets(topic).await
    }
    async fn offsets_at(&self, topic: &str, time_ms: i64) -> Result<BTreeMap<i32, i64>> {
        self.inner.offsets_at(topic, time_ms).await
    }
    async fn committed(&self, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
        self.inner.committed(group, topic).await
    }
    async fn reset(&self, group: &str, offsets: &BTreeMap<TopicPartition, i64>) -> Result<()> {
        self.inner.reset(group, offsets).await
    }
    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)> {
        self.inner.read(partition, offset, max_records).await
    }
    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>> {
        let inner = self.inner.join(spec).await?;
        Ok(Box::new(Consumer { inner, how: self.how, assigned: Vec::new() }))
    }
    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>> {
        let number = self.starts.fetch_add(1, Ordering::SeqCst);
        let id = transactional_id.unwrap_or_default();
        let (main, aside) = match self.how {
            Sabotage::SharedId => (Some("everybody".to_owned()), None),
            Sabotage::NoFencing => (Some(format!("{id}-{number}")), None),
            Sabotage::NoTransactions => (None, Some(format!("{id}-offsets"))),
            Sabotage::OffsetsFirst => (Some(id.to_owned()), Some(format!("{id}-offsets"))),
            Sabotage::OffsetsDropped
            | Sabotage::SeekForgotten
            | Sabotage::LateDropped
            | Sabotage::SentTwice
            | Sabotage::NoDedup
            | Sabotage::LatestOnReset
            | Sabotage::FutureBelieved
            | Sabotage::NoIdleness
            | Sabotage::NoTtl
            | Sabotage::Unwatched => (Some(id.to_owned()), None),
        };
        let inner = self.inner.producer(main.as_deref()).await?;
        let aside = match aside {
            Some(id) => Some(self.inner.producer(Some(&id)).await?),
            None => None,
        };
        Ok(Box::new(Writer { inner, aside, how: self.how, topics: self.topics.clone() }))
    }
}

#[derive(Debug)]
struct Consumer {
    inner: Box<dyn GroupConsumer>,
    how: Sabotage,
    /// Partitions that came with the last poll: their first seek is where their state ends, not one back.
    assigned: Vec<TopicPartition>,
}

#[async_trait]
impl GroupConsumer for Consumer {
    async fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let polled = self.inner.poll(wait).await?;
        if let Polled::Assigned(partitions) = &polled {
            self.assigned.clone_from(partitions);
        }
        Ok(polled)
    }
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
        let is_first = self.assigned.contains(partition);
        self.assigned.retain(|p| p != partition);
        if self.how == Sabotage::SeekForgotten && !is_first {
            return Ok(());
        }
        self.inner.seek(partition, offset).await
    }
    async fn pause(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        self.inner.pause(partitions).await
    }
    async fn resume(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        self.inner.resume(partitions).await
    }
    fn metadata(&self) -> GroupMetadata {
        self.inner.metadata()
    }
    async fn close(&mut self) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct Writer {
    inner: Box<dyn Producer>,
    /// Commits offsets by itself.
    aside: Option<Box<dyn Producer>>,
    how: Sabotage,
    topics: Topics,
}

impl Writer {
    fn is_bare(&self) -> bool {
        self.how == Sabotage::NoTransactions
    }
}

#[async_trait]
impl Producer for Writer {
    async fn begin(&mut self) -> Result<()> {
        if self.is_bare() { Ok(()) } else { self.inner.begin().await }
    }
    async fn send(&mut self, mut records: Vec<OutRecord>) -> Result<()> {
        if self.how == Sabotage::LateDropped {
            records.retain(|record| record.topic != self.topics.late);
        }
        if self.how == Sabotage::SentTwice {
            let twice: Vec<OutRecord> = records.iter().filter(|record| record.topic == self.topics.metrics).cloned().collect();
            records.extend(twice);
        }
        self.inner.send(records).await
    }
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
        if let Some(aside) = &mut self.aside {
            aside.begin().await?;
            aside.send_offsets(offsets, group).await?;
            return aside.commit().await;
        }
        match self.how {
            // Without offsets in the transaction nothing asks for the generation either.
            Sabotage::OffsetsDropped | Sabotage::NoFencing => Ok(()),
            _ => self.inner.send_offsets(offsets, group).await,
        }
    }
    async fn commit(&mut self) -> Result<()> {
        if self.is_bare() { Ok(()) } else { self.inner.commit().await }
    }
    async fn abort(&mut self) -> Result<()> {
        if self.is_bare() { Ok(()) } else { self.inner.abort().await }
    }
}
