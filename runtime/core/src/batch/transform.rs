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
/// that contradict each other under one `order_id` are all quarantined, and the rest is published.
pub(super) fn classification(contract: &Contract) -> String {
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
    format!(
        "WITH hashed AS (
           SELECT order_id, user_id, product_id, monto,
                  coalesce(descuento, CAST(0 AS DECIMAL(10,2))) AS descuento, region, timestamp_venta, fecha,
                  encode(sha256(concat_ws('|', order_id, user_id, CAST(monto AS VARCHAR))), 'hex') AS _source_hash
           FROM ventas),
         judged AS (
           SELECT *, CASE WHEN coalesce(monto <= CAST(0 AS DECIMAL(10,2)), false) THEN 'rejected'
                          WHEN {any_broken} THEN 'quarantined' ELSE 'good' END AS verdict,
                  concat_ws(',', {names}) AS broken
           FROM hashed),
         numbered AS (
           SELECT *, row_number() OVER (PARTITION BY verdict, _source_hash
                       ORDER BY timestamp_venta, product_id, region, descuento) AS copy FROM judged),
         counted AS (
           SELECT *, sum(CASE WHEN verdict = 'good' AND copy = 1 THEN 1 ELSE 0 END) OVER (PARTITION BY order_id) AS versions
           FROM numbered)
         SELECT order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, _source_hash,
                CASE WHEN verdict <> 'good' THEN verdict WHEN copy > 1 THEN 'deduplicated'
                     WHEN versions > 1 THEN 'quarantined' ELSE 'published' END AS fate,
                CASE WHEN verdict = 'rejected' THEN 'monto.positive' WHEN verdict = 'quarantined' THEN broken
                     WHEN copy > 1 THEN '_source_hash.duplicate' WHEN versions > 1 THEN 'order_id.unique'
                     ELSE '' END AS clause
         FROM counted"
    )
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
