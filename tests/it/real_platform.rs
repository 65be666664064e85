//! The same days through real services and embedded: PostgreSQL as source, ledger and warehouse, an S3-compatible server for
//! objects and Delta tables; the tables must be the same.
#![expect(clippy::disallowed_methods, reason = "tests write the source")]

use std::{collections::BTreeMap, num::NonZeroUsize, path::Path, sync::Arc};

use simulacro_adapters::{
    CopyReader, CsvSource, NaiveTimestamps, PostgresLedger, PostgresSource, PostgresSourceConfig, PostgresWarehouse,
    PrometheusMetrics, Services, connect, connect_embedded, embedded_events,
};
use simulacro_core::{
    batch::{MART, QUARANTINE, STAGING, WAREHOUSE, canonical_hash, strings},
    contract::Contract,
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::{Config, Platform},
    ports::Ports,
};
use simulacro_lakehouse::copy::CopyLimits;
use simulacro_shop::cdnow;

use crate::services::{postgres::Postgres, s3::S3};

const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");
const VENTAS: &str = "(order_id text, user_id text, product_id text, monto numeric(10,2), descuento numeric(10,2), \
                      region text, timestamp_venta timestamptz, fecha date)";

/// How many days of the history; a certification asks for all 546.
fn days() -> usize {
    match std::env::var("SIMULACRO_REAL_DAYS") {
        Err(_) => 4,
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("SIMULACRO_REAL_DAYS: found {text:?}, expected a number")),
    }
}

/// Runs the days, the first of them twice, and returns table and hash, and what the warehouse shows.
async fn tables(ports: Ports, source: &CsvSource) -> BTreeMap<String, String> {
    let config = Config {
        source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 },
        retry: RetryPolicy { retries: 0, backoff_s: 1, deadline_s: 1 },
        alert_after_s: 1,
        startup_s: 0,
    };
    let platform = Platform::new(config, Contract::parse("ventas.yaml", CONTRACT).expect("a contract"), ports);
    let all = source.days("ventas").expect("days");
    for fecha in all.iter().take(days()).chain(all.first()) {
        let outcome = platform.run_day(*fecha, platform.ports.env.now()).await.expect("the ledger works");
        outcome.result.expect("the day is published");
    }
    let mut out = BTreeMap::new();
    for table in [STAGING, QUARANTINE, MART] {
        out.insert(table.to_owned(), canonical_hash(platform.ports.lakehouse.as_ref(), table).await.expect("a table"));
    }
    let sql = format!(
        "SELECT CAST(fecha AS VARCHAR), region, CAST(revenue_neto AS VARCHAR), CAST(usuarios_unicos AS VARCHAR) \
         FROM {WAREHOUSE} ORDER BY 1, 2"
    );
    for batch in platform.ports.warehouse.query(&sql, &[WAREHOUSE]).await.expect("the warehouse answers") {
        let column = |at: usize| strings(&batch, at).expect("text");
        let keys = column(0).into_iter().zip(column(1));
        let values = column(2).into_iter().zip(column(3));
        out.extend(
            keys.zip(values)
                .map(|((fecha, region), (revenue, users))| (format!("{fecha} {region}"), format!("{revenue} {users}"))),
        );
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn real_services_give_the_tables_of_the_embedded_run() {
    let Some(postgres) = Postgres::shared().await else { return };
    let Some(s3) = S3::start().await else { return };
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("ventas.csv"), cdnow::to_csv(&purchases)).expect("written");
    let csv = CsvSource::open(dir.path()).expect("a source");

    let metrics = || Arc::new(PrometheusMetrics::default());
    let data = dir.path().join("data");
    let embedded = connect_embedded(dir.path(), Path::new(&data), metrics()).await.expect("connected");
    let expected = tables(embedded, &csv).await;

    let server = postgres.server("real").await;
    postgres.execute(&format!("CREATE TABLE real.ventas {VENTAS}")).await;
    postgres.copy_csv("real.ventas", &cdnow::to_csv(&purchases)).await;
    let number = |n| NonZeroUsize::new(n).expect("above zero");
    let source = PostgresSourceConfig {
        connections: number(2),
        range_rows: number(10_000),
        queued_batches: number(8),
        reader: CopyReader::InPlace,
        naive_timestamps: NaiveTimestamps::Utc,
        limits: CopyLimits::STANDARD,
    };
    let (log, registry) = embedded_events(dir.path());
    let services = Services {
        log,
        registry,
        tables: Arc::new(PostgresSource::new(server.clone(), source)),
        objects: Arc::new(s3.store()),
        ledger: Arc::new(PostgresLedger::open(server.clone()).await.expect("a ledger")),
        warehouse: Some(Arc::new(PostgresWarehouse::open(server, 64 << 20).await.expect("a warehouse"))),
        metrics: metrics(),
    };
    let real = connect(services, &dir.path().join("history.jsonl")).expect("connected");
    assert_eq!(tables(real, &csv).await, expected);
    assert_eq!(expected.len(), 3 + days() * cdnow::REGIONES.len());
}
