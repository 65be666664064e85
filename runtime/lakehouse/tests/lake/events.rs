//! Models over events, against a computation that walks through the events of each customer one by one.

use std::{collections::BTreeMap, sync::Arc};

use arrow::{
    array::{ArrayRef, Date32Array, Decimal128Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray},
    datatypes::{DataType, Field, Schema},
};
use chrono::{DateTime, Datelike, NaiveDate, NaiveTime, TimeDelta, Utc};
use simulacro_core::{
    models::{
        Need,
        run::{plan, run_models},
    },
    ports::{AppendRows, Lakehouse, Mark},
    streaming::eventos::EVENTOS,
};
use simulacro_lakehouse::DeltaLakehouse;

use crate::{
    models::{REGIONS, SILENT, batch, compare_with, filled, project, segment, table},
    shop::{day, lake, money, stage},
};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Visit {
    pub user_id: String,
    pub at: DateTime<Utc>,
    pub event_type: &'static str,
    pub page: String,
    pub cents: i64,
    pub region: String,
}

impl Visit {
    fn fecha(&self) -> NaiveDate {
        self.at.date_naive()
    }
}

fn visit(user: &str, at: &str, event_type: &'static str, cents: i64) -> Visit {
    let at = at.parse().expect("an instant");
    Visit { user_id: user.into(), at, event_type, page: "/p".into(), cents, region: "sur".into() }
}

/// Events of one day, the same for the same seed: sessions that begin anywhere, one of them just before midnight, and
/// neighbours that are exactly 30 minutes apart or one millisecond more.
pub fn of_day(fecha: NaiveDate, seed: u64) -> Vec<Visit> {
    let mut state = seed.wrapping_mul(0x51ED_2701).wrapping_add(fecha.num_days_from_ce() as u64);
    let mut draw = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut out = Vec::new();
    for session in 0..14 {
        let user = format!("u{}", 1 + draw(7));
        let mut region = REGIONS[draw(3) as usize];
        let mut ms = if session == 0 { 86_390_000 } else { draw(86_400_000) as i64 };
        for _ in 0..1 + draw(7) {
            if ms >= 86_400_000 {
                break;
            }
            let (event_type, cents) =
                [("click", 0), ("click", 0), ("add_to_cart", 0), ("purchase", 1 + draw(9_999) as i64)][draw(4) as usize];
            let at = fecha.and_time(NaiveTime::MIN).and_utc() + TimeDelta::milliseconds(ms);
            let (user_id, page, region_of) = (user.clone(), format!("/p{}", draw(3)), region.to_owned());
            out.push(Visit { user_id, at, event_type, page, cents, region: region_of });
            ms += [1_800_000, 1_800_001, 1_000, 0, 600_000, 7_200_000][draw(6) as usize];
            if draw(9) == 0 {
                region = REGIONS[draw(3) as usize];
            }
        }
    }
    out
}

