//! The oracle of the stream: every window and every event's end, from what the topic of clicks holds. It is naive on
//! purpose, works on integers, and shares no code with the job.
//!
//! It uses the records of each partition in order, their append times, and what each record means. With those nearly
//! every event has one end. The exception is a partition that was silent for long: the job lets it follow the others, at a
//! moment that nothing in the topic tells. There the oracle holds two watermarks, the least and the most that is possible,
//! and an event between them may be counted or late; which of the two the late topic tells, and every such event is
//! counted as *decided by timing*. That it is either in its windows or in the late topic is as exact as for all others.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use simulacro_core::streaming::{config::StreamConfig, event::Fate};

use super::{
    wire::{Event, Totals, WindowKey},
    workload::{Damage, Meaning, Meanings},
};

const MINUTE: i64 = 60_000;

/// A record of the topic of clicks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivered {
    /// Offset.
    pub offset: i64,
    /// When it was appended, in milliseconds since 1970.
    pub appended_ms: i64,
    /// Key.
    pub key: Option<Bytes>,
    /// Value.
    pub value: Option<Bytes>,
}

/// The rules of the specification, as numbers.
#[derive(Debug, Clone)]
pub struct Rules {
    bound_ms: i64,
    lateness_ms: i64,
    future_ms: i64,
    horizon_ms: i64,
    sliding_ms: i64,
    slide_ms: i64,
    event_types: BTreeSet<String>,
    /// Silence after which a partition may follow the others.
    silence_ms: i64,
}

impl Rules {
    /// The numbers of a configuration. `jumps`: whether a worker's clock may jump, which makes any silence long enough.
    pub fn of(config: &StreamConfig, jumps: bool) -> Self {
        let ms = |d: std::time::Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        Self {
            bound_ms: ms(config.watermark_bound),
            lateness_ms: ms(config.allowed_lateness),
            future_ms: ms(config.future_bound),
            horizon_ms: ms(config.dedup_horizon),
            sliding_ms: ms(config.sliding_window),
            slide_ms: ms(config.slide),
            event_types: config.event_types.clone(),
            silence_ms: if jumps { 0 } else { ms(config.idle_after) },
        }
    }
}

/// Where an event ends, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Fate.
    pub fate: Fate,
    /// Reason, as it must stand beside the record; the beginning of it for what is not decodable.
    pub reason: Reason,
    /// Amount in cents, of what can be decoded.
    pub cents: i64,
}

/// Why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// None is needed.
    None,
    /// These words.
    Words(&'static str),
    /// It could not be decoded.
    Damaged(Damage),
}

/// What must come out.
#[derive(Debug, Default)]
pub struct Expected {
    /// Every row of every window, once all have closed.
    pub windows: BTreeMap<WindowKey, Totals>,
    /// By partition and offset.
    pub ends: BTreeMap<(i32, i64), End>,
    /// Events whose end the topic alone does not tell.
    pub by_timing: u64,
    /// Least watermark of each partition at the end.
    pub watermarks: BTreeMap<i32, Option<i64>>,
    /// Largest watermark that is possible.
    pub watermark_max: Option<i64>,
    /// The latest time to which all partitions together can have promised at each of the looks: no window that ends later
    /// may be closed then.
    pub promised: Vec<Option<i64>>,
    /// Records whose meaning nobody knows: the world itself is broken then.
    pub unknown: Vec<(i32, i64)>,
}

impl Expected {
    /// Records and cents of a fate.
    pub fn of(&self, fate: Fate) -> (u64, i64) {
        let mine = || self.ends.values().filter(|end| end.fate == fate);
        (mine().count() as u64, mine().map(|end| end.cents).sum())
    }
}

fn minute(ms: i64) -> i64 {
    ms.div_euclid(MINUTE) * MINUTE
}

