//! Texts that people and other services write: schemas, contracts, pages of a service, settings, plans.

use async_trait::async_trait;
use bytes::Bytes;
use simulacro_core::{
    avro::{
        CLICKS, Limits, METRICAS_REALTIME,
        decode::Decoder,
        schema::{Schema, canonical_text},
    },
    backfill,
    batch::{Manifest, ManifestFile},
    contract::{Bound, Contract, Number, PhysicalType},
    dimensions::paged::{PageLimits, PageRequest, PageResponse, PagedApi, Transport},
    history,
    models::{FILES, Model},
    ports::{Column, DimensionApi, Fetched, Result},
    slo::Objective,
    streaming::config::StreamConfig,
};
use simulacro_shop::cdnow;

use super::{named, text, wait};

/// A declaration of a schema.
pub fn avro_schema(data: &[u8]) {
    let text = text(data);
    match Schema::parse(&text) {
        Ok(schema) => {
            let canonical = canonical_text(&text).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(canonical_text(&canonical).as_deref(), Ok(canonical.as_str()));
            assert_eq!(Schema::parse(&canonical).as_ref(), Ok(&schema));
            if let Ok(mut decoder) = Decoder::new(&text, Limits { record_bytes_max: 1_024 }) {
                decoder.learn(1, &text);
                decoder.learn(2, CLICKS);
            }
        }
        Err(error) => {
            named(&error);
            assert!(!error.place.is_empty(), "{error}");
        }
    }
}

