//! The stream as a person runs it: a day's events, the job over them, how it stands, and the day compared with the batch.
//!
//! Everything is in the data folder: `log` has the topics, `registry.json` the schemas, `lake` what the batch published.
//! The embedded log belongs to one process at a time, so a second one is told that it is busy (exit code 4).
//!
//! Event times are those of the sales, decades back; only the order of append decides what is late. Windows close when later
//! events come, so `produce` ends its day with a heartbeat per partition, of a type that no metric counts: watermark bound
//! plus allowed lateness after midnight, which completes the day and makes no event of the next one late.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, NaiveDate, Utc};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use simulacro_adapters::{
    HttpRegistry, HttpRegistrySettings, KafkaConfig, KafkaLog, NoSource, PostgresServer, PostgresWarehouse, PrometheusMetrics,
    connect_existing, connect_folder,
};
use simulacro_core::{
    avro::{Click, RowEncoder},
    batch::MART,
    platform::Platform,
    ports::{
        Compatibility, PortError, Ports, SchemaRegistry, Warehouse,
        event_log::{EventLog, OutRecord, TopicPartition, TopicSpec},
    },
    streaming::{
        config::StreamConfig,
        event::Fate,
        eventos::{self, EVENTOS},
        job::RealtimeMetrics,
        reconcile::{Cause, DayReconciliation, Verdict},
        reconciliation::emitted,
        reset,
        status::{JobStatus, existing},
        window::{MetricRow, WindowKind},
    },
};
use simulacro_shop::{
    cdnow,
    clicks::{self, HEARTBEAT},
};
use tracing::info;

use crate::{
    Failure, read,
    report::money,
    sinks::{self, SinkName},
    supervise::{EnvClock, Restarts, asked_to_stop, supervise},
    telemetry,
    transact::transact,
};

/// Days that were produced, by key, so that none is produced twice.
const PRODUCED: &str = "simulacro.produced";
/// Transactional id of whoever produces.
const PRODUCER: &str = "simulacro-produce";
/// Records of one call of the log.
const SEND_RECORDS: usize = 1_000;
/// Most workers of one process.
const WORKERS_MAX: u16 = 64;
/// Most bytes of one answer of a warehouse in PostgreSQL.
const QUERY_BYTES_MAX: usize = 256 << 20;
/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How many looks are between two lines of the log.
const LOOKS_PER_LINE: u64 = 10;

#[derive(Args)]
pub struct Where {
    /// Folder for the event log, the schemas, and the lake of the batch
    #[arg(long)]
    data: PathBuf,
    /// Addresses of Kafka brokers, for example 127.0.0.1:9092; without it the embedded log of the data folder
    #[arg(long)]
    kafka: Option<String>,
    /// Base address of a Confluent-compatible schema registry, for example http://127.0.0.1:8081; user and password come from
    /// SIMULACRO_REGISTRY_USER and SIMULACRO_REGISTRY_PASSWORD. Without it the registry of the data folder
    #[arg(long)]
    registry: Option<String>,
    /// TOML with any of the stream's settings, for example allowed_lateness_ms = 300000
    #[arg(long)]
    config: Option<PathBuf>,
}

#[derive(Args)]
pub struct ProduceArgs {
    #[command(flatten)]
    place: Where,
    /// The day, 1997-01-01 to 1998-06-30
    #[arg(long)]
    date: NaiveDate,
    /// What everything is drawn from; the same seed gives the same events
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Sessions that buy nothing
    #[arg(long, default_value_t = 2_000)]
    browsing: u32,
    /// Thousandths of those that are one customer's
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1_000))]
    skew: u32,
    /// Thousandths of events that are delivered twice
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1_000))]
    duplicates: u32,
    /// Thousandths of events that are delivered after their time
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1_000))]
    out_of_order: u32,
    /// Longest such delay, in seconds; above 330 some events are late
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u32).range(..=86_400))]
    delay_max: u32,
    /// Thousandths of events beside which a damaged copy is sent
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1_000))]
    malformed: u32,
    /// Events per second; without it the whole day is one transaction
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Partitions of the topic, if it is not there yet
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(i32).range(1..=1_024))]
    partitions: i32,
    /// Send no heartbeats: the last minutes stay open until the next day is produced
    #[arg(long)]
    open_end: bool,
}

