//! The orchestrator over toy assets, on a clock that jumps from timer to timer: a month takes seconds.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use serde_json::{Value, json};
use simulacro_core::{
    contract::{Severity, check::QualityResult},
    history::{Event, Recorder, recorded_ledger, recorded_notifier},
    orchestrator::{
        Asset, AssetSettings, BreakerPolicy, Job, LEASE, LoopConfig, Orchestrator, OrchestratorPorts, Plan, RetryPolicy,
        Schedule, Slot, SourcePolicy, Status, Work, WorkError, pause, resume,
    },
    ports::{
        Alert, Env, Fact, Fence, Fold, Lease, Notifier, PipelineMetric, PortError, Result, Run, RunLedger, RunStart, RunState,
    },
};
use simulacro_sim::{
    host::Host,
    ledger::SimLedger,
    ports::{SimHistory, SimMetrics},
};
use tokio::task::JoinHandle;

/// A clock that is tokio's paused one.
#[derive(Debug)]
struct Paused {
    origin: tokio::time::Instant,
    ids: AtomicU64,
}

#[async_trait]
impl Env for Paused {
    fn now(&self) -> DateTime<Utc> {
        time("2024-03-17T12:00:00Z") + self.origin.elapsed()
    }
    #[expect(clippy::disallowed_methods, reason = "a test's Env; tokio's clock is virtual here")]
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn random(&self) -> u64 {
        // The same draws in every run.
        self.ids.fetch_add(1, Ordering::SeqCst).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    }
    fn new_id(&self) -> String {
        format!("r-{}", self.ids.fetch_add(1, Ordering::SeqCst))
    }
}

fn time(text: &str) -> DateTime<Utc> {
    text.parse().unwrap_or_else(|_| panic!("{text} is no time"))
}

/// A time of March 2024: day and clock.
fn march(day: u32, clock: &str) -> DateTime<Utc> {
    time(&format!("2024-03-{day:02}T{clock}:00Z"))
}

fn day(day: u32) -> NaiveDate {
    NaiveDate::from_ymd_opt(2024, 3, day).expect("a day")
}

type Windows = Vec<(DateTime<Utc>, DateTime<Utc>)>;

fn within(windows: &[(DateTime<Utc>, DateTime<Utc>)], now: DateTime<Utc>) -> bool {
    windows.iter().any(|(from, to)| (*from..*to).contains(&now))
}

/// What a toy did, across all processes.
#[derive(Debug, Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    at_work: Mutex<BTreeMap<String, u32>>,
    together: AtomicU64,
}

impl Log {
    fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Work that takes time, and is away, slow, broken or poor in rows when it is told to be.
#[derive(Debug, Clone)]
struct Toy {
    name: &'static str,
    env: Arc<Paused>,
    log: Arc<Log>,
    takes: Duration,
    away: Windows,
    broken: Windows,
    full: Windows,
    slow: Windows,
    poor: Windows,
}

/// Says how a run of a toy ended, also when it was dropped.
struct AtWork<'a> {
    toy: &'a Toy,
    what: String,
    how: &'static str,
}

impl Toy {
    fn note(&self, what: &str, how: &str) {
        let line = format!("{} {} {what} {how}", self.env.now().format("%d %H:%M:%S"), self.name);
        self.log.lines.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }
}

impl<'a> AtWork<'a> {
    fn begin(toy: &'a Toy, job: &Job) -> Self {
        let what = format!("{} epoch {}", job.slot.fecha.format("%d"), job.run.epoch);
        toy.note(&what, "begins");
        let mut at_work = toy.log.at_work.lock().unwrap_or_else(PoisonError::into_inner);
        let count = at_work.entry(toy.name.to_owned()).or_default();
        *count += 1;
        if *count > 1 {
            toy.log.together.fetch_add(1, Ordering::SeqCst);
        }
        Self { toy, what, how: "is cut off" }
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.toy.note(&self.what, self.how);
        let mut at_work = self.toy.log.at_work.lock().unwrap_or_else(PoisonError::into_inner);
        *at_work.entry(self.toy.name.to_owned()).or_default() -= 1;
    }
}

