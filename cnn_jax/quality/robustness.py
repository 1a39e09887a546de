"""Accuracy, confidence and calibration across image qualities."""

import collections
import concurrent.futures
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.augment import opencv
from cnn_jax.data.dataset import Dataset, memory_bytes
from cnn_jax.data.pipeline import Loader, evaluation_batches
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.source import Source
from cnn_jax.inference.calibration import expected_calibration_error
from cnn_jax.inference.evaluation import labelled_split
from cnn_jax.inference.predictor import BATCH_SIZE, Predictor
from cnn_jax.quality.corruptions import CORRUPTIONS, FAMILIES, IMAGENET_C, SEVERITIES, Corruption
from cnn_jax.system.errors import DataError
from cnn_jax.training.metrics import wilson_interval

# Accuracy has fallen when it is so much lower: 10 points, less what rounding may take.
_FALL = 0.1 - 1e-9


_NUM_BINS = 5


_Result = TypeVar("_Result")


_FAMILY_OF = {name: family for family, members in FAMILIES.items() for name in members}


def measure(
    predictor: Predictor,
    images: UInt8[np.ndarray, "n height width 3"],
    labels: Int[np.ndarray, " n"],
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    seed: int = 0,
    track: Track = no_track,
) -> dict[str, Any]:
    """Accuracy, confidence and calibration on clean and on corrupted images.

    Args:
      predictor: A loaded bundle.
      images: Of the bundle's size, one or more. Corrupted ones are made a few at a time.
      labels: Positions in the bundle's class names.
      corruptions: What to measure, by name.
      seed: 0 or more. What is random in an image's corruptions is a function of the seed,
        its position and the severity.
      track: Shows progress.

    Returns:
      As JSON can hold it:
        count: Number of images.
        seed: As given.
        clean: {"accuracy", "confidence" (the mean largest probability),
          "expected_calibration_error"}, each 0 to 1.
        corruptions: For each name its "family", the same three figures as means over the
          severities, "first_severity_10_points_lower" (than clean accuracy; 1 to 5, or
          None) and "severities", the three figures at 1 to 5.
        mean_corruption_error: The mean over ImageNet-C's 19 (those measured) of the mean
          error over severities, 0 to 1; None if there is none of them. The published one
          divides each error by AlexNet's on ImageNet, which means nothing for other data.
        relative_mean_corruption_error: The same of error less clean error, -1 to 1.

    Raises:
      ValueError: There are no images, or they are not of the bundle's size.
    """
    if not len(images):
        raise ValueError("there are no images to measure")
    clean = _figures(_predict(predictor, images), labels)
    seeds = np.random.default_rng(seed).integers(2**32, size=len(images)).tolist()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in corruptions}
    conditions = list(itertools.product(corruptions, SEVERITIES))
    work = functools.partial(_corrupted_batch, corruptions, conditions, images, seeds)
    starts = range(0, len(conditions) * len(images), BATCH_SIZE)
    remaining = iter(conditions)
    rows = np.empty((0, len(predictor.class_names)), np.float32)
    for batch in track(_read_ahead(work, starts), "measuring corruptions", len(starts)):
        rows = np.concatenate([rows, _predict(predictor, batch)])
        while len(rows) >= len(images):
            name, _ = next(remaining)
            found[name].append(_figures(rows[: len(images)], labels))
            rows = rows[len(images) :]
    errors = [1 - _mean(found[name], "accuracy") for name in found if name in IMAGENET_C]
    error = float(np.mean(errors)) if errors else None
    return {
        "count": len(images),
        "seed": seed,
        "clean": clean,
        "corruptions": {
            name: {
                "family": _FAMILY_OF.get(name, "other"),
                **{key: _mean(severities, key) for key in clean},
                "first_severity_10_points_lower": first_severity_lower(
                    clean["accuracy"], [figures["accuracy"] for figures in severities]
                ),
                "severities": severities,
            }
            for name, severities in found.items()
        },
        "mean_corruption_error": error,
        "relative_mean_corruption_error": (
            None if error is None else error - (1 - clean["accuracy"])
        ),
    }


def _corrupted_batch(
    corruptions: Mapping[str, Corruption],
    conditions: Sequence[tuple[str, int]],
    images: UInt8[np.ndarray, "n height width 3"],
    seeds: Sequence[int],
    start: int,
) -> list[UInt8[np.ndarray, "_height _width 3"]]:
    """Corrupted images from `start` on, at most a batch; all images of each condition in turn.

    Batches span conditions, so that only the last one is padded.
    """
    stop = min(start + BATCH_SIZE, len(conditions) * len(images))
    batch = []
    for position in range(start, stop):
        condition, row = divmod(position, len(images))
        name, severity = conditions[condition]
        batch.append(corruptions[name](images[row], severity, seeds[row]))
    return batch


