//! `simulacro`: the production binary.
#![expect(clippy::disallowed_methods, reason = "the application owns files and the wall clock")]

mod contract;
mod models;
mod orchestrate;
mod report;
mod stream;
mod telemetry;

use std::{
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use chrono::NaiveDate;
use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use report::{Day, money};
use simulacro_adapters::{
    CopyReader, CsvSource, NaiveTimestamps, PostgresServer, PostgresSource, PostgresSourceConfig, PrometheusMetrics,
    connect_embedded, connect_folder,
};
use simulacro_core::{
    batch::{DayError, MART, QUARANTINE, STAGING, WAREHOUSE, canonical_hash, strings},
    contract::{Contract, catalogue},
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::{Config, PIPELINE, Platform},
    ports::{PortError, RunState, TableSource},
};
use simulacro_lakehouse::copy::CopyLimits;
use simulacro_shop::cdnow;

/// The contract of the purchases that ship with the program, by the name that `--contract` takes; those of the reference
/// platform go by their table.
const CDNOW: (&str, &str) = ("cdnow", include_str!("../../../contracts/odcs/cdnow/ventas.yaml"));

/// The data platform: batch pipelines over embedded services.
#[derive(Parser)]
#[command(
    version,
    after_help = "Examples:
  simulacro demo --data /tmp/demo
  simulacro batch run --source shop --data lake --date 1997-01-01
  simulacro batch run --source shop --data lake --contract my_ventas.yaml --metrics 127.0.0.1:9464
  simulacro batch run --postgres postgres://lector@db.local/tienda --data lake --contract ventas --date 2024-03-17
  simulacro status --data lake
  simulacro contract diff ventas my_ventas.yaml
  simulacro models explain metricas_producto --date 1997-01-01
  simulacro produce --data lake --date 1997-01-01
  simulacro stream --data lake --workers 3 --until-caught-up
  simulacro reconcile --data lake --date 1997-01-01
  simulacro orchestrate --postgres postgres://lector@db.local/tienda --data lake --config orchestrate.toml
  simulacro pause ecommerce_batch_daily --data lake --by ana --why 'stock-taking'

Exit codes: 0 done, 1 failed, 2 usage, 3 held by a contract, 4 somebody else is at work there, or batch and stream differ by
more than 5 %"
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
        /// Address of the metrics endpoint; port 0 takes a free one
        #[arg(long, default_value = "127.0.0.1:0")]
        metrics: SocketAddr,
    },
    /// The daily batch pipeline
    #[command(subcommand)]
    Batch(Batch),
    /// Prints runs by state and the canonical hash of each table
    Status {
        /// Folder for lake, ledger and history
        #[arg(long)]
        data: PathBuf,
    },
    /// Data contracts: list, compare, check
    #[command(subcommand)]
    Contract(contract::ContractCommand),
    /// SQL models: list, explain, draw
    #[command(subcommand)]
    Models(models::ModelsCommand),
    /// Writes the events of a day, consistent with its sales, to the topic of clicks
    Produce(stream::ProduceArgs),
    /// Runs the streaming job realtime_metrics
    Stream(stream::StreamArgs),
    /// Prints lag, watermark, fates and windows of the streaming job
    StreamStatus(stream::StatusArgs),
    /// Compares a day's revenue of the batch with the stream's, per region, with the cause of each difference
    Reconcile(stream::ReconcileArgs),
    /// Runs the assets on their schedules: waits for sources, tries again, alerts, resumes after a crash
    Orchestrate(orchestrate::OrchestrateArgs),
    /// Prints who leads, and each asset's next schedule, pause, breaker and newest runs
    Runs(orchestrate::RunsArgs),
    /// Stops an asset for a while: its turns are skipped and recorded
    Pause(orchestrate::PauseArgs),
    /// Ends a pause
    Resume(orchestrate::ResumeArgs),
}

#[derive(Subcommand)]
enum Batch {
    /// Runs one day, or all days that a source has; a day may be run again at any time
    Run(RunArgs),
}

