//! `doctor` over a healthy platform and over broken ones: each fault with its code, all of them at once, and nothing left behind.
#![expect(clippy::disallowed_methods, reason = "tests break files")]

use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use object_store::ObjectStore;
use serde_json::Value;

use crate::{
    binaries::{files, output, program, said, source},
    services::s3::S3,
};

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

fn platform() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(300).map(|l| format!("{l}\n")).collect());
    let data = dir.path().join("data");
    let run = output(
        "simulacro",
        &[
            "batch",
            "run",
            "--source",
            text(&source),
            "--data",
            text(&data),
            "--date",
            "1997-01-01",
            "--models",
            "metricas_diarias",
        ],
    );
    assert!(run.status.success(), "{}", said(&run));
    (dir, source, data)
}

/// Name, verdict, code, and what was found.
type Check = (String, String, String, String);

/// The exit code and the checks.
fn doctor(arguments: &[&str]) -> (Option<i32>, Vec<Check>) {
    let run = output("simulacro", &[&["doctor", "--json"], arguments].concat());
    let answer: Value = serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&run)));
    let text = |check: &Value, key: &str| check[key].as_str().expect("a text").to_owned();
    let checks = answer["checks"].as_array().expect("checks");
    let checks = checks.iter().map(|c| (text(c, "name"), text(c, "verdict"), text(c, "code"), text(c, "found")));
    (run.status.code(), checks.collect())
}

fn failed(checks: &[(String, String, String, String)]) -> Vec<(&str, &str)> {
    checks.iter().filter(|c| c.1 == "failed").map(|c| (c.0.as_str(), c.2.as_str())).collect()
}

#[test]
fn a_healthy_platform_passes_and_is_left_as_it_was() {
    let (dir, source, data) = platform();
    let before = files(dir.path());
    let (code, checks) = doctor(&["--data", text(&data), "--source", text(&source)]);
    assert_eq!((code, failed(&checks)), (Some(0), vec![]), "{checks:?}");
    let left_out: Vec<_> = checks.iter().filter(|c| c.1 == "left_out").map(|c| c.0.as_str()).collect();
    assert_eq!(left_out, ["kafka", "registry", "dimensions", "notifier"]);
    assert_eq!(files(dir.path()), before);
    assert!(!data.join("lake/_doctor").exists(), "an empty folder was left");
}

#[test]
fn everything_that_is_wrong_is_told_at_once_with_its_code() {
    let (dir, _, data) = platform();
    // A renamed column, a damaged log, a ledger that is none, services that are not there.
    let broken = dir.path().join("broken");
    std::fs::create_dir_all(&broken).expect("a folder");
    let csv = std::fs::read_to_string(dir.path().join("source/ventas.csv")).expect("a source");
    std::fs::write(broken.join("ventas.csv"), csv.replacen("region", "zona", 1)).expect("written");
    std::fs::write(data.join("lake/marts/metricas_diarias/_delta_log/00000000000000000000.json"), "{").expect("written");
    std::fs::write(data.join("ledger.db"), "this is no database, and long enough to be seen as none").expect("written");
    let run = program("simulacro")
        .args(["doctor", "--json", "--data", text(&data), "--source", text(&broken), "--free-mib", "99999999999"])
        .args(["--kafka", "127.0.0.1:1", "--registry", "http://127.0.0.1:1", "--notifier", "slack", "--notifier", "pagerduty"])
        .env_remove("SIMULACRO_SLACK_WEBHOOK_URL")
        .env("SIMULACRO_PAGERDUTY_ROUTING_KEY", "too short")
        .output()
        .expect("the program starts");
    assert_eq!(run.status.code(), Some(1));
    let answer: Value = serde_json::from_slice(&run.stdout).expect("JSON");
    let check = |name: &str| {
        let found = answer["checks"].as_array().expect("checks").iter().filter(|c| c["name"] == name);
        found.cloned().collect::<Vec<_>>()
    };
    for (name, verdicts) in
        [("source", 1), ("tables", 1), ("ledger", 1), ("disk", 1), ("kafka", 1), ("registry", 1), ("notifier", 2)]
    {
        let checks = check(name);
        assert_eq!(checks.len(), verdicts, "{name}");
        for c in checks {
            assert_eq!(c["verdict"], "failed", "{c}");
            assert!(!c["advice"].as_str().expect("a text").is_empty(), "{c}");
        }
    }
    assert!(check("source")[0]["found"].as_str().expect("a text").contains("column region seems to be renamed to zona"));
    assert!(check("tables")[0]["found"].as_str().expect("a text").starts_with("marts.metricas_diarias: "));
    assert_eq!(check("disk")[0]["code"], "disk_space");
    assert_eq!(check("registry")[0]["code"], "ECONNREFUSED", "{}", check("registry")[0]);
    assert_eq!(check("notifier")[0]["code"], "secret_missing");
    assert_eq!(check("notifier")[1]["code"], "secret_malformed");
    assert!(!String::from_utf8_lossy(&run.stdout).contains("too short"), "a secret was told");
    for name in ["files", "data", "store", "clock"] {
        assert_eq!(check(name)[0]["verdict"], "ok", "{}", check(name)[0]);
    }
}

