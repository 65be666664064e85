//! A partitioned, replayable log of events: Kafka, an embedded log in files, or the simulated broker.
//!
//! The vocabulary is Kafka's. A record has an offset within its partition; a consumer group shares out partitions; a
//! transaction makes records of several partitions and the group's offsets visible together or not at all. Consumers
//! read committed records only. What this port leaves out: schemas (see `SchemaRegistry`) and the commit protocol
//! itself, which is a state machine in core.

use std::{collections::BTreeMap, fmt, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Result;

/// One partition of one topic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TopicPartition {
    /// Topic, for example `ecommerce.clicks`.
    pub topic: String,
    /// Partition, from 0.
    pub partition: i32,
}

/// A topic as it is created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopicSpec {
    /// Name.
    pub name: String,
    /// Number of partitions, at least 1.
    pub partitions: i32,
    /// How long records are kept at least; `None` keeps them for ever.
    pub retention: Option<Duration>,
    /// Keeps the newest record of each key, for changelogs; older ones go some time later, and so does a tombstone with its
    /// key. A record without key is refused with `INVALID_RECORD`.
    pub compact: bool,
}

/// A record as it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRecord {
    /// Offset in its partition. Offsets rise, with gaps where transaction markers stand.
    pub offset: i64,
    /// When the broker appended it, in milliseconds since 1970.
    pub appended_ms: i64,
    /// Key.
    pub key: Option<Bytes>,
    /// Value; `None` is a tombstone.
    pub value: Option<Bytes>,
    /// Headers in order.
    pub headers: Vec<(String, Bytes)>,
}

/// A record as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutRecord {
    /// Topic.
    pub topic: String,
    /// Partition; `None` lets the key decide (murmur2, as Kafka's clients do), or spreads records without key.
    pub partition: Option<i32>,
    /// Key.
    pub key: Option<Bytes>,
    /// Value; `None` is a tombstone.
    pub value: Option<Bytes>,
    /// Headers in order.
    pub headers: Vec<(String, Bytes)>,
}

/// Where a group without a committed offset begins. There is no silent default: `latest` loses data by design.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartAt {
    /// The oldest record that is kept.
    Earliest,
    /// Only records from now on; somebody asked for it by name. Until the group commits, each new owner of a partition
    /// begins at the end of its own moment.
    Latest,
}

/// Membership of a consumer group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSpec {
    /// Group, for example `realtime_metrics`.
    pub group: String,
    /// Name of this member. After a restart the same name takes the same place at once, where the log can (Kafka cannot
    /// without giving up [`GroupConsumer::close`]: the place is free after the session timeout).
    pub member: String,
    /// Topics.
    pub topics: Vec<String>,
    /// Where to begin without a committed offset.
    pub start_at: StartAt,
    /// A member that is silent for longer loses its partitions.
    pub session_timeout: Duration,
}

/// What fences a zombie: offsets are accepted from the present generation of a group only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMetadata {
    /// Group.
    pub group: String,
    /// Member, as the log itself names it; not always the name in [`GroupSpec`].
    pub member: String,
    /// Generation of the group's assignment.
    pub generation: i32,
}

/// What a poll brings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Polled {
    /// Nothing within the wait.
    Nothing,
    /// These partitions now belong to this member, in addition to those it had; reading begins at the committed offset.
    Assigned(Vec<TopicPartition>),
    /// These partitions are about to be given up: finish or abort what is open. The next poll lets go of them.
    Revoked(Vec<TopicPartition>),
    /// These partitions are gone already (session timed out): drop what is open, it would be fenced.
    Lost(Vec<TopicPartition>),
    /// Records of one partition, in order of offset. The list may be empty: then it only tells `end_offset`.
    Records {
        /// Where they come from.
        partition: TopicPartition,
        /// Committed records.
        records: Vec<LogRecord>,
        /// Where reading goes on: past the last record, and past a marker behind it where the log tells (Kafka does not).
        next_offset: i64,
        /// The partition's last stable offset when they were read, about; equal to `next_offset` means caught up, and
        /// that is told once for each end that is reached.
        end_offset: i64,
    },
}

