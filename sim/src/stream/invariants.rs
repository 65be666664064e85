//! What must be true at the end of a stream story, and at each look during it. Each invariant has a name and says what it
//! found and what it expected.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use bytes::Bytes;
use simulacro_core::streaming::{
    checkpoint::{self, Record},
    config::StreamConfig,
    event::{Counts, Fate},
    status::JobStatus,
};
use simulacro_log::{Blob, Stored};

use super::{
    oracle::{Expected, Reason},
    scenario::StreamScenario,
    wire::{self, Totals, WindowKey},
    workload::{Ledger, Plan},
};

/// Lines that one invariant tells at most.
const TOLD_MAX: usize = 4;
const MINUTE: i64 = 60_000;

/// Records of all partitions of a topic.
pub type Topic = BTreeMap<i32, Vec<Stored>>;

/// The job as the monitor saw it.
#[derive(Debug, Clone)]
pub struct Sample {
    /// When, from the start.
    pub at: Duration,
    /// How it stood.
    pub status: JobStatus,
}

/// What a run leaves to be judged.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The story.
    pub story: &'a StreamScenario,
    /// What was sent.
    pub plan: &'a Plan,
    /// What the producers know of it.
    pub ledger: &'a Ledger,
    /// What must come out.
    pub expected: &'a Expected,
    /// Every topic at the end.
    pub topics: &'a BTreeMap<String, Topic>,
    /// The group's offsets in the topic of clicks.
    pub committed: &'a BTreeMap<i32, i64>,
    /// What a read-committed reader saw of the output while the job ran.
    pub reader: &'a BTreeMap<i32, Vec<(i64, Option<Bytes>)>>,
    /// The job in the course of time.
    pub samples: &'a [Sample],
    /// Whether the job was done in time.
    pub drained: bool,
    /// Workers that gave up.
    pub gave_up: &'a [GaveUp],
}

/// A worker that gave up, until it was started again.
#[derive(Debug, Clone)]
pub struct GaveUp {
    /// The worker.
    pub worker: String,
    /// Whether another had its name by then.
    pub replaced: bool,
    /// Code of its error.
    pub code: String,
    /// The error and its causes.
    pub says: String,
}

/// Name and text.
pub type Broken = (&'static str, String);

impl Evidence<'_> {
    fn topic(&self, name: &str) -> impl Iterator<Item = (i32, &Stored)> {
        self.topics.get(name).into_iter().flatten().flat_map(|(partition, records)| records.iter().map(|r| (*partition, r)))
    }
    fn config(&self) -> &StreamConfig {
        &self.story.config
    }
    fn last(&self) -> Option<&JobStatus> {
        self.samples.last().map(|sample| &sample.status)
    }
    fn closed_ms(&self) -> Option<i64> {
        self.last().and_then(JobStatus::closed_ms)
    }
}

/// What the log says to a worker whose name is another's: with a transaction open, and without one.
pub const FENCED: [&str; 2] = ["INVALID_PRODUCER_EPOCH", "FENCED_INSTANCE_ID"];

/// Names of all invariants, in the order in which they are told.
pub const NAMES: [&str; 13] = [
    "delivered",
    "windows",
    "revisions",
    "reader",
    "offsets",
    "fates",
    "set_aside",
    "watermark",
    "state",
    "spread",
    "drained",
    "lag",
    "workers",
];

/// Every invariant that is broken.
pub fn judge(evidence: &Evidence<'_>) -> Vec<Broken> {
    let all = [
        delivered(evidence),
        windows(evidence),
        revisions(evidence),
        reader(evidence),
        offsets(evidence),
        fates(evidence),
        set_aside(evidence),
        watermark(evidence),
        state(evidence),
        spread(evidence),
        drained(evidence),
        lag(evidence),
        workers(evidence),
    ];
    let mut broken = Vec::new();
    for (name, found) in NAMES.into_iter().zip(all) {
        let more = found.len().saturating_sub(TOLD_MAX);
        broken.extend(found.into_iter().take(TOLD_MAX).map(|text| (name, text)));
        if more > 0 {
            broken.push((name, format!("and {more} more")));
        }
    }
    broken
}

/// What was acknowledged to a producer is in the topic, and nothing is there more often than it was sent.
fn delivered(evidence: &Evidence<'_>) -> Vec<String> {
    let mut present: BTreeMap<(i32, Option<Bytes>), u64> = BTreeMap::new();
    for (partition, record) in evidence.topic(&evidence.config().topics.clicks) {
        *present.entry((partition, record.value.clone().map(|Blob(bytes)| bytes))).or_default() += 1;
    }
    let mut found = Vec::new();
    for (key, sent) in evidence.ledger {
        let there = present.remove(key).unwrap_or(0);
        if !(sent.acknowledged..=sent.tried).contains(&there) {
            let partition = key.0;
            found.push(format!(
                "a record of partition {partition}: found it {there} times, acknowledged {}, sent {}",
                sent.acknowledged, sent.tried
            ));
        }
    }
    found.extend(present.keys().map(|(partition, _)| format!("a record of partition {partition} that nobody sent")));
    found
}

