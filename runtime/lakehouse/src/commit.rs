//! Commits: marks in the log that tell whether a write took place, and what may be done after an error.
//!
//! A mark is a Delta `txn` action. delta-rs's own retries are off, because a commit that succeeded can come back as an
//! error; after any error the table is loaded again and its mark decides. What it leaves out: what is written.

use deltalake::{
    DeltaTable, DeltaTableError,
    datafusion::{logical_expr::LogicalPlan, prelude::SessionContext},
    kernel::{
        Transaction,
        transaction::{CommitBuilder, CommitProperties, TransactionError},
    },
    protocol::{DeltaOperation, SaveMode},
    table::state::DeltaTableState,
};
use simulacro_core::ports::{Commit, Mark, PortError, Result};

use crate::{DeltaLakehouse, schema::refusal};

/// Rows that a table must not have; the cause of an error that never goes away by itself.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Refused(pub(crate) String);

/// The identity of a write in the log: application id and ordinal.
#[derive(Debug, Clone)]
pub(crate) struct Txn {
    pub(crate) app: String,
    pub(crate) epoch: i64,
}

impl Txn {
    pub(crate) fn of(table: &str, mark: &Mark) -> Self {
        Self { app: app_id(table, &mark.writer), epoch: mark.epoch }
    }

    /// No retries, no checkpoint and no clearing up: a commit that succeeded must not be reported as an error.
    pub(crate) fn properties(&self) -> CommitProperties {
        plain().with_application_transaction(Transaction::new(&self.app, self.epoch))
    }
}

/// Properties of a commit that is nothing but a commit.
pub(crate) fn plain() -> CommitProperties {
    CommitProperties::default().with_max_retries(0).with_create_checkpoint(false).with_cleanup_expired_logs(Some(false))
}

pub(crate) fn app_id(table: &str, writer: &str) -> String {
    format!("simulacro:{table}:{writer}")
}

/// Calls `visit` with each cause in the chain, and with what two libraries hide from it: the store's error when it is
/// boxed, and the one that the kernel keeps inside.
pub(crate) fn causes(error: &(dyn std::error::Error + 'static), mut visit: impl FnMut(&(dyn std::error::Error + 'static))) {
    let mut next = Some(error);
    while let Some(cause) = next {
        visit(cause);
        if let Some(boxed) = cause.downcast_ref::<Box<object_store::Error>>() {
            visit(boxed.as_ref());
        }
        if let Some(delta_kernel::Error::ObjectStore(kept)) = cause.downcast_ref::<delta_kernel::Error>() {
            visit(kept);
        }
        next = cause.source();
    }
}

fn is_conflict(cause: &(dyn std::error::Error + 'static)) -> bool {
    matches!(
        cause.downcast_ref::<TransactionError>(),
        Some(
            TransactionError::VersionAlreadyExists(_)
                | TransactionError::CommitConflict(_)
                | TransactionError::MaxCommitAttempts(_)
        )
    ) || matches!(cause.downcast_ref::<DeltaTableError>(), Some(DeltaTableError::VersionAlreadyExists(_)))
}

/// Whether the store has refused the credentials: whatever took place, no repeat is of use until there are others.
pub(crate) fn locked_out(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut out = false;
    causes(error, |cause| {
        let store = cause.downcast_ref::<object_store::Error>();
        out |= matches!(store, Some(object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. }));
    });
    out
}