/// The rule that an event breaks, if it does.
fn broken(event: &Event, appended_ms: i64, rules: &Rules) -> Option<(Fate, &'static str)> {
    let names: [(&str, usize, &'static str, &'static str); 4] = [
        (&event.user_id, 256, "user_id.required", "user_id.length"),
        (&event.event_type, 256, "event_type.required", "event_type.length"),
        (&event.page, 2_048, "page.required", "page.length"),
        (&event.region, 256, "region.required", "region.length"),
    ];
    for (text, max, missing, long) in names {
        if text.is_empty() {
            return Some((Fate::Quarantined, missing));
        }
        if text.len() > max {
            return Some((Fate::Quarantined, long));
        }
    }
    if event.product_id.as_ref().is_some_and(|product| product.len() > 256) {
        return Some((Fate::Quarantined, "product_id.length"));
    }
    if event.timestamp_ms < 0 {
        return Some((Fate::Quarantined, "timestamp.not_negative"));
    }
    if event.timestamp_ms - appended_ms > rules.future_ms {
        return Some((Fate::DeadLettered, "timestamp.future"));
    }
    if !rules.event_types.contains(&event.event_type) {
        return Some((Fate::Quarantined, "event_type.accepted_values"));
    }
    match (event.event_type.as_str(), event.cents) {
        ("purchase", ..0) => Some((Fate::Rejected, "monto.not_negative")),
        ("purchase", _) | (_, 0) => None,
        _ => Some((Fate::Quarantined, "monto.zero_unless_purchase")),
    }
}

#[derive(Debug, Default)]
struct Partition {
    /// Least and most that its watermark can be.
    least: Option<i64>,
    most: Option<i64>,
    appended_ms: Option<i64>,
    /// Events seen, and whether it is sure that they are remembered.
    seen: BTreeMap<Event, bool>,
}

fn reached(watermark: Option<i64>, ms: i64) -> bool {
    watermark.is_some_and(|w| w >= ms)
}

/// Computes what must come out of `topic`. `late` are the origins of the records in the late topic, which are asked only
/// where the topic of clicks leaves a choice. `began_ms` is when the topic was made; `looks` are times in order.
pub fn expect(
    topic: &BTreeMap<i32, Vec<Delivered>>,
    meanings: &Meanings,
    rules: &Rules,
    late: &BTreeSet<(i32, i64)>,
    began_ms: i64,
    looks: &[i64],
) -> Expected {
    let mut out = Expected::default();
    let mut partitions: BTreeMap<i32, Partition> = topic.keys().map(|p| (*p, Partition::default())).collect();
    let mut moments: BTreeMap<i64, Vec<(i32, &Delivered)>> = BTreeMap::new();
    for (partition, records) in topic {
        for record in records {
            moments.entry(record.appended_ms).or_default().push((*partition, record));
        }
    }
    let mut counted: Vec<Event> = Vec::new();
    let mut looks = looks.iter().copied().peekable();
    for (appended_ms, records) in &moments {
        while let Some(look) = looks.next_if(|look| look < appended_ms) {
            out.promised.push(promise(&partitions, look, began_ms, rules));
        }
        // What others may have told before this moment is over.
        let mut told: BTreeMap<i32, Option<i64>> = partitions.iter().map(|(p, known)| (*p, known.most)).collect();
        for (partition, record) in records {
            if let Some(Meaning::Event(event)) = meanings.get(&record.value)
                && broken(event, *appended_ms, rules).is_none()
                && let Some(most) = told.get_mut(partition)
            {
                *most = (*most).max(Some(event.timestamp_ms - rules.bound_ms));
            }
        }
        for (partition, record) in records {
            let at = (*partition, record.offset);
            let Some(known) = partitions.get_mut(partition) else { continue };
            if appended_ms - known.appended_ms.unwrap_or(began_ms) >= rules.silence_ms {
                let others = told.iter().filter(|(p, _)| *p != partition).filter_map(|(_, most)| *most).max();
                known.most = known.most.max(others);
            }
            known.appended_ms = Some(*appended_ms);
            let end = match meanings.get(&record.value) {
                None => {
                    out.unknown.push(at);
                    continue;
                }
                Some(Meaning::Damaged(damage)) => End { fate: Fate::DeadLettered, reason: Reason::Damaged(*damage), cents: 0 },
                Some(Meaning::Event(event)) => match broken(event, *appended_ms, rules) {
                    Some((fate, words)) => End { fate, reason: Reason::Words(words), cents: event.cents },
                    None => {
                        let (fate, by_timing) = judge(known, event, rules, late.contains(&at));
                        out.by_timing += u64::from(by_timing);
                        if fate == Fate::Published {
                            counted.push(event.clone());
                        }
                        let reason = if fate == Fate::Late { Reason::Words("timestamp.late") } else { Reason::None };
                        End { fate, reason, cents: event.cents }
                    }
                },
            };
            out.ends.insert(at, end);
        }
    }
    out.promised.extend(looks.map(|look| promise(&partitions, look, began_ms, rules)));
    out.watermark_max = partitions.values().filter_map(|known| known.most).max();
    out.watermarks = partitions.into_iter().map(|(p, known)| (p, known.least)).collect();
    out.windows = windows(&counted, rules);
    out
}

