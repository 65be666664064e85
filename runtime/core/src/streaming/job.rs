//! The job: a member of the group that runs the tasks of its partitions and commits them together.
//!
//! One loop, no concurrency inside: poll, process, and after every interval or number of records one transaction with output,
//! late and dead letters, changelog and next offsets of everything that changed. A partition that arrives is restored from
//! its changelog before it is read; one that goes is committed before it is let go; one that is lost is dropped. A crash at
//! any point leaves the last transaction. The clock paces commits and idleness only, never what is counted. Left out:
//! restarting a worker that stopped with an error, which is the supervisor's business.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tracing::{info, warn};

use super::{
    checkpoint::{self, Control, Record},
    click_task::{ClickTask, damaged_changelog},
    commit::{Action, Event, Failure, Landed, Protocol},
    config::{StreamConfig, ms},
    event::{ClickDecoder, Counts, Fate},
    merge_task::MergeTask,
    window::{MetricEncoder, WindowKind},
};
use crate::ports::{
    Disposition, Env, Metrics, PortError, Result,
    event_log::{EventLog, GroupConsumer, GroupSpec, LogRecord, OutRecord, Polled, Producer, StartAt, TopicPartition},
};

/// What the job needs from outside.
#[derive(Debug, Clone)]
pub struct StreamPorts {
    /// Clock and sleep.
    pub env: Arc<dyn Env>,
    /// The log.
    pub log: Arc<dyn EventLog>,
    /// Counters and gauges.
    pub metrics: Arc<dyn Metrics>,
}

/// Records that are decoded at once: enough that what a batch costs does not count, and few enough that a core's cache holds
/// their columns until they are processed, however many a poll brings.
const DECODE_RECORDS: usize = 1_000;

/// What a step came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Records read.
    pub records: usize,
    /// Whether a transaction landed.
    pub committed: bool,
}

/// One worker of the job `realtime_metrics`.
pub struct RealtimeMetrics {
    config: StreamConfig,
    ports: StreamPorts,
    transactional_id: String,
    consumer: Box<dyn GroupConsumer>,
    producer: Box<dyn Producer>,
    decoder: Box<dyn ClickDecoder>,
    encoder: Box<dyn MetricEncoder>,
    protocol: Protocol,
    clicks: BTreeMap<i32, ClickTask>,
    merges: BTreeMap<i32, MergeTask>,
    /// Assigned, paused, and not restored yet.
    arrived: BTreeSet<TopicPartition>,
    /// Click partitions that are idle, as the broker confirmed.
    idle: BTreeSet<i32>,
    paused: BTreeSet<i32>,
    /// Where a task's own watermark began, for as long as there is no global one.
    first_watermarks: BTreeMap<i32, i64>,
    control: Control,
    control_offset: Option<i64>,
    ticked_ms: i64,
    records_since: usize,
    /// Polls that failed in a row.
    failed_polls: u32,
    /// Transactions and batches that failed since one landed.
    failures: u32,
}

impl fmt::Debug for RealtimeMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RealtimeMetrics")
            .field("transactional_id", &self.transactional_id)
            .field("clicks", &self.clicks.keys())
            .field("merges", &self.merges.keys())
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

/// A transaction under way.
#[derive(Debug)]
struct Transaction {
    clicks: BTreeSet<i32>,
    merges: BTreeSet<i32>,
    records: Vec<OutRecord>,
    offsets: BTreeMap<TopicPartition, i64>,
    rows: BTreeMap<WindowKind, u64>,
}

/// Bounded repetition of one call.
struct Retry {
    env: Arc<dyn Env>,
    attempts_max: u32,
    backoff: Duration,
    attempt: u32,
}

impl Retry {
    fn new(ports: &StreamPorts, config: &StreamConfig) -> Self {
        Self { env: ports.env.clone(), attempts_max: config.retries_max, backoff: config.retry_backoff, attempt: 0 }
    }
    /// Waits before the call is repeated, or gives the error back.
    async fn after(&mut self, error: PortError) -> Result<()> {
        self.attempt += 1;
        if error.disposition == Disposition::Permanent || self.attempt > self.attempts_max {
            return Err(error);
        }
        self.env.sleep(backoff(self.backoff, self.attempt)).await;
        Ok(())
    }
}

