//! A folder of CSV files as a source: `<table>.csv`, with a header line.
//!
//! A CSV file declares names but no types: a column has the type that all its values have, so that a retyped column
//! shows before anything is written. The file is read whole; it is meant for demos and small tables.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow::array::{ArrayRef, Date32Array, Decimal128Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate};
use futures::StreamExt;
use simulacro_core::{
    batch::arrow_schema,
    ports::{Column, PartitionRead, PortError, Result, TableSource},
};

#[derive(Debug)]
struct Table {
    columns: Vec<Column>,
    /// Rows by day, in file order; `None` is an empty field.
    days: BTreeMap<NaiveDate, Vec<Row>>,
    /// Rows of a table that has no days, in file order.
    undated: Vec<Row>,
}

type Row = Vec<Option<String>>;

/// The source.
#[derive(Debug)]
pub struct CsvSource {
    folder: PathBuf,
    tables: BTreeMap<String, Arc<Table>>,
}

/// Cents of a decimal(10,2) in text, without floats; `None` when it is none.
fn cents(text: &str) -> Option<i128> {
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |d| (-1, d));
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let numeric = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || whole.len() > 8 || fraction.len() > 2 || !numeric(whole) || !numeric(fraction) || digits.ends_with('.')
    {
        return None;
    }
    let whole: i128 = whole.parse().ok()?;
    let fraction: i128 = format!("{fraction:0<2}").parse().ok()?;
    Some(sign * (whole * 100 + fraction))
}

fn day(text: &str) -> Option<NaiveDate> {
    (text.len() == 10).then(|| NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()).flatten()
}

/// The physical type that every value of a column has.
fn physical_type<'a>(mut values: impl Iterator<Item = &'a str> + Clone) -> &'static str {
    if values.clone().next().is_none() {
        "string"
    } else if values.clone().all(|v| day(v).is_some()) {
        "date"
    } else if values.clone().all(|v| DateTime::parse_from_rfc3339(v).is_ok()) {
        "timestamp"
    } else if values.clone().all(|v| v.contains('.') && cents(v).is_some()) {
        "decimal(10,2)"
    } else {
        let _ = values.next();
        "string"
    }
}

impl CsvSource {
    /// Reads every `*.csv` of the folder.
    ///
    /// # Errors
    /// `Permanent`, naming file, line, value and what was expected.
    pub fn open(folder: &Path) -> Result<Self> {
        let unreadable = |e: std::io::Error| PortError::permanent(format!("read folder {}", folder.display())).because(e);
        let mut tables = BTreeMap::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_some_and(|e| e == "csv")
                && let Some(name) = path.file_stem().and_then(|s| s.to_str())
            {
                tables.insert(name.to_owned(), Arc::new(Self::load(&path)?));
            }
        }
        Ok(Self { folder: folder.to_owned(), tables })
    }

    fn load(path: &Path) -> Result<Table> {
        let place = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| PortError::permanent(format!("read {place}")).because(e))?;
        if !text.ends_with('\n') {
            return Err(PortError::permanent(format!(
                "read {place}: found no line end after the last line, expected one: the file is truncated"
            )));
        }
        let mut reader = csv::ReaderBuilder::new().has_headers(true).flexible(false).from_reader(text.as_bytes());
        let names: Vec<String> = reader
            .headers()
            .map_err(|e| PortError::permanent(format!("read {place}, line 1")).because(e))?
            .iter()
            .map(str::to_owned)
            .collect();
        let mut rows: Vec<Vec<Option<String>>> = Vec::new();
        for record in reader.records() {
            let record = record.map_err(|e| PortError::permanent(format!("read {place}")).because(e))?;
            rows.push(record.iter().map(|v| (!v.is_empty()).then(|| v.to_owned())).collect());
        }
        let columns: Vec<Column> = names
            .iter()
            .enumerate()
            .map(|(i, name)| Column {
                name: name.clone(),
                physical_type: physical_type(rows.iter().filter_map(|r| r[i].as_deref())).into(),
            })
            .collect();
        let fecha = names.iter().position(|n| n == "fecha");
        let (mut days, mut undated) = (BTreeMap::<NaiveDate, Vec<Row>>::new(), Vec::new());
        for (i, row) in rows.into_iter().enumerate() {
            let Some(at) = fecha else {
                undated.push(row);
                continue;
            };
            let Some(date) = row[at].as_deref().and_then(day) else {
                return Err(PortError::permanent(format!(
                    "read {place}, line {}: column fecha has {:?}, expected a date such as 1997-01-31",
                    i + 2,
                    row[at].as_deref().unwrap_or("")
                )));
            };
            days.entry(date).or_default().push(row);
        }
        Ok(Table { columns, days, undated })
    }

    fn table(&self, table: &str) -> Result<&Arc<Table>> {
        self.tables.get(table).ok_or_else(|| {
            PortError::permanent(format!(
                "read {}: found no {table}.csv or {table}.parquet in the folder, expected one",
                self.folder.display()
            ))
            .code("42P01")
        })
    }

    /// Whether there is a file of this table.
    pub fn has(&self, table: &str) -> bool {
        self.tables.contains_key(table)
    }

    /// The days of a table, in order.
    ///
    /// # Errors
    /// `Permanent` when there is no such table.
    pub fn days(&self, table: &str) -> Result<Vec<NaiveDate>> {
        Ok(self.table(table)?.days.keys().copied().collect())
    }
}

