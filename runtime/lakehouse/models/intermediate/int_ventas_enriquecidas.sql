-- what: Sales with what was known of customer and product; the customer as of the day of the sale.
-- materialized: day
-- table: intermediate/ventas_enriquecidas
-- key: order_id
-- partition: fecha
-- lookback: 0
-- test: not_null(order_id, segmento_cliente, fecha)
-- test: unique(order_id)
-- test: relationships(user_id, stg_clientes.user_id) warning
-- test: relationships(product_id, stg_productos.product_id) warning
SELECT v.order_id, v.user_id, v.product_id, v.monto_bruto, v.descuento, v.monto_neto, v.region, v.timestamp_venta, v.fecha,
       coalesce(c.segmento, 'sin_segmento') AS segmento_cliente, c.pais, p.categoria, p.marca
FROM {{ ref('stg_ventas_validadas') }} AS v
LEFT JOIN {{ ref('stg_clientes') }} AS c
  ON c.user_id = v.user_id AND c.valido_desde <= v.fecha AND (c.valido_hasta IS NULL OR v.fecha < c.valido_hasta)
LEFT JOIN {{ ref('stg_productos') }} AS p ON p.product_id = v.product_id
