//! One run of one scenario: builds the world, steps it, judges what came out.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::array::AsArray;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::{
    batch::{DayError, MART, QUARANTINE, STAGING, canonical_hash, strings},
    contract::Contract,
    history::{Event, RecordedStore, Recorder},
    platform::{DayOutcome, Platform},
    ports::{Input, Ports, Query, RunState},
};
use simulacro_lakehouse::DeltaLakehouse;
use simulacro_shop::cdnow;

use crate::{
    interpose,
    ports::{Postgres, Row, SimEnv, SimHistory, SimLedger, SimNotifier, SimSource, serve},
    scenario::{Fault, Scenario, Verdict},
    store,
};

const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judgement {
    /// `holds`, `violated` or `inconclusive`.
    pub verdict: String,
    /// One line for each invariant that is broken, and for each expectation that was missed.
    pub problems: Vec<String>,
    /// Tries to reach the source.
    pub attempts: Vec<String>,
    /// Alerts with their virtual time.
    pub alerts: Vec<String>,
    /// When the day was published, if it was.
    pub published_at: Option<DateTime<Utc>>,
    /// Canonical hash of each table that exists.
    pub hashes: BTreeMap<String, String>,
}

/// The oracle: what the mart must show for the rows the source really has, by region, in cents and sales.
///
/// It is naive on purpose and shares nothing with the pipeline.
fn oracle(truth: &[Row]) -> BTreeMap<String, (i64, i64)> {
    let mut expected: BTreeMap<String, (i64, i64)> = BTreeMap::new();
    for row in truth {
        if row.monto_cents > 0 {
            let entry = expected.entry(row.region.clone().unwrap_or_default()).or_default();
            entry.0 += row.monto_cents;
            entry.1 += 1;
        }
    }
    expected
}

/// The rows of the shop before any fault.
fn truth(scenario: &Scenario) -> Result<Vec<Row>, Box<dyn std::error::Error>> {
    let rows: Vec<Row> = cdnow::parse(cdnow::BYTES)?
        .into_iter()
        .filter(|p| p.fecha == scenario.purchases_of)
        .map(|p| Row {
            order_id: p.order_id,
            user_id: p.user_id,
            product_id: p.product_id,
            monto_cents: p.monto_cents,
            region: Some(p.region.to_owned()),
            fecha: scenario.fecha,
        })
        .collect();
    if rows.is_empty() {
        return Err(format!(
            "purchases_of {}: found no purchases, expected a day from 1997-01-01 to 1998-06-30",
            scenario.purchases_of
        )
        .into());
    }
    Ok(rows)
}

