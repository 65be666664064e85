//! The statements over a raw day: which fate each row has, and what staging and the mart hold of it.

use crate::{contract::Contract, dimensions::Enrichment};

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
    /// The rows of these families, ascending, and those without an order.
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

/// The statement that gives each raw row its one fate.
///
/// Precedence: a business rule rejects, then the contract quarantines, then `_source_hash` deduplicates, then rows
/// that contradict each other under one `order_id` are all quarantined, and the rest is published. Only rows of `families`
/// are compared with each other.
pub(super) fn classification(contract: &Contract, families: &Families) -> String {
    let clauses = || contract.clauses.iter().map(|c| (c.name.as_str(), c.broken_when.as_str())).chain([NETO]);
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
    // A row without an order belongs to every family, unless its contract wants one: then its own verdict is its fate.
    let orderless = if contract.field("order_id").is_some_and(|f| f.required) { "false" } else { "order_id IS NULL" };
    match families {
        Families::All => compared("true"),
        Families::Some(families) if families.is_empty() && orderless == "false" => alone("true"),
        Families::Some(families) => {
            let named = families.iter().map(i64::to_string).chain(["NULL".to_owned()]).collect::<Vec<_>>().join(", ");
            let within = format!("({orderless} OR coalesce({FAMILY} IN ({named}), false))");
            format!("{} UNION ALL {}", alone(&format!("NOT {within}")), compared(&within))
        }
    }
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
