//! How the stream behaves: every number of the specification, visible and configurable.
//!
//! There is no `Default`: [`StreamConfig::specification`] writes each value out, and a configuration file names what it
//! changes. Left out: addresses and credentials of the log, which belong to its adapter.

use std::{collections::BTreeSet, time::Duration};

use serde::{Deserialize, Serialize};

use crate::ports::event_log::{StartAt, TopicSpec};

/// Length of a pane in milliseconds. Panes are the unit of state, so a change of the windows needs no change of state.
pub const PANE_MS: i64 = 60_000;

/// First millisecond of the pane that holds `timestamp_ms`.
pub fn pane_of(timestamp_ms: i64) -> i64 {
    timestamp_ms.div_euclid(PANE_MS).saturating_mul(PANE_MS)
}

/// Whether `start_ms` is where a pane of an accepted event can begin: not before 1970, and so that its windows have an end.
pub(super) fn is_pane(start_ms: i64) -> bool {
    start_ms >= 0 && start_ms % PANE_MS == 0 && start_ms <= i64::MAX / 2
}

/// Durations as whole milliseconds, so that a file says `allowed_lateness_ms = 300000`.
mod millis {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(u64::try_from(value.as_millis()).unwrap_or(u64::MAX))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        u64::deserialize(deserializer).map(Duration::from_millis)
    }
}

/// Names of the topics. `changelog` and `clicks` have equal numbers of partitions, as have `merge_changelog` and `partials`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default = "Topics::specification")]
pub struct Topics {
    /// Input.
    pub clicks: String,
    /// Final rows of windows.
    pub metrics: String,
    /// Events that are not decodable or broke a rule, with the reason in headers.
    pub dead_letter: String,
    /// Events after the allowed lateness, unchanged.
    pub late: String,
    /// State of the click stage, compacted.
    pub changelog: String,
    /// Partial panes and watermarks, from the click stage to the merge stage.
    pub partials: String,
    /// State of the merge stage, compacted.
    pub merge_changelog: String,
    /// Global watermark, from the merge stage back to the click stage, compacted, one partition.
    pub control: String,
}

/// How the job behaves; every choice is visible, so there is no `Default`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default = "StreamConfig::specification")]
pub struct StreamConfig {
    /// Topics.
    pub topics: Topics,
    /// Consumer group, one for both stages.
    pub group: String,
    /// Where a group without committed offsets begins.
    pub start_at: StartAt,
    /// Whether a partition with a committed offset and no state may start with empty state. An operator sets it after a
    /// deliberate reset; otherwise it means that state was lost, and the job stops.
    pub adopt_offsets_without_state: bool,
    /// Partitions of `partials`: a region's windows are merged by one of them. Fixed once the topic exists.
    pub merge_partitions: i32,
    /// Accepted values of `event_type`. `click`, `purchase` and `add_to_cart` are counted each; others only as users.
    pub event_types: BTreeSet<String>,
    /// Accepted values of `region`; `None` accepts any text up to the limit of length.
    pub regions: Option<BTreeSet<String>>,
    /// How far the watermark stays behind the newest event of its partition.
    #[serde(rename = "watermark_bound_ms", with = "millis")]
    pub watermark_bound: Duration,
    /// How long after the end of its pane an event still counts.
    #[serde(rename = "allowed_lateness_ms", with = "millis")]
    pub allowed_lateness: Duration,
    /// A partition that is read to its end for so long does not hold the others back.
    #[serde(rename = "idle_after_ms", with = "millis")]
    pub idle_after: Duration,
    /// An event further ahead of its append time is dead-lettered and does not move the watermark.
    #[serde(rename = "future_bound_ms", with = "millis")]
    pub future_bound: Duration,
    /// Length of the sliding window, a multiple of a minute.
    #[serde(rename = "sliding_window_ms", with = "millis")]
    pub sliding_window: Duration,
    /// Distance of sliding windows, a multiple of a minute.
    #[serde(rename = "slide_ms", with = "millis")]
    pub slide: Duration,
    /// How long an event is remembered, in event time, to recognise its duplicate.
    #[serde(rename = "dedup_horizon_ms", with = "millis")]
    pub dedup_horizon: Duration,
    /// Fingerprints remembered per partition, 16 bytes each; beyond it new events are not remembered, which is counted.
    pub dedup_entries_max: usize,
    /// Distinct users are exact up to this number per key and pane, then an estimate.
    pub exact_users_max: usize,
    /// Keys per pane and partition; beyond it new pages count under [`super::pane::OTHER_PAGES`].
    pub pane_keys_max: usize,
    /// A partition whose watermark is further ahead of the global one is paused, which bounds the state of the merge.
    #[serde(rename = "ahead_max_ms", with = "millis")]
    pub ahead_max: Duration,
    /// Longest time between commits.
    #[serde(rename = "commit_interval_ms", with = "millis")]
    pub commit_interval: Duration,
    /// Records after which a commit is made earlier.
    pub commit_records_max: usize,
    /// Bytes of late and dead-lettered records after which a commit is made earlier.
    pub commit_bytes_max: usize,
    /// Largest event that is decoded, in bytes; a larger one is dead-lettered. The log's own limit, unless that is higher.
    pub click_bytes_max: usize,
    /// Largest record this job writes, in bytes; below the log's own limit.
    pub record_bytes_max: usize,
    /// Longest wait of one poll.
    #[serde(rename = "poll_wait_ms", with = "millis")]
    pub poll_wait: Duration,
    /// Records per read while state is restored.
    pub restore_records: usize,
    /// Repetitions of one call, and of whole transactions in a row, before the job gives up.
    pub retries_max: u32,
    /// Wait before the first repetition; it doubles, up to 64 times this.
    #[serde(rename = "retry_backoff_ms", with = "millis")]
    pub retry_backoff: Duration,
    /// A member that is silent for longer loses its partitions.
    #[serde(rename = "session_timeout_ms", with = "millis")]
    pub session_timeout: Duration,
    /// Longest time that an event waits for its write to the lake.
    #[serde(rename = "eventos_flush_ms", with = "millis")]
    pub eventos_flush: Duration,
    /// Longest time that a row of a window waits for its write to the warehouse.
    #[serde(rename = "metricas_flush_ms", with = "millis")]
    pub metricas_flush: Duration,
    /// Records of a partition after which a sink writes earlier.
    pub sink_records_max: usize,
    /// Bytes of records that a sink holds before it writes all.
    pub sink_bytes_max: usize,
}

