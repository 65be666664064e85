//! A Kafka broker for a test by itself: what `ci/services-kafka` starts on loopback.
//!
//! It ends with the process that started it, however that ends: a shell beside it waits for the end of its standard input.
//! The broker of `SIMULACRO_KAFKA` is left alone. `produce` remembers its days in a topic of one name, so that a day could be
//! sent to a broker that is kept only once, and what Kafka itself says is asked of tools that the script installs.
#![expect(clippy::disallowed_methods, reason = "a test starts a real broker")]

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use crate::binaries::{root, said};

const SERVE: &str = r#"
trap '' INT
"$SCRIPT" fast "$DIR" </dev/null || exit 1
cat >/dev/null
"$SCRIPT" stop "$DIR"
"#;

/// A broker that answers; it is stopped when this is dropped.
#[derive(Debug)]
pub struct Kafka {
    /// `host:port`.
    pub address: String,
    shell: Child,
    dir: tempfile::TempDir,
}

fn script() -> PathBuf {
    root().join("ci/services-kafka")
}

impl Kafka {
    /// Starts a broker; `None`, after a loud skip, when there is none to be had here.
    pub fn start() -> Option<Self> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let problems = dir.path().join("said");
        let mut shell = Command::new("sh")
            .args(["-c", SERVE])
            .env("SCRIPT", script())
            .env("DIR", dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&problems).expect("a file"))
            .spawn()
            .expect("a shell");
        let mut address = String::new();
        let answer = shell.stdout.take().expect("it is piped");
        BufReader::new(answer).read_line(&mut address).expect("the shell is read");
        let broker = Self { address: address.trim().to_owned(), shell, dir };
        if broker.address.is_empty() {
            super::skip("Kafka", fs::read_to_string(&problems).unwrap_or_default().trim());
            return None;
        }
        Some(broker)
    }

    /// How many records Kafka's own tool says that a group is behind in a topic, by partition.
    pub fn lag(&self, group: &str, topic: &str) -> BTreeMap<i32, i64> {
        let run = Command::new(script()).arg("group").arg(self.dir.path()).arg(group).output().expect("the script starts");
        assert!(run.status.success(), "{}", said(&run));
        let printed = String::from_utf8_lossy(&run.stdout).into_owned();
        let number = |text: &str| text.parse::<i64>().unwrap_or_else(|_| panic!("{text:?} is no number in\n{printed}"));
        let lines = printed.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let of_topic = lines.filter(|cells| cells.first() == Some(&topic));
        of_topic.map(|cells| (i32::try_from(number(cells[1])).expect("a partition"), number(cells[4]))).collect()
    }

    /// How often the broker has settled who of a group has what: 1 for a group whose only member was never lost.
    pub fn generations(&self, group: &str) -> usize {
        let log = fs::read_to_string(self.dir.path().join("server.log")).expect("the broker's log");
        log.lines().filter(|line| line.contains(&format!("Stabilized group {group} generation "))).count()
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        if let Err(error) = self.shell.wait() {
            eprintln!("stop the broker: {error}");
        }
    }
}
