//! The Kafka adapter passes the port's suite on a real broker.
//!
//! The broker is the one of `SIMULACRO_KAFKA` (`host:port`), else one that `ci/services-kafka` starts on this machine and
//! stops afterwards. Without either the test says so and passes, except under `CI=true`, where it fails.
#![cfg(feature = "kafka")]
#![expect(clippy::disallowed_methods, reason = "a test starts the broker that it needs")]

use std::{
    path::Path,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    client::DefaultClientContext,
};
use simulacro_adapters::{KafkaConfig, KafkaLog, SystemEnv};
use simulacro_core::ports::{
    Env,
    event_log::{EventLog, GroupSpec, Polled, StartAt, TopicPartition, TopicSpec},
};
use simulacro_log::conformance::{PROMISES, RESTART, World};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ci/services-kafka");

/// A broker for these tests; it is stopped when this is dropped, however the test ends.
struct Broker {
    dir: tempfile::TempDir,
    address: String,
}

impl Broker {
    fn start(dir: tempfile::TempDir) -> Result<Self, String> {
        let address = script("fast", dir.path())?;
        Ok(Self { dir, address })
    }
    fn restart(&mut self) {
        script("stop", self.dir.path()).expect("the broker stops");
        self.address = script("fast", self.dir.path()).expect("the broker starts again");
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Err(error) = script("stop", self.dir.path()) {
            eprintln!("stop the broker: {error}");
        }
    }
}

fn script(action: &str, dir: &Path) -> Result<String, String> {
    let output = Command::new(SCRIPT).arg(action).arg(dir).output().map_err(|e| format!("run {SCRIPT}: {e}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn world(address: &str, prefix: &str, session: Duration) -> World {
    World {
        log: Arc::new(KafkaLog::new(KafkaConfig::new(address)).expect("a Kafka client")),
        env: Arc::new(SystemEnv::default()),
        prefix: prefix.to_owned(),
        patience: Duration::from_secs(60),
        session,
    }
}

/// The segment that is being written is never compacted: with Kafka's own of a gigabyte, a restored state would be all that
/// was ever written to its changelog.
async fn a_compacted_topic_has_small_segments(address: &str, prefix: &str) {
    let log = KafkaLog::new(KafkaConfig::new(address)).expect("a Kafka client");
    let name = format!("{prefix}-segments");
    let spec = TopicSpec { name: name.clone(), partitions: 1, retention: None, compact: true };
    log.create_topic(&spec).await.expect("the topic is made");
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", address).create().expect("a client");
    let asked = [ResourceSpecifier::Topic(&name)];
    let described = admin.describe_configs(&asked, &AdminOptions::new()).await.expect("the broker answers");
    let topic = described[0].as_ref().expect("the topic is there");
    let bytes: u64 = topic.get("segment.bytes").and_then(|e| e.value.as_ref()).expect("a value").parse().expect("a number");
    assert!(bytes <= 64 << 20, "segment.bytes is {bytes}");
}

/// A member whose partition is not readable yet, because an open transaction holds its offset, is silent for longer than its
/// session: it loses what it never took over, and goes on.
async fn a_member_survives_losing_what_it_has_not_taken_over(address: &str, prefix: &str, session: Duration) {
    let log = KafkaLog::new(KafkaConfig::new(address)).expect("a Kafka client");
    let topic = format!("{prefix}-not-taken-over");
    log.create_topic(&TopicSpec { name: topic.clone(), partitions: 1, retention: None, compact: false }).await.expect("a topic");
    let spec = |member: &str| GroupSpec {
        group: format!("{topic}-group"),
        member: member.to_owned(),
        topics: vec![topic.clone()],
        start_at: StartAt::Earliest,
        session_timeout: session,
    };
    let mut producer = log.producer(Some(&format!("{topic}-producer"))).await.expect("a producer");
    producer.begin().await.expect("a transaction");
    let begun = Instant::now();
    let within = || assert!(begun.elapsed() < Duration::from_secs(120), "it does not come to an end");
    let mut first = log.join(&spec("first")).await.expect("a member");
    while !matches!(first.poll(Duration::from_millis(200)).await, Ok(Polled::Assigned(_))) {
        within();
    }
    let offsets = [(TopicPartition { topic: topic.clone(), partition: 0 }, 0)].into();
    producer.send_offsets(&offsets, &first.metadata()).await.expect("offsets of the present generation");
    first.close().await.expect("it leaves");
    let mut second = log.join(&spec("second")).await.expect("a member");
    for _ in 0..15 {
        assert_eq!(second.poll(Duration::from_millis(200)).await.expect("it waits"), Polled::Nothing);
    }
    tokio::time::sleep(session * 2).await;
    for _ in 0..5 {
        second.poll(Duration::from_millis(200)).await.expect("it goes on");
    }
    producer.abort().await.expect("the offsets are free");
    while !matches!(second.poll(Duration::from_millis(200)).await.expect("it goes on"), Polled::Assigned(_)) {
        within();
    }
    second.close().await.expect("it leaves");
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_keeps_every_promise() {
    let prefix = format!("it-{}", SystemEnv::default().new_id());
    let mut own = None;
    // A foreign broker has Kafka's default for the shortest session.
    let (address, session) = match std::env::var("SIMULACRO_KAFKA") {
        Ok(address) => (address, Duration::from_secs(6)),
        Err(_) => match Broker::start(tempfile::tempdir().expect("a temporary folder")) {
            Ok(broker) => (own.insert(broker).address.clone(), Duration::from_secs(3)),
            Err(error) if std::env::var("CI").is_ok_and(|ci| ci == "true") => panic!("no Kafka, and CI=true: {error}"),
            Err(error) => {
                eprintln!("SKIPPED: Kafka was not tested: {error}");
                return;
            }
        },
    };
    let only = std::env::var("SIMULACRO_PROMISE").ok();
    let is_asked = |name: &str| only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    for (name, promise) in PROMISES.iter().filter(|(name, _)| is_asked(name)) {
        let begun = Instant::now();
        promise(world(&address, &prefix, session)).await;
        println!("{name}: {:?}", begun.elapsed());
    }
    if is_asked("a_compacted_topic_has_small_segments") {
        a_compacted_topic_has_small_segments(&address, &prefix).await;
    }
    if is_asked("a_member_survives_losing_what_it_has_not_taken_over") {
        a_member_survives_losing_what_it_has_not_taken_over(&address, &prefix, session).await;
    }
    match own {
        Some(mut broker) => {
            RESTART[0].1(world(&broker.address, &prefix, session)).await;
            broker.restart();
            RESTART[1].1(world(&broker.address, &prefix, session)).await;
            println!("{} and {}", RESTART[0].0, RESTART[1].0);
        }
        None => eprintln!("SKIPPED: a foreign broker is not restarted"),
    }
}
