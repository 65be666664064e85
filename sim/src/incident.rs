//! The commands about an incident: cut a capsule, replay it, draft its postmortem.

use std::path::{Path, PathBuf};

use chrono::{DateTime, NaiveTime, Utc};
use clap::Args;
use simulacro_core::{
    history::Event,
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::Config,
};
use simulacro_sim::{
    capsule::{Capsule, Divergence, Origin, line, reconstruct},
    postmortem::markdown,
    scenario::Story,
    world::Judgement,
};

use crate::{
    Failure, Job,
    commands::{World, read_history},
    judged, load, show,
};

/// What to cut out of.
#[derive(Args)]
pub struct Capture {
    /// A scenario, which is run, or a history of production (`.jsonl`)
    of: PathBuf,
    /// Seed; instead of the scenario's first one
    #[arg(long)]
    seed: Option<u64>,
    /// Only events at or after this time
    #[arg(long)]
    from: Option<DateTime<Utc>>,
    /// Only events before this time
    #[arg(long)]
    to: Option<DateTime<Utc>>,
    /// Of production: the platform's configuration as TOML, the `[config]` of a scenario; without it, the one that ships
    #[arg(long)]
    config: Option<PathBuf>,
    /// Of production: time of day at which the run is due, in UTC
    #[arg(long, default_value = "03:00:00")]
    schedule: NaiveTime,
    /// Of production: time of day at which a day must be published, in UTC
    #[arg(long, default_value = "06:00:00")]
    sla: NaiveTime,
    /// Where the capsule goes
    #[arg(long)]
    out: PathBuf,
}

/// What to repeat.
#[derive(Args)]
pub struct Replay {
    /// A capsule, or a seed, whose drawn run is repeated in two processes
    target: String,
    /// Of a seed: of which world its story is drawn
    #[arg(long, value_enum, default_value_t = World::Batch)]
    world: World,
}

/// What to tell about.
#[derive(Args)]
pub struct Postmortem {
    /// A scenario or a capsule; both are run
    target: PathBuf,
    /// Of a scenario: instead of its first seed
    #[arg(long)]
    seed: Option<u64>,
    /// Where the document goes; to standard output without it
    #[arg(long)]
    out: Option<PathBuf>,
}

struct Ran {
    job: Job,
    judgement: Judgement,
    events: Vec<Event>,
    wall: f64,
}

fn run(scenario: &Path, story: &Story, seed: u64) -> Result<Ran, Failure> {
    let folder = tempfile::tempdir()?;
    let history = folder.path().join("history.jsonl");
    let mut job = Job {
        scenario: scenario.to_owned(),
        seed,
        history: Some(history.clone()),
        plant: false,
        twin: false,
        counterfactual: false,
    };
    let (judgement, _, wall) = judged(&job, story)?;
    let events = read_history(&history)?;
    job.history = None;
    Ok(Ran { job, judgement, events, wall })
}

/// Runs a story that is in no file.
fn run_text(text: &str, seed: u64) -> Result<Ran, Failure> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("story.toml");
    std::fs::write(&path, text)?;
    run(&path, &load(&path)?, seed)
}

fn is_history(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "jsonl")
}

fn shipped() -> Config {
    Config {
        source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
        retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
        alert_after_s: 60,
        startup_s: 0,
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    Ok(std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()))?)
}

