//! Batches of records from a topic, decoded straight into Arrow columns.
//!
//! A record is Confluent's: a zero byte, the writer's schema id (big endian), and Avro's binary encoding, to its last byte.
//! One that cannot be decoded is rejected with its index and reason, and the others of the batch are decoded all the same;
//! so each input has exactly one fate. Records of several writers may stand in one batch in any order. What this leaves
//! out: what a decoded event means; whether a region is valid is the contract's business.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use arrow::{array::RecordBatch, datatypes::SchemaRef};
use bytes::Bytes;

use super::{
    columns::Columns,
    cursor::{Cursor, integer, utf8},
    resolve::{Constant, Plan, Read, Reader},
    schema::{Kind, Node, Primitive, Schema, SchemaError},
};
use crate::ports::{PortError, Result, SchemaRegistry, event_log::LogRecord, schema_registry::SCHEMA_NOT_FOUND};

/// Bytes in front of each record: zero, and the id.
pub const HEADER_BYTES: usize = 5;
/// Most schemas of writers that a decoder keeps; above it, it forgets them all and asks the registry again.
pub const WRITERS_MAX: usize = 1024;
/// Deepest nesting of a value that is skipped.
const SKIP_DEPTH_MAX: usize = 64;
/// Most values without bytes (nulls in an array, say) that one record may make a reader skip, beside one for each byte.
const EMPTY_VALUES_MAX: usize = 1024;

/// What has a value to decode: a record of a topic, or the value alone.
pub trait Record: Sync {
    /// The value; `None` is a tombstone.
    fn value(&self) -> Option<&[u8]>;
}

impl Record for Option<Bytes> {
    fn value(&self) -> Option<&[u8]> {
        self.as_deref()
    }
}

impl Record for LogRecord {
    fn value(&self) -> Option<&[u8]> {
        self.value.as_deref()
    }
}

/// Bounds of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest record, in bytes with its header; a longer one is rejected unread.
    pub record_bytes_max: usize,
}

/// Why a record is no row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RejectReason {
    /// It has no value.
    Tombstone,
    /// It is longer than [`Limits::record_bytes_max`].
    TooLarge {
        /// Length, in bytes.
        bytes: usize,
        /// Limit, in bytes.
        max: usize,
    },
    /// It does not begin with a zero byte and an id.
    NoHeader,
    /// The registry has no schema of this id.
    UnknownSchema(u32),
    /// The registry has this schema, but the reader cannot read what it wrote.
    IncompatibleSchema {
        /// Id of the writer's schema.
        id: u32,
        /// Every reason.
        problems: Arc<str>,
    },
    /// It ends before its last field does.
    Truncated,
    /// It is not what its schema says; the text says what was found.
    Malformed(&'static str),
    /// A decimal has more digits than the reader's type.
    OutOfRange,
    /// Bytes follow the last field.
    TrailingBytes(usize),
}

impl RejectReason {
    /// A name of the kind of reason, for a metric's label or a header of the dead-letter topic.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Tombstone => "tombstone",
            Self::TooLarge { .. } => "too_large",
            Self::NoHeader => "no_header",
            Self::UnknownSchema(_) => "unknown_schema",
            Self::IncompatibleSchema { .. } => "incompatible_schema",
            Self::Truncated => "truncated",
            Self::Malformed(_) => "malformed",
            Self::OutOfRange => "out_of_range",
            Self::TrailingBytes(_) => "trailing_bytes",
        }
    }
}

impl fmt::Display for RejectReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tombstone => f.write_str("the record has no value"),
            Self::TooLarge { bytes, max } => write!(f, "{bytes} bytes, at most {max} are allowed"),
            Self::NoHeader => f.write_str("the record does not begin with a zero byte and a schema id"),
            Self::UnknownSchema(id) => write!(f, "the registry has no schema {id}"),
            Self::IncompatibleSchema { id, problems } => write!(f, "what schema {id} wrote cannot be read: {problems}"),
            Self::Truncated => f.write_str("the record ends before its last field does"),
            Self::Malformed(what) => f.write_str(what),
            Self::OutOfRange => f.write_str("a decimal has more digits than its type"),
            Self::TrailingBytes(n) => write!(f, "{n} bytes follow the last field"),
        }
    }
}

/// A record that is no row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reject {
    /// Its index in the input.
    pub index: u32,
    /// Why.
    pub reason: RejectReason,
}

