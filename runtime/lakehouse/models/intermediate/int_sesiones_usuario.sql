-- what: Sessions of each customer and day, summed up.
-- materialized: view
-- key: fecha, user_id
-- test: not_null(fecha, user_id, sesiones, duracion_micros, paginas, add_to_cart, compras, revenue)
-- test: unique(fecha, user_id)
SELECT fecha, user_id,
       count(*) AS sesiones,
       sum(arrow_cast(session_end, 'Int64') - arrow_cast(session_start, 'Int64')) AS duracion_micros,
       sum(pages_viewed) AS paginas,
       sum(add_to_cart_count) AS add_to_cart,
       sum(purchases) AS compras,
       CAST(sum(revenue) AS DECIMAL(12,2)) AS revenue
FROM {{ ref('eventos_sessionized') }}
GROUP BY fecha, user_id
