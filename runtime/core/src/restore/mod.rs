//! Disaster recovery: tables whose objects were deleted, and the cheapest way to have them back.
//!
//! What was there is what the ledger knows: of each day the rows and the cents of its last published run. A table is whole when
//! it has them. The ways, the cheapest first: objects of which the store keeps a version are undeleted; a table whose log lives
//! goes back to its newest version that has all its files; marts are made again from staging; days are made again from the
//! immutable raw layer; and what raw has not either must be extracted again from the source. What one way leaves is left to the
//! next, and a restore that was cut off is run again: every step may be repeated.
//!
//! What this leaves out: tables that no day of the batch writes (dimensions, `raw/eventos`, the warehouse of another
//! server), and hashes by day, which the ledger does not keep: a day whose rows were exchanged for others of the same number
//! and sum is not noticed.

mod look;
mod raw_source;
mod render;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    backfill::{Applied, Journal, Policy, Then, apply},
    batch::{DayError, MART, STAGING, canonical_hash, newest_raw},
    orchestrator::{LEASE, Telling},
    platform::{PIPELINE, Platform},
    ports::{
        Alert, BUSY, Deleted, Disposition, Input, Mark, NOT_VERSIONED, Notifier, PortError, Ports, Restore, Result, Run,
        RunState, Versions,
    },
};
use look::{Known, Table};
use raw_source::RawSource;

/// Name of the restores in the ledger.
pub const RESTORE: &str = "restore";
/// Gate that holds a day while a table is gone that the ledger knows as published.
pub const TABLE_LOST: &str = "table_lost";
/// Kind of the alert for what was deleted and should not have been.
pub const DESTRUCTIVE: &str = "destructive_call";

/// Newest versions of a table that are looked at for one that is whole.
const VERSIONS_MAX: usize = 100;

/// A way to have a table back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// The store makes deleted objects present again.
    Versions,
    /// The table goes back to its newest version that has all its files.
    TimeTravel,
    /// A mart is made again from staging.
    Models,
    /// Days are made again from the raw layer.
    Raw,
    /// Days are extracted again from the source, and made again.
    Extract,
}

impl Way {
    /// All ways, the cheapest first.
    pub const ALL: [Self; 5] = [Self::Versions, Self::TimeTravel, Self::Models, Self::Raw, Self::Extract];

    /// Its name for people and in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Versions => "versions",
            Self::TimeTravel => "time_travel",
            Self::Models => "models",
            Self::Raw => "raw",
            Self::Extract => "extract",
        }
    }
}

/// A way for a table, as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assessed {
    /// Folder of the table.
    pub table: String,
    /// The way.
    pub way: Way,
    /// Whether it brings back anything.
    pub possible: bool,
    /// Why, or why not.
    pub why: String,
    /// What is to be done, for people; empty when it is not possible.
    pub work: String,
    /// Days that it leaves lost, each with its rows: its RPO.
    pub leaves: BTreeMap<NaiveDate, u64>,
}

/// A table as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stands {
    /// Folder of the table.
    pub table: String,
    /// Whether there is a log that can be read.
    pub exists: bool,
    /// Days that the ledger knows as published.
    pub published: u64,
    /// Days of them that it has not as they were, each with the rows that it had.
    pub lost: BTreeMap<NaiveDate, u64>,
}

/// What is lost, and what can be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The folder that was asked for.
    pub target: String,
    /// Its tables.
    pub tables: Vec<Stands>,
    /// For each table of which something is lost, every way in the order of [`Way::ALL`].
    pub ways: Vec<Assessed>,
    /// For each of them the way that would be taken first; `None` when none is possible.
    pub chosen: BTreeMap<String, Option<Way>>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// The way.
    pub way: Way,
    /// The tables that it was for.
    pub tables: Vec<String>,
    /// What was done, for people.
    pub what: String,
    /// How long it took, in milliseconds.
    pub millis: u64,
}

/// What a restore came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The folder that was asked for.
    pub target: String,
    /// What was lost before, rows by day, by table.
    pub lost_before: BTreeMap<String, BTreeMap<NaiveDate, u64>>,
    /// What was done, in order.
    pub steps: Vec<Step>,
    /// What is lost now, rows by day, by table: the RPO. Empty when everything is as the ledger knows it.
    pub lost: BTreeMap<String, BTreeMap<NaiveDate, u64>>,
    /// From the start of the command to the end of the verification, in milliseconds: the RTO.
    pub rto_millis: u64,
    /// Canonical hash of each table that has one.
    pub hashes: BTreeMap<String, String>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// A table, or a folder of tables, for example `staging`.
    pub target: &'a str,
    /// The only way that may be taken; `None` takes the cheapest that works.
    pub only: Option<Way>,
    /// Whether days that raw has not may be extracted again.
    pub from_source: bool,
}

