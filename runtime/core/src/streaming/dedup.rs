//! Duplicates: an event whose every field was seen before, within a horizon of event time.
//!
//! Events carry no id, so their content is their identity: 128 bits of hash over all fields. Duplicates have equal event
//! times, so each minute has its own set and a look-up touches one. Which fingerprints count depends on the partition's
//! watermark row by row, never on when a commit came. Left out: duplicates that a producer sends to another partition; it
//! keeps a user in one.

use std::collections::{BTreeMap, HashSet};

use twox_hash::XxHash64;

use super::{
    config::{PANE_MS, pane_of},
    event::ClickBatch,
    pane::ByHash,
    watermark::Watermark,
};
use arrow::array::{Array, StringArray};

/// Content of an event as 128 bits.
pub type Fingerprint = u128;

/// Seeds of the two halves; part of the state's format.
const SEEDS: [u64; 2] = [0x5EED_0000_0000_0002, 0x5EED_0000_0000_0003];

/// Fingerprint of a row; `scratch` is reused between rows.
pub fn fingerprint(batch: &ClickBatch, row: usize, scratch: &mut Vec<u8>) -> Fingerprint {
    scratch.clear();
    let mut text = |column: &StringArray| {
        // The length in front keeps ("ab", "c") apart from ("a", "bc"), and null apart from "".
        if column.is_null(row) {
            scratch.extend_from_slice(&u32::MAX.to_le_bytes());
        } else {
            let value = column.value(row);
            scratch.extend_from_slice(&(value.len() as u32).to_le_bytes());
            scratch.extend_from_slice(value.as_bytes());
        }
    };
    text(&batch.user_id);
    text(&batch.event_type);
    text(&batch.page);
    text(&batch.product_id);
    text(&batch.region);
    scratch.extend_from_slice(&batch.monto_cents.value(row).to_le_bytes());
    scratch.extend_from_slice(&batch.timestamp_ms.value(row).to_le_bytes());
    let [high, low] = SEEDS.map(|seed| XxHash64::oneshot(seed, scratch));
    (u128::from(high) << 64) | u128::from(low)
}

/// What is known about an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Not seen within the horizon; remembered now.
    New,
    /// Not seen, and not remembered because the memory is full.
    Forgotten,
    /// Older than the horizon: nobody can tell.
    BeyondHorizon,
    /// Seen before.
    Duplicate,
}

type Minutes = BTreeMap<i64, HashSet<Fingerprint, ByHash>>;

/// Fingerprints of one partition. Those since the last commit are in the same sets, and listed beside them, so that a commit
/// copies nothing and a rollback takes them out again.
#[derive(Debug, Clone, Default)]
pub struct Dedup {
    minutes: Minutes,
    dirty: BTreeMap<i64, Vec<Fingerprint>>,
    /// Live entries, and the minute of the watermark at which they were counted.
    live: Option<(Option<i64>, usize)>,
}

impl Dedup {
    /// Looks an event up and remembers it.
    pub fn see(
        &mut self,
        timestamp_ms: i64,
        fingerprint: Fingerprint,
        watermark: &Watermark,
        horizon_ms: i64,
        entries_max: usize,
    ) -> Seen {
        let minute = pane_of(timestamp_ms);
        if is_expired(minute, watermark, horizon_ms) {
            return Seen::BeyondHorizon;
        }
        let at = watermark.value.map(pane_of);
        let counted = match self.live {
            Some((counted_at, live)) if counted_at == at => live,
            Some(_) | None => {
                if self.minutes.get(&minute).is_some_and(|set| set.contains(&fingerprint)) {
                    return Seen::Duplicate;
                }
                self.count(watermark, horizon_ms)
            }
        };
        let seen = match () {
            () if counted < entries_max => {
                if self.minutes.entry(minute).or_default().insert(fingerprint) {
                    self.dirty.entry(minute).or_default().push(fingerprint);
                    Seen::New
                } else {
                    Seen::Duplicate
                }
            }
            () if self.minutes.get(&minute).is_some_and(|set| set.contains(&fingerprint)) => Seen::Duplicate,
            () => Seen::Forgotten,
        };
        self.live = Some((at, counted + usize::from(seen == Seen::New)));
        seen
    }

    fn count(&self, watermark: &Watermark, horizon_ms: i64) -> usize {
        let live = self.minutes.iter().filter(|(minute, _)| !is_expired(**minute, watermark, horizon_ms));
        live.map(|(_, set)| set.len()).sum()
    }

