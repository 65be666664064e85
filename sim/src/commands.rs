//! The commands that look for failures and explain them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{Args, ValueEnum};
use simulacro_core::history::Event;
use simulacro_sim::{
    broker::RequestKind,
    faults::{CATALOGUE, Fault},
    interpose,
    platform::{
        detection::{self, Table},
        faults::{self as platform_faults, Mode},
        swarm as platform_swarm,
    },
    scenario::Story,
    stream::{
        self, StreamScenario,
        faults::{Side, StreamFault, When},
    },
    swarm,
    world::Judgement,
};

use crate::{Failure, Job, in_parallel, judged, load, show};

/// At most so many candidates are tried while a scenario shrinks, unless the command says otherwise.
pub const SHRINK_TRIES: usize = 120;

/// Of which world scenarios are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum World {
    /// The daily batch.
    Batch,
    /// The streaming job.
    Stream,
    /// The whole platform under its orchestrator.
    Platform,
}

impl World {
    /// The story that a seed draws.
    pub fn draw(self, seed: u64) -> Story {
        match self {
            Self::Batch => Story::Batch(Box::new(swarm::draw(seed))),
            Self::Stream => Story::Stream(Box::new(stream::swarm::draw(seed))),
            Self::Platform => Story::Platform(Box::new(platform_swarm::draw(seed))),
        }
    }
}

/// Which seeds, for how long, and where failing scenarios go.
#[derive(Args)]
pub struct Sweep {
    /// Of which world
    #[arg(long, value_enum, default_value_t = World::Batch)]
    world: World,
    /// Number of seeds
    #[arg(long, default_value_t = 50)]
    seeds: u64,
    /// First seed
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Runs at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Only each n-th seed: `2/8` is the second of eight shards
    #[arg(long, value_parser = shard)]
    shard: Option<(u64, u64)>,
    /// Seconds of wall time after which no further seed is begun
    #[arg(long)]
    max_wall: Option<u64>,
    /// Without this defence, by its name in scenarios, such as dedup: seeds must fail then, or the sweep would not notice
    #[arg(long)]
    without: Option<String>,
    /// At most so many candidates are tried while a failing scenario shrinks
    #[arg(long, default_value_t = SHRINK_TRIES)]
    tries: usize,
    /// Folder for failing scenarios, as they were drawn and as they were shrunk
    #[arg(long, default_value = "failing")]
    out: PathBuf,
}

/// What became of the faults of one kind in all runs.
#[derive(Default)]
struct Kind {
    drawn: u64,
    struck: u64,
    hits: u64,
}

/// Reads `i/n`.
pub fn shard(text: &str) -> Result<(u64, u64), String> {
    let parsed = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    parsed.filter(|(i, n)| (1..=*n).contains(i)).ok_or(format!("found {text:?}, expected i/n with 1 <= i <= n, such as 2/8"))
}

/// The invariants that a run broke, by the first word of each problem.
fn signature(judgement: &Judgement) -> Vec<String> {
    let name = |problem: &String| problem.split(':').next().unwrap_or_default().to_owned();
    let mut names: Vec<String> = judgement.problems.iter().map(name).collect();
    names.sort();
    names.dedup();
    names
}

fn seconds(since: u64) -> f64 {
    (interpose::real_nanos() - since) as f64 / 1e9
}

/// Runs a scenario that exists in memory only: a process reads it from a file of its own.
fn run_drawn(folder: &Path, name: &str, scenario: &Story, seed: u64) -> Result<(Job, Judgement, f64), Failure> {
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, scenario.to_toml()?)?;
    let job = Job { scenario: path, seed, history: None, plant: false, twin: false, counterfactual: false };
    let (judgement, _, wall) = judged(&job, scenario)?;
    Ok((job, judgement, wall))
}

/// The same, where a run that breaks off is a failing one, whatever broke it off: a panic is worth a scenario, too.
fn run_or_break(folder: &Path, name: &str, scenario: &Story, seed: u64) -> Result<(Job, Judgement, f64), Failure> {
    let path = folder.join(format!("{name}.toml"));
    run_drawn(folder, name, scenario, seed).or_else(|error| {
        let job = Job { scenario: path, seed, history: None, plant: false, twin: false, counterfactual: false };
        let problems = vec![format!("finishes: {error}")];
        Ok((job, Judgement { verdict: "violated".into(), problems, ..Judgement::default() }, 0.0))
    })
}

