//! One run of one stream story: builds the world, steps it, judges what came out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use chrono::DateTime;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};
use simulacro_core::{
    assets::{MONITOR, MonitorLimits, StreamingMonitor},
    avro::{CLICKS, CLICKS_SUBJECT, memory::MemoryRegistry},
    contract::Contract,
    history::{Event, Recorder, recorded_notifier},
    orchestrator::{RetryPolicy, Slot, SourcePolicy, Work},
    platform::{Config, Platform},
    ports::{
        Alert, Env, NoDimensions, Notifier, PortError, Ports,
        event_log::{EventLog, TopicPartition, TopicSpec},
    },
    streaming::{config::StreamConfig, event::Fate, status::JobStatus},
};
use simulacro_lakehouse::{DeltaLakehouse, DeltaWarehouse};
use simulacro_log::{Blob, Client, Limits, Request, Response, Settings};

use super::{
    cost::Costs,
    faults::{Faults, StreamFault},
    invariants::{self, Evidence, GaveUp, Sample, Topic},
    link::HostLink,
    oracle::{self, Delivered, Expected, Rules},
    process::{HostEnv, Process, WorldEnv},
    registry::{RegistryService, SimRegistry},
    sabotage::Sabotage,
    scenario::{Reading, StreamAct, StreamScenario, Watch as Monitoring},
    workload::{self, Ledger},
};
use crate::{
    broker::{SimBroker, Tally},
    host::Host,
    interpose,
    ledger::SimLedger,
    ports::{SimEnv, SimHistory, SimMetrics, SimNotifier},
    postgres::SimSource,
    rng::Stream,
    scenario::Verdict,
    store::{DirectStore, ObjectService, PortStore},
    world::{CONTRACT, Failure, Incident, Judgement},
};

/// How often the monitor looks.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Rates are told over so many seconds.
pub const RATE_OVER_S: u64 = 180;
/// Seconds over which the lag is the highest, several commits of any length that is usual.
pub const LAG_OVER_S: u64 = 30;
/// How often the reader of the output reads.
const READ_EVERY: Duration = Duration::from_millis(500);
/// How long a worker that failed stays down before it is started again.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// How long the story goes on after the job is done, for the reader to see the end.
const EPILOGUE: Duration = Duration::from_secs(3);

/// What a stream story came to, in figures.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Virtual time of the whole run, in seconds.
    pub virtual_s: u64,
    /// Records in the topic of clicks.
    pub events: u64,
    /// Events by fate.
    pub fates: BTreeMap<Fate, u64>,
    /// Events whose fate the topic alone does not tell.
    pub by_timing: u64,
    /// Rows of windows, newest revisions only.
    pub windows: u64,
    /// Deaths of workers.
    pub crashes: u64,
    /// Workers that gave up and were started again.
    pub stops: u64,
    /// Why they gave up, by code.
    pub reasons: BTreeMap<String, u64>,
    /// The broker's own counts.
    pub broker: Tally,
    /// Most records that the job was behind.
    pub lag_max: u64,
    /// Seconds from the end of production and faults until everything was done; `None` when it never was.
    pub drained_after_s: Option<i64>,
    /// Hits of the faults, by mode.
    pub struck: BTreeMap<String, u64>,
    /// Longest commit of a worker in milliseconds, where commits have a cost.
    #[serde(default)]
    pub commit_ms_max: Option<u64>,
    /// Most state in megabytes of the account, where it has a cost.
    #[serde(default)]
    pub state_mb_max: Option<u64>,
}

impl Figures {
    /// Figures that can be added up over runs.
    pub fn totals(&self) -> Vec<(&'static str, u64)> {
        let mut totals = vec![
            ("events", self.events),
            ("events decided by timing", self.by_timing),
            ("rows of windows", self.windows),
            ("crashes", self.crashes),
            ("workers that gave up", self.stops),
            ("requests to the broker", self.broker.requests),
            ("commits", self.broker.commits),
            ("aborts", self.broker.aborts),
            ("transactions timed out", self.broker.expired),
            ("rebalances", self.broker.rebalances),
            ("producers fenced", self.broker.fenced),
            ("virtual seconds", self.virtual_s),
        ];
        totals.extend(self.fates.iter().map(|(fate, count)| (fate.name(), *count)));
        totals
    }

    /// The figures in one line.
    pub fn line(&self) -> String {
        let drained = self.drained_after_s.map_or("never done".to_owned(), |s| format!("done {s} s after the last fault"));
        let costs = match (self.commit_ms_max, self.state_mb_max) {
            (Some(ms), Some(mb)) => format!(", commits up to {}.{} s, state up to {mb} MB", ms / 1_000, ms % 1_000 / 100),
            _ => String::new(),
        };
        format!(
            "{} events, {} windows, {} crashes, {} rebalances, {} commits, {} aborts, lag up to {}{costs}, {drained}, {} s of virtual time",
            self.events,
            self.windows,
            self.crashes,
            self.broker.rebalances,
            self.broker.commits,
            self.broker.aborts,
            self.lag_max,
            self.virtual_s
        )
    }
}

