//! Records of topics: Avro, and the state that the job writes down.

use std::{collections::BTreeMap, sync::OnceLock};

use bytes::Bytes;
use simulacro_core::{
    avro::{CLICKS, Click, Limits, METRICAS_REALTIME, MetricaRealtime, Row, RowEncoder, decode::DecodedBatch, decode::Decoder},
    ports::event_log::LogRecord,
    streaming::{
        checkpoint::{self, ClickHead, Control, MergeHead, Record},
        click_task::ClickTask,
        config::StreamConfig,
        distinct::user_hash,
        event::{EventType, Valid},
        merge_task::MergeTask,
        pane::{MergedPane, Pane},
        watermark::{InputMark, Watermark},
        window::MetricRow,
    },
};

use super::{named, text};

const LIMITS: Limits = Limits { record_bytes_max: 4_096 };
/// Users of a set, in the tests of state.
const EXACT: usize = 16;

/// Pieces of an input, each with two bytes of length in front; the last may be shorter.
fn pieces(mut data: &[u8]) -> Vec<&[u8]> {
    let mut all = Vec::new();
    while let Some((length, rest)) = data.split_first_chunk::<2>() {
        let (piece, rest) = rest.split_at(rest.len().min(u16::from_be_bytes(*length).into()));
        all.push(piece);
        data = rest;
    }
    all
}

fn joined<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut all = Vec::new();
    for piece in pieces {
        all.extend((piece.len() as u16).to_be_bytes());
        all.extend_from_slice(piece);
    }
    all
}

/// An empty piece is a tombstone.
fn values(data: &[u8]) -> Vec<Option<Bytes>> {
    pieces(data).into_iter().map(|piece| (!piece.is_empty()).then(|| Bytes::copy_from_slice(piece))).collect()
}

/// Every record is a row or a reject, never both and never neither.
fn accounted(decoded: &DecodedBatch, records: usize) {
    let mut all: Vec<u32> = decoded.rows.iter().copied().chain(decoded.rejects.iter().map(|r| r.index)).collect();
    all.sort_unstable();
    assert!(all.iter().map(|i| *i as usize).eq(0..records), "{all:?} of {records}");
    assert_eq!(decoded.rows.len(), decoded.batch.num_rows());
    decoded.rejects.iter().for_each(|reject| named(&reject.reason));
}

/// A click as it was before the topic had `product_id`, and with fields that nobody reads.
const OLDER: &str = r#"{"type":"record","name":"Click","namespace":"ecommerce","fields":[
    {"name":"user_id","type":"string"},{"name":"tags","type":{"type":"array","items":["null","string"]}},
    {"name":"event_type","type":{"type":"enum","name":"Kind","symbols":["click","purchase"]}},
    {"name":"page","type":"bytes"},{"name":"extra","type":{"type":"map","values":{"type":"record","name":"E","fields":[
    {"name":"e","type":["null","E"]},{"name":"f","type":{"type":"fixed","name":"F","size":3}}]}}},
    {"name":"monto","type":{"type":"bytes","logicalType":"decimal","precision":10,"scale":2}},{"name":"region","type":"string"},
    {"name":"timestamp","type":{"type":"long","logicalType":"timestamp-millis"}}]}"#;

fn decoder(reader: &str, writers: &[(u32, &str)]) -> Decoder {
    let mut decoder = Decoder::new(reader, LIMITS).unwrap_or_else(|e| panic!("{e}"));
    writers.iter().for_each(|(id, text)| decoder.learn(*id, text));
    decoder
}

/// What was decoded is encoded and decoded again.
fn again<R: Row + PartialEq>(decoder: &Decoder, decoded: &DecodedBatch) {
    let rows = R::from_batch(&decoded.batch).unwrap_or_else(|e| panic!("{}", e.chain()));
    let mut encoder = RowEncoder::<R>::with_id(1).unwrap_or_else(|e| panic!("{}", e.chain()));
    let encoded = encoder.encode_rows(&rows).unwrap_or_else(|e| panic!("{}", e.chain()));
    let encoded: Vec<_> = encoded.into_iter().filter(|value| value.len() <= LIMITS.record_bytes_max).map(Some).collect();
    let repeated = decoder.decode_known(&encoded).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert!(repeated.rejects.is_empty(), "{:?}", repeated.rejects);
    if encoded.len() == rows.len() {
        assert_eq!(repeated.batch, decoded.batch);
    }
}

