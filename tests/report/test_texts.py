import pytest

from cnn_jax.report import texts, verdicts


def _figures(accuracy, reach=0.01):
    return {
        "accuracy": accuracy,
        "confidence_intervals": {"accuracy": [accuracy - reach, accuracy + reach]},
    }


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


def test_summary_has_headline_and_remarks():
    test = _test_split([[10, 0, 0], [0, 10, 0], [4, 6, 0]])
    pairs = [{"true": "c", "predicted": "b", "count": 6}]
    found = texts.summary({"test": test, "confusion": {"errors": 10, "pairs": pairs}})
    assert found["headline"] == (
        "The network classifies 66.67 % of 30 test images correctly (95 % interval 65.7 % to "
        "67.7 %)."
    )
    assert [(remark["text"], remark["section"]) for remark in found["remarks"]] == [
        (
            "c is never predicted: of its 10 test images, 6 are predicted as b and 4 as a.",
            "classes",
        ),
        ("Of 10 mistakes, 6 are images of c that are predicted as b.", "confusion"),
    ]


def test_pair_has_remark_if_often_confused():
    test = _test_split([[10, 0], [0, 10]], "ab")
    for count, errors, is_named in ((1, 1, False), (2, 20, True), (2, 21, False)):
        pair = {"true": "a", "predicted": "b", "count": count}
        found = texts.summary({"test": test, "confusion": {"errors": errors, "pairs": [pair]}})
        assert (found["remarks"][0]["section"] == "confusion") == is_named


def test_suspected_labels_have_remark_if_credible():
    test = _test_split([[10, 0], [0, 10]], "ab")
    for share, credible, is_named in ((0.02, True, True), (0.5, False, False), (0.0, True, False)):
        suspects = {"share": share, "credible": credible, "suspected": 1, "of": 2}
        found = texts.summary({"test": test, "label_errors": suspects})
        assert (found["remarks"][0]["section"] == "label_errors") == is_named


def test_class_with_lowest_f1_has_remark_if_it_stands_out():
    test = _test_split([[10, 0, 0], [0, 10, 0], [0, 6, 4]])
    (remark,) = texts.summary({"test": test})["remarks"]
    assert remark["text"].startswith("The class with the lowest F1 is c: 57.1 %; the mean is")


def test_summary_without_remarks_says_so():
    (remark,) = texts.summary({"test": _test_split([[10, 0], [0, 10]], "ab")})["remarks"]
    assert remark["text"].startswith("No class, pair of classes or label stands out")
    assert texts.summary({})["headline"] == "There is no finished network to measure yet."


def test_durations():
    assert texts.duration(3.4) == "3 s"
    assert texts.duration(149.2) == "2 min 29 s"
    assert texts.duration(3 * 3600 + 299) == "3 h 4 min"


def test_remark_on_unpredicted_class_has_its_training_images():
    test = _test_split([[10, 0, 0], [0, 10, 0], [4, 6, 0]])
    train = {"count": 900, "per_class": {name: {"support": 7} for name in "abc"}}
    (remark, *_) = texts.summary({"test": test, "train": train})["remarks"]
    assert remark["text"].endswith("and 4 as a; 7 of 900 training images are of this class.")


def test_headline_compares_with_guessing():
    for confusion, end in (
        (
            [[50, 9], [12, 39]],
            "naming a, the most common class of the test images, would be correct for 53.6 %.",
        ),
        (
            [[30, 21], [26, 33]],
            "Always naming b, the most common class of the test images, would be correct for "
            "53.6 %: the network is "
            "not shown to be better than guessing.",
        ),
        ([[20, 50], [50, 30]], "correct for 53.3 %: the network is worse than guessing."),
        (
            [[850, 100], [10, 40]],
            "correct for 95.0 %, and the network is not shown to have a higher accuracy. But its "
            "predictions depend on the class: its mean recall is 84.7 %; that of guessing is "
            "50.0 %.",
        ),
    ):
        test = _test_split(confusion, "ab")
        test["recall"] = sum(row[i] / sum(row) for i, row in enumerate(confusion)) / 2
        guessing = verdicts.guessing(test)
        headline = texts.summary({"test": test, "guessing": guessing})["headline"]
        assert headline.endswith(end)


