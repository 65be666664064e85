//! The models that ship, over a few days of a small shop, against sums that are made without SQL.
#![expect(clippy::disallowed_methods, reason = "a test compares a list with its folder")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use arrow::{array::AsArray, compute::cast, datatypes::DataType};
use chrono::{Datelike, Days, NaiveDate, NaiveTime, TimeDelta};
use simulacro_core::{
    contract::{catalogue, check},
    models::{
        Need, Project,
        run::{Batch, Step, canonical, plan, run_models},
    },
    ports::{Commit, Input, Lakehouse, Query},
    quality,
};
use simulacro_lakehouse::{DeltaLakehouse, models::FILES};

use crate::events::{self, Visit};
use crate::shop::{Customer, Product, Sale, day, dimensions, enriched, lake, money, now, stage, stage_as};

const CUSTOMERS: &[Customer] = &[
    ("u1", Some("oro"), "2023-01-01", Some("2024-02-01")),
    ("u1", Some("plata"), "2024-02-01", None),
    ("u2", Some("oro"), "2023-01-01", None),
    ("u3", None, "2023-01-01", None),
    // Known from a day in the middle on.
    ("u4", Some("plata"), "2024-02-15", None),
];
const PRODUCTS: &[Product] = &[("p1", Some("libros")), ("p2", Some("libros")), ("p3", Some("musica")), ("p4", None)];
const DAYS: [&str; 6] = ["2024-01-30", "2024-01-31", "2024-02-01", "2024-02-15", "2024-02-29", "2024-03-01"];
/// The day that has no event.
pub const SILENT: &str = "2024-02-15";
pub const REGIONS: [&str; 3] = ["centro", "norte", "sur"];

pub fn project() -> Project {
    Project::new(FILES, catalogue::shipped().expect("the contracts parse")).expect("the models are sound")
}

/// Sales of one day, the same for the same seed. Users and products go beyond those in the dimensions.
fn sales(fecha: NaiveDate, seed: u64) -> Vec<Sale> {
    let mut state = seed.wrapping_mul(0x9E37_79B9).wrapping_add(fecha.num_days_from_ce() as u64);
    let mut draw = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    (0..9)
        .map(|i| {
            let bruto_cents = 100 + draw(20_000) as i64;
            Sale {
                order_id: format!("{fecha}-{seed}-{i}"),
                user_id: format!("u{}", 1 + draw(6)),
                product_id: format!("p{}", 1 + draw(5)),
                bruto_cents,
                descuento_cents: draw(bruto_cents as u64) as i64,
                region: REGIONS[draw(3) as usize].into(),
                at: fecha.and_time(NaiveTime::MIN).and_utc() + TimeDelta::seconds(draw(86_400) as i64),
            }
        })
        .collect()
}

/// Rows as text, an empty text for null.
async fn rows(lake: &DeltaLakehouse, query: &Query) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    for batch in lake.query(query).await.expect("the table is read") {
        let columns: Vec<_> = batch.columns().iter().map(|c| cast(c, &DataType::Utf8).expect("text")).collect();
        for i in 0..batch.num_rows() {
            out.push(columns.iter().map(|c| c.as_string::<i32>().iter().nth(i).flatten().unwrap_or("").to_owned()).collect());
        }
    }
    out
}

pub async fn table(lake: &DeltaLakehouse, folder: &str, columns: &str, order: &str) -> Vec<Vec<String>> {
    let sql = format!("SELECT {columns} FROM t ORDER BY {order}");
    rows(lake, &Query { sql, inputs: vec![("t".into(), Input::Delta(folder.into()))] }).await
}

pub fn segment(user: &str, fecha: NaiveDate) -> String {
    let holds = |c: &&Customer| c.0 == user && day(c.2) <= fecha && c.3.is_none_or(|end| fecha < day(end));
    CUSTOMERS.iter().find(holds).and_then(|c| c.1).unwrap_or("sin_segmento").to_owned()
}

/// Writes a day to staging with what the dimensions know of each sale.
async fn stage_known(lake: &DeltaLakehouse, fecha: NaiveDate, epoch: i64, sales: &[Sale]) {
    let select = |s: &Sale| {
        let segment = Some(segment(&s.user_id, s.fecha())).filter(|s| s != "sin_segmento");
        enriched(s, segment.as_deref(), Some(category(&s.product_id)).filter(|c| !c.is_empty()))
    };
    stage_as(lake, fecha, epoch, sales, select).await;
}

