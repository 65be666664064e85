//! The streaming job inside the simulator: the production job `realtime_metrics`, its workers, a broker, a registry and
//! producers in one process, under one seed and one virtual clock.
//!
//! Workers, producers and observers are turmoil hosts: each has a runtime and a clock of its own, and a crash takes all its
//! memory. They reach the broker over direct links ([`link`]), on which messages take time and get lost. A *workload*
//! sends events, an *oracle* computes every window from what the topic then holds, *invariants* compare.
//!
//! A story may say what processing and state cost ([`cost`]); then the job can fall behind by its own doing. Its monitor is the
//! platform's, and an operator adds workers after an alert.
//!
//! What is left out:
//! - Bytes on the network: a request is carried as a value. A message is on time or lost, never late.
//! - Several brokers, and the loss of what a broker has acknowledged. The broker's state machine says what must be synced
//!   before it is promised, but not what a client of a lost transaction is told afterwards, which Kafka avoids by its
//!   replicas; so a restart here keeps what was acknowledged and forgets who was in which group.

pub mod cost;
pub mod faults;
pub mod invariants;
pub mod link;
pub mod oracle;
pub mod process;
pub mod registry;
pub mod sabotage;
pub mod scenario;
pub mod swarm;
pub mod wire;
pub mod workload;
pub mod world;

pub use scenario::StreamScenario;
