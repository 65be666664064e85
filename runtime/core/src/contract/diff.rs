//! Two versions of a contract, compared: what changed, and whom it breaks.
//!
//! A change is *breaking* when a query of a reader may stop working (a column is gone, renamed, retyped or may now be null),
//! when a promise to readers gets weaker (uniqueness, freshness), or when data that kept the old contract no longer does
//! (a new clause, a narrower range). Anything else is *additive*. Descriptions, owners and tags are not compared.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Contract, Field, Limit, Number};

/// Whether a change can be rolled out without asking anybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Impact {
    /// Somebody has to change something first, or data has to be loaded again.
    Breaking,
    /// Nobody notices who does not want to.
    Additive,
}

/// One change between two contracts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Whom it breaks.
    pub impact: Impact,
    /// The column, or what changed about the table, for example `key`.
    pub place: String,
    /// What happened, for example `type changed`.
    pub what: &'static str,
    /// As it was: a type for a column; `None` when there was nothing.
    pub old: Option<String>,
    /// As it is; `None` when there is nothing.
    pub new: Option<String>,
    /// Why it is breaking, or what follows from it.
    pub why: &'static str,
}

/// Whether any change breaks somebody; the command line then ends with code 3.
pub fn is_breaking(changes: &[Change]) -> bool {
    changes.iter().any(|c| c.impact == Impact::Breaking)
}

/// The changes from `old` to `new`: columns in the order of the old contract, then new ones, then the table's own.
pub fn diff(old: &Contract, new: &Contract) -> Vec<Change> {
    let mut out = Changes(Vec::new());
    let gone: Vec<&Field> = old.fields.iter().filter(|f| new.field(&f.name).is_none()).collect();
    let come: Vec<&Field> = new.fields.iter().filter(|f| old.field(&f.name).is_none()).collect();
    let renamed = match (gone.as_slice(), come.as_slice()) {
        ([from], [to]) if from.physical_type == to.physical_type => Some((*from, *to)),
        _ => None,
    };
    for from in &old.fields {
        match (new.field(&from.name), renamed) {
            (Some(to), _) => field(&mut out, from, to),
            (None, Some((_, to))) => {
                let [old, new] = [from, to].map(|f| format!("{} {}", f.name, f.physical_type));
                out.breaking(&from.name, "seems renamed", Some(old), Some(new), "readers ask for the old name");
                field(&mut out, from, to);
            }
            (None, None) => {
                let old = Some(from.physical_type.to_string());
                out.breaking(&from.name, "column removed", old, None, "readers ask for the column");
            }
        }
    }
    if renamed.is_none() {
        for to in come {
            let new = Some(to.physical_type.to_string());
            if to.required {
                out.breaking(&to.name, "required column added", None, new, "days already stored have no value for it");
            } else {
                out.additive(&to.name, "column added", None, new, "null in days already stored");
            }
        }
    }
    table(&mut out, old, new);
    out.0
}

/// The changes as text: a line that sums up, then one line per change, breaking ones first.
pub fn render(old: &Contract, new: &Contract, changes: &[Change]) -> String {
    let count = |impact| changes.iter().filter(|c| c.impact == impact).count();
    let (breaking, additive) = (count(Impact::Breaking), count(Impact::Additive));
    let mut text = format!("{} -> {}: ", old.id, new.id);
    if changes.is_empty() {
        text.push_str("no change\n");
        return text;
    }
    let _ = writeln!(text, "{breaking} breaking, {additive} additive");
    let width = |f: fn(&Change) -> usize| changes.iter().map(f).max().unwrap_or(0);
    let (place, what) = (width(|c| c.place.chars().count()), width(|c| c.what.chars().count()));
    let mut sorted: Vec<_> = changes.iter().collect();
    sorted.sort_by_key(|c| c.impact);
    for c in sorted {
        let impact = match c.impact {
            Impact::Breaking => "BREAKING",
            Impact::Additive => "additive",
        };
        let values = match (&c.old, &c.new) {
            (Some(old), Some(new)) => format!("{old} -> {new}"),
            (Some(old), None) => format!("{old} -> none"),
            (None, Some(new)) => format!("none -> {new}"),
            (None, None) => String::new(),
        };
        let _ = writeln!(text, "  {impact}  {:<place$}  {:<what$}  {values}  ({})", c.place, c.what, c.why);
    }
    text
}

