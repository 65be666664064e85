//! What a platform story came to, beside the judgement that all stories have: faults with their detection, and objectives
//! with what is left of their error budgets.

use std::collections::BTreeMap;

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::{
    slo::{Standing, Status},
    streaming::event::Fate,
};

use super::faults::{Entry, Mode};

/// How an objective stands over the whole story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slo {
    /// Name.
    pub name: String,
    /// Promised share, as printed.
    pub target: String,
    /// Share that was good, as printed; `None` without a sample.
    pub attained: Option<String>,
    /// Good samples.
    pub good: u64,
    /// All samples.
    pub total: u64,
    /// Bad samples that the budget of the story allows.
    pub may: u64,
    /// Bad samples.
    pub spent: u64,
    /// Whether the promise was kept.
    pub standing: Standing,
    /// Bad samples of the worst of the objective's own windows, each ending at a due time of the story.
    pub worst: u64,
    /// What the budget of that window allows.
    pub worst_may: u64,
}

impl Slo {
    /// From the evaluator's status over the story, and that of the worst window.
    pub fn of(status: &Status, worst: &Status) -> Self {
        let (may, spent) = status.budget();
        let (worst_may, bad) = worst.budget();
        Self {
            name: status.name.clone(),
            target: status.target.to_string(),
            attained: status.attained().map(|a| a.to_string()),
            good: status.good,
            total: status.total,
            may,
            spent,
            standing: status.standing,
            worst: bad,
            worst_may,
        }
    }

    /// For a person.
    pub fn line(&self) -> String {
        let Self { name, target, attained, good, total, may, spent, standing, worst, worst_may } = self;
        let attained = attained.as_deref().unwrap_or("-");
        let standing = match standing {
            Standing::Met => "met",
            Standing::Missed => "MISSED",
            Standing::NoData => return format!("{name:<31} {target:>9}  no data in this world"),
        };
        format!(
            "{name:<31} {target:>9} {attained:>10} {good:>6} of {total:<6} spent {spent:>4} of {may:<4} worst window {worst:>3} of {worst_may:<3} {standing}"
        )
    }
}

/// What the platform made of a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It struck nothing.
    Unseen,
    /// Nothing was late or failed, and nobody was told.
    Absorbed,
    /// Somebody was told.
    Alerted,
    /// Something was late or failed, and nobody was told.
    Missed,
}

/// A fault and how it went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Struck {
    /// Mode.
    pub mode: Mode,
    /// Beginning.
    pub from: DateTime<Utc>,
    /// End, by itself or by the operator.
    pub over: DateTime<Utc>,
    /// Calls or rows that it struck.
    pub hits: u64,
    /// First effect that could be seen.
    pub first_hit: Option<DateTime<Utc>>,
    /// Kind of the first alert about it.
    pub alert: Option<String>,
    /// Seconds from the first effect to that alert, and thousandths.
    pub delay_ms: Option<i64>,
    /// What became of it.
    pub outcome: Outcome,
}

impl Struck {
    /// What is fixed of its mode.
    pub fn entry(&self) -> &'static Entry {
        self.mode.entry()
    }
}

/// What the stream came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Events that were sent.
    pub events: u64,
    /// Events by fate.
    pub fates: BTreeMap<Fate, u64>,
    /// Events whose fate the topic alone does not tell.
    pub by_timing: u64,
    /// Rows of windows, all revisions.
    pub rows: u64,
    /// Longest time that the oldest event had waited when the monitor looked and was content, in milliseconds.
    pub lag_max_ms: u64,
    /// Looks of the monitor that found too much waiting.
    pub held: u64,
    /// Days that were reconciled.
    pub reconciled: u64,
    /// Days of these on which the two sides differ.
    pub differing: u64,
    /// Cents of them that nothing explains.
    pub unexplained_cents: u64,
    /// Deaths of workers.
    pub crashes: u64,
    /// Workers and sinks that gave up and were started again.
    pub stops: u64,
}

impl StreamReport {
    /// For a person.
    pub fn line(&self) -> String {
        let Self { events, rows, lag_max_ms, held, reconciled, differing, unexplained_cents, crashes, stops, .. } = self;
        let fates = self.fates.iter().filter(|(_, n)| **n > 0).map(|(fate, n)| format!("{n} {fate}"));
        format!(
            "stream    {events} events = {}, {rows} rows of windows, lag up to {} s, {held} looks found too much, {crashes} deaths, \
             {stops} gave up; {reconciled} days reconciled, {differing} differ, unexplained {}.{:02}",
            fates.collect::<Vec<_>>().join(" + "),
            lag_max_ms.div_ceil(1_000),
            unexplained_cents / 100,
            unexplained_cents % 100
        )
    }
}

/// What a story came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Days of the story.
    pub days: u64,
    /// Virtual days that passed, in thousandths.
    pub virtual_millidays: u64,
    /// Days that were published by their SLA.
    pub in_time: u64,
    /// Days that were late.
    pub late: Vec<NaiveDate>,
    /// Days that the operator published.
    pub backfilled: Vec<NaiveDate>,
    /// Objectives.
    pub slos: Vec<Slo>,
    /// Faults, in order of their beginning.
    pub faults: Vec<Struck>,
    /// Alerts that no fault explains, with their time.
    pub false_alerts: Vec<String>,
    /// The stream, when there is one.
    #[serde(default)]
    pub stream: Option<StreamReport>,
}

impl Report {
    /// Figures that can be added up over runs.
    pub fn totals(&self) -> Vec<(&'static str, u64)> {
        let count = |outcome: Outcome| self.faults.iter().filter(|f| f.outcome == outcome).count() as u64;
        vec![
            ("days", self.days),
            ("days in time", self.in_time),
            ("days by the operator", self.backfilled.len() as u64),
            ("faults absorbed", count(Outcome::Absorbed)),
            ("faults alerted", count(Outcome::Alerted)),
            ("faults missed", count(Outcome::Missed)),
            ("faults unseen", count(Outcome::Unseen)),
            ("events", self.stream.as_ref().map_or(0, |stream| stream.events)),
        ]
    }

    /// For a person, in a few lines.
    pub fn lines(&self) -> Vec<String> {
        let count = |outcome: Outcome| self.faults.iter().filter(|f| f.outcome == outcome).count();
        let mut out = vec![format!(
            "days      {} of {} by their SLA, {} published by the operator",
            self.in_time,
            self.days,
            self.backfilled.len()
        )];
        if !self.faults.is_empty() {
            out.push(format!(
                "faults    {}: {} absorbed, {} alerted, {} missed, {} struck nothing; {} false alerts",
                self.faults.len(),
                count(Outcome::Absorbed),
                count(Outcome::Alerted),
                count(Outcome::Missed),
                count(Outcome::Unseen),
                self.false_alerts.len()
            ));
        }
        out.extend(self.stream.iter().map(StreamReport::line));
        out.extend(self.slos.iter().map(|slo| format!("slo       {}", slo.line())));
        out
    }
}
