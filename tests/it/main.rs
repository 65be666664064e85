//! The one integration binary. Modules in reading order.

mod binaries;
mod services;

mod days;
mod demo;

mod bad_input;
mod bad_world;
mod commands;
mod kills;
mod simulator;
mod streaming;

mod conformance;
mod conformance_registry;
mod dimensions;
mod embedded;
mod postgres;
mod s3;

mod real_platform;