/// A value of [`StreamConfig`] that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} is {value}, allowed: {allowed}")]
pub struct ConfigError {
    /// The key.
    pub key: &'static str,
    /// Its value.
    pub value: String,
    /// What is allowed.
    pub allowed: String,
}

impl Topics {
    /// The names of the specification, and those of the job's own topics.
    pub fn specification() -> Self {
        Self {
            clicks: "ecommerce.clicks".into(),
            metrics: "ecommerce.metricas_realtime".into(),
            dead_letter: "ecommerce.clicks.dead_letter".into(),
            late: "ecommerce.clicks.late".into(),
            changelog: "realtime_metrics.changelog".into(),
            partials: "realtime_metrics.partials".into(),
            merge_changelog: "realtime_metrics.merge_changelog".into(),
            control: "realtime_metrics.control".into(),
        }
    }
}

impl StreamConfig {
    /// The values of the specification, and the bounds it asks to be visible.
    pub fn specification() -> Self {
        Self {
            topics: Topics::specification(),
            group: "realtime_metrics".into(),
            start_at: StartAt::Earliest,
            adopt_offsets_without_state: false,
            merge_partitions: 4,
            event_types: ["add_to_cart", "click", "purchase"].map(String::from).into(),
            regions: None,
            watermark_bound: Duration::from_secs(30),
            allowed_lateness: Duration::from_secs(300),
            idle_after: Duration::from_secs(60),
            future_bound: Duration::from_secs(300),
            sliding_window: Duration::from_secs(300),
            slide: Duration::from_secs(60),
            dedup_horizon: Duration::from_secs(600),
            dedup_entries_max: 4_000_000,
            exact_users_max: 4_096,
            pane_keys_max: 100_000,
            ahead_max: Duration::from_secs(1_800),
            commit_interval: Duration::from_secs(1),
            commit_records_max: 1_000_000,
            commit_bytes_max: 8 << 20,
            click_bytes_max: 1_000_000,
            record_bytes_max: 900 << 10,
            poll_wait: Duration::from_millis(200),
            restore_records: 10_000,
            retries_max: 5,
            retry_backoff: Duration::from_millis(100),
            session_timeout: Duration::from_secs(45),
            eventos_flush: Duration::from_secs(30),
            metricas_flush: Duration::from_secs(5),
            sink_records_max: 200_000,
            sink_bytes_max: 64 << 20,
        }
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// The first value that cannot be, with what is allowed.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let pane = Duration::from_millis(PANE_MS.unsigned_abs());
        let panes = |key, value: Duration| {
            let whole = !value.is_zero() && value.as_millis().is_multiple_of(pane.as_millis());
            let fits = value <= Duration::from_secs(86_400);
            check(key, format!("{value:?}"), whole && fits, "a multiple of one minute, up to a day")
        };
        panes("sliding_window_ms", self.sliding_window)?;
        panes("slide_ms", self.slide)?;
        // Any more would overflow nothing, but it would be a mistake of units.
        for (key, value) in [
            ("watermark_bound_ms", self.watermark_bound),
            ("allowed_lateness_ms", self.allowed_lateness),
            ("idle_after_ms", self.idle_after),
            ("future_bound_ms", self.future_bound),
            ("dedup_horizon_ms", self.dedup_horizon),
            ("ahead_max_ms", self.ahead_max),
            ("eventos_flush_ms", self.eventos_flush),
            ("metricas_flush_ms", self.metricas_flush),
        ] {
            check(key, format!("{value:?}"), value <= Duration::from_secs(7 * 86_400), "up to seven days")?;
        }
        check("merge_partitions", self.merge_partitions, (1..=1_024).contains(&self.merge_partitions), "1 to 1024")?;
        check("exact_users_max", self.exact_users_max, (1..=65_536).contains(&self.exact_users_max), "1 to 65536")?;
        check("pane_keys_max", self.pane_keys_max, (1..=10_000_000).contains(&self.pane_keys_max), "1 to 10000000")?;
        check("commit_records_max", self.commit_records_max, self.commit_records_max > 0, "at least 1")?;
        check("click_bytes_max", self.click_bytes_max, self.click_bytes_max > 0, "at least 1")?;
        check("sink_records_max", self.sink_records_max, self.sink_records_max > 0, "at least 1")?;
        check("sink_bytes_max", self.sink_bytes_max, self.sink_bytes_max > 0, "at least 1")?;
        check("restore_records", self.restore_records, self.restore_records > 0, "at least 1")?;
        // One cell with its largest set of users, a page and a region must fit into one record.
        let cell = 8 * self.exact_users_max.max(2_048) + 8_192;
        check("record_bytes_max", self.record_bytes_max, self.record_bytes_max >= cell, format!("at least {cell}"))?;
        check("ahead_max_ms", format!("{:?}", self.ahead_max), self.ahead_max >= pane * 2, "at least two minutes")?;
        Ok(())
    }

