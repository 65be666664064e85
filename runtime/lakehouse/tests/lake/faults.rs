//! A store that fails at each of its calls in turn: refused before anything happened, or done and the answer lost.
//! Whatever the call was, repeating the operation gives the table that it gives undisturbed.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arrow::{array::ArrayRef, util::display::array_value_to_string};
use async_trait::async_trait;
use chrono::{DateTime, TimeDelta, Utc};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result as StoreResult, memory::InMemory, path::Path,
};
use simulacro_core::ports::{
    Absent, AddColumns, Append, Column, Commit, DayWrite, Disposition, Effective, Input, Lakehouse, Mark, Optimize, Period,
    Query, Restore, Result, Scd2, Upsert, Vacuum,
};
use simulacro_lakehouse::DeltaLakehouse;

use crate::shop::day;

/// What happens at the chosen call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The call is refused; nothing happened.
    Refused,
    /// The call is done, and its answer is lost.
    AnswerLost,
    /// As `AnswerLost`, and so is every later call: the process is cut off.
    CutOff,
}

/// A store that fails at one call.
#[derive(Debug)]
struct Faulty {
    inner: Arc<InMemory>,
    calls: AtomicU64,
    at: u64,
    failure: Failure,
}

fn lost() -> Error {
    Error::Generic { store: "faulty", source: "connection reset".into() }
}

impl Faulty {
    fn new(inner: Arc<InMemory>, at: u64, failure: Failure) -> Arc<Self> {
        Arc::new(Self { inner, calls: AtomicU64::new(0), at, failure })
    }

    /// Whether this call is to be made, and whether its answer arrives.
    fn next(&self) -> (bool, bool) {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        match self.failure {
            Failure::Refused => (call != self.at, call != self.at),
            Failure::AnswerLost => (true, call != self.at),
            Failure::CutOff => (call <= self.at, call < self.at),
        }
    }

    async fn call<T>(&self, real: impl Future<Output = StoreResult<T>> + Send) -> StoreResult<T> {
        let (made, answered) = self.next();
        let result = if made { Some(real.await) } else { None };
        match result {
            Some(result) if answered => result,
            Some(_) | None => Err(lost()),
        }
    }

    fn stream<T: Send + 'static>(
        &self,
        real: impl FnOnce() -> BoxStream<'static, StoreResult<T>>,
    ) -> BoxStream<'static, StoreResult<T>> {
        match self.next() {
            (true, true) => real(),
            // What was done is done, and then the stream breaks.
            (true, false) => {
                let done = real();
                futures::stream::once(async move {
                    let _ = done.collect::<Vec<_>>().await;
                    Err(lost())
                })
                .boxed()
            }
            (false, _) => futures::stream::once(async { Err(lost()) }).boxed(),
        }
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> StoreResult<PutResult> {
        self.call(self.inner.put_opts(location, payload, opts)).await
    }
    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> StoreResult<Box<dyn MultipartUpload>> {
        self.call(self.inner.put_multipart_opts(location, opts)).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.call(self.inner.get_opts(location, options)).await
    }
    fn delete_stream(&self, locations: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        self.stream(|| self.inner.delete_stream(locations))
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.stream(|| self.inner.list(prefix))
    }
    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.stream(|| self.inner.list_with_offset(prefix, offset))
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.call(self.inner.list_with_delimiter(prefix)).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.call(self.inner.copy_opts(from, to, options)).await
    }
}

const TABLE: &str = "dim/clientes";

fn of(values: &str) -> Query {
    let sql = format!(
        "SELECT k, v, DATE '2024-03-01' AS fecha FROM (VALUES (1)) AS o(one) LEFT JOIN (VALUES {values}) AS r(k, v) ON o.one = 1"
    );
    Query { sql, inputs: Vec::new() }
}

fn mark(epoch: i64) -> Mark {
    Mark { writer: "prueba".into(), epoch }
}

/// An operation under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Overwrite,
    Append,
    Upsert,
    Scd2,
    AddColumns,
    Restore,
    Compact,
    ZOrder,
    Vacuum,
}

