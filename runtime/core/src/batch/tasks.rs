//! What each task of a day read, wrote and dropped, how long it took, and where a day stopped that was not published.
//!
//! A task ends where the next one begins, so the durations of a day's tasks are the day's. What this leaves out: `notificar`,
//! which comes after the end of a run; see [`crate::platform::Platform::run_day`].

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::DayError;
use crate::ports::{Env, PipelineMetric, Run};

/// How a task came out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskOutcome {
    /// Its rows went on.
    #[default]
    Succeeded,
    /// It stopped the day for what it found; its rows stay where they are.
    Held,
    /// A port failed under it.
    Failed,
}

/// One task. Counts are in rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Name of the task, as in the specification's DAG.
    pub task: String,
    /// How it came out.
    #[serde(default)]
    pub outcome: TaskOutcome,
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
    /// The row of `metadata.pipeline_metrics`. Rows that were not dropped count as published, so that fates balance; whether
    /// they went on is what `actual_rows` says.
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
pub(crate) struct Tasks<'a> {
    env: &'a dyn Env,
    /// The task that runs.
    task: &'static str,
    since: DateTime<Utc>,
    /// What is known of its rows: those that came in, and those that do not go on.
    rows: (u64, BTreeMap<String, u64>),
    done: Vec<TaskReport>,
}

impl<'a> Tasks<'a> {
    /// The first task begins.
    pub(crate) fn begin(env: &'a dyn Env, task: &'static str) -> Self {
        Self { env, task, since: env.now(), rows: (0, BTreeMap::new()), done: Vec::new() }
    }

    /// What the task that runs has come to know, should it not reach its end.
    pub(super) fn found(&mut self, rows_in: u64, dropped: BTreeMap<String, u64>) {
        self.rows = (rows_in, dropped);
    }

    /// The task that runs ends with so many rows and bytes written, and the next one begins.
    pub(super) fn end(&mut self, rows_out: u64, bytes: u64, next: &'static str) {
        let task = std::mem::replace(&mut self.task, next);
        self.close(task, TaskOutcome::Succeeded, rows_out, bytes);
    }

    fn close(&mut self, task: &str, outcome: TaskOutcome, rows_out: u64, bytes: u64) {
        let now = self.env.now();
        let duration_ms = u64::try_from((now - self.since).num_milliseconds()).unwrap_or(0);
        self.since = now;
        let (rows_in, dropped) = std::mem::take(&mut self.rows);
        self.done.push(TaskReport { task: task.into(), outcome, rows_in, rows_out, dropped, bytes, duration_ms });
    }

    /// All tasks, in their order. The one that runs has ended well, with so many rows, or is where the day stopped; a gate
    /// that stopped it has its own name.
    pub(crate) fn done<T>(mut self, result: &Result<T, DayError>, rows_out: impl FnOnce(&T) -> u64) -> Vec<TaskReport> {
        match result {
            Ok(value) => self.close(self.task, TaskOutcome::Succeeded, rows_out(value), 0),
            Err(DayError::Held { gate, .. }) => {
                let task =
                    if ["quality_gate_raw", "quality_gate_final", "model_tests"].contains(gate) { gate } else { self.task };
                self.close(task, TaskOutcome::Held, 0, 0);
            }
            Err(DayError::Port { .. }) => self.close(self.task, TaskOutcome::Failed, 0, 0),
        }
        self.done
    }
}
