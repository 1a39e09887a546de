import json
import shutil

import numpy as np
import pytest
import sklearn.metrics
from bundles import make_bundle
from rich.cells import cell_len

from cnn_jax import evaluate
from cnn_jax.data import decode
from cnn_jax.data.dataset import open_dataset
from cnn_jax.data.files import open_folder
from cnn_jax.data.splits import Division
from cnn_jax.inference import evaluation
from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.system.errors import DataError

NAMES = ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [10]), (2, [10, 16]), (3, [10, 13, 16]), (9, range(10, 17))]
)
def test_indices_are_spread_evenly(count, expected):
    assert evaluation.evenly_spaced(np.arange(10, 17), count).tolist() == list(expected)
    assert not len(evaluation.evenly_spaced(np.arange(0), count))


def test_metrics_equal_scikit_learn():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 200).astype(np.float32)
    labels = rng.integers(0, 3, 200)  # The last class, d, has no examples.
    report = evaluation.score(probabilities, labels, NAMES)
    predictions = probabilities.argmax(axis=1)
    everything = {"labels": range(4), "average": "macro", "zero_division": 0}
    assert report["count"] == 200
    assert report["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    for key in ("precision", "recall", "f1"):
        function = getattr(sklearn.metrics, f"{key}_score")
        assert report[key] == pytest.approx(function(labels, predictions, **everything))
    exact = probabilities.astype(float)
    exact /= exact.sum(axis=1, keepdims=True)
    log_loss = sklearn.metrics.log_loss(labels, exact, labels=range(4))
    assert report["loss"] == pytest.approx(log_loss, rel=1e-5)
    expected = sklearn.metrics.confusion_matrix(labels, predictions, labels=range(4))
    np.testing.assert_array_equal(report["confusion"], expected)


def test_a_probability_of_zero_gives_a_finite_loss():
    report = evaluation.score(np.array([[1.0, 0.0]], np.float32), np.array([1]), ["a", "b"])
    assert 80 < report["loss"] < 100


def _open(folder):
    preprocessing = make_bundle().preprocessing
    return open_dataset(open_folder(folder), Division(rule="exact"), preprocessing)


@pytest.fixture
def predictor(image_folder):
    bundle = make_bundle()
    bundle.data["fingerprint"] = _open(image_folder).fingerprint
    return BundlePredictor(bundle)


def test_the_split_is_the_bundles_split(predictor, image_folder):
    source = _open(image_folder)
    counts = [
        evaluation.evaluate(predictor, source, split)["count"]
        for split in ("train", "validation", "test", "all")
    ]
    assert counts == [42, 12, 6, 60]


def test_classes_are_matched_by_name(predictor, image_folder, tmp_path):
    """In a folder without the first class, the other classes keep the indices of the bundle."""
    for name in ("green", "red"):
        shutil.copytree(image_folder / name, tmp_path / name)
    source = _open(image_folder)
    part = _open(tmp_path)
    whole_report = evaluation.evaluate(predictor, source, "all")
    part_report = evaluation.evaluate(predictor, part, "all")
    np.testing.assert_array_equal(part_report["confusion"][1:], whole_report["confusion"][1:])
    assert sum(part_report["confusion"][0]) == 0


def test_an_unknown_class_is_named(predictor, tmp_path, image_folder):
    for name in ("red", "purple"):
        shutil.copytree(image_folder / "red", tmp_path / name)
    with pytest.raises(DataError, match="does not know: purple; it knows blue, green, red"):
        evaluation.evaluate(predictor, _open(tmp_path), "all")


def test_other_data_gives_a_warning(predictor, image_folder, tmp_path, caplog):
    for name in ("green", "red"):
        shutil.copytree(image_folder / name, tmp_path / name)
    evaluation.evaluate(predictor, _open(image_folder), "test")
    assert not caplog.records
    evaluation.evaluate(predictor, _open(tmp_path), "test")
    assert "is not the data that the bundle was trained on" in caplog.text


def test_evaluating_all_training_data_gives_a_warning(predictor, image_folder, tmp_path, caplog):
    evaluation.evaluate(predictor, _open(image_folder), "all")
    (message,) = caplog.messages
    assert "--split=all includes the training images" in message
    assert "--split=test" in message
    caplog.clear()
    shutil.copytree(image_folder / "red", tmp_path / "red")
    evaluation.evaluate(predictor, _open(tmp_path), "all")
    assert not any("training images" in message for message in caplog.messages)


def test_the_command_prints_json_for_the_training_data(image_folder, tmp_path, capfd):
    bundle = make_bundle()
    bundle.data["source"] = f"folder:{image_folder}"
    bundle.data["fingerprint"] = _open(image_folder).fingerprint
    write_bundle(bundle, tmp_path / "bundle")
    evaluate.main([f"--bundle={tmp_path}", "--json"])
    test = json.loads(capfd.readouterr().out)
    assert test["count"] == 6
    assert set(test["per_class"]) == {"blue", "green", "red"}
    evaluate.main(
        [f"--bundle={tmp_path / 'bundle'}", "--split=all", f"--output={tmp_path / 'all.json'}"]
    )
    metrics = json.loads((tmp_path / "all.json").read_text())
    assert metrics["count"] == 60
    shown = capfd.readouterr().out
    assert f"all images of folder:{image_folder}: 60 images" in " ".join(shown.split())
    assert f"accuracy   {100 * metrics['accuracy']:.2f} %" in shown


def _score(names):
    """Returns the metrics of four predictions, of which one is wrong; the last class has no images.

    Three images belong to the first class, and one image belongs to the second class.
    """
    probabilities = np.eye(len(names), dtype=np.float32)[[0, 0, 1, 1]]
    return evaluation.score(probabilities, np.array([0, 0, 0, 1]), list(names))


def test_the_table_shows_metrics_and_classes():
    text = evaluate.describe(_score("abc"), "test split of x: 4 images", 60)
    lines = text.splitlines()
    assert lines[:2] == ["test split of x: 4 images", ""]
    assert lines[2].split() == ["value", "95", "%", "interval"]
    assert lines[3].split() == ["accuracy", "75.00", "%", "30.1", "to", "95.4", "%"]
    values = [line.split()[:2] for line in lines[4:8]]
    assert values[:3] == [["precision", "50.00"], ["recall", "55.56"], ["F1", "48.89"]]
    assert values[3][0] == "loss"
    # The rows are sorted by F1, lowest first, but the class without images is last.
    assert lines[8:] == [
        "Precision, recall and F1 are means over the classes.",
        "",
        "class  precision   recall      F1  images",
        "b         50.0 %  100.0 %  66.7 %       1",
        "a        100.0 %   66.7 %  80.0 %       3",
        "c          0.0 %    0.0 %   0.0 %       0",
    ]


@pytest.mark.parametrize(("num_classes", "rest"), [(20, ""), (21, "1 more class"), (43, "23 more")])
def test_the_table_has_the_twenty_classes_with_the_lowest_f1(num_classes, rest):
    names = [f"class{label:02d}" for label in range(num_classes)]
    labels = np.repeat(np.arange(num_classes), 50)
    predictions = labels.copy()
    for label in range(num_classes):  # The class with index `label` gets `label` wrong predictions.
        predictions[50 * label : 50 * label + label] = num_classes - 1
    probabilities = np.eye(num_classes, dtype=np.float32)[predictions]
    lines = evaluate.describe(evaluation.score(probabilities, labels, names), "", 80).splitlines()
    rows = [line for line in lines if line.startswith("class") and line.endswith(" 50")]
    f1 = [float(line.split()[5]) for line in rows]
    assert len(f1) == 20
    assert f1 == sorted(f1)
    assert not any(line.startswith("class00 ") for line in rows) or not rest
    assert lines[-1].startswith(f"... {rest}") if rest else lines[-1] == rows[-1]
    assert ("; --json has all" in lines[-1]) == bool(rest)


@pytest.mark.parametrize("width", [60, 120])
def test_no_word_of_the_table_is_broken(width):
    names = ("a", "猫" * 10, "a name of many words that is longer than a terminal is wide " * 2)
    text = evaluate.describe(_score(names), "test split of x: 4 images", width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert " ".join(names[2].split()) in " ".join(text.split())
    rows = [line for line in text.splitlines()[11:] if line.endswith((" 0", " 1", " 3"))]
    # All rows have the same width, so the columns are aligned.
    assert len({cell_len(row) for row in rows}) == 1


def test_a_single_class_can_be_evaluated(predictor, image_folder, tmp_path):
    shutil.copytree(image_folder / "red", tmp_path / "red")
    report = evaluation.evaluate(predictor, _open(tmp_path), "all")
    assert report["count"] == report["per_class"]["red"]["support"] == 20


def test_data_is_divided_by_the_groups_and_rule_of_training(predictor, image_folder):
    division = {"fractions": [0.5, 0.3, 0.2], "seed": 3, "rule": "stable", "group": "{class}/{n}"}
    predictor.data["division"] = division | {"keep_splits": True}
    dataset = evaluation.open_as_trained(predictor, f"folder:{image_folder}")
    expected = open_dataset(
        open_folder(image_folder),
        Division.from_dict(predictor.data["division"]),
        predictor.preprocessing,
    )
    for split, indices in expected.splits.items():
        np.testing.assert_array_equal(dataset.splits[split], indices)


def test_other_data_needs_no_groups_and_may_have_unreadable_images(image_folder, tmp_path, capfd):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "red" / "007.png").write_bytes(b"x")
    (tmp_path / "outside.png").write_bytes((image_folder / "red" / "000.png").read_bytes())
    (tmp_path / "images" / "red" / "link.png").symlink_to(tmp_path / "outside.png")
    bundle = make_bundle()
    bundle.data["division"]["group"] = "{class}/{patient}-"
    write_bundle(bundle, tmp_path / "bundle")
    command = [f"--bundle={tmp_path / 'bundle'}", f"--source=folder:{tmp_path / 'images'}"]
    with pytest.raises(DataError, match="does not describe"):
        evaluate.main(command)
    with pytest.raises(DataError, match=r"more than data.max_unreadable = 0\.01"):
        evaluate.main([*command, "--split=all"])
    capfd.readouterr()
    evaluate.main([*command, "--split=all", "--max_unreadable=0.5", "--allow_outside", "--json"])
    assert json.loads(capfd.readouterr().out)["count"] == 60


def test_images_are_decoded_once(predictor, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("CNN_JAX_CACHE", str(tmp_path))
    decoded = []
    to_rgb = decode._to_rgb
    monkeypatch.setattr(decode, "_to_rgb", lambda *args: decoded.append(1) or to_rgb(*args))
    for _ in range(2):
        dataset = evaluation.open_as_trained(predictor, f"folder:{image_folder}")
        assert evaluation.evaluate(predictor, dataset, "all")["count"] == 60
    assert len(decoded) == 60


def test_unreadable_images_are_named_and_left_out(image_folder, tmp_path, caplog):
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "red" / "007.png").write_bytes(b"x")
    bundle = make_bundle()
    bundle.data.update(source=f"folder:{tmp_path / 'images'}", max_unreadable=0.02)
    write_bundle(bundle, tmp_path / "bundle")
    output = tmp_path / "all.json"
    evaluate.main([f"--bundle={tmp_path / 'bundle'}", "--split=all", f"--output={output}"])
    assert json.loads(output.read_text())["count"] == 59
    assert "left out: red/007.png is not an image" in caplog.text
