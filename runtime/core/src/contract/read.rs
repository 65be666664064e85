//! From the file to a [`Contract`]: every rule becomes a clause, a rule on the table, or an error with its line.

use std::{collections::BTreeSet, time::Duration};

use chrono::{DateTime, NaiveDate};
use serde_saphyr::{Location, Spanned};

use super::{
    Bound, Clause, Contract, ContractError, Field, Freshness, Limit, Measure, Number, PhysicalType, Reference, Rule, Severity,
    catalogue, ident, instant, odcs, text,
};
use crate::ports::Column;

fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_') && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// The condition of `SELECT count(*) FROM {object} WHERE condition`; `None` for any other statement.
fn row_condition(query: &str) -> Option<&str> {
    let mut rest = query;
    for word in ["select", "count(*)", "from", "{object}", "where"] {
        rest = rest.trim_start();
        let (head, tail) = rest.split_at_checked(word.len())?;
        if !head.eq_ignore_ascii_case(word) {
            return None;
        }
        rest = tail;
    }
    (rest.starts_with(char::is_whitespace) && !rest.to_ascii_lowercase().contains("group by")).then(|| rest.trim())
}

type OneBound = fn(Number) -> Bound;
type TwoBounds = fn(Number, Number) -> Bound;

/// A contract while it is read: the file's name for errors, and what has been found so far.
struct Reader<'a> {
    file: &'a str,
    table: String,
    clauses: Vec<Clause>,
    rules: Vec<Rule>,
    references: Vec<Reference>,
}

