//! Distinct users: exact up to a limit, then a HyperLogLog sketch.
//!
//! The state is a function of the set of users alone, never of their order or of how they were divided: merging is a
//! union, so partials of partitions, panes and restarts give what one reader of everything would have. The estimator
//! (Ertl, 2017, "New cardinality estimation algorithms for HyperLogLog sketches") reads the registers only and uses
//! nothing but IEEE basic operations, so every machine prints the same number. A user is a 64-bit hash; for the few
//! thousand users of an exact set a collision is out of question. Left out: set difference and intersection.

use twox_hash::XxHash64;

/// Seed of the hash of users. Part of the state's format: sets of different seeds cannot be merged.
const USER_SEED: u64 = 0x5EED_0000_0000_0001;
/// 2^14 registers: a standard error of 0.81 %.
const PRECISION: u32 = 14;
/// Registers of a sketch, one byte each.
pub const REGISTERS: usize = 1 << PRECISION;
/// Most zeros that can follow the register's index, plus one.
const RANK_MAX: u8 = (64 - PRECISION + 1) as u8;
/// Hashes that are kept without an allocation.
const FEW: usize = 4;
/// Hashes that are collected before they are sorted in.
const PENDING_MIN: usize = 32;

/// Hash of a user.
pub fn user_hash(user_id: &str) -> u64 {
    XxHash64::oneshot(USER_SEED, user_id.as_bytes())
}

/// A set of users.
#[derive(Debug, Clone)]
pub struct Users(Form);

#[derive(Debug, Clone)]
enum Form {
    /// Sorted and distinct, without an allocation: most pages have few users in a minute.
    Few { hashes: [u64; FEW], count: u8 },
    /// The first `sorted` are sorted and distinct, the rest are neither yet.
    Exact { hashes: Vec<u64>, sorted: usize },
    /// Largest rank per register.
    Sketch(Box<[u8]>),
}

/// A count of users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserCount {
    /// How many.
    pub users: u64,
    /// Whether that is a count; otherwise an estimate with a standard error of 0.81 %.
    pub exact: bool,
}

