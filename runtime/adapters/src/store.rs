//! Where a lake is: in its data folder, or in an object store that the folder remembers by its address.
//!
//! The address is in the file `lake.url`. It holds no secret: keys, region and endpoint come from the environment, as for
//! every client of S3. A lake may have a bucket of its own, or a folder of one. What this leaves out: other clouds, whose clients
//! are not built in.

use std::{io::ErrorKind, path::Path, sync::Arc};

use object_store::{
    ObjectStore,
    aws::{AmazonS3Builder, S3ConditionalPut},
    path::Path as ObjectPath,
};
use simulacro_core::ports::{PortError, Result};

use crate::FolderOf;

const FILE: &str = "lake.url";

/// Opens the store at an address, `s3://bucket` or `s3://bucket/folder`. Nothing is asked of it yet.
///
/// Reads `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP` and the other
/// variables of the client.
///
/// # Errors
/// `Permanent` for an address of another form, and for settings that cannot be.
pub fn open_store(url: &str) -> Result<Arc<dyn ObjectStore>> {
    let place = url.strip_prefix("s3://").unwrap_or_default();
    let place = place.strip_suffix('/').unwrap_or(place);
    let (bucket, folder) = place.split_once('/').unwrap_or((place, ""));
    let has_folder = place.contains('/');
    let folder = ObjectPath::parse(folder).ok().filter(|f| f.parts().next().is_some() == has_folder);
    let (Some(folder), false) = (folder, bucket.is_empty() || place.contains(['@', ':', '?'])) else {
        return Err(PortError::permanent(format!("open store {url}: expected s3://bucket or s3://bucket/folder")));
    };
    let store = AmazonS3Builder::from_env()
        .with_bucket_name(bucket)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .build()
        .map_err(|e| PortError::permanent(format!("open store {url}")).because(e))?;
    let store: Arc<dyn ObjectStore> = Arc::new(store);
    Ok(if has_folder { Arc::new(FolderOf::new(store, folder)) } else { store })
}

/// The address of a data folder's lake; `None` when it is in the folder itself.
///
/// # Errors
/// `Permanent` when the file is there and cannot be read.
pub fn kept_store(data: &Path) -> Result<Option<String>> {
    let path = data.join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(url) => Ok(Some(url.trim().to_owned())),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(PortError::permanent(format!("read {}", path.display())).because(e)),
    }
}

/// Remembers the address of a data folder's lake, for this and every later command. Idempotent.
///
/// # Errors
/// `Permanent` for an address that [`open_store`] refuses, for a folder whose lake is elsewhere already, and when the file
/// cannot be written.
pub fn keep_store(data: &Path, url: &str) -> Result<()> {
    open_store(url)?;
    let path = data.join(FILE);
    match kept_store(data)? {
        Some(kept) if kept == url => return Ok(()),
        Some(kept) => {
            return Err(PortError::permanent(format!("use store {url}: found {kept} in {}, expected the same", path.display())));
        }
        None => {}
    }
    if data.join("lake").exists() {
        let what = format!("use store {url}: found a lake in {}, expected a folder without one", data.display());
        return Err(PortError::permanent(what));
    }
    std::fs::create_dir_all(data)
        .and_then(|()| std::fs::write(&path, url))
        .map_err(|e| PortError::permanent(format!("write {}", path.display())).because(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_or_refused_by_name() {
        for good in ["s3://cubo", "s3://cubo/", "s3://cubo/lago", "s3://cubo/lagos/uno/"] {
            open_store(good).unwrap_or_else(|e| panic!("{good}: {}", e.chain()));
        }
        for bad in ["cubo", "s3://", "s3:///lago", "s3://cubo//", "s3://cubo/a//b", "gs://cubo", "s3://clave:secreto@cubo"] {
            let error = open_store(bad).expect_err(bad);
            assert!(error.what.contains("expected s3://bucket"), "{}", error.what);
        }
    }

    #[test]
    fn a_folder_keeps_one_address() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let data = dir.path().join("datos");
        assert_eq!(kept_store(&data).expect("readable"), None);
        keep_store(&data, "s3://cubo-a").expect("kept");
        keep_store(&data, "s3://cubo-a").expect("the same again");
        assert_eq!(kept_store(&data).expect("readable").as_deref(), Some("s3://cubo-a"));
        let error = keep_store(&data, "s3://cubo-b").expect_err("another one");
        assert!(error.what.contains("s3://cubo-a"), "{}", error.what);
        let other = dir.path().join("otros");
        std::fs::create_dir_all(other.join("lake")).expect("a folder");
        let error = keep_store(&other, "s3://cubo-a").expect_err("a lake is there");
        assert!(error.what.contains("found a lake"), "{}", error.what);
    }
}
