//! One run of one scenario: builds the world, steps it, judges what came out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{Date32Type, Decimal128Type, Int64Type},
};
use chrono::{DateTime, Days, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use simulacro_core::{
    avro::memory::MemoryRegistry,
    batch::{DayError, MART, QUARANTINE, STAGING, WAREHOUSE, canonical_hash, strings},
    contract::Contract,
    dimensions::paged::{PageLimits, PagedApi},
    history::{Event, RecordedStore, Recorder},
    models,
    platform::{DayOutcome, Platform},
    ports::{
        Alert, DimensionApi, Disposition, Input, Lakehouse, Mark, NoDimensions, PortError, Ports, Query, Restore, RunState,
        Warehouse,
    },
    restore::{self, Request, Way},
};
use simulacro_lakehouse::{DeltaLakehouse, DeltaWarehouse};
use simulacro_log::{Limits, Settings};
use simulacro_shop::cdnow;

use crate::{
    broker::SimBroker,
    defence::Defence,
    dimension_api::{DirectLink, Service},
    faults::{
        Fault, StoreFault, Strikes,
        clock::{STORE_ALLOWS_S, SkewedEnv},
        data::{self, Spoiled},
        deploy::{AlteredLakehouse, DeployFault, Edits, UNKNOWN_FEATURE},
        dimensions::{ApiState, FaultyLink},
        service::{FaultyLedger, FaultyWarehouse, ServiceState},
        source::{SourceFault, SourceState},
    },
    host::Host,
    interpose,
    invariants::{self, Evidence},
    ledger::SimLedger,
    oracle::{self, Sales},
    ports::{OnHost, Row, SimEnv, SimHistory, SimMetrics, SimNotifier},
    postgres::{DEADLINE, Postgres, SimSource, serve},
    rng::Stream,
    scenario::{Act, Scenario, Verdict},
    store::{DirectStore, ObjectService, PortStore, SimVersions},
    stream::world::Figures,
};

/// The contract of the sales.
pub(crate) const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");

/// The contract of the sales of the reference platform, for days of its size.
const REFERENCE: &str = include_str!("../../contracts/odcs/ventas.yaml");

/// Table of the features that a model learns from.
const FEATURES: &str = "marts/user_features";

/// Refusals of a password or a grant that are no lock-out storm.
const LOGINS_MAX: u64 = 2;
/// Refusals of a token of the store: the call in which it ran out, the clearing up after it, and the look at the log that
/// tells whether a write took place.
const TOKEN_REFUSALS_MAX: u64 = 4;

/// A run that has not ended this long after its last day was due will never end.
const PATIENCE: Days = Days::new(2);

/// What a run came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// `holds`, `violated` or `inconclusive`.
    pub verdict: String,
    /// One line for each invariant that is broken, and for each expectation that was missed.
    pub problems: Vec<String>,
    /// One line for each invariant that is broken, with its name first; a `caught` scenario wants some.
    pub broken: Vec<String>,
    /// What the mart must show, by day and region, as the oracle says.
    pub expected: Vec<Line>,
    /// What the mart shows.
    pub mart: Vec<Line>,
    /// Tries to reach the source.
    pub attempts: Vec<String>,
    /// Alerts with their virtual time.
    pub alerts: Vec<String>,
    /// When each day was first published, if it was.
    pub published: BTreeMap<NaiveDate, DateTime<Utc>>,
    /// How often each fault struck, in the scenario's order.
    pub hits: Vec<u64>,
    /// Canonical hash of each table that exists.
    pub hashes: BTreeMap<String, String>,
    /// Hash over every object of the store.
    pub store_digest: String,
    /// Calls to the store.
    pub store_calls: u64,
    /// Draws from the seeded stream of entropy.
    pub draws: u64,
    /// Figures of a stream story.
    #[serde(default)]
    pub stream: Option<Figures>,
    /// What a platform story came to.
    #[serde(default)]
    pub platform: Option<crate::platform::Report>,
    /// How what went wrong was noticed and what it did; `None` when nothing showed, or in a story without an account of it.
    #[serde(default)]
    pub incident: Option<Incident>,
    /// The same without the defences that the story names for comparison.
    #[serde(default)]
    pub without: Option<Box<Incident>>,
    /// Restores with their ways, RPO and RTO.
    #[serde(default)]
    pub recovered: Vec<String>,
}

/// What a restore came to.
#[derive(Debug, Clone)]
struct Recovered {
    at: DateTime<Utc>,
    target: String,
    ways: Vec<Way>,
    /// Days and rows that are lost for good.
    lost: (usize, u64),
    rto_millis: u64,
}

impl Recovered {
    fn of(at: DateTime<Utc>, report: &restore::Report) -> Self {
        let days: BTreeSet<&NaiveDate> = report.lost.values().flat_map(BTreeMap::keys).collect();
        let lost = (days.len(), report.lost.values().flat_map(BTreeMap::values).sum());
        let ways = report.steps.iter().map(|step| step.way).collect();
        Self { at, target: report.target.clone(), ways, lost, rto_millis: report.rto_millis }
    }

    fn line(&self) -> String {
        let ways = self.ways.iter().map(|way| way.as_str()).collect::<Vec<_>>().join(", ");
        let (at, (days, rows), millis) = (self.at.format("%m-%d %H:%M:%S"), self.lost, self.rto_millis);
        let seconds = format!("{}.{:03}", millis / 1_000, millis % 1_000);
        format!("{at} {} by [{ways}]: RPO {days} days, {rows} rows; RTO {seconds} s", self.target)
    }
}

