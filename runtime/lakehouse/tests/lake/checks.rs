//! Stored tables against their contracts.

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use simulacro_core::{
    contract::{
        Contract, Declared, Severity, catalogue,
        check::{QualityResult, check_declared, check_source, check_table, declared, is_broken, render, results_batch},
    },
    ports::{Column, Lakehouse, PartitionRead, PortError, Result, TableSource},
};

use crate::shop::{Sale, day, dimensions, lake, now, select, stage, write};

fn contracts() -> Vec<Contract> {
    catalogue::shipped().expect("the shipped contracts parse")
}

fn sale(order: &str, user: &str, product: &str) -> Sale {
    Sale {
        order_id: order.into(),
        user_id: user.into(),
        product_id: product.into(),
        bruto_cents: 1_000,
        descuento_cents: 100,
        region: "norte".into(),
        at: "2024-03-01T10:00:00Z".parse().expect("an instant"),
    }
}

async fn check(lake: &dyn Lakehouse, fecha: NaiveDate, at: DateTime<Utc>) -> Vec<QualityResult> {
    let contracts = contracts();
    let contract = contracts.iter().find(|c| c.table == "ventas_validadas").expect("it ships");
    check_table(lake, contract, &contracts, fecha, at).await
}

/// The failures: name, what was observed, failing rows.
fn failures(results: &[QualityResult]) -> Vec<(String, String, u64)> {
    let failed = results.iter().filter(|r| !r.passed);
    failed.map(|r| (r.check.clone(), r.observed.clone(), r.failing_rows)).collect()
}

