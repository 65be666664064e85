//! The timeline: lanes over virtual time, as inline SVG.
//!
//! Positions across are percentages, so that the drawing follows the page's width and its text keeps its size. What lies
//! closer together than a mark is wide is drawn once and counted, so a drawing stays small however long the history is.

use std::collections::BTreeMap;

use chrono::{DateTime, Duration, SubsecRound, Utc};
use maud::{Markup, html};
use simulacro_core::history::Event;

use super::{at_fault, count, refs};
use crate::{
    faults::{Fault, StoreFault, data::lasts, deploy::DeployFault, service::ServiceFault, source::SourceFault},
    scenario::Scenario,
    store::Operation,
    world::Judgement,
};

/// Lanes for faults; a scenario with more says so in its table.
const FAULTS_MAX: usize = 12;
/// Lanes for tables.
const TABLES_MAX: usize = 12;
/// Height of a lane, in CSS pixels.
const LANE: usize = 37;
/// Height of the axis above and below the lanes, in CSS pixels.
const AXIS: usize = 22;
/// Marks closer than this, in percent of the width, are drawn once.
const MARK: f64 = 0.6;
/// Width of a character of a label, in percent of a page of 700 pixels.
const CHARACTER: f64 = 0.95;
/// Fault windows are drawn at most this far beyond the run itself.
const BEYOND: Duration = Duration::hours(6);

/// What a mark or a bar says at a glance: by its colour and, for marks, by its shape too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Tone {
    Good,
    Bad,
    Alert,
    Fault,
}

impl Tone {
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Bad => "bad",
            Self::Alert => "alert",
            Self::Fault => "fault",
        }
    }
    /// The outline of a mark round (0, 0).
    pub(super) fn shape(self) -> &'static str {
        match self {
            Self::Good => "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
            Self::Bad => "M-5 -3L-3 -5L0 -2L3 -5L5 -3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0z",
            Self::Alert => "M0 -6L6 5L-6 5z",
            Self::Fault => "M-5 0L0 -5L5 0L0 5z",
        }
    }
}

/// A moment.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) at: DateTime<Utc>,
    pub(super) tone: Tone,
    pub(super) text: String,
    pub(super) label: String,
    /// Position in the history.
    pub(super) event: Option<usize>,
}

/// A stretch of time.
#[derive(Debug)]
pub(super) struct Bar {
    pub(super) from: DateTime<Utc>,
    pub(super) to: DateTime<Utc>,
    pub(super) tone: Tone,
    pub(super) text: String,
    pub(super) label: String,
}

#[derive(Debug, Default)]
pub(super) struct Lane {
    pub(super) name: String,
    pub(super) bars: Vec<Bar>,
    pub(super) marks: Vec<Mark>,
}

/// From when to when a drawing shows.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub(super) from: DateTime<Utc>,
    pub(super) to: DateTime<Utc>,
}

impl View {
    pub(super) fn padded(self) -> Self {
        let pad = ((self.to - self.from) / 50).max(Duration::milliseconds(20));
        Self { from: self.from - pad, to: self.to + pad }
    }
    pub(super) fn shows(self, at: DateTime<Utc>) -> bool {
        (self.from..=self.to).contains(&at)
    }
    /// Percent of the width, 0 to 100.
    pub(super) fn x(self, at: DateTime<Utc>) -> f64 {
        let whole = (self.to - self.from).num_milliseconds().max(1) as f64;
        ((at - self.from).num_milliseconds() as f64 / whole * 100.0).clamp(0.0, 100.0)
    }
    /// Round moments, at most seven, fewer where each needs its milliseconds.
    fn ticks(self) -> (Vec<DateTime<Utc>>, &'static str) {
        const STEPS_MS: [i64; 27] = [
            10,
            20,
            50,
            100,
            200,
            500,
            1_000,
            2_000,
            5_000,
            10_000,
            15_000,
            30_000,
            60_000,
            120_000,
            300_000,
            600_000,
            900_000,
            1_800_000,
            3_600_000,
            7_200_000,
            10_800_000,
            21_600_000,
            43_200_000,
            86_400_000,
            172_800_000,
            604_800_000,
            2_592_000_000,
        ];
        let whole = (self.to - self.from).num_milliseconds().max(1);
        let step = STEPS_MS.into_iter().find(|step| whole / step <= if *step < 1_000 { 3 } else { 6 }).unwrap_or(whole / 6 + 1);
        let format = match step {
            ..1_000 => "%H:%M:%S%.3f",
            1_000..60_000 => "%H:%M:%S",
            60_000..86_400_000 if whole < 86_400_000 => "%H:%M",
            60_000..86_400_000 => "%m-%d %H:%M",
            _ => "%m-%d",
        };
        let first = (self.from.timestamp_millis() + step - 1).div_euclid(step) * step;
        let ticks = (0..7).map(|n| first + n * step).filter_map(DateTime::from_timestamp_millis);
        (ticks.filter(|at| self.shows(*at)).collect(), format)
    }
}