/// How what went wrong was noticed, and what it did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incident {
    /// The first effect that anybody could see.
    pub effect_at: DateTime<Utc>,
    /// The first alert after it, or when people noticed.
    pub detected_at: Option<DateTime<Utc>>,
    /// The kind of that alert, or `people`.
    pub detected_by: Option<String>,
    /// When the last run ended that published a day; `None` while what is shown is wrong, or a day is missing.
    pub resolved_at: Option<DateTime<Utc>>,
    /// Rows by which the warehouse differs from what is right.
    pub wrong_rows: u64,
    /// Cents by which it does.
    pub wrong_cents: u64,
    /// Customers of whom the features say nothing where they should, so that what is recommended to them is random.
    pub customers: u64,
    /// From what began it to when people knew the cause, in seconds; `None` when an alert told.
    pub cause_after_s: Option<i64>,
    /// Most records that the job of a stream was behind; `None` of a batch.
    #[serde(default)]
    pub behind: Option<u64>,
}

impl Incident {
    /// One line for people.
    pub fn line(&self) -> String {
        let since = |at: Option<DateTime<Utc>>| match at {
            Some(at) => {
                let seconds = (at - self.effect_at).num_seconds();
                format!("after {} h {:02} min {:02} s", seconds / 3_600, seconds / 60 % 60, seconds % 60)
            }
            None => "never".to_owned(),
        };
        let hours = |s: i64| format!("; the cause was known {} h {:02} min after it began", s / 3_600, s / 60 % 60);
        let cause = self.cause_after_s.map(hours).unwrap_or_default();
        let by = self.detected_by.as_ref().map(|b| format!(" by {b}")).unwrap_or_default();
        let did = match self.behind {
            Some(records) => format!("behind by up to {records} records"),
            None => format!(
                "shown wrong: {} rows, {}.{:02} euros, {} customers",
                self.wrong_rows,
                self.wrong_cents / 100,
                self.wrong_cents % 100,
                self.customers
            ),
        };
        format!(
            "effect {}, detected {}{by}, resolved {}; {did}{cause}",
            self.effect_at.format("%m-%d %H:%M:%S"),
            since(self.detected_at),
            since(self.resolved_at),
        )
    }
}

/// One line of the mart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Day.
    pub fecha: NaiveDate,
    /// Region.
    pub region: String,
    /// Figures.
    pub sales: Sales,
}

fn lines(mart: &Mart) -> Vec<Line> {
    mart.iter().map(|((fecha, region), sales)| Line { fecha: *fecha, region: region.clone(), sales: sales.clone() }).collect()
}

/// What breaks the world itself.
pub type Failure = Box<dyn std::error::Error>;
type Mart = BTreeMap<(NaiveDate, String), Sales>;

/// What the worker leaves behind when the story is over.
#[derive(Debug, Default)]
struct Ending {
    hashes: BTreeMap<String, String>,
    mart: Mart,
    warehouse: Mart,
    /// Rows and cents of staging by day; `None` where it cannot be read.
    staged: Option<BTreeMap<NaiveDate, (i64, i64)>>,
    customers: u64,
}

/// The rows of the shop before any fault.
fn shop_rows(scenario: &Scenario) -> Result<Vec<Row>, Failure> {
    let row = |p: cdnow::Purchase, fecha| {
        let region = Some(p.region.to_owned());
        let (order_id, user_id, product_id) = (p.order_id, p.user_id, p.product_id);
        Row { order_id, user_id, product_id, monto_cents: p.monto_cents, region, fecha }
    };
    let mut purchases = cdnow::parse(cdnow::BYTES)?;
    let rows: Vec<Row> = match scenario.rows_per_day {
        None => {
            let shifted: BTreeMap<NaiveDate, NaiveDate> =
                (0..scenario.days).map(|n| (scenario.purchases_from + Days::new(n), scenario.fecha + Days::new(n))).collect();
            purchases.into_iter().filter_map(|p| Some((*shifted.get(&p.fecha)?, p))).map(|(fecha, p)| row(p, fecha)).collect()
        }
        Some(each) => {
            purchases.retain(|p| p.fecha >= scenario.purchases_from && p.monto_cents > 0);
            purchases.sort_by_key(|p| p.fecha);
            let days = purchases.chunks_exact(each).zip(scenario.fechas());
            days.flat_map(|(chunk, fecha)| chunk.iter().map(move |p| row(p.clone(), fecha))).collect()
        }
    };
    let found: BTreeSet<NaiveDate> = rows.iter().map(|r| r.fecha).collect();
    if found.len() as u64 != scenario.days {
        let first = scenario.purchases_from;
        return Err(format!(
            "purchases_from {first}: found {} days of purchases, expected {}, all between 1997-01-01 and 1998-06-30",
            found.len(),
            scenario.days
        )
        .into());
    }
    Ok(rows)
}

/// The products of some rows, as the API has them.
fn products(rows: &[Row]) -> Vec<Map<String, Value>> {
    let ids: BTreeSet<&str> = rows.iter().map(|r| r.product_id.as_str()).collect();
    let product = |(n, id): (usize, &str)| {
        let (categoria, marca) = (["libros", "cine", "musica"][n % 3], format!("m-{}", n % 7));
        let precio = format!("{}.{:02}", 5 + n % 40, n % 100);
        json!({ "product_id": id, "categoria": categoria, "marca": marca, "precio": precio, "inventario": n })
    };
    ids.into_iter().enumerate().map(product).filter_map(|value| value.as_object().cloned()).collect()
}

