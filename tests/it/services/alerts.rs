//! Somebody who is told of alerts: a receiver of Alertmanager's webhooks on loopback, which takes everything and remembers it.
#![expect(clippy::disallowed_methods, reason = "a test starts a real server")]

use std::sync::{Arc, Mutex, PoisonError};

use axum::{Router, body::Bytes, extract::State, http::StatusCode, routing::post};

/// What was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Of the end of an incident, not of its beginning.
    pub is_over: bool,
    /// Key of the incident.
    pub key: String,
    /// What a person reads.
    pub summary: String,
}

type All = Arc<Mutex<Vec<Told>>>;

/// The receiver; it ends when this is dropped.
#[derive(Debug)]
pub struct AlertReceiver {
    /// Address for the webhook.
    pub url: String,
    all: All,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for AlertReceiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn take(State(all): State<All>, body: Bytes) -> StatusCode {
    let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
    let text = |pointer: &str| body.pointer(pointer).and_then(|v| v.as_str()).expect(pointer).to_owned();
    let told = Told {
        is_over: text("/status") == "resolved",
        key: text("/commonLabels/dedup_key"),
        summary: text("/commonAnnotations/summary"),
    };
    all.lock().unwrap_or_else(PoisonError::into_inner).push(told);
    StatusCode::OK
}

impl AlertReceiver {
    /// Starts a receiver on a free port.
    pub async fn start() -> Self {
        let all = All::default();
        let router = Router::new().route("/alertas", post(take)).with_state(all.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}/alertas", listener.local_addr().expect("an address"));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") });
        Self { url, all, task }
    }

    /// What was told of an incident, in order.
    pub fn of(&self, key: &str) -> Vec<Told> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|told| told.key == key).cloned().collect()
    }
}
