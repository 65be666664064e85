//! The one integration binary.
//!
//! The whole of a few real days, embedded, against a naive computation from the same purchases.

mod conformance;
mod embedded;
mod postgres;
mod s3;
mod services;

use std::{collections::BTreeMap, sync::Arc};

use simulacro_adapters::{CsvSource, PrometheusMetrics, connect_embedded};
use simulacro_core::{
    batch::{DayError, MART, STAGING, canonical_hash},
    contract::Contract,
    orchestrator::SourcePolicy,
    platform::{Config, Platform},
};
use simulacro_shop::cdnow;

const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");

async fn platform(source: &std::path::Path, data: &std::path::Path) -> Platform {
    let config = Config { source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 }, alert_after_s: 1, startup_s: 0 };
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
async fn a_renamed_column_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    let text = cdnow::to_csv(&purchases[..20]).replacen("region", "zona", 1);
    std::fs::write(dir.path().join("ventas.csv"), text).expect("the source is written");
    let platform = platform(dir.path(), &dir.path().join("data")).await;
    let outcome = platform.run_day(purchases[0].fecha, platform.ports.env.now()).await.expect("the ledger works");
    let error = outcome.result.expect_err("a renamed column breaks the contract");
    assert!(matches!(error, DayError::Held { gate: "schema_unchanged", .. }));
    assert!(error.to_string().contains("column region seems to be renamed to zona"), "{error}");
    assert!(!platform.ports.lakehouse.exists(STAGING).await.expect("the lake answers"));
}
