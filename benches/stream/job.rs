//! The job itself as a contender: its stages one by one, the whole of it in memory, its state, and its latency.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use serde_json::{Value, json};
use simulacro_adapters::{EmbeddedLogConfig, EmbeddedRegistry, KafkaConfig, KafkaLog, SystemEnv, open_embedded_log};
use simulacro_core::{
    avro::{Click, Limits, MetricaRealtime, Row, RowDecoder, RowEncoder, memory::MemoryRegistry},
    ports::{
        Compatibility, SchemaRegistry,
        event_log::{EventLog, GroupSpec, LogRecord, OutRecord, Polled, StartAt, TopicPartition, TopicSpec},
    },
    streaming::{
        click_task::ClickTask,
        codec::{AvroClicks, AvroMetrics},
        config::StreamConfig,
        event::{ClickDecoder, Fate},
        job::{RealtimeMetrics, StreamPorts},
        window::MetricRow,
    },
};

use crate::{
    Failure, Measured,
    events::{Input, SCHEMA_ID, START_MS, Shape, mix, summary},
    memory_log::{Clicks, MemoryLog, NoMetrics, SkippingClock},
};

/// The job's settings: those of the specification, and the heartbeat's type.
pub fn config() -> StreamConfig {
    let mut config = StreamConfig::specification();
    config.event_types.insert("heartbeat".to_owned());
    config
}

async fn registry() -> Result<Arc<MemoryRegistry>, Failure> {
    let registry = Arc::new(MemoryRegistry::default());
    let encoder = RowEncoder::<Click>::register(registry.as_ref(), Compatibility::BackwardTransitive);
    encoder.await?;
    Ok(registry)
}

async fn worker(
    config: &StreamConfig,
    ports: StreamPorts,
    registry: Arc<dyn SchemaRegistry>,
    member: &str,
) -> Result<RealtimeMetrics, Failure> {
    let decoder = Box::new(AvroClicks::new(registry.clone(), config.click_bytes_max)?);
    let encoder = Box::new(AvroMetrics::register(registry.as_ref()).await?);
    Ok(RealtimeMetrics::open(config.clone(), ports, member, decoder, encoder).await?)
}

/// The rows behind the values of the topic of metrics.
async fn rows(registry: Arc<dyn SchemaRegistry>, values: &[Option<Bytes>]) -> Result<Vec<MetricRow>, Failure> {
    let mut decoder = RowDecoder::<MetricaRealtime>::new(registry, Limits { record_bytes_max: 1 << 20 })?;
    let decoded = decoder.decode(values).await?;
    if let Some(reject) = decoded.rejects.first() {
        return Err(format!("read the metrics: {}", reject.reason).into());
    }
    let rows = MetricaRealtime::from_batch(&decoded.batch)?.into_iter().map(MetricRow::try_from);
    Ok(rows.collect::<Result<_, _>>()?)
}

/// The whole job over a log in memory: decoded, judged, deduplicated, windowed, merged, encoded and committed.
pub async fn job(input: Arc<Input>, poll_records: usize) -> Result<Value, Failure> {
    let (config, clock) = (config(), Arc::new(SkippingClock::default()));
    let (events, end) = (input.shape.events, input.shape.end_ms() + 5 * 60_000);
    let log = MemoryLog::new(input, &config.topics.clicks, poll_records, clock.clone());
    let registry = registry().await?;
    let ports = StreamPorts { env: clock, log: Arc::new(log.clone()), metrics: Arc::new(NoMetrics) };
    let mut job = worker(&config, ports, registry.clone(), "only").await?;
    let measured = Measured::begin()?;
    let mut commits = 0_u64;
    while job.merges().is_empty() || job.merges().values().any(|merge| merge.closed().is_none_or(|closed| closed < end)) {
        commits += u64::from(job.step().await?.committed);
    }
    let mut report = measured.end()?;
    let published: u64 = job.clicks().values().map(|task| task.counts().of(Fate::Published)).sum();
    let found = summary(&rows(registry, &log.values(&config.topics.metrics)).await?);
    report["events"] = json!(events);
    report["published"] = json!(published);
    report["commits"] = json!(commits);
    report["summary"] = json!(found);
    Ok(report)
}

