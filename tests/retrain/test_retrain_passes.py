"""Tests of single passes: reasons, refusals, repetition, splits, and bad input."""

import dataclasses
import json
import shutil
import time

import numpy as np
import pytest
from bundles import make_bundle
from PIL import Image
from request_logs import write_images_to_log, write_labels

from cnn_jax.config import files
from cnn_jax.data import dataset
from cnn_jax.data.decode import pixel_digest
from cnn_jax.data.labelled_log import read_known, read_snapshot
from cnn_jax.experiment.analysis import analyse_pairs
from cnn_jax.inference.bundle import (
    Ensemble,
    digest,
    read_bundle,
    write_bundle,
    write_ensemble,
)
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.quality import noninferiority
from cnn_jax.registry import evidence
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.split import Split
from cnn_jax.retrain import __main__ as command
from cnn_jax.retrain import attempts, passes
from cnn_jax.system.errors import BundleError, ConfigError, DataError, TrainingError
from experiments.checks.chaos_retrain import (
    CLASSES,
    MODEL,
    pass_flags,
    prepare,
    write_log,
)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Data, a registry whose version 1 is the champion, and a log with 150 labelled images."""
    folder = tmp_path_factory.mktemp("retrain") / "template"
    folder.mkdir()
    prepare(folder)
    return folder


@pytest.fixture
def world(template, tmp_path):
    shutil.copytree(template, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def quick(monkeypatch):
    """Replaces training by copying a bundle, so that tests of decisions are quick.

    Returns a dictionary: "bundle" is the bundle to copy, "calls" counts the trainings, and "after"
    is called with the new bundle after a training.
    """
    state = {"calls": 0, "bundle": None, "error": None, "after": None}

    def train_and_evaluate(config, workdir, console=None):
        state["calls"] += 1
        if state["error"] is not None:
            raise state["error"]
        bundle = state["bundle"] or config.checkpoint.init_from
        own = read_bundle(bundle)
        # The run has its own metrics, so its bundle has its own digest.
        metrics = own.metrics | {"calls": {"number": state["calls"]}}
        record = json.loads((workdir.parent / "attempt.json").read_text())
        data = own.data | {"source": config.data.source, "fingerprint": record["data"]}
        write_bundle(dataclasses.replace(own, metrics=metrics, data=data), workdir / "bundle")
        if state["after"] is not None:
            state["after"](workdir / "bundle")

    monkeypatch.setattr(passes, "train_and_evaluate", train_and_evaluate)
    return state


def retrain(world, capsys, *flags):
    """Makes a pass; returns the exit code and the printed JSON."""
    code = 0
    try:
        command.main([*pass_flags(world), "--json", *flags])
    except SystemExit as end:
        code = end.code
    return code, json.loads(capsys.readouterr().out)


def actions(world):
    return [entry.action for entry in Registry(world / "registry").log]


def spoil(world, seed=1):
    """Writes a bundle of an untrained network for the same data; returns its folder."""
    champion = read_bundle(world / "run" / "bundle")
    names = tuple(champion.class_names)
    other = dataclasses.replace(
        champion, model=make_bundle().model, variables=make_bundle(seed, names).variables
    )
    write_bundle(other, world.parent / "spoilt")
    return world.parent / "spoilt"


def promote_bad(world, capsys, quick, monkeypatch):
    """Makes a pass promote an untrained network as version 2; returns the path of the record."""

    def accept(*arguments):
        return dataclasses.replace(noninferiority.compare(*arguments), is_not_worse=True)

    with monkeypatch.context() as patch:
        patch.setattr(evidence, "compare", accept)
        quick["bundle"] = spoil(world)
        assert retrain(world, capsys)[1]["action"] == "promoted"
    quick["bundle"] = None
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    return path


def test_a_pass_trains_from_the_champion_and_promotes(world, capsys):
    """The training itself is real here; the run starts with the weights of the champion."""
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "promoted"), result
    record = result["attempt"]
    assert (record["labelled"], record["new"], record["champion"]) == (150, 150, 1)
    assert record["triggers"] == ["labels"]
    registry = Registry(world / "registry")
    promotion = registry.log[-1]
    assert promotion.evidence == record["evidence"]
    assert promotion.evidence["is_not_worse"] is True
    assert promotion.evidence["candidate_correct"] > promotion.evidence["reference_correct"]
    attempt = world / "state" / "attempts" / record["key"][:16]
    assert json.loads((attempt / "attempt.json").read_text()) == record
    assert digest(attempt / "run" / "bundle") == record["digest"]
    assert record["digest"] == registry.resolve(MODEL).bundle.digest
    config = files.read(attempt / "config.json")
    assert digest(config.checkpoint.init_from) == registry.resolve(MODEL, 1).bundle.digest
    assert config.train.epochs == passes.EPOCHS
    assert config.data.source == f"folder:{world / 'images'}+log:{attempt / 'data'}"
    assert len(read_snapshot(attempt / "data")) == 150

    # The splits of the champion's images are the same, and its test split has grown.
    old, new = (
        open_as_trained(BundlePredictor.load(registry.fetch(registry.resolve(MODEL, number), "x")))
        for number in (1, 2)
    )
    for split, indices in old.splits.items():
        before = {old.source.ids[i] for i in indices}
        after = {new.source.ids[i] for i in new.splits[split]}
        assert before < after
        assert all(name.startswith("log/") for name in after - before)

    # The same data again: nothing is trained, added or promoted.
    before = actions(world)
    code, again = retrain(world, capsys, "--when=always")
    assert (code, again["action"]) == (0, "nothing")
    assert "the same data and configuration were promoted on" in again["text"]
    assert actions(world) == before == ["add", "promote", "add", "promote"]


@pytest.mark.parametrize(
    ("flags", "labels", "text"),
    [
        (["--when=labels", "--min_new=151"], 150, "150 new labelled images (--min_new=151)"),
        (["--when=harm"], 150, "monitor: no data"),
        (["--when=always"], 0, "no labelled image in the log"),
    ],
)
def test_without_a_reason_nothing_is_trained(world, capsys, quick, flags, labels, text):
    if not labels:
        for path in (world / "log" / "feedback").iterdir():
            path.unlink()
    if flags == ["--when=harm"]:
        flags = [*flags, "--window=160"]
    code, result = retrain(world, capsys, *flags)
    assert (code, result["action"], result["attempt"]) == (0, "nothing", None)
    assert result["text"].startswith("nothing to do: ")
    assert text in result["text"]
    assert quick["calls"] == 0
    assert not list((world / "state" / "attempts").iterdir())


def log_images(world, images, labels, when=1):
    """Writes labelled images to the log, by numbers for their request ids."""
    write_images_to_log(world / "log", images, model=MODEL)
    write_labels(world / "log", labels, when=when)


def random_images(numbers, size=16):
    shape = size, size, 3
    return {i: np.random.default_rng(i).integers(0, 256, shape, np.uint8) for i in numbers}


def test_only_new_images_that_training_uses_count(world, capsys, quick, monkeypatch):
    paths = sorted((world / "images" / "red").iterdir())
    copies = {number: np.asarray(Image.open(path)) for number, path in enumerate(paths[:30])}
    log_images(world, copies, dict.fromkeys(copies, "blue"))
    unknown = random_images(range(100, 130))
    log_images(world, unknown, dict.fromkeys(unknown, "pink"))
    text = "nothing to do: 150 new labelled images (--min_new=151)"
    assert retrain(world, capsys, "--min_new=151")[1]["text"] == text
    record = retrain(world, capsys, "--min_new=150")[1]["attempt"]
    assert (record["labelled"], record["new"]) == (150, 150)
    assert sum(record["logged"].values()) == 150
    # Afterwards, the images are known, so the data is not opened to count them.
    write_labels(world / "log", dict.fromkeys(copies, "green"), when=2)
    write_labels(world / "log", dict.fromkeys(unknown, "violet"), when=2)
    log_images(world, random_images(range(200, 205)), dict.fromkeys(range(200, 205), "red"))
    examples = read_snapshot(next(world.glob("state/attempts/*/data")))
    other = next(i for i, label in enumerate(examples.labels) if label == "red")
    request = examples.requests[other].partition("/")[0]
    write_labels(world / "log", {request: "blue"}, when=time.time())
    with monkeypatch.context() as patch:
        patch.setattr(passes._Pass, "_begin", None)
        text = "nothing to do: 6 new labelled images (--min_new=7)"
        assert retrain(world, capsys, "--min_new=7")[1]["text"] == text
    record = retrain(world, capsys, "--min_new=6")[1]["attempt"]
    assert (record["labelled"], record["new"]) == (155, 6)


def test_images_of_another_size_than_the_network_reads_are_left_out(world, capsys, quick):
    """A person has promoted a network with another image size."""
    champion = read_bundle(world / "run" / "bundle")
    larger = dataclasses.replace(champion.preprocessing, image_size=(24, 24))
    write_bundle(dataclasses.replace(champion, preprocessing=larger), world / "larger")
    registry = Registry(world / "registry")
    registry.promote(MODEL, registry.add(MODEL, world / "larger").version.number)
    text = "nothing to do: no labelled image in the log; 150 logged images of another size"
    assert retrain(world, capsys, "--when=always")[1]["text"] == text
    images = random_images(range(120), size=24)
    log_images(world, images, {number: CLASSES[number % 3] for number in images})
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "promoted")
    assert (result["attempt"]["labelled"], result["attempt"]["new"]) == (120, 120)


def test_harm_needs_one_new_label_and_more_after_a_refusal(world, capsys, quick):
    """Without the second condition, each new label would allow another attempt."""
    harm = ("--when=harm", "--window=50", "--min_new=100")
    quick["bundle"] = spoil(world)
    code, result = retrain(world, capsys, *harm)
    assert (code, result["action"]) == (3, "refused")
    assert result["attempt"]["triggers"] == ["harm"]
    write_log(world / "log", world / "run" / "bundle", 60, seed=3)
    code, result = retrain(world, capsys, *harm)
    assert (code, result["action"]) == (0, "nothing")
    assert "60 new labelled images (--min_new=100); monitor: harm" in result["text"]
    write_log(world / "log", world / "run" / "bundle", 60, seed=4)
    assert retrain(world, capsys, *harm)[0] == 3
    assert quick["calls"] == 2


def test_a_refused_attempt_is_not_repeated_until_it_is_lucky(world, capsys, quick):
    quick["bundle"] = spoil(world)
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (3, "refused")
    assert "not_worse_than=champion: " in result["text"]
    assert Registry(world / "registry").resolve(MODEL).number == 1
    assert actions(world) == ["add", "promote", "add"]
    quick["bundle"] = None
    always = "--when=always"
    for flags in (
        [],
        [always],
        [always, "--margin=0.5"],
        [always, "--config.seed=1"],
        [always, "--config.precision=float32"],
    ):
        code, result = retrain(world, capsys, *flags)
        assert (code, result["action"]) == (0, "nothing"), flags
    # Another champion is no reason to try the same again, and another configuration is.
    other = dataclasses.replace(read_bundle(world / "run" / "bundle"), temperature=2.0)
    write_bundle(other, world / "other")
    registry = Registry(world / "registry")
    registry.promote(MODEL, registry.add(MODEL, world / "other").version.number)
    assert retrain(world, capsys, "--when=always")[1]["action"] == "nothing"
    flags = ("--when=always", "--config.train.epochs=1")
    assert retrain(world, capsys, *flags)[1]["action"] == "promoted"
    assert quick["calls"] == 2


def test_a_diverged_training_is_refused(world, capsys, quick):
    quick["error"] = passes.DivergedError("the loss is infinite")
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (3, "refused")
    assert "the training diverged: the loss is infinite" in result["text"]
    assert retrain(world, capsys, "--when=always")[1]["action"] == "nothing"
    assert quick["calls"] == 1


def test_an_attempt_after_another_error_is_continued(world, capsys, quick):
    """New labels and other flags do not change the attempt that is continued."""
    quick["error"] = TrainingError("the disk is full")
    with pytest.raises(TrainingError):
        retrain(world, capsys)
    (folder,) = (world / "state" / "attempts").iterdir()
    write_log(world / "log", world / "run" / "bundle", 40, seed=3)
    quick["error"] = None
    flags = ("--config.train.epochs=9", "--min_new=1000", "--margin=0.5")
    code, result = retrain(world, capsys, *flags)
    assert (code, result["action"]) == (0, "promoted")
    assert (result["attempt"]["labelled"], result["attempt"]["evidence"]["margin"]) == (150, 0.1)
    assert result["attempt"]["key"].startswith(folder.name)


def test_an_attempt_whose_data_has_changed_is_given_up(world, capsys, quick, caplog):
    quick["error"] = TrainingError("the disk is full")
    with pytest.raises(TrainingError):
        retrain(world, capsys)
    (folder,) = (world / "state" / "attempts").iterdir()
    next((world / "images" / "red").iterdir()).unlink()
    quick["error"] = None
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "promoted")
    assert f"the attempt {folder.name} is given up, because " in caplog.text
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["class", "bundle"])
def test_an_attempt_whose_data_changes_in_training_is_given_up(world, capsys, quick, kind):
    """Otherwise, images of its training could be in the test split of its judgement."""

    def change(bundle):
        if kind == "class":
            path = next((world / "images" / "red").iterdir())
            path.rename(world / "images" / "blue" / f"new-{path.name}")
        else:  # The data was different only during the training.
            own = read_bundle(bundle)
            data = own.data | {"fingerprint": "0" * 64}
            write_bundle(dataclasses.replace(own, data=data), bundle)

    quick["after"] = change
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "nothing")
    assert "is given up, because" in result["text"]
    assert actions(world) == ["add", "promote"]
    assert not list((world / "state" / "attempts").iterdir())
    quick["after"] = None
    assert retrain(world, capsys)[1]["action"] == "promoted"


def test_a_version_must_not_be_worse_than_the_best_earlier_one(world, capsys, quick, monkeypatch):
    """Version 2 is a little worse than version 1; version 3 than version 2. Losses add up."""
    registry = Registry(world / "registry")
    correct = {1: 40, 2: 38, 3: 35}
    measure = evidence._measure

    def measure_fewer(version, *arguments, **options):
        found = measure(version, *arguments, **options)
        ids = sorted(found.is_correct)
        assert len(ids) > 40
        is_correct = {one: i < correct[version.number] for i, one in enumerate(ids)}
        return dataclasses.replace(found, is_correct=is_correct)

    monkeypatch.setattr(evidence, "_measure", measure_fewer)
    assert retrain(world, capsys)[1]["action"] == "promoted"
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (3, "refused"), result
    found = result["attempt"]["evidence"]
    assert (found["reference"], found["is_not_worse"]) == (2, True)
    assert (found["best"]["reference"], found["best"]["is_not_worse"]) == (1, False)
    assert result["attempt"]["reason"].startswith("not worse than the best earlier champion: ")
    registry.refresh()
    assert registry.resolve(MODEL).number == 2


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_promoted_version_is_watched_and_rolled_back_once(
    world, capsys, quick, monkeypatch, is_killed
):
    def kill(*_, **__):
        raise KeyboardInterrupt

    path = promote_bad(world, capsys, quick, monkeypatch)
    registry = Registry(world / "registry")
    assert retrain(world, capsys)[1]["action"] == "nothing"  # There are no labels yet.
    watch = json.loads(path.read_text())["watch"]
    assert watch["images"] == 0
    assert watch["reason"].startswith("since the promotion, no image of the random sample")
    write_log(world / "log", path.parent / "run" / "bundle", 80, noise=0, seed=5)
    if is_killed:
        with monkeypatch.context() as patch:
            patch.setattr(attempts.Attempt, "end", kill)
            with pytest.raises(KeyboardInterrupt):
                retrain(world, capsys)
    else:
        code, result = retrain(world, capsys)
        assert (code, result["action"]) == (3, "rolled_back")
        assert result["attempt"]["watch"]["decision"] == "worse"
    assert registry.refresh()
    assert registry.resolve(MODEL).number == 1
    assert registry.log[-1].note.startswith("retrain: worse than version 1 on 80 labelled images")
    before = actions(world)
    assert retrain(world, capsys)[1]["action"] == "nothing"
    assert actions(world) == before
    assert json.loads(path.read_text())["status"] == "rolled_back"


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (passes, "write_snapshot"),
        (attempts.State, "begin"),
        (passes, "train_and_evaluate"),
        (Registry, "add"),
        (Registry, "promote"),
        (attempts.Attempt, "end"),
    ],
)
def test_a_pass_that_dies_after_a_step_is_completed(world, capsys, quick, monkeypatch, owner, name):
    with monkeypatch.context() as patch:
        function = getattr(owner, name)

        def die(*arguments, **options):
            function(*arguments, **options)
            raise KeyboardInterrupt

        patch.setattr(owner, name, die)
        with pytest.raises(KeyboardInterrupt):
            retrain(world, capsys)
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "nothing" if name == "end" else "promoted")
    assert actions(world) == ["add", "promote", "add", "promote"]
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["version"]) == ("promoted", 2)
    assert record["evidence"] == Registry(world / "registry").log[-1].evidence
    assert ("watch" in record) == (name == "end")


def test_a_good_version_stays_and_its_comparison_is_recorded(world, capsys, quick, monkeypatch):
    """The comparison is made again only if there are new labels."""
    calls = []

    def replay(*arguments, **options):
        calls.append(arguments)
        return passes_replay(*arguments, **options)

    passes_replay = passes.replay
    monkeypatch.setattr(passes, "replay", replay)
    assert retrain(world, capsys)[1]["action"] == "promoted"
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    for count in (30, 40):
        write_log(world / "log", path.parent / "run" / "bundle", count, noise=0, seed=count)
        for _ in range(2):
            assert retrain(world, capsys)[1]["action"] == "nothing"
            watch = json.loads(path.read_text())["watch"]
    assert (watch["images"], watch["decision"], len(calls)) == (70, "none", 2)
    assert Registry(world / "registry").resolve(MODEL).number == 2


def test_labels_of_mistakes_only_never_roll_a_version_back(world, capsys, quick, monkeypatch):
    """Users report twelve mistakes of the champion, and none of the version before."""
    path = promote_bad(world, capsys, quick, monkeypatch)
    bundle = path.parent / "run" / "bundle"
    write_log(world / "log", bundle, 400, noise=0, seed=5, mistakes=12)
    registry = Registry(world / "registry")
    versions = registry.resolve(MODEL, 2), registry.resolve(MODEL, 1)
    biased = passes.replay(registry, *versions, [world / "log"])
    assert biased["images"] == 12
    assert biased["e_value_worse"] > biased["threshold"]
    assert retrain(world, capsys)[1]["action"] == "nothing"
    assert json.loads(path.read_text())["watch"]["images"] < 8
    assert Registry(world / "registry").resolve(MODEL).number == 2


def test_a_version_that_was_better_first_is_rolled_back(world, capsys, quick, monkeypatch):
    pairs = np.array(20 * [(True, False)] + 300 * [(False, True)])
    found = analyse_pairs(pairs)
    assert found["decision"] == "better"
    assert retrain(world, capsys)[1]["action"] == "promoted"
    monkeypatch.setattr(passes, "replay", lambda *_, **__: found)
    assert retrain(world, capsys)[1]["action"] == "rolled_back"


@pytest.mark.parametrize("is_late", [False, True])
def test_a_promotion_by_a_person_is_never_undone(world, capsys, quick, monkeypatch, is_late):
    """The person promotes the version again, before the pass or during its comparison."""
    path = promote_bad(world, capsys, quick, monkeypatch)
    write_log(world / "log", path.parent / "run" / "bundle", 80, noise=0, seed=5)
    passes_replay = passes.replay

    def promote_again():
        registry = Registry(world / "registry")
        registry.rollback(MODEL)
        registry.promote(MODEL, 2, note="keep this")

    def replay(*arguments, **options):
        promote_again()
        return passes_replay(*arguments, **options)

    if is_late:
        monkeypatch.setattr(passes, "replay", replay)
    else:
        promote_again()
    assert retrain(world, capsys)[1]["action"] == "nothing"
    assert Registry(world / "registry").log[-1].note == "keep this"


def test_a_promoted_version_is_watched_without_its_state_folder(world, capsys, quick, monkeypatch):
    path = promote_bad(world, capsys, quick, monkeypatch)
    write_log(world / "log", path.parent / "run" / "bundle", 80, noise=0, seed=5)
    code, result = retrain(world, capsys, f"--state={world / 'other'}")
    assert (code, result["action"], result["attempt"]) == (3, "rolled_back", None)
    assert Registry(world / "registry").resolve(MODEL).number == 1


def test_another_state_folder_gives_no_second_try(world, capsys, quick):
    quick["bundle"] = spoil(world)
    assert retrain(world, capsys)[1]["action"] == "refused"
    quick["bundle"] = None
    before = actions(world)
    code, result = retrain(world, capsys, f"--state={world / 'other'}", "--when=always")
    assert (code, result["action"]) == (0, "nothing")
    assert "the same data and configuration gave colours/2 before" in result["text"]
    assert (actions(world), quick["calls"]) == (before, 1)


def test_two_passes_at_the_same_time_promote_once(world, capsys, quick, monkeypatch):
    """The pass with the other state folder ends while the first one is training."""
    train = passes.train_and_evaluate

    def train_twice(config, workdir, console=None):
        train(config, workdir, console)
        monkeypatch.setattr(passes, "train_and_evaluate", train)
        assert retrain(world, capsys, f"--state={world / 'other'}")[1]["action"] == "promoted"

    monkeypatch.setattr(passes, "train_and_evaluate", train_twice)
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "nothing")
    assert actions(world).count("promote") == 2


def test_a_damaged_earlier_version_does_not_stop_the_loop(world, capsys, quick, caplog):
    """Version 1 is the predecessor that the watch needs, and an earlier champion."""
    assert retrain(world, capsys)[1]["action"] == "promoted"
    registry = Registry(world / "registry")
    weights = world / "registry" / registry.resolve(MODEL, 1).bundle.path / "weights.safetensors"
    weights.write_bytes(b"x" + weights.read_bytes()[1:])
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    write_log(world / "log", path.parent / "run" / "bundle", 120, seed=3)
    assert retrain(world, capsys)[1]["action"] == "promoted"
    assert "colours/2 is not watched: " in caplog.text
    assert "colours/1 is not compared: " in caplog.text
    assert registry.refresh()
    assert registry.resolve(MODEL).number == 3


def test_a_champion_that_cannot_be_compared_ends_the_attempt(world, capsys, quick):
    """A person promotes a network for other classes while the training is interrupted."""
    quick["error"] = TrainingError("the disk is full")
    with pytest.raises(TrainingError):
        retrain(world, capsys)
    quick["error"] = None
    registry = Registry(world / "registry")
    write_bundle(make_bundle(class_names=("cat", "dog", "eel")), world / "animals")
    registry.promote(MODEL, registry.add(MODEL, world / "animals").version.number)
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (3, "refused")
    assert result["attempt"]["reason"].startswith("colours/2 cannot be compared: ")


def test_a_version_with_unknown_training_data_is_not_compared(
    world, capsys, quick, monkeypatch, caplog
):
    """Version 1 has perhaps seen the test images; version 2 is the champion at the start."""
    registry = Registry(world / "registry")
    other = dataclasses.replace(read_bundle(world / "run" / "bundle"), temperature=2.0)
    write_bundle(other, world / "other")
    registry.promote(MODEL, registry.add(MODEL, world / "other").version.number)
    opened = []
    measure = evidence._measure

    def measure_and_note(version, *arguments, **options):
        opened.append(version.number)
        return measure(version, *arguments, **options)

    monkeypatch.setattr(evidence, "_measure", measure_and_note)
    assert retrain(world, capsys)[1]["action"] == "promoted"
    assert opened == [3, 2]
    assert "versions 1 of colours are not compared" in caplog.text
    # Only the latest of the known versions are compared.
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    monkeypatch.setattr(passes, "_HISTORY", 0)
    assert retrain(world, capsys)[1]["action"] == "promoted"
    assert opened == [3, 2, 4, 3]


def test_a_rollback_before_the_record_is_written_is_reported(world, capsys, quick, monkeypatch):
    """The pass is killed after the promotion, and a person rolls back before the next pass."""

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attempts.Attempt, "end", kill)
        with pytest.raises(KeyboardInterrupt):
            retrain(world, capsys)
    Registry(world / "registry").rollback(MODEL, note="users complained")
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (3, "rolled_back")
    assert "colours/2 was rolled back: users complained" in result["text"]


def test_the_champion_is_read_after_the_folder_is_locked(world, capsys, quick, monkeypatch):
    other = dataclasses.replace(read_bundle(world / "run" / "bundle"), temperature=2.0)
    write_bundle(other, world / "other")
    open_state = passes.open_state

    def promote_and_open(*arguments):
        registry = Registry(world / "registry")
        registry.promote(MODEL, registry.add(MODEL, world / "other").version.number)
        return open_state(*arguments)

    monkeypatch.setattr(passes, "open_state", promote_and_open)
    assert retrain(world, capsys)[1]["attempt"]["champion"] == 2


def test_a_rollback_by_a_person_is_recorded(world, capsys, quick):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    Registry(world / "registry").rollback(MODEL, note="users complained")
    assert retrain(world, capsys)[1]["action"] == "nothing"
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["reason"]) == ("rolled_back", "users complained")


@pytest.mark.parametrize("is_late", [False, True])
def test_a_running_experiment_is_not_ended(world, capsys, quick, monkeypatch, is_late):
    """The experiment starts before the pass, or during its comparison."""
    registry = Registry(world / "registry")
    other = registry.add(MODEL, spoil(world)).version
    split = Split(
        name="blue", salt="x", fraction=0.5, outcome="reward", window=60.0, is_shadow=False
    )
    compare = passes.compare_with_history

    def start_and_compare(*arguments, **options):
        registry.start_experiment(MODEL, other.number, split)
        return compare(*arguments, **options)

    if is_late:
        monkeypatch.setattr(passes, "compare_with_history", start_and_compare)
    else:
        registry.start_experiment(MODEL, other.number, split)
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "nothing")
    assert "is judged when the experiment blue has ended" in result["text"]
    registry.end_experiment(MODEL)
    if not is_late:
        assert retrain(world, capsys)[1]["action"] == "promoted"
    assert quick["calls"] == 1


def test_a_second_pass_at_the_same_time_does_nothing(world, capsys, quick):
    with attempts.open_state(world / "state", MODEL):
        command.main(pass_flags(world))
    output = capsys.readouterr()
    assert output.out == ""
    assert "nothing to do: another pass with --state=" in output.err
    assert quick["calls"] == 0


def promote_with_data(world, **changes):
    """Promotes a copy of the champion whose bundle names other data."""
    champion = read_bundle(world / "run" / "bundle")
    write_bundle(dataclasses.replace(champion, data=champion.data | changes), world / "other")
    registry = Registry(world / "registry")
    registry.promote(MODEL, registry.add(MODEL, world / "other").version.number)


def known_images(world):
    """Returns the known images of the last attempt."""
    records = [json.loads(p.read_text()) for p in (world / "state").glob("attempts/*/attempt.json")]
    last = max(records, key=lambda record: record["number"])
    return read_known(world / "state" / "attempts" / last["key"][:16] / "data")


@pytest.mark.parametrize("rule", ["stable", "exact"])
def test_data_that_changed_before_the_first_attempt_is_refused(world, capsys, quick, rule):
    """The splits of the champion's images are unknown then."""
    champion = read_bundle(world / "run" / "bundle")
    gone = {"source": f"folder:{world / 'gone'}"}
    if rule == "exact":
        promote_with_data(world, division=champion.data["division"] | {"rule": rule})
    else:
        promote_with_data(world, **gone)
        for path in sorted((world / "images").rglob("*.png")):
            path.rename(path.with_name(f"new-{path.name}"))
    with pytest.raises(DataError, match="it is unknown which images its network has seen; restore"):
        retrain(world, capsys)
    assert quick["calls"] == 0