fn category(product: &str) -> &'static str {
    PRODUCTS.iter().find(|p| p.0 == product).and_then(|p| p.1).unwrap_or("")
}

/// Cents by a number, half a cent up.
fn per(cents: i64, n: usize) -> String {
    let n = n as i64;
    money((2 * cents + n) / (2 * n))
}

fn users<'a>(sales: impl IntoIterator<Item = &'a &'a Sale>) -> usize {
    sales.into_iter().map(|s| s.user_id.as_str()).collect::<BTreeSet<_>>().len()
}

fn daily(all: &[Sale], visits: &[Visit]) -> Vec<Vec<String>> {
    let mut groups: BTreeMap<(NaiveDate, String, String), Vec<&Sale>> = BTreeMap::new();
    for s in all {
        groups.entry((s.fecha(), s.region.clone(), segment(&s.user_id, s.fecha()))).or_default().push(s);
    }
    let row = |((fecha, region, of), sales): ((NaiveDate, String, String), Vec<&Sale>)| {
        let (region_of, segment_of) = (region.clone(), of.clone());
        let sum = |f: fn(&Sale) -> i64| sales.iter().map(|s| f(s)).sum::<i64>();
        let neto = sum(Sale::neto_cents);
        vec![
            fecha.to_string(),
            region,
            of,
            money(sum(|s| s.bruto_cents)),
            money(neto),
            money(sum(|s| s.descuento_cents)),
            sales.len().to_string(),
            users(&sales).to_string(),
            per(neto, sales.len()),
            events::conversion(visits, fecha, &region_of, &segment_of, segment),
        ]
    };
    groups.into_iter().map(row).collect()
}

fn products(all: &[Sale]) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    for fecha in all.iter().map(Sale::fecha).collect::<BTreeSet<_>>() {
        let mut by_product: BTreeMap<&str, Vec<&Sale>> = BTreeMap::new();
        for s in all.iter().filter(|s| s.fecha() == fecha) {
            by_product.entry(&s.product_id).or_default().push(s);
        }
        let neto = |sales: &[&Sale]| sales.iter().map(|s| s.neto_cents()).sum::<i64>();
        let mut ranked: Vec<_> = by_product.into_iter().collect();
        ranked.sort_by_key(|(product, sales)| (-neto(sales), *product));
        let mut places: BTreeMap<&str, u64> = BTreeMap::new();
        for (i, (product, sales)) in ranked.iter().enumerate() {
            let place = places.entry(category(product)).or_default();
            *place += 1;
            out.push(vec![
                fecha.to_string(),
                (*product).to_owned(),
                category(product).to_owned(),
                money(neto(sales)),
                sales.len().to_string(),
                users(sales).to_string(),
                (i + 1).to_string(),
                place.to_string(),
            ]);
        }
    }
    out.sort();
    out
}

fn month(fecha: NaiveDate) -> NaiveDate {
    fecha.with_day(1).expect("every month has a first day")
}

fn cohorts(all: &[Sale], days: &[NaiveDate]) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    for fecha in days {
        let seen: Vec<&Sale> = all.iter().filter(|s| s.fecha() <= *fecha).collect();
        let mut first: BTreeMap<&str, NaiveDate> = BTreeMap::new();
        for s in &seen {
            let f = first.entry(&s.user_id).or_insert(s.fecha());
            *f = (*f).min(s.fecha());
        }
        for cohort in first.values().map(|f| month(*f)).collect::<BTreeSet<_>>() {
            let of: Vec<&Sale> = seen.iter().copied().filter(|s| month(first[s.user_id.as_str()]) == cohort).collect();
            let now: Vec<&Sale> = of.iter().copied().filter(|s| month(s.fecha()) == month(*fecha)).collect();
            let neto = |sales: &[&Sale]| sales.iter().map(|s| s.neto_cents()).sum::<i64>();
            let months = (fecha.year() - cohort.year()) * 12 + fecha.month() as i32 - cohort.month() as i32;
            out.push(vec![
                fecha.to_string(),
                cohort.to_string(),
                months.to_string(),
                users(&of).to_string(),
                users(&now).to_string(),
                money(neto(&now)),
                money(neto(&of)),
                per(neto(&of), users(&of)),
            ]);
        }
    }
    out
}

