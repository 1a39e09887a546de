"""A server in a separate process, on a free local port, for tests."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import requests
from conftest import REPOSITORY


def until(condition, seconds=30):
    """Waits until a condition, a function without arguments, is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.02)


class Served:
    """A server that runs in a separate process.

    Attributes:
      url: The server's URL, without a slash at the end.
      process: The server's process.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *flags: str,
        wait: bool = True,
        program: Sequence[str] = ("-m", "cnn_jax.serve"),
    ):
        self._log = folder / "server.log"
        self._out = folder / "server.out"
        command = [sys.executable, *program, "--port=0", *flags]
        with self._log.open("w") as log, self._out.open("w") as out:
            self.process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                stdout=out,
                stderr=log,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        self.url = ""
        if wait:
            self.wait_until_ready()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def wait_until_ready(self, seconds: float = 120) -> None:
        self.url = self._wait_for(self._out, r"ready on (http://\S+)/", seconds)

    def wait_for_log(self, pattern: str, seconds: float = 60) -> str:
        return self._wait_for(self._log, f"({pattern})", seconds)

    def _wait_for(self, path: pathlib.Path, pattern: str, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := re.search(pattern, path.read_text()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} has not come: {self._log.read_text()[-3000:]}")

    def log(self) -> list[dict]:
        """Returns the lines of the server's log, parsed from JSON."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    def output(self) -> str:
        return self._out.read_text()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal to the server, waits until the server exits, and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def post(self, path: str, body=None, **options) -> requests.Response:
        return requests.post(self.url + path, data=body, timeout=30, **options)

    def get(self, path: str, **options) -> requests.Response:
        return requests.get(self.url + path, timeout=30, **options)

    def measure(self, name: str) -> float:
        """Returns a metric's value from /metrics, or 0 if it is absent; `name` includes labels."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0