    /// The topics this job needs beside the input, as they are created. `input_partitions` is the input's number.
    pub fn topic_specs(&self, input_partitions: i32) -> Vec<TopicSpec> {
        let spec = |name: &str, partitions, compact| TopicSpec { name: name.to_owned(), partitions, retention: None, compact };
        let week = Some(Duration::from_secs(7 * 86_400));
        let topics = &self.topics;
        vec![
            TopicSpec { retention: week, ..spec(&topics.metrics, self.merge_partitions, false) },
            spec(&topics.dead_letter, input_partitions, false),
            spec(&topics.late, input_partitions, false),
            spec(&topics.changelog, input_partitions, true),
            TopicSpec { retention: week, ..spec(&topics.partials, self.merge_partitions, false) },
            spec(&topics.merge_changelog, self.merge_partitions, true),
            spec(&topics.control, 1, true),
        ]
    }

    pub(super) fn watermark_bound_ms(&self) -> i64 {
        ms(self.watermark_bound)
    }
    pub(super) fn lateness_ms(&self) -> i64 {
        ms(self.allowed_lateness)
    }
    pub(super) fn sliding_ms(&self) -> i64 {
        ms(self.sliding_window)
    }
    /// How long a pane is held after its start: window + lateness.
    pub(super) fn state_ttl_ms(&self) -> i64 {
        ms(self.sliding_window.max(Duration::from_millis(PANE_MS.unsigned_abs()))).saturating_add(ms(self.allowed_lateness))
    }
}

pub(super) fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

fn check(key: &'static str, value: impl ToString, holds: bool, allowed: impl ToString) -> Result<(), ConfigError> {
    if holds { Ok(()) } else { Err(ConfigError { key, value: value.to_string(), allowed: allowed.to_string() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specification_is_valid_and_survives_a_file() {
        let config = StreamConfig::specification();
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert!(text.contains("\"allowed_lateness_ms\":300000"), "{text}");
        assert_eq!(serde_json::from_str::<StreamConfig>(&text).unwrap(), config);
    }

    #[test]
    fn a_file_names_what_it_changes_and_nothing_unknown() {
        let config: StreamConfig = serde_json::from_str(r#"{ "slide_ms": 120000, "topics": { "clicks": "clicks" } }"#).unwrap();
        let specification = StreamConfig::specification();
        let topics = Topics { clicks: "clicks".into(), ..Topics::specification() };
        assert_eq!(config, StreamConfig { slide: Duration::from_secs(120), topics, ..specification });
        assert!(serde_json::from_str::<StreamConfig>(r#"{ "slide": 120000 }"#).is_err());
    }

    #[test]
    fn a_bad_value_names_its_key_and_what_is_allowed() {
        let config = StreamConfig { slide: Duration::from_secs(90), ..StreamConfig::specification() };
        let error = config.validate().unwrap_err().to_string();
        assert_eq!(error, "slide_ms is 90s, allowed: a multiple of one minute, up to a day");
    }
}
