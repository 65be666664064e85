//! What the codec promises, for any bytes, with arrow-avro as the oracle for valid ones.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow_avro::{
    reader::ReaderBuilder,
    schema::{AvroSchema, Fingerprint, FingerprintAlgorithm, SchemaStore},
};
use bytes::Bytes;
use proptest::prelude::*;

use super::{
    decode::{Decoder, header},
    memory::MemoryRegistry,
    *,
};

const LIMITS: Limits = Limits { record_bytes_max: 1 << 16 };

fn click(i: i64) -> Click {
    Click {
        user_id: format!("u{i}"),
        event_type: if i % 3 == 0 { "purchase" } else { "click" }.into(),
        page: "/niño".into(),
        product_id: (i % 2 == 0).then(|| format!("p{i}")),
        monto_cents: if i % 3 == 0 { 1999 + i } else { 0 },
        region: "norte".into(),
        timestamp_ms: 1_710_720_000_000 + i,
    }
}

fn encoded(rows: &[Click], id: u32) -> Vec<Option<Bytes>> {
    let mut encoder = RowEncoder::<Click>::with_id(id).expect("the shipped schema has columns");
    encoder.encode_rows(rows).expect("rows are encoded").into_iter().map(Some).collect()
}

fn decoder(reader: &str, writers: &[(u32, &str)]) -> Decoder {
    let mut decoder = Decoder::new(reader, LIMITS).expect("the reader's schema has columns");
    writers.iter().for_each(|(id, text)| decoder.learn(*id, text));
    decoder
}

/// What arrow-avro makes of records that are all valid and of one writer.
fn oracle(reader: &str, writer: &str, id: u32, records: &[Option<Bytes>]) -> RecordBatch {
    let mut store = SchemaStore::new_with_type(FingerprintAlgorithm::Id);
    store.set(Fingerprint::Id(id), AvroSchema::new(writer.into())).expect("the writer's schema");
    let mut decoder = ReaderBuilder::new()
        .with_batch_size(records.len() + 1)
        .with_reader_schema(AvroSchema::new(reader.into()))
        .with_writer_schema_store(store)
        .with_active_fingerprint(Fingerprint::Id(id))
        .build_decoder()
        .expect("arrow-avro resolves the schemas");
    for record in records.iter().flatten() {
        assert_eq!(decoder.decode(record).expect("arrow-avro decodes a valid record"), record.len());
    }
    decoder.flush().expect("arrow-avro builds the batch").expect("there are rows")
}

fn same_columns(ours: &RecordBatch, theirs: &RecordBatch) {
    assert_eq!(ours.num_columns(), theirs.num_columns());
    for ((a, b), (x, y)) in
        ours.schema().fields().iter().zip(theirs.schema().fields()).zip(ours.columns().iter().zip(theirs.columns()))
    {
        assert_eq!((a.name(), a.data_type()), (b.name(), b.data_type()));
        assert_eq!(x.as_ref(), y.as_ref(), "{}", a.name());
    }
}

fn arbitrary_click() -> impl Strategy<Value = Click> {
    let limit = 10_i64.pow(12) - 1;
    ("\\PC{0,9}", "\\PC{0,9}", "\\PC{0,9}", prop::option::of("\\PC{0,9}"), -limit..=limit, "\\PC{0,9}", any::<i64>()).prop_map(
        |(user_id, event_type, page, product_id, monto_cents, region, timestamp_ms)| Click {
            user_id,
            event_type,
            page,
            product_id,
            monto_cents,
            region,
            timestamp_ms,
        },
    )
}

