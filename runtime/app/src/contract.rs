//! `simulacro contract`: what a contract promises, whether a source or the lake keeps it, and how two contracts differ.

use std::{path::PathBuf, sync::Arc};

use chrono::NaiveDate;
use clap::Subcommand;
use simulacro_adapters::{CsvSource, PrometheusMetrics, connect_embedded};
use simulacro_core::{
    contract::{
        catalogue,
        check::{check_source, check_table, is_broken, render},
        diff,
    },
    ports::Env,
};

use crate::{Failure, load_contract};

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
    /// Checks a live source or the tables of a lake; all checks run, all failures are told, exit code 3 when one is an error
    Check {
        /// Folder with CSV files: its columns are compared with the contract
        #[arg(long, conflicts_with = "data", required_unless_present = "data")]
        source: Option<PathBuf>,
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
        ContractCommand::Check { source, data, contract, date } => {
            let now = simulacro_adapters::SystemEnv::default().now();
            let mut results = Vec::new();
            if let Some(folder) = source {
                let contract = load_contract(contract.as_deref().unwrap_or("cdnow"))?;
                results = check_source(&CsvSource::open(&folder)?, &contract, date, now).await;
            }
            if let Some(data) = data {
                if !data.join("ledger.db").exists() {
                    return Err(format!("check {}: found no ledger.db, expected the data folder of a run", data.display()).into());
                }
                let empty = tempfile::tempdir()?;
                let ports = connect_embedded(empty.path(), &data, Arc::new(PrometheusMetrics::default())).await?;
                let all = catalogue::shipped()?;
                let chosen = match contract {
                    Some(name) => vec![load_contract(&name)?],
                    None => all.clone(),
                };
                for contract in chosen {
                    if ports.lakehouse.exists(&contract.physical_name).await? {
                        results.extend(check_table(ports.lakehouse.as_ref(), &contract, &all, date, now).await);
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