/// Nanoseconds per event of the stages of a click partition, each timed by itself in one pass.
pub async fn stages(input: &Input, poll_records: usize) -> Result<Value, Failure> {
    let config = config();
    let registry = registry().await?;
    let mut decoder = AvroClicks::new(registry, config.click_bytes_max)?;
    let (mut decode, mut process, mut prepare, mut commit) = (Duration::ZERO, Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let mut tasks: Vec<ClickTask> = (0..input.partitions.len()).map(|p| ClickTask::new(p as i32, 0)).collect();
    let (mut at, mut since, mut bytes) = (vec![0; tasks.len()], 0, 0_usize);
    while at.iter().zip(&input.partitions).any(|(at, all)| *at < all.len()) {
        for (partition, task) in tasks.iter_mut().enumerate() {
            let all = &input.partitions[partition];
            let next = all.len().min(at[partition] + poll_records);
            let records: Vec<LogRecord> = (at[partition]..next)
                .map(|offset| LogRecord {
                    offset: offset as i64,
                    appended_ms: i64::MAX / 2,
                    key: None,
                    value: Some(input.shared(all[offset])),
                    headers: Vec::new(),
                })
                .collect();
            if records.is_empty() {
                continue;
            }
            at[partition] = next;
            since += records.len();
            let begun = Instant::now();
            let decoded = decoder.decode(&records).await?;
            let parsed = Instant::now();
            task.process(&records, next as i64, &decoded, &config)?;
            decode += parsed - begun;
            process += parsed.elapsed();
        }
        if since >= config.commit_records_max {
            since = 0;
            for task in &mut tasks {
                let begun = Instant::now();
                let records = task.prepare(false, &config);
                let prepared = Instant::now();
                task.commit(&config);
                prepare += prepared - begun;
                commit += prepared.elapsed();
                bytes += records.iter().filter_map(|r| r.value.as_ref()).map(Bytes::len).sum::<usize>();
            }
        }
    }
    let events: usize = input.partitions.iter().map(Vec::len).sum();
    let per = |time: Duration| time.as_nanos() as f64 / events as f64;
    Ok(json!({
        "events": events, "decode_ns": per(decode), "process_ns": per(process), "prepare_ns": per(prepare),
        "commit_ns": per(commit), "written_bytes": bytes as f64 / events as f64,
    }))
}

/// Clicks that are made when they are read, so that they take no memory: each user twice, within ten minutes.
#[derive(Debug)]
struct Made {
    users: u64,
    partitions: u64,
}

impl Made {
    const EVENTS_PER_USER: u64 = 2;
    const SPAN_MS: u64 = 600_000;
}

fn put_long(out: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)).cast_unsigned();
    while rest >= 0x80 {
        out.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_long(out, bytes.len() as i64);
    out.extend_from_slice(bytes);
}

/// A click as a record of its topic.
fn record(user: u64, region: &str, timestamp_ms: i64) -> Bytes {
    let mut out = vec![0];
    out.extend(SCHEMA_ID.to_be_bytes());
    put_bytes(&mut out, format!("u-{user:07}").as_bytes());
    put_bytes(&mut out, b"click");
    put_bytes(&mut out, format!("/producto/P{:05}", mix(user) % 500).as_bytes());
    put_long(&mut out, 0);
    put_bytes(&mut out, &[0]);
    put_bytes(&mut out, region.as_bytes());
    put_long(&mut out, timestamp_ms);
    out.into()
}

impl Clicks for Made {
    fn partitions(&self) -> usize {
        self.partitions as usize
    }
    fn records(&self, _: usize) -> usize {
        (self.users * Self::EVENTS_PER_USER / self.partitions) as usize
    }
    fn value(&self, partition: usize, offset: usize) -> Bytes {
        let (partition, offset) = (partition as u64, offset as u64);
        let per_partition = self.users / self.partitions;
        // The same users again, in the same partition.
        let user = partition + (offset % per_partition) * self.partitions;
        let region = ["centro", "este", "norte", "oeste", "sur"][(mix(user) % 5) as usize];
        let behind = offset * Self::SPAN_MS / (per_partition * Self::EVENTS_PER_USER);
        record(user, region, START_MS + behind.cast_signed())
    }
}

fn status_kib(name: &str) -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse().ok());
    Ok(number.ok_or_else(|| format!("found no {name} in /proc/self/status"))?)
}

