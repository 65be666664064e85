//! A registry as a value: what the embedded registry keeps in its file, and the simulated one in memory.
//!
//! What it leaves out: where it is kept, who may change it at the same time, and how its callers reach it.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{
    compatibility::violations_of_texts,
    incompatible, invalid_schema,
    schema::{Schema, canonical_text},
};
use crate::ports::{
    Compatibility, PortError, RegisteredSchema, Result, SchemaRegistry, Verdict,
    schema_registry::{SCHEMA_NOT_FOUND, SUBJECT_NOT_FOUND, VERSION_NOT_FOUND},
};

/// Schemas, subjects and levels. The methods are those of [`crate::ports::SchemaRegistry`], with its codes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// Declarations by id, from 1, in canonical text.
    pub schemas: BTreeMap<u32, String>,
    /// Ids by version, from version 1, of each subject.
    pub subjects: BTreeMap<String, Vec<u32>>,
    /// What was set for a subject; [`Compatibility::default`] for the others.
    pub levels: BTreeMap<String, Compatibility>,
}

impl Registry {
    /// Registers a schema; see the port.
    ///
    /// # Errors
    /// Codes `409` and `42201`.
    pub fn register(&mut self, subject: &str, schema: &str) -> Result<u32> {
        let text = self.valid(subject, schema)?;
        let known = self.schemas.iter().find(|(_, s)| **s == text).map(|(id, _)| *id);
        let versions = self.subjects.get(subject);
        if let Some(id) = known.filter(|id| versions.is_some_and(|v| v.contains(id))) {
            return Ok(id);
        }
        let level = self.compatibility(subject);
        let violations = violations_of_texts(level, &text, &self.older(subject)).map_err(|e| invalid_schema(subject, e))?;
        if !violations.is_empty() {
            return Err(incompatible(subject, level, &violations));
        }
        let next = self.schemas.last_key_value().map_or(1, |(last, _)| last + 1);
        let id = known.unwrap_or(next);
        self.schemas.insert(id, text);
        self.subjects.entry(subject.to_owned()).or_default().push(id);
        Ok(id)
    }

    /// The schema of an id.
    ///
    /// # Errors
    /// Code `40403`.
    pub fn schema(&self, id: u32) -> Result<String> {
        let missing = || PortError::permanent(format!("read schema {id}: there is none")).code(SCHEMA_NOT_FOUND);
        self.schemas.get(&id).cloned().ok_or_else(missing)
    }

    /// The newest version.
    ///
    /// # Errors
    /// Code `40401`.
    pub fn latest(&self, subject: &str) -> Result<RegisteredSchema> {
        let newest = self.versions(subject)?.last().copied().unwrap_or(0);
        self.version(subject, newest)
    }

    /// One version.
    ///
    /// # Errors
    /// Codes `40401` and `40402`.
    pub fn version(&self, subject: &str, version: u32) -> Result<RegisteredSchema> {
        let ids = self.subjects.get(subject).ok_or_else(|| no_subject(subject))?;
        let index = version.checked_sub(1).and_then(|i| usize::try_from(i).ok());
        let missing = || PortError::permanent(format!("read {subject}: there is no version {version}")).code(VERSION_NOT_FOUND);
        let id = *index.and_then(|i| ids.get(i)).ok_or_else(missing)?;
        Ok(RegisteredSchema { id, version, schema: self.schema(id)? })
    }

    /// All versions.
    ///
    /// # Errors
    /// Code `40401`.
    pub fn versions(&self, subject: &str) -> Result<Vec<u32>> {
        let ids = self.subjects.get(subject).ok_or_else(|| no_subject(subject))?;
        Ok((1..).take(ids.len()).collect())
    }

    /// Would it be registered?
    ///
    /// # Errors
    /// Code `42201`.
    pub fn check(&self, subject: &str, schema: &str) -> Result<Verdict> {
        let text = self.valid(subject, schema)?;
        let older = self.older(subject);
        if older.iter().any(|(_, old)| *old == text) {
            return Ok(Verdict { compatible: true, messages: Vec::new() });
        }
        let violations = violations_of_texts(self.compatibility(subject), &text, &older);
        let violations = violations.map_err(|e| invalid_schema(subject, e))?;
        let messages: Vec<_> = violations.iter().map(ToString::to_string).collect();
        Ok(Verdict { compatible: messages.is_empty(), messages })
    }

    /// The level of a subject.
    pub fn compatibility(&self, subject: &str) -> Compatibility {
        self.levels.get(subject).copied().unwrap_or_default()
    }

    /// Sets the level of a subject.
    pub fn set_compatibility(&mut self, subject: &str, level: Compatibility) {
        self.levels.insert(subject.to_owned(), level);
    }

    fn older(&self, subject: &str) -> Vec<(u32, String)> {
        let ids = self.subjects.get(subject).map_or(&[][..], Vec::as_slice);
        (1..).zip(ids).filter_map(|(version, id)| Some((version, self.schemas.get(id)?.clone()))).collect()
    }

    fn valid(&self, subject: &str, schema: &str) -> Result<String> {
        Schema::parse(schema).and_then(|_| canonical_text(schema)).map_err(|e| invalid_schema(subject, e))
    }
}

fn no_subject(subject: &str) -> PortError {
    PortError::permanent(format!("read {subject}: there is no such subject")).code(SUBJECT_NOT_FOUND)
}

/// A [`Registry`] in memory behind the port, for one process: what the simulator and tests use.
#[derive(Debug, Default)]
pub struct MemoryRegistry {
    state: Mutex<Registry>,
}

impl MemoryRegistry {
    fn state(&self) -> Result<MutexGuard<'_, Registry>> {
        self.state.lock().map_err(|_| PortError::permanent("lock the registry: a holder panicked"))
    }
}

#[async_trait]
impl SchemaRegistry for MemoryRegistry {
    async fn register(&self, subject: &str, schema: &str) -> Result<u32> {
        self.state()?.register(subject, schema)
    }
    async fn schema(&self, id: u32) -> Result<String> {
        self.state()?.schema(id)
    }
    async fn latest(&self, subject: &str) -> Result<RegisteredSchema> {
        self.state()?.latest(subject)
    }
    async fn version(&self, subject: &str, version: u32) -> Result<RegisteredSchema> {
        self.state()?.version(subject, version)
    }
    async fn versions(&self, subject: &str) -> Result<Vec<u32>> {
        self.state()?.versions(subject)
    }
    async fn check(&self, subject: &str, schema: &str) -> Result<Verdict> {
        self.state()?.check(subject, schema)
    }
    async fn compatibility(&self, subject: &str) -> Result<Compatibility> {
        Ok(self.state()?.compatibility(subject))
    }
    async fn set_compatibility(&self, subject: &str, level: Compatibility) -> Result<()> {
        self.state()?.set_compatibility(subject, level);
        Ok(())
    }
}