fn percent(x: f64) -> String {
    format!("{x:.2}%")
}

fn struck(event: &Event, operation: Operation, path: &str) -> bool {
    let called = match operation {
        Operation::Put => ["put", "copy", "rename"].iter().any(|c| event.call.starts_with(c)),
        Operation::Get => event.call.starts_with("get"),
        Operation::List => event.call.starts_with("list"),
        Operation::Delete => event.call.starts_with("delete"),
    };
    event.component == "object_store" && event.outcome == "error" && called && refs(event, "path").contains(path)
}

/// A run as the ledger's calls show it.
#[derive(Debug)]
struct Run {
    fecha: String,
    epoch: String,
    from: DateTime<Utc>,
    to: DateTime<Utc>,
    /// Without it, the history holds no end of this run.
    state: Option<String>,
}

fn runs(events: &[Event]) -> Vec<Run> {
    let mut out: Vec<Run> = Vec::new();
    for event in events {
        let began = event.component == "ledger" && event.call == "begin" && event.outcome == "ok";
        if let Some(open) = out.last_mut().filter(|run| run.state.is_none() && !began) {
            open.to = event.time;
            if event.component == "ledger" && event.call == "finish" && event.outcome == "ok" {
                open.state = Some(refs(event, "state"));
            }
        }
        if began {
            let (fecha, epoch) = (refs(event, "fecha"), refs(event, "epoch"));
            out.push(Run { fecha, epoch, from: event.time, to: event.time, state: None });
        }
    }
    out
}

pub(super) fn mark(event: &Event, index: usize, tone: Tone, label: String) -> Mark {
    let about = super::all_refs(event);
    let text =
        format!("{} {} {}: {} {about}", event.time.format("%m-%d %H:%M:%S%.3f"), event.component, event.call, event.outcome);
    Mark { at: event.time, tone, text, label, event: Some(index) }
}

/// When a fault is at work.
#[derive(Debug)]
enum When {
    Window(DateTime<Utc>, DateTime<Utc>),
    /// On the data of the source, from the beginning.
    Always,
    /// On the data of the source, for a time that may have no beginning or no end.
    Data(DateTime<Utc>, DateTime<Utc>),
    /// At single calls.
    Strikes,
}

fn when(fault: &Fault) -> When {
    match fault {
        Fault::SourceUnavailable { from, to }
        | Fault::Store(
            StoreFault::Unavailable { from, to, .. }
            | StoreFault::NoSpace { from, to, .. }
            | StoreFault::Throttled { from, to, .. }
            | StoreFault::BlackHole { from, to, .. }
            | StoreFault::TokenExpired { from, to, .. }
            | StoreFault::TooSkewed { from, to },
        )
        | Fault::Source(
            SourceFault::StartingUp { from, to }
            | SourceFault::Saturated { from, to, .. }
            | SourceFault::PasswordExpired { from, to, .. }
            | SourceFault::GrantRevoked { from, to }
            | SourceFault::Hangs { from, to },
        )
        | Fault::DimensionApi { from, to, .. }
        | Fault::Service(ServiceFault::LedgerFull { from, to })
        | Fault::Deploy(DeployFault::Rounds { from, to, .. } | DeployFault::UnknownFeature { from, to, .. })
        | Fault::Clock { from, to, .. } => When::Window(*from, *to),
        Fault::NullRegion { .. } | Fault::RenamedColumn { .. } | Fault::DuplicatedRows { .. } | Fault::Data(_) => {
            lasts(fault).map_or(When::Always, |(from, to)| When::Data(from, to))
        }
        Fault::Store(StoreFault::PrefixRemoved { at, .. } | StoreFault::PrefixCut { at, .. }) => When::Window(*at, *at),
        Fault::Store(StoreFault::ReplyLost { .. } | StoreFault::Truncated { .. })
        | Fault::Source(
            SourceFault::Crash { .. }
            | SourceFault::Truncated { .. }
            | SourceFault::ShortRead { .. }
            | SourceFault::PlanInvalidated { .. }
            | SourceFault::Dropped { .. },
        )
        | Fault::Service(
            ServiceFault::LedgerReplyLost { .. }
            | ServiceFault::WarehouseReplyLost { .. }
            | ServiceFault::WarehouseTimeout { .. },
        )
        | Fault::Deploy(DeployFault::CrashesAtStart { .. })
        | Fault::WorkerCrash { .. } => When::Strikes,
    }
}

