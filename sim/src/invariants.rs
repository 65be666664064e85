//! The judges: what must hold at the end of a run, each by its own name.

use std::collections::{BTreeMap, BTreeSet};

use chrono::NaiveDate;
use simulacro_core::{batch::DayError, platform::DayOutcome, ports::RunState};

use crate::{oracle::Sales, scenario::Scenario};

/// What the judges look at.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The story.
    pub scenario: &'a Scenario,
    /// Runs in order.
    pub outcomes: &'a [DayOutcome],
    /// The mart as it is.
    pub mart: &'a BTreeMap<(NaiveDate, String), Sales>,
    /// The warehouse as it is.
    pub warehouse: &'a BTreeMap<(NaiveDate, String), Sales>,
    /// The mart as the oracle says.
    pub expected: &'a BTreeMap<(NaiveDate, String), Sales>,
    /// Rows that the source held when it was read, by day.
    pub delivered: &'a BTreeMap<NaiveDate, u64>,
    /// Days that the contract must hold, by the oracle.
    pub must_hold: &'a BTreeSet<NaiveDate>,
    /// Objects of the raw layer that belong to no manifest.
    pub leftovers: &'a [String],
}

/// One broken invariant: its name and what was seen.
pub type Broken = (&'static str, String);

/// Whether a run of this day was stopped by a gate, and none published it.
fn held(evidence: &Evidence<'_>, fecha: NaiveDate) -> bool {
    let of_day = || evidence.outcomes.iter().filter(|o| o.run.fecha == fecha);
    of_day().any(|o| matches!(o.result, Err(DayError::Held { .. }))) && of_day().all(|o| o.run.state != RunState::Succeeded)
}

/// Each day that is not held is published in time.
fn sla(evidence: &Evidence<'_>) -> Vec<Broken> {
    let mut broken = Vec::new();
    for fecha in evidence.scenario.fechas() {
        let due = evidence.scenario.sla(fecha);
        let of_day = evidence.outcomes.iter().filter(|o| o.run.fecha == fecha && o.run.state == RunState::Succeeded);
        let published = of_day.filter_map(|o| o.run.finished_at).min();
        if !held(evidence, fecha) && published.is_none_or(|at| at > due) {
            let found = published.map_or("never".to_owned(), |at| at.to_rfc3339());
            broken.push(("sla", format!("{fecha} was published {found}, expected by {}", due.to_rfc3339())));
        }
    }
    broken
}

/// The mart and the warehouse equal the oracle to the cent, for every day that was published, and show no other day.
fn money_exact(evidence: &Evidence<'_>) -> Vec<Broken> {
    let published =
        |fecha: &NaiveDate| evidence.outcomes.iter().any(|o| o.run.fecha == *fecha && o.run.state == RunState::Succeeded);
    let expected: BTreeMap<_, _> = evidence.expected.iter().filter(|((fecha, _), _)| published(fecha)).collect();
    let mut broken = Vec::new();
    for (name, found) in [("mart", evidence.mart), ("warehouse", evidence.warehouse)] {
        let found: BTreeMap<_, _> = found.iter().collect();
        if found != expected {
            let (key, found, wanted) = difference(&found, &expected);
            broken.push(("money_exact", format!("{name} at {key}: found {found}, the oracle expects {wanted}")));
        }
    }
    broken
}

fn difference(
    found: &BTreeMap<&(NaiveDate, String), &Sales>,
    expected: &BTreeMap<&(NaiveDate, String), &Sales>,
) -> (String, String, String) {
    let show = |sales: Option<&&Sales>| sales.map_or("nothing".to_owned(), |s| format!("{s:?}"));
    let keys = found.keys().chain(expected.keys());
    let first = keys.filter(|key| found.get(**key) != expected.get(**key)).min();
    first.map_or_else(Default::default, |key| (format!("{} {}", key.0, key.1), show(found.get(key)), show(expected.get(key))))
}

/// Each row that the source delivered has exactly one fate.
fn row_fate(evidence: &Evidence<'_>) -> Vec<Broken> {
    let reports = evidence.outcomes.iter().filter_map(|o| Some((o.run.fecha, o.result.as_ref().ok()?)));
    reports
        .filter_map(|(fecha, report)| {
            let (fates, delivered): (u64, _) =
                (report.fates.values().sum(), evidence.delivered.get(&fecha).copied().unwrap_or(0));
            (fates != delivered)
                .then(|| ("row_fate", format!("{fecha}: {delivered} rows delivered, {fates} fates: {:?}", report.fates)))
        })
        .collect()
}

/// The contract holds the days that it must hold, and no others.
fn held_rightly(evidence: &Evidence<'_>) -> Vec<Broken> {
    let of_day = |fecha| evidence.outcomes.iter().filter(move |o| o.run.fecha == fecha);
    let mut broken = Vec::new();
    for fecha in evidence.scenario.fechas() {
        let stopped = of_day(fecha).find_map(|o| match &o.result {
            Err(error @ DayError::Held { .. }) => Some(error.to_string()),
            _ => None,
        });
        match (evidence.must_hold.contains(&fecha), stopped) {
            (false, Some(why)) => broken.push(("held_rightly", format!("expected a good day, found: {why}"))),
            (true, _) if of_day(fecha).any(|o| o.run.state == RunState::Succeeded) => {
                broken.push(("held_rightly", format!("{fecha} was published, expected it to be held by its contract")));
            }
            _ => {}
        }
    }
    broken
}

/// Nothing that a dead attempt wrote can be seen.
fn no_leftovers(evidence: &Evidence<'_>) -> Vec<Broken> {
    evidence.leftovers.iter().map(|path| ("no_leftovers", format!("{path} belongs to no manifest"))).collect()
}

/// All judges, in alphabetical order of their names.
pub fn judge(evidence: &Evidence<'_>) -> Vec<Broken> {
    let mut broken: Vec<Broken> =
        [held_rightly, money_exact, no_leftovers, row_fate, sla].iter().flat_map(|judge| judge(evidence)).collect();
    broken.sort();
    broken
}
