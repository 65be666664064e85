//! Contracts and models against a real Delta lake in memory.

mod checks;
mod drawings;
mod models;
mod shop;
mod whole_table;
