"""Robustness: accuracy, confidence and calibration on images of different quality."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int, Num, UInt8

from cnn_jax.data import Track, no_track, scan
from cnn_jax.data.dataset import Dataset, memory_bytes
from cnn_jax.data.pipeline import Loader
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.source import Source
from cnn_jax.inference.batching import BATCH_SIZE, map_batches
from cnn_jax.inference.calibration import expected_calibration_error
from cnn_jax.inference.evaluation import image_batches, labelled_split
from cnn_jax.inference.predictor import Predictor, predict_pixels
from cnn_jax.quality.corruptions import CORRUPTIONS, FAMILIES, IMAGENET_C, SEVERITIES, Corruption
from cnn_jax.quality.image_statistics import image_statistics
from cnn_jax.system.errors import DataError
from cnn_jax.training.metrics import wilson_interval

# The smallest decrease of the accuracy that `first_severity_lower` reports: 10 percentage points,
# minus a margin for rounding errors.
_FALL = 0.1 - 1e-9
_NUM_BINS = 5
_FAMILIES_BY_NAME = {name: family for family, members in FAMILIES.items() for name in members}

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def measure(
    predictor: Predictor,
    images: UInt8[np.ndarray, "n height width 3"],
    labels: Int[np.ndarray, " n"],
    corruptions: Mapping[str, Corruption] = CORRUPTIONS,
    seed: int = 0,
    track: Track = no_track,
) -> dict[str, Any]:
    """Measures accuracy, confidence and calibration on clean and on corrupted images.

    Args:
      predictor: A loaded bundle or any other predictor.
      images: Images of the predictor's size, one or more. They are corrupted a few at a time.
      labels: The position of each image's class in the predictor's class names.
      corruptions: The corruptions to apply, by name.
      seed: 0 or more. The random numbers of an image's corruptions are a function of the seed,
        the position of the image and the severity.
      track: Shows progress.

    Returns:
      JSON types:
        count: Number of images.
        seed: The argument.
        clean: {"accuracy", "confidence" (the mean of the largest probability),
          "expected_calibration_error"}, each 0 to 1.
        corruptions: For each name "family"; the means of the same three metrics over the
          severities; "first_severity_10_points_lower", the first severity, 1 to 5, at which
          accuracy is 10 percentage points lower than on clean images, or None; and
          "severities", a list of the three metrics at severity 1 to 5.
        mean_corruption_error: The mean, over those of ImageNet-C's 19 corruptions that were
          measured, of the mean error over the severities, 0 to 1; None without any of them.
          The paper divides each error by the error of AlexNet on ImageNet, which is
          meaningless for other data.
        relative_mean_corruption_error: `mean_corruption_error` minus the error on clean
          images, -1 to 1.

    Raises:
      ValueError: There are no images, or their size is not the predictor's.
    """
    if not len(images):
        raise ValueError("there are no images to measure")
    if images.shape[1:3] != predictor.preprocessing.image_size:
        raise ValueError(
            f"images must be {(*predictor.preprocessing.image_size, 3)}, got {images.shape[1:]}"
        )
    clean = _metrics(predict_pixels(predictor, images, BATCH_SIZE), labels)
    seeds = np.random.default_rng(seed).integers(2**32, size=len(images)).tolist()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in corruptions}
    conditions = list(itertools.product(corruptions, SEVERITIES))
    work = functools.partial(_corrupted_batch, corruptions, conditions, images, seeds)
    starts = range(0, len(conditions) * len(images), BATCH_SIZE)
    remaining = iter(conditions)
    rows = np.empty((0, len(predictor.class_names)), np.float32)
    batches = track(read_ahead(work, starts), "measuring corruptions", len(starts))
    for probabilities in map_batches(predictor, batches, BATCH_SIZE):
        rows = np.concatenate([rows, probabilities])
        while len(rows) >= len(images):
            name, _ = next(remaining)
            found[name].append(_metrics(rows[: len(images)], labels))
            rows = rows[len(images) :]
    errors = [1 - _mean(found[name], "accuracy") for name in found if name in IMAGENET_C]
    error = float(np.mean(errors)) if errors else None
    return {
        "count": len(images),
        "seed": seed,
        "clean": clean,
        "corruptions": {
            name: {
                "family": _FAMILIES_BY_NAME.get(name, "other"),
                **{key: _mean(severities, key) for key in clean},
                "first_severity_10_points_lower": first_severity_lower(
                    clean["accuracy"], [metrics["accuracy"] for metrics in severities]
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
) -> UInt8[np.ndarray, "_batch height width 3"]:
    """Returns one batch from the sequence of all corrupted images.

    In the sequence, all images under the first condition are followed by all images under the
    second condition, and so on. A batch may span two conditions, so that only the last batch is
    padded.

    Args:
      corruptions: The corruptions by name.
      conditions: Pairs of the name of a corruption and a severity.
      images: The clean images.
      seeds: A seed for each image.
      start: The position of the batch in the sequence of corrupted images.

    Returns:
      At most `BATCH_SIZE` images.
    """
    stop = min(start + BATCH_SIZE, len(conditions) * len(images))
    batch = []
    for position in range(start, stop):
        condition, row = divmod(position, len(images))
        name, severity = conditions[condition]
        batch.append(corruptions[name](images[row], severity, seeds[row]))
    return np.stack(batch)


def read_ahead(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Yields work(item) for each item, in order, while threads compute the next results."""
    pending: collections.deque[concurrent.futures.Future[_Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(scan.num_cores()) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > scan.num_cores():
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # Without this call, Ctrl-C would take effect only after all pending work.
            pool.shutdown(cancel_futures=True)


def _metrics(
    probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
    return {
        "accuracy": float((probabilities.argmax(axis=1) == labels).mean()),
        "confidence": float(probabilities.max(axis=1).astype(np.float64).mean()),
        "expected_calibration_error": expected_calibration_error(probabilities, labels),
    }


def _mean(severities: Sequence[Mapping[str, float]], key: str) -> float:
    return float(np.mean([metrics[key] for metrics in severities]))


def first_severity_lower(clean: float, accuracies: Sequence[float]) -> int | None:
    """Returns the first severity that lowers the accuracy by at least 10 percentage points.

    Args:
      clean: Accuracy on clean images, 0 to 1.
      accuracies: Accuracy at severity 1, 2, ..., 0 to 1.

    Returns:
      A severity, 1 or more; None if accuracy stays higher at all severities.
    """
    for severity, accuracy in enumerate(accuracies, start=1):
        if clean - accuracy >= _FALL:
            return severity
    return None


def examples(
    image: UInt8[np.ndarray, "height width 3"], seed: int = 0
) -> dict[str, UInt8[np.ndarray, "5 height width 3"]]:
    """Applies each corruption to an image at all severities, 1 to 5.

    Returns:
      By the name of the corruption, the five corrupted images.
    """
    return {
        name: np.stack([corruption(image, severity, seed) for severity in SEVERITIES])
        for name, corruption in CORRUPTIONS.items()
    }


def stratified_sample(
    labels: Int[np.ndarray, " n"], size: int, seed: int = 0
) -> Int[np.ndarray, " m"]:
    """Draws a stratified sample, in which each class has the same fraction as in all examples.

    The fractions are exact to within one example (largest-remainder method). A class with less
    than half an example in the sample may be missing from it.

    Args:
      labels: The classes of all examples.
      size: The number of examples to draw, 0 or more.
      seed: Seed of the choice within each class.

    Returns:
      The positions of min(n, size) examples, sorted.
    """
    if size >= len(labels):
        return np.arange(len(labels))
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    quotas = size * counts / len(labels)
    class_sizes = np.floor(quotas).astype(int)
    by_remainder = np.argsort(class_sizes - quotas, kind="stable")
    class_sizes[by_remainder[: size - class_sizes.sum()]] += 1
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = [order[classes[order] == label][:number] for label, number in enumerate(class_sizes)]
    return np.sort(np.concatenate(chosen))


def by_quality(
    images: UInt8[np.ndarray, "n height width 3"],
    hits: Bool[np.ndarray, " n"],
    pixels: Int[np.ndarray, " n"],
) -> dict[str, list[dict[str, Any]]]:
    """Measures the accuracy in bins by image sharpness, by brightness and by resolution.

    Args:
      images: The resized images, as the network receives them.
      hits: Whether each prediction is correct.
      pixels: Width times height of each image before resizing; see `original_pixels`.

    Returns:
      "sharpness", "brightness" and "resolution" (in pixels), each with the bins that
      `accuracy_by_quantile` returns.
    """
    brightness, sharpness, _ = np.array([image_statistics(i) for i in images]).reshape(-1, 3).T
    return {
        # The variance of the Laplacian (Pech-Pacheco et al. 2000).
        "sharpness": accuracy_by_quantile(sharpness**2, hits),
        "brightness": accuracy_by_quantile(brightness, hits),
        "resolution": accuracy_by_quantile(pixels, hits),
    }


def accuracy_by_quantile(
    values: Num[np.ndarray, " n"], hits: Bool[np.ndarray, " n"], num_bins: int = _NUM_BINS
) -> list[dict[str, Any]]:
    """Measures the accuracy in bins of an image property, for example the brightness.

    The bins hold nearly equal numbers of images. Images with equal values share a bin, so there
    may be fewer bins than requested.

    Args:
      values: One finite value for each image.
      hits: Whether each prediction is correct.
      num_bins: The maximum number of bins.

    Returns:
      For each bin, by increasing values: "from" and "to", its smallest and largest value;
      "count"; "accuracy"; and "confidence_interval", the 95 % Wilson interval of the accuracy.
    """
    if not len(values):
        return []
    edges = np.quantile(values, np.arange(1, num_bins) / num_bins)
    bin_numbers = np.searchsorted(edges, values)  # A value that equals an edge is in the lower bin.
    bins = []
    for number in np.unique(bin_numbers):
        members, member_hits = values[bin_numbers == number], hits[bin_numbers == number]
        bins.append(
            {
                "from": members.min().item(),
                "to": members.max().item(),
                "count": len(members),
                "accuracy": float(member_hits.mean()),
                "confidence_interval": list(
                    wilson_interval(float(member_hits.sum()), len(members))
                ),
            }
        )
    return bins


def original_pixels(
    source: Source, indices: Int[np.ndarray, " n"], preprocessing: Preprocessing
) -> Int[np.ndarray, " n"]:
    """Returns the number of pixels, width times height, of each image before resizing.

    The values come from the records of the last scan; an image without a record is read again.

    Args:
      source: The source of the images.
      indices: The positions of the images in the source.
      preprocessing: The preprocessing with which the images were scanned.

    Raises:
      DataError: An image cannot be read any more.
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
    """Loads images of a data set, and resizes the images to the network's input size."""
    images = np.empty((len(indices), *loader.preprocessing.image_size, 3), np.uint8)
    with contextlib.closing(image_batches(loader, indices, track)) as batches:
        for number, batch in enumerate(batches):
            start = number * BATCH_SIZE
            images[start : start + len(batch)] = batch
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
    """Measures the robustness of a predictor on a split of a data set.

    Args:
      predictor: A loaded bundle or any other predictor.
      dataset: A data set without classes that the predictor does not know; see
        `evaluation.open_as_trained`.
      split: "train", "validation", "test" or "all".
      sample: The number of images to draw from the split, 1 or more; by default all.
      corruptions: The corruptions to apply, by name.
      seed: Seed of the sample and of the corruptions.
      track: Shows progress.

    Returns:
      The value of `measure` with three more keys: "split"; "split_count", the number of images
      in the split, of which "count" were measured; and "by_quality", the value of `by_quality`
      for the clean images.

    Raises:
      DataError: The data set has a class that the predictor does not know, or the split is
        empty or too large for the memory.
    """
    indices, labels = labelled_split(predictor, dataset, split)
    split_count = len(indices)
    if sample is not None:
        chosen = stratified_sample(labels, sample, seed)
        indices, labels = indices[chosen], labels[chosen]
    _check_memory(dataset, split, len(indices))
    images = load_images(dataset.loader, indices, track)
    hits = predict_pixels(predictor, images, BATCH_SIZE).argmax(axis=1) == labels
    pixels = original_pixels(dataset.source, indices, predictor.preprocessing)
    return {
        "split": split,
        "split_count": split_count,
        **measure(predictor, images, labels, corruptions, seed, track),
        "by_quality": by_quality(images, hits, pixels),
    }


def _check_memory(dataset: Dataset, split: str, count: int) -> None:
    """Raises DataError if `count` images would need more than half of the memory."""
    needed = count * math.prod(dataset.loader.preprocessing.image_size) * 3
    available = memory_bytes() / 2
    if needed > available:
        raise DataError(
            f"{dataset.source.name}: {count:,} images of its {split} split take {needed / 1e9:.1f} "
            f"GB, more than half of the memory; --sample={int(count * available / needed)} "
            "measures a part of them"
        )