struct Row {
    partition: i32,
    offset: i64,
    revision: i64,
    totals: Totals,
    exact: bool,
}

fn rows(evidence: &Evidence<'_>) -> Result<BTreeMap<WindowKey, Vec<Row>>, String> {
    let mut rows: BTreeMap<WindowKey, Vec<Row>> = BTreeMap::new();
    for (partition, record) in evidence.topic(&evidence.config().topics.metrics) {
        let offset = record.offset;
        let value = record.value.as_ref().map(|blob| &blob.0[..]).unwrap_or_default();
        let metric = wire::decode(value).map_err(|e| format!("output {partition} at {offset}: {e}"))?;
        let row = Row { partition, offset, revision: metric.revision, totals: metric.totals, exact: metric.exact };
        rows.entry(metric.key).or_default().push(row);
    }
    Ok(rows)
}

fn name(key: &WindowKey) -> String {
    let at = chrono::DateTime::from_timestamp_millis(key.start_ms).map(|t| t.format("%H:%M").to_string()).unwrap_or_default();
    format!("{} {at} {} {}", key.kind, key.region, key.page.as_deref().unwrap_or("-"))
}

/// The newest revision of each window is what the oracle says, to the cent and to the user; none is missing, none is too
/// many.
fn windows(evidence: &Evidence<'_>) -> Vec<String> {
    let rows = match rows(evidence) {
        Ok(rows) => rows,
        Err(error) => return vec![error],
    };
    let mut found = Vec::new();
    let closed = evidence.closed_ms();
    for (key, expected) in &evidence.expected.windows {
        match rows.get(key).and_then(|revisions| revisions.last()) {
            None if closed.is_some_and(|closed| key.end_ms <= closed) => {
                found.push(format!("{}: found nothing, expected {expected:?}", name(key)));
            }
            None => {}
            Some(row) if row.totals != *expected || !row.exact => {
                found.push(format!("{}: found {:?}, expected {expected:?}", name(key), row.totals));
            }
            Some(_) => {}
        }
    }
    let unexpected = rows.iter().filter(|(key, _)| !evidence.expected.windows.contains_key(key));
    found.extend(
        unexpected.map(|(key, revisions)| {
            format!("{}: found {:?}, expected nothing", name(key), revisions.last().map(|row| row.totals))
        }),
    );
    found
}

/// The revisions of a window count up from 0 without gap or repetition, in one partition, and only ever add.
fn revisions(evidence: &Evidence<'_>) -> Vec<String> {
    let Ok(rows) = rows(evidence) else { return Vec::new() };
    let mut found = Vec::new();
    for (key, revisions) in &rows {
        for (expected, row) in (0_i64..).zip(revisions) {
            if row.revision != expected || row.partition != revisions[0].partition {
                found.push(format!(
                    "{}: found revision {} in partition {} at {}, expected {expected} in {}",
                    name(key),
                    row.revision,
                    row.partition,
                    row.offset,
                    revisions[0].partition
                ));
                break;
            }
        }
        let shrinks = |pair: &&[Row]| {
            let (a, b) = (pair[0].totals, pair[1].totals);
            b.clicks < a.clicks || b.purchases < a.purchases || b.add_to_cart < a.add_to_cart || b.users < a.users
        };
        if let Some(pair) = revisions.windows(2).find(shrinks) {
            found.push(format!("{}: revision {} takes back what the one before said", name(key), pair[1].revision));
        }
    }
    found
}

/// A reader that was there all the time saw exactly what the topic holds at the end: nothing that was taken back, nothing
/// twice, no gap, no step back.
fn reader(evidence: &Evidence<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let topic = evidence.topics.get(&evidence.config().topics.metrics);
    for (partition, seen) in evidence.reader {
        let there: Vec<(i64, Option<Bytes>)> = topic
            .and_then(|topic| topic.get(partition))
            .into_iter()
            .flatten()
            .map(|record| (record.offset, record.value.clone().map(|Blob(bytes)| bytes)))
            .collect();
        if let Some(n) = (0..seen.len().max(there.len())).find(|&n| seen.get(n) != there.get(n)) {
            let at = |list: &[(i64, Option<Bytes>)]| list.get(n).map(|(offset, _)| *offset);
            found.push(format!(
                "output {partition}, record {n}: the reader saw offset {:?}, the topic holds {:?}",
                at(seen),
                at(&there)
            ));
        }
    }
    if evidence.reader.is_empty() && topic.is_some_and(|topic| !topic.is_empty()) {
        found.push("the reader saw nothing of a topic that is there".into());
    }
    found
}

/// Offsets rise in every topic, and the group stands behind the last event of each partition.
fn offsets(evidence: &Evidence<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for (topic, partitions) in evidence.topics {
        for (partition, records) in partitions {
            if let Some(pair) = records.windows(2).find(|pair| pair[0].offset >= pair[1].offset) {
                found.push(format!("{topic} {partition}: found offset {} behind {}", pair[1].offset, pair[0].offset));
            }
        }
    }
    let clicks = &evidence.config().topics.clicks;
    for (partition, records) in evidence.topics.get(clicks).into_iter().flatten() {
        let Some(last) = records.last() else { continue };
        match evidence.committed.get(partition) {
            Some(next) if *next > last.offset => {}
            other => {
                found.push(format!("{clicks} {partition}: committed {other:?}, expected behind its last record, {}", last.offset))
            }
        }
    }
    found
}

