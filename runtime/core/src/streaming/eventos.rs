//! Raw `eventos`: every valid click as a row of the lake, with the partition and offset it came from.
//!
//! Valid is what the job calls valid, judged by the same rules against the same append time, so what is missing here stands
//! in the dead-letter topic. Two things differ from what windows count. Late events are rows, since a session does not mind.
//! Events that were delivered again are rows, too, because the layer is as it arrived: models take equal rows as one. Types
//! that the contract of the table does not have, such as a heartbeat, have no row. Left out: reading, and when to write.

use std::{collections::BTreeSet, sync::Arc};

use arrow::{
    array::{
        ArrayRef, Date32Array, Decimal128Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray, UInt64Array,
    },
    compute::take,
    datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit},
};
use async_trait::async_trait;

use super::{
    config::{StreamConfig, ms},
    event::{ClickDecoder, Decoded, Rules, validate},
    sink::{SinkSpec, SinkTable, Written},
};
use crate::{
    contract::catalogue,
    ports::{
        AppendRows, Lakehouse, Mark, PortError, Result,
        event_log::{LogRecord, TopicPartition},
    },
};

/// Folder of the table.
pub const EVENTOS: &str = "raw/eventos";
/// Writes of a member between two looks after the table's log.
const MAINTAIN_EVERY: u32 = 8;
const DAY_MS: i64 = 86_400_000;

/// The sink of this table.
pub fn spec(config: &StreamConfig) -> SinkSpec {
    SinkSpec::of(config, "eventos", &config.topics.clicks, config.eventos_flush)
}

/// Whose position in the table a partition's is.
pub(crate) fn writer(at: &TopicPartition) -> String {
    format!("{}-{}", at.topic, at.partition)
}

/// Offset after the last record of a partition that the table has; `None` when it has none.
///
/// # Errors
/// Those of the lakehouse.
pub async fn position(lakehouse: &dyn Lakehouse, at: &TopicPartition) -> Result<Option<i64>> {
    lakehouse.writer_epoch(EVENTOS, &writer(at)).await
}

/// The table `raw/eventos`.
#[derive(Debug)]
pub struct EventosTable {
    config: StreamConfig,
    /// Types that have rows.
    event_types: BTreeSet<String>,
    lakehouse: Arc<dyn Lakehouse>,
    decoder: Box<dyn ClickDecoder>,
    schema: SchemaRef,
    writes: u32,
}

impl EventosTable {
    /// Over a lakehouse. Its event types are those of the contract that ships.
    ///
    /// # Errors
    /// `Permanent` when the seed list of event types is not there, which a test excludes.
    pub fn new(config: &StreamConfig, lakehouse: Arc<dyn Lakehouse>, decoder: Box<dyn ClickDecoder>) -> Result<Self> {
        let types = catalogue::seed("tipos_evento.csv")
            .ok_or_else(|| PortError::permanent("read the seed list tipos_evento.csv: found none, expected one"))?;
        let field = |name: &str, data_type: DataType, is_nullable: bool| Field::new(name, data_type, is_nullable);
        let instant = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
        let schema = Schema::new(vec![
            field("user_id", DataType::Utf8, false),
            field("event_type", DataType::Utf8, false),
            field("page", DataType::Utf8, false),
            field("product_id", DataType::Utf8, true),
            field("monto", DataType::Decimal128(12, 2), false),
            field("region", DataType::Utf8, false),
            field("timestamp", instant(), false),
            field("fecha", DataType::Date32, false),
            field("_partition", DataType::Int64, false),
            field("_offset", DataType::Int64, false),
            field("_appended_at", instant(), false),
        ]);
        let event_types = types.into_iter().collect();
        Ok(Self { config: config.clone(), event_types, lakehouse, decoder, schema: Arc::new(schema), writes: 0 })
    }

    /// The rows of decoded records, and how many of the records have none.
    fn rows(&self, at: &TopicPartition, records: &[LogRecord], decoded: &Decoded) -> Result<(RecordBatch, u64)> {
        let (config, batch) = (&self.config, &decoded.batch);
        let rules =
            Rules { event_types: &config.event_types, regions: config.regions.as_ref(), future_ms: ms(config.future_bound) };
        let mut kept: Vec<u64> = Vec::with_capacity(batch.record.len());
        let (mut micros, mut days, mut offsets, mut appended) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (row, &index) in batch.record.iter().enumerate() {
            let record = records
                .get(index as usize)
                .ok_or_else(|| PortError::permanent(format!("decoder made a row of record {index} of {}", records.len())))?;
            let Ok(event) = validate(batch, row, record.appended_ms, &rules) else { continue };
            // A time that a date has no room for is ahead of any append time, so it is not valid.
            let Ok(day) = i32::try_from(event.timestamp_ms.div_euclid(DAY_MS)) else { continue };
            if !self.event_types.contains(batch.event_type.value(row)) {
                continue;
            }
            kept.push(row as u64);
            micros.push(event.timestamp_ms * 1_000);
            days.push(day);
            offsets.push(record.offset);
            appended.push(record.appended_ms * 1_000);
        }
        let failed = |e| PortError::permanent(format!("build rows of {EVENTOS}")).because(e);
        let left_out = (records.len() - kept.len()) as u64;
        let cents = kept.iter().map(|&row| i128::from(batch.monto_cents.value(row as usize)));
        let monto = Decimal128Array::from_iter_values(cents).with_precision_and_scale(12, 2).map_err(failed)?;
        let partitions = Int64Array::from(vec![i64::from(at.partition); kept.len()]);
        let kept = UInt64Array::from(kept);
        let text = |column: &StringArray| take(column, &kept, None).map_err(failed);
        let instants = |values: Vec<i64>| Arc::new(TimestampMicrosecondArray::from(values).with_timezone("UTC"));
        let columns: Vec<ArrayRef> = vec![
            text(&batch.user_id)?,
            text(&batch.event_type)?,
            text(&batch.page)?,
            text(&batch.product_id)?,
            Arc::new(monto),
            text(&batch.region)?,
            instants(micros),
            Arc::new(Date32Array::from(days)),
            Arc::new(partitions),
            Arc::new(Int64Array::from(offsets)),
            instants(appended),
        ];
        Ok((RecordBatch::try_new(self.schema.clone(), columns).map_err(failed)?, left_out))
    }
}

#[async_trait]
impl SinkTable for EventosTable {
    async fn position(&mut self, at: &TopicPartition) -> Result<Option<i64>> {
        position(self.lakehouse.as_ref(), at).await
    }

    async fn write(&mut self, at: &TopicPartition, after: Option<i64>, next: i64, records: &[LogRecord]) -> Result<Written> {
        let decoded = self.decoder.decode(records).await?;
        let (batch, left_out) = self.rows(at, records, &decoded)?;
        let rows = batch.num_rows() as u64;
        if self.writes.is_multiple_of(MAINTAIN_EVERY) {
            // Before the write and never after it: a log that could not be looked after is as readable as before.
            let _ = self.lakehouse.maintain(EVENTOS).await;
        }
        self.writes = self.writes.wrapping_add(1);
        let append = AppendRows {
            table: EVENTOS.to_owned(),
            mark: Mark { writer: writer(at), epoch: next },
            after,
            partition_by: vec!["fecha".to_owned()],
            batches: vec![batch],
        };
        let commit = self.lakehouse.append_rows(append).await?;
        Ok(Written { commit, rows, left_out })
    }
}
