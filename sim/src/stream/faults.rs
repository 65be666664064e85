//! The faults of a stream story, as data and at work: what is struck, when, and how it heals.
//!
//! Each counts its hits, since a fault that never fired proves nothing. Those of the broker itself are handed to
//! [`SimBroker`]; the others strike a process, or the messages between a process and the broker.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::scenario::{DURATION_S_MAX, StreamScenario};
use crate::{
    broker::{BrokerFault, RequestKind, SimBroker},
    faults::Entry,
};

/// At which moment of a request something happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Before it is sent.
    Before,
    /// When the broker has carried it out, before the reply is there.
    After,
}

/// When something happens to a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub enum When {
    /// At a time.
    Time {
        /// Seconds from the start.
        at_s: u64,
    },
    /// At one of its own requests, wherever it is in its work.
    Request {
        /// Requests of this kind are counted.
        request: RequestKind,
        /// The first time, from 1.
        nth: u64,
        /// Before or after it is carried out.
        side: Side,
    },
}

/// What a cut link loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loses {
    /// What the process sends; it cannot know that nothing was carried out.
    Requests,
    /// What the broker answers; all is carried out.
    Replies,
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case", deny_unknown_fields)]
pub enum StreamFault {
    /// A worker dies with all its memory and is started again.
    WorkerCrash {
        /// Which, from 0.
        worker: usize,
        /// When.
        when: When,
        /// Seconds until it is started again.
        down_s: u64,
    },
    /// A worker stands still, as in a long pause of its machine, and goes on where it was.
    WorkerFreeze {
        /// Which, from 0.
        worker: usize,
        /// When.
        when: When,
        /// For so many seconds.
        for_s: u64,
        /// A second process of the same name is started meanwhile; the first returns as a zombie.
        replaced: bool,
    },
    /// A worker leaves the group in order, and joins again.
    WorkerLeaves {
        /// Which, from 0.
        worker: usize,
        /// When, in seconds.
        at_s: u64,
        /// For so many seconds.
        for_s: u64,
    },
    /// The broker takes a worker for dead, although it lives.
    SessionExpired {
        /// Which, from 0.
        worker: usize,
        /// When, in seconds.
        at_s: u64,
    },
    /// The link between a process and the broker loses messages.
    Partition {
        /// Process: `worker-0`, `producer-1`.
        host: String,
        /// Which messages.
        loses: Loses,
        /// From, inclusive, in seconds.
        from_s: u64,
        /// To, exclusive, in seconds.
        to_s: u64,
    },
    /// Messages between a process and the broker take longer.
    Slow {
        /// Process.
        host: String,
        /// From, inclusive, in seconds.
        from_s: u64,
        /// To, exclusive, in seconds.
        to_s: u64,
        /// By so much, each way.
        by_ms: u64,
    },
    /// A process's clock is wrong.
    Clock {
        /// Process.
        host: String,
        /// From, inclusive, in seconds.
        from_s: u64,
        /// To, exclusive, in seconds.
        to_s: u64,
        /// By so much; below 0 it is behind.
        by_ms: i64,
    },
    /// Requests of one kind are carried out and their replies are lost, whoever sent them.
    LostReply {
        /// Which requests.
        of: RequestKind,
        /// The first one, counted over all workers.
        nth: u64,
        /// How many in a row.
        count: u64,
    },
    /// The broker is restarted: it keeps what it has acknowledged and forgets who was in which group.
    BrokerRestart {
        /// When, in seconds.
        at_s: u64,
        /// For so many seconds it cannot be reached.
        down_s: u64,
    },
    /// The broker cannot write.
    DiskFull {
        /// From, inclusive, in seconds.
        from_s: u64,
        /// To, exclusive, in seconds.
        to_s: u64,
    },
    /// The schema registry cannot be reached.
    RegistryDown {
        /// From, inclusive, in seconds.
        from_s: u64,
        /// To, exclusive, in seconds.
        to_s: u64,
    },
}

