use super::*;

fn day(text: &str) -> NaiveDate {
    text.parse().expect("a day")
}

const TABLE: &str = "staging/ventas_validadas";

fn lost_days() -> BTreeMap<NaiveDate, u64> {
    [(day("2024-03-16"), 120), (day("2024-03-17"), 80)].into()
}

fn assessed(way: Way, possible: bool) -> Assessed {
    let (leaves, work) = if possible { (BTreeMap::new(), "1 commit".to_owned()) } else { (lost_days(), String::new()) };
    Assessed { table: TABLE.into(), way, possible, why: format!("because of {}", way.as_str()), work, leaves }
}

fn request(only: Option<Way>, from_source: bool) -> Request<'static> {
    Request { target: "staging", only, from_source }
}

fn a_plan(possible: &[Way]) -> Plan {
    let ways: Vec<Assessed> = Way::ALL.into_iter().map(|way| assessed(way, possible.contains(&way))).collect();
    let chosen = [(TABLE.to_owned(), choose(&ways, request(None, false)))].into();
    let tables = vec![
        Stands { table: "staging/ventas_no_publicadas".into(), exists: true, published: 2, lost: BTreeMap::new() },
        Stands { table: TABLE.into(), exists: false, published: 2, lost: lost_days() },
    ];
    Plan { target: "staging".into(), tables, ways, chosen }
}

#[test]
fn the_cheapest_way_that_works_is_taken_and_the_source_only_when_asked_for() {
    for (possible, chosen) in [
        (&[Way::Versions, Way::TimeTravel, Way::Raw, Way::Extract][..], Some(Way::Versions)),
        (&[Way::TimeTravel, Way::Raw, Way::Extract], Some(Way::TimeTravel)),
        (&[Way::Raw, Way::Extract], Some(Way::Raw)),
        (&[Way::Extract], None),
    ] {
        assert_eq!(a_plan(possible).chosen[TABLE], chosen, "{possible:?}");
    }
    let ways = a_plan(&[Way::Versions, Way::Extract]).ways;
    assert_eq!(choose(&ways[1..], request(None, true)), Some(Way::Extract));
    assert_eq!(choose(&ways, request(Some(Way::Raw), true)), None, "a way that is asked for and not possible is not replaced");
    assert_eq!(choose(&ways, request(Some(Way::Extract), false)), Some(Way::Extract));
}

#[test]
fn what_one_way_leaves_is_left_to_the_next() {
    let plan = a_plan(&[Way::TimeTravel, Way::Raw]);
    let mut tried = BTreeSet::new();
    let mut taken = Vec::new();
    while let Some((way, tables)) = next(&plan, &tried, request(None, false)) {
        tried.extend(tables.into_iter().map(|table| (way, table)));
        taken.push(way);
    }
    assert_eq!(taken, [Way::TimeTravel, Way::Raw]);
}

#[test]
fn a_plan_and_a_report_read_well() {
    let mut text = a_plan(&[Way::TimeTravel, Way::Raw, Way::Extract]).render();
    text.push_str("---\n");
    text.push_str(&a_plan(&[Way::Extract]).render());
    let lost = BTreeMap::from([(TABLE.to_owned(), lost_days())]);
    let step = Step { way: Way::Raw, tables: vec![TABLE.into()], what: "2 of 2 days made again".into(), millis: 1_234 };
    let hashes = BTreeMap::from([(TABLE.to_owned(), "ab12".to_owned())]);
    let report = |lost| Report {
        target: "staging".into(),
        lost_before: [(TABLE.to_owned(), lost_days())].into(),
        steps: vec![step.clone()],
        lost,
        rto_millis: 5_678,
        hashes: hashes.clone(),
    };
    text.push_str("---\n");
    text.push_str(&report(BTreeMap::new()).render());
    text.push_str("---\n");
    text.push_str(&report(lost).render());
    insta::assert_snapshot!(text);
}
