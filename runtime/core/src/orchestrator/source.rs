//! Waiting for a source that is away, and trying again what has failed.

use std::{future::Future, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tracing::error;

use super::sleep_until;
use crate::ports::{Alert, Disposition, Env, Metrics, Notifier, Ports, Result};

/// What to do when the source does not answer. All durations are in seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum SourcePolicy {
    /// Try again a few times and give up: what the old system did.
    Retry {
        /// Announced waits, in order.
        waits_s: Vec<u64>,
        /// What a retry waits for its turn, on top of the announced wait.
        dispatch_s: u64,
    },
    /// Wait for the source until a deadline, asking at an interval.
    Wait {
        /// Time between two questions.
        every_s: u64,
        /// Counted from the schedule; after it the run gives up.
        deadline_s: u64,
    },
}

/// How often a run that failed is tried again. Each try is a run of its own in the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetryPolicy {
    /// Tries after the first.
    pub retries: u32,
    /// Seconds: the longest wait before the first retry. It doubles with each; the wait itself is drawn between nothing
    /// and that (full jitter), so that many pipelines that failed together do not come back together.
    pub backoff_s: u64,
    /// Seconds, counted from the schedule; no try begins after it.
    pub deadline_s: u64,
}

impl RetryPolicy {
    /// When the next try begins, `None` when there is none. `tried` counts the tries so far, from 1.
    pub fn next(&self, tried: u32, scheduled: DateTime<Utc>, now: DateTime<Utc>, random: u64) -> Option<DateTime<Utc>> {
        if tried > self.retries {
            return None;
        }
        let longest = self.backoff_s.saturating_mul(1 << (tried - 1).min(16));
        let wait = random % (longest + 1);
        let next = now + Duration::from_secs(wait);
        (next <= scheduled + Duration::from_secs(self.deadline_s)).then_some(next)
    }
}

/// One try to reach the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// When the answer came.
    pub at: DateTime<Utc>,
    /// `ok` or the error's code.
    pub outcome: String,
}

/// A source that is waited for.
#[derive(Debug)]
pub struct Waiting<'a> {
    /// Clock.
    pub env: &'a dyn Env,
    /// Who is told.
    pub notifier: &'a dyn Notifier,
    /// How long, and how often it is asked.
    pub policy: &'a SourcePolicy,
    /// Seconds after the schedule at which its absence is worth an alert.
    pub alert_after_s: u64,
    /// Seconds before each question.
    pub startup_s: u64,
    /// The schedule.
    pub scheduled: DateTime<Utc>,
    /// Key of the alert.
    pub key: &'a str,
}

