//! A day reconciled: both sides and the evidence, read from where they are, compared, and kept as a fact.
//!
//! Batch is what the mart shows, the stream what the output topic holds. Rows of a day's windows cannot have been appended
//! before the day, so only that part of the topic is read. What this leaves out: the comparison itself, which is
//! [`super::reconcile`]'s, and what is done about a difference.

use std::{collections::BTreeMap, time::Duration};

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};

use super::{
    config::{StreamConfig, ms},
    evidence::{self, Findings, Sale},
    reconcile::{self, Bounds, Cause, DayReconciliation, Line, Revenue, Side, Verdict},
    status::{JobStatus, existing},
    window::MetricRow,
};
use crate::{
    avro::{Limits, MetricaRealtime, Row, RowDecoder},
    batch::{MART, STAGING, strings},
    platform::Platform,
    ports::{Fact, Input, Lakehouse, PortError, Ports, Query, Result, RunLedger, event_log::TopicPartition},
    slo::samples::{RECONCILED, Reconciled},
};

/// Windows of a day are emitted at most so long before it, by brokers whose clocks differ, beside what is believed of
/// events that are ahead.
const CLOCKS: Duration = Duration::from_secs(3_600);

/// A day and how its two sides compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reconciliation {
    /// The day.
    pub fecha: NaiveDate,
    /// How it compares.
    pub day: DayReconciliation,
    /// What is known of its events.
    pub findings: Findings,
    /// Last complete day of the batch, as far as it was asked.
    pub batch_through: Option<NaiveDate>,
    /// Last complete day of the stream.
    pub stream_through: Option<NaiveDate>,
}

impl Reconciliation {
    /// Cents that no evidence explains, of all regions, without regard to their sign.
    pub fn unexplained(&self) -> u64 {
        let of = |line: &Line| line.causes.get(&Cause::Unexplained).map_or(0, |cents| cents.unsigned_abs());
        self.day.regions.values().map(of).sum()
    }

    /// Keeps what the objective is evaluated by; a day of which one side is not complete is not kept.
    ///
    /// # Errors
    /// Those of the ledger.
    pub async fn keep(&self, ledger: &dyn RunLedger, at: DateTime<Utc>) -> Result<()> {
        if self.day.total.verdict == Verdict::Pending {
            return Ok(());
        }
        let Line { batch, stream, .. } = self.day.total;
        let kept = Reconciled { batch, stream, unexplained: Some(self.unexplained()) };
        let value = serde_json::to_value(kept).map_err(|e| PortError::permanent("write a reconciled day").because(e))?;
        ledger.put_fact(&Fact { topic: RECONCILED.to_owned(), name: self.fecha.to_string(), value, at }, None).await
    }
}

impl Platform {
    /// Reconciles a day as it stands now; `None` when neither side knows it. Nothing is kept.
    ///
    /// # Errors
    /// Those of the lakehouse, the log and the registry.
    pub async fn reconcile_day(&self, config: &StreamConfig, fecha: NaiveDate) -> Result<Option<Reconciliation>> {
        let Ports { lakehouse, log, .. } = &self.ports;
        let (lakehouse, log) = (lakehouse.as_ref(), log.as_ref());
        let is_there = lakehouse.exists(MART).await?;
        let mut batch = Side { revenue: Revenue::new(), complete_through: None };
        let (mut sales, mut beside) = (Vec::new(), BTreeMap::new());
        if is_there {
            batch.revenue = revenue_of(lakehouse, fecha).await?;
            batch.complete_through = lakehouse.last_epoch(MART, fecha).await?.map(|_| fecha);
            sales = sales_of(lakehouse, fecha).await?;
            for day in [fecha.pred_opt(), fecha.succ_opt()].into_iter().flatten() {
                let known = sales_of(lakehouse, day).await?;
                if !known.is_empty() {
                    beside.insert(day, known);
                }
            }
        }
        let status = JobStatus::read(config, log).await?;
        let begins_ms = fecha.and_time(NaiveTime::MIN).and_utc().timestamp_millis();
        let since_ms = begins_ms.saturating_sub(ms(CLOCKS)).saturating_sub(ms(config.future_bound));
        let rows = emitted(&self.ports, config, Some(since_ms)).await?;
        let revenue: Revenue = reconcile::daily_revenue(&rows).into_iter().filter(|((day, _), _)| *day == fecha).collect();
        let complete_through = status.closed_ms().and_then(|closed| reconcile::complete_through(closed, config.lateness_ms()));
        let stream = Side { revenue, complete_through };
        let mut decoder = self.click_decoder(config)?;
        let findings = evidence::collect(config, log, &mut decoder, fecha, &sales, &beside).await?;
        let mut days = reconcile::reconcile(&batch, &stream, &findings.evidence, &Bounds::specification());
        let (batch_through, stream_through) = (batch.complete_through, stream.complete_through);
        let day = days.remove(&fecha);
        Ok(day.map(|day| Reconciliation { fecha, day, findings, batch_through, stream_through }))
    }
}

