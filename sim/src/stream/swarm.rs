//! The swarm of stream stories: a seed draws a whole story, and a failing one is shrunk.
//!
//! **Fault budget.** What the job promises to survive, and so what may be drawn: two to eight workers, each of which may
//! die up to four times, stand still or be cut off for up to forty seconds (longer than its session), be replaced while it
//! stands still, leave, be thrown out of its group, or have a clock that is wrong by up to an hour; a broker that is
//! restarted or cannot write for up to twenty seconds; a registry that is away for up to half a minute; lost replies
//! without limit, at most a dozen in a row; producers whose clocks are wrong by up to an hour. All faults are over when
//! production is.

use super::{
    faults::{Loses, Side, StreamFault, When},
    invariants,
    scenario::{Kind, Silence, StreamExpect, StreamScenario, Workload},
};
use crate::{
    broker::RequestKind,
    rng::Stream,
    scenario::{Tier, Verdict},
};
use simulacro_core::streaming::config::StreamConfig;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// The configuration of all drawn stories: as specified, with a session that ends within a story, and small records.
pub fn config() -> StreamConfig {
    StreamConfig {
        session_timeout: Duration::from_secs(6),
        exact_users_max: 2_048,
        record_bytes_max: 32 << 10,
        click_bytes_max: 30_000,
        ..StreamConfig::specification()
    }
}

/// Draws a story from a seed: size of the world, rates, which faults, when, how hard.
pub fn draw(seed: u64) -> StreamScenario {
    let root = Stream::root(seed).child("stream swarm");
    let mut world = root.child("world");
    let partitions = world.between(1, 6) as i32;
    let duration_s = world.between(240, 720);
    let mut rates = root.child("rates");
    let mut share = |max: u64| if rates.chance((1, 2)) { rates.between(0, max) } else { 0 };
    let workload = Workload {
        producers: world.between(1, 3) as usize,
        partitions,
        per_minute: world.between(60, 400),
        duration_s,
        users: world.between(1, 300),
        pages: world.between(1, 12),
        hot: share(900),
        duplicates: share(200),
        duplicate_after_s: world.between(1, 120),
        out_of_order: share(200),
        late: share(60),
        ahead: share(40),
        future: share(40),
        damaged: share(80),
        invalid: share(80),
        on_the_edge: 0,
        silent: Vec::new(),
        arrival: Vec::new(),
    };
    let mut config = config();
    config.merge_partitions = world.between(1, 4) as i32;
    config.commit_interval = Duration::from_millis(world.between(200, 3_000));
    config.commit_records_max = world.between(20, 50_000) as usize;
    let mut story = StreamScenario {
        kind: Kind::Stream,
        summary: "drawn from a seed".into(),
        tier: Tier::Nightly,
        seeds: vec![seed],
        start: chrono::DateTime::UNIX_EPOCH + Duration::from_secs(1_710_684_000),
        tick_ms: 50,
        workers: world.between(2, 8) as usize,
        workers_from_s: if world.chance((1, 4)) { world.between(1, 120) } else { 0 },
        patience_s: 300,
        sabotage: None,
        counterfactual: None,
        workload,
        config,
        cost: None,
        watch: None,
        account: None,
        operator: Vec::new(),
        fault: Vec::new(),
        expect: StreamExpect {
            verdict: Verdict::Holds,
            broken: Vec::new(),
            fired_min: 0,
            lag_min: 0,
            fates_min: BTreeMap::new(),
            lag_below: None,
            gave_up: BTreeSet::new(),
            alerts: None,
            detected_within_s: None,
            reading: Vec::new(),
        },
    };
    let mut silence = root.child("silence");
    if partitions > 1 && silence.chance((1, 4)) {
        let from_s = silence.between(0, duration_s - 150);
        let to_s = if silence.chance((1, 2)) { duration_s * 2 + 600 } else { silence.between(from_s + 80, duration_s) };
        let partition = silence.between(0, partitions.unsigned_abs() as u64 - 1) as i32;
        story.workload.silent.push(Silence { partition, from_s, to_s });
    }
    // Swarm testing: most runs have few kinds of fault, so that one does not hide another.
    let mut which = root.child("which");
    for (kind, name, most) in KINDS {
        if which.chance((1, 4)) {
            let mut stream = root.child(name);
            for _ in 0..stream.between(1, most) {
                let fault = kind(&mut stream, &story);
                story.fault.push(fault);
            }
        }
    }
    // A worker cannot start without the registry, and one whose clock jumps finds that its session is over when it commits.
    let codes = story.fault.iter().flat_map(|fault| match fault {
        StreamFault::RegistryDown { .. } => &["ECONNREFUSED"][..],
        StreamFault::Clock { .. } => &["UNKNOWN_MEMBER_ID"][..],
        StreamFault::WorkerFreeze { replaced: true, .. } => &invariants::FENCED[..],
        _ => &[],
    });
    story.expect.gave_up = codes.map(|&code| code.to_owned()).collect();
    story
}