/// The value with most votes, the first by name among equals.
fn favourite<'a>(votes: impl Iterator<Item = &'a str>) -> String {
    let mut count: BTreeMap<&str, i32> = BTreeMap::new();
    votes.for_each(|v| *count.entry(v).or_default() += 1);
    count.into_iter().min_by_key(|(v, n)| (-n, *v)).map_or(String::new(), |(v, _)| v.to_owned())
}

fn features(all: &[Sale], days: &[NaiveDate], visits: &[Visit]) -> Vec<Vec<String>> {
    let mut out = Vec::new();
    for fecha in days {
        let from = *fecha - Days::new(29);
        let mut by_user: BTreeMap<&str, Vec<&Sale>> = BTreeMap::new();
        for s in all.iter().filter(|s| (from..=*fecha).contains(&s.fecha())) {
            by_user.entry(&s.user_id).or_default().push(s);
        }
        for (user, sales) in by_user {
            let neto: Vec<i64> = sales.iter().map(|s| s.neto_cents()).collect();
            let (sum, n) = (neto.iter().sum::<i64>(), neto.len());
            let mean = sum as f64 / n as f64;
            let variance = neto.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / (n as f64 - 1.0);
            let distinct = |f: fn(&Sale) -> &str| sales.iter().map(|s| f(s)).filter(|v| !v.is_empty()).collect::<BTreeSet<_>>();
            out.push(vec![
                fecha.to_string(),
                user.to_owned(),
                n.to_string(),
                money(sum),
                per(sum, n),
                if n > 1 { format!("{:.6}", variance.sqrt() / 100.0) } else { String::new() },
                distinct(|s| &s.product_id).len().to_string(),
                distinct(|s| category(&s.product_id)).len().to_string(),
                sales.iter().map(|s| s.at.timestamp()).max().expect("a sale").to_string(),
                sales.iter().map(|s| s.at.timestamp()).min().expect("a sale").to_string(),
                favourite(sales.iter().map(|s| s.region.as_str())),
                favourite(sales.iter().map(|s| category(&s.product_id)).filter(|c| !c.is_empty())),
            ]);
            if let Some(row) = out.last_mut() {
                row.extend(events::features(visits, user, from, *fecha));
            }
        }
    }
    out
}

/// Compares all marts with the sums above.
async fn compare(lake: &DeltaLakehouse, all: &[Sale], days: &[NaiveDate]) {
    compare_with(lake, all, days, &visits()).await;
}

/// The events of all days but one.
pub fn visits() -> Vec<Visit> {
    DAYS.iter().filter(|d| **d != SILENT).flat_map(|d| events::of_day(day(d), 1)).collect()
}

pub async fn compare_with(lake: &DeltaLakehouse, all: &[Sale], days: &[NaiveDate], visits: &[Visit]) {
    let columns = "fecha, region, segmento_cliente, revenue_bruto, revenue_neto, descuentos_total, transacciones, \
                   usuarios_unicos, ticket_promedio, tasa_conversion";
    assert_eq!(table(lake, "marts/metricas_diarias", columns, "fecha, region, segmento_cliente").await, daily(all, visits));
    let columns = "fecha, product_id, categoria, revenue_neto, transacciones, usuarios_unicos, puesto, puesto_categoria";
    assert_eq!(table(lake, "marts/metricas_producto", columns, "fecha, product_id").await, products(all));
    let columns = "fecha, cohorte, mes, usuarios, usuarios_activos, revenue_neto, revenue_acumulado, ltv";
    assert_eq!(table(lake, "marts/cohortes_usuario", columns, "fecha, cohorte").await, cohorts(all, days));
    let columns = "fecha, user_id, total_compras_30d, revenue_total_30d, ticket_promedio_30d, ticket_std_30d, \
                   productos_unicos_30d, categorias_30d, \
                   arrow_cast(ultima_compra, 'Int64') / 1000000 AS ultima, arrow_cast(primera_compra, 'Int64') / 1000000 AS primera, \
                   region_preferida, categoria_preferida, duracion_sesion_promedio, paginas_por_sesion, total_add_to_cart_30d";
    let mut found = table(lake, "marts/user_features", columns, "fecha, user_id").await;
    for row in &mut found {
        for cell in [5, 12, 13].into_iter().filter(|i| !row[*i].is_empty()).collect::<Vec<_>>() {
            row[cell] = format!("{:.6}", row[cell].parse::<f64>().expect("a number"));
        }
    }
    assert_eq!(found, features(all, days, visits));
    events::compare(lake, visits).await;
}

