//! An event log in memory for one worker: the topic of clicks is a file's content, the others are kept as Kafka keeps them.
//!
//! It does what the port says as far as one member and one producer can tell, as cheaply as it can, so that what is measured
//! is the job. A wait for records that will not come moves the clock instead of waiting. Compacted topics keep the newest
//! record of a key, and records of the job's own that were read are dropped. Left out: other members, failures, time-outs.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use simulacro_core::ports::{
    Env, Metrics, PortError, Result,
    event_log::{
        EventLog, GroupConsumer, GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, TopicPartition, TopicSpec,
    },
};

use crate::events::{Input, Span};

/// The machine's clock, moved on by waits that were not waited.
#[derive(Debug, Default)]
pub struct SkippingClock {
    skipped_ms: AtomicI64,
}

#[async_trait]
impl Env for SkippingClock {
    fn now(&self) -> DateTime<Utc> {
        Utc::now() + chrono::Duration::milliseconds(self.skipped_ms.load(Ordering::Relaxed))
    }
    async fn sleep(&self, duration: Duration) {
        self.skipped_ms.fetch_add(duration.as_millis() as i64, Ordering::Relaxed);
    }
    fn new_id(&self) -> String {
        String::new()
    }
    fn random(&self) -> u64 {
        0
    }
}

/// Nobody reads them here.
#[derive(Debug)]
pub struct NoMetrics;

impl Metrics for NoMetrics {
    fn count(&self, _: &'static str, _: &[(&'static str, &str)], _: u64) {}
    fn gauge(&self, _: &'static str, _: &[(&'static str, &str)], _: f64) {}
}

/// Where the records of the topic of clicks come from.
pub trait Clicks: std::fmt::Debug + Send + Sync {
    /// Number of partitions.
    fn partitions(&self) -> usize;
    /// Number of records of a partition.
    fn records(&self, partition: usize) -> usize;
    /// The value of a record.
    fn value(&self, partition: usize, offset: usize) -> Bytes;
}

impl Clicks for Input {
    fn partitions(&self) -> usize {
        self.partitions.len()
    }
    fn records(&self, partition: usize) -> usize {
        self.partitions[partition].len()
    }
    fn value(&self, partition: usize, offset: usize) -> Bytes {
        let span: Span = self.partitions[partition][offset];
        self.shared(span)
    }
}

/// A partition of a topic that the job writes.
#[derive(Debug, Default)]
struct Kept {
    compact: bool,
    end: i64,
    records: VecDeque<LogRecord>,
    newest: BTreeMap<Bytes, LogRecord>,
}

impl Kept {
    fn append(&mut self, record: OutRecord) {
        let OutRecord { key, value, headers, .. } = record;
        let kept = LogRecord { offset: self.end, appended_ms: 0, key: key.clone(), value, headers };
        self.end += 1;
        match key {
            Some(key) if self.compact && kept.value.is_none() => {
                self.newest.remove(&key);
            }
            Some(key) if self.compact => {
                self.newest.insert(key, kept);
            }
            Some(_) | None => self.records.push_back(kept),
        }
    }
    fn read(&self, from: i64, most: usize) -> (Vec<LogRecord>, i64) {
        let mut records: Vec<LogRecord> = if self.compact {
            let mut all: Vec<_> = self.newest.values().filter(|r| r.offset >= from).cloned().collect();
            all.sort_by_key(|r| r.offset);
            all
        } else {
            let first = self.records.partition_point(|r| r.offset < from);
            self.records.range(first..).take(most + 1).cloned().collect()
        };
        if records.len() > most {
            records.truncate(most);
            let next = records.last().map_or(from, |r| r.offset + 1);
            return (records, next);
        }
        (records, self.end)
    }
    fn bytes(&self) -> usize {
        let size = |r: &LogRecord| r.key.as_ref().map_or(0, Bytes::len) + r.value.as_ref().map_or(0, Bytes::len);
        self.records.iter().chain(self.newest.values()).map(size).sum()
    }
}

#[derive(Debug, Default)]
struct State {
    topics: BTreeMap<String, Vec<Kept>>,
    committed: BTreeMap<TopicPartition, i64>,
}