fn backoff(first: Duration, attempt: u32) -> Duration {
    first.saturating_mul(1 << attempt.saturating_sub(1).min(6))
}

impl RealtimeMetrics {
    /// Joins the group as `member`, which must be unique in it and the same after a restart. Creates the job's own topics.
    ///
    /// # Errors
    /// `Permanent` for a configuration that cannot be, or topics with other numbers of partitions.
    pub async fn open(
        config: StreamConfig,
        ports: StreamPorts,
        member: &str,
        decoder: Box<dyn ClickDecoder>,
        encoder: Box<dyn MetricEncoder>,
    ) -> Result<Self> {
        config.validate().map_err(|e| PortError::permanent("configure realtime_metrics").because(e))?;
        let inputs = ports.log.offsets(&config.topics.clicks).await?.len();
        let inputs = i32::try_from(inputs).map_err(|e| PortError::permanent("count partitions of clicks").because(e))?;
        for spec in config.topic_specs(inputs) {
            ports.log.create_topic(&spec).await?;
        }
        let transactional_id = format!("{}-{member}", config.group);
        // The producer first: it fences a predecessor of the same name and ends its open transaction.
        let producer = ports.log.producer(Some(&transactional_id)).await?;
        let spec = GroupSpec {
            group: config.group.clone(),
            member: member.to_owned(),
            topics: vec![config.topics.clicks.clone(), config.topics.partials.clone()],
            start_at: config.start_at,
            session_timeout: config.session_timeout,
        };
        let consumer = ports.log.join(&spec).await?;
        let ticked_ms = ports.env.now().timestamp_millis();
        Ok(Self {
            protocol: Protocol::new(config.retries_max),
            config,
            ports,
            transactional_id,
            consumer,
            producer,
            decoder,
            encoder,
            clicks: BTreeMap::new(),
            merges: BTreeMap::new(),
            arrived: BTreeSet::new(),
            idle: BTreeSet::new(),
            paused: BTreeSet::new(),
            first_watermarks: BTreeMap::new(),
            control: Control::default(),
            control_offset: None,
            ticked_ms,
            records_since: 0,
            failed_polls: 0,
            failures: 0,
        })
    }

    /// Runs until `stop` says so, which is asked between steps; then commits and leaves the group.
    ///
    /// # Errors
    /// As [`RealtimeMetrics::step`]. The worker is of no use afterwards: open a new one.
    pub async fn run(&mut self, mut stop: impl FnMut() -> bool + Send) -> Result<()> {
        while !stop() {
            self.step().await?;
        }
        self.close().await
    }

    /// Commits what is open and leaves the group.
    ///
    /// # Errors
    /// When the last transaction ended in doubt; the next owner of the partitions settles it.
    pub async fn close(&mut self) -> Result<()> {
        self.commit(Event::Due).await?;
        self.consumer.close().await
    }

    /// Tasks of click partitions.
    pub fn clicks(&self) -> &BTreeMap<i32, ClickTask> {
        &self.clicks
    }
    /// Click partitions that are idle, as the broker confirmed.
    pub fn idle(&self) -> &BTreeSet<i32> {
        &self.idle
    }
    /// Tasks of merge partitions.
    pub fn merges(&self) -> &BTreeMap<i32, MergeTask> {
        &self.merges
    }

    /// Committed state of all tasks in words, for comparison.
    #[cfg(test)]
    pub(super) fn snapshots(&mut self, config: &StreamConfig) -> Vec<String> {
        let clicks = self.clicks.iter_mut().map(|(p, task)| format!("{p} {:?}", task.snapshot(config)));
        clicks.chain(self.merges.iter_mut().map(|(p, task)| format!("{p} {:?}", task.snapshot(config)))).collect()
    }

