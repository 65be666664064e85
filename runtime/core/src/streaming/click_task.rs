//! The click stage for one partition: events in, partial panes out.
//!
//! State is what was committed, and beside it what was added since, so that an aborted transaction is forgotten by dropping
//! the second. Panes that the watermark has passed leave the task; what it holds is the open minute or two, and the
//! fingerprints of the horizon. State is larger than a core's cache, so a block of rows is looked up at once, and then
//! judged row by row. Left out: the log itself (see `job`).

use std::{borrow::Cow, collections::BTreeMap, ops::Range};

use arrow::array::Array;
use bytes::Bytes;

use super::{
    checkpoint::{self, ClickHead, DamagedRecord, Record},
    config::{PANE_MS, StreamConfig, is_pane, ms, pane_of},
    dedup::{Dedup, Fingerprint, Seen, fingerprint},
    distinct::user_hash,
    event::{ClickBatch, Counts, Decoded, Fate, Reason, Rules, Valid, validate},
    pane::{OTHER_PAGES, OpenPane, key_hash},
    watermark::{Idleness, InputMark},
};
use crate::ports::{
    PortError, Result,
    event_log::{LogRecord, OutRecord},
};

/// Rows that are looked up at once: as many as a core can wait for, and few enough that what they brought is still in its
/// cache when they are judged.
const BLOCK: usize = 64;

/// What was found last, since rows that follow each other are mostly of the same minute.
struct Newest<'a, T> {
    found: Option<(i64, Option<&'a T>)>,
}

impl<T> Default for Newest<'_, T> {
    fn default() -> Self {
        Self { found: None }
    }
}

impl<'a, T> Newest<'a, T> {
    #[inline]
    fn of(&mut self, start: i64, find: impl FnOnce(i64) -> Option<&'a T>) -> Option<&'a T> {
        match self.found {
            Some((newest, found)) if newest == start => found,
            Some(_) | None => self.found.insert((start, find(start))).1,
        }
    }
}

/// What was found about a row before it is judged.
#[derive(Debug, Clone, Copy)]
struct Glance {
    /// Start of its pane, which is the minute of its fingerprint.
    start: i64,
    print: Fingerprint,
    /// Whether the fingerprint was remembered then; a duplicate within its own block is not yet.
    held: bool,
    key: u64,
    /// The id of the key in the pane of the row's minute, if it had one then.
    id: Option<u32>,
}

/// A partition of clicks.
#[derive(Debug)]
pub struct ClickTask {
    partition: i32,
    committed: ClickHead,
    head: ClickHead,
    panes: BTreeMap<i64, OpenPane>,
    dedup: Dedup,
    /// Additions in the changelog per minute: those of panes, and those of fingerprints.
    pane_ordinals: BTreeMap<i64, u32>,
    print_ordinals: BTreeMap<i64, u32>,
    /// Late and dead-lettered records since the last commit.
    aside: Vec<OutRecord>,
    aside_bytes: usize,
    touched: bool,
    plan: Option<Plan>,
    scratch: Vec<u8>,
    /// What was found about the rows of a block.
    block: Vec<Glance>,
    /// Whether the partition is read to its end, and since when.
    pub idleness: Idleness,
}

/// What becomes of state when the prepared transaction lands.
#[derive(Debug)]
struct Plan {
    head: ClickHead,
    closed: Vec<i64>,
    pane_ordinals: BTreeMap<i64, u32>,
    print_ordinals: BTreeMap<i64, u32>,
}

impl ClickTask {
    /// A task without state, which begins at `next_offset`.
    pub fn new(partition: i32, next_offset: i64) -> Self {
        Self::with_head(partition, ClickHead { next_offset, ..ClickHead::default() })
    }

    fn with_head(partition: i32, head: ClickHead) -> Self {
        Self {
            partition,
            committed: head.clone(),
            head,
            panes: BTreeMap::new(),
            dedup: Dedup::default(),
            pane_ordinals: BTreeMap::new(),
            print_ordinals: BTreeMap::new(),
            aside: Vec::new(),
            aside_bytes: 0,
            touched: false,
            plan: None,
            scratch: Vec::new(),
            block: Vec::with_capacity(BLOCK),
            idleness: Idleness::default(),
        }
    }

