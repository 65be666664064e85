"""Peers of ci/bench-stream in Python: the same events, decoded and windowed with what people use there.

bytewax: fastavro decodes, a keyed tumbling window of Bytewax folds counts, money and users per region and page, and per region.
loop:    fastavro decodes, dictionaries count; what one writes around a consumer by hand.
Both take the first --events of the file and print what they counted.
"""

import argparse
import collections
import datetime
import importlib
import io
import json
import pathlib
import resource
import struct
import time

import fastavro

MINUTE = 60_000


def records(folder, events):
    """Values of the topic, in the order of the file."""
    data = (folder / "clicks.bin").read_bytes()
    at, word = 0, struct.Struct("<II")
    for _ in range(events):
        _, length = word.unpack_from(data, at)
        yield data[at + 8 : at + 8 + length]
        at += 8 + length


def decoder(folder):
    with (folder / "clicks.avro").open("rb") as file:
        schema = fastavro.parse_schema(fastavro.reader(file).writer_schema)
    return lambda value: fastavro.schemaless_reader(io.BytesIO(value[5:]), schema)


def empty():
    return {"click": 0, "purchase": 0, "add_to_cart": 0, "cents": 0, "users": set()}


def count(cell, click):
    cell[click["event_type"]] += 1
    cell["cents"] += int(click["monto"] * 100)
    cell["users"].add(click["user_id"])
    return cell


def sums(cells):
    out = collections.Counter()
    for cell in cells:
        out.update(rows=1, clicks=cell["click"], purchases=cell["purchase"], add_to_cart=cell["add_to_cart"], cents=cell["cents"], users=len(cell["users"]))
    return dict(out)


def loop(folder, events):
    decode = decoder(folder)
    pages, regions, sliding = (collections.defaultdict(empty) for _ in range(3))
    for value in records(folder, events):
        click = decode(value)
        minute = int(click["timestamp"].timestamp() * 1_000) // MINUTE
        count(pages[minute, click["region"], click["page"]], click)
        count(regions[minute, click["region"]], click)
        for back in range(5):
            count(sliding[minute - back, click["region"]], click)
    return {"page_1m": sums(pages.values()), "region_1m": sums(regions.values()), "region_5m": sums(sliding.values())}


def bytewax(folder, events):
    import bytewax.operators as op
    import bytewax.operators.windowing as windows
    from bytewax.dataflow import Dataflow
    from bytewax.testing import TestingSink, TestingSource, run_main

    decode, found = decoder(folder), {"page_1m": [], "region_1m": [], "region_5m": []}
    flow = Dataflow("peer")
    clicks = op.map("decode", op.input("clicks", flow, TestingSource(records(folder, events), batch_size=500)), decode)
    start = datetime.datetime(2024, 3, 18, tzinfo=datetime.timezone.utc)
    clock = lambda: windows.EventClock(ts_getter=lambda click: click["timestamp"], wait_for_system_duration=datetime.timedelta(seconds=30))
    minute, five = datetime.timedelta(minutes=1), datetime.timedelta(minutes=5)
    kinds = {
        "page_1m": (lambda c: c["region"] + c["page"], windows.TumblingWindower(length=minute, align_to=start)),
        "region_1m": (lambda c: c["region"], windows.TumblingWindower(length=minute, align_to=start)),
        "region_5m": (lambda c: c["region"], windows.SlidingWindower(length=five, offset=minute, align_to=start)),
    }

    def merge(a, b):
        for name in ("click", "purchase", "add_to_cart", "cents"):
            a[name] += b[name]
        a["users"] |= b["users"]
        return a

    for kind, (key, windower) in kinds.items():
        keyed = op.key_on(f"key_{kind}", clicks, key)
        folded = windows.fold_window(f"fold_{kind}", keyed, clock(), windower, empty, count, merge)
        op.output(f"out_{kind}", op.map(f"cell_{kind}", folded.down, lambda row: row[1][1]), TestingSink(found[kind]))
    run_main(flow)
    return {kind: sums(cells) for kind, cells in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["bytewax", "loop"])
    parser.add_argument("--in", dest="folder", type=pathlib.Path, required=True)
    parser.add_argument("--events", type=int, required=True)
    args = parser.parse_args()
    if args.peer == "bytewax":
        # Imports are no part of the rate.
        importlib.import_module("bytewax.operators.windowing")
    used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    begun, cpu = time.monotonic(), used()
    summary = {"bytewax": bytewax, "loop": loop}[args.peer](args.folder, args.events)
    print(json.dumps({"events": args.events, "seconds": time.monotonic() - begun, "cpu_seconds": used() - cpu, "summary": summary}))


if __name__ == "__main__":
    main()
