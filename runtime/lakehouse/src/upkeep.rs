//! Upkeep: rewriting files, removing those that nobody needs, and shortening the log.
//!
//! None of it changes a row, so that an error never leaves a doubt about the data, and a repeat is always safe.
//! What it leaves out: when to do it, which is the orchestrator's business.

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU64,
    sync::Arc,
};

use chrono::{DateTime, TimeDelta, Utc};
use deltalake::{
    DeltaTable, DeltaTableError, FilterLiteral, FilterOp, FilterValue,
    operations::{
        optimize::OptimizeType,
        vacuum::{Clock, VacuumMode},
    },
    parquet::{basic::Compression, file::properties::WriterProperties},
    protocol::checkpoints::create_checkpoint,
};
use futures::TryStreamExt;
use object_store::{ObjectStoreExt, path::Path};
use serde_json::Value;
use simulacro_core::ports::{Optimize, PortError, Result, Rewritten, VACUUM_HOURS_MIN, Vacuum};

use crate::{CHECKPOINT_EVERY, DeltaLakehouse, commit::plain, read_failed};

/// Under which key the log keeps what a rewrite was asked for.
const LAYOUT: &str = "simulacro.layout";

/// How many of the newest entries of the log are searched for the last rewrite.
const REWRITES_SEARCHED: usize = 1000;

#[derive(Debug)]
struct Fixed(DateTime<Utc>);

impl Clock for Fixed {
    fn current_timestamp_millis(&self) -> i64 {
        self.0.timestamp_millis()
    }
}

impl DeltaLakehouse {
    pub(crate) async fn rewrite(&self, optimize: &Optimize) -> Result<Rewritten> {
        let Optimize { table, z_order, target_bytes } = optimize;
        let what = format!("optimize {table}");
        let opened = self.newest(table).await?;
        let before = opened.version().unwrap_or(0);
        let state = opened.snapshot().map_err(|e| read_failed(what.clone(), e))?;
        let schema = state.snapshot().arrow_schema();
        let partitions = state.metadata().partition_columns().to_vec();
        for column in z_order {
            let expected = if partitions.contains(column) {
                "one by which the table is not partitioned".to_owned()
            } else if schema.field_with_name(column).is_err() {
                format!("one of {}", schema.fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>().join(", "))
            } else {
                continue;
            };
            return Err(PortError::permanent(format!("{what}: found z-order column {column}, expected {expected}")));
        }
        let target = NonZeroU64::new(*target_bytes).filter(|bytes| i64::try_from(bytes.get()).is_ok()).ok_or_else(|| {
            PortError::permanent(format!("{what}: found a file size of {target_bytes}, expected 1 to 2^63 - 1"))
        })?;
        let layout = serde_json::json!({ "z_order": z_order, "target_bytes": target_bytes });
        let unchanged = Rewritten { files_added: 0, files_removed: 0, version: before };
        let present = by_partition(&what, &opened, &partitions).await?;
        let done = match self.last_rewrite(table, &layout).await? {
            None => BTreeMap::new(),
            Some(version) => match self.builder(table)?.with_version(version).load().await {
                Ok(then) => by_partition(&what, &then, &partitions).await?,
                // Its log is gone; all partitions are looked at again.
                Err(_) => BTreeMap::new(),
            },
        };
        let stale: Vec<&Values> =
            present.iter().filter(|(part, files)| done.get(*part) != Some(files)).map(|(part, _)| part).collect();
        if stale.is_empty() {
            return Ok(unchanged);
        }
        let filters = filters(&partitions, &stale, present.len());
        let type_ = if z_order.is_empty() { OptimizeType::Compact } else { OptimizeType::ZOrder(z_order.clone()) };
        let properties = plain().with_metadata([(LAYOUT.to_owned(), layout)]);
        let result = opened
            .optimize()
            .with_type(type_)
            .with_filters(&filters)
            .with_target_size(target)
            .with_max_concurrent_tasks(1)
            .with_writer_properties(WriterProperties::builder().set_compression(Compression::SNAPPY).build())
            .with_session_state(Arc::new(self.session()?.state()))
            .with_commit_properties(properties)
            .await;
        match result {
            Ok((written, metrics)) => {
                self.remember(table, &written);
                let version = written.version().unwrap_or(before);
                Ok(Rewritten { files_added: metrics.num_files_added, files_removed: metrics.num_files_removed, version })
            }
            // Whether or not it was committed, the rows are the same.
            Err(e) => Err(PortError::retryable(what).because(e)),
        }
    }

