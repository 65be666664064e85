//! The monitor of the stream: it looks from outside, once a minute, and nobody is asked.
//!
//! Each look is a run of its asset, and judges four things by names of their own: what waits, what came too late, what went
//! to the dead letters, and how far the warehouse's sink is behind. Shares are those of the last minutes, from the job's own
//! counts; what was counted at earlier looks is remembered in memory alone, so that the first look of a process judges no
//! shares.
//!
//! **What is kept.** A look each minute is 1,440 runs a day. A look that failed or was held stays. Those that went well are
//! folded an hour after theirs is over: a fact for each day says how many there were by hour and by seconds of lag, which is
//! all that the objective of streaming freshness needs, and the runs go, but for the newest of each day. Of the outcomes of
//! checks the failures stay, and the last of each day. So a quiet day comes to one run, one fact of less than a kilobyte and
//! one outcome for each check. Left out: who is told, which is the orchestrator's business.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Days, DurationRound, NaiveDate, TimeDelta, Utc};
use serde_json::json;
use tracing::warn;

use super::MONITOR;
use crate::{
    contract::{Severity, check::QualityResult},
    orchestrator::{Job, Slot, Work, WorkError},
    ports::{Disposition, Env, Fact, Fold, PortError, Result, Run, RunLedger, Warehouse, event_log::EventLog},
    slo::samples::{LAG_CHECK, LOOKS, Looks, look_at},
    streaming::{
        config::{StreamConfig, ms},
        event::Fate,
        eventos::writer,
        metricas::METRICAS,
        reconcile::Ratio,
        status::{JobStatus, existing, standing},
    },
};

/// Layer of the checks.
const LAYER: &str = "stream";
/// Name of the check of late events.
pub const LATE_CHECK: &str = "streaming_late_share";
/// Name of the check of dead letters.
pub const DEAD_LETTER_CHECK: &str = "streaming_dead_letter_share";
/// Name of the check of the warehouse's sink.
pub const SINK_CHECK: &str = "warehouse_sink_lag";
/// Looks stay whole for so long after their hour is over.
const WHOLE: TimeDelta = TimeDelta::hours(1);
/// Looks that are older, because nobody was there to fold them, stay as they are.
const FOLDED_BACK: Days = Days::new(7);
/// What passes within so long is no news: a partition whose leader changes, or a topic that is just being made.
const MOMENT: Duration = Duration::from_secs(5);
/// How long to wait until the log is asked again.
const AGAIN: Duration = Duration::from_millis(500);
/// Most earlier looks that are remembered.
const REMEMBERED_MAX: usize = 1_000;

/// What the monitor allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MonitorLimits {
    /// Most records that may wait.
    pub lag_records_max: i64,
    /// Longest time that the oldest of them may have waited, in milliseconds.
    pub lag_ms_max: i64,
    /// Shares are those of so much time before a look, or a little more.
    pub window: Duration,
    /// Fewer events in that time are judged by no share: a bad one at night wakes nobody.
    pub events_min: u64,
    /// Largest share of events that come after the allowed lateness.
    pub late_share_max: Ratio,
    /// Largest share of events that go to the topic of dead letters: not decodable, or against a clause or a rule.
    pub dead_letter_share_max: Ratio,
    /// Longest time that a row of a window may wait for the warehouse, in milliseconds.
    pub sink_ms_max: i64,
}

impl MonitorLimits {
    /// Half of the records of an incident, the objective of two minutes, one event of twenty late and one of a hundred dead
    /// over ten minutes with a hundred events or more, and ten minutes for the sink, which writes every few seconds.
    pub fn specification() -> Self {
        let percent = |numerator| Ratio { numerator, denominator: 100 };
        Self {
            lag_records_max: 5_000,
            lag_ms_max: 120_000,
            window: Duration::from_secs(600),
            events_min: 100,
            late_share_max: percent(5),
            dead_letter_share_max: percent(1),
            sink_ms_max: 600_000,
        }
    }
}

/// What the job had counted at a look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counted {
    read: u64,
    late: u64,
    dead: u64,
}

