//! The outbox: alerts that outlive the process and an unreachable pager.
//!
//! An alert is written into the ledger first and delivered afterwards, by one task, so that no run waits for a pager and
//! none fails for one. What cannot be delivered is logged, counted, and tried again with doubling waits until it is given
//! up. Keys are incidents: one that is open is not raised again, whoever asks and however often the process starts.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tracing::{error, info};

use super::{LoopConfig, incident::About, sleep_until, within};
use crate::ports::{Alert, Disposition, Env, Fact, Fence, Metrics, Notifier, PortError, Result, RunLedger};

/// Topic of the facts.
pub const TOPIC: &str = "alert";
/// Longest time for one call to a notifier; it has its own, shorter bounds.
const CALL: Duration = Duration::from_secs(120);
/// Most incidents that are kept; the oldest are forgotten, not resolved, to make room.
const ENTRIES_MAX: usize = 1_000;
/// Longest wait before the next try, in seconds.
const BACKOFF_MAX_S: u64 = 3_600;

/// How far an alert has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// To be raised.
    Raising,
    /// Raised: the incident is open.
    Raised,
    /// To be resolved.
    Resolving,
    /// Given up; whoever looks at the ledger still sees it.
    Lost,
}

/// An alert on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The alert.
    pub alert: Alert,
    /// How far it has come.
    pub stage: Stage,
    /// Whether its incident is over.
    pub is_over: bool,
    /// Since when, by the clock of whoever led then.
    pub since: DateTime<Utc>,
    /// From which epoch on a success of each day ends the incident; see [`super::incident`].
    #[serde(default)]
    pub ends_from: BTreeMap<NaiveDate, i64>,
    /// Calls of this stage that failed.
    pub failed: u32,
    /// Not called before.
    pub next_at: DateTime<Utc>,
}

/// Under which lease the outbox writes.
pub trait Fencing: std::fmt::Debug + Send + Sync {
    /// The fence.
    ///
    /// # Errors
    /// `Permanent` with code [`crate::ports::FENCED`] when the lease is over.
    fn fence(&self) -> Result<Fence>;
}

/// Alerts that wait to be delivered, and those whose incidents are open.
#[derive(Debug)]
pub struct Outbox {
    env: Arc<dyn Env>,
    ledger: Arc<dyn RunLedger>,
    notifier: Arc<dyn Notifier>,
    metrics: Arc<dyn Metrics>,
    fencing: Arc<dyn Fencing>,
    config: LoopConfig,
    entries: Mutex<BTreeMap<String, Entry>>,
    woken: Notify,
}

