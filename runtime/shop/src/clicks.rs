//! Events of visitors, consistent with the sales of a day.
//!
//! Each sale is the end of a session (clicks, add_to_cart, purchase with the sale's net amount), and beside those there are
//! sessions that buy nothing. All is decided by the seed and the day. Events can be disturbed on purpose, as a real topic
//! is: delivered again, delivered late, damaged. A duplicate or a damaged record comes in addition to the original, so the
//! purchases of a day add up to its revenue whatever is asked for. Left out: encoding and sending.

use std::collections::BTreeSet;

use chrono::{NaiveDate, NaiveTime};
use simulacro_core::avro::Click;

use crate::cdnow::{Purchase, REGIONES};

/// Milliseconds of a day.
const DAY_MS: u64 = 86_400_000;
/// Shares are counted in thousandths.
const WHOLE: u64 = 1_000;
/// Customer of the sessions that [`Options::skew`] puts on one key.
pub const HOT_USER: &str = "99999";
/// User and type of the events of [`heartbeat`].
pub const HEARTBEAT: &str = "heartbeat";

/// How a day's events are made. Shares are thousandths, 0 to 1,000; a higher value means all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What everything is drawn from, together with the day.
    pub seed: u64,
    /// Sessions that buy nothing.
    pub browsing: u32,
    /// Share of those that are one customer's in one region.
    pub skew: u32,
    /// Share of events that are delivered once more.
    pub duplicates: u32,
    /// Share of events that are delivered after their time; duplicates always are.
    pub out_of_order: u32,
    /// Longest such delay, in milliseconds.
    pub delay_ms_max: u32,
    /// Share of events beside which a damaged copy is delivered.
    pub malformed: u32,
}

impl Options {
    /// A calm day: as many browsing sessions as asked for, and nothing disturbed.
    pub fn calm(seed: u64, browsing: u32) -> Self {
        Self { seed, browsing, skew: 0, duplicates: 0, out_of_order: 0, delay_ms_max: 120_000, malformed: 0 }
    }
}

/// How a record is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// Its last byte is missing.
    Truncated,
    /// It does not begin as a record of a registry does.
    NoHeader,
}

impl Damage {
    /// The damaged record.
    pub fn apply(self, record: &[u8]) -> Vec<u8> {
        match self {
            Damage::Truncated => record.split_last().map_or_else(Vec::new, |(_, rest)| rest.to_vec()),
            Damage::NoHeader => record.iter().map(|byte| byte ^ 0xFF).collect(),
        }
    }
}

/// One record to be sent, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The event. Its customer is the key.
    pub click: Click,
    /// Damaged after encoding; such a record is nobody's sale.
    pub damage: Option<Damage>,
}

/// The deliveries of a day, in the order in which they are sent. `purchases` of other days are passed over.
///
/// Event times are within the day, UTC. Two events that are no duplicates differ in customer or time.
pub fn of_day(purchases: &[Purchase], fecha: NaiveDate, options: &Options) -> Vec<Delivery> {
    let midnight = midnight_ms(fecha);
    let mut random = SplitMix::new(options.seed, midnight);
    let mut sessions = Sessions { midnight, taken: BTreeSet::new(), clicks: Vec::new() };
    for purchase in purchases.iter().filter(|p| p.fecha == fecha) {
        sessions.buys(purchase, &mut random);
    }
    for _ in 0..options.browsing {
        sessions.browses(random.share(options.skew), &mut random);
    }
    // The moment of delivery, and then the order of making, decide the order.
    let mut deliveries: Vec<(i64, Delivery)> = Vec::with_capacity(sessions.clicks.len());
    for click in sessions.clicks {
        let delay = |random: &mut SplitMix| random.below(u64::from(options.delay_ms_max) + 1).cast_signed();
        let at = click.timestamp_ms + if random.share(options.out_of_order) { delay(&mut random) } else { 0 };
        if random.share(options.duplicates) {
            deliveries.push((at + delay(&mut random), Delivery { click: click.clone(), damage: None }));
        }
        if random.share(options.malformed) {
            let damage = if random.below(2) == 0 { Damage::Truncated } else { Damage::NoHeader };
            deliveries.push((at, Delivery { click: click.clone(), damage: Some(damage) }));
        }
        deliveries.push((at, Delivery { click, damage: None }));
    }
    deliveries.sort_by_key(|(at, _)| *at);
    deliveries.into_iter().map(|(_, delivery)| delivery).collect()
}

