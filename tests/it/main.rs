//! The one integration binary. Modules in reading order.

mod binaries;
mod services;
mod days;
mod demo;

mod bad_input;
mod conformance_registry;
mod kills;
mod simulator;
