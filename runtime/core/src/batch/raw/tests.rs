//! The raw layer over a store in memory, which counts, refuses and loses writes when told to.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use arrow::{array::StringArray, compute::concat_batches};
use async_trait::async_trait;
use futures::stream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, memory::InMemory,
};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::*;
use crate::{
    contract::catalogue,
    ports::{Disposition, PartitionRead},
};

const FECHA: &str = "2024-03-17";
const LAYOUT: RawLayout = RawLayout { part_rows: 10, part_bytes: 64 << 20 };

/// What happens to the puts of a store, by their number from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    None,
    /// It is stored, and the answer is lost.
    AnswerLost(usize),
    /// The answers of all puts are lost once.
    EveryFirstAnswerLost,
    /// It is refused, however often it is tried.
    RefusedFrom(usize),
    /// A rival's object of that name gets there first.
    RivalAt(usize),
}

#[derive(Debug)]
struct Store {
    inner: InMemory,
    trouble: Trouble,
    puts: AtomicUsize,
    deletes: Arc<AtomicUsize>,
    /// Paths whose first answer was lost.
    lost: Mutex<BTreeSet<String>>,
    flying: AtomicUsize,
    flying_max: AtomicUsize,
}

impl Store {
    fn new() -> Self {
        Self {
            inner: InMemory::new(),
            trouble: Trouble::None,
            puts: AtomicUsize::new(0),
            deletes: Arc::default(),
            lost: Mutex::default(),
            flying: AtomicUsize::new(0),
            flying_max: AtomicUsize::new(0),
        }
    }
    fn with(trouble: Trouble) -> Self {
        Self { trouble, ..Self::new() }
    }
    /// The writes so far, and again from zero.
    fn writes(&self) -> usize {
        self.puts.swap(0, Ordering::SeqCst) + self.deletes.swap(0, Ordering::SeqCst)
    }
    async fn all(&self) -> BTreeMap<String, Bytes> {
        let mut all = BTreeMap::new();
        for meta in self.inner.list(None).try_collect::<Vec<_>>().await.expect("a listing") {
            let bytes = self.inner.get(&meta.location).await.expect("an object").bytes().await.expect("bytes");
            all.insert(meta.location.to_string(), bytes);
        }
        all
    }
    async fn put_text(&self, path: &str, text: &str) {
        self.inner.put(&Path::from(path), text.to_owned().into()).await.expect("stored");
    }
}

impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "troubled({})", self.inner)
    }
}

fn broken() -> StoreError {
    StoreError::Generic { store: "test", source: "503 SlowDown".into() }
}