/// Records of `ecommerce.clicks`.
pub fn avro_clicks(data: &[u8]) {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let decoder = DECODER.get_or_init(|| decoder(CLICKS, &[(1, CLICKS), (2, OLDER), (3, METRICAS_REALTIME)]));
    let values = values(data);
    let decoded = decoder.decode_known(&values).unwrap_or_else(|e| panic!("{}", e.chain()));
    accounted(&decoded, values.len());
    again::<Click>(decoder, &decoded);
}

fn click(n: i64) -> Click {
    Click {
        user_id: format!("u{n}"),
        event_type: if n % 2 == 0 { "click" } else { "purchase" }.into(),
        page: "/niño".into(),
        product_id: (n % 3 == 0).then(|| "P001".into()),
        monto_cents: n % 2 * 1_999,
        region: "norte".into(),
        timestamp_ms: 852_076_800_000 + n,
    }
}

fn encoded<R: Row>(rows: &[R]) -> Vec<Bytes> {
    RowEncoder::<R>::with_id(1).and_then(|mut encoder| encoder.encode_rows(rows)).unwrap_or_else(|e| panic!("{}", e.chain()))
}

/// Seeds of [`avro_clicks`].
pub fn avro_clicks_seeds() -> Vec<Vec<u8>> {
    let good = encoded(&[click(0), click(1), click(2), click(3)]);
    let mut older = vec![0, 0, 0, 0, 2];
    // u, tags of one block of two and one of known size, purchase, a page, an extra, 1.00, sur, a time.
    older.extend(*b"\x02u\x04\x00\x02\x02t\x01\x04\x02\x02x\x00\x02\x02/\x02\x02k\x00abc\x00\x02\x64\x06sur\x02");
    let all: Vec<&[u8]> = good.iter().map(|b| &b[..]).collect();
    vec![joined(all.clone()), joined([all[0], &older, &[], all[1]]), joined([&older[..]]), joined([all[3]])]
}

/// Records of `ecommerce.metricas_realtime`.
pub fn avro_metrics(data: &[u8]) {
    static DECODER: OnceLock<Decoder> = OnceLock::new();
    let decoder = DECODER.get_or_init(|| decoder(METRICAS_REALTIME, &[(1, METRICAS_REALTIME)]));
    let values = values(data);
    let decoded = decoder.decode_known(&values).unwrap_or_else(|e| panic!("{}", e.chain()));
    accounted(&decoded, values.len());
    for row in MetricaRealtime::from_batch(&decoded.batch).unwrap_or_else(|e| panic!("{}", e.chain())) {
        match MetricRow::try_from(row) {
            Ok(row) => {
                let written = MetricaRealtime::try_from(&row).unwrap_or_else(|e| panic!("{}", e.chain()));
                assert_eq!(MetricRow::try_from(written).ok().as_ref(), Some(&row));
            }
            Err(error) => named(error),
        }
    }
}

/// Seeds of [`avro_metrics`].
pub fn avro_metrics_seeds() -> Vec<Vec<u8>> {
    let row = |kind: &str, page: Option<&str>| MetricaRealtime {
        window_kind: kind.into(),
        window_start_ms: 852_076_800_000,
        window_end_ms: 852_076_860_000,
        region: "sur".into(),
        page: page.map(Into::into),
        clicks: 9,
        purchases: 2,
        add_to_cart: 1,
        revenue_cents: 123_456,
        conversion_rate: page.map(|_| 0.25),
        unique_users: 5,
        revision: 7,
        exact: true,
    };
    let good = encoded(&[row("region_1m", None), row("page_1m", Some("/p")), row("region_5m", None)]);
    vec![joined(good.iter().map(|b| &b[..])), joined([&good[1][..]])]
}

/// A writer's schema, and records that it is said to have written.
pub fn avro_evolved(data: &[u8]) {
    let mut pieces = pieces(data).into_iter();
    let schema = text(pieces.next().unwrap_or_default()).into_owned();
    let decoder = decoder(CLICKS, &[(7, &schema)]);
    let values: Vec<_> = pieces.map(|piece| Some([&[0, 0, 0, 0, 7], piece].concat().into())).collect();
    let decoded = decoder.decode_known(&values).unwrap_or_else(|e| panic!("{}", e.chain()));
    accounted(&decoded, values.len());
}

