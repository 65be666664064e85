//! Backfill: the days of a range, which of them have to be run and why, and the running of them one by one.
//!
//! A plan is made by looking only: at the ledger, and at the epochs that the tables have seen. It can be kept in a file and
//! applied later; what has changed since is then named and nothing is run. Days that an earlier apply of the same plan has
//! begun are its own: an apply that was interrupted is gone on with by applying again.
//! What this leaves out: where plans are kept, and days in parallel, since one pipeline runs once at a time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    batch::{DayError, MART, STAGING},
    platform::{PIPELINE, Platform},
    ports::{PortError, Ports, Result, Run, RunState},
};

/// Longest range of one plan, in days: ten years.
pub const DAYS_MAX: u64 = 3_660;
/// Version of the plan's form.
const FORMAT: u32 = 1;

/// What is known of a day before anything is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DayState {
    /// How its last run ended; `None` when it was never run.
    pub run: Option<RunState>,
    /// Epoch of that run, from 1; 0 without one.
    pub epoch: i64,
    /// Epoch under which staging has it; `None` when it has not.
    pub staged: Option<i64>,
    /// Epoch under which the mart has it; `None` when it has not.
    pub published: Option<i64>,
}

/// One day of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlannedDay {
    /// The day.
    pub fecha: NaiveDate,
    /// What was known of it.
    pub state: DayState,
    /// Whether it is to be run.
    pub runs: bool,
    /// Why, or why not.
    pub why: String,
    /// Rows to expect: those of its own last run, else the median of all runs; `None` when nothing was ever run.
    pub rows: Option<u64>,
    /// Time to expect, in milliseconds, from the same runs.
    pub millis: Option<u64>,
}

/// A plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this form.
    pub format: u32,
    /// When it was made.
    pub made_at: DateTime<Utc>,
    /// Contract by which the days will be judged, with its version.
    pub contract: String,
    /// First day.
    pub from: NaiveDate,
    /// Last day.
    pub to: NaiveDate,
    /// Whether published days are run too.
    pub force: bool,
    /// Every day of the range, in order.
    pub days: Vec<PlannedDay>,
}

/// Whether a run was one of the whole day; a run of models alone says nothing on the day's rows.
fn is_of_day(run: &Run) -> bool {
    run.report.get("kind").is_none()
}

fn decide(state: &DayState, force: bool) -> (bool, String) {
    match (state.run, state.staged, state.published) {
        (None, None, None) => (true, "never run".into()),
        (None, ..) => (true, "the lake has it, the ledger knows no run".into()),
        (Some(RunState::Failed), ..) => (true, "the last run failed".into()),
        (Some(RunState::Held), ..) => (true, "the last run was held by a gate".into()),
        (Some(RunState::Skipped), ..) => (true, "the last turn was skipped".into()),
        (Some(RunState::Running), ..) => (true, "the last run has not ended: its process died, or is at work".into()),
        (Some(RunState::Succeeded), Some(_), Some(_)) if force => (true, "published, and to be run again".into()),
        (Some(RunState::Succeeded), Some(_), Some(_)) => (false, "published".into()),
        (Some(RunState::Succeeded), staged, _) => {
            let table = if staged.is_none() { STAGING } else { MART };
            (true, format!("the ledger says published, {table} has no such day"))
        }
    }
}

fn median(mut values: Vec<u64>) -> Option<u64> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

fn millis(run: &Run) -> Option<u64> {
    u64::try_from((run.finished_at? - run.started_at).num_milliseconds()).ok()
}

fn rows(run: &Run) -> Option<u64> {
    run.report.get("expected")?.as_u64()
}

