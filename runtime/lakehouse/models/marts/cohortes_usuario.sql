-- what: Retention and lifetime value by month of first purchase, as known at the end of each day.
-- materialized: day
-- table: marts/cohortes_usuario
-- key: fecha, cohorte
-- partition: fecha
-- lookback: all
-- test: not_null(fecha, cohorte, mes, usuarios, usuarios_activos, retencion, ltv)
-- test: unique(fecha, cohorte)
-- test: not_negative(revenue_neto, revenue_acumulado, ltv)
WITH ventas AS (
  SELECT user_id, fecha, monto_neto, fecha >= CAST(date_trunc('month', {{ day }}) AS DATE) AS este_mes
  FROM {{ ref('stg_ventas_validadas') }}
),
-- Each customer once, then each cohort; neither joins nor distinct counts, which would keep every sale in memory.
clientes AS (
  SELECT user_id, CAST(date_trunc('month', min(fecha)) AS DATE) AS cohorte,
         count(CASE WHEN este_mes THEN 1 END) AS compras_mes,
         sum(CASE WHEN este_mes THEN monto_neto ELSE CAST(0 AS DECIMAL(10,2)) END) AS revenue_mes,
         sum(monto_neto) AS revenue
  FROM ventas
  GROUP BY user_id
),
sumas AS (
  SELECT cohorte,
         count(*) AS usuarios,
         count(CASE WHEN compras_mes > 0 THEN 1 END) AS usuarios_activos,
         CAST(sum(revenue_mes) AS DECIMAL(12,2)) AS revenue_neto,
         CAST(sum(revenue) AS DECIMAL(14,2)) AS revenue_acumulado
  FROM clientes
  GROUP BY cohorte
)
SELECT {{ day }} AS fecha, cohorte,
       CAST((date_part('year', {{ day }}) - date_part('year', cohorte)) * 12
            + date_part('month', {{ day }}) - date_part('month', cohorte) AS BIGINT) AS mes,
       usuarios, usuarios_activos,
       CAST(usuarios_activos AS DOUBLE) / CAST(usuarios AS DOUBLE) AS retencion,
       revenue_neto, revenue_acumulado,
       CAST(revenue_acumulado / usuarios AS DECIMAL(12,2)) AS ltv,
       {{ now }} AS _updated_at, {{ version }} AS _pipeline_version
FROM sumas
