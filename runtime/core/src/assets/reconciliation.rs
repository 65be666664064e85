//! `batch_stream_reconciliation`: yesterday's batch against yesterday's stream, every morning.
//!
//! The asset depends on the daily batch and waits, as sensors do, until the stream has closed the day too, with a deadline of
//! its own. What came of it is kept as `simulacro reconcile` keeps it. Days are looked at again while that can change what is
//! known of them: the day before yesterday always, once the batch of yesterday is there, since a purchase that a wrong clock
//! put across midnight is explained by the sale of the other day; and days that are not kept yet or have something
//! unexplained, for as long as the topic of clicks has them whole.
//!
//! A difference above the second bound, and a cent that nothing explains, hold the turn, which is an alert that the next
//! good turn ends: as an asset of the present this one has one incident, not one for each day. A difference between the two
//! bounds is an alert of the lowest priority, which stays for a day. Left out: repairing a day.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};
use serde_json::json;
use tracing::{info, warn};

use crate::{
    batch::MART,
    contract::{Severity, check::QualityResult},
    orchestrator::{Job, Work, WorkError},
    platform::Platform,
    ports::{Alert, Fact, Fence, Result, event_log::TopicPartition},
    slo::samples::{RECONCILED, Reconciled},
    streaming::{
        config::{StreamConfig, ms},
        reconcile::{Bounds, Verdict, verdict},
        reconciliation::Reconciliation,
    },
};

/// Name of the check of the difference.
pub const DIFFERENCE_CHECK: &str = "batch_stream_difference";
/// Name of the check of what nothing explains.
pub const UNEXPLAINED_CHECK: &str = "batch_stream_unexplained";
/// Kind of the alert of a difference between the two bounds, and topic of the facts that one is out.
pub const WARNING: &str = "reconciliation_warning";
/// Layer of the checks.
const LAYER: &str = "reconciliation";
/// A stream that began so early on a day has it whole.
const OPENING: Duration = Duration::from_secs(3_600);

/// Reconciles the day before the one on which it is scheduled; see the module.
#[derive(Debug)]
pub struct StreamReconciliation {
    /// The platform with both sides.
    pub platform: Arc<Platform>,
    /// The job.
    pub config: StreamConfig,
    /// How often an incomplete side is looked at again.
    pub every: Duration,
    /// How long that is waited for.
    pub deadline: Duration,
    /// How many days before yesterday are looked at again.
    pub back: u64,
}

impl StreamReconciliation {
    /// As it ships: every five minutes, for three hours, and six days back.
    pub fn new(platform: Arc<Platform>, config: StreamConfig) -> Self {
        let (every, deadline) = (Duration::from_secs(300), Duration::from_secs(10_800));
        Self { platform, config, every, deadline, back: 6 }
    }

    /// Whether the topic of clicks has a whole day: it begins before it, and nothing of it is gone.
    async fn has_whole(&self, fecha: NaiveDate) -> Result<bool> {
        let (log, topic) = (&self.platform.ports.log, &self.config.topics.clicks);
        let begins_ms = midnight(fecha).timestamp_millis();
        let mut is_covered = false;
        for (partition, (oldest, end)) in log.offsets(topic).await? {
            let (mut from, mut first) = (oldest, None);
            while from < end && first.is_none() {
                let (records, next) = log.read(&TopicPartition { topic: topic.clone(), partition }, from, 1).await?;
                first = records.first().map(|record| record.appended_ms);
                if next <= from {
                    break;
                }
                from = next;
            }
            let Some(first) = first else { continue };
            if oldest > 0 && first > begins_ms {
                return Ok(false);
            }
            // A topic from which nothing has gone may be as old as the day.
            is_covered |= first <= begins_ms + if oldest == 0 { ms(OPENING) } else { 0 };
        }
        Ok(is_covered)
    }

