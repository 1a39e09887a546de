import csv
import datetime
import json
import os
import shutil
import socket

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cnn_jax.config import schema
from cnn_jax.data.files import open_folder
from cnn_jax.explain.pictures import explain
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.images import list_images
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import run_directory
from cnn_jax.training.loop import train_and_evaluate
from configs import default


def _flat(config):
    return schema.flat(json.loads(config.to_json()))


def test_only_some_keys_may_change_when_a_run_resumes(tmp_path):
    config = default.get_config()
    assert run_directory.read_config(tmp_path) is None
    run_directory.write_config(tmp_path, config)
    # Without a checkpoint there is no run to resume.
    assert run_directory.read_config(tmp_path) is None
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    previous = run_directory.read_config(tmp_path)
    assert previous == _flat(config)
    assert run_directory.changes(tmp_path, previous, config) == []
    # These keys may change, because no result of a finished epoch depends on their values.
    config.data.workers = 2
    config.train.epochs = 30
    config.mesh.model = 2
    assert run_directory.changes(tmp_path, previous, config) == [
        "data.workers: -1 -> 2",
        "mesh.model: 1 -> 2",
        "train.epochs: 22 -> 30",
    ]
    config.optimizer.l2 = 0.5
    config.train.monitor = "validation_loss"
    with pytest.raises(ConfigError) as error:
        run_directory.changes(tmp_path, previous, config)
    assert (
        "(optimizer.l2: 0.0001 -> 0.5; train.monitor: validation_accuracy -> validation_loss)"
    ) in str(error.value)


def test_a_run_older_than_mixing_resumes_without_mixing(tmp_path):
    config = default.get_config()
    old = {key: value for key, value in _flat(config).items() if "mix" not in key}
    assert len(old) == len(_flat(config)) - 4
    assert run_directory.changes(tmp_path, old, config) == []
    # This key has no effect, because MixUp is switched off.
    config.augment.mixup_alpha = 3.0
    assert run_directory.changes(tmp_path, old, config) == []
    config.augment.cutmix_probability = 0.5
    refused = r"\(augment\.cutmix_probability: 0\.0 -> 0\.5\)"
    with pytest.raises(ConfigError, match=refused):
        run_directory.changes(tmp_path, old, config)


def test_keys_of_mixing_must_not_change(tmp_path):
    config = default.get_config()
    config.augment.mixup_probability = 0.5
    previous = _flat(config)
    assert run_directory.changes(tmp_path, previous, config) == []
    config.augment.mixup_alpha = 0.4
    with pytest.raises(ConfigError, match=r"\(augment\.mixup_alpha: 0\.2 -> 0\.4\)"):
        run_directory.changes(tmp_path, previous, config)
    config.augment.mixup_probability = 0.0
    with pytest.raises(ConfigError, match=r"\(augment\.mixup_probability: 0\.5 -> 0\.0\)"):
        run_directory.changes(tmp_path, previous, config)


def test_every_free_key_exists():
    assert set(_flat(default.get_config())) >= run_directory.FREE_KEYS


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="--workdir: cannot use"),
        run_directory.lock(tmp_path / "file" / "run"),
    ):
        pass
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has checkpoints but no config\.json"):
        run_directory.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not a configuration"):
        run_directory.read_config(tmp_path)


def test_a_folder_is_locked_by_one_run_at_a_time(tmp_path):
    with run_directory.lock(tmp_path / "run"):
        holder = rf"in use by process {os.getpid()} on {socket.gethostname()} since \d{{4}}-"
        with pytest.raises(ConfigError, match=holder), run_directory.lock(tmp_path / "run"):
            pass
    with run_directory.lock(tmp_path / "run"):
        pass


