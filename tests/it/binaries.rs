//! The built programs, run as a person runs them.
#![expect(clippy::disallowed_methods, reason = "tests start the programs and read what they leave")]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// A program beside this test; `ci/test` builds it first.
pub fn program(name: &str) -> Command {
    let test = std::env::current_exe().expect("the test has a path");
    let path = test.ancestors().nth(2).expect("the test lies in target/<profile>/deps").join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace` first, or ci/test", path.display());
    Command::new(path)
}

/// Runs a program to its end.
pub fn output(name: &str, arguments: &[&str]) -> Output {
    program(name).args(arguments).output().expect("the program starts")
}

/// What a program said on standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Writes the purchases that ship with the program into `folder`, changed by `change`, as a source.
pub fn source(folder: &Path, change: impl FnOnce(String) -> String) -> PathBuf {
    let purchases = simulacro_shop::cdnow::parse(simulacro_shop::cdnow::BYTES).expect("the shipped file parses");
    let text = simulacro_shop::cdnow::to_csv(&purchases);
    let source = folder.join("source");
    std::fs::create_dir_all(&source).expect("a folder");
    std::fs::write(source.join("ventas.csv"), change(text)).expect("the source is written");
    source
}

/// All files below a folder; empty when there is no folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut out = Vec::new();
    for entry in entries {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            out.extend(files(&path));
        } else {
            out.push(path);
        }
    }
    out.sort();
    out
}