    /// Fingerprints since the last commit, sorted, per minute.
    pub fn dirty(&self) -> impl Iterator<Item = (i64, Vec<Fingerprint>)> + '_ {
        self.dirty.iter().map(|(&minute, all)| {
            let mut all = all.clone();
            all.sort_unstable();
            (minute, all)
        })
    }

    /// Minutes that are past the horizon.
    pub fn expired(&self, watermark: &Watermark, horizon_ms: i64) -> Vec<i64> {
        self.minutes.keys().copied().filter(|&m| is_expired(m, watermark, horizon_ms)).collect()
    }

    /// Makes the new fingerprints committed and drops those past the horizon.
    pub fn commit(&mut self, watermark: &Watermark, horizon_ms: i64) {
        self.dirty.clear();
        self.minutes.retain(|&minute, _| !is_expired(minute, watermark, horizon_ms));
        self.live = None;
    }

    /// Forgets what was seen since the last commit.
    pub fn rollback(&mut self) {
        for (minute, all) in std::mem::take(&mut self.dirty) {
            if let Some(set) = self.minutes.get_mut(&minute) {
                all.iter().for_each(|fingerprint| {
                    set.remove(fingerprint);
                });
            }
        }
        self.minutes.retain(|_, set| !set.is_empty());
        self.live = None;
    }

    /// Adds committed fingerprints, when state is restored.
    pub fn restore(&mut self, minute: i64, fingerprints: impl IntoIterator<Item = Fingerprint>) {
        self.minutes.entry(minute).or_default().extend(fingerprints);
    }

    /// Everything that is remembered, sorted.
    pub fn snapshot(&self) -> BTreeMap<i64, Vec<Fingerprint>> {
        let held = self.minutes.iter().filter(|(_, set)| !set.is_empty());
        held.map(|(&minute, set)| {
            let mut all: Vec<_> = set.iter().copied().collect();
            all.sort_unstable();
            (minute, all)
        })
        .collect()
    }
}

fn is_expired(minute: i64, watermark: &Watermark, horizon_ms: i64) -> bool {
    watermark.reached(minute.saturating_add(PANE_MS).saturating_add(horizon_ms))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HORIZON: i64 = 600_000;

    proptest! {
        #[test]
        fn commits_and_rollbacks_do_not_change_the_answers(
            events in prop::collection::vec((0i64..2_000_000, 0u128..8), 1..120),
            commits in prop::collection::vec(any::<bool>(), 120), entries_max in 1usize..40,
        ) {
            let answers = |commits: &[bool]| {
                let (mut dedup, mut watermark) = (Dedup::default(), Watermark::default());
                let mut answers = Vec::new();
                for (&(time, print), &commit) in events.iter().zip(commits) {
                    answers.push(dedup.see(time, print, &watermark, HORIZON, entries_max));
                    watermark.observe(time, 30_000);
                    if commit { dedup.commit(&watermark, HORIZON) }
                }
                answers
            };
            prop_assert_eq!(answers(&commits), answers(&[false; 120]));
        }
    }

    #[test]
    fn memory_is_bounded_and_says_so() {
        let (mut dedup, watermark) = (Dedup::default(), Watermark::default());
        let answers = [1, 2, 3, 3, 1].map(|print| dedup.see(5, print, &watermark, HORIZON, 2));
        assert_eq!(answers, [Seen::New, Seen::New, Seen::Forgotten, Seen::Forgotten, Seen::Duplicate]);
    }

    #[test]
    fn a_duplicate_is_known_until_the_horizon_and_then_nothing_is() {
        let (mut dedup, mut watermark) = (Dedup::default(), Watermark::default());
        assert_eq!(dedup.see(0, 7, &watermark, HORIZON, 10), Seen::New);
        watermark.observe(HORIZON + PANE_MS - 1, 0);
        dedup.commit(&watermark, HORIZON);
        assert_eq!(dedup.see(0, 7, &watermark, HORIZON, 10), Seen::Duplicate);
        watermark.observe(HORIZON + PANE_MS, 0);
        assert_eq!(dedup.see(0, 7, &watermark, HORIZON, 10), Seen::BeyondHorizon);
        dedup.commit(&watermark, HORIZON);
        assert!(dedup.snapshot().is_empty());
    }

    #[test]
    fn a_rollback_forgets() {
        let (mut dedup, watermark) = (Dedup::default(), Watermark::default());
        assert_eq!(dedup.see(0, 7, &watermark, HORIZON, 10), Seen::New);
        dedup.rollback();
        assert_eq!(dedup.see(0, 7, &watermark, HORIZON, 10), Seen::New);
    }
}
