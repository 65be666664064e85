//! What a person sees of a run: a table per month, a file and a chart per day.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use chrono::{Datelike, NaiveDate};
use plotters::prelude::*;
use simulacro_core::batch::DayReport;

/// A day with its report.
pub type Day = (NaiveDate, DayReport);

fn fate(report: &DayReport, fate: &str) -> i64 {
    report.fates.get(fate).copied().unwrap_or(0) as i64
}

/// Cents as `1,234.56`.
pub fn money(cents: i64) -> String {
    let whole = (cents / 100).abs().to_string();
    let groups = whole.as_bytes().rchunks(3).rev().map(|c| String::from_utf8_lossy(c));
    let sign = if cents < 0 { "-" } else { "" };
    format!("{sign}{}.{:02}", groups.collect::<Vec<_>>().join(","), (cents % 100).abs())
}

/// The table, one line per month with a bar for its revenue, and the totals.
pub fn summary(days: &[Day]) -> String {
    let mut months: BTreeMap<(i32, u32), [i64; 5]> = BTreeMap::new();
    for (fecha, report) in days {
        let row = months.entry((fecha.year(), fecha.month())).or_default();
        row[0] += 1;
        row[1] += fate(report, "published");
        row[2] += fate(report, "rejected");
        row[3] += fate(report, "quarantined") + fate(report, "deduplicated");
        row[4] += report.revenue_cents;
    }
    let line = |name: &str, row: &[i64; 5]| {
        let [days, published, rejected, other, cents] = row;
        format!("{name:<8} {days:>5} {published:>9} {rejected:>10} {other:>9} {:>14}", money(*cents))
    };
    let most = months.values().map(|m| m[4]).max().unwrap_or(1).max(1);
    let mut total = [0; 5];
    let mut out =
        format!("{:<8} {:>5} {:>9} {:>10} {:>9} {:>14}\n", "month", "days", "published", "rejected", "other", "revenue");
    for ((year, month), row) in &months {
        let bar = "█".repeat((row[4].max(0) * 40 / most) as usize);
        out.push_str(&format!("{} {bar}\n", line(&format!("{year}-{month:02}"), row)));
        for (sum, value) in total.iter_mut().zip(row) {
            *sum += value;
        }
    }
    let read: u64 = days.iter().map(|(_, report)| report.expected).sum();
    out.push_str(&line("total", &total));
    let [_, published, rejected, other, _] = total;
    out.push_str(&format!(
        "\n{read} rows read = {published} published + {rejected} rejected + {other} quarantined or deduplicated\n"
    ));
    out
}

/// One line per day: `fecha,rows,published,rejected,revenue`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_csv(folder: &Path, days: &[Day]) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let path = folder.join("revenue_per_day.csv");
    let mut out = csv::Writer::from_path(&path)?;
    out.write_record(["fecha", "rows", "published", "rejected", "revenue"])?;
    for (fecha, report) in days {
        let cents = report.revenue_cents;
        out.write_record([
            fecha.to_string(),
            report.expected.to_string(),
            fate(report, "published").to_string(),
            fate(report, "rejected").to_string(),
            format!("{}.{:02}", cents / 100, cents % 100),
        ])?;
    }
    out.flush()?;
    Ok(path)
}

/// The chart: revenue per day as bars, as SVG.
///
/// # Errors
/// When the file cannot be written.
pub fn write_chart(folder: &Path, days: &[Day]) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let path = folder.join("revenue_per_day.svg");
    let (Some(first), Some(last)) = (days.first().map(|d| d.0), days.last().map(|d| d.0)) else {
        return Err("chart: found no days, expected at least one".into());
    };
    let most = days.iter().map(|(_, r)| r.revenue_cents).max().unwrap_or(1).max(1) as f64 / 100.0;
    let root = SVGBackend::new(&path, (1_000, 360)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("revenue per day", ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(72)
        .build_cartesian_2d(first..last + chrono::Days::new(1), 0.0..most * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(10)
        .x_label_formatter(&|day| day.format("%Y-%m-%d").to_string())
        .y_label_formatter(&|value| money((value * 100.0) as i64))
        .draw()?;
    chart.draw_series(days.iter().map(|(fecha, report)| {
        let corners = [(*fecha, 0.0), (*fecha + chrono::Days::new(1), report.revenue_cents as f64 / 100.0)];
        Rectangle::new(corners, RGBColor(31, 111, 178).filled())
    }))?;
    root.present()?;
    drop(chart);
    drop(root);
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn money_has_groups_and_two_decimals() {
        for (cents, text) in [(0, "0.00"), (5, "0.05"), (123_456_789, "1,234,567.89"), (-150, "-1.50")] {
            assert_eq!(money(cents), text);
        }
    }

    #[test]
    fn a_summary_reads_well() {
        let report = |published, rejected, revenue_cents| DayReport {
            expected: published + rejected,
            fates: [("published".to_owned(), published), ("rejected".to_owned(), rejected)].into(),
            revenue_cents,
            ..DayReport::default()
        };
        let day = |text: &str| text.parse::<NaiveDate>().expect("a date");
        let days = [
            (day("1997-01-30"), report(10, 0, 20_000)),
            (day("1997-01-31"), report(5, 1, 10_005)),
            (day("1997-02-01"), report(4, 0, 9_950)),
        ];
        insta::assert_snapshot!(summary(&days));
    }
}
