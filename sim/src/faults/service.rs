//! Faults of the ledger and the warehouse: wrappers round the ports that lose answers, or are refused.
//!
//! An answer that is lost came after the call took effect, on a connection that then broke: what the session held is free.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::{
    contract::check::QualityResult,
    ports::{
        Commit, Env, Fact, Fence, Fold, Lease, PipelineMetric, PortError, Result, Run, RunLedger, RunStart, UpsertRows, Warehouse,
    },
};

use super::Strikes;
use crate::ledger::SimLedger;

/// A fault of the ledger or the warehouse.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ServiceFault {
    /// The ledger carries a call out, and its connection breaks before the answer.
    LedgerReplyLost {
        /// Which calls.
        call: LedgerCall,
        /// Such calls that are left alone first.
        after: u64,
        /// At most so often.
        times: u64,
    },
    /// The ledger's disk is full: nothing can be written down.
    LedgerFull {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
    /// The warehouse loads a day, and its connection breaks before the answer.
    WarehouseReplyLost {
        /// Loads that are left alone first.
        after: u64,
        /// At most so often.
        times: u64,
    },
    /// The warehouse does not answer in time, and has done nothing.
    WarehouseTimeout {
        /// Loads that are left alone first.
        after: u64,
        /// At most so often.
        times: u64,
    },
}

/// Calls that write to the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LedgerCall {
    /// A run begins.
    Start,
    /// A run ends.
    Finish,
    /// What was measured or checked is kept.
    Keep,
}

/// How a call ends that a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strike {
    ReplyLost,
    Refused,
    Timeout,
}

/// What a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Called {
    Ledger(LedgerCall),
    Load,
}

/// The faults of one run with what they have done. Shared by the wrappers of all processes.
#[derive(Debug)]
pub struct ServiceState {
    faults: Mutex<Vec<(ServiceFault, Strikes, u64)>>,
    env: Arc<dyn Env>,
}

impl ServiceState {
    /// The faults that will strike.
    pub fn new(faults: Vec<ServiceFault>, env: Arc<dyn Env>) -> Self {
        Self { faults: Mutex::new(faults.into_iter().map(|f| (f, Strikes::default(), 0)).collect()), env }
    }

    /// What each fault has done, in the order they were given.
    pub fn strikes(&self) -> Vec<Strikes> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, strikes, _)| *strikes).collect()
    }

    fn meet(&self, called: Called) -> Option<Strike> {
        let now = self.env.now();
        for (fault, strikes, counted) in self.faults.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            let (matches, after, times, strike) = match fault {
                ServiceFault::LedgerReplyLost { call, after, times } => {
                    (called == Called::Ledger(*call), *after, *times, Strike::ReplyLost)
                }
                ServiceFault::LedgerFull { from, to } => {
                    let matches = matches!(called, Called::Ledger(_)) && (*from..*to).contains(&now);
                    (matches, 0, u64::MAX, Strike::Refused)
                }
                ServiceFault::WarehouseReplyLost { after, times } => (called == Called::Load, *after, *times, Strike::ReplyLost),
                ServiceFault::WarehouseTimeout { after, times } => (called == Called::Load, *after, *times, Strike::Timeout),
            };
            if !matches {
                continue;
            }
            *counted += 1;
            if *counted > after && *counted <= after.saturating_add(times) {
                strikes.strike(now);
                return Some(strike);
            }
        }
        None
    }
}

fn lost(what: &str) -> PortError {
    PortError::unknown(what).code("08006").because("server closed the connection unexpectedly")
}

fn refused(what: &str) -> PortError {
    let text = "could not extend file \"base/16384/16420\": No space left on device";
    PortError::retryable(what).code("53100").because(text)
}

/// A process's connection to the ledger, which faults strike.
#[derive(Debug)]
pub struct FaultyLedger {
    /// The ledger.
    pub inner: Arc<SimLedger>,
    /// The faults.
    pub state: Arc<ServiceState>,
}

