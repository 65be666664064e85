//! What commands share: where data comes from and goes to, the contract, the configuration, and how each is read.
//!
//! Everything that can be wrong in an argument is told before anything is written; the error names the argument's value.

use std::{
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use chrono::NaiveDate;
use clap::Args;
use simulacro_adapters::{
    CopyReader, EmbeddedSource, FolderDimensions, HttpDimensions, HttpDimensionsSettings, NaiveTimestamps, PostgresServer,
    PostgresSource, PostgresSourceConfig, PrometheusMetrics, connect_folder, keep_store,
};
use simulacro_core::{
    contract::{Contract, catalogue},
    dimensions::{Dimension, from_tables::FromTables, paged::PageLimits},
    models::{Project, nearest, shipped},
    orchestrator::{RetryPolicy, SourcePolicy},
    platform::Config,
    ports::{DimensionApi, NoDimensions, Ports, TableSource},
};
use simulacro_lakehouse::copy::CopyLimits;

use crate::config::given;

/// Why a command ended.
pub type Failure = Box<dyn std::error::Error>;

/// The contract of the purchases that ship with the program, by the name that `--contract` takes; those of the reference
/// platform go by their table.
const CDNOW: (&str, &str) = ("cdnow", include_str!("../../../contracts/odcs/cdnow/ventas.yaml"));

/// Most customers that are read at once: ten times the platform's.
const CUSTOMERS_MAX: u64 = 5_000_000;

/// The source of the sales.
#[derive(Args, Debug, Clone)]
pub struct SourceArgs {
    /// Folder with ventas.csv or ventas.parquet, or an SQLite database with a table ventas
    #[arg(long, required_unless_present = "postgres", conflicts_with = "postgres")]
    pub source: Option<PathBuf>,
    /// A PostgreSQL server as source, for example postgres://lector@db.local:5432/tienda; the password comes from PGPASSWORD
    /// or the password file
    #[arg(long)]
    pub postgres: Option<String>,
    /// Schema of the source table in PostgreSQL
    #[arg(long, default_value = "public")]
    pub schema: String,
    /// Connections that read one day from PostgreSQL
    #[arg(long, default_value = "2")]
    pub connections: NonZeroUsize,
    /// Base address of the dimension API, for example http://dimensiones.local/v1; its token comes from the variable
    /// SIMULACRO_DIMENSIONS_TOKEN. Customers then come from the source. A folder's own productos.csv and clientes.csv need no API
    #[arg(long)]
    pub dimensions: Option<String>,
    /// Read customers and products from the tables clientes and productos beside the sales
    #[arg(long, requires = "postgres", conflicts_with = "dimensions")]
    pub dimension_tables: bool,
    /// What the API offers; may be given more than once. Without it inventario, precios and productos
    #[arg(long, value_parser = ["inventario", "precios", "productos"])]
    pub dimension: Vec<String>,
}

/// Where tables and raw objects are kept.
#[derive(Args, Debug, Clone, Default)]
pub struct StoreArgs {
    /// Where the lake is, for example s3://bucket or s3://bucket/folder, with the usual AWS_ variables; without it in the data
    /// folder. The data folder remembers it, so that later commands need not say it
    #[arg(long)]
    pub store: Option<String>,
}

/// What a day is judged by and how it is run.
#[derive(Args, Debug, Clone)]
pub struct RunArgs {
    /// TOML of a whole platform, or with source_policy, retry, alert_after_s and startup_s alone
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// A contract that ships with the program (cdnow, ventas) or a file
    #[arg(long, default_value = "cdnow")]
    pub contract: String,
    /// Models that each day makes: all, or names with a + before for what they read or after for what reads them
    #[arg(long, default_value = "all")]
    pub models: String,
}

/// A source that has been opened.
pub struct Source {
    /// The tables.
    pub tables: Arc<dyn TableSource>,
    /// The files, where it is some: they know their days.
    pub files: Option<Arc<EmbeddedSource>>,
    /// Customers and products.
    pub dimensions: Arc<dyn DimensionApi>,
}

impl SourceArgs {
    /// Opens the source: a folder is read, a server is not asked yet.
    ///
    /// # Errors
    /// When the folder cannot be read, or the address is none.
    pub fn open(&self) -> Result<Source, Failure> {
        let (tables, files): (Arc<dyn TableSource>, _) = match (&self.postgres, &self.source) {
            (Some(url), _) => {
                let server = PostgresServer::parse(url, &self.schema)?;
                (Arc::new(PostgresSource::new(server, postgres_config(self.connections))), None)
            }
            (None, Some(path)) => {
                let files = Arc::new(EmbeddedSource::open(path)?);
                (files.clone(), Some(files))
            }
            (None, None) => return Err("source: found neither --source nor --postgres, expected one of them".into()),
        };
        let from_tables = |dimensions: &[Dimension], rest: Arc<dyn DimensionApi>| {
            let names = dimensions.iter().map(|d| d.name().to_owned()).collect();
            Arc::new(FromTables { tables: tables.clone(), names, rest, rows_max: CUSTOMERS_MAX })
        };
        let dimensions: Arc<dyn DimensionApi> = match (&self.dimensions, &self.source) {
            _ if self.dimension_tables => from_tables(&[Dimension::Clientes, Dimension::Productos], Arc::new(NoDimensions)),
            (Some(url), _) => {
                let api = HttpDimensions::new(dimension_settings(url, &self.dimension))?;
                from_tables(&[Dimension::Clientes], Arc::new(api))
            }
            (None, Some(folder)) => Arc::new(FolderDimensions::open(folder)?),
            (None, None) => Arc::new(NoDimensions),
        };
        Ok(Source { tables, files, dimensions })
    }
}

impl Source {
    /// Connects a platform over this source, with its lake, ledger and history.
    ///
    /// # Errors
    /// Those of [`connect_folder`], and for a lake that is elsewhere than the data folder remembers.
    pub async fn connect(&self, store: &StoreArgs, data: &Path, metrics: Arc<PrometheusMetrics>) -> Result<Ports, Failure> {
        if let Some(url) = &store.store {
            keep_store(data, url)?;
        }
        let ports = connect_folder(self.tables.clone(), data, metrics).await?;
        Ok(Ports { dimensions: self.dimensions.clone(), ..ports })
    }

    /// The days of a table, for a source that can tell them.
    ///
    /// # Errors
    /// For a server, which is asked for one day at a time.
    pub async fn days(&self, table: &str) -> Result<Vec<NaiveDate>, Failure> {
        match &self.files {
            Some(files) => Ok(files.days(table).await?),
            None => Err("days: found a PostgreSQL source without --date, expected the day to run".into()),
        }
    }
}

impl RunArgs {
    /// Reads configuration, contract and models.
    ///
    /// # Errors
    /// For a file that cannot be read, or a name that nothing has.
    pub fn load(&self) -> Result<(Config, Contract, Project), Failure> {
        Ok((load_config(self.config.as_deref())?, load_contract(&self.contract)?, shipped()?.select(&self.models)?))
    }
}

/// How a day is read from PostgreSQL: bounded in memory, whatever the day's size.
pub fn postgres_config(connections: NonZeroUsize) -> PostgresSourceConfig {
    const RANGE_ROWS: NonZeroUsize = NonZeroUsize::new(65_536).expect("above zero");
    const QUEUED_BATCHES: NonZeroUsize = NonZeroUsize::new(8).expect("above zero");
    PostgresSourceConfig {
        connections,
        range_rows: RANGE_ROWS,
        queued_batches: QUEUED_BATCHES,
        reader: CopyReader::InPlace,
        naive_timestamps: NaiveTimestamps::Utc,
        limits: CopyLimits::STANDARD,
    }
}

/// How the dimension API is asked, with waits that end well before the next round.
pub fn dimension_settings(url: &str, offered: &[String]) -> HttpDimensionsSettings {
    let all = || [Dimension::Inventario, Dimension::Precios, Dimension::Productos].map(|d| d.name().to_owned()).to_vec();
    HttpDimensionsSettings {
        url: url.to_owned(),
        token: std::env::var("SIMULACRO_DIMENSIONS_TOKEN").ok(),
        offered: if offered.is_empty() { all() } else { offered.to_vec() },
        connect_timeout: Duration::from_secs(10),
        call_timeout: Duration::from_secs(30),
        fetch_timeout: Duration::from_secs(300),
        page_bytes_max: 16 << 20,
        limits: PageLimits::STANDARD,
    }
}

/// How the platform behaves where nobody says otherwise.
pub fn default_config() -> Config {
    Config {
        source_policy: SourcePolicy::Wait { every_s: 60, deadline_s: 9_000 },
        retry: RetryPolicy { retries: 3, backoff_s: 300, deadline_s: 9_000 },
        alert_after_s: simulacro_core::assets::ALERT_AFTER_S,
        startup_s: 0,
    }
}

/// Reads a file of the user; the error names it.
pub fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|e| format!("read {}: {e}", path.display()).into())
}

