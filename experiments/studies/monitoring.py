"""Measures how well the monitor detects drift and estimates the accuracy of a bundle.

    python experiments/studies/monitoring.py --bundle=RUN [--images=500] [--clean=shapes:16000]
        [--repeats=200]
    python experiments/studies/monitoring.py --hold_out=CLASS --output=DIR [--repeats=200]
        [--config.KEY=VALUE ...]

The reference statistics are computed again from the training and the validation split, and the
windows consist of other images: `--images` test images under each corruption, and the clean images
of `--clean` that are not in the training data, or the test split. The program prints three Markdown
tables: false alarms, power under the 23 corruptions, and errors of the estimated accuracy. The
other methods in the tables are:

- MMD: maximum mean discrepancy of the embeddings with a Gaussian kernel of the median distance, and
  a permutation test (Gretton et al. 2012, Rabanser et al. 2019);
- mean confidence: the mean probability of the predicted class;
- ATC: average thresholded confidence (Garg et al. 2022);
- DoC: difference of confidences (Guillory et al. 2021), without a regression.

With `--hold_out`, the program trains a network on `shapes` without one class, and prints the
estimated and the true accuracy of windows in which some images are of this class.
"""

import argparse
import contextlib
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial.distance import cdist

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from cnn_jax.config import files
from cnn_jax.data import shapes
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.decode import load
from cnn_jax.inference.batching import BATCH_SIZE
from cnn_jax.inference.bundle import read_reference
from cnn_jax.inference.evaluation import image_batches, open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality.corruptions import CORRUPTIONS, FAMILIES, IMAGENET_C, SEVERITIES
from cnn_jax.quality.drift import LEVEL, TESTS, is_different, window_p_values
from cnn_jax.quality.reference import Predictions, Reference
from cnn_jax.quality.reference_fit import condition, measure_samples, predict_batches
from cnn_jax.quality.robustness import load_images, read_ahead, stratified_sample
from cnn_jax.quality.trust import Distances, estimate_accuracy, fit_reference, statistics
from cnn_jax.training.loop import train_and_evaluate

_WINDOW = 250
_PERMUTATIONS = 200
_SHIFTS = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]


def corrupted(images: np.ndarray, name: str, severity: int) -> Iterator[np.ndarray]:
    """Yields batches of images under one corruption; threads compute the next batches."""

    def work(start: int) -> np.ndarray:
        rows = range(start, min(start + BATCH_SIZE, len(images)))
        return np.stack([CORRUPTIONS[name](images[row], severity, 10**6 + row) for row in rows])

    return read_ahead(work, range(0, len(images), BATCH_SIZE))


def unseen_images(predictor: BundlePredictor, dataset: Dataset, name: str | None) -> Predictions:
    """Returns the predictions for clean images that the reference does not use."""
    chosen, indices = dataset, dataset.splits["test"]
    if name is not None:
        chosen = open_as_trained(predictor, name)
        known = set(dataset.source.ids)
        indices = np.array([i for i, id_ in enumerate(chosen.source.ids) if id_ not in known])
    with contextlib.closing(image_batches(chosen.loader, indices)) as batches:
        return predict_batches(predictor, batches)


def detects(reference: Reference, distances: Distances, window: Predictions) -> list[bool]:
    """Returns whether the window differs, and for each test whether it is significant."""
    counts = np.bincount(window.classes, minlength=len(reference.class_counts))
    values = statistics(distances, window)
    p_values = window_p_values(reference.statistics, reference.class_counts, values, counts)
    single = [p_value <= LEVEL for p_value in p_values.values()]
    return [is_different(list(p_values.values())), *single]


def mmd_detects(
    known: Float[np.ndarray, "n features"],
    window: Float[np.ndarray, "m features"],
    rng: np.random.Generator,
) -> bool:
    """Returns whether a permutation test of the maximum mean discrepancy is significant."""
    joined = np.concatenate([known, window]).astype(np.float64)
    squares = cdist(joined, joined, "sqeuclidean")
    kernel = np.exp(-squares / np.median(squares[squares > 0]))
    np.fill_diagonal(kernel, 0)
    labels = np.repeat([1.0, 0.0], [len(known), len(window)])
    rows = np.stack([labels, *(rng.permutation(labels) for _ in range(_PERMUTATIONS))])
    n, m = len(known), len(window)
    inside, outside = rows, 1 - rows
    first, second = inside @ kernel, outside @ kernel
    values = (
        (first * inside).sum(axis=1) / (n * (n - 1))
        + (second * outside).sum(axis=1) / (m * (m - 1))
        - 2 * (first * outside).sum(axis=1) / (n * m)
    )
    return bool((values >= values[0]).mean() <= LEVEL)


