//! Columns under construction, one row at a time, with a row that can be taken back.
//!
//! Arrow's own builders cannot forget a value, and a record may turn out to be malformed in its last field. What it leaves
//! out: nested columns.

use std::sync::Arc;

use arrow::{
    array::{
        ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Float32Array, Float64Array, Int32Array, Int64Array,
        StringArray, TimestampMicrosecondArray, TimestampMillisecondArray,
    },
    buffer::{Buffer, NullBuffer, OffsetBuffer, ScalarBuffer},
    datatypes::{DataType, Field, TimeUnit},
    error::ArrowError,
};

use super::schema::{Logical, Primitive};

/// What the values of a column are in memory, and where among the columns of that kind it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    Boolean(usize),
    Int(usize),
    Long(usize),
    Float(usize),
    Double(usize),
    Decimal(usize),
    /// UTF-8.
    Text(usize),
    Binary(usize),
}

/// A column of the result.
#[derive(Debug, Clone)]
pub(super) struct Column {
    pub field: Field,
    pub slot: Slot,
}

/// Values of a fixed width. A null has a zero in `values`.
#[derive(Debug)]
pub(super) struct Cells<T> {
    pub values: Vec<T>,
    /// Of a nullable column.
    valid: Option<Vec<bool>>,
}

impl<T: Default> Cells<T> {
    fn new(nullable: bool, rows: usize) -> Self {
        Self { values: Vec::with_capacity(rows), valid: nullable.then(|| Vec::with_capacity(rows)) }
    }
    #[inline]
    pub fn push(&mut self, value: T) {
        self.values.push(value);
        if let Some(valid) = &mut self.valid {
            valid.push(true);
        }
    }
    fn push_null(&mut self) {
        self.values.push(T::default());
        if let Some(valid) = &mut self.valid {
            valid.push(false);
        }
    }
    fn truncate(&mut self, rows: usize) {
        self.values.truncate(rows);
        if let Some(valid) = &mut self.valid {
            valid.truncate(rows);
        }
    }
    fn take(&mut self) -> (Vec<T>, Option<NullBuffer>) {
        (std::mem::take(&mut self.values), nulls(&mut self.valid))
    }
}

/// Appends the first `length` bytes of `from`. Most values are short: copying a block and cutting it is a few instructions,
/// where a copy of any length is a call.
///
/// # Panics
/// When `from` is shorter.
#[inline]
pub(crate) fn append(to: &mut Vec<u8>, from: &[u8], length: usize) {
    let end = to.len() + length;
    match (length, from.first_chunk::<16>(), from.first_chunk::<8>()) {
        (..=8, _, Some(block)) => to.extend_from_slice(block),
        (9..=16, Some(block), _) => to.extend_from_slice(block),
        _ => to.extend_from_slice(&from[..length]),
    }
    to.truncate(end);
}

/// Bytes per value that a column of text has room for at first.
const TEXT_BYTES: usize = 12;

/// Values of any length, at most 2 GiB together.
#[derive(Debug)]
pub(super) struct Spans {
    /// Where each value ends.
    ends: Vec<i32>,
    data: Vec<u8>,
    valid: Option<Vec<bool>>,
}

impl Spans {
    fn new(nullable: bool, rows: usize) -> Self {
        let data = Vec::with_capacity(rows.saturating_mul(TEXT_BYTES));
        Self { ends: Vec::with_capacity(rows), data, valid: nullable.then(|| Vec::with_capacity(rows)) }
    }
    /// `false` when the column would pass 2 GiB; nothing is kept then.
    #[inline]
    #[must_use]
    pub fn push(&mut self, value: &[u8]) -> bool {
        self.push_first(value, value.len())
    }
    /// As [`Spans::push`] of the first `length` bytes of `from`, which is quicker where more bytes follow the value.
    ///
    /// # Panics
    /// When `from` is shorter.
    #[inline]
    #[must_use]
    pub fn push_first(&mut self, from: &[u8], length: usize) -> bool {
        let Some(end) = self.data.len().checked_add(length).and_then(|e| i32::try_from(e).ok()) else { return false };
        append(&mut self.data, from, length);
        self.ends.push(end);
        if let Some(valid) = &mut self.valid {
            valid.push(true);
        }
        true
    }
    fn push_null(&mut self) {
        self.ends.push(self.end());
        if let Some(valid) = &mut self.valid {
            valid.push(false);
        }
    }
    fn end(&self) -> i32 {
        self.ends.last().copied().unwrap_or(0)
    }
    fn truncate(&mut self, rows: usize) {
        self.ends.truncate(rows);
        self.data.truncate(self.end() as usize);
        if let Some(valid) = &mut self.valid {
            valid.truncate(rows);
        }
    }
    fn take(&mut self) -> (OffsetBuffer<i32>, Buffer, Option<NullBuffer>) {
        let mut offsets = Vec::with_capacity(self.ends.len() + 1);
        offsets.push(0);
        offsets.append(&mut self.ends);
        let offsets = OffsetBuffer::new(ScalarBuffer::from(offsets));
        (offsets, Buffer::from_vec(std::mem::take(&mut self.data)), nulls(&mut self.valid))
    }
}