/// Cuts a capsule.
pub fn capture(capture: &Capture) -> Result<u8, Failure> {
    let Capture { of, seed, from, to, config, schedule, sla, out } = capture;
    let capsule = if is_history(of) {
        let within = |event: &Event| from.is_none_or(|f| event.time >= f) && to.is_none_or(|t| event.time < t);
        let events: Vec<Event> = read_history(of)?.into_iter().filter(within).collect();
        let config = match config {
            Some(path) => toml::from_str(&read(path)?).map_err(|e| format!("config {}: {e}", path.display()))?,
            None => shipped(),
        };
        let story = Story::Batch(Box::new(reconstruct(&events, config, *schedule, *sla)?));
        Capsule::cut(Origin::Production, &story, seed.unwrap_or(1), events, *from, *to)?
    } else {
        let story = load(of)?;
        let seed = seed.unwrap_or(story.seeds()[0]);
        Capsule::cut(Origin::Simulation, &story, seed, run(of, &story, seed)?.events, *from, *to)?
    };
    std::fs::write(out, capsule.text()?).map_err(|e| format!("write {}: {e}", out.display()))?;
    println!("{} events, seed {}, in {}", capsule.events.len(), capsule.head.seed, out.display());
    println!("repeat    simulacro-sim replay {}", out.display());
    Ok(0)
}

fn tell(divergence: &Divergence) -> u8 {
    let Divergence { at: (at, of), before, expected, found } = divergence;
    println!("the replay parts at event {at} of {of}:");
    before.iter().for_each(|event| println!("  both      {event}"));
    println!("  expected  {expected}");
    println!("  found     {found}");
    5
}

/// Repeats.
pub fn replay(replay: &Replay) -> Result<u8, Failure> {
    if let Ok(seed) = replay.target.parse::<u64>() {
        let story = replay.world.draw(seed);
        let text = story.to_toml()?;
        let (first, second) = (run_text(&text, seed)?, run_text(&text, seed)?);
        show(&first.job, &story, &first.judgement, first.wall);
        let lines = |ran: &Ran| ran.events.iter().map(line).collect::<Vec<_>>();
        let (a, b) = (lines(&first), lines(&second));
        if (&a, &first.judgement) == (&b, &second.judgement) {
            println!("equal: {} events in both processes", a.len());
            return Ok(u8::from(first.judgement.verdict != "holds"));
        }
        let at = a.iter().zip(&b).position(|(x, y)| x != y).unwrap_or(a.len().min(b.len()));
        let there = |list: &[String]| list.get(at).cloned().unwrap_or_else(|| "nothing more".into());
        let before = a[at.saturating_sub(3)..at].to_vec();
        return Ok(tell(&Divergence { at: (at, a.len()), before, expected: there(&a), found: there(&b) }));
    }
    let path = Path::new(&replay.target);
    let capsule = Capsule::parse(&read(path)?).map_err(|e| format!("capsule {}: {e}", path.display()))?;
    let ran = run_text(&capsule.head.story, capsule.head.seed)?;
    show(&ran.job, &capsule.story()?, &ran.judgement, ran.wall);
    match capsule.diverges(&ran.events) {
        Some(divergence) => Ok(tell(&divergence)),
        None => {
            println!("equal: {} events", capsule.events.len());
            Ok(0)
        }
    }
}

/// Drafts.
pub fn postmortem(postmortem: &Postmortem) -> Result<u8, Failure> {
    let Postmortem { target, seed, out } = postmortem;
    let text = read(target)?;
    let name = target.display().to_string();
    let (story, seed, ran) = if target.extension().is_some_and(|extension| extension == "toml") {
        let story = load(target)?;
        let seed = seed.unwrap_or(story.seeds()[0]);
        let ran = run(target, &story, seed)?;
        (story, seed, ran)
    } else {
        let capsule = Capsule::parse(&text).map_err(|e| format!("capsule {name}: {e}"))?;
        let mut ran = run_text(&capsule.head.story, capsule.head.seed)?;
        if capsule.head.origin == Origin::Production {
            // What production saw, not what its replay saw.
            ran.events.clone_from(&capsule.events);
        }
        (capsule.story()?, capsule.head.seed, ran)
    };
    let document = markdown(&name, &story, seed, &ran.judgement, &ran.events);
    match out {
        Some(path) => std::fs::write(path, document).map_err(|e| format!("write {}: {e}", path.display()))?,
        None => print!("{document}"),
    }
    Ok(0)
}
