//! Dimensions in the lake: what describes customers and products, kept by version, and how old it may be.
//!
//! A version is an immutable Parquet copy under `dim/raw/`, made visible by a manifest; asking again and hearing that
//! nothing has changed is a manifest of its own, over the same copy, so the newest manifest tells when the dimension was
//! last known to be true. A day's sales are enriched from the copy itself, which no later version can change under it, and
//! the day's report names the version. The Delta tables beside it are for models and people.
//!
//! Before a version becomes visible its rows are judged by the dimension's contract: one that has a key twice, a null where
//! none may be or too few rows is refused as a whole, and the version before stays. When a dimension does not come, the
//! version before serves for as long as the contract of its table lets it be stale, with one alert and a mark in the day's
//! report; after that the day is held. Facts never degrade.
//!
//! A day takes the customers as they were on the morning after it, when its run is due. A run that comes later finds them in
//! their history, [`CLIENTES_DIM`], so that a day that is run again is what it was; a day older than the history takes the
//! first customers that are known. Products have no history, and a day takes those of its run.
//!
//! What this leaves out: who calls it when, which is the orchestrator's.

pub mod decode;
pub mod from_tables;
pub mod paged;
mod prune;

pub use prune::prune;

use std::{collections::BTreeMap, fmt, time::Duration};

use arrow::record_batch::RecordBatch;
use chrono::{DateTime, NaiveDate, Utc};
use futures::TryStreamExt;
use object_store::{Error as StoreError, ObjectStoreExt, PutMode, path::Path};
use parquet::{arrow::ArrowWriter, basic::Compression, file::properties::WriterProperties};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    batch::{OrderFreeHash, UTC, again, each_row, hex, strings},
    contract::{Contract, catalogue},
    ports::{
        Absent, Alert, Disposition, Effective, Fetched, Input, Mark as Writer, Period, PortError, Ports, Query, Result, Scd2,
        Snapshot, TableWrite, Upsert,
    },
};

/// Name of the pipeline in the ledger that refreshes the dimensions of the API, every six hours.
pub const PIPELINE: &str = "api_dimensiones";
/// Kind of the alert about a dimension that does not come.
pub const ALERT: &str = "dimension_stale";
/// Folder of the history of customers.
pub const CLIENTES_DIM: &str = "dim/clientes_dim";
/// No process judges one candidate for longer: an older one belongs to nobody.
const LEFT_AFTER: Duration = Duration::from_secs(86_400);
/// How often a manifest is tried to be written while rivals write theirs.
const RIVALS: u32 = 8;

/// A dimension. Customers and products enrich the sales.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dimension {
    /// Customers, from the source's table, once a day: `extraer_clientes`.
    Clientes,
    /// Pieces in stock, from the API, every six hours: `api_dimensiones`.
    Inventario,
    /// Prices, from the API, every six hours.
    Precios,
    /// Products, from the API, every six hours.
    Productos,
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Dimension {
    /// All, in order of name.
    pub const ALL: [Self; 4] = [Self::Clientes, Self::Inventario, Self::Precios, Self::Productos];

    /// Its name, at the service and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Clientes => "clientes",
            Self::Inventario => "inventario",
            Self::Precios => "precios",
            Self::Productos => "productos",
        }
    }

    /// Its key, which is a column of the sales too.
    pub fn key(self) -> &'static str {
        match self {
            Self::Clientes => "user_id",
            Self::Inventario | Self::Precios | Self::Productos => "product_id",
        }
    }

    /// The columns that it adds to a sale; a dimension that adds none is not asked for by a day's run.
    pub fn adds(self) -> &'static [&'static str] {
        match self {
            Self::Clientes => &["segmento", "pais"],
            Self::Inventario | Self::Precios => &[],
            Self::Productos => &["categoria", "marca"],
        }
    }

    /// Folder of the Delta table that has its newest version.
    pub fn table(self) -> &'static str {
        match self {
            Self::Clientes => "dim/clientes",
            Self::Inventario => "dim/inventario_dim",
            Self::Precios => "dim/precios_dim",
            Self::Productos => "dim/productos_dim",
        }
    }

    /// How old a version may be for a day's run to take it without asking again. Customers are part of the daily
    /// extraction, so they are always asked for; products have a pipeline of their own.
    fn fresh_for(self) -> Duration {
        match self {
            Self::Clientes => Duration::ZERO,
            Self::Inventario | Self::Precios | Self::Productos => Duration::from_secs(6 * 3_600),
        }
    }

    /// The contract of its rows.
    ///
    /// # Errors
    /// When the file that ships is no contract; a test holds that all are.
    pub fn contract(self) -> Result<Contract> {
        shipped(&format!("{}.yaml", self.name()))
    }

    /// How long the version before may serve while the dimension does not come: what the contract of its table says of
    /// the age of `_loaded_at`.
    ///
    /// # Errors
    /// When that contract says nothing.
    pub fn stale_max(self) -> Result<Duration> {
        let file = format!("{}_dim.yaml", self.name());
        let stored = shipped(&file)?;
        let latency = stored.freshness.iter().find(|f| f.column == "_loaded_at");
        latency.map(|f| f.at_most).ok_or_else(|| {
            PortError::permanent(format!("read contract {file}: found no latency of _loaded_at, expected the longest age"))
        })
    }
}

