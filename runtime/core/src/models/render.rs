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
    /// Optional sources, and models that are not made, that are not there.
    pub absent: &'a BTreeSet<Need>,
}

/// The last day that SQL has a literal for.
const LAST_DAY: NaiveDate = NaiveDate::from_ymd_opt(9999, 12, 31).expect("it is in the calendar");

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

/// When a row fails a test, for a test that looks at rows one by one; never null.
fn condition(kind: &TestKind) -> Option<String> {
    let any = |columns: &[String], broken: &str| {
        columns.iter().map(|c| format!("{} {broken}", ident(c))).collect::<Vec<_>>().join(" OR ")
    };
    match kind {
        TestKind::NotNull(columns) => Some(any(columns, "IS NULL")),
        TestKind::NotNegative(columns) => Some(format!("coalesce({}, false)", any(columns, "< 0"))),
        TestKind::AcceptedValues(column, values) => {
            let values = values.iter().map(|v| text(v)).collect::<Vec<_>>().join(", ");
            Some(format!("coalesce({} NOT IN ({values}), false)", ident(column)))
        }
        TestKind::Unique(..) | TestKind::Relationships(..) => None,
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

    /// The rows of a model as they are stored: a null in a column that its contract requires is an error, also for whoever
    /// writes to the table later. In the order of the key.
    pub(super) fn guarded(&self, model: &Model, query: Query) -> Query {
        let contract = self.contracts.iter().find(|c| c.physical_name == model.table);
        let required = contract.into_iter().flat_map(Contract::required_columns);
        let guards = required.map(|c| format!("not_null({0}, {1}) AS {0}", ident(c), text(c))).collect::<Vec<_>>().join(", ");
        if guards.is_empty() {
            return query;
        }
        let order = model.key.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ");
        let sql = format!("SELECT * REPLACE ({guards}) FROM (\n{}\n) ORDER BY {order}", query.sql);
        Query { sql, inputs: query.inputs }
    }

    /// A test of a model for one day, as a query for the rows that fail it: the model's key and what the test is about.
    pub fn test(&self, model: &Model, test: &ModelTest, at: &At<'_>) -> Query {
        let mut inputs = Inputs::new();
        let sql = self.failing(model, &test.kind, at, &mut inputs);
        Query { sql, inputs: inputs.into_iter().collect() }
    }

    /// Every test of every chosen model for one day, but for those that compare with an absent source, and one query whose
    /// one row has the number of failing rows of each, in that order.
    pub fn tests(&self, at: &At<'_>) -> (Vec<(&Model, &ModelTest)>, Query) {
        // Whether a customer is known cannot be said without the customers.
        let known = |t: &ModelTest| match &t.kind {
            TestKind::Relationships(_, to, _) => self.models[to].optional.is_disjoint(at.absent),
            TestKind::NotNull(_) | TestKind::Unique(..) | TestKind::AcceptedValues(..) | TestKind::NotNegative(_) => true,
        };
        let tests: Vec<_> = self.chosen().flat_map(|m| m.tests.iter().filter(|t| known(t)).map(move |t| (m, t))).collect();
        let mut inputs = Inputs::new();
        let mut parts: Vec<String> = Vec::new();
        for model in self.chosen() {
            let mine = || tests.iter().enumerate().filter(|(_, (m, _))| m.name == model.name).map(|(i, (_, t))| (i, *t));
            // Conditions on rows share one reading of them.
            let on_rows =
                mine().filter_map(|(i, t)| condition(&t.kind).map(|c| format!("count(CASE WHEN {c} THEN 1 END) AS t{i}")));
            let on_rows: Vec<_> = on_rows.collect();
            if !on_rows.is_empty() {
                let rows = self.relation(model, at, Lookback::Days(0), &mut inputs);
                parts.push(format!("(SELECT {} FROM {rows})", on_rows.join(", ")));
            }
            for (i, test) in mine().filter(|(_, t)| condition(&t.kind).is_none()) {
                let failing = self.failing(model, &test.kind, at, &mut inputs);
                parts.push(format!("(SELECT count(*) AS t{i} FROM (\n{failing}\n))"));
            }
        }
        let columns = (0..tests.len()).map(|i| format!("t{i}")).collect::<Vec<_>>().join(", ");
        let sql = format!("SELECT {columns} FROM {}", parts.join("\nCROSS JOIN "));
        (tests, Query { sql, inputs: inputs.into_iter().collect() })
    }

    /// A model over the days that end with one that need not be that of `at`.
    fn relation_over(&self, model: &Model, at: &At<'_>, around: (NaiveDate, Lookback), inputs: &mut Inputs) -> String {
        let (day, lookback) = around;
        self.relation(model, &At { day, ..*at }, lookback, inputs)
    }

    /// A model as others read it: a view's SQL, or its stored days.
    fn relation(&self, model: &Model, at: &At<'_>, lookback: Lookback, inputs: &mut Inputs) -> String {
        match model.materialization {
            Materialization::View => format!("(\n{}\n)", self.body(model, at, lookback, inputs)),
            Materialization::Day if at.absent.contains(&Need::Model(model.name.clone())) => {
                // Only a model with a contract is ever absent.
                self.contracts.iter().find(|c| c.physical_name == model.table).map(nothing).unwrap_or_default()
            }
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

    /// The rows of a day that fail a test.
    fn failing(&self, model: &Model, kind: &TestKind, at: &At<'_>, inputs: &mut Inputs) -> String {
        let rows = self.relation(model, at, Lookback::Days(0), inputs);
        let list = |columns: &[String]| columns.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ");
        // The key says which row it is; a column of the test may be part of it.
        let shown = |of_test: &[String]| {
            let mut columns = model.key.clone();
            columns.extend(of_test.iter().filter(|c| !model.key.contains(c)).cloned());
            list(&columns)
        };
        match kind {
            TestKind::Unique(columns, reach) => {
                let names = list(columns);
                let on = columns.iter().map(|c| format!("a.{0} = b.{0}", ident(c))).collect::<Vec<_>>().join(" AND ");
                let first = columns.iter().map(|c| format!("a.{}", ident(c))).collect::<Vec<_>>().join(", ");
                // A key without the day must not come back on another day either, earlier or later.
                let around = match reach {
                    Some(n) => (at.day.checked_add_days(Days::new(u64::from(*n))).unwrap_or(LAST_DAY), Lookback::Days(2 * n)),
                    None => (LAST_DAY, Lookback::All),
                };
                let whole = if columns.iter().any(|c| c == "fecha") {
                    rows.clone()
                } else {
                    self.relation_over(model, at, around, inputs)
                };
                // Groups by a number take less memory than groups by a text, and hardly any key has a number of another.
                let repeated = match columns.as_slice() {
                    [column] => {
                        let hash = format!("hash_before(CAST({} AS VARCHAR), '')", ident(column));
                        format!(
                            " WHERE {hash} IN (SELECT h FROM (SELECT {hash} AS h FROM {whole}) GROUP BY h HAVING count(*) > 1)"
                        )
                    }
                    _ => String::new(),
                };
                // What comes first is kept, and the keys that come again are few.
                format!(
                    "SELECT {first} FROM (SELECT {names} FROM {whole}{repeated} GROUP BY {names} HAVING count(*) > 1) AS b
                     JOIN (SELECT {names} FROM {rows}) AS a ON {on}"
                )
            }
            TestKind::NotNull(columns) | TestKind::NotNegative(columns) => {
                format!("SELECT {} FROM {rows} WHERE {}", shown(columns), condition(kind).unwrap_or_default())
            }
            TestKind::AcceptedValues(column, _) => {
                let shown = shown(std::slice::from_ref(column));
                format!("SELECT {shown} FROM {rows} WHERE {}", condition(kind).unwrap_or_default())
            }
            TestKind::Relationships(column, to, to_column) => {
                let other = self.relation(&self.models[to], at, Lookback::Days(0), inputs);
                let shown = shown(std::slice::from_ref(column));
                let (column, to_column) = (ident(column), ident(to_column));
                format!(
                    "SELECT {shown} FROM {rows} AS a WHERE a.{column} IS NOT NULL
                     AND NOT EXISTS (SELECT 1 FROM {other} AS o WHERE o.{to_column} = a.{column})"
                )
            }
        }
    }
}
