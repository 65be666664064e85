//! A scenario: one story as strict TOML. Prose says what is at stake; every number is a field. A story is of the batch, or
//! with `kind = "stream"` of the stream, or with `kind = "platform"` of the whole batch platform.

use std::collections::BTreeSet;

use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::platform::Config;

use crate::{
    defence::Defence,
    faults::Fault,
    platform::{PlatformScenario, swarm as platform_swarm},
    stream::{StreamScenario, sabotage::Sabotage, swarm as stream_swarm},
    swarm,
};

/// When a scenario runs in CI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// On every change.
    Pr,
    /// Every night.
    Nightly,
}

impl Tier {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pr => "pr",
            Self::Nightly => "nightly",
        }
    }
}

/// What must come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every invariant holds.
    Holds,
    /// A defence is off, and the invariants must notice.
    Caught,
}

/// What must be true at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Whether the platform survives, or is caught.
    pub verdict: Verdict,
    /// The invariants that a `caught` scenario must see broken, in alphabetical order.
    #[serde(default)]
    pub broken: Vec<String>,
    /// Kinds of the alerts that must be raised, in order; no others may be. Without it, alerts are not judged.
    pub alerts: Option<Vec<String>>,
    /// Tries to reach the source, to the second, with their outcome: `03:00:16 ECONNREFUSED`.
    pub attempts: Option<Vec<String>>,
    /// The name of the gate that holds a day, when one must.
    pub held_by: Option<String>,
    /// The ways by which lost tables came back, in order. Without it, they are not judged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovered_by: Option<Vec<String>>,
    /// Longest time from the first effect that anybody could see to the first alert, in seconds. Without it, the delay is
    /// told and not judged.
    pub detected_within_s: Option<u64>,
    /// Each fault must strike at least so often.
    pub fired_min: u64,
    /// Whether the tables must equal those of the same story without its faults.
    pub converges: bool,
}

/// The dimension of products, from the API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Products {
    /// Minutes from the daily schedule to the first refresh after it.
    pub refresh_after_min: u32,
    /// Hours from one refresh to the next, at least 1.
    pub refresh_every_h: u32,
}

/// What an operator does, at a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum Act {
    /// Runs a day again by hand.
    RunDay {
        /// When.
        at: DateTime<Utc>,
        /// The day.
        fecha: NaiveDate,
    },
    /// Puts a table back to what it was.
    Restore {
        /// When.
        at: DateTime<Utc>,
        /// Folder of the table.
        table: String,
        /// The version that was the newest then.
        as_of: DateTime<Utc>,
    },
    /// Brings back what was lost of a folder's tables, by the cheapest way that works.
    Recover {
        /// When.
        at: DateTime<Utc>,
        /// A table, or a folder of tables.
        target: String,
        /// Whether days may be extracted again from the source.
        #[serde(default)]
        from_source: bool,
    },
}

impl Act {
    /// When it is done.
    pub fn at(&self) -> DateTime<Utc> {
        match self {
            Self::RunDay { at, .. } | Self::Restore { at, .. } | Self::Recover { at, .. } => *at,
        }
    }
}

/// What people noticed by themselves, as the account of an incident tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// When what caused it was done.
    pub began_at: DateTime<Utc>,
    /// When somebody noticed, where no alert told.
    pub noticed_at: DateTime<Utc>,
    /// When the cause was known.
    pub cause_at: DateTime<Utc>,
}