/// The same rules over events as they are appended, one moment after the other, for stories that are too long to be kept: it
/// remembers what duplicates need and no more. Where the topic of clicks leaves a choice it says so, and takes the event as
/// counted.
#[derive(Debug)]
pub struct Running {
    partitions: BTreeMap<i32, Partition>,
    rules: Rules,
    began_ms: i64,
}

impl Running {
    /// Over so many partitions of a topic that was made at `began_ms`.
    pub fn new(partitions: i32, rules: Rules, began_ms: i64) -> Self {
        Self { partitions: (0..partitions).map(|p| (p, Partition::default())).collect(), rules, began_ms }
    }

    /// The ends of events that are appended at one moment, in order, and whether timing decides each.
    pub fn moment(&mut self, appended_ms: i64, events: &[(i32, Event)]) -> Vec<(End, bool)> {
        let Self { partitions, rules, began_ms } = self;
        let mut told: BTreeMap<i32, Option<i64>> = partitions.iter().map(|(p, known)| (*p, known.most)).collect();
        for (partition, event) in events {
            if broken(event, appended_ms, rules).is_none()
                && let Some(most) = told.get_mut(partition)
            {
                *most = (*most).max(Some(event.timestamp_ms - rules.bound_ms));
            }
        }
        let mut ends = Vec::with_capacity(events.len());
        for (partition, event) in events {
            let Some(known) = partitions.get_mut(partition) else { continue };
            if appended_ms - known.appended_ms.unwrap_or(*began_ms) >= rules.silence_ms {
                let others = told.iter().filter(|(p, _)| *p != partition).filter_map(|(_, most)| *most).max();
                known.most = known.most.max(others);
            }
            known.appended_ms = Some(appended_ms);
            let cents = event.cents;
            ends.push(match broken(event, appended_ms, rules) {
                Some((fate, words)) => (End { fate, reason: Reason::Words(words), cents }, false),
                None => {
                    let (fate, by_timing) = judge(known, event, rules, false);
                    let reason = if fate == Fate::Late { Reason::Words("timestamp.late") } else { Reason::None };
                    (End { fate, reason, cents }, by_timing)
                }
            });
        }
        for known in partitions.values_mut() {
            // What nobody can take for a duplicate any more.
            let (least, horizon_ms) = (known.least, rules.horizon_ms);
            known.seen.retain(|event, _| !reached(least, minute(event.timestamp_ms) + MINUTE + horizon_ms));
        }
        ends
    }
}

/// The smallest watermark of all partitions, the most that it can be at a time: a silent one may have followed the others.
fn promise(partitions: &BTreeMap<i32, Partition>, now_ms: i64, began_ms: i64, rules: &Rules) -> Option<i64> {
    let most = partitions.values().filter_map(|known| known.most).max();
    let of = |known: &Partition| {
        let is_silent = now_ms - known.appended_ms.unwrap_or(began_ms) >= rules.silence_ms;
        if is_silent { most } else { known.most }
    };
    partitions.values().map(of).min().flatten()
}

