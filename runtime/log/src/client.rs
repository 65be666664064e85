//! The client side: the port's calls as requests over a link to a broker.
//!
//! It keeps what Kafka's client keeps: positions, pauses, the phase of the transaction, numbers of calls. A request whose
//! reply was lost is repeated for a bounded time; each may be repeated, so nothing happens twice. After that the caller is
//! told what is known: nothing happened (`Retryable`), or it may have (`Unknown`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use simulacro_core::ports::{
    Disposition, PortError, Result,
    event_log::{
        EventLog, GroupConsumer, GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, StartAt, TopicPartition,
        TopicSpec,
    },
};

use crate::{
    blob::Blob,
    code::{Code, Refusal},
    partition::Stored,
    protocol::{Fetched, Message, ProducerRef, Request, Response},
};

/// Why a request had no good answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkError {
    /// The broker refused it: nothing happened.
    Refused(Refusal),
    /// The request did not arrive: nothing happened.
    Unsent(Refusal),
    /// The reply did not arrive: it may have happened.
    Lost(Refusal),
}

impl LinkError {
    fn into_port(self) -> PortError {
        match self {
            Self::Refused(refusal) => refusal.into(),
            Self::Unsent(refusal) => PortError::retryable(refusal.what).code(refusal.code.name()),
            Self::Lost(refusal) => PortError::unknown(refusal.what).code(refusal.code.name()),
        }
    }
}

/// The way to a broker, and the clock on this side of it.
#[async_trait]
pub trait Link: fmt::Debug + Send + Sync + 'static {
    /// Carries a request there and the reply back.
    ///
    /// # Errors
    /// A refusal by the broker, or a failure on the way.
    async fn call(&self, request: Request) -> Result<Response, LinkError>;
    /// Now.
    fn now(&self) -> DateTime<Utc>;
    /// Waits. Cancel-safe.
    async fn sleep(&self, duration: Duration);
    /// A number that differs after each change that readers may want to see.
    fn version(&self) -> u64;
    /// Waits until the version differs from `seen`, at most for `wait`. Cancel-safe.
    async fn changed(&self, seen: u64, wait: Duration);
}

/// How a client behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How long a request is repeated before the caller is told.
    pub retry_for: Duration,
    /// First wait between two attempts; it doubles up to `retry_wait_max`.
    pub retry_wait: Duration,
    /// Longest wait between two attempts.
    pub retry_wait_max: Duration,
    /// Age at which the broker aborts an open transaction.
    pub transaction_timeout: Duration,
    /// Most records that one poll brings.
    pub poll_records_max: usize,
    /// Most bytes that one poll or read brings, but one record at least.
    pub poll_bytes_max: usize,
    /// How often a member tells that it lives; at most a third of its session.
    pub heartbeat: Duration,
}

impl Settings {
    /// Kafka's defaults where it has one.
    pub const KAFKA: Self = Self {
        retry_for: Duration::from_secs(30),
        retry_wait: Duration::from_millis(100),
        retry_wait_max: Duration::from_secs(1),
        transaction_timeout: Duration::from_secs(60),
        poll_records_max: 500,
        poll_bytes_max: 1 << 20,
        heartbeat: Duration::from_secs(3),
    };
}

/// An event log behind a link.
#[derive(Debug)]
pub struct Client<L> {
    link: Arc<L>,
    settings: Settings,
}

impl<L> Clone for Client<L> {
    fn clone(&self) -> Self {
        Self { link: self.link.clone(), settings: self.settings.clone() }
    }
}

fn unexpected(response: Response) -> PortError {
    PortError::permanent(format!("understand the broker: it answered {response:?}"))
}

fn refused(code: Code, what: impl Into<String>) -> PortError {
    Refusal::new(code, what).into()
}

fn bytes(blob: Option<Blob>) -> Option<bytes::Bytes> {
    blob.map(|b| b.0)
}

fn to_record(stored: Stored) -> LogRecord {
    let Stored { offset, appended_ms, key, value, headers, txn_of: _ } = stored;
    let headers = headers.into_iter().map(|(name, b)| (name, b.0)).collect();
    LogRecord { offset, appended_ms, key: bytes(key), value: bytes(value), headers }
}