    /// The newest version that a rewrite with this layout made.
    async fn last_rewrite(&self, table: &str, layout: &Value) -> Result<Option<u64>> {
        for version in self.logged(table).await?.into_iter().rev().take(REWRITES_SEARCHED) {
            let path = Path::from(format!("{table}/_delta_log/{version:020}.json"));
            let read = async { self.store.get(&path).await?.bytes().await };
            let bytes = read.await.map_err(|e| read_failed(format!("read the log of {table} at version {version}"), e))?;
            let asked = std::str::from_utf8(&bytes).unwrap_or("").lines().find_map(|line| {
                let action: Value = serde_json::from_str(line).ok()?;
                action.get("commitInfo")?.get(LAYOUT).cloned()
            });
            if asked.as_ref() == Some(layout) {
                return Ok(Some(version));
            }
        }
        Ok(None)
    }

    pub(crate) async fn remove_unneeded(&self, asked: &Vacuum) -> Result<Vec<String>> {
        let Vacuum { table, now, retention_hours, allow_short_retention, dry_run } = asked;
        let what = format!("vacuum {table}");
        if *retention_hours < VACUUM_HOURS_MIN && !allow_short_retention {
            return Err(PortError::permanent(format!(
                "{what}: found a retention of {retention_hours} h, expected at least {VACUUM_HOURS_MIN} h, or `allow_short_retention`"
            )));
        }
        let retention = TimeDelta::hours(i64::from(*retention_hours));
        let opened = self.newest(table).await?;
        // Tombstones leave the checkpoints after a week, whatever the caller's retention: the log says what is needed.
        let needed = self.needed(table, *now - retention).await?;
        let vacuum = |opened: DeltaTable, dry_run: bool| {
            opened
                .vacuum()
                .with_retention_period(retention)
                .with_enforce_retention_duration(false)
                .with_keep_versions(&needed)
                .with_mode(VacuumMode::Full)
                .parallel_scan(false)
                .with_scan_concurrency(1)
                .with_clock(Arc::new(Fixed(*now)))
                .with_dry_run(dry_run)
                .with_commit_properties(plain())
        };
        let failed = |e: DeltaTableError| PortError::retryable(what.clone()).because(e);
        // The log goes on naming files that an earlier call has removed.
        let stored = self.objects(table).await?;
        let (_, planned) = vacuum(opened.clone(), true).await.map_err(failed)?;
        let is_stored = |file: &String| Path::parse(file).is_ok_and(|path| stored.contains_key(&path));
        let mut files: Vec<String> = planned.files_deleted.into_iter().filter(is_stored).collect();
        files.sort();
        files.dedup();
        if !*dry_run && !files.is_empty() {
            let (written, _) = vacuum(opened, false).await.map_err(failed)?;
            self.remember(table, &written);
        }
        Ok(files)
    }

    /// Versions that were current at any time since `since`.
    async fn needed(&self, table: &str, since: DateTime<Utc>) -> Result<Vec<u64>> {
        let mut needed = Vec::new();
        for version in self.logged(table).await?.into_iter().rev() {
            needed.push(version);
            // This one was current at `since`; those before it had been replaced by then.
            if self.entry(table, version).await?.at <= since {
                break;
            }
        }
        Ok(needed)
    }

    pub(crate) async fn checkpoint(&self, table: &str) -> Result<()> {
        let Some(opened) = self.open(table).await? else { return Ok(()) };
        let version = opened.version().unwrap_or(0);
        let last = self.last_checkpoint(table).await;
        let done = match last {
            Some(last) if version < last + CHECKPOINT_EVERY => last,
            None if version < CHECKPOINT_EVERY => return Ok(()),
            _ => {
                create_checkpoint(&opened, None)
                    .await
                    .map_err(|e| PortError::retryable(format!("checkpoint {table} at version {version}")).because(e))?;
                version
            }
        };
        self.checkpointed(table, done);
        Ok(())
    }
}

/// Values of the partition columns, in their order; `None` is null.
type Values = Vec<Option<String>>;

/// The files of each partition.
async fn by_partition(what: &str, opened: &DeltaTable, partitions: &[String]) -> Result<BTreeMap<Values, BTreeSet<String>>> {
    let views: Vec<_> = opened
        .get_active_add_actions_by_partitions(&[])
        .try_collect()
        .await
        .map_err(|e| read_failed(format!("{what}: read its files"), e))?;
    let mut files: BTreeMap<Values, BTreeSet<String>> = BTreeMap::new();
    for view in views {
        let mut told = view.partition_values_map();
        let values = partitions.iter().map(|name| told.remove(name).flatten()).collect();
        files.entry(values).or_default().insert(view.path().into_owned());
    }
    Ok(files)
}

/// A filter that selects the stale partitions of a table with one partition column; without one, all are rewritten.
fn filters<'a>(partitions: &'a [String], stale: &[&'a Values], all: usize) -> Vec<FilterLiteral<'a>> {
    let [column] = partitions else { return Vec::new() };
    let values: Option<Vec<&str>> = stale.iter().map(|values| values.first()?.as_deref()).collect();
    match values {
        Some(values) if values.len() < all => vec![(column.as_str(), FilterOp::In, FilterValue::Set(values))],
        Some(_) | None => Vec::new(),
    }
}
