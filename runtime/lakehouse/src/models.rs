//! The SQL models that ship with the program, as their files under `models/` say; a test compares the list with the folder.
//!
//! What the files mean (references, days, tests) is read by [`simulacro_core::models`].

/// Path under `models/` and text of each model, in order of path.
pub const FILES: &[(&str, &str)] = &[
    ("intermediate/int_ventas_enriquecidas.sql", include_str!("../models/intermediate/int_ventas_enriquecidas.sql")),
    ("marts/cohortes_usuario.sql", include_str!("../models/marts/cohortes_usuario.sql")),
    ("marts/metricas_diarias.sql", include_str!("../models/marts/metricas_diarias.sql")),
    ("marts/metricas_producto.sql", include_str!("../models/marts/metricas_producto.sql")),
    ("marts/user_features.sql", include_str!("../models/marts/user_features.sql")),
    ("staging/stg_clientes.sql", include_str!("../models/staging/stg_clientes.sql")),
    ("staging/stg_productos.sql", include_str!("../models/staging/stg_productos.sql")),
    ("staging/stg_ventas_validadas.sql", include_str!("../models/staging/stg_ventas_validadas.sql")),
];