#[test]
fn a_folder_that_is_not_there_is_a_finding_and_is_not_made() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let missing = dir.path().join("nowhere");
    let (code, checks) = doctor(&["--data", text(&missing), "--source", text(&missing)]);
    assert_eq!(code, Some(1));
    assert_eq!(failed(&checks), [("source", "ENOENT"), ("data", "ENOENT")], "{checks:?}");
    assert!(!missing.exists());
}

#[test]
fn a_file_where_the_lake_should_be_and_a_server_that_refuses_are_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("data");
    std::fs::create_dir_all(&data).expect("a folder");
    std::fs::write(data.join("lake"), "no folder").expect("written");
    let (code, checks) = doctor(&["--data", text(&data), "--postgres", "postgres://lector@127.0.0.1:1/tienda"]);
    assert_eq!(code, Some(1));
    let failed = failed(&checks);
    assert!(failed.contains(&("source", "ECONNREFUSED")), "{checks:?}");
    assert!(failed.iter().any(|(name, _)| *name == "store"), "{checks:?}");
    assert_eq!(std::fs::read_to_string(data.join("lake")).expect("it is still there"), "no folder");
    let (_, checks) = doctor(&["--data", text(dir.path()), "--contract", "vetnas", "--config", text(&data.join("none.toml"))]);
    let files = &checks[0];
    assert_eq!((files.0.as_str(), files.1.as_str()), ("files", "failed"));
    assert!(files.3.contains("did you mean ventas?"), "{files:?}");
}

/// The program with the variables of an S3 client.
fn with_s3(server: &S3) -> std::process::Command {
    let mut program = program("simulacro");
    program.envs(server.variables());
    program
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_behind_an_address_is_tried_with_an_object_that_is_gone_afterwards() {
    let Some(server) = S3::start().await else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let check = |store: &str, secret: Option<&str>| {
        let mut program = with_s3(&server);
        if let Some(secret) = secret {
            program.env("AWS_SECRET_ACCESS_KEY", secret);
        }
        let run = program.args(["doctor", "--json", "--data", text(dir.path()), "--store", store]).output().expect("it starts");
        let answer: Value = serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&run)));
        let checks = answer["checks"].as_array().expect("checks").clone();
        checks.into_iter().find(|c| c["name"] == "store").expect("the store is checked")
    };
    let good = check(&format!("s3://{}/lagos/uno", server.bucket()), None);
    assert_eq!(good["verdict"], "ok", "{good}");
    let left: Vec<_> = server.store().list(None).try_collect().await.expect("a listing");
    assert!(left.is_empty(), "{left:?}");
    let missing = check("s3://no-esta/lagos/uno", None);
    assert_eq!((&missing["verdict"], &missing["code"]), (&"failed".into(), &"404".into()), "{missing}");
    let refused = check(&format!("s3://{}", server.bucket()), Some("otra"));
    assert_eq!((&refused["verdict"], &refused["code"]), (&"failed".into(), &"403".into()), "{refused}");
}

#[test]
fn secrets_are_looked_for_under_the_names_that_the_configuration_gives() {
    let (dir, _, data) = platform();
    let config = dir.path().join("platform.toml");
    let alerts = "[alerts.slack]\nwebhook_url_env = \"TIENDA_SLACK\"\n[alerts.pagerduty]\nrouting_key_env = \"TIENDA_GUARDIA\"\n";
    std::fs::write(&config, format!("[lake]\ndata = {:?}\n{alerts}", text(&data))).expect("written");
    let run = program("simulacro")
        .args(["doctor", "--json", "--config", text(&config)])
        .env("TIENDA_SLACK", "https://hooks.example/x")
        .env_remove("TIENDA_GUARDIA")
        .output()
        .expect("it starts");
    let answer: Value = serde_json::from_slice(&run.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&run)));
    let found = answer["checks"].as_array().expect("checks").iter().filter(|c| c["name"] == "notifier");
    let found: Vec<_> = found.map(|c| (c["code"].as_str().expect("a code"), c["found"].as_str().expect("a text"))).collect();
    assert_eq!(found, [("secret_missing", "TIENDA_GUARDIA is not set"), ("", "TIENDA_SLACK is set")]);
    assert_eq!(run.status.code(), Some(1));
}
