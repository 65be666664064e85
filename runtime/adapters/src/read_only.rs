//! The platform as somebody who only looks has it: nothing is created, nothing is appended, and what would write is refused.

use std::{collections::BTreeSet, fmt, ops::Range, path::Path as FilePath, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use chrono::NaiveDate;
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, local::LocalFileSystem, path::Path,
};
use simulacro_core::{
    history::{Event, HistorySink, RecordedStore, Recorder},
    ports::{Column, PartitionRead, PortError, Result, TableSource},
};

use crate::{SystemEnv, kept_store, open_store};

/// A store that refuses every write, whatever is asked of it above.
#[derive(Debug)]
pub struct ReadOnlyStore(pub Arc<dyn ObjectStore>);

impl fmt::Display for ReadOnlyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "read only({})", self.0)
    }
}

fn refused(path: &Path) -> StoreError {
    StoreError::PermissionDenied { path: path.to_string(), source: "this command only reads".into() }
}

#[async_trait]
impl ObjectStore for ReadOnlyStore {
    async fn put_opts(&self, location: &Path, _: PutPayload, _: PutOptions) -> object_store::Result<PutResult> {
        Err(refused(location))
    }
    async fn put_multipart_opts(
        &self,
        location: &Path,
        _: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        Err(refused(location))
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        self.0.get_opts(location, options).await
    }
    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> object_store::Result<Vec<Bytes>> {
        self.0.get_ranges(location, ranges).await
    }
    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        locations.map(|location| location.and_then(|l| Err(refused(&l)))).boxed()
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.0.list(prefix)
    }
    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.0.list_with_offset(prefix, offset)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, _: &Path, to: &Path, _: CopyOptions) -> object_store::Result<()> {
        Err(refused(to))
    }
    async fn rename_opts(&self, _: &Path, to: &Path, _: RenameOptions) -> object_store::Result<()> {
        Err(refused(to))
    }
}

/// Forgets every event: looking leaves no trace in the history of the runs.
#[derive(Debug)]
pub struct NoHistory;

impl HistorySink for NoHistory {
    fn append(&self, _: Event) {}
}

/// The source of a command that reads none.
#[derive(Debug)]
pub struct NoSource;

fn none(what: &str) -> PortError {
    PortError::permanent(format!("{what}: found no source, expected --source or --postgres"))
}

#[async_trait]
impl TableSource for NoSource {
    async fn ping(&self) -> Result<()> {
        Err(none("ask the source"))
    }
    async fn columns(&self, table: &str) -> Result<Vec<Column>> {
        Err(none(&format!("read the columns of {table}")))
    }
    async fn read_day(&self, table: &str, fecha: NaiveDate, _: &[Column]) -> Result<PartitionRead> {
        Err(none(&format!("read {fecha} of {table}")))
    }
    async fn not_null(&self, table: &str) -> Result<Option<BTreeSet<String>>> {
        Err(none(&format!("read the columns of {table}")))
    }
    async fn read_table(&self, table: &str, _: &[Column]) -> Result<PartitionRead> {
        Err(none(&format!("read {table}")))
    }
}

/// The lake of a data folder, for reading. The folder must be there.
///
/// # Errors
/// `Permanent` with code `ENOENT`, naming the folder or file that is not there.
pub fn open_lake(data: &FilePath) -> Result<Arc<dyn ObjectStore>> {
    let missing = |what: String| {
        PortError::permanent(format!("open {}: found no {what}, expected the data folder of a run", data.display()))
            .code("ENOENT")
    };
    if !data.is_dir() {
        return Err(missing("such folder".into()));
    }
    let store: Arc<dyn ObjectStore> = match kept_store(data)? {
        Some(url) => open_store(&url)?,
        None => {
            let lake = data.join("lake");
            if !lake.is_dir() {
                return Err(missing("folder lake in it".into()));
            }
            let cannot = |e| PortError::permanent(format!("open folder {}", lake.display())).because(e);
            Arc::new(LocalFileSystem::new_with_prefix(&lake).map_err(cannot)?)
        }
    };
    // delta-rs needs lists in order of path, which a local folder does not promise.
    let recorder = Recorder::new(Arc::new(SystemEnv::default()), Arc::new(NoHistory));
    Ok(Arc::new(RecordedStore { inner: Arc::new(ReadOnlyStore(store)), recorder }))
}