/// Appends events to the lake from one offset on; every fifth is delivered twice. Returns the next offset.
pub async fn deliver(lake: &dyn Lakehouse, from: i64, visits: &[Visit]) -> i64 {
    let twice = |(i, v): (usize, &Visit)| vec![v.clone(); if i.is_multiple_of(5) { 2 } else { 1 }];
    let all: Vec<Visit> = visits.iter().enumerate().flat_map(twice).collect();
    let next = from + all.len() as i64;
    let text = |of: &dyn Fn(&Visit) -> String| Arc::new(StringArray::from_iter_values(all.iter().map(of))) as ArrayRef;
    let micros = || TimestampMicrosecondArray::from_iter_values(all.iter().map(|v| v.at.timestamp_micros())).with_timezone("UTC");
    let cents = Decimal128Array::from_iter_values(all.iter().map(|v| i128::from(v.cents)));
    let days = all.iter().map(|v| (v.fecha() - NaiveDate::default()).num_days() as i32);
    let columns: Vec<(&str, ArrayRef, bool)> = vec![
        ("user_id", text(&|v| v.user_id.clone()), false),
        ("event_type", text(&|v| v.event_type.into()), false),
        ("page", text(&|v| v.page.clone()), false),
        ("product_id", Arc::new(StringArray::from(vec![None::<&str>; all.len()])), true),
        ("monto", Arc::new(cents.with_precision_and_scale(12, 2).expect("money")), false),
        ("region", text(&|v| v.region.clone()), false),
        ("timestamp", Arc::new(micros()), false),
        ("fecha", Arc::new(Date32Array::from_iter_values(days)), false),
        ("_partition", Arc::new(Int64Array::from(vec![0; all.len()])), false),
        ("_offset", Arc::new(Int64Array::from_iter_values(from..next)), false),
        ("_appended_at", Arc::new(micros()), false),
    ];
    let field = |(name, array, null): &(&str, ArrayRef, bool)| Field::new(*name, DataType::clone(array.data_type()), *null);
    let schema = Arc::new(Schema::new(columns.iter().map(field).collect::<Vec<_>>()));
    let rows = RecordBatch::try_new(schema, columns.into_iter().map(|c| c.1).collect()).expect("a batch");
    let append = AppendRows {
        table: EVENTOS.into(),
        mark: Mark { writer: "ecommerce.clicks-0".into(), epoch: next },
        after: (from > 0).then_some(from),
        partition_by: vec!["fecha".into()],
        batches: vec![rows],
    };
    lake.append_rows(append).await.expect("the events are appended");
    next
}

/// Distinct events of each customer and day, in order of time, cut where more than 30 minutes pass.
fn sessions(visits: &[Visit]) -> Vec<Vec<Visit>> {
    let mut by_user: BTreeMap<(NaiveDate, String), Vec<Visit>> = BTreeMap::new();
    for v in visits {
        by_user.entry((v.fecha(), v.user_id.clone())).or_default().push(v.clone());
    }
    let mut out = Vec::new();
    for mut of in by_user.into_values() {
        of.sort_by(|a, b| (a.at, &a.region, a).cmp(&(b.at, &b.region, b)));
        of.dedup();
        let mut session: Vec<Visit> = Vec::new();
        for v in of {
            if session.last().is_some_and(|last| v.at - last.at > TimeDelta::minutes(30)) {
                out.push(std::mem::take(&mut session));
            }
            session.push(v);
        }
        out.push(session);
    }
    out
}

fn count(session: &[Visit], event_type: &str) -> usize {
    session.iter().filter(|v| v.event_type == event_type).count()
}

fn minutes(session: &[Visit]) -> f64 {
    let (Some(first), Some(last)) = (session.first(), session.last()) else { return 0.0 };
    (last.at - first.at).num_milliseconds() as f64 / 60_000.0
}

fn distinct(visits: &[Visit]) -> Vec<Visit> {
    let mut all = visits.to_vec();
    all.sort();
    all.dedup();
    all
}

/// Purchases by clicks of a group, as a table shows it; empty without clicks.
pub fn conversion(visits: &[Visit], fecha: NaiveDate, region: &str, of: &str, segment: fn(&str, NaiveDate) -> String) -> String {
    let group: Vec<Visit> = distinct(visits)
        .into_iter()
        .filter(|v| v.fecha() == fecha && v.region == region && segment(&v.user_id, fecha) == of)
        .collect();
    let (purchases, clicks) = (count(&group, "purchase"), count(&group, "click"));
    if clicks == 0 { String::new() } else { shown(purchases as f64 / clicks as f64) }
}

/// A number as Arrow casts it to text.
fn shown(value: f64) -> String {
    format!("{value:?}")
}

