//! The oracle: what the mart must show for a day, counted one sale after the other. It is naive on purpose, works on
//! integers, and shares no code with the pipeline.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, NaiveDate, Utc};

use super::shop::Shop;

/// A line of the mart. Amounts are cents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Figures {
    /// Sum of gross amounts.
    pub bruto: i64,
    /// Sum of discounts.
    pub descuentos: i64,
    /// Sum of net amounts.
    pub neto: i64,
    /// Sales.
    pub transacciones: i64,
    /// Different customers.
    pub usuarios: i64,
}

/// Lines of the mart by day, region and segment.
pub type Mart = BTreeMap<(NaiveDate, String, String), Figures>;

/// The lines of a day, when the customers were read at `read_at`.
pub fn day(shop: &Shop, fecha: NaiveDate, read_at: DateTime<Utc>) -> Mart {
    let mut out = Mart::new();
    let mut seen: BTreeMap<(NaiveDate, String, String), BTreeSet<u64>> = BTreeMap::new();
    for sale in shop.sales(fecha) {
        // The business takes no sale of nothing.
        if sale.monto_cents <= 0 {
            continue;
        }
        let segmento = shop.segmento(sale.user, read_at).unwrap_or("sin_segmento");
        let key = (fecha, sale.region.to_owned(), segmento.to_owned());
        let figures = out.entry(key.clone()).or_default();
        let descuento = sale.descuento_cents.unwrap_or(0);
        figures.bruto += sale.monto_cents;
        figures.descuentos += descuento;
        figures.neto += sale.monto_cents - descuento;
        figures.transacciones += 1;
        figures.usuarios += i64::from(seen.entry(key).or_default().insert(sale.user));
    }
    out
}

/// Sales of a day that the business rejects.
pub fn rejected(shop: &Shop, fecha: NaiveDate) -> u64 {
    shop.sales(fecha).iter().filter(|s| s.monto_cents <= 0).count() as u64
}