/// Key of the alert for what is gone of a layer, for example `destructive_call:staging`.
fn alert_key(folder: &str) -> String {
    format!("{DESTRUCTIVE}:{}", folder.split('/').next().unwrap_or_default())
}

/// The alert for what is gone of a folder's layer.
pub(crate) fn alert(folder: &str, summary: String) -> Alert {
    Alert { dedup_key: alert_key(folder), kind: DESTRUCTIVE.into(), priority: 1, summary }
}

/// Holds a day while a table is gone that the ledger knows as published: a new one in its place would hide the loss, and what
/// the store could undelete.
pub(crate) async fn nothing_lost(ports: &Ports, fecha: NaiveDate) -> std::result::Result<(), DayError> {
    let at = |source| DayError::Port { fecha, source };
    for table in [STAGING, MART] {
        if ports.lakehouse.exists(table).await.map_err(at)? {
            continue;
        }
        let days = look::known(&ports.ledger.runs(PIPELINE).await.map_err(at)?).len();
        if days > 0 {
            let expected =
                format!("the one with the {days} days that the ledger knows as published; see simulacro restore {table}");
            return Err(DayError::Held { fecha, gate: TABLE_LOST, found: format!("no table {table}"), expected });
        }
    }
    Ok(())
}

/// Looks at the tables of a folder, and at every way to have back what is lost. Writes nothing.
///
/// # Errors
/// `Permanent` when the folder has no table that a day writes, naming those; otherwise what the ports say.
pub async fn plan(platform: &Platform, versions: &dyn Versions, request: Request<'_>) -> Result<Plan> {
    let ports = &platform.ports;
    let runs = ports.ledger.runs(PIPELINE).await?;
    let known = look::known(&runs);
    let project = platform.project()?;
    let all = look::tables(&project);
    let target = request.target.trim_matches('/');
    let below = |table: &&Table| table.folder == target || table.folder.starts_with(&format!("{target}/"));
    let wanted: Vec<&Table> = all.iter().filter(below).collect();
    if wanted.is_empty() {
        let names = all.iter().map(|t| t.folder.as_str()).collect::<Vec<_>>().join(", ");
        return Err(PortError::permanent(format!("restore {target}: found no such table, expected a folder of one of {names}")));
    }
    let (mut tables, mut ways, mut chosen) = (Vec::new(), Vec::new(), BTreeMap::new());
    for table in &wanted {
        tables.push(look::stands(ports, table, &known).await?);
    }
    // Marts come from staging, where that is whole.
    let staging = match tables.iter().find(|t| t.table == STAGING) {
        Some(found) => found.clone(),
        None => match all.iter().find(|t| t.folder == STAGING) {
            Some(table) => look::stands(ports, table, &known).await?,
            None => return Err(PortError::permanent(format!("restore {target}: found no table {STAGING}, expected one"))),
        },
    };
    let mut raw = BTreeMap::new();
    for fecha in tables.iter().flat_map(|t| t.lost.keys().copied()).collect::<BTreeSet<_>>() {
        raw.insert(fecha, newest_raw(ports.objects.as_ref(), &platform.contract.table, fecha).await?);
    }
    for (table, found) in wanted.iter().zip(&tables).filter(|(_, found)| !found.lost.is_empty()) {
        let assess = Assess { ports, known: &known, table, found };
        let assessed = [
            assess.versions(versions, look::last_end(&runs)).await?.0,
            assess.time_travel().await?.0,
            assess.models(&staging),
            assess.raw(&raw),
            assess.extract(&platform.contract.table),
        ];
        chosen.insert(found.table.clone(), choose(&assessed, request));
        ways.extend(assessed);
    }
    Ok(Plan { target: target.to_owned(), tables, ways, chosen })
}

/// The first way of a table: the cheapest that is allowed and possible. Going back in time must save days.
fn choose(assessed: &[Assessed], request: Request<'_>) -> Option<Way> {
    let allowed = |way: Way| request.only.map_or(way != Way::Extract || request.from_source, |only| only == way);
    assessed.iter().find(|a| a.possible && allowed(a.way)).map(|a| a.way)
}

