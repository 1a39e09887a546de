"""Checks of the saliency-map methods in `maps`: experiments that a good method passes.

- Randomization (Adebayo et al. 2018): the weights are shuffled layer by layer, starting with the
  last one. A map that explains what the network has learned must change with the first shuffled
  layer, and must stay different. Each image has its own shuffle, because all maps of one
  shuffled network can be similar to the original maps by chance.
- Deletion and insertion (Petsiuk et al. 2018): the pixels of an image are removed, or inserted,
  in decreasing order of the map's values. The area under the curve of the class's probability
  must be smaller (deletion), or larger (insertion), than with a random map and than with a map
  that decreases from the image's centre.
- The pointing game (Zhang et al. 2018), for images with a mask of the object: the largest value
  of the map must lie on the object more often than the image's centre and than a random pixel.

A method passes deletion, insertion and the pointing game if it is better than the alternatives on
average over the images, and the 95 % confidence interval of the mean difference (normal
approximation) excludes 0.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, PyTree

from cnn_jax.data import Track, no_track
from cnn_jax.explain.maps import Classes, Images, Maps, Method, maps_by_method, methods_for
from cnn_jax.inference.predictor import BundlePredictor, Predictor, predict_versions
from cnn_jax.models.network import layer_names

# With fewer than MIN_IMAGES images, no method passes or fails. Only the pointing game, which is
# fast, uses more than MAX_IMAGES images. Randomization uses at most _MAX_SHUFFLES images, because
# it applies a shuffled network to each single image.
MIN_IMAGES, MAX_IMAGES = 8, 64
_MAX_SHUFFLES = 32
# Two maps count as equal if their rank correlation (Spearman) is at least this value.
_EQUAL = 0.5
# The rank correlation is computed from a grid with at most this many rows and columns of pixels,
# because ranking all pixels of an image of 224 x 224 pixels takes as long as the network.
_RANKED_SIDE = 64
# The number of steps of deletion and insertion. Each step changes another 1/_STEPS of the pixels.
_STEPS = 10
# The number of cells along each side of a random map. With 8 cells, a random map is as smooth as a
# small feature map.
_RANDOM_CELLS = 8
# The standard deviation of the blur at the start of insertion, as a fraction of the shorter side of
# the image.
_BLUR = 0.1
# The significance level of the test that a network is better than guessing. The report uses the
# same level.
_SIGNIFICANCE = 0.025


def judge(
    predictor: BundlePredictor,
    images: Images,
    classes: Classes,
    masks: Bool[np.ndarray, "batch height width"] | None = None,
    methods: Sequence[str] | None = None,
    seed: int = 0,
    track: Track = no_track,
) -> dict[str, Any]:
    """Runs the checks of this module for saliency-map methods on images.

    Args:
      predictor: A loaded bundle.
      images: uint8 [batch, height, width, 3] of the predictor's size, in random order. All
        checks use the first 64 images, and randomization the first 32; only the pointing game
        uses the remaining images.
      classes: The class to explain for each image, for example the predicted class.
      masks: True on the object; without masks there is no pointing game.
      methods: Names of methods; by default all methods that work for the network.
      seed: Seed of the shuffles and of the random maps.
      track: Shows progress.

    Returns:
      {method: {"randomization": {...}, "deletion": {...}, "insertion": {...},
      "pointing_game": {...}}}. Each check has its measured values, the number of "images", and
      "passes": True, False, or None with fewer than `MIN_IMAGES` images. All values
      have JSON types and are finite.
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
    rival_areas = {name: curves.areas(maps) for name, maps in rivals.items()}
    own_maps = maps_by_method(predictor, images, classes, chosen)
    correlations = _correlations(predictor, images, classes, own_maps, chosen, seed, track)
    other_maps = {}
    if masks is not None:
        others = all_images[MAX_IMAGES:], all_classes[MAX_IMAGES:]
        other_maps = maps_by_method(predictor, *others, chosen)
    verdicts = {}
    for name, maps in own_maps.items():
        deletion, insertion = curves.areas(maps)
        verdict = {
            "randomization": _randomization(correlations[name]),
            "deletion": _compare(
                deletion, {rival: areas[0] for rival, areas in rival_areas.items()}, -1
            ),
            "insertion": _compare(
                insertion, {rival: areas[1] for rival, areas in rival_areas.items()}, 1
            ),
        }
        if masks is not None:
            centre = centre_maps(len(masks), masks.shape[1:])
            verdict["pointing_game"] = _compare(
                hits(np.concatenate([maps, other_maps[name]]), masks),
                {"random": masks.mean(axis=(1, 2)), "centre": hits(centre, masks)},
                1,
            )
        verdicts[name] = verdict
    return verdicts


