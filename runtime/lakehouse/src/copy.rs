//! PostgreSQL's binary COPY format, decoded straight into Arrow and encoded from it.
//!
//! The decoder is pushed: it takes whatever bytes have arrived and gives a batch when one is full. It knows no socket,
//! so that it runs over a real connection, a file or a simulated server alike. It holds one batch and at most one
//! incomplete value, whatever the sender claims about lengths. Where batches are cut depends on the rows alone, never
//! on the chunks in which they arrived.
//!
//! Nothing is rounded, padded or guessed: a value that Arrow cannot hold exactly is an error that names the byte, the
//! row and the column. What this leaves out: arrays, ranges, intervals, JSON and `bytea`.

use std::{fmt::Write as _, sync::Arc};

use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanBuilder, Date32Builder, Decimal128Builder, Float64Builder, Int16Builder, Int32Builder,
        Int64Builder, RecordBatch, StringBuilder, TimestampMicrosecondBuilder,
    },
    datatypes::{
        DataType, Date32Type, Decimal128Type, Field, Float64Type, Int16Type, Int32Type, Int64Type, Schema, SchemaRef, TimeUnit,
        TimestampMicrosecondType,
    },
};

const SIGNATURE: &[u8; 11] = b"PGCOPY\n\xff\r\n\0";
/// Signature, flags and the length of the extension.
const HEADER_BYTES: usize = 19;
/// From 1970-01-01, where Arrow counts from, to 2000-01-01, where PostgreSQL does.
const EPOCH_DAYS: i32 = 10_957;
const EPOCH_MICROS: i64 = 946_684_800_000_000;
/// PostgreSQL's own bound for digits after the point in `numeric`.
const DSCALE_MAX: u16 = 0x3fff;
/// The longest value that an error repeats, in characters.
const SHOWN: usize = 80;

/// Why bytes are no COPY stream of these columns, or rows cannot be written as one.
///
/// Bytes count from 0 over the whole stream, rows from 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// The columns or limits that were asked for cannot be.
    #[error("set up a binary copy: {place} has {found}, expected {expected}")]
    Setup {
        /// Column or limit.
        place: String,
        /// What was asked for.
        found: String,
        /// What could be asked for.
        expected: String,
    },
    /// The bytes are not the format.
    #[error("byte {at}, row {row}: found {found}, expected {expected}")]
    Format {
        /// Where the bad bytes begin.
        at: u64,
        /// The row they belong to; 0 in the header.
        row: u64,
        /// The bytes, at most 80 characters.
        found: String,
        /// What should have been there.
        expected: String,
    },
    /// A value does not fit its column.
    #[error("byte {at}, row {row}, column {column}: found {found}, expected {expected}")]
    Value {
        /// Where the value begins.
        at: u64,
        /// The row.
        row: u64,
        /// The column's name.
        column: String,
        /// The value, at most 80 characters.
        found: String,
        /// What the column takes.
        expected: String,
    },
    /// The stream ends before its trailer.
    #[error("byte {at}, row {row}: found the end of the stream, expected {expected}")]
    Truncated {
        /// Bytes received.
        at: u64,
        /// The row that is incomplete or missing.
        row: u64,
        /// What should have followed.
        expected: String,
    },
    /// The decoder was used again after an error.
    #[error("byte {at}: found more bytes after an error, expected none")]
    Stopped {
        /// Bytes received.
        at: u64,
    },
}

/// What stands on the wire for a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyType {
    /// `text`, `varchar` and `bpchar` (whose padding blanks are kept), in UTF-8.
    Text,
    /// `uuid`, as lower-case text with hyphens. It can be decoded only.
    Uuid,
    /// `bool`.
    Bool,
    /// `int2`.
    Int2,
    /// `int4`.
    Int4,
    /// `int8`.
    Int8,
    /// `float8`.
    Float8,
    /// `numeric(precision, scale)`.
    Numeric {
        /// Decimal digits in all, 1 to 38.
        precision: u8,
        /// Digits after the point, at most `precision`.
        scale: u8,
    },
    /// `date`.
    Date,
    /// `timestamptz`, and `timestamp` where its values are known to be UTC.
    Timestamp,
}

impl CopyType {
    /// The Arrow type of the decoded column.
    pub fn data_type(self) -> DataType {
        match self {
            Self::Text | Self::Uuid => DataType::Utf8,
            Self::Bool => DataType::Boolean,
            Self::Int2 => DataType::Int16,
            Self::Int4 => DataType::Int32,
            Self::Int8 => DataType::Int64,
            Self::Float8 => DataType::Float64,
            Self::Numeric { precision, scale } => DataType::Decimal128(precision, scale as i8),
            Self::Date => DataType::Date32,
            Self::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into())),
        }
    }

    /// The wire type that holds every value of an Arrow type; `None` when there is none.
    pub fn of(data_type: &DataType) -> Option<Self> {
        match data_type {
            DataType::Utf8 => Some(Self::Text),
            DataType::Boolean => Some(Self::Bool),
            DataType::Int16 => Some(Self::Int2),
            DataType::Int32 => Some(Self::Int4),
            DataType::Int64 => Some(Self::Int8),
            DataType::Float64 => Some(Self::Float8),
            DataType::Decimal128(precision, scale) => {
                Some(Self::Numeric { precision: *precision, scale: u8::try_from(*scale).ok()? })
            }
            DataType::Date32 => Some(Self::Date),
            DataType::Timestamp(TimeUnit::Microsecond, Some(zone)) if zone.as_ref() == "UTC" => Some(Self::Timestamp),
            _ => None,
        }
    }
}

/// A column of the stream, in the order of the statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyColumn {
    /// Name.
    pub name: String,
    /// What stands on the wire.
    pub kind: CopyType,
}

/// How much the decoder may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyLimits {
    /// Rows of a batch, 1 to 65,536.
    pub batch_rows: usize,
    /// A batch ends after the row that brings its text to this many bytes; at most 512 MiB.
    pub batch_bytes: usize,
    /// Longest single value in bytes; at most 512 MiB.
    pub value_bytes: usize,
}

impl CopyLimits {
    /// 8,192 rows or 32 MiB of text in a batch, 16 MiB in a value.
    pub const STANDARD: Self = Self { batch_rows: 8_192, batch_bytes: 32 << 20, value_bytes: 16 << 20 };
}

#[derive(Debug)]
enum Builder {
    Text(StringBuilder),
    Uuid(StringBuilder),
    Bool(BooleanBuilder),
    Int2(Int16Builder),
    Int4(Int32Builder),
    Int8(Int64Builder),
    Float8(Float64Builder),
    Numeric { builder: Decimal128Builder, precision: u8, scale: u8 },
    Date(Date32Builder),
    Timestamp(TimestampMicrosecondBuilder),
}

/// What was found and what was expected; the caller knows where.
type Misfit = (String, String);

