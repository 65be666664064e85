//! The circuit breaker: checks before processing, and how often they are tried again while they fail.
//!
//! Closed: the last checks passed. Open: they failed, and nothing is looked at until `retry_at`. Half-open: one trial is
//! under way. A turn has a bounded number of trials; after them it is given up with every failure that was found. The state
//! is a fact in the ledger, so that a process that starts again does not begin anew.

use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Slot;
use crate::{
    contract::{Contract, Severity, check::QualityResult},
    ports::{Column, Fact, TableSource},
};

/// Topic of the facts.
pub const TOPIC: &str = "breaker";

/// How often failing checks are tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BreakerPolicy {
    /// Seconds for which it stays open before a trial; at least 1.
    pub open_s: u64,
    /// Trials after the first failure of a turn.
    pub trials: u32,
}

/// Whether anything passes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Breaker {
    /// The last checks passed.
    Closed,
    /// They failed.
    Open {
        /// The turn for which trials are counted.
        scheduled: DateTime<Utc>,
        /// Trials of that turn so far.
        trials: u32,
        /// When the next trial is due.
        retry_at: DateTime<Utc>,
        /// What failed.
        failures: String,
    },
    /// A trial is under way.
    HalfOpen {
        /// The turn for which trials are counted.
        scheduled: DateTime<Utc>,
        /// Trials of that turn so far, this one included.
        trials: u32,
    },
}

impl Breaker {
    /// The state of an asset, closed when there is none. A state that cannot be read counts as closed: the next checks tell.
    pub fn recall(facts: &[Fact], asset: &str) -> Self {
        let fact = facts.iter().find(|f| f.name == asset);
        fact.and_then(|f| serde_json::from_value(f.value.clone()).ok()).unwrap_or(Self::Closed)
    }

    /// What to do at `now` for a turn: `None` to go on with the checks, or the time to wait for.
    pub fn wait(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::Open { retry_at, .. } if *retry_at > now => Some(*retry_at),
            Self::Open { .. } | Self::Closed | Self::HalfOpen { .. } => None,
        }
    }

    /// Trials that the turn has had.
    fn trials(&self, slot: Slot) -> u32 {
        match self {
            Self::Open { scheduled, trials, .. } | Self::HalfOpen { scheduled, trials } if *scheduled == slot.scheduled => {
                *trials
            }
            Self::Open { .. } | Self::HalfOpen { .. } | Self::Closed => 0,
        }
    }

    /// The state in which the checks of a turn begin: half-open for a trial.
    pub fn try_again(&self, slot: Slot) -> Self {
        match self {
            Self::Closed => Self::Closed,
            // Half-open: the process died in the middle of a trial, which then counts once.
            Self::HalfOpen { scheduled, trials } if *scheduled == slot.scheduled => {
                Self::HalfOpen { scheduled: *scheduled, trials: *trials }
            }
            Self::Open { scheduled, trials, .. } if *scheduled == slot.scheduled => {
                Self::HalfOpen { scheduled: *scheduled, trials: trials + 1 }
            }
            // Another turn counts anew; its first checks are no trial of its own.
            Self::Open { .. } | Self::HalfOpen { .. } => Self::HalfOpen { scheduled: slot.scheduled, trials: 0 },
        }
    }

    /// The state after checks that failed, and whether the turn is to be given up.
    pub fn fail(&self, policy: BreakerPolicy, slot: Slot, now: DateTime<Utc>, failures: String) -> (Self, bool) {
        let trials = self.trials(slot);
        let retry_at = now + Duration::from_secs(policy.open_s);
        (Self::Open { scheduled: slot.scheduled, trials, retry_at, failures }, trials >= policy.trials)
    }
}

/// Whether a check failed that must not.
pub fn is_failure(result: &QualityResult) -> bool {
    !result.passed && result.severity == Severity::Error
}

/// The failures among the results in one line; `None` when nothing failed that must not.
pub fn failures(results: &[QualityResult]) -> Option<String> {
    let failed = results.iter().filter(|r| is_failure(r));
    let lines: Vec<String> = failed.map(|r| format!("{}: found {}, expected {}", r.check, r.observed, r.expected)).collect();
    (!lines.is_empty()).then(|| lines.join("; "))
}

/// Whether the only thing that failed is that the source is away.
pub fn is_only_away(results: &[QualityResult]) -> bool {
    let mut failed = results.iter().filter(|r| is_failure(r)).peekable();
    failed.peek().is_some() && failed.all(|r| r.check == "source_available")
}

