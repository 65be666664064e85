//! The suite that every adapter of the event log passes: its functions are the port's contract, made to run.
//!
//! A function takes a [`World`] and panics when a promise is broken. It makes topics and groups of its own, so that many
//! may share one broker. [`PROMISES`] lists them; the two of [`RESTART`] stand on either side of a restart.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use simulacro_core::ports::{
    Disposition, Env, PortError,
    event_log::{EventLog, GroupConsumer, GroupSpec, LogRecord, OutRecord, Polled, Producer, StartAt, TopicPartition, TopicSpec},
};

use crate::partitioner::partition_of;

/// An adapter under test.
#[derive(Debug, Clone)]
pub struct World {
    /// The adapter.
    pub log: Arc<dyn EventLog>,
    /// Its clock.
    pub env: Arc<dyn Env>,
    /// Put before the names of topics, groups and producers.
    pub prefix: String,
    /// Longest wait for something that must happen.
    pub patience: Duration,
    /// Session timeout of members.
    pub session: Duration,
}

/// A promise, ready to run.
pub type Promise = fn(World) -> Pin<Box<dyn Future<Output = ()> + Send>>;

macro_rules! promises {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), |world| Box::pin(async move { $name(&world).await }))),*] };
}

/// Each promise with its name, in reading order.
pub const PROMISES: &[(&str, Promise)] = promises![
    a_topic_is_created_once,
    records_keep_their_order_and_content,
    a_key_decides_the_partition_as_in_kafka,
    a_transaction_is_visible_whole_or_not_at_all,
    an_aborted_transaction_is_never_seen,
    a_transaction_in_the_wrong_order_is_refused,
    offsets_commit_with_their_transaction,
    a_zombie_producer_is_fenced,
    a_rebalance_moves_partitions_without_loss_or_duplicates,
    a_silent_member_loses_its_partitions,
    offsets_of_an_older_generation_are_refused,
    a_new_owner_waits_for_an_open_transaction,
    a_group_begins_where_it_was_told,
    pause_and_seek_move_one_partition_only,
    an_offset_that_is_gone_is_an_error,
    offsets_at_finds_the_first_record_of_a_time,
    the_newest_value_of_a_key_is_kept,
    a_too_large_record_is_refused_and_nothing_is_kept,
    only_an_empty_group_is_reset,
];

/// What is done before a restart, and what must be found after it.
pub const RESTART: [(&str, Promise); 2] = {
    const BOTH: &[(&str, Promise)] = promises![before_a_restart, after_a_restart];
    [BOTH[0], BOTH[1]]
};

impl World {
    fn name(&self, of: &str) -> String {
        format!("{}.{of}", self.prefix)
    }

    async fn topic(&self, name: &str, partitions: i32) -> String {
        let spec = TopicSpec { name: self.name(name), partitions, retention: None, compact: false };
        self.log.create_topic(&spec).await.expect("the topic is created");
        spec.name
    }

    async fn producer(&self, id: &str) -> Box<dyn Producer> {
        self.log.producer(Some(&self.name(id))).await.expect("a producer is made")
    }

    async fn send(&self, records: Vec<OutRecord>) {
        let mut producer = self.log.producer(None).await.expect("a producer is made");
        producer.send(records).await.expect("records are sent");
    }

    fn group(&self, group: &str, member: &str, topic: &str) -> GroupSpec {
        GroupSpec {
            group: self.name(group),
            member: self.name(member),
            topics: vec![topic.to_owned()],
            start_at: StartAt::Earliest,
            session_timeout: self.session,
        }
    }

    async fn join(&self, spec: &GroupSpec) -> Box<dyn GroupConsumer> {
        self.log.join(spec).await.expect("the member joins")
    }

    /// Everything that is committed now.
    async fn read_all(&self, partition: &TopicPartition) -> Vec<LogRecord> {
        let bounds = || async { self.log.offsets(&partition.topic).await.expect("the topic is there")[&partition.partition] };
        let mut offset = bounds().await.0;
        let mut all = Vec::new();
        // The end may move meanwhile, and a transaction is read whole then.
        while offset < bounds().await.1 {
            let (records, next) = self.log.read(partition, offset, 7).await.expect("the partition is read");
            assert!(records.len() <= 7, "no more than asked for");
            assert!(next > offset, "reading at {offset} goes on");
            assert!(records.iter().all(|r| (offset..next).contains(&r.offset)), "offsets lie in what was read");
            offset = next;
            all.extend(records);
        }
        all
    }

    /// Reads until a commit has become visible: `before` it, nothing else than that is seen.
    async fn becomes(&self, partition: &TopicPartition, before: &[&str], after: &[&str]) {
        let seen = || async {
            let seen = texts(&self.read_all(partition).await);
            assert!(seen == after || seen == before, "{seen:?} is neither {before:?} nor {after:?}");
            (seen == after).then_some(())
        };
        self.until("a commit becomes visible", seen).await;
    }