#[async_trait]
impl ObjectStore for Store {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> object_store::Result<PutResult> {
        let number = self.puts.fetch_add(1, Ordering::SeqCst);
        let flying = self.flying.fetch_add(1, Ordering::SeqCst) + 1;
        self.flying_max.fetch_max(flying, Ordering::SeqCst);
        // A put takes some time, in which rows are read.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        self.flying.fetch_sub(1, Ordering::SeqCst);
        let lose = match self.trouble {
            Trouble::None => false,
            Trouble::AnswerLost(n) => n == number,
            Trouble::EveryFirstAnswerLost => {
                self.lost.lock().unwrap_or_else(PoisonError::into_inner).insert(location.to_string())
            }
            Trouble::RefusedFrom(n) => {
                if number >= n {
                    return Err(broken());
                }
                false
            }
            Trouble::RivalAt(n) => {
                if number == n {
                    self.inner.put(location, "a rival's".into()).await?;
                }
                false
            }
        };
        let done = self.inner.put_opts(location, payload, opts).await?;
        if lose { Err(broken()) } else { Ok(done) }
    }
    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(location, options).await
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        let deletes = self.deletes.clone();
        self.inner.delete_stream(locations.inspect(move |_| _ = deletes.fetch_add(1, Ordering::SeqCst)).boxed())
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// A source of one day. It counts `expected` rows whatever it gives, and may fail after its batches.
#[derive(Debug)]
struct Day {
    batches: Vec<RecordBatch>,
    expected: u64,
    error: Option<&'static str>,
    endless: bool,
}

#[async_trait]
impl TableSource for Day {
    async fn ping(&self) -> Result<()> {
        Ok(())
    }
    async fn columns(&self, _table: &str) -> Result<Vec<Column>> {
        Ok(contract().columns)
    }
    async fn read_day(&self, _table: &str, _fecha: NaiveDate, _columns: &[Column]) -> Result<PartitionRead> {
        let error = self.error.map(|what| Err(PortError::retryable(what)));
        let rows = stream::iter(self.batches.clone().into_iter().map(Ok).chain(error));
        let batches = if self.endless { rows.chain(stream::pending()).boxed() } else { rows.boxed() };
        Ok(PartitionRead { expected_rows: self.expected, batches })
    }
    async fn not_null(&self, _table: &str) -> Result<Option<std::collections::BTreeSet<String>>> {
        Ok(None)
    }
    async fn read_table(&self, table: &str, _columns: &[Column]) -> Result<PartitionRead> {
        Err(PortError::permanent(format!("read {table}: found a source of one day")))
    }
}

fn contract() -> Contract {
    let shipped = catalogue::shipped().expect("the contracts that ship");
    let mut contract = shipped.into_iter().find(|c| c.table == "ventas" && c.rows_max == 10_000_000).expect("the sales");
    contract.rows_min = 0;
    contract
}

/// Rows with these numbers.
fn rows(numbers: impl IntoIterator<Item = i64>) -> RecordBatch {
    let numbers: Vec<i64> = numbers.into_iter().collect();
    let text = |f: &dyn Fn(i64) -> Option<String>| Arc::new(numbers.iter().map(|n| f(*n)).collect::<StringArray>()) as ArrayRef;
    let money = |f: &dyn Fn(i64) -> Option<i128>| {
        let values = numbers.iter().map(|n| f(*n)).collect::<arrow::array::Decimal128Array>();
        Arc::new(values.with_precision_and_scale(10, 2).expect("ten digits")) as ArrayRef
    };
    let columns = vec![
        text(&|n| Some(format!("o-{n}"))),
        text(&|n| (n % 5 > 0).then(|| format!("u-{}", n % 3))),
        text(&|_| Some(String::new())),
        money(&|n| Some(i128::from(n) * 100)),
        money(&|n| (n % 2 > 0).then_some(0)),
        text(&|n| Some(["norte", "sur"][n as usize % 2].to_owned())),
        Arc::new(
            numbers.iter().map(|n| Some(n * 1_000_000)).collect::<arrow::array::TimestampMicrosecondArray>().with_timezone("UTC"),
        ),
        Arc::new(arrow::array::Date32Array::from(vec![19_799; numbers.len()])),
    ];
    RecordBatch::try_new(arrow_schema(&contract().columns).expect("known types"), columns).expect("a batch")
}

/// A source of these rows, in batches of seven.
fn day(numbers: impl IntoIterator<Item = i64>) -> Day {
    let numbers: Vec<i64> = numbers.into_iter().collect();
    let batches = numbers.chunks(7).map(|chunk| rows(chunk.iter().copied())).collect();
    Day { batches, expected: numbers.len() as u64, error: None, endless: false }
}

async fn extract_day(store: &Store, day: &Day) -> Result<RawDay, DayError> {
    extract_raw(day, store, &contract(), FECHA.parse().expect("a day"), LAYOUT).await
}

/// The rows that the manifest's objects hold.
async fn stored(store: &Store, day: &RawDay) -> RecordBatch {
    let (all, mut batches) = (store.all().await, Vec::new());
    for file in &day.manifest.files {
        let bytes = &all[&file.path];
        assert_eq!((bytes.len() as u64, hex(&Sha256::digest(bytes))), (file.bytes, file.sha256.clone()));
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes.clone()).expect("a Parquet file").build().expect("a reader");
        batches.extend(reader.map(|b| b.expect("rows")));
    }
    let schema = arrow_schema(&contract().columns).expect("known types");
    concat_batches(&schema, &batches).expect("one schema")
}

