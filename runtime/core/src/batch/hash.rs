//! Hashes by which two runs are compared: of the rows of a raw day in any order, and of a Delta table by its key.

use std::ops::Range;

use arrow::{
    array::{Array, ArrayRef, AsArray, Decimal128Array, RecordBatch},
    buffer::{BooleanBuffer, Buffer, NullBuffer},
    compute::cast,
    datatypes::{DataType, Decimal128Type, Schema},
    util::display::{ArrayFormatter, FormatOptions},
};
use sha2::{Digest, Sha256};

use super::{MART, QUARANTINE, STAGING};
use crate::ports::{Input, Lakehouse, PortError, Query, Result};

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Calls `visit` with each row as one unambiguous text.
pub(crate) fn each_row(batch: &RecordBatch, mut visit: impl FnMut(&str)) -> Result<()> {
    let options = FormatOptions::default();
    let columns = batch
        .columns()
        .iter()
        .map(|c| ArrayFormatter::try_new(c, &options))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| PortError::permanent("format rows for hashing").because(e))?;
    let mut text = String::new();
    for row in 0..batch.num_rows() {
        text.clear();
        for (array, formatter) in batch.columns().iter().zip(&columns) {
            // The length in front keeps ("a|b") apart from ("a", "b"), and null apart from "".
            if array.is_null(row) {
                text.push_str("-;");
            } else {
                let value = formatter.value(row).to_string();
                text.push_str(&format!("{}:{value};", value.len()));
            }
        }
        visit(&text);
    }
    Ok(())
}

/// Adds a digest to a sum of digests, in four lanes of 64 bits.
fn add_digest(lanes: &mut [u64; 4], digest: &[u8]) {
    for (lane, chunk) in lanes.iter_mut().zip(digest.chunks_exact(8)) {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        *lane = lane.wrapping_add(u64::from_le_bytes(word));
    }
}

/// Order-free hash of rows: the sum of the rows' sha256 in four 64-bit lanes, so that duplicates count.
///
/// Of rows as text it is the first definition of a raw day's content hash, kept for manifests that were written with it, so
/// that an unchanged day stays the version that it is.
#[derive(Debug, Default)]
pub(crate) struct OrderFreeHash([u64; 4]);

impl OrderFreeHash {
    pub(crate) fn add(&mut self, row: &str) {
        add_digest(&mut self.0, &Sha256::digest(row.as_bytes()));
    }
    pub(crate) fn finish(&self) -> String {
        hex(&self.0.iter().flat_map(|l| l.to_be_bytes()).collect::<Vec<_>>())
    }
}

/// Rows that are encoded before they are hashed: they stay in the processor's cache.
const CHUNK_ROWS: usize = 1_024;

/// The second definition of a raw day's content hash: the sum of the sha256 of each row's bytes and of the schema's text,
/// in four lanes of 64 bits. 64 hexadecimal digits.
///
/// A row's bytes are those of its fields of fixed width in the order of the columns, each with a byte in front that is 1
/// for a value and 0 for null, whose value is then zeros; a text stands here with its length plus one in four bytes, or 0
/// for null. A decimal of at most 18 digits has eight bytes. After them come the bytes of the texts, in the same order. Since the schema is fixed, each field's end is known before the next one
/// begins, so that two rows have the same bytes only if they are equal: null is not empty, and no text can be moved
/// from one column to the next. The schema counts as one more row, so that equal values of other types, or under
/// other names, are another day.
///
/// **What it tells.** A sum does not depend on the order and counts duplicates. Two days that differ by accident (rows
/// lost, doubled, changed, mixed up) have the same hash with a chance of about 2^-256, because sha256 makes each row's
/// share look random; a checksum without that property, such as xxhash, is linear enough for structured rows (a
/// counter, a repeated amount) to cancel out. It is no defence against somebody who may choose thousands of rows
/// to make the sum come out right: for sums that takes less than a collision of sha256. Objects are protected from
/// that by their own sha256 in the manifest.
#[derive(Debug)]
pub(super) struct ContentHash {
    lanes: [u64; 4],
    bytes: Vec<u8>,
    /// Where each row of the chunk begins, and the end of the last.
    begins: Vec<usize>,
    /// Where the next text of each row goes.
    texts: Vec<usize>,
}

