//! Quality of what the models made: the tests that they declare, for one day, with some of the rows that fail. And of a day
//! that is still at its source.
//!
//! All tests are one statement, so that a day's tests cost one look at the lake. What a contract asks of a table is judged by
//! [`crate::contract::check`]. What to do about a failure is decided by who asks: the daily run holds the day.

use std::{fmt::Write as _, sync::Arc};

use arrow::{
    array::RecordBatch,
    util::display::{ArrayFormatter, FormatOptions},
};
use chrono::{DateTime, NaiveDate, Utc};
use futures::StreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use parquet::arrow::ArrowWriter;

use crate::{
    batch::arrow_schema,
    contract::{
        Contract, Severity,
        check::{QualityResult, check_rows, check_source, check_volume, numbers},
    },
    models::{
        At, Model, ModelTest, Project,
        run::{Made, absent, with_made},
    },
    ports::{Disposition, Input, Lakehouse, PartitionRead, PortError, Query, Result, TableSource},
};

/// Most failing rows that are shown of one test.
pub const SAMPLE_ROWS: usize = 3;

/// Size at which a part of a day that is judged is complete, in bytes.
const PART_BYTES: usize = 64 << 20;

/// A test of a model and how it came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tested {
    /// The outcome: `asset` is the model, `check` the test.
    pub result: QualityResult,
    /// Some failing rows, each as `column=value, ...`, at most [`SAMPLE_ROWS`].
    pub sample: Vec<String>,
}

/// Runs the tests of every chosen model for one day; all run, and all outcomes come back.
///
/// A test that cannot be carried out, as without its table, has failed, with the reason as what was observed.
///
/// # Errors
/// Only such as may pass: then nothing is known, and the same call may be repeated.
pub async fn test_models(
    lakehouse: &dyn Lakehouse,
    project: &Project,
    day: NaiveDate,
    now: DateTime<Utc>,
) -> Result<Vec<Tested>> {
    test_made(lakehouse, project, day, now, &Made::new()).await
}

/// The same as [`test_models`] for a day whose rows are made and not written yet.
///
/// # Errors
/// As for [`test_models`].
pub async fn test_made(
    lakehouse: &dyn Lakehouse,
    project: &Project,
    day: NaiveDate,
    now: DateTime<Utc>,
    made: &Made,
) -> Result<Vec<Tested>> {
    let absent = absent(lakehouse, project).await?;
    let at = At { day, now, version: "", absent: &absent };
    let (tests, query) = project.tests(&at);
    let query = with_made(query, day, made);
    if tests.is_empty() {
        return Ok(Vec::new());
    }
    let together = numbers(lakehouse, &query.sql, query.inputs).await;
    if let Err(e) = &together
        && e.disposition != Disposition::Permanent
    {
        return together.map(|_| Vec::new());
    }
    let mut out = Vec::new();
    for (i, (model, test)) in tests.into_iter().enumerate() {
        let rows = with_made(project.test(model, test, &at), day, made);
        let found = match &together {
            Ok(counts) => Ok(counts[i]),
            // One table that is not there must not hide how the others are.
            Err(_) => {
                let sql = format!("SELECT count(*) FROM ({})", rows.sql);
                numbers(lakehouse, &sql, rows.inputs.clone()).await.map(|n| n[0])
            }
        };
        let sample = match found {
            Ok(n) if n > 0 => sample(lakehouse, rows).await.unwrap_or_default(),
            Ok(_) | Err(_) => Vec::new(),
        };
        out.push(Tested { result: outcome(model, test, day, now, &found), sample });
    }
    Ok(out)
}

fn outcome(model: &Model, test: &ModelTest, fecha: NaiveDate, now: DateTime<Utc>, found: &Result<i64>) -> QualityResult {
    let (passed, observed, failing_rows) = match found {
        Ok(n) => (*n == 0, format!("{n} rows"), n.unsigned_abs()),
        Err(e) => (false, format!("not known: {}", e.chain()), 0),
    };
    QualityResult {
        check: test.name.clone(),
        layer: model.layer.clone(),
        asset: model.name.clone(),
        fecha,
        severity: test.severity,
        passed,
        observed,
        expected: "0 rows".into(),
        failing_rows,
        checked_at: now,
    }
}

async fn sample(lakehouse: &dyn Lakehouse, rows: Query) -> Result<Vec<String>> {
    let query = Query { sql: format!("SELECT * FROM ({}) LIMIT {SAMPLE_ROWS}", rows.sql), inputs: rows.inputs };
    let mut out = Vec::new();
    for batch in lakehouse.query(&query).await? {
        out.extend(texts(&batch)?);
    }
    Ok(out)
}

