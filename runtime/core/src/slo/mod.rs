//! Service level objectives: what was promised, what was kept, and how much of the error budget is left.
//!
//! An objective is an OpenSLO v1 file in `contracts/slo`; production and the simulator evaluate the same files over the same
//! samples with the same code. A sample is a fact with a time: good out of total for counted things, or a measured value
//! that an objective compares with its threshold. All arithmetic is exact; a percentage exists only where it is printed.
//! What this leaves out: where samples come from, see [`samples`], and who is told.

mod openslo;
pub mod samples;

use std::{collections::BTreeMap, fmt};

use chrono::{DateTime, Duration, Utc};
use serde::{Deserialize, Serialize};

/// The objectives that ship with the program: path and text.
pub const FILES: &[(&str, &str)] = &[
    ("batch_freshness.yaml", include_str!("../../../../contracts/slo/batch_freshness.yaml")),
    ("streaming_freshness.yaml", include_str!("../../../../contracts/slo/streaming_freshness.yaml")),
    ("data_quality_score.yaml", include_str!("../../../../contracts/slo/data_quality_score.yaml")),
    ("batch_completeness.yaml", include_str!("../../../../contracts/slo/batch_completeness.yaml")),
    ("batch_streaming_reconciliation.yaml", include_str!("../../../../contracts/slo/batch_streaming_reconciliation.yaml")),
];

/// A fraction that is not rounded. The denominator is above 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fraction {
    /// Above.
    pub numerator: u64,
    /// Below.
    pub denominator: u64,
}

impl Fraction {
    /// A whole number.
    pub fn whole(numerator: u64) -> Self {
        Self { numerator, denominator: 1 }
    }
    /// Reads a decimal such as `0.995`; `None` for anything else, and for more than 15 digits.
    pub fn decimal(text: &str) -> Option<Self> {
        let (whole, part) = text.split_once('.').unwrap_or((text, ""));
        let digits = format!("{whole}{part}");
        let is_number = !whole.is_empty() && digits.len() <= 15 && digits.bytes().all(|b| b.is_ascii_digit());
        let denominator = 10_u64.checked_pow(u32::try_from(part.len()).ok()?)?;
        is_number.then_some(Self { numerator: digits.parse().ok()?, denominator })
    }
    fn cross(self, other: Self) -> (u128, u128) {
        let product = |a: u64, b: u64| u128::from(a) * u128::from(b);
        (product(self.numerator, other.denominator), product(other.numerator, self.denominator))
    }
}

impl PartialOrd for Fraction {
    /// By value: 1/2 is neither less nor more than 2/4.
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        let (left, right) = self.cross(*other);
        Some(left.cmp(&right))
    }
}

impl fmt::Display for Fraction {
    /// In percent, rounded down in the third decimal, so that nothing below a target prints as the target.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thousandths = u128::from(self.numerator) * 100_000 / u128::from(self.denominator.max(1));
        write!(f, "{}.{:03} %", thousandths / 1_000, thousandths % 1_000)
    }
}

/// How a value is compared with a threshold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// Good below the threshold.
    Below,
    /// Good at or below it.
    AtMost,
    /// Good above it.
    Above,
    /// Good at or above it.
    AtLeast,
}

impl Comparison {
    fn parse(op: &str) -> Option<Self> {
        Some(match op {
            "lt" => Self::Below,
            "lte" => Self::AtMost,
            "gt" => Self::Above,
            "gte" => Self::AtLeast,
            _ => return None,
        })
    }
    fn holds(self, value: Fraction, threshold: Fraction) -> bool {
        match self {
            Self::Below => value < threshold,
            Self::AtMost => value <= threshold,
            Self::Above => value > threshold,
            Self::AtLeast => value >= threshold,
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Indicator {
    /// A value per sample.
    Threshold {
        /// Name of the sample.
        sample: String,
        /// How it is compared.
        comparison: Comparison,
        /// With what.
        threshold: Fraction,
    },
    /// Good out of total per sample.
    Share {
        /// Name of the sample that holds both.
        sample: String,
    },
}

/// A promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Objective {
    /// Name, for example `batch_freshness`.
    pub name: String,
    /// Name for people.
    pub title: String,
    /// The promise in words.
    pub description: String,
    /// Whose promise it is.
    pub service: String,
    /// What is measured.
    pub indicator: Indicator,
    /// Which share must be good: more than this for a share, at least this for a threshold.
    pub target: Fraction,
    /// Length of the rolling window.
    pub window: Duration,
}

/// A file that is no objective.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {place}: found {found}, expected {expected}")]
pub struct ObjectiveError {
    /// The file.
    pub file: String,
    /// Where in it.
    pub place: String,
    /// What stands there.
    pub found: String,
    /// What could.
    pub expected: String,
}

/// A fact with a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Name, as an indicator has it.
    pub name: String,
    /// When it was taken, or when it was due.
    pub at: DateTime<Utc>,
    /// What was measured.
    pub value: Measured,
}

/// What a sample holds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measured {
    /// One value.
    Value(Fraction),
    /// The same value so many times.
    Repeated {
        /// It.
        value: Fraction,
        /// How often it was measured.
        times: u64,
    },
    /// Nothing came where a value was due: bad, whatever the threshold.
    Missing,
    /// Good out of total.
    Counts {
        /// Good.
        good: u64,
        /// All.
        total: u64,
    },
}

