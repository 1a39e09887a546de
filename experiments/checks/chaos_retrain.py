"""Kills retraining many times, and compares its results with the results of an undisturbed pass.

    python experiments/checks/chaos_retrain.py [--kills=60] [--seed=0] [--workdir=DIR]

A small network of three colours gets a request log with labelled noisy images. One undisturbed pass
of `cnn_jax retrain` promotes its successor. In each round, the same pass is killed with SIGKILL
until it ends: half of the kills are aimed at writes (directly before or after a file is flushed,
renamed or removed, or an object of the registry is written), the others happen at random times. In
each round the new bundle must be the same to the bit, the registry must have exactly one more `add`
and one more `promote` with the same evidence, the record must be the same, and another pass must
change nothing. The exit code is 1 if something differs.
"""

import argparse
import datetime
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
CLASSES = ("blue", "green", "red")
MODEL = "colours"

# A pass that is killed at the write with the number in its first argument; 0 is never reached. Each
# write counts twice: before and after. Before it ends, the program prints the number of writes.
_PASS = """
import os, pathlib, shutil, signal, sys
import obstore
from cnn_jax.system import cli
from cnn_jax.retrain.__main__ import main

left = int(sys.argv.pop(1))

def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def deadly(function):
    def call(*arguments, **options):
        count()
        result = function(*arguments, **options)
        count()
        return result
    return call

for owner, names in (
    (os, ("fsync",)), (pathlib.Path, ("rename", "replace")), (shutil, ("rmtree",)),
    (obstore, ("put", "rename")),
):
    for name in names:
        setattr(owner, name, deadly(getattr(owner, name)))
try:
    cli.run(main, if_interrupted=cli.START_AGAIN)
finally:
    print(f"{-left} writes", file=sys.stderr)
"""


def draw(rng: np.random.Generator, label: int, noise: float = 0.0) -> bytes:
    """Returns an image of 16 x 16 pixels, PNG; with noise, all classes look reddish."""
    pixels = rng.integers(0, 120, (16, 16, 3)).astype(float)
    pixels[..., 2 - label] += 40
    pixels += noise * rng.normal([80, 0, 0], 25, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_images(folder: pathlib.Path, per_class: int) -> None:
    """Writes the data of the first champion: a folder for each class."""
    rng = np.random.default_rng(1)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(per_class):
            (folder / name / f"{number:03d}.png").write_bytes(draw(rng, label))


def train(images: pathlib.Path, workdir: pathlib.Path, **keys: Any) -> pathlib.Path:
    """Trains the first champion; returns its bundle."""
    from cnn_jax.config import files
    from cnn_jax.training.loop import train_and_evaluate

    config = files.load("default")
    values = {
        "data.source": f"folder:{images}",
        "data.image_size": (16, 16),
        "data.split": (0.6, 0.2, 0.2),
        "model.features": (8, 8),
        "model.dense": 16,
        "train.batch_size": 8,
        "train.epochs": 8,
        "train.monitor": "validation_loss",
        "report.detail": "none",
        **keys,
    }
    with config.ignore_type():
        config.update_from_flattened_dict(values)
    train_and_evaluate(config, workdir)
    return workdir / "bundle"


def write_log(
    folder: pathlib.Path,
    bundle: pathlib.Path,
    count: int,
    noise: float = 1.0,
    *,
    model: str = MODEL,
    seed: int = 2,
    mistakes: int | None = None,
) -> None:
    """Writes a request log of images, with the predictions of a bundle, and their labels.

    Args:
      folder: The request log; created if necessary.
      bundle: The bundle of the version that answers.
      count: The number of images.
      noise: The noise of the images.
      model: The name of the model.
      seed: The seed of the images and of the request ids.
      mistakes: The number of wrong predictions that get a label, spread over the log; by default
        all images get a label.
    """
    from cnn_jax.data import request_log
    from cnn_jax.inference.bundle import digest
    from cnn_jax.inference.predictor import BundlePredictor
    from cnn_jax.quality.image_statistics import image_statistics

    folder.mkdir(exist_ok=True)
    request_log.make_folders(folder)
    request_log.write_class_names(folder, digest(bundle), CLASSES)
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    images = [draw(rng, label, noise) for label in labels]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(image))) for image in images])
    probabilities, embeddings = BundlePredictor.load(bundle).predict_with_embeddings(pixels)
    statistics = np.array([image_statistics(one) for one in pixels], np.float32)
    moments = [round(1e6 * time.time()) + number for number in range(count)]
    ids = [f"{moment // 1000:012x}{rng.bytes(10).hex()}" for moment in moments]
    requests = {
        "time": moments,
        "request_id": ids,
        "image_index": [0] * count,
        "unit": [None] * count,
        "arm": ["champion"] * count,
        "model": [model] * count,
        "version": [1] * count,
        "digest": [digest(bundle)] * count,
        "class": [CLASSES[best] for best in probabilities.argmax(axis=1)],
        "confidence": probabilities.max(axis=1),
        "probabilities": list(probabilities),
        "embedding": list(embeddings),
        **dict(zip(("brightness", "sharpness", "contrast"), statistics.T, strict=True)),
        "milliseconds": [5.0] * count,
        "shadow_of": [None] * count,
        "image": images,
    }
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    labelled = list(range(count))
    if mistakes is not None:
        labelled = wrong[np.linspace(0, len(wrong) - 1, mistakes).astype(int)].tolist()
    feedback = {
        "time": [moments[i] for i in labelled],
        "request_id": [ids[i] for i in labelled],
        "image_index": [0] * len(labelled),
        "label": [CLASSES[labels[i]] for i in labelled],
        "reward": [None] * len(labelled),
    }
    for name, schema, rows in (
        ("requests", request_log.REQUESTS, requests),
        ("feedback", request_log.FEEDBACK, feedback),
    ):
        segments = request_log.Segments(folder / name, schema)
        segments.append(rows)
        segments.close()


