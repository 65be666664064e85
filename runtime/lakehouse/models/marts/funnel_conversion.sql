-- what: How many sessions of each day and region came from a click to the cart, and from there to a purchase.
-- materialized: day
-- table: marts/funnel_conversion
-- key: fecha, region
-- partition: fecha
-- lookback: 0
-- test: not_null(fecha, region, sesiones, sesiones_click, sesiones_add_to_cart, sesiones_purchase)
-- test: unique(fecha, region)
-- test: accepted_values(region, regiones_validas.csv)
WITH con_click AS (
  -- A step counts only after the step before it; a session is of the region of its first event.
  SELECT *, min(CASE WHEN event_type = 'click' THEN micros END) OVER (PARTITION BY user_id, fecha, sesion) AS click
  FROM {{ ref('int_eventos_sesion') }}
),
con_carrito AS (
  SELECT *, min(CASE WHEN event_type = 'add_to_cart' AND micros >= click THEN micros END)
              OVER (PARTITION BY user_id, fecha, sesion) AS carrito
  FROM con_click
),
con_compra AS (
  SELECT *, min(CASE WHEN event_type = 'purchase' AND micros >= carrito THEN micros END)
              OVER (PARTITION BY user_id, fecha, sesion) AS compra,
            row_number() OVER (PARTITION BY user_id, fecha, sesion ORDER BY micros, region) AS puesto
  FROM con_carrito
)
SELECT fecha, region, sesiones, sesiones_click, sesiones_add_to_cart, sesiones_purchase,
       CASE WHEN sesiones_click > 0 THEN CAST(sesiones_add_to_cart AS DOUBLE) / CAST(sesiones_click AS DOUBLE) END
         AS tasa_add_to_cart,
       CASE WHEN sesiones_add_to_cart > 0 THEN CAST(sesiones_purchase AS DOUBLE) / CAST(sesiones_add_to_cart AS DOUBLE) END
         AS tasa_purchase,
       CASE WHEN sesiones_click > 0 THEN CAST(sesiones_purchase AS DOUBLE) / CAST(sesiones_click AS DOUBLE) END
         AS tasa_conversion,
       {{ now }} AS _updated_at, {{ version }} AS _pipeline_version
FROM (
  SELECT fecha, region, count(*) AS sesiones, count(click) AS sesiones_click, count(carrito) AS sesiones_add_to_cart,
         count(compra) AS sesiones_purchase
  FROM con_compra
  WHERE puesto = 1
  GROUP BY fecha, region
)
