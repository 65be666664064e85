//! Samples of the objectives, from the ledger alone: its runs, the outcomes of checks, and the days that were reconciled.
//!
//! A day is due at a time of the next day. What had been published by then counts, what came later does not: a sample is
//! what a consumer met. Days that were due before the first run began are no days of this platform: a history that is filled
//! in later was promised to nobody.

use std::collections::BTreeMap;

use chrono::{DateTime, Days, NaiveDate, NaiveTime, Timelike, Utc};
use serde::{Deserialize, Serialize};

use super::{Fraction, Measured, Sample};
use crate::{
    batch::DayReport,
    contract::check::QualityResult,
    ports::{Fact, PortError, Result, Run, RunState},
};

/// One sample of `mart_age_seconds` and one of `rows_accounted_share` for each day that was due up to `now`.
///
/// The age is that of the newest success before the time at which the day was due; without one the sample is missing. Rows
/// are accounted for when the day was published and they were published, deduplicated or rejected by a business rule;
/// quarantined rows are not.
pub fn of_runs(runs: &[Run], due: NaiveTime, now: DateTime<Utc>) -> Vec<Sample> {
    let Some(began) = runs.iter().map(|run| run.started_at).min() else { return Vec::new() };
    // The first day that is due after that.
    let today = began.date_naive();
    let first = if due_at(today - Days::new(1), due) >= began { today - Days::new(1) } else { today };
    let succeeded = |run: &&Run| run.state == RunState::Succeeded;
    let mut out = Vec::new();
    let mut fecha = first;
    loop {
        let at = due_at(fecha, due);
        if at > now {
            return out;
        }
        let before = || runs.iter().filter(succeeded).filter(|run| run.finished_at.is_some_and(|end| end <= at));
        let newest = before().filter_map(|run| run.finished_at).max();
        let age =
            newest.map_or(Measured::Missing, |end| Measured::Value(Fraction::whole((at - end).num_seconds().unsigned_abs())));
        out.push(Sample { name: "mart_age_seconds".into(), at, value: age });
        let of_day = before().filter(|run| run.fecha == fecha).max_by_key(|run| run.epoch);
        let accounted = of_day.map_or(Measured::Missing, accounted);
        out.push(Sample { name: "rows_accounted_share".into(), at, value: accounted });
        fecha = fecha + Days::new(1);
    }
}

/// Name of the monitor's check of the lag.
pub const LAG_CHECK: &str = "streaming_lag";
/// Topic of the facts that stand for looks of the stream's monitor; their names are days.
pub const LOOKS: &str = "streaming_looks";

/// Looks of one day that went well and are no runs any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looks {
    /// How many there were, by hour and by lag in whole seconds, rounded down: one below a whole second stays below it.
    pub by_hour: BTreeMap<u32, BTreeMap<u64, u64>>,
    /// Looks that were skipped.
    pub skipped: u64,
}

/// When a look was due.
pub fn look_at(run: &Run) -> DateTime<Utc> {
    run.scheduled_at.unwrap_or(run.started_at)
}

impl Looks {
    /// Reads a day.
    ///
    /// # Errors
    /// `Permanent` for a fact that is none.
    pub fn read(fact: &Fact) -> Result<Self> {
        let failed = |e| PortError::permanent(format!("read the looks of {}", fact.name)).because(e);
        serde_json::from_value(fact.value.clone()).map_err(failed)
    }

    /// Counts a look, if it is one of those that need not stay; says whether it is.
    pub fn add(&mut self, run: &Run) -> bool {
        match run.state {
            RunState::Skipped => self.skipped += 1,
            RunState::Succeeded => {
                let Some(ms) = run.report["lag_ms"].as_u64() else { return false };
                *self.by_hour.entry(look_at(run).hour()).or_default().entry(ms / 1_000).or_default() += 1;
            }
            RunState::Failed | RunState::Held | RunState::Running => return false,
        }
        true
    }

    /// Adds those of the same day.
    pub fn merge(&mut self, other: &Self) {
        self.skipped += other.skipped;
        for (hour, lags) in &other.by_hour {
            for (seconds, looks) in lags {
                *self.by_hour.entry(*hour).or_default().entry(*seconds).or_default() += looks;
            }
        }
    }

