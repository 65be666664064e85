//! What a `DimensionApi` promises.
//!
//! The suite brings the rows: an adapter's test says how a version of `productos` is put behind it, and hands itself over.
//! A service that answers in pages is held to more: a snapshot is never made of two versions, every status has its
//! disposition, and nothing is read without a bound.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use arrow::array::{Array, RecordBatch};
use chrono::Utc;
use futures::FutureExt;
use serde_json::{Map, Value, json};
use simulacro_core::{
    dimensions::{Dimension, paged::PageLimits},
    ports::{Column, DimensionApi, Disposition, Fetched, PortError, Snapshot},
};
use simulacro_sim::dimension_api::{ApiFault, Service, lock};

use super::table_source::texts;

/// A row as JSON has it: decimals as text.
pub type Row = Map<String, Value>;

/// An adapter under test, and how versions get behind it.
pub trait World: Sync {
    /// The adapter.
    fn api(&self) -> &dyn DimensionApi;
    /// Puts a version of `productos`; the columns of its first row are the file's header, where there is one.
    fn put(&self, rows: &[Row]);
}

/// The columns that the dimension is declared with.
pub fn columns() -> Vec<Column> {
    Dimension::Productos.contract().expect("the shipped contract parses").columns
}

fn row(value: Value) -> Row {
    value.as_object().expect("an object").clone()
}

/// Rows with the cases that are easily read wrong: nulls, the largest and the smallest numbers, text beyond ASCII, commas,
/// quotes and line ends.
pub fn productos() -> Vec<Row> {
    [
        json!({"product_id": "p-1", "categoria": "libros", "marca": "Ñandú", "precio": "12.34", "inventario": 7}),
        json!({"product_id": "p-2", "categoria": null, "marca": null, "precio": null, "inventario": null}),
        json!({"product_id": "p-3", "categoria": "a, \"b\" 🦤", "marca": "x\ny", "precio": "99999999.99", "inventario": 9_223_372_036_854_775_807_i64}),
        json!({"product_id": "p-4", "categoria": "música", "marca": "null", "precio": "0.00", "inventario": 0}),
        json!({"product_id": " p 5 ", "categoria": "日本", "marca": "''", "precio": "0.01", "inventario": 1}),
    ]
    .map(row)
    .to_vec()
}

/// The rows as the adapters must show them.
fn expected(rows: &[Row], columns: &[Column]) -> Vec<Vec<Option<String>>> {
    let cell = |value: &Value| match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    rows.iter().map(|row| columns.iter().map(|c| cell(&row[&c.name])).collect()).collect()
}

async fn snapshot(api: &dyn DimensionApi, known: Option<&str>) -> Snapshot {
    match api.fetch("productos", &columns(), known).await.expect("the dimension comes") {
        Fetched::Snapshot(snapshot) => snapshot,
        Fetched::NotModified => panic!("not modified since {known:?}"),
    }
}

async fn refused(api: &dyn DimensionApi) -> PortError {
    api.fetch("productos", &columns(), None).await.expect_err("the dimension does not come")
}

/// Every promise in turn.
pub async fn check(world: &dyn World) {
    it_says_what_it_offers(world).await;
    a_snapshot_has_exactly_the_rows(world).await;
    columns_come_in_the_asked_order_and_with_their_types(world).await;
    a_known_version_is_not_sent_again_and_another_one_is(world).await;
    a_dimension_without_rows_is_empty(world).await;
    rows_that_are_not_as_asked_are_permanent_and_named(world).await;
    what_is_not_offered_is_permanent_and_named(world).await;
    a_fetch_that_is_dropped_harms_no_other(world).await;
}

async fn it_says_what_it_offers(world: &dyn World) {
    assert!(world.api().offered().contains(&"productos".to_owned()));
    assert!(world.api().offered().is_sorted());
}

async fn a_snapshot_has_exactly_the_rows(world: &dyn World) {
    world.put(&productos());
    let first = snapshot(world.api(), None).await;
    assert_eq!(texts(&first.batches), expected(&productos(), &columns()));
    assert!(first.etag.is_some() && first.as_of.is_some(), "{first:?}");
    assert_eq!(snapshot(world.api(), None).await, first, "reading changes nothing");
}

