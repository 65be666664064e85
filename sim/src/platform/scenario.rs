//! A story of the whole platform as strict TOML: `kind = "platform"`.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::orchestrator::{AssetSettings, LoopConfig};

use super::{
    faults::{Fault, Mode, drawn},
    shop::ShopSize,
};
use crate::{
    defence::Defence,
    scenario::{Tier, Verdict},
    stream::sabotage::Sabotage,
};

/// Longest story, in days: three years.
pub const DAYS_MAX: u64 = 3 * 366;
/// When the daily batch is due to begin, in UTC. It is the asset's own schedule; stories that change it are no stories here.
pub const RUN_AT: NaiveTime = NaiveTime::from_hms_opt(3, 0, 0).expect("a time of day");

/// Defences of the batch that something in this world needs: what the others are against does not come here.
pub const DEFENCES: [Defence; 5] =
    [Defence::Contract, Defence::Dedup, Defence::IdempotentWrites, Defence::FailFast, Defence::Staleness];

/// What kind of story a file tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The whole batch platform.
    Platform,
}

/// Where a story's faults come from, beside those that it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Drawn {
    /// Nowhere.
    None,
    /// The seed draws them by their catalogued frequency.
    Catalogued,
}

/// The stream of a story: what the shop's visitors do, and how the job over it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default = "StreamSize::standard")]
pub struct StreamSize {
    /// Events of a day, with a cart and a purchase for each sale; where these alone are more, only they.
    pub events_per_day: u64,
    /// Workers of the job.
    pub workers: u64,
    /// Partitions of the topic of clicks.
    pub partitions: i32,
    /// Different pages.
    pub pages: u64,
    /// Thousandths of the events without a sale that are one visitor's.
    pub hot: u64,
    /// Seconds between two sendings of the shop, and between two commits of the job.
    pub tick_s: u64,
    /// Longest time in seconds that a row of a window waits for its write to the warehouse.
    pub sink_every_s: u64,
    /// Hours that the topic of clicks keeps its events. What explains a day's difference is looked for in what is kept.
    pub retention_h: u64,
}

impl StreamSize {
    /// A small stream, a tick of a minute.
    pub fn standard() -> Self {
        Self {
            events_per_day: 4_000,
            workers: 1,
            partitions: 2,
            pages: 4,
            hot: 0,
            tick_s: 60,
            sink_every_s: 7_200,
            retention_h: 60,
        }
    }
}

/// What must be true at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformExpect {
    /// Whether the platform survives, or is caught.
    pub verdict: Verdict,
    /// The invariants that a `caught` story must see broken, in alphabetical order.
    #[serde(default)]
    pub broken: Vec<String>,
    /// Objectives that must be met over the whole story.
    #[serde(default)]
    pub slos_met: Vec<String>,
    /// Modes of which somebody must be told whenever they strike. Of others it depends on what they did.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub told: BTreeSet<Mode>,
    /// Each named fault, and of the drawn ones each mode, must strike at least so often.
    pub fired_min: u64,
    /// Whether what is published must equal that of the same story without its faults.
    pub converges: bool,
}

/// The story.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformScenario {
    /// Always `platform`.
    pub kind: Kind,
    /// What is at stake, without numbers.
    pub summary: String,
    /// When it runs.
    pub tier: Tier,
    /// Seeds.
    pub seeds: Vec<u64>,
    /// First day that is processed; the run for it starts on the next day.
    pub fecha: NaiveDate,
    /// Number of days, at least 1.
    pub days: u64,
    /// Time of day at which a day must be published, in UTC.
    pub sla: NaiveTime,
    /// Models that a day makes, as `--select` takes them.
    pub models: String,
    /// Faults that the seed draws.
    pub drawn: Drawn,
    /// Hours after the last day is due at which everything must be healed.
    pub patience_h: u64,
    /// Defences of the batch that the platform does without.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub without: BTreeSet<Defence>,
    /// The defence of the stream that is off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sabotage: Option<Sabotage>,
    /// The shop.
    pub shop: ShopSize,
    /// The stream; without it there is none.
    #[serde(default)]
    pub stream: Option<StreamSize>,
    /// The orchestrator; what is missing is as it ships.
    #[serde(default)]
    pub orchestrator: LoopConfig,
    /// Settings of assets over those that ship.
    #[serde(default)]
    pub assets: BTreeMap<String, AssetSettings>,
    /// Faults.
    #[serde(default)]
    pub fault: Vec<Fault>,
    /// Expectations.
    pub expect: PlatformExpect,
}

