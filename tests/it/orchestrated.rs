//! The orchestrator over the real platform, embedded: real days, the real checks, and the commands.
#![expect(clippy::disallowed_methods, reason = "a test writes files and waits for real work")]

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use simulacro_adapters::{PrometheusMetrics, SystemEnv, connect_embedded};
use simulacro_core::{
    assets::{DailyBatch, LakeMaintenance, ecommerce_batch_daily, lake_maintenance},
    batch::MART,
    contract::Contract,
    orchestrator::{
        Asset, BreakerPolicy, LEASE, LoopConfig, Orchestrator, OrchestratorPorts, Plan, RetryPolicy, SourcePolicy, Work,
    },
    platform::{Config, PIPELINE, Platform},
    ports::{Env, Run, RunState},
};
use simulacro_shop::cdnow;

use crate::binaries::{output, said, source};

/// The real clock, put back by years.
#[derive(Debug)]
struct Shifted {
    system: SystemEnv,
    by: TimeDelta,
}

#[async_trait]
impl Env for Shifted {
    fn now(&self) -> DateTime<Utc> {
        self.system.now() - self.by
    }
    async fn sleep(&self, duration: Duration) {
        self.system.sleep(duration).await;
    }
    fn random(&self) -> u64 {
        self.system.random()
    }
    fn new_id(&self) -> String {
        self.system.new_id()
    }
}

fn platform_config() -> Config {
    Config {
        source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 },
        retry: RetryPolicy { retries: 0, backoff_s: 1, deadline_s: 1 },
        alert_after_s: 1,
        startup_s: 0,
    }
}