async fn columns_come_in_the_asked_order_and_with_their_types(world: &dyn World) {
    world.put(&productos());
    let mut asked = columns();
    asked.reverse();
    let fetched = world.api().fetch("productos", &asked, None).await.expect("the dimension comes");
    let Fetched::Snapshot(snapshot) = fetched else { panic!("nothing was known") };
    for batch in &snapshot.batches {
        let schema = batch.schema();
        let found: Vec<_> = schema.fields().iter().map(|f| (f.name().as_str(), f.data_type().clone())).collect();
        let wanted: Vec<_> = asked
            .iter()
            .map(|c| {
                (c.name.as_str(), c.physical_type.parse::<simulacro_core::contract::PhysicalType>().expect("a type").data_type())
            })
            .collect();
        assert_eq!(found, wanted);
    }
    assert_eq!(texts(&snapshot.batches), expected(&productos(), &asked));
}

async fn a_known_version_is_not_sent_again_and_another_one_is(world: &dyn World) {
    world.put(&productos());
    let first = snapshot(world.api(), None).await;
    let etag = first.etag.expect("a name");
    let again = world.api().fetch("productos", &columns(), Some(&etag)).await.expect("the API answers");
    assert_eq!(again, Fetched::NotModified);
    let mut changed = productos();
    changed[0].insert("precio".into(), json!("12.35"));
    world.put(&changed);
    let second = snapshot(world.api(), Some(&etag)).await;
    assert_eq!(texts(&second.batches), expected(&changed, &columns()));
    assert_ne!(second.etag, Some(etag), "another version has another name");
}

async fn a_dimension_without_rows_is_empty(world: &dyn World) {
    world.put(&[]);
    let empty = snapshot(world.api(), None).await;
    assert!(!empty.batches.is_empty(), "at least one batch");
    assert_eq!(empty.batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 0);
    assert_eq!(empty.batches[0].num_columns(), columns().len());
    assert!(empty.batches[0].columns().iter().all(|c| c.is_empty()));
}

async fn rows_that_are_not_as_asked_are_permanent_and_named(world: &dyn World) {
    let with = |change: &dyn Fn(&mut Row)| {
        let mut rows = productos();
        rows.iter_mut().for_each(change);
        rows
    };
    let cases: [(Vec<Row>, &[&str]); 4] = [
        (with(&|row| drop(row.insert("precio".into(), json!("1.234")))), &["precio", "\"1.234\"", "decimal(10,2)"]),
        (with(&|row| drop(row.insert("inventario".into(), json!("many")))), &["inventario", "\"many\"", "int64"]),
        (with(&|row| drop(row.remove("marca"))), &["column marca is missing"]),
        (with(&|row| drop(row.insert("color".into(), json!("red")))), &["column color is not in the contract"]),
    ];
    for (rows, words) in cases {
        world.put(&rows);
        let error = refused(world.api()).await;
        assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Permanent, Some("MALFORMED")), "{}", error.chain());
        for word in words {
            assert!(error.chain().contains(word), "{word:?} is missing in: {}", error.chain());
        }
    }
}

async fn what_is_not_offered_is_permanent_and_named(world: &dyn World) {
    let error = world.api().fetch("almacenes", &columns(), None).await.expect_err("there is no such dimension");
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Permanent, Some("404")));
    assert!(error.chain().contains("almacenes"), "{}", error.chain());
}

async fn a_fetch_that_is_dropped_harms_no_other(world: &dyn World) {
    world.put(&productos());
    let asked = columns();
    // Polled once, and then nobody wants it any more.
    let _ = world.api().fetch("productos", &asked, None).now_or_never();
    assert_eq!(texts(&snapshot(world.api(), None).await.batches), expected(&productos(), &columns()));
}

/// A service that answers in pages, and how clients of it are made.
pub struct Paged<'a> {
    /// The service.
    pub service: Arc<Mutex<Service>>,
    /// Makes a client with a token and bounds.
    pub client: &'a (dyn Fn(&str, PageLimits) -> Box<dyn DimensionApi> + Sync),
}

