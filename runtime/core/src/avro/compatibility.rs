//! Can a reader's schema read what a writer's schema wrote, and may a schema become the next version of a subject?
//!
//! Avro's rules for schema resolution, and four cases where this is stricter, because Avro would read a wrong number
//! without an error: two different logical types on one number (milliseconds read as microseconds), a decimal of another
//! scale or a smaller precision, a decimal on one side only, and two reader fields that take the same writer field. What
//! it leaves out: what values mean otherwise (a unit, an accepted value), which the data contract says.

use std::{cell::Cell, collections::BTreeSet, fmt};

use super::schema::{Field, Kind, Logical, Named, Node, Primitive, Schema, SchemaError};
use crate::ports::Compatibility;

/// Most problems that one comparison reports.
pub const PROBLEMS_MAX: usize = 100;

/// Most pairs of types that one comparison looks at; a hostile schema could ask for exponentially many.
pub const PAIRS_MAX: u32 = 20_000;

/// One reason why a reader cannot read what a writer wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The place, for example `Click.monto`, or `Click.items[]` for an array's items.
    pub place: String,
    /// The writer's type there, in words; `None` when the writer has nothing there.
    pub writer: Option<String>,
    /// The reader's type there, in words.
    pub reader: String,
    /// What the reader lacks.
    pub reason: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let writer = self.writer.as_deref().unwrap_or("absent");
        write!(f, "{}: written as {writer}, read as {}: {}", self.place, self.reader, self.reason)
    }
}

/// One reason why a schema may not follow an older one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Version of the older schema.
    pub version: u32,
    /// Is the new schema the reader (backward), or the older one (forward)?
    pub backward: bool,
    /// What is wrong.
    pub problem: Problem,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { place, writer, reader, reason } = &self.problem;
        let writer = writer.as_deref().unwrap_or("absent");
        let (rule, old, new) =
            if self.backward { ("backward", writer, reader.as_str()) } else { ("forward", reader.as_str(), writer) };
        write!(f, "{place}: {old} in version {}, {new} in the new schema: not {rule} compatible, {reason}", self.version)
    }
}

/// Everything that keeps `reader` from reading what `writer` wrote; empty when it can. In order of the reader's fields,
/// at most [`PROBLEMS_MAX`].
pub fn problems(reader: &Schema, writer: &Schema) -> Vec<Problem> {
    let pairs_left = Cell::new(PAIRS_MAX);
    let mut comparison = Comparison { reader, writer, under_way: BTreeSet::new(), pairs_left: &pairs_left, problems: Vec::new() };
    let place = match &reader.root {
        Node::Named(i) => reader.named[*i].name().to_owned(),
        Node::Primitive(..) | Node::Array(_) | Node::Map(_) | Node::Union(_) => "schema".to_owned(),
    };
    comparison.nodes(&reader.root, &writer.root, &place);
    comparison.problems.truncate(PROBLEMS_MAX);
    comparison.problems
}

/// Why `new` may not follow `older`, which are in order of version; empty when it may.
pub fn violations(level: Compatibility, new: &Schema, older: &[(u32, Schema)]) -> Vec<Violation> {
    let compared = if level.transitive() { older } else { &older[older.len().saturating_sub(1)..] };
    let mut all = Vec::new();
    for (version, old) in compared {
        let of = |backward, problem| Violation { version: *version, backward, problem };
        if level.backward() {
            all.extend(problems(new, old).into_iter().map(|p| of(true, p)));
        }
        if level.forward() {
            all.extend(problems(old, new).into_iter().map(|p| of(false, p)));
        }
    }
    all
}

/// [`violations`] of texts.
///
/// # Errors
/// When a text is no Avro schema; its place says whose.
pub fn violations_of_texts(level: Compatibility, new: &str, older: &[(u32, String)]) -> Result<Vec<Violation>, SchemaError> {
    let new = Schema::parse(new)?;
    let in_version = |version: &u32, e: SchemaError| SchemaError { place: format!("version {version}, {}", e.place), ..e };
    let parse = |(version, text): &(u32, String)| Ok((*version, Schema::parse(text).map_err(|e| in_version(version, e))?));
    Ok(violations(level, &new, &older.iter().map(parse).collect::<Result<Vec<_>, _>>()?))
}

/// Does a reader's named type stand for a writer's? By name without namespace, or by alias.
pub(super) fn same_name(reader: &Named, writer: &Named) -> bool {
    reader.name() == writer.name() || reader.aliases.contains(&writer.full_name)
}

