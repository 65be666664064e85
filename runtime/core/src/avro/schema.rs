//! An Avro schema as it is declared: types, names, defaults, aliases and the logical types this platform uses.
//!
//! It is parsed from untrusted text (a registry's answer), so size, depth and names are bounded. What it leaves out:
//! `order`, `doc` and unknown attributes, which change neither bytes nor resolution, and logical types other than those
//! of [`Logical`], which Avro says to ignore.

use std::{cell::Cell, collections::BTreeMap, fmt};

use serde_json::{Map, Value};

/// Longest schema text that is parsed, in bytes.
pub const SCHEMA_BYTES_MAX: usize = 1 << 20;
/// Deepest nesting of types that is parsed.
pub const SCHEMA_DEPTH_MAX: usize = 64;
/// Largest precision of a decimal, in digits: what 128 bits hold.
pub const PRECISION_MAX: u32 = 38;

/// Most steps that checking the defaults of a schema may take.
const DEFAULT_STEPS_MAX: u32 = 1_000_000;
/// Most branches of a union that a message names.
const DESCRIBED_MAX: usize = 8;

/// A text that is no Avro schema. `Display` names the place and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct SchemaError {
    /// Where, as a path of names from the root.
    pub place: String,
    /// What is wrong.
    pub problem: String,
}

/// A primitive type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Primitive {
    /// No value, no bytes.
    Null,
    /// One byte, 0 or 1.
    Boolean,
    /// 32 bits, zigzag.
    Int,
    /// 64 bits, zigzag.
    Long,
    /// IEEE 754, 32 bits.
    Float,
    /// IEEE 754, 64 bits.
    Double,
    /// Length and bytes.
    Bytes,
    /// Length and UTF-8.
    String,
}

impl Primitive {
    const ALL: [(&'static str, Self); 8] = [
        ("null", Self::Null),
        ("boolean", Self::Boolean),
        ("int", Self::Int),
        ("long", Self::Long),
        ("float", Self::Float),
        ("double", Self::Double),
        ("bytes", Self::Bytes),
        ("string", Self::String),
    ];
    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, p)| *p == self).map_or("", |(n, _)| n)
    }
}

/// What a primitive or fixed value means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logical {
    /// Days since 1970-01-01, an int.
    Date,
    /// Milliseconds since 1970-01-01 UTC, a long.
    TimestampMillis,
    /// Microseconds since 1970-01-01 UTC, a long.
    TimestampMicros,
    /// An integer of big-endian two's complement bytes, times ten to the minus scale.
    Decimal {
        /// Digits, 1 to [`PRECISION_MAX`].
        precision: u32,
        /// Digits after the point, at most the precision.
        scale: u32,
    },
}

impl fmt::Display for Logical {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Date => f.write_str("date"),
            Self::TimestampMillis => f.write_str("timestamp-millis"),
            Self::TimestampMicros => f.write_str("timestamp-micros"),
            Self::Decimal { precision, scale } => write!(f, "decimal({precision},{scale})"),
        }
    }
}

/// A type where it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A primitive.
    Primitive(Primitive, Option<Logical>),
    /// Items.
    Array(Box<Node>),
    /// Values by string key.
    Map(Box<Node>),
    /// One of these, none of them a union.
    Union(Vec<Node>),
    /// Index into [`Schema::named`]; types may be recursive.
    Named(usize),
}

/// A record, enum or fixed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Namespace and name, joined by a dot.
    pub full_name: String,
    /// Other full names under which a writer may have known it.
    pub aliases: Vec<String>,
    /// What it is.
    pub kind: Kind,
}

impl Named {
    /// The name without namespace.
    pub fn name(&self) -> &str {
        self.full_name.rsplit('.').next().unwrap_or_default()
    }
}

