//! The swarm of the platform: a seed draws a whole story of a few days, and what must come of it follows from what was drawn.
//!
//! **Fault budget.** What the platform promises to survive with a person who comes when he is told, so that each day is
//! published with the tables of a story without faults, the right alerts are raised and no others, and what was open is closed
//! again; and so what may be drawn:
//!
//! | mode | promise |
//! |---|---|
//! | 1 | the source is away for at most two and a half hours over a run, the API for at most eight; after them comes the run, or whoever was told |
//! | 2 | a column has another name, there is one more, or one may be null, until somebody has mended it, for at most sixteen hours |
//! | 3 | one customer and one product have a hundred times their usual share of a day |
//! | 4 | the streaming job reads half as fast as events come until somebody has mended it, for at most sixteen hours; its processes are away for at most an hour |
//! | 5 | a password or a token has expired until it is rotated, for at most sixteen hours |
//! | 6 | every third row comes twice; three answers to writes are lost |
//! | 7 | the store refuses everything for at most twenty minutes |
//! | 8 | the store has no space until some is made, for at most sixteen hours |
//! | 9 | a deploy keeps the orchestrator away for at most forty minutes |
//! | 10 | the clock of the orchestrator, or of who sends events, is off by at most an hour, for at most four hours |
//!
//! At most three of them in a story, each of another mode, at whatever times: one alone, or a pair that is known to compound,
//! and now and then one more. Each is over, by itself or by the operator, long before patience ends. A day that a fault was
//! there for may be late; all others are in time. The API fails once there is a version of its products: before that a day is
//! held, since there is none that may serve instead. What fails on a Sunday at the weekly maintenance is made good on the next.
//!
//! What is left out: two faults of one mode, of which the world counts the first; death in the middle of a commit and single
//! requests that fail, which the swarms of [`crate::swarm`] and [`crate::stream::swarm`] have.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Datelike, Days, NaiveDate, NaiveTime, TimeDelta, Timelike, Utc, Weekday};
use simulacro_core::orchestrator::LoopConfig;

use super::{
    faults::{Begins, CATALOGUE, Fault, Mode, SIGNATURE_S},
    scenario::{Drawn, Kind, PlatformExpect, PlatformScenario, RUN_AT, StreamSize},
    shop::ShopSize,
};
use crate::{
    rng::Stream,
    scenario::{Tier, Verdict},
};

/// A Monday: stories begin in the week after it, so that some have the maintenance of a Sunday.
const MONDAY: NaiveDate = NaiveDate::from_ymd_opt(2024, 3, 4).expect("a date");
const SLA: NaiveTime = NaiveTime::from_hms_opt(6, 0, 0).expect("a time");

/// Modes that make each other worse, the first of which may come first:
/// what is full or expired is met by a process that has just started, an answer is lost and nobody is left to ask again, a
/// source comes back otherwise than it went, rows that are set aside come twice, two clocks are wrong, what is stale becomes
/// too old, who is behind dies, and nobody looks while something happens.
const PAIRS: [(Mode, Mode); 26] = [
    (Mode::DiskFull, Mode::BadDeploy),
    (Mode::DiskFull, Mode::StoreTokenExpired),
    (Mode::DiskFull, Mode::AnswersLost),
    (Mode::AnswersLost, Mode::BadDeploy),
    (Mode::StoreTimeouts, Mode::AnswersLost),
    (Mode::StoreTimeouts, Mode::BadDeploy),
    (Mode::SourceAway, Mode::PasswordExpired),
    (Mode::SourceAway, Mode::ColumnRenamed),
    (Mode::SourceAway, Mode::RowsTwice),
    (Mode::SourceAway, Mode::BadDeploy),
    (Mode::SourceAway, Mode::StoreTimeouts),
    (Mode::ColumnAdded, Mode::NotNullDropped),
    (Mode::NotNullDropped, Mode::RowsTwice),
    (Mode::NotNullDropped, Mode::BadDeploy),
    (Mode::HotKey, Mode::RowsTwice),
    (Mode::ApiAway, Mode::ApiTokenExpired),
    (Mode::ApiAway, Mode::ClockSkew),
    (Mode::ApiTokenExpired, Mode::SourceAway),
    (Mode::ClockSkew, Mode::BadDeploy),
    (Mode::ClockSkew, Mode::StoreTokenExpired),
    (Mode::ClockSkew, Mode::SourceAway),
    (Mode::StreamSlow, Mode::StreamCrash),
    (Mode::StreamSlow, Mode::BadDeploy),
    (Mode::StreamCrash, Mode::ProducerClock),
    (Mode::StreamCrash, Mode::SourceAway),
    (Mode::ProducerClock, Mode::SourceAway),
];

