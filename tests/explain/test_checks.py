import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from networks import random_variables
from test_maps import CLASSES, SIZE, make_predictor

from cnn_jax.data import no_track
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.explain import checks, maps
from cnn_jax.models.convnext import ConvNeXt
from cnn_jax.models.network import layer_names
from cnn_jax.models.vit import VisionTransformer


class BrightCorner:
    """A predictor whose probability of class 1 is the brightness of the top left quarter."""

    def __init__(self, size):
        self.class_names = ["dark", "bright"]
        self.preprocessing = Preprocessing(size, mean=(0.0, 0.0, 0.0))

    def __call__(self, images):
        height, width = self.preprocessing.image_size
        share = images[:, : height // 2, : width // 2].mean((1, 2, 3)) / 255
        return np.stack([1 - share, share], axis=1).astype(np.float32)


def test_areas_of_a_case_by_hand():
    predictor = BrightCorner((10, 10))
    images = np.full((1, 10, 10, 3), 200, np.uint8)
    corner = np.zeros((1, 10, 10), np.float32)
    corner[:, :5, :5] = 1
    one = np.array([1])
    deletion, insertion = checks.Curves(predictor, images, one).areas(corner)
    # Each step removes 10 of the 100 pixels, so the 25 pixels of the corner are removed in 3 steps.
    p = 200 / 255
    shares = np.array([1, 0.6, 0.2, 0, 0, 0, 0, 0, 0, 0, 0])
    assert deletion == pytest.approx(np.trapezoid(p * shares, dx=0.1), rel=1e-5)
    # A blur does not change a uniform image, so no step of the insertion changes the image.
    assert insertion == pytest.approx(p, rel=1e-5)
    elsewhere, _ = checks.Curves(predictor, images, one).areas(1 - corner)
    assert elsewhere > deletion + 0.3


def test_insertion_starts_with_a_blurred_image():
    predictor = BrightCorner((20, 20))
    images = np.zeros((1, 20, 20, 3), np.uint8)
    images[:, :10, :10] = 255
    corner = np.zeros((1, 20, 20), np.float32)
    corner[:, :10, :10] = 1
    one = np.array([1])
    _, first = checks.Curves(predictor, images, one).areas(corner)
    _, last = checks.Curves(predictor, images, one).areas(1 - corner)
    start = predictor(np.asarray(images * 0.0, np.uint8))[0, 1]
    assert start == 0
    assert 0.9 < first < 1
    assert last < first - 0.02


def test_rank_correlation_equals_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 4, 6, 5)).astype(np.float32)
    b[1], a[2] = a[1] ** 3, -b[2]
    a[3, :3] = 0  # These values are tied, so they share a mean rank.
    result = checks.rank_correlation(a, b)
    for x, y, value in zip(a, b, result, strict=True):
        assert value == pytest.approx(scipy.stats.spearmanr(x.ravel(), y.ravel()).statistic)
    assert result[1] == pytest.approx(1)
    assert result[2] == pytest.approx(-1)
    assert checks.rank_correlation(0 * a, b).tolist() == [0, 0, 0, 0]
    assert checks.rank_correlation(0 * a, 0 * b + 2).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_maps_that_ignore_the_last_layer_fail_the_randomization(sign, monkeypatch):
    """Maps that ignore the last layer fail, because the check shuffles the last layer first."""
    predictor = make_predictor()
    images = np.random.default_rng(1).integers(0, 256, (10, *SIZE, 3), np.uint8)
    classes = np.zeros(10, np.int32)

    def method(shuffled, images, classes):
        return _edges(shuffled, images, classes) * (1 if shuffled is predictor else sign)

    def first_layer(shuffled, images, classes):
        weight = abs(float(shuffled.variables["params"]["conv1"]["kernel"][0, 0, 0, 0]))
        order = np.random.default_rng(int(1e6 * weight)).permutation(SIZE[0] * SIZE[1])
        pixels = images.reshape(len(images), -1, 3)[:, order].mean(axis=-1)
        return pixels.reshape(-1, *SIZE).astype(np.float32)

    def zeros(shuffled, images, classes):
        return np.zeros((len(images), *SIZE), np.float32)

    judged = {"method": method, "first_layer": first_layer, "zeros": zeros}
    monkeypatch.setattr(checks, "methods_for", lambda predictor: judged)
    result = checks.judge(predictor, images, classes)
    assert result.keys() == judged.keys()
    for verdict in result.values():
        assert verdict["randomization"]["passes"] is False


