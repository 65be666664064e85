//! The event log in a folder, for one process: the broker's state machine over a write-ahead log.
//!
//! Each request's effects are one frame with a checksum, appended before the reply. A frame that makes a promise (a
//! commit, a send without a transaction, a topic) is synced to the disk first; the records of an open transaction become
//! durable with its commit. Opening reads the newest snapshot and the frames behind it, and cuts a torn last frame off:
//! whatever kill or power cut came, everything acknowledged is there and nothing uncommitted is seen. Damage before the
//! last sync cannot come from a cut, so it is an error and never repaired silently. Kept records are in memory, up to
//! [`Limits::log_bytes_max`]; what is larger needs Kafka.
#![expect(clippy::disallowed_methods, reason = "an adapter opens files, and waits for the disk on a thread for blocking work")]

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use serde::{Serialize, de::DeserializeOwned};
use simulacro_core::ports::{Env, PortError, Result};
use simulacro_log::{Broker, Client, Code, Effect, Limits, Link, LinkError, Refusal, Request, Response, Settings, State};
use tokio::sync::watch;

/// "SLG1": where a frame begins.
const MAGIC: u32 = u32::from_le_bytes(*b"SLG1");
/// Magic, length of the payload, checksum, and how much of the file was synced when the frame was written.
const HEADER: usize = 4 + 4 + 4 + 8;

/// The embedded event log.
pub type EmbeddedLog = Client<FileLink>;

/// How the embedded log is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedLogConfig {
    /// Bounds of the broker.
    pub limits: Limits,
    /// How clients behave.
    pub settings: Settings,
    /// Size of the write-ahead log, in bytes, at which a snapshot replaces it.
    pub wal_bytes_max: u64,
}

impl EmbeddedLogConfig {
    /// Kafka's limits, 1 GiB of records, and a snapshot every 256 MiB of changes.
    pub const STANDARD: Self = Self { limits: Limits::KAFKA, settings: Settings::KAFKA, wal_bytes_max: 256 << 20 };
}

/// Opens or creates the log in the folder `dir`.
///
/// # Errors
/// `Retryable` with code `BUSY` while another process has it open; `Permanent` with code `CORRUPT_MESSAGE` when a file is
/// damaged where it was synced; `Permanent` when the folder cannot be used. The text names the file.
pub async fn open_embedded_log(dir: &Path, env: Arc<dyn Env>, config: EmbeddedLogConfig) -> Result<EmbeddedLog> {
    let EmbeddedLogConfig { limits, settings, wal_bytes_max } = config;
    let dir = dir.to_owned();
    let opened = tokio::task::spawn_blocking(move || Disk::open(&dir, wal_bytes_max)).await;
    let (disk, state) = opened.map_err(|e| PortError::permanent("open the event log").because(e))??;
    let inner = Inner { broker: Broker::new(limits, state), disk, failed: false };
    let (version, _) = watch::channel(0);
    Ok(Client::new(Arc::new(FileLink { inner: Arc::new(Mutex::new(inner)), env, version }), settings))
}

#[derive(Debug)]
struct Inner {
    broker: Broker,
    disk: Disk,
    /// A write has failed, so memory is ahead of the disk: only opening again tells what is there.
    failed: bool,
}

impl Inner {
    fn call(&mut self, now_ms: i64, request: Request) -> Result<Response, LinkError> {
        let storage =
            |disk: &Disk, why: &str| Refusal::new(Code::KafkaStorageError, format!("write {}: {why}", disk.wal.display()));
        if self.failed {
            return Err(LinkError::Refused(storage(&self.disk, "an earlier write failed; open the log again")));
        }
        let response = self.broker.handle(now_ms, request);
        let effects = self.broker.take_effects();
        if let Err(error) = self.disk.append(&effects) {
            self.failed = true;
            return Err(LinkError::Lost(storage(&self.disk, &error.to_string())));
        }
        let before = self.disk.number;
        if self.disk.position > self.disk.wal_bytes_max
            && let Err(error) = self.disk.snapshot(self.broker.state())
        {
            // The effects are durable, so the reply stands. Only a switch of files that is not durable itself ends writing.
            self.failed = self.disk.number != before;
            eprintln!("event log: snapshot in {}: {error}", self.disk.dir.display());
            self.disk.wal_bytes_max = self.disk.wal_bytes_max.saturating_mul(2);
        }
        response.map_err(LinkError::Refused)
    }
}