fn part(version: u64, number: usize) -> String {
    format!("raw/ventas/fecha={FECHA}/part-v{version:06}-{number:04}.parquet")
}

fn port_error(result: Result<RawDay, DayError>) -> PortError {
    match result {
        Err(DayError::Port { source, .. }) => source,
        other => panic!("found {other:?}, expected an error of a port"),
    }
}

/// Parts that no manifest names.
fn unnamed(all: &BTreeMap<String, Bytes>) -> Vec<&String> {
    let manifests: String =
        all.iter().filter(|(p, _)| p.ends_with(".json")).map(|(_, b)| String::from_utf8_lossy(b).into_owned()).collect();
    all.keys().filter(|p| p.ends_with(".parquet") && !manifests.contains(p.as_str())).collect()
}

#[tokio::test]
async fn a_day_is_cut_into_parts_by_its_rows() {
    let store = Store::new();
    let day_read = extract_day(&store, &day(0..25)).await.expect("extracted");
    assert_eq!(day_read.paths(), [part(1, 0), part(1, 1), part(1, 2)]);
    assert_eq!((day_read.manifest.version, day_read.manifest.rows), (1, 25));
    assert_eq!(stored(&store, &day_read).await, rows(0..25));
    assert!(store.flying_max.load(Ordering::SeqCst) == 1, "one part is written at a time");
    // In another store the same bytes.
    let other = Store::new();
    extract_day(&other, &day(0..25)).await.expect("extracted");
    assert_eq!(store.all().await, other.all().await);
    // Long texts end a part before its rows do.
    let small = RawLayout { part_rows: 1_000_000, part_bytes: 1 };
    let cut =
        extract_raw(&day(0..25), &Store::new(), &contract(), FECHA.parse().expect("a day"), small).await.expect("extracted");
    assert_eq!(cut.manifest.files.len(), 4);
    assert_eq!(cut.manifest.content_hash, day_read.manifest.content_hash);
}

#[tokio::test]
async fn a_day_without_rows_has_a_part_with_its_columns() {
    let store = Store::new();
    let day_read = extract_day(&store, &day([])).await.expect("extracted");
    assert_eq!(day_read.paths(), [part(1, 0)]);
    assert_eq!(stored(&store, &day_read).await, rows([]));
}

#[tokio::test]
async fn a_day_that_is_run_again_writes_nothing() {
    let store = Store::new();
    let first = extract_day(&store, &day(0..25)).await.expect("extracted");
    assert_eq!(store.writes(), 4);
    assert_eq!(extract_day(&store, &day(0..25)).await.expect("extracted"), first);
    assert_eq!(store.writes(), 0);
}

#[tokio::test]
async fn rows_in_another_order_are_the_same_day() {
    let store = Store::new();
    let first = extract_day(&store, &day(0..25)).await.expect("extracted");
    let before = store.all().await;
    assert_eq!(extract_day(&store, &day((0..25).rev())).await.expect("extracted"), first);
    assert_eq!(store.all().await, before);
}