/// What the job's own doing costs, as the monitor saw it at a look.
#[derive(Debug, Clone, Copy, Default)]
struct Gauge {
    commit_ms: u64,
    state_mb: u64,
}

/// What hosts leave behind.
#[derive(Debug, Default)]
struct Seen {
    ledger: Ledger,
    reader: BTreeMap<i32, Vec<(i64, Option<Bytes>)>>,
    samples: Vec<Sample>,
    /// One for each sample, where commits have a cost.
    gauges: Vec<Gauge>,
    /// When the first alert was raised.
    alerted: Option<Duration>,
    producing: usize,
    /// When the monitor found everything done.
    drained: Option<Duration>,
    stops: u64,
    reasons: BTreeMap<String, u64>,
    gave_up: Vec<GaveUp>,
    /// What must not happen whatever the faults are.
    broken: Vec<String>,
}

/// What all hosts of a run share.
#[derive(Debug)]
struct Stage {
    story: StreamScenario,
    /// The job's configuration, with what a sabotage leaves of it.
    config: StreamConfig,
    root: Stream,
    broker: Arc<SimBroker>,
    registry: Arc<RegistryService>,
    faults: Arc<Faults>,
    recorder: Recorder,
    platform: Config,
    contract: Contract,
    /// The ports that a stream does not use: every assembly has them.
    elsewhere: Ports,
    seen: Mutex<Seen>,
    starts: Arc<AtomicU64>,
    costs: Option<Arc<Costs>>,
    pager: Arc<SimNotifier>,
    notifier: Arc<dyn Notifier>,
    /// From here on all windows of the story are closed.
    closed_ms: i64,
    over: AtomicBool,
}

impl Stage {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clock of a process that starts; each start has random streams of its own.
    fn env(&self, process: &Arc<Process>, start: u64) -> Arc<HostEnv> {
        let random = self.root.child(&process.name).child(&format!("random {start}"));
        HostEnv::new(self.story.start, process.clone(), self.faults.clone(), random)
    }

    fn client(&self, env: &Arc<HostEnv>, start: u64) -> Client<HostLink> {
        let way = self.root.child(&env.process().name).child(&format!("way {start}"));
        Client::new(HostLink::new(self.broker.clone(), env.clone(), way, self.recorder.clone()), Settings::KAFKA)
    }
}