struct Changes(Vec<Change>);

impl Changes {
    fn push(
        &mut self,
        impact: Impact,
        place: &str,
        what: &'static str,
        (old, new): (Option<String>, Option<String>),
        why: &'static str,
    ) {
        self.0.push(Change { impact, place: place.into(), what, old, new, why });
    }
    fn breaking(&mut self, place: &str, what: &'static str, old: Option<String>, new: Option<String>, why: &'static str) {
        self.push(Impact::Breaking, place, what, (old, new), why);
    }
    fn additive(&mut self, place: &str, what: &'static str, old: Option<String>, new: Option<String>, why: &'static str) {
        self.push(Impact::Additive, place, what, (old, new), why);
    }
}

fn list<'a>(values: impl IntoIterator<Item = &'a String>) -> Option<String> {
    let text = values.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    (!text.is_empty()).then_some(text)
}

/// What changed about a column that is in both.
fn field(out: &mut Changes, old: &Field, new: &Field) {
    let place = old.name.as_str();
    if old.physical_type != new.physical_type {
        let (from, to) = (Some(old.physical_type.to_string()), Some(new.physical_type.to_string()));
        out.breaking(place, "type changed", from, to, "readers and stored days have the old type");
    }
    let null = |required: bool| Some(if required { "not null" } else { "nullable" }.to_owned());
    match (old.required, new.required) {
        (true, false) => out.breaking(place, "may be null", null(true), null(false), "readers do not expect a null"),
        (false, true) => out.breaking(place, "must not be null", null(false), null(true), "rows with a null break it"),
        (true, true) | (false, false) => {}
    }
    match (old.unique, new.unique) {
        (true, false) => out.breaking(place, "no longer unique", None, None, "readers who join on it get rows twice"),
        (false, true) => out.breaking(place, "must be unique", None, None, "rows that share a value break it"),
        (true, true) | (false, false) => {}
    }
    match (&old.accepted, &new.accepted) {
        (Some(from), Some(to)) => {
            if let gone @ Some(_) = list(from.difference(to)) {
                out.breaking(place, "values no longer accepted", gone, None, "rows with such a value break it");
            }
            if let come @ Some(_) = list(to.difference(from)) {
                out.additive(place, "values newly accepted", None, come, "readers may meet a value for the first time");
            }
        }
        (Some(from), None) => out.additive(place, "any value accepted", list(from), None, "readers may meet any value"),
        (None, Some(to)) => out.breaking(place, "only listed values accepted", None, list(to), "rows with other values break it"),
        (None, None) => {}
    }
    limits(out, place, &old.limits, &new.limits);
    if old.default != new.default {
        out.additive(place, "default changed", old.default.clone(), new.default.clone(), "of rows that are loaded from now on");
    }
}

/// Whether a limit with the value `new` lets fewer rows pass than with the value `old`.
fn narrower(option: &str, old: &str, new: &str) -> bool {
    let order = match (old.parse::<Number>(), new.parse::<Number>()) {
        (Ok(old), Ok(new)) => new.cmp(&old),
        // Days and instants in ISO 8601 order as text.
        _ => new.cmp(old),
    };
    if option.to_ascii_lowercase().contains("min") { order.is_gt() } else { order.is_lt() }
}

