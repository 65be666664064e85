//! Events as columns, the rules they are held against, and the fates they end in.
//!
//! A decoded batch keeps Arrow's arrays as the decoder made them; nothing is copied per row. Every record has exactly one
//! [`Fate`], and [`Counts`] says whether they balance. Left out: the wire format (see [`ClickDecoder`]), and late and
//! duplicated, which depend on state.

use std::{borrow::Cow, collections::BTreeSet, fmt};

use arrow::{
    array::{Array, AsArray, Int64Array, RecordBatch, StringArray},
    datatypes::{DataType, Decimal128Type, Int64Type, TimeUnit, TimestampMillisecondType},
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::ports::{PortError, Result, event_log::LogRecord};

/// Longest `user_id`, `product_id`, `region` and `event_type` in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest `page` in bytes.
pub const PAGE_BYTES_MAX: usize = 2_048;

/// What becomes of an event; every event has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It counts in its windows.
    Published,
    /// It was there before.
    Deduplicated,
    /// It broke a clause of the contract.
    Quarantined,
    /// It broke a rule of the business.
    Rejected,
    /// It came after the allowed lateness.
    Late,
    /// It is not decodable, or its time is not credible.
    DeadLettered,
}

impl Fate {
    /// All fates, in the order in which they are stored.
    pub const ALL: [Fate; 6] =
        [Fate::Published, Fate::Deduplicated, Fate::Quarantined, Fate::Rejected, Fate::Late, Fate::DeadLettered];

    /// Name, as in the specification.
    pub fn name(self) -> &'static str {
        match self {
            Fate::Published => "published",
            Fate::Deduplicated => "deduplicated",
            Fate::Quarantined => "quarantined",
            Fate::Rejected => "rejected",
            Fate::Late => "late",
            Fate::DeadLettered => "dead_lettered",
        }
    }

    fn index(self) -> usize {
        match self {
            Fate::Published => 0,
            Fate::Deduplicated => 1,
            Fate::Quarantined => 2,
            Fate::Rejected => 3,
            Fate::Late => 4,
            Fate::DeadLettered => 5,
        }
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Records and money per fate, since a partition was first read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records read.
    pub read: u64,
    /// Records per fate, in the order of [`Fate::ALL`].
    pub records: [u64; 6],
    /// Amounts of the decodable records per fate, in cents.
    pub cents: [i64; 6],
}

impl Counts {
    /// Counts one record.
    pub fn add(&mut self, fate: Fate, cents: i64) {
        self.read += 1;
        self.records[fate.index()] += 1;
        self.cents[fate.index()] = self.cents[fate.index()].saturating_add(cents);
    }
    /// Records of a fate.
    pub fn of(&self, fate: Fate) -> u64 {
        self.records[fate.index()]
    }
    /// Amounts of a fate in cents.
    pub fn cents_of(&self, fate: Fate) -> i64 {
        self.cents[fate.index()]
    }
    /// Whether every record that was read has one fate.
    pub fn balances(&self) -> bool {
        self.records.iter().sum::<u64>() == self.read
    }
    /// What was added since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut difference = Self { read: self.read - earlier.read, ..Self::default() };
        for i in 0..Fate::ALL.len() {
            difference.records[i] = self.records[i] - earlier.records[i];
            difference.cents[i] = self.cents[i].saturating_sub(earlier.cents[i]);
        }
        difference
    }
}

/// Why an event is not counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// The decoder's reason.
    Undecodable(String),
    /// Further ahead of its append time than allowed.
    Future,
    /// A clause of the contract, for example `region.accepted_values`.
    Clause(&'static str),
    /// A rule of the business, for example `monto.not_negative`.
    Rule(&'static str),
}

impl Reason {
    /// The fate that follows.
    pub fn fate(&self) -> Fate {
        match self {
            Reason::Undecodable(_) | Reason::Future => Fate::DeadLettered,
            Reason::Clause(_) => Fate::Quarantined,
            Reason::Rule(_) => Fate::Rejected,
        }
    }
    /// The reason as it stands in the header of a dead letter.
    pub fn text(&self) -> Cow<'_, str> {
        match self {
            Reason::Undecodable(reason) => Cow::Owned(format!("undecodable: {reason}")),
            Reason::Future => Cow::Borrowed("timestamp.future"),
            Reason::Clause(clause) | Reason::Rule(clause) => Cow::Borrowed(clause),
        }
    }
}