/// What became of a batch: `rows` and the indices of `rejects` rise, and together they are every index of the input, once.
#[derive(Debug, Clone)]
pub struct DecodedBatch {
    /// The rows, with the reader's columns.
    pub batch: RecordBatch,
    /// Index in the input of each row of `batch`.
    pub rows: Vec<u32>,
    /// The others.
    pub rejects: Vec<Reject>,
}

/// What is known of an id. An id never changes its schema, so this is kept.
#[derive(Debug)]
enum Writer {
    Plan(Plan),
    Refused(RejectReason),
}

/// Decodes records of one reader's schema, whatever compatible schema wrote them.
#[derive(Debug)]
pub struct Decoder {
    reader: Reader,
    limits: Limits,
    writers: BTreeMap<u32, Writer>,
}

/// Why the rest of a batch cannot be decoded.
#[derive(Debug)]
enum Stop {
    Reject(RejectReason),
    /// A column would pass 2 GiB.
    BatchFull,
}

impl From<RejectReason> for Stop {
    fn from(reason: RejectReason) -> Self {
        Self::Reject(reason)
    }
}

impl Decoder {
    /// A decoder into the columns of `reader`, a record schema.
    ///
    /// # Errors
    /// When it is no record of primitive, enum, fixed or nullable fields.
    pub fn new(reader: &str, limits: Limits) -> Result<Self, SchemaError> {
        Ok(Self { reader: Reader::new(reader)?, limits, writers: BTreeMap::new() })
    }

    /// The columns of every batch. A decimal is `Decimal128`, a timestamp has the zone `+00:00`.
    pub fn schema(&self) -> SchemaRef {
        self.reader.arrow.clone()
    }

    /// Decodes a batch. Asks the registry for each schema id that it meets for the first time; an id that the registry does
    /// not know is asked for again with the next batch.
    ///
    /// # Errors
    /// The registry's, unless it says that it has no such id: nothing is rejected because a registry is down. `Permanent`
    /// when a column would pass 2 GiB: decode fewer records at a time.
    pub async fn decode<R: Record>(&mut self, registry: &dyn SchemaRegistry, records: &[R]) -> Result<DecodedBatch> {
        for id in self.unknown(records) {
            match registry.schema(id).await {
                Ok(text) => self.learn(id, &text),
                Err(error) if error.code.as_deref() == Some(SCHEMA_NOT_FOUND) => {}
                Err(error) => return Err(error),
            }
        }
        self.decode_known(records)
    }

    /// Ids in the headers of records that nothing is known of.
    fn unknown<R: Record>(&mut self, records: &[R]) -> BTreeSet<u32> {
        let (mut new, mut last) = (BTreeSet::new(), None);
        for (id, _) in records.iter().filter_map(|r| header(r.value()?).ok()) {
            // Mostly the id of the record before.
            if last.replace(id) != Some(id) && !self.writers.contains_key(&id) {
                new.insert(id);
            }
        }
        if !new.is_empty() && self.writers.len() + new.len() > WRITERS_MAX {
            // Far from any real topic: all are forgotten, and those of this batch are asked for.
            self.writers.clear();
            new = records.iter().filter_map(|r| header(r.value()?).ok()).map(|(id, _)| id).collect();
        }
        new
    }

    /// Takes note of the schema that has this id.
    pub fn learn(&mut self, id: u32, text: &str) {
        let plan = Schema::parse(text).map_err(|e| e.to_string()).and_then(|writer| self.reader.plan(writer));
        let writer = match plan {
            Ok(plan) => Writer::Plan(plan),
            Err(problems) => Writer::Refused(RejectReason::IncompatibleSchema { id, problems: problems.into() }),
        };
        self.writers.insert(id, writer);
    }

