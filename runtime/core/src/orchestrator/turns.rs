//! The turns of an asset: due, skipped, tried, tried again, published, late.
//!
//! A turn is over when the ledger says so: with a success, a skip, a hold, or a failure that is final. Everything else is
//! gone on with, by whoever leads.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tracing::{error, info, warn};

use super::{
    Asset, Attempt, Job, Orchestrator, Slot, Waiting, Work, WorkError,
    breaker::{self, Breaker},
    incident::{About, ENDED_BY_SUCCESS, key},
    leading::Leading,
    pause::pauses,
    sleep_until, wait_for_source, within,
};
use crate::ports::{Alert, BUSY, Disposition, FENCED, Fact, Notifier, PortError, Result, Run, RunStart, RunState};

/// Topic of the facts that tell since when an asset is known: schedules before that were never its own.
const SINCE: &str = "since";
/// How far back turns are looked for, in days; those before it count as missed.
const LOOK_BACK_DAYS: u64 = 62;
/// Most missed schedules that get a row of their own.
const MISSED_MAX: usize = 100;
/// Longest time for one question to a source.
const PROBE: Duration = Duration::from_secs(60);
/// How often open incidents are compared with the ledger.
const SWEEP: Duration = Duration::from_secs(60);
/// How long the news of missed schedules stays.
const NEWS: Duration = Duration::from_secs(86_400);

/// What the ledger knows of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Turn {
    /// How it ended; `None` while it has not.
    pub(super) end: Option<RunState>,
    /// Tries so far.
    pub(super) tried: u32,
    /// When the next try is due; `None` at once.
    pub(super) next_try: Option<DateTime<Utc>>,
}

impl Turn {
    /// Reads it from the runs of its day, in order of epoch.
    pub(super) fn of(runs: &[Run], slot: Slot) -> Self {
        let mut turn = Self { end: None, tried: 0, next_try: None };
        let mut has_own = false;
        for run in runs.iter().filter(|r| r.fecha == slot.fecha) {
            let is_own = run.scheduled_at == Some(slot.scheduled);
            has_own |= is_own;
            // A run by hand after the schedule does as well; whose clock is off, the order of epochs tells.
            let is_instead = run.scheduled_at.is_none() && (has_own || run.started_at >= slot.scheduled);
            match run.state {
                RunState::Succeeded if is_own || is_instead => turn.end = Some(RunState::Succeeded),
                RunState::Held | RunState::Skipped if is_own => turn.end = turn.end.or(Some(run.state)),
                RunState::Failed if is_own => {
                    turn.tried += 1;
                    turn.next_try = run.report["next_try"].as_str().and_then(|t| t.parse().ok());
                    if run.report["final"] == true {
                        turn.end = turn.end.or(Some(RunState::Failed));
                    }
                }
                // Under way in a process that is dead: only the leader asks.
                RunState::Running if is_own => (turn.tried, turn.next_try) = (turn.tried + 1, None),
                RunState::Succeeded | RunState::Held | RunState::Skipped | RunState::Failed | RunState::Running => {}
            }
        }
        turn
    }
}

/// What came of a try that did not succeed.
#[derive(Debug)]
enum Failure {
    /// Stopped by a gate.
    Held { text: String, is_told: bool, checks: Vec<String> },
    /// Anything else.
    Failed { text: String, code: Option<String>, may_pass: bool, needs_room: bool, is_told: bool },
}

/// How things stand with the assets that come first.
enum Upstream {
    Done,
    Waiting(String),
    Over(String),
}

/// What a try came to.
enum Tried {
    Over,
    Again,
    Busy(PortError),
}

fn alert(kind: &str, key: String, priority: u8, summary: String) -> Alert {
    Alert { dedup_key: key, kind: kind.into(), priority, summary }
}

impl Orchestrator {
    fn decide(&self, call: &str, asset: &Asset, slot: Slot, outcome: &str) {
        let refs = json!({ "asset": asset.name, "fecha": slot.fecha, "scheduled": slot.scheduled });
        self.ports.recorder.record("orchestrator", call, outcome.into(), refs);
    }

