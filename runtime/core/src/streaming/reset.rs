//! A reset: the job reads on from what was appended at or after a time, forwards or backwards.
//!
//! Forwards it skips events and keeps everything it knows. Backwards it forgets what it knows of events and reads some
//! again; it keeps how often each window was emitted, so that what it makes anew replaces what is there. A window that had
//! events before the new position is made anew without them, which is why a plan says from which windows on all is whole.
//! A reset that dies half way leaves a job that refuses to start (`STATE_MISMATCH`) until it is repeated. Left out: topics
//! of other groups; the sinks read on from where their tables are, and what is emitted again reaches the warehouse.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{
    checkpoint::{self, ClickHead, Control, MergeHead, Record},
    click_task::{damaged_changelog, merge_partition},
    config::{PANE_MS, StreamConfig, ms, pane_of},
    event::{ClickDecoder, Rules, validate},
    job::read_changelog,
    pane::MergedPane,
    status::existing,
    window::{MetricRow, WindowKind},
};
use crate::ports::{
    PortError, Result,
    event_log::{EventLog, OutRecord, TopicPartition},
};

/// Records of one call of the log.
const SEND_RECORDS: usize = 1_000;

/// What becomes of a partition of clicks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// Next offset to read now; `None` when the job has never committed one.
    pub from: Option<i64>,
    /// Next offset to read afterwards.
    pub to: i64,
}

/// What a reset would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The time, in milliseconds since 1970.
    pub time_ms: i64,
    /// Partitions of clicks.
    pub clicks: BTreeMap<i32, Move>,
    /// First millisecond of the first window that is whole when it is made again; `None` when all are, or when nothing is
    /// read again.
    pub whole_from_ms: Option<i64>,
}

impl Plan {
    /// Whether any event is read again. Then the state of all partitions begins anew.
    pub fn is_backwards(&self) -> bool {
        self.clicks.values().any(|m| m.from.is_some_and(|from| m.to < from))
    }
    /// Records that are read again, gaps of markers included.
    pub fn again(&self) -> i64 {
        self.clicks.values().map(|m| m.from.map_or(0, |from| (from - m.to).max(0))).sum()
    }
    /// Records that are never read, gaps of markers included.
    pub fn skipped(&self) -> i64 {
        self.clicks.values().map(|m| m.from.map_or(0, |from| (m.to - from).max(0))).sum()
    }
}

/// Says what a reset to a time of append would do; changes nothing.
///
/// # Errors
/// Those of the log and the decoder; `UNKNOWN_TOPIC_OR_PARTITION` without a topic of clicks.
pub async fn plan(config: &StreamConfig, log: &dyn EventLog, decoder: &mut dyn ClickDecoder, time_ms: i64) -> Result<Plan> {
    let topic = &config.topics.clicks;
    let committed = log.committed(&config.group, topic).await?;
    let bounds = log.offsets(topic).await?;
    let mut clicks = BTreeMap::new();
    for (partition, to) in log.offsets_at(topic, time_ms).await? {
        clicks.insert(partition, Move { from: committed.get(&partition).copied(), to });
    }
    let mut plan = Plan { time_ms, clicks, whole_from_ms: None };
    if plan.is_backwards() {
        let rules =
            Rules { event_types: &config.event_types, regions: config.regions.as_ref(), future_ms: ms(config.future_bound) };
        let mut newest = None;
        for (&partition, m) in &plan.clicks {
            let Some(&(mut offset, _)) = bounds.get(&partition) else { continue };
            let at = TopicPartition { topic: topic.clone(), partition };
            while offset < m.to {
                let (mut records, next) = log.read(&at, offset, config.restore_records).await?;
                records.retain(|record| record.offset < m.to);
                let batch = decoder.decode(&records).await?.batch;
                for (row, &record) in batch.record.iter().enumerate() {
                    if let Ok(event) = validate(&batch, row, records[record as usize].appended_ms, &rules) {
                        newest = newest.max(Some(event.timestamp_ms));
                    }
                }
                if next <= offset {
                    break;
                }
                offset = next;
            }
        }
        // A sliding window that ends in a whole minute may begin before it.
        plan.whole_from_ms = newest.map(|newest| pane_of(newest).saturating_add(PANE_MS));
    }
    Ok(plan)
}

