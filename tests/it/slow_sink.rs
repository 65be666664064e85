//! Back-pressure over a real Kafka: a warehouse that answers more slowly than a member may be silent. The sink reads no faster
//! than it can write, holds a bounded number of records, stays in its group all the while, and writes everything once.
//!
//! What is judged is the history of port calls, as production keeps it, what the broker says of the group, and the table. No
//! time is: a slow machine makes the writes slower, which is what they are meant to be.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arrow::{
    array::{AsArray, RecordBatch},
    datatypes::Int64Type,
};
use async_trait::async_trait;
use chrono::NaiveDate;
use serde_json::{Value, json};
use simulacro_adapters::{KafkaConfig, KafkaLog, NoSource, PrometheusMetrics, connect_folder};
use simulacro_core::{
    avro::{MetricaRealtime, RowEncoder},
    contract::Contract,
    history::{Event, HistorySink, Recorder},
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::{Config, Platform},
    ports::{
        Commit, Compatibility, Env, Result, UpsertRows, Warehouse,
        event_log::{OutRecord, TopicSpec},
    },
    streaming::{config::StreamConfig, metricas::METRICAS},
};

use crate::services::kafka::Kafka;

const PARTITIONS: i32 = 2;
/// Many times what may be held.
const ROWS: i64 = 3_000;
/// Records of a partition after which they are written.
const WRITE: usize = 500;
/// Records of one poll.
const POLL: usize = 50;
/// Long enough for a busy machine to poll in time, short enough for writes that are longer.
const SESSION: Duration = Duration::from_secs(4);

/// Only so that a failure ends.
const PATIENCE: Duration = Duration::from_secs(400);

/// The history, in memory.
#[derive(Debug, Default)]
struct Kept(Mutex<Vec<Event>>);

impl Kept {
    fn all(&self) -> Vec<Event> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl HistorySink for Kept {
    fn append(&self, event: Event) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }
}

/// A warehouse that takes its time before it writes, and says in the history when it was asked to.
#[derive(Debug)]
struct Slow {
    inner: Arc<dyn Warehouse>,
    env: Arc<dyn Env>,
    recorder: Recorder,
}

#[async_trait]
impl Warehouse for Slow {
    async fn load_day(&self, table: &str, fecha: NaiveDate, epoch: i64, batches: Vec<RecordBatch>) -> Result<Commit> {
        self.inner.load_day(table, fecha, epoch, batches).await
    }
    async fn upsert_rows(&self, rows: UpsertRows) -> Result<Commit> {
        self.recorder.record("slow_warehouse", "asked", "ok".into(), json!({}));
        self.env.sleep(SESSION * 3 / 2).await;
        self.inner.upsert_rows(rows).await
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        self.inner.writer_epoch(table, writer).await
    }
    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>> {
        self.inner.query(sql, tables).await
    }
}

fn row(number: i64) -> MetricaRealtime {
    let start = 852_163_200_000 + number * 60_000;
    MetricaRealtime {
        window_kind: "region_1m".into(),
        window_start_ms: start,
        window_end_ms: start + 60_000,
        region: "norte".into(),
        page: None,
        clicks: number,
        purchases: 0,
        add_to_cart: 0,
        revenue_cents: 0,
        conversion_rate: None,
        unique_users: 1,
        revision: 0,
        exact: true,
    }
}

/// Sends the rows to the topic that the sink reads, in turns to its partitions.
async fn send(platform: &Platform, config: &StreamConfig) {
    let (ports, topic) = (&platform.ports, &config.topics.metrics);
    let spec = TopicSpec { name: topic.clone(), partitions: PARTITIONS, retention: None, compact: false };
    ports.log.create_topic(&spec).await.expect("the topic is made");
    let rows: Vec<MetricaRealtime> = (0..ROWS).map(row).collect();
    let registry = ports.registry.as_ref();
    let mut encoder = RowEncoder::<MetricaRealtime>::register(registry, Compatibility::BackwardTransitive)
        .await
        .expect("the schema is registered");
    let records = encoder.encode_rows(&rows).expect("the rows are encoded").into_iter().zip((0..PARTITIONS).cycle());
    let record = |(value, partition)| OutRecord {
        topic: topic.clone(),
        partition: Some(partition),
        key: None,
        value: Some(value),
        headers: Vec::new(),
    };
    let mut producer = ports.log.producer(None).await.expect("a producer");
    producer.send(records.map(record).collect()).await.expect("the records are sent");
}

/// What the sink did, as the history has it.
#[derive(Debug, Default)]
struct Seen {
    /// Most records that were read and not written.
    held_max: u64,
    /// Records that came while each write was under way.
    beside: Vec<u64>,
    /// Polls that brought nothing while a write was under way.
    quiet: u64,
    written: u64,
    pauses: u64,
    resumes: u64,
    /// What the group gave and took.
    group: Vec<Value>,
}

