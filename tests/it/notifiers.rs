//! The notifiers that call a service, against a server on loopback that takes, refuses, is busy, breaks and hangs.
#![expect(clippy::disallowed_methods, reason = "a test is the server that is called")]

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use simulacro_adapters::{
    AlertRouter, AlertSettings, DeliverySettings, LogNotifier, PagerDutySettings, SlackSettings, WebhookSettings,
};
use simulacro_core::ports::{Disposition, Env, Notifier};
use simulacro_sim::{host::Host, ports::SimNotifier};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::conformance::notifier::{alert, check};

/// A clock that stands still, and remembers for how long it was asked to wait.
#[derive(Debug, Default)]
struct Still(Mutex<Vec<Duration>>);

#[async_trait]
impl Env for Still {
    fn now(&self) -> DateTime<Utc> {
        "2024-03-18T03:15:00Z".parse().expect("a time")
    }
    async fn sleep(&self, duration: Duration) {
        self.0.lock().expect("waits").push(duration);
    }
    fn random(&self) -> u64 {
        0
    }
    fn new_id(&self) -> String {
        unreachable!("a notifier makes no ids")
    }
}

#[derive(Debug, Clone, Copy)]
enum Answer {
    Status(u16),
    Busy(u64),
    Hang,
    Drop,
}

/// What a request had: path, authorization, body.
#[derive(Debug, Clone, PartialEq)]
struct Request {
    path: String,
    authorization: Option<String>,
    body: Value,
}

struct Server {
    address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    script: Arc<Mutex<VecDeque<Answer>>>,
}

async fn read(stream: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    loop {
        let mut chunk = [0; 4096];
        let n = stream.read(&mut chunk).await.ok()?;
        if n == 0 {
            return None;
        }
        bytes.extend_from_slice(&chunk[..n]);
        let Some(head) = bytes.windows(4).position(|w| w == b"\r\n\r\n") else { continue };
        let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
        let header = |name: &str| {
            let mut lines = text.lines().skip(1).filter_map(|l| l.split_once(": "));
            lines.find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v.to_owned())
        };
        let length: usize = header("content-length")?.parse().ok()?;
        if bytes.len() < head + 4 + length {
            continue;
        }
        assert_eq!(header("content-type").as_deref(), Some("application/json"));
        let path = text.split(' ').nth(1)?.to_owned();
        let body = serde_json::from_slice(&bytes[head + 4..head + 4 + length]).expect("JSON");
        return Some(Request { path, authorization: header("authorization"), body });
    }
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let (requests, script) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(VecDeque::new())));
        let (seen, answers) = (requests.clone(), script.clone());
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (seen, answers) = (seen.clone(), answers.clone());
                tokio::spawn(async move {
                    let Some(request) = read(&mut stream).await else { return };
                    seen.lock().expect("requests").push(request);
                    let answer = answers.lock().expect("script").pop_front().unwrap_or(Answer::Status(202));
                    let (status, extra) = match answer {
                        Answer::Status(status) => (status, String::new()),
                        Answer::Busy(seconds) => (429, format!("retry-after: {seconds}\r\n")),
                        Answer::Hang => return tokio::time::sleep(Duration::from_secs(3_600)).await,
                        Answer::Drop => return,
                    };
                    let body = "{\"message\":\"said the server\"}";
                    let text = format!(
                        "HTTP/1.1 {status} X\r\n{extra}connection: close\r\ncontent-length: {}\r\n\r\n{body}",
                        body.len()
                    );
                    let _ = stream.write_all(text.as_bytes()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        Self { address, requests, script }
    }

    fn answer(&self, answers: &[Answer]) {
        self.script.lock().expect("script").extend(answers);
    }

    fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("requests").clone()
    }

    /// What a person has seen, told by the path.
    fn seen(&self, path: &str) -> Vec<String> {
        let of_path = self.requests().into_iter().filter(|r| r.path == path);
        of_path
            .map(|r| match path {
                "/pagerduty" => {
                    let action = if r.body["event_action"] == "trigger" { "raise" } else { "resolve" };
                    format!("{action} {}", r.body["dedup_key"].as_str().expect("a key"))
                }
                "/slack" => {
                    let text = r.body["text"].as_str().expect("a text").to_owned();
                    let key = text.split('`').nth(1).expect("a key").to_owned();
                    format!("{} {key}", if text.starts_with("*[resolved]") { "resolve" } else { "raise" })
                }
                _ => {
                    let action = if r.body["status"] == "firing" { "raise" } else { "resolve" };
                    format!("{action} {}", r.body["commonLabels"]["dedup_key"].as_str().expect("a key"))
                }
            })
            .collect()
    }
}

const SECRETS: [(&str, &str); 3] = [("CLAVE_PD", "clave-pd-secreta"), ("URL_SLACK", "/slack"), ("TOKEN", "token-secreto")];

#[derive(Clone, Copy)]
struct Channels {
    pagerduty: bool,
    slack: bool,
    webhook: bool,
}

