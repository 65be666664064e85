-- what: Purchases and sessions of each customer over the 30 days that end with the day; without events the latter are null.
-- materialized: day
-- table: marts/user_features
-- key: fecha, user_id
-- partition: fecha
-- lookback: 29
-- test: not_null(fecha, user_id, total_compras_30d, revenue_total_30d, region_preferida)
-- test: unique(fecha, user_id)
-- test: accepted_values(region_preferida, regiones_validas.csv)
-- test: not_negative(revenue_total_30d, ticket_promedio_30d)
WITH ventas AS (
  SELECT user_id, product_id, categoria, region, timestamp_venta, monto_neto,
         CAST(monto_neto * 100 AS DECIMAL(12,0)) AS centimos
  FROM {{ ref('int_ventas_enriquecidas') }}
),
sumas AS (
  SELECT user_id,
         count(*) AS compras,
         sum(monto_neto) AS revenue,
         sum(centimos) AS suma,
         sum(centimos * centimos) AS cuadrados,
         max(timestamp_venta) AS ultima_compra,
         min(timestamp_venta) AS primera_compra
  FROM ventas
  GROUP BY user_id
),
-- Distinct pairs first: a set for each customer would take more memory than the sales themselves.
productos AS (
  SELECT user_id, count(product_id) AS productos FROM (SELECT DISTINCT user_id, product_id FROM ventas) GROUP BY user_id
),
-- The most frequent one, of equals the first by name, is the least text of nine digits that fall as the count rises, and a name.
regiones AS (
  SELECT user_id, substr(min(CAST(1000000000 - veces AS VARCHAR) || region), 10) AS region
  FROM (SELECT user_id, region, count(*) AS veces FROM ventas GROUP BY user_id, region)
  GROUP BY user_id
),
categorias AS (
  SELECT user_id, count(*) AS categorias, substr(min(CAST(1000000000 - veces AS VARCHAR) || categoria), 10) AS categoria
  FROM (SELECT user_id, categoria, count(*) AS veces FROM ventas WHERE categoria IS NOT NULL GROUP BY user_id, categoria)
  GROUP BY user_id
),
sesiones AS (
  SELECT user_id, sum(sesiones) AS sesiones, sum(duracion_micros) AS duracion_micros, sum(paginas) AS paginas,
         sum(add_to_cart) AS add_to_cart
  FROM {{ ref('int_sesiones_usuario') }}
  GROUP BY user_id
)
SELECT {{ day }} AS fecha, s.user_id,
       s.compras AS total_compras_30d,
       CAST(s.revenue AS DECIMAL(12,2)) AS revenue_total_30d,
       CAST(s.revenue / s.compras AS DECIMAL(10,2)) AS ticket_promedio_30d,
       -- From exact sums in cents, so that the order of rows cannot matter.
       CASE WHEN s.compras > 1 THEN
         sqrt(CAST(s.compras * s.cuadrados - s.suma * s.suma AS DOUBLE) / CAST(s.compras * (s.compras - 1) AS DOUBLE)) / 100
       END AS ticket_std_30d,
       p.productos AS productos_unicos_30d,
       coalesce(c.categorias, 0) AS categorias_30d,
       s.ultima_compra, s.primera_compra,
       r.region AS region_preferida,
       c.categoria AS categoria_preferida,
       CAST(e.duracion_micros AS DOUBLE) / CAST(e.sesiones * 60000000 AS DOUBLE) AS duracion_sesion_promedio,
       CAST(e.paginas AS DOUBLE) / CAST(e.sesiones AS DOUBLE) AS paginas_por_sesion,
       e.add_to_cart AS total_add_to_cart_30d,
       {{ now }} AS _updated_at, {{ version }} AS _pipeline_version
FROM sumas AS s
JOIN productos AS p ON p.user_id = s.user_id
JOIN regiones AS r ON r.user_id = s.user_id
LEFT JOIN categorias AS c ON c.user_id = s.user_id
LEFT JOIN sesiones AS e ON e.user_id = s.user_id
