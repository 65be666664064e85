//! The timeline of a stream story: lag and age of the windows over virtual time, and below them faults, workers, alerts and
//! calls that went wrong, on the same axis. Where state has a cost, the time of a commit and the state are beside the lag.
//!
//! The curves are what the monitor saw, at its pace; between two looks they are straight. Left out: partitions, which share
//! one curve, and whether a partition was assigned, which the history tells by member and not by process.

use std::collections::BTreeMap;

use chrono::{DateTime, Duration, Utc};
use maud::{Markup, html};
use simulacro_core::history::Event;

use super::{
    count, refs,
    timeline::{Bar, Lane, Mark, Tone, View, clock, draw, mark},
};
use crate::{
    stream::{
        StreamScenario,
        faults::{StreamFault, When},
    },
    world::Judgement,
};

/// Lanes for faults; a story with more says so in its table.
const FAULTS_MAX: usize = 12;
/// Height of a curve, in CSS pixels.
const CURVE: usize = 76;
/// Width of the curves' own coordinates.
const WIDTH: f64 = 1_000.0;

/// A number over time.
struct Curve {
    name: &'static str,
    unit: &'static str,
    points: Vec<(DateTime<Utc>, i64)>,
}

fn curves(events: &[Event]) -> Vec<Curve> {
    let looks = || events.iter().filter(|e| e.component == "monitor");
    let number = |event: &Event, key: &str| event.refs.get(key).and_then(serde_json::Value::as_i64);
    let of = |key: &str| looks().filter_map(|e| Some((e.time, number(e, key)?))).collect::<Vec<_>>();
    let age = looks().filter_map(|e| Some((e.time, (e.time.timestamp_millis() - number(e, "closed_ms")?) / 1_000))).collect();
    let mut curves = vec![Curve { name: "records that wait", unit: "records", points: of("lag_records") }];
    for (name, unit, key) in [("time of the longest of the newest commits", "ms", "commit_ms"), ("state", "MB", "state_mb")] {
        let points = of(key);
        if !points.is_empty() {
            curves.push(Curve { name, unit, points });
        }
    }
    curves.push(Curve { name: "age of the newest closed windows", unit: "s", points: age });
    curves
}

fn draw_curve(curve: &Curve, view: View) -> Markup {
    let points: Vec<_> = curve.points.iter().filter(|(at, _)| view.shows(*at)).collect();
    let most = points.iter().map(|(_, value)| *value).max().unwrap_or(0);
    let top = most.max(1) as f64;
    let line: Vec<String> = points
        .iter()
        .map(|(at, value)| {
            let down = CURVE as f64 - 4.0 - (*value).max(0) as f64 / top * (CURVE as f64 - 8.0);
            format!("{:.1},{down:.1}", view.x(*at) / 100.0 * WIDTH)
        })
        .collect();
    let says = match points.iter().max_by_key(|(_, value)| *value) {
        Some((at, value)) => format!("{}: up to {value} {}, at {}", curve.name, curve.unit, clock(*at)),
        None => format!("{}: never seen", curve.name),
    };
    html! {
        figure class="curve" {
            figcaption { (says) }
            svg role="img" aria-label=(says) width="100%" height=(CURVE) viewBox=(format!("0 0 {WIDTH} {CURVE}")) preserveAspectRatio="none" {
                line class="rail" x1="0" x2=(WIDTH) y1=(CURVE - 4) y2=(CURVE - 4) vector-effect="non-scaling-stroke" {}
                polyline class="line" points=(line.join(" ")) vector-effect="non-scaling-stroke" {}
            }
        }
    }
}

fn host_of(event: &Event) -> String {
    refs(event, "host")
}

fn struck_at(fault: &StreamFault, events: &[Event], story: &StreamScenario) -> Vec<(Option<usize>, DateTime<Utc>)> {
    let of = |component: &'static str, call: Option<&'static str>, host: String| {
        events.iter().enumerate().filter(move |(_, e)| {
            e.component == component && call.is_none_or(|c| e.call == c) && (host.is_empty() || host_of(e) == host)
        })
    };
    let all = |found: Vec<(usize, &Event)>| found.into_iter().map(|(n, e)| (Some(n), e.time)).collect();
    match fault {
        StreamFault::WorkerCrash { worker, .. } => all(of("world", Some("crash"), format!("worker-{worker}")).collect()),
        StreamFault::WorkerFreeze { when: When::Time { at_s }, .. }
        | StreamFault::WorkerLeaves { at_s, .. }
        | StreamFault::SessionExpired { at_s, .. } => vec![(None, story.at(*at_s))],
        StreamFault::Partition { host, .. } => all(of("broker", None, host.clone()).collect()),
        StreamFault::LostReply { of: kind, .. } => {
            let call = serde_json::to_value(kind).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
            all(of("broker", None, String::new()).filter(|(_, e)| e.call == call && e.outcome.starts_with("lost")).collect())
        }
        StreamFault::WorkerFreeze { .. }
        | StreamFault::Slow { .. }
        | StreamFault::Clock { .. }
        | StreamFault::BrokerRestart { .. }
        | StreamFault::DiskFull { .. }
        | StreamFault::RegistryDown { .. } => Vec::new(),
    }
}

