//! What a `Lakehouse` promises beyond replacing a day.
//!
//! The suite gets an empty lakehouse; each promise has tables of its own.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use chrono::{NaiveDate, TimeDelta};
use simulacro_core::ports::{
    Absent, AddColumns, Append, AppendRows, Column, Commit, DayWrite, Disposition, EPOCH_MOVED, Effective, Input, Lakehouse,
    Mark, Optimize, Period, PortError, Query, Restore, Scd2, Upsert, VACUUM_HOURS_MIN, Vacuum,
};

use super::table_source::texts;

fn day(number: u32) -> NaiveDate {
    NaiveDate::from_ymd_opt(1997, 1, number).expect("a day")
}

fn mark(writer: &str, epoch: i64) -> Mark {
    Mark { writer: writer.into(), epoch }
}

fn of(sql: String) -> Query {
    Query { sql, inputs: Vec::new() }
}

/// Rows of literals. Literals are never null, and a table that is made from them would refuse nulls; the outer join forgets it.
fn values(values: &str, columns: &str) -> Query {
    of(format!("SELECT v.* FROM (VALUES (1)) AS o(one) LEFT JOIN (VALUES {values}) AS v({columns}) ON o.one = 1"))
}

async fn read(lake: &dyn Lakehouse, input: Input, columns: &str, order: &str) -> Result<Vec<String>, PortError> {
    let sql = format!("SELECT {columns} FROM t ORDER BY {order}");
    let batches = lake.query(&Query { sql, inputs: vec![("t".into(), input)] }).await?;
    let show = |cell: Option<String>| cell.unwrap_or_else(|| "null".into());
    Ok(texts(&batches).into_iter().map(|row| row.into_iter().map(show).collect::<Vec<_>>().join(" ")).collect())
}

async fn rows(lake: &dyn Lakehouse, table: &str, columns: &str, order: &str) -> Vec<String> {
    read(lake, Input::Delta(table.into()), columns, order).await.expect("the table is read")
}

fn refused<T: std::fmt::Debug>(result: Result<T, PortError>, words: &[&str]) {
    let error = result.expect_err("it is refused");
    let text = error.chain();
    assert_eq!(error.disposition, Disposition::Permanent, "{text}");
    for word in words {
        assert!(text.contains(word), "no {word} in: {text}");
    }
}

fn version(commit: Commit) -> u64 {
    match commit {
        Commit::New(version) => version,
        Commit::Already(version) => panic!("version {version} was there already"),
    }
}

/// Every promise in turn.
pub async fn check(lake: &dyn Lakehouse) {
    appended_rows_are_there_once(lake).await;
    a_writer_goes_on_exactly_where_it_stopped(lake).await;
    an_upsert_touches_only_rows_that_differ(lake).await;
    keys_must_be_unique_and_not_null(lake).await;
    versions_of_a_dimension_follow_its_changes(lake).await;
    a_key_that_is_gone_ends_or_goes_on(lake).await;
    an_instant_can_be_effective(lake).await;
    the_past_is_read_as_it_was(lake).await;
    a_restored_table_is_the_old_one(lake).await;
    other_columns_are_refused_and_named(lake).await;
    columns_are_added_only_by_request(lake).await;
    rewriting_files_changes_no_row(lake).await;
    vacuum_keeps_what_the_retention_needs(lake).await;
    a_missing_table_is_named(lake).await;
}

fn append(table: &str, epoch: i64, values: &str) -> Append {
    let query = self::values(values, "k, n");
    Append { table: table.into(), mark: mark("prueba", epoch), partition_by: Vec::new(), query }
}

