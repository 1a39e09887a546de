"""Explanations of image files as pictures, JSON and a page."""

import base64
import io
import json
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
from cnn_jax.explain.maps import METHODS, method_named, methods_for
from cnn_jax.explain.overlay import under_map
from cnn_jax.inference.images import ImageReader
from cnn_jax.inference.predictor import BATCH_SIZE, Predictor
from cnn_jax.report import style, thumbnails
from cnn_jax.system.errors import ConfigError, DataError, did_you_mean

# Images whose feature maps are shown, which are many pictures, and images on the page.
_MAX_WITH_FEATURE_MAPS, _MAX_ON_PAGE = 8, 100
# Of a feature map or a filter in a picture, in pixels, and of the page's pictures.
_TILE, _GAP, _SIDE = 48, 2, 192
FILTERS = "filters.png"

Picture = Image.Image


def choose_methods(predictor: Predictor, names: Sequence[str]) -> list[str]:
    """The methods of these names, each once; "all" stands for those that the network allows.

    Raises:
      ConfigError: There is no such method, or the network does not allow it.
    """
    allowed = methods_for(predictor)
    if "all" in names:
        return list(allowed)
    methods = []
    for name in names:
        method = method_named(name)
        if method is None:
            raise ConfigError(
                f"--method: there is no {name!r}{did_you_mean(name, METHODS)}; there are "
                f"{', '.join(METHODS)}, and all"
            )
        if method not in allowed:
            raise ConfigError(
                f"--method: {method} needs a network whose head sees the mean feature maps "
                "(model.dense=0); grad_cam works for any"
            )
        methods.append(method)
    return list(dict.fromkeys(methods))


def choose_class(predictor: Predictor, name: str) -> int:
    """The position of a class.

    Raises:
      ConfigError: The bundle has no such class.
    """
    names = predictor.class_names
    if name not in names:
        some = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise ConfigError(
            f"--class: the bundle has no class {name!r}{did_you_mean(name, names)}; it has {some}"
        )
    return names.index(name)


def explain(
    predictor: Predictor,
    paths: Sequence[pathlib.Path],
    output: str | os.PathLike[str],
    methods: Sequence[str] = ("grad_cam",),
    class_name: str | None = None,
    track: Track = no_track,
) -> dict[str, Any]:
    """Writes maps of image files, feature maps and filters; explanations.json and index.html.

    Args:
      predictor: A loaded bundle.
      paths: Image files.
      output: The folder that is written to; it is made if it is not there.
      methods: Names out of `maps.METHODS` that the network allows, or "all".
      class_name: What is explained; of each image the predicted class if not given.
      track: Shows progress.

    Returns:
      The content of explanations.json.

    Raises:
      ConfigError: A method or the class is unknown, or the folder cannot be made.
      DataError: None of the images can be read.
    """
    methods = choose_methods(predictor, methods)
    chosen = None if class_name is None else choose_class(predictor, class_name)
    folder = pathlib.Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # By this file the folder is known for no input, even if this process is killed.
        (folder / "explanations.json").touch()
    except OSError as error:
        raise ConfigError(f"--output: cannot make {folder}: {error.strerror}") from error

    # In no particular order, since neighbours in a folder are often alike.
    order = np.random.default_rng(0).permutation(len(paths))
    judged = set(order[: checks.MAX_IMAGES].tolist())
    records: list[dict[str, Any]] = []
    sample: list[tuple[np.ndarray, int]] = []
    reader = ImageReader(predictor.preprocessing)
    for start in track(range(0, len(paths), BATCH_SIZE), "explaining", _parts(len(paths))):
        part = [_read(path, reader) for path in paths[start : start + BATCH_SIZE]]
        readable = {i: pixels for i, pixels in enumerate(part) if isinstance(pixels, np.ndarray)}
        found = {}
        if readable:
            images = np.stack(list(readable.values()))
            found = _explain_batch(predictor, images, methods, chosen)
        for i, pixels in enumerate(part):
            number, path = start + i, paths[start + i]
            if isinstance(pixels, DataError):
                records.append({"path": str(path), "error": str(pixels)})
                continue
            row = list(readable).index(i)
            record = {"path": str(path), "error": None, **found["records"][row]}
            of_image = {name: maps[row] for name, maps in found["maps"].items()}
            record["pictures"] = _save_overlays(folder, number, path, of_image, predictor)
            if number < _MAX_WITH_FEATURE_MAPS:
                record["feature_maps"] = _save_feature_maps(folder, number, pixels, predictor)
            records.append(record)
            if number in judged:
                sample.append((pixels, int(found["classes"][row])))
    if all(record["error"] for record in records):
        raise DataError(f"none of {len(paths)} images could be read: {records[0]['error']}")

    result = {
        "methods": _judge(predictor, sample, methods, track),
        "no_verdict": checks.why_no_verdict(len(sample)),
        "filters": FILTERS if save_filters(folder / FILTERS, predictor) else None,
        "images": records,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "explanations.json").write_text(text + "\n", "utf-8", "backslashreplace")
    _write_page(folder, result, predictor)
    return result


def _parts(count: int) -> int:
    return math.ceil(count / BATCH_SIZE)