impl Counted {
    fn of(status: &JobStatus) -> Self {
        let fate = |fate| status.fate(fate).0;
        // All that is in the topic of dead letters.
        let dead = fate(Fate::DeadLettered) + fate(Fate::Quarantined) + fate(Fate::Rejected);
        Self { read: status.records_read(), late: fate(Fate::Late), dead }
    }

    /// What came since; `None` when a job with another state counts anew.
    fn since(self, earlier: Self) -> Option<Self> {
        Some(Self {
            read: self.read.checked_sub(earlier.read)?,
            late: self.late.checked_sub(earlier.late)?,
            dead: self.dead.checked_sub(earlier.dead)?,
        })
    }
}

/// What waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waiting {
    records: i64,
    ms: i64,
}

/// Where the sink was when it was last asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Sink {
    /// When it was first asked.
    since_ms: Option<i64>,
    /// Next offset of each partition that the table has something of; `None` before an answer.
    positions: Option<BTreeMap<i32, i64>>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Earlier looks with their times in milliseconds, oldest first.
    counted: VecDeque<(i64, Counted)>,
    sink: Sink,
    /// What the checks of a turn have found, for its report.
    found: Option<(DateTime<Utc>, serde_json::Value)>,
    /// Looks before this have been folded by this process.
    folded: Option<DateTime<Utc>>,
}

impl Memory {
    /// What came in the window; `None` at the first look, and after the job has begun to count anew.
    fn count(&mut self, now_ms: i64, counted: Counted, window: Duration) -> Option<Counted> {
        // A clock that was put back knows nothing of what came since.
        let is_ahead = |(at, _): &(i64, Counted)| *at > now_ms;
        if self.counted.back().is_some_and(|last| is_ahead(last) || counted.since(last.1).is_none()) {
            self.counted.clear();
        }
        let is_old = |at: i64| now_ms - at >= ms(window);
        while self.counted.len() > REMEMBERED_MAX || self.counted.get(1).is_some_and(|(at, _)| is_old(*at)) {
            self.counted.pop_front();
        }
        let came = self.counted.front().and_then(|(_, earlier)| counted.since(*earlier));
        self.counted.push_back((now_ms, counted));
        came
    }
}

/// Looks at the streaming job from outside; see the module.
#[derive(Debug)]
pub struct StreamingMonitor {
    /// Clock.
    pub env: Arc<dyn Env>,
    /// The log.
    pub log: Arc<dyn EventLog>,
    /// Where its looks are kept.
    pub ledger: Arc<dyn RunLedger>,
    /// What the sink of the windows loads. One that has never loaded anything is nobody's, and is not judged.
    pub warehouse: Arc<dyn Warehouse>,
    /// The job.
    pub config: StreamConfig,
    /// What is allowed.
    pub limits: MonitorLimits,
    memory: Mutex<Memory>,
}

/// An outcome: whether it passed, and what was seen.
type Seen = (bool, String);

fn unknown(error: &PortError) -> Seen {
    (false, format!("not known: {}", error.chain()))
}

/// A share of what came, of at least so many events.
fn share(came: Option<Counted>, part: impl Fn(Counted) -> u64, max: Ratio, events_min: u64) -> Seen {
    match came {
        None => (true, "nothing to compare with yet".into()),
        Some(came) => {
            let ratio = Ratio { numerator: part(came), denominator: came.read };
            let passed = came.read < events_min || !ratio.exceeds(max);
            (passed, format!("{} of {} events, {ratio}", ratio.numerator, ratio.denominator))
        }
    }
}

impl StreamingMonitor {
    /// A monitor that has seen nothing yet.
    pub fn new(
        env: Arc<dyn Env>,
        log: Arc<dyn EventLog>,
        ledger: Arc<dyn RunLedger>,
        warehouse: Arc<dyn Warehouse>,
        config: StreamConfig,
        limits: MonitorLimits,
    ) -> Self {
        Self { env, log, ledger, warehouse, config, limits, memory: Mutex::default() }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, status: &JobStatus, now_ms: i64) -> serde_json::Value {
        let (records, lag_ms, watermark_ms) = (status.lag_records(), status.lag_ms(now_ms), status.watermark_ms());
        json!({ "lag_records": records, "lag_ms": lag_ms, "watermark_ms": watermark_ms })
    }