def test_data_at_another_place_keeps_its_splits(world, capsys, quick):
    """The data of the champion may be moved, and its copies may have other names."""
    promote_with_data(world, source=f"folder:{world / 'gone'}")
    assert retrain(world, capsys)[0] == 0
    before = known_images(world)
    for path in sorted((world / "images").rglob("*.png")):
        copy = world / "copy" / path.parent.name / f"new-{path.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        path.rename(copy)
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    assert retrain(world, capsys, f"--source=folder:{world / 'copy'}")[0] == 0
    after = known_images(world)
    assert len(after) == len(before) + 120
    assert before.items() <= after.items()


def test_renamed_and_corrected_images_keep_their_splits(world, capsys, quick):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    before = known_images(world)
    for number, path in enumerate(sorted((world / "images").rglob("*.png"))):
        folder = world / "images" / ("blue" if number % 20 == 0 else path.parent.name)
        path.rename(folder / f"new-{number}.png")
    code, result = retrain(world, capsys, "--when=always")
    assert (code, result["action"]) == (0, "promoted")
    after = known_images(world)
    assert {d: one.split for d, one in before.items()} == {d: one.split for d, one in after.items()}
    registry = Registry(world / "registry")
    for number in (2, 3):
        folder = registry.fetch(registry.resolve(MODEL, number), world / "download")
        dataset = open_as_trained(BundlePredictor.load(folder))
        assert len(dataset.source) == 330
        for name, indices in dataset.splits.items():
            images = dataset.loader.load(indices)["image"]
            assert {after[pixel_digest(image)].split for image in images} == {name}


