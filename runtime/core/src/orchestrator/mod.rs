//! The orchestrator: which asset runs when, and what happens when it cannot.
//!
//! Assets are data ([`Asset`]) with some [`Work`] behind each, of which nothing else is known here. One process leads, under
//! a lease of the ledger; others stand by. The ledger is the only truth: who takes over reads from it what is done, what was
//! cut off in the middle, who is paused, which breaker is open and which alerts are out, and goes on from there.
//!
//! Time comes from `Env` alone, so that a month runs in seconds in the simulator. What this leaves out: what the assets do,
//! how alerts travel, and backfills, which are planned and applied by hand.

mod asset;
pub mod breaker;
mod incident;
mod leading;
pub mod outbox;
mod pause;
mod plan;
mod source;
mod status;
mod turns;

use std::time::Duration;

use chrono::{DateTime, Utc};

pub use asset::{Asset, Job, Schedule, Slot, Work, WorkError};
pub use breaker::{BreakerPolicy, schema_hash, source_checks};
pub use leading::{LEASE, Orchestrator, OrchestratorPorts};
pub use pause::{Pause, pause, pauses, resume};
pub use plan::{AssetSettings, LoopConfig, Plan, PlanError, settled};
pub use source::{Attempt, RetryPolicy, SourcePolicy, Telling, Waiting, verify_sources, wait_for_source};
pub use status::{AssetStatus, Status};

use crate::ports::Env;

/// Waits until a time; not at all when it is past.
async fn sleep_until(env: &dyn Env, until: DateTime<Utc>) {
    let left = (until - env.now()).to_std().unwrap_or_default();
    env.sleep(left).await;
}

/// Waits for a future for so long, and drops it then.
async fn within<T>(env: &dyn Env, limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! { biased; done = work => Some(done), () = env.sleep(limit) => None }
}