    /// Asks the log, and again while an error passes by itself. A call that has taken longer than a moment is not repeated.
    async fn patiently<T, F: Future<Output = Result<T>>>(&self, ask: impl Fn() -> F) -> Result<T> {
        let give_up_at = self.env.now() + MOMENT;
        loop {
            match ask().await {
                Err(e) if e.disposition == Disposition::Retryable && self.env.now() < give_up_at => {
                    warn!(error = %e.chain(), "the log does not answer, it is asked again");
                    self.env.sleep(AGAIN).await;
                }
                answer => return answer,
            }
        }
    }

    /// What waits beyond these positions of the sink; a partition of which the table has nothing waits whole.
    async fn behind(&self, positions: &BTreeMap<i32, i64>, now_ms: i64) -> Result<Waiting> {
        let topic = &self.config.topics.metrics;
        let mut waiting = Waiting { records: 0, ms: 0 };
        for (partition, bounds) in existing(self.log.offsets(topic).await)? {
            let of = standing(&*self.log, topic, partition, bounds, positions.get(&partition).copied()).await?;
            waiting.records += of.lag_records();
            waiting.ms = waiting.ms.max(of.lag_ms(now_ms));
        }
        Ok(waiting)
    }

    /// Asks the table how far it is.
    async fn positions(&self) -> Result<BTreeMap<i32, i64>> {
        let topic = &self.config.topics.metrics;
        let mut positions = BTreeMap::new();
        for partition in existing(self.log.offsets(topic).await)?.into_keys() {
            let at = crate::ports::event_log::TopicPartition { topic: topic.clone(), partition };
            if let Some(next) = self.warehouse.writer_epoch(METRICAS, &writer(&at)).await? {
                positions.insert(partition, next);
            }
        }
        Ok(positions)
    }

    /// How far the sink is behind. Its positions only rise, so those of an earlier look do while nothing waits too long by
    /// them: the table is asked when something might.
    async fn sink(&self, now_ms: i64) -> Seen {
        let limit = self.limits.sink_ms_max;
        let known = self.memory().sink.clone();
        let mut at_most = known.since_ms.map_or(0, |since| now_ms.saturating_sub(since));
        if let Some(positions) = known.positions.as_ref().filter(|p| !p.is_empty())
            && let Ok(waiting) = self.patiently(|| self.behind(positions, now_ms)).await
        {
            if waiting.ms <= limit {
                return (true, format!("at most {} records, the oldest for at most {} ms", waiting.records, waiting.ms));
            }
            at_most = waiting.ms;
        }
        self.memory().sink.since_ms.get_or_insert(now_ms);
        match self.positions().await {
            Ok(positions) => {
                self.memory().sink.positions = Some(positions.clone());
                if positions.is_empty() {
                    return (true, "no sink has loaded anything".into());
                }
                match self.patiently(|| self.behind(&positions, now_ms)).await {
                    Ok(Waiting { records, ms }) => (ms <= limit, format!("{records} records, the oldest for {ms} ms")),
                    Err(e) => unknown(&e),
                }
            }
            // A warehouse that is away for a moment wakes nobody; the sink may be on time.
            Err(e) => (at_most <= limit.saturating_mul(2), format!("not known, at most {at_most} ms: {}", e.chain())),
        }
    }