/// Looks at every day of a range; `seen` hears of each. Writes nothing.
///
/// # Errors
/// `Permanent` for a range that ends before it begins or is longer than [`DAYS_MAX`]; otherwise what the ports say.
pub async fn plan(
    ports: &Ports,
    contract: &str,
    range: (NaiveDate, NaiveDate),
    force: bool,
    seen: &mut (dyn FnMut(NaiveDate) + Send),
) -> Result<Plan> {
    let (from, to) = range;
    let length = (to - from).num_days() + 1;
    if u64::try_from(length).is_ok_and(|n| n > DAYS_MAX) || length < 1 {
        return Err(PortError::permanent(format!("plan {from} to {to}: found {length} days, expected 1 to {DAYS_MAX}")));
    }
    let runs = ports.ledger.runs(PIPELINE).await?;
    let whole: Vec<&Run> = runs.iter().filter(|r| is_of_day(r)).collect();
    let good = || whole.iter().filter(|r| r.state == RunState::Succeeded);
    let (rows_median, millis_median) =
        (median(good().filter_map(|r| rows(r)).collect()), median(good().filter_map(|r| millis(r)).collect()));
    // In order of day and epoch, so the last one of a day stays.
    let last: BTreeMap<NaiveDate, &Run> = whole.iter().map(|r| (r.fecha, *r)).collect();
    let last_good: BTreeMap<NaiveDate, &Run> = good().map(|r| (r.fecha, *r)).collect();
    let mut days = Vec::new();
    for fecha in from.iter_days().take_while(|d| *d <= to) {
        let run = last.get(&fecha);
        let state = DayState {
            run: run.map(|r| r.state),
            epoch: run.map_or(0, |r| r.epoch),
            staged: ports.lakehouse.last_epoch(STAGING, fecha).await?,
            published: ports.lakehouse.last_epoch(MART, fecha).await?,
        };
        let (runs, why) = decide(&state, force);
        let own = last_good.get(&fecha);
        days.push(PlannedDay {
            fecha,
            state,
            runs,
            why,
            rows: own.and_then(|r| rows(r)).or(rows_median).filter(|_| runs),
            millis: own.and_then(|r| millis(r)).or(millis_median).filter(|_| runs),
        });
        seen(fecha);
    }
    Ok(Plan { format: FORMAT, made_at: ports.env.now(), contract: contract.into(), from, to, force, days })
}

impl Plan {
    /// Reads a plan.
    ///
    /// # Errors
    /// `Permanent`, naming what is wrong and where.
    pub fn parse(name: &str, text: &str) -> Result<Self> {
        let plan: Self = serde_json::from_str(text).map_err(|e| PortError::permanent(format!("read plan {name}")).because(e))?;
        let wrong = |found: String, expected: String| {
            PortError::permanent(format!("read plan {name}: found {found}, expected {expected}"))
        };
        if plan.format != FORMAT {
            return Err(wrong(format!("format {}", plan.format), format!("format {FORMAT}")));
        }
        let range = plan.from.iter_days().take_while(|d| *d <= plan.to);
        if !plan.days.iter().map(|d| d.fecha).eq(range) {
            return Err(wrong(format!("{} days", plan.days.len()), format!("each day from {} to {} once", plan.from, plan.to)));
        }
        Ok(plan)
    }

    /// A name that only this plan has: 16 hexadecimal digits of the hash of its content.
    pub fn id(&self) -> String {
        let text = serde_json::to_vec(self).unwrap_or_default();
        Sha256::digest(&text).iter().take(8).map(|b| format!("{b:02x}")).collect()
    }

    /// What has changed since the plan was made, one line per day; days in `begun` are its own doing.
    pub fn differences(&self, now: &Self, begun: &BTreeSet<NaiveDate>) -> Vec<String> {
        let mut out = Vec::new();
        if self.contract != now.contract {
            out.push(format!("the contract was {}, now it is {}", self.contract, now.contract));
        }
        let present: BTreeMap<NaiveDate, &DayState> = now.days.iter().map(|d| (d.fecha, &d.state)).collect();
        for day in self.days.iter().filter(|d| !begun.contains(&d.fecha)) {
            match present.get(&day.fecha) {
                Some(state) if **state == day.state => {}
                Some(state) => {
                    out.push(format!("{}: the plan saw {}, now there is {}", day.fecha, told(&day.state), told(state)))
                }
                None => out.push(format!("{}: not looked at", day.fecha)),
            }
        }
        out
    }

    /// The plan as it stands when some days were begun already: those that were then published are done.
    pub fn left(&self, now: &Self, begun: &BTreeSet<NaiveDate>) -> Vec<NaiveDate> {
        let done = |day: &PlannedDay| {
            let present = now.days.iter().find(|d| d.fecha == day.fecha);
            begun.contains(&day.fecha)
                && present.is_some_and(|p| p.state.run == Some(RunState::Succeeded) && p.state.epoch > day.state.epoch)
        };
        self.days.iter().filter(|d| d.runs && !done(d)).map(|d| d.fecha).collect()
    }