/// The token that the service asks for.
pub const TOKEN: &str = "let-me-in";
/// Two rows a page, so that the five rows of [`productos`] are three pages.
pub const LIMITS: PageLimits = PageLimits { page_rows: 2, pages_max: 10, snapshot_bytes_max: 100_000, restarts_max: 2 };

impl World for (Box<dyn DimensionApi>, Arc<Mutex<Service>>) {
    fn api(&self) -> &dyn DimensionApi {
        self.0.as_ref()
    }
    fn put(&self, rows: &[Row]) {
        lock(&self.1).put(chrono::DateTime::UNIX_EPOCH, "productos", rows.to_vec());
    }
}

impl Paged<'_> {
    fn fresh(&self) -> Box<dyn DimensionApi> {
        let mut service = lock(&self.service);
        service.heal();
        service.put(chrono::DateTime::UNIX_EPOCH, "productos", productos());
        drop(service);
        (self.client)(TOKEN, LIMITS)
    }
    fn inject(&self, fault: ApiFault) {
        lock(&self.service).inject(fault);
    }
    fn hits(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.service).hits()
    }
}

/// Every promise of a paged service in turn.
pub async fn check_paged(paged: &Paged<'_>) {
    let world = (paged.fresh(), paged.service.clone());
    check(&world).await;
    a_version_that_changes_is_read_from_its_beginning(paged).await;
    a_version_that_never_stands_still_is_retryable(paged).await;
    pages_of_two_versions_are_never_mixed(paged).await;
    a_snapshot_that_misses_a_row_is_refused(paged).await;
    a_refusal_has_its_disposition_and_its_wait(paged).await;
    credentials_are_permanent_and_never_shown(paged).await;
    silence_and_lost_connections_are_retryable(paged).await;
    what_is_no_page_is_permanent_and_named(paged).await;
    pages_and_bytes_are_bounded(paged).await;
}

async fn a_version_that_changes_is_read_from_its_beginning(paged: &Paged<'_>) {
    let api = paged.fresh();
    paged.inject(ApiFault::ChangesBetweenPages { times: 2 });
    let read = snapshot(api.as_ref(), None).await;
    let mut rows = productos();
    rows.rotate_left(2);
    assert_eq!(texts(&read.batches), expected(&rows, &columns()), "the rows of the last version alone");
    assert_eq!(paged.hits(), BTreeMap::from([("changes_between_pages", 2)]));
}

async fn a_version_that_never_stands_still_is_retryable(paged: &Paged<'_>) {
    let api = paged.fresh();
    paged.inject(ApiFault::ChangesBetweenPages { times: 100 });
    let error = refused(api.as_ref()).await;
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Retryable, Some("SNAPSHOT_CHANGED")));
    assert_eq!(paged.hits()["changes_between_pages"], u64::from(LIMITS.restarts_max) + 1, "a bounded number of readings");
}

async fn pages_of_two_versions_are_never_mixed(paged: &Paged<'_>) {
    let api = paged.fresh();
    paged.inject(ApiFault::IgnoresIfMatch);
    paged.inject(ApiFault::ChangesBetweenPages { times: 1 });
    let read = snapshot(api.as_ref(), None).await;
    let mut rows = productos();
    rows.rotate_left(1);
    assert_eq!(texts(&read.batches), expected(&rows, &columns()));
    assert_eq!(paged.hits(), BTreeMap::from([("changes_between_pages", 1), ("ignores_if_match", 1)]));
}

async fn a_snapshot_that_misses_a_row_is_refused(paged: &Paged<'_>) {
    let api = paged.fresh();
    paged.inject(ApiFault::LosesLastRow { times: 1 });
    let error = refused(api.as_ref()).await;
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Retryable, Some("INCOMPLETE_SNAPSHOT")));
    assert!(error.to_string().contains("found 4 rows on 3 pages, expected 5"), "{error}");
    assert_eq!(snapshot(api.as_ref(), None).await.batches.iter().map(RecordBatch::num_rows).sum::<usize>(), 5);
}