/// What a named type is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Fields in the order of their bytes.
    Record(Vec<Field>),
    /// An index into symbols.
    Enum {
        /// Symbols, in order of index.
        symbols: Vec<String>,
        /// What a reader takes for a symbol it does not know.
        default: Option<String>,
    },
    /// Exactly `size` bytes.
    Fixed {
        /// Bytes.
        size: usize,
        /// Meaning.
        logical: Option<Logical>,
    },
}

/// A field of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Name.
    pub name: String,
    /// Other names under which a writer may have known it.
    pub aliases: Vec<String>,
    /// Type.
    pub node: Node,
    /// What a reader takes when the writer had no such field, as JSON.
    pub default: Option<Value>,
}

/// A parsed schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schema {
    /// The type of a datum.
    pub root: Node,
    /// Every named type, in order of declaration.
    pub named: Vec<Named>,
}

impl Schema {
    /// Parses a declaration.
    ///
    /// # Errors
    /// The first thing that Avro's specification does not allow, with its place.
    pub fn parse(text: &str) -> Result<Self, SchemaError> {
        let json = json(text)?;
        let mut parser = Parser { named: Vec::new(), index: BTreeMap::new() };
        let root = parser.node(&json, "", "schema", 0)?;
        let named = parser
            .named
            .into_iter()
            .map(|n| n.ok_or_else(|| wrong("schema", "a type is used before it is declared")))
            .collect::<Result<Vec<_>, _>>()?;
        let schema = Self { root, named };
        schema.check_defaults()?;
        Ok(schema)
    }

    /// The fields, when the root is a record.
    pub fn fields(&self) -> Option<&[Field]> {
        match &self.root {
            Node::Named(i) => match &self.named[*i].kind {
                Kind::Record(fields) => Some(fields),
                Kind::Enum { .. } | Kind::Fixed { .. } => None,
            },
            Node::Primitive(..) | Node::Array(_) | Node::Map(_) | Node::Union(_) => None,
        }
    }

    /// A type in words, short enough for a message: `["null","string"]`, `record ecommerce.Click`, `bytes decimal(12,2)`.
    pub fn describe(&self, node: &Node) -> String {
        match node {
            Node::Primitive(p, None) => p.name().to_owned(),
            Node::Primitive(p, Some(l)) => format!("{} {l}", p.name()),
            Node::Array(items) => format!("array of {}", self.describe(items)),
            Node::Map(values) => format!("map of {}", self.describe(values)),
            Node::Union(branches) => {
                let mut shown: Vec<_> = branches.iter().take(DESCRIBED_MAX).map(|b| self.describe(b)).collect();
                if branches.len() > DESCRIBED_MAX {
                    shown.push(format!("{} more", branches.len() - DESCRIBED_MAX));
                }
                format!("[{}]", shown.join(", "))
            }
            Node::Named(i) => {
                let named = &self.named[*i];
                match &named.kind {
                    Kind::Record(_) => format!("record {}", named.full_name),
                    Kind::Enum { .. } => format!("enum {}", named.full_name),
                    Kind::Fixed { size, logical: None } => format!("fixed {}({size})", named.full_name),
                    Kind::Fixed { size, logical: Some(l) } => format!("fixed {}({size}) {l}", named.full_name),
                }
            }
        }
    }

    fn check_defaults(&self) -> Result<(), SchemaError> {
        let steps = Cell::new(DEFAULT_STEPS_MAX);
        for named in &self.named {
            let Kind::Record(fields) = &named.kind else { continue };
            for field in fields {
                if let Some(value) = &field.default
                    && !self.accepts(&field.node, value, &steps)
                {
                    if steps.get() == 0 {
                        let problem = format!("its defaults take more than {DEFAULT_STEPS_MAX} steps to check");
                        return Err(wrong(&format!("{}.{}", named.full_name, field.name), problem));
                    }
                    let problem = format!("default {value} is no {}", self.describe(&field.node));
                    return Err(wrong(&format!("{}.{}", named.full_name, field.name), problem));
                }
            }
        }
        Ok(())
    }

