"""Measures the streaming job against its limit and against what people would use, on the same events, all in one run.

Each measurement is a process of its own, contenders take turns in each round, and each round begins with another one. What a contender
counted is compared with an independent count. Rates are medians over the rounds, with the slowest and the fastest; events per core are
events per second of CPU time of the whole process, compilers and collectors of garbage included.

Modes: rate (in process, the default), kafka (from a broker beside it on the same cores), latency (append to visible window),
memory and restart (of a worker with many users). Targets are named beside what was found; a miss is an error with --strict.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
OURS = "simulacro, the whole job"
TICK = os.sysconf("SC_CLK_TCK")


def say(text=""):
    print(text, flush=True)


def stop_with(text):
    sys.exit(f"error: {text}")


def measure(command):
    """Runs a command to its end: its own report, and the peak of its memory. An error is a text."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        said, complained = out.read(), err.read()
    lines = complained.strip().splitlines()
    if process.returncode != 0:
        return None, (lines or [f"exit code {process.returncode}"])[0][:300]
    with contextlib.suppress(ValueError, IndexError):
        return json.loads(said.strip().splitlines()[-1]) | {"peak_mib": used.ru_maxrss / 1024}, None
    return None, f"found no report in {said[-200:]!r}"


def ours(args, command, **options):
    report, error = measure([args.binary, command, *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value))])
    if report is None:
        stop_with(f"{command}: {error}")
    return report


def make(args, name, events):
    folder = args.work / name
    begun = time.monotonic()
    ours(args, "make", events=events, users=args.users, products=args.products, per_second=args.per_second, partitions=args.partitions, out=folder)
    size = (folder / "clicks.bin").stat().st_size
    say(f"made {events:,} events, {size / events:.0f} bytes each, {args.users:,} users, {args.products:,} products, in {time.monotonic() - begun:.0f} s")
    return folder


def differs(args, summary, folder, kinds=None):
    expected = json.loads((folder / "expected.json").read_text())
    if kinds is not None:
        expected = {kind: expected[kind] for kind in kinds}
    found, wanted = args.work / "found.json", args.work / "wanted.json"
    found.write_text(json.dumps(summary))
    wanted.write_text(json.dumps(expected))
    return ours(args, "compare", found=found, expected=wanted)["difference"]


def flink_windows(out):
    """Sums of the rows that Flink wrote."""
    summary = {}
    for kind in ("page_1m", "region_1m", "region_5m"):
        sums = dict.fromkeys(("rows", "clicks", "purchases", "add_to_cart", "cents", "users"), 0)
        for file in (out / kind).rglob("*"):
            if not file.is_file():
                continue
            for line in file.read_text().splitlines():
                clicks, purchases, carts, revenue, users = line.split(",")
                sums["rows"] += 1
                sums["clicks"] += int(clicks)
                sums["purchases"] += int(purchases)
                sums["add_to_cart"] += int(carts)
                sums["cents"] += round(float(revenue) * 100)
                sums["users"] += int(users)
        summary[kind] = sums
    return summary


def table(title, runs, failed):
    say(f"\n{title}")
    say(f"{'contender':<34}{'M/s':>8}{'slowest':>9}{'fastest':>9}{'M/s per core':>14}{'ours, times':>13}{'peak MiB':>10}")
    core = {name: statistics.median(r["events"] / r["cpu_seconds"] / 1e6 for r in all) for name, all in runs.items() if all}
    for name in sorted(core, key=core.get, reverse=True):
        rates = [r["events"] / r["seconds"] / 1e6 for r in runs[name]]
        ratio = f"{core[OURS] / core[name]:.2f}" if OURS in core and name != OURS else "-"
        peak = max(r["peak_mib"] for r in runs[name])
        say(f"{name:<34}{statistics.median(rates):>8.3f}{min(rates):>9.3f}{max(rates):>9.3f}{core[name]:>14.3f}{ratio:>13}{peak:>10.0f}")
    for name, reason in failed.items():
        say(f"{name:<34}  left out: {reason}")
    return core


