"""Compares ways to train a served network for images that have changed.

    python experiments/studies/warm_start.py --output=DIR [--source=shapes] [--logged=2000]
        [--corruption=gaussian_noise] [--severity=3] [--epochs=4] [--config.KEY=VALUE ...]

A champion is trained on the source. Then users send other images with a corruption, which are
labelled and stored in a request log. Two networks are trained on the source and the log: one starts
from the champion's weights and trains for a few epochs, the other starts from random weights and
trains as long as the champion. The program prints a Markdown table with three columns: the accuracy
on the test images of the log, the accuracy on the test images of the source, and the seconds of the
training, with the compilation. All networks have the same test images. A second start continues.
"""

import argparse
import pathlib
import sys
import time

import cv2
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.config import files
from cnn_jax.config.schema import Config
from cnn_jax.data import request_log, shapes
from cnn_jax.data.decode import load
from cnn_jax.data.labelled_log import read_examples, write_snapshot
from cnn_jax.data.sources import open_source
from cnn_jax.inference.evaluation import labelled_split, open_as_trained, predict_split
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality.corruptions import CORRUPTIONS
from cnn_jax.training.loop import train_and_evaluate

# The images that users send are drawn with another seed than the data set `shapes`.
_SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder for all files")
    parser.add_argument("--source", default="shapes", help="shapes or shapes:N")
    parser.add_argument("--logged", type=int, default=2000, help="number of logged images")
    parser.add_argument("--corruption", default="gaussian_noise", choices=sorted(CORRUPTIONS))
    parser.add_argument("--severity", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="epochs from the champion's weights")
    flags, overrides = parser.parse_known_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    config = files.load("configs/default.py", [*overrides, f"--config.data.source={flags.source}"])
    seconds = {"champion": train(config, flags.output / "champion")}

    champion = BundlePredictor.load(flags.output / "champion")
    snapshot = flags.output / "snapshot"
    if not snapshot.exists():
        log = write_log(flags.output / "log", champion, flags)
        write_snapshot(read_examples([log], champion.class_names), snapshot)
    source = f"{flags.source}+log:{snapshot}"
    config.data.source = source
    seconds["from scratch"] = train(config, flags.output / "scratch")
    config.checkpoint.init_from = str(flags.output / "champion")
    config.train.epochs = flags.epochs
    seconds["from the champion"] = train(config, flags.output / "warm")

    print("| network | logged test images | test images of the source | seconds |")
    print("| --- | --- | --- | --- |")
    for name, folder in zip(seconds, ("champion", "scratch", "warm"), strict=True):
        logged, old = accuracies(BundlePredictor.load(flags.output / folder), source)
        print(f"| {name} | {logged:.1%} | {old:.1%} | {seconds[name]:.0f} |")


def train(config: Config, workdir: pathlib.Path) -> float:
    """Trains a network unless this was done; returns the seconds of this call."""
    start = time.perf_counter()
    train_and_evaluate(config, workdir)
    return time.perf_counter() - start


def write_log(
    folder: pathlib.Path, champion: BundlePredictor, flags: argparse.Namespace
) -> pathlib.Path:
    """Writes a request log of corrupted images with their true classes, as a server would."""
    drawn = open_source(f"folder:{shapes.generate(flags.logged, _SEED) / 'images'}")
    images = []
    for index in range(len(drawn)):
        pixels = load(drawn.read(drawn.keys[index]), champion.preprocessing)
        pixels = CORRUPTIONS[flags.corruption](pixels, flags.severity, index)
        encoded = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1]
        images.append(encoded.tobytes())
    folder.mkdir(exist_ok=True)
    request_log.make_folders(folder)
    request_log.write_class_names(folder, "0" * 64, champion.class_names)
    count = len(drawn)
    now = [round(1e6 * time.time())] * count
    common = {
        "request_id": [f"{row:032x}" for row in range(count)],
        "image_index": [0] * count,
        "time": now,
    }
    request = {"model": ["shapes"] * count, "digest": ["0" * 64] * count, "image": images}
    label = {"label": [drawn.class_names[label] for label in drawn.labels]}
    for name, schema, columns in (
        ("requests", request_log.REQUESTS, common | request),
        ("feedback", request_log.FEEDBACK, common | label),
    ):
        segments = request_log.Segments(folder / name, schema)
        segments.append({column: columns.get(column, [None] * count) for column in schema.names})
        segments.close()
    return folder


def accuracies(predictor: BundlePredictor, source: str) -> tuple[float, float]:
    """Returns the accuracy on the test images of the log, and on the other test images."""
    dataset = open_as_trained(predictor, source)
    indices, labels = labelled_split(predictor, dataset, "test")
    is_correct = predict_split(predictor, dataset.loader, indices).argmax(axis=1) == labels
    assert dataset.source.logged is not None
    is_logged = dataset.source.logged[indices]
    return float(np.mean(is_correct[is_logged])), float(np.mean(is_correct[~is_logged]))


if __name__ == "__main__":
    main()