/// Draws, runs, shrinks and saves.
pub fn sweep(sweep: &Sweep) -> Result<u8, Failure> {
    let began = interpose::real_nanos();
    let (index, shards) = sweep.shard.unwrap_or((1, 1));
    let seeds: Vec<u64> = (sweep.from..sweep.from + sweep.seeds).filter(|s| s % shards == index - 1).collect();
    let work = tempfile::tempdir()?;
    let (mut held, mut untouched, mut failing, mut skipped) = (0, 0, Vec::new(), 0);
    let mut kinds: BTreeMap<String, Kind> = BTreeMap::new();
    let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
    if let Some(name) = &sweep.without {
        let mut first = sweep.world.draw(sweep.from);
        first.weaken(name).and_then(|()| Story::parse(&first.to_toml()?)).map_err(|e| format!("--without {name}: {e}"))?;
    }
    in_parallel(
        seeds,
        sweep.jobs,
        |&seed| {
            if sweep.max_wall.is_some_and(|limit| seconds(began) > limit as f64) {
                return Ok(None);
            }
            let mut scenario = sweep.world.draw(seed);
            sweep.without.iter().try_for_each(|name| scenario.weaken(name))?;
            run_or_break(work.path(), &format!("seed-{seed}"), &scenario, seed).map(|ran| Some((scenario, ran)))
        },
        |seed, result: Result<_, Failure>| {
            let Some((scenario, (job, judgement, wall))) = result? else {
                skipped += 1;
                return Ok(());
            };
            for (text, hits) in scenario.faults(seed)?.iter().zip(&judgement.hits) {
                let named = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(" = "));
                let mode = [named("mode"), named("kind")].into_iter().flatten().collect::<Vec<_>>().join(" ");
                let kind = kinds.entry(mode.replace('"', "")).or_default();
                (kind.drawn, kind.hits) = (kind.drawn + 1, kind.hits + hits);
                kind.struck += u64::from(*hits > 0);
            }
            let of_stream = judgement.stream.iter().flat_map(|figures| figures.totals());
            let of_platform = judgement.platform.iter().flat_map(|report| report.totals());
            for (name, value) in of_stream.chain(of_platform) {
                *totals.entry(name).or_default() += value;
            }
            // Faults that nothing met, because others kept the pipeline from its way: that a story holds then says little.
            let is_untouched = !judgement.hits.is_empty() && judgement.hits.iter().all(|hits| *hits == 0);
            if judgement.verdict == "holds" {
                (held, untouched) = (held + 1, untouched + u64::from(is_untouched));
            } else {
                show(&job, &scenario, &judgement, wall);
                failing.push((seed, scenario, judgement));
            }
            Ok(())
        },
    )?;
    if !failing.is_empty() {
        std::fs::create_dir_all(&sweep.out)?;
    }
    for (seed, scenario, judgement) in &failing {
        let drawn = sweep.out.join(format!("seed-{seed}.toml"));
        std::fs::write(&drawn, scenario.to_toml()?)?;
        if judgement.verdict != "violated" {
            println!("seed {seed}: {}, nothing to shrink: {}", judgement.verdict, drawn.display());
            continue;
        }
        let small = smallest(work.path(), scenario, *seed, judgement, sweep.tries)?;
        let shrunk = sweep.out.join(format!("seed-{seed}-shrunk.toml"));
        std::fs::write(&shrunk, small.to_toml()?)?;
        println!("seed {seed}: {} shrunk to {}: {}", scenario.size(), small.size(), shrunk.display());
    }
    println!("faults, how often they struck, and how many of them did:");
    for (mode, Kind { drawn, struck, hits }) in &kinds {
        println!("  {mode:<28} {hits:>6}  {struck:>4} of {drawn}");
    }
    if !totals.is_empty() {
        println!("in all runs:");
        for (name, value) in &totals {
            println!("  {name:<28} {value:>9}");
        }
    }
    if skipped > 0 {
        println!("{skipped} seeds were not begun within {} s", sweep.max_wall.unwrap_or(0));
    }
    if untouched > 0 {
        println!("{untouched} of the seeds that hold met none of their faults, and prove nothing");
    }
    println!("{held} seeds hold, {} fail, in {:.0} s of wall time", failing.len(), seconds(began));
    let is_violated = failing.iter().any(|(_, _, judgement)| judgement.verdict == "violated");
    Ok(if is_violated {
        1
    } else if failing.is_empty() {
        0
    } else {
        6
    })
}