#[async_trait]
impl Work for Toy {
    async fn ready(&self) -> Result<()> {
        if within(&self.away, self.env.now()) {
            return Err(PortError::retryable("connect to the toy's source").code("ECONNREFUSED"));
        }
        Ok(())
    }
    async fn checks(&self, slot: Slot) -> Vec<QualityResult> {
        let passed = !within(&self.poor, self.env.now());
        let result = |check: &str, observed: &str| QualityResult {
            check: check.into(),
            layer: "source".into(),
            asset: self.name.into(),
            fecha: slot.fecha,
            severity: Severity::Error,
            passed,
            observed: observed.into(),
            expected: "better".into(),
            failing_rows: 0,
            checked_at: self.env.now(),
        };
        vec![result("min_rows_yesterday", "3 rows"), result("schema_unchanged", "another schema")]
    }
    async fn floor(&self, _fecha: NaiveDate) -> Result<i64> {
        Ok(0)
    }
    async fn run(&self, job: &Job) -> std::result::Result<Value, WorkError> {
        let mut at_work = AtWork::begin(self, job);
        let takes = if within(&self.slow, self.env.now()) { Duration::from_secs(86_400) } else { self.takes };
        self.env.sleep(takes).await;
        if within(&self.broken, self.env.now()) {
            at_work.how = "fails";
            return Err(WorkError::Port(PortError::unknown("write the toy").code("EIO")));
        }
        if within(&self.full, self.env.now()) {
            at_work.how = "finds no room";
            return Err(WorkError::Port(PortError::retryable("write the toy").because(std::io::Error::from_raw_os_error(28))));
        }
        at_work.how = "ends";
        Ok(json!({ "rows": 1 }))
    }
}

/// A pager that remembers calls in order, and is away when it is told to be.
#[derive(Debug)]
struct Pager {
    env: Arc<Paused>,
    away: Mutex<Windows>,
    calls: Mutex<Vec<String>>,
}

impl Pager {
    fn call(&self, what: String) -> Result<()> {
        if within(&self.away.lock().unwrap_or_else(PoisonError::into_inner), self.env.now()) {
            return Err(PortError::unknown("call the pager").code("ETIMEDOUT"));
        }
        let line = format!("{} {what}", self.env.now().format("%d %H:%M"));
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        Ok(())
    }
    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Notifier for Pager {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        self.call(format!("P{} {}", alert.priority, alert.dedup_key))
    }
    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        self.call(format!("resolve {dedup_key}"))
    }
}

/// A ledger behind a network that is cut at times.
#[derive(Debug)]
struct Cut {
    inner: SimLedger,
    env: Arc<Paused>,
    cut: Windows,
}

macro_rules! through {
    ($self:ident, $call:expr) => {{
        if within(&$self.cut, $self.env.now()) {
            return Err(PortError::retryable("reach the ledger").code("ENETUNREACH"));
        }
        $call.await
    }};
}

#[async_trait]
impl RunLedger for Cut {
    async fn start(&self, start: &RunStart) -> Result<Run> {
        through!(self, self.inner.start(start))
    }
    async fn finish(&self, run: &Run) -> Result<()> {
        through!(self, self.inner.finish(run))
    }
    async fn abandon(&self, run: &Run) -> Result<()> {
        // Letting go is local.
        self.inner.abandon(run).await
    }
    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        through!(self, self.inner.runs(pipeline))
    }
    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>> {
        through!(self, self.inner.runs_since(pipeline, from))
    }
    async fn fold_runs(&self, fold: &Fold, fence: Option<&Fence>) -> Result<()> {
        through!(self, self.inner.fold_runs(fold, fence))
    }
    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        through!(self, self.inner.acquire_lease(name, holder, ttl, now))
    }
    async fn renew_lease(&self, lease: &Lease, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        through!(self, self.inner.renew_lease(lease, ttl, now))
    }
    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        through!(self, self.inner.release_lease(lease))
    }
    async fn lease(&self, name: &str) -> Result<Option<Lease>> {
        through!(self, self.inner.lease(name))
    }
    async fn put_fact(&self, fact: &Fact, fence: Option<&Fence>) -> Result<()> {
        through!(self, self.inner.put_fact(fact, fence))
    }
    async fn facts(&self, topic: &str) -> Result<Vec<Fact>> {
        through!(self, self.inner.facts(topic))
    }
    async fn put_metrics(&self, metrics: &[PipelineMetric]) -> Result<()> {
        through!(self, self.inner.put_metrics(metrics))
    }
    async fn metrics(&self, fecha: NaiveDate) -> Result<Vec<PipelineMetric>> {
        through!(self, self.inner.metrics(fecha))
    }
    async fn put_quality(&self, results: &[QualityResult]) -> Result<()> {
        through!(self, self.inner.put_quality(results))
    }
    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64> {
        through!(self, self.inner.thin_quality(layer, fecha, before))
    }
    async fn quality(&self, fecha: NaiveDate) -> Result<Vec<QualityResult>> {
        through!(self, self.inner.quality(fecha))
    }
}

/// Services that outlive the orchestrators.
struct World {
    env: Arc<Paused>,
    ledger: SimLedger,
    pager: Arc<Pager>,
    metrics: Arc<SimMetrics>,
    history: Arc<SimHistory>,
    log: Arc<Log>,
}

/// A process with an orchestrator. Aborting it is a kill: nothing of it runs on.
struct Process(JoinHandle<Result<()>>);

impl Process {
    async fn kill(self) {
        self.0.abort();
        assert!(self.0.await.expect_err("it was at work").is_cancelled());
    }
}

