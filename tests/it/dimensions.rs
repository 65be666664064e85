//! Dimensions from end to end: they enrich the sales, grow old, come back, and never stand in the way of the facts longer
//! than they must. At the end, generated days against a naive computation that shares no code with the pipeline.
#![expect(clippy::disallowed_methods, reason = "tests write files and make their own clock")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::array::{ArrayRef, Date32Array, Decimal128Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use proptest::prelude::*;
use serde_json::json;
use simulacro_adapters::{
    CsvSource, FolderDimensions, HttpDimensions, HttpDimensionsSettings, PrometheusMetrics, SystemEnv, connect_folder,
};
use simulacro_core::{
    batch::{DayError, DayReport, MART, STAGING, arrow_schema, canonical_hash},
    contract::{Contract, catalogue, check},
    dimensions::{
        CLIENTES_DIM, Dimension, FetchPolicy, PIPELINE, StaleDimension, from_tables::FromTables, newest, paged::PageLimits,
        refresh_api,
    },
    history::RecordedStore,
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::{Config, Platform},
    ports::{
        Alert, Column, DimensionApi, Env, Input, NoDimensions, Notifier, PartitionRead, PortError, Ports, Query, Result,
        RunState, TableSource,
    },
};
use simulacro_lakehouse::DeltaLakehouse;
use simulacro_sim::{
    dimension_api::{ApiFault, DirectLink, Service, client, lock},
    faults::StoreFault,
    host::Host,
    store::{DirectStore, ObjectService, Operation},
};

use crate::{
    conformance::{
        dimension_api::{LIMITS, Paged, Row, TOKEN, World, check as keeps_the_promises, check_paged},
        table_source::texts,
    },
    services::dimension_api::DimensionServer,
};

const CONTRACT: &str = include_str!("../../contracts/odcs/cdnow/ventas.yaml");

// The adapters are held to the promises of the port.

struct Folder {
    dir: tempfile::TempDir,
    api: FolderDimensions,
}

impl Folder {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("productos.csv"), "\n").expect("written");
        let api = FolderDimensions::open(dir.path()).expect("the folder is read");
        Self { dir, api }
    }
}

/// Rows as CSV; the header is the first row's, or the contract's.
fn csv_of(rows: &[Row], columns: &[Column]) -> String {
    let names: Vec<String> = match rows.first() {
        Some(row) => row.keys().cloned().collect(),
        None => columns.iter().map(|c| c.name.clone()).collect(),
    };
    let cell = |value: &serde_json::Value| match value {
        serde_json::Value::Null => String::new(),
        serde_json::Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        other => other.to_string(),
    };
    let mut text = names.join(",") + "\n";
    for row in rows {
        text += &(names.iter().map(|n| cell(&row[n])).collect::<Vec<_>>().join(",") + "\n");
    }
    text
}

