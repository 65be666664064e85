//! The simulated broker: the state machine of the event log behind a direct link, with virtual latency and faults.
//!
//! A request waits for the latency, is carried out at once, and its reply waits again; waiting is [`Env::sleep`], so it is
//! virtual. Faults are data with a count of how often they fired. A fault never reaches into the client: it loses requests
//! and replies, or does to the broker what time, operators and disks do. What this leaves out: the network itself, which
//! is turmoil's, and several brokers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::ports::{Env, event_log::TopicPartition};
use simulacro_log::{Broker, Client, Code, Effect, Limits, Link, LinkError, Refusal, Request, Response, Settings, State};
use tokio::sync::watch;

/// Kinds of requests, as faults name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestKind {
    /// Topics, bounds, offsets and resets.
    Admin,
    /// Reading records, or where to begin.
    Fetch,
    /// Joining and leaving a group.
    Membership,
    /// The heartbeat of a member.
    Heartbeat,
    /// Making a producer.
    InitProducer,
    /// Appending records.
    Produce,
    /// Putting offsets into a transaction.
    TxnOffsets,
    /// Committing or aborting a transaction.
    EndTxn,
}

/// The kind of a request.
pub fn kind(request: &Request) -> RequestKind {
    match request {
        Request::CreateTopic(_)
        | Request::Bounds { .. }
        | Request::OffsetsAt { .. }
        | Request::Committed { .. }
        | Request::Reset { .. } => RequestKind::Admin,
        Request::Positions { .. } | Request::Fetch { .. } => RequestKind::Fetch,
        Request::Join { .. } | Request::Leave { .. } => RequestKind::Membership,
        Request::Heartbeat { .. } => RequestKind::Heartbeat,
        Request::InitProducer { .. } => RequestKind::InitProducer,
        Request::Produce { .. } => RequestKind::Produce,
        Request::TxnOffsets { .. } => RequestKind::TxnOffsets,
        Request::EndTxn { .. } => RequestKind::EndTxn,
    }
}

/// What goes wrong. Counts of requests begin at 1, when the fault is injected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum BrokerFault {
    /// No request arrives: `NETWORK_EXCEPTION`.
    Down {
        /// From, inclusive.
        from: DateTime<Utc>,
        /// To, exclusive.
        to: DateTime<Utc>,
    },
    /// Requests are carried out and their replies do not come: `REQUEST_TIMED_OUT`.
    LostReply {
        /// Of these requests.
        of: RequestKind,
        /// The first one that it hits.
        nth: u64,
        /// How many in a row.
        count: u64,
    },
    /// The broker's process is restarted: what it acknowledged stays, who was in which group is forgotten, and until it is
    /// back no request arrives.
    Restart {
        /// When it goes down, inclusive.
        at: DateTime<Utc>,
        /// When it is back, exclusive.
        to: DateTime<Utc>,
    },
    /// Requests are refused because the disk is full: `KAFKA_STORAGE_ERROR`.
    DiskFull {
        /// From, inclusive.
        from: DateTime<Utc>,
        /// To, exclusive.
        to: DateTime<Utc>,
    },
    /// The broker takes a member for dead, although it lives.
    SessionExpired {
        /// Group.
        group: String,
        /// Name of the member.
        member: String,
        /// When.
        at: DateTime<Utc>,
    },
    /// Retention takes all but the newest records of a partition.
    Retention {
        /// Topic.
        topic: String,
        /// Partition.
        partition: i32,
        /// How many offsets below the end are left.
        left: i64,
        /// When.
        at: DateTime<Utc>,
    },
}

/// A fault and how often it fired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Injected {
    /// The fault.
    pub fault: BrokerFault,
    /// How often it fired: requests it hit, or 1 for something that was done once.
    pub hits: u64,
    seen: u64,
}

