//! What `simulacro stream` writes beside the windows: every click to the lake, and the windows to the warehouse.

use std::sync::atomic::{AtomicBool, Ordering};

use clap::ValueEnum;
use simulacro_core::{
    platform::Platform,
    ports::PortError,
    streaming::{config::StreamConfig, eventos::EVENTOS, metricas::METRICAS},
};

use crate::{
    Failure,
    supervise::{EnvClock, Restarts, supervise},
};

/// Where something is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum SinkName {
    /// Every click, as raw eventos.
    Lake,
    /// The windows, as realtime.metricas_clicks.
    Warehouse,
    /// Nowhere.
    None,
}

impl SinkName {
    /// The table that is written.
    pub fn table(self) -> &'static str {
        match self {
            Self::Lake => EVENTOS,
            Self::Warehouse => METRICAS,
            Self::None => "nowhere",
        }
    }
}

/// The sinks that the arguments ask for.
pub fn chosen(asked: Option<&[SinkName]>, is_kafka: bool) -> Result<Vec<SinkName>, Failure> {
    let mut names = match asked {
        Some(names) => names.to_vec(),
        None if is_kafka => Vec::new(),
        None => vec![SinkName::Lake, SinkName::Warehouse],
    };
    names.sort();
    names.dedup();
    if names.len() > 1 && names.contains(&SinkName::None) {
        return Err("read --sinks: found none beside others, expected it alone".into());
    }
    names.retain(|name| *name != SinkName::None);
    Ok(names)
}

/// How sinks are told to end.
#[derive(Debug, Default)]
pub struct Ending {
    /// As soon as what is held is written.
    pub now: AtomicBool,
    /// When everything that is in the topics is written.
    pub drained: AtomicBool,
}

/// A sink, and its successors when it fails; says how many rows the last of them wrote.
pub async fn keep_writing(
    platform: &Platform,
    config: &StreamConfig,
    name: SinkName,
    env: &EnvClock,
    ending: &Ending,
    limits: Restarts,
) -> Result<(SinkName, u64), PortError> {
    let once = || write(platform, config, name, ending);
    supervise(name.table(), env, &ending.now, limits, once).await.map(|rows| (name, rows))
}

async fn write(platform: &Platform, config: &StreamConfig, name: SinkName, ending: &Ending) -> Result<u64, PortError> {
    let mut sink = match name {
        SinkName::Lake => platform.eventos_sink(config, "sink-0").await?,
        SinkName::Warehouse => platform.metricas_sink(config, "sink-0").await?,
        SinkName::None => return Ok(0),
    };
    while !ending.now.load(Ordering::Relaxed) {
        if !ending.drained.load(Ordering::Relaxed) {
            sink.step().await?;
        } else if sink.drain().await? {
            break;
        }
    }
    sink.close().await?;
    Ok(sink.rows())
}