    /// The plan for a person: days that are alike in a line, and what it comes to.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let lines: Vec<[String; 6]> = self.days.iter().map(columns).collect();
        let mut groups: Vec<(usize, usize)> = Vec::new();
        for i in 0..lines.len() {
            match groups.last_mut() {
                Some((first, last)) if lines[*first] == lines[i] => *last = i,
                _ => groups.push((i, i)),
            }
        }
        let head = ["ledger", "lake", "to do", "rows", "time", "why"].map(str::to_owned);
        let width = |i: usize| groups.iter().map(|g| lines[g.0][i].chars().count()).max().unwrap_or(0).max(head[i].len());
        let widths: Vec<usize> = (0..head.len()).map(width).collect();
        let mut line = |days: &str, cells: &[String; 6]| {
            let [ledger, lake, what, rows, time, why] = cells;
            let [a, b, c, d, e] = [widths[0], widths[1], widths[2], widths[3], widths[4]];
            let _ = writeln!(text, "{days:<24}  {ledger:<a$}  {lake:<b$}  {what:<c$}  {rows:>d$}  {time:>e$}  {why}");
        };
        line("days", &head);
        for (first, last) in groups {
            let (first, last) = (first, last);
            let days = if first == last {
                self.days[first].fecha.to_string()
            } else {
                format!("{} to {}", self.days[first].fecha, self.days[last].fecha)
            };
            line(&days, &lines[first]);
        }
        let to_run: Vec<&PlannedDay> = self.days.iter().filter(|d| d.runs).collect();
        let _ = write!(text, "{} of {} days to run", to_run.len(), self.days.len());
        let sum = |value: fn(&PlannedDay) -> Option<u64>| to_run.iter().map(|d| value(d)).sum::<Option<u64>>();
        match (sum(|d| d.rows), sum(|d| d.millis)) {
            (Some(rows), Some(millis)) if !to_run.is_empty() => {
                let _ = writeln!(text, ", about {rows} rows, about {}", seconds(millis));
            }
            (None, _) | (_, None) if !to_run.is_empty() => text.push_str(", no earlier run to tell rows and time by\n"),
            _ => text.push('\n'),
        }
        text
    }
}

fn days(n: usize) -> String {
    if n == 1 { "1 day".into() } else { format!("{n} days") }
}

fn seconds(millis: u64) -> String {
    match millis {
        0..=99_999 => format!("{}.{} s", millis / 1_000, millis % 1_000 / 100),
        _ => format!("{} min", (millis + 30_000) / 60_000),
    }
}

fn state_name(state: RunState) -> &'static str {
    match state {
        RunState::Running => "running",
        RunState::Succeeded => "published",
        RunState::Failed => "failed",
        RunState::Held => "held",
        RunState::Skipped => "skipped",
    }
}

/// A state in words.
fn told(state: &DayState) -> String {
    let run = state.run.map_or_else(|| "no run".into(), |r| format!("run {} {}", state.epoch, state_name(r)));
    let at = |e: Option<i64>| e.map_or_else(|| "nothing".into(), |e| format!("epoch {e}"));
    format!("{run}, {} in staging, {} in the mart", at(state.staged), at(state.published))
}

fn columns(day: &PlannedDay) -> [String; 6] {
    let state = &day.state;
    let ledger = state.run.map_or_else(|| "no run".into(), |r| format!("run {} {}", state.epoch, state_name(r)));
    let lake = match (state.staged, state.published) {
        (Some(a), Some(b)) if a == b => format!("epoch {a}"),
        (None, None) => "nothing".into(),
        (Some(a), None) => format!("staged {a}, no mart"),
        (None, Some(b)) => format!("mart {b}, not staged"),
        (Some(a), Some(b)) => format!("staged {a}, mart {b}"),
    };
    let about = |v: Option<String>| v.unwrap_or_else(|| if day.runs { "?".into() } else { String::new() });
    [
        ledger,
        lake,
        if day.runs { "run" } else { "skip" }.into(),
        about(day.rows.map(|r| r.to_string())),
        about(day.millis.map(seconds)),
        day.why.clone(),
    ]
}

/// What to do after a day that is not published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// Run no further day.
    Stop,
    /// Go on with the next.
    Continue,
}

/// What to do after each kind of day that is not published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// After a day that a gate has held.
    pub on_held: Then,
    /// After a day that failed.
    pub on_failed: Then,
}

