//! What a `RunLedger` promises.
//!
//! The suite gets a function that opens the same ledger as another process would; dropping what it returned is the
//! death of that process.
#![expect(clippy::disallowed_methods, reason = "a test waits for a real server")]

use std::{future::Future, time::Duration};

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use serde_json::json;
use simulacro_core::{
    contract::{Severity, check::QualityResult},
    ports::{BUSY, Disposition, FENCED, Fact, Fence, Fold, PipelineMetric, PortError, Run, RunLedger, RunStart, RunState},
};

const TTL: Duration = Duration::from_secs(60);

fn day(number: u32) -> NaiveDate {
    NaiveDate::from_ymd_opt(2024, 3, number).expect("a day")
}

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp_micros(1_710_730_815_123_456).expect("a time")
}

/// Every promise in turn. The ledger is empty.
pub async fn check<L: RunLedger, F: Future<Output = L>>(open: impl Fn() -> F) {
    epochs_rise_above_the_floor_and_all_earlier(&open().await).await;
    a_finished_run_is_kept_as_it_was_given(&open().await).await;
    runs_come_by_day_and_epoch(&open().await).await;
    a_held_pipeline_is_busy(&open().await, &open().await).await;
    two_beginners_at_once_are_one_holder(&open().await, &open().await).await;
    pipelines_do_not_hold_each_other(&open().await).await;
    a_dead_process_is_taken_over(&open).await;
    runs_since_a_day_leave_out_earlier_ones(&open().await).await;
    an_abandoned_run_is_closed_by_the_next(&open().await, &open().await).await;
    one_wins_the_lease_and_the_other_is_told_who(&open().await, &open().await).await;
    an_expired_lease_changes_hands_with_a_higher_token(&open().await, &open().await).await;
    a_released_lease_is_free_and_its_token_is_old(&open().await, &open().await).await;
    many_that_ask_at_once_get_one_lease(&open().await, &open().await).await;
    a_zombie_with_an_old_token_is_refused(&open().await, &open().await).await;
    a_fact_is_kept_replaced_and_taken_away(&open().await, &open().await).await;
    metrics_are_kept_once_per_run_and_asset(&open().await).await;
    quality_results_are_kept_as_they_were_given(&open().await).await;
    runs_go_with_the_fact_that_stands_for_them_or_not_at_all(&open().await, &open().await).await;
    outcomes_that_passed_go_but_for_the_last(&open().await).await;
}

fn start(pipeline: &str, fence: Option<Fence>) -> RunStart {
    let (pipeline, run_id) = (pipeline.to_owned(), "r".to_owned());
    RunStart { pipeline, fecha: day(1), run_id, floor: 0, now: now(), scheduled_at: None, fence }
}

fn code(error: &PortError) -> (Disposition, Option<&str>) {
    (error.disposition, error.code.as_deref())
}

async fn runs_since_a_day_leave_out_earlier_ones(ledger: &dyn RunLedger) {
    let scheduled_at = Some(now() + TimeDelta::microseconds(7));
    for fecha in [day(1), day(2), day(3), day(3)] {
        let run = ledger.start(&RunStart { fecha, scheduled_at, ..start("desde", None) }).await.expect("the pipeline is free");
        ledger.finish(&Run { state: RunState::Skipped, ..run }).await.expect("the run ends");
    }
    let runs = ledger.runs_since("desde", day(2)).await.expect("the ledger answers");
    assert_eq!(runs.iter().map(|r| (r.fecha, r.epoch)).collect::<Vec<_>>(), [(day(2), 1), (day(3), 1), (day(3), 2)]);
    assert!(runs.iter().all(|r| r.scheduled_at == scheduled_at && r.state == RunState::Skipped), "{runs:?}");
    assert_eq!(ledger.runs_since("desde", day(4)).await.expect("the ledger answers"), []);
}

