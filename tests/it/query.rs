//! SQL over a lake from the command line: what can be asked, what is refused, and that nothing is left behind.
#![expect(clippy::disallowed_methods, reason = "tests look at what the program leaves")]

use std::{
    path::{Path, PathBuf},
    sync::LazyLock,
};

use crate::binaries::{files, output, said, source};

/// A lake with two days that were run in order and the first of them once more, made once for all tests.
static LAKE: LazyLock<(tempfile::TempDir, PathBuf)> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(600).map(|l| format!("{l}\n")).collect());
    let data = dir.path().join("data");
    for day in ["1997-01-01", "1997-01-02", "1997-01-01"] {
        let path = |p: &Path| p.to_str().expect("a path").to_owned();
        let run = output("simulacro", &["batch", "run", "--source", &path(&source), "--data", &path(&data), "--date", day]);
        assert!(run.status.success(), "{}", said(&run));
    }
    (dir, data)
});

fn query(arguments: &[&str]) -> (Option<i32>, String, String) {
    let data = LAKE.1.to_str().expect("a path");
    let run = output("simulacro", &[&["query", "--data", data], arguments].concat());
    (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned(), said(&run))
}

#[test]
fn without_a_statement_the_tables_are_listed() {
    let (code, out, said) = query(&[]);
    assert_eq!(code, Some(0), "{said}");
    insta::assert_snapshot!(out);
}

#[test]
fn every_layer_can_be_asked_and_tells_the_same_story() {
    let sql = "SELECT (SELECT count(*) FROM raw.ventas) AS leidas,
                      (SELECT count(*) FROM staging.ventas_validadas) AS validadas,
                      (SELECT count(*) FROM staging.ventas_no_publicadas) AS no_publicadas,
                      (SELECT sum(transacciones) FROM marts.metricas_diarias) AS en_mart,
                      (SELECT sum(transacciones) FROM analytics.metricas_diarias) AS en_almacen,
                      (SELECT sum(revenue_neto) FROM marts.metricas_diarias) AS revenue";
    let (code, out, said) = query(&[sql]);
    assert_eq!(code, Some(0), "{said}");
    insta::assert_snapshot!(out);
}

#[test]
fn rows_come_as_csv_and_as_json() {
    let sql = "SELECT region, sum(revenue_neto) AS revenue, count(*) AS filas, CAST(NULL AS VARCHAR) AS nada, \
               'dice \"hola\", y se va' AS texto FROM marts.metricas_diarias GROUP BY region ORDER BY region LIMIT 2";
    let (_, csv, _) = query(&["--format", "csv", sql]);
    let (_, json, _) = query(&["--format", "json", sql]);
    for line in json.lines() {
        let value: serde_json::Value = serde_json::from_str(line).expect("a JSON object");
        assert!(value["revenue"].is_number() && value["nada"].is_null(), "{line}");
    }
    insta::assert_snapshot!(format!("{csv}\n{json}"));
}

#[test]
fn a_past_version_is_read_by_number_and_by_time() {
    let count = |arguments: &[&str]| {
        let (code, out, said) =
            query(&[arguments, &["--format", "csv", "SELECT count(*) FROM staging.ventas_validadas"]].concat());
        assert_eq!(code, Some(0), "{said}");
        out.lines().last().expect("a row").parse::<u64>().expect("a number")
    };
    let (first, second, third) = (count(&["--version", "0"]), count(&["--version", "1"]), count(&["--version", "2"]));
    assert!(first < second, "the second day was not there yet: {first}, {second}");
    assert_eq!(second, third, "the first day came again");
    assert_eq!(count(&[]), third);
    // The time of a version is what its writer put into the log.
    let commit = LAKE.1.join("lake/staging/ventas_validadas/_delta_log/00000000000000000000.json");
    let log = std::fs::read_to_string(commit).expect("a commit");
    let actions = log.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).expect("an action"));
    let info = actions.filter_map(|a| a.get("commitInfo").cloned()).next().expect("a commit says when");
    let millis = info.get("inCommitTimestamp").or(info.get("timestamp")).and_then(serde_json::Value::as_i64).expect("a time");
    let stored = chrono::DateTime::from_timestamp_millis(millis).expect("a time").to_rfc3339();
    assert_eq!(count(&["--as-of", &stored]), first);
    assert_eq!(count(&["--as-of", "2999-01-01"]), third);
}

#[test]
fn the_raw_layer_is_read_as_of_a_time_too() {
    let manifest = LAKE.1.join("lake/raw/ventas/fecha=1997-01-01/_manifest/v000001.json");
    let stored = std::fs::metadata(manifest).expect("a manifest").modified().expect("a time");
    let stored = chrono::DateTime::<chrono::Utc>::from(stored).to_rfc3339();
    let (code, out, said) = query(&["--as-of", &stored, "--format", "csv", "SELECT DISTINCT fecha FROM raw.ventas"]);
    assert_eq!((code, out.as_str()), (Some(0), "fecha\n1997-01-01\n"), "{said}");
}

