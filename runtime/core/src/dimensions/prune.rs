//! Old versions of the dimensions are removed: manifests that are older than the retention, and copies that none names.
//!
//! The newest version of a dimension always stays, whatever its age. A copy belongs to the one snapshot that it was written
//! for, and a manifest names it within minutes or never, so a copy that is older than the retention and that no manifest
//! names is of no use to anybody. Manifests go first, oldest first: what dies in between leaves copies for the next time.
//!
//! What this leaves out: the Delta tables, which VACUUM looks after.

use std::{collections::BTreeSet, time::Duration};

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::{ObjectStoreExt, path::Path};

use super::{Dimension, Version, delete, folder, store_error};
use crate::{
    batch::again,
    ports::{PortError, Ports, Result},
};

/// Removes what is older than `keep`, and returns the removed paths, sorted. Harmless to repeat.
///
/// # Errors
/// Those of the store; a damaged manifest is `Permanent`, and nothing of its dimension is removed.
pub async fn prune(ports: &Ports, keep: Duration) -> Result<Vec<String>> {
    let _upkeep = ports.recorder.upkeep("dim/raw");
    let mut removed = Vec::new();
    for dimension in Dimension::ALL {
        removed.extend(prune_one(ports, dimension, keep).await?);
    }
    removed.sort();
    Ok(removed)
}

async fn version(ports: &Ports, path: &Path) -> Result<Version> {
    let bytes = again(|| async {
        let got = ports.objects.get(path).await.map_err(|e| store_error(format!("get {path}"), e))?;
        got.bytes().await.map_err(|e| store_error(format!("get {path}"), e))
    })
    .await?;
    serde_json::from_slice(&bytes)
        .map_err(|e| PortError::permanent(format!("read manifest {path}: found a damaged file")).because(e))
}

async fn prune_one(ports: &Ports, dimension: Dimension, keep: Duration) -> Result<Vec<String>> {
    let now = ports.env.now();
    let is_old = |at: DateTime<Utc>| (now - at).to_std().is_ok_and(|age| age > keep);
    let root = Path::from(folder(dimension));
    let list = || async {
        let listing = ports.objects.list(Some(&root));
        listing.try_collect::<Vec<_>>().await.map_err(|e| store_error(format!("list {root}"), e))
    };
    let mut all = again(list).await?;
    all.sort_by(|a, b| a.location.cmp(&b.location));
    let is_manifest = |path: &Path| path.as_ref().contains("/_manifest/");
    let manifests: Vec<&Path> = all.iter().map(|m| &m.location).filter(|p| is_manifest(p)).collect();
    let Some((newest, older)) = manifests.split_last() else { return Ok(Vec::new()) };
    let mut named = BTreeSet::from([version(ports, newest).await?.file]);
    let mut leave = Vec::new();
    for path in older {
        let version = version(ports, path).await?;
        if is_old(version.confirmed_at) {
            leave.push((*path).clone());
        } else {
            named.insert(version.file);
        }
    }
    let copies = all.iter().filter(|m| m.location.as_ref().ends_with(".parquet") && is_old(m.last_modified));
    leave.extend(copies.map(|m| m.location.clone()).filter(|p| !named.contains(p.as_ref())));
    for path in &leave {
        delete(ports, path).await?;
    }
    Ok(leave.into_iter().map(String::from).collect())
}
