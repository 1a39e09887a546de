"""Compares the throughput and latency of this project's server with LitServe and FastAPI.

    pip install -e '.[bench,serve]' && python experiments/benchmarks/bench_serve.py

LitServe and FastAPI use PyTorch; LitServe is also measured with this project's predictor. All
servers run the default network of this project with the same weights, and receive JPEGs of
224 x 224 pixels over the loopback interface. They take turns in each round; the processes of
the other servers are paused meanwhile, so that each server has all cores. The client has
`concurrency` requests in flight over open connections, and sends the next request when an
answer arrives. The numbers are medians over rounds. The peers are in serve_peers.py.

"bare" is the time to decode one image and run the compiled forward pass, without a server.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import io
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import requests
import uvloop
from common import child_environment, random_bundle, write_json
from PIL import Image
from serve_peers import LITSERVE

from cnn_jax.inference.bundle import write_bundle

# The command of the server of this project.
SERVER = (sys.executable, "-m", "cnn_jax.serve", "--log_level=warning")
MODEL = {
    "name": "cnn",
    "features": [32, 64, 128],
    "dense": 256,
    "dropout": 0.5,
    "batch_norm": True,
}
PEERS = ("cnn_jax", *LITSERVE, "fastapi")
CONCURRENCY = (1, 8, 64)
_BOUNDARY = "a-boundary-that-is-in-no-image"


def make_bundle(
    path: pathlib.Path, side: int, seed: int = 0, section: Mapping[str, Any] = MODEL
) -> None:
    """Writes a bundle with an untrained network; see `common.random_bundle`."""
    write_bundle(random_bundle(section, side, seed), path)


def make_images(count: int, side: int) -> list[bytes]:
    """Returns random JPEGs with a quality and a file size that are typical of photographs."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        rough = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
        image = rough.resize((side, side), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        images.append(file.getvalue())
    return images


@dataclasses.dataclass(frozen=True)
class Peer:
    """A running server.

    Attributes:
      name: The name of the server.
      port: The port on the loopback interface.
      group: The process group; 0 if the server is never paused.
    """

    name: str
    port: int
    group: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/predict"

    def stop(self) -> None:
        """Pauses all processes of the server, so that the other servers have all cores."""
        os.killpg(self.group, signal.SIGSTOP)

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Resumes the paused processes of the server, and pauses them again on exit."""
        os.killpg(self.group, signal.SIGCONT)
        try:
            yield
        finally:
            self.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def started(name: str, command: Sequence[str], image: bytes) -> Iterator[Peer]:
    """Starts a server, waits until the server answers requests, and yields the server.

    Args:
      name: The name of the server.
      command: The command of the server without its port.
      image: An image that the server can classify.
    """
    port = free_port()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, f"--port={port}"],
            stdout=log,
            stderr=log,
            env=child_environment(),
            start_new_session=True,
        )
        try:
            peer = Peer(name, port, process.pid)
            for _ in range(300):
                with contextlib.suppress(requests.RequestException):
                    if requests.post(peer.url, files={"file": image}, timeout=60).ok:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{name} has ended:\n{log.read()}")
                time.sleep(0.2)
            else:
                sys.exit(f"{name} does not answer")
            yield peer
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def make_request(image: bytes) -> bytes:
    """Returns the bytes of an HTTP POST request with one image in a multipart form."""
    body = (
        (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        + image
        + f"\r\n--{_BOUNDARY}--\r\n".encode()
    )
    head = (
        "POST /predict HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: multipart/form-data; boundary={_BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Client(asyncio.Protocol):
    """A lightweight HTTP client that sends requests over one connection until a deadline.

    The client uses little CPU time, because the server runs on the same cores.
    """

    def __init__(self, requests_: Sequence[bytes], first: int, until: float, found: list[float]):
        self._requests, self._turn, self._until, self._found = requests_, first, until, found
        self._answer = b""
        self.failed = 0
        self.is_done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._start = time.perf_counter()
        self._transport.write(self._requests[self._turn % len(self._requests)])
        self._turn += 1

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, end, body = self._answer.partition(b"\r\n\r\n")
        if not end:
            return
        _, _, length = head.lower().partition(b"\r\ncontent-length:")
        if len(body) < int(length.partition(b"\r\n")[0]):
            return
        now = time.perf_counter()
        self._found.append(now - self._start)
        self.failed += not head.startswith(b"HTTP/1.1 200")
        self._answer = b""
        if now < self._until:
            self._ask()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        # A request counts as failed if the server closes the connection before the deadline.
        self.failed += time.perf_counter() < self._until
        self.is_done.set_result(None)


def load(
    peer: Peer, requests_: Sequence[bytes], concurrency: int, seconds: float
) -> dict[str, Any]:
    """Sends requests for `seconds`; returns images per second, and latency percentiles in ms."""
    found: list[float] = []

    async def run() -> int:
        until = time.perf_counter() + seconds
        clients = [_Client(requests_, 7 * number, until, found) for number in range(concurrency)]
        for client in clients:
            await asyncio.get_running_loop().create_connection(
                lambda client=client: client, "127.0.0.1", peer.port
            )
        for client in clients:
            await client.is_done
        return sum(client.failed for client in clients)

    start = time.perf_counter()
    failed = uvloop.run(run())
    elapsed = time.perf_counter() - start
    if failed:
        sys.exit(f"{peer.name}: {failed} of {len(found)} requests failed")
    return {
        "per_second": len(found) / elapsed,
        "p50": 1000 * statistics.median(found),
        "p99": 1000 * float(np.percentile(found, 99)),
    }


_BARE = """
import pathlib, statistics, sys, time
from cnn_jax.system import runtime
from cnn_jax.system.compilation_cache import keep_compiled
runtime.keep_freed_memory()
keep_compiled()
from cnn_jax.inference.images import preprocess_for_inference
from cnn_jax.inference.predictor import BundlePredictor
predictor = BundlePredictor.load(sys.argv[1])
images = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[2]).iterdir())]
times = []
end = time.perf_counter() + float(sys.argv[3])
while time.perf_counter() < end or len(times) < 20:
    image = images[len(times) % len(images)]
    start = time.perf_counter()
    predictor(preprocess_for_inference(image, predictor.preprocessing)[None])
    times.append(time.perf_counter() - start)
