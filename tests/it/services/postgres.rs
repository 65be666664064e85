//! A PostgreSQL server for tests.
//!
//! `SIMULACRO_POSTGRES` is the URL of a server on which the tests may create schemas and roles. Without it, a container is
//! started through `SIMULACRO_PROVIDER`, the program in `tests/provider`, where `ci/test` has found a container engine.
//! Without that, the newest native server is started in a temporary folder, on loopback, as a user other than root. Each
//! ends with the process that started it, however that ends: a program beside it waits for the end of its standard input.
#![expect(clippy::disallowed_methods, reason = "a test starts a real server")]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    str::FromStr,
    time::{Duration, Instant},
};

use simulacro_adapters::PostgresServer;
use sqlx::{AssertSqlSafe, Connection, PgConnection, postgres::PgConnectOptions};

/// The shell that starts the server, passes signals on that are named on its standard input, and cleans up.
const SHELL: &str = r#"
set -eu
trap '' INT
as=""
if [ "$(id -u)" = 0 ]; then
  chown -R postgres: "$DIR"
  as="setpriv --reuid=postgres --regid=postgres --init-groups"
fi
serve() {
  $as "$BIN/postgres" -D "$DIR/data" -p "$PORT" -c listen_addresses=127.0.0.1 -c unix_socket_directories="$DIR/data" \
    -c fsync=off -c full_page_writes=off -c max_connections=60 -c shared_buffers=64MB -c logging_collector=off \
    </dev/null >>"$DIR/log" 2>&1 &
  pid=$!
}
$as "$BIN/initdb" -D "$DIR/data" -A scram-sha-256 --pwfile="$DIR/password" -U postgres --no-sync -E UTF8 --locale=C.UTF-8 \
  </dev/null >"$DIR/initdb.log" 2>&1
serve
while read -r order; do
  case "$order" in
    start) serve ;;
    *) kill "-$order" "$pid"; wait "$pid" || true ;;
  esac
done
kill -INT "$pid" 2>/dev/null || true
wait "$pid" || true
rm -rf "$DIR"
"#;

const PASSWORD: &str = "solo-para-pruebas";

/// A server that accepts connections.
#[derive(Debug)]
pub struct Postgres {
    options: PgConnectOptions,
    shell: Option<Child>,
}

fn newest_binaries() -> Option<PathBuf> {
    let mut versions: Vec<(u32, PathBuf)> = fs::read_dir("/usr/lib/postgresql")
        .ok()?
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let version = path.file_name()?.to_str()?.parse().ok()?;
            Some((version, path.join("bin"))).filter(|(_, bin)| bin.join("initdb").exists() && bin.join("postgres").exists())
        })
        .collect();
    versions.sort();
    versions.pop().map(|(_, bin)| bin)
}

async fn ready(options: &PgConnectOptions, log: &Path) {
    let begun = Instant::now();
    loop {
        match PgConnection::connect_with(options).await {
            Ok(connection) => return drop(connection),
            Err(_) if begun.elapsed() < Duration::from_secs(90) => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(e) => panic!("the server is not ready: {e}\n{}", fs::read_to_string(log).unwrap_or_default()),
        }
    }
}

impl Postgres {
    /// A native server of its own, for tests that stop it; `None` when there are no binaries.
    pub async fn start() -> Option<Self> {
        static STARTED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let bin = newest_binaries()?;
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let number = STARTED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("simulacro-postgres-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).expect("a temporary folder");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).expect("a temporary folder");
        fs::write(dir.join("password"), PASSWORD).expect("a temporary file");
        let shell = Command::new("sh")
            .args(["-c", SHELL])
            .env("BIN", bin)
            .env("DIR", &dir)
            .env("PORT", port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("a shell");
        let options = PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(port)
            .username("postgres")
            .password(PASSWORD)
            .database("postgres");
        let postgres = Self { options, shell: Some(shell) };
        ready(&postgres.options, &dir.join("log")).await;
        Some(postgres)
    }

    /// A server in a container; `None` when nobody has said which program starts one.
    ///
    /// # Panics
    /// When that program fails: it was asked for by name.
    pub async fn container() -> Option<Self> {
        let program = std::env::var_os("SIMULACRO_PROVIDER")?;
        // Where only another service has an image, this one has none.
        std::env::var_os("SIMULACRO_POSTGRES_IMAGE")?;
        let mut child = Command::new(&program)
            .arg("postgres")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("start {}: {e}", program.display()));
        let mut url = String::new();
        BufReader::new(child.stdout.take().expect("standard output is a pipe")).read_line(&mut url).expect("an address");
        let options = PgConnectOptions::from_str(url.trim())
            .unwrap_or_else(|e| panic!("{} said {url:?}, expected the URL of a server: {e}", program.display()));
        Some(Self { options, shell: Some(child) })
    }

    /// The one server that most tests share; `None`, after a loud skip, when there is none.
    pub async fn shared() -> Option<&'static Self> {
        static SHARED: tokio::sync::OnceCell<Option<Postgres>> = tokio::sync::OnceCell::const_new();
        let shared = SHARED.get_or_init(|| async {
            match std::env::var("SIMULACRO_POSTGRES") {
                Ok(url) => {
                    let options = PgConnectOptions::from_str(&url).expect("SIMULACRO_POSTGRES is a URL");
                    Some(Self { options, shell: None })
                }
                Err(_) => match Self::container().await {
                    Some(container) => Some(container),
                    None => Self::start().await,
                },
            }
        });
        let shared = shared.await.as_ref();
        if shared.is_none() {
            super::skip("PostgreSQL", "set SIMULACRO_POSTGRES, start a container engine, or install the package postgresql");
        }
        shared
    }

    fn order(&mut self, order: &str) {
        let shell = self.shell.as_mut().expect("only a server of our own can be stopped");
        writeln!(shell.stdin.as_mut().expect("standard input is a pipe"), "{order}").expect("the shell lives");
    }

    /// Ends the server: `INT` closes connections in good order, `QUIT` is the immediate shutdown.
    pub fn stop(&mut self, signal: &str) {
        self.order(signal);
    }

    /// The server as adapters see it, with short waits, and an empty schema of this name.
    pub async fn server(&self, schema: &str) -> PostgresServer {
        self.execute(&format!("DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}")).await;
        PostgresServer {
            options: self.options.clone().application_name("simulacro"),
            schema: schema.to_owned(),
            connect_timeout: Duration::from_secs(20),
            lock_timeout: Duration::from_millis(700),
            statement_timeout: Duration::from_secs(120),
        }
    }

    /// A connection with all rights.
    pub async fn connect(&self) -> PgConnection {
        PgConnection::connect_with(&self.options).await.expect("the server accepts connections")
    }

    /// Runs statements with all rights.
    pub async fn execute(&self, sql: &str) {
        let mut connection = self.connect().await;
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap_or_else(|e| panic!("{sql}: {e}"));
    }

    /// Copies CSV text with a header into a table; an empty field is null.
    pub async fn copy_csv(&self, table: &str, csv: &str) {
        let mut connection = self.connect().await;
        let statement = format!("COPY {table} FROM STDIN (FORMAT csv, HEADER)");
        let mut copy = connection.copy_in_raw(&statement).await.expect("the table takes rows");
        copy.send(csv.as_bytes()).await.expect("the server takes rows");
        copy.finish().await.expect("the rows fit the table");
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(mut shell) = self.shell.take() {
            drop(shell.stdin.take());
            let _ = shell.wait();
        }
    }
}
