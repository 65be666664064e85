//! The swarm: a seed draws a whole scenario, and a failing one is shrunk to the fewest faults that still fail.
//!
//! **Fault budget.** What the platform promises to survive, and so what may be drawn: the source is away for at most two
//! hours and back an hour before the objective; the store refuses or is full for at most two minutes; at most six answers
//! are lost and at most five crashes happen in a night; rows may be doubled and regions may be null
//! without limit: beyond the contract's share the day must be held.

use chrono::{DateTime, Days, Duration, NaiveDate, NaiveTime, Utc};
use simulacro_core::{
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::Config,
};

use crate::{
    faults::{Fault, StoreFault},
    rng::Stream,
    scenario::{Expect, Scenario, Tier, Verdict},
    store::Operation,
};

/// The history has purchases on each day from here, for [`HISTORY_DAYS`] days.
const HISTORY_FROM: NaiveDate = NaiveDate::from_ymd_opt(1997, 1, 1).expect("a date");
const HISTORY_DAYS: u64 = 546;
/// The platform's day in all drawn worlds.
const FECHA: NaiveDate = NaiveDate::from_ymd_opt(2024, 3, 17).expect("a date");
const SCHEDULE: NaiveTime = NaiveTime::from_hms_opt(3, 0, 0).expect("a time");
const SLA: NaiveTime = NaiveTime::from_hms_opt(6, 0, 0).expect("a time");

/// Draws a scenario from a seed: size of the world, which faults, when, how hard.
pub fn draw(seed: u64) -> Scenario {
    let root = Stream::root(seed).child("swarm");
    let mut world = root.child("world");
    let days = world.between(1, 3);
    let mut scenario = Scenario {
        summary: "drawn from a seed".into(),
        tier: Tier::Nightly,
        seeds: vec![seed],
        purchases_from: HISTORY_FROM + Days::new(world.between(0, HISTORY_DAYS - days)),
        fecha: FECHA,
        days,
        schedule: SCHEDULE,
        dispatch_s: 15,
        sla: SLA,
        tick_ms: 1_000,
        runs: world.between(1, 2) as u32,
        config: Config {
            source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
            retry: RetryPolicy { retries: 5, backoff_s: 300, deadline_s: 9_000 },
            alert_after_s: 60,
            startup_s: 1,
        },
        fault: Vec::new(),
        expect: Expect {
            verdict: Verdict::Holds,
            broken: Vec::new(),
            alerts: None,
            attempts: None,
            held_by: None,
            fired_min: 0,
            converges: true,
        },
    };
    // Swarm testing: most runs have few kinds of fault, so that one does not hide another.
    let mut which = root.child("which");
    for (kind, name) in KINDS {
        if which.chance((1, 3)) {
            let fault = kind(&mut root.child(name), &scenario);
            scenario.fault.push(fault);
        }
    }
    expect(&mut scenario);
    scenario
}

type Kind = fn(&mut Stream, &Scenario) -> Fault;

const KINDS: [(Kind, &str); 7] = [
    (source_unavailable, "source_unavailable"),
    (store_unavailable, "store_unavailable"),
    (no_space, "no_space"),
    (reply_lost, "reply_lost"),
    (worker_crash, "worker_crash"),
    (duplicated_rows, "duplicated_rows"),
    (null_region, "null_region"),
];

/// Sets what must come of the faults that are there: data faults change the tables, so there is no twin to compare with.
/// Which days must be held follows from what the source delivers, see `invariants`.
pub fn expect(scenario: &mut Scenario) {
    let data = |f: &Fault| matches!(f, Fault::NullRegion { .. } | Fault::DuplicatedRows { .. } | Fault::RenamedColumn { .. });
    scenario.expect.converges = !scenario.fault.iter().any(data);
}

/// The start of the run of one of the days.
fn night(stream: &mut Stream, scenario: &Scenario) -> DateTime<Utc> {
    scenario.scheduled(scenario.fecha + Days::new(stream.between(0, scenario.days - 1)))
}

fn source_unavailable(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let from = night(stream, scenario) + Duration::minutes(stream.between(0, 60) as i64 - 60);
    Fault::SourceUnavailable { from, to: from + Duration::minutes(stream.between(1, 120) as i64) }
}

fn store_unavailable(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let operation = [Operation::Put, Operation::Get, Operation::List][stream.between(0, 2) as usize];
    let from = night(stream, scenario) + Duration::seconds(stream.between(0, 40) as i64);
    let to = from + Duration::seconds(stream.between(1, 120) as i64);
    let path = ["", "raw/", "/_delta_log/", "marts/"][stream.between(0, 3) as usize].to_owned();
    Fault::Store(StoreFault::Unavailable { operation, path, from, to, times: stream.between(1, 20) })
}

fn no_space(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let from = night(stream, scenario) + Duration::seconds(stream.between(0, 40) as i64);
    Fault::Store(StoreFault::NoSpace { from, to: from + Duration::seconds(stream.between(1, 120) as i64) })
}

