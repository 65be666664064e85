//! The monitor over the real job, a log in memory, and a ledger and a warehouse that do what they are told.

use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering},
};

use arrow::record_batch::RecordBatch;
use bytes::Bytes;

use super::*;
use crate::{
    ports::{
        Commit, Fence, Lease, PipelineMetric, RunStart, RunState, UpsertRows,
        event_log::{TopicPartition, TopicSpec},
    },
    slo::samples::of_monitor,
    streaming::{
        job::{RealtimeMetrics, StreamPorts},
        testing::{Click, JsonClicks, JsonRows, MemoryLog, NoMetrics},
    },
};

/// 2024-03-18 12:00 UTC.
const T0: i64 = 1_710_763_200_000;
const MINUTE: i64 = 60_000;

#[derive(Debug, Default)]
struct Kept {
    runs: Mutex<Vec<Run>>,
    facts: Mutex<BTreeMap<String, Fact>>,
    /// Layer, day and time of each thinning.
    thinned: Mutex<Vec<(String, NaiveDate, DateTime<Utc>)>>,
    folds: AtomicU64,
}

#[async_trait]
impl RunLedger for Kept {
    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>> {
        let runs = self.runs.lock().unwrap();
        Ok(runs.iter().filter(|run| run.pipeline == pipeline && run.fecha >= from).cloned().collect())
    }
    async fn facts(&self, topic: &str) -> Result<Vec<Fact>> {
        Ok(self.facts.lock().unwrap().values().filter(|fact| fact.topic == topic).cloned().collect())
    }
    async fn fold_runs(&self, fold: &Fold, _: Option<&Fence>) -> Result<()> {
        self.folds.fetch_add(1, Ordering::SeqCst);
        self.facts.lock().unwrap().insert(fold.fact.name.clone(), fold.fact.clone());
        self.runs.lock().unwrap().retain(|run| !fold.runs.contains(&(run.fecha, run.epoch)));
        Ok(())
    }
    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64> {
        self.thinned.lock().unwrap().push((layer.to_owned(), fecha, before));
        Ok(0)
    }
    async fn start(&self, _: &RunStart) -> Result<Run> {
        unreachable!("the orchestrator does")
    }
    async fn finish(&self, _: &Run) -> Result<()> {
        unreachable!("the orchestrator does")
    }
    async fn abandon(&self, _: &Run) -> Result<()> {
        unreachable!("the orchestrator does")
    }
    async fn runs(&self, _: &str) -> Result<Vec<Run>> {
        unreachable!("a year of looks")
    }
    async fn acquire_lease(&self, _: &str, _: &str, _: Duration, _: DateTime<Utc>) -> Result<Lease> {
        unreachable!("the orchestrator does")
    }
    async fn renew_lease(&self, _: &Lease, _: Duration, _: DateTime<Utc>) -> Result<Lease> {
        unreachable!("the orchestrator does")
    }
    async fn release_lease(&self, _: &Lease) -> Result<()> {
        unreachable!("the orchestrator does")
    }
    async fn lease(&self, _: &str) -> Result<Option<Lease>> {
        unreachable!("the orchestrator does")
    }
    async fn put_fact(&self, _: &Fact, _: Option<&Fence>) -> Result<()> {
        unreachable!("facts come with what they stand for")
    }
    async fn put_metrics(&self, _: &[PipelineMetric]) -> Result<()> {
        unreachable!("the monitor has none")
    }
    async fn metrics(&self, _: NaiveDate) -> Result<Vec<PipelineMetric>> {
        unreachable!("the monitor has none")
    }
    async fn put_quality(&self, _: &[QualityResult]) -> Result<()> {
        unreachable!("the orchestrator does")
    }
    async fn quality(&self, _: NaiveDate) -> Result<Vec<QualityResult>> {
        unreachable!("the monitor reads none")
    }
}

/// A warehouse that tells positions, or is away.
#[derive(Debug, Default)]
struct Table {
    positions: Mutex<Option<BTreeMap<String, i64>>>,
    asked: AtomicU64,
}