async fn an_abandoned_run_is_closed_by_the_next(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    let run = ledger.start(&start("abandonada", None)).await.expect("the pipeline is free");
    ledger.abandon(&run).await.expect("it lets go");
    let next = other.start(&start("abandonada", None)).await.expect("the pipeline is free");
    ledger.abandon(&run).await.expect("again, which frees nothing of the next");
    let runs = ledger.runs("abandonada").await.expect("the ledger answers");
    assert_eq!(runs.iter().map(|r| r.state).collect::<Vec<_>>(), [RunState::Failed, RunState::Running]);
    let error = ledger.start(&start("abandonada", None)).await.expect_err("the next one holds it");
    assert_eq!(code(&error), (Disposition::Retryable, Some(BUSY)));
    other.finish(&next).await.expect("the run ends");
}

async fn one_wins_the_lease_and_the_other_is_told_who(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    assert_eq!(ledger.lease("uno").await.expect("the ledger answers"), None);
    let lease = ledger.acquire_lease("uno", "el primero", TTL, now()).await.expect("the lease is free");
    assert_eq!((lease.token, lease.acquired_at, lease.expires_at), (1, now(), now() + TTL));
    for rival in [ledger, other] {
        let late = now() + TTL - TimeDelta::microseconds(1);
        let error = rival.acquire_lease("uno", "el segundo", TTL, late).await.expect_err("it is held");
        assert_eq!(code(&error), (Disposition::Retryable, Some(BUSY)));
        assert!(error.to_string().contains("el primero"), "{error}");
    }
    let renewed = ledger.renew_lease(&lease, TTL, now() + TimeDelta::seconds(20)).await.expect("it is its own");
    assert_eq!((renewed.token, renewed.expires_at), (1, now() + TimeDelta::seconds(20) + TTL));
    assert_eq!(other.lease("uno").await.expect("the ledger answers"), Some(renewed));
    other.acquire_lease("uno", "el segundo", TTL, now() + TTL).await.expect_err("it was prolonged");
    other.acquire_lease("otro", "el segundo", TTL, now()).await.expect("leases do not hold each other");
}

async fn an_expired_lease_changes_hands_with_a_higher_token(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    let first = ledger.acquire_lease("caducada", "a", TTL, now()).await.expect("the lease is free");
    // Expired, but nobody took it: it may go on.
    let first = ledger.renew_lease(&first, TTL, now() + TTL * 2).await.expect("nobody has taken it");
    let second = other.acquire_lease("caducada", "b", TTL, now() + TTL * 3).await.expect("it has expired");
    assert!(second.token > first.token, "{second:?}");
    let error = ledger.renew_lease(&first, TTL, now() + TTL * 3).await.expect_err("it is another's");
    assert_eq!(code(&error), (Disposition::Permanent, Some(FENCED)));
    ledger.release_lease(&first).await.expect("releasing what is another's is no error");
    assert_eq!(ledger.lease("caducada").await.expect("the ledger answers"), Some(second));
}

async fn a_released_lease_is_free_and_its_token_is_old(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    let first = ledger.acquire_lease("devuelta", "a", TTL, now()).await.expect("the lease is free");
    ledger.release_lease(&first).await.expect("it is given back");
    ledger.release_lease(&first).await.expect("again");
    assert_eq!(other.lease("devuelta").await.expect("the ledger answers"), None);
    let error = ledger.start(&start("devuelta", Some(first.fence()))).await.expect_err("it holds nothing");
    assert_eq!(code(&error), (Disposition::Permanent, Some(FENCED)));
    let error = ledger.renew_lease(&first, TTL, now()).await.expect_err("it holds nothing");
    assert_eq!(code(&error), (Disposition::Permanent, Some(FENCED)));
    let second = other.acquire_lease("devuelta", "b", TTL, now()).await.expect("it is free");
    assert!(second.token > first.token, "{second:?}");
}

async fn many_that_ask_at_once_get_one_lease(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    for round in 0..5_i32 {
        let at = now() + TTL * 2 * round.unsigned_abs();
        let (a, b, c) = tokio::join!(
            ledger.acquire_lease("disputada", "a", TTL, at),
            ledger.acquire_lease("disputada", "b", TTL, at),
            other.acquire_lease("disputada", "c", TTL, at)
        );
        let won = [&a, &b, &c].into_iter().filter_map(|r| r.as_ref().ok()).map(|l| l.token).collect::<Vec<_>>();
        assert_eq!(won, [i64::from(round) + 1], "{a:?} {b:?} {c:?}");
        for error in [a, b, c].into_iter().filter_map(Result::err) {
            assert_eq!(code(&error), (Disposition::Retryable, Some(BUSY)));
        }
    }
}

