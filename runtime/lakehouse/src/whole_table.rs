//! Replacing a whole Delta table: for small tables without days.
//!
//! What this leaves out: tables of facts, which are replaced a day at a time and never as a whole.

use std::sync::Arc;

use deltalake::protocol::SaveMode;
use simulacro_core::ports::{Commit, Result, TableWrite};

use crate::{
    DeltaLakehouse,
    commit::{Start, Txn},
    schema::conform,
};

impl DeltaLakehouse {
    /// Replaces all rows of a table.
    pub(crate) async fn replace_table(&self, write: TableWrite) -> Result<Commit> {
        let TableWrite { table, mark, query } = write;
        let txn = Txn::of(&table, &mark);
        let existing = match self.start(&table, &txn).await? {
            Start::Done(version) => return Ok(Commit::Already(version)),
            Start::From(existing) => existing,
        };
        let (ctx, frame) = self.plan(&query).await?;
        let plan = frame.into_unoptimized_plan();
        let result = match existing {
            None => self.create(&table, &txn, Vec::new(), &ctx, plan).await,
            Some(existing) => {
                let plan = conform(&ctx, &table, &existing, plan)?;
                existing
                    .write(vec![])
                    .with_save_mode(SaveMode::Overwrite)
                    .with_input_plan(plan)
                    .with_session_state(Arc::new(ctx.state()))
                    .with_commit_properties(txn.properties())
                    .await
            }
        };
        self.settle(&table, &txn, format!("overwrite {table}, epoch {}", txn.epoch), Some(&ctx), result).await
    }
}
