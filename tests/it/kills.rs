//! A run that is killed at any moment and run again gives the tables of a run that was not.
#![expect(clippy::disallowed_methods, reason = "tests start, time and kill the program")]

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use crate::binaries::{files, output, program, said, source};

const DAYS: [&str; 3] = ["1997-01-01", "1997-01-02", "1997-01-03"];

/// How many kills must hit a living run; a certification asks for more than the everyday test.
fn kills() -> u64 {
    match std::env::var("SIMULACRO_KILLS") {
        Err(_) => 6,
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("SIMULACRO_KILLS: found {text:?}, expected a number")),
    }
}

fn arguments<'a>(source: &'a Path, data: &'a Path, day: &'a str) -> Vec<&'a str> {
    let text = |path: &'a Path| path.to_str().expect("a path");
    vec!["batch", "run", "--source", text(source), "--data", text(data), "--date", day]
}

fn complete(source: &Path, data: &Path, day: &str) {
    let run = output("simulacro", &arguments(source, data, day));
    assert!(run.status.success(), "{}", said(&run));
}

/// Table and hash, as `status` prints them.
fn hashes(data: &Path) -> BTreeMap<String, String> {
    let run = output("simulacro", &["status", "--data", data.to_str().expect("a path")]);
    assert!(run.status.success(), "{}", said(&run));
    let text = String::from_utf8_lossy(&run.stdout).into_owned();
    // A run whose process died is closed by the next one.
    assert!(text.lines().any(|l| l.split_whitespace().eq(["running", "0"])), "{text}");
    let pairs = text.lines().filter_map(|l| l.split_once(' ')).filter(|(table, _)| table.contains('/'));
    pairs.map(|(table, hash)| (table.to_owned(), hash.trim().to_owned())).collect()
}

/// Raw objects that no manifest names.
fn orphans(data: &Path) -> Vec<String> {
    let all: Vec<String> = files(&data.join("lake/raw")).iter().map(|p| p.to_string_lossy().into_owned()).collect();
    let manifests: String =
        all.iter().filter(|p| p.ends_with(".json")).map(|p| std::fs::read_to_string(p).expect("a manifest")).collect();
    let name = |p: &str| p.rsplit_once("/lake/").map_or(String::new(), |(_, name)| name.to_owned());
    all.into_iter().filter(|p| p.ends_with(".parquet") && !manifests.contains(&name(p))).collect()
}

#[test]
fn a_killed_day_is_as_if_it_had_not_been_killed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(2_000).map(|l| format!("{l}\n")).collect());
    let clean = dir.path().join("clean");
    let began = Instant::now();
    for day in DAYS {
        complete(&source, &clean, day);
    }
    let one_run = began.elapsed() / DAYS.len() as u32;
    let expected = hashes(&clean);
    assert_eq!(expected.len(), 3);

    let (mut died, mut seed) = (0, 0x9E37_79B9_u64);
    let mut tries = 0;
    // A run that was quicker than its kill proves nothing and is not counted.
    while died < kills() {
        let kill = tries;
        tries += 1;
        assert!(tries <= 4 * kills() + 10, "only {died} of {tries} kills hit a living run");
        // Half of the kills hit a day that is not there yet, half one that is run again.
        let data = dir.path().join(format!("data-{}", kill / 2));
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let after = Duration::from_micros((seed >> 33) % one_run.as_micros() as u64);
        let day = DAYS[(seed >> 20) as usize % DAYS.len()];
        let mut child = program("simulacro").args(arguments(&source, &data, day)).spawn().expect("the program starts");
        std::thread::sleep(after);
        child.kill().expect("a signal can be sent");
        died += u64::from(!child.wait().expect("the program ends").success());
        for day in DAYS {
            complete(&source, &data, day);
        }
        assert_eq!(hashes(&data), expected, "kill {kill} of {day} after {after:?}");
        assert_eq!(orphans(&data), Vec::<String>::new(), "kill {kill} of {day} after {after:?}");
    }
    println!("{died} of {tries} runs were killed before their end, each within {one_run:?} of its start");
}