fn shipped(file: &str) -> Result<Contract> {
    let found = catalogue::FILES.iter().find(|(name, _)| *name == file);
    let (name, text) = found.ok_or_else(|| PortError::permanent(format!("find contract {file} among those that ship")))?;
    Contract::parse(name, text).map_err(|e| PortError::permanent(format!("read contract {file}")).because(e))
}

/// How often a dimension is asked for before the version before has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FetchPolicy {
    /// Calls in all, at least 1.
    pub calls: u32,
    /// Seconds: the longest wait before the second call. It doubles with each; the wait itself is drawn between nothing and
    /// that. A service that asks for more with `Retry-After` gets it.
    pub backoff_s: u64,
    /// Seconds, counted from the first call; no call begins after it.
    pub deadline_s: u64,
}

impl FetchPolicy {
    /// Four calls within ten minutes: a restart of the service is waited for, a longer absence is what stale versions are for.
    pub const STANDARD: Self = Self { calls: 4, backoff_s: 15, deadline_s: 600 };
}

/// A version of a dimension, as its manifest tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Number, from 1, of the manifest.
    pub version: u64,
    /// Contract, id and version.
    pub contract: String,
    /// The service's name for these rows.
    pub etag: Option<String>,
    /// When the service says that they are from.
    pub as_of: Option<DateTime<Utc>>,
    /// When the service last said that they are its present ones: their age counts from here.
    pub confirmed_at: DateTime<Utc>,
    /// Rows.
    pub rows: u64,
    /// Order-free hash of the rows.
    pub content_hash: String,
    /// The Parquet copy.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Its sha256.
    pub sha256: String,
    /// The version that the Delta table was last overwritten for, at least once a day.
    pub published: u64,
    /// When that version was confirmed: `_loaded_at` of the table.
    pub loaded_at: DateTime<Utc>,
}

/// Which version of a dimension a day was enriched with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DimensionUse {
    /// Dimension.
    pub dimension: Dimension,
    /// Version.
    pub version: u64,
    /// Order-free hash of its rows.
    pub content_hash: String,
    /// The service's name for it.
    pub etag: Option<String>,
    /// When it was last known to be true.
    pub confirmed_at: DateTime<Utc>,
    /// Rows.
    pub rows: u64,
    /// Set when the day took the rows that held on an earlier day than the version's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub as_of: Option<NaiveDate>,
}

/// A dimension that a day was enriched with although it is not the present one: what is shown as "datos parciales".
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleDimension {
    /// Dimension.
    pub dimension: Dimension,
    /// The version that served instead.
    pub version: u64,
    /// Its age in seconds.
    pub age_s: u64,
    /// Why the present one did not come.
    pub why: String,
}

/// A version to enrich with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Dimension.
    pub dimension: Dimension,
    /// Version.
    pub version: Version,
    /// Set when it is not the present one.
    pub stale: Option<StaleDimension>,
    /// The day whose rows are taken from the dimension's history; `None` for those of the version.
    pub as_of: Option<NaiveDate>,
}

impl Chosen {
    /// The reference for a report.
    pub fn reference(&self) -> DimensionUse {
        let Version { version, content_hash, etag, confirmed_at, rows, .. } = self.version.clone();
        DimensionUse { dimension: self.dimension, version, content_hash, etag, confirmed_at, rows, as_of: self.as_of }
    }
}

/// Why there is no version to enrich with.
#[derive(Debug)]
pub enum NotChosen {
    /// The lake, the store or the pager failed.
    Port(PortError),
    /// The dimension did not come, and there is no version that may serve instead.
    TooOld {
        /// Dimension.
        dimension: Dimension,
        /// What there is.
        found: String,
        /// What may be used.
        expected: String,
        /// Why it did not come.
        source: PortError,
    },
}

/// Why a dimension was not refreshed.
#[derive(Debug)]
enum NotRefreshed {
    /// It did not come, or its rows are not fit: the version before may serve.
    Source(PortError),
    /// Something of ours failed: nothing can serve.
    Port(PortError),
}