/// Runs the scenario in this process. One process runs one scenario once: globals start fresh.
///
/// # Errors
/// When the world itself breaks; what the platform does wrong is in the judgement.
pub fn run(scenario: &Scenario, seed: u64, plant: bool) -> Result<(Judgement, Vec<Event>), Failure> {
    let first = scenario.scheduled(scenario.fecha);
    let start = first - chrono::Duration::minutes(1);
    let nanos = |t: DateTime<Utc>| t.timestamp_nanos_opt().unwrap_or_default() as u64;
    interpose::set_seed(seed);
    interpose::start_virtual(nanos(start));

    let (name, text) = match scenario.rows_per_day {
        None => ("contracts/odcs/cdnow/ventas.yaml", CONTRACT),
        Some(_) => ("contracts/odcs/ventas.yaml", REFERENCE),
    };
    let whole = Contract::parse(name, text)?;
    let shop = shop_rows(scenario)?;
    let spoiled = data::spoil(&scenario.fault, &whole, &shop);
    let (mut contract, without) = (whole, &scenario.without);
    for defence in without {
        defence.contract(&mut contract);
    }
    let mut project = models::shipped()?.select(&[&["metricas_diarias".to_owned()], &scenario.models[..]].concat().join(","))?;
    if without.contains(&Defence::ModelTests) {
        project = project.without_tests();
    }

    let faults = Struck::new(&scenario.fault);
    let host = Arc::new(Host::new("worker", faults.dies_at.iter().copied()));
    let service = ObjectService::new(host.clone(), faults.store.clone());
    if without.contains(&Defence::Deadlines) {
        service.be_patient();
    }
    let clock = Arc::new(SimEnv { start, ids: AtomicU64::new(1), jitter: Mutex::new(Stream::root(seed).child("jitter")) });
    let env = Arc::new(SkewedEnv::new(clock.clone(), faults.skews.clone()));
    let history = Arc::new(SimHistory::default());
    let recorder = Recorder::new(clock.clone(), history.clone());
    let source = Arc::new(SimSource {
        deadline: (!without.contains(&Defence::Deadlines)).then_some(DEADLINE),
        patient: without.contains(&Defence::FailFast),
        trusting: without.contains(&Defence::RowCount),
        ..SimSource::new("postgres")
    });
    let notifier =
        Arc::new(SimNotifier { env: clock.clone(), raised: Mutex::default(), open: Mutex::default(), host: host.clone() });
    let ledger = Arc::new(SimLedger::new(host.clone()));
    let services = Arc::new(ServiceState::new(faults.service.clone(), clock.clone()));
    let sabotage = without.iter().filter_map(|d| d.edit());
    let edits = Arc::new(Edits::new(faults.edits.iter().cloned().chain(sabotage).collect()));
    let appends = without.contains(&Defence::IdempotentWrites).then(|| Arc::new(AtomicU64::new(0)));
    let api = Arc::new(ApiState::new(faults.api.clone()));
    let mut catalogue = Service::new(None);
    catalogue.put(start, "productos", products(&shop));
    let catalogue = Arc::new(Mutex::new(catalogue));

    // This world does not stream, that of `crate::stream` does; log and registry are there because every assembly has them.
    let broker = SimBroker::new(clock.clone(), Limits::KAFKA, Duration::from_millis(1));
    let metrics = Arc::new(SimMetrics::default());
    // A started process knows nothing: it connects to the services anew.
    let connect = {
        let metrics = metrics.clone();
        let (env, source, notifier, ledger) = (env.clone(), source.clone(), notifier.clone(), ledger.clone());
        let (service, recorder, clock, edits) = (service.clone(), recorder.clone(), clock.clone(), edits.clone());
        let (services, api) = (services.clone(), api.clone());
        let (has_products, believes) = (scenario.products.is_some(), without.contains(&Defence::Staleness));
        move || -> Ports {
            let below = Arc::new(RecordedStore { inner: Arc::new(DirectStore(service.clone())), recorder: recorder.clone() });
            let lakehouse = Arc::new(DeltaLakehouse::new(below));
            let warehouse: Arc<dyn Warehouse> = Arc::new(DeltaWarehouse::new(lakehouse.clone()));
            let warehouse = Arc::new(OnHost { inner: warehouse, store: service.clone() });
            let lakehouse: Arc<dyn Lakehouse> = lakehouse;
            let lakehouse = Arc::new(OnHost { inner: lakehouse, store: service.clone() });
            let (inner, edits, appends) = (lakehouse, edits.clone(), appends.clone());
            let lakehouse = Arc::new(AlteredLakehouse { inner, env: clock.clone(), edits, appends });
            let link = || FaultyLink {
                inner: DirectLink {
                    service: catalogue.clone(),
                    env: clock.clone(),
                    latency: Duration::from_millis(20),
                    timeout: DEADLINE,
                    token: None,
                },
                state: api.clone(),
                env: clock.clone(),
                believes,
            };
            let dimensions: Arc<dyn DimensionApi> = if has_products {
                Arc::new(PagedApi::new(link(), ["productos".to_owned()], PageLimits::STANDARD))
            } else {
                Arc::new(NoDimensions)
            };
            Ports {
                env: env.clone(),
                tables: source.clone(),
                dimensions,
                objects: Arc::new(PortStore::new(service.clone())),
                log: Arc::new(broker.client(Settings::KAFKA)),
                registry: Arc::new(MemoryRegistry::default()),
                lakehouse,
                warehouse: Arc::new(FaultyWarehouse { inner: warehouse, state: services.clone(), deadline: DEADLINE }),
                ledger: Arc::new(FaultyLedger { inner: ledger.clone(), state: services.clone() }),
                notifier: notifier.clone(),
                metrics: metrics.clone(),
                recorder: recorder.clone(),
            }
        }
    };

    let mut sim = turmoil::Builder::new()
        .epoch(start.into())
        .rng_seed(seed)
        .tick_duration(Duration::from_millis(scenario.tick_ms))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(scenario.tick_ms.max(2)))
        .simulation_duration(Duration::from_secs(86_400 * (scenario.days + 2)))
        .build();
    let state = SourceState::new(faults.source.clone(), faults.down.clone());
    let postgres = Arc::new(Postgres::new(spoiled.eras.clone(), state));
    sim.host("postgres", {
        let server = postgres.clone();
        move || {
            let server = server.clone();
            async move { Ok(serve(server, start).await?) }
        }
    });
    let outcomes: Arc<Mutex<Vec<DayOutcome>>> = Arc::default();
    let lost: Arc<Mutex<Vec<(NaiveDate, String)>>> = Arc::default();
    let recovered: Arc<Mutex<Vec<Recovered>>> = Arc::default();
    let gauged: Arc<Mutex<Vec<Option<f64>>>> = Arc::default();
    let ending: Arc<Mutex<Option<Ending>>> = Arc::default();
    {
        let (outcomes, ending, story) = (outcomes.clone(), ending.clone(), scenario.clone());
        let (recovered, versions) = (recovered.clone(), Arc::new(SimVersions(service.clone())));
        let (gauged, metrics) = (gauged.clone(), metrics.clone());
        let (lost, done, starts) = (lost.clone(), Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let (crashes, process) = (faults.crashes_at_start, host.clone());
        sim.host(host.name, move || {
            let mut platform = Platform::new(story.config.clone(), contract.clone(), connect());
            platform.models = Some(project.clone());
            let (outcomes, ending, story) = (outcomes.clone(), ending.clone(), story.clone());
            let (lost, done, process) = (lost.clone(), done.clone(), process.clone());
            let (recovered, versions) = (recovered.clone(), versions.clone());
            let (gauged, metrics) = (gauged.clone(), metrics.clone());
            let start = starts.fetch_add(1, Ordering::SeqCst);
            async move {
                if start < crashes {
                    process.die();
                    process.only_alive().await;
                }
                work(&platform, &story, &Done { outcomes, gauged, metrics, lost, recovered, versions, steps: done }).await?;
                // An analyst who meets a fault looks again; a fault that does not heal ends the patience of the driver.
                let end = loop {
                    match look(&platform).await {
                        Ok(end) => break end,
                        Err(_) => platform.ports.env.sleep(Duration::from_secs(60)).await,
                    }
                };
                if plant {
                    // A real clock in the history: the canary must notice.
                    let real = interpose::real_nanos().to_string();
                    platform.ports.recorder.record("planted", "real_clock", real, serde_json::Value::Null);
                }
                if let Ok(mut slot) = ending.lock() {
                    *slot = Some(end);
                }
                std::future::pending::<()>().await;
                Ok(())
            }
        });
    }

    let last = scenario.fechas().last().map_or(first, |f| scenario.sla(*f)) + PATIENCE;
    let mut back_at: Option<Duration> = None;
    let mut meddled: Vec<(DeployFault, Option<String>, Strikes)> = faults.meddling.clone();
    loop {
        sim.step().map_err(|e| format!("the simulation stopped: {e}"))?;
        interpose::set_virtual(nanos(start + sim.elapsed()));
        service.remove_due(start + sim.elapsed());
        if ending.lock().map_err(|_| "the worker panicked")?.is_some() || start + sim.elapsed() > last {
            break;
        }
        for (fault, entry, strikes) in &mut meddled {
            let DeployFault::UnknownFeature { table, from, to } = fault else { continue };
            let now = start + sim.elapsed();
            if now >= *from && now < *to && strikes.hits == 0 {
                *entry = service.meddle(table, UNKNOWN_FEATURE);
                if entry.is_some() {
                    strikes.strike(now);
                }
            }
            if now >= *to
                && let Some(entry) = entry.take()
            {
                service.take_away(&entry);
            }
        }
        match back_at {
            None if host.is_dead() => {
                sim.crash(host.name);
                ledger.client_died(start + sim.elapsed());
                back_at = Some(sim.elapsed() + faults.down_for);
            }
            Some(at) if sim.elapsed() >= at => {
                host.revive();
                sim.bounce(host.name);
                back_at = None;
            }
            _ => {}
        }
    }
    let Ending { hashes, mart, warehouse, staged, customers } =
        ending.lock().map_err(|_| "the worker panicked")?.take().unwrap_or_default();
    let outcomes = std::mem::take(&mut *outcomes.lock().map_err(|_| "the worker panicked")?);

    let strikes = faults.gather(
        &scenario.fault,
        &Gathered {
            spoiled: &spoiled,
            seen: postgres.seen(),
            refused: Strikes {
                hits: source.refused.load(Ordering::SeqCst),
                first: match source.refused_first.load(Ordering::SeqCst) {
                    0 => None,
                    seconds => DateTime::from_timestamp(seconds.cast_signed(), 0),
                },
            },
            deaths: Strikes { hits: host.deaths(), first: None },
            source: postgres.strikes(),
            store: service.strikes(),
            service: services.strikes(),
            api: api.strikes(),
            edits: edits.strikes(),
            meddling: meddled.iter().map(|(_, _, strikes)| *strikes).collect(),
            skews: env.strikes(),
        },
    );
    let hits: Vec<u64> = strikes.iter().map(|s| s.hits).collect();
    let refusals: Vec<(String, u64, u64)> = scenario.fault.iter().zip(&hits).filter_map(|(f, n)| limited(f, *n)).collect();
    let expected = expected(scenario, &spoiled, &outcomes);
    let raised = notifier.raised.lock().map_err(|_| "the pager panicked")?.clone();
    let leftovers = leftovers(&service.paths());
    let evidence = Evidence {
        scenario,
        outcomes: &outcomes,
        mart: &mart,
        warehouse: &warehouse,
        staged: staged.as_ref(),
        expected: &expected,
        eras: &spoiled.eras,
        leftovers: &leftovers,
        refusals: &refusals,
        answered: &api.answered(),
        gauged: &gauged.lock().map_err(|_| "the worker panicked")?.clone(),
    };
    let broken = invariants::judge(&evidence);
    let recovered = recovered.lock().map_err(|_| "the worker panicked")?.clone();
    let recovered_at = recovered.iter().filter(|r| r.lost.0 == 0 && !r.ways.is_empty()).map(|r| r.at).max();
    let incident = incident(&evidence, &strikes, &raised, customers, recovered_at);
    let mut problems = problems(&evidence, &broken, &raised, incident.as_ref());
    let by: Vec<&str> = recovered.iter().flat_map(|r| &r.ways).map(|way| way.as_str()).collect();
    // Without its faults a story has nothing to bring back.
    if let Some(wanted) = scenario.expect.recovered_by.as_ref().filter(|_| !scenario.fault.is_empty())
        && by != *wanted
    {
        problems.push(format!("recovered by: found {by:?}, expected {wanted:?}"));
    }
    if scenario.expect.verdict == Verdict::Holds {
        let lost = lost.lock().map_err(|_| "the worker panicked")?;
        let missing = lost.iter().filter(|(fecha, _)| !was_published(&outcomes, *fecha));
        problems.extend(missing.map(|(fecha, error)| format!("run of {fecha} could not be kept: {error}")));
    }
    // A defence whose text no statement had was never away.
    let sabotaged = edits.strikes().into_iter().skip(faults.edits.len()).all(|s| s.hits > 0);
    let fired = sabotaged && hits.iter().all(|h| *h >= scenario.expect.fired_min);
    let mut published: BTreeMap<NaiveDate, DateTime<Utc>> = BTreeMap::new();
    for outcome in outcomes.iter().filter(|o| o.result.is_ok()) {
        if let Some(at) = outcome.run.finished_at {
            published.entry(outcome.run.fecha).or_insert(at);
        }
    }
    let judgement = Judgement {
        verdict: if !fired {
            "inconclusive"
        } else if problems.is_empty() {
            "holds"
        } else {
            "violated"
        }
        .into(),
        problems,
        broken: broken.iter().map(|(name, text)| format!("{name}: {text}")).collect(),
        expected: lines(&expected),
        mart: lines(&mart),
        attempts: attempts(&outcomes),
        alerts: raised.iter().map(|(at, a)| format!("{} {}", at.format("%m-%d %H:%M:%S"), a.kind)).collect(),
        published,
        hits,
        hashes,
        store_digest: service.digest(),
        store_calls: service.calls(),
        draws: interpose::draws(),
        stream: None,
        platform: None,
        incident,
        without: None,
        recovered: recovered.iter().map(Recovered::line).collect(),
    };
    let events = history.events.lock().map_err(|_| "the history panicked")?.clone();
    Ok((judgement, events))
}

