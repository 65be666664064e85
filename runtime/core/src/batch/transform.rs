//! The statements over a raw day: which fate each row has, and what staging and the mart hold of it.

use super::STAGING;
use crate::{
    contract::{Contract, catalogue, ident, text},
    dimensions::Enrichment,
    ports::{PortError, Result},
};

pub(crate) const UTC: &str = "'Timestamp(Microsecond, Some(\"UTC\"))'";

/// Clause of a row whose net amount has no room in its column: a negative descuento on the largest monto.
const NETO: (&str, &str) =
    ("monto_neto.decimal(10,2)", "coalesce(monto - descuento > CAST(99999999.99 AS DECIMAL(10,2)), false)");

/// What two rows have in common that can take something from each other's fate: the beginning of `order_id`.
///
/// Rows of one order have it in common, and so have rows of one `_source_hash`, whose text begins with it.
const FAMILY: &str = "hash_before(order_id, '|')";

/// The most families that are named in a statement.
const FAMILIES_MAX: usize = 4_096;

/// Rows of a day whose families are counted at a time; it bounds the memory that counting takes, to about 100 bytes a row.
const COUNTED_ROWS: u64 = 1 << 21;

/// Which rows of a day have to be compared with others. All others stand alone: their fate is told by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Families {
    /// The rows of these families, ascending.
    Some(Vec<i64>),
    /// There are too many to be named: every row is compared.
    All,
}

/// The statements that together find the families of more than one row among the `rows` of a day.
pub(super) fn family_queries(rows: u64) -> Vec<String> {
    let shares = rows.div_ceil(COUNTED_ROWS).max(1);
    let limit = FAMILIES_MAX + 1;
    let query = |share| {
        format!(
            "SELECT family FROM (SELECT {FAMILY} AS family FROM ventas WHERE order_id IS NOT NULL)
             WHERE abs(family % {shares}) = {share} GROUP BY family HAVING count(*) > 1 ORDER BY family LIMIT {limit}"
        )
    };
    (0..shares).map(query).collect()
}

impl Families {
    /// What [`family_queries`] have found.
    pub(super) fn of(mut found: Vec<i64>) -> Self {
        found.sort_unstable();
        if found.len() > FAMILIES_MAX { Self::All } else { Self::Some(found) }
    }
}
/// The contract of staging.
fn staging() -> Result<Contract> {
    let contracts = catalogue::shipped().map_err(|e| PortError::permanent("read the contracts that ship").because(e))?;
    let found = contracts.into_iter().find(|c| c.physical_name == STAGING);
    found.ok_or_else(|| PortError::permanent(format!("find the contract of {STAGING} among those that ship")))
}

/// Columns of a sale without which staging does not take it; the others that it requires are computed from these.
const REQUIRED: [&str; 7] = ["order_id", "user_id", "product_id", "monto", "region", "timestamp_venta", "fecha"];

