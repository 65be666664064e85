//! A plan to read what one writer's schema wrote into the columns of a reader's schema.
//!
//! Resolution happens once per writer's schema, not once per record: the plan is a flat list of reads in the order of the
//! bytes, followed by the defaults of fields that the writer did not know. What it leaves out: nested columns. A reader's
//! field is a primitive, an enum or a fixed, or a union of one of them with null; a writer may have any type, which is
//! skipped where the reader does not ask for it.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field as ArrowField, Schema as ArrowSchema, SchemaRef};
use serde_json::Value;

use super::{
    columns::{Column, Columns, Slot, arrow_type, decimal},
    compatibility::{problems, promotes, same_name, writer_field},
    schema::{Field, Kind, Logical, Node, Primitive, Schema, SchemaError, default_bytes},
};

/// Most problems that a message tells.
const PROBLEMS_SHOWN: usize = 5;

/// A reader's schema and its columns.
#[derive(Debug)]
pub(super) struct Reader {
    pub schema: Schema,
    pub columns: Vec<Column>,
    pub arrow: SchemaRef,
}

/// A constant of a column.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Constant {
    Null(Slot),
    Boolean(usize, bool),
    Int(usize, i32),
    Long(usize, i64),
    Float(usize, f32),
    Double(usize, f64),
    Decimal(usize, i128),
    Text(usize, Box<[u8]>),
    Binary(usize, Box<[u8]>),
}

/// One step of a plan: reads one value of the writer, and puts it into the column at an index of its kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Read {
    /// Reads nothing; the writer did not know the field, or wrote null.
    Constant(Constant),
    Boolean(usize),
    Int(usize),
    Long(usize),
    IntToLong(usize),
    Float(usize),
    LongToFloat(usize),
    IntToFloat(usize),
    Double(usize),
    FloatToDouble(usize),
    LongToDouble(usize),
    IntToDouble(usize),
    Text(usize),
    Binary(usize),
    FixedBinary(usize, usize),
    /// With the limit which the absolute value stays below.
    Decimal(usize, i128),
    FixedDecimal(usize, usize, i128),
    /// The reader's text of each of the writer's symbols; `None` where the reader has neither symbol nor default.
    Enum(usize, Vec<Option<Box<[u8]>>>),
    /// By branch of the writer.
    Union(Vec<Read>),
    /// The reader does not ask for it.
    Skip(Node),
    /// The reader cannot take this branch of the writer's union.
    Refuse,
}

/// How to read a writer's records.
#[derive(Debug)]
pub(super) struct Plan {
    /// For what is skipped.
    pub writer: Schema,
    pub reads: Vec<Read>,
}

fn not_a_column(schema: &Schema, field: &Field) -> SchemaError {
    SchemaError { place: field.name.clone(), problem: format!("{} is no column", schema.describe(&field.node)) }
}

/// The part of a reader's type that is not null, and whether null is allowed; `None` for a real union.
fn nullable(node: &Node) -> Option<(&Node, bool)> {
    const NULL: Node = Node::Primitive(Primitive::Null, None);
    match node {
        Node::Union(branches) => match branches.as_slice() {
            [null, other] | [other, null] if *null == NULL => Some((other, true)),
            [other] => Some((other, false)),
            _ => None,
        },
        other => Some((other, false)),
    }
}

impl Reader {
    /// The columns of a record schema.
    ///
    /// # Errors
    /// When it is no record, or a field is no column.
    pub fn new(text: &str) -> Result<Self, SchemaError> {
        let schema = Schema::parse(text)?;
        let Some(fields) = schema.fields() else {
            return Err(SchemaError { place: "schema".into(), problem: "a reader's schema is a record".into() });
        };
        let (mut columns, mut next) = (Vec::with_capacity(fields.len()), Columns::none());
        for field in fields {
            let (node, null) = nullable(&field.node).ok_or_else(|| not_a_column(&schema, field))?;
            let typed = match node {
                Node::Primitive(p, l) => arrow_type(*p, *l, &next),
                Node::Named(i) => match &schema.named[*i].kind {
                    Kind::Enum { .. } => Some((DataType::Utf8, Slot::Text(next.texts.len()))),
                    Kind::Fixed { logical: Some(Logical::Decimal { precision, scale }), .. } => {
                        Some(decimal(*precision, *scale, &next))
                    }
                    Kind::Fixed { .. } => Some((DataType::Binary, Slot::Binary(next.binaries.len()))),
                    Kind::Record(_) => None,
                },
                Node::Array(_) | Node::Map(_) | Node::Union(_) => None,
            };
            let (data_type, slot) = typed.ok_or_else(|| not_a_column(&schema, field))?;
            let column = Column { field: ArrowField::new(&field.name, data_type, null), slot };
            next.add(&column, 0);
            columns.push(column);
        }
        let arrow = Arc::new(ArrowSchema::new(columns.iter().map(|c| c.field.clone()).collect::<Vec<_>>()));
        Ok(Self { schema, columns, arrow })
    }

