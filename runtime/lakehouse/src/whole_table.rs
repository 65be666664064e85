//! Replacing a whole Delta table: for small tables without days.
//!
//! The epoch in the Delta `txn` action decides, as for a day: an older epoch never replaces a newer one. What this leaves
//! out: tables of facts, which are replaced a day at a time and never as a whole.

use std::sync::Arc;

use deltalake::{
    datafusion::{logical_expr::LogicalPlan, prelude::SessionContext},
    kernel::{Transaction, transaction::CommitProperties},
    protocol::SaveMode,
};
use simulacro_core::ports::{Commit, PortError, Result};

use crate::DeltaLakehouse;

impl DeltaLakehouse {
    /// Replaces all rows of a table by those of `plan`, at most once per epoch.
    pub(crate) async fn replace_table(&self, table: &str, epoch: i64, ctx: &SessionContext, plan: LogicalPlan) -> Result<Commit> {
        let app = format!("simulacro:{table}");
        let existing = self.open(table).await?;
        if let Some(existing) = &existing
            && Self::epoch(existing, &app).await?.is_some_and(|seen| seen >= epoch)
        {
            return Ok(Commit::Already(existing.version().unwrap_or(0)));
        }
        let properties = CommitProperties::default()
            .with_application_transaction(Transaction::new(&app, epoch))
            .with_max_retries(0)
            .with_create_checkpoint(false)
            .with_cleanup_expired_logs(Some(false));
        let base = match existing {
            Some(existing) => existing.write(vec![]).with_save_mode(SaveMode::Overwrite),
            // The first commit of a table is its creation; a rival loses the race for version 0.
            None => self
                .builder(table)?
                .build()
                .map_err(|e| PortError::permanent(format!("create {table}")).because(e))?
                .write(vec![])
                .with_save_mode(SaveMode::ErrorIfExists),
        };
        let result =
            base.with_input_plan(plan).with_session_state(Arc::new(ctx.state())).with_commit_properties(properties).await;
        match result {
            Ok(written) => {
                self.remember(table, &written);
                Ok(Commit::New(written.version().unwrap_or(0)))
            }
            Err(e) => {
                // Success can be reported as an error; the log knows.
                if let Ok(Some(reloaded)) = self.open(table).await
                    && Self::epoch(&reloaded, &app).await?.is_some_and(|seen| seen >= epoch)
                {
                    return Ok(Commit::Already(reloaded.version().unwrap_or(0)));
                }
                Err(PortError::unknown(format!("overwrite {table}, epoch {epoch}")).because(e))
            }
        }
    }
}