    /// One turn of the loop: one poll, and a commit when it is due.
    ///
    /// # Errors
    /// When this worker must not go on: fenced, state damaged or missing, offsets not kept any more, or a call that failed
    /// more often than configured. State in the log is consistent then; a new worker goes on from it.
    pub async fn step(&mut self) -> Result<Step> {
        let mut step = Step::default();
        let interval = ms(self.config.commit_interval);
        let left = interval.saturating_sub(self.now_ms().saturating_sub(self.ticked_ms)).clamp(0, interval);
        let wait = match self.arrived.is_empty() {
            true => self.config.poll_wait.min(Duration::from_millis(left.unsigned_abs())),
            false => Duration::ZERO,
        };
        let polled = self.consumer.poll(wait).await;
        self.failed_polls = if polled.is_ok() { 0 } else { self.failed_polls + 1 };
        match polled {
            Ok(Polled::Nothing) => {}
            Ok(Polled::Assigned(partitions)) => self.arrive(partitions).await?,
            Ok(Polled::Revoked(partitions)) => {
                step.committed |= self.commit(Event::Revoked { dirty: self.is_dirty() }).await?;
                self.drop_tasks(&partitions);
            }
            Ok(Polled::Lost(partitions)) => {
                warn!(partitions = partitions.len(), "partitions lost");
                // No transaction is open between steps, so there is nothing to abort.
                let _ = self.protocol.on(Event::Lost);
                self.drop_tasks(&partitions);
            }
            Ok(Polled::Records { partition, records, next_offset, end_offset }) => {
                step.records = records.len();
                self.records(&partition, &records, next_offset, end_offset).await?;
            }
            Err(error) => self.wait_after(error, self.failed_polls).await?,
        }
        // One a turn: restoring all that a rebalance brings may take longer than the session, and a member that does not poll
        // meanwhile loses them all, time and again.
        if let Some(partition) = self.arrived.first().cloned() {
            self.assign(&partition).await?;
        }
        let now = self.now_ms();
        // A clock that went back is due at once, and starts again from there.
        let is_tick = now.saturating_sub(self.ticked_ms) >= interval || now < self.ticked_ms;
        if is_tick {
            self.tick(now).await?;
        }
        let aside: usize = self.clicks.values().map(ClickTask::aside_bytes).sum();
        let is_full = self.records_since >= self.config.commit_records_max || aside >= self.config.commit_bytes_max;
        if is_tick || is_full {
            step.committed |= self.commit(Event::Due).await?;
        }
        if is_tick {
            // The interval is for processing. If the time of the commit counted, one that takes longer than the interval would
            // make the next one due after a single poll, and most of a worker's time would go into commits.
            self.ticked_ms = self.now_ms();
        }
        Ok(step)
    }

    fn now_ms(&self) -> i64 {
        self.ports.env.now().timestamp_millis()
    }

    fn is_dirty(&self) -> bool {
        self.clicks.values().any(ClickTask::is_dirty) || self.merges.values().any(MergeTask::is_dirty)
    }

    /// Takes note of a failed transaction or batch: waits, or gives the error up when there were too many.
    async fn failed(&mut self, error: PortError) -> Result<()> {
        self.failures += 1;
        self.wait_after(error, self.failures).await
    }

    async fn wait_after(&mut self, error: PortError, failures: u32) -> Result<()> {
        if error.disposition == Disposition::Permanent || failures > self.config.retries_max {
            return Err(error);
        }
        warn!(error = %error.chain(), failures, "turn failed");
        self.ports.env.sleep(backoff(self.config.retry_backoff, failures)).await;
        Ok(())
    }

    fn drop_tasks(&mut self, partitions: &[TopicPartition]) {
        for at in partitions {
            self.arrived.remove(at);
            let TopicPartition { topic, partition } = at;
            if *topic == self.config.topics.clicks {
                self.clicks.remove(partition);
                self.idle.remove(partition);
                self.paused.remove(partition);
                self.first_watermarks.remove(partition);
            } else {
                self.merges.remove(partition);
            }
        }
    }

