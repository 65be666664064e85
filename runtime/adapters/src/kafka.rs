//! The event log in Apache Kafka, through librdkafka.
//!
//! librdkafka's calls block and its rebalances happen inside polls, so each consumer and each producer has a thread of its
//! own that takes one command at a time. A rebalance is noted when it comes and carried out from the caller's polls: what
//! is revoked is told, and given up with the next poll; while the caller does not poll, neither does the thread, so
//! `max.poll.interval.ms` (which equals the session timeout) bounds the wait. Offsets move in transactions only, reading
//! is committed reading, and `auto.offset.reset` is `error`: a position that is gone is never replaced silently.
//!
//! Known differences to the port's other adapters: `next_offset` ends behind the last record and not behind the marker of
//! its transaction, and `end_offset` equals it when the partition was read to its end; members are dynamic, because a
//! static one does not leave when it is closed.
#![expect(clippy::disallowed_methods, reason = "an adapter has threads, and waits for librdkafka outside of the runtime")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::{CStr, CString},
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use bytes::Bytes;
use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, Timestamp, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    bindings,
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Header, Headers, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext},
    types::RDKafkaRespErr,
    util::Timeout,
};
use simulacro_core::ports::{
    Disposition, PortError, Result,
    event_log::{
        EventLog, GroupConsumer, GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, StartAt, TopicPartition,
        TopicSpec,
    },
};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

/// How Kafka is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaConfig {
    /// Addresses, `host:port`, separated by commas.
    pub brokers: String,
    /// Longest wait for one request.
    pub request_timeout: Duration,
    /// Age at which the broker aborts an open transaction.
    pub transaction_timeout: Duration,
    /// How long records are tried to be sent before the outcome is unknown.
    pub delivery_timeout: Duration,
    /// Largest record, in bytes of key, value and headers; the broker's limit is for a whole batch.
    pub message_bytes_max: usize,
    /// Most records that one poll brings.
    pub poll_records_max: usize,
    /// Bytes of keys and values after which a poll brings no further record.
    pub poll_bytes_max: usize,
    /// Most bytes that a consumer holds in advance, in KiB.
    pub prefetch_kib: u32,
    /// Copies of each partition of a topic that is created.
    pub replication: i32,
    /// Further settings of librdkafka, for example `security.protocol`; they win over the rest.
    pub extra: BTreeMap<String, String>,
}

impl KafkaConfig {
    /// Standard settings for one set of addresses.
    pub fn new(brokers: impl Into<String>) -> Self {
        Self {
            brokers: brokers.into(),
            request_timeout: Duration::from_secs(30),
            transaction_timeout: Duration::from_secs(60),
            delivery_timeout: Duration::from_secs(120),
            message_bytes_max: 1_000_000,
            poll_records_max: 4_000,
            poll_bytes_max: 4 << 20,
            prefetch_kib: 65_536,
            replication: 1,
            extra: BTreeMap::new(),
        }
    }

    fn client(&self, settings: &[(&str, String)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers).set("client.id", "simulacro");
        let extra = self.extra.iter().map(|(k, v)| (k.as_str(), v.clone()));
        for (key, value) in settings.iter().cloned().chain(extra) {
            config.set(key, value);
        }
        config
    }

    fn reader(&self, settings: &[(&str, String)]) -> ClientConfig {
        let mut all = vec![
            ("enable.auto.commit", "false".to_owned()),
            ("enable.auto.offset.store", "false".to_owned()),
            ("enable.partition.eof", "true".to_owned()),
            ("auto.offset.reset", "error".to_owned()),
            ("isolation.level", "read_committed".to_owned()),
            ("queued.max.messages.kbytes", self.prefetch_kib.to_string()),
            ("fetch.queue.backoff.ms", "20".to_owned()),
            ("fetch.wait.max.ms", "100".to_owned()),
            ("allow.auto.create.topics", "false".to_owned()),
        ];
        all.extend_from_slice(settings);
        self.client(&all)
    }
}

/// The segment that is being written is never compacted, and Kafka's own is a gigabyte or a week: whoever restores state from a
/// compacted topic would read all that was ever written to it.
const COMPACT_SEGMENT_BYTES: &str = "16777216";
/// See [`COMPACT_SEGMENT_BYTES`].
const COMPACT_SEGMENT_MS: &str = "600000";

/// Kafka's name of a code; librdkafka has names of its own for some.
fn code_name(code: RDKafkaErrorCode) -> String {
    let known = match code {
        RDKafkaErrorCode::UnknownTopicOrPartition | RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownPartition => {
            "UNKNOWN_TOPIC_OR_PARTITION"
        }
        RDKafkaErrorCode::MessageSizeTooLarge => "MESSAGE_TOO_LARGE",
        RDKafkaErrorCode::MessageBatchTooLarge => "RECORD_LIST_TOO_LARGE",
        RDKafkaErrorCode::InvalidMessage => "CORRUPT_MESSAGE",
        RDKafkaErrorCode::NotLeaderForPartition => "NOT_LEADER_OR_FOLLOWER",
        RDKafkaErrorCode::CoordinatorLoadInProgress => "COORDINATOR_LOAD_IN_PROGRESS",
        RDKafkaErrorCode::CoordinatorNotAvailable => "COORDINATOR_NOT_AVAILABLE",
        RDKafkaErrorCode::NotCoordinator => "NOT_COORDINATOR",
        RDKafkaErrorCode::InvalidTopic => "INVALID_TOPIC_EXCEPTION",
        RDKafkaErrorCode::TopicAlreadyExists => "TOPIC_ALREADY_EXISTS",
        RDKafkaErrorCode::AutoOffsetReset => "OFFSET_OUT_OF_RANGE",
        RDKafkaErrorCode::Fenced => "INVALID_PRODUCER_EPOCH",
        RDKafkaErrorCode::State | RDKafkaErrorCode::NotConfigured => "INVALID_TXN_STATE",
        RDKafkaErrorCode::OperationTimedOut | RDKafkaErrorCode::MessageTimedOut | RDKafkaErrorCode::TimedOutQueue => {
            "REQUEST_TIMED_OUT"
        }
        RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::AllBrokersDown => "NETWORK_EXCEPTION",
        _ => "",
    };
    if !known.is_empty() {
        return known.to_owned();
    }
    let Ok(native) = RDKafkaRespErr::try_from(code as i32) else { return format!("{code:?}") };
    // SAFETY: librdkafka gives a static text for each of its codes.
    let name = unsafe { CStr::from_ptr(bindings::rd_kafka_err2name(native)) };
    let name = name.to_string_lossy().into_owned();
    // The transaction coordinator's word for the same thing.
    if name == "PRODUCER_FENCED" { "INVALID_PRODUCER_EPOCH".to_owned() } else { name }
}

/// Codes that go away by themselves: the request was not carried out, or carrying it out twice is the same.
fn passes(name: &str) -> bool {
    matches!(
        name,
        "REQUEST_TIMED_OUT"
            | "NETWORK_EXCEPTION"
            | "COORDINATOR_NOT_AVAILABLE"
            | "COORDINATOR_LOAD_IN_PROGRESS"
            | "NOT_COORDINATOR"
            | "LEADER_NOT_AVAILABLE"
            | "NOT_LEADER_OR_FOLLOWER"
            | "NOT_ENOUGH_REPLICAS"
            | "KAFKA_STORAGE_ERROR"
            | "UNSTABLE_OFFSET_COMMIT"
            | "CONCURRENT_TRANSACTIONS"
            | "NON_EMPTY_GROUP"
            | "_WAIT_COORD"
            | "_RETRY"
    )
}

