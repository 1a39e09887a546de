import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import pytest
from conftest import REPOSITORY
from object_stores import BUCKET, SERVICES

from cnn_jax import api, main
from cnn_jax.config import files
from cnn_jax.registry.store import Store, StoreError
from cnn_jax.report import run_report
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, Interrupted, TrainingError
from cnn_jax.training import loop, sharding, summary
from cnn_jax.training.backup import Backup
from cnn_jax.training.loop import train_and_evaluate
from experiments.checks import chaos


@pytest.fixture
def machine(tmp_path):
    """A function that makes the folder of a run on a machine: name -> path."""

    def make(name):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    return make


@pytest.fixture
def copy(tmp_path):
    return tmp_path / "copy"


def write(folder, **contents):
    """Writes a checkpoint for each name such as step10, and a file for each other name."""
    for name, text in contents.items():
        if name.startswith("step"):
            path = folder / "checkpoints" / name.removeprefix("step")
            path.mkdir(parents=True)
            (path / "array").write_text(text)
            (path / "_CHECKPOINT_METADATA").write_text(f"saved {text}")
        else:
            (folder / name).write_text(text)


def read(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("backup.json", "_CHECKPOINT_METADATA")
    }


@contextlib.contextmanager
def running(backup, folder):
    backup.restore(folder)
    with backup.running():
        yield


def use(folder, copy, **contents):
    """Writes files into the folder of a run while the run is copied."""
    with running(Backup(copy), folder):
        write(folder, **contents)


def test_another_machine_gets_the_finished_files(machine, copy):
    a, b = machine("a"), machine("b")
    unfinished = a / "checkpoints" / "20.orbax-checkpoint-tmp"
    with running(Backup(copy), a):
        write(a, step10="x", config="{}", lock="pid", **{"heartbeat.json": "", ".log.partial": ""})
        unfinished.mkdir()
        (unfinished / "array").touch()
    assert not (copy / unfinished.relative_to(a)).exists()
    with running(Backup(copy), b):
        assert read(b) == {"config": "{}", "checkpoints/10/array": "x"}
        assert (b / "checkpoints/10/_CHECKPOINT_METADATA").read_text() == "saved x"


def test_the_copy_follows_changes_and_removals(machine, copy):
    a = machine("a")
    backup = Backup(copy)
    with running(backup, a):
        write(a, step10="x", log="1")
        backup.copy()
        assert read(copy) == {"checkpoints/10/array": "x", "log": "1"}
        time.sleep(0.01)
        write(a, step20="y", log="2")
        for name in ("array", "_CHECKPOINT_METADATA"):
            (a / "checkpoints/10" / name).unlink()
    assert read(copy) == {"checkpoints/20/array": "y", "log": "2"}
    assert not (copy / "checkpoints/10/_CHECKPOINT_METADATA").exists()
    # The next start on the same machine removes a file that was removed in the meantime.
    (a / "log").unlink()
    use(a, copy)
    assert read(copy) == {"checkpoints/20/array": "y"}


def test_a_checkpoint_is_marked_as_complete_after_its_files(machine, copy, monkeypatch):
    a, b, names = machine("a"), machine("b"), []
    original = Store.write

    def fail_at_the_mark(self, name, data):
        if name == "checkpoints/20/_CHECKPOINT_METADATA":
            raise StoreError("killed here")
        names.append(name)
        original(self, name, data)

    use(a, copy, step10="x")
    monkeypatch.setattr(Store, "write", fail_at_the_mark)
    with pytest.raises(StoreError, match="killed here"):
        use(a, copy, step20="y")
    assert "checkpoints/20/array" in names
    monkeypatch.undo()
    use(b, copy)
    assert read(b) == {"checkpoints/10/array": "x"}


@pytest.fixture
def uploads(monkeypatch):
    """A list of the names of all files that are written to the copy, in their order."""
    names, original = [], Store.write

    def write(self, name, data):
        names.append(name)
        original(self, name, data)

    monkeypatch.setattr(Store, "write", write)
    return names


def test_a_restart_does_not_copy_finished_checkpoints_again(machine, copy, uploads):
    a = machine("a")
    use(a, copy, step10="x", step20="y", log="1")
    (copy / "checkpoints/10/array").unlink()
    uploads.clear()
    use(a, copy, step30="z")
    assert uploads == [
        "backup.json",
        "log",  # A file outside of a checkpoint may have changed.
        "checkpoints/10/array",
        "checkpoints/30/array",
        "checkpoints/30/_CHECKPOINT_METADATA",
    ]
    assert read(copy) == read(a)


