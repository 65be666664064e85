//! Duplicates: an event whose every field was seen before, within a horizon of event time.
//!
//! Events carry no id, so their content is their identity: 128 bits of hash over all fields. Duplicates have equal event
//! times, so each minute has its own set and a look-up touches one. Which fingerprints count depends on the partition's
//! watermark row by row, never on when a commit came. Left out: duplicates that a producer sends to another partition; it
//! keeps a user in one.

use std::collections::BTreeMap;

use twox_hash::XxHash64;

use super::{
    config::{PANE_MS, pane_of},
    event::ClickBatch,
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

/// A set of fingerprints: a table of places, of which each holds a fingerprint or nothing, and the first free one behind its
/// own is where a fingerprint goes. A set is larger than a cache, so what counts is that a look-up and the insertion after it
/// touch one line of memory, where those of a general table touch two.
#[derive(Debug, Clone, Default)]
pub(super) struct Prints {
    /// Any number of places, or none; 0 is a free one.
    places: Vec<Fingerprint>,
    held: usize,
    /// How many it holds before it grows.
    room: usize,
}

impl Prints {
    /// Places at first.
    const PLACES_MIN: usize = 16;

    /// An empty set with room for `held`, and none for nothing.
    fn with_room(held: usize) -> Self {
        if held == 0 {
            return Self::default();
        }
        // At most five of eight places are taken: fewer cost memory, with more the way to a free one is long. Rounded up to a power
        // of two, as is usual, a table would be half empty as often as not, and what counts is how much of it a cache holds.
        let places = (held.saturating_mul(8) / 5 + 1).max(Self::PLACES_MIN);
        Self { places: vec![0; places], held: 0, room: places * 5 / 8 }
    }

    /// 0 means a free place, so it shares one with 1; any two others of 2^128 are as likely to be equal.
    #[inline]
    fn kept(print: Fingerprint) -> Fingerprint {
        print.max(1)
    }

    /// The lower half of a fingerprint as a share of the table. There must be places.
    #[inline]
    fn own_place(&self, print: Fingerprint) -> usize {
        ((u128::from(print as u64) * self.places.len() as u128) >> 64) as usize
    }

    #[inline]
    fn behind(&self, at: usize) -> usize {
        if at + 1 == self.places.len() { 0 } else { at + 1 }
    }

    /// Where a fingerprint is, or the free place where it belongs. There must be places.
    #[inline]
    fn place(&self, print: Fingerprint) -> Result<usize, usize> {
        let mut at = self.own_place(print);
        loop {
            match self.places[at] {
                0 => return Err(at),
                held if held == print => return Ok(at),
                _ => at = self.behind(at),
            }
        }
    }

    fn len(&self) -> usize {
        self.held
    }

    /// What stands where a fingerprint would, or any number: asking for it brings the place nearer, and as nothing depends on
    /// the answer, nobody waits for it.
    #[inline]
    pub(super) fn near(&self, print: Fingerprint) -> u64 {
        self.places.get(self.own_place(print)).map_or(0, |&print| print as u64)
    }

    #[inline]
    pub(super) fn contains(&self, print: Fingerprint) -> bool {
        !self.places.is_empty() && self.place(Self::kept(print)).is_ok()
    }

    /// Whether it is new.
    #[inline]
    fn insert(&mut self, print: Fingerprint) -> bool {
        if self.held >= self.room {
            self.grow();
        }
        match self.place(Self::kept(print)) {
            Ok(_) => false,
            Err(free) => {
                self.places[free] = Self::kept(print);
                self.held += 1;
                true
            }
        }
    }

    #[cold]
    fn grow(&mut self) {
        let before = std::mem::replace(self, Self::with_room(2 * self.held + 1));
        for print in before.iter() {
            if let Err(free) = self.place(print) {
                self.places[free] = print;
            }
        }
        self.held = before.held;
    }

    /// Takes one out. Those behind it that had to give way move up, so that no gap stands between any and its own place.
    fn remove(&mut self, print: Fingerprint) {
        if self.places.is_empty() {
            return;
        }
        let Ok(mut gap) = self.place(Self::kept(print)) else { return };
        let places = self.places.len();
        // How far a place lies behind another, around the end of the table if need be.
        let distance = |from: usize, to: usize| if to >= from { to - from } else { to + places - from };
        let mut at = gap;
        loop {
            at = self.behind(at);
            let next = self.places[at];
            if next == 0 {
                break;
            }
            // It may move when its own place does not lie behind the gap.
            if distance(self.own_place(next), at) >= distance(gap, at) {
                self.places[gap] = next;
                gap = at;
            }
        }
        self.places[gap] = 0;
        self.held -= 1;
    }

    fn iter(&self) -> impl Iterator<Item = Fingerprint> + '_ {
        self.places.iter().copied().filter(|&print| print != 0)
    }
}