    async fn records(
        &mut self,
        partition: &TopicPartition,
        records: &[LogRecord],
        next_offset: i64,
        end_offset: i64,
    ) -> Result<()> {
        let is_click = partition.topic == self.config.topics.clicks;
        let is_known = match is_click {
            true => self.clicks.contains_key(&partition.partition),
            false => self.merges.contains_key(&partition.partition),
        };
        if !is_known {
            // Its state was dropped after a failed seek; restoring it also puts the position right.
            return self.assign(partition).await;
        }
        self.records_since += records.len();
        if !is_click {
            return match self.merges.get_mut(&partition.partition) {
                Some(task) => task.process(records, next_offset, &self.config),
                None => Ok(()),
            };
        }
        let now = self.now_ms();
        let mut chunks = records.chunks(DECODE_RECORDS).peekable();
        while let Some(chunk) = chunks.next() {
            let decoded = self.decode(chunk).await;
            let Some(task) = self.clicks.get_mut(&partition.partition) else { return Ok(()) };
            match decoded {
                Ok(decoded) => {
                    let until = chunks.peek().and_then(|next| next.first()).map_or(next_offset, |next| next.offset);
                    task.process(chunk, until, &decoded, &self.config)?;
                    self.idle.remove(&partition.partition);
                    if let Some(watermark) = task.watermark() {
                        self.first_watermarks.entry(partition.partition).or_insert(watermark);
                    }
                }
                Err(error) => {
                    // Read them again later, from the first that was not processed.
                    let position = task.next_offset();
                    self.consumer.seek(partition, position).await?;
                    return self.failed(error).await;
                }
            }
        }
        let Some(task) = self.clicks.get_mut(&partition.partition) else { return Ok(()) };
        if records.is_empty() {
            task.skip_to(next_offset);
        }
        task.idleness.observe(next_offset, end_offset, records.len(), now);
        let lag = end_offset.saturating_sub(next_offset).max(0);
        if self.is_ahead(partition.partition) && self.paused.insert(partition.partition) {
            self.consumer.pause(std::slice::from_ref(partition)).await?;
        }
        self.ports.metrics.gauge("simulacro_stream_lag_records", &[("partition", &partition.partition.to_string())], lag as f64);
        Ok(())
    }

    async fn decode(&mut self, records: &[LogRecord]) -> Result<super::event::Decoded> {
        let mut retry = Retry::new(&self.ports, &self.config);
        loop {
            match self.decoder.decode(records).await {
                Ok(decoded) => return Ok(decoded),
                Err(error) => retry.after(error).await?,
            }
        }
    }

    /// What is done once per interval: hear the merge, find idle partitions, resume those that were too far ahead.
    async fn tick(&mut self, now: i64) -> Result<()> {
        if self.clicks.is_empty() {
            return Ok(());
        }
        match self.read_control().await {
            Ok(()) => {}
            Err(error) if error.disposition == Disposition::Permanent => return Err(error),
            // The old answer stays true: watermarks do not go back.
            Err(error) => warn!(error = %error.chain(), "no answer of the merge"),
        }
        let idle_after = ms(self.config.idle_after);
        let due: Vec<i32> =
            self.clicks.iter().filter(|(_, task)| task.idleness.is_due(idle_after, now)).map(|(&p, _)| p).collect();
        self.idle.clear();
        if !due.is_empty() {
            // The broker's word, not ours: a partition that cannot be reached is not idle.
            match self.ports.log.offsets(&self.config.topics.clicks).await {
                Ok(ends) => {
                    let is_at_end = |p: &i32| match (self.clicks.get(p), ends.get(p)) {
                        (Some(task), Some((_, end))) => task.next_offset() >= *end,
                        (Some(_) | None, _) => false,
                    };
                    self.idle = due.into_iter().filter(is_at_end).collect();
                }
                Err(error) => warn!(error = %error.chain(), "end offsets unknown, no partition counts as idle"),
            }
        }
        for (partition, task) in &mut self.clicks {
            task.follow(self.idle.contains(partition), self.control.target);
        }
        self.resume().await
    }

    /// Whether a partition's watermark is too far ahead of the global one: its panes would pile up in the merge.
    fn is_ahead(&self, partition: i32) -> bool {
        let base = self.control.global.or_else(|| self.first_watermarks.get(&partition).copied());
        match (self.clicks.get(&partition).and_then(ClickTask::watermark), base) {
            (Some(watermark), Some(base)) => watermark.saturating_sub(base) > ms(self.config.ahead_max),
            (Some(_) | None, _) => false,
        }
    }

    /// Resumes the partitions that the others have come up with.
    async fn resume(&mut self) -> Result<()> {
        let near: Vec<i32> = self.paused.iter().copied().filter(|&partition| !self.is_ahead(partition)).collect();
        if near.is_empty() {
            return Ok(());
        }
        let partitions: Vec<_> = near.iter().map(|&partition| self.click_partition(partition)).collect();
        self.consumer.resume(&partitions).await?;
        self.paused.retain(|partition| !near.contains(partition));
        Ok(())
    }

