//! The rows of the two topics, and codecs that know their schemas.
//!
//! Money is whole cents in Rust and `decimal(12,2)` in Avro and Arrow, so nothing is ever rounded.

use std::{fmt, marker::PhantomData, sync::Arc};

use arrow::{
    array::{
        Array, ArrayRef, BooleanArray, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringArray,
        TimestampMillisecondArray,
    },
    datatypes::SchemaRef,
};
use bytes::Bytes;

use super::{
    CLICKS, CLICKS_SUBJECT, DecodedBatch, METRICAS_REALTIME, METRICAS_REALTIME_SUBJECT,
    decode::{Decoder, Limits, Record},
    encode::Encoder,
    invalid_schema, register_checked,
    resolve::Reader,
};
use crate::ports::{Compatibility, PortError, Result, SchemaRegistry};

/// One event of `ecommerce.clicks`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Click {
    /// Customer.
    pub user_id: String,
    /// `click`, `add_to_cart` or `purchase`; not checked here.
    pub event_type: String,
    /// Page.
    pub page: String,
    /// Product; `None` on a page that shows none.
    pub product_id: Option<String>,
    /// Net amount in cents, below 10^12 in absolute value; 0 unless it is a purchase.
    pub monto_cents: i64,
    /// Region; not checked here.
    pub region: String,
    /// Event time, milliseconds since 1970.
    pub timestamp_ms: i64,
}

/// One revision of one window of `ecommerce.metricas_realtime`.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricaRealtime {
    /// `region_1m`, `page_1m` or `region_5m`.
    pub window_kind: String,
    /// First millisecond of the window, since 1970.
    pub window_start_ms: i64,
    /// First millisecond after the window, since 1970.
    pub window_end_ms: i64,
    /// Region.
    pub region: String,
    /// Page; of `page_1m` only.
    pub page: Option<String>,
    /// Events of type click.
    pub clicks: i64,
    /// Events of type purchase.
    pub purchases: i64,
    /// Events of type add_to_cart.
    pub add_to_cart: i64,
    /// Sum of monto in cents, below 10^12 in absolute value.
    pub revenue_cents: i64,
    /// purchases / clicks; `None` without clicks.
    pub conversion_rate: Option<f64>,
    /// Distinct customers.
    pub unique_users: i64,
    /// Rises with each new result of the same window.
    pub revision: i64,
    /// Is `unique_users` a count, or an estimate?
    pub exact: bool,
}

/// A row type of a topic, in the columns of its declaration.
pub trait Row: Sized + fmt::Debug + Send + Sync {
    /// The declaration.
    const SCHEMA: &'static str;
    /// Where it is registered.
    const SUBJECT: &'static str;
    /// Columns in the order of the declaration.
    fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>>;
    /// The rows of a batch.
    ///
    /// # Errors
    /// `Permanent`, naming the column that is missing or has another type.
    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>>;
    /// A batch of rows.
    ///
    /// # Errors
    /// `Permanent` when a row is out of range.
    fn to_batch(rows: &[Self]) -> Result<RecordBatch> {
        let schema = arrow_schema::<Self>()?;
        let failed = |e| PortError::permanent(format!("build a batch of {}", Self::SUBJECT)).because(e);
        RecordBatch::try_new(schema, Self::columns(rows)?).map_err(failed)
    }
}

/// The columns of a row type.
///
/// # Errors
/// When its declaration has no columns; a test holds that the shipped ones have.
pub fn arrow_schema<R: Row>() -> Result<SchemaRef> {
    Ok(Reader::new(R::SCHEMA).map_err(|e| invalid_schema(R::SUBJECT, e))?.arrow)
}

fn money(cents: impl Iterator<Item = i64>) -> Result<ArrayRef> {
    let array = Decimal128Array::from_iter_values(cents.map(i128::from)).with_precision_and_scale(12, 2);
    Ok(Arc::new(array.map_err(|e| PortError::permanent("build a column of money").because(e))?))
}

fn times(ms: impl Iterator<Item = i64>) -> ArrayRef {
    Arc::new(TimestampMillisecondArray::from_iter_values(ms).with_timezone("+00:00"))
}

fn texts<'a>(values: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn longs(values: impl Iterator<Item = i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(values))
}