type Make = fn(&mut Stream, &StreamScenario) -> StreamFault;

const KINDS: [(Make, &str, u64); 13] = [
    (crash, "crash", 4),
    (freeze, "freeze", 2),
    (replaced, "replaced", 1),
    (leaves, "leaves", 4),
    (expired, "expired", 3),
    (cut_worker, "cut_worker", 3),
    (cut_producer, "cut_producer", 2),
    (lost_reply, "lost_reply", 4),
    (broker_restart, "broker_restart", 2),
    (disk_full, "disk_full", 1),
    (registry_down, "registry_down", 1),
    (slow, "slow", 2),
    (clock, "clock", 2),
];

fn worker(stream: &mut Stream, story: &StreamScenario) -> usize {
    stream.between(0, story.workers as u64 - 1) as usize
}

/// A time at which faults may begin, so that one which lasts `lasts` seconds ends with production.
fn time(stream: &mut Stream, story: &StreamScenario, lasts: u64) -> u64 {
    stream.between(5, story.workload.duration_s.saturating_sub(lasts).max(6))
}

fn when(stream: &mut Stream, story: &StreamScenario, lasts: u64) -> When {
    if stream.chance((1, 3)) {
        return When::Time { at_s: time(stream, story, lasts) };
    }
    let kinds =
        [RequestKind::Produce, RequestKind::TxnOffsets, RequestKind::EndTxn, RequestKind::EndTxn, RequestKind::Membership];
    let request = kinds[stream.between(0, kinds.len() as u64 - 1) as usize];
    // A member joins once; a transaction ends each time there is something to commit.
    let nth = if request == RequestKind::Membership { 1 } else { stream.between(1, 40) };
    When::Request { request, nth, side: if stream.chance((1, 2)) { Side::Before } else { Side::After } }
}

fn crash(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let down_s = stream.between(0, 40);
    StreamFault::WorkerCrash { worker: worker(stream, story), when: when(stream, story, down_s), down_s }
}

fn freeze(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let for_s = stream.between(2, 40);
    StreamFault::WorkerFreeze { worker: worker(stream, story), when: when(stream, story, for_s), for_s, replaced: false }
}

fn replaced(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let for_s = stream.between(2, 40);
    StreamFault::WorkerFreeze { worker: worker(stream, story), when: when(stream, story, for_s), for_s, replaced: true }
}

fn leaves(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let for_s = stream.between(1, 60);
    StreamFault::WorkerLeaves { worker: worker(stream, story), at_s: time(stream, story, for_s), for_s }
}

fn expired(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    StreamFault::SessionExpired { worker: worker(stream, story), at_s: time(stream, story, 10) }
}

fn cut(stream: &mut Stream, story: &StreamScenario, host: String) -> StreamFault {
    let lasts = stream.between(1, 40);
    let from_s = time(stream, story, lasts);
    let loses = if stream.chance((1, 2)) { Loses::Requests } else { Loses::Replies };
    StreamFault::Partition { host, loses, from_s, to_s: from_s + lasts }
}

fn cut_worker(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let host = format!("worker-{}", worker(stream, story));
    cut(stream, story, host)
}

fn producer(stream: &mut Stream, story: &StreamScenario) -> String {
    format!("producer-{}", stream.between(0, story.workload.producers as u64 - 1))
}

fn cut_producer(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let host = producer(stream, story);
    cut(stream, story, host)
}

fn lost_reply(stream: &mut Stream, _: &StreamScenario) -> StreamFault {
    let kinds = [
        RequestKind::EndTxn,
        RequestKind::EndTxn,
        RequestKind::Produce,
        RequestKind::TxnOffsets,
        RequestKind::Membership,
        RequestKind::Heartbeat,
        RequestKind::InitProducer,
        RequestKind::Fetch,
    ];
    let of = kinds[stream.between(0, kinds.len() as u64 - 1) as usize];
    StreamFault::LostReply { of, nth: stream.between(1, 200), count: stream.between(1, 12) }
}

fn broker_restart(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let down_s = stream.between(1, 20);
    StreamFault::BrokerRestart { at_s: time(stream, story, down_s), down_s }
}

fn disk_full(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let lasts = stream.between(1, 20);
    let from_s = time(stream, story, lasts);
    StreamFault::DiskFull { from_s, to_s: from_s + lasts }
}

