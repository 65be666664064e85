//! One target below libFuzzer: the one that `FUZZ_TARGET` names. With `FUZZ_SEEDS`, its seeds are written to that folder and
//! nothing is run; a target of no name lists all of them.
#![no_main]

#[path = "../../targets/mod.rs"]
mod targets;

use std::{env, path::Path, process::exit, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use targets::{TARGETS, Target};

fn chosen() -> &'static Target {
    static CHOSEN: OnceLock<&'static Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let name = env::var("FUZZ_TARGET").unwrap_or_default();
        let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
            TARGETS.iter().for_each(|target| println!("{}", target.name));
            exit(if name.is_empty() { 0 } else { 2 });
        };
        if let Ok(folder) = env::var("FUZZ_SEEDS") {
            for (number, seed) in (target.seeds)().into_iter().enumerate() {
                if let Err(error) = std::fs::write(Path::new(&folder).join(format!("seed-{number}")), seed) {
                    eprintln!("write a seed to {folder}: {error}");
                    exit(2);
                }
            }
            exit(0);
        }
        target
    })
}

fuzz_target!(|data: &[u8]| (chosen().run)(data));
