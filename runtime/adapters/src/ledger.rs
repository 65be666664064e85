//! The run ledger in SQLite.
//!
//! A pipeline is held by an advisory lock on a file beside the database: the kernel lets go of it when the process
//! dies, however it dies, so a run that was killed is taken over at once and never by two.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::Mutex,
};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use simulacro_core::ports::{PortError, Result, Run, RunLedger, RunState};
use sqlx::{
    Row, SqlitePool,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteSynchronous},
};

/// The ledger.
#[derive(Debug)]
pub struct SqliteLedger {
    pool: SqlitePool,
    path: PathBuf,
    /// Locks by pipeline, with the day and epoch of the run that each was taken for once that is known.
    held: Mutex<BTreeMap<String, Held>>,
    only_reads: bool,
}

#[derive(Debug)]
struct Held {
    _lock: File,
    run: Option<(NaiveDate, i64)>,
}

fn failed(what: &str) -> impl Fn(sqlx::Error) -> PortError + '_ {
    move |e| PortError::unknown(format!("{what} in the ledger")).because(e)
}

impl SqliteLedger {
    /// Opens or creates the database.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub async fn open(path: &Path) -> Result<Self> {
        let options = SqliteConnectOptions::new().filename(path).create_if_missing(true).synchronous(SqliteSynchronous::Full);
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await
            .map_err(|e| PortError::permanent(format!("open ledger {}", path.display())).because(e))?;
        sqlx::query(
            "CREATE TABLE IF NOT EXISTS runs (pipeline TEXT NOT NULL, fecha TEXT NOT NULL, epoch INTEGER NOT NULL,
             run_id TEXT NOT NULL, state TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT, report TEXT NOT NULL,
             PRIMARY KEY (pipeline, fecha, epoch))",
        )
        .execute(&pool)
        .await
        .map_err(failed("create the tables"))?;
        Ok(Self { pool, path: path.to_owned(), held: Mutex::new(BTreeMap::new()), only_reads: false })
    }

    /// Opens a database that is there, to read it; beginning a run is then refused.
    ///
    /// # Errors
    /// When there is no such file, or it is no ledger.
    pub async fn open_existing(path: &Path) -> Result<Self> {
        // Not the read-only mode of the file: what a killed process left half done must be undone before it can be read.
        let options = SqliteConnectOptions::new().filename(path).create_if_missing(false).pragma("query_only", "1");
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .connect_with(options)
            .await
            .map_err(|e| PortError::permanent(format!("open ledger {}", path.display())).because(e))?;
        Ok(Self { pool, path: path.to_owned(), held: Mutex::new(BTreeMap::new()), only_reads: true })
    }

    fn hold(&self, pipeline: &str) -> Result<()> {
        if self.only_reads {
            return Err(PortError::permanent(format!("begin a run of {pipeline}: this command only reads the ledger")));
        }
        let mut held = self.held.lock().map_err(|_| PortError::permanent("the ledger's lock is poisoned"))?;
        if held.contains_key(pipeline) {
            return Err(busy(pipeline, "this process"));
        }
        let path = self.path.with_extension(format!("{pipeline}.lock"));
        let cannot = |e: std::io::Error| PortError::permanent(format!("lock {}", path.display())).because(e);
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(cannot)?;
        match file.try_lock() {
            Ok(()) => {
                held.insert(pipeline.to_owned(), Held { _lock: file, run: None });
                Ok(())
            }
            Err(std::fs::TryLockError::WouldBlock) => Err(busy(pipeline, "another process")),
            Err(std::fs::TryLockError::Error(e)) => Err(cannot(e)),
        }
    }

    /// Writes the run down, with an epoch above every earlier one. The caller holds the pipeline.
    async fn insert(&self, pipeline: &str, fecha: NaiveDate, run_id: &str, floor: i64, now: DateTime<Utc>) -> Result<Run> {
        // Whoever holds the lock knows that no other process is alive with this pipeline.
        sqlx::query("UPDATE runs SET state = 'failed', finished_at = ?, report = ? WHERE pipeline = ? AND state = 'running'")
            .bind(now.to_rfc3339())
            .bind(serde_json::json!({ "error": "the process died" }).to_string())
            .bind(pipeline)
            .execute(&self.pool)
            .await
            .map_err(failed("close the runs of dead processes"))?;
        let epoch: i64 = sqlx::query("SELECT coalesce(max(epoch), 0) AS epoch FROM runs WHERE pipeline = ? AND fecha = ?")
            .bind(pipeline)
            .bind(fecha.to_string())
            .fetch_one(&self.pool)
            .await
            .map_err(failed("read the epoch"))?
            .get("epoch");
        let run = Run {
            pipeline: pipeline.into(),
            fecha,
            epoch: epoch.max(floor) + 1,
            run_id: run_id.into(),
            state: RunState::Running,
            started_at: now,
            finished_at: None,
            report: serde_json::Value::Null,
        };
        sqlx::query("INSERT INTO runs VALUES (?, ?, ?, ?, 'running', ?, NULL, 'null')")
            .bind(pipeline)
            .bind(fecha.to_string())
            .bind(run.epoch)
            .bind(run_id)
            .bind(now.to_rfc3339())
            .execute(&self.pool)
            .await
            .map_err(failed("begin a run"))?;
        Ok(run)
    }
}

