//! A story of the stream as strict TOML: `kind = "stream"`. Seconds count from the start of the story.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::streaming::{config::StreamConfig, event::Fate};

use super::{cost::Cost, faults::StreamFault, sabotage::Sabotage};
use crate::scenario::{Account, Tier, Verdict};

/// Most workers of a story.
pub const WORKERS_MAX: usize = 8;
/// Longest production, in seconds.
pub const DURATION_S_MAX: u64 = 7 * 86_400;

/// What kind of story a file tells; a file without it is one of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The streaming job.
    Stream,
}

/// A partition that gets no events for a while.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Silence {
    /// Partition.
    pub partition: i32,
    /// From, inclusive, in seconds.
    pub from_s: u64,
    /// To, exclusive, in seconds.
    pub to_s: u64,
}

/// A type of event that comes beside the others from a moment on, from a producer of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arrival {
    /// The type.
    pub event_type: String,
    /// Events per minute.
    pub per_minute: u64,
    /// From, inclusive, in seconds.
    pub from_s: u64,
    /// To, exclusive, in seconds.
    pub to_s: u64,
    /// Pages on which nothing else happens.
    pub pages: u64,
}

/// Who looks at the job from outside, as the platform's monitor does, and raises an alert when a check fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {
    /// Seconds from one look to the next.
    pub every_s: u64,
    /// Most records that may wait.
    pub lag_records_max: u64,
    /// Longest time that the oldest of them may have waited, in milliseconds.
    pub lag_ms_max: u64,
}

/// What an operator does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum StreamAct {
    /// Starts more workers, once there was an alert.
    AddWorkers {
        /// Seconds after the first alert.
        after_alert_s: u64,
        /// How many there are then.
        workers: usize,
    },
}

/// What must be read off the job at a moment. Limits are inclusive; what has none is not judged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reading {
    /// Seconds from the start; the newest look until then tells.
    pub at_s: u64,
    /// Records behind, the most over the time of [`super::world::LAG_OVER_S`].
    pub lag: Option<[u64; 2]>,
    /// How long the newest commit took, in milliseconds; of several workers, that which took longest.
    pub commit_ms: Option<[u64; 2]>,
    /// State, in megabytes of the account.
    pub state_mb: Option<[u64; 2]>,
    /// Records that came in a second, over the time of [`super::world::RATE_OVER_S`].
    pub in_per_s: Option<[u64; 2]>,
    /// Records that were processed in a second, over the same time.
    pub out_per_s: Option<[u64; 2]>,
}

/// What is sent. Shares are thousandths of the events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Processes that send.
    pub producers: usize,
    /// Partitions of the topic of clicks.
    pub partitions: i32,
    /// Events per minute of each producer.
    pub per_minute: u64,
    /// How long it is sent, in seconds.
    pub duration_s: u64,
    /// Customers.
    pub users: u64,
    /// Pages.
    pub pages: u64,
    /// One customer's in one region.
    pub hot: u64,
    /// Sent once more, up to `duplicate_after_s` later.
    pub duplicates: u64,
    /// Longest time from an event to its duplicate, in seconds.
    pub duplicate_after_s: u64,
    /// Behind the clock, within the allowed lateness.
    pub out_of_order: u64,
    /// Behind the clock, by more than the allowed lateness.
    pub late: u64,
    /// Ahead of the clock, within what is believed.
    pub ahead: u64,
    /// Ahead of the clock by more than that.
    pub future: u64,
    /// Not decodable, in one of the ways of [`super::workload::Damage`].
    pub damaged: u64,
    /// Against a clause of the contract or a rule of the business.
    pub invalid: u64,
    /// Exactly on a half minute, or so far behind one that the event is at the very limit of lateness.
    #[serde(default)]
    pub on_the_edge: u64,
    /// Partitions that get nothing for a while.
    #[serde(default)]
    pub silent: Vec<Silence>,
    /// Types of events that come later.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arrival: Vec<Arrival>,
}

/// What must be true at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamExpect {
    /// Whether the job survives, or is caught.
    pub verdict: Verdict,
    /// The invariants that a `caught` story must see broken, in alphabetical order.
    #[serde(default)]
    pub broken: Vec<String>,
    /// Each fault must strike at least so often.
    pub fired_min: u64,
    /// Records by which the job must have been behind at some time.
    #[serde(default)]
    pub lag_min: u64,
    /// How many events must have come to each of these ends.
    #[serde(default)]
    pub fates_min: BTreeMap<Fate, u64>,
    /// Records by which the job must never be behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_below: Option<u64>,
    /// Codes with which workers may give up; those of a fenced one only when another has its name.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub gave_up: BTreeSet<String>,
    /// Kinds of the alerts that must be raised, in order; no others may be. Without it, alerts are not judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alerts: Option<Vec<String>>,
    /// Longest time from the first effect that anybody could see to the first alert, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detected_within_s: Option<u64>,
    /// What must be read off the job.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reading: Vec<Reading>,
}