def test_small_test_split_has_remark_with_interval():
    test = _test_split([[51, 9], [9, 51]], "ab") | _figures(0.85, reach=0.064)
    (remark, *_) = texts.summary({"test": test})["remarks"]
    assert remark["text"].startswith("120 test images: accuracy is known to ± 6 points.")
    assert remark["section"] == "figures"


def test_remark_on_small_test_split_comes_last():
    confusion = [[10, 0, 0], [0, 10, 0], [4, 6, 0]]
    test = _test_split(confusion) | _figures(2 / 3, reach=0.15)
    figures = {
        "test": test,
        "confusion": {"errors": 10, "pairs": [{"true": "c", "predicted": "b", "count": 6}]},
        "label_errors": {"share": 0.5, "credible": True, "suspected": 1, "of": 2},
    }
    sections = [remark["section"] for remark in texts.summary(figures)["remarks"]]
    assert sections == ["classes", "confusion", "label_errors", "figures"]
    figures["calibration"] = _calibration(0.2, chance=0.1)
    sections = [remark["section"] for remark in texts.summary(figures)["remarks"]]
    assert sections == ["classes", "confusion", "label_errors", "calibration"]


def test_several_unpredicted_classes_share_one_remark():
    test = _test_split([[10, 0, 0], [1, 0, 0], [10, 0, 0]])
    (remark, *_) = texts.summary({"test": test})["remarks"]
    assert remark["text"] == (
        "2 classes are never predicted: b, c. Of 1 test image of b, 1 is predicted as a."
    )


def _calibration(error, chance):
    return {"after": {"expected_calibration_error": error}, "calibrated": {"percentile_95": chance}}


def test_calibration_error_has_remark_only_above_chance():
    test = _test_split([[10, 0], [0, 10]], "ab")
    (remark,) = texts.summary({"test": test, "calibration": _calibration(0.123, 0.1)})["remarks"]
    assert remark["text"] == (
        "The expected calibration error is 12.3 points, even after temperature scaling; a "
        "perfectly calibrated network would show at most 10.0 points in 95 % of cases."
    )
    for error, chance in ((0.123, 0.124), (0.04, 0.01)):
        figures = {"test": test, "calibration": _calibration(error, chance)}
        (remark,) = texts.summary(figures)["remarks"]
        assert remark["section"] == "mistakes"


def test_class_without_test_images_has_remark_with_other_means():
    test = _figures(0.7) | {
        "count": 20,
        "f1": 0.4,
        "confusion": [[6, 4, 0], [2, 8, 0], [0, 0, 0]],
        "per_class": {
            "cat": {"precision": 0.75, "recall": 0.6, "f1": 0.6, "support": 10},
            "dog": {"precision": 0.65, "recall": 0.8, "f1": 0.6, "support": 10},
            "bird": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
        },
    }
    found = texts.summary({"test": test})
    assert found["remarks"][0] == {
        "text": "The class bird has no test images. It counts as 0 in precision, recall and F1. "
        "The means over the other classes are: precision 70.00 %, recall 70.00 %, F1 60.00 %.",
        "section": "figures",
    }
    assert found["absent_classes"] == found["remarks"][0]["text"]
    assert "bird" not in str(found["remarks"][1:])


def test_time_names_the_key_that_saves_time():
    seconds = {"measuring": 3.0, "predictions": 1.0, "curves": 0.1, "images": 1.0, "charts": 2.0}
    found = texts.time_spent(28.0, seconds)
    assert found["words"] == (
        "training 28 s; evaluation and report 7 s "
        "(evaluation 3 s, images 1 s, charts 2 s, other 1 s)"
    )
    full = texts.time_spent(28.0, seconds | {"explanations": 8.0, "robustness": 9.0})
    assert full["parts"]["other"] == pytest.approx(1.1)
    assert full["words"].endswith("; report.detail=figures makes the report faster")
