//! What needs no server: a folder whose tables are CSV or Parquet files, or an SQLite database.

use std::path::Path;

use async_trait::async_trait;
use chrono::NaiveDate;
use simulacro_core::ports::{Column, PartitionRead, PortError, Result, TableSource};

use crate::{CsvSource, ParquetSource, SqliteSource};

/// The source.
#[derive(Debug)]
pub enum EmbeddedSource {
    /// A folder; each table is one file, of either kind.
    Folder {
        /// Tables as CSV.
        csv: CsvSource,
        /// Tables as Parquet.
        parquet: ParquetSource,
    },
    /// A database file.
    Sqlite(SqliteSource),
}

impl EmbeddedSource {
    /// Opens a folder, whose CSV files are read whole, or a database file.
    ///
    /// # Errors
    /// `Permanent`, naming the file and what was expected, also for a table that is there twice.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Ok(Self::Sqlite(SqliteSource::open(path)?));
        }
        let (csv, parquet) = (CsvSource::open(path)?, ParquetSource::open(path)?);
        if let Some(twice) = parquet.tables().find(|table| csv.has(table)) {
            let place = path.display();
            return Err(PortError::permanent(format!("read {place}: found {twice}.csv and {twice}.parquet, expected one")));
        }
        Ok(Self::Folder { csv, parquet })
    }

    /// The days of a table, in order.
    ///
    /// # Errors
    /// `Permanent` when there is no such table or its days cannot be read.
    pub async fn days(&self, table: &str) -> Result<Vec<NaiveDate>> {
        match self {
            Self::Folder { parquet, .. } if parquet.tables().any(|t| t == table) => parquet.days(table).await,
            Self::Folder { csv, .. } => csv.days(table),
            Self::Sqlite(sqlite) => sqlite.days(table).await,
        }
    }

    fn of(&self, table: &str) -> &dyn TableSource {
        match self {
            Self::Folder { parquet, .. } if parquet.tables().any(|t| t == table) => parquet,
            Self::Folder { csv, .. } => csv,
            Self::Sqlite(sqlite) => sqlite,
        }
    }
}

#[async_trait]
impl TableSource for EmbeddedSource {
    async fn ping(&self) -> Result<()> {
        match self {
            Self::Folder { parquet, .. } => parquet.ping().await,
            Self::Sqlite(sqlite) => sqlite.ping().await,
        }
    }

    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        self.of(table).columns(table).await
    }

    async fn not_null(&self, table: &str) -> Result<Option<std::collections::BTreeSet<String>>> {
        self.of(table).not_null(table).await
    }

    async fn read_day(&self, table: &str, fecha: NaiveDate, columns: &[Column]) -> Result<PartitionRead> {
        self.of(table).read_day(table, fecha, columns).await
    }

    async fn read_table(&self, table: &str, columns: &[Column]) -> Result<PartitionRead> {
        self.of(table).read_table(table, columns).await
    }
}
