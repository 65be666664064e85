//! The run ledger in SQLite.
//!
//! A pipeline is held by an advisory lock on a file beside the database: the kernel lets go of it when the process
//! dies, however it dies, so a run that was killed is taken over at once and never by two. A lease is a row; what is
//! written under a lease is written in one transaction with the look at its token.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use simulacro_core::{
    contract::{Severity, check::QualityResult},
    ports::{BUSY, FENCED, Fact, Fence, Fold, Lease, PipelineMetric, PortError, Result, Run, RunLedger, RunStart, RunState},
};
use sqlx::{
    Row, Sqlite, SqlitePool, Transaction,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions, SqliteRow, SqliteSynchronous},
};

/// What the ledger consists of. Times of runs are text, all others microseconds since 1970.
const TABLES: &str = r#"
    CREATE TABLE IF NOT EXISTS runs (pipeline TEXT NOT NULL, fecha TEXT NOT NULL, epoch INTEGER NOT NULL,
        run_id TEXT NOT NULL, state TEXT NOT NULL, started_at TEXT NOT NULL, finished_at TEXT, report TEXT NOT NULL,
        PRIMARY KEY (pipeline, fecha, epoch));
    CREATE TABLE IF NOT EXISTS leases (name TEXT PRIMARY KEY, holder TEXT, token INTEGER NOT NULL,
        acquired_us INTEGER NOT NULL, expires_us INTEGER NOT NULL);
    CREATE TABLE IF NOT EXISTS facts (topic TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, at_us INTEGER NOT NULL,
        PRIMARY KEY (topic, name));
    CREATE TABLE IF NOT EXISTS pipeline_metrics (pipeline_name TEXT NOT NULL, asset TEXT NOT NULL, fecha TEXT NOT NULL,
        run_id TEXT NOT NULL, expected_rows INTEGER NOT NULL, actual_rows INTEGER NOT NULL, published INTEGER NOT NULL,
        deduplicated INTEGER NOT NULL, quarantined INTEGER NOT NULL, rejected INTEGER NOT NULL, late INTEGER NOT NULL,
        dead_lettered INTEGER NOT NULL, bytes INTEGER NOT NULL, duration_ms INTEGER NOT NULL, version TEXT NOT NULL,
        PRIMARY KEY (run_id, asset));
    CREATE INDEX IF NOT EXISTS pipeline_metrics_fecha ON pipeline_metrics (fecha);
    CREATE TABLE IF NOT EXISTS quality_results ("check" TEXT NOT NULL, layer TEXT NOT NULL, asset TEXT NOT NULL,
        fecha TEXT NOT NULL, severity TEXT NOT NULL, passed INTEGER NOT NULL, observed TEXT NOT NULL, expected TEXT NOT NULL,
        failing_rows INTEGER NOT NULL, checked_us INTEGER NOT NULL, PRIMARY KEY ("check", asset, fecha, checked_us));
    CREATE INDEX IF NOT EXISTS quality_results_fecha ON quality_results (fecha);"#;

/// Columns that ledgers of earlier versions do not have.
const ADDED: [(&str, &str); 3] = [("scheduled_at", "TEXT"), ("lease", "TEXT"), ("token", "INTEGER")];

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

