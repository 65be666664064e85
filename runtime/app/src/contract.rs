//! `simulacro contract`: what a contract promises, whether a source or the lake keeps it, and how two contracts differ.

use std::{num::NonZeroUsize, path::PathBuf, sync::Arc};

use chrono::NaiveDate;
use clap::Subcommand;
use simulacro_adapters::{PrometheusMetrics, connect_existing, scratch};
use simulacro_core::{
    contract::{
        catalogue,
        check::{check_confirmed, is_broken, render},
        diff,
    },
    dimensions::confirmed,
    ports::Env,
    quality::check_source_day,
};

use crate::options::{Failure, SourceArgs, load_contract};

/// Commands about contracts.
#[derive(Subcommand)]
pub enum ContractCommand {
    /// Lists the contracts that ship with the program
    List,
    /// Compares two contracts: exit code 0 when every change is additive, 3 when one is breaking
    Diff {
        /// A contract that ships with the program, or a file
        old: String,
        /// Another
        new: String,
    },
    /// Checks a day of a live source or of the tables of a lake; all checks run, all failures are told
    #[command(after_help = "Examples:
  simulacro contract check --source shop --date 1997-01-01
  simulacro contract check --postgres postgres://lector@db.local/tienda --contract ventas --date 2024-03-17
  simulacro contract check --data lake --date 1997-01-01

Exit codes: 0 kept, 1 could not be checked, 2 usage, 3 broken")]
    Check {
        /// Folder with CSV files: the day is read and judged, and changes nothing
        #[arg(long, conflicts_with_all = ["data", "postgres"], required_unless_present_any = ["data", "postgres"])]
        source: Option<PathBuf>,
        /// A PostgreSQL server, for example postgres://lector@db.local:5432/tienda; the password comes from PGPASSWORD or the
        /// password file
        #[arg(long, conflicts_with = "data")]
        postgres: Option<String>,
        /// Schema of the source table in PostgreSQL
        #[arg(long, default_value = "public")]
        schema: String,
        /// Folder of a run: the rows of its tables are judged
        #[arg(long)]
        data: Option<PathBuf>,
        /// A contract that ships with the program, or a file; for a lake, without it, all that have a table there
        #[arg(long)]
        contract: Option<String>,
        /// The day
        #[arg(long)]
        date: NaiveDate,
    },
}

/// Runs a command and returns the exit code.
pub async fn run(command: ContractCommand) -> Result<u8, Failure> {
    match command {
        ContractCommand::List => {
            for contract in catalogue::shipped()? {
                println!(
                    "{:<32} {:<28} {} columns, {} rules",
                    contract.id,
                    contract.physical_name,
                    contract.columns.len(),
                    contract.rules.len()
                );
            }
            Ok(0)
        }
        ContractCommand::Diff { old, new } => {
            let (old, new) = (load_contract(&old)?, load_contract(&new)?);
            let changes = diff::diff(&old, &new);
            print!("{}", diff::render(&old, &new, &changes));
            Ok(if diff::is_breaking(&changes) { 3 } else { 0 })
        }
        ContractCommand::Check { source, postgres, schema, data, contract, date } => {
            let now = simulacro_adapters::SystemEnv::default().now();
            let mut results = Vec::new();
            if source.is_some() || postgres.is_some() {
                let contract = load_contract(contract.as_deref().unwrap_or("cdnow"))?;
                let source = SourceArgs {
                    source,
                    postgres,
                    schema,
                    connections: NonZeroUsize::MIN,
                    dimensions: None,
                    dimension_tables: false,
                    dimension: Vec::new(),
                };
                let source = source.open()?;
                let folder = tempfile::tempdir()?;
                results = check_source_day(source.tables.as_ref(), &scratch(folder.path())?, &contract, date, now).await;
            }
            if let Some(data) = data {
                let ports = connect_existing(&data, Arc::new(PrometheusMetrics::default())).await?;
                let all = catalogue::shipped()?;
                let chosen = match contract {
                    Some(name) => vec![load_contract(&name)?],
                    None => all.clone(),
                };
                for contract in chosen {
                    if ports.lakehouse.exists(&contract.physical_name).await? {
                        let known = confirmed(&ports, &contract.physical_name).await?;
                        results.extend(check_confirmed(ports.lakehouse.as_ref(), &contract, &all, date, now, known).await);
                    }
                }
                if results.is_empty() {
                    return Err(format!("check {}: found no table with a contract, expected at least one", data.display()).into());
                }
            }
            print!("{}", render(&results));
            Ok(if is_broken(&results) { 3 } else { 0 })
        }
    }
}