    /// Days before yesterday that are worth another look, oldest first.
    async fn again(&self, yesterday: NaiveDate, kept: &BTreeMap<NaiveDate, Reconciled>) -> Result<Vec<NaiveDate>> {
        let lakehouse = &self.platform.ports.lakehouse;
        let mut days = Vec::new();
        for back in (1..=self.back).rev() {
            let Some(fecha) = yesterday.checked_sub_days(Days::new(back)) else { continue };
            if !is_open(back, kept.get(&fecha)) || lakehouse.last_epoch(MART, fecha).await?.is_none() {
                continue;
            }
            if self.has_whole(fecha).await? {
                days.push(fecha);
            }
        }
        Ok(days)
    }

    /// Keeps a day, and says what is wrong with it that nobody has been told of.
    async fn keep(&self, found: &Reconciliation, before: Option<&Reconciled>) -> Result<Vec<String>> {
        let ports = &self.platform.ports;
        found.keep(&*ports.ledger, ports.env.now()).await?;
        ports.ledger.put_quality(&outcomes(found, ports.env.now())).await?;
        let (fecha, total) = (found.fecha, &found.day.total);
        info!(%fecha, batch = total.batch, stream = total.stream, unexplained = found.unexplained(), "day reconciled");
        Ok(problems(found, before))
    }

    /// Tells of a difference between the two bounds. The mark is there before the alert, so that none is left open.
    async fn caution(&self, found: &Reconciliation, fence: Option<&Fence>) -> Result<()> {
        let (ports, name) = (&self.platform.ports, found.fecha.to_string());
        let fact = Fact { topic: WARNING.into(), name: name.clone(), value: json!(true), at: ports.env.now() };
        ports.ledger.put_fact(&fact, fence).await?;
        let summary = format!("{name}: batch and stream differ by {}", found.day.total.ratio);
        let dedup_key = format!("{WARNING}:{name}");
        ports.notifier.raise(&Alert { dedup_key, kind: WARNING.into(), priority: 3, summary }).await
    }

    /// Ends the alerts of days before this one: they were news.
    async fn calm(&self, yesterday: NaiveDate, fence: Option<&Fence>) -> Result<()> {
        let ports = &self.platform.ports;
        for fact in ports.ledger.facts(WARNING).await? {
            if fact.name.parse().is_ok_and(|fecha: NaiveDate| fecha >= yesterday) {
                continue;
            }
            ports.notifier.resolve(&format!("{WARNING}:{}", fact.name)).await?;
            ports.ledger.put_fact(&Fact { value: serde_json::Value::Null, ..fact }, fence).await?;
        }
        Ok(())
    }

    /// Waits until both sides of a day are complete, or the deadline is there: then it says how far they are.
    async fn complete(&self, fecha: NaiveDate) -> Result<std::result::Result<Reconciliation, String>> {
        let env = &self.platform.ports.env;
        let give_up_at = env.now() + self.deadline;
        loop {
            let found = self.platform.reconcile_day(&self.config, fecha).await?;
            let standing = match found {
                Some(found) if found.day.total.verdict != Verdict::Pending => return Ok(Ok(found)),
                Some(Reconciliation { batch_through, stream_through, .. }) => {
                    let side = |through: Option<NaiveDate>| through.map_or("nothing".into(), |day| day.to_string());
                    format!("batch complete through {} and stream through {}", side(batch_through), side(stream_through))
                }
                None => "the day on neither side".into(),
            };
            if env.now() >= give_up_at {
                return Ok(Err(format!("found {standing}")));
            }
            warn!(%fecha, standing, "waiting for both sides");
            env.sleep(self.every).await;
        }
    }

