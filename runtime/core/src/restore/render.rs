//! Plans and reports of restores, for people.

use std::{collections::BTreeMap, fmt::Write as _};

use chrono::NaiveDate;

use super::{Plan, Report, Way, days_of, rows};

fn seconds(millis: u64) -> String {
    format!("{}.{:03} s", millis / 1_000, millis % 1_000)
}

/// Days and rows of a loss.
fn told(lost: &BTreeMap<NaiveDate, u64>) -> String {
    let range = match (lost.keys().next(), lost.keys().next_back()) {
        (Some(first), Some(last)) if first != last => format!(", {first} to {last}"),
        (Some(first), _) => format!(", {first}"),
        (None, _) => String::new(),
    };
    format!("{}, {} rows{range}", days_of(lost.len()), rows(lost))
}

impl Plan {
    /// Whether nothing is lost.
    pub fn is_whole(&self) -> bool {
        self.tables.iter().all(|table| table.lost.is_empty())
    }

    /// The plan as a table, and which way would be taken and why.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let width = self.tables.iter().map(|t| t.table.len()).max().unwrap_or(0);
        for table in &self.tables {
            let state = match (table.lost.is_empty(), table.exists) {
                (true, _) => format!("whole: {}", days_of(usize::try_from(table.published).unwrap_or(usize::MAX))),
                (false, true) => format!("damaged: lost {}", told(&table.lost)),
                (false, false) => format!("gone: lost {}", told(&table.lost)),
            };
            let _ = writeln!(text, "{:<width$}  {state}", table.table);
        }
        if self.is_whole() {
            let _ = writeln!(text, "nothing is lost");
            return text;
        }
        let _ = writeln!(text);
        let cells: Vec<[String; 6]> = self
            .ways
            .iter()
            .map(|a| {
                let (possible, leaves) = if a.possible { ("yes", told(&a.leaves)) } else { ("no", String::new()) };
                [a.table.clone(), a.way.as_str().into(), possible.into(), a.work.clone(), leaves, a.why.clone()]
            })
            .collect();
        let head = ["table", "way", "possible", "work", "still lost (RPO)", "why"].map(str::to_owned);
        let widths: Vec<usize> =
            (0..5).map(|i| cells.iter().chain([&head]).map(|c| c[i].chars().count()).max().unwrap_or(0)).collect();
        for [table, way, possible, work, leaves, why] in [&head].into_iter().chain(&cells) {
            let [a, b, c, d, e] = [widths[0], widths[1], widths[2], widths[3], widths[4]];
            let line = format!("{table:<a$}  {way:<b$}  {possible:<c$}  {work:<d$}  {leaves:<e$}  {why}");
            let _ = writeln!(text, "{}", line.trim_end());
        }
        let _ = writeln!(text);
        for (table, way) in &self.chosen {
            let _ = match way {
                Some(way) => {
                    let why = self.ways.iter().find(|a| a.table == *table && a.way == *way).map_or("", |a| a.why.as_str());
                    writeln!(text, "{table}: {}, the cheapest that works: {why}", way.as_str())
                }
                None => writeln!(text, "{table}: none works but {}, which is done with --from-source", Way::Extract.as_str()),
            };
        }
        text
    }
}

impl Report {
    /// What was done, and what it came to.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for step in &self.steps {
            let _ = writeln!(text, "{:<12} {:>10}  {}", step.way.as_str(), seconds(step.millis), step.what);
        }
        for (table, hash) in &self.hashes {
            let _ = writeln!(text, "{table:<28} {hash}");
        }
        let all = |lost: &BTreeMap<String, BTreeMap<NaiveDate, u64>>| {
            lost.iter().map(|(table, days)| format!("{table}: {}", told(days))).collect::<Vec<_>>().join("; ")
        };
        if self.lost_before.is_empty() {
            let _ = writeln!(text, "nothing was lost");
            return text;
        }
        let _ = writeln!(text, "lost before: {}", all(&self.lost_before));
        if self.lost.is_empty() {
            let _ = writeln!(text, "RPO 0 days, 0 rows: every day has the rows and cents that the ledger knows as published");
        } else {
            let _ = writeln!(text, "RPO {}", all(&self.lost));
            let _ = writeln!(text, "these days must be extracted again from the source: simulacro restore with --from-source");
        }
        let _ = writeln!(text, "RTO {} from the start of the command to the end of the verification", seconds(self.rto_millis));
        text
    }
}
