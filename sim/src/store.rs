//! The simulated object store: a state machine with versions and conditional puts, and its two client sides.
//!
//! The service answers at once, because delta-rs calls it from threads on which virtual time stands still. What a call
//! costs is a debt, which the port that made the call awaits afterwards (see `SimLakehouse` and [`PortStore`]).
//!
//! Entries of a Delta log are stored with their JSON keys sorted: delta-rs writes them in the order of a hash map.
//! What it leaves out: attributes, and multipart uploads that survive the process that began them.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::{DateTime, Utc};
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyMode, CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart, path::Path,
};
use serde_json::Value;
use sha2::{Digest, Sha256};
use simulacro_core::ports::{Deleted, PortError, Versions};

use crate::{
    faults::{
        StoreFault, StoreStrike, Strikes,
        removal::{Leaves, Removal},
    },
    host::Host,
    interpose,
};

/// What a call costs, whatever it carries.
const LATENCY: Duration = Duration::from_millis(12);

/// How long a client waits for an answer.
const DEADLINE: Duration = Duration::from_secs(30);
/// What the client of a store without an answer waits, when it has no deadline: longer than any story lasts.
const FOR_EVER: Duration = Duration::from_secs(30 * 86_400);

/// What S3 says of a token that has run out, which is no 403.
const EXPIRED: &str = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>";
/// What S3 says of a request whose time is more than a quarter of an hour from its own.
const SKEWED: &str = "<Error><Code>RequestTimeTooSkewed</Code><Message>The difference between the request time and the server's \
                      time is too large.</Message></Error>";

/// What a call wants; faults choose by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Whole objects, conditional or not, and the end of a multipart upload.
    Put,
    /// Objects and ranges.
    Get,
    /// Listings.
    List,
    /// Deletes.
    Delete,
}

/// One version of an object. Versions are kept for ever: overwriting and deleting hide, they do not destroy.
#[derive(Debug, Clone)]
struct Version {
    /// `None` is a delete marker.
    bytes: Option<Bytes>,
    number: u64,
    at: DateTime<Utc>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<Path, Vec<Version>>,
    last_version: u64,
    debt: Duration,
    calls: u64,
    /// Each with the matching calls it has counted, and how often it struck.
    faults: Vec<(StoreFault, u64, Strikes)>,
    /// Whether clients wait for ever.
    patient: bool,
}

/// The service. It outlives the processes that use it.
#[derive(Debug)]
pub struct ObjectService {
    state: Mutex<State>,
    /// The host that uses it: it can be struck down at a call.
    host: Arc<Host>,
}

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp_nanos(interpose::virtual_nanos() as i64)
}

fn failed(path: &Path, status: &'static str, code: &str) -> Error {
    Error::Generic { store: "simulated", source: format!("{path}: {status} {code}").into() }
}

/// Sorts the keys of every JSON object of a Delta log entry, statistics inside strings included.
fn canonical(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let sorted: BTreeMap<String, Value> = map
                .into_iter()
                .map(|(key, value)| match (key.as_str(), value) {
                    ("stats", Value::String(text)) => match serde_json::from_str::<Value>(&text) {
                        Ok(inner) => (key, Value::String(canonical(inner).to_string())),
                        Err(_) => (key, Value::String(text)),
                    },
                    (_, other) => (key, canonical(other)),
                })
                .collect();
            Value::Object(sorted.into_iter().collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(canonical).collect()),
        other => other,
    }
}

fn canonical_log(bytes: Bytes) -> Bytes {
    let Ok(text) = std::str::from_utf8(&bytes) else { return bytes };
    let mut out = String::with_capacity(text.len());
    for line in text.lines() {
        let Ok(value) = serde_json::from_str::<Value>(line) else { return bytes };
        out.push_str(&canonical(value).to_string());
        out.push('\n');
    }
    out.into()
}

