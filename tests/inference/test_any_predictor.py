"""Tests of prediction, evaluation and robustness with predictors that are not bundles."""

import csv

import numpy as np
import pytest

from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.splits import Division
from cnn_jax.explain import features
from cnn_jax.inference.evaluation import evaluate
from cnn_jax.inference.images import preprocess_for_inference
from cnn_jax.inference.predictor import Predictor, predict_batch, predict_pixels
from cnn_jax.predict import write_predictions
from cnn_jax.quality.robustness import measure, measure_split


class MeanColour:
    """A predictor whose predicted class is the colour channel with the largest mean."""

    def __init__(self):
        self.class_names = ["red", "green", "blue"]
        self.preprocessing = Preprocessing(image_size=(8, 8))

    def __call__(self, images):
        means = images.mean(axis=(1, 2)) + 1
        return (means / means.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def dataset(image_folder):
    preprocessing = MeanColour().preprocessing
    return open_dataset(open_folder(image_folder), Division(rule="exact"), preprocessing)


def test_a_hand_written_predictor_fulfils_the_protocol():
    assert isinstance(MeanColour(), Predictor)
    assert not isinstance(lambda images: images, Predictor)


def test_files_and_arrays_are_predicted(image_folder):
    paths = sorted(image_folder.rglob("*.png"))
    predictions = predict_batch(MeanColour(), paths)
    assert [prediction.predicted for prediction in predictions] == [p.parent.name for p in paths]
    pixels = np.stack([preprocess_for_inference(p, MeanColour().preprocessing) for p in paths])
    probabilities = predict_pixels(MeanColour(), pixels)
    np.testing.assert_array_equal([p.probabilities for p in predictions], probabilities)
    assert predict_pixels(MeanColour(), pixels[:0]).shape == (0, 3)


def test_the_csv_has_its_classes(image_folder, tmp_path):
    paths = sorted(image_folder.rglob("*.png"))
    with (tmp_path / "out.csv").open("w") as file:
        assert write_predictions(MeanColour(), paths, file, top=2) == 0
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == [path.parent.name for path in paths]


@pytest.mark.parametrize("split", ["test", "all"])
def test_a_split_is_evaluated_without_warnings_about_training(dataset, split, caplog):
    """A predictor without a record of its training data causes no warning about other data."""
    metrics = evaluate(MeanColour(), dataset, split)
    assert metrics["accuracy"] == 1
    assert not caplog.records


def test_robustness_is_measured(dataset):
    def swap_channels(image, severity, seed):
        return image[..., ::-1] if severity > 2 else image

    images = np.zeros((6, 8, 8, 3), np.uint8)
    images[np.arange(6), ..., np.resize(np.arange(3), 6)] = 200
    labels = np.resize(np.arange(3), 6).astype(np.int32)
    measured = measure(MeanColour(), images, labels, {"swap": swap_channels})
    accuracies = [one["accuracy"] for one in measured["corruptions"]["swap"]["severities"]]
    assert accuracies == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 3])
    measured = measure_split(MeanColour(), dataset, corruptions={"swap": swap_channels})
    assert measured["clean"]["accuracy"] == 1


def test_regions_have_an_importance():
    images = np.zeros((8, 8, 8, 3), np.uint8)
    images[np.arange(8), :4, :4, np.resize(np.arange(3), 8)] = 200
    importance = features.region_importance(MeanColour(), images, np.resize(np.arange(3), 8))
    assert importance["accuracy"] == 1
    assert np.array(importance["loss_gained"])[2:].max() == 0