def test_equal_pixels_in_several_splits_are_used_for_training(world, capsys, quick):
    """The champion has seen them, so they must not be in the test split."""
    champion = read_bundle(world / "run" / "bundle")
    for number in range(40):  # The files differ, and the resized images are the same.
        image = Image.new("RGB", (16 + number, 20), (200, 0, 0))
        image.save(world / "images" / "red" / f"large-{number}.png")
    source = f"folder:{world / 'images'}"
    grown = open_as_trained(BundlePredictor(champion), source)
    promote_with_data(world, source=source, fingerprint=grown.fingerprint)
    assert retrain(world, capsys)[0] == 0
    digest = pixel_digest(np.full((16, 16, 3), (200, 0, 0), np.uint8))
    assert known_images(world)[digest].split == "train"


def test_missing_images_are_refused(world, capsys, quick):
    """A disk may not be mounted; an interrupted attempt must survive it."""
    assert retrain(world, capsys)[1]["action"] == "promoted"
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    (world / "images" / "red").rename(world / "hidden")
    (world / "images" / "red").mkdir()
    for path in sorted((world / "hidden").iterdir())[:40]:
        shutil.copyfile(path, world / "images" / "red" / path.name)
    fails(world, DataError, r"lacks 20 of 330 images of earlier trainings, .+; restore them, or")
    shutil.copytree(world / "hidden", world / "images" / "red", dirs_exist_ok=True)
    quick["error"] = TrainingError("the disk is full")
    with pytest.raises(TrainingError):
        retrain(world, capsys)
    (world / "images" / "red" / "000.png").rename(world / "one")
    for path in sorted((world / "images" / "red").iterdir())[:19]:
        path.unlink()
    fails(world, DataError, r"lacks 20 of 450 images of earlier trainings")
    shutil.copytree(world / "hidden", world / "images" / "red", dirs_exist_ok=True)
    quick["error"] = None
    assert retrain(world, capsys)[1]["attempt"]["number"] == 2


