//! The command line of a pipeline in the simulator: run, sweep, shrink, canary. Each run is a process of its own, this
//! program again, so that globals start fresh.
#![expect(clippy::disallowed_methods, reason = "the driver owns processes and files; nothing here runs inside the world")]

use std::{
    path::{Path, PathBuf},
    process::{Command as Process, ExitCode},
    sync::Arc,
};

use clap::{Parser, Subcommand};
use simulacro_core::history::Event;

use super::{Pipeline, Story, run::run};
use crate::{
    interpose, report,
    rng::Stream,
    world::{Failure, Judgement},
};

/// At most so many candidates are tried while a story shrinks.
const SHRINK_TRIES: usize = 60;

/// A pipeline in the simulator.
#[derive(Parser)]
#[command(after_help = "Exit codes: 0 holds, 1 violated, 2 usage, 5 non-deterministic, 6 inconclusive")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a story, or the one that the seed draws
    Run {
        /// TOML file
        story: Option<PathBuf>,
        /// Seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// HTML report
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
    },
    /// Runs the stories that seeds draw; failing ones are shrunk and saved
    Sweep {
        /// Number of seeds, from 1
        #[arg(long, default_value_t = 20)]
        seeds: u64,
        /// Folder for failing stories
        #[arg(long, default_value = "failing")]
        out: PathBuf,
    },
    /// Shrinks a failing story to the fewest faults and processes that still fail
    Shrink {
        /// TOML file
        story: PathBuf,
        /// Seed
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Runs pairs of the same seed in separate processes and compares histories and records
    Canary {
        /// TOML file; without it each seed draws its own
        story: Option<PathBuf>,
        /// Number of pairs; pair n has seed n
        #[arg(long, default_value_t = 5)]
        pairs: u64,
        /// Plants a source of nondeterminism, which must be found
        #[arg(long)]
        plant: bool,
    },
    /// One run in this process; prints the judgement as JSON
    #[command(hide = true)]
    One {
        story: PathBuf,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        history: PathBuf,
        #[arg(long)]
        plant: bool,
    },
}

/// The program of a pipeline: what a `main` returns. The binary that calls it has the simulator's clock and entropy.
pub fn main<P: Pipeline>(pipeline: P) -> ExitCode {
    interpose::disable_aslr_or_continue();
    match Driver::new(pipeline).and_then(|driver| driver.obey(Cli::parse().command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

struct Driver<P> {
    pipeline: Arc<P>,
    /// For stories and histories of runs.
    work: tempfile::TempDir,
}

struct Ran {
    judgement: Judgement,
    events: Vec<Event>,
}

fn read(path: &Path) -> Result<Story, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))?;
    Ok(Story::parse(&text).map_err(|e| format!("story {}: {e}", path.display()))?)
}