impl World for Folder {
    fn api(&self) -> &dyn DimensionApi {
        &self.api
    }
    fn put(&self, rows: &[Row]) {
        let columns = Dimension::Productos.contract().expect("a contract").columns;
        std::fs::write(self.dir.path().join("productos.csv"), csv_of(rows, &columns)).expect("written");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_keeps_the_promises_of_a_dimension_api() {
    keeps_the_promises(&Folder::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simulated_api_keeps_the_promises_of_a_dimension_api() {
    let service = Arc::new(Mutex::new(Service::new(Some(TOKEN.into()))));
    let clock = Arc::new(Clock::at("2024-03-18T03:00:00Z"));
    let make = |token: &str, limits: PageLimits| -> Box<dyn DimensionApi> {
        let link = DirectLink {
            service: service.clone(),
            env: clock.clone(),
            latency: Duration::from_millis(5),
            timeout: Duration::from_secs(30),
            token: Some(token.into()),
        };
        Box::new(client(link, &["productos"], limits))
    };
    check_paged(&Paged { service: service.clone(), client: &make }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_http_api_keeps_the_promises_of_a_dimension_api() {
    let server = DimensionServer::start(Service::new(Some(TOKEN.into()))).await;
    let settings = |token: &str, limits| HttpDimensionsSettings {
        url: server.url.clone(),
        token: Some(token.into()),
        offered: vec!["productos".into()],
        connect_timeout: Duration::from_secs(5),
        // Long for a loopback, since a test that is slow must not see a timeout that is none.
        call_timeout: Duration::from_secs(3),
        fetch_timeout: Duration::from_secs(30),
        page_bytes_max: 100_000,
        limits,
    };
    let make = |token: &str, limits: PageLimits| -> Box<dyn DimensionApi> {
        Box::new(HttpDimensions::new(settings(token, limits)).expect("a valid address"))
    };
    let paged = Paged { service: server.service.clone(), client: &make };
    check_paged(&paged).await;

    // What HTTP alone can do: a page above its limit, a fetch that is never whole, nobody who listens.
    let columns = Dimension::Productos.contract().expect("a contract").columns;
    lock(&server.service).heal();
    let refused = async |settings| {
        let api = HttpDimensions::new(settings).expect("a valid address");
        api.fetch("productos", &columns, None).await.expect_err("it does not come").code.expect("a code")
    };
    assert_eq!(refused(HttpDimensionsSettings { page_bytes_max: 50, ..settings(TOKEN, LIMITS) }).await, "TOO_LARGE");
    lock(&server.service).inject(ApiFault::Hangs { times: 1 });
    let short = Duration::from_millis(50);
    assert_eq!(refused(HttpDimensionsSettings { fetch_timeout: short, ..settings(TOKEN, LIMITS) }).await, "TIMEOUT");
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let nobody = HttpDimensionsSettings { url: format!("http://{nobody}/v1"), ..settings(TOKEN, LIMITS) };
    assert_eq!(refused(nobody).await, "CONNECTION");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parquet_file_is_a_dimension_and_two_files_are_none() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = |name: &str| dir.path().join(name);
    std::fs::write(file("productos.csv"), "product_id,categoria,marca,precio,inventario\np-1,libros,,1.50,7\n").expect("written");
    let columns = Dimension::Productos.contract().expect("a contract").columns;
    let from_csv = FolderDimensions::open(dir.path()).expect("read").fetch("productos", &columns, None).await.expect("it comes");
    let simulacro_core::ports::Fetched::Snapshot(from_csv) = from_csv else { panic!("nothing was known") };
    let mut bytes = Vec::new();
    let mut writer = parquet::arrow::ArrowWriter::try_new(&mut bytes, from_csv.batches[0].schema(), None).expect("a writer");
    writer.write(&from_csv.batches[0]).expect("rows");
    writer.close().expect("closed");
    std::fs::write(file("productos.parquet"), &bytes).expect("written");
    let both = FolderDimensions::open(dir.path()).expect_err("two files").chain();
    assert!(both.contains("productos.csv and") && both.contains("productos.parquet, expected one"), "{both}");
    std::fs::remove_file(file("productos.csv")).expect("removed");
    let api = FolderDimensions::open(dir.path()).expect("read");
    let from_parquet = api.fetch("productos", &columns, None).await.expect("it comes");
    let simulacro_core::ports::Fetched::Snapshot(from_parquet) = from_parquet else { panic!("nothing was known") };
    assert_eq!(from_parquet.batches, from_csv.batches);
    std::fs::write(file("productos.parquet"), &bytes[..bytes.len() / 2]).expect("written");
    let error = api.fetch("productos", &columns, None).await.expect_err("half a file");
    assert!(error.code.as_deref() == Some("MALFORMED") && error.chain().contains("productos.parquet"), "{}", error.chain());
    std::fs::remove_file(file("productos.parquet")).expect("removed");
    assert_eq!(api.fetch("productos", &columns, None).await.expect_err("no file").code.as_deref(), Some("404"));
    assert_eq!(FolderDimensions::open(dir.path()).expect("read").offered(), Vec::<String>::new());
}

// A platform with a clock of its own, sales in memory, and an API whose faults are data.

#[derive(Debug)]
struct Clock {
    now: Mutex<DateTime<Utc>>,
    ids: AtomicU64,
}

impl Clock {
    fn at(text: &str) -> Self {
        Self { now: Mutex::new(text.parse().expect("a time")), ids: AtomicU64::new(0) }
    }
    fn set(&self, text: &str) {
        *self.now.lock().expect("the clock") = text.parse().expect("a time");
    }
}

#[async_trait]
impl Env for Clock {
    fn now(&self) -> DateTime<Utc> {
        *self.now.lock().expect("the clock")
    }
    async fn sleep(&self, duration: Duration) {
        *self.now.lock().expect("the clock") += duration;
    }
    fn new_id(&self) -> String {
        format!("id-{}", self.ids.fetch_add(1, Ordering::SeqCst))
    }
    fn random(&self) -> u64 {
        7
    }
}

/// A pager that keeps every call, so that one call too many shows.
#[derive(Debug, Default)]
struct Pager(Mutex<(Vec<Alert>, Vec<String>)>);

#[async_trait]
impl Notifier for Pager {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        self.0.lock().expect("the pager").0.push(alert.clone());
        Ok(())
    }
    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        self.0.lock().expect("the pager").1.push(dedup_key.to_owned());
        Ok(())
    }
}

impl Pager {
    /// Kinds and priorities of the alerts so far, and the keys that were resolved.
    fn seen(&self) -> (Vec<(String, u8)>, Vec<String>) {
        let (raised, resolved) = &*self.0.lock().expect("the pager");
        (raised.iter().map(|a| (a.kind.clone(), a.priority)).collect(), resolved.clone())
    }
    fn last(&self) -> String {
        self.0.lock().expect("the pager").0.last().map(|a| a.summary.clone()).unwrap_or_default()
    }
}

/// A sale as the source has it; `None` is null.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Venta {
    order_id: Option<String>,
    user_id: Option<String>,
    product_id: Option<String>,
    monto: Option<i64>,
    descuento: Option<i64>,
    region: Option<String>,
    timestamp: Option<i64>,
}

fn sale(order: &str, user: &str, product: &str, cents: i64) -> Venta {
    Venta {
        order_id: Some(order.into()),
        user_id: Some(user.into()),
        product_id: Some(product.into()),
        monto: Some(cents),
        descuento: None,
        region: Some("centro".into()),
        timestamp: Some(0),
    }
}

/// Sales in memory, by day.
#[derive(Debug, Default)]
struct Ventas(Mutex<BTreeMap<NaiveDate, Vec<Venta>>>);

#[async_trait]
impl TableSource for Ventas {
    async fn ping(&self) -> Result<()> {
        Ok(())
    }
    async fn columns(&self, _table: &str) -> Result<Vec<Column>> {
        Ok(contract().columns)
    }
    async fn read_day(&self, _table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        let rows = self.0.lock().expect("the sales").get(&fecha).cloned().unwrap_or_default();
        let day = (fecha - NaiveDate::default()).num_days() as i32;
        let money = |of: fn(&Venta) -> Option<i64>| -> ArrayRef {
            let cents = rows.iter().map(|r| of(r).map(i128::from)).collect::<Decimal128Array>();
            Arc::new(cents.with_precision_and_scale(10, 2).expect("money"))
        };
        let text = |of: fn(&Venta) -> Option<&str>| -> ArrayRef { Arc::new(rows.iter().map(of).collect::<StringArray>()) };
        let array = |c: &Column| -> ArrayRef {
            match c.name.as_str() {
                "order_id" => text(|r| r.order_id.as_deref()),
                "user_id" => text(|r| r.user_id.as_deref()),
                "product_id" => text(|r| r.product_id.as_deref()),
                "monto" => money(|r| r.monto),
                "descuento" => money(|r| r.descuento),
                "region" => text(|r| r.region.as_deref()),
                "timestamp_venta" => {
                    let times = rows.iter().map(|r| r.timestamp.map(|t| i64::from(day) * 86_400_000_000 + t));
                    Arc::new(times.collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
                }
                _ => Arc::new(Date32Array::from(vec![day; rows.len()])),
            }
        };
        let arrays = columns.iter().map(array).collect();
        let batch = RecordBatch::try_new(arrow_schema(columns)?, arrays).expect("a batch");
        Ok(PartitionRead { expected_rows: rows.len() as u64, batches: futures::stream::iter([Ok(batch)]).boxed() })
    }
    async fn not_null(&self, _table: &str) -> Result<Option<std::collections::BTreeSet<String>>> {
        Ok(None)
    }
    async fn read_table(&self, table: &str, _columns: &[Column]) -> Result<PartitionRead> {
        Err(PortError::permanent(format!("read {table}: these are sales alone")).code("42P01"))
    }
}

fn contract() -> Contract {
    Contract::parse("ventas.yaml", CONTRACT).expect("the shipped contract parses")
}

fn day(text: &str) -> NaiveDate {
    text.parse().expect("a day")
}

/// A platform with everything that a test turns.
struct Shop {
    _dir: tempfile::TempDir,
    clock: Arc<Clock>,
    ventas: Arc<Ventas>,
    service: Arc<Mutex<Service>>,
    pager: Arc<Pager>,
    platform: Platform,
}

async fn ports(tables: Arc<dyn TableSource>, data: &Path) -> Ports {
    connect_folder(tables, data, Arc::new(PrometheusMetrics::default())).await.expect("the embedded platform connects")
}

fn config() -> Config {
    Config {
        source_policy: SourcePolicy::Wait { every_s: 1, deadline_s: 1 },
        retry: RetryPolicy { retries: 0, backoff_s: 1, deadline_s: 1 },
        alert_after_s: 1,
        startup_s: 0,
    }
}

impl Shop {
    /// A shop on 2024-03-18, 03:00, whose API offers these dimensions.
    async fn new(offered: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let clock = Arc::new(Clock::at("2024-03-18T03:00:00Z"));
        let (ventas, pager) = (Arc::new(Ventas::default()), Arc::new(Pager::default()));
        let service = Arc::new(Mutex::new(Service::new(None)));
        let link = DirectLink {
            service: service.clone(),
            env: clock.clone(),
            latency: Duration::from_millis(5),
            timeout: Duration::from_secs(30),
            token: None,
        };
        let dimensions: Arc<dyn DimensionApi> =
            if offered.is_empty() { Arc::new(NoDimensions) } else { Arc::new(client(link, offered, LIMITS)) };
        let below = ports(ventas.clone(), &dir.path().join("data")).await;
        let ports = Ports { env: clock.clone(), dimensions, notifier: pager.clone(), ..below };
        let platform = Platform::new(config(), contract(), ports);
        Self { _dir: dir, clock, ventas, service, pager, platform }
    }

    fn productos(&self, rows: &[(&str, Option<&str>, Option<&str>)]) {
        let row = |(id, categoria, marca): &(&str, Option<&str>, Option<&str>)| {
            let row = json!({"product_id": id, "categoria": categoria, "marca": marca, "precio": "1.00", "inventario": 1});
            row.as_object().expect("an object").clone()
        };
        lock(&self.service).put(self.clock.now(), "productos", rows.iter().map(row).collect());
    }

    fn clientes(&self, rows: &[(&str, Option<&str>, Option<&str>)]) {
        let row = |(id, segmento, pais): &(&str, Option<&str>, Option<&str>)| {
            json!({"user_id": id, "segmento": segmento, "pais": pais}).as_object().expect("an object").clone()
        };
        lock(&self.service).put(self.clock.now(), "clientes", rows.iter().map(row).collect());
    }

    fn sales(&self, fecha: &str, rows: &[Venta]) {
        self.ventas.0.lock().expect("the sales").insert(day(fecha), rows.to_vec());
    }

    fn inject(&self, fault: ApiFault) {
        lock(&self.service).inject(fault);
    }

    async fn run(&self, fecha: &str) -> Result<DayReport, DayError> {
        self.platform.run_day(day(fecha), self.clock.now()).await.expect("the ledger works").result
    }

    async fn rows(&self, sql: &str, table: &str) -> Vec<Vec<Option<String>>> {
        let query = Query { sql: sql.into(), inputs: vec![("t".into(), Input::Delta(table.into()))] };
        texts(&self.platform.ports.lakehouse.query(&query).await.expect("the table is read"))
    }

    async fn objects(&self, folder: &str) -> Vec<String> {
        let folder = ObjectPath::from(folder);
        let mut all: Vec<String> = self
            .platform
            .ports
            .objects
            .list(Some(&folder))
            .map_ok(|m| m.location.to_string())
            .try_collect()
            .await
            .expect("a listing");
        all.sort();
        all
    }
}

fn some(values: &[&str]) -> Vec<Option<String>> {
    values.iter().map(|v| (*v != "-").then(|| (*v).to_owned())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn dimensions_enrich_each_sale_once_and_what_is_unknown_is_null_and_counted() {
    let shop = Shop::new(&["clientes", "productos"]).await;
    shop.productos(&[("p-1", Some("libros"), Some("Ñ")), ("p-2", None, None), ("p-3", Some("música"), None)]);
    shop.clientes(&[("u-1", Some("vip"), Some("MX")), ("u-2", None, Some("ES"))]);
    shop.sales(
        "2024-03-17",
        &[
            sale("o-1", "u-1", "p-1", 1_000),
            sale("o-2", "u-2", "p-2", 2_000),
            sale("o-3", "u-9", "p-9", 4_000),
            sale("o-4", "u-1", "p-9", 8_000),
            sale("o-1", "u-1", "p-1", 1_000),
        ],
    );
    let report = shop.run("2024-03-17").await.expect("the day is published");
    assert_eq!(report.fates, BTreeMap::from([("published".into(), 4), ("deduplicated".into(), 1)]));
    assert_eq!(report.unknown, BTreeMap::from([("clientes".into(), 1), ("productos".into(), 2)]));
    assert_eq!(report.stale_dimensions, Vec::<StaleDimension>::new());
    let used: Vec<_> = report.dimensions.iter().map(|d| (d.dimension.name(), d.version, d.rows, d.etag.clone())).collect();
    assert_eq!(used, [("clientes", 1, 2, Some("\"v1\"".into())), ("productos", 1, 3, Some("\"v1\"".into()))]);
    let staged = shop.rows("SELECT order_id, segmento, pais, categoria, marca FROM t ORDER BY order_id", STAGING).await;
    let expected = [
        some(&["o-1", "vip", "MX", "libros", "Ñ"]),
        some(&["o-2", "-", "ES", "-", "-"]),
        some(&["o-3", "-", "-", "-", "-"]),
        some(&["o-4", "vip", "MX", "-", "-"]),
    ];
    assert_eq!(staged, expected);
    let mart = "SELECT segmento_cliente, CAST(revenue_neto AS VARCHAR), CAST(transacciones AS VARCHAR) FROM t ORDER BY 1";
    let expected = [some(&["sin_segmento", "60.00", "2"]), some(&["vip", "90.00", "2"])];
    assert_eq!(shop.rows(mart, MART).await, expected);
    let tables = "SELECT user_id, segmento, CAST(_loaded_at AS VARCHAR) FROM t ORDER BY 1";
    let loaded = shop.rows(tables, Dimension::Clientes.table()).await;
    assert_eq!(loaded.iter().map(|r| r[0].clone()).collect::<Vec<_>>(), some(&["u-1", "u-2"]));
    assert!(loaded[0][2].as_ref().is_some_and(|at| at.starts_with("2024-03-18T03:00:00")), "{loaded:?}");
    // A day that is run again on its own morning takes the customer as he is now, and the mart follows.
    shop.clientes(&[("u-1", Some("regular"), Some("MX")), ("u-2", None, Some("ES"))]);
    let report = shop.run("2024-03-17").await.expect("the day is published");
    assert_eq!(report.dimensions[0].version, 2);
    assert_eq!(shop.rows(mart, MART).await, [some(&["regular", "90.00", "2"]), some(&["sin_segmento", "60.00", "2"])]);
    assert_eq!(shop.pager.seen().0, []);
    // The history of customers goes on by days: a day's last values are the day's.
    shop.clock.set("2024-03-19T03:00:00Z");
    shop.clientes(&[("u-2", Some("nuevo"), Some("ES"))]);
    let report = shop.run("2024-03-17").await.expect("the day is published");
    // By then the day takes the customers of its own morning, whoever has left or changed since.
    assert_eq!((report.dimensions[0].version, report.dimensions[0].as_of), (3, Some(day("2024-03-18"))));
    assert_eq!(shop.rows(mart, MART).await, [some(&["regular", "90.00", "2"]), some(&["sin_segmento", "60.00", "2"])]);
    // A day that is older than the history takes the first customers that are known.
    shop.sales("2024-01-05", &[sale("o-9", "u-1", "p-1", 1_000)]);
    let report = shop.run("2024-01-05").await.expect("the day is published");
    assert_eq!(report.dimensions[0].as_of, Some(day("2024-03-18")));
    let old = format!("{} WHERE fecha = DATE '2024-01-05' ORDER BY 1", mart.trim_end_matches(" ORDER BY 1"));
    assert_eq!(shop.rows(&old, MART).await, [some(&["regular", "10.00", "1"])]);
    let history = "SELECT user_id, segmento, CAST(valido_desde AS VARCHAR) AS desde, CAST(valido_hasta AS VARCHAR) AS hasta,
                          CAST(es_actual AS VARCHAR) AS actual FROM t ORDER BY user_id, desde";
    let expected = [
        some(&["u-1", "regular", "2024-03-18", "2024-03-19", "false"]),
        some(&["u-2", "-", "2024-03-18", "2024-03-19", "false"]),
        some(&["u-2", "nuevo", "2024-03-19", "-", "true"]),
    ];
    assert_eq!(shop.rows(history, CLIENTES_DIM).await, expected);
    let all = shop.rows("SELECT user_id, segmento FROM t ORDER BY user_id", Dimension::Clientes.table()).await;
    assert_eq!(all, [some(&["u-1", "regular"]), some(&["u-2", "nuevo"])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_dimensions_sales_have_nulls_and_nothing_is_written_for_them() {
    let shop = Shop::new(&[]).await;
    shop.sales("2024-03-17", &[sale("o-1", "u-1", "p-1", 1_000)]);
    let report = shop.run("2024-03-17").await.expect("the day is published");
    assert_eq!((report.dimensions.len(), report.unknown.len()), (0, 0));
    let staged = shop.rows("SELECT segmento, pais, categoria, marca FROM t", STAGING).await;
    assert_eq!(staged, [some(&["-", "-", "-", "-"])]);
    assert_eq!(shop.objects("dim").await, Vec::<String>::new());
    let (run, refreshed) = shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
    assert_eq!((run.state, refreshed.len()), (RunState::Succeeded, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dimension_that_does_not_come_serves_for_a_day_with_one_alert_and_a_mark() {
    let shop = Shop::new(&["productos"]).await;
    shop.productos(&[("p-1", Some("libros"), None)]);
    let (run, _) = shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
    assert_eq!((run.pipeline.as_str(), run.state, run.fecha), (PIPELINE, RunState::Succeeded, day("2024-03-18")));
    let from = "2024-03-18T04:00:00Z".parse().expect("a time");
    shop.inject(ApiFault::Down { from, to: "2024-03-19T02:59:00Z".parse().expect("a time") });
    shop.clock.set("2024-03-18T09:00:00Z");
    let (run, refreshed) = shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
    assert_eq!((run.state, refreshed[0].version), (RunState::Failed, Some(1)));
    assert!(refreshed[0].failed.as_ref().is_some_and(|why| why.contains("[CONNECTION]")), "{refreshed:?}");
    shop.clock.set("2024-03-19T02:00:00Z");
    for fecha in ["2024-03-17", "2024-03-18"] {
        shop.sales(fecha, &[sale(&format!("o-{fecha}"), "u-1", "p-1", 1_000)]);
        let report = shop.run(fecha).await.expect("the day is published");
        let [stale] = report.stale_dimensions.as_slice() else { panic!("one mark: {report:?}") };
        assert_eq!((stale.dimension, stale.version), (Dimension::Productos, 1));
        assert!((23 * 3_600..23 * 3_600 + 600).contains(&stale.age_s), "{stale:?}");
        assert!(stale.why.contains("[CONNECTION]"), "{stale:?}");
    }
    assert_eq!(shop.rows("SELECT DISTINCT categoria FROM t", STAGING).await, [some(&["libros"])]);
    let (raised, resolved) = shop.pager.seen();
    assert_eq!((raised, resolved), (vec![("dimension_stale".to_owned(), 2)], Vec::new()), "one alert for three failures");
    assert!(shop.pager.last().contains("dimension productos does not come, version 1"), "{}", shop.pager.last());
    shop.clock.set("2024-03-19T03:00:00Z");
    let report = shop.run("2024-03-18").await.expect("the day is published");
    assert_eq!(report.stale_dimensions, []);
    let (raised, resolved) = shop.pager.seen();
    assert_eq!(
        (raised.len(), resolved),
        (1, vec!["dimension_stale:productos".to_owned(), "day_held:2024-03-18".into(), "run_failed:2024-03-18".into()])
    );
    // The next incident has an alert of its own.
    shop.inject(ApiFault::Refused { status: 503, retry_after_s: None, times: 4 });
    shop.clock.set("2024-03-19T15:00:00Z");
    shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
    assert_eq!(shop.pager.seen().0.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dimension_older_than_a_day_stops_the_day_and_what_was_published_stays() {
    let shop = Shop::new(&["productos"]).await;
    shop.productos(&[("p-1", Some("libros"), None)]);
    shop.sales("2024-03-17", &[sale("o-1", "u-1", "p-1", 1_000)]);
    shop.run("2024-03-17").await.expect("the day is published");
    let hashes = async || {
        let lakehouse = shop.platform.ports.lakehouse.as_ref();
        (canonical_hash(lakehouse, STAGING).await.expect("staging"), canonical_hash(lakehouse, MART).await.expect("a mart"))
    };
    let before = hashes().await;
    shop.sales("2024-03-17", &[sale("o-1", "u-1", "p-1", 2_000)]);
    let (from, to) = ("2024-03-18T04:00:00Z".parse().expect("a time"), DateTime::<Utc>::MAX_UTC);
    shop.inject(ApiFault::Down { from, to });
    shop.clock.set("2024-03-19T03:00:01Z");
    let Err(DayError::Port { source, .. }) = shop.run("2024-03-17").await else { panic!("the day must not be published") };
    assert_eq!(source.code.as_deref(), Some("DIMENSION_TOO_OLD"));
    let said = source.chain();
    for word in ["version 1 of dimension productos, 24 h 0 min old", "expected a version at most 24 h 0 min old", "[CONNECTION]"]
    {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert_eq!(hashes().await, before);
    // What will not pass by itself holds the day, and says why.
    lock(&shop.service).heal();
    shop.inject(ApiFault::TokenExpired { from });
    let Err(DayError::Held { gate, found, .. }) = shop.run("2024-03-17").await else { panic!("the day must be held") };
    assert_eq!(gate, "dimensions_fresh");
    assert!(found.contains("24 h 0 min old") && found.contains("[401]"), "{found}");
    assert_eq!(hashes().await, before);
    let kinds: Vec<String> = shop.pager.seen().0.into_iter().map(|(kind, _)| kind).collect();
    assert_eq!(kinds, ["dimension_stale", "run_failed", "day_held"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dimension_that_never_came_stops_the_day_although_its_facts_are_kept() {
    let shop = Shop::new(&["productos"]).await;
    shop.sales("2024-03-17", &[sale("o-1", "u-1", "p-1", 1_000)]);
    let Err(DayError::Held { gate, found, expected, .. }) = shop.run("2024-03-17").await else { panic!("it must be held") };
    assert_eq!((gate, expected.as_str()), ("dimensions_fresh", "a version at most 24 h 0 min old"));
    assert!(found.contains("no version of dimension productos") && found.contains("[404]"), "{found}");
    assert_eq!(shop.objects("raw/ventas/fecha=2024-03-17").await.len(), 2, "the raw day and its manifest");
    assert_eq!(shop.objects("staging").await, Vec::<String>::new());
    shop.productos(&[("p-1", Some("libros"), None)]);
    shop.run("2024-03-17").await.expect("the day is published");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dimension_with_a_key_twice_is_refused_before_it_is_visible() {
    let shop = Shop::new(&["productos"]).await;
    shop.productos(&[("p-1", Some("libros"), None), ("p-2", None, None)]);
    shop.sales("2024-03-17", &[sale("o-1", "u-1", "p-1", 1_000)]);
    shop.run("2024-03-17").await.expect("the day is published");
    let before = shop.objects("dim").await;
    shop.clock.set("2024-03-18T10:00:00Z");
    shop.productos(&[("p-1", Some("libros"), None), ("p-2", None, None), ("p-1", Some("cine"), None)]);
    let report = shop.run("2024-03-17").await.expect("the version before serves");
    let why =
        "refuse dimension productos: found product_id \"p-1\" 2 times (1 keys more than once), expected each key once [CONTRACT]";
    assert_eq!(report.stale_dimensions.iter().map(|s| s.why.as_str()).collect::<Vec<_>>(), [why]);
    let mut after = shop.objects("dim").await;
    after.retain(|path| path != "dim/raw/productos/_alert.json");
    assert_eq!(after, before, "nothing of the refused version is left");
    assert_eq!(shop.rows("SELECT order_id, categoria FROM t", STAGING).await, [some(&["o-1", "libros"])]);
    // Too few rows, a null key and a negative price are refused as well.
    shop.productos(&[]);
    let report = shop.run("2024-03-17").await.expect("the version before serves");
    assert!(report.stale_dimensions[0].why.contains("found 0 rows, expected 1 to 1000000 rows"), "{report:?}");
    let bad = |id: serde_json::Value, precio: &str| {
        let row = json!({"product_id": id, "categoria": null, "marca": null, "precio": precio, "inventario": 1});
        lock(&shop.service).put(shop.clock.now(), "productos", vec![row.as_object().expect("an object").clone()]);
    };
    for (id, precio, clause) in [(json!(null), "1.00", "product_id.required"), (json!("p-1"), "-0.01", "precio.minimum")] {
        bad(id, precio);
        let report = shop.run("2024-03-17").await.expect("the version before serves");
        let why = &report.stale_dimensions[0].why;
        assert!(why.contains(&format!("found 1 rows that break {clause}, expected none")), "{why}");
    }
    assert_eq!(shop.pager.seen().0.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_dimension_is_confirmed_without_being_sent_and_its_table_stays_fresh() {
    let shop = Shop::new(&["productos"]).await;
    shop.productos(&[("p-1", Some("libros"), None), ("p-2", None, None), ("p-3", None, None)]);
    for (n, now) in
        ["2024-03-18T00:00:00Z", "2024-03-18T06:00:00Z", "2024-03-19T00:00:00Z", "2024-03-21T00:00:00Z"].iter().enumerate()
    {
        shop.clock.set(now);
        let asked = lock(&shop.service).requests();
        let (_, refreshed) = shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
        assert_eq!((refreshed[0].version, refreshed[0].failed.clone()), (Some(n as u64 + 1), None));
        assert_eq!(lock(&shop.service).requests() - asked, if n == 0 { 2 } else { 1 }, "two pages, and then only a question");
    }
    let version = newest(&shop.platform.ports, Dimension::Productos).await.expect("the store answers").expect("a version");
    assert_eq!((version.version, version.published, version.rows), (4, 4, 3));
    let copies = shop.objects("dim/raw/productos").await.into_iter().filter(|p| p.ends_with(".parquet")).count();
    assert_eq!(copies, 1, "the same rows have one copy");
    let contracts = catalogue::shipped().expect("contracts");
    let stored = contracts.iter().find(|c| c.table == "productos_dim").expect("a contract");
    let lakehouse = shop.platform.ports.lakehouse.as_ref();
    let results = check::check_table(lakehouse, stored, &contracts, day("2024-03-21"), shop.clock.now()).await;
    assert!(!check::is_broken(&results) && results.iter().all(|r| r.passed), "{}", check::render(&results));
    // A day within six hours takes it as it is.
    let asked = lock(&shop.service).requests();
    shop.sales("2024-03-20", &[sale("o-1", "u-1", "p-1", 1_000)]);
    shop.clock.set("2024-03-21T03:00:00Z");
    shop.run("2024-03-20").await.expect("the day is published");
    assert_eq!(lock(&shop.service).requests(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_waited_for_and_one_beyond_the_deadline_is_not() {
    let shop = Shop::new(&["productos"]).await;
    shop.productos(&[("p-1", Some("libros"), None)]);
    shop.inject(ApiFault::Refused { status: 503, retry_after_s: Some(120), times: 1 });
    shop.inject(ApiFault::Refused { status: 429, retry_after_s: Some(60), times: 1 });
    let began = shop.clock.now();
    let (run, _) = shop.platform.refresh_dimensions(began).await.expect("the ledger works");
    let waited = (shop.clock.now() - began).num_seconds();
    assert_eq!((run.state, waited, lock(&shop.service).requests()), (RunState::Succeeded, 180, 3));
    shop.inject(ApiFault::Refused { status: 503, retry_after_s: Some(601), times: 1 });
    let began = shop.clock.now();
    let (run, _) = shop.platform.refresh_dimensions(began).await.expect("the ledger works");
    assert_eq!((run.state, (shop.clock.now() - began).num_seconds()), (RunState::Failed, 0));
    // Without a wait of its own, the policy's: four calls in all.
    shop.inject(ApiFault::Refused { status: 500, retry_after_s: None, times: 100 });
    let asked = lock(&shop.service).requests();
    shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
    assert_eq!(lock(&shop.service).requests() - asked, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_history_to_which_nothing_was_added_is_as_fresh_as_the_last_look() {
    let shop = Shop::new(&["clientes"]).await;
    shop.clientes(&[("u-1", Some("vip"), Some("MX"))]);
    shop.sales("2024-03-17", &[sale("o-1", "u-1", "p-1", 1_000)]);
    shop.sales("2024-03-19", &[sale("o-2", "u-1", "p-1", 1_000)]);
    shop.run("2024-03-17").await.expect("the day is published");
    shop.clock.set("2024-03-20T03:00:00Z");
    shop.run("2024-03-19").await.expect("the day is published");
    let (ports, contracts) = (&shop.platform.ports, catalogue::shipped().expect("the contracts parse"));
    let stored = contracts.iter().find(|c| c.physical_name == CLIENTES_DIM).expect("it ships");
    let is_fresh = async |known| {
        let lakehouse = ports.lakehouse.as_ref();
        let all = check::check_confirmed(lakehouse, stored, &contracts, day("2024-03-19"), shop.clock.now(), known).await;
        all.into_iter().find(|r| r.check == "_loaded_at.freshness").expect("it is checked").passed
    };
    let known = simulacro_core::dimensions::confirmed(ports, CLIENTES_DIM).await.expect("the store answers");
    assert_eq!(known, Some(shop.clock.now()));
    assert!(is_fresh(known).await && !is_fresh(None).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn stock_and_prices_come_with_each_round_and_no_day_waits_for_them() {
    let shop = Shop::new(&["inventario", "precios", "productos"]).await;
    shop.productos(&[("p-1", Some("libros"), None)]);
    let put = |name: &str, column: &str, value: serde_json::Value| {
        let row = json!({"product_id": "p-1", column: value}).as_object().expect("an object").clone();
        lock(&shop.service).put(shop.clock.now(), name, vec![row]);
    };
    put("inventario", "inventario", json!(7));
    put("precios", "precio", json!("12.50"));
    let (run, refreshed) = shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
    assert_eq!((run.state, refreshed.len()), (RunState::Succeeded, 3), "{refreshed:?}");
    let stock = shop.rows("SELECT product_id, CAST(inventario AS VARCHAR) FROM t", Dimension::Inventario.table()).await;
    let prices = shop.rows("SELECT product_id, CAST(precio AS VARCHAR) FROM t", Dimension::Precios.table()).await;
    assert_eq!((stock, prices), (vec![some(&["p-1", "7"])], vec![some(&["p-1", "12.50"])]));
    // Neither enriches a sale, so that a day does not ask for them.
    shop.clock.set("2024-03-18T12:00:00Z");
    shop.sales("2024-03-17", &[sale("o-1", "u-1", "p-1", 1_000)]);
    let asked = lock(&shop.service).requests();
    let report = shop.run("2024-03-17").await.expect("the day is published");
    assert_eq!(report.dimensions.iter().map(|d| d.dimension.name()).collect::<Vec<_>>(), ["productos"]);
    assert_eq!(lock(&shop.service).requests() - asked, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_versions_of_a_dimension_go_and_the_newest_stays_whatever_its_age() {
    const WEEK: Duration = Duration::from_secs(168 * 3_600);
    let shop = Shop::new(&["productos"]).await;
    // Ages are told by the clock of the objects, too, which is the real one.
    shop.clock.set(&SystemEnv::default().now().format("%Y-%m-%dT%H:%M:%SZ").to_string());
    for (brand, hours) in [("a", 24), ("b", 24), ("c", 0)] {
        shop.productos(&[("p-1", Some("libros"), Some(brand))]);
        shop.platform.refresh_dimensions(shop.clock.now()).await.expect("the ledger works");
        shop.clock.set(&(shop.clock.now() + Duration::from_secs(hours * 3_600)).format("%Y-%m-%dT%H:%M:%SZ").to_string());
    }
    let ports = &shop.platform.ports;
    let prune = async || simulacro_core::dimensions::prune(ports, WEEK).await.expect("the store answers");
    let all = shop.objects("dim/raw/productos").await;
    assert_eq!((all.len(), prune().await.len()), (6, 0), "a week has not gone by: {all:?}");
    // Eight days after the first: its manifest is too old, and the copy that only it named.
    shop.clock.set(&(shop.clock.now() + Duration::from_secs(6 * 86_400)).format("%Y-%m-%dT%H:%M:%SZ").to_string());
    let removed = prune().await;
    assert!(
        removed.len() == 2 && removed[0].ends_with("_manifest/v000001.json") && removed[1].ends_with(".parquet"),
        "{removed:?}"
    );
    shop.clock.set(&(shop.clock.now() + Duration::from_secs(400 * 86_400)).format("%Y-%m-%dT%H:%M:%SZ").to_string());
    assert_eq!((prune().await.len(), prune().await.len()), (2, 0));
    let kept = newest(ports, Dimension::Productos).await.expect("the store answers").expect("a version");
    assert_eq!((kept.version, shop.objects("dim/raw/productos").await.len()), (3, 2));
    assert!(shop.objects("dim/raw/productos").await.contains(&kept.file));
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_refresh_at_once_leave_one_line_of_versions() {
    let shop = Shop::new(&["productos"]).await;
    shop.productos(&[("p-1", Some("libros"), None)]);
    let rival = Platform::new(config(), contract(), shop.platform.ports.clone());
    for fecha in ["2024-03-16", "2024-03-17"] {
        shop.sales(fecha, &[sale(&format!("o-{fecha}"), "u-1", "p-1", 1_000)]);
    }
    // The daily run and `api_dimensiones` hold different pipelines, so both may be at it.
    let (day_run, refresh) =
        tokio::join!(shop.platform.run_day(day("2024-03-17"), shop.clock.now()), rival.refresh_dimensions(shop.clock.now()));
    day_run.expect("the ledger works").result.expect("the day is published");
    assert_eq!(refresh.expect("the ledger works").0.state, RunState::Succeeded);
    let manifests = shop.objects("dim/raw/productos/_manifest").await;
    let newest = newest(&shop.platform.ports, Dimension::Productos).await.expect("the store answers").expect("a version");
    assert_eq!(newest.version as usize, manifests.len(), "no number is missing or used twice: {manifests:?}");
    let rows = shop.rows("SELECT product_id, categoria FROM t", Dimension::Productos.table()).await;
    assert_eq!(rows, [some(&["p-1", "libros"])]);
}

/// A pager as a service is: what is open, and how often each key was raised.
#[derive(Debug, Default)]
struct OpenAlerts(Mutex<(BTreeSet<String>, u64)>);

#[async_trait]
impl Notifier for OpenAlerts {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        let mut state = self.0.lock().expect("the pager");
        state.1 += 1;
        state.0.insert(alert.dedup_key.clone());
        Ok(())
    }
    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        self.0.lock().expect("the pager").0.remove(dedup_key);
        Ok(())
    }
}

/// Three rounds: a first version, an API that is away, another version. Each is repeated until it works, as an orchestrator
/// would, over a store with a host that dies and faults. Returns calls, deaths, hits of the faults and
/// versions.
async fn three_rounds(dies_at: Option<u64>, faults: Vec<StoreFault>, base: &Ports) -> (u64, u64, u64, u64) {
    let host = Arc::new(Host::new("worker", dies_at));
    let store = ObjectService::new(host.clone(), faults);
    let objects = Arc::new(DirectStore(store.clone()));
    let below = RecordedStore { inner: objects.clone(), recorder: base.recorder.clone() };
    let lakehouse = Arc::new(DeltaLakehouse::new(Arc::new(below)));
    let clock = Arc::new(Clock::at("2024-03-18T00:00:00Z"));
    let service = Arc::new(Mutex::new(Service::new(None)));
    let link = DirectLink {
        service: service.clone(),
        env: clock.clone(),
        latency: Duration::from_millis(5),
        timeout: Duration::from_secs(30),
        token: None,
    };
    let pager = Arc::new(OpenAlerts::default());
    let dimensions = Arc::new(client(link, &["productos"], LIMITS));
    let ports = Ports { env: clock.clone(), objects, lakehouse, dimensions, notifier: pager.clone(), ..base.clone() };
    let policy = FetchPolicy { calls: 1, backoff_s: 0, deadline_s: 1 };
    let row = |id: &str| json!({"product_id": id, "categoria": "c", "marca": null, "precio": "1.00", "inventario": 1});
    let row = |id: &str| row(id).as_object().expect("an object").clone();
    for round in 1..=3 {
        {
            let mut service = lock(&service);
            service.heal();
            match round {
                1 => service.put(clock.now(), "productos", vec![row("p-1"), row("p-2"), row("p-3")]),
                2 => service.inject(ApiFault::Refused { status: 503, retry_after_s: None, times: 99 }),
                _ => service.put(clock.now(), "productos", vec![row("p-4")]),
            }
        }
        let mut tries = 0;
        while refresh_api(&ports, policy).await.is_err() {
            tries += 1;
            assert!(tries < 5, "round {round} does not come to an end");
            host.revive();
        }
        let open = pager.0.lock().expect("the pager").0.len();
        assert_eq!(open, usize::from(round == 2), "open alerts after round {round}");
        clock.sleep(Duration::from_secs(6 * 3_600)).await;
    }
    let raised = pager.0.lock().expect("the pager").1;
    assert!((1..=2).contains(&raised), "raised {raised} times, and twice only where a process died between call and mark");
    let newest = newest(&ports, Dimension::Productos).await.expect("the store answers").expect("a version");
    assert_eq!(newest.rows, 1);
    let paths: Vec<String> = store.paths().into_iter().filter(|p| p.starts_with("dim/raw/")).collect();
    let count = |part: &str| paths.iter().filter(|p| p.contains(part)).count();
    assert_eq!((count("/_candidate/"), count("/_alert")), (0, 0), "{paths:?}");
    // A process that dies before it names its copy leaves it behind, for the next pruning: the same rows twice, never others.
    let rows: BTreeSet<&str> = paths.iter().filter_map(|p| p.split_once("/part-")).map(|(_, name)| &name[..64]).collect();
    assert_eq!(rows.len(), 2, "{paths:?}");
    assert_eq!(count("/_manifest/"), newest.version as usize, "{paths:?}");
    let table = Dimension::Productos.table();
    let query = Query { sql: "SELECT product_id FROM t".into(), inputs: vec![("t".into(), Input::Delta(table.into()))] };
    assert_eq!(texts(&ports.lakehouse.query(&query).await.expect("the table is read")), [some(&["p-4"])]);
    (store.calls(), host.deaths(), store.hits().into_iter().sum(), newest.version)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_dies_at_any_call_to_the_store_leaves_what_the_next_one_completes() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let base = ports(Arc::new(Ventas::default()), dir.path()).await;
    let (calls, ..) = three_rounds(None, Vec::new(), &base).await;
    assert!(calls > 40, "{calls}");
    for at in 1..=calls {
        // The last calls are those with which the test looks; a death there is nobody's.
        let (_, deaths, ..) = three_rounds((at <= calls - 8).then_some(at), Vec::new(), &base).await;
        assert_eq!(deaths, u64::from(at <= calls - 8), "call {at}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_the_store_that_is_lost_changes_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let base = ports(Arc::new(Ventas::default()), dir.path()).await;
    for after in 0.. {
        let lost = |operation| StoreFault::ReplyLost { operation, path: "dim/".into(), after, times: 1 };
        let (_, _, hits, versions) = three_rounds(None, vec![lost(Operation::Put)], &base).await;
        assert_eq!(versions, 2, "no version was made twice");
        if hits == 0 {
            assert!(after > 10, "{after} puts in all");
            break;
        }
        three_rounds(None, vec![lost(Operation::Delete)], &base).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn customers_of_a_source_table_are_a_dimension_beside_those_of_an_api() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("clientes.csv"), "user_id,alta,segmento,pais\nu-1,1997-01-01,vip,MX\nu-2,1997-01-02,,\n")
        .expect("written");
    let tables: Arc<dyn TableSource> = Arc::new(CsvSource::open(dir.path()).expect("the folder is read"));
    let from =
        |rows_max| FromTables { tables: tables.clone(), names: vec!["clientes".into()], rest: Arc::new(NoDimensions), rows_max };
    let columns = Dimension::Clientes.contract().expect("a contract").columns;
    let api = from(2);
    assert_eq!(api.offered(), ["clientes"]);
    let fetched = api.fetch("clientes", &columns, None).await.expect("it comes");
    let simulacro_core::ports::Fetched::Snapshot(snapshot) = fetched else { panic!("a table has no etag") };
    assert_eq!(texts(&snapshot.batches), [some(&["u-1", "vip", "MX"]), some(&["u-2", "-", "-"])]);
    assert_eq!(from(1).fetch("clientes", &columns, None).await.expect_err("too many").code.as_deref(), Some("TOO_LARGE"));
    assert_eq!(api.fetch("productos", &columns, None).await.expect_err("nowhere").code.as_deref(), Some("404"));
}

// Generated days against a naive computation. What follows shares no code with the pipeline.

const REGIONS: [&str; 5] = ["centro", "este", "norte", "oeste", "sur"];
const LIMIT: i64 = 9_999_999_999;

type Attributes = BTreeMap<String, (Option<String>, Option<String>)>;

/// What a day must come to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Naive {
    fates: BTreeMap<String, u64>,
    revenue: i64,
    unknown: BTreeMap<String, u64>,
    staging: Vec<Vec<Option<String>>>,
    mart: Vec<Vec<Option<String>>>,
}

fn euros(cents: i64) -> String {
    let sign = if cents < 0 { "-" } else { "" };
    format!("{sign}{}.{:02}", cents.abs() / 100, cents.abs() % 100)
}

fn naive(fecha: NaiveDate, rows: &[Venta], clientes: &Attributes, productos: &Attributes) -> Naive {
    let mut out = Naive::default();
    let mut fate = |name: &str| *out.fates.entry(name.to_owned()).or_default() += 1;
    let mut good: BTreeMap<String, Vec<&Venta>> = BTreeMap::new();
    for row in rows {
        let descuento = row.descuento.unwrap_or(0);
        if row.monto.is_some_and(|m| m <= 0) {
            fate("rejected");
            continue;
        }
        let complete = (&row.order_id, &row.user_id, &row.product_id, row.monto, &row.region, row.timestamp);
        let (Some(order), Some(user), Some(_), Some(monto), Some(region), Some(_)) = complete else {
            fate("quarantined");
            continue;
        };
        if !REGIONS.contains(&region.as_str()) || descuento > monto || monto - descuento > LIMIT {
            fate("quarantined");
            continue;
        }
        good.entry(format!("{order}|{user}|{}", euros(monto))).or_default().push(row);
    }
    let mut first: Vec<&Venta> = Vec::new();
    for mut copies in good.into_values() {
        copies.sort_by_key(|r| (r.timestamp, r.product_id.clone(), r.region.clone(), r.descuento.unwrap_or(0)));
        first.push(copies[0]);
        for _ in &copies[1..] {
            fate("deduplicated");
        }
    }
    let mut published: Vec<&Venta> = Vec::new();
    for row in &first {
        if first.iter().filter(|other| other.order_id == row.order_id).count() > 1 {
            fate("quarantined");
        } else {
            fate("published");
            published.push(row);
        }
    }
    published.sort_by_key(|r| r.order_id.clone());
    let mut groups: BTreeMap<(String, String), Vec<&Venta>> = BTreeMap::new();
    for (name, key, known) in [
        ("clientes", (|r: &Venta| r.user_id.clone()) as fn(&Venta) -> Option<String>, clientes),
        ("productos", |r: &Venta| r.product_id.clone(), productos),
    ] {
        let unknown = published.iter().filter(|r| !key(r).is_some_and(|k| known.contains_key(&k))).count();
        out.unknown.insert(name.into(), unknown as u64);
    }
    for row in published {
        let (monto, descuento) = (row.monto.unwrap_or(0), row.descuento.unwrap_or(0));
        out.revenue += monto - descuento;
        let none = (None, None);
        let (segmento, pais) = row.user_id.as_ref().and_then(|u| clientes.get(u)).unwrap_or(&none).clone();
        let (categoria, marca) = row.product_id.as_ref().and_then(|p| productos.get(p)).unwrap_or(&none).clone();
        let region = row.region.clone().unwrap_or_default();
        groups.entry((region.clone(), segmento.clone().unwrap_or("sin_segmento".into()))).or_default().push(row);
        out.staging.push(vec![
            row.order_id.clone(),
            row.user_id.clone(),
            row.product_id.clone(),
            Some(euros(monto)),
            Some(euros(descuento)),
            Some(euros(monto - descuento)),
            Some(region),
            Some((row.timestamp.unwrap_or(0) + (fecha - NaiveDate::default()).num_days() * 86_400_000_000).to_string()),
            Some(fecha.to_string()),
            segmento,
            pais,
            categoria,
            marca,
        ]);
    }
    for ((region, segmento), rows) in groups {
        let sum = |of: fn(&Venta) -> i64| rows.iter().map(|r| of(r)).sum::<i64>();
        let (bruto, descuentos) = (sum(|r| r.monto.unwrap_or(0)), sum(|r| r.descuento.unwrap_or(0)));
        let (neto, n) = (bruto - descuentos, rows.len() as i64);
        let users: BTreeSet<_> = rows.iter().map(|r| &r.user_id).collect();
        // Half a cent counts as one.
        let ticket = (2 * neto + n) / (2 * n);
        out.mart.push(vec![
            Some(fecha.to_string()),
            Some(region),
            Some(segmento),
            Some(euros(bruto)),
            Some(euros(neto)),
            Some(euros(descuentos)),
            Some(n.to_string()),
            Some(users.len().to_string()),
            Some(euros(ticket)),
        ]);
    }
    out.mart.sort();
    out
}

fn one_in(n: u32, of: impl Strategy<Value = Option<String>>) -> impl Strategy<Value = Option<String>> {
    prop_oneof![n => of, 1 => Just(None)]
}

fn word(words: &'static [&'static str]) -> impl Strategy<Value = Option<String>> {
    prop::sample::select(words).prop_map(|w| Some(w.to_owned()))
}

const ORDERS: &[&str] = &["o1", "o2", "o3", "o4", "o5", "o6", "o7", "o8", "o|1", "o", "ó🦤", "O1", " o1", "null", "''"];
const USERS: &[&str] = &["u1", "u2", "u3", "1|u", "ñandú", "日本", "u\"4\"", "U1"];
const PRODUCTS: &[&str] = &["p1", "p2", "p3", "p,4", "música", "🦤"];
const WORDS: &[&str] = &["vip", "regular", "sin_segmento", "añejo", "日", "a,b", "\"q\"", "null"];

fn ventas() -> impl Strategy<Value = Vec<Venta>> {
    let monto = prop_oneof![
        6 => (1_i64..=50_000).prop_map(Some),
        2 => prop::sample::select(vec![1, 2, 3, 100, 333]).prop_map(Some),
        2 => prop::sample::select(vec![LIMIT, LIMIT - 1]).prop_map(Some),
        1 => prop::sample::select(vec![0, -1, -LIMIT]).prop_map(Some),
        1 => Just(None),
    ];
    let descuento = prop_oneof![
        4 => Just(None),
        4 => (0_i64..=300).prop_map(Some),
        1 => prop::sample::select(vec![0, LIMIT, -LIMIT, -1, 50_000]).prop_map(Some),
    ];
    let regions = prop_oneof![9 => word(&REGIONS), 1 => word(&["marte", "Centro", ""])];
    let time = prop_oneof![
        20 => prop::sample::select(vec![0_i64, 1, 86_399_999_999]).prop_map(Some),
        20 => (0..86_400_000_000_i64).prop_map(Some),
        1 => Just(None),
    ];
    let row = (
        one_in(30, word(ORDERS)),
        one_in(30, word(USERS)),
        one_in(30, word(PRODUCTS)),
        monto,
        descuento,
        one_in(30, regions),
        time,
    )
        .prop_map(|(order_id, user_id, product_id, monto, descuento, region, timestamp)| Venta {
            order_id,
            user_id,
            product_id,
            monto,
            descuento,
            region,
            timestamp,
        });
    // Copies: whole ones, and such as differ where `_source_hash` does not look.
    let copied = (row, 0_usize..4, any::<bool>()).prop_map(|(row, copies, other_time)| {
        let mut rows = vec![row.clone()];
        for n in 2..=copies {
            let timestamp = if other_time { row.timestamp.map(|t| (t + n as i64) % 86_400_000_000) } else { row.timestamp };
            rows.push(Venta { timestamp, ..row.clone() });
        }
        rows
    });
    prop_oneof![
        1 => Just(Vec::new()),
        9 => prop::collection::vec(copied, 1..14).prop_map(|rows| rows.concat()).prop_shuffle(),
    ]
}

fn attributes(keys: &'static [&'static str]) -> impl Strategy<Value = Attributes> {
    let value = || one_in(3, word(WORDS));
    // At least one row, since a dimension without rows is refused.
    prop::collection::btree_map(prop::sample::select(keys).prop_map(str::to_owned), (value(), value()), 1..keys.len())
}

fn attributes_csv(header: &str, rows: &Attributes, more: &str) -> String {
    let cell = |v: &str| format!("\"{}\"", v.replace('"', "\"\""));
    let value = |v: &Option<String>| v.as_deref().map(cell).unwrap_or_default();
    let lines = rows.iter().map(|(key, (a, b))| format!("{},{},{}{more}\n", cell(key), value(a), value(b)));
    format!("{header}\n{}", lines.collect::<String>())
}

/// One step of a story: the sales of a day as the source has them now, and the dimensions as they are now.
type Step = (u32, Vec<Venta>, Attributes, Attributes);

async fn live(steps: Vec<Step>) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let ventas = Arc::new(Ventas::default());
    let mut contract = contract();
    // As many rows may be bad as there are: what becomes of them is the question here, not whether the day is held.
    contract.quarantine_share_max = (1, 1);
    // Amounts are drawn without regard to those of the day before.
    contract.mean_shift_max = None;
    let mut published: BTreeMap<NaiveDate, Naive> = BTreeMap::new();
    let mut now: DateTime<Utc> = "2024-03-10T00:00:00Z".parse().expect("a time");
    for (offset, rows, clientes, productos) in steps {
        let fecha = day("2024-03-01") + chrono::Days::new(offset.into());
        let file = |name: &str| dir.path().join(name);
        std::fs::write(file("clientes.csv"), attributes_csv("user_id,segmento,pais", &clientes, "")).expect("written");
        let header = "product_id,categoria,marca,precio,inventario";
        std::fs::write(file("productos.csv"), attributes_csv(header, &productos, ",99999999.99,0")).expect("written");
        ventas.0.lock().expect("the sales").insert(fecha, rows.clone());
        let below = ports(ventas.clone(), &dir.path().join("data")).await;
        let dimensions = Arc::new(FolderDimensions::open(dir.path()).expect("the folder is read"));
        // Products are taken as they are for six hours, and here each step has its own.
        now += Duration::from_secs(7 * 3_600);
        let ports = Ports { dimensions, env: Arc::new(Clock::at(&now.to_rfc3339())), ..below };
        let platform = Platform::new(config(), contract.clone(), ports);
        let result = platform.run_day(fecha, platform.ports.env.now()).await.expect("the ledger works").result;
        let expected = naive(fecha, &rows, &clientes, &productos);
        match result {
            Ok(report) => {
                assert_eq!(report.expected as usize, rows.len());
                assert_eq!(report.fates, expected.fates, "{rows:#?}");
                assert_eq!(report.revenue_cents, expected.revenue);
                assert_eq!(report.unknown, expected.unknown);
                published.insert(fecha, expected);
            }
            Err(DayError::Held { gate: "quality_gate_raw", .. }) => assert_eq!(rows, []),
            Err(DayError::Held { gate: "quality_gate_final", .. }) => assert_eq!(expected.revenue, 0),
            Err(other) => panic!("{other:?} on {rows:#?}"),
        }
        if published.is_empty() {
            continue;
        }
        let read = async |sql: &str, table: &str| {
            let query = Query { sql: sql.into(), inputs: vec![("t".into(), Input::Delta(table.into()))] };
            texts(&platform.ports.lakehouse.query(&query).await.expect("the table is read"))
        };
        let staging = read(
            "SELECT order_id, user_id, product_id, CAST(monto_bruto AS VARCHAR), CAST(descuento AS VARCHAR),
                    CAST(monto_neto AS VARCHAR), region, CAST(arrow_cast(timestamp_venta, 'Int64') AS VARCHAR),
                    CAST(fecha AS VARCHAR) AS dia, segmento, pais, categoria, marca FROM t ORDER BY dia, order_id",
            STAGING,
        )
        .await;
        assert_eq!(staging, published.values().flat_map(|n| n.staging.clone()).collect::<Vec<_>>());
        let mut mart = read(
            "SELECT CAST(fecha AS VARCHAR), region, segmento_cliente, CAST(revenue_bruto AS VARCHAR), CAST(revenue_neto AS VARCHAR),
                    CAST(descuentos_total AS VARCHAR), CAST(transacciones AS VARCHAR), CAST(usuarios_unicos AS VARCHAR),
                    CAST(ticket_promedio AS VARCHAR) FROM t",
            MART,
        )
        .await;
        mart.sort();
        assert_eq!(mart, published.values().flat_map(|n| n.mart.clone()).collect::<Vec<_>>());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_that_was_sent_twice_is_counted_once_however_many_its_orders_are() {
    // More orders that come again than a statement names.
    let once = (0..4_500).map(|n| Venta {
        order_id: Some(format!("o-{n}")),
        user_id: Some(format!("u-{}", n % 97)),
        product_id: Some("p1".into()),
        monto: Some(100 + n),
        descuento: None,
        region: Some(REGIONS[n as usize % 5].into()),
        timestamp: Some(n),
    });
    let once: Vec<Venta> = once.collect();
    let mut rows: Vec<Venta> = once.iter().chain(&once).cloned().collect();
    // Two that contradict each other, and one that comes once.
    rows.push(Venta { monto: Some(1), ..once[0].clone() });
    rows.push(Venta { order_id: Some("o-alone".into()), ..once[1].clone() });
    let attributes = Attributes::from([("u-1".to_owned(), (Some("vip".to_owned()), None))]);
    live(vec![(0, rows, attributes.clone(), attributes)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_two_orders_with_one_source_hash_are_one_row() {
    // Both are hashed as `o|1|u|5.00`.
    let rows = vec![sale("o|1", "u", "p1", 500), sale("o", "1|u", "p1", 500), sale("o2", "u", "p1", 700)];
    let rows: Vec<Venta> = rows.into_iter().map(|r| Venta { region: Some("norte".into()), ..r }).collect();
    let attributes = Attributes::from([("u".to_owned(), (None, None))]);
    live(vec![(0, rows, attributes.clone(), attributes)]).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, max_shrink_iters: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn generated_days_equal_a_naive_computation(
        steps in prop::collection::vec((0_u32..2, ventas(), attributes(USERS), attributes(PRODUCTS)), 1..4)
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        runtime.block_on(live(steps));
    }
}