def test_an_attempt_needs_new_training_images(world, capsys, quick):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    logged = json.loads(next(world.glob("state/attempts/*/attempt.json")).read_text())["logged"]
    assert sum(logged.values()) == 150
    assert logged["train"] > logged["test"] > 0
    flags = ("--when=always", "--config.train.epochs=2")
    code, result = retrain(world, capsys, *flags)
    assert (code, result["action"], quick["calls"]) == (0, "nothing", 1)
    assert "no image of the training split is new or has another label" in result["text"]
    # A corrected class of a training image is a reason.
    known = known_images(world)
    for path in sorted((world / "images" / "red").iterdir()):
        if known[pixel_digest(np.asarray(Image.open(path)))].split == "train":
            path.rename(world / "images" / "blue" / f"new-{path.name}")
            break
    assert retrain(world, capsys, *flags)[1]["action"] == "promoted"


@pytest.mark.parametrize("name", ["examples.parquet", "splits.parquet"])
def test_a_missing_snapshot_is_an_error(world, capsys, quick, name):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    (folder,) = world.glob("state/attempts/*/data")
    (folder / name).rename(world / name)
    fails(world, DataError, f"{folder} has no .+; restore the folder")
    (world / name).rename(folder / name)
    # Another state folder needs the snapshot of the champion.
    folder.rename(world / "elsewhere")
    fails(world, DataError, f"{folder}, .+, is missing; restore", f"--state={world / 'second'}")
    (world / "elsewhere").rename(folder)
    assert retrain(world, capsys)[1]["attempt"]["number"] == 2


