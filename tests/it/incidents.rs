//! From an incident to its document: capsules of simulated and of real runs are cut, replayed and told.
#![expect(clippy::disallowed_methods, reason = "tests read and write capsules")]

use std::path::Path;

use crate::binaries::{output, root, said, source};

const MONDAY: &str = "scenarios/incidents/monday_0300_waiting.toml";

fn sim(arguments: &[&str]) -> (Option<i32>, String) {
    let run = output("simulacro-sim", arguments);
    (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

#[test]
fn a_capsule_of_a_simulated_night_replays_to_the_letter_and_a_changed_one_is_located() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (capsule, scenario) = (dir.path().join("night.capsule"), root().join(MONDAY));
    let window = ["--from", "2024-03-18T03:00:00Z", "--to", "2024-03-18T03:30:00Z"];
    let (code, said) = sim(&[&["capture", text(&scenario), "--seed", "2", "--out", text(&capsule)], &window[..]].concat());
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = sim(&["replay", text(&capsule)]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("equal: "), "{said}");

    let changed = std::fs::read_to_string(&capsule).expect("a capsule").replacen("econnrefused", "etimedout", 1);
    std::fs::write(&capsule, changed).expect("written");
    let (code, said) = sim(&["replay", text(&capsule)]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("the replay parts at event") && said.contains("etimedout"), "{said}");
}

#[test]
fn a_seed_replays_in_two_processes() {
    let (code, said) = sim(&["replay", "3", "--world", "stream"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("equal: "), "{said}");
}

#[test]
fn a_real_day_is_captured_from_its_history_and_takes_the_same_course_in_the_simulator() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (source, data) = (source(dir.path(), |text| text), dir.path().join("lake"));
    let run = output("simulacro", &["batch", "run", "--source", text(&source), "--data", text(&data), "--date", "1997-03-17"]);
    assert_eq!(run.status.code(), Some(0), "{}", said(&run));
    let (history, capsule) = (data.join("history.jsonl"), dir.path().join("day.capsule"));
    let (code, said) = sim(&["capture", text(&history), "--out", text(&capsule)]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = sim(&["replay", text(&capsule)]);
    assert_eq!(code, Some(0), "{said}");

    let other = std::fs::read_to_string(&capsule).expect("a capsule").replace("\"analytics.metricas_diarias\"", "\"another\"");
    std::fs::write(&capsule, other).expect("written");
    let (code, said) = sim(&["replay", text(&capsule)]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("found     warehouse.load_day ok analytics.metricas_diarias"), "{said}");
}

#[test]
fn a_postmortem_has_every_heading_and_its_facts() {
    let (code, said) = sim(&["postmortem", text(&root().join(MONDAY))]);
    assert_eq!(code, Some(0), "{said}");
    for wanted in ["# Postmortem: ", "## Timeline", "## Impact", "- MTTD: ", "- MTTR: ", "source_unavailable", "## Lessons"] {
        assert!(said.contains(wanted), "no {wanted} in\n{said}");
    }
    let (code, said) = sim(&["postmortem", text(&root().join("scenarios/streaming/worker_crashes.toml"))]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("realtime") && said.contains("workers died"), "{said}");
}

#[test]
fn a_run_has_shards_ends_at_the_first_failure_and_says_what_it_left_out() {
    let folder = text(&root().join("scenarios/incidents")).to_owned();
    let ran = |extra: &[&str]| sim(&[&["run", folder.as_str(), "--jobs", "1"], extra].concat());
    let names = |said: &str| said.lines().filter(|l| l.starts_with("ok")).count();
    let (whole, parts) = (names(&ran(&[]).1), [1, 2].map(|n| names(&ran(&["--shard", &format!("{n}/2")]).1)));
    assert!(whole > 1 && parts.iter().sum::<usize>() == whole && parts.iter().all(|n| *n > 0), "{whole} {parts:?}");
    let (code, said) = ran(&["--max-wall", "0"]);
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("runs were not begun"), "{said}");

    let dir = tempfile::tempdir().expect("a temporary folder");
    let wrong = std::fs::read_to_string(root().join(MONDAY))
        .expect("a scenario")
        .replace("alerts = [\"source_unavailable\"]", "alerts = []");
    std::fs::write(dir.path().join("wrong.toml"), wrong).expect("written");
    let (code, said) = sim(&["run", text(dir.path()), "--jobs", "1", "--fail-fast"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("0 passed, 1 failed") && said.contains("2 runs were not begun"), "{said}");
}

const LAG: &str = "scenarios/incidents/lag_1405.toml";

#[test]
fn the_lag_at_five_past_two_is_told_in_time_and_as_its_account_without_the_defences() {
    let (code, said) = sim(&["postmortem", text(&root().join(LAG))]);
    assert_eq!(code, Some(0), "{said}");
    for wanted in [
        "- Verdict: holds",
        "How: alert `breaker_open`",
        "- Good enough: yes",
        "after an operator's `add_workers`",
        "- MTTD: ",
        "- MTTR: ",
        "state_mb",
        "Events of the type `wishlist` came from",
        "Without them, the same story (no_ttl, nobody told)",
        "by people, resolved never",
    ] {
        assert!(said.contains(wanted), "no {wanted} in\n{said}");
    }
}

#[test]
fn the_lag_at_five_past_two_is_the_same_in_separate_processes() {
    let (code, said) = sim(&["canary", text(&root().join(LAG)), "--pairs", "1"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("1 pairs, 0 different"), "{said}");
}

#[test]
fn a_reading_that_is_wrong_or_a_key_that_is_unknown_is_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let story = std::fs::read_to_string(root().join("scenarios/streaming/short_memory.toml")).expect("a scenario");
    let path = dir.path().join("wrong.toml");
    let ran = |added: &str| {
        std::fs::write(&path, story.clone() + added).expect("written");
        sim(&["run", text(&path), "--seed", "1"])
    };
    let (code, said) = ran("lag_below = 1\n\n[[expect.reading]]\nat_s = 300\nin_per_s = [1000, 2000]\n");
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("invariant lag: at "), "{said}");
    assert!(said.contains("reading at 300 s: found 5 records that came in a second, expected 1000 to 2000"), "{said}");
    let (code, said) = ran("\n[[expect.reading]]\nat_s = 300\nlagg = [0, 1]\n");
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("unknown field `lagg`"), "{said}");
}
