//! A schema registry for tests: Apicurio, with its Confluent-compatible API.
//!
//! `SIMULACRO_REGISTRY` is the base address of a registry in which the tests may make subjects, for example
//! `http://127.0.0.1:8080/apis/ccompat/v7`. Without it, Apicurio is fetched once through Maven into the user's cache, and
//! started on loopback, with its storage in memory. It ends with the process that started it, however that ends: a shell
//! beside it waits for the end of its standard input.
#![expect(clippy::disallowed_methods, reason = "a test starts a real server")]

use std::{
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use simulacro_adapters::{HttpRegistry, HttpRegistrySettings};
use simulacro_core::ports::SchemaRegistry;

const VERSION: &str = "3.0.9";

/// Fetches what is missing. Unpacks beside the final folder, so that a kill leaves no half of it.
const FETCH: &str = r#"
set -eu
[ -e "$HOME_OF/done" ] && exit 0
rm -rf "$HOME_OF.$$" && mkdir -p "$HOME_OF.$$"
mvn -B -q dependency:copy -Dartifact="io.apicurio:apicurio-registry-app:$VERSION:tar.gz:all" -DoutputDirectory="$HOME_OF.$$"
tar -xzf "$HOME_OF.$$/apicurio-registry-app-$VERSION-all.tar.gz" -C "$HOME_OF.$$"
rm "$HOME_OF.$$/apicurio-registry-app-$VERSION-all.tar.gz"
touch "$HOME_OF.$$/done"
mv -T "$HOME_OF.$$" "$HOME_OF" 2>/dev/null || rm -rf "$HOME_OF.$$"
"#;

const SERVE: &str = r#"
trap '' INT
cd "$HOME_OF"
java -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dquarkus.http.host=127.0.0.1 -Dquarkus.http.port="$PORT" \
  -jar "apicurio-registry-app-$VERSION-runner.jar" </dev/null >"$LOG" 2>&1 &
pid=$!
cat >/dev/null
kill "$pid" 2>/dev/null
wait "$pid"
"#;

/// A registry that answers.
#[derive(Debug)]
pub struct Registry {
    url: String,
    /// Keeps the server alive: its standard input closes when this process ends.
    _shell: Option<Child>,
}

fn has(program: &str) -> bool {
    Command::new(program).arg("-version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

fn cache() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    Some(base.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?.join("simulacro/services"))
}

/// A client with short waits.
pub fn client(url: &str) -> HttpRegistry {
    let settings = HttpRegistrySettings {
        url: url.to_owned(),
        credentials: None,
        connect_timeout: Duration::from_secs(5),
        timeout: Duration::from_secs(30),
    };
    HttpRegistry::new(settings).expect("a valid address")
}

impl Registry {
    async fn start() -> Option<Self> {
        let home = cache()?.join(format!("apicurio-{VERSION}"));
        if !has("java") || !(home.join("done").exists() || has("mvn")) {
            return None;
        }
        let fetched = Command::new("sh").args(["-c", FETCH]).env("HOME_OF", &home).env("VERSION", VERSION).status();
        assert!(fetched.expect("a shell").success(), "Apicurio could not be fetched through Maven");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let log = std::env::temp_dir().join(format!("simulacro-registry-{}.log", std::process::id()));
        let shell = Command::new("sh")
            .args(["-c", SERVE])
            .env("HOME_OF", &home)
            .env("VERSION", VERSION)
            .env("PORT", port.to_string())
            .env("LOG", &log)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("a shell");
        let url = format!("http://127.0.0.1:{port}/apis/ccompat/v7");
        let (client, begun) = (client(&url), Instant::now());
        loop {
            match client.versions("nobody").await {
                Err(e) if e.code.as_deref() == Some("40401") => return Some(Self { url, _shell: Some(shell) }),
                answer if begun.elapsed() > Duration::from_secs(180) => {
                    panic!("the registry is not ready: {answer:?}\n{}", fs::read_to_string(&log).unwrap_or_default())
                }
                Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(250)).await,
            }
        }
    }

    /// The base address of the one registry that all tests share; `None`, after a loud skip, when there is none.
    pub async fn shared_url() -> Option<String> {
        static SHARED: tokio::sync::OnceCell<Option<Registry>> = tokio::sync::OnceCell::const_new();
        let shared = SHARED.get_or_init(|| async {
            match std::env::var("SIMULACRO_REGISTRY") {
                Ok(url) => Some(Self { url, _shell: None }),
                Err(_) => Self::start().await,
            }
        });
        let shared = shared.await.as_ref();
        if shared.is_none() {
            super::skip("the schema registry", "set SIMULACRO_REGISTRY, or install Java 17 and Maven");
        }
        shared.map(|registry| registry.url.clone())
    }

    /// A client of it.
    pub async fn shared() -> Option<HttpRegistry> {
        Self::shared_url().await.as_deref().map(client)
    }
}
