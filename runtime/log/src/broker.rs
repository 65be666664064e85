//! The broker: topics, groups and transactions behind one function.
//!
//! [`State`] outlives a crash and changes by [`Effect`]s only. Membership of groups does not: whoever lives joins again.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use simulacro_core::ports::event_log::{TopicPartition, TopicSpec};

use crate::{
    code::{Code, Refusal},
    group::Group,
    partition::Partition,
    partitioner::partition_of,
    protocol::{Effect, Message, ProducerRef, Request, Response},
};

/// Bounds of a broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Largest record, in bytes of key, value and headers.
    pub message_bytes_max: usize,
    /// Largest total of kept records, in bytes of memory, about; above it nothing is appended until retention frees some.
    pub log_bytes_max: u64,
    /// Largest number of partitions of a topic.
    pub partitions_max: i32,
    /// How often old records are looked for, in milliseconds.
    pub retention_check_ms: i64,
    /// How long a tombstone is kept in a compacted topic, in milliseconds.
    pub tombstone_ms: i64,
    /// Records beyond twice the number of live ones after which a compacted partition is compacted.
    pub compact_above: usize,
    /// How long a producer without transactional id is remembered after its last use, in milliseconds.
    pub producer_ms: i64,
}

impl Limits {
    /// Kafka's defaults where it has one, and 1 GiB of records.
    pub const KAFKA: Self = Self {
        message_bytes_max: 1_000_000,
        log_bytes_max: 1 << 30,
        partitions_max: 10_000,
        retention_check_ms: 1_000,
        tombstone_ms: 86_400_000,
        compact_above: 1_000,
        producer_ms: 86_400_000,
    };
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Topic {
    spec: TopicSpec,
    partitions: Vec<Partition>,
}

/// An open transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Transaction {
    since_ms: i64,
    partitions: BTreeSet<TopicPartition>,
    offsets: BTreeMap<String, BTreeMap<TopicPartition, i64>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ProducerState {
    epoch: u32,
    transactional: bool,
    timeout_ms: i64,
    used_ms: i64,
    sequence: u64,
    open: Option<Transaction>,
    /// How the last transaction ended.
    committed: Option<bool>,
}

/// What outlives a crash.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct State {
    topics: BTreeMap<String, Topic>,
    producers: BTreeMap<u64, ProducerState>,
    transactional: BTreeMap<String, u64>,
    offsets: BTreeMap<String, BTreeMap<TopicPartition, i64>>,
    generations: BTreeMap<String, i32>,
    pid_next: u64,
}

impl State {
    /// Whether effects can have led here. A state that cannot be is damage, however well its checksum fits.
    pub fn is_possible(&self) -> bool {
        let topics = self.topics.values().all(|topic| {
            let counted = usize::try_from(topic.spec.partitions).is_ok_and(|count| count == topic.partitions.len());
            counted && topic.partitions.iter().all(Partition::is_possible)
        });
        let producers = self.producers.iter().all(|(pid, state)| *pid < self.pid_next && state.epoch < u32::MAX / 2);
        topics && producers && self.pid_next < u64::MAX / 2
    }

    /// What the kept records cost in memory, in bytes, about.
    pub fn bytes(&self) -> u64 {
        self.topics.values().flat_map(|t| &t.partitions).map(Partition::bytes).sum()
    }

    fn topic(&self, name: &str) -> Result<&Topic, Refusal> {
        let unknown = || Refusal::new(Code::UnknownTopicOrPartition, format!("find topic {name}"));
        self.topics.get(name).ok_or_else(unknown)
    }

    fn partition(&self, at: &TopicPartition) -> Result<&Partition, Refusal> {
        let unknown = || Refusal::new(Code::UnknownTopicOrPartition, format!("find partition {}-{}", at.topic, at.partition));
        usize::try_from(at.partition).ok().and_then(|p| self.topics.get(&at.topic)?.partitions.get(p)).ok_or_else(unknown)
    }

    fn partition_mut(&mut self, at: &TopicPartition) -> Option<&mut Partition> {
        self.topics.get_mut(&at.topic)?.partitions.get_mut(usize::try_from(at.partition).ok()?)
    }

    fn partitions_of(&self, topic: &Topic) -> Vec<TopicPartition> {
        (0..topic.spec.partitions).map(|partition| TopicPartition { topic: topic.spec.name.clone(), partition }).collect()
    }

