//! Incident capsules: a stretch of a history with the story and the seed that it belongs to, in one file that can be sent
//! around and replayed on a desk.
//!
//! A capsule of a simulated run replays to the letter: every event, its time and its number. One of a production history
//! cannot, for the rows of production are not in it: its story is put together from what the history shows (when the source
//! was away, which calls the store refused), and what is compared is the course of events: questions to the source, runs,
//! commits of a day up to the mart of daily metrics, and alerts, without times. Histories hold references, never payloads; the free text that alerts carry and the
//! names of processes are replaced by a hash.
//!
//! Left out: pinning the evidence in the lake against removal, and faults that leave no trace in a history.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Duration, NaiveDate, NaiveTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use simulacro_core::{
    batch::{MART, QUARANTINE, STAGING, WAREHOUSE},
    history::Event,
    platform::{Config, PIPELINE},
};

use crate::{
    faults::{Fault, StoreFault},
    scenario::{Expect, Scenario, Story, Tier, Verdict},
    store::Operation,
};

/// The format that is written and read.
const FORMAT: u32 = 1;
/// References whose text could tell more than what happened.
const REDACTED: [&str; 2] = ["summary", "holder"];
/// Events that are shown before the one at which two courses part.
const SHOWN: usize = 3;
/// Days of a story that is put together.
const DAYS_MAX: i64 = 31;

/// Where the events of a capsule come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A run of the simulator.
    Simulation,
    /// The history of a production process.
    Production,
}

/// The first line of a capsule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    /// Format, 1.
    pub capsule: u32,
    /// Version of the program that cut it.
    pub version: String,
    /// Where the events come from.
    pub origin: Origin,
    /// Seed of the run, or for the one that replays production.
    pub seed: u64,
    /// Only events at or after this.
    pub from: Option<DateTime<Utc>>,
    /// Only events before this.
    pub to: Option<DateTime<Utc>>,
    /// The story as TOML.
    pub story: String,
    /// Number of events.
    pub events: usize,
}

/// A capsule.
#[derive(Debug, Clone, PartialEq)]
pub struct Capsule {
    /// What it is of.
    pub head: Head,
    /// The events, in order.
    pub events: Vec<Event>,
}

/// Where a replay leaves the course of its capsule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Divergence {
    /// Position, from 0, and the number of events of the capsule.
    pub at: (usize, usize),
    /// The last ones that are equal.
    pub before: Vec<String>,
    /// What the capsule has there.
    pub expected: String,
    /// What the replay has there.
    pub found: String,
}

fn within(event: &Event, from: Option<DateTime<Utc>>, to: Option<DateTime<Utc>>) -> bool {
    from.is_none_or(|from| event.time >= from) && to.is_none_or(|to| event.time < to)
}

fn redacted(mut event: Event) -> Event {
    if let Value::Object(refs) = &mut event.refs {
        for key in REDACTED {
            if let Some(Value::String(text)) = refs.get_mut(key)
                && !text.starts_with("sha256:")
            {
                let hash = Sha256::digest(text.as_bytes());
                *text = format!("sha256:{}", hash[..6].iter().map(|byte| format!("{byte:02x}")).collect::<String>());
            }
        }
    }
    event
}

/// An event in one line, with its time.
pub fn line(event: &Event) -> String {
    let (time, refs) = (event.time.format("%m-%d %H:%M:%S%.3f"), &event.refs);
    format!("{time} #{} {}.{} {} {refs}", event.ordinal, event.component, event.call, event.outcome)
}

impl Capsule {
    /// Cuts a stretch out of a history and redacts it.
    ///
    /// # Errors
    /// When no event is left.
    pub fn cut(
        origin: Origin,
        story: &Story,
        seed: u64,
        events: Vec<Event>,
        from: Option<DateTime<Utc>>,
        to: Option<DateTime<Utc>>,
    ) -> Result<Self, String> {
        let all = events.len();
        let events: Vec<Event> = events.into_iter().filter(|event| within(event, from, to)).map(redacted).collect();
        if events.is_empty() {
            return Err(format!("cut a capsule: found no event from {from:?} to {to:?} among {all}, expected at least one"));
        }
        let (version, story) = (env!("CARGO_PKG_VERSION").to_owned(), story.to_toml()?);
        let head = Head { capsule: FORMAT, version, origin, seed, from, to, story, events: events.len() };
        Ok(Self { head, events })
    }