/// The story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What is at stake, without numbers.
    pub summary: String,
    /// When it runs.
    pub tier: Tier,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// First day of the purchase history whose rows are used.
    pub purchases_from: NaiveDate,
    /// The day that they are dated to; the run for it starts on the next day.
    pub fecha: NaiveDate,
    /// Number of days, at least 1.
    pub days: u64,
    /// Time of day of the schedule, in UTC.
    pub schedule: NaiveTime,
    /// Seconds from the schedule to the start of the run.
    pub dispatch_s: i64,
    /// Time of day at which a day must be published, in UTC.
    pub sla: NaiveTime,
    /// Length of a simulation step in milliseconds.
    pub tick_ms: u64,
    /// How often each day is run; later runs begin when the earlier one has ended.
    pub runs: u32,
    /// Rows of each day, where it is not what the history has: purchases of later days make it full. The contract is then
    /// that of the reference platform.
    pub rows_per_day: Option<usize>,
    /// Models beside the mart that each day makes.
    #[serde(default)]
    pub models: Vec<String>,
    /// Defences that the platform does without.
    #[serde(default)]
    pub without: BTreeSet<Defence>,
    /// Defences without which the story is told once more, for comparison.
    #[serde(default)]
    pub counterfactual: BTreeSet<Defence>,
    /// The platform's configuration.
    pub config: Config,
    /// The dimension of products; without it, sales are not enriched.
    pub products: Option<Products>,
    /// What people noticed by themselves.
    pub account: Option<Account>,
    /// What operators do, each at its time.
    #[serde(default)]
    pub operator: Vec<Act>,
    /// Faults.
    #[serde(default)]
    pub fault: Vec<Fault>,
    /// Expectations.
    pub expect: Expect,
}

impl Scenario {
    /// Reads a scenario.
    ///
    /// # Errors
    /// The place in the text, what stands there and what could.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scenario: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        if scenario.days == 0 || scenario.runs == 0 || scenario.seeds.is_empty() || scenario.tick_ms == 0 {
            return Err("days, runs, tick_ms and the number of seeds: found 0, expected at least 1".into());
        }
        if scenario.products.is_some_and(|p| p.refresh_every_h == 0) || scenario.rows_per_day == Some(0) {
            return Err("refresh_every_h, rows_per_day: found 0, expected at least 1".into());
        }
        if scenario.summary.chars().any(|c| c.is_ascii_digit()) {
            return Err("summary: found a digit, expected prose without numbers; each number is a field of its own".into());
        }
        Ok(scenario)
    }

    /// The text that gives this scenario.
    ///
    /// # Errors
    /// When a value has no form in TOML.
    pub fn to_toml(&self) -> Result<String, String> {
        toml::to_string(self).map_err(|e| e.to_string())
    }

    /// The days in order.
    pub fn fechas(&self) -> Vec<NaiveDate> {
        (0..self.days).map(|n| self.fecha + Days::new(n)).collect()
    }

    /// When the run of a day is due.
    pub fn scheduled(&self, fecha: NaiveDate) -> DateTime<Utc> {
        (fecha + Days::new(1)).and_time(self.schedule).and_utc()
    }

    /// When a day must be published.
    pub fn sla(&self, fecha: NaiveDate) -> DateTime<Utc> {
        (fecha + Days::new(1)).and_time(self.sla).and_utc()
    }

    /// The same story without its faults.
    pub fn twin(&self) -> Self {
        Self { fault: Vec::new(), ..self.clone() }
    }

    /// The same story without the defences that it names for comparison. Nobody is told anything in it, so no operator comes.
    pub fn told_without(&self) -> Self {
        Self { without: &self.without | &self.counterfactual, operator: Vec::new(), ..self.clone() }
    }
}

/// A story of one of the worlds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Story {
    /// The daily batch.
    Batch(Box<Scenario>),
    /// The streaming job.
    Stream(Box<StreamScenario>),
    /// The whole batch platform.
    Platform(Box<PlatformScenario>),
}

impl Story {
    /// Reads a story.
    ///
    /// # Errors
    /// The place in the text, what stands there and what could.
    pub fn parse(text: &str) -> Result<Self, String> {
        let table: toml::Table = toml::from_str(text).map_err(|e| e.to_string())?;
        match table.get("kind").map(|kind| kind.as_str()) {
            None => Scenario::parse(text).map(|scenario| Self::Batch(Box::new(scenario))),
            Some(Some("stream")) => StreamScenario::parse(text).map(|story| Self::Stream(Box::new(story))),
            Some(Some("platform")) => PlatformScenario::parse(text).map(|story| Self::Platform(Box::new(story))),
            Some(found) => {
                Err(format!("kind: found {found:?}, expected \"stream\" or \"platform\", or none for a story of the batch"))
            }
        }
    }

