//! Defences of the batch that a story can do without, one by one, to see that the invariants notice. Nothing in the platform
//! knows of it: a contract, a client or a wrapper is another.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::contract::Contract;

use crate::faults::deploy::{Edit, NO_DEDUP};

/// A defence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Defence {
    /// The contract's clauses on rows, what it requires of columns, and that staging and marts have no sale without a region.
    Contract,
    /// The tests of the models.
    ModelTests,
    /// The bound on how far the mean amount of a day may be from that of earlier days.
    MeanShift,
    /// The bounds on the rows of a day.
    Volume,
    /// Deduplication.
    Dedup,
    /// Overwrites of a day under a mark: without them, each write appends.
    IdempotentWrites,
    /// Errors that will not pass are known as such, and not tried again.
    FailFast,
    /// Calls have a deadline.
    Deadlines,
    /// The rows that came are compared with the count of their snapshot.
    RowCount,
    /// A dimension that does not come is known not to have come.
    Staleness,
}

impl Defence {
    /// The contract without it.
    pub fn contract(self, contract: &mut Contract) {
        match self {
            Self::Contract => {
                contract.clauses.clear();
                for field in &mut contract.fields {
                    field.required = false;
                }
            }
            Self::Volume => (contract.rows_min, contract.rows_max) = (0, u64::MAX),
            Self::MeanShift => contract.mean_shift_max = None,
            Self::ModelTests
            | Self::Dedup
            | Self::IdempotentWrites
            | Self::FailFast
            | Self::Deadlines
            | Self::RowCount
            | Self::Staleness => {}
        }
    }

    /// The edit of statements that takes it away, where there is one.
    pub fn edit(self) -> Option<Edit> {
        let (from, to) = (DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC);
        let texts = match self {
            Self::Dedup => vec![NO_DEDUP],
            // What staging and the marts ask of a region, whatever the contract of the source says.
            Self::Contract => vec![
                ("region IS NULL", "false"),
                ("not_null(\"region\", 'region') AS \"region\"", "nullif(\"region\", '') AS \"region\""),
                (
                    "not_null(\"region_preferida\", 'region_preferida') AS \"region_preferida\"",
                    "nullif(\"region_preferida\", '') AS \"region_preferida\"",
                ),
            ],
            Self::ModelTests
            | Self::MeanShift
            | Self::Volume
            | Self::IdempotentWrites
            | Self::FailFast
            | Self::Deadlines
            | Self::RowCount
            | Self::Staleness => return None,
        };
        Some(Edit { from, to, texts })
    }
}