fn limits(out: &mut Changes, place: &str, old: &[Limit], new: &[Limit]) {
    let map = |limits: &[Limit]| limits.iter().map(|l| (l.option.clone(), l.value.clone())).collect::<BTreeMap<_, _>>();
    let (old, new) = (map(old), map(new));
    for (option, from) in &old {
        let shown = |value: &str| Some(format!("{option} {value}"));
        match new.get(option) {
            None => out.additive(place, "limit removed", shown(from), None, "readers may meet values beyond it"),
            Some(to) if narrower(option, from, to) => {
                out.breaking(place, "limit tightened", shown(from), shown(to), "rows between the two break it");
            }
            Some(to) if narrower(option, to, from) => {
                out.additive(place, "limit widened", shown(from), shown(to), "readers may meet values between the two");
            }
            Some(_) => {}
        }
    }
    for (option, to) in new.iter().filter(|(option, _)| !old.contains_key(*option)) {
        out.breaking(place, "limit added", None, Some(format!("{option} {to}")), "rows beyond it break it");
    }
}

/// What changed about named things: what comes can break data, what goes can break a promise if `promise` says so.
fn named(
    out: &mut Changes,
    place: &str,
    (old, new): (&BTreeMap<String, String>, &BTreeMap<String, String>),
    promise: Option<&'static str>,
) {
    for (name, from) in old {
        let shown = |value: &str| Some(format!("{name}: {value}"));
        match (new.get(name), promise) {
            (Some(to), _) if to != from => {
                out.breaking(place, "rule changed", shown(from), shown(to), "rows that kept the old one may break it");
            }
            (Some(_), _) => {}
            (None, Some(why)) => out.breaking(place, "rule removed", shown(from), None, why),
            (None, None) => out.additive(place, "rule removed", shown(from), None, "readers may meet rows that broke it"),
        }
    }
    for (name, to) in new.iter().filter(|(name, _)| !old.contains_key(*name)) {
        out.breaking(place, "rule added", None, Some(format!("{name}: {to}")), "rows stored so far may break it");
    }
}

/// What changed about the table as a whole.
fn table(out: &mut Changes, old: &Contract, new: &Contract) {
    if old.table != new.table {
        let names = (Some(old.table.clone()), Some(new.table.clone()));
        out.push(Impact::Breaking, "table", "renamed", names, "readers ask for the old name");
    }
    if old.physical_name != new.physical_name {
        let names = (Some(old.physical_name.clone()), Some(new.physical_name.clone()));
        out.push(Impact::Breaking, "table", "moved", names, "readers look in the old place");
    }
    for (place, from, to, why) in [
        ("key", &old.key, &new.key, "readers join and merge on the old key"),
        ("partition", &old.partition, &new.partition, "stored data has to be laid out again"),
    ] {
        if from != to {
            out.breaking(place, "changed", list(from), list(to), why);
        }
    }
    if old.clustered_by != new.clustered_by {
        let columns = (list(&old.clustered_by), list(&new.clustered_by));
        out.push(Impact::Additive, "clusteredBy", "changed", columns, "of days that are written from now on");
    }
    // Clauses of columns were compared with their columns; what is left are those with a name of their own.
    let own = |c: &Contract| {
        let derived = |name: &str| {
            name.rsplit_once('.').is_some_and(|(column, end)| {
                c.field(column)
                    .is_some_and(|f| end == "required" || end == "accepted_values" || f.limits.iter().any(|l| l.option == end))
            })
        };
        let clauses = c.clauses.iter().filter(|c| !derived(&c.name));
        clauses.map(|c| (c.name.clone(), c.broken_when.clone())).collect::<BTreeMap<_, _>>()
    };
    named(out, "clauses", (&own(old), &own(new)), None);
    let rules = |c: &Contract| {
        let rules = c.rules.iter().filter(|r| r.measure != super::Measure::RowCount);
        let shown = |r: &super::Rule| format!("{:?} must be {} ({})", r.measure, r.bound, r.severity.as_str());
        rules.map(|r| (r.name.clone(), shown(r))).collect::<BTreeMap<_, _>>()
    };
    named(out, "rules", (&rules(old), &rules(new)), None);
    let references = |c: &Contract| {
        let shown = |r: &super::Reference| format!("{}.{} ({})", r.table, r.to.join(", "), r.severity.as_str());
        c.references.iter().map(|r| (r.name.clone(), shown(r))).collect::<BTreeMap<_, _>>()
    };
    named(out, "references", (&references(old), &references(new)), Some("readers who join lose rows"));
    rows(out, old, new);
    let fresh = |c: &Contract| c.freshness.iter().map(|f| (f.column.clone(), f.at_most)).collect::<BTreeMap<_, _>>();
    let (old_fresh, new_fresh) = (fresh(old), fresh(new));
    let shown = |column: &str, age: std::time::Duration| Some(format!("{column} at most {} s old", age.as_secs()));
    for (column, from) in &old_fresh {
        match new_fresh.get(column) {
            None => out.breaking("freshness", "promise removed", shown(column, *from), None, "readers count on it"),
            Some(to) if to > from => {
                let ages = (shown(column, *from), shown(column, *to));
                out.push(Impact::Breaking, "freshness", "promise weakened", ages, "readers count on it");
            }
            Some(to) if to < from => {
                let ages = (shown(column, *from), shown(column, *to));
                out.push(Impact::Additive, "freshness", "promise strengthened", ages, "the pipeline has to be that fast");
            }
            Some(_) => {}
        }
    }
    for (column, to) in new_fresh.iter().filter(|(column, _)| !old_fresh.contains_key(*column)) {
        out.additive("freshness", "promise added", None, shown(column, *to), "the pipeline has to be that fast");
    }
}

