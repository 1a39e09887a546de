"""Tests of single passes: reasons, refusals, repetition, splits, and bad input."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from bundles import make_bundle
from PIL import Image

from cnn_jax.config import files
from cnn_jax.data.decode import pixel_digest
from cnn_jax.data.labelled_log import read_known, read_snapshot
from cnn_jax.inference.bundle import (
    Ensemble,
    digest,
    read_bundle,
    write_bundle,
    write_ensemble,
)
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.registry import evidence
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.split import Split
from cnn_jax.retrain import __main__ as command
from cnn_jax.retrain import attempts, passes
from cnn_jax.system.errors import BundleError, ConfigError, DataError, TrainingError
from experiments.checks.chaos_retrain import (
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
    for flags in ([], ["--when=always"], ["--when=always", "--margin=0.5"]):
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
    code, result = retrain(world, capsys, "--config.train.epochs=9", "--min_new=1000")
    assert (code, result["action"]) == (0, "promoted")
    assert result["attempt"]["labelled"] == 150
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
    assert actions(world) == ["add", "promote", "add"]
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

    assert retrain(world, capsys)[1]["action"] == "promoted"
    # The files of version 2 are replaced in the registry, and its record: it is bad now.
    registry = Registry(world / "registry")
    bad = registry.add(MODEL, spoil(world)).version
    registry.rollback(MODEL)
    registry.promote(MODEL, bad.number)
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    record = json.loads(path.read_text()) | {
        "digest": bad.bundle.digest,
        "version": bad.number,
    }
    path.write_text(json.dumps(record))
    assert retrain(world, capsys)[1]["action"] == "nothing"  # There are no labels yet.
    write_log(world / "log", world / "run" / "bundle", 80, noise=0, seed=5)
    if is_killed:
        with monkeypatch.context() as patch:
            patch.setattr(attempts.Attempt, "end", kill)
            with pytest.raises(KeyboardInterrupt):
                retrain(world, capsys)
    else:
        code, result = retrain(world, capsys)
        assert (code, result["action"]) == (3, "rolled_back")
        assert result["attempt"]["watch"]["decision"] == "worse"
    registry.refresh()
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


def test_a_good_version_stays_and_its_comparison_is_recorded(world, capsys, quick):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    write_log(world / "log", world / "run" / "bundle", 30, noise=0, seed=5)
    assert retrain(world, capsys)[1]["action"] == "nothing"
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    watch = json.loads(path.read_text())["watch"]
    assert (watch["images"], watch["decision"]) == (30, "none")
    assert Registry(world / "registry").resolve(MODEL).number == 2


def test_a_rollback_by_a_person_is_recorded(world, capsys, quick):
    assert retrain(world, capsys)[1]["action"] == "promoted"
    Registry(world / "registry").rollback(MODEL, note="users complained")
    assert retrain(world, capsys)[1]["action"] == "nothing"
    (path,) = (world / "state" / "attempts").glob("*/attempt.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["reason"]) == ("rolled_back", "users complained")


def test_a_running_experiment_is_not_ended(world, capsys, quick):
    registry = Registry(world / "registry")
    other = registry.add(MODEL, spoil(world)).version
    split = Split(
        name="blue", salt="x", fraction=0.5, outcome="reward", window=60.0, is_shadow=False
    )
    registry.start_experiment(MODEL, other.number, split)
    code, result = retrain(world, capsys)
    assert (code, result["action"]) == (0, "nothing")
    assert "is judged when the experiment blue has ended" in result["text"]
    registry.end_experiment(MODEL)
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
