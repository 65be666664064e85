-- what: Sessions of each day: events of one customer with at most 30 minutes between neighbours; midnight ends a session.
-- materialized: day
-- table: intermediate/eventos_sessionized
-- key: session_id
-- partition: fecha
-- lookback: 0
-- test: not_null(user_id, session_id, session_start, session_end, session_duration_min, pages_viewed, revenue, fecha)
-- test: unique(session_id) within 1 days
-- test: not_negative(session_duration_min, pages_viewed, add_to_cart_count, purchases, revenue)
SELECT user_id,
       concat(user_id, ':', CAST(min(micros) / 1000 AS VARCHAR)) AS session_id,
       min("timestamp") AS session_start,
       max("timestamp") AS session_end,
       CAST(max(micros) - min(micros) AS DOUBLE) / CAST(60000000 AS DOUBLE) AS session_duration_min,
       count(CASE WHEN event_type = 'click' THEN 1 END) AS pages_viewed,
       count(CASE WHEN event_type = 'add_to_cart' THEN 1 END) AS add_to_cart_count,
       count(CASE WHEN event_type = 'purchase' THEN 1 END) AS purchases,
       CAST(sum(monto) AS DECIMAL(12,2)) AS revenue,
       fecha
FROM {{ ref('int_eventos_sesion') }}
GROUP BY user_id, fecha, sesion
