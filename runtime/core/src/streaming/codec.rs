//! The wire formats of the job: clicks from Avro, metrics to Avro, with the schemas of a registry.
//!
//! Schemas are asked for once per id and kept. What it leaves out: the declarations, which are [`crate::avro`]'s, and
//! what a decoded event means.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    event::{ClickBatch, ClickDecoder, Decoded, Undecodable},
    window::{MetricEncoder, MetricRow, WindowKind},
};
use crate::{
    avro::{Click, Limits, MetricaRealtime, RowDecoder, RowEncoder},
    ports::{Compatibility, PortError, Result, SchemaRegistry, event_log::LogRecord},
};

/// Decodes clicks of `ecommerce.clicks`, whichever compatible schema wrote them.
#[derive(Debug)]
pub struct AvroClicks {
    decoder: RowDecoder<Click>,
}

impl AvroClicks {
    /// A decoder with an empty cache of schemas. Records above `record_bytes_max` are undecodable.
    ///
    /// # Errors
    /// When the declaration of clicks has no columns; a test holds that the shipped one has.
    pub fn new(registry: Arc<dyn SchemaRegistry>, record_bytes_max: usize) -> Result<Self> {
        Ok(Self { decoder: RowDecoder::new(registry, Limits { record_bytes_max })? })
    }
}

#[async_trait]
impl ClickDecoder for AvroClicks {
    async fn decode(&mut self, records: &[LogRecord]) -> Result<Decoded> {
        let decoded = self.decoder.decode(records).await?;
        let undecodable = decoded
            .rejects
            .into_iter()
            .map(|r| Undecodable { record: r.index, reason: format!("{}: {}", r.reason.code(), r.reason) })
            .collect();
        Ok(Decoded { batch: ClickBatch::from_columns(&decoded.batch, decoded.rows)?, undecodable })
    }
}

/// Encodes rows for `ecommerce.metricas_realtime`.
#[derive(Debug)]
pub struct AvroMetrics {
    encoder: RowEncoder<MetricaRealtime>,
}

impl AvroMetrics {
    /// Registers the declaration, compared with all older versions. Idempotent.
    ///
    /// # Errors
    /// Those of [`crate::avro::register_checked`].
    pub async fn register(registry: &dyn SchemaRegistry) -> Result<Self> {
        Ok(Self { encoder: RowEncoder::register(registry, Compatibility::BackwardTransitive).await? })
    }
}

#[async_trait]
impl MetricEncoder for AvroMetrics {
    async fn encode(&mut self, rows: &[MetricRow]) -> Result<Vec<Bytes>> {
        let rows = rows.iter().map(MetricaRealtime::try_from).collect::<Result<Vec<_>>>()?;
        self.encoder.encode_rows(&rows)
    }
}

impl TryFrom<&MetricRow> for MetricaRealtime {
    type Error = PortError;

    /// The row as it is written.
    ///
    /// # Errors
    /// `Permanent` when a count passes 63 bits.
    fn try_from(row: &MetricRow) -> Result<Self> {
        let count = |name: &str, value: u64| {
            i64::try_from(value).map_err(|e| PortError::permanent(format!("encode {value} {name}")).because(e))
        };
        Ok(Self {
            window_kind: row.window_kind.name().to_owned(),
            window_start_ms: row.window_start_ms,
            window_end_ms: row.window_end_ms,
            region: row.region.clone(),
            page: row.page.clone(),
            clicks: count("clicks", row.clicks)?,
            purchases: count("purchases", row.purchases)?,
            add_to_cart: count("add_to_cart", row.add_to_cart)?,
            revenue_cents: row.revenue_cents,
            conversion_rate: row.conversion_rate(),
            unique_users: count("unique_users", row.unique_users)?,
            revision: i64::from(row.revision),
            exact: row.exact,
        })
    }
}

impl TryFrom<MetricaRealtime> for MetricRow {
    type Error = PortError;