/// Lets go of a pipeline for which no run has begun, also when the future that was to begin it is dropped.
struct Claim<'a> {
    ledger: &'a SqliteLedger,
    pipeline: &'a str,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Ok(mut held) = self.ledger.held.lock()
            && held.get(self.pipeline).is_some_and(|h| h.run.is_none())
        {
            held.remove(self.pipeline);
        }
    }
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
        let cannot = || failed("create the tables");
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await.map_err(cannot())?;
        sqlx::raw_sql(TABLES).execute(&mut *tx).await.map_err(cannot())?;
        for (name, kind) in ADDED {
            let there: i64 = sqlx::query_scalar("SELECT count(*) FROM pragma_table_info('runs') WHERE name = ?")
                .bind(name)
                .fetch_one(&mut *tx)
                .await
                .map_err(cannot())?;
            if there == 0 {
                let add = format!("ALTER TABLE runs ADD COLUMN {name} {kind}");
                sqlx::raw_sql(sqlx::AssertSqlSafe(add)).execute(&mut *tx).await.map_err(cannot())?;
            }
        }
        tx.commit().await.map_err(cannot())?;
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

    /// Lets go of a run's pipeline, and of nothing that a later run holds.
    fn let_go(&self, run: &Run) {
        if let Ok(mut held) = self.held.lock()
            && held.get(&run.pipeline).is_some_and(|h| h.run == Some((run.fecha, run.epoch)))
        {
            held.remove(&run.pipeline);
        }
    }

    /// Opens a transaction that writes, after a look at the token it writes under.
    async fn write(&self, what: &str, fence: Option<&Fence>) -> Result<Transaction<'static, Sqlite>> {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(failed(what))?;
        if let Some(fence) = fence {
            let token: Option<i64> = sqlx::query_scalar("SELECT token FROM leases WHERE name = ? AND holder IS NOT NULL")
                .bind(&fence.lease)
                .fetch_optional(&mut *tx)
                .await
                .map_err(failed(what))?;
            if token != Some(fence.token) {
                return Err(fenced(what, fence, token));
            }
        }
        Ok(tx)
    }

    /// Writes the run down, with an epoch above every earlier one. The caller holds the pipeline.
    async fn insert(&self, start: &RunStart) -> Result<Run> {
        let RunStart { pipeline, fecha, run_id, floor, now, scheduled_at, fence } = start;
        let mut tx = self.write("begin a run", fence.as_ref()).await?;
        // Whoever holds the lock knows that no other process is alive with this pipeline.
        sqlx::query("UPDATE runs SET state = 'failed', finished_at = ?, report = ? WHERE pipeline = ? AND state = 'running'")
            .bind(now.to_rfc3339())
            .bind(serde_json::json!({ "error": "the process died" }).to_string())
            .bind(pipeline)
            .execute(&mut *tx)
            .await
            .map_err(failed("close the runs of dead processes"))?;
        let epoch: i64 = sqlx::query_scalar("SELECT coalesce(max(epoch), 0) FROM runs WHERE pipeline = ? AND fecha = ?")
            .bind(pipeline)
            .bind(fecha.to_string())
            .fetch_one(&mut *tx)
            .await
            .map_err(failed("read the epoch"))?;
        let run = Run {
            pipeline: pipeline.clone(),
            fecha: *fecha,
            epoch: epoch.max(*floor) + 1,
            run_id: run_id.clone(),
            state: RunState::Running,
            started_at: *now,
            finished_at: None,
            scheduled_at: *scheduled_at,
            fence: fence.clone(),
            report: serde_json::Value::Null,
        };
        sqlx::query(
            "INSERT INTO runs (pipeline, fecha, epoch, run_id, state, started_at, report, scheduled_at, lease, token)
             VALUES (?, ?, ?, ?, 'running', ?, 'null', ?, ?, ?)",
        )
        .bind(pipeline)
        .bind(fecha.to_string())
        .bind(run.epoch)
        .bind(run_id)
        .bind(now.to_rfc3339())
        .bind(scheduled_at.map(|t| t.to_rfc3339()))
        .bind(fence.as_ref().map(|f| f.lease.as_str()))
        .bind(fence.as_ref().map(|f| f.token))
        .execute(&mut *tx)
        .await
        .map_err(failed("begin a run"))?;
        tx.commit().await.map_err(failed("begin a run"))?;
        Ok(run)
    }

    async fn close(&self, run: &Run) -> Result<()> {
        let mut tx = self.write("finish a run", run.fence.as_ref()).await?;
        sqlx::query("UPDATE runs SET state = ?, finished_at = ?, report = ? WHERE pipeline = ? AND fecha = ? AND epoch = ?")
            .bind(run.state.as_str())
            .bind(run.finished_at.map(|t| t.to_rfc3339()))
            .bind(run.report.to_string())
            .bind(&run.pipeline)
            .bind(run.fecha.to_string())
            .bind(run.epoch)
            .execute(&mut *tx)
            .await
            .map_err(failed("finish a run"))?;
        tx.commit().await.map_err(failed("finish a run"))
    }
}

/// Keeps a fact, or takes it away.
async fn put(tx: &mut Transaction<'static, Sqlite>, fact: &Fact) -> sqlx::Result<()> {
    let statement = if fact.value.is_null() {
        sqlx::query("DELETE FROM facts WHERE topic = ? AND name = ?").bind(&fact.topic).bind(&fact.name)
    } else {
        sqlx::query("INSERT OR REPLACE INTO facts (topic, name, value, at_us) VALUES (?, ?, ?, ?)")
            .bind(&fact.topic)
            .bind(&fact.name)
            .bind(fact.value.to_string())
            .bind(fact.at.timestamp_micros())
    };
    statement.execute(&mut **tx).await.map(|_| ())
}

fn busy(pipeline: &str, who: &str) -> PortError {
    PortError::retryable(format!("begin a run of {pipeline}: {who} is running it")).code(BUSY)
}