    /// Reads a capsule.
    ///
    /// # Errors
    /// The line that is wrong, and what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        let head: Head = serde_json::from_str(first).map_err(|e| format!("line 1: {e}, expected the head of a capsule"))?;
        if head.capsule != FORMAT {
            return Err(format!("line 1: found capsule format {}, expected {FORMAT}", head.capsule));
        }
        let event = |(n, line): (usize, &str)| serde_json::from_str(line).map_err(|e| format!("line {}: {e}", n + 2));
        let events: Vec<Event> = lines.enumerate().map(event).collect::<Result<_, _>>()?;
        if events.len() != head.events {
            return Err(format!("found {} events, expected {} as line 1 says", events.len(), head.events));
        }
        Ok(Self { head, events })
    }

    /// The text of its file: a line of JSON for the head and one for each event.
    ///
    /// # Errors
    /// When a value has no form in JSON.
    pub fn text(&self) -> Result<String, String> {
        let mut text = serde_json::to_string(&self.head).map_err(|e| e.to_string())?;
        for event in &self.events {
            text.push('\n');
            text.push_str(&serde_json::to_string(event).map_err(|e| e.to_string())?);
        }
        text.push('\n');
        Ok(text)
    }

    /// Its story.
    ///
    /// # Errors
    /// When the text in it is no story.
    pub fn story(&self) -> Result<Story, String> {
        Story::parse(&self.head.story)
    }

    /// Where the events of a replay leave its course; `None` when they do not.
    pub fn diverges(&self, replayed: &[Event]) -> Option<Divergence> {
        match self.head.origin {
            Origin::Simulation => {
                let mine: Vec<String> = self.events.iter().map(line).collect();
                let here = |event: &&Event| within(event, self.head.from, self.head.to);
                let theirs: Vec<String> = replayed.iter().filter(here).map(|e| line(&redacted(e.clone()))).collect();
                first_difference(&mine, &theirs)
            }
            Origin::Production => first_difference(&course(&self.events), &course(replayed)),
        }
    }
}

fn first_difference(expected: &[String], found: &[String]) -> Option<Divergence> {
    let at = expected.iter().zip(found).position(|(a, b)| a != b);
    let at = at.or((expected.len() != found.len()).then_some(expected.len().min(found.len())))?;
    let there = |list: &[String]| list.get(at).cloned().unwrap_or_else(|| "nothing more".into());
    Some(Divergence {
        at: (at, expected.len()),
        before: expected[at.saturating_sub(SHOWN)..at].to_vec(),
        expected: there(expected),
        found: there(found),
    })
}

fn text_of(event: &Event, key: &str) -> String {
    event.refs.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// What happened, without times and numbers; the same thing several times in a row is one.
fn course(events: &[Event]) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    for event in events {
        let about = match (event.component.as_str(), event.call.as_str()) {
            ("table_source", _) => String::new(),
            ("ledger", "begin") if text_of(event, "pipeline") == PIPELINE => text_of(event, "fecha"),
            ("ledger", "finish") if text_of(event, "pipeline") == PIPELINE => {
                format!("{} {}", text_of(event, "fecha"), text_of(event, "state"))
            }
            // The simulator makes the mart of daily metrics and no other model.
            ("lakehouse", "overwrite_day") | ("warehouse", "load_day")
                if [QUARANTINE, STAGING, MART, WAREHOUSE].contains(&text_of(event, "table").as_str()) =>
            {
                format!("{} {}", text_of(event, "table"), text_of(event, "fecha"))
            }
            ("notifier", "raise") => text_of(event, "kind"),
            ("notifier", "resolve") => text_of(event, "key"),
            _ => continue,
        };
        let line = format!("{}.{} {} {about}", event.component, event.call, event.outcome).trim_end().to_owned();
        if out.last() != Some(&line) {
            out.push(line);
        }
    }
    out
}

/// Half of the way from one moment to another.
fn between(a: DateTime<Utc>, b: DateTime<Utc>) -> DateTime<Utc> {
    a + (b - a) / 2
}

/// When the source was away: from the first question without an answer to half of the way to the next that had one.
fn absences(events: &[Event]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut away: Option<(DateTime<Utc>, DateTime<Utc>)> = None;
    for event in events.iter().filter(|e| e.component == "table_source" && e.call == "ping") {
        match (event.outcome == "ok", &mut away) {
            (false, None) => away = Some((event.time, event.time)),
            (false, Some((_, last))) => *last = event.time,
            (true, Some((first, last))) => {
                let from = *first - Duration::seconds(1);
                faults.push(Fault::SourceUnavailable { from, to: between(*last, event.time) });
                away = None;
            }
            (true, None) => {}
        }
    }
    if let Some((first, last)) = away {
        faults.push(Fault::SourceUnavailable { from: first - Duration::seconds(1), to: last + Duration::hours(12) });
    }
    faults
}

