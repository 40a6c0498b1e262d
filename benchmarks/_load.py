"""How long do requests take that a service gets over a few connections at once? From a process of its own.

    python benchmarks/_load.py <port> <requests> <connections> < bodies.json

Each connection stays open and sends its next request when the last one was answered. bodies.json is a list of
[body, expected status]; they are sent in turn. Prints {"ms": [...], "statuses": {...}, "failed": n} as JSON; failed is
what did not get the status that it should.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time

JSON = "content-type: application/json"


async def connection(port: int, requests, milliseconds: list, statuses: collections.Counter) -> int:
    """Send what `requests` gives until it ends; how many failed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    failed = 0
    for body, expected in requests:
        head = f"POST /recommend HTTP/1.1\r\nhost: 127.0.0.1\r\n{JSON}\r\ncontent-length: {len(body)}"
        start = time.perf_counter()
        writer.write(head.encode() + b"\r\n\r\n" + body)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        [length] = [int(line.partition(":")[2]) for line in headers if line.startswith("content-length:")]
        answer = await reader.readexactly(length)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        statuses[status.split()[1]] += 1
        failed += int(status.split()[1]) != expected or not json.loads(answer)
    writer.close()
    return failed


async def load(port: int, count: int, connections: int, bodies: list) -> dict:
    """`count` requests over so many connections."""
    ready = [(json.dumps(body).encode(), expected) for body, expected in bodies]
    requests = iter([ready[number % len(ready)] for number in range(count)])
    milliseconds, statuses = [], collections.Counter()
    running = [connection(port, requests, milliseconds, statuses) for _ in range(connections)]
    failed = sum(await asyncio.gather(*running))
    return {"ms": milliseconds, "statuses": statuses, "failed": failed}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(*map(int, sys.argv[1:4]), json.load(sys.stdin)))))
