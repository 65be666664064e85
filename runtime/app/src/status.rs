//! `simulacro status`: runs by state, and the canonical hash of each table. It reads and changes nothing.

use std::{path::PathBuf, sync::Arc};

use clap::Args;
use simulacro_adapters::{PrometheusMetrics, connect_existing};
use simulacro_core::{
    batch::{MART, QUARANTINE, STAGING, canonical_hash},
    platform::{PIPELINE, Platform},
    ports::RunState,
};

use crate::options::{Failure, default_config, load_contract};

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro status --data lake")]
pub struct StatusArgs {
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
}

/// Prints the hash of each table that is there.
pub async fn print_hashes(platform: &Platform) -> Result<(), Failure> {
    for table in [STAGING, QUARANTINE, MART] {
        if platform.ports.lakehouse.exists(table).await? {
            println!("{table:<28} {}", canonical_hash(platform.ports.lakehouse.as_ref(), table).await?);
        }
    }
    Ok(())
}

/// Runs the command.
pub async fn run(args: StatusArgs) -> Result<(), Failure> {
    let ports = connect_existing(&args.data, Arc::new(PrometheusMetrics::default())).await?;
    let platform = Platform::new(default_config(), load_contract("cdnow")?, ports);
    let runs = platform.ports.ledger.runs(PIPELINE).await?;
    for state in [RunState::Succeeded, RunState::Held, RunState::Failed, RunState::Running] {
        println!("{:<10} {}", format!("{state:?}").to_lowercase(), runs.iter().filter(|r| r.state == state).count());
    }
    print_hashes(&platform).await
}