    async fn read_control(&mut self) -> Result<()> {
        let partition = TopicPartition { topic: self.config.topics.control.clone(), partition: 0 };
        loop {
            let offset = match self.control_offset {
                Some(offset) => offset,
                None => self.ports.log.offsets(&partition.topic).await?.get(&0).map_or(0, |(oldest, _)| *oldest),
            };
            self.control_offset = Some(offset);
            let (records, next) = match self.ports.log.read(&partition, offset, self.config.restore_records).await {
                Ok(read) => read,
                Err(error) if error.code.as_deref() == Some("OFFSET_OUT_OF_RANGE") => {
                    // Old answers are of no interest; begin where the topic begins now, at the next turn.
                    self.control_offset = None;
                    return Ok(());
                }
                Err(error) => return Err(error),
            };
            for record in &records {
                let damaged = |error| damaged_changelog(&partition.topic, 0, error);
                if let Record::Control(control) =
                    checkpoint::decode(record.value.as_deref().unwrap_or(&[]), 1).map_err(damaged)?
                {
                    self.control = control;
                }
            }
            self.control_offset = Some(next);
            if records.is_empty() || next <= offset {
                return Ok(());
            }
        }
    }

    /// Takes note of partitions to be restored, one in each of the next turns. Until then nothing of them is read.
    async fn arrive(&mut self, partitions: Vec<TopicPartition>) -> Result<()> {
        self.drop_tasks(&partitions);
        let mut retry = Retry::new(&self.ports, &self.config);
        while let Err(error) = self.consumer.pause(&partitions).await {
            retry.after(error).await?;
        }
        self.arrived.extend(partitions);
        Ok(())
    }

    /// Restores a partition and puts the consumer where its state ends.
    async fn assign(&mut self, partition: &TopicPartition) -> Result<()> {
        self.arrived.remove(partition);
        let is_click = partition.topic == self.config.topics.clicks;
        if is_click {
            self.clicks.remove(&partition.partition);
        } else {
            self.merges.remove(&partition.partition);
        }
        let mut retry = Retry::new(&self.ports, &self.config);
        let position = loop {
            // A new partition of a running job begins where the job is, so hear that first.
            if is_click && let Err(error) = self.read_control().await {
                retry.after(error).await?;
                continue;
            }
            match restore(&self.config, &self.ports, partition).await {
                Ok((Task::Click(task), is_new)) => {
                    let mut task = *task;
                    let position = task.next_offset();
                    if is_new {
                        task.begin_at(self.control.global);
                    }
                    self.clicks.insert(partition.partition, task);
                    break position;
                }
                Ok((Task::Merge(task), _)) => {
                    let position = task.next_offset();
                    self.merges.insert(partition.partition, *task);
                    break position;
                }
                Err(error) => retry.after(error).await?,
            }
        };
        info!(topic = %partition.topic, partition = partition.partition, position, "partition restored");
        let mut retry = Retry::new(&self.ports, &self.config);
        while let Err(error) = self.consumer.seek(partition, position).await {
            retry.after(error).await?;
        }
        // It may have been paused before its state was dropped.
        self.consumer.resume(std::slice::from_ref(partition)).await?;
        Ok(())
    }