async fn a_zombie_with_an_old_token_is_refused(zombie: &dyn RunLedger, heir: &dyn RunLedger) {
    let old = zombie.acquire_lease("zombi", "a", TTL, now()).await.expect("the lease is free");
    let mut run = zombie.start(&start("zombi", Some(old.fence()))).await.expect("the pipeline is free");
    assert_eq!(run.fence, Some(old.fence()));
    let new = heir.acquire_lease("zombi", "b", TTL, now() + TTL).await.expect("it has expired");

    run.state = RunState::Succeeded;
    let error = zombie.finish(&run).await.expect_err("an old token ends nothing");
    assert_eq!(code(&error), (Disposition::Permanent, Some(FENCED)));
    assert_eq!(heir.runs("zombi").await.expect("the ledger answers")[0].state, RunState::Running, "nothing was written");
    let error = zombie.start(&start("zombi", Some(old.fence()))).await.expect_err("an old token begins nothing");
    assert_eq!(code(&error), (Disposition::Permanent, Some(FENCED)));
    assert_eq!(heir.runs("zombi").await.expect("the ledger answers").len(), 1, "nothing was written");
    let fact = Fact { topic: "zombi".into(), name: "x".into(), value: json!(1), at: now() };
    let error = zombie.put_fact(&fact, Some(&old.fence())).await.expect_err("an old token keeps nothing");
    assert_eq!(code(&error), (Disposition::Permanent, Some(FENCED)));
    assert_eq!(heir.facts("zombi").await.expect("the ledger answers"), []);

    let next = heir.start(&start("zombi", Some(new.fence()))).await.expect("the zombie has let go");
    let finished = Run { state: RunState::Succeeded, finished_at: Some(now()), ..next };
    heir.finish(&finished).await.expect("the run ends");
    heir.put_fact(&fact, Some(&new.fence())).await.expect("the fact is kept");
    let runs = zombie.runs("zombi").await.expect("the ledger answers");
    assert_eq!((runs[0].state, &runs[1]), (RunState::Failed, &finished));
}

async fn a_fact_is_kept_replaced_and_taken_away(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    let fact = |name: &str, value| Fact { topic: "tema".into(), name: name.into(), value, at: now() };
    let (b, a, accented) = (fact("b", json!({ "por": "ana" })), fact("a", json!([1, "ñ"])), fact("Z", json!("x")));
    for fact in [&b, &a, &accented, &a] {
        ledger.put_fact(fact, None).await.expect("the fact is kept");
    }
    assert_eq!(other.facts("tema").await.expect("the ledger answers"), [accented.clone(), a.clone(), b]);
    let later = Fact { at: now() + TimeDelta::days(1), ..fact("b", json!("otra")) };
    other.put_fact(&later, None).await.expect("the fact is replaced");
    for _ in 0..2 {
        other.put_fact(&fact("a", json!(null)), None).await.expect("the fact is taken away");
    }
    assert_eq!(ledger.facts("tema").await.expect("the ledger answers"), [accented, later]);
    assert_eq!(ledger.facts("nada").await.expect("the ledger answers"), []);
}

