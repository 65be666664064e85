//! A draft of a postmortem: what a run can tell, under the headings that the document needs. Facts are filled in with the
//! event of the history that shows them; what only people can judge is left to them and marked so.
//!
//! Times are virtual and in UTC. The incident begins with the first event that went wrong while a fault was at work, is
//! detected by the first alert from then on, and is over when what it held up was done. In a stream story with an account of
//! people it is the lag: what the judgement says of it counts. What a run without defences came to stands beside the impact.

use std::{collections::BTreeSet, fmt::Write as _};

use chrono::{DateTime, Duration, NaiveDate, Utc};
use simulacro_core::history::Event;

use crate::{
    faults::{CATALOGUE, Entry, Fault},
    report::described,
    scenario::{Scenario, Story},
    stream::{self, faults::StreamFault},
    summary::repeat,
    world::{Incident, Judgement},
};

/// Seconds from one look of a timeline to the next.
const LOOK_S: i64 = 60;
/// Rows of the timeline.
const ROWS_MAX: usize = 40;
/// What an incident says that no alert told of.
const PEOPLE: &str = "people";
/// For a person to fill in.
const OPEN: &str = "_to be filled in_";

/// What was seen of an incident.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Course {
    /// Position of the first event that went wrong.
    pub began: Option<usize>,
    /// Position of the first alert at or after it.
    pub detected: Option<usize>,
    /// When everything was as it should be again.
    pub over: Option<DateTime<Utc>>,
}

/// Whether a call went wrong. That an object is absent or already there is an answer, not a fault.
fn went_wrong(event: &Event) -> bool {
    match (event.component.as_str(), event.call.as_str()) {
        ("world", call) => matches!(call, "crash" | "strike" | "worker_stopped"),
        ("ledger", "finish") if event.outcome == "ok" => {
            event.refs.get("state").and_then(|s| s.as_str()).is_some_and(|state| state != "succeeded")
        }
        ("monitor" | "planted", _) => false,
        // That a schema is not there is an answer.
        ("schema_registry", _) => event.outcome != "ok" && !event.outcome.starts_with("permanent 404"),
        _ => !matches!(event.outcome.as_str(), "ok" | "not_found" | "already_exists" | "precondition"),
    }
}

fn begins(story: &Story) -> DateTime<Utc> {
    match story {
        Story::Batch(scenario) => scenario.scheduled(scenario.fecha) - Duration::days(1),
        Story::Stream(story) => story.start,
        Story::Platform(story) => story.start(),
    }
}

/// The course of a lag, as it was judged.
fn lagged(incident: &Incident, events: &[Event]) -> Course {
    // A look is written down in the step before it is judged.
    let began = events.iter().rposition(|e| e.component == "monitor" && e.time <= incident.effect_at);
    let is_alert = |e: &Event| is_raise(e) && Some(e.time) >= incident.detected_at;
    let by_alert = incident.detected_by.as_deref() != Some(PEOPLE);
    let detected = events.iter().position(is_alert).filter(|_| by_alert);
    Course { began, detected, over: incident.resolved_at }
}

fn is_raise(event: &Event) -> bool {
    event.component == "notifier" && event.call == "raise" && event.outcome == "ok"
}

/// Finds the course of the incident.
pub fn course(story: &Story, judgement: &Judgement, events: &[Event]) -> Course {
    if let (Story::Stream(_), Some(incident)) = (story, &judgement.incident) {
        return lagged(incident, events);
    }
    let began = events.iter().position(went_wrong).or_else(|| {
        // Nothing failed, as when data are wrong: the first run is where it could have been seen.
        events.iter().position(|e| e.component == "ledger" && e.call == "begin").filter(|_| !story_is_clean(story))
    });
    let detected = began.and_then(|from| events.iter().skip(from).position(is_raise).map(|n| from + n));
    let over = match story {
        Story::Batch(scenario) => {
            let days = scenario.fechas();
            let all = days.iter().map(|fecha| judgement.published.get(fecha).copied()).collect::<Option<Vec<_>>>();
            all.and_then(|times| times.into_iter().max())
        }
        Story::Platform(story) => {
            let all = story.fechas().map(|fecha| judgement.published.get(&fecha).copied()).collect::<Option<Vec<_>>>();
            all.and_then(|times| times.into_iter().max())
        }
        Story::Stream(story) => judgement.stream.as_ref().and_then(|figures| {
            let drained = figures.drained_after_s?;
            let all = story.start + Duration::seconds(i64::try_from(story.healed_s()).unwrap_or(0) + drained);
            // Once what came until the last failure is in closed windows, nobody can see it any more.
            let last = events.iter().rposition(went_wrong)?;
            let seen = |e: &&Event| {
                let closed = e.refs.get("closed_ms").and_then(serde_json::Value::as_i64);
                e.component == "monitor" && closed >= Some(events[last].time.timestamp_millis())
            };
            Some(events[last..].iter().find(seen).map_or(all, |e| e.time))
        }),
    };
    Course { began, detected, over }
}

