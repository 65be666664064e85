//! The simulator: the production platform in one process, under one seed and one virtual clock.

pub mod broker;
pub mod capsule;
pub mod defence;
pub mod dimension_api;
pub mod faults;
pub mod harness;
pub mod host;
pub mod interpose;
pub mod invariants;
pub mod ledger;
pub mod oracle;
pub mod platform;
pub mod ports;
pub mod postgres;
pub mod postmortem;
pub mod report;
pub mod rng;
pub mod scenario;
pub mod store;
pub mod stream;
pub mod summary;
pub mod swarm;
pub mod world;