/// Index of the writer's field that a reader's field takes: by name, else by alias.
pub(super) fn writer_field(reader: &Field, writer: &[Field]) -> Option<usize> {
    let by_name = writer.iter().position(|w| w.name == reader.name);
    by_name.or_else(|| writer.iter().position(|w| reader.aliases.contains(&w.name)))
}

/// May a number written with one meaning be read with another?
pub(super) fn logical_problem(reader: Option<Logical>, writer: Option<Logical>) -> Option<String> {
    match (reader, writer) {
        (Some(Logical::Decimal { precision: r, scale: rs }), Some(Logical::Decimal { precision: w, scale: ws })) => {
            if rs != ws {
                Some(format!("the scale is {ws} and {rs}, so every value would be wrong by a power of ten"))
            } else if r < w {
                Some(format!("{w} digits do not fit into {r}"))
            } else {
                None
            }
        }
        (Some(Logical::Decimal { .. }), None) | (None, Some(Logical::Decimal { .. })) => {
            Some("only one side is a decimal, so the scale is lost".to_owned())
        }
        (Some(r), Some(w)) if r != w => Some(format!("{w} would be taken for {r}")),
        (Some(_) | None, Some(_) | None) => None,
    }
}

/// Is this Avro's promotion of one primitive to another?
pub(super) fn promotes(reader: Primitive, writer: Primitive) -> bool {
    use Primitive::{Bytes, Double, Float, Int, Long, String};
    reader == writer
        || matches!(
            (writer, reader),
            (Int, Long | Float | Double) | (Long, Float | Double) | (Float, Double) | (String, Bytes) | (Bytes, String)
        )
}

struct Comparison<'a> {
    reader: &'a Schema,
    writer: &'a Schema,
    /// Pairs of named types that are being compared or have been: recursive types end here, and each is reported once.
    under_way: BTreeSet<(usize, usize)>,
    /// Shared with trials.
    pairs_left: &'a Cell<u32>,
    problems: Vec<Problem>,
}

