//! The statements over a raw day: which fate each row has, and what staging and the mart hold of it.

use crate::contract::Contract;

pub(super) const UTC: &str = "'Timestamp(Microsecond, Some(\"UTC\"))'";

/// The statement that gives each raw row its one fate.
///
/// Precedence: a business rule rejects, then the contract quarantines, then `_source_hash` deduplicates, then rows
/// that contradict each other under one `order_id` are all quarantined, and the rest is published.
pub(super) fn classification(contract: &Contract) -> String {
    let broken = contract.clauses.iter().map(|c| c.broken_when.clone()).collect::<Vec<_>>();
    let any_broken = if broken.is_empty() { "false".to_owned() } else { broken.join(" OR ") };
    let names = contract
        .clauses
        .iter()
        .map(|c| format!("CASE WHEN {} THEN '{}' END", c.broken_when, c.name.replace('\'', "''")))
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