    /// Whether a JSON value is a default of this type. Recursion ends with the value, which is finite; but unions of records
    /// that hold unions double the work at each depth, so it also ends, with no, when `steps` are used up.
    fn accepts(&self, node: &Node, value: &Value, steps: &Cell<u32>) -> bool {
        let Some(left) = steps.get().checked_sub(1) else { return false };
        steps.set(left);
        let integer = |min: i64, max: i64| value.as_i64().is_some_and(|v| (min..=max).contains(&v));
        match node {
            Node::Primitive(primitive, _) => match primitive {
                Primitive::Null => value.is_null(),
                Primitive::Boolean => value.is_boolean(),
                Primitive::Int => integer(i32::MIN.into(), i32::MAX.into()),
                Primitive::Long => integer(i64::MIN, i64::MAX),
                Primitive::Float | Primitive::Double => value.is_number(),
                Primitive::Bytes => default_bytes(value).is_some(),
                Primitive::String => value.is_string(),
            },
            Node::Array(items) => value.as_array().is_some_and(|a| a.iter().all(|v| self.accepts(items, v, steps))),
            Node::Map(values) => value.as_object().is_some_and(|o| o.values().all(|v| self.accepts(values, v, steps))),
            Node::Union(branches) => branches.iter().any(|b| self.accepts(b, value, steps)),
            Node::Named(i) => match &self.named[*i].kind {
                Kind::Record(fields) => value.as_object().is_some_and(|o| {
                    fields.iter().all(|f| match o.get(&f.name) {
                        Some(v) => self.accepts(&f.node, v, steps),
                        None => f.default.is_some(),
                    })
                }),
                Kind::Enum { symbols, .. } => value.as_str().is_some_and(|v| symbols.iter().any(|s| s == v)),
                Kind::Fixed { size, .. } => default_bytes(value).is_some_and(|b| b.len() == *size),
            },
        }
    }
}

/// The bytes of a default: each character is one byte, U+0000 to U+00FF.
pub(super) fn default_bytes(value: &Value) -> Option<Vec<u8>> {
    value.as_str()?.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect()
}

/// The same declaration with keys sorted and no white space: two texts are one schema when these are equal.
///
/// # Errors
/// When the text is no JSON, or too long.
pub fn canonical_text(text: &str) -> Result<String, SchemaError> {
    Ok(sorted(&json(text)?).to_string())
}

fn sorted(value: &Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
        Value::Object(map) => {
            // Sorted before it is collected, so that it is sorted whichever map serde_json was built with.
            let ordered: BTreeMap<_, _> = map.iter().map(|(k, v)| (k.clone(), sorted(v))).collect();
            Value::Object(ordered.into_iter().collect())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.clone(),
    }
}

fn json(text: &str) -> Result<Value, SchemaError> {
    if text.len() > SCHEMA_BYTES_MAX {
        return Err(wrong("schema", format!("{} bytes, at most {SCHEMA_BYTES_MAX} are allowed", text.len())));
    }
    // serde_json refuses nesting above 128 by itself.
    serde_json::from_str(text).map_err(|e| wrong("schema", format!("no JSON: {e}")))
}

fn wrong(place: &str, problem: impl Into<String>) -> SchemaError {
    SchemaError { place: place.to_owned(), problem: problem.into() }
}

struct Parser {
    /// `None` while the type is being declared.
    named: Vec<Option<Named>>,
    index: BTreeMap<String, usize>,
}

impl Parser {
    fn node(&mut self, json: &Value, namespace: &str, place: &str, depth: usize) -> Result<Node, SchemaError> {
        if depth > SCHEMA_DEPTH_MAX {
            return Err(wrong(place, format!("nested deeper than {SCHEMA_DEPTH_MAX}")));
        }
        match json {
            Value::String(name) => self.reference(name, namespace, place),
            Value::Array(branches) => {
                let nodes =
                    branches.iter().enumerate().map(|(i, b)| self.node(b, namespace, &format!("{place}[{i}]"), depth + 1));
                let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
                union(&nodes, place)?;
                Ok(Node::Union(nodes))
            }
            Value::Object(map) => self.object(map, namespace, place, depth),
            Value::Null | Value::Bool(_) | Value::Number(_) => Err(wrong(place, format!("{json} is no type"))),
        }
    }