#[derive(Args)]
struct RunArgs {
    /// Folder with ventas.csv
    #[arg(long, required_unless_present = "postgres", conflicts_with = "postgres")]
    source: Option<PathBuf>,
    /// A PostgreSQL server as source, for example postgres://lector@db.local:5432/tienda; the password comes from PGPASSWORD
    /// or the password file. Needs --date
    #[arg(long, requires = "date")]
    postgres: Option<String>,
    /// Schema of the source table in PostgreSQL
    #[arg(long, default_value = "public")]
    schema: String,
    /// Connections that read one day from PostgreSQL
    #[arg(long, default_value = "2")]
    connections: NonZeroUsize,
    /// Folder for lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// The day, for example 1997-01-01; without it all days
    #[arg(long)]
    date: Option<NaiveDate>,
    /// TOML with source_policy, retry, alert_after_s and startup_s
    #[arg(long)]
    config: Option<PathBuf>,
    /// A contract that ships with the program (cdnow, ventas) or a file
    #[arg(long, default_value = "cdnow")]
    contract: String,
    /// Address of a metrics endpoint while the run lasts
    #[arg(long)]
    metrics: Option<SocketAddr>,
}

/// How a day is read from PostgreSQL: bounded in memory, whatever the day's size.
fn postgres_config(connections: NonZeroUsize) -> PostgresSourceConfig {
    const RANGE_ROWS: NonZeroUsize = NonZeroUsize::new(65_536).expect("above zero");
    const QUEUED_BATCHES: NonZeroUsize = NonZeroUsize::new(8).expect("above zero");
    PostgresSourceConfig {
        connections,
        range_rows: RANGE_ROWS,
        queued_batches: QUEUED_BATCHES,
        reader: CopyReader::InPlace,
        naive_timestamps: NaiveTimestamps::Utc,
        limits: CopyLimits::STANDARD,
    }
}

fn default_config() -> Config {
    Config {
        source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
        retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
        alert_after_s: 60,
        startup_s: 0,
    }
}

type Failure = Box<dyn std::error::Error>;

/// Reads a file of the user; the error names it.
fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()).into())
}

fn load_contract(name: &str) -> Result<Contract, Failure> {
    if name == CDNOW.0 {
        return Ok(Contract::parse(name, CDNOW.1)?);
    }
    if let Some((file, text)) = catalogue::FILES.iter().find(|(file, _)| file.trim_end_matches(".yaml") == name) {
        return Ok(Contract::parse(file, text)?);
    }
    Ok(Contract::parse(name, &read(Path::new(name))?)?)
}

fn load_config(path: Option<&Path>) -> Result<Config, Failure> {
    match path {
        None => Ok(default_config()),
        Some(path) => toml::from_str(&read(path)?).map_err(|e| format!("config {}: {e}", path.display()).into()),
    }
}

