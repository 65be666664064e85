//! The workload of a stream story: events through time, with everything that goes wrong with events.
//!
//! All of it is decided by the seed before the first message is sent, so no fault changes what is produced, only when it
//! arrives. What each record means is known here by its bytes, and the oracle asks for nothing else. A producer sends at
//! least once: what it does not know to have arrived, it sends again.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use simulacro_core::{
    ports::{
        Disposition, Env, PortError,
        event_log::{EventLog, OutRecord},
    },
    streaming::config::StreamConfig,
};

use super::{
    faults::Faults,
    scenario::{Arrival, StreamScenario},
    wire::{self, Event},
};
use crate::rng::Stream;

/// After the story's events, closing ones follow for so long, so that every window of the story can close.
pub const CLOSING_S: u64 = 150;
/// Distance of closing events, in seconds.
const CLOSING_EVERY_S: u64 = 10;
/// Region of the closing events.
pub const CLOSING_REGION: &str = "cierre";
/// A schema id that the registry never gave.
const NO_SCHEMA: u32 = 4_242;
/// Records of one message of a producer.
const BATCH_MAX: usize = 500;
/// How often a producer looks what is due.
const SEND_EVERY: std::time::Duration = std::time::Duration::from_millis(200);

const REGIONS: [&str; 5] = ["centro", "este", "norte", "oeste", "sur"];

/// How a record is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Damage {
    /// Its last byte is missing.
    Truncated,
    /// It has a byte too many.
    Trailing,
    /// It does not begin as a record of a registry does.
    NoHeader,
    /// Its schema is not registered.
    UnknownSchema,
    /// It is larger than the job reads.
    TooLarge,
    /// It has no value.
    Tombstone,
}

impl Damage {
    const ALL: [Self; 6] =
        [Self::Truncated, Self::Trailing, Self::NoHeader, Self::UnknownSchema, Self::TooLarge, Self::Tombstone];

    /// The code that the job must give as its reason.
    pub fn code(self) -> &'static str {
        match self {
            Self::Truncated => "truncated",
            Self::Trailing => "trailing_bytes",
            Self::NoHeader => "no_header",
            Self::UnknownSchema => "unknown_schema",
            Self::TooLarge => "too_large",
            Self::Tombstone => "tombstone",
        }
    }
}

/// What a record means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Meaning {
    /// An event, good or bad.
    Event(Event),
    /// Nothing that can be read.
    Damaged(Damage),
}

/// The meaning of each value that was ever sent.
pub type Meanings = BTreeMap<Option<Bytes>, Meaning>;

/// One record to be sent.
#[derive(Debug, Clone)]
pub struct Sending {
    /// When it is due, in milliseconds from the start.
    pub at_ms: i64,
    /// Partition.
    pub partition: i32,
    /// Key.
    pub key: Bytes,
    /// Value.
    pub value: Option<Bytes>,
}

/// Everything that is sent.
#[derive(Debug)]
pub struct Plan {
    /// By producer, in order of time.
    pub sendings: Vec<Vec<Sending>>,
    /// What each value means.
    pub meanings: Meanings,
    /// Windows that begin before this hold the story's events, and must be closed at the end; milliseconds since 1970.
    pub ends_ms: i64,
}

/// What a producer knows of its records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Messages that hold it and were answered.
    pub acknowledged: u64,
    /// Messages that hold it.
    pub tried: u64,
}

/// What all producers know, by partition and value.
pub type Ledger = BTreeMap<(i32, Option<Bytes>), Sent>;

fn hash(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3))
}

struct Maker<'a> {
    story: &'a StreamScenario,
    faults: &'a Faults,
    schema: u32,
    meanings: Meanings,
}