    /// Partitions whose offsets of `group` lie in an open transaction.
    fn pending<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a TopicPartition> {
        let open = self.producers.values().filter_map(|p| p.open.as_ref());
        open.filter_map(move |t| t.offsets.get(group)).flat_map(BTreeMap::keys)
    }

    fn producer(&self, producer: ProducerRef, fenced: Code) -> Result<&ProducerState, Refusal> {
        let what = || format!("act as producer {}, epoch {}", producer.pid, producer.epoch);
        match self.producers.get(&producer.pid) {
            None => Err(Refusal::new(Code::InvalidProducerIdMapping, what())),
            Some(state) if state.epoch != producer.epoch => Err(Refusal::new(fenced, what())),
            Some(state) => Ok(state),
        }
    }

    /// Carries an effect out. Effects that a broker gave, applied in order, give the broker's state.
    pub fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::TopicCreated(spec) => {
                let partitions = vec![Partition::default(); spec.partitions.max(0) as usize];
                self.topics.insert(spec.name.clone(), Topic { spec, partitions });
            }
            Effect::ProducerMade { transactional_id, producer, timeout_ms, at_ms } => {
                let transactional = transactional_id.is_some();
                if let Some(id) = transactional_id {
                    self.transactional.insert(id, producer.pid);
                }
                let epoch = producer.epoch;
                self.producers.insert(
                    producer.pid,
                    ProducerState { epoch, transactional, timeout_ms, used_ms: at_ms, sequence: 0, open: None, committed: None },
                );
                self.pid_next = self.pid_next.max(producer.pid + 1);
            }
            Effect::Appended { pid, sequence, transactional, at_ms, batches } => {
                if let Some(producer) = self.producers.get_mut(&pid) {
                    producer.sequence = sequence;
                    producer.used_ms = at_ms;
                    if transactional {
                        producer.txn(at_ms).partitions.extend(batches.keys().cloned());
                    }
                }
                for (at, messages) in batches {
                    if let Some(partition) = self.partition_mut(&at) {
                        partition.append(at_ms, transactional.then_some(pid), messages);
                    }
                }
            }
            Effect::OffsetsAdded { pid, at_ms, group, offsets } => {
                if let Some(producer) = self.producers.get_mut(&pid) {
                    producer.txn(at_ms).offsets.entry(group).or_default().extend(offsets);
                }
            }
            Effect::TxnEnded { pid, commit } => {
                let Some(producer) = self.producers.get_mut(&pid) else { return };
                producer.committed = Some(commit);
                let Some(open) = producer.open.take() else { return };
                for at in open.partitions {
                    if let Some(partition) = self.partition_mut(&at) {
                        partition.finish(pid, commit);
                    }
                }
                if commit {
                    for (group, offsets) in open.offsets {
                        self.offsets.entry(group).or_default().extend(offsets);
                    }
                }
            }
            Effect::EpochRaised { pid } => {
                if let Some(producer) = self.producers.get_mut(&pid) {
                    producer.epoch += 1;
                }
            }
            Effect::OffsetsSet { group, offsets } => self.offsets.entry(group).or_default().extend(offsets),
            Effect::GenerationRaised { group, generation } => {
                self.generations.insert(group, generation);
            }
            Effect::Trimmed { partition, start } => {
                if let Some(partition) = self.partition_mut(&partition) {
                    partition.trim(start);
                }
            }
            Effect::Compacted { partition, tombstones_before_ms } => {
                if let Some(partition) = self.partition_mut(&partition) {
                    partition.compact(tombstones_before_ms);
                }
            }
            Effect::ProducersForgotten { before_ms } => {
                self.producers.retain(|_, p| p.transactional || p.used_ms >= before_ms);
            }
        }
    }
}

impl ProducerState {
    fn txn(&mut self, at_ms: i64) -> &mut Transaction {
        let empty = || Transaction { since_ms: at_ms, partitions: BTreeSet::new(), offsets: BTreeMap::new() };
        self.open.get_or_insert_with(empty)
    }
}

/// A broker. One call at a time; time comes with the call.
#[derive(Debug)]
pub struct Broker {
    limits: Limits,
    state: State,
    groups: BTreeMap<String, Group>,
    incarnation_next: u64,
    checked_ms: Option<i64>,
    effects: Vec<Effect>,
    version: u64,
}

impl Broker {
    /// A broker with a state, empty or recovered. Groups have no members.
    pub fn new(limits: Limits, state: State) -> Self {
        Self { limits, state, groups: BTreeMap::new(), incarnation_next: 1, checked_ms: None, effects: Vec::new(), version: 0 }
    }

