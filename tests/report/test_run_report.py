import dataclasses
import html.parser
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY, make_tiny_config, show_at, write_images
from PIL import Image

from cnn_jax.data import no_track, pipeline
from cnn_jax.inference import calibration
from cnn_jax.inference.bundle import read_bundle, write_bundle
from cnn_jax.inference.evaluation import open_as_trained, predict_split
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.report import run_report, sections, texts, thumbnails
from cnn_jax.report.run import read_run
from cnn_jax.report.run_report import write_report
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, DataError
from cnn_jax.training import run_directory
from cnn_jax.training.loop import train_and_evaluate

SECTIONS = {
    *("guessing", "curves", "confusion", "calibration", "coverage", "mistakes", "label_errors"),
    "augmentation",
}
# The sections that are slow to compute. Only a few tests compute these sections.
FULL = {"explanations", "robustness"}
HOSTILE = (
    '<script>alert("1")<',
    "new\nline",
    "'quotes\" & $x^$",
    "{{ 7 * 7 }}{% raw %}",
    "😀 猫 \u202egnp",
    os.fsdecode(b"\xff\xfe"),
)


class _Parser(html.parser.HTMLParser):
    """An HTML parser that collects elements, visible text, images, and sort keys of table cells."""

    def __init__(self):
        super().__init__()
        self.elements, self.images, self.values, self.words = [], [], [], []
        self._hidden = False

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append(tag)
        self._hidden = tag in ("style", "script")
        self.images += [attributes[name] for name in ("src", "srcset") if name in attributes]
        if "data-value" in attributes:
            self.values.append(float(attributes["data-value"]))
        if tag == "a":
            assert attributes["href"].startswith("#")
        assert not any(name.startswith("on") for name in attributes)

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def _parsed(page):
    parser = _Parser()
    parser.feed(page.read_text("utf-8"))
    return parser


def _metrics(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} in metrics.json")

    text = (workdir / "report" / "metrics.json").read_text("utf-8")
    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """The folder of a finished run without a report page."""
    config = make_tiny_config(image_folder)
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train_and_evaluate(config, workdir)
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run's folder; a test may change the copy."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def reported(finished, tmp_path_factory):
    """The folder of a finished run with a complete report."""
    workdir = shutil.copytree(finished, tmp_path_factory.mktemp("reported") / "run")
    write_report(workdir)
    return pathlib.Path(workdir)


@pytest.fixture
def undrawn(monkeypatch):
    """Replaces charts with images of one pixel, for tests that do not check charts."""

    def draw(path, *_):
        for theme in run_report.style.THEMES:
            Image.new("RGBA", (1, 1)).save(path.with_stem(path.stem + theme.suffix))

    monkeypatch.setattr(run_report.style, "draw", draw)


def _written(workdir):
    """Writes a report without its slow sections, and returns the parsed page."""
    return _parsed(write_report(workdir, detail="figures"))


def _change_bundle(workdir, **data):
    """Changes values in the section `data` of a bundle's description."""
    path = workdir / "bundle" / "bundle.json"
    description = json.loads(path.read_text())
    description["data"] |= data
    path.write_text(json.dumps(description))


# Tests of the content of a report.


def test_metrics_json_has_all_sections(finished, reported):
    before, after = _metrics(finished), _metrics(reported)
    assert {split: after[split] for split in before} == before
    assert set(after) == {
        *before,
        *SECTIONS,
        *FULL,
        "missing",
        "methods",
        "format",
        "run",
        "summary",
    }
    assert after["missing"] == {}
    written = {path.name for path in (reported / "report").glob("*.png")}
    assert written > {
        f"{name}{suffix}.png"
        for name in (
            *("loss", "accuracy", "learning_rate", "reliability", "coverage"),
            *("confusion", "confusion_normalized"),
        )
        for suffix in ("", "_dark")
    }


def test_page_needs_no_other_file(reported):
    page = _parsed(reported / "report" / "index.html")
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    assert not {"iframe", "object", "svg"} & set(page.elements)
    assert page.elements.count("link") == 1  # The only <link> element declares an empty icon.
    policy = (reported / "report" / "index.html").read_text("utf-8")
    assert "default-src 'none'; img-src data:" in policy


def _forms(value):
    """Yields a number in all formats that a page may use."""
    if isinstance(value, int):
        yield f"{value:,}"
        yield str(value)
    for digits in range(5):
        yield f"{value:.{digits}f}"
    for digits in range(3):
        yield f"{100 * value:.{digits}f}"
    yield f"{value:,.0f}"
    yield json.dumps(value)


_NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")


def _numbers(tree):
    """Yields the numbers in metrics.json, also those in strings, in all formats of the page."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _NUMBER.findall(key)
            yield from _numbers(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _numbers(value)
    elif isinstance(tree, str):
        yield from _NUMBER.findall(tree)
    elif isinstance(tree, int | float):
        yield from _forms(tree)


def test_numbers_on_page_are_in_metrics_json(reported):
    figures = _metrics(reported)
    page = _parsed(reported / "report" / "index.html")
    shown = set(_NUMBER.findall(page.text))
    assert len(shown) > 60
    assert shown - set(_numbers(figures)) == set()
    rows = figures["test"]["per_class"]
    train = figures["train"]["per_class"]
    class_values = [
        value
        for name, row in rows.items()
        for value in (
            *(row[key] for key in ("f1", "precision", "recall")),
            *(row["support"], train[name]["support"]),
        )
    ]
    assert page.values[: len(class_values)] == class_values
    for split in ("train", "validation", "test"):
        for key in ("accuracy", "precision", "recall", "f1"):
            low, high = figures[split]["confidence_intervals"][key]
            cell = f"{100 * figures[split][key]:.2f} % {100 * low:.1f} to {100 * high:.1f} %"
            assert cell in page.text


@pytest.mark.parametrize("temperature", [100, None])
def test_page_reports_that_scaling_made_calibration_worse(finished, tmp_path, temperature):
    shutil.copytree(finished, tmp_path / "run")
    if temperature:
        path = tmp_path / "run" / "bundle" / "bundle.json"
        bundle = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(bundle | {"temperature": temperature}), "utf-8")
    page = write_report(tmp_path / "run", detail="figures")
    measured = _metrics(tmp_path / "run")["calibration"]
    is_worse = (
        measured["after"]["expected_calibration_error"]
        > measured["before"]["expected_calibration_error"]
    )
    assert is_worse or not temperature
    assert ("Scaling made the calibration error" in _parsed(page).text) == is_worse


def test_sections_agree_with_direct_measurement(reported):
    """The expected values are computed directly from the predictions for the test split."""
    figures = _metrics(reported)
    predictor = BundlePredictor.load(reported / "bundle")
    dataset = open_as_trained(predictor)
    indices = dataset.splits["test"]
    probabilities = predict_split(predictor, dataset.loader, indices)
    labels = dataset.source.labels[indices]
    temperature = predictor.temperature
    assert figures["calibration"]["temperature"] == temperature
    assert figures["calibration"]["after"] == calibration.describe(probabilities, labels)
    before = calibration.apply_temperature(probabilities, 1 / temperature)
    assert figures["calibration"]["before"] == calibration.describe(before, labels)
    assert figures["coverage"]["curve"] == calibration.coverage(probabilities, labels)
    everything = figures["coverage"]["points"][0]
    assert everything["coverage"] == 1
    assert everything["accuracy"] == pytest.approx(figures["test"]["accuracy"])

    is_wrong = probabilities.argmax(axis=1) != labels
    assert figures["mistakes"]["num_wrong"] == is_wrong.sum() == figures["confusion"]["errors"]
    wrong = figures["mistakes"]["wrong"]
    assert {shown["id"] for shown in wrong} == {
        dataset.source.ids[i] for i in indices[np.flatnonzero(is_wrong)]
    }
    for shown in (*wrong, *figures["mistakes"]["unsure"]):
        row = indices.tolist().index(shown["position"])
        assert dataset.source.ids[shown["position"]] == shown["id"]
        assert predictor.class_names[labels[row]] == shown["true"]
        assert predictor.class_names[probabilities[row].argmax()] == shown["predicted"]
        assert shown["confidence"] == pytest.approx(probabilities[row].max())
    for kind, sign in (("wrong", -1), ("unsure", 1)):
        confidences = [sign * shown["confidence"] for shown in figures["mistakes"][kind]]
        assert confidences == sorted(confidences)


def test_confused_pairs_have_counts_and_examples(reported):
    figures = _metrics(reported)
    names, matrix = list(figures["test"]["per_class"]), figures["test"]["confusion"]
    pairs = figures["confusion"]["pairs"]
    assert sum(pair["count"] for pair in pairs) == figures["confusion"]["errors"]
    counts = [pair["count"] for pair in pairs]
    assert counts == sorted(counts, reverse=True)
    for pair in pairs:
        true, predicted = names.index(pair["true"]), names.index(pair["predicted"])
        assert pair["count"] == matrix[true][predicted]
        assert pair["of"] == sum(matrix[true])
        assert pair["share"] == pair["count"] / pair["of"]
        assert len(pair["examples"]) == min(pair["count"], 3)
        for shown in pair["examples"]:
            assert (shown["true"], shown["predicted"]) == (pair["true"], pair["predicted"])


def test_confused_pairs_are_sorted_by_count(reported):
    """Pairs with equal counts are sorted by their fraction of the images of the true class."""
    run = read_run(reported, no_track)
    test = run.figures["test"] | {"confusion": [[5, 3, 0], [1, 97, 2], [2, 0, 4]]}
    run = dataclasses.replace(run, network=None, figures={"test": test})
    pairs = sections.confusion(run)["pairs"]
    names = list(test["per_class"])
    found = [(names.index(p["true"]), names.index(p["predicted"]), p["count"]) for p in pairs]
    assert found == [(0, 1, 3), (2, 0, 2), (1, 2, 2), (1, 0, 1)]
    assert [pair["share"] for pair in pairs] == [3 / 8, 2 / 6, 2 / 100, 1 / 100]


def test_suspected_labels_have_ids_and_suggestions(reported):
    run = read_run(reported, no_track)
    assert run.network is not None
    certain = {
        split: np.eye(3)[run.network.labels(split)] * 0.55 + 0.15
        for split in ("validation", "test")
    }
    wrong = {("validation", 3): 0.9, ("test", 1): 0.95}
    expected = {}
    for (split, row), sure in wrong.items():
        label = run.network.labels(split)[row]
        certain[split][row] = (1 - sure) / 2
        certain[split][row, label - 1] = sure
        position = run.network.dataset.splits[split][row]
        expected[run.network.source.ids[position]] = run.network.class_names[label - 1]
    network = dataclasses.replace(run.network, probabilities=certain)
    found = sections.suspected_labels(dataclasses.replace(run, network=network))
    # The network predicts the labels of 16 of the 18 images with a confidence of 0.7.
    assert found["ids"] == list(expected)[::-1]
    assert {shown["id"]: shown["predicted"] for shown in found["examples"]} == expected
    assert [shown["split"] for shown in found["examples"]] == ["test", "validation"]
    assert (found["suspected"], found["of"], found["credible"]) == (2, 18, False)
    assert found["share"] == pytest.approx(2 / 18)
    certain["test"] = np.eye(3)[run.network.labels("test")] * 0.55 + 0.15
    found = sections.suspected_labels(dataclasses.replace(run, network=network))
    assert (found["suspected"], found["credible"]) == (1, True)


def test_augmented_images_are_the_first_training_batch(reported):
    """The expected batch comes from a stream with the seed and the settings of the run."""
    run = read_run(reported, no_track)
    assert run.network is not None
    stream = pipeline.training_batches(
        run.network.dataset.loader,
        run.network.dataset.splits["train"],
        batch_size=8,
        augmentation=run.settings.augmentation,
        place="host",
        seed=run.config["seed"],
    )
    with stream as batches:
        batch = next(batches)
    shown = sorted((reported / "report" / "examples").glob("augmented_*.png"))
    for path, pixels in zip(shown, batch["image"], strict=True):
        right = np.asarray(Image.open(path).convert("RGB"))[:, -144:]
        np.testing.assert_array_equal(right, np.asarray(thumbnails.fit_to_square(pixels, 144)))
    names = [run.network.class_names[label] for label in batch["label"]]
    assert _metrics(reported)["augmentation"]["classes"] == names


def test_example_images_have_144_pixels(reported):
    figures = _metrics(reported)
    names = {shown["picture"] for shown in figures["mistakes"]["unsure"]}
    assert names
    for name in names:
        assert max(Image.open(reported / "report" / name).size) == 144
    pairs = sorted((reported / "report" / "examples").glob("augmented_*.png"))
    # The page shows all images of the first batch, and the batch size is 8.
    assert len(pairs) == 8 == len(figures["augmentation"]["classes"])
    pixels = np.asarray(Image.open(pairs[0]).convert("RGB"))
    assert pixels.shape == (144, 2 * 144 + 4, 3)
    assert not np.array_equal(pixels[:, :144], pixels[:, -144:])


def test_mistakes_are_divided_by_a_confidence_threshold(reported):
    found = _metrics(reported)["mistakes"]
    assert found["sure_threshold"] == pytest.approx(1 / 3 + 0.75 * 2 / 3)
    is_sure = [shown["confidence"] >= found["sure_threshold"] for shown in found["wrong"]]
    assert sum(is_sure) == found["num_sure"]
    text = _parsed(reported / "report" / "index.html").text
    none = (
        "None: no wrong test image has a confidence of 83.3 % or more. This limit is three" in text
    )
    assert none == (found["num_sure"] == 0 < found["num_wrong"])


def test_small_test_split_shows_command_for_more_seeds(run):
    text = _written(run).text
    small = _metrics(run)["summary"]["small_test_split"]
    assert f"--config={run}/config.json --workdir={run}-seed$seed --config.seed=$seed" in text
    assert small["words"] in text
    assert "stratify" not in small  # The run already uses data.stratify=exact.


@pytest.mark.usefixtures("undrawn")
def test_network_at_chance_passes_no_map_check(run, monkeypatch):
    def judge(predictor, images, classes, masks, methods):
        check = {"passes": True, "mean": 1.0, "random": 0.0, "centre": 0.0}
        randomization = check | {"rank_correlation": {"head": 0.1}}
        return {
            name: {
                "randomization": randomization,
                "deletion": dict(check),
                "insertion": dict(check),
            }
            for name in methods
        }

    monkeypatch.setattr(run_report.explanations.checks, "judge", judge)
    monkeypatch.setattr(run_report.explanations.checks, "why_no_verdict", lambda count: "")
    monkeypatch.setattr(run_report, "_FULL", {"explanations": run_report.explanations.explanations})
    for beats_chance in (True, False):
        monkeypatch.setattr(
            run_report.explanations.verdicts, "beats_chance", lambda *_, b=beats_chance: b
        )
        text = _parsed(write_report(run)).text
        found = _metrics(run)["explanations"]["methods"]
        passes = {
            check["passes"] for method in found.values() for check in method["checks"].values()
        }
        assert passes == ({True} if beats_chance else {None})
        assert ("passes randomization" in text) == beats_chance
        # Each section with maps repeats this sentence, so the page may contain it several times.
        assert (text.count("No verdict on the methods: the network is") > 0) != beats_chance


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ((True, True), "grad_cam"),
        ((False, True), "hires_cam"),
        ((False, False), "grad_cam"),
        ((None, None), "grad_cam"),
    ],
)
def test_maps_are_those_of_the_first_method_that_passes(passes, expected):
    judged = {
        name: {"randomization": {"passes": is_passed}, "insertion": {"passes": not is_passed}}
        for name, is_passed in zip(("grad_cam", "hires_cam"), passes, strict=True)
    }
    assert run_report.explanations._choose_method(judged) == expected


@pytest.mark.usefixtures("undrawn")
def test_time_after_training_is_shown_and_kept(run):
    write_report(run, detail="figures", after_training=True)
    spent = _metrics(run)["run"]["time"]
    parts = spent["parts"]
    assert list(parts) == ["measuring", "images", "charts", "other"]
    assert sum(parts.values()) == pytest.approx(spent["after_training"])
    assert spent["training"] == _metrics(run)["run"]["seconds"]
    assert spent["words"] in _written(run).text
    assert _metrics(run)["run"]["time"] == spent


def test_second_report_is_identical(run):
    contents = []
    for _ in range(2):
        _written(run)
        contents.append((run / "report" / "index.html").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.usefixtures("undrawn")
def test_device_of_training_is_kept(run):
    write_report(run, detail="figures", after_training=True)
    trained_on = _metrics(run)["run"]["trained_on"]
    assert trained_on["device"] == "8 x cpu"
    assert "8 x cpu" in _written(run).text
    assert _metrics(run)["run"]["trained_on"] == trained_on


@pytest.mark.usefixtures("undrawn")
def test_maps_are_shown_beside_the_images(run, monkeypatch):
    calls = []

    def maps(predictor, images, classes, method):
        calls.append((images.shape, images.dtype, len(classes), method))
        return np.broadcast_to(np.linspace(0, 1, 16, dtype=np.float32), images.shape[:3])

    monkeypatch.setattr(run_report.explanations, "maps", maps)
    # This test does not need the slow sections.
    monkeypatch.setattr(run_report, "_FULL", {})
    write_report(run)
    figures = _metrics(run)
    shown = {example["picture"] for example in sections.examples(figures)}
    assert calls == [((len(shown), 16, 16, 3), np.uint8, len(shown), "grad_cam")]
    for name in shown:
        path = run / "report" / name
        image = Image.open(path)
        under_map = Image.open(path.with_stem(f"{path.stem}_map"))
        assert under_map.size == image.size
        # The values of the map rise from left to right, so the colours go from violet to yellow.
        pixels = np.asarray(under_map.convert("RGB"), float).mean(axis=0)
        assert pixels[-1, 1] - pixels[0, 1] > 60
    page = (run / "report" / "index.html").read_text("utf-8")
    assert page.count("brighter places matter more") >= len(shown)


def test_matrix_rows_are_written_on_one_line(tmp_path):
    report = {
        "confusion": [[1, 2], [3, 4]],
        "nothing": [{}, [], None, True],
        "é": {"a": 0.1, "b": ["x", [1.5]]},
    }
    run_directory.write_metrics(tmp_path, report)
    text = (tmp_path / "report" / "metrics.json").read_text("utf-8")
    assert json.loads(text) == report
    assert text.startswith('{\n "confusion": [\n  [1, 2],\n  [3, 4]\n ],\n')
    assert '"é"' in text
    with pytest.raises(ValueError, match="Out of range float"):
        run_directory.write_metrics(tmp_path, {"a": float("nan")})
    assert json.loads((tmp_path / "report" / "metrics.json").read_text("utf-8")) == report


# Tests with missing, damaged or unsuitable input.


def test_moved_data_can_be_named(run, image_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)
    bundle = read_bundle(run / "bundle")
    gone = bundle.data | {"source": f"folder:{tmp_path / 'gone'}"}
    write_bundle(dataclasses.replace(bundle, data=gone), run / "bundle")
    write_report(run, detail="figures")
    assert "calibration" in _metrics(run)["missing"]
    write_report(run, detail="figures", source=f"folder:{moved}")
    assert set(_metrics(run)["missing"]) == FULL


def test_report_on_one_validation_image_and_unpredicted_class(tmp_path):
    write_images(tmp_path / "images", per_class=8)
    splits = ["train"] * 5 + ["validation"] + ["test"] * 2
    rows = [f"red/{i:03d}.png,red,{split}" for i, split in enumerate(splits)]
    rows += [f"blue/{i:03d}.png,blue,{split}" for i, split in enumerate(splits) if i != 5]
    table = tmp_path / "images" / "table.csv"
    table.write_text("\n".join(["path,label,split", *rows]))
    run = tmp_path / "run"
    train_and_evaluate(
        make_tiny_config("", **{"data.source": f"csv:{table}", "train.epochs": 1}), run
    )
    bundle = read_bundle(run / "bundle")
    bundle.variables["params"]["head"]["bias"] = np.array([100, 0], np.float32)
    write_bundle(bundle, run / "bundle")
    # Without metrics.json, the report measures everything again.
    (run / "report" / "metrics.json").unlink()

    text = _written(run).text
    figures = _metrics(run)
    assert figures["validation"]["count"] == 1
    assert figures["test"]["confusion"] == [[2, 0], [2, 0]]
    assert set(figures["missing"]) == FULL
    # The only validation image is red, and all images are predicted as blue.
    assert figures["curves"]["verdict"] == "at chance"
    assert "The network is not shown to be better than guessing on validation" in text
    assert "red is never predicted: of its 2 test images, 2 are predicted as blue; 5 of 10" in text
    assert "the network is not shown to be better than guessing." in text
    assert "Of 2 mistakes, 2 are images of red that are predicted as blue." in text
    assert "nan" not in text.lower()


def test_report_of_run_stopped_in_first_epoch(finished, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(finished / "config.json", workdir)
    (workdir / "metrics.jsonl").write_text("")
    page = _written(workdir)
    figures = _metrics(workdir)
    assert set(figures["missing"]) == SECTIONS | FULL | {"figures"}
    assert "There is no bundle, because the run is not finished." in page.text
    assert "No epoch has been completed, so there is no curve to draw." in page.text
    assert "There is no finished network to measure yet." in page.text
    assert page.images == []
    assert "0 of 3 epochs" in page.text


def test_report_of_run_stopped_later_has_curves(finished, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(finished / "config.json", workdir)
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    damaged = [lines[2][:40], lines[2].replace('"train_loss": ', '"train_loss": NaN, "x": '), "7"]
    (workdir / "metrics.jsonl").write_text("\n".join([*lines[:2], *damaged]))
    page = _written(workdir)
    figures = _metrics(workdir)
    assert set(figures["missing"]) == SECTIONS - {"curves"} | FULL | {"figures"}
    assert figures["curves"]["epoch"] == [1, 2]
    assert figures["curves"]["verdict"] == "not finished"
    assert "3 damaged lines of metrics.jsonl are not shown" in page.text
    # The page has three charts, each in two themes.
    assert len(page.images) == 6


@pytest.mark.usefixtures("undrawn")
def test_missing_data_is_reported_and_earlier_sections_stay(run, tmp_path):
    images = _written(run).images
    before = _metrics(run)
    _change_bundle(run, source=f"folder:{tmp_path / 'gone'}")
    page = _written(run)
    after = _metrics(run)
    assert f"The data cannot be read: folder:{tmp_path / 'gone'}: there is no" in page.text
    assert "The sections marked below are from an earlier report." in page.text
    assert page.text.count("The data cannot be read") == 1
    assert "This section is from an earlier report, for the reason at the top" in page.text
    assert page.images == images
    for name in SECTIONS:
        assert after[name] == before[name]
    assert set(after["missing"]) == SECTIONS - {"guessing", "curves", "confusion"} | FULL
    shutil.rmtree(run / "report" / "examples")
    assert _written(run).text.count("not available") == len(sections.examples(after))


@pytest.mark.usefixtures("undrawn")
def test_missing_data_before_any_report(run, tmp_path):
    _change_bundle(run, source=f"folder:{tmp_path / 'gone'}")
    page = _written(run)
    figures = _metrics(run)
    assert set(figures["missing"]) == SECTIONS - {"guessing", "curves", "confusion"} | FULL
    assert figures["summary"]["headline"] in page.text


def _change_augmentation(workdir, **changes):
    """Changes augmentation keys in config.json; the value None removes a key."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    augment = config["augment"] | changes
    config["augment"] = {key: value for key, value in augment.items() if value is not None}
    path.write_text(json.dumps(config))


