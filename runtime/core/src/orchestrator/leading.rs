//! Leading: one process runs the assets, for as long as it holds the lease.
//!
//! A leader stops in the middle of whatever it does when its lease is lost, or so near its end that a machine with another
//! clock might think it over. It lets go of its runs without writing an end; who comes next closes them and runs them again.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::{DateTime, Utc};
use futures::future::{BoxFuture, try_join_all};
use serde_json::json;
use tracing::{error, info, warn};

use super::{
    Plan,
    outbox::{Fencing, Outbox},
    within,
};
use crate::{
    history::Recorder,
    ports::{BUSY, Disposition, Env, FENCED, Fence, Lease, Metrics, Notifier, PortError, Result, Run, RunLedger, RunState},
};

/// Name of the lease of those who run assets.
pub const LEASE: &str = "orchestrator";

/// What an orchestrator needs from outside; the assets' work has its own ports.
#[derive(Debug, Clone)]
pub struct OrchestratorPorts {
    /// Clock and ids.
    pub env: Arc<dyn Env>,
    /// Runs, leases and facts.
    pub ledger: Arc<dyn RunLedger>,
    /// Alerts.
    pub notifier: Arc<dyn Notifier>,
    /// Counters and gauges.
    pub metrics: Arc<dyn Metrics>,
    /// Where decisions are recorded.
    pub recorder: Recorder,
}

/// Runs the assets of a plan.
#[derive(Debug)]
pub struct Orchestrator {
    /// What is run.
    pub plan: Plan,
    /// The world.
    pub ports: OrchestratorPorts,
    /// Name of this process in the lease; unique for each start.
    pub holder: String,
}

/// The lease that is held, and until when it may be relied on.
#[derive(Debug)]
struct Held {
    env: Arc<dyn Env>,
    lease: Mutex<Lease>,
    margin: Duration,
}

impl Held {
    fn lease(&self) -> Lease {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// From then on nothing may be written any more.
    fn ends_at(&self) -> DateTime<Utc> {
        self.lease().expires_at - self.margin
    }
}

impl Fencing for Held {
    fn fence(&self) -> Result<Fence> {
        let lease = self.lease();
        if self.env.now() < self.ends_at() {
            return Ok(lease.fence());
        }
        let text = format!("write under lease {}: it ends at {} and could not be renewed", lease.name, lease.expires_at);
        Err(PortError::permanent(text).code(FENCED))
    }
}

/// One time of leading.
#[derive(Debug)]
pub(super) struct Leading {
    held: Arc<Held>,
    /// Runs that are under way, by asset.
    active: Mutex<BTreeMap<String, Run>>,
    /// Alerts.
    pub(super) outbox: Outbox,
}

impl Leading {
    /// What may be written under.
    pub(super) fn fence(&self) -> Result<Fence> {
        self.held.fence()
    }

    /// The runs under way.
    pub(super) fn active(&self) -> MutexGuard<'_, BTreeMap<String, Run>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why leading ended.
#[derive(Debug)]
enum End {
    Stopped,
    Lost(PortError),
}

impl Orchestrator {
    /// Stands by, leads, and stands by again when the lease is lost, until `stop` is done.
    ///
    /// What is under way at the stop is written down as failed and not final, and the lease is given back, so that the next
    /// orchestrator goes on at once.
    ///
    /// # Errors
    /// An error of the ledger that will not go away by itself.
    pub async fn run(&self, stop: impl Future<Output = ()>) -> Result<()> {
        let mut stop = pin!(stop);
        loop {
            let lease = tokio::select! { biased; () = &mut stop => return Ok(()), lease = self.stand_by() => lease? };
            let Lease { token, expires_at, .. } = &lease;
            info!(holder = %self.holder, token, %expires_at, "leading");
            self.ports.metrics.gauge("simulacro_orchestrator_leading", &[], 1.0);
            let end = self.lead(lease, &mut stop).await;
            self.ports.metrics.gauge("simulacro_orchestrator_leading", &[], 0.0);
            match end? {
                End::Stopped => return Ok(()),
                End::Lost(why) => warn!(holder = %self.holder, why = %why.chain(), "lease lost, standing by"),
            }
        }
    }

    /// Waits for the lease.
    async fn stand_by(&self) -> Result<Lease> {
        let config = &self.plan.config;
        let poll = Duration::from_secs(config.poll_s);
        loop {
            let env = &self.ports.env;
            let ttl = Duration::from_secs(config.lease_ttl_s);
            match self.ports.ledger.acquire_lease(LEASE, &self.holder, ttl, env.now()).await {
                Ok(lease) => return Ok(lease),
                Err(e) if e.disposition == Disposition::Permanent => return Err(e),
                Err(e) if e.code.as_deref() == Some(BUSY) => {}
                Err(e) => warn!(error = %e.chain(), "the ledger does not give a lease"),
            }
            env.sleep(poll).await;
        }
    }