fn rows(days: &BTreeMap<NaiveDate, u64>) -> u64 {
    days.values().sum()
}

fn days_of(n: usize) -> String {
    if n == 1 { "1 day".into() } else { format!("{n} days") }
}

/// A table of which something is lost, and what is known of it.
struct Assess<'a> {
    ports: &'a Ports,
    known: &'a BTreeMap<NaiveDate, Known>,
    table: &'a Table,
    found: &'a Stands,
}

impl Assess<'_> {
    fn way(&self, way: Way, possible: bool, why: String, work: String, leaves: BTreeMap<NaiveDate, u64>) -> Assessed {
        let leaves = if possible { leaves } else { self.found.lost.clone() };
        Assessed { table: self.found.table.clone(), way, possible, why, work, leaves }
    }

    fn not(&self, way: Way, why: impl Into<String>) -> Assessed {
        self.way(way, false, why.into(), String::new(), BTreeMap::new())
    }

    /// Of a table that is gone, what was deleted since the last run that published; of one whose log lives, the files of the
    /// days that are lost, whenever they were deleted. What VACUUM had removed in between comes back too, and goes with the next.
    async fn versions(&self, versions: &dyn Versions, since: Option<DateTime<Utc>>) -> Result<(Assessed, Vec<Deleted>)> {
        let all = match versions.list_deleted(&self.found.table).await {
            Ok(all) => all,
            Err(e) if e.code.as_deref() == Some(NOT_VERSIONED) => return Ok((self.not(Way::Versions, e.what), Vec::new())),
            Err(e) => return Err(e),
        };
        let of_lost = |d: &Deleted| self.found.lost.keys().any(|fecha| d.path.contains(&format!("/fecha={fecha}/")));
        let wanted = |d: &Deleted| if self.found.exists { of_lost(d) } else { since.is_none_or(|since| d.deleted_at >= since) };
        let objects: Vec<Deleted> = all.into_iter().filter(wanted).collect();
        if objects.is_empty() {
            return Ok((self.not(Way::Versions, "the store keeps no deleted version of what is lost"), objects));
        }
        let bytes: u64 = objects.iter().map(|d| d.bytes).sum();
        let work = format!("{} objects, {bytes} bytes, nothing is copied", objects.len());
        let why = "the store still has what was deleted".to_owned();
        Ok((self.way(Way::Versions, true, why, work, BTreeMap::new()), objects))
    }

    /// The newest version that has all its files, and what it lacks.
    async fn time_travel(&self) -> Result<(Assessed, Option<u64>)> {
        const WAY: Way = Way::TimeTravel;
        if !self.found.exists {
            return Ok((self.not(WAY, "the table's log is gone"), None));
        }
        if !self.table.is_counted() {
            return Ok((self.not(WAY, "the ledger keeps no figures by which an older version could be judged"), None));
        }
        for version in self.ports.lakehouse.versions(&self.found.table, VERSIONS_MAX).await?.into_iter().skip(1) {
            let input = Input::DeltaVersion { table: self.found.table.clone(), version: version.version };
            let figures = match look::figures(self.ports, self.table, input, None).await {
                Ok(figures) => figures,
                // Files of it are gone, too.
                Err(e) if e.disposition == Disposition::Permanent => continue,
                Err(e) => return Err(e),
            };
            let leaves = self.table.lost(self.known, &figures);
            if leaves.len() >= self.found.lost.len() {
                let why = format!("version {}, the newest that is whole, lacks {}", version.version, days_of(leaves.len()));
                return Ok((self.not(WAY, why), None));
            }
            let why = format!("version {} of {} has all its files", version.version, version.at.format("%Y-%m-%d %H:%M:%S"));
            let work = "1 commit, nothing is copied".to_owned();
            return Ok((self.way(WAY, true, why, work, leaves), Some(version.version)));
        }
        Ok((self.not(WAY, format!("none of the newest {VERSIONS_MAX} versions has all its files")), None))
    }

    fn models(&self, staging: &Stands) -> Assessed {
        if self.table.model.is_none() {
            return self.not(Way::Models, "it is no mart");
        }
        let lost = self.found.lost.keys().filter(|fecha| staging.lost.contains_key(fecha)).count();
        if lost > 0 {
            return self.not(Way::Models, format!("{STAGING} has lost {} of these days, too", days_of(lost)));
        }
        self.way(Way::Models, true, format!("{STAGING} has these days"), self.work(&self.found.lost), BTreeMap::new())
    }

    /// Days, rows and the time that their last runs took.
    fn work(&self, days: &BTreeMap<NaiveDate, u64>) -> String {
        let millis: u64 = days.keys().filter_map(|fecha| self.known.get(fecha)?.millis).sum();
        let read: u64 = days.keys().filter_map(|fecha| self.known.get(fecha)).map(|k| k.expected).sum();
        format!("{}, {read} rows, about {}.{} s", days_of(days.len()), millis / 1_000, millis % 1_000 / 100)
    }

    fn raw(&self, raw: &BTreeMap<NaiveDate, std::result::Result<crate::batch::RawDay, String>>) -> Assessed {
        let has = |fecha: &NaiveDate| raw.get(fecha).is_some_and(|day| day.is_ok());
        let leaves: BTreeMap<NaiveDate, u64> =
            self.found.lost.iter().filter(|(fecha, _)| !has(fecha)).map(|(f, n)| (*f, *n)).collect();
        let first = leaves.keys().next().map(|fecha| {
            let why = raw.get(fecha).and_then(|day| day.as_ref().err()).map_or("", String::as_str);
            format!("{fecha}: {why}")
        });
        if leaves.len() == self.found.lost.len() {
            return self.not(Way::Raw, first.unwrap_or_default());
        }
        let made = self.found.lost.iter().filter(|(fecha, _)| has(fecha)).map(|(f, n)| (*f, *n)).collect();
        let why = match first {
            None => "the raw layer has these days".to_owned(),
            Some(first) => format!("the raw layer has not {}, {first}", days_of(leaves.len())),
        };
        self.way(Way::Raw, true, why, self.work(&made), leaves)
    }

    fn extract(&self, table: &str) -> Assessed {
        let why = format!("if the source still has these days of {table}; a day is extracted the same each time");
        self.way(Way::Extract, true, why, self.work(&self.found.lost), BTreeMap::new())
    }
}