fn arbitrary_metrica() -> impl Strategy<Value = MetricaRealtime> {
    let limit = 10_i64.pow(12) - 1;
    let texts = ("\\PC{0,9}", "\\PC{0,9}", prop::option::of("\\PC{0,9}"));
    let numbers = prop::array::uniform7(any::<i64>());
    (texts, numbers, -limit..=limit, prop::option::of(0.0..1.0_f64), any::<bool>()).prop_map(
        |((window_kind, region, page), n, revenue_cents, conversion_rate, exact)| MetricaRealtime {
            window_kind,
            window_start_ms: n[0],
            window_end_ms: n[1],
            region,
            page,
            clicks: n[2],
            purchases: n[3],
            add_to_cart: n[4],
            revenue_cents,
            conversion_rate,
            unique_users: n[5],
            revision: n[6],
            exact,
        },
    )
}

/// A schema with every kind of type, half of which the reader does not ask for.
const RICH: &str = r#"{"type":"record","name":"R","fields":[
    {"name":"a","type":{"type":"array","items":["null","string",{"type":"map","values":"long"}]}},
    {"name":"b","type":["null",{"type":"record","name":"Next","fields":[{"name":"next","type":["null","Next"]},{"name":"n","type":"null"}]}]},
    {"name":"e","type":{"type":"enum","name":"E","symbols":["X","Y","Z"]}},
    {"name":"f","type":{"type":"fixed","name":"F","size":3}},
    {"name":"i","type":["int","null"]},
    {"name":"t","type":["string","int"]},
    {"name":"x","type":"float"},
    {"name":"k","type":"boolean"}]}"#;
const RICH_READER: &str = r#"{"type":"record","name":"R","fields":[
    {"name":"i","type":["null","double"]},
    {"name":"e","type":{"type":"enum","name":"E","symbols":["Y","O"],"default":"O"}},
    {"name":"f","type":{"type":"fixed","name":"F","size":3}},
    {"name":"x","type":"double"},
    {"name":"new","type":"string","default":"none"}]}"#;

