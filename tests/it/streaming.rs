//! A day through the stream, as programs: workers, kills, and the comparison with the batch, against a naive computation.
#![expect(clippy::disallowed_methods, reason = "tests start, time and kill the program, and copy its files")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::{Output, Stdio},
    sync::Arc,
    time::Duration,
};

use simulacro_adapters::{EmbeddedLogConfig, EmbeddedRegistry, SystemEnv, open_embedded_log};
use simulacro_core::{
    avro::{Click, Limits, MetricaRealtime, Row, RowDecoder},
    history::Event,
    ports::event_log::{EventLog, TopicPartition},
};
use simulacro_shop::{cdnow, clicks};

use crate::binaries::{files, output, program, said, source};

const DAY: &str = "1997-01-02";
const MINUTE: i64 = 60_000;
/// Sessions, so that the job takes long enough to be killed in its middle.
const BROWSING: u32 = 4_000;
/// Small commits: a kill finds several behind it and several before it.
const CONFIG: &str = "commit_interval_ms = 100\ncommit_records_max = 300\n";

fn disturbed(seed: u64) -> clicks::Options {
    clicks::Options { duplicates: 30, out_of_order: 100, malformed: 10, skew: 200, ..clicks::Options::calm(seed, BROWSING) }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

fn simulacro(data: &Path, command: &str, more: &[&str]) -> Output {
    let config = data.with_extension("toml");
    std::fs::write(&config, CONFIG).expect("a configuration");
    output("simulacro", &[&[command, "--data", text(data), "--config", text(&config)], more].concat())
}

fn succeeds(data: &Path, command: &str, more: &[&str]) -> String {
    let run = simulacro(data, command, more);
    assert!(run.status.success(), "{command}: {}", said(&run));
    String::from_utf8_lossy(&run.stdout).into_owned()
}

fn produce(data: &Path, options: &clicks::Options) -> String {
    let number = |n: u32| n.to_string();
    let arguments = [
        ("--seed", options.seed.to_string()),
        ("--browsing", number(options.browsing)),
        ("--skew", number(options.skew)),
        ("--duplicates", number(options.duplicates)),
        ("--out-of-order", number(options.out_of_order)),
        ("--delay-max", number(options.delay_ms_max / 1_000)),
        ("--malformed", number(options.malformed)),
    ];
    let mut flat = vec!["--date", DAY];
    flat.extend(arguments.iter().flat_map(|(name, value)| [*name, value]));
    succeeds(data, "produce", &flat)
}

fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(file.strip_prefix(from).expect("a file below the folder"));
        std::fs::create_dir_all(target.parent().expect("a folder")).expect("a folder");
        std::fs::copy(file, target).expect("a copy");
    }
}

/// Kind, start, region and page of a window.
type Key = (String, i64, String, Option<String>);
/// clicks, purchases, add_to_cart, cents, distinct users.
type Value = (i64, i64, i64, i64, i64);

/// Each distinct event into each window that covers it; nothing is shared with the job.
fn naive(options: &clicks::Options) -> BTreeMap<Key, Value> {
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    let day = DAY.parse().expect("a day");
    let events: BTreeMap<(String, i64), Click> = clicks::of_day(&purchases, day, options)
        .into_iter()
        .filter(|delivery| delivery.damage.is_none())
        .map(|delivery| ((delivery.click.user_id.clone(), delivery.click.timestamp_ms), delivery.click))
        .collect();
    let mut windows: BTreeMap<Key, (i64, i64, i64, i64, BTreeSet<String>)> = BTreeMap::new();
    for click in events.into_values() {
        let minute = click.timestamp_ms - click.timestamp_ms % MINUTE;
        let mut keys = vec![
            ("region_1m".to_owned(), minute, click.region.clone(), None),
            ("page_1m".to_owned(), minute, click.region.clone(), Some(click.page.clone())),
        ];
        keys.extend((0..5).map(|n| ("region_5m".to_owned(), minute - n * MINUTE, click.region.clone(), None)));
        for key in keys {
            let cell = windows.entry(key).or_default();
            cell.0 += i64::from(click.event_type == "click");
            cell.1 += i64::from(click.event_type == "purchase");
            cell.2 += i64::from(click.event_type == "add_to_cart");
            cell.3 += click.monto_cents;
            cell.4.insert(click.user_id.clone());
        }
    }
    windows.into_iter().map(|(key, (c, p, a, cents, users))| (key, (c, p, a, cents, users.len() as i64))).collect()
}

