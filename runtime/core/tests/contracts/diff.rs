//! What a change of a contract is called, and whom it breaks.

use simulacro_core::contract::{
    Contract, catalogue,
    diff::{diff, is_breaking, render},
};

/// A shipped contract, and the same with one text replaced.
fn edited(path: &str, edits: &[(&str, &str)]) -> (Contract, Contract) {
    let (_, text) = catalogue::FILES.iter().find(|(p, _)| *p == path).expect("it ships");
    let mut changed = text.replacen("version: 1.0.0", "version: 1.1.0", 1);
    for (from, to) in edits {
        assert!(changed.contains(from), "{from}");
        changed = changed.replacen(from, to, 1);
    }
    let parse = |text: &str| Contract::parse(path, text).expect("it parses");
    (parse(text), parse(&changed))
}

fn check(path: &str, edits: &[(&str, &str)], breaking: bool) -> String {
    let (old, new) = edited(path, edits);
    let changes = diff(&old, &new);
    let text = render(&old, &new, &changes);
    assert_eq!(is_breaking(&changes), breaking, "{text}");
    text
}

#[test]
fn the_same_contract_has_no_change() {
    let text = check("ventas_validadas.yaml", &[], false);
    assert_eq!(text, "ventas_validadas 1.0.0 -> ventas_validadas 1.1.0: no change\n");
}

#[test]
fn a_nullable_region_is_breaking_and_says_so() {
    let required = "      - name: region\n        logicalType: string\n        physicalType: string\n        required: ";
    let text = check("ventas.yaml", &[(&format!("{required}true"), &format!("{required}false"))], true);
    insta::assert_snapshot!(text);
}

#[test]
fn renames_types_and_new_columns_are_told_apart() {
    let text = check("ventas.yaml", &[("name: region", "name: zona")], true);
    insta::assert_snapshot!("renamed", text);
    let text = check(
        "productos.yaml",
        &[
            ("physicalType: int64", "physicalType: string"),
            ("          minimum: 0\n        physicalType: string", "          minLength: 1\n        physicalType: string"),
        ],
        true,
    );
    insta::assert_snapshot!("retyped", text);
    let added = "      - name: canal\n        logicalType: string\n        physicalType: string\n";
    let at = "      - name: segmento\n";
    let text = check("clientes.yaml", &[(at, &format!("{added}{at}"))], false);
    insta::assert_snapshot!("added", text);
    let text = check("clientes.yaml", &[(at, &format!("{added}        required: true\n{at}"))], true);
    insta::assert_snapshot!("added_required", text);
}

#[test]
fn bounds_are_additive_when_they_widen_and_breaking_when_they_narrow() {
    let text = check("ventas.yaml", &[("mustBeLessOrEqualTo: 10000000", "mustBeLessOrEqualTo: 20000000")], false);
    insta::assert_snapshot!("rows_widened", text);
    check("ventas.yaml", &[("mustBeLessOrEqualTo: 10000000", "mustBeLessOrEqualTo: 9999999")], true);
    check("ventas.yaml", &[("\"5/1000\"", "\"1/1000\"")], true);
    check("ventas.yaml", &[("\"5/1000\"", "\"10/1000\"")], false);
    check("user_features.yaml", &[("minimum: 1", "minimum: 0")], false);
    check("user_features.yaml", &[("minimum: 1", "minimum: 2")], true);
    check("ventas_validadas.yaml", &[("value: 6", "value: 12")], true);
    check("ventas_validadas.yaml", &[("value: 6", "value: 3")], false);
    check("quality_results.yaml", &[("[error, warning, info]", "[error, warning, info, fatal]")], false);
    check("quality_results.yaml", &[("[error, warning, info]", "[error, warning]")], true);
    check("cohortes_usuario.yaml", &[("usuarios_activos > usuarios", "usuarios_activos >= usuarios")], true);
    check("metricas_diarias.yaml", &[("primaryKeyPosition: 3", "primaryKeyPosition: 0")], true);
}

#[test]
fn what_is_breaking_one_way_is_seen_the_other_way_too() {
    // No change may be invisible in one direction: a column that goes comes back.
    for (path, _) in catalogue::FILES {
        for (other, _) in catalogue::FILES {
            let (a, _) = edited(path, &[]);
            let (b, _) = edited(other, &[]);
            assert_eq!(diff(&a, &b).is_empty(), diff(&b, &a).is_empty(), "{path} {other}");
            assert_eq!(diff(&a, &b).is_empty(), path == other);
        }
    }
}