/// The way to the broker in this process.
#[derive(Debug)]
pub struct FileLink {
    inner: Arc<Mutex<Inner>>,
    env: Arc<dyn Env>,
    version: watch::Sender<u64>,
}

#[async_trait]
impl Link for FileLink {
    async fn call(&self, request: Request) -> Result<Response, LinkError> {
        let (inner, env) = (self.inner.clone(), self.env.clone());
        let called = tokio::task::spawn_blocking(move || {
            let Ok(mut inner) = inner.lock() else { return None };
            // Read under the lock, so that time does not run backwards from one request to the next.
            let response = inner.call(env.now().timestamp_millis(), request);
            Some((response, inner.broker.version()))
        });
        let Ok(Some((response, version))) = called.await else {
            return Err(LinkError::Lost(Refusal::new(Code::KafkaStorageError, "call the event log: it has panicked")));
        };
        self.version.send_if_modified(|seen| version > *seen && std::mem::replace(seen, version) != version);
        response
    }
    fn now(&self) -> DateTime<Utc> {
        self.env.now()
    }
    async fn sleep(&self, duration: Duration) {
        self.env.sleep(duration).await;
    }
    fn version(&self) -> u64 {
        *self.version.borrow()
    }
    async fn changed(&self, seen: u64, wait: Duration) {
        let mut versions = self.version.subscribe();
        tokio::select! {
            biased;
            _ = versions.wait_for(|version| *version != seen) => {}
            () = self.env.sleep(wait) => {}
        }
    }
}

/// The files: `lock`, and `snapshot-N` with `wal-N`, the changes since it.
#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    wal: PathBuf,
    file: File,
    number: u64,
    /// Length of the log.
    position: u64,
    /// Length that is known to be on the disk.
    synced: u64,
    wal_bytes_max: u64,
    /// Locked while this process lives.
    _lock: File,
}

fn cannot(doing: &str, path: &Path) -> impl FnOnce(io::Error) -> PortError {
    let what = format!("{doing} {}", path.display());
    move |e| PortError::permanent(what).because(e)
}

fn encode<T: Serialize>(value: &T, synced: u64) -> io::Result<Vec<u8>> {
    struct Buffer(Vec<u8>);
    impl postcard::ser_flavors::Flavor for Buffer {
        type Output = Vec<u8>;
        fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
            self.0.push(byte);
            Ok(())
        }
        fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
            self.0.extend_from_slice(bytes);
            Ok(())
        }
        fn finalize(self) -> postcard::Result<Vec<u8>> {
            Ok(self.0)
        }
    }
    let mut frame = Vec::with_capacity(256);
    frame.extend(MAGIC.to_le_bytes());
    frame.extend([0; 8]);
    frame.extend(synced.to_le_bytes());
    let mut frame = postcard::serialize_with_flavor(value, Buffer(frame)).map_err(io::Error::other)?;
    let length = u32::try_from(frame.len() - HEADER).map_err(|_| io::Error::other("a frame above 4 GiB"))?;
    frame[4..8].copy_from_slice(&length.to_le_bytes());
    let checksum = crc32fast::hash(&frame[12..]);
    frame[8..12].copy_from_slice(&checksum.to_le_bytes());
    Ok(frame)
}

/// The frame at the start of `bytes`, if it is whole: its payload, and what was synced when it was written.
fn frame(bytes: &[u8]) -> Option<(&[u8], u64)> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let length = word(4)? as usize;
    let checked = bytes.get(12..HEADER.checked_add(length)?)?;
    let whole = word(0)? == MAGIC && word(8)? == crc32fast::hash(checked);
    whole.then(|| (&checked[8..], u64::from_le_bytes(checked[..8].try_into().unwrap_or_default())))
}

fn decode<T: DeserializeOwned>(payload: &[u8], path: &Path) -> Result<T> {
    let what = || format!("understand a frame of {}", path.display());
    postcard::from_bytes(payload).map_err(|e| PortError::permanent(what()).code("CORRUPT_MESSAGE").because(e))
}

