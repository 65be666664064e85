//! Pauses: a person stops an asset for a while. Its turns are skipped and recorded, and nothing fails.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::ports::{Fact, PortError, Result, RunLedger};

/// Topic of the facts.
pub const TOPIC: &str = "pause";

/// Who paused an asset, why and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// The asset.
    pub asset: String,
    /// Who.
    pub by: String,
    /// Why.
    pub why: String,
    /// Since when.
    pub since: DateTime<Utc>,
}

/// The pauses that hold now, in order of asset.
///
/// # Errors
/// Those of the ledger.
pub async fn pauses(ledger: &dyn RunLedger) -> Result<Vec<Pause>> {
    let text = |fact: &Fact, key: &str| fact.value[key].as_str().unwrap_or("not said").to_owned();
    let facts = ledger.facts(TOPIC).await?;
    Ok(facts.iter().map(|f| Pause { asset: f.name.clone(), by: text(f, "by"), why: text(f, "why"), since: f.at }).collect())
}

/// Pauses an asset, from its next try on; a try that is under way ends as it would. Pausing it again changes who and why.
///
/// # Errors
/// `Permanent` when nobody or no reason is named; those of the ledger.
pub async fn pause(ledger: &dyn RunLedger, asset: &str, by: &str, why: &str, now: DateTime<Utc>) -> Result<()> {
    if by.trim().is_empty() || why.trim().is_empty() {
        return Err(PortError::permanent(format!(
            "pause {asset}: found by {by:?} and why {why:?}, expected a name and a reason"
        )));
    }
    let fact = Fact { topic: TOPIC.into(), name: asset.into(), value: json!({ "by": by, "why": why }), at: now };
    ledger.put_fact(&fact, None).await
}

/// Ends a pause and returns it; `None` when there was none. The asset runs again at its next schedule.
///
/// # Errors
/// Those of the ledger.
pub async fn resume(ledger: &dyn RunLedger, asset: &str, now: DateTime<Utc>) -> Result<Option<Pause>> {
    let pause = pauses(ledger).await?.into_iter().find(|p| p.asset == asset);
    let fact = Fact { topic: TOPIC.into(), name: asset.into(), value: serde_json::Value::Null, at: now };
    ledger.put_fact(&fact, None).await?;
    Ok(pause)
}
