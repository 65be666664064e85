//! Which test holds which adapter to the promises of its port: one table, compared with the code, so that an adapter without
//! a run is a failure and not a gap that nobody sees.
#![expect(clippy::disallowed_methods, reason = "a test reads the repository")]

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use crate::binaries::{files, root};

/// Ports whose adapters are held to something.
const PORTS: [&str; 9] = [
    "DimensionApi",
    "EventLog",
    "Lakehouse",
    "Notifier",
    "ObjectStore",
    "RunLedger",
    "SchemaRegistry",
    "TableSource",
    "Warehouse",
];

/// What holds an adapter to its port.
#[derive(Debug, Clone, Copy)]
enum Held {
    /// A test, by file and name, that runs the suite of the port.
    Suite(&'static str, &'static str),
    /// A test of its own, and why it is no suite.
    Own(&'static str, &'static str, &'static str),
    /// None of its own, and why.
    Inside(&'static str),
}

use Held::{Inside, Own, Suite};

/// Every adapter of the product, and the simulated ones, in order of port and name.
const TABLE: &[(&str, &str, Held)] = &[
    ("DimensionApi", "FolderDimensions", Suite("tests/it/dimensions.rs", "a_folder_keeps_the_promises_of_a_dimension_api")),
    ("DimensionApi", "HttpDimensions", Suite("tests/it/dimensions.rs", "the_http_api_keeps_the_promises_of_a_dimension_api")),
    ("EventLog", "Client", Suite("runtime/log/tests/in_memory.rs", "the_state_machine_keeps_every_promise")),
    ("EventLog", "KafkaLog", Suite("runtime/adapters/tests/kafka_log.rs", "kafka_keeps_every_promise")),
    (
        "EventLog",
        "LazyLog",
        Suite("runtime/adapters/tests/embedded_log.rs", "the_log_that_is_opened_by_its_first_call_keeps_every_promise"),
    ),
    ("EventLog", "Paying", Inside("forwards to the simulated log, and takes the time that a commit of so much state costs")),
    ("EventLog", "Sabotaged", Inside("a defence switched off: the negative scenarios show that it is caught")),
    (
        "Lakehouse",
        "AlteredLakehouse",
        Inside("a build that was deployed wrong, as a fault: the negative scenarios show that it is caught"),
    ),
    ("Lakehouse", "DeltaLakehouse", Suite("tests/it/embedded.rs", "delta_in_a_folder_keeps_the_promises_of_a_lakehouse")),
    ("Lakehouse", "OnHost", Inside("forwards to DeltaLakehouse, which on the simulated store is held in tests/it/simulator.rs")),
    ("Notifier", "AlertRouter", Suite("tests/it/notifiers.rs", "every_channel_keeps_the_promises_of_a_notifier")),
    (
        "Notifier",
        "LogNotifier",
        Own(
            "tests/it/embedded.rs",
            "the_log_takes_every_alert_and_every_end",
            "nobody is paged by a log, so there is nothing to fold",
        ),
    ),
    ("Notifier", "SimNotifier", Suite("tests/it/embedded.rs", "the_simulated_pager_keeps_the_promises_of_a_notifier")),
    (
        "ObjectStore",
        "DirectStore",
        Own(
            "tests/it/simulator.rs",
            "delta_on_the_simulated_store_keeps_the_promises_of_a_lakehouse",
            "through the suite of the lakehouse, which is its one caller",
        ),
    ),
    ("ObjectStore", "FolderOf", Suite("tests/it/s3.rs", "a_folder_of_a_bucket_keeps_the_promises_of_a_store_and_of_a_lakehouse")),
    (
        "ObjectStore",
        "PortStore",
        Inside("asks the same service as DirectStore, and charges its latency; every scenario runs on it"),
    ),
    (
        "ObjectStore",
        "ReadOnlyStore",
        Own(
            "tests/it/embedded.rs",
            "a_read_only_store_reads_what_is_there_and_refuses_every_change",
            "it must refuse what the suite asks",
        ),
    ),
    (
        "ObjectStore",
        "StoreLink",
        Inside("forwards to the service below DirectStore, and charges its latency; every platform story runs on it"),
    ),
    ("RunLedger", "FaultyLedger", Inside("forwards to SimLedger and loses what a scenario says")),
    ("RunLedger", "PostgresLedger", Suite("tests/it/postgres.rs", "a_ledger_keeps_its_promises")),
    ("RunLedger", "SimLedger", Suite("tests/it/embedded.rs", "the_simulated_ledger_keeps_the_promises_of_a_ledger")),
    ("RunLedger", "SqliteLedger", Suite("tests/it/embedded.rs", "sqlite_keeps_the_promises_of_a_ledger")),
    (
        "SchemaRegistry",
        "EmbeddedRegistry",
        Suite("tests/it/conformance_registry.rs", "the_registry_in_a_file_conforms_and_a_second_process_sees_the_same"),
    ),
    ("SchemaRegistry", "HttpRegistry", Suite("tests/it/conformance_registry.rs", "a_real_registry_conforms")),
    (
        "SchemaRegistry",
        "SimRegistry",
        Inside("MemoryRegistry behind a host; MemoryRegistry is held in tests/it/conformance_registry.rs"),
    ),
    ("TableSource", "CsvSource", Suite("tests/it/embedded.rs", "a_csv_folder_keeps_the_promises_of_a_table_source")),
    (
        "TableSource",
        "EmbeddedSource",
        Inside("forwards to CsvSource, ParquetSource or SqliteSource; tests/it/sources.rs runs days over each"),
    ),
    ("TableSource", "NoSource", Own("tests/it/embedded.rs", "what_is_no_source_says_so_to_every_question", "it has no table")),
    ("TableSource", "ParquetSource", Suite("tests/it/sources.rs", "a_folder_of_parquet_keeps_the_promises_of_a_table_source")),
    ("TableSource", "PostgresSource", Suite("tests/it/postgres.rs", "a_source_keeps_its_promises")),
    (
        "TableSource",
        "SimSource",
        Inside("its shop has no table of the suite; the oracle of each scenario judges every row that it gives"),
    ),
    ("TableSource", "Source", Inside("that of the platform stories, whose oracle judges every row that it gives")),
    ("TableSource", "SqliteSource", Suite("tests/it/sources.rs", "a_database_file_keeps_the_promises_of_a_table_source")),
    ("Warehouse", "DeltaWarehouse", Suite("tests/it/embedded.rs", "delta_keeps_the_promises_of_a_warehouse")),
    ("Warehouse", "FaultyWarehouse", Inside("forwards to DeltaWarehouse and loses what a scenario says")),
    ("Warehouse", "OnHost", Inside("forwards to DeltaWarehouse")),
    ("Warehouse", "PostgresWarehouse", Suite("tests/it/postgres.rs", "a_warehouse_keeps_its_promises")),
];

/// Where adapters are.
const FOLDERS: [&str; 4] = ["runtime/adapters/src", "runtime/lakehouse/src", "runtime/log/src", "sim/src"];

/// Port and type of each `impl Port for Type` of a text, without what is only for tests.
fn adapters(text: &str) -> Vec<(String, String)> {
    let product = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    let found = product.lines().filter(|l| l.starts_with("impl")).filter_map(|line| {
        let (head, of) = line.split_once(" for ")?;
        let port = head.rsplit(' ').next()?;
        let name: String = of.chars().take_while(|c| c.is_alphanumeric()).collect();
        PORTS.contains(&port).then(|| (port.to_owned(), name))
    });
    found.collect()
}

/// The body of a test.
fn body<'a>(text: &'a str, test: &str) -> Option<&'a str> {
    let from = text.find(&format!("fn {test}("))?;
    text[from..].split("\n}\n").next()
}