    async fn reconcile(&self, job: &Job) -> Result<std::result::Result<serde_json::Value, (&'static str, String)>> {
        let Some(yesterday) = job.slot.scheduled.date_naive().pred_opt() else { return Ok(Ok(json!({}))) };
        let (ports, fence) = (&self.platform.ports, job.run.fence.as_ref());
        let facts = ports.ledger.facts(RECONCILED).await?.into_iter();
        let read = |fact: Fact| Some((fact.name.parse().ok()?, serde_json::from_value(fact.value).ok()?));
        let kept: BTreeMap<NaiveDate, Reconciled> = facts.filter_map(read).collect();
        self.calm(yesterday, fence).await?;
        let (mut problems, mut days) = (Vec::new(), Vec::new());
        let line = |found: &Reconciliation, is_again: bool| {
            let total = &found.day.total;
            let (batch, stream, unexplained) = (total.batch, total.stream, found.unexplained());
            json!({ "fecha": found.fecha, "batch": batch, "stream": stream, "verdict": total.verdict,
                "unexplained": unexplained, "again": is_again })
        };
        let is_there = ports.lakehouse.exists(MART).await?;
        for fecha in if is_there { self.again(yesterday, &kept).await? } else { Vec::new() } {
            let found = self.platform.reconcile_day(&self.config, fecha).await?;
            if let Some(found) = found.filter(|found| found.day.total.verdict != Verdict::Pending) {
                problems.extend(self.keep(&found, kept.get(&fecha)).await?);
                days.push(line(&found, true));
            }
        }
        match self.complete(yesterday).await? {
            Err(standing) => return Ok(Err(("both_sides_complete", format!("{yesterday}: {standing}")))),
            Ok(_) if !self.has_whole(yesterday).await? => {
                let text =
                    format!("{yesterday}: {} does not have it whole, so nothing can be explained", self.config.topics.clicks);
                return Ok(Err(("events_kept", text)));
            }
            Ok(found) => {
                problems.extend(self.keep(&found, None).await?);
                if found.day.total.verdict == Verdict::Warn {
                    self.caution(&found, fence).await?;
                }
                days.push(line(&found, kept.contains_key(&yesterday)));
            }
        }
        Ok(if problems.is_empty() { Ok(json!({ "days": days })) } else { Err(("reconciliation", problems.join("; "))) })
    }
}

fn midnight(fecha: NaiveDate) -> DateTime<Utc> {
    fecha.and_time(NaiveTime::MIN).and_utc()
}

/// Whether a day so many days before yesterday is worth another look.
fn is_open(back: u64, kept: Option<&Reconciled>) -> bool {
    back == 1 || kept.is_none_or(|kept| kept.unexplained.is_some_and(|cents| cents > 0))
}

/// What is wrong with a day. A difference that was there at an earlier look has been told then.
fn problems(found: &Reconciliation, before: Option<&Reconciled>) -> Vec<String> {
    let (fecha, total) = (found.fecha, &found.day.total);
    let was_told = before.is_some_and(|kept| verdict(kept.batch, kept.stream, &Bounds::specification()) == Verdict::Fail);
    let mut out = Vec::new();
    if total.verdict == Verdict::Fail && !was_told {
        out.push(format!("{fecha}: batch and stream differ by {}", total.ratio));
    }
    let cents = found.unexplained();
    if cents > 0 {
        out.push(format!("{fecha}: {}.{:02} are unexplained", cents / 100, cents % 100));
    }
    out
}

/// The checks that a day is.
fn outcomes(found: &Reconciliation, now: DateTime<Utc>) -> Vec<QualityResult> {
    let (bounds, total, cents) = (Bounds::specification(), &found.day.total, found.unexplained());
    let result = |check: &str, severity, passed, observed, expected| QualityResult {
        check: check.into(),
        layer: LAYER.into(),
        asset: MART.into(),
        fecha: found.fecha,
        severity,
        passed,
        observed,
        expected,
        failing_rows: 0,
        checked_at: now,
    };
    let severity = if total.verdict == Verdict::Warn { Severity::Warning } else { Severity::Error };
    let expected = format!("at most {}, and never above {}", bounds.warn, bounds.fail);
    let unexplained = format!("{}.{:02} unexplained", cents / 100, cents % 100);
    vec![
        result(DIFFERENCE_CHECK, severity, total.verdict == Verdict::Pass, total.ratio.to_string(), expected),
        result(UNEXPLAINED_CHECK, Severity::Error, cents == 0, unexplained, "0.00 unexplained".into()),
    ]
}