fn registry_down(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let lasts = stream.between(1, 30);
    let from_s = if stream.chance((1, 2)) { story.workers_from_s } else { time(stream, story, lasts) };
    StreamFault::RegistryDown { from_s, to_s: from_s + lasts }
}

fn slow(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let lasts = stream.between(10, 120);
    let from_s = time(stream, story, lasts);
    let host = format!("worker-{}", worker(stream, story));
    StreamFault::Slow { host, from_s, to_s: from_s + lasts, by_ms: stream.between(10, 500) }
}

fn clock(stream: &mut Stream, story: &StreamScenario) -> StreamFault {
    let lasts = stream.between(10, 400);
    let from_s = time(stream, story, lasts);
    let ms = stream.between(500, 3_600_000).cast_signed();
    let host = if stream.chance((1, 2)) { producer(stream, story) } else { format!("worker-{}", worker(stream, story)) };
    StreamFault::Clock { host, from_s, to_s: from_s + lasts, by_ms: if stream.chance((1, 2)) { ms } else { -ms } }
}

/// Smaller candidates of a failing story, the greatest step first: without a fault, with half the time, fewer workers,
/// fewer producers, fewer partitions, without one of the things that are wrong with events.
pub fn smaller(story: &StreamScenario) -> Vec<StreamScenario> {
    let mut out = Vec::new();
    for skip in 0..story.fault.len() {
        let mut without = story.clone();
        without.fault.remove(skip);
        out.push(without);
    }
    let fits = |story: &StreamScenario| story.fault.iter().all(|fault| fault.check(story).is_ok());
    let mut put = |change: &dyn Fn(&mut StreamScenario)| {
        let mut changed = story.clone();
        change(&mut changed);
        if changed != *story && fits(&changed) {
            out.push(changed);
        }
    };
    let workload = &story.workload;
    let needed = story.fault.iter().map(StreamFault::over_s).max().unwrap_or(0);
    let half = (workload.duration_s / 2).max(60).max(needed);
    put(&|s| s.workload.duration_s = half.min(s.workload.duration_s));
    put(&|s| s.workers = (s.workers / 2).max(1));
    put(&|s| s.workers = (s.workers - 1).max(1));
    put(&|s| s.workload.producers = 1);
    put(&|s| s.workload.silent.clear());
    put(&|s| s.workload.per_minute = (s.workload.per_minute / 2).max(30));
    put(&|s| s.workers_from_s = 0);
    put(&|s| {
        if s.workload.silent.is_empty() {
            s.workload.partitions = (s.workload.partitions / 2).max(1);
        }
    });
    put(&|s| s.config.merge_partitions = 1);
    let zeros: [fn(&mut Workload); 8] = [
        |w| w.hot = 0,
        |w| w.duplicates = 0,
        |w| w.out_of_order = 0,
        |w| w.late = 0,
        |w| w.ahead = 0,
        |w| w.future = 0,
        |w| w.damaged = 0,
        |w| w.invalid = 0,
    ];
    for zero in zeros {
        put(&|s| zero(&mut s.workload));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_one_story_and_it_is_valid() {
        for seed in 0..300 {
            let story = draw(seed);
            assert_eq!(story, draw(seed));
            let text = story.to_toml().expect("text");
            assert_eq!(StreamScenario::parse(&text), Ok(story), "seed {seed}:\n{text}");
        }
    }

    #[test]
    fn every_kind_of_fault_is_drawn_and_over_in_time() {
        let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
        for seed in 0..200 {
            let story = draw(seed);
            for fault in &story.fault {
                *seen.entry(fault.mode()).or_default() += 1;
                assert!(fault.over_s() <= story.workload.duration_s.max(story.workers_from_s + 30), "seed {seed}: {fault:?}");
            }
        }
        let catalogue: Vec<&str> = super::super::faults::CATALOGUE.iter().map(|entry| entry.mode).collect();
        assert_eq!(seen.len(), catalogue.len(), "{seen:?}");
    }

    #[test]
    fn smaller_stories_are_valid_and_lead_to_an_end() {
        for seed in 0..20 {
            let mut story = draw(seed);
            for _ in 0..200 {
                let candidates = smaller(&story);
                for candidate in &candidates {
                    assert_ne!(*candidate, story);
                    assert_eq!(StreamScenario::parse(&candidate.to_toml().expect("text")).as_ref(), Ok(candidate));
                }
                match candidates.into_iter().next() {
                    Some(next) => story = next,
                    None => break,
                }
            }
            assert!(smaller(&story).is_empty(), "seed {seed}: {story:?}");
        }
    }
}