/// The job's own counts are the oracle's, record for record and cent for cent, and each record has one fate.
fn fates(evidence: &Evidence<'_>) -> Vec<String> {
    let Some(status) = evidence.last() else { return vec!["the job was never seen".into()] };
    let mut found = Vec::new();
    for fate in Fate::ALL {
        let (ours, theirs) = (evidence.expected.of(fate), status.fate(fate));
        if ours != theirs {
            found.push(format!("{fate}: found {theirs:?} records and cents, expected {ours:?}"));
        }
    }
    if status.records_read() != evidence.expected.ends.len() as u64 {
        found.push(format!("read {} records, the topic holds {}", status.records_read(), evidence.expected.ends.len()));
    }
    let balances = |counts: &Counts| counts.balances();
    found.extend(
        evidence
            .samples
            .iter()
            .filter(|sample| !sample.status.clicks.values().all(|c| balances(&c.counts)))
            .map(|sample| format!("at {} s the fates of a partition are not as many as its records", sample.at.as_secs())),
    );
    found
}

fn header<'a>(record: &'a Stored, name: &str) -> Option<&'a str> {
    let (_, value) = record.headers.iter().rev().find(|(header, _)| header == name)?;
    std::str::from_utf8(&value.0).ok()
}

/// Where each record of a topic of put-aside records came from; without origin it is `None`.
pub fn origins(topic: Option<&Topic>) -> Vec<(Option<(i32, i64)>, &Stored)> {
    let records = topic.into_iter().flatten().flat_map(|(_, records)| records);
    let origin = |record: &Stored| {
        let partition = header(record, "simulacro.partition")?.parse().ok()?;
        Some((partition, header(record, "simulacro.offset")?.parse().ok()?))
    };
    records.map(|record| (origin(record), record)).collect()
}

/// The late and the dead-letter topic hold exactly what must be there, once, unchanged, with its reason.
fn set_aside(evidence: &Evidence<'_>) -> Vec<String> {
    let topics = &evidence.config().topics;
    let clicks: BTreeMap<(i32, i64), &Stored> =
        evidence.topic(&topics.clicks).map(|(partition, record)| ((partition, record.offset), record)).collect();
    let mut found = Vec::new();
    for (topic, fates) in
        [(&topics.late, &[Fate::Late][..]), (&topics.dead_letter, &[Fate::DeadLettered, Fate::Quarantined, Fate::Rejected][..])]
    {
        let mut wanted: BTreeMap<(i32, i64), &super::oracle::End> =
            evidence.expected.ends.iter().filter(|(_, end)| fates.contains(&end.fate)).map(|(at, end)| (*at, end)).collect();
        let mut there = BTreeSet::new();
        for (origin, record) in origins(evidence.topics.get(topic)) {
            let Some(at) = origin else {
                let reason = header(record, "simulacro.reason").unwrap_or("none");
                found.push(format!("{topic}: found a record without origin, reason {reason}"));
                continue;
            };
            if !there.insert(at) {
                found.push(format!("{topic}: found {at:?} twice"));
                continue;
            }
            let Some(end) = wanted.remove(&at) else {
                found.push(format!("{topic}: found {at:?}, which should not be there"));
                continue;
            };
            let (fate, reason) = (header(record, "simulacro.fate"), header(record, "simulacro.reason").unwrap_or_default());
            let right = match end.reason {
                Reason::None => reason.is_empty(),
                Reason::Words(words) => reason == words,
                Reason::Damaged(damage) => reason.starts_with(&format!("undecodable: {}: ", damage.code())),
            };
            if !right || fate != Some(end.fate.name()) {
                found.push(format!("{topic}: found {at:?} with {fate:?} and {reason:?}, expected {end:?}"));
            }
            let original = clicks.get(&at);
            let cut = header(record, "simulacro.value_bytes").and_then(|n| n.parse::<usize>().ok());
            let whole = original.is_some_and(|original| match (cut, &original.value) {
                (Some(n), Some(value)) => value.0.len() == n && record.value.as_ref().is_some_and(|v| v.0.is_empty()),
                (Some(_), None) => false,
                (None, value) => *value == record.value,
            });
            if !whole || original.is_some_and(|original| original.key != record.key) {
                found.push(format!("{topic}: {at:?} is not the record as it came"));
            }
        }
        found.extend(wanted.keys().map(|at| format!("{topic}: {at:?} is missing")));
    }
    found
}

