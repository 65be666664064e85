//! The demo as a person meets it: its output, the metrics while it runs, and the files it leaves.
#![expect(clippy::disallowed_methods, reason = "tests start the program, listen to it and read its files")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    process::Stdio,
};

use simulacro_core::history::Event;

use crate::binaries::program;

#[test]
fn the_demo_shows_days_metrics_and_history() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let data = dir.path().join("demo");
    let mut child = program("simulacro")
        .args(["demo", "--days", "3", "--data", data.to_str().expect("a path")])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program starts");
    let mut lines = BufReader::new(child.stdout.take().expect("standard output")).lines();
    let mut said = String::new();
    let address = loop {
        let line = lines.next().expect("an address is printed").expect("text");
        if let Some((_, rest)) = line.split_once("http://") {
            break rest.trim_end_matches("/metrics").to_owned();
        }
    };
    let mut stream = TcpStream::connect(&address).expect("the endpoint listens");
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    for line in lines {
        said.push_str(&line.expect("text"));
        said.push('\n');
    }
    assert!(child.wait().expect("it ends").success(), "{said}");

    // Figures of the first three days, from `ci/check_cdnow.py` over the raw file.
    assert!(said.contains("695 rows read = 693 published + 2 rejected"), "{said}");
    assert!(said.contains("23,016.34"), "{said}");
    let metrics = std::fs::read_to_string(data.join("metrics.prom")).expect("metrics are written");
    assert!(metrics.contains("simulacro_batch_rows_total{fate=\"published\"} 693"), "{metrics}");
    let chart = std::fs::read_to_string(data.join("revenue_per_day.svg")).expect("a chart");
    assert!(chart.starts_with("<svg") && chart.matches("<rect").count() > 3, "{chart}");

    let history = std::fs::read_to_string(data.join("history.jsonl")).expect("a history");
    let events: Vec<Event> = history.lines().map(|l| serde_json::from_str(l).expect("an event")).collect();
    assert!(events.iter().enumerate().all(|(n, e)| e.ordinal == n as u64), "ordinals rise by one");
    for component in ["table_source", "object_store", "lakehouse", "warehouse", "ledger"] {
        assert!(events.iter().any(|e| e.component == component), "no call of {component} is in the history");
    }
}