proptest! {
    #[test]
    fn clicks_come_back_as_they_went_and_as_the_oracle_sees_them(rows in prop::collection::vec(arbitrary_click(), 1..20)) {
        let records = encoded(&rows, 7);
        let decoded = decoder(CLICKS, &[(7, CLICKS)]).decode_known(&records).expect("a small batch");
        prop_assert!(decoded.rejects.is_empty());
        same_columns(&decoded.batch, &oracle(CLICKS, CLICKS, 7, &records));
        prop_assert_eq!(Click::from_batch(&decoded.batch).expect("typed columns"), rows);
    }

    #[test]
    fn metricas_come_back_as_they_went_and_as_the_oracle_sees_them(rows in prop::collection::vec(arbitrary_metrica(), 1..9)) {
        let mut encoder = RowEncoder::<MetricaRealtime>::with_id(9).expect("the shipped schema has columns");
        let records: Vec<_> = encoder.encode_rows(&rows).expect("rows are encoded").into_iter().map(Some).collect();
        let decoded = decoder(METRICAS_REALTIME, &[(9, METRICAS_REALTIME)]).decode_known(&records).expect("a small batch");
        prop_assert!(decoded.rejects.is_empty());
        same_columns(&decoded.batch, &oracle(METRICAS_REALTIME, METRICAS_REALTIME, 9, &records));
        prop_assert_eq!(MetricaRealtime::from_batch(&decoded.batch).expect("typed columns"), rows);
    }

    /// Bytes flipped, cut, inserted and repeated anywhere: each record has one fate, and a neighbour is never touched.
    #[test]
    fn mutated_records_never_harm_their_neighbours(
        rows in prop::collection::vec(arbitrary_click(), 1..8),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0_u8..4, any::<u8>()), 0..12),
    ) {
        let clean = encoded(&rows, 7);
        let mut records = clean.clone();
        for (which, place, kind, byte) in changes {
            let i = which.index(records.len());
            let mut bytes = records[i].take().map(|r| r.to_vec()).unwrap_or_default();
            let at = if bytes.is_empty() { 0 } else { place.index(bytes.len()) };
            match kind {
                0 if !bytes.is_empty() => bytes[at] = byte,
                1 => bytes.truncate(at),
                2 => bytes.insert(at, byte),
                _ => bytes.extend_from_within(at..),
            }
            records[i] = Some(bytes.into());
        }
        let decoded = decoder(CLICKS, &[(7, CLICKS)]).decode_known(&records).expect("a small batch");
        let mut fates: Vec<u32> = decoded.rows.iter().copied().chain(decoded.rejects.iter().map(|r| r.index)).collect();
        fates.sort_unstable();
        prop_assert_eq!(fates, (0..records.len() as u32).collect::<Vec<_>>());
        prop_assert_eq!(decoded.batch.num_rows(), decoded.rows.len());
        let back = Click::from_batch(&decoded.batch).expect("typed columns");
        for (row, index) in back.iter().zip(&decoded.rows) {
            let index = *index as usize;
            if records[index] == clean[index] {
                prop_assert_eq!(row, &rows[index]);
            }
            // What was accepted is what its bytes say: encoded again it decodes to the same.
            let again = decoder(CLICKS, &[(7, CLICKS)]).decode_known(&encoded(std::slice::from_ref(row), 7)).expect("a small batch");
            prop_assert_eq!(&Click::from_batch(&again.batch).expect("typed columns")[0], row);
        }
        for reject in &decoded.rejects {
            prop_assert_ne!(&records[reject.index as usize], &clean[reject.index as usize]);
        }
    }

    /// Any bytes behind a valid header, against schemas with every type: an answer, soon, without a panic.
    #[test]
    fn any_bytes_are_decoded_or_rejected(bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..20), whole: bool) {
        let records: Vec<_> = bodies.into_iter().map(|b| Some(if whole { b.into() } else { [&[0, 0, 0, 0, 3][..], &b].concat().into() })).collect();
        let decoded = decoder(RICH_READER, &[(3, RICH)]).decode_known(&records).expect("a small batch");
        prop_assert_eq!(decoded.rows.len() + decoded.rejects.len(), records.len());
        prop_assert!(decoded.batch.columns().iter().all(|c| c.len() == decoded.rows.len()));
    }

    /// Small numbers are lengths, indices and counts: bytes made of them get far into a record, and some are valid.
    #[test]
    fn plausible_bytes_are_what_the_oracle_says_or_rejected(
        bodies in prop::collection::vec(prop::collection::vec(prop_oneof![4 => Just(0_u8), 4 => Just(2), 1 => 3..9_u8], 7..16), 1..40),
    ) {
        let records: Vec<Option<Bytes>> = bodies.iter().map(|b| Some([&[0, 0, 0, 0, 3][..], b].concat().into())).collect();
        let rich = decoder(RICH_READER, &[(3, RICH)]).decode_known(&records).expect("a small batch");
        prop_assert_eq!(rich.rows.len() + rich.rejects.len(), records.len());
        let decoded = decoder(CLICKS, &[(3, CLICKS)]).decode_known(&records).expect("a small batch");
        let accepted: Vec<_> = decoded.rows.iter().map(|i| records[*i as usize].clone()).collect();
        if !accepted.is_empty() {
            same_columns(&decoded.batch, &oracle(CLICKS, CLICKS, 3, &accepted));
        }
    }

    #[test]
    fn any_text_is_a_schema_or_refused(text in "\\PC{0,60}", attributes in prop::collection::vec((0_usize..8, 0_usize..8), 0..8)) {
        let _ = schema::Schema::parse(&text);
        let keys = ["type", "name", "fields", "symbols", "items", "size", "default", "logicalType"];
        let values = ["\"record\"", "\"A\"", "[]", "[\"A\"]", "\"enum\"", "-1", "{\"type\":\"A\"}", "\"fixed\""];
        let pairs: Vec<_> = attributes.iter().map(|(k, v)| format!("\"{}\":{}", keys[*k], values[*v])).collect();
        let _ = schema::Schema::parse(&format!("{{{}}}", pairs.join(",")));
    }
}