def row(name: str, *cells: str) -> None:
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def study_detection(
    reference: Reference,
    known: Predictions,
    clean: Predictions,
    shifts: dict[tuple[str, int], Predictions],
    repeats: int,
    rng: np.random.Generator,
) -> None:
    """Prints the rates at which windows of 250 images differ, with and without corruptions."""
    distances = Distances(reference.class_means, reference.covariance)
    names = ("all tests", *TESTS, "MMD")

    def rates(pool: Predictions, number: int, number_mmd: int) -> Float[np.ndarray, " methods"]:
        size = min(_WINDOW, len(pool) // 2)
        windows = [pool[rng.choice(len(pool), size, replace=False)] for _ in range(number)]
        found = np.mean([detects(reference, distances, window) for window in windows], axis=0)
        mmd = [
            mmd_detects(
                known[rng.choice(len(known), size, replace=False)].embeddings, w.embeddings, rng
            )
            for w in windows[:number_mmd]
        ]
        return np.append(found, np.mean(mmd))

    print(f"\nFraction of windows that differ, in %, at the level {100 * LEVEL:g} %:\n")
    row("images", *names)
    row("---", *["---"] * len(names))
    row(f"clean ({len(clean):,})", *map(percent, rates(clean, repeats, repeats)))
    for severity in SEVERITIES:
        found = np.mean(
            [rates(shifts[name, severity], max(repeats // 10, 10), 5) for name in CORRUPTIONS],
            axis=0,
        )
        row(f"23 corruptions, severity {severity}", *map(percent, found))


def study_estimates(
    samples: dict,
    reference: Reference,
    shifts: dict[tuple[str, int], Predictions],
    labels: Int[np.ndarray, " n"],
) -> None:
    """Prints the mean absolute errors of the estimated accuracy over corruptions and severities."""
    clean, hits = samples["clean"], samples["clean"].classes == samples["clean_labels"]
    known = clean.probabilities.max(axis=1)
    threshold = np.quantile(known, 1 - hits.mean())
    conditions = [condition(position) for position in range(len(samples["corrupted"]))]
    families = {name: family for family, members in FAMILIES.items() for name in members}
    unseen = {}
    for family in [f for f in FAMILIES if f != "quality"]:
        kept = np.array([families[name] != family for name, _ in conditions])
        changed = {key: samples[key][kept] for key in ("corrupted", "corrupted_labels")}
        unseen[family] = fit_reference(**{**samples, **changed})

    def estimate(fitted: Reference, predictions: Predictions) -> float:
        distances = Distances(fitted.class_means, fitted.covariance)
        return estimate_accuracy(fitted, distances, predictions)

    estimators = {
        "trust model, seen families": lambda p, family: estimate(reference, p),
        "trust model, unseen families": lambda p, family: estimate(
            unseen.get(family, reference), p
        ),
        "mean confidence": lambda p, family: p.probabilities.max(axis=1).mean(),
        "ATC": lambda p, family: (p.probabilities.max(axis=1) > threshold).mean(),
        "DoC": lambda p, family: p.probabilities.max(axis=1).mean() - known.mean() + hits.mean(),
    }
    print("\nMean absolute error of the estimated accuracy, in points:\n")
    row("method", "19 corruptions x 5", *FAMILIES, "largest")
    row("---", *["---"] * (2 + len(FAMILIES)))
    for name, estimator in estimators.items():
        errors = {
            key: abs(estimator(p, families[key[0]]) - (p.classes == labels).mean())
            for key, p in shifts.items()
        }
        main = [error for (corruption, _), error in errors.items() if corruption in IMAGENET_C]
        by_family = [
            np.mean([error for (c, _), error in errors.items() if families[c] == family])
            for family in FAMILIES
        ]
        row(name, *(percent(float(v)) for v in (np.mean(main), *by_family, max(main))))
    accuracies = [(p.classes == labels).mean() for (c, _), p in shifts.items() if c in IMAGENET_C]
    noise = np.mean([np.sqrt(a * (1 - a) / len(labels) * 2 / np.pi) for a in accuracies])
    print(f"\nMean accuracy under the 19 corruptions: {percent(float(np.mean(accuracies)))} %.")
    print(f"An exact estimator would have about {percent(float(noise))} points, by sampling.")


def study_new_class(
    name: str, folder: pathlib.Path, repeats: int, overrides: list[str], rng: np.random.Generator
) -> None:
    """Prints the estimated and the true accuracy of windows with images of an unknown class.

    Args:
      name: The class of `shapes` on which no network is trained.
      folder: A folder for the other classes and the run.
      repeats: The number of windows.
      overrides: Flags of the configuration.
      rng: Chooses the images of the windows.
    """
    images = shapes.generate() / "images"
    for path in images.iterdir():
        if path.name != name:
            shutil.copytree(path, folder / "images" / path.name, dirs_exist_ok=True)
    source = f"--config.data.source=folder:{folder / 'images'}"
    train_and_evaluate(files.load("configs/default.py", [source, *overrides]), folder / "run")
    predictor = BundlePredictor.load(folder / "run")
    reference = read_reference(folder / "run" / "bundle")
    assert reference is not None
    dataset = open_as_trained(predictor)
    test = dataset.splits["test"]
    with contextlib.closing(image_batches(dataset.loader, test)) as batches:
        known = predict_batches(predictor, batches)
    is_correct = known.classes == dataset.source.labels[test]
    held_out = [
        load(path.read_bytes(), predictor.preprocessing)
        for path in sorted((images / name).iterdir())
    ]
    starts = range(0, len(held_out), BATCH_SIZE)
    batches = (np.stack(held_out[start : start + BATCH_SIZE]) for start in starts)
    new = predict_batches(predictor, batches)
    distances = Distances(reference.class_means, reference.covariance)
    print(f"\n{repeats} windows of {_WINDOW} images, some of the unknown class {name!r}, in %:\n")
    row("images of the class", "true accuracy", "estimated accuracy", "windows that differ")
    row("---", "---", "---", "---")
    for count in (0, 12, 25, 62, 125):
        found = []
        for _ in range(repeats):
            old = rng.choice(len(known), _WINDOW - count, replace=False)
            chosen = rng.choice(len(new), count, replace=False)
            window = joined(known[old], new[chosen])
            estimate = estimate_accuracy(reference, distances, window)
            differs = detects(reference, distances, window)[0]
            found.append((is_correct[old].sum() / _WINDOW, estimate, differs))
        row(percent(count / _WINDOW), *map(percent, np.mean(found, axis=0)))


def joined(*parts: Predictions) -> Predictions:
    """Returns the predictions of several groups of images."""
    names = ("probabilities", "embeddings", "images")
    return Predictions(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the monitor's operating characteristics.")
    parser.add_argument("--bundle", help="a run or a bundle, unless --hold_out is given")
    parser.add_argument("--hold_out", choices=shapes.CLASS_NAMES, metavar="CLASS")
    parser.add_argument("--output", type=pathlib.Path, help="folder of the run of --hold_out")
    parser.add_argument("--images", type=int, default=500, help="test images for each corruption")
    parser.add_argument("--clean", help="source of clean images that are not in the training data")
    parser.add_argument("--repeats", type=int, default=200, help="clean windows")
    parser.add_argument("--seed", type=int, default=0)
    flags, overrides = parser.parse_known_args()
    rng = np.random.default_rng(flags.seed)
    if flags.hold_out and flags.output:
        study_new_class(flags.hold_out, flags.output, flags.repeats, overrides, rng)
        return
    if not flags.bundle or overrides:
        parser.error("--bundle, or --hold_out and --output, must be given")
    predictor = BundlePredictor.load(flags.bundle)
    dataset = open_as_trained(predictor)
    all_labels = dataset.source.labels
    start = time.perf_counter()
    samples = measure_samples(predictor, dataset.loader, dataset.splits, all_labels)
    middle = time.perf_counter()
    reference = fit_reference(**samples)
    print(
        f"{dataset.source.name}, {predictor.model.__class__.__name__}, image size "
        f"{predictor.preprocessing.image_size}: predictions for the reference in "
        f"{middle - start:.0f} s ({len(samples['clean']):,} validation images, "
        f"{len(samples['corrupted']):,} corrupted images), fit in "
        f"{time.perf_counter() - middle:.1f} s.",
        flush=True,
    )
    test = dataset.splits["test"]
    chosen = test[stratified_sample(all_labels[test], flags.images)]
    images, labels = load_images(dataset.loader, chosen), all_labels[chosen]
    shifts = {}
    for name, severity in _SHIFTS:
        shifts[name, severity] = predict_batches(predictor, corrupted(images, name, severity))
    study_estimates(samples, reference, shifts, labels)
    clean = unseen_images(predictor, dataset, flags.clean)
    study_detection(reference, samples["clean"], clean, shifts, flags.repeats, rng)


if __name__ == "__main__":
    main()
