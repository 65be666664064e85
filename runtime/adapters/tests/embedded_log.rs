//! The embedded event log: the port's suite, and what is left after cuts, damage and a second process.
#![expect(clippy::disallowed_methods, reason = "a test cuts files")]

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use simulacro_adapters::{EmbeddedLog, EmbeddedLogConfig, LazyLog, SystemEnv, open_embedded_log};
use simulacro_core::ports::{
    Disposition,
    event_log::{EventLog, GroupSpec, OutRecord, Polled, StartAt, TopicPartition, TopicSpec},
};
use simulacro_log::{
    Limits, Settings,
    conformance::{PROMISES, RESTART, World},
};

const SMALL: EmbeddedLogConfig = EmbeddedLogConfig { wal_bytes_max: 20_000, ..EmbeddedLogConfig::STANDARD };

/// Asks once, so that what is not stable is seen at once.
const QUICK: EmbeddedLogConfig =
    EmbeddedLogConfig { settings: Settings { retry_for: Duration::ZERO, ..Settings::KAFKA }, ..EmbeddedLogConfig::STANDARD };

async fn open(dir: &Path, config: EmbeddedLogConfig) -> EmbeddedLog {
    open_embedded_log(dir, Arc::new(SystemEnv::default()), config).await.expect("the log opens")
}

