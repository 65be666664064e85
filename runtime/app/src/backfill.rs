//! `simulacro batch backfill`: what a range of days needs, and the doing of it, in a way that can be interrupted.
//!
//! What an apply has begun is kept in `backfill/` of the data folder, one file per plan, so that applying again goes on.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use chrono::NaiveDate;
use clap::{Args, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use simulacro_adapters::{PrometheusMetrics, connect_existing};
use simulacro_core::{
    backfill::{self, Applied, Journal, Plan, Policy, Then},
    platform::Platform,
    ports::{PortError, Ports, RunState},
};

use crate::{
    batch,
    options::{Failure, RunArgs, SourceArgs, StoreArgs, load_contract, read},
    telemetry::Progress,
};

/// Folder of plans that are being applied, in the data folder.
const FOLDER: &str = "backfill";

/// Commands of a backfill.
#[derive(Subcommand)]
pub enum BackfillCommand {
    /// Tells for each day of a range what ledger and lake have, what would be run and why; writes nothing
    #[command(after_help = "Examples:
  simulacro batch backfill plan --data lake --from 1997-01-01 --to 1997-01-31
  simulacro batch backfill plan --data lake --from 1997-01-01 --to 1997-01-31 --force --out plan.json")]
    Plan(PlanArgs),
    /// Runs the days that a plan or a range needs, one by one; applying again goes on where an interrupted one stopped
    #[command(after_help = "Examples:
  simulacro batch backfill apply --source shop --data lake --from 1997-01-01 --to 1997-01-31
  simulacro batch backfill apply --source shop --data lake --plan plan.json --on-held continue

Exit codes: 0 all days published, 1 a day failed, or the plan does not hold any more, 2 usage, 3 a day is held by a gate,
4 somebody else is running the pipeline")]
    Apply(Box<ApplyArgs>),
}

#[derive(Args)]
pub struct PlanArgs {
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// First day
    #[arg(long)]
    from: NaiveDate,
    /// Last day
    #[arg(long)]
    to: NaiveDate,
    /// Also run days that are published
    #[arg(long)]
    force: bool,
    /// The contract by which the days will be judged
    #[arg(long, default_value = "cdnow")]
    contract: String,
    /// File for the plan, to be applied later
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What to do after a day that was not published.
#[derive(Clone, Copy, ValueEnum)]
pub enum After {
    /// Run no further day
    Stop,
    /// Go on with the next day
    Continue,
}

impl From<After> for Then {
    fn from(after: After) -> Self {
        match after {
            After::Stop => Self::Stop,
            After::Continue => Self::Continue,
        }
    }
}

#[derive(Args)]
pub struct ApplyArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// Folder of lake, ledger and history
    #[arg(long)]
    data: PathBuf,
    /// A plan that was kept with backfill plan --out
    #[arg(long, conflicts_with_all = ["from", "to", "force"], required_unless_present_all = ["from", "to"])]
    plan: Option<PathBuf>,
    /// First day
    #[arg(long, requires = "to")]
    from: Option<NaiveDate>,
    /// Last day
    #[arg(long, requires = "from")]
    to: Option<NaiveDate>,
    /// Also run days that are published
    #[arg(long)]
    force: bool,
    /// After a day that a gate has held
    #[arg(long, value_enum, default_value = "stop")]
    on_held: After,
    /// After a day that failed
    #[arg(long, value_enum, default_value = "stop")]
    on_failed: After,
    #[command(flatten)]
    run: RunArgs,
    /// Address of a metrics endpoint while the run lasts
    #[arg(long)]
    metrics: Option<SocketAddr>,
}

/// A line of what an apply keeps.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    /// This day was about to be run.
    Begun(NaiveDate),
    /// Every day of the plan was come to.
    Finished,
}

/// What an apply keeps of itself.
struct Kept {
    path: PathBuf,
    begun: BTreeSet<NaiveDate>,
    is_finished: bool,
}

impl Kept {
    /// Reads what an earlier apply of this plan has kept; nothing when there was none.
    fn read(data: &Path, id: &str) -> Result<Self, Failure> {
        let path = data.join(FOLDER).join(format!("{id}.jsonl"));
        let text = if path.exists() { read(&path)? } else { String::new() };
        let (mut begun, mut is_finished) = (BTreeSet::new(), false);
        for line in text.lines() {
            // The last line may have been cut by a kill: its day was then not run.
            match serde_json::from_str(line) {
                Ok(Line::Begun(fecha)) => drop(begun.insert(fecha)),
                Ok(Line::Finished) => is_finished = true,
                Err(_) => {}
            }
        }
        Ok(Self { path, begun, is_finished })
    }

    /// Appends a line that survives the end of the process.
    fn append(&self, line: &Line) -> Result<(), PortError> {
        let failed = |e: std::io::Error| PortError::permanent(format!("write {}", self.path.display())).because(e);
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let text =
            serde_json::to_string(line).map_err(|e| PortError::permanent(format!("write {}", self.path.display())).because(e))?;
        // A line that was cut stays a line of its own.
        let mut file = File::options().create(true).append(true).open(&self.path).map_err(failed)?;
        file.write_all(format!("\n{text}\n").as_bytes()).map_err(failed)?;
        file.sync_data().map_err(failed)
    }
}

/// What an apply hears while it runs.
struct Watch<'a> {
    kept: &'a Kept,
    progress: Progress,
}

