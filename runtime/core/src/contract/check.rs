//! Tables judged by their contract: all checks run, and all outcomes come back together.
//!
//! The SQL is made from the contract and goes through the [`Lakehouse`] port; a live source is asked for its columns through
//! [`TableSource`]. A check that cannot be carried out has failed, with the reason as what was observed. What to do about a
//! failure (hold the day, page somebody) is left to the caller, and so is storing the outcomes.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use arrow::{
    array::{
        Array, ArrayRef, AsArray, BooleanArray, Date32Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    },
    compute::cast,
    datatypes::{DataType, Decimal128Type, Field as ArrowField, Int64Type, Schema},
};
use chrono::{DateTime, NaiveDate, Utc};

use super::{Bound, Contract, Declared, Measure, Number, PhysicalType, Reference, Rule, Severity, ident};
use crate::ports::{Input, Lakehouse, PortError, Query, Result, TableSource};

/// The outcome of one check: a row of `metadata.quality_results`, whose contract has the same columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QualityResult {
    /// Name of the check, unique for the asset, for example `region.accepted_values`.
    pub check: String,
    /// Layer of the asset: `source`, `raw`, `staging`, `marts`, ...
    pub layer: String,
    /// Table.
    pub asset: String,
    /// The day that was checked; for a table without days the day on whose behalf it was.
    pub fecha: NaiveDate,
    /// How much a failure matters.
    pub severity: Severity,
    /// Whether the contract was kept.
    pub passed: bool,
    /// What was found, with its unit, or why nothing could be.
    pub observed: String,
    /// What the contract asks, with its unit.
    pub expected: String,
    /// Rows that break the check; 0 for a check that is not about rows.
    pub failing_rows: u64,
    /// When.
    pub checked_at: DateTime<Utc>,
}

/// Whether any check of severity error failed: the data must not be used.
pub fn is_broken(results: &[QualityResult]) -> bool {
    results.iter().any(|r| !r.passed && r.severity == Severity::Error)
}

/// Checks the columns that a live source declares now.
pub async fn check_source(
    tables: &dyn TableSource,
    contract: &Contract,
    fecha: NaiveDate,
    now: DateTime<Utc>,
) -> Vec<QualityResult> {
    let declared = tables.columns(&contract.table).await.map(|c| c.iter().map(Declared::from).collect());
    vec![schema(&Judge::of(contract, fecha, now), declared)]
}

/// Checks the columns of a source that also says what may be null.
pub fn check_declared(contract: &Contract, declared: Vec<Declared>, fecha: NaiveDate, now: DateTime<Utc>) -> QualityResult {
    schema(&Judge::of(contract, fecha, now), Ok(declared))
}

/// Checks a stored table: its columns, and the rows of `fecha` (all rows when the table has no days).
///
/// `others` are the contracts of tables that this one refers to. Uniqueness and freshness look at the whole table, as the
/// contract means it: a sale of today must not have the id of a sale of last year.
pub async fn check_table(
    lakehouse: &dyn Lakehouse,
    contract: &Contract,
    others: &[Contract],
    fecha: NaiveDate,
    now: DateTime<Utc>,
) -> Vec<QualityResult> {
    check_confirmed(lakehouse, contract, others, fecha, now, None).await
}

/// The same as [`check_table`] for a table whose rows were last known to be true at `confirmed`: a history to which nothing
/// had to be added is as fresh as the look that found nothing.
pub async fn check_confirmed(
    lakehouse: &dyn Lakehouse,
    contract: &Contract,
    others: &[Contract],
    fecha: NaiveDate,
    now: DateTime<Utc>,
    confirmed: Option<DateTime<Utc>>,
) -> Vec<QualityResult> {
    let judge = Judge::of(contract, fecha, now);
    let mut out = vec![schema(&judge, declared(lakehouse, &contract.physical_name).await)];
    out.extend(content(lakehouse, &judge).await);
    for reference in &contract.references {
        let found = match others.iter().find(|c| c.table == reference.table) {
            Some(other) => {
                let mut inputs = judge.inputs();
                inputs.push(("o".into(), Input::Delta(other.physical_name.clone())));
                numbers(lakehouse, &judge.orphans(reference), inputs).await.map(|n| n[0])
            }
            None => Err(PortError::permanent(format!("find the contract of {}", reference.table))),
        };
        out.push(judge.none(reference.name.clone(), reference.severity, found));
    }
    for fresh in &contract.freshness {
        let newest = format!("arrow_cast(max({}), 'Timestamp(Microsecond, Some(\"UTC\"))')", ident(&fresh.column));
        let sql = format!("SELECT arrow_cast({newest}, 'Int64') FROM t");
        let newest = optional(lakehouse, &sql, judge.inputs()).await;
        // A table without a value is not fresh, whatever was confirmed.
        let newest = newest.map(|n| n.map(|n| n.max(confirmed.map_or(i64::MIN, |at| at.timestamp_micros()))));
        out.push(judge.fresh(&fresh.column, fresh.at_most, newest));
    }
    out
}