/// The story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamScenario {
    /// Always `stream`.
    pub kind: Kind,
    /// What is at stake, without numbers.
    pub summary: String,
    /// When it runs.
    pub tier: Tier,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// When it begins.
    pub start: DateTime<Utc>,
    /// Length of a simulation step in milliseconds.
    pub tick_ms: u64,
    /// Workers.
    pub workers: usize,
    /// When the workers start, in seconds.
    pub workers_from_s: u64,
    /// How long after the end of production and of all faults the job may need to be done, in seconds.
    pub patience_s: u64,
    /// A defence that is off.
    pub sabotage: Option<Sabotage>,
    /// A defence without which the story is told once more, for comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counterfactual: Option<Sabotage>,
    /// What is sent.
    pub workload: Workload,
    /// The job's configuration; what is missing is as specified.
    pub config: StreamConfig,
    /// What processing and state cost; without it, nothing but the way to the broker takes time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<Cost>,
    /// Who looks at the job; without it, nobody is told of anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watch: Option<Watch>,
    /// What people noticed by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account: Option<Account>,
    /// What operators do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub operator: Vec<StreamAct>,
    /// Faults.
    #[serde(default)]
    pub fault: Vec<StreamFault>,
    /// Expectations.
    pub expect: StreamExpect,
}

