//! The assets of the platform: what the orchestrator is given, with the schedules and limits of the specification.
//!
//! Here, and nowhere in the orchestrator, is what an asset does. What this leaves out: assets with nothing to run yet.

mod monitor;
mod reconciliation;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::NaiveDate;
use serde_json::json;

pub use monitor::{DEAD_LETTER_CHECK, LATE_CHECK, MonitorLimits, SINK_CHECK, StreamingMonitor};
pub use reconciliation::{DIFFERENCE_CHECK, StreamReconciliation, UNEXPLAINED_CHECK, WARNING};

use crate::{
    batch::{DayError, QUARANTINE, STAGING, state_of},
    contract::check::QualityResult,
    dimensions::{self, CLIENTES_DIM, Dimension},
    models::{self, Project},
    orchestrator::{
        Asset, BreakerPolicy, Job, PlanError, RetryPolicy, Schedule, Slot, SourcePolicy, Work, WorkError, source_checks,
    },
    platform::{PIPELINE, Platform},
    ports::{Optimize, PortError, Ports, Result, VACUUM_HOURS_MIN, Vacuum},
    streaming::eventos::EVENTOS,
};

/// Name of the dimensions' asset.
pub const DIMENSIONS: &str = "api_dimensiones";
/// Name of the features' asset.
pub const FEATURES: &str = "ml_feature_engineering";
/// Model that the features are.
const FEATURES_MODEL: &str = "user_features";
/// Name of the asset that applies a trained model to the features.
pub const INFERENCE: &str = "ml_inference_daily";
/// Name of the weekly maintenance.
pub const MAINTENANCE: &str = "lake_maintenance";
/// Name of the stream's monitor.
pub const MONITOR: &str = "ecommerce_streaming_monitor";
/// Name of the daily comparison of batch and stream.
pub const RECONCILIATION: &str = "batch_stream_reconciliation";

/// Wanted size of a file of the lake, in bytes.
const FILE_BYTES: u64 = 128 << 20;
/// Who answers for the platform's assets, unless a configuration says otherwise.
const OWNER: &str = "data-platform";
/// Waits of six minutes between trials of a breaker.
const BREAKER: BreakerPolicy = BreakerPolicy { open_s: 360, trials: 5 };

/// How long a source may be away before somebody is told, in seconds. With what the news itself takes it is within the
/// minute in which an absence is to be detected, and it is longer than a database needs to start again.
pub const ALERT_AFTER_S: u64 = 45;

/// `ecommerce_batch_daily`: at 03:00 UTC for the day before, done by 06:00, three retries from five minutes on.
///
/// # Errors
/// None that a test does not exclude.
pub fn ecommerce_batch_daily() -> Result<Asset, PlanError> {
    Ok(Asset {
        name: PIPELINE.into(),
        owner: OWNER.into(),
        depends_on: Vec::new(),
        schedule: Schedule::parse("0 3 * * *")?,
        lag_days: 1,
        source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
        alert_after_s: ALERT_AFTER_S,
        timeout_s: 3_600,
        retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
        breaker: BREAKER,
        sla_s: Some(10_800),
        priority: 1,
    })
}

/// `api_dimensiones`: every six hours, for now.
///
/// # Errors
/// None that a test does not exclude.
pub fn api_dimensiones() -> Result<Asset, PlanError> {
    Ok(Asset {
        name: DIMENSIONS.into(),
        owner: OWNER.into(),
        depends_on: Vec::new(),
        schedule: Schedule::parse("0 */6 * * *")?,
        lag_days: 0,
        source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 7_200 },
        alert_after_s: ALERT_AFTER_S,
        timeout_s: 1_800,
        retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
        breaker: BREAKER,
        sla_s: None,
        // Facts are published with dimensions of up to a day ago.
        priority: 2,
    })
}

