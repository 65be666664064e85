//! Wrong input, each with its own clear error, and nothing written.
#![expect(clippy::disallowed_methods, reason = "tests write broken files")]

use crate::binaries::{files, output, said, source};

/// Runs a day over a changed source and expects an error that has all of `words`, and an empty lake.
fn refused(change: impl FnOnce(String) -> String, code: i32, words: &[&str]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), change);
    let data = dir.path().join("data");
    let (source, data) = (source.to_str().expect("a path"), data.to_str().expect("a path"));
    let run = output("simulacro", &["batch", "run", "--source", source, "--data", data, "--date", "1997-01-01"]);
    let said = said(&run);
    assert_eq!(run.status.code(), Some(code), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert!(files(&dir.path().join("data/lake")).is_empty(), "something was written");
}

/// The CSV without, with, or with another column, by editing each line.
fn edit(text: &str, edit: impl Fn(usize, Vec<&str>) -> Vec<String>) -> String {
    let lines = text.lines().take(500).enumerate();
    lines.map(|(n, line)| edit(n, line.split(',').collect()).join(",") + "\n").collect()
}

fn owned(fields: Vec<&str>) -> Vec<String> {
    fields.into_iter().map(str::to_owned).collect()
}

#[test]
fn a_missing_column_is_named() {
    let without = |text: String| {
        edit(&text, |_, mut fields| {
            fields.remove(5);
            owned(fields)
        })
    };
    refused(without, 3, &["held by schema_unchanged", "column region is missing, the contract expects string"]);
}

#[test]
fn an_extra_column_is_named() {
    let with = |text: String| {
        edit(&text, |n, fields| {
            let mut fields = owned(fields);
            fields.push(if n == 0 { "canal".into() } else { "web".into() });
            fields
        })
    };
    refused(with, 3, &["held by schema_unchanged", "column canal (string) is not in the contract"]);
}

#[test]
fn a_renamed_column_is_named_with_both_names() {
    let renamed = |text: String| text.replacen("region", "zona", 1);
    refused(renamed, 3, &["held by schema_unchanged", "column region seems to be renamed to zona"]);
}

#[test]
fn a_retyped_column_is_named_with_both_types() {
    let retyped = |text: String| {
        edit(&text, |n, fields| {
            let mut fields = owned(fields);
            if n > 0 {
                fields[3] = "nothing".into();
            }
            fields
        })
    };
    refused(retyped, 3, &["column monto has type string, the contract expects decimal(10,2)"]);
}

#[test]
fn a_truncated_file_is_refused_before_anything_is_made() {
    refused(|text| text[..text.len() / 2].to_owned(), 1, &["ventas.csv", "the file is truncated"]);
}

#[test]
fn an_impossible_date_is_named_with_its_line() {
    let impossible = |text: String| {
        edit(&text, |n, fields| {
            let mut fields = owned(fields);
            if n == 7 {
                fields[7] = "1997-02-30".into();
            }
            fields
        })
    };
    refused(impossible, 1, &["line 8", "column fecha has \"1997-02-30\"", "expected a date"]);
}

#[test]
fn a_day_without_rows_is_held_by_its_volume() {
    let other_day = |text: String| text.replace("1997-01-01", "1997-01-02");
    refused(other_day, 3, &["held by quality_gate_raw", "found 0 rows, expected 1 to 10000 rows"]);
}

#[test]
fn an_unknown_key_of_the_configuration_is_named_with_its_place() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let config = dir.path().join("simulacro.toml");
    std::fs::write(
        &config,
        "alert_after_s = 60\nstartup_s = 0\ntimeout = 3\nretry = { retries = 1, backoff_s = 1, deadline_s = 1 }\n\
         source_policy = { kind = \"wait\", every_s = 1, deadline_s = 1 }\n",
    )
    .expect("written");
    let (source, data) = (source(dir.path(), |text| text), dir.path().join("data"));
    let path = |p: &std::path::Path| p.to_str().expect("a path").to_owned();
    let arguments = ["batch", "run", "--source", &path(&source), "--data", &path(&data), "--config", &path(&config)];
    let run = output("simulacro", &arguments);
    let said = said(&run);
    assert_eq!(run.status.code(), Some(1), "{said}");
    for word in ["simulacro.toml", "line 3", "unknown field `timeout`", "expected one of"] {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert!(!data.exists(), "something was written");
}