async fn tests(lake: &DeltaLakehouse, project: &Project, day: NaiveDate) -> Vec<check::QualityResult> {
    let tested = quality::test_models(lake, project, day, now()).await.expect("the lake answers");
    tested.into_iter().map(|t| t.result).collect()
}

pub fn batch(days: &[NaiveDate], epoch: i64) -> Batch {
    Batch { days: days.iter().copied().collect(), epoch, now: now(), version: "1.2.3".into() }
}

/// A lake with all days run in order, its sales and its days.
pub async fn filled() -> (DeltaLakehouse, Vec<Sale>, Vec<NaiveDate>) {
    let (lake, days) = (lake(), DAYS.map(day).to_vec());
    dimensions(&lake, CUSTOMERS, PRODUCTS).await;
    events::deliver(&lake, 0, &visits()).await;
    let all: Vec<Sale> = days.iter().flat_map(|d| sales(*d, 1)).collect();
    for fecha in &days {
        stage_known(&lake, *fecha, 1, &all).await;
        let report = run_models(&lake, &project(), &batch(&[*fecha], 1)).await.expect("the models run");
        assert_eq!(report.made.len(), 6, "a new day is made once in each table: {report:?}");
        assert!(report.absent.is_empty());
    }
    (lake, all, days)
}

#[tokio::test]
async fn every_mart_equals_a_naive_computation() {
    let (lake, all, days) = filled().await;
    compare(&lake, &all, &days).await;
}

#[tokio::test]
async fn an_old_day_that_changes_is_made_again_with_every_day_that_has_read_it() {
    let (lake, mut all, days) = filled().await;
    let changed = day("2024-01-31");
    all.retain(|s| s.fecha() != changed);
    all.extend(sales(changed, 2));
    // A customer whose first purchase now lies in an earlier month.
    let mut early = sales(changed, 3).remove(0);
    early.user_id = all.iter().find(|s| s.fecha() == day("2024-03-01")).expect("a sale").user_id.clone();
    all.push(early);
    stage_known(&lake, changed, 2, &all).await;

    let steps = plan(&lake, &project(), &BTreeSet::from([changed])).await.expect("a plan");
    let of = |model: &str| {
        let days = steps.iter().filter(|s| s.model == model).map(|s| s.fecha.to_string());
        days.collect::<Vec<_>>()
    };
    assert_eq!(of("metricas_diarias"), ["2024-01-31"]);
    assert_eq!(of("user_features"), ["2024-01-31", "2024-02-01", "2024-02-15", "2024-02-29"], "29 days reach to there");
    assert_eq!(of("cohortes_usuario"), ["2024-01-31", "2024-02-01", "2024-02-15", "2024-02-29", "2024-03-01"]);

    run_models(&lake, &project(), &batch(&[changed], 2)).await.expect("the models run");
    compare(&lake, &all, &days).await;

    // The ledger gives a later day an epoch that its table has already seen on behalf of the earlier one.
    let later = day("2024-02-29");
    all.retain(|s| s.fecha() != later);
    all.extend(sales(later, 4));
    stage_known(&lake, later, 2, &all).await;
    run_models(&lake, &project(), &batch(&[later], 2)).await.expect("the models run");
    compare(&lake, &all, &days).await;
}

#[tokio::test]
async fn running_again_or_all_days_at_once_gives_the_same_rows() {
    let (lake, all, days) = filled().await;
    let project = project();
    let mut seen = Vec::new();
    for round in 0..2 {
        if round == 1 {
            let report = run_models(&lake, &project, &batch(&days, 2)).await.expect("the models run");
            assert_eq!(report.made.len(), 6 * days.len(), "no day is made twice");
            assert!(report.made.iter().all(|(_, _, commit)| matches!(commit, Commit::New(_))));
        }
        let mut tables = Vec::new();
        for model in project.models().filter(|m| !m.table.is_empty()) {
            let columns = check::declared(&lake, &model.table).await.expect("the table is there");
            let columns: Vec<_> = columns.into_iter().map(|c| c.name).collect();
            tables.push(rows(&lake, &canonical(model, &columns)).await);
        }
        seen.push(tables);
    }
    assert!(seen[0].iter().all(|t| !t.is_empty()));
    assert_eq!(seen[0], seen[1]);
    compare(&lake, &all, &days).await;
}

