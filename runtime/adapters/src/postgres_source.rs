//! Tables of a PostgreSQL database as a source.
//!
//! A day is read through several sessions that share one exported snapshot, each of which copies the rows of some
//! ranges of heap blocks in the binary format. **Order**: the rows come in the order in which they lie in the table
//! (by `ctid`), whatever the number of connections; batches are full except the last. So the same day gives the same
//! batches as long as its rows have not moved, and another number of connections changes nothing but the speed. For a
//! partitioned table the order is by range, then partition, then place. A view has no places: it is read through one
//! connection, in the order its plan gives.
//!
//! The plans are made to keep that order: no parallel scan, no scan that begins in the middle, no plain index scan
//! (bitmap scans, which sort by block, are allowed).
//!
//! What this leaves out: filters other than the day, and retries, which are the caller's.

use std::{
    collections::{BTreeSet, VecDeque},
    num::NonZeroUsize,
    sync::Arc,
};

use arrow::{
    array::{Date32Array, RecordBatch},
    compute::concat_batches,
    datatypes::SchemaRef,
};
use async_trait::async_trait;
use chrono::{Datelike, NaiveDate};
use futures::{FutureExt, StreamExt, stream};
use simulacro_core::ports::{Column, PartitionRead, PortError, Result, TableSource};
use simulacro_lakehouse::copy::{CopyColumn, CopyDecoder, CopyError, CopyLimits, CopyType};
use sqlx::{PgConnection, Row, postgres::PgRow};
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet};

use crate::{
    postgres::{PostgresServer, Value, classify, quote, within},
    postgres_wire::{Wire, WireError},
};

/// What a `timestamp without time zone` means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NaiveTimestamps {
    /// Its values are UTC, and its type is the contract's `timestamp`.
    Utc,
    /// Nobody knows: its type is `timestamp_ntz`, which no contract has, so that it is noticed and not read.
    Unknown,
}

/// The most parallel workers that PostgreSQL can be told to use.
const HELPERS_MAX: usize = 1_024;

/// Memory of the server for the blocks of a day while its rows are counted: enough for each block of a day of 40 GB.
const COUNT_MEMORY: &str = "256MB";

/// What takes the rows from the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyReader {
    /// Our own reader, which decodes rows in the buffer that they arrived in. It has no TLS, and refuses to read where
    /// the server's options ask for it. One more connection is open while a read begins.
    InPlace,
    /// The driver, which makes an object of each row: slower, with TLS.
    Driver,
}

/// How a day is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostgresSourceConfig {
    /// Connections that read one day at the same time.
    pub connections: NonZeroUsize,
    /// Rows of a range, about; a connection copies one range after another.
    pub range_rows: NonZeroUsize,
    /// Decoded batches that may wait for each connection. Ranges of more rows than fit make the others wait.
    pub queued_batches: NonZeroUsize,
    /// What takes the rows from the network.
    pub reader: CopyReader,
    /// What a `timestamp without time zone` means.
    pub naive_timestamps: NaiveTimestamps,
    /// Size of batches and values.
    pub limits: CopyLimits,
}

/// The source.
#[derive(Debug, Clone)]
pub struct PostgresSource {
    server: PostgresServer,
    config: PostgresSourceConfig,
}

/// A type as `format_type` writes it, in the contract's words and as it stands on the wire.
fn types(declared: &str, naive: NaiveTimestamps) -> (String, Option<CopyType>) {
    let (name, modifier) = match declared.split_once('(') {
        Some((before, rest)) => {
            let (modifier, after) = rest.split_once(')').unwrap_or((rest, ""));
            (format!("{before}{after}"), Some(modifier))
        }
        None => (declared.to_owned(), None),
    };
    let wire = match name.as_str() {
        "text" | "character varying" | "character" => ("string", CopyType::Text),
        "uuid" => ("string", CopyType::Uuid),
        "smallint" => ("int16", CopyType::Int2),
        "integer" => ("int32", CopyType::Int4),
        "bigint" => ("int64", CopyType::Int8),
        "double precision" => ("float64", CopyType::Float8),
        "boolean" => ("boolean", CopyType::Bool),
        "date" => ("date", CopyType::Date),
        "timestamp with time zone" => ("timestamp", CopyType::Timestamp),
        "timestamp without time zone" => match naive {
            NaiveTimestamps::Utc => ("timestamp", CopyType::Timestamp),
            NaiveTimestamps::Unknown => return ("timestamp_ntz".into(), None),
        },
        "numeric" => return (modifier.map_or("decimal".into(), |m| format!("decimal({m})")), modifier.and_then(decimal)),
        // The source's own words, so that a difference can name them.
        _ => return (declared.to_owned(), None),
    };
    (wire.0.into(), Some(wire.1))
}

