//! The PostgreSQL adapters against a real server: the promises of their ports, real purchases, and real errors.
#![expect(clippy::disallowed_methods, reason = "a test drives a real server, and measures it")]

use std::{
    collections::BTreeMap,
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use arrow::{
    array::{
        ArrayRef, AsArray, BooleanArray, Date32Array, Decimal128Array, Float64Array, Int16Array, Int32Array, Int64Array,
        RecordBatch, StringArray, TimestampMicrosecondArray,
    },
    compute::concat_batches,
};
use chrono::NaiveDate;
use futures::{StreamExt, TryStreamExt};
use simulacro_adapters::{
    CopyReader, NaiveTimestamps, PostgresLedger, PostgresServer, PostgresSource, PostgresSourceConfig, PostgresWarehouse,
};
use simulacro_core::ports::{Column, Commit, Disposition, PortError, RunLedger, TableSource, Warehouse};
use simulacro_lakehouse::copy::CopyLimits;
use simulacro_shop::cdnow;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    conformance::{
        self,
        table_source::{columns, texts},
    },
    services::postgres::Postgres,
};

const VENTAS: &str = "(order_id text, user_id varchar(40), product_id text, monto numeric(10,2), descuento numeric(10,2), \
                      region text, timestamp_venta timestamptz, fecha date)";

fn config(connections: usize, range_rows: usize) -> PostgresSourceConfig {
    let number = |n| NonZeroUsize::new(n).expect("above zero");
    PostgresSourceConfig {
        connections: number(connections),
        range_rows: number(range_rows),
        queued_batches: number(8),
        reader: CopyReader::InPlace,
        naive_timestamps: NaiveTimestamps::Utc,
        limits: CopyLimits::STANDARD,
    }
}

fn source(server: &PostgresServer) -> PostgresSource {
    PostgresSource::new(server.clone(), config(2, 10_000))
}

fn day(text: &str) -> NaiveDate {
    text.parse().expect("a day")
}

async fn read(source: &dyn TableSource, table: &str, fecha: &str, columns: &[Column]) -> Result<Vec<RecordBatch>, PortError> {
    let read = source.read_day(table, day(fecha), columns).await?;
    let batches: Vec<RecordBatch> = read.batches.try_collect().await?;
    assert_eq!(read.expected_rows, batches.iter().map(|b| b.num_rows() as u64).sum::<u64>());
    Ok(batches)
}

/// Waits until something is so, for at most ten seconds.
async fn eventually<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    for _ in 0..100 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("not within ten seconds: {what}");
}

