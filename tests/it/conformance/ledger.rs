//! What a `RunLedger` promises.
//!
//! The suite gets a function that opens the same ledger as another process would; dropping what it returned is the
//! death of that process.
#![expect(clippy::disallowed_methods, reason = "a test waits for a real server")]

use std::future::Future;

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use serde_json::json;
use simulacro_core::ports::{Disposition, RunLedger, RunState};

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
    let lost = dying.begin("muerta", day(1), "r-1", 0, now()).await.expect("the pipeline is free");
    drop(dying);
    let heir = open().await;
    // A server learns of a death within moments, not within the call that follows it.
    let mut taken = heir.begin("muerta", day(1), "r-2", 0, now()).await;
    for _ in 0..100 {
        if taken.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        taken = heir.begin("muerta", day(1), "r-2", 0, now()).await;
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