    /// Puts a fact in the place of looks that went well, and removes what passed of old outcomes.
    async fn fold(&self, job: &Job) -> Result<()> {
        let hour = |at: DateTime<Utc>| at.duration_trunc(TimeDelta::hours(1)).unwrap_or(at);
        let now = self.env.now();
        let until = hour(now - WHOLE);
        if self.memory().folded == Some(until) {
            return Ok(());
        }
        let today = now.date_naive();
        let runs = self.ledger.runs_since(MONITOR, today.checked_sub_days(FOLDED_BACK).unwrap_or(today)).await?;
        let newest: BTreeMap<NaiveDate, i64> = runs.iter().map(|run| (run.fecha, run.epoch)).collect();
        let is_old = |run: &&Run| look_at(run) < until && newest.get(&run.fecha) != Some(&run.epoch);
        let mut days: BTreeMap<NaiveDate, (Looks, Vec<(NaiveDate, i64)>)> = BTreeMap::new();
        for run in runs.iter().filter(is_old) {
            let (looks, gone) = days.entry(look_at(run).date_naive()).or_default();
            if looks.add(run) {
                gone.push((run.fecha, run.epoch));
            }
        }
        let facts = if days.is_empty() { Vec::new() } else { self.ledger.facts(LOOKS).await? };
        for (day, (mut looks, runs)) in days.into_iter().filter(|(_, (_, runs))| !runs.is_empty()) {
            let name = day.to_string();
            if let Some(fact) = facts.iter().find(|fact| fact.name == name) {
                looks.merge(&Looks::read(fact)?);
            }
            let value = serde_json::to_value(&looks).map_err(|e| PortError::permanent("write a day of looks").because(e))?;
            let fact = Fact { topic: LOOKS.into(), name, value, at: now };
            self.ledger.fold_runs(&Fold { pipeline: MONITOR.into(), runs, fact }, job.run.fence.as_ref()).await?;
        }
        for fecha in [today.pred_opt(), Some(today)].into_iter().flatten() {
            self.ledger.thin_quality(LAYER, fecha, until).await?;
        }
        self.memory().folded = Some(until);
        Ok(())
    }
}

#[async_trait]
impl Work for StreamingMonitor {
    async fn ready(&self) -> Result<()> {
        self.log.offsets(&self.config.topics.clicks).await.map(|_| ())
    }
    async fn checks(&self, slot: Slot) -> Vec<QualityResult> {
        let MonitorLimits { lag_records_max, lag_ms_max, window, events_min, .. } = self.limits.clone();
        let status = self.patiently(|| JobStatus::read(&self.config, &*self.log)).await;
        let now_ms = self.env.now().timestamp_millis();
        let [lag, late, dead] = match &status {
            Err(e) => [unknown(e), unknown(e), unknown(e)],
            Ok(status) => {
                let (records, waited) = (status.lag_records(), status.lag_ms(now_ms));
                let passed = records <= lag_records_max && waited <= lag_ms_max;
                let mut memory = self.memory();
                memory.found = Some((slot.scheduled, self.report(status, now_ms)));
                let came = memory.count(now_ms, Counted::of(status), window);
                [
                    (passed, format!("{records} records, the oldest for {waited} ms")),
                    share(came, |came| came.late, self.limits.late_share_max, events_min),
                    share(came, |came| came.dead, self.limits.dead_letter_share_max, events_min),
                ]
            }
        };
        let sink = self.sink(now_ms).await;
        let clicks = &self.config.topics.clicks;
        let of_window = |max: Ratio| format!("at most {max} in {} s, from {events_min} events on", window.as_secs());
        let result = |check: &str, asset: &str, (passed, observed): Seen, expected: String| QualityResult {
            check: check.into(),
            layer: LAYER.into(),
            asset: asset.into(),
            fecha: slot.fecha,
            severity: Severity::Error,
            passed,
            observed,
            expected,
            failing_rows: 0,
            checked_at: self.env.now(),
        };
        vec![
            result(LAG_CHECK, clicks, lag, format!("at most {lag_records_max} records for at most {lag_ms_max} ms")),
            result(LATE_CHECK, clicks, late, of_window(self.limits.late_share_max)),
            result(DEAD_LETTER_CHECK, clicks, dead, of_window(self.limits.dead_letter_share_max)),
            result(SINK_CHECK, METRICAS, sink, format!("at most {} ms", self.limits.sink_ms_max)),
        ]
    }
    async fn floor(&self, _fecha: NaiveDate) -> Result<i64> {
        Ok(0)
    }
    async fn run(&self, job: &Job) -> Result<serde_json::Value, WorkError> {
        let found = self.memory().found.take().filter(|(scheduled, _)| *scheduled == job.slot.scheduled);
        let report = match found {
            Some((_, report)) => report,
            None => {
                let status = JobStatus::read(&self.config, &*self.log).await.map_err(WorkError::Port)?;
                self.report(&status, self.env.now().timestamp_millis())
            }
        };
        // The look is what counts; the next one folds again.
        if let Err(e) = self.fold(job).await {
            warn!(error = %e.chain(), "old looks not folded");
        }
        Ok(report)
    }
}

#[cfg(test)]
#[path = "monitor_tests.rs"]
mod tests;