/// What happened at the broker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Requests that were carried out.
    pub requests: u64,
    /// Transactions that were committed.
    pub commits: u64,
    /// Transactions that were aborted.
    pub aborts: u64,
    /// Transactions that were aborted because they took too long.
    pub expired: u64,
    /// Times that partitions were shared out anew.
    pub rebalances: u64,
    /// Times that an older producer was fenced by a newer one of the same name.
    pub fenced: u64,
    /// Restarts.
    pub restarts: u64,
}

#[derive(Debug)]
struct Inner {
    broker: Broker,
    faults: Vec<Injected>,
    tally: Tally,
}

/// A simulated broker, shared by the clients of all simulated processes.
#[derive(Debug)]
pub struct SimBroker {
    env: Arc<dyn Env>,
    latency: Duration,
    inner: Mutex<Inner>,
    version: watch::Sender<u64>,
}

/// What the faults have decided about a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Carried,
    Unsent,
    Refused,
    Lost,
}

impl Inner {
    /// Lets timed faults happen and tells what becomes of a request that arrives now.
    fn fate(&mut self, now: DateTime<Utc>, kind: RequestKind) -> Fate {
        let mut fate = Fate::Carried;
        for injected in &mut self.faults {
            let once = injected.hits == 0;
            match &injected.fault {
                BrokerFault::Down { from, to } if (*from..*to).contains(&now) => {
                    injected.hits += 1;
                    fate = Fate::Unsent;
                }
                BrokerFault::Restart { at, to } if *at <= now && (once || now < *to) => {
                    if once {
                        self.broker.forget_members();
                        self.tally.restarts += 1;
                    }
                    injected.hits += 1;
                    if now < *to {
                        fate = Fate::Unsent;
                    }
                }
                BrokerFault::DiskFull { from, to } if (*from..*to).contains(&now) && writes(kind) && fate == Fate::Carried => {
                    injected.hits += 1;
                    fate = Fate::Refused;
                }
                BrokerFault::LostReply { of, nth, count } if *of == kind && fate == Fate::Carried => {
                    injected.seen += 1;
                    if (*nth..nth.saturating_add(*count)).contains(&injected.seen) {
                        injected.hits += 1;
                        fate = Fate::Lost;
                    }
                }
                BrokerFault::SessionExpired { group, member, at } if *at <= now && once => {
                    injected.hits += u64::from(self.broker.expire_member(group, member));
                }
                BrokerFault::Retention { topic, partition, left, at } if *at <= now && once => {
                    let bounds = self.broker.handle(now.timestamp_millis(), Request::Bounds { topic: topic.clone() });
                    if let Ok(Response::Bounds(bounds)) = bounds
                        && let Some((start, end)) = bounds.get(partition)
                        && end - left > *start
                    {
                        self.broker.trim(&TopicPartition { topic: topic.clone(), partition: *partition }, end - left);
                        injected.hits = 1;
                    }
                }
                BrokerFault::Down { .. }
                | BrokerFault::Restart { .. }
                | BrokerFault::DiskFull { .. }
                | BrokerFault::LostReply { .. }
                | BrokerFault::SessionExpired { .. }
                | BrokerFault::Retention { .. } => {}
            }
        }
        fate
    }
}

impl Inner {
    /// Counts what a request has changed. The state is in memory here, and nothing else asks for the effects.
    fn count(&mut self) {
        self.tally.requests += 1;
        for effect in self.broker.take_effects() {
            let counter = match effect {
                Effect::TxnEnded { commit: true, .. } => &mut self.tally.commits,
                Effect::TxnEnded { commit: false, .. } => &mut self.tally.aborts,
                Effect::EpochRaised { .. } => &mut self.tally.expired,
                Effect::GenerationRaised { .. } => &mut self.tally.rebalances,
                Effect::ProducerMade { producer, .. } if producer.epoch > 0 => &mut self.tally.fenced,
                Effect::ProducerMade { .. }
                | Effect::TopicCreated(_)
                | Effect::Appended { .. }
                | Effect::OffsetsAdded { .. }
                | Effect::OffsetsSet { .. }
                | Effect::Trimmed { .. }
                | Effect::ProducersForgotten { .. }
                | Effect::Compacted { .. } => continue,
            };
            *counter += 1;
        }
    }
}

