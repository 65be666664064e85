//! `orchestrate`, `runs`, `pause` and `resume`: the assets on their schedules, how they stand, and a person's word in it.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use clap::Args;
use simulacro_adapters::{
    AlertRouter, ExternalProgram, KafkaConfig, KafkaLog, PostgresLedger, PostgresServer, PrometheusMetrics, SqliteLedger,
    SystemEnv,
};
use simulacro_core::{
    assets::{
        self, DailyBatch, Dimensions, LakeMaintenance, MonitorLimits, StreamReconciliation, StreamingMonitor, UserFeatures,
    },
    models::shipped,
    orchestrator::{Asset, Orchestrator, OrchestratorPorts, Plan, Status, Work, pause, resume, settled},
    platform::Platform as RunningPlatform,
    ports::{Env, RunLedger},
};

use crate::{
    config::{Platform, given},
    options::{Failure, SourceArgs, StoreArgs, load_contract, read},
    stream,
    supervise::asked_to_stop,
    telemetry,
};

/// Where runs, leases and pauses are.
#[derive(Args, Debug, Clone)]
pub struct LedgerArgs {
    /// Folder for lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// A PostgreSQL server as ledger, for orchestrators on several machines; without it the one in the folder
    #[arg(long)]
    ledger: Option<String>,
    /// Schema of the ledger in PostgreSQL
    #[arg(long, default_value = "simulacro")]
    ledger_schema: String,
    /// TOML of a whole platform, of which [orchestrator], [assets.NAME] and [alerts] are about this
    #[arg(long)]
    config: Option<PathBuf>,
}

#[derive(Args)]
pub struct OrchestrateArgs {
    #[command(flatten)]
    place: LedgerArgs,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// A contract that ships with the program (cdnow, ventas) or a file
    #[arg(long, default_value = "ventas")]
    contract: String,
    /// Addresses of Kafka brokers, whose streaming job is then watched every minute (lag, shares of late events and of dead
    /// letters, the sink of the warehouse), and compared with the batch every morning
    #[arg(long)]
    kafka: Option<String>,
    /// Base address of a Confluent-compatible schema registry of those events, for example http://127.0.0.1:8081; user and
    /// password come from SIMULACRO_REGISTRY_USER and SIMULACRO_REGISTRY_PASSWORD. Without it the registry of the data folder
    #[arg(long)]
    registry: Option<String>,
    /// The warehouse in PostgreSQL that a sink of the stream loads, as its own --warehouse, for example
    /// postgres://lector@db.local/almacen; without it that of the data folder. A sink that has loaded something is watched
    #[arg(long)]
    stream_warehouse: Option<String>,
    /// Address of the metrics endpoint
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// Stop after so many seconds
    #[arg(long)]
    stop_after: Option<u64>,
}

#[derive(Args)]
pub struct RunsArgs {
    #[command(flatten)]
    place: LedgerArgs,
    /// Only this asset
    #[arg(long)]
    asset: Option<String>,
    /// Runs that are shown of each asset, the newest first
    #[arg(long, default_value_t = 5)]
    last: usize,
}

#[derive(Args)]
pub struct PauseArgs {
    /// The asset, for example ecommerce_batch_daily
    asset: String,
    #[command(flatten)]
    place: LedgerArgs,
    /// Who pauses it
    #[arg(long)]
    by: String,
    /// Why
    #[arg(long)]
    why: String,
}

#[derive(Args)]
pub struct ResumeArgs {
    /// The asset
    asset: String,
    #[command(flatten)]
    place: LedgerArgs,
}

impl LedgerArgs {
    /// What the configuration says; a file that is none of a platform is told what one has.
    fn file(&self) -> Result<Platform, Failure> {
        match &self.config {
            None => Ok(given()),
            Some(path) => Platform::parse(&path.display().to_string(), &read(path)?, &BTreeMap::new()),
        }
    }

    async fn postgres(&self) -> Result<Option<Arc<dyn RunLedger>>, Failure> {
        let Some(url) = &self.ledger else { return Ok(None) };
        Ok(Some(Arc::new(PostgresLedger::open(PostgresServer::parse(url, &self.ledger_schema)?).await?)))
    }

    /// The ledger of commands that look or say a word: it must be there.
    async fn open(&self) -> Result<Arc<dyn RunLedger>, Failure> {
        if let Some(ledger) = self.postgres().await? {
            return Ok(ledger);
        }
        let path = self.data.join("ledger.db");
        if !path.exists() {
            return Err(format!("open {}: found no ledger.db, expected the data folder of a run", self.data.display()).into());
        }
        Ok(Arc::new(SqliteLedger::open(&path).await?))
    }
}

/// An asset that ships, by its name.
fn known(name: &str) -> Result<Asset, Failure> {
    let all = assets::all()?;
    let names = all.iter().map(|a| a.name.clone()).collect::<Vec<_>>().join(", ");
    let found = all.into_iter().find(|a| a.name == name);
    found.ok_or_else(|| format!("asset {name} is not known; there are {names}").into())
}

fn now() -> DateTime<Utc> {
    SystemEnv::default().now()
}