    /// Asks again until the answer is there.
    async fn until<T, F: Future<Output = Option<T>>>(&self, what: &str, mut ask: impl FnMut() -> F) -> T {
        let deadline = self.env.now() + self.patience;
        loop {
            if let Some(found) = ask().await {
                return found;
            }
            assert!(self.env.now() < deadline, "{what}: not within {:?}", self.patience);
            self.env.sleep(Duration::from_millis(50)).await;
        }
    }

    /// Polls until `done` has an answer.
    async fn poll<T>(&self, member: &mut dyn GroupConsumer, what: &str, mut done: impl FnMut(Polled) -> Option<T>) -> T {
        let deadline = self.env.now() + self.patience;
        loop {
            let polled = member.poll(Duration::from_millis(100)).await.unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
            if let Some(found) = done(polled) {
                return found;
            }
            assert!(self.env.now() < deadline, "{what}: not within {:?}", self.patience);
        }
    }

    /// Polls until `n` records were read; their values as text, with their offsets.
    async fn values(&self, member: &mut dyn GroupConsumer, n: usize) -> Vec<(i64, String)> {
        let mut values = Vec::new();
        self.poll(member, &format!("{n} records"), |polled| {
            if let Polled::Records { records, .. } = polled {
                values.extend(records.iter().map(|r| (r.offset, text(r))));
            }
            (values.len() >= n).then_some(())
        })
        .await;
        values
    }
}

fn at(topic: &str, partition: i32) -> TopicPartition {
    TopicPartition { topic: topic.to_owned(), partition }
}

fn record(topic: &str, partition: i32, value: impl ToString) -> OutRecord {
    let value = Some(Bytes::from(value.to_string()));
    OutRecord { topic: topic.to_owned(), partition: Some(partition), key: None, value, headers: Vec::new() }
}

fn text(record: &LogRecord) -> String {
    String::from_utf8_lossy(record.value.as_deref().unwrap_or_default()).into_owned()
}

fn texts(records: &[LogRecord]) -> Vec<String> {
    records.iter().map(text).collect()
}

fn fails<T: std::fmt::Debug>(result: Result<T, PortError>, codes: &[&str], disposition: Disposition) {
    let error = result.expect_err("the call is refused");
    let code = error.code.clone().unwrap_or_default();
    assert!(codes.contains(&code.as_str()), "one of {codes:?}, not {}", error.chain());
    assert_eq!(error.disposition, disposition, "{}", error.chain());
}

/// What a member is told when it is not of the present generation: not of it, not in the group, or replaced.
const NOT_OF_THE_GENERATION: &[&str] = &["ILLEGAL_GENERATION", "UNKNOWN_MEMBER_ID", "FENCED_INSTANCE_ID"];

/// Creating an equal topic again is no error; another number of partitions is one; an unknown topic has a code.
pub async fn a_topic_is_created_once(world: &World) {
    let topic = world.topic("created", 3).await;
    assert_eq!(world.topic("created", 3).await, topic);
    let bounds = world.log.offsets(&topic).await.expect("the topic is there");
    assert_eq!(bounds, (0..3).map(|p| (p, (0, 0))).collect());
    let other = TopicSpec { name: topic, partitions: 4, retention: None, compact: false };
    fails(world.log.create_topic(&other).await, &["TOPIC_ALREADY_EXISTS"], Disposition::Permanent);
    let unknown = world.name("unknown");
    fails(world.log.offsets(&unknown).await, &["UNKNOWN_TOPIC_OR_PARTITION"], Disposition::Permanent);
    fails(world.log.join(&world.group("g", "m", &unknown)).await, &["UNKNOWN_TOPIC_OR_PARTITION"], Disposition::Permanent);
}

/// Records of a partition come back in order, with key, value, headers and a time; a tombstone stays one.
pub async fn records_keep_their_order_and_content(world: &World) {
    let topic = world.topic("order", 2).await;
    let before = world.env.now().timestamp_millis();
    let mut sent: BTreeMap<i32, Vec<OutRecord>> = BTreeMap::new();
    let mut producer = world.log.producer(None).await.expect("a producer is made");
    for call in 0..3 {
        let mut records = Vec::new();
        for i in 0..50 {
            let key = (i % 3 > 0).then(|| Bytes::from(format!("k{i}")));
            // A tombstone and an empty value are two things.
            let value = (i % 7 > 0).then(|| if i % 7 == 1 { Bytes::new() } else { Bytes::from(format!("{call}/{i}")) });
            let headers = (0..i % 4).map(|h| (format!("h{h}"), Bytes::from(vec![h as u8, 0, 255]))).collect();
            records.push(OutRecord { topic: topic.clone(), partition: Some(i % 2), key, value, headers });
        }
        for r in &records {
            sent.entry(r.partition.unwrap_or_default()).or_default().push(r.clone());
        }
        producer.send(records).await.expect("records are sent");
    }
    let after = world.env.now().timestamp_millis();
    for (partition, sent) in sent {
        let found = world.read_all(&at(&topic, partition)).await;
        let end = world.log.offsets(&topic).await.expect("the topic is there")[&partition].1;
        let nothing = world.log.read(&at(&topic, partition), end, 10).await.expect("the end is a position");
        assert_eq!(nothing, (Vec::new(), end));
        assert_eq!(found.len(), sent.len());
        assert!(found.windows(2).all(|w| w[0].offset < w[1].offset), "offsets rise");
        for (found, sent) in found.iter().zip(&sent) {
            assert_eq!((&found.key, &found.value, &found.headers), (&sent.key, &sent.value, &sent.headers));
            assert!((before..=after).contains(&found.appended_ms), "{before} <= {} <= {after}", found.appended_ms);
        }
    }
}

