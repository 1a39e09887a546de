import functools
import warnings

import numpy as np
import pytest
from PIL import Image

from cnn_jax.inference import calibration
from cnn_jax.report import charts, style


def _drawn(path, plot, size=style.SIZE, dpi=40):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Such as of a character that the font lacks.
        style.draw(path, plot, size, dpi)
    for theme in style.THEMES:
        assert np.asarray(Image.open(path.with_stem(path.stem + theme.suffix)))[..., 3].any()
    return Image.open(path).size


def _confusions(groups, likely=0.2):
    """A matrix in which the classes of a group are taken for each other."""
    groups = np.array(groups)
    shares = np.where(groups[:, None] == groups, likely, 0.0)
    np.fill_diagonal(shares, 1)
    return np.rint(100 * shares).astype(int)


def test_confused_classes_stand_together():
    groups = [0, 1, 2, 0, 1, 2, 0, 1]
    order = charts.confusion_order(_confusions(groups))
    assert sorted(order) == list(range(8))
    changes = np.count_nonzero(np.diff([groups[label] for label in order]))
    assert changes == 2


def test_shares_of_a_class_count_and_not_images():
    """Half of the few images of classes 2 and 3 draws nearer than 3 % of many."""
    matrix = np.array([[970, 30, 0, 0], [0, 1000, 0, 0], [5, 0, 5, 0], [4, 0, 0, 6]])
    place = np.argsort(charts.confusion_order(matrix))
    assert abs(place[0] - place[2]) == 1
    assert abs(place[0] - place[3]) == 1


def test_classes_without_confusions_stay_as_they_are():
    assert charts.confusion_order(np.diag([3, 2, 5, 0])) == [0, 1, 2, 3]
    assert charts.confusion_order(np.array([[3, 1], [0, 2]])) == [0, 1]
    matrix = _confusions([0, 1, 0, 2, 0])
    assert charts.confusion_order(matrix)[3:] == [1, 3]


def test_shares_of_a_class_without_images_are_zero():
    np.testing.assert_array_equal(
        charts.row_fractions(np.array([[3, 1], [0, 0]])), [[0.75, 0.25], [0, 0]]
    )


@pytest.mark.parametrize("count", [2, 20, 43, 201])
def test_confusions_of_any_number_of_classes_are_drawn(count, tmp_path):
    matrix = _confusions(np.arange(count) // 3)
    matrix[0] = 0  # A class without images.
    names = style.tick_names([f"class $x^{i}" for i in range(count)])
    size, _ = charts.confusion_size(names)
    for normalized in (False, True):
        plot = functools.partial(charts.confusion, matrix, names, normalized)
        width, height = _drawn(tmp_path / "a.png", plot, size)
        assert (width, height) == (int(size[0] * 40), int(size[1] * 40))
    # So that names do not overlap, a class has as much room as a line of them.
    points = 72 * (size[1] - 0.5) / count
    assert count > 200 or points > (8.5 if count <= 60 else 6.5)


def test_numbers_of_cells_are_short_and_honest():
    assert [charts._short_fraction(share) for share in (0.002, 0.25, 0.996, 1.0)] == [
        *("<1", "25", ">99", "100"),
    ]
    assert [charts._short_count(count) for count in (7.0, 9999.0, 123456.0)] == [
        *("7", "9999", "123k"),
    ]


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_curves_of_any_length_are_drawn(epochs, tmp_path):
    values = np.linspace(0.1, 0.9, epochs).tolist()
    curves = {"epoch": list(range(1, epochs + 1)), "best_epoch": epochs, "learning_rate": values}
    for split in ("train", "validation"):
        curves |= {f"{split}_loss": values, f"{split}_accuracy": values}
    for metric in ("loss", "accuracy"):
        _drawn(tmp_path / "a.png", functools.partial(charts.learning, curves, metric))
    _drawn(tmp_path / "a.png", functools.partial(charts.learning_rate, curves))


@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.parametrize("is_right", [False, True])
def test_confidence_is_drawn_for_few_images_and_for_many(count, is_right, tmp_path):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), count)
    labels = (probabilities.argmax(axis=1) + (not is_right)) % 3
    figures = {
        "before": calibration.describe(probabilities, labels),
        "after": calibration.describe(calibration.apply_temperature(probabilities, 0.5), labels),
    }
    _drawn(tmp_path / "a.png", functools.partial(charts.reliability, figures))
    covered = {"curve": calibration.coverage(probabilities, labels)}
    _drawn(tmp_path / "a.png", functools.partial(charts.coverage, covered))


def test_a_name_that_cannot_be_drawn_is_a_number():
    names = ["ring", "猫", "é", "عربى", "", " ", "a\nb", "\udcff", "x" * 40, "$a_1$"]
    assert style.tick_names(names) == [
        *("ring", "#1", "é", "#3", "#4", "#5", "#6", "#7", "x" * 23 + "…", "$a_1$"),
    ]
