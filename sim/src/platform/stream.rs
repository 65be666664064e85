//! The stream of a platform story: the shop's events, the production job over them, its sink, and what watches them.
//!
//! The shop sends what its visitors did once per tick, and the job polls and commits as often: a tick is a minute or so of
//! virtual time, so that a year is one run. Requests to the broker take no time, unless a fault slows the job's. An *oracle*
//! judges each event as it is appended and adds up what windows must show, a *reader* adds up what they do.
//!
//! The monitor and the daily reconciliation are the assets of production, under the world's orchestrator.
//!
//! What is left out:
//! - The sink of raw `eventos`: models that want events have none here.
//! - Faults of the store for the sink, and for the monitor that asks how far it is: they would be seen there first, where
//!   nobody is told.
//! - Loss, delay and restarts at the broker, and everything that is wrong with single events: [`crate::stream`] has those.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Days, NaiveDate, NaiveTime, TimeDelta, Utc};
use serde_json::json;
use simulacro_core::{
    assets::{self, MonitorLimits, StreamReconciliation, StreamingMonitor},
    avro::{CLICKS, CLICKS_SUBJECT, memory::MemoryRegistry},
    batch::strings,
    contract::check::QualityResult,
    orchestrator::{Asset, Job, Schedule, Slot, Work, WorkError},
    platform::Platform,
    ports::{
        PortError, Ports, RunLedger, SchemaRegistry,
        event_log::{EventLog, OutRecord, TopicPartition, TopicSpec},
    },
    slo::samples::{RECONCILED, Reconciled},
    streaming::{
        config::StreamConfig,
        event::Fate,
        metricas::METRICAS,
        status::{JobStatus, existing},
    },
};
use simulacro_log::{Client, Limits, Link, LinkError, Request, Response, Settings};

use super::{
    clicks,
    clock::Clock,
    faults::{Faults, Mode},
    scenario::{PlatformScenario, StreamSize},
    shop::Shop,
};
use crate::{
    broker::SimBroker,
    stream::{
        oracle::{Rules, Running},
        sabotage::Sabotage,
        wire::{self, Totals, WindowKey},
    },
    world::Failure,
};

/// When the monitor looks: every minute as shipped, but never at the moment at which another asset begins, since what threads
/// do for that one has no order with what the monitor does meanwhile.
const MONITOR_AT: &str = "1-29,31-59 * * * *";
/// Ticks begin so long after a full minute, so that nothing else is due at the same moment.
const PHASE: TimeDelta = TimeDelta::milliseconds(7_310);
/// What windows show of a day is read so long after it was due.
const READ_AFTER: TimeDelta = TimeDelta::milliseconds(1_817_450);
/// How long a job or a sink that ended with an error stays away.
const RESTART: Duration = Duration::from_secs(60);
/// Time that a slowed job needs for one read of clicks.
const SLOW_READ: Duration = Duration::from_secs(60);
/// Ticks within which everything must be done once nothing is sent any more.
const DRAIN_TICKS: u32 = 120;
/// The sink writes so long beside any tick: threads work for it, and have no order with what the job does at the same moment.
const ASIDE: Duration = Duration::from_millis(23_450);
/// Work for which threads read the lake begins so long after its turn: what the orchestrator does for other turns that are
/// due at the same moment has no order with what threads do.
const LOOK_ASIDE: Duration = Duration::from_millis(130);
/// The same for the reconciliation, beside the looks of the monitor.
const RECONCILE_ASIDE: Duration = Duration::from_millis(17_450);
const MINUTE_MS: i64 = 60_000;

/// What windows show, or must show, by day and region. Users are not added up over windows.
pub type ByRegion = BTreeMap<(NaiveDate, String), Totals>;

