//! Why a day differs between batch and stream: what became of each of its sales on the way.
//!
//! A sale is followed by its content: from the staged sales to the topic of clicks, and from there to the late and the
//! dead-letter topic, whose records say where they came from. Which copies of a purchase the job took for duplicates stands
//! in no topic, so they are recognised again, by the job's own rules and in its order. A sale whose purchase is not on its
//! day is looked for on the days beside it, and among the events that were too far ahead of the clock. Only what left the
//! stream's revenue, or came into it, for such a reason is evidence; everything else stays unexplained. Left out: amounts,
//! which [`super::reconcile`] compares.

use std::collections::BTreeMap;

use arrow::array::Array;
use chrono::{DateTime, Days, NaiveDate};

use super::{
    config::{StreamConfig, ms},
    dedup::{Dedup, Seen, fingerprint},
    event::{ClickBatch, ClickDecoder, Reason},
    reconcile::{Cause, Evidence},
    status::existing,
    watermark::Watermark,
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

/// Records of one purchase, by what became of them.
#[derive(Debug, Clone, Copy, Default)]
struct Copies {
    /// Counted in a window; more than one is a duplicate that nobody recognised.
    kept: u32,
    deduplicated: u32,
    late: u32,
    /// Too far ahead of the clock.
    future: u32,
    dead: u32,
}

impl Copies {
    /// Why none was counted.
    fn cause(self) -> Cause {
        match self {
            Self { late: 1.., .. } => Cause::Late,
            Self { future: 1.., .. } => Cause::Clock,
            Self { .. } => Cause::DeadLettered,
        }
    }
}

/// Purchases of one day, by content, time and page.
type Purchases = BTreeMap<(Sale, i64, String), Copies>;

/// What is known about a day.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// Causes in cents, per region.
    pub evidence: Vec<Evidence>,
    /// Copies of purchases that the job took for duplicates and did not count, and their cents, per region.
    pub deduplicated: BTreeMap<String, (u64, i64)>,
}

/// Evidence for a day, of which `sales` are those that batch published, and `beside` those of the day before and the day
/// after, as far as there are any.
///
/// A day that batch does not know yet has no sales to which its purchases could belong, so a missing sale of the day that
/// agrees with one of them counts as put there by a wrong clock.
///
/// # Errors
/// Those of the log and of the decoder; `Permanent` for a late or dead letter that does not say where it came from.
pub async fn collect(
    config: &StreamConfig,
    log: &dyn EventLog,
    decoder: &mut dyn ClickDecoder,
    fecha: NaiveDate,
    sales: &[Sale],
    beside: &BTreeMap<NaiveDate, Vec<Sale>>,
) -> Result<Findings> {
    let (days, future) = follow(config, log, decoder, fecha).await?;
    let nothing = Purchases::new();
    let of = |day: Option<NaiveDate>| day.and_then(|day| days.get(&day)).unwrap_or(&nothing);
    let neighbours = [fecha.pred_opt(), fecha.succ_opt()];
    let mut out = Findings::default();
    let mut cents: BTreeMap<(String, Cause), i64> = BTreeMap::new();
    let mut add = |sale: &Sale, cause: Cause, amount: i64| *cents.entry((sale.region.clone(), cause)).or_default() += amount;

    let today = of(Some(fecha));
    for ((sale, ..), copies) in today {
        if copies.kept > 1 {
            add(sale, Cause::Duplicated, -sale.cents * i64::from(copies.kept - 1));
        }
        if copies.deduplicated > 0 {
            let (events, money) = out.deduplicated.entry(sale.region.clone()).or_default();
            *events += u64::from(copies.deduplicated);
            *money += sale.cents * i64::from(copies.deduplicated);
        }
    }
    let matched = Matched::of(sales, today);
    for (sale, copies) in &matched.uncounted {
        add(sale, copies.cause(), sale.cents);
    }
    // Purchases of other days that belong to no sale of theirs, and sales of theirs without a purchase.
    let (mut strays, mut missing) = (future, BTreeMap::new());
    for day in neighbours {
        let sales = day.and_then(|day| beside.get(&day)).map_or(&[][..], Vec::as_slice);
        let other = Matched::of(sales, of(day));
        merge(&mut strays, other.strays);
        merge(&mut strays, other.ill_timed);
        merge(&mut missing, other.missing);
    }
    for (sale, count) in matched.missing {
        for _ in 0..count {
            let cause = if take(&mut strays, &sale) { Cause::Clock } else { Cause::Outage };
            add(&sale, cause, sale.cents);
        }
    }
    for (sale, count) in matched.strays {
        for _ in 0..count {
            // Any other purchase without a sale is nobody's to explain.
            if take(&mut missing, &sale) {
                add(&sale, Cause::Clock, -sale.cents);
            }
        }
    }
    let of = |((region, cause), cents)| Evidence { fecha, region, cause, cents };
    out.evidence = cents.into_iter().filter(|(_, cents)| *cents != 0).map(of).collect();
    Ok(out)
}

/// How often each sale is there.
type Bag = BTreeMap<Sale, u64>;

fn merge(into: &mut Bag, from: Bag) {
    for (sale, count) in from {
        *into.entry(sale).or_default() += count;
    }
}

/// Takes one out, when there is one.
fn take(from: &mut Bag, sale: &Sale) -> bool {
    match from.get_mut(sale) {
        Some(count) if *count > 0 => {
            *count -= 1;
            true
        }
        Some(_) | None => false,
    }
}

/// Sales and purchases of one day, each sale with at most one purchase of its content.
#[derive(Debug, Default)]
struct Matched {
    /// Sales whose purchase arrived and was not counted.
    uncounted: Vec<(Sale, Copies)>,
    /// Sales without a purchase.
    missing: Bag,
    /// Purchases that were counted and have no sale.
    strays: Bag,
    /// Purchases that were late or too far ahead and have no sale.
    ill_timed: Bag,
}