/// Rows as the asked columns, one batch.
fn rows_as(loaded: &Table, rows: &[&Row], columns: &[Column], what: &str) -> Result<PartitionRead> {
    let schema = arrow_schema(columns)?;
    let mut arrays: Vec<ArrayRef> = Vec::new();
    for column in columns {
        let at = loaded
            .columns
            .iter()
            .position(|c| c.name == column.name)
            .ok_or_else(|| PortError::permanent(format!("{what}: column {} is missing", column.name)).code("42703"))?;
        let values = || rows.iter().map(|r| r[at].as_deref());
        let bad = |v: &str| {
            PortError::permanent(format!("{what}: column {} has {v:?}, expected {}", column.name, column.physical_type))
        };
        let array: ArrayRef = match column.physical_type.as_str() {
            "decimal(10,2)" => {
                let v = values().map(|v| v.map(|v| cents(v).ok_or_else(|| bad(v))).transpose()).collect::<Result<Vec<_>>>()?;
                let array = Decimal128Array::from(v).with_precision_and_scale(10, 2);
                Arc::new(array.map_err(|e| PortError::permanent(what).because(e))?)
            }
            "date" => {
                let v = values()
                    .map(|v| {
                        v.map(|v| day(v).map(|d| (d - NaiveDate::default()).num_days() as i32).ok_or_else(|| bad(v))).transpose()
                    })
                    .collect::<Result<Vec<_>>>()?;
                Arc::new(Date32Array::from(v))
            }
            "timestamp" => {
                let v = values()
                    .map(|v| {
                        v.map(|v| DateTime::parse_from_rfc3339(v).map(|t| t.timestamp_micros()).map_err(|_| bad(v))).transpose()
                    })
                    .collect::<Result<Vec<_>>>()?;
                Arc::new(TimestampMicrosecondArray::from(v).with_timezone("UTC"))
            }
            _ => Arc::new(values().collect::<StringArray>()),
        };
        arrays.push(array);
    }
    let batch = RecordBatch::try_new(schema, arrays).map_err(|e| PortError::permanent(what).because(e))?;
    Ok(PartitionRead { expected_rows: rows.len() as u64, batches: futures::stream::iter([Ok(batch)]).boxed() })
}

#[async_trait]
impl TableSource for CsvSource {
    async fn ping(&self) -> Result<()> {
        Ok(())
    }

    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        Ok(self.table(table)?.columns.clone())
    }

    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        let loaded = self.table(table)?;
        let rows: Vec<&Row> = loaded.days.get(&fecha).into_iter().flatten().collect();
        rows_as(loaded, &rows, columns, &format!("read {table} of {fecha}"))
    }

    async fn not_null(&self, _table: &str) -> Result<Option<std::collections::BTreeSet<String>>> {
        Ok(None)
    }
    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        let loaded = self.table(table)?;
        let rows: Vec<&Row> = loaded.days.values().flatten().chain(&loaded.undated).collect();
        rows_as(loaded, &rows, columns, &format!("read {table}"))
    }
}
