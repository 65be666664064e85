//! The simulator for a pipeline of your own: it brings what it does, what it is fed, what must be true, and gets a seeded
//! world with a virtual clock, processes that die, links that lose messages, faults with hit counts, a report, a sweep,
//! shrinking and the canary.
//!
//! A [`Pipeline`] is written against the ports of production and knows nothing of the simulation; [`main`] makes a program of
//! it, in which each run is a process of its own. `sim/examples/transfers.rs` is one, from its workload to its invariants.
//! What a pipeline is struck by are the faults of [`crate::stream::faults`], which know processes and a broker and no
//! business, and faults on its data of its own, by name (see [`Host::own`]).
//!
//! Left out: object stores and databases, whose simulated services are those of [`crate::world`]; and processes that are
//! replaced while they stand still.

mod command;
mod run;

pub use command::main;
pub use run::{Host, run};

use std::collections::BTreeMap;

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::ports::{Result, event_log::TopicSpec};
use simulacro_log::Stored;

use crate::{
    rng::Stream,
    stream::faults::{StreamFault, When},
};

/// Most processes of each kind.
const PROCESSES_MAX: usize = 16;
/// Longest story, in seconds.
const LIMIT_S_MAX: u64 = 7 * 86_400;

/// A story as strict TOML. Seconds count from its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Story {
    /// What is at stake.
    pub summary: String,
    /// When it begins.
    pub start: DateTime<Utc>,
    /// Length of a simulation step in milliseconds, 1 to 1000.
    pub tick_ms: u64,
    /// Processes that feed the pipeline: `producer-0` and so on, 1 to 16.
    pub producers: usize,
    /// Processes of the pipeline: `worker-0` and so on, 1 to 16.
    pub workers: usize,
    /// Seconds after which the pipeline must be done, once all faults are over; up to a week.
    pub patience_s: u64,
    /// Each fault must strike at least so often.
    pub fired_min: u64,
    /// The pipeline's own parameters and faults on its data, by name.
    #[serde(default)]
    pub own: BTreeMap<String, u64>,
    /// Faults of processes, links and the broker.
    #[serde(default)]
    pub fault: Vec<StreamFault>,
}

impl Story {
    /// Reads a story.
    ///
    /// # Errors
    /// The place in the text, what stands there and what could.
    pub fn parse(text: &str) -> Result<Self, String> {
        let story: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        story.check()?;
        Ok(story)
    }

    /// The text that gives this story.
    ///
    /// # Errors
    /// When a value has no form in TOML.
    pub fn to_toml(&self) -> Result<String, String> {
        toml::to_string(self).map_err(|e| e.to_string())
    }

    fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) { Ok(()) } else { Err(format!("{name}: found {value}, expected {low} to {high}")) }
        };
        within("tick_ms", self.tick_ms, 1, 1_000)?;
        within("producers", self.producers as u64, 1, PROCESSES_MAX as u64)?;
        within("workers", self.workers as u64, 1, PROCESSES_MAX as u64)?;
        within("patience_s", self.patience_s, 1, LIMIT_S_MAX)?;
        for fault in &self.fault {
            let mode = fault.mode();
            within(&format!("fault {mode}: its end"), fault.over_s(), 0, LIMIT_S_MAX)?;
            match fault {
                StreamFault::WorkerFreeze { replaced: true, .. } | StreamFault::RegistryDown { .. } => {
                    return Err(format!("fault {mode}: found one of the world of streams, expected one that strikes here"));
                }
                StreamFault::WorkerCrash { worker, when, .. } | StreamFault::WorkerFreeze { worker, when, .. } => {
                    within(&format!("fault {mode}: worker"), *worker as u64, 0, self.workers as u64 - 1)?;
                    if let When::Request { nth, .. } = when {
                        within(&format!("fault {mode}: nth"), *nth, 1, u64::MAX)?;
                    }
                }
                StreamFault::WorkerLeaves { worker, .. } | StreamFault::SessionExpired { worker, .. } => {
                    within(&format!("fault {mode}: worker"), *worker as u64, 0, self.workers as u64 - 1)?;
                }
                StreamFault::Partition { host, from_s, to_s, .. }
                | StreamFault::Slow { host, from_s, to_s, .. }
                | StreamFault::Clock { host, from_s, to_s, .. } => {
                    let workers = (0..self.workers).map(|n| format!("worker-{n}"));
                    if !workers.chain((0..self.producers).map(|n| format!("producer-{n}"))).any(|name| name == *host) {
                        return Err(format!("fault {mode}: found host {host:?}, expected such as worker-0 or producer-0"));
                    }
                    within(&format!("fault {mode}: to_s"), *to_s, from_s + 1, LIMIT_S_MAX)?;
                }
                StreamFault::DiskFull { from_s, to_s } => within(&format!("fault {mode}: to_s"), *to_s, from_s + 1, LIMIT_S_MAX)?,
                StreamFault::LostReply { nth, count, .. } => within(&format!("fault {mode}"), (*nth).min(*count), 1, u64::MAX)?,
                StreamFault::BrokerRestart { .. } => {}
            }
        }
        Ok(())
    }

    /// When all faults are over, in seconds from the start.
    pub fn healed_s(&self) -> u64 {
        self.fault.iter().map(StreamFault::over_s).max().unwrap_or(0)
    }

    /// Smaller stories, the greatest step first: without a fault, with fewer processes.
    pub fn smaller(&self) -> Vec<Self> {
        let mut out: Vec<Self> = Vec::new();
        for skip in 0..self.fault.len() {
            let mut without = self.clone();
            without.fault.remove(skip);
            out.push(without);
        }
        let fewer = |workers: usize, producers: usize| Self { workers, producers, ..self.clone() };
        out.extend([fewer((self.workers / 2).max(1), self.producers), fewer(self.workers, (self.producers / 2).max(1))]);
        out.retain(|story| story != self && story.check().is_ok());
        out
    }
}