/// Modes that keep nothing from happening: rows that come twice are dropped, and a hot key is more rows.
const MILD: [Mode; 2] = [Mode::HotKey, Mode::RowsTwice];

fn seconds(s: u64) -> TimeDelta {
    TimeDelta::seconds(i64::try_from(s).unwrap_or(i64::MAX / 1_000_000))
}

fn run_at(date: NaiveDate) -> DateTime<Utc> {
    date.and_time(RUN_AT).and_utc()
}

/// Draws a story from a seed: size of the world, with a stream or without, which faults, when, how long, and how soon they
/// are ended.
pub fn draw(seed: u64) -> PlatformScenario {
    let root = Stream::root(seed).child("platform").child("swarm");
    let (mut world, mut stream) = (root.child("world"), root.child("stream"));
    let mut story = PlatformScenario {
        kind: Kind::Platform,
        summary: "drawn from a seed".into(),
        tier: Tier::Nightly,
        seeds: vec![seed],
        fecha: MONDAY + Days::new(world.between(0, 6)),
        days: world.between(2, 4),
        sla: SLA,
        models: if world.chance((1, 6)) { "all" } else { "metricas_diarias" }.into(),
        drawn: Drawn::None,
        patience_h: 48,
        without: BTreeSet::new(),
        sabotage: None,
        shop: ShopSize {
            sales_per_day: world.between(20, 300),
            growth_percent: world.between(0, 300),
            customers: world.between(10, 300),
            products: world.between(1, 60),
        },
        stream: stream.chance((1, 3)).then(|| size(&mut stream)),
        orchestrator: LoopConfig::default(),
        assets: BTreeMap::new(),
        fault: Vec::new(),
        expect: PlatformExpect {
            verdict: Verdict::Holds,
            broken: Vec::new(),
            slos_met: Vec::new(),
            told: BTreeSet::new(),
            fired_min: 0,
            converges: true,
        },
    };
    if story.stream.is_some() {
        // Models of events have none here, and a day of minutes is long.
        (story.models, story.days) = ("metricas_diarias".into(), story.days.min(3));
    }
    story.fault = faults(&root, &story);
    story.fault.sort_by_key(|fault| (fault.from, fault.mode));
    if is_maintained_badly(&story) {
        story.patience_h += 24 * 7;
    }
    expect(&mut story);
    story
}

/// Whether the weekly maintenance may fail, so that its incident is open for a week.
fn is_maintained_badly(story: &PlatformScenario) -> bool {
    // The maintenance begins at half past four and is tried again for half a day.
    let turns = story.fechas().map(|fecha| fecha + Days::new(1)).filter(|date| date.weekday() == Weekday::Sun);
    let begins = turns.map(|date| date.and_time(NaiveTime::MIN).and_utc() + TimeDelta::minutes(270));
    let touches = |fault: &Fault| match fault.mode {
        Mode::StoreTokenExpired | Mode::AnswersLost | Mode::StoreTimeouts | Mode::DiskFull => true,
        mode => watches(mode),
    };
    let is_near = |at: DateTime<Utc>| {
        let near = |fault: &Fault| fault.from < at + TimeDelta::hours(13) && fault.to() + TimeDelta::hours(1) > at;
        story.fault.iter().any(|fault| touches(fault) && near(fault))
    };
    begins.into_iter().any(is_near)
}

fn size(stream: &mut Stream) -> StreamSize {
    StreamSize {
        events_per_day: stream.between(500, 4_000),
        workers: stream.between(1, 2),
        partitions: [1, 2, 2, 4][stream.between(0, 3) as usize],
        pages: stream.between(1, 6),
        hot: if stream.chance((1, 2)) { stream.between(0, 900) } else { 0 },
        tick_s: [60, 60, 45, 90][stream.between(0, 3) as usize],
        sink_every_s: stream.between(1_800, 14_400),
        ..StreamSize::standard()
    }
}

