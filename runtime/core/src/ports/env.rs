//! Clock, sleep and ids: the only source of time and entropy there is.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Utc};

/// Clock, sleep and ids. The only source of time and entropy there is.
#[async_trait]
pub trait Env: fmt::Debug + Send + Sync {
    /// Now, in UTC. In the simulator this is virtual.
    fn now(&self) -> DateTime<Utc>;
    /// Waits for `duration`. Cancel-safe.
    async fn sleep(&self, duration: Duration);
    /// A new id, unique within the ledger; from the seed in the simulator.
    fn new_id(&self) -> String;
    /// A uniformly distributed number, for jitter; from the seed in the simulator.
    fn random(&self) -> u64;
}
