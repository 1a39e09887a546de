"""The report's section on explanations: checks of saliency maps, and permutation importance."""

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
    maps_by_method,
)
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality.robustness import load_images, stratified_sample
from cnn_jax.report import style, thumbnails, verdicts
from cnn_jax.report.charts import Chart
from cnn_jax.report.run import Measurements, Network
from cnn_jax.report.sections import Figures, example, most_confident_image
from cnn_jax.report.style import Theme

# The saliency-map methods that are fast enough for every report. The report draws the maps of the
# first method that passes the randomization check. `cam` is not among the methods, because its maps
# equal those of `grad_cam`. The command `cnn_jax explain` offers more methods.
REPORT_METHODS = ("grad_cam", "hires_cam", "grad_cam_plus_plus", "layer_cam")
# The maximum total number of pixels of the images for the checks. At least _MIN_IMAGES images are
# checked, even if they have more pixels.
_PIXELS = 2**20
_MIN_IMAGES = 16
# The number of images for the pointing game, which needs data with masks of the objects.
_POINTING = 512
# The limits on the images for measuring feature importance: the maximum total number of pixels, and
# the maximum number of logits, which is the number of images times the number of classes.
_FEATURE_PIXELS, _FEATURE_LOGITS = 2**24, 2**20
# The number of features on the page, and the number of example images for each feature.
_NUM_FEATURES, _NUM_ACTIVATING = 6, 4
# The darkest colour in the chart of image regions stands for a loss increase of at least this many
# nats. Smaller increases, which may be noise, therefore have light colours.
_LEAST_GAIN = 0.05
# A feature stands out if permuting the feature increases the loss by more than this multiple of the
# noise. The noise is the largest decrease of the loss that permuting any feature causes.
_OUTSTANDING = 2.0
# The file names of the pictures of the filters and of the feature maps.
FILTERS, FEATURE_MAPS = "filters.png", "feature_maps_{}.png"