/// `ml_feature_engineering`: at 06:30 UTC, when the day before must have been published, and after it.
///
/// # Errors
/// None that a test does not exclude.
pub fn ml_feature_engineering() -> Result<Asset, PlanError> {
    Ok(Asset {
        name: FEATURES.into(),
        depends_on: vec![PIPELINE.into()],
        schedule: Schedule::parse("30 6 * * *")?,
        lag_days: 1,
        ..api_dimensiones()?
    })
}

/// `ml_inference_daily`: at 07:30 UTC, after the features of the day before; none for a day that has none.
///
/// # Errors
/// None that a test does not exclude.
pub fn ml_inference_daily() -> Result<Asset, PlanError> {
    Ok(Asset {
        name: INFERENCE.into(),
        depends_on: vec![FEATURES.into()],
        schedule: Schedule::parse("30 7 * * *")?,
        timeout_s: 3_600,
        ..ml_feature_engineering()?
    })
}

/// `lake_maintenance`: on Sundays at 04:30 UTC, after the daily run.
///
/// # Errors
/// None that a test does not exclude.
pub fn lake_maintenance() -> Result<Asset, PlanError> {
    Ok(Asset {
        name: MAINTENANCE.into(),
        schedule: Schedule::parse("30 4 * * 0")?,
        timeout_s: 7_200,
        retry: RetryPolicy { retries: 3, backoff_s: 600, deadline_s: 43_200 },
        priority: 3,
        ..api_dimensiones()?
    })
}

/// `ecommerce_streaming_monitor`: every minute, one look each: lag is to be detected within two minutes.
///
/// # Errors
/// None that a test does not exclude.
pub fn ecommerce_streaming_monitor() -> Result<Asset, PlanError> {
    Ok(Asset {
        name: MONITOR.into(),
        schedule: Schedule::parse("* * * * *")?,
        source_policy: SourcePolicy::Wait { every_s: 30, deadline_s: 120 },
        alert_after_s: 60,
        timeout_s: 120,
        retry: RetryPolicy { retries: 1, backoff_s: 30, deadline_s: 240 },
        // Closed again by the next look, which would otherwise wait for it.
        breaker: BreakerPolicy { open_s: 30, trials: 0 },
        priority: 1,
        ..api_dimensiones()?
    })
}

/// `batch_stream_reconciliation`: at 06:30 UTC, when the day before must have been published, and after it. Its turn is that
/// of the day on which it looks, since it looks at more than one day.
///
/// # Errors
/// None that a test does not exclude.
pub fn batch_stream_reconciliation() -> Result<Asset, PlanError> {
    Ok(Asset {
        name: RECONCILIATION.into(),
        depends_on: vec![PIPELINE.into()],
        schedule: Schedule::parse("30 6 * * *")?,
        // Above its own deadline, with time to compare.
        timeout_s: 14_400,
        retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 21_600 },
        ..api_dimensiones()?
    })
}

/// The daily batch: the checks before it, and the day.
#[derive(Debug)]
pub struct DailyBatch {
    /// The platform whose day it is.
    pub platform: Arc<Platform>,
}

#[async_trait]
impl Work for DailyBatch {
    async fn ready(&self) -> Result<()> {
        self.platform.ports.tables.ping().await
    }
    async fn checks(&self, slot: Slot) -> Vec<QualityResult> {
        let Platform { contract, ports, .. } = &*self.platform;
        source_checks(&*ports.tables, contract, slot.fecha, || ports.env.now()).await
    }
    async fn floor(&self, fecha: NaiveDate) -> Result<i64> {
        self.platform.epoch_floor(fecha).await
    }
    async fn run(&self, job: &Job) -> Result<serde_json::Value, WorkError> {
        let result = self.platform.attempt_day(&job.run).await;
        let mut run = job.run.clone();
        run.finished_at = Some(self.platform.ports.env.now());
        run.state = state_of(&result);
        self.platform.measure(&run, &result);
        match result {
            Ok(report) => Ok(serde_json::to_value(report).unwrap_or_default()),
            Err(DayError::Held { gate, found, expected, .. }) => {
                Err(WorkError::Held { gate: gate.into(), text: format!("found {found}, expected {expected}") })
            }
            Err(DayError::Port { source, .. }) => Err(WorkError::Port(source)),
        }
    }
}

