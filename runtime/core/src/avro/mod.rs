//! Avro on the topics: schemas, their evolution, and records to and from Arrow.
//!
//! The declarations are the files in `contracts/avro`; this module reads them and restates nothing but the Rust types of
//! their rows, which a test compares with them. Decoding is our own, because a record that turns out to be malformed must be
//! taken back without the rest of its batch, which arrow-avro's decoder cannot do; arrow-avro encodes, and is the oracle of
//! the decoder's tests. What it leaves out: nested columns, object container files, and what a value means.

mod columns;
pub mod compatibility;
mod cursor;
pub mod decode;
pub mod encode;
pub mod memory;
mod resolve;
pub mod rows;
pub mod schema;
#[cfg(test)]
mod tests;

use crate::ports::{
    Compatibility, PortError, Result, SchemaRegistry,
    schema_registry::{INCOMPATIBLE, INVALID_SCHEMA, SUBJECT_NOT_FOUND},
};
use schema::{SchemaError, canonical_text};

pub(crate) use columns::append;
pub use decode::{DecodedBatch, Limits, Reject, RejectReason};
pub use rows::{Click, ClickColumns, MetricaRealtime, Row, RowDecoder, RowEncoder};

/// Declaration of `ecommerce.Click`, value of topic `ecommerce.clicks`.
pub const CLICKS: &str = include_str!("../../../../contracts/avro/clicks.avsc");
/// Declaration of `ecommerce.MetricaRealtime`, value of topic `ecommerce.metricas_realtime`.
pub const METRICAS_REALTIME: &str = include_str!("../../../../contracts/avro/metricas_realtime.avsc");
/// Subject of [`CLICKS`]: the topic's name and `-value`.
pub const CLICKS_SUBJECT: &str = "ecommerce.clicks-value";
/// Subject of [`METRICAS_REALTIME`].
pub const METRICAS_REALTIME_SUBJECT: &str = "ecommerce.metricas_realtime-value";

/// The error of a text that is no schema, as a registry reports it.
pub fn invalid_schema(subject: &str, error: SchemaError) -> PortError {
    PortError::permanent(format!("register a schema in {subject}")).code(INVALID_SCHEMA).because(error)
}

/// Registers `schema` in `subject` after comparing it with the versions that `level` names, whatever the registry itself
/// is set to, and returns its id. A schema that the subject has already is not compared again, so a writer of an older
/// version may restart. Idempotent.
///
/// # Errors
/// `Permanent` with code `409`, naming every field with its old and new type, or `42201`; else the registry's.
pub async fn register_checked(registry: &dyn SchemaRegistry, subject: &str, schema: &str, level: Compatibility) -> Result<u32> {
    let invalid = |e| invalid_schema(subject, e);
    let text = canonical_text(schema).map_err(invalid)?;
    let versions = match registry.versions(subject).await {
        Ok(versions) => versions,
        Err(error) if error.code.as_deref() == Some(SUBJECT_NOT_FOUND) => Vec::new(),
        Err(error) => return Err(error),
    };
    let mut older = Vec::with_capacity(versions.len());
    for version in versions {
        let registered = registry.version(subject, version).await?;
        // Its id is taken, not registered again: some registries compare texts to the byte.
        if canonical_text(&registered.schema).is_ok_and(|old| old == text) {
            return Ok(registered.id);
        }
        older.push((version, registered.schema));
    }
    let violations = compatibility::violations_of_texts(level, schema, &older).map_err(invalid)?;
    if !violations.is_empty() {
        return Err(incompatible(subject, level, &violations));
    }
    registry.register(subject, schema).await
}

/// The error of a schema that may not follow the versions of a subject.
pub fn incompatible(subject: &str, level: Compatibility, violations: &[compatibility::Violation]) -> PortError {
    let all: Vec<_> = violations.iter().map(ToString::to_string).collect();
    PortError::permanent(format!("register a schema in {subject}, {level}: {}", all.join("; "))).code(INCOMPATIBLE)
}
