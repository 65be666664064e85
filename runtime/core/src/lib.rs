//! The core of simulacro: what the platform does, written against traits.
//!
//! Nothing in this crate opens a socket, a file, a thread or a process, and nothing reads a clock or entropy:
//! all of that arrives through [`ports::Ports`]. The same code therefore runs in production and in the simulator.

pub mod assets;
pub mod avro;
pub mod backfill;
pub mod batch;
pub mod contract;
pub mod dimensions;
pub mod history;
pub mod models;
pub mod orchestrator;
pub mod platform;
pub mod ports;
pub mod quality;
pub mod restore;
pub mod slo;
mod store_credentials;
pub mod streaming;
