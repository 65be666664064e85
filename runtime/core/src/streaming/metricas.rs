//! `realtime.metricas_clicks`: the output topic as a table of the warehouse, one row per window and revision.
//!
//! A row that is there is replaced by the one that comes, so a topic that is loaded again changes nothing. Left out: which
//! revision counts, which is for the reader to say: the highest.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{
        ArrayRef, BooleanArray, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    },
    datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit},
};
use async_trait::async_trait;

use super::{
    config::StreamConfig,
    eventos::writer,
    sink::{SinkSpec, SinkTable, Written},
};
use crate::{
    avro::{Limits, MetricaRealtime, Row, RowDecoder},
    ports::{
        Mark, PortError, Result, SchemaRegistry, UpsertRows, Warehouse,
        event_log::{LogRecord, TopicPartition},
    },
};

/// The table.
pub const METRICAS: &str = "realtime.metricas_clicks";
/// What identifies a row.
pub const KEY: [&str; 5] = ["window_kind", "window_start", "region", "page", "revision"];

/// The sink of this table.
pub fn spec(config: &StreamConfig) -> SinkSpec {
    SinkSpec::of(config, "metricas_clicks", &config.topics.metrics, config.metricas_flush)
}

/// The table `realtime.metricas_clicks`.
#[derive(Debug)]
pub struct MetricasTable {
    warehouse: Arc<dyn Warehouse>,
    decoder: RowDecoder<MetricaRealtime>,
    schema: SchemaRef,
}

impl MetricasTable {
    /// Over a warehouse.
    ///
    /// # Errors
    /// When the declaration of metrics has no columns; a test holds that the shipped one has.
    pub fn new(config: &StreamConfig, warehouse: Arc<dyn Warehouse>, registry: Arc<dyn SchemaRegistry>) -> Result<Self> {
        let decoder = RowDecoder::new(registry, Limits { record_bytes_max: config.record_bytes_max })?;
        let field = |name: &str, data_type: DataType, is_nullable: bool| Field::new(name, data_type, is_nullable);
        let instant = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let schema = Schema::new(vec![
            field("window_kind", DataType::Utf8, false),
            field("window_start", instant(), false),
            field("window_end", instant(), false),
            field("region", DataType::Utf8, false),
            field("page", DataType::Utf8, true),
            field("clicks", DataType::Int64, false),
            field("purchases", DataType::Int64, false),
            field("add_to_cart", DataType::Int64, false),
            field("revenue", DataType::Decimal128(12, 2), false),
            field("conversion_rate", DataType::Float64, true),
            field("unique_users", DataType::Int64, false),
            field("revision", DataType::Int64, false),
            field("exact", DataType::Boolean, false),
        ]);
        Ok(Self { warehouse, decoder, schema: Arc::new(schema) })
    }

    fn batch(&self, rows: &[MetricaRealtime]) -> Result<RecordBatch> {
        let failed = |e| PortError::permanent(format!("build rows of {METRICAS}")).because(e);
        let text = |of: fn(&MetricaRealtime) -> &str| Arc::new(StringArray::from_iter_values(rows.iter().map(of))) as ArrayRef;
        let number = |of: fn(&MetricaRealtime) -> i64| Arc::new(Int64Array::from_iter_values(rows.iter().map(of))) as ArrayRef;
        let instant = |of: fn(&MetricaRealtime) -> i64| {
            let micros = TimestampMicrosecondArray::from_iter_values(rows.iter().map(|r| of(r) * 1_000));
            Arc::new(micros.with_timezone("UTC")) as ArrayRef
        };
        let cents = Decimal128Array::from_iter_values(rows.iter().map(|r| i128::from(r.revenue_cents)));
        let columns: Vec<ArrayRef> = vec![
            text(|r| &r.window_kind),
            instant(|r| r.window_start_ms),
            instant(|r| r.window_end_ms),
            text(|r| &r.region),
            Arc::new(rows.iter().map(|r| r.page.as_deref()).collect::<StringArray>()),
            number(|r| r.clicks),
            number(|r| r.purchases),
            number(|r| r.add_to_cart),
            Arc::new(cents.with_precision_and_scale(12, 2).map_err(failed)?),
            Arc::new(rows.iter().map(|r| r.conversion_rate).collect::<Float64Array>()),
            number(|r| r.unique_users),
            number(|r| r.revision),
            Arc::new(BooleanArray::from_iter(rows.iter().map(|r| Some(r.exact)))),
        ];
        RecordBatch::try_new(self.schema.clone(), columns).map_err(failed)
    }
}

#[async_trait]
impl SinkTable for MetricasTable {
    async fn position(&mut self, at: &TopicPartition) -> Result<Option<i64>> {
        self.warehouse.writer_epoch(METRICAS, &writer(at)).await
    }

    async fn write(&mut self, at: &TopicPartition, after: Option<i64>, next: i64, records: &[LogRecord]) -> Result<Written> {
        let values: Vec<_> = records.iter().map(|record| record.value.clone()).collect();
        let decoded = self.decoder.decode(&values).await?;
        if let Some(reject) = decoded.rejects.first() {
            // Nobody but the job writes there.
            let offset = records.get(reject.index as usize).map_or(next, |record| record.offset);
            return Err(PortError::permanent(format!("read {}-{} at {offset}: {}", at.topic, at.partition, reject.reason)));
        }
        // A revision that a job without its old state emits again replaces the one before it.
        let mut rows = BTreeMap::new();
        for row in MetricaRealtime::from_batch(&decoded.batch)? {
            rows.insert((row.window_kind.clone(), row.window_start_ms, row.region.clone(), row.page.clone(), row.revision), row);
        }
        let rows: Vec<MetricaRealtime> = rows.into_values().collect();
        let upsert = UpsertRows {
            table: METRICAS.to_owned(),
            mark: Mark { writer: writer(at), epoch: next },
            after,
            keys: KEY.map(str::to_owned).to_vec(),
            batches: vec![self.batch(&rows)?],
        };
        let left_out = (records.len() - rows.len()) as u64;
        let commit = self.warehouse.upsert_rows(upsert).await?;
        Ok(Written { commit, rows: rows.len() as u64, left_out })
    }
}