async fn metrics_are_kept_once_per_run_and_asset(ledger: &dyn RunLedger) {
    let metric = |run_id: &str, asset: &str, expected_rows| PipelineMetric {
        pipeline_name: "medida".into(),
        asset: asset.into(),
        fecha: day(5),
        run_id: run_id.into(),
        expected_rows,
        actual_rows: 2,
        published: 3,
        deduplicated: 4,
        quarantined: 5,
        rejected: 6,
        late: 7,
        dead_lettered: 8,
        bytes: 9,
        duration_ms: 10,
        version: "0.1.0".into(),
    };
    let all = [metric("r-1", "b", 1), metric("r-1", "a", 1), metric("r-0", "c", 1)];
    ledger.put_metrics(&all).await.expect("metrics are kept");
    ledger.put_metrics(&[]).await.expect("nothing is kept");
    // A repeat replaces, also within one call.
    ledger.put_metrics(&[metric("r-1", "b", 50), metric("r-1", "b", 70_000_000_000)]).await.expect("metrics are kept");
    let expected = [metric("r-0", "c", 1), metric("r-1", "a", 1), metric("r-1", "b", 70_000_000_000)];
    assert_eq!(ledger.metrics(day(5)).await.expect("the ledger answers"), expected);
    assert_eq!(ledger.metrics(day(6)).await.expect("the ledger answers"), []);
    let many: Vec<_> = (0..2_500).map(|i| PipelineMetric { fecha: day(7), ..metric("r-2", &format!("{i:05}"), i) }).collect();
    ledger.put_metrics(&many).await.expect("metrics are kept");
    assert_eq!(ledger.metrics(day(7)).await.expect("the ledger answers"), many);
}

async fn quality_results_are_kept_as_they_were_given(ledger: &dyn RunLedger) {
    let result = |check: &str, severity, passed| QualityResult {
        check: check.into(),
        layer: "raw".into(),
        asset: "ventas".into(),
        fecha: day(5),
        severity,
        passed,
        observed: "300 rows ñ '\"".into(),
        expected: "0 rows".into(),
        failing_rows: 300,
        checked_at: now(),
    };
    let first = result("b", Severity::Error, false);
    let all = [first.clone(), result("a", Severity::Warning, true), result("c", Severity::Info, true)];
    for _ in 0..2 {
        ledger.put_quality(&all).await.expect("results are kept");
    }
    let changed = QualityResult { passed: true, observed: "0 rows".into(), failing_rows: 0, ..first.clone() };
    let later = QualityResult { checked_at: now() + TimeDelta::microseconds(1), ..first };
    ledger.put_quality(&[later.clone(), changed.clone()]).await.expect("results are kept");
    let expected = [all[1].clone(), changed, all[2].clone(), later];
    assert_eq!(ledger.quality(day(5)).await.expect("the ledger answers"), expected);
    assert_eq!(ledger.quality(day(6)).await.expect("the ledger answers"), []);
}

async fn runs_go_with_the_fact_that_stands_for_them_or_not_at_all(ledger: &dyn RunLedger, heir: &dyn RunLedger) {
    for fecha in [day(1), day(1), day(2), day(2)] {
        let run = ledger.start(&RunStart { fecha, ..start("plegada", None) }).await.expect("the pipeline is free");
        ledger.finish(&Run { state: RunState::Succeeded, ..run }).await.expect("the run ends");
    }
    let present = ledger.start(&RunStart { fecha: day(3), ..start("plegada", None) }).await.expect("the pipeline is free");
    let fact = Fact { topic: "plegadas".into(), name: "a".into(), value: json!({ "n": 2 }), at: now() };
    let runs = vec![(day(1), 1), (day(2), 1), (day(2), 9), (day(3), 1)];
    let fold = Fold { pipeline: "plegada".into(), runs, fact: fact.clone() };
    let left = async || {
        let runs = ledger.runs("plegada").await.expect("the ledger answers");
        runs.iter().map(|r| (r.fecha, r.epoch)).collect::<Vec<_>>()
    };
    let old = ledger.acquire_lease("plegar", "a", TTL, now()).await.expect("the lease is free");
    ledger.release_lease(&old).await.expect("the lease is given back");
    heir.acquire_lease("plegar", "b", TTL, now()).await.expect("the lease is free");
    let error = ledger.fold_runs(&fold, Some(&old.fence())).await.expect_err("the token is an old one");
    assert_eq!(code(&error), (Disposition::Permanent, Some(FENCED)));
    assert_eq!((left().await.len(), ledger.facts("plegadas").await.expect("the ledger answers").len()), (5, 0));
    for _ in 0..2 {
        ledger.fold_runs(&fold, None).await.expect("the runs go");
        // One that is under way stays.
        assert_eq!(left().await, [(day(1), 2), (day(2), 2), (day(3), 1)]);
        assert_eq!(heir.facts("plegadas").await.expect("the ledger answers"), std::slice::from_ref(&fact));
    }
    ledger.finish(&Run { state: RunState::Succeeded, ..present }).await.expect("the run ends");
}