/// The log. Clones are the same log.
#[derive(Debug, Clone)]
pub struct MemoryLog {
    clicks: Arc<dyn Clicks>,
    topic: String,
    poll_records: usize,
    clock: Arc<SkippingClock>,
    state: Arc<Mutex<State>>,
}

fn no_such(topic: &str) -> PortError {
    PortError::permanent(format!("find topic {topic}")).code("UNKNOWN_TOPIC_OR_PARTITION")
}

impl MemoryLog {
    /// A log whose topic `topic` has these records; a poll brings at most `poll_records`.
    pub fn new(clicks: Arc<dyn Clicks>, topic: &str, poll_records: usize, clock: Arc<SkippingClock>) -> Self {
        Self { clicks, topic: topic.to_owned(), poll_records, clock, state: Arc::default() }
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// All values of a topic that the job writes.
    pub fn values(&self, topic: &str) -> Vec<Option<Bytes>> {
        let state = self.state();
        state.topics.get(topic).into_iter().flatten().flat_map(|p| p.records.iter().map(|r| r.value.clone())).collect()
    }
    /// Drops what a topic holds.
    pub fn clear(&self, topic: &str) {
        self.state().topics.get_mut(topic).into_iter().flatten().for_each(|p| p.records.clear());
    }
    /// Bytes of keys and values that a topic holds.
    pub fn bytes(&self, topic: &str) -> usize {
        self.state().topics.get(topic).into_iter().flatten().map(Kept::bytes).sum()
    }
    fn click(&self, partition: usize, offset: usize) -> LogRecord {
        // Appended when everything is past: no event is ahead of its time.
        let value = Some(self.clicks.value(partition, offset));
        LogRecord { offset: offset as i64, appended_ms: i64::MAX / 2, key: None, value, headers: Vec::new() }
    }
}

#[async_trait]
impl EventLog for MemoryLog {
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        let made = || (0..spec.partitions).map(|_| Kept { compact: spec.compact, ..Kept::default() }).collect();
        self.state().topics.entry(spec.name.clone()).or_insert_with(made);
        Ok(())
    }
    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>> {
        if topic == self.topic {
            return Ok((0..self.clicks.partitions()).map(|p| (p as i32, (0, self.clicks.records(p) as i64))).collect());
        }
        let state = self.state();
        let all = state.topics.get(topic).ok_or_else(|| no_such(topic))?;
        Ok(all.iter().enumerate().map(|(p, kept)| (p as i32, (0, kept.end))).collect())
    }
    async fn offsets_at(&self, topic: &str, _: i64) -> Result<BTreeMap<i32, i64>> {
        Err(PortError::permanent(format!("find the offsets of {topic} at a time: this log keeps no times")))
    }
    async fn committed(&self, _: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
        let state = self.state();
        Ok(state.committed.iter().filter(|(at, _)| at.topic == topic).map(|(at, offset)| (at.partition, *offset)).collect())
    }
    async fn reset(&self, group: &str, _: &BTreeMap<TopicPartition, i64>) -> Result<()> {
        Err(PortError::permanent(format!("reset {group}: this log resets nothing")))
    }
    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)> {
        let state = self.state();
        let kept = state.topics.get(&partition.topic).and_then(|all| all.get(partition.partition as usize));
        Ok(kept.ok_or_else(|| no_such(&partition.topic))?.read(offset, max_records))
    }
    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>> {
        let mut all = Vec::new();
        for topic in &spec.topics {
            all.extend(
                self.offsets(topic).await?.into_keys().map(|partition| TopicPartition { topic: topic.clone(), partition }),
            );
        }
        let positions = all.into_iter().map(|at| (at, 0, false, -1)).collect();
        Ok(Box::new(Consumer { log: self.clone(), group: spec.group.clone(), positions, assigned: false, turn: 0 }))
    }
    async fn producer(&self, _: Option<&str>) -> Result<Box<dyn Producer>> {
        Ok(Box::new(Writer { log: self.clone(), records: Vec::new(), offsets: BTreeMap::new() }))
    }
}

