//! The whole platform inside the simulator, over months: the production orchestrator with its assets, the source and
//! its customers, the API of products, the lake, the warehouse, the ledger, a pager, and an operator who is called.
//!
//! Everything runs on one runtime whose clock jumps from timer to timer, and services are reached over direct links: no
//! time is spent on ticks in which nothing happens, so that a year is one run. A *shop* sells, *faults* come at times that
//! the seed draws by their catalogued frequency, an *oracle* counts from the shop's own figures, *judges* look at what the
//! mart shows, who was told of what and when, and what is left of the error budgets.
//!
//! What is left out:
//! - What is wrong with single events and single requests of the stream: [`crate::stream`] has those. A story without a
//!   `[stream]` has no stream at all, and the objectives about it no data.
//! - Death in the middle of a commit: a process here dies at a wait. [`crate::world`] has the other deaths.
//! - The network: what a service answers is on time, late by a fixed latency, or an error with its code.

pub mod clicks;
pub mod clock;
pub mod detection;
pub mod faults;
pub mod judges;
pub mod operator;
pub mod oracle;
pub mod report;
pub mod scenario;
pub mod services;
pub mod shop;
pub mod stream;
pub mod stream_judges;
pub mod swarm;
pub mod world;

pub use report::Report;
pub use scenario::PlatformScenario;