/// The end of a good event, and whether timing decided it.
fn judge(known: &mut Partition, event: &Event, rules: &Rules, is_late: bool) -> (Fate, bool) {
    let begins = minute(event.timestamp_ms);
    let forgotten_at = begins + MINUTE + rules.horizon_ms;
    let late_at = begins + MINUTE + rules.lateness_ms;
    let mut by_timing = false;
    if !reached(known.least, forgotten_at) {
        let sure = !reached(known.most, forgotten_at);
        match known.seen.get(event).copied() {
            Some(true) if sure => return (Fate::Deduplicated, false),
            Some(_) => {
                // It is known, unless it was forgotten before this moment; then it is late as well.
                if !is_late {
                    return (Fate::Deduplicated, true);
                }
                by_timing = true;
            }
            None => {
                known.seen.insert(event.clone(), sure);
            }
        }
    }
    let fate = match (reached(known.least, late_at), reached(known.most, late_at)) {
        (true, _) => Fate::Late,
        (false, false) => Fate::Published,
        (false, true) => {
            by_timing = true;
            if is_late { Fate::Late } else { Fate::Published }
        }
    };
    if fate == Fate::Late {
        known.least = known.least.max(Some(late_at));
        known.most = known.most.max(known.least);
    } else {
        let watermark = Some(event.timestamp_ms - rules.bound_ms);
        (known.least, known.most) = (known.least.max(watermark), known.most.max(watermark));
    }
    (fate, by_timing)
}