fn story_is_clean(story: &Story) -> bool {
    match story {
        Story::Batch(scenario) => scenario.fault.is_empty(),
        Story::Stream(story) => story.fault.is_empty() && story.sabotage.is_none(),
        Story::Platform(story) => story.fault.is_empty(),
    }
}

fn spoken(duration: Duration) -> String {
    let s = duration.num_seconds().max(0);
    match s {
        0..60 => format!("{s} s"),
        60..3_600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3_600, s % 3_600 / 60),
    }
}

fn clock(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S").to_string()
}

/// Text for a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// A cause: what it looks like, what defends against it, and within how many seconds an alert must come.
struct Cause {
    fault: String,
    seen: &'static str,
    defence: &'static str,
    within_s: Option<i64>,
}

/// Seconds within which a failure mode must be detected; `None` where that hangs on when a batch is due.
fn target(failure: u8) -> Option<i64> {
    match failure {
        1 | 5 | 8 | 10 => Some(60),
        4 | 7 => Some(120),
        3 => Some(300),
        9 => Some(600),
        _ => None,
    }
}

fn causes(story: &Story) -> Vec<Cause> {
    let cause = |fault: String, entry: Option<&Entry>| Cause {
        fault,
        seen: entry.map_or("", |e| e.seen),
        defence: entry.map_or("", |e| e.defence),
        within_s: entry.and_then(|e| target(e.failure)),
    };
    match story {
        Story::Batch(scenario) => {
            let name = |fault: &Fault| {
                let value = serde_json::to_value(fault).unwrap_or_default();
                let part = |key: &str| value[key].as_str().map(str::to_owned);
                match (part("mode").unwrap_or_default(), part("kind")) {
                    (mode, Some(kind)) => format!("{mode}, kind {kind}"),
                    (mode, None) => mode,
                }
            };
            let entry = |fault: &Fault| CATALOGUE.iter().find(|entry| entry.mode == name(fault));
            scenario.fault.iter().map(|fault| cause(described(fault), entry(fault))).collect()
        }
        Story::Stream(story) => {
            let entry = |fault: &StreamFault| stream::faults::CATALOGUE.iter().find(|entry| entry.mode == fault.mode());
            story.fault.iter().map(|fault| cause(described(fault), entry(fault))).collect()
        }
        Story::Platform(story) => {
            let mut causes: Vec<Cause> = story.fault.iter().map(|fault| cause(described(fault), None)).collect();
            for (cause, fault) in causes.iter_mut().zip(&story.fault) {
                cause.within_s = Some(fault.mode.entry().target_s);
            }
            causes
        }
    }
}

/// A row of the timeline: when, what, and which event shows it.
struct Row {
    at: DateTime<Utc>,
    what: String,
    evidence: String,
}