/// What an event counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventType {
    /// A page was seen.
    Click,
    /// Something was bought; `monto` is its net amount.
    Purchase,
    /// Something was put into the cart.
    AddToCart,
    /// A type the contract accepts and no metric counts; its user counts as seen.
    Other,
}

/// Decoded events, one row per record that could be decoded, in order of record.
#[derive(Debug, Clone)]
pub struct ClickBatch {
    /// Which record of the batch a row came from; rises strictly.
    pub record: Vec<u32>,
    /// User.
    pub user_id: StringArray,
    /// Event type as it came.
    pub event_type: StringArray,
    /// Page.
    pub page: StringArray,
    /// Product, null where the page shows none.
    pub product_id: StringArray,
    /// Amount in cents.
    pub monto_cents: Int64Array,
    /// Region.
    pub region: StringArray,
    /// Event time in milliseconds since 1970.
    pub timestamp_ms: Int64Array,
}

impl ClickBatch {
    /// Takes the columns of a decoded Avro batch; `record` says which record each row came from.
    /// `monto` is a decimal of scale 2 or cents as int64, `timestamp` a millisecond timestamp or an int64.
    ///
    /// # Errors
    /// `Permanent` when a column is missing or has another type, or an amount does not fit into 64 bits of cents.
    pub fn from_columns(batch: &RecordBatch, record: Vec<u32>) -> Result<Self> {
        let column = |name: &str| {
            batch.column_by_name(name).ok_or_else(|| PortError::permanent(format!("decoded clicks have no column {name}")))
        };
        let text = |name: &str| {
            let array = column(name)?;
            array
                .as_string_opt::<i32>()
                .cloned()
                .ok_or_else(|| PortError::permanent(format!("decoded column {name} is {}, not text", array.data_type())))
        };
        let monto = column("monto")?;
        let monto_cents = match monto.data_type() {
            DataType::Int64 => monto.as_primitive::<Int64Type>().clone(),
            DataType::Decimal128(_, 2) => monto
                .as_primitive::<Decimal128Type>()
                .try_unary(i64::try_from)
                .map_err(|e| PortError::permanent("decoded monto in cents").because(e))?,
            other => return Err(PortError::permanent(format!("decoded column monto is {other}, not a decimal of scale 2"))),
        };
        let timestamp = column("timestamp")?;
        let timestamp_ms = match timestamp.data_type() {
            DataType::Int64 => timestamp.as_primitive::<Int64Type>().clone(),
            DataType::Timestamp(TimeUnit::Millisecond, _) => {
                timestamp.as_primitive::<TimestampMillisecondType>().reinterpret_cast::<Int64Type>()
            }
            other => return Err(PortError::permanent(format!("decoded column timestamp is {other}, not milliseconds"))),
        };
        Ok(Self {
            record,
            user_id: text("user_id")?,
            event_type: text("event_type")?,
            page: text("page")?,
            product_id: text("product_id")?,
            monto_cents,
            region: text("region")?,
            timestamp_ms,
        })
    }
}

/// A record that could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undecodable {
    /// Which record of the batch.
    pub record: u32,
    /// Why, without the payload.
    pub reason: String,
}

/// What a decoder makes of a batch of records: each record is a row or undecodable, never both, never neither.
#[derive(Debug, Clone)]
pub struct Decoded {
    /// Rows.
    pub batch: ClickBatch,
    /// The rest, in order of record.
    pub undecodable: Vec<Undecodable>,
}

/// Decodes the values of records.
#[async_trait]
pub trait ClickDecoder: fmt::Debug + Send {
    /// Decodes a batch. A record without a value is undecodable.
    ///
    /// # Errors
    /// Of the schema registry only: then nothing was decoded, and the batch may be tried again. Bad bytes are not an
    /// error, they are [`Undecodable`].
    async fn decode(&mut self, records: &[LogRecord]) -> Result<Decoded>;
}

