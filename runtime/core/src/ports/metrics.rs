//! Counters and gauges, in Prometheus' model.

use std::fmt;

/// Where numbers about the platform go. Recording never fails and never waits.
///
/// Names are Prometheus names with their unit at the end (`_total`, `_seconds`, `_bytes`). Labels have bounded values:
/// a table, a fate, a day's state, never an id.
pub trait Metrics: fmt::Debug + Send + Sync {
    /// Adds to a counter.
    fn count(&self, name: &'static str, labels: &[(&'static str, &str)], by: u64);
    /// Sets a gauge. The value is for display and alerting; money is in cents here too.
    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)], value: f64);
}
