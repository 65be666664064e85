"""Judges what the job realtime_metrics left in Kafka: every window against a computation of its own, and the log itself.

Nothing here is shared with the pipeline: the records of ecommerce.clicks are decoded by the few lines below, the rules of late,
duplicated and malformed events are written down once more from the specification, and the windows are added up naively. It reads
as a read-committed consumer, streams, and keeps no more than some minutes of events in memory; the rest is in files.

What it looks for (after the list of Jepsen's checker for Kafka):
  lost write          a window, a dead letter or a late event that the clicks demand is not there, or a click that was sent
  wrong               a window whose newest revision has another value, to the cent and to the user
  unexpected          a window or a letter that nothing demands
  duplicate           a revision of a window or a letter that is there twice
  revision gap        revisions of a window that are not 0, 1, 2, ... in order of offset
  backward step       offsets of the group that go back from one commit to a later one
  not processed       the group's offsets end before the topic does
  inconsistent        what an observer saw while it ran is not what stands there now: another value, more, or less
  counts              the fates that the job tells are not those of this computation

Usage: check.py --brokers A --registry URL --folder DIR --regions FILE [--sent N] [--status FILE] [--observed FILE]
Exit codes: 0 equal, 1 not. DIR is for its files; DIR/verdict.json has the counts. Needs confluent-kafka.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pickle
import re
import sqlite3
import struct
import sys
import urllib.request
import zlib

import confluent_kafka
from confluent_kafka import TopicPartition

MINUTE = 60_000
# The specification's numbers.
WATERMARK_BEHIND = 30_000
LATENESS = 300_000
HORIZON = 600_000
FUTURE = 300_000
SLIDING = 5
TYPES = {"click": 0, "purchase": 1, "add_to_cart": 2}
# Counts as a user and as nothing else; `produce` ends a day with it.
OTHER_TYPES = {"heartbeat"}

CLICKS, METRICS = "ecommerce.clicks", "ecommerce.metricas_realtime"
DEAD, LATE = "ecommerce.clicks.dead_letter", "ecommerce.clicks.late"
PARTIALS, GROUP = "realtime_metrics.partials", "realtime_metrics"
BATCH = 5_000
SHOWN = 5

CLICK_FIELDS = [
    ("user_id", "string"), ("event_type", "string"), ("page", "string"), ("product_id", ["null", "string"]),
    ("monto", "decimal 2"), ("region", "string"), ("timestamp", "timestamp-millis"),
]
METRIC_FIELDS = [
    ("window_kind", "string"), ("window_start", "timestamp-millis"), ("window_end", "timestamp-millis"), ("region", "string"),
    ("page", ["null", "string"]), ("clicks", "long"), ("purchases", "long"), ("add_to_cart", "long"), ("revenue", "decimal 2"),
    ("conversion_rate", ["null", "double"]), ("unique_users", "long"), ("revision", "long"), ("exact", "boolean"),
]


class Malformed(Exception):
    pass


# -- Avro, as much of it as these two records need --------------------------------------------------------------------------


def read_long(data, at):
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise Malformed("a number has no end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return (value >> 1) ^ -(value & 1), at


def read_bytes(data, at):
    length, at = read_long(data, at)
    if length < 0 or at + length > len(data):
        raise Malformed(f"a length of {length}")
    return data[at:at + length], at + length


def read_text(data, at):
    raw, at = read_bytes(data, at)
    try:
        return raw.decode(), at
    except UnicodeDecodeError as error:
        raise Malformed("text that is not UTF-8") from error


def read_optional(data, at, read):
    branch, at = read_long(data, at)
    if branch == 0:
        return None, at
    if branch != 1:
        raise Malformed(f"branch {branch} of 2")
    return read(data, at)


def read_cents(data, at):
    raw, at = read_bytes(data, at)
    return int.from_bytes(raw, "big", signed=True), at


def write_long(value):
    value = (value << 1) ^ (value >> 63)
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_bytes(raw):
    return write_long(len(raw)) + raw


def write_cents(cents):
    return write_bytes(cents.to_bytes(max(1, (cents.bit_length() + 8) // 8), "big", signed=True))


def shape(field):
    """A field's type in the words of the lists above."""
    kind = field["type"]
    if isinstance(kind, dict) and kind.get("logicalType") == "decimal":
        return f"decimal {kind['scale']}"
    if isinstance(kind, dict):
        return kind.get("logicalType", kind["type"])
    return kind


