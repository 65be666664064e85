//! Versions of objects: what a store still has of objects that were deleted.
//!
//! What this leaves out: switching versions on, which is the administrator's, and versions that were overwritten.

use std::fmt;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::{PortError, Result};

/// Code of a store that keeps no versions.
pub const NOT_VERSIONED: &str = "NOT_VERSIONED";

/// An object that was deleted and whose content is still there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Deleted {
    /// Its path in the store.
    pub path: String,
    /// The store's name of the newest version that has content.
    pub version: String,
    /// Size of that version.
    pub bytes: u64,
    /// When it was deleted, by the store's clock.
    pub deleted_at: DateTime<Utc>,
}

/// A store that can bring deleted objects back.
#[async_trait]
pub trait Versions: fmt::Debug + Send + Sync {
    /// The deleted objects strictly below `prefix`, in order of path. An object that has been written again since is none.
    ///
    /// # Errors
    /// `Permanent` with code [`NOT_VERSIONED`] where the store keeps no versions; otherwise as for a listing.
    async fn list_deleted(&self, prefix: &str) -> Result<Vec<Deleted>>;
    /// Makes that version the present one again. Harmless to repeat.
    ///
    /// # Errors
    /// `Permanent` when the version is gone, or the object has been written again since; otherwise as for a write.
    async fn undelete(&self, deleted: &Deleted) -> Result<()>;
}

/// A store without versions, or one whose versions this program cannot ask for.
#[derive(Debug, Clone, Copy)]
pub struct NoVersions {
    /// Why there are none.
    pub why: &'static str,
}

impl NoVersions {
    fn refuse(&self, what: String) -> PortError {
        PortError::permanent(format!("{what}: {}", self.why)).code(NOT_VERSIONED)
    }
}

#[async_trait]
impl Versions for NoVersions {
    async fn list_deleted(&self, prefix: &str) -> Result<Vec<Deleted>> {
        Err(self.refuse(format!("list deleted objects below {prefix}")))
    }
    async fn undelete(&self, deleted: &Deleted) -> Result<()> {
        Err(self.refuse(format!("undelete {}", deleted.path)))
    }
}
