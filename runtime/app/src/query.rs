//! `simulacro query`: SQL over the lake, now or as of a time, as a table, CSV or JSON. It reads and changes nothing.

use std::{
    io::{Write, stdout},
    path::PathBuf,
};

use arrow::{
    array::{Array, RecordBatch},
    datatypes::DataType,
    util::display::{ArrayFormatter, FormatOptions},
};
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Utc};
use clap::{Args, ValueEnum};
use futures::TryStreamExt;
use simulacro_adapters::open_lake;
use simulacro_lakehouse::query::{AsOf, SqlLake};

use crate::options::Failure;

/// Memory of one query; beyond it sorts and groups go to temporary files.
const MEMORY_BYTES: usize = 512 << 20;
/// Longest text of a cell of a table, in characters.
const CELL_CHARS_MAX: usize = 80;

/// How rows are written.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Aligned columns, for a person
    Table,
    /// Comma separated values with a header line; null is empty
    Csv,
    /// One JSON object a line
    Json,
}

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro query --data lake
  simulacro query --data lake \"SELECT fecha, sum(revenue_neto) FROM marts.metricas_diarias GROUP BY fecha ORDER BY fecha\"
  simulacro query --data lake --as-of 2024-03-18T06:00:00Z \"SELECT count(*) FROM staging.ventas_validadas\"
  simulacro query --data lake --version 3 --format csv \"SELECT * FROM marts.metricas_diarias\"")]
pub struct QueryArgs {
    /// One SELECT over tables such as raw.ventas, staging.ventas_validadas, marts.metricas_diarias or
    /// analytics.metricas_diarias; without it the tables are listed
    sql: Option<String>,
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// As the tables were at this time, for example 2024-03-18T06:00:00Z, or at the end of this day (UTC)
    #[arg(long, value_parser = time, conflicts_with = "version")]
    as_of: Option<DateTime<Utc>>,
    /// This version of the one table that is read
    #[arg(long)]
    version: Option<u64>,
    /// Form of the rows
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Most rows; a table is held in memory until its last row is known
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    limit: u64,
}

/// An instant, or the last moment of a day.
fn time(text: &str) -> Result<DateTime<Utc>, String> {
    let instant = |t: DateTime<chrono::FixedOffset>| t.to_utc();
    let naive = |t: NaiveDateTime| t.and_utc();
    let end = |d: NaiveDate| (d + chrono::Days::new(1)).and_time(NaiveTime::MIN).and_utc() - chrono::TimeDelta::milliseconds(1);
    DateTime::parse_from_rfc3339(text)
        .map(instant)
        .or_else(|_| text.parse().map(naive))
        .or_else(|_| text.parse().map(end))
        .map_err(|_| format!("found {text:?}, expected a time such as 2024-03-18T06:00:00Z or a day such as 2024-03-18"))
}

/// Rows as they are written, one after the other.
enum Writer {
    Table(Vec<Vec<String>>),
    Csv(Box<csv::Writer<std::io::Stdout>>),
    Json,
}

/// Columns of which JSON has a type of its own.
fn is_plain(data_type: &DataType) -> bool {
    data_type.is_numeric() || *data_type == DataType::Boolean
}

impl Writer {
    fn new(format: Format, names: &[String]) -> Result<Self, Failure> {
        Ok(match format {
            Format::Table => Self::Table(Vec::new()),
            Format::Csv => {
                let mut writer = csv::Writer::from_writer(stdout());
                writer.write_record(names)?;
                Self::Csv(Box::new(writer))
            }
            Format::Json => Self::Json,
        })
    }

    fn batch(&mut self, names: &[String], batch: &RecordBatch) -> Result<(), Failure> {
        let options = FormatOptions::default();
        let columns = batch.columns().iter().map(|c| ArrayFormatter::try_new(c, &options)).collect::<Result<Vec<_>, _>>()?;
        let cell =
            |row: usize, column: usize| (!batch.column(column).is_null(row)).then(|| columns[column].value(row).to_string());
        for row in 0..batch.num_rows() {
            let cells = (0..columns.len()).map(|column| cell(row, column));
            match self {
                Self::Table(rows) => rows.push(cells.map(|c| shortened(&c.unwrap_or_else(|| "null".into()))).collect()),
                Self::Csv(writer) => writer.write_record(cells.map(Option::unwrap_or_default))?,
                Self::Json => {
                    let value = |(column, cell): (usize, Option<String>)| {
                        let plain = is_plain(batch.column(column).data_type());
                        let text = match cell {
                            None => "null".into(),
                            // JSON has no infinity and no NaN.
                            Some(text) if plain && !text.contains(['i', 'N']) => text,
                            Some(text) => serde_json::to_string(&text)?,
                        };
                        Ok::<_, serde_json::Error>(format!("{}:{text}", serde_json::to_string(&names[column])?))
                    };
                    let fields = cells.enumerate().map(value).collect::<Result<Vec<_>, _>>()?;
                    writeln!(stdout(), "{{{}}}", fields.join(","))?;
                }
            }
        }
        Ok(())
    }

