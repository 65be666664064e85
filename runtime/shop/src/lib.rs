//! Real purchases of an online shop, as rows of `ventas`.
//!
//! Generated rows lack what real ones have: daily volume, seasonality, repeat buyers, heavy tails,
//! ties and zero amounts. [`cdnow`] embeds a public data set and reads it strictly.

pub mod cdnow;
pub mod clicks;
