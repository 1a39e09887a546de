import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn_jax.inference import calibration
from cnn_jax.report import verdicts
from cnn_jax.training.metrics import full_report


def _metrics(accuracy, count=1000, num_classes=4):
    """Returns the metrics of a split; each misclassified image is predicted as the next class."""
    per_class = count // num_classes
    hits = round(accuracy * per_class)
    confusion = hits * np.eye(num_classes, dtype=int)
    confusion += (per_class - hits) * np.roll(np.eye(num_classes, dtype=int), 1, axis=1)
    names = [str(label) for label in range(num_classes)]
    return full_report(confusion, np.ones(per_class * num_classes), names)


def _curves(validation, train=None, losses=None, train_losses=None):
    best = int(np.argmax(validation))
    return {
        "epoch": list(range(1, len(validation) + 1)),
        "epochs": len(validation),
        "best_epoch": best + 1,
        "train_accuracy": train or validation,
        "train_loss": train_losses or [0.5] * len(validation),
        "validation_accuracy": validation,
        "validation_loss": losses or [0.5] * len(validation),
    }


FLAT = [0.5, 0.8, 0.9, 0.9, 0.91, 0.91, 0.91, 0.91, 0.91, 0.91]
LOW = [accuracy - 0.2 for accuracy in FLAT]
RISING = [0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85]
PEAKED = [0.5, 0.6, 0.7, 0.62, 0.6, 0.58, 0.55, 0.55, 0.54, 0.55]
FALLING = [1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
SITUATIONS = {
    "as good on both, levelled off": (_curves(FLAT), 0.92, 0.91, "balanced"),
    "validation ahead": (_curves(FLAT), 0.90, 0.91, "balanced"),
    "all right": (_curves([0.9, 1.0, 1.0, 1.0]), 1.0, 1.0, "balanced"),
    "train far ahead": (_curves(FLAT), 0.99, 0.91, "overfits"),
    "train far ahead, both low": (_curves([0.4, 0.5, 0.5, 0.5, 0.5]), 0.8, 0.5, "overfits"),
    "both low, levelled off": (_curves(LOW), 0.70, 0.71, "underfits"),
    "both low, train still falls": (
        _curves(LOW, train_losses=FALLING),
        0.70,
        0.71,
        "still learning",
    ),
    # These are the metrics of a real run of ten epochs, in which the last epoch was the best.
    "both low, best at the end": (
        _curves(
            [0.53, 0.55, 0.59, 0.53, 0.58, 0.596, 0.57, 0.55, 0.57, 0.604],
            train_losses=[0.792, 0.722, 0.705, 0.695, 0.678, 0.658, 0.673, 0.661, 0.656, 0.642],
        ),
        0.627,
        0.604,
        "too short to tell",
    ),
    "accuracy rises at the end": (_curves(RISING), 0.86, 0.85, "still improving"),
    "rises, train ahead": (_curves(RISING), 0.99, 0.85, "still improving"),
    "loss falls at the end": (
        _curves([*FLAT[:-1], 0.912], losses=FALLING),
        0.92,
        0.912,
        "still improving",
    ),
    "an early best that stays": (
        _curves([*[0.5] * 16, 0.9, 0.8, 0.8, 0.8]),
        0.91,
        0.9,
        "balanced",
    ),
    "an early best, then worse": (_curves(PEAKED, train=RISING), 0.72, 0.70, "peaked early"),
    "worse on both": (_curves(PEAKED, train=RISING[::-1]), 0.86, 0.84, "going on"),
    "one epoch": (_curves([0.5]), 0.99, 0.5, "one epoch"),
    "at chance": (_curves([0.25, 0.27, 0.26, 0.26]), 0.26, 0.26, "at chance"),
    "at chance, best epoch early": (_curves([0.25, 0.26, 0.22, 0.22]), 0.27, 0.26, "at chance"),
    "at chance after one epoch": (_curves([0.25]), 0.25, 0.25, "at chance"),
    "train learned, validation at chance": (_curves([0.26] * 9), 0.99, 0.26, "at chance"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_training_verdicts(situation):
    curves, high, low, expected = SITUATIONS[situation]
    train, validation = _metrics(high, 4000), _metrics(low)
    found = verdicts.training(curves, train, validation)
    assert found["verdict"] == expected
    if expected == "going on":
        assert "gap" not in found
        return
    assert found["gap"] == pytest.approx(train["accuracy"] - validation["accuracy"])
    assert f"{100 * train['accuracy']:.1f} % of the training images" in found["words"]
    assert f"{100 * validation['accuracy']:.1f} % of the validation images" in found["words"]
    assert f"{100 * abs(found['gap']):.1f} points apart" in found["words"]
    assert ("validation ahead" in found["words"]) == (found["gap"] < 0)
    for word in ("overfits", "It underfits"):
        assert (word in found["words"]) == (word.endswith(expected))


def test_tiny_validation_split_gives_no_verdict_on_gap():
    found = verdicts.training(_curves(FLAT), _metrics(0.97, 400), _metrics(0.9, 40))
    assert found["verdict"] == "too few images"
    assert "40 validation images are too few" in found["words"]
    assert "known to ± 10 points" in found["words"]


def test_advice_has_measured_reasons():
    losses = [0.9, 0.5, 0.30, 0.32, 0.35, 0.4, 0.4, 0.41, 0.42, 0.43]
    found = verdicts.training(_curves(FLAT, losses=losses), _metrics(0.99), _metrics(0.91))
    assert "lowest validation loss was 0.300, in epoch 3; it rose to 0.430" in found["words"]
    augmented = [accuracy - 0.2 for accuracy in LOW]
    curves = _curves(LOW, train=augmented)
    found = verdicts.training(curves, _metrics(0.7, 4000), _metrics(0.71), dropout=0.5)
    assert "With augmentation and dropout, 51.0 % of the training images" in found["words"]
    assert "weaker augmentation or less dropout" in found["words"]
    found = verdicts.training(_curves(LOW), _metrics(0.7, 4000), _metrics(0.71))
    assert "A larger network" in found["words"]
    found = verdicts.training(_curves([0.26] * 9), _metrics(0.99), _metrics(0.26))
    assert "does not hold for other images" in found["words"]
    curves = _curves([0.26] * 10, train_losses=FALLING)
    found = verdicts.training(curves, _metrics(0.26), _metrics(0.26))
    assert "still falling (from 0.700 to 0.300" in found["words"]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_advice_on_dropout_needs_a_network_with_dropout(situation):
    curves, high, low, verdict = SITUATIONS[situation]
    metrics = _metrics(high, 4000), _metrics(low)
    assert "dropout" not in verdicts.training(curves, *metrics)["words"]
    words = verdicts.training(curves, *metrics, dropout=0.0)["words"]
    assert ("or more dropout may" in words) == (verdict in ("overfits", "peaked early"))


def test_noisy_loss_is_no_trend():
    noisy = [1.0, 0.9, 0.7, 0.8, 0.6, 0.75, 0.7, 0.78, 0.66, 0.70]
    curves = _curves([*FLAT[:-1], 0.912], losses=noisy)
    assert verdicts.training(curves, _metrics(0.92), _metrics(0.912))["verdict"] == "balanced"


def test_unfinished_run_has_no_gap():
    found = verdicts.training(_curves([0.5, 0.7, 0.6]), None, None)
    assert found["verdict"] == "not finished"
    assert (
        "The best of 3 epochs so far is epoch 2, with a validation accuracy of 70.0 %"
        in (found["words"])
    )
    assert set(found) == {"verdict", "words"}


def test_continued_run_gets_no_verdict_on_old_metrics():
    found = verdicts.training(_curves(FLAT), _metrics(0.99), _metrics(0.69))
    assert found["verdict"] == "going on"
    assert "91.0 %" in found["words"]
    assert f"{100 * _metrics(0.69)['accuracy']:.1f} %" in found["words"]


def test_best_epoch_has_its_number_despite_damaged_lines():
    curves = _curves([0.5, 0.6, 0.4]) | {"epoch": [1, 7, 9], "best_epoch": 7}
    found = verdicts.training(curves, None, None)
    assert "is epoch 7, with a validation accuracy of 60.0 %" in found["words"]


def _confusion(matrix):
    names = [str(label) for label in range(len(matrix))]
    return {"confusion": matrix, "per_class": dict.fromkeys(names)}


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[30, 21], [26, 33]], "chance"),
        ([[33, 18], [26, 33]], "informative"),
        ([[45, 6], [10, 49]], "better"),
        ([[20, 50], [50, 30]], "worse"),
        ([[850, 100], [10, 40]], "informative"),
        ([[95, 0], [5, 0]], "chance"),
        ([[0, 95], [0, 5]], "worse"),
        ([[3, 0], [0, 2]], "chance"),
        ([[30, 0], [0, 30]], "better"),
    ],
)
def test_guessing(matrix, expected):
    found = verdicts.guessing(_confusion(matrix))
    support, hits = np.sum(matrix, axis=1), np.trace(matrix)
    total, rate = support.sum(), support.max() / support.sum()
    tail = scipy.stats.binomtest(hits, total, rate, alternative="greater").pvalue
    assert found["p_value"] == pytest.approx(tail)
    assert found["accuracy"] == rate
    assert found["class"] == str(support.argmax())
    assert found["verdict"] == expected