    /// What outlives a crash.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The changes since the last call of this, in order. They are applied already.
    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// Number of changes so far: what a [`Link`](crate::Link) may tell those who wait for one.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Throws a member out as if its session were over; false when it is not in the group.
    pub fn expire_member(&mut self, group: &str, member: &str) -> bool {
        let Some(there) = self.groups.get_mut(group) else { return false };
        let out = there.expel(member);
        if out {
            self.rebalance(group);
        }
        out
    }

    /// Forgets who is in which group, as a restart of the process does. No incarnation is given twice all the same.
    pub fn forget_members(&mut self) {
        self.groups.clear();
    }

    /// Drops committed records below `start` of a partition, as retention does; the start never goes back.
    pub fn trim(&mut self, partition: &TopicPartition, start: i64) {
        if let Ok(found) = self.state.partition(partition) {
            let start = start.min(found.last_stable());
            if start > found.start() {
                self.make(Effect::Trimmed { partition: partition.clone(), start });
            }
        }
    }

    fn make(&mut self, effect: Effect) {
        self.state.apply(effect.clone());
        self.effects.push(effect);
        self.version += 1;
    }

    /// Carries out one request at `now_ms`, in milliseconds since 1970.
    ///
    /// # Errors
    /// Kafka's code; nothing of the request was carried out then.
    pub fn handle(&mut self, now_ms: i64, request: Request) -> Result<Response, Refusal> {
        self.pass_time(now_ms);
        match request {
            Request::CreateTopic(spec) => self.create_topic(spec),
            Request::Bounds { topic } => {
                let of = |(i, p): (usize, &Partition)| (i as i32, (p.start(), p.last_stable()));
                Ok(Response::Bounds(self.state.topic(&topic)?.partitions.iter().enumerate().map(of).collect()))
            }
            Request::OffsetsAt { topic, time_ms } => {
                let of = |(i, p): (usize, &Partition)| (i as i32, p.offset_at(time_ms));
                Ok(Response::Offsets(self.state.topic(&topic)?.partitions.iter().enumerate().map(of).collect()))
            }
            Request::Committed { group, topic } => {
                self.state.topic(&topic)?;
                if self.state.pending(&group).any(|at| at.topic == topic) {
                    return Err(Refusal::new(Code::UnstableOffsetCommit, format!("find the offsets of {group} in {topic}")));
                }
                let all = self.state.offsets.get(&group).into_iter().flatten();
                Ok(Response::Offsets(all.filter(|(p, _)| p.topic == topic).map(|(p, o)| (p.partition, *o)).collect()))
            }
            Request::Positions { group, partitions } => self.positions(&group, partitions),
            Request::Reset { group, offsets } => {
                for at in offsets.keys() {
                    self.state.partition(at)?;
                }
                if self.groups.get(&group).is_some_and(|g| !g.is_empty()) {
                    return Err(Refusal::new(Code::NonEmptyGroup, format!("reset offsets of {group}")));
                }
                self.make(Effect::OffsetsSet { group, offsets });
                Ok(Response::Done)
            }
            Request::Fetch { partition, offset, records_max, bytes_max } => {
                let found = self.state.partition(&partition)?;
                found.read(offset, records_max, bytes_max).map(Response::Fetched).ok_or_else(|| {
                    let (at, start) = (format!("{}-{}", partition.topic, partition.partition), found.start());
                    Refusal::new(Code::OffsetOutOfRange, format!("read {at} at offset {offset}: it begins at {start}"))
                })
            }
            Request::Join { group, member, topics, session_ms } => {
                for topic in &topics {
                    self.state.topic(topic)?;
                }
                let generation = self.state.generations.get(&group).copied().unwrap_or(0);
                let incarnation = self.incarnation_next;
                self.incarnation_next += 1;
                let joined = self.groups.entry(group.clone()).or_insert_with(|| Group::new(generation));
                joined.join(now_ms, &member, incarnation, topics, session_ms);
                self.rebalance(&group);
                Ok(Response::Joined(incarnation))
            }
            Request::Heartbeat { group, member, incarnation, holds } => {
                let unknown = || Refusal::new(Code::UnknownMemberId, format!("be {member} of {group}"));
                let found = self.groups.get_mut(&group).ok_or_else(unknown)?;
                found.heartbeat(now_ms, &group, &member, incarnation, &holds).map(Response::Assigned)
            }
            Request::Leave { group, member, incarnation } => {
                if self.groups.get_mut(&group).is_some_and(|g| g.leave(&member, incarnation)) {
                    self.rebalance(&group);
                }
                Ok(Response::Done)
            }
            Request::InitProducer { transactional_id, timeout_ms } => {
                Ok(self.init_producer(now_ms, transactional_id, timeout_ms))
            }
            Request::Produce { producer, sequence, messages } => self.produce(now_ms, producer, sequence, messages),
            Request::TxnOffsets { producer, group, member, generation, offsets } => {
                let state = self.state.producer(producer, Code::ProducerFenced)?;
                if !state.transactional {
                    return Err(Refusal::new(Code::InvalidTxnState, "put offsets into a transaction without a transactional id"));
                }
                for at in offsets.keys() {
                    self.state.partition(at)?;
                }
                let found = self.groups.get(&group).cloned().unwrap_or_default();
                found.may_commit(&group, &member, generation)?;
                self.make(Effect::OffsetsAdded { pid: producer.pid, at_ms: now_ms, group, offsets });
                Ok(Response::Done)
            }
            Request::EndTxn { producer, commit } => self.end_txn(producer, commit),
        }
    }