/// Sessions of the adapters that work on a schema, or hold a lock.
async fn sessions(postgres: &Postgres, schema: &str) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
    let mut connection = postgres.connect().await;
    sqlx::query_scalar(sql).bind(schema).fetch_one(&mut connection).await.expect("the server answers")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_keeps_its_promises() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("fuente").await;
    postgres.execute(&format!("CREATE TABLE fuente.ventas {VENTAS}")).await;
    postgres.copy_csv("fuente.ventas", conformance::table_source::VENTAS).await;
    for (reader, connections, range_rows) in
        [(CopyReader::InPlace, 1, 1_000), (CopyReader::InPlace, 3, 1), (CopyReader::Driver, 1, 1_000), (CopyReader::Driver, 3, 1)]
    {
        let config = PostgresSourceConfig { reader, ..config(connections, range_rows) };
        conformance::table_source::check(&PostgresSource::new(server.clone(), config)).await;
    }
    // A view, a partitioned table and a naive timestamp are read alike.
    postgres
        .execute(&format!(
            "CREATE SCHEMA IF NOT EXISTS fuente_vista; CREATE SCHEMA IF NOT EXISTS fuente_partes; \
             DROP VIEW IF EXISTS fuente_vista.ventas; CREATE VIEW fuente_vista.ventas AS SELECT * FROM fuente.ventas; \
             DROP TABLE IF EXISTS fuente_partes.ventas; \
             CREATE TABLE fuente_partes.ventas {} PARTITION BY RANGE (fecha); \
             CREATE TABLE fuente_partes.ventas_1 PARTITION OF fuente_partes.ventas FOR VALUES FROM ('1997-01-01') TO ('1997-01-02'); \
             CREATE TABLE fuente_partes.ventas_2 PARTITION OF fuente_partes.ventas DEFAULT; \
             INSERT INTO fuente_partes.ventas SELECT * FROM fuente.ventas",
            VENTAS.replace("timestamptz", "timestamp")
        ))
        .await;
    for schema in ["fuente_vista", "fuente_partes"] {
        let server = PostgresServer { schema: schema.into(), ..server.clone() };
        conformance::table_source::check(&source(&server)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ledger_keeps_its_promises() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("libro").await;
    conformance::ledger::check(|| async { PostgresLedger::open(server.clone()).await.expect("the ledger opens") }).await;
    let open = || async { PostgresLedger::open(server.clone()).await.expect("the ledger opens") };
    conformance::ledger::an_old_end_does_not_free_the_present_run(&open().await, &open().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warehouse_keeps_its_promises() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("almacen").await;
    postgres.execute("DROP SCHEMA IF EXISTS analytics CASCADE").await;
    let warehouse = PostgresWarehouse::open(server, 1 << 20).await.expect("the warehouse opens");
    conformance::warehouse::check(&warehouse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_days_of_real_purchases_equal_the_file() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("compras").await;
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    postgres.execute(&format!("CREATE TABLE compras.ventas {VENTAS}")).await;
    postgres.copy_csv("compras.ventas", &cdnow::to_csv(&purchases)).await;
    let source = source(&server);
    assert_eq!(source.columns("ventas").await.expect("the table is there"), columns());
    let mut rows = 0;
    for fecha in ["1997-01-01", "1997-03-14", "1998-06-30"] {
        let got = texts(&read(&source, "ventas", fecha, &columns()).await.expect("the day is read"));
        let of_day = purchases.iter().filter(|p| p.fecha == day(fecha));
        let want: Vec<Vec<Option<String>>> = of_day
            .map(|p| {
                let monto = format!("{}.{:02}", p.monto_cents / 100, p.monto_cents % 100);
                let time = format!("{fecha}T00:00:00.000000Z");
                [&p.order_id, &p.user_id, &p.product_id, &monto, "0.00", p.region, &time, fecha]
                    .map(|v| Some(v.to_owned()))
                    .to_vec()
            })
            .collect();
        assert!(!want.is_empty());
        rows += want.len();
        assert_eq!(got, want);
    }
    println!("{rows} rows of three days are equal");
}

/// Numbers that look random and are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly from the range, and now and then an end of it.
    fn within(&mut self, least: i128, most: i128) -> i128 {
        let wide = i128::from(self.next()) << 64 | i128::from(self.next());
        match self.next() % 16 {
            0 => least,
            1 => most,
            2 => 0_i128.clamp(least, most),
            // Small numbers are as common as large ones.
            n => (wide >> (n * 8).min(120)).rem_euclid(most.saturating_sub(least).saturating_add(1)).saturating_add(least),
        }
    }

    /// A value, or null one time in eight.
    fn maybe<T>(&mut self, value: impl FnOnce(&mut Self) -> T) -> Option<T> {
        if self.next().is_multiple_of(8) { None } else { Some(value(self)) }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_every_type_go_to_the_server_and_come_back() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("tipos").await;
    let mut numbers = Numbers(1_997);
    let rows = 3_000;
    let bound = 10_i128.pow(38) - 1;
    let mut texts_sent = Vec::new();
    for _ in 0..rows {
        texts_sent.push(numbers.maybe(|n| {
            let length = n.next() % 20;
            (0..length)
                .map(|_| char::from_u32((n.next() % 0x3000) as u32).filter(|c| *c != '\0').unwrap_or('🦤'))
                .collect::<String>()
        }));
    }
    let mut column =
        |least: i128, most: i128| -> Vec<Option<i128>> { (0..rows).map(|_| numbers.maybe(|n| n.within(least, most))).collect() };
    let int = |values: Vec<Option<i128>>| values.into_iter().map(|v| v.map(|v| v as i64));
    let decimal = |values: Vec<Option<i128>>, precision, scale| {
        Arc::new(Decimal128Array::from(values).with_precision_and_scale(precision, scale).expect("in range")) as ArrayRef
    };
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("fecha", Arc::new(Date32Array::from(vec![9_862; rows]))),
        ("n", Arc::new(Int32Array::from_iter_values(0..rows as i32))),
        ("texto", Arc::new(StringArray::from(texts_sent))),
        ("pequeno", Arc::new(int(column(i16::MIN.into(), i16::MAX.into())).map(|v| v.map(|v| v as i16)).collect::<Int16Array>())),
        ("grande", Arc::new(int(column(i64::MIN.into(), i64::MAX.into())).collect::<Int64Array>())),
        ("activo", Arc::new(int(column(0, 1)).map(|v| v.map(|v| v == 1)).collect::<BooleanArray>())),
        (
            "tasa",
            Arc::new(int(column(i64::MIN.into(), i64::MAX.into())).map(|v| v.map(|v| v as f64 / 3e5)).collect::<Float64Array>()),
        ),
        ("monto", decimal(column(-9_999_999_999, 9_999_999_999), 10, 2)),
        ("enorme", decimal(column(-bound, bound), 38, 6)),
        ("fraccion", decimal(column(-bound, bound), 38, 37)),
        ("entero", decimal(column(-bound, bound), 38, 0)),
        // 4713 BC to 9999, in days and in microseconds.
        ("dia", Arc::new(int(column(-2_440_588, 2_932_896)).map(|v| v.map(|v| v as i32)).collect::<Date32Array>())),
        (
            "momento",
            Arc::new(
                int(column(-210_866_803_200_000_000, 253_402_300_799_999_999))
                    .collect::<TimestampMicrosecondArray>()
                    .with_timezone("UTC"),
            ),
        ),
    ];
    let sent = RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).expect("a batch");
    let warehouse = PostgresWarehouse::open(server.clone(), 1 << 24).await.expect("the warehouse opens");
    warehouse.load_day("todos", day("1997-01-01"), 1, vec![sent.clone()]).await.expect("loaded");

    let source = source(&server);
    let asked = source.columns("todos").await.expect("the table is there");
    let got = read(&source, "todos", "1997-01-01", &asked).await.expect("the day is read");
    assert!(concat_batches(&sent.schema(), &got).expect("one schema") == sent, "the rows differ");

    // What the server itself thinks that it has been given.
    let sql = "SELECT texto, monto::text, enorme::text, fraccion::text, entero::text, \
               CASE WHEN dia >= '0001-01-01' THEN to_char(dia, 'YYYY-MM-DD') END, \
               CASE WHEN momento >= '0001-01-01Z' THEN to_char(momento AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"') END, \
               grande::text FROM todos ORDER BY n";
    let theirs = texts(&warehouse.query(sql, &["todos"]).await.expect("read"));
    let mut compared = 0;
    for (theirs, ours) in theirs.into_iter().zip(texts(&[sent])) {
        for (at, own) in [(0, 2), (1, 7), (2, 8), (3, 9), (4, 10), (5, 11), (6, 12), (7, 4)] {
            // Years before 1 are written in another way, and are left out.
            if theirs[at].is_some() || at < 5 {
                assert_eq!(theirs[at], ours[own]);
                compared += 1;
            }
        }
    }
    println!("{compared} values are equal to the server's own text");
}

/// A table of many rows of one day, among rows of another, some of which are dead.
async fn many_rows(postgres: &Postgres, schema: &str, rows: u32) -> PostgresServer {
    let server = postgres.server(schema).await;
    postgres
        .execute(&format!(
            "CREATE TABLE {schema}.ventas (order_id bigint, monto numeric(10,2), region text, fecha date); \
             INSERT INTO {schema}.ventas SELECT g, g::numeric / 100, repeat('r', g % 40), DATE '1997-01-01' + (g % 3 = 0)::int \
             FROM generate_series(1, {rows}) g; \
             DELETE FROM {schema}.ventas WHERE order_id % 17 = 0; CREATE INDEX ON {schema}.ventas (fecha, region); \
             ANALYZE {schema}.ventas"
        ))
        .await;
    server
}

fn many_columns() -> Vec<Column> {
    let column = |name: &str, physical_type: &str| Column { name: name.into(), physical_type: physical_type.into() };
    vec![column("order_id", "int64"), column("monto", "decimal(10,2)"), column("region", "string"), column("fecha", "date")]
}

#[tokio::test(flavor = "multi_thread")]
async fn the_number_of_connections_changes_no_batch() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = many_rows(postgres, "muchas", 60_000).await;
    let mut seen = Vec::new();
    let readers = [CopyReader::InPlace, CopyReader::Driver];
    for (turn, (connections, range_rows)) in
        [(1, 1_000_000), (1, 3_000), (2, 10_000), (5, 1_000), (5, 700)].into_iter().enumerate()
    {
        let config = PostgresSourceConfig { reader: readers[turn % 2], ..config(connections, range_rows) };
        let source = PostgresSource::new(server.clone(), config);
        seen.push(read(&source, "ventas", "1997-01-01", &many_columns()).await.expect("the day is read"));
    }
    let sizes: Vec<usize> = seen[0].iter().map(RecordBatch::num_rows).collect();
    let (last, full) = sizes.split_last().expect("batches");
    assert!(full.iter().all(|rows| *rows == 8_192) && *last <= 8_192, "{sizes:?}");
    // They come as they lie, although an index has another order.
    let sql = "SELECT order_id FROM muchas.ventas WHERE fecha = DATE '1997-01-01' ORDER BY ctid";
    let lying: Vec<i64> = sqlx::query_scalar(sql).fetch_all(&mut postgres.connect().await).await.expect("the server answers");
    let ids = seen[0].iter().flat_map(|b| b.column(0).as_primitive::<arrow::datatypes::Int64Type>().values().to_vec());
    assert!(ids.eq(lying), "the order differs");
    for other in &seen[1..] {
        assert!(&seen[0] == other, "the batches differ");
    }
}

