//! The faults of a platform story: the catalogued failure modes with their variants, how often each comes, how long it lasts,
//! who ends it, and which alerts it may raise.
//!
//! A fault is a mode with a beginning and a length. Some end by themselves, as a maintenance window does; others last until
//! the operator, who was told by an alert, has done something, and their length is the time after which somebody notices
//! without an alert. Services ask here at each call whether it is struck, so each fault counts its hits and knows when it
//! was first seen. What is left out: most faults of the stream, which has a world of its own; here its job is slow or dead, or
//! the producer's clock is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use chrono::{DateTime, Days, NaiveDate, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::assets;

use super::clock::Clock;
use crate::rng::Stream;

/// After this skew the object store refuses signatures, in seconds.
pub const SIGNATURE_S: i64 = 900;
/// How long after its end a fault may still raise an alert: a day that it made late is missed at its SLA.
pub const AFTERMATH: TimeDelta = TimeDelta::hours(6);
/// How long after its end a fault of the stream may still be told of by the reconciliation, which looks at a day on the
/// morning after it.
pub const RECONCILED: TimeDelta = TimeDelta::hours(36);
/// Kinds of alerts that the reconciliation raises.
const OF_RECONCILIATION: [&str; 2] = ["day_held", assets::WARNING];
/// Answers that one fault loses.
const ANSWERS_LOST: u64 = 3;
/// Days in a year, for frequencies.
const YEAR: u64 = 365;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The source refuses connections: ECONNREFUSED.
    SourceAway,
    /// The API of products answers 503.
    ApiAway,
    /// A column of the source has another name, until the mapping is fixed.
    ColumnRenamed,
    /// The source has a column more, until the contract is settled.
    ColumnAdded,
    /// The source lets `region` be null, and some are, until the mapping is fixed.
    NotNullDropped,
    /// One customer and one product have a hundred times their usual share of a day.
    HotKey,
    /// The source's password has expired: 28P01, until it is rotated.
    PasswordExpired,
    /// The API's token has expired: 401, until it is rotated.
    ApiTokenExpired,
    /// The store's token has expired: ExpiredToken, until it is rotated.
    StoreTokenExpired,
    /// The source delivers every third row twice.
    RowsTwice,
    /// The store takes some writes and their answers are lost.
    AnswersLost,
    /// The store does not answer in time: 503.
    StoreTimeouts,
    /// The store has no space: ENOSPC, until some is freed.
    DiskFull,
    /// A deploy crashes the orchestrator at its start, until it is reverted.
    BadDeploy,
    /// The orchestrator's clock is off; beyond a quarter of an hour the store refuses it: RequestTimeTooSkewed.
    ClockSkew,
    /// The streaming job reads half as fast as events come, until somebody has mended it.
    StreamSlow,
    /// The streaming job's processes die and are away for a while.
    StreamCrash,
    /// The clock of who sends events is off.
    ProducerClock,
}

/// What is fixed of a mode.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// The mode.
    pub mode: Mode,
    /// Its name in scenarios and tables.
    pub name: &'static str,
    /// The failure mode of the specification that it belongs to, from 1.
    pub failure: u8,
    /// How often a year.
    pub per_year: u64,
    /// Longest time from the first effect to the alert, in seconds.
    pub target_s: i64,
    /// Kinds of alerts that it may raise.
    pub alerts: &'static [&'static str],
    /// Whether it lasts until the operator ends it.
    pub needs_operator: bool,
    /// Shortest and longest time that it lasts; with an operator, until it is noticed without an alert. In seconds.
    pub lasts_s: (u64, u64),
    /// When it begins.
    pub begins: Begins,
    /// Whether it is about the stream: a story without one has it not.
    pub needs_stream: bool,
}

/// When a drawn fault begins, relative to the daily run of its date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begins {
    /// So that it is there when the daily run begins.
    AtTheRun,
    /// So that it is there when the daily run begins, or a refresh of the dimensions.
    AtAnyWork,
    /// So that it is there when the dimensions are refreshed.
    AtARefresh,
    /// With the day that is processed.
    WithTheDay,
    /// In the hours before the daily run.
    Before,
    /// At any time.
    AnyTime,
    /// In the daytime, and over an hour before midnight: what a clock puts into the day before is explained only when the
    /// batch of the next day is there, and told of until then. Stories that name their faults have that.
    InTheDaytime,
}