    fn create_topic(&mut self, spec: TopicSpec) -> Result<Response, Refusal> {
        let what = |why: &str| format!("create topic {}: {why}", spec.name);
        let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if spec.name.is_empty() || spec.name.len() > 249 || !spec.name.chars().all(letters) {
            return Err(Refusal::new(
                Code::InvalidTopicException,
                what("a name has 1 to 249 of a-z, A-Z, 0-9, '.', '_' and '-'"),
            ));
        }
        if !(1..=self.limits.partitions_max).contains(&spec.partitions) {
            return Err(Refusal::new(Code::InvalidPartitions, what(&format!("{} partitions", spec.partitions))));
        }
        match self.state.topics.get(&spec.name) {
            Some(there) if there.spec.partitions != spec.partitions => {
                let why = format!("it has {} partitions, not {}", there.spec.partitions, spec.partitions);
                Err(Refusal::new(Code::TopicAlreadyExists, what(&why)))
            }
            Some(_) => Ok(Response::Done),
            None => {
                let name = spec.name.clone();
                self.make(Effect::TopicCreated(spec));
                let readers: Vec<_> = self.groups.iter().filter(|(_, g)| g.reads(&name)).map(|(name, _)| name.clone()).collect();
                for group in readers {
                    self.rebalance(&group);
                }
                Ok(Response::Done)
            }
        }
    }

    fn positions(&self, group: &str, partitions: BTreeSet<TopicPartition>) -> Result<Response, Refusal> {
        let pending: BTreeSet<_> = self.state.pending(group).collect();
        let mut found = BTreeMap::new();
        for at in partitions {
            let partition = self.state.partition(&at)?;
            if pending.contains(&at) {
                let what = format!("find where {group} goes on in {}-{}", at.topic, at.partition);
                return Err(Refusal::new(Code::UnstableOffsetCommit, what));
            }
            let committed = self.state.offsets.get(group).and_then(|o| o.get(&at)).copied();
            found.insert(at, (committed, partition.start(), partition.last_stable()));
        }
        Ok(Response::Positions(found))
    }

    fn init_producer(&mut self, now_ms: i64, transactional_id: Option<String>, timeout_ms: i64) -> Response {
        let known = transactional_id.as_ref().and_then(|id| self.state.transactional.get(id)).copied();
        let producer = match known.and_then(|pid| Some((pid, self.state.producers.get(&pid)?))) {
            Some((pid, state)) => {
                let (epoch, open) = (state.epoch + 1, state.open.is_some());
                if open {
                    self.make(Effect::TxnEnded { pid, commit: false });
                }
                ProducerRef { pid, epoch }
            }
            None => ProducerRef { pid: self.state.pid_next, epoch: 0 },
        };
        self.make(Effect::ProducerMade { transactional_id, producer, timeout_ms, at_ms: now_ms });
        Response::Producer(producer)
    }