impl Outbox {
    /// The outbox with what the ledger has of it.
    ///
    /// # Errors
    /// Those of the ledger.
    pub async fn open(
        env: Arc<dyn Env>,
        ledger: Arc<dyn RunLedger>,
        notifier: Arc<dyn Notifier>,
        metrics: Arc<dyn Metrics>,
        fencing: Arc<dyn Fencing>,
        config: LoopConfig,
    ) -> Result<Self> {
        let facts = ledger.facts(TOPIC).await?;
        let entries = facts.into_iter().filter_map(|f| Some((f.name, serde_json::from_value(f.value).ok()?))).collect();
        Ok(Self { env, ledger, notifier, metrics, fencing, config, entries: Mutex::new(entries), woken: Notify::new() })
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The incidents that are not over, in order of key.
    pub fn open_incidents(&self) -> Vec<Entry> {
        self.entries().values().filter(|e| !e.is_over).cloned().collect()
    }

    /// Keeps an entry, or takes it away, in the ledger and then here.
    async fn keep(&self, key: &str, entry: Option<Entry>) -> Result<()> {
        let fence = self.fencing.fence()?;
        let value = entry.as_ref().map_or(serde_json::Value::Null, |e| serde_json::to_value(e).unwrap_or_default());
        let fact = Fact { topic: TOPIC.into(), name: key.into(), value, at: self.env.now() };
        self.ledger.put_fact(&fact, Some(&fence)).await?;
        match entry {
            Some(entry) => drop(self.entries().insert(key.into(), entry)),
            None => drop(self.entries().remove(key)),
        }
        let waiting = self.entries().values().filter(|e| matches!(e.stage, Stage::Raising | Stage::Resolving)).count();
        self.metrics.gauge("simulacro_alerts_waiting", &[], waiting as f64);
        Ok(())
    }

    /// From which epoch on a success ends an incident that begins now.
    async fn ends_from(&self, key: &str, since: DateTime<Utc>) -> Result<BTreeMap<NaiveDate, i64>> {
        let about = About::of(key);
        if !about.ends_by_success() {
            return Ok(BTreeMap::new());
        }
        Ok(about.ends_from(&self.ledger.runs_since(about.asset, about.first(since)).await?))
    }

    /// Forgets the oldest incidents while there are too many.
    async fn make_room(&self) -> Result<()> {
        loop {
            let oldest = {
                let entries = self.entries();
                if entries.len() < ENTRIES_MAX {
                    return Ok(());
                }
                entries.iter().min_by_key(|(_, e)| e.since).map(|(key, _)| key.clone())
            };
            let Some(key) = oldest else { return Ok(()) };
            error!(key = %key, most = ENTRIES_MAX, "incident forgotten, there are too many");
            self.keep(&key, None).await?;
        }
    }

    /// Delivers alerts as they come, for ever.
    ///
    /// # Errors
    /// Those of the ledger, so that the lease or the database is lost.
    pub async fn deliver(&self) -> Result<()> {
        loop {
            let now = self.env.now();
            let calls = |e: &Entry| matches!(e.stage, Stage::Raising | Stage::Resolving);
            let next = self.entries().values().filter(|e| calls(e)).min_by_key(|e| (e.next_at, e.since)).cloned();
            match next {
                Some(entry) if entry.next_at <= now => self.call(entry).await?,
                Some(entry) => {
                    tokio::select! { biased; () = self.woken.notified() => {}, () = sleep_until(&*self.env, entry.next_at) => {} }
                }
                None => self.woken.notified().await,
            }
        }
    }

    async fn call(&self, entry: Entry) -> Result<()> {
        let key = entry.alert.dedup_key.clone();
        let call = async {
            match entry.stage {
                Stage::Raising => self.notifier.raise(&entry.alert).await,
                Stage::Resolving => self.notifier.resolve(&key).await,
                Stage::Raised | Stage::Lost => Ok(()),
            }
        };
        let result = within(&*self.env, CALL, call).await.unwrap_or_else(|| {
            Err(PortError::unknown(format!("tell of {key}: no answer within {} s", CALL.as_secs())).code("ETIMEDOUT"))
        });
        // What was asked for meanwhile counts, not what was when the call began.
        let Some(mut present) = self.entries().get(&key).cloned() else { return Ok(()) };
        let now = self.env.now();
        match result {
            Ok(()) => {
                self.metrics.count("simulacro_alerts_total", &[("outcome", "delivered")], 1);
                if entry.stage == Stage::Resolving {
                    return self.keep(&key, None).await;
                }
                present.stage = if present.is_over { Stage::Resolving } else { Stage::Raised };
                (present.failed, present.next_at) = (0, now);
            }
            Err(problem) => {
                present.failed += 1;
                let wait = self.config.alert_backoff_s.saturating_mul(1 << (present.failed - 1).min(16)).min(BACKOFF_MAX_S);
                present.next_at = now + Duration::from_secs(wait);
                let give_up_at = entry.since + Duration::from_secs(self.config.alert_give_up_s);
                if problem.disposition == Disposition::Permanent || present.next_at > give_up_at {
                    present.stage = Stage::Lost;
                    self.metrics.count("simulacro_alerts_total", &[("outcome", "lost")], 1);
                    error!(key = %key, failed = present.failed, error = %problem.chain(), "alert given up");
                    return self.keep(&key, (!present.is_over).then_some(present)).await;
                }
                self.metrics.count("simulacro_alerts_total", &[("outcome", "failed")], 1);
                error!(key = %key, failed = present.failed, next = %present.next_at, error = %problem.chain(), "alert not delivered");
            }
        }
        self.keep(&key, Some(present)).await
    }
}

#[async_trait]
impl Notifier for Outbox {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        let key = alert.dedup_key.as_str();
        let now = self.env.now();
        let present = self.entries().get(key).cloned();
        let entry = match present {
            Some(entry) if !entry.is_over => return Ok(()),
            // It is back before its end was told: the same incident goes on.
            Some(entry) if entry.stage == Stage::Raising => {
                Entry { is_over: false, ends_from: self.ends_from(key, entry.since).await?, ..entry }
            }
            Some(_) | None => Entry {
                alert: alert.clone(),
                stage: Stage::Raising,
                is_over: false,
                since: now,
                ends_from: self.ends_from(key, now).await?,
                failed: 0,
                next_at: now,
            },
        };
        error!(kind = %alert.kind, priority = alert.priority, key, "alert: {}", alert.summary);
        if !self.entries().contains_key(key) {
            self.make_room().await?;
        }
        self.keep(key, Some(entry)).await?;
        self.woken.notify_one();
        Ok(())
    }

    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        let Some(entry) = self.entries().get(dedup_key).cloned().filter(|e| !e.is_over) else { return Ok(()) };
        info!(key = dedup_key, "incident over");
        let now = self.env.now();
        let entry = match entry.stage {
            // Told late rather than never; its end follows.
            Stage::Raising => Entry { is_over: true, ..entry },
            Stage::Raised => Entry { is_over: true, stage: Stage::Resolving, failed: 0, next_at: now, since: now, ..entry },
            Stage::Resolving | Stage::Lost => return self.keep(dedup_key, None).await,
        };
        self.keep(dedup_key, Some(entry)).await?;
        self.woken.notify_one();
        Ok(())
    }
}