class Schemas:
    """Ids whose schema is the one that is read here."""

    def __init__(self, url, expected):
        self.url, self.expected, self.known = url, expected, {}

    def body(self, value):
        """Where the body of a record begins."""
        if value is None or len(value) < 5 or value[0] != 0:
            raise Malformed("no header of a registry")
        number = value[:5]
        if number not in self.known:
            self.known[number] = self.fetch(int.from_bytes(number[1:], "big"))
        if not self.known[number]:
            raise Malformed("a schema nobody registered")
        return 5

    def fetch(self, number):
        request = urllib.request.Request(f"{self.url.rstrip('/')}/schemas/ids/{number}")
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                schema = json.loads(json.load(reply)["schema"])
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return False
            raise
        found = [(field["name"], shape(field)) for field in schema["fields"]]
        if found != self.expected:
            raise SystemExit(f"schema {number}: found {found}, expected {self.expected}")
        return True


def click_of(value, schemas):
    """(user, type, page, product, cents, region, time) of a record's value."""
    at = schemas.body(value)
    user, at = read_text(value, at)
    kind, at = read_text(value, at)
    page, at = read_text(value, at)
    product, at = read_optional(value, at, read_text)
    cents, at = read_cents(value, at)
    region, at = read_text(value, at)
    time, at = read_long(value, at)
    if at != len(value):
        raise Malformed("bytes behind the record")
    return user, kind, page, product, cents, region, time


def metric_of(value, schemas):
    at = schemas.body(value)
    kind, at = read_text(value, at)
    start, at = read_long(value, at)
    end, at = read_long(value, at)
    region, at = read_text(value, at)
    page, at = read_optional(value, at, read_text)
    clicks, at = read_long(value, at)
    purchases, at = read_long(value, at)
    carts, at = read_long(value, at)
    cents, at = read_cents(value, at)
    rate, at = read_optional(value, at, lambda data, at: (struct.unpack_from("<d", data, at)[0], at + 8))
    users, at = read_long(value, at)
    revision, at = read_long(value, at)
    exact, at = value[at], at + 1
    if at != len(value):
        raise Malformed("bytes behind the record")
    return kind, start, end, region, page, clicks, purchases, carts, cents, rate, users, revision, exact == 1


def metric_bytes(number, row):
    """The value of a metrics record, to break things on purpose. `number` is the id of its schema."""
    kind, start, end, region, page, clicks, purchases, carts, cents, rate, users, revision, exact = row
    text = lambda t: write_bytes(t.encode())
    return b"".join([
        b"\0", number.to_bytes(4, "big"), text(kind), write_long(start), write_long(end), text(region),
        write_long(0) if page is None else write_long(1) + text(page), write_long(clicks), write_long(purchases),
        write_long(carts), write_cents(cents), write_long(0) if rate is None else write_long(1) + struct.pack("<d", rate),
        write_long(users), write_long(revision), bytes([exact]),
    ])


def click_bytes(number, click):
    user, kind, page, product, cents, region, time = click
    text = lambda t: write_bytes(t.encode())
    return b"".join([
        b"\0", number.to_bytes(4, "big"), text(user), text(kind), text(page),
        write_long(0) if product is None else write_long(1) + text(product), write_cents(cents), text(region), write_long(time),
    ])


# -- reading ----------------------------------------------------------------------------------------------------------------


def consumer(brokers, committed=True):
    return confluent_kafka.Consumer({
        "bootstrap.servers": brokers, "group.id": "chaos-check", "enable.auto.commit": False, "auto.offset.reset": "error",
        "isolation.level": "read_committed" if committed else "read_uncommitted", "enable.partition.eof": True,
        "allow.auto.create.topics": False, "queued.max.messages.kbytes": 32_768, "log_level": 2,
    })