#[derive(Args)]
pub struct StreamArgs {
    #[command(flatten)]
    place: Where,
    /// Workers, sharing the partitions
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(WORKERS_MAX)))]
    workers: u16,
    /// Name of this process, where several share the work over one Kafka. A process that takes the place of a killed one takes
    /// its name, which ends the transaction that was left open
    #[arg(long, default_value = "worker", value_parser = process_name)]
    name: String,
    /// Stop when everything that is there is processed; otherwise at an interrupt or at SIGTERM
    #[arg(long)]
    until_caught_up: bool,
    /// Address of a metrics endpoint while the job lasts
    #[arg(long)]
    metrics: Option<SocketAddr>,
    /// What is written beside the windows: lake (every click, as raw eventos), warehouse (the windows, as
    /// realtime.metricas_clicks), or none. Both with the embedded log; with Kafka none, unless asked for, since the lake and
    /// the warehouse must then be ones that all processes of the job share
    #[arg(long, value_delimiter = ',')]
    sinks: Option<Vec<SinkName>>,
    /// A warehouse in PostgreSQL, for example postgres://cargador@db.local/almacen; without it that of the data folder
    #[arg(long)]
    warehouse: Option<String>,
    /// How often in a row a worker or a sink that failed for a reason that may pass is started again
    #[arg(long, default_value_t = 5)]
    restarts: u32,
}

#[derive(Args)]
pub struct StatusArgs {
    #[command(flatten)]
    place: Where,
}

#[derive(Args)]
pub struct ResetArgs {
    #[command(flatten)]
    place: Where,
    /// The job reads on from the events that were appended at this time or later, for example 2024-03-18T14:00:00Z
    #[arg(long)]
    to_time: DateTime<Utc>,
    /// Does it; without it only the plan is printed
    #[arg(long)]
    execute: bool,
}

#[derive(Args)]
pub struct ReconcileArgs {
    #[command(flatten)]
    place: Where,
    /// The day
    #[arg(long)]
    date: NaiveDate,
}

/// A name that can stand in a transactional id, and in a path.
fn process_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=64).contains(&text.len()) && text.chars().all(fits) {
        return Ok(text.to_owned());
    }
    Err(format!("found {text:?}, expected 1 to 64 letters, digits, or any of - _ ."))
}

/// A day whose two sides differ by more than the specification allows.
#[derive(Debug)]
pub struct DifferenceTooLarge {
    fecha: NaiveDate,
    percent: String,
}

impl std::fmt::Display for DifferenceTooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "reconcile {}: found a difference of {}, expected at most 5 %", self.fecha, self.percent)
    }
}

impl std::error::Error for DifferenceTooLarge {}

/// What every command here needs.
struct Stage {
    config: StreamConfig,
    platform: Platform,
    metrics: Arc<PrometheusMetrics>,
}

fn seeds(csv: &str) -> BTreeSet<String> {
    csv.lines().skip(1).map(str::to_owned).collect()
}

fn load_config(path: Option<&Path>) -> Result<StreamConfig, Failure> {
    match path {
        None => job_config(crate::config::given().stream),
        Some(path) => whole(toml::from_str(&read(path)?).map_err(|e| format!("config {}: {e}", path.display()))?),
    }
}

/// The job as the table `[stream]` of a platform's configuration has it.
///
/// # Errors
/// For a key that is not known, and for values that do not fit together.
pub fn job_config(table: toml::Table) -> Result<StreamConfig, Failure> {
    whole(table.try_into().map_err(|e| format!("config [stream]: {e}"))?)
}

