//! The report of a run: one HTML file that needs nothing else, no network, no fonts, and for reading no script either.
//!
//! What went wrong comes first, then when things happened, then the figures, then the history. All text of scenarios and
//! histories is escaped by the template. It leaves out payloads, as the history does, and past [`EVENTS_MAX`] events
//! the store calls that nothing happened at.

mod stream_timeline;
mod timeline;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use chrono::NaiveDate;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_json::Value;
use simulacro_core::history::Event;

use crate::{
    faults::Fault,
    oracle::Sales,
    platform::{PlatformScenario, report::Struck},
    scenario::{Scenario, Verdict},
    stream::StreamScenario,
    summary::{Finished, repeat},
    world::Judgement,
};

/// Events that a report lists.
pub const EVENTS_MAX: usize = 2_000;
/// Lines of any other table.
const LINES_MAX: usize = 400;
/// Events on each side of one that went wrong which are always kept.
const AROUND: usize = 5;

const CSS: &str = include_str!("report/page.css");
const SCRIPT: &str = include_str!("report/page.js");
/// Even if an escape were forgotten, the page could load nothing.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:";

/// Whether a call went wrong. That an object is absent or already there is an answer, not a fault.
fn at_fault(event: &Event) -> bool {
    !matches!(event.outcome.as_str(), "ok" | "not_found" | "already_exists")
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "none".into(),
        other => other.to_string(),
    }
}

/// One reference of an event, or nothing.
fn refs(event: &Event, key: &str) -> String {
    event.refs.get(key).map(text).unwrap_or_default()
}

fn all_refs(event: &Event) -> String {
    let pairs = event.refs.as_object().into_iter().flatten();
    pairs.map(|(key, value)| format!("{key}={}", text(value))).collect::<Vec<_>>().join(" ")
}

/// A fault as its scenario writes it: the mode, then its parameters.
fn fault_text(fault: &Fault) -> String {
    described(fault)
}

/// A fault of either world as its story writes it: the mode, then its parameters.
pub(crate) fn described(fault: &(impl serde::Serialize + std::fmt::Debug)) -> String {
    let Ok(Value::Object(fields)) = serde_json::to_value(fault) else { return format!("{fault:?}") };
    let named = |key: &str| fields.get(key).map(text);
    let rest = fields.iter().filter(|(key, value)| !matches!(key.as_str(), "mode" | "kind") && !value.is_null());
    let rest = rest.map(|(key, value)| format!("{key} {}", text(value)));
    named("mode").into_iter().chain(named("kind")).chain(rest).collect::<Vec<_>>().join(", ")
}

/// Cents as `1,234.56`.
fn money(cents: i64) -> String {
    let whole = (cents / 100).unsigned_abs().to_string();
    let groups = whole.as_bytes().rchunks(3).rev().map(|digits| String::from_utf8_lossy(digits));
    let sign = if cents < 0 { "-" } else { "" };
    format!("{sign}{}.{:02}", groups.collect::<Vec<_>>().join(","), (cents % 100).abs())
}

/// A number with its noun, which takes an s.
fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// The last part of a scenario's path, without its ending.
fn stem(name: &str) -> &str {
    let file = name.rsplit(['/', '\\']).next().unwrap_or(name);
    file.strip_suffix(".toml").unwrap_or(file)
}

/// A verdict with a sign, so that it does not hang on colour, and what it means for this scenario.
fn verdict(verdict: &str, wants: Option<Verdict>) -> (&'static str, &'static str, &'static str) {
    match (verdict, wants) {
        ("holds", Some(Verdict::Caught)) => {
            ("good", "✓", "the defence is off, and the invariants noticed, as the scenario wants")
        }
        ("holds", _) => ("good", "✓", "everything that was promised came true"),
        ("inconclusive", _) => ("unsure", "?", "a fault struck too seldom, so the run proves nothing"),
        _ => ("bad", "✗", "something that was promised did not come true"),
    }
}

fn page(title: &str, body: &Markup) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                link rel="icon" href="data:,";
                title { (title) }
                style { (PreEscaped(CSS)) }
            }
            body { (body) script { (PreEscaped(SCRIPT)) } }
        }
    }
    .into_string()
}

/// The report of one run. `name` is the scenario's path as it is given to the command; `twin` is the same run without
/// its faults, if there was one.
pub fn html(
    name: &str,
    scenario: &Scenario,
    seed: u64,
    judgement: &Judgement,
    twin: Option<&Judgement>,
    events: &[Event],
) -> String {
    let kept = kept(events, EVENTS_MAX);
    let title = format!("{}: {}, seed {seed}", judgement.verdict, stem(name));
    let body = html! {
        a class="skip" href="#history" { "Skip to the history" }
        (header(name, scenario, seed, judgement))
        nav aria-label="Sections" {
            @for (id, text) in SECTIONS { a href={ "#" (id) } { (text) } }
        }
        main {
            (broken(judgement, events, &kept))
            section aria-labelledby="timeline" { h2 id="timeline" { "Timeline" } (timeline::timeline(scenario, judgement, events)) }
            section aria-labelledby="figures" { h2 id="figures" { "Figures" } (figures(judgement)) }
            section aria-labelledby="faults" { h2 id="faults" { "Faults" } (faults(scenario, judgement)) }
            section aria-labelledby="source" { h2 id="source" { "Source" } (attempts(judgement)) }
            section aria-labelledby="alerts" { h2 id="alerts" { "Alerts" } (alerts(scenario, judgement, events)) }
            section aria-labelledby="tables" { h2 id="tables" { "Tables" } (tables(scenario, judgement, twin)) }
            (history(events, &kept))
        }
        footer {
            p { "simulacro-sim " (env!("CARGO_PKG_VERSION")) ". A run is a function of its scenario and seed: the command above gives this page again." }
        }
    };
    page(&title, &body)
}

