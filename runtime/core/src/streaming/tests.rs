//! The job as a whole, against a naive computation that shares no code with it.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use proptest::prelude::*;

use super::{
    click_task::ClickTask,
    config::StreamConfig,
    event::{ClickDecoder, Counts, Fate},
    evidence::{self, Sale},
    job::{RealtimeMetrics, StreamPorts},
    reconcile::{self, Bounds, Cause, Revenue, Side},
    reset,
    status::JobStatus,
    testing::{Click, Fault, JsonClicks, JsonRows, MemoryLog, NoMetrics},
    window::{MetricRow, WindowKind},
};
use crate::ports::{
    Env as _, PortError,
    event_log::{EventLog, LogRecord, TopicPartition, TopicSpec},
};

/// 2024-03-18 00:00 UTC.
const T0: i64 = 1_710_720_000_000;
const CLICKS: &str = "ecommerce.clicks";

fn config() -> StreamConfig {
    StreamConfig {
        merge_partitions: 2,
        exact_users_max: 12,
        record_bytes_max: 32 << 10,
        regions: Some(["norte", "sur", "este"].map(String::from).into()),
        ..StreamConfig::specification()
    }
}

fn ports(log: &MemoryLog) -> StreamPorts {
    StreamPorts { env: Arc::new(log.env.clone()), log: Arc::new(log.clone()), metrics: Arc::new(NoMetrics) }
}

async fn open(log: &MemoryLog, config: &StreamConfig, member: usize) -> RealtimeMetrics {
    let member = format!("worker-{member}");
    RealtimeMetrics::open(config.clone(), ports(log), &member, Box::new(JsonClicks), Box::new(JsonRows)).await.unwrap()
}

async fn log_with(partitions: usize, poll_records: usize, inputs: &[Input]) -> MemoryLog {
    let log = MemoryLog::new(T0, poll_records);
    let spec = TopicSpec { name: CLICKS.into(), partitions: partitions as i32, retention: None, compact: false };
    log.create_topic(&spec).await.unwrap();
    inputs.iter().for_each(|input| append(&log, input));
    log
}

fn append(log: &MemoryLog, input: &Input) {
    log.append(CLICKS, input.partition as i32, "key", Some(input.value.clone()), input.appended_ms);
}

/// Steps all workers in turn until nothing happens for a while.
async fn drain(workers: &mut [RealtimeMetrics]) {
    let mut quiet = 0;
    for _ in 0..200_000 {
        let mut moved = false;
        for worker in workers.iter_mut() {
            let step = worker.step().await.unwrap();
            moved |= step.records > 0 || step.committed;
        }
        quiet = if moved { 0 } else { quiet + 1 };
        if quiet > 40 {
            return;
        }
    }
    panic!("never quiet");
}

/// A record of the input.
#[derive(Debug, Clone)]
struct Input {
    partition: usize,
    value: Bytes,
    appended_ms: i64,
}

fn input(partition: usize, click: &Click, appended_ms: i64) -> Input {
    Input { partition, value: serde_json::to_vec(click).unwrap().into(), appended_ms }
}

fn click(user: &str, page: &str, region: &str, timestamp_ms: i64) -> Click {
    Click {
        user_id: user.into(),
        event_type: "click".into(),
        page: page.into(),
        product_id: None,
        cents: 0,
        region: Some(region.into()),
        timestamp_ms,
    }
}

/// The last event of every partition, far ahead: it closes everything before.
fn with_end(mut inputs: Vec<Input>, partitions: usize) -> Vec<Input> {
    let end = T0 + 86_400_000;
    for partition in 0..partitions {
        inputs.push(input(partition, &click(&format!("end-{partition}"), "/end", "norte", end), end));
    }
    inputs
}

type RowKey = (WindowKind, i64, String, Option<String>);

/// What a naive reader of everything would say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Expected {
    fates: BTreeMap<Fate, u64>,
    cents: BTreeMap<Fate, i64>,
    /// clicks, purchases, add_to_cart, cents, users.
    windows: BTreeMap<RowKey, (u64, u64, u64, i64, BTreeSet<String>)>,
}

/// Goes through each partition in order with the rules of the specification, then through each event and each window.
fn naive(inputs: &[Input], partitions: usize, config: &StreamConfig) -> Expected {
    let minute = 60_000;
    let (lateness, horizon) = (config.allowed_lateness.as_millis() as i64, config.dedup_horizon.as_millis() as i64);
    let mut expected = Expected::default();
    for partition in 0..partitions {
        let mut newest: Option<i64> = None;
        let mut seen: BTreeSet<Click> = BTreeSet::new();
        for record in inputs.iter().filter(|i| i.partition == partition) {
            let watermark = newest.map_or(i64::MIN, |n| n - config.watermark_bound.as_millis() as i64);
            let parsed = serde_json::from_slice::<Click>(&record.value).ok();
            let fate = match &parsed {
                None => Fate::DeadLettered,
                Some(c) => {
                    let pane_end = (c.timestamp_ms / minute + 1) * minute;
                    let is_region = c.region.as_ref().is_some_and(|r| ["norte", "sur", "este"].contains(&r.as_str()));
                    let is_known = ["click", "purchase", "add_to_cart"].contains(&c.event_type.as_str());
                    if c.user_id.is_empty() || c.region.is_none() || c.region.as_deref() == Some("") {
                        Fate::Quarantined
                    } else if c.timestamp_ms > record.appended_ms + config.future_bound.as_millis() as i64 {
                        Fate::DeadLettered
                    } else if !is_known || !is_region || (c.event_type != "purchase" && c.cents != 0) {
                        Fate::Quarantined
                    } else if c.cents < 0 {
                        Fate::Rejected
                    } else if watermark < pane_end + horizon && !seen.insert(c.clone()) {
                        Fate::Deduplicated
                    } else if pane_end + lateness <= watermark {
                        Fate::Late
                    } else {
                        newest = newest.max(Some(c.timestamp_ms));
                        Fate::Published
                    }
                }
            };
            *expected.fates.entry(fate).or_default() += 1;
            *expected.cents.entry(fate).or_default() += parsed.as_ref().map_or(0, |c| c.cents);
            let (Fate::Published, Some(c)) = (fate, parsed) else { continue };
            let region = c.region.clone().unwrap();
            let mut keys = vec![];
            let start = c.timestamp_ms / minute * minute;
            keys.push((WindowKind::Region1m, start, region.clone(), None));
            keys.push((WindowKind::Page1m, start, region.clone(), Some(c.page.clone())));
            for back in 0..5 {
                keys.push((WindowKind::Region5m, start - back * minute, region.clone(), None));
            }
            for key in keys {
                let w = expected.windows.entry(key).or_default();
                w.0 += u64::from(c.event_type == "click");
                w.1 += u64::from(c.event_type == "purchase");
                w.2 += u64::from(c.event_type == "add_to_cart");
                w.3 += c.cents;
                w.4.insert(c.user_id.clone());
            }
        }
    }
    // The windows of the last event stay open.
    let end = T0 + 86_400_000 - 30_000;
    let length = |kind| if kind == WindowKind::Region5m { 5 * minute } else { minute };
    expected.windows.retain(|(kind, start, ..), _| start + length(*kind) <= end);
    expected
}