    /// Decodes a batch with the schemas that are known; any other id is [`RejectReason::UnknownSchema`].
    ///
    /// # Errors
    /// `Permanent` when a column would pass 2 GiB.
    pub fn decode_known<R: Record>(&self, records: &[R]) -> Result<DecodedBatch> {
        let full = |what: &str| PortError::permanent(format!("decode {} records: {what}; decode fewer at a time", records.len()));
        if u32::try_from(records.len()).is_err() {
            return Err(full("an index is 32 bits"));
        }
        let mut columns = Columns::new(&self.reader.columns, records.len());
        let (mut rows, mut rejects) = (Vec::with_capacity(records.len()), Vec::new());
        let mut last: Option<(u32, &Writer)> = None;
        for (index, record) in (0_u32..).zip(records) {
            match self.record(record.value(), &mut last, &mut columns) {
                Ok(()) => rows.push(index),
                Err(Stop::Reject(reason)) => {
                    columns.truncate(rows.len());
                    rejects.push(Reject { index, reason });
                }
                Err(Stop::BatchFull) => return Err(full("a column would pass 2 GiB")),
            }
        }
        let build = |e| PortError::permanent("build the columns of decoded records").because(e);
        let arrays = self.reader.columns.iter().map(|c| columns.take(c)).collect::<Result<Vec<_>, _>>().map_err(build)?;
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(rows.len()));
        let batch = RecordBatch::try_new_with_options(self.schema(), arrays, &options).map_err(build)?;
        Ok(DecodedBatch { batch, rows, rejects })
    }

    fn record<'a>(
        &'a self,
        record: Option<&[u8]>,
        last: &mut Option<(u32, &'a Writer)>,
        columns: &mut Columns,
    ) -> Result<(), Stop> {
        let record = record.ok_or(RejectReason::Tombstone)?;
        let max = self.limits.record_bytes_max;
        if record.len() > max {
            return Err(RejectReason::TooLarge { bytes: record.len(), max }.into());
        }
        let (id, body) = header(record)?;
        let writer = match *last {
            Some((known, writer)) if known == id => writer,
            _ => self.writers.get(&id).ok_or(RejectReason::UnknownSchema(id))?,
        };
        *last = Some((id, writer));
        let plan = match writer {
            Writer::Plan(plan) => plan,
            Writer::Refused(reason) => return Err(reason.clone().into()),
        };
        let mut run = Run { cursor: Cursor { rest: body }, empty_left: body.len() + EMPTY_VALUES_MAX, plan };
        for read in &plan.reads {
            run.read(read, columns)?;
        }
        match run.cursor.rest.len() {
            0 => Ok(()),
            n => Err(RejectReason::TrailingBytes(n).into()),
        }
    }
}

/// Id of the writer's schema, and what follows.
///
/// # Errors
/// [`RejectReason::NoHeader`].
pub fn header(record: &[u8]) -> Result<(u32, &[u8]), RejectReason> {
    match record.split_first_chunk::<HEADER_BYTES>() {
        Some(([0, id @ ..], body)) => Ok((u32::from_be_bytes(*id), body)),
        Some(_) | None => Err(RejectReason::NoHeader),
    }
}

/// The reading of one record.
struct Run<'a> {
    cursor: Cursor<'a>,
    /// How many more values without bytes may be skipped; a hostile array has 2^63 of them.
    empty_left: usize,
    plan: &'a Plan,
}

fn kept(pushed: bool) -> Result<(), Stop> {
    if pushed { Ok(()) } else { Err(Stop::BatchFull) }
}

