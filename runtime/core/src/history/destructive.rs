//! Destructive calls: deletes of objects that nothing in the platform asks for.
//!
//! The platform deletes for three reasons only: upkeep (VACUUM, log entries that a checkpoint stands for, old versions of
//! dimensions), what is not visible yet (parts of a raw day that no manifest names, a dimension's candidate), and temporary
//! files of commits. Whatever else a process deletes in the lake is worth an alert. What this leaves out: deletes by other
//! processes, of which the tables that are gone tell.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use super::Recorder;

/// Most paths that are kept for an alert; the others are counted.
const PATHS_MAX: usize = 5;

/// What was deleted since the last time somebody asked.
#[derive(Debug, Default)]
pub(super) struct Deletes {
    /// Tables whose upkeep is under way, each with how many times.
    upkeep: BTreeMap<String, usize>,
    calls: u64,
    paths: Vec<String>,
}

/// The upkeep of a table; it is under way until this is dropped.
#[derive(Debug)]
pub(crate) struct Upkeep {
    deletes: Arc<Mutex<Deletes>>,
    table: String,
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        let mut deletes = self.deletes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = deletes.upkeep.get_mut(&self.table) {
            *count -= 1;
            if *count == 0 {
                deletes.upkeep.remove(&self.table);
            }
        }
    }
}

/// Whether nobody may delete such an object outside of upkeep: files of tables, entries of their logs, manifests of raw days.
fn is_kept(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    if (path.starts_with("raw/") && name.starts_with("part-v")) || path.contains("/_candidate/") {
        // Dead attempts leave such objects; what a version consists of is in its manifest.
        return false;
    }
    let is_temporary = name.starts_with('_') || name.starts_with('.') || name.contains(".tmp");
    path.contains('/') && !is_temporary && (name.ends_with(".json") || name.ends_with(".parquet"))
}

impl Recorder {
    /// Lets the upkeep of a table, or of a folder, delete what it must, until the answer is dropped.
    pub(crate) fn upkeep(&self, table: &str) -> Upkeep {
        *self.deletes.lock().unwrap_or_else(PoisonError::into_inner).upkeep.entry(table.to_owned()).or_default() += 1;
        Upkeep { deletes: self.deletes.clone(), table: table.to_owned() }
    }

    /// Hears of a delete.
    pub(super) fn deletes(&self, path: &str) {
        let mut deletes = self.deletes.lock().unwrap_or_else(PoisonError::into_inner);
        let below = |table: &String| path.strip_prefix(table.as_str()).is_some_and(|rest| rest.starts_with('/'));
        if !is_kept(path) || deletes.upkeep.keys().any(below) {
            return;
        }
        deletes.calls += 1;
        if deletes.paths.len() < PATHS_MAX {
            deletes.paths.push(path.to_owned());
        }
    }

    /// Takes how many objects were deleted without need since the last time, and some of their paths.
    pub fn take_destructive(&self) -> (u64, Vec<String>) {
        let mut deletes = self.deletes.lock().unwrap_or_else(PoisonError::into_inner);
        (std::mem::take(&mut deletes.calls), std::mem::take(&mut deletes.paths))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_upkeep_may_delete_is_told_from_what_attempts_leave() {
        for kept in [
            "staging/ventas_validadas/fecha=2024-03-17/part-1.parquet",
            "marts/metricas_diarias/_delta_log/00000000000000000003.json",
            "marts/metricas_diarias/_delta_log/00000000000000000010.checkpoint.parquet",
            "raw/ventas/fecha=2024-03-17/_manifest/v000001.json",
            "raw/eventos/_delta_log/00000000000000000000.json",
            "raw/eventos/fecha=2024-03-17/part-00000-1.parquet",
        ] {
            assert!(is_kept(kept), "{kept}");
        }
        for left in [
            "raw/ventas/fecha=2024-03-17/part-v000001-0000.parquet",
            "staging/ventas_validadas/_delta_log/_commit_1234.json.tmp",
            "dim/raw/productos/_candidate/1.parquet",
            "_doctor/1",
        ] {
            assert!(!is_kept(left), "{left}");
        }
    }
}
