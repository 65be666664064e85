//! The simulator: every shipped scenario is well-formed, and a run is a function of its seed.
#![expect(clippy::disallowed_methods, reason = "tests read scenario files")]

use std::sync::Arc;

use simulacro_lakehouse::DeltaLakehouse;
use simulacro_sim::{
    host::Host,
    platform::{PlatformScenario, faults::Mode, swarm},
    store::{DirectStore, ObjectService},
};

use crate::{
    binaries::{files, output, root, said},
    conformance,
};

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

#[tokio::test(flavor = "multi_thread")]
async fn delta_on_the_simulated_store_keeps_the_promises_of_a_lakehouse() {
    let service = ObjectService::new(Arc::new(Host::new("worker", None)), Vec::new());
    conformance::lakehouse::check(&DeltaLakehouse::new(Arc::new(DirectStore(service)))).await;
}

/// What the simulated server says and what the real adapter makes of such a code are two places, which must agree.
#[test]
fn the_simulated_source_tells_what_may_pass_as_the_real_adapter_does() {
    use simulacro_sim::faults::source::ServerError;
    for code in
        ["57P01", "57P02", "57P03", "57014", "55P03", "40001", "53300", "53100", "08006", "28P01", "42501", "42703", "42P01"]
    {
        let said = ServerError { severity: "FATAL".into(), code: code.into(), message: String::new() };
        assert_eq!(said.disposition(), simulacro_adapters::disposition(code), "{code}");
    }
}

const STREAM: &str = "scenarios/streaming/worker_crashes.toml";

#[test]
fn the_same_seed_gives_the_same_topics_and_history_of_a_stream_in_separate_processes() {
    let scenario = root().join(STREAM);
    let run = output("simulacro-sim", &["canary", scenario.to_str().expect("a path"), "--pairs", "2"]);
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run);
    assert_eq!(run.status.code(), Some(0), "{said}");
    assert!(said.contains("2 pairs, 0 different"), "{said}");
}

#[test]
fn a_clock_that_is_planted_into_a_stream_is_found() {
    let scenario = root().join(STREAM);
    let run = output("simulacro-sim", &["canary", scenario.to_str().expect("a path"), "--pairs", "1", "--plant"]);
    assert_eq!(run.status.code(), Some(5), "{}", said(&run));
    assert!(String::from_utf8_lossy(&run.stdout).contains("planted"));
}

/// Its week ends with a rewrite of several partitions, which delta-rs would go through in an order of its own.
#[test]
fn the_same_seed_gives_the_same_history_of_a_whole_platform_in_separate_processes() {
    let scenario = root().join("scenarios/platform/sunday_rewrite.toml");
    let run = output("simulacro-sim", &["canary", scenario.to_str().expect("a path"), "--pairs", "3"]);
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run);
    assert_eq!(run.status.code(), Some(0), "{said}");
    assert!(said.contains("3 pairs, 0 different"), "{said}");
}

/// The story of the negative scenario is one that the job survives when nothing is switched off.
#[test]
fn a_stream_without_fencing_is_caught_and_with_it_holds() {
    let path = root().join("scenarios/negative/stream_no_fencing.toml");
    let run = output("simulacro-sim", &["run", path.to_str().expect("a path")]);
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stdout));
    let text = std::fs::read_to_string(&path).expect("a readable file");
    let defended: String = text.lines().filter(|line| !line.starts_with("sabotage")).fold(String::new(), |all, line| {
        let line = if line.starts_with("verdict") { "verdict = \"holds\"" } else { line };
        all + line + "\n"
    });
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("defended.toml");
    std::fs::write(&path, defended).expect("written");
    let run = output("simulacro-sim", &["run", path.to_str().expect("a path")]);
    assert_eq!(run.status.code(), Some(0), "{}", String::from_utf8_lossy(&run.stdout));
}

#[test]
fn drawn_stream_stories_hold() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().join("failing");
    let run = output("simulacro-sim", &["sweep", "--world", "stream", "--seeds", "3", "--out", out.to_str().expect("a path")]);
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run);
    assert_eq!(run.status.code(), Some(0), "{said}");
    assert!(said.contains("3 seeds hold, 0 fail"), "{said}");
}

/// A seed is a story, and a story is a history: both are drawn anew in each process.
#[test]
fn the_same_seed_draws_the_same_platform_story_with_the_same_history_in_separate_processes() {
    let run = output("simulacro-sim", &["replay", "6", "--world", "platform"]);
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run);
    assert_eq!(run.status.code(), Some(0), "{said}");
    assert!(said.contains("events in both processes"), "{said}");
}

#[test]
fn drawn_platform_stories_hold() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().join("failing");
    let run = output("simulacro-sim", &["sweep", "--world", "platform", "--seeds", "3", "--out", out.to_str().expect("a path")]);
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run);
    assert_eq!(run.status.code(), Some(0), "{said}");
    assert!(said.contains("3 seeds hold, 0 fail"), "{said}");
}

