//! Days that stop before they are published: what readers still see, what is told of each task, and what a death in between
//! leaves behind.
#![expect(clippy::disallowed_methods, reason = "tests write the source")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::NaiveDate;
use futures::{StreamExt, stream, stream::BoxStream};
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, memory::InMemory, path::Path as ObjectPath,
};
use simulacro_adapters::{CsvSource, PrometheusMetrics, Services, SqliteLedger, connect, embedded_events};
use simulacro_core::{
    batch::{DayError, DayReport, MART, STAGING, canonical_hash},
    contract::{Contract, check::QualityResult},
    models::shipped,
    orchestrator::{RetryPolicy, SourcePolicy, breaker::SOURCE, source_checks},
    platform::{Config, DayOutcome, Platform},
    ports::{DayWrite, Disposition, Input, Lakehouse, Ports, Query, RunState},
};
use simulacro_lakehouse::DeltaLakehouse;

use crate::binaries::source;

const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");
const FIRST: &str = "1997-01-01";
const SECOND: &str = "1997-01-02";

fn day(text: &str) -> NaiveDate {
    text.parse().expect("a day")
}

/// A store whose process dies: so many calls are answered, the next one is carried out but its answer is lost where it writes
/// and `loses` says so, and all after it fail.
#[derive(Debug)]
struct Dying {
    inner: Arc<InMemory>,
    left: AtomicI64,
    loses: bool,
}

impl Dying {
    fn dead() -> StoreError {
        StoreError::Generic { store: "dying", source: "the process is dead".into() }
    }
    /// How this call ends: `Some(true)` is carried out and not answered.
    fn next(&self) -> Option<bool> {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            n if n > 0 => None,
            0 => Some(self.loses),
            _ => Some(false),
        }
    }
}

impl fmt::Display for Dying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dying({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Dying {
    async fn put_opts(&self, at: &ObjectPath, body: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        match self.next() {
            None => self.inner.put_opts(at, body, options).await,
            Some(carried_out) => {
                if carried_out {
                    self.inner.put_opts(at, body, options).await?;
                }
                Err(Self::dead())
            }
        }
    }
    async fn put_multipart_opts(
        &self,
        at: &ObjectPath,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        match self.next() {
            None => self.inner.put_multipart_opts(at, options).await,
            Some(_) => Err(Self::dead()),
        }
    }
    async fn get_opts(&self, at: &ObjectPath, options: GetOptions) -> object_store::Result<GetResult> {
        match self.next() {
            None => self.inner.get_opts(at, options).await,
            Some(_) => Err(Self::dead()),
        }
    }
    async fn get_ranges(&self, at: &ObjectPath, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        match self.next() {
            None => self.inner.get_ranges(at, ranges).await,
            Some(_) => Err(Self::dead()),
        }
    }
    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<ObjectPath>>,
    ) -> BoxStream<'static, object_store::Result<ObjectPath>> {
        match self.next() {
            None => self.inner.delete_stream(paths),
            Some(_) => stream::iter([Err(Self::dead())]).boxed(),
        }
    }
    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        match self.next() {
            None => self.inner.list(prefix),
            Some(_) => stream::iter([Err(Self::dead())]).boxed(),
        }
    }
    fn list_with_offset(
        &self,
        prefix: Option<&ObjectPath>,
        offset: &ObjectPath,
    ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        match self.next() {
            None => self.inner.list_with_offset(prefix, offset),
            Some(_) => stream::iter([Err(Self::dead())]).boxed(),
        }
    }
    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> object_store::Result<ListResult> {
        match self.next() {
            None => self.inner.list_with_delimiter(prefix).await,
            Some(_) => Err(Self::dead()),
        }
    }
    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> object_store::Result<()> {
        match self.next() {
            None => self.inner.copy_opts(from, to, options).await,
            Some(_) => Err(Self::dead()),
        }
    }
    async fn rename_opts(&self, from: &ObjectPath, to: &ObjectPath, options: RenameOptions) -> object_store::Result<()> {
        match self.next() {
            None => self.inner.rename_opts(from, to, options).await,
            Some(_) => Err(Self::dead()),
        }
    }
}

