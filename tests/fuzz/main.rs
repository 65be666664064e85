//! Every decoder of bytes from outside, over its corpus and over inputs that are nearly valid.
//!
//! This is what `ci/test` runs: each target's seeds and committed inputs, and a fixed number of changed ones (`FUZZ_CASES`
//! asks for another number). `ci/fuzz` runs the same functions below a fuzzer that looks at coverage, as long as one likes.
//! An input that fails is named by target and number, and goes into the target's folder of `corpus` with the fix.
//!
//! The reader of PostgreSQL's protocol is private to its crate, where a test gives it any bytes; see `postgres_wire`.
#![expect(clippy::disallowed_methods, reason = "decoders of files and answers need files and a server to read from")]

mod memory;
mod mutate;
mod services;
mod targets;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
};

use targets::{BYTES_ANYWAY, TARGETS, Target};

/// Longest committed input that others are made of, in bytes.
const SEED_BYTES_MAX: usize = 8 << 10;

/// Committed inputs of a target, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.into_iter().filter_map(|path| Some((path.file_name()?.to_str()?.to_owned(), std::fs::read(&path).ok()?))).collect()
}

/// Runs one input, and holds it to the target's bound of memory.
fn run(target: &Target, what: &str, data: &[u8]) {
    let limit = BYTES_ANYWAY + target.per_byte * data.len();
    let (result, peak) = memory::peak(|| catch_unwind(AssertUnwindSafe(|| (target.run)(data))));
    let shown: String = data.iter().take(2_000).flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect();
    assert!(result.is_ok(), "{}, {what}: it panicked over b\"{shown}\"", target.name);
    assert!(
        peak <= limit,
        "{}, {what}: {} bytes of input took {peak} bytes, at most {limit} are allowed: b\"{shown}\"",
        target.name,
        data.len()
    );
}

fn check(target: &Target) {
    let mut seeds = (target.seeds)();
    assert!(!seeds.is_empty(), "{} has no seeds", target.name);
    for (number, seed) in seeds.iter().enumerate() {
        run(target, &format!("seed {number}"), seed);
    }
    for (name, data) in corpus(target.name) {
        run(target, &name, &data);
        // What is long is slow to decode, and its changes reach nothing new.
        if data.len() <= SEED_BYTES_MAX {
            seeds.push(data);
        }
    }
    let asked = std::env::var("FUZZ_CASES").ok().and_then(|text| text.parse().ok());
    for number in 0..asked.unwrap_or(target.cases) {
        run(target, &format!("input {number}"), &mutate::input(&seeds, number));
    }
}

macro_rules! tests {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                let all = TARGETS.iter().chain(&services::TARGETS);
                check(all.into_iter().find(|target| target.name == stringify!($name)).expect("a target of this name"));
            }
        )*

        #[test]
        fn no_target_is_forgotten() {
            let tested = [$(stringify!($name)),*];
            for target in TARGETS.iter().chain(&services::TARGETS) {
                assert!(tested.contains(&target.name), "{} has no test", target.name);
            }
            let folders = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus"));
            for folder in folders.into_iter().flatten().flatten() {
                let name = folder.file_name();
                assert!(tested.iter().any(|target| name == *target), "a corpus of no target: {}", name.display());
            }
        }
    };
}

tests! {
    avro_schema avro_clicks avro_metrics avro_evolved state_record state_key click_changelog merge_changelog partials copy
    copy_scales manifest dimension_page contract objective model backfill_plan stream_config values history cdnow
    event_log_wal event_log_snapshot registry_file csv_table dimension_csv parquet_table registry_answer scenario
}
