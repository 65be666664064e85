//! What the shop's visitors do on a day: clicks, carts, and one purchase for each sale, in order of time.
//!
//! A purchase carries what its sale is worth, at the second of the sale; a cart comes before it. Everything is decided by the
//! seed and the date. What this leaves out: events that are late, damaged or against a rule, which the stream's own stories
//! have in [`crate::stream::workload`].

use chrono::{NaiveDate, NaiveTime};

use super::{
    scenario::StreamSize,
    shop::{Sale, Shop, product_id, region_of, user_id},
};
use crate::{rng::Stream, stream::wire::Event};

/// Milliseconds of a day.
const DAY_MS: u64 = 86_400_000;
/// Longest time between a cart and its purchase, in milliseconds.
const CART_MS: i64 = 600_000;

/// What a sale is worth, in cents.
fn net(sale: &Sale) -> i64 {
    sale.monto_cents - sale.descuento_cents.unwrap_or(0)
}

/// One visitor's number and what he does.
pub type Deed = (u64, Event);

/// The deeds of a day. `users` is the number of visitors.
pub fn day(shop: &Shop, size: &StreamSize, users: u64, fecha: NaiveDate, seed: u64) -> Vec<Deed> {
    let begins_ms = fecha.and_time(NaiveTime::MIN).and_utc().timestamp_millis();
    let event = |user: u64, event_type: &str, product: u64, timestamp_ms: i64| Event {
        user_id: user_id(user),
        event_type: event_type.to_owned(),
        page: format!("/p{}", product % size.pages),
        product_id: Some(product_id(product)),
        cents: 0,
        region: region_of(user).to_owned(),
        timestamp_ms,
    };
    let mut random = Stream::root(seed).child("clicks").child(&fecha.to_string());
    let mut out: Vec<Deed> = Vec::new();
    for (n, sale) in sales(shop, fecha) {
        // Two sales of a second are two events.
        let at_ms = begins_ms + sale.second * 1_000 + n % 1_000;
        let before_ms = random.between(1_000, CART_MS.unsigned_abs()).cast_signed();
        out.push((sale.user, event(sale.user, "add_to_cart", sale.product, (at_ms - before_ms).max(begins_ms))));
        let purchase =
            Event { cents: net(&sale), region: sale.region.to_owned(), ..event(sale.user, "purchase", sale.product, at_ms) };
        out.push((sale.user, purchase));
    }
    for _ in out.len() as u64..size.events_per_day {
        let (who, what) = (random.draw(), random.draw());
        let is_hot = who % 1_000 < size.hot;
        let user = if is_hot { 0 } else { (who >> 20) % users.max(1) };
        let event_type = if what % 12 == 0 { "add_to_cart" } else { "click" };
        out.push((user, event(user, event_type, (what >> 40) % 1_000, begins_ms + ((what >> 8) % DAY_MS).cast_signed())));
    }
    out.sort_by_key(|(_, event)| event.timestamp_ms);
    out
}

fn sales(shop: &Shop, fecha: NaiveDate) -> impl Iterator<Item = (i64, Sale)> {
    (0..).zip(shop.sales(fecha))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::{super::shop::ShopSize, *};

    #[test]
    fn each_sale_has_its_purchase_and_a_day_is_a_function_of_its_date() {
        let shop_size = ShopSize { sales_per_day: 50, growth_percent: 0, customers: 60, products: 20 };
        let fecha = NaiveDate::from_ymd_opt(2024, 3, 5).expect("a date");
        let shop = Shop::new(shop_size, fecha, 3, BTreeMap::new());
        let size = StreamSize { events_per_day: 900, hot: 100, ..StreamSize::standard() };
        let deeds = day(&shop, &size, 60, fecha, 3);
        assert_eq!(deeds.len(), 900);
        assert_eq!(deeds, day(&shop, &size, 60, fecha, 3));
        let purchases: i64 = deeds.iter().map(|(_, event)| event.cents).sum();
        assert_eq!(purchases, shop.sales(fecha).iter().map(net).sum::<i64>());
        let of = |event: &Event| chrono::DateTime::from_timestamp_millis(event.timestamp_ms).map(|at| at.date_naive());
        assert!(deeds.iter().all(|(_, event)| of(event) == Some(fecha)));
        assert!(deeds.is_sorted_by_key(|(_, event)| event.timestamp_ms));
        let hot = deeds.iter().filter(|(user, _)| *user == 0).count();
        assert!(hot > 50, "{hot} of the hot visitor");
    }
}
