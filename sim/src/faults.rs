//! The faults of a scenario, as data: what is struck, when, and how it heals.
//!
//! A fault on the data changes what the source holds before the run; a fault on a service strikes at its calls. Each
//! counts its hits, since a fault that never fired proves nothing.

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};

use crate::store::Operation;

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
        /// Only rows of this day; without it, of all days.
        fecha: Option<NaiveDate>,
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
    /// A fault of the object store.
    Store(StoreFault),
    /// The worker dies when the object store counts these calls, and is started again.
    WorkerCrash {
        /// Numbers of calls, from 1, counted over the whole run.
        at_calls: Vec<u64>,
        /// Seconds until it is started again.
        down_s: u64,
    },
}

/// A fault of the object store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum StoreFault {
    /// Calls are answered 503 SlowDown and nothing happens.
    Unavailable {
        /// Which calls.
        operation: Operation,
        /// Only paths that contain this.
        path: String,
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
        /// At most so often; it heals then even if the time is not over.
        times: u64,
    },
    /// The call takes effect, and its answer is lost.
    ReplyLost {
        /// Which calls.
        operation: Operation,
        /// Only paths that contain this.
        path: String,
        /// Matching calls that are left alone first.
        after: u64,
        /// At most so often.
        times: u64,
    },
    /// Writes fail with ENOSPC.
    NoSpace {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
}

impl StoreFault {
    /// Whether the fault strikes a call, given how many matching calls it has counted.
    pub fn strikes(&self, called: Operation, at_path: &str, now: DateTime<Utc>, hits: u64) -> bool {
        match self {
            Self::Unavailable { operation, path, from, to, times } => {
                called == *operation && at_path.contains(path.as_str()) && (*from..*to).contains(&now) && hits < *times
            }
            Self::ReplyLost { operation, path, after, times } => {
                called == *operation && at_path.contains(path.as_str()) && hits < after + times
            }
            Self::NoSpace { from, to } => called == Operation::Put && (*from..*to).contains(&now),
        }
    }

    /// Whether the answer of a matching call is lost, when it is the `hits`-th, from 1.
    pub fn loses_reply(&self, hits: u64) -> bool {
        matches!(self, Self::ReplyLost { after, .. } if hits > *after)
    }

    /// How often it really struck.
    pub fn effective(&self, hits: u64) -> u64 {
        match self {
            Self::ReplyLost { after, .. } => hits.saturating_sub(*after),
            Self::Unavailable { .. } | Self::NoSpace { .. } => hits,
        }
    }
}