/// Runs the scenario in this process. One process runs one scenario once: globals start fresh.
///
/// # Errors
/// When the world itself breaks; what the platform does wrong is in the judgement.
pub fn run(scenario: &Scenario, seed: u64, plant: bool) -> Result<(Judgement, Vec<Event>), Box<dyn std::error::Error>> {
    let start = scenario.starts - chrono::Duration::minutes(1);
    let nanos = |t: DateTime<Utc>| t.timestamp_nanos_opt().unwrap_or_default() as u64;
    interpose::set_seed(seed);
    interpose::start_virtual(nanos(start));

    let contract = Contract::parse("contracts/odcs/cdnow/ventas.yaml", CONTRACT)?;
    let truth = truth(scenario)?;
    let mut postgres = Postgres { columns: contract.columns.clone(), rows: truth.clone(), down: Vec::new() };
    let mut data_hits = 0;
    for fault in &scenario.fault {
        match fault {
            Fault::SourceUnavailable { from, to } => postgres.down.push((*from, *to)),
            Fault::NullRegion { every } => {
                for row in postgres.rows.iter_mut().step_by((*every).max(1)) {
                    row.region = None;
                    data_hits += 1;
                }
            }
            Fault::DuplicatedRows { every } => {
                let copies: Vec<Row> = postgres.rows.iter().step_by((*every).max(1)).cloned().collect();
                data_hits += copies.len();
                postgres.rows.extend(copies);
            }
            Fault::RenamedColumn { from, to } => {
                for column in postgres.columns.iter_mut().filter(|c| c.name == *from) {
                    column.name.clone_from(to);
                    data_hits += 1;
                }
            }
        }
    }

    let env = Arc::new(SimEnv { start, ids: AtomicU64::new(1) });
    let history = Arc::new(SimHistory::default());
    let source = Arc::new(SimSource { host: "postgres".into(), refused: AtomicU64::new(0) });
    let notifier = Arc::new(SimNotifier { env: env.clone(), raised: Mutex::new(Vec::new()) });
    let objects = store::empty();
    let below = Arc::new(RecordedStore { inner: objects.clone(), recorder: Recorder::new(env.clone(), history.clone()) });
    let lakehouse = Arc::new(DeltaLakehouse::new(below));
    let ports = Ports {
        env: env.clone(),
        tables: source.clone(),
        objects,
        lakehouse: lakehouse.clone(),
        ledger: Arc::new(SimLedger::default()),
        notifier: notifier.clone(),
        history: history.clone(),
    };

    let mut sim = turmoil::Builder::new()
        .epoch(start.into())
        .rng_seed(seed)
        .tick_duration(Duration::from_millis(scenario.tick_ms))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(scenario.tick_ms.max(2)))
        .simulation_duration(Duration::from_secs(2 * 86_400))
        .build();
    let postgres = Arc::new(postgres);
    sim.host("postgres", move || {
        let state = postgres.clone();
        async move { Ok(serve(state, start).await?) }
    });
    type Done = (Vec<DayOutcome>, BTreeMap<String, String>, BTreeMap<String, (i64, i64)>);
    let done: Arc<Mutex<Option<Done>>> = Arc::default();
    let (slot, config, story) = (done.clone(), scenario.config.clone(), scenario.clone());
    sim.client("worker", async move {
        let platform = Platform::new(config, contract, ports);
        platform.ports.env.sleep((story.starts - platform.ports.env.now()).to_std().unwrap_or_default()).await;
        let mut outcomes = Vec::new();
        for _ in 0..story.runs {
            outcomes.push(platform.run_day(story.fecha, story.scheduled).await?);
        }
        let mut hashes = BTreeMap::new();
        for table in [STAGING, QUARANTINE, MART] {
            if lakehouse_has(&platform, table).await? {
                hashes.insert(table.to_owned(), canonical_hash(platform.ports.lakehouse.as_ref(), table).await?);
            }
        }
        let mart = if hashes.contains_key(MART) { read_mart(&platform).await? } else { BTreeMap::new() };
        if plant {
            // A real clock in the history: the canary must notice.
            platform.recorder.record("planted", "real_clock", interpose::real_nanos().to_string(), serde_json::Value::Null);
        }
        if let Ok(mut slot) = slot.lock() {
            *slot = Some((outcomes, hashes, mart));
        }
        Ok(())
    });
    loop {
        let finished = sim.step()?;
        interpose::set_virtual(nanos(start + sim.elapsed()));
        if finished {
            break;
        }
    }
    let (outcomes, hashes, mart) = done.lock().map_err(|_| "the worker panicked")?.take().ok_or("the worker did not finish")?;

    let raised = notifier.raised.lock().map_err(|_| "the pager panicked")?.clone();
    let refused = source.refused.load(Ordering::SeqCst);
    let judgement = judge(scenario, &truth, &outcomes, hashes, &mart, &raised, refused, data_hits);
    let events = history.events.lock().map_err(|_| "the history panicked")?.clone();
    Ok((judgement, events))
}

async fn lakehouse_has(platform: &Platform, table: &str) -> simulacro_core::ports::Result<bool> {
    platform.ports.lakehouse.exists(table).await
}

