//! Why a day differs between batch and stream: what became of each of its sales on the way.
//!
//! A sale is followed by its content: from the staged sales to the topic of clicks, and from there to the late and the
//! dead-letter topic, whose records say where they came from. Only what left the stream's revenue for a reason that stands
//! in a topic is evidence; everything else stays unexplained. Left out: amounts, which [`super::reconcile`] compares.

use std::collections::{BTreeMap, BTreeSet};

use arrow::array::Array;
use chrono::{DateTime, NaiveDate};

use super::{
    config::StreamConfig,
    event::{ClickBatch, ClickDecoder},
    reconcile::{Cause, Evidence},
    status::existing,
};
use crate::ports::{
    PortError, Result,
    event_log::{EventLog, LogRecord, TopicPartition},
};

/// What a sale and its purchase have in common.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sale {
    /// Customer.
    pub user_id: String,
    /// Product.
    pub product_id: String,
    /// Region.
    pub region: String,
    /// Net amount in cents.
    pub cents: i64,
}

/// Records of one purchase.
#[derive(Debug, Default)]
struct Copies {
    kept: u32,
    late: u32,
}

type Purchases = BTreeMap<(Sale, i64, String), Copies>;

/// Evidence for a day, of which `sales` are those that batch published.
///
/// # Errors
/// Those of the log and of the decoder; `Permanent` for a late or dead letter that does not say where it came from.
pub async fn collect(
    config: &StreamConfig,
    log: &dyn EventLog,
    decoder: &mut dyn ClickDecoder,
    fecha: NaiveDate,
    sales: &[Sale],
) -> Result<Vec<Evidence>> {
    let late = origins(config, log, &config.topics.late).await?;
    let dead = origins(config, log, &config.topics.dead_letter).await?;
    let mut purchases = Purchases::new();
    for (&partition, &bounds) in &log.offsets(&config.topics.clicks).await? {
        let at = TopicPartition { topic: config.topics.clicks.clone(), partition };
        let mut reader = Reader { log, at, bounds, records_max: config.restore_records };
        while let Some(records) = reader.next().await? {
            let batch = decoder.decode(&records).await?.batch;
            for (row, &record) in batch.record.iter().enumerate() {
                let Some(key) = purchase(&batch, row, fecha) else { continue };
                let origin = (partition, records[record as usize].offset);
                let copies = purchases.entry(key).or_default();
                copies.late += u32::from(late.contains(&origin));
                copies.kept += u32::from(!late.contains(&origin) && !dead.contains(&origin));
            }
        }
    }
    let mut cents: BTreeMap<(String, Cause), i64> = BTreeMap::new();
    let mut arrived: BTreeMap<&Sale, u64> = BTreeMap::new();
    for ((sale, _, _), copies) in &purchases {
        *arrived.entry(sale).or_default() += 1;
        // One copy that was kept is enough: the others are its duplicates.
        if copies.kept == 0 {
            let cause = if copies.late > 0 { Cause::Late } else { Cause::DeadLettered };
            *cents.entry((sale.region.clone(), cause)).or_default() += sale.cents;
        }
    }
    for sale in sales {
        match arrived.get_mut(sale) {
            Some(left) if *left > 0 => *left -= 1,
            Some(_) | None => *cents.entry((sale.region.clone(), Cause::Outage)).or_default() += sale.cents,
        }
    }
    let of = |((region, cause), cents)| Evidence { fecha, region, cause, cents };
    Ok(cents.into_iter().filter(|(_, cents)| *cents != 0).map(of).collect())
}

fn purchase(batch: &ClickBatch, row: usize, fecha: NaiveDate) -> Option<(Sale, i64, String)> {
    let text = |column: &arrow::array::StringArray| column.is_valid(row).then(|| column.value(row).to_owned());
    let valid = batch.monto_cents.is_valid(row) && batch.timestamp_ms.is_valid(row);
    if !valid || text(&batch.event_type)? != "purchase" {
        return None;
    }
    let timestamp_ms = batch.timestamp_ms.value(row);
    if DateTime::from_timestamp_millis(timestamp_ms)?.date_naive() != fecha {
        return None;
    }
    let sale = Sale {
        user_id: text(&batch.user_id)?,
        product_id: text(&batch.product_id).unwrap_or_default(),
        region: text(&batch.region)?,
        cents: batch.monto_cents.value(row),
    };
    Some((sale, timestamp_ms, text(&batch.page)?))
}

/// Partition and offset in the topic of clicks of each record of a topic of put-aside records.
async fn origins(config: &StreamConfig, log: &dyn EventLog, topic: &str) -> Result<BTreeSet<(i32, i64)>> {
    let mut out = BTreeSet::new();
    for (partition, bounds) in existing(log.offsets(topic).await)? {
        let at = TopicPartition { topic: topic.to_owned(), partition };
        let mut reader = Reader { log, at, bounds, records_max: config.restore_records };
        while let Some(records) = reader.next().await? {
            for record in &records {
                let reason = header(record, "simulacro.reason");
                // Partials that came too late are many events in one; they have no offset of their own.
                if reason == Some("partial.expired") {
                    continue;
                }
                let number = |name| header(record, name).and_then(|text| text.parse::<i64>().ok());
                let origin = number("simulacro.partition").and_then(|p| i32::try_from(p).ok()).zip(number("simulacro.offset"));
                let missing = || PortError::permanent(format!("read {topic}-{partition} at {}: no origin", record.offset));
                out.insert(origin.ok_or_else(missing)?);
            }
        }
    }
    Ok(out)
}

/// The last header of this name: those before it came with the event.
fn header<'a>(record: &'a LogRecord, name: &str) -> Option<&'a str> {
    let (_, value) = record.headers.iter().rev().find(|(header, _)| header == name)?;
    std::str::from_utf8(value).ok()
}

/// Reads a partition from its oldest record to the end it has now.
struct Reader<'a> {
    log: &'a dyn EventLog,
    at: TopicPartition,
    bounds: (i64, i64),
    records_max: usize,
}

impl Reader<'_> {
    async fn next(&mut self) -> Result<Option<Vec<LogRecord>>> {
        let (from, end) = self.bounds;
        if from >= end {
            return Ok(None);
        }
        let (records, next) = self.log.read(&self.at, from, self.records_max).await?;
        if next <= from {
            return Err(PortError::retryable(format!("read {}-{}: nothing at {from}", self.at.topic, self.at.partition)));
        }
        self.bounds.0 = next;
        Ok(Some(records))
    }
}
