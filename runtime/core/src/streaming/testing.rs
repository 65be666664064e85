//! A log in memory for tests, with groups, transactions, markers, compaction and faults; and a codec in JSON.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use arrow::array::{Int64Array, StringArray};
use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{
    event::{ClickBatch, ClickDecoder, Decoded, Undecodable},
    window::{MetricEncoder, MetricRow},
};
use crate::ports::{
    Env, Metrics, PortError, Result,
    event_log::{
        EventLog, GroupConsumer, GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, TopicPartition, TopicSpec,
    },
};

/// A clock that moves when somebody sleeps.
#[derive(Debug, Clone)]
pub struct TestEnv(pub Arc<AtomicI64>);

#[async_trait]
impl Env for TestEnv {
    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(self.0.load(Ordering::SeqCst)).unwrap()
    }
    async fn sleep(&self, duration: Duration) {
        self.0.fetch_add(duration.as_millis() as i64, Ordering::SeqCst);
    }
    fn random(&self) -> u64 {
        unreachable!("the stream draws nothing")
    }
    fn new_id(&self) -> String {
        unreachable!("the stream needs no ids")
    }
}

#[derive(Debug)]
pub struct NoMetrics;

impl Metrics for NoMetrics {
    fn count(&self, _: &'static str, _: &[(&'static str, &str)], _: u64) {}
    fn gauge(&self, _: &'static str, _: &[(&'static str, &str)], _: f64) {}
}

/// What a producer call does instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing happens, and the caller may repeat.
    Retryable,
    /// Nothing happens, and the caller cannot know.
    UnknownBefore,
    /// It happens, and the caller cannot know.
    UnknownAfter,
    /// The worker dies before the call.
    CrashBefore,
    /// The worker dies after the call.
    CrashAfter,
}

#[derive(Debug, Default)]
struct Partition {
    records: Vec<LogRecord>,
    end: i64,
}

#[derive(Debug, Default)]
struct Inner {
    topics: BTreeMap<String, (TopicSpec2, Vec<Partition>)>,
    committed: BTreeMap<(String, TopicPartition), i64>,
    members: BTreeMap<String, u64>,
    owners: BTreeMap<TopicPartition, String>,
    subscribed: BTreeSet<String>,
    joins: u64,
    epochs: BTreeMap<String, u64>,
    calls: u64,
    faults: BTreeMap<u64, Fault>,
    poll_records: usize,
    polls: u64,
    failing_polls: u32,
    failing_offsets: u32,
    look_ms: i64,
    commit_ms: i64,
    sessions: bool,
    holding: bool,
}

#[derive(Debug, Clone, Default)]
struct TopicSpec2 {
    compact: bool,
}

/// The log. Clones are the same log.
#[derive(Debug, Clone)]
pub struct MemoryLog {
    inner: Arc<Mutex<Inner>>,
    pub env: TestEnv,
}