def test_baseline_is_the_most_common_class_of_the_split():
    """The baseline always predicts class 1, because class 1 has 59 of 110 images."""
    found = verdicts.guessing(_confusion([[33, 18], [26, 33]]))
    assert (found["class"], found["accuracy"]) == ("1", 59 / 110)
    # A network that always predicts the same class is never better than the baseline.
    constant = _confusion([[0, 40], [0, 60]])
    assert verdicts.guessing(constant)["verdict"] == "chance"
    assert not verdicts.beats_chance(constant)


def test_short_schedule_is_advised_to_train_longer():
    curves = _curves(LOW) | {"learning_rate": [1e-3 * (1 - i / 11) for i in range(10)]}
    found = verdicts.training(curves, _metrics(0.7, 4000), _metrics(0.71))
    assert found["verdict"] == "underfits"
    assert "learning rate fell from 0.001 to 0.00018" in found["words"]
    assert "try more epochs first" in found["words"]
    constant = _curves(LOW) | {"learning_rate": [1e-3] * 10}
    found = verdicts.training(constant, _metrics(0.7, 4000), _metrics(0.71))
    assert "more epochs" not in found["words"]


def test_calibrated_error_matches_simulated_labels():
    """The expected values are calibration errors of labels drawn from the probabilities."""
    rng = np.random.default_rng(1)
    first = rng.uniform(0.5, 0.95, 121)
    probabilities = np.stack([first, 1 - first], axis=1)
    errors = []
    for _ in range(2000):
        labels = (rng.random(121) > first).astype(int)
        errors.append(calibration.expected_calibration_error(probabilities, labels))
    found = verdicts.calibrated_error(first)
    assert found["mean"] == pytest.approx(np.mean(errors), rel=0.03)
    assert found["percentile_95"] == pytest.approx(np.percentile(errors, 95), rel=0.05)
    assert found == verdicts.calibrated_error(first)