    async fn turn(&self, asset: &Asset, slot: Slot) -> Result<Turn> {
        let runs = self.patiently(|| self.ports.ledger.runs_since(&asset.name, slot.fecha)).await?;
        Ok(Turn::of(&runs, slot))
    }

    /// Runs the turns of an asset as they come, for ever.
    pub(super) async fn attend(&self, leading: &Leading, asset: &Asset, work: &dyn Work) -> Result<()> {
        let mut after = self.recall(leading, asset, work).await?;
        loop {
            let Some(next) = asset.schedule.next(after) else {
                error!(asset = %asset.name, "the schedule never comes again");
                return std::future::pending().await;
            };
            // A clock that is put back makes a sleep too short.
            while self.ports.env.now() < next {
                sleep_until(&*self.ports.env, next).await;
            }
            // Time may have gone by while the last turn was under way.
            let due = asset.schedule.newest(self.ports.env.now()).unwrap_or(next).max(next);
            self.miss(leading, asset, after, due).await?;
            self.drive(leading, asset, work, asset.slot(due)).await?;
            after = due;
        }
    }

    /// Since when an asset is known to the ledger.
    async fn since(&self, leading: &Leading, asset: &Asset) -> Result<DateTime<Utc>> {
        let facts = self.patiently(|| self.ports.ledger.facts(SINCE)).await?;
        if let Some(fact) = facts.iter().find(|f| f.name == asset.name) {
            return Ok(fact.at);
        }
        let at = self.ports.env.now();
        let fact = Fact { topic: SINCE.into(), name: asset.name.clone(), value: json!(true), at };
        let fence = leading.fence()?;
        self.patiently(|| self.ports.ledger.put_fact(&fact, Some(&fence))).await?;
        Ok(at)
    }

    /// Goes on where the ledger says that the asset stands, and returns the schedule up to which everything is over.
    async fn recall(&self, leading: &Leading, asset: &Asset, work: &dyn Work) -> Result<DateTime<Utc>> {
        let since = self.since(leading, asset).await?;
        let now = self.ports.env.now();
        let back = now - Duration::from_secs(LOOK_BACK_DAYS * 86_400);
        let from = asset.slot(since.max(back)).fecha;
        let runs = self.patiently(|| self.ports.ledger.runs_since(&asset.name, from)).await?;
        let last = runs.iter().filter_map(|r| r.scheduled_at).max();
        let after = last.unwrap_or(since).max(back);
        let Some(newest) = asset.schedule.newest(now).filter(|newest| *newest > since) else { return Ok(after) };
        if let Some(last) = last
            && last < newest
            && Turn::of(&runs, asset.slot(last)).end.is_none()
        {
            // Cut off, and its time has passed: only the newest turn is run.
            let report = json!({ "reason": "missed", "instead": newest });
            self.skip(leading, asset, asset.slot(last), report).await?;
        }
        if newest > after {
            self.miss(leading, asset, after, newest).await?;
        }
        self.drive(leading, asset, work, asset.slot(newest)).await?;
        Ok(newest)
    }

    /// Records the schedules between two as skipped, and tells of days that are missing.
    async fn miss(&self, leading: &Leading, asset: &Asset, after: DateTime<Utc>, due: DateTime<Utc>) -> Result<()> {
        let (mut times, count) = asset.schedule.between(after, due, MISSED_MAX);
        let Some(newest) = times.first().copied() else { return Ok(()) };
        times.reverse();
        let oldest = times[0];
        for time in times {
            let mut report = json!({ "reason": "missed", "instead": due });
            if time == oldest && count > MISSED_MAX {
                report["earlier"] = json!(count - MISSED_MAX);
            }
            self.skip(leading, asset, asset.slot(time), report).await?;
        }
        warn!(asset = %asset.name, count, %oldest, %newest, "schedules missed");
        if asset.lag_days > 0 {
            let (first, last) = (asset.slot(oldest), asset.slot(newest));
            let summary = format!(
                "{}: {count} schedules were missed; days {} to {} were not processed and want a backfill",
                asset.name, first.fecha, last.fecha
            );
            leading.outbox.raise(&alert("schedule_missed", key("schedule_missed", asset, last), 3, summary)).await?;
        }
        Ok(())
    }