/// Rows as `column=value, ...`.
fn texts(batch: &RecordBatch) -> Result<Vec<String>> {
    let options = FormatOptions::default().with_null("null");
    let schema = batch.schema();
    let columns = schema.fields().iter().zip(batch.columns()).map(|(field, column)| {
        let formatter = ArrayFormatter::try_new(column, &options)
            .map_err(|e| PortError::permanent(format!("show column {}", field.name())).because(e))?;
        Ok((field.name().clone(), formatter))
    });
    let columns = columns.collect::<Result<Vec<_>>>()?;
    let row = |i: usize| columns.iter().map(|(name, f)| format!("{name}={}", f.value(i))).collect::<Vec<_>>().join(", ");
    Ok((0..batch.num_rows()).map(row).collect())
}

/// The tests that must not fail and did.
pub fn broken(tested: &[Tested]) -> impl Iterator<Item = &Tested> {
    tested.iter().filter(|t| !t.result.passed && t.result.severity == Severity::Error)
}

/// One test in one line: model, test, what was found, and some of the rows.
pub fn line(tested: &Tested) -> String {
    let QualityResult { asset, check, observed, .. } = &tested.result;
    let sample = if tested.sample.is_empty() { String::new() } else { format!(" ({})", tested.sample.join("; ")) };
    format!("{asset} {check}: {observed}{sample}")
}

/// All outcomes for a person: failures with their rows, then a line that sums up.
pub fn render(tested: &[Tested]) -> String {
    let mut text = String::new();
    let failed: Vec<_> = tested.iter().filter(|t| !t.result.passed).collect();
    for Tested { result: r, sample } in &failed {
        let _ = writeln!(
            text,
            "{:<7} {}  {} {}: found {}, expected {}",
            r.severity.as_str(),
            r.fecha,
            r.asset,
            r.check,
            r.observed,
            r.expected
        );
        for row in sample {
            let _ = writeln!(text, "          {row}");
        }
        if !sample.is_empty() && r.failing_rows > sample.len() as u64 {
            let _ = writeln!(text, "          and {} more", r.failing_rows - sample.len() as u64);
        }
    }
    let _ = writeln!(text, "{} tests, {} passed, {} failed", tested.len(), tested.len() - failed.len(), failed.len());
    text
}

/// Where rows of a source are put to be judged, and how they are read there; both are thrown away afterwards.
#[derive(Debug, Clone)]
pub struct Scratch {
    /// Objects.
    pub objects: Arc<dyn ObjectStore>,
    /// SQL over the same objects.
    pub lakehouse: Arc<dyn Lakehouse>,
}

/// Checks one day of a live source against its contract: columns, volume, clauses, rules and uniqueness within the day.
///
/// All checks run, and all outcomes come back. A day above the contract's most rows is not read, and of one whose columns
/// differ nothing but its columns can be judged. Memory holds one part of the day at a time.
pub async fn check_source_day(
    tables: &dyn TableSource,
    scratch: &Scratch,
    contract: &Contract,
    fecha: NaiveDate,
    now: DateTime<Utc>,
) -> Vec<QualityResult> {
    let mut out = check_source(tables, contract, fecha, now).await;
    if out.iter().any(|r| !r.passed) {
        return out;
    }
    let read = match tables.read_day(&contract.table, fecha, &contract.columns).await {
        Err(e) => {
            out.push(check_volume(contract, Err(e), fecha, now));
            return out;
        }
        Ok(read) => read,
    };
    let rows = read.expected_rows;
    out.push(check_volume(contract, Ok(rows), fecha, now));
    if rows > contract.rows_max {
        return out;
    }
    match store(scratch.objects.as_ref(), contract, read).await {
        Ok(paths) => {
            out.extend(check_rows(scratch.lakehouse.as_ref(), contract, Input::Parquet(paths), fecha, now).await);
        }
        // What broke in the middle of the day is told as its volume: that many rows could not be read.
        Err(e) => out.push(check_volume(contract, Err(e), fecha, now)),
    }
    out
}

/// Writes the rows of a day into objects of at most about [`PART_BYTES`], and returns their names.
async fn store(objects: &dyn ObjectStore, contract: &Contract, mut read: PartitionRead) -> Result<Vec<String>> {
    let failed = |e: parquet::errors::ParquetError| PortError::permanent("encode rows to be judged").because(e);
    let schema = arrow_schema(&contract.columns)?;
    let mut paths = Vec::new();
    let mut open = ArrowWriter::try_new(Vec::new(), schema.clone(), None).map_err(failed)?;
    loop {
        let batch = read.batches.next().await.transpose()?;
        if let Some(batch) = &batch {
            open.write(batch).map_err(failed)?;
        }
        if batch.is_none() || open.bytes_written() + open.in_progress_size() > PART_BYTES {
            let full = std::mem::replace(&mut open, ArrowWriter::try_new(Vec::new(), schema.clone(), None).map_err(failed)?);
            let path = Path::from(format!("judged/part-{:06}.parquet", paths.len()));
            let bytes = bytes::Bytes::from(full.into_inner().map_err(failed)?);
            objects.put(&path, bytes.into()).await.map_err(|e| PortError::permanent(format!("put {path}")).because(e))?;
            paths.push(path.to_string());
        }
        if batch.is_none() {
            return Ok(paths);
        }
    }
}
