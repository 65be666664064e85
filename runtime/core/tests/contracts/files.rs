//! Every contract file, and the tables in core that list them. `ci/contracts` holds them against the standard's JSON Schema.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use simulacro_core::contract::{Contract, catalogue};

fn contracts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../contracts")
}

/// Files of a folder and those below it with the given ending, relative, sorted.
fn files(folder: &Path, below: &str, ending: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder.join(below)).expect("the folder is there") {
        let entry = entry.expect("an entry");
        let name = format!("{below}{}", entry.file_name().to_str().expect("a name in Unicode"));
        if entry.path().is_dir() {
            found.extend(files(folder, &format!("{name}/"), ending));
        } else if name.ends_with(ending) {
            found.insert(name);
        }
    }
    found
}

#[test]
fn every_contract_file_parses_and_is_named_after_its_table() {
    let folder = contracts().join("odcs");
    let found = files(&folder, "", ".yaml");
    assert!(found.len() >= 16, "{found:?}");
    for name in found {
        let text = std::fs::read_to_string(folder.join(&name)).expect("the file is read");
        let contract =
            Contract::parse(&name, &text).unwrap_or_else(|e| panic!("{name}: {e}: {:?}", std::error::Error::source(&e)));
        assert!(name.ends_with(&format!("{}.yaml", contract.table)), "{name} has the contract of {}", contract.table);
    }
}

#[test]
fn the_catalogue_has_every_file_of_the_folders() {
    let names = |list: &[(&str, &str)]| list.iter().map(|(n, _)| (*n).to_owned()).collect::<Vec<_>>();
    let tables: Vec<_> = files(&contracts().join("odcs"), "", ".yaml").into_iter().filter(|n| !n.contains('/')).collect();
    assert_eq!(names(catalogue::FILES), tables);
    assert_eq!(names(catalogue::SEEDS), files(&contracts().join("seeds"), "", ".csv").into_iter().collect::<Vec<_>>());
}

#[test]
fn every_reference_leads_to_a_column_of_a_contract() {
    let shipped = catalogue::shipped().expect("all parse");
    for reference in shipped.iter().flat_map(|c| &c.references) {
        let target = shipped.iter().find(|c| c.table == reference.table).expect("a reference leads to a contract");
        assert!(reference.to.iter().all(|c| target.field(c).is_some()), "{reference:?}");
    }
}
