//! The one assembly: production and simulation differ in the `Ports` they hand in, and nowhere else.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use crate::{
    batch::{self, DayError, DayReport, Published, STAGING, TaskOutcome, TaskReport, Tasks, state_of},
    contract::Contract,
    dimensions::{self, FetchPolicy, Refreshed},
    history::recorded,
    models::{self, Project, SelectError},
    orchestrator::{Attempt, RetryPolicy, SourcePolicy, Telling, breaker::SOURCE, source_checks, verify_sources},
    ports::{Alert, BUSY, Disposition, Notifier, PortError, Ports, Run, RunState, TableSource},
    restore,
    streaming::{
        codec::{AvroClicks, AvroMetrics},
        config::StreamConfig,
        eventos::{self, EventosTable},
        job::{RealtimeMetrics, StreamPorts},
        metricas::{self, MetricasTable},
        sink::Sink,
    },
};

/// Name of the daily pipeline in the ledger.
pub const PIPELINE: &str = "ecommerce_batch_daily";

/// What a day always makes.
const ALWAYS: &str = "metricas_diarias";

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
    /// The models that a day makes; `None` is the mart of daily metrics alone, as it ships.
    pub models: Option<Project>,
    /// How often a dimension is asked for before its version before has to do.
    pub fetching: FetchPolicy,
    /// Ports, with the recording wrapper on each.
    pub ports: Ports,
    /// Whether tables that were lost are being made again; otherwise a day is held while one of them is gone.
    pub recovering: bool,
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
        Self { config, contract, models: None, fetching: FetchPolicy::STANDARD, ports: recorded(ports), recovering: false }
    }

    /// The same platform over another source of the sales, allowed to make tables again that were lost.
    pub(crate) fn recovering_from(&self, tables: Arc<dyn TableSource>) -> Self {
        Self {
            config: self.config.clone(),
            contract: self.contract.clone(),
            models: self.models.clone(),
            fetching: self.fetching,
            ports: Ports { tables, ..self.ports.clone() },
            recovering: true,
        }
    }

    /// The same platform with the chosen models of a project; the mart of daily metrics is always among those of a day.
    ///
    /// # Errors
    /// When the project has no such mart.
    pub fn with_models(self, project: &Project) -> Result<Self, SelectError> {
        let chosen: Vec<&str> = project.chosen().map(|m| m.name.as_str()).chain([ALWAYS]).collect();
        Ok(self.with_only(project.select(&chosen.join(","))?))
    }

    /// The same platform with the chosen models of a project and no others, for [`Platform::run_models`].
    pub fn with_only(self, project: Project) -> Self {
        Self { models: Some(project), ..self }
    }

    /// The models that a day makes.
    ///
    /// # Errors
    /// `Permanent` when the files that ship are no models, which a test excludes.
    pub fn project(&self) -> Result<Cow<'_, Project>, PortError> {
        match &self.models {
            Some(project) => Ok(Cow::Borrowed(project)),
            None => {
                let mart = models::shipped()?.select(ALWAYS);
                mart.map(Cow::Owned).map_err(|e| PortError::permanent("choose the mart of daily metrics").because(e))
            }
        }
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
                    source.disposition != Disposition::Permanent && source.code.as_deref() != Some(BUSY)
                }
                Ok((_, Ok(_) | Err(DayError::Held { .. }))) | Err(DayError::Held { .. }) => false,
            };
            let next = self.config.retry.next(tried, scheduled, env.now(), env.random());
            if let Some(next) = next.filter(|_| passing && !source_failed) {
                warn!(%fecha, tried, %next, "run failed and will be tried again");
                env.sleep((next - env.now()).to_std().unwrap_or_default()).await;
                continue;
            }
            let (run, result) = match result {
                Ok(ended) => ended,
                Err(error) => {
                    // The ledger does not know of it, so nobody will who is not told.
                    self.tell_lost(fecha, &error).await;
                    return Err(error);
                }
            };
            let began = env.now();
            self.tell(&run, source_failed, &result).await;
            self.tell_destructive().await;
            let duration_ms = u64::try_from((env.now() - began).num_milliseconds()).unwrap_or(0);
            let (task, outcome) = ("notificar".to_owned(), TaskOutcome::Succeeded);
            let told = TaskReport { task, outcome, rows_in: 0, rows_out: 0, dropped: BTreeMap::new(), bytes: 0, duration_ms };
            self.keep(&run, &[told]).await;
            return Ok(DayOutcome { run, attempts, result });
        }
    }

    /// Makes, tests and publishes models alone for a day that is staged, as one run in the ledger whose report has
    /// `"kind": "models"`. The chosen models are those of [`Platform::models`], and no others.
    ///
    /// # Errors
    /// [`DayError::Held`] when tests fail; [`DayError::Port`] otherwise, with code `BUSY` while somebody else runs the
    /// pipeline, and with code `ENOENT` for a day that staging has not.
    pub async fn run_models(&self, fecha: NaiveDate) -> Result<Published, DayError> {
        let at = |source| DayError::Port { fecha, source };
        let env = &self.ports.env;
        let project = self.project().map_err(at)?;
        self.staged(fecha).await?;
        let floor = self.epoch_floor(fecha).await.map_err(at)?;
        let mut run = self.ports.ledger.begin(PIPELINE, fecha, &env.new_id(), floor, env.now()).await.map_err(at)?;
        let result = self.publish_models(&run, &project).await;
        run.finished_at = Some(env.now());
        run.state = state_of(&result);
        run.report = match &result {
            Ok(published) => serde_json::to_value(published).unwrap_or_default(),
            Err(error) => serde_json::json!({ "error": error.to_string() }),
        };
        run.report["kind"] = "models".into();
        self.end(&run).await.map_err(at)?;
        result
    }

    /// Ends a run. A ledger that cannot take the end must not keep the pipeline from whoever comes next and closes the run.
    async fn end(&self, run: &Run) -> Result<(), PortError> {
        let ended = self.ports.ledger.finish(run).await;
        if ended.is_err() {
            // Should this fail too, the end of the process lets go.
            let _ = self.ports.ledger.abandon(run).await;
        }
        ended
    }

    /// Whether staging has a day.
    async fn staged(&self, fecha: NaiveDate) -> Result<(), DayError> {
        let at = |source| DayError::Port { fecha, source };
        match self.ports.lakehouse.last_epoch(STAGING, fecha).await.map_err(at)? {
            Some(_) => Ok(()),
            None => {
                let what = format!("make models of {fecha}: found no such day in {STAGING}, expected one that was run");
                Err(at(PortError::permanent(what).code("ENOENT")))
            }
        }
    }

    /// Makes, tests and publishes the chosen models of a project for a staged day, under a run that the ledger has begun.
    ///
    /// # Errors
    /// As for [`Platform::run_models`].
    pub async fn publish_models(&self, run: &Run, project: &Project) -> Result<Published, DayError> {
        self.staged(run.fecha).await?;
        let mut tasks = Tasks::begin(self.ports.env.as_ref(), "models");
        let version = env!("CARGO_PKG_VERSION");
        let result = batch::publish(&self.ports, project, run.fecha, run.epoch, version, None, &mut tasks).await;
        self.keep(run, &tasks.done(&result, |published| published.mart_rows)).await;
        result
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
        self.end(&run).await?;
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

    /// Opens a member of the sink that writes the clicks to `raw/eventos`; `member` is unique in its group.
    ///
    /// # Errors
    /// Those of [`Sink::open`].
    pub async fn eventos_sink(&self, config: &StreamConfig, member: &str) -> Result<Sink, PortError> {
        let Ports { env, log, metrics, .. } = &self.ports;
        let ports = StreamPorts { env: env.clone(), log: log.clone(), metrics: metrics.clone() };
        let table = EventosTable::new(config, self.ports.lakehouse.clone(), Box::new(self.click_decoder(config)?))?;
        Sink::open(eventos::spec(config), ports, member, Box::new(table)).await
    }

    /// Opens a member of the sink that loads the windows into `realtime.metricas_clicks`; `member` is unique in its group.
    ///
    /// # Errors
    /// Those of [`Sink::open`].
    pub async fn metricas_sink(&self, config: &StreamConfig, member: &str) -> Result<Sink, PortError> {
        let Ports { env, log, metrics, .. } = &self.ports;
        let ports = StreamPorts { env: env.clone(), log: log.clone(), metrics: metrics.clone() };
        // The sink may be there before the first worker of the job.
        for spec in config.topic_specs(1).iter().filter(|spec| spec.name == config.topics.metrics) {
            ports.log.create_topic(spec).await?;
        }
        let table = MetricasTable::new(config, self.ports.warehouse.clone(), self.ports.registry.clone())?;
        Sink::open(metricas::spec(config), ports, member, Box::new(table)).await
    }

    /// The highest epoch that a table which a day writes has seen for it; 0 when there is none.
    ///
    /// # Errors
    /// Those of the lakehouse.
    pub async fn epoch_floor(&self, fecha: NaiveDate) -> Result<i64, PortError> {
        let project = self.project()?;
        let mut floor = 0;
        for table in [batch::QUARANTINE, STAGING].into_iter().chain(project.tables()) {
            floor = floor.max(self.ports.lakehouse.last_epoch(table, fecha).await?.unwrap_or(0));
        }
        Ok(floor)
    }

    /// Does the work of a run that the ledger has begun: from a source that answers to the mart. What each task came to is
    /// kept in the ledger, whether or not the day was published.
    ///
    /// # Errors
    /// See [`batch::run_day`].
    pub async fn attempt_day(&self, run: &Run) -> Result<DayReport, DayError> {
        let (result, tasks) = self.attempt_tasks(run).await;
        self.keep(run, &tasks).await;
        self.tell_destructive().await;
        result
    }

    async fn attempt_tasks(&self, run: &Run) -> (Result<DayReport, DayError>, Vec<TaskReport>) {
        let (version, Run { fecha, epoch, .. }) = (env!("CARGO_PKG_VERSION"), run);
        let project = match self.project() {
            Ok(project) => project,
            Err(source) => return (Err(DayError::Port { fecha: *fecha, source }), Vec::new()),
        };
        if !self.recovering
            && let Err(error) = restore::nothing_lost(&self.ports, *fecha).await
        {
            return (Err(error), Vec::new());
        }
        batch::run_day(&self.ports, &self.contract, &project, *fecha, *epoch, version, self.fetching).await
    }

    /// Keeps what tasks came to. The day is what it is whether or not its numbers can be kept.
    async fn keep(&self, run: &Run, tasks: &[TaskReport]) {
        let metrics: Vec<_> = tasks.iter().map(|task| task.metric(run, env!("CARGO_PKG_VERSION"))).collect();
        if let Err(e) = self.ports.ledger.put_metrics(&metrics).await {
            warn!(fecha = %run.fecha, epoch = run.epoch, error = %e.chain(), "metrics of the run not kept");
        }
    }

    /// Makes the checks before processing again for a day that was published by hand although they had failed, so that the
    /// newest outcomes are those of the repaired day. It is published whether or not they can be kept.
    async fn check_again(&self, fecha: NaiveDate) {
        let Ports { ledger, tables, env, .. } = &self.ports;
        let again = async {
            let kept = ledger.quality(fecha).await?;
            let of_source = kept.iter().filter(|r| r.layer == SOURCE && r.asset == self.contract.table);
            let newest: BTreeMap<&str, bool> = of_source.map(|r| (r.check.as_str(), r.passed)).collect();
            if newest.values().all(|passed| *passed) {
                return Ok(());
            }
            ledger.put_quality(&source_checks(&**tables, &self.contract, fecha, || env.now()).await).await
        };
        let done: Result<(), PortError> = again.await;
        if let Err(e) = done {
            warn!(%fecha, error = %e.chain(), "checks before processing not made again");
        }
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
        let floor = self.epoch_floor(fecha).await.map_err(at)?;
        let env = &self.ports.env;
        let mut run = self.ports.ledger.begin(PIPELINE, fecha, &env.new_id(), floor, env.now()).await.map_err(at)?;
        let config = &self.config;
        let waiting = Tasks::begin(env.as_ref(), "verificar_fuentes");
        let source =
            verify_sources(&self.ports, &config.source_policy, config.alert_after_s, config.startup_s, scheduled, attempts).await;
        *source_failed = source.is_err();
        let (result, tasks) = match source {
            Err(source) => {
                let result = Err(DayError::Port { fecha, source });
                let tasks = waiting.done(&result, |_: &DayReport| 0);
                (result, tasks)
            }
            Ok(()) => self.attempt_tasks(&run).await,
        };
        run.finished_at = Some(env.now());
        run.state = state_of(&result);
        run.report = match &result {
            Ok(report) => serde_json::to_value(report).unwrap_or_default(),
            Err(error) => serde_json::json!({ "error": error.to_string(), "tasks": tasks }),
        };
        // First the truth, then the news: a pager that is down must not leave a run open.
        self.end(&run).await.map_err(at)?;
        self.keep(&run, &tasks).await;
        self.measure(&run, &result);
        if result.is_ok() {
            self.check_again(fecha).await;
        }
        match &result {
            Ok(report) => {
                let (rows, cents) = (report.expected, report.revenue_cents);
                info!(%fecha, epoch = run.epoch, rows, revenue_cents = cents, fates = ?report.fates, "day published");
            }
            Err(error) => warn!(%fecha, epoch = run.epoch, state = ?run.state, %error, "day not published"),
        }
        Ok((run, result))
    }

    /// Raises the alert that the end of a run asks for, or resolves what an earlier run of the day raised. An unreachable
    /// pager fails no run: it is logged and counted.
    ///
    /// An absent source has had its alert while the run waited for it, so it gets no second one here.
    async fn tell(&self, run: &Run, source_failed: bool, result: &Result<DayReport, DayError>) {
        let notifier = Telling { notifier: self.ports.notifier.clone(), metrics: self.ports.metrics.clone() };
        let (held, failed) = (format!("day_held:{}", run.fecha), format!("run_failed:{}", run.fecha));
        let told = match result {
            Ok(_) if run.epoch > 1 => match notifier.resolve(&held).await {
                Ok(()) => notifier.resolve(&failed).await,
                error => error,
            },
            Ok(_) => Ok(()),
            Err(error @ DayError::Held { .. }) => {
                let summary = error.to_string();
                let alert = match error {
                    // One alert for all that is gone of a layer; the restore resolves it.
                    DayError::Held { gate, found, .. } if *gate == restore::TABLE_LOST => {
                        restore::alert(found.rsplit(' ').next().unwrap_or_default(), summary)
                    }
                    DayError::Held { .. } | DayError::Port { .. } => {
                        Alert { dedup_key: held, kind: "day_held".into(), priority: 1, summary }
                    }
                };
                notifier.raise(&alert).await
            }
            Err(DayError::Port { .. }) if source_failed => Ok(()),
            Err(error @ DayError::Port { source, .. }) => {
                let summary = format!("{error}: {}", source.chain());
                let alert = Alert { dedup_key: failed, kind: "run_failed".into(), priority: 1, summary };
                notifier.raise(&alert).await
            }
        };
        debug_assert!(told.is_ok(), "telling fails nobody");
    }

    /// Counts the deletes of this process that nothing in the platform asks for, and raises the alert for them.
    pub async fn tell_destructive(&self) {
        let (calls, paths) = self.ports.recorder.take_destructive();
        if calls == 0 {
            return;
        }
        self.ports.metrics.count("simulacro_destructive_calls_total", &[], calls);
        let notifier = Telling { notifier: self.ports.notifier.clone(), metrics: self.ports.metrics.clone() };
        let summary = format!("{calls} objects deleted outside of VACUUM, among them {}", paths.join(", "));
        let dedup_key = format!("{}:{}", restore::DESTRUCTIVE, paths.first().map_or("", String::as_str));
        let told = notifier.raise(&Alert { dedup_key, kind: restore::DESTRUCTIVE.into(), priority: 1, summary }).await;
        debug_assert!(told.is_ok(), "telling fails nobody");
    }

    /// Raises the alert for a run that could not begin, or whose end could not be written down. One that somebody else runs
    /// is no reason to wake anybody.
    async fn tell_lost(&self, fecha: NaiveDate, error: &DayError) {
        let DayError::Port { source, .. } = error else { return };
        if source.code.as_deref() == Some(BUSY) {
            return;
        }
        let notifier = Telling { notifier: self.ports.notifier.clone(), metrics: self.ports.metrics.clone() };
        let (dedup_key, summary) = (format!("run_failed:{fecha}"), format!("{error}: {}", source.chain()));
        let told = notifier.raise(&Alert { dedup_key, kind: "run_failed".into(), priority: 1, summary }).await;
        debug_assert!(told.is_ok(), "telling fails nobody");
    }

    /// Counts and gauges of a run that has ended.
    pub fn measure(&self, run: &Run, result: &Result<DayReport, DayError>) {
        let metrics = &self.ports.metrics;
        metrics.count("simulacro_batch_runs_total", &[("state", run.state.as_str())], 1);
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