/// Checks the rows of one day that lie where `input` says, as a source had them: clauses, volume, rules and uniqueness within
/// the day. What needs other tables or days (references, freshness) is left out.
pub async fn check_rows(
    lakehouse: &dyn Lakehouse,
    contract: &Contract,
    input: Input,
    fecha: NaiveDate,
    now: DateTime<Utc>,
) -> Vec<QualityResult> {
    content(lakehouse, &Judge { input: Some(input), ..Judge::of(contract, fecha, now) }).await
}

/// The volume of a day as its source counts it.
pub fn check_volume(contract: &Contract, rows: Result<u64>, fecha: NaiveDate, now: DateTime<Utc>) -> QualityResult {
    let judge = Judge::of(contract, fecha, now);
    let expected = format!("{} to {} rows", contract.rows_min, contract.rows_max);
    match rows {
        Err(e) => judge.unknown("volume".into(), Severity::Error, &e, expected),
        Ok(n) => {
            let passed = (contract.rows_min..=contract.rows_max).contains(&n);
            judge.result("volume".into(), Severity::Error, passed, format!("{n} rows"), expected)
        }
    }
}

/// Everything that is judged by rows alone.
async fn content(lakehouse: &dyn Lakehouse, judge: &Judge<'_>) -> Vec<QualityResult> {
    let mut out = rows(lakehouse, judge).await;
    for rule in &judge.contract.rules {
        match &rule.measure {
            Measure::RowCount | Measure::BrokenRows { .. } => {}
            Measure::Duplicates { columns, percent } => {
                let names = idents(columns);
                let sql = format!(
                    "SELECT CAST(coalesce(sum(n - 1), 0) AS BIGINT), CAST(coalesce(sum(n), 0) AS BIGINT)
                     FROM (SELECT count(*) AS n FROM {} GROUP BY {names})",
                    judge.rows()
                );
                let counts = numbers(lakehouse, &sql, judge.inputs()).await;
                out.push(judge.counted(rule, *percent, counts.map(|n| (n[0], n[1]))));
            }
            Measure::Sql(query) => {
                let found = number(lakehouse, &query.replace("{object}", &judge.rows()), judge.inputs()).await;
                out.push(judge.computed(rule, found));
            }
        }
    }
    for (name, columns) in judge.contract.uniques() {
        let found = numbers(lakehouse, &judge.shared(&columns), judge.inputs()).await;
        out.push(judge.none(name, Severity::Error, found.map(|n| n[0])));
    }
    out
}

/// The columns of a stored table. A Delta table has the nullability of the query that happened to create it, which promises
/// nothing; so nulls are judged by rows alone.
///
/// # Errors
/// When there is no such table, or it cannot be read.
pub async fn declared(lakehouse: &dyn Lakehouse, folder: &str) -> Result<Vec<Declared>> {
    let query = Query { sql: "DESCRIBE t".into(), inputs: vec![("t".into(), Input::Delta(folder.into()))] };
    let mut out = Vec::new();
    for batch in lakehouse.query(&query).await? {
        let (names, types) = (crate::batch::strings(&batch, 0)?, crate::batch::strings(&batch, 1)?);
        for (name, arrow) in names.into_iter().zip(types) {
            let known = arrow.parse::<DataType>().ok().and_then(|t| PhysicalType::of(&t));
            out.push(Declared { name, physical_type: known.map_or(arrow, |t| t.to_string()), nullable: None });
        }
    }
    Ok(out)
}