/// What a restore hears of its days.
struct Heard<'a>(&'a mut (dyn FnMut(&str) + Send));

impl Journal for Heard<'_> {
    fn begins(&mut self, fecha: NaiveDate) -> Result<()> {
        (self.0)(&format!("making {fecha} again"));
        Ok(())
    }
    fn ended(&mut self, day: &Applied) {
        if day.state != RunState::Succeeded {
            (self.0)(&format!("{} was not made again: {}", day.fecha, day.why));
        }
    }
}

/// Refuses while an orchestrator leads: it would run days beside the restore.
async fn nobody_leads(ports: &Ports) -> Result<()> {
    match ports.ledger.lease(LEASE).await? {
        Some(lease) if lease.expires_at > ports.env.now() => {
            let what = format!("restore: found orchestrator {} at work until {}, expected none", lease.holder, lease.expires_at);
            Err(PortError::retryable(what).code(BUSY))
        }
        Some(_) | None => Ok(()),
    }
}

/// Restores: takes the cheapest way for each table, then the next for what is left, and verifies. `heard` is told of progress.
///
/// # Errors
/// `Retryable` with code [`BUSY`] while an orchestrator leads, a run of the pipeline or another restore is at work. What could
/// not be brought back is no error: the report says it.
pub async fn execute(
    platform: &Platform,
    versions: &dyn Versions,
    request: Request<'_>,
    heard: &mut (dyn FnMut(&str) + Send),
) -> Result<Report> {
    let ports = &platform.ports;
    let (env, ledger) = (&ports.env, &ports.ledger);
    let began = env.now();
    nobody_leads(ports).await?;
    let mut run = ledger.begin(RESTORE, began.date_naive(), &env.new_id(), 0, began).await?;
    let result = attempt(platform, versions, request, heard, began).await;
    run.finished_at = Some(env.now());
    (run.state, run.report) = match &result {
        Ok(report) => {
            let state = if report.lost.is_empty() { RunState::Succeeded } else { RunState::Failed };
            (state, serde_json::to_value(report).unwrap_or_default())
        }
        Err(error) => (RunState::Failed, json!({ "error": error.chain() })),
    };
    let ended = ledger.finish(&run).await;
    if ended.is_err() {
        let _ = ledger.abandon(&run).await;
    }
    platform.tell_destructive().await;
    let report = result?;
    ended.map(|()| report)
}