fn to_message(record: OutRecord) -> Message {
    let OutRecord { topic, partition, key, value, headers } = record;
    let headers = headers.into_iter().map(|(name, b)| (name, Blob(b))).collect();
    Message { topic, partition, key: key.map(Blob), value: value.map(Blob), headers }
}

fn millis(duration: Duration) -> i64 {
    duration.as_millis().try_into().unwrap_or(i64::MAX)
}

impl<L: Link> Client<L> {
    /// A client of the broker behind `link`.
    pub fn new(link: Arc<L>, settings: Settings) -> Self {
        Self { link, settings }
    }

    /// The link.
    pub fn link(&self) -> &L {
        &self.link
    }

    async fn ask(&self, request: Request) -> Result<Response> {
        let until = self.link.now() + self.settings.retry_for;
        let mut wait = self.settings.retry_wait;
        let mut maybe = false;
        loop {
            let error = match self.link.call(request.clone()).await {
                Ok(response) => return Ok(response),
                Err(error) => error,
            };
            let passes = match &error {
                LinkError::Refused(refusal) => refusal.code.passes(),
                LinkError::Unsent(_) => true,
                LinkError::Lost(_) => {
                    maybe = true;
                    true
                }
            };
            if !passes || self.link.now() + wait > until {
                // An earlier attempt may have been carried out although the last one was not.
                return Err(match error {
                    LinkError::Unsent(refusal) if maybe => LinkError::Lost(refusal).into_port(),
                    LinkError::Refused(refusal) if maybe && refusal.code == Code::KafkaStorageError => {
                        LinkError::Lost(refusal).into_port()
                    }
                    error => error.into_port(),
                });
            }
            self.link.sleep(wait).await;
            wait = (wait * 2).min(self.settings.retry_wait_max);
        }
    }

    async fn fetch(&self, partition: &TopicPartition, offset: i64, records_max: usize) -> Result<Fetched> {
        let bytes_max = self.settings.poll_bytes_max;
        match self.ask(Request::Fetch { partition: partition.clone(), offset, records_max, bytes_max }).await? {
            Response::Fetched(fetched) => Ok(fetched),
            other => Err(unexpected(other)),
        }
    }
}

#[async_trait]
impl<L: Link> EventLog for Client<L> {
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        self.ask(Request::CreateTopic(spec.clone())).await.map(|_| ())
    }
    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>> {
        match self.ask(Request::Bounds { topic: topic.to_owned() }).await? {
            Response::Bounds(bounds) => Ok(bounds),
            other => Err(unexpected(other)),
        }
    }
    async fn offsets_at(&self, topic: &str, time_ms: i64) -> Result<BTreeMap<i32, i64>> {
        match self.ask(Request::OffsetsAt { topic: topic.to_owned(), time_ms }).await? {
            Response::Offsets(offsets) => Ok(offsets),
            other => Err(unexpected(other)),
        }
    }
    async fn committed(&self, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
        match self.ask(Request::Committed { group: group.to_owned(), topic: topic.to_owned() }).await? {
            Response::Offsets(offsets) => Ok(offsets),
            other => Err(unexpected(other)),
        }
    }
    async fn reset(&self, group: &str, offsets: &BTreeMap<TopicPartition, i64>) -> Result<()> {
        self.ask(Request::Reset { group: group.to_owned(), offsets: offsets.clone() }).await.map(|_| ())
    }
    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)> {
        let fetched = self.fetch(partition, offset, max_records).await?;
        Ok((fetched.records.into_iter().map(to_record).collect(), fetched.next_offset))
    }
    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>> {
        let mut member = Member {
            client: self.clone(),
            spec: spec.clone(),
            incarnation: 0,
            generation: -1,
            heartbeat_at: self.link.now(),
            alive_until: self.link.now(),
            holds: BTreeMap::new(),
            leaving: BTreeSet::new(),
            last: None,
        };
        let joined = self.ask(member.join_request()).await?;
        member.entered(joined)?;
        Ok(Box::new(member))
    }
    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>> {
        let timeout_ms = millis(self.settings.transaction_timeout);
        let request = Request::InitProducer { transactional_id: transactional_id.map(str::to_owned), timeout_ms };
        match self.ask(request).await? {
            Response::Producer(producer) => Ok(Box::new(Writer {
                client: self.clone(),
                me: producer,
                transactional: transactional_id.is_some(),
                sequence: 0,
                phase: Phase::Idle,
                touched: false,
            })),
            other => Err(unexpected(other)),
        }
    }
}

