//! What each task of a day read, wrote and dropped, and how long it took.
//!
//! A task ends where the next one begins, so the durations of a day's tasks are the day's.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::ports::{Env, PipelineMetric, Run};

/// One task. Counts are in rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Name of the task, as in the specification's DAG.
    pub task: String,
    /// Rows that came in.
    pub rows_in: u64,
    /// Rows that went out.
    pub rows_out: u64,
    /// Rows that did not go on, by fate.
    pub dropped: BTreeMap<String, u64>,
    /// Bytes written.
    pub bytes: u64,
    /// Milliseconds.
    pub duration_ms: u64,
}

impl TaskReport {
    /// The row of `metadata.pipeline_metrics`. Rows that were not dropped count as published, so that fates balance.
    pub fn metric(&self, run: &Run, version: &str) -> PipelineMetric {
        let fate = |name: &str| self.dropped.get(name).copied().unwrap_or(0);
        PipelineMetric {
            pipeline_name: run.pipeline.clone(),
            asset: self.task.clone(),
            fecha: run.fecha,
            run_id: run.run_id.clone(),
            expected_rows: self.rows_in,
            actual_rows: self.rows_out,
            published: self.rows_in.saturating_sub(self.dropped.values().sum()),
            deduplicated: fate("deduplicated"),
            quarantined: fate("quarantined"),
            rejected: fate("rejected"),
            late: fate("late"),
            dead_lettered: fate("dead_lettered"),
            bytes: self.bytes,
            duration_ms: self.duration_ms,
            version: version.into(),
        }
    }
}

/// Takes the time of tasks.
#[derive(Debug)]
pub(super) struct Tasks<'a> {
    env: &'a dyn Env,
    since: DateTime<Utc>,
    done: Vec<TaskReport>,
}

impl<'a> Tasks<'a> {
    /// The first task begins.
    pub(super) fn begin(env: &'a dyn Env) -> Self {
        Self { env, since: env.now(), done: Vec::new() }
    }

    /// A task ends, and the next one begins.
    pub(super) fn end(&mut self, task: &str, rows_in: u64, rows_out: u64, dropped: BTreeMap<String, u64>, bytes: u64) {
        let now = self.env.now();
        let duration_ms = u64::try_from((now - self.since).num_milliseconds()).unwrap_or(0);
        self.since = now;
        self.done.push(TaskReport { task: task.into(), rows_in, rows_out, dropped, bytes, duration_ms });
    }

    /// All tasks, in their order.
    pub(super) fn done(self) -> Vec<TaskReport> {
        self.done
    }
}
