//! The simulator: the production platform in one process, under one seed and one virtual clock.

pub mod broker;
pub mod interpose;
pub mod ports;
pub mod scenario;
pub mod store;
pub mod world;
