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
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use simulacro_core::{
    contract::check::QualityResult,
    ports::{BUSY, Fact, Fence, Fold, Lease, PipelineMetric, PortError, Result, Run, RunLedger, RunStart, RunState},
};
use sqlx::{PgConnection, Row, postgres::PgRow};

use crate::{
    ledger::{expiry, fenced, leased, parse_severity, signed},
    postgres::{PostgresServer, Value, classify, classify_commit, quote},
};

const COLUMNS: &str = "pipeline, fecha::text AS fecha, epoch, run_id, state, \
    (extract(epoch FROM started_at) * 1000000)::bigint AS started_us, \
    (extract(epoch FROM finished_at) * 1000000)::bigint AS finished_us, \
    (extract(epoch FROM scheduled_at) * 1000000)::bigint AS scheduled_us, lease, token, report::text AS report";
/// Columns of a lease.
const LEASE: &str = "name, holder, token, (extract(epoch FROM acquired_at) * 1000000)::bigint AS acquired_us, \
    (extract(epoch FROM expires_at) * 1000000)::bigint AS expires_us";
/// Columns of a metric whose value is a count.
const COUNTS: [&str; 10] = [
    "expected_rows",
    "actual_rows",
    "published",
    "deduplicated",
    "quarantined",
    "rejected",
    "late",
    "dead_lettered",
    "bytes",
    "duration_ms",
];
/// Most rows that one statement writes: each value is a parameter, and a statement has at most 65,535.
const ROWS_PER_STATEMENT: usize = 1_000;

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
    leases: String,
    facts: String,
    metrics: String,
    quality: String,
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
    PortError::retryable(format!("begin a run of {pipeline}: {who} is running it")).code(BUSY)
}

fn bad(what: &str) -> PortError {
    PortError::permanent(format!("read the ledger: a row has a damaged {what}"))
}

fn get<'r, T: sqlx::Decode<'r, sqlx::Postgres> + sqlx::Type<sqlx::Postgres>>(row: &'r PgRow, name: &str) -> Result<T> {
    row.try_get(name).map_err(|e| bad(name).because(e))
}

fn time(row: &PgRow, name: &str) -> Result<Option<DateTime<Utc>>> {
    let us: Option<i64> = get(row, name)?;
    us.map(|us| DateTime::from_timestamp_micros(us).ok_or_else(|| bad(name))).transpose()
}

fn some_time(row: &PgRow, name: &str) -> Result<DateTime<Utc>> {
    time(row, name)?.ok_or_else(|| bad(name))
}

fn count(row: &PgRow, name: &str) -> Result<u64> {
    u64::try_from(get::<i64>(row, name)?).map_err(|e| bad(name).because(e))
}

fn day(row: &PgRow) -> Result<NaiveDate> {
    get::<String>(row, "fecha")?.parse().map_err(|e: chrono::ParseError| bad("fecha").because(e))
}

fn json(row: &PgRow, name: &str) -> Result<serde_json::Value> {
    serde_json::from_str(&get::<String>(row, name)?).map_err(|e| bad(name).because(e))
}

fn read_lease(row: &PgRow) -> Result<Lease> {
    Ok(Lease {
        name: get(row, "name")?,
        holder: get(row, "holder")?,
        token: get(row, "token")?,
        acquired_at: some_time(row, "acquired_us")?,
        expires_at: some_time(row, "expires_us")?,
    })
}

/// `($1::text, $2::bigint), ($3::text, $4::bigint)`: so many rows of parameters of these types.
fn placeholders(rows: usize, types: &[&str]) -> String {
    let row = |r: usize| {
        let values: Vec<String> = types.iter().enumerate().map(|(i, t)| format!("${}::{t}", r * types.len() + i + 1)).collect();
        format!("({})", values.join(", "))
    };
    (0..rows).map(row).collect::<Vec<_>>().join(", ")
}

fn read_run(row: &PgRow) -> Result<Run> {
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
        started_at: some_time(row, "started_us")?,
        finished_at: time(row, "finished_us")?,
        scheduled_at: time(row, "scheduled_us")?,
        fence,
        report: json(row, "report")?,
    })
}

