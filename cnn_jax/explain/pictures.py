"""Writes explanations of image files as pictures, as JSON and as an HTML page."""

import io
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from cnn_jax.data import Track, decode, no_track
from cnn_jax.explain import checks, features
from cnn_jax.explain.maps import METHODS, methods_for, why_no_cam
from cnn_jax.explain.names import method_named
from cnn_jax.explain.overlay import draw_overlay
from cnn_jax.inference.batching import BATCH_SIZE
from cnn_jax.inference.images import ImageReader
from cnn_jax.inference.predictor import BundlePredictor, Predictor
from cnn_jax.report import style, thumbnails
from cnn_jax.system.errors import ConfigError, DataError, did_you_mean, printable

logger = logging.getLogger(__name__)

# The maximum number of images whose feature maps are drawn (one picture for each layer), and the
# maximum number of images on the HTML page.
_MAX_WITH_FEATURE_MAPS, _MAX_ON_PAGE = 8, 100
# Lengths in pixels: the width of a feature map or filter in a grid, the gap between the cells of
# the grid, and the longer side of the pictures on the page.
_TILE, _GAP, _SIDE = 48, 2, 192
FILTERS = "filters.png"

Picture = Image.Image


def choose_methods(predictor: BundlePredictor, names: Sequence[str]) -> list[str]:
    """Converts names of explanation methods, as the user wrote them, to keys of `maps.METHODS`.

    Args:
      predictor: A loaded bundle.
      names: Names in any usual spelling; "all" means every method that works for the network.

    Returns:
      Keys of `maps.METHODS`, each once.

    Raises:
      ConfigError: There is no such method, or it does not work for the network.
    """
    allowed = methods_for(predictor)
    if "all" in names:
        return list(allowed)
    methods = []
    for name in names:
        method = method_named(name, METHODS)
        if method is None:
            raise ConfigError(
                f"--method: there is no method {name!r}{did_you_mean(name, METHODS)}; the methods "
                f"are {', '.join(METHODS)}, and all for every method"
            )
        if method not in allowed:
            raise ConfigError(f"--method: {why_no_cam(predictor)}")
        methods.append(method)
    return list(dict.fromkeys(methods))


def choose_class(predictor: Predictor, name: str) -> int:
    """Converts the name of a class to the position of the class.

    Returns:
      The position of the class in the predictor's class names.

    Raises:
      ConfigError: The predictor has no such class.
    """
    names = predictor.class_names
    if name not in names:
        some = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise ConfigError(
            f"--class: the bundle has no class {name!r}{did_you_mean(name, names)}; it has {some}"
        )
    return names.index(name)