fn with_code(what: String, name: String, disposition: Disposition) -> PortError {
    let error = match disposition {
        Disposition::Retryable => PortError::retryable(what),
        Disposition::Permanent => PortError::permanent(what),
        Disposition::Unknown => PortError::unknown(what),
    };
    error.code(name)
}

/// An error of a call that changes nothing, or the same when it is repeated.
fn idempotent(what: &str) -> impl Fn(KafkaError) -> PortError + '_ {
    move |error| match error.rdkafka_error_code() {
        None => PortError::permanent(what).because(error),
        Some(code) => {
            let name = code_name(code);
            let disposition = if passes(&name) { Disposition::Retryable } else { Disposition::Permanent };
            with_code(what.to_owned(), name, disposition).because(error)
        }
    }
}

fn unknown_topic(what: String) -> PortError {
    with_code(what, "UNKNOWN_TOPIC_OR_PARTITION".into(), Disposition::Permanent)
}

fn out_of_range(partition: &TopicPartition, offset: i64, low: i64) -> PortError {
    let what = format!("read {}-{} at offset {offset}: it begins at {low}", partition.topic, partition.partition);
    with_code(what, "OFFSET_OUT_OF_RANGE".into(), Disposition::Permanent)
}

/// Runs blocking work off the runtime.
async fn blocking<T: Send + 'static>(what: &'static str, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| PortError::unknown(what).because(e))?
}

fn to_record(message: &BorrowedMessage<'_>) -> LogRecord {
    let (key, value) = (message.key().map(Bytes::copy_from_slice), message.payload().map(Bytes::copy_from_slice));
    LogRecord { key, value, ..without_bytes(message) }
}

/// A record whose key and value are still to be copied.
fn without_bytes(message: &BorrowedMessage<'_>) -> LogRecord {
    let appended_ms = match message.timestamp() {
        Timestamp::LogAppendTime(ms) | Timestamp::CreateTime(ms) => ms,
        Timestamp::NotAvailable => -1,
    };
    let headers = message.headers().map_or(Vec::new(), |headers| {
        let of = |h: Header<'_, &[u8]>| (h.key.to_owned(), Bytes::copy_from_slice(h.value.unwrap_or_default()));
        headers.iter().map(of).collect()
    });
    LogRecord { offset: message.offset(), appended_ms, key: None, value: None, headers }
}

/// Bytes of a piece that keys and values are copied to.
const PIECE_BYTES: usize = 64 << 10;
/// Longest key or value that is copied to a piece.
const SHORT_BYTES: usize = 1 << 10;

/// Records of one partition, as one poll brings them.
///
/// Short keys and values share pieces: an allocation for each, given back by another thread, costs more than its copy. A
/// piece lives as long as any of its records, so pieces are small, and long values have memory of their own.
struct Run {
    partition: TopicPartition,
    records: Vec<LogRecord>,
    /// Bytes of keys and values.
    bytes: usize,
    piece: Vec<u8>,
    /// Records whose bytes are in the piece, and where; the key stands before the value.
    in_piece: Vec<Short>,
}

struct Short {
    record: usize,
    key: Option<Range<usize>>,
    value: Option<Range<usize>>,
}

impl Run {
    fn new(partition: TopicPartition) -> Self {
        Self { partition, records: Vec::new(), bytes: 0, piece: Vec::new(), in_piece: Vec::new() }
    }

    /// A record that was copied before.
    fn push(&mut self, record: LogRecord) {
        self.bytes += record.key.as_ref().map_or(0, Bytes::len) + record.value.as_ref().map_or(0, Bytes::len);
        self.records.push(record);
    }

    /// Copies a record.
    fn copy(&mut self, key: Option<&[u8]>, value: Option<&[u8]>, rest: LogRecord) {
        let of = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        let length = of(key) + of(value);
        if of(key).max(of(value)) > SHORT_BYTES {
            return self.push(LogRecord {
                key: key.map(Bytes::copy_from_slice),
                value: value.map(Bytes::copy_from_slice),
                ..rest
            });
        }
        if self.piece.len() + length > PIECE_BYTES {
            self.close_piece();
        }
        if self.piece.is_empty() {
            self.piece.reserve(PIECE_BYTES.min(16 * length.max(64)));
        }
        let mut put = |bytes: &[u8]| {
            let from = self.piece.len();
            self.piece.extend_from_slice(bytes);
            from..self.piece.len()
        };
        let short = Short { record: self.records.len(), key: key.map(&mut put), value: value.map(&mut put) };
        self.in_piece.push(short);
        self.bytes += length;
        self.records.push(rest);
    }

    fn close_piece(&mut self) {
        let piece = Bytes::from(std::mem::take(&mut self.piece));
        for Short { record, key, value } in self.in_piece.drain(..) {
            if let Some(record) = self.records.get_mut(record) {
                record.key = key.map(|at| piece.slice(at));
                record.value = value.map(|at| piece.slice(at));
            }
        }
    }

    /// All records, whole.
    fn close(mut self) -> (TopicPartition, Vec<LogRecord>) {
        self.close_piece();
        (self.partition, self.records)
    }
}

fn list<'a>(partitions: impl IntoIterator<Item = (&'a TopicPartition, Offset)>) -> Result<TopicPartitionList> {
    let mut list = TopicPartitionList::new();
    for (partition, offset) in partitions {
        let what = || format!("name offset {offset:?} of {}-{}", partition.topic, partition.partition);
        list.add_partition_offset(&partition.topic, partition.partition, offset)
            .map_err(|e| PortError::permanent(what()).because(e))?;
    }
    Ok(list)
}

fn partitions_of(list: &TopicPartitionList) -> Vec<TopicPartition> {
    let of = |e: rdkafka::topic_partition_list::TopicPartitionListElem<'_>| TopicPartition {
        topic: e.topic().to_owned(),
        partition: e.partition(),
    };
    list.elements().into_iter().map(of).collect()
}

/// A reader without a group, kept for the next read that goes on where it stands.
struct Reader {
    consumer: BaseConsumer<Told>,
    next_offset: i64,
    /// Nothing was asked since it was assigned, so the next end it tells is not one of before.
    fresh: bool,
}

/// Readers that are kept at most.
const READERS_MAX: usize = 64;

/// Kafka.
pub struct KafkaLog {
    config: KafkaConfig,
    /// For questions about topics.
    asker: Arc<BaseConsumer>,
    readers: Arc<Mutex<BTreeMap<TopicPartition, Reader>>>,
}

impl fmt::Debug for KafkaLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaLog").field("brokers", &self.config.brokers).finish_non_exhaustive()
    }
}