/// Memory of a worker whose state is full, and how long a new one takes to be where it was.
pub async fn state(users: u64) -> Result<Value, Failure> {
    let (config, clock) = (config(), Arc::new(SkippingClock::default()));
    let made = Arc::new(Made { users, partitions: 4 });
    let events = users / made.partitions * made.partitions * Made::EVENTS_PER_USER;
    let log = MemoryLog::new(made, &config.topics.clicks, 500, clock.clone());
    let registry = registry().await?;
    let ports = StreamPorts { env: clock, log: Arc::new(log.clone()), metrics: Arc::new(NoMetrics) };
    let before = status_kib("VmRSS")?;
    let mut job = worker(&config, ports.clone(), registry.clone(), "only").await?;
    let counted = |job: &RealtimeMetrics| job.clicks().values().map(|task| task.counts().read).sum::<u64>();
    while counted(&job) < events {
        job.step().await?;
        // Nobody reads the rows here, and they are no state.
        log.clear(&config.topics.metrics);
    }
    job.close().await?;
    let (held, peak) = (status_kib("VmRSS")?, status_kib("VmHWM")?);
    let changelog = log.bytes(&config.topics.changelog) + log.bytes(&config.topics.merge_changelog);
    drop(job);
    let begun = Instant::now();
    let mut again = worker(&config, ports, registry, "only").await?;
    while again.clicks().is_empty() || again.merges().is_empty() {
        again.step().await?;
    }
    let restart = begun.elapsed();
    if counted(&again) != events {
        return Err(format!("restart: found {} events in restored state, expected {events}", counted(&again)).into());
    }
    let (held_mib, peak_mib) = (held.saturating_sub(before) as f64 / 1_024.0, peak.saturating_sub(before) as f64 / 1_024.0);
    Ok(json!({
        "users": users, "events": events, "held_mib": held_mib, "peak_mib": peak_mib,
        "changelog_mib": changelog as f64 / 1_048_576.0, "restart_seconds": restart.as_secs_f64(),
    }))
}

/// Where a run over a real log finds it: a Kafka, or the embedded log of a folder; the schemas are in the folder.
#[derive(Debug, Clone)]
pub struct Place {
    /// In front of the names of topics and of the group, so that rounds over one broker have nothing in common.
    pub round: String,
    /// Addresses of brokers.
    pub kafka: Option<String>,
    /// Folder for the schemas and the embedded log.
    pub data: PathBuf,
}

impl Place {
    /// The job's settings in this round.
    fn config(&self) -> StreamConfig {
        let (mut config, round) = (config(), &self.round);
        let topics = &mut config.topics;
        let names = [
            &mut topics.clicks,
            &mut topics.metrics,
            &mut topics.dead_letter,
            &mut topics.late,
            &mut topics.changelog,
            &mut topics.partials,
            &mut topics.merge_changelog,
            &mut topics.control,
            &mut config.group,
        ];
        names.into_iter().for_each(|name| name.insert_str(0, round));
        config
    }
    async fn log(&self) -> Result<Arc<dyn EventLog>, Failure> {
        let env = Arc::new(SystemEnv::default());
        Ok(match &self.kafka {
            Some(brokers) => Arc::new(KafkaLog::new(KafkaConfig::new(brokers))?),
            None => Arc::new(open_embedded_log(&self.data.join("log"), env, EmbeddedLogConfig::STANDARD).await?),
        })
    }
    async fn registry(&self) -> Result<Arc<dyn SchemaRegistry>, Failure> {
        std::fs::create_dir_all(&self.data)?;
        let registry = EmbeddedRegistry::at(&self.data.join("registry.json"));
        RowEncoder::<Click>::register(&registry, Compatibility::BackwardTransitive).await?;
        Ok(Arc::new(registry))
    }
}

fn ports(log: Arc<dyn EventLog>) -> StreamPorts {
    StreamPorts { env: Arc::new(SystemEnv::default()), log, metrics: Arc::new(NoMetrics) }
}

async fn make_topic(log: &dyn EventLog, topic: &str, partitions: i32) -> Result<(), Failure> {
    let spec = TopicSpec { name: topic.to_owned(), partitions, retention: None, compact: false };
    Ok(log.create_topic(&spec).await?)
}

/// Sends the records of a run to the topic of clicks.
pub async fn fill(input: &Input, place: &Place) -> Result<Value, Failure> {
    const PIECE: usize = 5_000;
    let (config, log) = (place.config(), place.log().await?);
    place.registry().await?;
    let topic = &config.topics.clicks;
    make_topic(log.as_ref(), topic, input.shape.partitions as i32).await?;
    let mut producer = log.producer(None).await?;
    let measured = Measured::begin()?;
    let longest = input.partitions.iter().map(Vec::len).max().unwrap_or(0);
    for first in (0..longest).step_by(PIECE) {
        for (partition, all) in input.partitions.iter().enumerate() {
            let piece = all.get(first..all.len().min(first + PIECE)).unwrap_or_default();
            let out = |span: &_| OutRecord {
                topic: topic.clone(),
                partition: Some(partition as i32),
                key: None,
                value: Some(input.shared(*span)),
                headers: Vec::new(),
            };
            producer.send(piece.iter().map(out).collect()).await?;
        }
    }
    let mut report = measured.end()?;
    report["events"] = json!(input.shape.events);
    Ok(report)
}