def test_a_checkpoint_that_was_saved_again_is_copied_again(machine, copy):
    a = machine("a")
    use(a, copy, step10="x", step20="y")
    shutil.rmtree(a / "checkpoints/20")
    write(a, step20="z")
    use(a, copy)
    assert read(copy) == {"checkpoints/10/array": "x", "checkpoints/20/array": "z"}
    assert (copy / "checkpoints/20/_CHECKPOINT_METADATA").read_text() == "saved z"


def test_older_checkpoints_are_complete_before_newer_ones(machine, copy, uploads):
    use(machine("a"), copy, step100="y", step20="x", log="1")
    assert uploads == [
        "backup.json",
        "log",
        "checkpoints/20/array",
        "checkpoints/20/_CHECKPOINT_METADATA",
        "checkpoints/100/array",
        "checkpoints/100/_CHECKPOINT_METADATA",
    ]


def test_a_machine_that_continues_later_gets_what_the_other_machine_did(machine, copy):
    a, b = machine("a"), machine("b")
    use(a, copy, step10="x", log="a")
    write(a, step30="lost")
    use(b, copy, step20="y")
    use(a, copy)
    assert read(a) == {"checkpoints/10/array": "x", "checkpoints/20/array": "y", "log": "a"}
    assert read(copy) == read(a)


def test_an_interrupted_restoration_is_repeated(machine, copy, monkeypatch):
    a, b, original = machine("a"), machine("b"), Store.read

    def fail_at_a_checkpoint(self, name):
        if name == "checkpoints/20/array":
            raise StoreError("killed here")
        return original(self, name)

    use(a, copy, step10="x", step20="y")
    monkeypatch.setattr(Store, "read", fail_at_a_checkpoint)
    with pytest.raises(StoreError, match="killed here"):
        use(b, copy)
    assert read(b) == {"checkpoints/10/array": "x"}
    monkeypatch.undo()
    use(b, copy)
    assert read(b) == {"checkpoints/10/array": "x", "checkpoints/20/array": "y"}


def test_a_machine_keeps_its_own_files_if_no_other_machine_used_the_copy(machine, copy):
    a = machine("a")
    use(a, copy, step10="x")
    write(a, step20="y")
    use(a, copy)
    assert read(a) == read(copy) == {"checkpoints/10/array": "x", "checkpoints/20/array": "y"}


def test_two_machines_do_not_write_the_same_copy(machine, copy):
    a, b = machine("a"), machine("b")
    first = Backup(copy)
    with contextlib.suppress(TrainingError), running(first, a):
        write(a, step10="x")
        use(b, copy)
    with pytest.raises(TrainingError, match=r"^--backup: the run was started again on \S+, which"):
        first.copy()
    assert read(copy) == {}


def test_a_copy_of_another_run_is_refused(machine, copy):
    a, b = machine("a"), machine("b")
    use(a, copy, step10="x")
    write(b, step10="other")
    with pytest.raises(ConfigError, match=r"^--backup: \S+/copy has the copy of another run than"):
        use(b, copy)
    assert read(b) == {"checkpoints/10/array": "other"}
    assert read(copy) == {"checkpoints/10/array": "x"}


def test_other_files_are_not_overwritten(machine, copy):
    copy.mkdir()
    (copy / "thesis").write_text("x")
    with pytest.raises(ConfigError, match=r"^--backup: \S+/copy contains other files; use another"):
        use(machine("a"), copy)
    a = machine("a")
    with pytest.raises(ConfigError, match=r"^--backup: \S+/a/run/copy is inside the run's folder"):
        use(a, a / "copy")


def test_a_store_that_fails_for_a_while_does_not_stop_the_run(machine, copy, monkeypatch, caplog):
    a, fails = machine("a"), True
    original = Store.write

    def write_or_fail(self, name, data):
        if fails and name != "backup.json":
            raise StoreError("no network")
        original(self, name, data)

    monkeypatch.setattr(Store, "write", write_or_fail)
    with running(Backup(copy, seconds=0.01), a):
        write(a, log="1")
        end = time.monotonic() + 30
        while not caplog.messages and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        fails = False
    assert caplog.messages == ["no network"]
    assert read(copy) == {"log": "1"}


def test_an_interruption_keeps_its_exit_code_if_the_store_fails(machine, copy, monkeypatch, caplog):
    def fail(*_):
        raise StoreError("gone")

    def interrupted_run():
        with running(Backup(copy), machine("a")):
            monkeypatch.setattr(Store, "read", fail)
            raise Interrupted("saved")

    with pytest.raises(Interrupted, match="saved"):
        interrupted_run()
    assert caplog.messages == ["gone"]