fn partition_count(asker: &BaseConsumer, topic: &str, timeout: Duration) -> Result<i32> {
    let what = format!("find topic {topic}");
    let metadata = asker.fetch_metadata(Some(topic), timeout).map_err(idempotent(&what))?;
    let found = metadata.topics().iter().find(|t| t.name() == topic).ok_or_else(|| unknown_topic(what.clone()))?;
    match found.error() {
        None => Ok(found.partitions().len() as i32),
        Some(error) => Err(idempotent(&what)(KafkaError::MetadataFetch(error.into()))),
    }
}

fn bounds(asker: &BaseConsumer, topic: &str, timeout: Duration) -> Result<BTreeMap<i32, (i64, i64)>> {
    let what = format!("find the offsets of {topic}");
    let of = |p| Ok((p, asker.fetch_watermarks(topic, p, timeout).map_err(idempotent(&what))?));
    (0..partition_count(asker, topic, timeout)?).map(of).collect()
}

impl KafkaLog {
    /// A client of the brokers of `config`. Connects when it is used.
    ///
    /// # Errors
    /// `Permanent` when librdkafka refuses a setting; the text names it.
    pub fn new(config: KafkaConfig) -> Result<Self> {
        let asker = config.reader(&[]).create().map_err(idempotent("make a Kafka client"))?;
        Ok(Self { config, asker: Arc::new(asker), readers: Arc::default() })
    }

    fn group_client(&self, group: &str) -> Result<BaseConsumer> {
        // Committed reading: while an open transaction holds newer offsets, librdkafka asks again.
        self.config.reader(&[("group.id", group.to_owned())]).create().map_err(idempotent("make a Kafka client"))
    }
}

#[async_trait]
impl EventLog for KafkaLog {
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        let what = format!("create topic {}", spec.name);
        let timeout = self.config.request_timeout;
        let admin: AdminClient<DefaultClientContext> = self.config.client(&[]).create().map_err(idempotent(&what))?;
        let retention = spec.retention.map_or("-1".to_owned(), |r| r.as_millis().to_string());
        let policy = match (spec.compact, spec.retention) {
            (true, Some(_)) => "compact,delete",
            (true, None) => "compact",
            (false, _) => "delete",
        };
        let mut topic = NewTopic::new(&spec.name, spec.partitions, TopicReplication::Fixed(self.config.replication))
            .set("cleanup.policy", policy)
            .set("retention.ms", &retention)
            .set("message.timestamp.type", "LogAppendTime");
        if spec.compact {
            topic = topic.set("segment.bytes", COMPACT_SEGMENT_BYTES).set("segment.ms", COMPACT_SEGMENT_MS);
        }
        let options = AdminOptions::new().operation_timeout(Some(timeout)).request_timeout(Some(timeout));
        let results = admin.create_topics([&topic], &options).await.map_err(idempotent(&what))?;
        for result in results {
            match result {
                Ok(_) | Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((_, code)) => return Err(idempotent(&what)(KafkaError::AdminOp(code))),
            }
        }
        let (asker, name, partitions) = (self.asker.clone(), spec.name.clone(), spec.partitions);
        blocking("create a topic", move || {
            // The metadata follow the creation a little later, and leaders a little after that.
            let until = Instant::now() + timeout;
            loop {
                match bounds(&asker, &name, timeout) {
                    Ok(found) if found.len() as i32 == partitions => return Ok(()),
                    Ok(found) => {
                        let what = format!("create topic {name}: it has {} partitions, not {partitions}", found.len());
                        return Err(with_code(what, "TOPIC_ALREADY_EXISTS".into(), Disposition::Permanent));
                    }
                    Err(error) if Instant::now() >= until => return Err(error),
                    Err(_) => std::thread::sleep(Duration::from_millis(50)),
                }
            }
        })
        .await
    }

    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>> {
        let (asker, topic, timeout) = (self.asker.clone(), topic.to_owned(), self.config.request_timeout);
        blocking("find offsets", move || bounds(&asker, &topic, timeout)).await
    }

    async fn offsets_at(&self, topic: &str, time_ms: i64) -> Result<BTreeMap<i32, i64>> {
        let (asker, topic, timeout) = (self.asker.clone(), topic.to_owned(), self.config.request_timeout);
        blocking("find offsets of a time", move || {
            let what = format!("find the offsets of {topic} at {time_ms}");
            // Asked first, so that an end is never behind a record that was there.
            let ends = bounds(&asker, &topic, timeout)?;
            let mut times = TopicPartitionList::new();
            for partition in ends.keys() {
                times.add_partition_offset(&topic, *partition, Offset::Offset(time_ms.max(0))).map_err(idempotent(&what))?;
            }
            let found = asker.offsets_for_times(times, timeout).map_err(idempotent(&what))?;
            let mut offsets = BTreeMap::new();
            for element in found.elements() {
                element.error().map_err(idempotent(&what))?;
                let end = ends.get(&element.partition()).map_or(0, |(_, end)| *end);
                let offset = if let Offset::Offset(offset) = element.offset() { offset.min(end) } else { end };
                offsets.insert(element.partition(), offset);
            }
            Ok(offsets)
        })
        .await
    }

    async fn committed(&self, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
        let client = self.group_client(group)?;
        let what = format!("find the offsets of {group} in {topic}");
        let (asker, topic, timeout) = (self.asker.clone(), topic.to_owned(), self.config.request_timeout);
        blocking("find committed offsets", move || {
            let mut asked = TopicPartitionList::new();
            for partition in 0..partition_count(&asker, &topic, timeout)? {
                asked.add_partition(&topic, partition);
            }
            let found = client.committed_offsets(asked, timeout).map_err(idempotent(&what))?;
            let mut offsets = BTreeMap::new();
            for element in found.elements() {
                element.error().map_err(idempotent(&what))?;
                if let Offset::Offset(offset) = element.offset() {
                    offsets.insert(element.partition(), offset);
                }
            }
            Ok(offsets)
        })
        .await
    }

    async fn reset(&self, group: &str, offsets: &BTreeMap<TopicPartition, i64>) -> Result<()> {
        let client = self.group_client(group)?;
        let what = format!("reset offsets of {group}");
        let to = list(offsets.iter().map(|(p, o)| (p, Offset::Offset(*o))))?;
        blocking("reset offsets", move || {
            client.commit(&to, CommitMode::Sync).map_err(|error| match error.rdkafka_error_code() {
                // What Kafka says to a commit from outside while the group has members.
                Some(
                    RDKafkaErrorCode::UnknownMemberId
                    | RDKafkaErrorCode::IllegalGeneration
                    | RDKafkaErrorCode::RebalanceInProgress,
                ) => with_code(what.clone(), "NON_EMPTY_GROUP".into(), Disposition::Retryable).because(error),
                Some(_) | None => idempotent(&what)(error),
            })
        })
        .await
    }

    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)> {
        let (config, asker, readers) = (self.config.clone(), self.asker.clone(), self.readers.clone());
        let partition = partition.clone();
        blocking("read a partition", move || {
            let lock = || readers.lock().unwrap_or_else(PoisonError::into_inner);
            let kept = lock().remove(&partition);
            let mut reader = match kept {
                Some(reader) if reader.next_offset == offset => reader,
                Some(_) | None => Reader::open(&config, &partition, offset)?,
            };
            let result = reader.read(&asker, &partition, max_records, config.request_timeout)?;
            let mut readers = lock();
            if readers.len() >= READERS_MAX {
                readers.pop_first();
            }
            readers.insert(partition, reader);
            Ok(result)
        })
        .await
    }

    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>> {
        let (asker, topics, timeout) = (self.asker.clone(), spec.topics.clone(), self.config.request_timeout);
        blocking("find the topics of a group", move || {
            topics.iter().try_for_each(|topic| partition_count(&asker, topic, timeout).map(|_| ()))
        })
        .await?;
        let heartbeat = (spec.session_timeout / 3).min(Duration::from_secs(3));
        let settings = [
            ("group.id", spec.group.clone()),
            ("client.id", spec.member.clone()),
            ("session.timeout.ms", spec.session_timeout.as_millis().to_string()),
            ("max.poll.interval.ms", spec.session_timeout.as_millis().to_string()),
            ("heartbeat.interval.ms", heartbeat.as_millis().to_string()),
            ("partition.assignment.strategy", "cooperative-sticky".to_owned()),
        ];
        let what = format!("join {} as {}", spec.group, spec.member);
        let consumer: BaseConsumer<Rebalances> =
            self.config.reader(&settings).create_with_context(Rebalances::default()).map_err(idempotent(&what))?;
        let topics: Vec<_> = spec.topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics).map_err(idempotent(&what))?;
        let member = Member {
            consumer,
            spec: spec.clone(),
            config: self.config.clone(),
            holds: BTreeMap::new(),
            pending: None,
            leaving: None,
            ahead: VecDeque::new(),
            undelivered: None,
        };
        let (commands, inbox) = mpsc::channel(1);
        let named = std::thread::Builder::new().name(format!("kafka-{}", spec.member));
        named.spawn(move || member.run(inbox)).map_err(|e| PortError::retryable(what).because(e))?;
        let metadata = GroupMetadata { group: spec.group.clone(), member: spec.member.clone(), generation: -1 };
        Ok(Box::new(KafkaConsumer { commands, metadata }))
    }

    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>> {
        let mut settings = vec![
            ("enable.idempotence", "true".to_owned()),
            ("acks", "all".to_owned()),
            ("partitioner", "murmur2_random".to_owned()),
            ("linger.ms", "5".to_owned()),
            ("compression.type", "lz4".to_owned()),
            ("message.timeout.ms", self.config.delivery_timeout.as_millis().to_string()),
            ("message.max.bytes", (self.config.message_bytes_max + 65_536).to_string()),
        ];
        if let Some(id) = transactional_id {
            settings.push(("transactional.id", id.to_owned()));
            settings.push(("transaction.timeout.ms", self.config.transaction_timeout.as_millis().to_string()));
            // It may not exceed the transaction's.
            settings.retain(|(key, _)| *key != "message.timeout.ms");
            let least = self.config.transaction_timeout.min(self.config.delivery_timeout);
            settings.push(("message.timeout.ms", least.as_millis().to_string()));
        }
        let what = format!("make producer {}", transactional_id.unwrap_or("without transactions"));
        let producer: BaseProducer<Deliveries> =
            self.config.client(&settings).create_with_context(Deliveries::default()).map_err(idempotent(&what))?;
        let transactional = transactional_id.is_some();
        let writer = Writer { producer, transactional, bytes_max: self.config.message_bytes_max, open: false, touched: false };
        let (commands, inbox) = mpsc::channel(1);
        let named = std::thread::Builder::new().name(format!("kafka-{}", transactional_id.unwrap_or("producer")));
        named.spawn(move || writer.run(inbox)).map_err(|e| PortError::retryable(what).because(e))?;
        let mut made = KafkaProducer { commands };
        if transactional {
            made.call(|reply| Write::Init(self.config.request_timeout, reply)).await?;
        }
        Ok(Box::new(made))
    }
}

