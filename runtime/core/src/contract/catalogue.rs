//! The contracts and seed lists that ship with the program, as their files say.
//!
//! A test compares both tables with the folders, so no file is forgotten. What is left out are the variants for other data
//! sets, such as `cdnow/ventas.yaml`: a data set brings its own contract.

use super::{Contract, ContractError};

/// Path under `contracts/odcs` and text of each contract, one per table, in order of path.
pub const FILES: &[(&str, &str)] = &[
    ("clientes.yaml", include_str!("../../../../contracts/odcs/clientes.yaml")),
    ("clientes_dim.yaml", include_str!("../../../../contracts/odcs/clientes_dim.yaml")),
    ("cohortes_usuario.yaml", include_str!("../../../../contracts/odcs/cohortes_usuario.yaml")),
    ("eventos.yaml", include_str!("../../../../contracts/odcs/eventos.yaml")),
    ("eventos_sessionized.yaml", include_str!("../../../../contracts/odcs/eventos_sessionized.yaml")),
    ("funnel_conversion.yaml", include_str!("../../../../contracts/odcs/funnel_conversion.yaml")),
    ("inventario.yaml", include_str!("../../../../contracts/odcs/inventario.yaml")),
    ("inventario_dim.yaml", include_str!("../../../../contracts/odcs/inventario_dim.yaml")),
    ("metricas_clicks.yaml", include_str!("../../../../contracts/odcs/metricas_clicks.yaml")),
    ("metricas_diarias.yaml", include_str!("../../../../contracts/odcs/metricas_diarias.yaml")),
    ("metricas_producto.yaml", include_str!("../../../../contracts/odcs/metricas_producto.yaml")),
    ("pipeline_metrics.yaml", include_str!("../../../../contracts/odcs/pipeline_metrics.yaml")),
    ("precios.yaml", include_str!("../../../../contracts/odcs/precios.yaml")),
    ("precios_dim.yaml", include_str!("../../../../contracts/odcs/precios_dim.yaml")),
    ("productos.yaml", include_str!("../../../../contracts/odcs/productos.yaml")),
    ("productos_dim.yaml", include_str!("../../../../contracts/odcs/productos_dim.yaml")),
    ("quality_results.yaml", include_str!("../../../../contracts/odcs/quality_results.yaml")),
    ("user_features.yaml", include_str!("../../../../contracts/odcs/user_features.yaml")),
    ("ventas.yaml", include_str!("../../../../contracts/odcs/ventas.yaml")),
    ("ventas_no_publicadas.yaml", include_str!("../../../../contracts/odcs/ventas_no_publicadas.yaml")),
    ("ventas_validadas.yaml", include_str!("../../../../contracts/odcs/ventas_validadas.yaml")),
];

/// Name and text of each seed list: CSV with a header line and one column.
pub const SEEDS: &[(&str, &str)] = &[
    ("regiones_validas.csv", include_str!("../../../../contracts/seeds/regiones_validas.csv")),
    ("tipos_evento.csv", include_str!("../../../../contracts/seeds/tipos_evento.csv")),
];

/// The values of a seed list, in the file's order; `None` when there is no such list.
pub fn seed(name: &str) -> Option<Vec<String>> {
    let (_, text) = SEEDS.iter().find(|(n, _)| *n == name)?;
    Some(text.lines().skip(1).map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect())
}

/// The contracts that ship with the program, in order of path.
///
/// # Errors
/// When a file is no contract; a test holds that all are.
pub fn shipped() -> Result<Vec<Contract>, ContractError> {
    FILES.iter().map(|(path, text)| Contract::parse(path, text)).collect()
}