/// Whether a promise is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Kept.
    Met,
    /// Broken.
    Missed,
    /// Nothing was measured in the window, so nothing is known.
    NoData,
}

/// How a promise stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Name of the objective.
    pub name: String,
    /// Start of the window, exclusive.
    pub from: DateTime<Utc>,
    /// End of the window, inclusive.
    pub to: DateTime<Utc>,
    /// Good in the window.
    pub good: u64,
    /// All in the window.
    pub total: u64,
    /// Which share must be good.
    pub target: Fraction,
    /// Whether the promise is kept.
    pub standing: Standing,
}

impl Status {
    /// The share that was good; `None` without any sample.
    pub fn attained(&self) -> Option<Fraction> {
        (self.total > 0).then_some(Fraction { numerator: self.good, denominator: self.total })
    }
    /// How many of the window's samples may be bad, rounded down, and how many were.
    pub fn budget(&self) -> (u64, u64) {
        let Fraction { numerator, denominator } = self.target;
        let may = u128::from(self.total) * u128::from(denominator.saturating_sub(numerator)) / u128::from(denominator);
        (u64::try_from(may).unwrap_or(u64::MAX), self.total - self.good)
    }
    /// How fast the budget is spent: 1 spends exactly all of it in a window; `None` without any sample or any budget.
    pub fn burn_rate(&self) -> Option<Fraction> {
        let Fraction { numerator, denominator } = self.target;
        let bad = u64::try_from(u128::from(self.total - self.good) * u128::from(denominator)).ok()?;
        let may = u64::try_from(u128::from(self.total) * u128::from(denominator.checked_sub(numerator)?)).ok()?;
        (may > 0).then_some(Fraction { numerator: bad, denominator: may })
    }
}

impl Objective {
    /// Reads a file.
    ///
    /// # Errors
    /// What is not an objective that can be evaluated here, with its place.
    pub fn parse(file: &str, text: &str) -> Result<Self, ObjectiveError> {
        let wrong = |place: &str, found: String, expected: &str| ObjectiveError {
            file: file.into(),
            place: place.into(),
            found,
            expected: expected.into(),
        };
        let parsed: openslo::File =
            serde_saphyr::from_str(text).map_err(|e| wrong("the file", e.to_string(), "an SLO of OpenSLO v1"))?;
        if (parsed.api_version.as_str(), parsed.kind.as_str()) != ("openslo/v1", "SLO") {
            return Err(wrong("apiVersion and kind", format!("{} {}", parsed.api_version, parsed.kind), "openslo/v1 SLO"));
        }
        let spec = parsed.spec;
        if spec.budgeting_method != "Occurrences" {
            return Err(wrong("spec.budgetingMethod", spec.budgeting_method, "Occurrences"));
        }
        let [goal] = spec.objectives.as_slice() else {
            return Err(wrong("spec.objectives", format!("{} of them", spec.objectives.len()), "one"));
        };
        let [window] = spec.time_window.as_slice() else {
            return Err(wrong("spec.timeWindow", format!("{} of them", spec.time_window.len()), "one"));
        };
        let days = window.duration.strip_suffix('d').and_then(|n| n.parse::<u16>().ok()).filter(|n| *n > 0 && window.is_rolling);
        let days =
            days.ok_or_else(|| wrong("spec.timeWindow", window.duration.clone(), "a rolling window of whole days, as 30d"))?;
        let target = Fraction::decimal(&goal.target).filter(|t| *t < Fraction::whole(1));
        let target = target.ok_or_else(|| wrong("objectives[0].target", goal.target.clone(), "a decimal below 1"))?;
        let ours = |metric: openslo::Metric| match metric.metric_source.kind.as_str() {
            "simulacro" => Ok(metric.metric_source.spec.sample),
            other => Err(wrong("metricSource.type", other.into(), "simulacro")),
        };
        let indicator = match (spec.indicator.spec.threshold_metric, spec.indicator.spec.ratio_metric) {
            (Some(metric), None) => {
                let op = goal.op.clone().unwrap_or_default();
                let comparison = Comparison::parse(&op);
                let value = goal.value.clone().unwrap_or_default();
                let threshold = Fraction::decimal(&value);
                Indicator::Threshold {
                    sample: ours(metric)?,
                    comparison: comparison.ok_or_else(|| wrong("objectives[0].op", op, "one of lt, lte, gt, gte"))?,
                    threshold: threshold.ok_or_else(|| wrong("objectives[0].value", value, "a decimal"))?,
                }
            }
            (None, Some(ratio)) => {
                ours(ratio.total)?;
                Indicator::Share { sample: ours(ratio.good)? }
            }
            _ => return Err(wrong("indicator.spec", "none or both".into(), "one of thresholdMetric and ratioMetric")),
        };
        Ok(Self {
            title: parsed.metadata.display_name.unwrap_or_else(|| parsed.metadata.name.clone()),
            name: parsed.metadata.name,
            description: spec.description,
            service: spec.service,
            indicator,
            target,
            window: Duration::days(i64::from(days)),
        })
    }

