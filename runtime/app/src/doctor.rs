//! `simulacro doctor`: looks at every service that is configured, and says what is wrong, with its exact code and what to do.
//!
//! Every check runs, whatever the others say, and each is bounded in time. The store is tried with one small object of its
//! own, which is removed again; nothing else is written, and no alert is sent. What is not configured is left out, and said.

use std::{
    error::Error,
    fmt::Write as _,
    future::Future,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use chrono::{DateTime, NaiveDate, Utc};
use clap::{Args, ValueEnum};
use futures::TryStreamExt;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, local::LocalFileSystem, path::Path as ObjectPath};
use serde::Serialize;
use simulacro_adapters::{
    AlertSettings, EmbeddedSource, HttpDimensions, HttpDimensionsSettings, HttpRegistry, HttpRegistrySettings, KafkaConfig,
    KafkaLog, PostgresServer, PostgresSource, SqliteLedger, SystemEnv, kept_store, open_lake, open_store,
};
use simulacro_core::{
    avro::CLICKS_SUBJECT,
    contract::{Contract, catalogue},
    dimensions::Dimension,
    models::shipped,
    platform::PIPELINE,
    ports::{
        DimensionApi, Env, PortError, RunLedger, RunState, SchemaRegistry, TableSource, event_log::EventLog,
        schema_registry::SUBJECT_NOT_FOUND,
    },
    streaming::config::Topics,
};
use simulacro_lakehouse::query::{AsOf, SqlLake};

use crate::{
    config::given,
    options::{Failure, StoreArgs, dimension_settings, load_config, load_contract, postgres_config},
};

/// Longest time for one check.
const CHECK_MAX: Duration = Duration::from_secs(15);
/// Longest wait for a connection, so that a check can still tell the code.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// How far the store's clock may be from ours.
const SKEW_MAX_S: i64 = 5;
/// Memory for looking into tables.
const MEMORY_BYTES: usize = 128 << 20;

/// A channel of alerts, with the environment variable that holds its secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Channel {
    /// An address that takes Alertmanager's webhook: SIMULACRO_WEBHOOK_URL
    Webhook,
    /// A Slack channel: SIMULACRO_SLACK_WEBHOOK_URL
    Slack,
    /// A PagerDuty service: SIMULACRO_PAGERDUTY_ROUTING_KEY
    Pagerduty,
    /// The token of a webhook: SIMULACRO_WEBHOOK_TOKEN
    Token,
}

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro doctor --data lake
  simulacro doctor --data lake --source shop --contract cdnow
  simulacro doctor --data lake --postgres postgres://lector@db.local/tienda --contract ventas --kafka 127.0.0.1:9092 --json

Exit codes: 0 nothing is wrong, 1 something is, 2 usage")]
pub struct DoctorArgs {
    /// Folder for lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// Folder with ventas.csv
    #[arg(long, conflicts_with = "postgres")]
    source: Option<PathBuf>,
    /// A PostgreSQL server as source; the password comes from PGPASSWORD or the password file
    #[arg(long)]
    postgres: Option<String>,
    /// Schema of the source table in PostgreSQL
    #[arg(long, default_value = "public")]
    schema: String,
    /// A contract that ships with the program (cdnow, ventas) or a file
    #[arg(long, default_value = "cdnow")]
    contract: String,
    /// TOML of a whole platform, or as for batch run
    #[arg(long)]
    config: Option<PathBuf>,
    /// Addresses of Kafka brokers, for example 127.0.0.1:9092
    #[arg(long)]
    kafka: Option<String>,
    /// Address of a schema registry, for example http://127.0.0.1:8081
    #[arg(long)]
    registry: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
    /// Base address of the dimension API
    #[arg(long)]
    dimensions: Option<String>,
    /// What the API offers; may be given more than once. Without it inventario, precios and productos
    #[arg(long, value_parser = ["inventario", "precios", "productos"])]
    dimension: Vec<String>,
    /// A PostgreSQL server as ledger; without it the one in the data folder
    #[arg(long)]
    ledger: Option<String>,
    /// Schema of the ledger in PostgreSQL
    #[arg(long, default_value = "simulacro")]
    ledger_schema: String,
    /// Channels of alerts whose secrets must be there, beside those that [alerts] of the configuration names; may be given more
    /// than once
    #[arg(long, value_enum)]
    notifier: Vec<Channel>,
    /// Free space that the data folder's disk must have, in MiB
    #[arg(long, default_value_t = 1_024)]
    free_mib: u64,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Failed,
    LeftOut,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    /// The service's own code, for example `ECONNREFUSED` or an SQLSTATE; empty when there is none.
    code: String,
    /// What was found.
    found: String,
    /// What to do about it; empty when nothing need be done.
    advice: String,
}