impl StreamFault {
    /// Name, as a scenario writes it.
    pub fn mode(&self) -> &'static str {
        match self {
            Self::WorkerCrash { .. } => "worker_crash",
            Self::WorkerFreeze { .. } => "worker_freeze",
            Self::WorkerLeaves { .. } => "worker_leaves",
            Self::SessionExpired { .. } => "session_expired",
            Self::Partition { .. } => "partition",
            Self::Slow { .. } => "slow",
            Self::Clock { .. } => "clock",
            Self::LostReply { .. } => "lost_reply",
            Self::BrokerRestart { .. } => "broker_restart",
            Self::DiskFull { .. } => "disk_full",
            Self::RegistryDown { .. } => "registry_down",
        }
    }

    /// When the last of it is over, in seconds from the start. What strikes at a request does so while there is work.
    pub fn over_s(&self) -> u64 {
        let from = |when: &When, lasts: &u64| match when {
            When::Time { at_s } => at_s + lasts,
            When::Request { .. } => *lasts,
        };
        match self {
            Self::WorkerCrash { when, down_s, .. } => from(when, down_s),
            Self::WorkerFreeze { when, for_s, .. } => from(when, for_s),
            Self::WorkerLeaves { at_s, for_s, .. } => at_s + for_s,
            Self::SessionExpired { at_s, .. } => *at_s,
            Self::Partition { to_s, .. }
            | Self::Slow { to_s, .. }
            | Self::DiskFull { to_s, .. }
            | Self::RegistryDown { to_s, .. } => *to_s,
            // A clock that stays wrong is a state of the world, not one to wait out.
            Self::Clock { .. } | Self::LostReply { .. } => 0,
            Self::BrokerRestart { at_s, down_s } => at_s + down_s,
        }
    }

    pub(super) fn check(&self, story: &StreamScenario) -> Result<(), String> {
        let mode = self.mode();
        let worker = |worker: usize| match worker < story.workers {
            true => Ok(()),
            false => Err(format!("fault {mode}: found worker {worker}, expected below {}", story.workers)),
        };
        let host = |host: &str| {
            let workers = (0..story.workers).map(|n| format!("worker-{n}"));
            let producers = (0..story.workload.producers).map(|n| format!("producer-{n}"));
            match workers.chain(producers).any(|name| name == host) {
                true => Ok(()),
                false => Err(format!("fault {mode}: found host {host:?}, expected such as worker-0 or producer-0")),
            }
        };
        let span = |from: u64, to: u64| match from < to && to <= 2 * DURATION_S_MAX {
            true => Ok(()),
            false => Err(format!("fault {mode}: found {from} to {to}, expected an end after the start")),
        };
        match self {
            Self::WorkerCrash { worker: n, when, .. } | Self::WorkerFreeze { worker: n, when, .. } => {
                if let When::Request { nth: 0, .. } = when {
                    return Err(format!("fault {mode}: found nth 0, expected at least 1"));
                }
                worker(*n)
            }
            Self::WorkerLeaves { worker: n, .. } | Self::SessionExpired { worker: n, .. } => worker(*n),
            Self::Partition { host: name, from_s, to_s, .. } | Self::Slow { host: name, from_s, to_s, .. } => {
                host(name)?;
                span(*from_s, *to_s)
            }
            Self::Clock { host: name, from_s, to_s, .. } => {
                host(name)?;
                span(*from_s, *to_s)
            }
            Self::DiskFull { from_s, to_s } | Self::RegistryDown { from_s, to_s } => span(*from_s, *to_s),
            Self::LostReply { nth, count, .. } => match *nth > 0 && *count > 0 {
                true => Ok(()),
                false => Err(format!("fault {mode}: found nth {nth} and count {count}, expected at least 1")),
            },
            Self::BrokerRestart { .. } => Ok(()),
        }
    }
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// It dies, and is started again after this time.
    Crash(Duration),
    /// It stands still for this time, and may be replaced meanwhile.
    Freeze(Duration, bool),
    /// It leaves for this time.
    Leave(Duration),
}

#[derive(Debug)]
struct Armed {
    fault: StreamFault,
    hits: u64,
    seen: u64,
    /// Its place among the broker's faults, when it is one of those.
    at_broker: Option<usize>,
}

/// The faults of a run at work.
#[derive(Debug)]
pub struct Faults {
    armed: Mutex<Vec<Armed>>,
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

impl Faults {
    /// Arms the story's faults; those of the broker go there.
    pub fn arm(story: &StreamScenario, broker: &SimBroker) -> Self {
        Self::of(&story.fault, story.start, &story.config.group, broker)
    }