@pytest.mark.usefixtures("undrawn")
def test_page_names_image_mixing(run):
    _change_augmentation(run, mixup_probability=0.25, flip="none", rotation=0, zoom=0, contrast=0)
    text = _written(run).text
    assert "Training images are also mixed (MixUp of 25% (alpha 0.2));" in text
    assert "Augmentation is off. Training also mixed the images of a batch" in text
    assert _metrics(run)["run"]["mixing"] == "MixUp of 25% (alpha 0.2)"


@pytest.mark.usefixtures("undrawn")
def test_configuration_without_mixing_keys_has_a_report(run):
    methods = ("mixup_probability", "mixup_alpha", "cutmix_probability", "cutmix_alpha")
    _change_augmentation(run, **dict.fromkeys(methods))
    assert "mixed" not in _written(run).text


@pytest.mark.usefixtures("undrawn")
def test_sections_of_unknown_format_are_dropped(reported, tmp_path):
    workdir = pathlib.Path(shutil.copytree(reported, tmp_path / "run"))
    _change_bundle(workdir, source=f"folder:{tmp_path / 'gone'}")
    figures = _metrics(workdir) | {"format": 0, "mistakes": {"unknown": 1}}
    (workdir / "report" / "metrics.json").write_text(json.dumps(figures))
    _written(workdir)
    assert "mistakes" not in _metrics(workdir)