/// What is wrong, before it has a name.
struct Wrong {
    code: String,
    found: String,
    advice: String,
}

type Outcome = Result<String, Wrong>;

impl Wrong {
    fn new(code: impl Into<String>, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { code: code.into(), found: found.into(), advice: advice.into() }
    }

    /// An error with its whole chain; the advice depends on the code, where it is one that is known.
    fn of(error: &(dyn Error + 'static), advice: &str) -> Self {
        let (mut found, mut of_port, mut of_system) = (error.to_string(), None, None);
        let mut next = Some(error);
        while let Some(cause) = next {
            let text = cause.to_string();
            if !found.contains(&text) {
                let _ = write!(found, ": {text}");
            }
            of_port = of_port.or_else(|| cause.downcast_ref::<PortError>().and_then(|e| e.code.clone()));
            // The system's own code says more than an adapter's word for several of them.
            of_system = of_system.or_else(|| cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error).map(errno));
            next = cause.source();
        }
        let code = of_system.or(of_port).unwrap_or_default();
        let advice = known(&code).unwrap_or(advice).to_owned();
        Self { code, found: found.replace('\n', " "), advice }
    }
}

/// The name of an error number of the system; the number where it has none here.
fn errno(number: i32) -> String {
    let name = match number {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EIO => "EIO",
        libc::EACCES => "EACCES",
        libc::EEXIST => "EEXIST",
        libc::ENOTDIR => "ENOTDIR",
        libc::EISDIR => "EISDIR",
        libc::EMFILE => "EMFILE",
        libc::ENOSPC => "ENOSPC",
        libc::EROFS => "EROFS",
        libc::EDQUOT => "EDQUOT",
        libc::ECONNREFUSED => "ECONNREFUSED",
        libc::ECONNRESET => "ECONNRESET",
        libc::ETIMEDOUT => "ETIMEDOUT",
        libc::EHOSTUNREACH => "EHOSTUNREACH",
        libc::ENETUNREACH => "ENETUNREACH",
        other => return format!("errno {other}"),
    };
    name.into()
}

/// What to do about a code, whatever gave it.
fn known(code: &str) -> Option<&'static str> {
    Some(match code {
        "ENOENT" => "create it, or correct the path",
        "EACCES" | "EPERM" => "give the user that runs this program the right to read and write there",
        "ENOTDIR" => "something that is no folder stands where a folder is needed: move it, or correct the path",
        "EROFS" => "the disk is mounted read only: mount it for writing, or use another",
        "ENOSPC" | "EDQUOT" => "the disk is full: remove old versions, or enlarge it",
        "EMFILE" => "raise the number of open files (ulimit -n)",
        "ECONNREFUSED" => "nothing listens there: start the service, or correct the address",
        "ETIMEDOUT" | "EHOSTUNREACH" | "ENETUNREACH" => "no answer from there: look at network, firewall and address",
        "28P01" | "28000" => {
            "the server refuses the user: correct PGPASSWORD or the password file; passwords expire after 90 days"
        }
        "3D000" => "there is no such database: correct the name at the end of the address",
        "42501" => "the user lacks a grant: GRANT USAGE ON SCHEMA, and SELECT ON the table",
        "42P01" => "there is no such table: correct --schema, or the contract's table",
        "53300" => "the server has no connection left: raise max_connections, or use fewer --connections",
        "57P03" => "the server is starting: wait, and ask again",
        _ => return None,
    })
}