async fn a_refusal_has_its_disposition_and_its_wait(paged: &Paged<'_>) {
    for (status, wait) in [(429, Some(30)), (503, Some(7)), (503, None), (500, None), (502, None), (504, None)] {
        let api = paged.fresh();
        paged.inject(ApiFault::Refused { status, retry_after_s: wait, times: 1 });
        let error = refused(api.as_ref()).await;
        assert_eq!((error.disposition, error.code), (Disposition::Retryable, Some(status.to_string())));
        assert_eq!(error.retry_after, wait.map(Duration::from_secs), "{status}");
        assert_eq!(paged.hits(), BTreeMap::from([("refused", 1)]));
        snapshot(api.as_ref(), None).await;
    }
    for status in [400, 403, 404, 410, 301] {
        let api = paged.fresh();
        paged.inject(ApiFault::Refused { status, retry_after_s: None, times: 1 });
        let error = refused(api.as_ref()).await;
        assert_eq!((error.disposition, error.code), (Disposition::Permanent, Some(status.to_string())));
        assert_eq!(error.retry_after, None);
    }
}

async fn credentials_are_permanent_and_never_shown(paged: &Paged<'_>) {
    paged.fresh();
    let stranger = (paged.client)("hunter2", LIMITS);
    let error = refused(stranger.as_ref()).await;
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Permanent, Some("401")));
    assert!(!format!("{error:?} {} {stranger:?}", error.chain()).contains("hunter2"), "{error:?} {stranger:?}");
    let api = paged.fresh();
    paged.inject(ApiFault::TokenExpired { from: chrono::DateTime::UNIX_EPOCH });
    assert_eq!(refused(api.as_ref()).await.code.as_deref(), Some("401"));
    assert_eq!(paged.hits(), BTreeMap::from([("token_expired", 1)]));
    lock(&paged.service).rotate(TOKEN);
    snapshot(api.as_ref(), None).await;
}

async fn silence_and_lost_connections_are_retryable(paged: &Paged<'_>) {
    let api = paged.fresh();
    paged.inject(ApiFault::Hangs { times: 1 });
    let error = refused(api.as_ref()).await;
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Retryable, Some("TIMEOUT")), "{}", error.chain());
    snapshot(api.as_ref(), None).await;
    paged.inject(ApiFault::Down { from: chrono::DateTime::UNIX_EPOCH, to: chrono::DateTime::<Utc>::MAX_UTC });
    let error = refused(api.as_ref()).await;
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Retryable, Some("CONNECTION")), "{}", error.chain());
    assert_eq!(paged.hits(), BTreeMap::from([("hangs", 1), ("down", 1)]));
}

async fn what_is_no_page_is_permanent_and_named(paged: &Paged<'_>) {
    let cases: [(ApiFault, &[&str]); 3] = [
        (ApiFault::Html { times: 1 }, &["page 1", "expected value at line 1 column 1"]),
        (ApiFault::Truncated { times: 1 }, &["page 1", "EOF while parsing"]),
        (
            ApiFault::RenamedField { from: "categoria".into(), to: "category".into() },
            &["page 1", "row 1: column category is not in the contract"],
        ),
    ];
    for (fault, words) in cases {
        let api = paged.fresh();
        paged.inject(fault);
        let error = refused(api.as_ref()).await;
        assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Permanent, Some("MALFORMED")));
        for word in words {
            assert!(error.chain().contains(word), "{word:?} is missing in: {}", error.chain());
        }
        assert_eq!(paged.hits().into_values().sum::<u64>(), 1);
    }
}

async fn pages_and_bytes_are_bounded(paged: &Paged<'_>) {
    paged.fresh();
    for (limits, words) in [
        (PageLimits { pages_max: 2, ..LIMITS }, "more than 2 pages"),
        (PageLimits { snapshot_bytes_max: 300, ..LIMITS }, "more than 300 bytes"),
    ] {
        let error = refused((paged.client)(TOKEN, limits).as_ref()).await;
        assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Permanent, Some("TOO_LARGE")));
        assert!(error.chain().contains(words), "{}", error.chain());
    }
}
