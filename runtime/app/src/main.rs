//! `simulacro`: the production binary.
#![expect(clippy::disallowed_methods, reason = "the application owns files and the wall clock")]

mod backfill;
mod batch;
mod config;
mod contract;
mod demo;
mod dimensions;
mod doctor;
mod models;
mod options;
mod orchestrate;
mod query;
mod report;
mod restore;
mod sinks;
mod slo;
mod status;
mod stream;
mod supervise;
mod telemetry;
mod transact;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use simulacro_core::{batch::DayError, ports::PortError};

use options::{Failure, default_config, load_contract, read};

/// The data platform: batch pipelines over embedded services.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  simulacro demo --data /tmp/demo
  simulacro batch run --source shop --data lake --date 1997-01-01
  simulacro batch run --source shop --data lake --contract my_ventas.yaml --metrics 127.0.0.1:9464
  simulacro batch run --postgres postgres://lector@db.local/tienda --data lake --contract ventas --date 2024-03-17
  simulacro batch backfill plan --data lake --from 1997-01-01 --to 1997-01-31
  simulacro batch backfill apply --source shop --data lake --from 1997-01-01 --to 1997-01-31
  simulacro restore staging --source shop --data lake --execute
  simulacro status --data lake
  simulacro query --data lake \"SELECT * FROM marts.metricas_diarias ORDER BY fecha, region\"
  simulacro doctor --data lake --source shop
  simulacro contract diff ventas my_ventas.yaml
  simulacro models explain metricas_producto --date 1997-01-01
  simulacro models test --data lake --date 1997-01-01
  simulacro produce --data lake --date 1997-01-01
  simulacro stream --data lake --workers 3 --until-caught-up
  simulacro stream-reset --data lake --to-time 2024-03-18T14:00:00Z
  simulacro reconcile --data lake --date 1997-01-01
  simulacro slo status --data lake
  simulacro orchestrate --postgres postgres://lector@db.local/tienda --data lake --config orchestrate.toml
  simulacro orchestrate --postgres postgres://lector@db.local/tienda --data lake --kafka broker.local:9092
  simulacro run --config platform.toml
  simulacro pause ecommerce_batch_daily --data lake --by ana --why 'stock-taking'

Configuration: a flag, then a variable such as SIMULACRO__LAKE__STORE, then the TOML that --config or SIMULACRO_CONFIG names, with
any of [source], [lake], [ledger], [batch], [dimensions], [kafka], [registry], [metrics], [stream], [orchestrator], [assets.NAME]
and [alerts], then the default.

Exit codes: 0 done, 1 failed, 2 usage, 3 held by a contract or a gate, 4 somebody else is at work there, or batch and stream differ by
more than 5 %"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs the whole purchase history that ships with the program, everything embedded
    Demo(demo::DemoArgs),
    /// The daily batch pipeline
    #[command(subcommand)]
    Batch(batch::BatchCommand),
    /// Brings back tables whose objects were deleted: prints the ways, and with --execute takes the cheapest that works
    Restore(Box<restore::RestoreArgs>),
    /// Prints runs by state and the canonical hash of each table
    Status(status::StatusArgs),
    /// Runs SQL over raw, staging, dimensions, marts and the warehouse, now or as of a time
    Query(query::QueryArgs),
    /// Checks every service that is configured, and says what is wrong and what to do
    Doctor(doctor::DoctorArgs),
    /// Data contracts: list, compare, check
    #[command(subcommand)]
    Contract(contract::ContractCommand),
    /// SQL models: list, explain, draw, run, test
    #[command(subcommand)]
    Models(models::ModelsCommand),
    /// Writes the events of a day, consistent with its sales, to the topic of clicks
    Produce(stream::ProduceArgs),
    /// Runs the streaming job realtime_metrics
    Stream(stream::StreamArgs),
    /// Prints lag, watermark, fates and windows of the streaming job
    StreamStatus(stream::StatusArgs),
    /// Lets the streaming job read on from another time: prints the plan, and with --execute carries it out
    StreamReset(stream::ResetArgs),
    /// Service level objectives and their error budgets
    #[command(subcommand)]
    Slo(slo::SloCommand),
    /// Compares a day's revenue of the batch with the stream's, per region, with the cause of each difference
    Reconcile(stream::ReconcileArgs),
    /// Dimensions: refresh them, look at their versions
    #[command(subcommand)]
    Dimensions(dimensions::DimensionsCommand),
    /// Runs the assets on their schedules: waits for sources, tries again, alerts, resumes after a crash. All services of a
    /// configuration: simulacro run --config platform.toml
    #[command(visible_alias = "run")]
    Orchestrate(orchestrate::OrchestrateArgs),
    /// Prints who leads, and each asset's next schedule, pause, breaker and newest runs
    Runs(orchestrate::RunsArgs),
    /// Stops an asset for a while: its turns are skipped and recorded
    Pause(orchestrate::PauseArgs),
    /// Ends a pause
    Resume(orchestrate::ResumeArgs),
}

