//! What processing and state cost, for stories in which the job falls behind by its own doing: a wrapper round the log that a
//! worker is given. Nothing in the job knows of it.
//!
//! A record takes a worker a fixed time. A commit begins with a snapshot of all state of the worker's partitions, and takes a
//! time for each megabyte beyond what costs nothing. The state is what really stands in the changelogs, so what the job sheds
//! costs nothing any more. A run cannot hold gigabytes, so each byte of it stands for `scale` bytes of the account. Left out:
//! the time to restore a partition, and what memory or disks can hold.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use simulacro_core::{
    ports::{
        Env, Result,
        event_log::{
            EventLog, GroupConsumer, GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, TopicPartition, TopicSpec,
        },
    },
    streaming::config::Topics,
};
use simulacro_log::{Request, Response};

use super::process::HostEnv;
use crate::broker::SimBroker;

const MEGABYTE: u64 = 1_000_000;

/// What it costs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cost {
    /// Records that a worker processes in a second, while it does not commit.
    pub records_per_s: u64,
    /// Bytes of the account for each byte of the job's state.
    pub scale: u64,
    /// Megabytes of the account, up to which a commit takes no time.
    pub free_mb: u64,
    /// Milliseconds of a commit for each megabyte beyond.
    pub ms_per_mb: u64,
}

impl Cost {
    pub(super) fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u64, low: u64, high: u64| match (low..=high).contains(&value) {
            true => Ok(()),
            false => Err(format!("cost.{name}: found {value}, expected {low} to {high}")),
        };
        within("records_per_s", self.records_per_s, 1, 1_000_000)?;
        within("scale", self.scale, 1, 1_000_000)?;
        within("free_mb", self.free_mb, 0, 1_000_000)?;
        within("ms_per_mb", self.ms_per_mb, 0, 60_000)
    }

    /// State of the account, in megabytes.
    pub fn megabytes(&self, bytes: u64) -> u64 {
        bytes.saturating_mul(self.scale) / MEGABYTE
    }

    /// How long a snapshot of so many bytes of the job's state takes.
    pub fn snapshot(&self, bytes: u64) -> Duration {
        let beyond = bytes.saturating_mul(self.scale).saturating_sub(self.free_mb * MEGABYTE);
        Duration::from_micros(beyond.saturating_mul(self.ms_per_mb) / 1_000)
    }

    fn processing(&self, records: usize) -> Duration {
        Duration::from_micros(records as u64 * 1_000_000 / self.records_per_s)
    }
}

/// Live records of one partition of a changelog.
#[derive(Debug, Default)]
struct Part {
    next: i64,
    live: BTreeMap<Bytes, usize>,
    bytes: u64,
}

/// What stands in the changelogs. It reads on where it has stopped, so that asking often costs little.
#[derive(Debug)]
struct Meter {
    broker: Arc<SimBroker>,
    parts: BTreeMap<TopicPartition, Part>,
}

impl Meter {
    fn bytes(&mut self, partition: &TopicPartition) -> u64 {
        let part = self.parts.entry(partition.clone()).or_default();
        loop {
            let fetch =
                Request::Fetch { partition: partition.clone(), offset: part.next, records_max: 100_000, bytes_max: 64 << 20 };
            // There is no such topic before the job has begun.
            let Ok(Response::Fetched(fetched)) = self.broker.peek(fetch) else { return part.bytes };
            for record in fetched.records {
                let Some(key) = record.key else { continue };
                let size = record.value.filter(|value| !value.0.is_empty()).map(|value| key.0.len() + value.0.len());
                let before = match size {
                    Some(size) => part.live.insert(key.0, size),
                    None => part.live.remove(&key.0),
                };
                part.bytes = part.bytes + size.unwrap_or(0) as u64 - before.unwrap_or(0) as u64;
            }
            if fetched.next_offset <= part.next {
                return part.bytes;
            }
            part.next = fetched.next_offset;
        }
    }
}

/// The costs of a run, shared by its workers.
#[derive(Debug)]
pub struct Costs {
    cost: Cost,
    topics: Topics,
    meter: Mutex<Meter>,
    /// How long the newest commit of each worker took.
    took: Mutex<BTreeMap<String, Duration>>,
}

impl Costs {
    /// Costs over a broker's changelogs.
    pub fn new(cost: Cost, topics: Topics, broker: Arc<SimBroker>) -> Arc<Self> {
        Arc::new(Self { cost, topics, meter: Mutex::new(Meter { broker, parts: BTreeMap::new() }), took: Mutex::default() })
    }

