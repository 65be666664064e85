//! The operator: the person who is paged, ends what has no end by itself, and has the days made that are missing.
//!
//! He knows what the pager and the ledger say, and nothing else: he repairs after an alert, never before, and uses the same
//! backfill as everybody. What this leaves out: mistakes of his own.

use std::{sync::Mutex, time::Duration};

use chrono::{DateTime, Days, NaiveDate, TimeDelta, Utc};
use simulacro_core::{
    backfill::{self, Applied, Journal, Policy, Then},
    platform::{PIPELINE, Platform},
    ports::{Alert, Result, RunLedger, RunState},
};

use super::{clock::Clock, faults::Faults, scenario::PlatformScenario};
use crate::ports::SimNotifier;

/// How often he looks while something is open, and while nothing is.
const LOOKS: (Duration, Duration) = (Duration::from_secs(300), Duration::from_secs(900));
/// He begins so long after a full minute: what he has made then has no order with turns that are due on one.
const PHASE: Duration = Duration::from_millis(41_170);
/// How far back he looks for days that are missing.
const BACK: Days = Days::new(10);
/// A turn that has not ended so long after its schedule is not under way any more.
const TURN: TimeDelta = TimeDelta::hours(3);

struct Unwatched;

impl Journal for Unwatched {
    fn begins(&mut self, _fecha: NaiveDate) -> Result<()> {
        Ok(())
    }
    fn ended(&mut self, _day: &Applied) {}
}

/// Kinds and times of the alerts so far.
pub fn told(raised: &Mutex<Vec<(DateTime<Utc>, Alert)>>) -> Vec<(DateTime<Utc>, String)> {
    raised.lock().map(|all| all.iter().map(|(at, alert)| (*at, alert.kind.clone())).collect()).unwrap_or_default()
}

/// Days that are due, are not published, and that nobody will publish without him.
pub async fn missing(
    ledger: &dyn RunLedger,
    story: &PlatformScenario,
    now: DateTime<Utc>,
    first: NaiveDate,
) -> Result<Vec<NaiveDate>> {
    let runs = ledger.runs_since(PIPELINE, first).await?;
    let mut out = Vec::new();
    for fecha in story.fechas().skip_while(|f| *f < first).take_while(|f| story.scheduled(*f) <= now) {
        let of_day = || runs.iter().filter(|r| r.fecha == fecha);
        if of_day().any(|r| r.state == RunState::Succeeded) {
            continue;
        }
        let ended = match of_day().next_back() {
            Some(run) if run.state == RunState::Running => false,
            Some(run) => run.report["final"] == true || run.state == RunState::Skipped || run.scheduled_at.is_none(),
            None => false,
        };
        if ended || now > story.scheduled(fecha) + TURN {
            out.push(fecha);
        }
    }
    Ok(out)
}

/// His work, for ever. `published` has the days that he had made.
pub async fn work(
    clock: &Clock,
    story: &PlatformScenario,
    platform: &Platform,
    faults: &Faults,
    pager: &SimNotifier,
    published: &Mutex<Vec<NaiveDate>>,
) {
    clock.sleep(PHASE).await;
    loop {
        let is_open = pager.open.lock().is_ok_and(|open| !open.is_empty());
        clock.sleep(if is_open { LOOKS.0 } else { LOOKS.1 }).await;
        if !is_open {
            continue;
        }
        let left = faults.operate(&told(&pager.raised));
        if left > 0 {
            continue;
        }
        let now = clock.now();
        let first = (now.date_naive() - BACK).max(story.fecha);
        // A ledger that does not answer is asked again at the next look.
        let Ok(days) = missing(&*platform.ports.ledger, story, now, first).await else { continue };
        let policy = Policy { on_held: Then::Stop, on_failed: Then::Stop };
        if days.is_empty() {
            continue;
        }
        // Somebody else may be running the pipeline, or the cause is still there: the next look tells.
        if let Ok(summary) = backfill::apply(platform, &days, policy, &mut Unwatched).await
            && let Ok(mut published) = published.lock()
        {
            published.extend(summary.days.iter().filter(|d| d.state == RunState::Succeeded).map(|d| d.fecha));
        }
    }
}
