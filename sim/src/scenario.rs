//! A scenario: one story as strict TOML. Prose says what is at stake; every number is a field.

use chrono::{DateTime, NaiveDate, Utc};
use serde::Deserialize;
use simulacro_core::platform::Config;

/// When a scenario runs in CI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tier {
    /// On every change.
    Pr,
    /// Every night.
    Nightly,
}

/// What must come of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Every invariant holds.
    Holds,
    /// A defence is off, and the invariants must notice.
    Caught,
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// The source refuses connections from `from` (inclusive) to `to` (exclusive).
    SourceUnavailable {
        /// Start.
        from: DateTime<Utc>,
        /// End.
        to: DateTime<Utc>,
    },
    /// Every n-th row arrives with a null region.
    NullRegion {
        /// 1 spoils every row.
        every: usize,
    },
    /// A column of the source is renamed.
    RenamedColumn {
        /// Old name.
        from: String,
        /// New name.
        to: String,
    },
    /// Every n-th row arrives twice.
    DuplicatedRows {
        /// 1 doubles every row.
        every: usize,
    },
}

/// What must be true at the end.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// See [`Verdict`].
    pub verdict: Verdict,
    /// Kinds of the alerts, in order.
    pub alerts: Vec<String>,
    /// Times of the tries to reach the source, to the second, with their outcome: `03:00:16 ECONNREFUSED`.
    pub attempts: Option<Vec<String>>,
    /// The name of the gate that holds the day, when one must.
    pub held_by: Option<String>,
    /// The invariants that a `caught` scenario must see broken.
    #[serde(default)]
    pub broken: Vec<String>,
}

/// The story.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What is at stake, without numbers.
    pub summary: String,
    /// When it runs.
    pub tier: Tier,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// The day of the purchase history whose rows are used.
    pub purchases_of: NaiveDate,
    /// The day they are dated to.
    pub fecha: NaiveDate,
    /// Schedule of the run.
    pub scheduled: DateTime<Utc>,
    /// When the run really starts.
    pub starts: DateTime<Utc>,
    /// When the mart must be there.
    pub sla: DateTime<Utc>,
    /// Length of a simulation step in milliseconds.
    pub tick_ms: u64,
    /// How often the day is run; later runs begin when the earlier one has ended.
    pub runs: u32,
    /// The platform's configuration.
    pub config: Config,
    /// Faults.
    #[serde(default)]
    pub fault: Vec<Fault>,
    /// Expectations.
    pub expect: Expect,
}