    /// Arms faults whose seconds count from `start`; those of the broker go there. `group` is whose sessions may expire.
    pub fn of(faults: &[StreamFault], start: DateTime<Utc>, group: &str, broker: &SimBroker) -> Self {
        let mut injected = 0;
        let arm = |fault: &StreamFault| {
            let at = |seconds: &u64| start + secs(*seconds);
            let there = match fault {
                StreamFault::LostReply { of, nth, count } => Some(BrokerFault::LostReply { of: *of, nth: *nth, count: *count }),
                StreamFault::BrokerRestart { at_s, down_s } => {
                    Some(BrokerFault::Restart { at: at(at_s), to: at(&(at_s + down_s)) })
                }
                StreamFault::DiskFull { from_s, to_s } => Some(BrokerFault::DiskFull { from: at(from_s), to: at(to_s) }),
                StreamFault::SessionExpired { worker, at_s } => Some(BrokerFault::SessionExpired {
                    group: group.to_owned(),
                    member: format!("worker-{worker}"),
                    at: at(at_s),
                }),
                StreamFault::WorkerCrash { .. }
                | StreamFault::WorkerFreeze { .. }
                | StreamFault::WorkerLeaves { .. }
                | StreamFault::Partition { .. }
                | StreamFault::Slow { .. }
                | StreamFault::Clock { .. }
                | StreamFault::RegistryDown { .. } => None,
            };
            let at_broker = there.map(|fault| {
                broker.inject(fault);
                injected += 1;
                injected - 1
            });
            Armed { fault: fault.clone(), hits: 0, seen: 0, at_broker }
        };
        Self { armed: Mutex::new(faults.iter().map(arm).collect()) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Armed>> {
        // A panic elsewhere is what the run reports; counts are whole at any time.
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often each fault struck, in the story's order.
    pub fn hits(&self, broker: &SimBroker) -> Vec<u64> {
        let there = broker.injected();
        let hits = |armed: &Armed| armed.at_broker.and_then(|n| there.get(n)).map_or(armed.hits, |injected| injected.hits);
        self.lock().iter().map(hits).collect()
    }

    /// What is due at a time and was not done before: worker and deed.
    pub fn due(&self, elapsed: Duration) -> Vec<(usize, Deed)> {
        let mut due = Vec::new();
        for armed in self.lock().iter_mut().filter(|armed| armed.hits == 0) {
            let (worker, deed) = match &armed.fault {
                StreamFault::WorkerCrash { worker, when: When::Time { at_s }, down_s } if elapsed >= secs(*at_s) => {
                    (*worker, Deed::Crash(secs(*down_s)))
                }
                StreamFault::WorkerFreeze { worker, when: When::Time { at_s }, for_s, replaced } if elapsed >= secs(*at_s) => {
                    (*worker, Deed::Freeze(secs(*for_s), *replaced))
                }
                StreamFault::WorkerLeaves { worker, at_s, for_s } if elapsed >= secs(*at_s) => {
                    (*worker, Deed::Leave(secs(*for_s)))
                }
                _ => continue,
            };
            armed.hits = 1;
            due.push((worker, deed));
        }
        due
    }

    /// Counts a request of a worker and says what happens to it at this moment.
    pub fn at_request(&self, worker: usize, kind: RequestKind, at: Side) -> Option<Deed> {
        let mut happens = None;
        for armed in self.lock().iter_mut() {
            let (who, when, deed) = match &armed.fault {
                StreamFault::WorkerCrash { worker, when, down_s } => (*worker, when, Deed::Crash(secs(*down_s))),
                StreamFault::WorkerFreeze { worker, when, for_s, replaced } => {
                    (*worker, when, Deed::Freeze(secs(*for_s), *replaced))
                }
                _ => continue,
            };
            if let When::Request { request, nth, side } = when
                && (who, *request, *side) == (worker, kind, at)
            {
                armed.seen += 1;
                if armed.seen == *nth {
                    armed.hits += 1;
                    happens = Some(deed);
                }
            }
        }
        happens
    }

    /// Whether a message of this side is lost now.
    pub fn cuts(&self, host: &str, which: Loses, elapsed: Duration) -> bool {
        let mut cut = false;
        for armed in self.lock().iter_mut() {
            if let StreamFault::Partition { host: name, loses, from_s, to_s } = &armed.fault
                && name == host
                && *loses == which
                && (secs(*from_s)..secs(*to_s)).contains(&elapsed)
            {
                armed.hits += 1;
                cut = true;
            }
        }
        cut
    }

    /// How much longer a message takes now.
    pub fn slows(&self, host: &str, elapsed: Duration) -> Duration {
        let mut by = Duration::ZERO;
        for armed in self.lock().iter_mut() {
            if let StreamFault::Slow { host: name, from_s, to_s, by_ms } = &armed.fault
                && name == host
                && (secs(*from_s)..secs(*to_s)).contains(&elapsed)
            {
                armed.hits += 1;
                by += Duration::from_millis(*by_ms);
            }
        }
        by
    }

    /// By how many milliseconds a clock that is read now is wrong.
    pub fn skews(&self, host: &str, elapsed: Duration) -> i64 {
        let mut skew = 0;
        for armed in self.lock().iter_mut() {
            if let StreamFault::Clock { host: name, from_s, to_s, by_ms } = &armed.fault
                && name == host
                && (secs(*from_s)..secs(*to_s)).contains(&elapsed)
            {
                armed.hits += 1;
                skew += by_ms;
            }
        }
        skew
    }

    /// Whether the registry is away now.
    pub fn hides_registry(&self, elapsed: Duration) -> bool {
        let mut hidden = false;
        for armed in self.lock().iter_mut() {
            if let StreamFault::RegistryDown { from_s, to_s } = &armed.fault
                && (secs(*from_s)..secs(*to_s)).contains(&elapsed)
            {
                armed.hits += 1;
                hidden = true;
            }
        }
        hidden
    }
}

/// Every fault of the stream. A test parses each example, and compares the list with the enumeration.
pub const CATALOGUE: [Entry; 11] = [
    Entry {
        mode: "worker_crash",
        failure: 9,
        seen: "the process is gone, at a time or in the middle of a transaction",
        defence: "state, output and offsets are one transaction; a new owner restores it from the changelog",
        example: "mode = \"worker_crash\"\nworker = 0\nwhen = { request = \"end_txn\", nth = 3, side = \"after\" }\ndown_s = 20",
    },
    Entry {
        mode: "worker_freeze",
        failure: 9,
        seen: "a process that stood still comes back: UNKNOWN_MEMBER_ID, INVALID_PRODUCER_EPOCH",
        defence: "the generation of the group and the epoch of the producer fence it",
        example: "mode = \"worker_freeze\"\nworker = 1\nwhen = { at_s = 95 }\nfor_s = 30\nreplaced = true",
    },
    Entry {
        mode: "worker_leaves",
        failure: 4,
        seen: "a rebalance",
        defence: "what is open is committed before partitions are given up",
        example: "mode = \"worker_leaves\"\nworker = 0\nat_s = 60\nfor_s = 5",
    },
    Entry {
        mode: "session_expired",
        failure: 7,
        seen: "UNKNOWN_MEMBER_ID in the middle of work",
        defence: "partitions are dropped, the open transaction is aborted",
        example: "mode = \"session_expired\"\nworker = 0\nat_s = 60",
    },
    Entry {
        mode: "partition",
        failure: 7,
        seen: "REQUEST_TIMED_OUT, carried out or not",
        defence: "an unknown outcome is looked up in the committed offsets",
        example: "mode = \"partition\"\nhost = \"worker-0\"\nloses = \"replies\"\nfrom_s = 60\nto_s = 80",
    },
    Entry {
        mode: "slow",
        failure: 4,
        seen: "lag that rises while a link is slow",
        defence: "back-pressure: fewer polls, the same membership, bounded memory",
        example: "mode = \"slow\"\nhost = \"worker-0\"\nfrom_s = 60\nto_s = 120\nby_ms = 250",
    },
    Entry {
        mode: "clock",
        failure: 10,
        seen: "event times ahead or behind, or a worker whose clock jumps",
        defence: "append time is the clock, a bound on future times, no fate hangs on a worker's clock",
        example: "mode = \"clock\"\nhost = \"producer-0\"\nfrom_s = 60\nto_s = 300\nby_ms = 3600000",
    },
    Entry {
        mode: "lost_reply",
        failure: 6,
        seen: "REQUEST_TIMED_OUT after it was carried out",
        defence: "sequence numbers; a commit is repeated, then looked up",
        example: "mode = \"lost_reply\"\nof = \"end_txn\"\nnth = 5\ncount = 3",
    },
    Entry {
        mode: "broker_restart",
        failure: 7,
        seen: "NETWORK_EXCEPTION, then UNKNOWN_MEMBER_ID for everybody",
        defence: "retries, and all members join again",
        example: "mode = \"broker_restart\"\nat_s = 90\ndown_s = 10",
    },
    Entry {
        mode: "disk_full",
        failure: 8,
        seen: "KAFKA_STORAGE_ERROR on every write",
        defence: "the transaction is given up, reading goes back to the last commit",
        example: "mode = \"disk_full\"\nfrom_s = 90\nto_s = 100",
    },
    Entry {
        mode: "registry_down",
        failure: 7,
        seen: "ECONNREFUSED from the registry",
        defence: "schemas are kept; without one nothing is decoded and nothing given up",
        example: "mode = \"registry_down\"\nfrom_s = 0\nto_s = 30",
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalogue_lists_every_fault_with_an_example_that_parses() {
        for entry in CATALOGUE {
            let fault: StreamFault = toml::from_str(entry.example).expect(entry.example);
            assert_eq!(fault.mode(), entry.mode);
        }
        let names: std::collections::BTreeSet<&str> = CATALOGUE.iter().map(|entry| entry.mode).collect();
        assert_eq!(names.len(), CATALOGUE.len());
    }

    #[test]
    fn a_fault_with_a_key_too_many_is_refused() {
        let text = format!("{}\nhard = 3", CATALOGUE[4].example);
        assert!(toml::from_str::<StreamFault>(&text).is_err());
        let text = "mode = \"worker_crash\"\nworker = 0\nwhen = { at_s = 3, side = \"after\" }\ndown_s = 20";
        assert!(toml::from_str::<StreamFault>(text).is_err());
    }
}
