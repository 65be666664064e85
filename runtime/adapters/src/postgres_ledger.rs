//! The run ledger in PostgreSQL, for several machines.
//!
//! A pipeline is held by an advisory lock of a session that stays open while the run does. The server lets go of it
//! when the process dies, however it dies, and within 25 s when its machine does, so that a run that was killed is
//! taken over and never by two. A process that lost its session to the network does not know it yet and may work on
//! beside its successor: what fences it off is its epoch, which is lower.
//!
//! Times are kept to the microsecond.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use simulacro_core::ports::{PortError, Result, Run, RunLedger, RunState};
use sqlx::{PgConnection, Row, postgres::PgRow};

use crate::postgres::{PostgresServer, Value, classify, classify_commit, quote};

const COLUMNS: &str = "pipeline, fecha::text AS fecha, epoch, run_id, state, \
    (extract(epoch FROM started_at) * 1000000)::bigint AS started_us, \
    (extract(epoch FROM finished_at) * 1000000)::bigint AS finished_us, report::text AS report";

/// The key of the advisory lock of `$1`, in a statement.
const KEY: &str = "hashtextextended('simulacro pipeline ' || $1::text, 0)";

/// Pipelines that this process holds, each with the session of its lock and the run it is held for.
#[derive(Debug, Default)]
struct Held {
    sessions: BTreeMap<String, (PgConnection, NaiveDate, i64)>,
    /// Pipelines whose lock is being taken.
    claimed: BTreeSet<String>,
}

/// The ledger.
#[derive(Debug)]
pub struct PostgresLedger {
    server: PostgresServer,
    runs: String,
    held: Mutex<Held>,
}

/// Gives a claim back when the run did not begin, also when its future is dropped.
struct Claim<'a> {
    ledger: &'a PostgresLedger,
    pipeline: &'a str,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        if let Ok(mut held) = self.ledger.held.lock() {
            held.claimed.remove(self.pipeline);
        }
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

fn parse_state(name: &str) -> Option<RunState> {
    [RunState::Running, RunState::Succeeded, RunState::Failed, RunState::Held].into_iter().find(|s| state_name(*s) == name)
}

fn read_run(row: &PgRow) -> Result<Run> {
    let bad = |what: &str| PortError::permanent(format!("read the ledger: a run has a damaged {what}"));
    let text = |name: &'static str| row.try_get::<String, _>(name).map_err(|e| bad(name).because(e));
    let micros = |name: &'static str| row.try_get::<Option<i64>, _>(name).map_err(|e| bad(name).because(e));
    let time = |name: &'static str, us: i64| DateTime::from_timestamp_micros(us).ok_or_else(|| bad(name));
    Ok(Run {
        pipeline: text("pipeline")?,
        fecha: text("fecha")?.parse().map_err(|e: chrono::ParseError| bad("fecha").because(e))?,
        epoch: row.try_get("epoch").map_err(|e| bad("epoch").because(e))?,
        run_id: text("run_id")?,
        state: parse_state(&text("state")?).ok_or_else(|| bad("state"))?,
        started_at: time("started_at", micros("started_us")?.ok_or_else(|| bad("started_at"))?)?,
        finished_at: micros("finished_us")?.map(|us| time("finished_at", us)).transpose()?,
        report: serde_json::from_str(&text("report")?).map_err(|e| bad("report").because(e))?,
    })
}

impl PostgresLedger {
    /// Opens the ledger in the server's schema and makes what is missing.
    ///
    /// # Errors
    /// As for any statement; `Permanent` when the tables cannot be made.
    pub async fn open(server: PostgresServer) -> Result<Self> {
        let schema = quote(&server.schema)?;
        let runs = server.table("runs")?;
        let mut connection = server.connect().await?;
        // Two processes that start together would both create; the lock makes one wait.
        let create = format!(
            "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('simulacro ledger', 0)); \
             CREATE SCHEMA IF NOT EXISTS {schema}; \
             CREATE TABLE IF NOT EXISTS {runs} (pipeline text NOT NULL, fecha date NOT NULL, epoch bigint NOT NULL, \
             run_id text NOT NULL, state text NOT NULL, started_at timestamptz NOT NULL, finished_at timestamptz, \
             report json NOT NULL, PRIMARY KEY (pipeline, fecha, epoch)); COMMIT"
        );
        server.run(&mut connection, create).await.map_err(|e| classify("create the tables of the ledger", e))?;
        server.close(connection).await;
        Ok(Self { server, runs, held: Mutex::default() })
    }

    fn held(&self) -> Result<std::sync::MutexGuard<'_, Held>> {
        self.held.lock().map_err(|_| PortError::permanent("the ledger's lock is poisoned"))
    }

    /// Takes the pipeline for this process, so that two tasks of it do not both ask the server.
    fn claim<'a>(&'a self, pipeline: &'a str) -> Result<Claim<'a>> {
        let mut held = self.held()?;
        if held.sessions.contains_key(pipeline) || !held.claimed.insert(pipeline.to_owned()) {
            return Err(busy(pipeline, "this process"));
        }
        Ok(Claim { ledger: self, pipeline })
    }

    /// Who holds a pipeline, for people.
    async fn holder(&self, connection: &mut PgConnection, pipeline: &str) -> sqlx::Result<String> {
        let sql = format!(
            "SELECT coalesce((SELECT format('process %s from %s (server process %s)', a.application_name, \
             coalesce(host(a.client_addr), 'this machine'), a.pid) FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
             WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 \
             AND l.classid::bigint << 32 | l.objid::bigint = {KEY}), 'another process') \
             || coalesce((SELECT format(', run %s,', run_id) FROM {} WHERE pipeline = $1::text AND state = 'running' \
             ORDER BY started_at DESC LIMIT 1), '') AS holder",
            self.runs
        );
        let rows = self.server.rows(connection, sql, &[Value::Text(pipeline)]).await?;
        rows.first().ok_or(sqlx::Error::RowNotFound)?.try_get("holder")
    }
}

