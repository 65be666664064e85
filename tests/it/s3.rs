//! The object store over a real S3-compatible server.

use std::sync::Arc;

use object_store::{Error, ObjectStore, ObjectStoreExt, path::Path};
use simulacro_adapters::FolderOf;
use simulacro_lakehouse::DeltaLakehouse;

use crate::{
    binaries::{program, said, source},
    conformance,
    services::s3::S3,
};

#[tokio::test(flavor = "multi_thread")]
async fn s3_keeps_the_promises_of_an_object_store() {
    let Some(server) = S3::start().await else { return };
    let store = Arc::new(server.store());
    conformance::object_store::check(store.clone(), "prueba").await;
    conformance::object_store::an_update_needs_the_version_it_replaces(store.as_ref(), "prueba").await;

    // A wrong secret is refused; it is not taken for a missing object.
    let error = server.store_with_wrong_secret().head(&Path::from("prueba/a")).await.expect_err("refused");
    assert!(!matches!(error, Error::NotFound { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn delta_on_s3_keeps_the_promises_of_a_lakehouse() {
    let Some(server) = S3::start().await else { return };
    conformance::lakehouse::check(&DeltaLakehouse::new(Arc::new(server.store()))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_a_bucket_keeps_the_promises_of_a_store_and_of_a_lakehouse() {
    let Some(server) = S3::start().await else { return };
    let bucket: Arc<dyn ObjectStore> = Arc::new(server.store());
    let folder = |name: &str| Arc::new(FolderOf::new(bucket.clone(), Path::from(name)));
    let (one, other) = (folder("lagos/uno"), folder("lagos/otro"));
    conformance::object_store::check(one.clone(), "prueba").await;
    conformance::object_store::an_update_needs_the_version_it_replaces(one.as_ref(), "prueba").await;
    conformance::lakehouse::check(&DeltaLakehouse::new(one.clone())).await;
    // What comes back is a path of the folder, and the neighbour sees nothing of it.
    one.put(&Path::from("a/b"), "x".into()).await.expect("written");
    assert_eq!(one.head(&Path::from("a/b")).await.expect("it is there").location, Path::from("a/b"));
    assert!(matches!(other.head(&Path::from("a/b")).await, Err(Error::NotFound { .. })));
    assert_eq!(bucket.head(&Path::from("lagos/uno/a/b")).await.expect("it is there").size, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_lakes_share_a_bucket_and_give_the_tables_of_a_folder() {
    let Some(server) = S3::start().await else { return };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let source = source(dir.path(), |text| text.lines().take(300).map(|l| format!("{l}\n")).collect());
    let said_by = |arguments: &[&str]| {
        let run = program("simulacro").args(arguments).envs(server.variables()).output().expect("it starts");
        assert!(run.status.success(), "{}", said(&run));
        String::from_utf8_lossy(&run.stdout).into_owned()
    };
    let path = |p: &std::path::Path| p.to_str().expect("a path").to_owned();
    let mut shown = Vec::new();
    for (name, store) in [("a", Some("lagos/a")), ("b", Some("lagos/b")), ("c", None)] {
        let (data, source) = (path(&dir.path().join(name)), path(&source));
        let store = store.map(|folder| format!("--store=s3://{}/{folder}", server.bucket()));
        let run = ["batch", "run", "--source", &source, "--data", &data, "--date", "1997-01-01"];
        said_by(&run.into_iter().chain(store.as_deref()).collect::<Vec<_>>());
        // The data folder remembers where the lake is.
        shown.push(said_by(&["status", "--data", &data]));
    }
    assert_eq!(shown[0], shown[2]);
    assert_eq!(shown[1], shown[2]);
}
