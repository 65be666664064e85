//! What a `Warehouse` promises.
//!
//! The suite gets an empty warehouse and uses tables of the schema `analytics`, named with a suffix of its own.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, Date32Array, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use chrono::NaiveDate;
use simulacro_core::ports::{Commit, Disposition, EPOCH_MOVED, Mark, UpsertRows, Warehouse};

use super::table_source::texts;

const TABLE: &str = "analytics.metricas_prueba";
const ALL: &str = "SELECT fecha, region, revenue_neto, transacciones, tasa_conversion, _updated_at \
                   FROM analytics.metricas_prueba ORDER BY fecha, region";

fn day(number: u32) -> NaiveDate {
    NaiveDate::from_ymd_opt(1997, 1, number).expect("a day")
}

/// One row for each pair of region and cents, all of one day.
fn rows(fecha: NaiveDate, cents: &[(&str, i128)]) -> RecordBatch {
    let days = (fecha - NaiveDate::default()).num_days() as i32;
    let money = Decimal128Array::from_iter_values(cents.iter().map(|(_, c)| *c)).with_precision_and_scale(12, 2);
    let columns: Vec<(&str, ArrayRef, bool)> = vec![
        ("fecha", Arc::new(Date32Array::from(vec![days; cents.len()])), true),
        ("region", Arc::new(StringArray::from_iter_values(cents.iter().map(|(region, _)| region))), true),
        ("revenue_neto", Arc::new(money.expect("a decimal")), true),
        ("transacciones", Arc::new(Int64Array::from_iter_values(0..cents.len() as i64)), true),
        ("tasa_conversion", Arc::new(Float64Array::from_iter((0..cents.len()).map(|i| (i % 2 == 0).then_some(0.1)))), true),
        (
            "_updated_at",
            Arc::new(TimestampMicrosecondArray::from(vec![852_098_400_123_456; cents.len()]).with_timezone("UTC")),
            true,
        ),
    ];
    RecordBatch::try_from_iter_with_nullable(columns).expect("a batch")
}

async fn read(warehouse: &dyn Warehouse) -> Vec<String> {
    let batches = warehouse.query(ALL, &[TABLE]).await.expect("the table is there");
    let show = |cell: Option<String>| cell.unwrap_or_else(|| "null".into());
    texts(&batches).into_iter().map(|row| row.into_iter().map(show).collect::<Vec<_>>().join(" ")).collect()
}

async fn load(warehouse: &dyn Warehouse, fecha: NaiveDate, epoch: i64, cents: &[(&str, i128)]) -> Commit {
    warehouse.load_day(TABLE, fecha, epoch, vec![rows(fecha, cents)]).await.expect("the day is loaded")
}

/// Windows by their key: kind, page, revision, clicks.
fn windows(cells: &[(&str, Option<&str>, i64, i64)]) -> RecordBatch {
    let columns: Vec<(&str, ArrayRef, bool)> = vec![
        ("window_kind", Arc::new(StringArray::from_iter_values(cells.iter().map(|c| c.0))), false),
        ("page", Arc::new(cells.iter().map(|c| c.1).collect::<StringArray>()), true),
        ("revision", Arc::new(Int64Array::from_iter_values(cells.iter().map(|c| c.2))), false),
        ("clicks", Arc::new(Int64Array::from_iter_values(cells.iter().map(|c| c.3))), false),
        (
            "window_start",
            Arc::new(TimestampMicrosecondArray::from(vec![852_098_400_000_000; cells.len()]).with_timezone("UTC")),
            false,
        ),
    ];
    RecordBatch::try_from_iter_with_nullable(columns).expect("a batch")
}

