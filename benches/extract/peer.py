"""One run of a tool that people would use instead, in a process of its own. Prints what it took as one line of JSON.

Time and CPU are counted from after the imports, which favours the tool. Every result is Parquet with Snappy, and has its amounts as
decimals: where a driver hands them over as text or as wider decimals, turning them into decimal(10,2) is part of the work.
"""

import argparse
import json
import os
import resource
import time

COLUMNS = "order_id, user_id, product_id, monto, descuento, region, timestamp_venta, fecha"


def day_query(args, columns=COLUMNS, also=""):
    return f"SELECT {columns} FROM ventas WHERE fecha = DATE '{args.date}'{also}"


def halves(args):
    """The day in two statements, for tools that read statements in parallel. There is no integer to split it by."""
    noon = f"TIMESTAMPTZ '{args.date} 12:00:00Z'"
    return [day_query(args, also=f" AND timestamp_venta < {noon}"), day_query(args, also=f" AND timestamp_venta >= {noon}")]


def as_sales(table):
    """An Arrow table or batch with the columns' types of the contract."""
    import pyarrow as pa

    kinds = {"monto": pa.decimal128(10, 2), "descuento": pa.decimal128(10, 2)}
    fields = [pa.field(f.name, kinds.get(f.name, f.type)) for f in table.schema]
    columns = [table.column(i) if table.schema.field(i).type == f.type else table.column(i).cast(f.type) for i, f in enumerate(fields)]
    return type(table).from_arrays(columns, schema=pa.schema(fields))


def connectorx(args, protocol):
    import connectorx as cx
    import pyarrow.parquet as pq

    def work():
        table = cx.read_sql(args.postgres, halves(args), return_type="arrow", protocol=protocol)
        pq.write_table(as_sales(table), args.out, compression="snappy")
        return table.num_rows

    return work


def adbc(args):
    import adbc_driver_postgresql.dbapi as dbapi
    import pyarrow as pa
    import pyarrow.parquet as pq

    def work():
        rows, writer = 0, None
        with dbapi.connect(args.postgres) as connection, connection.cursor() as cursor:
            cursor.execute(day_query(args))
            for batch in cursor.fetch_record_batch():
                batch = as_sales(pa.Table.from_batches([batch]))
                writer = writer or pq.ParquetWriter(args.out, batch.schema, compression="snappy")
                writer.write_table(batch)
                rows += batch.num_rows
        writer.close()
        return rows

    return work


def polars(args, engine):
    import polars as pl

    if engine == "connectorx":
        import connectorx  # noqa: F401
    else:
        import adbc_driver_postgresql.dbapi  # noqa: F401

    def work():
        query = halves(args) if engine == "connectorx" else day_query(args)
        frame = pl.read_database_uri(query, args.postgres, engine=engine)
        # ADBC hands a numeric over as an extension type around text.
        amounts = [amount.ext.storage() if engine == "adbc" else amount for amount in (pl.col("monto"), pl.col("descuento"))]
        frame = frame.with_columns(amount.cast(pl.Decimal(10, 2)) for amount in amounts)
        frame.write_parquet(args.out, compression="snappy")
        return frame.height

    return work


def duckdb_scanner(args):
    import duckdb

    database = duckdb.connect()
    # From extensions.duckdb.org: not part of the package.
    database.execute("INSTALL postgres; LOAD postgres")

    def work():
        database.execute(f"ATTACH '{args.postgres}' AS source (TYPE postgres, READ_ONLY)")
        query = day_query(args).replace("FROM ventas", "FROM source.public.ventas")
        database.execute(f"COPY ({query}) TO '{args.out}' (FORMAT parquet, COMPRESSION snappy)")
        return database.execute(f"SELECT count(*) FROM read_parquet('{args.out}')").fetchone()[0]

    return work


def duckdb_adbc(args):
    import adbc_driver_postgresql.dbapi as dbapi
    import duckdb

    def work():
        database = duckdb.connect()
        with dbapi.connect(args.postgres) as connection, connection.cursor() as cursor:
            cursor.execute(day_query(args))
            reader = cursor.fetch_record_batch()  # noqa: F841, DuckDB finds it by its name
            cast = COLUMNS.replace("monto, descuento", "CAST(monto AS DECIMAL(10,2)) AS monto, CAST(descuento AS DECIMAL(10,2)) AS descuento")
            database.execute(f"COPY (SELECT {cast} FROM reader) TO '{args.out}' (FORMAT parquet, COMPRESSION snappy)")
        return database.execute(f"SELECT count(*) FROM read_parquet('{args.out}')").fetchone()[0]

    return work