/// `10,2` as the type of a decimal, where Arrow has it.
fn decimal(modifier: &str) -> Option<CopyType> {
    let (precision, scale) = modifier.split_once(',')?;
    let (precision, scale) = (precision.parse().ok()?, scale.parse().ok()?);
    ((1..=38).contains(&precision) && scale <= precision).then_some(CopyType::Numeric { precision, scale })
}

/// The wire type of an asked column, of which the source declares the type `declared`.
fn wire_type(asked: &Column, declared: &str, naive: NaiveTimestamps) -> Result<CopyType> {
    let (word, wire) = types(declared, naive);
    let wire = if word == "decimal" {
        // Without declared digits, the contract's hold: each value is checked against them.
        asked.physical_type.strip_prefix("decimal(").and_then(|m| m.strip_suffix(')')).and_then(decimal)
    } else {
        wire.filter(|_| word == asked.physical_type)
    };
    wire.ok_or_else(|| {
        let what = format!("column {} has type {word}, expected {}", asked.name, asked.physical_type);
        PortError::permanent(what).code("42804")
    })
}

/// The day as a literal of type date.
///
/// COPY takes no parameters, so the day has to be in its text. It cannot carry anything else there: the text is made
/// from three integers, year, month and day, and the year is held to four digits; no text from outside gets in, and
/// the ISO form means the same under every `DateStyle`.
fn date_literal(fecha: NaiveDate) -> Result<String> {
    if !(1..=9_999).contains(&fecha.year()) {
        return Err(PortError::permanent(format!("read {fecha}: found year {}, expected 1 to 9999", fecha.year())));
    }
    Ok(format!("DATE '{:04}-{:02}-{:02}'", fecha.year(), fecha.month(), fecha.day()))
}

/// The block of a place such as `(17,3)`.
fn block(ctid: &str) -> Option<u32> {
    ctid.strip_prefix('(')?.split_once(',')?.0.parse().ok()
}

/// Cuts blocks `first..=last` in `count` parts whose sizes differ by at most one: begin and exclusive end of each.
fn ranges(first: u32, last: u32, count: u64) -> Vec<(u64, u64)> {
    let (first, blocks) = (u64::from(first), u64::from(last.saturating_sub(first)) + 1);
    let count = count.clamp(1, blocks);
    // Below 2^64: blocks and ranges are below 2^32 each.
    (0..count).map(|i| (first + blocks * i / count, first + blocks * (i + 1) / count)).collect()
}

/// What a connection sends about the range it copies.
enum Sent {
    Batch(RecordBatch),
    RangeEnd,
    Damaged(CopyError),
    Failed(PortError),
}

/// A session in the day's snapshot.
enum Session {
    Driver(PgConnection),
    InPlace(Box<Wire<TcpStream>>),
}

/// One session's share of a day.
struct Worker {
    server: PostgresServer,
    session: Session,
    columns: Vec<CopyColumn>,
    limits: CopyLimits,
    what: String,
    statements: Vec<String>,
    out: mpsc::Sender<Sent>,
}

impl Worker {
    async fn run(mut self) {
        for statement in std::mem::take(&mut self.statements) {
            let last = match self.copy(&statement).await {
                Ok(true) => Sent::RangeEnd,
                // Nobody listens any more: dropping the connection in the middle of its rows closes it.
                Ok(false) => return,
                Err(failure) => failure,
            };
            let failed = !matches!(last, Sent::RangeEnd);
            if self.out.send(last).await.is_err() || failed {
                return;
            }
        }
        // That the end of a reading transaction gets lost changes nothing.
        match self.session {
            Session::Driver(connection) => self.server.close(connection).await,
            Session::InPlace(wire) => {
                let _ = within(self.server.patience(), wire.close()).await;
            }
        }
    }

