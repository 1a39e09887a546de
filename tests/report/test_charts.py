import functools
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cnn_jax.inference import calibration
from cnn_jax.report import charts, explanations, qualities, style


def _drawn(path, plot, size=style.SIZE, dpi=40):
    with warnings.catch_warnings():
        # Matplotlib warns, for example, about a character that the font lacks.
        warnings.simplefilter("error")
        style.draw(path, plot, size, dpi)
    for theme in style.THEMES:
        assert np.asarray(Image.open(path.with_stem(path.stem + theme.suffix)))[..., 3].any()
    return Image.open(path).size


def _confusions(groups, likely=0.2):
    """Returns a confusion matrix in which only classes of the same group are confused."""
    groups = np.array(groups)
    shares = np.where(groups[:, None] == groups, likely, 0.0)
    np.fill_diagonal(shares, 1)
    return np.rint(100 * shares).astype(int)


def test_confused_classes_are_adjacent():
    groups = [0, 1, 2, 0, 1, 2, 0, 1]
    order = charts.confusion_order(_confusions(groups))
    assert sorted(order) == list(range(8))
    changes = np.count_nonzero(np.diff([groups[label] for label in order]))
    assert changes == 2


def test_class_order_uses_fractions_and_not_counts():
    """In the class order, 40 % errors in 10 images count more than 3 % errors in 1000 images."""
    matrix = np.array([[970, 30, 0, 0], [0, 1000, 0, 0], [5, 0, 5, 0], [4, 0, 0, 6]])
    positions = np.argsort(charts.confusion_order(matrix))
    assert abs(positions[0] - positions[2]) == 1
    assert abs(positions[0] - positions[3]) == 1


def test_classes_without_confusions_keep_their_order():
    assert charts.confusion_order(np.diag([3, 2, 5, 0])) == [0, 1, 2, 3]
    assert charts.confusion_order(np.array([[3, 1], [0, 2]])) == [0, 1]
    matrix = _confusions([0, 1, 0, 2, 0])
    assert charts.confusion_order(matrix)[3:] == [1, 3]


def test_row_fractions_without_images_are_zero():
    np.testing.assert_array_equal(
        charts.row_fractions(np.array([[3, 1], [0, 0]])), [[0.75, 0.25], [0, 0]]
    )


@pytest.mark.parametrize("count", [2, 20, 43, 201])
def test_confusion_matrix_is_drawn_for_any_class_count(count, tmp_path):
    matrix = _confusions(np.arange(count) // 3)
    matrix[0] = 0  # Class 0 has no images.
    names = style.tick_names([f"class $x^{i}" for i in range(count)])
    size, _ = charts.confusion_size(names)
    for normalized in (False, True):
        plot = functools.partial(charts.confusion, matrix, names, normalized)
        width, height = _drawn(tmp_path / "a.png", plot, size)
        assert (width, height) == (int(size[0] * 40), int(size[1] * 40))
    # Class names do not overlap if each class is as high as a line of text.
    points = 72 * (size[1] - 0.5) / count
    assert count > 200 or points > (8.5 if count <= 60 else 6.5)


def test_cell_numbers_are_short_and_never_round_to_0_or_100():
    assert [charts._short_fraction(share) for share in (0.002, 0.25, 0.996, 1.0)] == [
        *("<1", "25", ">99", "100"),
    ]
    assert [charts._short_count(count) for count in (7.0, 9999.0, 123456.0)] == [
        *("7", "9999", "123k"),
    ]


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_learning_curves_of_any_length_are_drawn(epochs, tmp_path):
    values = np.linspace(0.1, 0.9, epochs).tolist()
    curves = {"epoch": list(range(1, epochs + 1)), "best_epoch": epochs, "learning_rate": values}
    for split in ("train", "validation"):
        curves |= {f"{split}_loss": values, f"{split}_accuracy": values}
    for metric in ("loss", "accuracy"):
        _drawn(tmp_path / "a.png", functools.partial(charts.learning, curves, metric))
    _drawn(tmp_path / "a.png", functools.partial(charts.learning_rate, curves))


@pytest.mark.parametrize("count", [1, 200])
@pytest.mark.parametrize("is_right", [False, True])
def test_calibration_charts_are_drawn_for_any_image_count(count, is_right, tmp_path):
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


def test_names_that_cannot_be_drawn_become_numbers():
    names = ["ring", "猫", "é", "عربى", "", " ", "a\nb", "\udcff", "x" * 40, "$a_1$"]
    assert style.tick_names(names) == [
        *("ring", "#1", "é", "#3", "#4", "#5", "#6", "#7", "x" * 23 + "…", "$a_1$"),
    ]


def test_loss_axis_has_room_above_highest_loss():
    """The axis ends well above the highest loss, even if all losses are close together."""
    curves = {"epoch": [1, 2], "best_epoch": 2}
    curves |= {"train_loss": [0.9, 0.7], "validation_loss": [0.8, 0.7]}
    figure = Figure()
    charts.learning(curves, "loss", figure, style.THEMES[0])
    low, high = figure.axes[0].get_ylim()
    assert low == 0
    assert high > 1.05 * 0.9


def test_region_map_shows_digits_of_small_values():
    def drawn_texts(scale):
        regions = {"loss_gained": [[0.041 * scale, -0.0001 * scale], [0.012 * scale, 0.0]]}
        figure = Figure()
        explanations.charts({"explanations": {"regions": regions, "features": {}}})["regions"].plot(
            figure, style.THEMES[0]
        )
        return [text.get_text() for text in figure.axes[0].texts]

    assert drawn_texts(1) == ["0.041", "0.000", "0.012", "0.000"]
    assert drawn_texts(10) == ["0.41", "0.00", "0.12", "0.00"]


def test_quality_with_equal_values_has_one_number():
    """All images have the same resolution, so the label of the bin is a number and not a range."""
    interval = [0.5, 0.7]
    bins = [
        {
            "from": 187_500,
            "to": 187_500,
            "count": 9,
            "accuracy": 0.6,
            "confidence_interval": interval,
        }
    ]
    figure = Figure()
    qualities._plot_by_quality({"resolution": bins}, figure, style.THEMES[0])
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["187,500"]
    assert qualities._range_label(10.2, 20.0) == "10-\n20"