    /// Records that a turn is not run, and why.
    async fn skip(&self, leading: &Leading, asset: &Asset, slot: Slot, report: Value) -> Result<()> {
        let give_up_at = self.ports.env.now() + Duration::from_secs(asset.retry.deadline_s);
        loop {
            match self.begin(leading, asset, slot, 0).await {
                Ok(run) => {
                    self.decide("skip", asset, slot, report["reason"].as_str().unwrap_or_default());
                    return self.end(leading, asset, run, RunState::Skipped, report).await;
                }
                Err(e) if e.code.as_deref() == Some(BUSY) && self.ports.env.now() < give_up_at => {
                    self.ports.env.sleep(Duration::from_secs(self.plan.config.poll_s)).await;
                }
                Err(e) if e.code.as_deref() == Some(BUSY) => {
                    error!(asset = %asset.name, fecha = %slot.fecha, error = %e.chain(), "skip not recorded");
                    return Ok(());
                }
                Err(e) => return Err(e),
            }
        }
    }

    async fn begin(&self, leading: &Leading, asset: &Asset, slot: Slot, floor: i64) -> Result<Run> {
        let start = RunStart {
            pipeline: asset.name.clone(),
            fecha: slot.fecha,
            run_id: self.ports.env.new_id(),
            floor,
            now: self.ports.env.now(),
            scheduled_at: Some(slot.scheduled),
            fence: Some(leading.fence()?),
        };
        let run = self.patiently(|| self.ports.ledger.start(&start)).await?;
        leading.active().insert(asset.name.clone(), run.clone());
        Ok(run)
    }

    async fn end(&self, leading: &Leading, asset: &Asset, mut run: Run, state: RunState, report: Value) -> Result<()> {
        leading.fence()?;
        (run.state, run.report, run.finished_at) = (state, report, Some(self.ports.env.now()));
        self.patiently(|| self.ports.ledger.finish(&run)).await?;
        leading.active().remove(&asset.name);
        self.ports.metrics.count("simulacro_runs_total", &[("asset", asset.name.as_str()), ("state", state.as_str())], 1);
        let (fecha, epoch, state) = (run.fecha, run.epoch, state.as_str());
        info!(asset = %asset.name, %fecha, epoch, state, "run ended");
        Ok(())
    }

    /// Brings a turn to its end, from wherever it stands.
    async fn drive(&self, leading: &Leading, asset: &Asset, work: &dyn Work, slot: Slot) -> Result<()> {
        let (env, poll) = (&self.ports.env, Duration::from_secs(self.plan.config.poll_s));
        // A turn that begins late, after a standstill, is as patient as any other.
        let began = env.now().max(slot.scheduled);
        let deadline = began + Duration::from_secs(asset.retry.deadline_s);
        self.decide("due", asset, slot, "ok");
        loop {
            let turn = self.turn(asset, slot).await?;
            if turn.end.is_some() {
                return Ok(());
            }
            let all = self.patiently(|| pauses(&*self.ports.ledger)).await?;
            if let Some(pause) = all.iter().find(|p| p.asset == asset.name) {
                let report = json!({ "reason": "paused", "by": pause.by, "why": pause.why, "since": pause.since });
                return self.skip(leading, asset, slot, report).await;
            }
            match self.upstream(asset, slot).await? {
                Upstream::Done => {}
                Upstream::Waiting(_) if env.now() < deadline => {
                    env.sleep(poll).await;
                    continue;
                }
                Upstream::Waiting(why) => {
                    self.skip(leading, asset, slot, json!({ "reason": "upstream", "why": why })).await?;
                    let summary = format!("{} of {}: skipped, {why}", asset.name, slot.fecha);
                    return self.tell(leading, asset, slot, "run_failed", asset.priority, summary).await;
                }
                // What comes first has told of itself.
                Upstream::Over(why) => {
                    return self.skip(leading, asset, slot, json!({ "reason": "upstream", "why": why })).await;
                }
            }
            if let Some(next) = turn.next_try.filter(|next| *next > env.now()) {
                sleep_until(&**env, next).await;
                continue;
            }
            match self.try_once(leading, asset, work, slot, began, turn.tried).await? {
                Tried::Over => return Ok(()),
                Tried::Again => {}
                Tried::Busy(why) if env.now() < deadline => {
                    info!(asset = %asset.name, fecha = %slot.fecha, why = %why, "waiting for the pipeline");
                    env.sleep(poll).await;
                }
                Tried::Busy(why) => {
                    let summary = format!("{} of {}: not run, {}", asset.name, slot.fecha, why.chain());
                    return self.tell(leading, asset, slot, "run_failed", asset.priority, summary).await;
                }
            }
        }
    }