/// A schema registry at an address.
///
/// # Errors
/// When the address is none.
pub fn registry(url: &str) -> Result<Arc<dyn SchemaRegistry>, Failure> {
    let said = |name: &str| std::env::var(name).ok();
    Ok(Arc::new(HttpRegistry::new(HttpRegistrySettings {
        url: url.to_owned(),
        credentials: said("SIMULACRO_REGISTRY_USER").zip(said("SIMULACRO_REGISTRY_PASSWORD")),
        connect_timeout: Duration::from_secs(10),
        timeout: Duration::from_secs(30),
    })?))
}

/// A warehouse in PostgreSQL, by its URL.
///
/// # Errors
/// When the URL is none, or the server does not answer.
pub async fn warehouse(url: &str) -> Result<Arc<dyn Warehouse>, Failure> {
    Ok(Arc::new(PostgresWarehouse::open(PostgresServer::parse(url, "public")?, QUERY_BYTES_MAX).await?))
}

fn whole(mut config: StreamConfig) -> Result<StreamConfig, Failure> {
    config.regions.get_or_insert_with(|| seeds(include_str!("../../../contracts/seeds/regiones_validas.csv")));
    config.event_types.insert(HEARTBEAT.to_owned());
    config.validate()?;
    Ok(config)
}

impl Stage {
    async fn open(place: &Where) -> Result<Self, Failure> {
        Self::open_with(place, None).await
    }

    /// The same with a warehouse in PostgreSQL, by its URL, in place of that of the data folder.
    async fn open_with(place: &Where, warehouse: Option<&str>) -> Result<Self, Failure> {
        let config = load_config(place.config.as_deref())?;
        let metrics = Arc::new(PrometheusMetrics::default());
        let mut ports = connect_folder(Arc::new(NoSource), &place.data, metrics.clone()).await?;
        if let Some(url) = warehouse {
            ports.warehouse = self::warehouse(url).await?;
        }
        Self::over(place, config, ports, metrics)
    }

    /// Puts the services that the arguments name in place of those of the data folder.
    fn over(place: &Where, config: StreamConfig, mut ports: Ports, metrics: Arc<PrometheusMetrics>) -> Result<Self, Failure> {
        if let Some(brokers) = &place.kafka {
            ports.log = Arc::new(KafkaLog::new(KafkaConfig::new(brokers))?);
        }
        if let Some(url) = &place.registry {
            ports.registry = registry(url)?;
        }
        let platform = Platform::new(crate::default_config(), crate::load_contract("ventas")?, ports);
        Ok(Self { config, platform, metrics })
    }

    /// As [`Stage::open`], for a folder that is there: nothing is made.
    async fn find(place: &Where) -> Result<Self, Failure> {
        Self::is_there(place)?;
        Self::open(place).await
    }

    /// As [`Stage::find`], for commands that only look: nothing is appended either.
    async fn look(place: &Where) -> Result<Self, Failure> {
        Self::is_there(place)?;
        let config = load_config(place.config.as_deref())?;
        let metrics = Arc::new(PrometheusMetrics::default());
        let ports = connect_existing(&place.data, metrics.clone()).await?;
        Self::over(place, config, ports, metrics)
    }

    fn is_there(place: &Where) -> Result<(), Failure> {
        if place.kafka.is_none() && !place.data.join("log").exists() {
            return Err(format!("read {}: found no folder log, expected one that produce has made", place.data.display()).into());
        }
        Ok(())
    }

    fn ports(&self) -> &Ports {
        &self.platform.ports
    }
    fn log(&self) -> &dyn EventLog {
        self.ports().log.as_ref()
    }

    /// All revisions of all windows; none when the job has never run.
    async fn metrics(&self) -> Result<Vec<MetricRow>, Failure> {
        Ok(emitted(self.ports(), &self.config, None).await?)
    }
}