/// Runs the story in this process. One process runs one story once: globals start fresh.
///
/// # Errors
/// When the world itself breaks; what the job does wrong is in the judgement.
pub fn run(story: &StreamScenario, seed: u64, plant: bool) -> Result<(Judgement, Vec<Event>), Failure> {
    let start = story.start;
    let nanos = |elapsed: Duration| (start + elapsed).timestamp_nanos_opt().unwrap_or_default().cast_unsigned();
    interpose::set_seed(seed);
    interpose::start_virtual(nanos(Duration::ZERO));

    let root = Stream::root(seed);
    let broker = SimBroker::new(Arc::new(WorldEnv), Limits::KAFKA, Duration::ZERO);
    let clicks = TopicSpec {
        name: story.config.topics.clicks.clone(),
        partitions: story.workload.partitions,
        retention: None,
        compact: false,
    };
    broker.peek(Request::CreateTopic(clicks)).map_err(|refusal| refusal.what)?;
    let registry = Arc::new(RegistryService::default());
    let schema = registry.lock().register(CLICKS_SUBJECT, CLICKS)?;
    let faults = Arc::new(Faults::arm(story, &broker));
    let plan = workload::plan(story, schema, &faults, &root.child("workload"));
    let history = Arc::new(SimHistory::default());
    let recorder = Recorder::new(Arc::new(WorldEnv), history.clone());
    let mut config = story.config.clone();
    story.sabotage.iter().for_each(|sabotage| sabotage.config(&mut config));
    let sliding_ms = i64::try_from(story.config.sliding_window.as_millis()).unwrap_or(i64::MAX);
    let pager = Arc::new(SimNotifier {
        env: Arc::new(WorldEnv),
        raised: Mutex::default(),
        open: Mutex::default(),
        host: Arc::new(Host::new("watch", [])),
    });
    let cost = story.cost.clone();
    let stage = Arc::new(Stage {
        costs: cost.map(|cost| Costs::new(cost, story.config.topics.clone(), broker.clone())),
        notifier: recorded_notifier(pager.clone(), recorder.clone()),
        pager,
        config,
        root,
        broker: broker.clone(),
        registry,
        faults: faults.clone(),
        recorder: recorder.clone(),
        platform: Config {
            source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
            retry: RetryPolicy { retries: 5, backoff_s: 300, deadline_s: 9_000 },
            alert_after_s: 60,
            startup_s: 1,
        },
        contract: Contract::parse("contracts/odcs/cdnow/ventas.yaml", CONTRACT)?,
        elsewhere: elsewhere(&broker, &recorder),
        seen: Mutex::new(Seen { producing: plan.sendings.len(), ..Seen::default() }),
        starts: Arc::default(),
        closed_ms: plan.ends_ms + sliding_ms,
        over: AtomicBool::new(false),
        story: story.clone(),
    });

    let limit = Duration::from_secs(story.healed_s() + story.patience_s);
    let mut sim = turmoil::Builder::new()
        .epoch(start.into())
        .rng_seed(seed)
        .tick_duration(Duration::from_millis(story.tick_ms))
        .simulation_duration(limit * 2 + Duration::from_secs(3_600))
        .build();
    let mut workers = Vec::new();
    for number in 0..story.workers_most() {
        let process = Process::new(format!("worker-{number}"), Some(number));
        if number >= story.workers {
            process.sleep_in();
        }
        host(&mut sim, &stage, &process, &format!("worker-{number}"));
        let replaced =
            |f: &StreamFault| matches!(f, StreamFault::WorkerFreeze { worker, replaced: true, .. } if *worker == number);
        let double = story.fault.iter().any(replaced).then(|| {
            let double = Process::new(format!("double-{number}"), None);
            double.sleep_in();
            host(&mut sim, &stage, &double, &format!("worker-{number}"));
            double
        });
        workers.push(Life { process, double, back_at: None });
    }
    for (number, sendings) in plan.sendings.iter().enumerate() {
        let process = Process::new(format!("producer-{number}"), None);
        let (stage, sendings) = (stage.clone(), sendings.clone());
        sim.host(process.name.clone(), move || produce(stage.clone(), process.clone(), sendings.clone()));
    }
    for (name, watch) in [("monitor", Watch::Job), ("reader", Watch::Output)] {
        let (stage, process) = (stage.clone(), Process::new(name, None));
        sim.host(name, move || observe(stage.clone(), process.clone(), watch));
    }

    if let Some(watch) = story.watch.clone().filter(|_| story.sabotage != Some(Sabotage::Unwatched)) {
        let (stage, process) = (stage.clone(), Process::new("watch", None));
        sim.host("watch", move || keep_watch(stage.clone(), process.clone(), watch.clone()));
    }

    let (mut crashes, mut over_at) = (0, None);
    let mut acts = story.operator.clone();
    loop {
        sim.step().map_err(|e| format!("the simulation stopped: {e}"))?;
        let elapsed = sim.elapsed();
        interpose::set_virtual(nanos(elapsed));
        for (worker, deed) in faults.due(elapsed) {
            workers[worker].process.suffer(deed, elapsed);
            recorder.record("world", "strike", "ok".into(), json!({ "worker": worker, "deed": format!("{deed:?}") }));
        }
        let since = stage.seen().alerted.map(|at| elapsed.saturating_sub(at));
        let is_due = |act: &StreamAct| {
            let StreamAct::AddWorkers { after_alert_s, .. } = act;
            since.is_some_and(|since| since >= Duration::from_secs(*after_alert_s))
        };
        for StreamAct::AddWorkers { workers: wanted, .. } in acts.extract_if(.., |act| is_due(act)) {
            workers.iter().take(wanted).skip(story.workers).for_each(|life| life.process.wake());
            recorder.record("operator", "add_workers", "ok".into(), json!({ "workers": wanted }));
        }
        for life in &mut workers {
            crashes += u64::from(life.go_on(&mut sim, elapsed, &recorder));
        }
        if over_at.is_none() && (stage.seen().drained.is_some() || elapsed > limit) {
            over_at = Some(elapsed);
        }
        if over_at.is_some_and(|at| elapsed >= at + EPILOGUE) {
            break;
        }
    }
    stage.over.store(true, Ordering::SeqCst);
    if plant {
        // A real clock in the history: the canary must notice.
        recorder.record("planted", "real_clock", interpose::real_nanos().to_string(), serde_json::Value::Null);
    }
    let virtual_s = sim.elapsed().as_secs();
    drop(sim);
    let judgement = judge(&stage, &plan, crashes, virtual_s)?;
    let events = history.events.lock().map_err(|_| "the history panicked")?.clone();
    Ok((judgement, events))
}