/// The same set, for whoever stores it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UsersView<'a> {
    /// Hashes, sorted and distinct.
    Exact(&'a [u64]),
    /// Registers.
    Sketch(&'a [u8]),
}

impl Default for Users {
    fn default() -> Self {
        Self(Form::Few { hashes: [0; FEW], count: 0 })
    }
}

impl Users {
    /// Adds a user. Amortised: hashes are collected and sorted in when they double the set.
    #[inline]
    pub fn insert(&mut self, hash: u64, exact_max: usize) {
        match &mut self.0 {
            Form::Few { hashes, count } => {
                let held = usize::from(*count);
                let at = hashes[..held].iter().position(|&h| h >= hash).unwrap_or(held);
                if at < held && hashes[at] == hash {
                    return;
                }
                if held < FEW {
                    hashes.copy_within(at..held, at + 1);
                    hashes[at] = hash;
                    *count += 1;
                } else {
                    let mut all = Vec::with_capacity(4 * FEW);
                    all.extend_from_slice(hashes);
                    all.push(hash);
                    self.0 = Form::Exact { hashes: all, sorted: FEW };
                }
            }
            Form::Exact { hashes, sorted } => {
                hashes.push(hash);
                if hashes.len() - *sorted >= PENDING_MIN.max(*sorted) {
                    self.settle(exact_max);
                }
            }
            Form::Sketch(registers) => raise(registers, hash),
        }
    }

    /// Sorts in what was collected, and turns into a sketch above `exact_max`. Two equal sets are equal after it.
    pub fn settle(&mut self, exact_max: usize) {
        if let Form::Exact { hashes, sorted } = &mut self.0
            && *sorted < hashes.len()
        {
            hashes.sort_unstable();
            hashes.dedup();
            *sorted = hashes.len();
        }
        let exact = self.sorted();
        if exact.len() > exact_max {
            let mut registers = vec![0; REGISTERS].into_boxed_slice();
            exact.iter().for_each(|&hash| raise(&mut registers, hash));
            self.0 = Form::Sketch(registers);
        }
    }

    /// The sorted hashes of an exact set; none of a sketch.
    fn sorted(&self) -> &[u64] {
        match &self.0 {
            Form::Few { hashes, count } => &hashes[..usize::from(*count)],
            Form::Exact { hashes, sorted } => &hashes[..*sorted],
            Form::Sketch(_) => &[],
        }
    }

    /// The hashes of an exact set that are not sorted in.
    fn pending(&self) -> &[u64] {
        match &self.0 {
            Form::Exact { hashes, sorted } => &hashes[*sorted..],
            Form::Few { .. } | Form::Sketch(_) => &[],
        }
    }

    /// Adds all users of another set.
    pub fn merge(&mut self, other: &Users, exact_max: usize) {
        match (&mut self.0, &other.0) {
            (_, Form::Few { hashes, count }) => {
                hashes[..usize::from(*count)].iter().for_each(|&hash| self.insert(hash, exact_max));
            }
            (Form::Few { hashes, count }, Form::Exact { .. }) => {
                let mine = (*hashes, usize::from(*count));
                self.0 = other.0.clone();
                mine.0[..mine.1].iter().for_each(|&hash| self.insert(hash, exact_max));
            }
            (Form::Exact { hashes: mine, sorted }, Form::Exact { hashes, .. }) => {
                mine.extend_from_slice(hashes);
                if mine.len() - *sorted >= PENDING_MIN.max(*sorted) {
                    self.settle(exact_max);
                }
            }
            (Form::Sketch(registers), Form::Exact { hashes, .. }) => {
                hashes.iter().for_each(|&hash| raise(registers, hash));
            }
            (_, Form::Sketch(theirs)) => {
                let mut registers = theirs.clone();
                if let Form::Sketch(mine) = &self.0 {
                    registers.iter_mut().zip(mine).for_each(|(r, m)| *r = (*r).max(*m));
                }
                self.sorted().iter().chain(self.pending()).for_each(|&hash| raise(&mut registers, hash));
                self.0 = Form::Sketch(registers);
            }
        }
    }

    /// How many users there are.
    pub fn count(&mut self, exact_max: usize) -> UserCount {
        self.settle(exact_max);
        match &self.0 {
            Form::Few { .. } | Form::Exact { .. } => UserCount { users: self.sorted().len() as u64, exact: true },
            Form::Sketch(registers) => UserCount { users: estimate(registers), exact: false },
        }
    }

    /// The settled set; call [`Users::settle`] before.
    pub fn view(&self) -> UsersView<'_> {
        match &self.0 {
            Form::Few { .. } | Form::Exact { .. } => {
                assert!(self.pending().is_empty(), "users are settled before they are looked at");
                UsersView::Exact(self.sorted())
            }
            Form::Sketch(registers) => UsersView::Sketch(registers),
        }
    }

    /// A set from its hashes; they need not be sorted.
    pub fn from_hashes(hashes: Vec<u64>, exact_max: usize) -> Self {
        if hashes.len() <= FEW {
            let mut users = Self::default();
            hashes.into_iter().for_each(|hash| users.insert(hash, exact_max));
            users.settle(exact_max);
            return users;
        }
        let mut users = Self(Form::Exact { hashes, sorted: 0 });
        users.settle(exact_max);
        users
    }

    /// A set from its registers; `None` unless there are [`REGISTERS`], each within its range.
    pub fn from_registers(registers: &[u8]) -> Option<Self> {
        let fits = registers.len() == REGISTERS && registers.iter().all(|&rank| rank <= RANK_MAX);
        fits.then(|| Self(Form::Sketch(registers.into())))
    }
}

#[inline]
fn raise(registers: &mut [u8], hash: u64) {
    let index = (hash >> (64 - PRECISION)) as usize;
    // The bit set below the hash's own keeps the rank within bounds when they are all zero.
    let rank = ((hash << PRECISION) | (1 << (PRECISION - 1))).leading_zeros() as u8 + 1;
    if registers[index] < rank {
        registers[index] = rank;
    }
}

