//! The events that all contenders read, and what must come out of them.
//!
//! Event `n` is a function of its number, so every size of a run is a prefix of the larger ones. Events are a little out of
//! order, none is late and none a duplicate: every system counts each of them once, whatever its rules for those are. The
//! expected windows are computed here the slow way, from the events and not from their bytes.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::File,
    io::{BufWriter, Write as _},
    path::Path,
};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use simulacro_core::avro::{CLICKS, Click, Row, RowEncoder};
use simulacro_core::streaming::window::{MetricRow, WindowKind};

use crate::Failure;

/// First event time: 2024-03-18T00:00:00Z, in milliseconds since 1970.
pub const START_MS: i64 = 1_710_720_000_000;
/// Id under which the schema of the events is registered.
pub const SCHEMA_ID: u32 = 1;
/// How far behind its place in the order an event's time can be, in milliseconds.
const JITTER_MS: u64 = 3_000;
const REGIONS: [&str; 5] = ["centro", "este", "norte", "oeste", "sur"];
const MINUTE_MS: i64 = 60_000;

/// What a stream of events is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of events.
    pub events: u64,
    /// Number of customers.
    pub users: u64,
    /// Number of products, each with a page of its own.
    pub products: u64,
    /// Events of one second of event time.
    pub per_second: u64,
    /// Partitions of the topic.
    pub partitions: u32,
}

/// SplitMix64 of a number: the same events each time, and no two columns alike.
pub fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Shape {
    /// Event `n`: nine of ten are clicks, three of a hundred purchases; few products have most of the clicks.
    pub fn click(&self, n: u64) -> (u32, Click) {
        let draw = |column: u64, bound: u64| mix(n * 8 + column) % bound;
        // Each user once in a round of all users: the same user never does the same thing twice at the same time.
        let user = n.wrapping_mul(7_919) % self.users;
        let behind = draw(1, JITTER_MS).min(n * 1_000 / self.per_second);
        let timestamp_ms = START_MS + (n * 1_000 / self.per_second - behind).cast_signed();
        // The cube of a share puts half of the draws on an eighth of the products.
        let share = u128::from(draw(2, 1 << 20));
        let product = (share * share * share * u128::from(self.products)) >> 60;
        let product_id = format!("P{product:05}");
        let (event_type, page, monto_cents) = match draw(3, 100) {
            0..3 => ("purchase", "/pago".to_owned(), 100 + draw(4, 49_900).cast_signed()),
            3..12 => ("add_to_cart", format!("/producto/{product_id}"), 0),
            12..30 => ("click", "/".to_owned(), 0),
            30..45 => ("click", format!("/categoria/{}", draw(5, 40)), 0),
            _ => ("click", format!("/producto/{product_id}"), 0),
        };
        let click = Click {
            user_id: format!("u-{user:07}"),
            event_type: event_type.to_owned(),
            product_id: page.starts_with("/p").then_some(product_id),
            page,
            monto_cents,
            region: REGIONS[(mix(user) % 5) as usize].to_owned(),
            timestamp_ms,
        };
        ((mix(user) >> 32) as u32 % self.partitions, click)
    }

    /// Where event time ends: the first whole minute behind the last event.
    pub fn end_ms(&self) -> i64 {
        let last = START_MS + (self.events * 1_000 / self.per_second).cast_signed();
        (last / MINUTE_MS + 1) * MINUTE_MS
    }

    /// The record that closes every window, of a type that no metric counts.
    pub fn heartbeat(&self) -> Click {
        Click {
            user_id: "heartbeat".to_owned(),
            event_type: "heartbeat".to_owned(),
            page: "/".to_owned(),
            product_id: None,
            monto_cents: 0,
            region: REGIONS[0].to_owned(),
            // Behind the last sliding window, by the bound of the watermark.
            timestamp_ms: self.end_ms() + 5 * MINUTE_MS + 30_000,
        }
    }
}

