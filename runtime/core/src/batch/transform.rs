//! The statements over a raw day: which fate each row has, and what staging and the mart hold of it.

use crate::{contract::Contract, dimensions::Enrichment};

pub(crate) const UTC: &str = "'Timestamp(Microsecond, Some(\"UTC\"))'";

/// Clause of a row whose net amount has no room in its column: a negative descuento on the largest monto.
const NETO: (&str, &str) =
    ("monto_neto.decimal(10,2)", "coalesce(monto - descuento > CAST(99999999.99 AS DECIMAL(10,2)), false)");

/// The statement that gives each raw row its one fate.
///
/// Precedence: a business rule rejects, then the contract quarantines, then `_source_hash` deduplicates, then rows
/// that contradict each other under one `order_id` are all quarantined, and the rest is published.
pub(super) fn classification(contract: &Contract) -> String {
    let clauses = || contract.clauses.iter().map(|c| (c.name.as_str(), c.broken_when.as_str())).chain([NETO]);
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
pub(super) fn staged(classified: &str, enrichment: &Enrichment, stamp: &str) -> String {
    let Enrichment { columns, joins, .. } = enrichment;
    format!(
        "SELECT v.order_id, v.user_id, v.product_id, v.monto AS monto_bruto, v.descuento,
                CAST(v.monto - v.descuento AS DECIMAL(10,2)) AS monto_neto, v.region, v.timestamp_venta, v.fecha,
                arrow_cast('{stamp}', {UTC}) AS _loaded_at, v._source_hash, {columns}
         FROM ({classified}) AS v{joins} WHERE v.fate = 'published'"
    )
}