fn fixed<const N: usize>(raw: &[u8], name: &str) -> Result<[u8; N], Misfit> {
    raw.try_into().map_err(|_| (format!("{} bytes", raw.len()), format!("{N} bytes of {name}")))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(SHOWN / 2).fold(String::from("0x"), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn uuid_text(bytes: [u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (i, byte) in bytes.iter().enumerate() {
        if [4, 6, 8, 10].contains(&i) {
            text.push('-');
        }
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A `numeric` as it stands on the wire: digits to the base 10,000, the first of which counts 10,000^weight.
struct Numeric<'a> {
    digits: &'a [u8],
    weight: i16,
    negative: bool,
    dscale: u16,
}

impl<'a> Numeric<'a> {
    fn parse(raw: &'a [u8]) -> Result<Self, Misfit> {
        let word = |at: usize| raw.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
        let (Some(count), Some(weight), Some(sign), Some(dscale)) = (word(0), word(2), word(4), word(6)) else {
            return Err((format!("{} bytes", raw.len()), "a numeric of at least 8 bytes".into()));
        };
        let number = || "a number".to_owned();
        let negative = match sign {
            0x0000 => false,
            0x4000 => true,
            0xc000 => return Err(("NaN".into(), number())),
            0xd000 => return Err(("Infinity".into(), number())),
            0xf000 => return Err(("-Infinity".into(), number())),
            other => return Err((format!("sign {other:#06x}"), "a numeric with sign 0x0000 or 0x4000".into())),
        };
        let digits = &raw[8..];
        if digits.len() != usize::from(count) * 2 {
            return Err((format!("{} bytes", raw.len()), format!("a numeric of {} bytes", 8 + usize::from(count) * 2)));
        }
        if dscale > DSCALE_MAX {
            return Err((format!("{dscale} digits after the point"), format!("at most {DSCALE_MAX}")));
        }
        let numeric = Self { digits, weight: weight as i16, negative, dscale };
        let wrong = numeric.groups().map(|(digit, _)| digit).find(|digit| *digit > 9_999);
        wrong.map_or(Ok(numeric), |digit| Err((format!("digit {digit}"), "digits to the base 10,000".into())))
    }

    /// Each digit with the power of 10,000 that it counts.
    fn groups(&self) -> impl Iterator<Item = (u16, i32)> + '_ {
        let weight = i32::from(self.weight);
        self.digits.chunks_exact(2).zip(0..).map(move |(b, i): (_, i32)| (u16::from_be_bytes([b[0], b[1]]), weight - i))
    }

    /// The value times 10^scale, exactly.
    fn scaled(&self, precision: u8, scale: u8) -> Result<i128, Misfit> {
        let misfit = || (self.text(), format!("a numeric({precision},{scale})"));
        let mut sum: i128 = 0;
        for (digit, power) in self.groups().filter(|(digit, _)| *digit != 0) {
            let shift = power * 4 + i32::from(scale);
            let digit = i128::from(digit);
            let part = if let Ok(up) = u32::try_from(shift) {
                10_i128.checked_pow(up).and_then(|unit| unit.checked_mul(digit)).ok_or_else(misfit)?
            } else {
                // Digits below the last place must be zeros: nothing is rounded.
                let unit = 10_i128.checked_pow(shift.unsigned_abs()).ok_or_else(misfit)?;
                if digit % unit != 0 {
                    return Err(misfit());
                }
                digit / unit
            };
            sum = sum.checked_add(part).ok_or_else(misfit)?;
        }
        if 10_i128.checked_pow(u32::from(precision)).is_none_or(|bound| sum >= bound) {
            return Err(misfit());
        }
        Ok(if self.negative { -sum } else { sum })
    }

    /// For people: the decimal text, cut after 80 characters.
    fn text(&self) -> String {
        let digit_at = |power: i32| {
            let index = usize::try_from(i32::from(self.weight) - power).ok();
            index.and_then(|i| self.digits.get(i * 2..i * 2 + 2)).map_or(0, |b| u16::from_be_bytes([b[0], b[1]]))
        };
        let mut text = String::from(if self.negative { "-" } else { "" });
        let _ = write!(text, "{}", if self.weight < 0 { 0 } else { digit_at(self.weight.into()) });
        let mut power = i32::from(self.weight).max(0) - 1;
        while power >= 0 && text.len() <= SHOWN {
            let _ = write!(text, "{:04}", digit_at(power));
            power -= 1;
        }
        if text.len() <= SHOWN && self.dscale > 0 {
            let end = (text.len() + 1 + usize::from(self.dscale)).min(SHOWN + 1);
            text.push('.');
            let mut power = -1;
            while text.len() < end {
                let _ = write!(text, "{:04}", digit_at(power));
                power -= 1;
            }
            text.truncate(end);
        }
        if text.len() > SHOWN {
            text.truncate(SHOWN);
            text.push('…');
        }
        text
    }
}

/// 10^0 to 10^18.
const POWERS: [i64; 19] = {
    let mut powers = [1; 19];
    let mut i = 1;
    while i < powers.len() {
        powers[i] = powers[i - 1] * 10;
        i += 1;
    }
    powers
};

/// What [`Numeric::parse`] and [`Numeric::scaled`] make of a `numeric`, for the common ones: at most 18 digits, which an
/// `i64` holds. `None` says only that the long way has to be taken.
fn short_numeric(raw: &[u8], precision: u8, scale: u8) -> Option<i64> {
    let (head, digits) = raw.split_first_chunk::<8>()?;
    let word = |at: usize| u16::from_be_bytes([head[at], head[at + 1]]);
    let (count, weight, sign, dscale) = (usize::from(word(0)), word(2) as i16, word(4), word(6));
    if digits.len() != count * 2 || count > 6 || !matches!(sign, 0 | 0x4000) || dscale > DSCALE_MAX || precision > 18 {
        return None;
    }
    let (mut sum, mut shift) = (0_i64, i32::from(weight) * 4 + i32::from(scale));
    for digit in digits.chunks_exact(2) {
        let digit = i64::from(u16::from_be_bytes([digit[0], digit[1]]));
        if digit > 9_999 {
            return None;
        }
        let part = if digit == 0 {
            0
        } else if shift >= 0 {
            digit.checked_mul(*POWERS.get(shift as usize)?)?
        } else {
            // Digits below the last place must be zeros.
            let unit = POWERS.get(shift.unsigned_abs() as usize)?;
            if digit % unit != 0 {
                return None;
            }
            digit / unit
        };
        sum = sum.checked_add(part)?;
        shift -= 4;
    }
    (sum < *POWERS.get(usize::from(precision))?).then_some(if sign == 0 { sum } else { -sum })
}

/// The most digits after the point in each column of a whole stream; 0 for columns that are not marked as `numeric`.
///
/// A query's `numeric` has no declared scale: this tells which one holds all its values. Reading ends at the first
/// damage, which the decoder then reports.
pub fn numeric_scales(stream: &[u8], is_numeric: &[bool]) -> Vec<u16> {
    fn take<'a>(rest: &mut &'a [u8], bytes: usize) -> Option<&'a [u8]> {
        let (head, tail) = rest.split_at_checked(bytes)?;
        *rest = tail;
        Some(head)
    }
    fn length(rest: &mut &[u8]) -> Option<i32> {
        Some(i32::from_be_bytes(take(rest, 4)?.try_into().ok()?))
    }
    fn walk(mut rest: &[u8], is_numeric: &[bool], scales: &mut [u16]) -> Option<()> {
        take(&mut rest, HEADER_BYTES - 4)?;
        let extension = length(&mut rest)?;
        take(&mut rest, usize::try_from(extension).ok()?)?;
        loop {
            let count = take(&mut rest, 2)?;
            if usize::from(u16::from_be_bytes([count[0], count[1]])) != is_numeric.len() {
                return None;
            }
            for (is_numeric, scale) in is_numeric.iter().zip(&mut *scales) {
                let Ok(bytes) = usize::try_from(length(&mut rest)?) else { continue };
                let raw = take(&mut rest, bytes)?;
                if let (true, Ok(numeric)) = (*is_numeric, Numeric::parse(raw)) {
                    *scale = numeric.dscale.max(*scale);
                }
            }
        }
    }
    let mut scales = vec![0; is_numeric.len()];
    // `None` says only that the stream is over.
    let _ = walk(stream, is_numeric, &mut scales);
    scales
}

fn date_days(raw: &[u8]) -> Result<i32, Misfit> {
    match i32::from_be_bytes(fixed(raw, "date")?) {
        i32::MAX => Err(("infinity".into(), "a day".into())),
        i32::MIN => Err(("-infinity".into(), "a day".into())),
        days => {
            days.checked_add(EPOCH_DAYS).ok_or_else(|| (format!("day {days} after 2000-01-01"), "a day Arrow can hold".into()))
        }
    }
}

fn timestamp_micros(raw: &[u8]) -> Result<i64, Misfit> {
    match i64::from_be_bytes(fixed(raw, "timestamp")?) {
        i64::MAX => Err(("infinity".into(), "a time".into())),
        i64::MIN => Err(("-infinity".into(), "a time".into())),
        micros => micros
            .checked_add(EPOCH_MICROS)
            .ok_or_else(|| (format!("microsecond {micros} after 2000-01-01"), "a time Arrow can hold".into())),
    }
}

fn utf8(raw: &[u8]) -> Result<&str, Misfit> {
    std::str::from_utf8(raw).map_err(|_| (hex(raw), "text in UTF-8".into()))
}

impl Builder {
    fn new(kind: CopyType, rows: usize) -> Self {
        match kind {
            CopyType::Text => Self::Text(StringBuilder::with_capacity(rows, rows * 16)),
            CopyType::Uuid => Self::Uuid(StringBuilder::with_capacity(rows, rows * 36)),
            CopyType::Bool => Self::Bool(BooleanBuilder::with_capacity(rows)),
            CopyType::Int2 => Self::Int2(Int16Builder::with_capacity(rows)),
            CopyType::Int4 => Self::Int4(Int32Builder::with_capacity(rows)),
            CopyType::Int8 => Self::Int8(Int64Builder::with_capacity(rows)),
            CopyType::Float8 => Self::Float8(Float64Builder::with_capacity(rows)),
            CopyType::Numeric { precision, scale } => {
                let builder = Decimal128Builder::with_capacity(rows).with_data_type(kind.data_type());
                Self::Numeric { builder, precision, scale }
            }
            CopyType::Date => Self::Date(Date32Builder::with_capacity(rows)),
            CopyType::Timestamp => {
                Self::Timestamp(TimestampMicrosecondBuilder::with_capacity(rows).with_data_type(kind.data_type()))
            }
        }
    }

    fn append_null(&mut self) {
        match self {
            Self::Text(b) | Self::Uuid(b) => b.append_null(),
            Self::Bool(b) => b.append_null(),
            Self::Int2(b) => b.append_null(),
            Self::Int4(b) => b.append_null(),
            Self::Int8(b) => b.append_null(),
            Self::Float8(b) => b.append_null(),
            Self::Numeric { builder, .. } => builder.append_null(),
            Self::Date(b) => b.append_null(),
            Self::Timestamp(b) => b.append_null(),
        }
    }

    fn append(&mut self, raw: &[u8]) -> Result<(), Misfit> {
        match self {
            Self::Text(b) => b.append_value(utf8(raw)?),
            Self::Uuid(b) => b.append_value(uuid_text(fixed(raw, "uuid")?)),
            Self::Bool(b) => match raw {
                [0] => b.append_value(false),
                [1] => b.append_value(true),
                other => return Err((hex(other), "one byte, 0x00 or 0x01".into())),
            },
            Self::Int2(b) => b.append_value(i16::from_be_bytes(fixed(raw, "int2")?)),
            Self::Int4(b) => b.append_value(i32::from_be_bytes(fixed(raw, "int4")?)),
            Self::Int8(b) => b.append_value(i64::from_be_bytes(fixed(raw, "int8")?)),
            Self::Float8(b) => b.append_value(f64::from_be_bytes(fixed(raw, "float8")?)),
            Self::Numeric { builder, precision, scale } => match short_numeric(raw, *precision, *scale) {
                Some(value) => builder.append_value(value.into()),
                None => builder.append_value(Numeric::parse(raw)?.scaled(*precision, *scale)?),
            },
            Self::Date(b) => b.append_value(date_days(raw)?),
            Self::Timestamp(b) => b.append_value(timestamp_micros(raw)?),
        }
        Ok(())
    }

    fn finish(&mut self) -> ArrayRef {
        match self {
            Self::Text(b) | Self::Uuid(b) => Arc::new(b.finish()),
            Self::Bool(b) => Arc::new(b.finish()),
            Self::Int2(b) => Arc::new(b.finish()),
            Self::Int4(b) => Arc::new(b.finish()),
            Self::Int8(b) => Arc::new(b.finish()),
            Self::Float8(b) => Arc::new(b.finish()),
            Self::Numeric { builder, .. } => Arc::new(builder.finish()),
            Self::Date(b) => Arc::new(b.finish()),
            Self::Timestamp(b) => Arc::new(b.finish()),
        }
    }
}

/// What the next bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Header,
    Extension { left: u64 },
    FieldCount,
    Length { column: usize },
    Value { column: usize, length: usize },
    End,
    Failed,
}