/// Sends the events of a day.
pub async fn produce(args: ProduceArgs) -> Result<(), Failure> {
    let purchases = cdnow::parse(cdnow::BYTES)?;
    let fecha = args.date;
    let of_day = || purchases.iter().filter(|p| p.fecha == fecha);
    if of_day().next().is_none() {
        return Err(format!("produce {fecha}: found no sales, expected a day from 1997-01-01 to 1998-06-30").into());
    }
    let stage = Stage::open(&args.place).await?;
    let topic = stage.config.topics.clicks.clone();
    let mut partitions = i32::try_from(existing(stage.log().offsets(&topic).await)?.len())?;
    if partitions == 0 {
        partitions = args.partitions;
        let week = Some(Duration::from_secs(7 * 86_400));
        stage.log().create_topic(&TopicSpec { name: topic.clone(), partitions, retention: week, compact: false }).await?;
    }
    stage.log().create_topic(&TopicSpec { name: PRODUCED.into(), partitions: 1, retention: None, compact: true }).await?;
    // A producer of this name first: it ends what one that was killed left open, so that the look sees all there is.
    let mut producer = stage.log().producer(Some(PRODUCER)).await?;
    if produced(stage.log(), fecha).await? {
        return Err(format!("produce {fecha}: found that it was produced before; its sales would count twice or be late").into());
    }
    let options = clicks::Options {
        seed: args.seed,
        browsing: args.browsing,
        skew: args.skew,
        duplicates: args.duplicates,
        out_of_order: args.out_of_order,
        delay_ms_max: args.delay_max.saturating_mul(1_000),
        malformed: args.malformed,
    };
    let deliveries = clicks::of_day(&purchases, fecha, &options);
    let mut encoder = RowEncoder::<Click>::register(stage.ports().registry.as_ref(), Compatibility::BackwardTransitive).await?;
    let events: Vec<Click> = deliveries.iter().map(|d| d.click.clone()).collect();
    let encoded = encoder.encode_rows(&events)?;
    let mut records: Vec<OutRecord> = deliveries
        .iter()
        .zip(encoded)
        .map(|(delivery, value)| OutRecord {
            topic: topic.clone(),
            partition: None,
            key: Some(delivery.click.user_id.clone().into()),
            value: Some(delivery.damage.map_or(value.clone(), |damage| damage.apply(&value).into())),
            headers: Vec::new(),
        })
        .collect();
    if !args.open_end {
        let after = stage.config.watermark_bound + stage.config.allowed_lateness;
        let heartbeat = clicks::heartbeat(fecha, i64::try_from(after.as_millis())?);
        let value = encoder.encode_rows(&[heartbeat])?.into_iter().next();
        records.extend((0..partitions).map(|partition| OutRecord {
            topic: topic.clone(),
            partition: Some(partition),
            key: Some(HEARTBEAT.into()),
            value: value.clone(),
            headers: Vec::new(),
        }));
    }
    let sent = records.len();
    records.push(OutRecord {
        topic: PRODUCED.into(),
        partition: Some(0),
        key: Some(fecha.to_string().into()),
        value: Some(args.seed.to_string().into()),
        headers: Vec::new(),
    });
    let bar = bar(sent as u64, "{bar:40} {pos}/{len} events  {per_sec}  {eta} to go")?;
    let per_transaction = args.rate.map_or(records.len(), |rate| rate as usize);
    for (ordinal, transaction) in records.chunks(per_transaction).enumerate() {
        if ordinal > 0 {
            stage.ports().env.sleep(Duration::from_secs(1)).await;
        }
        let reopen = async || stage.log().producer(Some(PRODUCER)).await;
        transact(stage.ports().env.as_ref(), &mut producer, reopen, transaction).await?;
        bar.inc(transaction.len() as u64);
        info!(%fecha, sent = ordinal * per_transaction + transaction.len(), "events sent");
    }
    bar.finish_and_clear();
    let damaged = deliveries.iter().filter(|d| d.damage.is_some()).count();
    let revenue: i64 = of_day().map(|p| p.monto_cents).sum();
    println!("{fecha}: {sent} records to {topic}, {partitions} partitions, {damaged} of them damaged on purpose");
    println!("  {} purchases, revenue {}", of_day().count(), money(revenue));
    Ok(())
}

