//! Models as SQL: for one day, with references resolved and every table limited to the days that may be read.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Days, NaiveDate, Utc};

use super::{Lookback, Materialization, Model, ModelTest, Need, Part, Project, TestKind};
use crate::{
    contract::{Contract, ident, instant, text},
    ports::{Input, Query},
};

/// For which day a model is made, when, and by which version.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The day.
    pub day: NaiveDate,
    /// Time of processing.
    pub now: DateTime<Utc>,
    /// Version of the pipeline.
    pub version: &'a str,
    /// Optional sources that are not there.
    pub absent: &'a BTreeSet<Need>,
}

/// Inputs by their names in the statement.
type Inputs = BTreeMap<String, Input>;

/// A table as it may be read: its rows from the first day that the lookback allows to the day itself.
fn days(table: &str, day: NaiveDate, lookback: Lookback) -> String {
    let table = ident(table);
    match lookback {
        Lookback::Days(0) => format!("(SELECT * FROM {table} WHERE fecha = DATE '{day}')"),
        Lookback::Days(n) => {
            let first = day.checked_sub_days(Days::new(u64::from(n))).unwrap_or(NaiveDate::MIN);
            format!("(SELECT * FROM {table} WHERE fecha >= DATE '{first}' AND fecha <= DATE '{day}')")
        }
        Lookback::All => format!("(SELECT * FROM {table} WHERE fecha <= DATE '{day}')"),
    }
}

/// A table with the columns of a contract and no rows.
fn nothing(contract: &Contract) -> String {
    let columns = contract.fields.iter().map(|f| {
        let arrow = f.physical_type.data_type().to_string().replace('\'', "''");
        format!("arrow_cast(NULL, '{arrow}') AS {}", ident(&f.name))
    });
    format!("(SELECT {} WHERE false)", columns.collect::<Vec<_>>().join(", "))
}

impl Project {
    /// The query that makes one day of a model, in the order of its key; for a view, what a reader of that day sees.
    pub fn render(&self, model: &Model, at: &At<'_>) -> Query {
        let mut inputs = Inputs::new();
        let sql = self.body(model, at, model.lookback, &mut inputs);
        let order = model.key.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ");
        Query { sql: format!("SELECT * FROM (\n{sql}\n) ORDER BY {order}"), inputs: inputs.into_iter().collect() }
    }

    /// The queries of a model's tests for one day; each gives the number of rows that fail.
    pub fn tests<'a>(&self, model: &'a Model, at: &At<'_>) -> Vec<(&'a ModelTest, Query)> {
        model.tests.iter().map(|t| (t, self.test(model, &t.kind, at))).collect()
    }

    /// A model as others read it: a view's SQL, or its stored days.
    fn relation(&self, model: &Model, at: &At<'_>, lookback: Lookback, inputs: &mut Inputs) -> String {
        match model.materialization {
            Materialization::View => format!("(\n{}\n)", self.body(model, at, lookback, inputs)),
            Materialization::Day => {
                inputs.insert(model.name.clone(), Input::Delta(model.table.clone()));
                days(&model.name, at.day, lookback)
            }
        }
    }

    /// A model's own SQL, where every table that it reads is limited to `lookback`.
    fn body(&self, model: &Model, at: &At<'_>, lookback: Lookback, inputs: &mut Inputs) -> String {
        let mut sql = String::new();
        for part in &model.parts {
            match part {
                Part::Sql(text) => sql.push_str(text),
                Part::Day => sql.push_str(&format!("DATE '{}'", at.day)),
                Part::Now => sql.push_str(&instant(&at.now)),
                Part::Version => sql.push_str(&text(at.version)),
                Part::Need(Need::Model(name)) => {
                    // `Project::new` has refused references to nothing.
                    sql.push_str(&self.relation(&self.models[name], at, lookback, inputs));
                }
                Part::Need(need @ Need::Source(schema, table)) => {
                    let Some(contract) = self.source(schema, table) else { continue };
                    if at.absent.contains(need) {
                        sql.push_str(&nothing(contract));
                        continue;
                    }
                    let name = format!("{schema}_{table}");
                    inputs.insert(name.clone(), Input::Delta(contract.physical_name.clone()));
                    if contract.by_day() {
                        sql.push_str(&days(&name, at.day, lookback));
                    } else {
                        sql.push_str(&ident(&name));
                    }
                }
            }
        }
        sql.trim().to_owned()
    }

    fn test(&self, model: &Model, kind: &TestKind, at: &At<'_>) -> Query {
        let mut inputs = Inputs::new();
        let rows = self.relation(model, at, Lookback::Days(0), &mut inputs);
        let sql = match kind {
            TestKind::NotNull(columns) => {
                let any = columns.iter().map(|c| format!("{} IS NULL", ident(c))).collect::<Vec<_>>().join(" OR ");
                format!("SELECT count(*) FROM {rows} WHERE {any}")
            }
            TestKind::Unique(columns) => {
                let names = columns.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ");
                let on = columns.iter().map(|c| format!("a.{0} = b.{0}", ident(c))).collect::<Vec<_>>().join(" AND ");
                // A key without the day must not come back on another day either.
                let whole = match model.materialization {
                    Materialization::Day if !columns.iter().any(|c| c == "fecha") => ident(&model.name),
                    Materialization::Day | Materialization::View => rows.clone(),
                };
                format!(
                    "SELECT count(*) FROM (SELECT {names} FROM {rows}) AS a
                     JOIN (SELECT {names} FROM {whole} GROUP BY {names} HAVING count(*) > 1) AS b ON {on}"
                )
            }
            TestKind::AcceptedValues(column, values) => {
                let list = values.iter().map(|v| text(v)).collect::<Vec<_>>().join(", ");
                format!("SELECT count(*) FROM {rows} WHERE coalesce({} NOT IN ({list}), false)", ident(column))
            }
            TestKind::Relationships(column, to, to_column) => {
                let other = self.relation(&self.models[to], at, Lookback::Days(0), &mut inputs);
                let (column, to_column) = (ident(column), ident(to_column));
                format!(
                    "SELECT count(*) FROM {rows} AS a WHERE a.{column} IS NOT NULL
                     AND NOT EXISTS (SELECT 1 FROM {other} AS o WHERE o.{to_column} = a.{column})"
                )
            }
        };
        Query { sql, inputs: inputs.into_iter().collect() }
    }
}