impl MemoryLog {
    pub fn new(now_ms: i64, poll_records: usize) -> Self {
        let inner = Inner { poll_records, ..Inner::default() };
        Self { inner: Arc::new(Mutex::new(inner)), env: TestEnv(Arc::new(AtomicI64::new(now_ms))) }
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }
    /// Lets the producer call with this ordinal, counted from now, fail.
    pub fn fail(&self, ordinal: u64, fault: Fault) {
        let mut inner = self.lock();
        let at = inner.calls + ordinal;
        inner.faults.insert(at, fault);
    }
    /// Lets the next polls fail.
    pub fn fail_polls(&self, polls: u32) {
        self.lock().failing_polls = polls;
    }
    /// Lets the next questions for the offsets of a topic fail, as while its leader changes.
    pub fn fail_offsets(&self, questions: u32) {
        self.lock().failing_offsets = questions;
    }
    /// Lets each look at the log take so long, and members that do not poll within their session lose their partitions.
    pub fn slow_down(&self, look_ms: i64) {
        let mut inner = self.lock();
        (inner.look_ms, inner.sessions) = (look_ms, true);
    }
    /// Lets each commit of a transaction take so long.
    pub fn slow_commits(&self, commit_ms: i64) {
        self.lock().commit_ms = commit_ms;
    }
    /// Polls bring no records any more.
    pub fn hold_records(&self) {
        self.lock().holding = true;
    }
    fn look(&self) -> MutexGuard<'_, Inner> {
        let inner = self.lock();
        self.env.0.fetch_add(inner.look_ms, Ordering::SeqCst);
        inner
    }
    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }
    /// Polls so far.
    pub fn polls(&self) -> u64 {
        self.lock().polls
    }
    /// Producer calls so far.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }
    /// Appends a record from outside.
    pub fn append(&self, topic: &str, partition: i32, key: &str, value: Option<Bytes>, appended_ms: i64) {
        let mut inner = self.lock();
        let p = &mut inner.topics.get_mut(topic).unwrap().1[partition as usize];
        let key = Some(Bytes::copy_from_slice(key.as_bytes()));
        p.records.push(LogRecord { offset: p.end, appended_ms, key, value, headers: vec![] });
        p.end += 1;
    }
    /// Moves a group's offset, as an operator might.
    pub fn set_committed(&self, group: &str, at: TopicPartition, offset: i64) {
        self.lock().committed.insert((group.to_owned(), at), offset);
    }
    /// All records of a topic, in order of partition and offset.
    pub fn all(&self, topic: &str) -> Vec<LogRecord> {
        self.lock().topics.get(topic).map(|(_, ps)| ps.iter().flat_map(|p| p.records.clone()).collect()).unwrap_or_default()
    }
    /// Takes a member out of the group, as a timed out session does.
    pub fn expel(&self, member: &str) {
        let mut inner = self.lock();
        inner.members.remove(member);
        inner.owners.retain(|_, owner| owner != member);
    }
    /// Keeps the newest record of each key in compacted topics, and drops tombstones.
    pub fn compact(&self) {
        for (spec, partitions) in self.lock().topics.values_mut() {
            if !spec.compact {
                continue;
            }
            for p in partitions {
                let mut newest = BTreeMap::new();
                p.records.iter().for_each(|r| {
                    newest.insert(r.key.clone(), r.offset);
                });
                p.records.retain(|r| newest[&r.key] == r.offset && r.value.is_some());
            }
        }
    }
    fn targets(inner: &Inner) -> BTreeMap<TopicPartition, String> {
        let members: Vec<&String> = inner.members.keys().collect();
        let mut targets = BTreeMap::new();
        let mut next = 0;
        for topic in &inner.subscribed {
            for partition in 0..inner.topics[topic].1.len() {
                if !members.is_empty() {
                    let at = TopicPartition { topic: topic.clone(), partition: partition as i32 };
                    targets.insert(at, members[next % members.len()].clone());
                    next += 1;
                }
            }
        }
        targets
    }
}

#[async_trait]
impl EventLog for MemoryLog {
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        let mut inner = self.lock();
        let new = || (TopicSpec2 { compact: spec.compact }, (0..spec.partitions).map(|_| Partition::default()).collect());
        let (_, partitions) = inner.topics.entry(spec.name.clone()).or_insert_with(new);
        if partitions.len() == spec.partitions as usize {
            Ok(())
        } else {
            Err(PortError::permanent("create topic with another number of partitions"))
        }
    }
    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>> {
        let mut inner = self.look();
        if inner.failing_offsets > 0 {
            inner.failing_offsets -= 1;
            return Err(PortError::retryable(format!("offsets of {topic}")).code("NOT_LEADER_OR_FOLLOWER"));
        }
        let unknown = || PortError::permanent(format!("offsets of {topic}")).code("UNKNOWN_TOPIC_OR_PARTITION");
        let (_, partitions) = inner.topics.get(topic).ok_or_else(unknown)?;
        Ok(partitions.iter().enumerate().map(|(p, s)| (p as i32, (0, s.end))).collect())
    }
    async fn offsets_at(&self, topic: &str, time_ms: i64) -> Result<BTreeMap<i32, i64>> {
        let inner = self.lock();
        let first = |p: &Partition| p.records.iter().find(|r| r.appended_ms >= time_ms).map_or(p.end, |r| r.offset);
        Ok(inner.topics[topic].1.iter().enumerate().map(|(p, s)| (p as i32, first(s))).collect())
    }
    async fn committed(&self, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
        let inner = self.look();
        let mine = inner.committed.iter().filter(|((g, tp), _)| g == group && tp.topic == topic);
        Ok(mine.map(|((_, tp), &offset)| (tp.partition, offset)).collect())
    }
    async fn reset(&self, group: &str, offsets: &BTreeMap<TopicPartition, i64>) -> Result<()> {
        let mut inner = self.lock();
        if !inner.members.is_empty() {
            return Err(PortError::retryable("reset").code("NON_EMPTY_GROUP"));
        }
        inner.committed.extend(offsets.iter().map(|(at, offset)| ((group.to_owned(), at.clone()), *offset)));
        Ok(())
    }
    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)> {
        let inner = self.look();
        let p = &inner.topics[&partition.topic].1[partition.partition as usize];
        Ok(slice(p, offset, max_records))
    }
    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>> {
        let mut inner = self.lock();
        inner.joins += 1;
        let join = inner.joins;
        // The same name takes the place of its predecessor.
        inner.owners.retain(|_, owner| *owner != spec.member);
        inner.members.insert(spec.member.clone(), join);
        inner.subscribed.extend(spec.topics.iter().cloned());
        drop(inner);
        Ok(Box::new(MemoryConsumer {
            log: self.clone(),
            spec: spec.clone(),
            join,
            polled_ms: None,
            positions: BTreeMap::new(),
            told_end: BTreeMap::new(),
            releasing: vec![],
            paused: BTreeSet::new(),
            turn: 0,
        }))
    }
    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>> {
        let id = transactional_id.unwrap().to_owned();
        let mut inner = self.lock();
        let epoch = inner.epochs.entry(id.clone()).or_insert(0);
        *epoch += 1;
        let epoch = *epoch;
        drop(inner);
        let open = None;
        Ok(Box::new(MemoryProducer { log: self.clone(), id, epoch, open, last_committed: false }))
    }
}

