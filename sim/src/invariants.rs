//! The judges: what must hold at the end of a run, each by its own name.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Duration, NaiveDate, Utc};
use simulacro_core::{
    batch::DayError,
    platform::DayOutcome,
    ports::{Run, RunState},
    restore::TABLE_LOST,
};

use crate::{
    faults::data::{self, Era},
    oracle::Sales,
    scenario::Scenario,
};

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
    /// Rows and cents of staging as it is, by day; `None` where it cannot be read.
    pub staged: Option<&'a BTreeMap<NaiveDate, (i64, i64)>>,
    /// The mart as the oracle says.
    pub expected: &'a BTreeMap<(NaiveDate, String), Sales>,
    /// The source from era to era: what it delivered, and which days the contract must hold.
    pub eras: &'a [Era],
    /// Objects of the raw layer that belong to no manifest.
    pub leftovers: &'a [String],
    /// Refusals of credentials: which, how often, and how often at most.
    pub refusals: &'a [(String, u64, u64)],
    /// When the dimension API really answered.
    pub answered: &'a [DateTime<Utc>],
    /// How long each run took as its gauge says, in seconds.
    pub gauged: &'a [Option<f64>],
}

/// One broken invariant: its name and what was seen.
pub type Broken = (&'static str, String);

/// The source as a run found it.
pub fn found<'a>(eras: &'a [Era], run: &Run) -> &'a Era {
    data::at(eras, run.finished_at.unwrap_or(run.started_at))
}

/// Whether a gate of the contract stopped a run; a dimension that is too old and a table that is gone are not the contract's
/// business.
fn by_contract(outcome: &DayOutcome) -> Option<String> {
    match &outcome.result {
        Err(error @ DayError::Held { gate, .. }) if !["dimensions_fresh", TABLE_LOST].contains(gate) => Some(error.to_string()),
        _ => None,
    }
}

/// Whether a run of this day was stopped by a gate, and none published it.
fn held(evidence: &Evidence<'_>, fecha: NaiveDate) -> bool {
    let of_day = || evidence.outcomes.iter().filter(|o| o.run.fecha == fecha);
    of_day().any(|o| by_contract(o).is_some()) && of_day().all(|o| o.run.state != RunState::Succeeded)
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
    let mut broken = Vec::new();
    for outcome in evidence.outcomes {
        let (fecha, Ok(report)) = (outcome.run.fecha, &outcome.result) else { continue };
        let delivered = found(evidence.eras, &outcome.run).rows.iter().filter(|r| r.fecha == fecha).count() as u64;
        let fates: u64 = report.fates.values().sum();
        if fates != delivered {
            let fates = format!("{fecha}: {delivered} rows delivered, {fates} fates: {:?}", report.fates);
            broken.push(("row_fate", fates));
        }
    }
    broken
}

/// The contract holds the days that it must hold as they were delivered, and no others.
fn held_rightly(evidence: &Evidence<'_>) -> Vec<Broken> {
    let mut broken = Vec::new();
    for outcome in evidence.outcomes {
        let fecha = outcome.run.fecha;
        match (found(evidence.eras, &outcome.run).must_hold.contains(&fecha), by_contract(outcome)) {
            (false, Some(why)) => broken.push(("held_rightly", format!("expected a good day, found: {why}"))),
            (true, None) if outcome.run.state == RunState::Succeeded => {
                broken.push(("held_rightly", format!("{fecha} was published, expected it to be held by its contract")));
            }
            (true | false, _) => {}
        }
    }
    broken
}

/// Nothing that a dead attempt wrote can be seen.
fn no_leftovers(evidence: &Evidence<'_>) -> Vec<Broken> {
    evidence.leftovers.iter().map(|path| ("no_leftovers", format!("{path} belongs to no manifest"))).collect()
}

/// Who watches the gauges sees how long a run took, as the ledger has it.
fn measured(evidence: &Evidence<'_>) -> Vec<Broken> {
    let differs = |(outcome, found): (&DayOutcome, &Option<f64>)| {
        let Run { fecha, started_at, finished_at, .. } = outcome.run;
        let seconds = (finished_at? - started_at).num_milliseconds() as f64 / 1_000.0;
        (*found != Some(seconds)).then(|| ("measured", format!("{fecha}: the gauge says {found:?} s, the ledger {seconds} s")))
    };
    evidence.outcomes.iter().zip(evidence.gauged).filter_map(differs).collect()
}