async fn world(dir: &Path, config: EmbeddedLogConfig) -> World {
    World {
        log: Arc::new(open(dir, config).await),
        env: Arc::new(SystemEnv::default()),
        prefix: "it".into(),
        patience: Duration::from_secs(30),
        session: Duration::from_secs(2),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_log_keeps_every_promise() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let limits = Limits { compact_above: 20, ..Limits::KAFKA };
    let world = world(dir.path(), EmbeddedLogConfig { limits, ..EmbeddedLogConfig::STANDARD }).await;
    for (name, promise) in PROMISES {
        println!("{name}");
        promise(world.clone()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_that_is_opened_by_its_first_call_keeps_every_promise() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let limits = Limits { compact_above: 20, ..Limits::KAFKA };
    let config = EmbeddedLogConfig { limits, ..EmbeddedLogConfig::STANDARD };
    let lazy = LazyLog::new(&dir.path().join("log"), Arc::new(SystemEnv::default()), config.clone());
    assert!(!dir.path().join("log").exists(), "nobody has called it");
    let world = World { log: Arc::new(lazy), ..world(&dir.path().join("other"), config).await };
    for (name, promise) in PROMISES {
        println!("{name}");
        promise(world.clone()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything_with_and_without_snapshots() {
    for config in [EmbeddedLogConfig::STANDARD, EmbeddedLogConfig { wal_bytes_max: 1, ..SMALL }] {
        let dir = tempfile::tempdir().expect("a temporary folder");
        RESTART[0].1(world(dir.path(), config.clone()).await).await;
        RESTART[1].1(world(dir.path(), config).await).await;
    }
}

const TOPIC: &str = "t";

fn at(partition: i32) -> TopicPartition {
    TopicPartition { topic: TOPIC.into(), partition }
}

fn record(partition: i32, value: impl ToString) -> OutRecord {
    let value = Some(Bytes::from(value.to_string()));
    OutRecord { topic: TOPIC.into(), partition: Some(partition), key: None, value, headers: Vec::new() }
}

/// What a reader sees: values of both partitions, and the group's offsets unless an open transaction holds newer ones.
type Seen = (Vec<Vec<String>>, Option<BTreeMap<i32, i64>>);

async fn seen(log: &EmbeddedLog) -> Seen {
    let mut values = Vec::new();
    for partition in 0..2 {
        let (records, _) = log.read(&at(partition), 0, 10_000).await.expect("the partition is read");
        values
            .push(records.iter().map(|r| String::from_utf8_lossy(r.value.as_deref().unwrap_or_default()).into_owned()).collect());
    }
    (values, log.committed("g", TOPIC).await.ok())
}

/// Works in `dir` until `acts` acts are acknowledged; after each, how long the log is and what is seen.
async fn work(dir: &Path, acts: usize) -> Vec<(u64, Seen)> {
    let log = open(dir, QUICK).await;
    log.create_topic(&TopicSpec { name: TOPIC.into(), partitions: 2, retention: None, compact: false }).await.expect("a topic");
    let spec = GroupSpec {
        group: "g".into(),
        member: "m".into(),
        topics: vec![TOPIC.into()],
        start_at: StartAt::Earliest,
        session_timeout: Duration::from_secs(600),
    };
    let mut member = log.join(&spec).await.expect("the member joins");
    while !matches!(member.poll(Duration::from_secs(1)).await.expect("a poll works"), Polled::Assigned(p) if p.len() == 2) {}
    let mut plain = log.producer(None).await.expect("a producer is made");
    let mut producer = log.producer(Some("p")).await.expect("a producer is made");
    let mut marks = Vec::new();
    for act in 0..acts {
        match act % 4 {
            0 => plain.send(vec![record(0, format!("plain-{act}"))]).await.expect("a record is sent"),
            1 => {
                producer.begin().await.expect("a transaction begins");
                producer.send(vec![record(0, act), record(1, act)]).await.expect("records are accepted");
                let offsets = BTreeMap::from([(at(0), act as i64)]);
                producer.send_offsets(&offsets, &member.metadata()).await.expect("offsets are accepted");
            }
            2 => producer.commit().await.expect("the transaction commits"),
            _ => {
                producer.begin().await.expect("a transaction begins");
                producer.send(vec![record(1, format!("aborted-{act}"))]).await.expect("records are accepted");
                producer.abort().await.expect("the transaction is aborted");
            }
        }
        let length = std::fs::metadata(dir.join("wal-0")).expect("the log is there").len();
        marks.push((length, seen(&log).await));
    }
    marks
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_at_any_byte_loses_nothing_acknowledged_and_shows_nothing_uncommitted() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let marks = work(dir.path(), 10).await;
    let bytes = std::fs::read(dir.path().join("wal-0")).expect("the log is read");
    assert_eq!(bytes.len() as u64, marks.last().expect("marks").0);
    let copy = tempfile::tempdir().expect("a temporary folder");
    // From behind the fourth act to the end, every byte: plain sends, commits and aborts are all in there.
    for cut in marks[3].0..=bytes.len() as u64 {
        std::fs::write(copy.path().join("wal-0"), &bytes[..cut as usize]).expect("a cut log is written");
        let log = open(copy.path(), QUICK).await;
        let expected = &marks.iter().rev().find(|(length, _)| *length <= cut).expect("a mark").1;
        assert_eq!(&seen(&log).await, expected, "cut at {cut}");
        // And it goes on.
        let mut plain = log.producer(None).await.expect("a producer is made");
        drop(log.producer(Some("p")).await.expect("the heir ends what was open"));
        plain.send(vec![record(1, "after")]).await.expect("a record is sent");
        let last = seen(&log).await;
        assert_eq!(last.0[1].last().map(String::as_str), Some("after"), "cut at {cut}");
        // What was written behind the cut is found again, too.
        drop((log, plain));
        assert_eq!(seen(&open(copy.path(), QUICK).await).await, last, "cut at {cut}, opened again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_behind_the_last_sync_is_cut_and_damage_before_it_is_an_error() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let marks = work(dir.path(), 10).await;
    let bytes = std::fs::read(dir.path().join("wal-0")).expect("the log is read");
    let copy = tempfile::tempdir().expect("a temporary folder");
    let garbage: Vec<u8> = bytes.iter().copied().chain([0; 4096]).chain(*b"SLG1 and more").collect();
    std::fs::write(copy.path().join("wal-0"), garbage).expect("a log is written");
    assert_eq!(seen(&open(copy.path(), QUICK).await).await, marks[9].1);
    // Act 8 is a plain send, behind which an open transaction was written (act 9), so everything to there was synced.
    for damaged in (0..marks[7].0).step_by(7) {
        let mut bytes = bytes.clone();
        bytes[damaged as usize] ^= 0x40;
        std::fs::write(copy.path().join("wal-0"), bytes).expect("a log is written");
        let error = open_embedded_log(copy.path(), Arc::new(SystemEnv::default()), QUICK).await;
        let error = error.expect_err("damage is not repaired silently");
        assert_eq!((error.code.as_deref(), error.disposition), (Some("CORRUPT_MESSAGE"), Disposition::Permanent), "at {damaged}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_bound_the_files_and_keep_what_is_seen() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let log = open(dir.path(), SMALL).await;
    let retention = Some(Duration::from_millis(1));
    log.create_topic(&TopicSpec { name: TOPIC.into(), partitions: 2, retention: None, compact: false }).await.expect("a topic");
    log.create_topic(&TopicSpec { name: "short".into(), partitions: 1, retention, compact: false }).await.expect("a topic");
    let mut plain = log.producer(None).await.expect("a producer is made");
    let mut producer = log.producer(Some("p")).await.expect("a producer is made");
    for i in 0..200 {
        let noise = OutRecord { topic: "short".into(), ..record(0, "x".repeat(1_000)) };
        plain.send(vec![record(0, i), noise]).await.expect("records are sent");
        producer.begin().await.expect("a transaction begins");
        producer.send(vec![record(1, i)]).await.expect("records are accepted");
        if i % 3 > 0 { producer.commit().await } else { producer.abort().await }.expect("the transaction ends");
    }
    let before = seen(&log).await;
    assert_eq!((before.0[0].len(), before.0[1].len()), (200, 133));
    drop((log, plain, producer));
    let names: Vec<_> = std::fs::read_dir(dir.path()).expect("a folder").map(|e| e.expect("an entry").file_name()).collect();
    assert_eq!(names.len(), 3, "a lock, a snapshot, a log: {names:?}");
    assert_eq!(seen(&open(dir.path(), SMALL).await).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_do_not_open_one_log() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let first = open(dir.path(), EmbeddedLogConfig::STANDARD).await;
    let second = open_embedded_log(dir.path(), Arc::new(SystemEnv::default()), EmbeddedLogConfig::STANDARD).await;
    let error = second.expect_err("the first one has it");
    assert_eq!((error.code.as_deref(), error.disposition), (Some("BUSY"), Disposition::Retryable));
    drop(first);
    open(dir.path(), EmbeddedLogConfig::STANDARD).await;
}