def test_a_moved_state_folder_is_used(world, capsys, quick):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    (world / "state").rename(world / "moved")
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    found = retrain(world, capsys, f"--state={world / 'moved'}")[1]
    assert (found["action"], found["attempt"]["number"]) == ("promoted", 2)


def test_the_data_is_opened_once_where_the_result_is_the_same(world, capsys, quick, monkeypatch):
    """The training, which opens the data too, is replaced here."""
    opened = []
    scan = dataset._scan

    def scan_and_note(*arguments):
        opened.append(arguments[0].name)
        return scan(*arguments)

    monkeypatch.setattr(dataset, "_scan", scan_and_note)
    assert retrain(world, capsys)[1]["action"] == "promoted"
    # The data of the champion, the data of the attempt, and the check after the training, which
    # the comparison of both versions uses.
    assert len(opened) == 3
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    opened.clear()
    assert retrain(world, capsys)[1]["action"] == "promoted"
    assert len(opened) == 2
    # A pass that continues after an experiment checks the data again.
    write_log(world / "log", world / "run" / "bundle", 120, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr(passes._Pass, "_wait", lambda *_: passes.Outcome("nothing", "waits"))
        assert retrain(world, capsys)[1]["text"] == "waits"
    opened.clear()
    assert retrain(world, capsys)[1]["action"] == "promoted"
    assert len(opened) == 1


def test_old_attempts_keep_only_their_records_and_splits(tmp_path):
    statuses = ("promoted", "refused", "promoted", "rolled_back", "refused", "started")
    with attempts.open_state(tmp_path / "state", MODEL) as state:
        for number, status in enumerate(statuses, 1):
            attempt = state.prepare()
            for path in (attempt.champion, attempt.run, attempt.data):
                path.mkdir()
            for name in ("examples.parquet", "splits.parquet"):
                (attempt.data / name).touch()
            attempt.update(status=status, version=number)
            state.begin(attempt, f"{number}" * 64)

        def prune(*arguments):
            """Returns the numbers of the attempts that are still whole."""
            state.prune(*arguments)
            whole = set()
            for attempt in state.attempts():
                assert (attempt.data / "splits.parquet").exists()
                found = [path.exists() for path in (attempt.champion, attempt.run)]
                found.append((attempt.data / "examples.parquet").exists())
                assert len(set(found)) == 1
                whole |= {attempt.record["number"]} if found[0] else set()
            return whole

        assert prune(9, []) == {1, 2, 3, 4, 5, 6}
        assert prune(3, [1]) == {1, 3, 4, 5, 6}
        # After the last attempt is given up, the next one needs the images of the fifth.
        assert prune(1, []) == {5, 6}
        assert prune(1, []) == {5, 6}


def test_a_pass_needs_no_images_of_old_attempts(world, capsys, quick, monkeypatch):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    write_log(world / "log", world / "run" / "bundle", 120, seed=3)
    quick["bundle"] = spoil(world)
    assert retrain(world, capsys)[1]["action"] == "refused"
    with attempts.open_state(world / "state", MODEL) as state:
        state.prune(1, [])
    assert len(list(world.glob("state/attempts/*/run"))) == 1  # The champion's was removed.
    write_log(world / "log", world / "run" / "bundle", 120, seed=4)
    calls = []
    monkeypatch.setattr(attempts.State, "prune", lambda _, *arguments: calls.append(arguments))
    assert retrain(world, capsys, "--keep=7")[1]["attempt"]["labelled"] == 150 + 240
    assert calls == [(7, (1, 2))]


def test_attempts_are_ordered_by_their_numbers(tmp_path):
    with attempts.open_state(tmp_path / "state", MODEL) as state:
        for number, started in enumerate(("2026-01-02", "2026-01-01", "2026-01-03"), 1):
            attempt = state.prepare()
            attempt.update(status="started", started=started)
            assert state.begin(attempt, f"{9 - number}" * 64).record["number"] == number
        assert [attempt.record["number"] for attempt in state.attempts()] == [1, 2, 3]


def test_only_the_owner_may_read_the_state_folder(world, capsys, quick):
    assert retrain(world, capsys)[0] == 0
    (attempt,) = (world / "state" / "attempts").iterdir()
    for path in (world / "state", attempt.parent, attempt, attempt / "data"):
        assert path.stat().st_mode & 0o077 == 0


def fails(world, error, message, *flags):
    """Checks that a pass ends with an error of one line."""
    with pytest.raises(error, match=message) as raised:
        command.main([*pass_flags(world), *map(str, flags)])
    assert "\n" not in str(raised.value)


def test_wrong_flags_are_one_line(world, quick, tmp_path):
    fails(world, RegistryError, "there is no registry at", f"--registry={tmp_path / 'none'}")
    fails(world, RegistryError, "there is no model colour", "--model=colour")
    fails(world, ConfigError, "--when: there is no 'hram'; did you mean harm", "--when=hram")
    fails(world, ConfigError, r"name the data without \+log:", f"--source=folder:x+log:{world}")
    fails(world, ConfigError, "--margin: must be at least", "--margin=0")
    fails(world, DataError, "is not a request log", f"--log={tmp_path}")
    fails(world, ConfigError, "has files that are not of retrain", f"--state={world}")
    for key in ("data.source=shapes", "data.split=0.5,0.2,0.3", "data.stratify=exact"):
        fails(world, ConfigError, "config.data.+ cannot be set", f"--config.{key}")
    (world / "state").rename(world / "mine")
    with attempts.open_state(world / "state", "shapes"):
        pass
    fails(world, ConfigError, "belongs to the model shapes, not to colours")
    assert quick["calls"] == 0


def test_other_classes_are_one_line(world, quick):
    (world / "images" / "red").rename(world / "images" / "rouge")
    fails(world, DataError, "has the classes blue, green, rouge, and colours/1 has blue, green, re")
    assert not list((world / "state" / "attempts").glob("[!.]*"))


def test_a_log_of_another_model_is_one_line(world, quick):
    shutil.rmtree(world / "log")
    write_log(world / "log", world / "run" / "bundle", 3, model="shapes")
    fails(world, DataError, "has no images of the model colours; it has: shapes")


def test_an_unusable_champion_is_one_line(world, quick, image_folder):
    registry, bundle = Registry(world / "registry"), world / "run" / "bundle"
    registry.remove_alias(MODEL, "champion")
    fails(world, RegistryError, "colours has no alias champion")

    own = read_bundle(bundle)
    common = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    names = ("class_names", "preprocessing", "temperature", "data", "metrics")
    ensemble = Ensemble([own], "horizontal", 0, **{name: common[name] for name in names})
    write_ensemble(ensemble, [bundle], world / "ensemble")
    write_bundle(own, world / "without")  # It has no reference statistics.
    export = pytest.importorskip("exports").write_export(world.parent, image_folder)
    for folder, error, message in (
        (world / "ensemble", BundleError, "is an ensemble, which has several networks"),
        (export, BundleError, "is an exported model, which has no weights"),
        (world / "without", DataError, "has no reference statistics, which --when=harm needs"),
    ):
        registry.promote(MODEL, registry.add(MODEL, folder).version.number)
        fails(world, error, message, "--when=harm")