async fn read_mart(platform: &Platform) -> simulacro_core::ports::Result<BTreeMap<String, (i64, i64)>> {
    let query = Query {
        sql: "SELECT region, revenue_neto, transacciones FROM t".into(),
        inputs: vec![("t".into(), Input::Delta(MART.into()))],
    };
    let mut out = BTreeMap::new();
    for batch in platform.ports.lakehouse.query(&query).await? {
        let regions = strings(&batch, 0)?;
        let revenue = batch.column(1).as_primitive::<arrow::datatypes::Decimal128Type>();
        let sales = batch.column(2).as_primitive::<arrow::datatypes::Int64Type>();
        for (i, region) in regions.into_iter().enumerate() {
            out.insert(region, (revenue.value(i) as i64, sales.value(i)));
        }
    }
    Ok(out)
}

#[expect(clippy::too_many_arguments, reason = "everything that is judged, once")]
fn judge(
    scenario: &Scenario,
    truth: &[Row],
    outcomes: &[DayOutcome],
    hashes: BTreeMap<String, String>,
    mart: &BTreeMap<String, (i64, i64)>,
    raised: &[(DateTime<Utc>, simulacro_core::ports::Alert)],
    refused: u64,
    data_hits: usize,
) -> Judgement {
    let attempts: Vec<String> =
        outcomes.iter().flat_map(|o| &o.attempts).map(|a| format!("{} {}", a.at.format("%H:%M:%S"), a.outcome)).collect();
    let published_at = outcomes.iter().find(|o| o.run.state == RunState::Succeeded).and_then(|o| o.run.finished_at);
    let alerts: Vec<String> = raised.iter().map(|(at, a)| format!("{} {}", at.format("%H:%M:%S"), a.kind)).collect();
    let held = outcomes.iter().find_map(|o| match &o.result {
        Err(DayError::Held { gate, .. }) => Some((*gate).to_owned()),
        _ => None,
    });

    let mut broken: Vec<(&str, String)> = Vec::new();
    if held.is_none() && published_at.is_none_or(|at| at > scenario.sla) {
        broken.push(("sla", format!("the day must be published by {}, found {published_at:?}", scenario.sla)));
    }
    if !mart.is_empty() && *mart != oracle(truth) {
        broken.push(("money_exact", format!("the mart has {mart:?}, the oracle {:?}", oracle(truth))));
    }
    if held.is_some() && !mart.is_empty() {
        broken.push(("held_is_unpublished", "a held day reached the mart".into()));
    }

    let mut problems = Vec::new();
    match scenario.expect.verdict {
        Verdict::Holds => problems.extend(broken.iter().map(|(name, text)| format!("invariant {name}: {text}"))),
        Verdict::Caught => {
            let names: Vec<&str> = broken.iter().map(|b| b.0).collect();
            if names != scenario.expect.broken.iter().map(String::as_str).collect::<Vec<_>>() {
                problems.push(format!("broken invariants: expected {:?}, found {names:?}", scenario.expect.broken));
            }
        }
    }
    let kinds: Vec<&str> = raised.iter().map(|(_, a)| a.kind.as_str()).collect();
    if kinds != scenario.expect.alerts {
        problems.push(format!("alerts: expected {:?}, found {alerts:?}", scenario.expect.alerts));
    }
    if let Some(expected) = &scenario.expect.attempts
        && *expected != attempts
    {
        problems.push(format!("attempts: expected {expected:?}, found {attempts:?}"));
    }
    if scenario.expect.held_by != held {
        problems.push(format!("held by: expected {:?}, found {held:?}", scenario.expect.held_by));
    }
    for outcome in outcomes {
        if let (Err(error @ DayError::Port { source, .. }), Verdict::Holds) = (&outcome.result, scenario.expect.verdict) {
            problems.push(format!("{error}: {}", source.chain()));
        }
    }
    let fired = scenario.fault.iter().all(|f| match f {
        Fault::SourceUnavailable { .. } => refused > 0,
        Fault::NullRegion { .. } | Fault::DuplicatedRows { .. } | Fault::RenamedColumn { .. } => data_hits > 0,
    });
    let verdict = if !fired {
        "inconclusive"
    } else if problems.is_empty() {
        "holds"
    } else {
        "violated"
    };
    Judgement { verdict: verdict.into(), problems, attempts, alerts, published_at, hashes }
}