async fn rows_are_merged_by_key_once_by_a_writer_that_goes_on(warehouse: &dyn Warehouse) {
    const WINDOWS: &str = "realtime.metricas_prueba";
    let upsert = |writer: &str, after: Option<i64>, epoch: i64, batch: RecordBatch| UpsertRows {
        table: WINDOWS.into(),
        mark: Mark { writer: writer.into(), epoch },
        after,
        keys: ["window_kind", "window_start", "page", "revision"].map(str::to_owned).to_vec(),
        batches: vec![batch],
    };
    let read = async || {
        let sql = "SELECT window_kind, page, revision, clicks FROM realtime.metricas_prueba \
                   ORDER BY window_kind, coalesce(page, ''), revision";
        let show = |cell: Option<String>| cell.unwrap_or_else(|| "null".into());
        let batches = warehouse.query(sql, &[WINDOWS]).await.expect("the table is there");
        texts(&batches).into_iter().map(|row| row.into_iter().map(show).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()
    };
    assert_eq!(warehouse.writer_epoch(WINDOWS, "metricas-0").await.expect("it answers"), None);
    let first = windows(&[("region_1m", None, 0, 5), ("page_1m", Some("/"), 0, 3), ("page_1m", Some(""), 0, 2)]);
    let commit = warehouse.upsert_rows(upsert("metricas-0", None, 10, first.clone())).await.expect("a table is made");
    assert!(matches!(commit, Commit::New(_)));
    let commit = warehouse.upsert_rows(upsert("metricas-0", None, 10, first)).await.expect("nothing is written");
    assert!(matches!(commit, Commit::Already(_)));
    assert_eq!(warehouse.writer_epoch(WINDOWS, "metricas-0").await.expect("it answers"), Some(10));
    // A revision more is a row more.
    let more = windows(&[("region_1m", None, 1, 6), ("page_1m", Some("/"), 1, 4)]);
    warehouse.upsert_rows(upsert("metricas-0", Some(10), 20, more)).await.expect("rows are added");
    assert_eq!(read().await, ["page_1m  0 2", "page_1m / 0 3", "page_1m / 1 4", "region_1m null 0 5", "region_1m null 1 6"]);
    // A key that is there is replaced, a null in it included, and no other row is touched.
    let again = windows(&[("region_1m", None, 1, 7), ("page_1m", Some("/"), 1, 9), ("page_1m", Some("/x"), 0, 1)]);
    warehouse.upsert_rows(upsert("metricas-0", Some(20), 30, again)).await.expect("rows are merged");
    let merged = ["page_1m  0 2", "page_1m / 0 3", "page_1m / 1 9", "page_1m /x 0 1", "region_1m null 0 5", "region_1m null 1 7"];
    assert_eq!(read().await, merged);
    // Whoever is not where the table is, is told so and writes nothing.
    for (after, epoch) in [(Some(20), 40), (None, 40), (Some(35), 40)] {
        let row = windows(&[("region_1m", None, 1, 99)]);
        let error = warehouse.upsert_rows(upsert("metricas-0", after, epoch, row)).await.expect_err("it has moved");
        assert_eq!((error.code.as_deref(), error.disposition), (Some(EPOCH_MOVED), Disposition::Retryable), "{error}");
    }
    // Another writer has a position of its own, and without rows it moves all the same.
    warehouse.upsert_rows(upsert("metricas-1", None, 3, windows(&[]))).await.expect("the epoch is noted");
    assert_eq!(warehouse.writer_epoch(WINDOWS, "metricas-1").await.expect("it answers"), Some(3));
    let twice = windows(&[("region_1m", None, 5, 1), ("region_1m", None, 5, 2)]);
    let error = warehouse.upsert_rows(upsert("metricas-0", Some(30), 40, twice)).await.expect_err("a key stands twice");
    assert_eq!(error.disposition, Disposition::Permanent, "{}", error.chain());
    let unknown = UpsertRows { keys: vec!["ventana".into()], ..upsert("metricas-0", Some(30), 40, windows(&[])) };
    let error = warehouse.upsert_rows(unknown).await.expect_err("there is no such column");
    assert!(error.disposition == Disposition::Permanent && error.to_string().contains("key column ventana"), "{error}");
    assert_eq!(read().await, merged);
}

/// Every promise in turn.
pub async fn check(warehouse: &dyn Warehouse) {
    rows_are_merged_by_key_once_by_a_writer_that_goes_on(warehouse).await;
    let error = warehouse.query(ALL, &[TABLE]).await.expect_err("the table is missing");
    assert_eq!(error.disposition, Disposition::Permanent);
    assert!(error.to_string().contains("metricas_prueba"), "{error}");

    // The first load makes the table; money and times come back exactly.
    assert!(matches!(load(warehouse, day(1), 1, &[("centro", 999_999_999_999), ("este", -5)]).await, Commit::New(_)));
    let first = [
        "1997-01-01 centro 9999999999.99 0 0.1 1997-01-01T06:00:00.123456Z",
        "1997-01-01 este -0.05 1 null 1997-01-01T06:00:00.123456Z",
    ];
    assert_eq!(read(warehouse).await, first);

    // Another day leaves this one alone, and may come in several batches.
    let parts = vec![rows(day(2), &[("norte", 100)]), rows(day(2), &[]), rows(day(2), &[("sur", 250)])];
    let commit = warehouse.load_day(TABLE, day(2), 1, parts).await.expect("the day is loaded");
    assert!(matches!(commit, Commit::New(_)));
    let second =
        ["1997-01-02 norte 1.00 0 0.1 1997-01-01T06:00:00.123456Z", "1997-01-02 sur 2.50 0 0.1 1997-01-01T06:00:00.123456Z"];
    assert_eq!(read(warehouse).await, [first, second].concat());

    // The same epoch again, and a lower one, write nothing: neither other rows nor a new version.
    assert!(matches!(load(warehouse, day(1), 5, &[("oeste", 1)]).await, Commit::New(_)));
    let third = ["1997-01-01 oeste 0.01 0 0.1 1997-01-01T06:00:00.123456Z"];
    for epoch in [5, 4, 1] {
        assert!(matches!(load(warehouse, day(1), epoch, &[("centro", 7)]).await, Commit::Already(_)), "epoch {epoch}");
        assert_eq!(read(warehouse).await, [&third[..], &second[..]].concat());
    }

    // Rows of another day are refused, and nothing of that load stays.
    let mixed = vec![rows(day(1), &[("centro", 1)]), rows(day(3), &[("centro", 1)])];
    let error = warehouse.load_day(TABLE, day(1), 6, mixed).await.expect_err("a row is of another day");
    assert_ne!(error.disposition, Disposition::Retryable, "{}", error.chain());
    assert_eq!(read(warehouse).await, [&third[..], &second[..]].concat());

    // A batch without rows empties the day.
    assert!(matches!(load(warehouse, day(1), 7, &[]).await, Commit::New(_)));
    assert_eq!(read(warehouse).await, second);

    // Sums are exact, and a query without rows is no error.
    let sql = "SELECT sum(revenue_neto) AS total, count(*) AS n FROM analytics.metricas_prueba";
    let sums = texts(&warehouse.query(sql, &[TABLE]).await.expect("the table is there"));
    assert_eq!(sums, [[Some("3.50".to_owned()), Some("2".to_owned())]]);
    let sql = "SELECT region FROM analytics.metricas_prueba WHERE transacciones < 0";
    assert!(texts(&warehouse.query(sql, &[TABLE]).await.expect("the table is there")).is_empty());

    for wrong in ["SELECT regiones FROM analytics.metricas_prueba", "SELEC 1", "DELETE FROM analytics.metricas_prueba"] {
        let error = warehouse.query(wrong, &[TABLE]).await.expect_err("the statement is wrong");
        assert_eq!(error.disposition, Disposition::Permanent, "{wrong}: {}", error.chain());
    }
    assert_eq!(read(warehouse).await, second);
}