fn add(into: &mut ByRegion, start_ms: i64, region: &str, more: &Totals) {
    let Some(at) = DateTime::from_timestamp_millis(start_ms) else { return };
    let sum = into.entry((at.date_naive(), region.to_owned())).or_default();
    sum.clicks += more.clicks;
    sum.purchases += more.purchases;
    sum.add_to_cart += more.add_to_cart;
    sum.cents += more.cents;
}

/// Assets, with the work behind each.
pub type Works = Vec<(Asset, Arc<dyn Work>)>;

/// Whose requests a link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The job's, which a fault may slow.
    Job,
    /// Anybody else's.
    Other,
}

/// A way to the broker that takes no time.
#[derive(Debug)]
pub struct StreamLink {
    broker: Arc<SimBroker>,
    clock: Arc<Clock>,
    faults: Arc<Faults>,
    role: Role,
    /// Topic of clicks, and how many of its records a slowed job reads at once.
    slow: (String, usize),
}

#[async_trait]
impl Link for StreamLink {
    async fn call(&self, mut request: Request) -> Result<Response, LinkError> {
        let mut waits = false;
        if self.role == Role::Job
            && let Request::Fetch { partition, records_max, .. } = &mut request
            && partition.topic == self.slow.0
            && self.faults.strikes(Mode::StreamSlow, 1)
        {
            *records_max = (*records_max).min(self.slow.1);
            waits = true;
        }
        let response = self.broker.carry(request);
        if waits {
            self.clock.sleep(SLOW_READ).await;
        }
        response
    }
    fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }
    async fn sleep(&self, duration: Duration) {
        self.clock.sleep(duration).await;
    }
    fn version(&self) -> u64 {
        self.broker.version()
    }
    async fn changed(&self, seen: u64, wait: Duration) {
        tokio::select! {
            biased;
            () = self.broker.moved(seen) => {}
            () = self.clock.sleep(wait) => {}
        }
    }
}

/// What came of the stream so far.
#[derive(Debug)]
struct Seen {
    running: Running,
    /// What windows must show.
    expected: ByRegion,
    /// Events by fate.
    fates: BTreeMap<Fate, u64>,
    sent: u64,
    /// Events whose fate the topic alone does not tell.
    by_timing: u64,
    /// Newest revisions of windows that may still change.
    newest: BTreeMap<WindowKey, (i64, Totals)>,
    /// Where the reader of windows is.
    read: BTreeMap<i32, i64>,
    /// What windows of regions show, and those of pages, which are the same events.
    shown: ByRegion,
    shown_by_page: ByRegion,
    rows: u64,
    crashes: u64,
    stops: u64,
}

/// Work that begins a little after its turn.
#[derive(Debug)]
struct Aside<W> {
    inner: W,
    by: Duration,
    clock: Arc<Clock>,
}

#[async_trait]
impl<W: Work> Work for Aside<W> {
    async fn ready(&self) -> Result<(), PortError> {
        self.inner.ready().await
    }
    async fn checks(&self, slot: Slot) -> Vec<QualityResult> {
        self.clock.sleep(self.by).await;
        self.inner.checks(slot).await
    }
    async fn floor(&self, fecha: NaiveDate) -> Result<i64, PortError> {
        self.inner.floor(fecha).await
    }
    async fn run(&self, job: &Job) -> Result<serde_json::Value, WorkError> {
        self.inner.run(job).await
    }
}

/// What the stream came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What windows must show.
    pub expected: ByRegion,
    /// What windows of regions show.
    pub shown: ByRegion,
    /// What windows of pages show.
    pub shown_by_page: ByRegion,
    /// What the warehouse shows.
    pub warehouse: ByRegion,
    /// Events that were sent.
    pub sent: u64,
    /// Events by fate, as the oracle has them.
    pub fates: BTreeMap<Fate, u64>,
    /// Events by fate, as the job has them.
    pub counted: BTreeMap<Fate, u64>,
    /// Records in the late and in the dead-letter topic.
    pub aside: (u64, u64),
    /// Events whose fate the topic alone does not tell.
    pub by_timing: u64,
    /// Rows that were emitted.
    pub rows: u64,
    /// Days that were reconciled, as the ledger has them.
    pub reconciled: BTreeMap<NaiveDate, Reconciled>,
    /// Deaths of the job.
    pub crashes: u64,
    /// Workers and sinks that gave up and were started again.
    pub stops: u64,
    /// Whether everything was done at the end.
    pub is_drained: bool,
}

