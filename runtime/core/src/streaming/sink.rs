//! A sink: records of a topic into a table, each exactly once, by a consumer group of its own.
//!
//! The table knows the position: the epoch of a write is the offset after its last record, and a write says at which offset
//! it begins. Whoever takes a partition over asks the table and reads on from there, so a crash, a rebalance, a repeated
//! write or a member that comes back from the dead neither repeats nor loses a record. No offset is committed to the group.
//!
//! Memory is bounded by [`SinkSpec::bytes_max`] and one poll. One loop polls and writes, so a slow table slows the polls;
//! while a write takes long the partitions are paused and polled all the same, so the group does not lose the member.
//! Left out: what a record becomes, which is its [`SinkTable`]'s business.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use tracing::{info, warn};

use super::{
    config::{StreamConfig, ms},
    job::StreamPorts,
};
use crate::ports::{
    Commit, Disposition, EPOCH_MOVED, Env, PortError, Result,
    event_log::{GroupConsumer, GroupSpec, LogRecord, Polled, StartAt, TopicPartition},
};

/// How a sink reads and when it writes; every choice is visible, so there is no `Default`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SinkSpec {
    /// Name, for metrics and logs: the table's.
    pub name: &'static str,
    /// Consumer group.
    pub group: String,
    /// Topic.
    pub topic: String,
    /// Where a partition begins of which the table has nothing.
    pub start_at: StartAt,
    /// Longest time that a record waits for its write.
    pub flush_after: Duration,
    /// Records of a partition after which they are written earlier.
    pub records_max: usize,
    /// Bytes of records that are held, of all partitions together, before all are written.
    pub bytes_max: usize,
    /// Repetitions of a call that fails, before the sink gives up.
    pub retries_max: u32,
    /// Wait before the first repetition; it doubles, up to 64 times this.
    pub retry_backoff: Duration,
    /// Longest wait of one poll.
    pub poll_wait: Duration,
    /// A member that is silent for longer loses its partitions.
    pub session_timeout: Duration,
}

impl SinkSpec {
    /// A sink of this job: group and bounds follow from the job's.
    pub fn of(config: &StreamConfig, name: &'static str, topic: &str, flush_after: Duration) -> Self {
        Self {
            name,
            group: format!("{}.{name}", config.group),
            topic: topic.to_owned(),
            start_at: StartAt::Earliest,
            flush_after,
            records_max: config.sink_records_max,
            bytes_max: config.sink_bytes_max,
            retries_max: config.retries_max,
            retry_backoff: config.retry_backoff,
            poll_wait: config.poll_wait,
            session_timeout: config.session_timeout,
        }
    }
}

/// Answers of polls that are kept while a write is under way.
const PENDING_MAX: usize = 16;

/// What a write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Whether this call wrote it.
    pub commit: Commit,
    /// Rows written.
    pub rows: u64,
    /// Records that have no row in the table, by its own rules; each has its fate elsewhere.
    pub left_out: u64,
}

/// Where records go.
#[async_trait]
pub trait SinkTable: fmt::Debug + Send {
    /// Offset after the last record of a partition that the table has; `None` when it has none.
    async fn position(&mut self, at: &TopicPartition) -> Result<Option<i64>>;
    /// Writes the records from position `after` up to `next`, exclusive, all or none, at most once. Records without a row
    /// move the position, too.
    ///
    /// # Errors
    /// `Retryable` with code [`EPOCH_MOVED`] when the position is another. Otherwise any disposition; after `Unknown` the
    /// same call may be repeated.
    async fn write(&mut self, at: &TopicPartition, after: Option<i64>, next: i64, records: &[LogRecord]) -> Result<Written>;
}

/// Records of a partition that wait to be written.
#[derive(Debug)]
struct Buffer {
    /// Position in the table.
    after: Option<i64>,
    /// Next offset to read.
    next: i64,
    records: Vec<LogRecord>,
    bytes: usize,
    /// When the oldest of them was read.
    since_ms: i64,
}

impl Buffer {
    fn new(after: Option<i64>, next: i64) -> Self {
        Self { after, next, records: Vec::new(), bytes: 0, since_ms: 0 }
    }
    fn clear(&mut self) {
        self.records.clear();
        self.bytes = 0;
    }
}

/// One member of a sink's group.
pub struct Sink {
    spec: SinkSpec,
    ports: StreamPorts,
    consumer: Box<dyn GroupConsumer>,
    table: Box<dyn SinkTable>,
    buffers: BTreeMap<TopicPartition, Buffer>,
    /// What was polled while a write was under way.
    pending: VecDeque<Polled>,
    failed_polls: u32,
    rows: u64,
}