impl Reader {
    fn open(config: &KafkaConfig, partition: &TopicPartition, offset: i64) -> Result<Self> {
        let what = format!("read {}-{}", partition.topic, partition.partition);
        // librdkafka wants a group's name to assign partitions; nothing is committed in it.
        let group = ("group.id", "simulacro-reader".to_owned());
        let consumer: BaseConsumer<Told> = config.reader(&[group]).create_with_context(Told).map_err(idempotent(&what))?;
        consumer.assign(&list([(partition, Offset::Offset(offset))])?).map_err(idempotent(&what))?;
        Ok(Self { consumer, next_offset: offset, fresh: true })
    }

    fn read(
        &mut self,
        asker: &BaseConsumer,
        partition: &TopicPartition,
        max_records: usize,
        timeout: Duration,
    ) -> Result<(Vec<LogRecord>, i64)> {
        let TopicPartition { topic, partition: number } = partition;
        let what = format!("read {topic}-{number} at offset {}", self.next_offset);
        // Before reading, so that the end of the partition lies at or behind this.
        let (low, end) = asker.fetch_watermarks(topic, *number, timeout).map_err(idempotent(&what))?;
        if self.next_offset < low {
            return Err(out_of_range(partition, self.next_offset, low));
        }
        if self.next_offset == end {
            // librdkafka tells an end once, so a reader that was told before would wait for nothing.
            return Ok((Vec::new(), end));
        }
        let mut fresh = std::mem::take(&mut self.fresh);
        let mut records = Vec::new();
        let until = Instant::now() + timeout;
        while records.len() < max_records {
            if self.next_offset >= end && !records.is_empty() {
                break;
            }
            match self.consumer.poll(until.saturating_duration_since(Instant::now())) {
                Some(Ok(message)) => {
                    let record = to_record(&message);
                    self.next_offset = record.offset + 1;
                    records.push(record);
                }
                // An end may have been told before records came behind it: only one that is told anew counts.
                Some(Err(KafkaError::PartitionEOF(_))) if !fresh && self.next_offset < end => {
                    let to = list([(partition, Offset::Offset(self.next_offset))])?;
                    self.consumer.assign(&to).map_err(idempotent(&what))?;
                    fresh = true;
                }
                Some(Err(KafkaError::PartitionEOF(_))) => {
                    // A marker may lie behind the last record.
                    self.next_offset = self.next_offset.max(end);
                    break;
                }
                Some(Err(error)) => match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::AutoOffsetReset) => return Err(out_of_range(partition, self.next_offset, low)),
                    Some(code) if passes(&code_name(code)) => {}
                    Some(_) | None => return Err(idempotent(&what)(error)),
                },
                None => return Err(with_code(what, "REQUEST_TIMED_OUT".into(), Disposition::Retryable)),
            }
        }
        Ok((records, self.next_offset))
    }
}

/// Rebalances as they come; the member's thread carries them out.
#[derive(Default)]
struct Rebalances {
    come: Mutex<VecDeque<Rebalance>>,
    closing: AtomicBool,
}

enum Rebalance {
    Assign(TopicPartitionList),
    Revoke(TopicPartitionList),
}

/// What librdkafka says on its own. The end of a partition is what a reader waits for, and no error.
fn told(error: &KafkaError, reason: &str) {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::PartitionEOF) => debug!(reason, "end of a partition"),
        _ => warn!(%error, reason, "said by librdkafka"),
    }
}

/// A reader's own word.
struct Told;

impl ClientContext for Told {
    fn error(&self, error: KafkaError, reason: &str) {
        told(&error, reason);
    }
}