#[tokio::test]
async fn a_corrected_day_is_a_new_version_beside_the_old_one() {
    let store = Store::new();
    let first = extract_day(&store, &day(0..25)).await.expect("extracted");
    let before = store.all().await;
    for (version, numbers, files) in [
        // The last part changes, then there are more rows, then fewer, then the first part changes.
        (2, [0..24, 99..100], vec![part(1, 0), part(1, 1), part(2, 2)]),
        (3, [0..24, 99..110], vec![part(1, 0), part(1, 1), part(3, 2), part(3, 3)]),
        (4, [0..20, 0..0], vec![part(1, 0), part(1, 1)]),
        (5, [1..21, 0..0], vec![part(5, 0), part(5, 1)]),
    ] {
        let numbers: Vec<i64> = numbers.into_iter().flatten().collect();
        let corrected = extract_day(&store, &day(numbers.clone())).await.expect("extracted");
        assert_eq!((corrected.manifest.version, corrected.paths()), (version, files));
        assert_eq!(stored(&store, &corrected).await, rows(numbers));
    }
    let after = store.all().await;
    assert!(before.iter().all(|(path, bytes)| after.get(path) == Some(bytes)), "the old version is what it was");
    assert_eq!(stored(&store, &first).await, rows(0..25));
    assert_eq!(unnamed(&after), Vec::<&String>::new());
}

#[tokio::test]
async fn leftovers_of_a_dead_attempt_are_removed() {
    let store = Store::new();
    for (version, number) in [(1, 0), (1, 7)] {
        store.put_text(&part(version, number), "of a dead attempt").await;
    }
    let first = extract_day(&store, &day(0..25)).await.expect("extracted");
    assert_eq!(unnamed(&store.all().await), Vec::<&String>::new());
    // Once there is a version: of it, and of the next.
    for (version, number) in [(1, 3), (2, 0), (2, 1)] {
        store.put_text(&part(version, number), "of a dead attempt").await;
    }
    assert_eq!(extract_day(&store, &day(0..25)).await.expect("extracted"), first);
    assert_eq!(unnamed(&store.all().await), Vec::<&String>::new());
    assert_eq!(stored(&store, &first).await, rows(0..25));
}

#[tokio::test]
async fn a_failed_read_leaves_nothing_and_the_old_version_as_it_was() {
    let store = Store::new();
    let cut_short = || Day { error: Some("the connection is gone"), ..day(0..25) };
    let miscounted = || Day { expected: 26, ..day(0..25) };
    for published in [false, true] {
        if published {
            extract_day(&store, &day(100..125)).await.expect("extracted");
        }
        let before = store.all().await;
        for source in [cut_short(), miscounted()] {
            store.writes();
            let error = port_error(extract_day(&store, &source).await);
            assert_eq!(error.disposition, Disposition::Retryable, "{}", error.chain());
            assert!(store.writes() > 1, "some parts had been written");
            assert_eq!(store.all().await, before);
        }
    }
}

#[tokio::test]
async fn an_extraction_that_is_dropped_is_swept_by_the_next() {
    let store = Store::new();
    let endless = Day { endless: true, ..day(0..25) };
    {
        let dropped = extract_day(&store, &endless);
        tokio::pin!(dropped);
        for _ in 0..200 {
            assert!(futures::poll!(&mut dropped).is_pending());
        }
    }
    assert_eq!(unnamed(&store.all().await), [&part(1, 0), &part(1, 1)]);
    let day_read = extract_day(&store, &day(30..45)).await.expect("extracted");
    assert_eq!(stored(&store, &day_read).await, rows(30..45));
    assert_eq!(unnamed(&store.all().await), Vec::<&String>::new());
}

#[tokio::test]
async fn an_answer_that_is_lost_changes_nothing() {
    let clean = Store::new();
    extract_day(&clean, &day(0..25)).await.expect("extracted");
    for trouble in [Trouble::AnswerLost(0), Trouble::AnswerLost(2), Trouble::AnswerLost(3), Trouble::EveryFirstAnswerLost] {
        let store = Store::with(trouble);
        extract_day(&store, &day(0..25)).await.expect("extracted");
        assert!(store.writes() > 4, "{trouble:?} fired");
        assert_eq!(store.all().await, clean.all().await, "{trouble:?}");
    }
}