/// What became of one day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The day.
    pub fecha: NaiveDate,
    /// How it ended.
    pub state: RunState,
    /// Epoch of its run; 0 when no run could begin.
    pub epoch: i64,
    /// Rows that were read; 0 unless it was published.
    pub rows: u64,
    /// Revenue in cents; 0 unless it was published.
    pub revenue_cents: i64,
    /// Why it was not published; empty when it was.
    pub why: String,
}

/// What became of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Days that were run, in order.
    pub days: Vec<Applied>,
    /// Days that were not come to.
    pub left: Vec<NaiveDate>,
}

/// Who hears how far an apply is, and keeps what it must not forget.
pub trait Journal: Send {
    /// A day is about to be run. When this returns, it must be known to a later process.
    ///
    /// # Errors
    /// When it could not be kept: then the day is not run.
    fn begins(&mut self, fecha: NaiveDate) -> Result<()>;
    /// A day has ended.
    fn ended(&mut self, day: &Applied);
}

/// Runs these days one by one.
///
/// # Errors
/// When a day could not even be tried: somebody else is running the pipeline (`BUSY`), or the journal cannot be kept.
pub async fn apply(
    platform: &Platform,
    days: &[NaiveDate],
    policy: Policy,
    journal: &mut dyn Journal,
) -> Result<Summary, DayError> {
    let mut summary = Summary::default();
    let mut waiting = days.iter();
    for &fecha in waiting.by_ref() {
        journal.begins(fecha).map_err(|source| DayError::Port { fecha, source })?;
        let (epoch, result) = match platform.run_day(fecha, platform.ports.env.now()).await {
            Ok(outcome) => (outcome.run.epoch, outcome.result),
            Err(DayError::Port { source, .. }) if source.code.as_deref() == Some("BUSY") => {
                return Err(DayError::Port { fecha, source });
            }
            Err(error) => (0, Err(error)),
        };
        let applied = match result {
            Ok(report) => Applied {
                fecha,
                state: RunState::Succeeded,
                epoch,
                rows: report.expected,
                revenue_cents: report.revenue_cents,
                why: String::new(),
            },
            Err(error) => {
                let state = if matches!(error, DayError::Held { .. }) { RunState::Held } else { RunState::Failed };
                let why = match &error {
                    DayError::Held { gate, found, expected, .. } => format!("{gate}: found {found}, expected {expected}"),
                    DayError::Port { source, .. } => source.chain(),
                };
                Applied { fecha, state, epoch, rows: 0, revenue_cents: 0, why }
            }
        };
        journal.ended(&applied);
        let then = match applied.state {
            RunState::Succeeded | RunState::Running | RunState::Skipped => Then::Continue,
            RunState::Held => policy.on_held,
            RunState::Failed => policy.on_failed,
        };
        summary.days.push(applied);
        if then == Then::Stop {
            break;
        }
    }
    summary.left = waiting.copied().collect();
    Ok(summary)
}

impl Summary {
    /// How many days ended so.
    pub fn count(&self, state: RunState) -> usize {
        self.days.iter().filter(|d| d.state == state).count()
    }

