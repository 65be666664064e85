//! Dimensions: small tables that describe customers and products, fetched whole.
//!
//! A dimension has a name (`productos`) and versions. A version is named by its etag, and a snapshot is all rows of exactly
//! one version: an adapter that reads in pages refuses pages of different versions, it never mixes them. What this port
//! leaves out: keeping versions, judging their rows and deciding how old one may be, which is [`crate::dimensions`]'
//! business; and repeating a call that failed, since each error says whether that is of use.
//!
//! Codes that a caller may rely on, in [`super::PortError::code`]:
//!
//! | code | meaning |
//! |---|---|
//! | `401`, `403` | credentials are missing, wrong, or have no right to it |
//! | `404` | no such dimension |
//! | `429`, `503` | asked too often, or not available; `retry_after` has what the service asks for |
//! | `TIMEOUT`, `CONNECTION` | no whole answer came |
//! | `SNAPSHOT_CHANGED` | each time it was read, its version changed between two pages |
//! | `INCOMPLETE_SNAPSHOT` | the pages together have not the rows that the service counts |
//! | `MALFORMED` | the answer is none, or a row is not as the columns ask; the text names place, found and expected |
//! | `TOO_LARGE` | more pages or bytes than the adapter's limits allow |

use std::fmt;

use arrow::record_batch::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, Utc};

use super::{Column, PortError, Result};

/// All rows of one version of a dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Names the version; `None` when the service gives its versions no names.
    pub etag: Option<String>,
    /// When the service says that its rows are from.
    pub as_of: Option<DateTime<Utc>>,
    /// The rows, in the service's order, with exactly the asked columns in the asked order; at least one batch.
    pub batches: Vec<RecordBatch>,
}

/// What a fetch brings.
#[derive(Debug, Clone, PartialEq)]
pub enum Fetched {
    /// The version is still the one whose etag the caller knows.
    NotModified,
    /// Another version.
    Snapshot(Snapshot),
}

/// A service of dimensions.
#[async_trait]
pub trait DimensionApi: fmt::Debug + Send + Sync {
    /// Names of the dimensions it has been set up for, sorted. A dimension that is not among them is absent by choice, and
    /// the sales are not enriched with it; one that is among them and does not come is an error.
    fn offered(&self) -> Vec<String>;
    /// Fetches the present version, unless its etag is `known_etag`. Changes nothing and may be repeated. Cancel-safe.
    ///
    /// # Errors
    /// See the codes above. `Permanent` for credentials, for a dimension that there is not, and for rows that are not as
    /// `columns` ask: a column that is missing or extra, or a value of another type.
    async fn fetch(&self, dimension: &str, columns: &[Column], known_etag: Option<&str>) -> Result<Fetched>;
}

/// No dimensions at all, by choice: sales are published with null where a dimension would tell.
#[derive(Debug, Clone, Copy)]
pub struct NoDimensions;

#[async_trait]
impl DimensionApi for NoDimensions {
    fn offered(&self) -> Vec<String> {
        Vec::new()
    }
    async fn fetch(&self, dimension: &str, _columns: &[Column], _known_etag: Option<&str>) -> Result<Fetched> {
        Err(not_offered(dimension, &[]))
    }
}

/// The error of an adapter that is asked for a dimension which it does not have.
pub fn not_offered(dimension: &str, offered: &[String]) -> PortError {
    let offered = if offered.is_empty() { "none, as no dimensions are set up".to_owned() } else { offered.join(", ") };
    PortError::permanent(format!("read dimension {dimension}: found no such dimension, expected one of {offered}")).code("404")
}