/// Runs a check, but not for ever.
async fn within(name: &'static str, check: impl Future<Output = Outcome>) -> Check {
    let late = || {
        let found = format!("no answer in {} s", CHECK_MAX.as_secs());
        Err(Wrong::new("ETIMEDOUT", found, known("ETIMEDOUT").unwrap_or_default()))
    };
    let outcome = tokio::time::timeout(CHECK_MAX, check).await.unwrap_or_else(|_| late());
    let (verdict, code, found, advice) = match outcome {
        Ok(found) => (Verdict::Ok, String::new(), found, String::new()),
        Err(Wrong { code, found, advice }) => (Verdict::Failed, code, found, advice),
    };
    Check { name, verdict, code, found, advice }
}

fn left_out(name: &'static str, why: &str) -> Check {
    Check { name, verdict: Verdict::LeftOut, code: String::new(), found: why.into(), advice: String::new() }
}

/// Contracts and models that ship, the chosen contract, and the configuration.
async fn files(args: &DoctorArgs) -> Outcome {
    let count = catalogue::shipped().map_err(|e| Wrong::of(&e, "this program is damaged: install it again"))?.len();
    let models = shipped().map_err(|e| Wrong::of(&e, "this program is damaged: install it again"))?.models().count();
    let contract =
        load_contract(&args.contract).map_err(|e| Wrong::of(e.as_ref(), "correct --contract, or the file that it names"))?;
    load_config(args.config.as_deref()).map_err(|e| Wrong::of(e.as_ref(), "correct the file that --config names"))?;
    let config = args.config.as_ref().map_or_else(|| "the default configuration".into(), |c| c.display().to_string());
    Ok(format!("{count} contracts and {models} models that ship, contract {}, {config}", contract.id))
}

/// A source that answers, with the columns of the contract.
async fn source(tables: &dyn TableSource, contract: &Contract, place: &str) -> Outcome {
    const ADVICE: &str = "look at the source's own log";
    tables.ping().await.map_err(|e| Wrong::of(&e, ADVICE))?;
    let columns = tables.columns(&contract.table).await.map_err(|e| Wrong::of(&e, ADVICE))?;
    let differences = contract.differences(&columns);
    if differences.is_empty() {
        return Ok(format!("{place} has {} with the {} columns of its contract", contract.table, columns.len()));
    }
    let list = differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    Err(Wrong::new(
        "schema_unchanged",
        list,
        format!("correct the source, or agree on a new version of contract {}", contract.id),
    ))
}

async fn embedded(folder: &Path, contract: &Contract) -> Outcome {
    let files = EmbeddedSource::open(folder).map_err(|e| Wrong::of(&e, "correct the file that is named"))?;
    source(&files, contract, &folder.display().to_string()).await
}

async fn postgres(url: &str, schema: &str, contract: &Contract) -> Outcome {
    let server =
        PostgresServer::parse(url, schema).map_err(|e| Wrong::of(&e, "write it as postgres://user@host:port/database"))?;
    let server = PostgresServer { connect_timeout: CONNECT_MAX, ..server };
    let place = server.address();
    let tables = PostgresSource::new(server, postgres_config(std::num::NonZeroUsize::MIN));
    source(&tables, contract, &place).await
}

/// The folder of the data, and what in it is there.
async fn folder(data: &Path) -> Outcome {
    let about = std::fs::metadata(data).map_err(|e| {
        Wrong::new(e.raw_os_error().map(errno).unwrap_or_default(), format!("{}: {e}", data.display()), {
            "create the folder; the first run makes what is in it"
        })
    })?;
    if !about.is_dir() {
        return Err(Wrong::new("ENOTDIR", format!("{} is no folder", data.display()), known("ENOTDIR").unwrap_or_default()));
    }
    let there: Vec<&str> = ["lake", "ledger.db", "history.jsonl"].into_iter().filter(|f| data.join(f).exists()).collect();
    let has = if there.is_empty() { "nothing yet, the first run makes it".into() } else { there.join(", ") };
    Ok(format!("{} has {has}", data.display()))
}

/// Where the lake is: at the address that is given or that the data folder remembers; `None` when it is in the folder.
fn lake_url(args: &DoctorArgs) -> Result<Option<String>, Wrong> {
    let kept = || kept_store(&args.data).map_err(|e| Wrong::of(&e, "look at the rights on the data folder"));
    args.store.store.clone().map_or_else(kept, |url| Ok(Some(url)))
}

