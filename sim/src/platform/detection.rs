//! How long it takes until somebody is told: one short story for each failure mode and seed, and the table over all of them.
//!
//! A delay is counted from the first effect that could be seen to the first alert that the fault explains. Distributions
//! are printed, never means: a mean hides the runs in which nobody was told for hours. What this leaves out: faults of the
//! stream other than those of this world.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use chrono::{DateTime, Days, NaiveDate, Utc};
use simulacro_core::orchestrator::LoopConfig;

use super::{
    faults::{Fault, Mode},
    report::Outcome,
    scenario::{Drawn, Kind, PlatformExpect, PlatformScenario, RUN_AT, StreamSize},
    shop::ShopSize,
};
use crate::{
    rng::Stream,
    scenario::{Tier, Verdict},
    world::Judgement,
};

/// The first day of a drawn story.
const FECHA: NaiveDate = NaiveDate::from_ymd_opt(2024, 3, 4).expect("a date");

fn run_at(date: NaiveDate) -> DateTime<Utc> {
    date.and_time(RUN_AT).and_utc()
}

fn short(summary: &str, seed: u64, days: u64, fault: Vec<Fault>) -> PlatformScenario {
    PlatformScenario {
        kind: Kind::Platform,
        summary: summary.into(),
        tier: Tier::Nightly,
        seeds: vec![seed],
        fecha: FECHA,
        days,
        sla: chrono::NaiveTime::from_hms_opt(6, 0, 0).unwrap_or_default(),
        models: "metricas_diarias".into(),
        drawn: Drawn::None,
        patience_h: 48,
        without: BTreeSet::new(),
        sabotage: None,
        shop: ShopSize { sales_per_day: 60, growth_percent: 100, customers: 80, products: 20 },
        orchestrator: LoopConfig::default(),
        stream: None,
        assets: BTreeMap::new(),
        fault,
        expect: PlatformExpect {
            verdict: Verdict::Holds,
            broken: Vec::new(),
            slos_met: Vec::new(),
            told: BTreeSet::new(),
            fired_min: 1,
            converges: false,
        },
    }
}

/// A story in which one fault of a mode comes on the third day.
pub fn story(mode: Mode, seed: u64) -> PlatformScenario {
    let date = FECHA + Days::new(2);
    let mut random = Stream::root(seed).child("detection").child(mode.entry().name);
    let fault = Fault::draw(mode, date, run_at(date), &mut random);
    let story = short("how long it takes until somebody is told", seed, 3, vec![fault]);
    let stream = mode.entry().needs_stream.then(|| StreamSize { events_per_day: 2_000, ..StreamSize::standard() });
    PlatformScenario { stream, ..story }
}

/// What came of the runs of one mode.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Row {
    /// Runs.
    pub runs: u64,
    /// Runs by what became of the fault.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// Delays of the alerts, in milliseconds.
    pub delays_ms: Vec<i64>,
    /// Alerts that no fault explains.
    pub false_alerts: u64,
    /// Runs that broke something else than that nobody was told, and the first of them.
    pub broken: Vec<String>,
}

impl Row {
    /// The delay that so many hundredths of the alerts do not exceed, in milliseconds; `None` without an alert.
    pub fn percentile(&self, hundredths: u64) -> Option<i64> {
        let mut sorted = self.delays_ms.clone();
        sorted.sort_unstable();
        let rank = (sorted.len() as u64 * hundredths).div_ceil(100).max(1);
        sorted.get(usize::try_from(rank).ok()? - 1).copied()
    }
}

/// The table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// By mode.
    pub rows: BTreeMap<Mode, Row>,
}

/// A time for people.
fn spoken(ms: i64) -> String {
    match ms {
        0..=999 => format!("{ms} ms"),
        1_000..=119_999 => format!("{} s", ms / 1_000),
        120_000..=7_199_999 => format!("{} min", ms / 60_000),
        _ => format!("{} h {} min", ms / 3_600_000, ms / 60_000 % 60),
    }
}

impl Table {
    /// Takes a run.
    pub fn add(&mut self, mode: Mode, seed: u64, judgement: &Judgement) {
        let row = self.rows.entry(mode).or_default();
        row.runs += 1;
        let Some(report) = &judgement.platform else { return };
        for struck in &report.faults {
            *row.outcomes.entry(struck.outcome).or_default() += 1;
            row.delays_ms.extend(struck.delay_ms);
        }
        row.false_alerts += report.false_alerts.len() as u64;
        let other = judgement.problems.iter().find(|p| !p.contains("alert_missed"));
        row.broken.extend(other.map(|problem| format!("{} seed {seed}: {problem}", mode.entry().name)));
    }

    /// Whether a run broke something else than that nobody was told.
    pub fn is_broken(&self) -> bool {
        self.rows.values().any(|row| !row.broken.is_empty())
    }

    /// As a page of documentation.
    pub fn markdown(&self, command: &str) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let mut line = |text: &str| {
            let _ = writeln!(out, "{text}");
        };
        line("# How long it takes until somebody is told\n");
        line("<!-- generated, do not edit; the command is in the text -->\n");
        line(&format!("Made by `{command}`. One simulated story of three days for each mode and seed: the production"));
        line(
            "orchestrator with its assets, one fault whose time and length the seed draws, an operator who acts on alerts alone.",
        );
        line(
            "A delay runs from the first effect that could be seen to the first alert that the fault explains, in virtual time.",
        );
        line("*Absorbed*: nothing was late or failed, and nobody was told. *Missed*: something was, and nobody was told.");
        line("*Unseen*: the fault struck nothing. All settings are those of production.\n");
        line("| # | mode | runs | unseen | absorbed | alerted | missed | p50 | p90 | max | target | later | false alerts |");
        line("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
        for (mode, row) in &self.rows {
            let entry = mode.entry();
            let of = |outcome: Outcome| row.outcomes.get(&outcome).copied().unwrap_or(0);
            let at = |hundredths| row.percentile(hundredths).map_or("-".to_owned(), spoken);
            let later = row.delays_ms.iter().filter(|ms| **ms > entry.target_s * 1_000).count();
            line(&format!(
                "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {later} | {} |",
                entry.failure,
                entry.name,
                row.runs,
                of(Outcome::Unseen),
                of(Outcome::Absorbed),
                of(Outcome::Alerted),
                of(Outcome::Missed),
                at(50),
                at(90),
                at(100),
                spoken(entry.target_s * 1_000),
                row.false_alerts
            ));
        }
        let broken: Vec<&String> = self.rows.values().flat_map(|row| &row.broken).collect();
        if !broken.is_empty() {
            line(&format!("\n{} runs broke an invariant:\n", broken.len()));
            for text in broken {
                line(&format!("- {text}"));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::{super::faults::CATALOGUE, *};

    #[test]
    fn a_percentile_is_a_delay_that_was_measured() {
        let row = |delays_ms: Vec<i64>| Row { delays_ms, ..Row::default() };
        assert_eq!(row(Vec::new()).percentile(50), None);
        assert_eq!(row(vec![7]).percentile(90), Some(7));
        let ten = row((1..=10).rev().collect());
        assert_eq!([50, 90, 100].map(|p| ten.percentile(p)), [Some(5), Some(9), Some(10)]);
    }

    #[test]
    fn stories_of_each_mode_are_stories() {
        for entry in CATALOGUE {
            let text = story(entry.mode, 3).to_toml().expect("text");
            PlatformScenario::parse(&text).expect("a story");
        }
    }
}
