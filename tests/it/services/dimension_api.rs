//! A dimension API for tests: a small HTTP server on loopback, which answers as the simulator's state machine says.
#![expect(clippy::disallowed_methods, reason = "a test starts a real server")]

use std::sync::{Arc, Mutex};

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderName, Response, StatusCode, Uri, header},
    routing::get,
};
use simulacro_core::dimensions::paged::PageRequest;
use simulacro_sim::dimension_api::{Answer, Service, lock};

/// The server; it ends when this is dropped.
#[derive(Debug)]
pub struct DimensionServer {
    /// Base address of the dimensions.
    pub url: String,
    /// What it answers from.
    pub service: Arc<Mutex<Service>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for DimensionServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The value of a parameter of the query; the values in use need no unescaping.
fn parameter(uri: &Uri, name: &str) -> Option<String> {
    let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
    pairs.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
}

async fn answer(
    State(service): State<Arc<Mutex<Service>>>,
    Path(dimension): Path<String>,
    uri: Uri,
    headers: HeaderMap,
) -> Response<Body> {
    let header = |name: HeaderName| headers.get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
    let request = PageRequest {
        dimension,
        cursor: parameter(&uri, "cursor"),
        rows: parameter(&uri, "limit").and_then(|l| l.parse().ok()).unwrap_or(100),
        if_none_match: header(header::IF_NONE_MATCH),
        if_match: header(header::IF_MATCH),
    };
    let token = header(header::AUTHORIZATION).and_then(|v| v.strip_prefix("Bearer ").map(str::to_owned));
    let answer = lock(&service).handle(chrono::Utc::now(), &request, token.as_deref());
    match answer {
        Answer::Response(page) => {
            let mut response = Response::builder().status(StatusCode::from_u16(page.status).expect("a status"));
            if let Some(etag) = page.etag {
                response = response.header(header::ETAG, etag);
            }
            if let Some(wait) = page.retry_after {
                response = response.header(header::RETRY_AFTER, wait.as_secs());
            }
            response.body(Body::from(page.body)).expect("a response")
        }
        // A listener cannot refuse one connection: this one breaks instead, in the middle of its body.
        Answer::Refused => {
            let broken = futures::stream::iter([Err::<&[u8], _>(std::io::Error::other("down"))]);
            Response::new(Body::from_stream(broken))
        }
        Answer::Silence => std::future::pending().await,
    }
}

impl DimensionServer {
    /// Starts a server on a free port.
    pub async fn start(service: Service) -> Self {
        let service = Arc::new(Mutex::new(service));
        let router = Router::new().route("/v1/{dimension}", get(answer)).with_state(service.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}/v1", listener.local_addr().expect("an address"));
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("the server runs") });
        Self { url, service, task }
    }
}
