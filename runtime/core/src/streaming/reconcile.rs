//! Reconciliation: a day's revenue in batch against the same day in the stream, per region, to the cent.
//!
//! The verdict is on the day's total, as an exact ratio. The difference is then attributed: evidence says how many cents
//! were late, duplicated and so on, and what it does not say is `unexplained`, so the causes always add up to the
//! difference. Left out: collecting the evidence, and repairing the day.

use std::{cmp::Ordering, collections::BTreeMap, fmt};

use chrono::{DateTime, NaiveDate};
use serde::{Deserialize, Serialize};

use super::window::{MetricRow, WindowKind};

/// Revenue in cents per day and region.
pub type Revenue = BTreeMap<(NaiveDate, String), i64>;

/// One side of the comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// What it says.
    pub revenue: Revenue,
    /// Its last complete day; `None` when there is none.
    pub complete_through: Option<NaiveDate>,
}

/// Why the two sides differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// Events after the allowed lateness, which the stream left out.
    Late,
    /// Events the stream counted more than once.
    Duplicated,
    /// Events that were not decodable or broke a rule.
    DeadLettered,
    /// Events that a wrong clock put into another day.
    Clock,
    /// Events that never arrived, because something was down.
    Outage,
    /// What no evidence covers.
    Unexplained,
}

/// Cents of the difference that a cause is known to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// Day.
    pub fecha: NaiveDate,
    /// Region.
    pub region: String,
    /// Cause.
    pub cause: Cause,
    /// Cents that batch has more than the stream because of it; negative where the stream has more.
    pub cents: i64,
}

/// A ratio of whole numbers, 0 or more; the denominator may be 0, which is more than any other ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ratio {
    /// Above.
    pub numerator: u64,
    /// Below.
    pub denominator: u64,
}

impl Ratio {
    /// Whether this is more than `other`, exactly.
    pub fn exceeds(self, other: Ratio) -> bool {
        let left = u128::from(self.numerator) * u128::from(other.denominator);
        left.cmp(&(u128::from(other.numerator) * u128::from(self.denominator))) == Ordering::Greater
    }
}

impl fmt::Display for Ratio {
    /// In percent, rounded up in the second decimal, so that no difference prints as 0.00 %.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.denominator == 0 {
            return f.write_str(if self.numerator == 0 { "0.00 %" } else { "more than 100 %" });
        }
        let hundredths = (u128::from(self.numerator) * 10_000).div_ceil(u128::from(self.denominator));
        write!(f, "{}.{:02} %", hundredths / 100, hundredths % 100)
    }
}

/// What a difference means. The specification says 2/100 and 5/100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bounds {
    /// Above it, somebody should look.
    pub warn: Ratio,
    /// Above it, the reconciliation failed.
    pub fail: Ratio,
}

impl Bounds {
    /// The bounds of the specification: warn above 2 %, fail above 5 %.
    pub fn specification() -> Self {
        let percent = |numerator| Ratio { numerator, denominator: 100 };
        Self { warn: percent(2), fail: percent(5) }
    }
}

/// What a comparison came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// One side is not complete yet.
    Pending,
    /// Within the bounds.
    Pass,
    /// Above the first bound.
    Warn,
    /// Above the second bound.
    Fail,
}

/// Two amounts and where their difference comes from. All in cents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Batch.
    pub batch: i64,
    /// Stream.
    pub stream: i64,
    /// |batch - stream| / batch.
    pub ratio: Ratio,
    /// What it means.
    pub verdict: Verdict,
    /// batch - stream, by cause; the causes add up to it, and those of zero are left out.
    pub causes: BTreeMap<Cause, i64>,
}

/// A day.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DayReconciliation {
    /// All regions together; its verdict is the day's.
    pub total: Line,
    /// Per region.
    pub regions: BTreeMap<String, Line>,
}

/// Compares the two sides, for every day and region that one of them, or the evidence, knows.
pub fn reconcile(batch: &Side, stream: &Side, evidence: &[Evidence], bounds: &Bounds) -> BTreeMap<NaiveDate, DayReconciliation> {
    let mut known: BTreeMap<(NaiveDate, &str), BTreeMap<Cause, i64>> = BTreeMap::new();
    for (fecha, region) in batch.revenue.keys().chain(stream.revenue.keys()) {
        known.entry((*fecha, region)).or_default();
    }
    for e in evidence {
        *known.entry((e.fecha, &e.region)).or_default().entry(e.cause).or_default() += e.cents;
    }
    let mut days: BTreeMap<NaiveDate, BTreeMap<String, Line>> = BTreeMap::new();
    for ((fecha, region), causes) in known {
        let is_complete = [batch, stream].iter().all(|side| side.complete_through.is_some_and(|day| day >= fecha));
        let of = |side: &Side| side.revenue.get(&(fecha, region.to_owned())).copied().unwrap_or(0);
        let line = line(of(batch), of(stream), causes, is_complete, bounds);
        days.entry(fecha).or_default().insert(region.to_owned(), line);
    }
    let day = |(fecha, regions): (NaiveDate, BTreeMap<String, Line>)| {
        let mut causes: BTreeMap<Cause, i64> = BTreeMap::new();
        for (cause, cents) in regions.values().flat_map(|line| &line.causes) {
            *causes.entry(*cause).or_default() += cents;
        }
        let sum = |of: fn(&Line) -> i64| regions.values().map(of).sum::<i64>();
        let is_complete = regions.values().all(|line| line.verdict != Verdict::Pending);
        let total = line(sum(|l| l.batch), sum(|l| l.stream), causes, is_complete, bounds);
        (fecha, DayReconciliation { total, regions })
    };
    days.into_iter().map(day).collect()
}

