//! Rows of a dimension as Arrow columns: each value is held to the physical type that the contract gives its column.
//!
//! Text is exact: a decimal that has more digits than its type is an error, never rounded. What this leaves out: which
//! values are good ones, which the contract's clauses judge later.

use std::sync::Arc;

use arrow::{
    array::{
        ArrayRef, BooleanBuilder, Date32Builder, Decimal128Builder, Float64Builder, Int64Builder, RecordBatch, StringBuilder,
        TimestampMicrosecondBuilder,
    },
    datatypes::{Field, Schema, SchemaRef},
};
use chrono::{DateTime, NaiveDate};

use crate::{
    contract::PhysicalType,
    ports::{Column, PortError, Result},
};

/// A value as it stands in the source.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cell<'a> {
    /// No value.
    Null,
    /// Text, of any type.
    Text(&'a str),
    /// A whole number.
    Int(i64),
    /// A binary fraction.
    Float(f64),
    /// True or false.
    Bool(bool),
}

impl Cell<'_> {
    fn shown(&self) -> String {
        match self {
            Self::Null => "null".into(),
            // A long value would hide the rest of the sentence.
            Self::Text(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
            Self::Int(n) => format!("the number {n}"),
            Self::Float(n) => format!("the number {n}"),
            Self::Bool(b) => format!("{b}"),
        }
    }
}

/// A value that does not fit its column.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("column {column}: found {found}, expected {expected}")]
pub struct Unfit {
    /// Column.
    pub column: String,
    /// What stands there.
    pub found: String,
    /// What could.
    pub expected: String,
}

#[derive(Debug)]
enum Builder {
    Text(StringBuilder),
    Decimal(Decimal128Builder, u8, u8),
    Timestamp(TimestampMicrosecondBuilder),
    Date(Date32Builder),
    Int(Int64Builder),
    Float(Float64Builder),
    Bool(BooleanBuilder),
}

/// Columns that are being filled, a value at a time.
#[derive(Debug)]
pub struct Rows {
    schema: SchemaRef,
    names: Vec<String>,
    types: Vec<PhysicalType>,
    builders: Vec<Builder>,
    rows: u64,
}

/// Units of a decimal in text, exactly; `None` when it is none or does not fit.
fn units(text: &str, precision: u8, scale: u8) -> Option<i128> {
    let (sign, digits) = text.strip_prefix('-').map_or((1, text), |d| (-1, d));
    let (whole, fraction) = match digits.split_once('.') {
        Some((_, "")) => return None,
        Some(parts) => parts,
        None => (digits, ""),
    };
    let numeric = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let (scale, precision) = (usize::from(scale), usize::from(precision));
    if whole.is_empty() || !numeric(whole) || !numeric(fraction) || fraction.len() > scale {
        return None;
    }
    let whole = whole.trim_start_matches('0');
    if whole.len() > precision - scale {
        return None;
    }
    // At most 38 digits, which an i128 has room for.
    format!("0{whole}{fraction:0<scale$}").parse::<i128>().ok().map(|n| sign * n)
}

/// The Arrow schema of a dimension's columns.
///
/// # Errors
/// `Permanent` for a physical type that contracts do not have.
pub fn schema(columns: &[Column]) -> Result<SchemaRef> {
    let fields = columns.iter().map(|c| Ok(Field::new(&c.name, physical(c)?.data_type(), true))).collect::<Result<Vec<_>>>()?;
    Ok(Arc::new(Schema::new(fields)))
}

fn physical(column: &Column) -> Result<PhysicalType> {
    column.physical_type.parse().map_err(|()| {
        let Column { name, physical_type } = column;
        PortError::permanent(format!("read column {name}: found type {physical_type}, expected {}", PhysicalType::ALLOWED))
    })
}

impl Rows {
    /// No rows yet.
    ///
    /// # Errors
    /// `Permanent` for a physical type that contracts do not have.
    pub fn new(columns: &[Column]) -> Result<Self> {
        let types = columns.iter().map(physical).collect::<Result<Vec<_>>>()?;
        let builder = |t: &PhysicalType| match *t {
            PhysicalType::String => Builder::Text(StringBuilder::new()),
            PhysicalType::Decimal(p, s) => Builder::Decimal(Decimal128Builder::new().with_data_type(t.data_type()), p, s),
            PhysicalType::Timestamp => Builder::Timestamp(TimestampMicrosecondBuilder::new().with_data_type(t.data_type())),
            PhysicalType::Date => Builder::Date(Date32Builder::new()),
            PhysicalType::Int64 => Builder::Int(Int64Builder::new()),
            PhysicalType::Float64 => Builder::Float(Float64Builder::new()),
            PhysicalType::Boolean => Builder::Bool(BooleanBuilder::new()),
        };
        let builders = types.iter().map(builder).collect();
        let names = columns.iter().map(|c| c.name.clone()).collect();
        Ok(Self { schema: schema(columns)?, names, types, builders, rows: 0 })
    }

