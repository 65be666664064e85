//! One run of one platform story: builds the world, lets it live, judges what came out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{Date32Type, Decimal128Type, Int64Type},
};
use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use serde_json::json;
use sha2::{Digest, Sha256};
use simulacro_core::{
    assets::{self, DailyBatch, Dimensions, LakeMaintenance, MONITOR, RECONCILIATION},
    avro::memory::MemoryRegistry,
    batch::{MART, STAGING, WAREHOUSE, strings},
    contract::Contract,
    dimensions::{from_tables::FromTables, paged::PageLimits, paged::PagedApi},
    history::{Event, HistorySink, RecordedStore, Recorder},
    models::shipped,
    orchestrator::{
        Asset, Orchestrator, OrchestratorPorts, Plan, RetryPolicy, SourcePolicy, Work,
        breaker::{self, Breaker},
    },
    platform::{Config, PIPELINE, Platform},
    ports::{
        DimensionApi, Env, Fact, Input, Lakehouse, PortError, Ports, Query, Run, RunLedger, RunState, Warehouse,
        event_log::EventLog,
    },
    slo::{
        Objective, Sample,
        samples::{LOOKS, Looks, RECONCILED, of_checks, of_monitor, of_reconciled, of_runs},
    },
};
use simulacro_lakehouse::{DeltaLakehouse, DeltaWarehouse};
use simulacro_log::{Limits, Settings};
use tokio::{sync::watch, task::LocalSet};

use super::{
    clock::{Clock, ProcessEnv, nanos},
    faults::{Faults, Mode},
    judges::{self, Evidence},
    operator,
    oracle::{Figures, Mart},
    report::{Report, Slo, StreamReport},
    scenario::PlatformScenario,
    services::{ApiLink, Source, StoreLink},
    shop::Shop,
    stream::{self, Assembly, Role, StreamStage},
};
use crate::{
    broker::SimBroker,
    defence::Defence,
    dimension_api::{DirectLink, Service, lock},
    faults::deploy::{AlteredLakehouse, Edit, Edits},
    host::Host,
    interpose,
    ledger::SimLedger,
    oracle::Sales,
    ports::{OnHost, SimMetrics, SimNotifier},
    rng::Stream,
    scenario::Verdict,
    store::{DirectStore, ObjectService, PortStore},
    world::{CONTRACT, Failure, Judgement, Line},
};

/// When the API has a new version of the products: every day at this hour.
const PRODUCTS_AT_H: u32 = 5;
/// Sales that a hot key adds to a day: a hundred times what a customer buys of a product.
const HOT_SALES: u64 = 100;
/// How often the end is looked for once the last day is due.
const LOOK: Duration = Duration::from_secs(600);
/// A process that ends with an error is started again after this.
const RESTART: Duration = Duration::from_secs(60);
/// Most customers that are read at once.
const CUSTOMERS_MAX: u64 = 5_000_000;

/// The history, without the calls that only say that time goes by; those are in a hash.
#[derive(Debug, Default)]
struct Kept {
    inner: Mutex<(Vec<Event>, Sha256, u64)>,
    /// Whether there is a stream, whose calls come by the minute.
    streams: bool,
}

impl Kept {
    /// Calls that come every few seconds and tell nothing when they succeed.
    fn is_quiet(&self, event: &Event) -> bool {
        let (component, call) = (event.component.as_str(), event.call.as_str());
        if component == "orchestrator" {
            return self.streams && event.refs["asset"] == MONITOR && matches!(event.outcome.as_str(), "ok" | "succeeded");
        }
        if event.outcome != "ok" {
            return false;
        }
        match component {
            "ledger" if matches!(call, "renew_lease" | "runs_since") => true,
            "ledger" if self.streams => {
                let is_of_looks = event.refs["pipeline"] == MONITOR || event.refs["name"] == MONITOR;
                matches!(call, "facts" | "put_quality" | "thin_quality") || is_of_looks
            }
            "event_log" | "consumer" | "producer" | "schema_registry" => self.streams,
            "notifier" => self.streams && call == "resolve",
            _ => false,
        }
    }