def describe(verdict: dict[str, Any]) -> str:
    """Returns the names of the passed and failed checks of a method as text, or "no verdict"."""
    checks: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for check, result in verdict.items():
        checks[result["passes"]].append(check.replace("_", " "))
    if checks[None]:
        return "no verdict"
    words = []
    if checks[True]:
        words.append("passes " + ", ".join(checks[True]))
    if checks[False]:
        words.append("fails " + ", ".join(checks[False]))
    return "; ".join(words)


def withhold(verdicts: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Sets "passes" to None in all checks of the verdicts that `judge` returned.

    Callers use it if there is a reason why no method can pass or fail.
    """
    for verdict in verdicts.values():
        for check in verdict.values():
            check["passes"] = None


def why_no_verdict(count: int) -> str:
    """Returns the reason why `count` images are too few for the checks; "" if they are enough."""
    if count >= MIN_IMAGES:
        return ""
    return f"No verdict on the methods: that takes at least {MIN_IMAGES} images."


def why_nothing_to_explain(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the reason for giving no verdict if the network may only be guessing; else "".

    The maps of a network that has learned nothing may still depend on its weights and pass the
    checks, although there is nothing to explain.

    Args:
      metrics: The metrics of a bundle, by split.

    Returns:
      A sentence; empty if the network is better than guessing on test images, or on validation
      images if the bundle has no test metrics.
    """
    split = next((metrics[name] for name in ("test", "validation") if name in metrics), {})
    p_value = split.get("agreement_p_value")
    if p_value is None:
        return (
            "No verdict on the methods: the bundle does not say whether the network is better "
            "than guessing."
        )
    if p_value >= _SIGNIFICANCE:
        return (
            "No verdict on the methods: the network is not shown to be better than guessing, so "
            "there is nothing that its maps could explain."
        )
    return ""


def _mean_and_margin(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Returns the mean of values, and half the width of the mean's 95 % confidence interval.

    The interval is a normal approximation.
    """
    n = len(values)
    margin = 1.96 * float(values.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    return (float(values.mean()) if n else 0.0), float(margin)


def _compare(
    scores: Float[np.ndarray, " n"], rivals: dict[str, Float[np.ndarray, " n"]], better: int
) -> dict[str, Any]:
    """Compares a method's scores with the scores of baseline maps on the same images.

    Args:
      scores: One score for each image.
      rivals: For each kind of baseline maps, such as random maps, one score for each image.
      better: 1 if a larger score is better, -1 if a smaller one is.

    Returns:
      "images"; "mean"; for each baseline its mean and "difference_from_NAME", the 95 %
      confidence interval of the mean difference; and "passes".
    """
    result: dict[str, Any] = {"images": len(scores), "mean": _mean_and_margin(scores)[0]}
    passes = True
    for rival, rival_scores in rivals.items():
        difference, margin = _mean_and_margin(scores - rival_scores)
        result[rival] = _mean_and_margin(rival_scores)[0]
        result[f"difference_from_{rival}"] = [difference - margin, difference + margin]
        passes &= bool(better * difference - margin > 0)
    return result | {"passes": passes if len(scores) >= MIN_IMAGES else None}


def shuffle_layers(variables: PyTree, layers: Sequence[str], seed: int = 0) -> PyTree:
    """Returns a copy of a network's variables in which some layers have shuffled parameters.

    The values are permuted within each parameter array.

    Args:
      variables: The variables of a network.
      layers: Names of layers in `variables["params"]`.
      seed: Seed of the shuffles.

    Returns:
      New variables; the other layers and the statistics are unchanged.
    """

    def shuffle(path: tuple, leaf: Any) -> Any:
        names = [entry.key for entry in path]
        if names[0] != "params" or names[1] not in layers:
            return leaf
        numbers = np.asarray(leaf)
        rng = np.random.default_rng([seed, *"/".join(names).encode()])
        return rng.permutation(numbers.ravel()).reshape(numbers.shape)

    return jax.tree.map_with_path(shuffle, variables)


def _shuffled_predictors(
    predictor: BundlePredictor, layers: Sequence[str], seed: int
) -> Iterator[tuple[str, BundlePredictor]]:
    """Yields copies of a predictor with a growing number of shuffled layers.

    The first copy has only its last layer shuffled. In each further copy, one more of the preceding
    layers is shuffled.

    Args:
      predictor: A loaded bundle.
      layers: The names of the layers from the first to the last.
      seed: Seed of the shuffles.

    Yields:
      The name of the layer that was shuffled last, and the copy.
    """
    variables = predictor.variables
    for name in reversed(layers):
        variables = jax.device_put(shuffle_layers(variables, [name], seed))
        changed = copy.copy(predictor)
        changed.variables = variables
        yield name, changed


def _correlations(
    predictor: BundlePredictor,
    images: Images,
    classes: Classes,
    own_maps: Mapping[str, Maps],
    methods: Mapping[str, Method],
    seed: int,
    track: Track,
) -> dict[str, dict[str, list[float]]]:
    """Compares the maps of images with the maps of shuffled networks.

    Image i is given to the networks that are shuffled with `seed` + i.

    Returns:
      For each method and each layer, the absolute rank correlation of each image. The sign is
      ignored, so a map and its negation are treated as equal.
    """
    found: dict[str, dict[str, list[float]]] = {name: {} for name in methods}
    layers = layer_names(predictor.model, predictor.preprocessing.image_size)
    count = min(len(images), _MAX_SHUFFLES)
    for row in track(range(count), "checking", count):
        image = slice(row, row + 1)
        for layer, shuffled in _shuffled_predictors(predictor, layers, seed + row):
            maps = maps_by_method(shuffled, images[image], classes[image], methods)
            for name, own in own_maps.items():
                (correlation,) = rank_correlation(*map(_thin_out, (own[image], maps[name])))
                found[name].setdefault(layer, []).append(abs(float(correlation)))
    return found


def _thin_out(maps: Maps) -> Float[np.ndarray, "batch rows columns"]:
    """Returns the pixels on a grid with at most `_RANKED_SIDE` rows and columns."""
    step = -(-max(maps.shape[1:]) // _RANKED_SIDE)
    return maps[:, ::step, ::step]


def rank_correlation(a: Maps, b: Maps) -> Float[np.ndarray, " batch"]:
    """Returns Spearman's rank correlation between the maps of each image in `a` and in `b`.

    The correlation counts as 0 if only one of the two maps is constant, and as 1 if both are.
    """
    # This module takes half a second to import, and explanations without checks do not need it.
    import scipy.stats

    ranks = [scipy.stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (a, b)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    scale = np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    are_constant = ~(x.any(axis=1) | y.any(axis=1))
    return np.divide((x * y).sum(axis=1), scale, out=are_constant.astype(float), where=scale > 0)


def _randomization(correlations: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Computes the result of the randomization check from the correlations between maps.

    The check passes if every shuffled network gives other maps than the trained network.

    Args:
      correlations: For each layer, and for each image, the absolute rank correlation between
        the maps of the trained network and of the network shuffled down to this layer.
    """
    means, highest, count = {}, 0.0, 0
    for layer, values in correlations.items():
        count = len(values)
        means[layer], margin = _mean_and_margin(np.array(values))
        highest = max(highest, means[layer] + margin)
    return {
        "images": count,
        "rank_correlation": means,
        "passes": highest < _EQUAL if count >= MIN_IMAGES else None,
    }


class Curves:
    """The curves of the class probability in the deletion and insertion checks.

    Deletion replaces pixels by mean grey, in decreasing order of the map's values. Insertion
    starts with a blurred image and restores its pixels in the same order. (The paper blurs by 5
    of 224 pixels, which leaves most objects recognisable; `_BLUR` is stronger.) The first and the
    last point of both curves do not depend on the map and are computed once.

    Args:
      predictor: A loaded bundle or any other predictor.
      images: Images of the predictor's size.
      classes: The class of each image whose probability is measured.
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
        self._image_scores, self._grey_scores, self._blurred_scores = self._scores(
            [images, self._grey, self._blurred]
        )

    def areas(self, maps: Maps) -> tuple[Float[np.ndarray, " batch"], Float[np.ndarray, " batch"]]:
        """Returns the areas under the deletion and insertion curves of each image, 0 to 1."""
        batch, height, width = maps.shape
        # Pixels with equal map values, such as 0, are changed row by row.
        order = np.argsort(-maps.reshape(batch, -1), axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(height * width)[None], axis=1)
        rank = rank.reshape(batch, height, width, 1)
        changed = (
            np.where(rank < step * height * width / _STEPS, after, before)
            for before, after in ((self._images, self._grey), (self._blurred, self._images))
            for step in range(1, _STEPS)
        )
        scores = self._scores(changed)
        deletion = [self._image_scores, *scores[: _STEPS - 1], self._grey_scores]
        insertion = [self._blurred_scores, *scores[_STEPS - 1 :], self._image_scores]
        first, second = (
            np.trapezoid(np.stack(curve), dx=1 / _STEPS, axis=0) for curve in (deletion, insertion)
        )
        return first, second

    def _scores(self, versions: Iterable[Images]) -> Float[np.ndarray, "versions batch"]:
        """Returns the probability of its class for each image, in several versions."""
        probabilities = predict_versions(self._predictor, versions)
        return probabilities[:, np.arange(len(self._classes)), self._classes].astype(np.float64)


def hits(maps: Maps, masks: Bool[np.ndarray, "batch height width"]) -> Float[np.ndarray, " batch"]:
    """Returns 1 for each map whose largest value lies on the object, else 0.

    Args:
      maps: One map for each image.
      masks: True on the object.

    Returns:
      1 or 0 for each map; if several pixels have the largest value, the fraction of them that
      lie on the object. A constant map gets 0.
    """
    maps = maps.reshape(len(maps), -1)
    is_largest = maps == maps.max(axis=1, keepdims=True)
    is_largest &= np.ptp(maps, axis=1, keepdims=True) > 0
    on_object = (is_largest & masks.reshape(len(masks), -1)).sum(axis=1)
    return on_object / np.maximum(is_largest.sum(axis=1), 1)


def random_maps(n: int, size: tuple[int, int], seed: int = 0) -> Maps:
    """Returns maps of smooth random noise, float32 [n, height, width]."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((n, _RANDOM_CELLS, _RANDOM_CELLS), np.float32)
    resize = jax.jit(jax.image.resize, static_argnums=(1, 2))
    return np.asarray(resize(coarse, (n, *size), "bilinear"))


def centre_maps(n: int, size: tuple[int, int]) -> Maps:
    """Returns maps that decrease from the centre to the corners, float32 [n, height, width]."""
    rows, columns = (np.abs(np.arange(side) - (side - 1) / 2) / side for side in size)
    distance = np.hypot(rows[:, None], columns[None])
    centre = (distance.max() - distance).astype(np.float32)
    return np.repeat(centre[None], n, axis=0)
