//! The one assembly: production and simulation differ in the `Ports` they hand in, and nowhere else.

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::{
    batch::{self, DayError, DayReport, MART, STAGING},
    contract::Contract,
    dimensions::{self, FetchPolicy, Refreshed},
    history::recorded,
    orchestrator::{Attempt, RetryPolicy, SourcePolicy, verify_sources},
    ports::{Alert, Disposition, PortError, Ports, Run, RunState},
    streaming::{
        codec::{AvroClicks, AvroMetrics},
        config::StreamConfig,
        job::{RealtimeMetrics, StreamPorts},
    },
};

/// Name of the daily pipeline in the ledger.
pub const PIPELINE: &str = "ecommerce_batch_daily";

/// How the platform behaves; every choice is visible, so there is no `Default`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What to do while the source is away.
    pub source_policy: SourcePolicy,
    /// What to do when a run has failed although the source was there.
    pub retry: RetryPolicy,
    /// Seconds after the schedule at which an absent source is worth an alert.
    pub alert_after_s: u64,
    /// Seconds a task needs before its first call; 0 in production, the old system's delay in a replay.
    pub startup_s: u64,
}

/// The platform.
#[derive(Debug)]
pub struct Platform {
    /// Configuration.
    pub config: Config,
    /// Contract of the sales.
    pub contract: Contract,
    /// How often a dimension is asked for before its version before has to do.
    pub fetching: FetchPolicy,
    /// Ports, with the recording wrapper on each.
    pub ports: Ports,
}

/// What a run of a day came to.
#[derive(Debug)]
pub struct DayOutcome {
    /// The ledger's row.
    pub run: Run,
    /// Tries to reach the source.
    pub attempts: Vec<Attempt>,
    /// The report or the reason.
    pub result: Result<DayReport, DayError>,
}

impl Platform {
    /// Assembles the platform; the only wiring there is.
    pub fn new(config: Config, contract: Contract, ports: Ports) -> Self {
        Self { config, contract, fetching: FetchPolicy::STANDARD, ports: recorded(ports) }
    }

    /// Runs one day: waits for the source as the policy says, then extracts, validates and publishes. A run that failed
    /// for a reason that may pass is tried again as the retry policy says, each try under an epoch of its own.
    ///
    /// # Errors
    /// When a run could not begin or its end could not be written down; a day that failed or is held is an
    /// `Ok` with the reason inside, because the ledger knows of it.
    pub async fn run_day(&self, fecha: NaiveDate, scheduled: DateTime<Utc>) -> Result<DayOutcome, DayError> {
        let (env, mut tried) = (&self.ports.env, 0);
        let mut attempts = Vec::new();
        loop {
            let mut source_failed = false;
            let result = self.try_day(fecha, scheduled, &mut attempts, &mut source_failed).await;
            tried += 1;
            let passing = match &result {
                Ok((_, Err(DayError::Port { source, .. }))) | Err(DayError::Port { source, .. }) => {
                    // A pipeline that somebody else runs is no failure of ours.
                    source.disposition != Disposition::Permanent && source.code.as_deref() != Some("BUSY")
                }
                Ok((_, Ok(_) | Err(DayError::Held { .. }))) | Err(DayError::Held { .. }) => false,
            };
            let next = self.config.retry.next(tried, scheduled, env.now(), env.random());
            if let Some(next) = next.filter(|_| passing && !source_failed) {
                warn!(%fecha, tried, %next, "run failed and will be tried again");
                env.sleep((next - env.now()).to_std().unwrap_or_default()).await;
                continue;
            }
            let (run, result) = result?;
            self.tell(&run, source_failed, &result).await.map_err(|source| DayError::Port { fecha, source })?;
            return Ok(DayOutcome { run, attempts, result });
        }
    }

    /// One round of `api_dimensiones`: refreshes the dimensions of the API, as one run in the ledger of the day of
    /// `scheduled`. A dimension that did not come makes the run a failed one; its alert has been raised, and the others
    /// have been refreshed all the same.
    ///
    /// # Errors
    /// When the run could not begin or its end could not be written down, and when the lake, the store or the pager failed.
    /// `Retryable` with code `BUSY` while another process refreshes them.
    pub async fn refresh_dimensions(&self, scheduled: DateTime<Utc>) -> Result<(Run, Vec<Refreshed>), PortError> {
        let (env, ledger) = (&self.ports.env, &self.ports.ledger);
        let mut run = ledger.begin(dimensions::PIPELINE, scheduled.date_naive(), &env.new_id(), 0, env.now()).await?;
        let result = dimensions::refresh_api(&self.ports, self.fetching).await;
        run.finished_at = Some(env.now());
        (run.state, run.report) = match &result {
            Ok(all) => {
                let whole = all.iter().all(|r| r.failed.is_none());
                let state = if whole { RunState::Succeeded } else { RunState::Failed };
                (state, serde_json::to_value(all).unwrap_or_default())
            }
            Err(error) => (RunState::Failed, serde_json::json!({ "error": error.chain() })),
        };
        ledger.finish(&run).await?;
        result.map(|all| (run, all))
    }

    /// A decoder of clicks with the platform's registry.
    ///
    /// # Errors
    /// Those of [`AvroClicks::new`].
    pub fn click_decoder(&self, config: &StreamConfig) -> Result<AvroClicks, PortError> {
        AvroClicks::new(self.ports.registry.clone(), config.click_bytes_max)
    }

