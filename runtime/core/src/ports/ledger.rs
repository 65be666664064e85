//! The run ledger: the one truth on runs, on who may run, and on what was measured and checked.

use std::{fmt, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};

use super::Result;
use crate::contract::check::QualityResult;

/// Code of the error that a holder gets whose lease is no longer its own. It must stop: somebody else is at work.
pub const FENCED: &str = "FENCED";
/// Code of the error while somebody else holds what was asked for.
pub const BUSY: &str = "BUSY";

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Under way, or its process died.
    Running,
    /// Published.
    Succeeded,
    /// Gave up; the previous version stays published.
    Failed,
    /// Stopped by a gate; the previous version stays published.
    Held,
    /// Never worked: its asset was paused, its turn was missed, or what it depends on did not succeed. The report says why.
    Skipped,
}

impl RunState {
    /// The word in the ledger, in metrics and for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Held => "held",
            Self::Skipped => "skipped",
        }
    }

    /// The state of that name.
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Running, Self::Succeeded, Self::Failed, Self::Held, Self::Skipped].into_iter().find(|s| s.as_str() == name)
    }
}

/// Under which lease something is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// Name of the lease.
    pub lease: String,
    /// Token that its holder was given.
    pub token: i64,
}

/// A right that one process has for a time, and the token that tells its writes from those of earlier holders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// What is leased, for example `orchestrator`.
    pub name: String,
    /// Who holds it; unique for each start of a process.
    pub holder: String,
    /// Rises with each change of hands, from 1.
    pub token: i64,
    /// When it was acquired, to the microsecond.
    pub acquired_at: DateTime<Utc>,
    /// From then on anybody may acquire it, to the microsecond.
    pub expires_at: DateTime<Utc>,
}

impl Lease {
    /// What its holder writes under.
    pub fn fence(&self) -> Fence {
        Fence { lease: self.name.clone(), token: self.token }
    }
}

/// A run to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunStart {
    /// Pipeline, for example `ecommerce_batch_daily`.
    pub pipeline: String,
    /// The day that is processed.
    pub fecha: NaiveDate,
    /// Id of the run, unique within the ledger.
    pub run_id: String,
    /// The epoch will be above this one.
    pub floor: i64,
    /// Now.
    pub now: DateTime<Utc>,
    /// The schedule that it answers; `None` for a run by hand.
    pub scheduled_at: Option<DateTime<Utc>>,
    /// The lease that it runs under; `None` for a run by hand.
    pub fence: Option<Fence>,
}

/// One row of the ledger's runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Pipeline, for example `ecommerce_batch_daily`.
    pub pipeline: String,
    /// The day that is processed.
    pub fecha: NaiveDate,
    /// Ordinal of the run for this pipeline and day, from 1.
    pub epoch: i64,
    /// Id of the run.
    pub run_id: String,
    /// State.
    pub state: RunState,
    /// Start.
    pub started_at: DateTime<Utc>,
    /// End; `None` while running.
    pub finished_at: Option<DateTime<Utc>>,
    /// The schedule that it answers; `None` for a run by hand.
    pub scheduled_at: Option<DateTime<Utc>>,
    /// The lease that it runs under; `None` for a run by hand.
    pub fence: Option<Fence>,
    /// Rows by fate and other counts, as JSON.
    pub report: serde_json::Value,
}

/// Something small that outlives the process: that an asset is paused, that a breaker is open, that an alert is out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// Kind, for example `pause`.
    pub topic: String,
    /// What it is about; unique within the topic.
    pub name: String,
    /// What is so; null takes the fact away.
    pub value: serde_json::Value,
    /// Since when, to the microsecond.
    pub at: DateTime<Utc>,
}

/// Runs that go, and what is kept in their place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fold {
    /// Pipeline.
    pub pipeline: String,
    /// Day and epoch of each run that goes.
    pub runs: Vec<(NaiveDate, i64)>,
    /// What says what they came to.
    pub fact: Fact,
}

/// What a task of a run read, wrote and dropped: a row of `metadata.pipeline_metrics`, whose contract has the same columns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipelineMetric {
    /// Pipeline.
    pub pipeline_name: String,
    /// Table or task; unique within the run.
    pub asset: String,
    /// The day that is processed.
    pub fecha: NaiveDate,
    /// Id of the run.
    pub run_id: String,
    /// Rows that came in; of an extraction, those counted at the source in the snapshot that was read.
    pub expected_rows: u64,
    /// Rows that went out.
    pub actual_rows: u64,
    /// Rows of that fate.
    pub published: u64,
    /// Rows of that fate.
    pub deduplicated: u64,
    /// Rows of that fate.
    pub quarantined: u64,
    /// Rows of that fate.
    pub rejected: u64,
    /// Rows of that fate.
    pub late: u64,
    /// Rows of that fate.
    pub dead_lettered: u64,
    /// Bytes written.
    pub bytes: u64,
    /// Milliseconds.
    pub duration_ms: u64,
    /// Version of the pipeline.
    pub version: String,
}