    async fn tell(&self, leading: &Leading, asset: &Asset, slot: Slot, kind: &str, priority: u8, summary: String) -> Result<()> {
        leading.outbox.raise(&alert(kind, key(kind, asset, slot), priority, summary)).await
    }

    /// Looks at the assets that come first: the newest turn of each must have succeeded.
    async fn upstream(&self, asset: &Asset, slot: Slot) -> Result<Upstream> {
        let known =
            if asset.depends_on.is_empty() { Vec::new() } else { self.patiently(|| self.ports.ledger.facts(SINCE)).await? };
        let mut waiting = Upstream::Done;
        for name in &asset.depends_on {
            let Some(first) = self.plan.asset(name) else { continue };
            let Some(scheduled) = first.schedule.newest(slot.scheduled) else { continue };
            // Before it was known it had no turns.
            if known.iter().find(|f| f.name == *name).is_none_or(|f| f.at >= scheduled) {
                continue;
            }
            match self.turn(first, first.slot(scheduled)).await?.end {
                Some(RunState::Succeeded) => {}
                Some(state) => return Ok(Upstream::Over(format!("{name} of {scheduled} is {}", state.as_str()))),
                None => waiting = Upstream::Waiting(format!("{name} of {scheduled} is not done")),
            }
        }
        Ok(waiting)
    }

    /// One try: one run in the ledger.
    async fn try_once(
        &self,
        leading: &Leading,
        asset: &Asset,
        work: &dyn Work,
        slot: Slot,
        began: DateTime<Utc>,
        tried: u32,
    ) -> Result<Tried> {
        let env = &self.ports.env;
        let floor = within(&**env, PROBE, work.floor(slot.fecha)).await;
        let floor = floor.unwrap_or_else(|| Err(PortError::retryable("ask for the highest epoch: no answer").code("ETIMEDOUT")));
        // A run that writes nothing may have any epoch.
        let run = match self.begin(leading, asset, slot, *floor.as_ref().unwrap_or(&0)).await {
            Ok(run) => run,
            Err(e) if e.code.as_deref() == Some(BUSY) => return Ok(Tried::Busy(e)),
            Err(e) => return Err(e),
        };
        let mut attempts = Vec::new();
        let result = match floor {
            // So often has no other cause than a process that dies again and again.
            Ok(_) if tried > asset.retry.retries => Err(Failure::Failed {
                text: format!("gave up after {tried} tries"),
                code: None,
                may_pass: false,
                needs_room: false,
                is_told: false,
            }),
            Ok(_) => self.attempt(leading, asset, work, &Job { slot, run: run.clone() }, began, &mut attempts).await?,
            Err(e) => Err(failed(&e)),
        };
        let questions = attempts.len();
        match result {
            Ok(report) => {
                self.decide("end", asset, slot, "succeeded");
                self.end(leading, asset, run, RunState::Succeeded, report).await?;
                for kind in ENDED_BY_SUCCESS {
                    leading.outbox.resolve(&key(kind, asset, slot)).await?;
                }
                Ok(Tried::Over)
            }
            Err(Failure::Held { text, is_told, checks }) => {
                self.decide("end", asset, slot, "held");
                let mut report = json!({ "error": text, "final": true, "questions": questions });
                if !checks.is_empty() {
                    report["checks"] = json!(checks);
                }
                self.end(leading, asset, run, RunState::Held, report).await?;
                if !is_told {
                    let summary = format!("{} of {}: {text}", asset.name, slot.fecha);
                    self.tell(leading, asset, slot, "day_held", asset.priority, summary).await?;
                }
                Ok(Tried::Over)
            }
            Err(Failure::Failed { text, code, may_pass, needs_room, is_told }) => {
                let next = asset.retry.next(tried + 1, began, env.now(), env.random()).filter(|_| may_pass);
                let report = json!({
                    "error": text, "code": code, "final": next.is_none(), "next_try": next, "questions": questions
                });
                self.decide("end", asset, slot, if next.is_some() { "failed, again" } else { "failed" });
                self.end(leading, asset, run, RunState::Failed, report).await?;
                if let Some(next) = next {
                    warn!(asset = %asset.name, fecha = %slot.fecha, tried = tried + 1, %next, error = %text, "run failed, again later");
                    if needs_room {
                        // Nobody makes room who has not been told, and the tries that are left fail like this one.
                        let summary = format!("{} of {}: {text}; make room, it is tried again at {next}", asset.name, slot.fecha);
                        self.tell(leading, asset, slot, "run_failed", asset.priority, summary).await?;
                    }
                    return Ok(Tried::Again);
                }
                if !is_told {
                    let summary = format!("{} of {}: {text}", asset.name, slot.fecha);
                    self.tell(leading, asset, slot, "run_failed", asset.priority, summary).await?;
                }
                Ok(Tried::Over)
            }
        }
    }

