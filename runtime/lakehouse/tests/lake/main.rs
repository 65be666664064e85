//! Contracts and models against a real Delta lake in memory.

mod checks;
mod drawings;
mod events;
mod faults;
mod growth;
mod laws;
mod memory;
mod models;
mod shop;
mod whole_table;