impl PostgresLedger {
    /// Opens the ledger in the server's schema and makes what is missing.
    ///
    /// # Errors
    /// As for any statement; `Permanent` when the tables cannot be made.
    pub async fn open(server: PostgresServer) -> Result<Self> {
        let schema = quote(&server.schema)?;
        let table = |name| server.table(name);
        let (runs, leases, facts) = (table("runs")?, table("leases")?, table("facts")?);
        let (metrics, quality) = (table("pipeline_metrics")?, table("quality_results")?);
        let counts = COUNTS.map(|c| format!("{c} bigint NOT NULL")).join(", ");
        let mut connection = server.connect().await?;
        // Two processes that start together would both create; the lock makes one wait.
        let create = format!(
            "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('simulacro ledger', 0)); \
             CREATE SCHEMA IF NOT EXISTS {schema}; \
             CREATE TABLE IF NOT EXISTS {runs} (pipeline text NOT NULL, fecha date NOT NULL, epoch bigint NOT NULL, \
             run_id text NOT NULL, state text NOT NULL, started_at timestamptz NOT NULL, finished_at timestamptz, \
             report json NOT NULL, PRIMARY KEY (pipeline, fecha, epoch)); \
             ALTER TABLE {runs} ADD COLUMN IF NOT EXISTS scheduled_at timestamptz, ADD COLUMN IF NOT EXISTS lease text, \
             ADD COLUMN IF NOT EXISTS token bigint; \
             CREATE TABLE IF NOT EXISTS {leases} (name text PRIMARY KEY, holder text, token bigint NOT NULL, \
             acquired_at timestamptz NOT NULL, expires_at timestamptz NOT NULL); \
             CREATE TABLE IF NOT EXISTS {facts} (topic text NOT NULL, name text NOT NULL, value json NOT NULL, \
             at timestamptz NOT NULL, PRIMARY KEY (topic, name)); \
             CREATE TABLE IF NOT EXISTS {metrics} (pipeline_name text NOT NULL, asset text NOT NULL, fecha date NOT NULL, \
             run_id text NOT NULL, {counts}, version text NOT NULL, PRIMARY KEY (run_id, asset)); \
             CREATE INDEX IF NOT EXISTS pipeline_metrics_fecha ON {metrics} (fecha); \
             CREATE TABLE IF NOT EXISTS {quality} (\"check\" text NOT NULL, layer text NOT NULL, asset text NOT NULL, \
             fecha date NOT NULL, severity text NOT NULL, passed boolean NOT NULL, observed text NOT NULL, \
             expected text NOT NULL, failing_rows bigint NOT NULL, checked_at timestamptz NOT NULL, \
             PRIMARY KEY (\"check\", asset, fecha, checked_at)); \
             CREATE INDEX IF NOT EXISTS quality_results_fecha ON {quality} (fecha); COMMIT"
        );
        server.run(&mut connection, create).await.map_err(|e| classify("create the tables of the ledger", e))?;
        server.close(connection).await;
        Ok(Self { server, runs, leases, facts, metrics, quality, held: Mutex::default() })
    }

