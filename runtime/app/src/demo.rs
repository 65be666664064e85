//! `simulacro demo`: the whole purchase history that ships with the program, everything embedded.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use clap::Args;
use simulacro_adapters::{CsvSource, PrometheusMetrics, connect_embedded};
use simulacro_core::{
    batch::{WAREHOUSE, strings},
    models::shipped,
    platform::Platform,
};
use simulacro_shop::cdnow;

use crate::{
    batch::run_days,
    options::{Failure, default_config, load_contract},
    report::{self, money},
    status, telemetry,
};

#[derive(Args)]
#[command(after_help = "Examples:
  simulacro demo --data /tmp/demo
  simulacro demo --data /tmp/demo --days 30 --models all")]
pub struct DemoArgs {
    /// Folder for source, lake, ledger and history
    #[arg(long, default_value = "simulacro-demo")]
    data: PathBuf,
    /// Only the first N days
    #[arg(long)]
    days: Option<usize>,
    /// Models that each day makes, as in batch run; those that read many days make it slower with each day
    #[arg(long, default_value = "metricas_diarias")]
    models: String,
    /// Address of the metrics endpoint; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    metrics: SocketAddr,
}

/// What an analyst would ask the warehouse: revenue by region.
async fn print_regions(platform: &Platform) -> Result<(), Failure> {
    let sql = format!(
        "SELECT region, CAST(sum(transacciones) AS VARCHAR) AS sales, CAST(sum(revenue_neto) AS VARCHAR) AS revenue
         FROM {WAREHOUSE} GROUP BY region ORDER BY region"
    );
    println!("by region, asked of the warehouse ({WAREHOUSE}):");
    for batch in platform.ports.warehouse.query(&sql, &[WAREHOUSE]).await? {
        let (regions, sales, revenue) = (strings(&batch, 0)?, strings(&batch, 1)?, strings(&batch, 2)?);
        for ((region, sales), revenue) in regions.iter().zip(&sales).zip(&revenue) {
            println!("  {region:<8} {sales:>7} sales {revenue:>14}");
        }
    }
    Ok(())
}

/// Runs the demo.
pub async fn run(args: DemoArgs) -> Result<(), Failure> {
    let DemoArgs { data, days, models, metrics: address } = args;
    let project = shipped()?.select(&models)?;
    let source = data.join("source");
    std::fs::create_dir_all(&source).map_err(|e| format!("create folder {}: {e}", source.display()))?;
    let purchases = cdnow::parse(cdnow::BYTES)?;
    println!("{} purchases of a real shop, written to {}", purchases.len(), source.join("ventas.csv").display());
    std::fs::write(source.join("ventas.csv"), cdnow::to_csv(&purchases))?;
    let mut all = CsvSource::open(&source)?.days("ventas")?;
    all.truncate(days.unwrap_or(usize::MAX));
    let metrics = Arc::new(PrometheusMetrics::default());
    let bound =
        telemetry::serve_metrics(address, metrics.clone()).await.map_err(|e| format!("listen on {address} for metrics: {e}"))?;
    println!("metrics while it runs: http://{bound}/metrics");
    let ports = connect_embedded(&source, &data, metrics.clone()).await?;
    let platform = Platform::new(default_config(), load_contract("cdnow")?, ports).with_models(&project)?;
    let began = platform.ports.env.now();
    let done = run_days(&platform, &all).await?;
    let seconds = (platform.ports.env.now() - began).num_milliseconds() as f64 / 1_000.0;
    if let Some((fecha, first)) = done.first() {
        let fates = first.fates.iter().map(|(fate, rows)| format!("{rows} {fate}")).collect::<Vec<_>>().join(", ");
        println!("\nfirst day {fecha}: {} rows, {fates}, revenue {}\n", first.expected, money(first.revenue_cents));
    }
    print!("{}", report::summary(&done));
    println!("{} days in {seconds:.1} s\n", done.len());
    print_regions(&platform).await?;
    std::fs::write(data.join("metrics.prom"), metrics.handle.render())?;
    println!("\nrevenue per day: {}", report::write_csv(&data, &done)?.display());
    println!("chart:           {}", report::write_chart(&data, &done)?.display());
    println!("history:         {}", data.join("history.jsonl").display());
    println!("metrics:         {}", data.join("metrics.prom").display());
    status::print_hashes(&platform).await
}