def prepare(folder: pathlib.Path) -> None:
    """Writes data, a registry with a champion, and a request log with labels."""
    from cnn_jax.registry.registry import Registry

    folder.mkdir(parents=True, exist_ok=True)
    write_images(folder / "images", per_class=60)
    bundle = train(folder / "images", folder / "run")
    registry = Registry(folder / "registry")
    registry.add(MODEL, bundle)
    registry.promote(MODEL, 1)
    write_log(folder / "log", bundle, 150)


def pass_flags(folder: pathlib.Path) -> list[str]:
    """Returns the flags of `cnn_jax retrain` for a pass that trains and promotes a new version."""
    return [
        f"--registry={folder / 'registry'}",
        f"--model={MODEL}",
        f"--source=folder:{folder / 'images'}",
        f"--log={folder / 'log'}",
        f"--state={folder / 'state'}",
        "--when=labels",
        "--min_new=100",
        "--margin=0.1",
        "--config.train.batch_size=8",
        "--config.checkpoint.every_steps=7",
        "--config.report.reference=false",  # It takes half of the time.
    ]


def start(folder: pathlib.Path, kill_at: int = 0) -> subprocess.Popen:
    """Starts a pass, which is killed at a write if `kill_at` is not 0."""
    command = [sys.executable, "-c", _PASS, str(kill_at), *pass_flags(folder)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[str, int]:
    """Waits for a pass; returns its output and the number of its writes.

    Raises:
      RuntimeError: The pass has failed.
    """
    stdout, stderr = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a pass ended with {process.returncode}: {stderr[-3000:]}")
    found = re.search(r"(\d+) writes", stderr)
    assert found is not None
    return stdout, int(found[1])


def results(folder: pathlib.Path) -> dict[str, Any]:
    """Returns all results that must be the same in each round."""
    from cnn_jax.registry.registry import Registry

    (record,) = (folder / "state" / "attempts").glob("*/attempt.json")
    content = json.loads(record.read_text())
    content.pop("watch", None)  # The passes after the promotion write it.
    for name in ("started", "ended"):
        datetime.datetime.fromisoformat(content.pop(name))
    bundle = record.parent / "run" / "bundle"
    return {
        "record": content,
        "changes": [(e.action, e.version, e.evidence) for e in Registry(folder / "registry").log],
        **{path.name: path.read_bytes() for path in sorted(bundle.iterdir())},
        "attempt": sorted(path.name for path in record.parent.iterdir()),
    }


def kill_repeatedly(
    folder: pathlib.Path, writes: int, seconds: float, aims: Sequence[str], rng: random.Random
) -> list[str]:
    """Kills a pass until it ends, at most once for each aim.

    Args:
      folder: The folder of the data, the registry and the log.
      writes: The number of writes of an undisturbed pass.
      seconds: The duration of an undisturbed pass.
      aims: For each kill "write" or "time".
      rng: The generator of the moments.

    Returns:
      The aims of the kills that happened before the pass had ended.
    """
    done = []
    for aim in aims:
        moment = rng.uniform(0, seconds)
        process = start(folder, rng.randint(1, max(writes, 4)) if aim == "write" else 0)
        try:
            process.communicate(timeout=moment if aim == "time" else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if process.returncode != -signal.SIGKILL:
            return done
        done.append(aim)
        writes, seconds = 3 * writes // 4, 0.75 * seconds  # The next pass has less to do.
    finish(start(folder))
    return done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path)
    flags = parser.parse_args()
    root = flags.workdir or pathlib.Path(tempfile.mkdtemp())
    root.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "xla"))
    prepare(root / "template")
    # All rounds use the same path, because the bundle records the path of its data.
    world = root / "world"

    def renew() -> None:
        shutil.rmtree(world, ignore_errors=True)
        shutil.copytree(root / "template", world)

    renew()
    finish(start(world))  # Fills the cache of compiled programs.
    renew()
    began = time.monotonic()
    _, writes = finish(start(world))
    seconds = time.monotonic() - began
    expected = results(world)
    print(f"undisturbed: {writes} moments before or after a write, {seconds:.0f} s", flush=True)
    rng = random.Random(flags.seed)
    kills: list[str] = []
    rounds = differing = 0
    while len(kills) < flags.kills:
        renew()
        left = flags.kills - len(kills)
        aims = [rng.choice(("write", "time")) for _ in range(min(left, 8))]
        kills += kill_repeatedly(world, writes, seconds, aims, rng)
        found = results(world)
        output, _ = finish(start(world))
        differences = [name for name in expected if found.get(name) != expected[name]]
        differences += ["another pass"] if results(world) != found else []
        rounds, differing = rounds + 1, differing + bool(differences)
        print(f"{len(kills)} kills: {', '.join(differences) or 'the same'}", flush=True)
        assert "nothing to do" in output, output
    aimed = kills.count("write")
    print(
        f"{len(kills)} kills in {rounds} rounds, {aimed} of them aimed at writes: {differing} "
        "rounds differ"
    )
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
