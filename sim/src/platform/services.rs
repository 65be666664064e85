//! What the platform reaches for: the source, the API's transport and the object store, each with the faults that strike it.
//!
//! Answers are those of the real services, with their codes. What this leaves out: anything that a fault does not ask for.

use std::{collections::BTreeSet, fmt, ops::Range, sync::Arc, time::Duration};

use arrow::array::{ArrayRef, Date32Array, Decimal128Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use async_trait::async_trait;
use bytes::Bytes;
use chrono::NaiveDate;
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as StoreResult, path::Path,
};
use simulacro_core::{
    batch::arrow_schema,
    contract::Contract,
    dimensions::paged::{PageRequest, PageResponse, Transport},
    ports::{Column, PartitionRead, PortError, Result, TableSource},
};

use super::{
    clock::Clock,
    faults::{Faults, Mode, SIGNATURE_S},
    shop::{Shop, product_id, user_id},
};

/// What a question to the source costs.
const LATENCY: Duration = Duration::from_millis(20);
/// What the source calls its column of regions after a rename.
const RENAMED: &str = "zona";
/// Every so many rows have no region once it may be null.
const NULL_EVERY: usize = 50;
/// Every so many rows come twice.
const TWICE_EVERY: usize = 3;

/// The simulated PostgreSQL of the shop.
#[derive(Debug)]
pub struct Source {
    /// True time.
    pub clock: Arc<Clock>,
    /// What strikes it.
    pub faults: Arc<Faults>,
    /// What it holds.
    pub shop: Arc<Shop>,
    /// What its table of sales is declared as.
    pub contract: Arc<Contract>,
    /// Its client takes no error for one that stays.
    pub patient: bool,
}

impl Source {
    async fn reach(&self) -> Result<()> {
        self.clock.sleep(LATENCY).await;
        if self.faults.strikes(Mode::SourceAway, 1) {
            return Err(PortError::retryable("connect to postgres:5432").code("ECONNREFUSED").because("connection refused"));
        }
        if self.faults.strikes(Mode::PasswordExpired, 1) {
            let text = "password authentication failed for user \"etl\"";
            let what = "connect to postgres:5432";
            let error = if self.patient { PortError::retryable(what) } else { PortError::permanent(what) };
            return Err(error.code("28P01").because(text));
        }
        Ok(())
    }

    fn no_table(table: &str) -> PortError {
        PortError::permanent(format!("read {table}: relation \"{table}\" does not exist")).code("42P01")
    }
}