    /// What a run does: it waits for the source, passes the breaker and works. An error is the lease's or the ledger's.
    async fn attempt(
        &self,
        leading: &Leading,
        asset: &Asset,
        work: &dyn Work,
        job: &Job,
        began: DateTime<Utc>,
        attempts: &mut Vec<Attempt>,
    ) -> Result<std::result::Result<Value, Failure>> {
        let env = &self.ports.env;
        let away = key("source_unavailable", asset, job.slot);
        let waiting = Waiting {
            env: &**env,
            notifier: &leading.outbox,
            policy: &asset.source_policy,
            alert_after_s: asset.alert_after_s,
            startup_s: 0,
            scheduled: began,
            key: &away,
        };
        let probe = || async {
            let answer = within(&**env, PROBE, work.ready()).await;
            answer.unwrap_or_else(|| Err(PortError::retryable("ask the source: no answer").code("ETIMEDOUT")))
        };
        if let Err(e) = wait_for_source(&waiting, probe, attempts).await {
            if e.code.as_deref() == Some(FENCED) {
                return Err(e);
            }
            let text = format!("the source does not answer: {}", e.chain());
            return Ok(Err(Failure::Failed { text, code: e.code, may_pass: false, needs_room: false, is_told: true }));
        }
        if let Err(failure) = self.pass_breaker(leading, asset, work, job).await? {
            return Ok(Err(failure));
        }
        let result = within(&**env, Duration::from_secs(asset.timeout_s), work.run(job)).await;
        Ok(match result {
            Some(Ok(report)) => Ok(report),
            Some(Err(WorkError::Held { gate, text })) => {
                Err(Failure::Held { text: format!("held by {gate}: {text}"), is_told: false, checks: Vec::new() })
            }
            Some(Err(WorkError::Port(e))) => Err(failed(&e)),
            None => Err(Failure::Failed {
                text: format!("cancelled: no end within {} s", asset.timeout_s),
                code: Some("TIMEOUT".into()),
                may_pass: true,
                needs_room: false,
                is_told: false,
            }),
        })
    }