#[tokio::test]
async fn stored_models_keep_their_contracts_and_models_pass_their_tests() {
    let (lake, _, days) = filled().await;
    let contracts = catalogue::shipped().expect("the contracts parse");
    for model in project().models().filter(|m| !m.table.is_empty()) {
        let contract = contracts.iter().find(|c| c.physical_name == model.table).expect("a stored model has a contract");
        assert_eq!(contract.key, model.key, "{}", model.name);
        for fecha in &days {
            let results = check::check_table(&lake, contract, &contracts, *fecha, now()).await;
            // Users 5 and 6 and product 5 are in no dimension, which a left join bears and a warning tells.
            let failed: Vec<_> = results.iter().filter(|r| !r.passed && !r.check.ends_with(".references")).collect();
            assert!(failed.is_empty() && !check::is_broken(&results), "{}", check::render(&results));
        }
    }
    let results = tests(&lake, &project(), day("2024-03-01")).await;
    let failed: Vec<_> = results.iter().filter(|r| !r.passed).map(|r| (r.check.as_str(), r.severity.as_str())).collect();
    // Users 5 and 6 and product 5 are in no dimension, which a left join bears and a warning tells.
    assert_eq!(
        failed,
        [
            ("relationships(user_id, stg_clientes.user_id)", "warning"),
            ("relationships(product_id, stg_productos.product_id)", "warning")
        ]
    );
    assert_eq!(results.len(), 40, "{}", check::render(&results));
}

#[tokio::test]
async fn an_order_that_comes_back_on_another_day_fails_the_models_tests() {
    let (lake, mut all, _) = filled().await;
    let fecha = day("2024-03-01");
    let twin = all.iter().find(|s| s.fecha() == day("2024-02-15")).expect("a sale").order_id.clone();
    all.iter_mut().find(|s| s.fecha() == fecha).expect("a sale").order_id = twin;
    stage_known(&lake, fecha, 2, &all).await;
    run_models(&lake, &project(), &batch(&[fecha], 2)).await.expect("the models run");
    let results = tests(&lake, &project(), fecha).await;
    let failed: Vec<_> = results.iter().filter(|r| !r.passed && r.severity.as_str() == "error").collect();
    assert_eq!(failed.len(), 1, "{}", check::render(&results));
    assert_eq!((failed[0].asset.as_str(), failed[0].check.as_str()), ("stg_ventas_validadas", "unique(order_id) within 30 days"));
}

#[tokio::test]
async fn without_dimensions_every_customer_is_without_segment_and_the_report_says_why() {
    let lake = lake();
    let fecha = day("2024-03-01");
    stage(&lake, fecha, 1, &sales(fecha, 1)).await;
    let report = run_models(&lake, &project(), &batch(&[fecha], 1)).await.expect("the models run");
    let absent = [("dim", "clientes_dim"), ("dim", "productos_dim"), ("raw", "eventos")];
    assert_eq!(report.absent, absent.map(|(s, t)| Need::Source(s.into(), t.into())).into());
    let segments = table(&lake, "marts/metricas_diarias", "DISTINCT segmento_cliente", "1").await;
    assert_eq!(segments, [["sin_segmento"]]);
    let results = tests(&lake, &project(), fecha).await;
    assert!(results.iter().all(|r| r.passed && !r.check.starts_with("relationships")), "{}", check::render(&results));
    // The dimensions come; the day is staged and made again and has them.
    dimensions(&lake, CUSTOMERS, PRODUCTS).await;
    stage_known(&lake, fecha, 2, &sales(fecha, 1)).await;
    run_models(&lake, &project(), &batch(&[fecha], 2)).await.expect("the models run");
    compare_with(&lake, &sales(fecha, 1), &[fecha], &[]).await;
}

#[tokio::test]
async fn a_backfill_of_an_empty_lake_plans_each_day_of_each_table_once() {
    let steps = plan(&lake(), &project(), &DAYS.map(day).into_iter().collect()).await.expect("a plan");
    assert_eq!(steps.len(), 6 * DAYS.len());
    assert_eq!(steps[0], Step { model: "eventos_sessionized".into(), fecha: day(DAYS[0]) });
}

