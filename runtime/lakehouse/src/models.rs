//! The SQL models that ship with the program lie under `models/` of this crate.
//!
//! What the files mean (references, days, tests) is read by [`simulacro_core::models`], which has the list of them too.

pub use simulacro_core::models::FILES;