    /// Lets a run through when all checks pass; waits and tries again while they do not.
    async fn pass_breaker(
        &self,
        leading: &Leading,
        asset: &Asset,
        work: &dyn Work,
        job: &Job,
    ) -> Result<std::result::Result<(), Failure>> {
        let (env, ledger) = (&self.ports.env, &self.ports.ledger);
        let facts = self.patiently(|| ledger.facts(breaker::TOPIC)).await?;
        let mut breaker = Breaker::recall(&facts, &asset.name);
        loop {
            if let Some(until) = breaker.wait(env.now()) {
                sleep_until(&**env, until).await;
            }
            let before = breaker.clone();
            breaker = breaker.try_again(job.slot);
            if breaker != before {
                self.keep_breaker(leading, asset, &breaker).await?;
            }
            let checks = within(&**env, Duration::from_secs(asset.timeout_s), work.checks(job.slot)).await;
            let (failures, is_only_away) = match &checks {
                Some(results) => {
                    if !results.is_empty() {
                        leading.fence()?;
                        self.patiently(|| ledger.put_quality(results)).await?;
                    }
                    (breaker::failures(results), breaker::is_only_away(results))
                }
                None => (Some(format!("checks: no end within {} s", asset.timeout_s)), true),
            };
            let Some(failures) = failures else {
                if breaker != Breaker::Closed {
                    self.keep_breaker(leading, asset, &Breaker::Closed).await?;
                    leading.outbox.resolve(&key("breaker_open", asset, job.slot)).await?;
                }
                return Ok(Ok(()));
            };
            let (open, gives_up) = breaker.fail(asset.breaker, job.slot, env.now(), failures.clone());
            self.keep_breaker(leading, asset, &open).await?;
            breaker = open;
            self.decide("breaker", asset, job.slot, if gives_up { "given up" } else { "open" });
            let summary = format!("{} of {}: the checks before processing fail: {failures}", asset.name, job.slot.fecha);
            self.tell(leading, asset, job.slot, "breaker_open", asset.priority, summary).await?;
            if gives_up {
                let text = format!("the checks before processing fail: {failures}");
                return Ok(Err(if is_only_away {
                    Failure::Failed { text, code: Some("BREAKER_OPEN".into()), may_pass: false, needs_room: false, is_told: true }
                } else {
                    let checks = checks.iter().flatten().filter(|r| breaker::is_failure(r)).map(|r| r.check.clone()).collect();
                    Failure::Held { text, is_told: true, checks }
                }));
            }
        }
    }

    async fn keep_breaker(&self, leading: &Leading, asset: &Asset, breaker: &Breaker) -> Result<()> {
        let value = if *breaker == Breaker::Closed { Value::Null } else { serde_json::to_value(breaker).unwrap_or_default() };
        let fact = Fact { topic: breaker::TOPIC.into(), name: asset.name.clone(), value, at: self.ports.env.now() };
        let fence = leading.fence()?;
        self.patiently(|| self.ports.ledger.put_fact(&fact, Some(&fence))).await?;
        let is_open = f64::from(u8::from(*breaker != Breaker::Closed));
        self.ports.metrics.gauge("simulacro_breaker_open", &[("asset", asset.name.as_str())], is_open);
        Ok(())
    }

    /// Closes the breaker that the turn of an incident has opened, once a run by hand has succeeded instead. The turn is over,
    /// so nobody else does before the next one, and until then whoever looks would see a trial that never comes.
    async fn close_breaker(&self, leading: &Leading, about: &About<'_>) -> Result<()> {
        let Some(asset) = self.plan.asset(about.asset) else { return Ok(()) };
        let facts = self.patiently(|| self.ports.ledger.facts(breaker::TOPIC)).await?;
        match Breaker::recall(&facts, &asset.name) {
            Breaker::Open { scheduled, .. } | Breaker::HalfOpen { scheduled, .. }
                if about.fecha.is_none_or(|fecha| asset.slot(scheduled).fecha == fecha) =>
            {
                self.keep_breaker(leading, asset, &Breaker::Closed).await
            }
            Breaker::Open { .. } | Breaker::HalfOpen { .. } | Breaker::Closed => Ok(()),
        }
    }

