//! Contracts: Open Data Contract Standard v3.1 files, read and never restated.
//!
//! A contract says which columns a table has, which rows are acceptable and how many are expected.
//! What it does not say is what happens to the rest: that is [`crate::batch`]'s business.

use serde::Deserialize;

use crate::ports::Column;

/// A problem with a contract file itself.
#[derive(Debug, thiserror::Error)]
pub enum ContractError {
    /// The file is not a contract; the cause names line and column.
    #[error("read contract {name}")]
    Parse {
        /// File name.
        name: String,
        /// Line, column and what was expected.
        #[source]
        source: Box<serde_saphyr::Error>,
    },
    /// A rule this program cannot judge.
    #[error("contract {name}: {place} has {found}, expected {expected}")]
    Rule {
        /// File name.
        name: String,
        /// Where in the file.
        place: String,
        /// What stands there.
        found: String,
        /// What could stand there.
        expected: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct File {
    api_version: String,
    kind: String,
    id: String,
    version: String,
    schema: Vec<Object>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Object {
    name: String,
    properties: Vec<Property>,
    #[serde(default)]
    quality: Vec<Quality>,
    #[serde(default)]
    custom_properties: Vec<Custom>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Property {
    name: String,
    physical_type: String,
    #[serde(default)]
    required: bool,
    #[serde(default)]
    quality: Vec<Quality>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Quality {
    id: Option<String>,
    metric: Option<String>,
    query: Option<String>,
    arguments: Option<Arguments>,
    must_be_between: Option<[u64; 2]>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Arguments {
    #[serde(default)]
    valid_values: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Custom {
    property: String,
    value: String,
}

/// A row-level clause: its name, and the SQL condition under which a row breaks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// For example `region.required`.
    pub name: String,
    /// True for a row that breaks the clause; never null.
    pub broken_when: String,
}

/// What a table must look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contract {
    /// Id and version, as in the file.
    pub id: String,
    /// Table.
    pub table: String,
    /// Columns in order.
    pub columns: Vec<Column>,
    /// Row-level clauses in the file's order.
    pub clauses: Vec<Clause>,
    /// Least and most rows of a day.
    pub rows_min: u64,
    /// See `rows_min`.
    pub rows_max: u64,
    /// Above this share of quarantined rows the day is held: numerator and denominator.
    pub quarantine_share_max: (u64, u64),
}

/// One difference between a contract and what the source declares.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaDifference {
    /// The source lacks a column of the contract.
    #[error("column {0} is missing, the contract expects {1}")]
    Missing(String, String),
    /// The source has a column that the contract does not know.
    #[error("column {0} ({1}) is not in the contract")]
    Extra(String, String),
    /// One missing and one extra column of the same type at the same place.
    #[error("column {0} seems to be renamed to {1}")]
    Renamed(String, String),
    /// The type differs.
    #[error("column {0} has type {1}, the contract expects {2}")]
    Retyped(String, String, String),
}

impl Contract {
    /// Parses a contract; `name` is used in errors only.
    ///
    /// # Errors
    /// When the text is no contract of version 3.1, or has a rule this program cannot judge.
    pub fn parse(name: &str, text: &str) -> Result<Self, ContractError> {
        let file: File =
            serde_saphyr::from_str(text).map_err(|e| ContractError::Parse { name: name.into(), source: Box::new(e) })?;
        let rule = |place: &str, found: &str, expected: &str| ContractError::Rule {
            name: name.into(),
            place: place.into(),
            found: found.into(),
            expected: expected.into(),
        };
        if file.kind != "DataContract" || !file.api_version.starts_with("v3.1") {
            return Err(rule("apiVersion and kind", &format!("{} {}", file.api_version, file.kind), "v3.1.x DataContract"));
        }
        let [object] = file.schema.as_slice() else {
            return Err(rule("schema", &format!("{} objects", file.schema.len()), "one"));
        };
        let mut clauses = Vec::new();
        for p in &object.properties {
            if !["string", "decimal(10,2)", "timestamp", "date"].contains(&p.physical_type.as_str()) {
                return Err(rule(&p.name, &p.physical_type, "string, decimal(10,2), timestamp or date"));
            }
            if p.required {
                clauses.push(Clause { name: format!("{}.required", p.name), broken_when: format!("{} IS NULL", p.name) });
            }
            for q in &p.quality {
                if q.metric.as_deref() != Some("invalidValues") {
                    return Err(rule(&p.name, &format!("{:?}", q.metric), "metric invalidValues"));
                }
                let values = q.arguments.as_ref().map(|a| a.valid_values.as_slice()).unwrap_or_default();
                let list = values.iter().map(|v| format!("'{}'", v.replace('\'', "''"))).collect::<Vec<_>>().join(", ");
                clauses.push(Clause {
                    name: format!("{}.accepted_values", p.name),
                    broken_when: format!("coalesce({} NOT IN ({list}), false)", p.name),
                });
            }
        }
        let (mut rows_min, mut rows_max) = (0, u64::MAX);
        for q in &object.quality {
            if let (Some("rowCount"), Some([min, max])) = (q.metric.as_deref(), q.must_be_between) {
                (rows_min, rows_max) = (min, max);
            } else if let (Some(id), Some((_, condition))) = (&q.id, q.query.as_ref().and_then(|q| q.split_once(" WHERE "))) {
                clauses.push(Clause { name: id.clone(), broken_when: format!("coalesce({condition}, false)") });
            } else {
                return Err(rule(&object.name, &format!("{q:?}"), "rowCount with mustBeBetween, or sql with id and WHERE"));
            }
        }
        let mut quarantine_share_max = (0, 1);
        for c in &object.custom_properties {
            let parsed = c.value.split_once('/').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            match (c.property.as_str(), parsed) {
                ("quarantineShareMax", Some((a, b))) if b > 0 => quarantine_share_max = (a, b),
                _ => return Err(rule(&c.property, &c.value, "quarantineShareMax with a ratio such as 5/1000")),
            }
        }
        Ok(Self {
            id: format!("{} {}", file.id, file.version),
            table: object.name.clone(),
            columns: object
                .properties
                .iter()
                .map(|p| Column { name: p.name.clone(), physical_type: p.physical_type.clone() })
                .collect(),
            clauses,
            rows_min,
            rows_max,
            quarantine_share_max,
        })
    }

    /// All differences between the contract and `found`; none when they agree. The order of columns does not matter.
    pub fn differences(&self, found: &[Column]) -> Vec<SchemaDifference> {
        let mut missing = Vec::new();
        let mut out = Vec::new();
        for want in &self.columns {
            match found.iter().find(|c| c.name == want.name) {
                Some(have) if have.physical_type == want.physical_type => {}
                Some(have) => {
                    out.push(SchemaDifference::Retyped(want.name.clone(), have.physical_type.clone(), want.physical_type.clone()))
                }
                None => missing.push(want),
            }
        }
        let mut extra: Vec<&Column> = found.iter().filter(|c| !self.columns.iter().any(|w| w.name == c.name)).collect();
        for want in missing {
            // A rename shows as one column gone and one new; with exactly one of each, say so.
            match extra.as_slice() {
                [only] if self.columns.len() == found.len() => {
                    out.push(SchemaDifference::Renamed(want.name.clone(), only.name.clone()));
                    extra.clear();
                }
                _ => out.push(SchemaDifference::Missing(want.name.clone(), want.physical_type.clone())),
            }
        }
        out.extend(extra.into_iter().map(|c| SchemaDifference::Extra(c.name.clone(), c.physical_type.clone())));
        out
    }
}