/// Seeds of [`avro_evolved`].
pub fn avro_evolved_seeds() -> Vec<Vec<u8>> {
    let body = &avro_clicks_seeds()[2][7..];
    let good = encoded(&[click(3)]);
    let nulls = r#"{"type":"record","name":"Click","namespace":"ecommerce","fields":[{"name":"n","type":{"type":"array","items":"null"}}]}"#;
    vec![
        joined([CLICKS.as_bytes(), &good[0][5..]]),
        joined([OLDER.as_bytes(), body]),
        joined([nulls.as_bytes(), &[0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0]]),
    ]
}

fn pane(users: u64) -> Pane {
    let mut pane = Pane::default();
    for n in 0..users {
        let (region, page, user_id) = (format!("r{}", n % 2), format!("/{}", n % 3), format!("u{n}"));
        let event = Valid {
            user_id: &user_id,
            event_type: EventType::Purchase,
            page: &page,
            region: &region,
            cents: 100,
            timestamp_ms: 0,
        };
        let id = pane.intern(&region, &page);
        pane.add(id, &event, user_hash(&user_id), EXACT);
    }
    pane.settle(EXACT);
    pane
}

/// One record of each kind.
fn state_records() -> Vec<(Bytes, Bytes)> {
    let pane = pane(7);
    let mut merged = MergedPane::default();
    merged.add(&pane, EXACT);
    merged.pages.settle(EXACT);
    merged.region_mut("r1").emitted_sliding = 3;
    let mark = InputMark { watermark: Some(60_000), idle: false };
    let watermark = Watermark { newest: Some(90_000), value: Some(60_000) };
    let click = ClickHead { next_offset: 9, watermark, appended_ms: Some(90_001), told: mark, ..ClickHead::default() };
    let inputs = BTreeMap::from([(0, mark), (1, InputMark::default())]);
    let merge = MergeHead { next_offset: 9, closed: None, inputs, merged: (5, 500), expired: (0, 0) };
    let mut all = vec![
        (checkpoint::head_key(), checkpoint::encode_click_head(&click)),
        (checkpoint::head_key(), checkpoint::encode_merge_head(&merge)),
        (Bytes::new(), checkpoint::encode_status(1, &mark)),
        (Bytes::new(), checkpoint::encode_control(&Control { target: None, global: Some(60_000) })),
    ];
    let panes = checkpoint::encode_pane(60_000, &pane, 1 << 16).into_iter();
    all.extend(panes.map(|record| (checkpoint::pane_key(60_000, 0), record)));
    let merges = checkpoint::encode_merged_pane(120_000, &merged, 1 << 16).into_iter();
    all.extend(merges.map(|record| (checkpoint::pane_key(120_000, 1), record)));
    all.extend(checkpoint::encode_partial(1, 60_000, &pane, 1 << 16, |_| true).into_iter().map(|r| (Bytes::new(), r)));
    let prints = checkpoint::encode_fingerprints(60_000, &[1, u128::MAX], 1 << 16).into_iter();
    all.extend(prints.map(|record| (checkpoint::fingerprints_key(60_000, 0), record)));
    all
}

/// The record with a checksum that fits, so that what is behind it is reached.
fn sealed(content: &[u8]) -> Bytes {
    let checksum = twox_hash::XxHash64::oneshot(0x5EED_0000_0000_0004, content);
    [content, &checksum.to_le_bytes()].concat().into()
}

fn unsealed(record: &Bytes) -> &[u8] {
    &record[..record.len() - 8]
}

/// A record of state, as it is and with a checksum that fits.
pub fn state_record(data: &[u8]) {
    for bytes in [Bytes::copy_from_slice(data), sealed(data)] {
        let record = match checkpoint::decode(&bytes, EXACT) {
            Ok(record) => record,
            Err(error) => {
                named(error);
                continue;
            }
        };
        let written = match &record {
            Record::ClickHead(head) => vec![checkpoint::encode_click_head(head)],
            Record::MergeHead(head) => vec![checkpoint::encode_merge_head(head)],
            Record::Pane { start, pane } => checkpoint::encode_merged_pane(*start, pane, usize::MAX),
            Record::Fingerprints { minute, fingerprints } => checkpoint::encode_fingerprints(*minute, fingerprints, usize::MAX),
            Record::Partial { input, start, pane } => {
                checkpoint::encode_partial(*input, *start, &pane.pages, usize::MAX, |_| true)
            }
            Record::Status { input, mark } => vec![checkpoint::encode_status(*input, mark)],
            Record::Control(control) => vec![checkpoint::encode_control(control)],
        };
        // An empty list of cells is no record, so there may be none; else there is one, which says the same for ever.
        let Some(written) = written.first() else { continue };
        let repeated = checkpoint::decode(written, EXACT).unwrap_or_else(|e| panic!("{e}: {record:?}"));
        if let (Record::Pane { start, pane }, Record::Pane { start: also, pane: same }) = (&record, &repeated) {
            let all = |start, pane| checkpoint::encode_merged_pane(start, pane, usize::MAX);
            assert_eq!(all(*start, pane), all(*also, same));
        }
    }
}