    /// Copies one range; says whether somebody still listens.
    async fn copy(&mut self, statement: &str) -> Result<bool, Sent> {
        let bound = self.server.patience();
        let mut decoder = CopyDecoder::new(self.columns.clone(), self.limits).map_err(Sent::Damaged)?;
        // Most rows are there already and need no timer, hence `now_or_never` first.
        match &mut self.session {
            Session::Driver(connection) => {
                let failed = |e: sqlx::Error| Sent::Failed(classify(self.what.clone(), e));
                let mut rows = within(bound, connection.copy_out_raw(statement)).await.map_err(failed)?;
                loop {
                    let next = match rows.next().now_or_never() {
                        Some(next) => next.transpose(),
                        None => within(bound, rows.next().map(Option::transpose)).await,
                    };
                    let Some(bytes) = next.map_err(failed)? else { break };
                    let mut bytes: &[u8] = &bytes;
                    while !bytes.is_empty() {
                        if let Some(batch) = decoder.decode(&mut bytes).map_err(Sent::Damaged)?
                            && self.out.send(Sent::Batch(batch)).await.is_err()
                        {
                            return Ok(false);
                        }
                    }
                }
            }
            Session::InPlace(wire) => {
                let failed = |e: WireError| Sent::Failed(e.classify(self.what.clone()));
                within(bound, wire.copy_out(statement)).await.map_err(failed)?;
                loop {
                    let next = match wire.copied().now_or_never() {
                        Some(next) => next,
                        None => within(bound, wire.copied()).await,
                    };
                    let Some(mut bytes) = next.map_err(failed)? else { break };
                    // And those that have arrived with them.
                    loop {
                        while !bytes.is_empty() {
                            if let Some(batch) = decoder.decode(&mut bytes).map_err(Sent::Damaged)?
                                && self.out.send(Sent::Batch(batch)).await.is_err()
                            {
                                return Ok(false);
                            }
                        }
                        match wire.arrived().map_err(failed)? {
                            Some(more) => bytes = more,
                            None => break,
                        }
                    }
                }
            }
        }
        match decoder.finish().map_err(Sent::Damaged)? {
            Some(batch) => Ok(self.out.send(Sent::Batch(batch)).await.is_ok()),
            None => Ok(true),
        }
    }
}

/// Makes full batches of the pieces in which ranges end.
#[derive(Debug)]
struct Filler {
    schema: SchemaRef,
    rows: usize,
    bytes: usize,
    pieces: VecDeque<RecordBatch>,
    held_rows: usize,
    held_bytes: usize,
}

impl Filler {
    /// Bytes of the values themselves, without what their buffers keep in reserve.
    fn size(piece: &RecordBatch) -> usize {
        piece.columns().iter().map(|c| c.to_data().get_slice_memory_size().unwrap_or_default()).sum()
    }

    fn push(&mut self, piece: RecordBatch) {
        self.held_rows += piece.num_rows();
        self.held_bytes += Self::size(&piece);
        self.pieces.push_back(piece);
    }

    fn is_full(&self) -> bool {
        self.held_rows >= self.rows || self.held_bytes >= self.bytes
    }

    /// The next batch of what is held: at most `rows` rows.
    fn take(&mut self) -> Result<Option<RecordBatch>> {
        let (mut parts, mut missing) = (Vec::new(), self.rows);
        while missing > 0
            && let Some(piece) = self.pieces.pop_front()
        {
            let taken = piece.num_rows().min(missing);
            missing -= taken;
            let part = piece.slice(0, taken);
            if taken < piece.num_rows() {
                self.pieces.push_front(piece.slice(taken, piece.num_rows() - taken));
            }
            parts.push(part);
        }
        self.held_bytes = self.pieces.iter().map(Self::size).sum();
        self.held_rows -= self.rows - missing;
        match parts.as_slice() {
            [] => Ok(None),
            [whole] => Ok(Some(whole.clone())),
            parts => {
                let batch = concat_batches(&self.schema, parts);
                batch.map(Some).map_err(|e| PortError::permanent("put rows of several ranges together").because(e))
            }
        }
    }
}