/// Runs the days in order, with progress, and stops at the first that is not published.
async fn run_days(platform: &Platform, days: &[NaiveDate]) -> Result<Vec<Day>, Failure> {
    let bar = ProgressBar::new(days.len() as u64);
    bar.set_style(ProgressStyle::with_template("{bar:40} {pos}/{len} days  {msg}  {elapsed} elapsed, {eta} to go")?);
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

async fn print_hashes(platform: &Platform) -> Result<(), Failure> {
    for table in [STAGING, QUARANTINE, MART] {
        println!("{table:<28} {}", canonical_hash(platform.ports.lakehouse.as_ref(), table).await?);
    }
    Ok(())
}

/// What an analyst would ask the warehouse: revenue by region.
async fn print_regions(platform: &Platform) -> Result<(), Failure> {
    let sql = format!(
        "SELECT region, CAST(sum(transacciones) AS VARCHAR) AS sales, CAST(sum(revenue_neto) AS VARCHAR) AS revenue
         FROM {WAREHOUSE} GROUP BY region ORDER BY region"
    );
    println!("by region, asked of the warehouse ({WAREHOUSE}):");
    for batch in platform.ports.warehouse.query(&sql, &[WAREHOUSE]).await? {
        let (regions, sales, revenue) = (strings(&batch, 0)?, strings(&batch, 1)?, strings(&batch, 2)?);
        for ((region, sales), revenue) in regions.iter().zip(&sales).zip(&revenue) {
            println!("  {region:<8} {sales:>7} sales {revenue:>14}");
        }
    }
    Ok(())
}

async fn demo(data: &Path, days: Option<usize>, address: SocketAddr) -> Result<(), Failure> {
    let source = data.join("source");
    std::fs::create_dir_all(&source).map_err(|e| format!("create folder {}: {e}", source.display()))?;
    let purchases = cdnow::parse(cdnow::BYTES)?;
    println!("{} purchases of a real shop, written to {}", purchases.len(), source.join("ventas.csv").display());
    std::fs::write(source.join("ventas.csv"), cdnow::to_csv(&purchases))?;
    let mut all = CsvSource::open(&source)?.days("ventas")?;
    all.truncate(days.unwrap_or(usize::MAX));
    let metrics = Arc::new(PrometheusMetrics::default());
    let bound =
        telemetry::serve_metrics(address, metrics.clone()).await.map_err(|e| format!("listen on {address} for metrics: {e}"))?;
    println!("metrics while it runs: http://{bound}/metrics");
    let ports = connect_embedded(&source, data, metrics.clone()).await?;
    let platform = Platform::new(default_config(), load_contract("cdnow")?, ports);
    let began = platform.ports.env.now();
    let done = run_days(&platform, &all).await?;
    let seconds = (platform.ports.env.now() - began).num_milliseconds() as f64 / 1_000.0;
    if let Some((fecha, first)) = done.first() {
        let fates = first.fates.iter().map(|(fate, rows)| format!("{rows} {fate}")).collect::<Vec<_>>().join(", ");
        println!("\nfirst day {fecha}: {} rows, {fates}, revenue {}\n", first.expected, money(first.revenue_cents));
    }
    print!("{}", report::summary(&done));
    println!("{} days in {seconds:.1} s\n", done.len());
    print_regions(&platform).await?;
    std::fs::write(data.join("metrics.prom"), metrics.handle.render())?;
    println!("\nrevenue per day: {}", report::write_csv(data, &done)?.display());
    println!("chart:           {}", report::write_chart(data, &done)?.display());
    println!("history:         {}", data.join("history.jsonl").display());
    println!("metrics:         {}", data.join("metrics.prom").display());
    print_hashes(&platform).await
}

async fn batch_run(args: RunArgs) -> Result<(), Failure> {
    // Everything that can be wrong in the arguments is read before anything is written.
    let (config, contract) = (load_config(args.config.as_deref())?, load_contract(&args.contract)?);
    let (tables, days): (Arc<dyn TableSource>, _) = match (&args.postgres, &args.source) {
        (Some(url), _) => {
            let server = PostgresServer::parse(url, &args.schema)?;
            (Arc::new(PostgresSource::new(server, postgres_config(args.connections))), Vec::from_iter(args.date))
        }
        (None, folder) => {
            let csv = CsvSource::open(folder.as_deref().unwrap_or(Path::new(".")))?;
            let days = args.date.map_or_else(|| csv.days(&contract.table), |date| Ok(vec![date]))?;
            (Arc::new(csv), days)
        }
    };
    let metrics = Arc::new(PrometheusMetrics::default());
    if let Some(address) = args.metrics {
        telemetry::serve_metrics(address, metrics.clone()).await.map_err(|e| format!("listen on {address} for metrics: {e}"))?;
    }
    let ports = connect_folder(tables, &args.data, metrics).await?;
    let platform = Platform::new(config, contract, ports);
    print!("{}", report::summary(&run_days(&platform, &days).await?));
    Ok(())
}

async fn status(data: &Path) -> Result<(), Failure> {
    if !data.join("ledger.db").exists() {
        return Err(format!("status of {}: found no ledger.db, expected the data folder of a run", data.display()).into());
    }
    // Nothing is read from a source here, so an empty one will do.
    let empty = tempfile::tempdir()?;
    let ports = connect_embedded(empty.path(), data, Arc::new(PrometheusMetrics::default())).await?;
    let platform = Platform::new(default_config(), load_contract("cdnow")?, ports);
    let runs = platform.ports.ledger.runs(PIPELINE).await?;
    for state in [RunState::Succeeded, RunState::Held, RunState::Failed, RunState::Running] {
        println!("{:<10} {}", format!("{state:?}").to_lowercase(), runs.iter().filter(|r| r.state == state).count());
    }
    for table in [STAGING, QUARANTINE, MART] {
        if platform.ports.lakehouse.exists(table).await? {
            println!("{table:<28} {}", canonical_hash(platform.ports.lakehouse.as_ref(), table).await?);
        }
    }
    Ok(())
}

/// Runs a command and returns the exit code of one that ended without an error.
async fn run(command: Command) -> Result<u8, Failure> {
    match command {
        Command::Demo { data, days, metrics } => demo(&data, days, metrics).await?,
        Command::Batch(Batch::Run(args)) => batch_run(args).await?,
        Command::Status { data } => status(&data).await?,
        Command::Contract(command) => return contract::run(command).await,
        Command::Models(command) => models::run(command)?,
        Command::Produce(args) => stream::produce(args).await?,
        Command::Stream(args) => stream::stream(args).await?,
        Command::StreamStatus(args) => stream::stream_status(args).await?,
        Command::Reconcile(args) => stream::reconcile(args).await?,
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

fn main() -> ExitCode {
    end_with_the_reader();
    let cli = Cli::parse();
    telemetry::init_logs();
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
