//! Files that the program keeps, as a disk may give them back.

use std::{
    path::PathBuf,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use simulacro_adapters::{EmbeddedLogConfig, EmbeddedRegistry, open_embedded_log};
use simulacro_core::{
    avro::{CLICKS, memory::Registry},
    ports::{
        Env, SchemaRegistry,
        event_log::{EventLog, OutRecord, TopicPartition, TopicSpec},
    },
};

use super::{named, wait};

/// A folder of its own, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("simulacro-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{e}"));
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A clock that stands still.
#[derive(Debug)]
struct Still;

#[async_trait]
impl Env for Still {
    fn now(&self) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + chrono::Duration::days(19_000)
    }
    async fn sleep(&self, _: Duration) {}
    fn new_id(&self) -> String {
        String::new()
    }
    fn random(&self) -> u64 {
        0
    }
}

/// Opens the log of a folder, and uses it when it opens.
fn use_log(folder: &Folder) {
    let used = wait(async {
        let log = open_embedded_log(&folder.0, Arc::new(Still), EmbeddedLogConfig::STANDARD).await?;
        let spec = TopicSpec { name: "t".into(), partitions: 1, retention: None, compact: false };
        log.create_topic(&spec).await?;
        let at = TopicPartition { topic: "t".into(), partition: 0 };
        let record = OutRecord { topic: "t".into(), partition: Some(0), key: None, value: None, headers: Vec::new() };
        log.producer(None).await?.send(vec![record]).await?;
        let (first, _) = log.offsets("t").await?.get(&0).copied().unwrap_or_default();
        log.read(&at, first, 10).await.map(drop)
    });
    if let Err(error) = used {
        named(error.chain());
    }
}

/// A frame whose checksum fits, so that what is in it is reached.
fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::from(*b"SLG1");
    frame.extend((payload.len() as u32).to_le_bytes());
    let checked = [&0_u64.to_le_bytes(), payload].concat();
    frame.extend(crc32fast::hash(&checked).to_le_bytes());
    frame.extend(checked);
    frame
}

fn payloads(mut file: &[u8]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    while let Some(length) = file.get(4..8).and_then(|word| word.try_into().ok()).map(u32::from_le_bytes) {
        let end = file.len().min(20 + length as usize);
        all.push(file.get(20..end).unwrap_or_default().to_vec());
        file = &file[end..];
    }
    all
}

/// The changes of a log: the bytes of the file, and a frame with these bytes in it.
pub fn event_log_wal(data: &[u8]) {
    for bytes in [data.to_vec(), frame(data)] {
        let folder = Folder::new();
        std::fs::write(folder.0.join("wal-0"), bytes).unwrap_or_else(|e| panic!("{e}"));
        use_log(&folder);
    }
}

/// The whole state of a log.
pub fn event_log_snapshot(data: &[u8]) {
    let folder = Folder::new();
    std::fs::write(folder.0.join("snapshot-1"), frame(data)).unwrap_or_else(|e| panic!("{e}"));
    use_log(&folder);
}

/// The file whose name begins so, of a log in which a little of everything has happened.
fn written(wal_bytes_max: u64, name: &str) -> Vec<u8> {
    let folder = Folder::new();
    let done = wait(async {
        let config = EmbeddedLogConfig { wal_bytes_max, ..EmbeddedLogConfig::STANDARD };
        let log = open_embedded_log(&folder.0, Arc::new(Still), config).await?;
        let spec = TopicSpec { name: "t".into(), partitions: 2, retention: Some(Duration::from_secs(9)), compact: true };
        log.create_topic(&spec).await?;
        let record = |value: &'static str| OutRecord {
            topic: "t".into(),
            partition: Some(0),
            key: Some("k".into()),
            value: Some(value.into()),
            headers: vec![("h".into(), "v".into())],
        };
        log.producer(None).await?.send(vec![record("a")]).await?;
        let mut producer = log.producer(Some("id")).await?;
        producer.begin().await?;
        producer.send(vec![record("b"), record("c")]).await?;
        producer.commit().await?;
        producer.begin().await?;
        producer.send(vec![record("d")]).await?;
        let at = TopicPartition { topic: "t".into(), partition: 1 };
        log.reset("g", &[(at, 0)].into()).await
    });
    done.unwrap_or_else(|e| panic!("{}", e.chain()));
    let files = std::fs::read_dir(&folder.0).into_iter().flatten().flatten().map(|entry| entry.path());
    let file = files.into_iter().find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(name)));
    file.and_then(|path| std::fs::read(path).ok()).unwrap_or_else(|| panic!("no {name}"))
}

/// Seeds of [`event_log_wal`]: the file, and the payload of each of its frames.
pub fn event_log_wal_seeds() -> Vec<Vec<u8>> {
    let file = written(1 << 20, "wal-");
    let all = payloads(&file);
    [vec![file], all].concat()
}

/// Seeds of [`event_log_snapshot`].
pub fn event_log_snapshot_seeds() -> Vec<Vec<u8>> {
    // The log may be so small that every call makes a snapshot.
    payloads(&written(1, "snapshot-"))
}

/// The file of the embedded registry.
pub fn registry_file(data: &[u8]) {
    if let Ok(registry) = serde_json::from_slice::<Registry>(data) {
        let written = serde_json::to_vec(&registry).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(serde_json::from_slice::<Registry>(&written).ok(), Some(registry));
    }
    let folder = Folder::new();
    let path = folder.0.join("registry.json");
    std::fs::write(&path, data).unwrap_or_else(|e| panic!("{e}"));
    let registry = match EmbeddedRegistry::open(&path) {
        Ok(registry) => registry,
        Err(error) => return assert!(error.to_string().contains("registry.json"), "{}", error.chain()),
    };
    let used = wait(async {
        registry.register("ecommerce.clicks-value", CLICKS).await?;
        registry.latest("ecommerce.clicks-value").await
    });
    if let Err(error) = used {
        named(error.chain());
    }
}

/// Seeds of [`registry_file`].
pub fn registry_file_seeds() -> Vec<Vec<u8>> {
    let mut registry = Registry::default();
    for (subject, schema) in [("ecommerce.clicks-value", CLICKS), ("other", "\"string\"")] {
        registry.register(subject, schema).unwrap_or_else(|e| panic!("{}", e.chain()));
    }
    vec![serde_json::to_vec(&registry).unwrap_or_default(), b"{}".to_vec()]
}