#[tokio::test]
async fn a_good_day_passes_every_check_of_its_contract() {
    let lake = lake();
    dimensions(&lake, &[("u1", Some("oro"), "2024-01-01", None)], &[("p1", Some("libros"))]).await;
    stage(&lake, day("2024-03-01"), 1, &[sale("1", "u1", "p1"), sale("2", "u1", "p1")]).await;
    let results = check(&lake, day("2024-03-01"), now()).await;
    assert_eq!(failures(&results), [], "{}", render(&results));
    let names: Vec<_> = results.iter().map(|r| r.check.as_str()).collect();
    for name in [
        "schema",
        "order_id.required",
        "region.accepted_values",
        "monto_bruto.exclusiveMinimum",
        "_source_hash.maxLength",
        "neto_is_bruto_less_descuento",
        "rowCount.min",
        "order_id.unique",
        "user_id.references",
        "_loaded_at.freshness",
    ] {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    assert!(!is_broken(&results));
}

#[tokio::test]
async fn every_failure_of_a_bad_day_is_reported_at_once() {
    let lake = lake();
    dimensions(&lake, &[("u1", Some("oro"), "2024-01-01", None)], &[("p1", Some("libros"))]).await;
    stage(&lake, day("2024-03-01"), 1, &[sale("1", "u1", "p1")]).await;
    let next = day("2024-03-02");
    let at = sale("x", "u1", "p1").at + TimeDelta::days(1);
    let rows = [
        select(&Sale { at, region: "luna".into(), ..sale("2", "u1", "p1") }),
        select(&Sale { at, bruto_cents: 0, descuento_cents: 0, ..sale("3", "u1", "p1") }),
        // An order of yesterday, and a customer whom nobody knows.
        select(&Sale { at, bruto_cents: 7, descuento_cents: 0, ..sale("1", "nadie", "p1") }),
        select(&Sale { at, ..sale("4", "u1", "p1") }).replace("'norte'", "''"),
        select(&Sale { at, ..sale("5", "u1", "p1") }).replace("'9.00' AS DECIMAL", "'8.00' AS DECIMAL"),
    ];
    write(&lake, "staging/ventas_validadas", next, 1, rows.join(" UNION ALL ")).await;
    let results = check(&lake, next, now() + TimeDelta::hours(7)).await;
    let found = failures(&results);
    let expected = [
        ("region.required", "1 rows", 1),
        ("region.accepted_values", "1 rows", 1),
        ("monto_bruto.exclusiveMinimum", "1 rows", 1),
        ("neto_is_bruto_less_descuento", "1 rows", 1),
        ("order_id.unique", "1 rows", 1),
        ("user_id.references", "1 rows", 1),
        ("_loaded_at.freshness", "28800 s old", 0),
    ];
    let mut expected: Vec<_> = expected.iter().map(|(a, b, n)| ((*a).to_owned(), (*b).to_owned(), *n)).collect();
    expected.sort();
    let mut sorted = found.clone();
    sorted.sort();
    assert_eq!(sorted, expected, "{}", render(&results));
    assert!(is_broken(&results));
    let reference = results.iter().find(|r| r.check == "user_id.references").expect("it ran");
    assert_eq!((reference.severity, reference.expected.as_str()), (Severity::Warning, "0 rows"));
    // The day before is still what it was, but for the order that has come twice.
    let before = failures(&check(&lake, day("2024-03-01"), now()).await);
    assert_eq!(before, [("order_id.unique".into(), "1 rows".into(), 1)]);
}

#[tokio::test]
async fn a_missing_column_fails_the_schema_and_its_own_clauses_only() {
    let lake = lake();
    dimensions(&lake, &[("u1", None, "2024-01-01", None)], &[("p1", None)]).await;
    let row = select(&sale("1", "u1", "p1")).replace("AS region", "AS zona");
    write(&lake, "staging/ventas_validadas", day("2024-03-01"), 1, row).await;
    let found = failures(&check(&lake, day("2024-03-01"), now()).await);
    assert_eq!(found[0].1, "column region seems to be renamed to zona");
    let names: Vec<_> = found.iter().map(|f| f.0.as_str()).collect();
    assert_eq!(names, ["schema", "region.required", "region.accepted_values"]);
    assert!(found[1].1.starts_with("not known: "), "{}", found[1].1);
}

#[tokio::test]
async fn a_missing_table_fails_every_check_and_says_why() {
    let results = check(&lake(), day("2024-03-01"), now()).await;
    assert!(results.iter().all(|r| !r.passed && r.observed.contains("no such table")), "{}", render(&results));
    assert!(results.len() > 20);
}

#[tokio::test]
async fn an_empty_day_fails_its_volume_and_nothing_else() {
    let lake = lake();
    dimensions(&lake, &[("u1", None, "2024-01-01", None)], &[("p1", None)]).await;
    stage(&lake, day("2024-03-01"), 1, &[sale("1", "u1", "p1")]).await;
    let found = failures(&check(&lake, day("2024-03-05"), now()).await);
    assert_eq!(found, [("rowCount.min".into(), "0 rows".into(), 0)]);
}

#[tokio::test]
async fn outcomes_have_the_columns_of_their_own_contract() {
    let lake = lake();
    let results = check(&lake, day("2024-03-01"), now()).await;
    let batch = results_batch(&results).expect("a batch");
    assert_eq!(batch.num_rows(), results.len());
    let contracts = contracts();
    let contract = contracts.iter().find(|c| c.table == "quality_results").expect("it ships");
    let types: Vec<_> = batch.schema().fields().iter().map(|f| (f.name().clone(), f.data_type().clone())).collect();
    let agreed: Vec<_> = contract.fields.iter().map(|f| (f.name.clone(), f.physical_type.data_type())).collect();
    assert_eq!(types, agreed);
}

#[tokio::test]
async fn declared_types_are_those_of_contracts() {
    let lake = lake();
    stage(&lake, day("2024-03-01"), 1, &[sale("1", "u1", "p1")]).await;
    let found = declared(&lake, "staging/ventas_validadas").await.expect("the table is there");
    let types: Vec<_> = found.iter().map(|c| format!("{} {}", c.name, c.physical_type)).collect();
    assert_eq!(
        types[3..9],
        [
            "monto_bruto decimal(10,2)",
            "descuento decimal(10,2)",
            "monto_neto decimal(10,2)",
            "region string",
            "timestamp_venta timestamp",
            "fecha date"
        ]
    );
}

/// A source that declares what it is told, or is down.
#[derive(Debug)]
struct Source(Option<Vec<Column>>);

#[async_trait::async_trait]
impl TableSource for Source {
    async fn ping(&self) -> Result<()> {
        Ok(())
    }
    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        self.0.clone().ok_or_else(|| PortError::retryable(format!("read the columns of {table}")).code("57P03"))
    }
    async fn read_day(&self, table: &str, _: NaiveDate, _: &[Column]) -> Result<PartitionRead> {
        Err(PortError::permanent(format!("read {table}: this source has no rows")))
    }
    async fn not_null(&self, _table: &str) -> Result<Option<std::collections::BTreeSet<String>>> {
        Ok(None)
    }
    async fn read_table(&self, table: &str, _: &[Column]) -> Result<PartitionRead> {
        Err(PortError::permanent(format!("read {table}: this source has no rows")))
    }
}