def test_each_image_has_a_shuffle_of_its_own():
    """All images have the same maps here, so the correlations differ because of the shuffles."""
    predictor = make_predictor()
    images = np.zeros((40, *SIZE, 3), np.uint8)

    def method(shuffled, images, classes):
        head = np.ravel(shuffled.variables["params"]["head"]["kernel"])
        return np.resize(head, (len(images), *SIZE)).astype(np.float32)

    own = {"method": method(predictor, images, None)}
    judged = {"method": method}
    arguments = images, np.zeros(40, np.int32), own, judged
    found = checks._correlations(predictor, *arguments, seed=0, track=no_track)["method"]
    assert list(found) == layer_names(predictor.model, SIZE)[::-1]
    assert len(found["head"]) == 32
    assert len(set(found["head"])) > 16
    # The later shuffles keep the head of the first shuffle.
    assert found["conv1"] == found["head"]
    assert checks._correlations(predictor, *arguments, seed=1, track=no_track)["method"] != found


@pytest.mark.parametrize("size", [(64, 48), (65, 48), (224, 130)])
def test_correlations_of_large_maps_use_a_grid_of_pixels(size):
    rows, columns = np.indices(size)
    large = (rows + 3 * columns)[None].astype(np.float32)
    small = checks._thin_out(large)
    step = -(-max(size) // 64)
    np.testing.assert_array_equal(small[0], large[0, ::step, ::step])
    assert max(small.shape) <= 64


def test_hits_by_hand():
    mask = np.array([[[True, False], [False, False]]])
    for values, expected in (
        ([[3, 1], [0, 0]], 1),
        ([[1, 3], [0, 0]], 0),
        ([[3, 3], [0, 0]], 0.5),
        ([[2, 2], [2, 2]], 0),
    ):
        assert checks.hits(np.array([values], np.float32), mask) == expected


def test_shuffling_permutes_the_values_of_the_named_layers_only():
    variables = make_predictor().variables
    shuffled = checks.shuffle_layers(variables, ["head", "conv2"])
    for name, layer in variables["params"].items():
        for key, array in layer.items():
            result = np.asarray(shuffled["params"][name][key])
            assert np.array_equal(result, array) == (name not in ("head", "conv2"))
            np.testing.assert_array_equal(np.sort(result.ravel()), np.sort(np.ravel(array)))
    np.testing.assert_array_equal(
        shuffled["batch_stats"]["norm1"]["mean"], variables["batch_stats"]["norm1"]["mean"]
    )


def test_layer_names_start_at_the_image():
    model = make_predictor().model
    assert layer_names(model, SIZE) == ["conv1", "norm1", "conv2", "norm2", "dense", "head"]


def test_layers_are_shuffled_one_after_another():
    predictor = make_predictor()
    layers = layer_names(predictor.model, SIZE)
    shuffled = dict(checks._shuffled_predictors(predictor, layers, seed=0))
    order = ["head", "dense", "norm2", "conv2", "norm1", "conv1"]
    assert list(shuffled) == order
    for i, name in enumerate(order):
        params = shuffled[name].variables["params"]
        changed = {
            layer
            for layer, arrays in predictor.variables["params"].items()
            if any(not np.array_equal(params[layer][key], array) for key, array in arrays.items())
        }
        assert changed == set(order[: i + 1])


def _edges(predictor, images, classes):
    """An explanation method whose map depends only on the image, not on the network."""
    grey = images.astype(np.float32).mean(-1)
    return np.hypot(*np.gradient(grey, axis=(1, 2))).astype(np.float32)


@pytest.fixture(scope="module")
def judged():
    predictor = make_predictor()
    images = np.random.default_rng(1).integers(0, 256, (10, *SIZE, 3), np.uint8)
    classes = np.resize(CLASSES, 10)
    masks = np.zeros((10, *SIZE), bool)
    masks[:, 2:5, 2:5] = True
    allowed = maps.methods_for
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            checks, "methods_for", lambda predictor: allowed(predictor) | {"edges": _edges}
        )
        return checks.judge(predictor, images, classes, masks, ["grad_cam", "edges"])


def test_a_method_that_ignores_the_weights_fails_the_randomization(judged):
    edges = judged["edges"]["randomization"]
    assert list(edges["rank_correlation"].values()) == pytest.approx([1] * 6)
    assert edges["passes"] is False
    correlations = judged["grad_cam"]["randomization"]["rank_correlation"].values()
    assert max(correlations) < max(edges["rank_correlation"].values())
    order = ["head", "dense", "norm2", "conv2", "norm1", "conv1"]
    assert list(judged["grad_cam"]["randomization"]["rank_correlation"]) == order


def test_a_verdict_in_words_names_all_checks(judged):
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    words = checks.describe(judged["edges"])
    assert "fails " in words
    assert "randomization" in words.split("fails ")[1]
    for check in ("randomization", "deletion", "insertion", "pointing game"):
        assert check in words
    assert judged["edges"]["pointing_game"]["random"] == pytest.approx(9 / (16 * 12))