/// A contract that ships, by its name, or one in a file.
///
/// # Errors
/// When there is neither, with the nearest name; or when the file is no contract.
pub fn load_contract(name: &str) -> Result<Contract, Failure> {
    if name == CDNOW.0 {
        return Ok(Contract::parse(name, CDNOW.1)?);
    }
    let shipped = || catalogue::FILES.iter().map(|(file, _)| file.trim_end_matches(".yaml"));
    if let Some((file, text)) = catalogue::FILES.iter().find(|(file, _)| file.trim_end_matches(".yaml") == name) {
        return Ok(Contract::parse(file, text)?);
    }
    if !Path::new(name).exists() && !name.contains(['/', '.']) {
        let near = nearest(name, shipped().chain([CDNOW.0])).map(|n| format!("; did you mean {n}?")).unwrap_or_default();
        let known = shipped().chain([CDNOW.0]).collect::<Vec<_>>().join(", ");
        return Err(format!("contract {name}: found no such file, expected a file or one of {known}{near}").into());
    }
    Ok(Contract::parse(name, &read(Path::new(name))?)?)
}

/// The configuration in a file of this command's own, or that of the whole platform, or the default.
///
/// # Errors
/// When the file cannot be read, or has a key that is not known.
pub fn load_config(path: Option<&Path>) -> Result<Config, Failure> {
    match path {
        None => Ok(given().config()),
        Some(path) => toml::from_str(&read(path)?).map_err(|e| format!("config {}: {e}", path.display()).into()),
    }
}