fn rows(story: &Story, judgement: &Judgement, events: &[Event], course: &Course) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let mut kind = String::new();
    let mut looked: Option<DateTime<Utc>> = None;
    for (index, event) in events.iter().enumerate() {
        let told = match (event.component.as_str(), event.call.as_str()) {
            ("ledger", "begin") | ("notifier", _) | ("world", _) | ("operator", _) => true,
            // Where state has a cost, lag, commit and state are the course; one look in a while tells it.
            ("monitor", "look") if event.refs.get("state_mb").is_some() => {
                let is_over = course.over.is_some_and(|over| event.time > over);
                let tells = course.began == Some(index) || looked.is_none_or(|at| event.time - at >= Duration::seconds(LOOK_S));
                tells && !is_over
            }
            ("table_source", "ping") | ("ledger", "finish") | ("warehouse", "load_day") => true,
            _ => went_wrong(event),
        };
        // A stream's history is long; before its incident nothing is of interest.
        if !told || (matches!(story, Story::Stream(_)) && course.began.is_some_and(|began| index < began)) {
            continue;
        }
        let is_look = event.component == "monitor";
        if is_look {
            looked = Some(event.time);
        }
        let now = format!("{} {} {}", event.component, event.call, event.outcome);
        let marks = [(course.began, "**the incident begins**"), (course.detected, "**detected**")];
        let mark = marks.iter().filter(|(at, _)| *at == Some(index)).map(|(_, text)| *text).collect::<Vec<_>>().join(", ");
        let evidence = format!("#{}", event.ordinal);
        if now == kind && mark.is_empty() && !is_look {
            // The same again and again is one row.
            if let Some(last) = rows.last_mut() {
                let first = last.evidence.split(" to ").next().unwrap_or_default().to_owned();
                last.evidence = format!("{first} to {evidence}");
                continue;
            }
        }
        kind.clone_from(&now);
        let refs = event.refs.as_object().into_iter().flatten();
        let refs = refs.filter(|(_, value)| !value.is_null()).map(|(key, value)| format!("{key} {value}"));
        let about = refs.collect::<Vec<_>>().join(", ").replace('"', "");
        let what = [mark, format!("`{now}`"), about].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join(" ");
        rows.push(Row { at: event.time, what, evidence });
    }
    if let Some(over) = course.over {
        let what = match story {
            Story::Batch(_) | Story::Platform(_) => "**resolved**: all days are published",
            Story::Stream(_) if judgement.incident.is_some() => "**resolved**: no event waits much longer than before any more",
            Story::Stream(_) => "**resolved**: every window until the last failure is closed",
        };
        rows.push(Row { at: over, what: what.into(), evidence: "judgement".into() });
    }
    rows.sort_by_key(|row| row.at);
    if course.over.is_none() && judgement.verdict != "holds" {
        let at = events.last().map_or_else(|| begins(story), |e| e.time);
        rows.push(Row { at, what: "not resolved by the end of the run".into(), evidence: "judgement".into() });
    }
    rows
}

fn late(scenario: &Scenario, judgement: &Judgement) -> Vec<(NaiveDate, Option<DateTime<Utc>>)> {
    let late = |fecha: &NaiveDate| judgement.published.get(fecha).is_none_or(|at| *at > scenario.sla(*fecha));
    scenario.fechas().into_iter().filter(late).map(|fecha| (fecha, judgement.published.get(&fecha).copied())).collect()
}

fn severity(story: &Story, judgement: &Judgement) -> (&'static str, &'static str) {
    let missed = match story {
        Story::Batch(scenario) => !late(scenario, judgement).is_empty(),
        Story::Stream(_) => judgement.stream.as_ref().is_some_and(|f| f.drained_after_s.is_none()),
        Story::Platform(_) => judgement.platform.as_ref().is_some_and(|r| !r.late.is_empty()),
    };
    match (!judgement.broken.is_empty(), missed) {
        (true, _) => ("P1", "what was published is wrong, or an objective was missed for good"),
        (false, true) => ("P1", "an objective was missed"),
        (false, false) if !judgement.alerts.is_empty() => ("P2", "somebody was told, and no objective was missed"),
        (false, false) => ("P3", "nobody had to act"),
    }
}