fn estimate(registers: &[u8]) -> u64 {
    let mut histogram = [0u32; RANK_MAX as usize + 1];
    for &rank in registers {
        histogram[usize::from(rank.min(RANK_MAX))] += 1;
    }
    let m = REGISTERS as f64;
    let mut z = m * tau(1.0 - f64::from(histogram[usize::from(RANK_MAX)]) / m);
    for &count in histogram[1..usize::from(RANK_MAX)].iter().rev() {
        z = 0.5 * (z + f64::from(count));
    }
    z += m * sigma(f64::from(histogram[0]) / m);
    // 1 / (2 ln 2)
    (0.721_347_520_444_481_7 * m * m / z).round() as u64
}

fn sigma(mut x: f64) -> f64 {
    if x >= 1.0 {
        return f64::INFINITY;
    }
    let (mut y, mut z) = (1.0, x);
    loop {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z <= before {
            return z;
        }
    }
}

fn tau(mut x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return 0.0;
    }
    let (mut y, mut z) = (1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x) * (1.0 - x) * y;
        if z >= before {
            return z / 3.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn of(ids: &[u32], exact_max: usize) -> Users {
        let mut users = Users::default();
        ids.iter().for_each(|id| users.insert(user_hash(&id.to_string()), exact_max));
        users
    }

    proptest! {
        #[test]
        fn the_set_does_not_depend_on_order_or_division(
            ids in prop::collection::vec(0u32..300, 0..600), cut in 0usize..600, exact_max in 1usize..200, turn in any::<bool>(),
        ) {
            let cut = cut.min(ids.len());
            let mut whole = of(&ids, exact_max);
            let (mut left, mut right) = (of(&ids[..cut], exact_max), of(&ids[cut..], exact_max));
            if turn { std::mem::swap(&mut left, &mut right) }
            left.merge(&right, exact_max);
            left.merge(&right, exact_max);
            whole.settle(exact_max);
            left.settle(exact_max);
            prop_assert_eq!(whole.view(), left.view());
            let distinct = ids.iter().collect::<BTreeSet<_>>().len();
            let count = left.count(exact_max);
            prop_assert_eq!(count.exact, distinct <= exact_max);
            prop_assert!(!count.exact || count.users == distinct as u64);
        }
    }

    #[test]
    fn the_estimate_is_within_three_standard_errors() {
        let mut users = Users::default();
        let mut checked = 0;
        for n in 1..=2_000_000u64 {
            users.insert(user_hash(&format!("user-{n}")), 4_096);
            if n == 5_000 || n == 20_000 || n == 50_000 || n == 200_000 || n == 2_000_000 {
                let count = users.count(4_096);
                assert!(!count.exact);
                let error = count.users.abs_diff(n) as f64 / n as f64;
                assert!(error < 3.0 * 1.04 / (REGISTERS as f64).sqrt(), "{n} users counted as {}", count.users);
                checked += 1;
            }
        }
        assert_eq!(checked, 5);
    }

    #[test]
    fn the_limit_is_the_last_exact_number() {
        assert_eq!(of(&[1, 2, 3, 3], 3).count(3), UserCount { users: 3, exact: true });
        assert_eq!(of(&[1, 2, 3, 4], 3).count(3), UserCount { users: 4, exact: false });
    }

    #[test]
    fn hash_and_estimate_are_part_of_the_format() {
        // These numbers change only with the format's version: stored sketches would mean something else.
        assert_eq!(user_hash("u-1"), 5_938_644_190_469_536_465);
        let mut users = of(&(0..10_000).collect::<Vec<_>>(), 64);
        assert_eq!(users.count(64), UserCount { users: 9_995, exact: false });
    }

    #[test]
    fn registers_out_of_range_are_refused() {
        assert!(Users::from_registers(&[0; REGISTERS]).is_some());
        assert!(Users::from_registers(&[RANK_MAX + 1; REGISTERS]).is_none());
        assert!(Users::from_registers(&[0; REGISTERS - 1]).is_none());
    }
}
