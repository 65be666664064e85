//! The simulated adapters: virtual clock, a source behind turmoil's network, a ledger and a pager in memory.
//!
//! The lakehouse is the real one; here it only pays for its calls to the store and dies with its process.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::array::{ArrayRef, Date32Array, Decimal128Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use simulacro_core::{
    batch::arrow_schema,
    history::{Event, HistorySink},
    ports::{
        AddColumns, Alert, Append, AppendRows, Column, Commit, DayWrite, Env, Lakehouse, Metrics, Notifier, Optimize,
        PartitionRead, PortError, Query, Restore, Result, Rewritten, Scd2, TableSource, TableVersion, TableWrite, Upsert,
        UpsertRows, Vacuum, Warehouse,
    },
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use turmoil::net::{TcpListener, TcpStream};

use crate::{
    host::Host,
    interpose,
    rng::Stream,
    store::{ObjectService, settle},
};

/// Port of the simulated PostgreSQL.
pub const POSTGRES: u16 = 5432;

/// The virtual clock, and ids that count up.
#[derive(Debug)]
pub struct SimEnv {
    /// Virtual time at the start of the simulation.
    pub start: DateTime<Utc>,
    /// The last id given.
    pub ids: AtomicU64,
    /// For jitter.
    pub jitter: Mutex<Stream>,
}

#[async_trait]
impl Env for SimEnv {
    fn now(&self) -> DateTime<Utc> {
        // Threads that are no turmoil host see the driver's clock, which moves once a tick.
        match turmoil::sim_elapsed() {
            Some(elapsed) => self.start + elapsed,
            None => DateTime::from_timestamp_nanos(interpose::virtual_nanos() as i64),
        }
    }
    #[expect(clippy::disallowed_methods, reason = "this is the simulator's Env; tokio's clock is virtual here")]
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn random(&self) -> u64 {
        self.jitter.lock().map_or(0, |mut stream| stream.draw())
    }
    fn new_id(&self) -> String {
        format!("sim-{}", self.ids.fetch_add(1, Ordering::SeqCst))
    }
}

/// One sale as the simulated source stores it. `None` is SQL NULL.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// Order.
    pub order_id: String,
    /// Customer.
    pub user_id: String,
    /// Product.
    pub product_id: String,
    /// Amount in cents.
    pub monto_cents: i64,
    /// Region.
    pub region: Option<String>,
    /// Day.
    pub fecha: NaiveDate,
}

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Ping,
    Columns,
    Read(NaiveDate),
}

#[derive(Debug, Serialize, Deserialize)]
enum Response {
    Pong,
    Columns(Vec<Column>),
    Rows(Vec<Row>),
}

/// What the simulated PostgreSQL holds, and when it is down.
#[derive(Debug)]
pub struct Postgres {
    /// Columns of `ventas`.
    pub columns: Vec<Column>,
    /// Rows of `ventas`.
    pub rows: Vec<Row>,
    /// Maintenance windows, from inclusive, to exclusive.
    pub down: Vec<(DateTime<Utc>, DateTime<Utc>)>,
}

/// Runs the service on its turmoil host: it listens, except in a maintenance window, when connections are refused.
///
/// # Errors
/// When turmoil's network fails in a way no fault asked for.
#[expect(clippy::disallowed_methods, reason = "turmoil's network and tokio's virtual clock, inside the simulator")]
pub async fn serve(state: Arc<Postgres>, start: DateTime<Utc>) -> std::io::Result<()> {
    let now = || start + turmoil::sim_elapsed().unwrap_or_default();
    let until = |t: DateTime<Utc>| (t - now()).to_std().unwrap_or_default();
    loop {
        if let Some((_, to)) = state.down.iter().find(|(from, to)| (*from..*to).contains(&now())) {
            tokio::time::sleep(until(*to)).await;
            continue;
        }
        let next_down = state.down.iter().map(|d| d.0).filter(|from| *from > now()).min();
        let listener = TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), POSTGRES)).await?;
        loop {
            let stop = async {
                match next_down {
                    Some(at) => tokio::time::sleep(until(at)).await,
                    None => std::future::pending().await,
                }
            };
            let accepted = tokio::select! { biased; () = stop => break, a = listener.accept() => a };
            let (stream, _) = accepted?;
            let state = state.clone();
            tokio::spawn(async move { answer(stream, &state).await });
        }
    }
}

async fn answer(stream: TcpStream, state: &Postgres) -> std::io::Result<()> {
    let (read, mut write) = tokio::io::split(stream);
    let mut line = String::new();
    BufReader::new(read).read_line(&mut line).await?;
    let response = match serde_json::from_str(&line)? {
        Request::Ping => Response::Pong,
        Request::Columns => Response::Columns(state.columns.clone()),
        Request::Read(fecha) => Response::Rows(state.rows.iter().filter(|r| r.fecha == fecha).cloned().collect()),
    };
    let mut body = serde_json::to_vec(&response)?;
    body.push(b'\n');
    write.write_all(&body).await?;
    write.shutdown().await
}