impl StreamScenario {
    /// Reads a scenario.
    ///
    /// # Errors
    /// The place in the text, what stands there and what could.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scenario: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        scenario.check()?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) { Ok(()) } else { Err(format!("{name}: found {value}, expected {low} to {high}")) }
        };
        let workload = &self.workload;
        within("seeds", self.seeds.len() as u64, 1, 1_000)?;
        within("tick_ms", self.tick_ms, 1, 1_000)?;
        within("workers", self.workers as u64, 1, WORKERS_MAX as u64)?;
        within("workload.producers", workload.producers as u64, 1, 8)?;
        within("workload.partitions", workload.partitions.unsigned_abs().into(), 1, 64)?;
        within("workload.per_minute", workload.per_minute, 1, 1_000_000)?;
        within("workload.duration_s", workload.duration_s, 1, DURATION_S_MAX)?;
        within("workload.users", workload.users, 1, 1_000_000)?;
        within("workload.pages", workload.pages, 1, 1_000)?;
        let shares = [workload.out_of_order, workload.late, workload.ahead, workload.future, workload.damaged, workload.invalid];
        within("workload: sum of the shares", shares.iter().fold(0, |sum, s| sum.saturating_add(*s)), 0, 1_000)?;
        within("workload.duplicates", workload.duplicates, 0, 1_000)?;
        within("workload.hot", workload.hot, 0, 1_000)?;
        within("workload.on_the_edge", workload.on_the_edge, 0, 1_000)?;
        self.config.validate().map_err(|e| format!("config: {e}"))?;
        if self.config.dedup_horizon < self.config.allowed_lateness {
            // Otherwise an event could be counted or be a duplicate, depending on when an idle partition followed.
            return Err("config.dedup_horizon_ms: found less than allowed_lateness_ms, expected at least as much".into());
        }
        for fault in &self.fault {
            fault.check(self)?;
        }
        self.check_incident()?;
        if self.summary.chars().any(|c| c.is_ascii_digit()) {
            return Err("summary: found a digit, expected prose without numbers; each number is a field of its own".into());
        }
        Ok(())
    }

    /// What a story of an incident has beside the others.
    fn check_incident(&self) -> Result<(), String> {
        for arrival in &self.workload.arrival {
            let Arrival { event_type, per_minute, from_s, to_s, pages } = arrival;
            if !self.config.event_types.contains(event_type) {
                return Err(format!("workload.arrival: found event_type {event_type:?}, expected one of config.event_types"));
            }
            if !(1..=1_000_000).contains(per_minute) || !(1..=1_000_000).contains(pages) {
                return Err("workload.arrival: per_minute, pages: expected 1 to 1000000".into());
            }
            if from_s >= to_s || *to_s > self.workload.duration_s {
                return Err(format!(
                    "workload.arrival: found {from_s} to {to_s}, expected an end after the start and up to duration_s"
                ));
            }
        }
        if let Some(cost) = &self.cost {
            cost.check()?;
        }
        if self.watch.as_ref().is_some_and(|watch| watch.every_s == 0) {
            return Err("watch.every_s: found 0, expected at least 1".into());
        }
        if !self.operator.is_empty() && self.watch.is_none() {
            return Err("operator: found an action after an alert, expected a watch that raises one".into());
        }
        for StreamAct::AddWorkers { workers, .. } in &self.operator {
            if !(self.workers + 1..=WORKERS_MAX).contains(workers) {
                return Err(format!("operator: found workers {workers}, expected {} to {WORKERS_MAX}", self.workers + 1));
            }
        }
        if self.counterfactual.is_some() && self.account.is_none() {
            return Err("counterfactual: found no account, expected one, for nobody is told in the comparison".into());
        }
        if self.cost.is_none() && self.expect.reading.iter().any(|r| r.commit_ms.is_some() || r.state_mb.is_some()) {
            return Err("expect.reading: found commit_ms or state_mb, expected a cost that gives them".into());
        }
        Ok(())
    }

    /// Workers that may ever be there.
    pub fn workers_most(&self) -> usize {
        self.operator.iter().map(|StreamAct::AddWorkers { workers, .. }| *workers).fold(self.workers, usize::max)
    }

    /// The same story without the defence that it names for comparison. Nobody is told anything in it, so no operator comes.
    pub fn told_without(&self) -> Option<Self> {
        let sabotage = Some(self.counterfactual?);
        Some(Self { sabotage, counterfactual: None, watch: None, operator: Vec::new(), ..self.clone() })
    }

    /// The same story with the defence on that it switches off; what it tells of the course without it is not asked.
    pub fn defended(&self) -> Option<Self> {
        self.sabotage?;
        let mut defended = Self { sabotage: None, ..self.clone() };
        let expect = &mut defended.expect;
        (expect.verdict, expect.broken, expect.lag_min) = (Verdict::Holds, Vec::new(), 0);
        (expect.alerts, expect.detected_within_s) = (None, None);
        expect.reading.clear();
        Some(defended)
    }

    /// The text that gives this scenario.
    ///
    /// # Errors
    /// When a value has no form in TOML.
    pub fn to_toml(&self) -> Result<String, String> {
        toml::to_string(self).map_err(|e| e.to_string())
    }

    /// A time of the story.
    pub fn at(&self, seconds: u64) -> DateTime<Utc> {
        self.start + std::time::Duration::from_secs(seconds)
    }

    /// When production and all faults are over, in seconds from the start.
    pub fn healed_s(&self) -> u64 {
        let production = self.workload.duration_s + super::workload::CLOSING_S;
        self.fault.iter().map(StreamFault::over_s).fold(production.max(self.workers_from_s), u64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAG: &str = include_str!("../../../scenarios/incidents/lag_1405.toml");
    const TOLD: &str = include_str!("../../../scenarios/negative/lag_1405_no_ttl.toml");

    #[test]
    fn the_comparison_is_the_story_that_the_account_tells() {
        let without = StreamScenario::parse(LAG).expect("a story").told_without().expect("a comparison");
        let told = StreamScenario::parse(TOLD).expect("a story");
        assert_eq!((without.sabotage, without.watch.as_ref(), without.operator.len()), (told.sabotage, None, 0));
        assert_eq!(
            (without.workload, without.config, without.cost),
            (told.workload.clone(), told.config.clone(), told.cost.clone())
        );
        let defended = told.defended().expect("a twin");
        assert_eq!((defended.sabotage, defended.expect.lag_min, defended.expect.reading.len()), (None, 0, 0));
        assert_eq!(defended.told_without(), None);
    }

    #[test]
    fn a_story_of_an_incident_says_what_it_needs() {
        let said = |from: &str, to: &str| {
            assert!(LAG.contains(from), "no {from}");
            StreamScenario::parse(&LAG.replacen(from, to, 1)).expect_err(to)
        };
        for (from, to, wanted) in [
            ("event_type = \"wishlist\"", "event_type = \"wish\"", "expected one of config.event_types"),
            ("to_s = 1440", "to_s = 1441", "expected an end after the start and up to duration_s"),
            ("every_s = 60", "every_s = 0", "watch.every_s: found 0"),
            ("workers = 4", "workers = 1", "operator: found workers 1, expected 2 to 8"),
            ("records_per_s", "records_per_h", "unknown field `records_per_h`"),
            ("action = \"add_workers\"", "action = \"pray\"", "unknown variant `pray`"),
            ("scale = ", "scale = 0 #", "cost.scale: found 0, expected 1 to 1000000"),
        ] {
            let error = said(from, to);
            assert!(error.contains(wanted), "{to}: {error}");
        }
        let unwatched: String = LAG.replace("[watch]\nevery_s = 60\nlag_records_max = 5000\nlag_ms_max = 120000\n", "");
        assert!(StreamScenario::parse(&unwatched).expect_err("nobody looks").contains("expected a watch that raises one"));
    }
}
