//! The ports: every way in which the platform touches the world.
//!
//! Few methods, whole batches, object-safe. No method has a default body: a fault wrapper that forgot to
//! forward one would silently inject nothing.

mod dimension_api;
mod env;
mod error;
pub mod event_log;
mod lakehouse;
mod ledger;
pub mod metrics;
mod notifier;
pub mod schema_registry;
mod table_source;
mod versions;
mod warehouse;

pub use dimension_api::{DimensionApi, Fetched, NoDimensions, Snapshot, not_offered};
pub use env::Env;
pub use error::{Disposition, PortError, Result};
pub use event_log::EventLog;
pub use lakehouse::{
    Absent, AddColumns, Append, AppendRows, Commit, DayWrite, EPOCH_MOVED, Effective, Input, Lakehouse, Mark, Optimize, Period,
    Query, Restore, Rewritten, Rows, Scd2, TableVersion, TableWrite, Upsert, VACUUM_HOURS_MIN, Vacuum,
};
pub use ledger::{BUSY, FENCED, Fact, Fence, Fold, Lease, PipelineMetric, Run, RunLedger, RunStart, RunState};
pub use metrics::Metrics;
pub use notifier::{Alert, Notifier};
pub use schema_registry::{Compatibility, RegisteredSchema, SchemaRegistry, Verdict};
pub use table_source::{Column, PartitionRead, TableSource};
pub use versions::{Deleted, NOT_VERSIONED, NoVersions, Versions};
pub use warehouse::{UpsertRows, Warehouse};

use std::sync::Arc;

use object_store::ObjectStore;

use crate::history::Recorder;

/// Everything the platform needs from outside. Production and simulation differ in this value alone.
#[derive(Debug, Clone)]
pub struct Ports {
    /// Clock and ids.
    pub env: Arc<dyn Env>,
    /// Source tables.
    pub tables: Arc<dyn TableSource>,
    /// Dimensions, which enrich the sales; [`NoDimensions`] where there are none.
    pub dimensions: Arc<dyn DimensionApi>,
    /// Raw objects.
    pub objects: Arc<dyn ObjectStore>,
    /// Delta tables.
    pub lakehouse: Arc<dyn Lakehouse>,
    /// Topics of events.
    pub log: Arc<dyn EventLog>,
    /// Schemas of the events.
    pub registry: Arc<dyn SchemaRegistry>,
    /// What analysts and the dashboard read.
    pub warehouse: Arc<dyn Warehouse>,
    /// Runs.
    pub ledger: Arc<dyn RunLedger>,
    /// Alerts.
    pub notifier: Arc<dyn Notifier>,
    /// Counters and gauges.
    pub metrics: Arc<dyn Metrics>,
    /// Where the history of port calls goes. Adapters that make calls of their own below a port share it.
    pub recorder: Recorder,
}
