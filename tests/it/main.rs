//! The one integration binary. Modules in reading order.

mod binaries;
mod services;

mod days;
mod demo;

mod backfill;
mod bad_input;
mod bad_world;
mod commands;
mod doctor;
mod held_days;
mod incidents;
mod kills;
mod library;
mod models;
mod monitored_stream;
mod orchestrated;
mod orchestrator;
mod query;
mod restore;
mod simulator;
mod slow_sink;
mod sources;
mod stream_chaos;
mod streaming;

mod conformance;
mod conformance_registry;
mod conformance_table;
mod dimensions;
mod embedded;
mod notifiers;
mod postgres;
mod s3;

mod real_platform;