/// The port whose failing calls are a fault's hits; `None` where no port fails.
fn port(fault: &Fault) -> Option<&'static str> {
    match fault {
        Fault::Source(_) => Some("table_source"),
        Fault::DimensionApi { .. } => Some("dimension_api"),
        Fault::Service(ServiceFault::LedgerReplyLost { .. } | ServiceFault::LedgerFull { .. }) => Some("ledger"),
        Fault::Service(ServiceFault::WarehouseReplyLost { .. } | ServiceFault::WarehouseTimeout { .. }) => Some("warehouse"),
        Fault::Store(StoreFault::Throttled { .. } | StoreFault::TokenExpired { .. } | StoreFault::TooSkewed { .. }) => {
            Some("object_store")
        }
        Fault::SourceUnavailable { .. }
        | Fault::NullRegion { .. }
        | Fault::RenamedColumn { .. }
        | Fault::DuplicatedRows { .. }
        | Fault::Store(_)
        | Fault::WorkerCrash { .. }
        | Fault::Data(_)
        | Fault::Deploy(_)
        | Fault::Clock { .. } => None,
    }
}

fn fault_lane(number: usize, fault: &Fault, hits: u64, events: &[Event], runs: &[Run], whole: View) -> Lane {
    let mut lane = Lane {
        name: format!("fault {number}: {} ({})", super::fault_text(fault), count(hits as usize, "hit")),
        bars: Vec::new(),
        marks: Vec::new(),
    };
    let bar = match when(fault) {
        When::Window(from, to) => Some((from, to)),
        When::Always => Some((whole.from, whole.to)),
        When::Data(from, to) => Some((from.max(whole.from), to.min(whole.to))),
        When::Strikes => None,
    };
    if let Some((from, to)) = bar {
        let text = format!("from {} to {}", clock(from), clock(to));
        lane.bars.push(Bar { from, to, tone: Tone::Fault, text, label: String::new() });
    }
    for (index, event) in events.iter().enumerate() {
        let hit = match fault {
            Fault::SourceUnavailable { from, to } => {
                event.component == "table_source" && at_fault(event) && (*from..=*to).contains(&event.time)
            }
            Fault::Store(StoreFault::Unavailable { operation, path, from, to, .. }) => {
                struck(event, *operation, path) && (*from..=*to).contains(&event.time)
            }
            Fault::Store(StoreFault::ReplyLost { operation, path, .. }) => struck(event, *operation, path),
            Fault::Store(StoreFault::NoSpace { from, to, path }) => {
                struck(event, Operation::Put, path) && (*from..=*to).contains(&event.time)
            }
            Fault::Store(StoreFault::BlackHole { operation, path, .. }) => struck(event, *operation, path),
            Fault::Store(StoreFault::Truncated { path, .. }) => struck(event, Operation::Get, path),
            // No call meets it.
            Fault::Store(StoreFault::PrefixRemoved { .. } | StoreFault::PrefixCut { .. }) => false,
            Fault::Store(StoreFault::Throttled { .. } | StoreFault::TokenExpired { .. } | StoreFault::TooSkewed { .. })
            | Fault::Source(_)
            | Fault::DimensionApi { .. }
            | Fault::Service(_)
            | Fault::Data(_)
            | Fault::Deploy(_)
            | Fault::Clock { .. }
            | Fault::WorkerCrash { .. }
            | Fault::NullRegion { .. }
            | Fault::RenamedColumn { .. }
            | Fault::DuplicatedRows { .. } => {
                let inside = match &bar {
                    Some((from, to)) => (*from..=*to).contains(&event.time),
                    None => true,
                };
                port(fault) == Some(event.component.as_str()) && at_fault(event) && inside
            }
        };
        if hit {
            lane.marks.push(mark(event, index, Tone::Fault, String::new()));
        }
    }
    if matches!(fault, Fault::WorkerCrash { .. }) {
        for (dead, next) in runs.iter().zip(runs.iter().skip(1)).filter(|(run, _)| run.state.is_none()) {
            let text = format!(
                "{} a new worker begins again; the run with epoch {} has no end",
                next.from.format("%m-%d %H:%M:%S%.3f"),
                dead.epoch
            );
            lane.marks.push(Mark { at: next.from, tone: Tone::Fault, text, label: "begun again".into(), event: None });
        }
    }
    lane
}

