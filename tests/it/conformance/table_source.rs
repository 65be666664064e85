//! What a `TableSource` promises.
//!
//! The suite brings the table: an adapter's test loads [`VENTAS`] as the table `ventas`, with the columns of the CDNOW
//! contract, and hands the source over.

use arrow::{
    array::RecordBatch,
    util::display::{ArrayFormatter, FormatOptions},
};
use chrono::NaiveDate;
use futures::{StreamExt, TryStreamExt};
use simulacro_core::{
    contract::Contract,
    ports::{Column, Disposition, PartitionRead, TableSource},
};

/// A table with the cases that are easily read wrong: nulls, zero and negative amounts, the largest amount, text beyond
/// ASCII, commas and quotes, a time with microseconds, and days that lie scattered.
pub const VENTAS: &str = "\
order_id,user_id,product_id,monto,descuento,region,timestamp_venta,fecha
a-1,u1,P001,11.77,0.00,centro,1997-01-01T00:00:00Z,1997-01-01
a-2,u2,P002,0.00,0.00,este,1997-01-01T23:59:59.999999Z,1997-01-01
a-3,u1,P003,99999999.99,0.01,norte,1997-01-02T12:00:00Z,1997-01-02
a-4,u3,P001,-5.05,0.00,oeste,1997-01-01T06:30:00.5Z,1997-01-01
a-5,u4,P001,0.07,0.00,sur,1997-01-03T00:00:00Z,1997-01-03
a-6,\"ñandú, \"\"el\"\" 🦤\",P004,10.00,10.00,centro,1997-01-02T00:00:01Z,1997-01-02
a-7,u1,P001,1.10,,,1997-01-01T01:00:00Z,1997-01-01
";

const DAYS: [&str; 3] = ["1997-01-01", "1997-01-02", "1997-01-03"];

fn day(text: &str) -> NaiveDate {
    text.parse().expect("a day")
}

/// The columns that the table is declared with.
pub fn columns() -> Vec<Column> {
    let text = include_str!("../../../contracts/odcs/cdnow/ventas.yaml");
    Contract::parse("ventas.yaml", text).expect("the shipped contract parses").columns
}

/// Rows as text, null as `None`. Times are in UTC with six decimals.
pub fn texts(batches: &[RecordBatch]) -> Vec<Vec<Option<String>>> {
    let options = FormatOptions::default().with_timestamp_tz_format(Some("%Y-%m-%dT%H:%M:%S%.6fZ"));
    let mut rows = Vec::new();
    for batch in batches {
        let formatters: Vec<_> =
            batch.columns().iter().map(|c| ArrayFormatter::try_new(c, &options).expect("a type that can be shown")).collect();
        for row in 0..batch.num_rows() {
            let cells = batch.columns().iter().zip(&formatters);
            rows.push(cells.map(|(c, f)| (!c.is_null(row)).then(|| f.value(row).to_string())).collect());
        }
    }
    rows
}

async fn read(source: &dyn TableSource, fecha: &str, columns: &[Column]) -> (u64, Vec<RecordBatch>) {
    let PartitionRead { expected_rows, batches } =
        source.read_day("ventas", day(fecha), columns).await.expect("the day is there");
    (expected_rows, batches.try_collect().await.expect("the rows are good"))
}

/// The rows of [`VENTAS`] of a day, read by hand.
fn expected(fecha: &str) -> Vec<Vec<Option<String>>> {
    let some = |text: &str| Some(text.to_owned());
    let row = |order: &str, user: &str, product: &str, monto: &str, descuento: &str, region: &str, time: &str| {
        vec![some(order), some(user), some(product), some(monto), some(descuento), some(region), some(time), some(fecha)]
    };
    match fecha {
        "1997-01-01" => {
            let mut last = row("a-7", "u1", "P001", "1.10", "", "", "1997-01-01T01:00:00.000000Z");
            (last[4], last[5]) = (None, None);
            vec![
                row("a-1", "u1", "P001", "11.77", "0.00", "centro", "1997-01-01T00:00:00.000000Z"),
                row("a-2", "u2", "P002", "0.00", "0.00", "este", "1997-01-01T23:59:59.999999Z"),
                row("a-4", "u3", "P001", "-5.05", "0.00", "oeste", "1997-01-01T06:30:00.500000Z"),
                last,
            ]
        }
        "1997-01-02" => vec![
            row("a-3", "u1", "P003", "99999999.99", "0.01", "norte", "1997-01-02T12:00:00.000000Z"),
            row("a-6", "ñandú, \"el\" 🦤", "P004", "10.00", "10.00", "centro", "1997-01-02T00:00:01.000000Z"),
        ],
        _ => vec![row("a-5", "u4", "P001", "0.07", "0.00", "sur", "1997-01-03T00:00:00.000000Z")],
    }
}

