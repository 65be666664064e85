//! The watermark of a partition: no event older than it is expected any more.
//!
//! It depends on the partition's own events alone, one by one in order of offset, so the fate of an event is the same at
//! every replay and on every worker. What it leaves out is the clock. An idle partition does not vanish from the minimum:
//! it *follows* the others (see [`Watermark::follow`]), so that its own promise covers what it let pass, and a partition
//! whose worker is dead follows nobody.

/// Watermark of one partition, in milliseconds since 1970. `None` before the first event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Watermark {
    /// Largest event time that was accepted.
    pub newest: Option<i64>,
    /// The watermark; never goes back.
    pub value: Option<i64>,
}

impl Watermark {
    /// Takes note of an accepted event.
    pub fn observe(&mut self, timestamp_ms: i64, bound_ms: i64) {
        self.newest = self.newest.max(Some(timestamp_ms));
        self.value = self.value.max(Some(timestamp_ms.saturating_sub(bound_ms)));
    }
    /// Moves an idle partition up to the others.
    pub fn follow(&mut self, target_ms: i64) {
        self.value = self.value.max(Some(target_ms));
    }
    /// Whether the watermark has reached `time_ms`.
    pub fn reached(&self, time_ms: i64) -> bool {
        self.value.is_some_and(|w| w >= time_ms)
    }
}

/// How a partition stands, as the merge sees it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InputMark {
    /// Its watermark.
    pub watermark: Option<i64>,
    /// Whether it was read to its end for so long that it may follow the others.
    pub idle: bool,
}

/// The watermark of all partitions: the smallest, and nothing while one has none.
pub fn global<'a>(marks: impl IntoIterator<Item = &'a InputMark>) -> Option<i64> {
    let mut smallest = None;
    for mark in marks {
        let watermark = mark.watermark?;
        smallest = Some(smallest.map_or(watermark, |s: i64| s.min(watermark)));
    }
    smallest
}

/// Where idle partitions may go: the smallest watermark of those that are not idle. Nothing when all are, or when one of
/// them has none: then the watermark holds.
pub fn target<'a>(marks: impl IntoIterator<Item = &'a InputMark>) -> Option<i64> {
    global(marks.into_iter().filter(|mark| !mark.idle))
}

/// Tells whether a partition is idle: read to its end for some time, and the broker says so at both ends of that time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Idleness {
    caught_up_since: Option<i64>,
}

impl Idleness {
    /// Takes note of what the broker said about the end.
    pub fn observe(&mut self, next_offset: i64, end_offset: i64, records: usize, now_ms: i64) {
        if next_offset < end_offset {
            self.caught_up_since = None;
        } else if records > 0 || self.caught_up_since.is_none_or(|since| since > now_ms) {
            // `since > now`: the clock went back, start again.
            self.caught_up_since = Some(now_ms);
        }
    }
    /// Whether it was caught up for `idle_after_ms`; the broker is asked once more before this is believed.
    pub fn is_due(&self, idle_after_ms: i64, now_ms: i64) -> bool {
        self.caught_up_since.is_some_and(|since| now_ms.saturating_sub(since) >= idle_after_ms)
    }
    /// Forgets: the partition is not known to be caught up.
    pub fn reset(&mut self) {
        self.caught_up_since = None;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_watermark_never_goes_back(steps in prop::collection::vec((any::<bool>(), 0i64..1_000_000), 0..50)) {
            let mut watermark = Watermark::default();
            for (observe, time) in steps {
                let before = watermark.value;
                if observe { watermark.observe(time, 30_000) } else { watermark.follow(time) }
                prop_assert!(watermark.value >= before);
                prop_assert!(!observe || watermark.value >= Some(time - 30_000));
            }
        }
    }

    fn mark(watermark: Option<i64>, idle: bool) -> InputMark {
        InputMark { watermark, idle }
    }

    #[test]
    fn one_silent_partition_holds_all_and_an_idle_one_is_led() {
        assert_eq!(global(&[mark(Some(5), false), mark(None, false)]), None);
        assert_eq!(global(&[mark(Some(5), false), mark(Some(3), true)]), Some(3));
        assert_eq!(target(&[mark(Some(5), false), mark(Some(3), true), mark(None, true)]), Some(5));
        assert_eq!(target(&[mark(Some(5), true)]), None, "all idle: hold");
        assert_eq!(target(&[mark(None, false), mark(Some(3), true)]), None);
    }

    #[test]
    fn only_a_partition_read_to_its_end_becomes_idle() {
        let mut idleness = Idleness::default();
        assert!(!idleness.is_due(60, 1_000), "nothing is known yet");
        idleness.observe(10, 20, 10, 0);
        assert!(!idleness.is_due(60, 1_000), "slow is not idle");
        idleness.observe(20, 20, 10, 100);
        idleness.observe(20, 20, 0, 150);
        assert!(!idleness.is_due(60, 159));
        assert!(idleness.is_due(60, 160));
        idleness.observe(21, 21, 1, 170);
        assert!(!idleness.is_due(60, 180), "an event ends it");
        idleness.observe(21, 21, 0, 50);
        assert!(!idleness.is_due(60, 100), "a clock that goes back starts the time again");
    }
}