/// The newest revision of each window of the output topic; a revision that is there twice or leaves a gap is an error.
async fn windows(data: &Path) -> BTreeMap<Key, Value> {
    let topic = "ecommerce.metricas_realtime";
    let env = Arc::new(SystemEnv::default());
    let log = open_embedded_log(&data.join("log"), env, EmbeddedLogConfig::STANDARD).await.expect("the log opens");
    let registry = Arc::new(EmbeddedRegistry::open(&data.join("registry.json")).expect("the registry opens"));
    let mut decoder = RowDecoder::<MetricaRealtime>::new(registry, Limits { record_bytes_max: 1 << 20 }).expect("a decoder");
    let mut newest: BTreeMap<Key, (i64, Value)> = BTreeMap::new();
    for (partition, (mut offset, end)) in log.offsets(topic).await.expect("the topic is there") {
        let at = TopicPartition { topic: topic.to_owned(), partition };
        while offset < end {
            let (records, next) = log.read(&at, offset, 10_000).await.expect("records");
            offset = next;
            let values: Vec<_> = records.into_iter().map(|record| record.value).collect();
            let decoded = decoder.decode(&values).await.expect("the registry answers");
            assert!(decoded.rejects.is_empty(), "{:?}", decoded.rejects);
            for row in MetricaRealtime::from_batch(&decoded.batch).expect("rows") {
                assert!(row.exact, "{row:?}");
                let value = (row.clicks, row.purchases, row.add_to_cart, row.revenue_cents, row.unique_users);
                let key = (row.window_kind, row.window_start_ms, row.region, row.page);
                let expected = newest.get(&key).map_or(0, |(revision, _)| revision + 1);
                assert_eq!(row.revision, expected, "{key:?}");
                newest.insert(key, (row.revision, value));
            }
        }
    }
    newest.into_iter().map(|(key, (_, value))| (key, value)).collect()
}

fn query(data: &Path, sql: &str) -> Vec<String> {
    let run = output("simulacro", &["query", "--data", text(data), "--format", "csv", "--limit", "1000000", sql]);
    assert!(run.status.success(), "{sql}: {}", said(&run));
    String::from_utf8_lossy(&run.stdout).lines().skip(1).map(str::to_owned).collect()
}

/// Compares raw eventos with what was sent and the warehouse with the topic; returns how many rows each has.
async fn lake_and_warehouse(data: &Path, options: &clicks::Options) -> (usize, usize) {
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    let mut sent: Vec<String> = clicks::of_day(&purchases, DAY.parse().expect("a day"), options)
        .into_iter()
        .filter(|delivery| delivery.damage.is_none())
        .map(|delivery| delivery.click)
        .map(|c| {
            format!(
                "{},{},{},{}.{:02},{}",
                c.user_id,
                c.event_type,
                c.page,
                c.monto_cents / 100,
                c.monto_cents % 100,
                c.timestamp_ms
            )
        })
        .collect();
    let mut found = query(
        data,
        "SELECT user_id, event_type, page, CAST(monto AS VARCHAR) AS monto, arrow_cast(\"timestamp\", 'Int64') / 1000 AS ms
         FROM raw.eventos",
    );
    sent.sort();
    found.sort();
    assert_eq!(found, sent, "each delivery once, without the damaged ones and the heartbeat");
    let twice = query(data, "SELECT _partition, _offset FROM raw.eventos GROUP BY _partition, _offset HAVING count(*) > 1");
    assert!(twice.is_empty(), "{twice:?}");

    let mut newest: BTreeMap<Key, (i64, Value)> = BTreeMap::new();
    let rows = query(
        data,
        "SELECT window_kind, arrow_cast(window_start, 'Int64') / 1000 AS ms, region, coalesce(page, '-') AS page, revision, clicks,
                purchases, add_to_cart, CAST(revenue * 100 AS BIGINT) AS cents, unique_users FROM realtime.metricas_clicks",
    );
    for row in &rows {
        let cells: Vec<&str> = row.split(',').collect();
        let number = |i: usize| cells[i].parse::<i64>().expect("a number");
        let page = (cells[3] != "-").then(|| cells[3].to_owned());
        let key = (cells[0].to_owned(), number(1), cells[2].to_owned(), page);
        let value = (number(5), number(6), number(7), number(8), number(9));
        if newest.get(&key).is_none_or(|(revision, _)| *revision < number(4)) {
            newest.insert(key, (number(4), value));
        }
    }
    let newest: BTreeMap<Key, Value> = newest.into_iter().map(|(key, (_, value))| (key, value)).collect();
    assert!(newest == windows(data).await, "the warehouse says what the topic says");
    (found.len(), rows.len())
}