/// What a refresh of one dimension came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refreshed {
    /// Dimension.
    pub dimension: Dimension,
    /// The newest version; `None` when there has never been one.
    pub version: Option<u64>,
    /// Rows of it.
    pub rows: Option<u64>,
    /// The age of the newest version in seconds, and why it was not refreshed; `None` when it was.
    pub failed: Option<String>,
}

fn store_error(what: String, error: StoreError) -> PortError {
    match error {
        StoreError::NotFound { .. } | StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => {
            PortError::permanent(what).because(error)
        }
        // The names are deterministic, so a repeat is safe.
        error => PortError::unknown(what).because(error),
    }
}

fn folder(dimension: Dimension) -> String {
    format!("dim/raw/{dimension}")
}

async fn put(ports: &Ports, path: &Path, bytes: &bytes::Bytes) -> Result<()> {
    again(|| async {
        ports.objects.put(path, bytes.clone().into()).await.map(|_| ()).map_err(|e| store_error(format!("put {path}"), e))
    })
    .await
}

async fn delete(ports: &Ports, path: &Path) -> Result<()> {
    again(|| async {
        match ports.objects.delete(path).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(e) => Err(store_error(format!("delete {path}"), e)),
        }
    })
    .await
}

/// The newest version of a dimension; `None` when there has never been one.
///
/// # Errors
/// When the store fails, or a manifest is damaged.
pub async fn newest(ports: &Ports, dimension: Dimension) -> Result<Option<Version>> {
    let manifests = Path::from(format!("{}/_manifest", folder(dimension)));
    again(|| async {
        let listing = ports.objects.list(Some(&manifests)).map_ok(|m| m.location);
        let all: Vec<Path> = listing.try_collect().await.map_err(|e| store_error(format!("list {manifests}"), e))?;
        let Some(path) = all.into_iter().max() else { return Ok(None) };
        let got = ports.objects.get(&path).await.map_err(|e| store_error(format!("get {path}"), e))?;
        let bytes = got.bytes().await.map_err(|e| store_error(format!("get {path}"), e))?;
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| PortError::permanent(format!("read manifest {path}: found a damaged file")).because(e))
    })
    .await
}

/// When the rows of a dimension's table were last known to be true; `None` for a table of none, or before its first version.
///
/// # Errors
/// As for [`newest`].
pub async fn confirmed(ports: &Ports, table: &str) -> Result<Option<DateTime<Utc>>> {
    let of_customers = (table == CLIENTES_DIM).then_some(Dimension::Clientes);
    let Some(dimension) = of_customers.or_else(|| Dimension::ALL.into_iter().find(|d| d.table() == table)) else {
        return Ok(None);
    };
    Ok(newest(ports, dimension).await?.map(|version| version.confirmed_at))
}

/// Writes the manifest of the next version, made by `next` from the newest one, and so makes it visible.
async fn append(ports: &Ports, dimension: Dimension, next: impl Fn(Option<&Version>) -> Version) -> Result<Version> {
    let (mut tried, mut last): (Option<Version>, Option<PortError>) = (None, None);
    for _ in 0..RIVALS {
        let newest = newest(ports, dimension).await?;
        // An earlier try whose answer was lost.
        if let Some(tried) = tried.filter(|t| newest.as_ref() == Some(t)) {
            return Ok(tried);
        }
        let version = next(newest.as_ref());
        let path = Path::from(format!("{}/_manifest/v{:06}.json", folder(dimension), version.version));
        let body = serde_json::to_vec_pretty(&version).map_err(|e| PortError::permanent(format!("encode {path}")).because(e))?;
        match ports.objects.put_opts(&path, body.into(), PutMode::Create.into()).await {
            Ok(_) => return Ok(version),
            // A rival was first, or our own put whose answer was lost: look again.
            Err(StoreError::AlreadyExists { .. } | StoreError::Precondition { .. }) => {}
            Err(e) => {
                let error = store_error(format!("put {path}"), e);
                if error.disposition == Disposition::Permanent {
                    return Err(error);
                }
                last = Some(error);
            }
        }
        tried = Some(version);
    }
    let error =
        PortError::unknown(format!("append a version of {dimension}: others were first, or no answer came, {RIVALS} times"));
    // Without what the store said nobody knows what to do.
    Err(match last {
        Some(last) => error.because(last),
        None => error,
    })
}