/// A column as the hash reads it.
enum Field {
    Fixed {
        width: usize,
        values: Buffer,
        at: usize,
        nulls: Option<NullBuffer>,
    },
    /// Decimals whose digits fit in eight bytes.
    Short {
        values: Decimal128Array,
        nulls: Option<NullBuffer>,
    },
    Flags {
        values: BooleanBuffer,
        nulls: Option<NullBuffer>,
    },
    Bytes {
        values: ArrayRef,
    },
}

impl Field {
    fn of(name: &str, array: &ArrayRef) -> Result<Self> {
        let nulls = array.logical_nulls().filter(|nulls| nulls.null_count() > 0);
        if let DataType::Decimal128(..=18, _) = array.data_type() {
            return Ok(Self::Short { values: array.as_primitive::<Decimal128Type>().clone(), nulls });
        }
        if let Some(width) = array.data_type().primitive_width() {
            let data = array.to_data();
            let values = data.buffers().first().cloned().unwrap_or_else(|| Buffer::from(Vec::<u8>::new()));
            return Ok(Self::Fixed { width, values, at: data.offset() * width, nulls });
        }
        let bytes = match array.data_type() {
            DataType::Boolean => return Ok(Self::Flags { values: array.as_boolean().values().clone(), nulls }),
            DataType::Binary => array.clone(),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::LargeBinary | DataType::BinaryView => {
                let what = |e| PortError::permanent(format!("hash column {name}")).because(e);
                cast(array, &DataType::Binary).map_err(what)?
            }
            other => {
                let what = format!("hash column {name}: found type {other}, expected numbers, times, flags, text or bytes");
                return Err(PortError::permanent(what));
            }
        };
        Ok(Self::Bytes { values: bytes })
    }

    /// Bytes of the field's part of fixed width, the byte in front included.
    fn width(&self) -> usize {
        match self {
            Self::Fixed { width, .. } => 1 + width,
            Self::Short { .. } => 9,
            Self::Flags { .. } => 2,
            Self::Bytes { .. } => 4,
        }
    }
}

/// Copies values of `N` bytes to their places.
fn scatter<const N: usize>(
    out: &mut [u8],
    begins: &[usize],
    shift: usize,
    values: &[u8],
    nulls: Option<&NullBuffer>,
    first: usize,
) {
    for (i, (begin, value)) in begins.iter().zip(values.chunks_exact(N)).enumerate() {
        if nulls.is_none_or(|nulls| nulls.is_valid(first + i)) {
            let place = &mut out[begin + shift..begin + shift + 1 + N];
            place[0] = 1;
            place[1..].copy_from_slice(value);
        }
    }
}

impl ContentHash {
    /// The hash of no rows of this schema.
    pub(super) fn new(schema: &Schema) -> Self {
        let mut lanes = [0; 4];
        let mut text = String::new();
        for field in schema.fields() {
            let data_type = field.data_type().to_string();
            text.push_str(&format!("{}:{}{}:{data_type}", field.name().len(), field.name(), data_type.len()));
        }
        add_digest(&mut lanes, &Sha256::digest(text.as_bytes()));
        Self { lanes, bytes: Vec::new(), begins: Vec::new(), texts: Vec::new() }
    }

    /// Adds the rows of a batch, which has the schema.
    ///
    /// # Errors
    /// `Permanent` for a column of a type that has no bytes of its own, such as a list.
    pub(super) fn add(&mut self, batch: &RecordBatch) -> Result<()> {
        let schema = batch.schema_ref();
        let fields: Vec<Field> =
            batch.columns().iter().zip(schema.fields()).map(|(c, f)| Field::of(f.name(), c)).collect::<Result<_>>()?;
        for first in (0..batch.num_rows()).step_by(CHUNK_ROWS) {
            self.chunk(&fields, first..batch.num_rows().min(first + CHUNK_ROWS))?;
        }
        Ok(())
    }

