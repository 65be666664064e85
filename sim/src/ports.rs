//! The simulated adapters: virtual clock, and a pager and metrics in memory. The source is in [`crate::postgres`].
//!
//! The lakehouse is the real one; here it only pays for its calls to the store and dies with its process.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::{
    history::{Event, HistorySink},
    ports::{
        AddColumns, Alert, Append, AppendRows, Commit, DayWrite, Env, Lakehouse, Metrics, Notifier, Optimize, PortError, Query,
        Restore, Result, Rewritten, Scd2, TableVersion, TableWrite, Upsert, UpsertRows, Vacuum, Warehouse,
    },
};

use crate::{
    host::Host,
    interpose,
    rng::Stream,
    store::{ObjectService, settle},
};

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