def explanations(run: Measurements) -> Figures:
    """Checks saliency-map methods, and measures the importance of image regions and features."""
    network = run.need_network()
    predictor = network.need_single()
    labels = network.labels("test")
    height, width = predictor.preprocessing.image_size
    number = max(_PIXELS // (height * width), _MIN_IMAGES)
    # Images of a request log have no masks.
    has_masks = network.source.name.split(":")[0] == "shapes" and network.source.logged is None

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
    judged = checks.judge(predictor, images, predicted, masks, REPORT_METHODS)
    no_verdict = checks.why_no_verdict(len(images))
    if not verdicts.beats_chance(run.need_figures("test")):
        # A method can pass the checks even if the network has learned nothing, because the maps of
        # any network depend on its weights.
        no_verdict = (
            "No verdict on the methods: the network is not shown to be better than guessing, so "
            "its maps have nothing to explain."
        )
        checks.withhold(judged)

    subset = slice(max(number // 4, _MIN_IMAGES))
    regions = features.region_importance(predictor, images[subset], labels[rows][subset])
    return {
        "maps": _choose_method(judged),
        "no_verdict": no_verdict,
        "methods": {
            name: {"verdict": checks.describe(verdict), "checks": verdict}
            for name, verdict in judged.items()
        },
        "images": min(len(images), checks.MAX_IMAGES),
        "regions": {
            "images": len(images[subset]),
            "exchanges": features.REGION_EXCHANGES,
            **regions,
        },
        "features": _features(network),
    }


def _choose_method(judged: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the first method that passes randomization; the first method if none passes."""
    return next(
        (name for name in judged if judged[name]["randomization"]["passes"]), REPORT_METHODS[0]
    )


def maps(predictor: BundlePredictor, images: Images, classes: Classes, method: str) -> Maps:
    """Returns the maps of a method that the report uses, to be drawn over images."""
    # Compute the maps of all methods in REPORT_METHODS. The program for all methods is usually
    # compiled already, because the checks use the same program. A program for only one method would
    # have to be compiled now.
    classes = classes.astype(np.int32)
    methods = {name: METHODS[name] for name in REPORT_METHODS}
    return maps_by_method(predictor, images, classes, methods)[method]


def _features(network: Network) -> Figures:
    """Measures the permutation importance of the last layer's input features on test images.

    The permutation of a feature can lower the loss only by chance. Therefore a feature stands out
    only if its permutation raises the loss by more than twice the largest decrease of the loss.
    """
    predictor = network.need_single()
    height, width = predictor.preprocessing.image_size
    number = min(_FEATURE_PIXELS // (height * width), _FEATURE_LOGITS // len(network.class_names))
    rows = stratified_sample(network.labels("test"), max(number, _MIN_IMAGES))
    labels = network.labels("test")[rows]
    images = load_images(network.dataset.loader, network.dataset.splits["test"][rows])
    embedding = features.embeddings(predictor, images)
    importance = features.feature_importance(predictor, embedding, labels)
    order = np.argsort(-importance, kind="stable")
    noise = max(-float(importance.min()), 0.0)
    return {
        "images": len(rows),
        "exchanges": features.REPETITIONS,
        "count": len(importance),
        "silent": int((~embedding.any(axis=0)).sum()),
        "noise": noise,
        "standing_out": int((importance > _OUTSTANDING * noise).sum()),
        "importance": importance[order].tolist(),
        "feature": order.tolist(),
        "top": [
            {
                "feature": int(feature),
                "importance": float(importance[feature]),
                "examples": [
                    example(network, "test", int(rows[row]))
                    for row in features.strongest_images(embedding, int(feature), _NUM_ACTIVATING)
                ],
            }
            for feature in order[:_NUM_FEATURES]
            if importance[feature] > _OUTSTANDING * noise
        ],
    }


def draw_pictures(run: Measurements, folder: pathlib.Path) -> dict[str, str]:
    """Draws the feature maps of a test image, and the filters if the first layer is a convolution.

    The image is the correctly classified test image with the highest confidence.

    Returns:
      A dictionary of file names. The keys are "filters", "feature_maps_of" (the file of the
      input image) and the layer names.
    """
    predictor = run.need_network().need_single()
    found = {}
    if pictures.save_filters(folder / FILTERS, predictor):
        found["filters"] = FILTERS
    pixels = most_confident_image(run.need_network())
    thumbnails.fit_to_square(pixels, 144).save(folder / "feature_maps_of.png")
    found["feature_maps_of"] = "feature_maps_of.png"
    for layer, grid in pictures.feature_map_grids(predictor, pixels).items():
        grid.save(folder / FEATURE_MAPS.format(layer))
        found[layer] = FEATURE_MAPS.format(layer)
    return found


def charts(figures: Mapping[str, Any]) -> dict[str, Chart]:
    """Returns the charts of the importance of image regions and of features."""
    if "explanations" not in figures:
        return {}
    section = figures["explanations"]
    return {
        "regions": Chart(functools.partial(_regions, section["regions"])),
        "features": Chart(functools.partial(_importance, section["features"])),
    }


def _regions(regions: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws a heat map of the loss increase that permuting each image region causes."""
    axes = style.plain(figure.subplots(), theme)
    gained = np.array(regions["loss_gained"])
    norm = Normalize(0, max(float(gained.max()), _LEAST_GAIN))
    digits = 2 if gained.max() >= 0.1 else 3
    axes.imshow(gained, cmap=theme.colours, norm=norm)
    for (row, column), value in np.ndenumerate(gained):
        ink = style.ink_on(theme.colours(norm(value)))
        text = f"{round(value, digits) + 0.0:.{digits}f}"  # Adding 0.0 converts -0.0 to 0.0.
        axes.text(column, row, text, ha="center", va="center", color=ink, size=style.TEXT_SIZE)
    axes.grid(visible=False)
    rows, columns = gained.shape
    axes.set_xticks(range(columns), [str(i + 1) for i in range(columns)])
    axes.set_yticks(range(rows), [str(i + 1) for i in range(rows)])
    axes.set(xlabel="region, from the left", ylabel="region, from the top")


def _importance(section: Mapping[str, Any], figure: Figure, theme: Theme) -> None:
    """Draws the loss increase that permuting each feature causes, in decreasing order.

    A dashed line marks the increase above which a feature stands out from chance.
    """
    axes = style.plain(figure.subplots(), theme)
    values = section["importance"]
    # Matplotlib draws one outline several times faster than hundreds of bars.
    axes.stairs(values, np.arange(len(values) + 1) + 0.5, fill=True, color=theme.accent)
    if section["noise"] > 0:
        axes.axhline(
            _OUTSTANDING * section["noise"], color=theme.ink, linewidth=0.9, linestyle=(0, (2, 2))
        )
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    axes.set(xlabel="feature, by importance", ylabel="increase of the loss (nats)")