/// Rows of all ranges, in order. Dropping it stops the workers and so closes their connections.
struct Merge {
    workers: JoinSet<()>,
    queues: Vec<mpsc::Receiver<Sent>>,
    ranges: usize,
    range: usize,
    /// Rows taken before the present range.
    rows_before: u64,
    rows: u64,
    filler: Filler,
    what: String,
    ended: bool,
    day: Option<DayColumn>,
}

/// The column of the day, which is not copied: all rows of a day have the same.
#[derive(Debug)]
struct DayColumn {
    /// Where it stands among the asked columns.
    at: usize,
    /// Days since 1970-01-01.
    value: i32,
    /// The asked columns, this one among them.
    schema: SchemaRef,
}

impl DayColumn {
    fn put_in(&self, batch: &RecordBatch) -> Result<RecordBatch> {
        let mut columns = batch.columns().to_vec();
        columns.insert(self.at, Arc::new(Date32Array::from_value(self.value, batch.num_rows())));
        RecordBatch::try_new(self.schema.clone(), columns)
            .map_err(|e| PortError::permanent("put the day beside its rows").because(e))
    }
}

impl Merge {
    async fn next(&mut self) -> Result<Option<RecordBatch>> {
        while !self.ended && !self.filler.is_full() {
            if self.range == self.ranges {
                self.ended = true;
                // They have only to say good-bye; their end shows that the snapshot is given back.
                while self.workers.join_next().await.is_some() {}
                break;
            }
            let queue = self.range % self.queues.len();
            match self.queues[queue].recv().await {
                Some(Sent::Batch(batch)) => {
                    self.rows += batch.num_rows() as u64;
                    self.filler.push(batch);
                }
                Some(Sent::RangeEnd) => {
                    self.range += 1;
                    self.rows_before = self.rows;
                }
                Some(Sent::Damaged(error)) => return Err(self.damaged(error)),
                Some(Sent::Failed(error)) => return Err(error),
                None => return Err(PortError::retryable(format!("{}: a connection's task ended early", self.what))),
            }
        }
        let batch = self.filler.take()?;
        match &self.day {
            Some(day) => batch.map(|batch| day.put_in(&batch)).transpose(),
            None => Ok(batch),
        }
    }

    fn damaged(&self, error: CopyError) -> PortError {
        let what = &self.what;
        match &error {
            CopyError::Value { row, column, found, expected, .. } => {
                // The error counts rows of its range.
                let row = self.rows_before + row;
                let text = format!("{what}: row {row}, column {column}: found {found}, expected {expected}");
                PortError::permanent(text).code("22000").because(error)
            }
            CopyError::Truncated { .. } => PortError::retryable(what.clone()).code("08006").because(error),
            CopyError::Setup { .. } | CopyError::Format { .. } | CopyError::Stopped { .. } => {
                PortError::permanent(what.clone()).code("08P01").because(error)
            }
        }
    }
}

impl PostgresSource {
    /// A source; nothing is opened yet.
    pub fn new(server: PostgresServer, config: PostgresSourceConfig) -> Self {
        Self { server, config }
    }

