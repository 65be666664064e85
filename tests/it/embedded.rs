//! The embedded adapters are held to the promises of their ports.
#![expect(clippy::disallowed_methods, reason = "a test prepares the files of an adapter")]

use std::sync::{Arc, Mutex};

use futures::TryStreamExt;
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, local::LocalFileSystem, memory::InMemory, path::Path};
use simulacro_adapters::{
    CsvSource, FileHistory, FolderOf, LogNotifier, NoSource, PrometheusMetrics, ReadOnlyStore, SqliteLedger, SystemEnv,
    connect_folder,
};
use simulacro_core::{
    history::{RecordedStore, Recorder, recorded},
    ports::{Disposition, Notifier, RunLedger, TableSource},
};
use simulacro_lakehouse::{DeltaLakehouse, DeltaWarehouse};
use simulacro_sim::{host::Host, ledger::SimLedger, ports::SimNotifier};

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
async fn the_simulated_ledger_keeps_the_promises_of_a_ledger() {
    let host = Arc::new(Host::new("worker", []));
    let first = SimLedger::new(host.clone());
    let open = || async { first.connect(host.clone()).expect("the ledger is there") };
    conformance::ledger::check(open).await;
    conformance::ledger::an_old_end_does_not_free_the_present_run(&open().await, &open().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_of_an_earlier_version_is_opened_with_its_runs() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("ledger.db");
    {
        let ledger = SqliteLedger::open(&path).await.expect("the ledger opens");
        let ledger: &dyn RunLedger = &ledger;
        let day = chrono::NaiveDate::default();
        let run = ledger.begin("antigua", day, "r", 0, chrono::DateTime::UNIX_EPOCH).await.expect("the pipeline is free");
        ledger.finish(&run).await.expect("the run ends");
    }
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(&path);
    let pool = sqlx::SqlitePool::connect_with(options).await.expect("the file opens");
    for sql in ["DROP TABLE leases", "DROP TABLE facts", "ALTER TABLE runs DROP COLUMN scheduled_at"] {
        sqlx::raw_sql(sql).execute(&pool).await.expect("the ledger is made older");
    }
    pool.close().await;
    let ledger = SqliteLedger::open(&path).await.expect("the ledger opens");
    assert_eq!(ledger.runs("antigua").await.expect("the ledger answers").len(), 1);
    ledger.acquire_lease("x", "a", std::time::Duration::from_secs(1), chrono::DateTime::UNIX_EPOCH).await.expect("it is free");
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

#[tokio::test(flavor = "multi_thread")]
async fn the_recording_wrappers_keep_the_promises_of_what_they_wrap() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("ventas.csv"), conformance::table_source::VENTAS).expect("the table is written");
    let csv = Arc::new(CsvSource::open(dir.path()).expect("the folder is read"));
    let below = connect_folder(csv, &dir.path().join("data"), Arc::new(PrometheusMetrics::default())).await.expect("connected");
    let ports = recorded(below);
    conformance::table_source::check(ports.tables.as_ref()).await;
    conformance::object_store::check(ports.objects.clone(), "prueba").await;
    conformance::lakehouse::check(ports.lakehouse.as_ref()).await;
    conformance::warehouse::check(ports.warehouse.as_ref()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_a_store_keeps_the_promises_of_an_object_store() {
    let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let folder = Arc::new(FolderOf::new(memory.clone(), Path::from("lagos/uno")));
    conformance::object_store::check(folder.clone(), "prueba").await;
    conformance::object_store::an_update_needs_the_version_it_replaces(folder.as_ref(), "prueba").await;
    conformance::lakehouse::check(&DeltaLakehouse::new(folder)).await;
    let all: Vec<_> = memory.list(None).try_collect().await.expect("a listing");
    assert!(all.iter().all(|m| m.location.as_ref().starts_with("lagos/uno/")), "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_store_reads_what_is_there_and_refuses_every_change() {
    let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let (there, new) = (Path::from("a/b"), Path::from("a/c"));
    memory.put(&there, "x".into()).await.expect("written");
    let store = ReadOnlyStore(memory.clone());
    assert_eq!(store.get(&there).await.expect("read").bytes().await.expect("read").as_ref(), b"x");
    assert_eq!(store.head(&there).await.expect("read").size, 1);
    assert!(matches!(store.head(&new).await, Err(Error::NotFound { .. })));
    let listed = |store: &dyn ObjectStore| store.list(None).try_collect::<Vec<_>>();
    let refused = |result: object_store::Result<()>| assert!(matches!(result, Err(Error::PermissionDenied { .. })), "{result:?}");
    refused(store.put(&there, "y".into()).await.map(|_| ()));
    refused(store.put_opts(&new, "y".into(), PutMode::Create.into()).await.map(|_| ()));
    refused(store.put_multipart(&new).await.map(|_| ()));
    refused(store.delete(&there).await);
    refused(store.copy(&there, &new).await);
    refused(store.rename(&there, &new).await);
    assert_eq!(listed(&store).await.expect("listed"), listed(memory.as_ref()).await.expect("listed"));
    assert_eq!(memory.get(&there).await.expect("read").bytes().await.expect("read").as_ref(), b"x");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simulated_pager_keeps_the_promises_of_a_notifier() {
    let env = Arc::new(SystemEnv::default());
    let pager = SimNotifier { env, raised: Mutex::default(), open: Mutex::default(), host: Arc::new(Host::new("worker", [])) };
    let seen = || {
        let raised = pager.raised.lock().expect("the pager");
        raised.iter().map(|(_, alert)| format!("raise {}", alert.dedup_key)).collect()
    };
    conformance::notifier::check(&pager, 1, seen).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_takes_every_alert_and_every_end() {
    let alert = conformance::notifier::alert("run_failed:diario:2024-03-17", 1);
    for _ in 0..2 {
        LogNotifier.raise(&alert).await.expect("it is taken");
        LogNotifier.resolve(&alert.dedup_key).await.expect("it is taken");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_source_says_so_to_every_question() {
    let day = chrono::NaiveDate::default();
    let answers = [
        NoSource.ping().await.err(),
        NoSource.columns("ventas").await.err(),
        NoSource.not_null("ventas").await.err(),
        NoSource.read_day("ventas", day, &[]).await.err(),
        NoSource.read_table("ventas", &[]).await.err(),
    ];
    for error in answers {
        let error = error.expect("there is no source");
        assert!(error.what.contains("expected --source or --postgres"), "{}", error.what);
        assert_eq!(error.disposition, Disposition::Permanent);
    }
}
