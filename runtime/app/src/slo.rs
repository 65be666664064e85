//! `simulacro slo status`: how each promise stands, and what is left of its error budget. It reads and changes nothing.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use chrono::{DateTime, NaiveTime, Utc};
use clap::{Args, Subcommand};
use simulacro_adapters::{PrometheusMetrics, SystemEnv, connect_existing};
use simulacro_core::{
    assets::MONITOR,
    platform::PIPELINE,
    ports::{Env, RunLedger},
    slo::{
        Objective, Sample, Standing, Status,
        samples::{LOOKS, RECONCILED, of_checks, of_monitor, of_reconciled, of_runs},
    },
};

use crate::options::Failure;

/// When a day is due, in UTC.
const DUE: NaiveTime = NaiveTime::from_hms_opt(6, 0, 0).expect("a time of day");

#[derive(Subcommand)]
pub enum SloCommand {
    /// Prints attainment and error budget of each objective
    Status(StatusArgs),
}

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro slo status --data lake
  simulacro slo status --data lake --at 2024-03-31T12:00:00Z

Exit codes: 0 no objective is missed, 1 failed, 2 usage, 4 an objective is missed")]
pub struct StatusArgs {
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// The end of the windows; now by default
    #[arg(long)]
    at: Option<DateTime<Utc>>,
}

/// What the ledger knows of the objectives.
async fn samples(ledger: &dyn RunLedger, now: DateTime<Utc>) -> Result<Vec<Sample>, Failure> {
    let mut runs = ledger.runs(PIPELINE).await?;
    // A run of models alone says nothing on the rows of its day.
    runs.retain(|run| run.report.get("kind").is_none());
    let mut out = of_runs(&runs, DUE, now);
    for fecha in runs.iter().map(|run| run.fecha).collect::<BTreeSet<_>>() {
        out.extend(of_checks(fecha, DUE, &ledger.quality(fecha).await?));
    }
    out.extend(of_reconciled(&ledger.facts(RECONCILED).await?, DUE));
    out.extend(of_monitor(&ledger.runs(MONITOR).await?, &ledger.facts(LOOKS).await?));
    Ok(out)
}

fn line(objective: &Objective, status: &Status) -> String {
    let (may, spent) = status.budget();
    let attained = status.attained().map_or_else(|| "-".into(), |share| share.to_string());
    let standing = match status.standing {
        Standing::Met => "met",
        Standing::Missed => "MISSED",
        Standing::NoData => "no data",
    };
    let days = objective.window.num_days();
    let (target, good, total) = (status.target.to_string(), status.good, status.total);
    format!("{:<31} {days:>3} d {target:>9} {attained:>10} {good:>7} {total:>7} {spent:>6} of {may:<5} {standing}", status.name)
}

/// Runs the command and returns its exit code.
pub async fn run(command: SloCommand) -> Result<u8, Failure> {
    let SloCommand::Status(args) = command;
    let ports = connect_existing(&args.data, Arc::new(PrometheusMetrics::default())).await?;
    let now = args.at.unwrap_or_else(|| SystemEnv::default().now());
    let samples = samples(&*ports.ledger, now).await?;
    println!("{:<31} {:>5} {:>9} {:>10} {:>7} {:>7} {:>6}", "objective", "over", "target", "attained", "good", "all", "spent");
    let mut missed = false;
    for objective in Objective::shipped()? {
        let status = objective.evaluate(&samples, now);
        missed |= status.standing == Standing::Missed;
        println!("{}", line(&objective, &status));
    }
    Ok(if missed { 4 } else { 0 })
}
