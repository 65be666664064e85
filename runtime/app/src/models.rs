//! `simulacro models`: the SQL models, what they read, how they are drawn.

use std::collections::BTreeSet;

use chrono::NaiveDate;
use clap::{Subcommand, ValueEnum};
use simulacro_adapters::SystemEnv;
use simulacro_core::{
    contract::catalogue,
    models::{At, Project, mermaid, svg, text},
    ports::Env,
};

use crate::Failure;

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
    Explain {
        /// Name, for example metricas_producto
        name: String,
        /// The day
        #[arg(long)]
        date: NaiveDate,
    },
    /// Draws the graph
    Draw {
        /// Form
        #[arg(long, value_enum, default_value = "text")]
        format: Format,
    },
}

/// Runs a command.
pub fn run(command: ModelsCommand) -> Result<(), Failure> {
    let project = Project::new(simulacro_lakehouse::models::FILES, catalogue::shipped()?)?;
    match command {
        ModelsCommand::List | ModelsCommand::Draw { format: Format::Text } => print!("{}", text(&project)),
        ModelsCommand::Draw { format: Format::Mermaid } => print!("{}", mermaid(&project)),
        ModelsCommand::Draw { format: Format::Svg } => print!("{}", svg(&project)),
        ModelsCommand::Explain { name, date } => {
            let at =
                At { day: date, now: SystemEnv::default().now(), version: env!("CARGO_PKG_VERSION"), absent: &BTreeSet::new() };
            let known = || project.models().map(|m| m.name.clone()).collect::<Vec<_>>().join(", ");
            let told =
                project.explain(&name, &at).ok_or_else(|| format!("model {name}: found none, expected one of {}", known()))?;
            print!("{told}");
        }
    }
    Ok(())
}