/// The report of a stream story.
pub fn stream_html(name: &str, story: &StreamScenario, seed: u64, judgement: &Judgement, events: &[Event]) -> String {
    let kept = kept(events, EVENTS_MAX);
    let title = format!("{}: {}, seed {seed}", judgement.verdict, stem(name));
    let (class, sign, meaning) = verdict(&judgement.verdict, Some(story.expect.verdict));
    let facts = [
        ("seed", seed.to_string()),
        ("begins", story.start.to_rfc3339()),
        ("workers", story.workers.to_string()),
        ("producers", story.workload.producers.to_string()),
        ("partitions", story.workload.partitions.to_string()),
        ("tier", story.tier.name().to_owned()),
    ];
    let body = html! {
        a class="skip" href="#history" { "Skip to the history" }
        header {
            p class={ "verdict " (class) } { span aria-hidden="true" { (sign) } " " strong { (judgement.verdict) } " " small { (meaning) } }
            h1 { (stem(name)) }
            p class="summary" { (story.summary) }
            dl class="facts" { @for (what, value) in facts { div { dt { (what) } dd { (value) } } } }
            p class="repeat" { span { "Repeat" } code id="repeat" { (repeat(name, seed)) } button id="copy" type="button" hidden { "Copy" } }
        }
        nav aria-label="Sections" {
            @for (id, text) in [("timeline", "Timeline"), ("figures", "Figures"), ("faults", "Faults"), ("topics", "Topics"), ("history", "History")] {
                a href={ "#" (id) } { (text) }
            }
        }
        main {
            (broken(judgement, events, &kept))
            section aria-labelledby="timeline" { h2 id="timeline" { "Timeline" } (stream_timeline::timeline(story, judgement, events)) }
            section aria-labelledby="figures" { h2 id="figures" { "Figures" } (stream_figures(judgement)) }
            section aria-labelledby="faults" { h2 id="faults" { "Faults" } (stream_faults(story, judgement)) }
            section aria-labelledby="topics" {
                h2 id="topics" { "Topics" }
                (table("Hash over all records of each topic", &["topic", "hash"], &html! {
                    @for (topic, hash) in &judgement.hashes { tr { th scope="row" { (topic) } td { code { (short(Some(hash))) } } } }
                }))
            }
            (history(events, &kept))
        }
        footer {
            p { "simulacro-sim " (env!("CARGO_PKG_VERSION")) ". A run is a function of its scenario and seed: the command above gives this page again." }
        }
    };
    page(&title, &body)
}

/// The page of a platform story.
pub fn platform_html(name: &str, story: &PlatformScenario, seed: u64, judgement: &Judgement, events: &[Event]) -> String {
    let kept = kept(events, EVENTS_MAX);
    let title = format!("{}: {}, seed {seed}", judgement.verdict, stem(name));
    let (class, sign, meaning) = verdict(&judgement.verdict, Some(story.expect.verdict));
    let facts = [
        ("seed", seed.to_string()),
        ("begins", story.start().to_rfc3339()),
        ("days", story.days.to_string()),
        ("models", story.models.clone()),
        ("tier", story.tier.name().to_owned()),
    ];
    let report = judgement.platform.as_ref();
    let faults = report.map(|r| r.faults.as_slice()).unwrap_or_default();
    let slos = report.map(|r| r.slos.as_slice()).unwrap_or_default();
    let outcome = |struck: &Struck| format!("{:?}", struck.outcome).to_lowercase();
    let delay = |struck: &Struck| struck.delay_ms.map_or_else(String::new, |ms| format!("{} s", ms / 1_000));
    let body = html! {
        a class="skip" href="#history" { "Skip to the history" }
        header {
            p class={ "verdict " (class) } { span aria-hidden="true" { (sign) } " " strong { (judgement.verdict) } " " small { (meaning) } }
            h1 { (stem(name)) }
            p class="summary" { (story.summary) }
            dl class="facts" { @for (what, value) in facts { div { dt { (what) } dd { (value) } } } }
            p class="repeat" { span { "Repeat" } code id="repeat" { (repeat(name, seed)) } button id="copy" type="button" hidden { "Copy" } }
        }
        nav aria-label="Sections" {
            @for (id, text) in [("objectives", "Objectives"), ("faults", "Faults"), ("alerts", "Alerts"), ("history", "History")] {
                a href={ "#" (id) } { (text) }
            }
        }
        main {
            (broken(judgement, events, &kept))
            section aria-labelledby="objectives" {
                h2 id="objectives" { "Objectives" }
                (table("Over the whole story", &["objective", "target", "attained", "good", "all", "spent", "budget"], &html! {
                    @for slo in slos {
                        tr {
                            th scope="row" { (slo.name) }
                            td { (slo.target) } td { (slo.attained.as_deref().unwrap_or("no data")) }
                            td { (slo.good) } td { (slo.total) } td { (slo.spent) } td { (slo.may) }
                        }
                    }
                }))
            }
            section aria-labelledby="faults" {
                h2 id="faults" { "Faults" }
                (table("In order of their beginning", &["fault", "from", "to", "struck", "outcome", "alert", "after"], &html! {
                    @for struck in faults {
                        tr {
                            th scope="row" { (struck.entry().name) }
                            td { (struck.from.format("%m-%d %H:%M:%S")) } td { (struck.over.format("%m-%d %H:%M:%S")) }
                            td { (struck.hits) } td { (outcome(struck)) }
                            td { (struck.alert.as_deref().unwrap_or_default()) } td { (delay(struck)) }
                        }
                    }
                }))
            }
            section aria-labelledby="alerts" {
                h2 id="alerts" { "Alerts" }
                ol { @for alert in &judgement.alerts { li { (alert) } } }
            }
            (history(events, &kept))
        }
        footer {
            p { "simulacro-sim " (env!("CARGO_PKG_VERSION")) ". A run is a function of its scenario and seed: the command above gives this page again." }
        }
    };
    page(&title, &body)
}