/// The rows as Parquet, with their order-free hash.
fn encode(dimension: Dimension, batches: &[RecordBatch]) -> Result<(Vec<u8>, String, u64)> {
    let failed = |e: parquet::errors::ParquetError| PortError::permanent(format!("encode dimension {dimension}")).because(e);
    let first = batches.first().ok_or_else(|| PortError::permanent(format!("read dimension {dimension}: found no batch")))?;
    let properties =
        WriterProperties::builder().set_compression(Compression::SNAPPY).set_created_by("simulacro".to_owned()).build();
    let mut writer = ArrowWriter::try_new(Vec::new(), first.schema(), Some(properties)).map_err(failed)?;
    let (mut hash, mut rows) = (OrderFreeHash::default(), 0);
    for batch in batches {
        rows += batch.num_rows() as u64;
        each_row(batch, |row| hash.add(row))?;
        writer.write(batch).map_err(failed)?;
    }
    Ok((writer.into_inner().map_err(failed)?, hash.finish(), rows))
}

/// Judges rows that are not visible yet by the contract.
async fn judge(ports: &Ports, dimension: Dimension, contract: &Contract, rows: u64, file: &str) -> Result<(), NotRefreshed> {
    let refused = |found: String, expected: String| {
        let what = format!("refuse dimension {dimension}: found {found}, expected {expected}");
        Err(NotRefreshed::Source(PortError::permanent(what).code("CONTRACT")))
    };
    if !(contract.rows_min..=contract.rows_max).contains(&rows) {
        return refused(format!("{rows} rows"), format!("{} to {} rows", contract.rows_min, contract.rows_max));
    }
    let ask = async |sql: String| {
        let query = Query { sql, inputs: vec![("t".to_owned(), Input::Parquet(vec![file.to_owned()]))] };
        again(|| ports.lakehouse.query(&query)).await.map_err(NotRefreshed::Port)
    };
    let key = contract.key.iter().map(|k| format!("\"{k}\"")).collect::<Vec<_>>().join(", ");
    let named = contract.key.iter().map(|k| format!("CAST(\"{k}\" AS VARCHAR)")).collect::<Vec<_>>().join(", ");
    let twice = format!(
        "WITH twice AS (SELECT concat_ws('|', {named}) AS k, count(*) AS n FROM t GROUP BY {key} HAVING count(*) > 1)
         SELECT k, CAST(n AS VARCHAR), CAST((SELECT count(*) FROM twice) AS VARCHAR) FROM twice ORDER BY k LIMIT 1"
    );
    for batch in ask(twice).await? {
        let column = |at| strings(&batch, at).map_err(NotRefreshed::Port);
        let (keys, times, all) = (column(0)?, column(1)?, column(2)?);
        if let (Some(first), Some(n), Some(all)) = (keys.first(), times.first(), all.first()) {
            let found = format!("{} {first:?} {n} times ({all} keys more than once)", contract.key.join("|"));
            return refused(found, "each key once".into());
        }
    }
    if !contract.clauses.is_empty() {
        let counts = contract.clauses.iter().map(|c| format!("CAST(count(*) FILTER (WHERE {}) AS VARCHAR)", c.broken_when));
        let sql = format!("SELECT {} FROM t", counts.collect::<Vec<_>>().join(", "));
        for batch in ask(sql).await? {
            for (at, clause) in contract.clauses.iter().enumerate() {
                let counts = strings(&batch, at).map_err(NotRefreshed::Port)?;
                if let Some(n) = counts.first().filter(|n| *n != "0") {
                    return refused(format!("{n} rows that break {}", clause.name), "none".into());
                }
            }
        }
    }
    Ok(())
}

fn candidates(dimension: Dimension) -> Path {
    Path::from(format!("{}/_candidate", folder(dimension)))
}

/// Removes candidates that a process has left behind when it died.
async fn sweep(ports: &Ports, dimension: Dimension) -> Result<()> {
    let (folder, now) = (candidates(dimension), ports.env.now());
    let listing = ports.objects.list(Some(&folder));
    let all: Vec<_> = listing.try_collect().await.map_err(|e| store_error(format!("list {folder}"), e))?;
    for left in all.into_iter().filter(|m| (now - m.last_modified).to_std().is_ok_and(|age| age > LEFT_AFTER)) {
        delete(ports, &left.location).await?;
    }
    Ok(())
}