    /// The summary for a person: each day that was not published with its reason, and the totals.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for day in self.days.iter().filter(|d| d.state != RunState::Succeeded) {
            let _ = writeln!(text, "{}  {:<6}  {}", day.fecha, state_name(day.state), day.why);
        }
        let rows: u64 = self.days.iter().map(|d| d.rows).sum();
        let cents: i64 = self.days.iter().map(|d| d.revenue_cents).sum();
        let _ = writeln!(
            text,
            "{} run: {} published, {} held, {} failed; {rows} rows, revenue {}.{:02}",
            days(self.days.len()),
            self.count(RunState::Succeeded),
            self.count(RunState::Held),
            self.count(RunState::Failed),
            cents / 100,
            cents % 100
        );
        if let Some(first) = self.left.first() {
            let _ = writeln!(text, "{} left, from {first} on: apply again to go on", days(self.left.len()));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn day(text: &str) -> NaiveDate {
        text.parse().expect("a day")
    }

    fn state(run: Option<RunState>, epoch: i64, staged: Option<i64>, published: Option<i64>) -> DayState {
        DayState { run, epoch, staged, published }
    }

    fn a_plan(states: &[DayState], force: bool) -> Plan {
        let from = day("1997-01-01");
        let planned = |(fecha, state): (NaiveDate, &DayState)| {
            let (runs, why) = decide(state, force);
            let known = state.run.is_some() && runs;
            PlannedDay { fecha, state: *state, runs, why, rows: known.then_some(120), millis: known.then_some(400) }
        };
        let days: Vec<_> = from.iter_days().zip(states).map(planned).collect();
        let made_at = "2024-03-18T03:00:00Z".parse().expect("an instant");
        let to = days.last().expect("a day").fecha;
        Plan { format: FORMAT, made_at, contract: "cdnow 1.0.0".into(), from, to, force, days }
    }

    const GOOD: Option<RunState> = Some(RunState::Succeeded);

    #[test]
    fn a_plan_reads_well() {
        let states = [
            state(GOOD, 1, Some(1), Some(1)),
            state(GOOD, 1, Some(1), Some(1)),
            state(GOOD, 2, Some(2), None),
            state(Some(RunState::Held), 3, Some(2), Some(2)),
            state(Some(RunState::Failed), 1, None, None),
            state(Some(RunState::Running), 1, None, None),
            state(None, 0, Some(4), Some(4)),
            state(None, 0, None, None),
            state(None, 0, None, None),
        ];
        insta::assert_snapshot!(a_plan(&states, false).render());
        let again = a_plan(&states, true);
        assert_eq!(again.days.iter().filter(|d| d.runs).count(), states.len(), "force leaves nothing out");
    }

    #[test]
    fn a_change_since_the_plan_is_named_unless_the_plan_made_it() {
        let before = a_plan(&[state(None, 0, None, None), state(None, 0, None, None)], false);
        let mut now = a_plan(&[state(GOOD, 1, Some(1), Some(1)), state(None, 0, None, None)], false);
        assert_eq!(
            before.differences(&now, &BTreeSet::new()),
            ["1997-01-01: the plan saw no run, nothing in staging, nothing in the mart, \
              now there is run 1 published, epoch 1 in staging, epoch 1 in the mart"]
        );
        let begun = BTreeSet::from([day("1997-01-01")]);
        assert!(before.differences(&now, &begun).is_empty());
        assert_eq!(before.left(&now, &begun), [day("1997-01-02")]);
        // A day that was begun and did not end well is run again.
        now.days[0].state.run = Some(RunState::Running);
        assert_eq!(before.left(&now, &begun), [day("1997-01-01"), day("1997-01-02")]);
        now.contract = "cdnow 2.0.0".into();
        assert_eq!(before.differences(&now, &begun), ["the contract was cdnow 1.0.0, now it is cdnow 2.0.0"]);
    }

    #[test]
    fn a_plan_survives_its_file_and_a_damaged_one_is_refused() {
        let plan = a_plan(&[state(GOOD, 1, Some(1), Some(1)), state(None, 0, None, None)], false);
        let text = serde_json::to_string(&plan).expect("it has a form");
        let read = Plan::parse("plan.json", &text).expect("it is read");
        assert_eq!((read.id(), &read), (plan.id(), &plan));
        for (from, to, said) in [
            ("\"format\":1", "\"format\":2", "found format 2, expected format 1"),
            ("1997-01-02\",\"state", "1997-01-03\",\"state", "expected each day from 1997-01-01 to 1997-01-02 once"),
            ("\"force\"", "\"fuerza\"", "read plan plan.json"),
        ] {
            assert!(text.contains(from), "{from}");
            let error = Plan::parse("plan.json", &text.replacen(from, to, 1)).expect_err("it is refused").chain();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn a_summary_reads_well() {
        let applied = |fecha: &str, state, why: &str| Applied {
            fecha: day(fecha),
            state,
            epoch: 1,
            rows: if state == RunState::Succeeded { 120 } else { 0 },
            revenue_cents: if state == RunState::Succeeded { 123_405 } else { 0 },
            why: why.into(),
        };
        let summary = Summary {
            days: vec![
                applied("1997-01-01", RunState::Succeeded, ""),
                applied("1997-01-02", RunState::Held, "quality_gate_raw: found 0 rows, expected 1 to 10000 rows"),
                applied("1997-01-03", RunState::Failed, "read ventas [ECONNREFUSED]"),
            ],
            left: vec![day("1997-01-04")],
        };
        insta::assert_snapshot!(summary.render());
    }
}