    /// Whether a table is a view, and its columns in order with their declared types. A domain counts as the type
    /// under it.
    async fn declared(&self, connection: &mut PgConnection, table: &str) -> Result<(bool, Vec<(String, String)>)> {
        let what = || format!("read the columns of {table}");
        let (schema, name) = self.server.split(table);
        let rows = self
            .server
            .rows(
                connection,
                "SELECT c.relkind = 'v' AS is_view, a.attname::text AS name, CASE t.typtype WHEN 'd' THEN format_type(t.typbasetype, t.typtypmod) \
                 ELSE format_type(a.atttypid, a.atttypmod) END AS declared \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid \
                 JOIN pg_type t ON t.oid = a.atttypid \
                 WHERE n.nspname = $1::text AND c.relname = $2::text AND c.relkind IN ('r', 'p', 'v') \
                 AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
                &[Value::Text(schema), Value::Text(name)],
            )
            .await
            .map_err(|e| classify(what(), e))?;
        if rows.is_empty() {
            let what = format!("{}: found no table or view of this name in schema {schema}", what());
            return Err(PortError::permanent(what).code("42P01"));
        }
        let read = |row: &PgRow| Ok((row.try_get("name")?, row.try_get("declared")?));
        let columns = rows.iter().map(read).collect::<sqlx::Result<Vec<_>>>();
        let is_view = rows.first().map_or(Ok(false), |row| row.try_get("is_view"));
        is_view.and_then(|is_view| Ok((is_view, columns?))).map_err(|e| classify(what(), e))
    }

    /// The columns of the statement, in the asked order.
    fn copy_columns(
        &self,
        table: &str,
        declared: &[(String, String)],
        asked: &[Column],
        by_day: bool,
    ) -> Result<Vec<CopyColumn>> {
        let find = |name: &str| declared.iter().find(|(n, _)| n == name).map(|(_, declared)| declared.as_str());
        let missing = |name: &str| PortError::permanent(format!("read {table}: column {name} is missing")).code("42703");
        // Compared with a day, a time would match midnight alone.
        match find("fecha") {
            Some("date") => {}
            _ if !by_day => {}
            Some(other) => {
                return Err(
                    PortError::permanent(format!("read {table}: column fecha has type {other}, expected date")).code("42804")
                );
            }
            None => return Err(missing("fecha")),
        }
        asked
            .iter()
            .map(|column| {
                let declared = find(&column.name).ok_or_else(|| missing(&column.name))?;
                let kind = wire_type(column, declared, self.config.naive_timestamps).map_err(|mut e| {
                    e.what = format!("read {table}: {}", e.what);
                    e
                })?;
                Ok(CopyColumn { name: column.name.clone(), kind })
            })
            .collect()
    }

    /// What begins a read transaction, in a snapshot that another one has exported when `snapshot` is given.
    fn begin(qualified: &str, snapshot: Option<&str>) -> String {
        let snapshot = snapshot.map(|id| format!("SET TRANSACTION SNAPSHOT '{id}'; ")).unwrap_or_default();
        // The lock is taken before the first snapshot of its own, so that no column can change between the two.
        format!(
            "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; {snapshot}\
             SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL synchronize_seqscans = off; \
             SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off; \
             LOCK TABLE {qualified} IN ACCESS SHARE MODE"
        )
    }

    /// A session that has begun to read.
    async fn lead(&self, table: &str, begin: String) -> Result<PgConnection> {
        let mut connection = self.server.connect().await?;
        self.server.run(&mut connection, begin).await.map_err(|e| classify(format!("begin to read {table}"), e))?;
        Ok(connection)
    }

    /// Sessions in the leader's snapshot, `count` of them. The driver's leader is one of them; ours is let go.
    async fn sessions(
        &self,
        table: &str,
        (qualified, snapshot): (&str, &str),
        leader: PgConnection,
        count: usize,
    ) -> Result<Vec<Session>> {
        let begin = Self::begin(qualified, Some(snapshot));
        let mut sessions = Vec::new();
        match self.config.reader {
            CopyReader::Driver => {
                sessions.push(Session::Driver(leader));
                for _ in 1..count {
                    sessions.push(Session::Driver(self.lead(table, begin.clone()).await?));
                }
            }
            CopyReader::InPlace => {
                for _ in 0..count {
                    let mut wire = Wire::connect(&self.server).await?;
                    let begun = within(self.server.patience(), wire.run(&begin)).await;
                    begun.map_err(|e| e.classify(format!("begin to read {table}")))?;
                    sessions.push(Session::InPlace(Box::new(wire)));
                }
                // The snapshot has to live until all have taken it, and no longer.
                self.server.close(leader).await;
            }
        }
        Ok(sessions)
    }
}

