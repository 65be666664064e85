//! A process whose clock is wrong: it sees another time than the world has, and waits as long as it should, since waiting
//! goes by the monotonic clock.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use simulacro_core::ports::Env;

use super::Strikes;

/// The store refuses requests of a clock that is wrong by more seconds than this.
pub const STORE_ALLOWS_S: u64 = 900;

/// When a clock is wrong, in true time, and by how many seconds.
pub type Skew = (DateTime<Utc>, DateTime<Utc>, i64);

/// An environment whose clock is wrong at times.
#[derive(Debug)]
pub struct SkewedEnv {
    inner: Arc<dyn Env>,
    skews: Mutex<Vec<(Skew, Strikes)>>,
}

impl SkewedEnv {
    /// The environment that these skews will befall.
    pub fn new(inner: Arc<dyn Env>, skews: Vec<Skew>) -> Self {
        Self { inner, skews: Mutex::new(skews.into_iter().map(|s| (s, Strikes::default())).collect()) }
    }

    /// How often each skew was seen, in the order they were given.
    pub fn strikes(&self) -> Vec<Strikes> {
        self.skews.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, strikes)| *strikes).collect()
    }
}

#[async_trait]
impl Env for SkewedEnv {
    fn now(&self) -> DateTime<Utc> {
        let truth = self.inner.now();
        let mut seen = truth;
        for ((from, to, by_s), strikes) in self.skews.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            if (*from..*to).contains(&truth) {
                strikes.strike(truth);
                seen += chrono::Duration::seconds(*by_s);
            }
        }
        seen
    }
    async fn sleep(&self, duration: Duration) {
        self.inner.sleep(duration).await;
    }
    fn random(&self) -> u64 {
        self.inner.random()
    }
    fn new_id(&self) -> String {
        self.inner.new_id()
    }
}