fn nulls(valid: &mut Option<Vec<bool>>) -> Option<NullBuffer> {
    let nulls = NullBuffer::from(std::mem::take(valid.as_mut()?));
    (nulls.null_count() > 0).then_some(nulls)
}

/// All columns of one batch. Every row pushes exactly one value into each, or [`Columns::truncate`] takes it back.
#[derive(Debug)]
pub(super) struct Columns {
    pub booleans: Vec<Cells<bool>>,
    pub ints: Vec<Cells<i32>>,
    pub longs: Vec<Cells<i64>>,
    pub floats: Vec<Cells<f32>>,
    pub doubles: Vec<Cells<f64>>,
    pub decimals: Vec<Cells<i128>>,
    pub texts: Vec<Spans>,
    pub binaries: Vec<Spans>,
}

impl Columns {
    /// No column.
    pub fn none() -> Self {
        Self {
            booleans: Vec::new(),
            ints: Vec::new(),
            longs: Vec::new(),
            floats: Vec::new(),
            doubles: Vec::new(),
            decimals: Vec::new(),
            texts: Vec::new(),
            binaries: Vec::new(),
        }
    }

    /// Empty columns with room for `rows`.
    pub fn new(columns: &[Column], rows: usize) -> Self {
        let mut all = Self::none();
        columns.iter().for_each(|c| all.add(c, rows));
        all
    }

    /// Adds an empty column. Its slot must be the next of its kind, as [`arrow_type`] gives it.
    pub fn add(&mut self, Column { field, slot }: &Column, rows: usize) {
        let nullable = field.is_nullable();
        match slot {
            Slot::Boolean(_) => self.booleans.push(Cells::new(nullable, rows)),
            Slot::Int(_) => self.ints.push(Cells::new(nullable, rows)),
            Slot::Long(_) => self.longs.push(Cells::new(nullable, rows)),
            Slot::Float(_) => self.floats.push(Cells::new(nullable, rows)),
            Slot::Double(_) => self.doubles.push(Cells::new(nullable, rows)),
            Slot::Decimal(_) => self.decimals.push(Cells::new(nullable, rows)),
            Slot::Text(_) => self.texts.push(Spans::new(nullable, rows)),
            Slot::Binary(_) => self.binaries.push(Spans::new(nullable, rows)),
        }
    }

    pub fn push_null(&mut self, slot: Slot) {
        match slot {
            Slot::Boolean(i) => self.booleans[i].push_null(),
            Slot::Int(i) => self.ints[i].push_null(),
            Slot::Long(i) => self.longs[i].push_null(),
            Slot::Float(i) => self.floats[i].push_null(),
            Slot::Double(i) => self.doubles[i].push_null(),
            Slot::Decimal(i) => self.decimals[i].push_null(),
            Slot::Text(i) => self.texts[i].push_null(),
            Slot::Binary(i) => self.binaries[i].push_null(),
        }
    }

    /// Forgets every row from `rows` on.
    pub fn truncate(&mut self, rows: usize) {
        self.booleans.iter_mut().for_each(|c| c.truncate(rows));
        self.ints.iter_mut().for_each(|c| c.truncate(rows));
        self.longs.iter_mut().for_each(|c| c.truncate(rows));
        self.floats.iter_mut().for_each(|c| c.truncate(rows));
        self.doubles.iter_mut().for_each(|c| c.truncate(rows));
        self.decimals.iter_mut().for_each(|c| c.truncate(rows));
        self.texts.iter_mut().for_each(|c| c.truncate(rows));
        self.binaries.iter_mut().for_each(|c| c.truncate(rows));
    }