impl PostgresSource {
    /// Reads the rows of a table, of one day when it is given, under one snapshot.
    async fn read(&self, table: &str, fecha: Option<NaiveDate>, columns: &[Column]) -> Result<PartitionRead> {
        let what = fecha.map_or_else(|| format!("read {table}"), |fecha| format!("read {table} of {fecha}"));
        let failed = |e: sqlx::Error| classify(what.clone(), e);
        let chosen = match fecha {
            Some(fecha) => format!("fecha = {}", date_literal(fecha)?),
            None => "true".to_owned(),
        };
        let qualified = self.server.table(table)?;

        let mut leader = self.lead(table, Self::begin(&qualified, None)).await?;
        let snapshot: String = {
            let rows = self.server.rows(&mut leader, "SELECT pg_export_snapshot() AS id", &[]).await.map_err(failed)?;
            rows.first().ok_or(sqlx::Error::RowNotFound).and_then(|row| row.try_get("id")).map_err(failed)?
        };
        if !snapshot.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-') {
            return Err(PortError::permanent(format!("{what}: found snapshot {snapshot:?}, expected hex digits and hyphens")));
        }
        let (is_view, declared) = self.declared(&mut leader, table).await?;
        let mut copied = self.copy_columns(table, &declared, columns, fecha.is_some())?;
        let whole = CopyDecoder::new(copied.clone(), self.config.limits);
        let schema = whole.map_err(|e| PortError::permanent(what.clone()).because(e))?.schema().clone();
        // A statement copies one column at least.
        let day = match (fecha, copied.iter().position(|c| c.name == "fecha")) {
            (Some(fecha), Some(at)) if copied.len() > 1 => {
                copied.remove(at);
                let value = (fecha - NaiveDate::default()).num_days();
                let value = i32::try_from(value).map_err(|e| PortError::permanent(what.clone()).because(e))?;
                Some(DayColumn { at, value, schema })
            }
            _ => None,
        };
        let places = if is_view { "NULL::text, NULL::text" } else { "min(ctid)::text, max(ctid)::text" };
        // Here the order does not matter: as many processes of the server may count as will read. A scan of all days is worth
        // it only where no index knows the day; the planner cannot tell, since it does not know that a day lies together.
        let helpers = self.config.connections.get() - 1;
        let seqscan = if fecha.is_some() { "off" } else { "on" };
        let fast = format!(
            "SET LOCAL max_parallel_workers_per_gather = {}; SET LOCAL enable_seqscan = {seqscan}; SET LOCAL work_mem = '{COUNT_MEMORY}'",
            helpers.min(HELPERS_MAX)
        );
        self.server.run(&mut leader, fast).await.map_err(failed)?;
        let count = format!("SELECT count(*), {places} FROM {qualified} WHERE {chosen}");
        let rows = self.server.rows(&mut leader, count, &[]).await.map_err(failed)?;
        let as_before =
            "SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL enable_seqscan = on; SET LOCAL work_mem = DEFAULT";
        self.server.run(&mut leader, as_before).await.map_err(failed)?;
        let row = rows.first().ok_or(sqlx::Error::RowNotFound).map_err(failed)?;
        let expected_rows = row.try_get::<i64, _>(0).map_err(failed)?.unsigned_abs();
        let place =
            |at: usize| Ok::<_, PortError>(row.try_get::<Option<String>, _>(at).map_err(failed)?.as_deref().and_then(block));
        let (first, last): (Option<u32>, Option<u32>) = (place(1)?, place(2)?);

        let names = copied.iter().map(|c| quote(&c.name)).collect::<Result<Vec<_>>>()?.join(", ");
        let copy =
            |place: &str| format!("COPY (SELECT {names} FROM {qualified} WHERE {chosen}{place}) TO STDOUT (FORMAT binary)");
        let statements = match (first, last) {
            (Some(first), Some(last)) => {
                let blocks = u64::from(last.saturating_sub(first)) + 1;
                // A connection is worth opening for a batch of rows, not for less.
                let batches = expected_rows.div_ceil(self.config.limits.batch_rows as u64);
                let connections = batches.min(self.config.connections.get() as u64);
                let by_rows = expected_rows.div_ceil(self.config.range_rows.get() as u64).max(connections);
                // Where the day is thinly spread, each range may cost a scan of all of it: few ranges then.
                let count = if expected_rows < blocks { connections } else { by_rows };
                let range = |(from, to)| copy(&format!(" AND ctid >= '({from},0)'::tid AND ctid < '({to},0)'::tid"));
                // The end of the last block there can be has no number of its own.
                let open = |(from, to)| {
                    if to > u64::from(u32::MAX) { copy(&format!(" AND ctid >= '({from},0)'::tid")) } else { range((from, to)) }
                };
                ranges(first, last, count).into_iter().map(open).collect()
            }
            _ if expected_rows == 0 => Vec::new(),
            _ => vec![copy("")],
        };