def held(args, what, value, target, unit, at_least=True):
    good = value >= target if at_least else value <= target
    say(f"{'holds' if good else 'MISSED'}: {what} {value:.2f} {unit}, the target is {'at least' if at_least else 'at most'} {target} {unit}")
    args.missed += not good


def rate(args):
    folder = make(args, "events", args.events)
    small = make(args, "few", args.peer_events) if args.peer_events != args.events else folder
    out = args.work / "flink"
    contenders = {
        "limit: fields, one table, a sketch": ([args.binary, "limit", "--in", folder], folder, ["page_1m"]),
        OURS: ([args.binary, "job", "--in", folder, "--poll-records", args.poll_records], folder, None),
        "arrow-avro, then row by row": ([args.binary, "plain", "--in", small], small, None),
        "bytewax, fastavro": ([sys.executable, HERE / "peer.py", "bytewax", "--in", small, "--events", args.peer_events], small, None),
        "python loop, fastavro": ([sys.executable, HERE / "peer.py", "loop", "--in", small, "--events", args.peer_events], small, None),
    }
    if args.flink is not None:
        java = ["java", "-Xmx4g", "--add-opens=java.base/java.util=ALL-UNNAMED", "--add-opens=java.base/java.lang=ALL-UNNAMED"]
        peer = [*java, "-cp", f"{args.flink}/*:{args.flink.parent}/classes", "FlinkPeer", folder, out, "1"]
        contenders["flink sql, parallelism 1"] = (peer, folder, None)
    runs, failed = {name: [] for name in contenders}, {}
    names = list(contenders)
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in failed:
                continue
            command, source, kinds = contenders[name]
            shutil.rmtree(out, ignore_errors=True)
            report, error = measure(command)
            if report is not None:
                if name.startswith("flink"):
                    report |= {"events": args.events, "summary": flink_windows(out)}
                users = report["summary"]
                if name.startswith("limit"):
                    # It reports no users, and has a row for each partition of a key; the events and the money are compared.
                    expected = json.loads((source / "expected.json").read_text())["page_1m"]
                    users["page_1m"] |= {"users": expected["users"], "rows": expected["rows"]}
                error = differs(args, users, source, kinds)
            if error is not None:
                failed[name], runs[name] = error, []
            else:
                runs[name].append(report)
    core = table(f"{args.events:,} events in process, {args.rounds} rounds (peers in Python and row by row: {args.peer_events:,})", runs, failed)
    stages = ours(args, "stages", **{"in": folder}, poll_records=args.poll_records)
    parts = ", ".join(f"{name} {stages[f'{name}_ns']:.0f}" for name in ("decode", "process", "prepare", "commit"))
    say(f"\nof the click stage, in nanoseconds per event by the clock: {parts}; {stages['written_bytes']:.0f} bytes written per event")
    if OURS not in core:
        stop_with(f"{OURS}: {failed.get(OURS)}")
    held(args, "decoded and windowed per core", core[OURS], 1.5, "M events/s")
    for name in core:
        if name.startswith("flink"):
            held(args, "times Flink per core", core[OURS] / core[name], 5, "times")
    return {"runs": runs, "left_out": failed, "stages": stages}


class Broker:
    """A Kafka of its own, beside what is measured."""

    def __init__(self, folder):
        self.folder = folder
        script = HERE.parent.parent / "ci/services-kafka"
        self.script = script
        self.address = subprocess.run([script, "start", folder], check=True, stdout=subprocess.PIPE, text=True).stdout.strip().splitlines()[-1]
        self.pid = int((folder / "pid").read_text())

    def cpu_seconds(self):
        fields = pathlib.Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def close(self):
        subprocess.run([self.script, "stop", self.folder], check=False)


