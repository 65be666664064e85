//! The judges of a platform story: what must hold at its end, each by its own name.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use simulacro_core::{
    batch::DayReport,
    ports::{Alert, Run, RunState},
    slo::Standing,
};

use super::{
    faults::{self, Mode, Suffered},
    oracle::{self, Mart},
    report::{Outcome, Report, Struck},
    scenario::PlatformScenario,
    shop::Shop,
    stream, stream_judges,
};

/// One broken invariant: its name and what was seen.
pub type Broken = (&'static str, String);

/// A dimension may be so old when a day is enriched with it, the run's own time included.
const DIMENSION_AGE_MAX: TimeDelta = TimeDelta::hours(25);

/// What the judges look at.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The story.
    pub story: &'a PlatformScenario,
    /// The shop.
    pub shop: &'a Shop,
    /// Runs of the daily batch.
    pub runs: &'a [Run],
    /// Runs of every other asset.
    pub others: &'a [Run],
    /// The mart as it is.
    pub mart: &'a Mart,
    /// The warehouse as it is.
    pub warehouse: &'a Mart,
    /// Alerts that were raised.
    pub raised: &'a [(DateTime<Utc>, Alert)],
    /// Keys of the incidents that are open at the end.
    pub open: &'a BTreeSet<String>,
    /// Tables of the story's models that are not there at the end.
    pub unmade: &'a [String],
    /// Assets whose circuit breaker is not closed at the end.
    pub shut_out: &'a [String],
    /// The faults.
    pub faults: &'a [Suffered],
    /// What was made of them.
    pub report: &'a Report,
    /// What came of the stream, when there is one.
    pub stream: Option<&'a stream::Outcome>,
}

/// The last success of each day, with its report.
fn published(runs: &[Run]) -> BTreeMap<NaiveDate, (&Run, DayReport)> {
    let good = runs.iter().filter(|r| r.state == RunState::Succeeded);
    good.filter_map(|r| Some((r.fecha, (r, serde_json::from_value(r.report.clone()).ok()?)))).collect()
}

/// When each day was first published.
pub fn first_published(runs: &[Run]) -> BTreeMap<NaiveDate, DateTime<Utc>> {
    let mut out = BTreeMap::new();
    for run in runs.iter().filter(|r| r.state == RunState::Succeeded) {
        if let Some(at) = run.finished_at {
            let first = out.entry(run.fecha).or_insert(at);
            *first = at.min(*first);
        }
    }
    out
}

/// The mart as the oracle says, from when each day's customers were read.
pub fn expected(shop: &Shop, runs: &[Run]) -> Mart {
    let mut out = Mart::new();
    for (fecha, (run, report)) in published(runs) {
        let of_customers = report.dimensions.iter().find(|d| d.dimension.name() == "clientes");
        out.extend(oracle::day(shop, fecha, of_customers.map_or(run.started_at, |d| d.confirmed_at)));
    }
    out
}

/// Mart and warehouse equal the oracle to the cent, for every day that was published, and show no other day.
fn money_exact(evidence: &Evidence<'_>) -> Vec<Broken> {
    let expected = expected(evidence.shop, evidence.runs);
    let mut broken = Vec::new();
    for (name, found) in [("mart", evidence.mart), ("warehouse", evidence.warehouse)] {
        let keys: BTreeSet<_> = found.keys().chain(expected.keys()).collect();
        let other = keys.into_iter().find(|key| found.get(*key) != expected.get(*key));
        if let Some(key) = other {
            let (found, wanted) = (found.get(key), expected.get(key));
            broken.push(("money_exact", format!("{name} at {key:?}: found {found:?}, the oracle expects {wanted:?}")));
        }
    }
    broken
}

/// Each row that the source delivered has exactly one fate, and those that the business rejects are those of the oracle.
fn row_fate(evidence: &Evidence<'_>) -> Vec<Broken> {
    let mut broken = Vec::new();
    for (fecha, (_, report)) in published(evidence.runs) {
        let fates: u64 = report.fates.values().sum();
        let of = |fate: &str| report.fates.get(fate).copied().unwrap_or(0);
        let sold = evidence.shop.sales(fecha).len() as u64;
        let twice = of("deduplicated");
        let (rejected, wanted) = (of("rejected"), oracle::rejected(evidence.shop, fecha));
        // A sale of nothing that came twice is rejected twice.
        let balances = fates == report.expected && report.expected >= sold && of("published") == sold - wanted;
        let rejects = rejected >= wanted && rejected + of("published") + twice == report.expected;
        if !balances || !rejects {
            broken.push(("row_fate", format!("{fecha}: {sold} sold, {} delivered, fates {:?}", report.expected, report.fates)));
        }
    }
    broken
}