/// The outcomes as rows for `metadata.quality_results`, in the order given.
///
/// # Errors
/// `Permanent` when Arrow refuses them, which would be a mistake of this module.
pub fn results_batch(results: &[QualityResult]) -> Result<RecordBatch> {
    let text = |f: fn(&QualityResult) -> &str| Arc::new(results.iter().map(|r| Some(f(r))).collect::<StringArray>()) as ArrayRef;
    let day = |d: NaiveDate| i32::try_from((d - NaiveDate::default()).num_days()).unwrap_or(i32::MAX);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("check", text(|r| &r.check)),
        ("layer", text(|r| &r.layer)),
        ("asset", text(|r| &r.asset)),
        ("fecha", Arc::new(Date32Array::from_iter_values(results.iter().map(|r| day(r.fecha))))),
        ("severity", text(|r| r.severity.as_str())),
        ("passed", Arc::new(results.iter().map(|r| Some(r.passed)).collect::<BooleanArray>())),
        ("observed", text(|r| &r.observed)),
        ("expected", text(|r| &r.expected)),
        (
            "failing_rows",
            Arc::new(Int64Array::from_iter_values(results.iter().map(|r| i64::try_from(r.failing_rows).unwrap_or(i64::MAX)))),
        ),
        (
            "checked_at",
            Arc::new(
                TimestampMicrosecondArray::from_iter_values(results.iter().map(|r| r.checked_at.timestamp_micros()))
                    .with_timezone("UTC"),
            ),
        ),
    ];
    let fields: Vec<_> = columns.iter().map(|(n, c)| ArrowField::new(*n, c.data_type().clone(), true)).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns.into_iter().map(|(_, c)| c).collect())
        .map_err(|e| PortError::permanent("build rows of quality_results").because(e))
}

/// The outcomes as text: failures first, then a line that sums up.
pub fn render(results: &[QualityResult]) -> String {
    let mut text = String::new();
    let failed: Vec<_> = results.iter().filter(|r| !r.passed).collect();
    let width = failed.iter().map(|r| r.asset.len() + r.check.len() + 1).max().unwrap_or(0);
    for r in &failed {
        let name = format!("{}.{}", r.asset, r.check);
        let _ = writeln!(
            text,
            "{:<7} {name:<width$}  {}: found {}, expected {}",
            r.severity.as_str(),
            r.fecha,
            r.observed,
            r.expected
        );
    }
    let _ = writeln!(text, "{} checks, {} passed, {} failed", results.len(), results.len() - failed.len(), failed.len());
    text
}

fn idents(columns: &[String]) -> String {
    columns.iter().map(|c| ident(c)).collect::<Vec<_>>().join(", ")
}

/// One table on one day at one time.
struct Judge<'a> {
    contract: &'a Contract,
    fecha: NaiveDate,
    now: DateTime<Utc>,
    /// Where the rows are; `None` is where the contract says.
    input: Option<Input>,
}

impl<'a> Judge<'a> {
    /// The table where its contract has it.
    fn of(contract: &'a Contract, fecha: NaiveDate, now: DateTime<Utc>) -> Self {
        Self { contract, fecha, now, input: None }
    }

    fn result(&self, check: String, severity: Severity, passed: bool, observed: String, expected: String) -> QualityResult {
        QualityResult {
            check,
            layer: self.contract.layer().to_owned(),
            asset: self.contract.table.clone(),
            fecha: self.fecha,
            severity,
            passed,
            observed,
            expected,
            failing_rows: 0,
            checked_at: self.now,
        }
    }

    fn unknown(&self, check: String, severity: Severity, error: &PortError, expected: String) -> QualityResult {
        self.result(check, severity, false, format!("not known: {}", error.chain()), expected)
    }

    fn inputs(&self) -> Vec<(String, Input)> {
        vec![("t".into(), self.input.clone().unwrap_or_else(|| Input::Delta(self.contract.physical_name.clone())))]
    }

    /// The rows that are judged, as a table expression.
    fn rows(&self) -> String {
        if self.contract.by_day() { format!("(SELECT * FROM t WHERE fecha = DATE '{}')", self.fecha) } else { "t".into() }
    }

    /// How many of the judged rows share their columns with another row of the whole table; a null is equal to nothing.
    fn shared(&self, columns: &[String]) -> String {
        let names = idents(columns);
        // A key that has the day in it cannot meet a row of another day.
        let whole = if columns.iter().any(|c| c == "fecha") { self.rows() } else { "t".into() };
        let on = columns.iter().map(|c| format!("a.{0} = b.{0}", ident(c))).collect::<Vec<_>>().join(" AND ");
        format!(
            "SELECT count(*) FROM (SELECT {names} FROM {}) AS a
             JOIN (SELECT {names} FROM {whole} GROUP BY {names} HAVING count(*) > 1) AS b ON {on}",
            self.rows()
        )
    }

