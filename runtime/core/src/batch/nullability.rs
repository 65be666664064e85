//! What a source once kept from being null, and does no longer.
//!
//! A dropped NOT NULL is a change of the schema that no column's type shows: rows that break the contract come later, or are
//! there already. What a source keeps from being null is remembered with each published day, and compared before the next is
//! read. A source that never promised anything is judged row by row, by the contract's own clauses.

use std::collections::BTreeSet;

use serde_json::json;

use crate::{
    contract::Contract,
    ports::{Fact, Ports, Result},
};

/// Topic of the facts; their names are the tables.
const TOPIC: &str = "source_not_null";

/// What a source promises now, and what of it that the contract asks for is gone.
pub(super) struct Promised {
    /// Columns that are never null; `None` where the source cannot tell.
    now: Option<BTreeSet<String>>,
    /// Columns that may be null since the last published day, though the contract requires them, in order of name.
    pub(super) gone: Vec<String>,
}

/// Compares what the source promises with what it promised when a day was last published.
pub(super) async fn promised(ports: &Ports, contract: &Contract) -> Result<Promised> {
    let Some(now) = ports.tables.not_null(&contract.table).await? else { return Ok(Promised { now: None, gone: Vec::new() }) };
    let facts = ports.ledger.facts(TOPIC).await?;
    let before = facts.into_iter().find(|fact| fact.name == contract.table);
    let before: BTreeSet<String> = before.and_then(|fact| serde_json::from_value(fact.value).ok()).unwrap_or_default();
    let required = |column: &&String| contract.fields.iter().any(|f| f.required && f.name == **column);
    let gone = before.difference(&now).filter(required).cloned().collect();
    Ok(Promised { now: Some(now), gone })
}

/// Remembers the promise of a day that is published.
pub(super) async fn remember(ports: &Ports, contract: &Contract, promised: Promised) -> Result<()> {
    let Some(now) = promised.now else { return Ok(()) };
    let (topic, name, at) = (TOPIC.to_owned(), contract.table.clone(), ports.env.now());
    ports.ledger.put_fact(&Fact { topic, name, value: json!(now), at }, None).await
}
