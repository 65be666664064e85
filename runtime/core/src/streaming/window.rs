//! Windows as they are emitted: rows per kind, window and key, and the arithmetic of which windows a pane is part of.
//!
//! A window is half open, from its start to its end, and made of whole panes. Left out: the state they come from.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{
    config::{PANE_MS, StreamConfig},
    pane::Cell,
};
use crate::ports::Result;

/// Which metric a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WindowKind {
    /// One minute, per region. A day's streaming revenue is the sum over its latest revisions.
    #[serde(rename = "region_1m")]
    Region1m,
    /// One minute, per region and page.
    #[serde(rename = "page_1m")]
    Page1m,
    /// The sliding window, per region.
    #[serde(rename = "region_5m")]
    Region5m,
}

impl WindowKind {
    /// Name, as in the contract.
    pub fn name(self) -> &'static str {
        match self {
            WindowKind::Region1m => "region_1m",
            WindowKind::Page1m => "page_1m",
            WindowKind::Region5m => "region_5m",
        }
    }
}

impl fmt::Display for WindowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One revision of one window, for one key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MetricRow {
    /// Which metric.
    pub window_kind: WindowKind,
    /// First millisecond of the window, since 1970.
    pub window_start_ms: i64,
    /// First millisecond after the window.
    pub window_end_ms: i64,
    /// Region.
    pub region: String,
    /// Page, of `page_1m` only.
    pub page: Option<String>,
    /// Events of type click.
    pub clicks: u64,
    /// Events of type purchase.
    pub purchases: u64,
    /// Events of type add_to_cart.
    pub add_to_cart: u64,
    /// Sum of `monto` in cents.
    pub revenue_cents: i64,
    /// Distinct users.
    pub unique_users: u64,
    /// 0 the first time, then one more each time the row of this key is emitted again. The highest one replaces the others.
    pub revision: u32,
    /// Whether `unique_users` is a count and not an estimate.
    pub exact: bool,
}

impl MetricRow {
    pub(super) fn new(
        (window_kind, window_start_ms, window_end_ms): (WindowKind, i64, i64),
        region: &str,
        page: Option<&str>,
        mut cell: Cell,
        revision: u32,
        exact_max: usize,
    ) -> Self {
        let count = cell.users.count(exact_max);
        Self {
            window_kind,
            window_start_ms,
            window_end_ms,
            region: region.to_owned(),
            page: page.map(str::to_owned),
            clicks: cell.clicks,
            purchases: cell.purchases,
            add_to_cart: cell.add_to_cart,
            revenue_cents: cell.cents,
            unique_users: count.users,
            revision,
            exact: count.exact,
        }
    }

    /// `purchases / clicks` for display, `None` without clicks; the exact ratio is in the two counts.
    pub fn conversion_rate(&self) -> Option<f64> {
        (self.clicks > 0).then(|| self.purchases as f64 / self.clicks as f64)
    }

    /// Key of the record: all revisions of a row stay in one partition, in order.
    pub fn record_key(&self) -> Bytes {
        let page = self.page.as_deref().unwrap_or("");
        format!("{}|{}|{}|{page}", self.window_kind, self.window_start_ms, self.region).into()
    }
}

/// Encodes rows for the output topic.
#[async_trait]
pub trait MetricEncoder: fmt::Debug + Send {
    /// One value per row, in the same order.
    ///
    /// # Errors
    /// Of the schema registry, or a row that the schema cannot hold.
    async fn encode(&mut self, rows: &[MetricRow]) -> Result<Vec<Bytes>>;
}

/// Ends of the sliding windows that hold the pane which starts at `pane`, ascending.
pub fn sliding_ends(config: &StreamConfig, pane: i64) -> impl Iterator<Item = i64> + use<> {
    let slide = super::config::ms(config.slide);
    let first = pane.saturating_add(PANE_MS);
    let last = pane.saturating_add(config.sliding_ms());
    let step = usize::try_from(PANE_MS).unwrap_or(1);
    (first..=last).step_by(step).filter(move |end| end.rem_euclid(slide) == 0)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_pane_is_in_every_window_that_covers_it_and_in_no_other(minute in 0i64..10_000, length in 1u64..12, slide in 1u64..12) {
            let config = StreamConfig {
                sliding_window: Duration::from_secs(60 * length),
                slide: Duration::from_secs(60 * slide),
                ..StreamConfig::specification()
            };
            let pane = minute * PANE_MS;
            let (length, slide) = (length as i64 * PANE_MS, slide as i64 * PANE_MS);
            let naive: Vec<i64> = (0..11_000)
                .map(|k| k * slide)
                .filter(|end| end - length <= pane && pane + PANE_MS <= *end)
                .collect();
            prop_assert_eq!(sliding_ends(&config, pane).collect::<Vec<_>>(), naive);
        }
    }
}
