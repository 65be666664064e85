//! The link between one process and the broker: messages take time, and get lost on either way.
//!
//! Nobody tells a process that a message was lost: it gives up after [`REPLY_WITHIN`] and cannot know whether its request
//! was carried out. What the link leaves out is said in [`super`].

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde_json::json;
use simulacro_core::{history::Recorder, ports::Env};
use simulacro_log::{Code, Link, LinkError, Refusal, Request, Response};

use super::{
    faults::{Loses, Side},
    process::HostEnv,
};
use crate::{
    broker::{RequestKind, SimBroker, kind},
    rng::Stream,
};

/// How long a process waits for a reply.
pub const REPLY_WITHIN: Duration = Duration::from_secs(2);
/// Shortest and longest time of a message on its way, in microseconds.
const WAY_US: (u64, u64) = (500, 4_000);

/// The link.
#[derive(Debug)]
pub struct HostLink {
    broker: Arc<SimBroker>,
    env: Arc<HostEnv>,
    way: Mutex<Stream>,
    recorder: Recorder,
}

impl HostLink {
    /// A link of the process whose clock `env` is.
    pub fn new(broker: Arc<SimBroker>, env: Arc<HostEnv>, way: Stream, recorder: Recorder) -> Arc<Self> {
        Arc::new(Self { broker, env, way: Mutex::new(way), recorder })
    }

    async fn travel(&self) {
        let us = self.way.lock().unwrap_or_else(PoisonError::into_inner).between(WAY_US.0, WAY_US.1);
        let slow = self.env.faults().slows(&self.env.process().name, self.env.elapsed());
        self.env.sleep(Duration::from_micros(us) + slow).await;
    }

    fn cuts(&self, which: Loses) -> bool {
        self.env.faults().cuts(&self.env.process().name, which, self.env.elapsed())
    }

    /// Lets happen to the process what is due at this moment of a request.
    async fn strike(&self, kind: RequestKind, side: Side) {
        let process = self.env.process();
        if let Some(worker) = process.worker
            && let Some(deed) = self.env.faults().at_request(worker, kind, side)
        {
            process.suffer(deed, self.env.elapsed());
        }
        self.env.gate().await;
    }

    async fn exchange(&self, kind: RequestKind, request: Request) -> Result<Response, LinkError> {
        let name = &self.env.process().name;
        let lost = || LinkError::Lost(Refusal::new(Code::RequestTimedOut, format!("wait for the answer to {kind:?} of {name}")));
        self.strike(kind, Side::Before).await;
        self.travel().await;
        if self.cuts(Loses::Requests) {
            self.env.sleep(REPLY_WITHIN).await;
            return Err(lost());
        }
        let restarts = self.broker.restarts();
        let response = self.broker.carry(request);
        self.strike(kind, Side::After).await;
        self.travel().await;
        // A reply that is under way when the broker goes down does not arrive.
        if self.cuts(Loses::Replies) || (response.is_ok() && self.broker.restarts() != restarts) {
            self.env.sleep(REPLY_WITHIN).await;
            return Err(lost());
        }
        response
    }
}

#[async_trait]
impl Link for HostLink {
    async fn call(&self, request: Request) -> Result<Response, LinkError> {
        let kind = kind(&request);
        let result = self.exchange(kind, request).await;
        // Calls of the ports are in the history already; here stands what they hide by repeating a request.
        if let Err(error) = &result {
            let (how, refusal) = match error {
                LinkError::Refused(refusal) => ("refused", refusal),
                LinkError::Unsent(refusal) => ("unsent", refusal),
                LinkError::Lost(refusal) => ("lost", refusal),
            };
            let outcome = format!("{how} {}", refusal.code.name().to_lowercase());
            let call = serde_json::to_value(kind).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
            self.recorder.record("broker", &call, outcome, json!({ "host": self.env.process().name }));
        }
        result
    }
    fn now(&self) -> DateTime<Utc> {
        self.env.now()
    }
    async fn sleep(&self, duration: Duration) {
        self.env.sleep(duration).await;
    }
    fn version(&self) -> u64 {
        self.broker.version()
    }
    async fn changed(&self, seen: u64, wait: Duration) {
        tokio::select! {
            biased;
            () = self.broker.moved(seen) => {}
            () = self.env.sleep(wait) => {}
        }
        self.env.gate().await;
    }
}
