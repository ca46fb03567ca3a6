"""Log 200 requests a second with some feedback until killed, and tell what was done on stdout.

A line is told after what it tells, with the time of that: `exposed ID SECONDS`, `finished ID
SECONDS`, `stored ID SECONDS`.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from dynmerge_server.experiments.log import Log, LogConfig
from tests.server.experiments.logged import exposure, finish, outcome

PER_SECOND = 200


def tell(what: str, record: str) -> None:
    os.write(1, f"{what} {record} {time.monotonic():.3f}\n".encode())


async def feed_back(log: Log, request_id: str) -> None:
    said = outcome(request_id)
    assert await log.outcome(said) == "stored"
    tell("stored", said.id)


async def serve(path: Path) -> None:
    log = Log(LogConfig(path, batch=10_000))  # so that time alone makes a batch
    loop = asyncio.get_running_loop()
    began = loop.time()
    tasks = set()
    for number in range(1_000_000):
        shown = exposure(f"r{number}", unit=f"u{number % 97}")
        log.expose(shown)
        tell("exposed", shown.id)
        log.finish(finish(shown))
        tell("finished", shown.id)
        if number % 3 == 0:
            tasks.add(task := asyncio.create_task(feed_back(log, shown.request_id)))
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(began + (number + 1) / PER_SECOND - loop.time())


asyncio.run(serve(Path(sys.argv[1])))
