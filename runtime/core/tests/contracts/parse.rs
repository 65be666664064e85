//! What contracts promise to those who write them.

use std::time::Duration;

use simulacro_core::contract::{Contract, ContractError, Declared, Freshness, SchemaDifference, Severity, catalogue};

const HEAD: &str = "apiVersion: v3.1.0
kind: DataContract
id: t
version: 1.2.0
status: active
schema:
  - name: t
    physicalName: staging/t
    properties:
";

fn parse(properties: &str) -> Result<Contract, ContractError> {
    Contract::parse("t.yaml", &format!("{HEAD}{properties}"))
}

/// Parses a contract with one column `c` of the given type and the given further lines.
fn column(physical_type: &str, lines: &str) -> Result<Contract, ContractError> {
    parse(&format!("      - name: c\n        physicalType: {physical_type}\n{lines}"))
}

/// The error and its causes in one line.
fn message(result: Result<Contract, ContractError>) -> String {
    let error = result.expect_err("the contract is refused");
    let mut text = error.to_string();
    let mut next = std::error::Error::source(&error);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn clauses(contract: &Contract) -> Vec<(&str, &str)> {
    contract.clauses.iter().map(|c| (c.name.as_str(), c.broken_when.as_str())).collect()
}

fn declared(name: &str, physical_type: &str, nullable: Option<bool>) -> Declared {
    Declared { name: name.into(), physical_type: physical_type.into(), nullable }
}

#[test]
fn the_shipped_contract_of_sales_keeps_its_clauses_and_bounds() {
    for (text, rows) in [
        (include_str!("../../../../contracts/odcs/ventas.yaml"), (1_000, 10_000_000)),
        (include_str!("../../../../contracts/odcs/cdnow/ventas.yaml"), (1, 10_000)),
    ] {
        let contract = Contract::parse("ventas.yaml", text).expect("it parses");
        assert_eq!((contract.rows_min, contract.rows_max), rows);
        assert_eq!(contract.quarantine_share_max, (5, 1000));
        assert_eq!((contract.key.as_slice(), contract.by_day()), (["order_id".to_owned()].as_slice(), true));
        let names: Vec<_> = contract.clauses.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "order_id.required",
                "user_id.required",
                "product_id.required",
                "monto.required",
                "region.required",
                "region.accepted_values",
                "timestamp_venta.required",
                "fecha.required",
                "descuento_not_above_monto",
            ]
        );
        let region = &contract.clauses[5].broken_when;
        assert_eq!(region, r#"coalesce("region" NOT IN ('centro', 'este', 'norte', 'oeste', 'sur'), false)"#);
        assert_eq!(contract.clauses[8].broken_when, "coalesce(descuento > monto, false)");
    }
}