/// The report of a run of somebody's own pipeline. `repeat` is the command that gives this run again.
pub fn own_html(
    name: &str,
    story: &crate::harness::Story,
    seed: u64,
    judgement: &Judgement,
    events: &[Event],
    repeat: &str,
) -> String {
    let kept = kept(events, EVENTS_MAX);
    let (class, sign, meaning) = verdict(&judgement.verdict, Some(Verdict::Holds));
    let faults = story.fault.iter().map(described);
    let faults = faults.chain(story.own.iter().filter(|(_, value)| **value > 0).map(|(name, value)| format!("{name} {value}")));
    let body = html! {
        a class="skip" href="#history" { "Skip to the history" }
        header {
            p class={ "verdict " (class) } { span aria-hidden="true" { (sign) } " " strong { (judgement.verdict) } " " small { (meaning) } }
            h1 { (name) }
            p class="summary" { (story.summary) }
            dl class="facts" {
                @for (what, value) in [("seed", seed.to_string()), ("begins", story.start.to_rfc3339()), ("workers", story.workers.to_string()), ("producers", story.producers.to_string())] {
                    div { dt { (what) } dd { (value) } }
                }
            }
            p class="repeat" { span { "Repeat" } code id="repeat" { (repeat) } button id="copy" type="button" hidden { "Copy" } }
        }
        nav aria-label="Sections" {
            @for (id, text) in [("faults", "Faults"), ("topics", "Topics"), ("history", "History")] { a href={ "#" (id) } { (text) } }
        }
        main {
            (broken(judgement, events, &kept))
            section aria-labelledby="faults" {
                h2 id="faults" { "Faults" }
                (table("Faults, those of the pipeline's own last", &["fault", "hits"], &html! {
                    @for (fault, hits) in faults.zip(&judgement.hits).take(LINES_MAX) { tr { th scope="row" { (fault) } td class="number" { (hits) } } }
                }))
            }
            section aria-labelledby="topics" {
                h2 id="topics" { "Topics" }
                (table("Hash over all records of each topic", &["topic", "hash"], &html! {
                    @for (topic, hash) in &judgement.hashes { tr { th scope="row" { (topic) } td { code { (short(Some(hash))) } } } }
                }))
            }
            (history(events, &kept))
        }
    };
    page(&format!("{}: {name}, seed {seed}", judgement.verdict), &body)
}

/// The first characters of a hash.
fn short(hash: Option<&String>) -> String {
    hash.map_or("–".to_owned(), |h| h.chars().take(16).collect())
}

fn stream_figures(judgement: &Judgement) -> Markup {
    let Some(figures) = &judgement.stream else { return empty("None were taken.") };
    let reasons = figures.reasons.iter().map(|(code, count)| (format!("gave up with {code}"), *count));
    let rows = figures.totals().into_iter().map(|(name, value)| (name.to_owned(), value)).chain(reasons);
    let body = html! {
        @for (name, value) in rows { tr { th scope="row" { (name) } td class="number" { (value) } } }
        tr { th scope="row" { "records behind, at most" } td class="number" { (figures.lag_max) } }
        tr { th scope="row" { "seconds from the last fault until all was done" } td class="number" {
            (figures.drained_after_s.map_or("never".to_owned(), |s| s.to_string()))
        } }
    };
    table("What happened, in figures", &["what", "hits"], &body)
}

fn stream_faults(story: &StreamScenario, judgement: &Judgement) -> Markup {
    if story.fault.is_empty() {
        return empty("The scenario has none.");
    }
    let wanted = story.expect.fired_min;
    let body = html! {
        @for (n, fault) in story.fault.iter().enumerate().take(LINES_MAX) {
            @let hits = judgement.hits.get(n).copied().unwrap_or(0);
            tr class=(if hits < wanted { "bad" } else { "" }) {
                th scope="row" { (n + 1) } td class="prose" { (described(fault)) } td class="number" { (hits) }
                td class="state" { (if hits < wanted { "too seldom" } else { "struck" }) }
            }
        }
    };
    let caption = format!("Faults; each must strike at least {}", count(wanted as usize, "time"));
    html! { (table(&caption, &["no.", "fault", "hits", "state"], &body)) (left_out(story.fault.len(), "faults")) }
}

