//! Versions: what the log still knows of a table, reading it as it was, and putting it back.
//!
//! A version is readable while its log entry, and each of its files, is there. Times are those that the writers put
//! into the log, not those of the store: a copy of a table keeps them. What it leaves out: removing, which is in `upkeep`.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, SecondsFormat, Utc};
use deltalake::{DeltaTable, DeltaTableError, protocol::DeltaOperation};
use futures::TryStreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};
use serde_json::Value;
use simulacro_core::ports::{Commit, PortError, Restore, Result, TableVersion};

use crate::{
    DeltaLakehouse,
    commit::{Start, Txn},
    read_failed,
};

fn show(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

/// A commit as its entry in the log tells it.
fn parse_entry(version: u64, text: &str) -> Option<TableVersion> {
    let mut entry = TableVersion {
        version,
        at: DateTime::UNIX_EPOCH,
        operation: String::new(),
        rows_written: Some(0),
        files_added: 0,
        files_removed: 0,
    };
    let mut told = false;
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        let action: Value = serde_json::from_str(line).ok()?;
        if let Some(info) = action.get("commitInfo") {
            let time = info.get("inCommitTimestamp").or_else(|| info.get("timestamp"))?.as_i64()?;
            entry.at = DateTime::from_timestamp_millis(time)?;
            entry.operation = info.get("operation").and_then(Value::as_str).unwrap_or("").to_owned();
            told = true;
        } else if let Some(add) = action.get("add") {
            entry.files_added += 1;
            let stats = add.get("stats").and_then(Value::as_str).and_then(|s| serde_json::from_str::<Value>(s).ok());
            let rows = stats.and_then(|s| s.get("numRecords")?.as_u64());
            entry.rows_written = entry.rows_written.zip(rows).map(|(sum, rows)| sum + rows);
        } else if action.get("remove").is_some() {
            entry.files_removed += 1;
        }
    }
    told.then_some(entry)
}

impl DeltaLakehouse {
    /// Versions whose entries are in the log, ascending.
    pub(crate) async fn logged(&self, table: &str) -> Result<Vec<u64>> {
        let log = Path::from(format!("{table}/_delta_log"));
        let listed: Vec<_> =
            self.store.list(Some(&log)).try_collect().await.map_err(|e| read_failed(format!("list the log of {table}"), e))?;
        let number = |path: &Path| -> Option<u64> {
            let name = path.filename()?.strip_suffix(".json")?;
            (name.len() == 20).then(|| name.parse().ok()).flatten()
        };
        let mut versions: Vec<u64> = listed.iter().filter_map(|meta| number(&meta.location)).collect();
        versions.sort_unstable();
        Ok(versions)
    }

    /// The entry of a version in the log.
    pub(crate) async fn entry(&self, table: &str, version: u64) -> Result<TableVersion> {
        let what = || format!("read the log of {table} at version {version}");
        let path = Path::from(format!("{table}/_delta_log/{version:020}.json"));
        let read = async { self.store.get(&path).await?.bytes().await };
        let bytes = read.await.map_err(|e| read_failed(what(), e))?;
        let text = std::str::from_utf8(&bytes).ok();
        text.and_then(|text| parse_entry(version, text))
            .ok_or_else(|| PortError::permanent(format!("{}: found no commit with a time in it", what())))
    }

    pub(crate) async fn newest(&self, table: &str) -> Result<DeltaTable> {
        self.open(table).await?.ok_or_else(|| PortError::permanent(format!("open {table}: no such table")))
    }

    pub(crate) async fn told_versions(&self, table: &str, limit: usize) -> Result<Vec<TableVersion>> {
        self.newest(table).await?;
        let mut told = Vec::new();
        for version in self.logged(table).await?.into_iter().rev().take(limit) {
            told.push(self.entry(table, version).await?);
        }
        Ok(told)
    }

    /// The newest version at a time. Assumes that times rise with versions, as they do while clocks do not step back.
    pub(crate) async fn version_at(&self, table: &str, at: DateTime<Utc>) -> Result<u64> {
        self.newest(table).await?;
        let versions = self.logged(table).await?;
        // Invariant of the search: those before `low` are not after `at`, those from `high` on are.
        let (mut low, mut high) = (0, versions.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(table, versions[middle]).await?.at <= at { low = middle + 1 } else { high = middle }
        }
        match (low.checked_sub(1).and_then(|i| versions.get(i)), versions.first()) {
            (Some(version), _) => Ok(*version),
            (None, Some(first)) => {
                let since = show(self.entry(table, *first).await?.at);
                Err(PortError::permanent(format!(
                    "read {table} as of {}: found nothing that old, expected a time from {since} on, that of version {first}",
                    show(at)
                )))
            }
            (None, None) => Err(PortError::permanent(format!("read {table} as of {}: found an empty log", show(at)))),
        }
    }