#[test]
fn the_list_of_models_has_every_file_of_the_folder() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let mut found = Vec::new();
    for layer in std::fs::read_dir(&folder).expect("the folder") {
        let layer = layer.expect("a layer").path();
        for file in std::fs::read_dir(&layer).expect("the layer") {
            let path = file.expect("a file").path();
            found.push(path.strip_prefix(&folder).expect("below").to_str().expect("a name in Unicode").to_owned());
        }
    }
    found.sort();
    assert_eq!(FILES.iter().map(|(p, _)| *p).collect::<Vec<_>>(), found);
}

#[tokio::test]
async fn a_day_without_sales_still_has_what_is_known_as_of_it() {
    let (lake, mut all, mut days) = filled().await;
    let quiet = day("2024-03-02");
    days.push(quiet);
    let report = run_models(&lake, &project(), &batch(&[quiet], 1)).await.expect("the models run");
    assert_eq!(report.made.len(), 6);
    compare(&lake, &all, &days).await;
    // It has read the day before, so it is made again with it.
    let changed = day("2024-03-01");
    all.retain(|s| s.fecha() != changed);
    all.extend(sales(changed, 2));
    stage_known(&lake, changed, 2, &all).await;
    run_models(&lake, &project(), &batch(&[changed], 2)).await.expect("the models run");
    compare(&lake, &all, &days).await;
}

#[tokio::test]
async fn only_the_chosen_models_are_made_and_a_day_that_they_reach_is_made_again() {
    let (lake, mut all, days) = filled().await;
    let changed = day("2024-02-15");
    all.retain(|s| s.fecha() != changed);
    all.extend(sales(changed, 2));
    stage_known(&lake, changed, 2, &all).await;
    let chosen = project().select("metricas_diarias,user_features").expect("both are there");
    let report = run_models(&lake, &chosen, &batch(&[changed], 2)).await.expect("the models run");
    let made: Vec<_> = report.made.iter().map(|(s, ..)| format!("{} {}", s.model, s.fecha)).collect();
    let expected =
        ["metricas_diarias 2024-02-15", "user_features 2024-02-15", "user_features 2024-02-29", "user_features 2024-03-01"];
    assert_eq!(made, expected);
    assert!(report.absent.is_empty(), "what is not chosen is not looked for");
    run_models(&lake, &project(), &batch(&[changed], 3)).await.expect("the others run");
    compare(&lake, &all, &days).await;
}

#[tokio::test]
async fn a_failing_test_names_model_test_rows_and_some_of_them() {
    let lake = lake();
    let fecha = day("2024-03-01");
    let mut bad = sales(fecha, 1);
    bad[0].region = "luna".into();
    bad[1].descuento_cents = bad[1].bruto_cents + 100;
    stage(&lake, fecha, 1, &bad).await;
    let chosen = project().select("+metricas_diarias").expect("it is there");
    run_models(&lake, &chosen, &batch(&[fecha], 1)).await.expect("the models run");
    let tested = quality::test_models(&lake, &chosen, fecha, now()).await.expect("the lake answers");
    insta::assert_snapshot!(quality::render(&tested));
    assert_eq!(quality::broken(&tested).count(), tested.iter().filter(|t| !t.result.passed).count());
}

#[tokio::test]
async fn a_table_that_is_not_there_fails_its_own_tests_only() {
    let lake = lake();
    let fecha = day("2024-03-01");
    stage(&lake, fecha, 1, &sales(fecha, 1)).await;
    run_models(&lake, &project().select("metricas_diarias").expect("it is there"), &batch(&[fecha], 1)).await.expect("it runs");
    let results = tests(&lake, &project(), fecha).await;
    let failed: BTreeSet<_> = results.iter().filter(|r| !r.passed).map(|r| r.asset.as_str()).collect();
    assert_eq!(
        failed,
        BTreeSet::from([
            "cohortes_usuario",
            "eventos_sessionized",
            "funnel_conversion",
            "int_sesiones_usuario",
            "metricas_producto",
            "user_features"
        ])
    );
    assert!(results.iter().filter(|r| !r.passed).all(|r| r.observed.contains("no such table")), "{}", check::render(&results));
}