/// The newest revision of each row, after checking that revisions count up one by one.
fn newest_rows(log: &MemoryLog, config: &StreamConfig) -> BTreeMap<RowKey, MetricRow> {
    let mut newest: BTreeMap<RowKey, MetricRow> = BTreeMap::new();
    for record in log.all(&config.topics.metrics) {
        let row: MetricRow = serde_json::from_slice(&record.value.unwrap()).unwrap();
        let key = (row.window_kind, row.window_start_ms, row.region.clone(), row.page.clone());
        let expected = newest.get(&key).map_or(0, |before| before.revision + 1);
        assert_eq!(row.revision, expected, "revisions of {key:?}");
        newest.insert(key, row);
    }
    newest
}

/// Holds what the job wrote against what the naive reader says.
fn check(log: &MemoryLog, workers: &[RealtimeMetrics], expected: &Expected, config: &StreamConfig) {
    let rows = newest_rows(log, config);
    let windows: Vec<_> = expected.windows.keys().collect();
    assert_eq!(rows.keys().collect::<Vec<_>>(), windows);
    for (key, (clicks, purchases, add_to_cart, cents, users)) in &expected.windows {
        let row = &rows[key];
        let actual = (row.clicks, row.purchases, row.add_to_cart, row.revenue_cents);
        assert_eq!(actual, (*clicks, *purchases, *add_to_cart, *cents), "{key:?}");
        assert_eq!(row.exact, users.len() <= config.exact_users_max, "{key:?}");
        let error = row.unique_users.abs_diff(users.len() as u64);
        assert!(if row.exact { error == 0 } else { error <= 1 }, "{key:?}: {} users for {}", row.unique_users, users.len());
        let rate = row.conversion_rate();
        assert_eq!(rate, (*clicks > 0).then(|| *purchases as f64 / *clicks as f64));
    }
    let mut counts = Counts::default();
    for task in workers.iter().flat_map(|w| w.clicks().values()) {
        assert!(task.counts().balances());
        for fate in Fate::ALL {
            counts.read += task.counts().of(fate);
            *expected_mut(&mut counts, fate) += task.counts().of(fate);
        }
    }
    for fate in Fate::ALL {
        assert_eq!(counts.of(fate), expected.fates.get(&fate).copied().unwrap_or(0), "{fate}");
    }
    let sum = |fates: &[Fate]| fates.iter().map(|f| expected.fates.get(f).copied().unwrap_or(0)).sum::<u64>() as usize;
    assert_eq!(log.all(&config.topics.late).len(), sum(&[Fate::Late]));
    let dead = log.all(&config.topics.dead_letter);
    assert_eq!(dead.len(), sum(&[Fate::Quarantined, Fate::Rejected, Fate::DeadLettered]));
    let merged: u64 = workers.iter().flat_map(|w| w.merges().values()).map(|m| m.merged().0).sum();
    let expired: u64 = workers.iter().flat_map(|w| w.merges().values()).map(|m| m.expired().0).sum();
    let ends = workers.iter().map(|w| w.clicks().len()).sum::<usize>();
    assert_eq!((merged, expired), (expected.fates[&Fate::Published] - ends as u64, 0), "all but the open windows are merged");
    let revenue: i64 = rows.values().filter(|r| r.window_kind == WindowKind::Region1m).map(|r| r.revenue_cents).sum();
    assert_eq!(revenue, expected.cents[&Fate::Published], "the day's revenue is the sum over region_1m");
}