/// What a member knows of a partition that it holds.
#[derive(Debug)]
struct Held {
    next_offset: i64,
    paused: bool,
    /// The end that the caller was told, so that an unchanged one is told once.
    told_end: Option<i64>,
}

#[derive(Debug)]
struct Member<L> {
    client: Client<L>,
    spec: GroupSpec,
    incarnation: u64,
    generation: i32,
    heartbeat_at: DateTime<Utc>,
    /// When the broker will have given the partitions to others, if it hears nothing.
    alive_until: DateTime<Utc>,
    holds: BTreeMap<TopicPartition, Held>,
    /// Told to the caller as revoked; given up with the next poll.
    leaving: BTreeSet<TopicPartition>,
    /// The partition that was read last, so that all get their turn.
    last: Option<TopicPartition>,
}

impl<L: Link> Member<L> {
    fn lost(&mut self) -> Option<Polled> {
        self.leaving.clear();
        let gone: Vec<_> = std::mem::take(&mut self.holds).into_keys().collect();
        (!gone.is_empty()).then_some(Polled::Lost(gone))
    }

    fn join_request(&self) -> Request {
        let GroupSpec { group, member, topics, session_timeout, start_at: _ } = self.spec.clone();
        Request::Join { group, member, topics: topics.into_iter().collect(), session_ms: millis(session_timeout) }
    }

    fn entered(&mut self, response: Response) -> Result<()> {
        let Response::Joined(incarnation) = response else { return Err(unexpected(response)) };
        self.incarnation = incarnation;
        self.generation = -1;
        self.heartbeat_at = self.client.link.now();
        self.alive_until = self.client.link.now() + self.spec.session_timeout;
        Ok(())
    }

    /// Tells the broker what is held, and takes over what it says.
    async fn beat(&mut self) -> Result<Option<Polled>> {
        let sent = self.client.link.now();
        let holds = self.holds.keys().cloned().collect();
        let (group, member) = (self.spec.group.clone(), self.spec.member.clone());
        let request = Request::Heartbeat { group, member, incarnation: self.incarnation, holds };
        let told = match self.client.link.call(request).await {
            Ok(Response::Assigned(told)) => told,
            Ok(other) => return Err(unexpected(other)),
            Err(LinkError::Refused(refusal)) if refusal.code == Code::UnknownMemberId => {
                let lost = self.lost();
                match self.client.link.call(self.join_request()).await {
                    Ok(joined) => self.entered(joined)?,
                    // The next heartbeat is refused again, which leads here again.
                    Err(_) => self.heartbeat_at = self.client.link.now() + self.client.settings.retry_wait,
                }
                return Ok(lost);
            }
            Err(LinkError::Refused(refusal)) if !refusal.code.passes() => return Err(refusal.into()),
            Err(LinkError::Refused(_) | LinkError::Unsent(_) | LinkError::Lost(_)) => {
                let now = self.client.link.now();
                self.heartbeat_at = now + self.client.settings.retry_wait;
                // Not a word from the broker: after a session it has given the partitions to others.
                return Ok(if now >= self.alive_until { self.lost() } else { None });
            }
        };
        self.generation = told.generation;
        self.alive_until = sent + self.spec.session_timeout;
        self.heartbeat_at = sent + self.client.settings.heartbeat.min(self.spec.session_timeout / 3);
        let revoked: Vec<_> = self.holds.keys().filter(|p| !told.partitions.contains(p)).cloned().collect();
        if !revoked.is_empty() {
            self.leaving = revoked.iter().cloned().collect();
            return Ok(Some(Polled::Revoked(revoked)));
        }
        let fresh: BTreeSet<_> = told.partitions.into_iter().filter(|p| !self.holds.contains_key(p)).collect();
        if fresh.is_empty() { Ok(None) } else { self.take(fresh).await }
    }