/// The smallest scenario found that breaks the same invariants.
fn smallest(folder: &Path, scenario: &Story, seed: u64, judgement: &Judgement, most: usize) -> Result<Story, Failure> {
    let wanted = signature(judgement);
    let (mut best, mut tries) = (scenario.clone(), 0);
    'again: loop {
        for candidate in best.smaller() {
            tries += 1;
            if tries > most {
                break 'again;
            }
            let (_, judgement, _) = run_or_break(folder, "candidate", &candidate, seed)?;
            if judgement.verdict == "violated" && signature(&judgement) == wanted {
                best = candidate;
                continue 'again;
            }
        }
        break;
    }
    best.set_summary(
        format!("shrunk from a drawn scenario; broken: {}", wanted.join(", ")).replace(|c: char| c.is_ascii_digit(), ""),
    );
    Ok(best)
}

/// Shrinks one scenario and says what is left.
pub fn shrink(path: &Path, seed: Option<u64>, out: Option<&Path>, most: usize) -> Result<u8, Failure> {
    let scenario = load(path)?;
    let seed = seed.unwrap_or(scenario.seeds()[0]);
    let work = tempfile::tempdir()?;
    let (_, judgement, _) = run_or_break(work.path(), "first", &scenario, seed)?;
    if judgement.verdict != "violated" {
        let verdict = &judgement.verdict;
        return Err(format!("{} seed {seed}: found verdict {verdict}, expected violated to shrink it", path.display()).into());
    }
    let small = smallest(work.path(), &scenario, seed, &judgement, most)?;
    let out = out.map_or_else(|| path.with_extension("shrunk.toml"), Path::to_owned);
    std::fs::write(&out, small.to_toml()?)?;
    println!("{} are left of {}: {}", small.size(), scenario.size(), out.display());
    println!("repeat    simulacro-sim run {} --seed {seed}", out.display());
    Ok(0)
}

/// Requests of a worker at which it may die: those of a transaction, and those that make it a member and a producer.
const DEADLY: [RequestKind; 5] =
    [RequestKind::InitProducer, RequestKind::Membership, RequestKind::Produce, RequestKind::TxnOffsets, RequestKind::EndTxn];

/// Kills the first worker at each of its writing requests, before and after the broker carries it out, once for each, and
/// lets the oracle judge each run.
fn stream_crash_points(story: &StreamScenario, seed: u64, jobs: usize, most: u64) -> Result<u8, Failure> {
    let began = interpose::real_nanos();
    let mut story = story.clone();
    story.fault.retain(|f| !matches!(f, StreamFault::WorkerCrash { worker: 0, .. }));
    story.expect.fired_min = 0;
    let work = tempfile::tempdir()?;
    let points: Vec<(RequestKind, u64, Side)> = DEADLY
        .into_iter()
        .flat_map(|kind| (1..=most).map(move |nth| (kind, nth)))
        .flat_map(|(kind, nth)| [(kind, nth, Side::Before), (kind, nth, Side::After)])
        .collect();
    let (mut held, mut failed, mut beyond) = (0, 0, 0);
    in_parallel(
        points,
        jobs,
        |&(request, nth, side)| {
            let mut story = story.clone();
            story.fault.push(StreamFault::WorkerCrash { worker: 0, when: When::Request { request, nth, side }, down_s: 3 });
            let story = Story::Stream(Box::new(story));
            run_drawn(work.path(), &format!("crash-{request:?}-{nth}-{side:?}"), &story, seed).map(|ran| (story, ran))
        },
        |(request, nth, side), result: Result<_, Failure>| {
            let (scenario, (job, judgement, wall)) = result?;
            match judgement.verdict.as_str() {
                // The worker never made so many such requests.
                "holds" if judgement.hits.last() == Some(&0) => beyond += 1,
                "holds" => held += 1,
                _ => {
                    failed += 1;
                    println!("death {side:?} {request:?} {nth}:");
                    show(&job, &scenario, &judgement, wall);
                }
            }
            Ok(())
        },
    )?;
    println!(
        "{} requests of a worker, a death at each: {held} hold, {failed} fail, in {:.0} s; {beyond} more were never made",
        held + failed,
        seconds(began)
    );
    Ok(u8::from(failed > 0))
}

