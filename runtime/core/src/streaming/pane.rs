//! Panes: what happened in one minute, per region and page.
//!
//! A pane is a set of dense columns behind interned keys, so that a row costs one look-up and a few additions. Tumbling and
//! sliding windows are both made of panes. All fields add up or unite, so panes merge in any order and in any division.
//! An open pane keeps what was added since the last commit beside the rest, behind the same keys. Left out: when a pane is
//! closed, and what becomes of it.

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
    /// Adds one event.
    #[inline]
    fn count(&mut self, event: &Valid<'_>, user: u64, exact_max: usize) {
        match event.event_type {
            EventType::Click => self.clicks += 1,
            EventType::Purchase => self.purchases += 1,
            EventType::AddToCart => self.add_to_cart += 1,
            EventType::Other => self.other += 1,
        }
        self.cents = self.cents.saturating_add(event.cents);
        self.users.insert(user, exact_max);
    }
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

/// What a look-up needs: the id of a key, and where its text stands. Without the hash, which led here.
#[derive(Debug, Clone, Copy)]
struct Found {
    at: usize,
    id: u32,
    region: u32,
    page: u32,
}

/// One minute, per region and page.
#[derive(Debug, Clone, Default)]
pub struct Pane {
    /// Dense id of a key, by its hash; a colliding key takes the next free hash.
    ids: HashMap<u64, Found, ByHash>,
    keys: Vec<Key>,
    /// Region and page of each key, one behind the other: no allocation per key.
    text: String,
    cells: Vec<Cell>,
}

/// Whether two texts of one length are equal. Most are short: two blocks that overlap are a few instructions, where a comparison
/// of any length is a call.
#[inline]
fn same(a: &[u8], b: &[u8]) -> bool {
    let block = |from: &[u8], at: usize| from.get(at..at + 8).and_then(|block| block.try_into().ok()).map(u64::from_le_bytes);
    match a.len() {
        8..=16 => (block(a, 0), block(a, a.len() - 8)) == (block(b, 0), block(b, b.len() - 8)),
        _ => a == b,
    }
}

