//! Models: tables that are made from other tables by SQL, as a graph.
//!
//! A model is one SQL file with a header of comments. It names what it reads through `{{ ref('model') }}` and
//! `{{ source('schema', 'table') }}`, and the day it is made for through `{{ day }}`. A *view* is a piece of SQL for others; a
//! *day* is a stored table with one partition per day, made from at most `lookback` days before it and never from a later one.
//! That limit is put into each reference when the SQL is rendered, so a model cannot read more than it says. Running an old
//! day again therefore has a known reach, and [`run`] makes exactly the days that depend on it.
//!
//! Texts come from outside, nothing here reads a file. Tables that are no model are known by their contracts.

mod draw;
mod render;
pub mod run;
mod select;
mod shipped;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::contract::{Contract, Severity, catalogue};

pub use draw::{mermaid, svg, text};
pub use render::At;
pub use select::{SelectError, nearest};
pub use shipped::{FILES, shipped};

/// A model file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("model {path}, line {line}: found {found}, expected {expected}")]
pub struct ModelError {
    /// File.
    pub path: String,
    /// Line in the file, from 1.
    pub line: usize,
    /// What stands there.
    pub found: String,
    /// What could stand there.
    pub expected: String,
}

/// How a model exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Materialization {
    /// Not stored: its SQL is put where it is referred to.
    View,
    /// A Delta table with one partition per day.
    Day,
}

/// How many days before its own a day of a model reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookback {
    /// So many, 0 for its own day only.
    Days(u32),
    /// Every earlier day.
    All,
}

/// What a model reads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// A table that is no model, by schema and name.
    Source(String, String),
    /// Another model.
    Model(String),
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Source(schema, table) => write!(f, "{schema}.{table}"),
            Self::Model(name) => f.write_str(name),
        }
    }
}

/// What a test of a model asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TestKind {
    /// The columns are never null.
    NotNull(Vec<String>),
    /// The columns together are never twice: in the day when they have it, else in the whole table, or, with a number, in so
    /// many days before and after the day.
    Unique(Vec<String>, Option<u32>),
    /// The column has values of a seed list only.
    AcceptedValues(String, Vec<String>),
    /// The column's values exist in a column of another model, where they are not null.
    Relationships(String, String, String),
    /// The columns are never below zero.
    NotNegative(Vec<String>),
}

/// A test of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelTest {
    /// As written in the header, for example `unique(fecha, region)`.
    pub name: String,
    /// What it asks.
    pub kind: TestKind,
    /// How much a failure matters.
    pub severity: Severity,
}

/// A piece of a model's SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Sql(String),
    Need(Need),
    Day,
    Now,
    Version,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// Name: the file's, without its ending.
    pub name: String,
    /// File under the folder of models.
    pub path: String,
    /// Layer: the file's folder, for example `marts`.
    pub layer: String,
    /// One sentence on what it is.
    pub what: String,
    /// How it exists.
    pub materialization: Materialization,
    /// Folder of the Delta table; empty for a view.
    pub table: String,
    /// Columns that identify a row, in the order in which rows are stored.
    pub key: Vec<String>,
    /// How far back it reads; 0 days for a view, which reads what its reader may.
    pub lookback: Lookback,
    /// Sources without which it works, as if they had no rows.
    pub optional: BTreeSet<Need>,
    /// Tests, in the header's order.
    pub tests: Vec<ModelTest>,
    /// What it reads.
    pub needs: BTreeSet<Need>,
    parts: Vec<Part>,
}

/// All models, and the contracts of the tables that they begin with.
#[derive(Debug, Clone)]
pub struct Project {
    models: BTreeMap<String, Model>,
    order: Vec<String>,
    /// The models that are made and tested; the others are only read.
    chosen: BTreeSet<String>,
    contracts: Vec<Contract>,
}

/// Where an error is.
struct Place<'a> {
    path: &'a str,
    line: usize,
}

impl Place<'_> {
    fn error(&self, found: impl Into<String>, expected: impl Into<String>) -> ModelError {
        ModelError { path: self.path.into(), line: self.line, found: found.into(), expected: expected.into() }
    }
}

fn names(list: &str) -> Vec<String> {
    list.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect()
}

