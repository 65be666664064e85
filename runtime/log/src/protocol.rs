//! What is asked of the broker, what it answers, and what must outlive a crash.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use simulacro_core::ports::event_log::{TopicPartition, TopicSpec};

use crate::{blob::Blob, partition::Stored};

/// A record on its way to the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Topic.
    pub topic: String,
    /// Partition; `None` leaves it to the key.
    pub partition: Option<i32>,
    /// Key.
    pub key: Option<Blob>,
    /// Value; `None` is a tombstone.
    pub value: Option<Blob>,
    /// Headers in order.
    pub headers: Vec<(String, Blob)>,
}

impl Message {
    /// Size in bytes as it counts against the limit: key, value and headers.
    pub fn bytes(&self) -> usize {
        let of = |b: &Option<Blob>| b.as_ref().map_or(0, |b| b.0.len());
        of(&self.key) + of(&self.value) + self.headers.iter().map(|(name, b)| name.len() + b.0.len()).sum::<usize>()
    }
}

/// Who sends: a producer and its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProducerRef {
    /// Number that the broker gave.
    pub pid: u64,
    /// Rises each time the same transactional id is taken over.
    pub epoch: u32,
}

/// A request. Each may be repeated with no other result when its reply was lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Creates a topic.
    CreateTopic(TopicSpec),
    /// Bounds of a topic's partitions.
    Bounds {
        /// Topic.
        topic: String,
    },
    /// First offsets at or after a time.
    OffsetsAt {
        /// Topic.
        topic: String,
        /// Milliseconds since 1970.
        time_ms: i64,
    },
    /// Committed offsets of a group: refused while an open transaction holds newer ones.
    Committed {
        /// Group.
        group: String,
        /// Topic.
        topic: String,
    },
    /// Where a member begins to read: refused while an open transaction holds newer offsets.
    Positions {
        /// Group.
        group: String,
        /// Partitions.
        partitions: BTreeSet<TopicPartition>,
    },
    /// Sets offsets of a group without members.
    Reset {
        /// Group.
        group: String,
        /// Next offsets to read.
        offsets: BTreeMap<TopicPartition, i64>,
    },
    /// Reads committed records.
    Fetch {
        /// Partition.
        partition: TopicPartition,
        /// From here.
        offset: i64,
        /// At most this many.
        records_max: usize,
        /// At most this many bytes, but one record at least.
        bytes_max: usize,
    },
    /// Joins a group. The same member name takes the place of the one before.
    Join {
        /// Group.
        group: String,
        /// Name of the member.
        member: String,
        /// Topics.
        topics: BTreeSet<String>,
        /// Silence after which the member is out, in milliseconds.
        session_ms: i64,
    },
    /// Tells that a member lives and what it holds; the reply tells what it may hold.
    Heartbeat {
        /// Group.
        group: String,
        /// Name of the member.
        member: String,
        /// Which incarnation of it, from `Joined`.
        incarnation: u64,
        /// What it holds now. A partition that is missing here and not its own any more was given up.
        holds: BTreeSet<TopicPartition>,
    },
    /// Leaves a group.
    Leave {
        /// Group.
        group: String,
        /// Name of the member.
        member: String,
        /// Which incarnation of it.
        incarnation: u64,
    },
    /// Makes a producer; fences the one before it under the same id.
    InitProducer {
        /// Transactional id.
        transactional_id: Option<String>,
        /// Age at which the broker aborts an open transaction, in milliseconds.
        timeout_ms: i64,
    },
    /// Appends records, all or none.
    Produce {
        /// Who.
        producer: ProducerRef,
        /// Rises with each call; one that was seen is not appended again.
        sequence: u64,
        /// Records.
        messages: Vec<Message>,
    },
    /// Puts offsets into the open transaction.
    TxnOffsets {
        /// Who.
        producer: ProducerRef,
        /// Group.
        group: String,
        /// Name of the member.
        member: String,
        /// Generation that the member knows.
        generation: i32,
        /// Next offsets to read.
        offsets: BTreeMap<TopicPartition, i64>,
    },
    /// Ends the open transaction.
    EndTxn {
        /// Who.
        producer: ProducerRef,
        /// Commit, or abort.
        commit: bool,
    },
}

/// Membership as the broker sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// Generation that the member may commit with.
    pub generation: i32,
    /// What the member may hold now.
    pub partitions: BTreeSet<TopicPartition>,
}

/// Records that were read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    /// Committed records.
    pub records: Vec<Stored>,
    /// Where reading goes on.
    pub next_offset: i64,
    /// Last stable offset.
    pub end_offset: i64,
}