    /// How many of the judged rows refer to nothing.
    fn orphans(&self, reference: &Reference) -> String {
        let pairs = || reference.columns.iter().zip(&reference.to).map(|(from, to)| (ident(from), ident(to)));
        let given = pairs().map(|(from, _)| format!("a.{from} IS NOT NULL")).collect::<Vec<_>>().join(" AND ");
        let on = pairs().map(|(from, to)| format!("o.{to} = a.{from}")).collect::<Vec<_>>().join(" AND ");
        format!("SELECT count(*) FROM {} AS a WHERE {given} AND NOT EXISTS (SELECT 1 FROM o WHERE {on})", self.rows())
    }

    /// No row may break it.
    fn none(&self, check: String, severity: Severity, found: Result<i64>) -> QualityResult {
        let expected = "0 rows".to_owned();
        match found {
            Err(e) => self.unknown(check, severity, &e, expected),
            Ok(n) => QualityResult {
                failing_rows: n.unsigned_abs(),
                ..self.result(check, severity, n == 0, format!("{n} rows"), expected)
            },
        }
    }

    /// Failing rows of all rows against the bound of a rule.
    fn counted(&self, rule: &Rule, percent: bool, found: Result<(i64, i64)>) -> QualityResult {
        let unit = if percent { "% of rows" } else { "rows" };
        let expected = format!("{} {unit}", rule.bound);
        match found {
            Err(e) => self.unknown(rule.name.clone(), rule.severity, &e, expected),
            Ok((failing, all)) => {
                let passed = if percent {
                    rule.bound.holds(i128::from(failing) * 100, i128::from(all))
                } else {
                    rule.bound.holds(i128::from(failing), 1)
                };
                let observed = if percent { format!("{failing} of {all} rows") } else { format!("{failing} rows") };
                let result = self.result(rule.name.clone(), rule.severity, passed, observed, expected);
                QualityResult { failing_rows: failing.unsigned_abs(), ..result }
            }
        }
    }

    fn computed(&self, rule: &Rule, found: Result<Number>) -> QualityResult {
        let expected = rule.bound.to_string();
        match found {
            Err(e) => self.unknown(rule.name.clone(), rule.severity, &e, expected),
            Ok(n) => {
                let passed = rule.bound.holds_number(&n);
                let result = self.result(rule.name.clone(), rule.severity, passed, n.to_string(), expected);
                // A statement that must give 0 counts what is wrong.
                let failing_rows = if rule.bound.is_zero() { n.ceil().unsigned_abs() as u64 } else { 0 };
                QualityResult { failing_rows, ..result }
            }
        }
    }

    fn fresh(&self, column: &str, at_most: Duration, newest: Result<Option<i64>>) -> QualityResult {
        let (check, expected) = (format!("{column}.freshness"), format!("at most {} s old", at_most.as_secs()));
        match newest.map(|n| n.and_then(DateTime::from_timestamp_micros)) {
            Err(e) => self.unknown(check, Severity::Error, &e, expected),
            Ok(None) => self.result(check, Severity::Error, false, "no value".into(), expected),
            Ok(Some(newest)) => {
                let age = (self.now - newest).num_seconds();
                let passed = u64::try_from(age.max(0)).is_ok_and(|s| s <= at_most.as_secs());
                self.result(check, Severity::Error, passed, format!("{age} s old"), expected)
            }
        }
    }
}

fn schema(judge: &Judge<'_>, declared: Result<Vec<Declared>>) -> QualityResult {
    let expected = format!("the columns of contract {}", judge.contract.id);
    match declared {
        Err(e) => judge.unknown("schema".into(), Severity::Error, &e, expected),
        Ok(declared) => {
            let differences = judge.contract.declared_differences(&declared);
            let list = differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
            let observed = if differences.is_empty() { format!("{} columns, all as agreed", declared.len()) } else { list };
            judge.result("schema".into(), Severity::Error, differences.is_empty(), observed, expected)
        }
    }
}