impl ObjectService {
    /// An empty store with the faults that will befall it.
    pub fn new(host: Arc<Host>, faults: Vec<StoreFault>) -> Arc<Self> {
        let state = State { faults: faults.into_iter().map(|f| (f, 0, Strikes::default())).collect(), ..State::default() };
        Arc::new(Self { state: Mutex::new(state), host })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often each fault struck, in the order they were given.
    pub fn hits(&self) -> Vec<u64> {
        self.lock().faults.iter().map(|(_, _, strikes)| strikes.hits).collect()
    }

    /// How often each fault struck and when first, in the order they were given.
    pub fn strikes(&self) -> Vec<Strikes> {
        self.lock().faults.iter().map(|(_, _, strikes)| *strikes).collect()
    }

    /// Lets clients wait for ever for an answer that does not come.
    pub fn be_patient(&self) {
        self.lock().patient = true;
    }

    /// Puts the next entry of a Delta table's log, as another engine would; returns its path, for [`Self::take_away`].
    pub fn meddle(&self, table: &str, entry: &'static str) -> Option<String> {
        let mut state = self.lock();
        let folder = Path::from(format!("{table}/_delta_log"));
        let entries = state.objects.iter().filter(|(path, versions)| {
            path.prefix_matches(&folder) && path.as_ref().ends_with(".json") && versions.last().is_some_and(|v| v.bytes.is_some())
        });
        let last = entries.filter_map(|(path, _)| path.filename()?.strip_suffix(".json")?.parse::<u64>().ok()).max()?;
        let path = Path::from(format!("{folder}/{:020}.json", last + 1));
        state.last_version += 1;
        let number = state.last_version;
        let bytes = Some(Bytes::from_static(entry.as_bytes()));
        state.objects.entry(path.clone()).or_default().push(Version { bytes, number, at: now() });
        Some(path.to_string())
    }

    /// Hides an object, as an operator would.
    pub fn take_away(&self, path: &str) {
        let mut state = self.lock();
        state.last_version += 1;
        let number = state.last_version;
        state.objects.entry(Path::from(path)).or_default().push(Version { bytes: None, number, at: now() });
    }

    /// Removes what somebody removes past the platform until now; the strikes of its fault are the objects.
    pub fn remove_due(&self, now: DateTime<Utc>) {
        let mut state = self.lock();
        let State { objects, last_version, faults, .. } = &mut *state;
        for (fault, counted, strikes) in faults {
            let Some(removal) = Removal::of(fault).filter(|r| *counted == 0 && r.is_due(now)) else { continue };
            *counted = 1;
            for (path, versions) in objects.iter_mut() {
                let Some(last) = versions.last().filter(|v| v.bytes.is_some()) else { continue };
                if !removal.takes(path.as_ref(), last.at) {
                    continue;
                }
                strikes.strike(now);
                let bytes = match removal.leaves {
                    Leaves::Nothing => {
                        versions.clear();
                        continue;
                    }
                    Leaves::Versions => None,
                    Leaves::Half => last.bytes.as_ref().map(|bytes| bytes.slice(..bytes.len() / 2)),
                };
                *last_version += 1;
                versions.push(Version { bytes, number: *last_version, at: now });
            }
            objects.retain(|_, versions| !versions.is_empty());
        }
    }

    /// Objects strictly below a prefix whose newest version is a delete marker, with the version before it.
    fn deleted(&self, prefix: &Path) -> Result<Vec<Deleted>> {
        self.enter(Operation::List, prefix)?;
        let state = self.lock();
        let below = state.objects.iter().filter(|(path, _)| path.prefix_matches(prefix) && *path != prefix);
        let hidden = |(path, versions): (&Path, &Vec<Version>)| {
            let marker = versions.last().filter(|v| v.bytes.is_none())?;
            let kept = versions.iter().rev().find(|v| v.bytes.is_some())?;
            Some(Deleted {
                path: path.to_string(),
                version: kept.number.to_string(),
                bytes: kept.bytes.as_ref().map_or(0, |b| b.len() as u64),
                deleted_at: marker.at,
            })
        };
        Ok(below.filter_map(hidden).collect())
    }

    /// Puts a version of a deleted object above its delete marker.
    fn undelete(&self, deleted: &Deleted) -> Result<()> {
        let path = Path::from(deleted.path.as_str());
        self.enter(Operation::Put, &path)?;
        let mut state = self.lock();
        state.last_version += 1;
        let number = state.last_version;
        let missing = || Error::NotFound { path: deleted.path.clone(), source: "404 NoSuchVersion".into() };
        let versions = state.objects.get_mut(&path).ok_or_else(missing)?;
        let kept = versions.iter().find(|v| v.number.to_string() == deleted.version).ok_or_else(missing)?.bytes.clone();
        match versions.last() {
            // A try whose answer was lost has brought it back.
            Some(last) if last.bytes.is_some() && last.bytes == kept => Ok(()),
            Some(last) if last.bytes.is_some() => {
                Err(Error::AlreadyExists { path: deleted.path.clone(), source: "written again since".into() })
            }
            Some(_) | None => {
                versions.push(Version { bytes: kept, number, at: now() });
                Ok(())
            }
        }
    }

    /// The greatest object whose path contains this, in bytes; 0 when there is none.
    pub fn largest(&self, part: &str) -> u64 {
        let state = self.lock();
        let there = state.objects.iter().filter(|(path, _)| path.as_ref().contains(part));
        there.filter_map(|(_, versions)| Some(versions.last()?.bytes.as_ref()?.len() as u64)).max().unwrap_or(0)
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// Takes what the calls since the last time cost.
    pub fn take_debt(&self) -> Duration {
        std::mem::take(&mut self.lock().debt)
    }

    /// Hash over path and bytes of every object that is there now.
    pub fn digest(&self) -> String {
        let mut hash = Sha256::new();
        for (path, versions) in &self.lock().objects {
            if let Some(bytes) = versions.last().and_then(|v| v.bytes.as_ref()) {
                hash.update(path.as_ref());
                hash.update([0]);
                hash.update(Sha256::digest(bytes));
            }
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Paths of the objects that are there now.
    pub fn paths(&self) -> Vec<String> {
        let state = self.lock();
        let there = state.objects.iter().filter(|(_, v)| v.last().is_some_and(|v| v.bytes.is_some()));
        there.map(|(path, _)| path.to_string()).collect()
    }

    /// Counts a call, charges it, and lets the faults strike. Returns what is to become of its answer: lost or cut.
    fn enter(&self, operation: Operation, path: &Path) -> Result<Option<StoreStrike>> {
        let mut state = self.lock();
        state.calls += 1;
        state.debt += LATENCY;
        let (calls, at) = (state.calls, now());
        if !self.host.survives_call(calls) {
            return Err(failed(path, "connection", "ECONNRESET: the caller died"));
        }
        let wait = if state.patient { FOR_EVER } else { DEADLINE };
        let (mut answer, mut refusal, mut waited) = (None, None, Duration::ZERO);
        for (fault, counted, strikes) in &mut state.faults {
            let Some(strike) = fault.strikes(operation, path.as_ref(), at, *counted) else { continue };
            *counted += 1;
            if strike == StoreStrike::Spared {
                continue;
            }
            strikes.strike(at);
            match strike {
                StoreStrike::Spared => {}
                StoreStrike::ReplyLost | StoreStrike::Truncated => answer = Some(strike),
                StoreStrike::SlowDown => refusal = Some(failed(path, "503", "SlowDown: reduce your request rate")),
                StoreStrike::NoSpace => refusal = Some(failed(path, "507", "ENOSPC: no space left on device")),
                StoreStrike::Silence => {
                    waited = wait;
                    refusal = Some(failed(path, "connection", "ETIMEDOUT: operation timed out"));
                }
                StoreStrike::ExpiredToken => refusal = Some(failed(path, "400 Bad Request", EXPIRED)),
                StoreStrike::TooSkewed => {
                    let (path, source) = (path.to_string(), format!("403 Forbidden: {SKEWED}").into());
                    refusal = Some(Error::PermissionDenied { path, source });
                }
            }
            if refusal.is_some() {
                break;
            }
        }
        state.debt += waited;
        refusal.map_or(Ok(answer), Err)
    }

    fn current(state: &State, path: &Path) -> Option<Version> {
        state.objects.get(path)?.last().filter(|v| v.bytes.is_some()).cloned()
    }

    fn put(&self, path: &Path, bytes: Bytes, mode: PutMode) -> Result<PutResult> {
        let lost = self.enter(Operation::Put, path)?;
        let bytes =
            if path.as_ref().contains("/_delta_log/") && path.as_ref().ends_with(".json") { canonical_log(bytes) } else { bytes };
        let mut state = self.lock();
        let present = Self::current(&state, path);
        match (mode, present) {
            (PutMode::Create, Some(_)) => {
                return Err(Error::AlreadyExists { path: path.to_string(), source: "412 PreconditionFailed".into() });
            }
            (PutMode::Update(wanted), present) => {
                let found = present.map(|v| v.number.to_string());
                if found.is_none() || found != wanted.e_tag {
                    let source = format!("412 PreconditionFailed: found {found:?}, expected {:?}", wanted.e_tag).into();
                    return Err(Error::Precondition { path: path.to_string(), source });
                }
            }
            (PutMode::Create | PutMode::Overwrite, _) => {}
        }
        state.last_version += 1;
        let number = state.last_version;
        state.objects.entry(path.clone()).or_default().push(Version { bytes: Some(bytes), number, at: now() });
        if lost == Some(StoreStrike::ReplyLost) {
            return Err(failed(path, "connection", "ECONNRESET: the answer was lost"));
        }
        Ok(PutResult { e_tag: Some(number.to_string()), version: Some(number.to_string()) })
    }

    fn meta(path: &Path, version: &Version) -> ObjectMeta {
        ObjectMeta {
            location: path.clone(),
            last_modified: version.at,
            size: version.bytes.as_ref().map_or(0, |b| b.len() as u64),
            e_tag: Some(version.number.to_string()),
            version: Some(version.number.to_string()),
        }
    }

    fn get(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let cut = self.enter(Operation::Get, path)? == Some(StoreStrike::Truncated);
        let missing = || Error::NotFound { path: path.to_string(), source: "404 NoSuchKey".into() };
        let state = self.lock();
        let version = match &options.version {
            None => Self::current(&state, path).ok_or_else(missing)?,
            Some(wanted) => {
                let all = state.objects.get(path).ok_or_else(missing)?;
                all.iter().find(|v| v.number.to_string() == *wanted).cloned().ok_or_else(missing)?
            }
        };
        let meta = Self::meta(path, &version);
        options.check_preconditions(&meta)?;
        let bytes = version.bytes.ok_or_else(missing)?;
        let whole = bytes.len() as u64;
        let range = match options.range {
            None => 0..whole,
            Some(range) => range
                .as_range(whole)
                .map_err(|e| Error::Generic { store: "simulated", source: format!("416 InvalidRange: {e}").into() })?,
        };
        let part = bytes.slice(range.start as usize..range.end as usize);
        let body = if cut {
            // The client counts: what comes is less than the header said.
            let short = failed(path, "connection", "end of file before message length reached");
            vec![Ok(part.slice(..part.len() / 2)), Err(short)]
        } else {
            vec![Ok(part)]
        };
        let payload = GetResultPayload::Stream(futures::stream::iter(body).boxed());
        Ok(GetResult { payload, meta, range, attributes: Default::default() })
    }

    fn delete(&self, path: &Path) -> Result<()> {
        let lost = self.enter(Operation::Delete, path)?;
        let mut state = self.lock();
        if Self::current(&state, path).is_some() {
            state.last_version += 1;
            let number = state.last_version;
            state.objects.entry(path.clone()).or_default().push(Version { bytes: None, number, at: now() });
        }
        match lost {
            Some(StoreStrike::ReplyLost) => Err(failed(path, "connection", "ECONNRESET: the answer was lost")),
            _ => Ok(()),
        }
    }

    /// Objects strictly below `prefix`, in order of path.
    fn list(&self, prefix: Option<&Path>, after: Option<&Path>) -> Result<Vec<ObjectMeta>> {
        let root = Path::default();
        let prefix = prefix.unwrap_or(&root);
        self.enter(Operation::List, prefix)?;
        let state = self.lock();
        Ok(state
            .objects
            // Paths are in order of their text, so what is below a prefix stands together.
            .range(prefix.clone()..)
            .take_while(|(path, _)| path.as_ref().starts_with(prefix.as_ref()))
            .filter(|(path, _)| path.prefix_match(prefix).is_some_and(|mut rest| rest.next().is_some()))
            .filter(|(path, _)| after.is_none_or(|after| *path > after))
            .filter_map(|(path, versions)| versions.last().filter(|v| v.bytes.is_some()).map(|v| Self::meta(path, v)))
            .collect())
    }

    fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let root = Path::default();
        let base = prefix.unwrap_or(&root);
        let (mut objects, mut folders) = (Vec::new(), BTreeSet::new());
        for meta in self.list(prefix, None)? {
            let mut rest: Vec<_> = match meta.location.prefix_match(base) {
                Some(rest) => rest.take(2).collect(),
                None => continue,
            };
            if rest.len() == 2 {
                folders.insert(base.clone().join(rest.swap_remove(0)));
            } else {
                objects.push(meta);
            }
        }
        Ok(ListResult { objects, common_prefixes: folders.into_iter().collect() })
    }

    fn copy(&self, from: &Path, to: &Path, mode: CopyMode) -> Result<()> {
        let source = {
            self.enter(Operation::Get, from)?;
            Self::current(&self.lock(), from)
        };
        let missing = || Error::NotFound { path: from.to_string(), source: "404 NoSuchKey".into() };
        let bytes = source.and_then(|v| v.bytes).ok_or_else(missing)?;
        let mode = match mode {
            CopyMode::Create => PutMode::Create,
            CopyMode::Overwrite => PutMode::Overwrite,
        };
        self.put(to, bytes, mode).map(|_| ())
    }
}

/// A client below the lakehouse port: it never waits, whatever thread it is called on.
#[derive(Debug)]
pub struct DirectStore(pub Arc<ObjectService>);

impl fmt::Display for DirectStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated")
    }
}

#[async_trait]
impl ObjectStore for DirectStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.0.put(location, payload.into(), opts.mode)
    }
    async fn put_multipart_opts(&self, location: &Path, _opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        Ok(Box::new(Upload { service: self.0.clone(), path: location.clone(), parts: Vec::new() }))
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.0.get(location, options)
    }
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let mut parts = Vec::with_capacity(ranges.len());
        for range in ranges {
            parts.push(self.get_range(location, range.clone()).await?);
        }
        Ok(parts)
    }
    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let service = self.0.clone();
        locations.map(move |path| path.and_then(|path| service.delete(&path).map(|()| path))).boxed()
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        stream_of(self.0.list(prefix, None))
    }
    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        stream_of(self.0.list(prefix, Some(offset)))
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix)
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy(from, to, options.mode)
    }
}