/// Which faults: most stories have a pair, some one alone, a few one more beside a pair.
fn faults(root: &Stream, story: &PlatformScenario) -> Vec<Fault> {
    let mut which = root.child("which");
    // Dimensions come on the first date, and what comes at any time has the last one left out.
    let is_possible = |mode: Mode| (story.stream.is_some() || !mode.entry().needs_stream) && (story.days > 2 || !is_of_api(mode));
    let mut out = Vec::new();
    if which.chance((3, 5)) {
        let pairs: Vec<_> = PAIRS.iter().filter(|(a, b)| is_possible(*a) && is_possible(*b)).collect();
        let (first, second) = pairs[which.between(0, pairs.len() as u64 - 1) as usize];
        out.extend(pair(&mut root.child("pair"), story, *first, *second));
    }
    if out.is_empty() || which.chance((1, 4)) {
        let is_new = |mode: Mode| is_possible(mode) && !out.iter().any(|fault: &Fault| fault.mode == mode);
        let modes: Vec<Mode> = CATALOGUE.iter().map(|entry| entry.mode).filter(|mode| is_new(*mode)).collect();
        let mode = modes[which.between(0, modes.len() as u64 - 1) as usize];
        let mut alone = root.child("alone");
        let date = date(&mut alone, story, &[mode]);
        out.push(Fault::draw(mode, date, run_at(date), &mut alone));
        if !has_dimensions(story, &out) {
            out.pop();
        }
    }
    out
}

/// Whether a fault of this mode keeps the API's dimensions from coming.
fn is_of_api(mode: Mode) -> bool {
    matches!(mode, Mode::ApiAway | Mode::ApiTokenExpired)
}

/// Whether nothing keeps the API's dimensions from coming before one of these faults keeps them from coming again.
fn has_dimensions(story: &PlatformScenario, faults: &[Fault]) -> bool {
    let came = run_at(story.fecha + Days::new(1)) + TimeDelta::hours(4);
    let is_after = |fault: &Fault| MILD.contains(&fault.mode) || fault.mode.entry().needs_stream || fault.from > came;
    !faults.iter().any(|fault| is_of_api(fault.mode)) || faults.iter().all(is_after)
}

/// The date of a run on which faults of these modes may begin. On that of the last one only what is there at the run: the
/// rest of that day is no part of the story.
fn date(random: &mut Stream, story: &PlatformScenario, modes: &[Mode]) -> NaiveDate {
    let is_of_run = |mode: &Mode| match mode.entry().begins {
        Begins::AtTheRun | Begins::WithTheDay | Begins::Before => true,
        Begins::AtAnyWork | Begins::AtARefresh | Begins::AnyTime | Begins::InTheDaytime => false,
    };
    let last = if modes.iter().all(is_of_run) { story.days } else { story.days - 1 };
    let first = if modes.iter().any(|mode| is_of_api(*mode)) { 2 } else { 1 };
    story.fecha + Days::new(random.between(first, last))
}

/// Two faults that meet: on the same date, each as it comes; or the second while the first is there, as it ends, or as the
/// run begins.
fn pair(random: &mut Stream, story: &PlatformScenario, first: Mode, second: Mode) -> [Fault; 2] {
    let date = date(random, story, &[first, second]);
    let run = run_at(date);
    let first = Fault::draw(first, date, run, random);
    let mut second = Fault::draw(second, date, run, random);
    // The operator hears of it when it is there at the run, or before.
    let over = if first.response_s == 0 { first.to() } else { first.from.max(run) + seconds(first.response_s) };
    let meets = match random.between(0, 3) {
        0 => second.from,
        1 => first.from + seconds(random.between(0, (over - first.from).num_seconds().unsigned_abs().saturating_sub(1))),
        2 => over - seconds(300) + seconds(random.between(0, 600)),
        // A run of a small day takes less than a second.
        _ => run + TimeDelta::milliseconds(random.between(0, 800).cast_signed()),
    };
    let is_within = (story.fecha.and_time(NaiveTime::MIN).and_utc()..story.due(story.last())).contains(&meets);
    if is_within && second.mode.entry().begins != Begins::WithTheDay {
        second.from = meets;
    }
    [first, second]
}