const ALL: [Operation; 9] = [
    Operation::Overwrite,
    Operation::Append,
    Operation::Upsert,
    Operation::Scd2,
    Operation::AddColumns,
    Operation::Restore,
    Operation::Compact,
    Operation::ZOrder,
    Operation::Vacuum,
];

fn scd2(epoch: i64, effective: &str, values: &str) -> Scd2 {
    let sql = format!("SELECT v.* FROM (VALUES (1)) AS o(one) LEFT JOIN (VALUES {values}) AS v(k, v) ON o.one = 1");
    Scd2 {
        table: TABLE.into(),
        mark: mark(epoch),
        keys: vec!["k".into()],
        tracked: vec!["v".into()],
        effective: Effective::Date(day(effective)),
        absent: Absent::Ends,
        period: Period { from: "desde".into(), to: "hasta".into(), current: "actual".into() },
        query: Query { sql, inputs: Vec::new() },
    }
}

impl Operation {
    /// The table before the operation.
    async fn prepare(self, lake: &DeltaLakehouse) {
        if self == Self::Scd2 {
            lake.upsert_scd2(scd2(1, "2024-03-01", "('a', 1), ('b', 2)")).await.expect("a table is made");
            lake.upsert_scd2(scd2(2, "2024-03-02", "('a', 3), ('b', 2), ('c', 4)")).await.expect("a day is applied");
            return;
        }
        for (epoch, values) in [(1, "('a', 1), ('b', 2)"), (2, "('c', 3), ('b', 4)"), (3, "('d', 5)")] {
            let partition_by = vec!["fecha".into()];
            lake.append(Append { table: TABLE.into(), mark: mark(epoch), partition_by, query: of(values) }).await.expect("added");
        }
        if self == Self::Vacuum {
            self.optimize(lake, &[]).await.expect("files are joined");
        }
    }

    async fn optimize(self, lake: &DeltaLakehouse, z_order: &[&str]) -> Result<()> {
        let z_order = z_order.iter().map(|c| (*c).to_owned()).collect();
        lake.optimize(Optimize { table: TABLE.into(), z_order, target_bytes: 1 << 20 }).await.map(|_| ())
    }

    async fn run(self, lake: &DeltaLakehouse) -> Result<()> {
        let (table, mark) = (TABLE.to_owned(), mark(9));
        match self {
            Self::Overwrite => {
                let (fecha, query) = (day("2024-03-01"), of("('z', 1), ('y', 2)"));
                lake.overwrite_day(DayWrite { table, fecha, epoch: 9, query }).await.map(|_| ())
            }
            Self::Append => lake.append(Append { table, mark, partition_by: vec![], query: of("('a', 1)") }).await.map(|_| ()),
            Self::Upsert => {
                // The table has `b` twice; the rows to merge do not have it.
                let query = of("('a', 7), ('d', NULL), ('e', 8)");
                lake.upsert(Upsert { table, mark, keys: vec!["k".into()], ignored: vec![], query }).await.map(|_| ())
            }
            Self::Scd2 => lake.upsert_scd2(scd2(9, "2024-03-03", "('a', 1), ('c', 4), ('d', 5)")).await.map(|_| ()),
            Self::AddColumns => {
                let columns = vec![Column { name: "pais".into(), physical_type: "string".into() }];
                lake.add_columns(AddColumns { table, mark, columns }).await.map(|_| ())
            }
            Self::Restore => lake.restore(Restore { table, mark, version: 1 }).await.map(|_| ()),
            Self::Compact => self.optimize(lake, &[]).await,
            Self::ZOrder => self.optimize(lake, &["v", "k"]).await,
            Self::Vacuum => {
                let now = later();
                let vacuum = Vacuum { table, now, retention_hours: 168, allow_short_retention: false, dry_run: false };
                lake.vacuum(vacuum).await.map(|_| ())
            }
        }
    }

    /// Whether the log has a mark of the operation.
    fn is_marked(self) -> bool {
        !matches!(self, Self::Compact | Self::ZOrder | Self::Vacuum)
    }
}

/// Long after everything in these tests.
fn later() -> DateTime<Utc> {
    "2199-01-01T00:00:00Z".parse().expect("an instant")
}

