//! Targets that need the whole program: adapters over files and sockets, and the simulator's scenarios.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener},
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use futures::TryStreamExt as _;
use parquet::arrow::ArrowWriter;
use simulacro_adapters::{CsvSource, FolderDimensions, HttpRegistry, HttpRegistrySettings, ParquetSource};
use simulacro_core::{
    dimensions::decode::{Cell, Rows},
    ports::{Column, Compatibility, DimensionApi as _, PortError, SchemaRegistry as _, TableSource as _},
};
use simulacro_sim::scenario::Story;

use crate::targets::Target;

/// See [`crate::targets::TARGETS`] for the others.
pub const TARGETS: [Target; 5] = [
    Target { name: "csv_table", run: csv_table, seeds: csv_seeds, per_byte: 1_024, cases: 500 },
    Target { name: "dimension_csv", run: dimension_csv, seeds: csv_seeds, per_byte: 1_024, cases: 500 },
    Target { name: "parquet_table", run: parquet_table, seeds: parquet_seeds, per_byte: 65_536, cases: 300 },
    Target { name: "registry_answer", run: registry_answer, seeds: registry_answer_seeds, per_byte: 256, cases: 200 },
    Target { name: "scenario", run: scenario, seeds: scenario_seeds, per_byte: 1_024, cases: 1_000 },
];

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
}

/// A table of a folder.
fn csv_table(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("ventas.csv"), data).expect("a file");
    let source = match CsvSource::open(folder.path()) {
        Ok(source) => source,
        Err(error) => return assert!(error.to_string().contains("ventas.csv"), "{}", error.chain()),
    };
    let Ok(columns) = wait(source.columns("ventas")) else { return };
    for fecha in source.days("ventas").expect("the table is there") {
        if let Err(error) = wait(source.read_day("ventas", fecha, &columns)) {
            assert!(error.to_string().contains("ventas"), "{}", error.chain());
        }
    }
}

/// A table of a folder, as Parquet. A batch may be refused when it is read.
fn parquet_table(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("ventas.parquet"), data).expect("a file");
    let source = ParquetSource::open(folder.path()).expect("the folder is read");
    wait(async {
        let columns = source.columns("ventas").await?;
        for fecha in source.days("ventas").await? {
            let read = source.read_day("ventas", fecha, &columns).await?;
            read.batches.try_collect::<Vec<_>>().await?;
        }
        Ok(())
    })
    .unwrap_or_else(|error: PortError| assert!(error.to_string().contains("ventas.parquet"), "{}", error.chain()));
}

fn parquet_seeds() -> Vec<Vec<u8>> {
    let columns = ["order_id", "fecha"].map(|name| if name == "fecha" { (name, "date") } else { (name, "string") });
    let columns = columns.map(|(name, kind)| Column { name: name.into(), physical_type: kind.into() });
    let mut rows = Rows::new(&columns).expect("types of contracts");
    for (at, value) in [(0, "o-1"), (1, "1997-01-01"), (0, "o-2"), (1, "1997-01-02")] {
        rows.push(at, Cell::Text(value)).expect("it fits");
        if at == 1 {
            rows.end_row();
        }
    }
    let batch = rows.finish().expect("each row has each column");
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("written");
    writer.close().expect("written");
    vec![file]
}

/// A dimension of a folder.
fn dimension_csv(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("productos.csv"), data).expect("a file");
    let dimensions = FolderDimensions::open(folder.path()).expect("the folder has one file");
    let column = |name: &str, kind: &str| Column { name: name.into(), physical_type: kind.into() };
    let columns = [column("order_id", "string"), column("monto", "decimal(10,2)"), column("fecha", "date")];
    if let Err(error) = wait(dimensions.fetch("productos", &columns, None)) {
        assert!(error.to_string().contains("productos"), "{}", error.chain());
    }
}

fn csv_seeds() -> Vec<Vec<u8>> {
    let good = "order_id,monto,fecha\no-1,12.34,1997-01-01\n\"o,2\",,1997-01-02\n";
    vec![good.into(), "order_id,monto,fecha\r\n\"a\"\"b\",-0.5,1997-12-31\r\n".into(), "order_id,monto,fecha\n".into()]
}

/// The body that the service below answers with next.
static BODY: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// A service on loopback that answers every request with [`BODY`]. Its first byte says which status goes with it.
fn service() -> SocketAddr {
    static ADDRESS: OnceLock<SocketAddr> = OnceLock::new();
    *ADDRESS.get_or_init(|| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { continue };
                let mut asked = Vec::new();
                let mut buffer = [0; 4_096];
                // A request without a body ends with its head; one with a body is answered without waiting for the rest.
                while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
                    match stream.read(&mut buffer) {
                        Ok(1..) => asked.extend_from_slice(&buffer),
                        Ok(0) | Err(_) => break,
                    }
                }
                let body = BODY.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let (status, body) = body.split_first().unwrap_or((&0, &[]));
                let status = [200, 200, 404, 409, 422, 500][usize::from(status % 6)];
                let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
                let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
            }
        });
        address
    })
}

/// An answer of a registry, to each question.
fn registry_answer(data: &[u8]) {
    *BODY.lock().unwrap_or_else(PoisonError::into_inner) = data.to_vec();
    let settings = HttpRegistrySettings {
        url: format!("http://{}", service()),
        credentials: None,
        connect_timeout: Duration::from_secs(10),
        timeout: Duration::from_secs(10),
    };
    let registry = HttpRegistry::new(settings).expect("a client");
    wait(async {
        let errors = [
            registry.schema(1).await.err(),
            registry.latest("s").await.err(),
            registry.versions("s").await.err(),
            registry.compatibility("s").await.err(),
            registry.set_compatibility("s", Compatibility::Full).await.err(),
        ];
        for error in errors.into_iter().flatten() {
            assert!(!error.to_string().is_empty() && error.code.is_some(), "{}", error.chain());
        }
    });
}

fn registry_answer_seeds() -> Vec<Vec<u8>> {
    [
        &b"\0{\"schema\":\"\\\"string\\\"\"}"[..],
        b"\0{\"id\":1,\"version\":2,\"schema\":\"\\\"string\\\"\"}",
        b"\0[1,2,3]",
        b"\0{\"compatibilityLevel\":\"FULL\"}",
        b"\x02{\"error_code\":40401,\"message\":\"no subject\"}",
        b"\x05<html>",
    ]
    .map(<[u8]>::to_vec)
    .to_vec()
}

/// A story of the simulator.
fn scenario(data: &[u8]) {
    match Story::parse(&String::from_utf8_lossy(data)) {
        Ok(story) => {
            let text = story.to_toml().expect("what was read can be written");
            let again = Story::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
            assert_eq!(again.to_toml().ok(), Some(text));
        }
        Err(error) => assert!(!error.is_empty()),
    }
}

fn scenario_seeds() -> Vec<Vec<u8>> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let folders = ["batch", "incidents", "negative", "found", "streaming"].map(|folder| root.join(folder));
    let mut files: Vec<_> =
        folders.iter().filter_map(|f| std::fs::read_dir(f).ok()).flatten().flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.iter().filter_map(|path| std::fs::read(path).ok()).collect()
}