/// Runs the assets on their schedules until it is asked to stop. Of several such processes over one ledger, one runs them
/// and the others stand by.
pub async fn orchestrate(args: OrchestrateArgs) -> Result<(), Failure> {
    // Everything that can be wrong in the arguments is read before anything is written.
    let file = args.place.file()?;
    file.orchestrator.check()?;
    let mut run = vec![assets::ecommerce_batch_daily()?, assets::ml_feature_engineering()?, assets::lake_maintenance()?];
    if args.kafka.is_some() {
        run.push(assets::ecommerce_streaming_monitor()?);
        run.push(assets::batch_stream_reconciliation()?);
    }
    let source = args.source.open()?;
    let has_dimensions = !source.dimensions.offered().is_empty();
    if has_dimensions {
        run.push(assets::api_dimensiones()?);
    }
    let inference = match &file.inference.command {
        Some(command) => {
            run.push(assets::ml_inference_daily()?);
            Some(ExternalProgram::new(command.clone())?)
        }
        None => None,
    };
    settled(run, &file.assets)?;
    let stream_config = stream::job_config(file.stream.clone())?;
    let contract = load_contract(&args.contract)?;
    let env: Arc<dyn Env> = Arc::new(SystemEnv::default());
    let router = AlertRouter::new(&file.alerts, env.clone(), |name| std::env::var(name).ok())?;
    let metrics = Arc::new(PrometheusMetrics::default());
    let mut ports = source.connect(&args.store, &args.place.data, metrics.clone()).await?;
    if let Some(ledger) = args.place.postgres().await? {
        ports.ledger = ledger;
    }
    ports.notifier = Arc::new(router);
    if let Some(brokers) = &args.kafka {
        ports.log = Arc::new(KafkaLog::new(KafkaConfig::new(brokers))?);
    }
    if let Some(url) = &args.registry {
        ports.registry = stream::registry(url)?;
    }
    let stream_warehouse = match &args.stream_warehouse {
        Some(url) => stream::warehouse(url).await?,
        None => ports.warehouse.clone(),
    };
    let platform = RunningPlatform::new(file.config(), contract, ports);
    let platform = Arc::new(platform.with_models(&shipped()?.select(file.batch.models.as_deref().unwrap_or("all"))?)?);

    let mut works: Vec<(Asset, Arc<dyn Work>)> = vec![
        (assets::ecommerce_batch_daily()?, Arc::new(DailyBatch { platform: platform.clone() })),
        (assets::ml_feature_engineering()?, Arc::new(UserFeatures { platform: platform.clone() })),
        (assets::lake_maintenance()?, Arc::new(LakeMaintenance { platform: platform.clone() })),
    ];
    if has_dimensions {
        works.push((assets::api_dimensiones()?, Arc::new(Dimensions { platform: platform.clone() })));
    }
    if let Some(program) = inference {
        works.push((assets::ml_inference_daily()?, Arc::new(program)));
    }
    if let Some(brokers) = &args.kafka {
        // What it reads each minute is in no history.
        let log = Arc::new(KafkaLog::new(KafkaConfig::new(brokers))?);
        let (ledger, limits) = (platform.ports.ledger.clone(), MonitorLimits::specification());
        let monitor = StreamingMonitor::new(env.clone(), log, ledger, stream_warehouse, stream_config.clone(), limits);
        works.push((assets::ecommerce_streaming_monitor()?, Arc::new(monitor)));
        let comparison = StreamReconciliation::new(platform.clone(), stream_config);
        works.push((assets::batch_stream_reconciliation()?, Arc::new(comparison)));
    }
    let plan = Plan::new(file.orchestrator, works, &file.assets)?;
    if let Some(address) = args.metrics {
        let bound =
            telemetry::serve_metrics(address, metrics).await.map_err(|e| format!("listen on {address} for metrics: {e}"))?;
        eprintln!("metrics: http://{bound}/metrics");
    }
    let ports = &platform.ports;
    let ports = OrchestratorPorts {
        env: ports.env.clone(),
        ledger: ports.ledger.clone(),
        notifier: ports.notifier.clone(),
        metrics: ports.metrics.clone(),
        recorder: ports.recorder.clone(),
    };
    let machine = std::env::var("HOSTNAME").unwrap_or_else(|_| "this machine".into());
    let holder = format!("process {} on {machine} ({})", std::process::id(), env.new_id());
    for (asset, _) in &plan.assets {
        let next = asset.schedule.next(env.now()).map_or_else(|| "never".into(), |t| t.to_string());
        eprintln!("{:<30} {:<14} next {next}", asset.name, asset.schedule.to_string());
    }
    Orchestrator { plan, ports, holder }.run(asked_to_stop(args.stop_after.map(Duration::from_secs))).await?;
    Ok(())
}

/// Prints who leads, and for each asset its next schedule, pause, breaker and newest runs.
pub async fn runs(args: RunsArgs) -> Result<(), Failure> {
    let file = args.place.file()?;
    let all = settled(assets::all()?, &file.assets)?;
    if let Some(name) = &args.asset {
        known(name)?;
    }
    let ledger = args.place.open().await?;
    let wanted = |a: &&Asset| args.asset.as_ref().is_none_or(|name| *name == a.name);
    let chosen: Vec<&Asset> = all.iter().filter(wanted).collect();
    print!("{}", Status::read(&*ledger, &chosen, args.last, now()).await?);
    Ok(())
}

/// Stops an asset from its next try on.
pub async fn pause_asset(args: PauseArgs) -> Result<(), Failure> {
    let asset = known(&args.asset)?;
    let ledger = args.place.open().await?;
    pause(&*ledger, &asset.name, &args.by, &args.why, now()).await?;
    println!("{} is paused; its turns are skipped and recorded until it is resumed", asset.name);
    Ok(())
}

/// Lets an asset run again from its next schedule on.
pub async fn resume_asset(args: ResumeArgs) -> Result<(), Failure> {
    let asset = known(&args.asset)?;
    let ledger = args.place.open().await?;
    let next = asset.schedule.next(now()).map_or_else(|| "never".into(), |t| t.to_string());
    match resume(&*ledger, &asset.name, now()).await? {
        Some(p) => println!("{} runs again, next {next}; {} had paused it at {}: {}", asset.name, p.by, p.since, p.why),
        None => println!("{} was not paused, next {next}", asset.name),
    }
    Ok(())
}