#[async_trait]
impl Work for StreamReconciliation {
    async fn ready(&self) -> Result<()> {
        self.platform.ports.log.offsets(&self.config.topics.clicks).await.map(|_| ())
    }
    async fn floor(&self, _fecha: NaiveDate) -> Result<i64> {
        Ok(0)
    }
    async fn run(&self, job: &Job) -> Result<serde_json::Value, WorkError> {
        match self.reconcile(job).await.map_err(WorkError::Port)? {
            Ok(report) => Ok(report),
            Err((gate, text)) => Err(WorkError::Held { gate: gate.into(), text }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streaming::{
        evidence::Findings,
        reconcile::{Cause, Evidence, Revenue, Side, reconcile},
    };

    const FECHA: NaiveDate = NaiveDate::from_ymd_opt(2024, 3, 5).expect("a date");

    /// A day with so many cents on each side, of which so many are known to be late.
    fn day(batch: i64, stream: i64, late: i64) -> Reconciliation {
        let side = |cents| Side { revenue: Revenue::from([((FECHA, "sur".to_owned()), cents)]), complete_through: Some(FECHA) };
        let evidence = [Evidence { fecha: FECHA, region: "sur".into(), cause: Cause::Late, cents: late }];
        let mut days = reconcile(&side(batch), &side(stream), &evidence, &Bounds::specification());
        let day = days.remove(&FECHA).expect("the day");
        let through = Some(FECHA);
        Reconciliation { fecha: FECHA, day, findings: Findings::default(), batch_through: through, stream_through: through }
    }

    #[test]
    fn what_is_wrong_with_a_day_is_told_once_and_what_nothing_explains_until_something_does() {
        let check = |found: Reconciliation, before: Option<(i64, i64)>, expected: &[&str]| {
            let before = before.map(|(batch, stream)| Reconciled { batch, stream, unexplained: Some(1) });
            assert_eq!(problems(&found, before.as_ref()), expected);
        };
        check(day(10_000, 10_000, 0), None, &[]);
        check(day(10_000, 9_500, 500), None, &[]);
        check(day(10_000, 9_499, 501), None, &["2024-03-05: batch and stream differ by 5.01 %"]);
        check(day(10_000, 9_499, 501), Some((10_000, 9_499)), &[]);
        check(day(10_000, 9_499, 501), Some((9_600, 9_499)), &["2024-03-05: batch and stream differ by 5.01 %"]);
        for before in [None, Some((10_000, 10_001))] {
            check(day(10_000, 10_001, 0), before, &["2024-03-05: 0.01 are unexplained"]);
        }
        check(
            day(0, 29_752, 0),
            None,
            &["2024-03-05: batch and stream differ by more than 100 %", "2024-03-05: 297.52 are unexplained"],
        );
    }

    #[test]
    fn a_day_is_two_outcomes_and_a_small_difference_is_a_warning() {
        let check = |found: Reconciliation, difference: (Severity, bool), explained: bool| {
            let [first, second] = &outcomes(&found, DateTime::UNIX_EPOCH)[..] else { panic!("two outcomes") };
            assert_eq!(((first.severity, first.passed), second.passed), (difference, explained), "{first:?} {second:?}");
            assert_eq!((first.check.as_str(), second.check.as_str()), (DIFFERENCE_CHECK, UNEXPLAINED_CHECK));
            assert_eq!((first.fecha, second.severity), (FECHA, Severity::Error));
        };
        check(day(10_000, 9_800, 200), (Severity::Error, true), true);
        check(day(10_000, 9_799, 201), (Severity::Warning, false), true);
        check(day(10_000, 9_500, 499), (Severity::Warning, false), false);
        check(day(10_000, 9_499, 501), (Severity::Error, false), true);
    }

    #[test]
    fn the_day_before_is_looked_at_once_more_and_others_while_something_is_open() {
        let kept = |unexplained| Some(Reconciled { batch: 1, stream: 1, unexplained });
        let open = |back, unexplained| is_open(back, kept(unexplained).as_ref());
        assert_eq!([open(1, Some(0)), open(1, Some(3)), is_open(1, None)], [true; 3]);
        assert_eq!([open(2, Some(3)), is_open(2, None)], [true; 2]);
        assert_eq!([open(2, Some(0)), open(2, None)], [false; 2]);
    }
}