/// What may be done after a write failed whose mark is not in the log.
pub(crate) fn write_failed(what: String, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> PortError {
    let error = error.into();
    let (mut refused, mut conflict) = (locked_out(error.as_ref()), false);
    causes(error.as_ref(), |cause| {
        refused |= cause.is::<Refused>();
        conflict |= is_conflict(cause);
    });
    match (refused, conflict) {
        (true, _) => PortError::permanent(what).because(error),
        // The log has refused our entry, so it did not happen.
        (false, true) => PortError::retryable(what).code("CONFLICT").because(error),
        (false, false) => PortError::unknown(what).because(error),
    }
}

/// Where a write starts from.
pub(crate) enum Start {
    /// The mark is there already, as of this version.
    Done(u64),
    /// The newest version; `None` when there is no table.
    From(Option<DeltaTable>),
}

impl DeltaLakehouse {
    /// Opens a table for a write under `txn`.
    pub(crate) async fn start(&self, table: &str, txn: &Txn) -> Result<Start> {
        let existing = self.open(table).await?;
        if let Some(existing) = &existing
            && Self::epoch(existing, &txn.app).await?.is_some_and(|seen| seen >= txn.epoch)
        {
            return Ok(Start::Done(existing.version().unwrap_or(0)));
        }
        Ok(Start::From(existing))
    }

    /// Makes of delta-rs's answer what really happened; `what` is for errors, `ctx` the session that yielded the rows.
    pub(crate) async fn settle(
        &self,
        table: &str,
        txn: &Txn,
        what: String,
        ctx: Option<&SessionContext>,
        result: Result<DeltaTable, DeltaTableError>,
    ) -> Result<Commit> {
        let error = match result {
            Ok(written) => {
                self.remember(table, &written);
                return Ok(Commit::New(written.version().unwrap_or(0)));
            }
            Err(error) => error,
        };
        // The session has stopped the rows before anything could be committed.
        if let Some(text) = ctx.and_then(refusal) {
            return Err(write_failed(what, Refused(text)));
        }
        // Success can be reported as an error; the log knows.
        let reloaded = match self.open(table).await {
            Ok(Some(reloaded)) => reloaded,
            Ok(None) => return Err(write_failed(what, error)),
            Err(refused) if locked_out(&refused) => return Err(PortError::permanent(what).because(refused)),
            // The log did not answer: nobody knows.
            Err(_) => return Err(PortError::unknown(what).because(error)),
        };
        match Self::epoch(&reloaded, &txn.app).await {
            Ok(Some(seen)) if seen >= txn.epoch => Ok(Commit::Already(reloaded.version().unwrap_or(0))),
            Ok(_) => Err(write_failed(what, error)),
            Err(_) => Err(PortError::unknown(what).because(error)),
        }
    }

    /// Makes a table from a plan in its first commit; a rival loses the race for version 0.
    pub(crate) async fn create(
        &self,
        table: &str,
        txn: &Txn,
        partition_by: Vec<String>,
        ctx: &SessionContext,
        plan: LogicalPlan,
    ) -> Result<DeltaTable, DeltaTableError> {
        let absent = self.builder(table).map_err(|e| DeltaTableError::GenericError { source: Box::new(e) })?.build()?;
        let mut write = absent
            .write(vec![])
            .with_save_mode(SaveMode::ErrorIfExists)
            .with_input_plan(plan)
            .with_session_state(std::sync::Arc::new(ctx.state()))
            .with_commit_properties(txn.properties());
        if !partition_by.is_empty() {
            write = write.with_partition_columns(partition_by);
        }
        write.await
    }

    /// A commit of the mark alone, for a write that found nothing to change.
    pub(crate) async fn commit_mark(
        base: &DeltaTable,
        txn: &Txn,
        operation: DeltaOperation,
    ) -> Result<DeltaTable, DeltaTableError> {
        let state: &DeltaTableState = base.snapshot()?;
        let commit = CommitBuilder::from(txn.properties()).build(Some(state), base.log_store(), operation).await?;
        let mut written = base.clone();
        written.update_incremental(Some(commit.version())).await?;
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use simulacro_core::ports::Disposition;

    use super::*;

    #[test]
    fn only_a_refusal_of_the_log_says_that_nothing_happened() {
        let check = |error: DeltaTableError, expected| {
            let text = format!("{error:?}");
            assert_eq!(write_failed("write a".into(), error).disposition, expected, "{text}");
        };
        check(DeltaTableError::VersionAlreadyExists(3), Disposition::Retryable);
        check(DeltaTableError::Transaction { source: TransactionError::MaxCommitAttempts(0) }, Disposition::Retryable);
        check(DeltaTableError::GenericError { source: Box::new(Refused("a null".into())) }, Disposition::Permanent);
        let lost = object_store::Error::Generic { store: "s3", source: "timeout".into() };
        check(DeltaTableError::ObjectStore { source: lost }, Disposition::Unknown);
        check(DeltaTableError::Generic("?".into()), Disposition::Unknown);
    }
}
