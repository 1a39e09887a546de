import datetime
import json
import os
import shutil
import socket

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cnn_jax.config import files
from cnn_jax.data.files import open_folder
from cnn_jax.explain.pictures import explain
from cnn_jax.inference.evaluation import open_as_trained
from cnn_jax.inference.images import list_images
from cnn_jax.inference.predictor import Predictor
from cnn_jax.system.errors import ConfigError
from cnn_jax.training import run_directory
from cnn_jax.training.loop import train_and_evaluate
from configs import default


def _flat(config):
    return files.flat(json.loads(config.to_json()))


def test_the_same_run_may_go_on_and_another_may_not(tmp_path):
    config = default.get_config()
    assert run_directory.read_config(tmp_path) is None
    run_directory.write_config(tmp_path, config)
    # Without a checkpoint there is no run yet that could go on.
    assert run_directory.read_config(tmp_path) is None
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    present = run_directory.read_config(tmp_path)
    assert present == _flat(config)
    assert run_directory.changes(tmp_path, present, config) == []
    # No number of the epochs that are done depends on these.
    config.data.workers = 2
    config.train.epochs = 30
    config.mesh.model = 2
    assert run_directory.changes(tmp_path, present, config) == [
        "data.workers: -1 -> 2",
        "mesh.model: 1 -> 2",
        "train.epochs: 22 -> 30",
    ]
    config.optimizer.l2 = 0.5
    config.train.monitor = "validation_loss"
    with pytest.raises(ConfigError) as error:
        run_directory.changes(tmp_path, present, config)
    assert (
        "(optimizer.l2: 0.0001 -> 0.5; train.monitor: validation_accuracy -> validation_loss)"
    ) in str(error.value)


def test_a_run_from_before_images_were_mixed_goes_on_without(tmp_path):
    config = default.get_config()
    old = {key: value for key, value in _flat(config).items() if "mix" not in key}
    assert len(old) == len(_flat(config)) - 4
    assert run_directory.changes(tmp_path, old, config) == []
    config.augment.mixup_alpha = 3.0  # Of what is switched off.
    assert run_directory.changes(tmp_path, old, config) == []
    config.augment.cutmix_probability = 0.5
    refused = (
        r"\(augment\.cutmix_alpha: absent -> 1\.0; augment\.cutmix_probability: 0\.0 -> 0\.5\)"
    )
    with pytest.raises(ConfigError, match=refused):
        run_directory.changes(tmp_path, old, config)


def test_how_images_are_mixed_may_not_change(tmp_path):
    config = default.get_config()
    config.augment.mixup_probability = 0.5
    present = _flat(config)
    assert run_directory.changes(tmp_path, present, config) == []
    config.augment.mixup_alpha = 0.4
    with pytest.raises(ConfigError, match=r"\(augment\.mixup_alpha: 0\.2 -> 0\.4\)"):
        run_directory.changes(tmp_path, present, config)
    config.augment.mixup_probability = 0.0
    with pytest.raises(ConfigError, match=r"\(augment\.mixup_probability: 0\.5 -> 0\.0\)"):
        run_directory.changes(tmp_path, present, config)


def test_every_key_that_may_change_is_one():
    assert set(_flat(default.get_config())) >= run_directory.FREE_KEYS


def test_a_folder_that_cannot_be_one_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="--workdir: cannot use"),
        run_directory.locked(tmp_path / "file" / "run"),
    ):
        pass
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has checkpoints and no config\.json"):
        run_directory.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not a configuration"):
        run_directory.read_config(tmp_path)


def test_a_folder_is_held_by_one_at_a_time_and_given_back(tmp_path):
    with run_directory.locked(tmp_path / "run"):
        holder = rf"in use by process {os.getpid()} on {socket.gethostname()} since \d{{4}}-"
        with pytest.raises(ConfigError, match=holder), run_directory.locked(tmp_path / "run"):
            pass
    with run_directory.locked(tmp_path / "run"):
        pass


def test_a_heartbeat_says_where_the_run_is(tmp_path, monkeypatch):
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
    heartbeat.beat("training", 2)  # Too soon.
    assert read() == (1, "training")
    heartbeat.beat("validating")  # But this is news.
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
        while content:  # Length, its checksum, the event, its checksum.
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            events += [(value.tag, event.step) for value in event.summary.value]
            content = content[16 + length :]
    return sorted(events)