        let mut shares: Vec<Vec<String>> = vec![Vec::new(); self.config.connections.get().min(statements.len()).max(1)];
        let range_count = statements.len();
        for (i, statement) in statements.into_iter().enumerate() {
            let turn = i % shares.len();
            shares[turn].push(statement);
        }
        let sessions = self.sessions(table, (&qualified, &snapshot), leader, shares.len()).await?;
        let (mut workers, mut queues) = (JoinSet::new(), Vec::new());
        let decoder = CopyDecoder::new(copied.clone(), self.config.limits);
        let schema = decoder.map_err(|e| PortError::permanent(what.clone()).because(e))?.schema().clone();
        for (session, statements) in sessions.into_iter().zip(shares) {
            let (out, queue) = mpsc::channel(self.config.queued_batches.get());
            queues.push(queue);
            let worker = Worker {
                server: self.server.clone(),
                session,
                columns: copied.clone(),
                limits: self.config.limits,
                what: what.clone(),
                statements,
                out,
            };
            workers.spawn(worker.run());
        }
        let CopyLimits { batch_rows, batch_bytes, .. } = self.config.limits;
        // Memory of a batch includes its numbers, which the limit on text does not count.
        let bytes = batch_bytes.saturating_mul(2).saturating_add(batch_rows * columns.len() * 32);
        let filler = Filler { schema, rows: batch_rows, bytes, pieces: VecDeque::new(), held_rows: 0, held_bytes: 0 };
        let merge =
            Merge { workers, queues, ranges: range_count, range: 0, rows_before: 0, rows: 0, filler, what, ended: false, day };
        let batches = stream::unfold(Some(merge), |merge| async move {
            let mut merge = merge?;
            match merge.next().await {
                Ok(Some(batch)) => Some((Ok(batch), Some(merge))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(PartitionRead { expected_rows, batches: batches.boxed() })
    }
}

#[async_trait]
impl TableSource for PostgresSource {
    async fn ping(&self) -> Result<()> {
        let connection = self.server.connect().await?;
        self.server.close(connection).await;
        Ok(())
    }

    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        let mut connection = self.server.connect().await?;
        let (_, declared) = self.declared(&mut connection, table).await?;
        self.server.close(connection).await;
        let column =
            |(name, declared): (String, String)| Column { name, physical_type: types(&declared, self.config.naive_timestamps).0 };
        Ok(declared.into_iter().map(column).collect())
    }

    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        let what = || format!("read what may be null in {table}");
        let (schema, name) = self.server.split(table);
        let mut connection = self.server.connect().await?;
        let rows = self
            .server
            .rows(
                &mut connection,
                "SELECT c.relkind = 'v' AS is_view, a.attname::text AS name, a.attnotnull OR t.typnotnull AS not_null \
                 FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid \
                 JOIN pg_type t ON t.oid = a.atttypid \
                 WHERE n.nspname = $1::text AND c.relname = $2::text AND c.relkind IN ('r', 'p', 'v') \
                 AND a.attnum > 0 AND NOT a.attisdropped",
                &[Value::Text(schema), Value::Text(name)],
            )
            .await
            .map_err(|e| classify(what(), e))?;
        self.server.close(connection).await;
        if rows.is_empty() {
            let what = format!("{}: found no table or view of this name in schema {schema}", what());
            return Err(PortError::permanent(what).code("42P01"));
        }
        let mut out = BTreeSet::new();
        for row in &rows {
            let read = || -> sqlx::Result<(bool, String, bool)> {
                Ok((row.try_get("is_view")?, row.try_get("name")?, row.try_get("not_null")?))
            };
            match read().map_err(|e| classify(what(), e))? {
                // A view says nothing of what lies below it.
                (true, ..) => return Ok(None),
                (false, name, true) => drop(out.insert(name)),
                (false, _, false) => {}
            }
        }
        Ok(Some(out))
    }

    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        self.read(table, Some(fecha), columns).await
    }

    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        self.read(table, None, columns).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn declared_types_become_the_contracts_words() {
        let cases = [
            ("text", "string", Some(CopyType::Text)),
            ("character varying(20)", "string", Some(CopyType::Text)),
            ("character(3)", "string", Some(CopyType::Text)),
            ("uuid", "string", Some(CopyType::Uuid)),
            ("numeric(10,2)", "decimal(10,2)", Some(CopyType::Numeric { precision: 10, scale: 2 })),
            ("numeric(38,38)", "decimal(38,38)", Some(CopyType::Numeric { precision: 38, scale: 38 })),
            ("numeric(60,2)", "decimal(60,2)", None),
            ("numeric(3,-2)", "decimal(3,-2)", None),
            ("numeric", "decimal", None),
            ("timestamp with time zone", "timestamp", Some(CopyType::Timestamp)),
            ("timestamp(3) with time zone", "timestamp", Some(CopyType::Timestamp)),
            ("timestamp without time zone", "timestamp", Some(CopyType::Timestamp)),
            ("date", "date", Some(CopyType::Date)),
            ("bigint", "int64", Some(CopyType::Int8)),
            ("double precision", "float64", Some(CopyType::Float8)),
            ("jsonb", "jsonb", None),
            ("integer[]", "integer[]", None),
        ];
        for (declared, word, wire) in cases {
            assert_eq!(types(declared, NaiveTimestamps::Utc), (word.to_owned(), wire), "{declared}");
        }
        assert_eq!(types("timestamp without time zone", NaiveTimestamps::Unknown), ("timestamp_ntz".into(), None));
    }

