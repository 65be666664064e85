//! The simulated PostgreSQL behind turmoil's network, and the client of its port.
//!
//! A request is a connection of its own and a line of JSON; an answer is another, and what the server says of its own accord
//! (an error, or a warning before the connection ends) is a line too. The client does what the real adapter does: it gives up
//! after a deadline, and tells by the code what a caller may do. What it leaves out: snapshots, and the binary format.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arrow::array::{ArrayRef, Date32Array, Decimal128Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use async_trait::async_trait;
use chrono::{DateTime, NaiveDate, Utc};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use simulacro_core::{
    batch::arrow_schema,
    ports::{Column, Disposition, PartitionRead, PortError, Result, TableSource},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    sync::Notify,
};
use turmoil::net::{TcpListener, TcpStream};

use crate::{
    faults::{
        Strikes,
        data::{self, Era},
        source::{Asked, Fate, ServerError, SourceState},
    },
    ports::Row,
};

/// Port of the simulated PostgreSQL.
pub const POSTGRES: u16 = 5432;

/// How long a client waits for an answer.
pub const DEADLINE: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Ping,
    Columns,
    NotNull,
    Read(NaiveDate),
}

#[derive(Debug, Serialize, Deserialize)]
enum Response {
    Pong,
    Columns(Vec<Column>),
    NotNull(Option<BTreeSet<String>>),
    /// The count that was taken in the snapshot of the rows, and the rows.
    Rows(u64, Vec<Row>),
    Says(ServerError),
}