async fn outcomes_that_passed_go_but_for_the_last(ledger: &dyn RunLedger) {
    let result = |fecha: u32, layer: &str, check: &str, second: i64, passed| QualityResult {
        check: check.into(),
        layer: layer.into(),
        asset: "clicks".into(),
        fecha: day(fecha),
        severity: Severity::Error,
        passed,
        observed: String::new(),
        expected: String::new(),
        failing_rows: 0,
        checked_at: now() + TimeDelta::seconds(second),
    };
    let of_day = |fecha| {
        vec![
            result(fecha, "otra", "a", 0, true),
            result(fecha, "mirada", "a", 1, true),
            result(fecha, "mirada", "b", 2, true),
            result(fecha, "mirada", "a", 3, false),
            result(fecha, "mirada", "a", 4, true),
            result(fecha, "mirada", "a", 5, true),
        ]
    };
    for fecha in [20, 21] {
        ledger.put_quality(&of_day(fecha)).await.expect("results are kept");
    }
    let (before, at) = (now() + TimeDelta::seconds(4), now() + TimeDelta::days(1));
    for gone in [1, 0] {
        assert_eq!(ledger.thin_quality("mirada", day(20), before).await.expect("the ledger answers"), gone);
    }
    let mut expected = of_day(20);
    expected.remove(1);
    assert_eq!(ledger.quality(day(20)).await.expect("the ledger answers"), expected);
    assert_eq!(ledger.quality(day(21)).await.expect("the ledger answers"), of_day(21));
    // The failure stays, and the last of each check.
    assert_eq!(ledger.thin_quality("mirada", day(20), at).await.expect("the ledger answers"), 1);
    expected.remove(3);
    assert_eq!(ledger.quality(day(20)).await.expect("the ledger answers"), expected);
}

async fn epochs_rise_above_the_floor_and_all_earlier(ledger: &dyn RunLedger) {
    let mut epochs = Vec::new();
    for (floor, fecha) in [(0, day(1)), (0, day(1)), (7, day(1)), (3, day(1)), (0, day(2))] {
        let mut run = ledger.begin("epocas", fecha, "r", floor, now()).await.expect("the pipeline is free");
        epochs.push(run.epoch);
        run.state = RunState::Failed;
        ledger.finish(&run).await.expect("the run ends");
    }
    assert_eq!(epochs, [1, 2, 8, 9, 1]);
}

async fn a_finished_run_is_kept_as_it_was_given(ledger: &dyn RunLedger) {
    let mut run = ledger.begin("guardada", day(1), "r-1", 0, now()).await.expect("the pipeline is free");
    assert_eq!((run.state, run.started_at, run.finished_at), (RunState::Running, now(), None));
    assert_eq!(ledger.runs("guardada").await.expect("the ledger answers"), [run.clone()]);
    for state in [RunState::Held, RunState::Failed, RunState::Succeeded] {
        run.state = state;
        run.finished_at = Some(now() + TimeDelta::microseconds(1_234_567_891));
        run.report = json!({ "fates": { "published": 14_850, "rejected": 12 }, "text": "ñ 'quoted' \u{1F9A4}", "share": 0.25 });
        // Ending a run is idempotent.
        ledger.finish(&run).await.expect("the run ends");
        ledger.finish(&run).await.expect("the run ends again");
        assert_eq!(ledger.runs("guardada").await.expect("the ledger answers"), [run.clone()]);
    }
}

async fn runs_come_by_day_and_epoch(ledger: &dyn RunLedger) {
    for fecha in [day(9), day(3), day(9), day(1)] {
        let run = ledger.begin("orden", fecha, "r", 0, now()).await.expect("the pipeline is free");
        ledger.finish(&run).await.expect("the run ends");
    }
    let runs = ledger.runs("orden").await.expect("the ledger answers");
    assert_eq!(runs.iter().map(|r| (r.fecha, r.epoch)).collect::<Vec<_>>(), [(day(1), 1), (day(3), 1), (day(9), 1), (day(9), 2)]);
    assert_eq!(ledger.runs("nadie").await.expect("the ledger answers"), []);
}