    async fn lead(&self, lease: Lease, stop: &mut (impl Future<Output = ()> + Unpin)) -> Result<End> {
        let ports = &self.ports;
        let margin = Duration::from_secs(self.plan.config.clock_skew_s);
        let held = Arc::new(Held { env: ports.env.clone(), lease: Mutex::new(lease), margin });
        let outbox = Outbox::open(
            ports.env.clone(),
            ports.ledger.clone(),
            ports.notifier.clone(),
            ports.metrics.clone(),
            held.clone(),
            self.plan.config.clone(),
        );
        let outbox = match outbox.await {
            Ok(outbox) => outbox,
            Err(e) if e.disposition == Disposition::Permanent => return Err(e),
            Err(e) => return Ok(End::Lost(e)),
        };
        let leading = Leading { held: held.clone(), active: Mutex::default(), outbox };
        let end = {
            let mut tasks: Vec<BoxFuture<'_, Result<()>>> =
                vec![Box::pin(leading.outbox.deliver()), Box::pin(self.sweep(&leading))];
            for (asset, work) in &self.plan.assets {
                tasks.push(Box::pin(self.attend(&leading, asset, work.as_ref())));
                if let Some(sla_s) = asset.sla_s {
                    tasks.push(Box::pin(self.watch(&leading, asset, sla_s)));
                }
            }
            tokio::select! {
                biased;
                () = stop => Ok(End::Stopped),
                why = self.keep(&held) => Ok(End::Lost(why)),
                done = try_join_all(tasks) => match done {
                    Err(e) if e.code.as_deref() == Some(FENCED) => Ok(End::Lost(e)),
                    Err(e) => Err(e),
                    // No task ends without an error: a schedule comes again.
                    Ok(_) => Err(PortError::permanent("the orchestrator ran out of work")),
                },
            }
        };
        // Whatever was under way has been dropped with its task.
        let active = std::mem::take(&mut *leading.active());
        for run in active.into_values() {
            self.leave(run, matches!(end, Ok(End::Stopped))).await;
        }
        if matches!(end, Ok(End::Stopped) | Err(_))
            && let Err(e) = ports.ledger.release_lease(&held.lease()).await
        {
            warn!(error = %e.chain(), "lease not given back, it will expire");
        }
        end
    }

    /// Lets go of a run that was cut off: with an end while the lease is held, without one otherwise.
    async fn leave(&self, mut run: Run, is_leader: bool) {
        let result = if is_leader {
            run.state = RunState::Failed;
            run.finished_at = Some(self.ports.env.now());
            run.report = json!({ "error": "the orchestrator was stopped", "final": false });
            self.ports.ledger.finish(&run).await
        } else {
            self.ports.ledger.abandon(&run).await
        };
        match result {
            Ok(()) => info!(asset = %run.pipeline, fecha = %run.fecha, epoch = run.epoch, "run left"),
            Err(e) => error!(asset = %run.pipeline, fecha = %run.fecha, epoch = run.epoch, error = %e.chain(), "run not left"),
        }
    }

    /// Renews the lease until it is lost, and says why.
    async fn keep(&self, held: &Held) -> PortError {
        let config = &self.plan.config;
        let ttl = Duration::from_secs(config.lease_ttl_s);
        let mut wait = Duration::from_secs(config.renew_every_s);
        let env = &self.ports.env;
        loop {
            env.sleep(wait).await;
            let left = (held.ends_at() - env.now()).to_std().unwrap_or_default();
            let lease = held.lease();
            let renewed = within(&**env, left, self.ports.ledger.renew_lease(&lease, ttl, env.now())).await;
            match renewed {
                Some(Ok(lease)) => {
                    *held.lease.lock().unwrap_or_else(PoisonError::into_inner) = lease;
                    wait = Duration::from_secs(config.renew_every_s);
                }
                Some(Err(e)) if e.disposition == Disposition::Permanent => return e,
                Some(Err(e)) if env.now() >= held.ends_at() => return e,
                Some(Err(e)) => {
                    warn!(error = %e.chain(), ends_at = %held.ends_at(), "lease not renewed, trying again");
                    wait = Duration::from_secs(1);
                }
                None => {
                    let text = format!("renew lease {}: no answer before it ends", lease.name);
                    return PortError::unknown(text).code("ETIMEDOUT");
                }
            }
        }
    }

    /// Repeats a call to the ledger while its error may pass. Bounded by the lease, which is lost meanwhile when the ledger
    /// stays away. Only for calls that are idempotent.
    pub(super) async fn patiently<T, F: Future<Output = Result<T>>>(&self, call: impl Fn() -> F) -> Result<T> {
        loop {
            match call().await {
                Err(e) if e.disposition != Disposition::Permanent && e.code.as_deref() != Some(BUSY) => {
                    warn!(error = %e.chain(), "the ledger does not answer, trying again");
                    self.ports.env.sleep(Duration::from_secs(self.plan.config.poll_s)).await;
                }
                other => return other,
            }
        }
    }
}
