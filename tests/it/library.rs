//! The simulator as a library: the example that is not the shop gets everything that the shop gets.
#![expect(clippy::disallowed_methods, reason = "tests read and write stories")]

use crate::binaries::{output, root, said};

const EXAMPLE: &str = "examples/transfers";

fn transfers(arguments: &[&str]) -> (Option<i32>, String) {
    let run = output(EXAMPLE, arguments);
    (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run))
}

/// A story that a seed draws, with the planted mistake in it, as text. Its faults are those that make the mistake matter.
const MISTAKEN: &str = r#"
summary = "the group moves on before the output is safe"
start = "2024-01-01T00:00:00Z"
tick_ms = 20
producers = 2
workers = 2
patience_s = 120
fired_min = 1

[own]
offsets_first = 1

[[fault]]
mode = "worker_crash"
worker = 0
when = { request = "produce", nth = 4, side = "before" }
down_s = 5

[[fault]]
mode = "broker_restart"
at_s = 12
down_s = 3
"#;

#[test]
fn a_pipeline_that_is_not_the_shop_is_a_short_file_and_survives_what_seeds_draw() {
    let text = std::fs::read_to_string(root().join("sim/examples/transfers.rs")).expect("a readable file");
    assert!(text.lines().count() < 200 && !text.contains("venta"), "{} lines", text.lines().count());
    let (code, said) = transfers(&["sweep", "--seeds", "3"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("3 seeds hold, 0 fail"), "{said}");
}

#[test]
fn its_runs_repeat_and_a_planted_clock_is_found() {
    let (code, said) = transfers(&["canary", "--pairs", "1"]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = transfers(&["canary", "--pairs", "1", "--plant"]);
    assert_eq!(code, Some(5), "{said}");
}

#[test]
fn its_planted_mistake_is_caught_reported_and_shrunk_to_the_fault_that_matters() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (story, report) = (dir.path().join("story.toml"), dir.path().join("report.html"));
    std::fs::write(&story, MISTAKEN).expect("written");
    let path = story.to_str().expect("a path");
    let (code, said) = transfers(&["run", path, "--report", report.to_str().expect("a path")]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("invariant balances"), "{said}");
    let page = std::fs::read_to_string(&report).expect("a report");
    assert!(page.contains("offsets_first") && page.contains("balances"), "the report says what broke");
    let (code, said) = transfers(&["shrink", path]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("worker_crash") && !said.contains("broker_restart"), "{said}");
}