/// Refreshes the dimensions of the API. Each that did not come has had its alert, and the others have come all the same.
#[derive(Debug)]
pub struct Dimensions {
    /// The platform whose dimensions they are.
    pub platform: Arc<Platform>,
}

#[async_trait]
impl Work for Dimensions {
    async fn floor(&self, _fecha: NaiveDate) -> Result<i64> {
        Ok(0)
    }
    async fn run(&self, _job: &Job) -> Result<serde_json::Value, WorkError> {
        let Platform { ports, fetching, .. } = &*self.platform;
        let all = dimensions::refresh_api(ports, *fetching).await.map_err(WorkError::Port)?;
        let failed: Vec<String> =
            all.iter().filter_map(|r| r.failed.as_ref().map(|why| format!("{}: {why}", r.dimension))).collect();
        if failed.is_empty() {
            return Ok(serde_json::to_value(all).unwrap_or_default());
        }
        Err(WorkError::Port(PortError::retryable(format!("refresh the dimensions: {}", failed.join("; ")))))
    }
}

/// Makes and tests the features of users for a day that is staged, and loads them into the warehouse: for the models of
/// machine learning that are trained after it. A day that is held or that nobody has staged gives no features.
#[derive(Debug)]
pub struct UserFeatures {
    /// The platform whose users they are.
    pub platform: Arc<Platform>,
}

impl UserFeatures {
    fn project(&self) -> Result<Project> {
        let all = match &self.platform.models {
            Some(project) => project,
            None => models::shipped()?,
        };
        all.select(FEATURES_MODEL).map_err(|e| PortError::permanent("choose the features of users").because(e))
    }
}

#[async_trait]
impl Work for UserFeatures {
    async fn floor(&self, fecha: NaiveDate) -> Result<i64> {
        let (project, mut floor) = (self.project()?, 0);
        for table in project.tables() {
            floor = floor.max(self.platform.ports.lakehouse.last_epoch(table, fecha).await?.unwrap_or(0));
        }
        Ok(floor)
    }
    async fn run(&self, job: &Job) -> Result<serde_json::Value, WorkError> {
        let project = self.project().map_err(WorkError::Port)?;
        match self.platform.publish_models(&job.run, &project).await {
            Ok(published) => Ok(serde_json::to_value(published).unwrap_or_default()),
            Err(DayError::Held { gate, found, expected, .. }) => {
                Err(WorkError::Held { gate: gate.into(), text: format!("found {found}, expected {expected}") })
            }
            Err(DayError::Port { source, .. }) => Err(WorkError::Port(source)),
        }
    }
}

/// Looks after the lake's tables: a checkpoint of each log, files of no version that is kept removed, the sales of each day
/// put in order of region, and the small files of a day's events joined. Versions of dimensions go after the same time as the
/// files of tables.
#[derive(Debug)]
pub struct LakeMaintenance {
    /// The platform whose lake it is.
    pub platform: Arc<Platform>,
}