    /// Rows that have ended.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Place of a column; `None` when there is none of this name.
    pub fn position(&self, column: &str) -> Option<usize> {
        self.names.iter().position(|n| n == column)
    }

    /// Names of the columns, in order.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Adds a value to the column at `at`. Each column takes one value a row.
    ///
    /// # Errors
    /// When the value is not of the column's type; the rows are of no more use then.
    pub fn push(&mut self, at: usize, cell: Cell<'_>) -> Result<(), Unfit> {
        let expected = |what: &str| {
            let column = self.names.get(at).cloned().unwrap_or_default();
            let physical_type = self.types.get(at).map(ToString::to_string).unwrap_or_default();
            Err(Unfit { column, found: cell.shown(), expected: format!("{physical_type}{what}") })
        };
        let Some(builder) = self.builders.get_mut(at) else {
            return Err(Unfit { column: format!("number {at}"), found: cell.shown(), expected: "no such column".into() });
        };
        match (builder, cell) {
            (Builder::Text(b), Cell::Null) => b.append_null(),
            (Builder::Text(b), Cell::Text(text)) => b.append_value(text),
            (Builder::Decimal(b, ..), Cell::Null) => b.append_null(),
            (Builder::Decimal(b, p, s), Cell::Text(text)) => match units(text, *p, *s) {
                Some(units) => b.append_value(units),
                None => return expected(" as digits"),
            },
            (Builder::Decimal(b, p, s), Cell::Int(n)) => match units(&n.to_string(), *p, *s) {
                Some(units) => b.append_value(units),
                None => return expected(""),
            },
            // Money that has been a binary fraction is no longer exact.
            (Builder::Decimal(..), Cell::Float(_)) => return expected(" in quotes, such as \"12.34\""),
            (Builder::Timestamp(b), Cell::Null) => b.append_null(),
            (Builder::Timestamp(b), Cell::Text(text)) => match DateTime::parse_from_rfc3339(text) {
                Ok(time) => b.append_value(time.timestamp_micros()),
                Err(_) => return expected(" such as 1997-01-31T12:00:00Z"),
            },
            (Builder::Date(b), Cell::Null) => b.append_null(),
            (Builder::Date(b), Cell::Text(text)) => match NaiveDate::parse_from_str(text, "%Y-%m-%d") {
                Ok(day) if text.len() == 10 => b.append_value((day - NaiveDate::default()).num_days() as i32),
                Ok(_) | Err(_) => return expected(" such as 1997-01-31"),
            },
            (Builder::Int(b), Cell::Null) => b.append_null(),
            (Builder::Int(b), Cell::Int(n)) => b.append_value(n),
            (Builder::Int(b), Cell::Text(text)) => match text.parse() {
                Ok(n) => b.append_value(n),
                Err(_) => return expected(""),
            },
            (Builder::Float(b), Cell::Null) => b.append_null(),
            (Builder::Float(b), Cell::Float(n)) => b.append_value(n),
            (Builder::Float(b), Cell::Int(n)) => b.append_value(n as f64),
            (Builder::Float(b), Cell::Text(text)) => match text.parse() {
                Ok(n) => b.append_value(n),
                Err(_) => return expected(""),
            },
            (Builder::Bool(b), Cell::Null) => b.append_null(),
            (Builder::Bool(b), Cell::Bool(value)) => b.append_value(value),
            (Builder::Bool(b), Cell::Text("true")) => b.append_value(true),
            (Builder::Bool(b), Cell::Text("false")) => b.append_value(false),
            (Builder::Text(_), Cell::Int(_) | Cell::Float(_) | Cell::Bool(_))
            | (Builder::Decimal(..), Cell::Bool(_))
            | (Builder::Timestamp(_) | Builder::Date(_), Cell::Int(_) | Cell::Float(_) | Cell::Bool(_))
            | (Builder::Int(_), Cell::Float(_) | Cell::Bool(_))
            | (Builder::Float(_), Cell::Bool(_))
            | (Builder::Bool(_), Cell::Text(_) | Cell::Int(_) | Cell::Float(_)) => return expected(""),
        }
        Ok(())
    }