def day_polars(args):
    """The day to marts as a script. It keeps no _source_hash: Polars has no sha256, so it tells duplicates by the columns."""
    import connectorx  # noqa: F401
    import polars as pl

    def read(query):
        return pl.read_database_uri(query, args.postgres, engine="connectorx")

    def work():
        os.makedirs(args.out)
        raw = read(halves(args)).with_columns(pl.col("monto", "descuento").cast(pl.Decimal(10, 2)))
        raw.write_parquet(f"{args.out}/raw.parquet", compression="snappy")
        clientes, productos = read("SELECT user_id, segmento, pais FROM clientes"), read("SELECT product_id, categoria, marca FROM productos")
        amount, discount = pl.col("monto"), pl.col("descuento").fill_null(0)
        good = (
            raw.filter((amount > 0) & pl.col("user_id").is_not_null() & (discount <= amount))
            .unique(["order_id", "user_id", "monto"], keep="first")
            .filter(pl.len().over("order_id") == 1)
        )
        staging = (
            good.with_columns(descuento=discount, monto_neto=(amount - discount).cast(pl.Decimal(10, 2)))
            .rename({"monto": "monto_bruto"})
            .join(clientes, on="user_id", how="left")
            .join(productos, on="product_id", how="left")
            .sort("region")
        )
        staging.write_parquet(f"{args.out}/staging.parquet", compression="snappy")
        mart = staging.group_by("fecha", "region", pl.col("segmento").fill_null("sin_segmento").alias("segmento_cliente")).agg(
            revenue_bruto=pl.col("monto_bruto").sum(),
            revenue_neto=pl.col("monto_neto").sum(),
            descuentos_total=pl.col("descuento").sum(),
            transacciones=pl.len(),
            usuarios_unicos=pl.col("user_id").n_unique(),
        )
        mart.write_parquet(f"{args.out}/mart.parquet", compression="snappy")
        return raw.height

    return work


def day_duckdb(args):
    """The day to marts as SQL, read through ADBC."""
    import adbc_driver_postgresql.dbapi as dbapi
    import duckdb

    def work():
        os.makedirs(args.out)
        database = duckdb.connect()
        database.execute("SET memory_limit = '1GB'")
        database.execute(f"SET temp_directory = '{args.out}/spill'")
        with dbapi.connect(args.postgres) as connection:
            for name, query in [
                ("ventas", day_query(args)),
                ("clientes", "SELECT user_id, segmento, pais FROM clientes"),
                ("productos", "SELECT product_id, categoria, marca FROM productos"),
            ]:
                with connection.cursor() as cursor:
                    cursor.execute(query)
                    reader = cursor.fetch_record_batch()  # noqa: F841, DuckDB finds it by its name
                    money = "* REPLACE (CAST(monto AS DECIMAL(10,2)) AS monto, CAST(descuento AS DECIMAL(10,2)) AS descuento)"
                    chosen = money if name == "ventas" else "*"
                    database.execute(f"COPY (SELECT {chosen} FROM reader) TO '{args.out}/{name}.parquet' (FORMAT parquet, COMPRESSION snappy)")
        database.execute(
            f"""COPY (
              WITH hashed AS (
                SELECT * REPLACE (coalesce(descuento, 0) AS descuento),
                       sha256(concat_ws('|', order_id, user_id, CAST(monto AS VARCHAR))) AS _source_hash
                FROM '{args.out}/ventas.parquet' WHERE monto > 0 AND user_id IS NOT NULL AND coalesce(descuento, 0) <= monto),
              first AS (SELECT * FROM hashed QUALIFY row_number() OVER (PARTITION BY _source_hash ORDER BY timestamp_venta) = 1),
              single AS (SELECT * FROM first QUALIFY count(*) OVER (PARTITION BY order_id) = 1)
              SELECT s.* RENAME (monto AS monto_bruto), CAST(monto - descuento AS DECIMAL(10,2)) AS monto_neto, segmento, pais, categoria, marca
              FROM single s LEFT JOIN '{args.out}/clientes.parquet' USING (user_id) LEFT JOIN '{args.out}/productos.parquet' USING (product_id)
              ORDER BY region) TO '{args.out}/staging.parquet' (FORMAT parquet, COMPRESSION snappy)"""
        )
        database.execute(
            f"""COPY (
              SELECT fecha, region, coalesce(segmento, 'sin_segmento') AS segmento_cliente, sum(monto_bruto) AS revenue_bruto,
                     sum(monto_neto) AS revenue_neto, sum(descuento) AS descuentos_total, count(*) AS transacciones,
                     count(DISTINCT user_id) AS usuarios_unicos
              FROM '{args.out}/staging.parquet' GROUP BY ALL) TO '{args.out}/mart.parquet' (FORMAT parquet, COMPRESSION snappy)"""
        )
        return database.execute(f"SELECT count(*) FROM '{args.out}/ventas.parquet'").fetchone()[0]

    return work


PEERS = {
    "connectorx, binary": lambda args: connectorx(args, "binary"),
    "connectorx, cursor": lambda args: connectorx(args, "cursor"),
    "adbc": adbc,
    "polars, connectorx": lambda args: polars(args, "connectorx"),
    "polars, adbc": lambda args: polars(args, "adbc"),
    "duckdb, postgres extension": duckdb_scanner,
    "duckdb, through adbc": duckdb_adbc,
    "day, polars": day_polars,
    "day, duckdb": day_duckdb,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--postgres", required=True, help="URL of the server")
    parser.add_argument("--date", required=True, help="the day")
    parser.add_argument("--out", required=True, help="file, or folder for a whole day")
    args = parser.parse_args()
    work = PEERS[args.peer](args)

    def cpu():
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    begun, cpu_begun = time.monotonic(), cpu()
    rows = work()
    print(json.dumps({"rows": rows, "seconds": time.monotonic() - begun, "cpu_seconds": cpu() - cpu_begun}))


if __name__ == "__main__":
    main()