/// Keeps a snapshot as the next version.
async fn accept(ports: &Ports, dimension: Dimension, contract: &Contract, snapshot: Snapshot) -> Result<Version, NotRefreshed> {
    let mine = NotRefreshed::Port;
    let (bytes, content_hash, rows) = encode(dimension, &snapshot.batches).map_err(mine)?;
    let before = newest(ports, dimension).await.map_err(mine)?;
    let (file, bytes, sha256) = match before.filter(|b| b.content_hash == content_hash) {
        // The same rows under another name: the copy that is there will do.
        Some(same) => (same.file, same.bytes, same.sha256),
        None => {
            let sha256 = hex(&Sha256::digest(&bytes));
            // Of this snapshot alone: no rival writes another one there, and no pruning of old copies can mean it.
            let path = Path::from(format!("{}/part-{sha256}-{}.parquet", folder(dimension), ports.env.new_id()));
            // Judged under a name of its own, which nobody else takes away.
            sweep(ports, dimension).await.map_err(mine)?;
            let candidate = Path::from(format!("{}/{}.parquet", candidates(dimension), ports.env.new_id()));
            let (size, bytes) = (bytes.len() as u64, bytes::Bytes::from(bytes));
            put(ports, &candidate, &bytes).await.map_err(mine)?;
            let judged = judge(ports, dimension, contract, rows, candidate.as_ref()).await;
            delete(ports, &candidate).await.map_err(mine)?;
            judged?;
            put(ports, &path, &bytes).await.map_err(mine)?;
            (path.to_string(), size, sha256)
        }
    };
    let Snapshot { etag, as_of, .. } = snapshot;
    let confirmed_at = ports.env.now();
    let next = |newest: Option<&Version>| {
        let version = newest.map_or(0, |n| n.version) + 1;
        let same = newest.filter(|n| n.content_hash == content_hash && n.loaded_at.date_naive() == confirmed_at.date_naive());
        Version {
            version,
            contract: contract.id.clone(),
            etag: etag.clone(),
            as_of,
            confirmed_at,
            rows,
            content_hash: content_hash.clone(),
            file: file.clone(),
            bytes,
            sha256: sha256.clone(),
            published: same.map_or(version, |s| s.published),
            loaded_at: same.map_or(confirmed_at, |s| s.loaded_at),
        }
    };
    append(ports, dimension, next).await.map_err(mine)
}

/// Keeps that `known` is still the present version.
async fn confirm(ports: &Ports, dimension: Dimension, known: Version) -> Result<Version> {
    let confirmed_at = ports.env.now();
    append(ports, dimension, |newest| {
        let number = newest.map_or(0, |n| n.version) + 1;
        let mut version = Version { version: number, confirmed_at, ..known.clone() };
        // Once a day the table is overwritten all the same, so that its age tells what it should. A rival may have put other
        // rows in between, and then the table has to come back to these.
        let moved = newest.is_none_or(|n| n.content_hash != known.content_hash);
        if moved || known.loaded_at.date_naive() != confirmed_at.date_naive() {
            (version.published, version.loaded_at) = (number, confirmed_at);
        }
        version
    })
    .await
}

/// Brings the Delta tables of a dimension to a version. Idempotent: the tables keep the epoch of the version.
///
/// Products are overwritten; customers are merged into `dim/clientes`, which keeps those who have left, and their history
/// goes on in `dim/clientes_dim` from the day of the version.
async fn publish(ports: &Ports, dimension: Dimension, contract: &Contract, version: &Version) -> Result<()> {
    let columns = contract.columns.iter().map(|c| format!("\"{}\"", c.name)).collect::<Vec<_>>().join(", ");
    let loaded_at = version.loaded_at.format("%Y-%m-%dT%H:%M:%S%.6fZ");
    let query = Query {
        sql: format!("SELECT {columns}, arrow_cast('{loaded_at}', {UTC}) AS _loaded_at FROM t"),
        inputs: vec![("t".to_owned(), Input::Parquet(vec![version.file.clone()]))],
    };
    // One writer for all processes: the number of the version orders them.
    let mark = Writer { writer: dimension.name().to_owned(), epoch: i64::try_from(version.published).unwrap_or(i64::MAX) };
    let (table, keys) = (dimension.table().to_owned(), vec![dimension.key().to_owned()]);
    match dimension {
        Dimension::Inventario | Dimension::Precios | Dimension::Productos => {
            let write = TableWrite { table, mark, query };
            again(|| ports.lakehouse.overwrite_table(write.clone())).await?;
        }
        Dimension::Clientes => {
            let change = Scd2 {
                table: CLIENTES_DIM.to_owned(),
                mark: mark.clone(),
                keys: keys.clone(),
                tracked: dimension.adds().iter().map(|c| (*c).to_owned()).collect(),
                effective: Effective::Date(version.loaded_at.date_naive()),
                absent: Absent::Ends,
                period: Period { from: "valido_desde".into(), to: "valido_hasta".into(), current: "es_actual".into() },
                query: query.clone(),
            };
            let upsert = Upsert { table, mark, keys, ignored: vec!["_loaded_at".into()], query };
            again(|| ports.lakehouse.upsert(upsert.clone())).await?;
            again(|| ports.lakehouse.upsert_scd2(change.clone())).await?;
            let _ = ports.lakehouse.maintain(CLIENTES_DIM).await;
        }
    }
    // A log that could not be looked after is as readable as before; the history has the error.
    let _ = ports.lakehouse.maintain(dimension.table()).await;
    Ok(())
}

