//! How the job stands, read from the log alone: nobody is asked, so it is there when no worker is.
//!
//! What it says is what the last transaction of each partition left: its head, which every transaction writes anew, so that
//! only the end of a changelog is read, however large the state is. Left out: who works, and what is not committed.

use std::collections::BTreeMap;

use super::{
    checkpoint::{self, DamagedRecord, Record},
    click_task::damaged_changelog,
    config::StreamConfig,
    event::{Counts, Fate},
};
use crate::ports::{
    PortError, Result,
    event_log::{EventLog, TopicPartition},
};

/// So many offsets of the end of a changelog are looked through for a head at first. A transaction of a quiet partition has a
/// handful of records.
const TAIL: i64 = 64;

/// A partition of clicks or of partials. Times are milliseconds since 1970.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PartitionStatus {
    /// Next offset to read.
    pub next_offset: i64,
    /// End of the partition.
    pub end_offset: i64,
    /// When the oldest record was appended that is not processed; `None` when all are.
    pub waiting_since_ms: Option<i64>,
    /// Watermark of a partition of clicks; end of the closed windows of a partition of partials.
    pub watermark_ms: Option<i64>,
    /// Fates of a partition of clicks.
    pub counts: Counts,
}

impl PartitionStatus {
    /// Records that are not processed; markers of transactions among them count, as nobody can tell them apart unread.
    pub fn lag_records(&self) -> i64 {
        match self.waiting_since_ms {
            Some(_) => (self.end_offset - self.next_offset).max(1),
            None => 0,
        }
    }
    /// How long the oldest of them has been waiting, in milliseconds.
    pub fn lag_ms(&self, now_ms: i64) -> i64 {
        self.waiting_since_ms.map_or(0, |since| now_ms.saturating_sub(since).max(0))
    }
}

/// The job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobStatus {
    /// Partitions of clicks.
    pub clicks: BTreeMap<i32, PartitionStatus>,
    /// Partitions of partials.
    pub merges: BTreeMap<i32, PartitionStatus>,
}

impl JobStatus {
    /// Reads it.
    ///
    /// # Errors
    /// Those of the log: `UNKNOWN_TOPIC_OR_PARTITION` without the topic of clicks; `CHANGELOG_DAMAGED`.
    pub async fn read(config: &StreamConfig, log: &dyn EventLog) -> Result<Self> {
        let topics = &config.topics;
        let mut status = Self::default();
        for (partition, bounds) in log.offsets(&topics.clicks).await? {
            let head = match existing(newest_head(config, log, &topics.changelog, partition).await)? {
                Some(Record::ClickHead(head)) => Some(head),
                Some(_) => return Err(damaged_changelog(&topics.changelog, partition, DamagedRecord::Field("key"))),
                None => None,
            };
            let mut of = standing(log, &topics.clicks, partition, bounds, head.as_ref().map(|head| head.next_offset)).await?;
            if let Some(head) = head {
                (of.watermark_ms, of.counts) = (head.watermark.value, head.counts);
            }
            status.clicks.insert(partition, of);
        }
        for (partition, bounds) in existing(log.offsets(&topics.partials).await)? {
            let head = match existing(newest_head(config, log, &topics.merge_changelog, partition).await)? {
                Some(Record::MergeHead(head)) => Some(head),
                Some(_) => return Err(damaged_changelog(&topics.merge_changelog, partition, DamagedRecord::Field("key"))),
                None => None,
            };
            let mut of = standing(log, &topics.partials, partition, bounds, head.as_ref().map(|head| head.next_offset)).await?;
            of.watermark_ms = head.and_then(|head| head.closed);
            status.merges.insert(partition, of);
        }
        Ok(status)
    }