impl Reader<'_> {
    fn error(&self, at: Location, place: &str, found: impl Into<String>, expected: impl Into<String>) -> ContractError {
        let place = if place.is_empty() { self.table.clone() } else { format!("{}.{place}", self.table) };
        ContractError::Rule { name: self.file.into(), line: at.line(), place, found: found.into(), expected: expected.into() }
    }

    fn severity(&self, at: Location, place: &str, word: Option<&str>) -> Result<Severity, ContractError> {
        match word {
            None | Some("error") => Ok(Severity::Error),
            Some("warning") => Ok(Severity::Warning),
            Some("info") => Ok(Severity::Info),
            Some(other) => Err(self.error(at, place, format!("severity {other}"), "error, warning or info")),
        }
    }

    fn bound(&self, at: Location, place: &str, q: &odcs::Quality) -> Result<Bound, ContractError> {
        let number = |text: &str| text.parse::<Number>().map_err(|()| self.error(at, place, text, Number::ALLOWED));
        let mut bounds = Vec::new();
        let single: [(&Option<String>, OneBound); 6] = [
            (&q.must_be, Bound::Equal),
            (&q.must_not_be, Bound::NotEqual),
            (&q.must_be_greater_than, Bound::Above),
            (&q.must_be_greater_or_equal_to, Bound::AtLeast),
            (&q.must_be_less_than, Bound::Below),
            (&q.must_be_less_or_equal_to, Bound::AtMost),
        ];
        for (value, bound) in single {
            if let Some(value) = value {
                bounds.push(bound(number(value)?));
            }
        }
        let double: [(&Option<[String; 2]>, TwoBounds); 2] =
            [(&q.must_be_between, Bound::Between), (&q.must_not_be_between, Bound::NotBetween)];
        for (value, bound) in double {
            if let Some([low, high]) = value {
                let (a, b) = (number(low)?, number(high)?);
                if a >= b {
                    return Err(self.error(at, place, format!("[{low}, {high}]"), "the smaller number first"));
                }
                bounds.push(bound(a, b));
            }
        }
        match bounds.as_slice() {
            [only] => Ok(*only),
            _ => Err(self.error(at, place, format!("{} operators", bounds.len()), "one operator such as mustBe: 0")),
        }
    }

    /// A rule on rows is a clause when no row may break it, and a rule on the table when some may.
    fn rows(&mut self, name: String, broken_when: String, percent: bool, bound: Bound, severity: Severity) {
        if bound.is_zero() && severity == Severity::Error {
            self.clauses.push(Clause { name, broken_when });
        } else {
            self.rules.push(Rule { name, measure: Measure::BrokenRows { broken_when, percent }, bound, severity });
        }
    }

    /// Reads one quality rule of the table, or of `column`.
    fn quality(
        &mut self,
        q: &Spanned<odcs::Quality>,
        column: Option<&str>,
        known: &BTreeSet<String>,
    ) -> Result<Option<BTreeSet<String>>, ContractError> {
        let (at, q) = (q.referenced, &q.value);
        let place = column.unwrap_or("quality");
        let kind = q.r#type.as_deref().unwrap_or("library");
        if kind == "text" {
            return Ok(None);
        }
        let severity = self.severity(at, place, q.severity.as_deref())?;
        let bound = self.bound(at, place, q)?;
        let percent = q.unit.as_deref() == Some("percent");
        let name =
            |metric: &str| q.id.clone().unwrap_or_else(|| column.map_or_else(|| metric.to_owned(), |c| format!("{c}.{metric}")));
        match (kind, q.metric.as_deref(), column) {
            ("library", Some("rowCount"), None) => {
                let end = match bound {
                    Bound::AtLeast(_) | Bound::Above(_) => ".min",
                    Bound::AtMost(_) | Bound::Below(_) => ".max",
                    Bound::Equal(_) | Bound::NotEqual(_) | Bound::Between(..) | Bound::NotBetween(..) => "",
                };
                let name = q.id.clone().unwrap_or_else(|| format!("rowCount{end}"));
                self.rules.push(Rule { name, measure: Measure::RowCount, bound, severity });
                Ok(None)
            }
            ("library", Some("nullValues"), Some(c)) => {
                self.rows(name("nullValues"), format!("{} IS NULL", ident(c)), percent, bound, severity);
                Ok(None)
            }
            ("library", Some("missingValues"), Some(c)) => {
                let Some(values) = &q.arguments.missing_values else {
                    return Err(self.error(at, place, "no arguments", "arguments with missingValues"));
                };
                let mut parts = Vec::new();
                if values.iter().any(Option::is_none) {
                    parts.push(format!("{} IS NULL", ident(c)));
                }
                let list = values.iter().flatten().map(|v| text(v)).collect::<Vec<_>>().join(", ");
                if !list.is_empty() {
                    parts.push(format!("coalesce({} IN ({list}), false)", ident(c)));
                }
                self.rows(name("missingValues"), format!("({})", parts.join(" OR ")), percent, bound, severity);
                Ok(None)
            }
            ("library", Some("invalidValues"), Some(c)) => {
                let values = match (&q.arguments.valid_values, &q.arguments.valid_values_seed) {
                    (Some(values), None) => values.clone(),
                    (None, Some(seed)) => catalogue::seed(seed).ok_or_else(|| {
                        let names = catalogue::SEEDS.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(" or ");
                        self.error(at, place, format!("validValuesSeed {seed}"), names)
                    })?,
                    _ => {
                        return Err(self.error(at, place, "other arguments", "arguments with validValues or validValuesSeed"));
                    }
                };
                if values.is_empty() {
                    return Err(self.error(at, place, "no valid values", "at least one"));
                }
                let list = values.iter().map(|v| text(v)).collect::<Vec<_>>().join(", ");
                let broken_when = format!("coalesce({} NOT IN ({list}), false)", ident(c));
                self.rows(name("accepted_values"), broken_when, percent, bound, severity);
                Ok(bound.is_zero().then(|| values.into_iter().collect()))
            }
            ("library", Some("duplicateValues"), _) => {
                let columns = match (column, &q.arguments.properties) {
                    (Some(c), None) => vec![c.to_owned()],
                    (None, Some(columns)) if !columns.is_empty() => columns.clone(),
                    _ => return Err(self.error(at, place, "other arguments", "arguments with properties on the table")),
                };
                if let Some(unknown) = columns.iter().find(|c| !known.contains(*c)) {
                    return Err(self.error(at, place, format!("property {unknown}"), "a column of the table"));
                }
                let name = name("duplicateValues");
                self.rules.push(Rule { name, measure: Measure::Duplicates { columns, percent }, bound, severity });
                Ok(None)
            }
            ("sql", None, _) => {
                let (Some(id), Some(query)) = (&q.id, &q.query) else {
                    return Err(self.error(at, place, "sql without id or query", "both"));
                };
                let query = column.map_or_else(|| query.clone(), |c| query.replace("{property}", &ident(c)));
                if !query.contains("{object}") {
                    return Err(self.error(at, place, query.trim(), "a query on {object}"));
                }
                match row_condition(&query) {
                    Some(condition) => {
                        self.rows(id.clone(), format!("coalesce({condition}, false)"), percent, bound, severity);
                    }
                    None => {
                        let measure = Measure::Sql(query.trim().to_owned());
                        self.rules.push(Rule { name: id.clone(), measure, bound, severity });
                    }
                }
                Ok(None)
            }
            (kind, metric, _) => Err(self.error(
                at,
                place,
                format!("type {kind} with metric {}", metric.unwrap_or("none")),
                "rowCount on the table; nullValues, missingValues or invalidValues on a column; duplicateValues; sql; text",
            )),
        }
    }

    /// The literal of a limit, in the column's type.
    fn limit(&self, field: &str, kind: PhysicalType, limit: &Spanned<String>) -> Result<String, ContractError> {
        let (at, value) = (limit.referenced, limit.value.as_str());
        let number = || value.parse::<Number>().map_err(|()| self.error(at, field, value, Number::ALLOWED));
        let expected = |what: &str| self.error(at, field, value, what);
        match kind {
            PhysicalType::Int64 => {
                let n = number()?;
                if n.floor() == n.ceil() { Ok(n.floor().to_string()) } else { Err(expected("a whole number")) }
            }
            PhysicalType::Decimal(..) => {
                let n = number()?;
                let scale = n.to_string().split_once('.').map_or(0, |(_, f)| f.len());
                Ok(format!("CAST('{n}' AS DECIMAL(38,{scale}))"))
            }
            PhysicalType::Float64 => Ok(format!("CAST('{}' AS DOUBLE)", number()?)),
            PhysicalType::Date => {
                let day: NaiveDate = value.parse().map_err(|_| expected("a day such as 1997-01-31"))?;
                Ok(format!("DATE '{day}'"))
            }
            PhysicalType::Timestamp => {
                let at = DateTime::parse_from_rfc3339(value).map_err(|_| expected("an instant such as 1997-01-31T00:00:00Z"))?;
                Ok(instant(&at))
            }
            PhysicalType::String | PhysicalType::Boolean => Err(expected("no minimum or maximum for this type")),
        }
    }

    fn options(&mut self, p: &odcs::Property, kind: PhysicalType) -> Result<Vec<Limit>, ContractError> {
        let (name, mut limits) = (p.name.value.as_str(), Vec::new());
        for (option, value) in &p.logical_type_options {
            let column = ident(name);
            let condition = match option.as_str() {
                "minimum" => format!("{column} < {}", self.limit(name, kind, value)?),
                "exclusiveMinimum" => format!("{column} <= {}", self.limit(name, kind, value)?),
                "maximum" => format!("{column} > {}", self.limit(name, kind, value)?),
                "exclusiveMaximum" => format!("{column} >= {}", self.limit(name, kind, value)?),
                "minLength" | "maxLength" if kind == PhysicalType::String => {
                    let n: u32 = value
                        .value
                        .parse()
                        .map_err(|_| self.error(value.referenced, name, value.value.as_str(), "a number of characters"))?;
                    format!("character_length({column}) {} {n}", if option == "minLength" { "<" } else { ">" })
                }
                // How text or a time is written outside; columns here are typed.
                "format" | "timezone" | "defaultTimezone" => continue,
                _ => {
                    return Err(self.error(
                        value.referenced,
                        name,
                        format!("logicalTypeOptions {option}"),
                        "minimum, exclusiveMinimum, maximum, exclusiveMaximum, or minLength and maxLength of a string",
                    ));
                }
            };
            self.clauses.push(Clause { name: format!("{name}.{option}"), broken_when: format!("coalesce({condition}, false)") });
            limits.push(Limit { option: option.clone(), value: value.value.clone() });
        }
        Ok(limits)
    }

    fn relationship(&mut self, r: &Spanned<odcs::Relationship>, column: Option<&str>) -> Result<(), ContractError> {
        let (at, r) = (r.referenced, &r.value);
        let place = column.unwrap_or("relationships");
        let kind = r.r#type.as_deref().unwrap_or("foreignKey");
        if kind != "foreignKey" {
            return Err(self.error(at, place, format!("relationship of type {kind}"), "foreignKey"));
        }
        let split = |name: &str| match name.split_once('.') {
            Some((table, c)) if is_name(table) && is_name(c) => Ok((table.to_owned(), c.to_owned())),
            _ => Err(self.error(at, place, name, "table.column")),
        };
        let from = match (column, &r.from) {
            (Some(c), None) => vec![(self.table.clone(), c.to_owned())],
            (None, Some(from)) => from.list().into_iter().map(split).collect::<Result<_, _>>()?,
            _ => return Err(self.error(at, place, "a wrong from", "from on the table, and none on a column")),
        };
        let to = r.to.list().into_iter().map(split).collect::<Result<Vec<_>, _>>()?;
        let Some((table, _)) = to.first().cloned() else {
            return Err(self.error(at, place, "an empty relationship", "at least one column"));
        };
        if from.len() != to.len() || to.iter().any(|(t, _)| *t != table) || from.iter().any(|(t, _)| *t != self.table) {
            return Err(self.error(at, place, format!("{} columns to {}", from.len(), to.len()), "as many, each in one table"));
        }
        let mut severity = Severity::Error;
        for c in &r.custom_properties {
            if c.value.property != "severity" {
                return Err(self.error(c.referenced, place, c.value.property.as_str(), "property severity"));
            }
            severity = self.severity(c.referenced, place, Some(&c.value.value))?;
        }
        let columns: Vec<String> = from.into_iter().map(|(_, c)| c).collect();
        let name = format!("{}.references", columns.join("_"));
        self.references.push(Reference { name, columns, table, to: to.into_iter().map(|(_, c)| c).collect(), severity });
        Ok(())
    }

    fn freshness(&self, sla: &odcs::Sla, fields: &[Field]) -> Result<Option<Freshness>, ContractError> {
        let at = sla.property.referenced;
        if !["latency", "ly", "freshness"].contains(&sla.property.value.to_ascii_lowercase().as_str()) {
            return Ok(None);
        }
        let place = "slaProperties.latency";
        let amount: u64 = sla
            .value
            .value
            .parse()
            .map_err(|_| self.error(sla.value.referenced, place, sla.value.value.as_str(), "a whole number"))?;
        let seconds = match sla.unit.as_deref() {
            Some("s" | "second" | "seconds") => 1,
            Some("min" | "minute" | "minutes") => 60,
            Some("h" | "hour" | "hours") => 3_600,
            Some("d" | "day" | "days") => 86_400,
            other => {
                return Err(self.error(at, place, format!("unit {}", other.unwrap_or("none")), "s, min, h or d"));
            }
        };
        let element = sla.element.as_deref().unwrap_or_default();
        let column = element.strip_prefix(&format!("{}.", self.table)).unwrap_or(element);
        let timed = |f: &&Field| f.name == column && matches!(f.physical_type, PhysicalType::Timestamp | PhysicalType::Date);
        if fields.iter().find(timed).is_none() {
            return Err(self.error(at, place, format!("element {element:?}"), "a column of type timestamp or date"));
        }
        let at_most = Duration::from_secs(amount.saturating_mul(seconds));
        Ok(Some(Freshness { column: column.to_owned(), at_most }))
    }
}