def threads_of(pid):
    """CPU seconds of a process so far, by the name of the thread without its number."""
    used = {}
    for task in pathlib.Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            name, fields = (task / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
            fields = fields.split()
            name = name.rstrip("-#0123456789")
            used[name] = used.get(name, 0) + (int(fields[11]) + int(fields[12])) / TICK
    return used


def kafka(args):
    folder = make(args, "events", args.events)
    results = []
    broker = Broker(args.work / "kafka")
    try:
        # A broker that has just been started compiles itself for a while, which no broker in use does: the first rounds do not count.
        for turn in range(-args.warmups, args.rounds):
            place = {"kafka": broker.address, "data": args.work / f"data-{turn}", "round": f"round{turn}."}
            filled = ours(args, "fill", **{"in": folder}, **place)
            name = f"round {turn + 1}" if turn >= 0 else "before the first round"
            say(f"{name}: topic filled with {args.events:,} events at {args.events / filled['seconds'] / 1e6:.2f} M/s")
            before, threads = broker.cpu_seconds(), threads_of(broker.pid)
            report = ours(args, "work", **{"in": folder}, **place, workers=args.workers, poll_records=args.kafka_poll_records)
            report["broker_cpu_seconds"] = broker.cpu_seconds() - before
            report["broker_threads"] = {name: used - threads.get(name, 0) for name, used in threads_of(broker.pid).items()}
            difference = differs(args, ours(args, "windows", **place)["summary"], folder)
            if difference is not None:
                stop_with(f"windows from Kafka: {difference}")
            rate = report["events"] / report["seconds_from_first_record"] / 1e6
            own, theirs = (report[of] * 1e9 / report["events"] for of in ("cpu_seconds", "broker_cpu_seconds"))
            say(f"{name}: read and windowed at {rate:.2f} M/s, {own:.0f} ns of CPU per event here and {theirs:.0f} in the broker")
            if turn >= 0:
                results.append(report)
    finally:
        broker.close()
    rates = [r["events"] / r["seconds_from_first_record"] / 1e6 for r in results]
    median = statistics.median(rates)
    own, theirs = (statistics.median(r[of] * 1e9 / r["events"] for r in results) for of in ("cpu_seconds", "broker_cpu_seconds"))
    busy = statistics.median((r["cpu_seconds"] + r["broker_cpu_seconds"]) / r["seconds"] for r in results)
    say(f"\nfrom Kafka, {args.workers} workers, {args.rounds} rounds: {median:.3f} M events/s (slowest {min(rates):.3f}, fastest {max(rates):.3f})")
    say(f"CPU: {own:.0f} ns per event of ours, librdkafka's threads included, {theirs:.0f} ns of the broker; {busy:.2f} of {os.cpu_count()} cores were busy")
    spent = {}
    for r in results:
        for name, used in r["broker_threads"].items():
            spent[name] = spent.get(name, 0) + used * 1e9 / r["events"] / len(results)
    most = sorted(spent.items(), key=lambda each: -each[1])[:6]
    say("of the broker, in ns per event: " + ", ".join(f"{name} {ns:.0f}" for name, ns in most))
    say(f"the bottleneck is {'the job, by CPU' if own > theirs else 'the broker, by CPU'}" if busy > 0.85 * os.cpu_count() else "neither side was busy all the time: waiting is the bottleneck")
    held(args, "from Kafka", median, 1.0, "M events/s")
    return {"runs": results}


def latency(args):
    results = {}
    say(f"{'events/s':>9}{'p50 s':>8}{'p99 s':>8}{'max s':>8}{'windows':>9}{'rows':>7}   slowest send")
    for per_second in args.rates:
        broker = Broker(args.work / f"kafka-{per_second}")
        try:
            place = {"kafka": broker.address, "data": args.work / f"data-{per_second}"}
            r = ours(args, "latency", **place, rate=per_second, seconds=args.seconds, speed=args.speed)
        finally:
            broker.close()
        results[per_second] = r
        say(f"{per_second:>9,}{r['p50_seconds']:>8.2f}{r['p99_seconds']:>8.2f}{r['max_seconds']:>8.2f}{r['windows']:>9}{r['rows']:>7}   {r['slowest_send_seconds']:.2f} s")
    say("from the append of the record that completes a window to its row being read by another consumer; two commits, a second apart each, lie between")
    for per_second, r in results.items():
        held(args, f"freshness at {per_second:,} events/s, p99", r["p99_seconds"], 30, "s", at_least=False)
    return {"runs": results}


def state(args):
    runs = [ours(args, "state", users=args.state_users) for _ in range(args.rounds)]
    of = lambda name: [run[name] for run in runs]
    say(f"{args.state_users:,} distinct users, {runs[0]['events']:,} events remembered for duplicates, {args.rounds} rounds:")
    for name, unit in (("held_mib", "MiB held"), ("peak_mib", "MiB at the peak"), ("changelog_mib", "MiB of changelog"), ("restart_seconds", "s until a new worker is where it was")):
        values = of(name)
        say(f"  {statistics.median(values):>9.2f} {unit} ({min(values):.2f} to {max(values):.2f})")
    return {"runs": runs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="rate", choices=["rate", "kafka", "latency", "memory", "restart"])
    parser.add_argument("--events", type=int, default=5_000_000, help="events (default 5,000,000)")
    parser.add_argument("--peer-events", type=int, default=200_000, help="events of the peers in Python and row by row (default 200,000)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmups", type=int, default=1, help="rounds before the first in mode kafka, which do not count (default 1)")
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--products", type=int, default=5_000)
    parser.add_argument("--per-second", type=int, default=11_500, help="events of a second of event time (default 11,500)")
    parser.add_argument("--partitions", type=int, default=4)
    parser.add_argument("--poll-records", type=int, default=4_000, help="records of a poll in memory (default 4,000, as the adapter of Kafka has it)")
    parser.add_argument("--kafka-poll-records", type=int, default=4_000)
    parser.add_argument("--workers", type=int, default=2, help="workers in mode kafka (default 2)")
    parser.add_argument("--rates", type=lambda text: [int(n) for n in text.split(",")], default=[1_000, 11_500], help="events/s in mode latency")
    parser.add_argument("--seconds", type=int, default=120, help="length of each run in mode latency (default 120)")
    parser.add_argument("--speed", type=int, default=30, help="how much faster than the clock event time runs in mode latency (default 30)")
    parser.add_argument("--state-users", type=int, default=1_000_000, help="users in modes memory and restart (default 1,000,000)")
    parser.add_argument("--json", type=pathlib.Path, help="file for everything that was measured")
    parser.add_argument("--strict", action="store_true", help="a missed target is an error")
    parser.add_argument("--binary", type=pathlib.Path, required=True, help="the built benches/stream")
    parser.add_argument("--flink", type=pathlib.Path, help="folder with Flink's jars, with the compiled peer in classes beside it")
    args = parser.parse_args()
    args.missed = 0
    load_before = os.getloadavg()[0]
    say(f"{os.cpu_count()} cores, load {load_before:.1f} before, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC")
    if load_before > 0.5:
        say("warning: others are at work on this machine; rates by the clock will be too low, and caches are shared: CPU per event is too high as well")
    args.work = pathlib.Path(tempfile.mkdtemp(prefix="simulacro-bench-", dir=os.environ.get("SIMULACRO_BENCH_DIR")))
    try:
        result = {"rate": rate, "kafka": kafka, "latency": latency, "memory": state, "restart": state}[args.mode](args)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    if args.json is not None:
        about = {"mode": args.mode, "events": args.events, "rounds": args.rounds, "cores": os.cpu_count(), "load_before": load_before, "date": time.time()}
        args.json.write_text(json.dumps({**about, **result}, indent=1))
    if args.missed and args.strict:
        stop_with(f"{args.missed} targets missed")


if __name__ == "__main__":
    main()