async fn produced(log: &dyn EventLog, fecha: NaiveDate) -> Result<bool, Failure> {
    for (partition, (mut offset, end)) in log.offsets(PRODUCED).await? {
        let at = TopicPartition { topic: PRODUCED.into(), partition };
        while offset < end {
            let (records, next) = log.read(&at, offset, SEND_RECORDS).await?;
            if records.iter().any(|r| r.key.as_deref() == Some(fecha.to_string().as_bytes())) {
                return Ok(true);
            }
            if next <= offset {
                break;
            }
            offset = next;
        }
    }
    Ok(false)
}

fn bar(length: u64, template: &str) -> Result<ProgressBar, Failure> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(length) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template(template)?);
    Ok(bar)
}

/// What a worker last said of itself.
#[derive(Debug, Clone, Default)]
struct View {
    positions: BTreeMap<TopicPartition, i64>,
    dirty: bool,
    read: u64,
    closed_ms: Option<i64>,
}

type Views = Arc<Mutex<BTreeMap<u16, View>>>;

fn views(views: &Views) -> BTreeMap<u16, View> {
    views.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn view(job: &RealtimeMetrics, config: &StreamConfig) -> View {
    let at = |topic: &str, partition: i32| TopicPartition { topic: topic.to_owned(), partition };
    let clicks = job.clicks().iter().map(|(&p, task)| (at(&config.topics.clicks, p), task.next_offset()));
    let merges = job.merges().iter().map(|(&p, task)| (at(&config.topics.partials, p), task.next_offset()));
    View {
        positions: clicks.chain(merges).collect(),
        dirty: job.clicks().values().any(|t| t.is_dirty()) || job.merges().values().any(|t| t.is_dirty()),
        read: job.clicks().values().map(|t| t.counts().read).sum(),
        closed_ms: job.merges().values().filter_map(|t| t.closed()).min(),
    }
}

async fn work(stage: &Stage, member: &str, number: u16, all: &Views, stop: &AtomicBool) -> Result<(), PortError> {
    let mut job = stage.platform.stream_worker(&stage.config, member).await?;
    while !stop.load(Ordering::Relaxed) {
        job.step().await?;
        let view = view(&job, &stage.config);
        all.lock().unwrap_or_else(PoisonError::into_inner).insert(number, view);
    }
    job.close().await
}

/// A worker, and its successors when it fails.
async fn keep_working(
    stage: Arc<Stage>,
    member: String,
    number: u16,
    all: Views,
    stop: Arc<AtomicBool>,
    limits: Restarts,
) -> Result<(), PortError> {
    let env = EnvClock(stage.ports().env.clone());
    let once = || async {
        let ended = work(&stage, &member, number, &all, &stop).await;
        // What it said of itself is not so any more.
        all.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        ended
    };
    supervise(&member, &env, &stop, limits, once).await
}

/// Whether the workers have processed and committed everything that is in both input topics.
async fn is_caught_up(stage: &Stage, views: &BTreeMap<u16, View>) -> Result<bool, PortError> {
    if views.values().any(|view| view.dirty) {
        return Ok(false);
    }
    for topic in [&stage.config.topics.clicks, &stage.config.topics.partials] {
        for (partition, (_, end)) in existing(stage.log().offsets(topic).await)? {
            let at = TopicPartition { topic: topic.clone(), partition };
            let Some(&position) = views.values().find_map(|view| view.positions.get(&at)) else { return Ok(false) };
            // Only markers of transactions may be left.
            if position < end && !stage.log().read(&at, position, 1).await?.0.is_empty() {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// Runs the job.
pub async fn stream(args: StreamArgs) -> Result<(), Failure> {
    let stage = Arc::new(Stage::open_with(&args.place, args.warehouse.as_deref()).await?);
    let limits = Restarts { in_a_row_max: args.restarts, ..Restarts::STANDARD };
    let sinks = sinks::chosen(args.sinks.as_deref(), args.place.kafka.is_some())?;
    let topic = &stage.config.topics.clicks;
    let inputs = existing(stage.log().offsets(topic).await)?;
    if inputs.is_empty() {
        return Err(format!("stream: found no topic {topic}, expected one that produce has made").into());
    }
    if let Some(address) = args.metrics {
        let bound = telemetry::serve_metrics(address, stage.metrics.clone())
            .await
            .map_err(|e| format!("listen on {address} for metrics: {e}"))?;
        println!("metrics while it runs: http://{bound}/metrics");
    }
    let (all, stop) = (Views::default(), Arc::new(AtomicBool::new(false)));
    let began = stage.ports().env.now();
    if args.place.kafka.is_none() {
        // A process that was killed may have had more workers: what one of them left open hides every later commit until
        // it times out. The log is ours alone, so nobody alive is fenced.
        for number in 0..WORKERS_MAX {
            stage.log().producer(Some(&format!("{}-{}-{number}", stage.config.group, args.name))).await?;
        }
    }
    let mut workers = tokio::task::JoinSet::new();
    for number in 0..args.workers {
        workers.spawn(keep_working(stage.clone(), format!("{}-{number}", args.name), number, all.clone(), stop.clone(), limits));
    }
    let (ending, mut writers) = (Arc::new(sinks::Ending::default()), tokio::task::JoinSet::new());
    for name in sinks {
        let (env, platform, config) = (EnvClock(stage.ports().env.clone()), stage.clone(), stage.config.clone());
        let ending = ending.clone();
        writers.spawn(async move { sinks::keep_writing(&platform.platform, &config, name, &env, &ending, limits).await });
    }
    let bar =
        bar(inputs.values().map(|(oldest, end)| (end - oldest).unsigned_abs()).sum(), "{bar:40} {pos}/{len} events  {msg}")?;
    let (mut looks, mut quiet, mut read, mut failure) = (0_u64, 0, 0_u64, None);
    let mut asked = std::pin::pin!(asked_to_stop(None));
    while failure.is_none() && !stop.load(Ordering::Relaxed) {
        tokio::select! {
            biased;
            Some(ended) = workers.join_next() => {
                // A worker ends when it is told to, and nobody has.
                failure = Some(match ended {
                    Ok(Ok(())) => "stream: found that a worker ended by itself".into(),
                    Ok(Err(error)) => Failure::from(error),
                    Err(error) => Failure::from(error),
                });
            }
            Some(ended) = writers.join_next() => {
                failure = Some(match ended {
                    Ok(Ok(_)) => "stream: found that a sink ended by itself".into(),
                    Ok(Err(error)) => Failure::from(error),
                    Err(error) => Failure::from(error),
                });
            }
            () = &mut asked => {
                ending.now.store(true, Ordering::Relaxed);
                stop.store(true, Ordering::Relaxed);
            }
            () = stage.ports().env.sleep(LOOK_EVERY) => {
                let now = views(&all);
                // A partition that changes its worker is nobody's for a moment.
                read = read.max(now.values().map(|view| view.read).sum());
                let closed = now.values().filter_map(|view| view.closed_ms).min();
                bar.set_position(read);
                bar.set_message(format!("windows closed to {}", time(closed)));
                if looks % LOOKS_PER_LINE == 0 {
                    info!(read, closed = time(closed), workers = now.len(), "progress");
                }
                looks += 1;
                quiet = if args.until_caught_up && is_caught_up(&stage, &now).await? { quiet + 1 } else { 0 };
                // Twice: a transaction may have landed between the two things that were asked.
                if quiet == 2 {
                    stop.store(true, Ordering::Relaxed);
                }
            }
        }
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = workers.join_next().await {
        let ended = ended.map_err(Failure::from).and_then(|ended| ended.map_err(Failure::from));
        failure = failure.or(ended.err());
    }
    // The workers have written their last windows, so that the topics are complete now.
    let end = if failure.is_some() { &ending.now } else { &ending.drained };
    end.store(true, Ordering::Relaxed);
    let mut written = BTreeMap::new();
    while let Some(ended) = writers.join_next().await {
        match ended.map_err(Failure::from).and_then(|ended| ended.map_err(Failure::from)) {
            Ok((name, rows)) => drop(written.insert(name, rows)),
            Err(error) => failure = failure.or(Some(error)),
        }
    }
    bar.finish_and_clear();
    if let Some(failure) = failure {
        return Err(failure);
    }
    std::fs::write(args.place.data.join("stream.prom"), stage.metrics.handle.render())?;
    let seconds = (stage.ports().env.now() - began).num_milliseconds() as f64 / 1_000.0;
    let status = JobStatus::read(&stage.config, stage.log()).await?;
    info!(read = status.records_read(), closed = time(status.closed_ms()), seconds, "stopped");
    println!("{} in {seconds:.1} s, {} workers", fates(&status), args.workers);
    println!("windows closed to {}", time(status.closed_ms()));
    for (name, rows) in written {
        println!("{rows} rows to {}", name.table());
    }
    Ok(())
}

fn time(ms: Option<i64>) -> String {
    let text = |ms| DateTime::from_timestamp_millis(ms).map(|t| t.format("%Y-%m-%dT%H:%M:%SZ").to_string());
    ms.and_then(text).unwrap_or_else(|| "-".into())
}

fn fates(status: &JobStatus) -> String {
    let all = Fate::ALL.map(|fate| (fate, status.fate(fate).0));
    let parts: Vec<_> = all.iter().filter(|(_, n)| *n > 0).map(|(fate, n)| format!("{n} {fate}")).collect();
    format!("{} events read = {}", status.records_read(), if parts.is_empty() { "nothing".into() } else { parts.join(" + ") })
}

/// Prints how the job stands.
pub async fn stream_status(args: StatusArgs) -> Result<(), Failure> {
    let stage = Stage::look(&args.place).await?;
    let status = JobStatus::read(&stage.config, stage.log()).await?;
    let now = stage.ports().env.now().timestamp_millis();
    println!("lag {} events, {:.1} s", status.lag_records(), status.lag_ms(now) as f64 / 1_000.0);
    println!("watermark {}, windows closed to {}", time(status.watermark_ms()), time(status.closed_ms()));
    println!("{}", fates(&status));
    println!("\npartition  next offset         end         lag  watermark");
    for (name, partitions) in [("clicks", &status.clicks), ("merge", &status.merges)] {
        for (partition, of) in partitions {
            let (next, end, lag) = (of.next_offset, of.end_offset, of.lag_records());
            println!("{name:<6} {partition:>3} {next:>12} {end:>11} {lag:>11}  {}", time(of.watermark_ms));
        }
    }
    let lakehouse = stage.ports().lakehouse.as_ref();
    for (partition, of) in &status.clicks {
        let at = TopicPartition { topic: stage.config.topics.clicks.clone(), partition: *partition };
        if let Some(next) = eventos::position(lakehouse, &at).await? {
            println!("{EVENTOS}: partition {partition} written to {next} of {}", of.end_offset);
        }
    }
    let rows = stage.metrics().await?;
    println!("\nwindows      keys   revisions      revenue");
    for kind in [WindowKind::Region1m, WindowKind::Page1m, WindowKind::Region5m] {
        let mut newest: BTreeMap<_, &MetricRow> = BTreeMap::new();
        let of_kind: Vec<_> = rows.iter().filter(|row| row.window_kind == kind).collect();
        for row in &of_kind {
            let known = newest.entry((row.window_start_ms, &row.region, &row.page)).or_insert(row);
            if known.revision < row.revision {
                *known = row;
            }
        }
        // Sliding windows overlap, so their sum means nothing.
        let revenue = match kind {
            WindowKind::Region1m | WindowKind::Page1m => money(newest.values().map(|row| row.revenue_cents).sum()),
            WindowKind::Region5m => "-".into(),
        };
        println!("{:<9} {:>7} {:>11} {revenue:>12}", kind.name(), newest.len(), of_kind.len());
    }
    Ok(())
}

/// Says from which offsets the job would read on, and makes it so when asked to.
pub async fn stream_reset(args: ResetArgs) -> Result<(), Failure> {
    let stage = Stage::find(&args.place).await?;
    let mut decoder = stage.platform.click_decoder(&stage.config)?;
    let plan = reset::plan(&stage.config, stage.log(), &mut decoder, args.to_time.timestamp_millis()).await?;
    println!("partition     now  ->   then");
    for (partition, of) in &plan.clicks {
        println!("{partition:>9} {:>7}  -> {:>6}", of.from.map_or("-".into(), |from| from.to_string()), of.to);
    }
    println!("{} records are read again, {} are skipped", plan.again(), plan.skipped());
    if plan.is_backwards() {
        println!("the job forgets what it knows of events, and counts its fates anew");
        match plan.whole_from_ms {
            None => println!("every window that it makes again is whole"),
            whole => println!(
                "windows that begin before {} are made again without what was appended before: they will be lower than now",
                time(whole)
            ),
        }
    }
    if !args.execute {
        println!("nothing was changed; --execute does it");
        return Ok(());
    }
    let emitted = stage.metrics().await?;
    reset::execute(&stage.config, stage.log(), &plan, &emitted).await?;
    println!("done");
    Ok(())
}

/// Compares a day of the batch with the same day of the stream.
pub async fn reconcile(args: ReconcileArgs) -> Result<(), Failure> {
    let stage = Stage::find(&args.place).await?;
    let fecha = args.date;
    let lakehouse = stage.ports().lakehouse.as_ref();
    if !lakehouse.exists(MART).await? {
        return Err(format!("reconcile {fecha}: found no {MART} in {}, expected a batch run", args.place.data.display()).into());
    }
    let Some(found) = stage.platform.reconcile_day(&stage.config, fecha).await? else {
        return Err(format!("reconcile {fecha}: found the day on neither side").into());
    };
    let day = &found.day;
    print_day(fecha, day);
    println!("unexplained: {}", money(i64::try_from(found.unexplained())?));
    for (region, (events, cents)) in &found.findings.deduplicated {
        println!("{region:<13} {events} purchases of {} were delivered again and not counted again", money(*cents));
    }
    found.keep(stage.ports().ledger.as_ref(), stage.ports().env.now()).await?;
    match day.total.verdict {
        Verdict::Pass | Verdict::Warn => Ok(()),
        Verdict::Fail => Err(Box::new(DifferenceTooLarge { fecha, percent: day.total.ratio.to_string() })),
        Verdict::Pending => {
            let side = |through: Option<NaiveDate>| through.map_or("nothing".into(), |day| day.to_string());
            let (batch, stream) = (side(found.batch_through), side(found.stream_through));
            Err(format!("reconcile {fecha}: found batch complete through {batch} and stream through {stream}").into())
        }
    }
}

fn print_day(fecha: NaiveDate, day: &DayReconciliation) {
    println!("{fecha}    {:>14} {:>14} {:>14}  verdict", "batch", "stream", "difference");
    let lines = day.regions.iter().map(|(region, line)| (region.as_str(), line)).chain([("total", &day.total)]);
    for (name, line) in lines {
        let verdict = format!("{:?}", line.verdict).to_lowercase();
        let (batch, stream, difference) = (money(line.batch), money(line.stream), money(line.batch - line.stream));
        println!("{name:<13} {batch:>14} {stream:>14} {difference:>14}  {verdict} ({})", line.ratio);
        for (cause, cents) in line.causes.iter().filter(|(cause, _)| **cause != Cause::Unexplained) {
            let cause = match cause {
                Cause::Late => "late: after the allowed lateness",
                Cause::Duplicated => "duplicated: counted more than once",
                Cause::DeadLettered => "dead-lettered: not decodable or against a rule",
                Cause::Clock => "clock: too far ahead, or put into another day",
                Cause::Outage => "outage: never arrived in the topic",
                Cause::Unexplained => "unexplained",
            };
            println!("  {:>56}  {cause}", money(*cents));
        }
    }
}