async fn appended_rows_are_there_once(lake: &dyn Lakehouse) {
    let table = "conf/append";
    assert_eq!(lake.writer_epoch(table, "prueba").await.expect("the log is read"), None);
    assert_eq!(lake.append(append(table, 3, "('a', 1), ('b', 2)")).await.expect("a table is made"), Commit::New(0));
    assert_eq!(lake.append(append(table, 4, "('a', 1)")).await.expect("rows are added"), Commit::New(1));
    // The same epoch again, and a lower one, write nothing.
    for epoch in [4, 3, 1] {
        assert_eq!(lake.append(append(table, epoch, "('z', 9)")).await.expect("nothing is added"), Commit::Already(1));
    }
    // Another writer has epochs of its own.
    let other = Append { mark: mark("otro", 1), ..append(table, 0, "('c', 3)") };
    assert_eq!(lake.append(other).await.expect("rows are added"), Commit::New(2));
    assert_eq!(rows(lake, table, "k, n", "k, n").await, ["a 1", "a 1", "b 2", "c 3"]);
    assert_eq!(lake.writer_epoch(table, "prueba").await.expect("the log is read"), Some(4));
    assert_eq!(lake.writer_epoch(table, "otro").await.expect("the log is read"), Some(1));
    // Partitions are those of the call that made the table.
    let parts = |epoch| Append { partition_by: vec!["k".into()], ..append("conf/parts", epoch, "('a', 1), (NULL, 2)") };
    version(lake.append(parts(1)).await.expect("a table is made"));
    version(lake.append(Append { partition_by: Vec::new(), ..parts(2) }).await.expect("rows are added"));
    assert_eq!(rows(lake, "conf/parts", "k, n", "k, n").await, ["a 1", "a 1", "null 2", "null 2"]);
    let wrong = Append { partition_by: vec!["fecha".into()], ..append("conf/wrong", 1, "('a', 1)") };
    refused(lake.append(wrong).await, &["partition column fecha", "k, n"]);
}

async fn a_writer_goes_on_exactly_where_it_stopped(lake: &dyn Lakehouse) {
    let table = "conf/rows";
    let columns = |keys: &[&str]| -> Vec<(&'static str, ArrayRef, bool)> {
        vec![
            ("k", Arc::new(StringArray::from(keys.to_vec())), false),
            ("n", Arc::new(Int64Array::from(vec![None; keys.len()])), true),
        ]
    };
    let rows = |writer: &str, after: Option<i64>, epoch: i64, keys: &[&str]| AppendRows {
        table: table.into(),
        mark: mark(writer, epoch),
        after,
        partition_by: vec!["k".into()],
        batches: vec![RecordBatch::try_from_iter_with_nullable(columns(keys)).expect("a batch")],
    };
    let moved = |result: Result<Commit, PortError>| {
        let error = result.expect_err("it is refused");
        assert_eq!((error.code.as_deref(), error.disposition), (Some(EPOCH_MOVED), Disposition::Retryable), "{error}");
    };
    // Who has written before finds no table where he was.
    moved(lake.append_rows(rows("uno", Some(5), 10, &["a"])).await);
    version(lake.append_rows(rows("uno", None, 10, &["a", "b"])).await.expect("a table is made"));
    assert!(matches!(lake.append_rows(rows("uno", None, 10, &["a", "b"])).await, Ok(Commit::Already(_))));
    // In front of the position, behind it, and from nowhere: nothing is written.
    for after in [Some(9), Some(11), None] {
        moved(lake.append_rows(rows("uno", after, 20, &["x"])).await);
    }
    version(lake.append_rows(rows("uno", Some(10), 17, &["c"])).await.expect("rows are added"));
    // One who was overtaken: his rows reach further, and begin before what is there.
    moved(lake.append_rows(rows("uno", Some(10), 25, &["c", "d"])).await);
    assert!(matches!(lake.append_rows(rows("uno", Some(10), 12, &["c"])).await, Ok(Commit::Already(_))));
    // Without rows the position moves all the same.
    version(lake.append_rows(rows("uno", Some(17), 30, &[])).await.expect("the epoch is noted"));
    assert_eq!(lake.writer_epoch(table, "uno").await.expect("the log is read"), Some(30));
    version(lake.append_rows(rows("otro", None, 1, &["z"])).await.expect("another writer begins"));
    assert_eq!(self::rows(lake, table, "k, n", "k").await, ["a null", "b null", "c null", "z null"]);
    let nothing = AppendRows { batches: Vec::new(), ..rows("uno", Some(30), 31, &[]) };
    refused(lake.append_rows(nothing).await, &["found no batch"]);
    let wrong = RecordBatch::try_from_iter(columns(&["a"]).into_iter().take(1).map(|(name, array, _)| (name, array)));
    let wrong = AppendRows { batches: vec![wrong.expect("a batch")], ..rows("uno", Some(30), 31, &[]) };
    refused(lake.append_rows(wrong).await, &["column n: found none, expected int64"]);
}

fn upsert(table: &str, epoch: i64, values: &str) -> Upsert {
    Upsert {
        table: table.into(),
        mark: mark("prueba", epoch),
        keys: vec!["k".into()],
        ignored: vec!["loaded".into()],
        query: self::values(values, "k, n, loaded"),
    }
}

