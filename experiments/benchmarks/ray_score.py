r"""Classifies any number of images on a Ray cluster, or on this machine.

    pip install -e . 'ray[data]'
    python experiments/benchmarks/ray_score.py --bundle=RUN/bundle --input=s3://BUCKET/IMAGES \
        --output=DIR

Writes Parquet files with path, predicted, confidence, probabilities and error. Ray reads and
distributes the images, and repeats the work of a lost machine. All machines must be able to
access the bundle, the images and DIR.
"""

import argparse
from typing import Any

import numpy as np
import ray  # pyright: ignore

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
    parser.add_argument("--output", required=True, help="a local folder or a folder in a bucket")
    parser.add_argument("--workers", type=int, default=1, help="number of predictors")
    parser.add_argument("--cpus", type=float, default=1, help="for each predictor")
    parser.add_argument("--gpus", type=float, default=0, help="for each predictor")
    flags = parser.parse_args()
    ray.data.read_binary_files(flags.input, include_paths=True).map_batches(
        Score,
        fn_constructor_args=(flags.bundle,),
        batch_size=4 * BATCH_SIZE,
        compute=ray.data.ActorPoolStrategy(size=flags.workers),
        num_cpus=flags.cpus,
        num_gpus=flags.gpus,
    ).write_parquet(flags.output)


if __name__ == "__main__":
    main()