fn impact(out: &mut String, story: &Story, judgement: &Judgement) {
    match story {
        Story::Batch(scenario) => {
            let late = late(scenario, judgement);
            out.push_str("| date | tables | published | due | revenue that was held up |\n|---|---|---|---|---|\n");
            for fecha in scenario.fechas() {
                let revenue: i64 = judgement.expected.iter().filter(|l| l.fecha == fecha).map(|l| l.sales.revenue_cents).sum();
                let at = judgement.published.get(&fecha).map_or("never".to_owned(), |at| clock(*at));
                let is_late = late.iter().any(|(day, _)| *day == fecha);
                let held = if is_late { format!("{}.{:02}", revenue / 100, revenue % 100) } else { "none".to_owned() };
                let _ = writeln!(
                    out,
                    "| {fecha} | staging.ventas_validadas, marts.metricas_diarias, analytics.metricas_diarias | {at} | {} | {held} |",
                    clock(scenario.sla(fecha))
                );
            }
            let wrong = judgement.mart != judgement.expected;
            let _ = writeln!(
                out,
                "\nThe mart {} what the oracle expects of all days.",
                if wrong { "does not show" } else { "shows exactly" }
            );
        }
        Story::Stream(story) => {
            let topics = &story.config.topics;
            let Some(figures) = &judgement.stream else { return };
            let _ = writeln!(
                out,
                "`{}` was behind by up to {} records; {} workers died and {} gave up. {} rows of windows stand in it, {} events were counted.",
                topics.metrics,
                figures.lag_max,
                figures.crashes,
                figures.stops,
                figures.windows,
                figures.fates.values().sum::<u64>()
            );
        }
        Story::Platform(_) => {
            let Some(report) = &judgement.platform else { return };
            let late = report.late.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let _ = writeln!(
                out,
                "{} of {} days were published in time. Late: {}.",
                report.in_time,
                report.days,
                if late.is_empty() { "none" } else { &late }
            );
        }
    }
    for line in &judgement.broken {
        let _ = writeln!(out, "- Broken: {line}");
    }
    if let Some(incident) = &judgement.incident {
        let _ = writeln!(out, "\nWith the defences: {}.", incident.line());
    }
    if let Some(without) = &judgement.without {
        let _ = writeln!(out, "\nWithout them, the same story ({}): {}.", left_off(story), without.line());
    }
    let _ = writeln!(out, "\nWho saw it: {OPEN}");
}

/// The defences without which the story is told once more.
fn left_off(story: &Story) -> String {
    let named = match story {
        Story::Batch(scenario) => serde_json::to_value(&scenario.counterfactual),
        Story::Stream(story) => serde_json::to_value(story.counterfactual),
        Story::Platform(_) => Ok(serde_json::Value::Null),
    };
    match named.unwrap_or_default() {
        serde_json::Value::String(one) => format!("{one}, nobody told"),
        serde_json::Value::Array(all) => {
            let all: Vec<&str> = all.iter().filter_map(serde_json::Value::as_str).collect();
            format!("without {}", all.join(", "))
        }
        _ => String::new(),
    }
}