@pytest.mark.parametrize("start", ["command", "function"])
def test_the_report_is_copied_too(machine, copy, monkeypatch, start):
    folder = machine("a")

    def train(config, workdir, *_, backup, **options):
        with running(backup, workdir):
            write(workdir, log="1")

    def report(workdir, *_):
        write(folder, report="html")
        return "report"

    for module in (api, loop):
        monkeypatch.setattr(module, "train_and_evaluate", train)
    for module in (api, run_report):
        monkeypatch.setattr(module, "report_after_training", report)
    monkeypatch.setattr(sharding, "start_processes", lambda *_: None)
    monkeypatch.setattr(summary, "show_commands", lambda *_: None)
    monkeypatch.setattr(api, "Run", lambda *_: None)
    monkeypatch.setattr(api, "_results", lambda *_: {})
    if start == "command":
        main.main(["--config=smoke", f"--workdir={folder}", f"--backup={copy}"])
    else:
        api.train("shapes", workdir=folder, backup=str(copy))
    assert read(copy) == {"log": "1", "report": "html"}


# Trains a run in a new process, which stops for ever after the second epoch.
_TRAIN = """
import json, sys, time
from cnn_jax.config import files
from cnn_jax.training.backup import Backup
from cnn_jax.training.loop import train_and_evaluate
folder, url, keys = sys.argv[1:]
train_and_evaluate(
    files.load("smoke", json.loads(keys)),
    folder,
    backup=Backup(url, seconds=0.05),
    on_epoch=lambda history: time.sleep(1000 * (len(history) == 2)),
)
"""


@pytest.fixture(params=SERVICES)
def bucket(request, monkeypatch):
    """The URL of an empty folder of an object store on this machine."""
    with SERVICES[request.param]() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield f"{request.param}://{BUCKET}/runs/1"


def test_a_killed_run_continues_on_another_machine_bitwise_the_same(tmp_path, image_folder, bucket):
    """The first machine is lost with its disk; only the bucket remains."""
    keys = {
        "data.source": f"folder:{image_folder}",
        "data.image_size": "8",
        "model.features": "(4,8)",
        "model.dense": "8",
        "train.epochs": "3",
        "report.detail": "none",
    }
    command = [sys.executable, "-c", _TRAIN, str(tmp_path / "lost"), bucket, json.dumps(keys)]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    store = Store(bucket)
    with subprocess.Popen(command, cwd=REPOSITORY, env=env) as process:
        try:
            while sum(name.endswith("/_CHECKPOINT_METADATA") for name in store.all_names()) < 2:
                assert process.poll() is None
                time.sleep(0.05)
        finally:
            process.kill()
    assert "bundle/bundle.json" not in store.all_names()
    shutil.rmtree(tmp_path / "lost")

    config, epochs = files.load("smoke", keys), []
    train_and_evaluate(
        config, tmp_path / "new", backup=Backup(bucket), on_epoch=lambda h: epochs.append(len(h))
    )
    train_and_evaluate(config, tmp_path / "undisturbed")
    assert epochs == [2, 3]
    ends = [chaos.read_results(tmp_path / name) for name in ("new", "undisturbed")]
    assert ends[0] == ends[1]
    assert "bundle/bundle.json" in store.all_names()
    assert store.read("metrics.jsonl") == (tmp_path / "new" / "metrics.jsonl").read_bytes()


def test_a_deleted_copy_is_written_again(machine, copy):
    a = machine("a")
    backup = Backup(copy)
    with running(backup, a):
        write(a, step10="x", log="1")
        backup.copy()
        shutil.rmtree(copy)
    assert read(copy) == {"checkpoints/10/array": "x", "log": "1"}


@pytest.mark.parametrize("url", ["s3:/bucket/run", "gs:/bucket"])
def test_a_url_with_one_slash_is_refused(url):
    with pytest.raises(ConfigError, match=rf"^--backup: must begin with s3://.* got {url}$"):
        Backup(url)


def test_a_run_that_is_refused_does_not_take_the_copy(tmp_path, tiny_config, copy):
    a = tmp_path / "a"
    tiny_config.train.epochs = 1
    train_and_evaluate(tiny_config, a, Console(is_silent=True), backup=Backup(copy))
    owner = (copy / "backup.json").read_bytes()
    tiny_config.model.dense = 8
    with pytest.raises(ConfigError, match=r"model\.dense"):
        train_and_evaluate(
            tiny_config, tmp_path / "b", Console(is_silent=True), backup=Backup(copy)
        )
    assert (copy / "backup.json").read_bytes() == owner