/// What changed about the bounds on the rows of a day and on those that may be quarantined.
fn rows(out: &mut Changes, old: &Contract, new: &Contract) {
    let max = |rows: u64| if rows == u64::MAX { "any number".to_owned() } else { rows.to_string() };
    let shown = |c: &Contract| Some(format!("{} to {} rows", c.rows_min, max(c.rows_max)));
    if new.rows_min > old.rows_min || new.rows_max < old.rows_max {
        out.breaking("rowCount", "range tightened", shown(old), shown(new), "a day between the two is held");
    } else if (new.rows_min, new.rows_max) != (old.rows_min, old.rows_max) {
        out.additive("rowCount", "range widened", shown(old), shown(new), "a day between the two is no longer held");
    }
    let ((a, b), (c, d)) = (old.quarantine_share_max, new.quarantine_share_max);
    let shares = (Some(format!("{a}/{b}")), Some(format!("{c}/{d}")));
    match (u128::from(c) * u128::from(b)).cmp(&(u128::from(a) * u128::from(d))) {
        std::cmp::Ordering::Less => {
            out.push(Impact::Breaking, "quarantineShareMax", "lowered", shares, "a day between the two is held");
        }
        std::cmp::Ordering::Greater => {
            out.push(Impact::Additive, "quarantineShareMax", "raised", shares, "more rows may be missing from a day");
        }
        std::cmp::Ordering::Equal => {}
    }
    // No bound is above every bound.
    let wider = |(a, b): (u64, u64), (c, d): (u64, u64)| u128::from(a) * u128::from(d) > u128::from(c) * u128::from(b);
    let shown = |bound: Option<(u64, u64)>| bound.map(|(a, b)| format!("{a}/{b}"));
    let (old, new) = (old.mean_shift_max, new.mean_shift_max);
    match (old, new) {
        (o, n) if o == n => {}
        (Some(o), Some(n)) if wider(o, n) => {
            out.breaking("meanShiftMax", "lowered", shown(old), shown(new), "a day between the two is held");
        }
        (None, Some(_)) => out.breaking("meanShiftMax", "added", shown(old), shown(new), "a day beyond it is held"),
        (Some(_) | None, _) => {
            out.additive("meanShiftMax", "raised", shown(old), shown(new), "amounts in another unit may pass");
        }
    }
}