impl fmt::Debug for Sink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sink").field("spec", &self.spec).field("buffers", &self.buffers.keys()).finish_non_exhaustive()
    }
}

fn size(record: &LogRecord) -> usize {
    let bytes = |b: &Option<bytes::Bytes>| b.as_ref().map_or(0, bytes::Bytes::len);
    let headers = record.headers.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
    bytes(&record.key) + bytes(&record.value) + headers + size_of::<LogRecord>()
}

fn backoff(first: Duration, attempt: u32) -> Duration {
    first.saturating_mul(1 << attempt.saturating_sub(1).min(6))
}

/// Waits before a call is repeated, or gives the error back.
async fn again(spec: &SinkSpec, env: &dyn Env, attempt: &mut u32, error: PortError) -> Result<()> {
    *attempt += 1;
    if error.disposition == Disposition::Permanent || *attempt > spec.retries_max {
        return Err(error);
    }
    warn!(sink = spec.name, error = %error.chain(), attempt, "call failed");
    env.sleep(backoff(spec.retry_backoff, *attempt)).await;
    Ok(())
}

impl Sink {
    /// Joins the sink's group as `member`, which must be unique in it.
    ///
    /// # Errors
    /// Those of [`crate::ports::EventLog::join`].
    pub async fn open(spec: SinkSpec, ports: StreamPorts, member: &str, table: Box<dyn SinkTable>) -> Result<Self> {
        let group = GroupSpec {
            group: spec.group.clone(),
            member: member.to_owned(),
            topics: vec![spec.topic.clone()],
            start_at: spec.start_at,
            session_timeout: spec.session_timeout,
        };
        let consumer = ports.log.join(&group).await?;
        let (buffers, pending) = (BTreeMap::new(), VecDeque::new());
        Ok(Self { spec, ports, consumer, table, buffers, pending, failed_polls: 0, rows: 0 })
    }

    /// Rows that this member has written.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Bytes of records that wait to be written.
    pub fn bytes(&self) -> usize {
        self.buffers.values().map(|b| b.bytes).sum()
    }

    /// One turn of the loop: one poll, and the writes that are due.
    ///
    /// # Errors
    /// When this member must not go on: a call that failed more often than configured, a record that cannot be written, or
    /// one that is not kept any more (`OFFSET_OUT_OF_RANGE`: never skipped silently). The table is consistent then; a new
    /// member goes on from it.
    pub async fn step(&mut self) -> Result<()> {
        let polled = match self.pending.pop_front() {
            Some(polled) => Ok(polled),
            None => self.consumer.poll(self.wait()).await,
        };
        self.failed_polls = if polled.is_ok() { 0 } else { self.failed_polls + 1 };
        match polled {
            Ok(Polled::Nothing) => {}
            Ok(Polled::Assigned(partitions)) => {
                for at in &partitions {
                    self.assign(at).await?;
                }
            }
            Ok(Polled::Revoked(partitions)) => {
                for at in &partitions {
                    // The next poll lets go of them, so there is none before they are written.
                    self.flush(at, false).await?;
                    self.buffers.remove(at);
                }
            }
            Ok(Polled::Lost(partitions)) => {
                // What was held is read again by whoever has them now.
                partitions.iter().for_each(|at| drop(self.buffers.remove(at)));
            }
            Ok(Polled::Records { partition, records, next_offset, .. }) => {
                self.take(&partition, records, next_offset).await?;
            }
            Err(error) => {
                if error.disposition == Disposition::Permanent || self.failed_polls > self.spec.retries_max {
                    return Err(error);
                }
                warn!(sink = self.spec.name, error = %error.chain(), "poll failed");
                self.ports.env.sleep(backoff(self.spec.retry_backoff, self.failed_polls)).await;
            }
        }
        for at in self.due() {
            // What the group has said meanwhile comes first.
            if !self.pending.is_empty() {
                break;
            }
            self.flush(&at, true).await?;
        }
        Ok(())
    }

    /// Takes a step on the way to the end, and says whether everything that is in the topic now is in the table. At the end
    /// nothing waits for company any more: what is held is written.
    ///
    /// # Errors
    /// As [`Sink::step`].
    pub async fn drain(&mut self) -> Result<bool> {
        self.step().await?;
        if !self.is_at_end().await? {
            return Ok(false);
        }
        self.flush_all().await?;
        self.is_drained().await
    }

    /// Whether everything that is in the topic now is in the table.
    ///
    /// # Errors
    /// Those of the log and of the table.
    pub async fn is_drained(&mut self) -> Result<bool> {
        Ok(self.buffers.values().all(|b| b.records.is_empty()) && self.is_at_end().await?)
    }