    /// Commits everything that changed, as one transaction. Says whether it landed.
    async fn commit(&mut self, event: Event) -> Result<bool> {
        self.records_since = 0;
        if !self.is_dirty() {
            return Ok(false);
        }
        let transaction = self.prepare().await?;
        let mut action = self.protocol.on(event);
        let mut cause = None;
        loop {
            if self.protocol.attempt() > 0 {
                self.ports.env.sleep(backoff(self.config.retry_backoff, self.protocol.attempt())).await;
            }
            let result = match action {
                Action::Begin => self.producer.begin().await,
                Action::Send => self.producer.send(transaction.records.clone()).await,
                Action::SendOffsets => {
                    let group = self.consumer.metadata();
                    self.producer.send_offsets(&transaction.offsets, &group).await
                }
                Action::Commit => self.producer.commit().await,
                Action::Abort => self.producer.abort().await,
                Action::Reopen => match self.ports.log.producer(Some(&self.transactional_id)).await {
                    Ok(producer) => {
                        self.producer = producer;
                        Ok(())
                    }
                    Err(error) => Err(error),
                },
                Action::LookUp => match self.look_up(&transaction).await {
                    Ok(landed) => {
                        action = self.protocol.on(Event::LookedUp(landed));
                        continue;
                    }
                    Err(error) => Err(error),
                },
                Action::Apply => {
                    self.apply(&transaction);
                    self.failures = 0;
                    self.ports.metrics.count("simulacro_stream_commits_total", &[("outcome", "committed")], 1);
                    // A landed transaction makes up for what went before, unless the worker is doomed.
                    return if self.protocol.is_stopped() { self.settled(cause).await.map(|()| true) } else { Ok(true) };
                }
                Action::SeekBack => {
                    self.ports.metrics.count("simulacro_stream_commits_total", &[("outcome", "aborted")], 1);
                    self.seek_back(&transaction).await;
                    return self.settled(cause).await.map(|()| false);
                }
                Action::Restore => {
                    self.ports.metrics.count("simulacro_stream_commits_total", &[("outcome", "restored")], 1);
                    let mine = self.assigned();
                    self.drop_tasks(&mine);
                    self.settled(cause).await?;
                    self.arrive(mine).await?;
                    return Ok(false);
                }
                Action::Stop => return Err(cause.unwrap_or_else(|| PortError::permanent("commit out of order"))),
                Action::Rest | Action::Release => return Ok(false),
            };
            let event = match result {
                Ok(()) => Event::Done,
                Err(error) => {
                    let failure = Failure::of(&error);
                    warn!(error = %error.chain(), state = ?self.protocol.state(), "transaction");
                    // The first error is why; those of the way out are consequences.
                    cause.get_or_insert(error);
                    Event::Failed(failure)
                }
            };
            action = self.protocol.on(event);
        }
    }

    /// Ends a transaction that failed: the error, when it is final or one too many.
    async fn settled(&mut self, cause: Option<PortError>) -> Result<()> {
        match cause {
            Some(cause) if self.protocol.is_stopped() => Err(cause),
            Some(cause) => self.failed(cause).await,
            None if self.protocol.is_stopped() => Err(PortError::permanent("commit out of order")),
            None => Ok(()),
        }
    }

    fn click_partition(&self, partition: i32) -> TopicPartition {
        TopicPartition { topic: self.config.topics.clicks.clone(), partition }
    }
    fn merge_partition(&self, partition: i32) -> TopicPartition {
        TopicPartition { topic: self.config.topics.partials.clone(), partition }
    }
    fn assigned(&self) -> Vec<TopicPartition> {
        let clicks = self.clicks.keys().map(|&p| self.click_partition(p));
        clicks.chain(self.merges.keys().map(|&p| self.merge_partition(p))).collect()
    }

    async fn prepare(&mut self) -> Result<Transaction> {
        let clicks: BTreeSet<i32> = self.clicks.iter().filter(|(_, t)| t.is_dirty()).map(|(&p, _)| p).collect();
        let merges: BTreeSet<i32> = self.merges.iter().filter(|(_, t)| t.is_dirty()).map(|(&p, _)| p).collect();
        let mut offsets = BTreeMap::new();
        let mut records = Vec::new();
        let mut rows = Vec::new();
        for &partition in &clicks {
            let at = self.click_partition(partition);
            if let Some(task) = self.clicks.get_mut(&partition) {
                records.extend(task.prepare(self.idle.contains(&partition), &self.config));
                offsets.insert(at, task.next_offset());
            }
        }
        for &partition in &merges {
            let at = self.merge_partition(partition);
            if let Some(task) = self.merges.get_mut(&partition) {
                let prepared = task.prepare(&self.config);
                records.extend(prepared.records);
                rows.extend(prepared.rows);
                offsets.insert(at, task.next_offset());
            }
        }
        let mut emitted = BTreeMap::new();
        if !rows.is_empty() {
            let mut retry = Retry::new(&self.ports, &self.config);
            let values = loop {
                match self.encoder.encode(&rows).await {
                    Ok(values) => break values,
                    Err(error) => retry.after(error).await?,
                }
            };
            if values.len() != rows.len() {
                return Err(PortError::permanent(format!("encoder made {} values of {} rows", values.len(), rows.len())));
            }
            for (row, value) in rows.iter().zip(values) {
                *emitted.entry(row.window_kind).or_insert(0) += 1;
                records.push(OutRecord {
                    topic: self.config.topics.metrics.clone(),
                    partition: None,
                    key: Some(row.record_key()),
                    value: Some(value),
                    headers: Vec::new(),
                });
            }
        }
        Ok(Transaction { clicks, merges, records, offsets, rows: emitted })
    }