/// Watermarks never go back, never pass what events and the bound allow, and no window closes before every partition can
/// have promised it. (What the job says of a partition may be old while a transaction of a dead worker is open, so the
/// promises are the oracle's.)
fn watermark(evidence: &Evidence<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let most = evidence.expected.watermark_max;
    for pair in evidence.samples.windows(2) {
        let (before, after) = (&pair[0].status, &pair[1].status);
        let at = pair[1].at.as_secs();
        for (partition, then) in &before.clicks {
            let now = after.clicks.get(partition).and_then(|click| click.watermark_ms);
            if now < then.watermark_ms {
                found.push(format!("partition {partition} at {at} s: found {now:?}, it was {:?}", then.watermark_ms));
            }
        }
        if after.closed_ms() < before.closed_ms() {
            found.push(format!("closed at {at} s: found {:?}, it was {:?}", after.closed_ms(), before.closed_ms()));
        }
    }
    for (sample, promised) in evidence.samples.iter().zip(&evidence.expected.promised) {
        let closed = sample.status.merges.values().filter_map(|merge| merge.watermark_ms).max();
        if closed > *promised {
            let at = sample.at.as_secs();
            found.push(format!("at {at} s windows were closed to {closed:?}, the partitions can have promised {promised:?}"));
        }
        let ahead = sample.status.clicks.values().find(|click| click.watermark_ms > most);
        if let Some(click) = ahead {
            let at = sample.at.as_secs();
            found.push(format!("at {at} s: found {:?}, expected at most {most:?}", click.watermark_ms));
            break;
        }
    }
    if let Some(status) = evidence.last() {
        for (partition, least) in &evidence.expected.watermarks {
            let found_ms = status.clicks.get(partition).and_then(|click| click.watermark_ms);
            if found_ms < *least {
                found.push(format!("partition {partition} at the end: found {found_ms:?}, expected at least {least:?}"));
            }
        }
    }
    found
}

/// Regions of which it is sure that they do not all belong to one partition of the merge.
const REGIONS_MIN: usize = 5;

/// The merge's work is shared by its partitions, and the click stage tells of itself when something changes, not at each
/// commit: otherwise more workers would not get more done.
fn spread(evidence: &Evidence<'_>) -> Vec<String> {
    let (config, mut found) = (evidence.config(), Vec::new());
    let mut used = BTreeSet::new();
    let mut told = BTreeMap::new();
    for (partition, record) in evidence.topic(&config.topics.partials) {
        let value = record.value.as_ref().map_or(&[][..], |value| &value.0[..]);
        match checkpoint::decode(value, config.exact_users_max) {
            Ok(Record::Partial { .. }) => {
                used.insert(partition);
            }
            Ok(Record::Status { input, mark }) => {
                if told.insert((partition, input), mark) == Some(mark) {
                    found.push(format!("partials {partition} at {}: input {input} tells {mark:?} twice", record.offset));
                }
            }
            Ok(_) => {}
            Err(error) => found.push(format!("partials {partition} at {}: {error}", record.offset)),
        }
    }
    let regions: BTreeSet<&str> = evidence.expected.windows.keys().map(|key| key.region.as_str()).collect();
    if config.merge_partitions > 1 && regions.len() >= REGIONS_MIN && used.len() < 2 {
        found.push(format!("{} regions came by partitions {used:?} of {}", regions.len(), config.merge_partitions));
    }
    found
}

/// Most records of one poll, by which a partition can pass the limit before it is paused.
const POLL_RECORDS: u64 = 500;

/// No partition runs ahead of the windows by more than it may, since what it brings piles up in the merge. A minute more is
/// allowed, and twice the time that a poll of such a partition can hold.
fn ahead(evidence: &Evidence<'_>) -> Vec<String> {
    let (config, workload) = (evidence.config(), &evidence.story.workload);
    let per_minute = workload.per_minute * workload.producers as u64 / u64::from(workload.partitions.unsigned_abs()).max(1);
    let poll_ms = (2 * POLL_RECORDS * 60_000 / per_minute.max(1)).cast_signed();
    let most = i64::try_from(config.ahead_max.as_millis()).unwrap_or(i64::MAX).saturating_add(MINUTE + poll_ms);
    let mut found = Vec::new();
    for sample in evidence.samples {
        let Some(closed) = sample.status.closed_ms() else { continue };
        let newest = sample.status.clicks.values().filter_map(|click| click.watermark_ms).max();
        if let Some(newest) = newest.filter(|newest| newest.saturating_sub(closed) > most) {
            let (at, by) = (sample.at.as_secs(), (newest - closed) / 1_000);
            found.push(format!("at {at} s a partition was {by} s ahead of the windows, expected up to {} s", most / 1_000));
            break;
        }
    }
    found
}