fn model_test(at: &Place<'_>, text: &str) -> Result<ModelTest, ModelError> {
    const ALLOWED: &str = "not_null(column, ...), unique(column, ...), not_negative(column, ...), \
                           accepted_values(column, seed.csv) or relationships(column, model.column), and after it warning \
                           when it may fail, or within n days where unique need not look further";
    let (call, rest) = text.split_once(')').ok_or_else(|| at.error(text, ALLOWED))?;
    let (reach, severity) = match rest.split_whitespace().collect::<Vec<_>>().as_slice() {
        [] => (None, Severity::Error),
        ["warning"] => (None, Severity::Warning),
        ["within", n, "days"] => (Some(n.parse::<u32>().map_err(|_| at.error(text, ALLOWED))?), Severity::Error),
        _ => return Err(at.error(text, ALLOWED)),
    };
    let (kind, arguments) = call.split_once('(').ok_or_else(|| at.error(text, ALLOWED))?;
    let arguments = names(arguments);
    if reach.is_some() && kind.trim() != "unique" {
        return Err(at.error(text, ALLOWED));
    }
    let kind = match (kind.trim(), arguments.as_slice()) {
        ("not_null", [_, ..]) => TestKind::NotNull(arguments),
        ("unique", [_, ..]) => TestKind::Unique(arguments, reach),
        ("not_negative", [_, ..]) => TestKind::NotNegative(arguments),
        ("accepted_values", [column, seed]) => {
            let values = catalogue::seed(seed).ok_or_else(|| {
                let known = catalogue::SEEDS.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(" or ");
                at.error(format!("seed {seed}"), known)
            })?;
            TestKind::AcceptedValues(column.clone(), values)
        }
        ("relationships", [column, to]) => {
            let (model, to) = to.split_once('.').ok_or_else(|| at.error(to.as_str(), "model.column"))?;
            TestKind::Relationships(column.clone(), model.into(), to.into())
        }
        _ => return Err(at.error(text, ALLOWED)),
    };
    let name = reach.map_or_else(|| format!("{call})"), |n| format!("{call}) within {n} days"));
    Ok(ModelTest { name, kind, severity })
}

/// The arguments of a call such as `ref('a')`: quoted words.
fn arguments<'a>(expression: &'a str, function: &str) -> Option<Vec<&'a str>> {
    let inner = expression.strip_prefix(function)?.trim().strip_prefix('(')?.strip_suffix(')')?;
    inner.split(',').map(|a| a.trim().strip_prefix('\'')?.strip_suffix('\'')).collect()
}

/// Splits SQL at `{{ }}`.
fn parts(path: &str, first_line: usize, sql: &str) -> Result<Vec<Part>, ModelError> {
    let (mut out, mut rest, mut line) = (Vec::new(), sql, first_line);
    while let Some((before, after)) = rest.split_once("{{") {
        line += before.matches('\n').count();
        let at = Place { path, line };
        let (expression, tail) = after.split_once("}}").ok_or_else(|| at.error("{{ without }}", "both"))?;
        out.push(Part::Sql(before.to_owned()));
        let expression = expression.trim();
        out.push(match (expression, arguments(expression, "ref"), arguments(expression, "source")) {
            ("day", ..) => Part::Day,
            ("now", ..) => Part::Now,
            ("version", ..) => Part::Version,
            (_, Some(a), _) if a.len() == 1 => Part::Need(Need::Model(a[0].into())),
            (_, _, Some(a)) if a.len() == 2 => Part::Need(Need::Source(a[0].into(), a[1].into())),
            _ => return Err(at.error(expression, "ref('model'), source('schema', 'table'), day, now or version")),
        });
        line += expression.matches('\n').count();
        rest = tail;
    }
    out.push(Part::Sql(rest.trim_end().to_owned()));
    Ok(out)
}

impl Project {
    /// The same models without their tests.
    pub fn without_tests(mut self) -> Self {
        for model in self.models.values_mut() {
            model.tests.clear();
        }
        self
    }
}