/// What a store refused, with the answer that it is known by.
fn store_failed(error: &StoreError) -> Wrong {
    let (code, advice) = match error {
        StoreError::NotFound { .. } => ("404", "create the bucket, or correct the address of the store"),
        StoreError::PermissionDenied { .. } => (
            "403",
            "correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give that key the right to read, write, list and delete",
        ),
        StoreError::Unauthenticated { .. } => ("401", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        StoreError::NotImplemented { .. } => {
            ("conditional_put", "use a store with conditional writes: without them two runs can both win")
        }
        _ => ("", "look at the store's own log, at its rights, and at AWS_ENDPOINT"),
    };
    let mut wrong = Wrong::of(error, advice);
    if wrong.code.is_empty() {
        wrong.code = code.into();
    }
    wrong
}

/// Write, write only if new, read, list and remove; returns the store's time and ours.
async fn store(args: &DoctorArgs, env: &SystemEnv) -> Result<(String, DateTime<Utc>, DateTime<Utc>), Wrong> {
    let (place, store): (String, Arc<dyn ObjectStore>) = match lake_url(args)? {
        Some(url) => {
            let store = open_store(&url).map_err(|e| Wrong::of(&e, "correct --store and the AWS_ variables"))?;
            (url, store)
        }
        None => {
            let lake = args.data.join("lake");
            let root = if lake.exists() { lake } else { args.data.clone() };
            let local = LocalFileSystem::new_with_prefix(&root).map_err(|e| store_failed(&e))?.with_automatic_cleanup(true);
            (root.display().to_string(), Arc::new(local))
        }
    };
    let path = ObjectPath::from(format!("_doctor/{}", env.new_id()));
    let outcome = exercise(store.as_ref(), &path, env).await;
    let removed = store.delete(&path).await;
    let (stored, now, is_versioned) = outcome?;
    removed.map_err(|e| store_failed(&e))?;
    match store.head(&path).await {
        Err(StoreError::NotFound { .. }) => {}
        _ => return Err(Wrong::new("", format!("{path} is still there after it was removed"), "look at the store's own log")),
    }
    // No reason to fail, but to know: it decides how a table that is removed comes back.
    let versions = if is_versioned {
        "keeps versions of what is deleted"
    } else {
        "warning: keeps no versions, so what is deleted comes back from an older version of its table or from raw only"
    };
    Ok((format!("{place} writes, refuses to write over, reads, lists and removes; {versions}"), stored, now))
}

async fn exercise(
    store: &dyn ObjectStore,
    path: &ObjectPath,
    env: &SystemEnv,
) -> Result<(DateTime<Utc>, DateTime<Utc>, bool), Wrong> {
    const BODY: &[u8] = b"simulacro doctor";
    let advice = "look at the store's own log, and at its rights";
    let failed = |e: StoreError| store_failed(&e);
    let create = || store.put_opts(path, BODY.into(), PutMode::Create.into());
    let put = create().await.map_err(failed)?;
    // A bucket without versions says nothing, or `null`.
    let is_versioned = put.version.is_some_and(|version| version != "null");
    let now = env.now();
    match create().await {
        Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {}
        Err(e) => return Err(failed(e)),
        Ok(_) => {
            let found = format!("{path} was written over, although it should only have been made");
            return Err(Wrong::new(
                "conditional_put",
                found,
                "use a store with conditional writes: without them two runs can both win",
            ));
        }
    }
    let got = store.get(path).await.map_err(failed)?;
    let stored = got.meta.last_modified;
    if got.bytes().await.map_err(failed)?.as_ref() != BODY {
        return Err(Wrong::new("", format!("{path} is not read as it was written"), advice));
    }
    let listed: Vec<_> = store.list(Some(&ObjectPath::from("_doctor"))).try_collect().await.map_err(failed)?;
    if !listed.iter().any(|m| m.location == *path) {
        return Err(Wrong::new("", format!("{path} is not listed after it was written"), advice));
    }
    Ok((stored, now, is_versioned))
}

/// Our clock against the store's, and against a date before which this program did not exist.
fn clock(stored: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Outcome {
    const ADVICE: &str = "set the clock by NTP: windows and leases go by it";
    const MADE: NaiveDate = NaiveDate::from_ymd_opt(2026, 1, 1).expect("it is in the calendar");
    if now.date_naive() < MADE {
        return Err(Wrong::new("clock_skew", format!("the clock says {now}, before this program was made"), ADVICE));
    }
    let Some(stored) = stored else {
        return Ok(format!("it is {}, and there is no other clock to compare with", now.format("%FT%TZ")));
    };
    let skew = (now - stored).num_seconds();
    if skew.abs() > SKEW_MAX_S {
        return Err(Wrong::new(
            "clock_skew",
            format!("the store's clock is {skew} s behind ours, expected at most {SKEW_MAX_S} s"),
            ADVICE,
        ));
    }
    Ok(format!("it is {}, within {SKEW_MAX_S} s of the store's clock", now.format("%FT%TZ")))
}

/// The ledger can be read, and says how the last runs ended.
async fn ledger(data: &Path) -> Outcome {
    let path = data.join("ledger.db");
    if !path.exists() {
        return Ok("none yet, the first run makes it".into());
    }
    let advice = "it is no ledger, or a damaged one: take it from a backup, or move it away and run the days again";
    let ledger = SqliteLedger::open_existing(&path).await.map_err(|e| Wrong::of(&e, advice))?;
    let runs = ledger.runs(PIPELINE).await.map_err(|e| Wrong::of(&e, advice))?;
    let open = runs.iter().filter(|r| r.state == RunState::Running).count();
    let last = runs.iter().max_by_key(|r| r.started_at);
    let last = last.map_or_else(String::new, |r| format!(", the last of {} {:?}", r.fecha, r.state).to_lowercase());
    Ok(format!("{} runs, {open} open{last}", runs.len()))
}

/// Every table of the lake can be opened and gives a row.
async fn tables(args: &DoctorArgs) -> Outcome {
    let data = &args.data;
    let in_folder = data.join("lake").exists();
    let kept = kept_store(data).map_err(|e| Wrong::of(&e, "look at the rights on the data folder"))?;
    if !in_folder && kept.is_none() {
        return Ok("none yet, the first run makes them".into());
    }
    let store = open_lake(data).map_err(|e| Wrong::of(&e, "correct --data"))?;
    let lake = SqlLake::new(store, MEMORY_BYTES);
    let names = lake.tables().await.map_err(|e| Wrong::of(&e, "look at the rights on the lake"))?;
    let mut broken = Vec::new();
    for name in &names {
        let sql = format!("SELECT * FROM {} LIMIT 1", name.split('.').map(|p| format!("\"{p}\"")).collect::<Vec<_>>().join("."));
        let read = async {
            let answer = lake.query(&sql, AsOf::Now, 1).await?;
            answer.batches.try_collect::<Vec<_>>().await
        };
        if let Err(e) = read.await {
            broken.push(format!("{name}: {}", e.chain().replace('\n', " ")));
        }
    }
    if broken.is_empty() {
        return Ok(format!("{} tables can be read", names.len()));
    }
    let advice = "restore the table from an earlier version or a copy, or run its days again from the raw layer";
    Err(Wrong::new("table_unreadable", broken.join("; "), advice))
}

/// The nearest folder that is there has enough space.
fn disk(data: &Path, free_mib: u64) -> Outcome {
    let there = data.ancestors().find(|p| p.exists()).filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let about = rustix::fs::statvfs(there).map_err(|e| Wrong::of(&io::Error::from(e), "look at the disk"))?;
    let free = about.f_bavail.saturating_mul(about.f_frsize) >> 20;
    if free < free_mib {
        let found = format!("{free} MiB free at {}, expected at least {free_mib}", there.display());
        return Err(Wrong::new("disk_space", found, "remove old versions of tables, or enlarge the disk"));
    }
    Ok(format!("{free} MiB free at {}", there.display()))
}

async fn kafka(brokers: &str) -> Outcome {
    let topic = Topics::specification().clicks;
    let advice = "look at the broker's log and its advertised listeners";
    let config = KafkaConfig { request_timeout: CONNECT_MAX, ..KafkaConfig::new(brokers) };
    let log = KafkaLog::new(config).map_err(|e| Wrong::of(&e, "correct --kafka"))?;
    match log.offsets(&topic).await {
        Ok(offsets) => {
            let records: i64 = offsets.values().map(|(first, end)| end - first).sum();
            Ok(format!("{brokers} answers, {topic} has {} partitions and about {records} records", offsets.len()))
        }
        Err(e) if e.code.as_deref() == Some("UNKNOWN_TOPIC_OR_PARTITION") => {
            Ok(format!("{brokers} answers, {topic} is not there yet, produce makes it"))
        }
        Err(e) => Err(Wrong::of(&e, advice)),
    }
}

async fn registry(url: &str) -> Outcome {
    let subject = CLICKS_SUBJECT;
    let advice = "look at the registry's log, and at the path in --registry";
    let settings =
        HttpRegistrySettings { url: url.into(), credentials: None, connect_timeout: CONNECT_MAX, timeout: CONNECT_MAX };
    let registry = HttpRegistry::new(settings).map_err(|e| Wrong::of(&e, "correct --registry"))?;
    match registry.latest(subject).await {
        Ok(schema) => Ok(format!("{url} answers, {subject} is at version {}", schema.version)),
        Err(e) if e.code.as_deref() == Some(SUBJECT_NOT_FOUND) => {
            Ok(format!("{url} answers, {subject} is not registered yet, produce does it"))
        }
        Err(e) => Err(Wrong::of(&e, advice)),
    }
}

/// A secret that a channel of alerts needs: the variable that holds it, and what it must look like.
struct Needed {
    kind: Channel,
    variable: String,
}

/// What the configured channels need; those that are named by hand have variables of fixed names.
fn needed(args: &DoctorArgs, alerts: &AlertSettings) -> Vec<Needed> {
    let of = |kind, variable: &str| Needed { kind, variable: variable.to_owned() };
    let mut all: Vec<Needed> = Vec::new();
    all.extend(alerts.pagerduty.iter().map(|p| of(Channel::Pagerduty, &p.routing_key_env)));
    all.extend(alerts.slack.iter().map(|s| of(Channel::Slack, &s.webhook_url_env)));
    all.extend(alerts.webhook.iter().filter_map(|w| w.token_env.as_deref()).map(|v| of(Channel::Token, v)));
    for kind in &args.notifier {
        all.push(of(
            *kind,
            match kind {
                Channel::Webhook => "SIMULACRO_WEBHOOK_URL",
                Channel::Slack => "SIMULACRO_SLACK_WEBHOOK_URL",
                Channel::Pagerduty => "SIMULACRO_PAGERDUTY_ROUTING_KEY",
                Channel::Token => "SIMULACRO_WEBHOOK_TOKEN",
            },
        ));
    }
    all
}

/// The secret of a channel is there and looks like one. The secret itself is never told.
fn secret(needed: &Needed, value: Option<&str>) -> Outcome {
    let Needed { kind, variable } = needed;
    let expected = match kind {
        Channel::Webhook => "an address that begins with http:// or https://",
        Channel::Slack => "an address that begins with https://",
        Channel::Pagerduty => "32 letters and digits",
        Channel::Token => "a token without spaces",
    };
    let good = |v: &str| match kind {
        Channel::Webhook => v.starts_with("http://") || v.starts_with("https://"),
        Channel::Slack => v.starts_with("https://"),
        Channel::Pagerduty => v.len() == 32 && v.bytes().all(|b| b.is_ascii_alphanumeric()),
        Channel::Token => !v.contains(char::is_whitespace),
    };
    match value.map(str::trim).filter(|v| !v.is_empty()) {
        None => Err(Wrong::new("secret_missing", format!("{variable} is not set"), format!("set {variable} to {expected}"))),
        Some(v) if good(v) => Ok(format!("{variable} is set")),
        Some(v) => {
            let found = format!("{variable} has {} characters that are not {expected}", v.chars().count());
            Err(Wrong::new("secret_malformed", found, format!("set {variable} to {expected}")))
        }
    }
}

/// The server of a ledger answers; whether the ledger is there yet is the first run's business.
async fn ledger_server(url: &str, schema: &str) -> Outcome {
    let server =
        PostgresServer::parse(url, schema).map_err(|e| Wrong::of(&e, "write it as postgres://user@host:port/database"))?;
    let server = PostgresServer { connect_timeout: CONNECT_MAX, ..server };
    let place = server.address();
    let tables = PostgresSource::new(server, postgres_config(std::num::NonZeroUsize::MIN));
    tables.ping().await.map_err(|e| Wrong::of(&e, "look at the server's own log"))?;
    Ok(format!("{place} answers, the ledger is schema {schema} in it"))
}

/// Every dimension that the API offers comes, with the columns of its contract.
async fn dimensions(url: &str, names: &[String]) -> Outcome {
    let settings = HttpDimensionsSettings { connect_timeout: CONNECT_MAX, ..dimension_settings(url, names) };
    let api = HttpDimensions::new(settings).map_err(|e| Wrong::of(&e, "correct --dimensions"))?;
    let mut came = Vec::new();
    for name in api.offered() {
        let dimension = Dimension::ALL.into_iter().find(|d| d.name() == name);
        let Some(dimension) = dimension else { continue };
        let advice = "look at the API's own log, and at SIMULACRO_DIMENSIONS_TOKEN";
        let contract = dimension.contract().map_err(|e| Wrong::of(&e, "this program is damaged: install it again"))?;
        api.fetch(&name, &contract.columns, None).await.map_err(|e| Wrong::of(&e, advice))?;
        came.push(name);
    }
    Ok(format!("{url} has {}", came.join(", ")))
}

/// Every check, in order.
async fn examine(args: &DoctorArgs) -> Vec<Check> {
    let env = SystemEnv::default();
    let mut out = vec![within("files", files(args)).await];
    // A contract that cannot be read has been told; the source is then judged by none.
    out.push(match (load_contract(&args.contract), &args.postgres, &args.source) {
        (_, None, None) => left_out("source", "neither --source nor --postgres is given"),
        (Err(_), ..) => left_out("source", "its contract cannot be read"),
        (Ok(contract), Some(url), _) => within("source", postgres(url, &args.schema, &contract)).await,
        (Ok(contract), None, Some(folder)) => within("source", embedded(folder, &contract)).await,
    });
    out.push(within("data", folder(&args.data)).await);
    let mut stored = None;
    let mut ours = env.now();
    out.push(if args.data.is_dir() {
        let tried = async {
            let (found, at, now) = store(args, &env).await?;
            (stored, ours) = (Some(at), now);
            Ok(found)
        };
        within("store", tried).await
    } else {
        left_out("store", "there is no data folder")
    });
    out.push(within("tables", tables(args)).await);
    out.push(match &args.ledger {
        Some(url) => within("ledger", ledger_server(url, &args.ledger_schema)).await,
        None => within("ledger", ledger(&args.data)).await,
    });
    out.push(within("disk", async { disk(&args.data, args.free_mib) }).await);
    out.push(within("clock", async { clock(stored, ours) }).await);
    out.push(match &args.kafka {
        Some(brokers) => within("kafka", kafka(brokers)).await,
        None => left_out("kafka", "--kafka is not given"),
    });
    out.push(match &args.registry {
        Some(url) => within("registry", registry(url)).await,
        None => left_out("registry", "--registry is not given"),
    });
    out.push(match &args.dimensions {
        Some(url) => within("dimensions", dimensions(url, &args.dimension)).await,
        None => left_out("dimensions", "--dimensions is not given"),
    });
    let secrets = needed(args, &given().alerts);
    if secrets.is_empty() {
        out.push(left_out("notifier", "no channel is configured that needs a secret, alerts go to the log"));
    }
    for needed in &secrets {
        let value = std::env::var(&needed.variable).ok();
        out.push(within("notifier", async { secret(needed, value.as_deref()) }).await);
    }
    out
}

fn render(checks: &[Check]) -> String {
    let mut text = String::new();
    for check in checks {
        let verdict = match check.verdict {
            Verdict::Ok => "ok",
            Verdict::Failed => "FAILED",
            Verdict::LeftOut => "left out",
        };
        let code = if check.code.is_empty() { String::new() } else { format!("[{}] ", check.code) };
        let _ = writeln!(text, "{verdict:<8}  {:<8}  {code}{}", check.name, check.found);
        if !check.advice.is_empty() {
            let _ = writeln!(text, "{:<20}what to do: {}", "", check.advice);
        }
    }
    let count = |v| checks.iter().filter(|c| c.verdict == v).count();
    let _ = writeln!(
        text,
        "{} checks: {} ok, {} failed, {} left out",
        checks.len(),
        count(Verdict::Ok),
        count(Verdict::Failed),
        count(Verdict::LeftOut)
    );
    text
}

/// Runs the command and returns the exit code.
pub async fn run(args: DoctorArgs) -> Result<u8, Failure> {
    let checks = examine(&args).await;
    let failed = checks.iter().any(|c| c.verdict == Verdict::Failed);
    if args.json {
        println!("{}", serde_json::json!({ "ok": !failed, "checks": checks }));
    } else {
        print!("{}", render(&checks));
    }
    Ok(u8::from(failed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_reads_well() {
        let check = |name, verdict, code: &str, found: &str, advice: &str| Check {
            name,
            verdict,
            code: code.into(),
            found: found.into(),
            advice: advice.into(),
        };
        let refused = "ask postgres at 127.0.0.1:1/tienda: connection refused";
        insta::assert_snapshot!(render(&[
            check("files", Verdict::Ok, "", "17 contracts that ship", ""),
            check("source", Verdict::Failed, "ECONNREFUSED", refused, known("ECONNREFUSED").unwrap_or_default()),
            check("kafka", Verdict::LeftOut, "", "--kafka is not given", ""),
        ]));
    }

    #[test]
    fn a_clock_that_is_off_is_told_with_how_much() {
        let now: DateTime<Utc> = "2026-06-01T12:00:00Z".parse().expect("an instant");
        let ago = |s| Some(now - chrono::TimeDelta::seconds(s));
        assert!(clock(ago(5), now).is_ok() && clock(None, now).is_ok());
        assert_eq!(clock(ago(6), now).err().map(|w| w.code).as_deref(), Some("clock_skew"));
        assert_eq!(clock(ago(-6), now).err().map(|w| w.code).as_deref(), Some("clock_skew"));
        let reset: DateTime<Utc> = "1970-01-01T00:00:10Z".parse().expect("an instant");
        assert!(clock(None, reset).is_err());
    }

    #[test]
    fn a_secret_is_judged_and_never_told() {
        let key = "0123456789abcdef0123456789abcdef";
        let needed = |kind| Needed { kind, variable: "TIENDA_SECRETO".into() };
        assert!(secret(&needed(Channel::Pagerduty), Some(key)).is_ok_and(|found| !found.contains(key)));
        for (channel, value, code) in [
            (Channel::Pagerduty, Some("short"), "secret_malformed"),
            (Channel::Slack, Some("http://hooks.example/x"), "secret_malformed"),
            (Channel::Token, Some("two words"), "secret_malformed"),
            (Channel::Webhook, Some("  "), "secret_missing"),
            (Channel::Webhook, None, "secret_missing"),
        ] {
            let Err(wrong) = secret(&needed(channel), value) else { panic!("{value:?} is taken") };
            assert_eq!(wrong.code, code);
            assert!(wrong.found.starts_with("TIENDA_SECRETO"), "{}", wrong.found);
            assert!(value.is_none_or(|v| v.trim().is_empty() || !wrong.found.contains(v)), "{}", wrong.found);
        }
    }

    #[test]
    fn the_code_of_an_error_is_found_below_others() {
        let disk = io::Error::from_raw_os_error(libc::ENOSPC);
        let wrong = Wrong::of(&PortError::permanent("put part-1").because(disk), "something else");
        assert_eq!(wrong.code, "ENOSPC");
        assert!(wrong.advice.starts_with("the disk is full"), "{}", wrong.advice);
        let refused = PortError::permanent("connect").code("28P01");
        assert_eq!(Wrong::of(&refused, "").code, "28P01");
    }
}
