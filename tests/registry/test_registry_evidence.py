import dataclasses
import json

import numpy as np
import pytest
from bundles import make_bundle

from cnn_jax.data.dataset import Dataset
from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.evaluation import labelled_split, open_as_trained, predict_split
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.registry import __main__ as command
from cnn_jax.registry import evidence as module
from cnn_jax.registry.evidence import compare_versions, compare_with_history
from cnn_jax.registry.ledger import Gates, RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.system.errors import ConfigError, DataError


@pytest.fixture
def registry(tmp_path):
    """Three versions: 1 is the champion, 2 predicts the same classes, 3 is another network."""
    registry = Registry(tmp_path / "registry")
    for number, (seed, temperature) in enumerate([(0, 1.0), (0, 2.0), (3, 1.0)], 1):
        bundle = dataclasses.replace(make_bundle(seed), temperature=temperature)
        write_bundle(bundle, tmp_path / f"bundle-{number}")
        registry.add("colours", tmp_path / f"bundle-{number}")
    registry.promote("colours", 1)
    return registry


def promote(registry, *flags):
    command.main(["promote", "colours", *map(str, flags), f"--registry={registry.url}"])


def source_flags(folder):
    return ["--not_worse_than=champion", f"--on=folder:{folder}", "--split=all", "--margin=0.1"]


def correct_predictions(registry, number, source):
    """Returns whether the classes of all images are correct, computed with public functions."""
    version = registry.resolve("colours", number)
    predictor = BundlePredictor.load(registry.fetch(version, "unused"))
    dataset = open_as_trained(predictor, source, grouped=False)
    indices, labels = labelled_split(predictor, dataset, "all")
    return predict_split(predictor, dataset.loader, indices).argmax(axis=1) == labels


def test_an_equal_version_is_promoted_with_evidence(registry, image_folder, capsys):
    promote(registry, 2, *source_flags(image_folder))
    assert "passed: not_worse_than=champion: " in " ".join(capsys.readouterr().out.split())
    registry.refresh()
    assert registry.resolve("colours").number == 2
    evidence = registry.log[-1].evidence
    old = correct_predictions(registry, 1, f"folder:{image_folder}")
    assert evidence["is_not_worse"] is True
    assert (evidence["candidate"], evidence["alias"], evidence["reference"]) == (2, "champion", 1)
    assert (evidence["images"], evidence["gains"], evidence["losses"]) == (60, 0, 0)
    assert evidence["candidate_correct"] == evidence["reference_correct"] == old.sum()
    assert (evidence["margin"], evidence["level"], evidence["split"]) == (0.1, 0.05, "all")
    command.main(["show", "colours", "--json", f"--registry={registry.url}"])
    assert json.loads(capsys.readouterr().out)["log"][-1]["evidence"] == evidence


def test_the_counts_equal_those_of_separate_predictions(registry, image_folder):
    source = f"folder:{image_folder}"
    new, old = (correct_predictions(registry, number, source) for number in (3, 1))
    assert (new != old).any()
    candidate = registry.resolve("colours", 3)
    evidence = compare_versions(registry, candidate, "champion", source, 0.1, "all")
    assert (evidence.gains, evidence.losses) == ((new & ~old).sum(), (old & ~new).sum())
    assert (evidence.candidate_correct, evidence.reference_correct) == (new.sum(), old.sum())
    assert sum(images for images, _, _ in evidence.classes.values()) <= 60


def test_a_worse_version_is_refused(registry, image_folder):
    """Which of the two networks is worse is decided by their predictions."""
    source = f"folder:{image_folder}"
    accuracy = {n: correct_predictions(registry, n, source).mean() for n in (1, 3)}
    worse, better = sorted(accuracy, key=accuracy.__getitem__)
    assert accuracy[worse] < accuracy[better]
    registry.promote("colours", better)
    entries = len(registry.log)
    with pytest.raises(RegistryError, match=rf"^colours/{worse} does not become champion: not_wor"):
        promote(registry, worse, *source_flags(image_folder))
    registry.refresh()
    assert len(registry.log) == entries


def add_divided(registry, folder, seed, fractions, **data):
    """Adds a version whose training data was divided in this way; `data` changes its facts."""
    bundle = make_bundle(seed)
    bundle.data["division"] |= {"seed": seed, "fractions": fractions}
    bundle.data.update(data)
    write_bundle(bundle, folder / f"divided-{seed}")
    return registry.add("divided", folder / f"divided-{seed}").version


def test_only_test_images_of_both_versions_are_used(registry, image_folder, tmp_path):
    """The second version divides the images with another seed."""
    source, tests = f"folder:{image_folder}", []
    for seed in (0, 7):
        version = add_divided(registry, tmp_path, seed, [0.3, 0.2, 0.5])
        predictor = BundlePredictor.load(registry.fetch(version, "unused"))
        dataset = open_as_trained(predictor, source)
        tests.append({dataset.source.ids[i] for i in dataset.splits["test"]})
    registry.promote("divided", 1)
    evidence = compare_versions(registry, version, "champion", source, 0.1)
    assert evidence.images == len(tests[0] & tests[1])
    assert 0 < evidence.images < len(tests[0])


