//! The one configuration: a TOML with every service of a platform, which a command's flags and the environment override.
//!
//! A key of the file gives what a flag would: `[lake] data` is `--data` of each command that has it. What comes first counts:
//! a flag, then a variable such as `SIMULACRO__LAKE__STORE` (a table and a key between double underscores, the value as TOML or
//! as bare text), then the file that `--config` or `SIMULACRO_CONFIG` names, then the command's own default. A key that is not
//! known, a value of another type and one out of its range are errors that name the place, the value and what is allowed.
//! Secrets are never in it: passwords and tokens come from the variables that it names, or that the services' clients read.
//!
//! Files of before, which have one command's settings alone and no tables of these names, are read by that command as ever.

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, sync::OnceLock};

use serde::Deserialize;
use simulacro_adapters::AlertSettings;
use simulacro_core::{
    orchestrator::{AssetSettings, LoopConfig, RetryPolicy, SourcePolicy},
    platform::Config,
};

use crate::options::{Failure, default_config, read};

/// Begins the name of a variable that overrides a key.
const PREFIX: &str = "SIMULACRO__";
/// Names the file where no `--config` does.
const FILE: &str = "SIMULACRO_CONFIG";
/// Commands that have everything of their own.
const APART: [&str; 2] = ["demo", "contract"];
/// Longest time that may be configured, in seconds: a week.
const SECONDS_MAX: u64 = 604_800;

/// Where the sales come from.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SourcePart {
    /// Folder with ventas.csv.
    pub folder: Option<String>,
    /// Address of a PostgreSQL server, without a password.
    pub postgres: Option<String>,
    /// Schema of the source table.
    pub schema: Option<String>,
    /// Connections that read one day, 1 to 64.
    pub connections: Option<u64>,
}

/// Where tables, objects and history are kept.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LakePart {
    /// Folder for lake, ledger and history.
    pub data: Option<String>,
    /// Address of a store, for example s3://bucket/folder.
    pub store: Option<String>,
}

/// Where runs are kept, if not in the data folder.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LedgerPart {
    /// Address of a PostgreSQL server, without a password.
    pub postgres: Option<String>,
    /// Schema of the ledger.
    pub schema: Option<String>,
}

/// How a day is run.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BatchPart {
    /// A contract that ships, or a file.
    pub contract: Option<String>,
    /// Models that each day makes.
    pub models: Option<String>,
    /// What to do while the source is away.
    pub source_policy: Option<SourcePolicy>,
    /// What to do when a run has failed.
    pub retry: Option<RetryPolicy>,
    /// Seconds after the schedule at which an absent source is worth an alert.
    pub alert_after_s: Option<u64>,
    /// Seconds that a task needs before its first call.
    pub startup_s: Option<u64>,
}

/// The dimension API.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DimensionsPart {
    /// Base address.
    pub url: Option<String>,
    /// Dimensions that it offers.
    pub names: Vec<String>,
}

/// A service that has an address alone.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KafkaPart {
    /// Addresses of brokers, for example 127.0.0.1:9092.
    pub brokers: Option<String>,
}

/// The schema registry.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryPart {
    /// Base address.
    pub url: Option<String>,
}

/// The inference of a trained model over the features of a day.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct InferencePart {
    /// The program and its arguments; the day is in SIMULACRO_FECHA, the epoch of the run in SIMULACRO_EPOCH.
    pub command: Option<Vec<String>>,
}

/// The metrics endpoint.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsPart {
    /// Address to listen on.
    pub listen: Option<SocketAddr>,
}