/// Fingerprints of one minute. Those since the last commit are in the same set, and listed beside it, so that a commit
/// copies nothing and a rollback takes them out again.
#[derive(Debug, Clone, Default)]
struct Minute {
    set: Prints,
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
        self.prints(pane_of(timestamp_ms)).is_some_and(|prints| prints.contains(fingerprint))
    }

    /// What is remembered of a minute, whatever the horizon says.
    #[inline]
    pub(super) fn prints(&self, minute: i64) -> Option<&Prints> {
        self.minutes.get(&minute).map(|minute| &minute.set)
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

    /// A new minute. The newest one gets room for somewhat more than the one before it has: a set that grows moves all it has,
    /// time and again.
    fn begin(&mut self, minute: i64) -> &mut Minute {
        let before = self.minutes.last_key_value().filter(|(newest, _)| **newest < minute);
        let room = before.map_or(0, |(_, before)| before.set.len() / 8 * 9);
        let begun = Minute { set: Prints::with_room(room), dirty: Vec::new() };
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
                minute.set.remove(fingerprint);
            }
        }
        self.minutes.retain(|_, minute| minute.set.len() > 0);
        self.live = None;
    }

    /// Adds committed fingerprints, when state is restored.
    pub fn restore(&mut self, minute: i64, fingerprints: impl IntoIterator<Item = Fingerprint>) {
        let set = &mut self.minutes.entry(minute).or_default().set;
        fingerprints.into_iter().for_each(|fingerprint| {
            set.insert(fingerprint);
        });
    }

    /// Everything that is remembered, sorted.
    pub fn snapshot(&self) -> BTreeMap<i64, Vec<Fingerprint>> {
        let held = self.minutes.iter().filter(|(_, minute)| minute.set.len() > 0);
        held.map(|(&start, minute)| {
            let mut all: Vec<_> = minute.set.iter().collect();
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
        /// Few own places for many fingerprints, so that they give way to each other, around the end of the table too.
        #[test]
        fn a_set_of_fingerprints_is_a_set(steps in prop::collection::vec((0u8..3, 0u128..40, 0u128..3), 0..300)) {
            let (mut prints, mut plain) = (Prints::default(), std::collections::BTreeSet::new());
            for (step, low, high) in steps {
                // Own places are spread over the table, with some fingerprints for each.
                let print = (high << 100) | ((low % 8) << 61) | (low * 97 + 1);
                match step {
                    0 => { prints.remove(print); plain.remove(&print); }
                    1 | 2 => prop_assert_eq!(prints.insert(print), plain.insert(print)),
                    _ => unreachable!(),
                }
                prop_assert_eq!(prints.len(), plain.len());
                prop_assert!(prints.contains(print) == plain.contains(&print) && !prints.contains(print ^ (1 << 127)));
                prop_assert!(plain.iter().all(|&print| prints.contains(print)));
                let mut all: Vec<_> = prints.iter().collect();
                all.sort_unstable();
                prop_assert!(all.iter().eq(&plain));
            }
        }
    }

    #[test]
    fn nothing_is_a_fingerprint_too() {
        let mut prints = Prints::default();
        assert!(!prints.contains(0) && prints.insert(0) && prints.contains(0) && !prints.insert(0));
        prints.remove(0);
        assert!(!prints.contains(0) && prints.len() == 0);
    }

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