impl ConsumerContext for Told {}

impl ClientContext for Rebalances {
    fn error(&self, error: KafkaError, reason: &str) {
        told(&error, reason);
    }
}

impl ConsumerContext for Rebalances {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, error: RDKafkaRespErr, partitions: &mut TopicPartitionList) {
        let assign = error == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        if self.closing.load(Ordering::SeqCst) {
            // Nobody polls any more, and closing waits for this.
            let _ = if assign { Ok(()) } else { consumer.incremental_unassign(partitions) };
            return;
        }
        let rebalance = if assign { Rebalance::Assign(partitions.clone()) } else { Rebalance::Revoke(partitions.clone()) };
        self.come.lock().unwrap_or_else(PoisonError::into_inner).push_back(rebalance);
    }
}

type Reply<T> = oneshot::Sender<Result<T>>;

/// What the handle asks of the member's thread.
enum Command {
    Poll(Duration, Reply<(Polled, GroupMetadata)>),
    Seek(TopicPartition, i64, Reply<()>),
    Pause(Vec<TopicPartition>, bool, Reply<()>),
    Close(Reply<()>),
}

/// The handle of a member: it sends commands to the thread that owns the consumer.
#[derive(Debug)]
struct KafkaConsumer {
    commands: mpsc::Sender<Command>,
    metadata: GroupMetadata,
}

async fn call<C, T>(commands: &mpsc::Sender<C>, command: impl FnOnce(Reply<T>) -> C) -> Result<T> {
    let gone = || PortError::permanent("use a Kafka client: it was closed");
    let (reply, answer) = oneshot::channel();
    commands.send(command(reply)).await.map_err(|_| gone())?;
    answer.await.map_err(|_| gone())?
}

#[async_trait]
impl GroupConsumer for KafkaConsumer {
    async fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let (polled, metadata) = call(&self.commands, |reply| Command::Poll(wait, reply)).await?;
        self.metadata = metadata;
        Ok(polled)
    }
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
        call(&self.commands, |reply| Command::Seek(partition.clone(), offset, reply)).await
    }
    async fn pause(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        call(&self.commands, |reply| Command::Pause(partitions.to_vec(), true, reply)).await
    }
    async fn resume(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        call(&self.commands, |reply| Command::Pause(partitions.to_vec(), false, reply)).await
    }
    fn metadata(&self) -> GroupMetadata {
        self.metadata.clone()
    }
    async fn close(&mut self) -> Result<()> {
        call(&self.commands, Command::Close).await
    }
}

#[derive(Debug)]
struct Held {
    next_offset: i64,
    paused: bool,
    /// Oldest offset at the time when the position was found to be gone.
    gone: Option<i64>,
    told_end: Option<i64>,
}

/// A member, on its thread.
struct Member {
    consumer: BaseConsumer<Rebalances>,
    spec: GroupSpec,
    config: KafkaConfig,
    holds: BTreeMap<TopicPartition, Held>,
    /// Assigned by the group, but where to begin is not known yet.
    pending: Option<TopicPartitionList>,
    /// Told as revoked; given up with the next poll.
    leaving: Option<TopicPartitionList>,
    /// Read, but of another partition than the last poll brought.
    ahead: VecDeque<(TopicPartition, LogRecord)>,
    /// The answer to a poll whose caller had gone away.
    undelivered: Option<Polled>,
}

/// What librdkafka's queue gave.
enum Taken {
    /// A record of the run's partition, which is in the run.
    Kept,
    /// A record of any other.
    Record(TopicPartition, LogRecord),
    End(i32),
    Nothing,
}

