//! `simulacro-sim`: runs scenarios, each in a process of its own, and proves that runs repeat.
#![expect(
    clippy::disallowed_methods,
    reason = "the driver owns processes, threads and files; nothing here runs inside the world"
)]

mod commands;
mod incident;
mod output;

use std::{
    collections::{BTreeMap, VecDeque},
    path::{Path, PathBuf},
    process::{Command as Process, ExitCode},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::{Parser, Subcommand, ValueEnum};
use sha2::{Digest, Sha256};
use simulacro_sim::{
    interpose, platform,
    scenario::{Story, Tier},
    stream,
    world::{self, Judgement},
};

/// A world is millions of short-lived records, and glibc's allocator spent four tenths of a year of them on itself.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Deterministic simulation of the data platform.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  simulacro-sim run scenarios
  simulacro-sim run scenarios/incidents/monday_0300_waiting.toml --seed 7 --history out
  simulacro-sim sweep --seeds 100 --max-wall 300 --out failing
  simulacro-sim sweep --world stream --seeds 200
  simulacro-sim sweep --world platform --seeds 200 --max-wall 1800
  simulacro-sim sweep --world platform --seeds 20 --without dedup
  simulacro-sim detection --seeds 100 --out docs/detection.md
  simulacro-sim shrink failing/seed-17.toml
  simulacro-sim explain scenarios/negative/monday_0300_retrying.toml
  simulacro-sim canary scenarios/incidents/monday_0300_waiting.toml --pairs 200
  simulacro-sim canary --world platform --pairs 50
  simulacro-sim run scenarios --shard 2/8 --max-wall 300 --junit junit.xml
  simulacro-sim capture scenarios/incidents/monday_0300_waiting.toml --out night.capsule
  simulacro-sim replay night.capsule
  simulacro-sim replay 17 --world platform
  simulacro-sim postmortem night.capsule

Exit codes: 0 holds, 1 violated, 2 usage, 5 non-deterministic, 6 inconclusive"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum TierArg {
    Pr,
    Nightly,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a scenario, or all scenarios below a folder
    Run {
        /// TOML file or folder
        path: PathBuf,
        /// Instead of the scenario's seeds
        #[arg(long)]
        seed: Option<u64>,
        /// Only scenarios of this tier
        #[arg(long)]
        tier: Option<TierArg>,
        /// Folder for the histories, one JSON object a line
        #[arg(long)]
        history: Option<PathBuf>,
        /// Runs at a time
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Only each n-th run: `2/8` is the second of eight shards
        #[arg(long, value_parser = commands::shard)]
        shard: Option<(u64, u64)>,
        /// Seconds of wall time after which no further run is begun; then the result is inconclusive
        #[arg(long)]
        max_wall: Option<u64>,
        /// Begins no further run when one does not hold
        #[arg(long)]
        fail_fast: bool,
        #[command(flatten)]
        output: output::Output,
    },
    /// Runs pairs of the same seed in separate processes and compares history, tables and stored bytes
    Canary {
        /// TOML file, each pair another seed of it
        #[arg(required_unless_present = "world")]
        scenario: Option<PathBuf>,
        /// Instead of a file: each pair the story that its seed draws of this world
        #[arg(long, value_enum, conflicts_with = "scenario")]
        world: Option<commands::World>,
        /// Number of pairs; pair n has seed n
        #[arg(long, default_value_t = 10)]
        pairs: u64,
        /// Pairs at a time
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Plants a source of nondeterminism, which must be found
        #[arg(long)]
        plant: bool,
    },
    /// Draws scenarios from seeds and runs them; failing ones are shrunk and saved
    Sweep(commands::Sweep),
    /// Shrinks a failing scenario to the fewest faults, the shortest time and the smallest world that still fail
    Shrink {
        /// TOML file
        scenario: PathBuf,
        /// Instead of the scenario's first seed
        #[arg(long)]
        seed: Option<u64>,
        /// At most so many candidates are tried
        #[arg(long, default_value_t = commands::SHRINK_TRIES)]
        tries: usize,
        /// Where the result goes; beside the scenario without it
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Kills the worker at every call to the store, or a stream's worker at its requests to the broker, one run for each
    CrashPoints {
        /// TOML file
        scenario: PathBuf,
        /// Instead of the scenario's first seed
        #[arg(long)]
        seed: Option<u64>,
        /// Runs at a time
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Of a stream: so many requests of each kind
        #[arg(long, default_value_t = 40)]
        most: u64,
    },
    /// Tells a run in order: faults, attempts, commits, alerts, and what was judged
    Explain {
        /// TOML file
        scenario: PathBuf,
        /// Instead of the scenario's first seed
        #[arg(long)]
        seed: Option<u64>,
        /// The calls to the object store too
        #[arg(long)]
        all: bool,
    },
    /// Measures for each failure mode of the platform how long an alert takes, over many seeds
    Detection(commands::Detection),
    /// Finds where two histories part
    Diff {
        /// A history that `run --history` wrote
        left: PathBuf,
        /// Another
        right: PathBuf,
    },
    /// Cuts an incident capsule out of a simulated run, or out of the history of a production process
    Capture(incident::Capture),
    /// Repeats a capsule, or the run that a seed draws, and says whether it is equal or where it parts
    Replay(incident::Replay),
    /// Drafts the postmortem of a run
    Postmortem(incident::Postmortem),
    /// Prints the catalogue of faults
    Faults,
    /// One run in this process; prints the judgement as JSON
    #[command(hide = true)]
    One {
        scenario: PathBuf,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        history: Option<PathBuf>,
        #[arg(long)]
        plant: bool,
        #[arg(long)]
        twin: bool,
        #[arg(long)]
        counterfactual: bool,
    },
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn load(path: &Path) -> Result<Story, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))?;
    Ok(Story::parse(&text).map_err(|e| format!("scenario {}: {e}", path.display()))?)
}

