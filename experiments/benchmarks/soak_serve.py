"""Load tests of this project's server: model version changes, sustained load, and overload.

    python experiments/benchmarks/soak_serve.py [--swaps=200] [--minutes=10] [--side=224]
        [--other_network]

The server runs the default network of this project and receives JPEGs of the network's image
size over the loopback interface; client and server share the cores. The program measures and
checks:

- capacity: the rate of answers to 8 clients, each of which sends the next request at once;
- swaps: a registry's alias moves between two versions while requests arrive at half of the
  capacity; no request may fail, and memory must not grow;
- soak: --minutes at 80 % of the capacity; no request may fail, and memory must not grow;
- overload: three times the capacity for 30 s; accepted requests are answered in bounded time,
  all other requests get status 429, and ten seconds later the latency is normal again.

Requests arrive as a Poisson process, independent of the answers. The exit code is 1 if a
check fails.
"""

import argparse
import asyncio
import collections
import math
import pathlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
from bench_serve import (
    MODEL,
    SERVER,
    Peer,
    free_port,
    load,
    make_bundle,
    make_images,
    make_request,
)
from common import child_environment, memory_megabytes

from cnn_jax.registry.registry import Registry

# The maximum number of requests in flight, and so the maximum number of open connections.
_MAX_IN_FLIGHT = 512


class Server:
    """A server process that loads its models from a registry."""

    def __init__(self, registry: str, log: pathlib.Path):
        self.port = free_port()
        self._log = log.open("w")
        self.process = subprocess.Popen(
            [*SERVER, f"--port={self.port}", "--poll=0.2", f"--registry={registry}"],
            env=child_environment(),
            stdout=self._log,
            stderr=self._log,
        )
        while True:
            try:
                if requests.get(f"{self.url}/readyz", timeout=5).ok:
                    return
            except requests.ConnectionError:
                if self.process.poll() is not None:
                    sys.exit(f"the server has ended: {log.read_text()}")
            time.sleep(0.2)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def megabytes(self) -> float:
        """Returns the resident memory of the server in megabytes."""
        return memory_megabytes(self.process.pid, "VmRSS")

    def version(self) -> int:
        """Returns the version of the model that the server uses by default."""
        (model,) = requests.get(f"{self.url}/models", timeout=30).json()["models"]
        return model["default"]