/// The error for a write under an old token.
pub(crate) fn fenced(what: &str, fence: &Fence, present: Option<i64>) -> PortError {
    let present = present.map_or_else(|| "nobody holds it".to_owned(), |token| format!("its token is {token}"));
    PortError::permanent(format!("{what} under token {} of lease {}: {present}", fence.token, fence.lease)).code(FENCED)
}

/// The error for a lease that somebody holds.
pub(crate) fn leased(name: &str, lease: Option<&Lease>) -> PortError {
    let who = lease.map_or_else(
        || "somebody holds it".to_owned(),
        |l| format!("{} holds it until {}", l.holder, l.expires_at.format("%Y-%m-%dT%H:%M:%SZ")),
    );
    PortError::retryable(format!("acquire lease {name}: {who}")).code(BUSY)
}

/// Microseconds since 1970 of the end of a lease that begins now.
pub(crate) fn expiry(now: DateTime<Utc>, ttl: Duration) -> i64 {
    now.timestamp_micros().saturating_add(i64::try_from(ttl.as_micros()).unwrap_or(i64::MAX))
}

pub(crate) fn parse_severity(name: &str) -> Option<Severity> {
    [Severity::Info, Severity::Warning, Severity::Error].into_iter().find(|s| s.as_str() == name)
}

/// A count as the ledger keeps it.
pub(crate) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn bad(what: &str) -> PortError {
    PortError::permanent(format!("read the ledger: a row has a damaged {what}"))
}

fn get<'r, T: sqlx::Decode<'r, Sqlite> + sqlx::Type<Sqlite>>(row: &'r SqliteRow, name: &str) -> Result<T> {
    row.try_get(name).map_err(|e| bad(name).because(e))
}

fn count(row: &SqliteRow, name: &str) -> Result<u64> {
    u64::try_from(get::<i64>(row, name)?).map_err(|e| bad(name).because(e))
}

fn micros(row: &SqliteRow, name: &str) -> Result<DateTime<Utc>> {
    DateTime::from_timestamp_micros(get(row, name)?).ok_or_else(|| bad(name))
}

fn day(row: &SqliteRow) -> Result<NaiveDate> {
    get::<String>(row, "fecha")?.parse().map_err(|e: chrono::ParseError| bad("fecha").because(e))
}

fn time(row: &SqliteRow, name: &str) -> Result<Option<DateTime<Utc>>> {
    let text: Option<String> = get(row, name)?;
    let parse = |t: String| DateTime::parse_from_rfc3339(&t).map(|t| t.to_utc()).map_err(|e| bad(name).because(e));
    text.map(parse).transpose()
}

fn read_run(row: &SqliteRow) -> Result<Run> {
    let fence = match (get::<Option<String>>(row, "lease")?, get::<Option<i64>>(row, "token")?) {
        (Some(lease), Some(token)) => Some(Fence { lease, token }),
        (None, _) | (_, None) => None,
    };
    Ok(Run {
        pipeline: get(row, "pipeline")?,
        fecha: day(row)?,
        epoch: get(row, "epoch")?,
        run_id: get(row, "run_id")?,
        state: RunState::parse(&get::<String>(row, "state")?).ok_or_else(|| bad("state"))?,
        started_at: time(row, "started_at")?.ok_or_else(|| bad("started_at"))?,
        finished_at: time(row, "finished_at")?,
        scheduled_at: time(row, "scheduled_at")?,
        fence,
        report: serde_json::from_str(&get::<String>(row, "report")?).map_err(|e| bad("report").because(e))?,
    })
}

#[async_trait]
impl RunLedger for SqliteLedger {
    async fn start(&self, start: &RunStart) -> Result<Run> {
        self.hold(&start.pipeline)?;
        let claim = Claim { ledger: self, pipeline: &start.pipeline };
        let run = self.insert(start).await?;
        if let Ok(mut held) = self.held.lock()
            && let Some(held) = held.get_mut(&start.pipeline)
        {
            held.run = Some((run.fecha, run.epoch));
        }
        drop(claim);
        Ok(run)
    }

    async fn finish(&self, run: &Run) -> Result<()> {
        let written = self.close(run).await;
        // Let go in any case: a run whose end could not be written is closed by the next one.
        self.let_go(run);
        written
    }