/// A batch platform without a source, for the ports that nobody here calls.
fn elsewhere(broker: &Arc<SimBroker>, recorder: &Recorder) -> Ports {
    let host = Arc::new(Host::new("batch", []));
    let env: Arc<dyn Env> = Arc::new(WorldEnv);
    let service = ObjectService::new(host.clone(), Vec::new());
    let lakehouse = Arc::new(DeltaLakehouse::new(Arc::new(DirectStore(service.clone()))));
    let start = DateTime::from_timestamp_nanos(interpose::virtual_nanos().cast_signed());
    let jitter = Mutex::new(Stream::root(0));
    let clock = Arc::new(SimEnv { start, ids: AtomicU64::new(1), jitter });
    Ports {
        dimensions: Arc::new(NoDimensions),
        env,
        tables: Arc::new(SimSource::new("postgres")),
        objects: Arc::new(PortStore::new(service)),
        log: Arc::new(broker.client(Settings::KAFKA)),
        registry: Arc::new(MemoryRegistry::default()),
        warehouse: Arc::new(DeltaWarehouse::new(lakehouse.clone())),
        lakehouse,
        ledger: Arc::new(SimLedger::new(host.clone())),
        notifier: Arc::new(SimNotifier { env: clock, raised: Mutex::default(), open: Mutex::default(), host }),
        metrics: Arc::new(SimMetrics::default()),
        recorder: recorder.clone(),
    }
}

/// A worker's processes as the driver sees them.
struct Life {
    process: Arc<Process>,
    double: Option<Arc<Process>>,
    back_at: Option<Duration>,
}

impl Life {
    /// Buries what has died, starts what is due, and says whether it died now.
    fn go_on(&mut self, sim: &mut turmoil::Sim<'_>, now: Duration, recorder: &Recorder) -> bool {
        let name = self.process.name.as_str();
        let note = |call: &str| recorder.record("world", call, "ok".into(), json!({ "host": name }));
        self.process.wake_when_due(now);
        if self.process.is_replaced()
            && let Some(double) = self.double.take()
        {
            note("replace");
            double.wake();
        }
        match (self.process.down(), self.back_at) {
            (Some(down), None) => {
                note("crash");
                sim.crash(name);
                self.back_at = Some(now + down);
                return true;
            }
            (Some(_), Some(at)) if now >= at => {
                note("restart");
                self.process.revive();
                sim.bounce(name);
                self.back_at = None;
            }
            (Some(_) | None, _) => {}
        }
        false
    }
}

fn host(sim: &mut turmoil::Sim<'_>, stage: &Arc<Stage>, process: &Arc<Process>, member: &str) {
    let (stage, process_, member) = (stage.clone(), process.clone(), member.to_owned());
    let starts = Arc::new(AtomicU64::new(0));
    sim.host(process.name.clone(), move || {
        let start = starts.fetch_add(1, Ordering::SeqCst);
        work(stage.clone(), process_.clone(), member.clone(), start)
    });
}

type Ended = Result<(), Box<dyn std::error::Error>>;

/// A worker's process: the production job, and what starts it again when it gives up.
async fn work(stage: Arc<Stage>, process: Arc<Process>, member: String, start: u64) -> Ended {
    let env = stage.env(&process, start);
    let from = Duration::from_secs(stage.story.workers_from_s);
    env.sleep(from.saturating_sub(env.elapsed())).await;
    let log: Arc<dyn EventLog> = Arc::new(stage.client(&env, start));
    let log = match stage.story.sabotage {
        Some(sabotage) => sabotage.log(log, &stage.config.topics, stage.starts.clone()),
        None => log,
    };
    let log = match &stage.costs {
        Some(costs) => costs.log(log, env.clone()),
        None => log,
    };
    loop {
        if process.is_leaving() {
            env.sleep(Duration::from_millis(100)).await;
            continue;
        }
        if let Err(error) = live(&stage, &process, &env, &log, &member).await {
            {
                let mut seen = stage.seen();
                seen.stops += 1;
                let code = error.code.clone().unwrap_or_else(|| "none".into());
                *seen.reasons.entry(code.clone()).or_default() += 1;
                let (worker, replaced) = (process.name.clone(), process.is_replaced());
                seen.gave_up.push(GaveUp { worker, replaced, code, says: error.chain() });
            }
            stage.recorder.record("world", "worker_stopped", error.chain(), json!({ "host": process.name }));
            if process.is_replaced() {
                // Its name is another's now; nobody starts it again.
                std::future::pending::<()>().await;
            }
            env.sleep(RESTART_AFTER).await;
        }
    }
}