def test_agreement_p_value_matches_shuffled_predictions():
    matrix = np.array([[20, 6, 4], [7, 9, 4], [5, 2, 3]])
    labels, predictions = (np.repeat(axis.ravel(), matrix.ravel()) for axis in np.indices((3, 3)))
    rng = np.random.default_rng(0)
    agreements = [(labels == rng.permutation(predictions)).sum() for _ in range(20_000)]
    expected = np.mean(np.array(agreements) >= np.trace(matrix))
    assert verdicts.agreement_p_value(matrix) == pytest.approx(expected, abs=0.006)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=3, max_size=3).filter(
        lambda rows: sum(map(sum, rows)) > 0
    )
)
def test_guessing_gives_verdict_on_any_matrix(matrix):
    found = verdicts.guessing(_confusion(matrix))
    assert 0 <= found["p_value"] <= 1
    assert 0 <= found["agreement_p_value"] <= 1
    if found["verdict"] == "better":
        assert np.trace(matrix) > np.sum(matrix, axis=1).max()


def test_falling_p_value_is_small_only_for_falling_values():
    # Only one of the 24 orders of four values is strictly decreasing.
    assert verdicts.falling_p_value([4, 3, 2, 1]) == pytest.approx(1 / 24)
    assert verdicts.falling_p_value([1, 2, 3, 4]) == pytest.approx(1)


def test_predictions_of_one_class_never_beat_chance():
    for row in ([9, 0], [0, 9]):
        assert not verdicts.beats_chance(_confusion([row, row]))


@pytest.mark.parametrize(("num_classes", "threshold"), [(2, 0.875), (10, 0.775), (43, 0.7558)])
def test_sure_threshold_is_three_quarters_above_chance(num_classes, threshold):
    assert verdicts.sure_threshold(num_classes) == pytest.approx(threshold, abs=1e-4)