fn attempts(outcomes: &[DayOutcome]) -> Vec<String> {
    let all = outcomes.iter().flat_map(|o| &o.attempts);
    all.map(|a| format!("{} {}", a.at.format("%H:%M:%S"), a.outcome)).collect()
}

fn was_published(outcomes: &[DayOutcome], fecha: NaiveDate) -> bool {
    outcomes.iter().any(|o| o.run.fecha == fecha && o.run.state == RunState::Succeeded)
}

/// What each service is told of the faults, and how their hits come back in the scenario's order.
struct Struck {
    dies_at: Vec<u64>,
    down_for: Duration,
    crashes_at_start: u64,
    down: Vec<(DateTime<Utc>, DateTime<Utc>)>,
    source: Vec<SourceFault>,
    store: Vec<StoreFault>,
    service: Vec<crate::faults::service::ServiceFault>,
    api: Vec<crate::faults::dimensions::Window>,
    edits: Vec<crate::faults::deploy::Edit>,
    meddling: Vec<(DeployFault, Option<String>, Strikes)>,
    skews: Vec<crate::faults::clock::Skew>,
}

/// What each service says that the faults have done.
struct Gathered<'a> {
    spoiled: &'a Spoiled,
    seen: BTreeMap<usize, DateTime<Utc>>,
    refused: Strikes,
    deaths: Strikes,
    source: Vec<Strikes>,
    store: Vec<Strikes>,
    service: Vec<Strikes>,
    api: Vec<Strikes>,
    edits: Vec<Strikes>,
    meddling: Vec<Strikes>,
    skews: Vec<Strikes>,
}

