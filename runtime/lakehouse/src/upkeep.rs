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
    protocol::checkpoints::{cleanup_expired_logs_for, create_checkpoint},
};
use futures::TryStreamExt;
use object_store::{ObjectStoreExt, path::Path};
use serde_json::Value;
use simulacro_core::ports::{Optimize, PortError, Result, Rewritten, VACUUM_HOURS_MIN, Vacuum};

use crate::{CHECKPOINT_EVERY, DeltaLakehouse, commit::plain, read_failed};

/// Under which key the log keeps what a rewrite was asked for.
const LAYOUT: &str = "simulacro.layout";

/// Under which key it keeps the partitions that were still to be rewritten after it.
const LEFT: &str = "simulacro.left";

/// How many of the newest entries of the log are searched for the last rewrite.
const REWRITES_SEARCHED: usize = 1000;

/// How long the log's entries stay at least, when a checkpoint stands for them.
const LOG_RETENTION: TimeDelta = TimeDelta::days(30);

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
        let present = by_partition(&what, &opened, &partitions).await?;
        let done = match self.last_rewrite(table, &layout).await? {
            None => BTreeMap::new(),
            Some((version, left)) => match self.builder(table)?.with_version(version).load().await {
                Ok(then) => {
                    let mut done = by_partition(&what, &then, &partitions).await?;
                    done.retain(|part, _| !left.contains(part));
                    done
                }
                // Its log is gone; all partitions are looked at again.
                Err(_) => BTreeMap::new(),
            },
        };
        // One file alone has nothing to be compacted with.
        let least = if z_order.is_empty() { 2 } else { 1 };
        let is_stale = |(part, files): &(&Values, &BTreeSet<String>)| files.len() >= least && done.get(*part) != Some(*files);
        let stale: BTreeSet<&Values> = present.iter().filter(is_stale).map(|(part, _)| part).collect();
        let mut rewritten = Rewritten { files_added: 0, files_removed: 0, version: before };
        let mut current = opened;
        for (filters, left) in steps(&partitions, &stale) {
            let type_ = if z_order.is_empty() { OptimizeType::Compact } else { OptimizeType::ZOrder(z_order.clone()) };
            let asked = [(LAYOUT.to_owned(), layout.clone()), (LEFT.to_owned(), serde_json::json!(left))];
            let result = current
                .optimize()
                .with_type(type_)
                .with_filters(&filters)
                .with_target_size(target)
                .with_max_concurrent_tasks(1)
                .with_writer_properties(WriterProperties::builder().set_compression(Compression::SNAPPY).build())
                .with_session_state(Arc::new(self.session()?.state()))
                .with_commit_properties(plain().with_metadata(asked))
                .await;
            // Whether or not it was committed, the rows are the same, and the log says what is left to do.
            let (written, metrics) = result.map_err(|e| PortError::retryable(what.clone()).because(e))?;
            self.remember(table, &written);
            rewritten.files_added += metrics.num_files_added;
            rewritten.files_removed += metrics.num_files_removed;
            rewritten.version = written.version().unwrap_or(before);
            current = written;
        }
        Ok(rewritten)
    }

    /// The newest version that a rewrite with this layout made, and the partitions that it left to later ones.
    async fn last_rewrite(&self, table: &str, layout: &Value) -> Result<Option<(u64, BTreeSet<Values>)>> {
        for version in self.logged(table).await?.into_iter().rev().take(REWRITES_SEARCHED) {
            let path = Path::from(format!("{table}/_delta_log/{version:020}.json"));
            let read = async { self.store.get(&path).await?.bytes().await };
            let bytes = read.await.map_err(|e| read_failed(format!("read the log of {table} at version {version}"), e))?;
            let told = std::str::from_utf8(&bytes).unwrap_or("").lines().find_map(|line| {
                let action: Value = serde_json::from_str(line).ok()?;
                action.get("commitInfo").cloned()
            });
            let Some(told) = told.filter(|told| told.get(LAYOUT) == Some(layout)) else { continue };
            // Without a word on it, nothing was left.
            let left = told.get(LEFT).cloned().map_or(Ok(BTreeSet::new()), serde_json::from_value);
            let left = left.map_err(|e| {
                let expected = format!("expected lists of values under {LEFT}");
                PortError::permanent(format!("read the log of {table} at version {version}: {expected}")).because(e)
            })?;
            return Ok(Some((version, left)));
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
        let before = |age: TimeDelta| now.checked_sub_signed(age).unwrap_or(DateTime::<Utc>::MIN_UTC);
        let needed = self.needed(table, before(retention)).await?;
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
        if *dry_run {
            return Ok(files);
        }
        let log = opened.log_store();
        if !files.is_empty() {
            let (written, _) = vacuum(opened, false).await.map_err(failed)?;
            self.remember(table, &written);
        }
        let expired = before(retention.max(LOG_RETENTION));
        let oldest = needed.iter().copied().min().unwrap_or(0);
        let shortened = cleanup_expired_logs_for(oldest, log.as_ref(), expired.timestamp_millis(), None).await.map_err(failed)?;
        if shortened > 0 {
            // The snapshot at hand may begin at an entry that is gone.
            self.forget(table);
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
                // A snapshot that was carried forward commit by commit is slower than one that begins at a checkpoint.
                self.forget(table);
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

/// Steps of a rewrite: the filters of each, which must all hold, and the partitions that are left after it.
///
/// One step for each partition, in order of its values, because delta-rs goes through those of one step in the order of
/// a hash. A table without partitions is one step. A null cannot be selected; where there is one, everything is one step.
fn steps<'a>(partitions: &'a [String], stale: &BTreeSet<&'a Values>) -> Vec<(Vec<FilterLiteral<'a>>, Vec<&'a Values>)> {
    let of_one = |values: &'a Values| -> Option<Vec<FilterLiteral<'a>>> {
        let pairs = partitions.iter().zip(values);
        pairs.map(|(column, value)| Some((column.as_str(), FilterOp::Eq, FilterValue::Scalar(value.as_deref()?)))).collect()
    };
    let Some(each) = stale.iter().map(|values| of_one(values)).collect::<Option<Vec<_>>>() else {
        return vec![(Vec::new(), Vec::new())];
    };
    let left = |n: usize| stale.iter().skip(n + 1).copied().collect();
    each.into_iter().enumerate().map(|(n, filters)| (filters, left(n))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn partitions_are_rewritten_one_by_one_in_order_and_each_step_says_what_is_left() {
        let partitions = columns(&["fecha", "region"]);
        let of = |fecha: &str, region: &str| vec![Some(fecha.to_owned()), Some(region.to_owned())];
        let all = [of("2024-03-02", "MX"), of("2024-03-01", "MX"), of("2024-03-01", "AR")];
        let steps = steps(&partitions, &all.iter().collect());
        let eq = |column, value| (column, FilterOp::Eq, FilterValue::Scalar(value));
        assert_eq!(
            steps,
            [
                (vec![eq("fecha", "2024-03-01"), eq("region", "AR")], vec![&all[1], &all[0]]),
                (vec![eq("fecha", "2024-03-01"), eq("region", "MX")], vec![&all[0]]),
                (vec![eq("fecha", "2024-03-02"), eq("region", "MX")], vec![]),
            ]
        );
    }

    #[test]
    fn a_table_without_partitions_or_with_a_null_is_one_step_and_nothing_stale_is_none() {
        let whole = Values::new();
        assert_eq!(steps(&[], &BTreeSet::from([&whole])), [(vec![], vec![])]);
        assert_eq!(steps(&[], &BTreeSet::new()), []);
        let partitions = columns(&["fecha"]);
        let (some, none) = (vec![Some("2024-03-01".to_owned())], vec![None]);
        assert_eq!(steps(&partitions, &BTreeSet::from([&some, &none])), [(vec![], vec![])]);
        assert_eq!(steps(&partitions, &BTreeSet::new()), []);
    }
}