def explain(
    predictor: BundlePredictor,
    paths: Sequence[pathlib.Path],
    output: str | os.PathLike[str],
    methods: Sequence[str] = ("grad_cam",),
    class_name: str | None = None,
    track: Track = no_track,
) -> dict[str, Any]:
    """Writes the explanations of image files: pictures, explanations.json and index.html.

    The pictures are maps over the images, feature maps of the first images, and filters.

    Args:
      predictor: A loaded bundle.
      paths: Image files.
      output: The folder for the files; it is created if it does not exist.
      methods: Names of methods that work for the network, or "all".
      class_name: The class to explain; by default each image's predicted class.
      track: Shows progress.

    Returns:
      The content of explanations.json. The record of an image that cannot be read has the
      reason, which is also logged.

    Raises:
      ConfigError: A method or the class is unknown, or the folder cannot be created.
      DataError: None of the images can be read; nothing is left in the folder then.
    """
    methods = choose_methods(predictor, methods)
    chosen = None if class_name is None else choose_class(predictor, class_name)
    folder = pathlib.Path(output)
    # The checks use a random sample of the images, because neighbouring files in a folder are often
    # similar.
    order = np.random.default_rng(0).permutation(len(paths))
    judged = set(order[: checks.MAX_IMAGES].tolist())
    records: list[dict[str, Any]] = []
    sample: list[tuple[np.ndarray, int]] = []
    reader = ImageReader(predictor.preprocessing)
    for start in track(
        range(0, len(paths), BATCH_SIZE), "explaining", math.ceil(len(paths) / BATCH_SIZE)
    ):
        part = [_read(path, reader) for path in paths[start : start + BATCH_SIZE]]
        readable = {i: pixels for i, pixels in enumerate(part) if isinstance(pixels, np.ndarray)}
        found = {}
        if readable:
            _create(folder)
            images = np.stack(list(readable.values()))
            found = _explain_batch(predictor, images, methods, chosen)
        for i, pixels in enumerate(part):
            number, path = start + i, paths[start + i]
            if isinstance(pixels, DataError):
                logger.warning("%s: %s", printable(str(path)), pixels)
                records.append({"path": str(path), "error": str(pixels)})
                continue
            row = list(readable).index(i)
            record = {"path": str(path), "error": None, **found["records"][row]}
            image_maps = {name: maps[row] for name, maps in found["maps"].items()}
            record["pictures"] = _save_overlays(folder, number, path, image_maps, predictor)
            if number < _MAX_WITH_FEATURE_MAPS:
                record["feature_maps"] = _save_feature_maps(folder, number, pixels, predictor)
            records.append(record)
            if number in judged:
                sample.append((pixels, int(found["classes"][row])))
    if all(record["error"] for record in records):
        raise DataError(f"none of {len(paths)} images could be read: {records[0]['error']}")

    no_verdict = checks.why_nothing_to_explain(predictor.metrics) or checks.why_no_verdict(
        len(sample)
    )
    result = {
        "methods": _judge(predictor, sample, methods, track, has_verdict=not no_verdict),
        "no_verdict": no_verdict,
        "filters": FILTERS if save_filters(folder / FILTERS, predictor) else None,
        "images": records,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "explanations.json").write_text(text + "\n", "utf-8", "backslashreplace")
    _write_page(folder, result, predictor)
    return result