/// A key without a partition goes where Kafka's own clients send it, everything else of its key too.
pub async fn a_key_decides_the_partition_as_in_kafka(world: &World) {
    let topic = world.topic("keys", 5).await;
    let keys: Vec<_> = (0..40).map(|i| format!("user-{i}")).collect();
    let keyed = |key: &String| OutRecord { partition: None, key: Some(Bytes::from(key.clone())), ..record(&topic, 0, key) };
    world.send(keys.iter().map(keyed).collect()).await;
    for partition in 0..5 {
        let found: BTreeSet<_> = texts(&world.read_all(&at(&topic, partition)).await).into_iter().collect();
        let expected: BTreeSet<_> = keys.iter().filter(|k| partition_of(k.as_bytes(), 5) == partition).cloned().collect();
        assert_eq!(found, expected, "partition {partition}");
    }
}

/// Before the commit nothing of a transaction is seen, in no partition; after it everything is.
pub async fn a_transaction_is_visible_whole_or_not_at_all(world: &World) {
    let topic = world.topic("atomic", 2).await;
    world.send(vec![record(&topic, 0, "before")]).await;
    let mut producer = world.producer("atomic").await;
    producer.begin().await.expect("a transaction begins");
    producer.send((0..20).map(|i| record(&topic, i % 2, i)).collect()).await.expect("records are accepted");
    // A record behind an open transaction waits for it, so that what was read is never overtaken.
    world.send(vec![record(&topic, 0, "behind")]).await;
    assert_eq!(texts(&world.read_all(&at(&topic, 0)).await), ["before"]);
    assert_eq!(texts(&world.read_all(&at(&topic, 1)).await), Vec::<String>::new());
    assert_eq!(world.log.offsets(&topic).await.expect("the topic is there"), BTreeMap::from([(0, (0, 1)), (1, (0, 0))]));
    producer.commit().await.expect("the transaction commits");
    let even = ["before", "0", "2", "4", "6", "8", "10", "12", "14", "16", "18", "behind"];
    world.becomes(&at(&topic, 0), &["before"], &even).await;
    world.becomes(&at(&topic, 1), &[], &["1", "3", "5", "7", "9", "11", "13", "15", "17", "19"]).await;
}

/// Records of an aborted transaction are never seen, and do not hold up what follows.
pub async fn an_aborted_transaction_is_never_seen(world: &World) {
    let topic = world.topic("aborted", 1).await;
    let mut producer = world.producer("aborted").await;
    for (value, commit) in [("a", false), ("b", true), ("c", false), ("d", true), ("e", false)] {
        producer.begin().await.expect("a transaction begins");
        producer.send(vec![record(&topic, 0, value), record(&topic, 0, value)]).await.expect("records are accepted");
        if commit { producer.commit().await } else { producer.abort().await }.expect("the transaction ends");
    }
    producer.abort().await.expect("an abort of nothing is no error");
    world.becomes(&at(&topic, 0), &["b", "b"], &["b", "b", "d", "d"]).await;
    // A group sees the same, and is told that it has caught up although markers lie behind the last record.
    let mut member = world.join(&world.group("aborted", "m", &topic)).await;
    let mut seen = Vec::new();
    world
        .poll(member.as_mut(), "the end", |polled| {
            let Polled::Records { records, next_offset, end_offset, .. } = polled else { return None };
            seen.extend(texts(&records));
            (next_offset == end_offset).then_some(())
        })
        .await;
    assert_eq!(seen, ["b", "b", "d", "d"]);
    member.close().await.expect("the member leaves");
}

/// The order of calls is checked: begin, send, end.
pub async fn a_transaction_in_the_wrong_order_is_refused(world: &World) {
    let topic = world.topic("phases", 1).await;
    let mut producer = world.producer("phases").await;
    let wrong = ["INVALID_TXN_STATE"];
    fails(producer.send(vec![record(&topic, 0, "x")]).await, &wrong, Disposition::Permanent);
    fails(producer.commit().await, &wrong, Disposition::Permanent);
    producer.begin().await.expect("a transaction begins");
    fails(producer.begin().await, &wrong, Disposition::Permanent);
    producer.commit().await.expect("an empty transaction commits");
    let mut plain = world.log.producer(None).await.expect("a producer is made");
    fails(plain.begin().await, &wrong, Disposition::Permanent);
    assert!(world.read_all(&at(&topic, 0)).await.is_empty());
}