const ALL: Channels = Channels { pagerduty: true, slack: true, webhook: true };
const NONE: Channels = Channels { pagerduty: false, slack: false, webhook: false };

fn router(address: &str, channels: Channels, env: Arc<Still>) -> AlertRouter {
    let pagerduty = PagerDutySettings { routing_key_env: "CLAVE_PD".into(), url: Some(format!("{address}/pagerduty")) };
    let webhook = WebhookSettings { url: format!("{address}/webhook"), token_env: Some("TOKEN".into()) };
    let settings = AlertSettings {
        pagerduty: channels.pagerduty.then_some(pagerduty),
        slack: channels.slack.then(|| SlackSettings { webhook_url_env: "URL_SLACK".into() }),
        webhook: channels.webhook.then_some(webhook),
        delivery: DeliverySettings { tries: 3, connect_timeout_s: 1, timeout_s: 1, wait_max_s: 30 },
    };
    let lookup = |name: &str| {
        let value = SECRETS.iter().find(|(n, _)| *n == name)?.1;
        Some(if name == "URL_SLACK" { format!("{address}{value}") } else { value.to_owned() })
    };
    AlertRouter::new(&settings, env, lookup).expect("the channels are set up")
}

#[tokio::test]
async fn every_channel_keeps_the_promises_of_a_notifier() {
    for (channels, priority, path) in [
        (Channels { pagerduty: true, ..NONE }, 1, "/pagerduty"),
        (Channels { slack: true, ..NONE }, 2, "/slack"),
        (Channels { slack: true, ..NONE }, 3, "/slack"),
        (Channels { webhook: true, ..NONE }, 1, "/webhook"),
        (ALL, 1, "/webhook"),
    ] {
        let server = Server::start().await;
        check(&router(&server.address, channels, Arc::default()), priority, || server.seen(path)).await;
    }
    let (env, host) = (Arc::new(Still::default()), Arc::new(Host::new("worker", [])));
    let simulated = SimNotifier { env, raised: Mutex::default(), open: Mutex::new(BTreeSet::new()), host };
    check(&simulated, 1, || {
        let raised = simulated.raised.lock().expect("alerts");
        raised.iter().map(|(_, a)| format!("raise {}", a.dedup_key)).collect()
    })
    .await;
    LogNotifier.raise(&alert("run_failed:a", 1)).await.expect("the log takes everything");
}

#[tokio::test]
async fn priorities_go_to_their_channels_and_the_webhook_hears_all() {
    let server = Server::start().await;
    let router = router(&server.address, ALL, Arc::default());
    for priority in 1..=3 {
        router.raise(&alert(&format!("p{priority}:x"), priority)).await.expect("it is taken");
    }
    assert_eq!(server.seen("/pagerduty"), ["raise p1:x"]);
    assert_eq!(server.seen("/slack"), ["raise p2:x", "raise p3:x"]);
    assert_eq!(server.seen("/webhook"), ["raise p1:x", "raise p2:x", "raise p3:x"]);
    for priority in 1..=3 {
        router.resolve(&format!("p{priority}:x")).await.expect("it is taken");
    }
    assert_eq!(server.seen("/pagerduty")[1..], ["resolve p1:x"]);
    assert_eq!(server.seen("/slack")[2..], ["resolve p2:x", "resolve p3:x"]);
    let tokens: BTreeSet<_> = server.requests().into_iter().filter(|r| r.path == "/webhook").map(|r| r.authorization).collect();
    assert_eq!(tokens, BTreeSet::from([Some("Bearer token-secreto".to_owned())]));
}

#[tokio::test]
async fn without_a_channel_the_log_takes_an_alert() {
    let router = router("http://127.0.0.1:9", NONE, Arc::default());
    router.raise(&alert("run_failed:a", 1)).await.expect("the log takes it");
    router.resolve("run_failed:a").await.expect("the log takes it");
}

#[tokio::test]
async fn what_is_sent_is_what_the_services_read() {
    let server = Server::start().await;
    let router = router(&server.address, ALL, Arc::default());
    router.raise(&alert("sla_missed:diario:2024-03-17", 1)).await.expect("it is taken");
    router.raise(&alert("source_unavailable:diario:2024-03-17", 2)).await.expect("it is taken");
    router.resolve("sla_missed:diario:2024-03-17").await.expect("it is taken");
    router.resolve("source_unavailable:diario:2024-03-17").await.expect("it is taken");
    let shown: Vec<String> = server
        .requests()
        .iter()
        .map(|r| format!("POST {}\n{}\n", r.path, serde_json::to_string_pretty(&r.body).expect("JSON")))
        .collect();
    insta::assert_snapshot!(shown.join("\n"));
}

