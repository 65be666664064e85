//! What needs no server as a source: CSV, Parquet and SQLite give the same days.
#![expect(clippy::disallowed_methods, reason = "tests write the source and start the program")]

use std::{fs::File, path::Path};

use arrow::{
    array::{RecordBatch, TimestampNanosecondArray},
    compute::{cast, concat_batches},
    datatypes::{DataType, Field, Schema},
};
use futures::TryStreamExt;
use parquet::{arrow::ArrowWriter, file::properties::WriterProperties};
use simulacro_adapters::{CsvSource, EmbeddedSource, ParquetSource, SqliteSource};
use simulacro_core::ports::TableSource;
use sqlx::{Connection, SqliteConnection, sqlite::SqliteConnectOptions};

use crate::{
    binaries::{output, said, source},
    conformance::table_source::{self, VENTAS, columns, texts},
};

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

/// All rows of a folder's table as one batch.
async fn rows(folder: &Path, table: &str) -> RecordBatch {
    let csv = CsvSource::open(folder).expect("the folder is read");
    let columns = csv.columns(table).await.expect("the table is there");
    let read = csv.read_table(table, &columns).await.expect("the table is there");
    let batches: Vec<RecordBatch> = read.batches.try_collect().await.expect("the rows are good");
    concat_batches(&batches[0].schema(), &batches).expect("of one schema")
}

/// Small row groups, so that days are looked for in their statistics.
fn write_parquet(file: &Path, batch: &RecordBatch, group_rows: usize) {
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(group_rows)).build();
    let file = File::create(file).expect("the file is made");
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).expect("a writer");
    writer.write(batch).expect("written");
    writer.close().expect("written");
}

async fn write_sqlite(file: &Path, batch: &RecordBatch) {
    let options = SqliteConnectOptions::new().filename(file).create_if_missing(true);
    let mut connection = SqliteConnection::connect_with(&options).await.expect("the file is made");
    let table = "CREATE TABLE ventas (order_id TEXT NOT NULL, user_id TEXT, product_id TEXT, monto DECIMAL(10,2) NOT NULL, \
                 descuento NUMERIC(10, 2), region VARCHAR(20), timestamp_venta TIMESTAMP, fecha DATE NOT NULL)";
    sqlx::raw_sql(table).execute(&mut connection).await.expect("made");
    let mut tx = connection.begin().await.expect("begun");
    for row in texts(std::slice::from_ref(batch)) {
        let insert = sqlx::query("INSERT INTO ventas VALUES (?, ?, ?, ?, ?, ?, ?, ?)");
        row.into_iter().fold(insert, |query, value| query.bind(value)).execute(&mut *tx).await.expect("written");
    }
    tx.commit().await.expect("written");
}