impl Table {
    fn tell(&self, positions: Option<&[(&str, i64)]>) {
        let of = |all: &[(&str, i64)]| all.iter().map(|(writer, next)| ((*writer).to_owned(), *next)).collect();
        *self.positions.lock().unwrap() = positions.map(of);
    }
    fn asked(&self) -> u64 {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

#[async_trait]
impl Warehouse for Table {
    async fn load_day(&self, _: &str, _: NaiveDate, _: i64, _: Vec<RecordBatch>) -> Result<Commit> {
        unreachable!("the monitor only looks")
    }
    async fn upsert_rows(&self, _: UpsertRows) -> Result<Commit> {
        unreachable!("the monitor only looks")
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        assert_eq!(table, METRICAS);
        self.asked.fetch_add(1, Ordering::SeqCst);
        match &*self.positions.lock().unwrap() {
            Some(positions) => Ok(positions.get(writer).copied()),
            None => Err(PortError::retryable("connect to the warehouse").code("ECONNREFUSED")),
        }
    }
    async fn query(&self, _: &str, _: &[&str]) -> Result<Vec<RecordBatch>> {
        unreachable!("the monitor asks for positions alone")
    }
}

struct World {
    log: MemoryLog,
    ledger: Arc<Kept>,
    table: Arc<Table>,
    monitor: StreamingMonitor,
    job: RealtimeMetrics,
    sent: u64,
}

impl World {
    async fn new() -> Self {
        let log = MemoryLog::new(T0, 500);
        let config = StreamConfig {
            merge_partitions: 1,
            regions: Some(["norte"].map(String::from).into()),
            ..StreamConfig::specification()
        };
        let clicks = TopicSpec { name: config.topics.clicks.clone(), partitions: 1, retention: None, compact: false };
        log.create_topic(&clicks).await.unwrap();
        let env: Arc<dyn Env> = Arc::new(log.env.clone());
        let ports = StreamPorts { env: env.clone(), log: Arc::new(log.clone()), metrics: Arc::new(NoMetrics) };
        let job = RealtimeMetrics::open(config.clone(), ports, "worker-0", Box::new(JsonClicks), Box::new(JsonRows)).await;
        let (ledger, table) = (Arc::new(Kept::default()), Arc::new(Table::default()));
        table.tell(Some(&[]));
        let monitor = StreamingMonitor::new(
            env,
            Arc::new(log.clone()),
            ledger.clone(),
            table.clone(),
            config,
            MonitorLimits::specification(),
        );
        Self { log, ledger, table, monitor, job: job.unwrap(), sent: 0 }
    }

    fn now_ms(&self) -> i64 {
        self.monitor.env.now().timestamp_millis()
    }

    fn advance_to(&self, ms: i64) {
        self.log.env.0.store(ms, Ordering::SeqCst);
    }

    /// Appends so many events of a time before now, and lets the job do its work.
    async fn events(&mut self, count: u64, behind_ms: i64, region: &str) {
        for _ in 0..count {
            self.sent += 1;
            let click = Click {
                user_id: format!("u-{}", self.sent),
                event_type: "click".into(),
                page: "/".into(),
                product_id: None,
                cents: 0,
                region: Some(region.into()),
                timestamp_ms: self.now_ms() - behind_ms,
            };
            self.append(serde_json::to_vec(&click).unwrap().into());
        }
        self.work().await;
    }

    fn append(&self, value: Bytes) {
        self.log.append(&self.monitor.config.topics.clicks, 0, "key", Some(value), self.now_ms());
    }

    async fn work(&mut self) {
        let mut quiet = 0;
        while quiet < 40 {
            let step = self.job.step().await.unwrap();
            quiet = if step.records > 0 || step.committed { 0 } else { quiet + 1 };
        }
    }

    fn slot(&self) -> Slot {
        let scheduled = self.monitor.env.now();
        Slot { scheduled, fecha: scheduled.date_naive() }
    }

    /// The checks that do not pass, by name.
    async fn failing(&self) -> Vec<String> {
        let results = self.monitor.checks(self.slot()).await;
        assert_eq!(results.len(), 4, "all are made, whatever the first ones find");
        results.into_iter().filter(|r| !r.passed).map(|r| r.check).collect()
    }
}

#[tokio::test]
async fn a_share_of_late_or_dead_events_is_told_by_name_and_a_few_at_night_are_not() {
    let mut world = World::new().await;
    let (late_ms, none): (i64, [&str; 0]) = (20 * MINUTE, []);
    world.events(10, 0, "norte").await;
    assert_eq!(world.failing().await, none, "the first look compares with nothing");
    world.events(100, 0, "norte").await;
    world.events(5, late_ms, "norte").await;
    assert_eq!(world.failing().await, none, "5 of 105");
    world.events(1, late_ms, "norte").await;
    assert_eq!(world.failing().await, [LATE_CHECK], "6 of 106");

    // Later, and at night.
    world.advance_to(world.now_ms() + 11 * MINUTE);
    world.events(1, 0, "norte").await;
    world.events(98, late_ms, "norte").await;
    assert_eq!(world.failing().await, none, "99 events are too few");
    world.events(1, late_ms, "norte").await;
    assert_eq!(world.failing().await, [LATE_CHECK]);

    world.advance_to(world.now_ms() + 11 * MINUTE);
    world.events(100, 0, "norte").await;
    world.append(Bytes::from_static(b"nothing"));
    world.work().await;
    assert_eq!(world.failing().await, none, "1 of 101");
    // One against a clause goes to the same topic.
    world.events(1, 0, "marte").await;
    assert_eq!(world.failing().await, [DEAD_LETTER_CHECK], "2 of 102");
    world.advance_to(world.now_ms() + 9 * MINUTE);
    assert_eq!(world.failing().await, [DEAD_LETTER_CHECK], "it is in the window still");
    world.advance_to(world.now_ms() + 9 * MINUTE);
    assert_eq!(world.failing().await, none);
}

#[tokio::test]
async fn a_job_that_counts_anew_and_a_clock_that_was_put_back_are_first_looks() {
    let mut memory = Memory::default();
    let window = Duration::from_secs(600);
    let counted = |read, late| Counted { read, late, dead: 0 };
    assert_eq!(memory.count(0, counted(1_000, 10), window), None);
    assert_eq!(memory.count(MINUTE, counted(1_100, 11), window), Some(counted(100, 1)));
    assert_eq!(memory.count(2 * MINUTE, counted(50, 0), window), None, "another state");
    assert_eq!(memory.count(MINUTE, counted(60, 0), window), None, "another clock");
    for minute in 2..3_000 {
        memory.count(minute * MINUTE, counted(60 + minute as u64, 0), window);
    }
    assert!(memory.counted.len() <= 12, "{}", memory.counted.len());
    assert_eq!(memory.count(3_000 * MINUTE, counted(3_060, 0), window), Some(counted(10, 0)));
}

#[tokio::test]
async fn a_sink_that_is_behind_is_told_after_ten_minutes_and_asked_only_when_it_might_be() {
    let world = World::new().await;
    let topic = world.monitor.config.topics.metrics.clone();
    let none: [&str; 0] = [];
    let writer = writer(&TopicPartition { topic: topic.clone(), partition: 0 });
    let limit = world.monitor.limits.sink_ms_max;
    for _ in 0..3 {
        world.log.append(&topic, 0, "key", Some(Bytes::from_static(b"row")), T0);
    }
    world.advance_to(T0 + 2 * limit);
    assert_eq!(world.failing().await, none, "a sink that never was is nobody's");
    world.advance_to(T0 + limit);
    world.table.tell(Some(&[(&writer, 1)]));
    assert_eq!(world.failing().await, none);
    world.table.asked();
    assert_eq!((world.failing().await, world.table.asked()), (Vec::new(), 0), "the last position will do");

    world.advance_to(T0 + limit + 1);
    let results = world.monitor.checks(world.slot()).await;
    let sink = results.iter().find(|r| r.check == SINK_CHECK).expect("the sink is judged");
    assert_eq!(
        (sink.passed, sink.asset.as_str(), sink.observed.as_str()),
        (false, METRICAS, "2 records, the oldest for 600001 ms")
    );
    assert_eq!(results.iter().filter(|r| !r.passed).count(), 1);
    world.table.tell(Some(&[(&writer, 3)]));
    assert_eq!(world.failing().await, none, "it has caught up");

    // The warehouse is away for a while.
    world.log.append(&topic, 0, "key", Some(Bytes::from_static(b"row")), T0 + limit);
    world.table.tell(None);
    world.advance_to(T0 + 3 * limit);
    assert_eq!(world.failing().await, none, "nothing says that the sink is late");
    world.advance_to(T0 + 3 * limit + 1);
    assert_eq!(world.failing().await, [SINK_CHECK], "nobody has known for too long");
    world.table.tell(Some(&[(&writer, 4)]));
    assert_eq!(world.failing().await, none);
}

#[tokio::test]
async fn what_waits_is_told_by_its_name_alone() {
    let mut world = World::new().await;
    world.events(10, 0, "norte").await;
    world.append(Bytes::from_static(b"nothing"));
    world.advance_to(T0 + world.monitor.limits.lag_ms_max);
    let none: [&str; 0] = [];
    assert_eq!(world.failing().await, none);
    world.advance_to(T0 + 2 * world.monitor.limits.lag_ms_max);
    assert_eq!(world.failing().await, [LAG_CHECK]);
}

#[tokio::test]
async fn a_leader_that_changes_is_no_news_and_a_log_that_is_away_is() {
    let mut world = World::new().await;
    let none: [&str; 0] = [];
    world.events(10, 0, "norte").await;
    world.log.fail_offsets(3);
    assert_eq!(world.failing().await, none, "it has answered after a moment");
    world.log.fail_offsets(u32::MAX);
    let began_ms = world.now_ms();
    assert_eq!(world.failing().await, [LAG_CHECK, LATE_CHECK, DEAD_LETTER_CHECK]);
    assert!(world.now_ms() - began_ms < MINUTE / 2, "the next look does not wait for this one");
    world.log.fail_offsets(0);
    assert_eq!(world.failing().await, none);
}

/// A look at a minute of the day of `T0`.
fn look(minute: i64, epoch: i64, state: RunState) -> Run {
    let at = DateTime::from_timestamp_millis(T0 - 12 * 60 * MINUTE + minute * MINUTE).unwrap();
    Run {
        pipeline: MONITOR.into(),
        fecha: at.date_naive(),
        epoch,
        run_id: format!("r-{epoch}"),
        state,
        started_at: at,
        finished_at: Some(at),
        scheduled_at: Some(at),
        fence: None,
        report: json!({ "lag_records": 0, "lag_ms": 1_500, "watermark_ms": 0 }),
    }
}

#[tokio::test]
async fn looks_that_went_well_are_folded_into_their_day_and_all_others_stay() {
    let world = World::new().await;
    // A day of looks, and the half day before now.
    let mut runs: Vec<Run> = (0..1_440).map(|n| look(n - 1_440, n + 1, RunState::Succeeded)).collect();
    runs.extend((0..720).map(|n| look(n, n + 1, RunState::Succeeded)));
    for (n, state) in [(3, RunState::Held), (1_445, RunState::Failed), (1_446, RunState::Skipped)] {
        runs[n].state = state;
    }
    let (before, count) = (of_monitor(&runs, &[]).len(), runs.len());
    *world.ledger.runs.lock().unwrap() = runs;
    let at = world.slot().scheduled;
    let run = Run { state: RunState::Running, ..look(720, 721, RunState::Running) };
    world.ledger.runs.lock().unwrap().push(run.clone());
    let job = Job { slot: world.slot(), run };
    let report = world.monitor.run(&job).await.expect("a look");
    assert_eq!(report["lag_records"], 0);

    // It is noon: what is older than eleven goes.
    let left = world.ledger.runs.lock().unwrap().clone();
    let facts: Vec<Fact> = world.ledger.facts.lock().unwrap().values().cloned().collect();
    let [yesterday, today] = &facts[..] else { panic!("two days: {facts:?}") };
    let of = |fact: &Fact| Looks::read(fact).expect("a day");
    let total = |looks: &Looks| looks.by_hour.values().flat_map(|lags| lags.values()).sum::<u64>();
    assert_eq!((total(&of(yesterday)), total(&of(today)), of(today).skipped), (1_438, 658, 1));
    assert_eq!(of(today).by_hour.keys().copied().collect::<Vec<_>>(), (0..11).collect::<Vec<_>>());
    assert!(facts.iter().all(|fact| fact.topic == LOOKS && fact.value.to_string().len() < 1_000));
    // The held one, the newest of yesterday, the failed one, an hour of today, and the one under way.
    assert_eq!(left.len(), 1 + 1 + 1 + 60 + 1, "of {count}");
    let samples: u64 = of_monitor(&left, &facts)
        .iter()
        .map(|sample| match sample.value {
            crate::slo::Measured::Repeated { times, .. } => times,
            crate::slo::Measured::Value(_) | crate::slo::Measured::Missing | crate::slo::Measured::Counts { .. } => 1,
        })
        .sum();
    assert_eq!(samples, before as u64, "no look is counted twice or not at all");
    let until = at - TimeDelta::hours(1);
    let days = [at.date_naive().pred_opt().unwrap(), at.date_naive()];
    assert_eq!(*world.ledger.thinned.lock().unwrap(), days.map(|day| ("stream".to_owned(), day, until)));

    // Once an hour, and what is folded then is added.
    world.monitor.run(&job).await.expect("a look");
    assert_eq!(world.ledger.folds.load(Ordering::SeqCst), 2);
    world.advance_to(T0 + 60 * MINUTE);
    world.monitor.run(&job).await.expect("a look");
    assert_eq!(total(&of(&world.ledger.facts.lock().unwrap()[&today.name])), 658 + 60);
    assert_eq!(world.ledger.runs.lock().unwrap().len(), 4);
}