    /// What the committed offsets say about a transaction that is over.
    async fn look_up(&mut self, transaction: &Transaction) -> Result<Landed> {
        let (mut landed, mut missing) = (0, 0);
        let mut unclear = false;
        let topics: BTreeSet<&String> = transaction.offsets.keys().map(|tp| &tp.topic).collect();
        for topic in topics {
            let committed = self.ports.log.committed(&self.config.group, topic).await?;
            for (at, &ours) in transaction.offsets.iter().filter(|(at, _)| at.topic == *topic) {
                let before = match at.topic == self.config.topics.clicks {
                    true => self.clicks.get(&at.partition).map(ClickTask::committed_offset),
                    false => self.merges.get(&at.partition).map(MergeTask::committed_offset),
                };
                match (committed.get(&at.partition).copied(), before) {
                    // The transaction did not move this partition: it cannot tell.
                    (_, Some(before)) if before == ours => {}
                    (Some(now), _) if now == ours => landed += 1,
                    (None, _) => missing += 1,
                    (Some(now), Some(before)) if now == before => missing += 1,
                    (Some(_), _) => unclear = true,
                }
            }
        }
        Ok(match (landed, missing, unclear) {
            (1.., 0, false) => Landed::Yes,
            (0, 1.., false) => Landed::No,
            _ => Landed::Unclear,
        })
    }

    fn apply(&mut self, transaction: &Transaction) {
        let metrics = self.ports.metrics.clone();
        for partition in &transaction.clicks {
            let Some(task) = self.clicks.get_mut(partition) else { continue };
            let added = task.commit(&self.config);
            count_fates(&*metrics, &added);
        }
        for partition in &transaction.merges {
            let Some(task) = self.merges.get_mut(partition) else { continue };
            let expired = task.expired().0;
            task.commit(&self.config);
            let expired = task.expired().0 - expired;
            if expired > 0 {
                warn!(partition, events = expired, "partials came after their pane was dropped");
                metrics.count("simulacro_stream_partials_expired_total", &[], expired);
            }
        }
        for (kind, rows) in &transaction.rows {
            metrics.count("simulacro_stream_rows_total", &[("window_kind", kind.name())], *rows);
        }
        let closed = self.merges.values().filter_map(MergeTask::closed).min();
        if let Some(closed) = closed {
            let age = self.now_ms().saturating_sub(closed);
            metrics.gauge("simulacro_stream_freshness_seconds", &[], age as f64 / 1_000.0);
        }
    }

    async fn seek_back(&mut self, transaction: &Transaction) {
        for &partition in &transaction.clicks {
            let Some(task) = self.clicks.get_mut(&partition) else { continue };
            task.rollback();
            let offset = task.committed_offset();
            self.idle.remove(&partition);
            let at = self.click_partition(partition);
            if let Err(error) = self.consumer.seek(&at, offset).await {
                // Without its task the next records restore the partition, position included.
                warn!(error = %error.chain(), partition, "seek back");
                self.drop_tasks(&[at]);
            }
        }
        for &partition in &transaction.merges {
            let Some(task) = self.merges.get_mut(&partition) else { continue };
            task.rollback();
            let offset = task.committed_offset();
            let at = self.merge_partition(partition);
            if let Err(error) = self.consumer.seek(&at, offset).await {
                warn!(error = %error.chain(), partition, "seek back");
                self.drop_tasks(&[at]);
            }
        }
    }
}

fn count_fates(metrics: &dyn Metrics, added: &Counts) {
    for fate in Fate::ALL {
        if added.of(fate) > 0 {
            metrics.count("simulacro_stream_events_total", &[("fate", fate.name())], added.of(fate));
        }
    }
}

/// A restored task.
enum Task {
    Click(Box<ClickTask>),
    Merge(Box<MergeTask>),
}

