//! A process of the platform as the simulator sees it: it can die between two calls to a service, and start again.
//!
//! Death is decided at a call, in the middle of whatever the process does. From then on no service answers it and no
//! port returns to it; the driver removes its tasks at the end of the step. What the services have stored stays.

use std::{
    collections::BTreeSet,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// A process with its fate.
#[derive(Debug)]
pub struct Host {
    /// Name on the simulated network.
    pub name: &'static str,
    dies_at: Mutex<BTreeSet<u64>>,
    dead: AtomicBool,
    deaths: AtomicU64,
}

impl Host {
    /// A process that will die when the object store counts these calls.
    pub fn new(name: &'static str, dies_at: impl IntoIterator<Item = u64>) -> Self {
        let dies_at = Mutex::new(dies_at.into_iter().collect());
        Self { name, dies_at, dead: AtomicBool::new(false), deaths: AtomicU64::new(0) }
    }

    /// Whether the process lives to see the answer of this call, the `number`-th.
    pub fn survives_call(&self, number: u64) -> bool {
        if self.is_dead() {
            return false;
        }
        let dies = self.dies_at.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        if dies {
            self.dead.store(true, Ordering::SeqCst);
            self.deaths.fetch_add(1, Ordering::SeqCst);
        }
        !dies
    }

    /// Whether the process has died and not been started again.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Dies now.
    pub fn die(&self) {
        self.dead.store(true, Ordering::SeqCst);
        self.deaths.fetch_add(1, Ordering::SeqCst);
    }

    /// How often it died.
    pub fn deaths(&self) -> u64 {
        self.deaths.load(Ordering::SeqCst)
    }

    /// Starts it again.
    pub fn revive(&self) {
        self.dead.store(false, Ordering::SeqCst);
    }

    /// Returns at once in a living process and never in a dead one.
    pub async fn only_alive(&self) {
        if self.is_dead() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits in virtual time.
    #[expect(clippy::disallowed_methods, reason = "tokio's clock is virtual here")]
    pub async fn sleep(&self, duration: Duration) {
        if !duration.is_zero() {
            tokio::time::sleep(duration).await;
        }
    }
}
