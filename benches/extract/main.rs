//! The contender of `ci/bench-extract` that is this program, and what fills the database for all of them.
//!
//! Rounds, peers, memory and the server are the business of `run.py`, which starts this as a process of its own for each
//! measurement, as it does with the peers. What it leaves out is any judgement.
#![expect(clippy::disallowed_methods, reason = "a benchmark reads the clock and the time that the system has counted")]

use std::{
    collections::BTreeMap, error::Error, fmt::Write as _, num::NonZeroUsize, path::Path, process::ExitCode, time::Instant,
};

use chrono::NaiveDate;
use object_store::local::LocalFileSystem;
use simulacro_adapters::{CopyReader, NaiveTimestamps, PostgresServer, PostgresSource, PostgresSourceConfig};
use simulacro_core::{
    batch::{RawLayout, extract_raw},
    contract::catalogue,
};
use simulacro_lakehouse::copy::CopyLimits;
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};

type Failure = Box<dyn Error>;

/// Rows of text that go to the server in one piece.
const PIECE_ROWS: u64 = 20_000;

/// `--name value` pairs.
struct Arguments(BTreeMap<String, String>);

impl Arguments {
    fn read(mut words: impl Iterator<Item = String>) -> Result<Self, Failure> {
        let mut pairs = BTreeMap::new();
        while let Some(word) = words.next() {
            let name = word.strip_prefix("--").ok_or_else(|| format!("found {word}, expected --name value"))?;
            pairs.insert(name.to_owned(), words.next().ok_or_else(|| format!("--{name} has no value"))?);
        }
        Ok(Self(pairs))
    }
    fn text(&self, name: &str) -> Result<&str, Failure> {
        Ok(self.0.get(name).ok_or_else(|| format!("--{name} is missing"))?)
    }
    fn get<T: std::str::FromStr<Err: Error + 'static>>(&self, name: &str) -> Result<T, Failure> {
        self.text(name)?.parse().map_err(|e: T::Err| format!("--{name}: {e}").into())
    }
}

/// SplitMix64 of a number: the same rows each time, and no two columns alike.
fn mix(n: u64) -> u64 {
    let mut z = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Sale `n` of all days, of a day that has `rows`, as a line of CSV.
fn venta(out: &mut String, fecha: NaiveDate, (n, i, rows): (u64, u64, u64), (users, products): (u64, u64)) {
    let draw = |column: u64, bound: u64| mix(n * 8 + column) % bound;
    let monto = 100 + draw(0, 49_900);
    // Three of ten have a discount.
    let descuento = if draw(1, 10) < 7 { 0 } else { draw(2, 90) };
    let region = ["norte", "sur", "este", "oeste", "centro"][draw(3, 5) as usize];
    // Sales come in the order of their time.
    let micros = u128::from(i) * 86_400_000_000 / u128::from(rows);
    let (seconds, micros) = (micros / 1_000_000, micros % 1_000_000);
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "o-{n:010},u-{:06},p-{:05},{}.{:02},0.{descuento:02},{region},{fecha} {:02}:{:02}:{:02}.{micros:06}Z,{fecha}",
        draw(4, users),
        draw(5, products),
        monto / 100,
        monto % 100,
        seconds / 3_600,
        seconds / 60 % 60,
        seconds % 60,
    );
}

async fn copy_in(
    connection: &mut PgConnection,
    table: &str,
    rows: u64,
    mut line: impl FnMut(&mut String, u64),
) -> Result<(), Failure> {
    let statement = format!("COPY {table} FROM STDIN (FORMAT csv)");
    let mut copy = connection.copy_in_raw(&statement).await?;
    let mut text = String::new();
    for i in 0..rows {
        line(&mut text, i);
        if (i + 1) % PIECE_ROWS == 0 || i + 1 == rows {
            copy.send(text.as_bytes()).await?;
            text.clear();
        }
    }
    copy.finish().await?;
    Ok(())
}

