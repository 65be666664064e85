//! One run of one scenario: builds the world, steps it, judges what came out.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::{Date32Type, Decimal128Type, Int64Type},
};
use chrono::{DateTime, Days, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::{
    avro::memory::MemoryRegistry,
    batch::{DayError, MART, QUARANTINE, STAGING, WAREHOUSE, canonical_hash, strings},
    contract::Contract,
    history::{Event, RecordedStore, Recorder},
    platform::{DayOutcome, Platform},
    ports::{Input, Lakehouse, NoDimensions, PortError, Ports, Query, Warehouse},
};
use simulacro_lakehouse::{DeltaLakehouse, DeltaWarehouse};
use simulacro_log::{Limits, Settings};
use simulacro_shop::cdnow;

use crate::{
    broker::SimBroker,
    faults::Fault,
    host::Host,
    interpose,
    invariants::{self, Evidence},
    ledger::SimLedger,
    oracle::{self, Sales},
    ports::{OnHost, Postgres, Row, SimEnv, SimHistory, SimMetrics, SimNotifier, SimSource, serve},
    rng::Stream,
    scenario::{Scenario, Verdict},
    store::{DirectStore, ObjectService, PortStore},
    stream::world::Figures,
};

/// The contract of the sales.
pub(crate) const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");

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
}