/// A reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// Done.
    Done,
    /// Oldest kept offset and last stable offset of each partition.
    Bounds(BTreeMap<i32, (i64, i64)>),
    /// An offset of each partition.
    Offsets(BTreeMap<i32, i64>),
    /// Committed offset (if any), oldest kept and last stable offset of each partition.
    Positions(BTreeMap<TopicPartition, (Option<i64>, i64, i64)>),
    /// Records.
    Fetched(Fetched),
    /// Incarnation of a member.
    Joined(u64),
    /// Membership.
    Assigned(Assignment),
    /// A producer.
    Producer(ProducerRef),
}

/// A change that must outlive a crash. Applying the effects in order rebuilds the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Effect {
    /// A topic was created.
    TopicCreated(TopicSpec),
    /// A producer was made or taken over.
    ProducerMade {
        /// Transactional id.
        transactional_id: Option<String>,
        /// Producer.
        producer: ProducerRef,
        /// Age at which an open transaction is aborted, in milliseconds.
        timeout_ms: i64,
        /// When, in milliseconds since 1970.
        at_ms: i64,
    },
    /// Records were appended.
    Appended {
        /// Producer.
        pid: u64,
        /// Number of the call.
        sequence: u64,
        /// Inside a transaction.
        transactional: bool,
        /// When, in milliseconds since 1970.
        at_ms: i64,
        /// Records by partition, in order.
        batches: BTreeMap<TopicPartition, Vec<Message>>,
    },
    /// Offsets entered a transaction.
    OffsetsAdded {
        /// Producer.
        pid: u64,
        /// When, in milliseconds since 1970.
        at_ms: i64,
        /// Group.
        group: String,
        /// Next offsets to read.
        offsets: BTreeMap<TopicPartition, i64>,
    },
    /// A transaction ended.
    TxnEnded {
        /// Producer.
        pid: u64,
        /// Committed, or aborted.
        commit: bool,
    },
    /// A producer was fenced because its transaction took too long.
    EpochRaised {
        /// Producer.
        pid: u64,
    },
    /// Offsets were set by hand.
    OffsetsSet {
        /// Group.
        group: String,
        /// Next offsets to read.
        offsets: BTreeMap<TopicPartition, i64>,
    },
    /// A group's assignment changed.
    GenerationRaised {
        /// Group.
        group: String,
        /// Its generation.
        generation: i32,
    },
    /// Old records went.
    Trimmed {
        /// Partition.
        partition: TopicPartition,
        /// Oldest kept offset.
        start: i64,
    },
    /// Producers without transactional id were forgotten.
    ProducersForgotten {
        /// Those that were used last before this, in milliseconds since 1970.
        before_ms: i64,
    },
    /// Overwritten keys went.
    Compacted {
        /// Partition.
        partition: TopicPartition,
        /// Tombstones appended before this went too, in milliseconds since 1970.
        tombstones_before_ms: i64,
    },
}

/// Most partitions of a topic that any broker has had.
const PARTITIONS_EVER: i32 = 100_000;

impl Effect {
    /// Whether a broker can have made this. One that cannot be is damage, however well its checksum fits.
    pub fn is_possible(&self) -> bool {
        match self {
            Self::TopicCreated(spec) => (1..=PARTITIONS_EVER).contains(&spec.partitions),
            Self::ProducerMade { producer, .. } => producer.pid < u64::MAX / 2 && producer.epoch < u32::MAX / 2,
            Self::Trimmed { start, .. } => *start >= 0,
            Self::Appended { .. }
            | Self::OffsetsAdded { .. }
            | Self::TxnEnded { .. }
            | Self::EpochRaised { .. }
            | Self::OffsetsSet { .. }
            | Self::GenerationRaised { .. }
            | Self::ProducersForgotten { .. }
            | Self::Compacted { .. } => true,
        }
    }

    /// Whether somebody was told that this is durable. The rest becomes durable with the next one that is.
    pub fn is_promise(&self) -> bool {
        match self {
            Self::TopicCreated(_)
            | Self::ProducerMade { .. }
            | Self::TxnEnded { .. }
            | Self::EpochRaised { .. }
            | Self::OffsetsSet { .. } => true,
            Self::Appended { transactional, .. } => !transactional,
            Self::OffsetsAdded { .. }
            | Self::GenerationRaised { .. }
            | Self::ProducersForgotten { .. }
            | Self::Trimmed { .. }
            | Self::Compacted { .. } => false,
        }
    }
}