impl Member {
    fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut closing = None;
        while let Some(command) = inbox.blocking_recv() {
            // A caller that went away needs no answer, except to a poll: its records must not be lost.
            match command {
                Command::Poll(wait, reply) => {
                    let polled = self.poll(wait).map(|polled| (polled, self.metadata()));
                    if let Err(Ok((polled, _))) = reply.send(polled) {
                        self.undelivered = Some(polled);
                    }
                }
                Command::Seek(partition, offset, reply) => drop(reply.send(self.seek(&partition, offset))),
                Command::Pause(partitions, paused, reply) => drop(reply.send(self.pause(&partitions, paused))),
                Command::Close(reply) => {
                    closing = Some(reply);
                    break;
                }
            }
        }
        // Dropping it leaves the group; the last rebalance, which gives everything up, comes within that.
        self.consumer.context().closing.store(true, Ordering::SeqCst);
        drop(self);
        if let Some(reply) = closing {
            drop(reply.send(Ok(())));
        }
    }

    fn what(&self, doing: &str) -> String {
        format!("{doing} as {} of {}", self.spec.member, self.spec.group)
    }

    fn metadata(&self) -> GroupMetadata {
        let mut metadata = GroupMetadata { group: self.spec.group.clone(), member: String::new(), generation: -1 };
        // SAFETY: the client lives; the metadata are ours until they are destroyed, and the text is copied before.
        unsafe {
            let native = bindings::rd_kafka_consumer_group_metadata(self.consumer.client().native_ptr());
            if !native.is_null() {
                let member = bindings::rd_kafka_consumer_group_metadata_member_id(native);
                if !member.is_null() {
                    metadata.member = CStr::from_ptr(member).to_string_lossy().into_owned();
                }
                metadata.generation = bindings::rd_kafka_consumer_group_metadata_generation_id(native);
                bindings::rd_kafka_consumer_group_metadata_destroy(native);
            }
        }
        metadata
    }

    /// The end of a partition as the last fetch told it; 0 when there was none.
    fn known_end(&self, partition: &TopicPartition) -> i64 {
        let Ok(topic) = CString::new(partition.topic.as_str()) else { return 0 };
        let (mut low, mut high) = (0, 0);
        let native = self.consumer.client().native_ptr();
        // SAFETY: the client and the text live over the call, and the two numbers are ours.
        unsafe { bindings::rd_kafka_get_watermark_offsets(native, topic.as_ptr(), partition.partition, &mut low, &mut high) };
        high
    }

    fn poll(&mut self, wait: Duration) -> Result<Polled> {
        if let Some(gone) = self.leaving.take() {
            self.give_up(&gone)?;
        }
        if let Some(polled) = self.undelivered.take() {
            return Ok(polled);
        }
        let until = Instant::now() + wait;
        loop {
            let come = self.consumer.context().come.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            match come {
                Some(Rebalance::Assign(partitions)) => self.pending = Some(partitions),
                Some(Rebalance::Revoke(partitions)) => {
                    let lost = self.consumer.assignment_lost();
                    let names = partitions_of(&partitions);
                    self.forget_pending(&names)?;
                    if lost || names.is_empty() {
                        self.pending = None;
                        self.give_up(&partitions)?;
                    } else {
                        self.leaving = Some(partitions);
                    }
                    if !names.is_empty() {
                        return Ok(if lost { Polled::Lost(names) } else { Polled::Revoked(names) });
                    }
                }
                None => {}
            }
            if let Some(assigned) = self.take_pending(until)? {
                return Ok(Polled::Assigned(assigned));
            }
            if let Some((partition, held, low)) = self.holds.iter().find_map(|(p, h)| Some((p, h, h.gone?))) {
                return Err(out_of_range(partition, held.next_offset, low));
            }
            // Short, so that a rebalance that came within it is seen.
            let left = until.saturating_duration_since(Instant::now());
            if let Some(polled) = self.next(left.min(Duration::from_millis(50)))? {
                return Ok(polled);
            }
            let waiting = !self.consumer.context().come.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
            if left.is_zero() && !waiting {
                return Ok(Polled::Nothing);
            }
        }
    }

    fn give_up(&mut self, partitions: &TopicPartitionList) -> Result<()> {
        for partition in partitions_of(partitions) {
            self.forget(&partition);
            self.holds.remove(&partition);
        }
        let what = self.what("give partitions up");
        self.consumer.incremental_unassign(partitions).map_err(idempotent(&what))
    }

    /// Takes what is revoked out of what waits to be taken over. librdkafka gives up only what it was told to take, so it is
    /// told both; a member that did not would end here, and did when a rebalance found it waiting for stable offsets.
    fn forget_pending(&mut self, revoked: &[TopicPartition]) -> Result<()> {
        let Some(pending) = self.pending.take() else { return Ok(()) };
        let (gone, left): (Vec<_>, Vec<_>) = partitions_of(&pending).into_iter().partition(|p| revoked.contains(p));
        let what = self.what("give partitions up before they were taken over");
        self.consumer.incremental_assign(&list(gone.iter().map(|p| (p, Offset::Invalid)))?).map_err(idempotent(&what))?;
        if !left.is_empty() {
            self.pending = Some(list(left.iter().map(|p| (p, Offset::Invalid)))?);
        }
        Ok(())
    }

    fn forget(&mut self, partition: &TopicPartition) {
        self.ahead.retain(|(p, _)| p != partition);
        if matches!(&self.undelivered, Some(Polled::Records { partition: p, .. }) if p == partition) {
            self.undelivered = None;
        }
    }

    /// Begins to read what the group has assigned, as soon as its committed offsets are stable.
    fn take_pending(&mut self, until: Instant) -> Result<Option<Vec<TopicPartition>>> {
        let Some(mut partitions) = self.pending.take() else { return Ok(None) };
        let what = self.what("take partitions over");
        let names = partitions_of(&partitions);
        if names.is_empty() {
            self.consumer.incremental_assign(&partitions).map_err(idempotent(&what))?;
            return Ok(None);
        }
        // An owner before may still commit newer offsets: librdkafka asks until they are stable, within this time.
        let left = until.saturating_duration_since(Instant::now()).clamp(Duration::from_millis(20), Duration::from_millis(500));
        let committed = match self.consumer.committed_offsets(partitions.clone(), left) {
            Ok(committed) if committed.elements().iter().all(|e| e.error().is_ok()) => committed,
            Ok(_) => {
                self.pending = Some(partitions);
                return Ok(None);
            }
            Err(error) if error.rdkafka_error_code().is_some_and(|code| passes(&code_name(code))) => {
                self.pending = Some(partitions);
                return Ok(None);
            }
            Err(error) => return Err(idempotent(&what)(error)),
        };
        for element in committed.elements() {
            let partition = TopicPartition { topic: element.topic().to_owned(), partition: element.partition() };
            let next_offset = match element.offset() {
                Offset::Offset(offset) => offset,
                _ => {
                    let bounds =
                        self.consumer.fetch_watermarks(&partition.topic, partition.partition, self.config.request_timeout);
                    let (low, end) = match bounds {
                        Ok(bounds) => bounds,
                        Err(error) => {
                            self.pending = Some(partitions);
                            return Err(idempotent(&what)(error));
                        }
                    };
                    match self.spec.start_at {
                        StartAt::Earliest => low,
                        StartAt::Latest => end,
                    }
                }
            };
            partitions
                .set_partition_offset(&partition.topic, partition.partition, Offset::Offset(next_offset))
                .map_err(idempotent(&what))?;
            self.holds.insert(partition, Held { next_offset, paused: false, gone: None, told_end: None });
        }
        self.consumer.incremental_assign(&partitions).map_err(idempotent(&what))?;
        Ok(Some(names))
    }

    fn take(&mut self, wait: Duration, run: Option<&mut Run>) -> Result<Taken> {
        match self.consumer.poll(wait) {
            None => Ok(Taken::Nothing),
            Some(Ok(message)) => {
                if let Some(run) = run
                    && run.partition.partition == message.partition()
                    && run.partition.topic == message.topic()
                {
                    run.copy(message.key(), message.payload(), without_bytes(&message));
                    return Ok(Taken::Kept);
                }
                let partition = TopicPartition { topic: message.topic().to_owned(), partition: message.partition() };
                Ok(Taken::Record(partition, to_record(&message)))
            }
            Some(Err(KafkaError::PartitionEOF(partition))) => Ok(Taken::End(partition)),
            Some(Err(error)) => {
                let what = self.what("poll");
                match error.rdkafka_error_code() {
                    Some(RDKafkaErrorCode::AutoOffsetReset) => self.find_gone().map(|()| Taken::Nothing),
                    // The rebalance that follows tells it.
                    Some(RDKafkaErrorCode::PollExceeded) => Ok(Taken::Nothing),
                    // librdkafka goes on trying.
                    Some(code) if passes(&code_name(code)) && !matches!(error, KafkaError::MessageConsumptionFatal(_)) => {
                        Ok(Taken::Nothing)
                    }
                    Some(_) | None => Err(idempotent(&what)(error)),
                }
            }
        }
    }

    /// Finds the partitions whose position is not kept any more; the error that says so does not name them.
    fn find_gone(&mut self) -> Result<()> {
        let what = self.what("find what is gone");
        for (partition, held) in &mut self.holds {
            let bounds = self.consumer.fetch_watermarks(&partition.topic, partition.partition, self.config.request_timeout);
            let (low, end) = bounds.map_err(idempotent(&what))?;
            if held.next_offset < low || held.next_offset > end {
                held.gone = Some(low);
            }
        }
        Ok(())
    }

    /// The next records of one partition, or the news that one was read to its end.
    fn next(&mut self, wait: Duration) -> Result<Option<Polled>> {
        let kept = self.ahead.iter().position(|(p, _)| self.holds.get(p).is_some_and(|h| !h.paused));
        let first = match kept.and_then(|at| self.ahead.remove(at)) {
            Some((partition, record)) => Taken::Record(partition, record),
            None => self.take(wait, None)?,
        };
        let (partition, record) = match first {
            Taken::Nothing | Taken::Kept => return Ok(None),
            Taken::End(number) => return Ok(self.at_end(number)),
            Taken::Record(partition, record) if self.holds.contains_key(&partition) => (partition, record),
            Taken::Record(..) => return Ok(None),
        };
        let mut run = Run::new(partition);
        run.push(record);
        let mut at_end = false;
        while run.records.len() < self.config.poll_records_max && run.bytes < self.config.poll_bytes_max {
            let kept = self.ahead.iter().position(|(p, _)| *p == run.partition);
            if let Some((_, record)) = kept.and_then(|at| self.ahead.remove(at)) {
                run.push(record);
                continue;
            }
            match self.take(Duration::ZERO, Some(&mut run))? {
                Taken::Kept => {}
                Taken::Record(other, record) => {
                    self.ahead.push_back((other, record));
                    break;
                }
                Taken::End(number) if self.only(number).as_ref() == Some(&run.partition) => {
                    at_end = true;
                    break;
                }
                Taken::End(_) | Taken::Nothing => break,
            }
        }
        let (partition, records) = run.close();
        let next_offset = records.last().map_or(0, |r| r.offset) + 1;
        let end_offset = if at_end { next_offset } else { self.known_end(&partition).max(next_offset + 1) };
        if let Some(held) = self.holds.get_mut(&partition) {
            held.next_offset = next_offset;
            held.told_end = at_end.then_some(next_offset);
        }
        Ok(Some(Polled::Records { partition, records, next_offset, end_offset }))
    }

    /// The held partition of this number, when no other topic has one too.
    fn only(&self, number: i32) -> Option<TopicPartition> {
        let mut found = self.holds.keys().filter(|p| p.partition == number);
        let first = found.next().cloned();
        if found.next().is_none() { first } else { None }
    }

    fn at_end(&mut self, number: i32) -> Option<Polled> {
        let partition = self.only(number)?;
        if self.ahead.iter().any(|(p, _)| *p == partition) {
            return None;
        }
        let held = self.holds.get_mut(&partition)?;
        let end_offset = held.next_offset;
        if held.paused || held.told_end.replace(end_offset) == Some(end_offset) {
            return None;
        }
        Some(Polled::Records { partition, records: Vec::new(), next_offset: end_offset, end_offset })
    }

    fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
        let what = self.what(&format!("seek {}-{} to {offset}", partition.topic, partition.partition));
        self.forget(partition);
        let Some(held) = self.holds.get_mut(partition) else {
            return Err(PortError::permanent(format!("{what}: it is not assigned")));
        };
        (held.next_offset, held.gone, held.told_end) = (offset, None, None);
        let paused = held.paused;
        // Taken back and given again: this also works for a partition whose position was gone, and drops what was fetched.
        let there = list([(partition, Offset::Offset(offset))])?;
        self.consumer.incremental_unassign(&there).map_err(idempotent(&what))?;
        self.consumer.incremental_assign(&there).map_err(idempotent(&what))?;
        if paused { self.consumer.pause(&there).map_err(idempotent(&what)) } else { Ok(()) }
    }

    fn pause(&mut self, partitions: &[TopicPartition], paused: bool) -> Result<()> {
        let what = self.what(if paused { "pause" } else { "resume" });
        for partition in partitions {
            let Some(held) = self.holds.get_mut(partition) else {
                return Err(PortError::permanent(format!(
                    "{what} {}-{}: it is not assigned",
                    partition.topic, partition.partition
                )));
            };
            held.paused = paused;
        }
        let them = list(partitions.iter().map(|p| (p, Offset::Invalid)))?;
        if paused { self.consumer.pause(&them) } else { self.consumer.resume(&them) }.map_err(idempotent(&what))
    }
}