/// A group's offsets move when the transaction commits, and not when it is aborted or open.
pub async fn offsets_commit_with_their_transaction(world: &World) {
    let topic = world.topic("offsets", 1).await;
    world.send((0..10).map(|i| record(&topic, 0, i)).collect()).await;
    let spec = world.group("offsets", "m", &topic);
    let mut member = world.join(&spec).await;
    assert_eq!(world.values(member.as_mut(), 10).await.len(), 10);
    let committed = || async { world.log.committed(&spec.group, &topic).await.expect("the group is asked") };
    assert_eq!(committed().await, BTreeMap::new(), "a group that has committed nothing");
    let mut producer = world.producer("offsets").await;
    for (offset, commit, expected) in [(3, false, None), (5, true, Some(5)), (9, false, Some(5)), (10, true, Some(10))] {
        producer.begin().await.expect("a transaction begins");
        let offsets = BTreeMap::from([(at(&topic, 0), offset)]);
        producer.send_offsets(&offsets, &member.metadata()).await.expect("offsets are accepted");
        // Who asks now is not told something that may be old in a moment.
        let early = tokio::select! {
            biased;
            early = committed() => Some(early),
            () = world.env.sleep(Duration::from_millis(300)) => None,
        };
        assert_eq!(early, None, "the answer waits for the end of the transaction");
        if commit { producer.commit().await } else { producer.abort().await }.expect("the transaction ends");
        assert_eq!(committed().await, expected.map(|o| (0, o)).into_iter().collect());
    }
    member.close().await.expect("the member leaves");
    world.send(vec![record(&topic, 0, "next")]).await;
    let mut again = world.join(&spec).await;
    assert_eq!(world.values(again.as_mut(), 1).await, [(10, "next".to_owned())]);
    again.close().await.expect("the member leaves");
}

/// A second producer of an id takes over: the first one's open transaction is thrown away and it can do nothing more.
pub async fn a_zombie_producer_is_fenced(world: &World) {
    let topic = world.topic("zombie", 1).await;
    let mut zombie = world.producer("zombie").await;
    zombie.begin().await.expect("a transaction begins");
    zombie.send(vec![record(&topic, 0, "zombie")]).await.expect("records are accepted");
    let mut heir = world.producer("zombie").await;
    heir.begin().await.expect("a transaction begins");
    heir.send(vec![record(&topic, 0, "heir")]).await.expect("records are accepted");
    fails(zombie.commit().await, &["INVALID_PRODUCER_EPOCH"], Disposition::Permanent);
    fails(zombie.begin().await, &["INVALID_PRODUCER_EPOCH"], Disposition::Permanent);
    heir.commit().await.expect("the heir commits");
    world.becomes(&at(&topic, 0), &[], &["heir"]).await;
    // The same for one that is in the middle of sending.
    let mut sending = heir;
    sending.begin().await.expect("a transaction begins");
    sending.send(vec![record(&topic, 0, "first")]).await.expect("records are accepted");
    world.producer("zombie").await;
    fails(sending.send(vec![record(&topic, 0, "second")]).await, &["INVALID_PRODUCER_EPOCH"], Disposition::Permanent);
    fails(sending.abort().await, &["INVALID_PRODUCER_EPOCH"], Disposition::Permanent);
    assert_eq!(texts(&world.read_all(&at(&topic, 0)).await), ["heir"]);
}

/// Copies records in transactions, as the streaming job does.
struct Copier {
    member: Box<dyn GroupConsumer>,
    producer: Box<dyn Producer>,
    owned: BTreeSet<TopicPartition>,
    leaving: BTreeSet<TopicPartition>,
    moved: usize,
}

impl Copier {
    async fn step(&mut self, world: &World, out: &str) {
        let polled = self.member.poll(Duration::from_millis(20)).await.unwrap_or_else(|e| panic!("poll: {}", e.chain()));
        for partition in std::mem::take(&mut self.leaving) {
            self.owned.remove(&partition);
        }
        match polled {
            Polled::Nothing => {}
            Polled::Assigned(partitions) => {
                self.moved += partitions.len();
                self.owned.extend(partitions);
            }
            Polled::Revoked(partitions) => self.leaving.extend(partitions),
            Polled::Lost(partitions) => self.owned.retain(|p| !partitions.contains(p)),
            Polled::Records { partition, records, next_offset, .. } => {
                assert!(self.owned.contains(&partition), "records of an owned partition only");
                if records.is_empty() {
                    return;
                }
                self.producer.begin().await.expect("a transaction begins");
                let copies = records.iter().map(|r| record(out, partition.partition, text(r))).collect();
                self.producer.send(copies).await.expect("records are accepted");
                let offsets = BTreeMap::from([(partition.clone(), next_offset)]);
                match self.producer.send_offsets(&offsets, &self.member.metadata()).await {
                    Ok(()) => self.producer.commit().await.expect("the transaction commits"),
                    Err(error) => {
                        // The generation has changed meanwhile: nothing of this happened, so read it again.
                        assert_eq!(error.disposition, Disposition::Unknown, "{}", error.chain());
                        self.producer.abort().await.expect("the transaction is aborted");
                        let committed = world.log.committed(&self.member.metadata().group, &partition.topic).await;
                        let offset = committed.expect("the group is asked").get(&partition.partition).copied().unwrap_or(0);
                        self.member.seek(&partition, offset).await.expect("the position moves back");
                    }
                }
            }
        }
    }
}

