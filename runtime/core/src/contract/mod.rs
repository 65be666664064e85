//! Contracts: Open Data Contract Standard v3.1 files, read and never restated.
//!
//! A contract says which columns a table has, which rows are acceptable, how many are expected, how fresh they are and what
//! they refer to. What it does not say is what happens to the rest: that is [`crate::batch`]'s business.
//!
//! [`check`] judges tables by their contract, [`diff`] compares two contracts, [`catalogue`] has those that ship.

pub mod catalogue;
pub mod check;
pub mod diff;
mod odcs;
mod read;
mod value;

use std::{collections::BTreeSet, time::Duration};

use chrono::DateTime;

pub use value::{Bound, Number, PhysicalType};

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
    #[error("contract {name}, line {line}: {place} has {found}, expected {expected}")]
    Rule {
        /// File name.
        name: String,
        /// Line in the file, from 1.
        line: u64,
        /// Where in the contract, for example `ventas.region`.
        place: String,
        /// What stands there.
        found: String,
        /// What could stand there.
        expected: String,
    },
}

/// A row-level clause: its name, and the SQL condition under which a row breaks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clause {
    /// For example `region.required`.
    pub name: String,
    /// True for a row that breaks the clause; never null.
    pub broken_when: String,
}

/// How much a broken rule matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Somebody may want to know.
    Info,
    /// Somebody should look.
    Warning,
    /// The data must not be used.
    Error,
}

impl Severity {
    /// The word in contracts and in `metadata.quality_results`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// A limit that the standard calls a logical type option.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Limit {
    /// `minimum`, `exclusiveMinimum`, `maximum`, `exclusiveMaximum`, `minLength` or `maxLength`.
    pub option: String,
    /// As written: a number, a day or an instant.
    pub value: String,
}

/// A column with everything that its contract says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Name, exactly.
    pub name: String,
    /// Type.
    pub physical_type: PhysicalType,
    /// Never null.
    pub required: bool,
    /// Never twice in the table.
    pub unique: bool,
    /// The only values there may be, sorted; `None` when any value may be.
    pub accepted: Option<BTreeSet<String>>,
    /// Limits, sorted.
    pub limits: Vec<Limit>,
    /// What stands for null where the data is transformed, as written.
    pub default: Option<String>,
}

/// What is counted or computed, to be judged by a [`Bound`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Measure {
    /// Rows of the day, or of the table when it has no days.
    RowCount,
    /// Rows for which the condition is true.
    BrokenRows {
        /// SQL condition, never null.
        broken_when: String,
        /// In percent of all rows rather than in rows.
        percent: bool,
    },
    /// Rows whose columns are not unique, beyond the first of each.
    Duplicates {
        /// The columns that should differ.
        columns: Vec<String>,
        /// In percent of all rows rather than in rows.
        percent: bool,
    },
    /// The one number that a statement gives; `{object}` stands for the table.
    Sql(String),
}

/// A rule on a table as a whole, which no single row can break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Unique within the contract, for example `rowCount.min`.
    pub name: String,
    /// What is measured.
    pub measure: Measure,
    /// What it must be.
    pub bound: Bound,
    /// How much it matters.
    pub severity: Severity,
}

/// Columns whose values must exist in another table, where they are not null.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// For example `user_id.references`.
    pub name: String,
    /// Columns here.
    pub columns: Vec<String>,
    /// Name of the other table, as its own contract has it.
    pub table: String,
    /// Columns there, in the same order.
    pub to: Vec<String>,
    /// How much it matters.
    pub severity: Severity,
}

/// How old the newest value of a column may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freshness {
    /// A column of type timestamp or date.
    pub column: String,
    /// Greatest age.
    pub at_most: Duration,
}

/// What a table must look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contract {
    /// Id and version, as in the file.
    pub id: String,
    /// Table.
    pub table: String,
    /// Where the table is: a folder of the lake such as `staging/ventas_validadas`, or the source's own name.
    pub physical_name: String,
    /// Columns in order.
    pub columns: Vec<Column>,
    /// Columns in order, with all that is said of them.
    pub fields: Vec<Field>,
    /// Columns of the primary key, in its order; empty when there is none.
    pub key: Vec<String>,
    /// Columns of the partition, in its order; empty when there is none.
    pub partition: Vec<String>,
    /// Columns by which rows are laid out within a partition; empty when there are none.
    pub clustered_by: Vec<String>,
    /// Row-level clauses in the file's order.
    pub clauses: Vec<Clause>,
    /// Rules on the table as a whole, in the file's order.
    pub rules: Vec<Rule>,
    /// References to other tables, in the file's order.
    pub references: Vec<Reference>,
    /// Freshness, in the file's order.
    pub freshness: Vec<Freshness>,
    /// Least and most rows of a day.
    pub rows_min: u64,
    /// See `rows_min`.
    pub rows_max: u64,
    /// Above this share of quarantined rows the day is held: numerator and denominator.
    pub quarantine_share_max: (u64, u64),
    /// The mean net amount of a day is at most so many times, and at least so many parts of, that of the days before it:
    /// numerator and denominator. `None` when it may be anything.
    pub mean_shift_max: Option<(u64, u64)>,
}