def test_a_heartbeat_has_step_and_activity(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_directory.time, "monotonic", lambda: now[0])
    heartbeat = run_directory.Heartbeat(tmp_path)

    def read():
        beat = json.loads((tmp_path / "heartbeat.json").read_text())
        written = datetime.datetime.fromisoformat(beat["time"])
        age = datetime.datetime.now(datetime.UTC) - written
        assert age < datetime.timedelta(minutes=1)
        assert (beat["pid"], beat["host"]) == (os.getpid(), socket.gethostname())
        return beat["step"], beat["activity"]

    heartbeat.beat("training", 1)
    assert read() == (1, "training")
    now[0] += 4
    # If the activity is unchanged, nothing is written within five seconds of the last write.
    heartbeat.beat("training", 2)
    assert read() == (1, "training")
    # A change of the activity is written immediately.
    heartbeat.beat("validating")
    assert read() == (2, "validating")
    now[0] += 6
    heartbeat.beat("validating", 3)
    assert read() == (3, "validating")
    assert list(tmp_path.iterdir()) == [tmp_path / "heartbeat.json"]


def _record(epoch):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "validation_f1": 0.5}


def _events(folder):
    events = []
    for path in folder.iterdir():
        content = path.read_bytes()
        # A record consists of a length, a checksum, an event, and a checksum.
        while content:
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            events += [(value.tag, event.step) for value in event.summary.value]
            content = content[16 + length :]
    return sorted(events)


def test_the_log_has_each_epoch_once_after_a_restart(tmp_path):
    log = run_directory.EpochLog(tmp_path, [])
    for epoch in (1, 2, 3):
        log.append(_record(epoch))
    log.close()
    # The record of epoch 3 was lost.
    log = run_directory.EpochLog(tmp_path, [_record(1), _record(2)])
    log.append(_record(3))
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [_record(epoch) for epoch in (1, 2, 3)]
    expected = [(tag, step) for tag in ("f1/validation", "loss/train") for step in (10, 20, 30)]
    assert _events(tmp_path / "tensorboard") == expected