fn expected_mut(counts: &mut Counts, fate: Fate) -> &mut u64 {
    &mut counts.records[Fate::ALL.iter().position(|f| *f == fate).unwrap()]
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// Events around a time that moves on: some out of order, some late, some far ahead, some twice, some broken.
fn inputs(partitions: usize) -> impl Strategy<Value = Vec<Input>> {
    let event = (0u8..100, 0usize..partitions, 0i64..40_000, 0u8..30, 0u8..6, any::<u16>());
    prop::collection::vec(event, 1..160).prop_map(move |events| {
        let mut now = T0 + 3_600_000;
        let mut inputs: Vec<Input> = Vec::new();
        for (kind, partition, gap, user, page, number) in events {
            now += gap;
            let mut event = click(&format!("u{user}"), &format!("/{page}"), ["norte", "sur", "este"][usize::from(page % 3)], now);
            event.timestamp_ms -= i64::from(number % 25) * 1_000;
            match kind {
                0..50 => {}
                50..65 => (event.event_type, event.cents) = ("purchase".into(), i64::from(number)),
                65..70 => event.event_type = "add_to_cart".into(),
                70..80 => event.timestamp_ms = now - i64::from(number) * 20,
                80..84 => event.timestamp_ms = now + 300_000 + i64::from(number % 3) - 1,
                84..86 => event.cents = 1,
                86 => (event.event_type, event.cents) = ("purchase".into(), -5),
                87 => event.region = None,
                88 => event.region = Some("marte".into()),
                89 => event.event_type = "scroll".into(),
                90..96 => {
                    let again = inputs.iter().rev().filter(|i| i.partition == partition).nth(usize::from(number % 8));
                    if let Some(again) = again.cloned() {
                        inputs.push(Input { appended_ms: now, ..again });
                        continue;
                    }
                }
                96..98 => {
                    inputs.push(Input { partition, value: Bytes::from_static(b"{broken"), appended_ms: now });
                    continue;
                }
                _ => event.user_id.clear(),
            }
            inputs.push(input(partition, &event, now));
        }
        with_end(inputs, partitions)
    })
}

/// What is done to the workers while they work.
#[derive(Debug, Clone)]
enum Op {
    /// A call happens, and neither it nor its repetitions are answered.
    Doubt(u64),
    Step(usize, u8),
    Crash(usize),
    Expel(usize),
    Start(usize),
    Compact,
    Fail(u64, Fault),
}

fn ops(workers: usize) -> impl Strategy<Value = Vec<Op>> {
    let worker = 0..workers;
    let fault = prop::sample::select(vec![
        Fault::Retryable,
        Fault::UnknownBefore,
        Fault::UnknownAfter,
        Fault::CrashBefore,
        Fault::CrashAfter,
    ]);
    let op = prop_oneof![
        12 => (worker.clone(), 1u8..60).prop_map(|(w, n)| Op::Step(w, n)),
        2 => worker.clone().prop_map(Op::Crash),
        2 => worker.clone().prop_map(Op::Expel),
        2 => worker.prop_map(Op::Start),
        1 => Just(Op::Compact),
        6 => (0u64..12, fault).prop_map(|(n, f)| Op::Fail(n, f)),
        3 => (0u64..8).prop_map(Op::Doubt),
    ];
    prop::collection::vec(op, 0..40)
}

fn doubt(log: &MemoryLog, ordinal: u64, config: &StreamConfig) {
    log.fail(ordinal, Fault::UnknownAfter);
    (1..=u64::from(config.retries_max)).for_each(|n| log.fail(ordinal + n, Fault::UnknownBefore));
}

/// Runs the operations, then heals and drains. A worker that stops with an error is replaced by a new one.
async fn survive(log: &MemoryLog, config: &StreamConfig, count: usize, ops: &[Op]) -> Vec<RealtimeMetrics> {
    let mut workers: BTreeMap<usize, RealtimeMetrics> = BTreeMap::new();
    workers.insert(0, open(log, config, 0).await);
    for op in ops {
        match op {
            Op::Step(worker, steps) => {
                for _ in 0..*steps {
                    let Some(w) = workers.get_mut(worker) else { break };
                    if w.step().await.is_err() {
                        workers.remove(worker);
                        log.expel(&format!("worker-{worker}"));
                    }
                }
            }
            Op::Crash(worker) => {
                if workers.remove(worker).is_some() {
                    log.expel(&format!("worker-{worker}"));
                }
            }
            Op::Expel(worker) => log.expel(&format!("worker-{worker}")),
            Op::Start(worker) => {
                workers.insert(*worker, open(log, config, *worker).await);
            }
            Op::Compact => log.compact(),
            Op::Fail(ordinal, fault) => log.fail(*ordinal, *fault),
            Op::Doubt(ordinal) => doubt(log, *ordinal, config),
        }
    }
    log.clear_faults();
    for worker in 0..count {
        if let Entry::Vacant(vacant) = workers.entry(worker) {
            vacant.insert(open(log, config, worker).await);
        }
    }
    // Failures of before may still be counted, and an expelled worker does not know it yet.
    for _ in 0..20 {
        for worker in 0..count {
            if let Some(w) = workers.get_mut(&worker)
                && w.step().await.is_err()
            {
                workers.insert(worker, open(log, config, worker).await);
            }
        }
    }
    let mut workers: Vec<_> = workers.into_values().collect();
    drain(&mut workers).await;
    workers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_number_of_workers_agrees_with_the_naive_reader(inputs in inputs(5), workers in 1usize..=8, poll in 1usize..20) {
        run(async {
            let config = config();
            let expected = naive(&inputs, 5, &config);
            let log = log_with(5, poll, &inputs).await;
            let workers = survive(&log, &config, workers, &[]).await;
            check(&log, &workers, &expected, &config);
        });
    }

    #[test]
    fn crashes_faults_and_rebalances_change_nothing(
        inputs in inputs(3), ops in ops(3), poll in 1usize..20, commit_records in 1usize..60,
    ) {
        run(async {
            let config = StreamConfig { commit_records_max: commit_records, ..config() };
            let expected = naive(&inputs, 3, &config);
            let log = log_with(3, poll, &inputs).await;
            let workers = survive(&log, &config, 3, &ops).await;
            check(&log, &workers, &expected, &config);
        });
    }

    #[test]
    fn restored_state_is_the_state(inputs in inputs(2), steps in 1usize..80, compact in any::<bool>()) {
        run(async {
            let config = StreamConfig { commit_records_max: 5, ..config() };
            let log = log_with(2, 3, &inputs).await;
            let mut worker = open(&log, &config, 0).await;
            while worker.clicks().len() < 2 || worker.merges().len() < 2 {
                worker.step().await.unwrap();
            }
            for _ in 0..steps {
                worker.step().await.unwrap();
            }
            if compact { log.compact() }
            worker.close().await.unwrap();
            log.hold_records();
            let mut again = open(&log, &config, 0).await;
            while again.clicks().len() < 2 || again.merges().len() < 2 {
                again.step().await.unwrap();
            }
            prop_assert_eq!(snapshots(&mut worker, &config), snapshots(&mut again, &config));
            Ok(())
        })?;
    }

    #[test]
    fn any_order_within_the_lateness_gives_the_same_windows(
        users in prop::collection::vec((0u8..20, 0u8..4, 0i64..240_000), 1..80), seed in any::<u64>(),
    ) {
        // All events are within four minutes, so none can be later than the allowed five.
        let mut events: Vec<Input> = users
            .iter()
            .enumerate()
            .map(|(n, (user, page, at))| {
                let mut event = click(&format!("u{user}"), &format!("/{page}"), "sur", T0 + at);
                (event.event_type, event.cents) = ("purchase".into(), n as i64);
                input(n % 2, &event, T0 + 240_000)
            })
            .collect();
        let forward = run(windows_of(&events));
        let mut state = seed | 1;
        for i in (1..events.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            events.swap(i, (state >> 33) as usize % (i + 1));
        }
        prop_assert_eq!(forward, run(windows_of(&events)));
    }
}

/// Life with silence in it: events arrive while time passes, partitions fall idle and come back with old events.
#[derive(Debug, Clone)]
enum Life {
    Event { partition: usize, delay_s: i64 },
    Wait { seconds: i64 },
    Work { worker: usize, steps: u8 },
    Crash { worker: usize },
}

fn life() -> impl Strategy<Value = Vec<Life>> {
    let delay = prop_oneof![4 => 0i64..20, 2 => 0i64..400, 1 => 0i64..2_000];
    let op = prop_oneof![
        8 => (0usize..3, delay).prop_map(|(partition, delay_s)| Life::Event { partition, delay_s }),
        3 => (1i64..200).prop_map(|seconds| Life::Wait { seconds }),
        8 => (0usize..2, 1u8..60).prop_map(|(worker, steps)| Life::Work { worker, steps }),
        1 => (0usize..2).prop_map(|worker| Life::Crash { worker }),
    ];
    prop::collection::vec(op, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn silence_loses_nothing_whatever_comes_after_it(life in life()) {
        run(async {
            let config = config();
            let log = log_with(3, 5, &[]).await;
            let mut workers = vec![open(&log, &config, 0).await, open(&log, &config, 1).await];
            let now = || log.env.0.load(std::sync::atomic::Ordering::SeqCst);
            let mut sent = 0;
            for op in &life {
                match op {
                    Life::Event { partition, delay_s } => {
                        let event = click(&format!("u{sent}"), "/", "sur", now() - delay_s * 1_000);
                        append(&log, &input(*partition, &event, now()));
                        sent += 1;
                    }
                    Life::Wait { seconds } => {
                        log.env.0.fetch_add(seconds * 1_000, std::sync::atomic::Ordering::SeqCst);
                    }
                    Life::Work { worker, steps } => {
                        for _ in 0..*steps {
                            workers[*worker].step().await.unwrap();
                        }
                    }
                    Life::Crash { worker } => {
                        log.expel(&format!("worker-{worker}"));
                        workers[*worker] = open(&log, &config, *worker).await;
                    }
                }
            }
            with_end(vec![], 3).iter().for_each(|i| append(&log, i));
            drain(&mut workers).await;
            let counts: Vec<Counts> = workers.iter().flat_map(|w| w.clicks().values()).map(|t| *t.counts()).collect();
            let sum = |fate| counts.iter().map(|c| c.of(fate)).sum::<u64>();
            prop_assert_eq!(counts.len(), 3);
            prop_assert_eq!(sum(Fate::Published) + sum(Fate::Late), sent + 3);
            prop_assert_eq!(log.all(&config.topics.late).len() as u64, sum(Fate::Late));
            let merges = || workers.iter().flat_map(|w| w.merges().values());
            prop_assert_eq!(merges().map(|m| m.expired().0).sum::<u64>(), 0, "no partial comes after its pane");
            prop_assert_eq!(merges().map(|m| m.merged().0).sum::<u64>(), sum(Fate::Published) - 3);
            let rows = newest_rows(&log, &config);
            let of = |kind| rows.values().filter(|r| r.window_kind == kind).map(|r| r.clicks).sum::<u64>();
            prop_assert_eq!(of(WindowKind::Region1m), sum(Fate::Published) - 3);
            prop_assert_eq!(of(WindowKind::Page1m), sum(Fate::Published) - 3);
            prop_assert_eq!(of(WindowKind::Region5m), 5 * (sum(Fate::Published) - 3));
            Ok(())
        })?;
    }
}

async fn windows_of(events: &[Input]) -> Vec<MetricRow> {
    let config = config();
    let log = log_with(2, 7, &with_end(events.to_vec(), 2)).await;
    survive(&log, &config, 1, &[]).await;
    newest_rows(&log, &config).into_values().map(|row| MetricRow { revision: 0, ..row }).collect()
}

fn snapshots(worker: &mut RealtimeMetrics, config: &StreamConfig) -> Vec<String> {
    worker.snapshots(config)
}

#[test]
fn a_late_event_reopens_its_windows_once_and_a_later_one_does_not() {
    run(async {
        let config = config();
        let minute = 60_000;
        let inputs =
            [input(0, &click("a", "/", "sur", T0 + 10), T0), input(0, &click("b", "/", "sur", T0 + 5 * minute), T0 + 5 * minute)];
        let log = log_with(1, 10, &inputs).await;
        let mut workers = vec![open(&log, &config, 0).await];
        drain(&mut workers).await;
        let row = |kind| newest_rows(&log, &config)[&(kind, T0, "sur".to_owned(), None)].clone();
        assert_eq!((row(WindowKind::Region1m).clicks, row(WindowKind::Region1m).revision), (1, 0));

        // Within the lateness: the watermark stands at 4:30, the pane ends at 1:00.
        append(&log, &input(0, &click("c", "/", "sur", T0 + 20), T0 + 5 * minute));
        drain(&mut workers).await;
        assert_eq!((row(WindowKind::Region1m).clicks, row(WindowKind::Region1m).revision), (2, 1));
        assert_eq!(row(WindowKind::Region1m).unique_users, 2);

        // The watermark moves to 6:00, exactly pane end + lateness: too late now.
        append(&log, &input(0, &click("d", "/", "sur", T0 + 6 * minute + 30_000), T0 + 6 * minute));
        append(&log, &input(0, &click("e", "/", "sur", T0 + 30), T0 + 6 * minute));
        drain(&mut workers).await;
        assert_eq!((row(WindowKind::Region1m).clicks, row(WindowKind::Region1m).revision), (2, 1));
        let late = log.all(&config.topics.late);
        assert_eq!(late.len(), 1);
        assert!(late[0].headers.contains(&("simulacro.reason".into(), Bytes::from_static(b"timestamp.late"))));
        // The sliding window from 0:00 to 5:00 was closed by the same event, with both.
        assert_eq!((row(WindowKind::Region5m).clicks, row(WindowKind::Region5m).revision), (2, 0));
        assert_eq!(workers[0].clicks()[&0].counts().of(Fate::Late), 1);
    });
}

#[test]
fn a_silent_partition_holds_the_windows_until_it_is_idle_and_then_follows() {
    run(async {
        let config = config();
        let minute = 60_000;
        let inputs =
            [input(0, &click("a", "/", "sur", T0), T0), input(0, &click("b", "/", "sur", T0 + 3 * minute), T0 + 3 * minute)];
        let log = log_with(2, 10, &inputs).await;
        let mut worker = open(&log, &config, 0).await;
        let started = log.env.0.load(std::sync::atomic::Ordering::SeqCst);
        let now = || log.env.0.load(std::sync::atomic::Ordering::SeqCst) - started;
        while now() < 30_000 {
            worker.step().await.unwrap();
        }
        // Partition 0 is busy, so it is not idle when partition 1 is.
        append(&log, &input(0, &click("b", "/", "sur", T0 + 3 * minute + 1), T0 + 3 * minute));
        while now() < 55_000 {
            worker.step().await.unwrap();
        }
        assert!(log.all(&config.topics.metrics).is_empty(), "partition 1 may still have something");
        while now() < 75_000 {
            worker.step().await.unwrap();
        }
        let rows = newest_rows(&log, &config);
        assert_eq!(rows[&(WindowKind::Region1m, T0, "sur".into(), None)].clicks, 1);
        assert_eq!(worker.clicks()[&1].watermark(), Some(T0 + 2 * minute), "it promised what it let pass");
        // Now all are idle: the watermark holds, and an event of partition 1 behind its promise is judged by it.
        append(&log, &input(1, &click("c", "/", "sur", T0 + 30_000), T0 + 3 * minute));
        append(&log, &input(1, &click("d", "/", "sur", T0 - 4 * minute), T0 + 3 * minute));
        let mut workers = vec![worker];
        drain(&mut workers).await;
        let rows = newest_rows(&log, &config);
        let row = &rows[&(WindowKind::Region1m, T0, "sur".into(), None)];
        assert_eq!((row.clicks, row.revision), (2, 1));
        assert_eq!(workers[0].clicks()[&1].counts().of(Fate::Late), 1);
    });
}

#[test]
fn a_partition_whose_worker_is_dead_is_not_idle() {
    run(async {
        let config = config();
        let minute = 60_000;
        let log = log_with(2, 10, &[input(1, &click("z", "/", "sur", T0), T0)]).await;
        let mut workers = vec![open(&log, &config, 0).await, open(&log, &config, 1).await];
        drain(&mut workers).await;
        // Worker 1 hangs: it keeps its partitions and does not read.
        let hanging = usize::from(workers[1].clicks().contains_key(&1));
        for n in 0..10 {
            for partition in 0..2 {
                append(&log, &input(partition, &click(&format!("u{n}"), "/", "sur", T0 + n * minute), T0 + n * minute));
            }
        }
        for _ in 0..2_000 {
            workers[1 - hanging].step().await.unwrap();
        }
        assert!(log.all(&config.topics.metrics).is_empty(), "ten minutes of the other partition close nothing");
        drain(&mut workers).await;
        let rows = newest_rows(&log, &config);
        assert_eq!(rows[&(WindowKind::Region1m, T0 + minute, "sur".into(), None)].clicks, 2);
    });
}

#[test]
fn a_second_worker_of_the_same_name_fences_the_first() {
    run(async {
        let config = config();
        let inputs = [input(0, &click("a", "/", "sur", T0), T0)];
        let log = log_with(1, 10, &inputs).await;
        let mut first = open(&log, &config, 0).await;
        while first.clicks().values().all(|t| t.next_offset() == 0) {
            first.step().await.unwrap();
        }
        let second = open(&log, &config, 0).await;
        let error = first.close().await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("INVALID_PRODUCER_EPOCH"));
        let mut workers = vec![second];
        drain(&mut workers).await;
        assert_eq!(workers[0].clicks()[&0].counts().read, 1);
    });
}

#[test]
fn state_that_was_lost_stops_the_worker_instead_of_losing_counts() {
    run(async {
        let config = config();
        let inputs = [input(0, &click("a", "/", "sur", T0), T0)];
        let log = log_with(1, 10, &inputs).await;
        let mut workers = vec![open(&log, &config, 0).await];
        drain(&mut workers).await;
        workers[0].close().await.unwrap();
        let other = StreamConfig {
            topics: super::config::Topics { changelog: "another".into(), ..config.topics.clone() },
            ..config.clone()
        };
        let mut worker = open(&log, &other, 0).await;
        let error = worker.step().await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("STATE_MISSING"));
        let adopting = StreamConfig { adopt_offsets_without_state: true, ..other };
        let mut worker = open(&log, &adopting, 0).await;
        worker.step().await.unwrap();
        assert_eq!(worker.clicks()[&0].next_offset(), 1);
    });
}