    /// A task from the live records of its changelog, in any order; `None` when there is no head among them.
    ///
    /// # Errors
    /// `Permanent` with code `CHANGELOG_DAMAGED` when a record cannot be read.
    pub fn restore(partition: i32, records: &BTreeMap<Bytes, Bytes>, config: &StreamConfig) -> Result<Option<Self>> {
        let damaged = |error: DamagedRecord| damaged_changelog(&config.topics.changelog, partition, error);
        let mut task = Self::with_head(partition, ClickHead::default());
        let mut found = None;
        for (key, value) in records {
            let ordinal = checkpoint::parse_key(key).map_err(damaged)?.map(|(_, ordinal)| ordinal);
            match (checkpoint::decode(value, config.exact_users_max).map_err(damaged)?, ordinal) {
                (Record::ClickHead(head), None) => found = Some(head),
                (Record::Pane { start, pane }, Some(ordinal)) if is_pane(start) => {
                    task.panes.entry(start).or_default().restore(&pane.pages, config.exact_users_max);
                    raise(&mut task.pane_ordinals, start, ordinal);
                }
                (Record::Fingerprints { minute, fingerprints }, Some(ordinal)) if is_pane(minute) => {
                    task.dedup.restore(minute, fingerprints);
                    raise(&mut task.print_ordinals, minute, ordinal);
                }
                (
                    Record::ClickHead(_)
                    | Record::Pane { .. }
                    | Record::Fingerprints { .. }
                    | Record::MergeHead(_)
                    | Record::Partial { .. }
                    | Record::Status { .. }
                    | Record::Control(_),
                    _,
                ) => return Err(damaged(DamagedRecord::Field("key"))),
            }
        }
        let Some(head) = found else { return Ok(None) };
        (task.committed, task.head) = (head.clone(), head);
        Ok(Some(task))
    }

    /// Next offset to read.
    pub fn next_offset(&self) -> i64 {
        self.head.next_offset
    }
    /// Next offset of committed state.
    pub fn committed_offset(&self) -> i64 {
        self.committed.next_offset
    }
    /// Whether there is anything to commit.
    pub fn is_dirty(&self) -> bool {
        self.touched
    }
    /// Bytes of late and dead-lettered records that wait for the commit.
    pub fn aside_bytes(&self) -> usize {
        self.aside_bytes
    }
    /// Watermark, in milliseconds since 1970.
    pub fn watermark(&self) -> Option<i64> {
        self.head.watermark.value
    }
    /// Fates of committed records, since the partition was first read.
    pub fn counts(&self) -> &Counts {
        &self.committed.counts
    }
    /// Committed state in words, for comparison: head, panes and fingerprints.
    pub fn snapshot(&self, config: &StreamConfig) -> (ClickHead, Vec<Bytes>) {
        let mut records = Vec::new();
        for (&start, pane) in &self.panes {
            records.extend(checkpoint::encode_pane(start, &pane.committed(config.exact_users_max), usize::MAX));
        }
        for (minute, prints) in self.dedup.snapshot() {
            records.extend(checkpoint::encode_fingerprints(minute, &prints, usize::MAX));
        }
        (self.committed.clone(), records)
    }

    /// Takes a batch of records with what the decoder made of them. Records before the next offset are skipped: a
    /// re-delivery changes nothing.
    ///
    /// # Errors
    /// `Permanent` when the decoder did not account for each record exactly once.
    pub fn process(&mut self, records: &[LogRecord], next_offset: i64, decoded: &Decoded, config: &StreamConfig) -> Result<()> {
        let before = self.head.counts.read;
        let skipped = records.iter().take_while(|r| r.offset < self.head.next_offset).count();
        let rules =
            Rules { event_types: &config.event_types, regions: config.regions.as_ref(), future_ms: ms(config.future_bound) };
        let (mut row, mut bad) = (0, 0);
        let mut looked_up = 0;
        for (index, record) in records.iter().enumerate() {
            let is_row = decoded.batch.record.get(row).is_some_and(|&r| r as usize == index);
            let is_bad = decoded.undecodable.get(bad).is_some_and(|u| u.record as usize == index);
            if is_row == is_bad {
                return Err(PortError::permanent(format!("decoder accounts for record {index} of {} once", records.len())));
            }
            if index >= skipped {
                self.head.appended_ms = Some(record.appended_ms);
                if is_row {
                    if row >= looked_up {
                        looked_up = decoded.batch.record.len().min(row + BLOCK);
                        self.look_up(&decoded.batch, row..looked_up);
                    }
                    let glance = self.block[self.block.len() - (looked_up - row)];
                    self.row(&decoded.batch, row, glance, record, &rules, config);
                } else {
                    let reason = Reason::Undecodable(decoded.undecodable[bad].reason.clone());
                    self.dead_letter(record, &reason, 0, config);
                }
            }
            if is_row { row += 1 } else { bad += 1 }
        }
        if row != decoded.batch.record.len() || bad != decoded.undecodable.len() {
            return Err(PortError::permanent(format!("decoder made more rows than {} records", records.len())));
        }
        let read = self.head.counts.read - before;
        assert!(read == (records.len() - skipped) as u64 && self.head.counts.balances(), "each record has one fate");
        if next_offset > self.head.next_offset {
            self.head.next_offset = next_offset;
            self.touched |= read > 0;
        }
        Ok(())
    }

