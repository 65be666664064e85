//! PostgreSQL's binary COPY.

use std::sync::Arc;

use arrow::{
    array::{
        ArrayRef, BooleanArray, Date32Array, Decimal128Array, Float64Array, Int16Array, Int32Array, Int64Array, RecordBatch,
        StringArray, TimestampMicrosecondArray,
    },
    compute::concat_batches,
};
use simulacro_lakehouse::copy::{
    CopyColumn, CopyDecoder, CopyError, CopyLimits, CopyType, numeric_scales, write_header, write_rows, write_trailer,
};

use super::named;

const KINDS: [(&str, CopyType); 9] = [
    ("text", CopyType::Text),
    ("bool", CopyType::Bool),
    ("int2", CopyType::Int2),
    ("int4", CopyType::Int4),
    ("int8", CopyType::Int8),
    ("float8", CopyType::Float8),
    ("numeric", CopyType::Numeric { precision: 10, scale: 2 }),
    ("date", CopyType::Date),
    ("timestamp", CopyType::Timestamp),
];
const LIMITS: CopyLimits = CopyLimits { batch_rows: 3, batch_bytes: 1 << 10, value_bytes: 1 << 10 };

/// Decodes a stream that arrives in pieces of `piece` bytes.
fn decode(stream: &[u8], piece: usize) -> Result<RecordBatch, CopyError> {
    let columns = KINDS.map(|(name, kind)| CopyColumn { name: name.to_owned(), kind }).to_vec();
    let mut decoder = CopyDecoder::new(columns, LIMITS)?;
    let schema = decoder.schema().clone();
    let mut batches = Vec::new();
    for mut bytes in stream.chunks(piece) {
        while let Some(batch) = decoder.decode(&mut bytes)? {
            batches.push(batch);
        }
        assert!(bytes.is_empty(), "bytes were left");
    }
    batches.extend(decoder.finish()?);
    assert!(batches.iter().all(|batch| batch.num_rows() <= LIMITS.batch_rows));
    Ok(concat_batches(&schema, &batches).unwrap_or_else(|e| panic!("{e}")))
}

fn encode(batch: &RecordBatch) -> Result<Vec<u8>, CopyError> {
    let mut stream = Vec::new();
    write_header(&mut stream);
    write_rows(batch, 0, batch.num_rows(), &mut stream)?;
    write_trailer(&mut stream);
    Ok(stream)
}

/// A stream of nine columns. How it is cut changes nothing, and an error says at which byte.
pub fn copy(data: &[u8]) {
    let whole = decode(data, usize::MAX >> 1);
    // An error shows as many of the bad bytes as have arrived; where they begin does not depend on that.
    let place = |error: &CopyError| error.to_string().split(": ").next().map(str::to_owned);
    for piece in [1, 7] {
        match (decode(data, piece), &whole) {
            (Ok(pieces), Ok(whole)) => assert_eq!(encode(&pieces), encode(whole), "in pieces of {piece}"),
            (Err(pieces), Err(whole)) => assert_eq!(place(&pieces), place(whole), "in pieces of {piece}"),
            (pieces, whole) => panic!("in pieces of {piece}: {pieces:?}, as a whole: {whole:?}"),
        }
    }
    match whole {
        // Infinite days and times cannot be written; what could be decoded can.
        Ok(batch) => {
            let stream = encode(&batch).unwrap_or_else(|e| panic!("{e}"));
            let again = decode(&stream, usize::MAX >> 1).unwrap_or_else(|e| panic!("{e}"));
            // Not a number is equal to nothing, so its bytes are compared.
            assert_eq!(encode(&again).ok(), Some(stream));
        }
        Err(error) => {
            named(&error);
            assert!(error.to_string().contains("byte "), "{error}");
        }
    }
}

/// The scales of a stream's numerics.
pub fn copy_scales(data: &[u8]) {
    let scales = numeric_scales(data, &KINDS.map(|(_, kind)| matches!(kind, CopyType::Numeric { .. })));
    assert_eq!(scales.len(), KINDS.len());
    assert!(scales.iter().zip(KINDS).all(|(scale, (name, _))| name == "numeric" || *scale == 0));
}

/// Seeds of both.
pub fn copy_seeds() -> Vec<Vec<u8>> {
    let columns: [ArrayRef; 9] = [
        Arc::new(StringArray::from(vec![Some("niño"), None, Some(""), Some("a")])),
        Arc::new(BooleanArray::from(vec![Some(true), Some(false), None, Some(true)])),
        Arc::new(Int16Array::from(vec![Some(-1), None, Some(i16::MAX), Some(0)])),
        Arc::new(Int32Array::from(vec![Some(7), None, Some(i32::MIN), Some(0)])),
        Arc::new(Int64Array::from(vec![None, Some(8), Some(i64::MIN), Some(0)])),
        Arc::new(Float64Array::from(vec![Some(0.5), None, Some(f64::NAN), Some(-0.0)])),
        Arc::new(
            Decimal128Array::from(vec![Some(1_999), None, Some(-9_999_999_999), Some(0)])
                .with_precision_and_scale(10, 2)
                .unwrap_or_else(|e| panic!("{e}")),
        ),
        Arc::new(Date32Array::from(vec![Some(9_862), None, Some(-1), Some(0)])),
        Arc::new(TimestampMicrosecondArray::from(vec![Some(1), None, Some(-1), Some(0)]).with_timezone("UTC")),
    ];
    let named = KINDS.iter().zip(columns).map(|((name, _), column)| (*name, column, true));
    let batch = RecordBatch::try_from_iter_with_nullable(named).unwrap_or_else(|e| panic!("{e}"));
    let of = |from, rows| encode(&batch.slice(from, rows)).unwrap_or_else(|e| panic!("{e}"));
    vec![of(0, 4), of(0, 1), of(1, 1), of(0, 0)]
}
