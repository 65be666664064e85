//! How the cost of a day grows with the days that a table has: figures, not promises.
#![expect(clippy::disallowed_methods, reason = "a measurement reads the clock")]

use std::{sync::Arc, time::Instant};

use chrono::Days;
use object_store::memory::InMemory;
use simulacro_core::ports::{DayWrite, Input, Lakehouse, Optimize, Query};
use simulacro_lakehouse::DeltaLakehouse;

use crate::shop::day;

const TABLE: &str = "staging/ventas_validadas";

/// Milliseconds that `work` takes, the middle of five.
async fn millis<F: Future>(mut work: impl FnMut() -> F) -> f64 {
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        work().await;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    times.sort_by(f64::total_cmp);
    times[2]
}

/// `cargo test --release --workspace --test lake -- --ignored --nocapture growth`
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn growth_of_the_cost_of_a_day() {
    let store = Arc::new(InMemory::new());
    let lake = DeltaLakehouse::new(store.clone());
    let first = day("2020-01-01");
    let write = |n: u64, epoch: i64| {
        let fecha = first + Days::new(n);
        let sql = format!(
            "SELECT order_id, CASE order_id % 3 WHEN 0 THEN 'norte' WHEN 1 THEN 'sur' ELSE 'este' END AS region,
                    CAST(order_id AS DECIMAL(10,2)) AS monto, DATE '{fecha}' AS fecha
             FROM (SELECT unnest(range(0, 1000)) AS order_id)"
        );
        DayWrite { table: TABLE.into(), fecha, epoch, query: Query { sql, inputs: vec![] } }
    };
    let of_day = |n: u64| {
        let sql = format!("SELECT region, sum(monto) AS m FROM t WHERE fecha = DATE '{}' GROUP BY region", first + Days::new(n));
        Query { sql, inputs: vec![("t".into(), Input::Delta(TABLE.into()))] }
    };
    println!("days  write  epoch  read-day  open-cold  read-cold  (ms)");
    let mut days = 0;
    for until in [10, 100, 300, 600] {
        while days < until {
            lake.overwrite_day(write(days, 1)).await.expect("written");
            lake.maintain(TABLE).await.expect("maintained");
            days += 1;
        }
        measure(&lake, &store, days, &write, &of_day).await;
    }
    let optimize = Optimize { table: TABLE.into(), z_order: vec!["region".into()], target_bytes: 100 << 20 };
    let start = Instant::now();
    let done = lake.optimize(optimize).await.expect("ordered");
    println!("optimize: {done:?} in {:.0} ms", start.elapsed().as_secs_f64() * 1000.0);
    lake.maintain(TABLE).await.expect("maintained");
    measure(&lake, &store, days, &write, &of_day).await;
}

async fn measure(
    lake: &DeltaLakehouse,
    store: &Arc<InMemory>,
    days: u64,
    write: &impl Fn(u64, i64) -> DayWrite,
    of_day: &impl Fn(u64) -> Query,
) {
    let last = days - 1;
    let fecha = day("2020-01-01") + Days::new(last);
    let epoch = lake.last_epoch(TABLE, fecha).await.expect("read").unwrap_or(0);
    let mut next = epoch;
    let writes = millis(|| {
        next += 1;
        let write = write(last, next);
        async move { lake.overwrite_day(write).await.expect("written") }
    })
    .await;
    let epochs = millis(|| async { lake.last_epoch(TABLE, fecha).await.expect("read") }).await;
    let reads = millis(|| async { lake.query(&of_day(last)).await.expect("read") }).await;
    let cold = millis(|| async { DeltaLakehouse::new(store.clone()).exists(TABLE).await.expect("read") }).await;
    let cold_reads = millis(|| async { DeltaLakehouse::new(store.clone()).query(&of_day(last)).await.expect("read") }).await;
    println!("{days:4}  {writes:5.1}  {epochs:5.1}  {reads:8.1}  {cold:9.1}  {cold_reads:9.1}");
}