/// The first days of the shop, and the same where an order of the first day comes back on the second.
struct Shop {
    dir: tempfile::TempDir,
    store: Arc<InMemory>,
    good: PathBuf,
    bad: PathBuf,
}

fn first_sales(text: String) -> String {
    text.lines().take(150).map(|l| format!("{l}\n")).collect()
}

fn twin(text: String) -> String {
    let text = first_sales(text);
    let first = text.lines().nth(1).expect("a sale").split(',').next().expect("an id").to_owned();
    let mut done = false;
    let line = |l: &str| match l.split_once(',').filter(|_| !done && l.ends_with(SECOND)) {
        Some((_, rest)) => {
            done = true;
            format!("{first},{rest}\n")
        }
        None => format!("{l}\n"),
    };
    text.lines().map(line).collect()
}

impl Shop {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let folder = |name: &str| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).expect("a folder");
            folder
        };
        let (good, bad) = (source(&folder("good"), first_sales), source(&folder("bad"), twin));
        Self { dir, store: Arc::new(InMemory::new()), good, bad }
    }

    /// A process over the shop's store that dies after so many calls to it.
    async fn process(&self, source: &Path, calls: i64, loses: bool) -> Platform {
        let config = Config {
            source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 },
            retry: RetryPolicy { retries: 0, backoff_s: 1, deadline_s: 1 },
            alert_after_s: 1,
            startup_s: 0,
        };
        let (log, registry) = embedded_events(self.dir.path());
        let services = Services {
            tables: Arc::new(CsvSource::open(source).expect("a source")),
            objects: Arc::new(Dying { inner: self.store.clone(), left: AtomicI64::new(calls), loses }),
            log,
            registry,
            ledger: Arc::new(SqliteLedger::open(&self.dir.path().join("ledger.db")).await.expect("a ledger")),
            warehouse: None,
            metrics: Arc::new(PrometheusMetrics::default()),
        };
        let ports = connect(services, &self.dir.path().join("history.jsonl")).expect("connected");
        let contract = Contract::parse("ventas.yaml", CONTRACT).expect("the shipped contract parses");
        let models = shipped().expect("the models parse").select("+metricas_diarias").expect("it is there");
        Platform::new(config, contract, ports).with_models(&models).expect("it has the mart")
    }

    async fn run(&self, source: &Path, fecha: &str) -> Result<DayReport, DayError> {
        let platform = self.process(source, i64::MAX, false).await;
        platform.run_day(day(fecha), platform.ports.env.now()).await.expect("the ledger works").result
    }

    /// What a reader of the lake sees, by table.
    async fn seen(&self, tables: &[&str]) -> BTreeMap<String, String> {
        let lake = DeltaLakehouse::new(self.store.clone());
        let mut out = BTreeMap::new();
        for table in tables {
            let seen = match *table {
                WAREHOUSE => {
                    let sql = "SELECT fecha, region, segmento_cliente, revenue_bruto, revenue_neto, transacciones FROM t ORDER BY 1, 2, 3";
                    let query = Query { sql: sql.into(), inputs: vec![("t".into(), Input::Delta(WAREHOUSE.into()))] };
                    format!("{:?}", lake.query(&query).await.expect("the table is read"))
                }
                table => canonical_hash(&lake, table).await.expect("the table is read"),
            };
            out.insert((*table).to_owned(), seen);
        }
        out
    }
}

const WAREHOUSE: &str = "warehouse/analytics.metricas_diarias";