async fn rows(lake: &DeltaLakehouse) -> Vec<String> {
    let query = Query { sql: "SELECT * FROM t".into(), inputs: vec![("t".into(), Input::Delta(TABLE.into()))] };
    let mut rows = Vec::new();
    for batch in lake.query(&query).await.expect("the table is read") {
        for row in 0..batch.num_rows() {
            let cell = |c: &ArrayRef| array_value_to_string(c, row).expect("text");
            rows.push(batch.columns().iter().map(cell).collect::<Vec<_>>().join("|"));
        }
    }
    rows.sort();
    rows
}

/// Paths of data files, and whether the newest version needs each.
async fn data_files(store: &InMemory) -> usize {
    let all: Vec<ObjectMeta> = store.list(Some(&Path::from(TABLE))).try_collect().await.expect("the store lists");
    all.iter()
        .filter(|meta| meta.location.as_ref().ends_with(".parquet") && !meta.location.as_ref().contains("_delta_log"))
        .count()
}

/// Fails each call of `operation` in turn; returns how many calls there are.
async fn each_call(operation: Operation, failure: Failure) -> u64 {
    let base = Arc::new(InMemory::new());
    operation.prepare(&DeltaLakehouse::new(base.clone())).await;
    let before = rows(&DeltaLakehouse::new(base.clone())).await;
    let undisturbed = Arc::new(base.fork());
    operation.run(&DeltaLakehouse::new(undisturbed.clone())).await.expect("nothing fails");
    let wanted = rows(&DeltaLakehouse::new(undisturbed.clone())).await;
    let wanted_versions = versions(&undisturbed).await;
    for at in 0.. {
        let at_call = format!("{operation:?}, {failure:?} at call {at}");
        let store = Arc::new(base.fork());
        let faulty = Faulty::new(store.clone(), at, failure);
        let lake = DeltaLakehouse::new(faulty.clone());
        let outcome = operation.run(&lake).await;
        let fired = faulty.calls.load(Ordering::SeqCst) > at;
        // A reader sees the old table or the new one, whatever the outcome.
        let seen = rows(&DeltaLakehouse::new(store.clone())).await;
        assert!(seen == before || seen == wanted, "{at_call}: {seen:?}");
        match &outcome {
            Ok(()) => assert_eq!(seen, wanted, "{at_call}: reported as done"),
            Err(error) => {
                assert_ne!(error.disposition, Disposition::Permanent, "{at_call}: {}", error.chain());
                // With a store that answers again, the log tells of a commit whose answer was lost.
                if operation.is_marked() && failure != Failure::CutOff {
                    assert_eq!(seen, before, "{at_call}: it is done: {}", error.chain());
                }
                if operation.is_marked() && error.disposition == Disposition::Retryable {
                    assert_eq!(seen, before, "{at_call}: {}", error.chain());
                }
            }
        }
        // The same call again, by the same process where it still has its store, and by another one.
        let again = if failure == Failure::CutOff { DeltaLakehouse::new(store.clone()) } else { lake };
        operation.run(&again).await.unwrap_or_else(|e| panic!("{at_call}: again: {}", e.chain()));
        assert_eq!(rows(&again).await, wanted, "{at_call}");
        let other = DeltaLakehouse::new(store.clone());
        operation.run(&other).await.unwrap_or_else(|e| panic!("{at_call}: once more: {}", e.chain()));
        assert_eq!(rows(&other).await, wanted, "{at_call}");
        if operation.is_marked() {
            assert_eq!(versions(&store).await, wanted_versions, "{at_call}: written twice");
        }
        if operation == Operation::Vacuum {
            assert_eq!(data_files(&store).await, data_files(&undisturbed).await, "{at_call}");
        }
        if !fired {
            return at;
        }
    }
    unreachable!("the range has no end")
}