#[tokio::test]
async fn a_live_source_is_judged_by_the_columns_it_declares_now() {
    let contracts = contracts();
    let contract = contracts.iter().find(|c| c.table == "ventas").expect("it ships");
    let judged = async |columns| check_source(&Source(columns), contract, day("2024-03-01"), now()).await.remove(0);
    let good = judged(Some(contract.columns.clone())).await;
    assert_eq!((good.passed, good.layer.as_str(), good.check.as_str()), (true, "source", "schema"));
    let mut columns = contract.columns.clone();
    columns.retain(|c| c.name != "descuento");
    columns[3].physical_type = "float64".into();
    let bad = judged(Some(columns)).await;
    let both = "column monto has type float64, the contract expects decimal(10,2); column descuento is missing, the contract \
                expects decimal(10,2)";
    assert_eq!((bad.passed, bad.observed.as_str(), bad.expected.as_str()), (false, both, "the columns of contract ventas 1.0.0"));
    let down = judged(None).await;
    assert_eq!((down.passed, down.observed.as_str()), (false, "not known: read the columns of ventas [57P03]"));
    // The incident of the null cascade: nothing differs but that a null may come.
    let nullable = |c: &Column| Declared { nullable: Some(c.name == "region"), ..Declared::from(c) };
    let declared = contract.columns.iter().map(nullable).collect();
    let null = check_declared(contract, declared, day("2024-03-01"), now());
    assert_eq!(null.observed, "column region may be null, the contract expects a value in every row");
}

#[tokio::test]
async fn shares_duplicates_and_computed_numbers_are_held_against_their_bounds() {
    let lake = lake();
    let fecha = day("2024-03-01");
    stage(&lake, fecha, 1, &[sale("1", "u1", "p1"), sale("2", "u1", "p1"), sale("3", "u2", "p2"), sale("4", "u3", "p1")]).await;
    let rules = [
        ("pairs", "metric: duplicateValues\n        arguments: { properties: [user_id, product_id] }\n        mustBe: 0"),
        (
            "pairs_share",
            "metric: duplicateValues\n        arguments: { properties: [user_id] }\n        unit: percent\n        mustBeLessOrEqualTo: 50",
        ),
        (
            "p1_share",
            "type: sql\n        query: SELECT count(*) FROM {object} WHERE product_id = 'p1'\n        unit: percent\n        mustBeLessThan: 75",
        ),
        ("average", "type: sql\n        query: SELECT avg(monto_neto) FROM {object}\n        mustBeGreaterThan: 8.99"),
        ("spread", "type: sql\n        query: SELECT max(monto_neto) - min(monto_neto) FROM {object}\n        mustNotBe: 0"),
    ];
    let rules = rules.map(|(id, lines)| format!("      - id: {id}\n        severity: warning\n        {lines}\n")).concat();
    let columns = ["user_id: string", "product_id: string", "monto_neto: decimal(10,2)", "fecha: date"].map(|c| {
        let (name, kind) = c.split_once(": ").expect("name and type");
        let by_day = if name == "fecha" { "        partitioned: true\n" } else { "" };
        format!("      - name: {name}\n        physicalType: {kind}\n{by_day}")
    });
    let text = format!(
        "apiVersion: v3.1.0\nkind: DataContract\nid: v\nversion: 1.0.0\nstatus: active\nschema:\n  - name: v\n    \
         physicalName: staging/ventas_validadas\n    properties:\n{}    quality:\n{rules}",
        columns.concat()
    );
    let contract = Contract::parse("v.yaml", &text).expect("it parses");
    let results = check_table(&lake, &contract, &[], fecha, now()).await;
    let mut found: Vec<_> =
        results.iter().skip(1).map(|r| (r.check.as_str(), r.passed, r.observed.as_str(), r.expected.as_str())).collect();
    found.sort();
    assert_eq!(
        found,
        [
            ("average", true, "9", "above 8.99"),
            ("p1_share", false, "3 of 4 rows", "below 75 % of rows"),
            ("pairs", false, "1 rows", "0 rows"),
            ("pairs_share", true, "1 of 4 rows", "at most 50 % of rows"),
            ("spread", false, "0", "not 0"),
        ]
    );
    assert!(results[0].observed.contains("column order_id (string) is not in the contract"), "{}", results[0].observed);
}