/// Nothing is kept longer than it can be of use: panes of the click stage until the watermark passes them, fingerprints
/// for the horizon, panes of the merge for window and lateness. One minute more is allowed for each.
fn state(evidence: &Evidence<'_>) -> Vec<String> {
    let (config, mut found) = (evidence.config(), ahead(evidence));
    let Some(status) = evidence.last() else { return found };
    let ms = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
    let pane = checkpoint::pane_key(0, 0)[0];
    let ttl = ms(config.sliding_window.max(Duration::from_secs(60))) + ms(config.allowed_lateness);
    let stages = [
        (&config.topics.changelog, &status.clicks, MINUTE, MINUTE + ms(config.dedup_horizon)),
        (&config.topics.merge_changelog, &status.merges, ttl, ttl),
    ];
    for (topic, partitions, pane_ms, print_ms) in stages {
        for (partition, records) in evidence.topics.get(topic).into_iter().flatten() {
            let mut live: BTreeMap<&Blob, bool> = BTreeMap::new();
            for record in records {
                let Some(key) = &record.key else { continue };
                live.insert(key, record.value.as_ref().is_some_and(|value| !value.0.is_empty()));
            }
            let Some(watermark) = partitions.get(partition).and_then(|p| p.watermark_ms) else { continue };
            for key in live.iter().filter(|(_, is_live)| **is_live).map(|(key, _)| &key.0) {
                let Ok(Some((minute, _))) = checkpoint::parse_key(key) else { continue };
                let keeps = if key.first() == Some(&pane) { pane_ms } else { print_ms };
                if minute + keeps + MINUTE < watermark {
                    let age = (watermark - minute) / 1_000;
                    found.push(format!("{topic} {partition}: found state of {age} s ago, expected up to {} s", keeps / 1_000));
                    break;
                }
            }
        }
    }
    found
}

/// After production and faults are over everything is processed, and every window of the story is closed, in time.
fn drained(evidence: &Evidence<'_>) -> Vec<String> {
    if evidence.drained {
        return Vec::new();
    }
    let healed = evidence.story.healed_s();
    let by = healed + evidence.story.patience_s;
    let Some(status) = evidence.last() else { return vec![format!("the job was never seen, until {by} s")] };
    let waiting = status.clicks.values().chain(status.merges.values()).filter(|p| p.waiting_since_ms.is_some()).count();
    let ends = chrono::DateTime::from_timestamp_millis(evidence.plan.ends_ms);
    let closed = status.closed_ms().and_then(chrono::DateTime::from_timestamp_millis);
    vec![format!(
        "faults were over at {healed} s; at {by} s {} events were not processed, {waiting} partitions were behind, and windows \
         were closed to {closed:?}; production ended at {ends:?}",
        status.lag_records()
    )]
}

/// A worker gives up with a code that the story names, and as fenced only when another has its name. All else that a broker or a
/// network says is gone through: a new start would hide what went wrong, since what it reads from the changelog is right whatever
/// was there before.
fn workers(evidence: &Evidence<'_>) -> Vec<String> {
    let named = &evidence.story.expect.gave_up;
    let may = |stop: &GaveUp| named.contains(&stop.code) && (stop.replaced || !FENCED.contains(&stop.code.as_str()));
    let text = |stop: &GaveUp| {
        let GaveUp { worker, replaced, code, says } = stop;
        let whose = if *replaced { "another's" } else { "its own" };
        format!("{worker}, whose name is {whose}, gave up with {code}, expected one of {named:?}: {says}")
    };
    evidence.gave_up.iter().filter(|stop| !may(stop)).map(text).collect()
}