/// Runs a command and returns the exit code of one that ended without an error.
async fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Demo(args) => demo::run(args).await?,
        Command::Batch(command) => return batch::run(command).await,
        Command::Restore(args) => return restore::run(*args).await,
        Command::Status(args) => status::run(args).await?,
        Command::Query(args) => query::run(args).await?,
        Command::Doctor(args) => return doctor::run(args).await,
        Command::Contract(command) => return contract::run(command).await,
        Command::Models(command) => return models::run(command).await,
        Command::Produce(args) => stream::produce(args).await?,
        Command::Stream(args) => stream::stream(args).await?,
        Command::StreamStatus(args) => stream::stream_status(args).await?,
        Command::StreamReset(args) => stream::stream_reset(args).await?,
        Command::Slo(command) => return slo::run(command).await,
        Command::Reconcile(args) => stream::reconcile(args).await?,
        Command::Dimensions(command) => return dimensions::run(command).await,
        Command::Orchestrate(args) => orchestrate::orchestrate(args).await?,
        Command::Runs(args) => orchestrate::runs(args).await?,
        Command::Pause(args) => orchestrate::pause_asset(args).await?,
        Command::Resume(args) => orchestrate::resume_asset(args).await?,
    }
    Ok(0)
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

/// 3 is a day held by a contract, 4 a pipeline or event log that somebody else has, or a reconciliation that failed, 1
/// anything else.
fn exit_code(error: &Failure) -> u8 {
    let is_busy = error.downcast_ref::<PortError>().is_some_and(|e| e.code.as_deref() == Some("BUSY"));
    if is_busy || error.is::<stream::DifferenceTooLarge>() {
        return 4;
    }
    match error.downcast_ref::<DayError>() {
        Some(DayError::Held { .. }) => 3,
        Some(DayError::Port { source: PortError { code: Some(code), .. }, .. }) if code == "BUSY" => 4,
        _ => 1,
    }
}

/// Lets `simulacro ... | head` end quietly: std ignores the signal of a closed pipe, and printing would panic instead.
fn end_with_the_reader() {
    // SAFETY: the default action is set before any other thread exists; no handler of ours runs.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Keeps the C library from a heap of its own for each thread: freed memory of one stage then serves the next.
fn share_the_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: called first in `main`, before any other thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2)
    };
}

fn main() -> ExitCode {
    share_the_heap();
    end_with_the_reader();
    telemetry::init_logs();
    let variables = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    // What is no text is told by the parser.
    let said: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
    let cli = match config::arguments(&Cli::command(), said, variables.collect()) {
        Ok(arguments) => Cli::parse_from(arguments),
        Err(error) => {
            explain(error.as_ref());
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            explain(&e);
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(cli.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            explain(error.as_ref());
            ExitCode::from(exit_code(&error))
        }
    }
}
