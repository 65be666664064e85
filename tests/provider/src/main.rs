//! Starts a service in a container, prints its address, and removes it when standard input ends.
//!
//! A test that starts this and then dies closes the pipe, so no container outlives its test. The images are those of
//! `SIMULACRO_POSTGRES_IMAGE` and `SIMULACRO_S3_IMAGE`, otherwise the official ones; `SIMULACRO_DOCKER_NETWORK` names a network
//! whose published ports are bound to loopback, where the engine itself does not do that.

use std::{env, error::Error, process::ExitCode, time::Duration};

use testcontainers::{
    ContainerAsync, ContainerRequest, GenericImage, ImageExt,
    core::{IntoContainerPort, WaitFor},
    runners::AsyncRunner,
};
use tokio::io::{AsyncReadExt, stdin};

const PASSWORD: &str = "solo-para-pruebas";
const START_TIMEOUT: Duration = Duration::from_secs(90);
const BUCKET: &str = "simulacro";

/// A container that is not started yet, its port, and what its address begins and ends with.
struct Service {
    request: ContainerRequest<GenericImage>,
    port: u16,
    before: String,
    after: &'static str,
}

fn image(variable: &str, official: &str) -> Result<GenericImage, Box<dyn Error>> {
    let image = env::var(variable).unwrap_or_else(|_| official.into());
    let (name, tag) = image.rsplit_once(':').ok_or_else(|| format!("image {image}: found no tag, expected name:tag"))?;
    Ok(GenericImage::new(name, tag))
}

fn postgres() -> Result<Service, Box<dyn Error>> {
    const READY: &str = "database system is ready to accept connections";
    // The image starts a first server, whose log is on standard output, to make the database, and then the real one.
    let request = image("SIMULACRO_POSTGRES_IMAGE", "postgres:15")?
        .with_exposed_port(5432.tcp())
        .with_wait_for(WaitFor::message_on_stdout(READY))
        .with_wait_for(WaitFor::message_on_stderr(READY))
        .with_env_var("POSTGRES_PASSWORD", PASSWORD)
        .with_cmd(["postgres", "-c", "fsync=off", "-c", "full_page_writes=off", "-c", "max_connections=60"]);
    Ok(Service { request, port: 5432, before: format!("postgres://postgres:{PASSWORD}@"), after: "/postgres" })
}

/// An S3-compatible server with one empty bucket: its buckets are folders, and the engine makes the working folder.
fn s3() -> Result<Service, Box<dyn Error>> {
    let request = image("SIMULACRO_S3_IMAGE", "versity/versitygw:v1.8.0")?
        .with_exposed_port(7070.tcp())
        .with_wait_for(WaitFor::message_on_stdout("7070"))
        .with_env_var("ROOT_ACCESS_KEY", "simulacro")
        .with_env_var("ROOT_SECRET_KEY", PASSWORD)
        .with_working_dir(format!("/data/{BUCKET}"))
        .with_cmd(["--port", ":7070", "posix", "/data"]);
    Ok(Service { request, port: 7070, before: format!("http://simulacro:{PASSWORD}@"), after: "/simulacro" })
}

async fn start(service: Service) -> Result<(ContainerAsync<GenericImage>, String), Box<dyn Error>> {
    let Service { mut request, port, before, after } = service;
    request = request.with_startup_timeout(START_TIMEOUT);
    if let Ok(network) = env::var("SIMULACRO_DOCKER_NETWORK") {
        request = request.with_network(network);
    }
    let container = request.start().await?;
    // The engine is on this machine, and its ports are published on loopback; where this runs inside a container itself, the
    // client would name the bridge.
    let port = container.get_host_port_ipv4(port.tcp()).await?;
    Ok((container, format!("{before}127.0.0.1:{port}{after}")))
}

async fn serve() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let service = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["postgres"] => postgres()?,
        ["s3"] => s3()?,
        _ => return Err("usage: simulacro-test-provider postgres|s3".into()),
    };
    let (container, address) = start(service).await?;
    println!("{address}");
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