/// Kills the worker at every call to the store, once for each, and wants the tables of a run in which it lived. In a story
/// of the stream the calls are the first `most` requests of each kind to the broker.
pub fn crash_points(path: &Path, seed: Option<u64>, jobs: usize, most: u64) -> Result<u8, Failure> {
    let began = interpose::real_nanos();
    let mut scenario = match load(path)? {
        Story::Batch(scenario) => scenario,
        Story::Stream(story) => return stream_crash_points(&story, seed.unwrap_or(story.seeds[0]), jobs, most),
        Story::Platform(_) => {
            return Err(format!("{}: found a platform story, expected one of batch or stream", path.display()).into());
        }
    };
    let seed = seed.unwrap_or(scenario.seeds[0]);
    scenario.fault.retain(|f| !matches!(f, Fault::WorkerCrash { .. }));
    let work = tempfile::tempdir()?;
    let (_, clean, _) = run_drawn(work.path(), "clean", &Story::Batch(scenario.clone()), seed)?;
    if clean.verdict != "holds" {
        return Err(format!("{} seed {seed} does not hold even when nobody dies: {:?}", path.display(), clean.problems).into());
    }
    let (mut held, mut failed) = (0, 0);
    in_parallel(
        (1..=clean.store_calls).collect(),
        jobs,
        |&call| {
            let mut story = scenario.clone();
            story.fault.push(Fault::WorkerCrash { at_calls: vec![call], down_s: 30 });
            // Against the run in which it lived, so no twin has to be run for each.
            (story.expect.converges, story.expect.fired_min) = (false, 1);
            let story = Story::Batch(story);
            run_drawn(work.path(), &format!("crash-{call}"), &story, seed).map(|ran| (story, ran))
        },
        |call, result: Result<_, Failure>| {
            let (story, (job, mut judgement, wall)) = result?;
            if judgement.hashes != clean.hashes {
                judgement.verdict = "violated".into();
                judgement
                    .problems
                    .push(format!("invariant converges: found tables {:?}, expected {:?}", judgement.hashes, clean.hashes));
            }
            if judgement.verdict == "holds" {
                held += 1;
            } else {
                failed += 1;
                println!("death at call {call}:");
                show(&job, &story, &judgement, wall);
            }
            Ok(())
        },
    )?;
    println!("{} calls to the store, a death at each: {held} hold, {failed} fail, in {:.0} s", clean.store_calls, seconds(began));
    Ok(u8::from(failed > 0))
}

/// Reads a history.
pub fn read_history(path: &Path) -> Result<Vec<Event>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let event = |(n, line): (usize, &str)| -> Result<Event, Failure> {
        Ok(serde_json::from_str(line).map_err(|e| format!("{} line {}: {e}", path.display(), n + 1))?)
    };
    text.lines().enumerate().map(event).collect()
}

fn line(event: &Event) -> String {
    let (time, refs) = (event.time.format("%m-%d %H:%M:%S%.3f"), &event.refs);
    format!("{time} #{:<5} {}.{} {} {refs}", event.ordinal, event.component, event.call, event.outcome)
}

/// Runs a scenario and tells what happened.
pub fn explain(path: &Path, seed: Option<u64>, all: bool) -> Result<u8, Failure> {
    let scenario = load(path)?;
    let work = tempfile::tempdir()?;
    let history = work.path().join("history.jsonl");
    let seed = seed.unwrap_or(scenario.seeds()[0]);
    let job =
        Job { scenario: path.to_owned(), seed, history: Some(history.clone()), plant: false, twin: false, counterfactual: false };
    let (judgement, _, wall) = judged(&job, &scenario)?;
    println!("faults:");
    for (fault, hits) in scenario.faults(seed)?.iter().zip(&judgement.hits) {
        println!("  struck {hits} times: {}", fault.trim().replace('\n', ", "));
    }
    println!("what happened:");
    let mut before: Option<(String, u64)> = None;
    for event in read_history(&history)? {
        if !all && event.component == "object_store" && event.outcome != "error" {
            continue;
        }
        // The same answer again and again is one line with a count.
        let kind = format!("{} {} {}", event.component, event.call, event.outcome);
        match &mut before {
            Some((last, count)) if *last == kind && event.component != "lakehouse" => *count += 1,
            _ => {
                if let Some((_, count)) = before.filter(|b| b.1 > 0) {
                    println!("  ... and {count} more like it");
                }
                println!("  {}", line(&event));
                before = Some((kind, 0));
            }
        }
    }
    println!("what was judged:");
    show(&job, &scenario, &judgement, wall);
    Ok(u8::from(judgement.verdict != "holds"))
}

/// How many seeds of which modes, and where the table goes.
#[derive(Args)]
pub struct Detection {
    /// Seeds of each mode
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// First seed
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// Only this mode, by its name in a scenario, for example source_away
    #[arg(long, value_parser = mode)]
    mode: Option<Mode>,
    /// Runs at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Seconds of wall time after which no further run is begun
    #[arg(long)]
    max_wall: Option<u64>,
    /// Markdown file for the table, with the command that makes it
    #[arg(long)]
    out: Option<PathBuf>,
}