async fn an_upsert_touches_only_rows_that_differ(lake: &dyn Lakehouse) {
    let table = "conf/upsert";
    assert_eq!(lake.upsert(upsert(table, 1, "('a', 1, 10), ('b', 2, 10)")).await.expect("a table is made"), Commit::New(0));
    version(lake.upsert(upsert(table, 2, "('b', 3, 20), ('c', NULL, 20)")).await.expect("rows are merged"));
    assert_eq!(rows(lake, table, "k, n, loaded", "k").await, ["a 1 10", "b 3 20", "c null 20"]);
    assert!(matches!(lake.upsert(upsert(table, 2, "('a', 9, 9)")).await, Ok(Commit::Already(_))));
    // Nothing differs but what is ignored: the epoch is noted, and no file is written.
    version(lake.upsert(upsert(table, 3, "('b', 3, 30), ('c', NULL, 30), ('a', 1, 30)")).await.expect("nothing to merge"));
    let newest = &lake.versions(table, 1).await.expect("the log is read")[0];
    assert_eq!((newest.rows_written, newest.files_added, newest.files_removed), (Some(0), 0, 0), "{newest:?}");
    assert!(matches!(lake.upsert(upsert(table, 3, "('a', 9, 9)")).await, Ok(Commit::Already(_))));
    // From null and to null are changes.
    version(lake.upsert(upsert(table, 4, "('c', 4, 40), ('a', NULL, 40)")).await.expect("rows are merged"));
    assert_eq!(rows(lake, table, "k, n, loaded", "k").await, ["a null 40", "b 3 20", "c 4 40"]);
}

async fn keys_must_be_unique_and_not_null(lake: &dyn Lakehouse) {
    let table = "conf/keys";
    refused(lake.upsert(upsert(table, 1, "('a', 1, 1), ('a', 1, 1)")).await, &["key (k)", "(a) 2 times"]);
    assert!(!lake.exists(table).await.expect("the store answers"), "a refused write makes no table");
    version(lake.upsert(upsert(table, 1, "('a', 1, 1)")).await.expect("a table is made"));
    for (values, found) in [("('b', 1, 1), ('b', 2, 2)", "(b) 2 times"), ("('b', 1, 1), (NULL, 2, 2)", "(null) 1 times")] {
        refused(lake.upsert(upsert(table, 2, values)).await, &["key (k)", found]);
    }
    refused(lake.upsert(Upsert { keys: vec!["x".into()], ..upsert(table, 2, "('a', 1, 1)") }).await, &["key column x"]);
    refused(lake.upsert(Upsert { keys: vec![], ..upsert(table, 2, "('a', 1, 1)") }).await, &["no key column"]);
    assert_eq!(rows(lake, table, "k, n", "k").await, ["a 1"]);
    assert_eq!(lake.versions(table, 9).await.expect("the log is read").len(), 1);
}

fn scd2(table: &str, epoch: i64, effective: Effective, absent: Absent, values: &str) -> Scd2 {
    Scd2 {
        table: table.into(),
        mark: mark("prueba", epoch),
        keys: vec!["k".into()],
        tracked: vec!["v".into()],
        effective,
        absent,
        period: Period { from: "desde".into(), to: "hasta".into(), current: "actual".into() },
        query: self::values(values, "k, v, loaded"),
    }
}

