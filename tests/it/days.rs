//! Whole days, embedded, against a naive computation from the same purchases.
#![expect(clippy::disallowed_methods, reason = "tests write the source")]

use std::{collections::BTreeMap, sync::Arc};

use arrow::{array::AsArray, datatypes::Int64Type};
use simulacro_adapters::{CsvSource, PrometheusMetrics, connect_embedded};
use simulacro_core::{
    batch::{DayError, MART, STAGING, WAREHOUSE, canonical_hash},
    contract::Contract,
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::{Config, PIPELINE, Platform},
};
use simulacro_shop::cdnow;

const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");

async fn platform(source: &std::path::Path, data: &std::path::Path) -> Platform {
    let config = Config {
        source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 },
        retry: RetryPolicy { retries: 0, backoff_s: 1, deadline_s: 1 },
        alert_after_s: 1,
        startup_s: 0,
    };
    let contract = Contract::parse("ventas.yaml", CONTRACT).expect("the shipped contract parses");
    let metrics = Arc::new(PrometheusMetrics::default());
    let ports = connect_embedded(source, data, metrics).await.expect("the embedded platform connects");
    Platform::new(config, contract, ports)
}

#[tokio::test(flavor = "multi_thread")]
async fn days_equal_a_naive_sum_and_a_second_run_changes_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    std::fs::write(dir.path().join("ventas.csv"), cdnow::to_csv(&purchases)).expect("the source is written");
    let days: Vec<_> = CsvSource::open(dir.path()).expect("source").days("ventas").expect("days").into_iter().take(2).collect();
    let platform = platform(dir.path(), &dir.path().join("data")).await;
    let mut seen = Vec::new();
    for _ in 0..2 {
        for &day in &days {
            let outcome = platform.run_day(day, platform.ports.env.now()).await.expect("the ledger works");
            let report = outcome.result.expect("the day is published");
            let of_day = || purchases.iter().filter(|p| p.fecha == day);
            assert_eq!(report.revenue_cents, of_day().map(|p| p.monto_cents).sum::<i64>());
            let zero = of_day().filter(|p| p.monto_cents == 0).count() as u64;
            let mut fates = BTreeMap::from([("published".to_owned(), of_day().count() as u64 - zero)]);
            if zero > 0 {
                fates.insert("rejected".into(), zero);
            }
            assert_eq!(report.fates, fates);
        }
        let mut hashes = Vec::new();
        for table in [STAGING, MART] {
            hashes.push(canonical_hash(platform.ports.lakehouse.as_ref(), table).await.expect("the table is read"));
        }
        seen.push(hashes);
    }
    assert_eq!(seen[0], seen[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_warehouse_shows_what_the_mart_shows() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    std::fs::write(dir.path().join("ventas.csv"), cdnow::to_csv(&purchases)).expect("the source is written");
    let platform = platform(dir.path(), &dir.path().join("data")).await;
    let day = purchases[0].fecha;
    let outcome = platform.run_day(day, platform.ports.env.now()).await.expect("the ledger works");
    let report = outcome.result.expect("the day is published");
    let sql = format!("SELECT CAST(sum(revenue_neto) * 100 AS BIGINT), count(*) FROM {WAREHOUSE}");
    let batches = platform.ports.warehouse.query(&sql, &[WAREHOUSE]).await.expect("the warehouse answers");
    let value = |column: usize| batches[0].column(column).as_primitive::<Int64Type>().value(0);
    assert_eq!((value(0), value(1) as u64), (report.revenue_cents, report.published.mart_rows));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_runs_of_a_pipeline_one_is_told_that_it_is_busy() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    std::fs::write(dir.path().join("ventas.csv"), cdnow::to_csv(&purchases)).expect("the source is written");
    let data = dir.path().join("data");
    let (first, second) = (platform(dir.path(), &data).await, platform(dir.path(), &data).await);
    let day = purchases[0].fecha;
    let now = first.ports.env.now();
    let (a, b) = tokio::join!(first.run_day(day, now), second.run_day(day, now));
    let busy = |e: &DayError| matches!(e, DayError::Port { source, .. } if source.code.as_deref() == Some("BUSY"));
    let refused = [a, b].into_iter().filter_map(Result::err).filter(busy).count();
    assert_eq!(refused, 1, "one run is refused");
    let runs = first.ports.ledger.runs(PIPELINE).await.expect("the ledger answers");
    assert_eq!(runs.len(), 1);
}