/// The stream of a world, which outlives its processes.
pub struct StreamStage {
    size: StreamSize,
    config: StreamConfig,
    /// The same with what a sabotage leaves of it, for the job.
    job: StreamConfig,
    /// Producers of all workers so far.
    starts: Arc<AtomicU64>,
    story: PlatformScenario,
    seed: u64,
    clock: Arc<Clock>,
    faults: Arc<Faults>,
    shop: Arc<Shop>,
    broker: Arc<SimBroker>,
    schema: u32,
    seen: Mutex<Seen>,
    is_closing: AtomicBool,
    is_drained: AtomicBool,
    sinks_done: AtomicU64,
}

impl fmt::Debug for StreamStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamStage").field("size", &self.size).finish_non_exhaustive()
    }
}

/// Starts processes for the stream.
pub trait Assembly: Sync {
    /// A platform for a process of this name, which reaches the broker by `log`.
    ///
    /// # Errors
    /// When the world itself is broken.
    fn platform(&self, name: &str, log: Arc<dyn EventLog>) -> Result<Arc<Platform>, Failure>;
    /// Writes something down in the history.
    fn note(&self, component: &str, call: &str, refs: serde_json::Value);
}

impl StreamStage {
    /// Bounds of a broker for coarse ticks: as shipped, but that it looks for old records once a minute and cleans up sooner,
    /// since a monitor that looks at the job reads all that is there.
    pub fn limits() -> Limits {
        Limits { retention_check_ms: MINUTE_MS, tombstone_ms: 10 * MINUTE_MS, compact_above: 200, ..Limits::KAFKA }
    }

    /// The job's configuration: as specified, at the pace of the story's ticks.
    pub fn config(size: &StreamSize) -> StreamConfig {
        let tick = Duration::from_secs(size.tick_s);
        StreamConfig {
            merge_partitions: 1,
            idle_after: tick * 3,
            commit_interval: tick,
            poll_wait: tick,
            session_timeout: tick * 5,
            metricas_flush: Duration::from_secs(size.sink_every_s) + ASIDE,
            ..StreamConfig::specification()
        }
    }