async fn versions_of_a_dimension_follow_its_changes(lake: &dyn Lakehouse) {
    let table = "conf/dim";
    let on = |epoch, n, values: &str| scd2(table, epoch, Effective::Date(day(n)), Absent::Goes, values);
    let all = || rows(lake, table, "k, v, desde, hasta, actual, loaded", "k, desde");
    assert_eq!(lake.upsert_scd2(on(1, 1, "('a', 'x', 1), ('b', 'y', 1)")).await.expect("a table is made"), Commit::New(0));
    version(lake.upsert_scd2(on(2, 2, "('a', 'x', 2), ('b', 'z', 2), ('c', NULL, 2)")).await.expect("a day is applied"));
    let second = [
        "a x 1997-01-01 null true 1",
        "b y 1997-01-01 1997-01-02 false 1",
        "b z 1997-01-02 null true 2",
        "c null 1997-01-02 null true 2",
    ];
    assert_eq!(all().await, second);
    // The first day again, with its rows: nothing changes, and no file is written.
    version(lake.upsert_scd2(on(3, 1, "('a', 'x', 3), ('b', 'y', 3)")).await.expect("a day is applied again"));
    assert_eq!(all().await, second);
    assert_eq!(lake.versions(table, 1).await.expect("the log is read")[0].files_added, 0);
    assert!(matches!(lake.upsert_scd2(on(3, 3, "('a', 'w', 3)")).await, Ok(Commit::Already(_))));
    assert_eq!(all().await, second);
    // A correction of the second day joins what became equal; the day once more gives the table back.
    version(lake.upsert_scd2(on(4, 2, "('b', 'y', 4), ('c', 'n', 4)")).await.expect("a day is corrected"));
    let corrected = ["a x 1997-01-01 null true 1", "b y 1997-01-01 null true 1", "c n 1997-01-02 null true 4"];
    assert_eq!(all().await, corrected);
    version(lake.upsert_scd2(on(5, 2, "('b', 'z', 2), ('c', NULL, 2)")).await.expect("a day is corrected"));
    assert_eq!(all().await, second);
    // A time before the first version gives a key a past.
    let past = NaiveDate::from_ymd_opt(1996, 12, 31).expect("a day");
    version(
        lake.upsert_scd2(scd2(table, 6, Effective::Date(past), Absent::Goes, "('b', 'y', 6), ('c', 'm', 6)")).await.expect("ok"),
    );
    assert_eq!(
        all().await[1..],
        [
            "b y 1996-12-31 1997-01-02 false 6",
            "b z 1997-01-02 null true 2",
            "c m 1996-12-31 1997-01-02 false 6",
            "c null 1997-01-02 null true 2",
        ]
    );
    // Nothing of a refused call stays.
    let before = all().await;
    refused(lake.upsert_scd2(on(7, 3, "('a', 'x', 7), ('a', 'y', 7)")).await, &["key (k)", "(a) 2 times"]);
    refused(lake.upsert_scd2(Scd2 { tracked: vec![], ..on(7, 3, "('a', 'x', 7)") }).await, &["no tracked column"]);
    refused(
        lake.upsert_scd2(Scd2 { query: of("SELECT 'a' AS k, 'x' AS v".into()), ..on(7, 3, "('a', 'x', 7)") }).await,
        &["column loaded: found none, expected int64"],
    );
    let at = Effective::Time(day(3).and_hms_opt(0, 0, 0).expect("midnight").and_utc());
    refused(
        lake.upsert_scd2(scd2(table, 7, at, Absent::Goes, "('a', 'x', 7)")).await,
        &["column desde: found timestamp, expected date"],
    );
    assert_eq!(all().await, before);
}

async fn a_key_that_is_gone_ends_or_goes_on(lake: &dyn Lakehouse) {
    let table = "conf/gone";
    let on = |epoch, n, absent, values: &str| scd2(table, epoch, Effective::Date(day(n)), absent, values);
    let all = || rows(lake, table, "k, v, desde, hasta, actual", "k, desde");
    version(lake.upsert_scd2(on(1, 1, Absent::Ends, "('a', 'x', 1), ('b', 'y', 1)")).await.expect("a table is made"));
    version(lake.upsert_scd2(on(2, 3, Absent::Goes, "('b', 'y', 1)")).await.expect("a part is applied"));
    assert_eq!(all().await, ["a x 1997-01-01 null true", "b y 1997-01-01 null true"]);
    version(lake.upsert_scd2(on(3, 3, Absent::Ends, "('b', 'y', 1)")).await.expect("the whole is applied"));
    assert_eq!(all().await, ["a x 1997-01-01 1997-01-03 false", "b y 1997-01-01 null true"]);
    // It comes back later: its history has a gap. Had it never been away, there is none.
    version(lake.upsert_scd2(on(4, 5, Absent::Ends, "('a', 'x', 1), ('b', 'y', 1)")).await.expect("the whole is applied"));
    assert_eq!(all().await, ["a x 1997-01-01 1997-01-03 false", "a x 1997-01-05 null true", "b y 1997-01-01 null true"]);
    version(lake.upsert_scd2(on(5, 3, Absent::Ends, "('a', 'x', 1), ('b', 'y', 1)")).await.expect("a day is corrected"));
    assert_eq!(all().await, ["a x 1997-01-01 null true", "b y 1997-01-01 null true"]);
    // A day on which it should not have been there at all.
    version(lake.upsert_scd2(on(6, 1, Absent::Ends, "('b', 'y', 1)")).await.expect("a day is corrected"));
    assert_eq!(all().await, ["b y 1997-01-01 null true"]);
    refused(
        lake.upsert_scd2(Scd2 {
            query: of("SELECT * FROM (VALUES ('a', 'x', 1)) AS v(k, v, loaded) WHERE k = 'z'".into()),
            ..on(7, 6, Absent::Ends, "('a', 'x', 1)")
        })
        .await,
        &["found no rows", "whole dimension"],
    );
    assert_eq!(all().await, ["b y 1997-01-01 null true"]);
}