fn writes(kind: RequestKind) -> bool {
    match kind {
        RequestKind::Produce | RequestKind::TxnOffsets | RequestKind::EndTxn | RequestKind::InitProducer => true,
        RequestKind::Admin | RequestKind::Fetch | RequestKind::Membership | RequestKind::Heartbeat => false,
    }
}

impl SimBroker {
    /// An empty broker. `latency` is the time of one way.
    pub fn new(env: Arc<dyn Env>, limits: Limits, latency: Duration) -> Arc<Self> {
        let inner = Inner { broker: Broker::new(limits, State::default()), faults: Vec::new(), tally: Tally::default() };
        let (version, _) = watch::channel(0);
        Arc::new(Self { env, latency, inner: Mutex::new(inner), version })
    }

    /// A client of this broker: the event log of one simulated process.
    pub fn client(self: &Arc<Self>, settings: Settings) -> Client<Self> {
        Client::new(self.clone(), settings)
    }

    /// Adds a fault.
    pub fn inject(&self, fault: BrokerFault) {
        self.lock().faults.push(Injected { fault, hits: 0, seen: 0 });
    }

    /// The faults so far, with how often each fired.
    pub fn injected(&self) -> Vec<Injected> {
        self.lock().faults.clone()
    }

    /// How many requests of the faults' kinds were hit, by fault mode: the proof that they fired.
    pub fn hits(&self) -> BTreeMap<&'static str, u64> {
        let mut hits = BTreeMap::new();
        for injected in &self.lock().faults {
            let mode = match injected.fault {
                BrokerFault::Down { .. } => "down",
                BrokerFault::Restart { .. } => "restart",
                BrokerFault::LostReply { .. } => "lost_reply",
                BrokerFault::DiskFull { .. } => "disk_full",
                BrokerFault::SessionExpired { .. } => "session_expired",
                BrokerFault::Retention { .. } => "retention",
            };
            *hits.entry(mode).or_default() += injected.hits;
        }
        hits
    }

    /// The broker's durable state, for invariants that look behind the port.
    pub fn state(&self) -> State {
        self.lock().broker.state().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic elsewhere is what the run reports; the state is whole between two requests.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.lock().tally
    }

    /// How often the broker was restarted: a reply that was under way then is lost.
    pub fn restarts(&self) -> u64 {
        self.lock().tally.restarts
    }

    /// Carries a request out in spite of all faults, for those who judge.
    ///
    /// # Errors
    /// A refusal.
    pub fn peek(&self, request: Request) -> Result<Response, Refusal> {
        self.lock().broker.handle(self.env.now().timestamp_millis(), request)
    }

    /// Waits until the version differs from `seen`. Cancel-safe.
    pub async fn moved(&self, seen: u64) {
        // The sender lives as long as the broker does.
        let _ = self.version.subscribe().wait_for(|version| *version != seen).await;
    }

    /// Carries a request out, or does what the faults say, at once.
    ///
    /// # Errors
    /// A refusal, or a request or reply that a fault has lost.
    pub fn carry(&self, request: Request) -> Result<Response, LinkError> {
        let now = self.env.now();
        let mut inner = self.lock();
        let kind = kind(&request);
        let failed = |code| Refusal::new(code, format!("send {kind:?} to the broker"));
        let fate = inner.fate(now, kind);
        let response = match fate {
            Fate::Unsent => return Err(LinkError::Unsent(failed(Code::NetworkException))),
            Fate::Refused => return Err(LinkError::Refused(failed(Code::KafkaStorageError))),
            Fate::Carried | Fate::Lost => inner.broker.handle(now.timestamp_millis(), request),
        };
        inner.count();
        let version = inner.broker.version();
        self.version.send_if_modified(|seen| std::mem::replace(seen, version) != version);
        if fate == Fate::Lost {
            return Err(LinkError::Lost(failed(Code::RequestTimedOut)));
        }
        response.map_err(LinkError::Refused)
    }
}