    /// The samples, as if each look had been the last of its hour.
    fn samples(&self, day: NaiveDate) -> Vec<Sample> {
        let of_hour = |(hour, lags): (&u32, &BTreeMap<u64, u64>)| {
            let at = day.and_hms_opt(*hour, 59, 0).map_or(DateTime::UNIX_EPOCH, |at| at.and_utc());
            let sample = |(seconds, times): (&u64, &u64)| Sample {
                name: "stream_lag_seconds".into(),
                at,
                value: Measured::Repeated { value: Fraction::whole(*seconds), times: *times },
            };
            lags.iter().map(sample).collect::<Vec<_>>()
        };
        self.by_hour.iter().flat_map(of_hour).collect()
    }
}

/// One sample of `stream_lag_seconds` for each look of the stream's monitor that has ended, at the time at which it was due;
/// and those that facts stand for.
///
/// A look that was held for the lag found one above the monitor's limit, and one that failed found nothing out: both are
/// missing. Looks that were held for something else, and those that were skipped, because nobody was there to look or
/// somebody paused them, are no samples.
pub fn of_monitor(runs: &[Run], looks: &[Fact]) -> Vec<Sample> {
    let sample = |run: &Run| {
        let value = match run.state {
            RunState::Succeeded => run.report["lag_ms"]
                .as_u64()
                .map_or(Measured::Missing, |ms| Measured::Value(Fraction { numerator: ms, denominator: 1_000 })),
            RunState::Held => match run.report["checks"].as_array() {
                Some(checks) if checks.iter().all(|check| check != LAG_CHECK) => return None,
                Some(_) | None => Measured::Missing,
            },
            RunState::Failed if run.report["final"] == true => Measured::Missing,
            RunState::Failed | RunState::Running | RunState::Skipped => return None,
        };
        Some(Sample { name: "stream_lag_seconds".into(), at: look_at(run), value })
    };
    let folded = looks.iter().filter_map(|fact| Some(Looks::read(fact).ok()?.samples(fact.name.parse().ok()?)));
    runs.iter().filter_map(sample).chain(folded.flatten()).collect()
}

/// One sample of `checks_passed` for a day whose checks are these, in order of time; none without a check.
///
/// It says what was so when the day was due: a check that was run again counts as it had ended last by then, and a repair
/// that came later changes nothing. Where nothing had been checked by then, each check counts as it ended first.
pub fn of_checks(fecha: NaiveDate, due: NaiveTime, results: &[QualityResult]) -> Option<Sample> {
    let at = due_at(fecha, due);
    let outcome = |r: &'_ QualityResult| ((r.asset.clone(), r.check.clone()), r.passed);
    let mut outcomes: BTreeMap<(String, String), bool> = results.iter().filter(|r| r.checked_at <= at).map(outcome).collect();
    if outcomes.is_empty() {
        // The earliest comes last here, and stays.
        outcomes = results.iter().rev().map(outcome).collect();
    }
    let good = outcomes.values().filter(|passed| **passed).count() as u64;
    let value = Measured::Counts { good, total: outcomes.len() as u64 };
    (!outcomes.is_empty()).then(|| Sample { name: "checks_passed".into(), at, value })
}

/// What is kept of a day that was reconciled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconciled {
    /// Cents of the batch.
    pub batch: i64,
    /// Cents of the stream.
    pub stream: i64,
    /// Cents that no evidence explains, without regard to their sign; `None` in a ledger of before.
    #[serde(default)]
    pub unexplained: Option<u64>,
}

/// Topic of the facts of reconciled days; their names are the days.
pub const RECONCILED: &str = "reconciliation";

/// One sample of `revenue_difference_share` for each day that was reconciled, at the time at which it was due.
pub fn of_reconciled(facts: &[Fact], due: NaiveTime) -> Vec<Sample> {
    let sample = |fact: &Fact| {
        let fecha: NaiveDate = fact.name.parse().ok()?;
        let kept: Reconciled = serde_json::from_value(fact.value.clone()).ok()?;
        // Without any revenue of the batch there is no share: bad, unless the stream has none either.
        let value = match (u64::try_from(kept.batch), kept.batch.abs_diff(kept.stream)) {
            (Ok(denominator @ 1..), numerator) => Measured::Value(Fraction { numerator, denominator }),
            (_, 0) => Measured::Value(Fraction::whole(0)),
            _ => Measured::Missing,
        };
        Some(Sample { name: "revenue_difference_share".into(), at: due_at(fecha, due), value })
    };
    facts.iter().filter_map(sample).collect()
}

