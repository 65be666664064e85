//! One PostgreSQL server as our adapters reach it: how to connect, how names become SQL, and what its errors mean.
//!
//! Each connection is opened when it is needed and closed after it, with no pool: a pooled session hides an expired
//! password until the pool is empty. Statements are never cached on the server, so that a changed table cannot make a
//! plan stale (SQLSTATE 0A000). Every wait has a bound: the server's own timeouts first, and ours a little later, for
//! a server that does not answer at all. PostgreSQL 14 or later is needed. What this leaves out is what is read and written.
#![expect(clippy::disallowed_methods, reason = "an adapter bounds its waits for the server")]

use std::{fmt, future::Future, io, str::FromStr, time::Duration};

use simulacro_core::ports::{Disposition, PortError, Result};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, PgConnection,
    postgres::{PgConnectOptions, PgDatabaseError, PgRow},
};

/// How long an answer may be overdue after the server's own timeout before the connection counts as lost.
const GRACE: Duration = Duration::from_secs(5);
/// PostgreSQL cuts longer names without an error, and they would then name something else.
const NAME_BYTES_MAX: usize = 63;

/// Where a server is and how long to wait for it.
#[derive(Clone)]
pub struct PostgresServer {
    /// Address, database and credentials.
    pub options: PgConnectOptions,
    /// Schema of the tables whose name has no schema of its own; names are looked up nowhere else.
    pub schema: String,
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for a lock, at least 1 ms.
    pub lock_timeout: Duration,
    /// Longest time for one statement, at least 1 ms. A COPY counts until its last row is taken.
    pub statement_timeout: Duration,
}

impl fmt::Debug for PostgresServer {
    /// Without the password, which the options would print.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresServer").field("address", &self.address()).field("schema", &self.schema).finish_non_exhaustive()
    }
}

/// What a caller may do after an SQLSTATE, where nothing was to be committed.
///
/// A code that is not listed is permanent: what is not known to go away is not repeated for ever.
pub fn disposition(sqlstate: &str) -> Disposition {
    match sqlstate {
        // Serialization failure and deadlock; a standby that will be primary; locks; timeouts; shutdown and start-up.
        "40001" | "40P01" | "25006" | "25P03" | "55006" | "55P03" | "57014" | "57P01" | "57P02" | "57P03" | "57P05" | "58030" => {
            Disposition::Retryable
        }
        "08P01" => Disposition::Permanent,
        // Connections, and resources that can become free again: memory, disk, connection slots.
        code if code.starts_with("08") || code.starts_with("53") => Disposition::Retryable,
        _ => Disposition::Permanent,
    }
}

/// The name of a socket error, as errno has it.
pub(crate) fn errno(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "ECONNREFUSED",
        io::ErrorKind::ConnectionReset => "ECONNRESET",
        io::ErrorKind::ConnectionAborted => "ECONNABORTED",
        io::ErrorKind::BrokenPipe => "EPIPE",
        io::ErrorKind::TimedOut => "ETIMEDOUT",
        io::ErrorKind::HostUnreachable => "EHOSTUNREACH",
        io::ErrorKind::NetworkUnreachable => "ENETUNREACH",
        // The server went away in the middle; an immediate shutdown looks like this, without any error message.
        io::ErrorKind::UnexpectedEof => "08006",
        _ => "EIO",
    }
}

/// The port error for an sqlx error, where nothing was to be committed.
pub(crate) fn classify(what: impl Into<String>, error: sqlx::Error) -> PortError {
    let (code, disposition) = match &error {
        sqlx::Error::Database(e) => {
            let code = e.code().unwrap_or_default().into_owned();
            // Behind a pooler a session outlives ours, and a migration makes its plans stale: a repeat prepares anew. Other
            // features stay unsupported. The routine names the case in every language of the server.
            let routine = e.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::routine);
            let stale = code == "0A000" && routine == Some("RevalidateCachedQuery");
            let disposition = if stale { Disposition::Retryable } else { disposition(&code) };
            (code, disposition)
        }
        sqlx::Error::Io(e) => (errno(e).to_owned(), Disposition::Retryable),
        _ => (String::new(), Disposition::Permanent),
    };
    let code = (!code.is_empty()).then_some(code);
    PortError { what: what.into(), code, disposition, retry_after: None, source: Some(error.into()) }
}