fn lanes(scenario: &Scenario, judgement: &Judgement, events: &[Event], runs: &[Run], whole: View) -> Vec<Lane> {
    let faults = scenario.fault.iter().enumerate().take(FAULTS_MAX);
    let mut lanes: Vec<Lane> = faults
        .map(|(n, fault)| fault_lane(n + 1, fault, judgement.hits.get(n).copied().unwrap_or(0), events, runs, whole))
        .collect();
    let mut source = Lane { name: "source calls".into(), ..Lane::default() };
    let mut tables: BTreeMap<String, Lane> = BTreeMap::new();
    let mut alerts = Lane { name: "alerts".into(), ..Lane::default() };
    for (index, event) in events.iter().enumerate() {
        let tone = if at_fault(event) { Tone::Bad } else { Tone::Good };
        match (event.component.as_str(), event.call.as_str()) {
            ("table_source", _) => source.marks.push(mark(event, index, tone, String::new())),
            ("lakehouse", "overwrite_day") | ("warehouse", "load_day") => {
                let table = refs(event, "table");
                if tables.len() < TABLES_MAX || tables.contains_key(&table) {
                    let lane = tables.entry(table.clone()).or_default();
                    lane.name = format!("commits to {table}");
                    lane.marks.push(mark(event, index, tone, String::new()));
                }
            }
            ("notifier", "raise") => alerts.marks.push(mark(event, index, Tone::Alert, refs(event, "kind"))),
            ("notifier", "resolve") => alerts.marks.push(mark(event, index, Tone::Good, "resolved".into())),
            _ => {}
        }
    }
    let mut ledger = Lane { name: "runs".into(), ..Lane::default() };
    for run in runs {
        let tone = if run.state.as_deref() == Some("succeeded") { Tone::Good } else { Tone::Bad };
        let label = run.state.clone().unwrap_or_else(|| "no end".into());
        let text = format!("run of {} with epoch {}: {label}, {} to {}", run.fecha, run.epoch, clock(run.from), clock(run.to));
        ledger.bars.push(Bar { from: run.from, to: run.to, tone, text, label });
    }
    let mut published = Lane { name: "published".into(), ..Lane::default() };
    for fecha in scenario.fechas() {
        let due = scenario.sla(fecha);
        match judgement.published.get(&fecha) {
            Some(at) => {
                let late = *at > due;
                let text = format!("{fecha} published at {}, due by {}", clock(*at), clock(due));
                let label = if late { format!("{fecha} late") } else { fecha.to_string() };
                published.marks.push(Mark { at: *at, tone: if late { Tone::Bad } else { Tone::Good }, text, label, event: None });
            }
            None => {
                let (text, label) = (format!("{fecha} was not published, due by {}", clock(due)), format!("{fecha} missing"));
                published.marks.push(Mark { at: due, tone: Tone::Bad, text, label, event: None });
            }
        }
    }
    lanes.extend([source, ledger]);
    lanes.extend(tables.into_values());
    lanes.extend([alerts, published]);
    lanes
}

pub(super) fn clock(at: DateTime<Utc>) -> String {
    at.trunc_subsecs(3).format("%m-%d %H:%M:%S%.3f").to_string()
}

/// Keeps labels of one line from lying on each other.
#[derive(Debug, Default)]
struct Line {
    taken: Vec<(f64, f64)>,
}