async fn attempt(
    platform: &Platform,
    versions: &dyn Versions,
    request: Request<'_>,
    heard: &mut (dyn FnMut(&str) + Send),
    began: DateTime<Utc>,
) -> Result<Report> {
    let ports = &platform.ports;
    let env = &ports.env;
    let mut now = plan(platform, versions, request).await?;
    let lost_before = lost(&now);
    tell(ports, &now, &lost_before).await;
    let (mut steps, mut tried) = (Vec::new(), BTreeSet::new());
    let millis = |since: DateTime<Utc>| u64::try_from((env.now() - since).num_milliseconds()).unwrap_or(0);
    while let Some((way, tables)) = next(&now, &tried, request) {
        let since = env.now();
        tried.extend(tables.iter().map(|table| (way, table.clone())));
        heard(&format!("{} for {}", way.as_str(), tables.join(", ")));
        let what = match way {
            Way::Versions | Way::TimeTravel => in_place(platform, versions, &now, way, &tables).await?,
            Way::Models | Way::Raw | Way::Extract => by_day(platform, &now, way, &tables, heard).await?,
        };
        steps.push(Step { way, tables, what, millis: millis(since) });
        now = plan(platform, versions, request).await?;
    }
    let mut hashes = BTreeMap::new();
    for table in &now.tables {
        // Only the tables of the reference platform have a canonical hash.
        if table.exists && look::has_hash(&table.table) && table.lost.is_empty() {
            hashes.insert(table.table.clone(), canonical_hash(ports.lakehouse.as_ref(), &table.table).await?);
        }
    }
    let lost = lost(&now);
    if lost.is_empty() && !lost_before.is_empty() {
        let notifier = Telling { notifier: ports.notifier.clone(), metrics: ports.metrics.clone() };
        let told = notifier.resolve(&alert_key(&now.target)).await;
        debug_assert!(told.is_ok(), "telling fails nobody");
    }
    Ok(Report { target: now.target.clone(), lost_before, steps, lost, rto_millis: millis(began), hashes })
}

fn lost(plan: &Plan) -> BTreeMap<String, BTreeMap<NaiveDate, u64>> {
    plan.tables.iter().filter(|t| !t.lost.is_empty()).map(|t| (t.table.clone(), t.lost.clone())).collect()
}

/// Whoever finds a loss tells of it.
async fn tell(ports: &Ports, plan: &Plan, lost: &BTreeMap<String, BTreeMap<NaiveDate, u64>>) {
    if lost.is_empty() {
        return;
    }
    let list = lost.iter().map(|(table, days)| format!("{table}: {}, {} rows", days_of(days.len()), rows(days)));
    let summary = format!("objects of published tables are gone: {}", list.collect::<Vec<_>>().join("; "));
    let notifier = Telling { notifier: ports.notifier.clone(), metrics: ports.metrics.clone() };
    let told = notifier.raise(&alert(&plan.target, summary)).await;
    debug_assert!(told.is_ok(), "telling fails nobody");
}

/// The cheapest way that is possible, allowed and not tried yet, with all tables for which it is the cheapest.
fn next(plan: &Plan, tried: &BTreeSet<(Way, String)>, request: Request<'_>) -> Option<(Way, Vec<String>)> {
    let mut by_way: BTreeMap<Way, Vec<String>> = BTreeMap::new();
    for table in plan.chosen.keys() {
        let left: Vec<Assessed> =
            plan.ways.iter().filter(|a| a.table == *table && !tried.contains(&(a.way, table.clone()))).cloned().collect();
        if let Some(way) = choose(&left, request) {
            by_way.entry(way).or_default().push(table.clone());
        }
    }
    // Raw before models: it makes the marts of its days, too.
    let order = [Way::Versions, Way::TimeTravel, Way::Raw, Way::Extract, Way::Models];
    order.into_iter().find_map(|way| by_way.remove(&way).map(|tables| (way, tables)))
}

/// Brings tables back where they are, while nobody else runs the pipeline.
async fn in_place(platform: &Platform, versions: &dyn Versions, plan: &Plan, way: Way, tables: &[String]) -> Result<String> {
    let ports = &platform.ports;
    let first = plan.tables.iter().flat_map(|t| t.lost.keys()).min().copied().unwrap_or_default();
    let floor = platform.epoch_floor(first).await?;
    let mut run = ports.ledger.begin(PIPELINE, first, &ports.env.new_id(), floor, ports.env.now()).await?;
    let result = in_place_held(platform, versions, plan, way, tables, &run).await;
    run.finished_at = Some(ports.env.now());
    (run.state, run.report) = match &result {
        Ok(what) => (RunState::Succeeded, json!({ "kind": RESTORE, "what": what })),
        Err(error) => (RunState::Failed, json!({ "kind": RESTORE, "error": error.chain() })),
    };
    let ended = ports.ledger.finish(&run).await;
    if ended.is_err() {
        let _ = ports.ledger.abandon(&run).await;
    }
    let what = result?;
    ended.map(|()| what)
}

