//! Contenders of the benchmark in this language: the limit, and a plain use of the crates.
//!
//! The limit is what cannot be left out: every field is read where it stands, a user and a page are hashed once, one table is
//! asked, and numbers are added. It keeps no state that survives anything, recognises no duplicate, judges nothing and writes
//! nothing, so no job can be as fast. The plain use is what one writes first: arrow-avro decodes batches, each row becomes a
//! value of its own, and standard maps count it.

use arrow_avro::{
    reader::ReaderBuilder,
    schema::{AvroSchema, Fingerprint, FingerprintAlgorithm, SchemaStore},
};
use simulacro_core::{
    avro::{CLICKS, Click, Row, decode::HEADER_BYTES},
    streaming::distinct::user_hash,
};

use crate::{
    Failure,
    events::{Input, Oracle, SCHEMA_ID, START_MS, Summary, Sums},
};

/// Most fields of a record that this reads without looking further.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn long(&mut self) -> i64 {
        let (mut value, mut shift) = (0_u64, 0);
        while let Some((&byte, rest)) = self.0.split_first() {
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                break;
            }
        }
        (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
    }
    fn bytes(&mut self) -> &'a [u8] {
        let length = self.long() as usize;
        let (bytes, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        bytes
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    key: u64,
    clicks: u64,
    purchases: u64,
    add_to_cart: u64,
    cents: i64,
}

/// Minutes that are added up side by side.
const MINUTES: usize = 4;
/// Cells of a minute, a power of two above the number of keys.
const CELLS: usize = 1 << 17;

/// One minute: cells by key, and a sketch of users per region.
struct Minute {
    number: i64,
    cells: Vec<Cell>,
    registers: Vec<[u8; 1 << 14]>,
}

impl Minute {
    fn sums(&mut self, into: &mut Sums) {
        for cell in self.cells.iter_mut().filter(|cell| cell.key != 0) {
            into.rows += 1;
            into.clicks += cell.clicks;
            into.purchases += cell.purchases;
            into.add_to_cart += cell.add_to_cart;
            into.cents += cell.cents;
            *cell = Cell::default();
        }
        self.registers.iter_mut().for_each(|all| all.fill(0));
    }
}

/// The limit. The sums of users are not computed.
pub fn limit(input: &Input) -> Summary {
    let mut sums = Sums::default();
    for partition in &input.partitions {
        let new = || Minute { number: -1, cells: vec![Cell::default(); CELLS], registers: vec![[0; 1 << 14]; 8] };
        let mut minutes: Vec<Minute> = (0..MINUTES).map(|_| new()).collect();
        for &span in &partition[..partition.len() - 1] {
            let mut fields = Fields(&input.record(span)[HEADER_BYTES..]);
            let (user, event_type, page) = (fields.bytes(), fields.bytes(), fields.bytes());
            if fields.long() == 1 {
                fields.bytes();
            }
            let cents = fields.bytes().iter().fold(0_i64, |value, byte| value << 8 | i64::from(*byte));
            let region = fields.bytes();
            let number = (fields.long() - START_MS) / 60_000;
            let minute = &mut minutes[number as usize % MINUTES];
            if minute.number != number {
                minute.sums(&mut sums);
                minute.number = number;
            }
            let hash = |bytes: &[u8]| user_hash(std::str::from_utf8(bytes).unwrap_or_default());
            let place = region.first().copied().unwrap_or(0);
            let key = hash(page) ^ u64::from(place) << 1 | 1;
            let mut at = key as usize % CELLS;
            while minute.cells[at].key != key && minute.cells[at].key != 0 {
                at = (at + 1) % CELLS;
            }
            let cell = &mut minute.cells[at];
            cell.key = key;
            match event_type.first() {
                Some(b'c') => cell.clicks += 1,
                Some(b'p') => cell.purchases += 1,
                _ => cell.add_to_cart += 1,
            }
            cell.cents += cents;
            let user = hash(user);
            let register = &mut minute.registers[usize::from(place % 8)][(user >> 50) as usize];
            *register = (*register).max((user << 14).leading_zeros() as u8 + 1);
        }
        minutes.iter_mut().for_each(|minute| minute.sums(&mut sums));
    }
    [("page_1m".to_owned(), sums)].into()
}

/// The plain use of the crates.
pub fn plain(input: &Input) -> Result<Summary, Failure> {
    let mut store = SchemaStore::new_with_type(FingerprintAlgorithm::Id);
    store.set(Fingerprint::Id(SCHEMA_ID), AvroSchema::new(CLICKS.into()))?;
    let mut decoder = ReaderBuilder::new()
        .with_batch_size(1_024)
        .with_reader_schema(AvroSchema::new(CLICKS.into()))
        .with_writer_schema_store(store)
        .with_active_fingerprint(Fingerprint::Id(SCHEMA_ID))
        .build_decoder()?;
    let mut oracle = Oracle::default();
    let mut count = |decoder: &mut arrow_avro::reader::Decoder| -> Result<(), Failure> {
        if let Some(batch) = decoder.flush()? {
            Click::from_batch(&batch)?.iter().for_each(|click| oracle.add(click));
        }
        Ok(())
    };
    for span in input.events() {
        decoder.decode(input.record(span))?;
        if decoder.batch_is_full() {
            count(&mut decoder)?;
        }
    }
    count(&mut decoder)?;
    Ok(oracle.summary())
}