    fn reference(&self, name: &str, namespace: &str, place: &str) -> Result<Node, SchemaError> {
        if let Some((_, primitive)) = Primitive::ALL.iter().find(|(n, _)| *n == name) {
            return Ok(Node::Primitive(*primitive, None));
        }
        let full = if name.contains('.') || namespace.is_empty() { name.to_owned() } else { format!("{namespace}.{name}") };
        match self.index.get(&full).or_else(|| self.index.get(name)) {
            Some(i) => Ok(Node::Named(*i)),
            None => Err(wrong(place, format!("type {name} is not declared"))),
        }
    }

    fn object(&mut self, map: &Map<String, Value>, namespace: &str, place: &str, depth: usize) -> Result<Node, SchemaError> {
        let Some(kind) = map.get("type") else { return Err(wrong(place, "a type needs the attribute \"type\"")) };
        let Value::String(kind) = kind else { return self.node(kind, namespace, place, depth + 1) };
        match kind.as_str() {
            "array" => {
                let items = map.get("items").ok_or_else(|| wrong(place, "an array needs \"items\""))?;
                Ok(Node::Array(Box::new(self.node(items, namespace, &format!("{place}[]"), depth + 1)?)))
            }
            "map" => {
                let values = map.get("values").ok_or_else(|| wrong(place, "a map needs \"values\""))?;
                Ok(Node::Map(Box::new(self.node(values, namespace, &format!("{place}{{}}"), depth + 1)?)))
            }
            "record" | "error" | "enum" | "fixed" => self.declare(kind, map, namespace, place, depth),
            _ => match self.reference(kind, namespace, place)? {
                Node::Primitive(primitive, _) => Ok(Node::Primitive(primitive, logical(map, Some(primitive), place)?)),
                other => Ok(other),
            },
        }
    }

    fn declare(
        &mut self,
        kind: &str,
        map: &Map<String, Value>,
        namespace: &str,
        place: &str,
        depth: usize,
    ) -> Result<Node, SchemaError> {
        let name = map.get("name").and_then(Value::as_str).ok_or_else(|| wrong(place, format!("a {kind} needs a \"name\"")))?;
        let declared = match map.get("namespace") {
            None => namespace,
            Some(Value::String(n)) => n.as_str(),
            Some(other) => return Err(wrong(place, format!("namespace {other} is no string"))),
        };
        let full_name = qualified(name, declared, place)?;
        let namespace = full_name.rsplit_once('.').map_or("", |(n, _)| n).to_owned();
        if Primitive::ALL.iter().any(|(p, _)| *p == full_name) {
            return Err(wrong(place, format!("{full_name} is the name of a primitive type")));
        }
        if self.index.contains_key(&full_name) {
            return Err(wrong(place, format!("type {full_name} is declared twice")));
        }
        let index = self.named.len();
        self.named.push(None);
        self.index.insert(full_name.clone(), index);
        let aliases = strings(map, "aliases", &full_name)?;
        let aliases = aliases.iter().map(|a| qualified(a, &namespace, &full_name)).collect::<Result<Vec<_>, _>>()?;
        let kind = match kind {
            "enum" => enumeration(map, &full_name)?,
            "fixed" => {
                let size = map.get("size").and_then(Value::as_u64).and_then(|s| usize::try_from(s).ok());
                let size = size.ok_or_else(|| wrong(&full_name, "a fixed needs a \"size\", an integer from 0"))?;
                Kind::Fixed { size, logical: logical(map, None, &full_name)? }
            }
            _ => Kind::Record(self.fields(map, &namespace, &full_name, depth)?),
        };
        self.named[index] = Some(Named { full_name, aliases, kind });
        Ok(Node::Named(index))
    }

