-- what: Customers with the periods in which their values hold.
-- materialized: view
-- key: user_id, valido_desde
-- optional: dim.clientes_dim
-- test: not_null(user_id, valido_desde)
-- test: unique(user_id, valido_desde)
SELECT user_id, segmento, pais, valido_desde, valido_hasta
FROM {{ source('dim', 'clientes_dim') }}
