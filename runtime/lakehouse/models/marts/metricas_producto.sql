-- what: Sales of each day by product, with its place among all products and within its category.
-- materialized: day
-- table: marts/metricas_producto
-- key: fecha, product_id
-- partition: fecha
-- lookback: 0
-- test: not_null(fecha, product_id, puesto, puesto_categoria)
-- test: unique(fecha, product_id)
-- test: unique(fecha, puesto)
-- test: not_negative(revenue_bruto, revenue_neto)
WITH ventas AS (
  SELECT fecha, product_id, categoria, marca, user_id, monto_bruto, monto_neto, descuento FROM {{ ref('int_ventas_enriquecidas') }}
),
-- Distinct pairs first: a set for each product would take more memory than the sales themselves.
usuarios AS (
  SELECT product_id, count(user_id) AS usuarios_unicos FROM (SELECT DISTINCT product_id, user_id FROM ventas) GROUP BY product_id
),
productos AS (
  SELECT fecha, product_id, categoria, marca,
         CAST(sum(monto_bruto) AS DECIMAL(12,2)) AS revenue_bruto,
         CAST(sum(monto_neto) AS DECIMAL(12,2)) AS revenue_neto,
         CAST(sum(descuento) AS DECIMAL(12,2)) AS descuentos_total,
         count(*) AS transacciones
  FROM ventas
  GROUP BY fecha, product_id, categoria, marca
)
SELECT fecha, product_id, categoria, marca, revenue_bruto, revenue_neto, descuentos_total, transacciones, usuarios_unicos,
       CAST(row_number() OVER (ORDER BY revenue_neto DESC, product_id) AS BIGINT) AS puesto,
       CAST(row_number() OVER (PARTITION BY categoria ORDER BY revenue_neto DESC, product_id) AS BIGINT) AS puesto_categoria,
       {{ now }} AS _updated_at, {{ version }} AS _pipeline_version
FROM (SELECT p.*, u.usuarios_unicos FROM productos AS p JOIN usuarios AS u ON u.product_id = p.product_id)