/// Restores a task, and says whether it is new. State and committed offset are of one transaction, so they are equal, or
/// the markers of that transaction are still on their way.
async fn restore(config: &StreamConfig, ports: &StreamPorts, at: &TopicPartition) -> Result<(Task, bool)> {
    let is_click = at.topic == config.topics.clicks;
    let changelog = if is_click { &config.topics.changelog } else { &config.topics.merge_changelog };
    let committed = ports.log.committed(&config.group, &at.topic).await?.get(&at.partition).copied();
    let records = read_changelog(config, ports.log.as_ref(), changelog, at.partition).await?;
    let ends = ports.log.offsets(&config.topics.clicks).await?;
    let (task, offset) = if is_click {
        let task = ClickTask::restore(at.partition, &records, config)?;
        let offset = task.as_ref().map(ClickTask::next_offset);
        (task.map(|task| Task::Click(Box::new(task))), offset)
    } else {
        let mut task = MergeTask::restore(at.partition, &records, config)?;
        task.iter_mut().for_each(|task| task.expect_inputs(ends.keys().copied()));
        let offset = task.as_ref().map(MergeTask::next_offset);
        (task.map(|task| Task::Merge(Box::new(task))), offset)
    };
    let missing = |code: &'static str, state: String| {
        let committed = committed.map_or("none".to_owned(), |c| c.to_string());
        let what = format!("restore {}-{}: committed offset {committed}, state {state}", at.topic, at.partition);
        PortError::retryable(what).code(code)
    };
    match (task, offset, committed) {
        (Some(task), Some(state), Some(committed)) if state == committed => Ok((task, false)),
        // Offsets of a group expire when nobody reads for long; state does not.
        (Some(task), Some(_), None) => Ok((task, false)),
        (Some(_), Some(state), Some(_)) => Err(missing("STATE_MISMATCH", state.to_string())),
        (None, _, Some(committed)) if config.adopt_offsets_without_state => Ok((fresh(config, at, committed, ends), true)),
        (None, _, Some(_)) => Err(missing("STATE_MISSING", "none".to_owned())),
        (None, _, None) => {
            let bounds = ports.log.offsets(&at.topic).await?;
            let Some(&(oldest, end)) = bounds.get(&at.partition) else {
                return Err(
                    PortError::permanent(format!("begin {}-{}", at.topic, at.partition)).code("UNKNOWN_TOPIC_OR_PARTITION")
                );
            };
            // Partials are the job's own: it never begins in their middle.
            let start = match config.start_at {
                StartAt::Latest if is_click => end,
                StartAt::Latest | StartAt::Earliest => oldest,
            };
            Ok((fresh(config, at, start, ends), true))
        }
        (Some(_), None, _) => Err(PortError::permanent("restored a task without an offset")),
    }
}

fn fresh(config: &StreamConfig, at: &TopicPartition, offset: i64, inputs: BTreeMap<i32, (i64, i64)>) -> Task {
    if at.topic == config.topics.clicks {
        Task::Click(Box::new(ClickTask::new(at.partition, offset)))
    } else {
        Task::Merge(Box::new(MergeTask::new(at.partition, offset, inputs.into_keys())))
    }
}

/// Live records of a changelog partition, by key.
pub(super) async fn read_changelog(
    config: &StreamConfig,
    log: &dyn EventLog,
    topic: &str,
    partition: i32,
) -> Result<BTreeMap<Bytes, Bytes>> {
    let at = TopicPartition { topic: topic.to_owned(), partition };
    let Some(&(mut offset, end)) = log.offsets(topic).await?.get(&partition) else {
        return Err(PortError::permanent(format!("restore {topic}-{partition}")).code("UNKNOWN_TOPIC_OR_PARTITION"));
    };
    let mut live = BTreeMap::new();
    while offset < end {
        let (records, next) = log.read(&at, offset, config.restore_records).await?;
        for record in records {
            let Some(key) = record.key else {
                return Err(damaged_changelog(topic, partition, checkpoint::DamagedRecord::Field("key")));
            };
            match record.value.filter(|value| !value.is_empty()) {
                Some(value) => live.insert(key, value),
                None => live.remove(&key),
            };
        }
        if next <= offset {
            return Err(PortError::retryable(format!("restore {topic}-{partition}: nothing at {offset}, end {end}")));
        }
        offset = next;
    }
    Ok(live)
}
