//! Whether the amounts of a day are of the size that they were.
//!
//! A unit that changes upstream, euros to cents, breaks no clause of any row and no bound on their number. What it changes is
//! the mean amount, by far more than any season does. A day's mean is compared with the median of the means of the published
//! days before it, by the bound of the contract. What this leaves out: a change that is smaller than the bound, and the first
//! days of a history, which have nothing to be compared with.

use std::collections::BTreeMap;

use chrono::{Days, NaiveDate};

use crate::{
    contract::Contract,
    platform::PIPELINE,
    ports::{Ports, Result, Run, RunState},
};

/// How far back published days are looked for.
const DAYS: u64 = 28;
/// Days that are compared with, the newest.
const COMPARED: usize = 7;

/// A sum of cents and the rows that it is of, at least one.
type Mean = (i128, i128);

fn mean(run: &Run) -> Option<Mean> {
    let published = run.report.get("fates")?.get("published")?.as_u64()?;
    let cents = run.report.get("revenue_cents")?.as_i64()?;
    (published > 0 && cents > 0).then_some((cents.into(), published.into()))
}

/// The one in the middle of some means; of an even number, the lower of the two.
fn median(mut means: Vec<Mean>) -> Option<Mean> {
    means.sort_by_key(|(cents, rows)| (cents * 1_000_000) / rows);
    means.get(means.len().saturating_sub(1) / 2).copied()
}

/// Whether one mean is more than `bound` times the other, whichever is the greater.
fn apart((a, n): Mean, (b, m): Mean, (numerator, denominator): (u64, u64)) -> bool {
    let (numerator, denominator) = (i128::from(numerator), i128::from(denominator));
    let (left, right) = (a * m, b * n);
    left * denominator > right * numerator || right * denominator > left * numerator
}

fn euros((cents, rows): Mean) -> String {
    let mean = cents / rows;
    format!("{}.{:02}", mean / 100, mean % 100)
}

/// What was found and what was expected, when the mean net amount of the day's published rows is too far from that of the
/// days before it; `None` when it is not, when the contract has no bound and when there are no such days.
pub(super) async fn shifted(
    ports: &Ports,
    contract: &Contract,
    fecha: NaiveDate,
    cents: i64,
    rows: u64,
) -> Result<Option<(String, String)>> {
    let Some(bound) = contract.mean_shift_max.filter(|_| rows > 0) else { return Ok(None) };
    let mut days: BTreeMap<NaiveDate, Mean> = BTreeMap::new();
    for run in ports.ledger.runs_since(PIPELINE, fecha - Days::new(DAYS)).await? {
        // A later run of a day comes after an earlier one, and its figures are the day's.
        if let Some(mean) = mean(&run).filter(|_| run.fecha < fecha && run.state == RunState::Succeeded) {
            days.insert(run.fecha, mean);
        }
    }
    let newest: Vec<Mean> = days.into_values().rev().take(COMPARED).collect();
    let (number, today) = (newest.len(), (i128::from(cents), i128::from(rows)));
    Ok(median(newest).filter(|before| apart(today, *before, bound)).map(|before| {
        let (a, b) = bound;
        let found = format!("a mean of {} over {rows} rows", euros(today));
        (found, format!("at most {a}/{b} times or parts of {}, the median of {number} days before", euros(before)))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundredfold_is_apart_and_a_season_is_not() {
        let bound = (10, 1);
        assert!(apart((350_000, 100), (3_500, 100), bound) && apart((3_500, 100), (350_000, 100), bound));
        assert!(!apart((35_000, 100), (3_500, 100), bound), "the bound itself is allowed");
        assert!(!apart((9_000, 100), (3_500, 100), bound) && !apart((1_200, 100), (3_500, 100), bound));
        assert!(apart((1, 1), (i128::from(u64::MAX), 1), bound), "no overflow");
    }

    #[test]
    fn the_median_is_by_value_and_one_strange_day_does_not_move_it() {
        assert_eq!(median(Vec::new()), None);
        assert_eq!(median(vec![(9_900, 1), (20, 2), (33, 3)]), Some((33, 3)));
        assert_eq!(median(vec![(5, 1), (7, 1)]), Some((5, 1)));
    }
}