impl Matched {
    fn of(sales: &[Sale], purchases: &Purchases) -> Self {
        let mut out = Self::default();
        for sale in sales {
            *out.missing.entry(sale.clone()).or_default() += 1;
        }
        // Those that were counted find their sales first, so that one which was not explains nothing by chance.
        let (counted, others): (Vec<_>, Vec<_>) = purchases.iter().partition(|(_, copies)| copies.kept > 0);
        for ((sale, ..), _) in counted {
            if !take(&mut out.missing, sale) {
                *out.strays.entry(sale.clone()).or_default() += 1;
            }
        }
        for ((sale, ..), copies) in others {
            if take(&mut out.missing, sale) {
                out.uncounted.push((sale.clone(), *copies));
            } else if copies.late + copies.future > 0 {
                *out.ill_timed.entry(sale.clone()).or_default() += 1;
            }
        }
        out.missing.retain(|_, count| *count > 0);
        out
    }
}

/// Purchases of a day and of those beside it, and those of any other day that were too far ahead of the clock.
async fn follow(
    config: &StreamConfig,
    log: &dyn EventLog,
    decoder: &mut dyn ClickDecoder,
    fecha: NaiveDate,
) -> Result<(BTreeMap<NaiveDate, Purchases>, Bag)> {
    let late = origins(config, log, &config.topics.late).await?;
    let dead = origins(config, log, &config.topics.dead_letter).await?;
    let (first, last) = (fecha.checked_sub_days(Days::new(1)), fecha.checked_add_days(Days::new(1)));
    let is_near = |day: NaiveDate| first.is_none_or(|first| day >= first) && last.is_none_or(|last| day <= last);
    let future_text = Reason::Future.text();
    let (mut days, mut future): (BTreeMap<NaiveDate, Purchases>, Bag) = Default::default();
    for (&partition, &bounds) in &log.offsets(&config.topics.clicks).await? {
        let at = TopicPartition { topic: config.topics.clicks.clone(), partition };
        let mut reader = Reader { log, at, bounds, records_max: config.restore_records };
        let (mut dedup, mut watermark, mut scratch) = (Dedup::default(), Watermark::default(), Vec::new());
        while let Some(records) = reader.next().await? {
            let batch = decoder.decode(&records).await?.batch;
            for (row, &record) in batch.record.iter().enumerate() {
                let origin = (partition, records[record as usize].offset);
                let dead_reason = dead.get(&origin);
                let mut copies = Copies::default();
                if let Some(reason) = dead_reason {
                    let is_future = *reason == future_text;
                    (copies.future, copies.dead) = (u32::from(is_future), u32::from(!is_future));
                } else {
                    let time = batch.timestamp_ms.value(row);
                    let print = fingerprint(&batch, row, &mut scratch);
                    let seen = dedup.see(time, print, &watermark, ms(config.dedup_horizon), config.dedup_entries_max);
                    match (seen, late.contains_key(&origin)) {
                        (Seen::Duplicate, _) => copies.deduplicated = 1,
                        (Seen::New | Seen::Forgotten | Seen::BeyondHorizon, true) => copies.late = 1,
                        (Seen::New | Seen::Forgotten | Seen::BeyondHorizon, false) => {
                            copies.kept = 1;
                            watermark.observe(time, config.watermark_bound_ms());
                        }
                    }
                }
                let Some((day, key)) = purchase(&batch, row) else { continue };
                if !is_near(day) {
                    if copies.future > 0 {
                        *future.entry(key.0).or_default() += 1;
                    }
                } else {
                    let all = days.entry(day).or_default().entry(key).or_default();
                    all.kept += copies.kept;
                    all.deduplicated += copies.deduplicated;
                    all.late += copies.late;
                    all.future += copies.future;
                    all.dead += copies.dead;
                }
            }
            dedup.commit(&watermark, ms(config.dedup_horizon));
        }
    }
    Ok((days, future))
}

fn purchase_of(batch: &ClickBatch, row: usize) -> Sale {
    let text = |column: &arrow::array::StringArray| column.is_valid(row).then(|| column.value(row).to_owned());
    Sale {
        user_id: text(&batch.user_id).unwrap_or_default(),
        product_id: text(&batch.product_id).unwrap_or_default(),
        region: text(&batch.region).unwrap_or_default(),
        cents: batch.monto_cents.value(row),
    }
}

/// The day of a purchase, and what distinguishes it; `None` for any other event.
fn purchase(batch: &ClickBatch, row: usize) -> Option<(NaiveDate, (Sale, i64, String))> {
    let columns = [&batch.event_type, &batch.user_id, &batch.region, &batch.page];
    let valid = batch.monto_cents.is_valid(row) && batch.timestamp_ms.is_valid(row);
    if !valid || columns.iter().any(|column| column.is_null(row)) || batch.event_type.value(row) != "purchase" {
        return None;
    }
    let timestamp_ms = batch.timestamp_ms.value(row);
    let day = DateTime::from_timestamp_millis(timestamp_ms)?.date_naive();
    Some((day, (purchase_of(batch, row), timestamp_ms, batch.page.value(row).to_owned())))
}

/// Partition and offset in the topic of clicks of each record of a topic of put-aside records, and why it is there.
async fn origins(config: &StreamConfig, log: &dyn EventLog, topic: &str) -> Result<BTreeMap<(i32, i64), String>> {
    let mut out = BTreeMap::new();
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
                out.insert(origin.ok_or_else(missing)?, reason.unwrap_or_default().to_owned());
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
