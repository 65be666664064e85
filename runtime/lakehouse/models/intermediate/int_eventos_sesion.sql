-- what: Events with the number of their session among those of the customer's day; 30 minutes without an event end it, and so does midnight.
-- materialized: view
-- key: user_id, timestamp, event_type, page, product_id
-- test: not_null(user_id, fecha, sesion)
SELECT user_id, event_type, page, product_id, monto, region, "timestamp", fecha, micros,
       -- Whole microseconds, so that the distance of two is exact.
       sum(CASE WHEN anterior IS NULL OR micros - anterior > 1800000000 THEN 1 ELSE 0 END)
         OVER (PARTITION BY user_id, fecha ORDER BY micros) AS sesion
FROM (
  SELECT *, lag(micros) OVER (PARTITION BY user_id, fecha ORDER BY micros) AS anterior
  FROM (SELECT *, arrow_cast("timestamp", 'Int64') AS micros FROM {{ ref('stg_eventos') }})
)
