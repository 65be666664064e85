//! Logs and the metrics endpoint.

use std::{io::IsTerminal, net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, http::header, response::IntoResponse, routing::get};
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
