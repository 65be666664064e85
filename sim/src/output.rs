//! The files that a `run` leaves for people and for other tools, as its flags ask.

use std::path::{Path, PathBuf};

use clap::Args;
use simulacro_core::history::Event;
use simulacro_sim::{
    report,
    scenario::Story,
    summary::{self, Finished},
    world::Judgement,
};

use crate::{Failure, Job};

/// What to write.
#[derive(Debug, Default, Args)]
pub struct Output {
    /// Folder for an HTML report of each run, with its history and an index.html
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
    /// JUnit XML file
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Markdown summary file
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    #[arg(skip)]
    finished: Vec<Finished>,
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    Ok(std::fs::write(path, text).map_err(|e| format!("write {}: {e}", path.display()))?)
}

fn read_history(path: &Path) -> Result<Vec<Event>, Failure> {
    let text = std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))?;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

/// The page of a run. Scenarios of different folders may share a name, so the folder is part of it.
fn page(name: &str, seed: u64) -> String {
    let path = name.strip_suffix(".toml").unwrap_or(name).trim_start_matches(['.', '/']);
    let plain: String = path.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' { c } else { '-' }).collect();
    format!("{plain}-{seed}.html")
}

impl Output {
    /// Makes the folder, before any work is done in vain.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn prepare(&self) -> Result<(), Failure> {
        match &self.report {
            Some(folder) => Ok(std::fs::create_dir_all(folder).map_err(|e| format!("make {}: {e}", folder.display()))?),
            None => Ok(()),
        }
    }

    /// Takes a run, and writes its page.
    ///
    /// # Errors
    /// When its history cannot be read or the page cannot be written.
    pub fn add(
        &mut self,
        job: &Job,
        scenario: &Story,
        judgement: &Judgement,
        twin: Option<&Judgement>,
        wall: f64,
    ) -> Result<(), Failure> {
        let name = job.scenario.display().to_string();
        if let Some(folder) = &self.report {
            let events = job.history.as_deref().map(read_history).transpose()?.unwrap_or_default();
            let html = match scenario {
                Story::Batch(scenario) => report::html(&name, scenario, job.seed, judgement, twin, &events),
                Story::Stream(story) => report::stream_html(&name, story, job.seed, judgement, &events),
                Story::Platform(story) => report::platform_html(&name, story, job.seed, judgement, &events),
            };
            write(&folder.join(page(&name, job.seed)), &html)?;
        }
        let wall = std::time::Duration::try_from_secs_f64(wall).unwrap_or_default();
        let (summary, judgement) = (scenario.summary().to_owned(), judgement.clone());
        self.finished.push(Finished { name, summary, seed: job.seed, judgement, wall });
        Ok(())
    }

    /// Writes what tells of all runs.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn finish(&self) -> Result<(), Failure> {
        if let Some(folder) = &self.report {
            let index = folder.join("index.html");
            write(&index, &report::index(&self.finished, |f| page(&f.name, f.seed)))?;
            println!("report    {}", index.display());
        }
        if let Some(path) = &self.junit {
            write(path, &summary::junit(&self.finished))?;
        }
        if let Some(path) = &self.markdown {
            write(path, &summary::markdown(&self.finished))?;
        }
        Ok(())
    }
}
