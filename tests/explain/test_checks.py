import json

import numpy as np
import pytest
import scipy.stats
from test_maps import CLASSES, SIZE, make_predictor

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.explain import checks, maps
from cnn_jax.inference.predictor import Predictor
from cnn_jax.models.network import layer_names


class BrightCorner(Predictor):
    """Class 1 is as probable as the upper left quarter is bright; nothing else counts."""

    def __init__(self, size):
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
    # Of steps of a tenth of 100 pixels: 10, 20 and then all 25 of the corner are gone.
    p = 200 / 255
    shares = np.array([1, 0.6, 0.2, 0, 0, 0, 0, 0, 0, 0, 0])
    assert deletion == pytest.approx(np.trapezoid(p * shares, dx=0.1), rel=1e-5)
    # The blurred image of a flat one is the same, so that nothing comes back.
    assert insertion == pytest.approx(p, rel=1e-5)
    elsewhere, _ = checks.Curves(predictor, images, one).areas(1 - corner)
    assert elsewhere > deletion + 0.3


def test_insertion_begins_with_a_blurred_image_and_ends_with_the_image():
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


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 4, 6, 5)).astype(np.float32)
    b[1], a[2] = a[1] ** 3, -b[2]
    a[3, :3] = 0  # Ties.
    found = checks.rank_correlation(a, b)
    for x, y, value in zip(a, b, found, strict=True):
        assert value == pytest.approx(scipy.stats.spearmanr(x.ravel(), y.ravel()).statistic)
    assert found[1] == pytest.approx(1)
    assert found[2] == pytest.approx(-1)
    assert checks.rank_correlation(0 * a, b).tolist() == [0, 0, 0, 0]
    assert checks.rank_correlation(0 * a, 0 * b + 2).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_maps_that_are_only_inverted_or_follow_the_first_layers_have_not_changed(sign, monkeypatch):
    """The class's weights are shuffled first, and these maps do not depend on them."""
    predictor = make_predictor()
    images = np.random.default_rng(1).integers(0, 256, (10, *SIZE, 3), np.uint8)
    classes = np.zeros(10, np.int32)

    def method(shuffled, images, classes):
        return _edges(shuffled, images, classes) * (1 if shuffled is predictor else sign)

    def of_the_first_layer(shuffled, images, classes):
        weight = abs(float(shuffled.variables["params"]["conv1"]["kernel"][0, 0, 0, 0]))
        order = np.random.default_rng(int(1e6 * weight)).permutation(SIZE[0] * SIZE[1])
        pixels = images.reshape(10, -1, 3)[:, order].mean(axis=-1)
        return pixels.reshape(10, *SIZE).astype(np.float32)

    def zeros(*_):
        return np.zeros((10, *SIZE), np.float32)

    judged = {"method": method, "of_the_first_layer": of_the_first_layer, "zeros": zeros}
    monkeypatch.setattr(checks, "methods_for", lambda predictor: judged)
    found = checks.judge(predictor, images, classes)
    assert found.keys() == judged.keys()
    for verdict in found.values():
        assert verdict["randomization"]["passes"] is False


def test_hits_by_hand():
    mask = np.array([[[True, False], [False, False]]])
    for values, expected in (
        ([[3, 1], [0, 0]], 1),
        ([[1, 3], [0, 0]], 0),
        ([[3, 3], [0, 0]], 0.5),
        ([[2, 2], [2, 2]], 0),
    ):
        assert checks.hits(np.array([values], np.float32), mask) == expected


def test_shuffling_changes_the_named_layers_alone_and_keeps_their_numbers():
    variables = make_predictor().variables
    shuffled = checks.shuffle_layers(variables, ["head", "conv2"])
    for name, layer in variables["params"].items():
        for key, array in layer.items():
            found = np.asarray(shuffled["params"][name][key])
            assert np.array_equal(found, array) == (name not in ("head", "conv2"))
            np.testing.assert_array_equal(np.sort(found.ravel()), np.sort(np.ravel(array)))
    np.testing.assert_array_equal(
        shuffled["batch_stats"]["norm1"]["mean"], variables["batch_stats"]["norm1"]["mean"]
    )


def test_layers_are_named_from_the_image_to_the_logits():
    model = make_predictor().model
    assert layer_names(model, SIZE) == ["conv1", "norm1", "conv2", "norm2", "dense", "head"]


def test_ever_more_layers_are_shuffled():
    predictor = make_predictor()
    shuffled = checks._shuffled_predictors(predictor, seed=0)
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
    """A method that looks at the image alone."""
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