/// Sums over all windows of a kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sums {
    /// Windows and keys.
    pub rows: u64,
    /// Clicks.
    pub clicks: u64,
    /// Purchases.
    pub purchases: u64,
    /// Products put into the cart.
    pub add_to_cart: u64,
    /// Revenue in cents.
    pub cents: i64,
    /// Distinct users of each row, added up.
    pub users: u64,
}

/// Sums by kind of window.
pub type Summary = BTreeMap<String, Sums>;

/// The sums of what the job wrote: of each row its newest revision.
pub fn summary(rows: &[MetricRow]) -> Summary {
    let mut newest: HashMap<_, &MetricRow> = HashMap::new();
    for row in rows {
        let known = newest.entry((row.window_kind, row.window_start_ms, &row.region, &row.page)).or_insert(row);
        if known.revision < row.revision {
            *known = row;
        }
    }
    let mut sums = Summary::new();
    for row in newest.into_values() {
        let of = sums.entry(row.window_kind.name().to_owned()).or_default();
        of.rows += 1;
        of.clicks += row.clicks;
        of.purchases += row.purchases;
        of.add_to_cart += row.add_to_cart;
        of.cents += row.revenue_cents;
        of.users += row.unique_users;
    }
    sums
}

/// Kind, start in milliseconds, region and page.
type Window = (WindowKind, i64, String, String);

/// The same, computed in the slowest and plainest way.
#[derive(Debug, Default)]
pub struct Oracle {
    cells: HashMap<Window, (Sums, HashSet<String>)>,
}

impl Oracle {
    /// Counts one event in its windows.
    pub fn add(&mut self, click: &Click) {
        let minute = click.timestamp_ms / MINUTE_MS * MINUTE_MS;
        let page = (WindowKind::Page1m, minute, click.region.clone(), click.page.clone());
        let region = (WindowKind::Region1m, minute, click.region.clone(), String::new());
        let sliding = (0..5).map(|back| (WindowKind::Region5m, minute - back * MINUTE_MS, click.region.clone(), String::new()));
        for key in [page, region].into_iter().chain(sliding) {
            let (sums, users) = self.cells.entry(key).or_default();
            match click.event_type.as_str() {
                "click" => sums.clicks += 1,
                "purchase" => sums.purchases += 1,
                _ => sums.add_to_cart += 1,
            }
            sums.cents += click.monto_cents;
            if !users.contains(&click.user_id) {
                users.insert(click.user_id.clone());
            }
        }
    }

    /// The sums.
    pub fn summary(&self) -> Summary {
        let mut all = Summary::new();
        for ((kind, ..), (sums, users)) in &self.cells {
            let of = all.entry(kind.name().to_owned()).or_default();
            of.rows += 1;
            of.clicks += sums.clicks;
            of.purchases += sums.purchases;
            of.add_to_cart += sums.add_to_cart;
            of.cents += sums.cents;
            of.users += users.len() as u64;
        }
        all
    }
}

/// Says where a summary differs from what is expected. Counts of users may be estimates: 2 % of their sum are allowed.
pub fn difference(found: &Summary, expected: &Summary) -> Option<String> {
    for (kind, expected) in expected {
        let Some(found) = found.get(kind) else { return Some(format!("{kind}: found no rows, expected {}", expected.rows)) };
        let exact = Sums { users: 0, ..*expected } == Sums { users: 0, ..*found };
        let near = found.users.abs_diff(expected.users) * 50 <= expected.users;
        if !exact || !near {
            return Some(format!("{kind}: found {found:?}, expected {expected:?}"));
        }
    }
    None
}