/// Columns that carry a flag, in the order of their positions.
fn positioned<'a>(properties: &'a [odcs::Property], place: impl Fn(&'a odcs::Property) -> (bool, Option<i64>)) -> Vec<String> {
    let mut found: Vec<_> = properties
        .iter()
        .enumerate()
        .filter(|(_, p)| place(p).0)
        .map(|(i, p)| (place(p).1.unwrap_or(i64::MAX), i, p.name.value.clone()))
        .collect();
    found.sort();
    found.into_iter().map(|(_, _, name)| name).collect()
}

impl Contract {
    /// Parses a contract; `name` is used in errors only.
    ///
    /// # Errors
    /// When the text is no contract of version 3.1, or has a rule this program cannot judge. A key that the standard does not
    /// know is an error too: a misspelt rule would otherwise be no rule at all.
    pub fn parse(name: &str, text: &str) -> Result<Self, ContractError> {
        let file: odcs::File =
            serde_saphyr::from_str(text).map_err(|e| ContractError::Parse { name: name.into(), source: Box::new(e) })?;
        let mut reader =
            Reader { file: name, table: "contract".into(), clauses: Vec::new(), rules: Vec::new(), references: Vec::new() };
        if file.kind.value != "DataContract" {
            return Err(reader.error(file.kind.referenced, "kind", file.kind.value, "DataContract"));
        }
        if !["v3.1.0", "v3.1.1", "v3.1.2"].contains(&file.api_version.value.as_str()) {
            return Err(reader.error(file.api_version.referenced, "apiVersion", file.api_version.value, "v3.1.0"));
        }
        let [object] = file.schema.value.as_slice() else {
            let found = format!("{} objects", file.schema.value.len());
            return Err(reader.error(file.schema.referenced, "schema", found, "one"));
        };
        if !is_name(&object.name.value) {
            return Err(reader.error(object.name.referenced, "schema", object.name.value.as_str(), "a name such as ventas"));
        }
        reader.table = object.name.value.clone();
        let known: BTreeSet<String> = object.properties.iter().map(|p| p.name.value.clone()).collect();
        let mut fields: Vec<Field> = Vec::new();
        for p in &object.properties {
            let column = p.name.value.as_str();
            if !is_name(column) {
                return Err(reader.error(p.name.referenced, "", column, "a column name of letters, digits and _"));
            }
            if fields.iter().any(|f| f.name == column) {
                return Err(reader.error(p.name.referenced, column, "the same name twice", "each column once"));
            }
            let physical_type: PhysicalType = p.physical_type.value.parse().map_err(|()| {
                reader.error(p.physical_type.referenced, column, p.physical_type.value.as_str(), PhysicalType::ALLOWED)
            })?;
            if p.required {
                let broken_when = format!("{} IS NULL", ident(column));
                reader.clauses.push(Clause { name: format!("{column}.required"), broken_when });
            }
            let mut accepted = None;
            for q in &p.quality {
                accepted = reader.quality(q, Some(column), &known)?.or(accepted);
            }
            let limits = reader.options(p, physical_type)?;
            for r in &p.relationships {
                reader.relationship(r, Some(column))?;
            }
            let mut default = None;
            for c in &p.custom_properties {
                if c.value.property != "defaultValue" {
                    return Err(reader.error(c.referenced, column, c.value.property.as_str(), "property defaultValue"));
                }
                default = Some(c.value.value.clone());
            }
            fields.push(Field {
                name: column.into(),
                physical_type,
                required: p.required,
                unique: p.unique,
                accepted,
                limits,
                default,
            });
        }
        for q in &object.quality {
            reader.quality(q, None, &known)?;
        }
        for r in &object.relationships {
            reader.relationship(r, None)?;
        }
        if let Some(c) = reader.references.iter().flat_map(|r| &r.columns).find(|c| !known.contains(*c)) {
            return Err(reader.error(object.name.referenced, "relationships", format!("from {c}"), "a column of the table"));
        }
        let (mut quarantine_share_max, mut mean_shift_max, mut clustered_by) = ((0, 1), None, Vec::new());
        for c in &object.custom_properties {
            let (at, c) = (c.referenced, &c.value);
            let ratio = c.value.split_once('/').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            match (c.property.as_str(), ratio) {
                ("quarantineShareMax", Some((a, b))) if b > 0 => quarantine_share_max = (a, b),
                ("meanShiftMax", Some((a, b))) if b > 0 && a >= b => mean_shift_max = Some((a, b)),
                ("clusteredBy", _) => {
                    clustered_by = c.value.split(',').map(|s| s.trim().to_owned()).collect();
                    if let Some(unknown) = clustered_by.iter().find(|c| !known.contains(*c)) {
                        return Err(reader.error(at, "clusteredBy", unknown.as_str(), "a column of the table"));
                    }
                }
                _ => {
                    let found = format!("{} {}", c.property, c.value);
                    let expected = "quarantineShareMax with a ratio such as 5/1000, meanShiftMax with a ratio of one or more such as \
                                    10/1, or clusteredBy with columns";
                    return Err(reader.error(at, "customProperties", found, expected));
                }
            }
        }
        let mut freshness = Vec::new();
        for sla in &file.sla_properties {
            freshness.extend(reader.freshness(sla, &fields)?);
        }
        let (mut rows_min, mut rows_max) = (0, u64::MAX);
        for rule in reader.rules.iter().filter(|r| r.measure == Measure::RowCount && r.severity == Severity::Error) {
            let (low, high) = match rule.bound {
                Bound::Equal(n) => (n.ceil(), n.floor()),
                Bound::Above(n) => (n.floor() + 1, i128::MAX),
                Bound::AtLeast(n) => (n.ceil(), i128::MAX),
                Bound::Below(n) => (0, n.ceil() - 1),
                Bound::AtMost(n) => (0, n.floor()),
                Bound::Between(a, b) => (a.floor() + 1, b.ceil() - 1),
                // These are no range; they are judged by `check` alone.
                Bound::NotEqual(_) | Bound::NotBetween(..) => continue,
            };
            rows_min = rows_min.max(u64::try_from(low.max(0)).unwrap_or(u64::MAX));
            rows_max = rows_max.min(u64::try_from(high.max(0)).unwrap_or(u64::MAX));
        }
        let mut names = BTreeSet::new();
        let mut all = reader.clauses.iter().map(|c| &c.name).chain(reader.rules.iter().map(|r| &r.name));
        if let Some(twice) = all.find(|n| !names.insert((*n).clone())) {
            return Err(reader.error(object.name.referenced, "quality", format!("two rules named {twice}"), "an id of its own"));
        }
        Ok(Self {
            id: format!("{} {}", file.id, file.version),
            table: reader.table.clone(),
            physical_name: object.physical_name.clone().unwrap_or_else(|| reader.table.clone()),
            columns: fields.iter().map(|f| Column { name: f.name.clone(), physical_type: f.physical_type.to_string() }).collect(),
            key: positioned(&object.properties, |p| (p.primary_key, p.primary_key_position)),
            partition: positioned(&object.properties, |p| (p.partitioned, p.partition_key_position)),
            clustered_by,
            fields,
            clauses: reader.clauses,
            rules: reader.rules,
            references: reader.references,
            freshness,
            rows_min,
            rows_max,
            quarantine_share_max,
            mean_shift_max,
        })
    }
}