impl Run<'_> {
    #[inline]
    fn read(&mut self, read: &Read, columns: &mut Columns) -> Result<(), Stop> {
        let cursor = &mut self.cursor;
        match read {
            Read::Text(i) => {
                let (from, length) = cursor.text()?;
                return kept(columns.texts[*i].push_first(from, length));
            }
            Read::Long(i) => columns.longs[*i].push(cursor.long()?),
            Read::Decimal(i, limit) => columns.decimals[*i].push(integer(cursor.bytes()?, *limit)?),
            Read::Union(branches) => {
                let branch = cursor.index(branches.len(), "a union branch that the schema does not have")?;
                return self.read(&branches[branch], columns);
            }
            Read::Constant(constant) => return push(constant, columns),
            Read::Boolean(i) => columns.booleans[*i].push(cursor.boolean()?),
            Read::Int(i) => columns.ints[*i].push(cursor.int()?),
            Read::IntToLong(i) => columns.longs[*i].push(cursor.int()?.into()),
            Read::Float(i) => columns.floats[*i].push(cursor.float()?),
            Read::LongToFloat(i) => columns.floats[*i].push(cursor.long()? as f32),
            Read::IntToFloat(i) => columns.floats[*i].push(cursor.int()? as f32),
            Read::Double(i) => columns.doubles[*i].push(cursor.double()?),
            Read::FloatToDouble(i) => columns.doubles[*i].push(cursor.float()?.into()),
            Read::LongToDouble(i) => columns.doubles[*i].push(cursor.long()? as f64),
            Read::IntToDouble(i) => columns.doubles[*i].push(cursor.int()?.into()),
            Read::Binary(i) => return kept(columns.binaries[*i].push(cursor.bytes()?)),
            Read::FixedBinary(i, size) => return kept(columns.binaries[*i].push(cursor.take(*size)?)),
            Read::FixedDecimal(i, size, limit) => columns.decimals[*i].push(integer(cursor.take(*size)?, *limit)?),
            Read::Enum(i, symbols) => {
                let symbol = cursor.index(symbols.len(), "an enum symbol that the schema does not have")?;
                let text = symbols[symbol].as_deref();
                let text = text.ok_or(RejectReason::Malformed("an enum symbol that the reader does not have"))?;
                return kept(columns.texts[*i].push(text));
            }
            Read::Skip(node) => self.skip(node, 0)?,
            Read::Refuse => return Err(RejectReason::Malformed("a union branch that the reader does not take").into()),
        }
        Ok(())
    }

    fn skip(&mut self, node: &Node, depth: usize) -> Result<(), RejectReason> {
        if depth > SKIP_DEPTH_MAX {
            return Err(RejectReason::Malformed("a value nested deeper than 64"));
        }
        let before = self.cursor.rest.len();
        let cursor = &mut self.cursor;
        match node {
            Node::Primitive(primitive, _) => match primitive {
                Primitive::Null => {}
                Primitive::Boolean => _ = cursor.boolean()?,
                Primitive::Int => _ = cursor.int()?,
                Primitive::Long => _ = cursor.long()?,
                Primitive::Float => _ = cursor.float()?,
                Primitive::Double => _ = cursor.double()?,
                Primitive::Bytes => _ = cursor.bytes()?,
                Primitive::String => utf8(cursor.bytes()?)?,
            },
            Node::Array(items) => self.blocks(items, false, depth)?,
            Node::Map(values) => self.blocks(values, true, depth)?,
            Node::Union(branches) => {
                let branch = cursor.index(branches.len(), "a union branch that the schema does not have")?;
                self.skip(&branches[branch], depth + 1)?;
            }
            Node::Named(i) => match &self.plan.writer.named[*i].kind {
                Kind::Record(fields) => {
                    for field in fields {
                        self.skip(&field.node, depth + 1)?;
                    }
                }
                Kind::Enum { symbols, .. } => {
                    cursor.index(symbols.len(), "an enum symbol that the schema does not have")?;
                }
                Kind::Fixed { size, .. } => _ = cursor.take(*size)?,
            },
        }
        if self.cursor.rest.len() == before {
            self.empty_left = self.empty_left.checked_sub(1).ok_or(RejectReason::Malformed("more empty values than bytes"))?;
        }
        Ok(())
    }

    /// Blocks of an array or a map: a count, for a negative one also the size in bytes, then the items; a count of 0 ends.
    fn blocks(&mut self, item: &Node, keys: bool, depth: usize) -> Result<(), RejectReason> {
        loop {
            let count = self.cursor.long()?;
            match count {
                0 => return Ok(()),
                1.. => {
                    for _ in 0..count {
                        if keys {
                            utf8(self.cursor.bytes()?)?;
                        }
                        self.skip(item, depth + 1)?;
                    }
                }
                // The size allows to skip the block unread.
                _ => _ = self.cursor.bytes()?,
            }
        }
    }
}

fn push(constant: &Constant, columns: &mut Columns) -> Result<(), Stop> {
    match constant {
        Constant::Null(slot) => columns.push_null(*slot),
        Constant::Boolean(i, v) => columns.booleans[*i].push(*v),
        Constant::Int(i, v) => columns.ints[*i].push(*v),
        Constant::Long(i, v) => columns.longs[*i].push(*v),
        Constant::Float(i, v) => columns.floats[*i].push(*v),
        Constant::Double(i, v) => columns.doubles[*i].push(*v),
        Constant::Decimal(i, v) => columns.decimals[*i].push(*v),
        Constant::Text(i, v) => return kept(columns.texts[*i].push(v)),
        Constant::Binary(i, v) => return kept(columns.binaries[*i].push(v)),
    }
    Ok(())
}