/// What the simulated PostgreSQL holds, and what befalls it.
#[derive(Debug)]
pub struct Postgres {
    /// `ventas` from era to era.
    pub eras: Vec<Era>,
    state: Mutex<SourceState>,
    /// Wakes the listener when the server dies.
    died: Notify,
    /// When each fault on the data was first seen by a reader, by its number in the scenario.
    seen: Mutex<BTreeMap<usize, DateTime<Utc>>>,
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Postgres {
    /// A server with these tables, which these faults will befall.
    pub fn new(eras: Vec<Era>, state: SourceState) -> Self {
        Self { eras, state: Mutex::new(state), died: Notify::new(), seen: Mutex::default() }
    }

    /// What each fault of the server has done, in the order they were given.
    pub fn strikes(&self) -> Vec<Strikes> {
        held(&self.state).strikes()
    }

    /// When each fault on the data was first seen by a reader, by its number in the scenario.
    pub fn seen(&self) -> BTreeMap<usize, DateTime<Utc>> {
        held(&self.seen).clone()
    }

    /// Answers a request at a moment, or tells what becomes of it.
    fn handle(&self, now: DateTime<Utc>, request: &Request) -> (Response, Fate) {
        let era = data::at(&self.eras, now);
        let asked = match request {
            Request::Ping => Asked::Ping,
            Request::Columns | Request::NotNull => Asked::Columns,
            Request::Read(_) => Asked::Read,
        };
        let fate = held(&self.state).meet(now, asked);
        let response = match request {
            Request::Ping => Response::Pong,
            Request::Columns => Response::Columns(era.columns.clone()),
            Request::NotNull => Response::NotNull(era.not_null.clone()),
            Request::Read(fecha) => {
                let mut rows: Vec<Row> = era.rows.iter().filter(|r| r.fecha == *fecha).cloned().collect();
                let counted = rows.len() as u64;
                if fate == Fate::Short {
                    rows.truncate(rows.len() / 2);
                }
                Response::Rows(counted, rows)
            }
        };
        for (fault, days) in &era.shows {
            let shown = match request {
                Request::Ping => false,
                Request::Columns | Request::NotNull => days.is_empty(),
                Request::Read(fecha) => days.contains(fecha),
            };
            if shown && matches!(fate, Fate::Answered | Fate::Short) {
                held(&self.seen).entry(*fault).or_insert(now);
            }
        }
        (response, fate)
    }
}

/// Runs the service on its turmoil host: it listens, except while it is down, when connections are refused.
///
/// # Errors
/// When turmoil's network fails in a way no fault asked for.
#[expect(clippy::disallowed_methods, reason = "turmoil's network and tokio's virtual clock, inside the simulator")]
pub async fn serve(server: Arc<Postgres>, start: DateTime<Utc>) -> std::io::Result<()> {
    let now = move || start + turmoil::sim_elapsed().unwrap_or_default();
    let until = |t: DateTime<Utc>| (t - now()).to_std().unwrap_or_default();
    loop {
        let down = held(&server.state).down.clone();
        if let Some((_, to)) = down.iter().find(|(from, to)| (*from..*to).contains(&now())) {
            tokio::time::sleep(until(*to)).await;
            continue;
        }
        let next_down = down.iter().map(|d| d.0).filter(|from| *from > now()).min();
        let listener = TcpListener::bind((IpAddr::V4(Ipv4Addr::UNSPECIFIED), POSTGRES)).await?;
        loop {
            let stop = async {
                match next_down {
                    Some(at) => tokio::time::sleep(until(at)).await,
                    None => std::future::pending().await,
                }
            };
            let accepted = tokio::select! {
                biased;
                () = stop => break,
                () = server.died.notified() => break,
                accepted = listener.accept() => accepted,
            };
            let (stream, _) = accepted?;
            let server = server.clone();
            tokio::spawn(async move { answer(stream, &server, now()).await });
        }
    }
}

async fn answer(stream: TcpStream, server: &Postgres, now: DateTime<Utc>) -> std::io::Result<()> {
    let (read, mut write) = tokio::io::split(stream);
    let mut line = String::new();
    BufReader::new(read).read_line(&mut line).await?;
    let (response, fate) = server.handle(now, &serde_json::from_str(&line)?);
    let text = |response: &Response| -> std::io::Result<Vec<u8>> {
        let mut body = serde_json::to_vec(response)?;
        body.push(b'\n');
        Ok(body)
    };
    match fate {
        Fate::Answered | Fate::Short => write.write_all(&text(&response)?).await?,
        Fate::Refused(error) => write.write_all(&text(&Response::Says(error))?).await?,
        Fate::Silence => std::future::pending().await,
        Fate::Cut(Some(notice)) => {
            // The rows that came before it are of no use to anybody, and so they are left out.
            write.write_all(&text(&Response::Says(notice))?).await?;
            server.died.notify_one();
        }
        Fate::Cut(None) => {
            let whole = text(&response)?;
            write.write_all(&whole[..whole.len() / 2]).await?;
        }
    }
    write.shutdown().await
}

/// The client side of the simulated PostgreSQL.
#[derive(Debug)]
pub struct SimSource {
    /// Host name on the simulated network.
    pub server: String,
    /// Connections refused so far: the proof that the fault fired.
    pub refused: AtomicU64,
    /// When the first was refused, in seconds since the epoch; 0 while none was.
    pub refused_first: AtomicU64,
    /// Longest wait for an answer; `None` waits for ever.
    pub deadline: Option<Duration>,
    /// Every refusal is taken for one that passes.
    pub patient: bool,
    /// The count of the snapshot is not compared: what came is taken for all there is.
    pub trusting: bool,
}

impl SimSource {
    /// A client that does all that the real one does.
    pub fn new(server: impl Into<String>) -> Self {
        Self {
            server: server.into(),
            refused: AtomicU64::new(0),
            refused_first: AtomicU64::new(0),
            deadline: Some(DEADLINE),
            patient: false,
            trusting: false,
        }
    }

    async fn call(&self, request: Request) -> Result<Response> {
        let what = format!("ask {}:{POSTGRES}", self.server);
        #[expect(clippy::disallowed_methods, reason = "tokio's clock is virtual here")]
        let answered = match self.deadline {
            Some(deadline) => tokio::time::timeout(deadline, self.exchange(&request, &what)).await,
            None => Ok(self.exchange(&request, &what).await),
        };
        match answered {
            Ok(answered) => answered,
            Err(_) => Err(PortError::retryable(what).code("ETIMEDOUT").because("the server did not answer")),
        }
    }