fn column<'a, A: 'static>(batch: &'a RecordBatch, name: &str) -> Result<&'a A> {
    let wrong = || PortError::permanent(format!("read column {name} of a batch: it is missing or has another type"));
    batch.column_by_name(name).and_then(|c| c.as_any().downcast_ref::<A>()).ok_or_else(wrong)
}

fn cents(array: &Decimal128Array, row: usize) -> Result<i64> {
    let value = array.value(row);
    i64::try_from(value).map_err(|e| PortError::permanent(format!("read {value} cents")).because(e))
}

impl Row for Click {
    const SCHEMA: &'static str = CLICKS;
    const SUBJECT: &'static str = CLICKS_SUBJECT;

    fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>> {
        Ok(vec![
            texts(rows.iter().map(|r| r.user_id.as_str())),
            texts(rows.iter().map(|r| r.event_type.as_str())),
            texts(rows.iter().map(|r| r.page.as_str())),
            Arc::new(rows.iter().map(|r| r.product_id.as_deref()).collect::<StringArray>()),
            money(rows.iter().map(|r| r.monto_cents))?,
            texts(rows.iter().map(|r| r.region.as_str())),
            times(rows.iter().map(|r| r.timestamp_ms)),
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let c = ClickColumns::of(batch)?;
        let row = |i| {
            Ok(Self {
                user_id: c.user_id.value(i).to_owned(),
                event_type: c.event_type.value(i).to_owned(),
                page: c.page.value(i).to_owned(),
                product_id: c.product_id.is_valid(i).then(|| c.product_id.value(i).to_owned()),
                monto_cents: cents(c.monto, i)?,
                region: c.region.value(i).to_owned(),
                timestamp_ms: c.timestamp.value(i),
            })
        };
        (0..batch.num_rows()).map(row).collect()
    }
}

/// The columns of a batch of clicks, typed.
#[derive(Debug, Clone, Copy)]
pub struct ClickColumns<'a> {
    /// Customer.
    pub user_id: &'a StringArray,
    /// Type of event.
    pub event_type: &'a StringArray,
    /// Page.
    pub page: &'a StringArray,
    /// Product; the one nullable column.
    pub product_id: &'a StringArray,
    /// Net amount, `decimal(12,2)`: the values are cents, and fit into 64 bits.
    pub monto: &'a Decimal128Array,
    /// Region.
    pub region: &'a StringArray,
    /// Event time, milliseconds since 1970.
    pub timestamp: &'a TimestampMillisecondArray,
}

impl<'a> ClickColumns<'a> {
    /// The columns of a batch that [`RowDecoder::decode`] or [`Row::to_batch`] has made.
    ///
    /// # Errors
    /// `Permanent`, naming the column that is missing or has another type.
    pub fn of(batch: &'a RecordBatch) -> Result<Self> {
        Ok(Self {
            user_id: column(batch, "user_id")?,
            event_type: column(batch, "event_type")?,
            page: column(batch, "page")?,
            product_id: column(batch, "product_id")?,
            monto: column(batch, "monto")?,
            region: column(batch, "region")?,
            timestamp: column(batch, "timestamp")?,
        })
    }
}

impl Row for MetricaRealtime {
    const SCHEMA: &'static str = METRICAS_REALTIME;
    const SUBJECT: &'static str = METRICAS_REALTIME_SUBJECT;

    fn columns(rows: &[Self]) -> Result<Vec<ArrayRef>> {
        Ok(vec![
            texts(rows.iter().map(|r| r.window_kind.as_str())),
            times(rows.iter().map(|r| r.window_start_ms)),
            times(rows.iter().map(|r| r.window_end_ms)),
            texts(rows.iter().map(|r| r.region.as_str())),
            Arc::new(rows.iter().map(|r| r.page.as_deref()).collect::<StringArray>()),
            longs(rows.iter().map(|r| r.clicks)),
            longs(rows.iter().map(|r| r.purchases)),
            longs(rows.iter().map(|r| r.add_to_cart)),
            money(rows.iter().map(|r| r.revenue_cents))?,
            Arc::new(rows.iter().map(|r| r.conversion_rate).collect::<Float64Array>()),
            longs(rows.iter().map(|r| r.unique_users)),
            longs(rows.iter().map(|r| r.revision)),
            Arc::new(rows.iter().map(|r| Some(r.exact)).collect::<BooleanArray>()),
        ])
    }

    fn from_batch(batch: &RecordBatch) -> Result<Vec<Self>> {
        let text = |name| column::<StringArray>(batch, name);
        let time = |name| column::<TimestampMillisecondArray>(batch, name);
        let long = |name| column::<Int64Array>(batch, name);
        let (window_kind, region, page) = (text("window_kind")?, text("region")?, text("page")?);
        let (window_start, window_end) = (time("window_start")?, time("window_end")?);
        let (clicks, purchases, add_to_cart) = (long("clicks")?, long("purchases")?, long("add_to_cart")?);
        let (unique_users, revision) = (long("unique_users")?, long("revision")?);
        let revenue = column::<Decimal128Array>(batch, "revenue")?;
        let conversion_rate = column::<Float64Array>(batch, "conversion_rate")?;
        let exact = column::<BooleanArray>(batch, "exact")?;
        let row = |i| {
            Ok(Self {
                window_kind: window_kind.value(i).to_owned(),
                window_start_ms: window_start.value(i),
                window_end_ms: window_end.value(i),
                region: region.value(i).to_owned(),
                page: page.is_valid(i).then(|| page.value(i).to_owned()),
                clicks: clicks.value(i),
                purchases: purchases.value(i),
                add_to_cart: add_to_cart.value(i),
                revenue_cents: cents(revenue, i)?,
                conversion_rate: conversion_rate.is_valid(i).then(|| conversion_rate.value(i)),
                unique_users: unique_users.value(i),
                revision: revision.value(i),
                exact: exact.value(i),
            })
        };
        (0..batch.num_rows()).map(row).collect()
    }
}

/// Decodes records of one topic into the columns of its row type, asking a registry for the writers' schemas.
#[derive(Debug)]
pub struct RowDecoder<R> {
    registry: Arc<dyn SchemaRegistry>,
    decoder: Decoder,
    row: PhantomData<R>,
}

impl<R: Row> RowDecoder<R> {
    /// A decoder with an empty cache of schemas.
    ///
    /// # Errors
    /// When the declaration has no columns; a test holds that the shipped ones have.
    pub fn new(registry: Arc<dyn SchemaRegistry>, limits: Limits) -> Result<Self> {
        let decoder = Decoder::new(R::SCHEMA, limits).map_err(|e| invalid_schema(R::SUBJECT, e))?;
        Ok(Self { registry, decoder, row: PhantomData })
    }

    /// Decodes a batch; `None` is a tombstone. Repeating the call is safe.
    ///
    /// # Errors
    /// The registry's, unless it says that it has no such schema, which rejects the record.
    pub async fn decode<V: Record>(&mut self, records: &[V]) -> Result<DecodedBatch> {
        self.decoder.decode(self.registry.as_ref(), records).await
    }
}

/// Encodes rows of one topic.
#[derive(Debug)]
pub struct RowEncoder<R> {
    encoder: Encoder,
    row: PhantomData<R>,
}

impl<R: Row> RowEncoder<R> {
    /// Registers the declaration, compared with all older versions, and encodes with the id it has. Idempotent.
    ///
    /// # Errors
    /// Those of [`register_checked`].
    pub async fn register(registry: &dyn SchemaRegistry, level: Compatibility) -> Result<Self> {
        Self::with_id(register_checked(registry, R::SUBJECT, R::SCHEMA, level).await?)
    }

    /// Encodes with an id that is known to be the declaration's.
    ///
    /// # Errors
    /// When the declaration has no columns; a test holds that the shipped ones have.
    pub fn with_id(id: u32) -> Result<Self> {
        let encoder = Encoder::new(R::SCHEMA, id).map_err(|e| invalid_schema(R::SUBJECT, e))?;
        Ok(Self { encoder, row: PhantomData })
    }

    /// One record for each row of a batch that has the columns of the declaration.
    ///
    /// # Errors
    /// `Permanent` when it has others, or a value is out of range; nothing is encoded then.
    pub fn encode(&mut self, batch: &RecordBatch) -> Result<Vec<Bytes>> {
        self.encoder.encode(batch)
    }

    /// One record for each row.
    ///
    /// # Errors
    /// `Permanent` when a value is out of range; nothing is encoded then.
    pub fn encode_rows(&mut self, rows: &[R]) -> Result<Vec<Bytes>> {
        self.encode(&R::to_batch(rows)?)
    }
}
