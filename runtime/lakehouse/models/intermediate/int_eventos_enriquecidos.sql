-- what: Events with the segment that their customer had on the day.
-- materialized: view
-- key: user_id, timestamp, event_type, page, product_id
-- test: not_null(user_id, event_type, segmento_cliente, region, fecha)
SELECT e.user_id, e.event_type, e.page, e.product_id, e.monto, e.region, e."timestamp", e.fecha,
       coalesce(c.segmento, 'sin_segmento') AS segmento_cliente
FROM {{ ref('stg_eventos') }} AS e
LEFT JOIN {{ ref('stg_clientes') }} AS c
  ON c.user_id = e.user_id AND c.valido_desde <= e.fecha AND (c.valido_hasta IS NULL OR e.fecha < c.valido_hasta)