#[test]
fn every_kind_of_bad_record_is_told_apart() {
    let good = encoded(&[click(0), click(1)], 7);
    let bytes = good[0].clone().expect("a record").to_vec();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut changed = bytes.clone();
        change(&mut changed);
        Some(Bytes::from(changed))
    };
    let records = vec![
        good[0].clone(),
        None,
        Some(Bytes::from(vec![0; (1 << 16) + 1])),
        Some(Bytes::new()),
        with(&|b| b[0] = 1),
        with(&|b| b[4] = 8),
        with(&|b| b[4] = 9),
        with(&|b| b.truncate(b.len() - 1)),
        with(&|b| b.push(0)),
        with(&|b| b[6] = 0xff),
        with(&|b| b[5] = 0xfe),
        good[1].clone(),
    ];
    let other = r#"{"type":"record","name":"Click","fields":[{"name":"user_id","type":"long"}]}"#;
    let decoded = decoder(CLICKS, &[(7, CLICKS), (8, other)]).decode_known(&records).expect("a small batch");
    let codes: Vec<_> = decoded.rejects.iter().map(|r| (r.index, r.reason.code())).collect();
    let expected = [
        "tombstone",
        "too_large",
        "no_header",
        "no_header",
        "incompatible_schema",
        "unknown_schema",
        "truncated",
        "trailing_bytes",
    ];
    assert_eq!(codes[..8], expected.iter().enumerate().map(|(i, c)| (i as u32 + 1, *c)).collect::<Vec<_>>());
    assert_eq!(codes[8], (9, "malformed"));
    assert_eq!(codes.len(), 10);
    assert_eq!(decoded.rows, [0, 11]);
    assert_eq!(Click::from_batch(&decoded.batch).expect("typed columns"), [click(0), click(1)]);
    let told = decoded.rejects[4].reason.to_string();
    assert!(told.contains("Click.user_id: written as long, read as string"), "{told}");
}

#[test]
fn a_decimal_above_its_precision_is_out_of_range_on_both_ways() {
    let mut row = click(0);
    row.monto_cents = 10_i64.pow(12);
    let mut encoder = RowEncoder::<Click>::with_id(7).expect("the shipped schema has columns");
    encoder.encode_rows(&[row]).expect_err("thirteen digits do not fit");
    assert_eq!(encoder.encode_rows(&[click(1)]).expect("the failed batch left nothing").len(), 1);
    // The same bytes with a wider writer that forward compatibility would have refused.
    let body = [&[0, 0, 0, 0, 7, 2, b'u', 2, b'c', 2, b'/', 0, 12][..], &[0x7f; 6], &[2, b'r', 0]].concat();
    let decoded = decoder(CLICKS, &[(7, CLICKS)]).decode_known(&[Some(body.into())]).expect("a small batch");
    assert_eq!(decoded.rejects[0].reason, RejectReason::OutOfRange);
}

