//! The contenders of `ci/bench-stream` that are this program, and what makes the events for all of them.
//!
//! Rounds, peers, brokers and judgement are the business of `run.py`, which starts this as a process of its own for each
//! measurement, as it does with the peers.
#![expect(
    clippy::disallowed_methods,
    reason = "a benchmark reads the clock, the time that the system has counted, and its files"
)]

mod contenders;
mod events;
mod job;
mod memory_log;

use std::{collections::BTreeMap, error::Error, path::Path, process::ExitCode, sync::Arc, time::Instant};

use serde_json::{Value, json};

use events::{Input, Shape};
use job::Place;

type Failure = Box<dyn Error + Send + Sync>;

/// `--name value` pairs.
struct Arguments(BTreeMap<String, String>);

impl Arguments {
    fn read(mut words: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let mut pairs = BTreeMap::new();
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").ok_or_else(|| format!("found {word}, expected --name value"))?;
            pairs.insert(name.to_owned(), words.next().ok_or_else(|| format!("--{name} has no value"))?);
        }
        Ok(Self(pairs))
    }
    fn text(&self, name: &str) -> Result<&str, Failure> {
        Ok(self.0.get(name).ok_or_else(|| format!("--{name} is missing"))?)
    }
    fn get<T: std::str::FromStr<Err: Error>>(&self, name: &str) -> Result<T, Failure> {
        self.text(name)?.parse().map_err(|e: T::Err| format!("--{name}: {e}").into())
    }
    fn place(&self) -> Result<Place, Failure> {
        let round = self.0.get("round").cloned().unwrap_or_default();
        Ok(Place { round, kafka: self.0.get("kafka").cloned(), data: self.text("data")?.into() })
    }
}

/// Time and CPU time of this process since a moment.
struct Measured {
    begun: Instant,
    cpu: f64,
}

/// CPU time of this process so far in seconds, to a hundredth.
fn cpu_seconds() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let tick = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).ok_or("found no CPU time in /proc/self/stat");
    Ok((tick(11)? + tick(12)?) / 100.0)
}

impl Measured {
    fn begin() -> Result<Self, Failure> {
        Ok(Self { begun: Instant::now(), cpu: cpu_seconds()? })
    }
    fn end(&self) -> Result<Value, Failure> {
        Ok(json!({ "seconds": self.begun.elapsed().as_secs_f64(), "cpu_seconds": cpu_seconds()? - self.cpu }))
    }
}

fn runtime(threads: bool) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder =
        if threads { tokio::runtime::Builder::new_multi_thread() } else { tokio::runtime::Builder::new_current_thread() };
    builder.enable_all().build()
}

fn run(command: &str, arguments: &Arguments) -> Result<Option<Value>, Failure> {
    let input = || Input::read(Path::new(arguments.text("in")?));
    Ok(Some(match command {
        "make" => {
            let shape = Shape {
                events: arguments.get("events")?,
                users: arguments.get("users")?,
                products: arguments.get("products")?,
                per_second: arguments.get("per-second")?,
                partitions: arguments.get("partitions")?,
            };
            events::make(shape, Path::new(arguments.text("out")?))?;
            json!(shape)
        }
        "job" => runtime(false)?.block_on(job::job(Arc::new(input()?), arguments.get("poll-records")?))?,
        "stages" => runtime(false)?.block_on(job::stages(&input()?, arguments.get("poll-records")?))?,
        "limit" | "plain" => {
            let input = input()?;
            let measured = Measured::begin()?;
            let summary = if command == "limit" { contenders::limit(&input) } else { contenders::plain(&input)? };
            let mut report = measured.end()?;
            report["events"] = json!(input.shape.events);
            report["summary"] = json!(summary);
            report
        }
        "state" => runtime(false)?.block_on(job::state(arguments.get("users")?))?,
        "fill" => runtime(true)?.block_on(job::fill(&input()?, &arguments.place()?))?,
        "work" => {
            let shape = job::shape(Path::new(arguments.text("in")?))?;
            let (workers, poll_records) = (arguments.get("workers")?, arguments.get("poll-records")?);
            runtime(true)?.block_on(job::work(shape, &arguments.place()?, workers, poll_records))?
        }
        "windows" => runtime(true)?.block_on(job::windows(&arguments.place()?))?,
        "latency" => {
            let (rate, seconds, speed) = (arguments.get("rate")?, arguments.get("seconds")?, arguments.get("speed")?);
            runtime(true)?.block_on(job::latency(&arguments.place()?, rate, seconds, speed))?
        }
        "compare" => {
            let read = |name: &str| -> Result<events::Summary, Failure> {
                Ok(serde_json::from_slice(&std::fs::read(arguments.text(name)?)?)?)
            };
            json!({ "difference": events::difference(&read("found")?, &read("expected")?) })
        }
        // `cargo bench` and `cargo test --benches` come here too.
        _ => return Ok(None),
    }))
}

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let command = words.next().unwrap_or_default();
    let done = if command.starts_with('-') { Ok(None) } else { Arguments::read(words).and_then(|all| run(&command, &all)) };
    match done {
        Ok(Some(report)) => println!("{report}"),
        Ok(None) => println!("this is a part of ci/bench-stream, which see: found no command"),
        Err(error) => {
            eprintln!("error: {error}");
            let mut next = error.source();
            while let Some(cause) = next {
                eprintln!("  because: {cause}");
                next = cause.source();
            }
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