def _create(folder: pathlib.Path) -> None:
    """Creates the output folder with an empty explanations.json.

    The file tells other commands that the pictures in this folder are not input. It is written
    first, so that this also holds if the process is killed before it ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "explanations.json").touch()
    except OSError as error:
        raise ConfigError(f"--output: cannot create {folder}: {error.strerror}") from error


def _read(path: pathlib.Path, reader: ImageReader) -> np.ndarray | DataError:
    try:
        return reader.read(path, str(path))
    except DataError as error:
        return error


def _explain_batch(
    predictor: BundlePredictor, images: np.ndarray, methods: Sequence[str], chosen: int | None
) -> dict[str, Any]:
    probabilities = predictor(images)
    predicted = probabilities.argmax(axis=1)
    classes = predicted if chosen is None else np.full(len(images), chosen)
    classes = classes.astype(np.int32)
    names = predictor.class_names
    return {
        "classes": classes,
        "maps": {name: METHODS[name](predictor, images, classes) for name in methods},
        "records": [
            {
                "predicted": names[best],
                "confidence": float(row[best]),
                "explained": names[explained],
                "probability": float(row[explained]),
            }
            for row, best, explained in zip(probabilities, predicted, classes, strict=True)
        ],
    }


def _judge(
    predictor: BundlePredictor,
    sample: Sequence[tuple[np.ndarray, int]],
    methods: Sequence[str],
    track: Track,
    *,
    has_verdict: bool,
) -> dict[str, dict[str, Any]]:
    """Runs the checks of `checks.judge` for explanation methods and describes the results.

    Args:
      predictor: A loaded bundle.
      sample: Pairs of an image and the class to explain.
      methods: Names of methods.
      track: Shows progress.
      has_verdict: Whether methods may pass or fail; False gives only the measured values.

    Returns:
      For each method: "checks", its value in the result of `checks.judge`; and "verdict", the
      passed and failed checks in words.
    """
    size = predictor.preprocessing.image_size
    images = np.array([pixels for pixels, _ in sample], np.uint8).reshape(-1, *size, 3)
    classes = np.array([explained for _, explained in sample], np.int32)
    verdicts = checks.judge(predictor, images, classes, methods=methods, track=track)
    if not has_verdict:
        checks.withhold(verdicts)
    return {
        name: {"verdict": checks.describe(verdict), "checks": verdict}
        for name, verdict in verdicts.items()
    }


def _save_overlays(
    folder: pathlib.Path,
    number: int,
    path: pathlib.Path,
    maps: Mapping[str, Float[np.ndarray, "height width"]],
    predictor: BundlePredictor,
) -> dict[str, str]:
    """Saves each explanation map, drawn over its image; returns a dict from method to file name.

    The pictures have the resolution of the image.
    """
    image = Image.fromarray(_decode(path, predictor))
    names = {method: f"{number:04d}-{method}.png" for method in maps}
    for method, values in maps.items():
        draw_overlay(image, values, predictor.preprocessing).save(folder / names[method])
    return names


def _save_feature_maps(
    folder: pathlib.Path, number: int, pixels: np.ndarray, predictor: BundlePredictor
) -> dict[str, str]:
    """Saves one picture of feature maps per layer; returns a dict from layer to file name."""
    names = {}
    for layer, grid in feature_map_grids(predictor, pixels).items():
        names[layer] = f"{number:04d}-maps-{layer}.png"
        grid.save(folder / names[layer])
    return names


def feature_map_grids(
    predictor: BundlePredictor, pixels: UInt8[np.ndarray, "height width 3"]
) -> dict[str, Picture]:
    """Draws the feature maps of an image, with one picture for each stage.

    Args:
      predictor: A loaded bundle.
      pixels: An image of the predictor's size.

    Returns:
      For each stage, by name, a grid of its feature maps. Each map has its own scale.
    """
    colours = matplotlib.colormaps["viridis"]
    grids = {}
    for layer, maps in features.feature_maps(predictor, pixels[None]).items():
        channels = np.moveaxis(maps[0], -1, 0)
        levels = [np.rint(255 * colours(_levels(values))[..., :3]) for values in channels]
        grids[layer] = _grid([Image.fromarray(level.astype(np.uint8)) for level in levels])
    return grids


def save_filters(path: pathlib.Path, predictor: BundlePredictor) -> bool:
    """Saves a picture of the first convolution's filters, if the network starts with a convolution.

    Grey is 0. All filters have the same scale.

    Returns:
      Whether the picture was saved.
    """
    try:
        filters = features.first_filters(predictor)
    except ValueError:
        return False
    largest = float(np.abs(filters).max()) or 1.0
    levels = np.rint(127.5 * (1 + filters / largest)).astype(np.uint8)
    _grid([Image.fromarray(one) for one in levels]).save(path)
    return True


def _levels(values: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width"]:
    """Scales the values of a map linearly to the range from 0 to 1."""
    return (values - values.min()) / (float(np.ptp(values)) or 1.0)


def _grid(tiles: Sequence[Picture]) -> Picture:
    """Arranges enlarged tiles in a grid that has about twice as many columns as rows."""
    columns = math.ceil(math.sqrt(2 * len(tiles)))
    height = max(round(_TILE * tiles[0].height / tiles[0].width), 1)
    rows = math.ceil(len(tiles) / columns)
    size = (
        columns * (_TILE + _GAP) - _GAP,
        rows * (height + _GAP) - _GAP,
    )
    grid = Image.new("RGBA", size, (0, 0, 0, 0))
    for i, tile in enumerate(tiles):
        corner = (i % columns) * (_TILE + _GAP), (i // columns) * (height + _GAP)
        grid.paste(tile.resize((_TILE, height), Image.Resampling.NEAREST), corner)
    return grid


def _write_page(folder: pathlib.Path, result: dict[str, Any], predictor: BundlePredictor) -> None:
    def small(path: pathlib.Path) -> str:
        pixels = _decode(path, predictor)
        encoded = io.BytesIO()
        thumbnails.fit_to_square(pixels, _SIDE).save(encoded, "PNG")
        return style.png_uri(encoded.getvalue())

    page = style.template("explanations.html").render(
        result=result,
        images=result["images"][:_MAX_ON_PAGE],
        original=lambda path: small(pathlib.Path(path)),
        overlay=lambda name: small(folder / name),
        full_size=lambda name: style.data_uri(folder / name),
        side=_SIDE,
    )
    (folder / "index.html").write_text(page, "utf-8", "backslashreplace")


def _decode(path: pathlib.Path, predictor: BundlePredictor) -> decode.Pixels:
    preprocessing = predictor.preprocessing
    return decode.decode(path.read_bytes(), preprocessing.max_pixels, preprocessing.white_level)