/// One life of the job in a process: until it is told to leave, or gives up.
async fn live(
    stage: &Stage,
    process: &Process,
    env: &Arc<HostEnv>,
    log: &Arc<dyn EventLog>,
    member: &str,
) -> Result<(), PortError> {
    let ports = Ports {
        env: env.clone(),
        log: log.clone(),
        registry: SimRegistry::new(stage.registry.clone(), env.clone()),
        metrics: Arc::new(SimMetrics::default()),
        ..stage.elsewhere.clone()
    };
    let platform = Platform::new(stage.platform.clone(), stage.contract.clone(), ports);
    let mut job = platform.stream_worker(&stage.config, member).await?;
    job.run(|| process.is_leaving()).await
}

async fn produce(stage: Arc<Stage>, process: Arc<Process>, sendings: Vec<workload::Sending>) -> Ended {
    let env = stage.env(&process, 0);
    let log = stage.client(&env, 0);
    let start_ms = stage.story.start.timestamp_millis();
    let note = |batch: &[workload::Sending], answered: bool| {
        let mut seen = stage.seen();
        for sending in batch {
            let sent = seen.ledger.entry((sending.partition, sending.value.clone())).or_default();
            *(if answered { &mut sent.acknowledged } else { &mut sent.tried }) += 1;
        }
    };
    if let Err(error) = workload::send(sendings, &stage.story.config, start_ms, &env, &log, note).await {
        stage.seen().broken.push(format!("{} gave up: {}", process.name, error.chain()));
    }
    stage.seen().producing -= 1;
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Watch {
    Job,
    Output,
}

/// The platform's monitor of the stream. What its orchestrator does when a check before a run fails is done here without one: it
/// raises an alert, and resolves it once all checks pass.
async fn keep_watch(stage: Arc<Stage>, process: Arc<Process>, watch: Monitoring) -> Ended {
    let env = stage.env(&process, 0);
    let limit = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let limits = MonitorLimits {
        lag_records_max: limit(watch.lag_records_max),
        lag_ms_max: limit(watch.lag_ms_max),
        ..MonitorLimits::specification()
    };
    // Nothing loads the windows here, so the ledger and the warehouse stay empty.
    let Ports { ledger, warehouse, .. } = stage.elsewhere.clone();
    let log = Arc::new(stage.client(&env, 0));
    let monitor = StreamingMonitor::new(env.clone(), log, ledger, warehouse, stage.config.clone(), limits);
    let key = format!("breaker_open/{MONITOR}");
    let mut is_open = false;
    loop {
        env.sleep(Duration::from_secs(watch.every_s)).await;
        let now = env.now();
        let failed: Vec<String> = monitor
            .checks(Slot { scheduled: now, fecha: now.date_naive() })
            .await
            .into_iter()
            .filter(|result| !result.passed)
            .map(|result| format!("{}: found {}, expected {}", result.check, result.observed, result.expected))
            .collect();
        let told = match (failed.is_empty(), is_open) {
            (false, false) => {
                let summary = format!("{MONITOR}: the checks before processing fail: {}", failed.join("; "));
                let alert = Alert { dedup_key: key.clone(), kind: "breaker_open".into(), priority: 1, summary };
                stage.notifier.raise(&alert).await
            }
            (true, true) => stage.notifier.resolve(&key).await,
            (true, false) | (false, true) => continue,
        };
        // What the pager did not take is tried again at the next look.
        if told.is_ok() {
            is_open = !is_open;
            if is_open {
                stage.seen().alerted.get_or_insert(env.elapsed());
            }
        }
    }
}

/// Looks at the job, or reads its output, through links of its own that no fault strikes.
async fn observe(stage: Arc<Stage>, process: Arc<Process>, watch: Watch) -> Ended {
    let env = stage.env(&process, 0);
    let log = stage.client(&env, 0);
    let mut positions: BTreeMap<i32, i64> = BTreeMap::new();
    loop {
        match watch {
            Watch::Job => {
                env.sleep(LOOK_EVERY).await;
                // Asked before the look: what is sent during it may be missing in it.
                let is_quiet = stage.seen().producing == 0;
                // The broker may be away: then there is no look.
                let Ok(status) = JobStatus::read(&stage.config, &log).await else { continue };
                // For the timeline of the report: how far the job is behind, in records and in time.
                let mut look = json!({ "lag_records": status.lag_records(), "closed_ms": status.closed_ms() });
                let gauge = stage.costs.as_ref().map(|costs| Gauge {
                    commit_ms: costs.commit_ms(),
                    state_mb: costs.megabytes(stage.story.workload.partitions, stage.config.merge_partitions),
                });
                if let Some(gauge) = gauge {
                    look["commit_ms"] = gauge.commit_ms.into();
                    look["state_mb"] = gauge.state_mb.into();
                }
                stage.recorder.record("monitor", "look", "ok".into(), look);
                let mut seen = stage.seen();
                let done = is_quiet
                    && !status.merges.is_empty()
                    && status.is_caught_up()
                    && status.closed_ms() >= Some(stage.closed_ms)
                    && env.elapsed() >= Duration::from_secs(stage.story.healed_s());
                let at = env.elapsed();
                seen.samples.push(Sample { at, status });
                seen.gauges.extend(gauge);
                if done && seen.drained.is_none() {
                    seen.drained = Some(at);
                }
            }
            Watch::Output => {
                env.sleep(READ_EVERY).await;
                let topic = &stage.config.topics.metrics;
                let Ok(bounds) = log.offsets(topic).await else { continue };
                for partition in bounds.into_keys() {
                    let position = positions.entry(partition).or_insert(0);
                    let at = TopicPartition { topic: topic.clone(), partition };
                    let Ok((records, next)) = log.read(&at, *position, 10_000).await else { continue };
                    *position = next;
                    let mut seen = stage.seen();
                    let read = seen.reader.entry(partition).or_default();
                    read.extend(records.into_iter().map(|record| (record.offset, record.value)));
                }
            }
        }
    }
}

/// All records of a topic, as they stand now; nothing when there is no such topic.
fn all(broker: &SimBroker, topic: &str) -> Result<Topic, Failure> {
    let Ok(Response::Bounds(bounds)) = broker.peek(Request::Bounds { topic: topic.to_owned() }) else {
        return Ok(Topic::new());
    };
    let mut out = Topic::new();
    for (partition, (mut offset, end)) in bounds {
        let records = out.entry(partition).or_default();
        while offset < end {
            let at = TopicPartition { topic: topic.to_owned(), partition };
            let fetch = Request::Fetch { partition: at, offset, records_max: 100_000, bytes_max: 64 << 20 };
            match broker.peek(fetch).map_err(|refusal| refusal.what)? {
                Response::Fetched(fetched) => {
                    offset = fetched.next_offset;
                    records.extend(fetched.records);
                }
                other => return Err(format!("read {topic} {partition}: found {other:?}").into()),
            }
        }
    }
    Ok(out)
}

fn digest(topic: &Topic) -> String {
    let mut hash = Sha256::new();
    let mut put = |bytes: Option<&Blob>| match bytes {
        None => hash.update([0]),
        Some(Blob(bytes)) => {
            hash.update([1]);
            hash.update((bytes.len() as u64).to_be_bytes());
            hash.update(bytes);
        }
    };
    for (partition, records) in topic {
        for record in records {
            let place = [i64::from(*partition), record.offset, record.appended_ms, record.headers.len() as i64];
            put(Some(&Blob(place.iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<u8>>().into())));
            put(record.key.as_ref());
            put(record.value.as_ref());
            for (name, value) in &record.headers {
                put(Some(&Blob(Bytes::copy_from_slice(name.as_bytes()))));
                put(Some(value));
            }
        }
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The records of the input by then, those of them that are processed, and when.
fn standing(sample: &Sample) -> (u64, u64, f64) {
    let end: i64 = sample.status.clicks.values().map(|click| click.end_offset).sum();
    (end.max(0).cast_unsigned(), sample.status.records_read(), sample.at.as_secs_f64())
}

/// What a reading misses.
fn misread(reading: &Reading, seen: &Seen) -> Vec<String> {
    let newest = |at_s: u64| seen.samples.iter().rposition(|sample| sample.at <= Duration::from_secs(at_s));
    let Some(index) = newest(reading.at_s) else { return vec![format!("reading at {} s: found no look", reading.at_s)] };
    let sample = &seen.samples[index];
    let gauge = seen.gauges.get(index).copied().unwrap_or_default();
    let (came, done, at) = standing(sample);
    let (came_before, done_before, before) =
        newest(reading.at_s.saturating_sub(RATE_OVER_S)).map_or((0, 0, 0.0), |earlier| standing(&seen.samples[earlier]));
    let rate = |count: u64| (count as f64 / (at - before).max(1.0)).round() as u64;
    // A commit has just brought it to nothing, or is about to: the highest of the time tells more than the newest.
    let since = Duration::from_secs(reading.at_s.saturating_sub(LAG_OVER_S));
    let looks = seen.samples[..=index].iter().rev().take_while(|sample| sample.at >= since);
    let lag = looks.map(|sample| sample.status.lag_records().max(0).cast_unsigned()).max().unwrap_or(0);
    [
        ("records behind", lag, reading.lag),
        ("milliseconds of a commit", gauge.commit_ms, reading.commit_ms),
        ("megabytes of state", gauge.state_mb, reading.state_mb),
        ("records that came in a second", rate(came.saturating_sub(came_before)), reading.in_per_s),
        ("records that were processed in a second", rate(done.saturating_sub(done_before)), reading.out_per_s),
    ]
    .into_iter()
    .filter_map(|(what, found, wanted)| wanted.map(|[low, high]| (what, found, low, high)))
    .filter(|(_, found, low, high)| !(low..=high).contains(&found))
    .map(|(what, found, low, high)| format!("reading at {} s: found {found} {what}, expected {low} to {high}", reading.at_s))
    .collect()
}

/// The lag of an incident: it begins with the first look at which the oldest event has waited more than twice as long as any did
/// before the cause, and is over after the last such look. It is told in time and not in records, of which more are usual
/// when more come. `None` without an account of people, or when nothing showed.
fn incident(story: &StreamScenario, seen: &Seen, raised: &[(DateTime<chrono::Utc>, Alert)]) -> Option<Incident> {
    let account = story.account.as_ref()?;
    let when = |sample: &Sample| story.start + sample.at;
    let lag = |sample: &Sample| sample.status.lag_records().max(0).cast_unsigned();
    let waits = |sample: &Sample| {
        let now_ms = when(sample).timestamp_millis();
        sample.status.clicks.values().map(|click| click.lag_ms(now_ms)).max().unwrap_or(0)
    };
    let normal = seen.samples.iter().filter(|s| when(s) < account.began_at).map(waits).max().unwrap_or(0);
    let is_behind = |sample: &Sample| when(sample) >= account.began_at && waits(sample) > 2 * normal;
    let effect_at = when(seen.samples.iter().find(|s| is_behind(s))?);
    let last = seen.samples.iter().rposition(is_behind)?;
    let alert = raised.iter().find(|(at, _)| *at >= account.began_at).map(|(at, alert)| (*at, alert.kind.clone()));
    let cause_after_s = alert.is_none().then(|| (account.cause_at - account.began_at).num_seconds());
    let (detected_at, detected_by) = alert.unwrap_or((account.noticed_at, "people".to_owned()));
    Some(Incident {
        effect_at,
        detected_at: Some(detected_at),
        detected_by: Some(detected_by),
        resolved_at: seen.samples.get(last + 1).map(when),
        wrong_rows: 0,
        wrong_cents: 0,
        customers: 0,
        cause_after_s,
        behind: Some(seen.samples.iter().map(lag).max().unwrap_or(0)),
    })
}

fn judge(stage: &Stage, plan: &workload::Plan, crashes: u64, virtual_s: u64) -> Result<Judgement, Failure> {
    let (story, topics) = (&stage.story, &stage.story.config.topics);
    let names = [
        &topics.clicks,
        &topics.metrics,
        &topics.dead_letter,
        &topics.late,
        &topics.changelog,
        &topics.partials,
        &topics.merge_changelog,
        &topics.control,
    ];
    let mut there: BTreeMap<String, Topic> = BTreeMap::new();
    for name in names {
        there.insert(name.clone(), all(&stage.broker, name)?);
    }
    let committed = Request::Committed { group: story.config.group.clone(), topic: topics.clicks.clone() };
    let committed = match stage.broker.peek(committed) {
        Ok(Response::Offsets(offsets)) => offsets,
        Ok(_) | Err(_) => BTreeMap::new(),
    };
    let delivered: BTreeMap<i32, Vec<Delivered>> = there[&topics.clicks]
        .iter()
        .map(|(partition, records)| {
            let bytes = |blob: &Option<Blob>| blob.clone().map(|Blob(bytes)| bytes);
            let of = |r: &simulacro_log::Stored| Delivered {
                offset: r.offset,
                appended_ms: r.appended_ms,
                key: bytes(&r.key),
                value: bytes(&r.value),
            };
            (*partition, records.iter().map(of).collect())
        })
        .collect();
    let late: BTreeSet<(i32, i64)> =
        invariants::origins(there.get(&topics.late)).into_iter().filter_map(|(origin, _)| origin).collect();
    let jumps = story.fault.iter().any(|f| matches!(f, StreamFault::Clock { host, .. } if host.starts_with("worker")));
    let rules = Rules::of(&story.config, jumps);
    let start_ms = story.start.timestamp_millis();
    let looks: Vec<i64> = {
        let at = |sample: &Sample| start_ms + i64::try_from(sample.at.as_millis()).unwrap_or(i64::MAX);
        stage.seen().samples.iter().map(at).collect()
    };
    let expected: Expected = oracle::expect(&delivered, &plan.meanings, &rules, &late, start_ms, &looks);
    if let Some(at) = expected.unknown.first() {
        return Err(format!("record {at:?} of the topic of clicks: found bytes that no producer made").into());
    }
    let hits = stage.faults.hits(&stage.broker);
    let seen = stage.seen();
    let evidence = Evidence {
        story,
        plan,
        ledger: &seen.ledger,
        expected: &expected,
        topics: &there,
        committed: &committed,
        reader: &seen.reader,
        samples: &seen.samples,
        drained: seen.drained.is_some(),
        gave_up: &seen.gave_up,
    };
    let broken = invariants::judge(&evidence);

    let mut struck: BTreeMap<String, u64> = BTreeMap::new();
    for (fault, hits) in story.fault.iter().zip(&hits) {
        *struck.entry(fault.mode().to_owned()).or_default() += hits;
    }
    let lag = |sample: &Sample| sample.status.lag_records().max(0).cast_unsigned();
    let figures = Figures {
        virtual_s,
        events: expected.ends.len() as u64,
        fates: Fate::ALL.iter().map(|fate| (*fate, expected.of(*fate).0)).collect(),
        by_timing: expected.by_timing,
        windows: expected.windows.len() as u64,
        crashes,
        stops: seen.stops,
        reasons: seen.reasons.clone(),
        broker: stage.broker.tally(),
        lag_max: seen.samples.iter().map(lag).max().unwrap_or(0),
        drained_after_s: seen.drained.map(|at| at.as_secs().cast_signed() - story.healed_s().cast_signed()),
        struck,
        commit_ms_max: seen.gauges.iter().map(|gauge| gauge.commit_ms).max(),
        state_mb_max: seen.gauges.iter().map(|gauge| gauge.state_mb).max(),
    };
    let raised = stage.pager.raised.lock().map_err(|_| "the pager panicked")?.clone();
    let incident = incident(story, &seen, &raised);

    let mut problems = seen.broken.clone();
    problems.extend(story.expect.reading.iter().flat_map(|reading| misread(reading, &seen)));
    let kinds: Vec<&str> = raised.iter().map(|(_, alert)| alert.kind.as_str()).collect();
    if let Some(wanted) = story.expect.alerts.as_ref().filter(|wanted| **wanted != kinds) {
        problems.push(format!("alerts: found {kinds:?}, expected {wanted:?}"));
    }
    if let Some(limit) = story.expect.detected_within_s {
        let delay = incident.as_ref().and_then(|i| Some((i.detected_at? - i.effect_at).num_seconds()));
        if delay.is_none_or(|delay| delay > i64::try_from(limit).unwrap_or(i64::MAX)) {
            problems.push(format!("detection: found {delay:?} s after the first effect, expected within {limit} s"));
        }
    }
    match story.expect.verdict {
        Verdict::Holds => problems.extend(broken.iter().map(|(name, text)| format!("invariant {name}: {text}"))),
        Verdict::Caught => {
            let names: BTreeSet<&str> = broken.iter().map(|b| b.0).collect();
            let wanted: BTreeSet<&str> = story.expect.broken.iter().map(String::as_str).collect();
            if names != wanted {
                problems.push(format!("broken invariants: found {names:?}, expected {wanted:?}"));
            }
        }
    }
    // What never happened proves nothing.
    let mut idle: Vec<String> = Vec::new();
    for (fault, hits) in story.fault.iter().zip(&hits).filter(|(_, hits)| **hits < story.expect.fired_min) {
        idle.push(format!("fault {} struck {hits} times, expected at least {}", fault.mode(), story.expect.fired_min));
    }
    for (fate, least) in &story.expect.fates_min {
        let found = expected.of(*fate).0;
        if found < *least {
            idle.push(format!("{found} events were {fate}, expected at least {least}"));
        }
    }
    if figures.lag_max < story.expect.lag_min {
        idle.push(format!("the job was behind by {} records, expected at least {}", figures.lag_max, story.expect.lag_min));
    }
    let verdict = match (problems.is_empty(), idle.is_empty()) {
        (false, _) => "violated",
        (true, false) => "inconclusive",
        (true, true) => "holds",
    };
    problems.extend(idle);
    Ok(Judgement {
        verdict: verdict.into(),
        problems,
        broken: broken.iter().map(|(name, text)| format!("{name}: {text}")).collect(),
        expected: Vec::new(),
        mart: Vec::new(),
        attempts: Vec::new(),
        alerts: raised.iter().map(|(at, a)| format!("{} {}", at.format("%m-%d %H:%M:%S"), a.kind)).collect(),
        published: BTreeMap::new(),
        hits,
        hashes: there.iter().map(|(name, topic)| (name.clone(), digest(topic))).collect(),
        store_digest: String::new(),
        store_calls: 0,
        draws: interpose::draws(),
        stream: Some(figures),
        platform: None,
        incident,
        without: None,
        recovered: Vec::new(),
    })
}