#[derive(Debug)]
struct Place {
    /// Percent of the width.
    x: f64,
    anchor: &'static str,
    /// CSS pixels from there.
    shift: i32,
}

impl Line {
    /// Where a label of something from `start` to `end` may stand: in it, right or left of it, if anywhere.
    fn place(&mut self, start: f64, end: f64, label: &str) -> Option<Place> {
        const GAP: f64 = 0.8;
        let width = label.chars().count() as f64 * CHARACTER + GAP;
        let middle = f64::midpoint(start, end);
        let inside = (end - start > width).then_some((middle - width / 2.0, middle + width / 2.0, "middle", 0, middle));
        let beside = [(end + GAP, end + GAP + width, "start", 8, end), (start - GAP - width, start - GAP, "end", -8, start)];
        for (from, to, anchor, shift, x) in inside.into_iter().chain(beside) {
            let free = from >= 0.0 && to <= 100.0 && self.taken.iter().all(|(a, b)| to <= *a || from >= *b);
            if !label.is_empty() && free {
                self.taken.push((from, to));
                return Some(Place { x, anchor, shift });
            }
        }
        None
    }
}

fn draw_lane(lane: &Lane, top: usize, view: View) -> Markup {
    let (middle, mut line) = (top + 27, Line::default());
    let mut marks: Vec<(f64, &Mark, usize)> = Vec::new();
    for mark in lane.marks.iter().filter(|m| view.shows(m.at)) {
        let x = view.x(mark.at);
        match marks.iter_mut().rev().take(4).find(|(at, other, _)| (x - at).abs() < MARK && other.tone == mark.tone) {
            Some(near) => near.2 += 1,
            None => marks.push((x, mark, 1)),
        }
    }
    line.taken.extend(marks.iter().map(|(x, _, _)| (x - 0.8, x + 0.8)));
    let bars: Vec<_> = lane.bars.iter().filter(|b| b.from <= view.to && b.to >= view.from).collect();
    // A label may lie in its own bar, when there is room, but on no other one.
    let narrow = bars.iter().map(|b| (view.x(b.from), view.x(b.to))).filter(|(x, end)| end - x < MARK * 2.0);
    line.taken.extend(narrow.map(|(x, end)| (x, end + MARK)));
    html! {
        line class="rail" x1="0" x2="100%" y1=(middle) y2=(middle) {}
        text class="lane" x="0" y=(top + 13) { (lane.name) }
        @for bar in bars {
            @let (x, end) = (view.x(bar.from), view.x(bar.to));
            rect class={ "bar " (bar.tone.class()) } x=(percent(x)) y=(middle - 7) width=(percent((end - x).max(0.4))) height="14" rx="3" {
                title { (bar.text) }
            }
            @if let Some(place) = line.place(x, end, &bar.label) { (label(&place, middle, &bar.label)) }
        }
        @for (x, mark, count) in marks {
            svg x=(percent(x)) y=(middle) overflow="visible" {
                path class={ "mark " (mark.tone.class()) } d=(mark.tone.shape()) data-e=[mark.event] {
                    title { (mark.text) @if count > 1 { " (and " (count - 1) " more close by)" } }
                }
            }
            @if let Some(place) = line.place(x, x, &mark.label) { (label(&place, middle, &mark.label)) }
        }
    }
}

fn label(place: &Place, middle: usize, text: &str) -> Markup {
    html! { text x=(percent(place.x)) y=(middle + 4) dx=(place.shift) text-anchor=(place.anchor) { (text) } }
}

pub(super) fn draw(lanes: &[Lane], view: View, slas: &[DateTime<Utc>], says: &str) -> Markup {
    let bottom = AXIS + lanes.len() * LANE + 6;
    let height = bottom + AXIS;
    let (ticks, format) = view.ticks();
    let mut top = Line::default();
    let anchor = |x: f64| match x {
        ..5.0 => "start",
        95.0.. => "end",
        _ => "middle",
    };
    html! {
        svg role="img" aria-label=(says) width="100%" height=(height) {
            @for at in &ticks {
                @let x = view.x(*at);
                line class="grid" x1=(percent(x)) x2=(percent(x)) y1=(AXIS) y2=(bottom) {}
                text class="tick" x=(percent(x)) y=(bottom + 15) text-anchor=(anchor(x)) { (at.format(format)) }
            }
            @for at in slas.iter().filter(|at| view.shows(**at)) {
                @let x = view.x(*at);
                line class="sla" x1=(percent(x)) x2=(percent(x)) y1=(AXIS - 4) y2=(bottom) {}
                @let label = format!("SLA {}", at.format("%H:%M"));
                @if let Some(place) = top.place(x, x, &label) {
                    text class="slatext" x=(percent(x)) y="14" dx=(place.shift / 2) text-anchor=(place.anchor) { (label) }
                }
            }
            @for (n, lane) in lanes.iter().enumerate() { (draw_lane(lane, AXIS + n * LANE, view)) }
        }
    }
}

