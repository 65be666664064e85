//! The simulated schema registry: the embedded registry's value behind virtual latency, with a time when it is away.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use simulacro_core::{
    avro::memory::Registry,
    ports::{Compatibility, Env, PortError, RegisteredSchema, Result, SchemaRegistry, Verdict},
};

use super::process::HostEnv;

/// One way to the registry and back.
const LATENCY: Duration = Duration::from_millis(3);

/// The registry of all processes.
#[derive(Debug, Default)]
pub struct RegistryService(Mutex<Registry>);

impl RegistryService {
    /// What it holds.
    pub fn lock(&self) -> MutexGuard<'_, Registry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One process's way to it.
#[derive(Debug)]
pub struct SimRegistry {
    service: Arc<RegistryService>,
    env: Arc<HostEnv>,
}

impl SimRegistry {
    /// The way of the process whose clock `env` is.
    pub fn new(service: Arc<RegistryService>, env: Arc<HostEnv>) -> Arc<Self> {
        Arc::new(Self { service, env })
    }

    async fn call<T>(&self, what: &str, carry: impl FnOnce(&mut Registry) -> Result<T> + Send) -> Result<T> {
        self.env.gate().await;
        self.env.sleep(LATENCY).await;
        if self.env.faults().hides_registry(self.env.elapsed()) {
            return Err(PortError::retryable(format!("{what} of the registry")).code("ECONNREFUSED"));
        }
        let answer = carry(&mut self.service.lock());
        self.env.gate().await;
        answer
    }
}

#[async_trait]
impl SchemaRegistry for SimRegistry {
    async fn register(&self, subject: &str, schema: &str) -> Result<u32> {
        self.call("register a schema", |r| r.register(subject, schema)).await
    }
    async fn schema(&self, id: u32) -> Result<String> {
        self.call("ask for a schema", |r| r.schema(id)).await
    }
    async fn latest(&self, subject: &str) -> Result<RegisteredSchema> {
        self.call("ask for the newest version", |r| r.latest(subject)).await
    }
    async fn version(&self, subject: &str, version: u32) -> Result<RegisteredSchema> {
        self.call("ask for a version", |r| r.version(subject, version)).await
    }
    async fn versions(&self, subject: &str) -> Result<Vec<u32>> {
        self.call("ask for the versions", |r| r.versions(subject)).await
    }
    async fn check(&self, subject: &str, schema: &str) -> Result<Verdict> {
        self.call("check a schema", |r| r.check(subject, schema)).await
    }
    async fn compatibility(&self, subject: &str) -> Result<Compatibility> {
        self.call("ask for the compatibility", |r| Ok(r.compatibility(subject))).await
    }
    async fn set_compatibility(&self, subject: &str, level: Compatibility) -> Result<()> {
        self.call("set the compatibility", |r| {
            r.set_compatibility(subject, level);
            Ok(())
        })
        .await
    }
}
