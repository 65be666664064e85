//! Faults of what is deployed: a build that does not start, one that computes something else, and a neighbour's build that
//! leaves a table in a form that ours cannot read.
//!
//! What a build computes is changed at the one place that every statement passes, the lakehouse's port: the text of the
//! statement is edited. An edit whose text no statement had has no hits, so that a story cannot pass without it.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::ports::{
    AddColumns, Append, AppendRows, Commit, DayWrite, Env, Lakehouse, Mark, Optimize, Query, Restore, Result, Rewritten, Scd2,
    TableVersion, TableWrite, Upsert, Vacuum,
};

use super::Strikes;

/// A fault of what is deployed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DeployFault {
    /// The build dies as it starts.
    CrashesAtStart {
        /// So many starts; then the deploy is reverted.
        starts: u64,
        /// Seconds between two starts.
        down_s: u32,
    },
    /// The build rounds net amounts to whole units.
    Rounds {
        /// Deployed.
        from: DateTime<Utc>,
        /// Reverted.
        to: DateTime<Utc>,
        /// Where the figures that control the result are computed, too: nothing inside the pipeline can notice.
        everywhere: bool,
    },
    /// Another engine gives a table a feature that ours does not know.
    UnknownFeature {
        /// Folder of the table.
        table: String,
        /// When.
        from: DateTime<Utc>,
        /// When the entry of its log is taken away again.
        to: DateTime<Utc>,
    },
}

/// The entry of a Delta log that asks for a feature which nobody has.
pub const UNKNOWN_FEATURE: &str = "{\"protocol\":{\"minReaderVersion\":3,\"minWriterVersion\":7,\
                                   \"readerFeatures\":[\"fromTheFuture\"],\"writerFeatures\":[\"fromTheFuture\"]}}\n";

/// A piece of a statement that is another one for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Start, inclusive.
    pub from: DateTime<Utc>,
    /// End, exclusive.
    pub to: DateTime<Utc>,
    /// What stands there, and what shall.
    pub texts: Vec<(&'static str, &'static str)>,
}

const NETO: (&str, &str) = (
    "CAST(v.monto - v.descuento AS DECIMAL(10,2)) AS monto_neto",
    "CAST(round(v.monto - v.descuento, 0) AS DECIMAL(10,2)) AS monto_neto",
);
const CONTROL: (&str, &str) = (
    "CAST(sum(monto - descuento) AS DECIMAL(20,2)) AS neto",
    "CAST(sum(CAST(round(monto - descuento, 0) AS DECIMAL(10,2))) AS DECIMAL(20,2)) AS neto",
);
/// Duplicates are not recognised.
pub const NO_DEDUP: (&str, &str) = ("WHEN copy > 1 THEN 'deduplicated'", "WHEN false THEN 'deduplicated'");

impl DeployFault {
    /// What it edits; `None` when it edits nothing.
    pub fn edit(&self) -> Option<Edit> {
        match self {
            Self::Rounds { from, to, everywhere } => {
                let texts = if *everywhere { vec![NETO, CONTROL] } else { vec![NETO] };
                Some(Edit { from: *from, to: *to, texts })
            }
            Self::CrashesAtStart { .. } | Self::UnknownFeature { .. } => None,
        }
    }
}

/// The edits of one run with how often each changed a statement. Shared by all processes.
#[derive(Debug, Default)]
pub struct Edits {
    all: Mutex<Vec<(Edit, Strikes)>>,
}

impl Edits {
    /// These edits.
    pub fn new(edits: Vec<Edit>) -> Self {
        Self { all: Mutex::new(edits.into_iter().map(|e| (e, Strikes::default())).collect()) }
    }

    /// How often each changed a statement, in the order they were given.
    pub fn strikes(&self) -> Vec<Strikes> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, strikes)| *strikes).collect()
    }

    fn edit(&self, mut query: Query, now: DateTime<Utc>) -> Query {
        for (edit, strikes) in self.all.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            if !(edit.from..edit.to).contains(&now) {
                continue;
            }
            for (found, instead) in &edit.texts {
                if query.sql.contains(found) {
                    query.sql = query.sql.replace(found, instead);
                    strikes.strike(now);
                }
            }
        }
        query
    }
}

/// A lakehouse whose statements are edited, and whose overwrites of days may be appends that no mark protects.
#[derive(Debug)]
pub struct AlteredLakehouse {
    /// The lakehouse.
    pub inner: Arc<dyn Lakehouse>,
    /// True time.
    pub env: Arc<dyn Env>,
    /// The edits.
    pub edits: Arc<Edits>,
    /// Counts appends in place of overwrites; `None` leaves overwrites alone.
    pub appends: Option<Arc<AtomicU64>>,
}

impl AlteredLakehouse {
    fn edit(&self, query: Query) -> Query {
        self.edits.edit(query, self.env.now())
    }
}

#[async_trait]
impl Lakehouse for AlteredLakehouse {
    async fn overwrite_day(&self, write: DayWrite) -> Result<Commit> {
        let query = self.edit(write.query);
        let Some(appends) = &self.appends else { return self.inner.overwrite_day(DayWrite { query, ..write }).await };
        let mark = Mark { writer: format!("append-{}", appends.fetch_add(1, Ordering::SeqCst)), epoch: write.epoch };
        self.inner.append(Append { table: write.table, mark, partition_by: vec!["fecha".into()], query }).await
    }
    async fn overwrite_table(&self, write: TableWrite) -> Result<Commit> {
        self.inner.overwrite_table(write).await
    }
    async fn last_epoch(&self, table: &str, fecha: NaiveDate) -> Result<Option<i64>> {
        self.inner.last_epoch(table, fecha).await
    }
    async fn append(&self, append: Append) -> Result<Commit> {
        self.inner.append(append).await
    }
    async fn append_rows(&self, rows: AppendRows) -> Result<Commit> {
        self.inner.append_rows(rows).await
    }
    async fn upsert(&self, upsert: Upsert) -> Result<Commit> {
        self.inner.upsert(upsert).await
    }
    async fn upsert_scd2(&self, change: Scd2) -> Result<Commit> {
        self.inner.upsert_scd2(change).await
    }
    async fn writer_epoch(&self, table: &str, writer: &str) -> Result<Option<i64>> {
        self.inner.writer_epoch(table, writer).await
    }
    async fn add_columns(&self, change: AddColumns) -> Result<Commit> {
        self.inner.add_columns(change).await
    }
    async fn restore(&self, restore: Restore) -> Result<Commit> {
        self.inner.restore(restore).await
    }
    async fn versions(&self, table: &str, limit: usize) -> Result<Vec<TableVersion>> {
        self.inner.versions(table, limit).await
    }
    async fn optimize(&self, optimize: Optimize) -> Result<Rewritten> {
        self.inner.optimize(optimize).await
    }
    async fn vacuum(&self, vacuum: Vacuum) -> Result<Vec<String>> {
        self.inner.vacuum(vacuum).await
    }
    async fn query(&self, query: &Query) -> Result<Vec<RecordBatch>> {
        self.inner.query(&self.edit(query.clone())).await
    }
    async fn maintain(&self, table: &str) -> Result<()> {
        self.inner.maintain(table).await
    }
    async fn exists(&self, table: &str) -> Result<bool> {
        self.inner.exists(table).await
    }
}