    fn chunk(&mut self, fields: &[Field], rows: Range<usize>) -> Result<()> {
        let fixed: usize = fields.iter().map(Field::width).sum();
        let first = rows.start;
        // How long each row is, and from that where it begins.
        self.begins.clear();
        self.begins.resize(rows.len() + 1, fixed);
        for field in fields {
            if let Field::Bytes { values } = field {
                for (length, pair) in self.begins.iter_mut().zip(values.as_binary::<i32>().value_offsets()[first..].windows(2)) {
                    // An offset only grows; the bytes of a null are none or are left out below.
                    *length += (pair[1] - pair[0]) as usize;
                }
            }
        }
        let mut end = 0;
        for begin in &mut self.begins {
            end += std::mem::replace(begin, end);
        }
        let (begins, count) = (&self.begins[..rows.len()], rows.len());
        self.bytes.clear();
        self.bytes.resize(self.begins[count], 0);
        self.texts.clear();
        self.texts.extend(begins.iter().map(|begin| begin + fixed));
        let (out, mut shift) = (self.bytes.as_mut_slice(), 0);
        for field in fields {
            match field {
                Field::Fixed { width, values, at, nulls } => {
                    let (nulls, values) = (nulls.as_ref(), &values.as_slice()[at + first * width..at + rows.end * width]);
                    match width {
                        1 => scatter::<1>(out, begins, shift, values, nulls, first),
                        2 => scatter::<2>(out, begins, shift, values, nulls, first),
                        4 => scatter::<4>(out, begins, shift, values, nulls, first),
                        8 => scatter::<8>(out, begins, shift, values, nulls, first),
                        16 => scatter::<16>(out, begins, shift, values, nulls, first),
                        32 => scatter::<32>(out, begins, shift, values, nulls, first),
                        other => {
                            return Err(PortError::permanent(format!(
                                "hash rows: found values of {other} bytes, expected 1 to 32"
                            )));
                        }
                    }
                }
                Field::Short { values, nulls } => {
                    for (i, (begin, value)) in begins.iter().zip(&values.values()[first..rows.end]).enumerate() {
                        if nulls.as_ref().is_none_or(|nulls| nulls.is_valid(first + i)) {
                            let short = i64::try_from(*value).map_err(|e| {
                                PortError::permanent(format!("hash rows: found decimal {value}, expected at most 18 digits"))
                                    .because(e)
                            })?;
                            let place = &mut out[begin + shift..begin + shift + 9];
                            place[0] = 1;
                            place[1..].copy_from_slice(&short.to_le_bytes());
                        }
                    }
                }
                Field::Flags { values, nulls } => {
                    for (i, begin) in begins.iter().enumerate() {
                        if nulls.as_ref().is_none_or(|nulls| nulls.is_valid(first + i)) {
                            out[begin + shift] = 1;
                            out[begin + shift + 1] = values.value(first + i).into();
                        }
                    }
                }
                Field::Bytes { values } => {
                    let values = values.as_binary::<i32>();
                    for (i, (begin, text)) in begins.iter().zip(&mut self.texts).enumerate() {
                        if values.is_valid(first + i) {
                            let value = values.value(first + i);
                            out[begin + shift..begin + shift + 4].copy_from_slice(&(value.len() as u32 + 1).to_le_bytes());
                            out[*text..*text + value.len()].copy_from_slice(value);
                            *text += value.len();
                        }
                    }
                }
            }
            shift += field.width();
        }
        for (begin, end) in begins.iter().zip(&self.texts) {
            add_digest(&mut self.lanes, &Sha256::digest(&out[*begin..*end]));
        }
        Ok(())
    }

    pub(super) fn finish(&self) -> String {
        hex(&self.lanes.iter().flat_map(|l| l.to_be_bytes()).collect::<Vec<_>>())
    }
}