/// Each counted event in each window that covers it.
fn windows(counted: &[Event], rules: &Rules) -> BTreeMap<WindowKey, Totals> {
    let mut windows: BTreeMap<WindowKey, (Totals, BTreeSet<&str>)> = BTreeMap::new();
    for event in counted {
        let begins = minute(event.timestamp_ms);
        let key = |kind: &str, start_ms: i64, length: i64, page: Option<&String>| WindowKey {
            kind: kind.to_owned(),
            start_ms,
            end_ms: start_ms + length,
            region: event.region.clone(),
            page: page.cloned(),
        };
        let mut keys = vec![key("region_1m", begins, MINUTE, None), key("page_1m", begins, MINUTE, Some(&event.page))];
        // Every minute is tried as the end of a sliding window.
        let ends = (1..=rules.sliding_ms / MINUTE).map(|n| begins + n * MINUTE).filter(|end| end % rules.slide_ms == 0);
        keys.extend(ends.map(|end| key("region_5m", end - rules.sliding_ms, rules.sliding_ms, None)));
        for key in keys {
            let (totals, users) = windows.entry(key).or_default();
            match event.event_type.as_str() {
                "click" => totals.clicks += 1,
                "purchase" => totals.purchases += 1,
                "add_to_cart" => totals.add_to_cart += 1,
                _ => {}
            }
            totals.cents += event.cents;
            users.insert(&event.user_id);
        }
    }
    windows.into_iter().map(|(key, (totals, users))| (key, Totals { users: users.len() as i64, ..totals })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn click(user: &str, timestamp_ms: i64) -> Event {
        Event {
            user_id: user.into(),
            event_type: "click".into(),
            page: "/".into(),
            product_id: None,
            cents: 0,
            region: "sur".into(),
            timestamp_ms,
        }
    }

    /// Events by partition, append time and event; the fates in the same order.
    fn fates(events: &[(i32, i64, Event)], late: &[(i32, i64)]) -> (Vec<Fate>, u64) {
        let mut topic: BTreeMap<i32, Vec<Delivered>> = BTreeMap::from([(0, vec![]), (1, vec![])]);
        let mut meanings = Meanings::new();
        let mut places = Vec::new();
        for (partition, appended_ms, event) in events {
            let value = Some(Bytes::from(super::super::wire::encode(1, event)));
            meanings.insert(value.clone(), Meaning::Event(event.clone()));
            let records = topic.entry(*partition).or_default();
            let offset = records.len() as i64;
            places.push((*partition, offset));
            records.push(Delivered { offset, appended_ms: *appended_ms, key: None, value });
        }
        let rules = Rules::of(&StreamConfig::specification(), false);
        let expected = expect(&topic, &meanings, &rules, &late.iter().copied().collect(), 0, &[]);
        assert_eq!(expected.ends.len(), events.len());
        (places.iter().map(|at| expected.ends[at].fate).collect(), expected.by_timing)
    }

    #[test]
    fn fates_follow_from_the_order_in_a_partition() {
        let events = [
            (0, 1_000_000, click("a", 1_000_000)),
            (0, 1_000_000, click("a", 1_000_000)),
            (0, 1_000_001, click("b", 600_000)),
            (0, 1_000_002, click("c", 540_000)),
            (0, 1_000_003, click("d", 1_400_000)),
            (1, 1_000_003, click("e", 540_000)),
        ];
        let (fates, by_timing) = fates(&events, &[]);
        let (published, late) = (Fate::Published, Fate::Late);
        assert_eq!(fates, [published, Fate::Deduplicated, late, late, Fate::DeadLettered, published]);
        assert_eq!(by_timing, 1, "the second partition was silent from the beginning");
    }

    #[test]
    fn what_is_judged_as_it_comes_ends_as_what_is_judged_at_the_end() {
        let rules = Rules::of(&StreamConfig::specification(), false);
        let mut random = crate::rng::Stream::root(5);
        let (mut topic, mut meanings) = (BTreeMap::from([(0, Vec::new()), (1, Vec::new())]), Meanings::new());
        let mut running = Running::new(2, rules.clone(), 0);
        let mut found = BTreeMap::new();
        for n in 1_i64..400 {
            let appended_ms = n * 20_000;
            let one = |random: &mut crate::rng::Stream| {
                let behind = if random.chance((1, 8)) { 900_000 } else { 60_000 };
                let mut event = click(&format!("u{}", random.between(0, 3)), appended_ms - random.between(0, behind) as i64);
                event.timestamp_ms += if random.chance((1, 20)) { 400_000 } else { 0 };
                event.timestamp_ms = event.timestamp_ms.max(0) / 5_000 * 5_000;
                (random.between(0, 1) as i32, event)
            };
            let events: Vec<(i32, Event)> = (0..3).map(|_| one(&mut random)).collect();
            let ends = running.moment(appended_ms, &events);
            for ((partition, event), end) in events.into_iter().zip(ends) {
                let value = Some(Bytes::from(super::super::wire::encode(1, &event)));
                meanings.insert(value.clone(), Meaning::Event(event));
                let records: &mut Vec<Delivered> = topic.get_mut(&partition).expect("a partition");
                let offset = records.len() as i64;
                records.push(Delivered { offset, appended_ms, key: None, value });
                found.insert((partition, offset), end);
            }
        }
        let expected = expect(&topic, &meanings, &rules, &BTreeSet::new(), 0, &[]);
        assert_eq!(found.iter().map(|(at, (end, _))| (*at, *end)).collect::<BTreeMap<_, _>>(), expected.ends);
        assert_eq!(found.values().filter(|(_, by_timing)| *by_timing).count() as u64, expected.by_timing);
        for fate in [Fate::Published, Fate::Deduplicated, Fate::Late, Fate::DeadLettered] {
            assert!(expected.of(fate).0 > 0, "{fate} never came");
        }
    }

    #[test]
    fn no_more_is_promised_than_the_slowest_partition_allows() {
        let value = |event: &Event| Some(Bytes::from(super::super::wire::encode(1, event)));
        let (a, b) = (click("a", 10_000), click("b", 50_000));
        let record = |offset, appended_ms, event| Delivered { offset, appended_ms, key: None, value: value(event) };
        let topic = BTreeMap::from([(0, vec![record(0, 10_000, &a)]), (1, vec![record(0, 50_000, &b)])]);
        let meanings = [a, b].map(|event| (value(&event), Meaning::Event(event))).into();
        let rules = Rules::of(&StreamConfig::specification(), false);
        let looks = [9_000, 11_000, 50_000, 69_999, 70_000];
        let expected = expect(&topic, &meanings, &rules, &BTreeSet::new(), 0, &looks);
        assert_eq!(expected.promised, [None, None, Some(-20_000), Some(-20_000), Some(20_000)]);
    }

    #[test]
    fn after_a_silence_the_late_topic_decides_between_two_fates() {
        let events = [(0, 1_000, click("a", 0)), (1, 2_000_000, click("b", 2_000_000)), (0, 2_000_001, click("c", 60_000))];
        assert_eq!(fates(&events, &[]), (vec![Fate::Published; 3], 1));
        assert_eq!(fates(&events, &[(0, 1)]), (vec![Fate::Published, Fate::Published, Fate::Late], 1));
    }
}