/// The client side of the simulated PostgreSQL.
#[derive(Debug)]
pub struct SimSource {
    /// Host name on the simulated network.
    pub server: String,
    /// Connections refused so far: the proof that the fault fired.
    pub refused: AtomicU64,
}

impl SimSource {
    async fn call(&self, request: Request) -> Result<Response> {
        let what = format!("ask {}:{POSTGRES}", self.server);
        let mut stream = TcpStream::connect((self.server.as_str(), POSTGRES)).await.map_err(|e| {
            if e.kind() == std::io::ErrorKind::ConnectionRefused {
                self.refused.fetch_add(1, Ordering::SeqCst);
            }
            let code = if e.kind() == std::io::ErrorKind::ConnectionRefused { "ECONNREFUSED" } else { "EIO" };
            PortError::retryable(format!("connect to {}:{POSTGRES}", self.server)).code(code).because(e)
        })?;
        let lost = |e: std::io::Error| PortError::retryable(what.clone()).code("ECONNRESET").because(e);
        let mut body = serde_json::to_vec(&request).map_err(|e| PortError::permanent(what.clone()).because(e))?;
        body.push(b'\n');
        stream.write_all(&body).await.map_err(lost)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).await.map_err(lost)?;
        serde_json::from_str(&line).map_err(|e| PortError::retryable(what.clone()).because(e))
    }
}

#[async_trait]
impl TableSource for SimSource {
    async fn ping(&self) -> Result<()> {
        self.call(Request::Ping).await.map(|_| ())
    }
    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        match self.call(Request::Columns).await? {
            Response::Columns(columns) => Ok(columns),
            other => Err(PortError::permanent(format!("columns of {table}: found {other:?}"))),
        }
    }
    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        let Response::Rows(rows) = self.call(Request::Read(fecha)).await? else {
            return Err(PortError::permanent(format!("read {table} of {fecha}: expected rows")));
        };
        let day = (fecha - NaiveDate::default()).num_days();
        let n = rows.len();
        let bad = |e: arrow::error::ArrowError| PortError::permanent(format!("read {table} of {fecha}")).because(e);
        let mut arrays: Vec<ArrayRef> = Vec::new();
        for column in columns {
            arrays.push(match column.name.as_str() {
                "order_id" => Arc::new(rows.iter().map(|r| Some(r.order_id.as_str())).collect::<StringArray>()),
                "user_id" => Arc::new(rows.iter().map(|r| Some(r.user_id.as_str())).collect::<StringArray>()),
                "product_id" => Arc::new(rows.iter().map(|r| Some(r.product_id.as_str())).collect::<StringArray>()),
                "region" => Arc::new(rows.iter().map(|r| r.region.as_deref()).collect::<StringArray>()),
                "monto" => Arc::new(
                    rows.iter()
                        .map(|r| Some(i128::from(r.monto_cents)))
                        .collect::<Decimal128Array>()
                        .with_precision_and_scale(10, 2)
                        .map_err(bad)?,
                ),
                "descuento" => Arc::new(Decimal128Array::from(vec![0_i128; n]).with_precision_and_scale(10, 2).map_err(bad)?),
                "timestamp_venta" => {
                    Arc::new(TimestampMicrosecondArray::from(vec![day * 86_400_000_000; n]).with_timezone("UTC"))
                }
                "fecha" => Arc::new(Date32Array::from(vec![day as i32; n])),
                other => return Err(PortError::permanent(format!("column {other} does not exist")).code("42703")),
            });
        }
        let batch = RecordBatch::try_new(arrow_schema(columns)?, arrays).map_err(bad)?;
        Ok(PartitionRead { expected_rows: n as u64, batches: futures::stream::iter([Ok(batch)]).boxed() })
    }
    async fn not_null(&self, _table: &str) -> Result<Option<BTreeSet<String>>> {
        // Its declarations say names and types; what may be null is judged row by row.
        Ok(None)
    }
    async fn read_table(&self, table: &str, _columns: &[Column]) -> Result<PartitionRead> {
        // Its one table has days; whoever asks for a table without days asks for one that it does not have.
        Err(PortError::permanent(format!("read {table}: relation \"{table}\" does not exist")).code("42P01"))
    }
}

fn poisoned<T>(_: T) -> PortError {
    PortError::permanent("a simulated service panicked while it held its state")
}

/// The real lakehouse or warehouse on a simulated host: after each call it waits for what its store calls cost.
#[derive(Debug)]
pub struct OnHost<T: ?Sized> {
    /// The real one.
    pub inner: Arc<T>,
    /// Whose calls are charged.
    pub store: Arc<ObjectService>,
}

