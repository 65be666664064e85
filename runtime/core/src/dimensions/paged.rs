//! A service of dimensions that answers in pages: the client, over any transport.
//!
//! The protocol is plain HTTP. A page is asked for with a cursor; each answer names the version it belongs to in `ETag`; the
//! first request carries `If-None-Match`, so that an unchanged dimension is not sent again, and the others `If-Match`, so
//! that a service refuses to go on with another version. A page of another version is never taken beside those before it:
//! the client begins again, a bounded number of times. A page is
//!
//! ```json
//! {"as_of": "2024-03-18T00:00:00Z", "total_rows": 2, "next": null,
//!  "rows": [{"product_id": "p-1", "categoria": "libros", "marca": null, "precio": "12.34", "inventario": 7}]}
//! ```
//!
//! with exactly the contract's columns in each row, decimals as text, and `next` the cursor of the page that follows. The
//! transport is reqwest in production and a direct link in the simulator. What it leaves out: waiting and repeating, which
//! are the caller's, and the clock: deadlines are the transport's.

use std::fmt;

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::decode::{Cell, Rows};
use crate::ports::{Column, DimensionApi, Disposition, Fetched, PortError, Result, Snapshot, not_offered};

/// Longest part of a refusal's body that an error keeps, in characters.
const BODY_CHARS_MAX: usize = 200;

/// A request for one page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageRequest {
    /// Dimension.
    pub dimension: String,
    /// Where the page begins; `None` is the first.
    pub cursor: Option<String>,
    /// Most rows that the page should have.
    pub rows: u32,
    /// An etag: answer 304 when the version still has it.
    pub if_none_match: Option<String>,
    /// An etag: answer 412 when the version no longer has it.
    pub if_match: Option<String>,
}

/// An answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageResponse {
    /// HTTP status.
    pub status: u16,
    /// `ETag`, as it stands there, quotes included.
    pub etag: Option<String>,
    /// `Retry-After`, as the time from the answer on.
    pub retry_after: Option<std::time::Duration>,
    /// Body.
    pub body: Bytes,
}

/// Carries requests to a service.
#[async_trait]
pub trait Transport: fmt::Debug + Send + Sync {
    /// Sends a request and returns the whole answer. Cancel-safe.
    ///
    /// # Errors
    /// When no whole answer came: `TIMEOUT`, `CONNECTION`, or `TOO_LARGE` for a body above the transport's limit. `what` is
    /// what was being done.
    async fn get(&self, request: &PageRequest, what: &str) -> Result<PageResponse>;
}

/// Bounds of one fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLimits {
    /// Rows that a page is asked for.
    pub page_rows: u32,
    /// Most pages of a snapshot.
    pub pages_max: u32,
    /// Most bytes of all bodies of a snapshot.
    pub snapshot_bytes_max: u64,
    /// How often a snapshot whose version changed while it was read is begun again.
    pub restarts_max: u32,
}

impl PageLimits {
    /// Room for the largest dimension that a contract allows, a million products.
    pub const STANDARD: Self = Self { page_rows: 10_000, pages_max: 1_000, snapshot_bytes_max: 1 << 30, restarts_max: 3 };
}

/// The client.
#[derive(Debug)]
pub struct PagedApi<T> {
    /// What carries its requests.
    pub transport: T,
    offered: Vec<String>,
    limits: PageLimits,
}

/// One try to read a snapshot.
enum Read {
    Whole(Fetched),
    /// Its version changed between two pages.
    Changed,
}

impl<T: Transport> PagedApi<T> {
    /// A client for these dimensions.
    pub fn new(transport: T, offered: impl IntoIterator<Item = String>, limits: PageLimits) -> Self {
        let mut offered: Vec<String> = offered.into_iter().collect();
        offered.sort();
        offered.dedup();
        Self { transport, offered, limits }
    }

