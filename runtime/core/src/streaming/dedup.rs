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
use crate::avro::append;
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
            let offsets = column.value_offsets();
            let (from, to) = (offsets[row] as usize, offsets[row + 1] as usize);
            scratch.extend_from_slice(&((to - from) as u32).to_le_bytes());
            append(scratch, &column.value_data()[from..], to - from);
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

/// Fingerprints of one minute. Those since the last commit are in the same set, and listed beside it, so that a commit
/// copies nothing and a rollback takes them out again.
#[derive(Debug, Clone, Default)]
struct Minute {
    set: HashSet<Fingerprint, ByHash>,
    dirty: Vec<Fingerprint>,
}

/// Fingerprints of one partition.
#[derive(Debug, Clone, Default)]
pub struct Dedup {
    minutes: BTreeMap<i64, Minute>,
    /// Live entries, and the minute of the watermark at which they were counted.
    live: Option<(Option<i64>, usize)>,
}

impl Dedup {
    /// Whether a fingerprint is remembered, whatever the horizon says.
    #[inline]
    pub fn holds(&self, timestamp_ms: i64, fingerprint: Fingerprint) -> bool {
        self.minutes.get(&pane_of(timestamp_ms)).is_some_and(|minute| minute.set.contains(&fingerprint))
    }

    /// What [`Dedup::see`] says of an event that is remembered.
    #[inline]
    pub fn see_held(timestamp_ms: i64, watermark: &Watermark, horizon_ms: i64) -> Seen {
        if is_expired(pane_of(timestamp_ms), watermark, horizon_ms) { Seen::BeyondHorizon } else { Seen::Duplicate }
    }

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
                if self.holds(timestamp_ms, fingerprint) {
                    return Seen::Duplicate;
                }
                self.count(watermark, horizon_ms)
            }
        };
        let seen = match () {
            () if counted < entries_max => {
                let minute = match self.minutes.get_mut(&minute) {
                    Some(minute) => minute,
                    None => self.begin(minute),
                };
                if minute.set.insert(fingerprint) {
                    minute.dirty.push(fingerprint);
                    Seen::New
                } else {
                    Seen::Duplicate
                }
            }
            () if self.holds(timestamp_ms, fingerprint) => Seen::Duplicate,
            () => Seen::Forgotten,
        };
        self.live = Some((at, counted + usize::from(seen == Seen::New)));
        seen
    }

    /// A new minute. The newest one gets room for as many as the one before it: a set that grows moves all it has, time and
    /// again.
    fn begin(&mut self, minute: i64) -> &mut Minute {
        let before = self.minutes.last_key_value().filter(|(newest, _)| **newest < minute);
        let room = before.map_or(0, |(_, before)| before.set.len());
        let begun = Minute { set: HashSet::with_capacity_and_hasher(room, ByHash::default()), dirty: Vec::new() };
        self.minutes.entry(minute).or_insert(begun)
    }

    fn count(&self, watermark: &Watermark, horizon_ms: i64) -> usize {
        let live = self.minutes.iter().filter(|(minute, _)| !is_expired(**minute, watermark, horizon_ms));
        live.map(|(_, minute)| minute.set.len()).sum()
    }

    /// Fingerprints since the last commit, in the order in which they came, per minute.
    pub fn dirty(&self) -> impl Iterator<Item = (i64, &[Fingerprint])> + '_ {
        let dirty = self.minutes.iter().filter(|(_, minute)| !minute.dirty.is_empty());
        dirty.map(|(&start, minute)| (start, &*minute.dirty))
    }

    /// Minutes that are past the horizon.
    pub fn expired(&self, watermark: &Watermark, horizon_ms: i64) -> Vec<i64> {
        self.minutes.keys().copied().filter(|&m| is_expired(m, watermark, horizon_ms)).collect()
    }

    /// Makes the new fingerprints committed and drops those past the horizon.
    pub fn commit(&mut self, watermark: &Watermark, horizon_ms: i64) {
        self.minutes.retain(|&minute, _| !is_expired(minute, watermark, horizon_ms));
        self.minutes.values_mut().for_each(|minute| minute.dirty.clear());
        self.live = None;
    }

    /// Forgets what was seen since the last commit.
    pub fn rollback(&mut self) {
        for minute in self.minutes.values_mut() {
            for fingerprint in minute.dirty.drain(..) {
                minute.set.remove(&fingerprint);
            }
        }
        self.minutes.retain(|_, minute| !minute.set.is_empty());
        self.live = None;
    }

    /// Adds committed fingerprints, when state is restored.
    pub fn restore(&mut self, minute: i64, fingerprints: impl IntoIterator<Item = Fingerprint>) {
        self.minutes.entry(minute).or_default().set.extend(fingerprints);
    }

    /// Everything that is remembered, sorted.
    pub fn snapshot(&self) -> BTreeMap<i64, Vec<Fingerprint>> {
        let held = self.minutes.iter().filter(|(_, minute)| !minute.set.is_empty());
        held.map(|(&start, minute)| {
            let mut all: Vec<_> = minute.set.iter().copied().collect();
            all.sort_unstable();
            (start, all)
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

    proptest! {
        #[test]
        fn a_held_event_is_answered_without_looking_again(
            events in prop::collection::vec((0i64..2_000_000, 0u128..8, 0u8..9), 1..120), entries_max in 1usize..40,
        ) {
            let (mut dedup, mut plain, mut watermark) = (Dedup::default(), Dedup::default(), Watermark::default());
            for (time, print, step) in events {
                let expected = plain.see(time, print, &watermark, HORIZON, entries_max);
                let seen = match dedup.holds(time, print) {
                    true => Dedup::see_held(time, &watermark, HORIZON),
                    false => dedup.see(time, print, &watermark, HORIZON, entries_max),
                };
                prop_assert_eq!(seen, expected);
                watermark.observe(time, 30_000);
                match step {
                    0 => { dedup.commit(&watermark, HORIZON); plain.commit(&watermark, HORIZON) }
                    1 => { dedup.rollback(); plain.rollback() }
                    _ => {}
                }
                prop_assert_eq!(dedup.snapshot(), plain.snapshot());
            }
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
