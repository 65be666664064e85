//! Contracts: the files, the parser, the comparison.
#![expect(clippy::disallowed_methods, reason = "the tests read the folders that they guard")]

mod diff;
mod files;
mod parse;
mod value;