fn busy(pipeline: &str, who: &str) -> PortError {
    PortError::retryable(format!("begin a run of {pipeline}: {who} is running it")).code("BUSY")
}

fn state_name(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Succeeded => "succeeded",
        RunState::Failed => "failed",
        RunState::Held => "held",
    }
}

#[async_trait]
impl RunLedger for SqliteLedger {
    async fn begin(&self, pipeline: &str, fecha: NaiveDate, run_id: &str, floor: i64, now: DateTime<Utc>) -> Result<Run> {
        self.hold(pipeline)?;
        let begun = self.insert(pipeline, fecha, run_id, floor, now).await;
        if let Ok(mut held) = self.held.lock() {
            match &begun {
                Ok(run) => {
                    if let Some(held) = held.get_mut(pipeline) {
                        held.run = Some((fecha, run.epoch));
                    }
                }
                // A run that did not begin holds nothing.
                Err(_) => drop(held.remove(pipeline)),
            }
        }
        begun
    }

    async fn finish(&self, run: &Run) -> Result<()> {
        let written =
            sqlx::query("UPDATE runs SET state = ?, finished_at = ?, report = ? WHERE pipeline = ? AND fecha = ? AND epoch = ?")
                .bind(state_name(run.state))
                .bind(run.finished_at.map(|t| t.to_rfc3339()))
                .bind(run.report.to_string())
                .bind(&run.pipeline)
                .bind(run.fecha.to_string())
                .bind(run.epoch)
                .execute(&self.pool)
                .await;
        // Let go in any case: a run whose end could not be written is closed by the next one.
        // The end of an older run is written down, but lets go of nothing.
        if let Ok(mut held) = self.held.lock()
            && held.get(&run.pipeline).is_some_and(|h| h.run == Some((run.fecha, run.epoch)))
        {
            held.remove(&run.pipeline);
        }
        written.map(|_| ()).map_err(failed("finish a run"))
    }

    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        let rows = sqlx::query("SELECT * FROM runs WHERE pipeline = ? ORDER BY fecha, epoch")
            .bind(pipeline)
            .fetch_all(&self.pool)
            .await
            .map_err(failed("read the runs"))?;
        rows.iter()
            .map(|row| {
                let text = |name: &str| row.get::<String, _>(name);
                let bad = |what: &str| PortError::permanent(format!("read the ledger: a run has a damaged {what}"));
                let time = |t: String| DateTime::parse_from_rfc3339(&t).map(|t| t.to_utc());
                Ok(Run {
                    pipeline: text("pipeline"),
                    fecha: text("fecha").parse().map_err(|_| bad("fecha"))?,
                    epoch: row.get("epoch"),
                    run_id: text("run_id"),
                    state: serde_json::from_value(serde_json::Value::String(text("state"))).map_err(|_| bad("state"))?,
                    started_at: time(text("started_at")).map_err(|_| bad("started_at"))?,
                    finished_at: row
                        .get::<Option<String>, _>("finished_at")
                        .map(time)
                        .transpose()
                        .map_err(|_| bad("finished_at"))?,
                    report: serde_json::from_str(&text("report")).map_err(|_| bad("report"))?,
                })
            })
            .collect()
    }
}