    /// Looks a block of rows up. The look-ups do not wait for each other, as those of rows that are judged one by one would,
    /// and each pass asks for what the next one needs.
    fn look_up(&mut self, batch: &ClickBatch, rows: Range<usize>) {
        self.block.clear();
        for row in rows.clone() {
            let print = fingerprint(batch, row, &mut self.scratch);
            let key = key_hash(batch.region.value(row), batch.page.value(row));
            let start = pane_of(batch.timestamp_ms.value(row));
            self.block.push(Glance { start, print, held: false, key, id: None });
        }
        let mut near = 0;
        let mut prints = Newest::default();
        for glance in &self.block {
            near ^= prints.of(glance.start, |start| self.dedup.prints(start)).map_or(0, |prints| prints.near(glance.print));
        }
        let mut panes = Newest::default();
        for (row, glance) in rows.zip(&mut self.block) {
            let pane = panes.of(glance.start, |start| self.panes.get(&start));
            glance.id = pane.and_then(|pane| pane.find_hashed(glance.key, batch.region.value(row), batch.page.value(row)));
        }
        for glance in &mut self.block {
            let minute = prints.of(glance.start, |start| self.dedup.prints(start));
            glance.held = minute.is_some_and(|prints| prints.contains(glance.print));
            if let (Some(id), Some(pane)) = (glance.id, panes.of(glance.start, |start| self.panes.get(&start))) {
                near ^= pane.near(id);
            }
        }
        std::hint::black_box(near);
    }

    fn row(
        &mut self,
        batch: &ClickBatch,
        row: usize,
        glance: Glance,
        record: &LogRecord,
        rules: &Rules<'_>,
        config: &StreamConfig,
    ) {
        let event = match validate(batch, row, record.appended_ms, rules) {
            Ok(event) => event,
            Err(reason) => {
                let cents = if batch.monto_cents.is_null(row) { 0 } else { batch.monto_cents.value(row) };
                return self.dead_letter(record, &reason, cents, config);
            }
        };
        let watermark = self.head.watermark;
        let (time, horizon) = (event.timestamp_ms, ms(config.dedup_horizon));
        let seen = match glance.held {
            true => Dedup::see_held(time, &watermark, horizon),
            false => self.dedup.see(time, glance.print, &watermark, horizon, config.dedup_entries_max),
        };
        match seen {
            Seen::New | Seen::BeyondHorizon => {}
            Seen::Forgotten => self.head.forgotten += 1,
            Seen::Duplicate => return self.head.counts.add(Fate::Deduplicated, event.cents),
        }
        let start = glance.start;
        if watermark.reached(start.saturating_add(PANE_MS).saturating_add(config.lateness_ms())) {
            self.head.counts.add(Fate::Late, event.cents);
            let late = Aside { topic: &config.topics.late, fate: Fate::Late, reason: Cow::Borrowed("timestamp.late") };
            return self.put_aside(record, late, config);
        }
        self.head.watermark.observe(event.timestamp_ms, config.watermark_bound_ms());
        self.head.counts.add(Fate::Published, event.cents);
        self.add(start, glance, &event, config);
    }

    fn add(&mut self, start: i64, glance: Glance, event: &Valid<'_>, config: &StreamConfig) {
        let pane = match self.panes.get_mut(&start) {
            Some(pane) => pane,
            None => {
                let before = self.panes.last_key_value().filter(|(newest, _)| **newest < start);
                let begun = before.map_or_else(OpenPane::default, |(_, before)| OpenPane::like(before));
                self.panes.entry(start).or_insert(begun)
            }
        };
        let id = match glance.id {
            Some(id) => id,
            None if pane.len() < config.pane_keys_max => pane.intern_hashed(glance.key, event.region, event.page),
            // The region stays right; only its split by page ends here.
            None => match pane.find_hashed(glance.key, event.region, event.page) {
                Some(id) => id,
                None => pane.intern_hashed(key_hash(event.region, OTHER_PAGES), event.region, OTHER_PAGES),
            },
        };
        pane.add(id, event, user_hash(event.user_id), config.exact_users_max);
    }