def test_confidences_round_trip(tmp_path):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 50).astype(np.float32)
    labels = np.arange(50) % 3
    run_directory.write_predictions(
        tmp_path, [f"x/{i}" for i in range(50)], labels, probabilities, ["a", "b", "c"]
    )
    lines = (tmp_path / "report" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "id,label,predicted,confidence"
    confidences = np.array([line.split(",")[3] for line in lines[1:]], np.float32)
    np.testing.assert_array_equal(confidences, probabilities.max(axis=1))


def test_cells_are_no_formulas(tmp_path):
    ids = ["=HYPERLINK(A1)", "+1", "-1", "@a", "\tb", "a=b", "x/-1.png"]
    labels = np.zeros(len(ids), int)
    probabilities = np.tile(np.float32([1, 0]), (len(ids), 1))
    run_directory.write_predictions(tmp_path, ids, labels, probabilities, ["=1+1", "b"])
    with (tmp_path / "report" / "predictions.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == [*(f"'{id_}" for id_ in ids[:5]), *ids[5:]]
    assert {tuple(row[1:]) for row in rows} == {("'=1+1", "'=1+1", "1.")}


@pytest.fixture
def data(image_folder, tmp_path):
    """A copy of `image_folder`, which a test may change."""
    shutil.copytree(image_folder, tmp_path / "data")
    return tmp_path / "data"


def test_outputs_inside_the_data_folder_are_ignored_as_data(data, tiny_config):
    config = tiny_config
    config.data.source = f"folder:{data}"
    config.train.epochs = 1
    workdir = data / "runs" / "first"
    before = open_folder(data)
    train_and_evaluate(config, workdir)
    # The report writes pictures with these names.
    for name in ("confusion.png", "examples/000.png"):
        picture = workdir / "report" / name
        picture.parent.mkdir(exist_ok=True)
        shutil.copy(data / "red" / "000.png", picture)
    predictor = BundlePredictor.load(workdir / "bundle")
    images = list_images(data)
    explain(predictor, images[:1], data / "maps")
    assert list((data / "maps").glob("*.png"))

    after = open_folder(data)
    assert after.ids == before.ids
    assert after.ignored["folders that cnn_jax wrote"] == 2
    assert after.remarks == []
    assert list_images(data) == images
    assert len(images) == len(before) == 60
    fingerprint = predictor.data["fingerprint"]
    assert open_as_trained(predictor).fingerprint == fingerprint
    config.train.epochs = 2  # The run resumes from its checkpoint.
    train_and_evaluate(config, workdir)
    assert BundlePredictor.load(workdir / "bundle").data["fingerprint"] == fingerprint


@pytest.mark.parametrize("place", [".", "red", "red/../blue", "split"])
def test_a_run_folder_with_images_of_the_data_is_refused(data, tiny_config, place):
    (data / "split").mkdir()
    (data / "green").rename(data / "split" / "green")
    before = sorted(data.rglob("*"))
    for form in ("folder", "classes", "splits"):
        tiny_config.data.source = f"{form}:{data}"
        with pytest.raises(ConfigError, match=r"^--workdir: .* holds images of the data"):
            train_and_evaluate(tiny_config, data / place)
    assert sorted(data.rglob("*")) == before  # The refused run left no lock file.


def test_data_in_a_folder_that_the_run_overwrites_is_refused(tmp_path):
    for name in ("report", "tensorboard", "checkpoints", "bundle", "profile"):
        source = f"folder:{tmp_path}/run/{name}/images"
        with pytest.raises(ConfigError, match=f"^--workdir: the data, .*{name}/images, is inside"):
            run_directory.check_apart(tmp_path / "run", source)
    for source in (f"folder:{tmp_path}/run/images", f"folder:{tmp_path}", "shapes", "tfds:mnist"):
        run_directory.check_apart(tmp_path / "run", source)


def test_a_run_that_is_older_than_a_key_goes_on_with_its_default(tmp_path):
    config = default.get_config()
    old = _flat(config)
    for key in ("data.white_level", "data.resize", "data.crop_ratio", "data.interpolation"):
        del old[key]
    assert run_directory.changes(tmp_path, old, config) == []
    config.data.white_level = 4095.0
    with pytest.raises(ConfigError, match=r"\(data\.white_level: 0\.0 -> 4095\.0\)"):
        run_directory.changes(tmp_path, old, config)


def _fail_in(folder, file_name=None):
    """Simulates a run that fails after it has locked the folder."""

    def start():
        with run_directory.lock(folder):
            run_directory.Heartbeat(folder).beat("opening data")
            (folder / "checkpoints").mkdir()
            if file_name:
                (folder / file_name).write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        start()


def test_a_failed_start_removes_the_files_it_created(tmp_path):
    _fail_in(tmp_path / "runs" / "first")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    _fail_in(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    (tmp_path / "mine" / "notes.txt").touch()
    _fail_in(tmp_path / "mine" / "deep" / "run")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    # A run with a config.json has started, so its files are kept.
    _fail_in(tmp_path / "run", file_name="config.json")
    assert (tmp_path / "run" / "lock").exists()
    assert (tmp_path / "run" / "heartbeat.json").exists()


def test_a_refused_start_keeps_the_lock_of_the_other_run(tmp_path):
    with run_directory.lock(tmp_path / "run"):
        with pytest.raises(ConfigError, match="is in use"), run_directory.lock(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / "lock").exists()


def test_a_lock_file_that_was_just_removed_is_created_again(tmp_path, monkeypatch):
    """A lock file is created again if another run removes it after this run has opened it."""
    real, path = run_directory.fcntl.flock, tmp_path / "run" / "lock"

    def flock(file, operation):
        monkeypatch.setattr(run_directory.fcntl, "flock", real)
        path.unlink()
        path.parent.rmdir()
        real(file, operation)

    monkeypatch.setattr(run_directory.fcntl, "flock", flock)
    with run_directory.lock(tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match="is in use"), run_directory.lock(tmp_path / "run"):
            pass
