//! Objects that somebody removes or damages past the platform: which of them, and when.
//!
//! No call of the platform meets such a fault. It strikes at its time, once, and each object that it meets is a hit.

use chrono::{DateTime, Utc};

use super::StoreFault;

/// A removal, as the store carries it out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    prefix: String,
    spares: String,
    written_from: Option<DateTime<Utc>>,
    at: DateTime<Utc>,
    /// What is left.
    pub leaves: Leaves,
}

/// What a removal leaves of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaves {
    /// Nothing, and no version of it.
    Nothing,
    /// Versions below a delete marker.
    Versions,
    /// The first half of its bytes, in its place.
    Half,
}

impl Removal {
    /// The removal that a fault is; `None` when it is none.
    pub fn of(fault: &StoreFault) -> Option<Self> {
        match fault {
            StoreFault::PrefixRemoved { prefix, spares, written_from, at, for_good } => Some(Self {
                prefix: prefix.clone(),
                spares: spares.clone(),
                written_from: *written_from,
                at: *at,
                leaves: if *for_good { Leaves::Nothing } else { Leaves::Versions },
            }),
            StoreFault::PrefixCut { prefix, at } => {
                Some(Self { prefix: prefix.clone(), spares: String::new(), written_from: None, at: *at, leaves: Leaves::Half })
            }
            StoreFault::Unavailable { .. }
            | StoreFault::ReplyLost { .. }
            | StoreFault::NoSpace { .. }
            | StoreFault::Throttled { .. }
            | StoreFault::BlackHole { .. }
            | StoreFault::Truncated { .. }
            | StoreFault::TokenExpired { .. }
            | StoreFault::TooSkewed { .. } => None,
        }
    }

    /// Whether its time has come.
    pub fn is_due(&self, now: DateTime<Utc>) -> bool {
        self.at <= now
    }

    /// Whether an object that was last written then goes.
    pub fn takes(&self, path: &str, written: DateTime<Utc>) -> bool {
        let is_spared = !self.spares.is_empty() && path.contains(&self.spares);
        path.starts_with(&self.prefix) && !is_spared && self.written_from.is_none_or(|from| written >= from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_is_below_the_prefix_not_spared_and_new_enough() {
        let at = |text: &str| text.parse::<DateTime<Utc>>().expect("an instant");
        let fault = StoreFault::PrefixRemoved {
            prefix: "staging/".into(),
            spares: "_delta_log".into(),
            written_from: Some(at("2024-03-18T03:00:00Z")),
            at: at("2024-03-18T12:00:00Z"),
            for_good: true,
        };
        let removal = Removal::of(&fault).expect("a removal");
        assert!(!removal.is_due(at("2024-03-18T11:59:59Z")) && removal.is_due(at("2024-03-18T12:00:00Z")));
        let (old, new) = (at("2024-03-18T02:59:59Z"), at("2024-03-18T03:00:00Z"));
        assert!(removal.takes("staging/t/fecha=2024-03-17/a.parquet", new));
        assert!(!removal.takes("staging/t/fecha=2024-03-17/a.parquet", old));
        assert!(!removal.takes("staging/t/_delta_log/0.json", new) && !removal.takes("marts/t/a.parquet", new));
    }
}