fn check_limits(limits: CopyLimits) -> Result<(), CopyError> {
    let bad = |place: &str, found: usize, expected: &str| CopyError::Setup {
        place: place.into(),
        found: found.to_string(),
        expected: expected.into(),
    };
    // Offsets of an Arrow string column are 31 bits: a full batch and one more value must fit.
    const BYTES_MAX: usize = 512 << 20;
    if !(1..=65_536).contains(&limits.batch_rows) {
        return Err(bad("batch_rows", limits.batch_rows, "1 to 65,536"));
    }
    if !(1..=BYTES_MAX).contains(&limits.batch_bytes) {
        return Err(bad("batch_bytes", limits.batch_bytes, "1 to 512 MiB"));
    }
    if !(1..=BYTES_MAX).contains(&limits.value_bytes) {
        return Err(bad("value_bytes", limits.value_bytes, "1 to 512 MiB"));
    }
    Ok(())
}

/// Decodes one COPY stream. See the module for what it promises.
#[derive(Debug)]
pub struct CopyDecoder {
    columns: Vec<CopyColumn>,
    schema: SchemaRef,
    limits: CopyLimits,
    builders: Vec<Builder>,
    next: Next,
    /// The beginning of a value, length or header of which the rest has not arrived.
    carry: Vec<u8>,
    /// Bytes taken so far, those in `carry` included.
    at: u64,
    /// Complete rows so far.
    rows: u64,
    batch_rows: usize,
    batch_bytes: usize,
}