def partitions(brokers, topic):
    client = consumer(brokers)
    found = client.list_topics(topic, timeout=30).topics[topic]
    client.close()
    if found.error:
        raise SystemExit(f"topic {topic}: {found.error}")
    return sorted(found.partitions)


def records(brokers, topic, numbers, committed=True):
    """Records of partitions, each to its end, in order of offset within a partition."""
    client = consumer(brokers, committed)
    begin = [TopicPartition(topic, n, client.get_watermark_offsets(TopicPartition(topic, n), timeout=30)[0]) for n in numbers]
    client.assign(begin)
    left = set(numbers)
    silent = 0
    while left:
        # It waits until it has so many, or for so long.
        batch = client.consume(BATCH, timeout=0.3)
        silent = 0 if batch else silent + 1
        if silent == 400:
            raise SystemExit(f"read {topic} {sorted(left)}: found no end within 120 s")
        for message in batch:
            error = message.error()
            if error is None:
                yield message
            elif error.code() == confluent_kafka.KafkaError._PARTITION_EOF:
                left.discard(message.partition())
            elif not error.retriable() and error.code() not in (
                    confluent_kafka.KafkaError._ALL_BROKERS_DOWN, confluent_kafka.KafkaError._TRANSPORT):
                raise SystemExit(f"read {topic}: {error}")
    client.close()


# -- the computation ----------------------------------------------------------------------------------------------------------


class Partition:
    """One partition of clicks, record by record in order of offset: what becomes of each, and minutes that are complete."""

    def __init__(self, number, regions, schemas, spill):
        self.number, self.regions, self.schemas, self.spill = number, regions, schemas, spill
        self.watermark = None
        self.seen = {}
        self.panes = {}
        self.fates = collections.Counter()
        # Offsets of records that must lie in another topic, with a checksum of their bytes.
        self.dead, self.late = {}, {}

    def judge(self, click, appended):
        user, kind, page, product, cents, region, time = click
        if not (user and kind and page and region) or time < 0:
            return "quarantined"
        if time > appended + FUTURE:
            return "dead_lettered"
        if kind not in TYPES and kind not in OTHER_TYPES or region not in self.regions:
            return "quarantined"
        if kind == "purchase" and cents < 0:
            return "rejected"
        if kind != "purchase" and cents != 0:
            return "quarantined"
        return None

    def take(self, offset, value, appended):
        try:
            click = click_of(value, self.schemas)
            fate = self.judge(click, appended)
        except Malformed:
            fate = "dead_lettered"
        if fate:
            self.dead[offset] = zlib.crc32(value or b"")
            self.fates[fate] += 1
            return
        time = click[6]
        minute = time - time % MINUTE
        reached = lambda t: self.watermark is not None and self.watermark >= t
        if not reached(minute + MINUTE + HORIZON):
            # The bytes of the record are its identity.
            known = self.seen.setdefault(minute, set())
            body = value[5:]
            if body in known:
                self.fates["deduplicated"] += 1
                return
            known.add(body)
        if reached(minute + MINUTE + LATENESS):
            self.late[offset] = zlib.crc32(value)
            self.fates["late"] += 1
            return
        self.fates["published"] += 1
        self.add(minute, click)
        if self.watermark is None or time - WATERMARK_BEHIND > self.watermark:
            before = self.watermark
            self.watermark = time - WATERMARK_BEHIND
            if before is None or before // MINUTE != self.watermark // MINUTE:
                self.tidy()

    def add(self, minute, click):
        user, kind, page, _, cents, region, _ = click
        pane = self.panes.setdefault(minute, {})
        cell = pane.get((region, page))
        if cell is None:
            cell = pane[region, page] = [0, 0, 0, 0, set()]
        if kind in TYPES:
            cell[TYPES[kind]] += 1
        cell[3] += cents
        cell[4].add(user)

    def tidy(self):
        """A minute to which only late events can come is complete."""
        done = [minute for minute in self.panes if self.watermark >= minute + MINUTE + LATENESS]
        for minute in sorted(done):
            pickle.dump((minute, self.panes.pop(minute)), self.spill)
        for minute in [m for m in self.seen if self.watermark >= m + MINUTE + HORIZON]:
            del self.seen[minute]

    def finish(self):
        for minute in sorted(self.panes):
            pickle.dump((minute, self.panes[minute]), self.spill)
        self.spill.close()