impl Maker<'_> {
    fn event(&self, random: &mut Stream, timestamp_ms: i64) -> Event {
        let workload = &self.story.workload;
        let hot = random.chance((workload.hot, 1_000));
        let user = if hot { 0 } else { random.between(0, workload.users - 1) };
        let region = if hot { 0 } else { user as usize % REGIONS.len() };
        let page = random.between(0, workload.pages - 1);
        let (event_type, cents) = match random.between(0, 9) {
            0 => ("purchase", random.between(0, 50_000).cast_signed()),
            1 | 2 => ("add_to_cart", 0),
            _ => ("click", 0),
        };
        Event {
            user_id: format!("u{user}"),
            event_type: event_type.to_owned(),
            page: format!("/p{page}"),
            product_id: random.chance((1, 2)).then(|| format!("prod{page}")),
            cents,
            region: REGIONS[region].to_owned(),
            timestamp_ms,
        }
    }

    /// A time at which comparisons are equal: a half minute, or the beginning of the minute whose lateness ends when the
    /// watermark is where an event on that half minute puts it.
    fn edge(&self, random: &mut Stream, clock_ms: i64) -> i64 {
        let ms = |d: std::time::Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        let half = clock_ms.div_euclid(30_000) * 30_000;
        let behind = ms(self.story.config.allowed_lateness) + ms(self.story.config.watermark_bound) + 60_000;
        if random.chance((1, 3)) { half - behind } else { half }
    }

    /// An event that breaks a clause of the contract or a rule.
    fn spoil(random: &mut Stream, event: &mut Event) {
        // Half of the events have a product: no draw of its own, so that older seeds keep their meaning.
        let is_long = event.product_id.is_some();
        match random.between(0, 6) {
            0 => event.event_type = "scroll".into(),
            1 => event.region = if is_long { "r".repeat(300) } else { String::new() },
            2 => event.user_id = if is_long { "u".repeat(300) } else { String::new() },
            3 => (event.event_type, event.cents) = ("click".into(), 5),
            4 => (event.event_type, event.cents) = ("purchase".into(), -500),
            5 if is_long => event.product_id = Some("p".repeat(300)),
            5 => event.page = "x".repeat(3_000),
            _ => event.timestamp_ms = -5,
        }
    }

    fn damaged(&mut self, random: &mut Stream, mut event: Event) -> Option<Bytes> {
        let damage = Damage::ALL[random.between(0, Damage::ALL.len() as u64 - 1) as usize];
        if damage == Damage::TooLarge {
            event.page = "y".repeat(self.story.config.click_bytes_max + 1_000);
        }
        let mut value = wire::encode(if damage == Damage::UnknownSchema { NO_SCHEMA } else { self.schema }, &event);
        match damage {
            Damage::Truncated => {
                value.pop();
            }
            Damage::Trailing => value.push(7),
            Damage::NoHeader => value.iter_mut().for_each(|byte| *byte ^= 0xFF),
            Damage::UnknownSchema | Damage::TooLarge | Damage::Tombstone => {}
        }
        let value = (damage != Damage::Tombstone).then(|| Bytes::from(value));
        self.meanings.insert(value.clone(), Meaning::Damaged(damage));
        value
    }

    fn good(&mut self, event: Event) -> Option<Bytes> {
        let value = Some(Bytes::from(wire::encode(self.schema, &event)));
        self.meanings.insert(value.clone(), Meaning::Event(event));
        value
    }

    fn is_silent(&self, partition: i32, at_ms: i64) -> bool {
        let within = |from: u64, to: u64| (from * 1_000..to * 1_000).contains(&at_ms.unsigned_abs());
        self.story.workload.silent.iter().any(|s| s.partition == partition && within(s.from_s, s.to_s))
    }

    /// One producer's records.
    fn produce(&mut self, number: usize, random: &mut Stream) -> Vec<Sending> {
        let (workload, config) = (&self.story.workload, &self.story.config);
        let ms = |d: std::time::Duration| d.as_millis() as u64;
        let (lateness, future) = (ms(config.allowed_lateness), ms(config.future_bound));
        let step = (60_000 / workload.per_minute).max(1);
        let start_ms = self.story.start.timestamp_millis();
        let host = format!("producer-{number}");
        let mut out = Vec::new();
        let mut at = random.between(0, step);
        while at < workload.duration_s * 1_000 {
            let elapsed = std::time::Duration::from_millis(at);
            let clock = start_ms + at.cast_signed() + self.faults.skews(&host, elapsed);
            let mut roll = random.between(0, 999);
            let mut is = |share: u64| {
                let hit = roll < share;
                roll = if hit { u64::MAX } else { roll - share.min(roll) };
                hit
            };
            let (late, out_of_order) = (is(workload.late), is(workload.out_of_order));
            let (ahead, ahead_too_far) = (is(workload.ahead), is(workload.future));
            let (damaged, invalid) = (is(workload.damaged), is(workload.invalid));
            let offset = if late {
                -(lateness + ms(config.watermark_bound) + 120_000 + random.between(0, 900_000)).cast_signed()
            } else if out_of_order {
                -random.between(0, lateness).cast_signed()
            } else if ahead {
                // Less than what is believed by more than the way to the broker.
                random.between(0, future.saturating_sub(20_000)).cast_signed()
            } else if ahead_too_far {
                (future + 60_000 + random.between(0, 3_600_000)).cast_signed()
            } else {
                -random.between(0, 2_000).cast_signed()
            };
            // No draw where there is no share, so that older seeds keep their meaning.
            let on_the_edge = workload.on_the_edge > 0 && random.chance((workload.on_the_edge, 1_000));
            let time = if on_the_edge { self.edge(random, clock) } else { clock + offset };
            let mut event = self.event(random, time);
            let mut partition = (hash(&event.user_id) % u64::from(workload.partitions.unsigned_abs())) as i32;
            for _ in 0..workload.partitions {
                if self.is_silent(partition, at.cast_signed()) {
                    partition = (partition + 1) % workload.partitions;
                }
            }
            let key = Bytes::from(event.user_id.clone());
            if invalid {
                Self::spoil(random, &mut event);
            }
            let value = if damaged { self.damaged(random, event) } else { self.good(event) };
            let mut send = |at_ms: i64| out.push(Sending { at_ms, partition, key: key.clone(), value: value.clone() });
            send(at.cast_signed());
            if random.chance((workload.duplicates, 1_000)) {
                let again = at + random.between(1, workload.duplicate_after_s.max(1) * 1_000);
                if again < workload.duration_s * 1_000 && !self.is_silent(partition, again.cast_signed()) {
                    send(again.cast_signed());
                }
            }
            at += random.between(1, 2 * step);
        }
        out.sort_by_key(|sending| sending.at_ms);
        out
    }
}