/// What a sweep finds without a defence is smaller than what was drawn, breaks the same, and holds with the defence on. It is
/// the first small story with a fault of this mode that nothing keeps from striking.
fn is_found_and_shrunk(mode: Mode, defence: &str, invariant: &str) {
    let has_it = |story: &PlatformScenario| {
        let is_sure = story.stream.is_none() && story.models != "all" && story.expect.fired_min > 0;
        is_sure && story.fault.iter().any(|fault| fault.mode == mode)
    };
    let seed = &(0..10_000).find(|&seed| has_it(&swarm::draw(seed))).expect("a story with the mode").to_string();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().to_str().expect("a path");
    let sweep = ["sweep", "--world", "platform", "--from", seed, "--seeds", "1", "--tries", "24", "--out", out];
    let run = output("simulacro-sim", &[&sweep[..], &["--without", defence]].concat());
    let heard = String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run);
    assert_eq!(run.status.code(), Some(1), "{defence}: {heard}");
    assert!(heard.contains(&format!("invariant {invariant}: ")), "{defence}: {heard}");
    let read = |name: String| {
        let path = dir.path().join(name);
        std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}; {heard}", path.display()))
    };
    let (drawn, shrunk) = (read(format!("seed-{seed}.toml")), read(format!("seed-{seed}-shrunk.toml")));
    let parsed = |text: &str| PlatformScenario::parse(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let (before, after) = (parsed(&drawn), parsed(&shrunk));
    assert!(after.fault.len() == 1 && after.shop.sales_per_day < before.shop.sales_per_day, "{defence}: {shrunk}");
    let check = |name: &str, text: &str, code: i32| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("written");
        let run = output("simulacro-sim", &["run", path.to_str().expect("a path")]);
        assert_eq!(run.status.code(), Some(code), "{name} without {defence}: {}", String::from_utf8_lossy(&run.stdout));
    };
    check("shrunk.toml", &shrunk, 1);
    check("defended.toml", &PlatformScenario { without: Default::default(), ..after }.to_toml().expect("text"), 0);
}

#[test]
fn a_sweep_of_the_platform_finds_doubled_rows_that_nobody_drops() {
    is_found_and_shrunk(Mode::RowsTwice, "dedup", "money_exact");
}

#[test]
fn a_sweep_of_the_platform_finds_a_password_that_is_tried_again_and_again() {
    is_found_and_shrunk(Mode::PasswordExpired, "fail_fast", "few_logins");
}

#[test]
fn a_sweep_without_a_defence_that_nobody_knows_is_refused() {
    let run = output("simulacro-sim", &["sweep", "--world", "platform", "--without", "luck"]);
    assert_eq!(run.status.code(), Some(2));
    let said = said(&run);
    assert!(said.contains("unknown variant `luck`") && said.contains("`dedup`") && said.contains("`unwatched`"), "{said}");
}

#[test]
fn a_stream_story_with_an_unknown_key_is_refused_with_its_place() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = std::fs::read_to_string(root().join(STREAM)).expect("a readable file");
    for (right, wrong) in [("per_minute", "per_hour"), ("down_s", "down_m"), ("kind = \"stream\"", "kind = \"river\"")] {
        let path = dir.path().join("typo.toml");
        std::fs::write(&path, text.replacen(right, wrong, 1)).expect("written");
        let run = output("simulacro-sim", &["run", path.to_str().expect("a path")]);
        assert_eq!(run.status.code(), Some(2), "{wrong}");
        assert!(
            said(&run).contains("found") || said(&run).contains("unknown") || said(&run).contains("missing"),
            "{}",
            said(&run)
        );
    }
}

#[test]
fn a_stream_story_has_a_report() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (scenario, folder) = (root().join(STREAM), dir.path().join("report"));
    let arguments = ["run", scenario.to_str().expect("a path"), "--seed", "1", "--report", folder.to_str().expect("a path")];
    let run = output("simulacro-sim", &arguments);
    assert_eq!(run.status.code(), Some(0), "{}", said(&run));
    let pages = files(&folder);
    let page = pages.iter().find(|p| p.to_string_lossy().ends_with("-1.html")).expect("a page");
    let text = std::fs::read_to_string(page).expect("a readable page");
    for wanted in ["rebalances", "worker_crash", "ecommerce.metricas_realtime"] {
        assert!(text.contains(wanted), "no {wanted}");
    }
}

/// What a world does not measure is no promise that was kept.
#[test]
fn a_platform_story_with_a_wrong_expectation_is_violated() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = std::fs::read_to_string(root().join("scenarios/platform/quiet_fortnight.toml")).expect("a readable file");
    let path = dir.path().join("streaming_is_measured.toml");
    let short = text.replace("days = 14", "days = 1");
    let wanted = short.replace("[\"batch_freshness\", ", "[\"streaming_freshness\", \"batch_freshness\", ");
    std::fs::write(&path, wanted).expect("written");
    let run = output("simulacro-sim", &["run", path.to_str().expect("a path"), "--seed", "1"]);
    let said = String::from_utf8_lossy(&run.stdout).into_owned();
    assert_eq!(run.status.code(), Some(1), "{said}");
    assert!(said.contains("invariant slos_met: streaming_freshness is not met"), "{said}");
}

/// What watches the stream tells of a wrong clock as it happens, of what it was worth on the next morning, and of what only
/// the day after explains until then.
#[test]
fn a_wrong_clock_of_who_sends_is_told_by_the_monitor_and_by_the_reconciliation_and_is_explained_in_the_end() {
    let scenario = root().join("scenarios/platform/stream_watch.toml");
    let run = output("simulacro-sim", &["run", scenario.to_str().expect("a path")]);
    let said = String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run);
    assert_eq!(run.status.code(), Some(0), "{said}");
    for wanted in ["breaker_open", "day_held", "reconciliation_warning", "unexplained 0.00"] {
        assert!(said.contains(wanted), "no {wanted} in {said}");
    }
}
