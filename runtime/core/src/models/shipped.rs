//! The SQL models that ship with the program, as their files say; a test compares the list with the folder.
//!
//! What the files mean is read by the rest of [`crate::models`]; where the tables lie is the lakehouse's business.

use std::sync::LazyLock;

use super::Project;
use crate::{
    contract::catalogue,
    ports::{PortError, Result},
};

/// Path under the folder of models, and text, of each model, in order of path.
pub const FILES: &[(&str, &str)] = &[
    ("intermediate/eventos_sessionized.sql", include_str!("../../../lakehouse/models/intermediate/eventos_sessionized.sql")),
    (
        "intermediate/int_eventos_enriquecidos.sql",
        include_str!("../../../lakehouse/models/intermediate/int_eventos_enriquecidos.sql"),
    ),
    ("intermediate/int_eventos_sesion.sql", include_str!("../../../lakehouse/models/intermediate/int_eventos_sesion.sql")),
    ("intermediate/int_sesiones_usuario.sql", include_str!("../../../lakehouse/models/intermediate/int_sesiones_usuario.sql")),
    (
        "intermediate/int_ventas_enriquecidas.sql",
        include_str!("../../../lakehouse/models/intermediate/int_ventas_enriquecidas.sql"),
    ),
    ("marts/cohortes_usuario.sql", include_str!("../../../lakehouse/models/marts/cohortes_usuario.sql")),
    ("marts/funnel_conversion.sql", include_str!("../../../lakehouse/models/marts/funnel_conversion.sql")),
    ("marts/metricas_diarias.sql", include_str!("../../../lakehouse/models/marts/metricas_diarias.sql")),
    ("marts/metricas_producto.sql", include_str!("../../../lakehouse/models/marts/metricas_producto.sql")),
    ("marts/user_features.sql", include_str!("../../../lakehouse/models/marts/user_features.sql")),
    ("staging/stg_clientes.sql", include_str!("../../../lakehouse/models/staging/stg_clientes.sql")),
    ("staging/stg_eventos.sql", include_str!("../../../lakehouse/models/staging/stg_eventos.sql")),
    ("staging/stg_productos.sql", include_str!("../../../lakehouse/models/staging/stg_productos.sql")),
    ("staging/stg_ventas_validadas.sql", include_str!("../../../lakehouse/models/staging/stg_ventas_validadas.sql")),
];

/// Read once: it takes the reading of every contract, and a process asks for it each time it assembles a platform.
static SHIPPED: LazyLock<Result<Project, String>> = LazyLock::new(|| {
    let contracts = catalogue::shipped().map_err(|e| e.to_string())?;
    Project::new(FILES, contracts).map_err(|e| e.to_string())
});

/// All models that ship.
///
/// # Errors
/// `Permanent` when a file is no model; a test holds that all are.
pub fn shipped() -> Result<&'static Project> {
    SHIPPED.as_ref().map_err(|e| PortError::permanent(format!("read the models that ship: {e}")))
}