    /// Makes the topic of clicks and registers what is in it.
    ///
    /// # Errors
    /// When the broker or the registry refuses.
    pub async fn open(
        story: &PlatformScenario,
        size: &StreamSize,
        seed: u64,
        (clock, faults, shop): (Arc<Clock>, Arc<Faults>, Arc<Shop>),
        broker: Arc<SimBroker>,
        registry: &MemoryRegistry,
    ) -> Result<Self, Failure> {
        let config = Self::config(size);
        config.validate()?;
        let mut job = config.clone();
        story.sabotage.iter().for_each(|sabotage| sabotage.config(&mut job));
        let retention = Some(Duration::from_secs(size.retention_h * 3_600));
        let clicks = TopicSpec { name: config.topics.clicks.clone(), partitions: size.partitions, retention, compact: false };
        broker.peek(Request::CreateTopic(clicks)).map_err(|refusal| refusal.what)?;
        let schema = registry.register(CLICKS_SUBJECT, CLICKS).await?;
        let began_ms = clock.now().timestamp_millis();
        let seen = Seen {
            running: Running::new(size.partitions, Rules::of(&config, false), began_ms),
            expected: ByRegion::new(),
            fates: BTreeMap::new(),
            sent: 0,
            by_timing: 0,
            newest: BTreeMap::new(),
            read: BTreeMap::new(),
            shown: ByRegion::new(),
            shown_by_page: ByRegion::new(),
            rows: 0,
            crashes: 0,
            stops: 0,
        };
        Ok(Self {
            size: size.clone(),
            config,
            job,
            starts: Arc::default(),
            story: story.clone(),
            seed,
            clock,
            faults,
            shop,
            broker,
            schema,
            seen: Mutex::new(seen),
            is_closing: AtomicBool::new(false),
            is_drained: AtomicBool::new(false),
            sinks_done: AtomicU64::new(0),
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tick(&self) -> Duration {
        Duration::from_secs(self.size.tick_s)
    }

    fn client(&self, role: Role) -> Client<StreamLink> {
        let a_tick = self.size.events_per_day * self.size.tick_s / 86_400;
        // Half of what comes, so that a slowed job falls behind.
        let slow = usize::try_from(a_tick / self.size.partitions.unsigned_abs() as u64 / 2).unwrap_or(1).max(1);
        let link = StreamLink {
            broker: self.broker.clone(),
            clock: self.clock.clone(),
            faults: self.faults.clone(),
            role,
            slow: (self.config.topics.clicks.clone(), slow),
        };
        let settings = Settings { heartbeat: self.tick(), poll_records_max: 5_000, ..Settings::KAFKA };
        Client::new(Arc::new(link), settings)
    }

    /// The event log of a process.
    pub fn log(&self, role: Role) -> Arc<dyn EventLog> {
        let log: Arc<dyn EventLog> = Arc::new(self.client(role));
        match self.story.sabotage {
            Some(sabotage) if role == Role::Job => sabotage.log(log, &self.job.topics, self.starts.clone()),
            Some(_) | None => log,
        }
    }

    /// The assets of production that watch the stream, for the orchestrator's platform; `beside` asks the warehouse how far
    /// its sink is.
    ///
    /// # Errors
    /// When an asset that ships is none.
    pub fn watch(&self, platform: &Arc<Platform>, beside: &Platform) -> Result<Works, Failure> {
        let Ports { env, log, ledger, .. } = platform.ports.clone();
        // A row waits for the sink's own pace, and for as long as anywhere.
        let shipped = MonitorLimits::specification();
        let pace_ms = i64::try_from(self.config.metricas_flush.as_millis()).unwrap_or(0);
        let limits = MonitorLimits { sink_ms_max: shipped.sink_ms_max + pace_ms, ..shipped };
        let monitor = StreamingMonitor::new(env, log, ledger, beside.ports.warehouse.clone(), self.config.clone(), limits);
        let monitor = Aside { inner: monitor, by: LOOK_ASIDE, clock: self.clock.clone() };
        let schedule = Schedule::parse(MONITOR_AT)?;
        let comparison = StreamReconciliation::new(platform.clone(), self.config.clone());
        let comparison = Aside { inner: comparison, by: RECONCILE_ASIDE, clock: self.clock.clone() };
        let mut works: Works = vec![(assets::batch_stream_reconciliation()?, Arc::new(comparison))];
        if self.story.sabotage != Some(Sabotage::Unwatched) {
            works.insert(0, (Asset { schedule, ..assets::ecommerce_streaming_monitor()? }, Arc::new(monitor)));
        }
        Ok(works)
    }

    /// Lives until it is dropped.
    ///
    /// # Errors
    /// When the world itself breaks.
    pub async fn live(&self, world: &impl Assembly) -> Result<(), Failure> {
        let workers = futures::future::try_join_all((0..self.size.workers).map(|number| self.work(world, number)));
        // Always in this order, as everywhere in this world.
        let all = futures::future::try_join4(self.send(), workers, self.load(world), self.read());
        all.await.map(|_| ())
    }

    /// The shop sends what its visitors did, once per tick.
    async fn send(&self) -> Result<(), Failure> {
        let mut producer = self.client(Role::Other).producer(None).await?;
        let mut fecha = self.story.fecha;
        let users = self.story.shop.customers * 3 / 4;
        let deeds_of = |fecha| clicks::day(&self.shop, &self.size, users, fecha, self.seed).into_iter().peekable();
        let mut deeds = deeds_of(fecha);
        let mut at = fecha.and_time(NaiveTime::MIN).and_utc() + PHASE;
        loop {
            at += self.tick();
            self.clock.sleep_until(at).await;
            if self.is_closing.load(Ordering::SeqCst) {
                return std::future::pending().await;
            }
            let now_ms = self.clock.now().timestamp_millis();
            let offset_ms = self.faults.offset(Mode::ProducerClock, self.clock.now()).unwrap_or(0) * 1_000;
            let mut due: Vec<(i32, wire::Event)> = Vec::new();
            loop {
                while let Some((user, event)) = deeds.next_if(|(_, event)| event.timestamp_ms <= now_ms) {
                    let partition = (user / 5 % u64::from(self.size.partitions.unsigned_abs())) as i32;
                    due.push((partition, wire::Event { timestamp_ms: event.timestamp_ms + offset_ms, ..event }));
                }
                // After midnight the next day goes on where this one ends.
                if deeds.peek().is_some() {
                    break;
                }
                fecha = fecha + Days::new(1);
                deeds = deeds_of(fecha);
                if deeds.peek().is_none_or(|(_, event)| event.timestamp_ms > now_ms) {
                    break;
                }
            }
            if due.is_empty() {
                continue;
            }
            let record = |(partition, event): &(i32, wire::Event)| OutRecord {
                topic: self.config.topics.clicks.clone(),
                partition: Some(*partition),
                key: Some(Bytes::from(event.user_id.clone())),
                value: Some(Bytes::from(wire::encode(self.schema, event))),
                headers: Vec::new(),
            };
            producer.send(due.iter().map(record).collect()).await?;
            self.judge(now_ms, &due);
        }
    }

    /// What must become of events that were appended now.
    fn judge(&self, appended_ms: i64, events: &[(i32, wire::Event)]) {
        let mut seen = self.seen();
        let ends = seen.running.moment(appended_ms, events);
        seen.sent += events.len() as u64;
        for ((_, event), (end, by_timing)) in events.iter().zip(ends) {
            *seen.fates.entry(end.fate).or_default() += 1;
            seen.by_timing += u64::from(by_timing);
            if end.fate == Fate::Published {
                let one = |name: &str| i64::from(event.event_type == name);
                let totals = Totals {
                    clicks: one("click"),
                    purchases: one("purchase"),
                    add_to_cart: one("add_to_cart"),
                    cents: event.cents,
                    users: 0,
                };
                add(&mut seen.expected, event.timestamp_ms, &event.region, &totals);
            }
        }
    }

    /// One worker: the production job, started again when it dies or gives up.
    async fn work(&self, world: &impl Assembly, number: u64) -> Result<(), Failure> {
        let member = format!("worker-{number}");
        for start in 1_u32.. {
            let platform = world.platform(&format!("{member}.{start}"), self.log(Role::Job))?;
            let crash = self.faults.next_of(Mode::StreamCrash, self.clock.now());
            let killed = async {
                match crash {
                    Some((at, _)) => self.clock.sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let life = async {
                let mut job = platform.stream_worker(&self.job, &member).await?;
                job.run(|| false).await
            };
            let ended: Option<Result<(), PortError>> =
                tokio::select! { biased; () = killed => None, ended = life => Some(ended) };
            match (ended, crash) {
                (Some(Ok(())), _) | (None, None) => {}
                (Some(Err(error)), _) => {
                    self.seen().stops += 1;
                    world.note("stream", "ended", json!({ "member": member, "error": error.chain() }));
                    self.clock.sleep(RESTART).await;
                }
                (None, Some((_, back))) => {
                    self.faults.strikes(Mode::StreamCrash, 1);
                    self.seen().crashes += 1;
                    world.note("stream", "killed", json!({ "member": member, "until": back }));
                    self.clock.sleep_until(back).await;
                }
            }
        }
        Ok(())
    }

    /// The sink of the warehouse, started again when it gives up.
    async fn load(&self, world: &impl Assembly) -> Result<(), Failure> {
        for start in 1_u32.. {
            self.clock.sleep(ASIDE).await;
            let platform = world.platform(&format!("sumidero.{start}"), self.log(Role::Other))?;
            let life = async {
                let mut sink = platform.metricas_sink(&self.config, "sumidero").await?;
                while !self.is_drained.load(Ordering::SeqCst) {
                    sink.step().await?;
                }
                self.clock.sleep(ASIDE).await;
                while !sink.drain().await? {}
                self.sinks_done.store(1, Ordering::SeqCst);
                std::future::pending::<Result<(), PortError>>().await
            };
            if let Err(error) = life.await {
                self.seen().stops += 1;
                world.note("sink", "ended", json!({ "error": error.chain() }));
                self.clock.sleep(RESTART).await;
            }
        }
        Ok(())
    }

    /// Reads what windows show of each day once it was due.
    async fn read(&self) -> Result<(), Failure> {
        for fecha in self.story.fechas() {
            self.clock.sleep_until(self.story.due(fecha) + READ_AFTER).await;
            self.read_windows(fecha)?;
        }
        std::future::pending().await
    }

    /// Reads what was emitted since the last time; windows that begin before `settled` do not change any more.
    fn read_windows(&self, settled: NaiveDate) -> Result<(), Failure> {
        let mut seen = self.seen();
        for partition in 0..self.config.merge_partitions {
            let at = TopicPartition { topic: self.config.topics.metrics.clone(), partition };
            loop {
                let offset = seen.read.get(&partition).copied().unwrap_or(0);
                let fetch = Request::Fetch { partition: at.clone(), offset, records_max: 100_000, bytes_max: 16 << 20 };
                let fetched = match self.broker.peek(fetch).map_err(|refusal| refusal.what)? {
                    Response::Fetched(fetched) => fetched,
                    other => return Err(format!("read {} {partition}: found {other:?}", at.topic).into()),
                };
                for record in &fetched.records {
                    let value = record.value.as_ref().ok_or("a row of a window has no value")?;
                    let row = wire::decode(&value.0)?;
                    seen.rows += 1;
                    if row.key.kind == "region_5m" {
                        continue;
                    }
                    let known = seen.newest.entry(row.key).or_insert((-1, Totals::default()));
                    if row.revision > known.0 {
                        *known = (row.revision, row.totals);
                    }
                }
                seen.read.insert(partition, fetched.next_offset);
                if fetched.next_offset <= offset || fetched.next_offset >= fetched.end_offset {
                    break;
                }
            }
        }
        let settled_ms = settled.and_time(NaiveTime::MIN).and_utc().timestamp_millis();
        let Seen { newest, shown, shown_by_page, .. } = &mut *seen;
        newest.retain(|key, (_, totals)| {
            let stays = key.start_ms >= settled_ms;
            if !stays {
                let into = if key.page.is_some() { &mut *shown_by_page } else { &mut *shown };
                add(into, key.start_ms, &key.region, totals);
            }
            stays
        });
        Ok(())
    }

    /// Lets the shop stop and everything that was sent be done.
    ///
    /// # Errors
    /// Those of the log.
    pub async fn close(&self) -> Result<(), PortError> {
        self.is_closing.store(true, Ordering::SeqCst);
        let log = self.client(Role::Other);
        for _ in 0..DRAIN_TICKS {
            self.clock.sleep(self.tick()).await;
            if JobStatus::read(&self.config, &log).await?.is_caught_up() {
                self.is_drained.store(true, Ordering::SeqCst);
            }
            if self.sinks_done.load(Ordering::SeqCst) == 1 {
                break;
            }
        }
        Ok(())
    }

    /// Records of a topic.
    async fn count(&self, topic: &str) -> Result<u64, PortError> {
        let (log, mut count) = (self.client(Role::Other), 0);
        for (partition, (mut offset, end)) in existing(log.offsets(topic).await)? {
            let at = TopicPartition { topic: topic.to_owned(), partition };
            while offset < end {
                let (records, next) = log.read(&at, offset, 100_000).await?;
                count += records.len() as u64;
                offset = next.max(offset + 1);
            }
        }
        Ok(count)
    }

    /// What it came to, once everything is over.
    ///
    /// # Errors
    /// When something cannot be read.
    pub async fn outcome(&self, platform: &Platform) -> Result<Outcome, Failure> {
        self.read_windows(NaiveDate::MAX)?;
        let status = JobStatus::read(&self.config, &self.client(Role::Other)).await?;
        let aside = (self.count(&self.config.topics.late).await?, self.count(&self.config.topics.dead_letter).await?);
        let warehouse = warehouse(platform).await?;
        let reconciled = reconciled(&*platform.ports.ledger).await?;
        let seen = self.seen();
        Ok(Outcome {
            expected: seen.expected.clone(),
            shown: seen.shown.clone(),
            shown_by_page: seen.shown_by_page.clone(),
            warehouse,
            sent: seen.sent,
            fates: Fate::ALL.iter().map(|f| (*f, seen.fates.get(f).copied().unwrap_or(0))).collect(),
            counted: Fate::ALL.iter().map(|f| (*f, status.fate(*f).0)).collect(),
            aside,
            by_timing: seen.by_timing,
            rows: seen.rows,
            reconciled,
            crashes: seen.crashes,
            stops: seen.stops,
            is_drained: self.sinks_done.load(Ordering::SeqCst) == 1,
        })
    }
}

/// The days that are reconciled.
///
/// # Errors
/// Those of the ledger.
pub async fn reconciled(ledger: &dyn RunLedger) -> Result<BTreeMap<NaiveDate, Reconciled>, PortError> {
    let facts = ledger.facts(RECONCILED).await?.into_iter();
    Ok(facts.filter_map(|fact| Some((fact.name.parse().ok()?, serde_json::from_value(fact.value).ok()?))).collect())
}

/// What an analyst reads of windows of regions, newest revisions only.
async fn warehouse(platform: &Platform) -> Result<ByRegion, Failure> {
    let newest = format!(
        "SELECT window_start, region, clicks, purchases, add_to_cart, revenue, row_number() OVER \
         (PARTITION BY window_start, region ORDER BY revision DESC) AS n FROM {METRICAS} WHERE window_kind = 'region_1m'"
    );
    let sql = format!(
        "SELECT CAST(CAST(window_start AS DATE) AS VARCHAR) AS dia, region, CAST(sum(clicks) AS VARCHAR), \
         CAST(sum(purchases) AS VARCHAR), CAST(sum(add_to_cart) AS VARCHAR), \
         CAST(CAST(sum(revenue) * 100 AS BIGINT) AS VARCHAR) FROM ({newest}) AS t WHERE n = 1 \
         GROUP BY CAST(window_start AS DATE), region"
    );
    let mut out = ByRegion::new();
    for batch in platform.ports.warehouse.query(&sql, &[METRICAS]).await? {
        let columns = (0..6).map(|column| strings(&batch, column)).collect::<Result<Vec<_>, _>>()?;
        let mut columns: Vec<_> = columns.into_iter().map(Vec::into_iter).collect();
        while let Some(row) = columns.iter_mut().map(Iterator::next).collect::<Option<Vec<String>>>() {
            let number = |column: usize| row[column].parse::<i64>();
            let totals =
                Totals { clicks: number(2)?, purchases: number(3)?, add_to_cart: number(4)?, cents: number(5)?, users: 0 };
            out.insert((row[0].parse()?, row[1].clone()), totals);
        }
    }
    Ok(out)
}