    /// Plans how to read what `writer` wrote.
    ///
    /// # Errors
    /// The first reasons why it cannot be read, in one text.
    pub fn plan(&self, writer: Schema) -> Result<Plan, String> {
        let problems = problems(&self.schema, &writer);
        if !problems.is_empty() {
            let shown: Vec<_> = problems.iter().take(PROBLEMS_SHOWN).map(ToString::to_string).collect();
            let more = problems.len() - shown.len();
            return Err(shown.join("; ") + &if more > 0 { format!("; and {more} more") } else { String::new() });
        }
        let (Some(read), Some(written)) = (self.schema.fields(), writer.fields()) else {
            return Err("the writer's schema is no record".to_owned());
        };
        let mut reads = Vec::with_capacity(written.len());
        for (i, field) in written.iter().enumerate() {
            let reader = read.iter().zip(&self.columns).find(|(f, _)| writer_field(f, written) == Some(i));
            reads.push(match reader {
                None => Read::Skip(field.node.clone()),
                Some((f, column)) => self.read(&f.node, column.slot, &writer, &field.node),
            });
        }
        for (field, column) in read.iter().zip(&self.columns) {
            if writer_field(field, written).is_none() {
                let default = field.default.as_ref().and_then(|d| self.constant(&field.node, column.slot, d));
                let default = default.ok_or_else(|| format!("{}: the field has no default value", field.name))?;
                reads.push(Read::Constant(default));
            }
        }
        Ok(Plan { writer, reads })
    }

    /// Both types are compatible, or this is one branch of the writer's union.
    fn read(&self, reader: &Node, slot: Slot, writer: &Schema, node: &Node) -> Read {
        if let Node::Union(branches) = node {
            return Read::Union(branches.iter().map(|b| self.read(reader, slot, writer, b)).collect());
        }
        let Some((reader, null)) = nullable(reader) else { return Read::Refuse };
        match (node, reader) {
            (Node::Primitive(Primitive::Null, _), _) if null => Read::Constant(Constant::Null(slot)),
            (Node::Primitive(w, _), Node::Primitive(r, l)) if promotes(*r, *w) => primitive(slot, *w, limit(*l)),
            (Node::Named(w), Node::Named(r)) => {
                let (r, w) = (&self.schema.named[*r], &writer.named[*w]);
                match (&w.kind, &r.kind, slot) {
                    (Kind::Enum { symbols, .. }, Kind::Enum { symbols: known, default }, Slot::Text(i)) if same_name(r, w) => {
                        let text = |s: &String| known.iter().find(|k| *k == s).or(default.as_ref());
                        Read::Enum(i, symbols.iter().map(|s| text(s).map(|t| t.as_bytes().into())).collect())
                    }
                    (Kind::Fixed { size, .. }, Kind::Fixed { size: wanted, .. }, Slot::Binary(i)) if size == wanted => {
                        Read::FixedBinary(i, *size)
                    }
                    (Kind::Fixed { size, .. }, Kind::Fixed { size: wanted, logical }, Slot::Decimal(i)) if size == wanted => {
                        Read::FixedDecimal(i, *size, limit(*logical))
                    }
                    _ => Read::Refuse,
                }
            }
            _ => Read::Refuse,
        }
    }

    /// A default of a field; JSON that the schema's check has accepted.
    fn constant(&self, node: &Node, slot: Slot, default: &Value) -> Option<Constant> {
        if default.is_null() {
            return Some(Constant::Null(slot));
        }
        let number = |min: i64, max: i64| default.as_i64().filter(|v| (min..=max).contains(v));
        Some(match slot {
            Slot::Boolean(i) => Constant::Boolean(i, default.as_bool()?),
            Slot::Int(i) => Constant::Int(i, i32::try_from(number(i32::MIN.into(), i32::MAX.into())?).ok()?),
            Slot::Long(i) => Constant::Long(i, number(i64::MIN, i64::MAX)?),
            Slot::Float(i) => Constant::Float(i, default.as_f64()? as f32),
            Slot::Double(i) => Constant::Double(i, default.as_f64()?),
            Slot::Text(i) => Constant::Text(i, default.as_str()?.as_bytes().into()),
            Slot::Binary(i) => Constant::Binary(i, default_bytes(default)?.into()),
            Slot::Decimal(i) => {
                let logical = match nullable(node)?.0 {
                    Node::Primitive(_, logical) => *logical,
                    Node::Named(n) => match self.schema.named[*n].kind {
                        Kind::Fixed { logical, .. } => logical,
                        Kind::Record(_) | Kind::Enum { .. } => None,
                    },
                    Node::Array(_) | Node::Map(_) | Node::Union(_) => None,
                };
                Constant::Decimal(i, super::cursor::integer(&default_bytes(default)?, limit(logical)).ok()?)
            }
        })
    }
}

/// What the absolute value of a decimal stays below.
fn limit(logical: Option<Logical>) -> i128 {
    match logical {
        Some(Logical::Decimal { precision, .. }) => 10_i128.checked_pow(precision).unwrap_or(i128::MAX),
        Some(Logical::Date | Logical::TimestampMillis | Logical::TimestampMicros) | None => i128::MAX,
    }
}

/// How a writer's primitive goes into a slot; the two are compatible.
fn primitive(slot: Slot, writer: Primitive, limit: i128) -> Read {
    use Primitive::{Boolean, Bytes, Double, Float, Int, Long, String};
    match (slot, writer) {
        (Slot::Boolean(i), Boolean) => Read::Boolean(i),
        (Slot::Int(i), Int) => Read::Int(i),
        (Slot::Long(i), Long) => Read::Long(i),
        (Slot::Long(i), Int) => Read::IntToLong(i),
        (Slot::Float(i), Float) => Read::Float(i),
        (Slot::Float(i), Long) => Read::LongToFloat(i),
        (Slot::Float(i), Int) => Read::IntToFloat(i),
        (Slot::Double(i), Double) => Read::Double(i),
        (Slot::Double(i), Float) => Read::FloatToDouble(i),
        (Slot::Double(i), Long) => Read::LongToDouble(i),
        (Slot::Double(i), Int) => Read::IntToDouble(i),
        (Slot::Text(i), String | Bytes) => Read::Text(i),
        (Slot::Binary(i), String | Bytes) => Read::Binary(i),
        (Slot::Decimal(i), Bytes) => Read::Decimal(i, limit),
        _ => Read::Refuse,
    }
}