async fn an_instant_can_be_effective(lake: &dyn Lakehouse) {
    let table = "conf/instants";
    let at = |n| Effective::Time(day(1).and_hms_micro_opt(6, 0, 0, n).expect("a time").and_utc());
    version(lake.upsert_scd2(scd2(table, 1, at(1), Absent::Goes, "('a', 'x', 1)")).await.expect("a table is made"));
    version(lake.upsert_scd2(scd2(table, 2, at(2), Absent::Goes, "('a', 'y', 1)")).await.expect("a time is applied"));
    assert_eq!(
        rows(lake, table, "v, desde, hasta, actual", "desde").await,
        ["x 1997-01-01T06:00:00.000001Z 1997-01-01T06:00:00.000002Z false", "y 1997-01-01T06:00:00.000002Z null true",]
    );
}

async fn the_past_is_read_as_it_was(lake: &dyn Lakehouse) {
    let table = "conf/past";
    let mut then = Vec::new();
    for epoch in 1..=4 {
        let write = upsert(table, epoch, &format!("('a', {epoch}, 0), ('k{epoch}', 7, 0)"));
        let version = version(lake.upsert(write).await.expect("rows are merged"));
        then.push((version, rows(lake, table, "*", "k").await));
    }
    for (version, expected) in &then {
        let input = Input::DeltaVersion { table: table.into(), version: *version };
        assert_eq!(&read(lake, input, "*", "k").await.expect("the version is read"), expected, "version {version}");
    }
    let told = lake.versions(table, 10).await.expect("the log is read");
    assert_eq!(told.iter().map(|v| v.version).collect::<Vec<_>>(), [3, 2, 1, 0]);
    assert_eq!(lake.versions(table, 2).await.expect("the log is read"), told[..2]);
    assert_eq!((told[3].operation.as_str(), told[3].rows_written, told[0].operation.as_str()), ("WRITE", Some(2), "MERGE"));
    // A time means the newest version that is not after it; two commits can fall into one millisecond.
    for v in &told {
        let newest = told.iter().filter(|o| o.at <= v.at).map(|o| o.version).max().expect("itself");
        for at in [v.at, v.at + TimeDelta::microseconds(999)] {
            let input = Input::DeltaTime { table: table.into(), at };
            assert_eq!(read(lake, input, "*", "k").await.expect("the time is read"), then[newest as usize].1, "{at}");
        }
    }
    // The past and the present in one query.
    let inputs = vec![
        ("old".to_owned(), Input::DeltaVersion { table: table.into(), version: 0 }),
        ("new".to_owned(), Input::Delta(table.into())),
    ];
    let sql = "SELECT (SELECT count(*) FROM old) AS o, (SELECT count(*) FROM new) AS n".to_owned();
    assert_eq!(texts(&lake.query(&Query { sql, inputs }).await.expect("both are read")), [[Some("2".into()), Some("5".into())]]);
    refused(
        read(lake, Input::DeltaVersion { table: table.into(), version: 9 }, "*", "k").await,
        &["conf/past at version 9", "0 to 3"],
    );
    let early = told[3].at - TimeDelta::milliseconds(1);
    refused(
        read(lake, Input::DeltaTime { table: table.into(), at: early }, "*", "k").await,
        &["found nothing that old", "version 0"],
    );
}

async fn a_restored_table_is_the_old_one(lake: &dyn Lakehouse) {
    let table = "conf/restore";
    version(lake.upsert(upsert(table, 1, "('a', 1, 0), ('b', 2, 0)")).await.expect("a table is made"));
    let old = rows(lake, table, "*", "k").await;
    version(lake.upsert(upsert(table, 2, "('a', 5, 0), ('c', 2, 0)")).await.expect("rows are merged"));
    let extra = vec![Column { name: "extra".into(), physical_type: "string".into() }];
    version(lake.add_columns(AddColumns { table: table.into(), mark: mark("prueba", 3), columns: extra }).await.expect("added"));
    let new = rows(lake, table, "*", "k").await;
    let back = |epoch, version| Restore { table: table.into(), mark: mark("manual", epoch), version };
    assert_eq!(lake.restore(back(1, 0)).await.expect("restored"), Commit::New(3));
    assert_eq!(rows(lake, table, "*", "k").await, old);
    assert_eq!(lake.restore(back(1, 1)).await.expect("nothing happens"), Commit::Already(3));
    assert_eq!(rows(lake, table, "*", "k").await, old);
    // What was restored away is a version like any other.
    assert_eq!(lake.restore(back(2, 2)).await.expect("restored"), Commit::New(4));
    assert_eq!(rows(lake, table, "*", "k").await, new);
    assert_eq!(lake.restore(back(3, 4)).await.expect("the newest is itself"), Commit::New(5));
    assert_eq!(rows(lake, table, "*", "k").await, new);
    refused(lake.restore(back(4, 9)).await, &["version 9", "0 to 5"]);
    // Epochs are not put back.
    assert!(matches!(lake.upsert(upsert(table, 2, "('z', 1, 0)")).await, Ok(Commit::Already(_))));
}

