//! Models in the daily run and from the command line.

use std::path::{Path, PathBuf};

use crate::binaries::{output, said, source};

fn text(path: &Path) -> &str {
    path.to_str().expect("a path")
}

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let run = output("simulacro", arguments);
    (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run))
}

struct Lake {
    dir: tempfile::TempDir,
    data: PathBuf,
}

fn days(change: impl FnOnce(String) -> String, days: &[&str], models: &str) -> Lake {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), change);
    let data = dir.path().join("data");
    for day in days {
        let arguments = ["batch", "run", "--source", text(&source), "--data", text(&data), "--date", day, "--models", models];
        let (code, said) = run(&arguments);
        assert_eq!(code, Some(0), "{said}");
    }
    Lake { dir, data }
}

fn first_lines(text: String) -> String {
    text.lines().take(1_200).map(|l| format!("{l}\n")).collect()
}

fn query(lake: &Lake, sql: &str) -> String {
    let (code, said) = run(&["query", "--data", text(&lake.data), "--format", "csv", "--limit", "100000", sql]);
    assert_eq!(code, Some(0), "{said}");
    said
}

#[test]
fn a_day_makes_every_model_and_loads_its_marts() {
    let lake = days(first_lines, &["1997-01-01", "1997-01-02"], "all");
    let counts = query(
        &lake,
        "SELECT (SELECT count(*) FROM marts.metricas_producto) AS producto, (SELECT count(*) FROM marts.user_features) AS usuarios,
                (SELECT count(*) FROM marts.cohortes_usuario) AS cohortes, (SELECT count(*) FROM marts.metricas_diarias) AS diarias",
    );
    let loaded = query(
        &lake,
        "SELECT (SELECT count(*) FROM analytics.metricas_producto) AS producto,
                (SELECT count(*) FROM analytics.user_features) AS usuarios,
                (SELECT count(*) FROM analytics.cohortes_usuario) AS cohortes,
                (SELECT count(*) FROM analytics.metricas_diarias) AS diarias",
    );
    assert_eq!(counts, loaded);
    assert!(!counts.lines().nth(1).expect("a row").split(',').any(|n| n == "0"), "{counts}");
}

#[test]
fn an_old_day_that_comes_later_gives_what_days_in_order_give() {
    let columns = [
        ("user_features", "fecha, user_id, total_compras_30d, revenue_total_30d, ticket_promedio_30d, productos_unicos_30d"),
        ("cohortes_usuario", "fecha, cohorte, mes, usuarios, usuarios_activos, revenue_acumulado, ltv"),
        ("metricas_producto", "fecha, product_id, revenue_neto, transacciones, puesto"),
    ];
    let in_order = days(first_lines, &["1997-01-01", "1997-01-02", "1997-01-03"], "all");
    let late = days(first_lines, &["1997-01-02", "1997-01-03", "1997-01-01"], "all");
    for (model, columns) in columns {
        for schema in ["marts", "analytics"] {
            let sql = format!("SELECT {columns} FROM {schema}.{model} ORDER BY 1, 2");
            let (a, b) = (query(&in_order, &sql), query(&late, &sql));
            assert!(a.lines().count() > 3, "{a}");
            assert_eq!(a, b, "{schema}.{model}");
        }
    }
}

#[test]
fn an_order_that_comes_back_holds_the_day_and_every_reader_keeps_the_old_one() {
    // The first order of the second day has the id of the first order of all.
    let twin = |text: String| {
        let first = text.lines().nth(1).expect("a sale").split(',').next().expect("an id").to_owned();
        let mut done = false;
        let line = |l: &str| {
            if !done && l.ends_with("1997-01-02") {
                done = true;
                return l.split_once(',').map_or_else(String::new, |(_, rest)| format!("{first},{rest}\n"));
            }
            format!("{l}\n")
        };
        text.lines().take(1_200).map(line).collect()
    };
    let lake = days(twin, &["1997-01-01"], "all");
    let source = lake.dir.path().join("source");
    let (code, said) =
        run(&["batch", "run", "--source", text(&source), "--data", text(&lake.data), "--date", "1997-01-02", "--models", "all"]);
    assert_eq!(code, Some(3), "{said}");
    for word in ["held by model_tests", "stg_ventas_validadas unique(order_id) within 30 days: 1 rows", "order_id="] {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    assert_eq!(query(&lake, "SELECT DISTINCT fecha FROM analytics.metricas_diarias"), "fecha\n1997-01-01\n");
    // Nor does any reader of the lake see it.
    for table in ["marts.metricas_diarias", "marts.metricas_producto", "marts.user_features", "staging.ventas_validadas"] {
        assert_eq!(query(&lake, &format!("SELECT DISTINCT fecha FROM {table}")), "fecha\n1997-01-01\n", "{table}");
    }
    // What is published passes.
    let (code, said) = run(&["models", "test", "--data", text(&lake.data), "--date", "1997-01-01"]);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn models_are_run_by_name_for_a_staged_day() {
    let lake = days(first_lines, &["1997-01-01", "1997-01-02"], "metricas_diarias");
    let data = text(&lake.data);
    let (code, said) = run(&["models", "run", "--data", data, "--date", "1997-01-01", "--select", "int_ventas_enriquecidas+"]);
    assert_eq!(code, Some(0), "{said}");
    insta::assert_snapshot!(said.lines().filter(|l| !l.starts_with('{')).map(|l| format!("{l}\n")).collect::<String>());
    let (code, said) = run(&["models", "test", "--data", data, "--date", "1997-01-01"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("not made here, and not tested: eventos_sessionized, funnel_conversion, cohortes_usuario"), "{said}");
    // A table that is asked for by name and is not there is a failure.
    let (code, said) = run(&["models", "test", "--data", data, "--date", "1997-01-01", "--select", "cohortes_usuario"]);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("no such table"), "{said}");
    for (arguments, word) in [
        (["--date", "1999-01-01", "--select", "metricas_diarias"], "found no such day in staging/ventas_validadas"),
        (["--date", "1997-01-01", "--select", "metricas_diaria"], "did you mean metricas_diarias?"),
    ] {
        let (code, said) = run(&[&["models", "run", "--data", data], &arguments[..]].concat());
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains(word), "{said}");
    }
    // A run of models is no run of the day.
    let (code, said) = run(&["batch", "backfill", "plan", "--data", data, "--from", "1997-01-01", "--to", "1997-01-02"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("run 1 published") && said.contains("0 of 2 days to run"), "{said}");
}