/// Asks the service, and again as the policy says.
async fn fetch(
    ports: &Ports,
    policy: FetchPolicy,
    dimension: Dimension,
    contract: &Contract,
    known: Option<&str>,
) -> Result<Fetched> {
    let end = ports.env.now() + Duration::from_secs(policy.deadline_s);
    let mut longest = policy.backoff_s;
    for call in 1.. {
        let error = match ports.dimensions.fetch(dimension.name(), &contract.columns, known).await {
            Ok(fetched) => return Ok(fetched),
            Err(error) => error,
        };
        let drawn = Duration::from_secs(ports.env.random() % longest.saturating_add(1));
        let wait = error.retry_after.map_or(drawn, |asked| drawn.max(asked));
        // A service that asks for more time than there is gets all of it: no call is made in vain.
        let late = chrono::Duration::from_std(wait).map_or(true, |wait| ports.env.now() + wait > end);
        if error.disposition == Disposition::Permanent || call >= policy.calls || late {
            return Err(error);
        }
        longest = longest.saturating_mul(2);
        ports.env.sleep(wait).await;
    }
    Err(PortError::unknown(format!("read dimension {dimension}: asked too often")))
}

/// Fetches a dimension, keeps what came and publishes it.
async fn refresh(ports: &Ports, policy: FetchPolicy, dimension: Dimension) -> Result<Version, NotRefreshed> {
    let mine = NotRefreshed::Port;
    let contract = dimension.contract().map_err(mine)?;
    // Under another contract the rows would have to be judged again.
    let known = newest(ports, dimension).await.map_err(mine)?.filter(|k| k.contract == contract.id);
    let etag = known.as_ref().and_then(|k| k.etag.as_deref());
    let fetched = fetch(ports, policy, dimension, &contract, etag).await.map_err(NotRefreshed::Source)?;
    let version = match (fetched, known) {
        (Fetched::Snapshot(snapshot), _) => accept(ports, dimension, &contract, snapshot).await?,
        (Fetched::NotModified, Some(known)) => confirm(ports, dimension, known).await.map_err(mine)?,
        (Fetched::NotModified, None) => {
            let what = format!("read dimension {dimension}: found that it is not modified, expected rows, as none are known");
            return Err(NotRefreshed::Source(PortError::permanent(what).code("MALFORMED")));
        }
    };
    publish(ports, dimension, &contract, &version).await.map_err(mine)?;
    calm(ports, dimension).await.map_err(mine)?;
    Ok(version)
}

fn alert_key(dimension: Dimension) -> String {
    format!("{ALERT}:{dimension}")
}

/// Where it is kept that an alert is open, across processes.
fn alert_mark(dimension: Dimension) -> Path {
    Path::from(format!("{}/_alert.json", folder(dimension)))
}

/// What the mark of an open alert says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    /// Since when.
    since: DateTime<Utc>,
    /// Whether the pager has taken it.
    raised: bool,
}

async fn mark(ports: &Ports, dimension: Dimension) -> Result<Option<Mark>> {
    let path = alert_mark(dimension);
    match ports.objects.get(&path).await {
        Ok(got) => {
            let bytes = got.bytes().await.map_err(|e| store_error(format!("get {path}"), e))?;
            serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| PortError::permanent(format!("read {path}: found a damaged file")).because(e))
        }
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(e) => Err(store_error(format!("get {path}"), e)),
    }
}

async fn put_mark(ports: &Ports, dimension: Dimension, mark: &Mark) -> Result<()> {
    let path = alert_mark(dimension);
    let body = serde_json::to_vec(mark).map_err(|e| PortError::permanent(format!("encode {path}")).because(e))?;
    put(ports, &path, &bytes::Bytes::from(body)).await
}

/// Raises the one alert of a dimension that does not come. A process that dies on the way raises it once more, under the
/// same key, which does not page again.
async fn alarm(ports: &Ports, dimension: Dimension, summary: String) -> Result<()> {
    let open = again(|| mark(ports, dimension)).await?;
    if open.as_ref().is_some_and(|m| m.raised) {
        return Ok(());
    }
    // The mark is there before the alert, so that no alert is left open for ever.
    let since = open.map_or_else(|| ports.env.now(), |m| m.since);
    put_mark(ports, dimension, &Mark { since, raised: false }).await?;
    let alert = Alert { dedup_key: alert_key(dimension), kind: ALERT.into(), priority: 2, summary };
    again(|| ports.notifier.raise(&alert)).await?;
    put_mark(ports, dimension, &Mark { since, raised: true }).await
}