/// Whether something of this fault kept the run of a day from being in time.
fn excuses(suffered: &Suffered, story: &PlatformScenario, fecha: NaiveDate) -> bool {
    suffered.first_hit.is_some() && suffered.fault.from < story.due(fecha) && suffered.over() > story.scheduled(fecha)
}

/// Each day is published, and in time unless a fault that was there at its run excuses it.
fn sla(evidence: &Evidence<'_>) -> Vec<Broken> {
    let (story, published) = (evidence.story, first_published(evidence.runs));
    let mut broken = Vec::new();
    for fecha in story.fechas() {
        match published.get(&fecha) {
            None => broken.push(("published", format!("{fecha} was never published"))),
            Some(at) if *at > story.due(fecha) && !evidence.faults.iter().any(|f| excuses(f, story, fecha)) => {
                broken.push(("sla", format!("{fecha} was published {at}, expected by {}", story.due(fecha))));
            }
            Some(_) => {}
        }
    }
    broken
}

/// Every alert has a fault that explains it, and every fault that was not absorbed has its alert.
fn alerts(evidence: &Evidence<'_>) -> Vec<Broken> {
    let mut broken: Vec<Broken> =
        evidence.report.false_alerts.iter().map(|a| ("false_alert", format!("{a}: no fault explains it"))).collect();
    for fault in evidence.report.faults.iter().filter(|f| f.outcome == Outcome::Missed) {
        let (name, first) = (fault.entry().name, fault.first_hit);
        broken.push(("alert_missed", format!("{name} of {}: seen {first:?}, nobody was told", fault.from)));
    }
    broken
}

/// Of the modes that the story names somebody was told whenever they struck, by an alert that they explain.
fn told(evidence: &Evidence<'_>) -> Vec<Broken> {
    let wanted = |fault: &&Struck| evidence.story.expect.told.contains(&fault.mode);
    let untold = |fault: &&Struck| !matches!(fault.outcome, Outcome::Unseen | Outcome::Alerted);
    let faults = evidence.report.faults.iter().filter(wanted).filter(untold);
    let broken = faults.map(|fault| {
        let (name, kinds) = (fault.entry().name, fault.entry().alerts.join(", "));
        format!("{name} of {}: seen {:?}, expected one of {kinds}", fault.from, fault.first_hit)
    });
    broken.map(|text| ("told", text)).collect()
}

/// What was open is closed at the end, but for news.
fn incidents_closed(evidence: &Evidence<'_>) -> Vec<Broken> {
    let open = evidence.open.iter().filter(|key| !key.starts_with("schedule_missed"));
    open.map(|key| ("incidents_closed", format!("{key} is open at the end"))).collect()
}

/// Each model that the story has was made.
fn models_made(evidence: &Evidence<'_>) -> Vec<Broken> {
    let unmade = evidence.unmade.iter();
    unmade
        .map(|table| ("models_made", format!("{table} is not there, expected it of models {}", evidence.story.models)))
        .collect()
}

/// What fails no more is tried as before: no breaker stays open, or waits for a trial, behind an asset whose last run succeeded.
fn breakers_closed(evidence: &Evidence<'_>) -> Vec<Broken> {
    let last = |asset: &str| {
        let runs = evidence.runs.iter().chain(evidence.others).filter(|run| run.pipeline == asset);
        runs.max_by_key(|run| run.started_at).map(|run| run.state)
    };
    let open = evidence.shut_out.iter().filter(|asset| last(asset) == Some(RunState::Succeeded));
    open.map(|asset| ("breakers_closed", format!("{asset} has succeeded, and its breaker is not closed"))).collect()
}

/// No day was enriched with a dimension that is too old, and none with a stale one unmarked.
fn staleness(evidence: &Evidence<'_>) -> Vec<Broken> {
    let mut broken = Vec::new();
    for (fecha, (run, report)) in published(evidence.runs) {
        for used in &report.dimensions {
            let age = run.started_at - used.confirmed_at;
            if age > DIMENSION_AGE_MAX {
                broken.push(("staleness", format!("{fecha}: {} was {} h old", used.dimension, age.num_hours())));
            }
            let is_marked = report.stale_dimensions.iter().any(|s| s.dimension == used.dimension);
            // Products are fresh for six hours; the clock may be off by one more.
            if age > TimeDelta::hours(7) && !is_marked {
                let hours = age.num_hours();
                broken.push(("staleness", format!("{fecha}: {} was {hours} h old, and is not marked", used.dimension)));
            }
        }
    }
    broken
}

