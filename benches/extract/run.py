"""Measures the extraction of a day from PostgreSQL to Parquet against the tools that people would use, all in one run.

A server of its own holds seven days of sales. Each measurement is a process of its own, contenders take turns in each round, and each
round begins with another one. What a contender wrote is compared with the server: rows and sums to the cent. Rates are medians over the
rounds, with the slowest and the fastest. CPU of the server is that of all its processes while the contender ran.

Modes: extract (the default), memory (peak memory of our extraction at growing sizes), day (a whole day to marts).
"""

import argparse
import contextlib
import datetime
import decimal
import json
import os
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
DATE = "2024-03-14"
PASSWORD = "solo-para-medir"
OURS = "simulacro"
EXTRACT_PEERS = [
    "connectorx, binary", "connectorx, cursor", "adbc", "polars, connectorx", "polars, adbc", "duckdb, postgres extension", "duckdb, through adbc",
]
DAY_PEERS = ["day, polars", "day, duckdb"]


def say(text):
    print(text, flush=True)


def stop_with(text):
    sys.exit(f"error: {text}")


class Server:
    """A private PostgreSQL on loopback, as a user other than root, in a folder that goes with it."""

    def __init__(self, work, shared_buffers):
        found = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
        if not found:
            stop_with("found no PostgreSQL server, expected the package postgresql")
        self.bin = found[-1].parent
        self.folder = work / "server"
        self.folder.mkdir()
        work.chmod(0o755)
        self.as_user = []
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
            self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
        password = work / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data = self.folder / "data"
        init = [self.bin / "initdb", "-D", data, "-A", "scram-sha-256", f"--pwfile={password}", "-U", "postgres", "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
        subprocess.run([*self.as_user, *init], check=True, stdout=subprocess.DEVNULL, cwd=self.folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # No durability is measured here, and nothing in the background disturbs.
        self.settings = {
            "listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": str(self.folder), "shared_buffers": shared_buffers,
            "fsync": "off", "full_page_writes": "off", "max_wal_size": "16GB", "wal_level": "minimal", "max_wal_senders": "0", "autovacuum": "off",
            "maintenance_work_mem": "256MB",
        }
        options = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value}")]
        self.log = (work / "server.log").open("w")
        self.process = subprocess.Popen(
            [*self.as_user, self.bin / "postgres", "-D", data, *options], stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, cwd=self.folder
        )
        self.url = f"postgresql://postgres:{PASSWORD}@127.0.0.1:{port}/postgres"
        for _ in range(300):
            if self.process.poll() is None and self.query("SELECT 1", check=False) == "1":
                return
            time.sleep(0.1)
        stop_with(f"the server is not ready: {(work / 'server.log').read_text()}")

    def query(self, sql, check=True):
        asked = subprocess.run([self.bin / "psql", "-X", "-A", "-t", "-c", sql, self.url], capture_output=True, text=True)
        if check and asked.returncode != 0:
            stop_with(f"{sql}: {asked.stderr}")
        return asked.stdout.strip()

    def cpu_seconds(self):
        """Of the postmaster and of all its processes that have ended."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return sum(int(fields[at]) for at in (11, 12, 13, 14)) / os.sysconf("SC_CLK_TCK")

    def close(self):
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


class Sampler(threading.Thread):
    """CPU seconds and resident memory of a process over its life, every 20 ms, with the time of day."""

    def __init__(self, process):
        super().__init__(daemon=True)
        self.process, self.samples = process, []

    def run(self):
        tick, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
        # Gone when the process is.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, IndexError):
            while True:
                fields = pathlib.Path(f"/proc/{self.process}/stat").read_text().rsplit(")", 1)[1].split()
                self.samples.append((time.time(), (int(fields[11]) + int(fields[12])) / tick, int(fields[21]) * page / 2**20))
                time.sleep(0.02)


def measure(server, command, samples=None):
    """Runs a command to its end: its own report, and what the system says of it. An error is a text."""
    before = server.cpu_seconds()
    environment = {**os.environ, "PGPASSWORD": PASSWORD}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begun = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=err, env=environment)
        sampler = Sampler(process.pid)
        if samples is not None:
            sampler.start()
        _, status, used = os.wait4(process.pid, 0)
        if samples is not None:
            sampler.join()
            samples.extend(sampler.samples)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - begun
        # The server's processes end a moment after their client.
        time.sleep(0.3)
        out.seek(0)
        err.seek(0)
        said, complained = out.read(), err.read()
    if process.returncode != 0:
        lines = complained.strip().splitlines()
        named = [line.strip() for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|error)\b.*:", line.strip())]
        return None, (named or lines or [f"exit code {process.returncode}"])[-1][:200]
    report = {"process_seconds": seconds, "process_cpu_seconds": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
    report["server_cpu_seconds"] = server.cpu_seconds() - before
    report["said"] = said
    with contextlib.suppress(ValueError, IndexError):
        report |= json.loads(said.strip().splitlines()[-1])
    return report, None


def parquet_sums(files):
    """Rows and sums of the amounts."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows, sums = 0, {"monto": decimal.Decimal(0), "descuento": decimal.Decimal(0)}
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(1 << 16, columns=list(sums)):
            rows += batch.num_rows
            for name in sums:
                sums[name] += pc.sum(batch.column(name)).as_py() or 0
    return rows, sums["monto"], sums["descuento"]


def median(runs, value):
    return statistics.median(value(run) for run in runs)


def table(title, names, runs, failed, rows):
    say(f"\n{title}")
    say(f"{'contender':<28}{'M rows/s':>9}{'slowest':>9}{'fastest':>9}{'x peer':>8}{'own ns/row':>12}{'server ns':>11}{'peak MiB':>10}{'MB':>7}")
    rate = {name: median(runs[name], lambda r: rows / r["seconds"] / 1e6) for name in names if runs[name]}
    for name in sorted(rate, key=rate.get, reverse=True):
        rates = [rows / run["seconds"] / 1e6 for run in runs[name]]
        own, served = (median(runs[name], lambda r, of=of: r[of] * 1e9 / rows) for of in ("cpu_seconds", "server_cpu_seconds"))
        ratio = f"{rate[OURS] / rate[name]:.2f}" if OURS in rate and name != OURS else "-"
        peak, size = max(run["peak_mib"] for run in runs[name]), median(runs[name], lambda r: r["bytes"] / 1e6)
        say(f"{name:<28}{rate[name]:>9.3f}{min(rates):>9.3f}{max(rates):>9.3f}{ratio:>8}{own:>12.0f}{served:>11.0f}{peak:>10.0f}{size:>7.0f}")
    for name, reason in failed.items():
        say(f"{name:<28}  left out: {reason}")


def load(server, args, rows, other_rows):
    begun = time.monotonic()
    sizes = ["--rows", rows, "--other-rows", other_rows, "--clientes", args.clientes, "--productos", args.productos]
    report, error = measure(server, [args.binary, "load", "--postgres", server.url, "--date", DATE, *sizes])
    if report is None:
        stop_with(f"load the tables: {error}")
    size = server.query("SELECT pg_size_pretty(pg_total_relation_size('ventas'))")
    say(f"loaded {rows:,} rows of {DATE} and {other_rows:,} of each of the six days beside it in {time.monotonic() - begun:.0f} s: {size}")
    answer = server.query(f"SELECT count(*), sum(monto), sum(descuento) FROM ventas WHERE fecha = '{DATE}'").split("|")
    return int(answer[0]), decimal.Decimal(answer[1]), decimal.Decimal(answer[2])


def our_extract(server, args, out, connections, rows_max=0):
    command = [args.binary, "extract", "--postgres", server.url, "--date", DATE, "--out", out]
    return [*command, "--connections", connections, "--rows-max", rows_max]


# The stages of our day, each with the last call of it in the history: component, call and the end of its table's name.
STAGES = [
    ("extract to raw", ("lakehouse", "query", "")),
    ("dimensions", ("lakehouse", "maintain", "productos_dim")),
    ("classify", ("lakehouse", "overwrite_day", "ventas_no_publicadas")),
    ("enrich and stage", ("lakehouse", "overwrite_day", "ventas_validadas")),
    ("models", ("lakehouse", "overwrite_day", "")),
    ("tests and warehouse", ("", "", "")),
]


def stages(samples, history):
    """Seconds, CPU seconds and peak memory of each stage of our day."""
    calls = []
    for line in history.read_text().splitlines():
        entry = json.loads(line)
        at = datetime.datetime.fromisoformat(entry["time"][:26]).replace(tzinfo=datetime.timezone.utc).timestamp()
        calls.append((at, entry["component"], entry["call"], entry["refs"].get("table", "")))

    def is_last(call, wanted):
        return call[1] == wanted[0] and call[2] == wanted[1] and call[3].endswith(wanted[2])

    out, begin = {}, samples[0][0]
    for name, wanted in STAGES:
        ends = [call[0] for call in calls if is_last(call, wanted) and call[0] > begin]
        # The first query ends the extraction, the last write of a day the models.
        end = samples[-1][0] if not wanted[0] else (ends[0] if name == "extract to raw" else ends[-1])
        inside = [sample for sample in samples if begin <= sample[0] <= end] or [samples[-1]]
        out[name] = {"seconds": end - begin, "cpu_seconds": inside[-1][1] - inside[0][1], "peak_mib": max(s[2] for s in inside)}
        begin = end
    return out


def stage_table(runs, rows):
    say(f"\n{'stage':<22}{'seconds':>9}{'own ns/row':>12}{'peak MiB':>10}   medians, highest peak")
    for name, _ in STAGES:
        of = [run["stages"][name] for run in runs]
        seconds, cpu = (statistics.median(o[what] for o in of) for what in ("seconds", "cpu_seconds"))
        say(f"{name:<22}{seconds:>9.2f}{cpu * 1e9 / rows:>12.0f}{max(o['peak_mib'] for o in of):>10.0f}")


def take_turns(server, args, contenders, rounds, check):
    """Runs each contender once in each round. One that fails is left out from then on, with its reason."""
    runs, failed = {name: [] for name in contenders}, {}
    names = list(contenders)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in failed:
                continue
            out = args.work / "out"
            samples = []
            report, error = measure(server, contenders[name](out), samples)
            if report is not None:
                report["samples"] = samples
                report["bytes"] = sum(p.stat().st_size for p in ([out] if out.is_file() else out.rglob("*")) if p.is_file())
                error = check(report, out)
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            if error is not None:
                failed[name] = error
                runs[name] = []
                continue
            del report["samples"]
            runs[name].append(report)
            say(f"  round {turn + 1}, {name}: {report['seconds']:.2f} s, {report['peak_mib']:.0f} MiB")
    return runs, failed


def extract(server, args):
    expected = load(server, args, args.rows, args.rows if args.other_rows is None else args.other_rows)

    def check(report, out):
        found = parquet_sums([out] if out.is_file() else sorted(out.rglob("*.parquet")))
        return None if found == expected else f"found rows and sums {found}, expected {expected}"

    def peer(name):
        return lambda out: [sys.executable, HERE / "peer.py", name, "--postgres", server.url, "--date", DATE, "--out", out]

    contenders = {OURS: lambda out: our_extract(server, args, out, args.connections)}
    if args.connections != 1:
        contenders[f"{OURS}, 1 connection"] = lambda out: our_extract(server, args, out, 1)
    contenders |= {name: peer(name) for name in EXTRACT_PEERS}
    runs, failed = take_turns(server, args, contenders, args.rounds, check)
    table(f"{args.rows:,} rows, PostgreSQL to Parquet, {args.rounds} rounds", list(contenders), runs, failed, args.rows)
    return {"runs": runs, "left_out": failed, "failed": OURS in failed}


def memory(server, args):
    """Ours alone, and what is flat is flat: peak memory at each size."""
    results = []
    for rows in args.sizes:
        needed, free = rows * 250, shutil.disk_usage(args.work).free
        if needed > free:
            say(f"{rows:,} rows are left out: found {free / 1e9:.0f} GB free, expected {needed / 1e9:.0f} GB")
            continue
        expected = load(server, args, rows, args.other_rows or 0)
        out = args.work / "out"
        report, error = measure(server, our_extract(server, args, out, args.connections, rows_max=rows))
        if report is None:
            stop_with(f"extract {rows} rows: {error}")
        found = parquet_sums(sorted(out.rglob("*.parquet")))
        shutil.rmtree(out)
        if found != expected:
            stop_with(f"extract {rows} rows: found rows and sums {found}, expected {expected}")
        results.append({"rows": rows, **report})
        say(f"{rows:>12,} rows: peak {report['peak_mib']:.0f} MiB, {rows / report['seconds'] / 1e6:.2f} M rows/s, {report['files']} parts")
    return {"runs": results, "failed": False}


def delta_files(folder):
    """The files that a Delta table without checkpoints has now."""
    live = set()
    for entry in sorted((folder / "_delta_log").glob("*.json")):
        for line in entry.read_text().splitlines():
            action = json.loads(line)
            if "add" in action:
                live.add(action["add"]["path"])
            if "remove" in action:
                live.discard(action["remove"]["path"])
    return [folder / path.replace("%3D", "=") for path in sorted(live)]


def mart_sums(files):
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    tables = [pq.ParquetFile(file).read(columns=["transacciones", "revenue_neto"]) for file in files]
    return sum(pc.sum(t["transacciones"]).as_py() for t in tables), sum(pc.sum(t["revenue_neto"]).as_py() for t in tables)


def whole_day(server, args):
    rows, _, _ = load(server, args, args.rows, args.rows if args.other_rows is None else args.other_rows)
    # What the rules of the platform leave, computed by the server.
    answer = server.query(
        f"""WITH good AS (SELECT DISTINCT ON (order_id, user_id, monto) * FROM ventas
              WHERE fecha = '{DATE}' AND monto > 0 AND user_id IS NOT NULL AND coalesce(descuento, 0) <= monto),
            single AS (SELECT *, count(*) OVER (PARTITION BY order_id) AS versions FROM good)
            SELECT count(*), sum(monto - coalesce(descuento, 0)) FROM single WHERE versions = 1"""
    ).split("|")
    expected = int(answer[0]), decimal.Decimal(answer[1])

    def check(report, out):
        ours = not (out / "mart.parquet").exists()
        found = mart_sums(delta_files(out / "lake/marts/metricas_diarias") if ours else [out / "mart.parquet"])
        if ours:
            report["stages"] = stages(report["samples"], out / "history.jsonl")
            report["seconds"], report["cpu_seconds"] = report["process_seconds"], report["process_cpu_seconds"]
        return None if found == expected else f"found transactions and revenue {found}, expected {expected}"

    def ours(out):
        words = ["batch", "run", "--postgres", server.url.replace(f":{PASSWORD}", ""), "--connections", args.connections, "--dimension-tables", "--contract", "ventas"]
        return [args.program, *words, "--date", DATE, "--data", out, *args.day_arguments]

    def peer(name):
        return lambda out: [sys.executable, HERE / "peer.py", name, "--postgres", server.url, "--date", DATE, "--out", out]

    contenders = {OURS: ours} | {name: peer(name) for name in DAY_PEERS}
    runs, failed = take_turns(server, args, contenders, args.rounds, check)
    table(f"a day of {rows:,} rows, PostgreSQL to marts, {args.rounds} rounds", list(contenders), runs, failed, rows)
    if runs[OURS]:
        stage_table(runs[OURS], rows)
        slowest, peak = max(r["seconds"] for r in runs[OURS]), max(r["peak_mib"] for r in runs[OURS])
        say(f"{OURS}: slowest round {slowest:.1f} s, peak {peak:.0f} MiB")
    return {"runs": runs, "left_out": failed, "failed": OURS in failed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", default="extract", choices=["extract", "memory", "day"])
    parser.add_argument("--rows", type=int, default=5_000_000, help="rows of the day (default 5,000,000)")
    parser.add_argument("--other-rows", type=int, help="rows of each of the six other days (default: as many; in mode memory none)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=[5_000_000, 20_000_000, 50_000_000], help="rows in mode memory")
    parser.add_argument("--connections", type=int, default=2, help="connections of our extraction")
    parser.add_argument("--clientes", type=int, default=500_000)
    parser.add_argument("--productos", type=int, default=50_000)
    parser.add_argument("--shared-buffers", default="1GB")
    parser.add_argument("--json", type=pathlib.Path, help="file for everything that was measured")
    parser.add_argument("--day-arguments", type=str.split, default=[], help="more arguments of `simulacro batch run`, in one word")
    parser.add_argument("--binary", type=pathlib.Path, required=True, help="the built benches/extract")
    parser.add_argument("--program", type=pathlib.Path, help="the built simulacro, for mode day")
    args = parser.parse_args()
    if args.mode == "day" and args.program is None:
        parser.error("mode day needs --program")
    load_before = os.getloadavg()[0]
    say(f"{os.cpu_count()} cores, load {load_before:.1f} before, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC")
    if load_before > 0.5:
        say("warning: others are at work on this machine; rates will be too low, CPU per row is nearer to the truth")
    args.work = pathlib.Path(tempfile.mkdtemp(prefix="simulacro-bench-", dir=os.environ.get("SIMULACRO_BENCH_DIR")))
    server = None
    try:
        server = Server(args.work, args.shared_buffers)
        say(f"server {server.query('SHOW server_version')}, shared_buffers {args.shared_buffers}, no durability")
        result = {"extract": extract, "memory": memory, "day": whole_day}[args.mode](server, args)
    finally:
        if server is not None:
            server.close()
        shutil.rmtree(args.work, ignore_errors=True)
    if args.json is not None:
        about = {"mode": args.mode, "rows": args.rows, "rounds": args.rounds, "cores": os.cpu_count(), "load_before": load_before, "date": time.time()}
        args.json.write_text(json.dumps({**about, "settings": server.settings, **result}, indent=1))
    if result["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