const SECTIONS: [(&str, &str); 7] = [
    ("timeline", "Timeline"),
    ("figures", "Figures"),
    ("faults", "Faults"),
    ("source", "Source"),
    ("alerts", "Alerts"),
    ("tables", "Tables"),
    ("history", "History"),
];

fn header(name: &str, scenario: &Scenario, seed: u64, judgement: &Judgement) -> Markup {
    let (class, sign, meaning) = verdict(&judgement.verdict, Some(scenario.expect.verdict));
    let fechas = scenario.fechas();
    let (first, last) = (fechas.first().copied().unwrap_or(scenario.fecha), fechas.last().copied().unwrap_or(scenario.fecha));
    let days = if first == last { first.to_string() } else { format!("{first} to {last}") };
    let published = match judgement.published.iter().next() {
        Some((fecha, at)) if scenario.days == 1 => {
            let minutes = (scenario.sla(*fecha) - *at).num_minutes();
            let side = if *at > scenario.sla(*fecha) { "after" } else { "before" };
            format!("{}, {} {side} the SLA", at.format("%H:%M:%S"), count(minutes.unsigned_abs() as usize, "minute"))
        }
        _ => format!("{} of {}", judgement.published.len(), count(scenario.days as usize, "day")),
    };
    let facts = [
        ("seed", seed.to_string()),
        ("day", days),
        ("runs a day", scenario.runs.to_string()),
        ("schedule", scenario.schedule.to_string()),
        ("SLA", scenario.sla.to_string()),
        ("published", published),
        ("store calls", judgement.store_calls.to_string()),
        ("tier", scenario.tier.name().to_owned()),
    ];
    html! {
        header {
            p class={ "verdict " (class) } { span aria-hidden="true" { (sign) } " " strong { (judgement.verdict) } " " small { (meaning) } }
            h1 { (stem(name)) }
            p class="summary" { (scenario.summary) }
            dl class="facts" { @for (what, value) in facts { div { dt { (what) } dd { (value) } } } }
            p class="repeat" { span { "Repeat" } code id="repeat" { (repeat(name, seed)) } button id="copy" type="button" hidden { "Copy" } }
        }
    }
}

/// The problems, or what a `caught` scenario wanted to see broken.
fn broken(judgement: &Judgement, events: &[Event], kept: &BTreeSet<usize>) -> Markup {
    let holds = judgement.verdict == "holds";
    let lines = if holds || judgement.problems.is_empty() { &judgement.broken } else { &judgement.problems };
    let first = events.iter().enumerate().find(|(index, event)| kept.contains(index) && at_fault(event));
    html! {
        @if !holds || !lines.is_empty() {
            section aria-labelledby="broken" class={ "broken " (if holds { "wanted" } else { "" }) } {
                h2 id="broken" { (if holds { "Broken, as the scenario wants" } else { "What broke" }) }
                ul {
                    @for line in lines.iter().take(LINES_MAX) {
                        @let (name, rest) = line.split_once(": ").unwrap_or(("", line));
                        li { @if !name.is_empty() { strong { (name) } " " } (rest) }
                    }
                }
                (left_out(lines.len(), "problems"))
                @if judgement.verdict == "inconclusive" { p { "The " a href="#faults" { "faults" } " show how often each one struck." } }
                @if let Some((index, event)) = first {
                    p {
                        "First call that went wrong: " a href={ "#e" (index) } { (event.time.format("%m-%d %H:%M:%S%.3f")) " " (event.component) " " (event.call) }
                        ", " (event.outcome) "."
                    }
                }
            }
        }
    }
}

fn left_out(total: usize, what: &str) -> Markup {
    html! { @if total > LINES_MAX { p class="left" { "Left out: " (total - LINES_MAX) " more " (what) "." } } }
}

fn empty(what: &str) -> Markup {
    html! { p class="none" { (what) } }
}

fn table(caption: &str, heads: &[&str], body: &Markup) -> Markup {
    let numbers = ["revenue", "sales", "customers", "hits", "tries", "alerts", "wall time"];
    let class = |head: &str| numbers.iter().any(|n| head.ends_with(n)).then_some("number");
    html! {
        div class="scroll" role="region" aria-label=(caption) tabindex="0" {
            table { caption { (caption) } thead { tr { @for head in heads { th scope="col" class=[class(head)] { (head) } } } } tbody { (body) } }
        }
    }
}

