//! What the platform needs of an `ObjectStore`: creation that one of several writers wins, overwriting, ordered
//! listing, and missing keys that are told apart from failures.

use std::sync::Arc;

use futures::{TryStreamExt, future::join_all};
use object_store::{Error, ObjectStore, ObjectStoreExt, PutMode, PutPayload, UpdateVersion, path::Path};

async fn read(store: &dyn ObjectStore, path: &Path) -> Vec<u8> {
    store.get(path).await.expect("the object is there").bytes().await.expect("the object is read").to_vec()
}

/// Every promise in turn, below `prefix`, where nothing is yet.
pub async fn check(store: Arc<dyn ObjectStore>, prefix: &str) {
    let store = store.as_ref();
    let path = |name: &str| Path::from(format!("{prefix}/{name}"));

    // A key that is missing is just that.
    for error in [
        store.get(&path("nadie")).await.map(|_| ()).expect_err("there is no such object"),
        store.head(&path("nadie")).await.expect_err("there is no such object"),
    ] {
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    }
    assert!(list(store, prefix).await.is_empty());

    // An overwrite replaces the whole object; an empty object is an object.
    for body in ["uno, largo", "dos", ""] {
        store.put(&path("a"), PutPayload::from(body.as_bytes().to_vec())).await.expect("the object is written");
        assert_eq!(read(store, &path("a")).await, body.as_bytes());
        assert_eq!(store.head(&path("a")).await.expect("the object is there").size, body.len() as u64);
    }
    store.put(&path("a"), PutPayload::from_static(b"0123456789")).await.expect("the object is written");
    assert_eq!(store.get_range(&path("a"), 3..7).await.expect("the range is there").as_ref(), b"3456");

    // Creation has one winner, and the losers change nothing.
    for round in 0..10 {
        let contested = path(&format!("disputado/{round}"));
        let create = |writer: u8| {
            let contested = contested.clone();
            async move { store.put_opts(&contested, PutPayload::from(vec![writer; 100]), PutMode::Create.into()).await }
        };
        let results = join_all((0..8).map(create)).await;
        let winners: Vec<_> = results.iter().enumerate().filter(|(_, r)| r.is_ok()).map(|(i, _)| i as u8).collect();
        let [winner] = winners.as_slice() else { panic!("round {round}: winners {winners:?}: {results:?}") };
        for error in results.iter().filter_map(|r| r.as_ref().err()) {
            assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
        }
        assert_eq!(read(store, &contested).await, vec![*winner; 100]);
        let again = store.put_opts(&contested, PutPayload::from_static(b"tarde"), PutMode::Create.into()).await;
        assert!(matches!(again, Err(Error::AlreadyExists { .. })), "{again:?}");
    }

    // Listing is complete and by whole path segments. Order is the caller's business where a store has none.
    for name in ["b/2", "b/10", "b/1", "bb/1", "b/c/1"] {
        store.put(&path(name), PutPayload::from_static(b"x")).await.expect("the object is written");
    }
    let found = list(store, &format!("{prefix}/b")).await;
    assert_eq!(found, ["b/1", "b/10", "b/2", "b/c/1"].map(|name| path(name).to_string()));
    let level = store.list_with_delimiter(Some(&path("b"))).await.expect("the folder is listed");
    assert_eq!(level.common_prefixes, [path("b/c")]);
    assert_eq!(level.objects.len(), 3);

    // Deleting what is there removes it and nothing else.
    store.delete(&path("b/1")).await.expect("the object is deleted");
    assert!(matches!(store.head(&path("b/1")).await, Err(Error::NotFound { .. })));
    assert_eq!(list(store, &format!("{prefix}/b")).await.len(), 3);
}

/// Replacing exactly the version that was read; not every store can.
pub async fn an_update_needs_the_version_it_replaces(store: &dyn ObjectStore, prefix: &str) {
    let path = Path::from(format!("{prefix}/version"));
    let first = store.put(&path, PutPayload::from_static(b"uno")).await.expect("the object is written");
    let update = |version: UpdateVersion, body: &'static [u8]| {
        let path = path.clone();
        async move { store.put_opts(&path, PutPayload::from_static(body), PutMode::Update(version).into()).await }
    };
    let second = update(first.clone().into(), b"dos").await.expect("nobody was faster");
    let stale = update(first.into(), b"tarde").await;
    assert!(matches!(stale, Err(Error::Precondition { .. })), "{stale:?}");
    assert_eq!(read(store, &path).await, b"dos");
    update(second.into(), b"tres").await.expect("nobody was faster");
    assert_eq!(read(store, &path).await, b"tres");
}

async fn list(store: &dyn ObjectStore, prefix: &str) -> Vec<String> {
    let found: Vec<_> = store.list(Some(&Path::from(prefix))).try_collect().await.expect("the store lists");
    let mut paths: Vec<String> = found.into_iter().map(|meta| meta.location.to_string()).collect();
    paths.sort();
    paths
}