    async fn abandon(&self, run: &Run) -> Result<()> {
        self.let_go(run);
        Ok(())
    }

    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        let rows = sqlx::query("SELECT * FROM runs WHERE pipeline = ? ORDER BY fecha, epoch")
            .bind(pipeline)
            .fetch_all(&self.pool)
            .await
            .map_err(failed("read the runs"))?;
        rows.iter().map(read_run).collect()
    }

    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>> {
        let rows = sqlx::query("SELECT * FROM runs WHERE pipeline = ? AND fecha >= ? ORDER BY fecha, epoch")
            .bind(pipeline)
            .bind(from.to_string())
            .fetch_all(&self.pool)
            .await
            .map_err(failed("read the runs"))?;
        rows.iter().map(read_run).collect()
    }

    async fn fold_runs(&self, fold: &Fold, fence: Option<&Fence>) -> Result<()> {
        let what = "fold runs";
        let mut tx = self.write(what, fence).await?;
        put(&mut tx, &fold.fact).await.map_err(failed(what))?;
        for (fecha, epoch) in &fold.runs {
            sqlx::query("DELETE FROM runs WHERE pipeline = ? AND fecha = ? AND epoch = ? AND state <> 'running'")
                .bind(&fold.pipeline)
                .bind(fecha.to_string())
                .bind(epoch)
                .execute(&mut *tx)
                .await
                .map_err(failed(what))?;
        }
        tx.commit().await.map_err(failed(what))
    }

    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        let token: Option<i64> = sqlx::query_scalar(
            "INSERT INTO leases VALUES (?, ?, 1, ?, ?) ON CONFLICT (name) DO UPDATE SET holder = excluded.holder,
             token = leases.token + 1, acquired_us = excluded.acquired_us, expires_us = excluded.expires_us
             WHERE leases.holder IS NULL OR leases.expires_us <= excluded.acquired_us RETURNING token",
        )
        .bind(name)
        .bind(holder)
        .bind(now.timestamp_micros())
        .bind(expiry(now, ttl))
        .fetch_optional(&self.pool)
        .await
        .map_err(failed("acquire a lease"))?;
        let lease = self.lease(name).await?;
        match (token, lease) {
            (Some(token), Some(lease)) if lease.token == token => Ok(lease),
            (_, lease) => Err(leased(name, lease.as_ref())),
        }
    }

    async fn renew_lease(&self, lease: &Lease, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        let expires_us = expiry(now, ttl);
        let mut tx = self.write("renew a lease", Some(&lease.fence())).await?;
        sqlx::query("UPDATE leases SET expires_us = ? WHERE name = ?")
            .bind(expires_us)
            .bind(&lease.name)
            .execute(&mut *tx)
            .await
            .map_err(failed("renew a lease"))?;
        tx.commit().await.map_err(failed("renew a lease"))?;
        let expires_at = DateTime::from_timestamp_micros(expires_us).unwrap_or(DateTime::<Utc>::MAX_UTC);
        Ok(Lease { expires_at, ..lease.clone() })
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        sqlx::query("UPDATE leases SET holder = NULL WHERE name = ? AND token = ?")
            .bind(&lease.name)
            .bind(lease.token)
            .execute(&self.pool)
            .await
            .map(|_| ())
            .map_err(failed("release a lease"))
    }

    async fn lease(&self, name: &str) -> Result<Option<Lease>> {
        let row = sqlx::query("SELECT * FROM leases WHERE name = ? AND holder IS NOT NULL")
            .bind(name)
            .fetch_optional(&self.pool)
            .await
            .map_err(failed("read a lease"))?;
        let read = |row: SqliteRow| {
            Ok(Lease {
                name: get(&row, "name")?,
                holder: get(&row, "holder")?,
                token: get(&row, "token")?,
                acquired_at: micros(&row, "acquired_us")?,
                expires_at: micros(&row, "expires_us")?,
            })
        };
        row.map(read).transpose()
    }

    async fn put_fact(&self, fact: &Fact, fence: Option<&Fence>) -> Result<()> {
        let mut tx = self.write("keep a fact", fence).await?;
        put(&mut tx, fact).await.map_err(failed("keep a fact"))?;
        tx.commit().await.map_err(failed("keep a fact"))
    }

    async fn facts(&self, topic: &str) -> Result<Vec<Fact>> {
        let rows = sqlx::query("SELECT * FROM facts WHERE topic = ? ORDER BY name")
            .bind(topic)
            .fetch_all(&self.pool)
            .await
            .map_err(failed("read the facts"))?;
        let read = |row: &SqliteRow| {
            Ok(Fact {
                topic: get(row, "topic")?,
                name: get(row, "name")?,
                value: serde_json::from_str(&get::<String>(row, "value")?).map_err(|e| bad("value").because(e))?,
                at: micros(row, "at_us")?,
            })
        };
        rows.iter().map(read).collect()
    }

    async fn put_metrics(&self, metrics: &[PipelineMetric]) -> Result<()> {
        let mut tx = self.write("keep metrics", None).await?;
        for m in metrics {
            sqlx::query(
                "INSERT OR REPLACE INTO pipeline_metrics (pipeline_name, asset, fecha, run_id, expected_rows, actual_rows, published,
                 deduplicated, quarantined, rejected, late, dead_lettered, bytes, duration_ms, version)
                 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )
            .bind(&m.pipeline_name)
            .bind(&m.asset)
            .bind(m.fecha.to_string())
            .bind(&m.run_id)
            .bind(signed(m.expected_rows))
            .bind(signed(m.actual_rows))
            .bind(signed(m.published))
            .bind(signed(m.deduplicated))
            .bind(signed(m.quarantined))
            .bind(signed(m.rejected))
            .bind(signed(m.late))
            .bind(signed(m.dead_lettered))
            .bind(signed(m.bytes))
            .bind(signed(m.duration_ms))
            .bind(&m.version)
            .execute(&mut *tx)
            .await
            .map_err(failed("keep metrics"))?;
        }
        tx.commit().await.map_err(failed("keep metrics"))
    }

    async fn metrics(&self, fecha: NaiveDate) -> Result<Vec<PipelineMetric>> {
        let rows = sqlx::query("SELECT * FROM pipeline_metrics WHERE fecha = ? ORDER BY run_id, asset")
            .bind(fecha.to_string())
            .fetch_all(&self.pool)
            .await
            .map_err(failed("read the metrics"))?;
        let read = |row: &SqliteRow| {
            Ok(PipelineMetric {
                pipeline_name: get(row, "pipeline_name")?,
                asset: get(row, "asset")?,
                fecha: day(row)?,
                run_id: get(row, "run_id")?,
                expected_rows: count(row, "expected_rows")?,
                actual_rows: count(row, "actual_rows")?,
                published: count(row, "published")?,
                deduplicated: count(row, "deduplicated")?,
                quarantined: count(row, "quarantined")?,
                rejected: count(row, "rejected")?,
                late: count(row, "late")?,
                dead_lettered: count(row, "dead_lettered")?,
                bytes: count(row, "bytes")?,
                duration_ms: count(row, "duration_ms")?,
                version: get(row, "version")?,
            })
        };
        rows.iter().map(read).collect()
    }

    async fn put_quality(&self, results: &[QualityResult]) -> Result<()> {
        let mut tx = self.write("keep quality results", None).await?;
        for r in results {
            sqlx::query(
                "INSERT OR REPLACE INTO quality_results (\"check\", layer, asset, fecha, severity, passed, observed, expected,
                 failing_rows, checked_us) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )
            .bind(&r.check)
            .bind(&r.layer)
            .bind(&r.asset)
            .bind(r.fecha.to_string())
            .bind(r.severity.as_str())
            .bind(r.passed)
            .bind(&r.observed)
            .bind(&r.expected)
            .bind(signed(r.failing_rows))
            .bind(r.checked_at.timestamp_micros())
            .execute(&mut *tx)
            .await
            .map_err(failed("keep quality results"))?;
        }
        tx.commit().await.map_err(failed("keep quality results"))
    }

    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64> {
        let done = sqlx::query(
            "DELETE FROM quality_results WHERE fecha = ? AND layer = ? AND passed AND checked_us < ? AND EXISTS
             (SELECT 1 FROM quality_results AS later WHERE later.\"check\" = quality_results.\"check\" AND
             later.asset = quality_results.asset AND later.fecha = quality_results.fecha AND
             later.checked_us > quality_results.checked_us)",
        )
        .bind(fecha.to_string())
        .bind(layer)
        .bind(before.timestamp_micros())
        .execute(&self.pool)
        .await
        .map_err(failed("thin quality results"))?;
        Ok(done.rows_affected())
    }

    async fn quality(&self, fecha: NaiveDate) -> Result<Vec<QualityResult>> {
        let rows = sqlx::query("SELECT * FROM quality_results WHERE fecha = ? ORDER BY checked_us, asset, \"check\"")
            .bind(fecha.to_string())
            .fetch_all(&self.pool)
            .await
            .map_err(failed("read the quality results"))?;
        let read = |row: &SqliteRow| {
            Ok(QualityResult {
                check: get(row, "check")?,
                layer: get(row, "layer")?,
                asset: get(row, "asset")?,
                fecha: day(row)?,
                severity: parse_severity(&get::<String>(row, "severity")?).ok_or_else(|| bad("severity"))?,
                passed: get(row, "passed")?,
                observed: get(row, "observed")?,
                expected: get(row, "expected")?,
                failing_rows: count(row, "failing_rows")?,
                checked_at: micros(row, "checked_us")?,
            })
        };
        rows.iter().map(read).collect()
    }
}