def test_a_method_that_sees_no_weights_fails_the_randomization(judged):
    edges = judged["edges"]["randomization"]
    assert list(edges["rank_correlation"].values()) == pytest.approx([1] * 6)
    assert edges["passes"] is False
    of_grad_cam = judged["grad_cam"]["randomization"]["rank_correlation"].values()
    assert max(of_grad_cam) < max(edges["rank_correlation"].values())
    order = ["head", "dense", "norm2", "conv2", "norm1", "conv1"]
    assert list(judged["grad_cam"]["randomization"]["rank_correlation"]) == order


def test_a_verdict_has_all_checks_and_says_them_in_words(judged):
    assert json.loads(json.dumps(judged, allow_nan=False)) == judged
    words = checks.describe(judged["edges"])
    assert "fails " in words
    assert "randomization" in words.split("fails ")[1]
    for check in ("randomization", "deletion", "insertion", "pointing game"):
        assert check in words
    assert judged["edges"]["pointing_game"]["random"] == pytest.approx(9 / (16 * 12))


def test_a_check_is_passed_against_both_rivals_and_beyond_doubt():
    rng = np.random.default_rng(0)
    better, worse = rng.normal(1, 0.1, 20), rng.normal(0, 0.1, 20)
    assert checks._against(better, {"a": worse, "b": worse}, 1)["passes"] is True
    assert checks._against(better, {"a": worse, "b": worse}, -1)["passes"] is False
    assert checks._against(better, {"a": worse, "b": better}, 1)["passes"] is False
    assert checks._against(worse, {"a": better}, -1)["passes"] is True
    doubtful = better + rng.normal(0.01, 1, 20)
    assert checks._against(doubtful, {"a": better}, 1)["passes"] is False
    found = checks._against(better, {"a": worse}, 1)
    difference = better - worse
    low, high = found["difference_from_a"]
    assert (low + high) / 2 == pytest.approx(difference.mean())
    expected = 1.96 * difference.std(ddof=1) / np.sqrt(20)
    assert (high - low) / 2 == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 7])
def test_few_images_leave_the_verdict_open(n):
    images = np.random.default_rng(1).integers(0, 256, (n, *SIZE, 3), np.uint8)
    predictor = make_predictor()
    found = checks.judge(predictor, images, np.zeros(n, np.int32), methods=["layer_cam"])
    assert {result["passes"] for result in found["layer_cam"].values()} == {None}
    assert checks.describe(found["layer_cam"]) == "no verdict"
    assert "at least 8 images" in checks.why_no_verdict(n)
    assert checks.why_no_verdict(8) == ""
    json.dumps(found, allow_nan=False)


def test_rivals_are_what_their_names_say():
    centre = checks.centre_maps(2, (5, 7))
    assert np.unravel_index(centre[0].argmax(), (5, 7)) == (2, 3)
    assert centre[0].min() == centre[0, 0, 0] == 0
    random = checks.random_maps(2, (32, 16))
    assert random.shape == (2, 32, 16)
    assert not np.allclose(random[0], random[1])
    np.testing.assert_array_equal(random, checks.random_maps(2, (32, 16)))


@pytest.mark.parametrize("levels", [2, 10, 10**6])
def test_mean_ranks_are_those_of_scipy(levels):
    values = np.random.default_rng(levels).integers(0, levels, (5, 40)).astype(np.float32)
    expected = scipy.stats.rankdata(values, axis=1) - 1
    np.testing.assert_array_equal(checks.mean_ranks(values), expected)


def test_methods_that_share_a_gradient_have_the_maps_that_they_have_alone():
    predictor = make_predictor()
    images = np.random.default_rng(1).integers(0, 256, (5, *SIZE, 3), np.uint8)
    classes = np.resize(CLASSES, 5)
    found = maps.maps_by_method(predictor, images, classes, maps.methods_for(predictor))
    for name, method in maps.methods_for(predictor).items():
        np.testing.assert_allclose(found[name], method(predictor, images, classes), atol=1e-5)


def test_the_ends_of_deletion_and_insertion_do_not_depend_on_the_map():
    """The curves by hand: every step is predicted, the shared ends too."""
    predictor = make_predictor()
    images = np.random.default_rng(2).integers(0, 256, (3, *SIZE, 3), np.uint8)
    classes = np.resize(CLASSES, 3)
    heat = np.random.default_rng(3).random((3, *SIZE), np.float32)
    grey = np.round(predictor.preprocessing.mean).astype(np.uint8)
    ranks = scipy.stats.rankdata(-heat.reshape(3, -1), axis=1, method="ordinal").reshape(heat.shape)
    probabilities = []
    for step in range(11):
        gone = ranks - 1 < step * heat[0].size / 10  # Ranks begin with 1.
        changed = np.where(gone[..., None], grey, images)
        probabilities.append(predictor(changed)[np.arange(3), classes])
    expected = np.trapezoid(np.stack(probabilities), dx=0.1, axis=0)
    area, _ = checks.Curves(predictor, images, classes).areas(heat)
    np.testing.assert_allclose(area, expected, atol=1e-5)
