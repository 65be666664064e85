//! Panes: what happened in one minute, per region and page.
//!
//! A pane is a set of dense columns behind interned keys, so that a row costs one look-up and a few additions. Tumbling and
//! sliding windows are both made of panes. All fields add up or unite, so panes merge in any order and in any division.
//! Left out: when a pane is closed, and what becomes of it.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasherDefault, Hasher},
};

use twox_hash::XxHash64;

use super::{
    distinct::Users,
    event::{EventType, Valid},
};

/// Page under which those beyond the limit of keys count; no path can be equal to it.
pub const OTHER_PAGES: &str = "(otras)";

/// The key is a hash already.
#[derive(Debug, Clone, Default)]
pub(super) struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&b| self.0 = self.0.rotate_left(8) ^ u64::from(b));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
    fn write_u128(&mut self, value: u128) {
        self.0 = value as u64;
    }
}

pub(super) type ByHash = BuildHasherDefault<Identity>;

/// Counts and money of one key. Money in cents.
#[derive(Debug, Clone, Default)]
pub struct Cell {
    /// Events of type click.
    pub clicks: u64,
    /// Events of type purchase.
    pub purchases: u64,
    /// Events of type add_to_cart.
    pub add_to_cart: u64,
    /// Events of any other type.
    pub other: u64,
    /// Sum of `monto` in cents.
    pub cents: i64,
    /// Distinct users.
    pub users: Users,
    /// How many rows were emitted for this key: the next revision.
    pub emitted: u32,
}

impl Cell {
    /// Adds another cell of the same key.
    pub fn merge(&mut self, other: &Cell, exact_max: usize) {
        self.clicks += other.clicks;
        self.purchases += other.purchases;
        self.add_to_cart += other.add_to_cart;
        self.other += other.other;
        self.cents = self.cents.saturating_add(other.cents);
        self.users.merge(&other.users, exact_max);
        self.emitted = self.emitted.saturating_add(other.emitted);
    }
    /// Events of any type.
    pub fn events(&self) -> u64 {
        self.clicks + self.purchases + self.add_to_cart + self.other
    }
}

/// Where the text of a key stands, and its hash.
#[derive(Debug, Clone, Copy)]
struct Key {
    hash: u64,
    at: usize,
    region: u32,
    page: u32,
}

/// One minute, per region and page.
#[derive(Debug, Clone, Default)]
pub struct Pane {
    /// Dense id of a key, by its hash; a colliding key takes the next free hash.
    ids: HashMap<u64, u32, ByHash>,
    keys: Vec<Key>,
    /// Region and page of each key, one behind the other: no allocation per key.
    text: String,
    cells: Vec<Cell>,
}

#[inline]
fn key_hash(region: &str, page: &str) -> u64 {
    // Regions are few and short: a fold is enough of a seed for the page's hash, and keys are compared anyway.
    let seed = region.bytes().fold(region.len() as u64, |seed, b| (seed ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01B3));
    XxHash64::oneshot(seed, page.as_bytes())
}

impl Pane {
    /// Number of keys.
    pub fn len(&self) -> usize {
        self.keys.len()
    }
    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    #[inline]
    fn key(&self, key: &Key) -> (&str, &str) {
        let text = &self.text[key.at..key.at + key.region as usize + key.page as usize];
        text.split_at(key.region as usize)
    }

    /// The id of a key, or the free place where it belongs.
    #[inline]
    fn place(&self, mut hash: u64, region: &str, page: &str) -> Result<u32, u64> {
        loop {
            let Some(&id) = self.ids.get(&hash) else { return Err(hash) };
            let key = &self.keys[id as usize];
            let same = (key.region as usize, key.page as usize) == (region.len(), page.len());
            if same && self.key(key) == (region, page) {
                return Ok(id);
            }
            hash = hash.wrapping_add(1);
        }
    }

    /// The id of a key, if it has one.
    pub fn find(&self, region: &str, page: &str) -> Option<u32> {
        self.place(key_hash(region, page), region, page).ok()
    }

    /// The id of a key; a new key is copied once.
    pub fn intern(&mut self, region: &str, page: &str) -> u32 {
        self.intern_hashed(key_hash(region, page), region, page)
    }

    #[inline]
    fn intern_hashed(&mut self, hash: u64, region: &str, page: &str) -> u32 {
        match self.place(hash, region, page) {
            Ok(id) => id,
            Err(free) => {
                let id = self.keys.len() as u32;
                self.ids.insert(free, id);
                self.keys.push(Key { hash, at: self.text.len(), region: region.len() as u32, page: page.len() as u32 });
                self.text.push_str(region);
                self.text.push_str(page);
                self.cells.push(Cell::default());
                id
            }
        }
    }