    /// Whether everything that is in the topic now has been read.
    async fn is_at_end(&mut self) -> Result<bool> {
        if !self.pending.is_empty() {
            return Ok(false);
        }
        for (partition, (oldest, end)) in self.ports.log.offsets(&self.spec.topic).await? {
            let at = TopicPartition { topic: self.spec.topic.clone(), partition };
            let next = match self.buffers.get(&at) {
                Some(buffer) => buffer.next,
                // Somebody else's, or nobody's for a moment.
                None => self.table.position(&at).await?.unwrap_or(oldest),
            };
            // Only markers of transactions may be left.
            if next < end && !self.ports.log.read(&at, next, 1).await?.0.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes what is held and leaves the group.
    ///
    /// # Errors
    /// As [`Sink::step`].
    pub async fn close(&mut self) -> Result<()> {
        self.flush_all().await?;
        self.consumer.close().await
    }

    /// Writes what is held.
    ///
    /// # Errors
    /// As [`Sink::step`].
    pub async fn flush_all(&mut self) -> Result<()> {
        for at in self.buffers.keys().cloned().collect::<Vec<_>>() {
            self.flush(&at, self.pending.is_empty()).await?;
        }
        Ok(())
    }

    fn now_ms(&self) -> i64 {
        self.ports.env.now().timestamp_millis()
    }

    /// How long a poll may wait before a write is due.
    fn wait(&self) -> Duration {
        let held = self.buffers.values().filter(|b| !b.records.is_empty());
        let Some(oldest) = held.map(|b| b.since_ms).min() else { return self.spec.poll_wait };
        let left = ms(self.spec.flush_after).saturating_sub(self.now_ms().saturating_sub(oldest)).max(0);
        self.spec.poll_wait.min(Duration::from_millis(left.unsigned_abs()))
    }

    /// Partitions that are to be written now.
    fn due(&self) -> Vec<TopicPartition> {
        let (now, flush_after) = (self.now_ms(), ms(self.spec.flush_after));
        let is_full = self.bytes() >= self.spec.bytes_max;
        let is_due = |b: &Buffer| {
            // A clock that went back is due at once.
            let waited = now.saturating_sub(b.since_ms);
            is_full || b.records.len() >= self.spec.records_max || waited >= flush_after || waited < 0
        };
        self.buffers.iter().filter(|(_, b)| !b.records.is_empty() && is_due(b)).map(|(at, _)| at.clone()).collect()
    }

    /// Asks the table where a partition is, and reads on from there.
    async fn assign(&mut self, at: &TopicPartition) -> Result<()> {
        let mut attempt = 0;
        let (after, next) = loop {
            match self.locate(at).await {
                Ok(place) => break place,
                Err(error) => again(&self.spec, self.ports.env.as_ref(), &mut attempt, error).await?,
            }
        };
        match self.consumer.seek(at, next).await {
            Ok(()) => {
                info!(sink = self.spec.name, partition = at.partition, next, "partition assigned");
                self.buffers.insert(at.clone(), Buffer::new(after, next));
            }
            // It may have been taken away again; if not, its next records come back here.
            Err(error) => warn!(sink = self.spec.name, error = %error.chain(), "seek"),
        }
        Ok(())
    }

    async fn locate(&mut self, at: &TopicPartition) -> Result<(Option<i64>, i64)> {
        let after = self.table.position(at).await?;
        if let Some(next) = after {
            return Ok((after, next));
        }
        let bounds = self.ports.log.offsets(&at.topic).await?;
        let missing = || PortError::permanent(format!("begin {}-{}", at.topic, at.partition)).code("UNKNOWN_TOPIC_OR_PARTITION");
        let &(oldest, end) = bounds.get(&at.partition).ok_or_else(missing)?;
        Ok((None, if self.spec.start_at == StartAt::Earliest { oldest } else { end }))
    }

    async fn take(&mut self, at: &TopicPartition, records: Vec<LogRecord>, next_offset: i64) -> Result<()> {
        let now = self.now_ms();
        let Some(buffer) = self.buffers.get_mut(at) else {
            return self.assign(at).await;
        };
        for record in records {
            if record.offset < buffer.next {
                continue;
            }
            if buffer.records.is_empty() {
                buffer.since_ms = now;
            }
            buffer.bytes += size(&record);
            buffer.next = record.offset + 1;
            buffer.records.push(record);
        }
        buffer.next = buffer.next.max(next_offset);
        Ok(())
    }

    /// Writes what is held of a partition.
    async fn flush(&mut self, at: &TopicPartition, may_poll: bool) -> Result<()> {
        let Some(buffer) = self.buffers.get_mut(at).filter(|b| !b.records.is_empty()) else { return Ok(()) };
        let (after, next) = (buffer.after, buffer.next);
        let records = std::mem::take(&mut buffer.records);
        let mut attempt = 0;
        let written = loop {
            let write = self.table.write(at, after, next, &records);
            let patience = self.spec.session_timeout / 4;
            let partitions: Vec<TopicPartition> = self.buffers.keys().cloned().collect();
            let polls = Polls { consumer: self.consumer.as_mut(), pending: &mut self.pending, wait: self.spec.poll_wait };
            let result = match may_poll {
                true => beside(write, polls, &partitions, &self.ports.env, patience).await,
                false => write.await,
            };
            match result {
                Ok(written) => break Some(written),
                Err(error) if error.code.as_deref() == Some(EPOCH_MOVED) => {
                    warn!(sink = self.spec.name, error = %error.chain(), "somebody else has written the partition");
                    break None;
                }
                Err(error) => {
                    if let Err(error) = again(&self.spec, self.ports.env.as_ref(), &mut attempt, error).await {
                        // What was not written is still held; the table says what was.
                        if let Some(buffer) = self.buffers.get_mut(at) {
                            buffer.records = records;
                        }
                        return Err(error);
                    }
                }
            }
        };
        let is_ours = written.is_some_and(|w| matches!(w.commit, Commit::New(_)));
        if !is_ours {
            // An earlier attempt of ours may have landed, or somebody else's write: the table tells how far it is.
            let mut attempt = 0;
            let position = loop {
                match self.table.position(at).await {
                    Ok(position) => break position,
                    Err(error) => again(&self.spec, self.ports.env.as_ref(), &mut attempt, error).await?,
                }
            };
            if position != Some(next) {
                self.buffers.remove(at);
                return self.assign(at).await;
            }
        }
        let now = self.now_ms();
        if let (Some(oldest), Some(written)) = (records.first(), written) {
            let age = now.saturating_sub(oldest.appended_ms).max(0) as f64 / 1_000.0;
            let labels = [("sink", self.spec.name)];
            self.ports.metrics.gauge("simulacro_sink_freshness_seconds", &labels, age);
            self.ports.metrics.count("simulacro_sink_rows_total", &labels, written.rows);
            self.ports.metrics.count("simulacro_sink_left_out_total", &labels, written.left_out);
            self.rows += written.rows;
        }
        if let Some(buffer) = self.buffers.get_mut(at) {
            buffer.after = Some(next);
            buffer.clear();
        }
        Ok(())
    }
}

/// The consumer while a write is under way, and where what it says is kept.
struct Polls<'a> {
    consumer: &'a mut dyn GroupConsumer,
    pending: &'a mut VecDeque<Polled>,
    wait: Duration,
}

/// Carries a write out. When it takes longer than `patience`, `partitions` are paused and polled until it is over, unless the
/// group wants some back: then it waits for the write.
async fn beside<T>(
    write: impl Future<Output = Result<T>>,
    polls: Polls<'_>,
    partitions: &[TopicPartition],
    env: &Arc<dyn Env>,
    patience: Duration,
) -> Result<T> {
    let Polls { consumer, pending, wait } = polls;
    let mut write = std::pin::pin!(write);
    tokio::select! {
        biased;
        written = &mut write => return written,
        () = env.sleep(patience) => {}
    }
    let mut paused = partitions.to_vec();
    if let Err(error) = consumer.pause(&paused).await {
        // One of them was taken away; the next turn hears of it, and what comes of the others meanwhile waits with it.
        warn!(error = %error.chain(), "pause beside a write");
    }
    let written = loop {
        // A poll is never dropped half way: what it has brought would be lost.
        let (written, polled) = {
            let mut poll = consumer.poll(wait);
            tokio::select! {
                biased;
                written = &mut write => (Some(written), poll.await),
                polled = &mut poll => (None, polled),
            }
        };
        let (mut must_wait, mut arrived) = (false, Vec::new());
        match polled {
            Ok(Polled::Nothing) => {}
            Ok(polled) => {
                if let Polled::Assigned(new) = &polled {
                    arrived.clone_from(new);
                }
                must_wait = matches!(polled, Polled::Revoked(_)) || pending.len() >= PENDING_MAX;
                pending.push_back(polled);
            }
            // The write is what counts; the next turn polls again and hears of it.
            Err(error) => {
                warn!(error = %error.chain(), "poll beside a write");
                must_wait = true;
            }
        }
        if let Some(written) = written {
            break written;
        }
        if must_wait {
            break write.await;
        }
        if !arrived.is_empty() && consumer.pause(&arrived).await.is_ok() {
            paused.extend(arrived);
        }
    };
    for at in paused {
        // One by one: a partition that is gone must not keep the others paused.
        if let Err(error) = consumer.resume(std::slice::from_ref(&at)).await {
            warn!(error = %error.chain(), "resume after a write");
        }
    }
    written
}