fn collect(path: &Path, into: &mut Vec<PathBuf>) -> Result<(), Failure> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            collect(&entry?.path(), into)?;
        }
    } else if !path.exists() {
        return Err(format!("{}: found nothing, expected a scenario file or a folder", path.display()).into());
    } else if path.extension().is_some_and(|e| e == "toml") {
        into.push(path.to_owned());
    }
    Ok(())
}

/// One run, as it is handed to a process.
#[derive(Clone)]
struct Job {
    scenario: PathBuf,
    seed: u64,
    history: Option<PathBuf>,
    plant: bool,
    twin: bool,
    /// Without the defences that the story names for comparison.
    counterfactual: bool,
}

/// Runs one seed in a process of its own.
fn child(job: &Job) -> Result<Judgement, Failure> {
    let mut process = Process::new(std::env::current_exe()?);
    process.arg("one").arg(&job.scenario).arg("--seed").arg(job.seed.to_string());
    if let Some(path) = &job.history {
        process.arg("--history").arg(path);
    }
    if job.plant {
        process.arg("--plant");
    }
    if job.twin {
        process.arg("--twin");
    }
    if job.counterfactual {
        process.arg("--counterfactual");
    }
    let out = process.output()?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(format!("{} seed {} did not finish: {said}", job.scenario.display(), job.seed).into());
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}