/// Calls that the store refused, one fault for each kind of call.
fn refusals(events: &[Event]) -> Vec<Fault> {
    let mut kinds: BTreeMap<Operation, (DateTime<Utc>, DateTime<Utc>, u64)> = BTreeMap::new();
    for event in events.iter().filter(|e| e.component == "object_store" && e.outcome == "error") {
        let operation = match event.call.as_str() {
            call if call.starts_with("put") => Operation::Put,
            call if call.starts_with("get") => Operation::Get,
            call if call.starts_with("list") => Operation::List,
            _ => continue,
        };
        let span = kinds.entry(operation).or_insert((event.time, event.time, 0));
        (span.1, span.2) = (event.time, span.2 + 1);
    }
    let fault = |(operation, (from, last, times))| {
        let (path, to) = (String::new(), last + Duration::seconds(1));
        Fault::Store(StoreFault::Unavailable { operation, path, from, to, times })
    };
    kinds.into_iter().map(fault).collect()
}

/// The same fault at another time.
fn shifted(mut fault: Fault, by: Duration) -> Fault {
    // No other is told by a history.
    if let Fault::SourceUnavailable { from, to } | Fault::Store(StoreFault::Unavailable { from, to, .. }) = &mut fault {
        (*from, *to) = (*from + by, *to + by);
    }
    fault
}