#[async_trait]
impl TableSource for Source {
    async fn ping(&self) -> Result<()> {
        self.reach().await
    }
    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        self.reach().await?;
        if table != self.contract.table {
            return Err(Self::no_table(table));
        }
        let mut columns = self.contract.columns.clone();
        if self.faults.strikes(Mode::ColumnRenamed, 1) {
            for column in columns.iter_mut().filter(|c| c.name == "region") {
                column.name = RENAMED.into();
            }
        }
        if self.faults.strikes(Mode::ColumnAdded, 1) {
            columns.push(Column { name: "canal".into(), physical_type: "string".into() });
        }
        Ok(columns)
    }
    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        self.reach().await?;
        if table != self.contract.table {
            return Err(Self::no_table(table));
        }
        let is_dropped = self.faults.strikes(Mode::NotNullDropped, 1);
        let required = self.contract.fields.iter().filter(|f| f.required && !(is_dropped && f.name == "region"));
        Ok(Some(required.map(|f| f.name.clone()).collect()))
    }
    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        self.reach().await?;
        if table != self.contract.table {
            return Err(Self::no_table(table));
        }
        let mut sales = self.shop.sales(fecha);
        let copies: Vec<_> = sales.iter().step_by(TWICE_EVERY).cloned().collect();
        if self.faults.strikes(Mode::RowsTwice, copies.len() as u64) {
            sales.extend(copies);
        }
        let hot = sales.iter().filter(|s| s.user == 0 && s.product == 0).count() as u64;
        self.faults.reads_hot(fecha, hot);
        let nulls = self.faults.strikes(Mode::NotNullDropped, 1);
        let renamed = self.faults.is_active(Mode::ColumnRenamed);
        let day = (fecha - NaiveDate::default()).num_days();
        let n = sales.len();
        let bad = |e: arrow::error::ArrowError| PortError::permanent(format!("read {table} of {fecha}")).because(e);
        let mut arrays: Vec<ArrayRef> = Vec::new();
        for column in columns {
            arrays.push(match column.name.as_str() {
                "order_id" => Arc::new(sales.iter().map(|s| Some(s.order_id.as_str())).collect::<StringArray>()),
                "user_id" => Arc::new(sales.iter().map(|s| Some(user_id(s.user))).collect::<StringArray>()),
                "product_id" => Arc::new(sales.iter().map(|s| Some(product_id(s.product))).collect::<StringArray>()),
                "region" if !renamed => {
                    let region = |(i, region)| (!nulls || i % NULL_EVERY != 0).then_some(region);
                    Arc::new(sales.iter().map(|s| s.region).enumerate().map(region).collect::<StringArray>())
                }
                "monto" => Arc::new(
                    sales
                        .iter()
                        .map(|s| Some(i128::from(s.monto_cents)))
                        .collect::<Decimal128Array>()
                        .with_precision_and_scale(10, 2)
                        .map_err(bad)?,
                ),
                "descuento" => Arc::new(
                    sales
                        .iter()
                        .map(|s| s.descuento_cents.map(i128::from))
                        .collect::<Decimal128Array>()
                        .with_precision_and_scale(10, 2)
                        .map_err(bad)?,
                ),
                "timestamp_venta" => Arc::new(
                    sales
                        .iter()
                        .map(|s| Some((day * 86_400 + s.second) * 1_000_000))
                        .collect::<TimestampMicrosecondArray>()
                        .with_timezone("UTC"),
                ),
                "fecha" => Arc::new(Date32Array::from(vec![i32::try_from(day).unwrap_or(i32::MAX); n])),
                other => return Err(PortError::permanent(format!("column {other} does not exist")).code("42703")),
            });
        }
        let batch = RecordBatch::try_new(arrow_schema(columns)?, arrays).map_err(bad)?;
        Ok(PartitionRead { expected_rows: n as u64, batches: futures::stream::iter([Ok(batch)]).boxed() })
    }
    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        self.reach().await?;
        if table != "clientes" {
            return Err(Self::no_table(table));
        }
        let customers = self.shop.customers(self.clock.now());
        let mut arrays: Vec<ArrayRef> = Vec::new();
        for column in columns {
            arrays.push(match column.name.as_str() {
                "user_id" => Arc::new(customers.iter().map(|c| Some(user_id(c.user))).collect::<StringArray>()),
                "segmento" => Arc::new(customers.iter().map(|c| c.segmento).collect::<StringArray>()),
                "pais" => Arc::new(customers.iter().map(|c| Some(c.pais)).collect::<StringArray>()),
                other => return Err(PortError::permanent(format!("column {other} does not exist")).code("42703")),
            });
        }
        let bad = |e: arrow::error::ArrowError| PortError::permanent(format!("read {table}")).because(e);
        let batch = RecordBatch::try_new(arrow_schema(columns)?, arrays).map_err(bad)?;
        Ok(PartitionRead { expected_rows: customers.len() as u64, batches: futures::stream::iter([Ok(batch)]).boxed() })
    }
}

/// A transport to the API with the faults that strike it.
#[derive(Debug)]
pub struct ApiLink<T> {
    /// The way to the service.
    pub inner: T,
    /// What strikes it.
    pub faults: Arc<Faults>,
    /// An API that does not answer is taken for one that has nothing new.
    pub believes: bool,
}

#[async_trait]
impl<T: Transport> Transport for ApiLink<T> {
    async fn get(&self, request: &PageRequest, what: &str) -> Result<PageResponse> {
        let refused = |status, body: &'static str| match &request.if_none_match {
            Some(etag) if self.believes => {
                PageResponse { status: 304, etag: Some(etag.clone()), retry_after: None, body: Bytes::new() }
            }
            Some(_) | None => PageResponse { status, etag: None, retry_after: None, body: Bytes::from_static(body.as_bytes()) },
        };
        let answer = self.inner.get(request, what).await?;
        if self.faults.strikes(Mode::ApiAway, 1) {
            return Ok(refused(503, "<html>please come back later</html>"));
        }
        if self.faults.strikes(Mode::ApiTokenExpired, 1) {
            return Ok(refused(401, "{\"error\": \"invalid_token\"}"));
        }
        Ok(answer)
    }
}