/// The hash of a schema: sha256 over names and types, without regard to their order, in hex.
pub fn schema_hash(columns: &[Column]) -> String {
    let sorted: BTreeMap<&str, &str> = columns.iter().map(|c| (c.name.as_str(), c.physical_type.as_str())).collect();
    let mut hasher = Sha256::new();
    for (name, physical_type) in sorted {
        // Lengths, so that no name can end where another begins.
        hasher.update((name.len() as u64).to_le_bytes());
        hasher.update(name);
        hasher.update((physical_type.len() as u64).to_le_bytes());
        hasher.update(physical_type);
    }
    hasher.finalize().iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// The layer of the checks before a day is processed.
pub const SOURCE: &str = "source";

/// The three checks before a day of a source table is processed: `source_available`, `min_rows_yesterday` and
/// `schema_unchanged`. All are carried out; one that cannot be has failed, with the reason.
pub async fn source_checks(
    tables: &dyn TableSource,
    contract: &Contract,
    fecha: NaiveDate,
    now: impl Fn() -> DateTime<Utc>,
) -> Vec<QualityResult> {
    let result = |check: &str, passed, observed, expected| QualityResult {
        check: check.into(),
        layer: SOURCE.into(),
        asset: contract.table.clone(),
        fecha,
        severity: Severity::Error,
        passed,
        observed,
        expected,
        failing_rows: 0,
        checked_at: now(),
    };
    let ping = tables.ping().await;
    let observed = ping.as_ref().map_or_else(|e| e.chain(), |()| "it answers".into());
    let available = result("source_available", ping.is_ok(), observed, "it answers".into());

    // Only columns that are there are asked for, so that a changed schema does not hide how many rows there are.
    let found = tables.columns(&contract.table).await;
    let asked: Vec<Column> = match &found {
        Ok(found) => found.iter().filter(|c| contract.columns.contains(c)).cloned().collect(),
        Err(_) => Vec::new(),
    };
    let rows = match &found {
        Ok(_) if asked.is_empty() => Err("none of the contract's columns is there".to_owned()),
        Ok(_) => tables.read_day(&contract.table, fecha, &asked).await.map(|read| read.expected_rows).map_err(|e| e.chain()),
        Err(error) => Err(error.chain()),
    };
    let expected = format!("at least {} rows", contract.rows_min);
    let rows = match rows {
        Ok(rows) => result("min_rows_yesterday", rows >= contract.rows_min, format!("{rows} rows"), expected),
        Err(why) => result("min_rows_yesterday", false, format!("not known: {why}"), expected),
    };

    let expected = format!("schema {}", short(&schema_hash(&contract.columns)));
    let schema = match found {
        Ok(found) => {
            let differences = contract.differences(&found);
            let list = differences.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let hash = schema_hash(&found);
            let is_same = differences.is_empty() && hash == schema_hash(&contract.columns);
            let observed = if is_same { format!("schema {}", short(&hash)) } else { format!("schema {} ({list})", short(&hash)) };
            result("schema_unchanged", is_same, observed, expected)
        }
        Err(error) => result("schema_unchanged", false, format!("not known: {}", error.chain()), expected),
    };
    vec![available, rows, schema]
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(day: u32) -> Slot {
        let scheduled = format!("2024-03-{day:02}T03:00:00Z").parse().expect("a time");
        Slot { scheduled, fecha: NaiveDate::default() }
    }

    #[test]
    fn a_breaker_opens_tries_a_bounded_number_of_times_and_counts_each_turn_anew() {
        let policy = BreakerPolicy { open_s: 600, trials: 2 };
        let (mut breaker, mut now, mut gave_up) = (Breaker::Closed, slot(1).scheduled, Vec::new());
        for _ in 0..3 {
            assert_eq!(breaker.wait(now), None);
            breaker = breaker.try_again(slot(1));
            let (next, over) = breaker.fail(policy, slot(1), now, "rows".into());
            gave_up.push(over);
            assert_eq!(next.wait(now), Some(now + Duration::from_secs(600)));
            (breaker, now) = (next, now + Duration::from_secs(600));
        }
        assert_eq!(gave_up, [false, false, true]);
        let next = breaker.try_again(slot(2));
        assert_eq!(next, Breaker::HalfOpen { scheduled: slot(2).scheduled, trials: 0 });
        assert!(!next.fail(policy, slot(2), now, String::new()).1);
    }

    #[test]
    fn a_trial_in_which_the_process_died_counts_once() {
        let open =
            Breaker::Open { scheduled: slot(1).scheduled, trials: 1, retry_at: slot(1).scheduled, failures: String::new() };
        let trial = open.try_again(slot(1));
        assert_eq!(trial, Breaker::HalfOpen { scheduled: slot(1).scheduled, trials: 2 });
        let value = serde_json::to_value(&trial).expect("a state is JSON");
        let fact = Fact { topic: TOPIC.into(), name: "a".into(), value, at: slot(1).scheduled };
        assert_eq!(Breaker::recall(&[fact], "a").try_again(slot(1)), trial);
        assert_eq!(Breaker::recall(&[], "a"), Breaker::Closed);
    }

    #[test]
    fn the_hash_of_a_schema_tells_names_and_types_and_not_their_order() {
        let column = |name: &str, physical_type: &str| Column { name: name.into(), physical_type: physical_type.into() };
        let of = |columns: &[Column]| schema_hash(columns);
        let (a, b) = (column("a", "string"), column("b", "date"));
        assert_eq!(of(&[a.clone(), b.clone()]), of(&[b.clone(), a.clone()]));
        for other in [vec![a.clone()], vec![a.clone(), column("b", "string")], vec![a, column("bd", "ate")]] {
            assert_ne!(of(&other), of(&[column("a", "string"), b.clone()]));
        }
    }
}