/// What is accepted.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Accepted values of `event_type`.
    pub event_types: &'a BTreeSet<String>,
    /// Accepted values of `region`; `None` accepts any.
    pub regions: Option<&'a BTreeSet<String>>,
    /// How far ahead of its append time an event may be, in milliseconds.
    pub future_ms: i64,
}

/// A valid event, borrowed from its batch.
#[derive(Debug, Clone, Copy)]
pub struct Valid<'a> {
    /// User.
    pub user_id: &'a str,
    /// What it counts as.
    pub event_type: EventType,
    /// Page.
    pub page: &'a str,
    /// Region.
    pub region: &'a str,
    /// Amount in cents, 0 or more.
    pub cents: i64,
    /// Event time in milliseconds since 1970.
    pub timestamp_ms: i64,
}

/// Holds one row against the rules. The append time stands for the clock: it is the same at every replay, and a worker
/// whose own clock is wrong judges as the others do.
///
/// # Errors
/// The first rule that is broken.
pub fn validate<'a>(batch: &'a ClickBatch, row: usize, appended_ms: i64, rules: &Rules<'_>) -> Result<Valid<'a>, Reason> {
    let user_id = required(&batch.user_id, row, NAME_BYTES_MAX, "user_id.required", "user_id.length")?;
    let event_type = required(&batch.event_type, row, NAME_BYTES_MAX, "event_type.required", "event_type.length")?;
    let page = required(&batch.page, row, PAGE_BYTES_MAX, "page.required", "page.length")?;
    let region = required(&batch.region, row, NAME_BYTES_MAX, "region.required", "region.length")?;
    if !batch.product_id.is_null(row) && batch.product_id.value(row).len() > NAME_BYTES_MAX {
        return Err(Reason::Clause("product_id.length"));
    }
    if batch.monto_cents.is_null(row) {
        return Err(Reason::Clause("monto.required"));
    }
    if batch.timestamp_ms.is_null(row) {
        return Err(Reason::Clause("timestamp.required"));
    }
    let cents = batch.monto_cents.value(row);
    let timestamp_ms = batch.timestamp_ms.value(row);
    if timestamp_ms < 0 {
        return Err(Reason::Clause("timestamp.not_negative"));
    }
    if timestamp_ms > appended_ms.saturating_add(rules.future_ms) {
        return Err(Reason::Future);
    }
    let event_type = match event_type {
        "click" => EventType::Click,
        "purchase" => EventType::Purchase,
        "add_to_cart" => EventType::AddToCart,
        other if rules.event_types.contains(other) => EventType::Other,
        _ => return Err(Reason::Clause("event_type.accepted_values")),
    };
    if rules.regions.is_some_and(|regions| !regions.contains(region)) {
        return Err(Reason::Clause("region.accepted_values"));
    }
    // A sale may be free, when its discount is its price; it is never negative.
    match event_type {
        EventType::Purchase if cents < 0 => return Err(Reason::Rule("monto.not_negative")),
        EventType::Purchase => {}
        EventType::Click | EventType::AddToCart | EventType::Other if cents != 0 => {
            return Err(Reason::Clause("monto.zero_unless_purchase"));
        }
        EventType::Click | EventType::AddToCart | EventType::Other => {}
    }
    Ok(Valid { user_id, event_type, page, region, cents, timestamp_ms })
}