/// Every service of a platform. A table that is left out is a service that there is not, or its default.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Platform {
    /// The source of the sales.
    pub source: SourcePart,
    /// The lake.
    pub lake: LakePart,
    /// The ledger.
    pub ledger: LedgerPart,
    /// The daily pipeline.
    pub batch: BatchPart,
    /// The dimension API.
    pub dimensions: DimensionsPart,
    /// The event log.
    pub kafka: KafkaPart,
    /// The schema registry.
    pub registry: RegistryPart,
    /// The inference.
    pub inference: InferencePart,
    /// The metrics endpoint.
    pub metrics: MetricsPart,
    /// The streaming job's settings, as its own file has them.
    pub stream: toml::Table,
    /// The orchestrator's loop.
    pub orchestrator: LoopConfig,
    /// What differs from the assets that ship.
    pub assets: BTreeMap<String, AssetSettings>,
    /// Where alerts go.
    pub alerts: AlertSettings,
}

/// Names of the tables.
const TABLES: [&str; 13] = [
    "source",
    "lake",
    "ledger",
    "batch",
    "dimensions",
    "kafka",
    "registry",
    "inference",
    "metrics",
    "stream",
    "orchestrator",
    "assets",
    "alerts",
];

static GIVEN: OnceLock<Platform> = OnceLock::new();

/// The configuration that this process was given; everything left out where it was given none.
pub fn given() -> Platform {
    GIVEN.get().cloned().unwrap_or_default()
}