/// Resolves the alert of a dimension that has come, if there is one.
async fn calm(ports: &Ports, dimension: Dimension) -> Result<()> {
    if again(|| mark(ports, dimension)).await?.is_none() {
        return Ok(());
    }
    let key = alert_key(dimension);
    again(|| ports.notifier.resolve(&key)).await?;
    delete(ports, &alert_mark(dimension)).await
}

/// Age of a version. A clock that was set back makes a version from the future, whose distance counts the same.
fn age(version: &Version, now: DateTime<Utc>) -> Duration {
    (now - version.confirmed_at).abs().to_std().unwrap_or(Duration::MAX)
}

/// An age in words, in whole minutes.
fn spoken(age: Duration) -> String {
    let minutes = age.as_secs() / 60;
    format!("{} h {} min", minutes / 60, minutes % 60)
}

/// What to do without the present version: the newest one, while it may serve.
async fn degrade(ports: &Ports, dimension: Dimension, source: PortError) -> Result<Chosen, NotChosen> {
    let (most, newest) =
        (dimension.stale_max().map_err(NotChosen::Port)?, newest(ports, dimension).await.map_err(NotChosen::Port)?);
    let expected = format!("a version at most {} old", spoken(most));
    let too_old = |found, source| NotChosen::TooOld { dimension, found, expected, source };
    let Some(version) = newest else {
        return Err(too_old(format!("no version of dimension {dimension}, and none comes"), source));
    };
    let (old, why) = (age(&version, ports.env.now()), source.chain());
    let since = version.confirmed_at.format("%Y-%m-%dT%H:%M:%SZ");
    let summary = format!("dimension {dimension} does not come, version {} of {since} serves instead: {why}", version.version);
    alarm(ports, dimension, summary).await.map_err(NotChosen::Port)?;
    if old > most {
        let found = format!("version {} of dimension {dimension}, {} old", version.version, spoken(old));
        return Err(too_old(found, source));
    }
    tracing::warn!(%dimension, version = version.version, age_s = old.as_secs(), %why, "stale dimension serves");
    let stale = StaleDimension { dimension, version: version.version, age_s: old.as_secs(), why };
    Ok(Chosen { dimension, version, stale: Some(stale), as_of: None })
}

fn offered(ports: &Ports) -> Vec<Dimension> {
    let names = ports.dimensions.offered();
    Dimension::ALL.into_iter().filter(|d| names.iter().any(|n| n == d.name())).collect()
}

/// The day whose customers a day takes, when the version's are of a later one: the day after, or the first that is known.
async fn as_of(ports: &Ports, version: &Version, fecha: NaiveDate) -> Result<Option<NaiveDate>> {
    let due = fecha.succ_opt().unwrap_or(fecha);
    if version.loaded_at.date_naive() <= due || !ports.lakehouse.exists(CLIENTES_DIM).await? {
        return Ok(None);
    }
    let query = Query {
        sql: "SELECT coalesce(CAST(min(valido_desde) AS VARCHAR), '') FROM t".into(),
        inputs: vec![("t".to_owned(), Input::Delta(CLIENTES_DIM.to_owned()))],
    };
    let mut first = None;
    for batch in again(|| ports.lakehouse.query(&query)).await? {
        first = strings(&batch, 0)?.first().and_then(|day| day.parse().ok());
    }
    Ok(first.map(|first: NaiveDate| first.max(due)).filter(|day| *day < version.loaded_at.date_naive()))
}

/// The versions that a day is enriched with, one for each dimension that is offered. Asks for what is not fresh.
///
/// # Errors
/// [`NotChosen::TooOld`] when a dimension does not come and no version may serve instead.
pub async fn choose(ports: &Ports, policy: FetchPolicy, fecha: NaiveDate) -> Result<Vec<Chosen>, NotChosen> {
    let mut chosen = Vec::new();
    for dimension in offered(ports).into_iter().filter(|d| !d.adds().is_empty()) {
        let newest = newest(ports, dimension).await.map_err(NotChosen::Port)?;
        let fresh = newest.filter(|v| age(v, ports.env.now()) < dimension.fresh_for());
        let mut taken = match fresh {
            Some(version) => Chosen { dimension, version, stale: None, as_of: None },
            None => match refresh(ports, policy, dimension).await {
                Ok(version) => Chosen { dimension, version, stale: None, as_of: None },
                Err(NotRefreshed::Source(source)) => degrade(ports, dimension, source).await?,
                Err(NotRefreshed::Port(error)) => return Err(NotChosen::Port(error)),
            },
        };
        if dimension == Dimension::Clientes {
            taken.as_of = as_of(ports, &taken.version, fecha).await.map_err(NotChosen::Port)?;
        }
        chosen.push(taken);
    }
    Ok(chosen)
}