@pytest.mark.usefixtures("undrawn")
def test_sections_of_an_older_format_are_dropped(run, tmp_path):
    """Sections of a metrics.json in an older format are dropped; split metrics are kept."""
    _written(run)
    _change_bundle(run, source=f"folder:{tmp_path / 'gone'}")
    figures = _metrics(run) | {"format": 1}
    del figures["mistakes"]["num_sure"], figures["mistakes"]["sure_threshold"]
    (run / "report" / "metrics.json").write_text(json.dumps(figures))
    assert f"folder:{tmp_path / 'gone'}: there is no" in _written(run).text
    after = _metrics(run)
    assert "mistakes" not in after
    assert after["test"] == figures["test"]


@pytest.mark.parametrize("failure", [RuntimeError("no room"), KeyboardInterrupt(), OSError("full")])
def test_failed_report_after_training_names_the_command(failure, tmp_path, monkeypatch, capfd):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(run_report, "_write", fail)
    command = f"cnn_jax report --run={tmp_path}"
    console = Console()
    if isinstance(failure, RuntimeError):
        assert run_report.report_after_training(tmp_path, make_tiny_config(""), console) == command
        shown = " ".join(capfd.readouterr().err.split())
        assert "no report: RuntimeError: no room; the run itself is complete" in shown
    else:
        with pytest.raises(type(failure)) as raised:
            run_report.report_after_training(tmp_path, make_tiny_config(""), console)
        assert (command in str(raised.value)) == isinstance(failure, KeyboardInterrupt)