/// Puts together the story of a production history: its days, when the run was started, what was away and what was refused.
/// The rows are those of the purchase history that ships with the program.
///
/// # Errors
/// When the history shows no run of the daily pipeline, days with gaps between them, or several that were run by hand.
pub fn reconstruct(events: &[Event], config: Config, schedule: NaiveTime, sla: NaiveTime) -> Result<Scenario, String> {
    let begins: Vec<(&Event, NaiveDate)> = events
        .iter()
        .filter(|e| (e.component.as_str(), e.call.as_str()) == ("ledger", "begin") && text_of(e, "pipeline") == PIPELINE)
        .filter_map(|e| Some((e, text_of(e, "fecha").parse().ok()?)))
        .collect();
    let days: BTreeSet<NaiveDate> = begins.iter().map(|(_, fecha)| *fecha).collect();
    let (Some(first), Some(last), Some((began, fecha))) = (days.first(), days.last(), begins.first()) else {
        return Err(format!("put a story together: found no run of {PIPELINE} in {} events, expected one", events.len()));
    };
    let count = (*last - *first).num_days() + 1;
    if count > DAYS_MAX || count != days.len() as i64 {
        return Err(format!(
            "put a story together: found {} days from {first} to {last}, expected up to {DAYS_MAX} without a gap",
            days.len()
        ));
    }
    let scheduled = (*fecha + chrono::Days::new(1)).and_time(schedule).and_utc();
    let after = began.time - scheduled;
    let is_scheduled = (Duration::zero()..Duration::hours(12)).contains(&after);
    if !is_scheduled && count > 1 {
        return Err(format!(
            "put a story together: the run of {fecha} began {}, expected within twelve hours after its schedule {scheduled}, or one day",
            began.time
        ));
    }
    // A day that was run by hand is told as if it had begun at its schedule.
    let (dispatch_s, shift) = if is_scheduled { (after.num_seconds(), Duration::zero()) } else { (0, -after) };
    let alerts = events.iter().filter(|e| e.component == "notifier" && e.call == "raise").map(|e| text_of(e, "kind")).collect();
    let fault: Vec<Fault> = absences(events).into_iter().chain(refusals(events)).map(|f| shifted(f, shift)).collect();
    Ok(Scenario {
        summary: "an incident of production, as its history tells it".into(),
        tier: Tier::Nightly,
        seeds: vec![1],
        purchases_from: NaiveDate::from_ymd_opt(1997, 3, 17).unwrap_or_default(),
        fecha: *first,
        days: count.unsigned_abs(),
        schedule,
        dispatch_s,
        sla,
        tick_ms: 100,
        runs: 1,
        rows_per_day: None,
        models: Vec::new(),
        without: BTreeSet::new(),
        counterfactual: BTreeSet::new(),
        config,
        products: None,
        account: None,
        operator: Vec::new(),
        expect: Expect {
            verdict: Verdict::Holds,
            broken: Vec::new(),
            alerts: Some(alerts),
            attempts: None,
            held_by: None,
            recovered_by: None,
            detected_within_s: None,
            fired_min: u64::from(!fault.is_empty()),
            converges: !fault.is_empty(),
        },
        fault,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MONDAY: &str = include_str!("../../scenarios/incidents/monday_0300_waiting.toml");

    fn event(second: i64, component: &str, call: &str, outcome: &str, refs: Value) -> Event {
        let time = "2024-03-18T03:00:00Z".parse::<DateTime<Utc>>().expect("a time") + Duration::seconds(second);
        Event { time, ordinal: 0, component: component.into(), call: call.into(), outcome: outcome.into(), refs }
    }

    fn night() -> Vec<Event> {
        let run = json!({ "pipeline": PIPELINE, "fecha": "2024-03-17", "state": "succeeded" });
        let ping = |second, outcome| event(second, "table_source", "ping", outcome, json!({}));
        let alert = json!({ "kind": "source_unavailable", "summary": "the host db-7 of customer X is away" });
        vec![
            event(15, "ledger", "begin", "ok", run.clone()),
            ping(16, "retryable econnrefused"),
            event(60, "notifier", "raise", "ok", alert),
            ping(76, "retryable econnrefused"),
            ping(136, "ok"),
            event(140, "object_store", "get", "error", json!({ "path": "raw/a" })),
            event(150, "ledger", "finish", "ok", run),
        ]
    }

    fn capsule(origin: Origin) -> Capsule {
        Capsule::cut(origin, &Story::parse(MONDAY).expect("a story"), 7, night(), None, None).expect("a capsule")
    }

    #[test]
    fn a_capsule_survives_its_file_and_keeps_no_free_text() {
        let capsule = capsule(Origin::Simulation);
        let text = capsule.text().expect("text");
        assert_eq!(Capsule::parse(&text).expect("a capsule"), capsule);
        assert!(!text.contains("customer X") && text.contains("sha256:"), "{text}");
        let cut: String = text.lines().take(3).map(|line| line.to_owned() + "\n").collect();
        assert!(Capsule::parse(&cut).expect_err("a part").contains("found 2 events, expected 7"));
    }

    #[test]
    fn a_replay_of_a_simulation_is_equal_or_names_the_first_difference() {
        let capsule = capsule(Origin::Simulation);
        assert_eq!(capsule.diverges(&night()), None);
        let mut other = night();
        other[4].time += Duration::milliseconds(1);
        let found = capsule.diverges(&other).expect("a difference");
        assert_eq!((found.at, found.before.len()), ((4, 7), 3));
        assert!(found.expected.contains("03:02:16.000") && found.found.contains("03:02:16.001"), "{found:?}");
        assert_eq!(capsule.diverges(&night()[..6]).expect("a difference").found, "nothing more");
    }

    #[test]
    fn a_replay_of_production_follows_the_course_and_not_the_clock() {
        let capsule = capsule(Origin::Production);
        let mut other = night();
        other.insert(2, event(20, "table_source", "ping", "retryable econnrefused", json!({})));
        other.iter_mut().for_each(|e| e.time += Duration::seconds(3));
        assert_eq!(capsule.diverges(&other), None);
        other.retain(|e| e.component != "notifier");
        let found = capsule.diverges(&other).expect("a difference");
        assert_eq!(
            (found.expected.as_str(), found.found.as_str()),
            ("notifier.raise ok source_unavailable", "table_source.ping ok")
        );
    }

    #[test]
    fn the_story_of_a_history_has_its_days_and_what_went_wrong() {
        let config = match Story::parse(MONDAY).expect("a story") {
            Story::Batch(scenario) => scenario.config,
            Story::Stream(_) | Story::Platform(_) => panic!("a story of the batch"),
        };
        let clock = |text: &str| text.parse::<NaiveTime>().expect("a time of day");
        let made = reconstruct(&night(), config.clone(), clock("03:00:00"), clock("06:00:00")).expect("a story");
        assert_eq!((made.fecha.to_string(), made.days, made.dispatch_s), ("2024-03-17".to_owned(), 1, 15));
        assert_eq!(made.expect.alerts, Some(vec!["source_unavailable".to_owned()]));
        let [Fault::SourceUnavailable { from, to }, Fault::Store(StoreFault::Unavailable { operation, times, .. })] =
            &made.fault[..]
        else {
            panic!("{:?}", made.fault)
        };
        assert_eq!(
            (from.to_rfc3339(), to.to_rfc3339()),
            ("2024-03-18T03:00:15+00:00".into(), "2024-03-18T03:01:46+00:00".into())
        );
        assert_eq!((*operation, *times), (Operation::Get, 1));
        // By hand, at another time: the same story as if it had been on time.
        let made = reconstruct(&night(), config, clock("09:00:00"), clock("12:00:00")).expect("a story");
        let Fault::SourceUnavailable { from, .. } = &made.fault[0] else { panic!("{:?}", made.fault) };
        assert_eq!((made.dispatch_s, from.to_rfc3339()), (0, "2024-03-18T09:00:00+00:00".to_owned()));
    }
}