impl PlatformScenario {
    /// Reads a scenario.
    ///
    /// # Errors
    /// The place in the text, what stands there and what could.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scenario: Self = toml::from_str(text).map_err(|e| e.to_string())?;
        scenario.check()?;
        Ok(scenario)
    }

    /// Whether it can be told.
    ///
    /// # Errors
    /// The place, what stands there and what could.
    pub fn check(&self) -> Result<(), String> {
        let within = |name: &str, value: u64, low: u64, high: u64| {
            if (low..=high).contains(&value) { Ok(()) } else { Err(format!("{name}: found {value}, expected {low} to {high}")) }
        };
        within("days", self.days, 1, DAYS_MAX)?;
        within("seeds", self.seeds.len() as u64, 1, 1_000)?;
        within("patience_h", self.patience_h, 1, 24 * 14)?;
        within("shop.sales_per_day", self.shop.sales_per_day, 10, 8_000)?;
        within("shop.customers", self.shop.customers, 10, 100_000)?;
        within("shop.products", self.shop.products, 1, 10_000)?;
        within("shop.growth_percent", self.shop.growth_percent, 0, 1_000)?;
        if let Some(stream) = &self.stream {
            within("stream.events_per_day", stream.events_per_day, 100, 2_000_000)?;
            within("stream.workers", stream.workers, 1, 8)?;
            within("stream.partitions", stream.partitions.unsigned_abs().into(), 1, 64)?;
            within("stream.pages", stream.pages, 1, 1_000)?;
            within("stream.hot", stream.hot, 0, 1_000)?;
            // Beyond that the objective of two minutes could not be met by anything.
            within("stream.tick_s", stream.tick_s, 1, 90)?;
            within("stream.sink_every_s", stream.sink_every_s, 1, 6 * 86_400)?;
            // A day is reconciled in the morning after it, and once more in the next.
            within("stream.retention_h", stream.retention_h, 56, 24 * 30)?;
        }
        if let Some(found) = self.without.iter().find(|defence| !DEFENCES.contains(defence)) {
            return Err(format!("without: found {found:?}, expected one of {DEFENCES:?}"));
        }
        if let (Some(found), None) = (self.sabotage, &self.stream) {
            return Err(format!("sabotage: found {found:?} in a story without [stream]"));
        }
        let is_there = |mode: &&Mode| self.drawn == Drawn::Catalogued || self.fault.iter().any(|f| f.mode == **mode);
        if let Some(found) = self.expect.told.iter().find(|mode| !is_there(mode)) {
            return Err(format!("expect.told: found {}, expected a mode of the story's faults", found.entry().name));
        }
        self.orchestrator.check().map_err(|e| e.to_string())?;
        for (n, fault) in self.fault.iter().enumerate() {
            within(&format!("fault {}: for_s", n + 1), fault.for_s, 1, 7 * 86_400)?;
            // What is wrong with a day is so from its beginning.
            let (from, to) = (self.fecha.and_time(NaiveTime::MIN).and_utc(), self.due(self.last()));
            if !(from..to).contains(&fault.from) {
                return Err(format!("fault {}: found from {}, expected {from} to {to}", n + 1, fault.from));
            }
            if (fault.offset_s != 0) != fault.mode.has_offset() {
                let text = format!("found offset_s {}, expected one for clock_skew and producer_clock alone", fault.offset_s);
                return Err(format!("fault {}: {text}", n + 1));
            }
            if fault.mode.entry().needs_stream && self.stream.is_none() {
                return Err(format!("fault {}: found {} in a story without [stream]", n + 1, fault.mode.entry().name));
            }
        }
        if self.summary.chars().any(|c| c.is_ascii_digit()) {
            return Err("summary: found a digit, expected prose without numbers; each number is a field of its own".into());
        }
        Ok(())
    }

    /// The text that gives this scenario.
    ///
    /// # Errors
    /// When a value has no form in TOML.
    pub fn to_toml(&self) -> Result<String, String> {
        toml::to_string(self).map_err(|e| e.to_string())
    }

    /// When the world begins: with a stream, an hour before the first event of the first day.
    pub fn begins(&self) -> DateTime<Utc> {
        match self.stream {
            Some(_) => self.fecha.and_time(NaiveTime::MIN).and_utc() - chrono::TimeDelta::hours(1),
            None => self.start(),
        }
    }

    /// When the orchestrator begins: an hour before the first run.
    pub fn start(&self) -> DateTime<Utc> {
        self.scheduled(self.fecha) - chrono::TimeDelta::hours(1)
    }

    /// The last day that is processed.
    pub fn last(&self) -> NaiveDate {
        self.fecha + Days::new(self.days - 1)
    }

    /// The days in order.
    pub fn fechas(&self) -> impl Iterator<Item = NaiveDate> + use<> {
        let fecha = self.fecha;
        (0..self.days).map(move |n| fecha + Days::new(n))
    }

    /// When the run of a day is due to begin.
    pub fn scheduled(&self, fecha: NaiveDate) -> DateTime<Utc> {
        (fecha + Days::new(1)).and_time(RUN_AT).and_utc()
    }

    /// When a day must be published.
    pub fn due(&self, fecha: NaiveDate) -> DateTime<Utc> {
        (fecha + Days::new(1)).and_time(self.sla).and_utc()
    }

    /// All faults of a run, named and drawn, in order of their beginning.
    pub fn faults(&self, seed: u64) -> Vec<Fault> {
        let mut all = self.fault.clone();
        match self.drawn {
            Drawn::None => {}
            Drawn::Catalogued => all.extend(drawn(seed, self.fecha, self.days, |date| date.and_time(RUN_AT).and_utc())),
        }
        all.retain(|f| self.stream.is_some() || !f.mode.entry().needs_stream);
        all.sort_by_key(|f| (f.from, f.mode));
        all
    }

    /// The same story without its faults, but for a hot key, which is what the shop sold.
    pub fn twin(&self, seed: u64) -> Self {
        let fault = self.faults(seed).into_iter().filter(|f| f.mode == Mode::HotKey).collect();
        let expect = PlatformExpect { fired_min: 0, slos_met: Vec::new(), told: BTreeSet::new(), ..self.expect.clone() };
        Self { fault, drawn: Drawn::None, expect, ..self.clone() }
    }

    /// The same story with all defences on, which must hold; `None` when none is off, or when it need not be caught.
    pub fn defended(&self) -> Option<Self> {
        let is_whole = self.without.is_empty() && self.sabotage.is_none();
        if is_whole || self.expect.verdict == Verdict::Holds {
            return None;
        }
        let expect = PlatformExpect { verdict: Verdict::Holds, broken: Vec::new(), ..self.expect.clone() };
        Some(Self { without: BTreeSet::new(), sabotage: None, expect, ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::detection, *};

    #[test]
    fn a_stream_is_what_its_table_says_and_nothing_else() {
        let text = detection::story(Mode::StreamSlow, 1).to_toml().expect("text");
        let check = |from: &str, to: &str, expected: &str| {
            assert!(text.contains(from), "{text}");
            let said = PlatformScenario::parse(&text.replacen(from, to, 1)).expect_err(to);
            assert!(said.contains(expected), "{said}");
        };
        check("tick_s = 60", "tick_s = 60\nticks = 1", "unknown field `ticks`");
        check("tick_s = 60", "tick_s = 91", "stream.tick_s: found 91, expected 1 to 90");
        check("workers = 1", "workers = 0", "stream.workers: found 0, expected 1 to 8");
        check("offset_s = 0", "offset_s = 9", "expected one for clock_skew and producer_clock alone");
        check("patience_h = 48", "patience_h = 48\nwithout = [\"volume\"]", "without: found Volume, expected one of [Contract, ");
        check("fired_min", "told = [\"disk_full\"]\nfired_min", "expect.told: found disk_full, expected a mode of the story's");
        let story = PlatformScenario { stream: None, ..PlatformScenario::parse(&text).expect("a story") };
        let refused = |story: &PlatformScenario| PlatformScenario::parse(&story.to_toml().expect("text")).expect_err("no stream");
        assert_eq!(refused(&story), "fault 1: found stream_slow in a story without [stream]");
        let weakened = PlatformScenario { sabotage: Some(Sabotage::SentTwice), ..story.clone() };
        assert_eq!(refused(&weakened), "sabotage: found SentTwice in a story without [stream]");
        assert_eq!(story.start() - story.begins(), chrono::TimeDelta::zero());
    }

    #[test]
    fn only_a_story_that_must_be_caught_without_a_defence_has_a_defended_twin() {
        let whole = detection::story(Mode::RowsTwice, 1);
        let caught = PlatformExpect { verdict: Verdict::Caught, broken: vec!["money_exact".into()], ..whole.expect.clone() };
        let weakened = PlatformScenario { without: BTreeSet::from([Defence::Dedup]), ..whole.clone() };
        assert_eq!((whole.defended(), weakened.defended()), (None, None));
        assert_eq!(PlatformScenario { expect: caught.clone(), ..weakened }.defended(), Some(whole.clone()));
        assert_eq!(PlatformScenario { expect: caught, ..whole }.defended(), None);
    }

    #[test]
    fn a_story_without_a_stream_draws_no_faults_of_one() {
        let story = PlatformScenario { drawn: Drawn::Catalogued, days: 365, ..detection::story(Mode::StreamSlow, 1) };
        let of_stream = |story: &PlatformScenario| story.faults(1).iter().filter(|f| f.mode.entry().needs_stream).count();
        assert!(of_stream(&story) > 5);
        let without = PlatformScenario { stream: None, fault: Vec::new(), ..story.clone() };
        assert_eq!(of_stream(&without), 0);
        let batch =
            |story: &PlatformScenario| story.faults(1).into_iter().filter(|f| !f.mode.entry().needs_stream).collect::<Vec<_>>();
        assert_eq!(batch(&story), batch(&without), "a stream changes nothing of the batch's faults");
    }
}