/// Whether the store refuses the requests of a clock that is wrong by so many seconds.
fn too_skewed(by_s: i64) -> bool {
    by_s.unsigned_abs() > STORE_ALLOWS_S
}

impl Struck {
    fn new(faults: &[Fault]) -> Self {
        let mut out = Self {
            dies_at: Vec::new(),
            down_for: Duration::ZERO,
            crashes_at_start: 0,
            down: Vec::new(),
            source: Vec::new(),
            store: Vec::new(),
            service: Vec::new(),
            api: Vec::new(),
            edits: Vec::new(),
            meddling: Vec::new(),
            skews: Vec::new(),
        };
        for fault in faults {
            match fault {
                Fault::SourceUnavailable { from, to } => out.down.push((*from, *to)),
                Fault::Store(fault) => out.store.push(fault.clone()),
                Fault::WorkerCrash { at_calls, down_s } => {
                    out.dies_at.extend(at_calls);
                    out.down_for = out.down_for.max(Duration::from_secs(*down_s));
                }
                Fault::Source(fault) => out.source.push(fault.clone()),
                Fault::DimensionApi { from, to, fault } => out.api.push((*from, *to, fault.clone())),
                Fault::Service(fault) => out.service.push(fault.clone()),
                Fault::Deploy(DeployFault::CrashesAtStart { starts, down_s }) => {
                    out.crashes_at_start += starts;
                    out.down_for = out.down_for.max(Duration::from_secs((*down_s).into()));
                }
                Fault::Deploy(fault @ DeployFault::UnknownFeature { .. }) => {
                    out.meddling.push((fault.clone(), None, Strikes::default()));
                }
                Fault::Deploy(fault @ DeployFault::Rounds { .. }) => out.edits.extend(fault.edit()),
                Fault::Clock { from, to, by_s } => {
                    out.skews.push((*from, *to, *by_s));
                    if too_skewed(*by_s) {
                        out.store.push(StoreFault::TooSkewed { from: *from, to: *to });
                    }
                }
                Fault::NullRegion { .. } | Fault::RenamedColumn { .. } | Fault::DuplicatedRows { .. } | Fault::Data(_) => {}
            }
        }
        out
    }

