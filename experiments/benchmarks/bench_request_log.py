"""Measures the cost of the request log, and compares its files with SQLite.

    pip install -e '.[bench,serve]' && python experiments/benchmarks/bench_request_log.py

Two measurements:

- The CPU time of a server per request, with one request at a time, without a request log, with a
  log, and with a log that has the images. The servers take turns, and the others are paused.
- The CPU time per row and the bytes per row of the log's own files and of SQLite in WAL mode, for
  rows that are written singly and in batches; the time to read all embeddings, and the time to
  find a row by its request id.
"""

import argparse
import contextlib
import pathlib
import secrets
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bench_serve import SERVER, load, make_bundle, make_images, make_request, started
from common import cpu_seconds, seconds_of_each

from cnn_jax.data import request_log

_LOGS = {"without": [], "log": [], "log with images": ["--request_log_images"]}


def measure_servers(side: int, rounds: int, seconds: float) -> None:
    images = make_images(32, side)
    forms = [make_request(image) for image in images]
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in _LOGS}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = pathlib.Path(temporary)
        make_bundle(folder / "bundle", side)
        peers = []
        for name, flags in _LOGS.items():
            log = [f"--request_log={folder / name}"] * (name != "without")
            command = [*SERVER, f"--bundle={folder / 'bundle'}", *log, *flags]
            peers.append(stack.enter_context(started(name, command, images[0])))
            peers[-1].stop()
        for round_ in range(rounds + 1):
            for peer in peers:
                with peer.going():
                    before = cpu_seconds(peer.group)
                    start = time.perf_counter()
                    found = load(peer, forms, 1, seconds if round_ else 2)
                    count = found["per_second"] * (time.perf_counter() - start)
                    time.sleep(0.5)  # The server writes the last rows.
                    cpu = 1000 * (cpu_seconds(peer.group) - before) / count
                if round_:  # The first round is a warm-up.
                    measured[peer.name].append((cpu, found["p50"], found["p99"]))
        for name in list(_LOGS)[1:]:
            print(f"{name}: {len(request_log.read_requests(folder / name, ['time']))} rows")
    print(f"\n{side} x {side} pixels, one request at a time, medians of {rounds} rounds\n")
    print("| request log | CPU ms a request | ratio | p50 ms | p99 ms |")
    print("| --- | --- | --- | --- | --- |")
    base = statistics.median(row[0] for row in measured["without"])
    for name, rows in measured.items():
        cpu, p50, p99 = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {cpu:.2f} | {cpu / base:.2f} | {p50:.2f} | {p99:.2f} |")


def make_rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    embeddings = np.maximum(rng.normal(size=(count, 256)), 0).astype(np.float32)
    probabilities = rng.dirichlet(np.ones(10), count).astype(np.float32)
    rest = {"unit": None, "arm": "champion", "model": "flowers", "version": 1}
    rest |= {"digest": "d" * 64, "class": "rose", "confidence": 0.5, "image": None}
    rest |= {"brightness": 100.0, "sharpness": 10.0, "contrast": 50.0, "image_index": 0}
    rest |= {"milliseconds": 5.0, "shadow_of": None}
    now = round(1e6 * time.time())
    return [
        {
            **rest,
            "time": now + index,
            "request_id": f"{now // 1000:012x}{secrets.token_hex(10)}",
            "probabilities": probabilities[index],
            "embedding": embeddings[index],
        }
        for index in range(count)
    ]


def write_own(folder: pathlib.Path, rows: Sequence[dict[str, Any]], size: int) -> None:
    request_log.make_folders(folder)
    segments = request_log.Segments(folder / "requests", request_log.REQUESTS)
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        segments.append({name: [row[name] for row in batch] for name in request_log.REQUESTS.names})
        if segments.is_complete:
            segments.close()
    segments.close()


def write_sqlite(folder: pathlib.Path, rows: Sequence[dict[str, Any]], size: int) -> None:
    folder.mkdir()
    names = request_log.REQUESTS.names
    with contextlib.closing(sqlite3.connect(folder / "log.db")) as connection:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = normal")
        columns = ", ".join(f'"{name}"' for name in names)
        key = "primary key (request_id, image_index)"
        connection.execute(f"create table requests ({columns}, {key})")
        marks = ", ".join("?" * len(names))
        for start in range(0, len(rows), size):
            values = [
                [
                    value.tobytes() if isinstance(value := row[name], np.ndarray) else value
                    for name in names
                ]
                for row in rows[start : start + size]
            ]
            connection.executemany(f"insert into requests values ({marks})", values)
            connection.commit()


def read_own(folder: pathlib.Path) -> np.ndarray:
    column = request_log.read_requests(folder, ["embedding"])["embedding"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def read_sqlite(folder: pathlib.Path) -> np.ndarray:
    with contextlib.closing(sqlite3.connect(folder / "log.db")) as connection:
        rows = connection.execute("select embedding from requests")
        return np.stack([np.frombuffer(row[0], np.float32) for row in rows])


def find_own(folder: pathlib.Path, key: tuple[str, int]) -> object:
    return request_log.find_row(folder, *key)


def find_sqlite(folder: pathlib.Path, key: tuple[str, int]) -> object:
    with contextlib.closing(sqlite3.connect(folder / "log.db")) as connection:
        text = "select digest from requests where request_id = ? and image_index = ?"
        return connection.execute(text, key).fetchone()


def timed(call: Callable[[], Any], repetitions: int = 1) -> float:
    """Returns the CPU time of a call in seconds: the median of `repetitions` calls."""
    return statistics.median(seconds_of_each(call, repetitions, time.process_time))


def measure_files(count: int) -> None:
    rows = make_rows(count)
    key = rows[count // 2]["request_id"], 0
    formats = {
        "own files": (write_own, read_own, find_own),
        "SQLite": (write_sqlite, read_sqlite, find_sqlite),
    }
    print(f"\n{count:,} rows with 256 numbers of an embedding and 10 probabilities\n")
    print("| files | rows a batch | write, CPU us a row | bytes a row | read all, ms | find, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in (1, 16):
        for name, (write, read, find) in formats.items():
            with tempfile.TemporaryDirectory() as temporary:
                folder = pathlib.Path(temporary) / "log"
                seconds = timed(lambda: write(folder, rows, size))  # noqa: B023
                size_bytes = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
                reading = timed(lambda: read(folder), 3)  # noqa: B023
                finding = timed(lambda: find(folder, key), 5)  # noqa: B023
            print(
                f"| {name} | {size} | {1e6 * seconds / count:.0f} | {size_bytes / count:.0f} | "
                f"{1000 * reading:.0f} | {1000 * finding:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6, help="of each measurement")
    parser.add_argument("--rows", type=int, default=20_000)
    flags = parser.parse_args()
    measure_files(flags.rows)
    measure_servers(flags.side, flags.rounds, flags.seconds)


if __name__ == "__main__":
    main()