/// Delivery reports that tell of a failure.
#[derive(Default)]
struct Deliveries {
    failed: Mutex<BTreeSet<(i32, String)>>,
}

impl ClientContext for Deliveries {}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = ();
    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result
            && let Some(code) = error.rdkafka_error_code()
        {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).insert((code as i32, code_name(code)));
        }
    }
}

/// What the handle asks of the producer's thread.
enum Write {
    Init(Duration, Reply<()>),
    Begin(Reply<()>),
    Send(Vec<OutRecord>, Reply<()>),
    Offsets(BTreeMap<TopicPartition, i64>, GroupMetadata, Reply<()>),
    End(bool, Reply<()>),
}

/// The handle of a producer.
#[derive(Debug)]
struct KafkaProducer {
    commands: mpsc::Sender<Write>,
}

impl KafkaProducer {
    async fn call(&mut self, command: impl FnOnce(Reply<()>) -> Write) -> Result<()> {
        call(&self.commands, command).await
    }
}

#[async_trait]
impl Producer for KafkaProducer {
    async fn begin(&mut self) -> Result<()> {
        self.call(Write::Begin).await
    }
    async fn send(&mut self, records: Vec<OutRecord>) -> Result<()> {
        self.call(|reply| Write::Send(records, reply)).await
    }
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
        self.call(|reply| Write::Offsets(offsets.clone(), group.clone(), reply)).await
    }
    async fn commit(&mut self) -> Result<()> {
        self.call(|reply| Write::End(true, reply)).await
    }
    async fn abort(&mut self) -> Result<()> {
        self.call(|reply| Write::End(false, reply)).await
    }
}

/// A producer, on its thread.
struct Writer {
    producer: BaseProducer<Deliveries>,
    transactional: bool,
    bytes_max: usize,
    open: bool,
    /// Whether anything may have entered the open transaction.
    touched: bool,
}

impl Writer {
    fn run(mut self, mut inbox: mpsc::Receiver<Write>) {
        while let Some(command) = inbox.blocking_recv() {
            // A caller that went away finds the outcome in the committed offsets.
            match command {
                Write::Init(timeout, reply) => {
                    let result = self.producer.init_transactions(timeout);
                    drop(reply.send(result.map_err(|e| self.error("take a transactional id over".into(), e))));
                }
                Write::Begin(reply) => drop(reply.send(self.begin())),
                Write::Send(records, reply) => drop(reply.send(self.send(&records))),
                Write::Offsets(offsets, group, reply) => drop(reply.send(self.offsets(&offsets, &group))),
                Write::End(commit, reply) => drop(reply.send(self.end(commit))),
            }
        }
    }

    /// What a caller may do after this error of a transaction.
    fn error(&self, what: String, error: KafkaError) -> PortError {
        let (code, retriable, abort) = match &error {
            KafkaError::Transaction(e) => (Some(e.code()), e.is_retriable(), e.txn_requires_abort()),
            other => (other.rdkafka_error_code(), false, false),
        };
        self.classified(what, code, retriable, abort).because(error)
    }

    fn classified(&self, what: String, code: Option<RDKafkaErrorCode>, retriable: bool, abort: bool) -> PortError {
        // After a fatal error each call says only that there was one.
        let fatal = self.producer.client().fatal_error();
        let name = fatal.as_ref().map(|f| f.0).or(code).map_or_else(|| "UNKNOWN_SERVER_ERROR".into(), code_name);
        let disposition = if fatal.is_some() || name == "INVALID_TXN_STATE" {
            Disposition::Permanent
        } else if abort {
            Disposition::Unknown
        } else if retriable {
            Disposition::Retryable
        } else if passes(&name) {
            Disposition::Unknown
        } else {
            Disposition::Permanent
        };
        with_code(what, name, disposition)
    }

    fn begin(&mut self) -> Result<()> {
        self.producer.begin_transaction().map_err(|e| self.error("begin a transaction".into(), e))?;
        (self.open, self.touched) = (true, false);
        Ok(())
    }