def _read_ahead(work: Callable[[int], _Result], items: Iterable[int]) -> Iterator[_Result]:
    """work(item) for each item, in order; threads make the next results meanwhile."""
    waiting: collections.deque[concurrent.futures.Future[_Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(scan.num_cores()) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > scan.num_cores():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # Without this, an interrupt would wait for all of them.
            pool.shutdown(cancel_futures=True)


def _predict(
    predictor: Predictor, images: Iterable[UInt8[np.ndarray, "_height _width 3"]]
) -> Float[np.ndarray, "n classes"]:
    """Probabilities of images that come one by one."""
    iterator = iter(images)
    batch = np.zeros((BATCH_SIZE, *predictor.preprocessing.image_size, 3), np.uint8)
    rows = []
    while part := list(itertools.islice(iterator, BATCH_SIZE)):
        if part[0].shape != batch.shape[1:]:  # NumPy would stretch an image of one pixel.
            raise ValueError(f"images must be {batch.shape[1:]}, got {part[0].shape}")
        batch[: len(part)] = part  # What is left of the batch before is not looked at.
        rows.append(predictor(batch)[: len(part)])
    return np.concatenate(rows)


def _figures(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
    return {
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "confidence": float(probabilities.max(axis=1).astype(np.float64).mean()),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
    }


def _mean(severities: Sequence[Mapping[str, float]], key: str) -> float:
    return float(np.mean([figures[key] for figures in severities]))


def first_severity_lower(clean: float, accuracies: Sequence[float]) -> int | None:
    """The first severity at which accuracy is 10 points below that of clean images, or more.

    Args:
      clean: Accuracy on clean images, 0 to 1.
      accuracies: Of severity 1, 2, ...

    Returns:
      None if there is none.
    """
    for severity, accuracy in enumerate(accuracies, start=1):
        if clean - accuracy >= _FALL:
            return severity
    return None


def examples(
    image: UInt8[np.ndarray, "height width 3"], seed: int = 0
) -> dict[str, UInt8[np.ndarray, "5 height width 3"]]:
    """One image under each corruption, by name, at severities 1 to 5."""
    return {
        name: np.stack([corruption(image, severity, seed) for severity in SEVERITIES])
        for name, corruption in CORRUPTIONS.items()
    }


def stratified_sample(
    labels: Int[np.ndarray, " n"], size: int, seed: int = 0
) -> Int[np.ndarray, " m"]:
    """Positions of at most `size` examples, of each class its share, to within one example.

    Places are shared out by the largest remainder. A class whose share is less than half an
    example may have none: figures of the sample are then those of all, as nearly as can be.

    Args:
      labels: Of all examples.
      size: How many to take, 0 or more.
      seed: Decides which.

    Returns:
      min(n, size) positions, sorted.
    """
    if size >= len(labels):
        return np.arange(len(labels))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quotas = size * counts / len(labels)
    places = np.floor(quotas).astype(int)
    by_remainder = np.argsort(places - quotas, kind="stable")
    places[by_remainder[: size - places.sum()]] += 1
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[classes[order] == label][:number] for label, number in enumerate(places)]
    return np.sort(np.concatenate(chosen))


def by_quality(
    images: UInt8[np.ndarray, "n height width 3"],
    hits: Bool[np.ndarray, " n"],
    pixels: Int[np.ndarray, " n"],
) -> dict[str, list[dict[str, Any]]]:
    """Accuracy by what the images are like.

    Args:
      images: As the network sees them, resized.
      hits: Whether it is right.
      pixels: Width times height of each image before that; see `original_pixels`.

    Returns:
      "sharpness", "brightness" and "resolution" (in pixels): for each, bins as
      `accuracy_by_quantile` makes them.
    """
    return {
        "sharpness": accuracy_by_quantile(np.array([sharpness(i) for i in images]), hits),
        "brightness": accuracy_by_quantile(np.array([brightness(i) for i in images]), hits),
        "resolution": accuracy_by_quantile(pixels, hits),
    }


def sharpness(image: UInt8[np.ndarray, "height width 3"]) -> float:
    """The variance of the Laplacian of the grey levels, 0 to 255 (Pech-Pacheco et al. 2000)."""
    cv2 = opencv()
    return float(cv2.Laplacian(_grey(image), cv2.CV_32F).var(dtype=np.float64))


def brightness(image: UInt8[np.ndarray, "height width 3"]) -> float:
    """The mean grey level, 0 to 255."""
    return float(_grey(image).mean(dtype=np.float64))


def _grey(image: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "height width"]:
    """Luma, 0 to 255 (ITU-R BT.601)."""
    return image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def accuracy_by_quantile(
    values: Num[np.ndarray, " n"], hits: Bool[np.ndarray, " n"], num_bins: int = _NUM_BINS
) -> list[dict[str, Any]]:
    """Accuracy of the images with the smallest values, of the next, and so on.

    The bins hold as nearly as possible the same number of images. Equal values are never
    parted, so there may be fewer bins: one if all are equal.

    Args:
      values: Finite.
      hits: Whether the network is right.
      num_bins: At most so many.

    Returns:
      By rising values, for each bin: "from" and "to", the smallest and the largest value
      in it, "count", "accuracy", and "confidence_interval", Wilson's of 95 %.
    """
    if not len(values):
        return []
    edges = np.quantile(values, np.arange(1, num_bins) / num_bins)
    bin_of = np.searchsorted(edges, values)  # What is equal to an edge lies below it.
    bins = []
    for number in np.unique(bin_of):
        members, of_bin = values[bin_of == number], hits[bin_of == number]
        bins.append(
            {
                "from": members.min().item(),
                "to": members.max().item(),
                "count": len(members),
                "accuracy": float(of_bin.mean()),
                "confidence_interval": list(wilson_interval(float(of_bin.sum()), len(members))),
            }
        )
    return bins


def original_pixels(
    source: Source, indices: Int[np.ndarray, " n"], preprocessing: Preprocessing
) -> Int[np.ndarray, " n"]:
    """Width times height of these images as they are stored.

    A scan has seen it and remembers it; where that could not be kept, they are read again.

    Raises:
      DataError: One cannot be read any more.
    """
    selected = source.select(indices)
    pixels = []
    for row, record in enumerate(scan.known_records(selected, preprocessing)):
        if record is None:
            encoded = scan.read_example(selected, row, preprocessing.max_pixels)
            record, _ = scan.examine(encoded, preprocessing)
        if record.header is None:
            raise DataError(f"{source.name}: {selected.ids[row]} {record.error}")
        pixels.append(record.header.width * record.header.height)
    return np.array(pixels, np.int64)


def load_images(
    loader: Loader, indices: Int[np.ndarray, " n"], track: Track = no_track
) -> UInt8[np.ndarray, "n height width 3"]:
    """All these images at once, as the network sees them."""
    images = np.empty((len(indices), *loader.preprocessing.image_size, 3), np.uint8)
    with evaluation_batches(loader, indices, BATCH_SIZE) as batches:
        num_batches = math.ceil(len(indices) / BATCH_SIZE)
        for number, batch in enumerate(track(batches, "loading images", num_batches)):
            start = number * BATCH_SIZE
            images[start : start + BATCH_SIZE] = batch["image"][batch["mask"]]
    return images


def measure_split(
    predictor: Predictor,
    dataset: Dataset,
    split: str = "test",
    sample: int | None = None,
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    seed: int = 0,
    track: Track = no_track,
) -> dict[str, Any]:
    """All of it for a split of a data set.

    Args:
      predictor: A loaded bundle.
      dataset: Any whose classes the bundle knows; see `evaluate.open_as_trained`.
      split: "train", "validation", "test" or "all".
      sample: How many of its images to take, 1 or more; by default all.
      corruptions: What to measure, by name.
      seed: Of the sample and of the corruptions.
      track: Shows progress.

    Returns:
      What `measure` returns, with "split", "split_count" (its images, of which "count"
      were taken) and "by_quality", of the clean images.

    Raises:
      DataError: The data has a class that the bundle does not know, or the split is
        empty, or too large for the memory.
    """
    indices, labels = labelled_split(predictor, dataset, split)
    split_count = len(indices)
    if sample is not None:
        chosen = stratified_sample(labels, sample, seed)
        indices, labels = indices[chosen], labels[chosen]
    _check_memory(dataset, split, len(indices))
    images = load_images(dataset.loader, indices, track)
    hits = _predict(predictor, images).argmax(axis=1) == labels
    pixels = original_pixels(dataset.source, indices, predictor.preprocessing)
    return {
        "split": split,
        "split_count": split_count,
        **measure(predictor, images, labels, corruptions, seed, track),
        "by_quality": by_quality(images, hits, pixels),
    }


def _check_memory(dataset: Dataset, split: str, count: int) -> None:
    """Raises DataError if so many images of the data set leave little room for all else."""
    needed = count * math.prod(dataset.loader.preprocessing.image_size) * 3
    available = memory_bytes() / 2
    if needed > available:
        raise DataError(
            f"{dataset.source.name}: {count:,} images of its {split} split take {needed / 1e9:.1f} "
            f"GB, more than half of the memory; --sample={int(count * available / needed)} "
            "takes a part of them"
        )