impl Model {
    /// Reads one file: `path` under the folder of models, for example `marts/metricas_diarias.sql`.
    ///
    /// # Errors
    /// When the header lacks something, has something that is not known, or a reference cannot be read.
    pub fn parse(path: &str, file: &str) -> Result<Self, ModelError> {
        let start = Place { path, line: 1 };
        let (layer, name) = path
            .strip_suffix(".sql")
            .and_then(|p| p.split_once('/'))
            .filter(|(layer, _)| ["staging", "intermediate", "marts"].contains(layer))
            .ok_or_else(|| start.error(path, "staging/, intermediate/ or marts/ with a name.sql"))?;
        let mut header: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
        let mut tests = Vec::new();
        let mut end = 0;
        let mut lines = 0;
        for (i, line) in file.split_inclusive('\n').enumerate() {
            let Some(comment) = line.trim().strip_prefix("--") else { break };
            let at = Place { path, line: i + 1 };
            let (key, value) = comment.split_once(':').ok_or_else(|| at.error(comment.trim(), "key: value"))?;
            let (key, value) = (key.trim(), value.trim());
            match key {
                "test" => tests.push(model_test(&at, value)?),
                "what" | "materialized" | "table" | "key" | "partition" | "lookback" | "optional" => {
                    if header.insert(key, (i + 1, value)).is_some() {
                        return Err(at.error(format!("{key} twice"), "it once"));
                    }
                }
                _ => {
                    let keys = "what, materialized, table, key, partition, lookback, optional or test";
                    return Err(at.error(format!("key {key}"), keys));
                }
            }
            (end, lines) = (end + line.len(), i + 1);
        }
        let get = |key: &'static str| {
            header.get(key).copied().ok_or_else(|| start.error(format!("no {key} in the header"), format!("-- {key}: ...")))
        };
        let (line, materialized) = get("materialized")?;
        let materialization = match materialized {
            "view" => Materialization::View,
            "day" => Materialization::Day,
            other => return Err(Place { path, line }.error(format!("materialized: {other}"), "view or day")),
        };
        let (table, lookback) = match materialization {
            Materialization::View => {
                for key in ["table", "partition", "lookback"] {
                    if let Some((line, value)) = header.get(key) {
                        return Err(Place { path, line: *line }.error(format!("{key}: {value}"), "no such key for a view"));
                    }
                }
                (String::new(), Lookback::Days(0))
            }
            Materialization::Day => {
                let (line, partition) = get("partition")?;
                if partition != "fecha" {
                    return Err(Place { path, line }.error(format!("partition: {partition}"), "fecha"));
                }
                let (line, lookback) = get("lookback")?;
                let lookback = match (lookback, lookback.parse()) {
                    ("all", _) => Lookback::All,
                    (_, Ok(days)) => Lookback::Days(days),
                    (other, Err(_)) => {
                        return Err(Place { path, line }.error(format!("lookback: {other}"), "a number of days, or all"));
                    }
                };
                (get("table")?.1.to_owned(), lookback)
            }
        };
        let optional = header.get("optional").map_or(Ok(BTreeSet::new()), |(line, list)| {
            let source = |name: String| match name.split_once('.') {
                Some((schema, table)) => Ok(Need::Source(schema.into(), table.into())),
                None => Err(Place { path, line: *line }.error(name.as_str(), "schema.table")),
            };
            names(list).into_iter().map(source).collect()
        })?;
        let parts = parts(path, lines + 1, &file[end..])?;
        let needs: BTreeSet<Need> =
            parts.iter().filter_map(|p| if let Part::Need(n) = p { Some(n.clone()) } else { None }).collect();
        if needs.is_empty() {
            return Err(start.error("no ref and no source", "at least one"));
        }
        if let Some(unused) = optional.difference(&needs).next() {
            return Err(start.error(format!("optional: {unused}"), "a source that the model reads"));
        }
        Ok(Self {
            name: name.into(),
            path: path.into(),
            layer: layer.into(),
            what: get("what")?.1.into(),
            materialization,
            table,
            key: names(get("key")?.1),
            lookback,
            optional,
            tests,
            needs,
            parts,
        })
    }
}

impl Project {
    /// Reads all models and puts them in order. A source is a table that a contract places at `schema/table`.
    ///
    /// # Errors
    /// For a file that cannot be read, a reference to nothing, or models that need each other in a circle, which is named.
    pub fn new(files: &[(&str, &str)], contracts: Vec<Contract>) -> Result<Self, ModelError> {
        let mut models: BTreeMap<String, Model> = BTreeMap::new();
        for (path, text) in files {
            let model = Model::parse(path, text)?;
            if let Some(twin) = models.insert(model.name.clone(), model) {
                let at = Place { path, line: 1 };
                return Err(at.error(format!("a second model {}, the first is {}", twin.name, twin.path), "one of each name"));
            }
        }
        let chosen = models.keys().cloned().collect();
        let mut project = Self { models, order: Vec::new(), chosen, contracts };
        for model in project.models.values() {
            let at = Place { path: &model.path, line: 1 };
            let tested = model.tests.iter().filter_map(|t| match &t.kind {
                TestKind::Relationships(_, to, _) => Some(Need::Model(to.clone())),
                TestKind::NotNull(_) | TestKind::Unique(..) | TestKind::AcceptedValues(..) | TestKind::NotNegative(_) => None,
            });
            for need in model.needs.iter().cloned().chain(tested) {
                match &need {
                    Need::Model(name) if project.models.contains_key(name) => {}
                    Need::Model(name) => {
                        let known = project.models.keys().cloned().collect::<Vec<_>>().join(", ");
                        return Err(at.error(format!("ref('{name}')"), format!("one of {known}")));
                    }
                    Need::Source(schema, table) if project.source(schema, table).is_some() => {}
                    Need::Source(schema, table) => {
                        let found = format!("source('{schema}', '{table}')");
                        return Err(at.error(found, format!("a contract of a table at {schema}/{table}")));
                    }
                }
            }
        }
        project.order = project.sorted()?;
        Ok(project)
    }