def _read(path: pathlib.Path, reader: ImageReader) -> np.ndarray | DataError:
    try:
        return reader.read(path, str(path))
    except DataError as error:
        return error


def _explain_batch(
    predictor: Predictor, images: np.ndarray, methods: Sequence[str], chosen: int | None
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
                "explained": names[of],
                "probability": float(row[of]),
            }
            for row, best, of in zip(probabilities, predicted, classes, strict=True)
        ],
    }


def _judge(
    predictor: Predictor,
    sample: Sequence[tuple[np.ndarray, int]],
    methods: Sequence[str],
    track: Track,
) -> dict[str, dict[str, Any]]:
    """The verdict on each method on these images, in figures and in words."""
    size = predictor.preprocessing.image_size
    images = np.array([pixels for pixels, _ in sample], np.uint8).reshape(-1, *size, 3)
    classes = np.array([of for _, of in sample], np.int32)
    verdicts = checks.judge(predictor, images, classes, methods=methods, track=track)
    return {
        name: {"verdict": checks.describe(verdict), "checks": verdict}
        for name, verdict in verdicts.items()
    }


def _save_overlays(
    folder: pathlib.Path,
    number: int,
    path: pathlib.Path,
    maps: Mapping[str, Float[np.ndarray, "height width"]],
    predictor: Predictor,
) -> dict[str, str]:
    """Saves maps over their image at its own resolution; returns the files' names by method."""
    image = Image.fromarray(_decode(path, predictor))
    names = {method: f"{number:04d}-{method}.png" for method in maps}
    for method, values in maps.items():
        under_map(image, values).save(folder / names[method])
    return names


def _save_feature_maps(
    folder: pathlib.Path, number: int, pixels: np.ndarray, predictor: Predictor
) -> dict[str, str]:
    """Saves a picture of all maps of each convolution; returns the files' names."""
    names = {}
    for layer, grid in feature_map_grids(predictor, pixels).items():
        names[layer] = f"{number:04d}-maps-{layer}.png"
        grid.save(folder / names[layer])
    return names


def feature_map_grids(
    predictor: Predictor, pixels: UInt8[np.ndarray, "height width 3"]
) -> dict[str, Picture]:
    """A picture of the maps of each convolution, each from its least value to its largest."""
    colours = matplotlib.colormaps["viridis"]
    grids = {}
    for layer, maps in features.feature_maps(predictor, pixels[None]).items():
        channels = np.moveaxis(maps[0], -1, 0)
        levels = [np.rint(255 * colours(_levels(values))[..., :3]) for values in channels]
        grids[layer] = _grid([Image.fromarray(level.astype(np.uint8)) for level in levels])
    return grids


def save_filters(path: pathlib.Path, predictor: Predictor) -> bool:
    """Saves a picture of the first convolution's filters; False if the network has none.

    Grey is 0, and all filters have one scale.
    """
    try:
        filters = features.first_filters(predictor)
    except ValueError:
        return False
    reach = float(np.abs(filters).max()) or 1.0
    levels = np.rint(127.5 * (1 + filters / reach)).astype(np.uint8)
    _grid([Image.fromarray(one) for one in levels]).save(path)
    return True


def _levels(values: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width"]:
    """From the least value, 0, to the largest, 1."""
    return (values - values.min()) / (float(np.ptp(values)) or 1.0)


def _grid(tiles: Sequence[Picture]) -> Picture:
    """Small pictures, enlarged without smoothing, about twice as many side by side as rows."""
    columns = math.ceil(math.sqrt(2 * len(tiles)))
    height = max(round(_TILE * tiles[0].height / tiles[0].width), 1)
    rows = math.ceil(len(tiles) / columns)
    size = (
        columns * (_TILE + _GAP) - _GAP,
        rows * (height + _GAP) - _GAP,
    )
    grid = Image.new("RGBA", size, (0, 0, 0, 0))
    for i, tile in enumerate(tiles):
        place = (i % columns) * (_TILE + _GAP), (i // columns) * (height + _GAP)
        grid.paste(tile.resize((_TILE, height), Image.Resampling.NEAREST), place)
    return grid


def _write_page(folder: pathlib.Path, result: dict[str, Any], predictor: Predictor) -> None:
    def as_it_is(name: str) -> str:
        return style.data_uri(folder / name)

    def small(path: pathlib.Path) -> str:
        pixels = _decode(path, predictor)
        encoded = io.BytesIO()
        thumbnails.fitted(pixels, _SIDE).save(encoded, "PNG")
        return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"

    page = style.template("explanations.html").render(
        result=result,
        images=result["images"][:_MAX_ON_PAGE],
        original=lambda path: small(pathlib.Path(path)),
        overlay=lambda name: small(folder / name),
        as_it_is=as_it_is,
        side=_SIDE,
    )
    (folder / "index.html").write_text(page, "utf-8", "backslashreplace")


def _decode(path: pathlib.Path, predictor: Predictor) -> decode.Pixels:
    preprocessing = predictor.preprocessing
    return decode.decode(path.read_bytes(), preprocessing.max_pixels, preprocessing.white_level)