impl Journal for Watch<'_> {
    fn begins(&mut self, fecha: NaiveDate) -> Result<(), PortError> {
        self.progress.at(&fecha.to_string());
        self.kept.append(&Line::Begun(fecha))
    }
    fn ended(&mut self, day: &Applied) {
        if day.state != RunState::Succeeded {
            tracing::warn!(fecha = %day.fecha, state = ?day.state, why = %day.why, "day of the backfill not published");
        }
        self.progress.step();
    }
}

async fn look(ports: &Ports, contract: &str, range: (NaiveDate, NaiveDate), force: bool) -> Result<Plan, Failure> {
    let length = u64::try_from((range.1 - range.0).num_days() + 1).unwrap_or(0);
    let progress = Progress::new("days looked at", length)?;
    let mut seen = |fecha: NaiveDate| {
        progress.at(&fecha.to_string());
        progress.step_quietly();
    };
    Ok(backfill::plan(ports, contract, range, force, &mut seen).await?)
}

async fn plan(args: PlanArgs) -> Result<(), Failure> {
    let contract = load_contract(&args.contract)?;
    let ports = connect_existing(&args.data, Arc::new(PrometheusMetrics::default())).await?;
    let plan = look(&ports, &contract.id, (args.from, args.to), args.force).await?;
    print!("{}", plan.render());
    if let Some(out) = args.out {
        let text = serde_json::to_string_pretty(&plan)? + "\n";
        std::fs::write(&out, text).map_err(|e| format!("write plan {}: {e}", out.display()))?;
        println!("plan {} kept in {}", plan.id(), out.display());
    }
    Ok(())
}

/// A forced backfill of the same range that was begun and not finished; it knows which days it has done.
fn unfinished(data: &Path, range: (NaiveDate, NaiveDate), contract: &str) -> Result<Option<Plan>, Failure> {
    let Ok(entries) = std::fs::read_dir(data.join(FOLDER)) else { return Ok(None) };
    let mut found: Vec<Plan> = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "json") {
            let plan = Plan::parse(&path.display().to_string(), &read(&path)?)?;
            let same = (plan.from, plan.to) == range && plan.force && plan.contract == contract;
            if same && !Kept::read(data, &plan.id())?.is_finished {
                found.push(plan);
            }
        }
    }
    Ok(found.into_iter().max_by_key(|p| p.made_at))
}

/// A plan that was kept cannot be applied, because of what has happened since.
fn refuse(plan: &Plan, differences: &[String]) -> Failure {
    const SHOWN: usize = 10;
    let mut list = differences.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n  ");
    if differences.len() > SHOWN {
        list.push_str(&format!("\n  and {} more", differences.len() - SHOWN));
    }
    format!("apply plan {} of {}: the state has changed since, make a new plan\n  {list}", plan.id(), plan.made_at).into()
}

async fn apply(args: ApplyArgs) -> Result<u8, Failure> {
    let (config, contract, project) = args.run.load()?;
    let kept_plan =
        args.plan.as_deref().map(|p| Plan::parse(&p.display().to_string(), &read(p)?).map_err(Failure::from)).transpose()?;
    let source = args.source.open()?;
    let range = match (&kept_plan, args.from, args.to) {
        (Some(plan), ..) => (plan.from, plan.to),
        (None, Some(from), Some(to)) => (from, to),
        (None, ..) => return Err("apply: found no plan and no range, expected --plan, or --from and --to".into()),
    };
    let ports = source.connect(&args.store, &args.data, batch::metrics(args.metrics).await?).await?;
    let now = look(&ports, &contract.id, range, args.force).await?;
    let resumed = if args.force { unfinished(&args.data, range, &contract.id)? } else { None };
    let plan = match (kept_plan, resumed) {
        (Some(plan), _) => plan,
        (None, Some(plan)) => {
            println!("going on with plan {} of {}", plan.id(), plan.made_at);
            plan
        }
        (None, None) => now.clone(),
    };
    let mut kept = Kept::read(&args.data, &plan.id())?;
    let differences = plan.differences(&now, &kept.begun);
    if !differences.is_empty() {
        return Err(refuse(&plan, &differences));
    }
    let days = plan.left(&now, &kept.begun);
    if days.is_empty() {
        println!("nothing to run: {} days looked at", plan.days.len());
        return Ok(0);
    }
    // The plan before the first day, so that an interrupted apply can be gone on with.
    let copy = args.data.join(FOLDER).join(format!("{}.json", plan.id()));
    std::fs::create_dir_all(args.data.join(FOLDER)).map_err(|e| format!("create folder {FOLDER}: {e}"))?;
    std::fs::write(&copy, serde_json::to_string(&plan)?).map_err(|e| format!("write {}: {e}", copy.display()))?;
    let platform = Platform::new(config, contract, ports).with_models(&project)?;
    let policy = Policy { on_held: args.on_held.into(), on_failed: args.on_failed.into() };
    let mut watch = Watch { kept: &kept, progress: Progress::new("days", days.len() as u64)? };
    let summary = backfill::apply(&platform, &days, policy, &mut watch).await?;
    drop(watch);
    print!("{}", summary.render());
    if summary.left.is_empty() && summary.count(RunState::Succeeded) == summary.days.len() {
        kept.append(&Line::Finished)?;
        kept.is_finished = true;
    }
    Ok(match (summary.count(RunState::Failed), summary.count(RunState::Held)) {
        (0, 0) => 0,
        (0, _) => 3,
        _ => 1,
    })
}

/// Runs a command and returns the exit code.
pub async fn run(command: BackfillCommand) -> Result<u8, Failure> {
    match command {
        BackfillCommand::Plan(args) => plan(args).await.map(|()| 0),
        BackfillCommand::Apply(args) => apply(*args).await,
    }
}
