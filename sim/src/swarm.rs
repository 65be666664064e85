//! The swarm: a seed draws a whole scenario, and a failing one is shrunk to the fewest faults that still fail.
//!
//! **Fault budget.** What the platform promises to survive without a person, so that each day is published before its
//! objective with the tables of a run without faults, and so what may be drawn:
//!
//! | mode | promise |
//! |---|---|
//! | 1 | the source is away for at most two hours and back an hour before the objective; it comes back, is full or hangs for at most ten minutes; it dies in the middle of at most one read a night; the dimension API is away for at most a day |
//! | 2 | rows against the contract, without limit: beyond its share the day is held, and so it is for any change of the columns; a stale plan is prepared anew |
//! | 3 | one customer may make nine of ten purchases, products may have names of thousands of characters |
//! | 6 | at most six answers of the store, two of the ledger and two of the warehouse are lost in a night; rows may be doubled without limit |
//! | 7 | the store refuses calls, or one in twenty, for at most two minutes; at most three calls a night vanish and at most three bodies are cut; two reads of the source end early |
//! | 8 | the store or the ledger is full for at most two minutes |
//! | 9 | at most five crashes a night, at most four of them one after the other as the process starts, five minutes apart |
//! | 10 | the worker's clock is wrong by at most ten minutes |
//!
//! What it survives only with a person, and so is told in scenarios but not drawn: credentials that run out and grants that
//! are revoked (the run fails at once and is run again after the rotation), a table or column that is dropped, amounts in
//! another unit, a build that rounds, a table feature of a newer engine, a clock wrong by more than the store allows. What it
//! does not promise: two of those at once, and a store that loses what it acknowledged.

use std::collections::BTreeSet;

use chrono::{DateTime, Days, Duration, NaiveDate, NaiveTime, Utc};
use simulacro_core::{
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::Config,
};

use crate::{
    faults::{
        Fault, StoreFault,
        data::{self, DataFault},
        deploy::DeployFault,
        service::{LedgerCall, ServiceFault},
        source::SourceFault,
    },
    rng::Stream,
    scenario::{Expect, Products, Scenario, Tier, Verdict},
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
        rows_per_day: None,
        models: Vec::new(),
        without: BTreeSet::new(),
        counterfactual: BTreeSet::new(),
        products: root.child("products").chance((1, 4)).then_some(Products { refresh_after_min: 60, refresh_every_h: 6 }),
        account: None,
        operator: Vec::new(),
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
            recovered_by: None,
            detected_within_s: None,
            fired_min: 0,
            converges: true,
        },
    };
    // Swarm testing: most runs have few kinds of fault, so that one does not hide another.
    let mut which = root.child("which");
    for (kind, name, share) in KINDS {
        if which.chance(share) {
            let fault = kind(&mut root.child(name), &scenario);
            scenario.fault.push(fault);
        }
    }
    expect(&mut scenario);
    scenario
}

type Kind = fn(&mut Stream, &Scenario) -> Fault;

/// How to draw a fault, the name of its stream, and in which share of the scenarios it is.
const KINDS: [(Kind, &str, (u64, u64)); 15] = [
    (source_unavailable, "source_unavailable", (1, 3)),
    (store_unavailable, "store_unavailable", (1, 3)),
    (no_space, "no_space", (1, 3)),
    (reply_lost, "reply_lost", (1, 3)),
    (worker_crash, "worker_crash", (1, 3)),
    (duplicated_rows, "duplicated_rows", (1, 3)),
    (null_region, "null_region", (1, 3)),
    (source_ill, "source_ill", (1, 5)),
    (source_cut, "source_cut", (1, 6)),
    (store_slow, "store_slow", (1, 5)),
    (service, "service", (1, 5)),
    (crashes_at_start, "crashes_at_start", (1, 10)),
    (clock, "clock", (1, 8)),
    (skew, "skew", (1, 8)),
    (new_region, "new_region", (1, 10)),
];

/// Sets what must come of the faults that are there: data faults change the tables, so there is no twin to compare with.
/// Which days must be held follows from what the source delivers, see `invariants`.
pub fn expect(scenario: &mut Scenario) {
    scenario.expect.converges = !scenario.fault.iter().any(data::changes_the_tables);
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
    let path = ["", "", "/_delta_log/", "_manifest"][stream.between(0, 3) as usize].to_owned();
    Fault::Store(StoreFault::NoSpace { from, to: from + Duration::seconds(stream.between(1, 120) as i64), path })
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
    Fault::NullRegion { every: every as usize, fecha, to: None }
}

fn source_ill(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let from = night(stream, scenario) + Duration::seconds(stream.between(0, 60) as i64 - 30);
    let to = from + Duration::seconds(stream.between(1, 600) as i64);
    Fault::Source(match stream.between(0, 3) {
        0 => SourceFault::StartingUp { from, to },
        1 => SourceFault::Saturated { from, to, refused: stream.between(1, 4), of: 5 },
        2 => SourceFault::Hangs { from, to },
        _ => SourceFault::PlanInvalidated { at: from },
    })
}

fn source_cut(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let nth_read = stream.between(1, scenario.days * u64::from(scenario.runs));
    Fault::Source(match stream.between(0, 2) {
        0 => {
            let (refused_s, starting_s) = (stream.between(1, 60) as u32, stream.between(1, 120) as u32);
            SourceFault::Crash { nth_read, refused_s, starting_s }
        }
        1 => SourceFault::Truncated { nth_read, times: stream.between(1, 2) },
        _ => SourceFault::ShortRead { nth_read, times: stream.between(1, 2) },
    })
}