    fn fields(
        &mut self,
        map: &Map<String, Value>,
        namespace: &str,
        record: &str,
        depth: usize,
    ) -> Result<Vec<Field>, SchemaError> {
        let Some(Value::Array(list)) = map.get("fields") else { return Err(wrong(record, "a record needs \"fields\", a list")) };
        let mut fields: Vec<Field> = Vec::with_capacity(list.len());
        for json in list {
            let name = json.get("name").and_then(Value::as_str);
            let name = name.ok_or_else(|| wrong(record, "a field needs a \"name\""))?;
            let place = format!("{record}.{name}");
            let Some(map) = json.as_object() else { return Err(wrong(record, format!("{json} is no field"))) };
            identifier(name, &place)?;
            if fields.iter().any(|f| f.name == name) {
                return Err(wrong(&place, "the record has two fields of this name"));
            }
            let kind = map.get("type").ok_or_else(|| wrong(&place, "a field needs a \"type\""))?;
            let node = self.node(kind, namespace, &place, depth + 1)?;
            let aliases = strings(map, "aliases", &place)?;
            fields.push(Field { name: name.to_owned(), aliases, node, default: map.get("default").cloned() });
        }
        Ok(fields)
    }
}

fn union(branches: &[Node], place: &str) -> Result<(), SchemaError> {
    for (i, branch) in branches.iter().enumerate() {
        let twice = branches[..i].iter().any(|earlier| match (earlier, branch) {
            (Node::Primitive(a, _), Node::Primitive(b, _)) => a == b,
            (Node::Named(a), Node::Named(b)) => a == b,
            (Node::Array(_), Node::Array(_)) | (Node::Map(_), Node::Map(_)) => true,
            _ => false,
        });
        match branch {
            Node::Union(_) => return Err(wrong(place, "a union directly inside a union")),
            _ if twice => return Err(wrong(place, "a union with two branches of the same type")),
            _ => {}
        }
    }
    Ok(())
}

fn enumeration(map: &Map<String, Value>, place: &str) -> Result<Kind, SchemaError> {
    if !map.contains_key("symbols") {
        return Err(wrong(place, "an enum needs \"symbols\""));
    }
    let symbols = strings(map, "symbols", place)?;
    for (i, symbol) in symbols.iter().enumerate() {
        identifier(symbol, place)?;
        if symbols[..i].contains(symbol) {
            return Err(wrong(place, format!("symbol {symbol} stands twice")));
        }
    }
    let default = match map.get("default") {
        None => None,
        Some(Value::String(d)) if symbols.contains(d) => Some(d.clone()),
        Some(other) => return Err(wrong(place, format!("default {other} is none of its symbols"))),
    };
    Ok(Kind::Enum { symbols, default })
}

/// The logical type of an object; one that Avro says to ignore (unknown, or on the wrong type) is `None`.
fn logical(map: &Map<String, Value>, on: Option<Primitive>, place: &str) -> Result<Option<Logical>, SchemaError> {
    let digits = |key: &str| map.get(key).and_then(Value::as_u64);
    Ok(match (map.get("logicalType").and_then(Value::as_str), on) {
        (Some("date"), Some(Primitive::Int)) => Some(Logical::Date),
        (Some("timestamp-millis"), Some(Primitive::Long)) => Some(Logical::TimestampMillis),
        (Some("timestamp-micros"), Some(Primitive::Long)) => Some(Logical::TimestampMicros),
        (Some("decimal"), Some(Primitive::Bytes) | None) => {
            let scale = digits("scale").or_else(|| (!map.contains_key("scale")).then_some(0));
            match (digits("precision"), scale) {
                (Some(precision), Some(scale)) if (1..=PRECISION_MAX.into()).contains(&precision) && scale <= precision => {
                    Some(Logical::Decimal { precision: precision as u32, scale: scale as u32 })
                }
                // Avro would read it as bytes: money without a scale. Better refused than guessed.
                _ => {
                    return Err(wrong(
                        place,
                        format!("a decimal needs a precision of 1 to {PRECISION_MAX} and a scale up to it"),
                    ));
                }
            }
        }
        _ => None,
    })
}