/// Blocks of these tables that sessions which have ended have touched so far, in memory or on disk.
async fn touched(postgres: &Postgres, schema: &str, like: &str) -> i64 {
    let sql = "SELECT coalesce(sum(heap_blks_read + heap_blks_hit), 0)::int8 FROM pg_statio_user_tables WHERE schemaname = $1 AND relname LIKE $2";
    let mut connection = postgres.connect().await;
    sqlx::query_scalar(sql).bind(schema).bind(like).fetch_one(&mut connection).await.expect("the server answers")
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_of_a_day_touch_its_blocks_once_and_no_other_day() {
    let Some(postgres) = Postgres::shared().await else { return };
    let mut server = postgres.server("bloques").await;
    server.options = server.options.application_name("bloques");
    let rows = "SELECT d * 20000 + g, g::numeric / 100, repeat('r', g % 40), DATE '1997-01-01' + d FROM generate_series(0, 6) d, generate_series(1, 20000) g";
    let columns = "(order_id bigint, monto numeric(10,2), region text, fecha date)";
    let partitions: String = (1..=7)
        .map(|d| {
            format!(
                "CREATE TABLE bloques.partes_{d} PARTITION OF bloques.partes FOR VALUES FROM ('1997-01-0{d}') TO ('1997-01-0{}') \
                 WITH (autovacuum_enabled = off); ",
                d + 1
            )
        })
        .collect();
    postgres
        .execute(&format!(
            "CREATE TABLE bloques.junta {columns}; INSERT INTO bloques.junta {rows}; CREATE INDEX ON bloques.junta (fecha); \
             CREATE TABLE bloques.partes {columns} PARTITION BY RANGE (fecha); {partitions} INSERT INTO bloques.partes {rows}; \
             ANALYZE bloques.junta; ANALYZE bloques.partes"
        ))
        .await;
    let blocks: i64 = sqlx::query_scalar("SELECT pg_relation_size('bloques.junta') / 8192")
        .fetch_one(&mut postgres.connect().await)
        .await
        .expect("the server answers");
    // Twenty ranges: if each of them looked at the whole table, that would be twenty times its blocks.
    let source = PostgresSource::new(server, config(2, 1_000));
    let quiet = || async { sessions(postgres, "bloques").await == 0 };
    let settled = || async {
        let first = touched(postgres, "bloques", "%").await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        first == touched(postgres, "bloques", "%").await
    };
    for (table, own, others, most) in [
        // To count it may look at everything once, then once at the day's seventh, of which ranges may share the ends.
        ("junta", "junta", "junta", blocks + blocks / 7 + 25),
        // Of the partition twice, and of the other six nothing.
        ("partes", "partes_4", "partes_%", 2 * (blocks / 7) + 25),
    ] {
        eventually("the server has counted what was before", settled).await;
        let (before_own, before_all) = (touched(postgres, "bloques", own).await, touched(postgres, "bloques", others).await);
        let read = read(&source, table, "1997-01-04", &many_columns()).await.expect("the day is read");
        assert_eq!(read.iter().map(RecordBatch::num_rows).sum::<usize>(), 20_000);
        eventually("its sessions end", quiet).await;
        eventually("the server has counted", || async {
            touched(postgres, "bloques", own).await >= before_own + 2 * (blocks / 7)
        })
        .await;
        let (in_own, in_all) =
            (touched(postgres, "bloques", own).await - before_own, touched(postgres, "bloques", others).await - before_all);
        assert!(in_all <= most, "{table}: {in_all} blocks of {blocks} touched, expected at most {most}");
        assert_eq!(in_own, in_all, "{table}: other partitions were touched");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_is_read_as_it_was_when_its_rows_were_counted() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = many_rows(postgres, "instantanea", 60_000).await;
    let source = PostgresSource::new(server, config(3, 2_000));
    let begun = source.read_day("ventas", day("1997-01-01"), &many_columns()).await.expect("the day is there");
    postgres.execute("DELETE FROM instantanea.ventas WHERE order_id < 30000").await;
    postgres.execute("INSERT INTO instantanea.ventas VALUES (0, 1, 'nueva', DATE '1997-01-01')").await;
    let batches: Vec<RecordBatch> = begun.batches.try_collect().await.expect("the rows are good");
    assert_eq!(begun.expected_rows, batches.iter().map(|b| b.num_rows() as u64).sum::<u64>());
    assert_eq!(texts(&batches)[0][0].as_deref(), Some("1"));
    assert!(read(&source, "ventas", "1997-01-01", &many_columns()).await.expect("the day is read").len() < batches.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_that_is_dropped_closes_its_connections() {
    let Some(postgres) = Postgres::shared().await else { return };
    let mut server = many_rows(postgres, "soltada", 60_000).await;
    server.options = server.options.application_name("soltada");
    let source = PostgresSource::new(server, PostgresSourceConfig { queued_batches: NonZeroUsize::MIN, ..config(3, 2_000) });
    let mut begun = source.read_day("ventas", day("1997-01-01"), &many_columns()).await.expect("the day is there");
    begun.batches.next().await.expect("a batch").expect("good rows");
    assert!(sessions(postgres, "soltada").await > 0);
    drop(begun);
    eventually("its sessions end", || async { sessions(postgres, "soltada").await == 0 }).await;
    // And one that is read to its end leaves none.
    read(&source, "ventas", "1997-01-01", &many_columns()).await.expect("the day is read");
    eventually("its sessions end", || async { sessions(postgres, "soltada").await == 0 }).await;
}

fn is(error: &PortError, code: &str, disposition: Disposition) {
    assert_eq!((error.code.as_deref(), error.disposition), (Some(code), disposition), "{}", error.chain());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_error_says_what_may_be_done() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("errores").await;
    postgres.execute(&format!("CREATE TABLE errores.ventas {VENTAS}")).await;
    postgres.copy_csv("errores.ventas", conformance::table_source::VENTAS).await;
    postgres
        .execute(
            "DO $$ BEGIN CREATE ROLE sin_permiso LOGIN PASSWORD 'x'; EXCEPTION WHEN duplicate_object THEN END $$; \
             DO $$ BEGIN CREATE ROLE caducado LOGIN PASSWORD 'x' VALID UNTIL '2020-01-01'; EXCEPTION WHEN duplicate_object THEN END $$; \
             DO $$ BEGIN CREATE ROLE estrecho LOGIN PASSWORD 'x' CONNECTION LIMIT 0; EXCEPTION WHEN duplicate_object THEN END $$; \
             GRANT USAGE ON SCHEMA errores TO sin_permiso",
        )
        .await;
    let with = |change: &dyn Fn(sqlx::postgres::PgConnectOptions) -> sqlx::postgres::PgConnectOptions| {
        source(&PostgresServer { options: change(server.options.clone()), ..server.clone() })
    };

    // Down: nobody listens on a port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let down = with(&|o| o.port(port));
    is(&down.ping().await.expect_err("down"), "ECONNREFUSED", Disposition::Retryable);
    is(&down.columns("ventas").await.expect_err("down"), "ECONNREFUSED", Disposition::Retryable);
    let error = read(&down, "ventas", "1997-01-01", &columns()).await.expect_err("down");
    is(&error, "ECONNREFUSED", Disposition::Retryable);

    // Credentials: three causes with one code, and none of them shows the password.
    for options in [
        with(&|o| o.password("equivocada")),
        with(&|o| o.username("caducado").password("x")),
        with(&|o| o.username("nadie").password("x")),
    ] {
        let error = options.ping().await.expect_err("refused");
        is(&error, "28P01", Disposition::Permanent);
        assert!(!error.chain().contains("equivocada"));
    }
    // No free slot: worth another try, unlike all the others that are refused.
    let full = with(&|o| o.username("estrecho").password("x"));
    is(&full.ping().await.expect_err("no slot"), "53300", Disposition::Retryable);
    is(&with(&|o| o.database("ninguna")).ping().await.expect_err("no database"), "3D000", Disposition::Permanent);

    // A grant is missing: the columns can be seen, the rows cannot.
    let forbidden = with(&|o| o.username("sin_permiso").password("x"));
    assert_eq!(forbidden.columns("ventas").await.expect("the catalogue is public"), columns());
    let error = read(&forbidden, "ventas", "1997-01-01", &columns()).await.expect_err("no grant");
    is(&error, "42501", Disposition::Permanent);

    // A password may hold anything.
    postgres
        .execute(
            "DO $$ BEGIN CREATE ROLE raro LOGIN; EXCEPTION WHEN duplicate_object THEN END $$; \
             ALTER ROLE raro PASSWORD 'p@ss:/?#%41 +ñ'; GRANT USAGE ON SCHEMA errores TO raro; GRANT SELECT ON errores.ventas TO raro",
        )
        .await;
    let odd = with(&|o| o.username("raro").password("p@ss:/?#%41 +ñ"));
    assert_eq!(read(&odd, "ventas", "1997-01-01", &columns()).await.expect("a grant").len(), 1);

    // A migration holds the table for longer than we wait.
    let good = source(&server);
    let mut migration = postgres.connect().await;
    sqlx::raw_sql("BEGIN; LOCK TABLE errores.ventas IN ACCESS EXCLUSIVE MODE").execute(&mut migration).await.expect("a lock");
    let error = read(&good, "ventas", "1997-01-01", &columns()).await.expect_err("locked");
    is(&error, "55P03", Disposition::Retryable);
    drop(migration);
    eventually("the lock is free", || async { read(&good, "ventas", "1997-01-01", &columns()).await.is_ok() }).await;

    // A column goes, or changes its type, between the look at the columns and the read.
    let asked = good.columns("ventas").await.expect("the table is there");
    postgres.execute("ALTER TABLE errores.ventas DROP COLUMN region").await;
    let error = read(&good, "ventas", "1997-01-01", &asked).await.expect_err("a column is gone");
    is(&error, "42703", Disposition::Permanent);
    assert!(error.to_string().contains("column region is missing"), "{error}");
    postgres.execute("ALTER TABLE errores.ventas ADD COLUMN region integer").await;
    let error = read(&good, "ventas", "1997-01-01", &asked).await.expect_err("another type");
    is(&error, "42804", Disposition::Permanent);
    assert!(error.to_string().contains("column region has type int32, expected string"), "{error}");
    postgres.execute("ALTER TABLE errores.ventas ALTER COLUMN fecha TYPE timestamp").await;
    let error = read(&good, "ventas", "1997-01-01", &asked[..2]).await.expect_err("no day");
    is(&error, "42804", Disposition::Permanent);
    is(&read(&good, "nadie", "1997-01-01", &asked).await.expect_err("no table"), "42P01", Disposition::Permanent);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_that_does_not_fit_is_named_with_its_row() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = many_rows(postgres, "valores", 40_000).await;
    postgres.execute("ALTER TABLE valores.ventas ALTER COLUMN monto TYPE numeric, ADD COLUMN momento timestamptz").await;
    let source = PostgresSource::new(server, config(3, 2_000));
    let mut asked = many_columns();
    asked.push(Column { name: "momento".into(), physical_type: "timestamp".into() });
    read(&source, "ventas", "1997-01-01", &asked).await.expect("all values fit what the contract declares");
    for (set, column, found) in [
        ("monto = 'NaN'", "monto", "NaN, expected a number"),
        ("monto = '-Infinity'", "monto", "-Infinity, expected a number"),
        ("monto = 123456789.01", "monto", "123456789.01, expected a numeric(10,2)"),
        ("monto = 0.001", "monto", "0.001, expected a numeric(10,2)"),
        ("momento = 'infinity'", "momento", "infinity, expected a time"),
        (
            "momento = '294276-01-01'",
            "momento",
            "microsecond 9223339708800000000 after 2000-01-01, expected a time Arrow can hold",
        ),
    ] {
        postgres.execute(&format!("UPDATE valores.ventas SET {set} WHERE order_id = 30001")).await;
        let error = read(&source, "ventas", "1997-01-01", &asked).await.expect_err("a value does not fit");
        is(&error, "22000", Disposition::Permanent);
        let text = error.to_string();
        assert!(text.contains(&format!("column {column}: found {found}")), "{text}");
        postgres.execute("UPDATE valores.ventas SET monto = 1, momento = NULL WHERE order_id = 30001").await;
    }
    // The row's number is that of the day, not of the range that a connection has copied.
    let row = (1..=30_001).filter(|g| g % 17 != 0 && g % 3 != 0).count();
    postgres
        .execute(
            "CREATE TABLE valores.copia AS SELECT order_id, CASE order_id WHEN 30001 THEN 'NaN' ELSE monto END AS monto, fecha \
             FROM valores.ventas ORDER BY order_id",
        )
        .await;
    let asked = [asked[0].clone(), asked[1].clone(), asked[3].clone()];
    let error = read(&source, "copia", "1997-01-01", &asked).await.expect_err("a value does not fit");
    assert!(error.to_string().contains(&format!("row {row}, column monto: found NaN")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_goes_away_in_the_middle_is_worth_another_try() {
    let Some(mut postgres) = Postgres::start().await else {
        return crate::services::skip("PostgreSQL", "install the package postgresql");
    };
    let server = many_rows(&postgres, "caida", 200_000).await;
    let source = PostgresSource::new(server, PostgresSourceConfig { queued_batches: NonZeroUsize::MIN, ..config(2, 20_000) });
    // Sessions are ended one by one, then the server is shut down at once, without a word to its clients.
    for order in ["terminate", "QUIT"] {
        let mut begun = source.read_day("ventas", day("1997-01-01"), &many_columns()).await.expect("the day is there");
        begun.batches.next().await.expect("a batch").expect("good rows");
        if order == "QUIT" {
            postgres.stop("QUIT");
        } else {
            postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'simulacro'").await;
        }
        let error = begun.batches.try_collect::<Vec<_>>().await.expect_err("the connection is gone");
        assert_eq!(error.disposition, Disposition::Retryable, "{}", error.chain());
        println!("{order}: {}", error.chain());
    }
    let error = source.ping().await.expect_err("the server is gone");
    assert_eq!(error.disposition, Disposition::Retryable, "{}", error.chain());
    postgres.stop("start");
    eventually("the server is back", || async { source.ping().await.is_ok() }).await;
    read(&source, "ventas", "1997-01-01", &many_columns()).await.expect("the day is read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_ledger_names_who_holds_it_and_a_lost_session_frees_it() {
    let Some(postgres) = Postgres::shared().await else { return };
    let mut server = postgres.server("libro_ocupado").await;
    let now = chrono::DateTime::from_timestamp(1_710_730_815, 0).expect("a time");
    server.options = server.options.application_name("trabajador-7");
    let holder = PostgresLedger::open(server.clone()).await.expect("the ledger opens");
    let rival = PostgresLedger::open(server).await.expect("the ledger opens");
    let (holder, rival): (&dyn RunLedger, &dyn RunLedger) = (&holder, &rival);
    let held = holder.begin("diario", day("2024-03-17"), "r-1", 0, now).await.expect("the pipeline is free");
    let error = rival.begin("diario", day("2024-03-17"), "r-2", 0, now).await.expect_err("held");
    is(&error, "BUSY", Disposition::Retryable);
    for part in ["begin a run of diario: process trabajador-7 from ", ", run r-1,", " is running it"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // The network ends the session of the lock, of which its process knows nothing.
    postgres.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trabajador-7'").await;
    // It ends a moment after the server was told to end it.
    let mut begun = rival.begin("diario", day("2024-03-17"), "r-2", 0, now).await;
    for _ in 0..200 {
        if begun.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        begun = rival.begin("diario", day("2024-03-17"), "r-2", 0, now).await;
    }
    let heir = begun.expect("nobody holds it");
    assert_eq!(heir.epoch, held.epoch + 1);
    holder.finish(&held).await.expect("its end is written all the same");
    let error = holder.begin("diario", day("2024-03-17"), "r-3", 0, now).await.expect_err("the heir holds it");
    is(&error, "BUSY", Disposition::Retryable);
    rival.finish(&heir).await.expect("the run ends");
}

/// What a proxy does with the next COMMIT it sees.
const PASS: u8 = 0;
/// The server gets it, the client never gets the answer.
const LOSE_ANSWER: u8 = 1;
/// Neither gets anything.
const LOSE_COMMIT: u8 = 2;

/// A proxy before the server that can cut a connection at its COMMIT; gives its port.
async fn proxy(server: &PostgresServer, order: Arc<AtomicU8>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    let target = (server.options.get_host().to_owned(), server.options.get_port());
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (order, target) = (order.clone(), target.clone());
            tokio::spawn(async move {
                let upstream = TcpStream::connect((target.0.as_str(), target.1)).await.expect("the server accepts connections");
                let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                    (client.into_split(), upstream.into_split());
                let (mut request, mut answer) = (vec![0; 1 << 16], vec![0; 1 << 16]);
                loop {
                    tokio::select! {
                        biased;
                        read = from_client.read(&mut request) => {
                            let Ok(bytes @ 1..) = read else { return };
                            let is_commit = request[..bytes].windows(7).any(|w| w == b"COMMIT\0");
                            match if is_commit { order.swap(PASS, Ordering::SeqCst) } else { PASS } {
                                LOSE_COMMIT => return,
                                LOSE_ANSWER => {
                                    to_server.write_all(&request[..bytes]).await.expect("the server listens");
                                    // It has answered, so it has committed.
                                    let _ = from_server.read(&mut answer).await;
                                    return;
                                }
                                _ => if to_server.write_all(&request[..bytes]).await.is_err() { return },
                            }
                        }
                        read = from_server.read(&mut answer) => {
                            let Ok(bytes @ 1..) = read else { return };
                            if to_client.write_all(&answer[..bytes]).await.is_err() { return }
                        }
                    }
                }
            });
        }
    });
    port
}

fn one_row(fecha: &str, text: &str) -> Vec<RecordBatch> {
    let days = (day(fecha) - NaiveDate::default()).num_days() as i32;
    let columns: Vec<(&str, ArrayRef)> =
        vec![("fecha", Arc::new(Date32Array::from(vec![days]))), ("texto", Arc::new(StringArray::from(vec![text])))];
    vec![RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true))).expect("a batch")]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_a_commit_is_decided_by_the_epoch() {
    let Some(postgres) = Postgres::shared().await else { return };
    let mut server = postgres.server("perdida").await;
    let order = Arc::new(AtomicU8::new(PASS));
    let port = proxy(&server, order.clone()).await;
    server.options = server.options.port(port);
    let warehouse = PostgresWarehouse::open(server, 1 << 20).await.expect("the warehouse opens");
    let load = |epoch, text| warehouse.load_day("dias", day("1997-01-01"), epoch, one_row("1997-01-01", text));
    let stored = || async {
        let batches = warehouse.query("SELECT texto FROM dias", &["dias"]).await.expect("the table is there");
        texts(&batches).into_iter().map(|row| row[0].clone().unwrap_or_default()).collect::<Vec<_>>()
    };
    assert_eq!(load(1, "uno").await.expect("loaded"), Commit::New(1));

    order.store(LOSE_ANSWER, Ordering::SeqCst);
    assert_eq!(load(2, "dos").await.expect("the epoch shows that it happened"), Commit::New(2));
    assert_eq!(order.load(Ordering::SeqCst), PASS, "the fault fired");
    assert_eq!(stored().await, ["dos"]);
    assert_eq!(load(2, "otra").await.expect("the epoch is known"), Commit::Already(2));

    order.store(LOSE_COMMIT, Ordering::SeqCst);
    let error = load(3, "tres").await.expect_err("the epoch shows that it did not happen");
    assert_eq!(error.disposition, Disposition::Retryable, "{}", error.chain());
    assert_eq!(order.load(Ordering::SeqCst), PASS, "the fault fired");
    assert_eq!(stored().await, ["dos"]);
    assert_eq!(load(3, "tres").await.expect("loaded"), Commit::New(3));
    assert_eq!(stored().await, ["tres"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn loads_of_one_table_wait_for_each_other_and_each_epoch_counts_once() {
    let Some(postgres) = Postgres::shared().await else { return };
    let mut server = postgres.server("rivales").await;
    server.lock_timeout = Duration::from_secs(30);
    let warehouse = PostgresWarehouse::open(server, 1 << 20).await.expect("the warehouse opens");
    let loads = (0..12_i64).map(|i| {
        let fecha = if i % 2 == 0 { "1997-01-01" } else { "1997-01-02" };
        let text = format!("{i}");
        let warehouse = &warehouse;
        async move { warehouse.load_day("dias", day(fecha), 1 + i / 6, one_row(fecha, &text)).await.expect("loaded") }
    });
    let commits = futures::future::join_all(loads).await;
    let mut versions: Vec<u64> = commits.iter().filter_map(|c| if let Commit::New(v) = c { Some(*v) } else { None }).collect();
    versions.sort_unstable();
    assert_eq!(versions, (1..=versions.len() as u64).collect::<Vec<_>>(), "{commits:?}");
    assert!((2..=4).contains(&versions.len()), "{commits:?}");
    let rows =
        texts(&warehouse.query("SELECT fecha, count(*) FROM dias GROUP BY fecha ORDER BY 1", &["dias"]).await.expect("read"));
    let counts: BTreeMap<_, _> =
        rows.into_iter().map(|r| (r[0].clone().unwrap_or_default(), r[1].clone().unwrap_or_default())).collect();
    assert_eq!(counts, BTreeMap::from([("1997-01-01".into(), "1".into()), ("1997-01-02".into(), "1".into())]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_with_other_columns_is_not_loaded() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("columnas").await;
    postgres.execute("CREATE TABLE columnas.dias (fecha date, texto integer, nota text)").await;
    let warehouse = PostgresWarehouse::open(server, 1 << 20).await.expect("the warehouse opens");
    let error = warehouse.load_day("dias", day("1997-01-01"), 1, one_row("1997-01-01", "x")).await.expect_err("other columns");
    is(&error, "42804", Disposition::Permanent);
    let text = "column texto has type integer, expected text; column nota (text) is not among the rows' columns";
    assert!(error.to_string().contains(text), "{error}");
}

/// CPU time of this process so far, in ticks of 10 ms; 0 where the system does not tell.
fn cpu_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let tick = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok()).unwrap_or_default();
    tick(11) + tick(12)
}

/// Not a promise but a figure: `cargo test --test it -- --ignored rows_per_second --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement, which takes a minute"]
async fn rows_per_second_of_a_day() {
    let Some(postgres) = Postgres::shared().await else { return };
    let server = postgres.server("medida").await;
    let rows = 1_000_000;
    postgres
        .execute(&format!(
            "CREATE TABLE medida.ventas {VENTAS}; \
             INSERT INTO medida.ventas SELECT 'orden-' || g, 'usuario-' || g % 50000, 'P' || g % 500, (g % 100000)::numeric / 100, 0.00, \
             (ARRAY['centro','este','norte','oeste','sur'])[1 + g % 5], timestamptz '1997-01-01' + g * interval '80 milliseconds', \
             DATE '1997-01-01' FROM generate_series(1, {rows}) g"
        ))
        .await;
    postgres.execute("VACUUM ANALYZE medida.ventas").await;
    use CopyReader::{Driver, InPlace};
    for (reader, connections) in [(InPlace, 1), (InPlace, 2), (Driver, 1), (Driver, 2), (InPlace, 1), (InPlace, 2)] {
        let source = PostgresSource::new(server.clone(), PostgresSourceConfig { reader, ..config(connections, 65_536) });
        let (begun, cpu) = (std::time::Instant::now(), cpu_ticks());
        let mut read = source.read_day("ventas", day("1997-01-01"), &columns()).await.expect("the day is there");
        let counted = begun.elapsed();
        let mut seen = 0;
        while let Some(batch) = read.batches.next().await {
            seen += batch.expect("good rows").num_rows();
        }
        assert_eq!(seen, rows);
        let took = begun.elapsed();
        println!(
            "{reader:?}, {connections} connections: {rows} rows in {took:?} ({counted:?} to count), {:.0} rows/s, {} ns of client CPU each",
            rows as f64 / took.as_secs_f64(),
            (cpu_ticks() - cpu) * 10_000_000 / rows as u64
        );
    }
    // The same bytes, thrown away as they come: what the driver and the server cost without us.
    let mut connection = postgres.connect().await;
    let (begun, cpu) = (std::time::Instant::now(), cpu_ticks());
    let copy = connection.copy_out_raw("COPY (SELECT * FROM medida.ventas) TO STDOUT (FORMAT binary)").await.expect("rows");
    let bytes = copy.try_fold(0, |sum, chunk| async move { Ok(sum + chunk.len()) }).await.expect("rows");
    let (took, cpu) = (begun.elapsed(), (cpu_ticks() - cpu) * 10_000_000 / rows as u64);
    println!(
        "thrown away: {bytes} bytes in {took:?}, {:.0} rows/s, {cpu} ns of client CPU each",
        rows as f64 / took.as_secs_f64()
    );
}