/// The one truth on runs and partitions.
///
/// **Leases and clocks.** Every time here is the caller's. With clocks that differ by at most `s`, a lease may change hands
/// up to `s` before its holder thinks that it expires; a holder that stops `s` before the end of its lease therefore never
/// works beside its successor. Beyond that bound, and for a holder that was stopped in the middle of a call, the token
/// protects: what is begun, finished or put under an old token is refused, whatever any clock says.
#[async_trait]
pub trait RunLedger: fmt::Debug + Send + Sync {
    /// Begins a run with an epoch above `floor` and above every earlier one of its pipeline and day.
    ///
    /// At most one process holds a pipeline at a time; a run whose process died is closed as failed, at `now`.
    ///
    /// # Errors
    /// `Retryable` with code [`BUSY`] when another live process holds the pipeline; the text names it. `Permanent` with
    /// code [`FENCED`] when the lease has changed hands or was released; nothing is written then.
    async fn start(&self, start: &RunStart) -> Result<Run>;
    /// Ends a run and lets go of its pipeline. Idempotent.
    ///
    /// # Errors
    /// `Permanent` with code [`FENCED`] when the lease that the run was begun under has changed hands: the run stays as it
    /// was until its successor closes it, and the pipeline is let go of.
    async fn finish(&self, run: &Run) -> Result<()>;
    /// Lets go of a run's pipeline without an end: its process is to stop, and whoever comes next closes the run.
    /// Idempotent.
    async fn abandon(&self, run: &Run) -> Result<()>;
    /// All runs in order of (fecha, epoch).
    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>>;
    /// The runs of days from `from` on, in order of (fecha, epoch).
    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>>;
    /// Keeps a fact and removes the runs that it sums up: both or neither. Runs that are not there and runs that are under
    /// way are left out. The caller leaves the newest run of each day, so that no epoch is given twice.
    ///
    /// # Errors
    /// `Permanent` with code [`FENCED`] when the lease has changed hands; nothing is written then. After `Unknown`, look
    /// what is there before it is repeated.
    async fn fold_runs(&self, fold: &Fold, fence: Option<&Fence>) -> Result<()>;

    /// Acquires a lease that is free or has expired; its token is above every earlier one.
    ///
    /// # Errors
    /// `Retryable` with code [`BUSY`] while somebody holds it; the text names the holder.
    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration, now: DateTime<Utc>) -> Result<Lease>;
    /// Prolongs a lease until `ttl` from `now`, also one that has expired while nobody has acquired it.
    ///
    /// # Errors
    /// `Permanent` with code [`FENCED`] when it has changed hands or was released.
    async fn renew_lease(&self, lease: &Lease, ttl: Duration, now: DateTime<Utc>) -> Result<Lease>;
    /// Gives a lease back; from then on its token is an old one. Idempotent; one that has changed hands is left alone.
    async fn release_lease(&self, lease: &Lease) -> Result<()>;
    /// Who holds a lease now, expired or not; `None` when nobody does.
    async fn lease(&self, name: &str) -> Result<Option<Lease>>;

    /// Keeps a fact in place of an earlier one of its topic and name. Idempotent.
    ///
    /// # Errors
    /// `Permanent` with code [`FENCED`] when the lease has changed hands; nothing is written then.
    async fn put_fact(&self, fact: &Fact, fence: Option<&Fence>) -> Result<()>;
    /// The facts of a topic in order of name.
    async fn facts(&self, topic: &str) -> Result<Vec<Fact>>;

    /// Keeps what was measured, in place of earlier rows of the same run and asset. Idempotent.
    async fn put_metrics(&self, metrics: &[PipelineMetric]) -> Result<()>;
    /// What was measured of a day, in order of (run, asset).
    async fn metrics(&self, fecha: NaiveDate) -> Result<Vec<PipelineMetric>>;
    /// Keeps the outcomes of checks, in place of earlier rows of the same check, asset, day and time. Idempotent.
    async fn put_quality(&self, results: &[QualityResult]) -> Result<()>;
    /// Removes the outcomes of a layer's checks of a day that passed before a time, but for the last of each check and
    /// asset; says how many went. Idempotent.
    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64>;
    /// The outcomes of a day's checks, in order of (time, asset, check).
    async fn quality(&self, fecha: NaiveDate) -> Result<Vec<QualityResult>>;
}

impl dyn RunLedger + '_ {
    /// Begins a run by hand: one that answers no schedule and runs under no lease.
    ///
    /// # Errors
    /// As for [`RunLedger::start`].
    pub async fn begin(&self, pipeline: &str, fecha: NaiveDate, run_id: &str, floor: i64, now: DateTime<Utc>) -> Result<Run> {
        let (pipeline, run_id) = (pipeline.to_owned(), run_id.to_owned());
        self.start(&RunStart { pipeline, fecha, run_id, floor, now, scheduled_at: None, fence: None }).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::Contract;

    #[test]
    fn a_metric_has_the_columns_of_its_contract() {
        let text = include_str!("../../../../contracts/odcs/pipeline_metrics.yaml");
        let contract = Contract::parse("pipeline_metrics.yaml", text).expect("the contract parses");
        let metric = PipelineMetric {
            pipeline_name: String::new(),
            asset: String::new(),
            fecha: NaiveDate::default(),
            run_id: String::new(),
            expected_rows: 0,
            actual_rows: 0,
            published: 0,
            deduplicated: 0,
            quarantined: 0,
            rejected: 0,
            late: 0,
            dead_lettered: 0,
            bytes: 0,
            duration_ms: 0,
            version: String::new(),
        };
        let value = serde_json::to_value(metric).expect("a metric is JSON");
        let mut ours: Vec<&str> = value.as_object().expect("an object").keys().map(String::as_str).collect();
        let mut theirs: Vec<&str> = contract.columns.iter().map(|c| c.name.as_str()).collect();
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn each_state_is_found_by_its_word() {
        for state in [RunState::Running, RunState::Succeeded, RunState::Failed, RunState::Held, RunState::Skipped] {
            assert_eq!(RunState::parse(state.as_str()), Some(state));
            assert_eq!(serde_json::to_value(state).expect("a state is JSON"), state.as_str());
        }
        assert_eq!(RunState::parse("lost"), None);
    }
}