@pytest.mark.usefixtures("undrawn")
def test_changed_data_is_reported_at_the_top(run, tmp_path):
    write_images(tmp_path / "images", per_class=20, seed=1)
    _change_bundle(run, source=f"folder:{tmp_path / 'images'}")
    warnings = []
    page = _parsed(write_report(run, detail="figures", warn=warnings.append))
    (warning,) = warnings
    assert "has changed since the network was trained on it: images were added" in warning
    assert page.text.index(warning) < page.text.index("The network classifies")


@pytest.mark.parametrize("kind", ["missing", "other"])
def test_unsuitable_source_is_an_error_and_report_stays(run, kind, tmp_path):
    if kind == "other":
        write_images(tmp_path / kind, per_class=20, seed=1)
    before = {path: path.read_bytes() for path in (run / "report").iterdir()}
    message = {
        "missing": "there is no",
        "other": "is not the data that the network was trained on",
    }
    with pytest.raises(DataError, match=message[kind]) as refused:
        write_report(run, source=f"folder:{tmp_path / kind}")
    assert "\n" not in str(refused.value)
    assert "have been" not in str(refused.value)
    assert before == {path: path.read_bytes() for path in (run / "report").iterdir()}


@pytest.mark.usefixtures("undrawn")
def test_class_without_test_images_has_dashes(run):
    path = run / "report" / "metrics.json"
    figures = json.loads(path.read_text("utf-8"))
    name = next(iter(figures["test"]["per_class"]))
    figures["test"]["confusion"][0] = [0] * len(figures["test"]["confusion"])
    figures["test"]["per_class"][name] = {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    path.write_text(json.dumps(figures))
    page = _written(run)
    assert f"The class {name} has no test images. It counts as 0" in page.text
    assert page.values[:4] == [-1, -1, -1, 0]
    assert page.text.count("\N{EN DASH}") == 3


@pytest.mark.usefixtures("undrawn")
def test_page_names_only_measured_checks_and_methods(reported):
    figures = _metrics(reported)
    text = texts.methods(figures)["explanations"]
    assert "Insertion" in text
    assert "Pointing game" not in text
    assert "Jiang" in text
    # Zhou et al. published CAM, which is not one of the methods of this report.
    assert "Zhou" not in text
    page = _parsed(reported / "report" / "index.html").text
    assert "pointing game" not in page.lower()
    assert "grad_cam" in page
    assert "grad-cam" not in page
    assert "never" in page or all(
        row["first_severity_10_points_lower"]
        for row in figures["robustness"]["corruptions"].values()
    )
    maps = figures["explanations"]["methods"]
    check = {"pointing_game": {}}
    with_both = {"methods": maps | {"cam": {"checks": check}}}
    assert "Pointing game" in texts.methods({"explanations": with_both})["explanations"]
    assert "Zhou" in texts.methods({"explanations": with_both})["explanations"]


def test_features_below_chance_level_do_not_stand_out(reported, monkeypatch):
    features = run_report.explanations.features
    run = read_run(reported, no_track)
    importance = np.linspace(-0.01, 0.02, 16)
    monkeypatch.setattr(features, "feature_importance", lambda *_: importance)
    found = run_report.explanations._features(run.network)
    assert (found["noise"], found["standing_out"], found["top"]) == (0.01, 0, [])
    importance = np.array([-0.01, 0.021, 0.03, 0.019])
    found = run_report.explanations._features(run.network)
    assert [top["feature"] for top in found["top"]] == [2, 1]


@pytest.mark.usefixtures("undrawn")
def test_damaged_bundle_is_reported(run):
    weights = run / "bundle" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    page = _written(run)
    assert "weights.safetensors is damaged" in page.text
    assert "calibration" in _metrics(run)["missing"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("content", ["{", '{"test": {"accuracy": 1}}'])
def test_lost_metrics_are_measured_again(run, content):
    before = _metrics(run)
    (run / "report" / "metrics.json").write_text(content)
    _written(run)
    after = _metrics(run)
    for split in before:
        assert after[split]["confusion"] == before[split]["confusion"]
        assert after[split]["loss"] == pytest.approx(before[split]["loss"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the folder of a run or an ensemble: there is no config.json"),
        ("{", "config.json cannot be read"),
        ("[]", "is not the configuration of a run of this version"),
        ('{"train": {}}', "is not the configuration of a run of this version"),
    ],
)
def test_folder_without_a_run_is_an_error(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        write_report(tmp_path)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "report").exists()


def test_hostile_names_are_escaped(tmp_path):
    root = tmp_path / "data"
    for number, name in enumerate(HOSTILE):
        (root / name).mkdir(parents=True)
        for i in range(6):
            noise = np.random.default_rng(10 * number + i).integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}{name}.png")
    config = make_tiny_config(root, **{"train.epochs": 1})
    train_and_evaluate(config, tmp_path / "run")
    page = _written(tmp_path / "run")
    assert page.elements.count("script") == 1
    assert not {"iframe", "object", "svg", "b"} & set(page.elements)
    for shown in (
        '<script>alert("1")<',
        r"new\nline",
        "'quotes\" & $x^$",
        "{{ 7 * 7 }}{% raw %}",
        r"😀 猫 \u202egnp",
        r"\udcff\udcfe",
    ):
        assert shown in page.text
    # A chart shows a number instead of a class name that the font cannot draw.
    assert "#1" in page.text
    names = {path.name for path in (tmp_path / "run" / "report").rglob("*")}
    assert all(name.isascii() for name in names)


# Tests of the command `report`.


def _command(*arguments):
    command = [sys.executable, "-m", "cnn_jax.report", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_command_prints_path_of_page(finished, tmp_path):
    shutil.copy(finished / "config.json", tmp_path)
    done = _command(f"--run={tmp_path}")
    page = tmp_path / "report" / "index.html"
    assert (done.returncode, done.stdout) == (0, f"{page}\n")
    assert page.is_file()
    assert "Traceback" not in done.stderr


def test_wrong_path_gives_one_line(tmp_path):
    done = _command(f"--run={tmp_path / 'nowhere'}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: --run: {tmp_path / 'nowhere'} is not the folder of a run or an ensemble: there "
        "is no config.json\n"
    )


# Tests of the page in a browser.


def page_url(reported):
    return (reported / "report" / "index.html").as_uri()


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_browser(browser, reported, width, scheme):
    show_at(browser, page_url(reported), width, scheme)
    assert browser.get_log("browser") == []
    images = browser.execute_script(
        "return [...document.images].map((image) => [image.complete && image.naturalWidth > 0,"
        " image.currentSrc, image.alt])"
    )
    assert len(images) > 20
    for is_loaded, source, alt in images:
        assert is_loaded
        assert source.startswith("data:")
        assert alt
    loaded = browser.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert not [name for name in loaded if not name.startswith("data:")]
    dark = run_report.style.data_uri(reported / "report" / "loss_dark.png")
    assert (dark in {source for _, source, _ in images}) == (scheme == "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_table_of_classes_can_be_sorted(browser, reported):
    show_at(browser, page_url(reported), 1200)
    rows = _metrics(reported)["test"]["per_class"]
    headings = browser.find_elements("css selector", "#classes table th button")
    assert [heading.text for heading in headings[:2]] == ["class", "F1"]

    def shown():
        cells = browser.find_elements("css selector", "#classes table tbody th")
        state = browser.execute_script(
            "return [...document.querySelectorAll('#classes table thead th')]"
            ".map((heading) => heading.getAttribute('aria-sort'))"
        )
        return [cell.text for cell in cells], state[:2]

    headings[1].click()
    names, state = shown()
    assert state == [None, "ascending"]
    assert [rows[name]["f1"] for name in names] == sorted(row["f1"] for row in rows.values())
    headings[1].send_keys("\ue007")  # This is the Enter key.
    names, state = shown()
    assert state == [None, "descending"]
    assert [rows[name]["f1"] for name in names] == sorted(
        (row["f1"] for row in rows.values()), reverse=True
    )
    headings[0].click()
    assert shown() == (sorted(rows), ["ascending", None])
