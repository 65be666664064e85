//! The simulated run ledger: a database in memory, and its clients.
//!
//! The database lives outside the processes, so it keeps what a dead one wrote. Each process has a client of its own; what
//! a client holds is free once it is dropped, or once it is told that its process died. What this leaves out: latency and
//! errors, which wrappers add.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, SubsecRound, Utc};
use simulacro_core::{
    contract::check::QualityResult,
    ports::{BUSY, FENCED, Fact, Fence, Fold, Lease, PipelineMetric, PortError, Result, Run, RunLedger, RunStart, RunState},
};

use crate::host::Host;

#[derive(Debug, Default)]
struct Database {
    runs: BTreeMap<(String, NaiveDate, i64), Run>,
    /// Runs that are under way: a year of short ones is too many to be searched at each start.
    running: BTreeSet<(String, NaiveDate, i64)>,
    /// Who holds a pipeline: client, day and epoch.
    held: BTreeMap<String, (u64, NaiveDate, i64)>,
    /// The last lease of each name, and whether it was released.
    leases: BTreeMap<String, (Lease, bool)>,
    facts: BTreeMap<(String, String), Fact>,
    metrics: BTreeMap<(NaiveDate, String, String), PipelineMetric>,
    quality: BTreeMap<(NaiveDate, DateTime<Utc>, String, String), QualityResult>,
    clients: u64,
}

impl Database {
    fn present(&self, name: &str) -> Option<&Lease> {
        self.leases.get(name).filter(|(_, released)| !released).map(|(lease, _)| lease)
    }

    fn check(&self, what: &str, fence: Option<&Fence>) -> Result<()> {
        let Some(fence) = fence else { return Ok(()) };
        let present = self.present(&fence.lease).map(|l| l.token);
        if present == Some(fence.token) {
            return Ok(());
        }
        let text = format!("{what} under token {} of lease {}: its token is {present:?}", fence.token, fence.lease);
        Err(PortError::permanent(text).code(FENCED))
    }

    fn put(&mut self, fact: &Fact) {
        let key = (fact.topic.clone(), fact.name.clone());
        if fact.value.is_null() {
            self.facts.remove(&key);
        } else {
            self.facts.insert(key, Fact { at: micro(fact.at), ..fact.clone() });
        }
    }

    fn let_go(&mut self, client: u64, run: &Run) {
        if self.held.get(&run.pipeline) == Some(&(client, run.fecha, run.epoch)) {
            self.held.remove(&run.pipeline);
        }
    }
}

/// A process's connection to the ledger.
#[derive(Debug)]
pub struct SimLedger {
    database: Arc<Mutex<Database>>,
    host: Arc<Host>,
    client: u64,
}

impl Drop for SimLedger {
    fn drop(&mut self) {
        if let Ok(mut database) = self.database.lock() {
            database.held.retain(|_, (client, _, _)| *client != self.client);
        }
    }
}

fn poisoned<T>(_: T) -> PortError {
    PortError::permanent("a simulated service panicked while it held its state")
}

/// Databases keep times to the microsecond.
fn micro(time: DateTime<Utc>) -> DateTime<Utc> {
    time.trunc_subsecs(6)
}

impl SimLedger {
    /// An empty ledger, and the connection of `host` to it.
    pub fn new(host: Arc<Host>) -> Self {
        Self { database: Arc::default(), host, client: 0 }
    }

    /// A connection of another process to the same ledger.
    ///
    /// # Errors
    /// When a client has panicked.
    pub fn connect(&self, host: Arc<Host>) -> Result<Self> {
        let mut database = self.database.lock().map_err(poisoned)?;
        database.clients += 1;
        Ok(Self { database: self.database.clone(), host, client: database.clients })
    }