class Arrivals:
    """A client that sends requests at a given rate, without waiting for the answers."""

    def __init__(self, port: int, bodies: Sequence[bytes], per_second: float):
        self._port = port
        self._bodies = bodies
        self._per_second = per_second
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._in_flight = 0
        self._is_over = False
        # The number of requests that were not sent, because too many requests were in flight.
        self.not_sent = 0
        # The time of sending, the duration and the HTTP status of each request. The status is 0 if
        # the request got no answer.
        self.answers: list[tuple[float, float, int]] = []

    def end(self) -> None:
        """Stops the client; no further requests are sent."""
        self._is_over = True

    async def run(self, until: float) -> None:
        """Sends requests until `time.monotonic()` reaches `until`; waits for requests in flight."""
        rng = random.Random(0)
        tasks: set[asyncio.Task[None]] = set()
        moment = time.monotonic()
        number = 0
        while (moment := moment + rng.expovariate(self._per_second)) < until and not self._is_over:
            await asyncio.sleep(max(0.0, moment - time.monotonic()))
            if self._in_flight == _MAX_IN_FLIGHT:
                self.not_sent += 1
                continue
            task = asyncio.create_task(self._send(self._bodies[number % len(self._bodies)]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await asyncio.gather(*tasks)
        for _, writer in self._idle:
            writer.close()

    async def _send(self, body: bytes) -> None:
        start, status = time.monotonic(), 0
        self._in_flight += 1
        try:
            # Idle connections that the server has closed are dropped, because they are unusable.
            while self._idle and self._idle[-1][0].at_eof():
                self._idle.pop()[1].close()
            if self._idle:
                reader, writer = self._idle.pop()
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            writer.write(body)
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            (length,) = (int(line[15:]) for line in lines if line.startswith(b"content-length:"))
            await reader.readexactly(length)
            status = int(head[9:12])
            if b"connection: close" in head.lower():
                writer.close()
            else:
                self._idle.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        self._in_flight -= 1
        self.answers.append((start, time.monotonic() - start, status))


def describe(answers: Sequence[tuple[float, float, int]]) -> dict[str, Any]:
    """Returns the number of answers by status, and the latency of accepted requests in ms."""
    statuses = collections.Counter(status for _, _, status in answers)
    accepted = [1000 * seconds for _, seconds, status in answers if status == 200]
    p50, p99 = np.percentile(accepted, [50, 99]) if accepted else (0.0, 0.0)
    return {"statuses": dict(statuses), "p50": float(p50), "p99": float(p99)}


def show(name: str, found: dict[str, Any], **more: object) -> None:
    extra = "".join(f"; {key} {value}" for key, value in more.items())
    statuses = ", ".join(f"{count:,} x {status}" for status, count in found["statuses"].items())
    print(
        f"{name}: {statuses}; p50 {found['p50']:.1f} ms, p99 {found['p99']:.1f} ms{extra}",
        flush=True,
    )


async def swap_under_load(
    server: Server, registry: Registry, bodies: Sequence[bytes], rate: float, swaps: int
) -> list[str]:
    """Moves a registry alias between two model versions under load; returns the failed checks."""
    quiet = Arrivals(server.port, bodies, rate)
    await quiet.run(time.monotonic() + 20)
    show("before the swaps", describe(quiet.answers))
    arrivals = Arrivals(server.port, bodies, rate)
    moments: list[tuple[float, float]] = []
    memory: list[float] = []

    async def swap() -> None:
        for number in range(swaps):
            wanted = 2 - number % 2
            start = time.monotonic()
            await asyncio.to_thread(registry.promote, "network", wanted)
            while await asyncio.to_thread(server.version) != wanted:
                await asyncio.sleep(0.05)
            moments.append((start, time.monotonic()))
            memory.append(server.megabytes())
            await asyncio.sleep(0.2)

    sending = asyncio.create_task(arrivals.run(math.inf))
    await swap()
    arrivals.end()
    await sending
    during = [
        answer
        for answer in arrivals.answers
        if any(start <= answer[0] + answer[1] and answer[0] <= end for start, end in moments)
    ]
    found, before = describe(during), describe(quiet.answers)
    # The memory may grow to its final size during the first tenth of the measurement, so the
    # comparison starts after this tenth.
    first, last = memory[len(memory) // 10], memory[-1]
    show(f"{swaps} swaps", found, memory=f"{first:.0f} MB after a tenth, {last:.0f} MB in the end")
    problems = []
    if any(status != 200 for _, _, status in arrivals.answers):
        problems.append("requests failed during swaps")
    if found["p99"] > 2 * before["p99"]:
        problems.append(
            f"p99 during swaps is {found['p99'] / before['p99']:.1f} times the steady one"
        )
    if last > 1.05 * first:
        problems.append("memory has grown with swaps")
    return problems


async def soak(server: Server, bodies: Sequence[bytes], rate: float, minutes: float) -> list[str]:
    """Sends `rate` requests per second for `minutes` minutes; returns the failed checks."""
    arrivals = Arrivals(server.port, bodies, rate)
    memory: list[float] = []

    async def watch() -> None:
        while True:
            memory.append(server.megabytes())
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await arrivals.run(time.monotonic() + 60 * minutes)
    watching.cancel()
    found = describe(arrivals.answers)
    first, last = memory[len(memory) // 10], memory[-1]
    show(
        f"{minutes:g} minutes",
        found,
        memory=f"{first:.0f} MB after a tenth, {last:.0f} MB in the end",
    )
    problems = []
    if found["statuses"].keys() != {200}:
        problems.append("errors while soaking")
    if last > 1.05 * first:
        problems.append("memory has grown while soaking")
    return problems


async def overload(server: Server, bodies: Sequence[bytes], capacity: float) -> list[str]:
    """Sends requests at three times the server's capacity; returns the failed checks."""
    arrivals = Arrivals(server.port, bodies, 3 * capacity)
    await arrivals.run(time.monotonic() + 30)
    found = describe(arrivals.answers)
    show(
        "three times the capacity",
        found,
        memory=f"{server.megabytes():.0f} MB",
        not_sent=arrivals.not_sent,
    )
    await asyncio.sleep(10)
    after = Arrivals(server.port, bodies, capacity / 4)
    await after.run(time.monotonic() + 10)
    recovered = describe(after.answers)
    show("ten seconds later", recovered)
    problems = []
    if not found["statuses"].keys() <= {200, 429}:
        problems.append(f"other answers than 200 and 429: {found['statuses']}")
    if found["p99"] > 5_000:
        problems.append(f"accepted requests took up to {found['p99'] / 1000:.0f} s")
    if recovered["statuses"].keys() != {200} or recovered["p50"] > 100:
        problems.append("it has not recovered")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument(
        "--other_network",
        action="store_true",
        help="the second version is another network, which the first swap compiles",
    )
    flags = parser.parse_args()
    bodies = [make_request(image) for image in make_images(32, flags.side)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        registry = Registry(folder / "registry")
        for seed in (1, 2):
            is_other = flags.other_network and seed == 2
            network = MODEL | {"features": [24, 48, 96]} if is_other else MODEL
            make_bundle(folder / f"bundle-{seed}", flags.side, seed, network)
            registry.add("network", folder / f"bundle-{seed}")
        registry.promote("network", 1)
        server = Server(registry.url, folder / "log")
        try:
            peer = Peer("cnn_jax", server.port)
            load(peer, bodies, 8, 3)
            capacity = load(peer, bodies, 8, 10)["per_second"]
            print(f"capacity: {capacity:.0f} images a second", flush=True)
            problems = asyncio.run(
                swap_under_load(server, registry, bodies, capacity / 2, flags.swaps)
            )
            problems += asyncio.run(soak(server, bodies, 0.8 * capacity, flags.minutes))
            problems += asyncio.run(overload(server, bodies, capacity))
            server.process.terminate()
            if code := server.process.wait(60):
                problems.append(f"the server has ended with {code}")
        finally:
            server.process.kill()
        print("\n".join(problems) or "all of it holds")
        sys.exit(bool(problems))


if __name__ == "__main__":
    main()