    fn send(&mut self, records: &[OutRecord]) -> Result<()> {
        if self.transactional && !self.open && self.producer.client().fatal_error().is_none() {
            let what = "send records: no transaction is open".to_owned();
            return Err(with_code(what, "INVALID_TXN_STATE".into(), Disposition::Permanent));
        }
        // All are looked at before the first is sent, so that a call is kept whole or not at all.
        for record in records {
            let of = |b: &Option<Bytes>| b.as_ref().map_or(0, Bytes::len);
            let headers: usize = record.headers.iter().map(|(name, b)| name.len() + b.len()).sum();
            let bytes = of(&record.key) + of(&record.value) + headers;
            if bytes > self.bytes_max {
                let what = format!("append {bytes} bytes to {}", record.topic);
                return Err(with_code(what, "MESSAGE_TOO_LARGE".into(), Disposition::Permanent));
            }
        }
        for record in records {
            self.enqueue(record)?;
        }
        self.flush()?;
        let failed = std::mem::take(&mut *self.producer.context().failed.lock().unwrap_or_else(PoisonError::into_inner));
        match failed.into_iter().next() {
            None => Ok(()),
            Some((_, name)) => {
                let fatal = self.producer.client().fatal_error().map(|f| code_name(f.0));
                let what = "send records".to_owned();
                Err(match fatal {
                    Some(name) => with_code(what, name, Disposition::Permanent),
                    // Others of the call may have been kept.
                    None if self.transactional || passes(&name) => with_code(what, name, Disposition::Unknown),
                    None => with_code(what, name, Disposition::Permanent),
                })
            }
        }
    }

    /// Waits until each record is acknowledged or given up. rdkafka's own wait asks every tenth of a second and sleeps in
    /// between whatever comes, which would be the largest part of a commit.
    fn flush(&self) -> Result<()> {
        loop {
            match self.producer.flush(Duration::ZERO) {
                Ok(()) => return Ok(()),
                Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) => self.producer.poll(Duration::from_millis(1)),
                Err(error) => return Err(self.error("send records".into(), error)),
            }
        }
    }

    fn enqueue(&mut self, record: &OutRecord) -> Result<()> {
        loop {
            let mut out: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(&record.topic);
            out.partition = record.partition;
            out.key = record.key.as_deref();
            out.payload = record.value.as_deref();
            if !record.headers.is_empty() {
                let add = |all: OwnedHeaders, (name, value): &(String, Bytes)| {
                    all.insert(Header { key: name, value: Some(value.as_ref()) })
                };
                out = out.headers(record.headers.iter().fold(OwnedHeaders::new(), add));
            }
            match self.producer.send(out) {
                Ok(()) => {
                    self.touched = true;
                    return Ok(());
                }
                Err((error, _)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::QueueFull) => {
                    self.producer.poll(Duration::from_millis(10));
                }
                Err((error, _)) => return Err(self.error(format!("send a record to {}", record.topic), error)),
            }
        }
    }

    fn offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
        let what = format!("put offsets of {} into the transaction", group.group);
        let nul = |e| PortError::permanent(what.clone()).because(e);
        let offsets = list(offsets.iter().map(|(p, o)| (p, Offset::Offset(*o))))?;
        let name = CString::new(group.group.as_str()).map_err(nul)?;
        let member = CString::new(group.member.as_str()).map_err(nul)?;
        self.touched = true;
        // SAFETY: the client, the list and the texts live over the calls; the metadata and the error are ours and are
        // destroyed once, after their last use.
        let failed = unsafe {
            let metadata = bindings::rd_kafka_consumer_group_metadata_new_with_genid(
                name.as_ptr(),
                group.generation,
                member.as_ptr(),
                std::ptr::null(),
            );
            let native = self.producer.client().native_ptr();
            let error = bindings::rd_kafka_send_offsets_to_transaction(native, offsets.ptr(), metadata, -1);
            bindings::rd_kafka_consumer_group_metadata_destroy(metadata);
            (!error.is_null()).then(|| {
                let code = RDKafkaErrorCode::from(bindings::rd_kafka_error_code(error));
                let text = CStr::from_ptr(bindings::rd_kafka_error_string(error)).to_string_lossy().into_owned();
                let retriable = bindings::rd_kafka_error_is_retriable(error) != 0;
                let abort = bindings::rd_kafka_error_txn_requires_abort(error) != 0;
                bindings::rd_kafka_error_destroy(error);
                (code, text, retriable, abort)
            })
        };
        match failed {
            None => Ok(()),
            Some((code, text, retriable, abort)) => {
                Err(self.classified(what.clone(), Some(code), retriable, abort).because(text))
            }
        }
    }

    fn end(&mut self, commit: bool) -> Result<()> {
        let fatal = self.producer.client().fatal_error().is_some();
        if !commit && !self.open && !fatal && self.transactional {
            return Ok(());
        }
        // A transaction that nothing has entered is not known to the broker.
        let result = if commit && (self.touched || !self.open) {
            self.producer.commit_transaction(Timeout::Never)
        } else {
            self.producer.abort_transaction(Timeout::Never)
        };
        let what = if commit { "commit the transaction" } else { "abort the transaction" };
        result.map_err(|e| self.error(what.into(), e))?;
        self.open = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_keeps_every_key_and_value_as_it_came() {
        let lengths = [None, Some(0), Some(1), Some(60), Some(SHORT_BYTES), Some(SHORT_BYTES + 1), Some(PIECE_BYTES)];
        let mut run = Run::new(TopicPartition { topic: "clicks".into(), partition: 3 });
        let mut expected = Vec::new();
        // Often enough for several pieces.
        for offset in 0..3_000_i64 {
            let of = |at: i64| {
                let length = lengths[usize::try_from(at).unwrap() % lengths.len()];
                length.map(|length| vec![u8::try_from(at % 251).unwrap(); length])
            };
            let (key, value) = (of(offset), of(offset / 7));
            let rest = LogRecord { offset, appended_ms: -offset, key: None, value: None, headers: Vec::new() };
            if offset % 5 == 0 {
                let (key, value) = (key.clone().map(Bytes::from), value.clone().map(Bytes::from));
                run.push(LogRecord { key, value, ..rest.clone() });
            } else {
                run.copy(key.as_deref(), value.as_deref(), rest.clone());
            }
            expected.push(LogRecord { key: key.map(Bytes::from), value: value.map(Bytes::from), ..rest });
        }
        let bytes = |r: &LogRecord| r.key.as_ref().map_or(0, Bytes::len) + r.value.as_ref().map_or(0, Bytes::len);
        assert_eq!(run.bytes, expected.iter().map(bytes).sum::<usize>());
        let (partition, records) = run.close();
        assert_eq!((partition.partition, records == expected), (3, true));
    }

    #[test]
    fn a_piece_holds_many_records_and_no_more_than_its_size() {
        let mut run = Run::new(TopicPartition { topic: "clicks".into(), partition: 0 });
        for offset in 0..10_000 {
            let rest = LogRecord { offset, appended_ms: 0, key: None, value: None, headers: Vec::new() };
            run.copy(None, Some(&[7; 64]), rest);
        }
        let (_, records) = run.close();
        let starts: BTreeSet<_> = records.iter().filter_map(|r| r.value.as_ref()).map(|v| v.as_ptr() as usize).collect();
        // Values that stand behind each other are in one piece; where one begins, the allocation before it has ended.
        let breaks = starts.iter().zip(starts.iter().skip(1)).filter(|(a, b)| *b - *a != 64).count();
        assert!((5..=20).contains(&breaks), "{breaks} pieces");
    }
}