    /// What a database does when the connection of a dead client breaks: its lock is free and its run is closed.
    pub fn client_died(&self, now: DateTime<Utc>) {
        let Ok(mut database) = self.database.lock() else { return };
        let Database { runs, held, .. } = &mut *database;
        held.retain(|pipeline, (client, fecha, epoch)| {
            if *client != self.client {
                return true;
            }
            if let Some(run) = runs.get_mut(&(pipeline.clone(), *fecha, *epoch))
                && run.state == RunState::Running
            {
                run.state = RunState::Failed;
                run.finished_at = Some(now);
            }
            false
        });
    }
}

#[async_trait]
impl RunLedger for SimLedger {
    async fn start(&self, start: &RunStart) -> Result<Run> {
        self.host.only_alive().await;
        let RunStart { pipeline, fecha, run_id, floor, now, scheduled_at, fence } = start;
        let mut database = self.database.lock().map_err(poisoned)?;
        if let Some((client, _, _)) = database.held.get(pipeline) {
            let who = if *client == self.client { "this process" } else { "another process" };
            return Err(PortError::retryable(format!("begin a run of {pipeline}: {who} is running it")).code(BUSY));
        }
        database.check(&format!("begin a run of {pipeline}"), fence.as_ref())?;
        let Database { runs, running, .. } = &mut *database;
        running.retain(|key| {
            if key.0 != *pipeline {
                return true;
            }
            if let Some(run) = runs.get_mut(key).filter(|run| run.state == RunState::Running) {
                run.state = RunState::Failed;
                run.finished_at = Some(*now);
                run.report = serde_json::json!({ "error": "the process died" });
            }
            false
        });
        let same_day = (pipeline.clone(), *fecha, i64::MIN)..=(pipeline.clone(), *fecha, i64::MAX);
        let last = runs.range(same_day).next_back().map_or(0, |((.., epoch), _)| *epoch);
        let run = Run {
            pipeline: pipeline.clone(),
            fecha: *fecha,
            epoch: last.max(*floor) + 1,
            run_id: run_id.clone(),
            state: RunState::Running,
            started_at: *now,
            finished_at: None,
            scheduled_at: *scheduled_at,
            fence: fence.clone(),
            report: serde_json::Value::Null,
        };
        database.runs.insert((pipeline.clone(), *fecha, run.epoch), run.clone());
        database.running.insert((pipeline.clone(), *fecha, run.epoch));
        database.held.insert(pipeline.clone(), (self.client, *fecha, run.epoch));
        Ok(run)
    }
    async fn finish(&self, run: &Run) -> Result<()> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        let allowed = database.check(&format!("finish a run of {}", run.pipeline), run.fence.as_ref());
        database.let_go(self.client, run);
        allowed?;
        let key = (run.pipeline.clone(), run.fecha, run.epoch);
        if run.state == RunState::Running {
            database.running.insert(key.clone());
        } else {
            database.running.remove(&key);
        }
        database.runs.insert(key, run.clone());
        Ok(())
    }
    async fn abandon(&self, run: &Run) -> Result<()> {
        self.host.only_alive().await;
        self.database.lock().map_err(poisoned)?.let_go(self.client, run);
        Ok(())
    }
    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        self.runs_since(pipeline, NaiveDate::MIN).await
    }
    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>> {
        self.host.only_alive().await;
        let database = self.database.lock().map_err(poisoned)?;
        let of_pipeline = database.runs.range((pipeline.to_owned(), from, i64::MIN)..).map(|(_, run)| run);
        Ok(of_pipeline.take_while(|r| r.pipeline == pipeline).cloned().collect())
    }
    async fn fold_runs(&self, fold: &Fold, fence: Option<&Fence>) -> Result<()> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        database.check("fold runs", fence)?;
        database.put(&fold.fact);
        for (fecha, epoch) in &fold.runs {
            let key = (fold.pipeline.clone(), *fecha, *epoch);
            if database.runs.get(&key).is_some_and(|run| run.state != RunState::Running) {
                database.runs.remove(&key);
            }
        }
        Ok(())
    }
    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        let now = micro(now);
        if let Some(lease) = database.present(name).filter(|l| l.expires_at > now) {
            let text = format!("acquire lease {name}: {} holds it until {}", lease.holder, lease.expires_at);
            return Err(PortError::retryable(text).code(BUSY));
        }
        let token = database.leases.get(name).map_or(0, |(lease, _)| lease.token) + 1;
        let (name, holder, expires_at) = (name.to_owned(), holder.to_owned(), micro(now + ttl));
        let lease = Lease { name, holder, token, acquired_at: now, expires_at };
        database.leases.insert(lease.name.clone(), (lease.clone(), false));
        Ok(lease)
    }
    async fn renew_lease(&self, lease: &Lease, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        database.check("renew a lease", Some(&lease.fence()))?;
        let renewed = Lease { expires_at: micro(now + ttl), ..lease.clone() };
        database.leases.insert(lease.name.clone(), (renewed.clone(), false));
        Ok(renewed)
    }
    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        self.host.only_alive().await;
        if let Some((present, released)) = self.database.lock().map_err(poisoned)?.leases.get_mut(&lease.name)
            && present.token == lease.token
        {
            *released = true;
        }
        Ok(())
    }
    async fn lease(&self, name: &str) -> Result<Option<Lease>> {
        self.host.only_alive().await;
        Ok(self.database.lock().map_err(poisoned)?.present(name).cloned())
    }
    async fn put_fact(&self, fact: &Fact, fence: Option<&Fence>) -> Result<()> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        database.check("keep a fact", fence)?;
        database.put(fact);
        Ok(())
    }
    async fn facts(&self, topic: &str) -> Result<Vec<Fact>> {
        self.host.only_alive().await;
        let database = self.database.lock().map_err(poisoned)?;
        Ok(database.facts.values().filter(|f| f.topic == topic).cloned().collect())
    }
    async fn put_metrics(&self, metrics: &[PipelineMetric]) -> Result<()> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        for m in metrics {
            database.metrics.insert((m.fecha, m.run_id.clone(), m.asset.clone()), m.clone());
        }
        Ok(())
    }
    async fn metrics(&self, fecha: NaiveDate) -> Result<Vec<PipelineMetric>> {
        self.host.only_alive().await;
        Ok(self.database.lock().map_err(poisoned)?.metrics.values().filter(|m| m.fecha == fecha).cloned().collect())
    }
    async fn put_quality(&self, results: &[QualityResult]) -> Result<()> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        for r in results {
            let checked_at = micro(r.checked_at);
            let key = (r.fecha, checked_at, r.asset.clone(), r.check.clone());
            database.quality.insert(key, QualityResult { checked_at, ..r.clone() });
        }
        Ok(())
    }
    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64> {
        self.host.only_alive().await;
        let mut database = self.database.lock().map_err(poisoned)?;
        let from = (fecha, DateTime::<Utc>::MIN_UTC, String::new(), String::new());
        let to = (fecha, DateTime::<Utc>::MAX_UTC, String::new(), String::new());
        let (mut last, mut gone) = (BTreeSet::new(), Vec::new());
        for (key, result) in database.quality.range(from..to).rev() {
            let is_last = last.insert((result.asset.clone(), result.check.clone()));
            if !is_last && result.passed && result.layer == layer && key.1 < micro(before) {
                gone.push(key.clone());
            }
        }
        for key in &gone {
            database.quality.remove(key);
        }
        Ok(gone.len() as u64)
    }
    async fn quality(&self, fecha: NaiveDate) -> Result<Vec<QualityResult>> {
        self.host.only_alive().await;
        let database = self.database.lock().map_err(poisoned)?;
        let from = (fecha, DateTime::<Utc>::MIN_UTC, String::new(), String::new());
        Ok(database.quality.range(from..).map(|(_, r)| r).take_while(|r| r.fecha == fecha).cloned().collect())
    }
}
