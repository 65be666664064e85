//! The simulated object store: a plain state machine in memory, with conditional puts.
//!
//! It answers without waiting for virtual time, because delta-rs calls it from blocking threads on which virtual time
//! stands still; see ARCHITECTURE.md. It keeps no old versions yet and charges no latency.

use std::sync::Arc;

use object_store::{ObjectStore, memory::InMemory};

/// An empty store.
pub fn empty() -> Arc<dyn ObjectStore> {
    Arc::new(InMemory::new())
}
