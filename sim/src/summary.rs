//! What a run is for other tools: JUnit XML for a CI system, Markdown for a pull request. Everything that a person
//! looks into is in [`crate::report`].

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use crate::world::Judgement;

/// A run with its result.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The scenario's path as it was given to the command.
    pub name: String,
    /// The scenario's summary.
    pub summary: String,
    /// Seed.
    pub seed: u64,
    /// What it came to.
    pub judgement: Judgement,
    /// Real time that it took, with its twin.
    pub wall: Duration,
}

/// The command that repeats a run.
pub fn repeat(name: &str, seed: u64) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%=,".contains(c);
    let name = if name.chars().all(plain) { name.to_owned() } else { format!("'{}'", name.replace('\'', r"'\''")) };
    format!("simulacro-sim run {name} --seed {seed}")
}

/// Escapes for XML text and attributes. Characters that XML cannot hold become U+FFFD.
fn escaped(text: &str, attribute: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&apos;"),
            // Line ends in attributes would be read as spaces.
            '\n' if attribute => out.push_str("&#10;"),
            '\n' => out.push('\n'),
            '\r' => out.push_str("&#13;"),
            '\t' => out.push_str("&#9;"),
            '\u{0}'..'\u{20}' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

/// Text of an attribute.
fn xml(text: &str) -> String {
    escaped(text, true)
}

/// Runs by scenario, in order of name.
fn by_scenario(finished: &[Finished]) -> BTreeMap<&str, Vec<&Finished>> {
    let mut groups: BTreeMap<&str, Vec<&Finished>> = BTreeMap::new();
    for run in finished {
        groups.entry(&run.name).or_default().push(run);
    }
    groups
}

fn told(run: &Finished) -> String {
    let mut lines = run.judgement.problems.clone();
    if run.judgement.verdict == "inconclusive" {
        lines.insert(
            0,
            format!("inconclusive: the faults struck {:?} times, at least one of them too seldom", run.judgement.hits),
        );
    }
    lines.push(format!("repeat: {}", repeat(&run.name, run.seed)));
    lines.join("\n")
}

/// JUnit XML: a suite for each scenario, a case for each seed. What is violated is a failure, what is inconclusive an error.
pub fn junit(finished: &[Finished]) -> String {
    let count = |runs: &[&Finished], wanted: &str| runs.iter().filter(|r| r.judgement.verdict == wanted).count();
    let totals = |runs: &[&Finished]| {
        let errors = count(runs, "inconclusive");
        let failures = runs.len() - errors - count(runs, "holds");
        let wall: Duration = runs.iter().map(|r| r.wall).sum();
        format!(r#"tests="{}" failures="{failures}" errors="{errors}" time="{:.3}""#, runs.len(), wall.as_secs_f64())
    };
    let all: Vec<&Finished> = finished.iter().collect();
    let mut out = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"simulacro-sim\" {}>\n", totals(&all));
    let mut line = |depth: usize, text: String| {
        out.push_str(&"  ".repeat(depth));
        out.push_str(&text);
        out.push('\n');
    };
    for (name, runs) in by_scenario(finished) {
        line(1, format!(r#"<testsuite name="{}" {}>"#, xml(name), totals(&runs)));
        for run in runs {
            let wall = run.wall.as_secs_f64();
            let case = format!(r#"<testcase name="seed {}" classname="{}" time="{wall:.3}""#, run.seed, xml(name));
            let element = match run.judgement.verdict.as_str() {
                "holds" => {
                    line(2, format!("{case}/>"));
                    continue;
                }
                "inconclusive" => "error",
                _ => "failure",
            };
            let told = told(run);
            let message = xml(told.lines().next().unwrap_or_default());
            line(2, format!("{case}>"));
            let kind = xml(&run.judgement.verdict);
            line(3, format!(r#"<{element} message="{message}" type="{kind}">{}</{element}>"#, escaped(&told, false)));
            line(2, "</testcase>".into());
        }
        line(1, "</testsuite>".into());
    }
    out.push_str("</testsuites>\n");
    out
}

/// Text for a cell of a GitHub-flavoured table: no markup, no links, no mentions, one line.
fn cell(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '@' => out.push_str("&#64;"),
            '\n' | '\r' => out.push(' '),
            '|' | '\\' | '`' | '*' | '_' | '[' | ']' | '~' | '#' | '$' => {
                out.push('\\');
                out.push(c);
            }
            other => out.push(other),
        }
    }
    out
}

/// A code block whose fence is longer than any run of backticks in it.
fn block(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    // A terminal that shows the file must not obey what stands in it.
    let text: String = text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect();
    format!("{fence}text\n{text}\n{fence}\n")
}

fn rank(verdict: &str) -> u8 {
    match verdict {
        "holds" => 2,
        "inconclusive" => 1,
        _ => 0,
    }
}

fn sign(verdict: &str) -> &'static str {
    match verdict {
        "holds" => "✅",
        "inconclusive" => "❔",
        _ => "❌",
    }
}

/// How often each item occurs, as `a, b ×2`.
fn counted<'a>(items: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for item in items {
        *counts.entry(item).or_default() += 1;
    }
    let texts = counts.into_iter().map(|(item, n)| if n == 1 { cell(item) } else { format!("{} ×{n}", cell(item)) });
    texts.collect::<Vec<_>>().join(", ")
}

/// A GitHub-flavoured Markdown summary: a line for each scenario, what does not hold first, then what broke.
pub fn markdown(finished: &[Finished]) -> String {
    let mut groups: Vec<(&str, Vec<&Finished>)> = by_scenario(finished).into_iter().collect();
    let worst = |runs: &[&Finished]| runs.iter().map(|r| rank(&r.judgement.verdict)).min().unwrap_or(2);
    groups.sort_by_key(|(name, runs)| (worst(runs), *name));
    let good = finished.iter().filter(|r| r.judgement.verdict == "holds").count();
    let mut out = format!("## Simulator: {good} of {} runs hold\n\n", finished.len());
    out.push_str("| scenario | seeds | verdict | alerts | wall time |\n| --- | --- | --- | --- | ---: |\n");
    for (name, runs) in &groups {
        let seeds = runs.iter().map(|r| r.seed.to_string()).collect::<Vec<_>>().join(", ");
        let mut verdicts: Vec<&str> = runs.iter().map(|r| r.judgement.verdict.as_str()).collect();
        verdicts.sort_by_key(|v| rank(v));
        let first = verdicts.first().copied().unwrap_or("holds");
        let alerts = counted(runs.iter().flat_map(|r| &r.judgement.alerts).map(|a| a.rsplit(' ').next().unwrap_or(a)));
        let wall: Duration = runs.iter().map(|r| r.wall).sum();
        let verdicts = counted(verdicts.into_iter());
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| {} | {seeds} | {} {verdicts} | {} | {:.1} s |",
            cell(name),
            sign(first),
            if alerts.is_empty() { "none" } else { &alerts },
            wall.as_secs_f64()
        );
    }
    for run in groups.iter().flat_map(|(_, runs)| runs).filter(|r| r.judgement.verdict != "holds") {
        let verdict = &run.judgement.verdict;
        let _ = write!(
            out,
            "\n### {} {} seed {}: {}\n\n{}\n\n{}",
            sign(verdict),
            cell(&run.name),
            run.seed,
            cell(verdict),
            cell(&run.summary),
            block(&told(run))
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use quick_xml::{Reader, events::Event};

    use super::*;

    fn run(name: &str, seed: u64, verdict: &str, problems: &[&str]) -> Finished {
        let judgement = Judgement {
            verdict: verdict.into(),
            problems: problems.iter().map(|p| (*p).to_owned()).collect(),
            broken: Vec::new(),
            expected: Vec::new(),
            mart: Vec::new(),
            attempts: Vec::new(),
            alerts: vec!["03-18 03:01:00 source_unavailable".into()],
            published: BTreeMap::new(),
            hits: vec![0, 3],
            hashes: BTreeMap::new(),
            store_digest: String::new(),
            store_calls: 0,
            draws: 0,
            stream: None,
            platform: None,
            incident: None,
            without: None,
            recovered: Vec::new(),
        };
        let summary = "the run waits | for the source".to_owned();
        Finished { name: name.into(), summary, seed, judgement, wall: Duration::from_millis(1_250) }
    }

    fn some() -> Vec<Finished> {
        vec![
            run("scenarios/a_quiet_day.toml", 1, "holds", &[]),
            run("scenarios/a_quiet_day.toml", 2, "holds", &[]),
            run("scenarios/lost <rows>.toml", 1, "holds", &[]),
            run(
                "scenarios/lost <rows>.toml",
                2,
                "violated",
                &["invariant money_exact: mart at norte: found 1 & \"2\"", "```\n<script>@all</script> ]]>\u{1b}[31m"],
            ),
            run("scenarios/never_fired.toml", 1, "inconclusive", &[]),
        ]
    }

    #[test]
    fn a_pull_request_shows_what_broke_first() {
        insta::assert_snapshot!(markdown(&some()));
    }

    #[test]
    fn a_ci_system_sees_failures_and_errors() {
        insta::assert_snapshot!(junit(&some()));
    }

    #[test]
    fn junit_is_xml_and_gives_the_problems_back() {
        let (xml, runs) = (junit(&some()), some());
        let mut reader = Reader::from_str(&xml);
        let (mut depth, mut text, mut cases) = (0, String::new(), 0);
        loop {
            match reader.read_event().expect("well-formed XML") {
                Event::Start(tag) => {
                    depth += 1;
                    cases += usize::from(tag.name().as_ref() == b"testcase");
                    assert!(tag.attributes().all(|a| a.is_ok()));
                }
                Event::Empty(tag) => cases += usize::from(tag.name().as_ref() == b"testcase"),
                Event::End(_) => depth -= 1,
                Event::Text(part) => text.push_str(&part.decode().expect("UTF-8")),
                Event::GeneralRef(entity) => match entity.resolve_char_ref().expect("a character") {
                    Some(c) => text.push(c),
                    None => text
                        .push_str(quick_xml::escape::resolve_predefined_entity(&entity.decode().expect("UTF-8")).expect("known")),
                },
                Event::Eof => break,
                _ => {}
            }
        }
        assert_eq!((depth, cases), (0, runs.len()));
        for problem in &runs[3].judgement.problems {
            assert!(text.contains(&problem.replace('\u{1b}', "\u{fffd}")), "{problem} is not in {text}");
        }
        assert!(text.contains("repeat: simulacro-sim run 'scenarios/lost <rows>.toml' --seed 2"));
    }

    #[test]
    fn the_repeat_command_survives_a_shell() {
        assert_eq!(repeat("a/b_c.toml", 1), "simulacro-sim run a/b_c.toml --seed 1");
        assert_eq!(repeat("it's; rm x.toml", 2), r"simulacro-sim run 'it'\''s; rm x.toml' --seed 2");
    }
}