    fn meter(&self) -> MutexGuard<'_, Meter> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn took(&self) -> MutexGuard<'_, BTreeMap<String, Duration>> {
        self.took.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of state that belong to partitions of the input and of the partials.
    fn bytes(&self, owned: &BTreeSet<TopicPartition>) -> u64 {
        let mut meter = self.meter();
        let state_of = |at: &TopicPartition| {
            let topic = if at.topic == self.topics.clicks { &self.topics.changelog } else { &self.topics.merge_changelog };
            TopicPartition { topic: topic.clone(), partition: at.partition }
        };
        owned.iter().map(|at| meter.bytes(&state_of(at))).sum()
    }

    /// All state, in megabytes of the account, of so many partitions of the input and of the partials.
    pub fn megabytes(&self, clicks: i32, partials: i32) -> u64 {
        let of = |topic: &str, partitions: i32| {
            let topic = topic.to_owned();
            (0..partitions).map(move |partition| TopicPartition { topic: topic.clone(), partition })
        };
        let all = of(&self.topics.clicks, clicks).chain(of(&self.topics.partials, partials)).collect();
        self.cost.megabytes(self.bytes(&all))
    }

    /// The newest commit of the worker whose commit took longest, in milliseconds.
    pub fn commit_ms(&self) -> u64 {
        self.took().values().max().map_or(0, |took| took.as_millis() as u64)
    }

    /// The log as a worker has it that pays for what it does.
    pub fn log(self: &Arc<Self>, inner: Arc<dyn EventLog>, env: Arc<HostEnv>) -> Arc<dyn EventLog> {
        Arc::new(Paying { inner, payer: Payer { costs: self.clone(), env, owned: Arc::default() } })
    }
}

#[derive(Debug, Clone)]
struct Payer {
    costs: Arc<Costs>,
    env: Arc<HostEnv>,
    owned: Arc<Mutex<BTreeSet<TopicPartition>>>,
}

impl Payer {
    fn owned(&self) -> MutexGuard<'_, BTreeSet<TopicPartition>> {
        self.owned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct Paying {
    inner: Arc<dyn EventLog>,
    payer: Payer,
}

#[async_trait]
impl EventLog for Paying {
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
        self.payer.owned().clear();
        Ok(Box::new(Consumer { inner, payer: self.payer.clone() }))
    }
    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>> {
        let inner = self.inner.producer(transactional_id).await?;
        Ok(Box::new(Writer { inner, payer: self.payer.clone(), began: Duration::ZERO }))
    }
}

#[derive(Debug)]
struct Consumer {
    inner: Box<dyn GroupConsumer>,
    payer: Payer,
}

#[async_trait]
impl GroupConsumer for Consumer {
    async fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let polled = self.inner.poll(wait).await?;
        match &polled {
            Polled::Nothing => {}
            Polled::Assigned(partitions) => self.payer.owned().extend(partitions.iter().cloned()),
            Polled::Revoked(partitions) | Polled::Lost(partitions) => {
                self.payer.owned().retain(|at| !partitions.contains(at));
            }
            Polled::Records { records, .. } => {
                let takes = self.payer.costs.cost.processing(records.len());
                if !takes.is_zero() {
                    self.payer.env.sleep(takes).await;
                }
            }
        }
        Ok(polled)
    }
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
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
    payer: Payer,
    /// When the newest transaction began.
    began: Duration,
}

#[async_trait]
impl Producer for Writer {
    async fn begin(&mut self) -> Result<()> {
        self.began = self.payer.env.elapsed();
        let owned = self.payer.owned().clone();
        let takes = self.payer.costs.cost.snapshot(self.payer.costs.bytes(&owned));
        if !takes.is_zero() {
            // Before the transaction is open, so that no time limit of the broker's ends it.
            self.payer.env.sleep(takes).await;
        }
        self.inner.begin().await
    }
    async fn send(&mut self, records: Vec<OutRecord>) -> Result<()> {
        self.inner.send(records).await
    }
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
        self.inner.send_offsets(offsets, group).await
    }
    async fn commit(&mut self) -> Result<()> {
        self.inner.commit().await?;
        let took = self.payer.env.elapsed().saturating_sub(self.began);
        self.payer.costs.took().insert(self.payer.env.process().name.clone(), took);
        Ok(())
    }
    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

#[cfg(test)]
mod tests {

    use simulacro_log::{Limits, Settings};

    use super::*;

    /// The two points that the account of the incident tells.
    #[test]
    fn a_commit_of_a_small_state_is_short_and_of_a_large_one_long() {
        let cost = Cost { records_per_s: 2_000, scale: 1_000, free_mb: 250, ms_per_mb: 20 };
        let told = [(0, 0), (250_000, 0), (500_000, 5), (2_500_000, 45)];
        for (bytes, seconds) in told {
            assert_eq!(cost.snapshot(bytes), Duration::from_secs(seconds), "{bytes} bytes");
        }
        assert_eq!((cost.megabytes(2_500_000), cost.processing(500)), (2_500, Duration::from_millis(250)));
        let zero = Cost { records_per_s: 0, ..cost };
        assert!(zero.check().expect_err("a zero").contains("cost.records_per_s: found 0, expected 1 to 1000000"));
    }

    #[tokio::test]
    async fn the_meter_knows_what_is_live_and_what_was_taken_away() {
        let env = Arc::new(super::super::process::WorldEnv);
        let broker = SimBroker::new(env, Limits::KAFKA, Duration::ZERO);
        let log = broker.client(Settings::KAFKA);
        let spec = TopicSpec { name: "changelog".into(), partitions: 1, retention: None, compact: true };
        log.create_topic(&spec).await.expect("a topic");
        let at = TopicPartition { topic: "changelog".into(), partition: 0 };
        let mut meter = Meter { broker, parts: BTreeMap::new() };
        let mut producer = log.producer(None).await.expect("a producer");
        for (key, value, expected) in
            [("a", Some("12345"), 6), ("b", Some("1"), 8), ("a", Some("123"), 6), ("b", None, 4), ("c", None, 4), ("a", None, 0)]
        {
            let record = OutRecord {
                topic: "changelog".into(),
                partition: Some(0),
                key: Some(Bytes::from(key)),
                value: value.map(Bytes::from),
                headers: Vec::new(),
            };
            producer.send(vec![record]).await.expect("sent");
            assert_eq!(meter.bytes(&at), expected, "after {key} {value:?}");
        }
    }
}