async fn a_held_pipeline_is_busy(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    let run = ledger.begin("ocupada", day(1), "r-1", 0, now()).await.expect("the pipeline is free");
    for rival in [ledger, other] {
        for fecha in [day(1), day(2)] {
            let error = rival.begin("ocupada", fecha, "r-2", 0, now()).await.expect_err("the pipeline is held");
            assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Retryable, Some("BUSY")));
            assert!(error.to_string().contains("ocupada"), "{error}");
        }
    }
    assert_eq!(ledger.runs("ocupada").await.expect("the ledger answers").len(), 1);
    ledger.finish(&run).await.expect("the run ends");
    let next = other.begin("ocupada", day(1), "r-2", 0, now()).await.expect("the pipeline is free again");
    assert_eq!(next.epoch, 2);
    other.finish(&next).await.expect("the run ends");
}

async fn two_beginners_at_once_are_one_holder(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    for _ in 0..5 {
        let (a, b, c) = tokio::join!(
            ledger.begin("carrera", day(1), "a", 0, now()),
            ledger.begin("carrera", day(1), "b", 0, now()),
            other.begin("carrera", day(1), "c", 0, now())
        );
        let mut holders = Vec::new();
        for (of, result) in [(ledger, a), (ledger, b), (other, c)] {
            match result {
                Ok(run) => holders.push((of, run)),
                Err(error) => assert_eq!(error.code.as_deref(), Some("BUSY"), "{}", error.chain()),
            }
        }
        assert_eq!(holders.len(), 1);
        for (of, run) in holders {
            of.finish(&run).await.expect("the run ends");
        }
    }
}

async fn pipelines_do_not_hold_each_other(ledger: &dyn RunLedger) {
    let one = ledger.begin("una", day(1), "r", 0, now()).await.expect("the pipeline is free");
    let two = ledger.begin("otra", day(1), "r", 0, now()).await.expect("the other pipeline is free");
    ledger.finish(&one).await.expect("the run ends");
    let error = ledger.begin("otra", day(1), "r", 0, now()).await.expect_err("it is still held");
    assert_eq!(error.code.as_deref(), Some("BUSY"));
    ledger.finish(&two).await.expect("the run ends");
}

async fn a_dead_process_is_taken_over<L: RunLedger, F: Future<Output = L>>(open: &impl Fn() -> F) {
    let dying = open().await;
    let lost = dying.start(&start("muerta", None)).await.expect("the pipeline is free");
    drop(dying);
    let heir = open().await;
    // A server learns of a death within moments, not within the call that follows it.
    let mut taken = heir.start(&start("muerta", None)).await;
    for _ in 0..100 {
        if taken.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        taken = heir.start(&start("muerta", None)).await;
    }
    let run = taken.expect("the dead do not hold");
    assert_eq!(run.epoch, lost.epoch + 1);
    let closed = &heir.runs("muerta").await.expect("the ledger answers")[0];
    assert_eq!((closed.state, closed.finished_at), (RunState::Failed, Some(now())), "the lost run is closed by its heir");
    heir.finish(&run).await.expect("the run ends");
}

/// Ending an old run again must not let go of the pipeline that a later run holds.
pub async fn an_old_end_does_not_free_the_present_run(ledger: &dyn RunLedger, other: &dyn RunLedger) {
    let old = ledger.begin("repetida", day(1), "r-1", 0, now()).await.expect("the pipeline is free");
    ledger.finish(&old).await.expect("the run ends");
    let present = ledger.begin("repetida", day(1), "r-2", 0, now()).await.expect("the pipeline is free");
    ledger.finish(&old).await.expect("the run ends again");
    let error = other.begin("repetida", day(1), "r-3", 0, now()).await.expect_err("the present run holds it");
    assert_eq!(error.code.as_deref(), Some("BUSY"));
    ledger.finish(&present).await.expect("the run ends");
}
