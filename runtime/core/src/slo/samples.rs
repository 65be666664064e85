//! Samples of the batch objectives, from the runs of the ledger alone.
//!
//! A day is due at a time of the next day. What had been published by then counts, what came later does not: a sample is
//! what a consumer met. Days before the first run are no days of this platform.

use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};

use super::{Fraction, Measured, Sample};
use crate::{
    batch::DayReport,
    ports::{Run, RunState},
};

/// One sample of `mart_age_seconds` and one of `rows_accounted_share` for each day that was due up to `now`.
///
/// The age is that of the newest success before the time at which the day was due; without one the sample is missing. Rows
/// are accounted for when the day was published and they were published, deduplicated or rejected by a business rule;
/// quarantined rows are not.
pub fn of_runs(runs: &[Run], due: NaiveTime, now: DateTime<Utc>) -> Vec<Sample> {
    let Some(first) = runs.iter().map(|run| run.fecha).min() else { return Vec::new() };
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
                Measured::Missing | Measured::Counts { .. } => None,
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
