-- what: Revenue and customers of each day by region and segment.
-- materialized: day
-- table: marts/metricas_diarias
-- key: fecha, region, segmento_cliente
-- partition: fecha
-- lookback: 0
-- test: not_null(fecha, region, segmento_cliente)
-- test: unique(fecha, region, segmento_cliente)
-- test: accepted_values(region, regiones_validas.csv)
-- test: not_negative(revenue_bruto, revenue_neto)
SELECT fecha, region, segmento_cliente,
       CAST(sum(monto_bruto) AS DECIMAL(12,2)) AS revenue_bruto,
       CAST(sum(monto_neto) AS DECIMAL(12,2)) AS revenue_neto,
       CAST(sum(descuento) AS DECIMAL(12,2)) AS descuentos_total,
       count(*) AS transacciones,
       count(DISTINCT user_id) AS usuarios_unicos,
       CAST(sum(monto_neto) / count(*) AS DECIMAL(10,2)) AS ticket_promedio,
       CAST(NULL AS DOUBLE) AS tasa_conversion,
       {{ now }} AS _updated_at, {{ version }} AS _pipeline_version
FROM {{ ref('int_ventas_enriquecidas') }}
GROUP BY fecha, region, segmento_cliente