print(1000 * statistics.median(times[10:]))
"""


def bare_milliseconds(bundle: pathlib.Path, images: pathlib.Path, seconds: float) -> float:
    """Returns the median time to decode one image and run the forward pass, without a server."""
    command = [sys.executable, "-c", _BARE, str(bundle), str(images), str(seconds)]
    return float(subprocess.check_output(command, env=child_environment()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--peer_python", default=sys.executable, help="that has LitServe, PyTorch")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--json", type=pathlib.Path)
    flags = parser.parse_args()
    # The command `timeout` sends SIGTERM. Without a handler this process would end at once, and
    # its servers would keep running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    images = make_images(32, flags.side)
    requests_ = [make_request(image) for image in images]
    results: dict[str, Any] = {"bytes_of_a_jpeg": statistics.mean(map(len, images))}
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {}
    bare = []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = pathlib.Path(temporary)
        make_bundle(folder / "bundle", flags.side)
        (folder / "images").mkdir()
        for number, image in enumerate(images):
            (folder / "images" / f"{number:02d}.jpg").write_bytes(image)
        program, peers = str(pathlib.Path(__file__).with_name("serve_peers.py")), []
        for name in flags.peers.split(","):
            command = SERVER if name == "cnn_jax" else (flags.peer_python, program, name)
            command = [*command, f"--bundle={folder / 'bundle'}"]
            peers.append(stack.enter_context(started(name, command, images[0])))
        for peer in peers:
            peer.stop()
        for round_ in range(flags.rounds + 1):
            if round_:
                bare.append(
                    bare_milliseconds(folder / "bundle", folder / "images", flags.seconds / 2)
                )
            for concurrency in CONCURRENCY:
                for peer in peers:
                    # The first round is a short warm-up whose results are dropped.
                    seconds = flags.seconds if round_ else min(2, flags.seconds)
                    with peer.going():
                        found = load(peer, requests_, concurrency, seconds)
                    if round_:
                        measured.setdefault((peer.name, concurrency), []).append(found)
    results["bare_milliseconds"] = statistics.median(bare)
    print(
        f"{flags.side} x {flags.side} pixels, JPEGs of {results['bytes_of_a_jpeg'] / 1000:.0f} kB"
    )
    print(f"bare: {results['bare_milliseconds']:.2f} ms an image\n")
    print("| server | concurrency | images a second | p50 ms | p99 ms |")
    print("| --- | --- | --- | --- | --- |")
    results["servers"] = []
    for (name, concurrency), rounds in sorted(measured.items(), key=lambda item: item[0][1]):
        row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        results["servers"].append({"name": name, "concurrency": concurrency, **row})
        print(
            f"| {name} | {concurrency} | {row['per_second']:.1f} | {row['p50']:.2f} | "
            f"{row['p99']:.2f} |"
        )
    write_json(flags.json, results)


if __name__ == "__main__":
    main()