/// Refreshes the dimensions of the API: one round of `api_dimensiones`. A dimension that does not come has its alert, and
/// does not keep the others from coming.
///
/// # Errors
/// When the lake, the store or the pager fails.
pub async fn refresh_api(ports: &Ports, policy: FetchPolicy) -> Result<Vec<Refreshed>> {
    let mut out = Vec::new();
    for dimension in offered(ports).into_iter().filter(|d| *d != Dimension::Clientes) {
        let failed = match refresh(ports, policy, dimension).await {
            Ok(_) => None,
            Err(NotRefreshed::Port(error)) => return Err(error),
            Err(NotRefreshed::Source(source)) => {
                let why = source.chain();
                match degrade(ports, dimension, source).await {
                    Ok(Chosen { stale, .. }) => Some(stale.map_or(why, |s| s.why)),
                    Err(NotChosen::Port(error)) => return Err(error),
                    Err(NotChosen::TooOld { found, expected, .. }) => {
                        let summary = format!("found {found}, expected {expected}: {why}");
                        alarm(ports, dimension, summary.clone()).await?;
                        Some(summary)
                    }
                }
            }
        };
        let newest = newest(ports, dimension).await?;
        out.push(Refreshed {
            dimension,
            version: newest.as_ref().map(|v| v.version),
            rows: newest.as_ref().map(|v| v.rows),
            failed,
        });
    }
    Ok(out)
}

/// Which statement parts a day's enrichment needs: the columns that staging selects, the joins, and the inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Enrichment {
    /// `segmento`, `pais`, `categoria` and `marca`, each from its dimension or null.
    pub columns: String,
    /// The left joins of the dimensions to the sales, which are called `v`.
    pub joins: String,
    /// The dimensions' copies, by the name that the joins use.
    pub inputs: Vec<(String, Input)>,
    /// For each dimension: its name, and the condition under which a joined sale is unknown to it.
    pub unknown: BTreeMap<String, String>,
}

/// The enrichment of a day by the chosen versions. A dimension that was not chosen gives null.
pub fn enrichment(chosen: &[Chosen]) -> Enrichment {
    let (mut columns, mut joins) = (Vec::new(), String::new());
    let (mut inputs, mut unknown) = (Vec::new(), BTreeMap::new());
    for dimension in Dimension::ALL {
        let (name, key) = (dimension.name(), dimension.key());
        match chosen.iter().find(|c| c.dimension == dimension) {
            Some(Chosen { version, as_of, .. }) => {
                columns.extend(dimension.adds().iter().map(|c| format!("CAST({name}.{c} AS VARCHAR) AS {c}")));
                // A customer has at most one version that holds on a day.
                let (rows, input) = match as_of {
                    None => (name.to_owned(), Input::Parquet(vec![version.file.clone()])),
                    Some(day) => {
                        let holds =
                            format!("valido_desde <= DATE '{day}' AND (valido_hasta IS NULL OR valido_hasta > DATE '{day}')");
                        let rows = format!("(SELECT * FROM {name}_dim WHERE {holds}) AS {name}");
                        (rows, Input::Delta(CLIENTES_DIM.to_owned()))
                    }
                };
                joins.push_str(&format!(" LEFT JOIN {rows} ON v.{key} = {name}.{key}"));
                inputs.push((if as_of.is_some() { format!("{name}_dim") } else { name.to_owned() }, input));
                unknown.insert(name.to_owned(), format!("{name}.{key} IS NULL"));
            }
            None => columns.extend(dimension.adds().iter().map(|c| format!("CAST(NULL AS VARCHAR) AS {c}"))),
        }
    }
    Enrichment { columns: columns.join(", "), joins, inputs, unknown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contracts_have_what_the_dimensions_need() {
        for dimension in Dimension::ALL {
            let contract = dimension.contract().expect("a contract ships");
            assert_eq!(contract.key, [dimension.key()]);
            assert!(dimension.adds().iter().all(|c| contract.field(c).is_some()), "{dimension}");
            assert_eq!(dimension.stale_max().expect("an age"), Duration::from_secs(86_400), "{dimension}");
        }
        let overwritten = [Dimension::Inventario, Dimension::Precios, Dimension::Productos];
        let tables = overwritten.map(|d| (d.table(), format!("{d}_dim.yaml")));
        for (table, file) in tables.into_iter().chain([(CLIENTES_DIM, "clientes_dim.yaml".to_owned())]) {
            let file = file.as_str();
            assert_eq!(table, shipped(file).expect("a contract").physical_name);
        }
    }
}