    /// Adds one event to a key.
    #[inline]
    pub fn add(&mut self, id: u32, event: &Valid<'_>, user: u64, exact_max: usize) {
        let cell = &mut self.cells[id as usize];
        match event.event_type {
            EventType::Click => cell.clicks += 1,
            EventType::Purchase => cell.purchases += 1,
            EventType::AddToCart => cell.add_to_cart += 1,
            EventType::Other => cell.other += 1,
        }
        cell.cents = cell.cents.saturating_add(event.cents);
        cell.users.insert(user, exact_max);
    }

    /// The cell of a key, made when it is not there.
    pub fn cell_mut(&mut self, region: &str, page: &str) -> &mut Cell {
        let id = self.intern(region, page);
        &mut self.cells[id as usize]
    }

    /// The cell of an id that [`Pane::intern`] gave.
    pub(super) fn cell_of(&mut self, id: u32) -> &mut Cell {
        &mut self.cells[id as usize]
    }

    /// The cell of a key.
    pub fn cell(&self, region: &str, page: &str) -> Option<&Cell> {
        self.find(region, page).map(|id| &self.cells[id as usize])
    }

    /// Adds another pane of the same minute.
    pub fn merge(&mut self, other: &Pane, exact_max: usize) {
        for (key, cell) in other.keys.iter().zip(&other.cells) {
            let (region, page) = other.key(key);
            let id = self.intern_hashed(key.hash, region, page);
            self.cells[id as usize].merge(cell, exact_max);
        }
    }

    /// Sorts in what the sets of users collected.
    pub fn settle(&mut self, exact_max: usize) {
        self.cells.iter_mut().for_each(|cell| cell.users.settle(exact_max));
    }

    /// Keys and cells, in the order in which the keys came.
    pub fn cells(&self) -> impl Iterator<Item = (&str, &str, &Cell)> {
        self.keys.iter().zip(&self.cells).map(|(key, cell)| {
            let (region, page) = self.key(key);
            (region, page, cell)
        })
    }

    /// Keys and cells, sorted by region and page.
    pub fn sorted(&self) -> Vec<(&str, &str, &Cell)> {
        let mut all: Vec<_> = self.cells().collect();
        all.sort_unstable_by_key(|&(region, page, _)| (region, page));
        all
    }

    /// Events of all keys.
    pub fn events(&self) -> u64 {
        self.cells.iter().map(Cell::events).sum()
    }
    /// Money of all keys in cents.
    pub fn cents(&self) -> i64 {
        self.cells.iter().fold(0, |sum, cell| sum.saturating_add(cell.cents))
    }
}

/// Rows emitted for a region's windows, and its cell over all pages.
#[derive(Debug, Clone, Default)]
pub struct RegionCell {
    /// All pages together. `emitted` counts rows of `region_1m`.
    pub cell: Cell,
    /// Rows of the sliding window that ends where this pane ends.
    pub emitted_sliding: u32,
}

/// A pane of the merge stage: the cells, and regions over all pages, which follow from the cells except for the number of
/// emitted rows.
#[derive(Debug, Clone, Default)]
pub struct MergedPane {
    /// Per region and page.
    pub pages: Pane,
    /// Per region.
    pub regions: BTreeMap<Box<str>, RegionCell>,
}