/// The statement that gives each raw row its one fate.
///
/// Precedence: a business rule rejects, then the contract quarantines, then `_source_hash` deduplicates, then rows
/// that contradict each other under one `order_id` are all quarantined, and the rest is published. Only rows of `families`
/// are compared with each other.
pub(super) fn classification(contract: &Contract, families: &Families) -> String {
    // What the source may leave out and staging may not.
    let required = REQUIRED.iter().map(|c| (format!("{c}.required"), format!("{c} IS NULL")));
    let required: Vec<_> = required.filter(|(name, _)| contract.clauses.iter().all(|c| c.name != *name)).collect();
    let own = contract.clauses.iter().map(|c| (c.name.as_str(), c.broken_when.as_str()));
    let clauses = || own.clone().chain(required.iter().map(|(n, b)| (n.as_str(), b.as_str()))).chain([NETO]);
    let any_broken = clauses().map(|(_, broken_when)| broken_when).collect::<Vec<_>>().join(" OR ");
    let names = clauses()
        .map(|(name, broken_when)| format!("CASE WHEN {broken_when} THEN '{}' END", name.replace('\'', "''")))
        .chain(["CAST(NULL AS VARCHAR)".to_owned()])
        .collect::<Vec<_>>()
        .join(", ");
    let columns = "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, _source_hash";
    let judged = |rows: &str| {
        format!(
            "SELECT *, CASE WHEN coalesce(monto <= CAST(0 AS DECIMAL(10,2)), false) THEN 'rejected'
                            WHEN {any_broken} THEN 'quarantined' ELSE 'good' END AS verdict
             FROM (SELECT order_id, user_id, product_id, monto, coalesce(descuento, CAST(0 AS DECIMAL(10,2))) AS descuento,
                          region, timestamp_venta, fecha,
                          sha256_hex(concat_ws('|', order_id, user_id, CAST(monto AS VARCHAR))) AS _source_hash
                   FROM ventas WHERE {rows})"
        )
    };
    let own_clause =
        format!("WHEN verdict = 'rejected' THEN 'monto.positive' WHEN verdict = 'quarantined' THEN concat_ws(',', {names})");
    let compared = |rows: &str| {
        format!(
            "SELECT {columns}, CASE WHEN verdict <> 'good' THEN verdict WHEN copy > 1 THEN 'deduplicated'
                                    WHEN versions > 1 THEN 'quarantined' ELSE 'published' END AS fate,
                    CASE {own_clause} WHEN copy > 1 THEN '_source_hash.duplicate' WHEN versions > 1 THEN 'order_id.unique'
                         ELSE '' END AS clause
             FROM (SELECT *, sum(CASE WHEN verdict = 'good' AND copy = 1 THEN 1 ELSE 0 END) OVER (PARTITION BY order_id) AS versions
                   FROM (SELECT *, row_number() OVER (PARTITION BY verdict, _source_hash
                                     ORDER BY timestamp_venta, product_id, region, descuento) AS copy
                         FROM ({})))",
            judged(rows)
        )
    };
    let alone = |rows: &str| {
        format!(
            "SELECT {columns}, CASE WHEN verdict = 'good' THEN 'published' ELSE verdict END AS fate,
                    CASE {own_clause} ELSE '' END AS clause
             FROM ({})",
            judged(rows)
        )
    };
    // A row without an order is quarantined, so it belongs to no family.
    match families {
        Families::All => compared("true"),
        Families::Some(families) if families.is_empty() => alone("true"),
        Families::Some(families) => {
            let named = families.iter().map(i64::to_string).collect::<Vec<_>>().join(", ");
            let within = format!("coalesce({FAMILY} IN ({named}), false)");
            format!("{} UNION ALL {}", alone(&format!("NOT {within}")), compared(&within))
        }
    }
}

/// The statement that gives staging its rows: those published, each exactly once, with what the dimensions tell of them.
///
/// A left join: a customer or product that a dimension does not know gives null, never a lost row.
/// A null in a column that the contract of staging requires is an error, also for whoever writes to the table later.
///
/// # Errors
/// When that contract does not ship, which a test excludes.
pub(super) fn staged(classified: &str, enrichment: &Enrichment, stamp: &str) -> Result<String> {
    let Enrichment { columns, joins, .. } = enrichment;
    let contract = staging()?;
    let guards = contract.required_columns().map(|c| format!("not_null({0}, {1}) AS {0}", ident(c), text(c)));
    let guards = guards.collect::<Vec<_>>().join(", ");
    Ok(format!(
        "SELECT * REPLACE ({guards}) FROM (
         SELECT v.order_id, v.user_id, v.product_id, v.monto AS monto_bruto, v.descuento,
                CAST(v.monto - v.descuento AS DECIMAL(10,2)) AS monto_neto, v.region, v.timestamp_venta, v.fecha,
                arrow_cast('{stamp}', {UTC}) AS _loaded_at, v._source_hash, {columns}
         FROM ({classified}) AS v{joins} WHERE v.fate = 'published')"
    ))
}
