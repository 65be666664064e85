//! `simulacro`: the production binary.
#![expect(clippy::disallowed_methods, reason = "the application owns files and the wall clock")]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use chrono::{Datelike, NaiveDate};
use clap::{Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use simulacro_adapters::{CsvSource, connect_embedded};
use simulacro_core::{
    batch::{DayError, DayReport, MART, QUARANTINE, STAGING, canonical_hash},
    contract::Contract,
    orchestrator::SourcePolicy,
    platform::{Config, PIPELINE, Platform},
    ports::{PortError, RunState},
};
use simulacro_shop::cdnow;

const CONTRACT: &str = include_str!("../../../contracts/odcs/cdnow/ventas.yaml");

/// The data platform: batch pipelines over embedded services.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:\n  simulacro demo --data /tmp/demo\n  simulacro batch --source shop --data lake --date 1997-01-01\n  simulacro status --data lake"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the whole purchase history that ships with the program, everything embedded
    Demo {
        /// Folder for source, lake, ledger and history
        #[arg(long, default_value = "simulacro-demo")]
        data: PathBuf,
        /// Only the first N days
        #[arg(long)]
        days: Option<usize>,
    },
    /// Runs one day, or all days that a source has
    Batch {
        /// Folder with ventas.csv
        #[arg(long)]
        source: PathBuf,
        /// Folder for lake, ledger and history
        #[arg(long)]
        data: PathBuf,
        /// The day, for example 1997-01-01; without it all days
        #[arg(long)]
        date: Option<NaiveDate>,
        /// TOML with source_policy, alert_after_s and startup_s
        #[arg(long)]
        config: Option<PathBuf>,
    },
    /// Prints runs by state and the canonical hash of each table
    Status {
        /// Folder for lake, ledger and history
        #[arg(long)]
        data: PathBuf,
    },
}

fn default_config() -> Config {
    Config { source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 }, alert_after_s: 60, startup_s: 0 }
}

type Failure = Box<dyn std::error::Error>;

fn money(cents: i64) -> String {
    let whole = (cents / 100).to_string();
    let grouped = whole.as_bytes().rchunks(3).rev().map(|c| String::from_utf8_lossy(c)).collect::<Vec<_>>().join(",");
    format!("{grouped}.{:02}", cents % 100)
}

async fn assemble(source: &Path, data: &Path, config: Config) -> Result<Platform, Failure> {
    Ok(Platform::new(
        config,
        Contract::parse("contracts/odcs/cdnow/ventas.yaml", CONTRACT)?,
        connect_embedded(source, data).await?,
    ))
}