fn is_held<T>(result: &Result<T, DayError>) -> bool {
    matches!(result, Err(DayError::Held { gate: "model_tests", .. }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_held_by_its_models_leaves_the_version_before_in_every_table() {
    let shop = Shop::new();
    let tables = [STAGING, MART, WAREHOUSE];
    // A first day that is held leaves empty tables, or none.
    shop.run(&shop.good, FIRST).await.expect("the day is published");
    let one_day = shop.seen(&tables).await;
    assert!(is_held(&shop.run(&shop.bad, SECOND).await));
    assert_eq!(shop.seen(&tables).await, one_day, "a day that never was published is in no table");
    shop.run(&shop.good, SECOND).await.expect("the day is published");
    let both = shop.seen(&tables).await;
    assert_ne!(both, one_day);
    assert!(is_held(&shop.run(&shop.bad, SECOND).await));
    assert_eq!(shop.seen(&tables).await, both, "the version that was published stays");
    // Once it is put right, it is published like any other.
    shop.run(&shop.good, SECOND).await.expect("the day is published");
    assert_eq!(shop.seen(&tables).await, both);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checks_before_processing_are_made_again_for_a_day_that_is_put_right_by_hand() {
    let shop = Shop::new();
    let platform = shop.process(&shop.good, i64::MAX, false).await;
    let Ports { env, ledger, tables, .. } = &platform.ports;
    let fecha = day(FIRST);
    let run = || async { platform.run_day(fecha, env.now()).await.expect("the ledger works").result.expect("published") };
    let of_source = || async {
        let all = ledger.quality(fecha).await.expect("the ledger answers");
        all.into_iter().filter(|r| r.layer == SOURCE).collect::<Vec<_>>()
    };
    run().await;
    assert_eq!(of_source().await, [], "nothing had failed");
    let found = source_checks(&**tables, &platform.contract, fecha, || env.now()).await;
    let failed: Vec<_> = found.iter().map(|r| QualityResult { passed: false, ..r.clone() }).collect();
    ledger.put_quality(&failed).await.expect("kept");
    run().await;
    let outcomes = |all: &[QualityResult]| all.iter().map(|r| (r.check.clone(), r.passed)).collect::<BTreeMap<_, _>>();
    let kept = of_source().await;
    assert_eq!((kept.len(), outcomes(&kept)), (6, outcomes(&found)), "the newest of each check is what is so now");
}

/// Every third death takes a moment; a certification takes each.
fn step() -> usize {
    match std::env::var("SIMULACRO_DEATHS_STEP") {
        Err(_) => 7,
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("SIMULACRO_DEATHS_STEP: found {text:?}, expected a number")),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_death_at_any_call_of_a_held_day_shows_nobody_a_mart_and_the_next_run_puts_staging_back() {
    let shop = Shop::new();
    let tables = [STAGING, MART, WAREHOUSE];
    for fecha in [FIRST, SECOND] {
        shop.run(&shop.good, fecha).await.expect("the day is published");
    }
    let published = shop.seen(&tables).await;
    let (mut deaths, mut unjudged) = (0, 0);
    for calls in (0..).step_by(step()) {
        let dying = shop.process(&shop.bad, calls, calls % 2 == 0).await;
        let result = dying.run_day(day(SECOND), dying.ports.env.now()).await;
        let at = format!("death at call {calls}");
        let marts = shop.seen(&tables[1..]).await;
        assert!(marts.iter().all(|(table, hash)| published[table] == *hash), "{at}");
        if result.as_ref().is_ok_and(|outcome| is_held(&outcome.result)) && dying_is_alive(&dying).await {
            assert_eq!(shop.seen(&tables).await, published, "{at}: it was held to its end");
            break;
        }
        deaths += 1;
        unjudged += u32::from(shop.seen(&[STAGING]).await[STAGING] != published[STAGING]);
        // The next run is of another day, and is none the wiser.
        shop.run(&shop.good, FIRST).await.expect("the day is published");
        assert_eq!(shop.seen(&tables).await, published, "{at}");
    }
    println!("{deaths} deaths, {unjudged} of them with staging that was not judged");
    assert!(deaths > 5, "only {deaths} deaths");
    assert!(unjudged > 0, "no death was between staging and the tests");
}

/// Whether the store of a process still answers.
async fn dying_is_alive(platform: &Platform) -> bool {
    platform.ports.objects.list_with_delimiter(None).await.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_task_of_a_day_is_told_whether_it_was_published_held_or_failed() {
    const PUBLISHED: [&str; 9] = [
        "verificar_fuentes",
        "extraer_ventas",
        "quality_gate_raw",
        "extraer_clientes",
        "transformar",
        "models",
        "model_tests",
        "quality_gate_final",
        "notificar",
    ];
    let shop = Shop::new();
    // Name and outcome of each task as the run's report tells them, held against what the ledger keeps of each.
    let told = async |platform: &Platform, outcome: &DayOutcome| {
        let all = platform.ports.ledger.metrics(outcome.run.fecha).await.expect("the ledger answers");
        let mine: BTreeMap<_, _> = all.iter().filter(|m| m.run_id == outcome.run.run_id).map(|m| (m.asset.clone(), m)).collect();
        let text = |task: &serde_json::Value, key: &str| task[key].as_str().expect("a text").to_owned();
        let tasks = outcome.run.report["tasks"].as_array().expect("the tasks of the run");
        let tasks: Vec<_> = tasks.iter().map(|t| (text(t, "task"), text(t, "outcome"))).collect();
        let names: Vec<&str> = tasks.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, PUBLISHED[..names.len()], "in order, up to where the day stopped");
        let kept: BTreeSet<&str> = mine.keys().map(String::as_str).collect();
        assert_eq!(kept, names.into_iter().chain(["notificar"]).collect());
        for m in mine.values() {
            let fates = m.published + m.deduplicated + m.quarantined + m.rejected + m.late + m.dead_lettered;
            assert_eq!(m.expected_rows, fates, "{m:?}");
        }
        let (last, how) = tasks.last().expect("a task").clone();
        let rows = (mine[&last].expected_rows > 0, mine[&last].actual_rows > 0);
        (last, how, rows)
    };
    let run = async |source: &Path, calls: i64, fecha: &str| {
        let platform = shop.process(source, calls, false).await;
        let outcome = platform.run_day(day(fecha), platform.ports.env.now()).await;
        (platform, outcome)
    };
    let (platform, outcome) = run(&shop.good, i64::MAX, FIRST).await;
    let published = told(&platform, &outcome.expect("the ledger works")).await;
    assert_eq!(published, ("quality_gate_final".to_owned(), "succeeded".to_owned(), (true, true)));
    let (platform, outcome) = run(&shop.bad, i64::MAX, SECOND).await;
    let held = told(&platform, &outcome.expect("the ledger works")).await;
    assert_eq!(held, ("model_tests".to_owned(), "held".to_owned(), (true, false)));
    // The store goes away at different tasks; before the first one there is no run.
    let mut failed = BTreeSet::new();
    for calls in (0..2_000).step_by(9) {
        match run(&shop.good, calls, SECOND).await {
            (platform, Ok(outcome)) if outcome.run.state == RunState::Failed => {
                let (last, how, (_, went_on)) = told(&platform, &outcome).await;
                assert_eq!((how.as_str(), went_on), ("failed", false), "{last}");
                failed.insert(last);
            }
            (_, Ok(_)) => break,
            (_, Err(_)) => {}
        }
    }
    assert!(failed.len() > 1 && failed.contains("transformar"), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_refuse_a_null_where_their_contract_has_none() {
    let shop = Shop::new();
    shop.run(&shop.good, FIRST).await.expect("the day is published");
    let lake = DeltaLakehouse::new(shop.store.clone());
    for (table, column, may) in
        [(STAGING, "region", "segmento"), (STAGING, "monto_neto", "marca"), (MART, "segmento_cliente", "tasa_conversion")]
    {
        let with_null = |column: &str| {
            let nothing =
                format!("SELECT * REPLACE (nullif({column}, {column}) AS {column}) FROM t WHERE fecha = DATE '{FIRST}'");
            let query = Query { sql: nothing, inputs: vec![("t".into(), Input::Delta(table.into()))] };
            DayWrite { table: table.into(), fecha: day(FIRST), epoch: 1_000, query }
        };
        let error = lake.overwrite_day(with_null(column)).await.expect_err("a null is refused");
        assert_eq!(error.disposition, Disposition::Permanent, "{}", error.chain());
        assert!(error.chain().contains(&format!("column {column}: found")), "{}", error.chain());
        // It is the contract's word, not a habit of the table.
        let sql = format!("SELECT {column}, {may} FROM t");
        let read = lake.query(&Query { sql, inputs: vec![("t".into(), Input::Delta(table.into()))] }).await.expect("rows");
        let nullable: Vec<_> = read[0].schema().fields().iter().map(|f| f.is_nullable()).collect();
        assert_eq!(nullable, [false, true], "{table}");
    }
}
