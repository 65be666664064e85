//! The state machine behind a link in memory: it passes the suite of the port, and loses or doubles nothing when requests
//! and replies are lost.
#![expect(clippy::disallowed_methods, reason = "a test's clock is tokio's, paused")]

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use proptest::prelude::*;
use simulacro_core::ports::{
    Disposition, Env,
    event_log::{EventLog, OutRecord, TopicPartition, TopicSpec},
};
use simulacro_log::{
    Broker, Client, Code, Limits, Link, LinkError, Refusal, Request, Response, Settings, State,
    conformance::{PROMISES, RESTART, World},
};

/// A broker in this process on tokio's clock, and a way to it that loses what `fate` says.
#[derive(Debug)]
struct Direct {
    broker: Mutex<Broker>,
    start: tokio::time::Instant,
    calls: AtomicU64,
    /// By number of the call modulo its length: 0 arrives, 1 is lost on the way there, 2 on the way back.
    fate: Vec<u8>,
    version: tokio::sync::watch::Sender<u64>,
}

impl Direct {
    fn new(limits: Limits, state: State, fate: Vec<u8>) -> Arc<Self> {
        let (version, _) = tokio::sync::watch::channel(0);
        let broker = Mutex::new(Broker::new(limits, state));
        Arc::new(Self { broker, start: tokio::time::Instant::now(), calls: AtomicU64::new(0), fate, version })
    }
    fn now_ms(&self) -> i64 {
        1_700_000_000_000 + self.start.elapsed().as_millis() as i64
    }
}

#[async_trait]
impl Link for Direct {
    async fn call(&self, request: Request) -> Result<Response, LinkError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) as usize;
        let fate = if self.fate.is_empty() { 0 } else { self.fate[call % self.fate.len()] };
        let failed = |code| Refusal::new(code, "call the broker");
        if fate == 1 {
            return Err(LinkError::Unsent(failed(Code::NetworkException)));
        }
        let response = {
            let mut broker = self.broker.lock().expect("the broker");
            let response = broker.handle(self.now_ms(), request);
            self.version.send_if_modified(|v| std::mem::replace(v, broker.version()) != broker.version());
            response
        };
        if fate == 2 {
            return Err(LinkError::Lost(failed(Code::RequestTimedOut)));
        }
        response.map_err(LinkError::Refused)
    }
    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_millis(self.now_ms()).expect("a time")
    }
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn version(&self) -> u64 {
        *self.version.borrow()
    }
    async fn changed(&self, seen: u64, wait: Duration) {
        let mut versions = self.version.subscribe();
        let _ = tokio::time::timeout(wait, versions.wait_for(|v| *v != seen)).await;
    }
}

#[async_trait]
impl Env for Direct {
    fn now(&self) -> DateTime<Utc> {
        Link::now(self)
    }
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn random(&self) -> u64 {
        unreachable!("a broker draws nothing")
    }
    fn new_id(&self) -> String {
        unreachable!("the suite makes no ids")
    }
}

fn world(link: &Arc<Direct>) -> World {
    World {
        log: Arc::new(Client::new(link.clone(), Settings::KAFKA)),
        env: link.clone(),
        prefix: "it".into(),
        patience: Duration::from_secs(60),
        session: Duration::from_secs(2),
    }
}