/// Runs the days in order, with progress, and stops at the first that is not published.
async fn run_days(platform: &Platform, days: &[NaiveDate]) -> Result<Vec<(NaiveDate, DayReport)>, Failure> {
    let bar = ProgressBar::new(days.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} days  {msg}  eta {eta}")?);
    let mut done = Vec::new();
    for &fecha in days {
        bar.set_message(fecha.to_string());
        let outcome = platform.run_day(fecha, platform.ports.env.now()).await?;
        done.push((fecha, outcome.result?));
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(done)
}

fn summary(days: &[(NaiveDate, DayReport)]) {
    println!("{:<8} {:>5} {:>9} {:>10} {:>9} {:>14}", "month", "days", "published", "rejected", "other", "revenue");
    let mut months: std::collections::BTreeMap<(i32, u32), [i64; 5]> = Default::default();
    for (fecha, report) in days {
        let fate = |f: &str| report.fates.get(f).copied().unwrap_or(0) as i64;
        let row = months.entry((fecha.year(), fecha.month())).or_default();
        row[0] += 1;
        row[1] += fate("published");
        row[2] += fate("rejected");
        row[3] += fate("quarantined") + fate("deduplicated");
        row[4] += report.revenue_cents;
    }
    let most = months.values().map(|m| m[4]).max().unwrap_or(1).max(1);
    let mut total = [0; 5];
    for ((year, month), m) in &months {
        let bar = "█".repeat((m[4] * 40 / most) as usize);
        println!("{year}-{month:02}  {:>5} {:>9} {:>10} {:>9} {:>14} {bar}", m[0], m[1], m[2], m[3], money(m[4]));
        for (t, v) in total.iter_mut().zip(m) {
            *t += v;
        }
    }
    let read: u64 = days.iter().map(|(_, r)| r.expected).sum();
    println!("{:<8} {:>5} {:>9} {:>10} {:>9} {:>14}", "total", total[0], total[1], total[2], total[3], money(total[4]));
    println!("{read} rows read = {} published + {} rejected + {} quarantined or deduplicated", total[1], total[2], total[3]);
}

async fn hashes(platform: &Platform) -> Result<(), Failure> {
    for table in [STAGING, QUARANTINE, MART] {
        println!("{table:<28} {}", canonical_hash(platform.ports.lakehouse.as_ref(), table).await?);
    }
    Ok(())
}

/// Writes one line per day: `fecha,rows,published,rejected,revenue`.
fn write_daily(data: &Path, days: &[(NaiveDate, DayReport)]) -> Result<PathBuf, Failure> {
    let mut text = String::from("fecha,rows,published,rejected,revenue\n");
    for (fecha, r) in days {
        let fate = |f: &str| r.fates.get(f).copied().unwrap_or(0);
        text.push_str(&format!(
            "{fecha},{},{},{},{}.{:02}\n",
            r.expected,
            fate("published"),
            fate("rejected"),
            r.revenue_cents / 100,
            r.revenue_cents % 100
        ));
    }
    let path = data.join("revenue_per_day.csv");
    std::fs::write(&path, text)?;
    Ok(path)
}

async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Demo { data, days } => {
            let source = data.join("source");
            std::fs::create_dir_all(&source)?;
            std::fs::write(source.join("ventas.csv"), cdnow::to_csv(&cdnow::parse(cdnow::BYTES)?))?;
            let mut all = CsvSource::open(&source)?.days("ventas")?;
            all.truncate(days.unwrap_or(usize::MAX));
            let platform = assemble(&source, &data, default_config()).await?;
            let done = run_days(&platform, &all).await?;
            if let Some((fecha, first)) = done.first() {
                println!(
                    "first day {fecha}: {} rows, fates {:?}, revenue {}\n",
                    first.expected,
                    first.fates,
                    money(first.revenue_cents)
                );
            }
            summary(&done);
            println!("revenue per day: {}", write_daily(&data, &done)?.display());
            hashes(&platform).await
        }
        Command::Batch { source, data, date, config } => {
            let config = match config {
                None => default_config(),
                Some(path) => {
                    let text = std::fs::read_to_string(&path).map_err(|e| format!("read config {}: {e}", path.display()))?;
                    toml::from_str(&text).map_err(|e| format!("config {}: {e}", path.display()))?
                }
            };
            let table = CsvSource::open(&source)?;
            let days = match date {
                Some(date) => vec![date],
                None => table.days("ventas")?,
            };
            let platform = assemble(&source, &data, config).await?;
            summary(&run_days(&platform, &days).await?);
            Ok(())
        }
        Command::Status { data } => {
            let source = data.join("source");
            std::fs::create_dir_all(&source)?;
            let platform = assemble(&source, &data, default_config()).await?;
            let runs = platform.ports.ledger.runs(PIPELINE).await?;
            for state in [RunState::Succeeded, RunState::Held, RunState::Failed, RunState::Running] {
                println!("{:<10} {}", format!("{state:?}").to_lowercase(), runs.iter().filter(|r| r.state == state).count());
            }
            hashes(&platform).await
        }
    }
}

/// The whole chain of causes, one line each.
fn explain(error: &dyn std::error::Error) {
    eprintln!("error: {error}");
    let mut next = error.source();
    while let Some(cause) = next {
        eprintln!("  because: {cause}");
        next = cause.source();
    }
}

fn main() -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => Arc::new(runtime),
        Err(e) => {
            explain(&e);
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(Cli::parse().command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            explain(error.as_ref());
            let held = error.downcast_ref::<DayError>().is_some_and(|e| matches!(e, DayError::Held { .. }));
            let busy = error
                .downcast_ref::<DayError>()
                .is_some_and(|e| matches!(e, DayError::Port { source: PortError { code: Some(c), .. }, .. } if c == "BUSY"));
            // 3 is a broken contract, 4 a pipeline that somebody else is running, 1 anything else.
            ExitCode::from(if held {
                3
            } else if busy {
                4
            } else {
                1
            })
        }
    }
}