    fn gather(&self, faults: &[Fault], all: &Gathered<'_>) -> Vec<Strikes> {
        let (mut source, mut store, mut service) = (all.source.iter(), all.store.iter(), all.service.iter());
        let (mut api, mut edits, mut meddling) = (all.api.iter(), all.edits.iter(), all.meddling.iter());
        let mut skews = all.skews.iter();
        let mut next = |fault: (usize, &Fault)| match fault.1 {
            Fault::SourceUnavailable { .. } => Some(all.refused),
            Fault::WorkerCrash { .. } | Fault::Deploy(DeployFault::CrashesAtStart { .. }) => Some(all.deaths),
            Fault::Store(_) => store.next().copied(),
            Fault::Source(_) => source.next().copied(),
            Fault::DimensionApi { .. } => api.next().copied(),
            Fault::Service(_) => service.next().copied(),
            Fault::Deploy(DeployFault::Rounds { .. }) => edits.next().copied(),
            Fault::Deploy(DeployFault::UnknownFeature { .. }) => meddling.next().copied(),
            Fault::Clock { by_s, .. } => {
                let refused = if too_skewed(*by_s) { store.next() } else { None };
                // The process that sees a wrong time harms nobody by it; what the store refuses does.
                refused.or_else(|| skews.next()).copied()
            }
            Fault::NullRegion { .. } | Fault::RenamedColumn { .. } | Fault::DuplicatedRows { .. } | Fault::Data(_) => {
                Some(Strikes { hits: all.spoiled.hits[fault.0], first: all.seen.get(&fault.0).copied() })
            }
        };
        faults.iter().enumerate().map(|fault| next(fault).unwrap_or_default()).collect()
    }
}

/// How often a refusal of credentials may be met, where a fault is one.
fn limited(fault: &Fault, hits: u64) -> Option<(String, u64, u64)> {
    match fault {
        Fault::Source(SourceFault::PasswordExpired { .. }) => Some(("password of the source".into(), hits, LOGINS_MAX)),
        Fault::Source(SourceFault::GrantRevoked { .. }) => Some(("grant at the source".into(), hits, LOGINS_MAX)),
        Fault::Store(StoreFault::TokenExpired { .. }) => Some(("token of the store".into(), hits, TOKEN_REFUSALS_MAX)),
        _ => None,
    }
}

/// What the mart must show: of each day what was true when it was last published, or is true at the end.
fn expected(scenario: &Scenario, spoiled: &Spoiled, outcomes: &[DayOutcome]) -> Mart {
    let mut out = Mart::new();
    for fecha in scenario.fechas() {
        let mut of_day = outcomes.iter().filter(|o| o.run.fecha == fecha && o.run.state == RunState::Succeeded);
        let era =
            of_day.next_back().map_or_else(|| spoiled.at(DateTime::<Utc>::MAX_UTC), |o| invariants::found(&spoiled.eras, &o.run));
        let truth: Vec<Row> = era.truth.iter().filter(|r| r.fecha == fecha).cloned().collect();
        out.extend(oracle::mart(&truth, &era.spoiled));
    }
    out
}

/// How what went wrong was noticed; `None` when nothing showed.
fn incident(
    evidence: &Evidence<'_>,
    strikes: &[Strikes],
    raised: &[(DateTime<Utc>, Alert)],
    customers: u64,
    recovered_at: Option<DateTime<Utc>>,
) -> Option<Incident> {
    let effect_at = strikes.iter().filter_map(|s| s.first).min()?;
    let alert = raised.iter().find(|(at, _)| *at >= effect_at).map(|(at, alert)| (*at, alert.kind.clone()));
    let account = evidence.scenario.account.as_ref();
    let people = account.map(|a| (a.noticed_at, "people".to_owned()));
    let cause_after_s = account.filter(|_| alert.is_none()).map(|a| (a.cause_at - a.began_at).num_seconds());
    let detected = alert.or(people);
    let (wrong_rows, wrong_cents) = invariants::wrong(evidence);
    let all = evidence.scenario.fechas().into_iter().all(|fecha| was_published(evidence.outcomes, fecha));
    let published = evidence.outcomes.iter().filter(|o| o.run.state == RunState::Succeeded).filter_map(|o| o.run.finished_at);
    Some(Incident {
        effect_at,
        detected_at: detected.as_ref().map(|(at, _)| *at),
        detected_by: detected.map(|(_, by)| by),
        resolved_at: published
            .chain(recovered_at)
            .max()
            .filter(|at| all && wrong_rows == 0 && wrong_cents == 0 && *at >= effect_at),
        wrong_rows,
        wrong_cents,
        customers,
        cause_after_s,
        behind: None,
    })
}

/// What the worker has done so far; it outlives the worker.
struct Done {
    outcomes: Arc<Mutex<Vec<DayOutcome>>>,
    /// What the gauge of a run's duration said after each outcome.
    gauged: Arc<Mutex<Vec<Option<f64>>>>,
    metrics: Arc<SimMetrics>,
    /// Runs that the ledger does not know of, each with the reason.
    lost: Arc<Mutex<Vec<(NaiveDate, String)>>>,
    recovered: Arc<Mutex<Vec<Recovered>>>,
    /// Of the store's objects.
    versions: Arc<SimVersions>,
    steps: Arc<AtomicUsize>,
}