/// Partitions that the table's own log says are rewritten since `version`, in its order.
async fn rewritten(store: &InMemory, version: usize) -> Vec<String> {
    let mut out = Vec::new();
    for version in version..versions(store).await {
        let entry = Path::from(format!("{TABLE}/_delta_log/{version:020}.json"));
        let bytes = store.get(&entry).await.expect("an entry").bytes().await.expect("its text");
        for line in std::str::from_utf8(&bytes).expect("text").lines() {
            let action: serde_json::Value = serde_json::from_str(line).expect("an action");
            out.extend(action["add"]["partitionValues"]["fecha"].as_str().map(str::to_owned));
        }
    }
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_that_is_cut_off_is_gone_on_with_and_does_no_partition_twice() {
    const DAYS: [&str; 3] = ["2024-03-01", "2024-03-02", "2024-03-03"];
    let base = Arc::new(InMemory::new());
    let lake = DeltaLakehouse::new(base.clone());
    let mut epoch = 0;
    // Their order in the log is not that of their values.
    for fecha in [DAYS[2], DAYS[0], DAYS[1]] {
        for values in ["('b', 2), ('a', 1)", "('d', 4), ('c', 3)"] {
            epoch += 1;
            let (mark, partition_by) = (mark(epoch), vec!["fecha".into()]);
            lake.append(Append { table: TABLE.into(), mark, partition_by, query: dated(fecha, values) }).await.expect("added");
        }
    }
    let (before, written) = (rows(&lake).await, versions(&base).await);
    let order = |columns: &[&str]| Optimize {
        table: TABLE.into(),
        z_order: columns.iter().map(|c| (*c).to_owned()).collect(),
        target_bytes: 1 << 20,
    };
    for columns in [&[][..], &["k"][..]] {
        for at in 0.. {
            let store = Arc::new(base.fork());
            let faulty = Faulty::new(store.clone(), at, Failure::CutOff);
            let outcome = DeltaLakehouse::new(faulty).optimize(order(columns)).await;
            let done = rewritten(&store, written).await;
            assert_eq!(done, DAYS[..done.len()], "{columns:?} at call {at}");
            let again = DeltaLakehouse::new(store.clone());
            again.optimize(order(columns)).await.expect("the store answers again");
            assert_eq!(rewritten(&store, written).await, DAYS, "{columns:?} at call {at}: not each once, in order");
            assert_eq!(rows(&again).await, before);
            // A day that is written between two calls is the only one that the second has to do with.
            let write = DayWrite { table: TABLE.into(), fecha: day(DAYS[0]), epoch: 9, query: dated(DAYS[0], "('z', 1)") };
            again.overwrite_day(write).await.expect("written");
            let files = again.optimize(order(columns)).await.expect("the store answers").files_added;
            assert_eq!(files, u64::from(!columns.is_empty()), "one file has nothing to be joined with");
            if outcome.is_ok() {
                break;
            }
        }
    }
}

async fn versions(store: &InMemory) -> usize {
    let log = Path::from(format!("{TABLE}/_delta_log"));
    let all: Vec<ObjectMeta> = store.list(Some(&log)).try_collect().await.expect("the store lists");
    all.iter().filter(|meta| meta.location.as_ref().ends_with(".json")).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operation_that_fails_at_any_call_of_the_store_can_be_repeated() {
    let mut calls = 0;
    for operation in ALL {
        for failure in [Failure::Refused, Failure::AnswerLost, Failure::CutOff] {
            let n = each_call(operation, failure).await;
            assert!(n >= 5, "{operation:?} made only {n} calls");
            calls += n;
        }
    }
    println!("{calls} calls failed");
}

/// A store in which another writer comes first at the first write of a commit.
#[derive(Debug)]
struct Rival {
    inner: Arc<InMemory>,
    armed: AtomicU64,
    /// Replaces a day.
    fecha: &'static str,
}

impl fmt::Display for Rival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rival({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Rival {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> StoreResult<PutResult> {
        if location.as_ref().contains("_delta_log") && self.armed.swap(0, Ordering::SeqCst) == 1 {
            let write =
                DayWrite { table: TABLE.into(), fecha: day(self.fecha), epoch: 5, query: dated(self.fecha, "('rival', 1)") };
            DeltaLakehouse::new(self.inner.clone()).overwrite_day(write).await.expect("the rival is first");
        }
        self.inner.put_opts(location, payload, opts).await
    }
    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> StoreResult<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> StoreResult<GetResult> {
        self.inner.get_opts(location, options).await
    }
    fn delete_stream(&self, locations: BoxStream<'static, StoreResult<Path>>) -> BoxStream<'static, StoreResult<Path>> {
        self.inner.delete_stream(locations)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        self.inner.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> StoreResult<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> StoreResult<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

fn dated(fecha: &str, values: &str) -> Query {
    let sql = format!(
        "SELECT r.*, DATE '{fecha}' AS fecha FROM (VALUES (1)) AS o(one) LEFT JOIN (VALUES {values}) AS r(k, v) ON o.one = 1"
    );
    Query { sql, inputs: Vec::new() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rival_that_is_first_is_not_undone() {
    for fecha in ["2024-03-01", "2024-03-02"] {
        for operation in ALL {
            if matches!(operation, Operation::Scd2 | Operation::Vacuum) {
                // Their tables have other columns, and a vacuum writes none.
                continue;
            }
            let store = Arc::new(InMemory::new());
            operation.prepare(&DeltaLakehouse::new(store.clone())).await;
            let rival = Rival { inner: store.clone(), armed: AtomicU64::new(1), fecha };
            let outcome = operation.run(&DeltaLakehouse::new(Arc::new(rival))).await;
            let seen = rows(&DeltaLakehouse::new(store.clone())).await;
            let kept = seen.iter().any(|row| row.starts_with("rival|"));
            assert!(kept, "{operation:?} against {fecha}: {seen:?}");
            match outcome {
                // Only what changes no row may go on over another day's change.
                Ok(()) => assert!(!operation.is_marked() && fecha == "2024-03-02", "{operation:?} against {fecha}"),
                Err(error) => {
                    assert_eq!(error.disposition, Disposition::Retryable, "{operation:?}: {}", error.chain());
                    operation.run(&DeltaLakehouse::new(store.clone())).await.expect("nobody is first now");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_attempt_left_behind_is_removed_and_what_is_recent_is_not() {
    let store = Arc::new(InMemory::new());
    let lake = DeltaLakehouse::new(store.clone());
    Operation::Append.prepare(&lake).await;
    let (wanted, files) = (rows(&lake).await, data_files(&store).await);
    let orphan = Path::from(format!("{TABLE}/fecha=2024-03-01/part-00000-dead.snappy.parquet"));
    store.put(&orphan, PutPayload::from_static(b"half a file")).await.expect("an orphan");
    let stored = store.head(&orphan).await.expect("it is there").last_modified;
    let at = |now| Vacuum { table: TABLE.into(), now, retention_hours: 168, allow_short_retention: false, dry_run: false };
    // It may belong to a writer that is at work.
    assert_eq!(lake.vacuum(at(stored + TimeDelta::hours(167))).await.expect("nothing to remove"), Vec::<String>::new());
    let removed = lake.vacuum(at(stored + TimeDelta::hours(169))).await.expect("the orphan is removed");
    assert_eq!(removed, ["fecha=2024-03-01/part-00000-dead.snappy.parquet"]);
    assert_eq!((rows(&lake).await, data_files(&store).await), (wanted, files));
}

/// Moves the times in the entries of the log: those of the commits forward, those of the removals back, by `days`.
async fn move_times(store: &InMemory, days: i64) {
    let log = Path::from(format!("{TABLE}/_delta_log"));
    let all: Vec<ObjectMeta> = store.list(Some(&log)).try_collect().await.expect("the store lists");
    for meta in all.iter().filter(|meta| meta.location.as_ref().ends_with(".json")) {
        let bytes = store.get(&meta.location).await.expect("an entry").bytes().await.expect("an entry");
        let mut moved = String::new();
        for line in std::str::from_utf8(&bytes).expect("text").lines() {
            let mut action: serde_json::Value = serde_json::from_str(line).expect("an action");
            for (kind, field, by) in [("commitInfo", "timestamp", days), ("remove", "deletionTimestamp", -days)] {
                if let Some(time) = action.get(kind).and_then(|a| a.get(field)).and_then(serde_json::Value::as_i64) {
                    action[kind][field] = (time + by * 86_400_000).into();
                }
            }
            moved.push_str(&format!("{action}\n"));
        }
        store.put(&meta.location, moved.into()).await.expect("the entry is replaced");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vacuum_of_a_long_retention_keeps_what_the_log_has_forgotten_to_bury() {
    // Checkpoints forget tombstones after a week. With a retention of 30 days, a file that was replaced 20 days ago is
    // known to no tombstone, and looks like an orphan; the versions that need it are within the retention.
    let store = Arc::new(InMemory::new());
    let lake = DeltaLakehouse::new(store.clone());
    for epoch in 1..=11 {
        let write = DayWrite { table: TABLE.into(), fecha: day("2024-03-01"), epoch, query: of("('a', 1)") };
        assert!(matches!(lake.overwrite_day(write).await, Ok(Commit::New(_))));
    }
    move_times(&store, 20).await;
    let lake = DeltaLakehouse::new(store.clone());
    lake.maintain(TABLE).await.expect("a checkpoint without tombstones");
    let last = lake.versions(TABLE, 1).await.expect("the log is read")[0].at;
    let vacuum = |days| Vacuum {
        table: TABLE.into(),
        now: last + TimeDelta::days(days),
        retention_hours: 30 * 24,
        allow_short_retention: false,
        dry_run: true,
    };
    assert_eq!(lake.vacuum(vacuum(25)).await.expect("nothing to remove"), Vec::<String>::new());
    // Once they are out of the retention, all but the newest go.
    assert_eq!(lake.vacuum(vacuum(31)).await.expect("files are listed").len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shortened_log_keeps_the_rows_the_epochs_and_the_versions_within_the_retention() {
    let store = Arc::new(InMemory::new());
    let lake = DeltaLakehouse::new(store.clone());
    for epoch in 1..=25 {
        let query = of(&format!("('a', {epoch})"));
        lake.append(Append { table: TABLE.into(), mark: mark(epoch), partition_by: vec![], query }).await.expect("added");
        lake.maintain(TABLE).await.expect("maintained");
    }
    let (wanted, told) = (rows(&lake).await, lake.versions(TABLE, 100).await.expect("the log is read"));
    let newest = told[0].at;
    let at = |days| Vacuum {
        table: TABLE.into(),
        now: newest + TimeDelta::days(days),
        retention_hours: 168,
        allow_short_retention: false,
        dry_run: false,
    };
    for days in [0, 6, 29] {
        lake.vacuum(at(days)).await.expect("nothing to remove");
        assert_eq!(lake.versions(TABLE, 100).await.expect("the log is read"), told, "after {days} days");
    }
    lake.vacuum(at(40)).await.expect("the log is shortened");
    // The checkpoints are of versions 10 and 20.
    let left: Vec<u64> = lake.versions(TABLE, 100).await.expect("the log is read").iter().map(|v| v.version).collect();
    assert_eq!(left, [24, 23, 22, 21, 20]);
    for lake in [lake, DeltaLakehouse::new(store)] {
        assert_eq!(rows(&lake).await, wanted);
        assert_eq!(lake.writer_epoch(TABLE, "prueba").await.expect("the log is read"), Some(25));
        for (version, is_there) in [(19, false), (20, true), (24, true)] {
            let input = Input::DeltaVersion { table: TABLE.into(), version };
            let sql = "SELECT count(*) AS n FROM t".to_owned();
            let result = lake.query(&Query { sql, inputs: vec![("t".into(), input)] }).await;
            match result {
                Ok(_) => assert!(is_there, "version {version}"),
                Err(e) => assert!(!is_there && e.chain().contains("expected one of 20 to 24"), "{}", e.chain()),
            }
        }
        let old = Input::DeltaTime { table: TABLE.into(), at: told[24].at - TimeDelta::milliseconds(1) };
        let sql = "SELECT count(*) AS n FROM t".to_owned();
        let error = lake.query(&Query { sql, inputs: vec![("t".into(), old)] }).await.expect_err("it is gone");
        assert_eq!(error.disposition, Disposition::Permanent, "{}", error.chain());
    }
}
