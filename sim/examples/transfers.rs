//! A pipeline that is not the shop: transfers between bank accounts become postings, exactly once. It brings its workload,
//! its own fault and its invariants; the simulator does the rest.
//!
//! `cargo run --example transfers -- sweep --seeds 20`, or `run`, `shrink`, `canary`.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use simulacro_core::ports::{
    Disposition, Result,
    event_log::{GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, StartAt, TopicPartition, TopicSpec},
};
use simulacro_sim::{
    broker::RequestKind,
    harness::{self, Broken, Evidence, Host, Pipeline, Story},
    rng::Stream,
    stream::faults::{Loses, Side, StreamFault, When},
};

const GROUP: &str = "bank";
const TRANSFERS: &str = "transfers";
const POSTINGS: &str = "postings";
const REFUSED: &str = "refused";
/// Transfers of each producer.
const COUNT: u64 = 150;

struct Bank;

/// `id from to cents`, as it stands in a record.
fn transfers(producer: usize, mut random: Stream) -> Vec<String> {
    let one = |n| {
        let (from, to) = (random.between(0, 19), random.between(20, 39));
        format!("{producer}-{n} {from} {to} {}", random.between(1, 1_000_000))
    };
    (0..COUNT).map(one).collect()
}

fn record(topic: &str, key: &str, value: String) -> OutRecord {
    let key = Some(Bytes::from(key.to_owned()));
    OutRecord { topic: topic.into(), partition: None, key, value: Some(value.into()), headers: Vec::new() }
}

/// Two postings whose sum is zero; what cannot be read is refused as a whole.
fn post(record_in: &LogRecord) -> Vec<OutRecord> {
    let text = String::from_utf8_lossy(record_in.value.as_deref().unwrap_or_default()).into_owned();
    let fields: Vec<&str> = text.split(' ').collect();
    match fields[..] {
        [id, from, to, cents] if cents.parse::<i64>().is_ok() => {
            vec![record(POSTINGS, from, format!("{id} {from} -{cents}")), record(POSTINGS, to, format!("{id} {to} {cents}"))]
        }
        _ => vec![record(REFUSED, "refused", text)],
    }
}

async fn commit(
    host: &Host,
    producer: &mut dyn Producer,
    group: &GroupMetadata,
    out: Vec<OutRecord>,
    at: (TopicPartition, i64),
) -> Result<()> {
    if host.own("offsets_first") == Some(1) {
        // The planted mistake: the group moves on in a transaction of its own, and then the output may fail.
        host.strike("offsets_first");
        producer.begin().await?;
        producer.send_offsets(&[at].into(), group).await?;
        producer.commit().await?;
        producer.begin().await?;
        producer.send(out).await?;
        return producer.commit().await;
    }
    producer.begin().await?;
    producer.send(out).await?;
    producer.send_offsets(&[at].into(), group).await?;
    producer.commit().await
}