/// One thing that is done at a time.
#[derive(Debug, Clone)]
enum Step {
    Run(NaiveDate, DateTime<Utc>),
    Refresh(DateTime<Utc>),
    Operate(Act),
}

/// All steps of a story, in order of time.
fn steps(story: &Scenario) -> Vec<(DateTime<Utc>, Step)> {
    let mut steps = Vec::new();
    for fecha in story.fechas() {
        let scheduled = story.scheduled(fecha);
        let starts = scheduled + chrono::Duration::seconds(story.dispatch_s);
        steps.extend((0..story.runs).map(|_| (starts, Step::Run(fecha, scheduled))));
        if let Some(products) = story.products {
            for n in 0..24_u32.div_ceil(products.refresh_every_h) {
                let after = i64::from(products.refresh_after_min) + i64::from(60 * n * products.refresh_every_h);
                let at = scheduled + chrono::Duration::minutes(after);
                steps.push((at, Step::Refresh(at)));
            }
        }
    }
    steps.extend(story.operator.iter().map(|act| (act.at(), Step::Operate(act.clone()))));
    steps.sort_by_key(|(at, _)| *at);
    steps
}

/// The story from the worker's side: each step at its time. A worker that was started again goes on with the step in which
/// it died.
async fn work(platform: &Platform, story: &Scenario, done: &Done) -> Result<(), Failure> {
    let panicked = "the worker panicked";
    let env = &platform.ports.env;
    for (index, (starts, step)) in steps(story).into_iter().enumerate().skip(done.steps.load(Ordering::SeqCst)) {
        env.sleep((starts - env.now()).to_std().unwrap_or_default()).await;
        let run = match &step {
            Step::Run(fecha, scheduled) => Some((*fecha, *scheduled)),
            Step::Operate(Act::RunDay { at, fecha }) => Some((*fecha, *at)),
            Step::Refresh(_) | Step::Operate(Act::Restore { .. } | Act::Recover { .. }) => None,
        };
        if let Some((fecha, scheduled)) = run {
            match platform.run_day(fecha, scheduled).await {
                Ok(outcome) => {
                    let values = done.metrics.values.lock().map_err(|_| panicked)?;
                    done.gauged.lock().map_err(|_| panicked)?.push(values.get("simulacro_batch_run_duration_seconds{}").copied());
                    done.outcomes.lock().map_err(|_| panicked)?.push(outcome);
                }
                Err(error) => done.lost.lock().map_err(|_| panicked)?.push((fecha, chain(&error))),
            }
        }
        let other = match &step {
            Step::Refresh(scheduled) => platform.refresh_dimensions(*scheduled).await.map(|_| ()),
            Step::Operate(Act::Restore { at, table, as_of }) => put_back(platform, table, *at, *as_of).await,
            Step::Operate(Act::Recover { target, from_source, .. }) => {
                let request = Request { target, only: None, from_source: *from_source };
                match restore::execute(platform, done.versions.as_ref(), request, &mut |_| {}).await {
                    Ok(report) => {
                        let recovered = Recovered::of(env.now(), &report);
                        done.recovered.lock().map_err(|_| panicked)?.push(recovered);
                        Ok(())
                    }
                    Err(error) => Err(error),
                }
            }
            Step::Run(..) | Step::Operate(Act::RunDay { .. }) => Ok(()),
        };
        if let Err(error) = other {
            done.lost.lock().map_err(|_| panicked)?.push((story.fecha, chain(&error)));
        }
        done.steps.store(index + 1, Ordering::SeqCst);
    }
    Ok(())
}

/// Puts a table back to the version that was the newest at a moment.
async fn put_back(platform: &Platform, table: &str, at: DateTime<Utc>, as_of: DateTime<Utc>) -> Result<(), PortError> {
    let lakehouse = &platform.ports.lakehouse;
    let all = lakehouse.versions(table, 1_000).await?;
    let newest = all.iter().filter(|v| v.at <= as_of).map(|v| v.version).max();
    let version = newest.ok_or_else(|| PortError::permanent(format!("restore {table}: found no version at {as_of}")))?;
    let mark = Mark { writer: "operator".into(), epoch: at.timestamp() };
    lakehouse.restore(Restore { table: table.into(), mark, version }).await.map(|_| ())
}

/// An error with its causes, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// Reads what an analyst could see at the end.
async fn look(platform: &Platform) -> Result<Ending, PortError> {
    let mut ending = Ending::default();
    let lakehouse = platform.ports.lakehouse.as_ref();
    for table in [STAGING, QUARANTINE, MART] {
        if lakehouse.exists(table).await? && whole(lakehouse, table).await? {
            ending.hashes.insert(table.to_owned(), canonical_hash(lakehouse, table).await?);
        }
    }
    if ending.hashes.contains_key(MART) {
        let columns = "SELECT fecha, region, revenue_neto, transacciones, usuarios_unicos FROM";
        let query = Query { sql: format!("{columns} t"), inputs: vec![("t".into(), Input::Delta(MART.into()))] };
        ending.mart = sales(&lakehouse.query(&query).await?)?;
        if let Ok(batches) = platform.ports.warehouse.query(&format!("{columns} {WAREHOUSE}"), &[WAREHOUSE]).await {
            ending.warehouse = sales(&batches)?;
        }
    }
    if ending.hashes.contains_key(STAGING) {
        ending.staged = Some(staged(lakehouse).await?);
    }
    if lakehouse.exists(FEATURES).await? {
        let sql = "SELECT count(*) FROM t WHERE region_preferida IS NULL".to_owned();
        let query = Query { sql, inputs: vec![("t".into(), Input::Delta(FEATURES.into()))] };
        let batches = lakehouse.query(&query).await?;
        ending.customers = batches.iter().map(|b| b.column(0).as_primitive::<Int64Type>().value(0).unsigned_abs()).sum();
    }
    Ok(ending)
}

