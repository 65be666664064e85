//! Tables that are replaced as a whole, by epoch.

use std::sync::Arc;

use object_store::memory::InMemory;
use simulacro_core::ports::{Commit, Lakehouse, Mark, Query, TableWrite};
use simulacro_lakehouse::DeltaLakehouse;

async fn write(lake: &DeltaLakehouse, epoch: i64, rows: &str) -> Commit {
    let sql = format!("SELECT * FROM (VALUES {rows}) AS v(id, valor)");
    let (mark, query) = (Mark { writer: "cosas".into(), epoch }, Query { sql, inputs: Vec::new() });
    let write = TableWrite { table: "dim/cosas".into(), mark, query };
    lake.overwrite_table(write).await.expect("the table is written")
}

async fn rows(lake: &DeltaLakehouse) -> String {
    let sql = "SELECT id, valor FROM t ORDER BY id".to_owned();
    let input = simulacro_core::ports::Input::Delta("dim/cosas".into());
    let batches = lake.query(&Query { sql, inputs: vec![("t".into(), input)] }).await.expect("the table is read");
    let column = |at| simulacro_core::batch::strings(&batches[0], at).expect("text");
    column(0).into_iter().zip(column(1)).map(|(id, value)| format!("{id}={value} ")).collect()
}

#[tokio::test]
async fn a_whole_table_is_replaced_once_per_epoch_and_never_by_an_older_one() {
    let store = Arc::new(InMemory::new());
    let lake = DeltaLakehouse::new(store.clone());
    assert_eq!(write(&lake, 2, "('a', 'x'), ('b', 'y')").await, Commit::New(0));
    assert_eq!(write(&lake, 2, "('c', 'z')").await, Commit::Already(0), "the epoch has committed");
    assert_eq!(rows(&lake).await, "a=x b=y ");
    // Another process knows nothing but the log.
    let rival = DeltaLakehouse::new(store);
    assert_eq!(write(&rival, 1, "('c', 'z')").await, Commit::Already(0), "older than what is there");
    assert_eq!(write(&rival, 3, "('b', 'w')").await, Commit::New(1));
    assert_eq!(rows(&lake).await, "b=w ", "no row of the epoch before is left");
}
