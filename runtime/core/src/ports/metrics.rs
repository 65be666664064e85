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

/// Every metric of the platform: name, kind and help text. An exporter describes these and no others.
pub const ALL: [(&str, Kind, &str); 22] = [
    ("simulacro_batch_runs_total", Kind::Counter, "Runs of the daily pipeline that ended, by state"),
    ("simulacro_batch_rows_total", Kind::Counter, "Source rows of published days, by fate"),
    ("simulacro_batch_run_duration_seconds", Kind::Gauge, "Duration of the last run of the daily pipeline"),
    ("simulacro_batch_revenue_cents", Kind::Gauge, "Net revenue of the day published last, in cents"),
    ("simulacro_batch_raw_bytes", Kind::Gauge, "Size of the raw objects of the day published last"),
    ("simulacro_batch_last_success_timestamp_seconds", Kind::Gauge, "When a day was last published, in seconds since 1970"),
    ("simulacro_destructive_calls_total", Kind::Counter, "Objects of the lake that this process deleted outside of upkeep"),
    ("simulacro_runs_total", Kind::Counter, "Runs that the orchestrator ended, by asset and state"),
    ("simulacro_sla_missed_total", Kind::Counter, "Turns that were not published at the moment of their SLA, by asset"),
    ("simulacro_breaker_open", Kind::Gauge, "Whether the circuit breaker of an asset is open: 1 open, 0 closed"),
    ("simulacro_orchestrator_leading", Kind::Gauge, "Whether this process holds the orchestrator's lease: 1 or 0"),
    ("simulacro_alerts_total", Kind::Counter, "Calls to notifiers, by outcome: delivered, failed (tried again), lost (given up)"),
    ("simulacro_alerts_waiting", Kind::Gauge, "Alerts that are not delivered yet"),
    ("simulacro_stream_events_total", Kind::Counter, "Events of committed transactions, by fate"),
    ("simulacro_stream_rows_total", Kind::Counter, "Rows of windows written, by kind of window"),
    ("simulacro_stream_commits_total", Kind::Counter, "Transactions of the realtime job, by outcome"),
    ("simulacro_stream_partials_expired_total", Kind::Counter, "Partials that came after their window's state had expired"),
    ("simulacro_stream_lag_records", Kind::Gauge, "Records between the position and the end, by partition"),
    ("simulacro_sink_rows_total", Kind::Counter, "Rows that the sinks of the stream wrote, by sink"),
    ("simulacro_sink_left_out_total", Kind::Counter, "Records that have no row in a sink's table, by sink"),
    ("simulacro_sink_freshness_seconds", Kind::Gauge, "How long the oldest record of a sink's last write had waited, by sink"),
    ("simulacro_stream_freshness_seconds", Kind::Gauge, "Age of the newest window when it was written"),
];

/// What a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_product_in_front_and_counters_their_unit_behind() {
        for (name, kind, help) in ALL {
            assert!(name.starts_with("simulacro_") && !help.is_empty(), "{name}");
            assert_eq!(name.ends_with("_total"), kind == Kind::Counter, "{name}");
        }
    }
}
