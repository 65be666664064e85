//! A backfill as a person runs it: looked at, applied, interrupted and gone on with.
#![expect(clippy::disallowed_methods, reason = "tests start and kill the program, and read its plan")]

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use crate::binaries::{files, output, program, said, source};

struct Shop {
    _dir: tempfile::TempDir,
    source: PathBuf,
    data: PathBuf,
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

/// A shop whose sales of 1997-01-02 are another day's, so that the day is held for want of rows.
fn shop(without_second: bool) -> Shop {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |csv| {
        let lines = csv.lines().take(1_200);
        lines.filter(|l| !(without_second && l.ends_with("1997-01-02"))).map(|l| format!("{l}\n")).collect()
    });
    let data = dir.path().join("data");
    Shop { _dir: dir, source, data }
}

impl Shop {
    fn run(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let run = output("simulacro", &[arguments, &["--data", text(&self.data)]].concat());
        (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run))
    }
    fn day(&self, day: &str) -> (Option<i32>, String) {
        let source = text(&self.source);
        self.run(&["batch", "run", "--source", source, "--date", day, "--models", "metricas_diarias"])
    }
    fn plan(&self, arguments: &[&str]) -> (Option<i32>, String) {
        self.run(&[&["batch", "backfill", "plan", "--from", "1997-01-01", "--to", "1997-01-03"], arguments].concat())
    }
    fn apply(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let apply = ["batch", "backfill", "apply", "--source", text(&self.source), "--models", "metricas_diarias"];
        self.run(&[&apply, arguments].concat())
    }
    fn runs(&self) -> String {
        self.run(&["status"]).1
    }
}

const RANGE: [&str; 4] = ["--from", "1997-01-01", "--to", "1997-01-03"];

/// Times depend on the machine.
fn without_times(text: &str) -> String {
    let words = |line: &str| {
        let mut out: Vec<String> = Vec::new();
        for word in line.split_whitespace() {
            if word == "s" && out.last().is_some_and(|w| w.parse::<f64>().is_ok()) {
                out.pop();
                out.push("N".into());
            }
            out.push(word.into());
        }
        out.join(" ")
    };
    text.lines().filter(|l| !l.starts_with('{')).map(|l| words(l) + "\n").collect()
}

#[test]
fn a_plan_says_what_would_be_run_and_why_and_writes_nothing() {
    let shop = shop(true);
    assert_eq!(shop.day("1997-01-01").0, Some(0));
    assert_eq!(shop.day("1997-01-02").0, Some(3), "a day without rows is held");
    let before = files(&shop.data);
    let (code, said) = shop.plan(&[]);
    assert_eq!(code, Some(0), "{said}");
    insta::assert_snapshot!(without_times(&said));
    assert_eq!(files(&shop.data), before);
    let (code, said) = shop.run(&["batch", "backfill", "plan", "--from", "1997-01-03", "--to", "1997-01-01"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("found -1 days, expected 1 to 3660"), "{said}");
}

#[test]
fn a_range_is_applied_and_a_second_apply_finds_nothing_to_do() {
    let shop = shop(false);
    let (code, said) = shop.apply(&RANGE);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("3 days run: 3 published, 0 held, 0 failed"), "{said}");
    let (code, said) = shop.apply(&RANGE);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("nothing to run: 3 days looked at"), "{said}");
    let before = shop.runs();
    let (code, said) = shop.apply(&[&RANGE[..], &["--force"]].concat());
    assert_eq!(code, Some(0), "{said}");
    let after = shop.runs();
    assert!(before.contains("succeeded  3") && after.contains("succeeded  6"), "{before}{after}");
    let hashes = |s: &str| s.lines().filter(|l| l.contains('/')).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(hashes(&before), hashes(&after), "the same days give the same tables");
}

#[test]
fn a_held_day_stops_the_backfill_or_does_not_as_one_asks() {
    let shop = shop(true);
    let (code, said) = shop.apply(&RANGE);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("1997-01-02  held    quality_gate_raw: found 0 rows, expected 1 to 10000 rows"), "{said}");
    assert!(said.contains("1 day left, from 1997-01-03 on"), "{said}");
    let (code, said) = shop.apply(&[&RANGE[..], &["--on-held", "continue"]].concat());
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("2 days run: 1 published, 1 held, 0 failed"), "{said}");
}

#[test]
fn a_plan_that_does_not_hold_any_more_is_refused_with_the_difference() {
    let shop = shop(false);
    assert_eq!(shop.day("1997-01-01").0, Some(0));
    let kept = shop.data.with_file_name("plan.json");
    let (code, said) = shop.plan(&["--out", text(&kept)]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(shop.day("1997-01-02").0, Some(0));
    let before = shop.runs();
    let (code, said) = shop.apply(&["--plan", text(&kept)]);
    assert_eq!(code, Some(1), "{said}");
    for word in ["the state has changed since", "1997-01-02: the plan saw no run", "now there is run 1 published"] {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert_eq!(shop.runs(), before, "nothing was run");
    // A file that is no plan.
    std::fs::write(&kept, "{}").expect("written");
    let (code, said) = shop.apply(&["--plan", text(&kept)]);
    assert_eq!(code, Some(1));
    assert!(said.contains("read plan") && said.contains("missing field"), "{said}");
}

#[test]
fn a_killed_apply_is_gone_on_with_by_the_next() {
    let shop = shop(false);
    assert_eq!(shop.apply(&RANGE).0, Some(0));
    let before = shop.runs();
    let kept = shop.data.with_file_name("plan.json");
    assert_eq!(shop.plan(&["--force", "--out", text(&kept)]).0, Some(0));
    let journal = || {
        let all = files(&shop.data.join("backfill"));
        let lines = all.iter().filter(|p| p.extension().is_some_and(|e| e == "jsonl"));
        lines.map(|p| std::fs::read_to_string(p).unwrap_or_default().matches("begun").count()).sum::<usize>()
    };
    let earlier = journal();
    let mut child = program("simulacro")
        .args(["batch", "backfill", "apply", "--source", text(&shop.source), "--data", text(&shop.data)])
        .args(["--models", "metricas_diarias", "--plan", text(&kept)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    // Killed while the second day is under way: then the first is done.
    while journal() < earlier + 2 {
        assert!(child.try_wait().expect("a child").is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().expect("killed");
    child.wait().expect("it ends");
    let (code, said) = shop.apply(&["--plan", text(&kept)]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("2 days run: 2 published"), "the first day is not run again: {said}");
    let (code, said) = shop.apply(&["--plan", text(&kept)]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("nothing to run"), "{said}");
    let hashes = |s: &str| s.lines().filter(|l| l.contains('/')).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(hashes(&before), hashes(&shop.runs()));
}