/// Members come and go while records are copied: each record is copied once, and no partition has two owners.
pub async fn a_rebalance_moves_partitions_without_loss_or_duplicates(world: &World) {
    let (topic, out) = (world.topic("moves", 6).await, world.topic("moves-out", 6).await);
    let mut sent = 0;
    let mut source = world.log.producer(None).await.expect("a producer is made");
    let mut copiers: BTreeMap<&str, Copier> = BTreeMap::new();
    let deadline = world.env.now() + world.patience * 3;
    // Each act: who is there, and how many partitions each must then own.
    for (members, share) in [(vec!["a"], 6), (vec!["a", "b"], 3), (vec!["a", "b", "c"], 2), (vec!["b", "c"], 3), (vec!["c"], 6)] {
        for name in members.iter().filter(|name| !copiers.contains_key(*name)).copied().collect::<Vec<_>>() {
            let member = world.join(&world.group("moves", name, &topic)).await;
            let producer = world.producer(&format!("moves-{name}")).await;
            copiers.insert(name, Copier { member, producer, owned: BTreeSet::new(), leaving: BTreeSet::new(), moved: 0 });
        }
        for name in copiers.keys().filter(|name| !members.contains(name)).copied().collect::<Vec<_>>() {
            let mut gone = copiers.remove(name).expect("a member");
            gone.member.close().await.expect("the member leaves");
        }
        let mut turns = 0;
        while turns < 5 || copiers.values().any(|c| c.owned.len() != share || !c.leaving.is_empty()) {
            assert!(world.env.now() < deadline, "{members:?} own {share} each: not in time");
            let records = (0..6).map(|p| record(&topic, p, format!("{p}/{sent}"))).collect();
            source.send(records).await.expect("records are sent");
            sent += 1;
            turns += 1;
            // Records never run out here, so that a virtual clock would stand still.
            world.env.sleep(Duration::from_millis(20)).await;
            for copier in copiers.values_mut() {
                copier.step(world, &out).await;
            }
            let owned: Vec<_> = copiers.values().flat_map(|c| c.owned.iter()).collect();
            assert_eq!(owned.len(), owned.iter().collect::<BTreeSet<_>>().len(), "no partition has two owners");
        }
    }
    let last = copiers.get_mut("c").expect("the last member");
    loop {
        let mut copied = BTreeMap::new();
        for partition in 0..6 {
            copied.insert(partition, texts(&world.read_all(&at(&out, partition)).await));
        }
        let expected: BTreeMap<_, Vec<_>> = (0..6).map(|p| (p, (0..sent).map(|i| format!("{p}/{i}")).collect())).collect();
        if copied == expected {
            break;
        }
        for (partition, copied) in &copied {
            let expected = &expected[partition];
            assert!(expected.starts_with(copied), "partition {partition}: once each, in order, not {copied:?}");
        }
        assert!(world.env.now() < deadline, "everything is copied in time");
        for _ in 0..20 {
            last.step(world, &out).await;
        }
    }
    // Cooperative: `b` kept what it had when `c` came and `a` went.
    assert!(last.moved <= 6, "{} partitions moved to a member that ends with 6", last.moved);
    last.member.close().await.expect("the member leaves");
}

/// A member that does not poll for a session is out: its partitions go to others, its offsets are refused, and its next
/// polls tell it so.
pub async fn a_silent_member_loses_its_partitions(world: &World) {
    let topic = world.topic("silent", 1).await;
    world.send((0..4).map(|i| record(&topic, 0, i)).collect()).await;
    let mut silent = world.join(&world.group("silent", "a", &topic)).await;
    assert_eq!(world.values(silent.as_mut(), 4).await.len(), 4);
    let before = silent.metadata();
    let mut producer = world.producer("silent").await;
    producer.begin().await.expect("a transaction begins");
    let mut other = world.join(&world.group("silent", "b", &topic)).await;
    // Nobody has committed, so the other one reads everything again.
    assert_eq!(world.values(other.as_mut(), 4).await.len(), 4);
    let offsets = BTreeMap::from([(at(&topic, 0), 4)]);
    fails(producer.send_offsets(&offsets, &before).await, NOT_OF_THE_GENERATION, Disposition::Unknown);
    producer.abort().await.expect("the transaction is aborted");
    assert_eq!(world.log.committed(&before.group, &topic).await.expect("the group is asked"), BTreeMap::new());
    let what = "the silent member is told that its partition is lost";
    world.poll(silent.as_mut(), what, |polled| (polled == Polled::Lost(vec![at(&topic, 0)])).then_some(())).await;
    other.close().await.expect("the member leaves");
    silent.close().await.expect("the member leaves");
}