    async fn files(table: &str, opened: &DeltaTable) -> Result<BTreeSet<Path>> {
        let files = opened.get_files_by_partitions(&[]).await;
        Ok(files.map_err(|e| read_failed(format!("read the files of {table}"), e))?.into_iter().collect())
    }

    /// The table at a version; `Ok(Err(..))` says what is missing of it.
    async fn load_whole(&self, table: &str, version: u64, stored: &BTreeMap<Path, u64>) -> Result<Result<DeltaTable, String>> {
        let loaded = match self.builder(table)?.with_version(version).load().await {
            Ok(loaded) => loaded,
            Err(e) => {
                let error = read_failed(format!("open {table} at version {version}"), e);
                return match error.disposition {
                    simulacro_core::ports::Disposition::Permanent => Ok(Err(error.chain())),
                    _ => Err(error),
                };
            }
        };
        let files = Self::files(table, &loaded).await?;
        let gone = files.iter().filter(|file| !stored.contains_key(*file)).count();
        if gone > 0 {
            return Ok(Err(format!("{gone} of its {} files are gone, as after VACUUM", files.len())));
        }
        Ok(Ok(loaded))
    }

    /// Objects of a table by their path below it, with their sizes.
    pub(crate) async fn objects(&self, table: &str) -> Result<BTreeMap<Path, u64>> {
        let folder = Path::from(table);
        let listed: Vec<_> = self
            .store
            .list(Some(&folder))
            .try_collect()
            .await
            .map_err(|e| read_failed(format!("list the files of {table}"), e))?;
        let below = |path: &Path| path.prefix_match(&folder).map(Path::from_iter);
        Ok(listed.iter().filter_map(|meta| Some((below(&meta.location)?, meta.size))).collect())
    }

    /// The table as it was at a version, every file of it there.
    ///
    /// # Errors
    /// `Permanent` when it is not there, naming the versions that are.
    pub(crate) async fn travel(&self, table: &str, version: u64) -> Result<DeltaTable> {
        let newest = self.newest(table).await?;
        let last = newest.version().unwrap_or(0);
        let logged = self.logged(table).await?;
        let what = format!("read {table} at version {version}");
        if logged.binary_search(&version).is_err() {
            let first = logged.first().copied().unwrap_or(last);
            return Err(PortError::permanent(format!("{what}: found no such version, expected one of {first} to {last}")));
        }
        let stored = self.objects(table).await?;
        let missing = match self.load_whole(table, version, &stored).await? {
            Ok(loaded) => return Ok(loaded),
            Err(missing) => missing,
        };
        // What VACUUM removed is of the oldest versions, so that the whole ones are found by halving.
        let after: Vec<u64> = logged.into_iter().filter(|v| *v > version).collect();
        let (mut low, mut high) = (0, after.len());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.load_whole(table, after[middle], &stored).await?.is_ok() { high = middle } else { low = middle + 1 }
        }
        let first = after.get(low).copied().unwrap_or(last);
        Err(PortError::permanent(format!("{what}: {missing}; expected one of {first} to {last}")))
    }

    pub(crate) async fn put_back(&self, restore: &Restore) -> Result<Commit> {
        let Restore { table, mark, version } = restore;
        let txn = Txn::of(table, mark);
        let opened = match self.start(table, &txn).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(Some(opened)) => opened,
            Start::From(None) => return Err(PortError::permanent(format!("restore {table}: no such table"))),
        };
        self.travel(table, *version).await?;
        let what = format!("restore {table} to version {version} as {}, epoch {}", mark.writer, mark.epoch);
        let result: Result<DeltaTable, DeltaTableError> = if opened.version() == Some(*version) {
            Self::commit_mark(&opened, &txn, DeltaOperation::Restore { version: Some(*version), datetime: None }).await
        } else {
            let restored = opened.restore().with_version_to_restore(*version).with_commit_properties(txn.properties()).await;
            restored.map(|(restored, _)| restored)
        };
        self.settle(table, &txn, what, None, result).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_tells_its_time_and_counts_what_it_moved() {
        let text = r#"{"commitInfo":{"timestamp":1710730815123,"operation":"WRITE"}}
{"add":{"path":"a","stats":"{\"numRecords\":3}"}}
{"add":{"path":"b","stats":"{\"numRecords\":4}"}}
{"remove":{"path":"c"}}"#;
        let entry = parse_entry(7, text).expect("an entry");
        assert_eq!((entry.version, entry.operation.as_str(), entry.rows_written), (7, "WRITE", Some(7)));
        assert_eq!((entry.files_added, entry.files_removed), (2, 1));
        assert_eq!(show(entry.at), "2024-03-18T03:00:15.123Z");
        // A file that does not say leaves the sum unknown; an entry without a time is none.
        let silent = format!("{text}\n{}", r#"{"add":{"path":"d"}}"#);
        assert_eq!(parse_entry(7, &silent).expect("an entry").rows_written, None);
        assert_eq!(parse_entry(7, r#"{"add":{"path":"d"}}"#), None);
        assert_eq!(parse_entry(7, "{"), None);
    }
}