async fn suite(dir: &Path) -> RecordBatch {
    std::fs::write(dir.join("ventas.csv"), VENTAS).expect("the table is written");
    let batch = rows(dir, "ventas").await;
    std::fs::remove_file(dir.join("ventas.csv")).expect("removed");
    batch
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_parquet_keeps_the_promises_of_a_table_source() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let batch = suite(dir.path()).await;
    for group_rows in [1, 3, 1_000] {
        write_parquet(&dir.path().join("ventas.parquet"), &batch, group_rows);
        table_source::check(&ParquetSource::open(dir.path()).expect("the folder is read")).await;
        table_source::check(&EmbeddedSource::open(dir.path()).expect("the folder is read")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_file_keeps_the_promises_of_a_table_source() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let batch = suite(dir.path()).await;
    let file = dir.path().join("tienda.db");
    write_sqlite(&file, &batch).await;
    let sqlite = SqliteSource::open(&file).expect("a database");
    table_source::check(&sqlite).await;
    let not_null: Vec<String> =
        sqlite.not_null("ventas").await.expect("the table is there").expect("it can tell").into_iter().collect();
    assert_eq!(not_null, ["fecha", "monto", "order_id"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn days_from_parquet_and_sqlite_give_the_tables_of_days_from_csv() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    // Of three days: the file is in the order of customers.
    let is_early =
        |line: &str| line.starts_with("order_id") || ["-01", "-02", "-03"].iter().any(|d| line.contains(&format!("1997-01{d}T")));
    let csv = source(dir.path(), |text| text.lines().filter(|l| is_early(l)).map(|l| format!("{l}\n")).collect());
    let batch = rows(&csv, "ventas").await;
    let (folder, file) = (dir.path().join("parquet"), dir.path().join("tienda.db"));
    std::fs::create_dir(&folder).expect("made");
    write_parquet(&folder.join("ventas.parquet"), &batch, 100);
    write_sqlite(&file, &batch).await;
    let mut shown = Vec::new();
    for (name, source) in [("a", &csv), ("b", &folder), ("c", &file)] {
        let data = dir.path().join(name);
        // Without a date: the source tells its days.
        let run = output("simulacro", &["batch", "run", "--source", text(source), "--data", text(&data)]);
        assert!(run.status.success(), "{name}: {}", said(&run));
        let status = output("simulacro", &["status", "--data", text(&data)]);
        shown.push(String::from_utf8_lossy(&status.stdout).into_owned());
    }
    assert!(shown[0].contains("staging/"), "{}", shown[0]);
    assert_eq!(shown[1], shown[0]);
    assert_eq!(shown[2], shown[0]);
}

/// Runs a day that must be refused, with nothing written, and returns what was said.
fn refused(source: &Path) -> String {
    let data = tempfile::tempdir().expect("a temporary folder");
    let data = data.path().join("data");
    let run = output("simulacro", &["batch", "run", "--source", text(source), "--data", text(&data), "--date", "1997-01-01"]);
    assert!(!run.status.success(), "{}", said(&run));
    let lake = data.join("lake");
    let written = std::fs::read_dir(&lake).map(|entries| entries.count()).unwrap_or_default();
    assert_eq!(written, 0, "{}: {}", lake.display(), said(&run));
    said(&run)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_file_is_named() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let batch = suite(dir.path()).await;
    let file = dir.path().join("ventas.parquet");

    write_parquet(&file, &batch, 1_000);
    std::fs::write(dir.path().join("ventas.csv"), VENTAS).expect("written");
    let told = refused(dir.path());
    assert!(told.contains("ventas.csv and ventas.parquet"), "{told}");
    std::fs::remove_file(dir.path().join("ventas.csv")).expect("removed");

    let bytes = std::fs::read(&file).expect("read");
    std::fs::write(&file, &bytes[..bytes.len() - 7]).expect("written");
    let told = refused(dir.path());
    assert!(told.contains("ventas.parquet"), "{told}");

    // Times without a zone may be of any.
    let schema = batch.schema();
    let fields = schema.fields().iter().map(|f| match f.name().as_str() {
        "timestamp_venta" => {
            Field::new("timestamp_venta", DataType::Timestamp(arrow::datatypes::TimeUnit::Nanosecond, None), true)
        }
        _ => f.as_ref().clone(),
    });
    let fields: Vec<Field> = fields.collect();
    let mut arrays = batch.columns().to_vec();
    arrays[6] = cast(&arrays[6], fields[6].data_type()).expect("cast");
    assert!(arrays[6].as_any().is::<TimestampNanosecondArray>());
    write_parquet(&file, &RecordBatch::try_new(Schema::new(fields).into(), arrays).expect("a batch"), 1_000);
    let told = refused(dir.path());
    assert!(told.contains("timestamp_venta") && told.contains("Timestamp(ns)"), "{told}");

    let database = dir.path().join("tienda.db");
    write_sqlite(&database, &batch).await;
    let mut connection = SqliteConnection::connect(&format!("sqlite://{}", text(&database))).await.expect("opened");
    sqlx::raw_sql("UPDATE ventas SET monto = 1.005 WHERE order_id = 'a-2'").execute(&mut connection).await.expect("changed");
    drop(connection);
    let told = refused(&database);
    assert!(told.contains("monto") && told.contains("1.005") && told.contains("decimal(10,2)"), "{told}");

    std::fs::write(&database, b"SQLite format 3 is not here").expect("written");
    let told = refused(&database);
    assert!(told.contains("tienda.db") && told.contains("no SQLite database"), "{told}");
    assert_eq!(columns().len(), batch.num_columns());
}