/// Offsets are accepted with the present generation only.
pub async fn offsets_of_an_older_generation_are_refused(world: &World) {
    let topic = world.topic("generation", 2).await;
    world.send((0..4).map(|i| record(&topic, i % 2, i)).collect()).await;
    let mut first = world.join(&world.group("generation", "a", &topic)).await;
    world.values(first.as_mut(), 4).await;
    let before = first.metadata();
    let mut second = world.join(&world.group("generation", "b", &topic)).await;
    let deadline = world.env.now() + world.patience;
    let mut moved = false;
    while !moved {
        assert!(world.env.now() < deadline, "a partition moves in time");
        first.poll(Duration::from_millis(50)).await.expect("a poll works");
        moved =
            matches!(second.poll(Duration::from_millis(50)).await.expect("a poll works"), Polled::Assigned(p) if !p.is_empty());
    }
    // The move is over for `a` too once it has polled again.
    for _ in 0..4 {
        first.poll(Duration::from_millis(50)).await.expect("a poll works");
    }
    assert!(first.metadata().generation > before.generation, "{:?} after {before:?}", first.metadata());
    let mut producer = world.producer("generation").await;
    let offsets = BTreeMap::from([(at(&topic, 0), 2)]);
    producer.begin().await.expect("a transaction begins");
    fails(producer.send_offsets(&offsets, &before).await, NOT_OF_THE_GENERATION, Disposition::Unknown);
    producer.abort().await.expect("the transaction is aborted");
    assert_eq!(world.log.committed(&before.group, &topic).await.expect("the group is asked"), BTreeMap::new());
    producer.begin().await.expect("a transaction begins");
    producer.send_offsets(&offsets, &first.metadata()).await.expect("the present generation is accepted");
    producer.commit().await.expect("the transaction commits");
    assert_eq!(world.log.committed(&before.group, &topic).await.expect("the group is asked"), BTreeMap::from([(0, 2)]));
    first.close().await.expect("the member leaves");
    second.close().await.expect("the member leaves");
}

/// A partition whose offsets lie in somebody's open transaction is read by nobody until that has ended.
pub async fn a_new_owner_waits_for_an_open_transaction(world: &World) {
    let topic = world.topic("unstable", 1).await;
    world.send((0..4).map(|i| record(&topic, 0, i)).collect()).await;
    let mut first = world.join(&world.group("unstable", "a", &topic)).await;
    world.values(first.as_mut(), 4).await;
    let mut producer = world.producer("unstable").await;
    producer.begin().await.expect("a transaction begins");
    let offsets = BTreeMap::from([(at(&topic, 0), 3)]);
    producer.send_offsets(&offsets, &first.metadata()).await.expect("offsets are accepted");
    first.close().await.expect("the member leaves");
    let mut second = world.join(&world.group("unstable", "b", &topic)).await;
    for _ in 0..10 {
        let polled = second.poll(Duration::from_millis(100)).await.expect("a poll works");
        assert!(!matches!(polled, Polled::Records { .. }), "nothing is read before the transaction has ended: {polled:?}");
    }
    producer.commit().await.expect("the transaction commits");
    assert_eq!(world.values(second.as_mut(), 1).await, [(3, "3".to_owned())]);
    second.close().await.expect("the member leaves");
}

/// Without a committed offset a group begins at the oldest record, or at the end when that was asked for.
pub async fn a_group_begins_where_it_was_told(world: &World) {
    let topic = world.topic("start", 1).await;
    world.send(vec![record(&topic, 0, "old")]).await;
    let mut latest = world.join(&GroupSpec { start_at: StartAt::Latest, ..world.group("start-latest", "a", &topic) }).await;
    world
        .poll(latest.as_mut(), "the end", |polled| match polled {
            Polled::Records { records, next_offset, end_offset, .. } => {
                assert!(records.is_empty(), "nothing old is read: {records:?}");
                (next_offset == end_offset).then_some(())
            }
            Polled::Nothing | Polled::Assigned(_) | Polled::Revoked(_) | Polled::Lost(_) => None,
        })
        .await;
    world.send(vec![record(&topic, 0, "new")]).await;
    assert_eq!(world.values(latest.as_mut(), 1).await, [(1, "new".to_owned())]);
    let mut earliest = world.join(&world.group("start-earliest", "a", &topic)).await;
    assert_eq!(world.values(earliest.as_mut(), 2).await, [(0, "old".to_owned()), (1, "new".to_owned())]);
    latest.close().await.expect("the member leaves");
    earliest.close().await.expect("the member leaves");
}

/// A paused partition brings no records while the others do; a seek moves one partition.
pub async fn pause_and_seek_move_one_partition_only(world: &World) {
    let topic = world.topic("pause", 2).await;
    let mut member = world.join(&world.group("pause", "a", &topic)).await;
    let mut assigned = BTreeSet::new();
    world
        .poll(member.as_mut(), "both partitions", |polled| {
            if let Polled::Assigned(partitions) = polled {
                assigned.extend(partitions);
            }
            (assigned.len() == 2).then_some(())
        })
        .await;
    member.pause(&[at(&topic, 0)]).await.expect("a partition is paused");
    member.pause(&[at(&topic, 0)]).await.expect("a second time is no error");
    world.send((0..20).map(|i| record(&topic, i % 2, i)).collect()).await;
    let odd: Vec<_> = (0..10).map(|i| (i, (2 * i + 1).to_string())).collect();
    assert_eq!(world.values(member.as_mut(), 10).await, odd);
    for _ in 0..5 {
        let polled = member.poll(Duration::from_millis(50)).await.expect("a poll works");
        assert!(!matches!(&polled, Polled::Records { records, .. } if !records.is_empty()), "{polled:?} while paused");
    }
    member.resume(&[at(&topic, 0)]).await.expect("it goes on");
    let even: Vec<_> = (0..10).map(|i| (i, (2 * i).to_string())).collect();
    assert_eq!(world.values(member.as_mut(), 10).await, even);
    member.seek(&at(&topic, 1), 7).await.expect("the position moves");
    assert_eq!(world.values(member.as_mut(), 3).await, odd[7..]);
    member.seek(&at(&topic, 0), 0).await.expect("the position moves to the beginning");
    assert_eq!(world.values(member.as_mut(), 10).await, even);
    member.close().await.expect("the member leaves");
}

