//! The object store over a real S3-compatible server.

use std::sync::Arc;

use object_store::{Error, ObjectStoreExt, path::Path};
use simulacro_lakehouse::DeltaLakehouse;

use crate::{conformance, services::s3::S3};

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