    /// The row as it was before it was written.
    ///
    /// # Errors
    /// `Permanent` for an unknown kind of window or a count below zero: then this job did not write it.
    fn try_from(row: MetricaRealtime) -> Result<Self> {
        let window_kind = match row.window_kind.as_str() {
            "region_1m" => WindowKind::Region1m,
            "page_1m" => WindowKind::Page1m,
            "region_5m" => WindowKind::Region5m,
            other => return Err(PortError::permanent(format!("read a metric of kind {other:?}"))),
        };
        let count = |name: &str, value: i64| {
            u64::try_from(value).map_err(|e| PortError::permanent(format!("read {value} {name}")).because(e))
        };
        let revision = u32::try_from(row.revision)
            .map_err(|e| PortError::permanent(format!("read revision {}", row.revision)).because(e))?;
        Ok(Self {
            window_kind,
            window_start_ms: row.window_start_ms,
            window_end_ms: row.window_end_ms,
            region: row.region,
            page: row.page,
            clicks: count("clicks", row.clicks)?,
            purchases: count("purchases", row.purchases)?,
            add_to_cart: count("add_to_cart", row.add_to_cart)?,
            revenue_cents: row.revenue_cents,
            unique_users: count("unique_users", row.unique_users)?,
            revision,
            exact: row.exact,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::avro::{MetricaRealtime, memory::MemoryRegistry};

    fn click(n: usize) -> Click {
        Click {
            user_id: format!("u{n}"),
            event_type: "purchase".into(),
            page: "/pago".into(),
            product_id: n.is_multiple_of(2).then(|| format!("P{n:03}")),
            monto_cents: n as i64 * 100 + 1,
            region: "sur".into(),
            timestamp_ms: 852_076_800_000 + n as i64,
        }
    }

    fn record(offset: i64, value: Option<Bytes>) -> LogRecord {
        LogRecord { offset, appended_ms: 0, key: None, value, headers: Vec::new() }
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #[test]
        fn each_record_is_one_row_or_one_reason(kinds in prop::collection::vec(0u8..5, 0..40)) {
            block_on(async {
                let registry = Arc::new(MemoryRegistry::default());
                let mut encoder = RowEncoder::<Click>::register(registry.as_ref(), Compatibility::BackwardTransitive).await.unwrap();
                let records: Vec<_> = kinds.iter().enumerate().map(|(n, kind)| {
                    let good = encoder.encode_rows(&[click(n)]).unwrap().remove(0);
                    record(n as i64, match kind {
                        0 => None,
                        1 => Some(good.slice(..good.len() - 1)),
                        2 => Some(Bytes::from_static(b"{}")),
                        _ => Some(good),
                    })
                }).collect();
                let decoded = AvroClicks::new(registry, 1 << 20).unwrap().decode(&records).await.unwrap();
                let mut seen: Vec<u32> = decoded.batch.record.clone();
                seen.extend(decoded.undecodable.iter().map(|u| u.record));
                seen.sort_unstable();
                assert_eq!(seen, (0..kinds.len() as u32).collect::<Vec<_>>());
                for (row, &n) in decoded.batch.record.iter().enumerate() {
                    assert!(kinds[n as usize] > 2);
                    assert_eq!(decoded.batch.monto_cents.value(row), click(n as usize).monto_cents);
                    assert_eq!(decoded.batch.timestamp_ms.value(row), click(n as usize).timestamp_ms);
                    assert_eq!(decoded.batch.user_id.value(row), click(n as usize).user_id);
                }
                for bad in &decoded.undecodable {
                    let code = ["tombstone: ", "truncated: ", "no_header: "][usize::from(kinds[bad.record as usize])];
                    assert!(bad.reason.starts_with(code), "{}", bad.reason);
                }
            });
        }
    }

    #[test]
    fn a_schema_is_asked_for_once() {
        block_on(async {
            let registry = Arc::new(MemoryRegistry::default());
            let mut encoder = RowEncoder::<Click>::register(registry.as_ref(), Compatibility::BackwardTransitive).await.unwrap();
            let value = encoder.encode_rows(&[click(1)]).unwrap().remove(0);
            let mut decoder = AvroClicks::new(registry.clone(), 1 << 20).unwrap();
            decoder.decode(&[record(0, Some(value.clone()))]).await.unwrap();
            // A decoder of its own finds nothing in an empty registry; this one no longer asks.
            let stranger = Arc::new(MemoryRegistry::default());
            let other = AvroClicks::new(stranger, 1 << 20).unwrap().decode(&[record(0, Some(value.clone()))]).await.unwrap();
            assert!(other.undecodable[0].reason.starts_with("unknown_schema: "));
            assert_eq!(decoder.decode(&[record(1, Some(value))]).await.unwrap().batch.record, [0]);
        });
    }

    #[test]
    fn a_metric_comes_back_as_it_was() {
        block_on(async {
            let registry = Arc::new(MemoryRegistry::default());
            let row = |window_kind, page: Option<&str>, clicks| MetricRow {
                window_kind,
                window_start_ms: 852_076_800_000,
                window_end_ms: 852_076_860_000,
                region: "norte".into(),
                page: page.map(str::to_owned),
                clicks,
                purchases: 2,
                add_to_cart: 1,
                revenue_cents: 123_456,
                unique_users: 5,
                revision: 7,
                exact: false,
            };
            let rows =
                [row(WindowKind::Region1m, None, 9), row(WindowKind::Page1m, Some("/p"), 0), row(WindowKind::Region5m, None, 1)];
            let values = AvroMetrics::register(registry.as_ref()).await.unwrap().encode(&rows).await.unwrap();
            let values: Vec<_> = values.into_iter().map(Some).collect();
            let mut decoder = RowDecoder::<MetricaRealtime>::new(registry, Limits { record_bytes_max: 1 << 20 }).unwrap();
            let decoded = decoder.decode(&values).await.unwrap();
            let back: Result<Vec<_>> = {
                use crate::avro::Row;
                MetricaRealtime::from_batch(&decoded.batch).unwrap().into_iter().map(MetricRow::try_from).collect()
            };
            assert_eq!(back.unwrap(), rows);
        });
    }
}