/// A position that retention has passed is an error each time, and never a silent jump.
pub async fn an_offset_that_is_gone_is_an_error(world: &World) {
    let retention = Some(Duration::from_secs(1));
    let spec = TopicSpec { name: world.name("gone"), partitions: 1, retention, compact: false };
    world.log.create_topic(&spec).await.expect("the topic is created");
    let (topic, gone) = (spec.name, ["OFFSET_OUT_OF_RANGE"]);
    world.send((0..5).map(|i| record(&topic, 0, i)).collect()).await;
    let group = world.group("gone", "a", &topic);
    world.log.reset(&group.group, &BTreeMap::from([(at(&topic, 0), 2)])).await.expect("an offset is set");
    let log = &world.log;
    let start = world
        .until("retention passes the offset", || async {
            let start = log.offsets(&topic).await.expect("the topic is there")[&0].0;
            (start > 2).then_some(start)
        })
        .await;
    fails(world.log.read(&at(&topic, 0), 0, 10).await, &gone, Disposition::Permanent);
    fails(world.log.read(&at(&topic, 0), start + 100, 10).await, &gone, Disposition::Permanent);
    let mut member = world.join(&group).await;
    let deadline = world.env.now() + world.patience;
    for _ in 0..2 {
        loop {
            assert!(world.env.now() < deadline, "the member is told in time");
            match member.poll(Duration::from_millis(100)).await {
                Ok(polled) => assert!(!matches!(polled, Polled::Records { .. }), "{polled:?} instead of an error"),
                Err(error) => break fails(Err::<(), _>(error), &gone, Disposition::Permanent),
            }
        }
    }
    member.seek(&at(&topic, 0), start).await.expect("somebody decides where to go on");
    world.send(vec![record(&topic, 0, "later")]).await;
    assert_eq!(world.values(member.as_mut(), 1).await, [(5, "later".to_owned())]);
    member.close().await.expect("the member leaves");
}

/// The first offset at or after a time, per partition; the end where there is none.
pub async fn offsets_at_finds_the_first_record_of_a_time(world: &World) {
    let topic = world.topic("times", 2).await;
    for i in 0..3 {
        world.send(vec![record(&topic, 0, i)]).await;
        world.env.sleep(Duration::from_millis(20)).await;
    }
    let times: Vec<_> = world.read_all(&at(&topic, 0)).await.iter().map(|r| r.appended_ms).collect();
    assert!(times.windows(2).all(|w| w[0] < w[1]), "{times:?}");
    for (time, offset) in [(0, 0), (times[0], 0), (times[0] + 1, 1), (times[1], 1), (times[2], 2), (times[2] + 1, 3)] {
        let found = world.log.offsets_at(&topic, time).await.expect("the topic is there");
        assert_eq!(found, BTreeMap::from([(0, offset), (1, 0)]), "at {time} of {times:?}");
    }
}

/// A compacted topic gives the newest value of each key to whoever reads it from the beginning; a tombstone ends a key.
pub async fn the_newest_value_of_a_key_is_kept(world: &World) {
    let spec = TopicSpec { name: world.name("compacted"), partitions: 1, retention: None, compact: true };
    world.log.create_topic(&spec).await.expect("the topic is created");
    let topic = spec.name;
    let keyed = |key: usize, value: Option<String>| OutRecord {
        key: Some(Bytes::from(format!("k{key}"))),
        value: value.map(Bytes::from),
        ..record(&topic, 0, "")
    };
    let mut producer = world.producer("compacted").await;
    let mut expected = BTreeMap::new();
    for round in 0..40 {
        let commit = round % 4 > 0;
        producer.begin().await.expect("a transaction begins");
        let mut records = Vec::new();
        for key in 0..10 {
            let value = ((round + key) % 5 > 0).then(|| format!("{round}"));
            records.push(keyed(key, value.clone()));
            if commit {
                expected.insert(format!("k{key}"), value);
            }
        }
        producer.send(records).await.expect("records are accepted");
        if commit { producer.commit().await } else { producer.abort().await }.expect("the transaction ends");
    }
    expected.retain(|_, value| value.is_some());
    let (log, partition) = (world, at(&topic, 0));
    let folded = || async {
        let mut found = BTreeMap::new();
        for r in log.read_all(&partition).await {
            let key = String::from_utf8_lossy(r.key.as_deref().unwrap_or_default()).into_owned();
            found.insert(key, r.value.as_deref().map(|v| String::from_utf8_lossy(v).into_owned()));
        }
        found.retain(|_, value| value.is_some());
        (found == expected).then_some(())
    };
    world.until("the newest values are read", folded).await;
    let mut plain = world.log.producer(None).await.expect("a producer is made");
    fails(plain.send(vec![record(&topic, 0, "no key")]).await, &["INVALID_RECORD"], Disposition::Permanent);
}

