//! Real services for tests: an address from the environment, else a container, else native binaries on loopback, else a
//! loud skip, which is a failure where `CI=true`.

pub mod alerts;
pub mod dimension_api;
pub mod kafka;
pub mod postgres;
pub mod registry;
pub mod s3;

/// Says loudly that a test did not run.
///
/// # Panics
/// Where `CI=true`: a test that cannot run there has failed.
pub fn skip(service: &str, missing: &str) {
    let text = format!("SKIPPED, nothing was tested: {service} is not there ({missing})");
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{text}");
    eprintln!("{text}");
}
