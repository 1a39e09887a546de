import pytest

from cnn_jax.report import words


def _figures(accuracy, reach=0.01):
    return {
        "accuracy": accuracy,
        "confidence_intervals": {"accuracy": [accuracy - reach, accuracy + reach]},
    }


def _curves(accuracies, losses=None):
    best = max(range(len(accuracies)), key=accuracies.__getitem__) + 1
    return {
        "epoch": list(range(1, len(accuracies) + 1)),
        "epochs": len(accuracies),
        "best_epoch": best,
        "validation_accuracy": accuracies,
        "validation_loss": losses or [1 - accuracy for accuracy in accuracies],
    }


FLAT = [0.5, 0.8, 0.9, 0.9, 0.91, 0.91, 0.91, 0.91, 0.91, 0.91]
RISING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85]


@pytest.mark.parametrize(
    ("accuracies", "train", "validation", "expected"),
    [
        (FLAT, 0.92, 0.91, "balanced"),
        (FLAT, 0.90, 0.91, "balanced"),
        (FLAT, 0.99, 0.91, "overfits"),
        ([a - 0.2 for a in FLAT], 0.70, 0.71, "underfits"),
        ([0.1, 0.12, 0.11, 0.11, 0.11], 0.2, 0.11, "underfits"),
        ([0.4, 0.5, 0.5, 0.5, 0.5], 0.8, 0.5, "overfits"),
        (RISING, 0.86, 0.85, "still improving"),
        (RISING, 0.99, 0.85, "still improving"),
        ([*[0.5] * 16, 0.9, 0.8, 0.8, 0.8], 0.91, 0.9, "balanced"),
        ([0.5], 0.99, 0.5, "one epoch"),
    ],
)
def test_verdicts(accuracies, train, validation, expected):
    found = words.verdict(_curves(accuracies), _figures(train), _figures(validation))
    assert found["verdict"] == expected
    assert found["gap"] == pytest.approx(train - validation)
    assert f"{100 * train:.1f} % of the training images" in found["words"]
    assert f"{100 * validation:.1f} % of the validation images" in found["words"]
    assert f"{100 * abs(train - validation):.1f} percentage points" in found["words"]
    assert ("validation ahead" in found["words"]) == (train < validation)


def test_a_gap_that_may_be_chance_is_none():
    """Twenty validation images say little."""
    found = words.verdict(_curves(FLAT), _figures(0.99), _figures(0.9, reach=0.1))
    assert found["verdict"] == "balanced"


def test_a_validation_loss_that_rises_is_told():
    losses = [0.9, 0.5, 0.30, 0.32, 0.35, 0.4, 0.4, 0.41, 0.42, 0.43]
    found = words.verdict(_curves(FLAT, losses), _figures(0.99), _figures(0.91))
    assert "least in epoch 3, 0.300, and has risen to 0.430" in found["words"]


def test_a_run_that_goes_on_has_no_gap():
    found = words.verdict(_curves([0.5, 0.7, 0.6]), None, None)
    assert found["verdict"] == "not finished"
    assert (
        "Of 3 epochs so far the best is 2, with a validation accuracy of 70.0 %" in (found["words"])
    )
    assert set(found) == {"verdict", "words"}


def _test_split(confusion, names="abc"):
    count = sum(map(sum, confusion))
    f1 = [2 * row[i] / (sum(row) + sum(r[i] for r in confusion)) for i, row in enumerate(confusion)]
    return _figures(sum(row[i] for i, row in enumerate(confusion)) / count) | {
        "count": count,
        "f1": sum(f1) / len(f1),
        "confusion": confusion,
        "per_class": {
            name: {"f1": f1[i], "support": sum(confusion[i])} for i, name in enumerate(names)
        },
    }


def test_the_summary_says_how_good_it_is_and_what_stands_out():
    test = _test_split([[10, 0, 0], [0, 10, 0], [4, 6, 0]])
    pairs = [{"true": "c", "predicted": "b", "count": 6}]
    found = words.summary({"test": test, "confusion": {"errors": 10, "pairs": pairs}})
    assert found["headline"] == (
        "The network classifies 66.67 % of 30 test images correctly (95 % interval 65.7 % to "
        "67.7 %)."
    )
    assert [(remark["text"], remark["section"]) for remark in found["remarks"]] == [
        ("No test image is taken for c.", "classes"),
        ("Of 10 mistakes, 6 are c taken for b.", "confusion"),
    ]


def test_a_pair_is_named_if_it_is_confused_often():
    test = _test_split([[10, 0], [0, 10]], "ab")
    for count, errors, is_named in ((1, 1, False), (2, 20, True), (2, 21, False)):
        pair = {"true": "a", "predicted": "b", "count": count}
        found = words.summary({"test": test, "confusion": {"errors": errors, "pairs": [pair]}})
        assert (found["remarks"][0]["section"] == "confusion") == is_named


def test_suspected_labels_are_named_if_they_can_be_believed():
    test = _test_split([[10, 0], [0, 10]], "ab")
    for share, credible, is_named in ((0.02, True, True), (0.5, False, False), (0.0, True, False)):
        suspects = {"share": share, "credible": credible, "suspected": 1, "of": 2}
        found = words.summary({"test": test, "label_errors": suspects})
        assert (found["remarks"][0]["section"] == "label_errors") == is_named


def test_the_weakest_class_is_named_if_it_stands_out():
    test = _test_split([[10, 0, 0], [0, 10, 0], [0, 6, 4]])
    (remark,) = words.summary({"test": test})["remarks"]
    assert remark["text"].startswith("The weakest class is c: its F1 is 57.1 %, and")


def test_where_nothing_stands_out_that_is_said():
    (remark,) = words.summary({"test": _test_split([[10, 0], [0, 10]], "ab")})["remarks"]
    assert remark["text"].startswith("No class, pair of classes or label stands out")
    assert words.summary({})["headline"] == "There is no finished network to measure yet."


def test_durations():
    assert words.duration(3.4) == "3 s"
    assert words.duration(149.2) == "2 min 29 s"
    assert words.duration(3 * 3600 + 299) == "3 h 4 min"


def test_figures_of_an_earlier_end_are_not_judged_by_a_later_history():
    found = words.verdict(_curves(FLAT), _figures(0.99), _figures(0.69))
    assert found["verdict"] == "going on"
    assert "91.0 %" in found["words"]
    assert "69.0 %" in found["words"]


def test_epochs_are_named_by_number_where_lines_are_damaged():
    curves = _curves([0.5, 0.6, 0.4]) | {"epoch": [1, 7, 9], "best_epoch": 7}
    found = words.verdict(curves, None, None)
    assert "the best is 7, with a validation accuracy of 60.0 %" in found["words"]