    /// The objectives that ship with the program, in the specification's order.
    ///
    /// # Errors
    /// When a file is no objective; a test holds that all are.
    pub fn shipped() -> Result<Vec<Self>, ObjectiveError> {
        FILES.iter().map(|(file, text)| Self::parse(file, text)).collect()
    }

    /// Good and all of one sample; `None` when it is not of this objective.
    fn judge(&self, sample: &Sample) -> Option<(u64, u64)> {
        match (&self.indicator, sample.value) {
            (Indicator::Threshold { sample: name, comparison, threshold }, value) if *name == sample.name => match value {
                Measured::Value(value) => Some((u64::from(comparison.holds(value, *threshold)), 1)),
                Measured::Repeated { value, times } => Some((times * u64::from(comparison.holds(value, *threshold)), times)),
                Measured::Missing | Measured::Counts { .. } => Some((0, 1)),
            },
            (Indicator::Share { sample: name }, value) if *name == sample.name => match value {
                Measured::Counts { good, total } => Some((good.min(total), total)),
                Measured::Repeated { times, .. } => Some((0, times)),
                Measured::Value(_) | Measured::Missing => Some((0, 1)),
            },
            (Indicator::Threshold { .. } | Indicator::Share { .. }, _) => None,
        }
    }

    /// How the promise stands at the end of the window that ends at `now`.
    pub fn evaluate(&self, samples: &[Sample], now: DateTime<Utc>) -> Status {
        self.over(samples, now - self.window, now)
    }

    /// As [`Objective::evaluate`], over any period: `from` exclusive, `to` inclusive.
    pub fn over(&self, samples: &[Sample], from: DateTime<Utc>, to: DateTime<Utc>) -> Status {
        let within = samples.iter().filter(|s| s.at > from && s.at <= to);
        let (good, total) =
            within.filter_map(|s| self.judge(s)).fold((0, 0), |(good, total), (g, t): (u64, u64)| (good + g, total + t));
        let attained = Fraction { numerator: good, denominator: total.max(1) };
        let kept = match self.indicator {
            Indicator::Share { .. } => attained > self.target,
            Indicator::Threshold { .. } => attained >= self.target,
        };
        let standing = match (total, kept) {
            (0, _) => Standing::NoData,
            (_, true) => Standing::Met,
            (_, false) => Standing::Missed,
        };
        Status { name: self.name.clone(), from, to, good, total, target: self.target, standing }
    }
}