fn reply_lost(stream: &mut Stream, _: &Scenario) -> Fault {
    let path = ["", "raw/", "_manifest", "/_delta_log/", ".parquet"][stream.between(0, 4) as usize].to_owned();
    let (after, times) = (stream.between(0, 6), stream.between(1, 6));
    Fault::Store(StoreFault::ReplyLost { operation: Operation::Put, path, after, times })
}

fn worker_crash(stream: &mut Stream, scenario: &Scenario) -> Fault {
    // A day costs about a hundred calls to the store.
    let most = 100 * scenario.days * u64::from(scenario.runs);
    let at_calls = (0..stream.between(1, 5)).map(|_| stream.between(1, most)).collect();
    Fault::WorkerCrash { at_calls, down_s: stream.between(1, 300) }
}

fn duplicated_rows(stream: &mut Stream, _: &Scenario) -> Fault {
    Fault::DuplicatedRows { every: stream.between(1, 20) as usize }
}

fn null_region(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let fecha = Some(scenario.fecha + Days::new(stream.between(0, scenario.days - 1)));
    // From a storm to a single row in a busy day, on both sides of the contract's share.
    let every = [stream.between(1, 20), stream.between(100, 600)][usize::from(stream.chance((1, 2)))];
    Fault::NullRegion { every: every as usize, fecha }
}

/// Smaller candidates of a failing scenario, the greatest step first: without a fault, with fewer days, fewer runs,
/// fewer crashes, fewer lost answers.
pub fn smaller(scenario: &Scenario) -> Vec<Scenario> {
    let mut out = Vec::new();
    for skip in 0..scenario.fault.len() {
        let mut without = scenario.clone();
        without.fault.remove(skip);
        expect(&mut without);
        out.push(without);
    }
    if scenario.days > 1 {
        out.push(Scenario { days: 1, ..scenario.clone() });
        out.push(Scenario { days: scenario.days - 1, ..scenario.clone() });
    }
    if scenario.runs > 1 {
        out.push(Scenario { runs: 1, ..scenario.clone() });
    }
    for (index, fault) in scenario.fault.iter().enumerate() {
        let mut put = |fault: Fault| {
            let mut changed = scenario.clone();
            changed.fault[index] = fault;
            out.push(changed);
        };
        match fault {
            Fault::WorkerCrash { at_calls, down_s } if at_calls.len() > 1 => {
                for skip in 0..at_calls.len() {
                    let mut fewer = at_calls.clone();
                    fewer.remove(skip);
                    put(Fault::WorkerCrash { at_calls: fewer, down_s: *down_s });
                }
            }
            Fault::Store(StoreFault::ReplyLost { operation, path, after, times }) if *times > 1 => {
                let (operation, path) = (*operation, path.clone());
                put(Fault::Store(StoreFault::ReplyLost { operation, path, after: *after, times: times / 2 }));
            }
            Fault::Store(StoreFault::Unavailable { operation, path, from, to, times }) if *times > 1 => {
                let (operation, path, times) = (*operation, path.clone(), times / 2);
                put(Fault::Store(StoreFault::Unavailable { operation, path, from: *from, to: *to, times }));
            }
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_one_scenario_and_it_is_valid() {
        for seed in 0..200 {
            let scenario = draw(seed);
            assert_eq!(scenario, draw(seed));
            let text = scenario.to_toml().expect("text");
            assert_eq!(Scenario::parse(&text), Ok(scenario), "seed {seed}:\n{text}");
        }
    }

    #[test]
    fn every_kind_of_fault_is_drawn() {
        let faults: Vec<Fault> = (0..60).flat_map(|seed| draw(seed).fault).collect();
        let some = |test: fn(&Fault) -> bool| assert!(faults.iter().any(test));
        some(|f| matches!(f, Fault::SourceUnavailable { .. }));
        some(|f| matches!(f, Fault::Store(StoreFault::Unavailable { .. })));
        some(|f| matches!(f, Fault::Store(StoreFault::NoSpace { .. })));
        some(|f| matches!(f, Fault::Store(StoreFault::ReplyLost { .. })));
        some(|f| matches!(f, Fault::WorkerCrash { .. }));
        some(|f| matches!(f, Fault::DuplicatedRows { .. }));
        some(|f| matches!(f, Fault::NullRegion { .. }));
    }

    #[test]
    fn smaller_scenarios_are_smaller() {
        let size = |s: &Scenario| {
            let inside = |f: &Fault| match f {
                Fault::WorkerCrash { at_calls, .. } => at_calls.len() as u64,
                Fault::Store(StoreFault::ReplyLost { times, .. } | StoreFault::Unavailable { times, .. }) => *times,
                _ => 1,
            };
            s.days + u64::from(s.runs) + s.fault.iter().map(inside).sum::<u64>()
        };
        for seed in 0..50 {
            let scenario = draw(seed);
            assert!(smaller(&scenario).iter().all(|s| size(s) < size(&scenario)), "seed {seed}");
        }
    }
}