    fn end(self, names: &[String], right: &[bool]) -> Result<(), Failure> {
        match self {
            Self::Table(rows) => print!("{}", table(names, right, &rows)),
            Self::Csv(mut writer) => writer.flush()?,
            Self::Json => {}
        }
        Ok(())
    }
}

fn shortened(text: &str) -> String {
    let one_line = text.replace(['\n', '\r', '\t'], " ");
    if one_line.chars().count() <= CELL_CHARS_MAX {
        return one_line;
    }
    one_line.chars().take(CELL_CHARS_MAX - 1).chain(['…']).collect()
}

/// Aligned columns: numbers to the right.
fn table(names: &[String], right: &[bool], rows: &[Vec<String>]) -> String {
    let width = |i: usize| rows.iter().map(|r| &r[i]).chain([&names[i]]).map(|t| t.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let line = |cells: &[String]| {
        let cells = cells.iter().enumerate().map(|(i, c)| {
            let w = widths[i];
            if right[i] { format!("{c:>w$}") } else { format!("{c:<w$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
    line(names) + &line(&rule) + &rows.iter().map(|r| line(r)).collect::<String>()
}

/// Runs the command.
pub async fn run(args: QueryArgs) -> Result<(), Failure> {
    let lake = SqlLake::new(open_lake(&args.data)?, MEMORY_BYTES);
    let Some(sql) = &args.sql else {
        for name in lake.tables().await? {
            println!("{name}");
        }
        return Ok(());
    };
    let as_of = match (args.as_of, args.version) {
        (Some(time), _) => AsOf::Time(time),
        (None, Some(version)) => AsOf::Version(version),
        (None, None) => AsOf::Now,
    };
    let limit = usize::try_from(args.limit)?;
    // One more than is shown tells whether there are more.
    let mut answer = lake.query(sql, as_of, limit + 1).await?;
    let names: Vec<String> = answer.schema.fields().iter().map(|f| f.name().clone()).collect();
    let right: Vec<bool> = answer.schema.fields().iter().map(|f| f.data_type().is_numeric()).collect();
    let mut writer = Writer::new(args.format, &names)?;
    let mut left = limit;
    let mut more = false;
    while let Some(batch) = answer.batches.try_next().await? {
        more |= batch.num_rows() > left;
        let shown = batch.slice(0, batch.num_rows().min(left));
        left -= shown.num_rows();
        writer.batch(&names, &shown)?;
    }
    writer.end(&names, &right)?;
    if args.format == Format::Table {
        println!("({} rows)", limit - left);
    }
    if more {
        eprintln!("there are more rows than {limit}: raise --limit to see them");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_aligns_numbers_to_the_right() {
        let text = |row: &[&str]| row.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let names = text(&["region", "ventas"]);
        insta::assert_snapshot!(table(&names, &[false, true], &[text(&["norte", "7"]), text(&["nunca jamás", "1234"])]));
    }

    #[test]
    fn a_day_means_its_end_and_a_time_itself() {
        let text = |t: &str| time(t).expect("a time").to_rfc3339();
        assert_eq!(text("2024-03-18"), "2024-03-18T23:59:59.999+00:00");
        assert_eq!(text("2024-03-18T06:00:00"), "2024-03-18T06:00:00+00:00");
        assert_eq!(text("2024-03-18T06:00:00+01:00"), "2024-03-18T05:00:00+00:00");
        assert!(time("yesterday").expect_err("no time").contains("expected a time such as"));
    }

    #[test]
    fn a_long_text_is_cut_and_a_line_end_does_not_break_the_table() {
        assert_eq!(shortened("a\nb"), "a b");
        assert_eq!(shortened(&"x".repeat(500)).chars().count(), CELL_CHARS_MAX);
    }
}