/// Makes the tables: seven days of sales with the asked one in the middle, an index on the day, and the dimensions.
async fn load(arguments: &Arguments) -> Result<(), Failure> {
    let (rows, other_rows): (u64, u64) = (arguments.get("rows")?, arguments.get("other-rows")?);
    let dimensions @ (users, products): (u64, u64) = (arguments.get("clientes")?, arguments.get("productos")?);
    let fecha: NaiveDate = arguments.get("date")?;
    let mut options: PgConnectOptions = arguments.get("postgres")?;
    if let Ok(password) = std::env::var("PGPASSWORD") {
        options = options.password(&password);
    }
    let mut connection = PgConnection::connect_with(&options).await?;
    sqlx::raw_sql(
        "DROP TABLE IF EXISTS ventas, clientes, productos;
         CREATE TABLE ventas (order_id text NOT NULL, user_id text NOT NULL, product_id text NOT NULL, monto numeric(10,2) NOT NULL,
           descuento numeric(10,2), region text NOT NULL, timestamp_venta timestamptz NOT NULL, fecha date NOT NULL);
         CREATE TABLE clientes (user_id text PRIMARY KEY, segmento text, pais text NOT NULL);
         CREATE TABLE productos (product_id text PRIMARY KEY, categoria text NOT NULL, marca text NOT NULL, precio numeric(10,2) NOT NULL,
           inventario bigint NOT NULL)",
    )
    .execute(&mut connection)
    .await?;
    let mut first = 0;
    for day in -3..=3 {
        let (of_day, rows) = (fecha + chrono::Duration::days(day), if day == 0 { rows } else { other_rows });
        copy_in(&mut connection, "ventas", rows, |text, i| venta(text, of_day, (first + i, i, rows), dimensions)).await?;
        first += rows;
    }
    copy_in(&mut connection, "clientes", users, |text, i| {
        let segmento = ["nuevo", "habitual", "vip", ""][mix(i) as usize % 4];
        let pais = ["CL", "AR", "PE", "CO", "MX"][mix(i + users) as usize % 5];
        let _ = writeln!(text, "u-{i:06},{segmento},{pais}");
    })
    .await?;
    copy_in(&mut connection, "productos", products, |text, i| {
        let (category, brand, price) = (mix(i) % 40, mix(i + products) % 300, 100 + mix(i + 2 * products) % 49_900);
        let _ = writeln!(text, "p-{i:05},c-{category:02},m-{brand:03},{}.{:02},{}", price / 100, price % 100, mix(i) % 1_000);
    })
    .await?;
    for statement in ["CREATE INDEX ventas_fecha ON ventas (fecha)", "VACUUM ANALYZE"] {
        sqlx::raw_sql(statement).execute(&mut connection).await?;
    }
    connection.close().await?;
    Ok(())
}

/// CPU time of this process so far in seconds, to a hundredth.
fn cpu_seconds() -> Result<f64, Failure> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let tick = |at: usize| fields.get(at).and_then(|f| f.parse::<f64>().ok()).ok_or("found no CPU time in /proc/self/stat");
    Ok((tick(11)? + tick(12)?) / 100.0)
}

/// Extracts the day once, and says what it took.
async fn extract(arguments: &Arguments) -> Result<(), Failure> {
    let begun = (Instant::now(), cpu_seconds()?);
    let server = PostgresServer::parse(arguments.text("postgres")?, "public")?;
    let number = |n| NonZeroUsize::new(n).ok_or("found 0, expected a number above it");
    // As the program has it, see `postgres_config` in `runtime/app`.
    let config = PostgresSourceConfig {
        connections: arguments.get("connections")?,
        range_rows: number(65_536)?,
        queued_batches: number(8)?,
        reader: CopyReader::InPlace,
        naive_timestamps: NaiveTimestamps::Utc,
        limits: CopyLimits::STANDARD,
    };
    let source = PostgresSource::new(server, config);
    let shipped = catalogue::shipped()?;
    let contract = shipped.into_iter().find(|c| c.table == "ventas");
    let mut contract = contract.ok_or("found no contract ventas among those that ship")?;
    // Larger days than the reference have a contract of their own; here only its limit differs.
    contract.rows_max = contract.rows_max.max(arguments.get("rows-max")?);
    let folder = Path::new(arguments.text("out")?);
    std::fs::create_dir_all(folder)?;
    let store = LocalFileSystem::new_with_prefix(folder)?;
    let day = extract_raw(&source, &store, &contract, arguments.get("date")?, RawLayout::STANDARD).await?;
    let (seconds, cpu) = (begun.0.elapsed().as_secs_f64(), cpu_seconds()? - begun.1);
    let (rows, parts, hash) = (day.manifest.rows, day.manifest.files.len(), &day.manifest.content_hash);
    println!("{}", serde_json::json!({ "rows": rows, "seconds": seconds, "cpu_seconds": cpu, "files": parts, "hash": hash }));
    Ok(())
}

fn explain(error: &dyn Error) {
    eprintln!("error: {error}");
    let mut next = error.source();
    while let Some(cause) = next {
        eprintln!("  because: {cause}");
        next = cause.source();
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let done = match (words.next().as_deref(), Arguments::read(words)) {
        (Some("load"), Ok(arguments)) => load(&arguments).await,
        (Some("extract"), Ok(arguments)) => extract(&arguments).await,
        (Some("load" | "extract"), Err(error)) => Err(error),
        // `cargo bench` and `cargo test --benches` come here too.
        _ => {
            println!("this is a part of ci/bench-extract, which see: found no command, expected load or extract");
            return ExitCode::SUCCESS;
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            explain(error.as_ref());
            ExitCode::FAILURE
        }
    }
}