impl World {
    fn new() -> Self {
        let env = Arc::new(Paused { origin: tokio::time::Instant::now(), ids: AtomicU64::new(0) });
        let pager = Arc::new(Pager { env: env.clone(), away: Mutex::default(), calls: Mutex::default() });
        let ledger = SimLedger::new(Arc::new(Host::new("services", [])));
        Self { env, ledger, pager, metrics: Arc::default(), history: Arc::default(), log: Arc::default() }
    }

    fn toy(&self, name: &'static str) -> Toy {
        let (env, log, takes) = (self.env.clone(), self.log.clone(), Duration::from_secs(600));
        Toy { name, env, log, takes, away: vec![], broken: vec![], full: vec![], slow: vec![], poor: vec![] }
    }

    fn start(&self, name: &str, toys: Vec<(Asset, Toy)>, cut: Windows) -> Process {
        self.start_with(config(), name, toys, cut)
    }

    fn start_with(&self, config: LoopConfig, name: &str, toys: Vec<(Asset, Toy)>, cut: Windows) -> Process {
        let works = toys.into_iter().map(|(asset, toy)| (asset, Arc::new(toy) as Arc<dyn Work>)).collect();
        let plan = Plan::new(config, works, &BTreeMap::new()).expect("a plan");
        let recorder = Recorder::new(self.env.clone(), self.history.clone());
        let inner = self.ledger.connect(Arc::new(Host::new("orchestrator", []))).expect("the ledger is there");
        let ledger = recorded_ledger(Arc::new(Cut { inner, env: self.env.clone(), cut }), recorder.clone());
        let notifier = recorded_notifier(self.pager.clone(), recorder.clone());
        let ports = OrchestratorPorts { env: self.env.clone(), ledger, notifier, metrics: self.metrics.clone(), recorder };
        let orchestrator = Orchestrator { plan, ports, holder: name.into() };
        Process(tokio::spawn(async move { orchestrator.run(std::future::pending()).await }))
    }

    async fn until(&self, at: DateTime<Utc>) {
        self.env.sleep((at - self.env.now()).to_std().expect("a time to come")).await;
    }

    /// The runs of an asset: day, epoch, state.
    async fn runs(&self, asset: &str) -> Vec<String> {
        let runs = self.ledger.runs(asset).await.expect("the ledger answers");
        runs.iter().map(|r| format!("{} {} {}", r.fecha.format("%d"), r.epoch, r.state.as_str())).collect()
    }

    /// A person has a day made.
    async fn succeeds_by_hand(&self, asset: &str, fecha: NaiveDate) {
        let ledger: &dyn RunLedger = &self.ledger;
        let mut run = ledger.begin(asset, fecha, "a mano", 0, self.env.now()).await.expect("nobody runs it");
        (run.state, run.finished_at) = (RunState::Succeeded, Some(self.env.now()));
        ledger.finish(&run).await.expect("the run ends");
    }

    fn metric(&self, name: &str) -> f64 {
        self.metrics.values.lock().expect("metrics").get(name).copied().unwrap_or(0.0)
    }
}

fn config() -> LoopConfig {
    LoopConfig { lease_ttl_s: 300, renew_every_s: 60, clock_skew_s: 10, poll_s: 30, alert_backoff_s: 60, alert_give_up_s: 7_200 }
}