fn line(batch: i64, stream: i64, mut causes: BTreeMap<Cause, i64>, is_complete: bool, bounds: &Bounds) -> Line {
    let known: i64 = causes.iter().filter(|(cause, _)| **cause != Cause::Unexplained).map(|(_, cents)| cents).sum();
    causes.insert(Cause::Unexplained, batch - stream - known);
    causes.retain(|_, cents| *cents != 0);
    assert_eq!(causes.values().sum::<i64>(), batch - stream, "every cent has a cause");
    let verdict = if is_complete { verdict(batch, stream, bounds) } else { Verdict::Pending };
    Line { batch, stream, ratio: ratio(batch, stream), verdict, causes }
}

fn ratio(batch: i64, stream: i64) -> Ratio {
    // Revenue is never negative; a batch of less than nothing is like one of nothing.
    Ratio { numerator: batch.abs_diff(stream), denominator: u64::try_from(batch).unwrap_or(0) }
}

/// What the difference of two complete sides means.
pub fn verdict(batch: i64, stream: i64, bounds: &Bounds) -> Verdict {
    let ratio = ratio(batch, stream);
    match () {
        () if ratio.exceeds(bounds.fail) => Verdict::Fail,
        () if ratio.exceeds(bounds.warn) => Verdict::Warn,
        () => Verdict::Pass,
    }
}

/// A day's streaming revenue: the sum over the newest revisions of `region_1m`, and of nothing else.
pub fn daily_revenue<'a>(rows: impl IntoIterator<Item = &'a MetricRow>) -> Revenue {
    let mut newest: BTreeMap<(i64, &str), &MetricRow> = BTreeMap::new();
    for row in rows {
        match row.window_kind {
            WindowKind::Region1m => {
                let known = newest.entry((row.window_start_ms, &row.region)).or_insert(row);
                if known.revision < row.revision {
                    *known = row;
                }
            }
            WindowKind::Page1m | WindowKind::Region5m => {}
        }
    }
    let mut revenue = Revenue::new();
    for ((start, region), row) in newest {
        if let Some(time) = DateTime::from_timestamp_millis(start) {
            *revenue.entry((time.date_naive(), region.to_owned())).or_default() += row.revenue_cents;
        }
    }
    revenue
}