/// Seeds of [`state_record`].
pub fn state_record_seeds() -> Vec<Vec<u8>> {
    let all = state_records();
    all.iter().map(|(_, record)| unsealed(record).to_vec()).chain([all[0].1.to_vec()]).collect()
}

/// A key of a changelog.
pub fn state_key(data: &[u8]) {
    match checkpoint::parse_key(data) {
        Ok(None) => assert_eq!(data, &checkpoint::head_key()[..]),
        Ok(Some((minute, ordinal))) => {
            let both = [checkpoint::pane_key(minute, ordinal), checkpoint::fingerprints_key(minute, ordinal)];
            assert!(both.iter().any(|key| key == data), "{minute} {ordinal}");
        }
        Err(error) => named(error),
    }
}

/// Seeds of [`state_key`].
pub fn state_key_seeds() -> Vec<Vec<u8>> {
    state_records().into_iter().map(|(key, _)| key.to_vec()).collect()
}

/// Pairs of key and record, with checksums that fit.
fn changelog(data: &[u8]) -> Vec<(Bytes, Bytes)> {
    let all = pieces(data);
    all.chunks_exact(2).map(|pair| (Bytes::copy_from_slice(pair[0]), sealed(pair[1]))).collect()
}

fn config() -> StreamConfig {
    StreamConfig { exact_users_max: EXACT, ..StreamConfig::specification() }
}

/// A changelog of the click stage: restored, written again, restored again.
pub fn click_changelog(data: &[u8]) {
    let (config, records) = (config(), changelog(data).into_iter().collect::<BTreeMap<_, _>>());
    let mut task = match ClickTask::restore(0, &records, &config) {
        Ok(Some(task)) => task,
        Ok(None) => return,
        Err(error) => return named(error.chain()),
    };
    let before = task.snapshot(&config);
    let _ = task.prepare(true, &config);
    let _ = task.prepare(true, &config);
    task.rollback();
    assert_eq!(task.snapshot(&config), before);
    let _ = task.prepare(false, &config);
    task.commit(&config);
    let _ = task.snapshot(&config);
}

/// A changelog of the merge stage.
pub fn merge_changelog(data: &[u8]) {
    let (config, records) = (config(), changelog(data).into_iter().collect::<BTreeMap<_, _>>());
    let mut task = match MergeTask::restore(0, &records, &config) {
        Ok(Some(task)) => task,
        Ok(None) => return,
        Err(error) => return named(error.chain()),
    };
    let before = task.snapshot(&config);
    let _ = task.prepare(&config);
    task.rollback();
    assert_eq!(task.snapshot(&config), before);
    let _ = task.prepare(&config);
    task.commit(&config);
    let _ = task.snapshot(&config);
}

/// Records of the topic of partials.
pub fn partials(data: &[u8]) {
    let config = config();
    let mut task = MergeTask::new(0, 0, [0, 1]);
    for (offset, (key, value)) in (0..).zip(changelog(data)) {
        let record = LogRecord { offset, appended_ms: 0, key: Some(key), value: Some(value), headers: Vec::new() };
        if let Err(error) = task.process(&[record], offset + 1, &config) {
            return named(error.chain());
        }
    }
    let _ = task.prepare(&config);
    task.commit(&config);
    let _ = task.snapshot(&config);
}

/// Seeds of the three above: each kind alone, and those of a stage together.
pub fn changelog_seeds() -> Vec<Vec<u8>> {
    let all = state_records();
    let both = |records: &[usize]| joined(records.iter().flat_map(|&at| [&all[at].0[..], unsealed(&all[at].1)]));
    // 0 and 1 are the heads, 2 and 3 a status and a control, 4 a pane, 5 a merged one, 6 a partial, 7 fingerprints.
    vec![both(&[0, 4, 7]), both(&[1, 5]), both(&[6, 2, 6]), both(&[0]), both(&[1, 4, 5]), both(&[2, 6])]
}
