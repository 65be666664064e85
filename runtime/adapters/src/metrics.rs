//! Metrics for Prometheus: counters and gauges of this process, rendered as text.

use metrics::{Key, Label, Metadata, Recorder};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use simulacro_core::ports::{
    Metrics,
    metrics::{ALL, Kind},
};

const METADATA: Metadata<'static> = Metadata::new("simulacro", metrics::Level::INFO, None);

/// A registry of its own: nothing is global, so two platforms in one process do not mix.
pub struct PrometheusMetrics {
    recorder: PrometheusRecorder,
    /// Renders the present values in the text format.
    pub handle: PrometheusHandle,
}

impl std::fmt::Debug for PrometheusMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrometheusMetrics").finish_non_exhaustive()
    }
}

impl Default for PrometheusMetrics {
    fn default() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        for (name, kind, help) in ALL {
            match kind {
                Kind::Counter => recorder.describe_counter(name.into(), None, help.into()),
                Kind::Gauge => recorder.describe_gauge(name.into(), None, help.into()),
            }
        }
        let handle = recorder.handle();
        Self { recorder, handle }
    }
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    debug_assert!(ALL.iter().any(|(described, _, _)| *described == name), "{name} is not in the list of metrics");
    Key::from_parts(name, labels.iter().map(|(k, v)| Label::new(*k, (*v).to_owned())).collect::<Vec<_>>())
}

impl Metrics for PrometheusMetrics {
    fn count(&self, name: &'static str, labels: &[(&'static str, &str)], by: u64) {
        self.recorder.register_counter(&key(name, labels), &METADATA).increment(by);
    }
    fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)], value: f64) {
        self.recorder.register_gauge(&key(name, labels), &METADATA).set(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_rendered_with_help() {
        let metrics = PrometheusMetrics::default();
        metrics.count("simulacro_batch_rows_total", &[("fate", "published")], 2);
        metrics.count("simulacro_batch_rows_total", &[("fate", "published")], 3);
        metrics.gauge("simulacro_batch_revenue_cents", &[], 1_999.0);
        let text = metrics.handle.render();
        for line in [
            "# HELP simulacro_batch_rows_total Source rows of published days, by fate",
            "simulacro_batch_rows_total{fate=\"published\"} 5",
            "simulacro_batch_revenue_cents 1999",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
