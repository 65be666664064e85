//! `simulacro-sim`: runs scenarios, each in a process of its own, and proves that runs repeat.
#![expect(clippy::disallowed_methods, reason = "the driver owns processes and files; nothing here runs inside the world")]

use std::{
    path::{Path, PathBuf},
    process::{Command as Process, ExitCode},
};

use clap::{Parser, Subcommand};
use sha2::{Digest, Sha256};
use simulacro_sim::{
    interpose,
    scenario::{Scenario, Tier},
    world::{self, Judgement},
};

/// Deterministic simulation of the data platform.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  simulacro-sim run scenarios\n  simulacro-sim run scenarios/monday_0300_waiting.toml --seed 7 --history out\n  simulacro-sim canary scenarios/monday_0300_waiting.toml --pairs 200\n\nExit codes: 0 holds, 1 violated, 2 usage, 5 non-deterministic, 6 inconclusive"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
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
        /// Only scenarios of this tier: pr or nightly
        #[arg(long)]
        tier: Option<String>,
        /// Folder for the histories, one JSON object a line
        #[arg(long)]
        history: Option<PathBuf>,
    },
    /// Runs pairs of the same seed in separate processes and compares history and tables
    Canary {
        /// TOML file
        scenario: PathBuf,
        /// Number of pairs; pair n has seed n
        #[arg(long, default_value_t = 10)]
        pairs: u64,
        /// Plants a source of nondeterminism, which must be found
        #[arg(long)]
        plant: bool,
    },
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
    },
}

type Failure = Box<dyn std::error::Error>;

fn load(path: &Path) -> Result<Scenario, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))?;
    Ok(toml::from_str(&text).map_err(|e| format!("scenario {}: {e}", path.display()))?)
}

fn collect(path: &Path, into: &mut Vec<PathBuf>) -> Result<(), Failure> {
    if path.is_dir() {
        for entry in std::fs::read_dir(path)? {
            collect(&entry?.path(), into)?;
        }
    } else if path.extension().is_some_and(|e| e == "toml") {
        into.push(path.to_owned());
    }
    Ok(())
}

/// Runs one seed in a process of its own.
fn child(scenario: &Path, seed: u64, history: Option<&Path>, plant: bool) -> Result<Judgement, Failure> {
    let mut process = Process::new(std::env::current_exe()?);
    process.arg("one").arg(scenario).arg("--seed").arg(seed.to_string());
    if let Some(path) = history {
        process.arg("--history").arg(path);
    }
    if plant {
        process.arg("--plant");
    }
    let out = process.output()?;
    if !out.status.success() {
        return Err(format!("{} seed {seed} did not finish: {}", scenario.display(), String::from_utf8_lossy(&out.stderr)).into());
    }
    Ok(serde_json::from_slice(&out.stdout)?)
}

fn run(cli: Cli) -> Result<u8, Failure> {
    match cli.command {
        Command::One { scenario, seed, history, plant } => {
            let (judgement, events) = world::run(&load(&scenario)?, seed, plant)?;
            if let Some(path) = history {
                let mut text = String::new();
                for event in &events {
                    text.push_str(&serde_json::to_string(event)?);
                    text.push('\n');
                }
                std::fs::write(&path, text)?;
            }
            println!("{}", serde_json::to_string(&judgement)?);
            Ok(0)
        }
        Command::Run { path, seed, tier, history } => {
            let mut files = Vec::new();
            collect(&path, &mut files)?;
            files.sort();
            if let Some(folder) = &history {
                std::fs::create_dir_all(folder)?;
            }
            let (mut passed, mut failed, mut code) = (0, 0, 0);
            for file in &files {
                let scenario = load(file)?;
                let name = match scenario.tier {
                    Tier::Pr => "pr",
                    Tier::Nightly => "nightly",
                };
                if tier.as_deref().is_some_and(|t| t != name) {
                    continue;
                }
                for seed in seed.map_or(scenario.seeds.clone(), |s| vec![s]) {
                    let began = interpose::real_nanos();
                    let stem = file.file_stem().and_then(|s| s.to_str()).unwrap_or("scenario");
                    let out = history.as_ref().map(|h| h.join(format!("{stem}-{seed}.jsonl")));
                    let judgement = child(file, seed, out.as_deref(), false)?;
                    let wall = (interpose::real_nanos() - began) as f64 / 1e9;
                    let good = judgement.verdict == "holds";
                    println!(
                        "{}  {stem}  seed={seed}  wall {wall:.1}s  {}",
                        if good { "ok  " } else { "FAIL" },
                        scenario.summary
                    );
                    for line in [&judgement.attempts, &judgement.alerts] {
                        if !line.is_empty() {
                            println!("        {}", line.join(", "));
                        }
                    }
                    if let Some(at) = judgement.published_at {
                        println!("        published at {at}");
                    }
                    if good {
                        passed += 1;
                    } else {
                        failed += 1;
                        code = if judgement.verdict == "inconclusive" { 6 } else { 1 };
                        println!("        verdict {}", judgement.verdict);
                        for problem in &judgement.problems {
                            println!("        {problem}");
                        }
                        println!("        repeat: simulacro-sim run {} --seed {seed}", file.display());
                    }
                }
            }
            println!("{passed} passed, {failed} failed");
            if passed + failed == 0 {
                return Err(format!("{}: found no scenario to run", path.display()).into());
            }
            Ok(code)
        }
        Command::Canary { scenario, pairs, plant } => {
            let folder = std::env::temp_dir().join(format!("simulacro-canary-{}", std::process::id()));
            std::fs::create_dir_all(&folder)?;
            let mut different = 0;
            for seed in 1..=pairs {
                let mut seen = Vec::new();
                for side in ["a", "b"] {
                    let path = folder.join(side);
                    let judgement = child(&scenario, seed, Some(&path), plant)?;
                    let history = std::fs::read(&path)?;
                    seen.push((Sha256::digest(&history).to_vec(), judgement, history));
                }
                if seen[0] != seen[1] {
                    different += 1;
                    let text = |i: usize| String::from_utf8_lossy(&seen[i].2).into_owned();
                    let (a, b) = (text(0), text(1));
                    let first = a.lines().zip(b.lines()).enumerate().find(|(_, (x, y))| x != y);
                    println!("seed {seed} differs, first at {first:#?}");
                }
            }
            std::fs::remove_dir_all(&folder)?;
            println!("{pairs} pairs, {different} different");
            Ok(if different == 0 { 0 } else { 5 })
        }
    }
}

fn main() -> ExitCode {
    interpose::disable_aslr_or_continue();
    match run(Cli::parse()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