/// A partitioned log. Cheap to share; consumers and producers are made from it.
#[async_trait]
pub trait EventLog: fmt::Debug + Send + Sync {
    /// Creates a topic. Idempotent: a topic that exists keeps its retention and compaction, and is no error.
    ///
    /// # Errors
    /// `Permanent` with code `TOPIC_ALREADY_EXISTS` when a topic of this name has another number of partitions.
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()>;
    /// Oldest kept offset and last stable offset (exclusive) of each partition.
    ///
    /// # Errors
    /// `Permanent` with code `UNKNOWN_TOPIC_OR_PARTITION` when there is no such topic.
    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>>;
    /// First offset of each partition whose append time is at or after `time_ms`; the end when there is none.
    async fn offsets_at(&self, topic: &str, time_ms: i64) -> Result<BTreeMap<i32, i64>>;
    /// Committed offsets (the next to read) of a group; partitions without one are absent. While an open transaction holds
    /// newer ones the answer waits for its end, so that whoever goes on from here repeats nothing.
    ///
    /// # Errors
    /// `Retryable` with code `UNSTABLE_OFFSET_COMMIT` or `REQUEST_TIMED_OUT` when it does not end in time.
    async fn committed(&self, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>>;
    /// Sets committed offsets of a group that has no members. Do not call it while a transaction holds some.
    ///
    /// # Errors
    /// `Retryable` with code `NON_EMPTY_GROUP` while it has.
    async fn reset(&self, group: &str, offsets: &BTreeMap<TopicPartition, i64>) -> Result<()>;
    /// Reads committed records from `offset` without a group, at most `max_records`; used to restore state.
    /// Returns the records and where to go on; a position equal to the end means there is nothing more now.
    ///
    /// # Errors
    /// `Permanent` with code `OFFSET_OUT_OF_RANGE` when `offset` is not kept any more, or does not exist yet.
    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)>;
    /// Joins a group. Partitions arrive with [`Polled::Assigned`].
    ///
    /// # Errors
    /// `Permanent` with code `UNKNOWN_TOPIC_OR_PARTITION` when one of the topics does not exist.
    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>>;
    /// A producer. With a transactional id, an older producer of the same id is fenced and its open transaction aborted;
    /// without one, each [`Producer::send`] is durable by itself when it returns, and `begin` is an error.
    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>>;
}

/// A member of a consumer group. Dropping it leaves the group within the session timeout; [`GroupConsumer::close`] at once.
#[async_trait]
pub trait GroupConsumer: fmt::Debug + Send {
    /// Waits up to `wait` for the next thing to know. Must be called more often than the session timeout.
    ///
    /// # Errors
    /// `Permanent` with code `OFFSET_OUT_OF_RANGE` when a position is not kept any more: never skipped silently, and told by
    /// each poll until a [`GroupConsumer::seek`]. `Permanent` with code `FENCED_INSTANCE_ID` when another member has taken
    /// this one's name.
    async fn poll(&mut self, wait: Duration) -> Result<Polled>;
    /// Moves the position of an assigned partition. Records read before and not returned yet are dropped.
    ///
    /// # Errors
    /// `Permanent` when the partition is not assigned; the same for pause and resume.
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()>;
    /// Stops returning records of these partitions; polls go on, membership is kept. Idempotent.
    async fn pause(&mut self, partitions: &[TopicPartition]) -> Result<()>;
    /// Undoes [`GroupConsumer::pause`]. Idempotent.
    async fn resume(&mut self, partitions: &[TopicPartition]) -> Result<()>;
    /// The present membership, for [`Producer::send_offsets`].
    fn metadata(&self) -> GroupMetadata;
    /// Leaves the group now.
    async fn close(&mut self) -> Result<()>;
}

/// A producer. With a transactional id the order of calls is begin, send and send_offsets, commit or abort.
///
/// Errors tell what to do: `Retryable` repeat the same call, `Unknown` the transaction must be aborted and its outcome
/// looked up in the committed offsets, `Permanent` with code `INVALID_PRODUCER_EPOCH` (fenced by a newer producer, or by
/// the broker because the transaction took too long) drop this producer. A call out of order is `Permanent` with code
/// `INVALID_TXN_STATE`.
#[async_trait]
pub trait Producer: fmt::Debug + Send {
    /// Begins a transaction.
    async fn begin(&mut self) -> Result<()>;
    /// Appends records, in order within a partition. Returns when they are durable, or inside a transaction when the
    /// broker has accepted them.
    ///
    /// # Errors
    /// `Permanent` with code `MESSAGE_TOO_LARGE` for a record above the log's limit; nothing of the call is kept then.
    async fn send(&mut self, records: Vec<OutRecord>) -> Result<()>;
    /// Puts the group's next offsets into the transaction.
    ///
    /// # Errors
    /// `Unknown` with code `ILLEGAL_GENERATION`, `UNKNOWN_MEMBER_ID` or `FENCED_INSTANCE_ID` when the member is not of the
    /// present generation: abort.
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()>;
    /// Makes the transaction durable; readers see it soon after, in each partition whole. Repeating it after `Unknown` is
    /// safe.
    async fn commit(&mut self) -> Result<()>;
    /// Throws the transaction away. Idempotent.
    async fn abort(&mut self) -> Result<()>;
}