fn slice(p: &Partition, offset: i64, max_records: usize) -> (Vec<LogRecord>, i64) {
    let records: Vec<LogRecord> = p.records.iter().filter(|r| r.offset >= offset).take(max_records).cloned().collect();
    let is_last = records.len() < max_records || records.last().map(|r| r.offset) == p.records.last().map(|r| r.offset);
    let next = if is_last { p.end.max(offset) } else { records.last().unwrap().offset + 1 };
    (records, next)
}

#[derive(Debug)]
struct MemoryConsumer {
    log: MemoryLog,
    spec: GroupSpec,
    join: u64,
    polled_ms: Option<i64>,
    positions: BTreeMap<TopicPartition, i64>,
    told_end: BTreeMap<TopicPartition, i64>,
    releasing: Vec<TopicPartition>,
    paused: BTreeSet<TopicPartition>,
    turn: usize,
}

#[async_trait]
impl GroupConsumer for MemoryConsumer {
    async fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let polled = {
            let mut inner = self.log.lock();
            inner.polls += 1;
            if inner.failing_polls > 0 {
                inner.failing_polls -= 1;
                return Err(PortError::retryable("poll").code("NETWORK_EXCEPTION"));
            }
            let member = &self.spec.member;
            let now_ms = self.log.env.0.load(Ordering::SeqCst);
            let silent_ms = self.polled_ms.replace(now_ms).map_or(0, |before| now_ms - before);
            if inner.sessions && silent_ms > self.spec.session_timeout.as_millis() as i64 {
                inner.members.remove(member);
            }
            if inner.members.get(member) != Some(&self.join) {
                inner.joins += 1;
                self.join = inner.joins;
                inner.owners.retain(|_, owner| owner != member);
                inner.members.insert(member.clone(), self.join);
                self.releasing.clear();
                self.paused.clear();
                let lost: Vec<_> = std::mem::take(&mut self.positions).into_keys().collect();
                if !lost.is_empty() {
                    return Ok(Polled::Lost(lost));
                }
            }
            for at in std::mem::take(&mut self.releasing) {
                inner.owners.remove(&at);
                self.positions.remove(&at);
                self.paused.remove(&at);
            }
            let targets = MemoryLog::targets(&inner);
            let revoked: Vec<_> = self.positions.keys().filter(|at| targets.get(at) != Some(member)).cloned().collect();
            if !revoked.is_empty() {
                self.releasing = revoked.clone();
                return Ok(Polled::Revoked(revoked));
            }
            let mine = targets.iter().filter(|(at, target)| *target == member && !inner.owners.contains_key(at));
            let assigned: Vec<_> = mine.map(|(at, _)| at.clone()).collect();
            if !assigned.is_empty() {
                for at in &assigned {
                    inner.owners.insert(at.clone(), member.clone());
                    let committed = inner.committed.get(&(self.spec.group.clone(), at.clone())).copied().unwrap_or(0);
                    self.positions.insert(at.clone(), committed);
                    self.told_end.remove(at);
                }
                return Ok(Polled::Assigned(assigned));
            }
            let may_read = |at: &&TopicPartition| !inner.holding && !self.paused.contains(*at);
            let candidates: Vec<_> = self.positions.keys().filter(may_read).cloned().collect();
            let mut polled = Polled::Nothing;
            for i in 0..candidates.len() {
                let at = &candidates[(self.turn + i) % candidates.len()];
                let p = &inner.topics[&at.topic].1[at.partition as usize];
                let position = self.positions[at];
                if position < p.end || self.told_end.get(at) != Some(&p.end) {
                    let (records, next_offset) = slice(p, position, inner.poll_records);
                    self.told_end.insert(at.clone(), p.end);
                    self.positions.insert(at.clone(), next_offset);
                    polled = Polled::Records { partition: at.clone(), records, next_offset, end_offset: p.end };
                    self.turn += i + 1;
                    break;
                }
            }
            polled
        };
        // Time passes at every poll, faster when there is nothing to do.
        self.log.env.sleep(if polled == Polled::Nothing { wait } else { Duration::from_millis(20) }).await;
        Ok(polled)
    }
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
        match self.positions.get_mut(partition) {
            Some(position) => {
                *position = offset;
                self.told_end.remove(partition);
                Ok(())
            }
            None => Err(PortError::permanent("seek on a partition of somebody else")),
        }
    }
    async fn pause(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        self.paused.extend(partitions.iter().cloned());
        Ok(())
    }
    async fn resume(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        partitions.iter().for_each(|p| {
            self.paused.remove(p);
        });
        Ok(())
    }
    fn metadata(&self) -> GroupMetadata {
        GroupMetadata { group: self.spec.group.clone(), member: self.spec.member.clone(), generation: self.join as i32 }
    }
    async fn close(&mut self) -> Result<()> {
        self.log.expel(&self.spec.member);
        Ok(())
    }
}