/// The drawing of the whole run and, where a run's writes are only a dot in it, a close-up of them.
pub(super) fn timeline(scenario: &Scenario, judgement: &Judgement, events: &[Event]) -> Markup {
    let fechas = scenario.fechas();
    let slas: Vec<_> = fechas.iter().map(|f| scenario.sla(*f)).collect();
    let first = fechas.first().map_or(DateTime::<Utc>::UNIX_EPOCH, |f| scenario.scheduled(*f));
    let of_run = || slas.iter().chain(judgement.published.values()).copied().chain(events.iter().map(|e| e.time)).chain([first]);
    let (begin, end) = (of_run().min().unwrap_or(first), of_run().max().unwrap_or(first));
    let windows = scenario.fault.iter().filter_map(|fault| match when(fault) {
        When::Window(from, to) => Some((from, to)),
        When::Always | When::Data(..) | When::Strikes => None,
    });
    let (froms, tos): (Vec<_>, Vec<_>) = windows.unzip();
    let from = froms.into_iter().filter(|at| *at < begin).min().map_or(begin, |at| at.max(begin - BEYOND));
    let to = tos.into_iter().filter(|at| *at > end).max().map_or(end, |at| at.min(end + BEYOND));
    let whole = View { from, to }.padded();
    let runs = runs(events);
    let lanes = lanes(scenario, judgement, events, &runs, whole);
    let late = fechas.iter().filter(|f| judgement.published.get(f).is_none_or(|at| *at > scenario.sla(**f))).count();
    let says = format!(
        "The whole run, {} to {} of virtual time in UTC: {}, {}, {} of {} published in time",
        from.format("%Y-%m-%d %H:%M"),
        to.format("%Y-%m-%d %H:%M"),
        count(runs.len(), "run"),
        count(judgement.alerts.len(), "alert"),
        fechas.len() - late,
        count(fechas.len(), "day")
    );
    let near = close_up(events, &runs, whole);
    html! {
        figure { figcaption { (says) } (draw(&lanes, whole, &slas, &says)) }
        @if let Some((run, view)) = near {
            @let says = format!("Close-up: the writes of the run of {} with epoch {}, {} to {}", run.fecha, run.epoch, view.from.format("%H:%M:%S"), view.to.format("%H:%M:%S"));
            @let seen = |lane: &&Lane| lane.marks.iter().any(|m| view.shows(m.at)) || lane.name == "runs";
            @let near: Vec<Lane> = lanes.into_iter().filter(|lane| seen(&lane)).collect();
            figure { figcaption { (says) } (draw(&near, view, &slas, &says)) }
        }
        p class="legend" {
            @for (tone, text) in [(Tone::Good, "went well"), (Tone::Bad, "failed, late or missing"), (Tone::Alert, "alert"), (Tone::Fault, "fault strikes")] {
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

/// The last run that wrote something, from the source's last answer before its first write to its end, if that is small.
fn close_up<'a>(events: &[Event], runs: &'a [Run], whole: View) -> Option<(&'a Run, View)> {
    let write = |e: &&Event| matches!((e.component.as_str(), e.call.as_str()), ("lakehouse", "overwrite_day"));
    let of = |run: &Run| events.iter().filter(write).map(|e| e.time).find(|at| (run.from..=run.to).contains(at));
    let (run, first) = runs.iter().rev().find_map(|run| Some((run, of(run)?)))?;
    let source = events.iter().filter(|e| e.component == "table_source" && (run.from..=first).contains(&e.time));
    let view = View { from: source.map(|e| e.time).next_back().unwrap_or(first), to: run.to }.padded();
    ((whole.to - whole.from) > (view.to - view.from) * 20).then_some((run, view))
}