/// Carries a plan out. `emitted` is every row of the output topic. May be repeated after any error.
///
/// # Errors
/// `Retryable` with code `NON_EMPTY_GROUP` while the job has members; then nothing has changed. `Permanent` with code
/// `PARTIALS_WAIT` when the merge has not read everything, and going back would lose it. Otherwise those of the log.
pub async fn execute(config: &StreamConfig, log: &dyn EventLog, plan: &Plan, emitted: &[MetricRow]) -> Result<()> {
    let topics = &config.topics;
    let mut offsets: BTreeMap<TopicPartition, i64> = BTreeMap::new();
    for (&partition, m) in &plan.clicks {
        offsets.insert(TopicPartition { topic: topics.clicks.clone(), partition }, m.to);
    }
    let mut ends = BTreeMap::new();
    if plan.is_backwards() {
        let merged = log.committed(&config.group, &topics.partials).await?;
        for (partition, (oldest, end)) in existing(log.offsets(&topics.partials).await)? {
            let at = TopicPartition { topic: topics.partials.clone(), partition };
            let next = merged.get(&partition).copied().unwrap_or(oldest);
            if next < end && !log.read(&at, next, 1).await?.0.is_empty() {
                let what =
                    format!("reset {}: found partials at {next} of partition {partition} that are not merged", config.group);
                let what = format!("{what}, expected none; let the job run until it has caught up");
                return Err(PortError::permanent(what).code("PARTIALS_WAIT"));
            }
            offsets.insert(at, end);
            ends.insert(partition, end);
        }
    }
    // The offsets first: the log refuses while somebody works, and until the state follows nobody can.
    log.reset(&config.group, &offsets).await?;
    let mut records = Vec::new();
    for (&partition, m) in &plan.clicks {
        let live = existing(read_changelog(config, log, &topics.changelog, partition).await)?;
        let record = |key: Bytes, value: Option<Bytes>| record(&topics.changelog, partition, key, value);
        if plan.is_backwards() {
            records.extend(live.into_keys().filter(|key| *key != checkpoint::head_key()).map(|key| record(key, None)));
            let head = ClickHead { next_offset: m.to, ..ClickHead::default() };
            records.push(record(checkpoint::head_key(), Some(checkpoint::encode_click_head(&head))));
        } else if let Some(head) = live.get(&checkpoint::head_key()) {
            let damaged = |error| damaged_changelog(&topics.changelog, partition, error);
            if let Record::ClickHead(head) = checkpoint::decode(head, config.exact_users_max).map_err(damaged)? {
                let head = ClickHead { next_offset: m.to, ..head };
                records.push(record(checkpoint::head_key(), Some(checkpoint::encode_click_head(&head))));
            }
        }
    }
    if plan.is_backwards() {
        let inputs = || plan.clicks.keys().map(|&input| (input, Default::default())).collect();
        for (&partition, &end) in &ends {
            let live = existing(read_changelog(config, log, &topics.merge_changelog, partition).await)?;
            let record = |key: Bytes, value: Option<Bytes>| record(&topics.merge_changelog, partition, key, value);
            records.extend(live.into_keys().filter(|key| *key != checkpoint::head_key()).map(|key| record(key, None)));
            for (start, pane) in revisions(config, emitted, partition) {
                for (ordinal, value) in (0..).zip(checkpoint::encode_merged_pane(start, &pane, config.record_bytes_max)) {
                    records.push(record(checkpoint::pane_key(start, ordinal), Some(value)));
                }
            }
            let head = MergeHead { next_offset: end, inputs: inputs(), ..MergeHead::default() };
            records.push(record(checkpoint::head_key(), Some(checkpoint::encode_merge_head(&head))));
        }
        if !ends.is_empty() {
            let nothing = checkpoint::encode_control(&Control::default());
            records.push(record(&topics.control, 0, checkpoint::head_key(), Some(nothing)));
        }
    }
    if records.is_empty() {
        return Ok(());
    }
    let mut producer = log.producer(Some(&format!("{}-reset", config.group))).await?;
    producer.begin().await?;
    for part in records.chunks(SEND_RECORDS) {
        producer.send(part.to_vec()).await?;
    }
    producer.commit().await
}

fn record(topic: &str, partition: i32, key: Bytes, value: Option<Bytes>) -> OutRecord {
    OutRecord { topic: topic.to_owned(), partition: Some(partition), key: Some(key), value, headers: Vec::new() }
}

/// Panes of a merge partition without events, which say how often each of their windows was emitted.
fn revisions(config: &StreamConfig, emitted: &[MetricRow], partition: i32) -> BTreeMap<i64, MergedPane> {
    let mut panes: BTreeMap<i64, MergedPane> = BTreeMap::new();
    for row in emitted.iter().filter(|row| merge_partition(&row.region, config.merge_partitions) == partition) {
        let pane = panes.entry(row.window_end_ms - PANE_MS).or_default();
        let next = row.revision.saturating_add(1);
        match (row.window_kind, &row.page) {
            (WindowKind::Page1m, Some(page)) => {
                let cell = pane.pages.cell_mut(&row.region, page);
                cell.emitted = cell.emitted.max(next);
            }
            (WindowKind::Region5m, _) => {
                let region = pane.region_mut(&row.region);
                region.emitted_sliding = region.emitted_sliding.max(next);
            }
            (WindowKind::Region1m, _) | (WindowKind::Page1m, None) => {
                let cell = &mut pane.region_mut(&row.region).cell;
                cell.emitted = cell.emitted.max(next);
            }
        }
    }
    panes
}