/// Sets what must come of the faults that are there.
fn expect(story: &mut PlatformScenario) {
    let faults = &story.fault;
    let is_of_stream = |fault: &Fault| fault.mode.entry().needs_stream;
    let is_certain = |fault: &&Fault| strikes(story, fault) && !faults.iter().any(|other| hides(other, fault));
    let fired_min = u64::from(faults.iter().all(|fault| is_certain(&fault)));
    let loud = faults.iter().filter(is_certain).filter(|fault| is_loud(story, fault));
    let told = loud.map(|fault| fault.mode).collect();
    // A stream's oracle is exact by itself, and minutes of a twin cost as much as its own.
    let converges = story.stream.is_none();
    let is_batch_quiet = faults.iter().all(|fault| is_of_stream(fault) || MILD.contains(&fault.mode));
    // Whoever watches is well, and has nothing to tell.
    let is_stream_quiet = story.stream.is_some() && !faults.iter().any(|fault| is_of_stream(fault) || watches(fault.mode));
    let promised: [(bool, &[&str]); 3] = [
        (is_batch_quiet, &["batch_freshness", "data_quality_score", "batch_completeness"]),
        (is_stream_quiet, &["streaming_freshness"]),
        (is_batch_quiet && is_stream_quiet, &["batch_streaming_reconciliation"]),
    ];
    let met = promised.iter().filter(|(is_promised, _)| *is_promised).flat_map(|(_, names)| *names);
    let slos_met = met.map(|name| (*name).to_owned()).collect();
    story.expect = PlatformExpect { verdict: Verdict::Holds, broken: Vec::new(), slos_met, told, fired_min, converges };
}

/// Whether a fault of this mode is one of who watches and runs everything.
fn watches(mode: Mode) -> bool {
    matches!(mode, Mode::BadDeploy | Mode::ClockSkew)
}

/// Whether one fault may keep another from striking, or from being told of.
fn hides(one: &Fault, other: &Fault) -> bool {
    if one == other || MILD.contains(&one.mode) {
        return false;
    }
    let (is_streams, is_others) = (one.mode.entry().needs_stream, other.mode.entry().needs_stream);
    is_streams == is_others || (!is_streams && watches(one.mode))
}

/// Whether a fault is there for so long at a time at which it must strike, when nothing keeps it from that.
fn is_there(story: &PlatformScenario, fault: &Fault, at: DateTime<Utc>, for_s: u64) -> bool {
    at > story.start() && fault.from <= at && at + seconds(for_s) <= fault.to()
}

/// Whether a fault must strike when nothing keeps it from that.
fn strikes(story: &PlatformScenario, fault: &Fault) -> bool {
    let at_a_run = |for_s| story.fechas().any(|fecha| is_there(story, fault, story.scheduled(fecha), for_s));
    let hours =
        || story.fechas().flat_map(|fecha| (0..48).map(move |h| fecha.and_time(NaiveTime::MIN).and_utc() + TimeDelta::hours(h)));
    let at_a_refresh = || hours().filter(|at| at.hour() % 6 == 0).any(|at| is_there(story, fault, at, 120));
    match fault.mode.entry().begins {
        Begins::AtTheRun | Begins::Before => at_a_run(120),
        Begins::AtAnyWork => at_a_run(10) || at_a_refresh(),
        Begins::AtARefresh => at_a_refresh(),
        Begins::WithTheDay | Begins::InTheDaytime => true,
        Begins::AnyTime => match fault.mode {
            Mode::BadDeploy | Mode::StreamSlow | Mode::StreamCrash => fault.from > story.start(),
            _ => at_a_run(120) || at_a_refresh(),
        },
    }
}

/// Whether somebody must be told of a fault that strikes: there is no waiting for its end, or its end is too far.
fn is_loud(story: &PlatformScenario, fault: &Fault) -> bool {
    let outlasts_a_run = |for_s| story.fechas().any(|fecha| is_there(story, fault, story.scheduled(fecha), for_s));
    let has_many_events = || story.stream.as_ref().is_some_and(|stream| stream.events_per_day >= 1_500);
    match fault.mode {
        Mode::ColumnRenamed
        | Mode::ColumnAdded
        | Mode::NotNullDropped
        | Mode::PasswordExpired
        | Mode::ApiTokenExpired
        | Mode::StoreTokenExpired
        | Mode::DiskFull => true,
        Mode::SourceAway => outlasts_a_run(180),
        // Ahead, so that it is there when the run begins.
        Mode::ClockSkew => fault.offset_s > SIGNATURE_S && outlasts_a_run(0),
        Mode::StreamSlow => has_many_events(),
        Mode::StreamCrash => has_many_events() && fault.for_s > 900,
        Mode::ApiAway
        | Mode::HotKey
        | Mode::RowsTwice
        | Mode::AnswersLost
        | Mode::StoreTimeouts
        | Mode::BadDeploy
        | Mode::ProducerClock => false,
    }
}

