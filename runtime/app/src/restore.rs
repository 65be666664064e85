//! `simulacro restore`: tables whose objects were deleted, and the cheapest way to have them back.
//!
//! Without `--execute` it only looks, and says what each way would take. What this leaves out: versions of objects in S3, which
//! the client of the store cannot list; the administrator undeletes there, and this command then verifies.

use std::{path::PathBuf, sync::Arc};

use clap::{Args, ValueEnum};
use simulacro_adapters::{PrometheusMetrics, kept_store};
use simulacro_core::{
    platform::Platform,
    ports::NoVersions,
    restore::{self, Request, Way},
};

use crate::options::{Failure, RunArgs, SourceArgs, StoreArgs};

/// A way, as it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum WayArg {
    /// Undelete objects
    Versions,
    /// Go back to the newest version that has all its files
    TimeTravel,
    /// Make marts again from staging
    Models,
    /// Make days again from the raw layer
    Raw,
    /// Extract days again from the source
    Extract,
}

impl From<WayArg> for Way {
    fn from(way: WayArg) -> Self {
        match way {
            WayArg::Versions => Self::Versions,
            WayArg::TimeTravel => Self::TimeTravel,
            WayArg::Models => Self::Models,
            WayArg::Raw => Self::Raw,
            WayArg::Extract => Self::Extract,
        }
    }
}

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro restore staging --source shop --data lake
  simulacro restore staging --source shop --data lake --execute
  simulacro restore marts/metricas_diarias --source shop --data lake --way raw --execute

Exit codes: 0 nothing is lost (any more), 1 something is, 2 usage, 4 an orchestrator, a run or another restore is at work there")]
pub struct RestoreArgs {
    /// A table, or a folder of tables, for example staging
    target: String,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// Act; without it the plan is printed and nothing is written
    #[arg(long)]
    execute: bool,
    /// Take this way and no other
    #[arg(long, value_enum)]
    way: Option<WayArg>,
    /// Extract days again from the source that the raw layer has not
    #[arg(long)]
    from_source: bool,
    #[command(flatten)]
    run: RunArgs,
}

/// Runs the command and returns the exit code.
pub async fn run(args: RestoreArgs) -> Result<u8, Failure> {
    let (config, contract, project) = args.run.load()?;
    if !args.data.join("ledger.db").is_file() {
        return Err(format!("restore: found no ledger.db in {}, expected the data folder of a run", args.data.display()).into());
    }
    let ports = args.source.open()?.connect(&args.store, &args.data, Arc::new(PrometheusMetrics::default())).await?;
    let platform = Platform::new(config, contract, ports).with_models(&project)?;
    let why = match kept_store(&args.data)? {
        None => "a local folder keeps no versions",
        Some(_) => "versions of this store are not available here; an administrator undeletes, see the runbook",
    };
    let versions = NoVersions { why };
    let request = Request { target: &args.target, only: args.way.map(Way::from), from_source: args.from_source };
    let plan = restore::plan(&platform, &versions, request).await?;
    print!("{}", plan.render());
    if !args.execute {
        return Ok(u8::from(!plan.is_whole()));
    }
    let report = restore::execute(&platform, &versions, request, &mut |said| println!("{said}")).await?;
    print!("{}", report.render());
    Ok(u8::from(!report.lost.is_empty()))
}