    fn dead_letter(&mut self, record: &LogRecord, reason: &Reason, cents: i64, config: &StreamConfig) {
        self.head.counts.add(reason.fate(), cents);
        let letter = Aside { topic: &config.topics.dead_letter, fate: reason.fate(), reason: reason.text() };
        self.put_aside(record, letter, config);
    }

    /// Copies a record to another topic, unchanged, with what became of it in headers. A record that would be too large
    /// with them goes without its value: the headers say where it stands.
    fn put_aside(&mut self, record: &LogRecord, aside: Aside<'_>, config: &StreamConfig) {
        let mut headers = record.headers.clone();
        let texts = [
            ("simulacro.fate", aside.fate.name().to_owned()),
            ("simulacro.reason", aside.reason.into_owned()),
            ("simulacro.topic", config.topics.clicks.clone()),
            ("simulacro.partition", self.partition.to_string()),
            ("simulacro.offset", record.offset.to_string()),
            ("simulacro.appended_ms", record.appended_ms.to_string()),
        ];
        headers.extend(texts.map(|(name, text)| (name.to_owned(), Bytes::from(text))));
        let size = |b: &Option<Bytes>| b.as_ref().map_or(0, Bytes::len);
        let rest = size(&record.key) + headers.iter().map(|(n, v)| n.len() + v.len() + 16).sum::<usize>();
        let mut value = record.value.clone();
        if rest + size(&value) > config.record_bytes_max {
            headers.push(("simulacro.value_bytes".to_owned(), size(&value).to_string().into()));
            value = Some(Bytes::new());
        }
        self.aside_bytes += rest + size(&value);
        self.aside.push(OutRecord {
            topic: aside.topic.to_owned(),
            partition: Some(self.partition),
            key: record.key.clone(),
            value,
            headers,
        });
    }

    /// Moves past markers behind the last record; there is nothing to commit in that.
    pub fn skip_to(&mut self, next_offset: i64) {
        self.head.next_offset = self.head.next_offset.max(next_offset);
    }

    /// Begins where a running job is: for a partition that was added to the topic.
    pub fn begin_at(&mut self, global: Option<i64>) {
        for watermark in [&mut self.head.watermark, &mut self.committed.watermark] {
            global.iter().for_each(|&global| watermark.follow(global));
        }
    }

    /// Moves an idle partition up to the others, and takes note of whether it is idle.
    pub fn follow(&mut self, idle: bool, target: Option<i64>) {
        if idle && let Some(target) = target {
            self.head.watermark.follow(target);
        }
        self.touched |= self.mark(idle) != self.head.told;
    }

    fn mark(&self, idle: bool) -> InputMark {
        // Windows close at whole minutes, so nothing finer is told.
        InputMark { watermark: self.head.watermark.value.map(pane_of), idle }
    }