const BATCH_S: i64 = 3_600;
const LAG_S: i64 = 120;
const ALL_DAY: (u64, u64) = (86_400, 86_400);

/// All modes, in the order of the specification.
pub const CATALOGUE: [Entry; 18] = [
    Entry {
        mode: Mode::SourceAway,
        name: "source_away",
        failure: 1,
        per_year: 12,
        target_s: 60,
        alerts: &["source_unavailable", "breaker_open", "run_failed", "sla_missed"],
        needs_operator: false,
        lasts_s: (1_800, 9_000),
        begins: Begins::AtTheRun,
        needs_stream: false,
    },
    Entry {
        mode: Mode::ApiAway,
        name: "api_away",
        failure: 1,
        per_year: 6,
        target_s: 60,
        alerts: &["dimension_stale", "run_failed"],
        needs_operator: false,
        lasts_s: (600, 28_800),
        begins: Begins::AtARefresh,
        needs_stream: false,
    },
    Entry {
        mode: Mode::ColumnRenamed,
        name: "column_renamed",
        failure: 2,
        per_year: 5,
        target_s: BATCH_S,
        alerts: &["breaker_open", "day_held", "sla_missed"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::Before,
        needs_stream: false,
    },
    Entry {
        mode: Mode::ColumnAdded,
        name: "column_added",
        failure: 2,
        per_year: 4,
        target_s: BATCH_S,
        alerts: &["breaker_open", "day_held", "sla_missed"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::Before,
        needs_stream: false,
    },
    Entry {
        mode: Mode::NotNullDropped,
        name: "not_null_dropped",
        failure: 2,
        per_year: 3,
        target_s: BATCH_S,
        alerts: &["breaker_open", "day_held", "sla_missed"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::Before,
        needs_stream: false,
    },
    Entry {
        mode: Mode::HotKey,
        name: "hot_key",
        failure: 3,
        per_year: 30,
        target_s: 300,
        alerts: &[],
        needs_operator: false,
        lasts_s: ALL_DAY,
        begins: Begins::WithTheDay,
        needs_stream: false,
    },
    Entry {
        mode: Mode::PasswordExpired,
        name: "password_expired",
        failure: 5,
        per_year: 2,
        target_s: 60,
        alerts: &["source_unavailable", "breaker_open", "run_failed", "sla_missed"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::Before,
        needs_stream: false,
    },
    Entry {
        mode: Mode::ApiTokenExpired,
        name: "api_token_expired",
        failure: 5,
        per_year: 1,
        target_s: 60,
        alerts: &["dimension_stale", "run_failed"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::AnyTime,
        needs_stream: false,
    },
    Entry {
        mode: Mode::StoreTokenExpired,
        name: "store_token_expired",
        failure: 5,
        per_year: 1,
        target_s: 60,
        alerts: &["run_failed", "dimension_stale", "sla_missed"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::AnyTime,
        needs_stream: false,
    },
    Entry {
        mode: Mode::RowsTwice,
        name: "rows_twice",
        failure: 6,
        per_year: 2,
        target_s: BATCH_S,
        alerts: &[],
        needs_operator: false,
        lasts_s: (3_600, 14_400),
        begins: Begins::AtTheRun,
        needs_stream: false,
    },
    Entry {
        mode: Mode::AnswersLost,
        name: "answers_lost",
        failure: 6,
        per_year: 2,
        target_s: BATCH_S,
        alerts: &["run_failed", "sla_missed"],
        needs_operator: false,
        lasts_s: (3_600, 14_400),
        begins: Begins::AtTheRun,
        needs_stream: false,
    },
    Entry {
        mode: Mode::StoreTimeouts,
        name: "store_timeouts",
        failure: 7,
        per_year: 30,
        target_s: 120,
        alerts: &["run_failed", "dimension_stale", "sla_missed"],
        needs_operator: false,
        lasts_s: (30, 1_200),
        begins: Begins::AtAnyWork,
        needs_stream: false,
    },
    Entry {
        mode: Mode::DiskFull,
        name: "disk_full",
        failure: 8,
        per_year: 2,
        target_s: 60,
        alerts: &["run_failed", "dimension_stale", "sla_missed"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::AnyTime,
        needs_stream: false,
    },
    Entry {
        mode: Mode::BadDeploy,
        name: "bad_deploy",
        failure: 9,
        per_year: 12,
        target_s: 600,
        alerts: &["run_failed", "sla_missed", "schedule_missed"],
        needs_operator: false,
        lasts_s: (300, 2_400),
        begins: Begins::AnyTime,
        needs_stream: false,
    },
    Entry {
        mode: Mode::ClockSkew,
        name: "clock_skew",
        failure: 10,
        per_year: 2,
        target_s: 60,
        // A monitor of the stream whose clock is ahead finds every event old.
        alerts: &["run_failed", "dimension_stale", "sla_missed", "schedule_missed", "source_unavailable", "breaker_open"],
        needs_operator: false,
        lasts_s: (3_600, 14_400),
        begins: Begins::AtTheRun,
        needs_stream: false,
    },
    Entry {
        mode: Mode::StreamSlow,
        name: "stream_slow",
        failure: 4,
        per_year: 12,
        target_s: LAG_S,
        alerts: &["breaker_open"],
        needs_operator: true,
        lasts_s: (43_200, 57_600),
        begins: Begins::AnyTime,
        needs_stream: true,
    },
    Entry {
        mode: Mode::StreamCrash,
        name: "stream_crash",
        failure: 4,
        per_year: 6,
        target_s: LAG_S,
        alerts: &["breaker_open"],
        needs_operator: false,
        lasts_s: (300, 3_600),
        begins: Begins::AnyTime,
        needs_stream: true,
    },
    Entry {
        mode: Mode::ProducerClock,
        name: "producer_clock",
        failure: 10,
        per_year: 2,
        target_s: 60,
        // The share of events that are late or too far ahead, where there are enough; and what the two sides differ by.
        alerts: &["breaker_open", "day_held", assets::WARNING],
        needs_operator: false,
        lasts_s: (3_600, 14_400),
        begins: Begins::InTheDaytime,
        needs_stream: true,
    },
];

impl Mode {
    /// What is fixed of it.
    pub fn entry(self) -> &'static Entry {
        // A test holds that each mode has its entry.
        CATALOGUE.iter().find(|e| e.mode == self).unwrap_or(&CATALOGUE[0])
    }

    /// Whether a fault of it says by how much a clock is off.
    pub fn has_offset(self) -> bool {
        matches!(self, Self::ClockSkew | Self::ProducerClock)
    }

    /// The mode of this name.
    pub fn named(name: &str) -> Option<Self> {
        CATALOGUE.iter().find(|e| e.name == name).map(|e| e.mode)
    }
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// What.
    pub mode: Mode,
    /// From, inclusive.
    pub from: DateTime<Utc>,
    /// Seconds that it lasts, if nobody ends it before.
    pub for_s: u64,
    /// Seconds by which a clock is off; 0 for all other modes.
    #[serde(default)]
    pub offset_s: i64,
    /// Seconds from the alert until the operator has ended it; 0 for modes that end by themselves.
    #[serde(default)]
    pub response_s: u64,
}

impl Fault {
    /// When it is over, if nobody ends it before.
    pub fn to(&self) -> DateTime<Utc> {
        self.from + TimeDelta::seconds(i64::try_from(self.for_s).unwrap_or(i64::MAX / 1_000_000))
    }

    /// Draws one for the daily run of `date`, at `run_at`.
    pub fn draw(mode: Mode, date: NaiveDate, run_at: DateTime<Utc>, random: &mut Stream) -> Self {
        let entry = mode.entry();
        let seconds = |s: u64| TimeDelta::seconds(i64::try_from(s).unwrap_or(i64::MAX / 1_000_000));
        let midnight = date.and_time(chrono::NaiveTime::MIN).and_utc();
        let for_s = random.between(entry.lasts_s.0, entry.lasts_s.1);
        let from = match entry.begins {
            Begins::AtTheRun => run_at - seconds(random.between(0, for_s - 1)),
            Begins::AtAnyWork => {
                let at = match random.between(0, 3) {
                    0 => midnight + TimeDelta::hours(6),
                    1 => midnight + TimeDelta::hours(12),
                    _ => run_at,
                };
                at - seconds(random.between(0, for_s - 1))
            }
            Begins::AtARefresh => {
                let refresh = midnight + TimeDelta::hours(i64::try_from(random.between(1, 3)).unwrap_or(1) * 6);
                refresh - seconds(random.between(0, for_s - 1))
            }
            Begins::WithTheDay => midnight - TimeDelta::days(1),
            Begins::Before => run_at - seconds(random.between(60, 10_000)),
            Begins::AnyTime => midnight + seconds(random.between(0, 86_399)),
            Begins::InTheDaytime => midnight + seconds(random.between(7_200, 82_800 - entry.lasts_s.1)),
        };
        let offset_s = match mode {
            Mode::ClockSkew | Mode::ProducerClock => {
                let size = if random.chance((1, 2)) { random.between(120, 840) } else { random.between(960, 3_600) };
                let size = i64::try_from(size).unwrap_or(0);
                if random.chance((1, 2)) { size } else { -size }
            }
            _ => 0,
        };
        let response_s = if entry.needs_operator { random.between(600, 5_400) } else { 0 };
        Self { mode, from, for_s, offset_s, response_s }
    }
}

/// Draws the faults of a story by their catalogued frequency: each mode on each date with its chance, those between the
/// first run and the last but one.
pub fn drawn(seed: u64, first: NaiveDate, days: u64, run_at: impl Fn(NaiveDate) -> DateTime<Utc>) -> Vec<Fault> {
    let mut out = Vec::new();
    for entry in CATALOGUE {
        let stream = Stream::root(seed).child("faults").child(entry.name);
        // Runs are on the day after the one that they process.
        for day in 2..days {
            let date = first + Days::new(day);
            let mut random = stream.child(&date.to_string());
            if random.chance((entry.per_year, YEAR)) {
                out.push(Fault::draw(entry.mode, date, run_at(date), &mut random));
            }
        }
    }
    out.sort_by_key(|f| (f.from, f.mode));
    out
}

/// A fault with what has become of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suffered {
    /// The fault.
    pub fault: Fault,
    /// Calls that it struck, or rows.
    pub hits: u64,
    /// When it was first seen.
    pub first_hit: Option<DateTime<Utc>>,
    /// When the operator has ended it.
    pub ended: Option<DateTime<Utc>>,
}

impl Suffered {
    /// When it is over.
    pub fn over(&self) -> DateTime<Utc> {
        self.ended.unwrap_or(self.fault.to()).min(self.fault.to())
    }

    /// Whether it is there.
    pub fn is_active(&self, now: DateTime<Utc>) -> bool {
        (self.fault.from..self.over()).contains(&now)
    }

    /// Whether it may have raised an alert of this kind at this time.
    pub fn explains(&self, kind: &str, at: DateTime<Utc>) -> bool {
        let entry = self.fault.mode.entry();
        let after = if entry.needs_stream && OF_RECONCILIATION.contains(&kind) { RECONCILED } else { AFTERMATH };
        self.first_hit.is_some_and(|hit| hit <= at) && at <= self.over() + after && entry.alerts.contains(&kind)
    }
}

/// All faults of a world.
#[derive(Debug)]
pub struct Faults {
    clock: Arc<Clock>,
    /// By mode, each in order of its beginning.
    all: Mutex<BTreeMap<Mode, Vec<Suffered>>>,
}

impl Faults {
    /// These faults will come.
    pub fn new(clock: Arc<Clock>, faults: Vec<Fault>) -> Self {
        let mut all: BTreeMap<Mode, Vec<Suffered>> = BTreeMap::new();
        for fault in faults {
            all.entry(fault.mode).or_default().push(Suffered { fault, hits: 0, first_hit: None, ended: None });
        }
        Self { clock, all: Mutex::new(all) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Mode, Vec<Suffered>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All, with what has become of them, in order of their beginning.
    pub fn all(&self) -> Vec<Suffered> {
        let mut all: Vec<Suffered> = self.lock().values().flatten().cloned().collect();
        all.sort_by_key(|s| (s.fault.from, s.fault.mode));
        all
    }

    /// Strikes `hits` times when a fault of this mode is there, and tells.
    pub fn strikes(&self, mode: Mode, hits: u64) -> bool {
        let now = self.clock.now();
        let mut all = self.lock();
        let Some(suffered) = all.get_mut(&mode).and_then(|of| of.iter_mut().find(|s| s.is_active(now))) else { return false };
        if mode == Mode::AnswersLost && suffered.hits >= ANSWERS_LOST {
            return false;
        }
        suffered.hits += hits;
        if hits > 0 {
            suffered.first_hit.get_or_insert(now);
        }
        true
    }

    /// A day with a hot key is read, with so many rows of that key.
    pub fn reads_hot(&self, fecha: NaiveDate, rows: u64) {
        let now = self.clock.now();
        let mut all = self.lock();
        let hot = all.get_mut(&Mode::HotKey).and_then(|of| of.iter_mut().find(|s| s.fault.from.date_naive() == fecha));
        if let Some(suffered) = hot {
            suffered.hits += rows;
            suffered.first_hit.get_or_insert(now);
        }
    }

    /// Whether a fault of this mode is there; nobody has seen anything of it.
    pub fn is_active(&self, mode: Mode) -> bool {
        let now = self.clock.now();
        self.lock().get(&mode).is_some_and(|of| of.iter().any(|s| s.is_active(now)))
    }

    /// By how many seconds a clock is off; `None` when it is true.
    pub fn offset(&self, mode: Mode, now: DateTime<Utc>) -> Option<i64> {
        let mut all = self.lock();
        let suffered = all.get_mut(&mode)?.iter_mut().find(|s| s.is_active(now))?;
        suffered.hits += 1;
        suffered.first_hit.get_or_insert(now);
        Some(suffered.fault.offset_s)
    }

    /// The next time at which the orchestrator is killed by a deploy, and when that is reverted.
    pub fn next_deploy(&self, now: DateTime<Utc>) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
        self.next_of(Mode::BadDeploy, now)
    }

    /// The present or next fault of a mode: its beginning and its end.
    pub fn next_of(&self, mode: Mode, now: DateTime<Utc>) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
        let all = self.lock();
        let these = all.get(&mode)?.iter().filter(|s| s.over() > now);
        these.map(|s| (s.fault.from, s.over())).min()
    }

    /// What the operator does about what he was told: ends the faults whose alert is old enough. Returns how many are left
    /// that need him and have been seen.
    pub fn operate(&self, alerts: &[(DateTime<Utc>, String)]) -> usize {
        let now = self.clock.now();
        let mut left = 0;
        let mut all = self.lock();
        for suffered in all.values_mut().flatten().filter(|s| s.fault.mode.entry().needs_operator && s.is_active(now)) {
            let told = alerts.iter().find(|(at, kind)| suffered.explains(kind, *at)).map(|(at, _)| *at);
            let response = TimeDelta::seconds(i64::try_from(suffered.fault.response_s).unwrap_or(0));
            match told {
                Some(told) if told + response <= now => suffered.ended = Some(now),
                _ => left += usize::from(suffered.first_hit.is_some()),
            }
        }
        left
    }

    /// Whether any fault is there or still to come.
    pub fn are_over(&self) -> bool {
        let now = self.clock.now();
        self.lock().values().flatten().all(|s| s.over() <= now)
    }
}

/// Names of the modes that are among these faults.
pub fn modes(faults: &[Fault]) -> BTreeSet<&'static str> {
    faults.iter().map(|f| f.mode.entry().name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_at(date: NaiveDate) -> DateTime<Utc> {
        date.and_hms_opt(3, 0, 0).expect("a time").and_utc()
    }

    #[test]
    fn each_mode_has_one_entry_and_one_name() {
        for (n, entry) in CATALOGUE.iter().enumerate() {
            assert_eq!(Mode::named(entry.name), Some(entry.mode));
            assert_eq!(CATALOGUE.iter().position(|e| e.mode == entry.mode), Some(n));
            let written = serde_json::to_value(entry.mode).expect("a name");
            assert_eq!(written, entry.name);
            assert!(entry.lasts_s.0 > 0 && entry.lasts_s.0 <= entry.lasts_s.1);
        }
    }

    #[test]
    fn a_year_has_about_as_many_faults_as_the_catalogue_says() {
        let first = NaiveDate::from_ymd_opt(2024, 1, 1).expect("a date");
        let expected: u64 = CATALOGUE.iter().map(|e| e.per_year).sum();
        let seeds = 20;
        let found: usize = (0..seeds).map(|seed| drawn(seed, first, 365, run_at).len()).sum();
        let mean = found as u64 / seeds;
        assert!(mean * 10 > expected * 9 && mean * 10 < expected * 11, "{mean} a year, the catalogue says {expected}");
    }

    #[test]
    fn faults_that_begin_at_the_run_are_there_when_it_begins() {
        let date = NaiveDate::from_ymd_opt(2024, 3, 18).expect("a date");
        for entry in CATALOGUE.iter().filter(|e| matches!(e.begins, Begins::AtTheRun | Begins::Before)) {
            for seed in 0..50 {
                let fault = Fault::draw(entry.mode, date, run_at(date), &mut Stream::root(seed));
                assert!(fault.from <= run_at(date) && run_at(date) < fault.to(), "{fault:?}");
            }
        }
    }
}