def compute(brokers, registry, folder, regions, numbers):
    """Reads some partitions of clicks and leaves complete minutes in a file for each."""
    schemas = Schemas(registry, CLICK_FIELDS)
    tasks = {n: Partition(n, regions, schemas, open(f"{folder}/minutes-{n}", "wb")) for n in numbers}
    for message in records(brokers, CLICKS, numbers):
        tasks[message.partition()].take(message.offset(), message.value(), message.timestamp()[1])
    for task in tasks.values():
        task.finish()
    return {n: (dict(t.fates), t.watermark, t.dead, t.late) for n, t in tasks.items()}


def minutes(path):
    with open(path, "rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return


def merged(paths):
    """Minutes of all partitions together, ascending."""
    sources = [minutes(path) for path in paths]
    heads = [next(source, None) for source in sources]
    while any(heads):
        minute = min(head[0] for head in heads if head)
        pane = {}
        for at, head in enumerate(heads):
            if head and head[0] == minute:
                for key, cell in head[1].items():
                    add_cell(pane, key, cell)
                heads[at] = next(sources[at], None)
        yield minute, pane


def add_cell(cells, key, cell):
    known = cells.get(key)
    if known is None:
        cells[key] = cell[:4] + [set(cell[4])]
    else:
        for n in range(4):
            known[n] += cell[n]
        known[4] |= cell[4]


def by_region(pane):
    out = {}
    for (region, _), cell in pane.items():
        add_cell(out, region, cell)
    return out


def windows(paths, closed):
    """Every window that must have been emitted: those with an event whose end the smallest watermark has passed."""
    recent = collections.deque()  # minutes by region that a sliding window may still cover

    def row(kind, start, length, region, page, cell):
        return kind, start, start + length * MINUTE, region, page, cell[0], cell[1], cell[2], cell[3], len(cell[4])

    def sliding(last):
        while recent and recent[0][0] <= last - SLIDING * MINUTE:
            recent.popleft()
        together = {}
        for _, regions in recent:
            for region, cell in regions.items():
                add_cell(together, region, cell)
        start = last - (SLIDING - 1) * MINUTE
        return [row("region_5m", start, SLIDING, region, "", cell) for region, cell in together.items()]

    previous = None
    for minute, pane in merged(paths):
        # Windows that end between the last minute with events and this one.
        while previous is not None and previous + MINUTE < minute and recent:
            previous += MINUTE
            if previous + MINUTE <= closed:
                yield from sliding(previous)
        regions = by_region(pane)
        recent.append((minute, regions))
        if minute + MINUTE <= closed:
            yield from sliding(minute)
            for region, cell in regions.items():
                yield row("region_1m", minute, 1, region, "", cell)
            for (region, page), cell in pane.items():
                yield row("page_1m", minute, 1, region, page, cell)
        previous = minute
    while recent and previous is not None:
        previous += MINUTE
        if previous + MINUTE > closed:
            break
        yield from sliding(previous)


# -- judging ------------------------------------------------------------------------------------------------------------------


class Verdict:
    KINDS = ["lost write", "wrong", "unexpected", "duplicate", "revision gap", "backward step", "not processed", "inconsistent", "counts"]

    def __init__(self):
        self.found = {kind: 0 for kind in self.KINDS}
        self.examples = {kind: [] for kind in self.KINDS}
        self.facts = {}

    def add(self, kind, what, count=1):
        self.found[kind] += count
        if len(self.examples[kind]) < SHOWN:
            self.examples[kind].append(what)

    def total(self):
        return sum(self.found.values())


COLUMNS = "kind TEXT, start INT, end INT, region TEXT, page TEXT, clicks INT, purchases INT, carts INT, cents INT, users INT"
KEY = "kind, start, region, page"
VALUE = "end, clicks, purchases, carts, cents, users"


def open_store(path):
    for suffix in ("", "-journal"):
        if os.path.exists(path + suffix):
            os.remove(path + suffix)
    store = sqlite3.connect(path, isolation_level=None)
    store.executescript(f"""
        PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;
        CREATE TABLE expected ({COLUMNS}, PRIMARY KEY (start, kind, region, page)) WITHOUT ROWID;
        CREATE TABLE found ({COLUMNS}, revision INT, PRIMARY KEY (start, kind, region, page)) WITHOUT ROWID;
        BEGIN""")
    return store


def in_batches(items, size=20_000):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def read_metrics(options, store, verdict):
    """Keeps the newest revision of each window; tells duplicates and gaps, and what the observer saw otherwise."""
    schemas = Schemas(options.registry, METRIC_FIELDS)
    observed = Observed(options.observed, verdict) if options.observed else None
    count = collections.Counter()
    find = "SELECT revision FROM found WHERE start = ? AND kind = ? AND region = ? AND page = ?"
    put = f"INSERT OR REPLACE INTO found VALUES ({', '.join('?' * 11)})"
    for message in records(options.brokers, METRICS, partitions(options.brokers, METRICS)):
        value = message.value()
        count["records"] += 1
        if observed:
            observed.compare(message.partition(), message.offset(), value)
        kind, start, end, region, page, clicks, purchases, carts, cents, rate, users, revision, exact = metric_of(value, schemas)
        name = f"{kind} {start} {region} {page or ''} revision {revision} at {message.partition()}/{message.offset()}"
        if rate != (purchases / clicks if clicks else None):
            verdict.add("wrong", f"{name}: conversion_rate {rate}")
        if not exact:
            verdict.add("wrong", f"{name}: unique_users is an estimate")
        known = store.execute(find, (start, kind, region, page or "")).fetchone()
        expected = 0 if known is None else known[0] + 1
        if revision < expected:
            verdict.add("duplicate", name)
            continue
        if revision > expected:
            verdict.add("revision gap", f"{name}, expected {expected}")
        count["revisions"] += revision > 0
        store.execute(put, (kind, start, end, region, page or "", clicks, purchases, carts, cents, users, revision))
    if observed:
        observed.finish()
        verdict.facts["observed while it ran"] = observed.total
    verdict.facts["rows emitted"] = count["records"]
    verdict.facts["of them revisions"] = count["revisions"]


class Observed:
    """What a read-committed consumer saw while workers and broker died: (partition, offset, checksum) in its order."""

    FORMAT = struct.Struct("<iqI")

    def __init__(self, path, verdict):
        self.verdict, self.total = verdict, 0
        self.seen = collections.defaultdict(collections.deque)
        with open(path, "rb") as file:
            for partition, offset, checksum in self.FORMAT.iter_unpack(file.read()):
                self.seen[partition].append((offset, checksum))
                self.total += 1
        for partition, seen in self.seen.items():
            last = -1
            for offset, _ in seen:
                if offset <= last:
                    self.verdict.add("inconsistent", f"observer went back from {partition}/{last} to {offset}")
                last = offset

    def compare(self, partition, offset, value):
        seen = self.seen[partition]
        while seen and seen[0][0] < offset:
            self.verdict.add("inconsistent", f"seen at {partition}/{seen.popleft()[0]}, and nothing stands there")
        if not seen or seen[0][0] > offset:
            self.verdict.add("inconsistent", f"stands at {partition}/{offset}, and was passed over")
        elif seen.popleft()[1] != zlib.crc32(value or b""):
            self.verdict.add("inconsistent", f"another value was seen at {partition}/{offset}")

    def finish(self):
        for partition, seen in self.seen.items():
            if seen:
                self.verdict.add("inconsistent", f"seen at {partition}/{seen[0][0]}, and nothing stands there", len(seen))


def compare_windows(store, verdict):
    count = lambda table: store.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
    verdict.facts["windows expected"] = count("expected")
    verdict.facts["windows found"] = count("found")
    show = lambda row: " ".join(str(field) for field in row)
    key = "e.start = f.start AND e.kind = f.kind AND e.region = f.region AND e.page = f.page"
    differ = " OR ".join(f"e.{column} != f.{column}" for column in VALUE.split(", "))
    same = store.execute(f"SELECT count(*) FROM expected e JOIN found f ON {key} WHERE NOT ({differ})").fetchone()[0]
    verdict.facts["windows equal"] = same
    for row in store.execute(f"SELECT * FROM expected e WHERE NOT EXISTS (SELECT 1 FROM found f WHERE {key})"):
        verdict.add("lost write", f"window {show(row)}")
    for row in store.execute(f"SELECT * FROM found f WHERE NOT EXISTS (SELECT 1 FROM expected e WHERE {key})"):
        verdict.add("unexpected", f"window {show(row)}")
    for row in store.execute(f"SELECT e.*, f.* FROM expected e JOIN found f ON {key} WHERE {differ}"):
        verdict.add("wrong", f"window: expected {show(row[:10])}, found {show(row[10:])}")


def check_letters(options, topic, expected, verdict):
    """Each record that was put aside is there once, with its bytes."""
    seen = set()
    for message in records(options.brokers, topic, partitions(options.brokers, topic)):
        headers = {name: value.decode() for name, value in message.headers() or [] if name.startswith("simulacro.")}
        if "simulacro.offset" not in headers:
            verdict.add("unexpected", f"{topic} {message.partition()}/{message.offset()}: {headers}")
            continue
        source = int(headers["simulacro.partition"]), int(headers["simulacro.offset"])
        name = f"{topic}: the click at {source[0]}/{source[1]}"
        if source in seen:
            verdict.add("duplicate", name)
        elif source not in expected:
            verdict.add("unexpected", name)
        elif expected[source] != zlib.crc32(message.value() or b""):
            verdict.add("wrong", f"{name} has other bytes")
        seen.add(source)
    for source in sorted(expected.keys() - seen):
        verdict.add("lost write", f"{topic}: the click at {source[0]}/{source[1]}")
    verdict.facts[f"records in {topic}"] = len(seen)


def text_at(data, at):
    length = int.from_bytes(data[at:at + 2], "big", signed=True)
    return data[at + 2:at + 2 + length].decode(), at + 2 + length


def check_commits(options, verdict):
    """Every commit of the group, in order, from the topic in which the broker keeps them."""
    newest, commits = {}, collections.Counter()
    topic = "__consumer_offsets"
    for message in records(options.brokers, topic, partitions(options.brokers, topic)):
        key, value = message.key(), message.value()
        if key is None or value is None or int.from_bytes(key[:2], "big") > 1:
            continue
        group, at = text_at(key, 2)
        name, at = text_at(key, at)
        if group != GROUP:
            continue
        place = name, int.from_bytes(key[at:at + 4], "big")
        offset = int.from_bytes(value[2:10], "big")
        commits[place] += 1
        if offset < newest.get(place, 0):
            verdict.add("backward step", f"{name}-{place[1]}: from {newest[place]} to {offset}")
        newest[place] = max(offset, newest.get(place, 0))
    verdict.facts["commits of offsets"] = sum(commits.values())
    client = consumer(options.brokers)
    for topic in (CLICKS, PARTIALS):
        for number in partitions(options.brokers, topic):
            low, end = client.get_watermark_offsets(TopicPartition(topic, number), timeout=30)
            offset = newest.get((topic, number), low)
            left = record_behind(client, topic, number, offset) if offset < end else None
            if left is not None:
                verdict.add("not processed", f"{topic}-{number}: committed {offset}, and there is a record at {left}")
    client.close()


def record_behind(client, topic, number, offset):
    """Offset of the first committed record from `offset` on; markers of transactions are none."""
    client.assign([TopicPartition(topic, number, offset)])
    while True:
        message = client.poll(30)
        if message is None:
            raise SystemExit(f"read {topic}-{number} from {offset}: found no end within 30 s")
        if message.error() is None:
            return message.offset()
        if message.error().code() == confluent_kafka.KafkaError._PARTITION_EOF:
            return None


def count_aborted(options, verdict):
    """Records of transactions that were thrown away; nobody may see them, and there should be some."""
    numbers = partitions(options.brokers, METRICS)
    total = sum(1 for _ in records(options.brokers, METRICS, numbers, committed=False))
    verdict.facts["rows aborted, and never seen"] = total - verdict.facts["rows emitted"]


def check_counts(options, fates, verdict):
    with open(options.status, encoding="utf-8") as file:
        text = file.read()
    line = re.search(r"^(\d+) events read = (.*)$", text, re.M)
    if not line:
        raise SystemExit(f"{options.status}: found no line of fates, expected what stream-status prints")
    told = {name: int(number) for number, name in re.findall(r"(\d+) (\w+)", line[2])}
    if told != dict(fates) or int(line[1]) != sum(fates.values()):
        verdict.add("counts", f"the job tells {line[1]} = {told}, this computation {sum(fates.values())} = {dict(fates)}")


def main(options):
    verdict = Verdict()
    os.makedirs(options.folder, exist_ok=True)
    with open(options.regions, encoding="utf-8") as file:
        regions = set(file.read().split()[1:])
    numbers = partitions(options.brokers, CLICKS)
    halves = [numbers[0::2], numbers[1::2]]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        jobs = [pool.submit(compute, options.brokers, options.registry, options.folder, regions, half) for half in halves if half]
        computed = {n: found for job in jobs for n, found in job.result().items()}
    fates = collections.Counter()
    dead, late = {}, {}
    for number, (of, _, of_dead, of_late) in computed.items():
        fates.update(of)
        dead.update({(number, offset): checksum for offset, checksum in of_dead.items()})
        late.update({(number, offset): checksum for offset, checksum in of_late.items()})
    watermarks = [watermark for _, watermark, _, _ in computed.values()]
    closed = 0 if None in watermarks else min(watermarks) // MINUTE * MINUTE
    verdict.facts["clicks read"] = sum(fates.values())
    verdict.facts["fates"] = dict(sorted(fates.items()))
    if options.sent is not None and options.sent != sum(fates.values()):
        kind = "lost write" if sum(fates.values()) < options.sent else "unexpected"
        verdict.add(kind, f"clicks: {options.sent} were sent, {sum(fates.values())} are there")

    store = open_store(f"{options.folder}/windows.db")
    paths = [f"{options.folder}/minutes-{n}" for n in numbers]
    put = f"INSERT INTO expected VALUES ({', '.join('?' * 10)})"
    for batch in in_batches(windows(paths, closed)):
        store.executemany(put, batch)
    read_metrics(options, store, verdict)
    compare_windows(store, verdict)
    revenue = store.execute("SELECT sum(cents) FROM found WHERE kind = 'region_1m'").fetchone()[0] or 0
    verdict.facts["revenue of region_1m"] = f"{revenue // 100}.{revenue % 100:02}"
    store.execute("COMMIT")
    store.close()
    check_letters(options, DEAD, dead, verdict)
    check_letters(options, LATE, late, verdict)
    check_commits(options, verdict)
    count_aborted(options, verdict)
    if options.status:
        check_counts(options, fates, verdict)

    for path in paths + [f"{options.folder}/windows.db"]:
        os.remove(path)
    with open(f"{options.folder}/verdict.json", "w", encoding="utf-8") as file:
        json.dump({"found": verdict.found, "examples": verdict.examples, "facts": verdict.facts}, file, indent=1)
    for name, value in verdict.facts.items():
        print(f"  {name:<42} {value}")
    for kind, count in verdict.found.items():
        print(f"  {kind:<42} {count}" + "".join(f"\n      {example}" for example in verdict.examples[kind]))
    if not verdict.facts["windows expected"]:
        print("  found no windows to compare, expected some")
        return 1
    return 1 if verdict.total() else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--brokers", required=True)
    parser.add_argument("--registry", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--regions", required=True, help="file with the valid regions, a header and one a line")
    parser.add_argument("--sent", type=int, help="clicks that were sent")
    parser.add_argument("--status", help="file with what stream-status printed")
    parser.add_argument("--observed", help="file of what an observer saw while it ran")
    return parser


if __name__ == "__main__":
    sys.exit(main(arguments().parse_args()))
