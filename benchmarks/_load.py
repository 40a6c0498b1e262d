"""How long do requests take that a service gets over a few connections at once? From a process of its own.

    python benchmarks/_load.py <port> <requests> <connections> < bodies.json

Each connection stays open and sends its next request when the last one was answered. bodies.json is a list of
[body, expected status]; they are sent in turn. Prints {"ms": [...], "seconds": s, "statuses": {...}, "failed": n} as
JSON. `seconds` is from the first request to the last answer, without the start of this process. Failed is what did not
get the status that it should, or not k items, or one that was seen.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time

JSON = "content-type: application/json"


def is_right(body: dict, expected: int, status: int, answer: bytes) -> bool:
    """Whether an answer has the status that it should and, if that is 200, k different items, none of them seen."""
    if status != expected or status != 200:
        return status == expected and bool(json.loads(answer))
    ids = {str(item["item_id"]) for item in json.loads(answer)["items"]}
    return len(ids) == len(json.loads(answer)["items"]) == body["k"] and ids.isdisjoint(map(str, body["seen_item_id"]))


async def connection(port: int, requests, milliseconds: list, statuses: collections.Counter) -> int:
    """Send what `requests` gives until it ends; how many failed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    failed = 0
    for body, data, expected in requests:
        head = f"POST /recommend HTTP/1.1\r\nhost: 127.0.0.1\r\n{JSON}\r\ncontent-length: {len(data)}"
        start = time.perf_counter()
        writer.write(head.encode() + b"\r\n\r\n" + data)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        [length] = [int(line.partition(":")[2]) for line in headers if line.startswith("content-length:")]
        answer = await reader.readexactly(length)
        milliseconds.append(1e3 * (time.perf_counter() - start))
        statuses[status.split()[1]] += 1
        failed += not is_right(body, expected, int(status.split()[1]), answer)
    writer.close()
    return failed


async def load(port: int, count: int, connections: int, bodies: list) -> dict:
    """`count` requests over so many connections."""
    ready = [(body, json.dumps(body).encode(), expected) for body, expected in bodies]
    requests = iter([ready[number % len(ready)] for number in range(count)])
    milliseconds, statuses = [], collections.Counter()
    start = time.perf_counter()
    running = [connection(port, requests, milliseconds, statuses) for _ in range(connections)]
    failed = sum(await asyncio.gather(*running))
    seconds = time.perf_counter() - start
    return {"ms": milliseconds, "seconds": seconds, "statuses": statuses, "failed": failed}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(*map(int, sys.argv[1:4]), json.load(sys.stdin)))))