#[async_trait]
impl Work for LakeMaintenance {
    async fn floor(&self, _fecha: NaiveDate) -> Result<i64> {
        Ok(0)
    }
    async fn run(&self, _job: &Job) -> Result<serde_json::Value, WorkError> {
        let Ports { env, lakehouse, .. } = &self.platform.ports;
        let project = self.platform.project().map_err(WorkError::Port)?;
        let (mut tables, mut removed) = (Vec::new(), 0);
        let mut looked_after: Vec<&str> = vec![EVENTOS, QUARANTINE, STAGING];
        looked_after.extend(project.tables());
        looked_after.extend(Dimension::ALL.map(Dimension::table));
        looked_after.push(CLIENTES_DIM);
        for table in looked_after {
            if !lakehouse.exists(table).await.map_err(WorkError::Port)? {
                continue;
            }
            lakehouse.maintain(table).await.map_err(WorkError::Port)?;
            let vacuum = Vacuum {
                table: table.to_owned(),
                now: env.now(),
                retention_hours: VACUUM_HOURS_MIN,
                allow_short_retention: false,
                dry_run: false,
            };
            removed += lakehouse.vacuum(vacuum).await.map_err(WorkError::Port)?.len();
            tables.push(table.to_owned());
        }
        let mut rewritten = 0;
        if tables.iter().any(|table| table == STAGING) {
            let order = Optimize { table: STAGING.into(), z_order: vec!["region".into()], target_bytes: FILE_BYTES };
            rewritten = lakehouse.optimize(order).await.map_err(WorkError::Port)?.files_added;
        }
        if tables.iter().any(|table| table == EVENTOS) {
            // A stream writes many small files.
            let join = Optimize { table: EVENTOS.into(), z_order: Vec::new(), target_bytes: FILE_BYTES };
            rewritten += lakehouse.optimize(join).await.map_err(WorkError::Port)?.files_added;
        }
        let kept = Duration::from_secs(u64::from(VACUUM_HOURS_MIN) * 3_600);
        let pruned = dimensions::prune(&self.platform.ports, kept).await.map_err(WorkError::Port)?.len();
        let mut report = json!({ "tables": tables, "files_removed": removed, "files_rewritten": rewritten });
        report["dimension_files_removed"] = pruned.into();
        Ok(report)
    }
}

/// Everything that ships, in order of name. Those with work behind them are an orchestrator's plan.
///
/// # Errors
/// None that a test does not exclude.
pub fn all() -> Result<Vec<Asset>, PlanError> {
    Ok(vec![
        api_dimensiones()?,
        batch_stream_reconciliation()?,
        ecommerce_batch_daily()?,
        ecommerce_streaming_monitor()?,
        lake_maintenance()?,
        ml_feature_engineering()?,
        ml_inference_daily()?,
    ])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::orchestrator::{LoopConfig, Plan};

    #[test]
    fn the_assets_that_ship_are_a_plan() {
        #[derive(Debug)]
        struct Idle;
        #[async_trait]
        impl Work for Idle {
            async fn ready(&self) -> Result<()> {
                Ok(())
            }
            async fn checks(&self, _slot: Slot) -> Vec<QualityResult> {
                Vec::new()
            }
            async fn floor(&self, _fecha: NaiveDate) -> Result<i64> {
                Ok(0)
            }
            async fn run(&self, _job: &Job) -> Result<serde_json::Value, WorkError> {
                Ok(serde_json::Value::Null)
            }
        }
        let assets = all().expect("the schedules are some").into_iter().map(|a| (a, Arc::new(Idle) as Arc<dyn Work>)).collect();
        let plan = Plan::new(LoopConfig::default(), assets, &BTreeMap::new()).expect("a plan");
        let daily = plan.asset(PIPELINE).expect("the daily batch");
        assert_eq!((daily.schedule.to_string().as_str(), daily.sla_s, daily.lag_days), ("0 3 * * *", Some(3 * 3_600), 1));
        assert_eq!((daily.retry.retries, daily.retry.backoff_s), (3, 300));
        let monitor = plan.asset(MONITOR).expect("the monitor");
        // A look that failed must not keep the next one waiting.
        assert!(monitor.schedule.to_string() == "* * * * *" && monitor.breaker.open_s < 60 && monitor.breaker.trials == 0);
        let comparison = plan.asset(RECONCILIATION).expect("the reconciliation");
        assert_eq!((comparison.depends_on.as_slice(), comparison.lag_days), ([PIPELINE.to_owned()].as_slice(), 0));
    }
}