#[async_trait]
impl RunLedger for PostgresLedger {
    async fn begin(&self, pipeline: &str, fecha: NaiveDate, run_id: &str, floor: i64, now: DateTime<Utc>) -> Result<Run> {
        let what = || format!("begin a run of {pipeline} in the ledger");
        let claim = self.claim(pipeline)?;
        let mut session = self.server.connect().await?;
        let sql = format!("SELECT pg_try_advisory_lock({KEY}) AS locked");
        let rows = self.server.rows(&mut session, sql, &[Value::Text(pipeline)]).await.map_err(|e| classify(what(), e))?;
        let locked = rows.first().ok_or(sqlx::Error::RowNotFound).and_then(|row| row.try_get("locked"));
        if !locked.map_err(|e| classify(what(), e))? {
            let holder = self.holder(&mut session, pipeline).await.map_err(|e| classify(what(), e))?;
            return Err(busy(pipeline, &holder));
        }
        let sql = format!(
            "INSERT INTO {runs} SELECT $1::text, $2::text::date, greatest(coalesce(max(epoch), 0), $3::bigint) + 1, $4::text, \
             'running', $5::text::timestamptz, NULL, 'null' FROM {runs} WHERE pipeline = $1::text AND fecha = $2::text::date \
             RETURNING {COLUMNS}",
            runs = self.runs
        );
        let (day, now) = (fecha.to_string(), now.to_rfc3339());
        // Whoever holds the lock knows that no other process is alive with this pipeline.
        let close = format!(
            "UPDATE {} SET state = 'failed', finished_at = $2::text::timestamptz, report = '{{\"error\":\"the process died\"}}' \
             WHERE pipeline = $1::text AND state = 'running'",
            self.runs
        );
        let values = [Value::Text(pipeline), Value::Text(&now)];
        self.server.rows(&mut session, close, &values).await.map_err(|e| classify_commit(what(), e))?;
        let values = [Value::Text(pipeline), Value::Text(&day), Value::Integer(floor), Value::Text(run_id), Value::Text(&now)];
        let rows = self.server.rows(&mut session, sql, &values).await.map_err(|e| classify_commit(what(), e))?;
        let run = read_run(rows.first().ok_or_else(|| classify(what(), sqlx::Error::RowNotFound))?)?;
        self.held()?.sessions.insert(pipeline.to_owned(), (session, run.fecha, run.epoch));
        drop(claim);
        Ok(run)
    }

    async fn finish(&self, run: &Run) -> Result<()> {
        let what = || format!("finish run {} of {} in the ledger", run.run_id, run.pipeline);
        let sql = format!(
            "UPDATE {} SET state = $4::text, finished_at = $5::text::timestamptz, report = $6::text::json \
             WHERE pipeline = $1::text AND fecha = $2::text::date AND epoch = $3::bigint",
            self.runs
        );
        let day = run.fecha.to_string();
        let finished_at = run.finished_at.map(|t| t.to_rfc3339());
        let report = run.report.to_string();
        let values = [
            Value::Text(&run.pipeline),
            Value::Text(&day),
            Value::Integer(run.epoch),
            Value::Text(state_name(run.state)),
            Value::MaybeText(finished_at.as_deref()),
            Value::Text(&report),
        ];
        // A connection of its own: the session of the lock may have been lost while the run went on.
        let mut connection = self.server.connect().await?;
        self.server.rows(&mut connection, sql, &values).await.map_err(|e| classify_commit(what(), e))?;
        self.server.close(connection).await;
        let session = {
            let sessions = &mut self.held()?.sessions;
            // Finishing an old run again must not let go of the present one.
            let is_present =
                sessions.get(&run.pipeline).is_some_and(|(_, fecha, epoch)| (*fecha, *epoch) == (run.fecha, run.epoch));
            if is_present { sessions.remove(&run.pipeline) } else { None }
        };
        if let Some((mut session, _, _)) = session {
            // Asked for and answered: the server would notice the end of the session only a moment later. A session
            // that was lost has lost its lock too.
            let _ = self.server.run(&mut session, "SELECT pg_advisory_unlock_all()").await;
            self.server.close(session).await;
        }
        Ok(())
    }

    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        let mut connection = self.server.connect().await?;
        let sql = format!("SELECT {COLUMNS} FROM {} WHERE pipeline = $1::text ORDER BY fecha, epoch", self.runs);
        let rows = self.server.rows(&mut connection, sql, &[Value::Text(pipeline)]).await;
        let rows = rows.map_err(|e| classify(format!("read the runs of {pipeline}"), e))?;
        self.server.close(connection).await;
        rows.iter().map(read_run).collect()
    }
}
