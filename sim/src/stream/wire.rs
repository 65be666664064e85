//! The two topics' records as bytes, written and read by hand: nothing here is the job's own codec.
//!
//! A record is a zero byte, the schema's id (big endian) and Avro's binary form of the fields in the order of the shipped
//! declarations. It leaves out every other schema.

use serde::{Deserialize, Serialize};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Event {
    /// Customer.
    pub user_id: String,
    /// Type.
    pub event_type: String,
    /// Page.
    pub page: String,
    /// Product.
    pub product_id: Option<String>,
    /// Amount in cents.
    pub cents: i64,
    /// Region.
    pub region: String,
    /// Event time in milliseconds since 1970.
    pub timestamp_ms: i64,
}

fn put_long(out: &mut Vec<u8>, value: i64) {
    let mut rest = ((value << 1) ^ (value >> 63)).cast_unsigned();
    while rest >= 0x80 {
        out.push((rest & 0x7F) as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_long(out, bytes.len() as i64);
    out.extend_from_slice(bytes);
}

/// An event as a record of schema `id`.
pub fn encode(id: u32, event: &Event) -> Vec<u8> {
    let mut out = vec![0];
    out.extend_from_slice(&id.to_be_bytes());
    put_bytes(&mut out, event.user_id.as_bytes());
    put_bytes(&mut out, event.event_type.as_bytes());
    put_bytes(&mut out, event.page.as_bytes());
    match &event.product_id {
        None => put_long(&mut out, 0),
        Some(product) => {
            put_long(&mut out, 1);
            put_bytes(&mut out, product.as_bytes());
        }
    }
    put_bytes(&mut out, &event.cents.to_be_bytes());
    put_bytes(&mut out, event.region.as_bytes());
    put_long(&mut out, event.timestamp_ms);
    out
}

/// Which row of a window: kind, first millisecond, region and page.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct WindowKey {
    /// `region_1m`, `page_1m` or `region_5m`.
    pub kind: String,
    /// First millisecond, since 1970.
    pub start_ms: i64,
    /// First millisecond after it.
    pub end_ms: i64,
    /// Region.
    pub region: String,
    /// Page, of `page_1m` only.
    pub page: Option<String>,
}

/// What a window counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Events of type click.
    pub clicks: i64,
    /// Events of type purchase.
    pub purchases: i64,
    /// Events of type add_to_cart.
    pub add_to_cart: i64,
    /// Amounts in cents.
    pub cents: i64,
    /// Distinct customers.
    pub users: i64,
}

/// One record of the output topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metric {
    /// Which row.
    pub key: WindowKey,
    /// What it says.
    pub totals: Totals,
    /// Which revision.
    pub revision: i64,
    /// Whether `users` is a count.
    pub exact: bool,
}

struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(format!("found {} bytes, expected {n}", self.0.len()))?;
        self.0 = rest;
        Ok(head)
    }
    fn long(&mut self) -> Result<i64, String> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
            }
        }
        Err("found a number without end".into())
    }
    fn bytes(&mut self) -> Result<&'a [u8], String> {
        let n = self.long()?;
        self.take(usize::try_from(n).map_err(|_| format!("found length {n}"))?)
    }
    fn text(&mut self) -> Result<String, String> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|e| e.to_string())
    }
    fn is_some(&mut self) -> Result<bool, String> {
        match self.long()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("found branch {other}, expected 0 or 1")),
        }
    }
}

/// Reads a record of the output topic.
///
/// # Errors
/// What was found instead.
pub fn decode(record: &[u8]) -> Result<Metric, String> {
    let mut bytes = Bytes(record);
    if bytes.take(5)?[0] != 0 {
        return Err("found a record without its zero byte".into());
    }
    let kind = bytes.text()?;
    let (start_ms, end_ms) = (bytes.long()?, bytes.long()?);
    let region = bytes.text()?;
    let page = if bytes.is_some()? { Some(bytes.text()?) } else { None };
    let (clicks, purchases, add_to_cart) = (bytes.long()?, bytes.long()?, bytes.long()?);
    let amount = bytes.bytes()?;
    let negative = amount.first().is_some_and(|byte| byte & 0x80 != 0);
    let cents = amount.iter().fold(if negative { -1_i64 } else { 0 }, |sum, byte| (sum << 8) | i64::from(*byte));
    if bytes.is_some()? {
        // The ratio is for display; the counts are exact.
        bytes.take(8)?;
    }
    let (users, revision) = (bytes.long()?, bytes.long()?);
    let exact = bytes.take(1)?[0] == 1;
    if !bytes.0.is_empty() {
        return Err(format!("found {} bytes behind the last field", bytes.0.len()));
    }
    let key = WindowKey { kind, start_ms, end_ms, region, page };
    Ok(Metric { key, totals: Totals { clicks, purchases, add_to_cart, cents, users }, revision, exact })
}

#[cfg(test)]
mod tests {
    use simulacro_core::avro::{Click, MetricaRealtime, RowEncoder};

    use super::*;

    #[test]
    fn a_hand_written_event_is_what_the_codec_writes() {
        let event = Event {
            user_id: "u1".into(),
            event_type: "purchase".into(),
            page: "/pago".into(),
            product_id: Some("p7".into()),
            cents: -1_234_567,
            region: "norte".into(),
            timestamp_ms: 1_700_000_000_000,
        };
        let mut decoder = RowEncoder::<Click>::with_id(3).expect("an encoder");
        let click = Click {
            user_id: event.user_id.clone(),
            event_type: event.event_type.clone(),
            page: event.page.clone(),
            product_id: event.product_id.clone(),
            monto_cents: event.cents,
            region: event.region.clone(),
            timestamp_ms: event.timestamp_ms,
        };
        let codec = decoder.encode_rows(&[click]).expect("a record").remove(0);
        let ours = encode(3, &event);
        // The amount may be written with more bytes than it needs; the rest is the same.
        assert_eq!(ours[..5], codec[..5]);
        assert_eq!(ours[ours.len() - 12..], codec[codec.len() - 12..]);
    }

    #[test]
    fn a_metric_is_read_as_it_was_written() {
        for (page, cents) in [(None, 0), (Some("/p".to_owned()), 123_456), (None, -5)] {
            let row = MetricaRealtime {
                window_kind: "region_1m".into(),
                window_start_ms: 60_000,
                window_end_ms: 120_000,
                region: "sur".into(),
                page: page.clone(),
                clicks: 3,
                purchases: 2,
                add_to_cart: 1,
                revenue_cents: cents,
                conversion_rate: page.is_some().then_some(0.5),
                unique_users: 300,
                revision: 7,
                exact: true,
            };
            let record = RowEncoder::<MetricaRealtime>::with_id(1).expect("an encoder").encode_rows(&[row]).expect("a record");
            let metric = decode(&record[0]).expect("a metric");
            assert_eq!(metric.key.page, page);
            assert_eq!(metric.totals, Totals { clicks: 3, purchases: 2, add_to_cart: 1, cents, users: 300 });
            assert_eq!((metric.revision, metric.exact, metric.key.end_ms), (7, true, 120_000));
        }
    }
}
