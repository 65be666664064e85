//! A world that is broken: a database that refuses, a full or read-only disk, damaged files. Each has its own clear error,
//! and a day that was published stays what it was.
#![expect(clippy::disallowed_methods, reason = "tests run programs and damage files")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
};

use simulacro_adapters::{CsvSource, PostgresServer, PrometheusMetrics, Services, SqliteLedger, connect, embedded_events};
use simulacro_core::{contract::Contract, platform::Platform};
use simulacro_shop::cdnow;

use crate::{
    binaries::{files, output, program, said, source},
    services::{self, postgres::Postgres, s3::S3},
};

const VENTAS: &str = "(order_id text, user_id text, product_id text, monto numeric(10,2), descuento numeric(10,2), \
                      region text, timestamp_venta timestamptz, fecha date)";
const DAY: &str = "1997-01-01";
/// Gives up at once, so that a test does not wait for a source that will not come.
const IMPATIENT: &str = "alert_after_s = 1\nstartup_s = 0\nretry = { retries = 0, backoff_s = 1, deadline_s = 1 }\n\
                         source_policy = { kind = \"retry\", waits_s = [], dispatch_s = 0 }\n";

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

fn has_all(run: &Output, code: i32, words: &[&str]) {
    let said = said(run);
    assert_eq!(run.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
}

/// A schema with the purchases of the shop, and a folder for the run.
struct Table {
    server: PostgresServer,
    dir: tempfile::TempDir,
}

impl Table {
    async fn new(postgres: &Postgres, schema: &str) -> Self {
        let server = postgres.server(schema).await;
        postgres.execute(&format!("CREATE TABLE {schema}.ventas {VENTAS}")).await;
        let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
        postgres.copy_csv(&format!("{schema}.ventas"), &cdnow::to_csv(&purchases)).await;
        Self { server, dir: tempfile::tempdir().expect("a temporary folder") }
    }

    fn url(&self, user: &str) -> String {
        let options = &self.server.options;
        format!("postgres://{user}@{}:{}/postgres", options.get_host(), options.get_port())
    }

    /// Runs the day as this user, with a contract that is a variation of the shop's.
    fn run(&self, url: &str, password: &str, vary: impl FnOnce(String) -> String) -> Output {
        let root = self.dir.path();
        let contract =
            std::fs::read_to_string(crate::binaries::root().join("contracts/odcs/cdnow/ventas.yaml")).expect("a contract");
        std::fs::write(root.join("ventas.yaml"), vary(contract)).expect("written");
        std::fs::write(root.join("config.toml"), IMPATIENT).expect("written");
        program("simulacro")
            .args(["batch", "run", "--postgres", url, "--schema", &self.server.schema, "--date", DAY])
            .args(["--data", text(&root.join("data")), "--contract", text(&root.join("ventas.yaml"))])
            .args(["--config", text(&root.join("config.toml"))])
            .env("PGPASSWORD", password)
            .output()
            .expect("the program starts")
    }

    fn nothing_is_written(&self) {
        assert_eq!(files(&self.dir.path().join("data/lake")), Vec::<PathBuf>::new());
    }
}

const PASSWORD: &str = "solo-para-pruebas";

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_refuses_says_why() {
    let Some(postgres) = Postgres::shared().await else { return };
    let table = Table::new(postgres, "refusing").await;
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let down = table.run(&format!("postgres://postgres@127.0.0.1:{port}/postgres"), PASSWORD, |c| c);
    has_all(&down, 1, &["connect to 127.0.0.1", &port.to_string(), "Connection refused"]);
    table.nothing_is_written();

    let wrong = table.run(&table.url("postgres"), "otra", |c| c);
    has_all(&wrong, 1, &["connect to 127.0.0.1", "password authentication failed for user \"postgres\""]);
    table.nothing_is_written();

    postgres
        .execute(
            "DO $$ BEGIN CREATE ROLE mundo_sin_permiso LOGIN PASSWORD 'nada'; EXCEPTION WHEN duplicate_object THEN NULL; END $$; \
             GRANT USAGE ON SCHEMA refusing TO mundo_sin_permiso",
        )
        .await;
    let forbidden = table.run(&table.url("mundo_sin_permiso"), "nada", |c| c);
    has_all(&forbidden, 1, &["ventas", "permission denied for table ventas"]);
    table.nothing_is_written();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_outside_its_volume_is_held_before_anything_is_written() {
    let Some(postgres) = Postgres::shared().await else { return };
    let table = Table::new(postgres, "volume").await;
    let run = |least: u32, most: u32| {
        table.run(&table.url("postgres"), PASSWORD, |contract| {
            let varied = contract
                .replacen("mustBeGreaterOrEqualTo: 1\n", &format!("mustBeGreaterOrEqualTo: {least}\n"), 1)
                .replacen("mustBeLessOrEqualTo: 10000\n", &format!("mustBeLessOrEqualTo: {most}\n"), 1);
            assert_ne!(varied, contract, "the contract has the bounds that this test varies");
            varied
        })
    };
    has_all(&run(1_000, 10_000_000), 3, &["held by quality_gate_raw", "found 212 rows, expected 1000 to 10000000 rows"]);
    table.nothing_is_written();
    has_all(&run(1, 211), 3, &["held by quality_gate_raw", "found 212 rows, expected 1 to 211 rows"]);
    table.nothing_is_written();
    assert!(run(212, 212).status.success(), "the bounds themselves are allowed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_may_be_null_all_at_once_holds_the_day() {
    let Some(postgres) = Postgres::shared().await else { return };
    let table = Table::new(postgres, "nullable").await;
    let run = || table.run(&table.url("postgres"), PASSWORD, |c| c);
    let alter = async |what: &str| postgres.execute(&format!("ALTER TABLE nullable.ventas ALTER COLUMN {what}")).await;
    assert!(run().status.success(), "a source that promises nothing is judged by its rows");
    alter("region SET NOT NULL").await;
    alter("descuento SET NOT NULL").await;
    assert!(run().status.success(), "a promise more is no harm");
    alter("descuento DROP NOT NULL").await;
    assert!(run().status.success(), "the contract lets descuento be null");
    let before = files(&table.dir.path().join("data/lake"));
    alter("region DROP NOT NULL").await;
    has_all(&run(), 3, &["held by schema_unchanged", "column region may be null now", "contract cdnow.ventas 1.0.0 requires"]);
    has_all(&run(), 3, &["column region may be null now"]);
    assert_eq!(files(&table.dir.path().join("data/lake")), before, "nothing is written");
    alter("region SET NOT NULL").await;
    assert!(run().status.success(), "{}", said(&run()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_bucket_is_named() {
    let Some(s3) = S3::start().await else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(500).map(|l| format!("{l}\n")).collect());
    let (log, registry) = embedded_events(dir.path());
    let services = Services {
        tables: Arc::new(CsvSource::open(&source).expect("a source")),
        objects: Arc::new(s3.store_of("no-hay")),
        log,
        registry,
        ledger: Arc::new(SqliteLedger::open(&dir.path().join("ledger.db")).await.expect("a ledger")),
        warehouse: None,
        metrics: Arc::new(PrometheusMetrics::default()),
    };
    let ports = connect(services, &dir.path().join("history.jsonl")).expect("connected");
    let contract = std::fs::read_to_string(crate::binaries::root().join("contracts/odcs/cdnow/ventas.yaml")).expect("a contract");
    let contract = Contract::parse("ventas.yaml", &contract).expect("a contract");
    let platform = Platform::new(toml::from_str(IMPATIENT).expect("a configuration"), contract, ports);
    let outcome = platform.run_day(DAY.parse().expect("a day"), platform.ports.env.now()).await;
    let error = match outcome {
        Ok(outcome) => outcome.result.expect_err("there is no bucket"),
        Err(error) => error,
    };
    let mut chain = error.to_string();
    let mut next = std::error::Error::source(&error);
    while let Some(cause) = next {
        chain.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    assert!(chain.contains("NoSuchBucket") && chain.contains("no-hay"), "{chain}");
}

#[test]
fn an_impossible_date_is_a_usage_error() {
    let run = output("simulacro", &["batch", "run", "--source", "x", "--data", "y", "--date", "1997-02-30"]);
    has_all(&run, 2, &["1997-02-30", "--date"]);
}

/// A published day in a folder.
fn published() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(2_000).map(|l| format!("{l}\n")).collect());
    let data = dir.path().join("data");
    let run = day(&source, &data);
    assert!(run.status.success(), "{}", said(&run));
    (dir, source, data)
}

fn day(source: &Path, data: &Path) -> Output {
    output("simulacro", &["batch", "run", "--source", text(source), "--data", text(data), "--date", DAY])
}

fn impatient(dir: &Path, source: &Path, data: &Path) -> Output {
    let config = dir.join("config.toml");
    std::fs::write(&config, IMPATIENT).expect("written");
    output(
        "simulacro",
        &["batch", "run", "--source", text(source), "--data", text(data), "--date", DAY, "--config", text(&config)],
    )
}

fn truncate(file: &Path) {
    let bytes = std::fs::read(file).expect("a file");
    std::fs::write(file, &bytes[..bytes.len() / 2]).expect("written");
}

fn ending(data: &Path, folder: &str, suffix: &str) -> PathBuf {
    let all = files(&data.join("lake").join(folder));
    all.into_iter().rfind(|p| text(p).ends_with(suffix)).unwrap_or_else(|| panic!("no {suffix} in {folder}"))
}

#[test]
fn a_truncated_raw_object_is_named_by_a_reader_and_made_anew_by_the_next_run() {
    let (_dir, source, data) = published();
    let hashes = |data: &Path| output("simulacro", &["status", "--data", text(data)]).stdout;
    let parquet = ending(&data, "raw", ".parquet");
    truncate(&parquet);
    let asked = output("simulacro", &["query", "SELECT count(*) FROM raw.ventas", "--data", text(&data)]);
    has_all(&asked, 1, &[parquet.file_name().and_then(|n| n.to_str()).expect("a name")]);
    let tables = |out: Vec<u8>| -> Vec<String> {
        String::from_utf8_lossy(&out).lines().filter(|l| l.contains('/')).map(str::to_owned).collect()
    };
    let before = tables(hashes(&data));
    let run = day(&source, &data);
    assert!(run.status.success(), "{}", said(&run));
    assert_eq!(tables(hashes(&data)), before);
    let asked = output("simulacro", &["query", "SELECT count(*) FROM raw.ventas", "--data", text(&data)]);
    assert!(asked.status.success(), "{}", said(&asked));
}

#[test]
fn a_damaged_manifest_is_named_and_stays_below_the_next() {
    let (dir, source, data) = published();
    let manifest = ending(&data, "raw", ".json");
    truncate(&manifest);
    let damaged = std::fs::read(&manifest).expect("a manifest");
    let run = impatient(dir.path(), &source, &data);
    has_all(&run, 0, &["_manifest/v000001.json", "found a damaged file"]);
    assert_eq!(std::fs::read(&manifest).expect("still there"), damaged, "it is evidence");
    assert!(manifest.with_file_name("v000002.json").exists(), "the day has a manifest that can be read");
}

#[test]
fn a_damaged_entry_of_a_delta_log_is_named_and_nothing_is_written() {
    let (dir, source, data) = published();
    let entry = ending(&data, "staging/ventas_validadas/_delta_log", ".json");
    std::fs::write(&entry, "{\"commitInfo\": {\"timestamp\"").expect("written");
    let before = files(&data.join("lake"));
    let run = impatient(dir.path(), &source, &data);
    has_all(&run, 1, &["staging/ventas_validadas"]);
    assert_eq!(files(&data.join("lake")), before, "nothing is written");
}

/// Runs a shell script that may mount file systems which only it sees. `None`, after a loud skip, where the kernel refuses.
fn in_a_namespace(script: &str, environment: &[(&str, &str)]) -> Option<Output> {
    // Root needs no namespace of users; others do, where they may have one.
    let is_root = Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout == b"0\n");
    let flags = if is_root { "-m" } else { "-rm" };
    let works = Command::new("unshare").args([flags, "--", "true"]).output().is_ok_and(|o| o.status.success());
    if !works {
        services::skip("a namespace of mounts", "allow unshare, or run as root");
        return None;
    }
    let simulacro = program("simulacro");
    let mut command = Command::new("unshare");
    command.args([flags, "--", "sh", "-euc", script]).env("SIMULACRO", simulacro.get_program());
    command.envs(environment.iter().copied());
    Some(command.output().expect("a shell"))
}

#[test]
fn a_full_disk_is_told_and_the_day_is_whole_once_there_is_room() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text);
    let (data, config) = (dir.path().join("data"), dir.path().join("config.toml"));
    std::fs::create_dir(&data).expect("a folder");
    std::fs::write(&config, IMPATIENT).expect("written");
    // Room is taken away step by step until the run fails: the place where it fails differs.
    let script = r#"
        mount -t tmpfs -o size=64m none "$DATA"
        run() { "$SIMULACRO" batch run --source "$SOURCE" --data "$DATA" --date "$1" --config "$CONFIG"; }
        run 1997-01-01 >/dev/null
        "$SIMULACRO" status --data "$DATA" > "$DIR/one_day"
        used=$(df -k --output=used "$DATA" | tail -n 1)
        for room in 4 12 20 40 60; do
          mount -o remount,size="$((used + room))k" "$DATA"
          if run 1997-01-02 2>"$DIR/error.$room"; then echo "a run found room in $room KiB" >&2; exit 9; fi
          mount -o remount,size=64m "$DATA"
        done
        run 1997-01-02 >/dev/null
        "$SIMULACRO" status --data "$DATA"
    "#;
    let environment = [("DATA", text(&data)), ("SOURCE", text(&source)), ("CONFIG", text(&config)), ("DIR", text(dir.path()))];
    let Some(run) = in_a_namespace(script, &environment) else { return };
    assert!(run.status.success(), "{}{}", said(&run), String::from_utf8_lossy(&run.stdout));
    for room in [4, 12, 20, 40, 60] {
        let error = std::fs::read_to_string(dir.path().join(format!("error.{room}"))).expect("an error");
        let is_told = error.contains("No space left on device") || error.contains("database or disk is full");
        assert!(is_told, "with {room} KiB of room: {error}");
    }
    let other = dir.path().join("other");
    for day in [DAY, "1997-01-02"] {
        let run = output("simulacro", &["batch", "run", "--source", text(&source), "--data", text(&other), "--date", day]);
        assert!(run.status.success(), "{}", said(&run));
    }
    let hashes = |text: &[u8]| -> Vec<String> {
        String::from_utf8_lossy(text).lines().filter(|l| l.contains('/')).map(str::to_owned).collect()
    };
    let undisturbed = output("simulacro", &["status", "--data", text(&other)]);
    assert_eq!(hashes(&run.stdout), hashes(&undisturbed.stdout), "the tables of a run that always had room");
}

#[test]
fn a_read_only_folder_is_named() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(2_000).map(|l| format!("{l}\n")).collect());
    let data = dir.path().join("data");
    std::fs::create_dir(&data).expect("a folder");
    let script = r#"
        mount -t tmpfs -o size=8m,ro none "$DATA"
        "$SIMULACRO" batch run --source "$SOURCE" --data "$DATA" --date 1997-01-01
    "#;
    let Some(run) = in_a_namespace(script, &[("DATA", text(&data)), ("SOURCE", text(&source))]) else { return };
    has_all(&run, 1, &[text(&data), "Read-only file system"]);
}