/// Seeds of [`avro_schema`].
pub fn avro_schema_seeds() -> Vec<Vec<u8>> {
    let recursive = r#"{"type":"record","name":"A","fields":[{"name":"f","type":["null","A",{"type":"record","name":"B",
        "fields":[{"name":"f","type":["A","B","null"]}]}],"default":null},{"name":"g","type":{"type":"fixed","name":"F",
        "size":3,"logicalType":"decimal","precision":5,"scale":1},"default":"\u0000\u00ff\u0001"}]}"#;
    [CLICKS, METRICAS_REALTIME, recursive, r#"["null",{"type":"enum","name":"x.E","symbols":["a","b"],"default":"a"}]"#]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

/// A manifest of raw objects.
pub fn manifest(data: &[u8]) {
    match serde_json::from_slice::<Manifest>(data) {
        Ok(manifest) => {
            let written = serde_json::to_vec(&manifest).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(serde_json::from_slice::<Manifest>(&written).ok(), Some(manifest));
        }
        Err(error) => named(error),
    }
}

/// Seeds of [`manifest`].
pub fn manifest_seeds() -> Vec<Vec<u8>> {
    let manifest = Manifest {
        version: 3,
        contract: "ventas".into(),
        rows: 7,
        content_hash: "ab".repeat(32),
        content_hash_version: 2,
        files: vec![ManifestFile { path: "raw/ventas/part-0".into(), bytes: 812, sha256: "cd".repeat(32) }],
    };
    let older = r#"{"version":1,"contract":"ventas","rows":0,"content_hash":"00","files":[]}"#;
    vec![serde_json::to_vec(&manifest).unwrap_or_default(), older.into()]
}

/// A service that answers every request with the same body.
#[derive(Debug)]
struct Answers(Bytes);

#[async_trait]
impl Transport for Answers {
    async fn get(&self, _: &PageRequest, _: &str) -> Result<PageResponse> {
        Ok(PageResponse { status: 200, etag: Some("\"1\"".into()), retry_after: None, body: self.0.clone() })
    }
}

/// A page of a dimension; it is its own successor, when it names one.
pub fn dimension_page(data: &[u8]) {
    let columns: Vec<Column> = ["string", "decimal(10,2)", "int64", "timestamp", "date", "boolean", "float64"]
        .iter()
        .map(|kind| Column { name: kind[..2].to_owned(), physical_type: (*kind).to_owned() })
        .collect();
    let limits = PageLimits { page_rows: 10, pages_max: 3, snapshot_bytes_max: 1 << 20, restarts_max: 1 };
    let api = PagedApi::new(Answers(Bytes::copy_from_slice(data)), ["productos".to_owned()], limits);
    match wait(api.fetch("productos", &columns, None)) {
        Ok(Fetched::Snapshot(snapshot)) => {
            assert!(snapshot.batches.iter().all(|batch| batch.num_columns() == columns.len()));
        }
        Ok(Fetched::NotModified) => panic!("nothing was known before"),
        Err(error) => named(error.chain()),
    }
}

/// Seeds of [`dimension_page`].
pub fn dimension_page_seeds() -> Vec<Vec<u8>> {
    let row = r#"{"st":"a","de":"12.34","in":7,"ti":"2024-03-18T00:00:00Z","da":"2024-03-18","bo":true,"fl":0.5}"#;
    let nulls = r#"{"st":null,"de":null,"in":null,"ti":null,"da":null,"bo":null,"fl":null}"#;
    let page = |next: &str| {
        format!(r#"{{"as_of":"2024-03-18T00:00:00Z","total_rows":2,"next":{next},"rows":[{row},{nulls}],"more":[1]}}"#)
    };
    vec![page("null").into(), page("\"2\"").into()]
}

/// A contract.
pub fn contract(data: &[u8]) {
    if let Err(error) = Contract::parse("fuzz.yaml", &text(data)) {
        named(&error);
        assert!(error.to_string().contains("fuzz.yaml"), "{error}");
    }
}

/// Seeds of [`contract`].
pub fn contract_seeds() -> Vec<Vec<u8>> {
    catalogue_files("contracts/odcs")
}

/// The files of a folder of the repository, in order of name; none where it is not.
fn catalogue_files(folder: &str) -> Vec<Vec<u8>> {
    let place = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = place.ancestors().find(|at| at.join("contracts").is_dir()).unwrap_or(place);
    let mut files: Vec<_> = std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten().map(|e| e.path()).collect();
    files.sort();
    files.iter().filter(|path| path.is_file()).filter_map(|path| std::fs::read(path).ok()).collect()
}

/// An objective.
pub fn objective(data: &[u8]) {
    if let Err(error) = Objective::parse("fuzz.yaml", &text(data)) {
        named(&error);
        assert!(error.to_string().contains("fuzz.yaml"), "{error}");
    }
}

/// Seeds of [`objective`].
pub fn objective_seeds() -> Vec<Vec<u8>> {
    catalogue_files("contracts/slo")
}

/// A model in SQL.
pub fn model(data: &[u8]) {
    if let Err(error) = Model::parse("marts/fuzz.sql", &text(data)) {
        named(&error);
        assert!(error.to_string().contains("marts/fuzz.sql"), "{error}");
    }
}

/// Seeds of [`model`].
pub fn model_seeds() -> Vec<Vec<u8>> {
    FILES.iter().map(|(_, text)| text.as_bytes().to_vec()).collect()
}

/// A plan of a backfill.
pub fn backfill_plan(data: &[u8]) {
    match backfill::Plan::parse("fuzz.json", &text(data)) {
        Ok(plan) => {
            let written = serde_json::to_string(&plan).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(backfill::Plan::parse("again", &written).ok(), Some(plan));
        }
        Err(error) => assert!(error.to_string().contains("fuzz.json"), "{}", error.chain()),
    }
}

/// Seeds of [`backfill_plan`].
pub fn backfill_plan_seeds() -> Vec<Vec<u8>> {
    let head = r#"{"format":1,"made_at":"2024-03-18T00:00:00Z","contract":"ventas","from":"2024-03-17","to":"2024-03-17","force":false,"#;
    vec![format!("{head}\"days\":[]}}").into(), format!("{head}\"days\":[{{\"fecha\":\"2024-03-17\"}}]}}").into()]
}

/// Settings of the stream.
pub fn stream_config(data: &[u8]) {
    match serde_json::from_slice::<StreamConfig>(data) {
        Ok(config) => {
            let written = serde_json::to_vec(&config).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(serde_json::from_slice::<StreamConfig>(&written).ok().as_ref(), Some(&config));
            if let Err(error) = config.validate() {
                named(&error);
                assert!(!error.key.is_empty());
            }
        }
        Err(error) => named(error),
    }
}

/// Seeds of [`stream_config`].
pub fn stream_config_seeds() -> Vec<Vec<u8>> {
    let small = r#"{"slide_ms":120000,"topics":{"clicks":"clicks"},"start_at":"latest","regions":["sur"]}"#;
    vec![serde_json::to_vec(&StreamConfig::specification()).unwrap_or_default(), small.into()]
}

/// Values in contracts: types, numbers and bounds.
pub fn values(data: &[u8]) {
    let text = text(data);
    if let Ok(kind) = text.parse::<PhysicalType>() {
        assert_eq!(kind.to_string().parse::<PhysicalType>().ok(), Some(kind));
        assert_eq!(PhysicalType::of(&kind.data_type()), Some(kind));
    }
    if let Ok(number) = text.parse::<Number>() {
        assert!(number.floor() <= number.ceil());
        for bound in [Bound::AtLeast(number), Bound::Below(number), Bound::NotBetween(number, number)] {
            bound.holds(i128::MAX, 1);
            bound.holds(0, 1);
            bound.holds_number(&number);
        }
    }
}

/// Seeds of [`values`].
pub fn values_seeds() -> Vec<Vec<u8>> {
    ["decimal(10,2)", "timestamp", "string", "0.995", "-12", "99999999999999999999999999999999999999", "1e3", "0.00000000001"]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

/// A line of a history.
pub fn history(data: &[u8]) {
    match serde_json::from_slice::<history::Event>(data) {
        Ok(event) => {
            let written = serde_json::to_vec(&event).unwrap_or_else(|e| panic!("{e}"));
            let again: history::Event = serde_json::from_slice(&written).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((again.ordinal, again.time), (event.ordinal, event.time));
        }
        Err(error) => named(error),
    }
}

/// Seeds of [`history`].
pub fn history_seeds() -> Vec<Vec<u8>> {
    let line =
        r#"{"time":"2024-03-18T00:00:00Z","ordinal":7,"component":"lakehouse","call":"append","outcome":"ok","refs":{"rows":1}}"#;
    vec![line.into()]
}

/// The shop's purchases.
pub fn cdnow(data: &[u8]) {
    match cdnow::parse(data) {
        Ok(purchases) => assert_eq!(cdnow::to_csv(&purchases).lines().count(), purchases.len() + 1),
        Err(error) => named(error),
    }
}

/// Seeds of [`cdnow`]: blocks that are not compressed, so that their text is within reach of a change.
pub fn cdnow_seeds() -> Vec<Vec<u8>> {
    let stored = |text: &str| {
        let length = text.len() as u16;
        let mut gz = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1];
        gz.extend(length.to_le_bytes());
        gz.extend((!length).to_le_bytes());
        gz.extend_from_slice(text.as_bytes());
        gz.extend(crc32fast::hash(text.as_bytes()).to_le_bytes());
        gz.extend(u32::from(length).to_le_bytes());
        gz
    };
    let header = cdnow::HEADER;
    vec![stored(&format!("{header}\n 00001 19970101  1  11.77\n 00002 19970112  5  77.00\n")), stored(&format!("{header}\r\n"))]
}