/// From when to when a fault is at work, when its parameters tell.
fn window(fault: &StreamFault, story: &StreamScenario) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
    let span = |from: u64, to: u64| Some((story.at(from), story.at(to)));
    match fault {
        StreamFault::WorkerCrash { when: When::Time { at_s }, down_s, .. } => span(*at_s, at_s + down_s),
        StreamFault::WorkerFreeze { when: When::Time { at_s }, for_s, .. } => span(*at_s, at_s + for_s),
        StreamFault::WorkerLeaves { at_s, for_s, .. } => span(*at_s, at_s + for_s),
        StreamFault::BrokerRestart { at_s, down_s } => span(*at_s, at_s + down_s),
        StreamFault::Partition { from_s, to_s, .. }
        | StreamFault::Slow { from_s, to_s, .. }
        | StreamFault::Clock { from_s, to_s, .. }
        | StreamFault::DiskFull { from_s, to_s }
        | StreamFault::RegistryDown { from_s, to_s } => span(*from_s, *to_s),
        StreamFault::WorkerCrash { .. }
        | StreamFault::WorkerFreeze { .. }
        | StreamFault::SessionExpired { .. }
        | StreamFault::LostReply { .. } => None,
    }
}

fn fault_lane(number: usize, fault: &StreamFault, hits: u64, events: &[Event], story: &StreamScenario) -> Lane {
    let mut lane = Lane {
        name: format!("fault {number}: {} ({})", super::described(fault), count(hits as usize, "hit")),
        ..Lane::default()
    };
    if let Some((from, to)) = window(fault, story) {
        let text = format!("from {} to {}", clock(from), clock(to));
        lane.bars.push(Bar { from, to, tone: Tone::Fault, text, label: String::new() });
    }
    for (event, at) in struck_at(fault, events, story) {
        let text = format!("{} {} strikes", clock(at), fault.mode());
        lane.marks.push(Mark { at, tone: Tone::Fault, text, label: String::new(), event });
    }
    lane
}

/// When each worker lived.
fn workers(story: &StreamScenario, events: &[Event], end: DateTime<Utc>) -> Vec<Lane> {
    let mut lanes: BTreeMap<String, (Lane, Option<DateTime<Utc>>)> = BTreeMap::new();
    let added = |number: usize| {
        let added = events.iter().filter(|e| e.component == "operator" && e.call == "add_workers");
        let enough = |e: &&Event| e.refs.get("workers").and_then(serde_json::Value::as_u64) > Some(number as u64);
        added.into_iter().find(enough).map(|e| e.time)
    };
    for number in 0..story.workers_most() {
        let name = format!("worker-{number}");
        let since = if number < story.workers { Some(story.at(story.workers_from_s)) } else { added(number) };
        lanes.insert(name.clone(), (Lane { name, ..Lane::default() }, since));
    }
    let alive = |from: DateTime<Utc>, to: DateTime<Utc>| {
        let text = format!("lives from {} to {}", clock(from), clock(to));
        Bar { from, to, tone: Tone::Good, text, label: String::new() }
    };
    for (index, event) in events.iter().enumerate().filter(|(_, e)| e.component == "world") {
        let Some((lane, since)) = lanes.get_mut(&host_of(event)) else { continue };
        match event.call.as_str() {
            "crash" => {
                lane.bars.extend(since.take().map(|from| alive(from, event.time)));
                lane.marks.push(mark(event, index, Tone::Bad, "died".into()));
            }
            "restart" => {
                *since = Some(event.time);
                lane.marks.push(mark(event, index, Tone::Good, String::new()));
            }
            "worker_stopped" => lane.marks.push(mark(event, index, Tone::Alert, "gave up".into())),
            _ => {}
        }
    }
    let finish = |(mut lane, since): (Lane, Option<DateTime<Utc>>)| {
        lane.bars.extend(since.map(|from| alive(from, end)));
        lane
    };
    lanes.into_values().map(finish).collect()
}

