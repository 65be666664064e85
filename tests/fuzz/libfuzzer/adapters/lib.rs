//! The adapters over files, as they are in the product.

#[path = "../../../../runtime/adapters/src/embedded_log.rs"]
mod embedded_log;
#[path = "../../../../runtime/adapters/src/registry_embedded.rs"]
mod registry_embedded;

pub use embedded_log::{EmbeddedLog, EmbeddedLogConfig, FileLink, open_embedded_log};
pub use registry_embedded::EmbeddedRegistry;
