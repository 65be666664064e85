//! The oracle: what must come out, from what the source really holds. It is naive on purpose, works on integers, and
//! shares no code with the pipeline.

use std::collections::{BTreeMap, BTreeSet};

use chrono::NaiveDate;

use crate::ports::Row;

/// What the mart must show for one day and region.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Sales {
    /// Sum of the amounts, in cents.
    pub revenue_cents: i64,
    /// Number of sales.
    pub transacciones: i64,
    /// Number of different customers.
    pub usuarios_unicos: i64,
}

/// The mart by day and region. `clean` are the rows before any fault on the data: a row that a fault has spoiled is
/// missing from the mart, one that was doubled counts once.
pub fn mart(clean: &[Row], spoiled: &[String]) -> BTreeMap<(NaiveDate, String), Sales> {
    let mut users: BTreeMap<(NaiveDate, String), Vec<&str>> = BTreeMap::new();
    let mut out: BTreeMap<(NaiveDate, String), Sales> = BTreeMap::new();
    for row in clean {
        let Some(region) = &row.region else { continue };
        if row.monto_cents <= 0 || spoiled.contains(&row.order_id) {
            continue;
        }
        let key = (row.fecha, region.clone());
        let sales = out.entry(key.clone()).or_default();
        sales.revenue_cents += row.monto_cents;
        sales.transacciones += 1;
        let seen = users.entry(key).or_default();
        if !seen.contains(&row.user_id.as_str()) {
            seen.push(&row.user_id);
            sales.usuarios_unicos += 1;
        }
    }
    out
}

/// The days of which more than `share` of the delivered rows (numerator and denominator) have no region.
pub fn days_to_hold(delivered: &[Row], share: (u64, u64)) -> BTreeSet<NaiveDate> {
    let mut counts: BTreeMap<NaiveDate, (u64, u64)> = BTreeMap::new();
    for row in delivered {
        let (bad, all) = counts.entry(row.fecha).or_default();
        // A sale of nothing is rejected by rule, before the contract looks at it.
        *bad += u64::from(row.region.is_none() && row.monto_cents > 0);
        *all += 1;
    }
    counts.into_iter().filter(|(_, (bad, all))| bad * share.1 > all * share.0).map(|(fecha, _)| fecha).collect()
}