/// Daily at three for the day before, promised for six; as the platform's own batch.
fn daily(name: &str) -> Asset {
    Asset {
        name: name.into(),
        owner: "datos".into(),
        depends_on: Vec::new(),
        schedule: Schedule::parse("0 3 * * *").expect("a schedule"),
        lag_days: 1,
        source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
        alert_after_s: 900,
        timeout_s: 3_600,
        retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
        breaker: BreakerPolicy { open_s: 600, trials: 2 },
        sla_s: Some(10_800),
        priority: 1,
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_of_a_day_processes_the_day_before_at_its_schedule() {
    let world = World::new();
    let _process = world.start("a", vec![(daily("diario"), world.toy("diario"))], vec![]);
    world.until(march(20, "12:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 succeeded", "18 1 succeeded", "19 1 succeeded"]);
    assert_eq!(world.log.lines()[..2], ["18 03:00:00 diario 17 epoch 1 begins", "18 03:10:00 diario 17 epoch 1 ends"]);
    let run = &world.ledger.runs("diario").await.expect("runs")[0];
    assert_eq!((run.scheduled_at, run.fence.as_ref().map(|f| f.token)), (Some(march(18, "03:00")), Some(1)));
    assert_eq!(world.pager.calls(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_maintenance_window_is_waited_out_with_one_alert_and_no_human() {
    let world = World::new();
    let toy = Toy { away: vec![(march(18, "02:00"), march(18, "04:00"))], ..world.toy("diario") };
    let _process = world.start("a", vec![(daily("diario"), toy)], vec![]);
    world.until(march(18, "12:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 succeeded"]);
    assert_eq!(world.log.lines()[0], "18 04:00:00 diario 17 epoch 1 begins");
    let key = "source_unavailable:diario:2024-03-17";
    assert_eq!(world.pager.calls(), [format!("18 03:15 P2 {key}"), format!("18 04:00 resolve {key}")]);
}

#[tokio::test(start_paused = true)]
async fn a_missed_sla_is_told_once_at_its_moment_and_resolved_when_published_late() {
    let world = World::new();
    let slow = Toy { takes: Duration::from_secs(4 * 3_600), ..world.toy("diario") };
    let asset = Asset { timeout_s: 5 * 3_600, ..daily("diario") };
    let process = world.start("a", vec![(asset.clone(), slow.clone())], vec![]);
    world.until(march(18, "06:30")).await;
    assert_eq!(world.pager.calls(), ["18 06:00 P1 sla_missed:diario:2024-03-17"]);
    // Another process finds the alert in the ledger, and does not raise it again.
    process.kill().await;
    let _process = world.start("b", vec![(asset, slow)], vec![]);
    world.until(march(18, "12:00")).await;
    let expected = ["18 06:00 P1 sla_missed:diario:2024-03-17", "18 10:34 resolve sla_missed:diario:2024-03-17"];
    assert_eq!(world.pager.calls(), expected);
    assert_eq!(world.metric("simulacro_sla_missed_total{asset=diario}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_run_by_hand_ends_the_incident_of_its_day() {
    let world = World::new();
    let toy = Toy { broken: vec![(march(18, "00:00"), march(19, "00:00"))], ..world.toy("diario") };
    let _process = world.start("a", vec![(daily("diario"), toy)], vec![]);
    world.until(march(18, "12:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 failed", "17 2 failed", "17 3 failed", "17 4 failed"]);
    let open = world.pager.calls();
    assert!(open.iter().any(|c| c.ends_with("P1 run_failed:diario:2024-03-17")), "{open:?}");
    world.succeeds_by_hand("diario", day(17)).await;
    world.until(march(18, "12:05")).await;
    let ended: Vec<String> = world.pager.calls().into_iter().filter(|c| c.contains("resolve")).collect();
    assert_eq!(ended, ["18 12:00 resolve run_failed:diario:2024-03-17", "18 12:00 resolve sla_missed:diario:2024-03-17"]);
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_is_told_at_the_first_try_and_the_next_ones_go_on() {
    let world = World::new();
    let full = vec![(march(18, "00:00"), march(18, "03:03"))];
    let toy = Toy { takes: Duration::from_secs(60), full, ..world.toy("diario") };
    let _process = world.start("a", vec![(daily("diario"), toy)], vec![]);
    world.until(march(18, "12:00")).await;
    let runs = world.runs("diario").await;
    assert!(runs.len() > 1 && runs[0] == "17 1 failed" && runs[runs.len() - 1].ends_with("succeeded"), "{runs:?}");
    let key = "run_failed:diario:2024-03-17";
    let calls = world.pager.calls();
    assert!(
        calls.len() == 2 && calls[0] == format!("18 03:01 P1 {key}") && calls[1].ends_with(&format!("resolve {key}")),
        "{calls:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_run_that_takes_too_long_is_cancelled_told_as_such_and_tried_again() {
    let world = World::new();
    let toy = Toy { slow: vec![(march(18, "03:00"), march(18, "03:30"))], ..world.toy("diario") };
    let _process = world.start("a", vec![(daily("diario"), toy)], vec![]);
    world.until(march(18, "12:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 failed", "17 2 succeeded"]);
    let lines = world.log.lines();
    assert_eq!(lines[1], "18 04:00:00 diario 17 epoch 1 is cut off");
    assert!(lines[2].as_str() > "18 04:00:00" && lines[2].as_str() < "18 04:05:01", "{lines:?}");
    let report = &world.ledger.runs("diario").await.expect("runs")[0].report;
    assert_eq!(report["error"], "cancelled: no end within 3600 s");
    assert_eq!(report["code"], "TIMEOUT");
}

#[tokio::test(start_paused = true)]
async fn what_depends_on_another_waits_for_it_and_is_skipped_without_it() {
    let world = World::new();
    let after = Asset { depends_on: vec!["diario".into()], sla_s: None, ..daily("atributos") };
    let broken = vec![(march(19, "00:00"), march(20, "00:00"))];
    let toys = vec![(daily("diario"), Toy { broken, ..world.toy("diario") }), (after, world.toy("atributos"))];
    let _process = world.start("a", toys, vec![]);
    world.until(march(20, "12:00")).await;
    assert_eq!(world.runs("atributos").await, ["17 1 succeeded", "18 1 skipped", "19 1 succeeded"]);
    let first: Vec<String> = world.log.lines().into_iter().take(3).collect();
    assert_eq!(first[1], "18 03:10:00 diario 17 epoch 1 ends");
    assert_eq!(first[2], "18 03:10:30 atributos 17 epoch 1 begins");
    let skipped = &world.ledger.runs("atributos").await.expect("runs")[1];
    assert_eq!(skipped.report["reason"], "upstream");
    assert!(skipped.report["why"].as_str().is_some_and(|w| w.contains("diario") && w.contains("failed")), "{skipped:?}");
}

#[tokio::test(start_paused = true)]
async fn after_a_standstill_only_the_newest_turn_is_run_and_the_others_are_recorded() {
    let world = World::new();
    let toys = || vec![(daily("diario"), world.toy("diario"))];
    let process = world.start("a", toys(), vec![]);
    world.until(march(18, "12:00")).await;
    process.kill().await;
    world.until(march(22, "08:00")).await;
    let _process = world.start("b", toys(), vec![]);
    world.until(march(23, "12:00")).await;
    let expected = ["17 1 succeeded", "18 1 skipped", "19 1 skipped", "20 1 skipped", "21 1 succeeded", "22 1 succeeded"];
    assert_eq!(world.runs("diario").await, expected);
    let skipped = &world.ledger.runs("diario").await.expect("runs")[1];
    assert_eq!(skipped.report, json!({ "reason": "missed", "instead": march(22, "03:00") }));
    let calls = world.pager.calls();
    assert_eq!(calls[..2], ["22 08:00 P3 schedule_missed:diario:2024-03-20", "22 08:00 P1 sla_missed:diario:2024-03-21"]);
}

#[tokio::test(start_paused = true)]
async fn a_new_asset_begins_with_its_next_schedule() {
    let world = World::new();
    world.until(march(18, "04:00")).await;
    let _process = world.start("a", vec![(daily("diario"), world.toy("diario"))], vec![]);
    world.until(march(18, "23:00")).await;
    assert_eq!((world.runs("diario").await, world.pager.calls()), (vec![], vec![]));
    world.until(march(19, "04:00")).await;
    assert_eq!(world.runs("diario").await, ["18 1 succeeded"]);
}

#[tokio::test(start_paused = true)]
async fn a_crash_is_resumed_and_what_was_done_is_not_done_again() {
    let world = World::new();
    let quick = Asset { sla_s: None, ..daily("rapido") };
    let toys = || {
        let quick_toy = Toy { takes: Duration::from_secs(10), ..world.toy("rapido") };
        vec![(daily("diario"), world.toy("diario")), (quick.clone(), quick_toy)]
    };
    let process = world.start("a", toys(), vec![]);
    world.until(march(18, "03:05")).await;
    process.kill().await;
    let _process = world.start("b", toys(), vec![]);
    world.until(march(18, "12:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 failed", "17 2 succeeded"]);
    assert_eq!(world.runs("rapido").await, ["17 1 succeeded"]);
    let report = &world.ledger.runs("diario").await.expect("runs")[0].report;
    assert_eq!(report["error"], "the process died");
    // The lease of the dead runs out at 03:09; the heir asks every half minute.
    let begins: Vec<String> = world.log.lines().into_iter().filter(|l| l.contains("epoch 2 begins")).collect();
    assert!(begins.len() == 1 && begins[0].as_str() > "18 03:05" && begins[0].as_str() < "18 03:10:31", "{begins:?}");
    assert_eq!(world.pager.calls(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_process_that_dies_at_every_try_is_given_up_after_the_tries_of_its_policy() {
    let world = World::new();
    world.until(march(18, "02:00")).await;
    for hour in 3..9 {
        let asset = Asset { timeout_s: 5 * 3_600, ..daily("diario") };
        let toy = Toy { takes: Duration::from_secs(4 * 3_600), ..world.toy("diario") };
        let process = world.start(&format!("p-{hour}"), vec![(asset, toy)], vec![]);
        world.until(march(18, &format!("{hour:02}:07"))).await;
        process.kill().await;
    }
    let runs = world.runs("diario").await;
    assert_eq!(runs, ["17 1 failed", "17 2 failed", "17 3 failed", "17 4 failed", "17 5 failed"]);
    let last = world.ledger.runs("diario").await.expect("runs").pop().expect("a run");
    assert_eq!((last.report["error"].as_str(), last.report["final"].as_bool()), (Some("gave up after 4 tries"), Some(true)));
    assert!(world.pager.calls().iter().any(|c| c.ends_with("P1 run_failed:diario:2024-03-17")), "{:?}", world.pager.calls());
}

#[tokio::test(start_paused = true)]
async fn of_two_orchestrators_one_runs_and_a_lost_lease_hands_over() {
    let world = World::new();
    let toys = || vec![(daily("diario"), world.toy("diario"))];
    // The first is cut off from the ledger in the middle of its run.
    let _first = world.start("a", toys(), vec![(march(18, "03:02"), march(18, "05:00"))]);
    world.until(march(17, "12:01")).await;
    let _second = world.start("b", toys(), vec![]);
    world.until(march(18, "03:01")).await;
    let holder = |lease: Option<Lease>| lease.map(|l| (l.holder, l.token));
    assert_eq!(holder(world.ledger.lease(LEASE).await.expect("lease")), Some(("a".into(), 1)));
    world.until(march(19, "12:00")).await;
    assert_eq!(holder(world.ledger.lease(LEASE).await.expect("lease")), Some(("b".into(), 2)));
    assert_eq!(world.runs("diario").await, ["17 1 failed", "17 2 succeeded", "18 1 succeeded"]);
    assert_eq!(world.log.together.load(Ordering::SeqCst), 0, "{:?}", world.log.lines());
    let lines = world.log.lines();
    assert!(lines[1].ends_with("17 epoch 1 is cut off") && lines[1].as_str() < "18 03:06:51", "{lines:?}");
    assert!(lines[2].ends_with("17 epoch 2 begins"), "{lines:?}");
    let tokens: Vec<_> = world.ledger.runs("diario").await.expect("runs").into_iter().map(|r| r.fence.map(|f| f.token)).collect();
    assert_eq!(tokens, [Some(1), Some(2), Some(2)]);
}

#[tokio::test(start_paused = true)]
async fn a_stopped_orchestrator_gives_its_lease_back_and_the_next_goes_on_at_once() {
    let world = World::new();
    let works = vec![(daily("diario"), Arc::new(world.toy("diario")) as Arc<dyn Work>)];
    let plan = Plan::new(config(), works, &BTreeMap::<String, AssetSettings>::new()).expect("a plan");
    let recorder = Recorder::new(world.env.clone(), world.history.clone());
    let ledger = Arc::new(world.ledger.connect(Arc::new(Host::new("o", []))).expect("the ledger is there"));
    let (notifier, metrics) = (world.pager.clone(), world.metrics.clone());
    let ports = OrchestratorPorts { env: world.env.clone(), ledger, notifier, metrics, recorder };
    let orchestrator = Orchestrator { plan, ports, holder: "a".into() };
    orchestrator.run(world.until(march(18, "03:05"))).await.expect("it stops");
    assert_eq!(world.ledger.lease(LEASE).await.expect("lease"), None);
    let run = world.ledger.runs("diario").await.expect("runs").pop().expect("a run");
    assert_eq!((run.state, &run.report["error"]), (RunState::Failed, &json!("the orchestrator was stopped")));
    orchestrator.run(world.until(march(18, "12:00"))).await.expect("it stops");
    assert_eq!(world.runs("diario").await, ["17 1 failed", "17 2 succeeded"]);
    assert_eq!(world.log.lines()[2], "18 03:05:00 diario 17 epoch 2 begins");
}

#[tokio::test(start_paused = true)]
async fn a_paused_asset_is_skipped_and_recorded_and_not_failed() {
    let world = World::new();
    let asset = daily("diario");
    let _process = world.start("a", vec![(asset.clone(), world.toy("diario"))], vec![]);
    world.until(march(18, "12:00")).await;
    pause(&world.ledger, "diario", "", "nadie", world.env.now()).await.expect_err("nobody pauses");
    pause(&world.ledger, "diario", "ana", "inventario anual", world.env.now()).await.expect("it is paused");
    world.until(march(19, "12:00")).await;
    let status = Status::read(&world.ledger, &[&asset], 5, world.env.now()).await.expect("the ledger answers").to_string();
    for part in ["leader     a (token 1", "paused by ana since 2024-03-18 12:00:00: inventario anual", "18 run 1 skipped"] {
        assert!(status.contains(part), "{part} is not in\n{status}");
    }
    let ended = resume(&world.ledger, "diario", world.env.now()).await.expect("the ledger answers").expect("a pause");
    assert_eq!(ended.by, "ana");
    world.until(march(20, "12:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 succeeded", "18 1 skipped", "19 1 succeeded"]);
    let report = &world.ledger.runs("diario").await.expect("runs")[1].report;
    assert_eq!((&report["reason"], &report["by"], &report["why"]), (&json!("paused"), &json!("ana"), &json!("inventario anual")));
    assert_eq!(world.pager.calls(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn a_breaker_tells_of_all_failures_at_once_and_closes_when_a_trial_passes() {
    let world = World::new();
    let toy = Toy { poor: vec![(march(18, "00:00"), march(18, "03:15"))], ..world.toy("diario") };
    let _process = world.start("a", vec![(daily("diario"), toy)], vec![]);
    world.until(march(18, "12:00")).await;
    // 03:00 fails, 03:10 fails as the first trial, 03:20 passes as the second.
    assert_eq!(world.runs("diario").await, ["17 1 succeeded"]);
    assert_eq!(world.log.lines()[0], "18 03:20:00 diario 17 epoch 1 begins");
    let key = "breaker_open:diario:2024-03-17";
    assert_eq!(world.pager.calls(), [format!("18 03:00 P1 {key}"), format!("18 03:20 resolve {key}")]);
    let checks = world.ledger.quality(day(17)).await.expect("results");
    assert_eq!(checks.iter().map(|c| c.passed).collect::<Vec<_>>(), [false, false, false, false, true, true]);
    assert_eq!(world.metric("simulacro_breaker_open{asset=diario}"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_stays_open_holds_the_day_after_its_trials_with_one_alert() {
    let world = World::new();
    let asset = daily("diario");
    let toy = Toy { poor: vec![(march(18, "00:00"), march(18, "23:00"))], ..world.toy("diario") };
    let process = world.start("a", vec![(asset.clone(), toy.clone())], vec![]);
    world.until(march(18, "03:05")).await;
    // A crash does not give it more trials.
    process.kill().await;
    let _process = world.start("b", vec![(asset, toy)], vec![]);
    world.until(march(19, "12:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 failed", "17 2 held", "18 1 succeeded"]);
    assert_eq!(world.ledger.quality(day(17)).await.expect("results").len(), 6, "three rounds of two checks");
    let report = &world.ledger.runs("diario").await.expect("runs")[1].report;
    let text = report["error"].as_str().expect("a text");
    assert!(text.contains("min_rows_yesterday: found 3 rows") && text.contains("schema_unchanged: found another"), "{text}");
    let raised: Vec<String> = world.pager.calls().into_iter().filter(|c| !c.contains("sla_missed")).collect();
    assert_eq!(raised, ["18 03:00 P1 breaker_open:diario:2024-03-17"]);
}

#[tokio::test(start_paused = true)]
async fn a_breaker_closes_when_a_person_has_made_the_day_that_it_held() {
    let world = World::new();
    let toy = Toy { poor: vec![(march(18, "00:00"), march(18, "05:00"))], ..world.toy("diario") };
    let _process = world.start("a", vec![(daily("diario"), toy)], vec![]);
    world.until(march(18, "05:00")).await;
    assert_eq!(world.runs("diario").await, ["17 1 held"]);
    let gauge = || world.metric("simulacro_breaker_open{asset=diario}");
    assert_eq!((world.ledger.facts("breaker").await.expect("facts").len(), gauge()), (1, 1.0));
    // Another day of his is no reason.
    world.succeeds_by_hand("diario", day(16)).await;
    world.until(march(18, "05:05")).await;
    assert_eq!((world.ledger.facts("breaker").await.expect("facts").len(), gauge()), (1, 1.0));
    world.succeeds_by_hand("diario", day(17)).await;
    world.until(march(18, "05:10")).await;
    let key = "breaker_open:diario:2024-03-17";
    assert_eq!(world.pager.calls(), [format!("18 03:00 P1 {key}"), format!("18 05:05 resolve {key}")]);
    assert_eq!((world.ledger.facts("breaker").await.expect("facts"), gauge()), (vec![], 0.0));
}

#[tokio::test(start_paused = true)]
async fn an_unreachable_pager_fails_no_run_and_hears_of_it_later() {
    let world = World::new();
    *world.pager.away.lock().expect("windows") = vec![(march(18, "00:00"), march(18, "04:00"))];
    let toy = Toy { away: vec![(march(18, "02:00"), march(18, "03:30"))], ..world.toy("diario") };
    let _process = world.start("a", vec![(daily("diario"), toy)], vec![]);
    world.until(march(18, "03:50")).await;
    assert_eq!(world.runs("diario").await, ["17 1 succeeded"]);
    assert_eq!((world.pager.calls(), world.metric("simulacro_alerts_waiting{}")), (vec![], 1.0));
    world.until(march(18, "12:00")).await;
    let key = "source_unavailable:diario:2024-03-17";
    assert_eq!(world.pager.calls(), [format!("18 04:18 P2 {key}"), format!("18 04:18 resolve {key}")]);
    assert_eq!(world.metric("simulacro_alerts_total{outcome=failed}"), 6.0);
    assert_eq!(world.metric("simulacro_alerts_waiting{}"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn an_alert_that_cannot_be_delivered_is_given_up_within_its_bound() {
    let world = World::new();
    *world.pager.away.lock().expect("windows") = vec![(march(18, "00:00"), march(25, "00:00"))];
    let toy = Toy { broken: vec![(march(18, "00:00"), march(19, "00:00"))], ..world.toy("diario") };
    let _process = world.start("a", vec![(Asset { sla_s: None, ..daily("diario") }, toy)], vec![]);
    world.until(march(20, "12:00")).await;
    assert_eq!(world.metric("simulacro_alerts_total{outcome=lost}"), 1.0);
    assert_eq!(world.pager.calls(), Vec::<String>::new());
    let lost = world.ledger.facts("alert").await.expect("facts");
    assert_eq!((lost.len(), &lost[0].value["stage"]), (1, &json!("lost")), "who looks at the ledger still sees it");
}

/// A month with everything in it. Returns the runs, the pager's calls and the whole history.
async fn month() -> (Vec<String>, Vec<String>, Vec<Event>, u64) {
    let world = World::new();
    let six_hourly = Asset {
        schedule: Schedule::parse("0 */6 * * *").expect("a schedule"),
        lag_days: 0,
        sla_s: None,
        priority: 2,
        ..daily("dimensiones")
    };
    let after = Asset { depends_on: vec!["diario".into()], sla_s: None, ..daily("atributos") };
    let weekly =
        Asset { schedule: Schedule::parse("30 4 * * 0").expect("a schedule"), lag_days: 0, sla_s: None, ..daily("limpieza") };
    let april = |day: u32, clock: &str| time(&format!("2024-04-{day:02}T{clock}:00Z"));
    let toys = || {
        let toy = Toy {
            away: vec![(march(18, "02:00"), march(18, "04:00")), (march(25, "00:00"), march(25, "09:00"))],
            broken: vec![(march(21, "03:00"), march(21, "03:12"))],
            slow: vec![(march(28, "03:00"), march(28, "03:05"))],
            poor: vec![(april(2, "00:00"), april(2, "12:00"))],
            ..world.toy("diario")
        };
        vec![
            (daily("diario"), toy),
            (six_hourly.clone(), world.toy("dimensiones")),
            (after.clone(), world.toy("atributos")),
            (weekly.clone(), world.toy("limpieza")),
        ]
    };
    // A long lease makes a month cheap: most of its events are renewals.
    let rare = LoopConfig { lease_ttl_s: 1_200, renew_every_s: 600, poll_s: 120, ..config() };
    let start = |name: &str, toys, cut| world.start_with(rare.clone(), name, toys, cut);
    let first = start("a", toys(), vec![]);
    world.until(march(20, "03:05")).await;
    first.kill().await;
    let second = start("b", toys(), vec![(march(23, "03:03"), march(23, "03:30"))]);
    world.until(march(22, "12:00")).await;
    let third = start("c", toys(), vec![]);
    world.until(march(26, "12:00")).await;
    pause(&world.ledger, "diario", "ana", "inventario", world.env.now()).await.expect("it is paused");
    world.until(march(27, "12:00")).await;
    resume(&world.ledger, "diario", world.env.now()).await.expect("it goes on");
    world.until(march(29, "12:00")).await;
    second.kill().await;
    third.kill().await;
    world.until(march(31, "12:00")).await;
    let _fourth = start("d", toys(), vec![]);
    world.until(april(18, "12:00")).await;
    let mut runs = Vec::new();
    for asset in ["diario", "atributos", "dimensiones", "limpieza"] {
        let of_asset = world.ledger.runs(asset).await.expect("the ledger answers");
        runs.extend(of_asset.iter().map(|r| format!("{asset} {} {} {}", r.fecha, r.epoch, r.state.as_str())));
    }
    let events = world.history.events.lock().expect("events").clone();
    (runs, world.pager.calls(), events, world.log.together.load(Ordering::SeqCst))
}

#[tokio::test(start_paused = true)]
async fn a_month_with_outages_crashes_a_pause_and_lost_leases_is_the_same_twice() {
    let (runs, calls, events, together) = month().await;
    assert_eq!(together, 0, "an asset never works twice at once");
    let of = |asset: &str, state: &str| {
        runs.iter().filter(|r| r.starts_with(&format!("{asset} ")) && r.ends_with(&format!(" {state}"))).count()
    };
    // Each turn ends once: 32 days from 17 March to 17 April.
    let ended = |asset: &str| of(asset, "succeeded") + of(asset, "skipped") + of(asset, "held");
    // 25 March: the source is away for too long.
    assert_eq!((ended("diario"), of("diario", "held")), (31, 1), "{runs:#?}");
    assert_eq!(of("diario", "skipped"), 2, "one paused, one missed: {runs:#?}");
    assert_eq!(ended("atributos"), 32);
    assert_eq!(of("limpieza", "succeeded"), 4, "{runs:#?}");
    assert_eq!(of("diario", "running") + of("dimensiones", "running"), 0);
    let raised = |kind: &str| calls.iter().filter(|c| c.contains(kind) && !c.contains("resolve")).count();
    assert_eq!((raised("sla_missed"), raised("breaker_open"), raised("schedule_missed")), (3, 1, 2), "{calls:#?}");
    let (again, calls_again, events_again, _) = month().await;
    assert_eq!((runs, calls), (again, calls_again));
    assert_eq!(events.len(), events_again.len());
    for (one, other) in events.iter().zip(&events_again) {
        assert_eq!(one, other);
    }
}