/// The event that closes a day in a partition: `after_ms` after its end, of a type that no metric counts.
///
/// Windows close when later events come, so the last minutes of a day would wait for the next. With the watermark's bound
/// and the allowed lateness as `after_ms` the day is complete, and no event of the next day is late yet.
pub fn heartbeat(fecha: NaiveDate, after_ms: i64) -> Click {
    Click {
        user_id: HEARTBEAT.to_owned(),
        event_type: HEARTBEAT.to_owned(),
        page: "/".to_owned(),
        product_id: None,
        monto_cents: 0,
        region: REGIONES[0].to_owned(),
        timestamp_ms: midnight_ms(fecha) + DAY_MS.cast_signed() + after_ms,
    }
}

fn midnight_ms(fecha: NaiveDate) -> i64 {
    fecha.and_time(NaiveTime::MIN).and_utc().timestamp_millis()
}

/// The events so far.
struct Sessions {
    midnight: i64,
    taken: BTreeSet<(String, i64)>,
    clicks: Vec<Click>,
}

impl Sessions {
    fn buys(&mut self, purchase: &Purchase, random: &mut SplitMix) {
        let Purchase { user_id, product_id, monto_cents, region, .. } = purchase;
        let product = format!("/producto/{product_id}");
        let mut steps = vec![("click", "/".to_owned(), 0)];
        steps.extend((0..random.below(3)).map(|_| ("click", product.clone(), 0)));
        steps.push(("click", product.clone(), 0));
        steps.push(("add_to_cart", product, 0));
        steps.push(("purchase", "/pago".to_owned(), *monto_cents));
        self.session(user_id, region, product_id, &steps, random);
    }

    fn browses(&mut self, hot: bool, random: &mut SplitMix) {
        // Visitors that are no customers yet; the numbers of customers have five digits.
        let user = if hot { HOT_USER.to_owned() } else { format!("v{:06}", random.below(200_000)) };
        let region = if hot { 0 } else { random.below(REGIONES.len() as u64) as usize };
        let product = format!("P{:03}", 1 + random.below(20));
        let page = format!("/producto/{product}");
        let mut steps = vec![("click", "/".to_owned(), 0)];
        steps.extend((0..random.below(4)).map(|_| ("click", page.clone(), 0)));
        if random.below(4) == 0 {
            steps.push(("add_to_cart", page, 0));
        }
        self.session(&user, REGIONES[region], &product, &steps, random);
    }

    /// Places a session within the day, at a time at which this customer does nothing else.
    fn session(&mut self, user: &str, region: &str, product: &str, steps: &[(&str, String, i64)], random: &mut SplitMix) {
        let mut offset = 0;
        let offsets: Vec<u64> = steps
            .iter()
            .map(|_| {
                let here = offset;
                offset += 1_000 + random.below(60_000);
                here
            })
            .collect();
        let room = DAY_MS - offset;
        let mut start = random.below(room);
        let midnight = self.midnight;
        let times = |start: u64| offsets.iter().map(move |o| midnight + (start + o).cast_signed());
        while times(start).any(|time| self.taken.contains(&(user.to_owned(), time))) {
            start = (start + 1) % room;
        }
        let times: Vec<i64> = times(start).collect();
        for ((event_type, page, cents), time) in steps.iter().zip(times) {
            self.taken.insert((user.to_owned(), time));
            self.clicks.push(Click {
                user_id: user.to_owned(),
                event_type: (*event_type).to_owned(),
                page: page.clone(),
                product_id: (page != "/").then(|| product.to_owned()),
                monto_cents: *cents,
                region: region.to_owned(),
                timestamp_ms: time,
            });
        }
    }
}

/// SplitMix64: every seed is good, and the sequence is the same everywhere and for ever.
struct SplitMix(u64);

