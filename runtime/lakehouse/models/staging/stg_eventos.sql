-- what: Events of the shop, each once: rows that are equal in every field are one event that was delivered again.
-- materialized: view
-- key: user_id, timestamp, event_type, page, product_id
-- optional: raw.eventos
-- test: not_null(user_id, event_type, page, monto, region, timestamp, fecha)
-- test: accepted_values(event_type, tipos_evento.csv)
-- test: accepted_values(region, regiones_validas.csv)
-- test: not_negative(monto)
SELECT DISTINCT user_id, event_type, page, product_id, monto, region, "timestamp", fecha
FROM {{ source('raw', 'eventos') }}