#[async_trait]
impl Link for SimBroker {
    async fn call(&self, request: Request) -> Result<Response, LinkError> {
        self.env.sleep(self.latency).await;
        let response = self.carry(request);
        self.env.sleep(self.latency).await;
        response
    }
    fn now(&self) -> DateTime<Utc> {
        self.env.now()
    }
    async fn sleep(&self, duration: Duration) {
        self.env.sleep(duration).await;
    }
    fn version(&self) -> u64 {
        *self.version.borrow()
    }
    async fn changed(&self, seen: u64, wait: Duration) {
        tokio::select! {
            biased;
            () = self.moved(seen) => {}
            () = self.env.sleep(wait) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use simulacro_core::ports::{
        Disposition,
        event_log::{EventLog, GroupSpec, OutRecord, Polled, StartAt, TopicSpec},
    };
    use simulacro_log::conformance::{PROMISES, World};

    use super::*;

    /// tokio's paused clock: it jumps from timer to timer.
    #[derive(Debug)]
    struct Paused(tokio::time::Instant);

    #[async_trait]
    impl Env for Paused {
        fn now(&self) -> DateTime<Utc> {
            DateTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + self.0.elapsed()
        }
        #[expect(clippy::disallowed_methods, reason = "a test's Env; tokio's clock is virtual here")]
        async fn sleep(&self, duration: Duration) {
            tokio::time::sleep(duration).await;
        }
        fn random(&self) -> u64 {
            0
        }
        fn new_id(&self) -> String {
            unreachable!("a broker makes no ids")
        }
    }

    fn broker() -> (Arc<Paused>, Arc<SimBroker>) {
        let env = Arc::new(Paused(tokio::time::Instant::now()));
        (env.clone(), SimBroker::new(env, Limits::KAFKA, Duration::from_millis(2)))
    }

    fn record(value: &str) -> OutRecord {
        let value = Some(Bytes::from(value.to_owned()));
        OutRecord { topic: "t".into(), partition: Some(0), key: None, value, headers: Vec::new() }
    }

    async fn with_topic() -> (Arc<Paused>, Arc<SimBroker>, Client<SimBroker>) {
        let (env, broker) = broker();
        let log = broker.client(Settings::KAFKA);
        let spec = TopicSpec { name: "t".into(), partitions: 1, retention: None, compact: false };
        log.create_topic(&spec).await.expect("a topic");
        (env, broker, log)
    }

    fn partition() -> TopicPartition {
        TopicPartition { topic: "t".into(), partition: 0 }
    }

    async fn values(log: &Client<SimBroker>) -> Vec<String> {
        let (records, _) = log.read(&partition(), 0, 1_000).await.expect("the partition is read");
        records.iter().map(|r| String::from_utf8_lossy(r.value.as_deref().unwrap_or_default()).into_owned()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn the_simulated_broker_keeps_every_promise() {
        let (env, broker) = broker();
        for (name, promise) in PROMISES {
            println!("{name}");
            let log = Arc::new(broker.client(Settings::KAFKA));
            let (patience, session) = (Duration::from_secs(60), Duration::from_secs(2));
            promise(World { log, env: env.clone(), prefix: "sim".into(), patience, session }).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_lost_after_the_commit_neither_loses_nor_doubles() {
        let (_, broker, log) = with_topic().await;
        broker.inject(BrokerFault::LostReply { of: RequestKind::Produce, nth: 1, count: 2 });
        broker.inject(BrokerFault::LostReply { of: RequestKind::EndTxn, nth: 1, count: 1 });
        let mut producer = log.producer(Some("p")).await.expect("a producer");
        producer.begin().await.expect("begin");
        producer.send(vec![record("a"), record("b")]).await.expect("send");
        producer.commit().await.expect("commit");
        assert_eq!(values(&log).await, ["a", "b"]);
        assert_eq!(broker.hits(), BTreeMap::from([("lost_reply", 3)]));
    }

    #[tokio::test(start_paused = true)]
    async fn replies_lost_for_longer_than_the_retries_are_an_unknown_outcome() {
        let (_, broker, log) = with_topic().await;
        broker.inject(BrokerFault::LostReply { of: RequestKind::EndTxn, nth: 1, count: 100 });
        let mut producer = log.producer(Some("p")).await.expect("a producer");
        producer.begin().await.expect("begin");
        producer.send(vec![record("a")]).await.expect("send");
        let error = producer.commit().await.expect_err("no reply");
        assert_eq!((error.code.as_deref(), error.disposition), (Some("REQUEST_TIMED_OUT"), Disposition::Unknown));
        assert_eq!(values(&log).await, ["a"], "it had happened");
    }

    #[tokio::test(start_paused = true)]
    async fn a_window_down_is_survived_and_a_long_one_is_retryable() {
        let (env, broker, log) = with_topic().await;
        let mut plain = log.producer(None).await.expect("a producer");
        let from = env.now();
        broker.inject(BrokerFault::Down { from, to: from + Duration::from_secs(10) });
        plain.send(vec![record("a")]).await.expect("sent when it is back");
        assert!(env.now() >= from + Duration::from_secs(10));
        let from = env.now();
        broker.inject(BrokerFault::Down { from, to: from + Duration::from_secs(60) });
        let error = plain.send(vec![record("b")]).await.expect_err("down for longer");
        assert_eq!((error.code.as_deref(), error.disposition), (Some("NETWORK_EXCEPTION"), Disposition::Retryable));
        env.sleep(Duration::from_secs(60)).await;
        plain.send(vec![record("b")]).await.expect("the same call again");
        assert_eq!(values(&log).await, ["a", "b"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_expired_session_is_told_as_lost_and_retention_as_out_of_range() {
        let (env, broker, log) = with_topic().await;
        log.producer(None).await.expect("a producer").send(vec![record("a"), record("b"), record("c")]).await.expect("send");
        let spec = GroupSpec {
            group: "g".into(),
            member: "m".into(),
            topics: vec!["t".into()],
            start_at: StartAt::Earliest,
            session_timeout: Duration::from_secs(30),
        };
        let mut member = log.join(&spec).await.expect("join");
        let wait = Duration::from_secs(5);
        assert_eq!(member.poll(wait).await.expect("poll"), Polled::Assigned(vec![partition()]));
        assert!(matches!(member.poll(wait).await.expect("poll"), Polled::Records { records, .. } if records.len() == 3));
        broker.inject(BrokerFault::SessionExpired { group: "g".into(), member: "m".into(), at: env.now() });
        assert_eq!(member.poll(wait).await.expect("poll"), Polled::Lost(vec![partition()]));
        broker.inject(BrokerFault::Retention { topic: "t".into(), partition: 0, left: 1, at: env.now() });
        log.reset("other", &BTreeMap::from([(partition(), 0)])).await.expect("reset");
        let mut other = log.join(&GroupSpec { group: "other".into(), ..spec }).await.expect("join");
        assert_eq!(other.poll(wait).await.expect("poll"), Polled::Assigned(vec![partition()]));
        let error = other.poll(wait).await.expect_err("it is gone");
        assert_eq!((error.code.as_deref(), error.disposition), (Some("OFFSET_OUT_OF_RANGE"), Disposition::Permanent));
        assert_eq!(broker.hits(), BTreeMap::from([("session_expired", 1), ("retention", 1)]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_disk_is_told_at_once_and_nothing_is_kept() {
        let (env, broker, log) = with_topic().await;
        let mut plain = log.producer(None).await.expect("a producer");
        let from = env.now();
        broker.inject(BrokerFault::DiskFull { from, to: from + Duration::from_secs(10) });
        let error = plain.send(vec![record("a")]).await.expect_err("full");
        assert_eq!((error.code.as_deref(), error.disposition), (Some("KAFKA_STORAGE_ERROR"), Disposition::Retryable));
        assert!(env.now() < from + Duration::from_secs(1));
        env.sleep(Duration::from_secs(10)).await;
        plain.send(vec![record("a")]).await.expect("there is room again");
        assert_eq!(values(&log).await, ["a"]);
    }
}