/// Smaller stories, the greatest step first: without a fault, without the stream, with fewer days, a smaller shop and stream,
/// shorter faults. Faults that are drawn by their frequency belong to the seed and stay, and so does patience: a story must
/// not fail for want of it.
pub fn smaller(story: &PlatformScenario) -> Vec<PlatformScenario> {
    let mut out: Vec<PlatformScenario> = Vec::new();
    let mut put = |change: &dyn Fn(&mut PlatformScenario)| {
        let mut changed = story.clone();
        change(&mut changed);
        let modes: BTreeSet<Mode> = changed.fault.iter().map(|fault| fault.mode).collect();
        changed.expect.told.retain(|mode| changed.drawn != Drawn::None || modes.contains(mode));
        if changed.stream.is_none() {
            changed.expect.slos_met.retain(|name| !["streaming_freshness", "batch_streaming_reconciliation"].contains(&&**name));
        }
        let is_promised = has_dimensions(&changed, &changed.fault) || !has_dimensions(story, &story.fault);
        if changed != *story && is_promised && changed.check().is_ok() && !out.contains(&changed) {
            out.push(changed);
        }
    };
    for n in 0..story.fault.len() {
        put(&|s| {
            s.fault.remove(n);
        });
    }
    put(&|s| s.stream = None);
    for days in [1, story.days / 2, story.days - 1] {
        put(&|s| s.days = days);
    }
    put(&|s| (s.fecha, s.days) = (s.fecha + Days::new(1), s.days - 1));
    put(&|s| s.models = "metricas_diarias".into());
    let half = |n: u64, least: u64| (n / 2).max(least).min(n);
    put(&|s| s.shop.sales_per_day = half(s.shop.sales_per_day, 10));
    put(&|s| s.shop.customers = half(s.shop.customers, 10));
    put(&|s| s.shop.products = half(s.shop.products, 1));
    put(&|s| s.shop.growth_percent = 0);
    if let Some(stream) = &story.stream {
        let mut put = |size: StreamSize| put(&|s| s.stream = Some(size.clone()));
        put(StreamSize { events_per_day: half(stream.events_per_day, 100), ..stream.clone() });
        put(StreamSize { workers: 1, ..stream.clone() });
        put(StreamSize { partitions: 1, ..stream.clone() });
        put(StreamSize { pages: 1, ..stream.clone() });
        put(StreamSize { hot: 0, ..stream.clone() });
    }
    for n in 0..story.fault.len() {
        put(&|s| s.fault[n].for_s = half(s.fault[n].for_s, 60));
        put(&|s| s.fault[n].response_s = half(s.fault[n].response_s, 60));
        if story.fault[n].offset_s.abs() >= 240 {
            put(&|s| s.fault[n].offset_s /= 2);
        }
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
            assert_eq!(PlatformScenario::parse(&text), Ok(story), "seed {seed}:\n{text}");
        }
    }

    #[test]
    fn every_mode_and_every_pair_is_drawn_within_the_budget() {
        let (mut modes, mut pairs, mut single): (BTreeSet<Mode>, BTreeSet<(Mode, Mode)>, BTreeSet<Mode>) = Default::default();
        for seed in 0..3_000 {
            let story = draw(seed);
            let here: BTreeSet<Mode> = story.fault.iter().map(|fault| fault.mode).collect();
            assert!((1..=3).contains(&here.len()) && here.len() == story.fault.len(), "seed {seed}: {:?}", story.fault);
            assert!(has_dimensions(&story, &story.fault), "seed {seed}: {:?}", story.fault);
            for fault in &story.fault {
                let (least, most) = fault.mode.entry().lasts_s;
                assert!((least..=most).contains(&fault.for_s), "seed {seed}: {fault:?}");
            }
            let end = story.due(story.last()) + TimeDelta::hours(story.patience_h.cast_signed());
            assert!(story.fault.iter().all(|fault| fault.to() + TimeDelta::hours(12) < end), "seed {seed}: {:?}", story.fault);
            pairs.extend(PAIRS.iter().filter(|(a, b)| here.contains(a) && here.contains(b)));
            single.extend(here.iter().filter(|_| here.len() == 1));
            modes.extend(here);
        }
        assert_eq!((modes.len(), single.len(), pairs.len()), (CATALOGUE.len(), CATALOGUE.len(), PAIRS.len()));
    }

    #[test]
    fn what_must_come_of_a_story_follows_from_its_faults() {
        let base = PlatformScenario { days: 3, fecha: MONDAY, stream: None, ..draw(1) };
        let fault = |mode: Mode, from: &str, for_s: u64| {
            let response_s = if mode.entry().needs_operator { 900 } else { 0 };
            Fault { mode, from: from.parse().expect("a time"), for_s, offset_s: 0, response_s }
        };
        let check = |fault: &[Fault], with_stream: bool, fired_min: u64, told: &[Mode], met: usize| {
            let stream = with_stream.then(|| StreamSize { events_per_day: 2_000, ..StreamSize::standard() });
            let mut story = PlatformScenario { fault: fault.to_vec(), stream, ..base.clone() };
            expect(&mut story);
            story.check().expect("a story");
            assert_eq!(story.expect.converges, !with_stream);
            assert_eq!(story.expect.fired_min, fired_min, "{fault:?}");
            assert_eq!(story.expect.told, told.iter().copied().collect(), "{fault:?}");
            assert_eq!(story.expect.slos_met.len(), met, "{fault:?}: {:?}", story.expect.slos_met);
        };
        let away = fault(Mode::SourceAway, "2024-03-06T02:10:00Z", 5_400);
        let glimpse = Fault { for_s: 3_030, ..away.clone() };
        let full = fault(Mode::DiskFull, "2024-03-06T02:10:00Z", 50_000);
        let twice = fault(Mode::RowsTwice, "2024-03-06T02:10:00Z", 7_200);
        let crash = fault(Mode::StreamCrash, "2024-03-06T09:10:00Z", 1_800);
        let deploy = fault(Mode::BadDeploy, "2024-03-06T03:00:10Z", 1_500);
        let clock = Fault { offset_s: -600, ..fault(Mode::ProducerClock, "2024-03-06T09:10:00Z", 3_600) };
        check(std::slice::from_ref(&away), false, 1, &[Mode::SourceAway], 0);
        check(&[glimpse], false, 0, &[], 0);
        check(std::slice::from_ref(&twice), false, 1, &[], 3);
        // No rows come twice from a source that is away.
        check(&[twice.clone(), away.clone()], true, 0, &[Mode::SourceAway], 1);
        // Each of them may hide the other.
        check(&[away.clone(), full.clone()], false, 0, &[], 0);
        // Batch and stream fail apart, but a dead orchestrator looks at neither.
        check(&[away.clone(), crash.clone()], true, 1, &[Mode::SourceAway, Mode::StreamCrash], 0);
        check(std::slice::from_ref(&crash), true, 1, &[Mode::StreamCrash], 3);
        check(&[crash, deploy], true, 0, &[], 0);
        check(&[clock], true, 1, &[], 3);
        check(&[twice], true, 1, &[], 5);
    }

    #[test]
    fn smaller_stories_are_valid_and_lead_to_an_end() {
        for seed in 0..20 {
            let mut story = draw(seed);
            for _ in 0..400 {
                let candidates = smaller(&story);
                for candidate in &candidates {
                    assert_ne!(*candidate, story);
                    assert_eq!(PlatformScenario::parse(&candidate.to_toml().expect("text")).as_ref(), Ok(candidate));
                }
                match candidates.into_iter().next_back() {
                    Some(next) => story = next,
                    None => break,
                }
            }
            assert!(smaller(&story).is_empty(), "seed {seed}: {story:?}");
        }
    }

    #[test]
    fn the_first_step_takes_a_fault_and_a_stream_goes_with_what_is_promised_of_it() {
        let story = (0..).map(draw).find(|s| s.stream.is_some() && s.expect.slos_met.len() == 5).expect("a story");
        let candidates = smaller(&story);
        assert!(candidates[0].fault.len() < story.fault.len());
        let without = candidates.iter().find(|s| s.stream.is_none()).expect("one without a stream");
        assert_eq!(without.expect.slos_met, ["batch_freshness", "data_quality_score", "batch_completeness"]);
    }
}