impl Disk {
    fn open(dir: &Path, wal_bytes_max: u64) -> Result<(Self, State)> {
        fs::create_dir_all(dir).map_err(cannot("create folder", dir))?;
        let lock_path = dir.join("lock");
        let options = || File::options().create(true).truncate(false).write(true).clone();
        let lock = options().open(&lock_path).map_err(cannot("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let what = format!("open the event log in {}: another process has it open", dir.display());
                return Err(PortError::retryable(what).code("BUSY"));
            }
            Err(fs::TryLockError::Error(e)) => return Err(cannot("lock", &lock_path)(e)),
        }
        let mut numbers = Vec::new();
        for entry in fs::read_dir(dir).map_err(cannot("list", dir))? {
            let name = entry.map_err(cannot("list", dir))?.file_name();
            numbers.extend(name.to_str().and_then(|n| n.strip_prefix("snapshot-")).and_then(|n| n.parse::<u64>().ok()));
        }
        let number = numbers.into_iter().max().unwrap_or(0);
        let mut state = State::default();
        if number > 0 {
            let path = dir.join(format!("snapshot-{number}"));
            let bytes = fs::read(&path).map_err(cannot("read", &path))?;
            let damaged = || PortError::permanent(format!("read {}: it is damaged", path.display())).code("CORRUPT_MESSAGE");
            state = decode(frame(&bytes).ok_or_else(damaged)?.0, &path)?;
            if !state.is_possible() {
                return Err(damaged());
            }
        }
        let wal = dir.join(format!("wal-{number}"));
        let file = options().read(true).open(&wal).map_err(cannot("open", &wal))?;
        let bytes = fs::read(&wal).map_err(cannot("read", &wal))?;
        let mut position = 0;
        while let Some((payload, _)) = frame(&bytes[position..]) {
            let effects: Vec<Effect> = decode(payload, &wal)?;
            if !effects.iter().all(Effect::is_possible) {
                let what = format!("read {} at byte {position}: it is damaged", wal.display());
                return Err(PortError::permanent(what).code("CORRUPT_MESSAGE"));
            }
            effects.into_iter().for_each(|effect| state.apply(effect));
            position += HEADER + payload.len();
        }
        // What follows is torn, unless a later frame knows that it had been synced.
        let torn = &bytes[position..];
        let later = (0..torn.len()).filter(|i| torn[*i..].starts_with(&MAGIC.to_le_bytes())).filter_map(|i| frame(&torn[i..]));
        if later.into_iter().any(|(_, synced)| synced > position as u64) {
            let what = format!("read {} at byte {position}: it is damaged where it had been synced", wal.display());
            return Err(PortError::permanent(what).code("CORRUPT_MESSAGE"));
        }
        let position = position as u64;
        file.set_len(position).map_err(cannot("cut the torn end of", &wal))?;
        file.sync_all().map_err(cannot("sync", &wal))?;
        let dir = dir.to_owned();
        let mut disk = Self { dir, wal, file, number, position, synced: position, wal_bytes_max, _lock: lock };
        io::Seek::seek(&mut disk.file, io::SeekFrom::End(0)).map_err(cannot("seek in", &disk.wal))?;
        disk.sync_dir().map_err(cannot("sync", &disk.dir))?;
        disk.forget_older();
        Ok((disk, state))
    }

    fn sync_dir(&self) -> io::Result<()> {
        File::open(&self.dir)?.sync_all()
    }

    /// Older files are of no use to anyone; one that stays is taken away at the next opening.
    fn forget_older(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|n| n.strip_prefix("snapshot-").or_else(|| n.strip_prefix("wal-")));
            if number.is_some_and(|n| n.parse::<u64>().map_or(n.ends_with(".tmp"), |n| n < self.number)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn append(&mut self, effects: &[Effect]) -> io::Result<()> {
        if effects.is_empty() {
            return Ok(());
        }
        let frame = encode(&effects, self.synced)?;
        self.file.write_all(&frame)?;
        self.position += frame.len() as u64;
        if effects.iter().any(Effect::is_promise) {
            self.file.sync_data()?;
            self.synced = self.position;
        }
        Ok(())
    }

    /// Writes the state to a file of its own and begins an empty log behind it.
    fn snapshot(&mut self, state: &State) -> io::Result<()> {
        let number = self.number + 1;
        let path = self.dir.join(format!("snapshot-{number}"));
        let draft = self.dir.join(format!("snapshot-{number}.tmp"));
        let mut file = File::create(&draft)?;
        file.write_all(&encode(state, 0)?)?;
        file.sync_all()?;
        let wal = self.dir.join(format!("wal-{number}"));
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&wal)?;
        file.sync_all()?;
        // From here on the new pair is what an opening finds; before, it is the old one.
        fs::rename(&draft, &path)?;
        (self.wal, self.file, self.number, self.position, self.synced) = (wal, file, number, 0, 0);
        self.sync_dir()?;
        self.forget_older();
        Ok(())
    }
}