impl MergedPane {
    /// Adds a partial: its cells, and its regions from them.
    pub fn add(&mut self, partial: &Pane, exact_max: usize) {
        for (key, cell) in partial.keys.iter().zip(&partial.cells) {
            let (region, page) = partial.key(key);
            let id = self.pages.intern_hashed(key.hash, region, page);
            self.pages.cells[id as usize].merge(cell, exact_max);
            let total = &mut self.region_mut(region).cell;
            let emitted = total.emitted;
            total.merge(cell, exact_max);
            // The emitted rows of a page are no rows of its region.
            total.emitted = emitted;
        }
    }
    /// Adds another pane of the same minute, with its emitted rows.
    pub fn merge(&mut self, other: &MergedPane, exact_max: usize) {
        self.pages.merge(&other.pages, exact_max);
        for (name, theirs) in &other.regions {
            let mine = self.region_mut(name);
            mine.cell.merge(&theirs.cell, exact_max);
            mine.emitted_sliding = mine.emitted_sliding.saturating_add(theirs.emitted_sliding);
        }
    }
    /// The region's cell, made when it is not there.
    pub fn region_mut(&mut self, region: &str) -> &mut RegionCell {
        // Looked up by the text first, which a region that is there costs no copy.
        if !self.regions.contains_key(region) {
            self.regions.insert(region.into(), RegionCell::default());
        }
        match self.regions.get_mut(region) {
            Some(cell) => cell,
            None => unreachable!("it was put there"),
        }
    }
    /// Whether nothing was added and nothing emitted.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.regions.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::streaming::{
        config::{PANE_MS, pane_of},
        distinct::{UserCount, user_hash},
    };

    type Row = (u8, u8, u8, i64);

    fn pane(rows: &[Row], exact_max: usize) -> Pane {
        let mut pane = Pane::default();
        for &(key, kind, user, cents) in rows {
            let (region, page) = (format!("r{}", key % 3), format!("/{key}"));
            let user_id = format!("u{user}");
            let event_type =
                [EventType::Click, EventType::Purchase, EventType::AddToCart, EventType::Other][usize::from(kind % 4)];
            let event =
                Valid { user_id: &user_id, event_type, page: &page, region: &region, cents: cents % 10_000, timestamp_ms: 0 };
            let id = pane.intern(&region, &page);
            pane.add(id, &event, user_hash(&user_id), exact_max);
        }
        pane
    }

    type Sums = (u64, u64, u64, u64, i64, UserCount);

    fn sums(pane: &Pane, exact_max: usize) -> Vec<(String, String, Sums)> {
        let sum = |c: &Cell| (c.clicks, c.purchases, c.add_to_cart, c.other, c.cents, c.users.clone().count(exact_max));
        pane.sorted().into_iter().map(|(r, p, c)| (r.to_owned(), p.to_owned(), sum(c))).collect()
    }

    fn rows() -> impl Strategy<Value = Vec<Row>> {
        prop::collection::vec((0u8..12, any::<u8>(), 0u8..40, 0i64..10_000), 0..80)
    }

    proptest! {
        #[test]
        fn panes_partition_time(timestamp in 0i64..4_000_000_000_000) {
            let start = pane_of(timestamp);
            prop_assert!(start <= timestamp && timestamp < start + PANE_MS);
            prop_assert_eq!(start % PANE_MS, 0);
            prop_assert_eq!(pane_of(start), start);
            prop_assert_eq!(pane_of(start + PANE_MS - 1), start);
        }

        #[test]
        fn merging_is_associative_and_commutative(a in rows(), b in rows(), c in rows(), exact_max in 1usize..30) {
            let merge = |x: &Pane, y: &Pane| { let mut x = x.clone(); x.merge(y, exact_max); x };
            let (pa, pb, pc) = (pane(&a, exact_max), pane(&b, exact_max), pane(&c, exact_max));
            let left = merge(&merge(&pa, &pb), &pc);
            let right = merge(&pa, &merge(&pc, &pb));
            let whole = pane(&[a, b, c].concat(), exact_max);
            prop_assert_eq!(sums(&left, exact_max), sums(&right, exact_max));
            prop_assert_eq!(sums(&left, exact_max), sums(&whole, exact_max));
        }

        #[test]
        fn regions_are_the_sum_of_their_pages(a in rows(), b in rows(), exact_max in 1usize..30) {
            let mut merged = MergedPane::default();
            merged.add(&pane(&a, exact_max), exact_max);
            merged.add(&pane(&b, exact_max), exact_max);
            for (region, total) in &merged.regions {
                let mut sum = Cell::default();
                for (r, _, cell) in merged.pages.sorted() {
                    if r == &**region { sum.merge(cell, exact_max) }
                }
                prop_assert_eq!(sum.cents, total.cell.cents);
                prop_assert_eq!(sum.events(), total.cell.events());
                prop_assert_eq!(sum.users.count(exact_max), total.cell.users.clone().count(exact_max));
            }
        }
    }

    #[test]
    fn a_row_of_a_page_is_no_row_of_its_region() {
        let mut page = Pane::default();
        page.cell_mut("sur", "/").emitted = 3;
        let mut merged = MergedPane::default();
        merged.region_mut("sur").cell.emitted = 1;
        merged.add(&page, 10);
        assert_eq!((merged.pages.cell("sur", "/").unwrap().emitted, merged.regions["sur"].cell.emitted), (3, 1));
    }

    #[test]
    fn keys_with_equal_text_in_other_places_are_different() {
        let mut pane = Pane::default();
        let ids = [("a", "b"), ("ab", ""), ("", "ab"), ("a", "b")].map(|(r, p)| pane.intern(r, p));
        assert_eq!(ids, [0, 1, 2, 0]);
    }
}
