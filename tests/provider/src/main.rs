//! Starts PostgreSQL in a container, prints its address, and removes it when standard input ends.
//!
//! A test that starts this and then dies closes the pipe, so no container outlives its test. The image is that of
//! `SIMULACRO_POSTGRES_IMAGE`, otherwise the official one; `SIMULACRO_DOCKER_NETWORK` names a network whose published ports
//! are bound to loopback, where the engine itself does not do that.

use std::{env, error::Error, process::ExitCode, time::Duration};

use testcontainers::{
    ContainerAsync, GenericImage, ImageExt,
    core::{IntoContainerPort, WaitFor},
    runners::AsyncRunner,
};
use tokio::io::{AsyncReadExt, stdin};

const IMAGE: &str = "postgres:15";
const PASSWORD: &str = "solo-para-pruebas";
const READY: &str = "database system is ready to accept connections";
const START_TIMEOUT: Duration = Duration::from_secs(90);

async fn start() -> Result<ContainerAsync<GenericImage>, Box<dyn Error>> {
    let image = env::var("SIMULACRO_POSTGRES_IMAGE").unwrap_or_else(|_| IMAGE.into());
    let (name, tag) = image.rsplit_once(':').ok_or_else(|| format!("image {image}: found no tag, expected name:tag"))?;
    // The image starts a first server, whose log is on standard output, to make the database, and then the real one.
    let mut request = GenericImage::new(name, tag)
        .with_exposed_port(5432.tcp())
        .with_wait_for(WaitFor::message_on_stdout(READY))
        .with_wait_for(WaitFor::message_on_stderr(READY))
        .with_env_var("POSTGRES_PASSWORD", PASSWORD)
        .with_startup_timeout(START_TIMEOUT)
        .with_cmd(["postgres", "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=60"]);
    if let Ok(network) = env::var("SIMULACRO_DOCKER_NETWORK") {
        request = request.with_network(network);
    }
    Ok(request.start().await?)
}

async fn serve() -> Result<(), Box<dyn Error>> {
    if env::args().nth(1).as_deref() != Some("postgres") || env::args().count() != 2 {
        return Err("usage: simulacro-test-provider postgres".into());
    }
    let container = start().await?;
    // The engine is on this machine, and its ports are published on loopback; where this runs inside a container itself, the
    // client would name the bridge.
    let port = container.get_host_port_ipv4(5432.tcp()).await?;
    println!("postgres://postgres:{PASSWORD}@127.0.0.1:{port}/postgres");
    let mut end = Vec::new();
    stdin().read_to_end(&mut end).await?;
    container.rm().await?;
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
