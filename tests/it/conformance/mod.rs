//! What each port promises, as functions over the port: every adapter is held to the same promises.

pub mod dimension_api;
pub mod lakehouse;
pub mod ledger;
pub mod notifier;
pub mod object_store;
pub mod table_source;
pub mod warehouse;