    /// Takes the values out as one array.
    pub fn take(&mut self, column: &Column) -> Result<ArrayRef, ArrowError> {
        Ok(match (column.slot, column.field.data_type()) {
            (Slot::Boolean(i), _) => {
                let (values, nulls) = self.booleans[i].take();
                Arc::new(BooleanArray::new(values.into(), nulls))
            }
            (Slot::Int(i), DataType::Date32) => {
                let (values, nulls) = self.ints[i].take();
                Arc::new(Date32Array::try_new(values.into(), nulls)?)
            }
            (Slot::Int(i), _) => {
                let (values, nulls) = self.ints[i].take();
                Arc::new(Int32Array::try_new(values.into(), nulls)?)
            }
            (Slot::Long(i), data_type) => {
                let (values, nulls) = self.longs[i].take();
                match data_type {
                    DataType::Timestamp(TimeUnit::Millisecond, zone) => {
                        Arc::new(TimestampMillisecondArray::try_new(values.into(), nulls)?.with_timezone_opt(zone.clone()))
                    }
                    DataType::Timestamp(_, zone) => {
                        Arc::new(TimestampMicrosecondArray::try_new(values.into(), nulls)?.with_timezone_opt(zone.clone()))
                    }
                    _ => Arc::new(Int64Array::try_new(values.into(), nulls)?),
                }
            }
            (Slot::Float(i), _) => {
                let (values, nulls) = self.floats[i].take();
                Arc::new(Float32Array::try_new(values.into(), nulls)?)
            }
            (Slot::Double(i), _) => {
                let (values, nulls) = self.doubles[i].take();
                Arc::new(Float64Array::try_new(values.into(), nulls)?)
            }
            (Slot::Decimal(i), data_type) => {
                let (values, nulls) = self.decimals[i].take();
                Arc::new(Decimal128Array::try_new(values.into(), nulls)?.with_data_type(data_type.clone()))
            }
            (Slot::Text(i), _) => {
                let (offsets, data, nulls) = self.texts[i].take();
                Arc::new(StringArray::try_new(offsets, data, nulls)?)
            }
            (Slot::Binary(i), _) => {
                let (offsets, data, nulls) = self.binaries[i].take();
                Arc::new(BinaryArray::try_new(offsets, data, nulls)?)
            }
        })
    }
}

/// Arrow's type for an Avro primitive, and the slot it takes; `None` for the type null alone.
pub(super) fn arrow_type(primitive: Primitive, logical: Option<Logical>, next: &Columns) -> Option<(DataType, Slot)> {
    let utc = || Some("+00:00".into());
    Some(match (primitive, logical) {
        (Primitive::Null, _) => return None,
        (Primitive::Boolean, _) => (DataType::Boolean, Slot::Boolean(next.booleans.len())),
        (Primitive::Int, Some(Logical::Date)) => (DataType::Date32, Slot::Int(next.ints.len())),
        (Primitive::Int, _) => (DataType::Int32, Slot::Int(next.ints.len())),
        (Primitive::Long, logical) => {
            let data_type = match logical {
                Some(Logical::TimestampMillis) => DataType::Timestamp(TimeUnit::Millisecond, utc()),
                Some(Logical::TimestampMicros) => DataType::Timestamp(TimeUnit::Microsecond, utc()),
                Some(Logical::Date | Logical::Decimal { .. }) | None => DataType::Int64,
            };
            (data_type, Slot::Long(next.longs.len()))
        }
        (Primitive::Float, _) => (DataType::Float32, Slot::Float(next.floats.len())),
        (Primitive::Double, _) => (DataType::Float64, Slot::Double(next.doubles.len())),
        (Primitive::Bytes, Some(Logical::Decimal { precision, scale })) => decimal(precision, scale, next),
        (Primitive::Bytes, _) => (DataType::Binary, Slot::Binary(next.binaries.len())),
        (Primitive::String, _) => (DataType::Utf8, Slot::Text(next.texts.len())),
    })
}

/// Arrow's type for a decimal; precision and scale are at most 38.
pub(super) fn decimal(precision: u32, scale: u32, next: &Columns) -> (DataType, Slot) {
    (DataType::Decimal128(precision as u8, scale as i8), Slot::Decimal(next.decimals.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_appended_is_the_beginning_and_nothing_behind_it(
            mut to in prop::collection::vec(any::<u8>(), 0..20), from in prop::collection::vec(any::<u8>(), 0..40), length in any::<prop::sample::Index>(),
        ) {
            let length = length.index(from.len() + 1);
            let expected = [&*to, &from[..length]].concat();
            append(&mut to, &from, length);
            prop_assert_eq!(to, expected);
        }
    }
}