impl SplitMix {
    fn new(seed: u64, midnight: i64) -> Self {
        let mut random = Self(seed);
        random.0 = random.next() ^ midnight.cast_unsigned();
        random
    }
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    /// A number below `bound`, which is not 0; the bias is below 2^-32 for bounds of this module.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
    fn share(&mut self, thousandths: u32) -> bool {
        self.below(WHOLE) < u64::from(thousandths)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cdnow::{BYTES, parse};

    fn day(text: &str) -> NaiveDate {
        text.parse().unwrap()
    }

    fn disturbed(seed: u64) -> Options {
        Options { skew: 300, duplicates: 50, out_of_order: 100, malformed: 20, ..Options::calm(seed, 400) }
    }

    /// Events without damaged copies and duplicates.
    fn distinct(deliveries: &[Delivery]) -> BTreeMap<(String, i64), Click> {
        let whole = deliveries.iter().filter(|d| d.damage.is_none());
        whole.map(|d| ((d.click.user_id.clone(), d.click.timestamp_ms), d.click.clone())).collect()
    }

    #[test]
    fn purchases_add_up_to_the_revenue_of_the_day_and_region() {
        let purchases = parse(BYTES).unwrap();
        for fecha in ["1997-01-01", "1997-02-14", "1998-06-30"].map(day) {
            let mut sales: BTreeMap<&str, (i64, u32)> = BTreeMap::new();
            for p in purchases.iter().filter(|p| p.fecha == fecha) {
                let cell = sales.entry(p.region).or_default();
                *cell = (cell.0 + p.monto_cents, cell.1 + 1);
            }
            for options in [Options::calm(1, 100), disturbed(2)] {
                let events = distinct(&of_day(&purchases, fecha, &options));
                let mut bought: BTreeMap<&str, (i64, u32)> = BTreeMap::new();
                for click in events.values().filter(|c| c.event_type == "purchase") {
                    let cell = bought.entry(&click.region).or_default();
                    *cell = (cell.0 + click.monto_cents, cell.1 + 1);
                }
                assert_eq!(bought, sales, "{fecha}");
                let others = events.values().filter(|c| c.event_type != "purchase");
                assert!(others.into_iter().all(|c| c.monto_cents == 0));
            }
        }
    }

    #[test]
    fn event_times_are_within_the_day_and_a_calm_day_is_in_order() {
        let purchases = parse(BYTES).unwrap();
        let fecha = day("1997-01-01");
        let midnight = midnight_ms(fecha);
        let whole_day = midnight..midnight + DAY_MS.cast_signed();
        assert!(of_day(&purchases, fecha, &disturbed(3)).iter().all(|d| whole_day.contains(&d.click.timestamp_ms)));
        let calm = of_day(&purchases, fecha, &Options::calm(3, 50));
        assert!(calm.is_sorted_by_key(|d| d.click.timestamp_ms));
    }

    #[test]
    fn a_seed_gives_the_same_day_again_and_another_gives_another() {
        let purchases = parse(BYTES).unwrap();
        let fecha = day("1997-01-02");
        assert_eq!(of_day(&purchases, fecha, &disturbed(4)), of_day(&purchases, fecha, &disturbed(4)));
        assert_ne!(of_day(&purchases, fecha, &disturbed(4)), of_day(&purchases, fecha, &disturbed(5)));
    }

    #[test]
    fn a_purchase_comes_after_a_click_and_the_cart() {
        let purchases = parse(BYTES).unwrap();
        let mut seen: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for d in of_day(&purchases, day("1997-01-03"), &Options::calm(6, 10)) {
            let before = seen.entry(d.click.user_id.clone()).or_default();
            if d.click.event_type == "purchase" {
                assert!(before.contains("click") && before.contains("add_to_cart"), "{:?}", d.click);
            }
            before.insert(d.click.event_type);
        }
    }

    #[test]
    fn shares_are_what_was_asked_for() {
        let all = of_day(&[], day("1997-01-01"), &Options { skew: 1_000, ..Options::calm(7, 300) });
        assert!(all.iter().all(|d| d.click.user_id == HOT_USER));
        let options = Options { duplicates: 100, out_of_order: 200, malformed: 50, ..Options::calm(7, 4_000) };
        let disturbed = of_day(&[], day("1997-01-01"), &options);
        let events = distinct(&disturbed).len();
        let damaged = disturbed.iter().filter(|d| d.damage.is_some()).count();
        let duplicates = disturbed.len() - events - damaged;
        let about = |n: usize, thousandths: usize| (thousandths * 8..thousandths * 12).contains(&(n * 10_000 / events));
        assert!(about(duplicates, 100) && about(damaged, 50), "{duplicates} and {damaged} of {events}");
        assert!(!disturbed.is_sorted_by_key(|d| d.click.timestamp_ms));
    }
}