    /// Begins to read `fresh` where the group stands.
    async fn take(&mut self, fresh: BTreeSet<TopicPartition>) -> Result<Option<Polled>> {
        let request = Request::Positions { group: self.spec.group.clone(), partitions: fresh };
        let positions = match self.client.link.call(request).await {
            Ok(Response::Positions(positions)) => positions,
            Ok(other) => return Err(unexpected(other)),
            Err(LinkError::Refused(refusal)) if !refusal.code.passes() => {
                return Err(refusal.into());
            }
            // The owner before may still commit newer offsets: ask again soon.
            Err(LinkError::Refused(_) | LinkError::Unsent(_) | LinkError::Lost(_)) => {
                self.heartbeat_at = self.client.link.now() + self.client.settings.retry_wait;
                return Ok(None);
            }
        };
        let assigned = positions.keys().cloned().collect();
        for (partition, (committed, start, end)) in positions {
            let next_offset = committed.unwrap_or(match self.spec.start_at {
                StartAt::Earliest => start,
                StartAt::Latest => end,
            });
            self.holds.insert(partition, Held { next_offset, paused: false, told_end: None });
        }
        Ok(Some(Polled::Assigned(assigned)))
    }

    /// The next records of one partition, each partition in its turn.
    async fn next(&mut self) -> Result<Option<Polled>> {
        let open: Vec<_> = self.holds.iter().filter(|(_, h)| !h.paused).map(|(p, h)| (p.clone(), h.next_offset)).collect();
        let first = self.last.as_ref().map_or(0, |last| open.partition_point(|(p, _)| p <= last));
        for (partition, offset) in open[first..].iter().chain(&open[..first]) {
            let Settings { poll_records_max: records_max, poll_bytes_max: bytes_max, .. } = self.client.settings;
            let request = Request::Fetch { partition: partition.clone(), offset: *offset, records_max, bytes_max };
            let fetched = match self.client.link.call(request).await {
                Ok(Response::Fetched(fetched)) => fetched,
                Ok(other) => return Err(unexpected(other)),
                Err(LinkError::Refused(refusal)) if !refusal.code.passes() => return Err(refusal.into()),
                Err(LinkError::Refused(_) | LinkError::Unsent(_) | LinkError::Lost(_)) => {
                    self.client.link.sleep(self.client.settings.retry_wait).await;
                    return Ok(None);
                }
            };
            let Some(held) = self.holds.get_mut(partition) else { continue };
            let Fetched { records, next_offset, end_offset } = fetched;
            let news = next_offset != held.next_offset || (next_offset == end_offset && held.told_end != Some(end_offset));
            if news {
                held.next_offset = next_offset;
                held.told_end = Some(end_offset);
                self.last = Some(partition.clone());
                let records = records.into_iter().map(to_record).collect();
                return Ok(Some(Polled::Records { partition: partition.clone(), records, next_offset, end_offset }));
            }
        }
        Ok(None)
    }

    fn held(&mut self, partition: &TopicPartition) -> Result<&mut Held> {
        let (group, member) = (&self.spec.group, &self.spec.member);
        let what = format!("use {}-{} as {member} of {group}: it is not assigned", partition.topic, partition.partition);
        self.holds.get_mut(partition).ok_or_else(|| PortError::permanent(what))
    }
}

#[async_trait]
impl<L: Link> GroupConsumer for Member<L> {
    async fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let until = self.client.link.now() + wait;
        for partition in std::mem::take(&mut self.leaving) {
            self.holds.remove(&partition);
            self.heartbeat_at = self.client.link.now();
        }
        loop {
            let seen = self.client.link.version();
            if self.client.link.now() >= self.heartbeat_at
                && let Some(news) = self.beat().await?
            {
                return Ok(news);
            }
            if let Some(news) = self.next().await? {
                return Ok(news);
            }
            let now = self.client.link.now();
            if now >= until {
                return Ok(Polled::Nothing);
            }
            let next = until.min(self.heartbeat_at.max(now)) - now;
            self.client.link.changed(seen, next.to_std().unwrap_or_default()).await;
        }
    }
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
        let held = self.held(partition)?;
        held.next_offset = offset;
        held.told_end = None;
        Ok(())
    }
    async fn pause(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        partitions.iter().try_for_each(|p| self.held(p).map(|held| held.paused = true))
    }
    async fn resume(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        partitions.iter().try_for_each(|p| self.held(p).map(|held| held.paused = false))
    }
    fn metadata(&self) -> GroupMetadata {
        GroupMetadata { group: self.spec.group.clone(), member: self.spec.member.clone(), generation: self.generation }
    }
    async fn close(&mut self) -> Result<()> {
        self.lost();
        let (group, member) = (self.spec.group.clone(), self.spec.member.clone());
        self.client.ask(Request::Leave { group, member, incarnation: self.incarnation }).await.map(|_| ())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Open,
    /// Something may or may not have entered the transaction: only an abort helps.
    MustAbort,
    /// A newer producer has taken over.
    Fenced,
}

