//! The simulator: every shipped scenario is well-formed, and a run is a function of its seed.
#![expect(clippy::disallowed_methods, reason = "tests read scenario files")]

use crate::binaries::{files, output, root, said};

const SCENARIO: &str = "scenarios/batch/worker_crashes.toml";

fn canary(extra: &[&str]) -> (Option<i32>, String) {
    let scenario = root().join(SCENARIO);
    let arguments = [&["canary", scenario.to_str().expect("a path"), "--pairs", "2"], extra].concat();
    let run = output("simulacro-sim", &arguments);
    (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run))
}

#[test]
fn the_same_seed_gives_the_same_history_in_separate_processes() {
    let (code, said) = canary(&[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("2 pairs, 0 different"), "{said}");
}

#[test]
fn a_planted_real_clock_is_found_and_located() {
    let (code, said) = canary(&["--plant"]);
    assert_eq!(code, Some(5), "{said}");
    assert!(said.contains("planted"), "{said}");
}

#[test]
fn every_scenario_file_is_a_scenario() {
    let scenarios = files(&root().join("scenarios"));
    assert!(scenarios.len() >= 8);
    for path in scenarios {
        let text = std::fs::read_to_string(&path).expect("a readable file");
        if let Err(e) = simulacro_sim::scenario::Story::parse(&text) {
            panic!("{}: {e}", path.display());
        }
    }
}

#[test]
fn a_scenario_with_an_unknown_key_is_refused_with_its_place() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = std::fs::read_to_string(root().join(SCENARIO)).expect("a readable file");
    let path = dir.path().join("typo.toml");
    std::fs::write(&path, text.replace("tick_ms", "tick_msec")).expect("written");
    let run = output("simulacro-sim", &["run", path.to_str().expect("a path")]);
    assert_eq!(run.status.code(), Some(2));
    assert!(said(&run).contains("unknown field `tick_msec`"), "{}", said(&run));
}
