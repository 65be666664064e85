//! Contracts and models from the command line.
#![expect(clippy::disallowed_methods, reason = "tests write a contract")]

use crate::binaries::{output, root, said, source};

fn run(arguments: &[&str]) -> (Option<i32>, String) {
    let run = output("simulacro", arguments);
    (run.status.code(), String::from_utf8_lossy(&run.stdout).into_owned() + &said(&run))
}

#[test]
fn a_contract_without_a_column_is_breaking_and_names_it() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let text = std::fs::read_to_string(root().join("contracts/odcs/cdnow/ventas.yaml")).expect("a contract");
    let retyped = dir.path().join("retyped.yaml");
    std::fs::write(&retyped, text.replacen("physicalType: decimal(10,2)", "physicalType: string", 1)).expect("written");
    let (code, said) = run(&["contract", "diff", "cdnow", retyped.to_str().expect("a path")]);
    assert_eq!(code, Some(3), "{said}");
    for word in ["monto", "decimal(10,2)", "string", "breaking"] {
        assert!(said.contains(word), "{word:?} is missing in: {said}");
    }
    let (code, said) = run(&["contract", "diff", "cdnow", "cdnow"]);
    assert_eq!(code, Some(0), "{said}");
}

#[test]
fn a_source_is_checked_against_its_contract() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let good = source(dir.path(), |text| text.lines().take(300).map(|l| format!("{l}\n")).collect());
    let check = |folder: &std::path::Path| {
        run(&["contract", "check", "--source", folder.to_str().expect("a path"), "--date", "1997-01-01"])
    };
    let (code, said) = check(&good);
    assert_eq!(code, Some(0), "{said}");
    let renamed = tempfile::tempdir().expect("a temporary folder");
    let bad = source(renamed.path(), |text| text.replacen("region", "zona", 1));
    let (code, said) = check(&bad);
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("region") && said.contains("zona"), "{said}");
}

#[test]
fn the_lake_of_a_run_keeps_its_contracts() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(300).map(|l| format!("{l}\n")).collect());
    let data = dir.path().join("data");
    let (source, data) = (source.to_str().expect("a path"), data.to_str().expect("a path"));
    let (code, said) = run(&["batch", "run", "--source", source, "--data", data, "--date", "1997-01-01"]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = run(&["contract", "check", "--data", data, "--date", "1997-01-01"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("ventas_validadas") && said.contains("checks"), "{said}");
}

#[test]
fn models_are_listed_explained_and_drawn() {
    let (code, said) = run(&["models", "list"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("metricas_producto") && said.contains("stg_ventas_validadas"), "{said}");
    let (code, said) = run(&["models", "explain", "metricas_producto", "--date", "1997-01-01"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("DATE '1997-01-01'"), "{said}");
    let (code, said) = run(&["models", "draw", "--format", "svg"]);
    assert_eq!(code, Some(0));
    assert!(said.starts_with("<svg"), "{said}");
    let (code, said) = run(&["models", "explain", "metricas", "--date", "1997-01-01"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("expected one of") && said.contains("metricas_producto"), "{said}");
}

#[test]
fn a_source_is_checked_for_the_day_that_is_asked_for() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    // The second day has a region that no list has, and no third day.
    let folder = source(dir.path(), |text| {
        let mut spoiled = false;
        let line = |l: &str| {
            if !spoiled && l.ends_with("1997-01-02") {
                spoiled = true;
                let mut fields: Vec<&str> = l.split(',').collect();
                fields[5] = "luna";
                return fields.join(",") + "\n";
            }
            format!("{l}\n")
        };
        text.lines().filter(|l| !l.ends_with("1997-01-03")).take(900).map(line).collect()
    });
    let check = |day: &str| run(&["contract", "check", "--source", folder.to_str().expect("a path"), "--date", day]);
    let (code, said) = check("1997-01-01");
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.starts_with("1 checks"), "rows are judged: {said}");
    let (code, said) = check("1997-01-02");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("ventas.region.accepted_values") && said.contains("found 1 rows, expected 0 rows"), "{said}");
    let (code, said) = check("1997-01-03");
    assert_eq!(code, Some(3), "{said}");
    assert!(said.contains("ventas.volume") && said.contains("found 0 rows, expected 1 to 10000 rows"), "{said}");
}

#[test]
fn dimensions_are_refreshed_by_hand_and_their_versions_told() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let shop = source(dir.path(), |text| text.lines().take(300).map(|l| format!("{l}\n")).collect());
    std::fs::write(shop.join("productos.csv"), "product_id,categoria,marca,precio,inventario\np-1,libros,acme,1.00,3\n")
        .expect("written");
    std::fs::write(shop.join("precios.csv"), "product_id,precio\np-1,1.00\n").expect("written");
    // One file says for every command where everything is.
    let config = dir.path().join("platform.toml");
    let data = dir.path().join("data");
    std::fs::write(&config, format!("[source]\nfolder = {shop:?}\n[lake]\ndata = {data:?}\n")).expect("written");
    let config = config.to_str().expect("a path");
    for round in [1, 2] {
        let (code, said) = run(&["dimensions", "refresh", "--config", config]);
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains(&format!("precios      version {round}, 1 rows")), "{said}");
        assert!(said.contains(&format!("productos    version {round}, 1 rows")), "{said}");
    }
    let (code, said) = run(&["dimensions", "status", "--config", config]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("clientes     no version") && said.contains("precios      version 2, 1 rows, confirmed "), "{said}");
    // A dimension that is refused leaves the version before, and says why.
    std::fs::write(shop.join("precios.csv"), "product_id,precio\np-1,1.00\np-1,2.00\n").expect("written");
    let (code, said) = run(&["dimensions", "refresh", "--config", config]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("precios      version 2, 1 rows  NOT REFRESHED: ") && said.contains("2 times"), "{said}");
    let (code, said) = run(&["query", "--config", config, "--format", "csv", "SELECT precio FROM dim.precios_dim"]);
    assert_eq!((code, said.as_str()), (Some(0), "precio\n1.00\n"));
}
