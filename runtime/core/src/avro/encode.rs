//! Arrow batches encoded as records for a topic, one for each row.
//!
//! The bytes are arrow-avro's: header of the registry, then the fields in the order of the schema.

use std::{fmt, sync::Arc};

use arrow::{
    array::RecordBatch,
    datatypes::{Schema as ArrowSchema, SchemaRef},
};
use arrow_avro::{
    schema::{FingerprintStrategy, SCHEMA_METADATA_KEY},
    writer::{WriterBuilder, format::AvroSoeFormat},
};
use bytes::Bytes;

use super::{resolve::Reader, schema::SchemaError};
use crate::ports::{PortError, Result};

/// Encodes batches that have the columns of one schema.
pub struct Encoder {
    inner: arrow_avro::writer::Encoder,
    id: u32,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder of `schema`, a record schema that the registry knows as `id`.
    ///
    /// # Errors
    /// When it is no record of primitive, enum, fixed or nullable fields.
    pub fn new(schema: &str, id: u32) -> Result<Self, SchemaError> {
        let arrow = Reader::new(schema)?.arrow;
        let metadata = [(SCHEMA_METADATA_KEY.to_owned(), schema.to_owned())].into();
        let inner = WriterBuilder::new(ArrowSchema::new_with_metadata(arrow.fields().clone(), metadata))
            .with_fingerprint_strategy(FingerprintStrategy::Id(id))
            .build_encoder::<AvroSoeFormat>()
            .map_err(|e| SchemaError { place: "schema".into(), problem: e.to_string() })?;
        Ok(Self { inner, id })
    }

    /// The columns that a batch must have: those of a [`super::decode::Decoder`] of the same schema.
    pub fn schema(&self) -> SchemaRef {
        Arc::new(ArrowSchema::new(self.inner.schema().fields().clone()))
    }

    /// One record for each row, in order.
    ///
    /// # Errors
    /// `Permanent` when the batch has other columns, or a decimal has more digits than its type; nothing is encoded then.
    pub fn encode(&mut self, batch: &RecordBatch) -> Result<Vec<Bytes>> {
        let failed = || PortError::permanent(format!("encode {} rows with schema {}", batch.num_rows(), self.id));
        for column in batch.columns() {
            if let Some(decimals) = column.as_any().downcast_ref::<arrow::array::Decimal128Array>() {
                decimals.validate_decimal_precision(decimals.precision()).map_err(|e| failed().because(e))?;
            }
        }
        let result = self.inner.encode(batch);
        // Taken out in any case, so that a failed batch leaves nothing behind for the next.
        let rows = self.inner.flush();
        result.map_err(|e| failed().because(e))?;
        Ok(rows.iter().collect())
    }
}