/// Average minutes and pages of the sessions from one day to another, and what was put into the cart.
pub fn features(visits: &[Visit], user: &str, from: NaiveDate, to: NaiveDate) -> [String; 3] {
    let mine: Vec<Vec<Visit>> = sessions(visits)
        .into_iter()
        .filter(|s| s.first().is_some_and(|v| v.user_id == user && (from..=to).contains(&v.fecha())))
        .collect();
    if mine.is_empty() {
        return [String::new(), String::new(), String::new()];
    }
    let n = mine.len() as f64;
    let pages: usize = mine.iter().map(|s| count(s, "click")).sum();
    let carts: usize = mine.iter().map(|s| count(s, "add_to_cart")).sum();
    let total: f64 = mine.iter().map(|s| minutes(s)).sum();
    [format!("{:.6}", total / n), format!("{:.6}", pages as f64 / n), carts.to_string()]
}

/// Compares sessions and funnel with the walk.
pub async fn compare(lake: &DeltaLakehouse, visits: &[Visit]) {
    let all = sessions(visits);
    let mut expected: Vec<Vec<String>> = all
        .iter()
        .map(|s| {
            let revenue: i64 = s.iter().map(|v| v.cents).sum();
            vec![
                s[0].fecha().to_string(),
                s[0].user_id.clone(),
                format!("{}:{}", s[0].user_id, s[0].at.timestamp_millis()),
                s[0].at.timestamp_millis().to_string(),
                s[s.len() - 1].at.timestamp_millis().to_string(),
                shown(minutes(s)),
                count(s, "click").to_string(),
                count(s, "add_to_cart").to_string(),
                count(s, "purchase").to_string(),
                money(revenue),
            ]
        })
        .collect();
    expected.sort();
    let columns = "CAST(fecha AS VARCHAR), user_id, session_id, arrow_cast(session_start, 'Int64') / 1000 AS desde,
                   arrow_cast(session_end, 'Int64') / 1000 AS hasta, session_duration_min, pages_viewed, add_to_cart_count,
                   purchases, revenue";
    let mut found = table(lake, "intermediate/eventos_sessionized", columns, "session_id").await;
    found.sort();
    assert_eq!(found, expected);

    let mut funnel: BTreeMap<(NaiveDate, String), [usize; 4]> = BTreeMap::new();
    for s in &all {
        let steps = funnel.entry((s[0].fecha(), s[0].region.clone())).or_default();
        steps[0] += 1;
        let mut since = DateTime::<Utc>::MIN_UTC;
        for (step, event_type) in ["click", "add_to_cart", "purchase"].into_iter().enumerate() {
            let Some(v) = s.iter().find(|v| v.event_type == event_type && v.at >= since) else { break };
            since = v.at;
            steps[step + 1] += 1;
        }
    }
    let rate = |a: usize, b: usize| if b == 0 { String::new() } else { shown(a as f64 / b as f64) };
    let expected: Vec<Vec<String>> = funnel
        .into_iter()
        .map(|((fecha, region), [all, click, cart, purchase])| {
            let counts = [all, click, cart, purchase].map(|n| n.to_string());
            let rates = [rate(cart, click), rate(purchase, cart), rate(purchase, click)];
            [vec![fecha.to_string(), region], counts.to_vec(), rates.to_vec()].concat()
        })
        .collect();
    let columns = "fecha, region, sesiones, sesiones_click, sesiones_add_to_cart, sesiones_purchase, tasa_add_to_cart,
                   tasa_purchase, tasa_conversion";
    assert_eq!(table(lake, "marts/funnel_conversion", columns, "fecha, region").await, expected);
}

#[test]
fn the_walk_knows_what_the_specification_says() {
    let walked = |visits: &[Visit]| sessions(visits).iter().map(Vec::len).collect::<Vec<_>>();
    let near = visit("u1", "2024-03-01T10:30:00Z", "click", 0);
    assert_eq!(walked(&[visit("u1", "2024-03-01T10:00:00Z", "click", 0), near.clone(), near.clone()]), [2], "30 minutes are one");
    assert_eq!(walked(&[visit("u1", "2024-03-01T09:59:59.999Z", "click", 0), near.clone()]), [1, 1], "more are two");
    let before = visit("u1", "2024-02-29T23:59:59Z", "click", 0);
    assert_eq!(walked(&[before, visit("u1", "2024-03-01T00:00:00Z", "click", 0)]), [1, 1], "midnight ends a session");
    assert_eq!(walked(&[near, visit("u2", "2024-03-01T10:30:00Z", "click", 0)]), [1, 1], "another customer has another");
}