#[test]
fn an_offset_that_is_not_the_states_stops_the_worker() {
    run(async {
        let config = config();
        let inputs = [input(0, &click("a", "/", "sur", T0), T0)];
        let log = log_with(1, 10, &inputs).await;
        let mut workers = vec![open(&log, &config, 0).await];
        drain(&mut workers).await;
        workers[0].close().await.unwrap();
        log.set_committed(&config.group, TopicPartition { topic: CLICKS.into(), partition: 0 }, 7);
        let mut worker = open(&log, &config, 0).await;
        let error = worker.step().await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("STATE_MISMATCH"));
        assert_eq!(error.to_string(), "restore ecommerce.clicks-0: committed offset 7, state 1 [STATE_MISMATCH]");
    });
}

#[test]
fn after_a_commit_nobody_answered_the_committed_offsets_decide() {
    for landed in [true, false] {
        run(async {
            let config = config();
            let log = log_with(1, 10, &[input(0, &click("a", "/", "sur", T0), T0)]).await;
            let mut worker = open(&log, &config, 0).await;
            while worker.clicks().values().all(|t| t.next_offset() == 0) {
                worker.step().await.unwrap();
            }
            // Begin, send and offsets go well; the commit is called six times without an answer.
            doubt(&log, 3, &config);
            if !landed {
                log.fail(3, Fault::UnknownBefore);
            }
            let mut committed = false;
            while log.calls() < 9 {
                committed |= worker.step().await.unwrap().committed;
            }
            assert_eq!(committed, landed);
            assert_eq!(worker.clicks()[&0].counts().read, u64::from(landed));
            let mut workers = vec![worker];
            drain(&mut workers).await;
            assert_eq!(workers[0].clicks()[&0].counts().read, 1);
            assert_eq!(workers[0].clicks()[&0].counts().of(Fate::Published), 1);
        });
    }
}