/// One broken invariant: its name and what was seen.
pub type Broken = (&'static str, String);

/// What a run leaves to be judged.
#[derive(Debug)]
pub struct Evidence<'a> {
    /// The story.
    pub story: &'a Story,
    /// The stream of randomness that each producer began with, in order: what it was fed can be computed again.
    pub fed: Vec<Stream>,
    /// Every record of every topic, by partition and in order of offset.
    pub topics: BTreeMap<String, BTreeMap<i32, Vec<Stored>>>,
    /// Whether the pipeline was done in time.
    pub drained: bool,
}

/// A pipeline under test, with its workload and its invariants. It reaches the world through its [`Host`] only.
#[async_trait]
pub trait Pipeline: Send + Sync + 'static {
    /// Its name, for reports.
    fn name(&self) -> &'static str;
    /// Consumer group of its workers, which [`StreamFault::SessionExpired`] strikes.
    fn group(&self) -> &'static str;
    /// The topics that are there when a story begins.
    fn topics(&self) -> Vec<TopicSpec>;
    /// Draws a story: what is struck, when, and how hard.
    fn draw(&self, random: &mut Stream) -> Story;
    /// Feeds the pipeline, as `host.number`-th producer. What it sends must depend on `random` and the story alone.
    ///
    /// # Errors
    /// When it gives up, which no story may cause.
    async fn feed(&self, host: &Host, random: Stream) -> Result<()>;
    /// One life of a worker, which knows nothing but what the world holds. It returns with an error and is started again,
    /// or when [`Host::must_leave`] says so.
    ///
    /// # Errors
    /// Why it gave up.
    async fn work(&self, host: &Host) -> Result<()>;
    /// Whether all that was fed is done. Asked over and over by an observer that no fault strikes, when the producers are done.
    ///
    /// # Errors
    /// When it cannot tell now.
    async fn is_done(&self, host: &Host) -> Result<bool>;
    /// Every invariant that is broken.
    fn judge(&self, evidence: &Evidence<'_>) -> Vec<Broken>;
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "summary = \"a story\"\nstart = \"2024-03-17T14:00:00Z\"\ntick_ms = 50\nproducers = 1\nworkers = 2\n\
        patience_s = 60\nfired_min = 1\n[[fault]]\nmode = \"worker_crash\"\nworker = 1\nwhen = { at_s = 9 }\ndown_s = 3\n";

    #[test]
    fn a_story_survives_being_written() {
        let story = Story::parse(GOOD).expect("a story");
        assert_eq!(Story::parse(&story.to_toml().expect("text")).expect("a story"), story);
        assert_eq!(story.healed_s(), 12);
    }

    #[test]
    fn a_story_that_cannot_be_names_the_place_and_what_could() {
        let check = |from: &str, to: &str, wanted: &str| {
            let error = Story::parse(&GOOD.replace(from, to)).expect_err(to);
            assert!(error.contains(wanted), "{error}");
        };
        check("worker = 1", "worker = 2", "found 2, expected 0 to 1");
        check("workers = 2", "workers = 0", "workers: found 0, expected 1 to 16");
        check("tick_ms", "tock_ms", "unknown field `tock_ms`");
        check("when = { at_s = 9 }", "when = { request = \"produce\", nth = 0, side = \"after\" }", "nth: found 0");
    }

    #[test]
    fn smaller_stories_are_stories_and_end() {
        let mut story = Story::parse(GOOD).expect("a story");
        let mut steps = 0;
        while let Some(smaller) = story.smaller().into_iter().next() {
            smaller.check().expect("a story");
            (story, steps) = (smaller, steps + 1);
        }
        assert_eq!((story.fault.len(), story.workers, steps), (0, 1, 2));
    }
}
