//! A broker of partitioned logs as a state machine, and the client that speaks to it.
//!
//! [`Broker`] is the whole broker: `handle(now, request) -> response`, with Kafka's rules and Kafka's code names. It does
//! no input or output and knows no clock. What must outlive a crash leaves it as a list of [`Effect`]s, which rebuild the
//! same state when they are applied in order. [`Client`] turns the port's calls into requests over a [`Link`]. The
//! embedded log puts files behind the link, the simulator puts faults and virtual latency there.
//!
//! What this leaves out of Kafka: replication, segments (retention is to the record), quotas, authorisation, and the
//! deletion of topics.

mod blob;
mod broker;
mod client;
mod code;
#[cfg(feature = "conformance")]
pub mod conformance;
mod group;
mod partition;
mod partitioner;
mod protocol;

pub use blob::Blob;
pub use broker::{Broker, Limits, State};
pub use client::{Client, Link, LinkError, Settings};
pub use code::{Code, Refusal};
pub use partition::{Partition, Stored};
pub use partitioner::{murmur2, partition_of};
pub use protocol::{Assignment, Effect, Fetched, Message, ProducerRef, Request, Response};