#[test]
fn when_even_the_committed_offsets_do_not_tell_state_is_read_again() {
    run(async {
        let config = config();
        let log = log_with(1, 10, &[input(0, &click("a", "/", "sur", T0), T0)]).await;
        let mut worker = open(&log, &config, 0).await;
        while worker.clicks().values().all(|t| t.next_offset() == 0) {
            worker.step().await.unwrap();
        }
        // Somebody else's offset, without the state that belongs to it: neither ours nor the one before.
        log.set_committed(&config.group, TopicPartition { topic: CLICKS.into(), partition: 0 }, 99);
        doubt(&log, 3, &config);
        log.fail(3, Fault::UnknownBefore);
        let error = loop {
            if let Err(error) = worker.step().await {
                break error;
            }
        };
        assert_eq!(error.code.as_deref(), Some("STATE_MISSING"));
    });
}

#[test]
fn failures_far_apart_do_not_add_up_and_those_in_a_row_end_the_worker() {
    run(async {
        let config = config();
        let log = log_with(1, 10, &[]).await;
        let mut worker = open(&log, &config, 0).await;
        for _ in 0..20 {
            log.fail_polls(config.retries_max);
            for _ in 0..=config.retries_max {
                worker.step().await.unwrap();
            }
        }
        log.fail_polls(config.retries_max + 1);
        let mut steps = 0;
        let error = loop {
            steps += 1;
            if let Err(error) = worker.step().await {
                break error;
            }
        };
        assert_eq!((steps, error.code.as_deref()), (config.retries_max + 1, Some("NETWORK_EXCEPTION")));
    });
}

#[test]
fn a_worker_keeps_its_membership_while_it_restores_many_partitions() {
    run(async {
        let config = StreamConfig { session_timeout: Duration::from_secs(6), ..config() };
        let inputs: Vec<Input> = (0..8).map(|p| input(p, &click(&format!("u{p}"), "/", "norte", T0), T0)).collect();
        let log = log_with(8, 10, &inputs).await;
        // About three seconds for each partition, and half a minute for all.
        log.slow_down(500);
        let mut worker = open(&log, &config, 0).await;
        for _ in 0..200 {
            worker.step().await.unwrap();
        }
        let read: u64 = worker.clicks().values().map(|task| task.counts().read).sum();
        assert_eq!((worker.clicks().len(), worker.merges().len(), read), (8, 2, 8));
    });
}

#[test]
fn commits_that_take_longer_than_the_interval_leave_time_for_polls() {
    run(async {
        let config = config();
        let inputs: Vec<Input> = (0..100).map(|n| input(0, &click(&format!("u{n}"), "/", "norte", T0), T0)).collect();
        let log = log_with(1, 1, &inputs).await;
        log.slow_commits(5 * config.commit_interval.as_millis() as i64);
        let mut worker = open(&log, &config, 0).await;
        let (mut records, mut commits) = (0, 0);
        while records < 100 {
            let step = worker.step().await.unwrap();
            records += step.records;
            commits += usize::from(step.committed);
            // What a poll takes: a tenth of the interval.
            log.env.sleep(config.commit_interval / 10).await;
        }
        assert!((5..=12).contains(&commits), "{commits} commits of 100 polls");
    });
}

#[test]
fn what_is_revoked_is_committed_before() {
    run(async {
        let config = StreamConfig { commit_interval: Duration::from_secs(86_400), ..config() };
        let inputs: Vec<Input> = (0..2).map(|p| input(p, &click("a", "/", "sur", T0), T0)).collect();
        let log = log_with(2, 10, &inputs).await;
        let mut first = open(&log, &config, 0).await;
        for _ in 0..20 {
            first.step().await.unwrap();
        }
        assert!(log.committed(&config.group, CLICKS).await.unwrap().is_empty());
        let _second = open(&log, &config, 1).await;
        first.step().await.unwrap();
        assert_eq!(log.committed(&config.group, CLICKS).await.unwrap(), BTreeMap::from([(0, 1), (1, 1)]));
    });
}

#[test]
fn only_the_broker_says_that_a_partition_is_read_to_its_end() {
    run(async {
        let config = config();
        let inputs: Vec<Input> = (0..2).map(|p| input(p, &click("a", "/", "sur", T0), T0)).collect();
        let log = log_with(2, 1, &inputs).await;
        let mut workers = vec![open(&log, &config, 0).await];
        drain(&mut workers).await;
        let worker = &mut workers[0];
        for n in 1..4 {
            for partition in 0..2 {
                append(&log, &input(partition, &click("a", "/", "sur", T0 + n), T0));
            }
        }
        // Both were read to their end a minute ago; there is something now, of which one poll brings one record.
        log.env.0.fetch_add(61_000, std::sync::atomic::Ordering::SeqCst);
        assert_eq!(worker.step().await.unwrap().records, 1);
        assert!(worker.idle().is_empty());
    });
}