/// The last day that is complete when windows are closed through `closed_ms` and late events count for `lateness_ms` more.
pub fn complete_through(closed_ms: i64, lateness_ms: i64) -> Option<NaiveDate> {
    let settled = DateTime::from_timestamp_millis(closed_ms.checked_sub(lateness_ms)?)?;
    settled.date_naive().pred_opt()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn day(day: u32) -> NaiveDate {
        NaiveDate::from_ymd_opt(2024, 3, day).unwrap()
    }

    fn side(cells: &[(u32, &str, i64)], complete: u32) -> Side {
        let revenue = cells.iter().map(|&(d, region, cents)| ((day(d), region.to_owned()), cents)).collect();
        Side { revenue, complete_through: Some(day(complete)) }
    }

    fn check(batch: i64, stream: i64, expected: Verdict, printed: &str) {
        let days = reconcile(&side(&[(1, "sur", batch)], 1), &side(&[(1, "sur", stream)], 1), &[], &Bounds::specification());
        let total = &days[&day(1)].total;
        assert_eq!((total.verdict, total.ratio.to_string().as_str()), (expected, printed), "{batch} against {stream}");
    }

    #[test]
    fn bounds_are_exact() {
        check(10_000, 10_000, Verdict::Pass, "0.00 %");
        check(10_000, 9_800, Verdict::Pass, "2.00 %");
        check(10_000, 10_200, Verdict::Pass, "2.00 %");
        check(10_000, 9_799, Verdict::Warn, "2.01 %");
        check(10_000, 9_500, Verdict::Warn, "5.00 %");
        check(10_000, 9_499, Verdict::Fail, "5.01 %");
        check(1_000_000_000, 999_999_999, Verdict::Pass, "0.01 %");
        check(0, 0, Verdict::Pass, "0.00 %");
        check(0, 1, Verdict::Fail, "more than 100 %");
    }

    #[test]
    fn a_day_is_pending_until_both_sides_are_complete() {
        let days = reconcile(&side(&[(1, "sur", 5), (2, "sur", 5)], 2), &side(&[], 1), &[], &Bounds::specification());
        assert_eq!(days[&day(1)].total.verdict, Verdict::Fail);
        assert_eq!(days[&day(2)].total.verdict, Verdict::Pending);
    }

    #[test]
    fn errors_of_regions_do_not_hide_in_the_total() {
        let batch = side(&[(1, "norte", 1_000), (1, "sur", 1_000)], 1);
        let stream = side(&[(1, "norte", 1_100), (1, "sur", 900)], 1);
        let days = reconcile(&batch, &stream, &[], &Bounds::specification());
        assert_eq!(days[&day(1)].total.verdict, Verdict::Pass);
        assert_eq!(days[&day(1)].regions["sur"].verdict, Verdict::Fail);
        assert_eq!(days[&day(1)].regions["sur"].causes, BTreeMap::from([(Cause::Unexplained, 100)]));
    }

    #[test]
    fn a_day_is_complete_when_no_late_event_can_change_it() {
        let midnight = 1_710_806_400_000;
        assert_eq!(complete_through(midnight + 300_000, 300_000), Some(day(18)));
        assert_eq!(complete_through(midnight + 299_999, 300_000), Some(day(17)));
    }

    #[test]
    fn revenue_counts_the_newest_revision_of_region_1m_only() {
        let row = |window_kind, minute: i64, revision, revenue_cents| MetricRow {
            window_kind,
            window_start_ms: 1_710_720_000_000 + minute * 60_000,
            window_end_ms: 0,
            region: "sur".into(),
            page: None,
            clicks: 0,
            purchases: 0,
            add_to_cart: 0,
            revenue_cents,
            unique_users: 0,
            revision,
            exact: true,
        };
        use WindowKind::{Page1m, Region1m, Region5m};
        let rows = [
            row(Region1m, 0, 1, 300),
            row(Region1m, 0, 0, 200),
            row(Region1m, 1_439, 0, 5),
            row(Region1m, 1_440, 0, 7),
            row(Page1m, 0, 0, 300),
            row(Region5m, 0, 9, 300),
        ];
        let expected = Revenue::from([((day(18), "sur".into()), 305), ((day(19), "sur".into()), 7)]);
        assert_eq!(daily_revenue(&rows), expected);
    }

    proptest! {
        #[test]
        fn every_cent_has_a_cause(
            batch in prop::collection::vec((1u32..4, 0usize..3, 0i64..1_000_000), 0..9),
            stream in prop::collection::vec((1u32..4, 0usize..3, 0i64..1_000_000), 0..9),
            evidence in prop::collection::vec((1u32..4, 0usize..3, 0usize..6, -1_000i64..1_000), 0..12),
        ) {
            let regions = ["norte", "sur", "este"];
            let cells = |v: &[(u32, usize, i64)]| v.iter().map(|&(d, r, c)| (d, regions[r], c)).collect::<Vec<_>>();
            let (batch, stream) = (side(&cells(&batch), 9), side(&cells(&stream), 9));
            let causes = [Cause::Late, Cause::Duplicated, Cause::DeadLettered, Cause::Clock, Cause::Outage, Cause::Unexplained];
            let evidence: Vec<_> = evidence
                .iter()
                .map(|&(d, r, c, cents)| Evidence { fecha: day(d), region: regions[r].into(), cause: causes[c], cents })
                .collect();
            let days = reconcile(&batch, &stream, &evidence, &Bounds::specification());
            let (mut all_batch, mut all_stream) = (0, 0);
            for (fecha, d) in &days {
                prop_assert_eq!(d.total.causes.values().sum::<i64>(), d.total.batch - d.total.stream);
                for (region, line) in &d.regions {
                    prop_assert_eq!(line.causes.values().sum::<i64>(), line.batch - line.stream);
                    for cause in &causes[..5] {
                        let known: i64 = evidence
                            .iter()
                            .filter(|e| e.fecha == *fecha && e.region == *region && e.cause == *cause)
                            .map(|e| e.cents)
                            .sum();
                        prop_assert_eq!(line.causes.get(cause).copied().unwrap_or(0), known);
                    }
                }
                all_batch += d.total.batch;
                all_stream += d.total.stream;
            }
            prop_assert_eq!(all_batch, batch.revenue.values().sum::<i64>());
            prop_assert_eq!(all_stream, stream.revenue.values().sum::<i64>());
        }
    }
}