#[tokio::test(start_paused = true)]
async fn the_state_machine_keeps_every_promise() {
    let link = Direct::new(Limits { compact_above: 20, ..Limits::KAFKA }, State::default(), Vec::new());
    for (name, promise) in PROMISES {
        println!("{name}");
        promise(world(&link)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn the_state_machine_keeps_every_promise_when_requests_and_replies_are_lost() {
    // One in ten requests and one in ten replies, without a rhythm that a loop could fall into.
    let fate = (0..997_u64).map(|i| match i * i % 97 % 10 {
        3 => 1,
        7 => 2,
        _ => 0,
    });
    let link = Direct::new(Limits::KAFKA, State::default(), fate.collect());
    for (name, promise) in PROMISES {
        println!("{name}");
        promise(world(&link)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn effects_rebuild_the_state() {
    let before = Direct::new(Limits { compact_above: 20, ..Limits::KAFKA }, State::default(), Vec::new());
    for (name, promise) in PROMISES.iter().chain(&RESTART[..1]) {
        println!("{name}");
        promise(world(&before)).await;
    }
    let rebuilt = {
        let mut rebuilt = State::default();
        let mut broker = before.broker.lock().expect("the broker");
        broker.take_effects().into_iter().for_each(|effect| rebuilt.apply(effect));
        assert_eq!(&rebuilt, broker.state());
        rebuilt
    };
    RESTART[1].1(world(&Direct::new(Limits::KAFKA, rebuilt, Vec::new()))).await;
}

#[tokio::test(start_paused = true)]
async fn a_hung_transaction_is_aborted_and_its_producer_fenced() {
    let link = Direct::new(Limits::KAFKA, State::default(), Vec::new());
    let log = Client::new(link.clone(), Settings::KAFKA);
    log.create_topic(&TopicSpec { name: "t".into(), partitions: 1, retention: None, compact: false }).await.expect("topic");
    let record = |value: &'static str| OutRecord {
        topic: "t".into(),
        partition: Some(0),
        key: None,
        value: Some(Bytes::from(value)),
        headers: Vec::new(),
    };
    let mut hung = log.producer(Some("p")).await.expect("producer");
    hung.begin().await.expect("begin");
    hung.send(vec![record("hung")]).await.expect("send");
    log.producer(None).await.expect("producer").send(vec![record("behind")]).await.expect("send");
    assert_eq!(log.offsets("t").await.expect("offsets")[&0], (0, 0));
    tokio::time::sleep(Settings::KAFKA.transaction_timeout + Duration::from_millis(1)).await;
    assert_eq!(log.offsets("t").await.expect("offsets")[&0], (0, 3));
    let error = hung.commit().await.expect_err("fenced");
    assert_eq!((error.code.as_deref(), error.disposition), (Some("INVALID_PRODUCER_EPOCH"), Disposition::Permanent));
}

#[tokio::test(start_paused = true)]
async fn a_full_log_refuses_and_recovers_with_retention() {
    let link = Direct::new(Limits { log_bytes_max: 10_000, ..Limits::KAFKA }, State::default(), Vec::new());
    let log = Client::new(link.clone(), Settings { retry_for: Duration::from_secs(1), ..Settings::KAFKA });
    let retention = Some(Duration::from_secs(60));
    log.create_topic(&TopicSpec { name: "t".into(), partitions: 1, retention, compact: false }).await.expect("topic");
    let record = || OutRecord {
        topic: "t".into(),
        partition: Some(0),
        key: None,
        value: Some(Bytes::from(vec![0; 900])),
        headers: Vec::new(),
    };
    let mut producer = log.producer(None).await.expect("producer");
    let mut kept = 0;
    let error = loop {
        match producer.send(vec![record()]).await {
            Ok(()) => kept += 1,
            Err(error) => break error,
        }
        assert!(kept < 100, "the log has a limit");
    };
    assert_eq!((error.code.as_deref(), error.disposition), (Some("KAFKA_STORAGE_ERROR"), Disposition::Retryable));
    assert!(kept >= 8, "{kept}");
    tokio::time::sleep(Duration::from_secs(61)).await;
    producer.send(vec![record()]).await.expect("there is room again");
}

#[tokio::test(start_paused = true)]
async fn compaction_keeps_offsets_and_bounds_the_log() {
    let link = Direct::new(Limits { compact_above: 20, tombstone_ms: 1_000, ..Limits::KAFKA }, State::default(), Vec::new());
    let log = Client::new(link.clone(), Settings::KAFKA);
    log.create_topic(&TopicSpec { name: "t".into(), partitions: 1, retention: None, compact: true }).await.expect("topic");
    let mut producer = log.producer(None).await.expect("producer");
    let keyed = |key: u64, value: Option<Bytes>| OutRecord {
        topic: "t".into(),
        partition: Some(0),
        key: Some(Bytes::from(key.to_be_bytes().to_vec())),
        value,
        headers: Vec::new(),
    };
    for i in 0..1_000_u64 {
        let value = (i >= 5).then(|| Bytes::from(i.to_be_bytes().to_vec()));
        producer.send(vec![keyed(i % 10 + if i < 5 { 100 } else { 0 }, value)]).await.expect("send");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let at = TopicPartition { topic: "t".into(), partition: 0 };
    let (records, next) = log.read(&at, 0, 10_000).await.expect("read");
    assert_eq!(next, 1_000);
    assert!(records.len() <= 2 * 10 + 20 + 1 + 10, "{} records of 10 keys", records.len());
    let newest: BTreeMap<_, _> = records.iter().map(|r| (r.key.clone(), (r.offset, r.value.clone()))).collect();
    assert_eq!(newest.len(), 10, "old tombstones are gone");
    for (offset, value) in newest.values() {
        assert_eq!(value.as_deref(), Some((*offset as u64).to_be_bytes().as_slice()), "a record keeps its offset");
    }
}

#[derive(Debug, Clone)]
enum Act {
    Send(u8, Vec<u8>),
    Commit,
    Abort,
    TakeOver,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..3_u8, prop::collection::vec(any::<u8>(), 1..4)).prop_map(|(p, values)| Act::Send(p, values)),
        1 => Just(Act::Commit),
        1 => Just(Act::Abort),
        1 => Just(Act::TakeOver),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Two transactional producers and a lossy link against a naive model: what committed is read, once, in order.
    #[test]
    fn what_committed_is_read_once(
        acts in prop::collection::vec((0..2_usize, act()), 1..60),
        fate in prop::collection::vec(prop_oneof![6 => Just(0_u8), 1 => Just(1), 1 => Just(2)], 1..20),
    ) {
        // A fate that never lets anything through proves nothing.
        prop_assume!(fate.contains(&0));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("runtime");
        runtime.block_on(async {
            let link = Direct::new(Limits::KAFKA, State::default(), fate);
            let log = Client::new(link.clone(), Settings { retry_for: Duration::from_secs(600), ..Settings::KAFKA });
            log.create_topic(&TopicSpec { name: "t".into(), partitions: 3, retention: None, compact: false }).await.expect("topic");
            let mut writers = Vec::new();
            let mut open: Vec<Vec<(u8, u8)>> = vec![Vec::new(), Vec::new()];
            for i in 0..2 {
                let mut writer = log.producer(Some(&format!("p{i}"))).await.expect("producer");
                writer.begin().await.expect("begin");
                writers.push(writer);
            }
            // Records of the two in one partition stand in the order of sending, each visible if its transaction committed.
            let mut sent: Vec<(usize, usize, u8, u8)> = Vec::new();
            let mut ordinal = [0_usize, 0];
            let mut committed = std::collections::BTreeSet::new();
            for (who, act) in acts {
                match act {
                    Act::Send(p, values) => {
                        let records = values.iter().map(|v| OutRecord {
                            topic: "t".into(),
                            partition: Some(i32::from(p)),
                            key: None,
                            value: Some(Bytes::from(vec![*v])),
                            headers: Vec::new(),
                        });
                        writers[who].send(records.collect()).await.expect("send");
                        sent.extend(values.iter().map(|v| (who, ordinal[who], p, *v)));
                        open[who].extend(values.iter().map(|v| (p, *v)));
                    }
                    Act::Commit => {
                        writers[who].commit().await.expect("commit");
                        committed.insert((who, ordinal[who]));
                        ordinal[who] += 1;
                        writers[who].begin().await.expect("begin");
                    }
                    Act::Abort => {
                        writers[who].abort().await.expect("abort");
                        ordinal[who] += 1;
                        writers[who].begin().await.expect("begin");
                    }
                    Act::TakeOver => {
                        writers[who] = log.producer(Some(&format!("p{who}"))).await.expect("producer");
                        ordinal[who] += 1;
                        writers[who].begin().await.expect("begin");
                    }
                }
            }
            for writer in &mut writers {
                writer.abort().await.expect("abort");
            }
            for p in 0..3_u8 {
                let at = TopicPartition { topic: "t".into(), partition: i32::from(p) };
                let (records, _) = log.read(&at, 0, 10_000).await.expect("read");
                let found: Vec<u8> = records.iter().map(|r| r.value.as_ref().expect("a value")[0]).collect();
                let expected: Vec<u8> =
                    sent.iter().filter(|(w, n, q, _)| *q == p && committed.contains(&(*w, *n))).map(|s| s.3).collect();
                assert_eq!(found, expected, "partition {p}");
            }
        });
    }
}