fn wrong(place: &str, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Failure {
    format!("{place}: found {found}, expected {expected}").into()
}

impl Platform {
    /// Reads a file's text, `place` is for errors, and lets variables override it.
    ///
    /// # Errors
    /// For what the module says, naming the file's line or the variable.
    pub fn parse(place: &str, text: &str, variables: &BTreeMap<String, String>) -> Result<Self, Failure> {
        let mut platform: Self = toml::from_str(text).map_err(|e| format!("config {place}: {e}"))?;
        let mut table: toml::Table = toml::from_str(text).map_err(|e| format!("config {place}: {e}"))?;
        platform.check().map_err(|e| format!("config {place}: {e}"))?;
        // One after the other, so that an error belongs to the variable that brought it.
        for (name, value) in variables {
            let Some(path) = name.strip_prefix(PREFIX) else { continue };
            put(&mut table, name, path, value)?;
            let error = |e: &dyn std::fmt::Display| Failure::from(format!("variable {name} = {value:?}: {e}"));
            platform = table.clone().try_into().map_err(|e: toml::de::Error| error(&e.message()))?;
            platform.check().map_err(|e| error(&e))?;
        }
        Ok(platform)
    }

    /// What a type cannot say.
    fn check(&self) -> Result<(), Failure> {
        if let (Some(folder), Some(postgres)) = (&self.source.folder, &self.source.postgres) {
            return Err(wrong("[source]", format!("folder = {folder:?} and postgres = {postgres:?}"), "one of them"));
        }
        for (place, url) in [("[source] postgres", &self.source.postgres), ("[ledger] postgres", &self.ledger.postgres)] {
            let Some(url) = url else { continue };
            let Some(rest) = url.strip_prefix("postgres://").or_else(|| url.strip_prefix("postgresql://")) else {
                return Err(wrong(place, format!("{url:?}"), "postgres://user@host:port/database"));
            };
            // Whatever follows the user's name is not told.
            if rest.rsplit_once('@').is_some_and(|(user, _)| user.contains(':')) {
                return Err(wrong(place, "a password", "none: it comes from PGPASSWORD or the password file"));
            }
        }
        if let Some(n) = self.source.connections.filter(|n| !(1..=64).contains(n)) {
            return Err(wrong("[source] connections", n, "1 to 64"));
        }
        for (place, url) in [("[dimensions] url", &self.dimensions.url), ("[registry] url", &self.registry.url)] {
            if let Some(url) = url.as_ref().filter(|u| !u.starts_with("http://") && !u.starts_with("https://")) {
                return Err(wrong(place, format!("{url:?}"), "an address that begins with http:// or https://"));
            }
        }
        let mut seconds =
            vec![("[batch] alert_after_s", self.batch.alert_after_s, 0), ("[batch] startup_s", self.batch.startup_s, 0)];
        if let Some(retry) = &self.batch.retry {
            if retry.retries > 100 {
                return Err(wrong("[batch] retry.retries", retry.retries, "0 to 100"));
            }
            seconds.push(("[batch] retry.backoff_s", Some(retry.backoff_s), 1));
            seconds.push(("[batch] retry.deadline_s", Some(retry.deadline_s), 1));
        }
        if let Some(SourcePolicy::Wait { every_s, deadline_s }) = self.batch.source_policy {
            seconds.push(("[batch] source_policy.every_s", Some(every_s), 1));
            seconds.push(("[batch] source_policy.deadline_s", Some(deadline_s), 1));
        }
        for (place, value, least) in seconds {
            if let Some(value) = value.filter(|v| !(least..=SECONDS_MAX).contains(v)) {
                return Err(wrong(place, value, format!("{least} to {SECONDS_MAX} seconds")));
            }
        }
        if let Some(brokers) = &self.kafka.brokers {
            let is_address = |b: &str| b.rsplit_once(':').is_some_and(|(h, p)| !h.is_empty() && p.parse::<u16>().is_ok());
            if !brokers.split(',').all(|b| is_address(b.trim())) {
                return Err(wrong("[kafka] brokers", format!("{brokers:?}"), "host:port, or several with commas"));
            }
        }
        if self.inference.command.as_ref().is_some_and(|c| c.first().is_none_or(String::is_empty)) {
            return Err(wrong("[inference] command", format!("{:?}", self.inference.command), "a program and its arguments"));
        }
        self.orchestrator.check()?;
        Ok(())
    }

    /// How a day is run.
    pub fn config(&self) -> Config {
        let (batch, default) = (&self.batch, default_config());
        Config {
            source_policy: batch.source_policy.clone().unwrap_or(default.source_policy),
            retry: batch.retry.clone().unwrap_or(default.retry),
            alert_after_s: batch.alert_after_s.unwrap_or(default.alert_after_s),
            startup_s: batch.startup_s.unwrap_or(default.startup_s),
        }
    }

    /// The flags that the file stands for, each with its value.
    fn flags(&self) -> Vec<(&'static str, String)> {
        let mut flags = Vec::new();
        let mut give = |flag, value: &Option<String>| flags.extend(value.iter().map(|v| (flag, v.clone())));
        give("source", &self.source.folder);
        give("postgres", &self.source.postgres);
        give("schema", &self.source.schema);
        give("connections", &self.source.connections.map(|n| n.to_string()));
        give("dimensions", &self.dimensions.url);
        for name in &self.dimensions.names {
            give("dimension", &Some(name.clone()));
        }
        give("data", &self.lake.data);
        give("store", &self.lake.store);
        give("ledger", &self.ledger.postgres);
        give("ledger-schema", &self.ledger.schema);
        give("contract", &self.batch.contract);
        give("models", &self.batch.models);
        give("kafka", &self.kafka.brokers);
        give("registry", &self.registry.url);
        give("metrics", &self.metrics.listen.map(|a| a.to_string()));
        flags
    }
}

/// Puts a variable's value into the table.
fn put(table: &mut toml::Table, name: &str, path: &str, value: &str) -> Result<(), Failure> {
    let parsed = toml::from_str::<toml::Table>(&format!("v = {value}")).ok().and_then(|mut t| t.remove("v"));
    // What is no TOML is a text, so that addresses need no quotes.
    let parsed = parsed.unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let keys: Vec<String> = path.split("__").map(str::to_lowercase).collect();
    let Some((last, tables)) = keys.split_last() else { return Ok(()) };
    let mut at = table;
    for key in tables {
        let next = at.entry(key.clone()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = next.as_table_mut().ok_or_else(|| wrong(&format!("variable {name}"), format!("a key below {key}"), "none there"))?;
    }
    at.insert(last.clone(), parsed);
    Ok(())
}

/// Whether a file is one of a whole platform rather than of one command.
fn is_platform(text: &str) -> bool {
    match toml::from_str::<toml::Table>(text) {
        Ok(table) => table.is_empty() || table.keys().any(|key| TABLES.contains(&key.as_str())),
        // It is told by whoever reads it.
        Err(_) => false,
    }
}

/// The command that the arguments name, with the names above it.
fn leaf<'a>(root: &'a clap::Command, arguments: &[String]) -> (Vec<&'a str>, &'a clap::Command) {
    let (mut names, mut at) = (Vec::new(), root);
    for argument in arguments.iter().skip(1) {
        match at.find_subcommand(argument) {
            Some(next) => {
                names.push(next.get_name());
                at = next;
            }
            None => break,
        }
    }
    (names, at)
}

/// Takes `--config FILE` out of the arguments.
fn take_config(arguments: &[String]) -> (Vec<String>, Option<String>) {
    let (mut rest, mut file) = (Vec::new(), None);
    let mut all = arguments.iter();
    while let Some(argument) = all.next() {
        match argument.strip_prefix("--config=") {
            Some(path) => file = Some(path.to_owned()),
            None if argument == "--config" => match all.next() {
                Some(path) => file = Some(path.clone()),
                None => rest.push(argument.clone()),
            },
            None => rest.push(argument.clone()),
        }
    }
    (rest, file)
}

/// The arguments with what the configuration gives beside them; remembers the configuration for [`given`].
///
/// # Errors
/// When the file cannot be read or is wrong, and when a variable is.
pub fn arguments(
    root: &clap::Command,
    arguments: Vec<String>,
    variables: BTreeMap<String, String>,
) -> Result<Vec<String>, Failure> {
    let (names, command) = leaf(root, &arguments);
    if names.is_empty() || names.first().is_some_and(|name| APART.contains(name)) {
        return Ok(arguments);
    }
    let has = |flag: &str| command.get_arguments().any(|a| a.get_long() == Some(flag));
    let (rest, file) = take_config(&arguments);
    let path = file.clone().or_else(|| variables.get(FILE).cloned()).map(PathBuf::from);
    let text = match &path {
        None => String::new(),
        // A command with a `--config` of its own says itself what is wrong with it.
        Some(path) if file.is_some() && has("config") && !path.exists() => return Ok(arguments),
        Some(path) => read(path)?,
    };
    if file.is_some() && has("config") && !is_platform(&text) {
        return Ok(arguments);
    }
    let place = path.map_or_else(String::new, |p| p.display().to_string());
    let platform = Platform::parse(&place, &text, &variables)?;
    let mut out = rest;
    let said = |out: &[String], flag: &str| {
        let (bare, with_value) = (format!("--{flag}"), format!("--{flag}="));
        out.iter().any(|a| *a == bare || a.starts_with(&with_value))
    };
    let by_hand = out.clone();
    for (flag, value) in platform.flags() {
        // A source by hand stands for the file's, whichever kind each is.
        let rivals: &[&str] = if ["source", "postgres"].contains(&flag) { &["source", "postgres"] } else { &[] };
        if has(flag) && !said(&by_hand, flag) && !rivals.iter().any(|r| said(&by_hand, r)) {
            out.push(format!("--{flag}={value}"));
        }
    }
    let _ = GIVEN.set(platform);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"
[source]
postgres = "postgres://lector@db.local:5432/tienda"
connections = 4
[lake]
data = "/var/lib/simulacro"
store = "s3://cubo/lago"
[batch]
contract = "ventas"
retry = { retries = 2, backoff_s = 60, deadline_s = 3600 }
[kafka]
brokers = "127.0.0.1:9092"
[alerts.slack]
webhook_url_env = "TIENDA_SLACK"
"#;

    fn variables(all: &[(&str, &str)]) -> BTreeMap<String, String> {
        all.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn a_variable_overrides_the_file() {
        let given = variables(&[
            ("SIMULACRO__LAKE__STORE", "s3://otro"),
            ("SIMULACRO__SOURCE__CONNECTIONS", "8"),
            ("SIMULACRO__METRICS__LISTEN", "127.0.0.1:9464"),
            ("HOME", "/nowhere"),
        ]);
        let platform = Platform::parse("platform.toml", WHOLE, &given).expect("it is right");
        assert_eq!((platform.lake.store.as_deref(), platform.source.connections), (Some("s3://otro"), Some(8)));
        assert_eq!(platform.metrics.listen, "127.0.0.1:9464".parse().ok());
        assert_eq!(platform.config().retry.retries, 2);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place_and_what_is_allowed() {
        for (change, words) in [
            (("connections", "conections"), vec!["line 4", "conections", "`connections`"]),
            (("connections = 4", "connections = \"many\""), vec!["line 4", "many", "expected u64"]),
            (("connections = 4", "connections = 65"), vec!["[source] connections", "65", "1 to 64"]),
            (("backoff_s = 60", "backoff_s = 0"), vec!["[batch] retry.backoff_s", "found 0", "1 to 604800 seconds"]),
            (("[kafka]", "[kafak]"), vec!["kafak", "`kafka`"]),
            (("127.0.0.1:9092", "broker"), vec!["[kafka] brokers", "broker", "host:port"]),
            (("postgres://", "mysql://"), vec!["[source] postgres", "mysql://", "postgres://user@host"]),
            (("connections = 4", "folder = \"shop\""), vec!["[source]", "shop", "one of them"]),
        ] {
            let text = WHOLE.replace(change.0, change.1);
            let error = Platform::parse("platform.toml", &text, &BTreeMap::new()).expect_err(change.1).to_string();
            for word in words.iter().chain([&"platform.toml"]) {
                assert!(error.contains(word), "{word:?} is missing in: {error}");
            }
        }
        let secret = WHOLE.replace("lector@", "lector:hunter2@");
        let error = Platform::parse("platform.toml", &secret, &BTreeMap::new()).expect_err("a password").to_string();
        assert!(error.contains("PGPASSWORD") && !error.contains("hunter2"), "{error}");
        for (name, value, word) in [
            ("SIMULACRO__LAKE__STROE", "s3://a", "`store`"),
            ("SIMULACRO__SOURCE__CONNECTIONS", "0", "1 to 64"),
            ("SIMULACRO__SOURCE__CONNECTIONS", "many", "u64"),
        ] {
            let error = Platform::parse("platform.toml", WHOLE, &variables(&[(name, value)])).expect_err(name).to_string();
            assert!(error.contains(name) && error.contains(value) && error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_file_of_one_command_is_left_to_it() {
        assert!(is_platform(WHOLE) && is_platform("[orchestrator]\npoll_s = 1\n"));
        assert!(!is_platform("alert_after_s = 1\nstartup_s = 0\n") && !is_platform("allowed_lateness_ms = 1\n"));
    }

    #[test]
    fn flags_come_from_the_file_unless_they_are_given() {
        use clap::CommandFactory;
        let dir = tempfile::tempdir().expect("a temporary folder");
        let file = dir.path().join("platform.toml");
        #[expect(clippy::disallowed_methods, reason = "a test writes its file")]
        std::fs::write(&file, WHOLE).expect("written");
        let root = crate::Cli::command();
        let of = |words: &[&str]| {
            let given = variables(&[(FILE, file.to_str().expect("a path"))]);
            arguments(&root, words.iter().map(|w| (*w).to_owned()).collect(), given).expect("it is right")
        };
        let query = of(&["simulacro", "query", "SELECT 1"]);
        assert_eq!(query, ["simulacro", "query", "SELECT 1", "--data=/var/lib/simulacro"]);
        let run = of(&["simulacro", "batch", "run", "--source", "shop", "--data", "here", "--date", "1997-01-01"]);
        assert!(!run.iter().any(|a| a.starts_with("--postgres") || a.starts_with("--data=")), "{run:?}");
        assert!(run.contains(&"--store=s3://cubo/lago".to_owned()) && run.contains(&"--contract=ventas".to_owned()), "{run:?}");
        assert_eq!(of(&["simulacro", "demo", "--data", "d"]), ["simulacro", "demo", "--data", "d"]);
    }
}