#[test]
fn what_is_refused_says_why_and_what_there_is() {
    let cases: &[(&[&str], &str)] = &[
        (&["SELECT * FROM staging.ventas"], "expected one of"),
        (&["SELECT * FROM ventas_validadas"], "did you mean staging.ventas_validadas?"),
        (&["SELECT * FROM marts.metrica_diarias"], "did you mean marts.metricas_diarias?"),
        (&["SELECT regio FROM staging.ventas_validadas"], "regio"),
        (&["DROP TABLE marts.metricas_diarias"], "found DROP, expected one SELECT"),
        (&["INSERT INTO raw.ventas SELECT * FROM raw.ventas"], "found INSERT, expected one SELECT"),
        (&["DELETE FROM marts.metricas_diarias"], "found DELETE, expected one SELECT"),
        (&["SET datafusion.execution.batch_size = 1"], "found SET, expected one SELECT"),
        (&["COPY (SELECT 1) TO '/tmp/out.csv'"], "found COPY, expected one SELECT"),
        (&["CREATE EXTERNAL TABLE t STORED AS CSV LOCATION '/etc/passwd'"], "found CREATE, expected one SELECT"),
        (&["EXPLAIN INSERT INTO raw.ventas SELECT * FROM raw.ventas"], "expected one SELECT"),
        (&["SELECT * FROM '/etc/passwd'"], "found no such table"),
        (&["SELECT 1; SELECT 2"], "single SQL statement"),
        (&["SELEC 1"], "SELEC"),
        (&["--version", "9", "SELECT * FROM staging.ventas_validadas"], "found no such version, expected one of 0 to 2"),
        (&["--version", "0", "SELECT * FROM raw.ventas"], "expected a time"),
        (
            &["--version", "0", "SELECT * FROM marts.metricas_diarias, staging.ventas_validadas"],
            "found 2 tables (marts.metricas_diarias, staging.ventas_validadas), expected one",
        ),
        (&["--as-of", "1999-01-01", "SELECT * FROM marts.metricas_diarias"], "found nothing that old, expected a time from"),
        (&["--as-of", "1999-01-01", "SELECT * FROM raw.ventas"], "found no day, expected at least one"),
    ];
    let before = files(&LAKE.1);
    for (arguments, expected) in cases {
        let (code, out, said) = query(arguments);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {expected:?} is missing in: {said}");
    }
    assert_eq!(files(&LAKE.1), before, "something was written");
}

#[test]
fn a_limit_says_that_there_is_more() {
    let (code, out, said) = query(&["--limit", "2", "SELECT order_id FROM staging.ventas_validadas ORDER BY order_id"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(out.ends_with("(2 rows)\n"), "{out}");
    assert!(said.contains("there are more rows than 2"), "{said}");
    let (_, _, said) = query(&["--limit", "1", "SELECT 1"]);
    assert!(!said.contains("more rows"), "{said}");
}

/// Name, size and time of everything below a folder.
fn state(folder: &Path) -> Vec<(PathBuf, u64, std::time::SystemTime)> {
    let known = |path: PathBuf| {
        let about = std::fs::metadata(&path).expect("a file");
        (path, about.len(), about.modified().expect("a time"))
    };
    files(folder).into_iter().map(known).collect()
}

#[test]
fn commands_that_look_leave_everything_as_it_was() {
    let (dir, data) = (&LAKE.0, LAKE.1.to_str().expect("a path"));
    let before = state(dir.path());
    for arguments in [
        vec!["status", "--data", data],
        vec!["query", "--data", data, "SELECT count(*) FROM raw.ventas"],
        vec!["contract", "check", "--data", data, "--date", "1997-01-01"],
        vec!["models", "test", "--data", data, "--date", "1997-01-01"],
        vec!["models", "explain", "user_features", "--date", "1997-01-01"],
        vec!["batch", "backfill", "plan", "--data", data, "--from", "1997-01-01", "--to", "1997-01-05"],
    ] {
        let run = output("simulacro", &arguments);
        assert_eq!(run.status.code(), Some(0), "{arguments:?}: {}", said(&run));
        assert_eq!(state(dir.path()), before, "{arguments:?} has changed something");
    }
}

#[test]
fn a_folder_that_is_not_there_is_named_and_not_made() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let missing = dir.path().join("nowhere");
    let data = missing.to_str().expect("a path");
    for arguments in [
        vec!["status", "--data", data],
        vec!["query", "--data", data, "SELECT 1"],
        vec!["contract", "check", "--data", data, "--date", "1997-01-01"],
        vec!["models", "test", "--data", data, "--date", "1997-01-01"],
        vec!["models", "run", "--data", data, "--date", "1997-01-01"],
        vec!["batch", "backfill", "plan", "--data", data, "--from", "1997-01-01", "--to", "1997-01-05"],
    ] {
        let run = output("simulacro", &arguments);
        assert_eq!(run.status.code(), Some(1), "{arguments:?}");
        let said = said(&run);
        assert!(said.contains(data) && said.contains("found no such folder"), "{arguments:?}: {said}");
        assert!(!missing.exists(), "{arguments:?} has made it");
    }
}