/// Whether a table's rows can be read; files that are gone are a finding, and no reason to look again.
async fn whole(lakehouse: &dyn Lakehouse, table: &str) -> Result<bool, PortError> {
    match canonical_hash(lakehouse, table).await {
        Ok(_) => Ok(true),
        Err(e) if e.disposition == Disposition::Permanent => Ok(false),
        Err(e) => Err(e),
    }
}

/// Rows and cents of staging, by day.
async fn staged(lakehouse: &dyn Lakehouse) -> Result<BTreeMap<NaiveDate, (i64, i64)>, PortError> {
    let sql = "SELECT fecha, count(*), CAST(sum(monto_neto) AS DECIMAL(38,2)) FROM t GROUP BY fecha ORDER BY fecha".to_owned();
    let mut out = BTreeMap::new();
    for batch in lakehouse.query(&Query { sql, inputs: vec![("t".into(), Input::Delta(STAGING.into()))] }).await? {
        let fechas = batch.column(0).as_primitive::<Date32Type>();
        let (rows, cents) = (batch.column(1).as_primitive::<Int64Type>(), batch.column(2).as_primitive::<Decimal128Type>());
        for i in 0..batch.num_rows() {
            let fecha = NaiveDate::default() + chrono::Duration::days(fechas.value(i).into());
            out.insert(fecha, (rows.value(i), cents.value(i) as i64));
        }
    }
    Ok(out)
}

fn sales(batches: &[RecordBatch]) -> Result<Mart, PortError> {
    let mut out = Mart::new();
    for batch in batches {
        let fechas = batch.column(0).as_primitive::<Date32Type>();
        let regions = strings(batch, 1)?;
        let revenue = batch.column(2).as_primitive::<Decimal128Type>();
        let counts = [3, 4].map(|i| batch.column(i).as_primitive::<Int64Type>());
        for (i, region) in regions.into_iter().enumerate() {
            let fecha = NaiveDate::default() + chrono::Duration::days(fechas.value(i).into());
            let sales = Sales {
                revenue_cents: revenue.value(i) as i64,
                transacciones: counts[0].value(i),
                usuarios_unicos: counts[1].value(i),
            };
            // Regions come once for each segment, and twice where a write was doubled: that must not be hidden here.
            let all: &mut Sales = out.entry((fecha, region)).or_default();
            all.revenue_cents += sales.revenue_cents;
            all.transacciones += sales.transacciones;
            all.usuarios_unicos += sales.usuarios_unicos;
        }
    }
    Ok(out)
}

/// Raw objects without a manifest of their version.
fn leftovers(paths: &[String]) -> Vec<String> {
    let known: BTreeSet<String> =
        paths.iter().filter_map(|p| p.strip_suffix(".json")).map(|p| p.replace("/_manifest/", "/part-")).collect();
    let raw = paths.iter().filter(|p| p.starts_with("raw/") && p.ends_with(".parquet"));
    raw.filter(|p| !known.iter().any(|k| p.starts_with(k.as_str()))).cloned().collect()
}

fn problems(
    evidence: &Evidence<'_>,
    broken: &[invariants::Broken],
    raised: &[(DateTime<Utc>, Alert)],
    incident: Option<&Incident>,
) -> Vec<String> {
    let (expect, outcomes) = (&evidence.scenario.expect, evidence.outcomes);
    let mut problems = Vec::new();
    match expect.verdict {
        Verdict::Holds => problems.extend(broken.iter().map(|(name, text)| format!("invariant {name}: {text}"))),
        Verdict::Caught => {
            let names: BTreeSet<&str> = broken.iter().map(|b| b.0).collect();
            let wanted: BTreeSet<&str> = expect.broken.iter().map(String::as_str).collect();
            if names != wanted {
                problems.push(format!("broken invariants: found {names:?}, expected {wanted:?}"));
            }
        }
    }
    let kinds: Vec<&str> = raised.iter().map(|(_, a)| a.kind.as_str()).collect();
    if let Some(wanted) = &expect.alerts
        && kinds != *wanted
    {
        let seen: Vec<String> = raised.iter().map(|(at, a)| format!("{at} {}: {}", a.kind, a.summary)).collect();
        problems.push(format!("alerts: found {seen:?}, expected {wanted:?}"));
    }
    if let (Some(limit), Some(incident)) = (expect.detected_within_s, incident) {
        let delay = incident.detected_at.map(|at| (at - incident.effect_at).num_seconds());
        if delay.is_none_or(|s| s < 0 || s.unsigned_abs() > limit) {
            problems.push(format!("detection: found {}, expected within {limit} s", incident.line()));
        }
    }
    let attempts = attempts(outcomes);
    if let Some(wanted) = &expect.attempts
        && *wanted != attempts
    {
        problems.push(format!("attempts: found {attempts:?}, expected {wanted:?}"));
    }
    let held = outcomes.iter().find_map(|o| match &o.result {
        Err(DayError::Held { gate, .. }) => Some((*gate).to_owned()),
        _ => None,
    });
    if expect.held_by.is_some() && expect.held_by != held {
        problems.push(format!("held by: found {held:?}, expected {:?}", expect.held_by));
    }
    if expect.verdict == Verdict::Holds {
        for outcome in outcomes {
            if let Err(error @ DayError::Port { source, .. }) = &outcome.result
                && !was_published(outcomes, outcome.run.fecha)
            {
                problems.push(format!("{error}: {}", source.chain()));
            }
        }
        let ended: BTreeSet<NaiveDate> = outcomes.iter().map(|o| o.run.fecha).collect();
        if (ended.len() as u64) < evidence.scenario.days {
            problems.push(format!("liveness: of {} days only {ended:?} were run to an end", evidence.scenario.days));
        }
    }
    problems
}