/// The objectives that the story names are met over all of it.
fn slos(evidence: &Evidence<'_>) -> Vec<Broken> {
    let wanted = &evidence.story.expect.slos_met;
    let missed = |name: &&String| !evidence.report.slos.iter().any(|s| s.name == **name && s.standing == Standing::Met);
    wanted.iter().filter(missed).map(|name| ("slos_met", format!("{name} is not met"))).collect()
}

/// A password that has expired is not tried until the account is locked.
fn few_logins(evidence: &Evidence<'_>) -> Vec<Broken> {
    /// One for the sensor, and one for each of the two rounds of retries.
    const LOGINS_MAX: u64 = 3;
    let expired = evidence.faults.iter().filter(|f| f.fault.mode == Mode::PasswordExpired && f.hits > LOGINS_MAX);
    expired.map(|f| ("few_logins", format!("{} logins with the password that expired {}", f.hits, f.fault.from))).collect()
}

/// All judges, in order of the invariants' names.
pub fn judge(evidence: &Evidence<'_>) -> Vec<Broken> {
    let judges =
        [alerts, breakers_closed, few_logins, incidents_closed, models_made, money_exact, row_fate, sla, slos, staleness, told];
    let mut broken: Vec<Broken> = judges.iter().flat_map(|judge| judge(evidence)).collect();
    broken.extend(evidence.stream.into_iter().flat_map(|stream| stream_judges::judge(evidence.story, stream)));
    broken.sort();
    broken
}

/// Alerts that no fault explains.
pub fn unexplained(raised: &[(DateTime<Utc>, Alert)], faults: &[Suffered]) -> Vec<String> {
    let alone = raised.iter().filter(|(at, alert)| !faults.iter().any(|f| f.explains(&alert.kind, *at)));
    alone.map(|(at, alert)| format!("{} {}: {}", at.format("%Y-%m-%d %H:%M:%S"), alert.kind, alert.summary)).collect()
}

/// What became of each fault.
pub fn struck(
    story: &PlatformScenario,
    suffering: &[Suffered],
    raised: &[(DateTime<Utc>, Alert)],
    runs: &[Run],
    others: &[Run],
) -> Vec<Struck> {
    let published = first_published(runs);
    let told_of = |suffered: &Suffered| raised.iter().find(|(at, alert)| suffered.explains(&alert.kind, *at));
    let one = |suffered: &Suffered| {
        let (from, over) = (suffered.fault.from, suffered.over());
        let told = told_of(suffered);
        // What another fault has done, of which somebody was told, is not this one's.
        let others_at = |at: DateTime<Utc>| {
            let is_other = |o: &&Suffered| o.fault != suffered.fault && o.fault.from <= at && at <= o.over() + faults::AFTERMATH;
            suffering.iter().filter(is_other).any(|o| told_of(o).is_some())
        };
        // Late days, and turns that ended badly while it was there.
        let at_risk = |fecha: &NaiveDate| {
            let scheduled = story.scheduled(*fecha);
            (from..over).contains(&scheduled) && !others_at(scheduled)
        };
        let late = story.fechas().filter(at_risk).any(|f| published.get(&f).is_none_or(|at| *at > story.due(f)));
        let within =
            |run: &&Run| run.started_at < over && run.finished_at.is_none_or(|end| end >= from) && !others_at(run.started_at);
        let bad = runs.iter().chain(others).filter(within).any(|run| match run.state {
            RunState::Held => true,
            RunState::Failed => run.report["final"] == true,
            RunState::Running | RunState::Succeeded | RunState::Skipped => false,
        });
        let outcome = match (suffered.first_hit, told, late || bad) {
            (None, ..) => Outcome::Unseen,
            (Some(_), Some(_), _) => Outcome::Alerted,
            (Some(_), None, true) => Outcome::Missed,
            (Some(_), None, false) => Outcome::Absorbed,
        };
        let delay_ms = suffered.first_hit.zip(told).map(|(hit, (at, _))| (*at - hit).num_milliseconds());
        Struck {
            mode: suffered.fault.mode,
            from,
            over,
            hits: suffered.hits,
            first_hit: suffered.first_hit,
            alert: told.map(|(_, alert)| alert.kind.clone()),
            delay_ms,
            outcome,
        }
    };
    suffering.iter().map(one).collect()
}
