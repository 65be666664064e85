//! Assets as data: what is made, when, from what, and how patient one is with it; and the work behind each.
//!
//! Two things are the same for all assets and therefore no fields: an asset has at most one active run, and of several
//! schedules that were missed only the newest is run.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Days, NaiveDate, SubsecRound, Utc};
use croner::{
    Cron,
    parser::{CronParser, Seconds, Year},
};

use super::{BreakerPolicy, PlanError, RetryPolicy, SourcePolicy};
use crate::{
    contract::check::QualityResult,
    ports::{PortError, Run},
};

/// Most schedules that are counted when schedules were missed.
const COUNTED_MAX: usize = 10_000;

/// A cron expression of five fields, in UTC: minute, hour, day of month, month, day of week.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    text: String,
    cron: Cron,
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Schedule {
    /// Reads an expression such as `0 3 * * *`.
    ///
    /// # Errors
    /// When it is none, or is one that never comes, as the 31st of February; the text names it and says why.
    pub fn parse(text: &str) -> Result<Self, PlanError> {
        let wrong = |why: String| PlanError::Schedule { found: text.into(), why };
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(text).map_err(|e| wrong(e.to_string()))?;
        let schedule = Self { text: text.into(), cron };
        match schedule.next(DateTime::UNIX_EPOCH) {
            Some(_) => Ok(schedule),
            None => Err(wrong("it never comes".into())),
        }
    }

    /// The first time after this one.
    pub fn next(&self, after: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.cron.find_next_occurrence(&after.trunc_subsecs(0), false).ok()
    }

    /// The last time that is not after this one.
    pub fn newest(&self, at: DateTime<Utc>) -> Option<DateTime<Utc>> {
        self.cron.find_previous_occurrence(&at.trunc_subsecs(0), true).ok()
    }

    /// The times after `after` and before `before`, the newest first, at most `max`; and how many there are, of which at
    /// most ten thousand are counted.
    pub fn between(&self, after: DateTime<Utc>, before: DateTime<Utc>, max: usize) -> (Vec<DateTime<Utc>>, usize) {
        let (mut times, mut count, mut at) = (Vec::new(), 0, before);
        while count < COUNTED_MAX {
            match self.cron.find_previous_occurrence(&at, false) {
                Ok(time) if time > after => {
                    if count < max {
                        times.push(time);
                    }
                    (count, at) = (count + 1, time);
                }
                Ok(_) | Err(_) => break,
            }
        }
        (times, count)
    }
}

/// One turn of an asset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot {
    /// When it is due.
    pub scheduled: DateTime<Utc>,
    /// The day that it processes.
    pub fecha: NaiveDate,
}

/// What is made, when, from what, and how patient one is with it. Durations are in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Asset {
    /// Name, which is also its pipeline in the ledger: lower-case letters, digits and `_`.
    pub name: String,
    /// Who answers for it.
    pub owner: String,
    /// Assets whose newest turn must have succeeded first.
    pub depends_on: Vec<String>,
    /// When, in UTC.
    pub schedule: Schedule,
    /// Days from the day that is processed to the day of the schedule: 1 for a run that processes yesterday.
    pub lag_days: u32,
    /// What to do while its source is away. Waiting for the source is part of a run, but costs no try.
    pub source_policy: SourcePolicy,
    /// After the schedule, when an absent source is worth an alert.
    pub alert_after_s: u64,
    /// Longest time for one try, without the wait for the source; above 0.
    pub timeout_s: u64,
    /// How often it is tried again, and until when.
    pub retry: RetryPolicy,
    /// What to do when the checks before processing fail.
    pub breaker: BreakerPolicy,
    /// After the schedule, when it must have been published; `None` promises nothing.
    pub sla_s: Option<u64>,
    /// Priority of the alert when it fails or is held: 1, 2 or 3. A missed SLA is always 1.
    pub priority: u8,
}

impl Asset {
    /// The turn of a schedule.
    pub fn slot(&self, scheduled: DateTime<Utc>) -> Slot {
        let day = scheduled.date_naive();
        Slot { scheduled, fecha: day.checked_sub_days(Days::new(self.lag_days.into())).unwrap_or(day) }
    }

    /// After it no try begins.
    pub fn deadline(&self, slot: Slot) -> DateTime<Utc> {
        slot.scheduled + Duration::from_secs(self.retry.deadline_s)
    }
}