/// What the oracle expected against what was there, differences first.
fn figures(judgement: &Judgement) -> Markup {
    type Pair<'a> = (Option<&'a Sales>, Option<&'a Sales>);
    let mut pairs: BTreeMap<(NaiveDate, &str), Pair<'_>> = BTreeMap::new();
    for line in &judgement.expected {
        pairs.entry((line.fecha, &line.region)).or_default().0 = Some(&line.sales);
    }
    for line in &judgement.mart {
        pairs.entry((line.fecha, &line.region)).or_default().1 = Some(&line.sales);
    }
    if pairs.is_empty() {
        return empty("The oracle expects no rows, and there are none.");
    }
    let state = |fecha: &NaiveDate, (expected, found): &Pair<'_>| match (expected, found) {
        (Some(a), Some(b)) if a == b => (2, "", "equal"),
        (Some(_), None) if !judgement.published.contains_key(fecha) => (1, "unsure", "not published"),
        (Some(_), None) => (0, "bad", "missing"),
        (None, _) => (0, "bad", "not expected"),
        (Some(_), Some(_)) => (0, "bad", "differs"),
    };
    let mut rows: Vec<_> = pairs.iter().map(|((fecha, region), pair)| (state(fecha, pair), *fecha, *region, *pair)).collect();
    rows.sort_by_key(|(state, fecha, region, _)| (state.0, *fecha, *region));
    let count = |text: &str| rows.iter().filter(|r| r.0.2 == text).count();
    let caption = format!(
        "Mart against oracle: {} equal, {} not published, {} wrong",
        count("equal"),
        count("not published"),
        rows.iter().filter(|r| r.0.0 == 0).count()
    );
    let cells = |sales: Option<&Sales>| {
        let texts = sales.map(|s| [money(s.revenue_cents), s.transacciones.to_string(), s.usuarios_unicos.to_string()]);
        html! { @for text in texts.unwrap_or_else(|| ["–".into(), "–".into(), "–".into()]) { td class="number" { (text) } } }
    };
    let body = html! {
        @for ((_, class, state), fecha, region, (expected, found)) in rows.iter().take(LINES_MAX) {
            tr class=(class) { th scope="row" { (fecha) } td { (region) } (cells(*expected)) (cells(*found)) td class="state" { (state) } }
        }
    };
    let heads = [
        "day",
        "region",
        "oracle revenue",
        "oracle sales",
        "oracle customers",
        "mart revenue",
        "mart sales",
        "mart customers",
        "state",
    ];
    html! { (table(&caption, &heads, &body)) (left_out(rows.len(), "lines")) }
}

fn faults(scenario: &Scenario, judgement: &Judgement) -> Markup {
    if scenario.fault.is_empty() {
        return empty("The scenario has none.");
    }
    let wanted = scenario.expect.fired_min;
    let body = html! {
        @for (n, fault) in scenario.fault.iter().enumerate().take(LINES_MAX) {
            @let hits = judgement.hits.get(n).copied().unwrap_or(0);
            tr class=(if hits < wanted { "bad" } else { "" }) {
                th scope="row" { (n + 1) } td class="prose" { (fault_text(fault)) } td class="number" { (hits) }
                td class="state" { (if hits < wanted { "too seldom" } else { "struck" }) }
            }
        }
    };
    let caption = format!("Faults; each must strike at least {}", count(wanted as usize, "time"));
    html! { (table(&caption, &["no.", "fault", "hits", "state"], &body)) (left_out(scenario.fault.len(), "faults")) }
}

/// Tries to reach the source; neighbours with the same outcome share a line.
fn attempts(judgement: &Judgement) -> Markup {
    if judgement.attempts.is_empty() {
        return empty("No try to reach the source is recorded.");
    }
    let mut groups: Vec<(&str, &str, &str, usize)> = Vec::new();
    for attempt in &judgement.attempts {
        let (at, outcome) = attempt.split_once(' ').unwrap_or(("", attempt));
        match groups.last_mut().filter(|group| group.2 == outcome) {
            Some(group) => (group.1, group.3) = (at, group.3 + 1),
            None => groups.push((at, at, outcome, 1)),
        }
    }
    let body = html! {
        @for (from, to, outcome, count) in groups.iter().take(LINES_MAX) {
            tr class=(if *outcome == "ok" { "" } else { "bad" }) {
                th scope="row" { (from) @if from != to { " to " (to) } } td class="number" { (count) } td class="state" { (outcome) }
            }
        }
    };
    let caption = format!("Tries to reach the source: {}", judgement.attempts.len());
    html! { (table(&caption, &["time", "tries", "outcome"], &body)) (left_out(groups.len(), "groups of tries")) }
}

fn alerts(scenario: &Scenario, judgement: &Judgement, events: &[Event]) -> Markup {
    let wanted = &scenario.expect.alerts;
    let told = match wanted {
        None => "nothing in particular; alerts are not judged".to_owned(),
        Some(none) if none.is_empty() => "none".to_owned(),
        Some(kinds) => kinds.join(", "),
    };
    let wants = html! { p { "Expected, in this order: " (told) "." } };
    if judgement.alerts.is_empty() {
        return html! { (empty("None was raised.")) (wants) };
    }
    let raised: Vec<&Event> = events.iter().filter(|e| e.component == "notifier" && e.call == "raise").collect();
    let summary = |alert: &str| {
        let same = raised.iter().find(|e| format!("{} {}", e.time.format("%m-%d %H:%M:%S"), refs(e, "kind")) == alert);
        same.map(|e| refs(e, "summary")).unwrap_or_default()
    };
    let kind = |alert: &str| alert.rsplit(' ').next().unwrap_or_default().to_owned();
    let body = html! {
        @for (n, alert) in judgement.alerts.iter().enumerate().take(LINES_MAX) {
            @let good = wanted.as_ref().is_none_or(|wanted| wanted.get(n).is_some_and(|w| *w == kind(alert)));
            tr class=(if good { "" } else { "bad" }) {
                th scope="row" { (alert.strip_suffix(&kind(alert)).unwrap_or(alert)) } td { (kind(alert)) } td class="prose" { (summary(alert)) }
                td class="state" { (if good { "expected" } else { "not expected" }) }
            }
        }
    };
    let caption = format!("Alerts raised: {}", judgement.alerts.len());
    html! { (table(&caption, &["time", "kind", "says", "state"], &body)) (left_out(judgement.alerts.len(), "alerts")) (wants) }
}

