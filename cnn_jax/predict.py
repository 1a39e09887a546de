"""Classifies images.

    cnn_jax predict --bundle=RUN --input FILE_FOLDER_OR_PATTERN ... [--top=K]
        [--output=out.csv]

writes a CSV row for each image. Importing this module imports no training code.
"""

import csv
import itertools
import pathlib
from collections.abc import Sequence
from typing import IO

import numpy as np

from cnn_jax.inference import predictor as predictors
from cnn_jax.inference.batching import BATCH_SIZE
from cnn_jax.inference.exported import load_predictor
from cnn_jax.inference.images import ImageReader, list_inputs
from cnn_jax.inference.images import preprocess_for_inference as preprocess_for_inference
from cnn_jax.inference.predictor import predict_batch as predict_batch
from cnn_jax.inference.protocol import EnsembleLike
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.errors import DataError

# This name is public: users load a bundle with `cnn_jax.predict.Predictor.load(path)`.
Predictor = predictors.BundlePredictor


def write_predictions(
    predictor: predictors.Predictor, paths: Sequence[pathlib.Path], file: IO[str], top: int = 1
) -> int:
    """Writes a CSV row for each image.

    The columns are path, predicted, confidence and error; for an ensemble, disagreement (see
    `calibration.mutual_information`, in nats); and then for the second most probable class
    predicted_2, confidence_2, and so on up to `top`.

    Args:
      predictor: A loaded bundle or any other predictor.
      paths: The image files.
      file: A text file that is open for writing.
      top: The number of classes in a row, 1 or more; at most all classes are written.

    Returns:
      The number of images that could not be read. Their rows hold the error.
    """
    top = min(top, len(predictor.class_names))
    has_disagreement = isinstance(predictor, EnsembleLike)
    further = ["disagreement"] * has_disagreement
    further += [f"{key}_{k}" for k in range(2, top + 1) for key in ("predicted", "confidence")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "predicted", "confidence", "error", *further])
    num_errors = 0
    reader = ImageReader(predictor.preprocessing)
    for start in range(0, len(paths), BATCH_SIZE):
        batch = paths[start : start + BATCH_SIZE]
        for path, prediction in zip(batch, predict_batch(predictor, batch, reader), strict=True):
            if prediction.probabilities is None:
                num_errors += 1
                writer.writerow([path, "", "", prediction.error, *("" for _ in further)])
                continue
            order = np.argsort(-prediction.probabilities, kind="stable")[:top]
            first, *others = (
                [predictor.class_names[i], f"{prediction.probabilities[i]:.6f}"] for i in order
            )
            measured = [f"{prediction.disagreement:.6f}"] if has_disagreement else []
            writer.writerow([path, *first, "", *measured, *itertools.chain(*others)])
    return num_errors


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax predict", description="Classify images and folders of images."
    )
    cli.add_input_flags(parser)
    parser.add_argument(
        "--top",
        type=cli.positive,
        default=1,
        metavar="K",
        help="number of classes for each image, the most probable first (1)",
    )
    parser.add_argument(
        "--output", type=cli.path, metavar="FILE", help="CSV file to write; by default stdout"
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    paths = list_inputs(flags.input, flags.allow_outside)
    predictor = load_predictor(flags.bundle, runs_once=len(paths) == 1)
    with cli.open_output(flags.output) as file:
        num_errors = write_predictions(predictor, paths, file, flags.top)
    if num_errors:
        raise DataError(f"{num_errors} of {len(paths)} images could not be read")


if __name__ == "__main__":
    cli.run(main)
