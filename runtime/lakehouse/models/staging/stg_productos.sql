-- what: Products as they are now.
-- materialized: view
-- key: product_id
-- optional: dim.productos_dim
-- test: not_null(product_id)
-- test: unique(product_id)
SELECT product_id, categoria, marca, precio
FROM {{ source('dim', 'productos_dim') }}