/// Asks a source under a policy until it answers, and keeps each answer; the last tells the result.
///
/// One alert is raised once the source has been away for `alert_after_s` after `scheduled`, at once when its error is
/// permanent, and resolved when it answers. Who waits asks once more when it falls due.
/// The number of attempts is bounded by the policy.
///
/// # Errors
/// The source's last error, when the policy is spent or the error is not retryable; an error of the notifier.
pub async fn wait_for_source<F: Future<Output = Result<()>>>(
    waiting: &Waiting<'_>,
    probe: impl Fn() -> F,
    attempts: &mut Vec<Attempt>,
) -> Result<()> {
    let Waiting { env, notifier, policy, alert_after_s, startup_s, scheduled, key } = waiting;
    let alert_at = *scheduled + Duration::from_secs(*alert_after_s);
    let mut alerted = false;
    let mut asked = 0;
    loop {
        env.sleep(Duration::from_secs(*startup_s)).await;
        let error = match probe().await {
            Ok(()) => {
                attempts.push(Attempt { at: env.now(), outcome: "ok".into() });
                if alerted {
                    notifier.resolve(key).await?;
                }
                return Ok(());
            }
            Err(error) => error,
        };
        asked += 1;
        attempts.push(Attempt { at: env.now(), outcome: error.code.clone().unwrap_or_else(|| error.what.clone()) });
        let next = match policy {
            SourcePolicy::Retry { waits_s, dispatch_s } => {
                waits_s.get(asked - 1).map(|w| env.now() + Duration::from_secs(w + dispatch_s))
            }
            SourcePolicy::Wait { every_s, deadline_s } => {
                let now = env.now();
                let next = now + Duration::from_secs((*every_s).max(1));
                // It is asked once more when the alert falls due: an absence that is over by then wakes nobody.
                let next = if now < alert_at { next.min(alert_at) } else { next };
                (next <= *scheduled + Duration::from_secs(*deadline_s)).then_some(next)
            }
        };
        let next = if error.disposition == Disposition::Permanent { None } else { next };
        let due = match (policy, next) {
            (_, None) => true,
            // The alert falls due while we wait, so the wait is cut in two at that moment.
            (SourcePolicy::Retry { .. }, Some(next)) => next >= alert_at,
            (SourcePolicy::Wait { .. }, Some(_)) => env.now() >= alert_at,
        };
        if due && !alerted {
            // What never passes needs no patience.
            if error.disposition != Disposition::Permanent {
                sleep_until(*env, alert_at.min(next.unwrap_or(alert_at)).max(env.now())).await;
            }
            let alert = Alert {
                dedup_key: (*key).into(),
                kind: "source_unavailable".into(),
                priority: 2,
                summary: format!("the source does not answer: {}", error.chain()),
            };
            notifier.raise(&alert).await?;
            alerted = true;
        }
        match next {
            Some(next) => sleep_until(*env, next).await,
            None => return Err(error),
        }
    }
}

/// Reaches the platform's source under a policy; see [`wait_for_source`]. An unreachable pager fails nothing.
///
/// # Errors
/// The source's last error.
pub async fn verify_sources(
    ports: &Ports,
    policy: &SourcePolicy,
    alert_after_s: u64,
    startup_s: u64,
    scheduled: DateTime<Utc>,
    attempts: &mut Vec<Attempt>,
) -> Result<()> {
    let key = format!("source_unavailable:{}", scheduled.format("%Y-%m-%d"));
    let notifier = Telling { notifier: ports.notifier.clone(), metrics: ports.metrics.clone() };
    let (env, notifier) = (&*ports.env, &notifier);
    let waiting = Waiting { env, notifier, policy, alert_after_s, startup_s, scheduled, key: &key };
    wait_for_source(&waiting, || ports.tables.ping(), attempts).await
}

/// A notifier that fails nobody: what could not be told is logged and counted. For runs by hand, which have no outbox.
#[derive(Debug)]
pub struct Telling {
    /// Who is told.
    pub notifier: Arc<dyn Notifier>,
    /// Where failures are counted.
    pub metrics: Arc<dyn Metrics>,
}

impl Telling {
    fn note(&self, key: &str, result: Result<()>) {
        let outcome = if result.is_ok() { "delivered" } else { "lost" };
        self.metrics.count("simulacro_alerts_total", &[("outcome", outcome)], 1);
        if let Err(problem) = result {
            error!(key, error = %problem.chain(), "alert not delivered");
        }
    }
}

#[async_trait]
impl Notifier for Telling {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        self.note(&alert.dedup_key, self.notifier.raise(alert).await);
        Ok(())
    }
    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        self.note(dedup_key, self.notifier.resolve(dedup_key).await);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_double_stay_within_their_wait_and_end() {
        let policy = RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 };
        let start = DateTime::UNIX_EPOCH;
        for (tried, longest) in [(1, 300), (2, 600), (3, 1_200)] {
            for random in [0, 1, 299, 12_345, u64::MAX] {
                let next = policy.next(tried, start, start, random).expect("a retry");
                assert!((0..=longest).contains(&(next - start).num_seconds()), "{tried} {random} {next}");
            }
        }
        assert_eq!(policy.next(4, start, start, 0), None);
        let late = start + Duration::from_secs(9_001);
        assert_eq!(policy.next(1, start, late, 0), None, "no try begins after the deadline");
    }
}