impl CopyDecoder {
    /// A decoder at the beginning of a stream.
    ///
    /// # Errors
    /// [`CopyError::Setup`] for no columns, a precision or scale that Arrow does not have, or a limit out of range.
    pub fn new(columns: Vec<CopyColumn>, limits: CopyLimits) -> Result<Self, CopyError> {
        check_limits(limits)?;
        if columns.is_empty() || i16::try_from(columns.len()).is_err() {
            return Err(CopyError::Setup {
                place: "the statement".into(),
                found: format!("{} columns", columns.len()),
                expected: "1 to 32,767".into(),
            });
        }
        for column in &columns {
            if let CopyType::Numeric { precision, scale } = column.kind
                && (!(1..=38).contains(&precision) || scale > precision)
            {
                return Err(CopyError::Setup {
                    place: column.name.clone(),
                    found: format!("numeric({precision},{scale})"),
                    expected: "a precision of 1 to 38 and a scale of at most the precision".into(),
                });
            }
        }
        let fields = columns.iter().map(|c| Field::new(&c.name, c.kind.data_type(), true)).collect::<Vec<_>>();
        let builders = columns.iter().map(|c| Builder::new(c.kind, limits.batch_rows)).collect();
        Ok(Self {
            columns,
            schema: Arc::new(Schema::new(fields)),
            limits,
            builders,
            next: Next::Header,
            carry: Vec::new(),
            at: 0,
            rows: 0,
            batch_rows: 0,
            batch_bytes: 0,
        })
    }

    /// The schema of the batches; every column may be null.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Complete rows decoded so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Takes bytes from the front of `bytes` until a batch is full or none are left.
    ///
    /// Call it again with the rest of the same bytes until they are used up: `None` means just that.
    ///
    /// # Errors
    /// The first damage or misfit; the decoder is of no use after it.
    pub fn decode(&mut self, bytes: &mut &[u8]) -> Result<Option<RecordBatch>, CopyError> {
        let result = self.advance(bytes);
        if result.is_err() {
            self.next = Next::Failed;
            self.carry = Vec::new();
        }
        result
    }

    /// Ends the stream and gives the last rows, if any are left.
    ///
    /// # Errors
    /// [`CopyError::Truncated`] when the trailer has not arrived: rows may be missing.
    pub fn finish(mut self) -> Result<Option<RecordBatch>, CopyError> {
        let expected = match self.next {
            Next::End => return if self.batch_rows == 0 { Ok(None) } else { self.flush().map(Some) },
            Next::Failed => return Err(CopyError::Stopped { at: self.at }),
            Next::Header => "the header of a binary copy".into(),
            Next::Extension { left } => format!("{left} more bytes of the header"),
            Next::FieldCount => "another row, or the trailer".into(),
            Next::Length { column } => format!("the length of column {}", self.columns[column].name),
            Next::Value { column, length } => format!("{length} bytes of column {}", self.columns[column].name),
        };
        Err(CopyError::Truncated { at: self.at, row: self.rows + 1, expected })
    }

    fn advance(&mut self, bytes: &mut &[u8]) -> Result<Option<RecordBatch>, CopyError> {
        loop {
            if self.next == Next::FieldCount && self.carry.is_empty() && self.whole_rows(bytes)? {
                return self.flush().map(Some);
            }
            let need = match self.next {
                Next::Header => HEADER_BYTES,
                Next::Extension { left } => {
                    let skipped = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    *bytes = &bytes[skipped..];
                    self.at += skipped as u64;
                    let left = left - skipped as u64;
                    self.next = if left == 0 { Next::FieldCount } else { Next::Extension { left } };
                    if left > 0 {
                        return Ok(None);
                    }
                    continue;
                }
                Next::FieldCount => 2,
                Next::Length { .. } => 4,
                Next::Value { length, .. } => length,
                Next::End if bytes.is_empty() => return Ok(None),
                Next::End => {
                    return Err(CopyError::Format {
                        at: self.at,
                        row: self.rows,
                        found: hex(bytes),
                        expected: "nothing after the trailer".into(),
                    });
                }
                Next::Failed => return Err(CopyError::Stopped { at: self.at }),
            };
            let full = if self.carry.is_empty() && bytes.len() >= need {
                let (unit, rest) = bytes.split_at(need);
                *bytes = rest;
                self.at += need as u64;
                self.accept(unit)?
            } else {
                let (head, rest) = bytes.split_at(bytes.len().min(need - self.carry.len()));
                self.carry.extend_from_slice(head);
                *bytes = rest;
                self.at += head.len() as u64;
                if self.carry.len() < need {
                    return Ok(None);
                }
                let mut unit = std::mem::take(&mut self.carry);
                let full = self.accept(&unit)?;
                unit.clear();
                self.carry = unit;
                full
            };
            if full {
                return self.flush().map(Some);
            }
        }
    }