/// When a day is due.
pub fn due_at(fecha: NaiveDate, due: NaiveTime) -> DateTime<Utc> {
    (fecha + Days::new(1)).and_time(due).and_utc()
}

fn accounted(run: &Run) -> Measured {
    let Ok(report) = serde_json::from_value::<DayReport>(run.report.clone()) else { return Measured::Missing };
    let good = ["published", "deduplicated", "rejected"].iter().filter_map(|fate| report.fates.get(*fate)).sum();
    match report.expected {
        0 => Measured::Missing,
        expected => Measured::Value(Fraction { numerator: good, denominator: expected }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::slo::{Objective, Standing, evaluate};

    fn run(day: u32, end: &str, state: RunState, quarantined: u64) -> Run {
        let fecha = NaiveDate::from_ymd_opt(2024, 3, day).expect("a date");
        let finished_at: DateTime<Utc> = end.parse().expect("a time");
        let report = DayReport {
            expected: 100,
            fates: [("published".to_owned(), 100 - quarantined), ("quarantined".to_owned(), quarantined)].into(),
            ..DayReport::default()
        };
        Run {
            pipeline: "p".into(),
            fecha,
            epoch: 1,
            run_id: "r".into(),
            state,
            fence: None,
            scheduled_at: None,
            started_at: finished_at,
            finished_at: Some(finished_at),
            report: serde_json::to_value(report).expect("JSON"),
        }
    }

    #[test]
    fn a_history_that_is_filled_in_later_was_promised_to_nobody() {
        let due = NaiveTime::from_hms_opt(6, 0, 0).expect("a time");
        let runs = [run(1, "2026-11-24T12:00:00Z", RunState::Succeeded, 0)];
        let at = |text: &str| text.parse::<DateTime<Utc>>().expect("a time");
        assert_eq!(of_runs(&runs, due, at("2026-11-25T05:59:59Z")), []);
        assert_eq!(of_runs(&runs, due, at("2026-11-25T06:00:00Z")).len(), 2);
    }

    #[test]
    fn checks_count_as_they_ended_last_and_reconciled_days_by_their_difference() {
        let due = NaiveTime::from_hms_opt(6, 0, 0).expect("a time");
        let fecha = NaiveDate::from_ymd_opt(2024, 3, 1).expect("a date");
        let at = |name: &str, passed, checked_at| QualityResult {
            check: name.into(),
            layer: "marts".into(),
            asset: "metricas_diarias".into(),
            fecha,
            severity: crate::contract::Severity::Error,
            passed,
            observed: String::new(),
            expected: String::new(),
            failing_rows: 0,
            checked_at,
        };
        let check = |name: &str, passed| at(name, passed, due_at(fecha, due));
        let sample = of_checks(fecha, due, &[check("a", false), check("b", true), check("a", true), check("c", false)]);
        assert_eq!(sample.expect("checks").value, Measured::Counts { good: 2, total: 3 });
        assert_eq!(of_checks(fecha, due, &[]), None);
        // A repair after the day was due changes nothing of what was so then.
        let late = due_at(fecha, due) + chrono::TimeDelta::seconds(1);
        let sample = of_checks(fecha, due, &[check("a", false), check("b", true), at("a", true, late), at("c", true, late)]);
        assert_eq!(sample.expect("checks").value, Measured::Counts { good: 1, total: 2 });
        // Nothing had been checked by then: the first outcomes count.
        let sample = of_checks(fecha, due, &[at("a", false, late), at("b", true, late), at("a", true, late)]);
        assert_eq!(sample.expect("checks").value, Measured::Counts { good: 1, total: 2 });
        let fact = |batch, stream| Fact {
            topic: RECONCILED.into(),
            name: fecha.to_string(),
            value: serde_json::to_value(Reconciled { batch, stream, unexplained: Some(0) }).expect("JSON"),
            at: due_at(fecha, due),
        };
        let value = |batch, stream| of_reconciled(&[fact(batch, stream)], due)[0].value;
        assert_eq!(value(1_000, 971), Measured::Value(Fraction { numerator: 29, denominator: 1_000 }));
        assert_eq!((value(0, 0), value(0, 5)), (Measured::Value(Fraction::whole(0)), Measured::Missing));
    }

    #[test]
    fn a_look_of_the_monitor_is_a_sample_of_the_lag_unless_nobody_looked() {
        let look = |state, report: serde_json::Value| {
            let run = run(1, "2024-03-01T12:00:00Z", state, 0);
            of_monitor(&[Run { report, ..run }], &[]).first().map(|sample| sample.value)
        };
        let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
        let lag = Measured::Value(Fraction { numerator: 61_500, denominator: 1_000 });
        assert_eq!(look(RunState::Succeeded, json(r#"{"lag_ms":61500}"#)), Some(lag));
        assert_eq!(look(RunState::Held, json(r#"{"final":true}"#)), Some(Measured::Missing));
        assert_eq!(look(RunState::Held, json(r#"{"checks":["streaming_lag","other"]}"#)), Some(Measured::Missing));
        assert_eq!(look(RunState::Held, json(r#"{"checks":["other"]}"#)), None);
        assert_eq!(look(RunState::Failed, json(r#"{"final":true}"#)), Some(Measured::Missing));
        assert_eq!(look(RunState::Failed, json(r#"{"final":false}"#)), None);
        assert_eq!(look(RunState::Skipped, json("{}")), None);
    }

    #[test]
    fn looks_that_are_folded_count_as_before() {
        let looks: Vec<Run> = (0..180)
            .map(|minute: i64| {
                let at = due_at(NaiveDate::default(), NaiveTime::MIN) + chrono::TimeDelta::minutes(minute);
                // Every tenth is above the objective, at its very bound.
                let report = serde_json::json!({ "lag_ms": if minute % 10 == 0 { 120_000 } else { 119_999 - minute } });
                Run { scheduled_at: Some(at), report, ..run(1, "2024-03-02T03:45:00Z", RunState::Succeeded, 0) }
            })
            .collect();
        let (mut folded, mut more) = (Looks::default(), Looks::default());
        assert!(looks[..100].iter().all(|run| folded.add(run)) && looks[100..].iter().all(|run| more.add(run)));
        let skipped = Run { state: RunState::Skipped, ..looks[0].clone() };
        assert!(folded.add(&skipped) && !folded.add(&Run { state: RunState::Held, ..skipped.clone() }));
        folded.merge(&more);
        assert_eq!(folded.skipped, 1);
        let value = serde_json::to_value(&folded).expect("JSON");
        assert!(value.to_string().len() < 200, "{value}");
        let (topic, name, at) = (LOOKS.to_owned(), look_at(&looks[0]).date_naive().to_string(), look_at(&looks[0]));
        let facts = [Fact { topic, name, value, at }];
        let objectives = Objective::shipped().expect("objectives");
        let freshness = objectives.iter().find(|o| o.name == "streaming_freshness").expect("it ships");
        let now = look_at(&looks[0]) + chrono::TimeDelta::hours(5);
        let of = |samples: Vec<Sample>| {
            let status = freshness.evaluate(&samples, now);
            (status.good, status.total)
        };
        assert_eq!((of(of_monitor(&looks, &[])), of(of_monitor(&[], &facts))), ((162, 180), (162, 180)));
    }

    #[test]
    fn a_day_that_came_after_it_was_due_is_bad_for_that_day() {
        let runs = [
            run(1, "2024-03-02T03:45:00Z", RunState::Succeeded, 0),
            run(2, "2024-03-03T07:00:00Z", RunState::Succeeded, 0),
            run(3, "2024-03-04T03:45:00Z", RunState::Succeeded, 6),
            run(4, "2024-03-05T03:45:00Z", RunState::Held, 0),
        ];
        let due = NaiveTime::from_hms_opt(6, 0, 0).expect("a time");
        let now = "2024-03-05T12:00:00Z".parse().expect("a time");
        let samples = of_runs(&runs, due, now);
        let ages: Vec<Option<u64>> = samples
            .iter()
            .filter(|s| s.name == "mart_age_seconds")
            .map(|s| match s.value {
                Measured::Value(age) => Some(age.numerator),
                Measured::Repeated { .. } | Measured::Missing | Measured::Counts { .. } => None,
            })
            .collect();
        assert_eq!(ages, [Some(8_100), Some(94_500), Some(8_100), Some(94_500)]);
        let status = evaluate(&Objective::shipped().expect("objectives"), &samples, now);
        let of = |name: &str| (status[name].good, status[name].total, status[name].standing);
        assert_eq!(of("batch_freshness"), (2, 4, Standing::Missed));
        // The first and the third day were there; of the third 94 of 100 rows, which is not more than 95 %.
        assert_eq!(of("batch_completeness"), (1, 4, Standing::Missed));
        assert_eq!(of("streaming_freshness"), (0, 0, Standing::NoData));
    }
}