/// Starts an orchestrator at this time over the embedded platform, and waits until the day's last run has ended.
async fn run_one_day(dir: &Path, start: &str, contract: &str, change: impl Fn(Asset) -> Asset) -> (Arc<Platform>, Run) {
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    std::fs::write(dir.join("ventas.csv"), cdnow::to_csv(&purchases)).expect("the source is written");
    let metrics = Arc::new(PrometheusMetrics::default());
    let mut ports = connect_embedded(dir, &dir.join("data"), metrics).await.expect("the embedded platform connects");
    let system = SystemEnv::default();
    let by = system.now() - start.parse::<DateTime<Utc>>().expect("a time");
    ports.env = Arc::new(Shifted { system, by });
    let contract = Contract::parse("ventas.yaml", contract).expect("the contract parses");
    let platform = Arc::new(Platform::new(platform_config(), contract, ports));
    let daily = change(ecommerce_batch_daily().expect("an asset"));
    let fecha = daily.slot(start.parse().expect("a time")).fecha;
    let works: Vec<(Asset, Arc<dyn Work>)> = vec![
        (daily, Arc::new(DailyBatch { platform: platform.clone() })),
        (lake_maintenance().expect("an asset"), Arc::new(LakeMaintenance { platform: platform.clone() })),
    ];
    let plan = Plan::new(LoopConfig::default(), works, &BTreeMap::new()).expect("a plan");
    let p = &platform.ports;
    let ports = OrchestratorPorts {
        env: p.env.clone(),
        ledger: p.ledger.clone(),
        notifier: p.notifier.clone(),
        metrics: p.metrics.clone(),
        recorder: p.recorder.clone(),
    };
    let orchestrator = Orchestrator { plan, ports, holder: "prueba".into() };
    let ended = async {
        for _ in 0..1_200 {
            let runs = platform.ports.ledger.runs_since(PIPELINE, fecha).await.expect("the ledger answers");
            if runs.last().is_some_and(|r| r.state != RunState::Running) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    orchestrator.run(ended).await.expect("it stops");
    assert_eq!(platform.ports.ledger.lease(LEASE).await.expect("the ledger answers"), None, "the lease is given back");
    let run = platform.ports.ledger.runs(PIPELINE).await.expect("the ledger answers").pop().expect("a run");
    (platform, run)
}

const CDNOW: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");
const VENTAS: &str = include_str!("../../contracts/odcs/ventas.yaml");

#[tokio::test(flavor = "multi_thread")]
async fn a_real_day_is_published_at_its_schedule_with_metrics_per_task() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (platform, run) = run_one_day(dir.path(), "1997-01-02T02:59:59Z", CDNOW, |asset| asset).await;
    let fecha = NaiveDate::from_ymd_opt(1997, 1, 1).expect("a day");
    assert_eq!((run.state, run.fecha), (RunState::Succeeded, fecha), "{run:?}");
    assert_eq!(run.scheduled_at, Some("1997-01-02T03:00:00Z".parse().expect("a time")));
    assert!(platform.ports.lakehouse.exists(MART).await.expect("the lake answers"));

    let ledger = &platform.ports.ledger;
    let metrics = ledger.metrics(fecha).await.expect("the ledger answers");
    let of = |task: &str| metrics.iter().find(|m| m.asset == task).unwrap_or_else(|| panic!("{task} is not in {metrics:?}"));
    for task in ["verificar_fuentes", "extraer_ventas", "quality_gate_raw", "transformar", "quality_gate_final", "models"] {
        let m = of(task);
        assert_eq!(m.run_id, run.run_id);
        let fates = m.published + m.deduplicated + m.quarantined + m.rejected + m.late + m.dead_lettered;
        assert_eq!(m.expected_rows, fates, "{m:?}");
    }
    let rows = cdnow::parse(cdnow::BYTES).expect("the file").iter().filter(|p| p.fecha == fecha).count() as u64;
    assert_eq!((of("extraer_ventas").expected_rows, of("extraer_ventas").bytes > 0), (rows, true));
    assert_eq!(of("transformar").actual_rows + of("transformar").rejected, rows);

    let checks = ledger.quality(fecha).await.expect("the ledger answers");
    let of_layer = |source: bool| {
        let chosen = checks.iter().filter(move |c| (c.layer == "marts") != source);
        chosen.map(|c| (c.check.as_str(), c.passed)).collect::<BTreeMap<_, _>>()
    };
    let models = of_layer(false);
    assert!(models.len() > 3 && models.values().all(|passed| *passed), "the tests of the models are kept: {models:?}");
    let names = of_layer(true);
    assert_eq!(
        names.into_iter().collect::<Vec<_>>(),
        [("min_rows_yesterday", true), ("schema_unchanged", true), ("source_available", true)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_with_too_few_rows_is_held_by_the_breaker_before_anything_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let once = |asset: Asset| Asset { breaker: BreakerPolicy { open_s: 1, trials: 1 }, ..asset };
    let (platform, run) = run_one_day(dir.path(), "1997-01-02T02:59:59Z", VENTAS, once).await;
    assert_eq!(run.state, RunState::Held, "{run:?}");
    let text = run.report["error"].as_str().expect("a text");
    assert!(text.contains("min_rows_yesterday: found ") && text.contains("at least 1000 rows"), "{text}");
    assert!(!platform.ports.lakehouse.exists(MART).await.expect("the lake answers"));
    let checks = platform.ports.ledger.quality(run.fecha).await.expect("the ledger answers");
    assert_eq!(checks.len(), 6, "two rounds, and in each all three: {checks:?}");
}

fn ran(arguments: &[&str]) -> String {
    let run = output("simulacro", arguments);
    assert!(run.status.success(), "{}", said(&run));
    String::from_utf8_lossy(&run.stdout).into_owned()
}

fn refused(arguments: &[&str], parts: &[&str]) {
    let run = output("simulacro", arguments);
    assert!(!run.status.success(), "{}", said(&run));
    for part in parts {
        assert!(said(&run).contains(part), "{part} is not in {}", said(&run));
    }
}

#[test]
fn the_commands_lead_show_pause_and_resume() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let shop = source(dir.path(), |text| text);
    let (shop, data) = (shop.to_str().expect("a path"), dir.path().join("data"));
    let data = data.to_str().expect("a path");
    refused(&["runs", "--data", data], &["ledger.db"]);
    ran(&["orchestrate", "--source", shop, "--data", data, "--contract", "cdnow", "--stop-after", "1"]);
    let shown = ran(&["runs", "--data", data]);
    for part in ["leader     none", "ecommerce_batch_daily  (data-platform; 0 3 * * *; next ", "api_dimensiones"] {
        assert!(shown.contains(part), "{part} is not in\n{shown}");
    }
    ran(&["pause", "ecommerce_batch_daily", "--data", data, "--by", "ana", "--why", "inventario"]);
    let shown = ran(&["runs", "--data", data, "--asset", "ecommerce_batch_daily"]);
    assert!(shown.contains("paused by ana since ") && shown.contains(": inventario") && !shown.contains("api_dim"), "{shown}");
    let said = ran(&["resume", "ecommerce_batch_daily", "--data", data]);
    assert!(said.contains("runs again, next ") && said.contains("ana had paused it"), "{said}");
    assert!(!ran(&["runs", "--data", data]).contains("paused"));
    refused(
        &["pause", "ecommerce_batch", "--data", data, "--by", "ana", "--why", "x"],
        &["ecommerce_batch is not known", "api_dimensiones"],
    );
}

#[test]
fn a_wrong_configuration_names_what_is_wrong_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let shop = source(dir.path(), |text| text);
    let config = dir.path().join("orchestrate.toml");
    let data = dir.path().join("data");
    for (text, parts) in [
        ("[orchestrator]\nlease = 3", vec!["orchestrate.toml", "lease", "lease_ttl_s"]),
        ("[assets.ecommerce_batch_daily]\nschedule = '0 3 * *'", vec!["ecommerce_batch_daily", "schedule", "0 3 * *"]),
        ("[assets.nomina]\nsla_s = 3", vec!["nomina is not known", "ecommerce_batch_daily"]),
        ("[inference]\ncommand = []", vec!["[inference] command", "a program and its arguments"]),
        ("[alerts.slack]\nwebhook_url_env = 'NO_ESTA_PUESTA'", vec!["NO_ESTA_PUESTA is not set"]),
        ("[alerts.pagerduty]\nrouting_key = 'secreta'", vec!["routing_key_env"]),
    ] {
        std::fs::write(&config, text).expect("the configuration is written");
        let path = |p: &Path| p.to_str().expect("a path").to_owned();
        let (shop, data, config) = (path(&shop), path(&data), path(&config));
        refused(&["orchestrate", "--source", &shop, "--data", &data, "--config", &config, "--stop-after", "1"], &parts);
        assert!(!Path::new(&data).exists(), "{text}");
    }
}