/// Makes the files of a run: `clicks.bin` for programs that take a record at a time, `clicks.avro` for those that read Avro's
/// files, `heartbeats.bin`, `shape.json` and `expected.json`.
///
/// A record of a `.bin` file is its partition and its length (little endian, 32 bits each) and the bytes of a topic.
pub fn make(shape: Shape, folder: &Path) -> Result<(), Failure> {
    const PIECE: u64 = 50_000;
    std::fs::create_dir_all(folder)?;
    let create = |name: &str| File::create(folder.join(name)).map(|file| BufWriter::with_capacity(1 << 20, file));
    let mut encoder = RowEncoder::<Click>::with_id(SCHEMA_ID)?;
    let mut framed = create("clicks.bin")?;
    let schema = [("avro.schema".to_owned(), CLICKS.to_owned())].into();
    let arrow = simulacro_core::avro::rows::arrow_schema::<Click>()?;
    let arrow = arrow::datatypes::Schema::new_with_metadata(arrow.fields().clone(), schema);
    let mut container = arrow_avro::writer::AvroWriter::new(create("clicks.avro")?, arrow)?;
    let mut oracle = Oracle::default();
    let frame = |file: &mut BufWriter<File>, partition: u32, value: &Bytes| {
        file.write_all(&partition.to_le_bytes())?;
        file.write_all(&(value.len() as u32).to_le_bytes())?;
        file.write_all(value)
    };
    for first in (0..shape.events).step_by(PIECE as usize) {
        let piece: Vec<(u32, Click)> = (first..(first + PIECE).min(shape.events)).map(|n| shape.click(n)).collect();
        let (partitions, clicks): (Vec<u32>, Vec<Click>) = piece.into_iter().unzip();
        clicks.iter().for_each(|click| oracle.add(click));
        container.write(&Click::to_batch(&clicks)?)?;
        for (partition, value) in partitions.iter().zip(encoder.encode_rows(&clicks)?) {
            frame(&mut framed, *partition, &value)?;
        }
    }
    container.finish()?;
    framed.flush()?;
    let mut heartbeats = create("heartbeats.bin")?;
    let value = encoder.encode_rows(&[shape.heartbeat()])?.remove(0);
    for partition in 0..shape.partitions {
        frame(&mut heartbeats, partition, &value)?;
    }
    heartbeats.flush()?;
    std::fs::write(folder.join("shape.json"), serde_json::to_vec_pretty(&shape)?)?;
    std::fs::write(folder.join("expected.json"), serde_json::to_vec_pretty(&oracle.summary())?)?;
    Ok(())
}

/// One record of an input.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    at: usize,
    length: u32,
}

/// The records of a run, by partition, in memory.
#[derive(Debug)]
pub struct Input {
    bytes: Bytes,
    /// Where each record stands, in order of offset.
    pub partitions: Vec<Vec<Span>>,
    /// What they are.
    pub shape: Shape,
}

impl Input {
    /// Reads what [`make`] has written; the heartbeats follow the events.
    pub fn read(folder: &Path) -> Result<Self, Failure> {
        let shape: Shape = serde_json::from_slice(&std::fs::read(folder.join("shape.json"))?)?;
        let mut bytes = std::fs::read(folder.join("clicks.bin"))?;
        bytes.extend(std::fs::read(folder.join("heartbeats.bin"))?);
        let mut partitions = vec![Vec::new(); shape.partitions as usize];
        let mut at = 0;
        let word = |at: usize| bytes.get(at..at + 4).and_then(|w| w.try_into().ok()).map(u32::from_le_bytes);
        while let (Some(partition), Some(length)) = (word(at), word(at + 4)) {
            partitions[partition as usize].push(Span { at: at + 8, length });
            at += 8 + length as usize;
        }
        if at != bytes.len() {
            return Err(format!("read {}: found a record that is cut off at byte {at}", folder.display()).into());
        }
        Ok(Self { bytes: bytes.into(), partitions, shape })
    }

    /// The bytes of a record.
    pub fn record(&self, span: Span) -> &[u8] {
        &self.bytes[span.at..span.at + span.length as usize]
    }

    /// The bytes of a record, shared.
    pub fn shared(&self, span: Span) -> Bytes {
        self.bytes.slice(span.at..span.at + span.length as usize)
    }

    /// Events in all partitions, without the heartbeats.
    pub fn events(&self) -> impl Iterator<Item = Span> + '_ {
        self.partitions.iter().flat_map(|all| all[..all.len() - 1].iter().copied())
    }
}