#[async_trait]
impl Pipeline for Bank {
    fn name(&self) -> &'static str {
        "transfers"
    }
    fn group(&self) -> &'static str {
        GROUP
    }
    fn topics(&self) -> Vec<TopicSpec> {
        let topic = |name: &str| TopicSpec { name: name.into(), partitions: 3, retention: None, compact: false };
        [TRANSFERS, POSTINGS, REFUSED].map(topic).into()
    }
    fn draw(&self, random: &mut Stream) -> Story {
        let mut fault = Vec::new();
        for worker in 0..2 {
            let when = When::Request { request: RequestKind::EndTxn, nth: random.between(2, 20), side: Side::After };
            fault.push(StreamFault::WorkerCrash { worker, when, down_s: random.between(1, 15) });
        }
        let from_s = random.between(5, 25);
        let cut = StreamFault::Partition { host: "worker-1".into(), loses: Loses::Replies, from_s, to_s: from_s + 6 };
        let lost = StreamFault::LostReply { of: RequestKind::Produce, nth: random.between(1, 40), count: 3 };
        let restart = StreamFault::BrokerRestart { at_s: random.between(5, 30), down_s: random.between(1, 10) };
        fault.extend([cut, lost, restart].into_iter().filter(|_| random.chance((2, 3))));
        Story {
            summary: "transfers are posted once, whatever dies".into(),
            start: "2024-01-01T00:00:00Z".parse().unwrap_or_default(),
            tick_ms: 20,
            producers: 2,
            workers: 2,
            patience_s: 120,
            fired_min: 1,
            own: [("garbage_every".to_owned(), random.between(5, 30))].into(),
            fault,
        }
    }
    async fn feed(&self, host: &Host, random: Stream) -> Result<()> {
        let mut producer = host.log.producer(None).await?;
        for (n, transfer) in (1..).zip(transfers(host.number, random)) {
            producer.send(vec![record(TRANSFERS, &transfer, transfer.clone())]).await?;
            if host.own("garbage_every").is_some_and(|every| every > 0 && n % every == 0) {
                host.strike("garbage_every");
                producer.send(vec![record(TRANSFERS, "garbage", format!("garbage {}-{n}", host.number))]).await?;
            }
            host.env.sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }
    async fn work(&self, host: &Host) -> Result<()> {
        // The producer first: it fences what a dead life of this worker has left open.
        let mut producer = host.log.producer(Some(&host.name)).await?;
        let (group, member) = (GROUP.to_owned(), host.name.clone());
        let spec = GroupSpec {
            group,
            member,
            topics: vec![TRANSFERS.into()],
            start_at: StartAt::Earliest,
            session_timeout: Duration::from_secs(6),
        };
        let mut consumer = host.log.join(&spec).await?;
        while !host.must_leave() {
            let polled = match consumer.poll(Duration::from_millis(500)).await {
                Err(error) if error.disposition != Disposition::Permanent => continue,
                polled => polled?,
            };
            if let Polled::Records { partition, records, next_offset, .. } = polled
                && !records.is_empty()
            {
                let out = records.iter().flat_map(post).collect();
                // After any error all is forgotten: the next life begins where the group stands.
                commit(host, producer.as_mut(), &consumer.metadata(), out, (partition, next_offset)).await?;
            }
        }
        consumer.close().await
    }
    async fn is_done(&self, host: &Host) -> Result<bool> {
        let (ends, done) = (host.log.offsets(TRANSFERS).await?, host.log.committed(GROUP, TRANSFERS).await?);
        Ok(ends.iter().all(|(partition, (_, end))| done.get(partition).copied().unwrap_or(0) >= *end))
    }
    fn judge(&self, evidence: &Evidence<'_>) -> Vec<Broken> {
        let mut expected: BTreeMap<String, i64> = BTreeMap::new();
        for (producer, random) in evidence.fed.iter().enumerate() {
            for transfer in transfers(producer, random.clone()) {
                let fields: Vec<&str> = transfer.split(' ').collect();
                let cents: i64 = fields[3].parse().unwrap_or_default();
                *expected.entry(fields[1].to_owned()).or_default() -= cents;
                *expected.entry(fields[2].to_owned()).or_default() += cents;
            }
        }
        let (mut found, mut seen, mut broken): (BTreeMap<String, i64>, BTreeSet<String>, Vec<Broken>) = Default::default();
        for stored in evidence.topics[POSTINGS].values().flatten() {
            let text = stored.value.as_ref().map(|v| String::from_utf8_lossy(&v.0).into_owned()).unwrap_or_default();
            let fields: Vec<&str> = text.split(' ').collect();
            *found.entry(fields[1].to_owned()).or_default() += fields[2].parse::<i64>().unwrap_or_default();
            if !seen.insert(text.clone()) {
                broken.push(("posted_once", format!("found {text:?} twice")));
            }
        }
        let sum: i64 = found.values().sum();
        if sum != 0 {
            broken.push(("money_is_conserved", format!("all balances sum up to {sum} cents, expected 0")));
        }
        if let Some((account, cents)) = expected.iter().find(|(account, cents)| found.get(*account) != Some(cents)) {
            broken.push(("balances", format!("account {account}: found {:?}, expected {cents}", found.get(account))));
        }
        broken
    }
}

fn main() -> ExitCode {
    harness::main(Bank)
}