def test_the_log_has_each_epoch_once_also_after_a_restart(tmp_path):
    log = run_directory.EpochLog(tmp_path, [])
    for epoch in (1, 2, 3):
        log.append(_record(epoch))
    log.close()
    log = run_directory.EpochLog(tmp_path, [_record(1), _record(2)])  # 3 was lost.
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


@pytest.fixture
def data(image_folder, tmp_path):
    """A copy of `image_folder` to write to."""
    shutil.copytree(image_folder, tmp_path / "data")
    return tmp_path / "data"


def test_what_is_written_in_the_folder_of_the_data_is_no_part_of_it(data, tiny_config):
    config = tiny_config
    config.data.source = f"folder:{data}"
    config.train.epochs = 1
    workdir = data / "runs" / "first"
    before = open_folder(data)
    train_and_evaluate(config, workdir)
    for name in ("confusion.png", "examples/000.png"):  # As the report would draw them.
        picture = workdir / "report" / name
        picture.parent.mkdir(exist_ok=True)
        shutil.copy(data / "red" / "000.png", picture)
    predictor = Predictor.load(workdir / "bundle")
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
    config.train.epochs = 2  # The run goes on from its checkpoint.
    train_and_evaluate(config, workdir)
    assert Predictor.load(workdir / "bundle").data["fingerprint"] == fingerprint


@pytest.mark.parametrize("place", [".", "red", "red/../blue", "split"])
def test_a_run_does_not_lie_where_the_images_are(data, tiny_config, place):
    (data / "split").mkdir()
    (data / "green").rename(data / "split" / "green")
    before = sorted(data.rglob("*"))
    for form in ("folder", "classes", "splits"):
        tiny_config.data.source = f"{form}:{data}"
        with pytest.raises(ConfigError, match=r"^--workdir: .* holds images of the data"):
            train_and_evaluate(tiny_config, data / place)
    assert sorted(data.rglob("*")) == before  # Not even the lock is left.


def test_the_data_does_not_lie_where_the_run_writes(tmp_path):
    for name in ("report", "tensorboard", "checkpoints", "bundle", "profile"):
        source = f"folder:{tmp_path}/run/{name}/images"
        with pytest.raises(ConfigError, match=f"^--workdir: the data, .*{name}/images, lies in"):
            run_directory.check_apart(tmp_path / "run", source)
    for source in (f"folder:{tmp_path}/run/images", f"folder:{tmp_path}", "shapes", "tfds:mnist"):
        run_directory.check_apart(tmp_path / "run", source)


def test_a_run_that_is_older_than_the_white_level_goes_on_without_one(tmp_path):
    config = default.get_config()
    old = _flat(config)
    del old["data.white_level"]
    assert run_directory.changes(tmp_path, old, config) == []
    config.data.white_level = 4095.0
    with pytest.raises(ConfigError, match=r"\(data\.white_level: 0\.0 -> 4095\.0\)"):
        run_directory.changes(tmp_path, old, config)


def _fail_in(folder, write=None):
    """A run that fails after it has held the folder."""

    def start():
        with run_directory.locked(folder):
            run_directory.Heartbeat(folder).beat("opening data")
            (folder / "checkpoints").mkdir()
            if write:
                (folder / write).write_text("{}")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        start()


def test_a_failed_start_leaves_the_folder_as_it_was(tmp_path):
    _fail_in(tmp_path / "runs" / "first")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    _fail_in(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    (tmp_path / "mine" / "notes.txt").touch()
    _fail_in(tmp_path / "mine" / "deep" / "run")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    _fail_in(tmp_path / "run", write="config.json")  # It has started.
    assert (tmp_path / "run" / "lock").exists()
    assert (tmp_path / "run" / "heartbeat.json").exists()


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    with run_directory.locked(tmp_path / "run"):
        with pytest.raises(ConfigError, match="is in use"), run_directory.locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / "lock").exists()


def test_a_lock_that_was_just_removed_is_made_anew(tmp_path, monkeypatch):
    """Another run has opened the lock of one that fails to start and removes it."""
    real, path = run_directory.fcntl.flock, tmp_path / "run" / "lock"

    def flock(file, operation):
        monkeypatch.setattr(run_directory.fcntl, "flock", real)
        path.unlink()
        path.parent.rmdir()
        real(file, operation)

    monkeypatch.setattr(run_directory.fcntl, "flock", flock)
    with run_directory.locked(tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match="is in use"), run_directory.locked(tmp_path / "run"):
            pass
