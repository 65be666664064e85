//! A story of the stream as strict TOML: `kind = "stream"`. Seconds count from the start of the story.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::streaming::{config::StreamConfig, event::Fate};

use super::{faults::StreamFault, sabotage::Sabotage};
use crate::scenario::{Tier, Verdict};

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
    /// What is sent.
    pub workload: Workload,
    /// The job's configuration; what is missing is as specified.
    pub config: StreamConfig,
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
        if self.summary.chars().any(|c| c.is_ascii_digit()) {
            return Err("summary: found a digit, expected prose without numbers; each number is a field of its own".into());
        }
        Ok(())
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