/// How all objectives stand, by name.
pub fn evaluate(objectives: &[Objective], samples: &[Sample], now: DateTime<Utc>) -> BTreeMap<String, Status> {
    objectives.iter().map(|o| (o.name.clone(), o.evaluate(samples, now))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(day: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + Duration::days(day)
    }

    fn ages(seconds: &[u64]) -> Vec<Sample> {
        let sample = |(day, s): (usize, &u64)| Sample {
            name: "mart_age_seconds".into(),
            at: at(day as i64),
            value: Measured::Value(Fraction::whole(*s)),
        };
        seconds.iter().enumerate().map(sample).collect()
    }

    fn objective(name: &str) -> Objective {
        Objective::shipped().expect("the shipped files parse").into_iter().find(|o| o.name == name).expect("a name")
    }

    #[test]
    fn the_shipped_objectives_are_those_of_the_specification() {
        let said: Vec<String> = Objective::shipped()
            .expect("the shipped files parse")
            .iter()
            .map(|o| {
                let what = match &o.indicator {
                    Indicator::Threshold { sample, comparison, threshold } => {
                        format!("{sample} {comparison:?} {}/{}", threshold.numerator, threshold.denominator)
                    }
                    Indicator::Share { sample } => format!("share of {sample}"),
                };
                format!("{}: {what}, {} in {} days", o.name, o.target, o.window.num_days())
            })
            .collect();
        assert_eq!(
            said,
            [
                "batch_freshness: mart_age_seconds Below 21600/1, 99.000 % in 30 days",
                "streaming_freshness: stream_lag_seconds Below 120/1, 99.900 % in 30 days",
                "data_quality_score: share of checks_passed, 99.500 % in 1 days",
                "batch_completeness: rows_accounted_share Above 95/100, 99.000 % in 30 days",
                "batch_streaming_reconciliation: revenue_difference_share Below 3/100, 95.000 % in 30 days",
            ]
        );
    }

    #[test]
    fn the_threshold_itself_is_bad_and_a_sample_that_did_not_come_is_bad() {
        let objective = objective("batch_freshness");
        let mut samples = ages(&[0, 21_599, 21_600, 21_601]);
        samples.push(Sample { name: "mart_age_seconds".into(), at: at(4), value: Measured::Missing });
        let status = objective.evaluate(&samples, at(4));
        assert_eq!((status.good, status.total, status.standing), (2, 5, Standing::Missed));
    }

    #[test]
    fn a_window_takes_its_end_and_leaves_its_start() {
        let objective = objective("batch_freshness");
        let status = objective.evaluate(&ages(&[0; 40]), at(30));
        assert_eq!((status.from, status.to, status.total), (at(0), at(30), 30));
        assert_eq!(objective.evaluate(&[], at(30)).standing, Standing::NoData);
    }

    #[test]
    fn a_share_must_be_above_its_target_and_a_threshold_may_be_at_it() {
        let quality = objective("data_quality_score");
        let checks = |good| [Sample { name: "checks_passed".into(), at: at(1), value: Measured::Counts { good, total: 1_000 } }];
        assert_eq!(quality.evaluate(&checks(995), at(1)).standing, Standing::Missed, "more than 99.5 %, not exactly that");
        assert_eq!(quality.evaluate(&checks(996), at(1)).standing, Standing::Met);
        let year = objective("batch_freshness");
        let mut hundred = vec![0; 100];
        hundred[7] = 99_999;
        assert_eq!(year.over(&ages(&hundred), at(-1), at(100)).standing, Standing::Met, "one day in a hundred");
        hundred[8] = 99_999;
        let status = year.over(&ages(&hundred), at(-1), at(100));
        assert_eq!((status.standing, status.budget()), (Standing::Missed, (1, 2)));
        assert_eq!(status.burn_rate().map(|b| b.to_string()), Some("200.000 %".into()));
    }

    #[test]
    fn what_is_no_objective_is_named_with_its_place() {
        let good = FILES[0].1;
        for (from, to, words) in [
            ("op: lt", "op: near", "objectives[0].op: found near, expected one of lt, lte, gt, gte"),
            ("target: 0.99", "target: 1.5", "objectives[0].target: found 1.5, expected a decimal below 1"),
            ("duration: 30d", "duration: 30m", "spec.timeWindow: found 30m"),
            ("  service:", "  servicio: x\n  service:", "servicio"),
            ("type: simulacro", "type: prometheus", "metricSource.type: found prometheus"),
        ] {
            let text = good.replacen(from, to, 1);
            assert_ne!(text, good, "{from}");
            let error = Objective::parse("a.yaml", &text).expect_err(to).to_string();
            assert!(error.starts_with("a.yaml: ") && error.contains(words), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_two_parts_of_a_period_add_up_to_it(ages_s in prop::collection::vec(0_u64..50_000, 0..60), cut in 0_i64..60) {
            let objective = objective("batch_freshness");
            let samples = ages(&ages_s);
            let whole = objective.over(&samples, at(-1), at(60));
            let (left, right) = (objective.over(&samples, at(-1), at(cut)), objective.over(&samples, at(cut), at(60)));
            prop_assert_eq!((left.good + right.good, left.total + right.total), (whole.good, whole.total));
            prop_assert_eq!(whole.good, ages_s.iter().filter(|s| **s < 21_600).count() as u64);
        }

        #[test]
        fn a_budget_is_overspent_exactly_when_the_promise_is_broken(good in 0_u64..2_000, bad in 0_u64..50) {
            let objective = objective("batch_freshness");
            let status = Status {
                name: String::new(), from: at(0), to: at(1), good, total: good + bad, target: objective.target, standing: Standing::Met,
            };
            let (may, spent) = status.budget();
            let kept = status.attained().is_none_or(|attained| attained >= status.target);
            prop_assert_eq!(spent <= may, kept);
        }
    }
}
