//! A process of a stream story, and its clock: it can die, stand still, be told to leave, and be replaced.
//!
//! Every wait of a process and every message to and from it passes its *gate*. A dead process never comes through it, a
//! frozen one when it thaws. The driver removes the tasks of a dead one at the end of the step.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use simulacro_core::ports::Env;

use super::faults::{Deed, Faults};
use crate::{interpose, rng::Stream};

#[derive(Debug, Default)]
struct Fate {
    dead: bool,
    /// How long it stays down when it is dead.
    down: Duration,
    thaws: Duration,
    leaving: bool,
    back: Option<Duration>,
    replaced: bool,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Name on the simulated network.
    pub name: String,
    /// Its number among the workers, when it is one.
    pub worker: Option<usize>,
    fate: Mutex<Fate>,
}

/// Time from the start of the simulation, as the running host sees it; between two hosts, as the driver does.
pub fn elapsed(start: DateTime<Utc>) -> Duration {
    turmoil::sim_elapsed().unwrap_or_else(|| {
        let now = DateTime::from_timestamp_nanos(interpose::virtual_nanos().cast_signed());
        (now - start).to_std().unwrap_or_default()
    })
}

impl Process {
    /// A process that lives.
    pub fn new(name: impl Into<String>, worker: Option<usize>) -> Arc<Self> {
        Arc::new(Self { name: name.into(), worker, fate: Mutex::default() })
    }

    fn fate(&self) -> MutexGuard<'_, Fate> {
        self.fate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a deed to it, at a time. A dead one feels nothing.
    pub fn suffer(&self, deed: Deed, now: Duration) {
        let mut fate = self.fate();
        if fate.dead {
            return;
        }
        match deed {
            Deed::Crash(down) => (fate.dead, fate.down) = (true, down),
            Deed::Freeze(time, replaced) => {
                fate.thaws = fate.thaws.max(now + time);
                fate.replaced |= replaced;
            }
            Deed::Leave(time) => (fate.leaving, fate.back) = (true, Some(now + time)),
        }
    }

    /// How long it stays down, when it has died.
    pub fn down(&self) -> Option<Duration> {
        let fate = self.fate();
        fate.dead.then_some(fate.down)
    }
    /// Starts it again: nothing of what it suffered lasts.
    pub fn revive(&self) {
        let mut fate = self.fate();
        *fate = Fate { replaced: fate.replaced, ..Fate::default() };
    }
    /// Whether it is told to leave.
    pub fn is_leaving(&self) -> bool {
        self.fate().leaving
    }
    /// Lets it stay away until it is woken.
    pub fn sleep_in(&self) {
        self.fate().leaving = true;
    }
    /// Lets it come back, or come at all.
    pub fn wake(&self) {
        let mut fate = self.fate();
        (fate.leaving, fate.back) = (false, None);
    }
    /// Lets it come back when its time away is over.
    pub fn wake_when_due(&self, now: Duration) {
        if self.fate().back.is_some_and(|back| now >= back) {
            self.wake();
        }
    }
    /// Whether another process has its name: it must not start again once it has failed.
    pub fn is_replaced(&self) -> bool {
        self.fate().replaced
    }

    /// Lets the living pass, the frozen when they thaw, and the dead never.
    #[expect(clippy::disallowed_methods, reason = "tokio's clock is virtual here")]
    pub async fn gate(&self, start: DateTime<Utc>) {
        loop {
            let (dead, thaws) = {
                let fate = self.fate();
                (fate.dead, fate.thaws)
            };
            if dead {
                std::future::pending::<()>().await;
            }
            let now = elapsed(start);
            if thaws <= now {
                return;
            }
            tokio::time::sleep(thaws - now).await;
        }
    }
}

/// The clock of a process, with what is wrong with it, and its waits.
#[derive(Debug)]
pub struct HostEnv {
    start: DateTime<Utc>,
    process: Arc<Process>,
    faults: Arc<Faults>,
    random: Mutex<Stream>,
    ids: AtomicU64,
}

impl HostEnv {
    /// The clock of `process` in a story that begins at `start`.
    pub fn new(start: DateTime<Utc>, process: Arc<Process>, faults: Arc<Faults>, random: Stream) -> Arc<Self> {
        Arc::new(Self { start, process, faults, random: Mutex::new(random), ids: AtomicU64::new(1) })
    }
    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }
    /// The faults.
    pub fn faults(&self) -> &Faults {
        &self.faults
    }
    /// True time from the start.
    pub fn elapsed(&self) -> Duration {
        elapsed(self.start)
    }
    /// Passes the process's gate.
    pub async fn gate(&self) {
        self.process.gate(self.start).await;
    }
}

#[async_trait]
impl Env for HostEnv {
    fn now(&self) -> DateTime<Utc> {
        let elapsed = self.elapsed();
        self.start + elapsed + chrono::Duration::milliseconds(self.faults.skews(&self.process.name, elapsed))
    }
    #[expect(clippy::disallowed_methods, reason = "this is a simulated Env; tokio's clock is virtual here")]
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
        self.gate().await;
    }
    fn random(&self) -> u64 {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).draw()
    }
    fn new_id(&self) -> String {
        format!("{}-{}", self.process.name, self.ids.fetch_add(1, Ordering::SeqCst))
    }
}

/// The clock of the world itself: right, and the same for all that happens in one step.
#[derive(Debug)]
pub struct WorldEnv;

#[async_trait]
impl Env for WorldEnv {
    fn now(&self) -> DateTime<Utc> {
        DateTime::from_timestamp_nanos(interpose::virtual_nanos().cast_signed())
    }
    #[expect(clippy::disallowed_methods, reason = "this is a simulated Env; tokio's clock is virtual here")]
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn random(&self) -> u64 {
        0
    }
    fn new_id(&self) -> String {
        String::new()
    }
}