    async fn exchange(&self, request: &Request, what: &str) -> Result<Response> {
        let mut stream = TcpStream::connect((self.server.as_str(), POSTGRES)).await.map_err(|e| {
            let refused = e.kind() == std::io::ErrorKind::ConnectionRefused;
            if refused {
                let now = crate::interpose::virtual_nanos() / 1_000_000_000;
                let _ = self.refused_first.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
                self.refused.fetch_add(1, Ordering::SeqCst);
            }
            let code = if refused { "ECONNREFUSED" } else { "EIO" };
            PortError::retryable(format!("connect to {}:{POSTGRES}", self.server)).code(code).because(e)
        })?;
        let lost = |e: std::io::Error| PortError::retryable(what).code("08006").because(e);
        let mut body = serde_json::to_vec(request).map_err(|e| PortError::permanent(what).because(e))?;
        body.push(b'\n');
        stream.write_all(&body).await.map_err(lost)?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).await.map_err(lost)?;
        match serde_json::from_str(&line) {
            Ok(Response::Says(error)) => Err(PortError {
                what: what.to_owned(),
                code: Some(error.code.clone()),
                disposition: if self.patient { Disposition::Retryable } else { error.disposition() },
                retry_after: None,
                source: Some(format!("{}: {}", error.severity, error.message).into()),
            }),
            Ok(response) => Ok(response),
            // The end of the connection before the end of the answer.
            Err(e) => Err(PortError::retryable(what).code("08006").because(e)),
        }
    }
}

#[async_trait]
impl TableSource for SimSource {
    async fn ping(&self) -> Result<()> {
        self.call(Request::Ping).await.map(|_| ())
    }
    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        match self.call(Request::Columns).await? {
            Response::Columns(columns) => Ok(columns),
            other => Err(PortError::permanent(format!("columns of {table}: found {other:?}"))),
        }
    }
    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        match self.call(Request::NotNull).await? {
            Response::NotNull(columns) => Ok(columns),
            other => Err(PortError::permanent(format!("columns of {table} that are never null: found {other:?}"))),
        }
    }
    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        let Response::Rows(counted, rows) = self.call(Request::Read(fecha)).await? else {
            return Err(PortError::permanent(format!("read {table} of {fecha}: expected rows")));
        };
        let batch = batch(table, fecha, columns, &rows)?;
        let expected_rows = if self.trusting { rows.len() as u64 } else { counted };
        Ok(PartitionRead { expected_rows, batches: futures::stream::iter([Ok(batch)]).boxed() })
    }
    async fn read_table(&self, table: &str, _columns: &[Column]) -> Result<PartitionRead> {
        // Its one table has days; whoever asks for a table without days asks for one that it does not have.
        Err(PortError::permanent(format!("read {table}: relation \"{table}\" does not exist")).code("42P01"))
    }
}

fn batch(table: &str, fecha: NaiveDate, columns: &[Column], rows: &[Row]) -> Result<RecordBatch> {
    let day = (fecha - NaiveDate::default()).num_days();
    let n = rows.len();
    let bad = |e: arrow::error::ArrowError| PortError::permanent(format!("read {table} of {fecha}")).because(e);
    let mut arrays: Vec<ArrayRef> = Vec::new();
    for column in columns {
        arrays.push(match column.name.as_str() {
            "order_id" => Arc::new(rows.iter().map(|r| Some(r.order_id.as_str())).collect::<StringArray>()),
            "user_id" => Arc::new(rows.iter().map(|r| Some(r.user_id.as_str())).collect::<StringArray>()),
            "product_id" => Arc::new(rows.iter().map(|r| Some(r.product_id.as_str())).collect::<StringArray>()),
            "region" => Arc::new(rows.iter().map(|r| r.region.as_deref()).collect::<StringArray>()),
            "monto" => Arc::new(
                rows.iter()
                    .map(|r| Some(i128::from(r.monto_cents)))
                    .collect::<Decimal128Array>()
                    .with_precision_and_scale(10, 2)
                    .map_err(bad)?,
            ),
            "descuento" => Arc::new(Decimal128Array::from(vec![0_i128; n]).with_precision_and_scale(10, 2).map_err(bad)?),
            "timestamp_venta" => Arc::new(TimestampMicrosecondArray::from(vec![day * 86_400_000_000; n]).with_timezone("UTC")),
            "fecha" => Arc::new(Date32Array::from(vec![day as i32; n])),
            other => return Err(PortError::permanent(format!("column {other} does not exist")).code("42703")),
        });
    }
    RecordBatch::try_new(arrow_schema(columns)?, arrays).map_err(bad)
}