fn stream_of(listing: Result<Vec<ObjectMeta>>) -> BoxStream<'static, Result<ObjectMeta>> {
    match listing {
        Ok(all) => futures::stream::iter(all.into_iter().map(Ok)).boxed(),
        Err(e) => futures::stream::iter([Err(e)]).boxed(),
    }
}

#[derive(Debug)]
struct Upload {
    service: Arc<ObjectService>,
    path: Path,
    parts: Vec<Bytes>,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.parts.push(data.into());
        let entered = self.service.enter(Operation::Put, &self.path);
        Box::pin(async move { entered.map(|_| ()) })
    }
    async fn complete(&mut self) -> Result<PutResult> {
        let whole: Vec<u8> = self.parts.drain(..).flatten().collect();
        self.service.put(&self.path, whole.into(), PutMode::Overwrite)
    }
    async fn abort(&mut self) -> Result<()> {
        self.parts.clear();
        Ok(())
    }
}

/// The store's versions, as the port that core uses.
#[derive(Debug)]
pub struct SimVersions(pub Arc<ObjectService>);

fn port_error(what: String, error: Error) -> PortError {
    match error {
        Error::NotFound { .. } | Error::AlreadyExists { .. } => PortError::permanent(what).because(error),
        other => PortError::unknown(what).because(other),
    }
}