/// The same for a statement that commits: after a lost connection it may have happened.
pub(crate) fn classify_commit(what: impl Into<String>, error: sqlx::Error) -> PortError {
    let mut classified = classify(what, error);
    let lost = match (&classified.code, &classified.disposition) {
        // A transaction that the server refused with an error of its own is rolled back.
        (Some(code), _) => code.starts_with('E') || code.starts_with("08") || code.starts_with("57P"),
        (None, _) => true,
    };
    if lost {
        classified.disposition = Disposition::Unknown;
    }
    classified
}

/// A name as an SQL identifier.
///
/// # Errors
/// `Permanent` for a name that PostgreSQL would refuse or cut.
pub(crate) fn quote(name: &str) -> Result<String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
        return Err(PortError::permanent(format!(
            "use {name:?} as a name: found {} bytes, expected 1 to {NAME_BYTES_MAX}, none of them zero",
            name.len()
        ))
        .code("42602"));
    }
    Ok(format!("\"{}\"", name.replace('"', "\"\"")))
}

/// Waits for the server until `bound` is over.
pub(crate) async fn within<T, E: From<io::Error>>(
    bound: Duration,
    work: impl Future<Output = std::result::Result<T, E>>,
) -> std::result::Result<T, E> {
    match tokio::time::timeout(bound, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the server did not answer").into()),
    }
}

impl PostgresServer {
    /// A server by its URL, `postgres://user:password@host:port/database`, with waits of 10 s for a connection, 30 s
    /// for a lock and 10 minutes for a statement. A password is better left to the environment or the password file.
    ///
    /// # Errors
    /// `Permanent` when the URL is none; the text does not repeat it, because it may hold a password.
    pub fn parse(url: &str, schema: &str) -> Result<Self> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|e| PortError::permanent("read a server's URL: expected postgres://user@host:port/database").because(e))?;
        Ok(Self {
            options: options.application_name("simulacro"),
            schema: schema.into(),
            connect_timeout: Duration::from_secs(10),
            lock_timeout: Duration::from_secs(30),
            statement_timeout: Duration::from_secs(600),
        })
    }

    /// Longest wait for an answer to a statement: the server's own timeout comes first, unless it has gone silent.
    pub(crate) fn patience(&self) -> Duration {
        self.statement_timeout + GRACE
    }

    /// Host, port and database, for people.
    pub fn address(&self) -> String {
        let options = &self.options;
        format!("{}:{}/{}", options.get_host(), options.get_port(), options.get_database().unwrap_or(options.get_username()))
    }

    /// Schema and name of `table` or `schema.table`.
    pub(crate) fn split<'a>(&'a self, table: &'a str) -> (&'a str, &'a str) {
        table.split_once('.').unwrap_or((&self.schema, table))
    }

    /// `"schema"."table"`.
    pub(crate) fn table(&self, table: &str) -> Result<String> {
        let (schema, name) = self.split(table);
        Ok(format!("{}.{}", quote(schema)?, quote(name)?))
    }

    /// Statements that make a session: no schema but `pg_catalog`, and bounded waits.
    pub(crate) fn settings(&self) -> String {
        // Keepalives let the server notice a dead client, and free its locks, within 25 s.
        format!(
            "SET search_path = pg_catalog; SET lock_timeout = {}; SET statement_timeout = {}; \
             SET idle_in_transaction_session_timeout = 0; SET idle_session_timeout = 0; SET client_min_messages = warning; \
             SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3",
            self.lock_timeout.as_millis().clamp(1, i32::MAX as u128),
            self.statement_timeout.as_millis().clamp(1, i32::MAX as u128),
        )
    }

    /// Opens a connection whose statements see no schema but `pg_catalog` and whose waits are bounded.
    pub(crate) async fn connect(&self) -> Result<PgConnection> {
        let what = || format!("connect to {}", self.address());
        let mut connection = within(self.connect_timeout, self.options.clone().disable_statement_logging().connect())
            .await
            .map_err(|e| classify(what(), e))?;
        self.run(&mut connection, self.settings()).await.map_err(|e| classify(what(), e))?;
        Ok(connection)
    }

    /// Runs statements of our own making.
    pub(crate) async fn run(&self, connection: &mut PgConnection, sql: impl Into<String>) -> sqlx::Result<u64> {
        let work = sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection);
        within(self.patience(), work).await.map(|done| done.rows_affected())
    }

    /// Runs a statement of our own making with values beside it, never in it, and returns its rows.
    pub(crate) async fn rows(
        &self,
        connection: &mut PgConnection,
        sql: impl Into<String>,
        values: &[Value<'_>],
    ) -> sqlx::Result<Vec<PgRow>> {
        let mut query = sqlx::query(AssertSqlSafe(sql.into())).persistent(false);
        for value in values {
            query = match value {
                Value::Text(text) => query.bind(*text),
                Value::MaybeText(text) => query.bind(*text),
                Value::Integer(number) => query.bind(*number),
            };
        }
        within(self.patience(), query.fetch_all(connection)).await
    }

    /// Ends a session in good order. That it failed to end changes nothing for the caller.
    pub(crate) async fn close(&self, connection: PgConnection) {
        let _ = within(self.connect_timeout, connection.close()).await;
    }
}