/// Calls `work` for each item, a few at a time, and `tell` with the results in the order of the items.
fn in_parallel<T: Send, R: Send>(
    items: Vec<T>,
    jobs: usize,
    work: impl Fn(&T) -> R + Sync,
    mut tell: impl FnMut(T, R) -> Result<(), Failure> + Send,
) -> Result<(), Failure> {
    let queue: Mutex<VecDeque<(usize, T)>> = Mutex::new(items.into_iter().enumerate().collect());
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..jobs.max(1) {
            let (queue, work, send) = (&queue, &work, send.clone());
            scope.spawn(move || {
                loop {
                    let next = queue.lock().ok().and_then(|mut q| q.pop_front());
                    let Some((index, item)) = next else { break };
                    let result = work(&item);
                    if send.send((index, item, result)).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        let mut waiting = std::collections::BTreeMap::new();
        let mut next = 0;
        for (index, item, result) in receive {
            waiting.insert(index, (item, result));
            while let Some((item, result)) = waiting.remove(&next) {
                tell(item, result)?;
                next += 1;
            }
        }
        Ok(())
    })
}

fn write_history(path: &Path, events: &[simulacro_core::history::Event]) -> Result<(), Failure> {
    let mut text = String::new();
    for event in events {
        text.push_str(&serde_json::to_string(event)?);
        text.push('\n');
    }
    Ok(std::fs::write(path, text)?)
}

/// Whether what a story that wants to be caught breaks is whole once its defence is on again: otherwise it catches something else.
fn defended(job: &Job, story: &Story, judgement: &mut Judgement) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let scenario = folder.path().join("defended.toml");
    std::fs::write(&scenario, story.to_toml()?)?;
    let defended = child(&Job { scenario, history: None, ..job.clone() })?;
    let is_broken = |problem: &&String| matches!(story, Story::Batch(s) if s.expect.broken.iter().any(|name| problem.starts_with(&format!("{name}: "))));
    let (verdict, expected, problems) = match story {
        Story::Batch(_) => {
            let problems: Vec<_> = defended.broken.iter().filter(is_broken).cloned().collect();
            (if problems.is_empty() { "whole" } else { "broken" }, "whole", problems)
        }
        Story::Stream(_) | Story::Platform(_) => (defended.verdict.as_str(), "holds", defended.problems.clone()),
    };
    if verdict != expected {
        let problems = problems.join("; ");
        judgement.problems.push(format!("defended: with its defence on the story is {verdict}, expected {expected}: {problems}"));
        judgement.verdict = "violated".into();
    }
    Ok(())
}

/// The judgement of a run, with the problems that only the comparison with its twin shows.
fn judged(job: &Job, scenario: &Story) -> Result<(Judgement, Option<Judgement>, f64), Failure> {
    let began = interpose::real_nanos();
    let mut judgement = child(job)?;
    let mut fault_free = None;
    if scenario.converges() {
        let twin = child(&Job { history: None, twin: true, ..job.clone() })?;
        if twin.hashes != judgement.hashes {
            let (found, expected) = (&judgement.hashes, &twin.hashes);
            judgement.problems.push(format!("invariant converges: found tables {found:?}, the fault-free twin has {expected:?}"));
            judgement.verdict = "violated".into();
        }
        fault_free = Some(twin);
    }
    if let Some(story) = scenario.defended() {
        defended(job, &story, &mut judgement)?;
    }
    if scenario.counterfactual().is_some() {
        let without = child(&Job { history: None, counterfactual: true, ..job.clone() })?;
        judgement.without = without.incident.map(Box::new);
    }
    Ok((judgement, fault_free, (interpose::real_nanos() - began) as f64 / 1e9))
}

fn show(job: &Job, scenario: &Story, judgement: &Judgement, wall: f64) {
    let good = judgement.verdict == "holds";
    let name = job.scenario.file_stem().and_then(|s| s.to_str()).unwrap_or("scenario");
    println!("{}  {name}  seed={}  wall {wall:.1}s  {}", if good { "ok  " } else { "FAIL" }, job.seed, scenario.summary());
    if !judgement.attempts.iter().all(|a| a.ends_with(" ok")) {
        const SHOWN: usize = 6;
        let shown = judgement.attempts.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
        let more = judgement.attempts.len().saturating_sub(SHOWN);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        println!("        source    {shown}{more}");
    }
    for line in &judgement.recovered {
        println!("        restored  {line}");
    }
    // A year has too many of both for a line.
    let is_platform = matches!(scenario, Story::Platform(_));
    if !judgement.alerts.is_empty() && (!is_platform || judgement.alerts.len() < 10) {
        println!("        alerts    {}", judgement.alerts.join(", "));
    }
    if !judgement.hits.is_empty() && !is_platform {
        println!("        faults    struck {:?} times", judgement.hits);
    }
    for (name, incident) in [("incident", judgement.incident.as_ref()), ("without", judgement.without.as_deref())] {
        if let Some(incident) = incident {
            println!("        {name:<9} {}", incident.line());
        }
    }
    match (scenario, &judgement.stream) {
        (Story::Batch(scenario), _) => {
            let missing = scenario.days as usize - judgement.published.len();
            match (judgement.published.iter().next_back(), missing) {
                (Some((fecha, at)), 0) => println!("        published {fecha} at {}", at.format("%m-%d %H:%M:%S")),
                (_, missing) => println!("        published {} of {} days", scenario.days as usize - missing, scenario.days),
            }
        }
        (Story::Stream(_), Some(figures)) => println!("        stream    {}", figures.line()),
        (Story::Platform(_), _) => {
            if let Some(report) = &judgement.platform {
                for line in report.lines() {
                    println!("        {line}");
                }
                // A twin is a second run of the same length.
                let days = report.virtual_millidays as f64 / 1_000.0 * if scenario.converges() { 2.0 } else { 1.0 };
                println!("        speed     {days:.1} virtual days, {:.2} a second of wall time", days / wall.max(0.001));
            }
        }
        (Story::Stream(_), None) => {}
    }
    if !good {
        println!("        verdict   {}", judgement.verdict);
        for problem in &judgement.problems {
            println!("        {problem}");
        }
        println!("        repeat    simulacro-sim run {} --seed {}", job.scenario.display(), job.seed);
    }
}

fn run(cli: Cli) -> Result<u8, Failure> {
    match cli.command {
        Command::One { scenario, seed, history, plant, twin, counterfactual } => {
            let mut story = load(&scenario)?;
            if twin {
                story = story.twin(seed);
            }
            if counterfactual {
                story = story.counterfactual().unwrap_or(story);
            }
            let ran = match &story {
                Story::Batch(scenario) => world::run(scenario, seed, plant),
                Story::Stream(story) => stream::world::run(story, seed, plant),
                Story::Platform(story) => platform::world::run(story, seed, plant),
            };
            let (judgement, events) = ran.map_err(|e| e.to_string())?;
            if let Some(path) = history {
                write_history(&path, &events)?;
            }
            println!("{}", serde_json::to_string(&judgement)?);
            Ok(0)
        }
        Command::Sweep(sweep) => commands::sweep(&sweep),
        Command::Shrink { scenario, seed, tries, out } => commands::shrink(&scenario, seed, out.as_deref(), tries),
        Command::CrashPoints { scenario, seed, jobs, most } => commands::crash_points(&scenario, seed, jobs, most),
        Command::Explain { scenario, seed, all } => commands::explain(&scenario, seed, all),
        Command::Detection(detection) => commands::detection(&detection),
        Command::Diff { left, right } => commands::diff(&left, &right),
        Command::Faults => {
            commands::faults();
            Ok(0)
        }
        Command::Capture(capture) => incident::capture(&capture),
        Command::Replay(replay) => incident::replay(&replay),
        Command::Postmortem(postmortem) => incident::postmortem(&postmortem),
        Command::Run { path, seed, tier, history, jobs, shard, max_wall, fail_fast, mut output } => {
            let mut files = Vec::new();
            collect(&path, &mut files)?;
            files.sort();
            // A report is written from its history, which stays beside it.
            let history = history.or_else(|| output.report.clone());
            output.prepare()?;
            if let Some(folder) = &history {
                std::fs::create_dir_all(folder)?;
            }
            let mut work = Vec::new();
            for file in files {
                let scenario = load(&file)?;
                let wanted = match tier {
                    None => true,
                    Some(TierArg::Pr) => scenario.tier() == Tier::Pr,
                    Some(TierArg::Nightly) => scenario.tier() == Tier::Nightly,
                };
                for seed in seed.map_or(scenario.seeds().to_vec(), |s| vec![s]).into_iter().filter(|_| wanted) {
                    let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or("scenario");
                    let history = history.as_ref().map(|h| h.join(format!("{stem}-{seed}.jsonl")));
                    let job = Job { scenario: file.clone(), seed, history, plant: false, twin: false, counterfactual: false };
                    work.push((job, scenario.clone()));
                }
            }
            if work.is_empty() {
                return Err(format!("{}: found no scenario to run, expected at least one", path.display()).into());
            }
            // Neighbours are of one scenario and cost the same, so each shard gets every n-th.
            let (index, shards) = shard.unwrap_or((1, 1));
            let mut number = 0;
            work.retain(|_| {
                number += 1;
                number % shards == index % shards
            });
            let (mut passed, mut failed, mut left_out, mut code) = (0, 0, 0, 0);
            let began = interpose::real_nanos();
            let ended = AtomicBool::new(false);
            in_parallel(
                work,
                jobs,
                |(job, scenario)| {
                    let is_late = max_wall.is_some_and(|limit| (interpose::real_nanos() - began) / 1_000_000_000 >= limit);
                    if is_late || ended.load(Ordering::SeqCst) {
                        return Ok(None);
                    }
                    let result = judged(job, scenario);
                    if fail_fast && !matches!(&result, Ok((judgement, ..)) if judgement.verdict == "holds") {
                        ended.store(true, Ordering::SeqCst);
                    }
                    result.map(Some)
                },
                |(job, scenario), result: Result<_, Failure>| {
                    let Some((judgement, twin, wall)) = result? else {
                        left_out += 1;
                        return Ok(());
                    };
                    output.add(&job, &scenario, &judgement, twin.as_ref(), wall)?;
                    show(&job, &scenario, &judgement, wall);
                    if judgement.verdict == "holds" {
                        passed += 1;
                    } else {
                        failed += 1;
                        code = if judgement.verdict == "inconclusive" { code.max(6) } else { 1 };
                    }
                    Ok(())
                },
            )?;
            output.finish()?;
            println!("in {:.1} s of wall time", (interpose::real_nanos() - began) as f64 / 1e9);
            if left_out > 0 {
                println!("{left_out} runs were not begun");
                // What was not run proves nothing.
                code = if code == 0 { 6 } else { code };
            }
            println!("{passed} passed, {failed} failed");
            Ok(code)
        }
        Command::Canary { scenario, world, pairs, jobs, plant } => {
            scenario.as_deref().map(load).transpose()?;
            let folder = std::env::temp_dir().join(format!("simulacro-canary-{}", std::process::id()));
            std::fs::create_dir_all(&folder)?;
            let side = |seed: u64, side: &str| -> Result<(Judgement, Vec<u8>), Failure> {
                let path = folder.join(format!("{side}-{seed}"));
                let file = match (&scenario, world) {
                    (Some(file), _) => file.clone(),
                    (None, world) => {
                        // Drawn for each side anew, as the run itself is.
                        let file = folder.join(format!("{side}-{seed}.toml"));
                        std::fs::write(&file, world.unwrap_or(commands::World::Batch).draw(seed).to_toml()?)?;
                        file
                    }
                };
                let job = Job { scenario: file, seed, history: Some(path.clone()), plant, twin: false, counterfactual: false };
                let judgement = child(&job)?;
                let history = std::fs::read(&path)?;
                std::fs::remove_file(&path)?;
                Ok((judgement, history))
            };
            let (mut different, mut done, mut digests) = (0, 0, BTreeMap::new());
            let result = in_parallel(
                (1..=pairs).collect(),
                jobs,
                |&seed| Ok::<_, Failure>((side(seed, "a")?, side(seed, "b")?)),
                |seed, pair| {
                    let (a, b) = pair?;
                    done += 1;
                    digests.insert(seed, Sha256::digest(&a.1));
                    if a != b {
                        different += 1;
                        let text = |history: &[u8]| String::from_utf8_lossy(history).into_owned();
                        let (left, right) = (text(&a.1), text(&b.1));
                        let lines = left.lines().zip(right.lines()).enumerate();
                        match lines.into_iter().find(|(_, (x, y))| x != y) {
                            Some((n, (x, y))) => println!("seed {seed}: histories differ first in line {}:\n  {x}\n  {y}", n + 1),
                            None if a.1 != b.1 => println!("seed {seed}: one history is longer"),
                            None => println!("seed {seed}: same history, other result:\n  {:?}\n  {:?}", a.0, b.0),
                        }
                    }
                    Ok(())
                },
            );
            std::fs::remove_dir_all(&folder)?;
            result?;
            let all = digests.values().fold(Sha256::new(), |all, digest| all.chain_update(digest)).finalize();
            // The same on every machine, so two machines can compare what they saw by one line.
            let digest: String = all[..8].iter().map(|byte| format!("{byte:02x}")).collect();
            println!("{done} pairs, {different} different, all histories {digest}");
            Ok(if different == 0 { 0 } else { 5 })
        }
    }
}

fn main() -> ExitCode {
    interpose::disable_aslr_or_continue();
    // SAFETY: the default action is set before any other thread exists; no handler of ours runs. Without it, printing into
    // a pipe that was closed, as by `head`, would panic.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match run(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
