//! The streaming job `realtime_metrics`: from clicks to revisions of windows, exactly once.
//!
//! Two stages share one consumer group and one commit protocol. The *click stage* has a task per partition of clicks: it
//! validates, recognises duplicates, decides what is late, and adds up panes of one minute. When its watermark passes a
//! pane, the pane leaves as a *partial*; a late event leaves as a partial of its own. The *merge stage* has a task per
//! partition of partials (a region's windows are one task's): it adds partials of all input partitions together, closes
//! windows when the smallest watermark passes them, and emits a revision when a partial comes later. State and fates of a
//! click partition depend on its own records only, and partials merge in any order, so any number of workers gives the
//! same windows.
//!
//! Left out: the wire formats (traits [`ClickDecoder`](event::ClickDecoder) and [`MetricEncoder`](window::MetricEncoder)),
//! and the warehouse, which loads the output topic.

pub mod checkpoint;
pub mod click_task;
pub mod commit;
pub mod config;
pub mod dedup;
pub mod distinct;
pub mod event;
pub mod job;
pub mod merge_task;
pub mod pane;
pub mod reconcile;
pub mod watermark;
pub mod window;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
