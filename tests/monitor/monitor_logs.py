"""Request logs with simulated predictions, for the tests of the monitor."""

import pathlib
import time

import numpy as np
import request_logs

from cnn_jax.data import request_log as files
from cnn_jax.quality import trust
from cnn_jax.quality.reference import Predictions, Reference

NAMES = ["circle", "square", "star"]
FEATURES = 6
DIGEST = "d" * 64


def simulate(rng: np.random.Generator, labels: np.ndarray, noise: float = 0.0) -> Predictions:
    """Returns predictions that get worse with the noise, from 0 to 1."""
    embeddings = 4 * np.eye(3, FEATURES)[labels] + rng.normal(size=(len(labels), FEATURES))
    embeddings = (1 - noise) * embeddings + noise * 3 * rng.normal(size=embeddings.shape)
    logits = 3 * embeddings[:, :3]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    images = np.maximum(100 + 20 * rng.normal(size=(len(labels), 3)) + [0, 60 * noise, 0], 0)
    return Predictions(*(a.astype(np.float32) for a in (probabilities, embeddings, images)))


def make_reference(seed: int = 0) -> Reference:
    """Returns the reference statistics of the simulated network."""
    rng = np.random.default_rng(seed)
    train, clean, corrupted = (rng.integers(3, size=size) for size in (1500, 800, 2500))
    parts = [simulate(rng, part, noise / 4) for noise, part in enumerate(np.split(corrupted, 5))]
    joined = Predictions(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("probabilities", "embeddings", "images")
        )
    )
    embedding = trust.fit_embedding(simulate(rng, train).embeddings, train, 3)
    return trust.fit_reference(*embedding, simulate(rng, clean), clean, joined, corrupted)


def write_log(
    folder: pathlib.Path,
    predictions: Predictions,
    start: float | None = None,
    ids: list[str] | None = None,
    digest: str = DIGEST,
    name: str = "shapes",
    image: bytes | None = None,
    subfolder: str = "requests",
) -> list[tuple[str, int]]:
    """Appends predictions to a request log, one second apart; returns their keys.

    Args:
      folder: The log; created if necessary.
      predictions: The predictions.
      start: The time of the first prediction; by default the last prediction is 10 s old.
      ids: The request ids; by default new ids.
      digest: The digest of the bundle.
      name: The name of the model.
      image: The PNG of each row.
      subfolder: "requests", or "labelled" for the rows of a deleted file.
    """
    count = len(predictions)
    start = time.time() - 10 - count if start is None else start
    rng = np.random.default_rng(int(start * 1000) % 2**32)
    ids = ids or [f"{int(1000 * (start + i)):012x}" + rng.bytes(10).hex() for i in range(count)]
    folder.mkdir(exist_ok=True)
    files.make_folders(folder)
    files.write_class_names(folder, digest, NAMES)
    segments = files.Segments(folder / subfolder, files.REQUESTS)
    segments.append(
        {
            "time": [round(1e6 * (start + i)) for i in range(count)],
            "request_id": ids,
            "image_index": [0] * count,
            "unit": [None] * count,
            "arm": ["champion"] * count,
            "model": [name] * count,
            "version": [1] * count,
            "digest": [digest] * count,
            "class": [NAMES[label] for label in predictions.classes],
            "confidence": predictions.probabilities.max(axis=1),
            "probabilities": list(predictions.probabilities),
            "embedding": list(predictions.embeddings),
            "brightness": predictions.images[:, 0],
            "sharpness": predictions.images[:, 1],
            "contrast": predictions.images[:, 2],
            "milliseconds": [5.0] * count,
            "shadow_of": [None] * count,
            "image": [image] * count,
        }
    )
    segments.close()
    return [(request_id, 0) for request_id in ids]


def write_labels(
    folder: pathlib.Path, labels: dict[tuple[str, int], str], when: float | None = None
) -> None:
    """Adds feedback with labels to a request log."""
    by_id = {request_id: label for (request_id, _), label in labels.items()}
    request_logs.write_labels(folder, by_id, time.time() if when is None else when)