impl Comparison<'_> {
    fn add(&mut self, reader: &Node, writer: Option<&Node>, place: &str, reason: impl Into<String>) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem {
                place: place.to_owned(),
                writer: writer.map(|w| self.writer.describe(w)),
                reader: self.reader.describe(reader),
                reason: reason.into(),
            });
        }
    }

    /// Would this pair be readable? Reports nothing.
    fn readable(&self, reader: &Node, writer: &Node) -> bool {
        // The pairs already assumed readable stay assumed, so recursion through a union ends too.
        let (under_way, problems) = (self.under_way.clone(), Vec::new());
        let mut trial = Comparison { reader: self.reader, writer: self.writer, under_way, pairs_left: self.pairs_left, problems };
        trial.nodes(reader, writer, "");
        trial.problems.is_empty()
    }

    fn nodes(&mut self, reader: &Node, writer: &Node, place: &str) {
        match self.pairs_left.get().checked_sub(1) {
            Some(left) => self.pairs_left.set(left),
            None => return self.add(reader, Some(writer), place, "the schemas are too intricate to compare"),
        }
        match (reader, writer) {
            (_, Node::Union(branches)) => {
                for branch in branches {
                    if !self.readable(reader, branch) {
                        let branch = self.writer.describe(branch);
                        self.add(reader, Some(writer), place, format!("the reader does not take the writer's {branch}"));
                    }
                }
            }
            (Node::Union(branches), _) => {
                if !branches.iter().any(|b| self.readable(b, writer)) {
                    self.add(reader, Some(writer), place, "none of the reader's branches takes it");
                }
            }
            (Node::Primitive(r, rl), Node::Primitive(w, wl)) => {
                if !promotes(*r, *w) {
                    self.add(reader, Some(writer), place, "Avro does not promote one to the other");
                } else if let Some(reason) = logical_problem(*rl, *wl) {
                    self.add(reader, Some(writer), place, reason);
                }
            }
            (Node::Array(r), Node::Array(w)) => self.nodes(r, w, &format!("{place}[]")),
            (Node::Map(r), Node::Map(w)) => self.nodes(r, w, &format!("{place}{{}}")),
            (Node::Named(r), Node::Named(w)) => self.named(*r, *w, place),
            (Node::Primitive(..) | Node::Array(_) | Node::Map(_) | Node::Named(_), _) => {
                self.add(reader, Some(writer), place, "these are different types");
            }
        }
    }

    fn named(&mut self, r: usize, w: usize, place: &str) {
        if !self.under_way.insert((r, w)) {
            return;
        }
        let (reader, writer) = (&self.reader.named[r], &self.writer.named[w]);
        let nodes = (&Node::Named(r), Some(&Node::Named(w)));
        let same = std::mem::discriminant(&reader.kind) == std::mem::discriminant(&writer.kind);
        if same && !same_name(reader, writer) {
            return self.add(nodes.0, nodes.1, place, "the names differ, and the reader has no alias for the writer's");
        }
        match (&reader.kind, &writer.kind) {
            (Kind::Fixed { size: rs, logical: rl }, Kind::Fixed { size: ws, logical: wl }) => {
                if rs != ws {
                    self.add(nodes.0, nodes.1, place, "the sizes differ");
                } else if let Some(reason) = logical_problem(*rl, *wl) {
                    self.add(nodes.0, nodes.1, place, reason);
                }
            }
            (Kind::Enum { symbols: known, default: None }, Kind::Enum { symbols, .. }) => {
                let unknown: Vec<_> = symbols.iter().filter(|s| !known.contains(s)).map(String::as_str).collect();
                if !unknown.is_empty() {
                    let unknown = unknown.join(", ");
                    self.add(nodes.0, nodes.1, place, format!("the reader has no symbol {unknown} and the enum no default"));
                }
            }
            (Kind::Enum { .. }, Kind::Enum { .. }) => {}
            (Kind::Record(read), Kind::Record(written)) => self.fields(read, written, place),
            (Kind::Fixed { .. } | Kind::Enum { .. } | Kind::Record(_), _) => {
                self.add(nodes.0, nodes.1, place, "these are different types");
            }
        }
    }

    fn fields(&mut self, reader: &[Field], writer: &[Field], place: &str) {
        let mut taken: Vec<Option<&str>> = vec![None; writer.len()];
        for field in reader {
            let place = format!("{place}.{}", field.name);
            match writer_field(field, writer) {
                Some(i) => {
                    let other = taken[i].replace(&field.name);
                    if let Some(other) = other {
                        let name = &writer[i].name;
                        self.add(
                            &field.node,
                            Some(&writer[i].node),
                            &place,
                            format!("{other} takes the writer's field {name} too"),
                        );
                    }
                    self.nodes(&field.node, &writer[i].node, &place);
                }
                None if field.default.is_none() => {
                    self.add(&field.node, None, &place, "the field has no default value");
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn parsed(text: &str) -> Schema {
        Schema::parse(text).expect("a valid schema")
    }

    /// A record with these fields, each `name type` with the type in JSON, and after `=` a default.
    fn record(fields: &[&str]) -> Schema {
        let field = |f: &&str| {
            let (name, rest) = f.split_once(' ').expect("name and type");
            let (kind, default) = rest.split_once('=').map_or((rest, String::new()), |(k, d)| (k, format!(r#","default":{d}"#)));
            format!(r#"{{"name":"{name}","type":{kind}{default}}}"#)
        };
        let fields: Vec<_> = fields.iter().map(field).collect();
        parsed(&format!(r#"{{"type":"record","name":"R","namespace":"n","fields":[{}]}}"#, fields.join(",")))
    }

    fn check(reader: &[&str], writer: &[&str], expected: &[&str]) {
        let told: Vec<_> = problems(&record(reader), &record(writer)).iter().map(ToString::to_string).collect();
        assert_eq!(told, expected);
    }

    /// 800 random pairs with the verdict of Avro's own Java library; `ci/avro-compatibility-cases` writes them.
    #[test]
    fn the_verdict_is_that_of_avros_own_library() {
        let cases = include_str!("compatibility_cases.jsonl");
        let mut counts = [0, 0];
        for (i, line) in cases.lines().enumerate() {
            let case: Value = serde_json::from_str(line).expect("JSON");
            let told = problems(&parsed(&case["reader"].to_string()), &parsed(&case["writer"].to_string()));
            assert_eq!(told.is_empty(), case["compatible"] == true, "line {}: {told:?}\n{line}", i + 1);
            counts[usize::from(told.is_empty())] += 1;
        }
        assert!(counts.iter().all(|c| *c > 200), "{counts:?}");
    }

    #[test]
    fn a_problem_names_the_field_and_both_types() {
        check(&[r#"a "int""#], &[r#"a "long""#], &["R.a: written as long, read as int: Avro does not promote one to the other"]);
        check(&[r#"a "double""#], &[r#"a "int""#], &[]);
        check(&[r#"a "int""#], &[], &["R.a: written as absent, read as int: the field has no default value"]);
        check(&[r#"a "int"=1"#], &[], &[]);
        check(
            &[r#"a "string""#],
            &[r#"a ["null","string"]"#],
            &["R.a: written as [null, string], read as string: the reader does not take the writer's null"],
        );
        check(
            &[r#"a {"type":"array","items":{"type":"enum","name":"E","symbols":["X"]}}"#],
            &[r#"a {"type":"array","items":{"type":"enum","name":"E","symbols":["X","Y"]}}"#],
            &["R.a[]: written as enum n.E, read as enum n.E: the reader has no symbol Y and the enum no default"],
        );
    }

    #[test]
    fn a_number_of_another_meaning_is_refused_where_avro_alone_would_read_it() {
        let millis = r#"a {"type":"long","logicalType":"timestamp-millis"}"#;
        let micros = r#"a {"type":"long","logicalType":"timestamp-micros"}"#;
        let decimal =
            |precision, scale| format!(r#"a {{"type":"bytes","logicalType":"decimal","precision":{precision},"scale":{scale}}}"#);
        let told = "R.a: written as long timestamp-micros, read as long timestamp-millis: timestamp-micros would be taken for timestamp-millis";
        check(&[millis], &[micros], &[told]);
        check(&[millis], &[r#"a "long""#], &[]);
        check(&[&decimal(12, 2)], &[&decimal(10, 2)], &[]);
        for (reader, writer) in
            [(decimal(10, 2), decimal(12, 2)), (decimal(12, 3), decimal(12, 2)), (decimal(12, 2), r#"a "bytes""#.into())]
        {
            assert_eq!(problems(&record(&[&reader]), &record(&[&writer])).len(), 1, "{reader} {writer}");
        }
    }

    #[test]
    fn two_fields_never_take_the_same_writer_field() {
        let reader =
            r#"{"type":"record","name":"R","fields":[{"name":"a","type":"int"},{"name":"b","aliases":["a"],"type":"int"}]}"#;
        let told = problems(&parsed(reader), &record(&[r#"a "int""#]));
        assert_eq!(told.len(), 1);
        assert!(told[0].reason.contains("takes the writer's field a too"), "{}", told[0]);
    }

    #[test]
    fn transitive_finds_what_the_newest_version_hides() {
        let (one, two, three) = (record(&[r#"v "int"=0"#]), record(&[]), record(&[r#"v "string"="""#]));
        let older = [(1, one), (2, two)];
        assert!(violations(Compatibility::Backward, &three, &older).is_empty());
        let found = violations(Compatibility::BackwardTransitive, &three, &older);
        let told: Vec<_> = found.iter().map(ToString::to_string).collect();
        let expected =
            "R.v: int in version 1, string in the new schema: not backward compatible, Avro does not promote one to the other";
        assert_eq!(told, [expected]);
        let both = violations(Compatibility::FullTransitive, &three, &older);
        assert_eq!(both.iter().map(|v| (v.version, v.backward)).collect::<Vec<_>>(), [(1, true), (1, false)]);
        assert!(violations(Compatibility::None, &three, &older).is_empty());
    }

    #[test]
    fn a_recursive_type_is_compared_to_its_end() {
        let list = |value: &str| {
            parsed(&format!(
                r#"{{"type":"record","name":"L","fields":[{{"name":"next","type":["null","L"]}},{{"name":"v","type":"{value}"}}]}}"#
            ))
        };
        assert!(problems(&list("long"), &list("int")).is_empty());
        assert_eq!(problems(&list("int"), &list("long")).len(), 1);
    }

    /// Each record has two unions of the next: without a bound, 2^40 comparisons.
    #[test]
    fn an_intricate_schema_is_refused_soon() {
        let mut types = r#""int""#.to_owned();
        for i in 0..30 {
            types = format!(
                r#"{{"type":"record","name":"R{i}","fields":[{{"name":"a","type":["null",{types}]}},{{"name":"b","type":["null",{}]}}]}}"#,
                if i == 0 { r#""int""#.to_owned() } else { format!(r#""R{}""#, i - 1) }
            );
        }
        let schema = parsed(&types);
        assert!(problems(&schema, &schema).iter().any(|p| p.reason.contains("too intricate")));
    }
}
