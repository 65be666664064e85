//! Starts a worker again that failed for a reason that may pass, a bounded number of times in a row.
//!
//! Each start is a new worker, which restores its state from the log or asks its table; a worker that failed is of no use.
//! Left out: failures that will not pass by themselves, and a process that dies, which are for whoever started the process.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use simulacro_core::ports::{Disposition, Env, PortError};
use tracing::{error, warn};

/// How often and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restarts {
    /// Most restarts in a row.
    pub in_a_row_max: u32,
    /// Wait before the first; it doubles.
    pub first_wait: Duration,
    /// Longest wait.
    pub wait_max: Duration,
    /// A worker that has lasted for so long has worked: what fails then begins a new row.
    pub row_after: Duration,
}

impl Restarts {
    /// Five in a row, from one second to 30, a new row after two minutes.
    pub const STANDARD: Self = Self {
        in_a_row_max: 5,
        first_wait: Duration::from_secs(1),
        wait_max: Duration::from_secs(30),
        row_after: Duration::from_secs(120),
    };

    /// The wait before a restart, by its number in the row, from 1; `None` when there were too many.
    fn wait(&self, number: u32) -> Option<Duration> {
        let wait = self.first_wait.saturating_mul(1 << number.saturating_sub(1).min(16)).min(self.wait_max);
        (number <= self.in_a_row_max).then_some(wait)
    }
}

/// The part of `Env` that is needed here.
pub trait Clock {
    /// Milliseconds since 1970.
    fn now_ms(&self) -> i64;
    /// Waits.
    fn sleep(&self, duration: Duration) -> impl Future<Output = ()> + Send;
}

/// That of the ports.
#[derive(Debug, Clone)]
pub struct EnvClock(pub Arc<dyn Env>);

impl Clock for EnvClock {
    fn now_ms(&self) -> i64 {
        self.0.now().timestamp_millis()
    }
    async fn sleep(&self, duration: Duration) {
        self.0.sleep(duration).await;
    }
}

/// Done when somebody asks the process to stop, by an interrupt or as whoever runs services does, or after so long. To be made
/// once and kept: what is said while nobody listens is not heard.
pub async fn asked_to_stop(after: Option<Duration>) {
    let terminate = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let over = async {
        match after {
            Some(after) => tokio::time::sleep(after).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! { biased; () = interrupt => {}, () = terminate => {}, () = over => {} }
}

/// How often a wait looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Runs `once` until it ends well, fails for good, fails too often in a row, or `stop` is said while it waits.
///
/// # Errors
/// The error of the last start.
pub async fn supervise<T, F: Future<Output = Result<T, PortError>>>(
    name: &str,
    env: &impl Clock,
    stop: &AtomicBool,
    limits: Restarts,
    mut once: impl FnMut() -> F,
) -> Result<T, PortError> {
    let mut in_a_row = 0;
    loop {
        let began = env.now_ms();
        let failure = match once().await {
            Ok(done) => return Ok(done),
            Err(failure) => failure,
        };
        let lasted = Duration::from_millis(env.now_ms().saturating_sub(began).max(0).unsigned_abs());
        in_a_row = if lasted >= limits.row_after { 1 } else { in_a_row + 1 };
        let wait = match (failure.disposition, limits.wait(in_a_row)) {
            (Disposition::Retryable | Disposition::Unknown, Some(wait)) => wait,
            (Disposition::Permanent, _) | (_, None) => {
                error!(name, error = %failure.chain(), in_a_row, "failed, not started again");
                return Err(failure);
            }
        };
        warn!(name, error = %failure.chain(), in_a_row, wait_ms = wait.as_millis(), "failed, starting again");
        let mut left = wait;
        while !left.is_zero() {
            if stop.load(Ordering::Relaxed) {
                return Err(failure);
            }
            let part = left.min(LOOK_EVERY);
            env.sleep(part).await;
            left -= part;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, sync::atomic::AtomicI64};

    use super::*;

    /// A clock that moves when somebody sleeps.
    #[derive(Debug, Default)]
    struct Fake(AtomicI64);

    impl Clock for Fake {
        fn now_ms(&self) -> i64 {
            self.0.load(Ordering::SeqCst)
        }
        async fn sleep(&self, duration: Duration) {
            self.0.fetch_add(duration.as_millis() as i64, Ordering::SeqCst);
        }
    }

    /// Runs what each start comes to after so many seconds; returns the outcome, the starts, and the seconds that passed.
    fn check(starts: Vec<(u64, Result<u32, PortError>)>) -> (Result<u32, Option<String>>, usize, i64) {
        let (clock, stop, count) = (Fake::default(), AtomicBool::new(false), Cell::new(0));
        let mut starts = starts.into_iter();
        let once = || {
            count.set(count.get() + 1);
            let (seconds, result) = starts.next().expect("no further start");
            let clock = &clock;
            async move {
                clock.sleep(Duration::from_secs(seconds)).await;
                result
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let ended = runtime.block_on(supervise("worker-0", &clock, &stop, Restarts::STANDARD, once));
        (ended.map_err(|e| e.code), count.get(), clock.0.load(Ordering::SeqCst) / 1_000)
    }

    #[test]
    fn a_failure_that_may_pass_is_tried_again_with_growing_waits_and_not_for_ever() {
        let passing = || (0, Err(PortError::retryable("poll").code("BROKER_DOWN")));
        let unknown = || (0, Err(PortError::unknown("commit")));
        assert_eq!(check(vec![passing(), unknown(), (0, Ok(7))]), (Ok(7), 3, 1 + 2));
        let (ended, starts, seconds) = check((0..9).map(|_| passing()).collect());
        assert_eq!((ended, starts, seconds), (Err(Some("BROKER_DOWN".into())), 6, 1 + 2 + 4 + 8 + 16));
    }

    #[test]
    fn one_that_has_lasted_begins_a_new_row() {
        let mut starts: Vec<_> = (0..4).map(|_| (0, Err(PortError::retryable("poll")))).collect();
        starts.push((120, Err(PortError::retryable("poll"))));
        starts.push((0, Ok(1)));
        assert_eq!(check(starts), (Ok(1), 6, 1 + 2 + 4 + 8 + 120 + 1));
    }

    #[test]
    fn one_that_will_never_work_is_not_started_again() {
        let fenced = PortError::permanent("commit").code("INVALID_PRODUCER_EPOCH");
        assert_eq!(check(vec![(0, Err(fenced))]), (Err(Some("INVALID_PRODUCER_EPOCH".into())), 1, 0));
    }
}