async fn check(data: &Path, options: &clicks::Options) {
    let (found, expected) = (windows(data).await, naive(options));
    for (key, value) in &expected {
        assert_eq!(found.get(key), Some(value), "{key:?}");
    }
    assert_eq!(found.len(), expected.len(), "no window that nobody expects");
}

fn batch(folder: &Path, data: &Path) {
    let source = source(folder, |text| text);
    let run = output("simulacro", &["batch", "run", "--source", text(&source), "--data", text(data), "--date", DAY]);
    assert!(run.status.success(), "{}", said(&run));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_worker_or_three_give_the_windows_of_a_naive_computation_and_the_revenue_of_the_batch() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (one, three) = (dir.path().join("one"), dir.path().join("three"));
    let options = disturbed(11);
    produce(&one, &options);
    let again = simulacro(&one, "produce", &["--date", DAY]);
    assert!(!again.status.success() && said(&again).contains("produced before"), "{}", said(&again));
    copy(&one, &three);
    succeeds(&one, "stream", &["--until-caught-up"]);
    succeeds(&three, "stream", &["--until-caught-up", "--workers", "3"]);
    check(&one, &options).await;
    check(&three, &options).await;

    let status = succeeds(&three, "stream-status", &[]);
    assert!(status.starts_with("lag 0 events, 0.0 s\n"), "{status}");
    assert!(status.contains("windows closed to 1997-01-03T00:05:00Z"), "{status}");

    // Every valid event is in the lake once per delivery, and the warehouse has every revision.
    let options_sent = lake_and_warehouse(&one, &options).await;
    assert_eq!(options_sent, lake_and_warehouse(&three, &options).await);

    batch(dir.path(), &three);
    let compared = succeeds(&three, "reconcile", &["--date", DAY]);
    assert!(compared.contains("pass (0.00 %)") && compared.contains("unexplained: 0.00\n"), "{compared}");
    assert_eq!(compared.matches("pass (0.00 %)").count(), 6, "five regions and the total: {compared}");
}