/// What workers said after their commits, by partition; a partition that moves says more each time.
#[derive(Debug, Default)]
struct Said {
    read: BTreeMap<i32, u64>,
    closed: BTreeMap<i32, i64>,
}

/// Workers over a filled topic, until everything in it is processed and every window is written. The rate is that of the events:
/// from the first one that was read to the commit of the last.
pub async fn work(shape: Shape, place: &Place, workers: u16, poll_records: usize) -> Result<Value, Failure> {
    let config = place.config();
    let registry = place.registry().await?;
    let (total, end) = (shape.events + u64::from(shape.partitions), shape.end_ms() + 5 * 60_000);
    let done = Arc::new(AtomicBool::new(false));
    let said: Arc<Mutex<Said>> = Arc::default();
    let (begun_ns, read_ns) = (Arc::new(AtomicU64::new(u64::MAX)), Arc::new(AtomicU64::new(u64::MAX)));
    let opened = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    let measured = Measured::begin()?;
    for number in 0..workers {
        let (config, registry, place) = (config.clone(), registry.clone(), place.clone());
        let (said, done, begun_ns, read_ns) = (said.clone(), done.clone(), begun_ns.clone(), read_ns.clone());
        running.spawn(async move {
            let log: Arc<dyn EventLog> = match &place.kafka {
                Some(brokers) => {
                    let settings = KafkaConfig { poll_records_max: poll_records, ..KafkaConfig::new(brokers) };
                    Arc::new(KafkaLog::new(settings).map_err(|e| e.chain())?)
                }
                None => place.log().await.map_err(|e| e.to_string())?,
            };
            let mut job = worker(&config, ports(log), registry, &format!("worker-{number}")).await.map_err(|e| e.to_string())?;
            while !done.load(Ordering::Relaxed) {
                let step = job.step().await.map_err(|e| e.chain())?;
                let now = opened.elapsed().as_nanos() as u64;
                if step.records > 0 {
                    begun_ns.fetch_min(now, Ordering::Relaxed);
                }
                if step.committed {
                    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                    said.read.extend(job.clicks().iter().map(|(&p, task)| (p, task.counts().read)));
                    said.closed.extend(job.merges().iter().filter_map(|(&p, task)| Some((p, task.closed()?))));
                    if said.read.values().sum::<u64>() >= total {
                        read_ns.fetch_min(now, Ordering::Relaxed);
                        let all = said.closed.len() == config.merge_partitions as usize;
                        done.store(all && said.closed.values().all(|at| *at >= end), Ordering::Relaxed);
                    }
                }
            }
            job.close().await.map_err(|e| e.chain())
        });
    }
    while let Some(ended) = running.join_next().await {
        ended??;
    }
    let mut report = measured.end()?;
    // Joining the group is no part of the rate, and neither is the wait for the last two commits.
    let (begun, read) = (begun_ns.load(Ordering::Relaxed), read_ns.load(Ordering::Relaxed));
    report["seconds_from_first_record"] = json!(read.saturating_sub(begun) as f64 / 1e9);
    report["events"] = json!(shape.events);
    Ok(report)
}

/// What all workers left in the topic of metrics.
pub async fn windows(place: &Place) -> Result<Value, Failure> {
    let (config, log, registry) = (place.config(), place.log().await?, place.registry().await?);
    let mut values = Vec::new();
    for (partition, (mut offset, end)) in log.offsets(&config.topics.metrics).await? {
        let at = TopicPartition { topic: config.topics.metrics.clone(), partition };
        while offset < end {
            let (records, next) = log.read(&at, offset, 10_000).await?;
            values.extend(records.into_iter().map(|record| record.value));
            offset = next;
        }
    }
    Ok(json!({ "summary": summary(&rows(registry, &values).await?) }))
}