async fn other_columns_are_refused_and_named(lake: &dyn Lakehouse) {
    let table = "conf/schema";
    let write = |epoch, select: &str| DayWrite { table: table.into(), fecha: day(1), epoch, query: of(select.to_owned()) };
    let good = "SELECT not_null(k, 'k') AS k, CAST(m AS DECIMAL(10,2)) AS m, DATE '1997-01-01' AS fecha FROM (VALUES ('a', 1)) AS v(k, m)";
    version(lake.overwrite_day(write(1, good)).await.expect("a table is made"));
    let before = rows(lake, table, "*", "k").await;
    for (select, words) in [
        ("SELECT 'a' AS k, DATE '1997-01-01' AS fecha", &["column m: found none, expected decimal(10,2)"][..]),
        (
            "SELECT 'a' AS k, CAST(1 AS DECIMAL(10,2)) AS m, 1.5 AS x, DATE '1997-01-01' AS fecha",
            &["column x: found float64, expected none"],
        ),
        (
            "SELECT 'a' AS k, CAST(1 AS DECIMAL(12,2)) AS m, DATE '1997-01-01' AS fecha",
            &["m: found decimal(12,2), expected decimal(10,2)"],
        ),
        (
            "SELECT 'a' AS k, CAST(1 AS DECIMAL(9,2)) AS m, DATE '1997-01-01' AS fecha",
            &["m: found decimal(9,2), expected decimal(10,2)"],
        ),
        ("SELECT 1 AS k, '1.00' AS m, DATE '1997-01-01' AS fecha", &["k: found int64, expected string", "m: found string"]),
        // A renamed column is one that is missing and one that is extra.
        (
            "SELECT 'a' AS clave, CAST(1 AS DECIMAL(10,2)) AS m, DATE '1997-01-01' AS fecha",
            &["column k: found none", "column clave: found string"],
        ),
        // Newly nullable: a null where the table never has one.
        (
            "SELECT k, CAST(1 AS DECIMAL(10,2)) AS m, DATE '1997-01-01' AS fecha FROM (VALUES ('b'), (NULL)) AS v(k)",
            &["column k: found 1 nulls in 2 rows, expected none"],
        ),
    ] {
        refused(lake.overwrite_day(write(2, select)).await, words);
    }
    assert_eq!(rows(lake, table, "*", "k").await, before);
    assert_eq!(lake.versions(table, 9).await.expect("the log is read").len(), 1);
    // The same for an append and an upsert; nullable in name only, and in another order, is no difference.
    let bad = of("SELECT 'a' AS k, 1 AS m, DATE '1997-01-01' AS fecha".into());
    let add = Append { table: table.into(), mark: mark("prueba", 1), partition_by: vec![], query: bad.clone() };
    refused(lake.append(add).await, &["column m: found int64, expected decimal(10,2)"]);
    let merge = Upsert { table: table.into(), mark: mark("prueba", 1), keys: vec!["k".into()], ignored: vec![], query: bad };
    refused(lake.upsert(merge).await, &["column m: found int64, expected decimal(10,2)"]);
    let turned = "SELECT DATE '1997-01-01' AS fecha, CAST(2 AS DECIMAL(10,2)) AS m, k FROM (VALUES ('b')) AS v(k)";
    version(lake.overwrite_day(write(2, turned)).await.expect("the day is replaced"));
    assert_eq!(rows(lake, table, "k, m", "k").await, ["b 2.00"]);
    // A null is refused when the table is made, too.
    let fresh = "SELECT not_null(k, 'k') AS k, DATE '1997-01-01' AS fecha FROM (VALUES ('b'), (NULL)) AS v(k)";
    refused(lake.overwrite_day(DayWrite { table: "conf/fresh".into(), ..write(1, fresh) }).await, &["column k: found 1 nulls"]);
    assert!(!lake.exists("conf/fresh").await.expect("the store answers"));
}