/// The job is never further behind than the story allows.
fn lag(evidence: &Evidence<'_>) -> Vec<String> {
    let Some(limit) = evidence.story.expect.lag_below else { return Vec::new() };
    let behind = |sample: &Sample| sample.status.lag_records().max(0).cast_unsigned();
    let first = evidence.samples.iter().find(|sample| behind(sample) >= limit);
    let most = evidence.samples.iter().map(behind).max().unwrap_or(0);
    let told = |sample: &Sample| {
        format!(
            "at {} s the job was behind by {} records, later by {most}, expected below {limit}",
            sample.at.as_secs(),
            behind(sample)
        )
    };
    first.map(told).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use simulacro_core::{
        avro::{MetricaRealtime, RowEncoder},
        streaming::{pane::Pane, status::PartitionStatus, watermark::InputMark},
    };

    use super::*;
    use crate::stream::{
        oracle::End,
        workload::{Plan, Sent},
    };

    const STORY: &str = include_str!("../../../scenarios/streaming/every_event_has_an_end.toml");

    /// A world in which two events came, one of them late, and one window was told.
    struct World {
        story: StreamScenario,
        plan: Plan,
        ledger: Ledger,
        expected: Expected,
        topics: BTreeMap<String, Topic>,
        committed: BTreeMap<i32, i64>,
        reader: BTreeMap<i32, Vec<(i64, Option<Bytes>)>>,
        samples: Vec<Sample>,
        gave_up: Vec<GaveUp>,
    }

    fn stored(offset: i64, value: Bytes, headers: &[(&str, &str)]) -> Stored {
        let header = |(name, value): &(&str, &str)| ((*name).to_owned(), Blob(Bytes::from((*value).to_owned())));
        let headers = headers.iter().map(header).collect();
        Stored { offset, appended_ms: 0, txn_of: None, key: None, value: Some(Blob(value)), headers }
    }

    fn metric(revision: i64, clicks: i64) -> Bytes {
        let row = MetricaRealtime {
            window_kind: "region_1m".into(),
            window_start_ms: 0,
            window_end_ms: MINUTE,
            region: "sur".into(),
            page: None,
            clicks,
            purchases: 0,
            add_to_cart: 0,
            revenue_cents: 0,
            conversion_rate: None,
            unique_users: 1,
            revision,
            exact: true,
        };
        RowEncoder::<MetricaRealtime>::with_id(1).expect("an encoder").encode_rows(&[row]).expect("a record").remove(0)
    }

    fn world() -> World {
        let story = StreamScenario::parse(STORY).expect("a story");
        let names = story.config.topics.clone();
        let (good, late) = (Bytes::from_static(b"good"), Bytes::from_static(b"late"));
        let origin = [
            ("simulacro.fate", "late"),
            ("simulacro.reason", "timestamp.late"),
            ("simulacro.partition", "0"),
            ("simulacro.offset", "1"),
        ];
        let topics = BTreeMap::from([
            (names.clicks, Topic::from([(0, vec![stored(0, good.clone(), &[]), stored(1, late.clone(), &[])])])),
            (names.late, Topic::from([(0, vec![stored(0, late.clone(), &origin)])])),
            (names.metrics, Topic::from([(0, vec![stored(0, metric(0, 1), &[]), stored(2, metric(1, 2), &[])])])),
        ]);
        let end = |fate, reason| End { fate, reason, cents: 0 };
        let key = WindowKey { kind: "region_1m".into(), start_ms: 0, end_ms: MINUTE, region: "sur".into(), page: None };
        let expected = Expected {
            windows: BTreeMap::from([(key, Totals { clicks: 2, users: 1, ..Totals::default() })]),
            ends: BTreeMap::from([
                ((0, 0), end(Fate::Published, Reason::None)),
                ((0, 1), end(Fate::Late, Reason::Words("timestamp.late"))),
            ]),
            watermarks: BTreeMap::from([(0, Some(MINUTE))]),
            watermark_max: Some(2 * MINUTE),
            promised: vec![Some(0), Some(MINUTE)],
            ..Expected::default()
        };
        let mut counts = Counts::default();
        counts.add(Fate::Published, 0);
        counts.add(Fate::Late, 0);
        let status = |watermark_ms| JobStatus {
            clicks: BTreeMap::from([(0, PartitionStatus { watermark_ms, counts, ..PartitionStatus::default() })]),
            merges: BTreeMap::from([(0, PartitionStatus { watermark_ms, ..PartitionStatus::default() })]),
        };
        let sample = |s, watermark_ms| Sample { at: Duration::from_secs(s), status: status(watermark_ms) };
        World {
            story,
            plan: Plan { sendings: Vec::new(), meanings: BTreeMap::new(), ends_ms: 0 },
            ledger: Ledger::from([
                ((0, Some(good)), Sent { acknowledged: 1, tried: 1 }),
                ((0, Some(late)), Sent { acknowledged: 1, tried: 2 }),
            ]),
            expected,
            topics,
            committed: BTreeMap::from([(0, 2)]),
            reader: BTreeMap::from([(0, vec![(0, Some(metric(0, 1))), (2, Some(metric(1, 2)))])]),
            samples: vec![sample(5, Some(0)), sample(10, Some(MINUTE))],
            gave_up: Vec::new(),
        }
    }

    /// The names of what a change of that world breaks.
    fn breaks(change: impl FnOnce(&mut World)) -> Vec<&'static str> {
        let mut world = world();
        change(&mut world);
        let evidence = Evidence {
            story: &world.story,
            plan: &world.plan,
            ledger: &world.ledger,
            expected: &world.expected,
            topics: &world.topics,
            committed: &world.committed,
            reader: &world.reader,
            samples: &world.samples,
            drained: true,
            gave_up: &world.gave_up,
        };
        let mut names: Vec<_> = judge(&evidence).into_iter().map(|(name, _)| name).collect();
        names.dedup();
        names
    }

    fn records<'a>(world: &'a mut World, topic: &str) -> &'a mut Vec<Stored> {
        world.topics.get_mut(topic).and_then(|topic| topic.get_mut(&0)).expect("a partition")
    }

    #[test]
    fn a_right_world_breaks_nothing() {
        assert_eq!(breaks(|_| {}), [""; 0]);
    }

    #[test]
    fn an_acknowledged_record_that_is_missing_and_one_too_many_are_found() {
        let sent = |acknowledged, tried| Sent { acknowledged, tried };
        let known = (0, Some(Bytes::from_static(b"good")));
        assert_eq!(breaks(|w| w.ledger.extend([(known.clone(), sent(2, 2))])), ["delivered"]);
        assert_eq!(breaks(|w| w.ledger.extend([(known.clone(), sent(0, 0))])), ["delivered"]);
        assert_eq!(breaks(|w| w.ledger.extend([((0, None), sent(1, 1))])), ["delivered"]);
        assert_eq!(breaks(|w| w.ledger.clear()), ["delivered"]);
    }

    #[test]
    fn a_window_that_differs_is_missing_or_is_too_many_is_found() {
        let other = Totals { clicks: 2, users: 2, ..Totals::default() };
        assert_eq!(breaks(|w| w.expected.windows.values_mut().for_each(|t| *t = other)), ["windows"]);
        assert_eq!(breaks(|w| w.expected.windows.clear()), ["windows"]);
        let more = |w: &mut World| {
            let (mut key, totals) = w.expected.windows.first_key_value().map(|(k, t)| (k.clone(), *t)).expect("a window");
            key.region = "norte".into();
            w.expected.windows.insert(key, totals);
        };
        assert_eq!(breaks(more), ["windows"]);
    }

    #[test]
    fn a_revision_that_is_repeated_skipped_or_takes_back_is_found() {
        let put = |revision: i64, clicks: i64| {
            breaks(|w| {
                let metrics = w.story.config.topics.metrics.clone();
                records(w, &metrics)[1] = stored(2, metric(revision, clicks), &[]);
                w.reader.insert(0, vec![(0, Some(metric(0, 1))), (2, Some(metric(revision, clicks)))]);
            })
        };
        assert_eq!(put(0, 2), ["revisions"]);
        assert_eq!(put(2, 2), ["revisions"]);
        assert_eq!(put(1, 0), ["windows", "revisions"]);
    }

    #[test]
    fn a_reader_that_saw_something_else_is_found() {
        assert_eq!(breaks(|w| w.reader.clear()), ["reader"]);
        assert_eq!(breaks(|w| w.reader.values_mut().for_each(|seen| seen.truncate(1))), ["reader"]);
        assert_eq!(breaks(|w| w.reader.values_mut().for_each(|seen| seen.push((5, None)))), ["reader"]);
        assert_eq!(breaks(|w| w.reader.values_mut().for_each(|seen| seen[0].1 = None)), ["reader"]);
    }

    #[test]
    fn offsets_that_step_back_or_stop_too_early_are_found() {
        assert_eq!(breaks(|w| w.committed.clear()), ["offsets"]);
        assert_eq!(breaks(|w| w.committed.extend([(0, 1)])), ["offsets"]);
        let late = |w: &mut World| {
            let topic = w.story.config.topics.late.clone();
            let again = records(w, &topic)[0].clone();
            records(w, &topic).push(again);
        };
        assert_eq!(breaks(late), ["offsets", "set_aside"]);
    }

    #[test]
    fn a_late_record_without_reason_origin_or_place_is_found() {
        let change = |change: &dyn Fn(&mut Vec<Stored>)| {
            breaks(|w| {
                let topic = w.story.config.topics.late.clone();
                change(records(w, &topic));
            })
        };
        assert_eq!(change(&|records| records.clear()), ["set_aside"]);
        assert_eq!(change(&|records| records[0].headers.clear()), ["set_aside"]);
        assert_eq!(change(&|records| records[0].headers[1].1 = Blob(Bytes::from_static(b"timestamp.future"))), ["set_aside"]);
        assert_eq!(change(&|records| records[0].headers[3].1 = Blob(Bytes::from_static(b"0"))), ["set_aside"]);
        assert_eq!(change(&|records| records[0].value = None), ["set_aside"]);
        assert_eq!(change(&|records| records[0].key = Some(Blob(Bytes::from_static(b"k")))), ["set_aside"]);
    }

    #[test]
    fn counts_that_do_not_balance_or_are_not_the_oracles_are_found() {
        let click = |w: &mut World, change: fn(&mut Counts)| {
            for sample in &mut w.samples {
                sample.status.clicks.values_mut().for_each(|click| change(&mut click.counts));
            }
        };
        assert_eq!(breaks(|w| click(w, |counts| counts.read += 1)), ["fates"]);
        assert_eq!(breaks(|w| click(w, |counts| counts.cents[0] += 1)), ["fates"]);
        assert_eq!(breaks(|w| w.samples.clear()), ["fates"]);
    }

    #[test]
    fn a_watermark_that_steps_back_or_runs_ahead_is_found() {
        let set = |n: usize, clicks: Option<i64>, merges: Option<i64>| {
            breaks(|w| {
                w.samples[n].status.clicks.values_mut().for_each(|click| click.watermark_ms = clicks);
                w.samples[n].status.merges.values_mut().for_each(|merge| merge.watermark_ms = merges);
            })
        };
        assert_eq!(set(0, Some(2 * MINUTE), Some(0)), ["watermark"]);
        assert_eq!(set(0, Some(0), Some(2 * MINUTE)), ["watermark"]);
        assert_eq!(set(1, Some(3 * MINUTE), Some(MINUTE)), ["watermark"]);
        assert_eq!(set(1, Some(MINUTE - 1), Some(MINUTE - 1)), ["watermark"]);
    }

    #[test]
    fn state_that_is_older_than_it_may_be_is_found() {
        let with = |topic: fn(&StreamConfig) -> String, key: Bytes| {
            breaks(|w| {
                let mut record = stored(0, Bytes::from_static(b"state"), &[]);
                record.key = Some(Blob(key));
                w.topics.insert(topic(&w.story.config), Topic::from([(0, vec![record])]));
            })
        };
        let clicks = |config: &StreamConfig| config.topics.changelog.clone();
        let merges = |config: &StreamConfig| config.topics.merge_changelog.clone();
        assert_eq!(with(clicks, checkpoint::pane_key(0, 0)), [""; 0]);
        assert_eq!(with(clicks, checkpoint::pane_key(-2 * MINUTE, 0)), ["state"]);
        assert_eq!(with(clicks, checkpoint::fingerprints_key(-2 * MINUTE, 0)), [""; 0]);
        assert_eq!(with(clicks, checkpoint::fingerprints_key(-12 * MINUTE, 0)), ["state"]);
        assert_eq!(with(merges, checkpoint::pane_key(-10 * MINUTE, 0)), [""; 0]);
        assert_eq!(with(merges, checkpoint::pane_key(-11 * MINUTE, 0)), ["state"]);
    }

    #[test]
    fn a_worker_that_gave_up_is_found() {
        let with = |replaced, code: &str, named: &[&str]| {
            breaks(|w| {
                w.story.expect.gave_up = named.iter().map(|&code| code.to_owned()).collect();
                w.gave_up.push(GaveUp { worker: "worker-0".into(), replaced, code: code.into(), says: "poll".into() });
            })
        };
        assert_eq!(with(false, "UNKNOWN_MEMBER_ID", &[]), ["workers"]);
        assert_eq!(with(false, "UNKNOWN_MEMBER_ID", &["UNKNOWN_MEMBER_ID"]), [""; 0]);
        assert_eq!(with(true, FENCED[0], &FENCED), [""; 0]);
        assert_eq!(with(true, FENCED[1], &FENCED[..1]), ["workers"]);
        assert_eq!(with(false, FENCED[0], &FENCED), ["workers"]);
    }

    #[test]
    fn a_mark_that_is_told_twice_and_a_merge_of_one_partition_are_found() {
        let status = |input, ms| {
            let mark = InputMark { watermark: Some(ms), idle: false };
            stored(0, checkpoint::encode_status(input, &mark), &[])
        };
        let with = |mut records: Vec<Stored>| {
            records.iter_mut().zip(0..).for_each(|(record, offset)| record.offset = offset);
            breaks(|w| {
                w.topics.insert(w.story.config.topics.partials.clone(), Topic::from([(0, records)]));
            })
        };
        assert_eq!(with(vec![status(0, 0), status(1, 0), status(0, MINUTE), status(0, 0)]), [""; 0]);
        assert_eq!(with(vec![status(0, 0), status(1, 0), status(0, 0)]), ["spread"]);
        assert_eq!(with(vec![stored(0, Bytes::from_static(b"x"), &[])]), ["spread"]);

        let by = |partitions: &[i32]| {
            breaks(|w| {
                let total = w.expected.windows.values().next().cloned().expect("a window");
                for region in ["centro", "este", "norte", "oeste"] {
                    // In a time that is not closed yet, so that nothing is missing.
                    let key = WindowKey {
                        kind: "region_1m".into(),
                        start_ms: 9 * MINUTE,
                        end_ms: 10 * MINUTE,
                        region: region.into(),
                        page: None,
                    };
                    w.expected.windows.insert(key, total);
                }
                let mut pane = Pane::default();
                pane.cell_mut("sur", "/").clicks = 1;
                let partial = checkpoint::encode_partial(0, 0, &pane, 9_999, |_| true);
                let records = partial.into_iter().map(|value| stored(0, value, &[])).collect::<Vec<_>>();
                let topic = partitions.iter().map(|partition| (*partition, records.clone())).collect();
                w.topics.insert(w.story.config.topics.partials.clone(), topic);
            })
        };
        assert_eq!(by(&[0, 1]), [""; 0]);
        assert_eq!(by(&[1]), ["spread"]);
    }

    #[test]
    fn a_partition_that_ran_too_far_ahead_is_found() {
        let ahead = |ms: i64| {
            breaks(|w| {
                (w.story.workload.per_minute, w.story.workload.producers, w.story.workload.partitions) = (1_000, 1, 1);
                w.story.config.ahead_max = Duration::from_secs(120);
                w.expected.watermark_max = Some(ms);
                w.samples[1].status.clicks.values_mut().for_each(|click| click.watermark_ms = Some(ms));
            })
        };
        assert_eq!(ahead(MINUTE + 240_000), [""; 0]);
        assert_eq!(ahead(MINUTE + 240_001), ["state"]);
    }

    #[test]
    fn a_job_that_was_too_far_behind_at_any_time_is_found() {
        let behind = |records: i64, limit: Option<u64>| {
            breaks(|w| {
                w.story.expect.lag_below = limit;
                w.samples[0].status.clicks.values_mut().for_each(|click| {
                    (click.waiting_since_ms, click.end_offset) = (Some(0), click.next_offset + records);
                });
            })
        };
        assert_eq!(behind(9_999, Some(10_000)), [""; 0]);
        assert_eq!(behind(10_000, Some(10_000)), ["lag"]);
        assert_eq!(behind(10_000, None), [""; 0]);
    }
}