/// Everything that one scan can count: clauses, shares of broken rows, and the rows themselves.
async fn rows(lakehouse: &dyn Lakehouse, judge: &Judge<'_>) -> Vec<QualityResult> {
    let clauses: Vec<Rule> = judge
        .contract
        .clauses
        .iter()
        .map(|c| Rule {
            name: c.name.clone(),
            measure: Measure::BrokenRows { broken_when: c.broken_when.clone(), percent: false },
            bound: Bound::none(),
            severity: Severity::Error,
        })
        .collect();
    let on_rows = judge.contract.rules.iter().filter(|r| matches!(r.measure, Measure::RowCount | Measure::BrokenRows { .. }));
    let rules: Vec<&Rule> = clauses.iter().chain(on_rows).collect();
    let counted = |rule: &Rule| match &rule.measure {
        Measure::BrokenRows { broken_when, .. } => {
            format!("CAST(coalesce(sum(CASE WHEN {broken_when} THEN 1 ELSE 0 END), 0) AS BIGINT)")
        }
        Measure::RowCount | Measure::Duplicates { .. } | Measure::Sql(_) => "count(*)".to_owned(),
    };
    let sql = |columns: &[String]| format!("SELECT count(*) AS n, {} FROM {}", columns.join(", "), judge.rows());
    let columns: Vec<String> = rules.iter().enumerate().map(|(i, r)| format!("{} AS n{i}", counted(r))).collect();
    let together = if columns.is_empty() { Ok(Vec::new()) } else { numbers(lakehouse, &sql(&columns), judge.inputs()).await };
    let mut out = Vec::new();
    for (i, rule) in rules.iter().enumerate() {
        let found = match &together {
            Ok(n) => Ok((n[i + 1], n[0])),
            // One clause on a column that is not there must not hide the others.
            Err(_) => numbers(lakehouse, &sql(&columns[i..=i]), judge.inputs()).await.map(|n| (n[1], n[0])),
        };
        let percent = matches!(rule.measure, Measure::BrokenRows { percent: true, .. });
        let mut result = judge.counted(rule, percent, found);
        if rule.measure == Measure::RowCount {
            result.failing_rows = 0;
        }
        out.push(result);
    }
    out
}

/// The single row of a statement; `None` when it gives none or more than one.
async fn single(lakehouse: &dyn Lakehouse, sql: &str, inputs: Vec<(String, Input)>) -> Result<RecordBatch> {
    let batches = lakehouse.query(&Query { sql: sql.to_owned(), inputs }).await?;
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    match batches.into_iter().find(|b| b.num_rows() == 1) {
        Some(batch) if rows == 1 => Ok(batch),
        _ => Err(PortError::permanent(format!("read the answer of a check: found {rows} rows, expected one"))),
    }
}

/// The row of whole numbers that a statement gives, where null counts as 0.
pub(crate) async fn numbers(lakehouse: &dyn Lakehouse, sql: &str, inputs: Vec<(String, Input)>) -> Result<Vec<i64>> {
    let batch = single(lakehouse, sql, inputs).await?;
    let whole = |c: &ArrayRef| {
        let c = cast(c, &DataType::Int64).map_err(|e| PortError::permanent("read the answer of a check").because(e))?;
        let c = c.as_primitive::<Int64Type>();
        Ok(if c.is_null(0) { 0 } else { c.value(0) })
    };
    batch.columns().iter().map(whole).collect()
}

/// The one whole number that a statement gives, or null.
async fn optional(lakehouse: &dyn Lakehouse, sql: &str, inputs: Vec<(String, Input)>) -> Result<Option<i64>> {
    let batch = single(lakehouse, sql, inputs).await?;
    let c = batch.column(0);
    let c = cast(c, &DataType::Int64).map_err(|e| PortError::permanent("read the answer of a check").because(e))?;
    Ok((!c.is_null(0)).then(|| c.as_primitive::<Int64Type>().value(0)))
}

/// The one number that a statement gives, exact to eight decimals; null is an error.
async fn number(lakehouse: &dyn Lakehouse, sql: &str, inputs: Vec<(String, Input)>) -> Result<Number> {
    let batch = single(lakehouse, sql, inputs).await?;
    let c = cast(batch.column(0), &DataType::Decimal128(38, 8))
        .map_err(|e| PortError::permanent("read the answer of a check: expected a number").because(e))?;
    if c.is_null(0) {
        return Err(PortError::permanent("read the answer of a check: found null, expected a number"));
    }
    Ok(Number::of_units(c.as_primitive::<Decimal128Type>().value(0), 8))
}
