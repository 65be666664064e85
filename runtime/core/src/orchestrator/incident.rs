//! Incidents: what their keys say, and which success ends one.
//!
//! The order of runs is the ledger's: epochs rise within a day, and a pipeline has one run at a time. Times are of no use
//! for it, because whoever raised the incident and whoever ran the day may have different clocks. What it leaves out: who
//! is told, see [`super::outbox`].

use std::collections::BTreeMap;

use chrono::{DateTime, Days, NaiveDate, Utc};

use super::{Asset, Slot};
use crate::ports::{Run, RunState};

/// Kinds of incidents that a success ends.
pub(super) const ENDED_BY_SUCCESS: [&str; 5] = ["source_unavailable", "breaker_open", "day_held", "run_failed", "sla_missed"];
/// How far back the runs of an asset without a day of its own are looked at: clocks may be a day apart.
const BACK: Days = Days::new(2);

/// The key of an incident. An asset that looks at the present has one of each kind; one that processes a day, one per day.
pub(super) fn key(kind: &str, asset: &Asset, slot: Slot) -> String {
    if asset.lag_days == 0 { format!("{kind}:{}", asset.name) } else { format!("{kind}:{}:{}", asset.name, slot.fecha) }
}

/// What a key says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct About<'a> {
    pub(super) kind: &'a str,
    pub(super) asset: &'a str,
    /// The day; `None` for an asset that looks at the present.
    pub(super) fecha: Option<NaiveDate>,
}

impl<'a> About<'a> {
    pub(super) fn of(key: &'a str) -> Self {
        let mut parts = key.split(':');
        let (kind, asset) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        Self { kind, asset, fecha: parts.next().and_then(|f| f.parse().ok()) }
    }

    /// Whether some run can end the incident.
    pub(super) fn ends_by_success(&self) -> bool {
        ENDED_BY_SUCCESS.contains(&self.kind)
    }

    /// The first day whose runs matter to an incident that began at `since`.
    pub(super) fn first(&self, since: DateTime<Utc>) -> NaiveDate {
        self.fecha.unwrap_or(since.date_naive() - BACK)
    }

    /// From which epoch on a success of each day ends the incident that begins now, by the runs so far, in order of
    /// (day, epoch). A day that is left out has none so far.
    ///
    /// A run that is under way may still end it. So does one by hand that has come between the last try and the news of
    /// it, but not one from before the first try: that one processed a day that was not over.
    pub(super) fn ends_from(&self, runs: &[Run]) -> BTreeMap<NaiveDate, i64> {
        let mut out = BTreeMap::new();
        let mut tried = None;
        for run in runs.iter().filter(|r| self.fecha.is_none_or(|f| f == r.fecha)) {
            let is_after_a_try = self.fecha.is_some() && tried == Some(run.fecha);
            match run.state {
                RunState::Succeeded if is_after_a_try => {}
                RunState::Succeeded => drop(out.insert(run.fecha, run.epoch + 1)),
                RunState::Running | RunState::Failed | RunState::Held | RunState::Skipped => {
                    out.insert(run.fecha, run.epoch);
                }
            }
            if run.scheduled_at.is_some() {
                tried = Some(run.fecha);
            }
        }
        out
    }

    /// Whether one of the runs ends the incident.
    pub(super) fn is_ended(&self, ends_from: &BTreeMap<NaiveDate, i64>, runs: &[Run]) -> bool {
        runs.iter().any(|r| {
            r.state == RunState::Succeeded
                && self.fecha.is_none_or(|f| f == r.fecha)
                && ends_from.get(&r.fecha).is_none_or(|from| r.epoch >= *from)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(number: u32) -> NaiveDate {
        NaiveDate::from_ymd_opt(2024, 3, number).expect("a day")
    }

    fn run(fecha: u32, epoch: i64, state: RunState, by_hand: bool) -> Run {
        Run {
            pipeline: "p".into(),
            fecha: day(fecha),
            epoch,
            run_id: epoch.to_string(),
            state,
            started_at: DateTime::UNIX_EPOCH,
            finished_at: (state != RunState::Running).then_some(DateTime::UNIX_EPOCH),
            scheduled_at: (!by_hand).then_some(DateTime::UNIX_EPOCH),
            fence: None,
            report: serde_json::Value::Null,
        }
    }

    /// Whether `later`, after `before` were known, ends an incident.
    fn check(key: &str, before: &[Run], later: &[Run], expected: bool) {
        let about = About::of(key);
        let from = about.ends_from(before);
        assert!(!about.is_ended(&from, before) || expected, "{key}: ended by {before:?}");
        assert_eq!(about.is_ended(&from, &[before, later].concat()), expected, "{key}: {before:?}, then {later:?}");
    }

    #[test]
    fn a_key_says_kind_asset_and_day() {
        let about = |kind, asset, fecha| About { kind, asset, fecha };
        assert_eq!(About::of("run_failed:daily:2024-03-05"), about("run_failed", "daily", Some(day(5))));
        assert_eq!(About::of("dimension_stale:x"), about("dimension_stale", "x", None));
        assert_eq!(About::of(""), about("", "", None));
    }

    #[test]
    fn a_success_with_a_later_epoch_ends_the_incident_of_its_day_whatever_the_clocks_say() {
        use RunState::{Failed, Held, Running, Succeeded};
        let key = "run_failed:p:2024-03-05";
        check(key, &[run(5, 1, Failed, false)], &[run(5, 2, Succeeded, true)], true);
        check(key, &[run(5, 1, Failed, false)], &[run(5, 2, Failed, true)], false);
        check(key, &[run(5, 1, Held, false)], &[run(6, 1, Succeeded, false)], false);
        check(key, &[run(4, 7, Succeeded, false), run(5, 1, Failed, false)], &[], false);
        // It came between the last try and its alert.
        check(key, &[run(5, 1, Failed, false), run(5, 2, Succeeded, true)], &[], true);
        // It was there before the turn began.
        check(key, &[run(5, 1, Succeeded, true), run(5, 2, Running, false)], &[], false);
        check(key, &[run(5, 1, Succeeded, true)], &[run(5, 2, Succeeded, false)], true);
        // It was under way when the promised time came.
        check(key, &[run(5, 1, Failed, false), run(5, 2, Running, true)], &[], false);
        let about = About::of(key);
        let from = about.ends_from(&[run(5, 1, Failed, false), run(5, 2, Running, true)]);
        assert!(about.is_ended(&from, &[run(5, 1, Failed, false), run(5, 2, Succeeded, true)]));
    }

    #[test]
    fn an_asset_of_the_present_is_ended_by_its_next_success() {
        use RunState::{Failed, Succeeded};
        let key = "run_failed:p";
        let before = [run(4, 4, Succeeded, false), run(5, 1, Succeeded, false), run(5, 2, Succeeded, false)];
        check(key, &before, &[], false);
        check(key, &before, &[run(5, 3, Failed, false)], false);
        check(key, &before, &[run(5, 3, Succeeded, false)], true);
        check(key, &before, &[run(6, 1, Succeeded, true)], true);
        // By hand, from a machine on which it is still yesterday.
        check(key, &before, &[run(4, 5, Succeeded, true)], true);
    }
}