fn required<'a>(
    column: &'a StringArray,
    row: usize,
    bytes_max: usize,
    missing: &'static str,
    too_long: &'static str,
) -> Result<&'a str, Reason> {
    if column.is_null(row) {
        return Err(Reason::Clause(missing));
    }
    let value = column.value(row);
    if value.is_empty() {
        return Err(Reason::Clause(missing));
    }
    if value.len() > bytes_max {
        return Err(Reason::Clause(too_long));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(event_type: &str, monto: i64, region: Option<&str>, timestamp: i64) -> ClickBatch {
        ClickBatch {
            record: vec![0],
            user_id: StringArray::from(vec!["u1"]),
            event_type: StringArray::from(vec![event_type]),
            page: StringArray::from(vec!["/"]),
            product_id: StringArray::from(vec![None::<&str>]),
            monto_cents: Int64Array::from(vec![monto]),
            region: StringArray::from(vec![region]),
            timestamp_ms: Int64Array::from(vec![timestamp]),
        }
    }

    fn check(batch: ClickBatch, expected: Result<EventType, Reason>) {
        let event_types = ["click", "purchase", "add_to_cart", "wishlist"].map(String::from).into();
        let regions = ["norte".to_owned()].into();
        let rules = Rules { event_types: &event_types, regions: Some(&regions), future_ms: 300_000 };
        assert_eq!(validate(&batch, 0, 1_000_000, &rules).map(|v| v.event_type), expected);
    }

    #[test]
    fn each_rule_names_itself() {
        check(batch("click", 0, Some("norte"), 1_000_000), Ok(EventType::Click));
        check(batch("wishlist", 0, Some("norte"), 1_000_000), Ok(EventType::Other));
        check(batch("purchase", 1_999, Some("norte"), 1_300_000), Ok(EventType::Purchase));
        check(batch("purchase", 0, Some("norte"), 0), Ok(EventType::Purchase));
        check(batch("purchase", -1, Some("norte"), 0), Err(Reason::Rule("monto.not_negative")));
        check(batch("click", 1, Some("norte"), 0), Err(Reason::Clause("monto.zero_unless_purchase")));
        check(batch("scroll", 0, Some("norte"), 0), Err(Reason::Clause("event_type.accepted_values")));
        check(batch("click", 0, Some("marte"), 0), Err(Reason::Clause("region.accepted_values")));
        check(batch("click", 0, None, 0), Err(Reason::Clause("region.required")));
        check(batch("click", 0, Some(""), 0), Err(Reason::Clause("region.required")));
        check(batch("click", 0, Some("norte"), 1_300_001), Err(Reason::Future));
        check(batch("click", 0, Some("norte"), -1), Err(Reason::Clause("timestamp.not_negative")));
        check(batch("click", 0, Some("norte"), i64::MAX), Err(Reason::Future));
    }

    #[test]
    fn columns_of_an_avro_batch_become_clicks() {
        use std::sync::Arc;

        use arrow::array::{ArrayRef, Decimal128Array, TimestampMillisecondArray};

        let text = |value: Option<&str>| Arc::new(StringArray::from(vec![value])) as ArrayRef;
        let monto = Decimal128Array::from(vec![1_999]).with_precision_and_scale(12, 2).unwrap();
        let timestamp = TimestampMillisecondArray::from(vec![7]).with_timezone("UTC");
        let columns = [
            ("user_id", text(Some("u"))),
            ("event_type", text(Some("purchase"))),
            ("page", text(Some("/"))),
            ("product_id", text(None)),
            ("monto", Arc::new(monto) as ArrayRef),
            ("region", text(Some("sur"))),
            ("timestamp", Arc::new(timestamp) as ArrayRef),
        ];
        let nullable = columns.clone().map(|(name, array)| (name, array, true));
        let batch = RecordBatch::try_from_iter_with_nullable(nullable).unwrap();
        let clicks = ClickBatch::from_columns(&batch, vec![3]).unwrap();
        assert_eq!((clicks.monto_cents.value(0), clicks.timestamp_ms.value(0), clicks.record[0]), (1_999, 7, 3));
        assert!(clicks.product_id.is_null(0));
        let error = ClickBatch::from_columns(&batch.project(&[0, 1, 2, 3, 4, 5]).unwrap(), vec![3]).unwrap_err();
        assert_eq!(error.to_string(), "decoded clicks have no column timestamp");
    }

    #[test]
    fn a_reason_leads_to_one_fate() {
        assert_eq!(Reason::Undecodable("x".into()).fate(), Fate::DeadLettered);
        assert_eq!(Reason::Future.fate(), Fate::DeadLettered);
        assert_eq!(Reason::Clause("x").fate(), Fate::Quarantined);
        assert_eq!(Reason::Rule("x").fate(), Fate::Rejected);
    }
}