fn strings(map: &Map<String, Value>, key: &str, place: &str) -> Result<Vec<String>, SchemaError> {
    let text = |v: &Value| v.as_str().map(str::to_owned).ok_or_else(|| wrong(place, format!("{v} in \"{key}\" is no string")));
    match map.get(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(items)) => items.iter().map(text).collect(),
        Some(other) => Err(wrong(place, format!("\"{key}\" is a list, not {other}"))),
    }
}

fn qualified(name: &str, namespace: &str, place: &str) -> Result<String, SchemaError> {
    let full = if name.contains('.') || namespace.is_empty() { name.to_owned() } else { format!("{namespace}.{name}") };
    for part in full.split('.') {
        identifier(part, place)?;
    }
    Ok(full)
}

fn identifier(name: &str, place: &str) -> Result<(), SchemaError> {
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if first && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        return Ok(());
    }
    Err(wrong(place, format!("{name:?} is no name: a letter or _, then letters, digits and _")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str, expected: &str) {
        let error = Schema::parse(text).expect_err("the schema is refused").to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn names_take_the_namespace_around_them_and_may_recurse() {
        let text = r#"{"type":"record","name":"a.b.Node","aliases":["Old"],"fields":[
            {"name":"next","type":["null","Node"],"default":null},
            {"name":"color","type":{"type":"enum","name":"Color","symbols":["R","G"],"default":"R"}},
            {"name":"again","type":"a.b.Color"}]}"#;
        let schema = Schema::parse(text).expect("a valid schema");
        let names: Vec<_> = schema.named.iter().map(|n| n.full_name.as_str()).collect();
        assert_eq!(names, ["a.b.Node", "a.b.Color"]);
        assert_eq!(schema.named[0].aliases, ["a.b.Old"]);
        assert_eq!(schema.describe(&schema.fields().expect("a record")[0].node), "[null, record a.b.Node]");
    }

    #[test]
    fn what_avro_forbids_is_refused_by_place() {
        refused("{", "no JSON");
        refused("\"text\"", "type text is not declared");
        refused("7", "7 is no type");
        refused(r#"["int","int"]"#, "two branches of the same type");
        refused(r#"["int",["null"]]"#, "a union directly inside a union");
        refused(
            r#"{"type":"record","name":"R","fields":[{"name":"a","type":"int","default":"x"}]}"#,
            "R.a: default \"x\" is no int",
        );
        refused(
            r#"{"type":"record","name":"R","fields":[{"name":"a","type":"int"},{"name":"a","type":"int"}]}"#,
            "R.a: the record has two",
        );
        refused(r#"{"type":"record","name":"1R","fields":[]}"#, "is no name");
        refused(r#"{"type":"enum","name":"E","symbols":["A"],"default":"B"}"#, "E: default \"B\" is none");
        refused(r#"{"type":"fixed","name":"F","size":-1}"#, "F: a fixed needs");
        refused(r#"{"type":"bytes","logicalType":"decimal","precision":2,"scale":3}"#, "a scale up to it");
        refused(&"[".repeat(200), "no JSON");
        let deep = format!("{}\"int\"{}", r#"{"type":"array","items":"#.repeat(100), "}".repeat(100));
        refused(&deep, "nested deeper");
    }

    #[test]
    fn order_of_attributes_and_white_space_do_not_matter() {
        let one = canonical_text(r#"{"type": "fixed", "size": 2, "name": "F"}"#).expect("JSON");
        assert_eq!(one, canonical_text(r#"{"name":"F","type":"fixed","size":2}"#).expect("JSON"));
    }
}