/// A record above the limit is refused together with everything of its call; the producer goes on.
pub async fn a_too_large_record_is_refused_and_nothing_is_kept(world: &World) {
    let topic = world.topic("large", 1).await;
    let call = || vec![record(&topic, 0, "small"), record(&topic, 0, "x".repeat(2_000_000)), record(&topic, 0, "small")];
    let mut plain = world.log.producer(None).await.expect("a producer is made");
    fails(plain.send(call()).await, &["MESSAGE_TOO_LARGE"], Disposition::Permanent);
    plain.send(vec![record(&topic, 0, "plain")]).await.expect("the producer goes on");
    let mut producer = world.producer("large").await;
    producer.begin().await.expect("a transaction begins");
    fails(producer.send(call()).await, &["MESSAGE_TOO_LARGE"], Disposition::Permanent);
    producer.send(vec![record(&topic, 0, "transactional")]).await.expect("the transaction goes on");
    producer.commit().await.expect("the transaction commits");
    world.becomes(&at(&topic, 0), &["plain"], &["plain", "transactional"]).await;
}

/// Offsets are set by hand only while nobody reads.
pub async fn only_an_empty_group_is_reset(world: &World) {
    let topic = world.topic("reset", 1).await;
    world.send((0..6).map(|i| record(&topic, 0, i)).collect()).await;
    let spec = world.group("reset", "a", &topic);
    let mut member = world.join(&spec).await;
    world.values(member.as_mut(), 6).await;
    let to = BTreeMap::from([(at(&topic, 0), 4)]);
    fails(world.log.reset(&spec.group, &to).await, &["NON_EMPTY_GROUP"], Disposition::Retryable);
    member.close().await.expect("the member leaves");
    world.log.reset(&spec.group, &to).await.expect("an empty group is reset");
    assert_eq!(world.log.committed(&spec.group, &topic).await.expect("the group is asked"), BTreeMap::from([(0, 4)]));
    let mut member = world.join(&spec).await;
    assert_eq!(world.values(member.as_mut(), 2).await, [(4, "4".to_owned()), (5, "5".to_owned())]);
    member.close().await.expect("the member leaves");
}

/// Leaves committed and open work behind, for [`after_a_restart`].
pub async fn before_a_restart(world: &World) {
    let topic = world.topic("restart", 2).await;
    world.send(vec![record(&topic, 0, "plain")]).await;
    let spec = world.group("restart", "a", &topic);
    let mut member = world.join(&spec).await;
    world.values(member.as_mut(), 1).await;
    let mut producer = world.producer("restart").await;
    producer.begin().await.expect("a transaction begins");
    producer.send(vec![record(&topic, 0, "committed"), record(&topic, 1, "committed")]).await.expect("records are accepted");
    producer.send_offsets(&BTreeMap::from([(at(&topic, 0), 1)]), &member.metadata()).await.expect("offsets are accepted");
    producer.commit().await.expect("the transaction commits");
    producer.begin().await.expect("a transaction begins");
    producer.send(vec![record(&topic, 0, "open"), record(&topic, 1, "open")]).await.expect("records are accepted");
    producer.send_offsets(&BTreeMap::from([(at(&topic, 0), 2)]), &member.metadata()).await.expect("offsets are accepted");
    member.close().await.expect("the member leaves");
}

/// Finds what was committed, nothing of what was open, and goes on.
pub async fn after_a_restart(world: &World) {
    let topic = world.topic("restart", 2).await;
    assert_eq!(texts(&world.read_all(&at(&topic, 0)).await), ["plain", "committed"]);
    assert_eq!(texts(&world.read_all(&at(&topic, 1)).await), ["committed"]);
    let spec = world.group("restart", "a", &topic);
    // The heir of the transactional id ends what was open.
    let mut producer = world.producer("restart").await;
    assert_eq!(world.log.committed(&spec.group, &topic).await.expect("the group is asked"), BTreeMap::from([(0, 1)]));
    let mut member = world.join(&spec).await;
    let mut read = world.values(member.as_mut(), 2).await;
    read.sort();
    assert_eq!(read, [(0, "committed".to_owned()), (1, "committed".to_owned())]);
    producer.begin().await.expect("a transaction begins");
    producer.send(vec![record(&topic, 0, "after")]).await.expect("records are accepted");
    producer.commit().await.expect("the transaction commits");
    world.becomes(&at(&topic, 0), &["plain", "committed"], &["plain", "committed", "after"]).await;
    member.close().await.expect("the member leaves");
}