impl FaultyLedger {
    async fn meet<T>(&self, call: LedgerCall, what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.state.meet(Called::Ledger(call)) {
            None | Some(Strike::Timeout) => work.await,
            Some(Strike::Refused) => Err(refused(what)),
            Some(Strike::ReplyLost) => {
                work.await?;
                // The session ends with its connection.
                self.inner.client_died(self.state.env.now());
                Err(lost(what))
            }
        }
    }
}

#[async_trait]
impl RunLedger for FaultyLedger {
    async fn start(&self, start: &RunStart) -> Result<Run> {
        let what = format!("begin a run of {}", start.pipeline);
        self.meet(LedgerCall::Start, &what, self.inner.start(start)).await
    }
    async fn finish(&self, run: &Run) -> Result<()> {
        let what = format!("finish a run of {}", run.pipeline);
        self.meet(LedgerCall::Finish, &what, self.inner.finish(run)).await
    }
    async fn abandon(&self, run: &Run) -> Result<()> {
        self.inner.abandon(run).await
    }
    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        self.inner.runs(pipeline).await
    }
    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>> {
        self.inner.runs_since(pipeline, from).await
    }
    async fn fold_runs(&self, fold: &Fold, fence: Option<&Fence>) -> Result<()> {
        self.meet(LedgerCall::Keep, "fold runs", self.inner.fold_runs(fold, fence)).await
    }
    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        self.inner.acquire_lease(name, holder, ttl, now).await
    }
    async fn renew_lease(&self, lease: &Lease, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        self.inner.renew_lease(lease, ttl, now).await
    }
    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        self.inner.release_lease(lease).await
    }
    async fn lease(&self, name: &str) -> Result<Option<Lease>> {
        self.inner.lease(name).await
    }
    async fn put_fact(&self, fact: &Fact, fence: Option<&Fence>) -> Result<()> {
        self.meet(LedgerCall::Keep, "keep a fact", self.inner.put_fact(fact, fence)).await
    }
    async fn facts(&self, topic: &str) -> Result<Vec<Fact>> {
        self.inner.facts(topic).await
    }
    async fn put_metrics(&self, metrics: &[PipelineMetric]) -> Result<()> {
        self.meet(LedgerCall::Keep, "keep metrics", self.inner.put_metrics(metrics)).await
    }
    async fn metrics(&self, fecha: NaiveDate) -> Result<Vec<PipelineMetric>> {
        self.inner.metrics(fecha).await
    }
    async fn put_quality(&self, results: &[QualityResult]) -> Result<()> {
        self.meet(LedgerCall::Keep, "keep outcomes of checks", self.inner.put_quality(results)).await
    }
    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64> {
        self.meet(LedgerCall::Keep, "thin outcomes of checks", self.inner.thin_quality(layer, fecha, before)).await
    }
    async fn quality(&self, fecha: NaiveDate) -> Result<Vec<QualityResult>> {
        self.inner.quality(fecha).await
    }
}

/// The warehouse, which faults strike.
#[derive(Debug)]
pub struct FaultyWarehouse {
    /// The warehouse.
    pub inner: Arc<dyn Warehouse>,
    /// The faults.
    pub state: Arc<ServiceState>,
    /// How long a client waits for an answer.
    pub deadline: Duration,
}

#[async_trait]
impl Warehouse for FaultyWarehouse {
    async fn load_day(&self, table: &str, fecha: NaiveDate, epoch: i64, batches: Vec<RecordBatch>) -> Result<Commit> {
        let what = format!("load {fecha} into {table}");
        match self.state.meet(Called::Load) {
            None | Some(Strike::Refused) => self.inner.load_day(table, fecha, epoch, batches).await,
            Some(Strike::ReplyLost) => {
                self.inner.load_day(table, fecha, epoch, batches).await?;
                Err(lost(&what))
            }
            Some(Strike::Timeout) => {
                self.state.env.sleep(self.deadline).await;
                Err(PortError::unknown(what).code("ETIMEDOUT").because("the warehouse did not answer"))
            }
        }
    }
    async fn upsert_rows(&self, rows: UpsertRows) -> Result<Commit> {
        self.inner.upsert_rows(rows).await
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        self.inner.writer_epoch(table, writer).await
    }
    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>> {
        self.inner.query(sql, tables).await
    }
}
