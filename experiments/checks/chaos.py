"""Kills a training run many times, and compares its results with an undisturbed run.

    python experiments/checks/chaos.py [--kills=60] [--epochs=24]

Half of the kills are aimed at saves: they happen within 60 ms after the start of writing a
checkpoint, or of writing the bundle. The other kills happen at random times. A run that ends
before its kill does not count. The exit code is 1 if a single bit of the results differs.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# Of this number of kills during saves, one happens while the bundle is saved. The others happen
# while a checkpoint is saved.
_KILLS_PER_BUNDLE = 6
_POLL_SECONDS = 0.001


def command(workdir: pathlib.Path, epochs: int) -> list[str]:
    """Returns the command of a run that trains on 1,000 images and saves every 7 steps."""
    return [
        *(sys.executable, "-m", "cnn_jax.main", "--config=configs/smoke.py"),
        f"--workdir={workdir}",
        f"--config.train.epochs={epochs}",
        f"--config.train.patience={epochs}",
        "--config.checkpoint.every_steps=7",
        "--config.report.detail=none",
    ]


def start(workdir: pathlib.Path, epochs: int, log: pathlib.Path) -> subprocess.Popen:
    with log.open("a") as file:
        return subprocess.Popen(
            command(workdir, epochs), cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT
        )


def wait_for(process: subprocess.Popen, is_true: Callable[[], bool]) -> bool:
    """Waits until a condition is true; returns False if the process ended earlier."""
    while process.poll() is None:
        if is_true():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def has_new_file(folder: pathlib.Path, pattern: str, since: float) -> bool:
    """Returns whether a file that matches `pattern` was changed at the time `since` or later."""
    for path in folder.glob(pattern):
        try:
            if path.stat().st_mtime >= since:
                return True
        except OSError:  # The run may have renamed the file after `glob` found its old name.
            continue
    return False


def is_training(workdir: pathlib.Path, pid: int) -> bool:
    try:
        beat = json.loads((workdir / "heartbeat.json").read_text())
    except (OSError, ValueError):
        return False
    return beat["pid"] == pid and beat["activity"] == "training"


def kill(process: subprocess.Popen) -> bool:
    """Kills a process; returns whether the process was still running."""
    was_running = process.poll() is None
    process.kill()
    return process.wait() == -signal.SIGKILL and was_running


def run_and_kill(
    workdir: pathlib.Path, epochs: int, log: pathlib.Path, aim: str, rng: random.Random
) -> tuple[bool, bool]:
    """Starts or resumes the run in `workdir`, and kills the run.

    Returns:
      Whether the run was killed before its end, and whether it was killed during a save.
    """
    began = time.time()

    def is_saving() -> bool:
        return has_new_file(workdir / "checkpoints", "*tmp*", began)

    def is_writing_the_bundle() -> bool:
        return has_new_file(workdir, ".bundle.*", began)

    process = start(workdir, epochs, log)
    if aim == "bundle":
        is_ready = wait_for(process, is_writing_the_bundle)
        delay = rng.uniform(0, 0.01)
    else:
        is_ready = wait_for(process, lambda: is_training(workdir, process.pid))
        delay = rng.uniform(0, 1.5)
        if is_ready and aim == "save":
            # A random number of saves is skipped, so that the process is not always killed during
            # its first save.
            for _ in range(rng.randrange(4)):
                is_ready = is_ready and wait_for(process, lambda: not is_saving())
                is_ready = is_ready and wait_for(process, is_saving)
            is_ready = is_ready and wait_for(process, is_saving)
            delay = rng.uniform(0, 0.06)
    if is_ready:
        time.sleep(delay)
    was_killed = kill(process)
    return was_killed, was_killed and (is_saving() or is_writing_the_bundle())


def read_results(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the results that must be the same in a killed run and in an undisturbed run.

    The results are the arrays of the last checkpoint, the metrics without times, and files of the
    bundle and the report.
    """
    manager = ocp.CheckpointManager((workdir / "checkpoints").resolve())
    step = manager.latest_step()
    saved = manager.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(), epoch_metrics=ocp.args.StandardRestore()
        ),
    )
    manager.close()
    leaves = jax.tree.leaves_with_path({"state": saved["state"], "sums": saved["epoch_metrics"]})
    end = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["images_per_second"]
    end["metrics.jsonl, without times"] = json.dumps(records).encode()
    files = ("bundle/weights.safetensors", "bundle/bundle.json")
    files += ("report/metrics.json", "report/predictions.csv")
    return end | {name: (workdir / name).read_bytes() for name in files}


def differing_bits(first: bytes, second: bytes) -> int:
    length = min(len(first), len(second))
    a, b = (np.frombuffer(content[:length], np.uint8) for content in (first, second))
    return int(np.unpackbits(a ^ b).sum()) + 8 * abs(len(first) - len(second))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run that was killed many times.

    Attributes:
      kills: Number of kills by target.
      hits: Number of kills that left an incomplete checkpoint or bundle.
      compared: Number of bits that were compared with the undisturbed run.
      differing: Number of bits that differ, by the name of the array or file.
    """

    kills: dict[str, int]
    hits: int
    compared: int
    differing: dict[str, int]


def kill_repeatedly(folder: pathlib.Path, kills: int, epochs: int, rng: random.Random) -> Outcome:
    """Compares the results of a run that is killed repeatedly and of an undisturbed run.

    Raises:
      RuntimeError: A run failed, or ended before the last kill.
    """
    log = folder / "log.txt"
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    if start(undisturbed, epochs, log).wait():
        raise RuntimeError(f"the run that nobody kills failed: see {log}")
    half = kills // 2
    at_bundle = half // _KILLS_PER_BUNDLE
    wanted = {"anywhere": kills - half, "save": half - at_bundle, "bundle": at_bundle}
    done = dict.fromkeys(wanted, 0)
    hits = starts = 0
    while done != wanted:
        # The target "bundle" comes last, because the run writes the bundle after the training.
        left = [aim for aim in ("anywhere", "save") if done[aim] < wanted[aim]]
        aim = rng.choice(left) if left else "bundle"
        was_killed, hit = run_and_kill(killed, epochs, log, aim, rng)
        starts += 1
        done[aim] += was_killed
        hits += hit
        print(f"\r{sum(done.values())} kills in {starts} starts", end="", file=sys.stderr)
        if starts > 2 * kills:
            raise RuntimeError("the run ends before it can be killed: it needs more epochs")
    print(file=sys.stderr)
    if start(killed, epochs, log).wait():
        raise RuntimeError(f"the last start failed: see {log}")
    first, second = read_results(undisturbed), read_results(killed)
    assert first.keys() == second.keys()
    return Outcome(
        kills=done,
        hits=hits,
        compared=8 * sum(map(len, first.values())),
        differing={name: differing_bits(first[name], second[name]) for name in first},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, help="folder to keep the runs in")
    flags = parser.parse_args()
    folder = flags.workdir or pathlib.Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "xla"))
    outcome = kill_repeatedly(folder, flags.kills, flags.epochs, random.Random(flags.seed))
    aimed = outcome.kills["save"] + outcome.kills["bundle"]
    differing = sum(outcome.differing.values())
    print(
        f"{sum(outcome.kills.values())} kills, {aimed} of them aimed at saves "
        f"({outcome.kills['bundle']} at the bundle); {outcome.hits} left a checkpoint or bundle "
        f"half written\n{outcome.compared:,} bits compared at the end: {differing:,} differ"
    )
    for name, count in outcome.differing.items():
        if count:
            print(f"  {name}: {count:,}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
