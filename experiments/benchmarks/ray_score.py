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
import sys
from typing import Any

import numpy as np
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--input", required=True, help="a local folder or a folder in a bucket")
    parser.add_argument("--output", required=True, help="a new local folder or folder in a bucket")
    parser.add_argument("--workers", type=int, default=1, help="largest number of predictors")
    parser.add_argument("--cpus", type=float, default=1, help="for each predictor")
    parser.add_argument("--gpus", type=float, default=0, help="for each predictor")
    flags = parser.parse_args()
    ray.init()
    cluster = ray.cluster_resources()
    for name, needed in (("CPU", flags.cpus), ("GPU", flags.gpus)):
        if needed > cluster.get(name, 0):  # Ray would wait for such a machine forever.
            sys.exit(f"--{name.lower()}s: the cluster has only {cluster.get(name, 0):g}")
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
