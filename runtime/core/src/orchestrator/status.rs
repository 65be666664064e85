//! How the orchestrator stands, read from the ledger alone: nobody is asked, so it is there when nobody leads.

use std::fmt::{self, Write as _};

use chrono::{DateTime, Days, Utc};

use super::{
    Asset, LEASE, Pause,
    breaker::{self, Breaker},
    outbox::{self, Entry},
    pauses,
};
use crate::ports::{Lease, Result, Run, RunLedger, RunState};

/// How far back runs are looked for, in days.
const LOOK_BACK_DAYS: u64 = 62;

/// One asset.
#[derive(Debug, Clone, PartialEq)]
pub struct AssetStatus {
    /// Name.
    pub name: String,
    /// Who answers for it.
    pub owner: String,
    /// Its schedule, in UTC.
    pub schedule: String,
    /// The next schedule.
    pub next: Option<DateTime<Utc>>,
    /// Whether and by whom it is paused.
    pub pause: Option<Pause>,
    /// Its breaker.
    pub breaker: Breaker,
    /// Its newest runs, the last one first.
    pub runs: Vec<Run>,
}

/// All assets.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// When.
    pub now: DateTime<Utc>,
    /// Who leads, or last did.
    pub leader: Option<Lease>,
    /// In the order that was asked for.
    pub assets: Vec<AssetStatus>,
    /// Incidents that are open, and alerts on their way.
    pub alerts: Vec<Entry>,
}

impl Status {
    /// Reads it, with at most `runs_max` runs of each asset.
    ///
    /// # Errors
    /// Those of the ledger.
    pub async fn read(ledger: &dyn RunLedger, assets: &[&Asset], runs_max: usize, now: DateTime<Utc>) -> Result<Self> {
        let paused = pauses(ledger).await?;
        let breakers = ledger.facts(breaker::TOPIC).await?;
        let alerts = ledger.facts(outbox::TOPIC).await?;
        let from = now.date_naive().checked_sub_days(Days::new(LOOK_BACK_DAYS)).unwrap_or_default();
        let mut out = Vec::new();
        for asset in assets {
            let mut runs = ledger.runs_since(&asset.name, from).await?;
            runs.sort_by_key(|r| std::cmp::Reverse((r.started_at, r.epoch)));
            runs.truncate(runs_max);
            out.push(AssetStatus {
                name: asset.name.clone(),
                owner: asset.owner.clone(),
                schedule: asset.schedule.to_string(),
                next: asset.schedule.next(now),
                pause: paused.iter().find(|p| p.asset == asset.name).cloned(),
                breaker: Breaker::recall(&breakers, &asset.name),
                runs,
            });
        }
        let alerts = alerts.into_iter().filter_map(|f| serde_json::from_value(f.value).ok()).collect();
        Ok(Self { now, leader: ledger.lease(LEASE).await?, assets: out, alerts })
    }
}

/// Why a run is what it is, for people.
fn why(run: &Run) -> String {
    let report = &run.report;
    let mut text = String::new();
    for key in ["reason", "by", "why", "error"] {
        if let Some(value) = report[key].as_str() {
            let _ = if key == "by" { write!(text, " by {value}:") } else { write!(text, " {value}") };
        }
    }
    if let Some(next) = report["next_try"].as_str() {
        let _ = write!(text, ", again at {next}");
    }
    text
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |t: DateTime<Utc>| t.format("%Y-%m-%d %H:%M:%S").to_string();
        match &self.leader {
            Some(lease) if lease.expires_at > self.now => {
                writeln!(f, "leader     {} (token {}, until {})", lease.holder, lease.token, time(lease.expires_at))?;
            }
            Some(lease) => writeln!(f, "leader     none; {} held the lease until {}", lease.holder, time(lease.expires_at))?,
            None => writeln!(f, "leader     none")?,
        }
        for asset in &self.assets {
            let next = asset.next.map_or_else(|| "never".to_owned(), time);
            writeln!(f, "\n{}  ({}; {}; next {next})", asset.name, asset.owner, asset.schedule)?;
            if let Some(Pause { by, why, since, .. }) = &asset.pause {
                writeln!(f, "  paused by {by} since {}: {why}", time(*since))?;
            }
            match &asset.breaker {
                Breaker::Closed => {}
                Breaker::Open { retry_at, failures, .. } => {
                    writeln!(f, "  breaker open, next trial {}: {failures}", time(*retry_at))?;
                }
                Breaker::HalfOpen { trials, .. } => writeln!(f, "  breaker half-open, trial {trials}")?,
            }
            for run in &asset.runs {
                let state = run.state.as_str();
                let end = run.finished_at.filter(|_| run.state != RunState::Running).map_or_else(String::new, time);
                writeln!(f, "  {} run {} {state:<9} {} {end}{}", run.fecha, run.epoch, time(run.started_at), why(run))?;
            }
        }
        for entry in &self.alerts {
            let stage = format!("{:?}", entry.stage).to_lowercase();
            let Entry { alert, since, failed, .. } = entry;
            write!(f, "\nP{} {stage} since {}: {}", alert.priority, time(*since), alert.summary)?;
            if *failed > 0 {
                write!(f, " ({failed} calls failed)")?;
            }
        }
        if self.alerts.is_empty() { Ok(()) } else { writeln!(f) }
    }
}
