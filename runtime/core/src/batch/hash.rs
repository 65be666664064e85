//! Hashes by which two runs are compared: of the rows of a raw day in any order, and of a Delta table by its key.

use arrow::{
    array::{Array, RecordBatch},
    util::display::{ArrayFormatter, FormatOptions},
};
use sha2::{Digest, Sha256};

use super::{MART, QUARANTINE, STAGING};
use crate::ports::{Input, Lakehouse, PortError, Query, Result};

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Calls `visit` with each row as one unambiguous text.
pub(crate) fn each_row(batch: &RecordBatch, mut visit: impl FnMut(&str)) -> Result<()> {
    let options = FormatOptions::default();
    let columns = batch
        .columns()
        .iter()
        .map(|c| ArrayFormatter::try_new(c, &options))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| PortError::permanent("format rows for hashing").because(e))?;
    let mut text = String::new();
    for row in 0..batch.num_rows() {
        text.clear();
        for (array, formatter) in batch.columns().iter().zip(&columns) {
            // The length in front keeps ("a|b") apart from ("a", "b"), and null apart from "".
            if array.is_null(row) {
                text.push_str("-;");
            } else {
                let value = formatter.value(row).to_string();
                text.push_str(&format!("{}:{value};", value.len()));
            }
        }
        visit(&text);
    }
    Ok(())
}

/// Order-free hash of rows: the sum of the rows' sha256 in four 64-bit lanes, so that duplicates count.
#[derive(Debug, Default)]
pub(crate) struct OrderFreeHash([u64; 4]);

impl OrderFreeHash {
    pub(crate) fn add(&mut self, row: &str) {
        let digest = Sha256::digest(row.as_bytes());
        for (lane, chunk) in self.0.iter_mut().zip(digest.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(chunk);
            *lane = lane.wrapping_add(u64::from_le_bytes(word));
        }
    }
    pub(crate) fn finish(&self) -> String {
        hex(&self.0.iter().flat_map(|l| l.to_be_bytes()).collect::<Vec<_>>())
    }
}

/// The canonical hash of a Delta table: sha256 over its rows sorted by key, without times of processing.
///
/// # Errors
/// When the table cannot be read.
pub async fn canonical_hash(lakehouse: &dyn Lakehouse, table: &str) -> Result<String> {
    let (columns, order) = match table {
        MART => (
            "fecha, region, segmento_cliente, revenue_bruto, revenue_neto, descuentos_total, transacciones, usuarios_unicos, ticket_promedio, tasa_conversion",
            "fecha, region, segmento_cliente",
        ),
        STAGING => (
            "order_id, user_id, product_id, monto_bruto, descuento, monto_neto, region, timestamp_venta, fecha, _source_hash",
            "order_id",
        ),
        QUARANTINE => (
            "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, _source_hash, fate, clause",
            "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha, fate, clause",
        ),
        other => {
            return Err(PortError::permanent(format!(
                "hash {other}: found an unknown table, expected one of {STAGING}, {QUARANTINE}, {MART}"
            )));
        }
    };
    let query = Query {
        sql: format!("SELECT {columns} FROM t ORDER BY {order}"),
        inputs: vec![("t".into(), Input::Delta(table.into()))],
    };
    let mut hash = Sha256::new();
    for batch in lakehouse.query(&query).await? {
        each_row(&batch, |row| {
            hash.update(row.as_bytes());
            hash.update(b"\n");
        })?;
    }
    Ok(hex(&hash.finalize()))
}
