//! `simulacro batch`: the daily pipeline, for one day, for all days of a source, or for a range with a plan.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use chrono::NaiveDate;
use clap::{Args, Subcommand};
use simulacro_adapters::PrometheusMetrics;
use simulacro_core::platform::Platform;

use crate::{
    backfill,
    options::{Failure, RunArgs, SourceArgs, StoreArgs},
    report::{self, Day},
    telemetry::{self, Progress},
};

/// Commands of the daily pipeline.
#[derive(Subcommand)]
pub enum BatchCommand {
    /// Runs one day, or all days that a source has; a day may be run again at any time
    Run(Box<BatchRunArgs>),
    /// Runs the days of a range that need it, with a plan first
    #[command(subcommand)]
    Backfill(backfill::BackfillCommand),
}

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro batch run --source shop --data lake --date 1997-01-01
  simulacro batch run --source shop --data lake --models metricas_diarias
  simulacro batch run --postgres postgres://lector@db.local/tienda --data lake --contract ventas --date 2024-03-17

Exit codes: 0 published, 1 failed, 2 usage, 3 held by a gate, 4 somebody else is running the pipeline")]
pub struct BatchRunArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// Folder for lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// The day, for example 1997-01-01; without it all days of a folder
    #[arg(long, required_unless_present = "source")]
    date: Option<NaiveDate>,
    #[command(flatten)]
    run: RunArgs,
    /// Address of a metrics endpoint while the run lasts
    #[arg(long)]
    metrics: Option<SocketAddr>,
}

/// Runs the days in order, with progress, and stops at the first that is not published.
pub async fn run_days(platform: &Platform, days: &[NaiveDate]) -> Result<Vec<Day>, Failure> {
    let progress = Progress::new("days", days.len() as u64)?;
    let mut done = Vec::new();
    for &fecha in days {
        progress.at(&fecha.to_string());
        let outcome = platform.run_day(fecha, platform.ports.env.now()).await?;
        done.push((fecha, outcome.result?));
        progress.step();
    }
    Ok(done)
}

/// Serves metrics, where somebody asked for it.
///
/// # Errors
/// When the address is taken.
pub async fn metrics(address: Option<SocketAddr>) -> Result<Arc<PrometheusMetrics>, Failure> {
    let metrics = Arc::new(PrometheusMetrics::default());
    if let Some(address) = address {
        telemetry::serve_metrics(address, metrics.clone()).await.map_err(|e| format!("listen on {address} for metrics: {e}"))?;
    }
    Ok(metrics)
}

async fn run_command(args: BatchRunArgs) -> Result<(), Failure> {
    // Everything that can be wrong in the arguments is read before anything is written.
    let (config, contract, project) = args.run.load()?;
    let source = args.source.open()?;
    let days = match args.date {
        Some(date) => vec![date],
        None => source.days(&contract.table).await?,
    };
    let ports = source.connect(&args.store, &args.data, metrics(args.metrics).await?).await?;
    let platform = Platform::new(config, contract, ports).with_models(&project)?;
    print!("{}", report::summary(&run_days(&platform, &days).await?));
    Ok(())
}

/// Runs a command and returns the exit code.
pub async fn run(command: BatchCommand) -> Result<u8, Failure> {
    match command {
        BatchCommand::Run(args) => run_command(*args).await.map(|()| 0),
        BatchCommand::Backfill(command) => backfill::run(command).await,
    }
}