    /// Windows that end at or before this are emitted by every partition; `None` while one has emitted nothing.
    pub fn closed_ms(&self) -> Option<i64> {
        self.merges.values().map(|merge| merge.watermark_ms).min().flatten()
    }
    /// Smallest watermark of the partitions of clicks; `None` while one has none.
    pub fn watermark_ms(&self) -> Option<i64> {
        self.clicks.values().map(|click| click.watermark_ms).min().flatten()
    }
    /// Records of clicks that are not processed.
    pub fn lag_records(&self) -> i64 {
        self.clicks.values().map(PartitionStatus::lag_records).sum()
    }
    /// How long the oldest record has been waiting, in either stage, in milliseconds.
    pub fn lag_ms(&self, now_ms: i64) -> i64 {
        self.clicks.values().chain(self.merges.values()).map(|p| p.lag_ms(now_ms)).max().unwrap_or(0)
    }
    /// Whether nothing is left to do in either stage.
    pub fn is_caught_up(&self) -> bool {
        self.clicks.values().chain(self.merges.values()).all(|p| p.waiting_since_ms.is_none())
    }
    /// Records and cents of a fate.
    pub fn fate(&self, fate: Fate) -> (u64, i64) {
        let counts = || self.clicks.values().map(|click| &click.counts);
        (counts().map(|c| c.of(fate)).sum(), counts().map(|c| c.cents_of(fate)).sum())
    }
    /// Records read.
    pub fn records_read(&self) -> u64 {
        self.clicks.values().map(|click| click.counts.read).sum()
    }
}

/// The newest head of a changelog partition, read from its end in steps that grow; `None` when it has none.
async fn newest_head(config: &StreamConfig, log: &dyn EventLog, topic: &str, partition: i32) -> Result<Option<Record>> {
    let at = TopicPartition { topic: topic.to_owned(), partition };
    let Some(&(oldest, end)) = log.offsets(topic).await?.get(&partition) else {
        return Err(PortError::permanent(format!("read the end of {topic}-{partition}")).code("UNKNOWN_TOPIC_OR_PARTITION"));
    };
    let (mut tail, mut until) = (TAIL, end);
    while until > oldest {
        let from = end.saturating_sub(tail).max(oldest);
        let (mut offset, mut newest) = (from, None);
        while offset < until {
            let (records, next) = log.read(&at, offset, config.restore_records).await?;
            let heads = records.into_iter().filter(|record| record.key.as_ref() == Some(&checkpoint::head_key()));
            // One without a value ends the state: a reset leaves it.
            newest = heads.map(|record| record.value.filter(|value| !value.is_empty())).next_back().or(newest);
            if next <= offset {
                return Err(PortError::retryable(format!("read {topic}-{partition}: nothing at {offset}, end {end}")));
            }
            offset = next;
        }
        if let Some(head) = newest {
            let damaged = |error| damaged_changelog(topic, partition, error);
            return head.map(|head| checkpoint::decode(&head, config.exact_users_max)).transpose().map_err(damaged);
        }
        (tail, until) = (tail.saturating_mul(16), from);
    }
    Ok(None)
}

/// What a topic of the job's own says; nothing when there is none, since the job makes them when it first runs.
///
/// # Errors
/// All but `UNKNOWN_TOPIC_OR_PARTITION`.
pub fn existing<T: Default>(answer: Result<T>) -> Result<T> {
    match answer {
        Err(error) if error.code.as_deref() == Some("UNKNOWN_TOPIC_OR_PARTITION") => Ok(T::default()),
        other => other,
    }
}

/// How a partition stands for who has read it up to `next_offset`, exclusive; from its oldest record where that is nowhere.
pub(crate) async fn standing(
    log: &dyn EventLog,
    topic: &str,
    partition: i32,
    (oldest, end_offset): (i64, i64),
    next_offset: Option<i64>,
) -> Result<PartitionStatus> {
    let next_offset = next_offset.unwrap_or(oldest);
    let at = TopicPartition { topic: topic.to_owned(), partition };
    let (mut from, mut waiting_since_ms) = (next_offset, None);
    // Markers of transactions are skipped by reading on.
    while from < end_offset && waiting_since_ms.is_none() {
        let (records, next) = log.read(&at, from, 1).await?;
        waiting_since_ms = records.first().map(|record| record.appended_ms);
        if next <= from {
            break;
        }
        from = next;
    }
    Ok(PartitionStatus { next_offset, end_offset, waiting_since_ms, ..PartitionStatus::default() })
}