/// A value beside a statement.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value<'a> {
    /// Text, also for types that the statement casts it to.
    Text(&'a str),
    /// Text or null.
    MaybeText(Option<&'a str>),
    /// `int8`.
    Integer(i64),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_says_what_may_be_done() {
        let retryable = [
            "08000", "08003", "08006", "40001", "40P01", "53100", "53200", "53300", "55P03", "57014", "57P01", "57P02", "57P03",
            "25006",
        ];
        let permanent = [
            "28P01", "28000", "3D000", "42501", "42703", "42P01", "22P02", "22003", "23505", "0A000", "08P01", "XX001", "99999",
            "",
        ];
        for code in retryable {
            assert_eq!(disposition(code), Disposition::Retryable, "{code}");
        }
        for code in permanent {
            assert_eq!(disposition(code), Disposition::Permanent, "{code}");
        }
    }

    #[test]
    fn a_lost_connection_is_harmless_before_the_commit_and_unknown_in_it() {
        for (kind, code) in [
            (io::ErrorKind::ConnectionReset, "ECONNRESET"),
            (io::ErrorKind::UnexpectedEof, "08006"),
            (io::ErrorKind::TimedOut, "ETIMEDOUT"),
            (io::ErrorKind::BrokenPipe, "EPIPE"),
        ] {
            let lost = || sqlx::Error::Io(io::Error::from(kind));
            let before = classify("read", lost());
            assert_eq!((before.code.as_deref(), before.disposition), (Some(code), Disposition::Retryable));
            let during = classify_commit("commit", lost());
            assert_eq!((during.code.as_deref(), during.disposition), (Some(code), Disposition::Unknown));
        }
    }

    #[test]
    fn names_cannot_leave_their_quotes() {
        assert_eq!(quote("ventas").expect("a name"), "\"ventas\"");
        assert_eq!(quote("ven\"tas; DROP TABLE x").expect("a name"), "\"ven\"\"tas; DROP TABLE x\"");
        for bad in ["", "a\0b", &"x".repeat(64)] {
            assert_eq!(quote(bad).expect_err("no name").disposition, Disposition::Permanent);
        }
    }

    #[test]
    fn a_password_is_not_printed() {
        let server = PostgresServer::parse("postgres://etl:secreto@127.0.0.1:5432/tienda", "public").expect("a URL");
        assert!(!format!("{server:?}").contains("secreto"));
        assert_eq!(server.address(), "127.0.0.1:5432/tienda");
        let error = PostgresServer::parse("postgres://etl:secreto@127.0.0.1:puerto/tienda", "public").expect_err("no port");
        assert!(!error.chain().contains("secreto"), "{}", error.chain());
    }
}