type Open = (Vec<OutRecord>, BTreeMap<TopicPartition, i64>, Option<GroupMetadata>);

#[derive(Debug)]
struct MemoryProducer {
    log: MemoryLog,
    id: String,
    epoch: u64,
    open: Option<Open>,
    last_committed: bool,
}

impl MemoryProducer {
    /// Whether the call takes effect, and what the caller is told.
    fn call(&mut self, effect: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let fault = {
            let mut inner = self.log.lock();
            if inner.epochs[&self.id] != self.epoch {
                return Err(PortError::permanent("produce").code("INVALID_PRODUCER_EPOCH"));
            }
            let ordinal = inner.calls;
            inner.calls += 1;
            inner.faults.remove(&ordinal)
        };
        match fault {
            None => effect(self),
            Some(Fault::Retryable) => Err(PortError::retryable("produce")),
            Some(Fault::UnknownBefore) => Err(PortError::unknown("produce")),
            Some(Fault::UnknownAfter) => effect(self).and(Err(PortError::unknown("produce"))),
            Some(Fault::CrashBefore) => Err(PortError::permanent("produce").code("CRASH")),
            Some(Fault::CrashAfter) => effect(self).and(Err(PortError::permanent("produce").code("CRASH"))),
        }
    }
}

fn check_generation(inner: &Inner, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
    let is_member = inner.members.get(&group.member) == Some(&(group.generation as u64));
    if is_member && offsets.keys().all(|at| inner.owners.get(at) == Some(&group.member)) {
        Ok(())
    } else {
        Err(PortError::unknown("send offsets").code("ILLEGAL_GENERATION"))
    }
}

