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
//! What was decided, and why:
//!
//! - **Late is a matter between an event and its own partition.** The watermark that judges it comes from the records
//!   before it in that partition. A common watermark would make fates depend on who reads what, and when.
//! - **The clock is the append time.** An event is too far ahead when it is ahead of the broker's clock, which every replay
//!   and every worker sees alike. The topic must therefore be stamped by the broker, not by producers.
//! - **An idle partition follows, it is not left out.** It takes the others' watermark as its own promise and says so; only
//!   then does the common one move. What it brings later is judged by that promise, so the merge never meets a pane it has
//!   dropped, and a partition whose worker is dead promises nothing and holds the windows.
//! - **Partials are additions.** Both stages write additions and read them back by adding, so a transaction carries what is
//!   new and not the whole state, and the changelog and the partials are the same records.
//! - **Content is identity.** Events have no id; two that agree in every field within the horizon are one.
//!
//! The wire formats stand behind the traits [`ClickDecoder`](event::ClickDecoder) and
//! [`MetricEncoder`](window::MetricEncoder); those of Avro are in [`codec`]. Beside the job stand two sinks, each a group of
//! its own: [`eventos`] writes the clicks to the lake, [`metricas`] the output topic to the warehouse.

pub mod checkpoint;
pub mod click_task;
pub mod codec;
pub mod commit;
pub mod config;
pub mod dedup;
pub mod distinct;
pub mod event;
pub mod eventos;
pub mod evidence;
pub mod job;
pub mod merge_task;
pub mod metricas;
pub mod pane;
pub mod reconcile;
pub mod reconciliation;
pub mod reset;
pub mod sink;
pub mod status;
pub mod watermark;
pub mod window;

#[cfg(test)]
mod sink_tests;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