#[test]
fn records_of_several_writers_stand_in_one_batch() {
    // A later version: one field new, one gone that has a default, one renamed, one wider.
    let v2 = CLICKS
        .replace(r#""fields": ["#, r#""fields": [ { "name": "session", "type": ["null", "string"], "default": null },"#)
        .replace(r#""name": "user_id""#, r#""name": "user", "aliases": ["user_id"]"#)
        .replace(r#"{ "name": "product_id", "type": ["null", "string"], "default": null, "doc": "Product; null on a page that shows none." },"#, "");
    assert!(
        compatibility::problems(&schema::Schema::parse(&v2).expect("valid"), &schema::Schema::parse(CLICKS).expect("valid"))
            .is_empty()
    );
    let reader_of_both = CLICKS.replace(r#""name": "user_id""#, r#""name": "user_id", "aliases": ["user"]"#);
    let mut of_v2 = encode::Encoder::new(&v2, 8).expect("columns");
    let old = encoded(&[click(0), click(2)], 7);
    // Built from the reader's side: the new schema reads the old records, and what it read is written again as v2.
    let read = decoder(&v2, &[(7, CLICKS)]).decode_known(&old).expect("a small batch");
    same_columns(&read.batch, &oracle(&v2, CLICKS, 7, &old));
    assert_eq!(read.batch.column(0).null_count(), 2);
    let new = of_v2.encode(&read.batch).expect("the same columns");
    let mixed: Vec<_> = old.iter().cloned().zip(new.into_iter().map(Some)).flat_map(|(a, b)| [a, b]).collect();
    let decoded = decoder(&reader_of_both, &[(7, CLICKS), (8, &v2)]).decode_known(&mixed).expect("a small batch");
    assert_eq!(decoded.rows, [0, 1, 2, 3], "{:?}", decoded.rejects);
    let back = Click::from_batch(&decoded.batch).expect("typed columns");
    let without_product = |i| Click { product_id: None, ..click(i) };
    assert_eq!(back, [click(0), without_product(0), click(2), without_product(2)]);
}

#[test]
fn a_reader_skips_promotes_and_defaults() {
    // a = [null, "s", {k: 1}] in two blocks (the second with a size), b = {next: {next: null}}, e = Z, f, i = -3, t = 5, x, k.
    let body: &[u8] = &[
        &[4, 0, 2, 2, b's', 1, 12, 4, 2, 2, b'k', 2, 0, 0][..],
        &[2, 2, 0, 4, b'a', b'b', b'c', 0, 5, 2, 10],
        &1.5_f32.to_le_bytes(),
        &[1],
    ]
    .concat();
    let decoder = decoder(RICH_READER, &[(3, RICH)]);
    let decoded = decoder.decode_known(&[Some([&[0, 0, 0, 0, 3], body].concat().into())]).expect("a small batch");
    assert!(decoded.rejects.is_empty(), "{:?}", decoded.rejects);
    let batch = decoded.batch;
    assert_eq!(batch.column(0).as_primitive::<arrow::datatypes::Float64Type>().value(0), -3.0);
    assert_eq!(batch.column(1).as_string::<i32>().value(0), "O");
    assert_eq!(batch.column(2).as_binary::<i32>().value(0), b"abc");
    assert_eq!(batch.column(3).as_primitive::<arrow::datatypes::Float64Type>().value(0), 1.5);
    assert_eq!(batch.column(4).as_string::<i32>().value(0), "none");
}

#[test]
fn an_array_of_countless_nulls_is_rejected_soon() {
    let writer = r#"{"type":"record","name":"R","fields":[{"name":"a","type":{"type":"array","items":"null"}}]}"#;
    let reader = r#"{"type":"record","name":"R","fields":[]}"#;
    let record = [0, 0, 0, 0, 3, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
    let decoded = decoder(reader, &[(3, writer)]).decode_known(&[Some(Bytes::copy_from_slice(&record))]).expect("a small batch");
    assert_eq!(decoded.rejects[0].reason, RejectReason::Malformed("more empty values than bytes"));
    let endless = r#"{"type":"record","name":"R","fields":[{"name":"r","type":{"type":"record","name":"S","fields":[{"name":"s","type":"S"}]}}]}"#;
    let decoded = decoder(reader, &[(3, endless)]).decode_known(&[Some(Bytes::copy_from_slice(&record))]).expect("a small batch");
    assert_eq!(decoded.rejects[0].reason, RejectReason::Malformed("a value nested deeper than 64"));
}

/// A registry that is down for everything but what it is told to know.
#[derive(Debug)]
struct Down;

#[async_trait::async_trait]
impl SchemaRegistry for Down {
    async fn register(&self, _: &str, _: &str) -> Result<u32> {
        Err(PortError::retryable("down"))
    }
    async fn schema(&self, _: u32) -> Result<String> {
        Err(PortError::retryable("down"))
    }
    async fn latest(&self, _: &str) -> Result<crate::ports::RegisteredSchema> {
        Err(PortError::retryable("down"))
    }
    async fn version(&self, _: &str, _: u32) -> Result<crate::ports::RegisteredSchema> {
        Err(PortError::retryable("down"))
    }
    async fn versions(&self, _: &str) -> Result<Vec<u32>> {
        Err(PortError::retryable("down"))
    }
    async fn check(&self, _: &str, _: &str) -> Result<crate::ports::Verdict> {
        Err(PortError::retryable("down"))
    }
    async fn compatibility(&self, _: &str) -> Result<Compatibility> {
        Err(PortError::retryable("down"))
    }
    async fn set_compatibility(&self, _: &str, _: Compatibility) -> Result<()> {
        Err(PortError::retryable("down"))
    }
}

#[tokio::test]
async fn a_registry_that_is_down_rejects_nothing_and_is_not_needed_for_known_ids() {
    let up = MemoryRegistry::default();
    let mut encoder = RowEncoder::<Click>::register(&up, Compatibility::default()).await.expect("the first version");
    let records: Vec<_> = encoder.encode_rows(&[click(0)]).expect("encoded").into_iter().map(Some).collect();
    let mut decoder = Decoder::new(CLICKS, LIMITS).expect("columns");
    let error = decoder.decode(&Down, &records).await.expect_err("the schema cannot be asked for");
    assert_eq!(error.disposition, crate::ports::Disposition::Retryable);
    decoder.decode(&up, &records).await.expect("now it can");
    assert_eq!(decoder.decode(&Down, &records).await.expect("it is kept").rows, [0]);
}

#[tokio::test]
async fn an_id_that_is_registered_later_is_decoded_later() {
    let registry = Arc::new(MemoryRegistry::default());
    let mut decoder = RowDecoder::<Click>::new(registry.clone(), LIMITS).expect("columns");
    let records = encoded(&[click(0)], 1);
    assert_eq!(decoder.decode(&records).await.expect("decided").rejects[0].reason, RejectReason::UnknownSchema(1));
    assert_eq!(register_checked(registry.as_ref(), CLICKS_SUBJECT, CLICKS, Compatibility::default()).await.expect("free"), 1);
    assert_eq!(decoder.decode(&records).await.expect("decided").rows, [0]);
}

#[tokio::test]
async fn a_breaking_change_is_refused_by_field_and_an_old_writer_may_restart() {
    let registry = MemoryRegistry::default();
    registry.set_compatibility(CLICKS_SUBJECT, Compatibility::None).await.expect("set");
    let level = Compatibility::BackwardTransitive;
    let first = register_checked(&registry, CLICKS_SUBJECT, CLICKS, level).await.expect("the first version");
    let broken = CLICKS.replace(r#""name": "region", "type": "string""#, r#""name": "region", "type": "int""#);
    let error = register_checked(&registry, CLICKS_SUBJECT, &broken, level).await.expect_err("a type changed");
    assert_eq!(error.code.as_deref(), Some("409"));
    let told = "Click.region: string in version 1, int in the new schema: not backward compatible";
    assert!(error.to_string().contains(told), "{error}");
    let wider = CLICKS.replace(r#""fields": ["#, r#""fields": [ { "name": "session", "type": "string", "default": "" },"#);
    let second = register_checked(&registry, CLICKS_SUBJECT, &wider, level).await.expect("a new field with a default");
    assert_ne!(first, second);
    assert_eq!(register_checked(&registry, CLICKS_SUBJECT, CLICKS, level).await.expect("it is version 1"), first);
    assert_eq!(registry.versions(CLICKS_SUBJECT).await.expect("it exists"), [1, 2]);
}

#[test]
fn the_header_is_a_zero_byte_and_a_big_endian_id() {
    assert_eq!(header(&[0, 1, 2, 3, 4, 9]), Ok((0x0102_0304, &[9_u8][..])));
    assert_eq!(encoded(&[click(1)], 0x0102_0304)[0].as_ref().map(|r| r.slice(..5)), Some(Bytes::from_static(&[0, 1, 2, 3, 4])));
}
