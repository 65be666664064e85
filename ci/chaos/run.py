"""Runs the stream job over a real Kafka and a real registry while its world breaks, and has the result judged.

Starts a broker and a registry, a proxy that loses replies, `simulacro produce`, and workers (`simulacro stream`, a process each).
Workers are killed (-9) and started again, frozen for longer than their session and thawed, and the broker is stopped and killed;
each fault comes when the producer has sent a number of events that is drawn from the seed, so a slow machine gets as many as a
quick one. When everything is processed, check.py judges what stands in Kafka. Faults are counted by evidence: signals that hit a
living process, the group's generations in the broker's log, replies of the broker that the proxy swallowed.

Exit codes: 0 all is equal, 1 something is not, 2 usage, 6 inconclusive (too few faults), 77 a service cannot be had here.
"""

import argparse
import calendar
import collections
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib

import confluent_kafka
from confluent_kafka import TopicPartition

import check

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
REGIONS = f"{ROOT}/contracts/seeds/regiones_validas.csv"
REGISTRY_VERSION = "3.0.9"
SESSION_S = 6
# Events of a day: `produce` holds a day in memory.
DAY_MAX = 1_000_000
# A session has that many events in the mean; what is sent is counted, this only plans.
EVENTS_PER_SESSION = 2.9
NOT_HERE = 77


class Broken(Exception):
    """The run could not be carried through, which is a failure."""


