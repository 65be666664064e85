//! Laws of merges: against maps that know nothing of Delta.

use std::collections::{BTreeMap, BTreeSet};

use arrow::{array::AsArray, compute::cast, datatypes::DataType};
use chrono::{Days, NaiveDate};
use proptest::{collection::vec, prelude::*, test_runner::TestCaseError};
use simulacro_core::ports::{Absent, Effective, Input, Lakehouse, Mark, Period, Query, Scd2, Upsert};

use crate::shop::{day, lake};

const TABLE: &str = "dim/prueba";

/// Keys and values of one call; each key once.
type Rows = BTreeMap<String, Option<i64>>;

fn arbitrary_rows(least: usize) -> impl Strategy<Value = Rows> {
    let value = prop_oneof![1 => Just(None), 4 => (0..3i64).prop_map(Some)];
    proptest::collection::btree_map(prop_oneof![4 => "[a-d]", 1 => "[ñ'\"🦤]"], value, least..5)
}

fn select(rows: &Rows) -> String {
    let list: Vec<_> = rows
        .iter()
        .map(|(k, v)| format!("('{}', {})", k.replace('\'', "''"), v.map_or("NULL".to_owned(), |v| v.to_string())))
        .collect();
    // No rows are a row that is taken away again.
    let (list, keep) = if list.is_empty() { ("('x', 1)".to_owned(), "WHERE FALSE") } else { (list.join(", "), "") };
    format!(
        "SELECT r.k, CAST(r.v AS BIGINT) AS v FROM (VALUES (1)) AS o(one) LEFT JOIN (VALUES {list}) AS r(k, v) ON o.one = 1 {keep}"
    )
}

async fn read(lake: &dyn Lakehouse, columns: &str) -> Vec<Vec<Option<String>>> {
    let sql = format!("SELECT {columns} FROM t");
    let batches = lake.query(&Query { sql, inputs: vec![("t".into(), Input::Delta(TABLE.into()))] }).await.expect("it is read");
    let mut rows = Vec::new();
    for batch in batches {
        let columns: Vec<_> = batch.columns().iter().map(|c| cast(c, &DataType::Utf8).expect("text")).collect();
        for i in 0..batch.num_rows() {
            rows.push(columns.iter().map(|c| c.as_string::<i32>().iter().nth(i).flatten().map(str::to_owned)).collect());
        }
    }
    rows.sort();
    rows
}

fn on_a_runtime(test: impl Future<Output = Result<(), TestCaseError>>) -> Result<(), TestCaseError> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().expect("a runtime").block_on(test)
}