    async fn read(&self, dimension: &str, columns: &[Column], known_etag: Option<&str>) -> Result<Read> {
        let mut request = PageRequest {
            dimension: dimension.to_owned(),
            cursor: None,
            rows: self.limits.page_rows,
            if_none_match: known_etag.map(str::to_owned),
            if_match: None,
        };
        let (mut batches, mut rows, mut bytes, mut as_of) = (Vec::new(), 0_u64, 0_u64, None);
        let mut total: Option<u64> = None;
        for number in 1..=self.limits.pages_max {
            let what = format!("read dimension {dimension}, page {number}");
            let response = self.transport.get(&request, &what).await?;
            let malformed = |found: String, expected: &str| {
                Err(PortError::permanent(format!("{what}: found {found}, expected {expected}")).code("MALFORMED"))
            };
            match response.status {
                200 => {}
                304 if number == 1 && known_etag.is_some() => return Ok(Read::Whole(Fetched::NotModified)),
                412 if request.if_match.is_some() => return Ok(Read::Changed),
                status => return Err(refused(&what, status, &response)),
            }
            let Some(etag) = response.etag else {
                return malformed("no ETag".into(), "one on each page, since pages are told apart by it");
            };
            match &request.if_match {
                Some(first) if *first != etag => return Ok(Read::Changed),
                // The service does not look at If-None-Match: the version is the known one all the same.
                None if known_etag == Some(etag.as_str()) => return Ok(Read::Whole(Fetched::NotModified)),
                Some(_) | None => {}
            }
            bytes += response.body.len() as u64;
            if bytes > self.limits.snapshot_bytes_max {
                let limit = self.limits.snapshot_bytes_max;
                return Err(PortError::permanent(format!("{what}: found more than {limit} bytes in all")).code("TOO_LARGE"));
            }
            let page = decode(&response.body, columns, &what)?;
            if *total.get_or_insert(page.total_rows) != page.total_rows {
                let total = total.unwrap_or_default();
                let text = format!("{what}: found total_rows {}, expected {total} as on page 1", page.total_rows);
                return Err(PortError::retryable(text).code("INCOMPLETE_SNAPSHOT"));
            }
            rows += page.batch.num_rows() as u64;
            as_of = as_of.or(page.as_of);
            batches.push(page.batch);
            let Some(next) = page.next else {
                let total = total.unwrap_or_default();
                if rows != total {
                    let text = format!("read dimension {dimension}: found {rows} rows on {number} pages, expected {total}");
                    return Err(PortError::retryable(text).code("INCOMPLETE_SNAPSHOT"));
                }
                return Ok(Read::Whole(Fetched::Snapshot(Snapshot { etag: Some(etag), as_of, batches })));
            };
            request = PageRequest { cursor: Some(next), if_none_match: None, if_match: Some(etag), ..request };
        }
        let limit = self.limits.pages_max;
        Err(PortError::permanent(format!("read dimension {dimension}: found more than {limit} pages")).code("TOO_LARGE"))
    }
}

#[async_trait]
impl<T: Transport> DimensionApi for PagedApi<T> {
    fn offered(&self) -> Vec<String> {
        self.offered.clone()
    }

    async fn fetch(&self, dimension: &str, columns: &[Column], known_etag: Option<&str>) -> Result<Fetched> {
        if !self.offered.iter().any(|o| o == dimension) {
            return Err(not_offered(dimension, &self.offered));
        }
        for _ in 0..=self.limits.restarts_max {
            match self.read(dimension, columns, known_etag).await? {
                Read::Whole(fetched) => return Ok(fetched),
                Read::Changed => {}
            }
        }
        let times = self.limits.restarts_max + 1;
        let what = format!("read dimension {dimension}: its version changed between two pages, {times} times in a row");
        Err(PortError::retryable(what).code("SNAPSHOT_CHANGED"))
    }
}

/// The error of an answer that is no page.
fn refused(what: &str, status: u16, response: &PageResponse) -> PortError {
    let disposition = match status {
        // Reading changes nothing, so that whatever may pass may be repeated.
        408 | 429 | 500..=599 => Disposition::Retryable,
        _ => Disposition::Permanent,
    };
    let error = match disposition {
        Disposition::Retryable => PortError::retryable(what).retry_after(response.retry_after),
        Disposition::Permanent | Disposition::Unknown => PortError::permanent(what),
    };
    let body: String = String::from_utf8_lossy(&response.body).chars().take(BODY_CHARS_MAX).collect();
    error.code(status.to_string()).because(format!("the service answers {status}: {body}"))
}

struct Page {
    as_of: Option<DateTime<Utc>>,
    total_rows: u64,
    next: Option<String>,
    batch: RecordBatch,
}

/// A page's body, its rows straight into columns.
fn decode(body: &[u8], columns: &[Column], what: &str) -> Result<Page> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let (mut rows, mut page) = (Rows::new(columns)?, Head::default());
    let read = PageSeed { rows: &mut rows, head: &mut page }.deserialize(&mut json).and_then(|()| json.end());
    read.map_err(|e| PortError::permanent(what).code("MALFORMED").because(e))?;
    let missing = |field: &str| PortError::permanent(format!("{what}: found no {field}, expected one")).code("MALFORMED");
    Ok(Page {
        as_of: page.as_of,
        total_rows: page.total_rows.ok_or_else(|| missing("total_rows"))?,
        next: page.next.ok_or_else(|| missing("next"))?,
        batch: if page.has_rows { rows.finish()? } else { return Err(missing("rows")) },
    })
}

#[derive(Default)]
struct Head {
    as_of: Option<DateTime<Utc>>,
    total_rows: Option<u64>,
    next: Option<Option<String>>,
    has_rows: bool,
}

struct PageSeed<'a> {
    rows: &'a mut Rows,
    head: &'a mut Head,
}

