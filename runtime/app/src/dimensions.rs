//! `simulacro dimensions`: a round of the dimension API by hand, and which versions there are.

use std::{path::PathBuf, sync::Arc};

use clap::{Args, Subcommand};
use simulacro_adapters::{PrometheusMetrics, SystemEnv, connect_existing};
use simulacro_core::{
    dimensions::{Dimension, newest},
    platform::Platform,
    ports::{Env, RunState},
};

use crate::options::{Failure, SourceArgs, StoreArgs, default_config, load_contract};

/// Commands of the dimensions.
#[derive(Subcommand)]
pub enum DimensionsCommand {
    /// Asks the API for every dimension but customers, which each day's run reads itself, and keeps what has changed
    Refresh(RefreshArgs),
    /// Prints the newest version of each dimension, and how old it is; changes nothing
    Status(StatusArgs),
}

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro dimensions refresh --postgres postgres://lector@db.local/tienda --data lake --dimensions http://dimensiones.local/v1
  simulacro dimensions refresh --source shop --data lake

Exit codes: 0 every dimension came, 1 one did not, and the version before serves as long as it may, 2 usage, 4 somebody else is at it")]
pub struct RefreshArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// Folder for lake, ledger and history
    #[arg(long)]
    data: PathBuf,
}

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro dimensions status --data lake")]
pub struct StatusArgs {
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
}

async fn refresh(args: RefreshArgs) -> Result<u8, Failure> {
    let source = args.source.open()?;
    let ports = source.connect(&args.store, &args.data, Arc::new(PrometheusMetrics::default())).await?;
    let platform = Platform::new(default_config(), load_contract("ventas")?, ports);
    let (run, refreshed) = platform.refresh_dimensions(platform.ports.env.now()).await?;
    if refreshed.is_empty() {
        println!("no dimension is offered; --dimensions names an API, and a folder may have productos.csv");
    }
    for of in &refreshed {
        let version = of.version.map_or_else(|| "no version".into(), |v| format!("version {v}"));
        let rows = of.rows.map_or_else(String::new, |rows| format!(", {rows} rows"));
        let failed = of.failed.as_ref().map_or_else(String::new, |why| format!("  NOT REFRESHED: {why}"));
        println!("{:<12} {version}{rows}{failed}", of.dimension.name());
    }
    Ok(u8::from(run.state != RunState::Succeeded))
}

async fn status(args: StatusArgs) -> Result<(), Failure> {
    let ports = connect_existing(&args.data, Arc::new(PrometheusMetrics::default())).await?;
    let now = SystemEnv::default().now();
    for dimension in Dimension::ALL {
        match newest(&ports, dimension).await? {
            None => println!("{:<12} no version", dimension.name()),
            Some(v) => {
                let (minutes, at) = ((now - v.confirmed_at).num_minutes(), v.confirmed_at.format("%FT%TZ"));
                println!("{:<12} version {}, {} rows, confirmed {at}, {minutes} min ago", dimension.name(), v.version, v.rows);
            }
        }
    }
    Ok(())
}

/// Runs a command and returns the exit code.
pub async fn run(command: DimensionsCommand) -> Result<u8, Failure> {
    match command {
        DimensionsCommand::Refresh(args) => refresh(args).await,
        DimensionsCommand::Status(args) => status(args).await.map(|()| 0),
    }
}
