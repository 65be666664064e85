//! The bound on a query's memory: what needs more spills and is right, and what cannot spill says so.

use std::sync::Arc;

use arrow::{
    array::AsArray,
    compute::cast,
    datatypes::{DataType, Int64Type},
};
use object_store::memory::InMemory;
use simulacro_core::ports::{Lakehouse, Query};
use simulacro_lakehouse::DeltaLakehouse;

/// Three hundred thousand groups, each of two rows.
const GROUPS: &str = "SELECT count(*) AS grupos, CAST(sum(veces) AS BIGINT) AS filas FROM (
    SELECT clave, count(*) AS veces FROM (
      SELECT concat('una-clave-de-texto-', CAST(value % 300000 AS VARCHAR)) AS clave FROM generate_series(1, 600000))
    GROUP BY clave)";

fn lake(memory_bytes: usize) -> DeltaLakehouse {
    DeltaLakehouse::new(Arc::new(InMemory::new())).with_memory(memory_bytes)
}

fn query(sql: &str) -> Query {
    Query { sql: sql.into(), inputs: Vec::new() }
}

/// How many times a query spilled, as its plan tells.
async fn spills(lake: &DeltaLakehouse) -> u64 {
    let plan = lake.query(&query(&format!("EXPLAIN ANALYZE {GROUPS}"))).await.expect("a plan");
    let text = cast(plan[0].column(1), &DataType::Utf8).expect("text");
    let text: String = text.as_string::<i32>().iter().flatten().collect();
    assert!(text.contains("spill_count="), "{text}");
    let counts = text.split("spill_count=").skip(1);
    counts.map(|rest| rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse::<u64>().expect("a number")).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_that_needs_more_than_its_memory_spills_and_is_right() {
    let small = lake(16 << 20);
    let rows = small.query(&query(GROUPS)).await.expect("it spills");
    let value = |column: usize| rows[0].column(column).as_primitive::<Int64Type>().value(0);
    assert_eq!((value(0), value(1)), (300_000, 600_000));
    assert!(spills(&small).await > 0, "sixteen megabytes are not enough for the groups");
    assert_eq!(spills(&lake(1 << 30)).await, 0, "a gigabyte is");
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_too_little_for_any_work_is_an_error_that_names_the_bound() {
    let error = lake(1 << 10).query(&query(GROUPS)).await.expect_err("a kilobyte is nothing").chain();
    assert!(error.contains("expected at most"), "{error}");
}