    /// Takes rows from the front of `bytes` that are there in whole, the quick way; says whether the batch is full. It stops
    /// before the first thing that is anything else.
    fn whole_rows(&mut self, bytes: &mut &[u8]) -> Result<bool, CopyError> {
        while let Some(length) = self.whole_row(bytes) {
            let (row, rest) = bytes.split_at(length);
            let mut place = 2;
            for (column, builder) in self.builders.iter_mut().enumerate() {
                let length = row[place..].first_chunk::<4>().map_or(-1, |word| i32::from_be_bytes(*word));
                place += 4;
                let Ok(length) = usize::try_from(length) else {
                    builder.append_null();
                    continue;
                };
                let raw = &row[place..place + length];
                place += length;
                if let Err(misfit) = builder.append(raw) {
                    self.at += place as u64;
                    return Err(self.value_error(column, length, misfit));
                }
                if matches!(builder, Builder::Text(_)) {
                    self.batch_bytes += length;
                }
            }
            *bytes = rest;
            self.at += length as u64;
            self.rows += 1;
            self.batch_rows += 1;
            if self.batch_rows >= self.limits.batch_rows || self.batch_bytes >= self.limits.batch_bytes {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The length of the row at the front of `bytes`; `None` where it is not whole, or no row of these columns.
    fn whole_row(&self, bytes: &[u8]) -> Option<usize> {
        let count = bytes.first_chunk::<2>()?;
        if usize::from(u16::from_be_bytes(*count)) != self.columns.len() {
            return None;
        }
        let mut place = 2;
        for _ in &self.columns {
            let length = i32::from_be_bytes(*bytes.get(place..)?.first_chunk::<4>()?);
            place += 4;
            if length != -1 {
                let length = usize::try_from(length).ok().filter(|length| *length <= self.limits.value_bytes)?;
                place += length;
            }
        }
        (place <= bytes.len()).then_some(place)
    }

    /// Takes one complete unit; says whether the batch is full.
    fn accept(&mut self, unit: &[u8]) -> Result<bool, CopyError> {
        match self.next {
            Next::Header => {
                self.next = self.header(unit)?;
                Ok(false)
            }
            Next::FieldCount => {
                self.next = match unit {
                    [0xff, 0xff] => Next::End,
                    [a, b] if usize::from(u16::from_be_bytes([*a, *b])) == self.columns.len() => Next::Length { column: 0 },
                    other => {
                        let expected = format!("{} columns, or the trailer 0xffff", self.columns.len());
                        return Err(self.format_error(other, format!("a row of {} columns", hex(other)), expected));
                    }
                };
                Ok(false)
            }
            Next::Length { column } => {
                let length = unit.iter().fold(0_u32, |n, byte| n << 8 | u32::from(*byte)) as i32;
                if length == -1 {
                    self.builders[column].append_null();
                    return Ok(self.after(column));
                }
                match usize::try_from(length) {
                    Ok(length) if length <= self.limits.value_bytes => {
                        self.next = Next::Value { column, length };
                        Ok(false)
                    }
                    _ => {
                        let expected = format!("-1 for null, or 0 to {} bytes", self.limits.value_bytes);
                        Err(self.value_error(column, unit.len(), (format!("length {length}"), expected)))
                    }
                }
            }
            Next::Value { column, .. } => {
                if let Err(misfit) = self.builders[column].append(unit) {
                    return Err(self.value_error(column, unit.len(), misfit));
                }
                if matches!(self.columns[column].kind, CopyType::Text) {
                    self.batch_bytes += unit.len();
                }
                Ok(self.after(column))
            }
            // These take no units.
            Next::Extension { .. } | Next::End | Next::Failed => Ok(false),
        }
    }

    fn after(&mut self, column: usize) -> bool {
        if column + 1 < self.columns.len() {
            self.next = Next::Length { column: column + 1 };
            return false;
        }
        self.next = Next::FieldCount;
        self.rows += 1;
        self.batch_rows += 1;
        self.batch_rows >= self.limits.batch_rows || self.batch_bytes >= self.limits.batch_bytes
    }

    fn header(&self, unit: &[u8]) -> Result<Next, CopyError> {
        let (signature, rest) = unit.split_at(SIGNATURE.len());
        if signature != SIGNATURE {
            return Err(self.format_error(unit, hex(signature), format!("the signature {}", hex(SIGNATURE))));
        }
        let (flags, length) = rest.split_at(4);
        // The upper half is critical: bit 16 announces row ids, the others are not defined.
        if flags[..2] != [0, 0] {
            return Err(self.format_error(unit, format!("flags {}", hex(flags)), "none of the upper 16 flags".into()));
        }
        let length = length.iter().fold(0_u32, |n, byte| n << 8 | u32::from(*byte));
        if i32::try_from(length).is_err() {
            return Err(self.format_error(unit, format!("a header extension of {length} bytes"), "at most 2^31 - 1".into()));
        }
        Ok(Next::Extension { left: length.into() })
    }

    fn format_error(&self, unit: &[u8], found: String, expected: String) -> CopyError {
        let row = if self.next == Next::Header { 0 } else { self.rows + 1 };
        CopyError::Format { at: self.at - unit.len() as u64, row, found, expected }
    }

    fn value_error(&self, column: usize, unit_bytes: usize, (found, expected): Misfit) -> CopyError {
        let column = self.columns[column].name.clone();
        CopyError::Value { at: self.at - unit_bytes as u64, row: self.rows + 1, column, found, expected }
    }

    fn flush(&mut self) -> Result<RecordBatch, CopyError> {
        (self.batch_rows, self.batch_bytes) = (0, 0);
        let arrays = self.builders.iter_mut().map(Builder::finish).collect();
        RecordBatch::try_new(self.schema.clone(), arrays).map_err(|e| CopyError::Setup {
            place: "a batch".into(),
            found: e.to_string(),
            expected: "columns as in the schema".into(),
        })
    }
}

/// Begins a COPY stream.
pub fn write_header(out: &mut Vec<u8>) {
    out.extend_from_slice(SIGNATURE);
    out.extend_from_slice(&[0; HEADER_BYTES - SIGNATURE.len()]);
}

/// Ends a COPY stream.
pub fn write_trailer(out: &mut Vec<u8>) {
    out.extend_from_slice(&[0xff, 0xff]);
}

fn write_value(raw: &[u8], out: &mut Vec<u8>) -> Result<(), Misfit> {
    let length = i32::try_from(raw.len()).map_err(|_| (format!("{} bytes", raw.len()), "at most 2^31 - 1".to_owned()))?;
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(raw);
    Ok(())
}

fn write_numeric(value: i128, scale: u8, out: &mut Vec<u8>) -> Result<(), Misfit> {
    let mut rest = value.unsigned_abs();
    // Groups of four digits, from the last; the first taken after the point may be shorter.
    let mut digits: Vec<u16> = Vec::with_capacity(12);
    let odd = u32::from(scale % 4);
    let mut group = |rest: &mut u128, size: u32| {
        let unit = 10_u128.pow(size);
        // A group is below 10,000.
        digits.push(((*rest % unit) as u16) * 10_u16.pow(4 - size));
        *rest /= unit;
    };
    if odd > 0 {
        group(&mut rest, odd);
    }
    for _ in 0..scale / 4 {
        group(&mut rest, 4);
    }
    let after_point = i16::from(scale.div_ceil(4));
    while rest > 0 {
        group(&mut rest, 4);
    }
    let mut weight = digits.len() as i16 - after_point - 1;
    digits.reverse();
    let leading = digits.iter().take_while(|digit| **digit == 0).count();
    digits.drain(..leading);
    weight -= leading as i16;
    while digits.last() == Some(&0) {
        digits.pop();
    }
    if digits.is_empty() {
        weight = 0;
    }
    let mut raw = Vec::with_capacity(8 + digits.len() * 2);
    raw.extend_from_slice(&(digits.len() as u16).to_be_bytes());
    raw.extend_from_slice(&weight.to_be_bytes());
    raw.extend_from_slice(&(if value < 0 { 0x4000_u16 } else { 0 }).to_be_bytes());
    raw.extend_from_slice(&u16::from(scale).to_be_bytes());
    for digit in digits {
        raw.extend_from_slice(&digit.to_be_bytes());
    }
    write_value(&raw, out)
}

fn write_field(array: &ArrayRef, kind: CopyType, row: usize, out: &mut Vec<u8>) -> Result<(), Misfit> {
    if array.is_null(row) {
        out.extend_from_slice(&(-1_i32).to_be_bytes());
        return Ok(());
    }
    match kind {
        CopyType::Text | CopyType::Uuid => write_value(array.as_string::<i32>().value(row).as_bytes(), out),
        CopyType::Bool => write_value(&[u8::from(array.as_boolean().value(row))], out),
        CopyType::Int2 => write_value(&array.as_primitive::<Int16Type>().value(row).to_be_bytes(), out),
        CopyType::Int4 => write_value(&array.as_primitive::<Int32Type>().value(row).to_be_bytes(), out),
        CopyType::Int8 => write_value(&array.as_primitive::<Int64Type>().value(row).to_be_bytes(), out),
        CopyType::Float8 => write_value(&array.as_primitive::<Float64Type>().value(row).to_be_bytes(), out),
        CopyType::Numeric { scale, .. } => write_numeric(array.as_primitive::<Decimal128Type>().value(row), scale, out),
        CopyType::Date => {
            let days = array.as_primitive::<Date32Type>().value(row);
            let days = days.checked_sub(EPOCH_DAYS).filter(|d| *d != i32::MIN);
            let days = days.ok_or_else(|| ("a day before all others".to_owned(), "a day PostgreSQL can hold".to_owned()))?;
            write_value(&days.to_be_bytes(), out)
        }
        CopyType::Timestamp => {
            let micros = array.as_primitive::<TimestampMicrosecondType>().value(row);
            let micros = micros.checked_sub(EPOCH_MICROS).filter(|t| *t != i64::MIN);
            let micros =
                micros.ok_or_else(|| ("a time before all others".to_owned(), "a time PostgreSQL can hold".to_owned()))?;
            write_value(&micros.to_be_bytes(), out)
        }
    }
}

/// Appends rows `from..to` of a batch to a COPY stream.
///
/// # Errors
/// [`CopyError::Setup`] for an Arrow type without a wire type, [`CopyError::Value`] for a value that PostgreSQL
/// cannot hold; `out` then holds part of a row and is of no use.
pub fn write_rows(batch: &RecordBatch, from: usize, to: usize, out: &mut Vec<u8>) -> Result<(), CopyError> {
    let schema = batch.schema();
    let kinds = schema
        .fields()
        .iter()
        .map(|field| {
            CopyType::of(field.data_type()).ok_or_else(|| CopyError::Setup {
                place: field.name().clone(),
                found: field.data_type().to_string(),
                expected: "string, boolean, int16 to int64, float64, decimal, date or timestamp in microseconds UTC".into(),
            })
        })
        .collect::<Result<Vec<_>, _>>()?;
    let count = i16::try_from(kinds.len()).map_err(|_| CopyError::Setup {
        place: "a batch".into(),
        found: format!("{} columns", kinds.len()),
        expected: "at most 32,767".into(),
    })?;
    for row in from..to.min(batch.num_rows()) {
        out.extend_from_slice(&count.to_be_bytes());
        for ((array, kind), field) in batch.columns().iter().zip(&kinds).zip(schema.fields()) {
            write_field(array, *kind, row, out).map_err(|(found, expected)| CopyError::Value {
                at: out.len() as u64,
                row: row as u64 + 1,
                column: field.name().clone(),
                found,
                expected,
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use arrow::compute::concat_batches;
    use proptest::prelude::*;

    use super::*;

    fn column(name: &str, kind: CopyType) -> CopyColumn {
        CopyColumn { name: name.into(), kind }
    }

    fn all_kinds() -> Vec<CopyColumn> {
        vec![
            column("texto", CopyType::Text),
            column("activo", CopyType::Bool),
            column("pequeno", CopyType::Int2),
            column("mediano", CopyType::Int4),
            column("grande", CopyType::Int8),
            column("tasa", CopyType::Float8),
            column("monto", CopyType::Numeric { precision: 38, scale: 6 }),
            column("fecha", CopyType::Date),
            column("timestamp_venta", CopyType::Timestamp),
        ]
    }

    fn limits(batch_rows: usize) -> CopyLimits {
        CopyLimits { batch_rows, batch_bytes: 1 << 20, value_bytes: 1 << 16 }
    }

    /// Feeds a stream in chunks of the given sizes, taken in turn.
    fn decode(
        columns: &[CopyColumn],
        limits: CopyLimits,
        stream: &[u8],
        chunks: &[usize],
    ) -> Result<Vec<RecordBatch>, CopyError> {
        let mut decoder = CopyDecoder::new(columns.to_vec(), limits)?;
        let (mut batches, mut rest, mut turn) = (Vec::new(), stream, 0);
        while !rest.is_empty() {
            let (mut chunk, later) = rest.split_at(chunks[turn % chunks.len()].clamp(1, rest.len()));
            (rest, turn) = (later, turn + 1);
            while !chunk.is_empty() {
                batches.extend(decoder.decode(&mut chunk)?);
            }
        }
        batches.extend(decoder.finish()?);
        Ok(batches)
    }

    fn stream_of(batch: &RecordBatch) -> Vec<u8> {
        let mut out = Vec::new();
        write_header(&mut out);
        write_rows(batch, 0, batch.num_rows(), &mut out).expect("the rows can be written");
        write_trailer(&mut out);
        out
    }

    /// A stream of one row with one column, of which the raw value is given.
    fn one(raw: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write_header(&mut out);
        out.extend_from_slice(&[0, 1]);
        write_value(raw, &mut out).expect("short");
        write_trailer(&mut out);
        out
    }

    /// A numeric by its words: weight, sign, digits after the point, digits to the base 10,000.
    fn numeric(weight: i16, sign: u16, dscale: u16, digits: &[u16]) -> Vec<u8> {
        let head = [digits.len() as u16, weight as u16, sign, dscale];
        head.iter().chain(digits).flat_map(|word| word.to_be_bytes()).collect()
    }

    fn decimal(raw: &[u8], precision: u8, scale: u8) -> Result<i128, CopyError> {
        let columns = [column("monto", CopyType::Numeric { precision, scale })];
        let batches = decode(&columns, limits(10), &one(raw), &[1_000])?;
        Ok(batches[0].column(0).as_primitive::<Decimal128Type>().value(0))
    }

    #[test]
    fn numerics_are_exact() {
        // 12345.67 is 1 x 10,000^1 + 2,345 x 10,000^0 + 6,700 x 10,000^-1.
        let cents = numeric(1, 0, 2, &[1, 2_345, 6_700]);
        assert_eq!(decimal(&cents, 10, 2), Ok(1_234_567));
        assert_eq!(decimal(&cents, 12, 4), Ok(123_456_700));
        assert_eq!(decimal(&numeric(1, 0x4000, 2, &[1, 2_345, 6_700]), 10, 2), Ok(-1_234_567));
        assert_eq!(decimal(&numeric(0, 0, 2, &[]), 10, 2), Ok(0));
        assert_eq!(decimal(&numeric(-1, 0, 2, &[100]), 10, 2), Ok(1));
        assert_eq!(decimal(&numeric(2, 0, 0, &[5]), 10, 0), Ok(500_000_000));
        assert_eq!(decimal(&numeric(1, 0, 2, &[9_999, 9_999, 9_900]), 10, 2), Ok(9_999_999_999));
    }

    #[test]
    fn a_numeric_that_does_not_fit_is_named() {
        let cases = [
            (numeric(0, 0xc000, 0, &[]), "NaN", "a number"),
            (numeric(0, 0xd000, 0, &[]), "Infinity", "a number"),
            (numeric(0, 0xf000, 0, &[]), "-Infinity", "a number"),
            // One cent more than numeric(10,2) holds.
            (numeric(2, 0, 2, &[1, 0, 0]), "100000000.00", "a numeric(10,2)"),
            (numeric(2, 0x4000, 2, &[1, 0, 0]), "-100000000.00", "a numeric(10,2)"),
            // A third decimal is not rounded away.
            (numeric(0, 0, 3, &[1, 50]), "1.005", "a numeric(10,2)"),
            (numeric(32_767, 0, 0, &[1]), "1000000000000000", "a numeric(10,2)"),
            (numeric(-32_768, 0, 3, &[1]), "0.000", "a numeric(10,2)"),
            (numeric(0, 0x1234, 0, &[1]), "sign 0x1234", "a numeric with sign 0x0000 or 0x4000"),
            (numeric(0, 0, 0, &[10_000]), "digit 10000", "digits to the base 10,000"),
            (numeric(0, 0, 0x4000, &[1]), "16384 digits after the point", "at most 16383"),
            (vec![0, 2, 0, 0, 0, 0, 0, 0, 0, 1], "10 bytes", "a numeric of 12 bytes"),
            (vec![0, 0], "2 bytes", "a numeric of at least 8 bytes"),
        ];
        for (raw, want_found, want_expected) in cases {
            match decimal(&raw, 10, 2) {
                Err(CopyError::Value { at: 25, row: 1, column, found, expected }) => {
                    assert_eq!(column, "monto");
                    assert!(found.starts_with(want_found), "{found}");
                    assert_eq!(expected, want_expected);
                }
                other => panic!("{want_found}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_scale_of_a_stream_is_its_longest_numbers() {
        let mut stream = Vec::new();
        write_header(&mut stream);
        for (dscale, text) in [(2, "x"), (16, "12345678"), (0, "")] {
            stream.extend_from_slice(&[0, 2]);
            write_value(&numeric(0, 0, dscale, &[1]), &mut stream).expect("short");
            write_value(text.as_bytes(), &mut stream).expect("short");
        }
        write_trailer(&mut stream);
        assert_eq!(numeric_scales(&stream, &[true, false]), [16, 0]);
        assert_eq!(numeric_scales(&stream[..40], &[true, false]), [2, 0]);
        assert_eq!(numeric_scales(&[], &[true, false]), [0, 0]);
    }

    #[test]
    fn a_long_numeric_is_shown_in_part() {
        let error = decimal(&numeric(30_000, 0, 2, &[1]), 10, 2).unwrap_err().to_string();
        assert!(error.len() < 250, "{error}");
    }

    #[test]
    fn infinite_days_and_times_are_errors() {
        for (kind, raw, found) in [
            (CopyType::Date, i32::MAX.to_be_bytes().to_vec(), "infinity"),
            (CopyType::Date, i32::MIN.to_be_bytes().to_vec(), "-infinity"),
            (CopyType::Timestamp, i64::MAX.to_be_bytes().to_vec(), "infinity"),
            (CopyType::Timestamp, i64::MIN.to_be_bytes().to_vec(), "-infinity"),
            // The last years PostgreSQL has are beyond what microseconds since 1970 can count.
            (CopyType::Timestamp, (i64::MAX - 1).to_be_bytes().to_vec(), "microsecond 9223372036854775806 after 2000-01-01"),
        ] {
            let error = decode(&[column("fecha", kind)], limits(10), &one(&raw), &[7]).unwrap_err();
            let text = error.to_string();
            assert!(text.starts_with(&format!("byte 25, row 1, column fecha: found {found}, expected ")), "{text}");
        }
    }

    #[test]
    fn days_and_times_count_from_1970() {
        let columns = [column("fecha", CopyType::Date)];
        let batches = decode(&columns, limits(10), &one(&0_i32.to_be_bytes()), &[9]).expect("a day");
        assert_eq!(batches[0].column(0).as_primitive::<Date32Type>().value(0), 10_957);
        let columns = [column("timestamp_venta", CopyType::Timestamp)];
        let batches = decode(&columns, limits(10), &one(&(-1_i64).to_be_bytes()), &[9]).expect("a time");
        let micros = batches[0].column(0).as_primitive::<TimestampMicrosecondType>().value(0);
        assert_eq!(micros, 946_684_799_999_999);
    }

    #[test]
    fn a_uuid_is_text() {
        let columns = [column("order_id", CopyType::Uuid)];
        let raw: Vec<u8> = (0..16).map(|i| i * 17).collect();
        let batches = decode(&columns, limits(10), &one(&raw), &[3]).expect("a uuid");
        assert_eq!(batches[0].column(0).as_string::<i32>().value(0), "00112233-4455-6677-8899-aabbccddeeff");
    }

    #[test]
    fn damage_is_named_with_its_place() {
        let columns = [column("order_id", CopyType::Text)];
        let good = one(b"17");
        let with = |at: usize, bytes: &[u8]| {
            let mut stream = good.clone();
            stream[at..at + bytes.len()].copy_from_slice(bytes);
            stream
        };
        let mut longer = good.clone();
        longer.push(7);
        let cases = [
            (with(0, b"X"), "byte 0, row 0: found 0x5847434f50590aff0d0a00, expected the signature 0x5047434f50590aff0d0a00"),
            (with(11, &[0, 1]), "byte 0, row 0: found flags 0x00010000, expected none of the upper 16 flags"),
            (with(15, &[0xff]), "byte 0, row 0: found a header extension of 4278190080 bytes, expected at most 2^31 - 1"),
            (with(19, &[0, 2]), "byte 19, row 1: found a row of 0x0002 columns, expected 1 columns, or the trailer 0xffff"),
            (
                with(21, &[0xff, 0xff, 0xff, 0xfe]),
                "byte 21, row 1, column order_id: found length -2, expected -1 for null, or 0 to 65536 bytes",
            ),
            (
                with(21, &[0x7f, 0xff, 0xff, 0xff]),
                "byte 21, row 1, column order_id: found length 2147483647, expected -1 for null, or 0 to 65536 bytes",
            ),
            (with(25, &[0xc3, 0x28]), "byte 25, row 1, column order_id: found 0xc328, expected text in UTF-8"),
            (longer, "byte 29, row 1: found 0x07, expected nothing after the trailer"),
        ];
        for (stream, message) in cases {
            for chunks in [[1], [1_000]] {
                assert_eq!(decode(&columns, limits(10), &stream, &chunks).unwrap_err().to_string(), message);
            }
        }
    }

    #[test]
    fn a_cut_stream_is_never_taken_for_whole() {
        let stream = one(b"17");
        let columns = [column("order_id", CopyType::Text)];
        for length in 0..stream.len() {
            let error = decode(&columns, limits(10), &stream[..length], &[5]).unwrap_err();
            assert!(matches!(error, CopyError::Truncated { at, .. } if at == length as u64), "{length}: {error}");
        }
    }

    #[test]
    fn a_decoder_stays_stopped_after_an_error() {
        let mut decoder = CopyDecoder::new(vec![column("order_id", CopyType::Text)], limits(10)).expect("columns");
        assert!(decoder.decode(&mut [0_u8; 19].as_slice()).is_err());
        assert_eq!(decoder.decode(&mut one(b"1").as_slice()), Err(CopyError::Stopped { at: 19 }));
        assert_eq!(decoder.finish(), Err(CopyError::Stopped { at: 19 }));
    }

    #[test]
    fn long_text_ends_a_batch_before_its_rows_do() {
        let schema = Arc::new(Schema::new(vec![Field::new("texto", DataType::Utf8, true)]));
        let texts: ArrayRef = Arc::new(arrow::array::StringArray::from(vec!["0123456789"; 10]));
        let stream = stream_of(&RecordBatch::try_new(schema, vec![texts]).expect("a batch"));
        let limits = CopyLimits { batch_rows: 100, batch_bytes: 25, value_bytes: 100 };
        let batches = decode(&[column("texto", CopyType::Text)], limits, &stream, &[4]).expect("rows");
        assert_eq!(batches.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [3, 3, 3, 1]);
    }

    prop_compose! {
        fn row()(
            texto in proptest::option::of(".{0,12}"),
            activo in any::<Option<bool>>(),
            pequeno in any::<Option<i16>>(),
            mediano in any::<Option<i32>>(),
            grande in any::<Option<i64>>(),
            tasa in any::<Option<u64>>(),
            monto in proptest::option::of(prop_oneof![
                -10_i128.pow(38) + 1..10_i128.pow(38),
                -1_000_000_000_i128..1_000_000_000,
                Just(0)
            ]),
            fecha in proptest::option::of(-700_000_i32..3_000_000),
            momento in proptest::option::of(-200_000_000_000_000_000_i64..200_000_000_000_000_000),
        ) -> (Option<String>, Option<bool>, Option<i16>, Option<i32>, Option<i64>, Option<f64>, Option<i128>, Option<i32>, Option<i64>) {
            (texto, activo, pequeno, mediano, grande, tasa.map(f64::from_bits), monto, fecha, momento)
        }
    }

    prop_compose! {
        fn batch()(rows in proptest::collection::vec(row(), 0..40)) -> RecordBatch {
            let mut builders: Vec<Builder> = all_kinds().iter().map(|c| Builder::new(c.kind, 40)).collect();
            for (texto, activo, pequeno, mediano, grande, tasa, monto, fecha, momento) in rows {
                for builder in &mut builders {
                    match builder {
                        Builder::Text(b) | Builder::Uuid(b) => b.append_option(texto.as_deref()),
                        Builder::Bool(b) => b.append_option(activo),
                        Builder::Int2(b) => b.append_option(pequeno),
                        Builder::Int4(b) => b.append_option(mediano),
                        Builder::Int8(b) => b.append_option(grande),
                        Builder::Float8(b) => b.append_option(tasa),
                        Builder::Numeric { builder, .. } => builder.append_option(monto),
                        Builder::Date(b) => b.append_option(fecha),
                        Builder::Timestamp(b) => b.append_option(momento),
                    }
                }
            }
            let fields = all_kinds().iter().map(|c| Field::new(&c.name, c.kind.data_type(), true)).collect::<Vec<_>>();
            RecordBatch::try_new(Arc::new(Schema::new(fields)), builders.iter_mut().map(Builder::finish).collect()).expect("a batch")
        }
    }

    /// Bit for bit: NaN equals itself, and -0.0 is not 0.0.
    fn bits(batch: &RecordBatch) -> String {
        let mut out = Vec::new();
        write_rows(batch, 0, batch.num_rows(), &mut out).expect("the rows can be written");
        format!("{:?} {out:?}", batch.schema())
    }

    proptest! {
        #[test]
        fn rows_come_back_whatever_the_chunks(
            batch in batch(),
            chunks in proptest::collection::vec(1_usize..60, 1..20),
            batch_rows in 1_usize..20,
        ) {
            let stream = stream_of(&batch);
            let batches = decode(&all_kinds(), limits(batch_rows), &stream, &chunks).expect("a good stream");
            for got in batches.iter().rev().skip(1) {
                prop_assert_eq!(got.num_rows(), batch_rows);
            }
            // Equal arrays and equal bytes: neither direction hides what the other does wrong.
            let whole = concat_batches(&batch.schema(), &batches).expect("one schema");
            prop_assert_eq!(bits(&whole), bits(&batch));
            for (got, sent) in whole.columns().iter().zip(batch.columns()).filter(|(c, _)| c.data_type() != &DataType::Float64) {
                prop_assert_eq!(got, sent);
            }
            prop_assert_eq!(decode(&all_kinds(), limits(batch_rows), &stream, &[stream.len()]).map(|b| b.len()), Ok(batches.len()));
        }

        #[test]
        fn damaged_streams_are_judged_alike_whatever_the_chunks(
            batch in batch(),
            changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6),
            cut in any::<proptest::sample::Index>(),
            chunks in proptest::collection::vec(1_usize..60, 1..20),
        ) {
            let mut stream = stream_of(&batch);
            for (at, byte) in changes {
                let at = at.index(stream.len());
                stream[at] = byte;
            }
            stream.truncate(cut.index(stream.len()) + 1);
            let whole = decode(&all_kinds(), limits(7), &stream, &[stream.len()]);
            let parts = decode(&all_kinds(), limits(7), &stream, &chunks);
            match (whole, parts) {
                (Ok(whole), Ok(parts)) => prop_assert_eq!(
                    whole.iter().map(bits).collect::<Vec<_>>(),
                    parts.iter().map(bits).collect::<Vec<_>>()
                ),
                // What follows the trailer is shown as far as it has arrived.
                (Err(CopyError::Format { at: a, row: r, expected: e, .. }), Err(CopyError::Format { at, row, expected, .. })) => {
                    prop_assert_eq!((a, r, e), (at, row, expected));
                }
                (whole, parts) => prop_assert_eq!(whole.map(|b| b.len()), parts.map(|b| b.len())),
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), chunk in 1_usize..50, whole in any::<bool>()) {
            let mut stream = Vec::new();
            if whole {
                write_header(&mut stream);
            }
            stream.extend(bytes);
            let _ = decode(&all_kinds(), limits(3), &stream, &[chunk]);
            let _ = numeric_scales(&stream, &[true; 9]);
        }

        #[test]
        fn the_quick_way_to_a_number_is_the_long_way(
            weight in -4_i16..6, sign in prop_oneof![Just(0_u16), Just(0x4000), Just(0xc000)], dscale in 0_u16..20,
            digits in proptest::collection::vec(prop_oneof![Just(0_u16), 0_u16..10_001, (0_u16..100).prop_map(|d| d * 100)], 0..7),
            precision in 1_u8..=20, scale in 0_u8..=20,
        ) {
            let scale = scale.min(precision);
            let raw = numeric(weight, sign, dscale, &digits);
            let long = Numeric::parse(&raw).and_then(|n| n.scaled(precision, scale));
            if let Some(short) = short_numeric(&raw, precision, scale) {
                prop_assert_eq!(long, Ok(short.into()));
            } else if let Ok(long) = long {
                // It is the common numbers that are quick: few digits, of a few places.
                prop_assert!(precision > 18 || weight > 3 || digits.len() > 5 || scale > 4, "{} was not quick", long);
            }
        }

        #[test]
        fn a_numeric_of_any_words_is_a_number_or_an_error(
            weight in any::<i16>(), sign in prop_oneof![Just(0_u16), Just(0x4000), any::<u16>()], dscale in any::<u16>(),
            digits in proptest::collection::vec(prop_oneof![0_u16..10_000, any::<u16>()], 0..12),
            precision in 1_u8..=38, scale in 0_u8..=38,
        ) {
            let scale = scale.min(precision);
            for weight in [weight, weight % 12] {
                if let Ok(value) = decimal(&numeric(weight, sign, dscale, &digits), precision, scale) {
                    prop_assert!(value.unsigned_abs() < 10_u128.pow(precision.into()));
                }
            }
        }
    }
}
