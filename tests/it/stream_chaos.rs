//! The stream over a real Kafka and a real registry, with workers, broker and replies dying: `ci/stream-chaos` in small.
//!
//! The script starts all it needs on loopback, and an independent program judges the result. Where that cannot be had, the
//! test says so loudly. The run of the certification is the same with `--full`.
#![expect(clippy::disallowed_methods, reason = "a test starts a script")]

use std::process::Command;

use crate::{
    binaries::{program, root, said},
    services::skip,
};

/// What the script says when something it needs is not there.
const NOT_HERE: i32 = 77;

#[test]
fn a_stream_over_kafka_survives_kills_a_restart_of_the_broker_and_lost_replies() {
    let run = Command::new(root().join("ci/stream-chaos"))
        .arg("--program")
        .arg(program("simulacro").get_program())
        .args(["--events", "60000", "--rate", "2000", "--kills", "3", "--freezes", "1", "--restarts", "1"])
        .args(["--workers", "2", "--rebalances-min", "3", "--drop", "80"])
        .output()
        .expect("the script starts");
    let printed = String::from_utf8_lossy(&run.stdout);
    match run.status.code() {
        Some(0) => assert!(printed.ends_with("EQUAL\n"), "{printed}"),
        Some(NOT_HERE) => skip("Kafka for the chaos of the stream", said(&run).trim()),
        code => panic!("{code:?}: {printed}{}", said(&run)),
    }
}