/// Credentials that are refused are not tried again and again: that locks accounts.
fn logins(evidence: &Evidence<'_>) -> Vec<Broken> {
    let too_many = evidence.refusals.iter().filter(|(_, found, most)| found > most);
    too_many.map(|(which, found, most)| ("logins", format!("{which}: refused {found} times, expected at most {most}"))).collect()
}

/// A dimension that a day was enriched with is at most a day old, its age is what the API last said, and an old one is told.
fn dimensions_fresh(evidence: &Evidence<'_>) -> Vec<Broken> {
    let mut broken = Vec::new();
    for outcome in evidence.outcomes {
        let Ok(report) = &outcome.result else { continue };
        let at = outcome.run.finished_at.unwrap_or(outcome.run.started_at);
        for used in &report.dimensions {
            let (name, confirmed) = (used.dimension, used.confirmed_at);
            let really = |a: &DateTime<Utc>| *a <= confirmed && confirmed - *a <= Duration::minutes(2);
            if !evidence.answered.iter().any(really) {
                let text = format!("{}: {name} is said to be of {confirmed}, when the API did not answer", outcome.run.fecha);
                broken.push(("dimensions_fresh", text));
            }
            let told = report.stale_dimensions.iter().any(|s| s.dimension == used.dimension);
            let age = at - confirmed;
            if age > Duration::hours(24) + Duration::minutes(10) || (age > Duration::hours(6) + Duration::minutes(10) && !told) {
                let text = format!("{}: {name} is {} minutes old, told: {told}", outcome.run.fecha, age.num_minutes());
                broken.push(("dimensions_fresh", text));
            }
        }
    }
    broken
}

/// Staging has each published day, with as many rows and cents as the oracle says of the mart.
fn staged_exact(evidence: &Evidence<'_>) -> Vec<Broken> {
    let published: BTreeSet<NaiveDate> =
        evidence.outcomes.iter().filter(|o| o.run.state == RunState::Succeeded).map(|o| o.run.fecha).collect();
    let mut expected: BTreeMap<NaiveDate, (i64, i64)> = BTreeMap::new();
    for ((fecha, _), sales) in evidence.expected.iter().filter(|((fecha, _), _)| published.contains(fecha)) {
        let day = expected.entry(*fecha).or_default();
        *day = (day.0 + sales.transacciones, day.1 + sales.revenue_cents);
    }
    let Some(staged) = evidence.staged else {
        let lost = expected.keys().next().map(|fecha| format!("cannot be read, the oracle expects {fecha} and later days"));
        return lost.into_iter().map(|text| ("staged_exact", text)).collect();
    };
    let differs = |(fecha, wanted): (&NaiveDate, &(i64, i64))| {
        let found = staged.get(fecha).copied().unwrap_or_default();
        (found != *wanted).then(|| {
            let text = format!(
                "{fecha}: found {} rows and {} cents, the oracle expects {} and {}",
                found.0, found.1, wanted.0, wanted.1
            );
            ("staged_exact", text)
        })
    };
    expected.iter().filter_map(differs).collect()
}

/// All judges, in alphabetical order of their names.
pub fn judge(evidence: &Evidence<'_>) -> Vec<Broken> {
    let judges = [dimensions_fresh, held_rightly, logins, measured, money_exact, no_leftovers, row_fate, sla, staged_exact];
    let mut broken: Vec<Broken> = judges.iter().flat_map(|judge| judge(evidence)).collect();
    broken.sort();
    broken.dedup();
    broken
}

/// Rows and cents by which what is shown differs from what is right, for days that were published.
pub fn wrong(evidence: &Evidence<'_>) -> (u64, u64) {
    let published: BTreeSet<NaiveDate> =
        evidence.outcomes.iter().filter(|o| o.run.state == RunState::Succeeded).map(|o| o.run.fecha).collect();
    let keys: BTreeSet<&(NaiveDate, String)> = evidence.warehouse.keys().chain(evidence.expected.keys()).collect();
    let none = Sales::default();
    keys.into_iter().filter(|(fecha, _)| published.contains(fecha)).fold((0, 0), |(rows, cents), key| {
        let (found, right) = (evidence.warehouse.get(key).unwrap_or(&none), evidence.expected.get(key).unwrap_or(&none));
        let (more, money) = (found.transacciones - right.transacciones, found.revenue_cents - right.revenue_cents);
        (rows + more.unsigned_abs(), cents + money.unsigned_abs())
    })
}