#[test]
fn every_call_of_the_stream_is_in_the_history() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    produce(&data, &clicks::Options::calm(14, 100));
    succeeds(&data, "stream", &["--until-caught-up", "--sinks", "none"]);
    let history = std::fs::read_to_string(data.join("history.jsonl")).expect("a history");
    let events: Vec<Event> = history.lines().map(|line| serde_json::from_str(line).expect("an event")).collect();
    let number = |event: &Event, key: &str| event.refs.pointer(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
    let calls = |component: &str, call: &str| -> Vec<&Event> {
        events.iter().filter(|e| e.component == component && e.call == call && e.outcome == "ok").collect()
    };
    let sent: u64 = calls("producer", "send").iter().map(|e| number(e, "/records/ecommerce.clicks")).sum();
    let polled: u64 = calls("consumer", "poll")
        .iter()
        .filter(|e| e.refs["partition"].as_str().is_some_and(|p| p.starts_with("ecommerce.clicks-")))
        .map(|e| number(e, "/records"))
        .sum();
    assert!(sent > 500, "the producer's sends tell {sent} records");
    assert_eq!(sent, polled, "what was sent, and what one undisturbed worker was given");
    let committed: BTreeSet<&str> = calls("producer", "send_offsets")
        .iter()
        .flat_map(|e| e.refs["offsets"].as_object().expect("offsets").keys())
        .map(String::as_str)
        .collect();
    assert!(committed.iter().filter(|p| p.starts_with("ecommerce.clicks-")).count() == 4, "{committed:?}");
    for (component, call) in [
        ("event_log", "create_topic"),
        ("event_log", "offsets"),
        ("event_log", "join"),
        ("event_log", "producer"),
        ("producer", "begin"),
        ("producer", "commit"),
        ("consumer", "close"),
        ("schema_registry", "register"),
        ("schema_registry", "schema"),
    ] {
        assert!(!calls(component, call).is_empty(), "no {call} of {component} is in the history");
    }
    let silent = calls("consumer", "poll").iter().filter(|e| !e.refs["nothing"].is_null()).count();
    assert!(silent < events.len() / 4, "polls that bring nothing are folded: {silent} of {}", events.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_killed_gives_the_windows_of_one_that_is_not() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    let options = disturbed(12);
    produce(&data, &options);
    let config = data.with_extension("toml");
    let (mut in_the_middle, mut delay) = (0, Duration::from_millis(300));
    for _ in 0..40 {
        let mut child = program("simulacro")
            .args(["stream", "--data", text(&data), "--config", text(&config), "--workers", "3"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the program starts");
        std::thread::sleep(delay);
        child.kill().expect("it is killed");
        child.wait().expect("it ended");
        let status = succeeds(&data, "stream-status", &[]);
        let is_begun = !status.contains("\n0 events read");
        let is_done = status.starts_with("lag 0 events");
        in_the_middle += u32::from(is_begun && !is_done);
        if is_done || in_the_middle == 3 {
            break;
        }
        delay += Duration::from_millis(if is_begun { 0 } else { 100 });
    }
    assert!(in_the_middle > 0, "no kill came while there was work");
    succeeds(&data, "stream", &["--until-caught-up", "--workers", "2"]);
    check(&data, &options).await;
    lake_and_warehouse(&data, &options).await;
}

#[test]
fn a_stream_that_is_asked_to_stop_ends_well_however_it_is_asked() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    produce(&data, &clicks::Options::calm(15, 100));
    for signal in ["-TERM", "-INT"] {
        let log = dir.path().join(signal);
        let mut child = program("simulacro")
            .args(["stream", "--data", text(&data), "--sinks", "none"])
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).expect("a file"))
            .spawn()
            .expect("the program starts");
        // It listens from when it says for the first time how far it is.
        while !std::fs::read_to_string(&log).expect("its log").contains("progress") {
            assert!(child.try_wait().expect("it is ours").is_none(), "it has ended by itself");
            std::thread::sleep(Duration::from_millis(20));
        }
        let asked = std::process::Command::new("kill").args([signal, &child.id().to_string()]).status();
        assert!(asked.is_ok_and(|status| status.success()));
        let run = child.wait_with_output().expect("it ended");
        let printed = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success() && printed.contains(" events read = "), "{signal}: {} {printed}", run.status);
    }
}

#[test]
fn late_events_explain_a_difference_and_a_large_one_fails() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let late = clicks::Options { out_of_order: 300, delay_ms_max: 7_200_000, ..disturbed(13) };
    let data = dir.path().join("data");
    produce(&data, &late);
    batch(dir.path(), &data);
    let pending = simulacro(&data, "reconcile", &["--date", DAY]);
    assert_eq!(pending.status.code(), Some(1), "{}", said(&pending));
    assert!(said(&pending).contains("stream through nothing"), "{}", said(&pending));
    succeeds(&data, "stream", &["--until-caught-up"]);
    let run = simulacro(&data, "reconcile", &["--date", DAY]);
    let printed = String::from_utf8_lossy(&run.stdout);
    assert_eq!(run.status.code(), Some(4), "{printed}{}", said(&run));
    assert!(printed.contains("late: ") && printed.contains("unexplained: 0.00\n"), "{printed}");
}