    /// Reads rows over a connection of its own.
    async fn read(&self, what: &str, sql: String, values: &[Value<'_>]) -> Result<Vec<PgRow>> {
        let mut connection = self.server.connect().await?;
        let rows = self.server.rows(&mut connection, sql, values).await.map_err(|e| classify(what, e))?;
        self.server.close(connection).await;
        Ok(rows)
    }

    /// Runs one statement that writes, over a connection of its own.
    async fn change(&self, what: &str, sql: String, values: &[Value<'_>]) -> Result<Vec<PgRow>> {
        let mut connection = self.server.connect().await?;
        let rows = self.server.rows(&mut connection, sql, values).await.map_err(|e| classify_commit(what, e))?;
        self.server.close(connection).await;
        Ok(rows)
    }

    /// Opens a transaction, and holds on to the token that is written under: it cannot change hands before the commit.
    async fn begin_fenced(&self, session: &mut PgConnection, what: &str, fence: Option<&Fence>) -> Result<()> {
        self.server.run(session, "BEGIN").await.map_err(|e| classify(what, e))?;
        let Some(fence) = fence else { return Ok(()) };
        let sql = format!("SELECT token FROM {} WHERE name = $1::text AND holder IS NOT NULL FOR SHARE", self.leases);
        let rows = self.server.rows(session, sql, &[Value::Text(&fence.lease)]).await.map_err(|e| classify(what, e))?;
        let token = rows.first().map(|row| get::<i64>(row, "token")).transpose()?;
        if token == Some(fence.token) { Ok(()) } else { Err(fenced(what, fence, token)) }
    }

    async fn commit(&self, session: &mut PgConnection, what: &str) -> Result<()> {
        self.server.run(session, "COMMIT").await.map(|_| ()).map_err(|e| classify_commit(what, e))
    }

    /// Keeps a fact, or takes it away, within a transaction.
    async fn put(&self, session: &mut PgConnection, what: &str, fact: &Fact) -> Result<()> {
        let (value, at) = (fact.value.to_string(), fact.at.timestamp_micros());
        let (sql, values) = if fact.value.is_null() {
            let sql = format!("DELETE FROM {} WHERE topic = $1::text AND name = $2::text", self.facts);
            (sql, vec![Value::Text(&fact.topic), Value::Text(&fact.name)])
        } else {
            let sql = format!(
                "INSERT INTO {} (topic, name, value, at) VALUES ($1::text, $2::text, $3::text::json, \
                 to_timestamp(0) + $4::bigint * interval '1 microsecond') \
                 ON CONFLICT (topic, name) DO UPDATE SET value = excluded.value, at = excluded.at",
                self.facts
            );
            (sql, vec![Value::Text(&fact.topic), Value::Text(&fact.name), Value::Text(&value), Value::Integer(at)])
        };
        self.server.rows(session, sql, &values).await.map_err(|e| classify(what, e))?;
        Ok(())
    }

    /// Writes the end of a run down.
    async fn close_run(&self, run: &Run) -> Result<()> {
        let what = format!("finish run {} of {} in the ledger", run.run_id, run.pipeline);
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
            Value::Text(run.state.as_str()),
            Value::MaybeText(finished_at.as_deref()),
            Value::Text(&report),
        ];
        // A connection of its own: the session of the lock may have been lost while the run went on.
        let mut connection = self.server.connect().await?;
        self.begin_fenced(&mut connection, &what, run.fence.as_ref()).await?;
        self.server.rows(&mut connection, sql, &values).await.map_err(|e| classify_commit(what.as_str(), e))?;
        self.commit(&mut connection, &what).await?;
        self.server.close(connection).await;
        Ok(())
    }

    /// Lets go of a run's pipeline, and of nothing that a later run holds.
    async fn let_go(&self, run: &Run) -> Result<()> {
        let session = {
            let sessions = &mut self.held()?.sessions;
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
    async fn start(&self, start: &RunStart) -> Result<Run> {
        let RunStart { pipeline, fecha, run_id, floor, now, scheduled_at, fence } = start;
        let what = format!("begin a run of {pipeline} in the ledger");
        let claim = self.claim(pipeline)?;
        let mut session = self.server.connect().await?;
        let sql = format!("SELECT pg_try_advisory_lock({KEY}) AS locked");
        let rows = self.server.rows(&mut session, sql, &[Value::Text(pipeline)]).await.map_err(|e| classify(what.as_str(), e))?;
        let locked = rows.first().ok_or(sqlx::Error::RowNotFound).and_then(|row| row.try_get("locked"));
        if !locked.map_err(|e| classify(what.as_str(), e))? {
            let holder = self.holder(&mut session, pipeline).await.map_err(|e| classify(what.as_str(), e))?;
            return Err(busy(pipeline, &holder));
        }
        self.begin_fenced(&mut session, &what, fence.as_ref()).await?;
        let sql = format!(
            "INSERT INTO {runs} (pipeline, fecha, epoch, run_id, state, started_at, report, scheduled_at, lease, token) \
             SELECT $1::text, $2::text::date, greatest(coalesce(max(epoch), 0), $3::bigint) + 1, $4::text, \
             'running', $5::text::timestamptz, 'null', $6::text::timestamptz, $7::text, $8::text::bigint \
             FROM {runs} WHERE pipeline = $1::text AND fecha = $2::text::date RETURNING {COLUMNS}",
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
        self.server.rows(&mut session, close, &values).await.map_err(|e| classify(what.as_str(), e))?;
        let scheduled_at = scheduled_at.map(|t| t.to_rfc3339());
        let token = fence.as_ref().map(|f| f.token.to_string());
        let values = [
            Value::Text(pipeline),
            Value::Text(&day),
            Value::Integer(*floor),
            Value::Text(run_id),
            Value::Text(&now),
            Value::MaybeText(scheduled_at.as_deref()),
            Value::MaybeText(fence.as_ref().map(|f| f.lease.as_str())),
            Value::MaybeText(token.as_deref()),
        ];
        let rows = self.server.rows(&mut session, sql, &values).await.map_err(|e| classify(what.as_str(), e))?;
        let run = read_run(rows.first().ok_or_else(|| classify(what.as_str(), sqlx::Error::RowNotFound))?)?;
        self.commit(&mut session, &what).await?;
        self.held()?.sessions.insert(pipeline.to_owned(), (session, run.fecha, run.epoch));
        drop(claim);
        Ok(run)
    }

    async fn finish(&self, run: &Run) -> Result<()> {
        let written = self.close_run(run).await;
        let is_fenced = matches!(&written, Err(e) if e.code.as_deref() == Some(simulacro_core::ports::FENCED));
        if written.is_ok() || is_fenced {
            self.let_go(run).await?;
        }
        written
    }

    async fn abandon(&self, run: &Run) -> Result<()> {
        self.let_go(run).await
    }

    async fn runs(&self, pipeline: &str) -> Result<Vec<Run>> {
        let sql = format!("SELECT {COLUMNS} FROM {} WHERE pipeline = $1::text ORDER BY fecha, epoch", self.runs);
        let rows = self.read(&format!("read the runs of {pipeline}"), sql, &[Value::Text(pipeline)]).await?;
        rows.iter().map(read_run).collect()
    }

    async fn runs_since(&self, pipeline: &str, from: NaiveDate) -> Result<Vec<Run>> {
        let sql = format!(
            "SELECT {COLUMNS} FROM {} WHERE pipeline = $1::text AND fecha >= $2::text::date ORDER BY fecha, epoch",
            self.runs
        );
        let from = from.to_string();
        let values = [Value::Text(pipeline), Value::Text(&from)];
        let rows = self.read(&format!("read the runs of {pipeline}"), sql, &values).await?;
        rows.iter().map(read_run).collect()
    }

    async fn fold_runs(&self, fold: &Fold, fence: Option<&Fence>) -> Result<()> {
        let what = format!("fold {} runs of {}", fold.runs.len(), fold.pipeline);
        let mut connection = self.server.connect().await?;
        self.begin_fenced(&mut connection, &what, fence).await?;
        self.put(&mut connection, &what, &fold.fact).await?;
        let days: Vec<(String, i64)> = fold.runs.iter().map(|(fecha, epoch)| (fecha.to_string(), *epoch)).collect();
        for days in days.chunks(ROWS_PER_STATEMENT) {
            let mut values: Vec<_> =
                days.iter().flat_map(|(fecha, epoch)| [Value::Text(fecha), Value::Integer(*epoch)]).collect();
            let sql = format!(
                "DELETE FROM {} WHERE pipeline = ${}::text AND state <> 'running' AND (fecha, epoch) IN (VALUES {})",
                self.runs,
                values.len() + 1,
                placeholders(days.len(), &["text::date", "bigint"])
            );
            values.push(Value::Text(&fold.pipeline));
            self.server.rows(&mut connection, sql, &values).await.map_err(|e| classify(what.as_str(), e))?;
        }
        self.commit(&mut connection, &what).await?;
        self.server.close(connection).await;
        Ok(())
    }

    async fn acquire_lease(&self, name: &str, holder: &str, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        let sql = format!(
            "INSERT INTO {} AS l (name, holder, token, acquired_at, expires_at) VALUES ($1::text, $2::text, 1, \
             to_timestamp(0) + $3::bigint * interval '1 microsecond', to_timestamp(0) + $4::bigint * interval '1 microsecond') \
             ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, token = l.token + 1, \
             acquired_at = excluded.acquired_at, expires_at = excluded.expires_at \
             WHERE l.holder IS NULL OR l.expires_at <= excluded.acquired_at RETURNING {LEASE}",
            self.leases
        );
        let values =
            [Value::Text(name), Value::Text(holder), Value::Integer(now.timestamp_micros()), Value::Integer(expiry(now, ttl))];
        let rows = self.change(&format!("acquire lease {name}"), sql, &values).await?;
        match rows.first() {
            Some(row) => read_lease(row),
            None => Err(leased(name, self.lease(name).await?.as_ref())),
        }
    }

    async fn renew_lease(&self, lease: &Lease, ttl: Duration, now: DateTime<Utc>) -> Result<Lease> {
        let what = format!("renew lease {}", lease.name);
        let sql = format!(
            "UPDATE {} SET expires_at = to_timestamp(0) + $3::bigint * interval '1 microsecond' \
             WHERE name = $1::text AND token = $2::bigint AND holder IS NOT NULL RETURNING {LEASE}",
            self.leases
        );
        let values = [Value::Text(&lease.name), Value::Integer(lease.token), Value::Integer(expiry(now, ttl))];
        let rows = self.change(&what, sql, &values).await?;
        match rows.first() {
            Some(row) => read_lease(row),
            None => Err(fenced(&what, &lease.fence(), self.lease(&lease.name).await?.map(|l| l.token))),
        }
    }

    async fn release_lease(&self, lease: &Lease) -> Result<()> {
        let sql = format!("UPDATE {} SET holder = NULL WHERE name = $1::text AND token = $2::bigint", self.leases);
        let values = [Value::Text(&lease.name), Value::Integer(lease.token)];
        self.change(&format!("release lease {}", lease.name), sql, &values).await.map(|_| ())
    }

    async fn lease(&self, name: &str) -> Result<Option<Lease>> {
        let sql = format!("SELECT {LEASE} FROM {} WHERE name = $1::text AND holder IS NOT NULL", self.leases);
        let rows = self.read(&format!("read lease {name}"), sql, &[Value::Text(name)]).await?;
        rows.first().map(read_lease).transpose()
    }

    async fn put_fact(&self, fact: &Fact, fence: Option<&Fence>) -> Result<()> {
        let what = format!("keep fact {} of {}", fact.name, fact.topic);
        let mut connection = self.server.connect().await?;
        self.begin_fenced(&mut connection, &what, fence).await?;
        self.put(&mut connection, &what, fact).await?;
        self.commit(&mut connection, &what).await?;
        self.server.close(connection).await;
        Ok(())
    }

    async fn facts(&self, topic: &str) -> Result<Vec<Fact>> {
        let sql = format!(
            "SELECT topic, name, value::text AS value, (extract(epoch FROM at) * 1000000)::bigint AS at_us FROM {} \
             WHERE topic = $1::text ORDER BY name COLLATE \"C\"",
            self.facts
        );
        let rows = self.read(&format!("read the facts of {topic}"), sql, &[Value::Text(topic)]).await?;
        let read = |row: &PgRow| {
            Ok(Fact {
                topic: get(row, "topic")?,
                name: get(row, "name")?,
                value: json(row, "value")?,
                at: some_time(row, "at_us")?,
            })
        };
        rows.iter().map(read).collect()
    }

    async fn put_metrics(&self, metrics: &[PipelineMetric]) -> Result<()> {
        // Of two rows with one key the later counts, as it would with two calls; one statement may touch a row only once.
        let unique: BTreeMap<_, _> = metrics.iter().map(|m| ((&m.run_id, &m.asset), m)).collect();
        let days: Vec<String> = unique.values().map(|m| m.fecha.to_string()).collect();
        let rows: Vec<_> = unique.values().zip(&days).collect();
        let types = ["text", "text", "text::date", "text"].into_iter().chain(COUNTS.map(|_| "bigint")).chain(["text"]);
        let types: Vec<&str> = types.collect();
        let set = COUNTS.iter().chain(&["pipeline_name", "fecha", "version"]).map(|c| format!("{c} = excluded.{c}"));
        let set = set.collect::<Vec<_>>().join(", ");
        for rows in rows.chunks(ROWS_PER_STATEMENT) {
            let mut values = Vec::new();
            for (m, day) in rows {
                values.extend([&m.pipeline_name, &m.asset, *day, &m.run_id].map(|t| Value::Text(t)));
                let counts = [
                    m.expected_rows,
                    m.actual_rows,
                    m.published,
                    m.deduplicated,
                    m.quarantined,
                    m.rejected,
                    m.late,
                    m.dead_lettered,
                    m.bytes,
                    m.duration_ms,
                ];
                values.extend(counts.map(|n| Value::Integer(signed(n))));
                values.push(Value::Text(&m.version));
            }
            let sql = format!(
                "INSERT INTO {} (pipeline_name, asset, fecha, run_id, {}, version) VALUES {} \
                 ON CONFLICT (run_id, asset) DO UPDATE SET {set}",
                self.metrics,
                COUNTS.join(", "),
                placeholders(rows.len(), &types)
            );
            self.change("keep metrics in the ledger", sql, &values).await?;
        }
        Ok(())
    }

    async fn metrics(&self, fecha: NaiveDate) -> Result<Vec<PipelineMetric>> {
        let sql = format!(
            "SELECT pipeline_name, asset, fecha::text AS fecha, run_id, {}, version FROM {} WHERE fecha = $1::text::date \
             ORDER BY run_id COLLATE \"C\", asset COLLATE \"C\"",
            COUNTS.join(", "),
            self.metrics
        );
        let rows = self.read("read the metrics of the ledger", sql, &[Value::Text(&fecha.to_string())]).await?;
        let read = |row: &PgRow| {
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
        let key = |r: &QualityResult| (r.check.clone(), r.asset.clone(), r.fecha, r.checked_at.timestamp_micros());
        let unique: BTreeMap<_, _> = results.iter().map(|r| (key(r), r)).collect();
        let texts: Vec<_> = unique.values().map(|r| (r.fecha.to_string(), r.passed.to_string())).collect();
        let rows: Vec<_> = unique.values().zip(&texts).collect();
        let types =
            ["text", "text", "text", "text::date", "text", "text::boolean", "text", "text", "bigint", "text::timestamptz"];
        let times: Vec<String> = unique.values().map(|r| r.checked_at.to_rfc3339()).collect();
        let rows: Vec<_> = rows.into_iter().zip(&times).collect();
        for rows in rows.chunks(ROWS_PER_STATEMENT) {
            let mut values = Vec::new();
            for ((r, (fecha, passed)), checked_at) in rows {
                let texts = [&r.check, &r.layer, &r.asset, fecha, r.severity.as_str(), passed, &r.observed, &r.expected];
                values.extend(texts.map(Value::Text));
                values.extend([Value::Integer(signed(r.failing_rows)), Value::Text(checked_at)]);
            }
            let sql = format!(
                "INSERT INTO {} (\"check\", layer, asset, fecha, severity, passed, observed, expected, failing_rows, checked_at) \
                 VALUES {} ON CONFLICT (\"check\", asset, fecha, checked_at) DO UPDATE SET layer = excluded.layer, \
                 severity = excluded.severity, passed = excluded.passed, observed = excluded.observed, \
                 expected = excluded.expected, failing_rows = excluded.failing_rows",
                self.quality,
                placeholders(rows.len(), &types)
            );
            self.change("keep quality results in the ledger", sql, &values).await?;
        }
        Ok(())
    }

    async fn thin_quality(&self, layer: &str, fecha: NaiveDate, before: DateTime<Utc>) -> Result<u64> {
        let sql = format!(
            "WITH gone AS (DELETE FROM {0} AS r WHERE r.fecha = $1::text::date AND r.layer = $2::text AND r.passed AND \
             r.checked_at < $3::text::timestamptz AND EXISTS (SELECT 1 FROM {0} AS later WHERE later.\"check\" = r.\"check\" \
             AND later.asset = r.asset AND later.fecha = r.fecha AND later.checked_at > r.checked_at) RETURNING 1) \
             SELECT count(*)::bigint AS gone FROM gone",
            self.quality
        );
        let (fecha, before) = (fecha.to_string(), before.to_rfc3339());
        let values = [Value::Text(&fecha), Value::Text(layer), Value::Text(&before)];
        let rows = self.change("thin the quality results of the ledger", sql, &values).await?;
        rows.first().map_or(Ok(0), |row| count(row, "gone"))
    }

    async fn quality(&self, fecha: NaiveDate) -> Result<Vec<QualityResult>> {
        let sql = format!(
            "SELECT \"check\", layer, asset, fecha::text AS fecha, severity, passed, observed, expected, failing_rows, \
             (extract(epoch FROM checked_at) * 1000000)::bigint AS checked_us FROM {} WHERE fecha = $1::text::date \
             ORDER BY checked_at, asset COLLATE \"C\", \"check\" COLLATE \"C\"",
            self.quality
        );
        let rows = self.read("read the quality results of the ledger", sql, &[Value::Text(&fecha.to_string())]).await?;
        let read = |row: &PgRow| {
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
                checked_at: some_time(row, "checked_us")?,
            })
        };
        rows.iter().map(read).collect()
    }
}