#[tokio::test]
async fn a_busy_or_broken_service_is_called_again_with_the_same_body() {
    let server = Server::start().await;
    let env = Arc::new(Still::default());
    let router = router(&server.address, Channels { pagerduty: true, ..NONE }, env.clone());
    server.answer(&[Answer::Busy(7), Answer::Status(500), Answer::Status(202)]);
    router.raise(&alert("run_failed:a:2024-03-17", 1)).await.expect("the third call is taken");
    let requests = server.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|r| *r == requests[0]), "{requests:?}");
    // What the service asks for, then a wait of our own.
    assert_eq!(*env.0.lock().expect("waits"), [Duration::from_secs(7), Duration::from_secs(2)]);
}

#[tokio::test]
async fn tries_are_bounded_and_the_error_says_what_may_be_done() {
    for (answers, calls, code, disposition) in [
        (vec![Answer::Busy(1); 5], 3, "429", Disposition::Retryable),
        (vec![Answer::Status(503); 5], 3, "503", Disposition::Unknown),
        (vec![Answer::Hang; 5], 3, "TIMEOUT", Disposition::Unknown),
        (vec![Answer::Drop; 5], 3, "CONNECTION", Disposition::Unknown),
        (vec![Answer::Status(400); 5], 1, "400", Disposition::Permanent),
        (vec![Answer::Status(302); 5], 1, "302", Disposition::Permanent),
    ] {
        let server = Server::start().await;
        let router = router(&server.address, Channels { pagerduty: true, ..NONE }, Arc::default());
        server.answer(&answers);
        let error = router.raise(&alert("run_failed:a:2024-03-17", 1)).await.expect_err("it is not taken");
        assert_eq!((error.code.as_deref(), error.disposition), (Some(code), disposition), "{}", error.chain());
        assert_eq!(server.requests().len(), calls, "{answers:?}");
    }
    let free = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = format!("http://{}", free.local_addr().expect("an address"));
    drop(free);
    let router = router(&address, Channels { pagerduty: true, ..NONE }, Arc::default());
    let error = router.raise(&alert("run_failed:a", 1)).await.expect_err("nobody listens");
    assert_eq!((error.code.as_deref(), error.disposition), (Some("CONNECTION"), Disposition::Retryable));
}

#[tokio::test]
async fn a_wait_that_a_service_asks_for_is_bounded_too() {
    let server = Server::start().await;
    let env = Arc::new(Still::default());
    server.answer(&[Answer::Busy(86_400)]);
    let router = router(&server.address, Channels { slack: true, ..NONE }, env.clone());
    router.raise(&alert("run_failed:a", 2)).await.expect("the second call is taken");
    assert_eq!(*env.0.lock().expect("waits"), [Duration::from_secs(30)]);
}

#[tokio::test]
async fn a_channel_that_has_taken_an_alert_does_not_get_it_again() {
    let server = Server::start().await;
    let router = router(&server.address, Channels { slack: false, ..ALL }, Arc::default());
    server.answer(&[Answer::Status(202), Answer::Status(400)]);
    router.raise(&alert("run_failed:a", 1)).await.expect_err("the webhook refuses it");
    router.raise(&alert("run_failed:a", 1)).await.expect("the webhook takes it");
    assert_eq!((server.seen("/pagerduty").len(), server.seen("/webhook").len()), (1, 2));
}

#[tokio::test]
async fn no_secret_is_ever_shown() {
    let server = Server::start().await;
    let router = router(&server.address, ALL, Arc::default());
    server.answer(&[Answer::Status(400), Answer::Status(400)]);
    let error = router.raise(&alert("run_failed:a", 1)).await.expect_err("it is refused");
    server.answer(&[Answer::Drop; 6]);
    let other = router.raise(&alert("run_failed:b", 2)).await.expect_err("nobody answers");
    for text in [error.chain(), format!("{error:?}"), other.chain(), format!("{other:?}"), format!("{router:?}")] {
        for secret in ["clave-pd-secreta", "/slack", "token-secreto"] {
            assert!(!text.contains(secret), "{secret} is in {text}");
        }
    }
    assert!(error.chain().contains("said the server"), "{}", error.chain());
    let settings = AlertSettings { slack: Some(SlackSettings { webhook_url_env: "NADA".into() }), ..AlertSettings::default() };
    let missing = AlertRouter::new(&settings, Arc::new(Still::default()), |_| None).expect_err("it is not set");
    assert!(missing.to_string().contains("NADA"), "{missing}");
    let no_url = AlertRouter::new(&settings, Arc::new(Still::default()), |_| Some("no-es-url-secreta".into()));
    assert!(!no_url.expect_err("it is no URL").chain().contains("secreta"));
}

#[test]
fn alert_settings_are_strict() {
    for bad in [json!({ "pager": {} }), json!({ "slack": { "webhook_url": "x" } }), json!({ "delivery": { "retries": 1 } })] {
        serde_json::from_value::<AlertSettings>(bad.clone()).expect_err(&bad.to_string());
    }
    let defaults: AlertSettings = serde_json::from_value(json!({})).expect("all may be left out");
    assert_eq!((defaults.delivery.tries, defaults.pagerduty), (3, None));
}