#[derive(Debug)]
struct Consumer {
    log: MemoryLog,
    group: String,
    /// Next offset of each partition, whether it is paused, and the last end that was told.
    positions: Vec<(TopicPartition, i64, bool, i64)>,
    assigned: bool,
    turn: usize,
}

impl Consumer {
    fn at(&mut self, partition: &TopicPartition) -> Result<&mut (TopicPartition, i64, bool, i64)> {
        let unknown = || PortError::permanent(format!("find {}-{}: not assigned", partition.topic, partition.partition));
        self.positions.iter_mut().find(|(at, ..)| at == partition).ok_or_else(unknown)
    }
}

#[async_trait]
impl GroupConsumer for Consumer {
    async fn poll(&mut self, wait: Duration) -> Result<Polled> {
        if !self.assigned {
            self.assigned = true;
            return Ok(Polled::Assigned(self.positions.iter().map(|(at, ..)| at.clone()).collect()));
        }
        let count = self.positions.len();
        for turn in 0..count {
            let log = self.log.clone();
            let (at, position, paused, told) = &mut self.positions[(self.turn + turn) % count];
            if *paused {
                continue;
            }
            let (records, next, end) = if at.topic == log.topic {
                let (partition, first) = (at.partition as usize, *position as usize);
                let end = log.clicks.records(partition);
                let next = end.min(first + log.poll_records);
                ((first..next).map(|offset| log.click(partition, offset)).collect(), next as i64, end as i64)
            } else {
                let state = log.state();
                let kept = &state.topics[&at.topic][at.partition as usize];
                let (records, next) = kept.read(*position, log.poll_records);
                (records, next, kept.end)
            };
            if records.is_empty() && *told == end {
                continue;
            }
            (*position, *told) = (next, end);
            let partition = at.clone();
            self.turn += turn + 1;
            return Ok(Polled::Records { partition, records, next_offset: next, end_offset: end });
        }
        self.log.clock.sleep(wait).await;
        Ok(Polled::Nothing)
    }
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
        let at = self.at(partition)?;
        (at.1, at.3) = (offset, -1);
        Ok(())
    }
    async fn pause(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        partitions.iter().try_for_each(|partition| self.at(partition).map(|at| at.2 = true))
    }
    async fn resume(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        partitions.iter().try_for_each(|partition| self.at(partition).map(|at| at.2 = false))
    }
    fn metadata(&self) -> GroupMetadata {
        GroupMetadata { group: self.group.clone(), member: "only".into(), generation: 1 }
    }
    async fn close(&mut self) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct Writer {
    log: MemoryLog,
    records: Vec<OutRecord>,
    offsets: BTreeMap<TopicPartition, i64>,
}

#[async_trait]
impl Producer for Writer {
    async fn begin(&mut self) -> Result<()> {
        Ok(())
    }
    async fn send(&mut self, records: Vec<OutRecord>) -> Result<()> {
        self.records.extend(records);
        Ok(())
    }
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, _: &GroupMetadata) -> Result<()> {
        self.offsets.extend(offsets.iter().map(|(at, offset)| (at.clone(), *offset)));
        Ok(())
    }
    async fn commit(&mut self) -> Result<()> {
        let mut state = self.log.state();
        for record in self.records.drain(..) {
            let all = state.topics.get_mut(&record.topic).ok_or_else(|| no_such(&record.topic))?;
            let partition = record.partition.unwrap_or(0) as usize;
            all.get_mut(partition).ok_or_else(|| no_such(&record.topic))?.append(record);
        }
        for (at, offset) in std::mem::take(&mut self.offsets) {
            // Nobody reads again what was read and committed.
            if let Some(kept) = state.topics.get_mut(&at.topic).and_then(|all| all.get_mut(at.partition as usize)) {
                while kept.records.front().is_some_and(|r| r.offset < offset) {
                    kept.records.pop_front();
                }
            }
            state.committed.insert(at, offset);
        }
        Ok(())
    }
    async fn abort(&mut self) -> Result<()> {
        self.records.clear();
        self.offsets.clear();
        Ok(())
    }
}