#[test]
fn a_record_that_is_delivered_again_changes_nothing() {
    run(async {
        let config = config();
        let mut task = ClickTask::new(0, 0);
        let record = |offset: i64| LogRecord {
            offset,
            appended_ms: T0,
            key: None,
            value: Some(serde_json::to_vec(&click("a", "/", "sur", T0 + offset)).unwrap().into()),
            headers: vec![],
        };
        let records: Vec<_> = (0..6).map(record).collect();
        for (from, to) in [(0, 4), (0, 4), (2, 6), (5, 6)] {
            let decoded = JsonClicks.decode(&records[from..to]).await.unwrap();
            task.process(&records[from..to], to as i64, &decoded, &config).unwrap();
        }
        let _ = task.prepare(false, &config);
        let added = task.commit(&config);
        assert_eq!((added.read, added.of(Fate::Published), task.next_offset()), (6, 6, 6));
    });
}

/// Decodes, except while its registry is away.
#[derive(Debug)]
struct Away {
    calls: u32,
    from: u32,
    until: u32,
}

#[async_trait::async_trait]
impl ClickDecoder for Away {
    async fn decode(&mut self, records: &[LogRecord]) -> crate::ports::Result<super::event::Decoded> {
        self.calls += 1;
        if (self.from..self.until).contains(&self.calls) {
            return Err(PortError::retryable("find a schema"));
        }
        JsonClicks.decode(records).await
    }
}

#[test]
fn a_poll_of_many_records_counts_as_many_polls_do_and_goes_on_where_decoding_failed() {
    run(async {
        let config = config();
        let regions = ["norte", "sur", "este", "marte"];
        let events: Vec<Input> = (0..3_500_i64)
            .map(|n| {
                // Every seventh is there again later, in its own block of rows, another one or another poll.
                let of = if n % 7 == 0 && n > 0 { n - [7, 70, 1_400][n as usize % 3].min(n - n % 7) } else { n };
                let (user, page, time) = (format!("u{}", of % 11), format!("/{}", of % 40), T0 + of * 100);
                input(0, &click(&user, &page, regions[of as usize % 4], time), time)
            })
            .collect();
        let all = with_end(events, 1);
        let log = log_with(1, 10_000, &all).await;
        let decoder = Box::new(Away { calls: 0, from: 3, until: 4 + config.retries_max });
        let mut workers =
            vec![RealtimeMetrics::open(config.clone(), ports(&log), "worker-0", decoder, Box::new(JsonRows)).await.unwrap()];
        drain(&mut workers).await;
        let expected = naive(&all, 1, &config);
        assert!(expected.fates[&Fate::Deduplicated] > 100 && expected.fates[&Fate::Quarantined] > 100, "{:?}", expected.fates);
        check(&log, &workers, &expected, &config);
    });
}

#[test]
fn a_decoder_that_forgets_a_record_is_found_out() {
    run(async {
        let config = config();
        let record = LogRecord { offset: 0, appended_ms: T0, key: None, value: None, headers: vec![] };
        let mut decoded = JsonClicks.decode(std::slice::from_ref(&record)).await.unwrap();
        decoded.undecodable.clear();
        let error = ClickTask::new(0, 0).process(&[record], 1, &decoded, &config).unwrap_err();
        assert!(error.to_string().contains("record 0 of 1"), "{error}");
    });
}

#[test]
fn a_dead_letter_that_would_be_too_large_says_where_it_stands() {
    run(async {
        let config = config();
        let large = Bytes::from(vec![b'x'; config.record_bytes_max]);
        let log = log_with(1, 10, &[Input { partition: 0, value: large, appended_ms: T0 }]).await;
        let mut workers = vec![open(&log, &config, 0).await];
        drain(&mut workers).await;
        let letter = log.all(&config.topics.dead_letter).remove(0);
        let header = |name: &str| letter.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        assert_eq!(letter.value, Some(Bytes::new()));
        assert_eq!(header("simulacro.value_bytes"), Some("32768".into()));
        assert_eq!(header("simulacro.reason"), Some("undecodable: not JSON".into()));
        assert_eq!((header("simulacro.topic"), header("simulacro.offset")), (Some(CLICKS.into()), Some("0".into())));
    });
}

#[test]
fn a_damaged_changelog_is_an_error_with_its_place() {
    run(async {
        let config = config();
        let inputs = [input(0, &click("a", "/", "sur", T0), T0)];
        let log = log_with(1, 10, &inputs).await;
        let mut workers = vec![open(&log, &config, 0).await];
        drain(&mut workers).await;
        workers[0].close().await.unwrap();
        log.append(&config.topics.changelog, 0, "\0", Some(Bytes::from_static(b"S\x01\x01nonsense")), T0);
        let mut worker = open(&log, &config, 0).await;
        let error = worker.step().await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("CHANGELOG_DAMAGED"));
        assert!(error.to_string().contains("realtime_metrics.changelog-0"), "{error}");
    });
}

#[test]
fn the_status_is_that_of_the_newest_head_however_far_back_it_is() {
    run(async {
        let config = config();
        let log = worked(&config, &of_an_hour()).await;
        let status = JobStatus::read(&config, &log).await.unwrap();
        assert!(status.records_read() > 0 && status.closed_ms().is_some());
        // What is no head is not even decoded.
        for n in 0..1_500 {
            log.append(&config.topics.changelog, 0, &format!("\u{3}{n}"), Some(Bytes::from_static(b"no record")), T0);
        }
        assert_eq!(JobStatus::read(&config, &log).await.unwrap(), status);
        log.append(&config.topics.changelog, 0, "\0", Some(Bytes::from_static(b"S\x01\x01nonsense")), T0);
        let error = JobStatus::read(&config, &log).await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("CHANGELOG_DAMAGED"));
        log.append(&config.topics.changelog, 0, "\0", None, T0);
        assert_eq!(JobStatus::read(&config, &log).await.unwrap().clicks[&0].counts.read, 0);
    });
}

#[test]
fn a_partition_far_ahead_waits_for_the_others() {
    run(async {
        let config = StreamConfig { ahead_max: Duration::from_secs(600), ..config() };
        let minute = 60_000;
        let fast = |n: i64| input(0, &click(&format!("u{n}"), "/", "sur", T0 + n * minute), T0 + n * minute);
        let mut inputs: Vec<Input> = (0..600).map(fast).collect();
        // Partition 1 has a beginning and then a lot that is in the middle of being read.
        inputs.extend((0..600).map(|n| Input { partition: 1, ..fast(n) }));
        let log = log_with(2, 2, &inputs).await;
        let mut workers = vec![open(&log, &config, 0).await, open(&log, &config, 1).await];
        for _ in 0..20 {
            workers[1].step().await.unwrap();
            workers[0].step().await.unwrap();
        }
        let fast = usize::from(workers[1].clicks().contains_key(&0));
        for _ in 0..3_000 {
            workers[fast].step().await.unwrap();
        }
        let ahead = workers[fast].clicks().values().next().unwrap().watermark().unwrap();
        let behind = workers[1 - fast].clicks().values().next().unwrap().watermark().unwrap();
        assert!(ahead - behind < 60 * minute, "{} minutes ahead", (ahead - behind) / minute);
        let inputs = with_end(vec![], 2);
        inputs.iter().for_each(|i| append(&log, i));
        drain(&mut workers).await;
        let rows = newest_rows(&log, &config);
        let sum: u64 = rows.values().filter(|r| r.window_kind == WindowKind::Region1m).map(|r| r.clicks).sum();
        assert_eq!(sum, 1_200);
    });
}

