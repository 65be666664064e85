//! Who may keep how much while a query runs.
//!
//! A plan has several places that keep rows: sorts, groups, windows, joins. Most fill one after another, the later ones from
//! what the earlier give out. Shared out evenly beforehand, each would spill early; first come first served, one that is
//! almost full would leave nothing to the next. Here each that can spill may take two thirds of what the others leave.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use deltalake::datafusion::{
    error::{DataFusionError, Result},
    execution::memory_pool::{MemoryConsumer, MemoryLimit, MemoryPool, MemoryReservation},
};

/// A pool of which each consumer that can spill takes at most two thirds of what the others leave, and any other what is left.
#[derive(Debug)]
pub(crate) struct Shares {
    limit: usize,
    used: Mutex<usize>,
}

impl Shares {
    /// A pool of `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit, used: Mutex::new(0) }
    }

    fn change(&self, by: impl FnOnce(usize) -> usize) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        *used = by(*used);
    }
}

impl fmt::Display for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "shares of {} MiB", self.limit >> 20)
    }
}

impl MemoryPool for Shares {
    fn name(&self) -> &str {
        "shares"
    }
    fn register(&self, _: &MemoryConsumer) {}
    fn unregister(&self, _: &MemoryConsumer) {}
    fn grow(&self, _: &MemoryReservation, additional: usize) {
        self.change(|used| used + additional);
    }
    fn shrink(&self, _: &MemoryReservation, shrink: usize) {
        self.change(|used| used.saturating_sub(shrink));
    }
    fn try_grow(&self, reservation: &MemoryReservation, additional: usize) -> Result<()> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let (own, left) = (reservation.size(), self.limit.saturating_sub(*used));
        let most = if reservation.consumer().can_spill() { (own + left) / 3 * 2 } else { own + left };
        if own + additional > most {
            return Err(DataFusionError::ResourcesExhausted(format!(
                "{}: found {own} bytes and {additional} more asked for, expected at most {most} of the {} MiB of a query",
                reservation.consumer().name(),
                self.limit >> 20
            )));
        }
        *used += additional;
        Ok(())
    }
    fn reserved(&self) -> usize {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn memory_limit(&self) -> MemoryLimit {
        MemoryLimit::Finite(self.limit)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn one_that_can_spill_never_leaves_nothing_to_the_next() {
        let pool: Arc<dyn MemoryPool> = Arc::new(Shares::new(900));
        let spills = |name: &str| MemoryConsumer::new(name).with_can_spill(true).register(&pool);
        let first = spills("first");
        first.try_grow(600).expect("two thirds");
        assert!(first.try_grow(1).is_err());
        let second = spills("second");
        second.try_grow(200).expect("two thirds of the rest");
        assert!(second.try_grow(1).is_err());
        let join = MemoryConsumer::new("join").register(&pool);
        join.try_grow(100).expect("all that is left");
        assert!(join.try_grow(1).is_err());
        drop(first);
        assert_eq!(pool.reserved(), 300);
        second.try_grow(300).expect("what the first gave back");
        drop((second, join));
        assert_eq!(pool.reserved(), 0);
    }
}
