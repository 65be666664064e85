//! The merge stage for one partition of partials: panes of all input partitions together, and the rows of their windows.
//!
//! A window is emitted when the smallest watermark of all inputs passes its end, and again, one revision higher, for each
//! key that a later partial changes. A pane is held for window + lateness after its start. No partial can be older than
//! that, because each input promised its watermark before; should one be, through a partition nobody had announced, it
//! goes to the late topic and is counted. Left out: the encoding of rows, and the log.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use bytes::Bytes;

use super::{
    checkpoint::{self, Control, DamagedRecord, MergeHead, Record},
    click_task::damaged_changelog,
    config::{PANE_MS, StreamConfig, is_pane, pane_of},
    pane::{Cell, MergedPane},
    watermark::{InputMark, global, target},
    window::{MetricRow, WindowKind, sliding_ends},
};
use crate::ports::{
    PortError, Result,
    event_log::{LogRecord, OutRecord},
};

/// A partition of partials.
#[derive(Debug)]
pub struct MergeTask {
    partition: i32,
    committed: MergeHead,
    head: MergeHead,
    panes: BTreeMap<i64, MergedPane>,
    added: BTreeMap<i64, MergedPane>,
    ordinals: BTreeMap<i64, u32>,
    /// Partials without a pane, since the last commit.
    aside: Vec<OutRecord>,
    /// What the click stage was told last; not part of the state, it is told again after a restart.
    told: Option<Control>,
    touched: bool,
    plan: Option<Plan>,
}

#[derive(Debug)]
struct Plan {
    closed: Option<i64>,
    told: Option<Control>,
    /// Rows emitted, as additions to panes.
    emitted: BTreeMap<i64, MergedPane>,
    expired: BTreeSet<i64>,
    ordinals: BTreeMap<i64, u32>,
}

/// Kind, end of the window, region and page of a row.
type DueRow<'a> = (WindowKind, i64, &'a str, Option<&'a str>);

/// What a transaction of a merge partition holds.
#[derive(Debug, Default)]
pub struct Prepared {
    /// Records of the job's own topics.
    pub records: Vec<OutRecord>,
    /// Rows for the output topic, still to be encoded.
    pub rows: Vec<MetricRow>,
}

impl MergeTask {
    /// A task without state, which begins at `next_offset` and waits for all of `inputs`.
    pub fn new(partition: i32, next_offset: i64, inputs: impl IntoIterator<Item = i32>) -> Self {
        let inputs = inputs.into_iter().map(|input| (input, InputMark::default())).collect();
        Self::with_head(partition, MergeHead { next_offset, inputs, ..MergeHead::default() })
    }

    fn with_head(partition: i32, head: MergeHead) -> Self {
        Self {
            partition,
            committed: head.clone(),
            head,
            panes: BTreeMap::new(),
            added: BTreeMap::new(),
            ordinals: BTreeMap::new(),
            aside: Vec::new(),
            told: None,
            touched: false,
            plan: None,
        }
    }