def test_a_check_needs_significant_differences_from_both_rivals():
    rng = np.random.default_rng(0)
    better, worse = rng.normal(1, 0.1, 20), rng.normal(0, 0.1, 20)
    assert checks._compare(better, {"a": worse, "b": worse}, 1)["passes"] is True
    assert checks._compare(better, {"a": worse, "b": worse}, -1)["passes"] is False
    assert checks._compare(better, {"a": worse, "b": better}, 1)["passes"] is False
    assert checks._compare(worse, {"a": better}, -1)["passes"] is True
    doubtful = better + rng.normal(0.01, 1, 20)
    assert checks._compare(doubtful, {"a": better}, 1)["passes"] is False
    result = checks._compare(better, {"a": worse}, 1)
    difference = better - worse
    low, high = result["difference_from_a"]
    assert (low + high) / 2 == pytest.approx(difference.mean())
    expected = 1.96 * difference.std(ddof=1) / np.sqrt(20)
    assert (high - low) / 2 == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 7])
def test_few_images_give_no_verdict(n):
    images = np.random.default_rng(1).integers(0, 256, (n, *SIZE, 3), np.uint8)
    predictor = make_predictor()
    result = checks.judge(predictor, images, np.zeros(n, np.int32), methods=["layer_cam"])
    assert {check["passes"] for check in result["layer_cam"].values()} == {None}
    assert checks.describe(result["layer_cam"]) == "no verdict"
    assert "at least 8 images" in checks.why_no_verdict(n)
    assert checks.why_no_verdict(8) == ""
    json.dumps(result, allow_nan=False)


def test_rival_maps_are_random_and_central():
    centre = checks.centre_maps(2, (5, 7))
    assert np.unravel_index(centre[0].argmax(), (5, 7)) == (2, 3)
    assert centre[0].min() == centre[0, 0, 0] == 0
    random = checks.random_maps(2, (32, 16))
    assert random.shape == (2, 32, 16)
    assert not np.allclose(random[0], random[1])
    np.testing.assert_array_equal(random, checks.random_maps(2, (32, 16)))


def test_methods_that_share_a_gradient_keep_their_maps():
    predictor = make_predictor()
    images = np.random.default_rng(1).integers(0, 256, (5, *SIZE, 3), np.uint8)
    classes = np.resize(CLASSES, 5)
    result = maps.maps_by_method(predictor, images, classes, maps.methods_for(predictor))
    for name, method in maps.methods_for(predictor).items():
        np.testing.assert_allclose(result[name], method(predictor, images, classes), atol=1e-5)


def test_the_deletion_curve_equals_a_computation_without_shared_ends():
    """`Curves` computes shared end points once; the test computes each curve completely."""
    predictor = make_predictor()
    images = np.random.default_rng(2).integers(0, 256, (3, *SIZE, 3), np.uint8)
    classes = np.resize(CLASSES, 3)
    heat = np.random.default_rng(3).random((3, *SIZE), np.float32)
    grey = np.round(predictor.preprocessing.mean).astype(np.uint8)
    ranks = scipy.stats.rankdata(-heat.reshape(3, -1), axis=1, method="ordinal").reshape(heat.shape)
    probabilities = []
    for step in range(11):
        gone = ranks - 1 < step * heat[0].size / 10  # The ranks of SciPy start at 1.
        changed = np.where(gone[..., None], grey, images)
        probabilities.append(predictor(changed)[np.arange(3), classes])
    expected = np.trapezoid(np.stack(probabilities), dx=0.1, axis=0)
    area, _ = checks.Curves(predictor, images, classes).areas(heat)
    np.testing.assert_allclose(area, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (ConvNeXt(num_classes=3, blocks=(1, 1), features=(6, 8)), (16, 24)),
        (VisionTransformer(num_classes=3, features=12, depth=3, heads=2), (28, 42)),
    ],
)
def test_networks_without_relu_can_be_judged(network, size):
    predictor = make_predictor()
    predictor.preprocessing = dataclasses.replace(predictor.preprocessing, image_size=size)
    predictor.model = network
    predictor.variables = random_variables(network, jnp.zeros((1, *size, 3)))
    images = np.random.default_rng(0).integers(0, 256, (8, *size, 3), np.uint8)
    classes = np.arange(8, dtype=np.int32) % 3
    methods = ("grad_cam", "grad_cam_plus_plus", "layer_cam")
    found = maps.maps_by_method(
        predictor, images, classes, {name: maps.METHODS[name] for name in methods}
    )
    for name, verdict in checks.judge(predictor, images, classes, methods=methods).items():
        assert found[name].any(axis=(1, 2)).mean() > 0.5
        assert (found[name] >= 0).all()
        correlations = verdict["randomization"]["rank_correlation"]
        assert list(correlations) == layer_names(network, size)[::-1]
        assert correlations["head"] < 0.99
    assert "cam" not in maps.methods_for(predictor)