    /// Looks at each turn at the moment of its SLA, for ever.
    pub(super) async fn watch(&self, leading: &Leading, asset: &Asset, sla_s: u64) -> Result<()> {
        let env = &self.ports.env;
        let sla = Duration::from_secs(sla_s);
        let since = self.since(leading, asset).await?;
        // The newest turn may be late already.
        let mut next = asset.schedule.newest(env.now()).filter(|t| *t > since).or_else(|| asset.schedule.next(env.now()));
        while let Some(scheduled) = next {
            while env.now() < scheduled + sla {
                sleep_until(&**env, scheduled + sla).await;
            }
            let slot = asset.slot(scheduled);
            let end = self.turn(asset, slot).await?.end;
            // A skip is a decision, or is told of as such.
            if !matches!(end, Some(RunState::Succeeded | RunState::Skipped)) {
                let state = end.map_or("not done", RunState::as_str);
                let missed = key("sla_missed", asset, slot);
                if !leading.outbox.open_incidents().iter().any(|e| e.alert.dedup_key == missed) {
                    self.decide("sla", asset, slot, "missed");
                    self.ports.metrics.count("simulacro_sla_missed_total", &[("asset", asset.name.as_str())], 1);
                }
                let due = (scheduled + sla).format("%Y-%m-%d %H:%M");
                let summary = format!("{} of {}: promised for {due} UTC, is {state}", asset.name, slot.fecha);
                self.tell(leading, asset, slot, "sla_missed", 1, summary).await?;
            }
            next = asset.schedule.next(scheduled);
        }
        std::future::pending().await
    }

    /// Ends incidents that a run by hand has put an end to, for ever.
    pub(super) async fn sweep(&self, leading: &Leading) -> Result<()> {
        loop {
            self.ports.env.sleep(SWEEP).await;
            for entry in leading.outbox.open_incidents() {
                let dedup_key = &entry.alert.dedup_key;
                let about = About::of(dedup_key);
                if about.kind == "schedule_missed" && self.ports.env.now() >= entry.since + NEWS {
                    leading.outbox.resolve(dedup_key).await?;
                }
                if !about.ends_by_success() {
                    continue;
                }
                let from = about.first(entry.since);
                let runs = self.patiently(|| self.ports.ledger.runs_since(about.asset, from)).await?;
                if about.is_ended(&entry.ends_from, &runs) {
                    if about.kind == "breaker_open" {
                        self.close_breaker(leading, &about).await?;
                    }
                    leading.outbox.resolve(dedup_key).await?;
                }
            }
        }
    }
}

fn failed(error: &PortError) -> Failure {
    Failure::Failed {
        text: error.chain(),
        code: error.code.clone(),
        may_pass: error.disposition != Disposition::Permanent,
        needs_room: error.is_out_of_space(),
        is_told: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_by_hand_is_instead_of_a_turn_after_its_schedule_or_after_its_first_try() {
        let scheduled: DateTime<Utc> = "2024-03-05T03:00:00Z".parse().expect("a time");
        let slot = crate::assets::ecommerce_batch_daily().expect("an asset").slot(scheduled);
        let run = |epoch, state, scheduled_at: Option<DateTime<Utc>>, started_at: DateTime<Utc>| Run {
            pipeline: "p".into(),
            fecha: slot.fecha,
            epoch,
            run_id: String::new(),
            state,
            started_at,
            finished_at: None,
            scheduled_at,
            fence: None,
            report: json!({ "final": true }),
        };
        let (early, late) = (scheduled - Duration::from_secs(60), scheduled + Duration::from_secs(60));
        let end = |runs: &[Run]| Turn::of(runs, slot).end;
        let own = run(1, RunState::Failed, Some(scheduled), scheduled);
        assert_eq!(end(&[run(1, RunState::Succeeded, None, early)]), None);
        assert_eq!(end(&[run(1, RunState::Succeeded, None, late)]), Some(RunState::Succeeded));
        // The clock of whoever ran it is behind that of the orchestrator.
        assert_eq!(end(&[own.clone(), run(2, RunState::Succeeded, None, early)]), Some(RunState::Succeeded));
        assert_eq!(end(&[run(1, RunState::Succeeded, None, early), Run { epoch: 2, ..own }]), Some(RunState::Failed));
    }
}
