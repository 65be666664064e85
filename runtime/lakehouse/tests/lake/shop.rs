//! A small shop: sales and dimensions that the tests compute with, and the same written into a lake.

use std::{fmt::Write as _, sync::Arc};

use chrono::{DateTime, NaiveDate, TimeDelta, Utc};
use object_store::memory::InMemory;
use simulacro_core::ports::{Commit, DayWrite, Lakehouse, Query};
use simulacro_lakehouse::DeltaLakehouse;

/// A validated sale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sale {
    pub order_id: String,
    pub user_id: String,
    pub product_id: String,
    pub bruto_cents: i64,
    pub descuento_cents: i64,
    pub region: String,
    pub at: DateTime<Utc>,
}

impl Sale {
    pub fn fecha(&self) -> NaiveDate {
        self.at.date_naive()
    }
    pub fn neto_cents(&self) -> i64 {
        self.bruto_cents - self.descuento_cents
    }
}

/// A version of a customer: user, segment, first day, first day after.
pub type Customer = (&'static str, Option<&'static str>, &'static str, Option<&'static str>);

/// A product: id, category.
pub type Product = (&'static str, Option<&'static str>);

pub fn lake() -> DeltaLakehouse {
    DeltaLakehouse::new(Arc::new(InMemory::new()))
}

pub fn day(text: &str) -> NaiveDate {
    text.parse().expect("a day")
}

/// The time at which everything is loaded and checked.
pub fn now() -> DateTime<Utc> {
    "2024-03-02T04:00:00Z".parse().expect("an instant")
}

pub fn money(cents: i64) -> String {
    format!("{}{}.{:02}", if cents < 0 { "-" } else { "" }, cents.abs() / 100, cents.abs() % 100)
}

fn text(value: Option<&str>) -> String {
    value.map_or_else(|| "CAST(NULL AS VARCHAR)".into(), |v| format!("'{v}'"))
}

fn instant(at: DateTime<Utc>) -> String {
    format!("arrow_cast('{}', 'Timestamp(Microsecond, Some(\"UTC\"))')", at.format("%Y-%m-%dT%H:%M:%S%.6fZ"))
}

/// The columns of staging for one sale of which no dimension knows anything, as a SELECT.
pub fn select(s: &Sale) -> String {
    enriched(s, None, None)
}

/// The same with the customer's segment and the product's category.
pub fn enriched(s: &Sale, segment: Option<&str>, category: Option<&str>) -> String {
    format!(
        "SELECT '{}' AS order_id, '{}' AS user_id, '{}' AS product_id, CAST('{}' AS DECIMAL(10,2)) AS monto_bruto,
                CAST('{}' AS DECIMAL(10,2)) AS descuento, CAST('{}' AS DECIMAL(10,2)) AS monto_neto, nullif('{}', '') AS region,
                {} AS timestamp_venta, DATE '{}' AS fecha, {} AS _loaded_at,
                encode(sha256('{}|{}|{}'), 'hex') AS _source_hash, {} AS segmento, {null} AS pais, {} AS categoria,
                {null} AS marca",
        s.order_id,
        s.user_id,
        s.product_id,
        money(s.bruto_cents),
        money(s.descuento_cents),
        money(s.neto_cents()),
        s.region,
        instant(s.at),
        s.fecha(),
        instant(now() - TimeDelta::hours(1)),
        s.order_id,
        s.user_id,
        money(s.bruto_cents),
        text(segment),
        text(category),
        null = text(None),
    )
}

/// Writes one day of a table from a statement.
///
/// Literals are never null, and a Delta table that is made from them refuses a null later; the outer join forgets that.
pub async fn write(lake: &dyn Lakehouse, table: &str, fecha: NaiveDate, epoch: i64, sql: String) -> Commit {
    let sql = format!("SELECT r.* FROM (SELECT 1 AS one) AS o LEFT JOIN ({sql}) AS r ON o.one = 1");
    let query = Query { sql, inputs: Vec::new() };
    lake.overwrite_day(DayWrite { table: table.into(), fecha, epoch, query }).await.expect("the day is written")
}

/// Writes the sales of one day to staging, as `select` makes a row of each.
pub async fn stage_as(lake: &dyn Lakehouse, fecha: NaiveDate, epoch: i64, sales: &[Sale], select: impl Fn(&Sale) -> String) {
    let rows: Vec<_> = sales.iter().filter(|s| s.fecha() == fecha).map(select).collect();
    assert!(!rows.is_empty(), "{fecha} has no sale");
    write(lake, "staging/ventas_validadas", fecha, epoch, rows.join("\nUNION ALL ")).await;
}

/// Writes the sales of one day to staging, without anything from dimensions.
pub async fn stage(lake: &dyn Lakehouse, fecha: NaiveDate, epoch: i64, sales: &[Sale]) {
    stage_as(lake, fecha, epoch, sales, select).await;
}

/// Writes both dimensions. They have no days, so that of the load stands in the partition that the port asks for.
pub async fn dimensions(lake: &dyn Lakehouse, customers: &[Customer], products: &[Product]) {
    let fecha = day("2024-01-01");
    let mut sql = String::new();
    for (i, (user, segment, from, to)) in customers.iter().enumerate() {
        let end = to.map_or_else(|| "CAST(NULL AS DATE)".into(), |d| format!("DATE '{d}'"));
        let _ = write!(
            sql,
            "{} SELECT '{user}' AS user_id, {} AS segmento, 'ES' AS pais, DATE '{from}' AS valido_desde, {end} AS valido_hasta,
                       {} AS es_actual, {} AS _loaded_at, DATE '{fecha}' AS fecha",
            if i == 0 { "" } else { " UNION ALL" },
            text(*segment),
            to.is_none(),
            instant(now() - TimeDelta::hours(1)),
        );
    }
    write(lake, "dim/clientes_dim", fecha, 1, sql).await;
    let mut sql = String::new();
    for (i, (product, category)) in products.iter().enumerate() {
        let _ = write!(
            sql,
            "{} SELECT '{product}' AS product_id, {} AS categoria, 'acme' AS marca, CAST('1.00' AS DECIMAL(10,2)) AS precio,
                       CAST(3 AS BIGINT) AS inventario, {} AS _loaded_at, DATE '{fecha}' AS fecha",
            if i == 0 { "" } else { " UNION ALL" },
            text(*category),
            instant(now() - TimeDelta::hours(1)),
        );
    }
    write(lake, "dim/productos_dim", fecha, 1, sql).await;
}
