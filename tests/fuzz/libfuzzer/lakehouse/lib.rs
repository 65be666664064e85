//! The decoder of PostgreSQL's binary COPY, as it is in the product.

#[path = "../../../../runtime/lakehouse/src/copy.rs"]
pub mod copy;