    #[test]
    fn a_number_without_digits_takes_the_contracts() {
        let asked = |physical_type: &str| Column { name: "monto".into(), physical_type: physical_type.into() };
        let wire = |asked: &Column, declared| wire_type(asked, declared, NaiveTimestamps::Utc);
        assert_eq!(
            wire(&asked("decimal(10,2)"), "numeric").expect("the contract declares it"),
            CopyType::Numeric { precision: 10, scale: 2 }
        );
        assert!(wire(&asked("string"), "numeric").is_err());
        let error = wire(&asked("decimal(10,2)"), "numeric(12,2)").expect_err("another type");
        assert_eq!(error.to_string(), "column monto has type decimal(12,2), expected decimal(10,2) [42804]");
    }

    #[test]
    fn a_day_is_a_literal_or_refused() {
        let day = |y, m, d| date_literal(NaiveDate::from_ymd_opt(y, m, d).expect("a day"));
        assert_eq!(day(1997, 1, 31).expect("a year of four digits"), "DATE '1997-01-31'");
        assert_eq!(day(7, 1, 1).expect("a year of four digits"), "DATE '0007-01-01'");
        assert!(day(10_000, 1, 1).is_err());
        assert!(day(-1, 1, 1).is_err());
    }

    #[test]
    fn ranges_cover_each_block_once() {
        for (first, last, count) in
            [(0, 0, 1), (0, 0, 9), (3, 12, 4), (0, 99, 7), (u32::MAX - 5, u32::MAX, 3), (0, u32::MAX, 1_000)]
        {
            let ranges = ranges(first, last, count);
            assert!(ranges.len() as u64 <= count);
            assert_eq!(ranges.first().map(|r| r.0), Some(u64::from(first)));
            assert_eq!(ranges.last().map(|r| r.1), Some(u64::from(last) + 1));
            assert!(ranges.iter().all(|(from, to)| from < to));
            assert!(ranges.windows(2).all(|pair| pair[0].1 == pair[1].0));
        }
    }
}
