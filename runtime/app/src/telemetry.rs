//! Logs, progress and the metrics endpoint.

use std::{io::IsTerminal, net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, http::header, response::IntoResponse, routing::get};
use indicatif::{ProgressBar, ProgressStyle};
use simulacro_adapters::PrometheusMetrics;
use tracing_subscriber::{EnvFilter, fmt};

/// Sends logs to standard error: on a terminal warnings, as lines for a person, since progress is shown there; otherwise
/// everything that happens to a day, as JSON objects.
///
/// `SIMULACRO_LOG` chooses what is logged, for example `info` or `simulacro_core=debug`.
pub fn init_logs() {
    let terminal = std::io::stderr().is_terminal();
    let level = if terminal { "warn" } else { "info" };
    // A table that is not there yet is no error, but the library below says so before it is asked.
    let ours = ["core", "adapters", "lakehouse"].map(|name| format!("simulacro_{name}={level}")).join(",");
    let filter = EnvFilter::try_from_env("SIMULACRO_LOG")
        .unwrap_or_else(|_| EnvFilter::new(format!("warn,buoyant_kernel=off,simulacro={level},{ours}")));
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if terminal {
        builder.compact().with_target(false).init();
    } else {
        builder.json().init();
    }
}

/// How far a long command is: a bar on a terminal, otherwise one line of the log per step.
///
/// Dropping it takes the bar away, however the command ends.
pub struct Progress {
    bar: ProgressBar,
    unit: &'static str,
}

impl Progress {
    /// Progress over `length` steps of a `unit`, a plural such as `days`.
    ///
    /// # Errors
    /// When the bar's template is wrong, which would be our own mistake.
    pub fn new(unit: &'static str, length: u64) -> Result<Self, indicatif::style::TemplateError> {
        // Not drawn unless standard error is a terminal.
        let bar = ProgressBar::new(length);
        let template = format!("{{bar:40}} {{pos}}/{{len}} {unit}  {{msg}}  {{elapsed}} elapsed, {{eta}} to go");
        bar.set_style(ProgressStyle::with_template(&template)?);
        Ok(Self { bar, unit })
    }
    /// Says what is being worked on.
    pub fn at(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        self.bar.tick();
    }
    /// One step is done, and too small for a line of the log.
    pub fn step_quietly(&self) {
        self.bar.inc(1);
    }
    /// One step is done.
    pub fn step(&self) {
        self.bar.inc(1);
        if self.bar.is_hidden() {
            let (done, of) = (self.bar.position(), self.bar.length().unwrap_or(0));
            tracing::info!(done, of, unit = self.unit, at = %self.bar.message(), "progress");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

async fn metrics(State(metrics): State<Arc<PrometheusMetrics>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.handle.render())
}

/// Serves `/metrics` for Prometheus and `/healthz` until the process ends; returns the address it listens on.
///
/// # Errors
/// When the address is taken.
#[expect(clippy::disallowed_methods, reason = "the application listens")]
pub async fn serve_metrics(address: SocketAddr, registry: Arc<PrometheusMetrics>) -> std::io::Result<SocketAddr> {
    let listener = tokio::net::TcpListener::bind(address).await?;
    let bound = listener.local_addr()?;
    let router = Router::new().route("/metrics", get(metrics)).route("/healthz", get(async || "ok\n")).with_state(registry);
    tokio::spawn(async move {
        if let Err(e) = axum::serve(listener, router).await {
            tracing::error!(error = %e, "metrics endpoint stopped");
        }
    });
    Ok(bound)
}