/// The canonical hash of a Delta table: sha256 over its rows sorted by key, without times of processing.
///
/// # Errors
/// When the table cannot be read.
pub async fn canonical_hash(lakehouse: &dyn Lakehouse, table: &str) -> Result<String> {
    let (columns, order) = match table {
        MART => (
            "fecha, region, segmento_cliente, revenue_bruto, revenue_neto, descuentos_total, transacciones, usuarios_unicos, ticket_promedio, tasa_conversion",
            "fecha, region, segmento_cliente",
        ),
        STAGING => (
            "order_id, user_id, product_id, monto_bruto, descuento, monto_neto, region, timestamp_venta, fecha, _source_hash",
            "order_id",
        ),
        QUARANTINE => (
            "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, _source_hash, fate, clause",
            "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, fate, clause",
        ),
        other => {
            return Err(PortError::permanent(format!(
                "hash {other}: found an unknown table, expected one of {STAGING}, {QUARANTINE}, {MART}"
            )));
        }
    };
    let query = Query {
        sql: format!("SELECT {columns} FROM t ORDER BY {order}"),
        inputs: vec![("t".into(), Input::Delta(table.into()))],
    };
    let mut hash = Sha256::new();
    for batch in lakehouse.query(&query).await? {
        each_row(&batch, |row| {
            hash.update(row.as_bytes());
            hash.update(b"\n");
        })?;
    }
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, sync::Arc};

    use arrow::{
        array::{
            BooleanArray, Date32Array, Float64Array, Int16Array, Int32Array, ListArray, StringArray, StringViewArray,
            TimestampMicrosecondArray,
        },
        compute::concat_batches,
        datatypes::Int32Type,
    };
    use proptest::prelude::*;

    use super::*;

    /// A row as a person would write it. Few different values, so that equal rows are common.
    type Values = (Option<String>, Option<String>, Option<i128>, Option<i32>, Option<i64>, Option<bool>);

    fn value() -> impl Strategy<Value = Values> {
        let text = || proptest::option::of(prop_oneof!["[ab]{0,2}", "\\PC{0,2}"]);
        (
            text(),
            text(),
            proptest::option::of(prop_oneof![-2_i128..3, Just(-9_999_999_999), Just(9_999_999_999)]),
            proptest::option::of(-1_i32..2),
            proptest::option::of(prop_oneof![-1_i64..2, Just(256), Just(1 << 40)]),
            any::<Option<bool>>(),
        )
    }

    fn batch(rows: &[Values]) -> RecordBatch {
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("order_id", Arc::new(rows.iter().map(|r| r.0.as_deref()).collect::<StringArray>())),
            ("user_id", Arc::new(rows.iter().map(|r| r.1.as_deref()).collect::<StringArray>())),
            (
                "monto",
                Arc::new(
                    rows.iter().map(|r| r.2).collect::<Decimal128Array>().with_precision_and_scale(10, 2).expect("ten digits"),
                ),
            ),
            ("fecha", Arc::new(rows.iter().map(|r| r.3).collect::<Date32Array>())),
            ("momento", Arc::new(rows.iter().map(|r| r.4).collect::<TimestampMicrosecondArray>().with_timezone("UTC"))),
            ("activo", Arc::new(rows.iter().map(|r| r.5).collect::<BooleanArray>())),
        ];
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).expect("a batch")
    }

    fn hash(batches: &[RecordBatch]) -> String {
        let mut hash = ContentHash::new(batches[0].schema_ref());
        for batch in batches {
            hash.add(batch).expect("all types have bytes");
        }
        hash.finish()
    }

    fn counted(rows: &[Values]) -> BTreeMap<&Values, usize> {
        let mut counts = BTreeMap::new();
        for row in rows {
            *counts.entry(row).or_default() += 1;
        }
        counts
    }

    proptest! {
        #[test]
        fn two_days_have_one_hash_exactly_if_they_have_the_same_rows(
            rows in proptest::collection::vec(value(), 0..6),
            others in proptest::collection::vec(value(), 0..6),
            change in (any::<proptest::sample::Index>(), 0..6, value()),
        ) {
            // One field of one row, which may stay what it is.
            let mut changed = rows.clone();
            if !changed.is_empty() {
                let row = &mut changed[change.0.index(rows.len())];
                match change.1 {
                    0 => row.0 = change.2.0,
                    1 => row.1 = change.2.1,
                    2 => row.2 = change.2.2,
                    3 => row.3 = change.2.3,
                    4 => row.4 = change.2.4,
                    _ => row.5 = change.2.5,
                }
            }
            for other in [&others, &changed] {
                prop_assert_eq!(hash(&[batch(&rows)]) == hash(&[batch(other)]), counted(&rows) == counted(other));
            }
        }

        #[test]
        fn order_and_batches_do_not_matter_and_duplicates_do(
            rows in proptest::collection::vec(value(), 1..40),
            cut in any::<proptest::sample::Index>(),
            twice in any::<proptest::sample::Index>(),
            turned in any::<proptest::sample::Index>(),
        ) {
            let whole = batch(&rows);
            let cut = cut.index(rows.len() + 1);
            let parts = [whole.slice(cut, rows.len() - cut), whole.slice(0, cut)];
            prop_assert_eq!(hash(std::slice::from_ref(&whole)), hash(&parts));
            let mut mixed = rows.clone();
            mixed.rotate_left(turned.index(rows.len()));
            mixed.reverse();
            prop_assert_eq!(hash(std::slice::from_ref(&whole)), hash(&[batch(&mixed)]));
            mixed.push(rows[twice.index(rows.len())].clone());
            prop_assert_ne!(hash(&[whole]), hash(&[batch(&mixed)]));
        }
    }

    #[test]
    fn text_cannot_move_from_one_column_to_the_next_and_null_is_not_empty() {
        let row =
            |a: Option<&str>, b: Option<&str>| hash(&[batch(&[(a.map(Into::into), b.map(Into::into), None, None, None, None)])]);
        let hashes = [
            row(Some("ab"), Some("c")),
            row(Some("a"), Some("bc")),
            row(Some("abc"), Some("")),
            row(Some(""), Some("abc")),
            row(Some("abc"), None),
            row(None, Some("abc")),
            row(None, None),
            row(Some(""), None),
            row(None, Some("")),
            row(Some(""), Some("")),
            row(Some("\0"), Some("")),
        ];
        let different: std::collections::BTreeSet<&String> = hashes.iter().collect();
        assert_eq!(different.len(), hashes.len());
    }

    #[test]
    fn more_rows_than_a_chunk_are_all_counted() {
        let rows: Vec<Values> = (0..3_000_i64)
            .map(|i| {
                (Some(format!("o-{i}")), (i % 7 > 0).then(|| "u".repeat(i as usize % 11)), Some(i.into()), None, Some(i), None)
            })
            .collect();
        let whole = batch(&rows);
        let one_by_one: Vec<RecordBatch> = (0..rows.len()).rev().map(|i| whole.slice(i, 1)).collect();
        assert_eq!(hash(std::slice::from_ref(&whole)), hash(&one_by_one));
        assert_ne!(hash(std::slice::from_ref(&whole)), hash(&one_by_one[1..]));
        assert_ne!(hash(std::slice::from_ref(&whole)), hash(&[whole.slice(0, 2_999)]));
    }

    #[test]
    fn equal_values_of_another_type_or_name_are_another_day() {
        let of = |name: &str, array: ArrayRef| {
            hash(&[RecordBatch::try_from_iter_with_nullable([(name, array, true)]).expect("a batch")])
        };
        let short = of("n", Arc::new(Int16Array::from(vec![1, 2])));
        assert_ne!(short, of("n", Arc::new(Int32Array::from(vec![1, 2]))));
        assert_ne!(short, of("m", Arc::new(Int16Array::from(vec![1, 2]))));
        // Bit for bit: a negative zero is not zero.
        assert_ne!(of("x", Arc::new(Float64Array::from(vec![0.0]))), of("x", Arc::new(Float64Array::from(vec![-0.0]))));
        // What lies under a null does not count.
        let under = |value| Arc::new(Int32Array::new(vec![value].into(), Some(vec![false].into()))) as ArrayRef;
        assert_eq!(of("n", under(1)), of("n", under(2)));
        let view = of("t", Arc::new(StringViewArray::from(vec![Some("a"), None])));
        assert_eq!(view, of("t", Arc::new(StringViewArray::from(vec![None, Some("a")]))));
    }

    #[test]
    fn a_column_without_bytes_is_refused_by_name() {
        let list = ListArray::from_iter_primitive::<Int32Type, _, _>(vec![Some(vec![Some(1)])]);
        let batch = RecordBatch::try_from_iter([("lista", Arc::new(list) as ArrayRef)]).expect("a batch");
        let error = ContentHash::new(batch.schema_ref()).add(&batch).expect_err("a list");
        assert!(error.to_string().starts_with("hash column lista: found type List"), "{error}");
    }

    /// Two rows, and their hashes as another program computes them from the definitions.
    #[test]
    fn the_definitions_stay_what_they_are() {
        let rows: [Values; 2] = [
            (Some("o-1".into()), None, Some(1_234), Some(9_862), Some(852_076_800_000_000), Some(true)),
            (Some(String::new()), Some("u".into()), None, Some(-1), None, None),
        ];
        let batch = batch(&rows);
        let rows = concat_batches(batch.schema_ref(), [&batch]).expect("one schema");
        assert_eq!(hash(std::slice::from_ref(&rows)), "04c075deea024a0de9c41717b4aebe8b02ffbf239b2439a900e374d032efb089");
        let mut text = OrderFreeHash::default();
        each_row(&rows, |row| text.add(row)).expect("rows have text");
        assert_eq!(text.finish(), "c0b313e0b951f7eab9151e5343a2658cd524561ede947339af29c99b3d13c8e4");
    }
}