#[async_trait]
impl Versions for SimVersions {
    async fn list_deleted(&self, prefix: &str) -> simulacro_core::ports::Result<Vec<Deleted>> {
        let result = self.0.deleted(&Path::from(prefix));
        settle(&self.0).await;
        result.map_err(|e| port_error(format!("list deleted objects below {prefix}"), e))
    }
    async fn undelete(&self, deleted: &Deleted) -> simulacro_core::ports::Result<()> {
        let result = self.0.undelete(deleted);
        settle(&self.0).await;
        result.map_err(|e| port_error(format!("undelete {}", deleted.path), e))
    }
}

/// The store as the port that core uses: each call takes virtual time, and a dead caller never hears back.
#[derive(Debug)]
pub struct PortStore {
    direct: DirectStore,
}

impl PortStore {
    /// A client of the service on its host.
    pub fn new(service: Arc<ObjectService>) -> Self {
        Self { direct: DirectStore(service) }
    }

    async fn paid<T>(&self, result: T) -> T {
        settle(&self.direct.0).await;
        result
    }
}

/// Awaits what calls have cost; never returns in a process that has died.
pub async fn settle(service: &ObjectService) {
    service.host.only_alive().await;
    let debt = service.take_debt();
    service.host.sleep(debt).await;
    service.host.only_alive().await;
}