fn seen(history: &[Event]) -> Seen {
    let (mut seen, mut read, mut writes) = (Seen::default(), 0, false);
    for event in history.iter().filter(|event| event.outcome == "ok") {
        let count = |name: &str| event.refs[name].as_u64().unwrap_or(0);
        match (event.component.as_str(), event.call.as_str()) {
            ("slow_warehouse", "asked") => {
                writes = true;
                seen.beside.push(0);
            }
            ("warehouse", "upsert_rows") => {
                writes = false;
                seen.written += count("rows");
            }
            ("consumer", "pause") => seen.pauses += 1,
            ("consumer", "resume") => seen.resumes += 1,
            ("consumer", "poll") => {
                read += count("records");
                if let Some(beside) = seen.beside.last_mut().filter(|_| writes) {
                    *beside += count("records");
                }
                let of_group = ["assigned", "revoked", "lost"].iter().any(|key| !event.refs[*key].is_null());
                seen.group.extend(of_group.then(|| event.refs.clone()));
                // Told in one line when something else comes: after the write.
                seen.quiet += count("nothing");
            }
            _ => {}
        }
        seen.held_max = seen.held_max.max(read - seen.written);
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warehouse_slower_than_a_session_slows_the_reading_and_loses_neither_member_nor_record() {
    let Some(kafka) = Kafka::start() else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut ports =
        connect_folder(Arc::new(NoSource), dir.path(), Arc::new(PrometheusMetrics::default())).await.expect("connected");
    let history = Arc::new(Kept::default());
    ports.recorder = Recorder::new(ports.env.clone(), history.clone());
    let log = KafkaConfig { poll_records_max: POLL, ..KafkaConfig::new(&kafka.address) };
    ports.log = Arc::new(KafkaLog::new(log).expect("a Kafka client"));
    let (inner, env, recorder) = (ports.warehouse, ports.env.clone(), ports.recorder.clone());
    ports.warehouse = Arc::new(Slow { inner, env, recorder });
    let wait = Config {
        source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 },
        retry: RetryPolicy { retries: 0, backoff_s: 1, deadline_s: 1 },
        alert_after_s: 1,
        startup_s: 0,
    };
    let contract = include_str!("../../contracts/odcs/ventas.yaml");
    let platform = Platform::new(wait, Contract::parse("ventas.yaml", contract).expect("a contract"), ports);
    let config = StreamConfig {
        merge_partitions: PARTITIONS,
        session_timeout: SESSION,
        sink_records_max: WRITE,
        ..StreamConfig::specification()
    };
    send(&platform, &config).await;

    let mut sink = platform.metricas_sink(&config, "lento").await.expect("it joins");
    let write_all = async {
        while sink.rows() < ROWS.unsigned_abs() {
            sink.step().await.expect("it goes on");
        }
    };
    tokio::select! {
        biased;
        () = write_all => {}
        () = platform.ports.env.sleep(PATIENCE) => panic!("it never ends: {:?}", seen(&history.all())),
    }
    let generations = kafka.generations(&format!("{}.metricas_clicks", config.group));
    let seen = seen(&history.all());
    sink.close().await.expect("it leaves");

    assert_eq!((seen.written, sink.rows()), (ROWS.unsigned_abs(), ROWS.unsigned_abs()), "{seen:?}");
    assert_eq!((generations, seen.group.len()), (1, 1), "the group gave once and took nothing: {seen:?}");
    assert!(seen.group[0]["assigned"].as_array().is_some_and(|all| all.len() == PARTITIONS as usize), "{seen:?}");
    // Of each partition as many as make a write due, and the poll that brought the last of them.
    let bound = PARTITIONS as u64 * (WRITE + POLL) as u64;
    assert!(seen.held_max <= bound && bound * 2 < ROWS.unsigned_abs(), "{seen:?}");
    assert!(seen.beside.len() > 4 && seen.beside.iter().all(|records| *records == 0), "nothing is read beside a write: {seen:?}");
    assert!(seen.pauses >= seen.beside.len() as u64 && seen.resumes >= seen.pauses, "{seen:?}");
    assert!(seen.quiet >= seen.beside.len() as u64, "polled all the same: {seen:?}");

    // Each row is there once, and the table is where the topic ends.
    let sql = format!("SELECT count(*) AS rows, count(DISTINCT clicks) AS different, sum(clicks) AS total FROM {METRICAS}");
    let found = platform.ports.warehouse.query(&sql, &[METRICAS]).await.expect("the warehouse answers");
    let number = |column: usize| found[0].column(column).as_primitive::<Int64Type>().value(0);
    assert_eq!((number(0), number(1), number(2)), (ROWS, ROWS, ROWS * (ROWS - 1) / 2));
    let ends: BTreeMap<i32, (i64, i64)> = platform.ports.log.offsets(&config.topics.metrics).await.expect("the topic is there");
    for (partition, (_, end)) in ends {
        let writer = format!("{}-{partition}", config.topics.metrics);
        let position = platform.ports.warehouse.writer_epoch(METRICAS, &writer).await.expect("the warehouse answers");
        assert_eq!(position, Some(end), "{writer}");
    }
}