async fn columns_are_added_only_by_request(lake: &dyn Lakehouse) {
    let table = "conf/evolve";
    version(lake.append(append(table, 1, "('a', 1)")).await.expect("a table is made"));
    let add = |epoch, columns: &[(&str, &str)]| AddColumns {
        table: table.into(),
        mark: mark("cambio", epoch),
        columns: columns.iter().map(|(n, t)| Column { name: (*n).into(), physical_type: (*t).into() }).collect(),
    };
    assert_eq!(lake.add_columns(add(1, &[("pais", "string"), ("neto", "decimal(10,2)")])).await.expect("added"), Commit::New(1));
    assert_eq!(lake.add_columns(add(1, &[("otra", "string")])).await.expect("nothing happens"), Commit::Already(1));
    assert_eq!(rows(lake, table, "*", "k").await, ["a 1 null null"]);
    // What is there with the same type is left alone; with another type it is refused.
    assert_eq!(lake.add_columns(add(2, &[("pais", "string"), ("alta", "date")])).await.expect("added"), Commit::New(2));
    assert_eq!(lake.add_columns(add(3, &[("pais", "string")])).await.expect("noted"), Commit::New(3));
    refused(lake.add_columns(add(4, &[("pais", "int64")])).await, &["add column pais", "string", "int64"]);
    refused(lake.add_columns(add(4, &[("peso", "kilos")])).await, &["add column peso", "kilos"]);
    refused(lake.append(append(table, 2, "('b', 2)")).await, &["column pais: found none, expected string"]);
    let full = "SELECT 'b' AS k, 2 AS n, 'ES' AS pais, CAST(3 AS DECIMAL(10,2)) AS neto, DATE '1997-01-01' AS alta";
    version(lake.append(Append { query: of(full.into()), ..append(table, 2, "") }).await.expect("rows are added"));
    assert_eq!(rows(lake, table, "*", "k").await, ["a 1 null null null", "b 2 ES 3.00 1997-01-01"]);
}

/// A table of three days with two files each.
async fn three_days(lake: &dyn Lakehouse, table: &str) {
    let mut epoch = 0;
    for part in 0..2 {
        for n in 1..=3 {
            epoch += 1;
            let query = of(format!(
                "SELECT k, CASE WHEN k % 2 = 0 THEN 'norte' ELSE 'sur' END AS region, DATE '{}' AS fecha
                 FROM (VALUES ({}), ({}), ({})) AS v(k)",
                day(n),
                part * 3 + 2,
                part * 3 + 3,
                part * 3 + 1
            ));
            let partition_by = vec!["fecha".into()];
            let add = Append { table: table.into(), mark: mark("prueba", epoch), partition_by, query };
            version(lake.append(add).await.expect("rows are added"));
        }
    }
}

async fn rewriting_files_changes_no_row(lake: &dyn Lakehouse) {
    let table = "conf/optimize";
    three_days(lake, table).await;
    let before = rows(lake, table, "*", "fecha, k").await;
    let joined = Optimize { table: table.into(), z_order: vec![], target_bytes: 100 << 20 };
    let done = lake.optimize(joined.clone()).await.expect("files are joined");
    assert_eq!((done.files_added, done.files_removed), (3, 6));
    assert_eq!(rows(lake, table, "*", "fecha, k").await, before);
    // Again there is nothing to do.
    let again = lake.optimize(joined.clone()).await.expect("nothing to do");
    assert_eq!((again.files_added, again.files_removed, again.version), (0, 0, done.version));
    let ordered = Optimize { z_order: vec!["region".into()], ..joined.clone() };
    let done = lake.optimize(ordered.clone()).await.expect("files are ordered");
    assert_eq!((done.files_added, done.files_removed), (3, 3));
    assert_eq!(rows(lake, table, "*", "fecha, k").await, before);
    assert_eq!(lake.optimize(ordered.clone()).await.expect("nothing to do").files_added, 0);
    // Only the day that was written since is rewritten.
    let query = of(format!("SELECT k, 'este' AS region, DATE '{}' AS fecha FROM (VALUES (1)) AS v(k)", day(2)));
    version(lake.overwrite_day(DayWrite { table: table.into(), fecha: day(2), epoch: 1, query }).await.expect("replaced"));
    let done = lake.optimize(ordered.clone()).await.expect("a day is ordered");
    assert_eq!((done.files_added, done.files_removed), (1, 1));
    let newest = &lake.versions(table, 1).await.expect("the log is read")[0];
    assert_eq!((newest.operation.as_str(), newest.version), ("OPTIMIZE", done.version));
    for (wrong, words) in [("fecha", "not partitioned"), ("regio", "k, region, fecha")] {
        refused(lake.optimize(Optimize { z_order: vec![wrong.into()], ..joined.clone() }).await, &[wrong, words]);
    }
    refused(lake.optimize(Optimize { target_bytes: 0, ..joined }).await, &["file size of 0"]);
}