/// Hash of a key, for [`OpenPane::find_hashed`]; no part of any stored format.
#[inline]
pub(super) fn key_hash(region: &str, page: &str) -> u64 {
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

    /// An empty pane with room for as much as another has.
    fn like(other: &Self) -> Self {
        let keys = other.keys.len();
        Self {
            ids: HashMap::with_capacity_and_hasher(keys, ByHash::default()),
            keys: Vec::with_capacity(keys),
            text: String::with_capacity(other.text.len()),
            cells: Vec::with_capacity(keys),
        }
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
            let Some(found) = self.ids.get(&hash) else { return Err(hash) };
            if (found.region as usize, found.page as usize) == (region.len(), page.len()) {
                let text = &self.text.as_bytes()[found.at..found.at + region.len() + page.len()];
                let (its_region, its_page) = text.split_at(region.len());
                if same(its_page, page.as_bytes()) && same(its_region, region.as_bytes()) {
                    return Ok(found.id);
                }
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
                let (id, at) = (self.keys.len() as u32, self.text.len());
                let lengths = (region.len() as u32, page.len() as u32);
                self.ids.insert(free, Found { at, id, region: lengths.0, page: lengths.1 });
                self.keys.push(Key { hash, at, region: lengths.0, page: lengths.1 });
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
        self.cells[id as usize].count(event, user, exact_max);
    }

    /// Forgets all keys from the `keys`-th on, newest first: a key whose hash collided stands behind older ones.
    fn truncate(&mut self, keys: usize) {
        while self.keys.len() > keys
            && let Some(key) = self.keys.pop()
        {
            let (id, mut hash) = (self.keys.len() as u32, key.hash);
            while self.ids.get(&hash).is_some_and(|found| found.id != id) {
                hash = hash.wrapping_add(1);
            }
            self.ids.remove(&hash);
            self.text.truncate(key.at);
            self.cells.pop();
        }
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

/// A pane that is added to: what was committed, and beside it what was added since.
///
/// Both have the same keys, so an event costs one look-up, a commit none, and a rollback takes out what came since.
#[derive(Debug, Clone, Default)]
pub struct OpenPane {
    /// Keys of both, and the cells that were committed; those of keys that came since are empty.
    held: Pane,
    /// Keys that were committed.
    committed: usize,
    /// For each key, one more than the place of its addition in `added`; 0 where there is none.
    places: Vec<u32>,
    /// Keys with an addition, in the order in which they came.
    touched: Vec<u32>,
    /// Their additions.
    added: Vec<Cell>,
}

impl OpenPane {
    /// An empty pane with room for as much as another has: minutes that follow each other are alike.
    pub fn like(other: &Self) -> Self {
        Self { held: Pane::like(&other.held), places: Vec::with_capacity(other.places.len()), ..Self::default() }
    }
    /// Number of keys, those that came since the last commit included.
    pub fn len(&self) -> usize {
        self.held.len()
    }
    /// Whether nothing was ever added.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
    /// Whether anything was added since the last commit.
    pub fn has_additions(&self) -> bool {
        !self.touched.is_empty()
    }

    /// The id of a key, if it has one. `hash` is that of [`key_hash`].
    #[inline]
    pub(super) fn find_hashed(&self, hash: u64, region: &str, page: &str) -> Option<u32> {
        self.held.place(hash, region, page).ok()
    }

    /// Something of the addition of a key, or any number: asking for it brings the addition nearer, and nobody waits for it.
    #[inline]
    pub(super) fn near(&self, id: u32) -> u64 {
        let place = self.places[id as usize] as usize;
        // Its first and its last field: a cell is on two lines.
        self.added.get(place.wrapping_sub(1)).map_or(0, |cell| cell.clicks ^ u64::from(cell.emitted))
    }

    /// The id of a key; a new key is copied once. `hash` is that of [`key_hash`].
    pub(super) fn intern_hashed(&mut self, hash: u64, region: &str, page: &str) -> u32 {
        let id = self.held.intern_hashed(hash, region, page);
        self.places.resize(self.held.len(), 0);
        id
    }

    /// Adds one event to a key.
    #[inline]
    pub fn add(&mut self, id: u32, event: &Valid<'_>, user: u64, exact_max: usize) {
        let place = &mut self.places[id as usize];
        if *place == 0 {
            self.touched.push(id);
            self.added.push(Cell::default());
            *place = self.added.len() as u32;
        }
        self.added[*place as usize - 1].count(event, user, exact_max);
    }

    /// Adds what was committed before, when state is restored.
    pub fn restore(&mut self, pane: &Pane, exact_max: usize) {
        self.held.merge(pane, exact_max);
        self.committed = self.held.len();
        self.places.resize(self.committed, 0);
    }

    /// Sorts in what the additions' sets of users collected.
    pub fn settle_additions(&mut self, exact_max: usize) {
        self.added.iter_mut().for_each(|cell| cell.users.settle(exact_max));
    }

    /// What was added since the last commit, in the order in which its keys came.
    pub fn additions(&self) -> impl Iterator<Item = (&str, &str, &Cell)> {
        self.touched.iter().zip(&self.added).map(|(&id, cell)| {
            let (region, page) = self.held.key(&self.held.keys[id as usize]);
            (region, page, cell)
        })
    }

    /// The cells that have additions as a commit will leave them, settled, in the order of [`OpenPane::additions`]; the
    /// others are settled in their place. Changes nothing that can be told.
    pub fn merged(&mut self, exact_max: usize) -> Vec<Cell> {
        self.held.settle(exact_max);
        let merge = |(&id, added): (&u32, &Cell)| {
            let mut cell = self.held.cells[id as usize].clone();
            cell.merge(added, exact_max);
            cell.users.settle(exact_max);
            cell
        };
        self.touched.iter().zip(&self.added).map(merge).collect()
    }

    /// Keys and cells as a commit will leave them, in the order in which the keys came; `merged` is what
    /// [`OpenPane::merged`] gave.
    pub fn whole<'a>(&'a self, merged: &'a [Cell]) -> impl Iterator<Item = (&'a str, &'a str, &'a Cell)> {
        self.held.cells().zip(&self.places).map(|((region, page, held), &place)| {
            let cell = if place == 0 { held } else { &merged[place as usize - 1] };
            (region, page, cell)
        })
    }

    /// Makes the additions committed.
    pub fn commit(&mut self, exact_max: usize) {
        for (id, cell) in self.touched.drain(..).zip(self.added.drain(..)) {
            self.places[id as usize] = 0;
            let held = &mut self.held.cells[id as usize];
            // A new key's cell is empty: it becomes its addition.
            if id as usize >= self.committed { *held = cell } else { held.merge(&cell, exact_max) }
        }
        self.committed = self.held.len();
    }

    /// Forgets what was added since the last commit, new keys included.
    pub fn rollback(&mut self) {
        self.touched.drain(..).for_each(|id| self.places[id as usize] = 0);
        self.added.clear();
        self.held.truncate(self.committed);
        self.places.truncate(self.committed);
    }

    /// What was committed, settled.
    pub fn committed(&self, exact_max: usize) -> Pane {
        let mut pane = self.held.clone();
        pane.truncate(self.committed);
        pane.settle(exact_max);
        pane
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
    /// A pane of these cells, with its regions from them.
    pub fn of(pages: Pane, exact_max: usize) -> Self {
        let mut merged = Self::default();
        pages.cells().for_each(|(region, _, cell)| merged.add_to_region(region, cell, exact_max));
        Self { pages, ..merged }
    }
    fn add_to_region(&mut self, region: &str, cell: &Cell, exact_max: usize) {
        let total = &mut self.region_mut(region).cell;
        let emitted = total.emitted;
        total.merge(cell, exact_max);
        // The emitted rows of a page are no rows of its region.
        total.emitted = emitted;
    }
    /// Adds a partial: its cells, and its regions from them.
    pub fn add(&mut self, partial: &Pane, exact_max: usize) {
        for (key, cell) in partial.keys.iter().zip(&partial.cells) {
            let (region, page) = partial.key(key);
            let id = self.pages.intern_hashed(key.hash, region, page);
            self.pages.cells[id as usize].merge(cell, exact_max);
            self.add_to_region(region, cell, exact_max);
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

        /// Hashes are of one bit here, so that keys collide.
        #[test]
        fn an_open_pane_is_what_was_committed_and_what_was_added_since(
            steps in prop::collection::vec((any::<Row>(), 0u8..8), 0..120), exact_max in 1usize..30,
        ) {
            let (mut open, mut committed, mut since) = (OpenPane::default(), Vec::new(), Vec::new());
            for &((key, kind, user, cents), step) in &steps {
                match step {
                    0 => { open.commit(exact_max); committed.append(&mut since) }
                    1 => { open.rollback(); since.clear() }
                    _ => {
                        let row = (key % 24, kind, user % 40, cents % 10_000);
                        since.push(row);
                        let (region, page, user_id) = (format!("r{}", row.0 % 3), format!("/{}", row.0), format!("u{}", row.2));
                        let event_type =
                            [EventType::Click, EventType::Purchase, EventType::AddToCart, EventType::Other][usize::from(kind % 4)];
                        let event = Valid { user_id: &user_id, event_type, page: &page, region: &region, cents: row.3, timestamp_ms: 0 };
                        let hash = u64::from(row.0 % 2);
                        let found = open.find_hashed(hash, &region, &page);
                        let id = open.intern_hashed(hash, &region, &page);
                        prop_assert!(found.is_none_or(|found| found == id));
                        open.add(id, &event, user_hash(&user_id), exact_max);
                    }
                }
            }
            let own = |cells: &mut dyn Iterator<Item = (&str, &str, &Cell)>| {
                let mut pane = Pane::default();
                cells.for_each(|(region, page, cell)| pane.cell_mut(region, page).merge(cell, exact_max));
                sums(&pane, exact_max)
            };
            let all = pane(&[&*committed, &*since].concat(), exact_max);
            prop_assert_eq!(open.len(), all.len());
            prop_assert_eq!(sums(&open.committed(exact_max), exact_max), sums(&pane(&committed, exact_max), exact_max));
            prop_assert_eq!(own(&mut open.additions()), sums(&pane(&since, exact_max), exact_max));
            let merged = open.merged(exact_max);
            prop_assert_eq!(own(&mut open.whole(&merged)), sums(&all, exact_max));
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
