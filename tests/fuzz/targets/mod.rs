//! Decoders of bytes from outside, each as a function of bytes that panics when a promise is broken.
//!
//! The promises: no panic and no endless loop; memory in proportion to the input; what was decoded and encoded again decodes
//! to the same; an error is not empty. Seeds are made by the encoders of today, so they do not grow stale; what a fuzzer found
//! is beside them in `corpus`.

pub mod copy;
pub mod files;
pub mod records;
pub mod texts;

/// A decoder under test.
pub struct Target {
    /// Name, also of its folder in `corpus`.
    pub name: &'static str,
    /// Decodes, and panics when a promise is broken.
    pub run: fn(&[u8]),
    /// Valid inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Bytes of memory that each byte of input may cost at the most, beside a fixed [`BYTES_ANYWAY`].
    pub per_byte: usize,
    /// Inputs of a test run.
    pub cases: u64,
}

/// Memory that a decoder may take for an input of any length, in bytes.
pub const BYTES_ANYWAY: usize = 8 << 20;

const fn target(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds, per_byte: 256, cases: 3_000 }
}

/// Those of libraries that need the whole program are in the test alone, see `main.rs`.
pub const TARGETS: [Target; 24] = [
    target("avro_schema", texts::avro_schema, texts::avro_schema_seeds),
    target("avro_clicks", records::avro_clicks, records::avro_clicks_seeds),
    target("avro_metrics", records::avro_metrics, records::avro_metrics_seeds),
    target("avro_evolved", records::avro_evolved, records::avro_evolved_seeds),
    target("state_record", records::state_record, records::state_record_seeds),
    target("state_key", records::state_key, records::state_key_seeds),
    // A cell of 20 bytes becomes a set, a key and a place in a map; a sketch is 16 KiB.
    Target { per_byte: 2_048, cases: 1_500, ..target("click_changelog", records::click_changelog, records::changelog_seeds) },
    Target { per_byte: 2_048, cases: 1_500, ..target("merge_changelog", records::merge_changelog, records::changelog_seeds) },
    Target { per_byte: 2_048, cases: 1_500, ..target("partials", records::partials, records::changelog_seeds) },
    target("copy", copy::copy, copy::copy_seeds),
    target("copy_scales", copy::copy_scales, copy::copy_seeds),
    target("manifest", texts::manifest, texts::manifest_seeds),
    target("dimension_page", texts::dimension_page, texts::dimension_page_seeds),
    target("contract", texts::contract, texts::contract_seeds),
    target("objective", texts::objective, texts::objective_seeds),
    target("model", texts::model, texts::model_seeds),
    target("backfill_plan", texts::backfill_plan, texts::backfill_plan_seeds),
    target("stream_config", texts::stream_config, texts::stream_config_seeds),
    target("values", texts::values, texts::values_seeds),
    target("history", texts::history, texts::history_seeds),
    Target { per_byte: 512, cases: 1_000, ..target("cdnow", texts::cdnow, texts::cdnow_seeds) },
    Target { cases: 300, ..target("event_log_wal", files::event_log_wal, files::event_log_wal_seeds) },
    Target { cases: 300, ..target("event_log_snapshot", files::event_log_snapshot, files::event_log_snapshot_seeds) },
    Target { cases: 500, ..target("registry_file", files::registry_file, files::registry_file_seeds) },
];

/// The text of an input; bytes that are no UTF-8 are replaced, as nothing that takes text can be given them.
fn text(data: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(data)
}

/// Waits for a future that needs no reactor.
fn wait<T>(future: impl Future<Output = T>) -> T {
    match tokio::runtime::Builder::new_current_thread().build() {
        Ok(runtime) => runtime.block_on(future),
        Err(error) => panic!("make a runtime: {error}"),
    }
}

/// An error says something.
fn named(error: impl std::fmt::Display) {
    assert!(!error.to_string().trim().is_empty(), "an error without a word");
}