#[tokio::test]
async fn a_store_that_refuses_publishes_nothing() {
    for refused in 0..4 {
        let mut store = Store::with(Trouble::RefusedFrom(refused));
        let error = port_error(extract_day(&store, &day(0..25)).await);
        assert_eq!(error.disposition, Disposition::Unknown, "{}", error.chain());
        assert!(!store.all().await.keys().any(|p| p.ends_with(".json")), "put {refused}");
        store.trouble = Trouble::None;
        let day_read = extract_day(&store, &day(0..25)).await.expect("extracted");
        assert_eq!(stored(&store, &day_read).await, rows(0..25));
    }
}

#[tokio::test]
async fn no_object_of_a_rival_is_replaced_or_removed() {
    for (put, path) in [(0, part(1, 0)), (2, part(1, 2)), (3, format!("raw/ventas/fecha={FECHA}/_manifest/v000001.json"))] {
        let store = Store::with(Trouble::RivalAt(put));
        let error = port_error(extract_day(&store, &day(0..25)).await);
        assert!(error.to_string().starts_with(&format!("put {path}: ")), "{error}");
        assert_eq!(store.all().await[&path], "a rival's");
    }
}

#[tokio::test]
async fn an_old_manifest_is_read_and_stays_the_version_of_an_unchanged_day() {
    let old = || async {
        let store = Store::new();
        let mut text_hash = OrderFreeHash::default();
        each_row(&rows(0..25), |row| text_hash.add(row)).expect("rows have text");
        store.put_text(&part(1, 0), "one object, as it used to be").await;
        let manifest = serde_json::json!({
            "version": 1, "contract": "ventas", "rows": 25, "content_hash": text_hash.finish(),
            "files": [{ "path": part(1, 0), "bytes": 28, "sha256": hex(&Sha256::digest("one object, as it used to be")) }],
        });
        store.put_text(&format!("raw/ventas/fecha={FECHA}/_manifest/v000001.json"), &manifest.to_string()).await;
        store
    };
    let store = old().await;
    let before = store.all().await;
    let unchanged = extract_day(&store, &day((0..25).rev())).await.expect("extracted");
    assert_eq!((unchanged.manifest.version, unchanged.manifest.content_hash_version), (1, 1));
    assert_eq!(unchanged.paths(), [part(1, 0)]);
    assert_eq!(store.all().await, before);

    let store = old().await;
    let changed = extract_day(&store, &day(1..26)).await.expect("extracted");
    assert_eq!((changed.manifest.version, changed.manifest.content_hash_version), (2, 2));
    assert_eq!(stored(&store, &changed).await, rows(1..26));
}

#[tokio::test]
async fn a_manifest_of_an_unknown_definition_is_refused() {
    let store = Store::new();
    let path = format!("raw/ventas/fecha={FECHA}/_manifest/v000001.json");
    store.put_text(&path, r#"{"version":1,"contract":"c","rows":1,"content_hash":"","content_hash_version":3,"files":[]}"#).await;
    let error = port_error(extract_day(&store, &day(0..25)).await);
    assert_eq!(error.disposition, Disposition::Permanent);
    assert!(error.to_string().ends_with("found content hash version 3, expected 1 to 2"), "{error}");
}

#[tokio::test]
async fn a_version_that_has_lost_a_part_is_not_kept() {
    let store = Store::new();
    extract_day(&store, &day(0..25)).await.expect("extracted");
    store.inner.delete(&Path::from(part(1, 1))).await.expect("deleted");
    let mended = extract_day(&store, &day(0..25)).await.expect("extracted");
    assert_eq!((mended.manifest.version, mended.paths()), (2, vec![part(1, 0), part(2, 1), part(1, 2)]));
    assert_eq!(stored(&store, &mended).await, rows(0..25));
}

#[test]
fn a_dictionary_is_for_values_that_repeat() {
    let columns = repeating(&rows(0..100));
    assert_eq!(columns, ["user_id", "product_id", "descuento", "region", "fecha"]);
    assert_eq!(repeating(&rows([1])), Vec::<String>::new());
}