fn store_slow(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let from = night(stream, scenario) + Duration::seconds(stream.between(0, 40) as i64);
    let to = from + Duration::seconds(stream.between(1, 120) as i64);
    let path = ["", "raw/", "/_delta_log/", "staging/"][stream.between(0, 3) as usize].to_owned();
    let times = stream.between(1, 3);
    Fault::Store(match stream.between(0, 2) {
        0 => StoreFault::Throttled { from, to, refused: 1, of: stream.between(20, 60) },
        1 => {
            let operation = [Operation::Put, Operation::Get, Operation::List][stream.between(0, 2) as usize];
            StoreFault::BlackHole { operation, path, from, to, times }
        }
        _ => StoreFault::Truncated { path, after: stream.between(0, 20), times },
    })
}

fn service(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let (after, times) = (stream.between(0, 3), stream.between(1, 2));
    Fault::Service(match stream.between(0, 3) {
        0 => {
            let call = [LedgerCall::Start, LedgerCall::Finish, LedgerCall::Keep][stream.between(0, 2) as usize];
            ServiceFault::LedgerReplyLost { call, after, times }
        }
        1 => {
            let from = night(stream, scenario) + Duration::seconds(stream.between(0, 40) as i64);
            ServiceFault::LedgerFull { from, to: from + Duration::seconds(stream.between(1, 120) as i64) }
        }
        2 => ServiceFault::WarehouseReplyLost { after, times },
        _ => ServiceFault::WarehouseTimeout { after, times },
    })
}

fn crashes_at_start(stream: &mut Stream, _: &Scenario) -> Fault {
    Fault::Deploy(DeployFault::CrashesAtStart { starts: stream.between(1, 4), down_s: stream.between(1, 300) as u32 })
}

fn clock(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let from = night(stream, scenario) - Duration::minutes(stream.between(0, 60) as i64);
    let to = from + Duration::minutes(stream.between(1, 120) as i64);
    Fault::Clock { from, to, by_s: stream.between(0, 1_200) as i64 - 600 }
}

fn skew(stream: &mut Stream, _: &Scenario) -> Fault {
    Fault::Data(if stream.chance((1, 2)) {
        DataFault::HotCustomer { share: stream.between(1, 9) as usize, of: 10 }
    } else {
        DataFault::BigRows { every: stream.between(1, 20) as usize, chars: stream.between(100, 4_000) as usize }
    })
}

fn new_region(stream: &mut Stream, scenario: &Scenario) -> Fault {
    let fecha = scenario.fecha + Days::new(stream.between(0, scenario.days - 1));
    let every = [stream.between(1, 20), stream.between(100, 600)][usize::from(stream.chance((1, 2)))] as usize;
    Fault::Data(DataFault::NewRegion { every, name: "islas".into(), fecha, to: scenario.scheduled(fecha + Days::new(30)) })
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
        let faults: Vec<Fault> = (0..300).flat_map(|seed| draw(seed).fault).collect();
        let some = |test: fn(&Fault) -> bool| assert!(faults.iter().any(test));
        some(|f| matches!(f, Fault::SourceUnavailable { .. }));
        some(|f| matches!(f, Fault::Store(StoreFault::Unavailable { .. })));
        some(|f| matches!(f, Fault::Store(StoreFault::NoSpace { .. })));
        some(|f| matches!(f, Fault::Store(StoreFault::ReplyLost { .. })));
        some(|f| matches!(f, Fault::WorkerCrash { .. }));
        some(|f| matches!(f, Fault::DuplicatedRows { .. }));
        some(|f| matches!(f, Fault::NullRegion { .. }));
        some(|f| matches!(f, Fault::Source(SourceFault::StartingUp { .. })));
        some(|f| matches!(f, Fault::Source(SourceFault::Saturated { .. })));
        some(|f| matches!(f, Fault::Source(SourceFault::Hangs { .. })));
        some(|f| matches!(f, Fault::Source(SourceFault::PlanInvalidated { .. })));
        some(|f| matches!(f, Fault::Source(SourceFault::Crash { .. })));
        some(|f| matches!(f, Fault::Source(SourceFault::Truncated { .. })));
        some(|f| matches!(f, Fault::Source(SourceFault::ShortRead { .. })));
        some(|f| matches!(f, Fault::Store(StoreFault::Throttled { .. })));
        some(|f| matches!(f, Fault::Store(StoreFault::BlackHole { .. })));
        some(|f| matches!(f, Fault::Store(StoreFault::Truncated { .. })));
        some(|f| matches!(f, Fault::Service(ServiceFault::LedgerReplyLost { .. })));
        some(|f| matches!(f, Fault::Service(ServiceFault::LedgerFull { .. })));
        some(|f| matches!(f, Fault::Service(ServiceFault::WarehouseReplyLost { .. })));
        some(|f| matches!(f, Fault::Service(ServiceFault::WarehouseTimeout { .. })));
        some(|f| matches!(f, Fault::Deploy(DeployFault::CrashesAtStart { .. })));
        some(|f| matches!(f, Fault::Clock { .. }));
        some(|f| matches!(f, Fault::Data(DataFault::HotCustomer { .. })));
        some(|f| matches!(f, Fault::Data(DataFault::BigRows { .. })));
        some(|f| matches!(f, Fault::Data(DataFault::NewRegion { .. })));
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
