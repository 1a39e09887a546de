"""What holds a method of `maps` to account: checks that it could fail.

- Randomisation (Adebayo et al. 2018): the weights are shuffled, layer by layer from the logits
  down; a map that says anything of what was learned must change with the first of them, and not
  come back.
- Deletion and insertion (Petsiuk et al. 2018): the class's probability as the pixels of an image
  go, or come back, in the order of its map: the area must be smaller, or larger, than in the
  order of a random map and in that of the distance from the image's centre.
- The pointing game (Zhang et al. 2018), where it is known where the object is: the map's largest
  value must lie on it more often than the image's centre and than a random pixel.

A method passes a check if it is better on average over images, and 95 % confidence intervals of
the differences (normal approximation, image by image) leave no doubt of it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, PyTree

from cnn_jax.data import Track, no_track
from cnn_jax.explain.maps import Classes, Images, Maps, maps_by_method, methods_for
from cnn_jax.inference.predictor import Predictor, predict_pixels
from cnn_jax.models.network import layer_names

# Fewer images leave every verdict open; more go into the pointing game alone, which is quick.
MIN_IMAGES, MAX_IMAGES = 8, 64
# A map whose ranks still agree this well (Spearman) with those before the shuffle has not changed.
_SAME = 0.5
# Of deletion and insertion; the shares of pixels are 0, 1/_STEPS, ..., 1.
_STEPS = 10
# A random map is as smooth as a small feature map.
_RANDOM_CELLS = 8
# The blurred image that insertion begins with: standard deviation as a share of the shorter side.
_BLUR = 0.1


def judge(
    predictor: Predictor,
    images: Images,
    classes: Classes,
    masks: Bool[np.ndarray, "batch height width"] | None = None,
    methods: Sequence[str] | None = None,
    seed: int = 0,
    track: Track = no_track,
) -> dict[str, Any]:
    """The verdict on each method.

    Args:
      predictor: A loaded bundle.
      images: uint8 [batch, height, width, 3], of its size, in no particular order: all play the
        pointing game, and the first 64 are for the other checks.
      classes: What is explained of each, such as the predicted class.
      masks: Where the object is; without them there is no pointing game.
      methods: Names; by default all that the network allows.
      seed: Of shuffles and random maps.
      track: Shows progress.

    Returns:
      {method: {"randomization": {...}, "deletion": {...}, "insertion": {...},
      "pointing_game": {...}}}, each check with its figures, the number of "images" and "passes":
      True, False, or None if there are fewer than `MIN_IMAGES` images; finite JSON types.
    """
    allowed = methods_for(predictor)
    chosen = {name: allowed[name] for name in methods or allowed}
    all_images, all_classes = images, classes
    images, classes = images[:MAX_IMAGES], classes[:MAX_IMAGES]
    rivals = {
        "random": random_maps(len(images), images.shape[1:3], seed),
        "centre": centre_maps(len(images), images.shape[1:3]),
    }
    curves = Curves(predictor, images, classes)
    areas_of_rivals = {name: curves.areas(maps) for name, maps in rivals.items()}
    maps_of = maps_by_method(predictor, images, classes, chosen)
    correlations: dict[str, dict[str, np.ndarray]] = {name: {} for name in chosen}
    for layer, shuffled in _shuffled_predictors(predictor, seed).items():
        for name, maps in maps_by_method(shuffled, images, classes, chosen).items():
            # An inverted map has not changed either, so what counts is the correlation's size.
            correlations[name][layer] = np.abs(rank_correlation(maps_of[name], maps))
    more = {}
    if masks is not None:
        rest = all_images[MAX_IMAGES:], all_classes[MAX_IMAGES:]
        more = maps_by_method(predictor, *rest, chosen)
    verdicts = {}
    for name in track(chosen, "checking", len(chosen)):
        maps = maps_of[name]
        deletion, insertion = curves.areas(maps)
        verdict = {
            "randomization": _randomization(correlations[name], len(images)),
            "deletion": _against(
                deletion, {rival: areas[0] for rival, areas in areas_of_rivals.items()}, -1
            ),
            "insertion": _against(
                insertion, {rival: areas[1] for rival, areas in areas_of_rivals.items()}, 1
            ),
        }
        if masks is not None:
            centre = centre_maps(len(masks), masks.shape[1:])
            verdict["pointing_game"] = _against(
                hits(np.concatenate([maps, more[name]]), masks),
                {"random": masks.mean(axis=(1, 2)), "centre": hits(centre, masks)},
                1,
            )
        verdicts[name] = verdict
    return verdicts


def describe(verdict: dict[str, Any]) -> str:
    """A verdict in words: which checks are passed and which are not; "no verdict" without one."""
    found: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for check, result in verdict.items():
        found[result["passes"]].append(check.replace("_", " "))
    if found[None]:
        return "no verdict"
    words = []
    if found[True]:
        words.append("passes " + ", ".join(found[True]))
    if found[False]:
        words.append("fails " + ", ".join(found[False]))
    return "; ".join(words)


def why_no_verdict(count: int) -> str:
    """The reason why so few images give no verdict on any method; empty if they are enough."""
    if count >= MIN_IMAGES:
        return ""
    return f"No verdict on the methods: that takes at least {MIN_IMAGES} images."


def _mean_and_reach(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The mean, and half of its 95 % confidence interval (normal approximation)."""
    n = len(values)
    reach = 1.96 * float(values.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    return (float(values.mean()) if n else 0.0), float(reach)


def _against(
    scores: Float[np.ndarray, " n"], rivals: dict[str, Float[np.ndarray, " n"]], better: int
) -> dict[str, Any]:
    """Compares scores with those of rivals on the same images; `better` is 1 or -1."""
    found: dict[str, Any] = {"images": len(scores), "mean": _mean_and_reach(scores)[0]}
    passes = True
    for rival, others in rivals.items():
        difference, reach = _mean_and_reach(scores - others)
        found[rival] = _mean_and_reach(others)[0]
        found[f"difference_from_{rival}"] = [difference - reach, difference + reach]
        passes &= bool(better * difference - reach > 0)
    return found | {"passes": passes if len(scores) >= MIN_IMAGES else None}


def shuffle_layers(variables: PyTree, layers: Sequence[str], seed: int = 0) -> PyTree:
    """Variables with the numbers of each parameter of these layers in a random order."""

    def shuffle(path: tuple, leaf: Any) -> Any:
        names = [entry.key for entry in path]
        if names[0] != "params" or names[1] not in layers:
            return leaf
        numbers = np.asarray(leaf)
        rng = np.random.default_rng([seed, *"/".join(names).encode()])
        return rng.permutation(numbers.ravel()).reshape(numbers.shape)

    return jax.tree.map_with_path(shuffle, variables)


def _shuffled_predictors(predictor: Predictor, seed: int) -> dict[str, Predictor]:
    """Predictors with ever more shuffled layers, by the name of the last one, logits first."""
    names = layer_names(predictor.model, predictor.preprocessing.image_size)[::-1]
    found = {}
    for i, name in enumerate(names, start=1):
        found[name] = copy.copy(predictor)
        found[name].variables = jax.device_put(shuffle_layers(predictor.variables, names[:i], seed))
    return found


def rank_correlation(a: Maps, b: Maps) -> Float[np.ndarray, " batch"]:
    """Spearman's correlation of each pair of maps.

    0 where one of them is constant, and 1 where both are: nothing has changed then.
    """
    ranks = [mean_ranks(maps.reshape(len(maps), -1)) for maps in (a, b)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    are_constant = ~(x.any(axis=1) | y.any(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=are_constant.astype(float), where=scale > 0)


def mean_ranks(values: Float[np.ndarray, "batch n"]) -> Float[np.ndarray, "batch n"]:
    """Ranks within each row, from 0; equal values share the mean of their ranks.

    As `scipy.stats.rankdata`, whose module takes a second to import.
    """
    batch, n = values.shape
    order = np.argsort(values, axis=1, kind="stable")
    rising = np.take_along_axis(values, order, axis=1)
    differs = rising[:, 1:] != rising[:, :-1]
    edge = np.ones((batch, 1), bool)
    positions = np.arange(n)
    first = np.maximum.accumulate(np.where(np.hstack([edge, differs]), positions, 0), axis=1)
    last = np.where(np.hstack([differs, edge]), positions, n)
    last = np.minimum.accumulate(last[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty((batch, n))
    np.put_along_axis(ranks, order, (first + last) / 2, axis=1)
    return ranks


def _randomization(
    correlations: dict[str, Float[np.ndarray, " batch"]], count: int
) -> dict[str, Any]:
    """How maps agree with those of the shuffled networks, of which none may be the same."""
    sizes, highest = {}, 0.0
    for layer, values in correlations.items():
        sizes[layer], reach = _mean_and_reach(values)
        highest = max(highest, sizes[layer] + reach)
    return {
        "images": count,
        "rank_correlation": sizes,
        "passes": highest < _SAME if count >= MIN_IMAGES else None,
    }


class Curves:
    """Class probabilities of images as their pixels go and as they come back.

    Pixels go, the largest of a map first, to mean grey; they come back in the same order to a
    blurred image. (The paper's is blurred by 5 of 224 pixels, which leaves much to be seen.)
    What does not depend on the map, the ends of both curves, is computed once.
    """

    def __init__(self, predictor: Predictor, images: Images, classes: Classes):
        self._predictor, self._images, self._classes = predictor, images, classes
        mean = np.array(predictor.preprocessing.mean, np.float32)
        self._grey = np.broadcast_to(mean.round().astype(np.uint8), images.shape)
        sigma = _BLUR * min(images.shape[1:3])
        blurred = scipy.ndimage.gaussian_filter(
            images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest"
        )
        self._blurred = blurred.round().astype(np.uint8)
        self._of_whole, self._of_grey, self._of_blurred = (
            class_probabilities(predictor, ends, classes)
            for ends in (images, self._grey, self._blurred)
        )

    def areas(self, maps: Maps) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
        """The areas under the curves of deletion and of insertion, 0 to 1."""
        batch, height, width = maps.shape
        # Ties, such as pixels without any evidence, go by their place.
        order = np.argsort(-maps.reshape(batch, -1), axis=1, kind="stable")
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(height * width)[None], axis=1)
        place = place.reshape(batch, height, width, 1)
        areas = []
        for first, then, start, end in (
            (self._images, self._grey, self._of_whole, self._of_grey),
            (self._blurred, self._images, self._of_blurred, self._of_whole),
        ):
            curve = [start]
            for step in range(1, _STEPS):
                changed = np.where(place < step * height * width / _STEPS, then, first)
                curve.append(class_probabilities(self._predictor, changed, self._classes))
            curve.append(end)
            areas.append(np.trapezoid(np.stack(curve), dx=1 / _STEPS, axis=0))
        return areas[0], areas[1]


def class_probabilities(
    predictor: Predictor, images: Images, classes: Classes
) -> Float[np.ndarray, " batch"]:
    """The probability of one class for each image."""
    if not len(images):
        return np.empty(0)
    of_all = predict_pixels(predictor, images)
    return of_all[np.arange(len(images)), classes].astype(np.float64)


def hits(maps: Maps, masks: Bool[np.ndarray, "batch height width"]) -> Float[np.ndarray, " batch"]:
    """1 where a map's largest value lies on the object, else 0; a constant map points nowhere.

    If the largest value is at several pixels, the share of them that lie on it.
    """
    maps = maps.reshape(len(maps), -1)
    is_largest = maps == maps.max(axis=1, keepdims=True)
    is_largest &= np.ptp(maps, axis=1, keepdims=True) > 0
    on_object = (is_largest & masks.reshape(len(masks), -1)).sum(axis=1)
    return on_object / np.maximum(is_largest.sum(axis=1), 1)


def random_maps(n: int, size: tuple[int, int], seed: int = 0) -> Maps:
    """Maps of smooth noise, float32 [n, height, width]."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((n, _RANDOM_CELLS, _RANDOM_CELLS), np.float32)
    resize = jax.jit(jax.image.resize, static_argnums=(1, 2))
    return np.asarray(resize(coarse, (n, *size), "bilinear"))


def centre_maps(n: int, size: tuple[int, int]) -> Maps:
    """Maps that fall from the image's centre to its corners, float32 [n, height, width]."""
    rows, columns = (np.abs(np.arange(side) - (side - 1) / 2) / side for side in size)
    distance = np.hypot(rows[:, None], columns[None])
    centre = (distance.max() - distance).astype(np.float32)
    return np.repeat(centre[None], n, axis=0)