impl Maker<'_> {
    /// The records of a type that comes later.
    fn arrive(&mut self, arrival: &Arrival, random: &mut Stream) -> Vec<Sending> {
        let workload = &self.story.workload;
        let start_ms = self.story.start.timestamp_millis();
        let step_us = (60_000_000 / arrival.per_minute).max(1);
        let mut out = Vec::new();
        let mut at_us = arrival.from_s * 1_000_000 + random.between(0, step_us);
        while at_us < arrival.to_s * 1_000_000 {
            let at_ms = (at_us / 1_000).cast_signed();
            let user = random.between(0, workload.users - 1);
            let event = Event {
                user_id: format!("u{user}"),
                event_type: arrival.event_type.clone(),
                page: format!("/{}/{}", arrival.event_type, random.between(0, arrival.pages - 1)),
                product_id: None,
                cents: 0,
                region: REGIONS[user as usize % REGIONS.len()].to_owned(),
                timestamp_ms: start_ms + at_ms - random.between(0, 2_000).cast_signed(),
            };
            let partition = (hash(&event.user_id) % u64::from(workload.partitions.unsigned_abs())) as i32;
            let key = Bytes::from(event.user_id.clone());
            let value = self.good(event);
            out.push(Sending { at_ms, partition, key, value });
            at_us += random.between(1, 2 * step_us);
        }
        out
    }
}