    /// The text that gives this story.
    ///
    /// # Errors
    /// When a value has no form in TOML.
    pub fn to_toml(&self) -> Result<String, String> {
        match self {
            Self::Batch(scenario) => scenario.to_toml(),
            Self::Stream(story) => story.to_toml(),
            Self::Platform(story) => story.to_toml(),
        }
    }

    /// What is at stake.
    pub fn summary(&self) -> &str {
        match self {
            Self::Batch(scenario) => &scenario.summary,
            Self::Stream(story) => &story.summary,
            Self::Platform(story) => &story.summary,
        }
    }
    /// Says what is at stake.
    pub fn set_summary(&mut self, summary: String) {
        match self {
            Self::Batch(scenario) => scenario.summary = summary,
            Self::Stream(story) => story.summary = summary,
            Self::Platform(story) => story.summary = summary,
        }
    }
    /// When it runs.
    pub fn tier(&self) -> Tier {
        match self {
            Self::Batch(scenario) => scenario.tier,
            Self::Stream(story) => story.tier,
            Self::Platform(story) => story.tier,
        }
    }
    /// Seeds, one at least.
    pub fn seeds(&self) -> &[u64] {
        match self {
            Self::Batch(scenario) => &scenario.seeds,
            Self::Stream(story) => &story.seeds,
            Self::Platform(story) => &story.seeds,
        }
    }
    /// Whether the result must equal that of the same story without its faults. A stream's oracle is exact by itself.
    pub fn converges(&self) -> bool {
        match self {
            Self::Batch(scenario) => scenario.expect.converges,
            Self::Stream(_) => false,
            Self::Platform(story) => story.expect.converges,
        }
    }
    /// The same story without the defences that it names for comparison; `None` when it names none.
    pub fn counterfactual(&self) -> Option<Self> {
        match self {
            Self::Batch(scenario) if !scenario.counterfactual.is_empty() => Some(Self::Batch(Box::new(scenario.told_without()))),
            Self::Stream(story) => story.told_without().map(|story| Self::Stream(Box::new(story))),
            Self::Batch(_) | Self::Platform(_) => None,
        }
    }
    /// The faults of a run under a seed as TOML, in the order of its hits.
    ///
    /// # Errors
    /// When a value has no form in TOML.
    pub fn faults(&self, seed: u64) -> Result<Vec<String>, String> {
        match self {
            Self::Batch(scenario) => scenario.fault.iter().map(|f| toml::to_string(f).map_err(|e| e.to_string())).collect(),
            Self::Stream(story) => story.fault.iter().map(|f| toml::to_string(f).map_err(|e| e.to_string())).collect(),
            Self::Platform(story) => story.faults(seed).iter().map(|f| toml::to_string(f).map_err(|e| e.to_string())).collect(),
        }
    }
    /// The same story without the faults that it has under a seed.
    pub fn twin(&self, seed: u64) -> Self {
        match self {
            Self::Batch(scenario) => Self::Batch(Box::new(scenario.twin())),
            Self::Stream(story) => Self::Stream(Box::new(StreamScenario { fault: Vec::new(), ..(**story).clone() })),
            Self::Platform(story) => Self::Platform(Box::new(story.twin(seed))),
        }
    }
    /// The same story with the defence on that it switches off; `None` when it switches none off. Those of the stream and of the
    /// platform must hold.
    /// That of the batch ends otherwise than the story tells, with a day held or an alert raised; what the story breaks must not
    /// be broken there. Where a value of the configuration is what is off, what is right instead is not in the story.
    pub fn defended(&self) -> Option<Self> {
        match self {
            Self::Platform(story) => story.defended().map(|story| Self::Platform(Box::new(story))),
            Self::Batch(scenario) if scenario.without.is_empty() || scenario.expect.verdict != Verdict::Caught => None,
            Self::Batch(scenario) => Some(Self::Batch(Box::new(Scenario { without: BTreeSet::new(), ..(**scenario).clone() }))),
            Self::Stream(story) => story.defended().map(|story| Self::Stream(Box::new(story))),
        }
    }
    /// Switches a defence off, by its name in scenarios. A platform story without a stream stays whole when the defence is one
    /// of the stream.
    ///
    /// # Errors
    /// What is known by that name, and what could be.
    pub fn weaken(&mut self, name: &str) -> Result<(), String> {
        let of = |kind: &str, error: serde_json::Error| format!("a defence of the {kind}: {error}");
        let defence = serde_json::from_value::<Defence>(name.into()).map_err(|e| of("batch", e));
        let sabotage = serde_json::from_value::<Sabotage>(name.into()).map_err(|e| of("stream", e));
        match self {
            Self::Batch(scenario) => drop(scenario.without.insert(defence?)),
            Self::Stream(story) => story.sabotage = Some(sabotage?),
            Self::Platform(story) => match (defence, sabotage) {
                (Ok(defence), _) => drop(story.without.insert(defence)),
                (Err(_), Ok(sabotage)) => story.sabotage = story.stream.is_some().then_some(sabotage),
                (Err(batch), Err(stream)) => return Err(format!("{batch}; {stream}")),
            },
        }
        Ok(())
    }
    /// Smaller stories, the greatest step first.
    pub fn smaller(&self) -> Vec<Self> {
        match self {
            Self::Batch(scenario) => swarm::smaller(scenario).into_iter().map(|s| Self::Batch(Box::new(s))).collect(),
            Self::Stream(story) => stream_swarm::smaller(story).into_iter().map(|s| Self::Stream(Box::new(s))).collect(),
            Self::Platform(story) => platform_swarm::smaller(story).into_iter().map(|s| Self::Platform(Box::new(s))).collect(),
        }
    }
    /// Its size, for people.
    pub fn size(&self) -> String {
        match self {
            Self::Batch(scenario) => {
                format!("{} faults, {} days and {} runs", scenario.fault.len(), scenario.days, scenario.runs)
            }
            Self::Stream(story) => {
                format!("{} faults, {} workers and {} s", story.fault.len(), story.workers, story.workload.duration_s)
            }
            Self::Platform(story) => {
                let (days, sales) = (story.days, story.shop.sales_per_day);
                let events = story.stream.as_ref().map_or(String::new(), |s| format!(" and {} events", s.events_per_day));
                format!("{} faults, {days} days of {sales} sales{events}", story.fault.len())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../../scenarios/incidents/monday_0300_waiting.toml");

    #[test]
    fn an_unknown_key_is_named() {
        let error = Scenario::parse(&format!("colour = \"red\"\n{GOOD}")).expect_err("an unknown key");
        assert!(error.contains("unknown field `colour`"), "{error}");
    }

    #[test]
    fn a_scenario_survives_being_written() {
        let scenario = Scenario::parse(GOOD).expect("a scenario");
        assert_eq!(Scenario::parse(&scenario.to_toml().expect("text")).expect("a scenario"), scenario);
    }

    #[test]
    fn only_a_story_whose_defence_is_off_has_a_defended_twin() {
        let story = Story::parse(include_str!("../../scenarios/negative/stream_no_dedup.toml")).expect("a story");
        let Some(Story::Stream(defended)) = story.defended() else { panic!("expected a twin") };
        assert_eq!((defended.sabotage, defended.expect.verdict, defended.expect.broken.len()), (None, Verdict::Holds, 0));
        assert_eq!(Story::Stream(defended).defended(), None);
        assert_eq!(Story::parse(GOOD).expect("a story").defended(), None);
        let story = Story::parse(include_str!("../../scenarios/negative/duplicates_counted.toml")).expect("a story");
        let Some(Story::Batch(defended)) = story.defended() else { panic!("expected a twin") };
        assert!(defended.without.is_empty());
        assert_eq!(Story::Batch(defended).defended(), None);
    }

    #[test]
    fn prose_holds_no_numbers() {
        let error = Scenario::parse(&GOOD.replacen("summary = \"", "summary = \"5 ", 1)).expect_err("a digit");
        assert!(error.contains("prose without numbers"), "{error}");
    }
}
