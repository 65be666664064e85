//! Models as text: headers, references, order, and the SQL that comes out.

use std::collections::BTreeSet;

use proptest::prelude::*;
use simulacro_core::{
    contract::catalogue,
    models::{At, ModelError, Project},
};

const VIEW: &str =
    "-- what: Sales.\n-- materialized: view\n-- key: order_id\nSELECT * FROM {{ source('staging', 'ventas_validadas') }}\n";

/// A day model with the given lookback that reads the given reference.
fn model(lookback: &str, reads: &str) -> String {
    format!(
        "-- what: Something.\n-- materialized: day\n-- table: marts/x\n-- key: fecha\n-- partition: fecha\n-- lookback: {lookback}\n\
         SELECT {{{{ day }}}} AS fecha FROM {reads}\n"
    )
}

fn project(files: &[(&str, &str)]) -> Result<Project, ModelError> {
    Project::new(files, catalogue::shipped().expect("the contracts parse"))
}

fn sql(project: &Project, name: &str) -> String {
    let absent = BTreeSet::new();
    let (day, now) = ("2024-03-01".parse().expect("a day"), "2024-03-02T03:00:00Z".parse().expect("an instant"));
    let query = project.render(project.model(name).expect("it is there"), &At { day, now, version: "1", absent: &absent });
    query.sql.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_model_sees_the_days_that_it_says_and_never_a_later_one() {
    let read = |lookback: &str| {
        let text = model(lookback, "{{ ref('stg_v') }}");
        let project = project(&[("staging/stg_v.sql", VIEW), ("marts/m.sql", &text)]).expect("it is sound");
        sql(&project, "m")
    };
    let expected = |days: &str| {
        format!(
            "SELECT * FROM ( SELECT DATE '2024-03-01' AS fecha FROM ( SELECT * FROM (SELECT * FROM \"staging_ventas_validadas\" \
             WHERE {days}) ) ) ORDER BY \"fecha\""
        )
    };
    assert_eq!(read("0"), expected("fecha = DATE '2024-03-01'"));
    assert_eq!(read("29"), expected("fecha >= DATE '2024-02-01' AND fecha <= DATE '2024-03-01'"));
    assert_eq!(read("all"), expected("fecha <= DATE '2024-03-01'"));
}

#[test]
fn a_table_without_days_is_read_whole() {
    let text = model("0", "{{ source('dim', 'clientes_dim') }} AS c");
    let project = project(&[("marts/m.sql", &text)]).expect("it is sound");
    let all = "SELECT * FROM ( SELECT DATE '2024-03-01' AS fecha FROM \"dim_clientes_dim\" AS c ) ORDER BY \"fecha\"";
    assert_eq!(sql(&project, "m"), all);
}

#[test]
fn models_come_after_what_they_read_whatever_the_order_of_files() {
    let (a, b, c) = (model("0", "{{ ref('b') }}"), model("0", "{{ ref('c') }}"), model("0", "{{ ref('stg_v') }}"));
    let mut files = [("marts/a.sql", &*a), ("marts/b.sql", &*b), ("marts/c.sql", &*c), ("staging/stg_v.sql", VIEW)];
    for _ in 0..files.len() {
        files.rotate_left(1);
        let project = project(&files).expect("it is sound");
        assert_eq!(project.models().map(|m| m.name.as_str()).collect::<Vec<_>>(), ["stg_v", "c", "b", "a"]);
    }
}

#[test]
fn a_circle_is_refused_and_named() {
    let (a, b, c) = (model("0", "{{ ref('b') }}"), model("0", "{{ ref('c') }}"), model("0", "{{ ref('b') }}"));
    let error = project(&[("marts/a.sql", &a), ("marts/b.sql", &b), ("marts/c.sql", &c)]).expect_err("b and c need each other");
    assert_eq!(error.found, "a circle: b reads c reads b", "a only leads there");
    let own = model("0", "{{ ref('a') }}");
    assert_eq!(project(&[("marts/a.sql", &own)]).expect_err("a needs itself").found, "a circle: a reads a");
}

#[test]
fn errors_name_file_line_found_and_expected() {
    let day = model("0", "{{ source('staging', 'ventas_validadas') }}");
    let edited = |from: &str, to: &str| {
        assert!(day.contains(from), "{from}");
        day.replacen(from, to, 1)
    };
    let cases = [
        (
            edited("lookback: 0", "lookback: some"),
            "model marts/m.sql, line 6: found lookback: some, expected a number of days, or all",
        ),
        (edited("-- partition: fecha\n", ""), "found no partition in the header, expected -- partition: ..."),
        (edited("-- key", "-- kee"), "line 4: found key kee, expected what, materialized"),
        (edited("materialized: day", "materialized: table"), "line 2: found materialized: table, expected view or day"),
        (
            edited("{{ day }}", "\n{{ dia }}"),
            "line 8: found dia, expected ref('model'), source('schema', 'table'), day, now or version",
        ),
        (edited("'ventas_validadas'", "'ventas'"), "expected a contract of a table at staging/ventas"),
        (edited("source('staging', 'ventas_validadas')", "ref('otra')"), "found ref('otra'), expected one of m"),
        (edited("-- lookback: 0", "-- lookback: 0\n-- test: unique()"), "line 7: found unique(), expected not_null(column, ...)"),
        (edited("-- lookback: 0", "-- lookback: 0\n-- test: accepted_values(region, x.csv)"), "line 7: found seed x.csv"),
        (edited("-- lookback: 0", "-- lookback: 0\n-- test: relationships(a, b.c)"), "found ref('b'), expected one of m"),
        (edited("-- lookback: 0", "-- lookback: 0\n-- optional: dim.clientes_dim"), "expected a source that the model reads"),
        (edited("{{ source", "{{ source }} {{ source"), "found source, expected ref('model')"),
    ];
    for (text, expected) in cases {
        let found = project(&[("marts/m.sql", &text)]).expect_err("the model is refused").to_string();
        assert!(found.contains(expected), "{found}\ndoes not say\n{expected}");
    }
    let found = project(&[("marts/deep/m.sql", &day), ("views/m.sql", &day)]).expect_err("no such layer").to_string();
    assert!(found.contains("expected staging/, intermediate/ or marts/ with a name.sql"), "{found}");
}

proptest! {
    /// Edges from later to earlier names only: no circle, and every model comes after all that it reads.
    #[test]
    fn any_graph_without_a_circle_has_an_order(edges in proptest::collection::btree_set((0_usize..8, 0_usize..8), 0..20)) {
        let down: Vec<_> = edges.iter().filter(|(a, b)| a > b).collect();
        let texts: Vec<_> = (0..8)
            .map(|i| {
                let reads = down.iter().filter(|(a, _)| *a == i).map(|(_, b)| format!("{{{{ ref('m{b}') }}}}"));
                let source = "{{ source('staging', 'ventas_validadas') }}".to_owned();
                (format!("marts/m{i}.sql"), model("0", &reads.chain([source]).collect::<Vec<_>>().join(", ")))
            })
            .collect();
        let files: Vec<_> = texts.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
        let project = project(&files).expect("it is sound");
        let order: Vec<_> = project.models().map(|m| m.name.clone()).collect();
        prop_assert_eq!(order.len(), 8);
        let place = |i: &usize| order.iter().position(|n| *n == format!("m{i}"));
        for (reader, read) in down {
            prop_assert!(place(read) < place(reader), "m{} reads m{} in {:?}", reader, read, order);
        }
    }
}
