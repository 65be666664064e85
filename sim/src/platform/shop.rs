//! The workload: a shop that sells every day, whose customers come and change their segment, and whose products change
//! their price. Everything is decided by the seed and a date, so no fault changes what is sold.
//!
//! Amounts are integer cents. What this leaves out: clicks, which are in
//! [`super::clicks`], and rows that break the contract: those are faults.

use std::collections::BTreeMap;

use chrono::{DateTime, Datelike, Days, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::rng::Stream;

const REGIONS: [&str; 5] = ["centro", "este", "norte", "oeste", "sur"];
const SEGMENTS: [&str; 3] = ["nuevo", "regular", "vip"];
const CATEGORIES: [&str; 4] = ["hogar", "libros", "musica", "ropa"];
/// Sales of a weekday, from Monday, in hundredths of an average day's.
const WEEK: [u64; 7] = [90, 90, 95, 100, 110, 120, 95];
/// Days in a year, for growth.
const YEAR: u64 = 365;

/// How large the shop is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShopSize {
    /// Sales of an average day at the beginning.
    pub sales_per_day: u64,
    /// Growth in hundredths a year: 100 doubles it.
    pub growth_percent: u64,
    /// Customers at the end of the first year.
    pub customers: u64,
    /// Products.
    pub products: u64,
}

/// One sale.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sale {
    /// Order, unique over all days.
    pub order_id: String,
    /// Number of the customer.
    pub user: u64,
    /// Number of the product.
    pub product: u64,
    /// Gross amount; 0 in a few, which the business rejects.
    pub monto_cents: i64,
    /// Discount, at most the amount; `None` is SQL NULL.
    pub descuento_cents: Option<i64>,
    /// Region.
    pub region: &'static str,
    /// Second of the day.
    pub second: i64,
}

/// A customer as the source has it at a moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Customer {
    /// Number.
    pub user: u64,
    /// Segment; `None` for one whom nobody has classified.
    pub segmento: Option<&'static str>,
    /// Country.
    pub pais: &'static str,
}

/// The id of a customer.
pub fn user_id(user: u64) -> String {
    format!("u-{user:06}")
}

/// The region of a customer.
pub fn region_of(user: u64) -> &'static str {
    REGIONS[user as usize % REGIONS.len()]
}

/// The id of a product.
pub fn product_id(product: u64) -> String {
    format!("p-{product:05}")
}

/// The shop.
#[derive(Debug, Clone)]
pub struct Shop {
    size: ShopSize,
    first: NaiveDate,
    stream: Stream,
    /// Days on which one customer buys far more than anybody.
    hot: BTreeMap<NaiveDate, u64>,
}

impl Shop {
    /// A shop that opens on `first`; on the days of `hot` one customer makes so many more sales.
    pub fn new(size: ShopSize, first: NaiveDate, seed: u64, hot: BTreeMap<NaiveDate, u64>) -> Self {
        Self { size, first, stream: Stream::root(seed).child("shop"), hot }
    }

    fn day(&self, fecha: NaiveDate) -> u64 {
        u64::try_from((fecha - self.first).num_days()).unwrap_or(0)
    }

    /// When a customer is first known: the first three quarters from the beginning, the others one after the other.
    fn joined(&self, user: u64) -> u64 {
        let old = self.size.customers * 3 / 4;
        if user < old { 0 } else { (user - old) * YEAR / (self.size.customers - old).max(1) }
    }

