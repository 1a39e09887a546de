r"""Classifies any number of images on a Ray cluster, or on this machine.

    pip install -e . 'ray[data]'
    python experiments/benchmarks/ray_score.py --bundle=RUN/bundle --input=s3://BUCKET/IMAGES \
        --output=DIR

Writes Parquet files with path, predicted, confidence, probabilities and error. Only files with the
suffix of an image are read. Exits with 1 if an image cannot be read. Ray reads and distributes the
images, and repeats the work of a lost machine. All machines must be able to access the bundle, the
images and DIR.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.fs
import ray  # pyright: ignore

from cnn_jax.data.files import IMAGE_SUFFIXES
from cnn_jax.inference.batching import BATCH_SIZE
from cnn_jax.inference.predictor import BundlePredictor, predict_batch


class Score:
    """A callable that classifies one batch of images at a time in a Ray worker."""

    def __init__(self, bundle: str):
        self._predictor = BundlePredictor.load(bundle)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found = predict_batch(self._predictor, [bytes(image) for image in batch["bytes"]])
        nothing = np.full(len(self._predictor.class_names), np.nan, np.float32)
        return {
            "path": batch["path"],
            "predicted": np.array([one.predicted or "" for one in found]),
            "confidence": np.array([one.confidence or np.nan for one in found]),
            "probabilities": np.stack(
                [nothing if one.probabilities is None else one.probabilities for one in found]
            ),
            "error": np.array([one.error or "" for one in found]),
        }


def is_empty(folder: str) -> bool:
    """Returns whether a local folder, or a folder in a bucket, is empty or does not exist."""
    uri = folder if "://" in folder else str(pathlib.Path(folder).absolute())
    system, path = pyarrow.fs.FileSystem.from_uri(uri)
    return not system.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))


def find_missing(nodes: Sequence[Mapping[str, Any]], needed: Mapping[str, float]) -> list[str]:
    """Returns a warning for each resource of which a predictor needs more than any node has.

    Args:
      nodes: The result of `ray.nodes`.
      needed: The amounts that a predictor needs, by the name of the resource.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    largest = {name: max((r.get(name, 0) for r in resources), default=0) for name in needed}
    return [
        f"--{name.lower()}s={amount:g}: no node has more than {largest[name]:g}; Ray waits until a "
        "larger node joins the cluster"
        for name, amount in needed.items()
        if amount > largest[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--input", required=True, help="a local folder or a folder in a bucket")
    parser.add_argument("--output", required=True, help="a new local folder or folder in a bucket")
    parser.add_argument("--workers", type=int, default=1, help="largest number of predictors")
    parser.add_argument("--cpus", type=float, default=1, help="for each predictor")
    parser.add_argument("--gpus", type=float, default=0, help="for each predictor")
    flags = parser.parse_args()
    if not is_empty(flags.output):
        sys.exit(f"--output: {flags.output} is not empty; choose a new folder")
    ray.init()
    for problem in find_missing(ray.nodes(), {"CPU": flags.cpus, "GPU": flags.gpus}):
        print(problem, file=sys.stderr)
    images = ray.data.read_binary_files(
        flags.input,
        include_paths=True,
        file_extensions=[suffix[1:] for suffix in sorted(IMAGE_SUFFIXES)],
    )
    images.map_batches(
        Score,
        fn_constructor_args=(flags.bundle,),
        batch_size=4 * BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=flags.workers),
        num_cpus=flags.cpus,
        num_gpus=flags.gpus,
    ).write_parquet(flags.output)
    written = ray.data.read_parquet(flags.output, columns=["error"])
    count, failed = written.count(), written.filter(lambda row: row["error"] != "").count()
    print(f"classified {count - failed} of {count} images")
    if failed:
        sys.exit(f"{failed} images cannot be read; the column `error` says why")


if __name__ == "__main__":
    main()
