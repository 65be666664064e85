//! An S3-compatible server for tests: versitygw over a temporary folder.
//!
//! `SIMULACRO_S3` is the address of a server with an empty bucket, as `http://key:secret@host:port/bucket`. Without it, a
//! container is started through `SIMULACRO_PROVIDER`, the program in `tests/provider`, where `ci/test` has found a container
//! engine and an image. Without that, `versitygw` is started from the path or from Go's folder of programs, on loopback. Each
//! ends with the process that started it: a program beside it waits for the end of its standard input.
#![expect(clippy::disallowed_methods, reason = "a test starts a real server")]

use std::{
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader},
    net::{TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use object_store::aws::{AmazonS3, AmazonS3Builder, S3ConditionalPut};

const SHELL: &str = r#"
set -eu
trap '' INT
"$BIN" --quiet --port "127.0.0.1:$PORT" posix "$DIR/data" </dev/null >"$DIR/log" 2>&1 &
pid=$!
cat >/dev/null
kill "$pid" 2>/dev/null || true
wait "$pid" || true
rm -rf "$DIR"
"#;

const BUCKET: &str = "simulacro";

/// A server with one empty bucket.
#[derive(Debug)]
pub struct S3 {
    address: String,
    bucket: String,
    key: String,
    secret: String,
    shell: Option<Child>,
}

fn binary() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(std::env::var_os("GOBIN").map(PathBuf::from));
    folders.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join("go/bin")));
    folders.into_iter().map(|folder| folder.join("versitygw")).find(|file| file.exists())
}

impl S3 {
    /// The server; `None`, after a loud skip, when there is none.
    pub async fn start() -> Option<Self> {
        if let Ok(url) = std::env::var("SIMULACRO_S3") {
            return Some(Self::at(&url, None).expect("SIMULACRO_S3 is http://key:secret@host:port/bucket"));
        }
        if let (Some(program), Some(_)) = (std::env::var_os("SIMULACRO_PROVIDER"), std::env::var_os("SIMULACRO_S3_IMAGE")) {
            return Some(Self::container(&program));
        }
        let Some(bin) = binary() else {
            super::skip("an S3 server", "set SIMULACRO_S3, or go install github.com/versity/versitygw/cmd/versitygw@latest");
            return None;
        };
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        // One folder for each server: tests of one process end at different times, and each server clears up after itself.
        let dir = std::env::temp_dir().join(format!("simulacro-s3-{}-{port}", std::process::id()));
        // In the server's folder, a bucket is a folder.
        fs::create_dir_all(dir.join("data").join(BUCKET)).expect("a temporary folder");
        let (key, secret) = ("simulacro", "solo-para-pruebas");
        let shell = Command::new("sh")
            .args(["-c", SHELL])
            .envs([("ROOT_ACCESS_KEY", key), ("ROOT_SECRET_KEY", secret)])
            .env("BIN", bin)
            .env("DIR", &dir)
            .env("PORT", port.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("a shell");
        let address = format!("http://127.0.0.1:{port}");
        let server = Self { address, bucket: BUCKET.into(), key: key.into(), secret: secret.into(), shell: Some(shell) };
        for _ in 0..300 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Some(server);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("the server is not ready: {}", fs::read_to_string(dir.join("log")).unwrap_or_default());
    }

    fn at(url: &str, shell: Option<Child>) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let (credentials, rest) = rest.split_once('@')?;
        let ((key, secret), (host, bucket)) = (credentials.split_once(':')?, rest.split_once('/')?);
        let (address, bucket) = (format!("{scheme}://{host}"), bucket.to_owned());
        Some(Self { address, bucket, key: key.to_owned(), secret: secret.to_owned(), shell })
    }

    /// A server in a container. That program was asked for by name, so its failure is one of the test.
    fn container(program: &OsStr) -> Self {
        let mut child = Command::new(program)
            .arg("s3")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("start {}: {e}", program.display()));
        let mut url = String::new();
        BufReader::new(child.stdout.take().expect("standard output is a pipe")).read_line(&mut url).expect("an address");
        Self::at(url.trim(), Some(child))
            .unwrap_or_else(|| panic!("{} said {url:?}, expected http://key:secret@host:port/bucket", program.display()))
    }

    /// The bucket.
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// What a program needs to find the server.
    pub fn variables(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT", self.address.clone()),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", self.key.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.secret.clone()),
        ]
    }

    /// A client as production builds it.
    pub fn store(&self) -> AmazonS3 {
        self.builder(&self.secret).build().expect("a complete configuration")
    }

    /// A client of another bucket, which need not be there.
    pub fn store_of(&self, bucket: &str) -> AmazonS3 {
        self.builder(&self.secret).with_bucket_name(bucket).build().expect("a complete configuration")
    }

    /// A client whose secret is another one.
    pub fn store_with_wrong_secret(&self) -> AmazonS3 {
        self.builder("otra").build().expect("a complete configuration")
    }

    fn builder(&self, secret: &str) -> AmazonS3Builder {
        AmazonS3Builder::new()
            .with_endpoint(&self.address)
            .with_allow_http(true)
            .with_region("us-east-1")
            .with_bucket_name(&self.bucket)
            .with_access_key_id(&self.key)
            .with_secret_access_key(secret)
            .with_conditional_put(S3ConditionalPut::ETagMatch)
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        if let Some(mut shell) = self.shell.take() {
            drop(shell.stdin.take());
            let _ = shell.wait();
        }
    }
}
