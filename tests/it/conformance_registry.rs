//! What a `SchemaRegistry` promises, for the registry in memory, the one in a file, and a real one.
//!
//! A suite uses subjects of its own, named with `run`, so that a registry may be shared and used again.
#![expect(clippy::disallowed_methods, reason = "a test damages a file")]

use std::{sync::Arc, time::Duration};

use simulacro_adapters::{EmbeddedRegistry, HttpRegistry, HttpRegistrySettings};
use simulacro_core::{
    avro::{
        CLICKS, Click, Limits, METRICAS_REALTIME, MetricaRealtime, Row, RowDecoder, RowEncoder, memory::MemoryRegistry,
        register_checked,
    },
    ports::{Compatibility, Disposition, PortError, SchemaRegistry},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::services::registry::{Registry, client};

/// One version of a record that a test changes.
fn record(run: &str, fields: &str) -> String {
    format!(r#"{{"type":"record","name":"Prueba_{run}","namespace":"prueba","fields":[{fields}]}}"#)
}

const ID: &str = r#"{"name":"id","type":"string"}"#;

fn code<T: std::fmt::Debug>(result: Result<T, PortError>, expected: &str) {
    let error = result.expect_err("this is refused");
    assert_eq!((error.code.as_deref(), error.disposition), (Some(expected), Disposition::Permanent), "{}", error.chain());
}

fn same(one: &str, other: &str) {
    let parse = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
    assert_eq!(parse(one), parse(other));
}

async fn what_is_missing_has_its_own_code(registry: &dyn SchemaRegistry, run: &str) {
    let subject = format!("missing-{run}");
    code(registry.latest(&subject).await, "40401");
    code(registry.versions(&subject).await, "40401");
    code(registry.version(&subject, 1).await, "40401");
    code(registry.schema(1_999_999_999).await, "40403");
    registry.register(&subject, &record(run, ID)).await.expect("the first version");
    code(registry.version(&subject, 7).await, "40402");
}

async fn registering_again_changes_nothing(registry: &dyn SchemaRegistry, run: &str) {
    let (subject, other) = (format!("again-{run}"), format!("again-other-{run}"));
    let schema = record(&format!("{run}_again"), ID);
    let id = registry.register(&subject, &schema).await.expect("the first version");
    let spaced = schema.replace(',', " ,\n ");
    assert_eq!(registry.register(&subject, &spaced).await.expect("the same schema"), id);
    assert_eq!(registry.versions(&subject).await.expect("it exists"), [1]);
    // The same schema has the same id everywhere.
    assert_eq!(registry.register(&other, &schema).await.expect("another subject"), id);
    same(&registry.schema(id).await.expect("it has an id"), &schema);
    let latest = registry.latest(&subject).await.expect("it exists");
    assert_eq!((latest.id, latest.version), (id, 1));
    same(&latest.schema, &schema);
}

async fn versions_rise_and_are_kept(registry: &dyn SchemaRegistry, run: &str) {
    let subject = format!("versions-{run}");
    registry.set_compatibility(&subject, Compatibility::BackwardTransitive).await.expect("it may be set before there is one");
    let first = record(run, &format!(r#"{ID},{{"name":"v","type":"int"}}"#));
    let second = record(run, &format!(r#"{ID},{{"name":"v","type":"long"}},{{"name":"w","type":"string","default":""}}"#));
    let ids = [
        registry.register(&subject, &first).await.expect("the first version"),
        registry.register(&subject, &second).await.expect("int becomes long, and a field has a default"),
    ];
    assert_ne!(ids[0], ids[1]);
    assert_eq!(registry.versions(&subject).await.expect("it exists"), [1, 2]);
    assert_eq!(registry.latest(&subject).await.expect("it exists").version, 2);
    let old = registry.version(&subject, 1).await.expect("it is kept");
    assert_eq!((old.id, old.version), (ids[0], 1));
    same(&old.schema, &first);
}

async fn the_level_decides_what_may_follow(registry: &dyn SchemaRegistry, run: &str) {
    let one = record(run, ID);
    let more = record(run, &format!(r#"{ID},{{"name":"v","type":"int"}}"#));
    let defaulted = record(run, &format!(r#"{ID},{{"name":"v","type":"int","default":0}}"#));
    let retyped = record(run, r#"{"name":"id","type":"double"}"#);
    // A field without a default is forward compatible only; its removal is backward compatible only.
    let cases = [
        (Compatibility::Backward, &one, &more, false),
        (Compatibility::Backward, &more, &one, true),
        (Compatibility::Forward, &one, &more, true),
        (Compatibility::Forward, &more, &one, false),
        (Compatibility::Full, &one, &more, false),
        (Compatibility::Full, &one, &defaulted, true),
        (Compatibility::BackwardTransitive, &one, &retyped, false),
        (Compatibility::None, &one, &retyped, true),
    ];
    for (i, (level, old, new, accepted)) in cases.into_iter().enumerate() {
        let subject = format!("level-{run}-{i}");
        registry.register(&subject, old).await.expect("the first version");
        registry.set_compatibility(&subject, level).await.expect("set");
        registry.set_compatibility(&subject, level).await.expect("set again");
        assert_eq!(registry.compatibility(&subject).await.expect("it was set"), level);
        assert_eq!(registry.check(&subject, new).await.expect("a valid schema").compatible, accepted, "case {i}");
        let registered = registry.register(&subject, new).await;
        if accepted {
            registered.expect("what is compatible is registered");
        } else {
            code(registered, "409");
            assert_eq!(registry.versions(&subject).await.expect("it exists"), [1], "nothing was registered");
        }
    }
}

/// A field is dropped, and comes back as another type: the newest version alone would allow it.
async fn transitive_looks_at_every_version(registry: &dyn SchemaRegistry, run: &str) {
    let subject = format!("transitive-{run}");
    let versions = [
        record(run, &format!(r#"{ID},{{"name":"v","type":"int","default":0}}"#)),
        record(run, ID),
        record(run, &format!(r#"{ID},{{"name":"v","type":"string","default":""}}"#)),
    ];
    registry.set_compatibility(&subject, Compatibility::BackwardTransitive).await.expect("set");
    for version in &versions[..2] {
        registry.register(&subject, version).await.expect("compatible");
    }
    code(registry.register(&subject, &versions[2]).await, "409");
    registry.set_compatibility(&subject, Compatibility::Backward).await.expect("set");
    assert!(registry.check(&subject, &versions[2]).await.is_ok());
    registry.register(&subject, &versions[2]).await.expect("the newest version has no such field");
}

async fn what_is_no_schema_is_refused(registry: &dyn SchemaRegistry, run: &str) {
    let subject = format!("invalid-{run}");
    registry.register(&subject, &record(run, ID)).await.expect("the first version");
    registry.set_compatibility(&subject, Compatibility::BackwardTransitive).await.expect("set");
    for schema in [r#""text""#, r#"{"type":"record","name":"A"}"#] {
        code(registry.register(&subject, schema).await, "42201");
        code(registry.check(&subject, schema).await, "42201");
    }
    assert_eq!(registry.versions(&subject).await.expect("it exists"), [1]);
    let anything = registry.check(&format!("free-{run}"), &record(run, ID)).await.expect("a valid schema");
    assert!(anything.compatible, "a subject that does not exist accepts any");
}

/// Records of both topics through a registry, and a breaking change refused by name whatever the registry is set to.
async fn the_topics_go_round(registry: Arc<dyn SchemaRegistry>) {
    let level = Compatibility::default();
    let click = Click {
        user_id: "u1".into(),
        event_type: "purchase".into(),
        page: "/".into(),
        product_id: None,
        monto_cents: -1,
        region: "norte".into(),
        timestamp_ms: 1_710_720_000_123,
    };
    let mut encoder = RowEncoder::<Click>::register(registry.as_ref(), level).await.expect("the shipped schema");
    RowEncoder::<Click>::register(registry.as_ref(), level).await.expect("a restart registers again");
    RowEncoder::<MetricaRealtime>::register(registry.as_ref(), level).await.expect("the shipped schema");
    let mut records: Vec<_> = encoder.encode_rows(std::slice::from_ref(&click)).expect("encoded").into_iter().map(Some).collect();
    records.push(Some(vec![0, 0x7f, 0, 0, 0].into()));
    let limits = Limits { record_bytes_max: 1 << 20 };
    let mut decoder = RowDecoder::<Click>::new(registry.clone(), limits).expect("columns");
    let decoded = decoder.decode(&records).await.expect("the registry answers");
    assert_eq!(Click::from_batch(&decoded.batch).expect("typed columns"), [click]);
    assert_eq!(decoded.rejects.iter().map(|r| (r.index, r.reason.code())).collect::<Vec<_>>(), [(1, "unknown_schema")]);
    let breaking = CLICKS.replace(r#""name": "region", "type": "string""#, r#""name": "region", "type": "long""#);
    let error = register_checked(registry.as_ref(), Click::SUBJECT, &breaking, level).await.expect_err("a type changed");
    assert!(error.to_string().contains("Click.region: string in version"), "{error}");
    let verdict = registry.check(MetricaRealtime::SUBJECT, METRICAS_REALTIME).await.expect("a valid schema");
    assert!(verdict.compatible);
}

async fn conforms(registry: Arc<dyn SchemaRegistry>, run: &str) {
    what_is_missing_has_its_own_code(registry.as_ref(), run).await;
    registering_again_changes_nothing(registry.as_ref(), run).await;
    versions_rise_and_are_kept(registry.as_ref(), run).await;
    the_level_decides_what_may_follow(registry.as_ref(), run).await;
    transitive_looks_at_every_version(registry.as_ref(), run).await;
    what_is_no_schema_is_refused(registry.as_ref(), run).await;
    the_topics_go_round(registry).await;
}

#[tokio::test]
async fn the_registry_in_memory_conforms() {
    conforms(Arc::new(MemoryRegistry::default()), "a").await;
}

#[tokio::test]
async fn the_registry_in_a_file_conforms_and_a_second_process_sees_the_same() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("registry/schemas.json");
    conforms(Arc::new(EmbeddedRegistry::open(&path).expect("a new registry")), "a").await;
    let again = EmbeddedRegistry::open(&path).expect("the same registry");
    assert_eq!(again.versions("versions-a").await.expect("it was kept"), [1, 2]);
    conforms(Arc::new(again), "b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_register_at_once_lose_nothing() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("schemas.json");
    let register = |i: usize| {
        let registry = EmbeddedRegistry::open(&path).expect("the registry");
        tokio::spawn(async move { registry.register(&format!("s{i}"), &record(&i.to_string(), ID)).await.expect("registered") })
    };
    let mut ids = Vec::new();
    for task in (0..16).map(register).collect::<Vec<_>>() {
        ids.push(task.await.expect("no panic"));
    }
    ids.sort_unstable();
    assert_eq!(ids, (1..=16).collect::<Vec<u32>>());
}

#[tokio::test]
async fn a_damaged_file_is_named_and_kept() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("schemas.json");
    std::fs::write(&path, "{\"schemas\":").expect("written");
    let error = EmbeddedRegistry::open(&path).expect_err("no registry").chain();
    assert!(error.contains("schemas.json"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).expect("it is there"), "{\"schemas\":");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_registry_conforms() {
    let Some(registry) = Registry::shared().await else { return };
    let run = format!("{:x}", std::time::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos());
    conforms(Arc::new(registry), &run).await;
}

#[tokio::test]
async fn a_registry_that_refuses_connections_changed_nothing() {
    let port = TcpListener::bind("127.0.0.1:0").await.and_then(|l| l.local_addr()).expect("a free port").port();
    let registry = client(&format!("http://127.0.0.1:{port}"));
    let error = registry.register("s", "\"int\"").await.expect_err("nobody listens");
    assert_eq!((error.disposition, error.code.as_deref()), (Disposition::Retryable, Some("CONNECTION")));
}

/// Answers one connection: reads the request, then writes `answer` and closes, or waits for ever.
async fn peer(answer: Option<&'static str>) -> HttpRegistry {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            match answer {
                Some(text) => {
                    let _ = stream.write_all(text.as_bytes()).await;
                }
                None => held.push(stream),
            }
        }
    });
    let (connect_timeout, timeout) = (Duration::from_secs(2), Duration::from_millis(300));
    HttpRegistry::new(HttpRegistrySettings { url, credentials: None, connect_timeout, timeout }).expect("a valid address")
}

#[tokio::test]
async fn an_answer_that_never_comes_leaves_a_change_unknown_and_a_read_retryable() {
    for (answer, expected) in [
        (None, "TIMEOUT"),
        (Some(""), "CONNECTION"),
        (Some("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]"), "UNEXPECTED_ANSWER"),
    ] {
        let registry = peer(answer).await;
        let change = registry.register("s", "\"int\"").await.expect_err("no answer");
        assert_eq!((change.disposition, change.code.as_deref()), (Disposition::Unknown, Some(expected)), "{}", change.chain());
        let read = registry.schema(1).await.expect_err("no answer");
        assert_eq!((read.disposition, read.code.as_deref()), (Disposition::Retryable, Some(expected)), "{}", read.chain());
    }
}

#[tokio::test]
async fn an_endless_answer_is_cut_off() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let _ = stream.read(&mut [0; 4096]).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n\"").await;
        while stream.write_all(&[b'x'; 65536]).await.is_ok() {}
    });
    let error = client(&url).schema(1).await.expect_err("no end");
    assert!(error.chain().contains("more than 4194304 bytes"), "{}", error.chain());
}
