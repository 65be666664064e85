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

/// One line of the catalogue, for `simulacro-sim faults`.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// `mode`, and `kind` where a mode has several, as a scenario writes them.
    pub mode: &'static str,
    /// The failure mode of the specification that it belongs to, from 1.
    pub failure: u8,
    /// What the platform sees: the real code where there is one.
    pub seen: &'static str,
    /// What must save the day.
    pub defence: &'static str,
    /// An example, as a scenario writes it.
    pub example: &'static str,
}

/// Every fault there is. A test parses each example, and compares the list with the enumeration.
pub const CATALOGUE: [Entry; 8] = [
    Entry {
        mode: "source_unavailable",
        failure: 1,
        seen: "ECONNREFUSED on connect",
        defence: "wait for the source until a deadline, one alert",
        example: "mode = \"source_unavailable\"\nfrom = \"2024-03-18T02:00:00Z\"\nto = \"2024-03-18T04:00:00Z\"",
    },
    Entry {
        mode: "renamed_column",
        failure: 2,
        seen: "another list of columns",
        defence: "the contract holds the day before anything is written",
        example: "mode = \"renamed_column\"\nfrom = \"region\"\nto = \"zona\"",
    },
    Entry {
        mode: "null_region",
        failure: 2,
        seen: "NULL where the contract has none",
        defence: "rows are quarantined with their clause; above a share the day is held",
        example: "mode = \"null_region\"\nevery = 50",
    },
    Entry {
        mode: "duplicated_rows",
        failure: 6,
        seen: "the same row twice",
        defence: "deduplication by _source_hash",
        example: "mode = \"duplicated_rows\"\nevery = 3",
    },
    Entry {
        mode: "store, kind reply_lost",
        failure: 6,
        seen: "ECONNRESET after the write took effect",
        defence: "deterministic names, If-None-Match, Delta txn: a repeat is safe",
        example: "mode = \"store\"\nkind = \"reply_lost\"\noperation = \"put\"\npath = \"/_delta_log/\"\nafter = 1\ntimes = 3",
    },
    Entry {
        mode: "store, kind unavailable",
        failure: 7,
        seen: "503 SlowDown",
        defence: "retries with full jitter and a deadline",
        example: "mode = \"store\"\nkind = \"unavailable\"\noperation = \"get\"\npath = \"\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:02:00Z\"\ntimes = 9",
    },
    Entry {
        mode: "store, kind no_space",
        failure: 8,
        seen: "ENOSPC on write",
        defence: "conditional publish: no torn object is visible; retries after space is freed",
        example: "mode = \"store\"\nkind = \"no_space\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:02:00Z\"",
    },
    Entry {
        mode: "worker_crash",
        failure: 9,
        seen: "the process is gone, in the middle of a write",
        defence: "idempotent writes, manifests, epochs: run again, same tables",
        example: "mode = \"worker_crash\"\nat_calls = [9, 30]\ndown_s = 30",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_lists_every_fault_with_an_example_that_parses() {
        let parsed: Vec<Fault> = CATALOGUE.iter().map(|e| toml::from_str(e.example).expect(e.example)).collect();
        let names: std::collections::BTreeSet<&str> = parsed
            .iter()
            .map(|fault| match fault {
                Fault::SourceUnavailable { .. } => "source_unavailable",
                Fault::NullRegion { .. } => "null_region",
                Fault::RenamedColumn { .. } => "renamed_column",
                Fault::DuplicatedRows { .. } => "duplicated_rows",
                Fault::Store(StoreFault::Unavailable { .. }) => "store, kind unavailable",
                Fault::Store(StoreFault::ReplyLost { .. }) => "store, kind reply_lost",
                Fault::Store(StoreFault::NoSpace { .. }) => "store, kind no_space",
                Fault::WorkerCrash { .. } => "worker_crash",
            })
            .collect();
        assert_eq!(names, CATALOGUE.iter().map(|e| e.mode).collect());
        assert_eq!(names.len(), CATALOGUE.len());
    }
}