impl fmt::Display for PortStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("simulated")
    }
}

#[async_trait]
impl ObjectStore for PortStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let result = self.direct.put_opts(location, payload, opts).await;
        self.paid(result).await
    }
    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let result = self.direct.put_multipart_opts(location, opts).await;
        self.paid(result).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let result = self.direct.get_opts(location, options).await;
        self.paid(result).await
    }
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let result = self.direct.get_ranges(location, ranges).await;
        self.paid(result).await
    }
    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.settled(self.direct.delete_stream(locations))
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.settled(self.direct.list(prefix))
    }
    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.settled(self.direct.list_with_offset(prefix, offset))
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let result = self.direct.list_with_delimiter(prefix).await;
        self.paid(result).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let result = self.direct.copy_opts(from, to, options).await;
        self.paid(result).await
    }
}

impl PortStore {
    /// Awaits the cost before the first item and after the last.
    fn settled<T: Send + 'static>(&self, items: BoxStream<'static, T>) -> BoxStream<'static, T> {
        let (before, after) = (self.direct.0.clone(), self.direct.0.clone());
        let first = futures::stream::once(async move {
            settle(&before).await;
            items
        })
        .flatten();
        let last = futures::stream::once(async move {
            settle(&after).await;
        })
        .filter_map(|()| futures::future::ready(None));
        first.chain(last).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(faults: Vec<StoreFault>) -> Arc<ObjectService> {
        ObjectService::new(Arc::new(Host::new("worker", None)), faults)
    }

    #[test]
    fn old_versions_are_kept_and_deletes_hide() {
        let (store, path) = (service(vec![]), Path::from("a/b"));
        let first = store.put(&path, "one".into(), PutMode::Create).expect("a free name");
        assert!(matches!(store.put(&path, "two".into(), PutMode::Create), Err(Error::AlreadyExists { .. })));
        store.put(&path, "two".into(), PutMode::Overwrite).expect("overwritten");
        store.delete(&path).expect("deleted");
        assert!(matches!(store.get(&path, GetOptions::default()), Err(Error::NotFound { .. })));
        assert!(store.list(None, None).expect("listed").is_empty());
        let old = GetOptions { version: first.version, ..GetOptions::default() };
        assert_eq!(store.get(&path, old).expect("the first version").meta.size, 3);
    }

    #[test]
    fn an_update_needs_the_present_tag() {
        let (store, path) = (service(vec![]), Path::from("a"));
        let first = store.put(&path, "one".into(), PutMode::Create).expect("a free name");
        store.put(&path, "two".into(), PutMode::Update(first.clone().into())).expect("the present tag");
        let stale = store.put(&path, "three".into(), PutMode::Update(first.into()));
        assert!(matches!(stale, Err(Error::Precondition { .. })));
    }

    #[test]
    fn a_lost_reply_means_that_it_happened() {
        let fault = StoreFault::ReplyLost { operation: Operation::Put, path: "a".into(), after: 0, times: 1 };
        let (store, path) = (service(vec![fault]), Path::from("a"));
        assert!(store.put(&path, "one".into(), PutMode::Create).is_err());
        assert!(matches!(store.put(&path, "one".into(), PutMode::Create), Err(Error::AlreadyExists { .. })));
        assert_eq!(store.hits(), [1]);
    }

    #[tokio::test]
    async fn a_token_that_runs_out_between_two_parts_leaves_nothing_to_be_seen() {
        let fault = StoreFault::TokenExpired { from: DateTime::UNIX_EPOCH, after_puts: 1, to: DateTime::<Utc>::MAX_UTC };
        let service = service(vec![fault]);
        let direct = DirectStore(service.clone());
        let mut upload = direct.put_multipart(&Path::from("a")).await.expect("begun");
        upload.put_part("one".into()).await.expect("the token is good");
        let error = upload.put_part("two".into()).await.expect_err("the token has run out").to_string();
        assert!(error.contains("<Code>ExpiredToken</Code>"), "{error}");
        assert!(upload.complete().await.is_err(), "nor can it be completed");
        assert_eq!((service.paths(), service.hits()), (Vec::new(), vec![2]));
    }

    #[tokio::test]
    async fn a_cut_body_is_an_error_and_no_shorter_object() {
        let fault = StoreFault::Truncated { path: "a".into(), after: 1, times: 1 };
        let service = service(vec![fault]);
        service.put(&Path::from("a"), "abcdef".into(), PutMode::Create).expect("a free name");
        let direct = DirectStore(service.clone());
        let read = async || direct.get(&Path::from("a")).await.expect("an answer").bytes().await;
        assert_eq!(read().await.expect("whole"), "abcdef");
        assert!(read().await.is_err());
        assert_eq!(read().await.expect("whole"), "abcdef");
        assert_eq!(service.hits(), [1]);
    }

    #[test]
    fn a_call_without_an_answer_costs_the_deadline() {
        let times = (DateTime::UNIX_EPOCH, DateTime::<Utc>::MAX_UTC);
        let fault =
            StoreFault::BlackHole { operation: Operation::Get, path: String::new(), from: times.0, to: times.1, times: 1 };
        let store = service(vec![fault]);
        assert!(store.get(&Path::from("a"), GetOptions::default()).is_err());
        assert_eq!(store.take_debt(), DEADLINE + LATENCY);
    }

    #[test]
    fn log_entries_are_stored_with_sorted_keys() {
        let text = "{\"b\":1,\"a\":{\"stats\":\"{\\\"z\\\":1,\\\"y\\\":2}\"}}\n";
        let expected = "{\"a\":{\"stats\":\"{\\\"y\\\":2,\\\"z\\\":1}\"},\"b\":1}\n";
        assert_eq!(canonical_log(text.into()), expected);
    }

    #[tokio::test]
    async fn what_was_removed_is_undeleted_unless_it_went_for_good_or_was_written_again() {
        let removed = |prefix: &str, for_good| StoreFault::PrefixRemoved {
            prefix: prefix.into(),
            spares: String::new(),
            written_from: None,
            at: DateTime::UNIX_EPOCH,
            for_good,
        };
        let service = service(vec![removed("t/", false), removed("u/", true)]);
        for path in ["t/a", "t/b", "u/a", "tt/a"] {
            service.put(&Path::from(path), path.to_owned().into(), PutMode::Create).expect("a free name");
        }
        service.remove_due(now());
        assert_eq!((service.paths(), service.hits()), (vec!["tt/a".to_owned()], vec![2, 1]));
        service.put(&Path::from("t/b"), "new".into(), PutMode::Create).expect("a name that is free again");
        service.remove_due(now());
        assert_eq!(service.hits(), [2, 1], "it strikes once");
        let versions = SimVersions(service.clone());
        let deleted = versions.list_deleted("t").await.expect("listed");
        assert_eq!(deleted.iter().map(|d| (d.path.as_str(), d.bytes)).collect::<Vec<_>>(), [("t/a", 3)]);
        versions.undelete(&deleted[0]).await.expect("undeleted");
        versions.undelete(&deleted[0]).await.expect("harmless to repeat");
        assert_eq!(service.paths(), ["t/a", "t/b", "tt/a"]);
        let stale = Deleted { path: "t/b".into(), ..deleted[0].clone() };
        assert!(versions.undelete(&stale).await.is_err(), "what was written since is not overwritten");
        assert!(versions.list_deleted("u").await.expect("listed").is_empty());
    }

    #[test]
    fn listings_are_in_order_and_strictly_below() {
        let store = service(vec![]);
        for path in ["t/b", "t/a", "t/c/d", "tt/x", "t"] {
            store.put(&Path::from(path), "x".into(), PutMode::Create).expect("a free name");
        }
        let below = store.list(Some(&Path::from("t")), None).expect("listed");
        assert_eq!(below.iter().map(|m| m.location.to_string()).collect::<Vec<_>>(), ["t/a", "t/b", "t/c/d"]);
        let level = store.list_with_delimiter(Some(&Path::from("t"))).expect("listed");
        assert_eq!((level.objects.len(), level.common_prefixes), (2, vec![Path::from("t/c")]));
    }
}