/// The rows of the shop before any fault.
fn clean_rows(scenario: &Scenario) -> Result<Vec<Row>, Failure> {
    let shifted: BTreeMap<NaiveDate, NaiveDate> =
        (0..scenario.days).map(|n| (scenario.purchases_from + Days::new(n), scenario.fecha + Days::new(n))).collect();
    let rows: Vec<Row> = cdnow::parse(cdnow::BYTES)?
        .into_iter()
        .filter_map(|p| {
            let fecha = *shifted.get(&p.fecha)?;
            let region = Some(p.region.to_owned());
            let (order_id, user_id, product_id) = (p.order_id, p.user_id, p.product_id);
            Some(Row { order_id, user_id, product_id, monto_cents: p.monto_cents, region, fecha })
        })
        .collect();
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

/// The source as the faults on the data leave it, with the hits of each fault and the orders that were spoiled.
struct Spoiled {
    postgres: Postgres,
    hits: Vec<u64>,
    orders: Vec<String>,
}

fn spoil(scenario: &Scenario, contract: &Contract, clean: &[Row]) -> Spoiled {
    let mut out = Spoiled {
        postgres: Postgres { columns: contract.columns.clone(), rows: clean.to_vec(), down: Vec::new() },
        hits: vec![0; scenario.fault.len()],
        orders: Vec::new(),
    };
    for (index, fault) in scenario.fault.iter().enumerate() {
        match fault {
            Fault::SourceUnavailable { from, to } => out.postgres.down.push((*from, *to)),
            Fault::NullRegion { every, fecha } => {
                let rows = out.postgres.rows.iter_mut().filter(|r| fecha.is_none_or(|f| r.fecha == f));
                for row in rows.step_by((*every).max(1)) {
                    row.region = None;
                    out.orders.push(row.order_id.clone());
                    out.hits[index] += 1;
                }
            }
            Fault::DuplicatedRows { every } => {
                let copies: Vec<Row> = out.postgres.rows.iter().step_by((*every).max(1)).cloned().collect();
                out.hits[index] += copies.len() as u64;
                out.postgres.rows.extend(copies);
            }
            Fault::RenamedColumn { from, to } => {
                for column in out.postgres.columns.iter_mut().filter(|c| c.name == *from) {
                    column.name.clone_from(to);
                    out.hits[index] += 1;
                }
            }
            Fault::Store(_) | Fault::WorkerCrash { .. } => {}
        }
    }
    out
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

    let contract = Contract::parse("contracts/odcs/cdnow/ventas.yaml", CONTRACT)?;
    let clean = clean_rows(scenario)?;
    let spoiled = spoil(scenario, &contract, &clean);
    let mut delivered: BTreeMap<NaiveDate, u64> = BTreeMap::new();
    for row in &spoiled.postgres.rows {
        *delivered.entry(row.fecha).or_default() += 1;
    }

    let renamed = spoiled.postgres.columns != contract.columns;
    let must_hold = if renamed {
        scenario.fechas().into_iter().collect()
    } else {
        oracle::days_to_hold(&spoiled.postgres.rows, contract.quarantine_share_max)
    };
    let crashes = scenario.fault.iter().filter_map(|f| match f {
        Fault::WorkerCrash { at_calls, down_s } => Some((at_calls.clone(), *down_s)),
        _ => None,
    });
    let (at_calls, down): (Vec<_>, Vec<_>) = crashes.unzip();
    let down = Duration::from_secs(down.into_iter().max().unwrap_or(0));
    let host = Arc::new(Host::new("worker", at_calls.into_iter().flatten()));
    let store_faults = scenario.fault.iter().filter_map(|f| match f {
        Fault::Store(fault) => Some(fault.clone()),
        _ => None,
    });
    let service = ObjectService::new(host.clone(), store_faults.collect());
    let env = Arc::new(SimEnv { start, ids: AtomicU64::new(1), jitter: Mutex::new(Stream::root(seed).child("jitter")) });
    let history = Arc::new(SimHistory::default());
    let recorder = Recorder::new(env.clone(), history.clone());
    let source = Arc::new(SimSource { server: "postgres".into(), refused: AtomicU64::new(0) });
    let notifier =
        Arc::new(SimNotifier { env: env.clone(), raised: Mutex::default(), open: Mutex::default(), host: host.clone() });
    let ledger = Arc::new(SimLedger::new(host.clone()));

    // This world does not stream, that of `crate::stream` does; log and registry are there because every assembly has them.
    let broker = SimBroker::new(env.clone(), Limits::KAFKA, Duration::from_millis(1));
    // A started process knows nothing: it connects to the services anew.
    let connect = {
        let (env, source, notifier, ledger) = (env.clone(), source.clone(), notifier.clone(), ledger.clone());
        let (service, recorder) = (service.clone(), recorder.clone());
        move || -> Ports {
            let below = Arc::new(RecordedStore { inner: Arc::new(DirectStore(service.clone())), recorder: recorder.clone() });
            let lakehouse = Arc::new(DeltaLakehouse::new(below));
            let warehouse: Arc<dyn Warehouse> = Arc::new(DeltaWarehouse::new(lakehouse.clone()));
            let lakehouse: Arc<dyn Lakehouse> = lakehouse;
            Ports {
                env: env.clone(),
                tables: source.clone(),
                dimensions: Arc::new(NoDimensions),
                objects: Arc::new(PortStore::new(service.clone())),
                log: Arc::new(broker.client(Settings::KAFKA)),
                registry: Arc::new(MemoryRegistry::default()),
                lakehouse: Arc::new(OnHost { inner: lakehouse, store: service.clone() }),
                warehouse: Arc::new(OnHost { inner: warehouse, store: service.clone() }),
                ledger: ledger.clone(),
                notifier: notifier.clone(),
                metrics: Arc::new(SimMetrics::default()),
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
    let postgres = Arc::new(spoiled.postgres);
    sim.host("postgres", move || {
        let state = postgres.clone();
        async move { Ok(serve(state, start).await?) }
    });
    let outcomes: Arc<Mutex<Vec<DayOutcome>>> = Arc::default();
    let lost: Arc<Mutex<Vec<(NaiveDate, String)>>> = Arc::default();
    let ending: Arc<Mutex<Option<Ending>>> = Arc::default();
    {
        let (outcomes, ending, story) = (outcomes.clone(), ending.clone(), scenario.clone());
        let lost = lost.clone();
        sim.host(host.name, move || {
            let platform = Platform::new(story.config.clone(), contract.clone(), connect());
            let (outcomes, ending, story) = (outcomes.clone(), ending.clone(), story.clone());
            let lost = lost.clone();
            async move {
                work(&platform, &story, &outcomes, &lost).await?;
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
    loop {
        sim.step().map_err(|e| format!("the simulation stopped: {e}"))?;
        interpose::set_virtual(nanos(start + sim.elapsed()));
        if ending.lock().map_err(|_| "the worker panicked")?.is_some() || start + sim.elapsed() > last {
            break;
        }
        match back_at {
            None if host.is_dead() => {
                sim.crash(host.name);
                ledger.client_died(start + sim.elapsed());
                back_at = Some(sim.elapsed() + down);
            }
            Some(at) if sim.elapsed() >= at => {
                host.revive();
                sim.bounce(host.name);
                back_at = None;
            }
            _ => {}
        }
    }
    let Ending { hashes, mart, warehouse } = ending.lock().map_err(|_| "the worker panicked")?.take().unwrap_or_default();
    let outcomes = std::mem::take(&mut *outcomes.lock().map_err(|_| "the worker panicked")?);

    let mut hits = spoiled.hits;
    let mut store_hits = service.hits().into_iter();
    for (hits, fault) in hits.iter_mut().zip(&scenario.fault) {
        match fault {
            Fault::SourceUnavailable { .. } => *hits = source.refused.load(Ordering::SeqCst),
            Fault::Store(_) => *hits = store_hits.next().unwrap_or(0),
            Fault::WorkerCrash { .. } => *hits = host.deaths(),
            Fault::NullRegion { .. } | Fault::RenamedColumn { .. } | Fault::DuplicatedRows { .. } => {}
        }
    }
    let expected = oracle::mart(&clean, &spoiled.orders);
    let raised = notifier.raised.lock().map_err(|_| "the pager panicked")?.clone();
    let leftovers = leftovers(&service.paths());
    let evidence = Evidence {
        scenario,
        outcomes: &outcomes,
        mart: &mart,
        warehouse: &warehouse,
        expected: &expected,
        delivered: &delivered,
        must_hold: &must_hold,
        leftovers: &leftovers,
    };
    let broken = invariants::judge(&evidence);
    let mut problems = problems(&evidence, &broken, &raised);
    if scenario.expect.verdict == Verdict::Holds {
        let lost = lost.lock().map_err(|_| "the worker panicked")?;
        problems.extend(lost.iter().map(|(fecha, error)| format!("run of {fecha} could not be kept: {error}")));
    }
    let fired = hits.iter().all(|h| *h >= scenario.expect.fired_min);
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
    };
    let events = history.events.lock().map_err(|_| "the history panicked")?.clone();
    Ok((judgement, events))
}

fn attempts(outcomes: &[DayOutcome]) -> Vec<String> {
    let all = outcomes.iter().flat_map(|o| &o.attempts);
    all.map(|a| format!("{} {}", a.at.format("%H:%M:%S"), a.outcome)).collect()
}

/// The story from the worker's side: each day at its time, as often as the scenario says. A worker that was started
/// again goes on with the run it died in.
async fn work(
    platform: &Platform,
    story: &Scenario,
    outcomes: &Mutex<Vec<DayOutcome>>,
    lost: &Mutex<Vec<(NaiveDate, String)>>,
) -> Result<(), Failure> {
    let panicked = "the worker panicked";
    for fecha in story.fechas() {
        for run in 0..story.runs {
            let done = outcomes.lock().map_err(|_| panicked)?.iter().filter(|o| o.run.fecha == fecha).count()
                + lost.lock().map_err(|_| panicked)?.iter().filter(|l| l.0 == fecha).count();
            if done > run as usize {
                continue;
            }
            let starts = story.scheduled(fecha) + chrono::Duration::seconds(story.dispatch_s);
            platform.ports.env.sleep((starts - platform.ports.env.now()).to_std().unwrap_or_default()).await;
            match platform.run_day(fecha, story.scheduled(fecha)).await {
                Ok(outcome) => outcomes.lock().map_err(|_| panicked)?.push(outcome),
                Err(error) => lost.lock().map_err(|_| panicked)?.push((fecha, chain(&error))),
            }
        }
    }
    Ok(())
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
        if lakehouse.exists(table).await? {
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
    Ok(ending)
}

fn sales(batches: &[RecordBatch]) -> Result<Mart, PortError> {
    let mut out = BTreeMap::new();
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
            out.insert((fecha, region), sales);
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
    raised: &[(DateTime<Utc>, simulacro_core::ports::Alert)],
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
            if let Err(error @ DayError::Port { source, .. }) = &outcome.result {
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