#[test]
fn windows_can_be_reconfigured_without_losing_state() {
    run(async {
        let config = config();
        let minute = 60_000;
        let event = |n: i64| input(0, &click(&format!("u{n}"), "/", "norte", T0 + n * minute), T0 + n * minute);
        let log = log_with(1, 10, &(0..6).map(event).collect::<Vec<_>>()).await;
        let mut workers = vec![open(&log, &config, 0).await];
        drain(&mut workers).await;
        workers[0].close().await.unwrap();
        let config = StreamConfig { sliding_window: Duration::from_secs(120), slide: Duration::from_secs(120), ..config };
        let mut workers = vec![open(&log, &config, 0).await];
        (6..12).map(event).for_each(|i| append(&log, &i));
        drain(&mut workers).await;
        let rows = newest_rows(&log, &config);
        let row = &rows[&(WindowKind::Region5m, T0 + 8 * minute, "norte".into(), None)];
        assert_eq!((row.clicks, row.window_end_ms - row.window_start_ms), (2, 2 * minute));
        let sum: u64 = rows.values().filter(|r| r.window_kind == WindowKind::Region1m).map(|r| r.clicks).sum();
        assert_eq!(sum, 10, "minutes 0 to 9 are closed, each with its click");
    });
}

#[test]
fn more_pages_than_allowed_keep_the_region_right() {
    run(async {
        let config = StreamConfig { pane_keys_max: 3, ..config() };
        let events: Vec<Input> =
            (0..10).map(|n| input(0, &click(&format!("u{n}"), &format!("/{n}"), "sur", T0 + n), T0)).collect();
        let log = log_with(1, 10, &with_end(events, 1)).await;
        survive(&log, &config, 1, &[]).await;
        let rows = newest_rows(&log, &config);
        assert_eq!(rows[&(WindowKind::Region1m, T0, "sur".into(), None)].clicks, 10);
        let pages: Vec<_> = rows.values().filter(|r| r.window_kind == WindowKind::Page1m).collect();
        assert_eq!(pages.len(), 4);
        assert_eq!(pages.iter().map(|r| r.clicks).sum::<u64>(), 10);
        assert_eq!(pages.iter().find(|r| r.page.as_deref() == Some(super::pane::OTHER_PAGES)).unwrap().clicks, 7);
    });
}

#[test]
fn state_is_bounded_by_window_and_lateness() {
    run(async {
        let config = config();
        let minute = 60_000;
        let events: Vec<Input> =
            (0..500).map(|n| input(0, &click(&format!("u{n}"), "/", "sur", T0 + n * minute), T0 + n * minute)).collect();
        let log = log_with(1, 1, &events).await;
        let mut worker = open(&log, &config, 0).await;
        let mut most = 0;
        for _ in 0..6_000 {
            worker.step().await.unwrap();
            most = most.max(worker.merges().values().map(|m| m.panes()).max().unwrap_or(0));
        }
        assert!(most > 5 && most <= 10 + 30 + 2, "{most} panes: window, lateness and what may be ahead");
        log.compact();
        let live = log.all(&config.topics.changelog).len();
        assert!(live < 60, "{live} live records in the changelog");
    });
}

#[test]
fn a_worker_can_run_on_any_thread() {
    fn is_send<T: Send>(value: T) -> T {
        value
    }
    run(async {
        let log = log_with(1, 10, &[]).await;
        let mut worker = is_send(open(&log, &config(), 0).await);
        let mut turns = 0;
        let stop = move || {
            turns += 1;
            turns > 10
        };
        is_send(worker.run(stop)).await.unwrap();
    });
}

#[test]
fn evidence_names_what_became_of_each_sale_and_status_what_is_left() {
    let purchase = |user: &str, region: &str, cents, minute: i64| Click {
        event_type: "purchase".into(),
        product_id: Some("P001".into()),
        cents,
        ..click(user, "/pago", region, T0 + minute * 60_000)
    };
    let counted = purchase("counted", "norte", 100, 0);
    let inputs = [
        counted.clone(),
        counted.clone(),
        click("later", "/", "norte", T0 + 3_600_000),
        // A copy that is late takes nothing away from the one that counted.
        counted.clone(),
        purchase("late", "sur", 2_000, 1),
        purchase("refused", "luna", 30_000, 59),
    ];
    let sale =
        |user: &str, region: &str, cents| Sale { user_id: user.into(), product_id: "P001".into(), region: region.into(), cents };
    let sales = [
        sale("counted", "norte", 100),
        sale("late", "sur", 2_000),
        sale("refused", "luna", 30_000),
        sale("never sent", "este", 400_000),
    ];
    run(async {
        let config = config();
        let records: Vec<_> = inputs.iter().map(|click| input(0, click, T0 + 3_600_000)).collect();
        let log = log_with(1, 10, &records).await;
        let before = JobStatus::read(&config, &log).await.unwrap();
        assert_eq!((before.lag_records(), before.lag_ms(T0 + 3_601_000), before.records_read()), (6, 1_000, 0));
        let mut workers = [open(&log, &config, 0).await];
        drain(&mut workers).await;
        let after = JobStatus::read(&config, &log).await.unwrap();
        assert!(after.is_caught_up() && after.lag_records() == 0, "{after:?}");
        assert_eq!((after.records_read(), after.fate(Fate::Late)), (6, (2, 2_100)));
        assert_eq!(after.watermark_ms(), Some(T0 + 3_600_000 - 30_000));

        let fecha = chrono::DateTime::from_timestamp_millis(T0).unwrap().date_naive();
        let found = evidence::collect(&config, &log, &mut JsonClicks, fecha, &sales, &BTreeMap::new()).await.unwrap();
        let found: Vec<_> = found.evidence.iter().map(|e| (e.region.as_str(), e.cause, e.cents)).collect();
        let expected = [("este", Cause::Outage, 400_000), ("luna", Cause::DeadLettered, 30_000), ("sur", Cause::Late, 2_000)];
        assert_eq!(found, expected);
    });
}