    fn segment(random: &mut Stream) -> Option<&'static str> {
        SEGMENTS.get(random.between(0, SEGMENTS.len() as u64) as usize).copied()
    }

    /// The segment of a customer at a moment. It changes at noon of one day of the year.
    pub fn segmento(&self, user: u64, at: DateTime<Utc>) -> Option<&'static str> {
        let mut random = self.stream.child("cliente").child(&user.to_string());
        let (before, after) = (Self::segment(&mut random), Self::segment(&mut random));
        let noon = (self.first + Days::new(random.between(0, YEAR - 1))).and_hms_opt(12, 0, 0);
        if noon.is_some_and(|noon| at >= noon.and_utc()) { after } else { before }
    }

    /// The customers at a moment, in order.
    pub fn customers(&self, at: DateTime<Utc>) -> Vec<Customer> {
        let today = self.day(at.date_naive());
        let known = (0..self.size.customers).take_while(|user| self.joined(*user) <= today);
        known
            .map(|user| Customer {
                user,
                segmento: self.segmento(user, at),
                pais: if user.is_multiple_of(5) { "PT" } else { "ES" },
            })
            .collect()
    }

    /// The products on a day, as the API has them.
    pub fn products(&self, fecha: NaiveDate) -> Vec<Map<String, Value>> {
        let day = self.day(fecha);
        let product = |product: u64| {
            // A few change their price each day.
            let changes = (day + product) / 30;
            let cents = 500 + product * 37 % 9_000 + changes % 7 * 25;
            let row = json!({
                "product_id": product_id(product),
                "categoria": CATEGORIES[product as usize % CATEGORIES.len()],
                "marca": format!("marca-{}", product % 11),
                "precio": format!("{}.{:02}", cents / 100, cents % 100),
                "inventario": (product * 13 + day) % 400,
            });
            match row {
                Value::Object(row) => row,
                _ => Map::new(),
            }
        };
        (0..self.size.products).map(product).collect()
    }

    /// The sales of a day, in the source's order.
    pub fn sales(&self, fecha: NaiveDate) -> Vec<Sale> {
        let day = self.day(fecha);
        let mut random = self.stream.child("ventas").child(&fecha.to_string());
        let ShopSize { sales_per_day, growth_percent, .. } = self.size;
        let weekday = WEEK[fecha.weekday().num_days_from_monday() as usize];
        let usual = sales_per_day * (100 * YEAR + growth_percent * day) * weekday / (100 * YEAR * 100);
        let usual = usual * random.between(85, 115) / 100;
        let known = (0..self.size.customers).take_while(|user| self.joined(*user) <= day).count() as u64;
        let hot = self.hot.get(&fecha).copied().unwrap_or(0);
        let mut sale = |n: u64, user: u64, product: u64| {
            // One in two hundred is for nothing.
            let monto_cents = if random.chance((1, 200)) { 0 } else { random.between(199, 25_000) as i64 };
            let descuento_cents = match random.between(0, 3) {
                0 => None,
                1 => Some(monto_cents / 10),
                _ => Some(0),
            };
            Sale {
                order_id: format!("o-{fecha}-{n:06}"),
                user,
                product,
                monto_cents,
                descuento_cents,
                region: region_of(user),
                second: random.between(0, 86_399) as i64,
            }
        };
        let mut whose = self.stream.child("quien").child(&fecha.to_string());
        let products = self.size.products;
        let mut out: Vec<Sale> =
            (0..usual).map(|n| sale(n, whose.between(0, known.max(1) - 1), whose.between(0, products - 1))).collect();
        out.extend((usual..usual + hot).map(|n| sale(n, 0, 0)));
        out
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn shop(hot: BTreeMap<NaiveDate, u64>) -> Shop {
        let size = ShopSize { sales_per_day: 200, growth_percent: 100, customers: 400, products: 50 };
        Shop::new(size, NaiveDate::default(), 7, hot)
    }

    #[test]
    fn a_day_is_a_function_of_the_seed_and_its_date() {
        let fecha = NaiveDate::default() + Days::new(100);
        assert_eq!(shop(BTreeMap::new()).sales(fecha), shop(BTreeMap::new()).sales(fecha));
        let hot = shop([(fecha, 90)].into()).sales(fecha);
        let usual = shop(BTreeMap::new()).sales(fecha);
        assert_eq!(hot[..usual.len()], usual[..], "a hot key adds, it changes nothing");
        assert_eq!(hot.len() - usual.len(), 90);
    }

    #[test]
    fn sales_are_of_customers_and_products_that_are_known() {
        let shop = shop(BTreeMap::new());
        for day in [0, 3, 200, 364] {
            let fecha = NaiveDate::default() + Days::new(day);
            let at = (fecha + Days::new(1)).and_hms_opt(3, 0, 0).expect("a time").and_utc();
            let known: BTreeSet<u64> = shop.customers(at).iter().map(|c| c.user).collect();
            let sales = shop.sales(fecha);
            assert!(sales.len() > 100, "{}", sales.len());
            assert!(sales.iter().all(|s| known.contains(&s.user) && s.product < 50));
            assert!(sales.iter().all(|s| s.descuento_cents.is_none_or(|d| d <= s.monto_cents)));
            let orders: BTreeSet<&str> = sales.iter().map(|s| s.order_id.as_str()).collect();
            assert_eq!(orders.len(), sales.len());
        }
    }
}