/// The draft. `name` is the scenario's path as it is given to commands.
pub fn markdown(name: &str, story: &Story, seed: u64, judgement: &Judgement, events: &[Event]) -> String {
    let course = course(story, judgement, events);
    let at = |index: Option<usize>| index.and_then(|n| events.get(n)).map(|event| event.time);
    let (began, detected) = (at(course.began), at(course.detected));
    let (level, why) = severity(story, judgement);
    let causes = causes(story);
    let mut out = String::new();
    let _ = writeln!(out, "# Postmortem: {}\n", story.summary());
    out.push_str("Status: draft. Facts come from the history of the run; what is marked is for people.\n\n");
    let since = began.zip(course.over).map(|(from, to)| spoken(to - from));
    for (what, value) in [
        ("Date", began.unwrap_or_else(|| begins(story)).format("%Y-%m-%d").to_string()),
        ("Severity", format!("{level}: {why}")),
        (
            "Duration",
            since
                .clone()
                .unwrap_or_else(|| if began.is_some() { "not over at the end of the run".into() } else { "none".into() }),
        ),
        ("Run", format!("`{}`", repeat(name, seed))),
        ("Verdict", judgement.verdict.clone()),
    ] {
        let _ = writeln!(out, "- {what}: {value}");
    }

    out.push_str("\n## Timeline\n\nUTC. Evidence is the number of the event in the history.\n\n| time | what | evidence |\n|---|---|---|\n");
    let rows = rows(story, judgement, events, &course);
    let cut = rows.len().saturating_sub(ROWS_MAX);
    // The beginning and the end tell most.
    for (n, row) in rows.iter().enumerate() {
        if cut > 0 && (ROWS_MAX / 2..ROWS_MAX / 2 + cut).contains(&n) {
            if n == ROWS_MAX / 2 {
                let _ = writeln!(out, "| | {cut} rows left out | |");
            }
            continue;
        }
        let _ = writeln!(out, "| {} | {} | {} |", clock(row.at), cell(&row.what), row.evidence);
    }

    out.push_str("\n## Root cause\n\n");
    for (cause, hits) in causes.iter().zip(&judgement.hits) {
        let _ = writeln!(out, "- {} struck {hits} times: seen as {}.", cell(&cause.fault), cause.seen);
    }
    if let Story::Stream(story) = story
        && let Some(sabotage) = story.sabotage
    {
        let _ = writeln!(out, "- A defence was switched off: {sabotage:?}.");
    }
    if let Story::Stream(story) = story {
        for arrival in &story.workload.arrival {
            let (at, rate) = (clock(story.at(arrival.from_s)), arrival.per_minute);
            let _ = writeln!(out, "- Events of the type `{}` came from {at} on, {rate} a minute.", arrival.event_type);
        }
    }
    let _ = writeln!(out, "- Why it could happen: {OPEN}");

    out.push_str("\n## Impact\n\n");
    impact(&mut out, story, judgement);

    out.push_str("\n## Detection\n\n");
    let stream_incident = judgement.incident.as_ref().filter(|_| matches!(story, Story::Stream(_)));
    let by_people = stream_incident.filter(|i| i.detected_by.as_deref() == Some(PEOPLE)).and_then(|i| i.detected_at);
    match (began, detected, course.detected.and_then(|n| events.get(n))) {
        (Some(began), Some(detected), Some(event)) => {
            let kind = event.refs.get("kind").and_then(|k| k.as_str()).unwrap_or("an alert");
            let mttd = detected - began;
            let _ = writeln!(out, "- How: alert `{kind}` at {}, event #{}", clock(detected), event.ordinal);
            let _ = writeln!(out, "- MTTD: {}", spoken(mttd));
            let asked = match story {
                Story::Stream(story) => story.expect.detected_within_s.and_then(|s| i64::try_from(s).ok()),
                Story::Batch(_) | Story::Platform(_) => None,
            };
            let target = causes.iter().filter_map(|c| c.within_s).chain(asked).min();
            let good = target.map_or_else(
                || "within one run of the batch, as asked".to_owned(),
                |s| {
                    let met = if mttd.num_seconds() <= s { "yes" } else { "no" };
                    format!("{met}, the target is {}", spoken(Duration::seconds(s)))
                },
            );
            let _ = writeln!(out, "- Good enough: {good}");
        }
        (Some(began), ..) if by_people.is_some() => {
            let at = by_people.unwrap_or(began);
            let _ = writeln!(out, "- How: people noticed, at {}; no alert told", clock(at));
            let _ = writeln!(out, "- MTTD: {}", spoken(at - began));
            out.push_str("- Good enough: no\n");
        }
        (Some(began), ..) => {
            let _ = writeln!(out, "- How: nobody was told; the first sign is the event at {}", clock(began));
            out.push_str("- MTTD: never\n");
            let needed = judgement.verdict != "holds" || !judgement.broken.is_empty();
            let _ = writeln!(out, "- Good enough: {}", if needed { "no" } else { "the platform recovered by itself" });
        }
        (None, ..) => out.push_str("- Nothing went wrong in this run.\n"),
    }

    out.push_str("\n## Resolution\n\n");
    match (course.over, began) {
        (Some(over), Some(began)) => {
            let act = events.iter().find(|e| e.component == "operator" && e.time <= over);
            match act {
                Some(act) => {
                    let by = format!("`{}` at {}, event #{}", act.call, clock(act.time), act.ordinal);
                    let _ = writeln!(out, "- Over at {}, after an operator's {by}", clock(over));
                }
                None => {
                    let _ = writeln!(out, "- Over at {}, without a person", clock(over));
                }
            }
            let _ = writeln!(out, "- MTTR: {}", spoken(over - detected.or(by_people).unwrap_or(began)));
        }
        (Some(_), None) => out.push_str("- Nothing had to be resolved.\n"),
        (None, _) => out.push_str("- Not resolved in this run. MTTR: open\n"),
    }
    let dates = match story {
        Story::Batch(scenario) => {
            late(scenario, judgement).iter().map(|(fecha, _)| fecha.to_string()).collect::<Vec<_>>().join(", ")
        }
        Story::Stream(_) => String::new(),
        Story::Platform(_) => {
            let late = judgement.platform.iter().flat_map(|r| &r.late);
            late.map(ToString::to_string).collect::<Vec<_>>().join(", ")
        }
    };
    let _ = writeln!(out, "- Dates to backfill: {}", if dates.is_empty() { "none" } else { &dates });

    out.push_str("\n## Action items\n\n| action | owner | priority | due |\n|---|---|---|---|\n");
    let defences: BTreeSet<&str> = causes.iter().map(|cause| cause.defence).filter(|text| !text.is_empty()).collect();
    for defence in defences {
        let _ = writeln!(out, "| Check that this holds in production: {} | {OPEN} | {level} | {OPEN} |", cell(defence));
    }
    let _ = writeln!(out, "| Keep the run as a scenario: `{name}`, seed {seed} | {OPEN} | P3 | {OPEN} |");

    let _ = writeln!(out, "\n## Lessons\n\n- What went well: {OPEN}\n- What went wrong: {OPEN}\n- Where we were lucky: {OPEN}");
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;

    const MONDAY: &str = include_str!("../../scenarios/incidents/monday_0300_waiting.toml");

    fn event(ordinal: u64, second: i64, component: &str, call: &str, outcome: &str, refs: Value) -> Event {
        let time = "2024-03-18T03:00:00Z".parse::<DateTime<Utc>>().expect("a time") + Duration::seconds(second);
        Event { time, ordinal, component: component.into(), call: call.into(), outcome: outcome.into(), refs }
    }

    fn events() -> Vec<Event> {
        let away = |n, second| event(n, second, "table_source", "ping", "retryable econnrefused", json!({}));
        vec![
            event(1, 15, "ledger", "begin", "ok", json!({ "fecha": "2024-03-17" })),
            away(2, 16),
            event(3, 60, "notifier", "raise", "ok", json!({ "kind": "source_unavailable" })),
            away(4, 76),
            away(5, 136),
            event(6, 3_600, "table_source", "ping", "ok", json!({})),
        ]
    }

    fn judgement(published_s: Option<i64>) -> Judgement {
        let fecha = NaiveDate::from_ymd_opt(2024, 3, 17).expect("a day");
        let at = |s| "2024-03-18T03:00:00Z".parse::<DateTime<Utc>>().expect("a time") + Duration::seconds(s);
        let published: BTreeMap<_, _> = published_s.map(|s| (fecha, at(s))).into_iter().collect();
        let (alerts, hits) = (vec!["03-18 03:01:00 source_unavailable".to_owned()], vec![3]);
        Judgement { verdict: "holds".into(), published, alerts, hits, ..Judgement::default() }
    }

    #[test]
    fn every_heading_is_there_and_times_come_from_the_history() {
        let story = Story::parse(MONDAY).expect("a story");
        let text = markdown("m.toml", &story, 1, &judgement(Some(3_700)), &events());
        for heading in ["Timeline", "Root cause", "Impact", "Detection", "Resolution", "Action items", "Lessons"] {
            assert!(text.contains(&format!("\n## {heading}\n")), "no {heading}");
        }
        for fact in [
            "- Date: 2024-03-18",
            "- Severity: P2",
            "- Duration: 1 h 1 min",
            "- MTTD: 44 s",
            "- Good enough: yes, the target is 1 min 0 s",
            "- MTTR: 1 h 0 min",
            "| #4 to #5 |",
            "| #2 |",
            "Dates to backfill: none",
        ] {
            assert!(text.contains(fact), "no {fact:?} in\n{text}");
        }
    }

    #[test]
    fn a_day_that_was_missed_is_severe_and_named_for_a_backfill() {
        let story = Story::parse(MONDAY).expect("a story");
        let text = markdown("m.toml", &story, 1, &judgement(None), &events());
        for fact in ["- Severity: P1", "Dates to backfill: 2024-03-17", "MTTR: open", "| never |"] {
            assert!(text.contains(fact), "no {fact:?} in\n{text}");
        }
    }

    #[test]
    fn what_nobody_was_told_of_was_never_detected() {
        let story = Story::parse(MONDAY).expect("a story");
        let silent: Vec<Event> = events().into_iter().filter(|e| e.component != "notifier").collect();
        let text = markdown("m.toml", &story, 1, &judgement(Some(3_700)), &silent);
        assert!(text.contains("nobody was told") && text.contains("- MTTD: never"), "{text}");
    }
}