#[async_trait]
impl Lakehouse for OnHost<dyn Lakehouse> {
    async fn overwrite_day(&self, write: DayWrite) -> Result<Commit> {
        let result = self.inner.overwrite_day(write).await;
        settle(&self.store).await;
        result
    }
    async fn overwrite_table(&self, write: TableWrite) -> Result<Commit> {
        let result = self.inner.overwrite_table(write).await;
        settle(&self.store).await;
        result
    }
    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>> {
        let result = self.inner.last_epoch(table, fecha).await;
        settle(&self.store).await;
        result
    }
    async fn append(&self, append: Append) -> Result<Commit> {
        let result = self.inner.append(append).await;
        settle(&self.store).await;
        result
    }
    async fn append_rows(&self, rows: AppendRows) -> Result<Commit> {
        let result = self.inner.append_rows(rows).await;
        settle(&self.store).await;
        result
    }
    async fn upsert(&self, upsert: Upsert) -> Result<Commit> {
        let result = self.inner.upsert(upsert).await;
        settle(&self.store).await;
        result
    }
    async fn upsert_scd2(&self, change: Scd2) -> Result<Commit> {
        let result = self.inner.upsert_scd2(change).await;
        settle(&self.store).await;
        result
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        let result = self.inner.writer_epoch(table, writer).await;
        settle(&self.store).await;
        result
    }
    async fn add_columns(&self, change: AddColumns) -> Result<Commit> {
        let result = self.inner.add_columns(change).await;
        settle(&self.store).await;
        result
    }
    async fn restore(&self, restore: Restore) -> Result<Commit> {
        let result = self.inner.restore(restore).await;
        settle(&self.store).await;
        result
    }
    async fn versions(&self, table: &str, limit: usize) -> Result<Vec<TableVersion>> {
        let result = self.inner.versions(table, limit).await;
        settle(&self.store).await;
        result
    }
    async fn optimize(&self, optimize: Optimize) -> Result<Rewritten> {
        let result = self.inner.optimize(optimize).await;
        settle(&self.store).await;
        result
    }
    async fn vacuum(&self, vacuum: Vacuum) -> Result<Vec<String>> {
        let result = self.inner.vacuum(vacuum).await;
        settle(&self.store).await;
        result
    }
    async fn query(&self, query: &Query) -> Result<Vec<RecordBatch>> {
        let result = self.inner.query(query).await;
        settle(&self.store).await;
        result
    }
    async fn maintain(&self, table: &str) -> Result<()> {
        let result = self.inner.maintain(table).await;
        settle(&self.store).await;
        result
    }
    async fn exists(&self, table: &str) -> Result<bool> {
        let result = self.inner.exists(table).await;
        settle(&self.store).await;
        result
    }
}

#[async_trait]
impl Warehouse for OnHost<dyn Warehouse> {
    async fn load_day(&self, table: &str, fecha: NaiveDate, epoch: i64, batches: Vec<RecordBatch>) -> Result<Commit> {
        let result = self.inner.load_day(table, fecha, epoch, batches).await;
        settle(&self.store).await;
        result
    }
    async fn upsert_rows(&self, rows: UpsertRows) -> Result<Commit> {
        let result = self.inner.upsert_rows(rows).await;
        settle(&self.store).await;
        result
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        let result = self.inner.writer_epoch(table, writer).await;
        settle(&self.store).await;
        result
    }
    async fn query(&self, sql: &str, tables: &[&str]) -> Result<Vec<RecordBatch>> {
        let result = self.inner.query(sql, tables).await;
        settle(&self.store).await;
        result
    }
}

/// Metrics by name and labels; what a scrape would show.
#[derive(Debug, Default)]
pub struct SimMetrics {
    /// Present values.
    pub values: Mutex<BTreeMap<String, f64>>,
}

impl SimMetrics {
    fn change(&self, name: &str, labels: &[(&'static str, &str)], change: impl FnOnce(f64) -> f64) {
        let labels = labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",");
        if let Ok(mut values) = self.values.lock() {
            let value = values.entry(format!("{name}{{{labels}}}")).or_default();
            *value = change(*value);
        }
    }
}

impl Metrics for SimMetrics {
    fn count(&self, name: &'static str, labels: &[(&'static str, &str)], by: u64) {
        self.change(name, labels, |value| value + by as f64);
    }
    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.change(name, labels, |_| value);
    }
}

/// A pager that remembers.
#[derive(Debug)]
pub struct SimNotifier {
    /// For the time of an alert.
    pub env: Arc<dyn Env>,
    /// Alerts in order, each incident once.
    pub raised: Mutex<Vec<(DateTime<Utc>, Alert)>>,
    /// Keys of the incidents that are open.
    pub open: Mutex<BTreeSet<String>>,
    /// Who calls.
    pub host: Arc<Host>,
}

#[async_trait]
impl Notifier for SimNotifier {
    async fn raise(&self, alert: &Alert) -> Result<()> {
        self.host.only_alive().await;
        if self.open.lock().map_err(poisoned)?.insert(alert.dedup_key.clone()) {
            self.raised.lock().map_err(poisoned)?.push((self.env.now(), alert.clone()));
        }
        Ok(())
    }
    async fn resolve(&self, dedup_key: &str) -> Result<()> {
        self.host.only_alive().await;
        self.open.lock().map_err(poisoned)?.remove(dedup_key);
        Ok(())
    }
}

/// The history in memory.
#[derive(Debug, Default)]
pub struct SimHistory {
    /// Events in order.
    pub events: Mutex<Vec<Event>>,
}

impl HistorySink for SimHistory {
    fn append(&self, event: Event) {
        if let Ok(mut events) = self.events.lock() {
            events.push(event);
        }
    }
}