    /// A task from the live records of its changelog, in any order; `None` when there is no head among them.
    ///
    /// # Errors
    /// `Permanent` with code `CHANGELOG_DAMAGED` when a record cannot be read.
    pub fn restore(partition: i32, records: &BTreeMap<Bytes, Bytes>, config: &StreamConfig) -> Result<Option<Self>> {
        let damaged = |error: DamagedRecord| damaged_changelog(&config.topics.merge_changelog, partition, error);
        let mut task = Self::with_head(partition, MergeHead::default());
        let mut found = None;
        for (key, value) in records {
            let ordinal = checkpoint::parse_key(key).map_err(damaged)?.map(|(_, ordinal)| ordinal);
            match (checkpoint::decode(value, config.exact_users_max).map_err(damaged)?, ordinal) {
                (Record::MergeHead(head), None) => found = Some(head),
                (Record::Pane { start, pane }, Some(ordinal)) if is_pane(start) => {
                    task.panes.entry(start).or_default().merge(&pane, config.exact_users_max);
                    let next = task.ordinals.entry(start).or_insert(0);
                    *next = (*next).max(ordinal.saturating_add(1));
                }
                (
                    Record::MergeHead(_)
                    | Record::Pane { .. }
                    | Record::ClickHead(_)
                    | Record::Fingerprints { .. }
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
    /// Windows that end at or before this are emitted.
    pub fn closed(&self) -> Option<i64> {
        self.committed.closed
    }
    /// Events and cents that were merged into panes.
    pub fn merged(&self) -> (u64, i64) {
        self.committed.merged
    }
    /// Events and cents that came after their pane was dropped.
    pub fn expired(&self) -> (u64, i64) {
        self.committed.expired
    }
    /// Number of panes that are held.
    pub fn panes(&self) -> usize {
        self.panes.len()
    }
    /// Committed state in words, for comparison.
    pub fn snapshot(&mut self, config: &StreamConfig) -> (MergeHead, Vec<Bytes>) {
        let mut records = Vec::new();
        for (&start, pane) in &mut self.panes {
            pane.pages.settle(config.exact_users_max);
            records.extend(checkpoint::encode_merged_pane(start, pane, usize::MAX));
        }
        (self.committed.clone(), records)
    }

    /// Waits for these input partitions too; called when the task starts, for partitions that were added to the topic.
    pub fn expect_inputs(&mut self, inputs: impl IntoIterator<Item = i32>) {
        for input in inputs {
            // A partition that is new to a running job begins where the job is: nothing before that is expected of it.
            let mark = InputMark { watermark: self.committed.closed, idle: false };
            self.committed.inputs.entry(input).or_insert(mark);
            self.head.inputs.entry(input).or_insert(mark);
        }
    }

    /// Takes partials and marks. Records before the next offset are skipped.
    ///
    /// # Errors
    /// `Permanent` with code `PARTIAL_DAMAGED` when a record cannot be read: it is our own, so nothing may go on without it.
    pub fn process(&mut self, records: &[LogRecord], next_offset: i64, config: &StreamConfig) -> Result<()> {
        for record in records.iter().filter(|r| r.offset >= self.head.next_offset) {
            let damaged = |error: DamagedRecord| {
                let at = format!("read {}-{} at {}", config.topics.partials, self.partition, record.offset);
                PortError::permanent(at).code("PARTIAL_DAMAGED").because(error)
            };
            let value = record.value.as_deref().unwrap_or(&[]);
            match checkpoint::decode(value, config.exact_users_max).map_err(damaged)? {
                Record::Partial { start, .. } if !is_pane(start) => {
                    return Err(damaged(DamagedRecord::Field("start")));
                }
                Record::Partial { input: _, start, pane } => {
                    let (events, cents) = (pane.pages.events(), pane.pages.cents());
                    if self.head.closed.is_some_and(|closed| start.saturating_add(config.state_ttl_ms()) <= closed) {
                        self.head.expired =
                            (self.head.expired.0.saturating_add(events), self.head.expired.1.saturating_add(cents));
                        self.aside.push(OutRecord {
                            topic: config.topics.late.clone(),
                            partition: None,
                            key: record.key.clone(),
                            value: record.value.clone(),
                            headers: vec![
                                ("simulacro.fate".into(), Bytes::from_static(b"late")),
                                ("simulacro.reason".into(), Bytes::from_static(b"partial.expired")),
                                ("simulacro.events".into(), events.to_string().into()),
                            ],
                        });
                    } else {
                        self.head.merged = (self.head.merged.0.saturating_add(events), self.head.merged.1.saturating_add(cents));
                        put(&mut self.added, start, *pane, config.exact_users_max);
                    }
                }
                Record::Status { input, mark } => {
                    let known = self.head.inputs.entry(input).or_default();
                    *known = InputMark { watermark: known.watermark.max(mark.watermark), idle: mark.idle };
                }
                Record::ClickHead(_)
                | Record::MergeHead(_)
                | Record::Pane { .. }
                | Record::Fingerprints { .. }
                | Record::Control(_) => return Err(damaged(DamagedRecord::Field("record of another topic"))),
            }
            self.touched = true;
        }
        self.head.next_offset = self.head.next_offset.max(next_offset);
        Ok(())
    }

    /// Everything a transaction must hold for what was added since the last commit. Calling it again gives the same.
    pub fn prepare(&mut self, config: &StreamConfig) -> Prepared {
        let exact_max = config.exact_users_max;
        let before = self.head.closed;
        let closed = before.max(global(self.head.inputs.values()).map(pane_of));
        let mut emitted: BTreeMap<i64, MergedPane> = BTreeMap::new();
        let mut rows = Vec::new();
        for (kind, end, region, page) in self.due(before, closed, config) {
            let length = match kind {
                WindowKind::Region1m | WindowKind::Page1m => PANE_MS,
                WindowKind::Region5m => config.sliding_ms(),
            };
            // What is counted per window stands in its last pane.
            let last = end - PANE_MS;
            let mut cell = Cell::default();
            for (_, pane) in self.panes.range(end - length..end).chain(self.added.range(end - length..end)) {
                let part = match page {
                    Some(page) => pane.pages.cell(region, page),
                    None => pane.regions.get(region).map(|r| &r.cell),
                };
                part.iter().for_each(|part| cell.merge(part, exact_max));
            }
            let revision = match kind {
                WindowKind::Region1m | WindowKind::Page1m => cell.emitted,
                WindowKind::Region5m => {
                    self.panes.get(&last).and_then(|p| p.regions.get(region)).map_or(0, |r| r.emitted_sliding)
                }
            };
            let note = emitted.entry(last).or_default();
            match (kind, page) {
                (WindowKind::Page1m, Some(page)) => note.pages.cell_mut(region, page).emitted += 1,
                (WindowKind::Region5m, _) => note.region_mut(region).emitted_sliding += 1,
                (WindowKind::Region1m, _) | (WindowKind::Page1m, None) => note.region_mut(region).cell.emitted += 1,
            }
            rows.push(MetricRow::new((kind, end - length, end), region, page, cell, revision, exact_max));
        }

        let mut records = self.aside.clone();
        let changelog = |key: Bytes, value: Option<Bytes>| OutRecord {
            topic: config.topics.merge_changelog.clone(),
            partition: Some(self.partition),
            key: Some(key),
            value,
            headers: Vec::new(),
        };
        let mut ordinals = self.ordinals.clone();
        let is_expired = |start: i64| closed.is_some_and(|c| start.saturating_add(config.state_ttl_ms()) <= c);
        let starts: BTreeSet<i64> = self.added.keys().chain(emitted.keys()).copied().collect();
        for start in starts.into_iter().filter(|&start| !is_expired(start)) {
            let mut addition = self.added.get(&start).cloned().unwrap_or_default();
            emitted.get(&start).iter().for_each(|e| addition.merge(e, exact_max));
            addition.pages.settle(exact_max);
            let next = ordinals.entry(start).or_insert(0);
            for record in checkpoint::encode_merged_addition(start, &addition, config.record_bytes_max) {
                records.push(changelog(checkpoint::pane_key(start, *next), Some(record)));
                *next += 1;
            }
        }
        let held = self.panes.keys().chain(self.added.keys()).chain(emitted.keys());
        let expired: BTreeSet<i64> = held.copied().filter(|&start| is_expired(start)).collect();
        for start in &expired {
            let live = ordinals.remove(start).unwrap_or(0);
            records.extend((0..live).map(|ordinal| changelog(checkpoint::pane_key(*start, ordinal), None)));
        }
        let head = MergeHead { closed, ..self.head.clone() };
        records.push(changelog(checkpoint::head_key(), Some(checkpoint::encode_merge_head(&head))));

        // One voice is enough: what a click partition promises is told to every merge partition.
        let control = Control { target: target(self.head.inputs.values()), global: closed };
        let told = (self.partition == 0).then_some(control);
        if told.is_some() && told != self.told {
            records.push(OutRecord {
                topic: config.topics.control.clone(),
                partition: Some(0),
                key: Some(checkpoint::head_key()),
                value: Some(checkpoint::encode_control(&control)),
                headers: Vec::new(),
            });
        }
        self.plan = Some(Plan { closed, told, emitted, expired, ordinals });
        Prepared { records, rows }
    }

    /// Which rows are due, sorted: those of windows that close now, and those of closed windows that were added to.
    fn due<'a>(&'a self, before: Option<i64>, closed: Option<i64>, config: &StreamConfig) -> Vec<DueRow<'a>> {
        let mut due = Vec::new();
        let Some(closed) = closed else { return due };
        let mut add = |start: i64, pane: &'a MergedPane, closes_now: bool| {
            // A pane that was there before makes rows when its window closes; an added one whenever it is closed.
            let is_due = |end: i64| end <= closed && (!closes_now || before.is_none_or(|b| end > b));
            if is_due(start + PANE_MS) {
                for (region, page, cell) in pane.pages.cells() {
                    if cell.events() > 0 {
                        due.push((WindowKind::Page1m, start + PANE_MS, region, Some(page)));
                    }
                }
            }
            for region in pane.regions.iter().filter(|(_, total)| total.cell.events() > 0).map(|(region, _)| region) {
                if is_due(start + PANE_MS) {
                    due.push((WindowKind::Region1m, start + PANE_MS, region, None));
                }
                for end in sliding_ends(config, start).filter(|&end| is_due(end)) {
                    due.push((WindowKind::Region5m, end, region, None));
                }
            }
        };
        if before != Some(closed) {
            self.panes.iter().for_each(|(&start, pane)| add(start, pane, true));
        }
        self.added.iter().for_each(|(&start, pane)| add(start, pane, false));
        due.sort_unstable();
        due.dedup();
        due
    }

    /// The prepared transaction landed.
    pub fn commit(&mut self, config: &StreamConfig) {
        if let Some(plan) = self.plan.take() {
            self.head.closed = plan.closed;
            self.told = plan.told.or(self.told);
            for (start, addition) in std::mem::take(&mut self.added).into_iter().chain(plan.emitted) {
                put(&mut self.panes, start, addition, config.exact_users_max);
            }
            plan.expired.iter().for_each(|start| {
                self.panes.remove(start);
            });
            self.ordinals = plan.ordinals;
        }
        self.committed = self.head.clone();
        self.aside.clear();
        self.touched = false;
    }

    /// The transaction did not land: everything since the last commit is forgotten. Reading goes on at
    /// [`MergeTask::committed_offset`].
    pub fn rollback(&mut self) {
        self.head = self.committed.clone();
        self.added.clear();
        self.aside.clear();
        self.plan = None;
        self.touched = false;
    }
}

/// Adds to a pane; the first addition becomes the pane.
fn put(panes: &mut BTreeMap<i64, MergedPane>, start: i64, addition: MergedPane, exact_max: usize) {
    match panes.entry(start) {
        Entry::Vacant(vacant) => _ = vacant.insert(addition),
        Entry::Occupied(mut held) => held.get_mut().merge(&addition, exact_max),
    }
}
