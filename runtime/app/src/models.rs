//! `simulacro models`: the SQL models, what they read, how they are drawn, and their runs and tests for a day.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc};

use chrono::NaiveDate;
use clap::{Args, Subcommand, ValueEnum};
use simulacro_adapters::{NoSource, PrometheusMetrics, SystemEnv, connect_existing, connect_folder, open_lake};
use simulacro_core::{
    models::{At, Materialization, Project, mermaid, nearest, shipped, svg, text},
    platform::Platform,
    ports::{Env, Lakehouse},
    quality,
};

use crate::options::{Failure, default_config, load_contract};

/// How the graph is drawn.
#[derive(Clone, Copy, ValueEnum)]
pub enum Format {
    /// An indented list, for a terminal
    Text,
    /// Mermaid, for Markdown
    Mermaid,
    /// A picture
    Svg,
}

/// Commands about models.
#[derive(Subcommand)]
pub enum ModelsCommand {
    /// Lists the models in order, with what each reads
    List,
    /// Tells what a model is, what it reads, who reads it, and its SQL for a day
    #[command(after_help = "Examples:
  simulacro models explain metricas_producto --date 1997-01-01")]
    Explain {
        /// Name, for example metricas_producto
        name: String,
        /// The day
        #[arg(long)]
        date: NaiveDate,
    },
    /// Draws the graph
    #[command(after_help = "Examples:
  simulacro models draw --format svg > models.svg")]
    Draw {
        /// Form
        #[arg(long, value_enum, default_value = "text")]
        format: Format,
    },
    /// Makes models for a day that the batch has staged, with every later day that has read it, tests them, and loads the
    /// warehouse
    #[command(after_help = "Examples:
  simulacro models run --data lake --date 1997-01-01
  simulacro models run --data lake --date 1997-01-01 --select int_ventas_enriquecidas+

Exit codes: 0 done, 1 failed, 2 usage, 3 held by a test, 4 somebody else is running the pipeline")]
    Run(OnLake),
    /// Tests what models have made of a day; all tests run, all failures are told with some of their rows
    #[command(after_help = "Examples:
  simulacro models test --data lake --date 1997-01-01
  simulacro models test --data lake --date 1997-01-01 --select +user_features

Exit codes: 0 all that must passed, 1 could not be tested, 2 usage, 3 a test failed")]
    Test(OnLake),
}

#[derive(Args)]
pub struct OnLake {
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// The day
    #[arg(long)]
    date: NaiveDate,
    /// all, or names parted by commas, with a + before for what they read or after for what reads them; without it, to run:
    /// all, to test: all that were made
    #[arg(long)]
    select: Option<String>,
}

/// The models whose tables are there, and the names of the others.
async fn present(lakehouse: &dyn Lakehouse, project: &Project) -> Result<(Project, Vec<String>), Failure> {
    let (mut there, mut absent) = (Vec::new(), Vec::new());
    for model in project.models() {
        match model.materialization {
            Materialization::Day if !lakehouse.exists(&model.table).await? => absent.push(model.name.clone()),
            Materialization::Day | Materialization::View => there.push(model.name.as_str()),
        }
    }
    Ok((project.select(&there.join(","))?, absent))
}

async fn run_models(args: OnLake) -> Result<u8, Failure> {
    let project = shipped()?.select(args.select.as_deref().unwrap_or("all"))?;
    // A folder that is not there is not made.
    open_lake(&args.data)?;
    let ports = connect_folder(Arc::new(NoSource), &args.data, Arc::new(PrometheusMetrics::default())).await?;
    let platform = Platform::new(default_config(), load_contract("cdnow")?, ports).with_only(project);
    let published = platform.run_models(args.date).await?;
    for (model, days) in &published.models {
        println!("{model:<24} {days} {}", if *days == 1 { "day" } else { "days" });
    }
    for warning in &published.warnings {
        println!("warning {warning}");
    }
    println!("{} models made for {}, {} tests", published.models.len(), args.date, published.tests);
    Ok(0)
}

async fn test_models(args: OnLake) -> Result<u8, Failure> {
    let all = shipped()?;
    let chosen = args.select.as_deref().map(|s| all.select(s)).transpose()?;
    let ports = connect_existing(&args.data, Arc::new(PrometheusMetrics::default())).await?;
    let project = match chosen {
        Some(project) => project,
        None => {
            let (project, absent) = present(ports.lakehouse.as_ref(), all).await?;
            if !absent.is_empty() {
                println!("not made here, and not tested: {}", absent.join(", "));
            }
            project
        }
    };
    let tested = quality::test_models(ports.lakehouse.as_ref(), &project, args.date, ports.env.now()).await?;
    print!("{}", quality::render(&tested));
    Ok(if quality::broken(&tested).next().is_some() { 3 } else { 0 })
}

/// Runs a command and returns the exit code.
pub async fn run(command: ModelsCommand) -> Result<u8, Failure> {
    let project = shipped()?;
    match command {
        ModelsCommand::List | ModelsCommand::Draw { format: Format::Text } => print!("{}", text(project)),
        ModelsCommand::Draw { format: Format::Mermaid } => print!("{}", mermaid(project)),
        ModelsCommand::Draw { format: Format::Svg } => print!("{}", svg(project)),
        ModelsCommand::Explain { name, date } => {
            let at =
                At { day: date, now: SystemEnv::default().now(), version: env!("CARGO_PKG_VERSION"), absent: &BTreeSet::new() };
            let told = project.explain(&name, &at).ok_or_else(|| {
                let known: Vec<&str> = project.models().map(|m| m.name.as_str()).collect();
                let near = nearest(&name, known.iter().copied()).map(|n| format!("; did you mean {n}?")).unwrap_or_default();
                format!("model {name}: found none, expected one of {}{near}", known.join(", "))
            })?;
            print!("{told}");
        }
        ModelsCommand::Run(args) => return run_models(args).await,
        ModelsCommand::Test(args) => return test_models(args).await,
    }
    Ok(0)
}