fn tables(scenario: &Scenario, judgement: &Judgement, twin: Option<&Judgement>) -> Markup {
    let names: BTreeSet<&String> = judgement.hashes.keys().chain(twin.into_iter().flat_map(|t| t.hashes.keys())).collect();
    let note = match (twin, scenario.expect.converges) {
        (None, false) => "The scenario does not ask for the same tables as without its faults.",
        (None, true) => "There was no run without faults to compare with.",
        (Some(_), _) => "The twin is the same story and seed without its faults.",
    };
    if names.is_empty() {
        return html! { (empty("There are no tables at the end.")) p { (note) } };
    }
    let body = html! {
        @for name in names.iter().take(LINES_MAX) {
            @let here = judgement.hashes.get(*name);
            @let there = twin.map(|t| t.hashes.get(*name));
            @let same = there.is_none_or(|there| there == here);
            tr class=(if same { "" } else { "bad" }) {
                th scope="row" { (name) } td { code { (short(here)) } } td { code { (short(there.flatten())) } }
                td class="state" { (match (there, same) { (None, _) => "not compared", (Some(_), true) => "equal", (Some(_), false) => "differs" }) }
            }
        }
    };
    html! {
        (table("Canonical hashes, first characters", &["table", "this run", "twin", "state"], &body)) (left_out(names.len(), "tables"))
        p { (note) " Hash of all objects of the store: " code { (short(Some(&judgement.store_digest))) } "." }
    }
}

/// The events that a report lists, by position: all, or if there are more than `most`, those that are not calls to the
/// object store and those around a failure; if even they are too many, the first and the last of them.
fn kept(events: &[Event], most: usize) -> BTreeSet<usize> {
    if events.len() <= most {
        return (0..events.len()).collect();
    }
    let mut near = BTreeSet::new();
    for (index, _) in events.iter().enumerate().filter(|(_, event)| at_fault(event)) {
        near.extend(index.saturating_sub(AROUND)..(index + AROUND + 1).min(events.len()));
    }
    let all: Vec<usize> =
        events.iter().enumerate().filter(|(i, e)| e.component != "object_store" || near.contains(i)).map(|(i, _)| i).collect();
    if all.len() <= most {
        return all.into_iter().collect();
    }
    all.iter().take(most / 2).chain(all.iter().skip(all.len() - (most - most / 2))).copied().collect()
}

fn history(events: &[Event], kept: &BTreeSet<usize>) -> Markup {
    let shown: Vec<(usize, &Event)> = events.iter().enumerate().filter(|(index, _)| kept.contains(index)).collect();
    let mut components: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, event) in &shown {
        *components.entry(&event.component).or_default() += 1;
    }
    let missing = events.len() - shown.len();
    html! {
        section aria-labelledby="history" {
            h2 id="history" { "History" }
            p {
                (events.len()) " calls to the world outside, in order."
                @if missing > 0 { strong class="left" { " " (missing) " of them are left out here, most of them calls to the object store far from any failure; the history file has them all." } }
            }
            form id="controls" role="search" aria-label="Filter the history" hidden {
                label { "Filter " input id="filter" type="search" autocomplete="off" spellcheck="false" placeholder="words, all must occur"; }
                label { input id="wrong" type="checkbox"; " only what went wrong" }
                fieldset {
                    legend { "Components" }
                    @for (component, count) in &components {
                        label { input type="checkbox" name="component" value=(component) checked; " " (component) " (" (count) ")" }
                    }
                }
                p { span id="status" role="status" {} " " button type="button" id="keys" { "Keys: j k / ?" } }
            }
            table id="events" {
                caption { "Time of the answer in UTC, component and call, outcome, references" }
                thead { tr { th scope="col" { "time" } th scope="col" { "call" } th scope="col" { "outcome" } th scope="col" { "references" } } }
                tbody {
                    @for (index, event) in shown {
                        tr id={ "e" (index) } class=(if at_fault(event) { "bad" } else { "" }) data-c=(event.component) {
                            td { time datetime=(event.time.to_rfc3339()) { (event.time.format("%m-%d %H:%M:%S%.3f")) } }
                            td { (event.component) " " b { (event.call) } }
                            td class="state" { (event.outcome) }
                            td class="refs" { (all_refs(event)) }
                        }
                    }
                }
            }
            dialog id="help" aria-labelledby="help-title" {
                h3 id="help-title" { "Keys" }
                dl {
                    @for (key, what) in KEYS { div { dt { kbd { (key) } } dd { (what) } } }
                }
                form method="dialog" { button { "Close" } }
            }
        }
    }
}

const KEYS: [(&str, &str); 6] = [
    ("j or ↓", "next event"),
    ("k or ↑", "previous event"),
    ("Home, End", "first and last event, while one is marked"),
    ("/", "filter"),
    ("Esc", "clear the filter, leave the list"),
    ("?", "this help"),
];

