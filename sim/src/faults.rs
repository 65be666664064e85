//! The faults of a scenario, as data: what is struck, when, and how it heals.
//!
//! A fault on the data changes what the source holds, for as long as it lasts; a fault on a service strikes at its calls; a
//! fault of a deploy changes what the worker does. Each counts its hits, since a fault that never fired proves nothing. The
//! modules below are the faults of one target each: the data, and the small pure functions that say when it strikes.

pub mod catalogue;
pub mod clock;
pub mod data;
pub mod deploy;
pub mod dimensions;
pub mod removal;
pub mod service;
pub mod source;

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};

pub use catalogue::CATALOGUE;

use crate::{dimension_api::ApiFault, store::Operation};
use data::DataFault;
use deploy::DeployFault;
use service::ServiceFault;
use source::SourceFault;

/// How often a fault struck, and when first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Strikes {
    /// How often.
    pub hits: u64,
    /// When first.
    pub first: Option<DateTime<Utc>>,
}

impl Strikes {
    /// Counts a strike.
    pub fn strike(&mut self, now: DateTime<Utc>) {
        self.hits += 1;
        self.first.get_or_insert(now);
    }
}

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
        /// When the rows are mended at the source, exclusive; without it, never.
        to: Option<DateTime<Utc>>,
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
    /// A fault of the source's server.
    Source(SourceFault),
    /// A fault of what the source holds.
    Data(DataFault),
    /// A fault of the dimension API.
    DimensionApi {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
        /// What goes wrong.
        fault: ApiFault,
    },
    /// A fault of the ledger or the warehouse.
    Service(ServiceFault),
    /// A fault of the build that is deployed, or of a neighbour's.
    Deploy(DeployFault),
    /// The worker's clock is wrong. By more than a quarter of an hour, the store refuses its requests.
    Clock {
        /// Start, inclusive, in true time.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
        /// Seconds by which it is ahead; behind, when negative.
        by_s: i64,
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
        /// Only paths that contain this.
        #[serde(default)]
        path: String,
    },
    /// A share of all calls is answered 503 SlowDown.
    Throttled {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
        /// So many calls ...
        refused: u64,
        /// ... of so many.
        of: u64,
    },
    /// Requests vanish and no answer comes: the client gives up after its deadline.
    BlackHole {
        /// Which calls.
        operation: Operation,
        /// Only paths that contain this.
        path: String,
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
        /// At most so often.
        times: u64,
    },
    /// The body of an object ends in the middle.
    Truncated {
        /// Only paths that contain this.
        path: String,
        /// Matching calls that are left alone first.
        after: u64,
        /// At most so often.
        times: u64,
    },
    /// The credentials run out: every call is answered 400 ExpiredToken, until they are rotated.
    TokenExpired {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// Writes that still succeed after the start: the token runs out in the middle of them.
        after_puts: u64,
        /// The rotation, exclusive.
        to: DateTime<Utc>,
    },
    /// Somebody removes objects past the platform, as `rm -rf` does: no call meets it.
    PrefixRemoved {
        /// Only paths that begin with this.
        prefix: String,
        /// Paths that contain this are spared; empty spares none.
        #[serde(default)]
        spares: String,
        /// Only objects written from then on, inclusive; without it, all.
        written_from: Option<DateTime<Utc>>,
        /// When.
        at: DateTime<Utc>,
        /// Whether their versions go, too, as in a store that keeps none.
        for_good: bool,
    },
    /// Somebody copies objects back past the platform and is interrupted: each is there, and ends in its middle.
    PrefixCut {
        /// Only paths that begin with this.
        prefix: String,
        /// When.
        at: DateTime<Utc>,
    },
    /// The caller's clock is wrong: every call is answered 403 RequestTimeTooSkewed.
    TooSkewed {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
}

/// What a strike at a call of the store does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreStrike {
    /// The matching call is counted and left alone.
    Spared,
    /// 503 SlowDown.
    SlowDown,
    /// It takes effect, and its answer is lost.
    ReplyLost,
    /// ENOSPC.
    NoSpace,
    /// No answer.
    Silence,
    /// The body ends in the middle.
    Truncated,
    /// 400 ExpiredToken.
    ExpiredToken,
    /// 403 RequestTimeTooSkewed.
    TooSkewed,
}

impl StoreFault {
    /// What the fault does to a call, given how many matching calls it has counted; `None` when the call does not concern it.
    pub fn strikes(&self, called: Operation, at_path: &str, now: DateTime<Utc>, counted: u64) -> Option<StoreStrike> {
        let during = |from: &DateTime<Utc>, to: &DateTime<Utc>| (*from..*to).contains(&now);
        let at = |operation: &Operation, path: &str| called == *operation && at_path.contains(path);
        match self {
            Self::Unavailable { operation, path, from, to, times } => {
                (at(operation, path) && during(from, to) && counted < *times).then_some(StoreStrike::SlowDown)
            }
            Self::ReplyLost { operation, path, after, times } => (at(operation, path) && counted < after + times)
                .then_some(if counted >= *after { StoreStrike::ReplyLost } else { StoreStrike::Spared }),
            Self::NoSpace { from, to, path } => (at(&Operation::Put, path) && during(from, to)).then_some(StoreStrike::NoSpace),
            Self::Throttled { from, to, refused, of } => during(from, to).then_some(if counted % (*of).max(1) < *refused {
                StoreStrike::SlowDown
            } else {
                StoreStrike::Spared
            }),
            Self::BlackHole { operation, path, from, to, times } => {
                (at(operation, path) && during(from, to) && counted < *times).then_some(StoreStrike::Silence)
            }
            Self::Truncated { path, after, times } => (at(&Operation::Get, path) && counted < after + times)
                .then_some(if counted >= *after { StoreStrike::Truncated } else { StoreStrike::Spared }),
            Self::TokenExpired { from, after_puts, to } => match (during(from, to), counted < *after_puts) {
                (false, _) => None,
                (true, true) => (called == Operation::Put).then_some(StoreStrike::Spared),
                (true, false) => Some(StoreStrike::ExpiredToken),
            },
            Self::PrefixRemoved { .. } | Self::PrefixCut { .. } => None,
            Self::TooSkewed { from, to } => during(from, to).then_some(StoreStrike::TooSkewed),
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