    /// Everything a transaction must hold for what was added since the last commit. Calling it again gives the same.
    pub fn prepare(&mut self, idle: bool, config: &StreamConfig) -> Vec<OutRecord> {
        let exact_max = config.exact_users_max;
        let mut out = self.aside.clone();
        let mark = self.mark(idle);
        let mut plan = Plan {
            head: ClickHead { told: mark, ..self.head.clone() },
            closed: Vec::new(),
            pane_ordinals: self.pane_ordinals.clone(),
            print_ordinals: self.print_ordinals.clone(),
        };
        let changelog = |key: Bytes, value: Option<Bytes>| OutRecord {
            topic: config.topics.changelog.clone(),
            partition: Some(self.partition),
            key: Some(key),
            value,
            headers: Vec::new(),
        };
        let partial = |partition: i32, value: Bytes| OutRecord {
            topic: config.topics.partials.clone(),
            partition: Some(partition),
            key: None,
            value: Some(value),
            headers: Vec::new(),
        };
        for (&start, pane) in &mut self.panes {
            if self.head.watermark.reached(start.saturating_add(PANE_MS)) {
                // The pane is passed: it leaves, with whatever was added to it.
                let merged = pane.merged(exact_max);
                let (cells, bytes_max) = (pane.whole(&merged), config.record_bytes_max);
                let partition_of = |region: &str| merge_partition(region, config.merge_partitions);
                let parts = checkpoint::encode_partials(self.partition, start, cells, bytes_max, partition_of);
                out.extend(parts.into_iter().map(|(partition, record)| partial(partition, record)));
                let live = plan.pane_ordinals.remove(&start).unwrap_or(0);
                out.extend((0..live).map(|ordinal| changelog(checkpoint::pane_key(start, ordinal), None)));
                plan.closed.push(start);
            } else if pane.has_additions() {
                pane.settle_additions(exact_max);
                let next = plan.pane_ordinals.entry(start).or_insert(0);
                for record in checkpoint::encode_addition(start, pane.additions(), config.record_bytes_max) {
                    out.push(changelog(checkpoint::pane_key(start, *next), Some(record)));
                    *next += 1;
                }
            }
        }
        let horizon = ms(config.dedup_horizon);
        let expired = self.dedup.expired(&self.head.watermark, horizon);
        for (minute, prints) in self.dedup.dirty() {
            if self.head.watermark.reached(minute.saturating_add(PANE_MS).saturating_add(horizon)) {
                continue;
            }
            let next = plan.print_ordinals.entry(minute).or_insert(0);
            for record in checkpoint::encode_fingerprints(minute, prints, config.record_bytes_max) {
                out.push(changelog(checkpoint::fingerprints_key(minute, *next), Some(record)));
                *next += 1;
            }
        }
        for minute in expired {
            let live = plan.print_ordinals.remove(&minute).unwrap_or(0);
            out.extend((0..live).map(|ordinal| changelog(checkpoint::fingerprints_key(minute, ordinal), None)));
        }
        if mark != self.head.told {
            // After the partials: a watermark speaks for everything before it.
            let status = checkpoint::encode_status(self.partition, &mark);
            out.extend((0..config.merge_partitions).map(|partition| partial(partition, status.clone())));
        }
        out.push(changelog(checkpoint::head_key(), Some(checkpoint::encode_click_head(&plan.head))));
        self.plan = Some(plan);
        out
    }

    /// The prepared transaction landed. Returns what it added to the counts.
    pub fn commit(&mut self, config: &StreamConfig) -> Counts {
        let added = self.head.counts.since(&self.committed.counts);
        assert!(self.head.counts.balances() && added.balances(), "each record has one fate");
        if let Some(plan) = self.plan.take() {
            self.head = plan.head;
            for start in plan.closed {
                self.panes.remove(&start);
            }
            self.panes.values_mut().for_each(|pane| pane.commit(config.exact_users_max));
            self.pane_ordinals = plan.pane_ordinals;
            self.print_ordinals = plan.print_ordinals;
            self.dedup.commit(&self.head.watermark, ms(config.dedup_horizon));
        }
        self.committed = self.head.clone();
        self.aside.clear();
        self.aside_bytes = 0;
        self.touched = false;
        added
    }

    /// The transaction did not land: everything since the last commit is forgotten. Reading goes on at
    /// [`ClickTask::committed_offset`].
    pub fn rollback(&mut self) {
        self.head = self.committed.clone();
        self.panes.values_mut().for_each(OpenPane::rollback);
        self.panes.retain(|_, pane| !pane.is_empty());
        self.dedup.rollback();
        self.aside.clear();
        self.aside_bytes = 0;
        self.plan = None;
        self.touched = false;
        self.idleness.reset();
    }
}

struct Aside<'a> {
    topic: &'a str,
    fate: Fate,
    reason: Cow<'a, str>,
}

fn raise(ordinals: &mut BTreeMap<i64, u32>, minute: i64, ordinal: u32) {
    let next = ordinals.entry(minute).or_insert(0);
    *next = (*next).max(ordinal.saturating_add(1));
}

pub(super) fn damaged_changelog(topic: &str, partition: i32, error: DamagedRecord) -> PortError {
    PortError::permanent(format!("restore {topic}-{partition}")).code("CHANGELOG_DAMAGED").because(error)
}

/// Which partition of the merge a region belongs to.
pub fn merge_partition(region: &str, partitions: i32) -> i32 {
    let partitions = u64::try_from(partitions.max(1)).unwrap_or(1);
    i32::try_from(user_hash(region) % partitions).unwrap_or(0)
}