/// The table of contents of a folder of reports: what did not hold first. `link` names the file of a run.
pub fn index(finished: &[Finished], link: impl Fn(&Finished) -> String) -> String {
    let mut all: Vec<&Finished> = finished.iter().collect();
    all.sort_by_key(|f| (f.judgement.verdict == "holds", f.name.clone(), f.seed));
    let good = all.iter().filter(|f| f.judgement.verdict == "holds").count();
    let bad = all.len() - good;
    let overall = if bad == 0 { "holds" } else { "violated" };
    let (class, sign, _) = verdict(overall, None);
    let wall: Duration = all.iter().map(|f| f.wall).sum();
    let rows = html! {
        @for f in &all {
            @let (class, sign, _) = verdict(&f.judgement.verdict, None);
            tr class=(class) {
                td class="state" { span aria-hidden="true" { (sign) } " " (f.judgement.verdict) }
                th scope="row" { a href=(link(f)) { (stem(&f.name)) " seed " (f.seed) } }
                td class="prose" { (f.summary) @if let Some(problem) = f.judgement.problems.first() { br; strong { (problem) } } }
                td class="number" { (f.judgement.alerts.len()) }
                td class="number" { (format!("{:.1} s", f.wall.as_secs_f64())) }
            }
        }
    };
    let body = html! {
        header {
            p class={ "verdict " (class) } { span aria-hidden="true" { (sign) } " " strong { (good) " hold" } ", " (bad) " do not" }
            h1 { "Simulator runs" }
            p class="summary" { (all.len()) " runs in " (format!("{:.1}", wall.as_secs_f64())) " s of wall time, counted one after the other." }
        }
        main { section { (table("Runs", &["verdict", "run", "story", "alerts", "wall time"], &rows)) } }
    };
    page("Simulator runs", &body)
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, TimeDelta};
    use serde_json::json;

    use super::*;

    const GOOD: &str = include_str!("../../scenarios/incidents/monday_0300_waiting.toml");
    const NAME: &str = "scenarios/incidents/monday_0300_waiting.toml";
    const ATTACK: &str = "</title></script><script>alert('x')</script><img src=x onerror=\"alert(1)\">";

    fn scenario() -> Scenario {
        Scenario::parse(GOOD).expect("a scenario")
    }

    fn event(n: usize, component: &str, call: &str, outcome: &str, refs: Value) -> Event {
        let start = "2024-03-18T03:00:15Z".parse::<DateTime<chrono::Utc>>().expect("a time");
        let (component, call, outcome) = (component.into(), call.into(), outcome.into());
        Event { time: start + TimeDelta::seconds(n as i64), ordinal: n as u64, component, call, outcome, refs }
    }

    fn events() -> Vec<Event> {
        let day = json!({ "fecha": "2024-03-17", "epoch": 1 });
        vec![
            event(0, "ledger", "begin", "ok", day),
            event(1, "table_source", "ping", "retryable econnrefused", json!({})),
            event(
                45,
                "notifier",
                "raise",
                "ok",
                json!({ "kind": "source_unavailable", "summary": "the source does not answer" }),
            ),
            event(60, "object_store", "get", "not_found", json!({ "path": "staging/_delta_log" })),
            event(61, "lakehouse", "overwrite_day", "ok", json!({ "table": "staging/ventas", "version": 0 })),
            event(62, "ledger", "finish", "ok", json!({ "fecha": "2024-03-17", "epoch": 1, "state": "succeeded" })),
        ]
    }

    fn judgement(verdict: &str) -> Judgement {
        let line = |region: &str, revenue_cents| crate::world::Line {
            fecha: scenario().fecha,
            region: region.into(),
            sales: Sales { revenue_cents, transacciones: 2, usuarios_unicos: 1 },
        };
        Judgement {
            verdict: verdict.into(),
            problems: Vec::new(),
            broken: Vec::new(),
            expected: vec![line("norte", 123_456), line("sur", 700)],
            mart: vec![line("norte", 123_456), line("sur", 701)],
            attempts: vec!["03:00:16 ECONNREFUSED".into(), "03:01:17 ECONNREFUSED".into(), "03:02:18 ok".into()],
            alerts: vec!["03-18 03:01:00 source_unavailable".into()],
            published: [(scenario().fecha, scenario().sla(scenario().fecha) - TimeDelta::hours(1))].into(),
            hits: vec![2],
            hashes: [("marts/metricas_diarias".to_owned(), "aa".repeat(32))].into(),
            store_digest: "bb".repeat(32),
            store_calls: 6,
            draws: 0,
            stream: None,
            platform: None,
            incident: None,
            without: None,
            recovered: Vec::new(),
        }
    }

    /// Every tag is closed by its own name, and no attribute is left open.
    fn check_well_formed(html: &str) {
        const VOID: [&str; 5] = ["meta", "link", "input", "br", "img"];
        let (mut open, mut rest) = (Vec::new(), html);
        while let Some(at) = rest.find('<') {
            rest = &rest[at + 1..];
            let (mut end, mut quoted) = (None, false);
            for (position, c) in rest.char_indices() {
                match c {
                    '"' => quoted = !quoted,
                    '>' if !quoted => {
                        end = Some(position);
                        break;
                    }
                    '<' if !quoted => panic!("a tag in a tag: <{}", &rest[..position]),
                    _ => {}
                }
            }
            let tag = &rest[..end.unwrap_or_else(|| panic!("an open tag: <{rest}"))];
            rest = &rest[tag.len() + 1..];
            let name = tag.split([' ', '/']).find(|part| !part.is_empty()).unwrap_or_default();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "in {tag}");
            } else if !tag.starts_with('!') && !VOID.contains(&name) {
                open.push(name);
                if matches!(name, "script" | "style") {
                    let end = format!("</{name}>");
                    rest = &rest[rest.find(&end).unwrap_or_else(|| panic!("{name} has no end"))..];
                }
            }
        }
        assert!(open.is_empty(), "never closed: {open:?}");
    }

    #[test]
    fn every_tag_is_closed() {
        for verdict in ["holds", "violated", "inconclusive"] {
            check_well_formed(&html(NAME, &scenario(), 7, &judgement(verdict), Some(&judgement("holds")), &events()));
            check_well_formed(&html(NAME, &scenario().twin(), 7, &judgement(verdict), None, &[]));
        }
    }

    #[test]
    #[should_panic(expected = "in /p")]
    fn the_check_for_closed_tags_sees_an_open_one() {
        check_well_formed("<p><b>text</p>");
    }

    #[test]
    fn text_from_outside_stays_text() {
        let (mut story, mut seen, mut calls) = (scenario(), judgement("violated"), events());
        let plain = html(NAME, &story, 7, &seen, None, &calls);
        story.summary = ATTACK.into();
        story.fault.push(Fault::RenamedColumn { from: ATTACK.into(), to: ATTACK.into() });
        story.expect.alerts = Some(vec![ATTACK.into()]);
        seen.problems = vec![format!("invariant {ATTACK}: {ATTACK}")];
        seen.attempts.push(format!("03:00:00 {ATTACK}"));
        seen.alerts.push(format!("03-18 03:00:00 {ATTACK}"));
        seen.hashes.insert(ATTACK.into(), ATTACK.into());
        seen.mart[0].region = ATTACK.into();
        for call in &mut calls {
            call.outcome = ATTACK.into();
            call.refs = json!({ ATTACK: ATTACK, "table": ATTACK, "kind": ATTACK, "fecha": ATTACK, "state": ATTACK });
        }
        calls.push(event(70, ATTACK, ATTACK, ATTACK, json!({})));
        let page = html(ATTACK, &story, 7, &seen, None, &calls);
        check_well_formed(&page);
        assert_eq!(page.matches("<script").count(), 1);
        assert!(!page.contains("<img"));
        assert_eq!(page.matches("</title></head>").count() + page.matches("</style></head>").count(), 1);
        assert!(page.contains("&lt;script&gt;") && !plain.contains("&lt;script&gt;"));
        let listed = index(
            &[Finished { name: ATTACK.into(), summary: ATTACK.into(), seed: 1, judgement: seen, wall: Duration::ZERO }],
            |_| "page.html".into(),
        );
        check_well_formed(&listed);
        assert!(!listed.contains("<img"));
    }

    #[test]
    fn nothing_is_loaded_from_anywhere() {
        let page = html(NAME, &scenario(), 7, &judgement("violated"), None, &events());
        for address in ["http://", "https://", "url(", "@import", "src=", "\"//"] {
            assert!(!page.contains(address), "{address}");
        }
        for target in page.split("href=\"").skip(1) {
            assert!(target.starts_with('#') || target.starts_with("data:,"), "{}", &target[..20.min(target.len())]);
        }
    }

    #[test]
    fn what_broke_comes_before_all_figures() {
        let mut seen = judgement("violated");
        seen.problems = vec!["invariant money_exact: mart at sur".into()];
        let page = html(NAME, &scenario(), 7, &seen, None, &events());
        let at = |text: &str| page.find(text).unwrap_or_else(|| panic!("no {text}"));
        assert!(at("<strong>invariant money_exact</strong>") < at("id=\"timeline\""));
        assert!(at("simulacro-sim run scenarios/incidents/monday_0300_waiting.toml --seed 7") < at("id=\"timeline\""));
        assert!(at("1 equal, 0 not published, 1 wrong") < at("id=\"faults\""));
        // The first difference stands above what is equal.
        assert!(at("7.01") < at("1,234.56"));
        assert!(!html(NAME, &scenario(), 7, &judgement("holds"), None, &events()).contains("What broke"));
    }

    #[test]
    fn each_event_of_a_small_history_is_listed_without_a_script() {
        let page = html(NAME, &scenario(), 7, &judgement("holds"), None, &events());
        for index in 0..events().len() {
            assert!(page.contains(&format!("<tr id=\"e{index}\"")), "event {index}");
        }
        assert!(!page.contains("left out here"));
    }

    #[test]
    fn a_long_history_keeps_other_ports_and_failures_and_says_what_it_lost() {
        let mut calls: Vec<Event> = (0..5_000).map(|n| event(n, "object_store", "get", "ok", json!({ "path": "a" }))).collect();
        calls[3_000].outcome = "error".into();
        calls[10] = event(10, "ledger", "runs", "ok", json!({}));
        let kept = kept(&calls, EVENTS_MAX);
        assert_eq!(kept, [10].into_iter().chain(2_995..=3_005).collect());
        let page = html(NAME, &scenario(), 7, &judgement("holds"), None, &calls);
        assert!(page.contains("4988 of them are left out here"));
        for call in &mut calls {
            call.component = "ledger".into();
        }
        let page = html(NAME, &scenario(), 7, &judgement("holds"), None, &calls);
        assert_eq!(page.matches("<tr id=\"e").count(), EVENTS_MAX);
        assert!(page.len() < 1_500_000, "{} bytes", page.len());
    }

    #[test]
    fn money_has_groups_and_two_decimals() {
        for (cents, text) in [(0, "0.00"), (5, "0.05"), (123_456_789, "1,234,567.89"), (-150, "-1.50"), (-5, "-0.05")] {
            assert_eq!(money(cents), text);
        }
    }
}
