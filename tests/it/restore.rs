//! Disaster recovery as a person does it: folders of the lake are removed, and the command brings them back.
#![expect(clippy::disallowed_methods, reason = "tests remove folders, as the disaster does")]

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use object_store::{ObjectStoreExt, path::Path as ObjectPath};
use simulacro_adapters::{PrometheusMetrics, connect_embedded};
use simulacro_core::{
    batch::STAGING,
    contract::Contract,
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::{Config, Platform},
    ports::{Alert, Metrics, Notifier, Ports, Result, Vacuum},
};

use crate::binaries::{files, output, said, source};

const DAYS: [&str; 3] = ["1997-01-01", "1997-01-02", "1997-01-03"];

struct Shop {
    _dir: tempfile::TempDir,
    source: PathBuf,
    data: PathBuf,
    /// What `status` says of the tables before anything is lost.
    before: Vec<String>,
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

impl Shop {
    /// Three published days.
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let source = source(dir.path(), |csv| csv.lines().take(1_200).map(|l| format!("{l}\n")).collect());
        let data = dir.path().join("data");
        let mut shop = Self { _dir: dir, source, data, before: Vec::new() };
        for day in DAYS {
            let (code, said) = shop.day(day);
            assert_eq!(code, Some(0), "{said}");
        }
        shop.before = shop.hashes();
        assert_eq!(shop.before.len(), 3, "{:?}", shop.before);
        shop
    }
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let run = output("simulacro", &[arguments, &["--data", text(&self.data)]].concat());
        (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run))
    }
    fn day(&self, day: &str) -> (Option<i32>, String) {
        let source = text(&self.source);
        self.run(&["batch", "run", "--source", source, "--date", day, "--models", "metricas_diarias"])
    }
    fn restore(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let restore = ["restore", "--source", text(&self.source), "--models", "metricas_diarias"];
        self.run(&[&restore, arguments].concat())
    }
    fn hashes(&self) -> Vec<String> {
        self.run(&["status"]).1.lines().filter(|l| l.contains('/')).map(str::to_owned).collect()
    }
    fn lake(&self, path: &str) -> PathBuf {
        self.data.join("lake").join(path)
    }
    fn remove(&self, path: &str) {
        std::fs::remove_dir_all(self.lake(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

#[test]
fn a_staging_folder_that_was_removed_comes_back_from_raw_with_the_same_hashes() {
    let shop = Shop::new();
    shop.remove("staging");
    let left = files(&shop.data);
    let (code, said) = shop.restore(&["staging"]);
    assert_eq!(code, Some(1), "something is lost: {said}");
    for wanted in [
        "staging/ventas_validadas      gone: lost 3 days",
        "versions     no ",
        "time_travel  no ",
        "raw          yes",
        "staging/ventas_validadas: raw, the cheapest that works: the raw layer has these days",
    ] {
        assert!(said.contains(wanted), "{wanted:?} is missing in: {said}");
    }
    let objects = |all: Vec<PathBuf>| all.into_iter().filter(|f| f.starts_with(shop.lake(""))).collect::<Vec<_>>();
    assert_eq!(objects(files(&shop.data)), objects(left), "a plan changes nothing");
    // The source is not asked for the days: it has lost them, too.
    std::fs::write(shop.source.join("ventas.csv"), "order_id,user_id,product_id,monto,descuento,region,timestamp_venta,fecha\n")
        .expect("the source is emptied");
    let (code, said) = shop.restore(&["staging", "--execute"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("RPO 0 days, 0 rows") && said.contains("RTO "), "{said}");
    assert_eq!(shop.hashes(), shop.before);
    let (code, said) = shop.restore(&["staging", "--execute"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("nothing was lost"), "{said}");
}

#[test]
fn a_mart_that_was_removed_is_made_again_from_staging() {
    let shop = Shop::new();
    shop.remove("marts/metricas_diarias");
    let (code, said) = shop.restore(&["marts", "--execute"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("marts/metricas_diarias: models, the cheapest that works"), "{said}");
    assert_eq!(shop.hashes(), shop.before);
}

#[test]
fn a_log_that_was_removed_is_written_again_beside_the_files_that_are_left() {
    let shop = Shop::new();
    shop.remove("staging/ventas_validadas/_delta_log");
    let (code, said) = shop.restore(&["staging/ventas_validadas", "--execute"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(shop.hashes(), shop.before);
}

#[test]
fn files_of_the_newest_version_are_done_without_while_the_log_lives() {
    let shop = Shop::new();
    let day = "staging/ventas_validadas/fecha=1997-01-02";
    let first = files(&shop.lake(day));
    // The same day once more: the version before it has the same rows in other files.
    assert_eq!(shop.day("1997-01-02").0, Some(0));
    for file in files(&shop.lake(day)).into_iter().filter(|f| !first.contains(f)) {
        std::fs::remove_file(file).expect("removed");
    }
    let (code, said) = shop.restore(&["staging", "--execute"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("staging/ventas_validadas: time_travel, the cheapest that works: version "), "{said}");
    assert!(said.contains("damaged: lost 1 day"), "{said}");
    assert_eq!(shop.hashes(), shop.before);
}

#[test]
fn a_day_is_held_while_a_table_is_gone_so_that_no_new_one_hides_it() {
    let shop = Shop::new();
    shop.remove("staging");
    let (code, said) = shop.day("1997-01-04");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("table_lost: found no table staging/ventas_validadas") && said.contains("simulacro restore"), "{said}");
    assert!(!shop.lake("staging/ventas_validadas").exists(), "nothing was made in its place");
    assert_eq!(shop.restore(&["staging", "--execute"]).0, Some(0));
    assert_eq!(shop.hashes(), shop.before);
    assert_eq!(shop.day("1997-01-04").0, Some(0));
}

#[test]
fn what_raw_has_lost_too_is_told_and_extracted_again_only_when_asked_for() {
    let shop = Shop::new();
    shop.remove("staging");
    shop.remove("raw/ventas/fecha=1997-01-02");
    let (code, said) = shop.restore(&["staging", "--execute"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("RPO staging/") && said.contains("1 day, ") && said.contains("1997-01-02"), "{said}");
    assert!(said.contains("--from-source"), "{said}");
    let (code, said) = shop.restore(&["staging", "--from-source", "--execute"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(shop.hashes(), shop.before);
}

#[test]
fn a_target_that_is_no_table_is_refused_with_those_that_are() {
    let shop = Shop::new();
    let (code, said) = shop.restore(&["stagin"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("restore stagin: found no such table") && said.contains("marts/metricas_diarias"), "{said}");
}

/// Remembers alerts, and counts of deletes.
#[derive(Debug, Default)]
struct Heard(Mutex<(Vec<Alert>, u64)>);

#[async_trait]
impl Notifier for Heard {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        self.0.lock().expect("the pager").0.push(alert.clone());
        Ok(())
    }
    async fn resolve(&self, _: &str) -> Result<()> {
        Ok(())
    }
}

impl Metrics for Heard {
    fn count(&self, name: &'static str, _: &[(&'static str, &str)], by: u64) {
        if name == "simulacro_destructive_calls_total" {
            self.0.lock().expect("the counter").1 += by;
        }
    }
    fn gauge(&self, _: &'static str, _: &[(&'static str, &str)], _: f64) {}
}

#[tokio::test]
async fn a_delete_outside_of_vacuum_is_counted_and_told_and_those_of_vacuum_are_not() {
    let shop = Shop::new();
    // The same day once more, so that VACUUM has something to remove.
    assert_eq!(shop.day("1997-01-02").0, Some(0));
    let below = connect_embedded(&shop.source, &shop.data, Arc::new(PrometheusMetrics::default())).await.expect("connected");
    let heard = Arc::new(Heard::default());
    let config = Config {
        source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 },
        retry: RetryPolicy { retries: 0, backoff_s: 1, deadline_s: 1 },
        alert_after_s: 1,
        startup_s: 0,
    };
    let contract =
        Contract::parse("ventas.yaml", include_str!("../../contracts/odcs/cdnow/ventas.yaml")).expect("the contract parses");
    let platform = Platform::new(config, contract, Ports { notifier: heard.clone(), metrics: heard.clone(), ..below });
    let ports = &platform.ports;
    let now = ports.env.now();
    let vacuum = Vacuum { table: STAGING.into(), now, retention_hours: 0, allow_short_retention: true, dry_run: false };
    let removed = ports.lakehouse.vacuum(vacuum).await.expect("vacuumed");
    assert!(!removed.is_empty(), "the files of the day before it was run again");
    platform.tell_destructive().await;
    assert!(heard.0.lock().expect("nobody panicked").0.is_empty(), "VACUUM is no disaster");

    let file = format!("{STAGING}/_delta_log/00000000000000000000.json");
    ports.objects.delete(&ObjectPath::from(file.as_str())).await.expect("deleted");
    platform.tell_destructive().await;
    platform.tell_destructive().await;
    let (alerts, calls) = &*heard.0.lock().expect("nobody panicked");
    assert_eq!((alerts.len(), *calls), (1, 1), "once: {alerts:?}");
    assert!(alerts[0].kind == "destructive_call" && alerts[0].summary.contains(&file), "{alerts:?}");
}
