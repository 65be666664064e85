-- what: Sales with what was known of customer and product when their day was staged.
-- materialized: view
-- key: order_id
-- test: not_null(order_id, segmento_cliente, fecha)
-- test: relationships(user_id, stg_clientes.user_id) warning
-- test: relationships(product_id, stg_productos.product_id) warning
SELECT order_id, user_id, product_id, monto_bruto, descuento, monto_neto, region, timestamp_venta, fecha,
       coalesce(segmento, 'sin_segmento') AS segmento_cliente, pais, categoria, marca
FROM {{ ref('stg_ventas_validadas') }}