/// How long after the append of the record that completes a window its rows can be read by somebody else.
///
/// Event time runs `speed` times faster than the clock, so that windows of a minute close often.
pub async fn latency(place: &Place, rate: u64, seconds: u64, speed: u64) -> Result<Value, Failure> {
    const PARTITIONS: u64 = 4;
    const PIECE: Duration = Duration::from_millis(20);
    let (config, log, registry) = (place.config(), place.log().await?, place.registry().await?);
    make_topic(log.as_ref(), &config.topics.clicks, PARTITIONS as i32).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut job = worker(&config, ports(log.clone()), registry.clone(), "only").await?;
    let worker = tokio::spawn({
        let stop = stop.clone();
        async move {
            while !stop.load(Ordering::Relaxed) {
                job.step().await.map_err(|e| e.chain())?;
            }
            job.close().await.map_err(|e| e.chain())
        }
    });
    // When the record was about to be appended with which all partitions had passed the end of a window.
    let completed: Arc<Mutex<BTreeMap<i64, Instant>>> = Arc::default();
    let reader = tokio::spawn({
        let (stop, completed, log, registry) = (stop.clone(), completed.clone(), log.clone(), registry.clone());
        let topic = config.topics.metrics.clone();
        async move {
            let spec = GroupSpec {
                group: "latency".into(),
                member: "reader".into(),
                topics: vec![topic],
                start_at: StartAt::Earliest,
                session_timeout: Duration::from_secs(45),
            };
            let mut consumer = log.join(&spec).await.map_err(|e| e.chain())?;
            let mut delays = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let polled = consumer.poll(Duration::from_millis(50)).await.map_err(|e| e.chain())?;
                let seen = Instant::now();
                let Polled::Records { records, .. } = polled else { continue };
                let values: Vec<_> = records.into_iter().map(|record| record.value).collect();
                for row in rows(registry.clone(), &values).await.map_err(|e| e.to_string())? {
                    let completed = completed.lock().unwrap_or_else(PoisonError::into_inner);
                    if row.revision == 0
                        && row.page.is_none()
                        && let Some(at) = completed.get(&row.window_end_ms)
                    {
                        delays.push(seen.saturating_duration_since(*at).as_secs_f64());
                    }
                }
            }
            Ok::<_, String>(delays)
        }
    });
    let mut producer = log.producer(None).await?;
    let mut newest = [START_MS; PARTITIONS as usize];
    let (begun, mut sent, mut next_end) = (Instant::now(), 0_u64, START_MS + 60_000);
    let mut behind = Duration::ZERO;
    while begun.elapsed() < Duration::from_secs(seconds) {
        let due = begun.elapsed().as_millis() as u64 * rate / 1_000;
        let records: Vec<OutRecord> = (sent..due)
            .map(|n| {
                let user = mix(n) % 500_000;
                let timestamp_ms = START_MS + (n * 1_000 * speed / rate).cast_signed();
                let partition = user % PARTITIONS;
                newest[partition as usize] = timestamp_ms;
                let region = ["centro", "este", "norte", "oeste", "sur"][(mix(user) % 5) as usize];
                let (topic, value) = (config.topics.clicks.clone(), Some(record(user, region, timestamp_ms)));
                OutRecord { topic, partition: Some(partition as i32), key: None, value, headers: Vec::new() }
            })
            .collect();
        sent = due;
        let before = Instant::now();
        let bound = config.watermark_bound.as_millis() as i64;
        while newest.iter().all(|at| *at >= next_end + bound) {
            completed.lock().unwrap_or_else(PoisonError::into_inner).insert(next_end, before);
            next_end += 60_000;
        }
        if !records.is_empty() {
            producer.send(records).await?;
        }
        behind = behind.max(before.elapsed());
        tokio::time::sleep(PIECE.saturating_sub(before.elapsed())).await;
    }
    // Long enough for the last windows to be written.
    tokio::time::sleep(Duration::from_secs(5)).await;
    stop.store(true, Ordering::Relaxed);
    worker.await??;
    let mut delays = reader.await??;
    delays.sort_by(f64::total_cmp);
    if delays.is_empty() {
        return Err("measure latency: found no window, expected some; let it run longer".into());
    }
    let at = |share: f64| delays[((delays.len() - 1) as f64 * share).round() as usize];
    Ok(json!({
        "rate": rate, "sent": sent, "windows": completed.lock().unwrap_or_else(PoisonError::into_inner).len(), "rows": delays.len(),
        "p50_seconds": at(0.5), "p99_seconds": at(0.99), "max_seconds": at(1.0), "slowest_send_seconds": behind.as_secs_f64(),
    }))
}

/// Reads the shape of a run.
pub fn shape(folder: &Path) -> Result<Shape, Failure> {
    Ok(serde_json::from_slice(&std::fs::read(folder.join("shape.json"))?)?)
}