/// The names of the broken invariants.
fn signature(judgement: &Judgement) -> Vec<&str> {
    let mut names: Vec<&str> = judgement.broken.iter().filter_map(|line| line.split(':').next()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn exit_code(verdict: &str) -> u8 {
    match verdict {
        "holds" => 0,
        "inconclusive" => 6,
        _ => 1,
    }
}

impl<P: Pipeline> Driver<P> {
    fn new(pipeline: P) -> Result<Self, Failure> {
        Ok(Self { pipeline: Arc::new(pipeline), work: tempfile::tempdir()? })
    }

    fn draw(&self, seed: u64) -> Story {
        self.pipeline.draw(&mut Stream::root(seed).child("swarm"))
    }

    fn story(&self, path: Option<&Path>, seed: u64) -> Result<Story, Failure> {
        path.map_or_else(|| Ok(self.draw(seed)), read)
    }

    fn child(&self, story: &Story, seed: u64, plant: bool) -> Result<Ran, Failure> {
        let (path, history) = (self.work.path().join("story.toml"), self.work.path().join("history.jsonl"));
        std::fs::write(&path, story.to_toml()?)?;
        let mut process = Process::new(std::env::current_exe()?);
        process.arg("one").arg(&path).arg("--seed").arg(seed.to_string()).arg("--history").arg(&history);
        if plant {
            process.arg("--plant");
        }
        let out = process.output()?;
        if !out.status.success() {
            return Err(format!("seed {seed} did not finish: {}", String::from_utf8_lossy(&out.stderr)).into());
        }
        let events = std::fs::read_to_string(&history)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Ran { judgement: serde_json::from_slice(&out.stdout)?, events })
    }

    fn tell(&self, story: &Story, seed: u64, judgement: &Judgement) {
        let good = judgement.verdict == "holds";
        println!("{}  {}  seed={seed}  {}", if good { "ok  " } else { "FAIL" }, self.pipeline.name(), story.summary);
        if !judgement.hits.is_empty() {
            println!("        faults    struck {:?} times", judgement.hits);
        }
        if !good {
            println!("        verdict   {}", judgement.verdict);
            judgement.problems.iter().for_each(|problem| println!("        {problem}"));
        }
    }

    /// The smallest story found that breaks the same invariants.
    fn smallest(&self, story: &Story, seed: u64, broken: &Judgement) -> Result<Story, Failure> {
        let (mut best, mut tries) = (story.clone(), 0);
        'again: loop {
            for candidate in best.smaller() {
                tries += 1;
                if tries > SHRINK_TRIES {
                    return Ok(best);
                }
                let judgement = self.child(&candidate, seed, false)?.judgement;
                if judgement.verdict == broken.verdict && signature(&judgement) == signature(broken) {
                    best = candidate;
                    continue 'again;
                }
            }
            return Ok(best);
        }
    }

    fn obey(&self, command: Command) -> Result<u8, Failure> {
        match command {
            Command::One { story, seed, history, plant } => {
                let (judgement, events) = run(&self.pipeline, &read(&story)?, seed, plant)?;
                let mut text = String::new();
                for event in events {
                    text.push_str(&serde_json::to_string(&event)?);
                    text.push('\n');
                }
                std::fs::write(history, text)?;
                println!("{}", serde_json::to_string(&judgement)?);
                Ok(0)
            }
            Command::Run { story: path, seed, report } => {
                let story = self.story(path.as_deref(), seed)?;
                let ran = self.child(&story, seed, false)?;
                self.tell(&story, seed, &ran.judgement);
                if let Some(file) = report {
                    let given = path.map(|p| format!(" {}", p.display())).unwrap_or_default();
                    let repeat = format!("{} run{given} --seed {seed}", self.pipeline.name());
                    std::fs::write(
                        &file,
                        report::own_html(self.pipeline.name(), &story, seed, &ran.judgement, &ran.events, &repeat),
                    )?;
                    println!("        report    {}", file.display());
                }
                Ok(exit_code(&ran.judgement.verdict))
            }
            Command::Sweep { seeds, out } => {
                let (mut held, mut failed) = (0, 0);
                for seed in 1..=seeds {
                    let story = self.draw(seed);
                    let judgement = self.child(&story, seed, false)?.judgement;
                    if judgement.verdict == "holds" {
                        held += 1;
                        continue;
                    }
                    failed += 1;
                    self.tell(&story, seed, &judgement);
                    let small = self.smallest(&story, seed, &judgement)?;
                    std::fs::create_dir_all(&out)?;
                    let path = out.join(format!("seed-{seed}-shrunk.toml"));
                    std::fs::write(&path, small.to_toml()?)?;
                    println!("        shrunk    from {} faults to {}: {}", story.fault.len(), small.fault.len(), path.display());
                }
                println!("{held} seeds hold, {failed} fail");
                Ok(u8::from(failed > 0))
            }
            Command::Shrink { story: path, seed } => {
                let story = read(&path)?;
                let judgement = self.child(&story, seed, false)?.judgement;
                if judgement.verdict == "holds" {
                    return Err(format!("{} seed {seed}: found that it holds, expected a failing story", path.display()).into());
                }
                print!("{}", self.smallest(&story, seed, &judgement)?.to_toml()?);
                Ok(0)
            }
            Command::Canary { story, pairs, plant } => {
                let mut different = 0;
                for seed in 1..=pairs {
                    let story = self.story(story.as_deref(), seed)?;
                    let (a, b) = (self.child(&story, seed, plant)?, self.child(&story, seed, plant)?);
                    if (&a.judgement, &a.events) != (&b.judgement, &b.events) {
                        different += 1;
                        let at = a.events.iter().zip(&b.events).position(|(x, y)| x != y);
                        println!("seed {seed}: the histories part at event {at:?} of {} and {}", a.events.len(), b.events.len());
                    }
                }
                println!("{pairs} pairs, {different} different");
                Ok(if different == 0 { 0 } else { 5 })
            }
        }
    }
}