/// What a call wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wants {
    Read,
    Write,
}

/// An object store with the faults that strike its calls.
#[derive(Debug)]
pub struct StoreLink<T> {
    /// The store.
    pub inner: T,
    /// What strikes it.
    pub faults: Arc<Faults>,
    /// True time.
    pub clock: Arc<Clock>,
    /// Whether the caller's clock is the orchestrator's, which may be off.
    pub signs_skewed: bool,
}

impl<T> fmt::Display for StoreLink<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated")
    }
}

fn failed(path: &Path, text: &str) -> StoreError {
    StoreError::Generic { store: "simulated", source: format!("{path}: {text}").into() }
}

impl<T> StoreLink<T> {
    /// Lets the faults strike before anything happens.
    fn enter(&self, wants: Wants, path: &Path) -> StoreResult<()> {
        let denied = |code: &str| StoreError::PermissionDenied { path: path.to_string(), source: code.into() };
        if self.faults.strikes(Mode::StoreTimeouts, 1) {
            return Err(failed(path, "503 SlowDown: reduce your request rate"));
        }
        if self.faults.strikes(Mode::StoreTokenExpired, 1) {
            return Err(denied("400 ExpiredToken: the provided token has expired"));
        }
        if wants == Wants::Write && self.faults.strikes(Mode::DiskFull, 1) {
            return Err(failed(path, "507 ENOSPC: no space left on device"));
        }
        if self.signs_skewed
            && self.faults.offset(Mode::ClockSkew, self.clock.now()).is_some_and(|offset| offset.abs() > SIGNATURE_S)
        {
            return Err(denied(
                "403 RequestTimeTooSkewed: the difference between the request time and the server's is too large",
            ));
        }
        Ok(())
    }

    /// Lets the answer of a write be lost.
    fn leave<R>(&self, path: &Path, result: StoreResult<R>) -> StoreResult<R> {
        if result.is_ok() && self.faults.strikes(Mode::AnswersLost, 1) {
            return Err(failed(path, "ECONNRESET: the answer was lost"));
        }
        result
    }
}

#[async_trait]
impl<T: ObjectStore> ObjectStore for StoreLink<T> {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> StoreResult<PutResult> {
        self.enter(Wants::Write, location)?;
        let result = self.inner.put_opts(location, payload, opts).await;
        self.leave(location, result)
    }
    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> StoreResult<Box<dyn MultipartUpload>> {
        self.enter(Wants::Write, location)?;
        self.inner.put_multipart_opts(location, opts).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.enter(Wants::Read, location)?;
        self.inner.get_opts(location, options).await
    }
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> StoreResult<Vec<Bytes>> {
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            parts.push(self.get_range(location, range.clone()).await?);
        }
        Ok(parts)
    }
    fn delete_stream(&self, locations: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        match self.enter(Wants::Write, &Path::default()) {
            Ok(()) => self.inner.delete_stream(locations),
            Err(e) => futures::stream::iter([Err(e)]).boxed(),
        }
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        match self.enter(Wants::Read, prefix.unwrap_or(&Path::default())) {
            Ok(()) => self.inner.list(prefix),
            Err(e) => futures::stream::iter([Err(e)]).boxed(),
        }
    }
    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        match self.enter(Wants::Read, prefix.unwrap_or(&Path::default())) {
            Ok(()) => self.inner.list_with_offset(prefix, offset),
            Err(e) => futures::stream::iter([Err(e)]).boxed(),
        }
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.enter(Wants::Read, prefix.unwrap_or(&Path::default()))?;
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.enter(Wants::Write, to)?;
        let result = self.inner.copy_opts(from, to, options).await;
        self.leave(to, result)
    }
}
