//! A staged day that its models have not passed yet, and the way back.
//!
//! Models read staging, so a day is staged before it can be judged. Before it is written, the version that the table then has
//! is noted in the ledger; when the tests of the models hold the day, its rows come back as they were in that version. A run
//! that dies in between leaves the note, and the next run, of whatever day, puts the rows back before it does anything else.
//! What a person may still see in that time is staging alone: no mart and no warehouse table has the day before its tests.

use chrono::NaiveDate;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::{error, info, warn};

use super::{MART, STAGING, write};
use crate::ports::{DayWrite, Disposition, Fact, Input, PortError, Ports, Query, Result};

/// Topic of the notes; their names are the days.
const TOPIC: &str = "staging_before";

/// What is noted of a day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// The first run that stages it.
    epoch: i64,
    /// The version of staging before that run; `None` when there was no table.
    version: Option<u64>,
}

async fn keep(ports: &Ports, fecha: NaiveDate, value: Value) -> Result<()> {
    let fact = Fact { topic: TOPIC.into(), name: fecha.to_string(), value, at: ports.env.now() };
    ports.ledger.put_fact(&fact, None).await
}

/// The notes that are there, by day.
async fn notes(ports: &Ports) -> Result<Vec<(NaiveDate, Note)>> {
    let facts = ports.ledger.facts(TOPIC).await?;
    let read = |fact: Fact| match (fact.name.parse(), serde_json::from_value(fact.value.clone())) {
        (Ok(fecha), Ok(note)) => Ok((fecha, note)),
        (Ok(_) | Err(_), Ok(_) | Err(_)) => {
            let what = format!("read fact {TOPIC} {}: found {}, expected an epoch and a version", fact.name, fact.value);
            Err(PortError::permanent(what))
        }
    };
    facts.into_iter().map(read).collect()
}

/// Whether a noted day is in staging and has not been judged: a mart is written only after the tests.
async fn is_open(ports: &Ports, fecha: NaiveDate, note: Note) -> Result<bool> {
    let wrote = |epoch: Option<i64>| epoch.is_some_and(|e| e >= note.epoch);
    Ok(wrote(ports.lakehouse.last_epoch(STAGING, fecha).await?) && !wrote(ports.lakehouse.last_epoch(MART, fecha).await?))
}

/// Notes what staging has, before a day is written. A note that a run before has left tells of a better time, and stays.
pub(super) async fn note(ports: &Ports, fecha: NaiveDate, epoch: i64) -> Result<()> {
    if notes(ports).await?.iter().any(|(day, _)| *day == fecha) {
        return Ok(());
    }
    let version = match ports.lakehouse.exists(STAGING).await? {
        true => ports.lakehouse.versions(STAGING, 1).await?.first().map(|v| v.version),
        false => None,
    };
    keep(ports, fecha, json!(Note { epoch, version })).await
}

/// The day has been judged: the note is of no more use. One that cannot be removed is recognised as old by the next run.
pub(super) async fn judged(ports: &Ports, fecha: NaiveDate) {
    if let Err(e) = keep(ports, fecha, Value::Null).await {
        warn!(%fecha, error = %e.chain(), "note of staging not removed");
    }
}

/// Puts the rows of a day back as they were when it was noted.
async fn put_back(ports: &Ports, fecha: NaiveDate, note: Note) -> Result<()> {
    let (rows, input) = match note.version {
        Some(version) => (format!("fecha = DATE '{fecha}'"), Input::DeltaVersion { table: STAGING.into(), version }),
        None => ("false".to_owned(), Input::Delta(STAGING.into())),
    };
    // Above the run that staged the day, and below the next one, which begins above every epoch of the table.
    let epoch = ports.lakehouse.last_epoch(STAGING, fecha).await?.unwrap_or(note.epoch).max(note.epoch) + 1;
    let query = Query { sql: format!("SELECT * FROM staging WHERE {rows}"), inputs: vec![("staging".into(), input)] };
    write(ports, DayWrite { table: STAGING.into(), fecha, epoch, query }).await?;
    info!(%fecha, epoch, "staging put back to what it was before the day was staged");
    Ok(())
}

/// Puts back what runs that died have left unjudged; of the day that is about to run only what is no longer open, since its
/// rows are replaced anyway.
///
/// # Errors
/// Those of ledger and lake. A version that is not readable any more is an error in the log alone: then the day stays staged,
/// and its next run replaces it.
pub(super) async fn recover(ports: &Ports, about_to_run: NaiveDate) -> Result<()> {
    for (fecha, note) in notes(ports).await? {
        if is_open(ports, fecha, note).await? {
            if fecha == about_to_run {
                continue;
            }
            match put_back(ports, fecha, note).await {
                Ok(()) => {}
                Err(e) if e.disposition == Disposition::Permanent => {
                    error!(%fecha, error = %e.chain(), "staging cannot be put back, run the day again");
                }
                Err(e) => return Err(e),
            }
        }
        judged(ports, fecha).await;
    }
    Ok(())
}

/// Puts the rows of a held day back, if it, or a run before, has staged them. What fails here is done by the next run.
pub(super) async fn held(ports: &Ports, fecha: NaiveDate) {
    let done = async {
        for (day, note) in notes(ports).await? {
            if day == fecha && is_open(ports, fecha, note).await? {
                put_back(ports, fecha, note).await?;
            }
        }
        Ok::<(), PortError>(())
    };
    match done.await {
        Ok(()) => judged(ports, fecha).await,
        Err(e) => warn!(%fecha, error = %e.chain(), "staging of a held day not put back yet"),
    }
}