def say(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def until(seconds, what, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.1)
    raise Broken(f"{what}: not within {seconds} s")


class Broker:
    """The broker of ci/services-kafka, which can be stopped, killed and started again on its data."""

    def __init__(self, folder, advertise, mode):
        self.folder, self.advertise, self.mode, self.logs = folder, advertise, mode, 0
        self.script = f"{ROOT}/ci/services-kafka"
        self.address = self.start()
        with open(f"{folder}/behind_proxy", encoding="utf-8") as file:
            self.behind_proxy = file.read().strip()

    def start(self):
        if os.path.exists(f"{self.folder}/server.log"):
            os.rename(f"{self.folder}/server.log", f"{self.folder}/server.{self.logs}.log")
            self.logs += 1
        environment = {**os.environ, "SIMULACRO_KAFKA_ADVERTISE": self.advertise}
        done = subprocess.run([self.script, self.mode, self.folder], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, check=False)
        if done.returncode != 0:
            raise Broken(f"start the broker: {done.stderr.strip()[-2000:]}")
        return done.stdout.strip().splitlines()[-1]

    def pid(self):
        with open(f"{self.folder}/pid", encoding="utf-8") as file:
            return int(file.read())

    def kill(self):
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        until(30, "the killed broker ends", lambda: not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().split()[2])
        os.remove(f"{self.folder}/pid")

    def stop(self):
        subprocess.run([self.script, "stop", self.folder], check=True)

    def generations(self):
        """Rebalances of the group that were completed, by the broker's log."""
        found = set()
        for name in sorted(os.listdir(self.folder)):
            if name.startswith("server.") and name.endswith("log"):
                with open(f"{self.folder}/{name}", encoding="utf-8", errors="replace") as file:
                    for line in file:
                        match = re.search(rf"Stabilized group {check.GROUP} generation (\d+)", line)
                        if match:
                            found.add(int(match[1]))
        return found


class Registry:
    """Apicurio, in memory, as ci/services and the tests install it."""

    def __init__(self, folder):
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        home = f"{cache}/simulacro/services/apicurio-{REGISTRY_VERSION}"
        if not os.path.exists(f"{home}/done"):
            self.fetch(home)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/apis/ccompat/v7"
        self.log = open(f"{folder}/registry.log", "wb")
        self.process = subprocess.Popen(
            ["java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dquarkus.http.host=127.0.0.1",
             f"-Dquarkus.http.port={port}", "-jar", f"apicurio-registry-app-{REGISTRY_VERSION}-runner.jar"],
            cwd=home, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    @staticmethod
    def fetch(home):
        say(f"fetching Apicurio {REGISTRY_VERSION} (109 MB)")
        part = f"{home}.{os.getpid()}"
        os.makedirs(part)
        subprocess.run(["mvn", "-B", "-q", "dependency:copy", f"-Dartifact=io.apicurio:apicurio-registry-app:{REGISTRY_VERSION}:tar.gz:all",
                        f"-DoutputDirectory={part}"], check=True)
        archive = next(name for name in os.listdir(part) if name.endswith(".tar.gz"))
        subprocess.run(["tar", "-xzf", archive], cwd=part, check=True)
        os.remove(f"{part}/{archive}")
        open(f"{part}/done", "w", encoding="utf-8").close()
        if os.path.exists(home):
            shutil.rmtree(part)
        else:
            os.rename(part, home)

    def answers(self):
        try:
            with urllib.request.urlopen(f"{self.url}/subjects", timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False


class Worker:
    """A process of the job, which is started again under its name whenever it has ended."""

    def __init__(self, name, program, arguments, folder):
        self.name, self.program, self.arguments, self.folder = name, program, arguments, folder
        self.process, self.began, self.starts, self.again_at, self.thaw_at = None, 0.0, 0, 0.0, None
        # Ends by itself: how often, and the last line it said.
        self.ended, self.last_words = 0, collections.Counter()
        os.makedirs(folder, exist_ok=True)

    def start(self):
        self.starts += 1
        log = open(f"{self.folder}/{self.starts}.log", "wb")
        self.process = subprocess.Popen([self.program, *self.arguments, "--data", self.folder, "--name", self.name],
                                        stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        log.close()
        self.began = time.monotonic()

    def is_alive(self):
        return self.process is not None and self.process.poll() is None

    def is_at_work(self):
        """Alive, not frozen, and for long enough to have joined."""
        return self.is_alive() and self.thaw_at is None and time.monotonic() - self.began > 2.0

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.thaw_at = None
        self.process = None

    def why(self):
        with open(f"{self.folder}/{self.starts}.log", encoding="utf-8", errors="replace") as file:
            lines = file.read().strip().splitlines() or ["nothing"]
        return lines[-1][:300]


class Observer(threading.Thread):
    """A read-committed consumer of the metrics, from before the first row to after the last."""

    def __init__(self, brokers, path):
        super().__init__(daemon=True)
        self.brokers, self.path, self.stopping, self.failure, self.seen = brokers, path, threading.Event(), None, 0
        # The partitions at whose end it stands.
        self.at_end = set()

    def run(self):
        try:
            until(600, f"topic {check.METRICS}", self.is_there)
            numbers = check.partitions(self.brokers, check.METRICS)
            client = check.consumer(self.brokers)
            client.assign([TopicPartition(check.METRICS, n, 0) for n in numbers])
            with open(self.path, "wb") as file:
                while not (self.stopping.is_set() and self.at_end == set(numbers)):
                    for message in client.consume(1_000, timeout=0.5):
                        error = message.error()
                        if error is None:
                            self.at_end.discard(message.partition())
                            checksum = zlib.crc32(message.value() or b"")
                            file.write(check.Observed.FORMAT.pack(message.partition(), message.offset(), checksum))
                            self.seen += 1
                        elif error.code() == confluent_kafka.KafkaError._PARTITION_EOF:
                            self.at_end.add(message.partition())
            client.close()
        except Exception as error:  # told by the main thread
            self.failure = error

    def is_there(self):
        if self.stopping.is_set():
            raise Broken("no metrics were ever written")
        client = check.consumer(self.brokers)
        try:
            found = client.list_topics(timeout=10).topics
        except confluent_kafka.KafkaException:
            return False
        finally:
            client.close()
        return check.METRICS in found


class Group:
    """How far the producer and the job are, by the broker."""

    def __init__(self, brokers):
        self.client = confluent_kafka.Consumer({
            "bootstrap.servers": brokers, "group.id": check.GROUP, "enable.auto.commit": False, "isolation.level": "read_committed",
            "auto.offset.reset": "error", "enable.partition.eof": True, "fetch.wait.max.ms": 20, "log_level": 2,
        })

    def ends(self, topic):
        """End of each partition; nothing while the broker does not answer."""
        try:
            found = self.client.list_topics(topic, timeout=5).topics[topic]
            if found.error:
                return None
            places = [TopicPartition(topic, n) for n in sorted(found.partitions)]
            return {p.partition: self.client.get_watermark_offsets(p, timeout=5)[1] for p in places}
        except confluent_kafka.KafkaException:
            return None

    def committed(self, topic, numbers):
        try:
            found = self.client.committed([TopicPartition(topic, n) for n in numbers], timeout=5)
            return {p.partition: max(p.offset, 0) for p in found if p.error is None}
        except confluent_kafka.KafkaException:
            return None

    def lag(self):
        """Records, markers among them, that are not processed; nothing while unknown."""
        total = 0
        for topic in (check.CLICKS, check.PARTIALS):
            ends = self.ends(topic)
            if ends is None:
                return None
            committed = self.committed(topic, ends)
            if committed is None or len(committed) < len(ends):
                return None
            total += sum(ends[n] - committed[n] for n in ends)
        return total

    def is_drained(self):
        try:
            for topic in (check.CLICKS, check.PARTIALS):
                ends = self.ends(topic)
                committed = self.committed(topic, ends) if ends else None
                if committed is None or len(committed) < len(ends):
                    return False
                for number, end in ends.items():
                    if committed[number] < end and check.record_behind(self.client, topic, number, committed[number]) is not None:
                        return False
            return True
        except (confluent_kafka.KafkaException, SystemExit):
            return False


class Run:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.random = random.Random(options.seed)
        self.facts, self.red = {}, {}
        self.processes, self.workers = [], []
        self.broker = self.registry = self.observer = None
        self.kills = self.kills_at_work = self.freezes = self.broker_stops = self.broker_kills = 0
        self.lag_max = 0
        self.sent = None

    # -- the world ------------------------------------------------------------------------------------------------------

    def start_services(self):
        port = free_port()
        say("starting the broker and the registry")
        self.registry = Registry(self.folder)
        mode = "start" if self.options.full else "fast"
        self.broker = Broker(f"{self.folder}/kafka", f"127.0.0.1:{port}", mode)
        self.proxy_stats = f"{self.folder}/proxy.json"
        proxy = subprocess.Popen(
            [sys.executable, f"{HERE}/proxy.py", "--listen", str(port), "--upstream", self.broker.behind_proxy,
             "--seed", str(self.options.seed), "--end-txn", str(self.options.drop), "--others", str(self.options.drop_others),
             "--stats", self.proxy_stats], stdout=subprocess.PIPE, text=True)
        self.processes.append(proxy)
        if "listening" not in proxy.stdout.readline():
            raise Broken("the proxy did not start")
        self.proxied = f"127.0.0.1:{port}"
        until(120, "the registry answers", self.registry.answers)
        self.config = f"{self.folder}/stream.toml"
        with open(self.config, "w", encoding="utf-8") as file:
            # Users stay exact, so that they can be compared; event time runs much quicker than the clock.
            file.write(f"session_timeout_ms = {SESSION_S * 1000}\nexact_users_max = 65536\nahead_max_ms = 7200000\n")
        self.place = ["--kafka", self.proxied, "--registry", self.registry.url, "--config", self.config]

    def stop_everything(self):
        for worker in self.workers:
            if worker.is_alive():
                worker.process.send_signal(signal.SIGCONT)
                worker.kill()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        if self.registry:
            self.registry.process.kill()
            self.registry.process.wait()
            self.registry.log.close()
        if self.broker:
            self.broker.stop()

    # -- the producer ---------------------------------------------------------------------------------------------------

    def days(self):
        """A number of sessions for each day; they add up to the events that were asked for, about."""
        count = max(1, math.ceil(self.options.events / DAY_MAX))
        sessions = round(self.options.events / count / EVENTS_PER_SESSION)
        return [(f"1997-01-{day:02}", sessions) for day in range(1, count + 1)]

    def produce(self):
        """All days, one after another, in a thread; says how much was sent, or why not."""
        self.sent_so_far, self.producer_failure, self.producing = 0, None, True
        try:
            for day, sessions in self.days():
                arguments = ["produce", *self.place, "--data", f"{self.folder}/producer", "--date", day, "--seed", str(self.options.seed),
                             "--browsing", str(sessions), "--rate", str(self.options.rate), "--partitions", str(self.options.partitions),
                             "--duplicates", "20", "--out-of-order", "60", "--delay-max", "600", "--malformed", "5", "--skew", "100"]
                with open(f"{self.folder}/produce-{day}.log", "wb") as log:
                    process = subprocess.Popen([self.options.program, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                               stderr=log, text=True)
                    self.processes.append(process)
                    said = process.communicate()[0]
                match = re.search(rf"^{day}: (\d+) records to", said, re.M)
                if process.returncode != 0 or not match:
                    with open(f"{self.folder}/produce-{day}.log", encoding="utf-8") as log:
                        raise Broken(f"produce {day} ended with {process.returncode}: {log.read()[-1500:]}")
                self.sent_so_far += int(match[1])
            self.sent = self.sent_so_far
        except Exception as error:  # told by the main thread
            self.producer_failure = error
        finally:
            self.producing = False

    # -- faults ---------------------------------------------------------------------------------------------------------

    def plan(self):
        """(share of the events after which it comes, what comes), ascending."""
        between = lambda: self.random.uniform(0.03, 0.95)
        plan = [(between(), "kill") for _ in range(self.options.kills)] + [(between(), "freeze") for _ in range(self.options.freezes)]
        for n in range(self.options.restarts):
            middle = (n + 1) / (self.options.restarts + 1)
            # Both ends of a broker: told to stop, and killed.
            plan.append((middle + self.random.uniform(-0.08, 0.08), "stop broker" if n % 2 else "kill broker"))
        return collections.deque(sorted(plan))

    def carry_out(self, fault):
        if fault in ("kill broker", "stop broker"):
            say(fault)
            if fault == "kill broker":
                self.broker.kill()
                self.broker_kills += 1
            else:
                self.broker.stop()
                self.broker_stops += 1
            time.sleep(self.random.uniform(0.5, 3))
            self.broker.start()
            return True
        alive = [worker for worker in self.workers if worker.is_alive() and worker.thaw_at is None]
        at_work = [worker for worker in alive if worker.is_at_work()]
        if fault == "freeze":
            if not at_work:
                return False
            worker = self.random.choice(at_work)
            worker.process.send_signal(signal.SIGSTOP)
            # Longer than its session, so that others take over before it comes back.
            worker.thaw_at = time.monotonic() + self.random.uniform(SESSION_S + 1, SESSION_S + 5)
            self.freezes += 1
            return True
        if not alive:
            return False
        worker = self.random.choice(at_work or alive)
        self.kills_at_work += worker.is_at_work()
        worker.kill()
        self.kills += 1
        # Some are back within their session, and some after others have taken over.
        quick = self.random.random() < 0.4
        worker.again_at = time.monotonic() + (self.random.uniform(0.1, 1.5) if quick else self.random.uniform(SESSION_S + 1, SESSION_S + 4))
        return True

    def look_after_workers(self):
        now = time.monotonic()
        for worker in self.workers:
            if worker.thaw_at is not None and now >= worker.thaw_at:
                worker.thaw_at = None
                worker.process.send_signal(signal.SIGCONT)
            if worker.process is not None and worker.process.poll() is not None:
                worker.ended += 1
                worker.last_words[worker.why()] += 1
                worker.process = None
                worker.again_at = now + 1
            if worker.process is None and now >= worker.again_at:
                worker.start()

    # -- the run --------------------------------------------------------------------------------------------------------

    def chaos(self):
        group = Group(self.broker.address)
        self.observer = Observer(self.broker.address, f"{self.folder}/observed")
        self.observer.start()
        producer = threading.Thread(target=self.produce, daemon=True)
        producer.start()
        until(300, f"topic {check.CLICKS}", lambda: self.producer_failure or group.ends(check.CLICKS) is not None)
        for n in range(self.options.workers):
            arguments = ["stream", *self.place]
            self.workers.append(Worker(f"w{n}", self.options.program, arguments, f"{self.folder}/worker-{n}"))
        plan, began, told = self.plan(), time.monotonic(), 0.0
        self.first_event = None
        while self.producing or plan:
            self.look_after_workers()
            if self.producer_failure:
                raise self.producer_failure
            ends = group.ends(check.CLICKS)
            done = sum(ends.values()) if ends else 0
            if done and self.first_event is None:
                self.first_event = time.monotonic()
            while plan and (done >= plan[0][0] * self.options.events or not self.producing):
                if not self.carry_out(plan[0][1]):
                    break
                plan.popleft()
                self.look_after_workers()
            lag = group.lag()
            if lag is not None:
                self.lag_max = max(self.lag_max, lag)
            if time.monotonic() - told > 15:
                told = time.monotonic()
                rate = done / (told - self.first_event) if self.first_event and told > self.first_event else 0
                say(f"{done:,} events in {told - began:.0f} s ({rate:,.0f}/s), lag {lag}, killed {self.kills}, ended "
                    f"{sum(w.ended for w in self.workers)}, rows seen {self.observer.seen:,}")
            time.sleep(0.2)
        self.produced_at = time.monotonic()
        say(f"all is sent: {self.sent:,} events; waiting for the job")
        quiet, told = 0, time.monotonic()
        while quiet < 3:
            self.look_after_workers()
            quiet = quiet + 1 if group.is_drained() else 0
            if time.monotonic() - told > 15:
                told = time.monotonic()
                say(f"lag {group.lag()}, ended {sum(w.ended for w in self.workers)}, rows seen {self.observer.seen:,}")
            if time.monotonic() - self.produced_at > self.options.drain_max:
                raise Broken(f"the job is not done {self.options.drain_max} s after the last event: lag {group.lag()}; "
                             + "; ".join(f"{w.name}: {w.why()}" for w in self.workers))
            time.sleep(0.5)
        self.drained_at = time.monotonic()
        group.client.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.process.send_signal(signal.SIGCONT)
                worker.process.send_signal(signal.SIGINT)
        for worker in self.workers:
            if worker.is_alive():
                try:
                    worker.process.wait(60)
                except subprocess.TimeoutExpired:
                    raise Broken(f"{worker.name} does not stop: {worker.why()}") from None
        self.observer.stopping.set()
        self.observer.join(120)
        if self.observer.is_alive() or self.observer.failure:
            raise Broken(f"the observer did not come to the end: {self.observer.failure}")

    def status(self):
        # The committed fates, told by the job itself; asked directly, without the proxy.
        arguments = ["stream-status", "--kafka", self.broker.address, "--registry", self.registry.url, "--config", self.config,
                     "--data", f"{self.folder}/worker-0"]
        done = subprocess.run([self.options.program, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Broken(f"stream-status: {done.stderr[-1500:]}")
        with open(f"{self.folder}/status", "w", encoding="utf-8") as file:
            file.write(done.stdout)

    def check(self, name):
        """Judges; gives back the counts of what is wrong."""
        folder = f"{self.folder}/check-{name}"
        command = [sys.executable, f"{HERE}/check.py", "--brokers", self.broker.address, "--registry", self.registry.url,
                   "--folder", folder, "--regions", REGIONS, "--sent", str(self.sent), "--status", f"{self.folder}/status",
                   "--observed", f"{self.folder}/observed"]
        with open(f"{self.folder}/check-{name}.log", "w", encoding="utf-8") as log:
            done = subprocess.run(command, stdout=log, stderr=log, check=False)
        with open(f"{self.folder}/check-{name}.log", encoding="utf-8") as log:
            text = log.read()
        if not os.path.exists(f"{folder}/verdict.json"):
            raise Broken(f"check.py ended with {done.returncode}:\n{text[-3000:]}")
        if name == "run":
            print(text, end="", flush=True)
        with open(f"{folder}/verdict.json", encoding="utf-8") as file:
            return done.returncode, json.load(file)

    # -- the checker, proved ----------------------------------------------------------------------------------------------

    def prove(self, before):
        """Damages the topics on purpose, one thing after another, and asks that each is seen for what it is."""
        schemas = check.Schemas(self.registry.url, check.METRIC_FIELDS)
        # The newest rows of two windows, with their keys.
        newest, message = {}, None
        for other in check.records(self.broker.address, check.METRICS, [0]):
            message = message or other
            if other.key() in newest or len(newest) < 2:
                newest[other.key()] = list(check.metric_of(other.value(), schemas))
        (first, for_cent), (second, for_user) = newest.items()
        row, number = check.metric_of(message.value(), schemas), int.from_bytes(message.value()[1:5], "big")
        click = next(m for m in check.records(self.broker.address, check.CLICKS, [0]) if m.value() and m.value()[0] == 0)
        schema = int.from_bytes(click.value()[1:5], "big")
        # Past the last midnight: the only minutes that are not too late, and whose windows are closed nevertheless.
        day = self.days()[-1][0]
        midnight = calendar.timegm(time.strptime(day, "%Y-%m-%d")) * 1000 + 86_400_000
        lost = check.click_bytes(schema, ("nobody", "purchase", "/pago", "P001", 1, "sur", midnight + 30_000))

        def append(topic, partition, key, value):
            producer = confluent_kafka.Producer({"bootstrap.servers": self.broker.address})
            producer.produce(topic, key=key, value=value, partition=partition)
            producer.flush(30)

        def cent_more():
            for_cent[8] += 1
            for_cent[11] += 1
            append(check.METRICS, 0, first, check.metric_bytes(number, for_cent))

        def user_less():
            for_user[10] -= 1
            for_user[11] += 1
            append(check.METRICS, 0, second, check.metric_bytes(number, for_user))

        def back():
            client = confluent_kafka.Consumer({"bootstrap.servers": self.broker.address, "group.id": check.GROUP, "enable.auto.commit": False})
            client.commit(offsets=[TopicPartition(check.CLICKS, 0, 1)], asynchronous=False)
            client.close()

        assert check.metric_bytes(number, row) == message.value(), "the checker writes what it reads"
        proofs = [
            ("a row that is there twice", "duplicate", lambda: append(check.METRICS, 0, message.key(), message.value())),
            ("a row that is one cent off", "wrong", cent_more),
            ("a row that is one user off", "wrong", user_less),
            ("a click that nobody processed", "lost write", lambda: append(check.CLICKS, 0, b"nobody", lost)),
            ("a group that goes back", "backward step", back),
        ]
        for what, kind, damage in proofs:
            damage()
            _, verdict = self.check("proof")
            self.red[what] = verdict["found"][kind] > before["found"][kind]
            if not self.red[what]:
                say(f"the checker does not see {what}: {verdict['found']}")
            before = verdict

    # -- the summary ------------------------------------------------------------------------------------------------------

    def summary(self, began):
        with open(self.proxy_stats, encoding="utf-8") as file:
            proxy = json.load(file)
        rebalances = len(self.broker.generations())
        restarts = self.broker_stops + self.broker_kills
        words = collections.Counter()
        for worker in self.workers:
            words.update(worker.last_words)
        code, verdict = self.verdict
        facts = verdict["facts"]
        ended = sum(worker.ended for worker in self.workers)
        differences = sum(verdict["found"].values())
        seconds = self.produced_at - self.first_event
        least = [
            ("workers killed (-9)", self.kills, self.options.kills),
            ("rebalances of the group", rebalances, self.options.rebalances_min),
            ("broker restarts", restarts, self.options.restarts),
            ("replies lost after a commit", proxy["lost_after_commit"], self.options.lost_min),
        ]
        print(f"""
stream-chaos, seed {self.options.seed}: {self.sent:,} events over {self.options.partitions} partitions, {self.options.workers} workers
  produced in                    {seconds:,.0f} s: {self.sent / seconds:,.0f} events/s
  processed                      {self.drained_at - self.produced_at:,.0f} s after the last event; the lag was {self.lag_max:,} records at most
  workers killed (-9)            {self.kills}, of them {self.kills_at_work} at work for over 2 s
  workers frozen and thawed      {self.freezes}, each for longer than the session of {SESSION_S} s
  workers ended by themselves    {ended}
  broker restarts                {restarts}: {self.broker_kills} killed, {self.broker_stops} told to stop
  rebalances of the group        {rebalances}, by the broker's log
  replies lost                   {sum(proxy['lost'].values())}: {', '.join(f'{count} {name}' for name, count in sorted(proxy['lost'].items()))}
    of them after a commit       {proxy['lost_after_commit']}, which had landed
  rows aborted                   {facts['rows aborted, and never seen']}, and never seen by a read-committed consumer
  windows compared               {facts['windows expected']:,}, {facts['windows equal']:,} equal to the cent and to the user
  revenue                        {facts['revenue of region_1m']}
  differences                    {differences}
  duration                       {time.monotonic() - began:,.0f} s""")
        for words, count in words.most_common(6):
            print(f"    ended {count} times: {words}")
        for what, is_red in self.red.items():
            print(f"  checker sees {what + ':':<31} {'yes' if is_red else 'NO'}")
        sys.stdout.flush()
        if code != 0 or not all(self.red.values()):
            print("FAILED")
            return 1
        missing = [f"{name}: {found}, expected at least {expected}" for name, found, expected in least if found < expected]
        if missing:
            print("INCONCLUSIVE\n  " + "\n  ".join(missing))
            return 6
        print("EQUAL")
        return 0

    def whole(self):
        began = time.monotonic()
        self.start_services()
        self.chaos()
        say("the job is done; judging")
        self.status()
        self.verdict = self.check("run")
        if self.options.prove and self.verdict[0] == 0:
            say("damaging the topics on purpose")
            self.prove(self.verdict[1])
        return self.summary(began)


def arguments():
    parser = argparse.ArgumentParser(prog="ci/stream-chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = lambda least: lambda text: least if int(text) < least else int(text)
    parser.add_argument("--program", required=True, help="the program simulacro")
    parser.add_argument("--full", action="store_true", help="10 M events, 60 kills, 10 freezes, 2 restarts of the broker")
    parser.add_argument("--events", type=number(1_000), help="about; what is sent is counted (200000)")
    parser.add_argument("--rate", type=number(100), help="events that are sent at once, once a second (2500)")
    parser.add_argument("--kills", type=number(0), help="kills of workers (8)")
    parser.add_argument("--freezes", type=number(0), help="workers that are frozen and come back (2)")
    parser.add_argument("--restarts", type=number(0), help="restarts of the broker, killed and stopped by turns (1)")
    parser.add_argument("--rebalances-min", type=number(0), help="fewer are inconclusive (as many as kills, 20 at most)")
    parser.add_argument("--lost-min", type=number(0), help="fewer replies lost after a commit are inconclusive (1; 50 with --full)")
    parser.add_argument("--drop", type=float, default=20, help="thousandths of replies to EndTxn that are lost (20)")
    parser.add_argument("--drop-others", type=float, default=0.5, help="thousandths of other replies that are lost (0.5)")
    parser.add_argument("--workers", type=number(1), default=3, help="processes of the job (3)")
    parser.add_argument("--partitions", type=number(1), default=6, help="of clicks (6)")
    parser.add_argument("--seed", type=int, default=1, help="what faults are drawn from, and events (1)")
    parser.add_argument("--drain-max", type=number(10), default=300, help="seconds within which all must be processed (300)")
    parser.add_argument("--prove", action="store_true", help="afterwards damage the topics on purpose, and ask that the checker sees it")
    parser.add_argument("--keep", metavar="DIR", help="folder for logs and data, which is kept; otherwise a temporary one")
    options = parser.parse_args()
    sizes = {"events": 10_000_000, "rate": 5_500, "kills": 60, "freezes": 10, "restarts": 2, "lost_min": 50} if options.full else {
        "events": 200_000, "rate": 2_500, "kills": 8, "freezes": 2, "restarts": 1, "lost_min": 1}
    for name, value in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.rebalances_min is None:
        options.rebalances_min = min(20, options.kills)
    return options


def main():
    options = arguments()
    for program in ("java", "mvn"):
        if not shutil.which(program):
            print(f"stream-chaos: found no {program}, expected it for the broker and the registry", file=sys.stderr)
            return NOT_HERE
    folder = options.keep or tempfile.mkdtemp(prefix="simulacro-chaos-")
    os.makedirs(folder, exist_ok=True)
    if os.listdir(folder):
        print(f"--keep {folder}: found files in it, expected an empty folder", file=sys.stderr)
        return 2
    run = Run(options, os.path.abspath(folder))
    code = 1
    # Told to stop, it stops what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        code = run.whole()
    except Broken as error:
        print(f"FAILED: {error}", flush=True)
    finally:
        run.stop_everything()
        if not options.keep and code == 0:
            shutil.rmtree(folder)
        elif code != 0:
            print(f"logs and data are kept in {folder}; again with: ci/stream-chaos --seed {options.seed} --events {options.events} "
                  f"--rate {options.rate} --kills {options.kills} --freezes {options.freezes} --restarts {options.restarts} "
                  f"--workers {options.workers} --drop {options.drop:g}")
    return code


if __name__ == "__main__":
    sys.exit(main())