    /// Opens a worker of the streaming job `realtime_metrics`; `member` is unique in its group and the same after a restart.
    ///
    /// # Errors
    /// Those of [`RealtimeMetrics::open`], and of the registry when it refuses the declaration of the metrics.
    pub async fn stream_worker(&self, config: &StreamConfig, member: &str) -> Result<RealtimeMetrics, PortError> {
        let Ports { env, log, metrics, .. } = &self.ports;
        let ports = StreamPorts { env: env.clone(), log: log.clone(), metrics: metrics.clone() };
        let decoder = Box::new(self.click_decoder(config)?);
        let encoder = Box::new(AvroMetrics::register(self.ports.registry.as_ref()).await?);
        RealtimeMetrics::open(config.clone(), ports, member, decoder, encoder).await
    }

    /// One try of a day: one run in the ledger.
    async fn try_day(
        &self,
        fecha: NaiveDate,
        scheduled: DateTime<Utc>,
        attempts: &mut Vec<Attempt>,
        source_failed: &mut bool,
    ) -> Result<(Run, Result<DayReport, DayError>), DayError> {
        let at = |source| DayError::Port { fecha, source };
        let floor = self.ports.lakehouse.last_epoch(batch::QUARANTINE, fecha).await.map_err(at)?;
        let staged = self.ports.lakehouse.last_epoch(STAGING, fecha).await.map_err(at)?;
        let published = self.ports.lakehouse.last_epoch(MART, fecha).await.map_err(at)?;
        let floor = floor.max(staged).max(published).unwrap_or(0);
        let env = &self.ports.env;
        let mut run = self.ports.ledger.begin(PIPELINE, fecha, &env.new_id(), floor, env.now()).await.map_err(at)?;
        let config = &self.config;
        let source =
            verify_sources(&self.ports, &config.source_policy, config.alert_after_s, config.startup_s, scheduled, attempts).await;
        *source_failed = source.is_err();
        let result = match source {
            Err(source) => Err(DayError::Port { fecha, source }),
            Ok(()) => {
                let version = env!("CARGO_PKG_VERSION");
                batch::run_day(&self.ports, &self.contract, fecha, run.epoch, version, self.fetching).await
            }
        };
        run.finished_at = Some(env.now());
        run.state = match &result {
            Ok(_) => RunState::Succeeded,
            Err(DayError::Held { .. }) => RunState::Held,
            Err(DayError::Port { .. }) => RunState::Failed,
        };
        run.report = match &result {
            Ok(report) => serde_json::to_value(report).unwrap_or_default(),
            Err(error) => serde_json::json!({ "error": error.to_string() }),
        };
        // First the truth, then the news: a pager that is down must not leave a run open.
        self.ports.ledger.finish(&run).await.map_err(at)?;
        self.measure(&run, &result);
        match &result {
            Ok(report) => {
                let (rows, cents) = (report.expected, report.revenue_cents);
                info!(%fecha, epoch = run.epoch, rows, revenue_cents = cents, fates = ?report.fates, "day published");
            }
            Err(error) => warn!(%fecha, epoch = run.epoch, state = ?run.state, %error, "day not published"),
        }
        Ok((run, result))
    }

    /// Raises the alert that the end of a run asks for, or resolves what an earlier run of the day raised.
    ///
    /// An absent source has had its alert while the run waited for it, so it gets no second one here.
    async fn tell(&self, run: &Run, source_failed: bool, result: &Result<DayReport, DayError>) -> Result<(), PortError> {
        let (held, failed) = (format!("day_held:{}", run.fecha), format!("run_failed:{}", run.fecha));
        match result {
            Ok(_) if run.epoch > 1 => {
                self.ports.notifier.resolve(&held).await?;
                self.ports.notifier.resolve(&failed).await
            }
            Ok(_) => Ok(()),
            Err(error @ DayError::Held { .. }) => {
                let alert = Alert { dedup_key: held, kind: "day_held".into(), priority: 1, summary: error.to_string() };
                self.ports.notifier.raise(&alert).await
            }
            Err(DayError::Port { .. }) if source_failed => Ok(()),
            Err(error @ DayError::Port { source, .. }) => {
                let summary = format!("{error}: {}", source.chain());
                let alert = Alert { dedup_key: failed, kind: "run_failed".into(), priority: 1, summary };
                self.ports.notifier.raise(&alert).await
            }
        }
    }

    fn measure(&self, run: &Run, result: &Result<DayReport, DayError>) {
        let metrics = &self.ports.metrics;
        let state = match run.state {
            RunState::Running => "running",
            RunState::Succeeded => "succeeded",
            RunState::Failed => "failed",
            RunState::Held => "held",
        };
        metrics.count("simulacro_batch_runs_total", &[("state", state)], 1);
        if let Some(end) = run.finished_at {
            let seconds = (end - run.started_at).num_milliseconds() as f64 / 1_000.0;
            metrics.gauge("simulacro_batch_run_duration_seconds", &[], seconds);
        }
        if let Ok(report) = result {
            for (fate, rows) in &report.fates {
                metrics.count("simulacro_batch_rows_total", &[("fate", fate)], *rows);
            }
            metrics.gauge("simulacro_batch_revenue_cents", &[], report.revenue_cents as f64);
            metrics.gauge("simulacro_batch_raw_bytes", &[], report.raw_bytes as f64);
            if let Some(end) = run.finished_at {
                metrics.gauge("simulacro_batch_last_success_timestamp_seconds", &[], end.timestamp() as f64);
            }
        }
    }
}