/// All revisions of all windows that were emitted at or after a time, in milliseconds since 1970, or at any; none when the
/// job has never run.
///
/// # Errors
/// Those of the log and the registry; `Permanent` for a row that cannot be read.
pub async fn emitted(ports: &Ports, config: &StreamConfig, since_ms: Option<i64>) -> Result<Vec<MetricRow>> {
    let (log, topic) = (ports.log.as_ref(), &config.topics.metrics);
    let limits = Limits { record_bytes_max: config.record_bytes_max };
    let mut decoder = RowDecoder::<MetricaRealtime>::new(ports.registry.clone(), limits)?;
    let begins = match since_ms {
        None => BTreeMap::new(),
        Some(since_ms) => existing(log.offsets_at(topic, since_ms).await)?,
    };
    let mut rows = Vec::new();
    for (partition, (oldest, end)) in existing(log.offsets(topic).await)? {
        let at = TopicPartition { topic: topic.clone(), partition };
        let mut offset = begins.get(&partition).copied().unwrap_or(oldest).max(oldest);
        while offset < end {
            let (records, next) = log.read(&at, offset, config.restore_records).await?;
            let values: Vec<_> = records.into_iter().map(|record| record.value).collect();
            let decoded = decoder.decode(&values).await?;
            if let Some(reject) = decoded.rejects.first() {
                return Err(PortError::permanent(format!("read {topic}-{partition} from {offset}: {}", reject.reason)));
            }
            for row in MetricaRealtime::from_batch(&decoded.batch)? {
                rows.push(MetricRow::try_from(row)?);
            }
            if next <= offset {
                let what = format!("read {topic}-{partition}: found nothing at {offset}, expected records up to {end}");
                return Err(PortError::retryable(what));
            }
            offset = next;
        }
    }
    Ok(rows)
}

/// Rows of a query over one day of a table, as text. The day is a date of ours, so the statement holds no value from outside.
async fn of_day(lakehouse: &dyn Lakehouse, fecha: NaiveDate, columns: &str, table: &str) -> Result<Vec<Vec<String>>> {
    let sql = format!("SELECT {columns} FROM tabla WHERE fecha = DATE '{fecha}'");
    let query = Query { sql, inputs: vec![("tabla".into(), Input::Delta(table.to_owned()))] };
    let mut out = Vec::new();
    for batch in lakehouse.query(&query).await? {
        let columns = (0..batch.num_columns()).map(|c| strings(&batch, c)).collect::<Result<Vec<_>>>()?;
        out.extend((0..batch.num_rows()).map(|row| columns.iter().map(|c| c[row].clone()).collect::<Vec<_>>()));
    }
    Ok(out)
}

fn cents(fecha: NaiveDate, text: &str) -> Result<i64> {
    text.parse().map_err(|e| PortError::permanent(format!("read amounts of {fecha}: found {text}, expected cents")).because(e))
}

async fn revenue_of(lakehouse: &dyn Lakehouse, fecha: NaiveDate) -> Result<Revenue> {
    let columns = "region, CAST(CAST(revenue_neto * 100 AS BIGINT) AS VARCHAR)";
    let mut out = Revenue::new();
    for row in of_day(lakehouse, fecha, columns, MART).await? {
        *out.entry((fecha, row[0].clone())).or_default() += cents(fecha, &row[1])?;
    }
    Ok(out)
}

/// Sales of a day that batch has staged, in order of their contents.
async fn sales_of(lakehouse: &dyn Lakehouse, fecha: NaiveDate) -> Result<Vec<Sale>> {
    let columns = "user_id, product_id, region, CAST(CAST(monto_neto * 100 AS BIGINT) AS VARCHAR)";
    let mut out = Vec::new();
    for row in of_day(lakehouse, fecha, columns, STAGING).await? {
        let (user_id, product_id, region) = (row[0].clone(), row[1].clone(), row[2].clone());
        out.push(Sale { user_id, product_id, region, cents: cents(fecha, &row[3])? });
    }
    out.sort();
    Ok(out)
}