async fn vacuum_keeps_what_the_retention_needs(lake: &dyn Lakehouse) {
    let table = "conf/vacuum";
    three_days(lake, table).await;
    let joined = Optimize { table: table.into(), z_order: vec![], target_bytes: 100 << 20 };
    lake.optimize(joined).await.expect("files are joined");
    let present = rows(lake, table, "*", "fecha, k").await;
    let told = lake.versions(table, 100).await.expect("the log is read");
    let newest = &told[0];
    // Each day is rewritten in a version of its own.
    let replaced = told.iter().rposition(|v| v.operation == "OPTIMIZE").expect("files were joined");
    let (first, written) = (&told[replaced], &told[replaced + 1]);
    let at =
        |now, hours, dry_run| Vacuum { table: table.into(), now, retention_hours: hours, allow_short_retention: false, dry_run };
    let before = Input::DeltaVersion { table: table.into(), version: written.version };
    let old = read(lake, before.clone(), "*", "fecha, k").await.expect("the version is read");

    // Within the retention nothing goes, also when the clock stands at its last moment.
    let last = first.at + TimeDelta::hours(168) - TimeDelta::milliseconds(1);
    assert_eq!(lake.vacuum(at(last, 168, false)).await.expect("nothing to remove"), Vec::<String>::new());
    assert_eq!(read(lake, before.clone(), "*", "fecha, k").await.expect("the version is read"), old);
    for hours in [0, VACUUM_HOURS_MIN - 1] {
        refused(lake.vacuum(at(last, hours, false)).await, &["168 h", "allow_short_retention"]);
    }
    // After it the files that were joined go; saying so removes nothing.
    let later = newest.at + TimeDelta::hours(169);
    let listed = lake.vacuum(at(later, 168, true)).await.expect("files are listed");
    assert_eq!(listed.len(), 6, "{listed:?}");
    assert_eq!(read(lake, before.clone(), "*", "fecha, k").await.expect("the version is read"), old);
    assert_eq!(lake.vacuum(at(later, 168, false)).await.expect("files are removed"), listed);
    assert_eq!(rows(lake, table, "*", "fecha, k").await, present);
    assert_eq!(lake.vacuum(at(later, 168, false)).await.expect("nothing to remove"), Vec::<String>::new());
    // A version whose files are gone says which are not.
    let newest_now = lake.versions(table, 1).await.expect("the log is read")[0].version;
    let whole = format!("{} to {newest_now}", newest.version);
    refused(read(lake, before, "*", "fecha, k").await, &["files are gone", &whole]);
    refused(lake.restore(Restore { table: table.into(), mark: mark("manual", 1), version: written.version }).await, &[&whole]);
    // A retention below the limit needs the word.
    let short = Vacuum { allow_short_retention: true, ..at(later, 0, true) };
    lake.vacuum(short).await.expect("it was asked for");
}

async fn a_missing_table_is_named(lake: &dyn Lakehouse) {
    let table = "conf/nadie".to_owned();
    let now = day(1).and_hms_opt(0, 0, 0).expect("midnight").and_utc();
    refused(lake.versions(&table, 1).await, &["conf/nadie", "no such table"]);
    refused(
        lake.restore(Restore { table: table.clone(), mark: mark("m", 1), version: 0 }).await,
        &["conf/nadie", "no such table"],
    );
    let columns = vec![Column { name: "a".into(), physical_type: "string".into() }];
    refused(
        lake.add_columns(AddColumns { table: table.clone(), mark: mark("m", 1), columns }).await,
        &["conf/nadie", "no such table"],
    );
    refused(lake.optimize(Optimize { table: table.clone(), z_order: vec![], target_bytes: 1 }).await, &["conf/nadie"]);
    let vacuum = Vacuum { table: table.clone(), now, retention_hours: 168, allow_short_retention: false, dry_run: false };
    refused(lake.vacuum(vacuum).await, &["conf/nadie"]);
    refused(read(lake, Input::DeltaVersion { table: table.clone(), version: 0 }, "*", "1").await, &["conf/nadie"]);
    refused(read(lake, Input::DeltaTime { table, at: now }, "*", "1").await, &["conf/nadie"]);
}