#[derive(Debug)]
struct Writer<L> {
    client: Client<L>,
    me: ProducerRef,
    transactional: bool,
    sequence: u64,
    phase: Phase,
    /// Whether the broker may know of the open transaction.
    touched: bool,
}

impl<L: Link> Writer<L> {
    fn must(&self, allowed: &[Phase], what: &str) -> Result<()> {
        if self.phase == Phase::Fenced {
            return Err(refused(Code::InvalidProducerEpoch, format!("{what}: a newer producer has taken over")));
        }
        if !self.transactional {
            return Err(refused(Code::InvalidTxnState, format!("{what}: the producer has no transactional id")));
        }
        let found = self.phase;
        if allowed.contains(&found) {
            Ok(())
        } else {
            Err(refused(Code::InvalidTxnState, format!("{what}: the producer is {found:?}")))
        }
    }

    /// A request that ends the transaction, or enters it.
    async fn ask(&mut self, request: Request) -> Result<()> {
        let result = self.client.ask(request).await.map(|_| ());
        if let Err(error) = &result
            && error.code.as_deref() == Some(Code::InvalidProducerEpoch.name())
        {
            self.phase = Phase::Fenced;
        }
        result
    }

    async fn enter(&mut self, request: Request) -> Result<()> {
        let result = self.ask(request).await;
        match result.as_ref().map_err(|error| error.disposition) {
            Ok(()) => self.touched = true,
            Err(Disposition::Unknown) => {
                self.touched = true;
                if self.phase == Phase::Open {
                    self.phase = Phase::MustAbort;
                }
            }
            Err(Disposition::Retryable | Disposition::Permanent) => {}
        }
        result
    }
}

#[async_trait]
impl<L: Link> Producer for Writer<L> {
    async fn begin(&mut self) -> Result<()> {
        self.must(&[Phase::Idle], "begin a transaction")?;
        self.phase = Phase::Open;
        self.touched = false;
        Ok(())
    }
    async fn send(&mut self, records: Vec<OutRecord>) -> Result<()> {
        if self.transactional || self.phase == Phase::Fenced {
            self.must(&[Phase::Open], "send records")?;
        }
        if records.is_empty() {
            return Ok(());
        }
        // A number is used once: after an unknown outcome other records may follow.
        self.sequence += 1;
        let messages = records.into_iter().map(to_message).collect();
        self.enter(Request::Produce { producer: self.me, sequence: self.sequence, messages }).await
    }
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
        self.must(&[Phase::Open], "put offsets into the transaction")?;
        if offsets.is_empty() {
            return Ok(());
        }
        let GroupMetadata { group, member, generation } = group.clone();
        self.enter(Request::TxnOffsets { producer: self.me, group, member, generation, offsets: offsets.clone() }).await
    }
    async fn commit(&mut self) -> Result<()> {
        self.must(&[Phase::Open], "commit the transaction")?;
        if self.touched {
            // After an unknown outcome the same commit may be repeated, so the transaction stays open here.
            self.ask(Request::EndTxn { producer: self.me, commit: true }).await?;
        }
        self.phase = Phase::Idle;
        Ok(())
    }
    async fn abort(&mut self) -> Result<()> {
        self.must(&[Phase::Idle, Phase::Open, Phase::MustAbort], "abort the transaction")?;
        if self.phase != Phase::Idle && self.touched {
            self.ask(Request::EndTxn { producer: self.me, commit: false }).await?;
        }
        self.phase = Phase::Idle;
        Ok(())
    }
}