/// The drawing of a whole story.
pub(super) fn timeline(story: &StreamScenario, judgement: &Judgement, events: &[Event]) -> Markup {
    let end = events.iter().map(|e| e.time).max().unwrap_or(story.start).max(story.at(story.healed_s()));
    let view = View { from: story.start, to: end }.padded();
    let faults = story.fault.iter().enumerate().take(FAULTS_MAX);
    let mut lanes: Vec<Lane> =
        faults.map(|(n, fault)| fault_lane(n + 1, fault, judgement.hits.get(n).copied().unwrap_or(0), events, story)).collect();
    lanes.extend(workers(story, events, end));
    let mut wrong = Lane { name: "requests to the broker that went wrong".into(), ..Lane::default() };
    let mut told = Lane { name: "alerts, and what operators do".into(), ..Lane::default() };
    let mut commits = Lane { name: "transactions".into(), ..Lane::default() };
    for (index, event) in events.iter().enumerate() {
        match (event.component.as_str(), event.call.as_str()) {
            ("notifier", "raise") => told.marks.push(mark(event, index, Tone::Alert, refs(event, "kind"))),
            ("notifier", "resolve") => told.marks.push(mark(event, index, Tone::Good, "resolved".into())),
            ("operator", _) => told.marks.push(mark(event, index, Tone::Good, event.call.clone())),
            ("broker", _) => wrong.marks.push(mark(event, index, Tone::Bad, String::new())),
            ("producer", "commit") if event.outcome == "ok" => commits.marks.push(mark(event, index, Tone::Good, String::new())),
            ("producer", "commit" | "abort") => commits.marks.push(mark(event, index, Tone::Bad, String::new())),
            _ => {}
        }
    }
    let mut ends = Lane { name: "what must come to an end".into(), ..Lane::default() };
    let production = story.at(story.workload.duration_s);
    let healed = story.at(story.healed_s());
    for (at, label) in [(production, "production over"), (healed, "faults over")] {
        ends.marks.push(Mark { at, tone: Tone::Alert, text: format!("{} {label}", clock(at)), label: label.into(), event: None });
    }
    if let Some(drained) = judgement.stream.as_ref().and_then(|figures| figures.drained_after_s) {
        let at = healed + Duration::seconds(drained);
        ends.marks.push(Mark {
            at,
            tone: Tone::Good,
            text: format!("{} all done", clock(at)),
            label: "all done".into(),
            event: None,
        });
    }
    if !told.marks.is_empty() {
        lanes.push(told);
    }
    lanes.extend([wrong, commits, ends]);
    let deaths = judgement.stream.as_ref().map_or(0, |figures| figures.crashes as usize);
    let says = format!(
        "The whole story, {} to {} of virtual time in UTC: {}, {}, {}",
        view.from.format("%Y-%m-%d %H:%M:%S"),
        view.to.format("%H:%M:%S"),
        count(story.workers, "worker"),
        count(deaths, "death"),
        count(story.fault.len(), "fault")
    );
    html! {
        @for curve in curves(events) { (draw_curve(&curve, view)) }
        figure { figcaption { (says) } (draw(&lanes, view, &[], &says)) }
        p class="legend" {
            @for (tone, text) in [(Tone::Good, "went well"), (Tone::Bad, "died or failed"), (Tone::Alert, "gave up, or a turning point"), (Tone::Fault, "fault strikes")] {
                span {
                    svg width="14" height="14" aria-hidden="true" {
                        svg x="7" y="7" overflow="visible" { path class={ "mark " (tone.class()) } d=(tone.shape()) {} }
                    }
                    " " (text)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::stream::world::Figures;

    const STORY: &str = include_str!("../../../scenarios/streaming/worker_crashes.toml");

    fn event(second: u64, component: &str, call: &str, outcome: &str, refs: serde_json::Value) -> Event {
        let story = StreamScenario::parse(STORY).expect("a story");
        let (component, call) = (component.into(), call.into());
        Event { time: story.at(second), ordinal: second, component, call, outcome: outcome.into(), refs }
    }

    fn drawn() -> String {
        let story = StreamScenario::parse(STORY).expect("a story");
        let closed = |second: u64| story.at(second).timestamp_millis() - 45_000;
        let events = [
            event(10, "monitor", "look", "ok", json!({ "lag_records": 3, "closed_ms": closed(10) })),
            event(70, "world", "crash", "ok", json!({ "host": "worker-0" })),
            event(75, "monitor", "look", "ok", json!({ "lag_records": 40, "closed_ms": null })),
            event(80, "world", "restart", "ok", json!({ "host": "worker-0" })),
            event(90, "broker", "produce", "lost request_timed_out", json!({ "host": "worker-1" })),
        ];
        let figures = Figures { crashes: 1, drained_after_s: Some(5), ..Figures::default() };
        let judgement = Judgement { hits: vec![1], stream: Some(figures), ..Judgement::default() };
        timeline(&story, &judgement, &events).into_string()
    }

    #[test]
    fn lag_and_age_have_a_curve_and_say_their_worst() {
        let text = drawn();
        for wanted in ["records that wait: up to 40 records", "age of the newest closed windows: up to 45 s", "<polyline"] {
            assert!(text.contains(wanted), "no {wanted} in\n{text}");
        }
    }

    #[test]
    fn workers_live_in_bars_with_gaps_and_faults_have_their_lane() {
        let text = drawn();
        for wanted in ["lives from 03-17 14:00:00.000 to 03-17 14:01:10.000", "lives from 03-17 14:01:20.000", "worker-2", "died"]
        {
            assert!(text.contains(wanted), "no {wanted} in\n{text}");
        }
        for wanted in ["fault 1: worker_crash", "(1 hit)", "all done", "production over", "1 death"] {
            assert!(text.contains(wanted), "no {wanted} in\n{text}");
        }
    }
}