/// Decides everything that will be sent: the producers' records, then those of types that come later. `schema` is the id of the declaration of clicks.
pub fn plan(story: &StreamScenario, schema: u32, faults: &Faults, random: &Stream) -> Plan {
    let mut maker = Maker { story, faults, schema, meanings: Meanings::new() };
    let workload = &story.workload;
    let mut sendings: Vec<Vec<Sending>> =
        (0..workload.producers).map(|n| maker.produce(n, &mut random.child(&format!("producer {n}")))).collect();
    for (number, arrival) in workload.arrival.iter().enumerate() {
        let sent = maker.arrive(arrival, &mut random.child(&format!("arrival {number}")));
        sendings.push(sent);
    }
    let start_ms = story.start.timestamp_millis();
    let duration_ms = (workload.duration_s * 1_000).cast_signed();
    let ends_ms = start_ms + duration_ms;
    // Well within the bound on future times, and with that far enough for the last window to close.
    let ahead = i64::try_from(story.config.future_bound.as_millis()).unwrap_or(i64::MAX).saturating_sub(20_000).max(0);
    for at in (CLOSING_EVERY_S..=CLOSING_S).step_by(CLOSING_EVERY_S as usize) {
        for partition in 0..workload.partitions {
            let at_ms = duration_ms + (at * 1_000).cast_signed();
            if maker.is_silent(partition, at_ms) {
                continue;
            }
            let event = Event {
                user_id: format!("cierre{partition}-{at}"),
                event_type: "click".into(),
                page: "/".into(),
                product_id: None,
                cents: 0,
                region: CLOSING_REGION.into(),
                timestamp_ms: start_ms + at_ms + ahead,
            };
            let key = Bytes::from(event.user_id.clone());
            let value = maker.good(event);
            if let Some(first) = sendings.first_mut() {
                first.push(Sending { at_ms, partition, key, value });
            }
        }
    }
    Plan { sendings, meanings: maker.meanings, ends_ms }
}

/// Sends one producer's records when they are due; `note` is told of each message before it is sent and when it is answered.
///
/// # Errors
/// An error that will come again.
pub async fn send(
    sendings: Vec<Sending>,
    config: &StreamConfig,
    start_ms: i64,
    env: &super::process::HostEnv,
    log: &dyn EventLog,
    mut note: impl FnMut(&[Sending], bool) + Send,
) -> Result<(), PortError> {
    let mut producer = loop {
        match log.producer(None).await {
            Ok(producer) => break producer,
            Err(error) if error.disposition == Disposition::Permanent => return Err(error),
            Err(_) => env.sleep(SEND_EVERY).await,
        }
    };
    let mut waiting: VecDeque<Sending> = sendings.into();
    while let Some(first) = waiting.front() {
        // Its own clock may be wrong; when it sends is a matter of true time.
        let now_ms = i64::try_from(env.elapsed().as_millis()).unwrap_or(i64::MAX);
        if first.at_ms > now_ms {
            env.sleep(SEND_EVERY).await;
            continue;
        }
        let due = waiting.iter().take_while(|s| s.at_ms <= now_ms).take(BATCH_MAX).count();
        let batch: Vec<Sending> = waiting.drain(..due).collect();
        loop {
            let records = batch.iter().map(|sending| OutRecord {
                topic: config.topics.clicks.clone(),
                partition: Some(sending.partition),
                key: Some(sending.key.clone()),
                value: sending.value.clone(),
                headers: vec![("sent_ms".into(), Bytes::from((start_ms + sending.at_ms).to_string()))],
            });
            note(&batch, false);
            match producer.send(records.collect()).await {
                Ok(()) => {
                    note(&batch, true);
                    break;
                }
                Err(error) if error.disposition == Disposition::Permanent => return Err(error),
                // It may have arrived; sending it again makes duplicates, which the job must know.
                Err(_) => env.sleep(SEND_EVERY).await,
            }
        }
    }
    Ok(())
}