async fn in_place_held(
    platform: &Platform,
    versions: &dyn Versions,
    plan: &Plan,
    way: Way,
    tables: &[String],
    run: &Run,
) -> Result<String> {
    let ports = &platform.ports;
    let runs = ports.ledger.runs(PIPELINE).await?;
    let known = look::known(&runs);
    let mut told = Vec::new();
    let project = platform.project()?;
    for table in look::tables(&project).iter().filter(|t| tables.contains(&t.folder)) {
        let Some(found) = plan.tables.iter().find(|t| t.table == table.folder) else { continue };
        let assess = Assess { ports, known: &known, table, found };
        if way == Way::Versions {
            let (_, objects) = assess.versions(versions, look::last_end(&runs)).await?;
            // The log last: until it is there, nobody reads a table that is half there.
            let (log, files): (Vec<&Deleted>, Vec<&Deleted>) = objects.iter().partition(|d| d.path.contains("/_delta_log/"));
            for deleted in files.iter().chain(&log) {
                versions.undelete(deleted).await?;
            }
            told.push(format!("{}: {} objects undeleted", table.folder, objects.len()));
        } else if let (_, Some(version)) = assess.time_travel().await? {
            let mark = Mark { writer: RESTORE.into(), epoch: ports.env.now().timestamp_millis() };
            ports.lakehouse.restore(Restore { table: table.folder.clone(), mark, version }).await?;
            told.push(format!("{}: back at version {version}", table.folder));
        }
    }
    Ok(format!("{}, as run {} of {}", told.join("; "), run.epoch, run.fecha))
}

/// Makes days again, each as an ordinary run. A day that fails or is held leaves the others alone, and is left lost.
async fn by_day(
    platform: &Platform,
    plan: &Plan,
    way: Way,
    tables: &[String],
    heard: &mut (dyn FnMut(&str) + Send),
) -> Result<String> {
    let ports = &platform.ports;
    let ours = |a: &&Assessed| a.way == way && tables.contains(&a.table);
    let days: BTreeSet<NaiveDate> = plan
        .ways
        .iter()
        .filter(ours)
        .filter_map(|a| plan.tables.iter().find(|t| t.table == a.table).map(|t| (a, t)))
        .flat_map(|(a, t)| t.lost.keys().filter(|fecha| !a.leaves.contains_key(fecha)))
        .copied()
        .collect();
    let days: Vec<NaiveDate> = days.into_iter().collect();
    if way == Way::Models {
        let recovering = platform.recovering_from(ports.tables.clone());
        let mut made = 0;
        for fecha in &days {
            heard(&format!("making the marts of {fecha} again"));
            match recovering.run_models(*fecha).await {
                Ok(_) => made += 1,
                Err(DayError::Port { source, .. }) if source.code.as_deref() == Some(BUSY) => return Err(source),
                Err(error) => heard(&format!("the marts of {fecha} were not made again: {error}")),
            }
        }
        return Ok(format!("the marts of {made} of {} made again", days_of(days.len())));
    }
    let tables: Arc<dyn crate::ports::TableSource> = if way == Way::Raw {
        let contract = &platform.contract;
        let (objects, rest) = (ports.objects.clone(), ports.tables.clone());
        Arc::new(RawSource { objects, table: contract.table.clone(), columns: contract.columns.clone(), rest })
    } else {
        ports.tables.clone()
    };
    let recovering = platform.recovering_from(tables);
    let policy = Policy { on_held: Then::Continue, on_failed: Then::Continue };
    let summary = match apply(&recovering, &days, policy, &mut Heard(heard)).await {
        Ok(summary) => summary,
        Err(DayError::Port { source, .. }) => return Err(source),
        Err(held @ DayError::Held { .. }) => return Err(PortError::permanent(held.to_string())),
    };
    Ok(format!("{} of {} made again", summary.count(RunState::Succeeded), days_of(days.len())))
}

#[cfg(test)]
mod tests;