fn mark(epoch: usize) -> Mark {
    Mark { writer: "prueba".into(), epoch: epoch as i64 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn upserts_are_a_map_whose_entries_are_replaced(calls in vec(arbitrary_rows(0), 1..6)) {
        on_a_runtime(async {
            let lake = lake();
            let mut map = Rows::new();
            for (i, rows) in calls.iter().enumerate() {
                let query = Query { sql: select(rows), inputs: vec![] };
                let upsert = Upsert { table: TABLE.into(), mark: mark(i + 1), keys: vec!["k".into()], ignored: vec![], query };
                lake.upsert(upsert.clone()).await.expect("rows are merged");
                lake.upsert(upsert).await.expect("rows are merged once");
                let moved = lake.versions(TABLE, 1).await.expect("the log is read")[0].files_added;
                let changes = rows.iter().any(|(k, v)| map.get(k) != Some(v));
                prop_assert_eq!(moved > 0, changes || (i == 0 && !rows.is_empty()));
                map.extend(rows.clone());
                let expected: Vec<_> = map.iter().map(|(k, v)| vec![Some(k.clone()), v.map(|v| v.to_string())]).collect();
                prop_assert_eq!(read(&lake, "k, v").await, expected);
            }
            Ok(())
        })?;
    }
}

/// A call for one day.
#[derive(Debug, Clone)]
struct Applied {
    day: u64,
    absent: Absent,
    rows: Rows,
}

fn date(n: u64) -> NaiveDate {
    day("2024-01-01") + Days::new(n)
}

/// The naive dimension: for each key what it is from a day on, as steps; `None` where it is not there.
#[derive(Debug, Clone, Default, PartialEq)]
struct Steps(BTreeMap<String, BTreeMap<u64, Option<Option<i64>>>>);

impl Steps {
    fn apply(&mut self, call: &Applied) {
        let mut seen: BTreeMap<String, Option<Option<i64>>> = call.rows.iter().map(|(k, v)| (k.clone(), Some(*v))).collect();
        if call.absent == Absent::Ends {
            for key in self.0.keys() {
                seen.entry(key.clone()).or_insert(None);
            }
        }
        for (key, value) in seen {
            let steps = self.0.entry(key).or_default();
            steps.insert(call.day, value);
            // A step to what already is, is none; before the first step there is nothing.
            let mut last = None;
            steps.retain(|_, value| {
                let keep = *value != last;
                last = *value;
                keep
            });
        }
    }

    fn table(&self) -> Vec<Vec<Option<String>>> {
        let mut rows = Vec::new();
        for (key, steps) in &self.0 {
            let starts: Vec<_> = steps.iter().collect();
            for (i, (from, value)) in starts.iter().enumerate() {
                let Some(value) = value else { continue };
                let to = starts.get(i + 1).map(|(next, _)| date(**next).to_string());
                let current = to.is_none().to_string();
                let value = value.map(|v| v.to_string());
                rows.push(vec![Some(key.clone()), value, Some(date(**from).to_string()), to, Some(current)]);
            }
        }
        rows.sort();
        rows
    }
}

async fn apply(lake: &dyn Lakehouse, epoch: usize, call: &Applied) {
    let change = Scd2 {
        table: TABLE.into(),
        mark: mark(epoch),
        keys: vec!["k".into()],
        tracked: vec!["v".into()],
        effective: Effective::Date(date(call.day)),
        absent: call.absent,
        period: Period { from: "desde".into(), to: "hasta".into(), current: "actual".into() },
        query: Query { sql: select(&call.rows), inputs: vec![] },
    };
    lake.upsert_scd2(change).await.expect("a day is applied");
}

const ALL: &str = "k, v, desde, hasta, actual";

fn sound(rows: &[Vec<Option<String>>]) -> Result<(), TestCaseError> {
    let mut last: Option<&Vec<Option<String>>> = None;
    let mut open = BTreeSet::new();
    let mut sorted: Vec<_> = rows.iter().collect();
    sorted.sort_by_key(|r| (r[0].clone(), r[2].clone()));
    for row in sorted {
        prop_assert!(row[3].is_none() || row[2] < row[3], "an empty period: {:?}", row);
        prop_assert_eq!(row[4].as_deref() == Some("true"), row[3].is_none());
        if row[3].is_none() {
            prop_assert!(open.insert(row[0].clone()), "two current versions: {:?}", row);
        }
        if let Some(last) = last.filter(|l| l[0] == row[0]) {
            prop_assert!(last[3].is_some() && last[3] <= row[2], "periods overlap: {:?} {:?}", last, row);
            prop_assert!(last[3] < row[2] || last[1] != row[1], "two versions for one: {:?} {:?}", last, row);
        }
        last = Some(row);
    }
    Ok(())
}

fn call() -> impl Strategy<Value = Applied> {
    (0..6u64, any::<bool>(), arbitrary_rows(1)).prop_map(|(day, whole, rows)| Applied {
        day,
        absent: if whole { Absent::Ends } else { Absent::Goes },
        rows,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn a_dimension_is_a_step_function_of_time_in_whatever_order_days_come(calls in vec(call(), 1..8)) {
        on_a_runtime(async {
            let lake = lake();
            let mut steps = Steps::default();
            for (i, call) in calls.iter().enumerate() {
                apply(&lake, i + 1, call).await;
                steps.apply(call);
                let rows = read(&lake, ALL).await;
                sound(&rows)?;
                prop_assert_eq!(rows, steps.table(), "after call {}", i + 1);
            }
            Ok(())
        })?;
    }

    #[test]
    fn days_that_are_applied_again_change_nothing_and_a_backfill_is_as_if_applied_in_order(
        days in vec((any::<bool>(), arbitrary_rows(1)), 2..5),
        again in vec(0..5usize, 0..4),
        corrected in (0..5usize, arbitrary_rows(1)),
    ) {
        on_a_runtime(async {
            let days: Vec<Applied> = days.iter().enumerate().map(|(i, (whole, rows))| Applied {
                day: i as u64,
                absent: if *whole { Absent::Ends } else { Absent::Goes },
                rows: rows.clone(),
            }).collect();
            let lake = lake();
            let mut epoch = 0;
            for day in &days {
                epoch += 1;
                apply(&lake, epoch, day).await;
            }
            let first = read(&lake, ALL).await;
            for i in &again {
                epoch += 1;
                apply(&lake, epoch, &days[i % days.len()]).await;
                prop_assert_eq!(&read(&lake, ALL).await, &first, "day {} again", i % days.len());
            }
            // One day gets other rows; it and the later ones are applied again.
            let at = corrected.0 % days.len();
            let mut right = days.clone();
            right[at] = Applied { absent: Absent::Goes, rows: corrected.1, ..right[at].clone() };
            // A key that only the wrong rows had is out of reach for a part; the whole takes it away.
            right[at].absent = Absent::Ends;
            let fresh = crate::shop::lake();
            for (i, day) in right.iter().enumerate() {
                apply(&fresh, i + 1, day).await;
            }
            for day in &right[at..] {
                epoch += 1;
                apply(&lake, epoch, day).await;
            }
            prop_assert_eq!(read(&lake, ALL).await, read(&fresh, ALL).await);
            Ok(())
        })?;
    }
}