fn mode(text: &str) -> Result<Mode, String> {
    let names = || platform_faults::CATALOGUE.iter().map(|e| e.name).collect::<Vec<_>>().join(", ");
    Mode::named(text).ok_or_else(|| format!("found {text:?}, expected one of {}", names()))
}

/// Runs each mode under many seeds and tells how long its alert took.
pub fn detection(detection: &Detection) -> Result<u8, Failure> {
    let began = interpose::real_nanos();
    let modes: Vec<Mode> = match detection.mode {
        Some(mode) => vec![mode],
        None => platform_faults::CATALOGUE.iter().map(|e| e.mode).collect(),
    };
    // Seed by seed, so that a table that ran out of time has about as many runs of each mode.
    let seeds = detection.from..detection.from + detection.seeds;
    let runs: Vec<(u64, Mode)> = seeds.flat_map(|seed| modes.iter().map(move |mode| (seed, *mode))).collect();
    let work = tempfile::tempdir()?;
    let (mut table, mut skipped) = (Table::default(), 0);
    in_parallel(
        runs,
        detection.jobs,
        |&(seed, mode)| {
            if detection.max_wall.is_some_and(|limit| seconds(began) > limit as f64) {
                return Ok(None);
            }
            let name = format!("{}-{seed}", mode.entry().name);
            let story = Story::Platform(Box::new(detection::story(mode, seed)));
            run_drawn(work.path(), &name, &story, seed).map(|(_, judgement, _)| Some(judgement))
        },
        |(seed, mode), result: Result<_, Failure>| {
            match result? {
                None => skipped += 1,
                Some(judgement) => table.add(mode, seed, &judgement),
            }
            Ok(())
        },
    )?;
    let chosen = detection.mode.map_or(String::new(), |mode| format!(" --mode {}", mode.entry().name));
    let limit = detection.max_wall.map_or(String::new(), |limit| format!(" --max-wall {limit}"));
    let command = format!("simulacro-sim detection --seeds {}{chosen}{limit} --out docs/detection.md", detection.seeds);
    let text = table.markdown(&command);
    print!("{text}");
    if let Some(out) = &detection.out {
        std::fs::write(out, text).map_err(|e| format!("write {}: {e}", out.display()))?;
    }
    if skipped > 0 {
        println!("{skipped} runs were not begun within {} s", detection.max_wall.unwrap_or(0));
    }
    println!("in {:.0} s of wall time", seconds(began));
    Ok(u8::from(table.is_broken()))
}

/// Says where two histories part.
pub fn diff(left: &Path, right: &Path) -> Result<u8, Failure> {
    let (a, b) = (read_history(left)?, read_history(right)?);
    let first = a.iter().zip(&b).position(|(x, y)| x != y).or((a.len() != b.len()).then_some(a.len().min(b.len())));
    let Some(at) = first else {
        println!("{} events, equal", a.len());
        return Ok(0);
    };
    println!("the histories part at event {at} of {} and {}:", a.len(), b.len());
    for event in &a[at.saturating_sub(3)..at] {
        println!("  both   {}", line(event));
    }
    for (name, side) in [("left ", &a), ("right", &b)] {
        println!("  {name}  {}", side.get(at).map_or("(ends here)".to_owned(), line));
    }
    Ok(5)
}

/// The catalogue.
pub fn faults() {
    for entry in CATALOGUE {
        println!("{}  (failure mode {})", entry.mode, entry.failure);
        println!("  seen      {}", entry.seen);
        println!("  defence   {}", entry.defence);
        println!("  example   {}", entry.example.replace('\n', ", "));
    }
    for entry in stream::faults::CATALOGUE {
        println!("{}  (stream, failure mode {})", entry.mode, entry.failure);
        println!("  seen      {}", entry.seen);
        println!("  defence   {}", entry.defence);
        println!("  example   {}", entry.example.replace('\n', ", "));
    }
    for entry in platform_faults::CATALOGUE {
        let ends = if entry.needs_operator { "the operator ends it" } else { "it ends by itself" };
        println!("{}  (platform, failure mode {}): {} a year, {ends}", entry.name, entry.failure, entry.per_year);
        println!("  alerts    {}", if entry.alerts.is_empty() { "none".into() } else { entry.alerts.join(", ") });
    }
}
