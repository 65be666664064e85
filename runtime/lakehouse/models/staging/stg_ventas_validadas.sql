-- what: Validated sales, one row per order.
-- materialized: view
-- key: order_id
-- test: not_null(order_id, user_id, product_id, monto_bruto, descuento, monto_neto, region, timestamp_venta, fecha)
-- test: unique(order_id) within 30 days
-- test: accepted_values(region, regiones_validas.csv)
-- test: not_negative(monto_bruto, descuento, monto_neto)
SELECT order_id, user_id, product_id, monto_bruto, coalesce(descuento, CAST(0 AS DECIMAL(10,2))) AS descuento, monto_neto,
       region, timestamp_venta, fecha, segmento, pais, categoria, marca
FROM {{ source('staging', 'ventas_validadas') }}