#[tokio::test]
async fn events_that_come_later_change_their_day_and_the_features_that_read_it_and_nothing_else() {
    let (lake, all, days) = filled().await;
    let mut visits = crate::models::visits();
    let from = lake.writer_epoch(EVENTOS, "ecommerce.clicks-0").await.expect("the log is read").expect("events were delivered");
    // A month later the silent day's events arrive, and more of an earlier day.
    let more: Vec<Visit> = [of_day(day(SILENT), 1), of_day(day("2024-01-31"), 9)].concat();
    let next = deliver(&lake, from, &more).await;
    compare_with(&lake, &all, &days, &visits).await;
    visits.extend(more);
    let changed = [day("2024-01-31"), day(SILENT)];
    let steps = plan(&lake, &project(), &changed.into()).await.expect("a plan");
    let of = |model: &str| steps.iter().filter(|s| s.model == model).map(|s| s.fecha.to_string()).collect::<Vec<_>>();
    assert_eq!(of("eventos_sessionized"), ["2024-01-31", SILENT]);
    assert_eq!(of("funnel_conversion"), ["2024-01-31", SILENT]);
    assert_eq!(of("user_features"), ["2024-01-31", "2024-02-01", SILENT, "2024-02-29", "2024-03-01"]);
    run_models(&lake, &project(), &batch(&changed, 2)).await.expect("the models run");
    compare_with(&lake, &all, &days, &visits).await;
    // The same events a third time are the same events.
    deliver(&lake, next, &visits).await;
    run_models(&lake, &project(), &batch(&days, 3)).await.expect("the models run");
    compare_with(&lake, &all, &days, &visits).await;
}

#[tokio::test]
async fn a_model_that_is_not_made_is_read_as_if_it_had_no_rows() {
    let lake = lake();
    let fecha = day("2024-03-01");
    let sale = crate::shop::Sale {
        order_id: "o1".into(),
        user_id: "u1".into(),
        product_id: "p1".into(),
        bruto_cents: 500,
        descuento_cents: 0,
        region: "sur".into(),
        at: "2024-03-01T12:00:00Z".parse().expect("an instant"),
    };
    stage(&lake, fecha, 1, std::slice::from_ref(&sale)).await;
    deliver(&lake, 0, &[visit("u1", "2024-03-01T11:59:00Z", "click", 0), visit("u1", "2024-03-01T12:00:00Z", "purchase", 500)])
        .await;
    let alone = project().select("user_features").expect("it is there");
    let report = run_models(&lake, &alone, &batch(&[fecha], 1)).await.expect("the model runs");
    assert!(report.absent.contains(&Need::Model("eventos_sessionized".into())), "{report:?}");
    let columns = "user_id, total_compras_30d, duracion_sesion_promedio, paginas_por_sesion, total_add_to_cart_30d";
    assert_eq!(table(&lake, "marts/user_features", columns, "1").await, [["u1", "1", "", "", ""]]);
    // With what it reads it is whole, and the day's conversion is there: one purchase, one click.
    let both = project().select("+user_features,metricas_diarias").expect("they are there");
    let report = run_models(&lake, &both, &batch(&[fecha], 2)).await.expect("the models run");
    assert!(!report.absent.contains(&Need::Model("eventos_sessionized".into())), "{report:?}");
    assert_eq!(table(&lake, "marts/user_features", columns, "1").await, [["u1", "1", "1.0", "1.0", "0"]]);
    assert_eq!(table(&lake, "marts/metricas_diarias", "tasa_conversion", "1").await, [["1.0"]]);
    assert_eq!(segment("u9", fecha), "sin_segmento");
}
