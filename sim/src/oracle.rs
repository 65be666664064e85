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

/// Regions that there are.
const REGIONES: [&str; 5] = ["centro", "este", "norte", "oeste", "sur"];

/// The mart by day and region. `truth` are the rows as they are, before any fault on what is said of them: a row that a fault
/// has spoiled is missing from the mart, one that was doubled counts once.
pub fn mart(truth: &[Row], spoiled: &BTreeSet<String>) -> BTreeMap<(NaiveDate, String), Sales> {
    let mut users: BTreeSet<(NaiveDate, &str, &str)> = BTreeSet::new();
    let mut out: BTreeMap<(NaiveDate, String), Sales> = BTreeMap::new();
    for row in truth {
        let Some(region) = &row.region else { continue };
        if row.monto_cents <= 0 || spoiled.contains(&row.order_id) {
            continue;
        }
        let sales = out.entry((row.fecha, region.clone())).or_default();
        sales.revenue_cents += row.monto_cents;
        sales.transacciones += 1;
        sales.usuarios_unicos += i64::from(users.insert((row.fecha, region, &row.user_id)));
    }
    out
}

/// The days that must be held: those of which more than `share` of the delivered rows (numerator and denominator) have no
/// region or one that there is not, and those with fewer or more rows than `rows` allows.
pub fn days_to_hold(delivered: &[Row], share: (u64, u64), rows: (u64, u64)) -> BTreeSet<NaiveDate> {
    let mut counts: BTreeMap<NaiveDate, (u64, u64)> = BTreeMap::new();
    for row in delivered {
        let (bad, all) = counts.entry(row.fecha).or_default();
        // A sale of nothing is rejected by rule, before the contract looks at it.
        let known = row.region.as_deref().is_some_and(|r| REGIONES.contains(&r));
        *bad += u64::from(!known && row.monto_cents > 0);
        *all += 1;
    }
    let too_many = |(bad, all): (u64, u64)| bad * share.1 > all * share.0 || all < rows.0 || all > rows.1;
    counts.into_iter().filter(|(_, counts)| too_many(*counts)).map(|(fecha, _)| fecha).collect()
}
