"""What latency costs the loader: shards behind HTTP, as they are, and with 20 ms more to each request.

The server is another process on this machine (aiohttp, which serves ranges of files). Rounds are interleaved, each in
an order of its own; speeds are medians. `python benchmarks/remote.py FOLDER` takes the folder of shards and manifests
that benchmarks/loaders.py:prepare writes, or results/store/shards. Goal: more than 0.8 of the speed is left.
"""

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pandas as pd
from aiohttp import web

from cohortvi import Loader, ShardedCounts

LATENCY = 0.02  # seconds


def serve(folder: str, latency: float, port: multiprocessing.Queue) -> None:
    """Serve a folder's files, each answer late by so many seconds; put the port into the queue."""

    @web.middleware
    async def late(request: web.Request, handler: Callable[[web.Request], Awaitable]) -> web.StreamResponse:
        await asyncio.sleep(latency)
        return await handler(request)

    async def run() -> None:
        app = web.Application(middlewares=[late])
        app.router.add_static("/", Path(folder).resolve())
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.put(site._server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    asyncio.run(run())


def speed(urls: list[str], batch_size: int, seconds: float) -> float:
    """Return cells a second over so many seconds of epochs, the first window aside."""
    loader, cells, began = Loader(ShardedCounts(urls), batch_size=batch_size, seed=0, threads=2), 0, None
    while began is None or time.perf_counter() - began < seconds:
        for step, minibatch in enumerate(loader):
            if began is not None:
                cells += len(minibatch.rows)
                if time.perf_counter() - began > seconds:
                    break
            elif step * batch_size > 40_000:
                began = time.perf_counter()
    return cells / (time.perf_counter() - began)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--batch-size", type=int, default=1_024)
    arguments = parser.parse_args()
    names = sorted(path.name for path in arguments.folder.glob("train-*.json"))
    spawn, servers, places = multiprocessing.get_context("spawn"), [], {}
    for latency in (0.0, LATENCY):
        port = spawn.Queue()
        servers.append(spawn.Process(target=serve, args=(str(arguments.folder), latency, port), daemon=True))
        servers[-1].start()
        places[f"HTTP, {latency * 1e3:.0f} ms later"] = f"http://127.0.0.1:{port.get()}"
    places["local files"] = str(arguments.folder)
    speeds: dict[str, list[float]] = {place: [] for place in places}
    for i in range(arguments.rounds):
        for place in [*places][i % 3 :] + [*places][: i % 3]:
            urls = [f"{places[place]}/{name}" for name in names]
            speeds[place].append(speed(urls, arguments.batch_size, arguments.seconds))
    plain, late, _ = speeds.values()
    rows = [{"store": place, "cells/s": statistics.median(found)} for place, found in speeds.items()]
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=",.0f"))
    left = statistics.median(b / a for a, b in zip(plain, late, strict=True))
    print(f"left of the speed over HTTP with {LATENCY * 1e3:.0f} ms more: {left:.2f}")
    for server in servers:
        server.terminate()


if __name__ == "__main__":
    main()