    /// Each model after those that it reads; the first by name where that leaves a choice.
    fn sorted(&self) -> Result<Vec<String>, ModelError> {
        let read = |m: &Model| {
            let models = m.needs.iter().filter_map(|n| if let Need::Model(name) = n { Some(name.clone()) } else { None });
            models.collect::<BTreeSet<_>>()
        };
        let mut waiting: BTreeMap<String, BTreeSet<String>> = self.models.iter().map(|(n, m)| (n.clone(), read(m))).collect();
        let mut order = Vec::new();
        while let Some(ready) = waiting.iter().find(|(_, needs)| needs.is_empty()).map(|(n, _)| n.clone()) {
            waiting.remove(&ready);
            for needs in waiting.values_mut() {
                needs.remove(&ready);
            }
            order.push(ready);
        }
        let Some(first) = waiting.keys().next() else { return Ok(order) };
        // Everything that waits needs something that waits, so following needs must come back to where it has been.
        let mut walk = vec![first.clone()];
        loop {
            let next = walk.last().and_then(|n| waiting.get(n)).and_then(|needs| needs.first());
            let Some(next) = next.cloned() else { break };
            let seen = walk.iter().position(|n| *n == next);
            walk.push(next);
            if let Some(from) = seen {
                walk.drain(..from);
                break;
            }
        }
        let at = Place { path: &self.models[&walk[0]].path, line: 1 };
        Err(at.error(format!("a circle: {}", walk.join(" reads ")), "models that can be made one after the other"))
    }

    /// All models, each after those that it reads.
    pub fn models(&self) -> impl Iterator<Item = &Model> {
        self.order.iter().map(|n| &self.models[n])
    }

    /// The model with this name.
    pub fn model(&self, name: &str) -> Option<&Model> {
        self.models.get(name)
    }

    /// Models that read the given one, by name.
    pub fn readers(&self, need: &Need) -> Vec<&Model> {
        self.models().filter(|m| m.needs.contains(need)).collect()
    }

    /// The tables that are no models, by schema and name.
    pub fn sources(&self) -> BTreeSet<Need> {
        let needs = self.models.values().flat_map(|m| m.needs.iter().cloned());
        needs.filter(|n| matches!(n, Need::Source(..))).collect()
    }

    /// Whether the columns of a stored model are known.
    fn has_contract(&self, model: &Model) -> bool {
        self.contracts.iter().any(|c| c.physical_name == model.table)
    }

    fn source(&self, schema: &str, table: &str) -> Option<&Contract> {
        let place = format!("{schema}/{table}");
        self.contracts.iter().find(|c| c.physical_name == place)
    }

    /// What is known of one model, for people: what it is, what it reads, who reads it, and its SQL for one day.
    pub fn explain(&self, name: &str, at: &At<'_>) -> Option<String> {
        let model = self.model(name)?;
        let list = |names: Vec<String>| if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
        let readers = list(self.readers(&Need::Model(name.into())).iter().map(|m| m.name.clone()).collect());
        let kind = match (model.materialization, model.lookback) {
            (Materialization::View, _) => "view".to_owned(),
            (Materialization::Day, Lookback::Days(0)) => format!("{}, one day at a time, from that day", model.table),
            (Materialization::Day, Lookback::Days(n)) => {
                format!("{}, one day at a time, from that day and {n} before it", model.table)
            }
            (Materialization::Day, Lookback::All) => {
                format!("{}, one day at a time, from that day and all before it", model.table)
            }
        };
        Some(format!(
            "{name}: {}\n  stored   {kind}\n  key      {}\n  reads    {}\n  read by  {readers}\n  tests    {}\n\n{}\n",
            model.what,
            model.key.join(", "),
            list(model.needs.iter().map(ToString::to_string).collect()),
            list(model.tests.iter().map(|t| t.name.clone()).collect()),
            self.render(model, at).sql,
        ))
    }
}