#[test]
fn a_cent_that_was_doubled_or_put_elsewhere_by_a_clock_has_its_cause() {
    let purchase = |user: &str, region: &str, cents, timestamp: i64| Click {
        event_type: "purchase".into(),
        product_id: Some("P001".into()),
        cents,
        ..click(user, "/pago", region, timestamp)
    };
    let minute = |n: i64| T0 + n * 60_000;
    let twice = purchase("twice", "norte", 1_000, minute(1));
    let again = purchase("again", "norte", 300, minute(2));
    // In order: partition and event. Nothing of a partition is late.
    let records = [
        (1, purchase("of yesterday", "este", 700, minute(-1))),
        (0, twice.clone()),
        // A producer that sends a copy to another partition: nobody there can know it.
        (1, twice),
        (0, again.clone()),
        (0, again),
        (0, purchase("of next year", "sur", 5_000, minute(400 * 1_440))),
        (0, purchase("a day early", "norte", 90, minute(3))),
        (0, purchase("nobody's", "norte", 7, minute(4))),
    ];
    let sale =
        |user: &str, region: &str, cents| Sale { user_id: user.into(), product_id: "P001".into(), region: region.into(), cents };
    let sales = [
        sale("twice", "norte", 1_000),
        sale("again", "norte", 300),
        sale("of yesterday", "este", 700),
        sale("of next year", "sur", 5_000),
        sale("never sent", "este", 40),
    ];
    run(async {
        let config = config();
        let inputs: Vec<_> = records.iter().map(|(partition, click)| input(*partition, click, T0 + 3_600_000)).collect();
        let log = log_with(2, 10, &with_end(inputs, 2)).await;
        let mut workers = [open(&log, &config, 0).await];
        drain(&mut workers).await;
        let fecha = chrono::DateTime::from_timestamp_millis(T0).unwrap().date_naive();
        let (before, after) = (fecha.pred_opt().unwrap(), fecha.succ_opt().unwrap());
        let beside = BTreeMap::from([(before, Vec::new()), (after, vec![sale("a day early", "norte", 90)])]);
        let findings = evidence::collect(&config, &log, &mut JsonClicks, fecha, &sales, &beside).await.unwrap();
        let found: Vec<_> = findings.evidence.iter().map(|e| (e.region.as_str(), e.cause, e.cents)).collect();
        let expected = [
            ("este", Cause::Clock, 700),
            ("este", Cause::Outage, 40),
            ("norte", Cause::Duplicated, -1_000),
            ("norte", Cause::Clock, -90),
            ("sur", Cause::Clock, 5_000),
        ];
        assert_eq!(found, expected);
        assert_eq!(findings.deduplicated, BTreeMap::from([("norte".to_owned(), (1, 300))]));

        // All of it together is the difference, but for the purchase that no sale stands behind.
        let newest: Vec<MetricRow> = newest_rows(&log, &config).into_values().collect();
        let mut batch = Revenue::new();
        for s in &sales {
            *batch.entry((fecha, s.region.clone())).or_default() += s.cents;
        }
        let batch = Side { revenue: batch, complete_through: Some(fecha) };
        let revenue = reconcile::daily_revenue(&newest).into_iter().filter(|((day, _), _)| *day == fecha).collect();
        let stream = Side { revenue, complete_through: Some(fecha) };
        let day = &reconcile::reconcile(&batch, &stream, &findings.evidence, &Bounds::specification())[&fecha];
        let unexplained = |region: &str| day.regions[region].causes.get(&Cause::Unexplained).copied();
        assert_eq!(["este", "norte", "sur"].map(unexplained), [None, Some(-7), None], "{day:?}");
    });
}

/// A job over one day's hour, closed and left; the log it worked on.
async fn worked(config: &StreamConfig, inputs: &[Input]) -> MemoryLog {
    let log = log_with(2, 10, &with_end(inputs.to_vec(), 2)).await;
    let mut workers = [open(&log, config, 0).await];
    drain(&mut workers).await;
    workers[0].close().await.unwrap();
    log
}

async fn reset_to(log: &MemoryLog, config: &StreamConfig, time_ms: i64) -> Result<reset::Plan, PortError> {
    let plan = reset::plan(config, log, &mut JsonClicks, time_ms).await.unwrap();
    let rows: Vec<MetricRow> =
        log.all(&config.topics.metrics).into_iter().map(|r| serde_json::from_slice(&r.value.unwrap()).unwrap()).collect();
    reset::execute(config, log, &plan, &rows).await.map(|()| plan)
}

fn of_an_hour() -> Vec<Input> {
    let at = |n: i64| T0 + n * 30_000;
    (0..120).map(|n| input(n as usize % 2, &click(&format!("u{}", n % 7), "/", "sur", at(n)), at(n))).collect()
}

#[test]
fn a_reset_to_the_beginning_makes_every_window_again_with_a_higher_revision() {
    run(async {
        let config = config();
        let log = worked(&config, &of_an_hour()).await;
        let before = newest_rows(&log, &config);
        let plan = reset_to(&log, &config, T0).await.unwrap();
        assert!(plan.is_backwards() && plan.whole_from_ms.is_none(), "{plan:?}");
        assert_eq!((plan.again(), plan.skipped()), (122, 0));
        let mut workers = [open(&log, &config, 0).await];
        drain(&mut workers).await;
        let after = newest_rows(&log, &config);
        assert_eq!(before.len(), after.len());
        for (key, row) in &before {
            let again = &after[key];
            assert!(again.revision > row.revision, "{key:?} is made again");
            assert_eq!(MetricRow { revision: row.revision, ..again.clone() }, *row);
        }
        let status = JobStatus::read(&config, &log).await.unwrap();
        assert_eq!((status.records_read(), status.fate(Fate::Late).0), (122, 0), "fates begin anew");
    });
}

#[test]
fn a_reset_into_the_middle_makes_the_windows_again_that_it_says_are_whole() {
    run(async {
        let config = config();
        let log = worked(&config, &of_an_hour()).await;
        let before = newest_rows(&log, &config);
        let plan = reset_to(&log, &config, T0 + 1_800_000).await.unwrap();
        let whole = plan.whole_from_ms.unwrap();
        assert_eq!(whole, T0 + 1_800_000, "the last event before it is of the minute before");
        let mut workers = [open(&log, &config, 0).await];
        drain(&mut workers).await;
        let after = newest_rows(&log, &config);
        for (key, row) in &before {
            let again = &after[key];
            if row.window_start_ms >= whole {
                assert!(again.revision > row.revision, "{key:?} is made again");
                assert_eq!(MetricRow { revision: row.revision, ..again.clone() }, *row);
            } else if row.window_end_ms <= whole {
                assert_eq!(again, row, "{key:?} stays");
            }
        }
    });
}

#[test]
fn a_reset_forwards_skips_events_and_keeps_what_the_job_knows() {
    run(async {
        let config = config();
        let log = worked(&config, &of_an_hour()).await;
        let (before, known) = (newest_rows(&log, &config), JobStatus::read(&config, &log).await.unwrap());
        // Three more events that nobody wants, and one that counts, all after the end of the others.
        let later = |n: i64| T0 + 86_400_000 + n * 60_000;
        for n in 1..5 {
            append(&log, &input(0, &click("x", "/", "norte", later(n)), later(n)));
        }
        let plan = reset_to(&log, &config, later(4)).await.unwrap();
        assert_eq!((plan.is_backwards(), plan.again(), plan.skipped()), (false, 0, 3));
        let mut workers = [open(&log, &config, 0).await];
        drain(&mut workers).await;
        let status = JobStatus::read(&config, &log).await.unwrap();
        assert_eq!(status.records_read(), known.records_read() + 1, "one event more");
        assert!(before.iter().all(|(key, row)| newest_rows(&log, &config)[key] == *row));
    });
}

#[test]
fn a_reset_is_refused_while_somebody_works_and_changes_nothing() {
    run(async {
        let config = config();
        let log = worked(&config, &of_an_hour()).await;
        let mut worker = open(&log, &config, 0).await;
        worker.step().await.unwrap();
        let before = log.all(&config.topics.changelog).len();
        let error = reset_to(&log, &config, T0).await.unwrap_err();
        assert_eq!(error.code.as_deref(), Some("NON_EMPTY_GROUP"));
        assert_eq!(log.all(&config.topics.changelog).len(), before);
        drain(&mut [worker]).await;
    });
}
