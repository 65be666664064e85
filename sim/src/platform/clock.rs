//! The clock of a world without ticks: tokio's paused clock, which jumps from timer to timer, and what processes see of it.
//!
//! The interposer's clock, from which every library reads, follows each time that the world's own thread asks. Other threads
//! work only while time stands still, so they read it there. What this leaves out: clocks that drift; a skewed one is off by
//! a constant while its fault lasts.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread::ThreadId,
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use simulacro_core::ports::Env;

use super::faults::{Faults, Mode};
use crate::{interpose, rng::Stream};

/// Nanoseconds since 1970.
pub fn nanos(time: DateTime<Utc>) -> u64 {
    time.timestamp_nanos_opt().and_then(|n| u64::try_from(n).ok()).unwrap_or_default()
}

/// True time.
#[derive(Debug)]
pub struct Clock {
    start: DateTime<Utc>,
    origin: tokio::time::Instant,
    thread: ThreadId,
}

impl Clock {
    /// Begins at `start`, on the thread and in the runtime of the world.
    pub fn new(start: DateTime<Utc>) -> Self {
        Self { start, origin: tokio::time::Instant::now(), thread: std::thread::current().id() }
    }

    /// Now.
    pub fn now(&self) -> DateTime<Utc> {
        if std::thread::current().id() == self.thread {
            let now = self.start + self.origin.elapsed();
            interpose::set_virtual(nanos(now));
            now
        } else {
            DateTime::from_timestamp_nanos(i64::try_from(interpose::virtual_nanos()).unwrap_or(i64::MAX))
        }
    }

    /// Waits in virtual time.
    #[expect(clippy::disallowed_methods, reason = "this is the simulator's clock; tokio's clock is virtual here")]
    pub async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
        // Whoever is woken by it, on whatever thread, reads the time that it is now.
        self.now();
    }

    /// Waits until a time; not at all when it is past.
    pub async fn sleep_until(&self, time: DateTime<Utc>) {
        let left = (time - self.now()).to_std().unwrap_or_default();
        if !left.is_zero() {
            self.sleep(left).await;
        }
    }
}

/// What a process sees of the world: its clock, which a fault may put off, its ids and its entropy.
#[derive(Debug)]
pub struct ProcessEnv {
    clock: Arc<Clock>,
    /// Whose skews it suffers; `None` for a process with a true clock.
    faults: Option<Arc<Faults>>,
    name: String,
    ids: AtomicU64,
    entropy: Mutex<Stream>,
}

impl ProcessEnv {
    /// A process of this name; the name is unique in the world.
    pub fn new(clock: Arc<Clock>, faults: Option<Arc<Faults>>, name: String, entropy: Stream) -> Self {
        Self { clock, faults, name, ids: AtomicU64::new(1), entropy: Mutex::new(entropy) }
    }
}

#[async_trait]
impl Env for ProcessEnv {
    fn now(&self) -> DateTime<Utc> {
        let now = self.clock.now();
        let skew = self.faults.as_ref().and_then(|f| f.offset(Mode::ClockSkew, now)).unwrap_or(0);
        now + TimeDelta::seconds(skew)
    }
    async fn sleep(&self, duration: Duration) {
        self.clock.sleep(duration).await;
    }
    fn random(&self) -> u64 {
        self.entropy.lock().map_or(0, |mut stream| stream.draw())
    }
    fn new_id(&self) -> String {
        format!("{}-{}", self.name, self.ids.fetch_add(1, Ordering::SeqCst))
    }
}
