//! A schema registry: schemas by id, and the versions of each subject.
//!
//! The vocabulary and the codes are Confluent's. A subject is a topic's key or value (`ecommerce.clicks-value`); its
//! versions count from 1; an id is the same for the same schema in every subject, is never given to another schema, and
//! stands in front of each record. What this port leaves out: deleting, references between schemas, and types other than
//! Avro. Codes that a caller may rely on, in [`super::PortError::code`]:
//!
//! | code | meaning |
//! |---|---|
//! | `40401` | no such subject |
//! | `40402` | no such version |
//! | `40403` | no such id |
//! | `409` | incompatible with an earlier version |
//! | `42201` | no valid Avro schema |

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::Result;

/// Code: no such subject.
pub const SUBJECT_NOT_FOUND: &str = "40401";
/// Code: no such version of the subject.
pub const VERSION_NOT_FOUND: &str = "40402";
/// Code: no schema has this id.
pub const SCHEMA_NOT_FOUND: &str = "40403";
/// Code: incompatible with an earlier version.
pub const INCOMPATIBLE: &str = "409";
/// Code: no valid Avro schema.
pub const INVALID_SCHEMA: &str = "42201";

/// Which readers and writers of a subject must understand each other.
///
/// Backward: the new schema reads what older ones wrote. Forward: older ones read what the new one writes. Not transitive
/// compares with the newest version alone, which lets a field be dropped in one version and come back as another type in
/// the next; a replay of old records then fails. So the default is [`Compatibility::BackwardTransitive`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Compatibility {
    /// Anything goes.
    None,
    /// New reads newest old.
    Backward,
    /// New reads every old.
    #[default]
    BackwardTransitive,
    /// Newest old reads new.
    Forward,
    /// Every old reads new.
    ForwardTransitive,
    /// Both, against the newest old.
    Full,
    /// Both, against every old.
    FullTransitive,
}

impl Compatibility {
    /// Every level with its name in the API.
    pub const ALL: [(&'static str, Self); 7] = [
        ("NONE", Self::None),
        ("BACKWARD", Self::Backward),
        ("BACKWARD_TRANSITIVE", Self::BackwardTransitive),
        ("FORWARD", Self::Forward),
        ("FORWARD_TRANSITIVE", Self::ForwardTransitive),
        ("FULL", Self::Full),
        ("FULL_TRANSITIVE", Self::FullTransitive),
    ];
    /// Must the new schema read what older ones wrote?
    pub fn backward(self) -> bool {
        matches!(self, Self::Backward | Self::BackwardTransitive | Self::Full | Self::FullTransitive)
    }
    /// Must older schemas read what the new one writes?
    pub fn forward(self) -> bool {
        matches!(self, Self::Forward | Self::ForwardTransitive | Self::Full | Self::FullTransitive)
    }
    /// Is every version compared, or the newest only?
    pub fn transitive(self) -> bool {
        matches!(self, Self::BackwardTransitive | Self::ForwardTransitive | Self::FullTransitive)
    }
}

impl fmt::Display for Compatibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::ALL.iter().find(|(_, level)| level == self).map_or("", |(name, _)| name))
    }
}

/// One version of a subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredSchema {
    /// Id of the schema, from 1.
    pub id: u32,
    /// Version within the subject, from 1.
    pub version: u32,
    /// The declaration, JSON.
    pub schema: String,
}

/// The answer to a compatibility check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// May it be registered?
    pub compatible: bool,
    /// Why not, for people; a registry may give none.
    pub messages: Vec<String>,
}

/// A registry of Avro schemas.
#[async_trait]
pub trait SchemaRegistry: fmt::Debug + Send + Sync {
    /// Registers `schema` as the newest version of `subject` and returns its id. Idempotent: a schema that the subject
    /// has already keeps its id and version, so after `Unknown` the same call is repeated. Two texts are the same schema
    /// when they differ in white space only.
    ///
    /// # Errors
    /// `Permanent` with code `409` when the subject's compatibility forbids it, `42201` when it is no Avro schema; nothing
    /// is registered then.
    async fn register(&self, subject: &str, schema: &str) -> Result<u32>;
    /// The declaration that has this id. It never changes and may be kept for ever.
    ///
    /// # Errors
    /// `Permanent` with code `40403` when there is none. Any other error says nothing about the id: a record must not
    /// be given up because of it.
    async fn schema(&self, id: u32) -> Result<String>;
    /// The newest version of a subject.
    ///
    /// # Errors
    /// `Permanent` with code `40401` when there is no such subject.
    async fn latest(&self, subject: &str) -> Result<RegisteredSchema>;
    /// One version of a subject.
    ///
    /// # Errors
    /// `Permanent` with code `40401` without such a subject, `40402` without such a version.
    async fn version(&self, subject: &str, version: u32) -> Result<RegisteredSchema>;
    /// The numbers of all versions of a subject, rising.
    ///
    /// # Errors
    /// `Permanent` with code `40401` when there is no such subject.
    async fn versions(&self, subject: &str) -> Result<Vec<u32>>;
    /// Would [`SchemaRegistry::register`] accept this schema? A subject that does not exist accepts any.
    ///
    /// # Errors
    /// `Permanent` with code `42201` when it is no Avro schema.
    async fn check(&self, subject: &str, schema: &str) -> Result<Verdict>;
    /// What registering in this subject must keep; the registry's own default when nothing was set.
    async fn compatibility(&self, subject: &str) -> Result<Compatibility>;
    /// Sets what registering in this subject must keep; the subject need not exist yet. Idempotent.
    async fn set_compatibility(&self, subject: &str, level: Compatibility) -> Result<()>;
}
