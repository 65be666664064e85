-- what: Revenue, customers and conversion of each day by region and segment.
-- materialized: day
-- table: marts/metricas_diarias
-- key: fecha, region, segmento_cliente
-- partition: fecha
-- lookback: 0
-- test: not_null(fecha, region, segmento_cliente)
-- test: unique(fecha, region, segmento_cliente)
-- test: accepted_values(region, regiones_validas.csv)
-- test: not_negative(revenue_bruto, revenue_neto, tasa_conversion)
WITH ventas AS (
  SELECT fecha, region, segmento_cliente,
         CAST(sum(monto_bruto) AS DECIMAL(12,2)) AS revenue_bruto,
         CAST(sum(monto_neto) AS DECIMAL(12,2)) AS revenue_neto,
         CAST(sum(descuento) AS DECIMAL(12,2)) AS descuentos_total,
         count(*) AS transacciones,
         count(DISTINCT user_id) AS usuarios_unicos,
         CAST(sum(monto_neto) / count(*) AS DECIMAL(10,2)) AS ticket_promedio
  FROM {{ ref('int_ventas_enriquecidas') }}
  GROUP BY fecha, region, segmento_cliente
),
eventos AS (
  SELECT fecha, region, segmento_cliente,
         count(CASE WHEN event_type = 'click' THEN 1 END) AS clicks,
         count(CASE WHEN event_type = 'purchase' THEN 1 END) AS compras
  FROM {{ ref('int_eventos_enriquecidos') }}
  GROUP BY fecha, region, segmento_cliente
)
SELECT v.fecha, v.region, v.segmento_cliente, v.revenue_bruto, v.revenue_neto, v.descuentos_total, v.transacciones,
       v.usuarios_unicos, v.ticket_promedio,
       CASE WHEN e.clicks > 0 THEN CAST(e.compras AS DOUBLE) / CAST(e.clicks AS DOUBLE) END AS tasa_conversion,
       {{ now }} AS _updated_at, {{ version }} AS _pipeline_version
FROM ventas AS v
LEFT JOIN eventos AS e ON e.fecha = v.fecha AND e.region = v.region AND e.segmento_cliente = v.segmento_cliente
