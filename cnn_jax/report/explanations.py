"""The report's section on why the network decides as it does."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cnn_jax.data import shapes
from cnn_jax.explain import checks, features, pictures
from cnn_jax.explain.maps import (
    METHODS,
    Classes,
    Images,
    Maps,
    allows_cam,
    grad_cam,
    maps_by_method,
)
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality.robustness import load_images, stratified_sample
from cnn_jax.report import style, thumbnails, verdicts
from cnn_jax.report.charts import Chart
from cnn_jax.report.run import Network, Run
from cnn_jax.report.sections import Figures, example, surest_image
from cnn_jax.report.style import Theme

# The methods that are quick enough for every report; `cnn_jax.explain` has more.
_METHODS = ("grad_cam", "grad_cam_plus_plus", "layer_cam")
# Pixels of the images that the checks look at, so that large ones take no longer.
_PIXELS = 2**20
_MIN_IMAGES = 16
# Images that play the pointing game, for which there must be masks.
_POINTING = 512
# Pixels of the images that tell what features are worth, and these images times classes.
_FEATURE_PIXELS, _FEATURE_LOGITS = 2**24, 2**20
# Features that are shown, and images that excite each.
_NUM_FEATURES, _NUM_EXCITING = 6, 4
# The loss (nats) that is worth the darkest colour at least, so that noise looks like none.
_LEAST_GAIN = 0.05
# What the files are called.
FILTERS, FEATURE_MAPS = "filters.png", "feature_maps_{}.png"


def explanations(run: Run) -> Figures:
    """The verdict on each method; what regions and features are worth; what excites features."""
    network = run.need_network()
    predictor = network.predictor
    labels = network.labels("test")
    height, width = predictor.preprocessing.image_size
    number = max(_PIXELS // (height * width), _MIN_IMAGES)
    has_masks = network.source.name.partition(":")[0] == "shapes"

    rows = stratified_sample(labels, _POINTING if has_masks else checks.MAX_IMAGES)
    rows = np.random.default_rng(0).permutation(rows)
    if not has_masks:
        rows = rows[:number]
    positions = network.dataset.splits["test"][rows]
    images = load_images(network.dataset.loader, positions)
    predicted = network.probabilities["test"][rows].argmax(axis=1).astype(np.int32)
    masks = None
    if has_masks:
        ids = [network.source.ids[i] for i in positions]
        masks = shapes.read_masks(network.source.name, ids, (height, width))
    methods = [*_METHODS, *(["cam"] if allows_cam(predictor) else [])]
    judged = checks.judge(predictor, images, predicted, masks, methods)
    no_verdict = checks.why_no_verdict(len(images))
    if not verdicts.beats_chance(run.need_figures("test"), run.figures.get("train")):
        # Maps of a network that has learned nothing may still depend on its weights.
        no_verdict = (
            "No verdict on the methods: the network is not shown to be better than guessing, so "
            "there is nothing that its maps could explain."
        )
        for check in (check for method in judged.values() for check in method.values()):
            check["passes"] = None

    some = slice(max(number // 4, _MIN_IMAGES))
    regions = features.region_importance(predictor, images[some], labels[rows][some])
    return {
        "maps": grad_cam.__name__,
        "no_verdict": no_verdict,
        "methods": {
            name: {"verdict": checks.describe(verdict), "checks": verdict}
            for name, verdict in judged.items()
        },
        "images": min(len(images), checks.MAX_IMAGES),
        "regions": {
            "images": len(images[some]),
            "exchanges": features.REGION_EXCHANGES,
            **regions,
        },
        "features": _features(network),
    }


def maps(predictor: BundlePredictor, images: Images, classes: Classes) -> Maps:
    """The maps that the report lays over images."""
    # With the others, whose program is compiled already.
    classes = classes.astype(np.int32)
    methods = {name: METHODS[name] for name in _METHODS}
    return maps_by_method(predictor, images, classes, methods)[grad_cam.__name__]


def _features(network: Network) -> Figures:
    """The importance of the features that the head sees, on test images."""
    height, width = network.predictor.preprocessing.image_size
    number = min(_FEATURE_PIXELS // (height * width), _FEATURE_LOGITS // len(network.class_names))
    rows = stratified_sample(network.labels("test"), max(number, _MIN_IMAGES))
    labels = network.labels("test")[rows]
    images = load_images(network.dataset.loader, network.dataset.splits["test"][rows])
    embedding = features.embeddings(network.predictor, images)
    importance = features.feature_importance(network.predictor, embedding, labels)
    order = np.argsort(-importance, kind="stable")
    return {
        "images": len(rows),
        "exchanges": features.REPETITIONS,
        "count": len(importance),
        "silent": int((~embedding.any(axis=0)).sum()),
        "importance": importance[order].tolist(),
        "feature": order.tolist(),
        "top": [
            {
                "feature": int(feature),
                "importance": float(importance[feature]),
                "examples": [
                    example(network, "test", int(rows[row]))
                    for row in features.strongest_images(embedding, int(feature), _NUM_EXCITING)
                ],
            }
            for feature in order[:_NUM_FEATURES]
            if importance[feature] > 0
        ],
    }


def draw_pictures(run: Run, folder: pathlib.Path) -> dict[str, str]:
    """Draws the filters, and the feature maps of the image that the network is surest of.

    Returns:
      The files' names, by what they show.
    """
    predictor = run.need_network().predictor
    found = {}
    if pictures.save_filters(folder / FILTERS, predictor):
        found["filters"] = FILTERS
    pixels = surest_image(run.need_network())
    thumbnails.fitted(pixels, 144).save(folder / "feature_maps_of.png")
    found["feature_maps_of"] = "feature_maps_of.png"
    for layer, grid in pictures.feature_map_grids(predictor, pixels).items():
        grid.save(folder / FEATURE_MAPS.format(layer))
        found[layer] = FEATURE_MAPS.format(layer)
    return found


def charts(figures: Mapping[str, Any]) -> dict[str, Chart]:
    """What regions and features are worth."""
    if "explanations" not in figures:
        return {}
    section = figures["explanations"]
    return {
        "regions": Chart(functools.partial(_regions, section["regions"])),
        "features": Chart(functools.partial(_importance, section["features"])),
    }


def _regions(regions: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Loss gained where a region is exchanged, as a map of the image."""
    axes = style.plain(figure.subplots(), theme)
    gained = np.array(regions["loss_gained"])
    norm = Normalize(0, max(float(gained.max()), _LEAST_GAIN))
    axes.imshow(gained, cmap=theme.colours, norm=norm)
    for (row, column), value in np.ndenumerate(gained):
        ink = style.ink_on(theme.colours(norm(value)))
        text = f"{value:.2f}".replace("-0.00", "0.00")
        axes.text(column, row, text, ha="center", va="center", color=ink, size=style.TEXT_SIZE)
    axes.grid(visible=False)
    rows, columns = gained.shape
    axes.set_xticks(range(columns), [str(i + 1) for i in range(columns)])
    axes.set_yticks(range(rows), [str(i + 1) for i in range(rows)])
    axes.set(xlabel="region, from the left", ylabel="region, from the top")


def _importance(section: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Loss gained by each feature, the most important first."""
    axes = style.plain(figure.subplots(), theme)
    values = section["importance"]
    # One outline: hundreds of bars take several times as long.
    axes.stairs(values, np.arange(len(values) + 1) + 0.5, fill=True, color=theme.accent)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="features, the most important first", ylabel="loss gained (nats)")