#[async_trait]
impl Producer for MemoryProducer {
    async fn begin(&mut self) -> Result<()> {
        self.call(|p| {
            assert!(p.open.is_none(), "begin inside a transaction");
            p.open = Some(Open::default());
            p.last_committed = false;
            Ok(())
        })
    }
    async fn send(&mut self, records: Vec<OutRecord>) -> Result<()> {
        self.call(|p| {
            p.open.as_mut().expect("send inside a transaction").0.extend(records);
            Ok(())
        })
    }
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
        self.call(|p| {
            check_generation(&p.log.lock(), offsets, group)?;
            let open = p.open.as_mut().expect("offsets inside a transaction");
            open.1.extend(offsets.clone());
            open.2 = Some(group.clone());
            Ok(())
        })
    }
    async fn commit(&mut self) -> Result<()> {
        self.call(|p| {
            p.log.env.0.fetch_add(p.log.lock().commit_ms, Ordering::SeqCst);
            let Some((records, offsets, group)) = p.open.clone() else {
                assert!(p.last_committed, "commit without a transaction");
                return Ok(());
            };
            let now = p.log.env.0.load(Ordering::SeqCst);
            let mut inner = p.log.lock();
            // A transaction without offsets is no member's.
            if let Some(group) = &group {
                check_generation(&inner, &offsets, group)?;
            }
            p.open = None;
            let mut touched = BTreeSet::new();
            for record in records {
                let partitions = &mut inner.topics.get_mut(&record.topic).expect("topic exists").1;
                let by_key = || record.key.iter().flatten().map(|&b| usize::from(b)).sum::<usize>() % partitions.len();
                let index = record.partition.map_or_else(by_key, |p| p as usize);
                let p = &mut partitions[index];
                p.records.push(LogRecord {
                    offset: p.end,
                    appended_ms: now,
                    key: record.key,
                    value: record.value,
                    headers: record.headers,
                });
                p.end += 1;
                touched.insert((record.topic, index));
            }
            for (topic, index) in touched {
                // The marker of the transaction takes an offset.
                inner.topics.get_mut(&topic).expect("topic exists").1[index].end += 1;
            }
            for (at, offset) in offsets {
                let group = group.as_ref().expect("offsets of a group").group.clone();
                inner.committed.insert((group, at), offset);
            }
            drop(inner);
            p.last_committed = true;
            Ok(())
        })
    }
    async fn abort(&mut self) -> Result<()> {
        self.call(|p| {
            p.open = None;
            p.last_committed = false;
            Ok(())
        })
    }
}

/// An event as tests write it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Click {
    pub user_id: String,
    pub event_type: String,
    pub page: String,
    pub product_id: Option<String>,
    pub cents: i64,
    pub region: Option<String>,
    pub timestamp_ms: i64,
}

/// JSON values; anything else is undecodable.
#[derive(Debug)]
pub struct JsonClicks;

#[async_trait]
impl ClickDecoder for JsonClicks {
    async fn decode(&mut self, records: &[LogRecord]) -> Result<Decoded> {
        let mut clicks = Vec::new();
        let mut undecodable = Vec::new();
        for (index, record) in (0u32..).zip(records) {
            match serde_json::from_slice::<Click>(record.value.as_deref().unwrap_or(&[])) {
                Ok(click) => clicks.push((index, click)),
                Err(_) => undecodable.push(Undecodable { record: index, reason: "not JSON".into() }),
            }
        }
        Ok(Decoded { batch: batch(&clicks), undecodable })
    }
}

pub fn batch(clicks: &[(u32, Click)]) -> ClickBatch {
    ClickBatch {
        record: clicks.iter().map(|(r, _)| *r).collect(),
        user_id: StringArray::from_iter_values(clicks.iter().map(|(_, c)| &c.user_id)),
        event_type: StringArray::from_iter_values(clicks.iter().map(|(_, c)| &c.event_type)),
        page: StringArray::from_iter_values(clicks.iter().map(|(_, c)| &c.page)),
        product_id: StringArray::from_iter(clicks.iter().map(|(_, c)| c.product_id.as_deref())),
        monto_cents: Int64Array::from_iter_values(clicks.iter().map(|(_, c)| c.cents)),
        region: StringArray::from_iter(clicks.iter().map(|(_, c)| c.region.as_deref())),
        timestamp_ms: Int64Array::from_iter_values(clicks.iter().map(|(_, c)| c.timestamp_ms)),
    }
}

#[derive(Debug)]
pub struct JsonRows;

#[async_trait]
impl MetricEncoder for JsonRows {
    async fn encode(&mut self, rows: &[MetricRow]) -> Result<Vec<Bytes>> {
        Ok(rows.iter().map(|row| serde_json::to_vec(row).unwrap().into()).collect())
    }
}