#[test]
fn all_types_and_limits_become_clauses_in_the_columns_own_type() {
    let limit = |kind: &str, option: &str, value: &str| {
        let c = column(kind, &format!("        logicalTypeOptions:\n          {option}: {value}\n")).expect("it parses");
        clauses(&c).into_iter().map(|(n, b)| format!("{n}: {b}")).collect::<String>()
    };
    assert_eq!(limit("int64", "minimum", "0"), r#"c.minimum: coalesce("c" < 0, false)"#);
    assert_eq!(
        limit("decimal(10,2)", "exclusiveMinimum", "0.50"),
        r#"c.exclusiveMinimum: coalesce("c" <= CAST('0.50' AS DECIMAL(38,2)), false)"#
    );
    assert_eq!(limit("float64", "maximum", "1"), r#"c.maximum: coalesce("c" > CAST('1' AS DOUBLE), false)"#);
    assert_eq!(limit("date", "minimum", "1997-01-01"), r#"c.minimum: coalesce("c" < DATE '1997-01-01', false)"#);
    assert_eq!(limit("string", "maxLength", "3"), r#"c.maxLength: coalesce(character_length("c") > 3, false)"#);
    assert!(limit("timestamp", "maximum", "2030-01-01T00:00:00Z").contains("2030-01-01T00:00:00.000000Z"));
    assert_eq!(column("boolean", "").expect("it parses").columns[0].physical_type, "boolean");
    assert_eq!(column("decimal(12, 2)", "").expect("it parses").columns[0].physical_type, "decimal(12,2)");
}

#[test]
fn row_counts_are_read_as_the_standard_means_them() {
    let bounds = |rules: &str| {
        let c = column("string", &format!("    quality:\n{rules}")).expect("it parses");
        (c.rows_min, c.rows_max)
    };
    let rule = |operator: &str| format!("      - metric: rowCount\n        {operator}\n");
    assert_eq!(bounds(&rule("mustBeGreaterOrEqualTo: 10")), (10, u64::MAX));
    assert_eq!(bounds(&rule("mustBeGreaterThan: 10")), (11, u64::MAX));
    assert_eq!(bounds(&rule("mustBeLessThan: 10")), (0, 9));
    assert_eq!(bounds(&(rule("mustBeGreaterOrEqualTo: 10") + &rule("mustBeLessOrEqualTo: 20"))), (10, 20));
    assert_eq!(bounds(&rule("mustBeBetween: [10, 20]")), (11, 19), "both bounds are left out");
    assert_eq!(bounds(&rule("mustBe: 7")), (7, 7));
    assert_eq!(bounds(&rule("mustBeLessOrEqualTo: 7\n        severity: warning")), (0, u64::MAX), "a warning holds no day");
}

#[test]
fn a_rule_that_some_rows_may_break_is_no_clause() {
    let lines = "        quality:
          - metric: nullValues
            mustBeLessThan: 1
            unit: percent
          - metric: invalidValues
            arguments: { validValues: [a, b] }
            mustBe: 0
            severity: warning
";
    let contract = column("string", lines).expect("it parses");
    assert_eq!(clauses(&contract), []);
    let names: Vec<_> = contract.rules.iter().map(|r| (r.name.as_str(), r.severity)).collect();
    assert_eq!(names, [("c.nullValues", Severity::Error), ("c.accepted_values", Severity::Warning)]);
}

#[test]
fn errors_name_file_line_place_found_and_expected() {
    let cases = [
        (column("varchar(2)", ""), "contract t.yaml, line 11: t.c has varchar(2), expected string, decimal(p,s), timestamp"),
        (column("string", "        required: false\n        requierd: true\n"), "line 13"),
        (
            column("string", "        quality:\n          - metric: freshness\n            mustBe: 0\n"),
            "line 13: t.c has type library with metric freshness, expected rowCount on the table",
        ),
        (
            column("string", "    quality:\n      - metric: rowCount\n        mustBe: 1\n        mustBeLessThan: 2\n"),
            "t.quality has 2 operators, expected one operator",
        ),
        (
            column(
                "string",
                "        quality:\n          - metric: invalidValues\n            mustBe: 0\n            arguments: { validValuesSeed: regiones.csv }\n",
            ),
            "has validValuesSeed regiones.csv, expected regiones_validas.csv or tipos_evento.csv",
        ),
        (
            column("int64", "        logicalTypeOptions:\n          minimum: 0.5\n"),
            "line 13: t.c has 0.5, expected a whole number",
        ),
        (
            column("string", "        logicalTypeOptions:\n          pattern: a\n"),
            "has logicalTypeOptions pattern, expected minimum",
        ),
        (column("date", "        relationships:\n          - to: otra\n"), "line 13: t.c has otra, expected table.column"),
        (
            column("string", "    customProperties:\n      - property: quarantineShareMx\n        value: \"1/2\"\n"),
            "quarantineShareMx",
        ),
        (
            column("string", "slaProperties:\n  - property: latency\n    value: 6\n    unit: h\n    element: t.c\n"),
            "expected a column of type timestamp or date",
        ),
        (
            column("string", "      - name: c\n        physicalType: date\n"),
            "line 12: t.c has the same name twice, expected each column once",
        ),
    ];
    for (result, expected) in cases {
        let found = message(result);
        assert!(found.contains(expected), "{found}\ndoes not say\n{expected}");
    }
    let text = HEAD.replace("v3.1.0", "v3.0.2") + "      - name: c\n        physicalType: string\n";
    let found = message(Contract::parse("t.yaml", &text));
    assert_eq!(found, "contract t.yaml, line 1: contract.apiVersion has v3.0.2, expected v3.1.0");
}

#[test]
fn a_newly_nullable_column_is_a_difference_of_its_own() {
    let contract = column("string", "        required: true\n").expect("it parses");
    assert_eq!(contract.declared_differences(&[declared("c", "string", Some(false))]), []);
    assert_eq!(contract.declared_differences(&[declared("c", "string", None)]), []);
    let found = contract.declared_differences(&[declared("c", "string", Some(true))]);
    assert_eq!(found, [SchemaDifference::Nullable("c".into())]);
    assert_eq!(found[0].to_string(), "column c may be null, the contract expects a value in every row");
    let both = contract.declared_differences(&[declared("c", "int64", Some(true))]);
    assert_eq!(
        both,
        [SchemaDifference::Retyped("c".into(), "int64".into(), "string".into()), SchemaDifference::Nullable("c".into())]
    );
}

#[test]
fn a_rename_is_told_from_a_loss_and_a_gain() {
    let contract =
        parse("      - name: a\n        physicalType: string\n      - name: b\n        physicalType: date\n").expect("it parses");
    let differences = |b: (&str, &str)| contract.declared_differences(&[declared("a", "string", None), declared(b.0, b.1, None)]);
    assert_eq!(differences(("b", "date")), []);
    assert_eq!(differences(("z", "date")), [SchemaDifference::Renamed("b".into(), "z".into())]);
    assert_eq!(
        differences(("z", "string")),
        [SchemaDifference::Missing("b".into(), "date".into()), SchemaDifference::Extra("z".into(), "string".into())]
    );
}

#[test]
fn keys_partitions_references_and_freshness_are_read() {
    let (_, text) = catalogue::FILES.iter().find(|(p, _)| *p == "ventas_validadas.yaml").expect("it ships");
    let contract = Contract::parse("ventas_validadas.yaml", text).expect("it parses");
    assert_eq!((contract.physical_name.as_str(), contract.layer()), ("staging/ventas_validadas", "staging"));
    assert_eq!(contract.clustered_by, ["region"]);
    assert_eq!(
        contract.uniques(),
        [
            ("order_id.unique".to_owned(), vec!["order_id".to_owned()]),
            ("_source_hash.unique".to_owned(), vec!["_source_hash".to_owned()])
        ]
    );
    let references: Vec<_> = contract.references.iter().map(|r| (r.name.as_str(), r.table.as_str(), r.severity)).collect();
    assert_eq!(
        references,
        [
            ("user_id.references", "clientes_dim", Severity::Warning),
            ("product_id.references", "productos_dim", Severity::Warning)
        ]
    );
    assert_eq!(contract.freshness, [Freshness { column: "_loaded_at".into(), at_most: Duration::from_secs(6 * 3_600) }]);
    assert_eq!(contract.field("descuento").and_then(|f| f.default.clone()), Some("0.00".into()));
}

#[test]
fn every_seed_has_values_and_the_list_of_regions_is_sorted() {
    let regions = catalogue::seed("regiones_validas.csv").expect("it ships");
    assert_eq!(regions, ["centro", "este", "norte", "oeste", "sur"]);
    assert!(catalogue::SEEDS.iter().all(|(n, _)| catalogue::seed(n).is_some_and(|v| !v.is_empty())));
    assert_eq!(catalogue::seed("regiones.csv"), None);
}