def test_versions_without_common_test_images_are_not_compared(registry, image_folder, tmp_path):
    for seed in (0, 1):
        version = add_divided(registry, tmp_path, seed, [0.78, 0.2, 0.02])
    registry.promote("divided", 1)
    with pytest.raises(DataError, match="has no image that is in the test split of both versions"):
        compare_versions(registry, version, "champion", f"folder:{image_folder}", 0.1)


def measured(monkeypatch, results, logged=()):
    """Replaces the predictions of versions.

    Args:
      monkeypatch: The fixture.
      results: For each version, whether it classifies each image correctly, by id.
      logged: The ids of the images of the request log.
    """

    def measure(version, *_, **__):
        is_correct = results[version.number]
        labels = dict.fromkeys(is_correct, "red")
        return module._Measured(version, is_correct, labels, {*logged} & {*is_correct})

    monkeypatch.setattr(module, "_open", lambda *_: (None, None))
    monkeypatch.setattr(module, "_load", lambda *_: None)
    monkeypatch.setattr(module, "_measure", measure)


def first_correct(count, correct, name="image"):
    """Returns results of `count` images, of which the first ones are correct."""
    return {f"{name}{i}": bool(i < correct) for i in range(count)}


def test_the_best_version_is_found_on_shared_images(registry, monkeypatch):
    """Version 3 is better on the images of the candidate, and bad on other images."""
    others = first_correct(400, 0, "other")
    results = {1: first_correct(200, 160), 2: first_correct(200, 165)}
    results[3] = others | first_correct(100, 99)
    measured(monkeypatch, results)
    candidate, dataset = registry.resolve("colours", 2), object.__new__(Dataset)
    arguments = registry, candidate, "champion", "shapes", dataset, 0.1
    found = compare_with_history(*arguments, [3])
    assert found.reference == 1
    assert (found.best.reference, found.best.images) == (3, 100)
    alone = compare_with_history(*arguments)
    assert alone.best is None


def test_gains_on_logged_images_do_not_hide_losses_on_others(registry, monkeypatch):
    """The labels of the log are mistakes of the champion, so any other version is better there."""
    old, new = np.random.default_rng(0).random((2, 1000)) < [[0.94], [0.91]]
    images = {
        number: {f"image{i}": correct for i, correct in enumerate(row.tolist())}
        for number, row in ((1, old), (2, new))
    }
    logged = {
        number: {f"log/{i}": correct for i in range(100)}
        for number, correct in ((1, False), (2, True))
    }
    measured(monkeypatch, {n: images[n] | logged[n] for n in images}, logged[1])
    candidate = registry.resolve("colours", 2)
    found = compare_versions(registry, candidate, "champion", "shapes", 0.01)
    assert (found.images, found.is_not_worse) == (1100, True)
    assert (found.without_log.images, found.without_log.is_not_worse) == (1000, False)
    assert list(found.comparisons.values()) == [True, False]
    with pytest.raises(RegistryError, match="champion without the logged images: "):
        registry.promote("colours", 2, gates=Gates(evidence=found))
    measured(monkeypatch, images)
    assert compare_versions(registry, candidate, "champion", "shapes", 0.01).without_log is None


def test_the_first_version_of_an_alias_needs_no_evidence(registry, image_folder, capsys):
    flags = ["--alias=mine", "--not_worse_than=mine", "--on=folder:/nowhere"]
    promote(registry, 1, *flags)
    assert "because colours@mine does not exist yet" in capsys.readouterr().err
    promote(registry, 1, *flags)
    registry.refresh()
    assert registry.resolve("colours", "mine").number == 1
    with pytest.raises(RegistryError, match="has no alias nobody"):
        promote(registry, 2, "--not_worse_than=nobody", "--on=folder:/nowhere")


def test_training_images_are_no_evidence(registry, image_folder, tmp_path):
    source = f"folder:{image_folder}"
    version = add_divided(registry, tmp_path, 0, [0.5, 0.2, 0.3], source=source)
    registry.promote("divided", 1)
    with pytest.raises(DataError, match="is the data that a version was trained on: compare with"):
        compare_versions(registry, version, "champion", source, 0.1, "all")


def test_other_gates_are_checked_before_predictions(registry):
    with pytest.raises(RegistryError, match=r"min_accuracy=0\.9: test accuracy is 0.5"):
        promote(registry, 2, "--min_accuracy=0.9", *source_flags("/nowhere"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--not_worse_than=champion"], "--not_worse_than and --on must be given together"),
        (["--on=folder:/data"], "--not_worse_than and --on must be given together"),
        (["--margin=0.1"], "--margin needs --not_worse_than and --on"),
        (["--split=all"], "--split needs --not_worse_than and --on"),
        (["--margin=0"], "--margin: must be at least 0.0001 and below 1, got '0'"),
        (["--margin=1"], "--margin: must be at least 0.0001 and below 1, got '1'"),
        (["--split=train"], "--split: "),
    ],
)
def test_wrong_flags_are_usage_errors(registry, flags, message):
    with pytest.raises(ConfigError) as raised:
        promote(registry, 2, *flags)
    assert message in str(raised.value)


def test_an_unknown_class_is_an_error(registry, image_folder, tmp_path):
    folder = tmp_path / "images"
    (folder / "purple").mkdir(parents=True)
    for path in (image_folder / "red").iterdir():
        (folder / "purple" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="does not know: purple"):
        promote(registry, 2, *source_flags(folder))
    registry.refresh()
    assert registry.resolve("colours").number == 1