    /// Ends a row.
    pub fn end_row(&mut self) {
        self.rows += 1;
    }

    /// The rows as one batch.
    ///
    /// # Errors
    /// `Permanent` when a row did not get a value for each column.
    pub fn finish(mut self) -> Result<RecordBatch> {
        let column = |builder: &mut Builder| -> ArrayRef {
            match builder {
                Builder::Text(b) => Arc::new(b.finish()),
                Builder::Decimal(b, ..) => Arc::new(b.finish()),
                Builder::Timestamp(b) => Arc::new(b.finish()),
                Builder::Date(b) => Arc::new(b.finish()),
                Builder::Int(b) => Arc::new(b.finish()),
                Builder::Float(b) => Arc::new(b.finish()),
                Builder::Bool(b) => Arc::new(b.finish()),
            }
        };
        let arrays = self.builders.iter_mut().map(column).collect();
        RecordBatch::try_new(self.schema, arrays).map_err(|e| PortError::permanent("put the columns together").because(e))
    }
}

/// The error of columns that are missing, or that no contract knows; `None` when all names agree.
pub fn name_differences<'a>(columns: &[Column], found: impl Iterator<Item = &'a str> + Clone) -> Option<String> {
    let missing = columns.iter().filter(|c| !found.clone().any(|f| f == c.name));
    let missing = missing.map(|c| format!("column {} is missing, the contract expects {}", c.name, c.physical_type));
    let extra = found.clone().filter(|f| !columns.iter().any(|c| c.name == *f));
    let all: Vec<String> = missing.chain(extra.map(|f| format!("column {f} is not in the contract"))).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn column(physical_type: &str) -> Vec<Column> {
        vec![Column { name: "c".into(), physical_type: physical_type.into() }]
    }

    #[test]
    fn a_value_of_another_type_is_named_with_its_column() {
        let check = |physical_type: &str, cell: Cell<'_>, expected: &str| {
            let mut rows = Rows::new(&column(physical_type)).expect("a type");
            let said = rows.push(0, cell).map_err(|e| e.to_string());
            let expected = if expected.is_empty() { Ok(()) } else { Err(expected.to_owned()) };
            assert_eq!(said, expected, "{physical_type} {cell:?}");
        };
        check("decimal(10,2)", Cell::Text("-99999999.99"), "");
        check("decimal(10,2)", Cell::Int(7), "");
        check("decimal(10,2)", Cell::Text("0000000001.5"), "");
        check("decimal(10,2)", Cell::Text("1.234"), "column c: found \"1.234\", expected decimal(10,2) as digits");
        check("decimal(10,2)", Cell::Text("100000000"), "column c: found \"100000000\", expected decimal(10,2) as digits");
        check(
            "decimal(10,2)",
            Cell::Float(1.5),
            "column c: found the number 1.5, expected decimal(10,2) in quotes, such as \"12.34\"",
        );
        check("int64", Cell::Text("9223372036854775807"), "");
        check("int64", Cell::Float(1.0), "column c: found the number 1, expected int64");
        check("string", Cell::Int(1), "column c: found the number 1, expected string");
        check("date", Cell::Text("1997-02-30"), "column c: found \"1997-02-30\", expected date such as 1997-01-31");
        check("date", Cell::Null, "");
        check("boolean", Cell::Text("yes"), "column c: found \"yes\", expected boolean");
        check("timestamp", Cell::Text("1997-01-31T12:00:00.000001+01:00"), "");
    }

    #[test]
    fn a_row_that_misses_a_value_is_no_batch() {
        let columns = [column("string"), column("int64")].concat();
        let mut rows = Rows::new(&columns).expect("types");
        rows.push(0, Cell::Text("a")).expect("text");
        assert!(rows.finish().is_err());
    }

    proptest! {
        #[test]
        fn a_decimal_keeps_every_cent(cents in -9_999_999_999_i64..=9_999_999_999) {
            let sign = if cents < 0 { "-" } else { "" };
            let text = format!("{sign}{}.{:02}", cents.abs() / 100, cents.abs() % 100);
            prop_assert_eq!(units(&text, 10, 2), Some(i128::from(cents)));
        }

        #[test]
        fn no_text_is_a_panic(text in "[-.0-9eE+ ]{0,14}") {
            let _ = units(&text, 10, 2);
        }
    }
}