    fn produce(
        &mut self,
        now_ms: i64,
        producer: ProducerRef,
        sequence: u64,
        messages: Vec<Message>,
    ) -> Result<Response, Refusal> {
        let state = self.state.producer(producer, Code::InvalidProducerEpoch)?;
        if sequence <= state.sequence {
            // The reply was lost, the records were not.
            return Ok(Response::Done);
        }
        let transactional = state.transactional;
        let mut bytes = self.state.bytes();
        let mut batches: BTreeMap<TopicPartition, Vec<Message>> = BTreeMap::new();
        for (i, message) in messages.into_iter().enumerate() {
            let topic = self.state.topic(&message.topic)?;
            let partition = match (message.partition, &message.key) {
                (Some(partition), _) => partition,
                (None, Some(key)) => partition_of(&key.0, topic.spec.partitions),
                (None, None) => ((sequence as usize + i) % topic.partitions.len()) as i32,
            };
            let at = TopicPartition { topic: message.topic.clone(), partition };
            self.state.partition(&at)?;
            let what = || format!("append {} bytes to {}-{}", message.bytes(), at.topic, at.partition);
            if message.bytes() > self.limits.message_bytes_max {
                return Err(Refusal::new(Code::MessageTooLarge, what()));
            }
            if topic.spec.compact && message.key.is_none() {
                return Err(Refusal::new(Code::InvalidRecord, format!("{}: a compacted topic needs keys", what())));
            }
            bytes += message.bytes() as u64;
            if bytes > self.limits.log_bytes_max {
                return Err(Refusal::new(Code::KafkaStorageError, format!("{}: the log is full", what())));
            }
            batches.entry(at).or_default().push(message);
        }
        self.make(Effect::Appended { pid: producer.pid, sequence, transactional, at_ms: now_ms, batches });
        Ok(Response::Done)
    }

    fn end_txn(&mut self, producer: ProducerRef, commit: bool) -> Result<Response, Refusal> {
        let state = self.state.producer(producer, Code::ProducerFenced)?;
        match (&state.open, state.committed, commit) {
            (Some(_), _, _) => {
                self.make(Effect::TxnEnded { pid: producer.pid, commit });
                Ok(Response::Done)
            }
            // The reply of the first attempt was lost, or there is nothing to throw away.
            (None, Some(true), true) | (None, _, false) => Ok(Response::Done),
            (None, Some(false) | None, true) => {
                Err(Refusal::new(Code::InvalidTxnState, format!("commit as producer {}: no transaction is open", producer.pid)))
            }
        }
    }

    fn rebalance(&mut self, group: &str) {
        let all = self.state.topics.values().flat_map(|t| self.state.partitions_of(t)).collect();
        let Some(there) = self.groups.get_mut(group) else { return };
        there.rebalance(&all);
        let generation = there.generation();
        self.make(Effect::GenerationRaised { group: group.to_owned(), generation });
        if self.groups.get(group).is_some_and(Group::is_empty) {
            self.groups.remove(group);
        }
    }

    /// What time alone does: sessions end, hung transactions are aborted, old records go.
    fn pass_time(&mut self, now_ms: i64) {
        let expired: Vec<_> = self.groups.iter_mut().filter_map(|(name, g)| g.expire(now_ms).then(|| name.clone())).collect();
        for group in expired {
            self.rebalance(&group);
        }
        let hung = |p: &ProducerState| p.open.as_ref().is_some_and(|t| t.since_ms.saturating_add(p.timeout_ms) <= now_ms);
        let hung: Vec<_> = self.state.producers.iter().filter(|(_, p)| hung(p)).map(|(pid, _)| *pid).collect();
        for pid in hung {
            self.make(Effect::TxnEnded { pid, commit: false });
            self.make(Effect::EpochRaised { pid });
        }
        if self.checked_ms.is_some_and(|at| (at..at.saturating_add(self.limits.retention_check_ms)).contains(&now_ms)) {
            return;
        }
        self.checked_ms = Some(now_ms);
        let before_ms = now_ms.saturating_sub(self.limits.producer_ms);
        if self.state.producers.values().any(|p| !p.transactional && p.used_ms < before_ms) {
            self.make(Effect::ProducersForgotten { before_ms });
        }
        let tombstones_before_ms = now_ms.saturating_sub(self.limits.tombstone_ms);
        let mut due = Vec::new();
        for topic in self.state.topics.values() {
            let cutoff_ms = topic.spec.retention.map(|r| now_ms.saturating_sub(r.as_millis().try_into().unwrap_or(i64::MAX)));
            for (partition, kept) in self.state.partitions_of(topic).into_iter().zip(&topic.partitions) {
                let start = cutoff_ms.map_or(kept.start(), |cutoff| kept.start_after(cutoff));
                if start > kept.start() {
                    due.push(Effect::Trimmed { partition: partition.clone(), start });
                }
                if topic.spec.compact && kept.is_dirty(self.limits.compact_above) {
                    due.push(Effect::Compacted { partition, tombstones_before_ms });
                }
            }
        }
        due.into_iter().for_each(|effect| self.make(effect));
    }
}