fn rendered() -> String {
    let mut text = String::from(
        "# Which test holds which adapter to the promises of its port\n\n\
         Made by `tests/it/conformance_table.rs` from its table, which it compares with the code: an adapter that is not in it fails the\n\
         test. `SIMULACRO_WRITE_DOCS=1 cargo test --workspace --test it -- conformance_table` writes this page.\n\n\
         | port | adapter | held by |\n|---|---|---|\n",
    );
    for (port, adapter, held) in TABLE {
        let held = match held {
            Suite(file, test) => format!("the port's suite: `{test}` in {file}"),
            Own(file, test, why) => format!("a test of its own, since {why}: `{test}` in {file}"),
            Inside(why) => why.to_string(),
        };
        let _ = writeln!(text, "| {port} | {adapter} | {held} |");
    }
    text.push_str(
        "\nThe recording wrappers that `Platform::new` puts on every port are held by `the_recording_wrappers_keep_the_promises_of_what_they_wrap`\n\
         in tests/it/embedded.rs. The embedded log is `Client` over a file; what a file adds is held in runtime/adapters/tests/embedded_log.rs.\n",
    );
    text
}

#[test]
fn every_adapter_is_held_to_its_port_by_a_test_that_is_there() {
    let mut code: BTreeMap<(String, String), String> = BTreeMap::new();
    for folder in FOLDERS {
        for file in files(&root().join(folder)).into_iter().filter(|f| f.extension().is_some_and(|e| e == "rs")) {
            let text = std::fs::read_to_string(&file).expect("a source file");
            code.extend(adapters(&text).into_iter().map(|found| (found, file.display().to_string())));
        }
    }
    let table: Vec<(String, String)> = TABLE.iter().map(|(p, a, _)| ((*p).to_owned(), (*a).to_owned())).collect();
    let missing: Vec<_> = code.iter().filter(|(found, _)| !table.contains(found)).collect();
    assert!(missing.is_empty(), "not in the table of tests/it/conformance_table.rs: {missing:?}");
    let gone: Vec<_> = table.iter().filter(|named| !code.contains_key(named)).collect();
    assert!(gone.is_empty(), "in the table, and not in the code: {gone:?}");
    assert!(table.is_sorted(), "the table is in order of port and name");
    for (port, adapter, held) in TABLE {
        let (Suite(file, test) | Own(file, test, _)) = held else { continue };
        let text = std::fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let body = body(&text, test).unwrap_or_else(|| panic!("{port} of {adapter}: {file} has no test {test}"));
        let runs_a_suite = ["conformance::", "PROMISES", "conforms(", "keeps_the_promises(", "check_paged(", "check("]
            .iter()
            .any(|c| body.contains(c));
        assert!(runs_a_suite || matches!(held, Own(..)), "{port} of {adapter}: {test} runs no suite");
    }
}

#[test]
fn the_page_says_what_the_table_says() {
    let page: &Path = &root().join("docs/conformance.md");
    if std::env::var_os("SIMULACRO_WRITE_DOCS").is_some() {
        std::fs::write(page, rendered()).expect("the page is written");
    }
    assert_eq!(std::fs::read_to_string(page).unwrap_or_default(), rendered(), "write it again, see the page itself");
}

#[test]
fn an_adapter_is_found_in_the_text_of_a_file() {
    let text = "impl Warehouse for Nube {\nimpl<T: Link> EventLog for Cola<T> {\nimpl fmt::Display for Nube {\n\
                #[cfg(test)]\nmod tests {\nimpl Notifier for Prueba {";
    let found = adapters(text);
    assert_eq!(found, [("Warehouse", "Nube"), ("EventLog", "Cola")].map(|(p, a)| (p.to_owned(), a.to_owned())));
}