/// Every promise in turn.
pub async fn check(source: &dyn TableSource) {
    ping_succeeds(source).await;
    columns_are_declared_in_the_contracts_words(source).await;
    a_day_has_exactly_its_rows_in_source_order(source).await;
    a_second_read_gives_equal_batches(source).await;
    columns_come_as_asked(source).await;
    a_table_is_read_whole(source).await;
    a_day_without_rows_is_empty(source).await;
    what_is_missing_is_permanent_and_named(source).await;
    a_read_that_is_dropped_harms_no_other(source).await;
}

async fn ping_succeeds(source: &dyn TableSource) {
    source.ping().await.expect("the source answers");
}

async fn columns_are_declared_in_the_contracts_words(source: &dyn TableSource) {
    assert_eq!(source.columns("ventas").await.expect("the table is there"), columns());
}

async fn a_day_has_exactly_its_rows_in_source_order(source: &dyn TableSource) {
    for fecha in DAYS {
        let (count, batches) = read(source, fecha, &columns()).await;
        assert_eq!(texts(&batches), expected(fecha));
        assert_eq!(count as usize, expected(fecha).len());
    }
}

async fn a_second_read_gives_equal_batches(source: &dyn TableSource) {
    for fecha in DAYS {
        assert_eq!(read(source, fecha, &columns()).await, read(source, fecha, &columns()).await);
    }
}

async fn columns_come_as_asked(source: &dyn TableSource) {
    let all = columns();
    let asked = [all[7].clone(), all[3].clone(), all[0].clone()];
    let (_, batches) = read(source, "1997-01-02", &asked).await;
    let names: Vec<_> = batches[0].schema().fields().iter().map(|f| f.name().clone()).collect();
    assert_eq!(names, ["fecha", "monto", "order_id"]);
    let want: Vec<_> = expected("1997-01-02").into_iter().map(|r| vec![r[7].clone(), r[3].clone(), r[0].clone()]).collect();
    assert_eq!(texts(&batches), want);
}

async fn a_table_is_read_whole(source: &dyn TableSource) {
    let PartitionRead { expected_rows, batches } = source.read_table("ventas", &columns()).await.expect("the table is there");
    let mut rows = texts(&batches.try_collect::<Vec<_>>().await.expect("the rows are good"));
    let mut all: Vec<_> = DAYS.into_iter().flat_map(expected).collect();
    assert_eq!(expected_rows as usize, all.len());
    rows.sort();
    all.sort();
    assert_eq!(rows, all, "every row once, whatever its day");
}

async fn a_day_without_rows_is_empty(source: &dyn TableSource) {
    let (count, batches) = read(source, "2001-01-01", &columns()).await;
    assert_eq!((count, texts(&batches).len()), (0, 0));
}

async fn what_is_missing_is_permanent_and_named(source: &dyn TableSource) {
    let error = source.columns("pedidos").await.expect_err("there is no such table");
    assert_eq!(error.disposition, Disposition::Permanent);
    assert!(error.chain().contains("pedidos"), "{}", error.chain());
    let error = source.read_day("pedidos", day("1997-01-01"), &columns()).await.err().expect("there is no such table");
    assert_eq!(error.disposition, Disposition::Permanent);
    assert!(error.chain().contains("pedidos"), "{}", error.chain());
    let error = source.read_table("pedidos", &columns()).await.err().expect("there is no such table");
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Permanent, Some("42P01")), "{}", error.chain());
    let mut asked = columns();
    asked.push(Column { name: "moneda".into(), physical_type: "string".into() });
    let error = source.read_day("ventas", day("1997-01-01"), &asked).await.err().expect("there is no such column");
    assert_eq!(error.disposition, Disposition::Permanent);
    assert!(error.chain().contains("moneda"), "{}", error.chain());
}

async fn a_read_that_is_dropped_harms_no_other(source: &dyn TableSource) {
    let unread = source.read_day("ventas", day("1997-01-01"), &columns()).await.expect("the day is there");
    drop(unread);
    let mut begun = source.read_day("ventas", day("1997-01-01"), &columns()).await.expect("the day is there");
    begun.batches.next().await.expect("a batch").expect("good rows");
    drop(begun);
    assert_eq!(texts(&read(source, "1997-01-01", &columns()).await.1), expected("1997-01-01"));
}