/// A column as a source or a stored table declares it, with what it says of nulls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declared {
    /// Name, exactly.
    pub name: String,
    /// Physical type in the contract's words.
    pub physical_type: String,
    /// Whether a null may come; `None` when the declaration does not say, as in a CSV file.
    pub nullable: Option<bool>,
}

impl From<&Column> for Declared {
    fn from(c: &Column) -> Self {
        Self { name: c.name.clone(), physical_type: c.physical_type.clone(), nullable: None }
    }
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
    /// One missing and one extra column of the same type.
    #[error("column {0} seems to be renamed to {1}")]
    Renamed(String, String),
    /// The type differs.
    #[error("column {0} has type {1}, the contract expects {2}")]
    Retyped(String, String, String),
    /// The source may send a null where the contract has none.
    #[error("column {0} may be null, the contract expects a value in every row")]
    Nullable(String),
}

/// A name as a SQL identifier.
pub(crate) fn ident(name: &str) -> String {
    format!("\"{name}\"")
}

/// A value as a SQL string.
pub(crate) fn text(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

/// An instant as a SQL value of the type that our tables have.
pub(crate) fn instant<Tz: chrono::TimeZone>(at: &DateTime<Tz>) -> String {
    let utc = at.to_utc().format("%Y-%m-%dT%H:%M:%S%.6fZ");
    format!("arrow_cast('{utc}', 'Timestamp(Microsecond, Some(\"UTC\"))')")
}

impl Contract {
    /// Columns that are never null, in order.
    pub fn required_columns(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().filter(|f| f.required).map(|f| f.name.as_str())
    }

    /// All differences between the contract and `found`; none when they agree. The order of columns does not matter.
    ///
    /// A [`Column`] does not say whether it may be null; [`Contract::declared_differences`] compares that too.
    pub fn differences(&self, found: &[Column]) -> Vec<SchemaDifference> {
        self.declared_differences(&found.iter().map(Declared::from).collect::<Vec<_>>())
    }

    /// All differences between the contract and what is declared, nulls included; none when they agree.
    ///
    /// A column that is declared not null where the contract allows null is no difference: the promise is kept.
    pub fn declared_differences(&self, found: &[Declared]) -> Vec<SchemaDifference> {
        let same_type = |field: &Field, text: &str| text.parse() == Ok(field.physical_type);
        let mut missing = Vec::new();
        let mut out = Vec::new();
        for want in &self.fields {
            let Some(have) = found.iter().find(|c| c.name == want.name) else {
                missing.push(want);
                continue;
            };
            if !same_type(want, &have.physical_type) {
                let (found, expected) = (have.physical_type.clone(), want.physical_type.to_string());
                out.push(SchemaDifference::Retyped(want.name.clone(), found, expected));
            }
            if want.required && have.nullable == Some(true) {
                out.push(SchemaDifference::Nullable(want.name.clone()));
            }
        }
        let mut extra: Vec<&Declared> = found.iter().filter(|c| !self.fields.iter().any(|w| w.name == c.name)).collect();
        // A rename shows as one column gone and one new of the same type; with exactly one of each, say so.
        let renamed = match (missing.as_slice(), extra.as_slice()) {
            ([want], [have]) if same_type(want, &have.physical_type) => {
                Some(SchemaDifference::Renamed(want.name.clone(), have.name.clone()))
            }
            _ => None,
        };
        if let Some(renamed) = renamed {
            out.push(renamed);
            missing.clear();
            extra.clear();
        }
        out.extend(missing.iter().map(|w| SchemaDifference::Missing(w.name.clone(), w.physical_type.to_string())));
        out.extend(extra.iter().map(|c| SchemaDifference::Extra(c.name.clone(), c.physical_type.clone())));
        out
    }

    /// What must be unique: a name for the check, and the columns. The primary key comes first.
    pub fn uniques(&self) -> Vec<(String, Vec<String>)> {
        let mut out = Vec::new();
        if !self.key.is_empty() {
            out.push((format!("{}.unique", self.key.join("_")), self.key.clone()));
        }
        for field in self.fields.iter().filter(|f| f.unique && self.key != [f.name.clone()]) {
            out.push((format!("{}.unique", field.name), vec![field.name.clone()]));
        }
        out
    }

    /// The layer of the table: the first folder of its place in the lake, `source` for a table of a source.
    pub fn layer(&self) -> &str {
        self.physical_name.split_once('/').map_or("source", |(layer, _)| layer)
    }

    /// The column with this name.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.fields.iter().find(|f| f.name == name)
    }

    /// Whether the table is stored in days.
    pub fn by_day(&self) -> bool {
        self.partition == ["fecha"]
    }
}