    /// How many calls are left out, and the hash over them.
    fn quiet(&self) -> (u64, String) {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        (inner.2, hex(&inner.1.clone().finalize()))
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl HistorySink for Kept {
    fn append(&self, event: Event) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_quiet(&event) {
            inner.1.update(format!("{} {} {}\n", event.time, event.ordinal, event.call));
            inner.2 += 1;
        } else {
            inner.0.push(event);
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What outlives the processes.
struct World {
    story: PlatformScenario,
    seed: u64,
    clock: Arc<Clock>,
    faults: Arc<Faults>,
    shop: Arc<Shop>,
    contract: Arc<Contract>,
    store: Arc<ObjectService>,
    api: Arc<Mutex<Service>>,
    ledger: SimLedger,
    pager: Arc<SimNotifier>,
    broker: Arc<SimBroker>,
    registry: Arc<MemoryRegistry>,
    stream: Option<Arc<StreamStage>>,
    history: Arc<Kept>,
    metrics: Arc<SimMetrics>,
    /// Appends in place of overwrites, of all processes.
    appends: Arc<AtomicU64>,
}

/// A process that has connected to everything.
struct Process {
    platform: Arc<Platform>,
    recorder: Recorder,
}

impl World {
    /// A process of this name. Its clock suffers the skews if it is an orchestrator's.
    fn connect(&self, name: &str, skewed: bool) -> Result<Process, Failure> {
        let log: Arc<dyn EventLog> = match &self.stream {
            Some(stream) => stream.log(Role::Other),
            None => Arc::new(self.broker.client(Settings::KAFKA)),
        };
        self.connect_by(name, skewed, &self.faults, log)
    }

    /// The same with the store's faults and the way to the broker that it is given.
    fn connect_by(&self, name: &str, skewed: bool, faults: &Arc<Faults>, log: Arc<dyn EventLog>) -> Result<Process, Failure> {
        let entropy = Stream::root(self.seed).child("process").child(name);
        let skews = skewed.then(|| self.faults.clone());
        let env: Arc<dyn Env> = Arc::new(ProcessEnv::new(self.clock.clone(), skews, name.to_owned(), entropy));
        let recorder = Recorder::new(env.clone(), self.history.clone());
        let below = StoreLink {
            inner: DirectStore(self.store.clone()),
            faults: faults.clone(),
            clock: self.clock.clone(),
            signs_skewed: skewed,
        };
        let below = Arc::new(RecordedStore { inner: Arc::new(below), recorder: recorder.clone() });
        let lakehouse = Arc::new(DeltaLakehouse::new(below));
        let warehouse: Arc<dyn Warehouse> = Arc::new(DeltaWarehouse::new(lakehouse.clone()));
        let lakehouse = self.weakened(lakehouse, &env);
        let objects = StoreLink {
            inner: PortStore::new(self.store.clone()),
            faults: faults.clone(),
            clock: self.clock.clone(),
            signs_skewed: skewed,
        };
        let tables = Arc::new(Source {
            clock: self.clock.clone(),
            faults: self.faults.clone(),
            shop: self.shop.clone(),
            contract: self.contract.clone(),
            patient: self.story.without.contains(&Defence::FailFast),
        });
        let link = DirectLink {
            service: self.api.clone(),
            env: env.clone(),
            latency: Duration::from_millis(30),
            timeout: Duration::from_secs(30),
            token: None,
        };
        let believes = self.story.without.contains(&Defence::Staleness);
        let link = ApiLink { inner: link, faults: self.faults.clone(), believes };
        let api: Arc<dyn DimensionApi> = Arc::new(PagedApi::new(link, ["productos".to_owned()], PageLimits::STANDARD));
        let dimensions =
            FromTables { tables: tables.clone(), names: vec!["clientes".into()], rest: api, rows_max: CUSTOMERS_MAX };
        let host = Arc::new(Host::new("process", None));
        let ports = Ports {
            env,
            tables,
            dimensions: Arc::new(dimensions),
            objects: Arc::new(objects),
            log,
            registry: self.registry.clone(),
            lakehouse: Arc::new(OnHost { inner: lakehouse, store: self.store.clone() }),
            warehouse: Arc::new(OnHost { inner: warehouse, store: self.store.clone() }),
            ledger: Arc::new(self.ledger.connect(host)?),
            notifier: self.pager.clone(),
            metrics: self.metrics.clone(),
            recorder: recorder.clone(),
        };
        // As the commands have it.
        let config = Config {
            source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
            retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
            alert_after_s: 60,
            startup_s: 0,
        };
        let mut contract = (*self.contract).clone();
        self.story.without.iter().for_each(|defence| defence.contract(&mut contract));
        let platform = Platform::new(config, contract, ports).with_models(&shipped()?.select(&self.story.models)?)?;
        Ok(Process { platform: Arc::new(platform), recorder })
    }

    /// The lakehouse without the defences that are off.
    fn weakened(&self, inner: Arc<dyn Lakehouse>, env: &Arc<dyn Env>) -> Arc<dyn Lakehouse> {
        let edits: Vec<Edit> = self.story.without.iter().filter_map(|defence| defence.edit()).collect();
        let appends = self.story.without.contains(&Defence::IdempotentWrites).then(|| self.appends.clone());
        if edits.is_empty() && appends.is_none() {
            return inner;
        }
        Arc::new(AlteredLakehouse { inner, env: env.clone(), edits: Arc::new(Edits::new(edits)), appends })
    }

    /// The orchestrator of production on a process of this name.
    fn orchestrator(&self, name: &str) -> Result<Orchestrator, Failure> {
        let Process { platform, recorder } = self.connect(name, true)?;
        let mut works: Vec<(Asset, Arc<dyn Work>)> = vec![
            (assets::ecommerce_batch_daily()?, Arc::new(DailyBatch { platform: platform.clone() })),
            (assets::lake_maintenance()?, Arc::new(LakeMaintenance { platform: platform.clone() })),
            (assets::api_dimensiones()?, Arc::new(Dimensions { platform: platform.clone() })),
        ];
        if let Some(stream) = &self.stream {
            let beside = Assembly::platform(self, &format!("{name}.vigia"), stream.log(Role::Other))?;
            works.extend(stream.watch(&platform, &beside)?);
        }
        let plan = Plan::new(self.story.orchestrator.clone(), works, &self.story.assets)?;
        let ports = OrchestratorPorts {
            env: platform.ports.env.clone(),
            ledger: platform.ports.ledger.clone(),
            notifier: platform.ports.notifier.clone(),
            metrics: platform.ports.metrics.clone(),
            recorder,
        };
        Ok(Orchestrator { plan, ports, holder: name.to_owned() })
    }

    /// Runs orchestrators one after the other until it is asked to stop: a deploy kills one, an error ends one.
    async fn orchestrate(&self, stop: watch::Receiver<bool>) -> Result<(), Failure> {
        // A stream begins with the first day, the orchestrator before its run.
        self.clock.sleep_until(self.story.start()).await;
        for n in 1_u32.. {
            let process = self.orchestrator(&format!("orquestador-{n}"))?;
            let deploy = self.faults.next_deploy(self.clock.now());
            let killed = async {
                match deploy {
                    Some((at, _)) => self.clock.sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let asked = {
                let mut stop = stop.clone();
                async move {
                    // The sender outlives everybody who waits.
                    let _ = stop.wait_for(|asked| *asked).await;
                }
            };
            let ended = tokio::select! { biased; () = killed => None, ended = process.run(asked) => Some(ended) };
            // A process that is gone holds nothing.
            drop(process);
            match (ended, deploy) {
                (Some(Ok(())), _) => return Ok(()),
                (Some(Err(error)), _) => {
                    let refs = json!({ "error": error.chain() });
                    self.note("orchestrator", "ended", refs);
                    self.clock.sleep(RESTART).await;
                }
                (None, Some((_, reverted))) => {
                    self.faults.strikes(Mode::BadDeploy, 1);
                    self.note("orchestrator", "killed by a deploy", json!({ "until": reverted }));
                    self.clock.sleep_until(reverted).await;
                }
                (None, None) => {}
            }
            if *stop.borrow() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn note(&self, component: &str, call: &str, refs: serde_json::Value) {
        let (time, outcome) = (self.clock.now(), "ok".to_owned());
        self.history.append(Event { time, ordinal: 0, component: component.into(), call: call.into(), outcome, refs });
    }

    /// Puts the products of each day, for ever.
    async fn products(&self) {
        let put = |fecha: NaiveDate| lock(&self.api).put(self.clock.now(), "productos", self.shop.products(fecha));
        put(self.clock.now().date_naive());
        let mut fecha = self.clock.now().date_naive();
        loop {
            if let Some(at) = fecha.and_hms_opt(PRODUCTS_AT_H, 0, 0).map(|at| at.and_utc())
                && at > self.clock.now()
            {
                self.clock.sleep_until(at).await;
                put(fecha);
            }
            fecha = fecha + chrono::Days::new(1);
        }
    }

    /// Waits until everything is over and healed, or patience is.
    async fn end(&self) -> Result<(), PortError> {
        let due = self.story.due(self.story.last());
        let patience = due + TimeDelta::hours(i64::try_from(self.story.patience_h).unwrap_or(24));
        self.clock.sleep_until(due).await;
        loop {
            let now = self.clock.now();
            let missing = operator::missing(&self.ledger, &self.story, now, self.story.fecha).await?;
            let is_calm = self.pager.open.lock().is_ok_and(|open| open.iter().all(|key| key.starts_with("schedule_missed")));
            let runs = self.ledger.runs(PIPELINE).await?;
            let published = judges::first_published(&runs).len() as u64;
            let days = stream::reconciled(&self.ledger).await?;
            let is_reconciled = self.stream.is_none() || self.story.fechas().all(|fecha| days.contains_key(&fecha));
            let is_done =
                missing.is_empty() && is_calm && published >= self.story.days && self.faults.are_over() && is_reconciled;
            if is_done || now >= patience {
                return match &self.stream {
                    Some(stream) => stream.close().await,
                    None => Ok(()),
                };
            }
            self.clock.sleep(LOOK).await;
        }
    }
}

impl Assembly for World {
    fn platform(&self, name: &str, log: Arc<dyn EventLog>) -> Result<Arc<Platform>, Failure> {
        // Nothing strikes the store here; see the stream's own page.
        let faults = Arc::new(Faults::new(self.clock.clone(), Vec::new()));
        Ok(self.connect_by(name, false, &faults, log)?.platform)
    }
    fn note(&self, component: &str, call: &str, refs: serde_json::Value) {
        Self::note(self, component, call, refs);
    }
}

/// What an analyst reads at the end.
#[derive(Debug, Default)]
struct Ending {
    mart: Mart,
    warehouse: Mart,
    hashes: BTreeMap<String, String>,
}

const COLUMNS: &str = "SELECT fecha, region, segmento_cliente, revenue_bruto, descuentos_total, revenue_neto, transacciones, \
                       usuarios_unicos FROM";

fn lines(batches: &[RecordBatch]) -> Result<Mart, PortError> {
    let mut out = Mart::new();
    for batch in batches {
        let fechas = batch.column(0).as_primitive::<Date32Type>();
        let (regions, segments) = (strings(batch, 1)?, strings(batch, 2)?);
        let cents = [3, 4, 5].map(|i| batch.column(i).as_primitive::<Decimal128Type>());
        let counts = [6, 7].map(|i| batch.column(i).as_primitive::<Int64Type>());
        for (i, (region, segment)) in regions.into_iter().zip(segments).enumerate() {
            let fecha = NaiveDate::default() + TimeDelta::days(fechas.value(i).into());
            let money = |n: usize| i64::try_from(cents[n].value(i)).unwrap_or(i64::MAX);
            let figures = Figures {
                bruto: money(0),
                descuentos: money(1),
                neto: money(2),
                transacciones: counts[0].value(i),
                usuarios: counts[1].value(i),
            };
            if out.insert((fecha, region.clone(), segment.clone()), figures).is_some() {
                return Err(PortError::permanent(format!("read the mart: found {fecha} {region} {segment} twice")));
            }
        }
    }
    Ok(out)
}

/// Sums over the segments, which depend on when the customers of a day were read.
fn by_region(mart: &Mart) -> BTreeMap<(NaiveDate, String), (i64, i64, i64, i64)> {
    let mut out: BTreeMap<_, (i64, i64, i64, i64)> = BTreeMap::new();
    for ((fecha, region, _), figures) in mart {
        let sum = out.entry((*fecha, region.clone())).or_default();
        sum.0 += figures.bruto;
        sum.1 += figures.descuentos;
        sum.2 += figures.neto;
        sum.3 += figures.transacciones;
    }
    out
}

/// Hashes are over days up to `last`: a story that is healed late has days behind it that one without its faults has not.
async fn look(platform: &Platform, last: NaiveDate) -> Result<Ending, PortError> {
    let mut ending = Ending::default();
    let Ports { lakehouse, warehouse, .. } = &platform.ports;
    let digest = |value: &dyn std::fmt::Debug| hex(&Sha256::digest(format!("{value:?}")));
    let told = |mart: &Mart| {
        let mut sums = by_region(mart);
        sums.retain(|(fecha, _), _| *fecha <= last);
        digest(&sums)
    };
    if lakehouse.exists(MART).await? {
        let query = Query { sql: format!("{COLUMNS} t"), inputs: vec![("t".into(), Input::Delta(MART.into()))] };
        ending.mart = lines(&lakehouse.query(&query).await?)?;
        ending.hashes.insert(format!("{MART} by region"), told(&ending.mart));
        ending.warehouse = lines(&warehouse.query(&format!("{COLUMNS} {WAREHOUSE}"), &[WAREHOUSE]).await?)?;
        ending.hashes.insert(format!("{WAREHOUSE} by region"), told(&ending.warehouse));
    }
    if lakehouse.exists(STAGING).await? {
        let sql = format!(
            "SELECT CAST(dia AS VARCHAR), CAST(n AS VARCHAR), CAST(pedidos AS VARCHAR), CAST(neto AS VARCHAR) FROM \
             (SELECT fecha AS dia, count(*) AS n, count(DISTINCT order_id) AS pedidos, sum(monto_neto) AS neto \
             FROM t WHERE fecha <= DATE '{last}' GROUP BY fecha) AS d"
        );
        let query = Query { sql, inputs: vec![("t".into(), Input::Delta(STAGING.into()))] };
        let mut days = BTreeSet::new();
        for batch in lakehouse.query(&query).await? {
            let columns = (0..4).map(|column| strings(&batch, column)).collect::<Result<Vec<_>, _>>()?;
            days.extend((0..batch.num_rows()).map(|row| columns.iter().map(|c| c[row].clone()).collect::<Vec<_>>()));
        }
        ending.hashes.insert(format!("{STAGING} by day"), digest(&days));
    }
    Ok(ending)
}

/// What the ledger says of the objectives, as production reads it.
async fn samples(ledger: &dyn RunLedger, story: &PlatformScenario, now: DateTime<Utc>) -> Result<Vec<Sample>, PortError> {
    let runs = ledger.runs(PIPELINE).await?;
    let mut out = of_runs(&runs, story.sla, now);
    for fecha in runs.iter().map(|run| run.fecha).collect::<BTreeSet<_>>() {
        out.extend(of_checks(fecha, story.sla, &ledger.quality(fecha).await?));
    }
    out.extend(of_reconciled(&ledger.facts(RECONCILED).await?, story.sla));
    out.extend(of_monitor(&ledger.runs(MONITOR).await?, &ledger.facts(LOOKS).await?));
    Ok(out)
}

/// Each objective over the whole story, and in the worst of its own windows.
fn objectives(story: &PlatformScenario, samples: &[Sample], end: DateTime<Utc>) -> Result<Vec<Slo>, Failure> {
    let mut out = Vec::new();
    for objective in Objective::shipped()? {
        let whole = objective.over(samples, story.start(), end);
        let windows = story.fechas().map(|fecha| objective.evaluate(samples, story.due(fecha)));
        let worst = windows.max_by_key(|status| (status.total - status.good, std::cmp::Reverse(status.to)));
        out.push(Slo::of(&whole, worst.as_ref().unwrap_or(&whole)));
    }
    Ok(out)
}

fn hot_days(story: &PlatformScenario, seed: u64) -> BTreeMap<NaiveDate, u64> {
    let hot = story.faults(seed).into_iter().filter(|f| f.mode == Mode::HotKey);
    hot.map(|f| (f.from.date_naive(), HOT_SALES)).collect()
}

/// Runs the story in this process. One process runs one story once: globals start fresh.
///
/// # Errors
/// When the world itself breaks; what the platform does wrong is in the judgement.
pub fn run(story: &PlatformScenario, seed: u64, plant: bool) -> Result<(Judgement, Vec<Event>), Failure> {
    interpose::set_seed(seed);
    interpose::start_virtual(nanos(story.begins()));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    LocalSet::new().block_on(&runtime, live(story.clone(), seed, plant))
}

async fn live(story: PlatformScenario, seed: u64, plant: bool) -> Result<(Judgement, Vec<Event>), Failure> {
    let clock = Arc::new(Clock::new(story.begins()));
    let faults = Arc::new(Faults::new(clock.clone(), story.faults(seed)));
    let env: Arc<dyn Env> =
        Arc::new(ProcessEnv::new(clock.clone(), None, "services".into(), Stream::root(seed).child("services")));
    let host = Arc::new(Host::new("services", None));
    let pager = SimNotifier { env: env.clone(), raised: Mutex::default(), open: Mutex::default(), host: host.clone() };
    let shop = Arc::new(Shop::new(story.shop.clone(), story.fecha, seed, hot_days(&story, seed)));
    let limits = if story.stream.is_some() { StreamStage::limits() } else { Limits::KAFKA };
    let broker = SimBroker::new(env, limits, Duration::from_millis(1));
    let registry = Arc::new(MemoryRegistry::default());
    let stream = match &story.stream {
        None => None,
        Some(size) => {
            let within = (clock.clone(), faults.clone(), shop.clone());
            Some(Arc::new(StreamStage::open(&story, size, seed, within, broker.clone(), &registry).await?))
        }
    };
    let world = World {
        shop,
        contract: Arc::new(Contract::parse("contracts/odcs/cdnow/ventas.yaml", CONTRACT)?),
        store: ObjectService::new(host.clone(), Vec::new()),
        api: Arc::new(Mutex::new(Service::new(None))),
        ledger: SimLedger::new(host),
        pager: Arc::new(pager),
        history: Arc::new(Kept { streams: stream.is_some(), ..Kept::default() }),
        broker,
        registry,
        stream,
        metrics: Arc::default(),
        appends: Arc::default(),
        clock,
        faults,
        story,
        seed,
    };
    let backfilled = Mutex::new(Vec::new());
    let by_hand = world.connect("operador", false)?;
    {
        let (asked, stop) = watch::channel(false);
        let ended = async {
            world.end().await?;
            asked.send_replace(true);
            Ok::<(), PortError>(())
        };
        let operating = operator::work(&world.clock, &world.story, &by_hand.platform, &world.faults, &world.pager, &backfilled);
        // Always in this order: a join that takes turns would depend on how often it is woken, and threads decide that.
        let living = futures::future::try_join(world.orchestrate(stop), async { Ok::<(), Failure>(ended.await?) });
        let streaming = async {
            match &world.stream {
                Some(stream) => stream.live(&world).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = world.products() => {}
            () = operating => {}
            streamed = streaming => streamed?,
            lived = living => drop(lived?),
        }
    }
    if plant {
        // A real clock in the history: the canary must notice.
        world.note("planted", "real_clock", json!(interpose::real_nanos()));
    }
    judgement(&world, &by_hand.platform, backfilled.into_inner().unwrap_or_else(PoisonError::into_inner)).await
}

async fn judgement(
    world: &World,
    platform: &Platform,
    mut backfilled: Vec<NaiveDate>,
) -> Result<(Judgement, Vec<Event>), Failure> {
    let World { story, shop, ledger, .. } = world;
    let end = world.clock.now();
    let samples = samples(ledger, story, end).await.map_err(|e| e.chain())?;
    let slos = objectives(story, &samples, end)?;
    let Ending { mart, warehouse, hashes } = look(platform, story.last()).await.map_err(|e| e.chain())?;
    let runs = ledger.runs(PIPELINE).await?;
    let mut others: Vec<Run> = Vec::new();
    for asset in [assets::DIMENSIONS, assets::MAINTENANCE, MONITOR, RECONCILIATION] {
        others.extend(ledger.runs(asset).await?);
    }
    let looks = ledger.facts(LOOKS).await?;
    let raised = world.pager.raised.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let open = world.pager.open.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let mut unmade = Vec::new();
    for table in shipped()?.select(&story.models)?.tables() {
        if !platform.ports.lakehouse.exists(table).await? {
            unmade.push(table.to_owned());
        }
    }
    let breakers = ledger.facts(breaker::TOPIC).await?;
    let is_open = |asset: &&String| Breaker::recall(&breakers, asset) != Breaker::Closed;
    let shut_out: Vec<String> = breakers.iter().map(|fact| &fact.name).filter(is_open).cloned().collect();
    let faults = world.faults.all();
    let published = judges::first_published(&runs);
    let late: Vec<NaiveDate> = story.fechas().filter(|f| published.get(f).is_none_or(|at| *at > story.due(*f))).collect();
    backfilled.sort_unstable();
    let stream = match &world.stream {
        Some(stage) => Some(stage.outcome(platform).await?),
        None => None,
    };
    let mut hashes = hashes;
    if let Some(stream) = &stream {
        let of_days: BTreeMap<_, _> = stream.warehouse.iter().filter(|((fecha, _), _)| *fecha <= story.last()).collect();
        hashes.insert("realtime by region".into(), hex(&Sha256::digest(format!("{of_days:?}"))));
    }
    let report = Report {
        days: story.days,
        virtual_millidays: u64::try_from((end - story.begins()).num_seconds()).unwrap_or(0) * 1_000 / 86_400,
        in_time: story.days - late.len() as u64,
        late,
        backfilled,
        slos,
        faults: judges::struck(story, &faults, &raised, &runs, &others),
        false_alerts: judges::unexplained(&raised, &faults),
        stream: stream.as_ref().map(|stream| stream_report(stream, &others, &looks)),
    };
    let evidence = Evidence {
        story,
        shop,
        runs: &runs,
        others: &others,
        mart: &mart,
        warehouse: &warehouse,
        raised: &raised,
        open: &open,
        unmade: &unmade,
        shut_out: &shut_out,
        faults: &faults,
        report: &report,
        stream: stream.as_ref(),
    };
    let broken = judges::judge(&evidence);
    let mut problems = Vec::new();
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
    let expected = judges::expected(shop, &runs);
    let (number, quiet) = world.history.quiet();
    world.note("history", "left_out", json!({ "calls": number, "sha256": quiet }));
    let hits: Vec<u64> = faults.iter().map(|f| f.hits).collect();
    let verdict = match (fired(story, &faults), problems.is_empty()) {
        (_, false) => "violated",
        (false, true) => "inconclusive",
        (true, true) => "holds",
    };
    let judgement = Judgement {
        verdict: verdict.into(),
        problems,
        broken: broken.iter().map(|(name, text)| format!("{name}: {text}")).collect(),
        expected: regions(&expected),
        mart: regions(&mart),
        attempts: Vec::new(),
        alerts: raised.iter().map(|(at, a)| format!("{} {}", at.format("%Y-%m-%d %H:%M:%S"), a.kind)).collect(),
        published,
        hits,
        hashes,
        store_digest: world.store.digest(),
        store_calls: world.store.calls(),
        draws: interpose::draws(),
        stream: None,
        platform: Some(report),
        incident: None,
        without: None,
        recovered: Vec::new(),
    };
    Ok((judgement, world.history.take()))
}

fn stream_report(stream: &stream::Outcome, others: &[Run], folded: &[Fact]) -> StreamReport {
    let of_day = |fact: &Fact| Looks::read(fact).ok()?.by_hour.values().filter_map(|lags| lags.keys().max().copied()).max();
    let folded_ms = folded.iter().filter_map(of_day).max().unwrap_or(0) * 1_000;
    let looks = || others.iter().filter(|run| run.pipeline == MONITOR);
    let reconciled = || stream.reconciled.values();
    StreamReport {
        events: stream.sent,
        fates: stream.counted.clone(),
        by_timing: stream.by_timing,
        rows: stream.rows,
        lag_max_ms: looks().filter_map(|run| run.report["lag_ms"].as_u64()).max().unwrap_or(0).max(folded_ms),
        held: looks().filter(|run| run.state == RunState::Held).count() as u64,
        reconciled: reconciled().count() as u64,
        differing: reconciled().filter(|r| r.batch != r.stream).count() as u64,
        unexplained_cents: reconciled().filter_map(|r| r.unexplained).sum(),
        crashes: stream.crashes,
        stops: stream.stops,
    }
}

/// Whether each named fault has struck often enough, and of the drawn ones each mode.
fn fired(story: &PlatformScenario, faults: &[super::faults::Suffered]) -> bool {
    let least = story.expect.fired_min;
    let named = story.fault.iter().all(|f| faults.iter().any(|s| s.fault == *f && s.hits >= least));
    let modes: BTreeSet<Mode> = faults.iter().map(|s| s.fault.mode).collect();
    named && modes.iter().all(|mode| faults.iter().filter(|s| s.fault.mode == *mode).map(|s| s.hits).sum::<u64>() >= least)
}

fn regions(mart: &Mart) -> Vec<Line> {
    let lines = by_region(mart).into_iter();
    lines
        .map(|((fecha, region), (_, _, neto, transacciones))| Line {
            fecha,
            region,
            // Customers are not added up over segments.
            sales: Sales { revenue_cents: neto, transacciones, usuarios_unicos: 0 },
        })
        .collect()
}