impl<'de> DeserializeSeed<'de> for PageSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for PageSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a page: an object with as_of, total_rows, next and rows")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "as_of" => self.head.as_of = map.next_value()?,
                "total_rows" => self.head.total_rows = Some(map.next_value()?),
                "next" => self.head.next = Some(map.next_value()?),
                "rows" if self.head.has_rows => return Err(A::Error::custom("found rows twice, expected them once")),
                "rows" => {
                    self.head.has_rows = true;
                    map.next_value_seed(RowsSeed(self.rows))?;
                }
                // A page may say more about itself; a row may not.
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

struct RowsSeed<'a>(&'a mut Rows);

impl<'de> DeserializeSeed<'de> for RowsSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for RowsSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of rows")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(RowSeed(self.0))?.is_some() {}
        Ok(())
    }
}

struct RowSeed<'a>(&'a mut Rows);

impl<'de> DeserializeSeed<'de> for RowSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for RowSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a row: an object with the contract's columns")
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let rows = self.0;
        let number = rows.rows() + 1;
        let mut seen = vec![false; rows.names().len()];
        while let Some(key) = map.next_key::<String>()? {
            let Some(at) = rows.position(&key) else {
                return Err(A::Error::custom(format!("row {number}: column {key} is not in the contract")));
            };
            if std::mem::replace(&mut seen[at], true) {
                return Err(A::Error::custom(format!("row {number}: found column {key} twice, expected it once")));
            }
            map.next_value_seed(CellSeed { rows, at, number })?;
        }
        if let Some(missing) = seen.iter().position(|s| !s) {
            return Err(A::Error::custom(format!("row {number}: column {} is missing", rows.names()[missing])));
        }
        rows.end_row();
        Ok(())
    }
}

struct CellSeed<'a> {
    rows: &'a mut Rows,
    at: usize,
    number: u64,
}

impl CellSeed<'_> {
    fn push<E: serde::de::Error>(self, cell: Cell<'_>) -> Result<(), E> {
        let number = self.number;
        self.rows.push(self.at, cell).map_err(|e| E::custom(format!("row {number}, {e}")))
    }
}

impl<'de> DeserializeSeed<'de> for CellSeed<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for CellSeed<'_> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("null, text, a number, true or false")
    }
    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.push(Cell::Null)
    }
    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.push(Cell::Bool(value))
    }
    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<(), E> {
        self.push(Cell::Int(value))
    }
    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<(), E> {
        match i64::try_from(value) {
            Ok(value) => self.push(Cell::Int(value)),
            Err(_) => self.push(Cell::Float(value as f64)),
        }
    }
    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<(), E> {
        self.push(Cell::Float(value))
    }
    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<(), E> {
        self.push(Cell::Text(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns() -> Vec<Column> {
        let column = |name: &str, physical_type: &str| Column { name: name.into(), physical_type: physical_type.into() };
        vec![column("product_id", "string"), column("precio", "decimal(10,2)")]
    }

    fn said(body: &str) -> String {
        match decode(body.as_bytes(), &columns(), "read dimension productos, page 3") {
            Ok(page) => format!("{} rows", page.batch.num_rows()),
            Err(error) => {
                assert_eq!((error.code.as_deref(), error.disposition), (Some("MALFORMED"), Disposition::Permanent));
                error.chain()
            }
        }
    }

    #[test]
    fn a_malformed_page_is_named_with_place_found_and_expected() {
        let page = |rows: &str| format!(r#"{{"total_rows": 1, "next": null, "rows": [{rows}]}}"#);
        assert_eq!(said(&page(r#"{"precio": "1.50", "product_id": "a"}, {"product_id": "b", "precio": null}"#)), "2 rows");
        let check = |body: &str, words: &[&str]| {
            let said = said(body);
            assert!(said.starts_with("read dimension productos, page 3"), "{said}");
            for word in words {
                assert!(said.contains(word), "{word:?} is missing in: {said}");
            }
        };
        check(&page(r#"{"product_id": "a", "precio": 1.5}"#), &["row 1, column precio", "number 1.5", "expected decimal(10,2)"]);
        check(&page(r#"{"product_id": "a", "price": "1"}"#), &["row 1: column price is not in the contract"]);
        check(&page(r#"{"product_id": "a"}"#), &["row 1: column precio is missing"]);
        check(&page(r#"{"product_id": "a", "product_id": "b", "precio": null}"#), &["column product_id twice"]);
        check(&page("[]"), &["invalid type: sequence", "expected a row"]);
        check(&page(r#"{"product_id": {}, "precio": null}"#), &["invalid type: map", "expected null, text"]);
        check("<html>502 Bad Gateway</html>", &["expected value at line 1 column 1"]);
        check(r#"{"total_rows": 1, "next": null}"#, &["found no rows, expected one"]);
        check(r#"{"total_rows": 1, "rows": []}"#, &["found no next, expected one"]);
        check(r#"{"next": null, "rows": []}"#, &["found no total_rows, expected one"]);
        check(r#"{"total_rows": 1, "next": null, "rows": ["#, &["EOF while parsing"]);
        check(r#"{"total_rows": 0, "next": null, "rows": []} {}"#, &["trailing characters"]);
    }
}
