//! The one integration binary. Modules in reading order.

mod binaries;
mod days;
mod demo;

mod bad_input;
mod kills;
mod simulator;
