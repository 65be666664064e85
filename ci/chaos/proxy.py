"""A TCP proxy between Kafka clients and a broker that loses replies: standard library only.

It reads the frames of the protocol as far as it must to know what a reply answers, and passes every byte on as it is; the broker
advertises the proxy's address, so nothing has to be rewritten. A reply that is lost takes its connection with it, as a network's
failure does: either the connection is reset, or it goes silent for some seconds first, while requests still arrive. The request
was carried out either way. What is lost is drawn from the seed, in thousandths of the replies of a kind: those to EndTxn, which
end a transaction, and those to everything else.

Usage: proxy.py --listen PORT --upstream HOST:PORT --seed N --end-txn THOUSANDTHS --others THOUSANDTHS --stats FILE
Prints one line when it listens. FILE is written once a second, and at the end (SIGTERM).
"""

import argparse
import asyncio
import collections
import json
import os
import random
import signal

NAMES = {
    0: "Produce", 1: "Fetch", 2: "ListOffsets", 3: "Metadata", 8: "OffsetCommit", 9: "OffsetFetch", 10: "FindCoordinator",
    11: "JoinGroup", 12: "Heartbeat", 13: "LeaveGroup", 14: "SyncGroup", 18: "ApiVersions", 19: "CreateTopics",
    22: "InitProducerId", 24: "AddPartitionsToTxn", 25: "AddOffsetsToTxn", 26: "EndTxn", 28: "TxnOffsetCommit",
}
END_TXN = 26
# From this version on headers have tagged fields and texts a length in another form.
END_TXN_FLEXIBLE = 3
SILENCE_S = (1.0, 4.0)
CHUNK = 1 << 16
REFUSED_S = 0.3


class Proxy:
    def __init__(self, options):
        self.options = options
        self.random = random.Random(options.seed)
        self.seen = collections.Counter()
        self.lost = collections.Counter()
        # Replies to a commit that had landed; the strongest of the faults.
        self.lost_after_commit = 0
        self.connections = 0
        self.refused = 0

    def stats(self):
        return {
            "replies": dict(self.seen), "lost": dict(self.lost), "lost_after_commit": self.lost_after_commit,
            "connections": self.connections, "refused": self.refused,
        }

    def is_lost(self, api):
        share = self.options.end_txn if api == END_TXN else self.options.others
        return self.random.random() * 1000 < share

    async def serve(self, reader, writer):
        self.connections += 1
        host, port = self.options.upstream.rsplit(":", 1)
        try:
            up_reader, up_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            self.refused += 1
            # Clients that are let in and thrown out come back at once, without their pause after a refusal.
            await asyncio.sleep(REFUSED_S)
            writer.transport.abort()
            return
        pending = {}
        ways = [asyncio.ensure_future(self.requests(reader, up_writer, pending)),
                asyncio.ensure_future(self.replies(up_reader, writer, pending))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in (writer, up_writer):
            end.transport.abort()

    async def requests(self, reader, writer, pending):
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            head = await reader.readexactly(8)
            api, version, correlation = (int.from_bytes(head[a:b], "big") for a, b in ((0, 2), (2, 4), (4, 8)))
            rest, commits = size - 8, False
            if api == END_TXN:
                body = await reader.readexactly(rest)
                commits = commits_of(body, version)
                writer.write(size.to_bytes(4, "big") + head + body)
                rest = 0
            else:
                writer.write(size.to_bytes(4, "big") + head)
            pending[correlation] = (api, version, commits)
            await relay(reader, writer, rest)

    async def replies(self, reader, writer, pending):
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            head = await reader.readexactly(4)
            api, version, commits = pending.pop(int.from_bytes(head, "big"), (None, 0, False))
            name = NAMES.get(api, str(api))
            self.seen[name] += 1
            body = await reader.readexactly(size - 4) if api == END_TXN else None
            if self.is_lost(api):
                self.lost[name] += 1
                self.lost_after_commit += commits and error_of(body, version) == 0
                await self.fall_silent(reader, size - 4 if body is None else 0, pending)
                return
            writer.write(size.to_bytes(4, "big") + head + (body or b""))
            await relay(reader, writer, 0 if body is not None else size - 4)

    async def fall_silent(self, reader, rest, pending):
        """Takes replies and passes none on, for a while or not at all; then the connection ends."""
        if self.random.random() < 0.5:
            return
        until = asyncio.get_running_loop().time() + self.random.uniform(*SILENCE_S)
        try:
            async with asyncio.timeout_at(until):
                await relay(reader, None, rest)
                while True:
                    size = int.from_bytes(await reader.readexactly(4), "big")
                    body = await reader.readexactly(size)
                    api, version, commits = pending.pop(int.from_bytes(body[:4], "big"), (None, 0, False))
                    name = NAMES.get(api, str(api))
                    self.seen[name] += 1
                    self.lost[name] += 1
                    self.lost_after_commit += commits and error_of(body[4:], version) == 0
        except TimeoutError:
            pass


async def relay(reader, writer, count):
    while count:
        data = await reader.read(min(count, CHUNK))
        if not data:
            raise asyncio.IncompleteReadError(b"", count)
        count -= len(data)
        if writer:
            writer.write(data)
            await writer.drain()


def varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


def commits_of(body, version):
    """Whether an EndTxn request asks to commit; what follows the first eight bytes of its header is `body`."""
    at = 2 + max(0, int.from_bytes(body[:2], "big", signed=True))
    if version >= END_TXN_FLEXIBLE:
        at += 1  # no tagged fields in the header
        length, at = varint(body, at)
        at += length - 1
    else:
        at += 2 + int.from_bytes(body[at:at + 2], "big")
    return body[at + 8 + 2] == 1  # behind the producer's id and epoch


def error_of(body, version):
    """Error code of a reply to EndTxn, without its correlation id."""
    at = 4 + (version >= END_TXN_FLEXIBLE)  # behind the throttle time
    return int.from_bytes(body[at:at + 2], "big", signed=True)


def write(path, stats):
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(stats, file)
    os.replace(path + ".new", path)


async def main(options):
    proxy = Proxy(options)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", options.listen)
    print(f"listening on 127.0.0.1:{options.listen}", flush=True)
    while not stop.is_set():
        write(options.stats, proxy.stats())
        try:
            await asyncio.wait_for(stop.wait(), 1)
        except TimeoutError:
            pass
    server.close()
    write(options.stats, proxy.stats())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--listen", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--end-txn", type=float, required=True)
    parser.add_argument("--others", type=float, required=True)
    parser.add_argument("--stats", required=True)
    asyncio.run(main(parser.parse_args()))
