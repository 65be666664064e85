//! One partition: records with offsets, open transactions, and where committed reading ends.
//!
//! A record of an open transaction lies behind the last stable offset, so nobody reads it. A commit moves that offset
//! past it; an abort removes the record, and its offset stays a gap. Both leave one offset for the transaction's marker,
//! as in Kafka. Records are in memory; the embedded log keeps their history in files.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::{
    blob::Blob,
    protocol::{Fetched, Message},
};

/// A record in its partition.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stored {
    /// Offset.
    pub offset: i64,
    /// When it was appended, in milliseconds since 1970.
    pub appended_ms: i64,
    /// Producer, when it was appended in a transaction.
    pub txn_of: Option<u64>,
    /// Key.
    pub key: Option<Blob>,
    /// Value; `None` is a tombstone.
    pub value: Option<Blob>,
    /// Headers in order.
    pub headers: Vec<(String, Blob)>,
}

impl Stored {
    /// What the record costs in memory, in bytes, about.
    fn cost(&self) -> u64 {
        let of = |b: &Option<Blob>| b.as_ref().map_or(0, |b| b.0.len());
        let headers: usize = self.headers.iter().map(|(name, b)| name.len() + b.0.len() + 56).sum();
        (of(&self.key) + of(&self.value) + headers + size_of::<Self>()) as u64
    }
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Partition {
    start: i64,
    end: i64,
    records: VecDeque<Stored>,
    open: BTreeMap<u64, i64>,
    bytes: u64,
    /// Number of records after the last compaction.
    clean: usize,
}

impl Partition {
    /// Whether offsets are such as appending, ending and trimming give.
    pub(crate) fn is_possible(&self) -> bool {
        let offsets = self.records.iter().map(|record| record.offset);
        let bounds = 0 <= self.start && self.start <= self.end && self.end < i64::MAX / 2;
        let inside = offsets.clone().all(|offset| self.start <= offset && offset < self.end);
        let rising = offsets.clone().zip(offsets.skip(1)).all(|(a, b)| a < b);
        let open = self.open.values().all(|first| (0..=self.end).contains(first));
        bounds && inside && rising && open
    }
    /// Oldest kept offset.
    pub fn start(&self) -> i64 {
        self.start
    }
    /// Last stable offset, exclusive: committed reading ends here.
    pub fn last_stable(&self) -> i64 {
        self.open.values().min().copied().unwrap_or(self.end)
    }
    /// What the records cost in memory, in bytes, about.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn append(&mut self, at_ms: i64, txn_of: Option<u64>, messages: Vec<Message>) {
        if let Some(pid) = txn_of {
            self.open.entry(pid).or_insert(self.end);
        }
        for message in messages {
            let Message { key, value, headers, .. } = message;
            let record = Stored { offset: self.end, appended_ms: at_ms, txn_of, key, value, headers };
            self.bytes += record.cost();
            self.records.push_back(record);
            self.end += 1;
        }
    }

    /// Ends the transaction of `pid`, if it wrote here.
    pub(crate) fn finish(&mut self, pid: u64, commit: bool) {
        let Some(first) = self.open.remove(&pid) else { return };
        if !commit {
            self.remove(|record| record.offset >= first && record.txn_of == Some(pid));
        }
        self.end += 1;
    }

    fn remove(&mut self, gone: impl Fn(&Stored) -> bool) {
        let mut freed = 0;
        self.records.retain(|record| {
            let gone = gone(record);
            freed += if gone { record.cost() } else { 0 };
            !gone
        });
        self.bytes = self.bytes.saturating_sub(freed);
    }

    /// Committed records from `offset`; `None` when it is not kept or does not exist yet.
    pub(crate) fn read(&self, offset: i64, records_max: usize, bytes_max: usize) -> Option<Fetched> {
        if offset < self.start || offset > self.end {
            return None;
        }
        let end_offset = self.last_stable();
        let mut records = Vec::new();
        let mut bytes = 0;
        let mut next_offset = offset.max(end_offset);
        for record in self.records.range(self.records.partition_point(|r| r.offset < offset)..) {
            if record.offset >= end_offset {
                break;
            }
            bytes += record.cost() as usize;
            if records.len() >= records_max || (bytes > bytes_max && !records.is_empty()) {
                next_offset = record.offset;
                break;
            }
            records.push(record.clone());
        }
        Some(Fetched { records, next_offset, end_offset })
    }

    /// First offset whose append time is at or after `time_ms`; the last stable offset when there is none before it.
    pub(crate) fn offset_at(&self, time_ms: i64) -> i64 {
        let end = self.last_stable();
        self.records.iter().take_while(|r| r.offset < end).find(|r| r.appended_ms >= time_ms).map_or(end, |r| r.offset)
    }

    /// Where the log would begin without the records appended before `cutoff_ms`.
    pub(crate) fn start_after(&self, cutoff_ms: i64) -> i64 {
        if self.records.front().is_none_or(|r| r.appended_ms >= cutoff_ms) {
            return self.start;
        }
        self.offset_at(cutoff_ms)
    }

    pub(crate) fn trim(&mut self, start: i64) {
        while self.records.front().is_some_and(|r| r.offset < start) {
            self.bytes = self.bytes.saturating_sub(self.records.pop_front().map_or(0, |r| r.cost()));
        }
        self.start = self.start.max(start.min(self.end));
    }

    /// Whether more than half of the records may be overwritten ones.
    pub(crate) fn is_dirty(&self, floor: usize) -> bool {
        self.records.len() > 2 * self.clean + floor
    }

    /// Keeps the newest committed record of each key, and tombstones that are younger than `tombstones_before_ms`.
    pub(crate) fn compact(&mut self, tombstones_before_ms: i64) {
        let end = self.last_stable();
        let mut newer = BTreeSet::new();
        let mut gone = BTreeSet::new();
        for record in self.records.iter().rev().filter(|r| r.offset < end) {
            let Some(key) = &record.key else { continue };
            let forgotten = record.value.is_none() && record.appended_ms < tombstones_before_ms;
            if !newer.insert(key) || forgotten {
                gone.insert(record.offset);
            }
        }
        self.remove(|record| gone.contains(&record.offset));
        self.clean = self.records.len();
    }
}
