//! The embedded adapters are held to the promises of their ports.
#![expect(clippy::disallowed_methods, reason = "a test prepares the files of an adapter")]

use std::sync::Arc;

use object_store::{ObjectStore, local::LocalFileSystem, memory::InMemory};
use simulacro_adapters::{CsvSource, FileHistory, SqliteLedger, SystemEnv};
use simulacro_core::history::{RecordedStore, Recorder};
use simulacro_lakehouse::{DeltaLakehouse, DeltaWarehouse};

use crate::conformance;

#[tokio::test(flavor = "multi_thread")]
async fn a_csv_folder_keeps_the_promises_of_a_table_source() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("ventas.csv"), conformance::table_source::VENTAS).expect("the table is written");
    conformance::table_source::check(&CsvSource::open(dir.path()).expect("the folder is read")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_keeps_the_promises_of_a_ledger() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("ledger.db");
    let open = || async { SqliteLedger::open(&path).await.expect("the ledger opens") };
    conformance::ledger::check(open).await;
    conformance::ledger::an_old_end_does_not_free_the_present_run(&open().await, &open().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delta_keeps_the_promises_of_a_warehouse() {
    let lakehouse = Arc::new(DeltaLakehouse::new(Arc::new(InMemory::new())));
    conformance::warehouse::check(&DeltaWarehouse::new(lakehouse)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delta_in_memory_keeps_the_promises_of_a_lakehouse() {
    conformance::lakehouse::check(&DeltaLakehouse::new(Arc::new(InMemory::new()))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delta_in_a_folder_keeps_the_promises_of_a_lakehouse() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = Arc::new(LocalFileSystem::new_with_prefix(dir.path()).expect("the folder opens"));
    // As in production: the recording store lists in order, which a folder does not.
    let history = FileHistory::open(&dir.path().join("history.jsonl")).expect("the history opens");
    let recorder = Recorder::new(Arc::new(SystemEnv::default()), Arc::new(history));
    conformance::lakehouse::check(&DeltaLakehouse::new(Arc::new(RecordedStore { inner: folder, recorder }))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_and_folders_keep_the_promises_of_an_object_store() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let folder = LocalFileSystem::new_with_prefix(dir.path()).expect("the folder opens");
    let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    for store in [memory.clone(), Arc::new(folder)] {
        conformance::object_store::check(store, "prueba").await;
    }
    conformance::object_store::an_update_needs_the_version_it_replaces(memory.as_ref(), "prueba").await;
}