/// What a run of an asset is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// The turn.
    pub slot: Slot,
    /// The ledger's row; its epoch is above every one that the work has told of.
    pub run: Run,
}

/// Why work did not succeed. Nothing is published then.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// A port failed.
    #[error("a port failed")]
    Port(#[source] PortError),
    /// A gate stopped it: trying again would find the same.
    #[error("held by {gate}: {text}")]
    Held {
        /// Which gate.
        gate: String,
        /// What was found and what was expected.
        text: String,
    },
}

/// What an asset runs. The orchestrator knows nothing else of it.
#[async_trait]
pub trait Work: fmt::Debug + Send + Sync {
    /// Succeeds when what it reads from answers. Called again and again while it does not.
    ///
    /// # Errors
    /// `Retryable` while it is away, `Permanent` when waiting is of no use.
    async fn ready(&self) -> Result<(), PortError> {
        Ok(())
    }
    /// The checks before processing, all of them, whatever the first ones found; none where there is nothing to check.
    async fn checks(&self, _slot: Slot) -> Vec<QualityResult> {
        Vec::new()
    }
    /// The highest epoch that anything it writes has seen for the day, 0 when there is none.
    ///
    /// # Errors
    /// Those of a port.
    async fn floor(&self, fecha: NaiveDate) -> Result<i64, PortError>;
    /// Does the work once, and says what it did. Dropped in the middle when it takes too long or the lease is lost; a later
    /// run with a higher epoch then does it again, so each write of it must be idempotent and fenced by its epoch.
    ///
    /// # Errors
    /// See [`WorkError`].
    async fn run(&self, job: &Job) -> Result<serde_json::Value, WorkError>;
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().expect("a time")
    }

    fn check(schedule: &str, after: &str, expected: &[&str]) {
        let schedule = Schedule::parse(schedule).expect("a schedule");
        let mut at = time(after);
        for expected in expected {
            at = schedule.next(at).expect("a next time");
            assert_eq!(at, time(expected), "{schedule}");
            assert_eq!(schedule.newest(at), Some(at), "{schedule}");
            assert_eq!(schedule.newest(at + Duration::from_millis(59_999)), Some(at), "{schedule}");
        }
    }

    #[test]
    fn the_schedules_of_the_platform_come_when_they_should() {
        check("0 3 * * *", "2024-03-17T03:00:00Z", &["2024-03-18T03:00:00Z", "2024-03-19T03:00:00Z"]);
        check("0 3 * * *", "2024-03-18T02:59:59.999Z", &["2024-03-18T03:00:00Z"]);
        check("0 */6 * * *", "2024-02-28T17:00:00Z", &["2024-02-28T18:00:00Z", "2024-02-29T00:00:00Z"]);
        check("30 4 * * 0", "2024-03-18T00:00:00Z", &["2024-03-24T04:30:00Z", "2024-03-31T04:30:00Z"]);
        // The clocks of Europe were put forward on that day; UTC knows nothing of it.
        check("30 2 * * *", "2024-03-30T03:00:00Z", &["2024-03-31T02:30:00Z", "2024-04-01T02:30:00Z"]);
        check("0 0 29 2 *", "2024-03-01T00:00:00Z", &["2028-02-29T00:00:00Z"]);
    }

    #[test]
    fn what_is_no_schedule_is_named() {
        for bad in ["", "0 3 * *", "0 0 3 * * *", "61 3 * * *", "0 3 31 2 *", "cada dia"] {
            let error = Schedule::parse(bad).expect_err("no schedule").to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn times_between_are_those_that_next_gives(minute in 0..60_u32, step in 1..12_u32, from in 0..100_000_u32, hours in 0..200_u32) {
            let schedule = Schedule::parse(&format!("{minute} */{step} * * *")).expect("a schedule");
            let after = time("2024-01-01T00:00:00Z") + Duration::from_secs(u64::from(from) * 60);
            let before = after + Duration::from_secs(u64::from(hours) * 3_600);
            let mut expected = Vec::new();
            let mut at = after;
            while let Some(next) = schedule.next(at).filter(|n| *n < before) {
                expected.insert(0, next);
                at = next;
            }
            let (times, count) = schedule.between(after, before, 5);
            prop_assert_eq!(count, expected.len());
            expected.truncate(5);
            prop_assert_eq!(times, expected);
        }
    }
}
