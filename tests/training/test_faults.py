"""Tests of runs in new processes, with simulated faults: signals, full disks, damaged files."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from bundles import make_bundle
from conftest import REPOSITORY

from cnn_jax.inference.bundle import write_bundle
from cnn_jax.training.run_directory import EpochLog

TINY = (
    "--config=configs/folder.py",
    "--config.data.image_size=16",
    "--config.model.features=(4,8)",
    "--config.model.dense=8",
    "--config.train.batch_size=8",
    "--config.train.patience=1000",
    "--config.report.detail=none",
)
# This number of epochs is so large that no run finishes during a test.
ENDLESS = "--config.train.epochs=100000"


def command(source, workdir, *flags):
    return [
        *(sys.executable, "-m", "cnn_jax.main", *TINY),
        f"--config.data.source=folder:{source}",
        f"--workdir={workdir}",
        *flags,
    ]


def start(source, workdir, *flags, **options):
    return subprocess.Popen(
        command(source, workdir, *flags),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(source, workdir, *flags, **options):
    process = start(source, workdir, *flags, **options)
    process.stdout, process.stderr = process.communicate()
    return process


def wait_for_epochs(workdir, epochs, processes):
    """Waits until a run has finished `epochs` epochs; fails if a process ends earlier."""
    log = workdir / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < epochs:
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@contextlib.contextmanager
def running(source, workdir, *flags, epochs=1, **options):
    """A context with a running process that has finished at least `epochs` epochs."""
    process = start(source, workdir, *flags, **options)
    try:
        wait_for_epochs(workdir, epochs, [process])
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def one_line(stderr):
    """Returns the error message, which must be a single line at the end of stderr."""
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    assert stderr.splitlines()[-1] == errors[0]
    return errors[0]


def workers(process):
    """Returns the PIDs of a run's Grain workers: spawned children except the resource tracker."""
    tasks = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for task in tasks for pid in task.read_text().split()]
    lines = {pid: pathlib.Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids}
    return [pid for pid, line in lines.items() if b"spawn_main" in line]


def is_alive(pid):
    with contextlib.suppress(OSError):
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"
    return False


def results(workdir):
    """Returns the log without times, and the result files, which must be bitwise reproducible."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"], record["images_per_second"]
    files = ("bundle/weights.safetensors", "report/predictions.csv", "report/metrics.json")
    return records, [(workdir / file).read_bytes() for file in files]


@pytest.fixture
def images(image_folder, tmp_path):
    """A copy of the image folder, which a test may change."""
    shutil.copytree(image_folder, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture(scope="module")
def undisturbed(image_folder, tmp_path_factory):
    """The folder of a run of 6 epochs without faults."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    process = run(image_folder, workdir, "--config.train.epochs=6")
    assert process.returncode == 0, process.stderr
    return workdir


def test_a_second_run_in_the_same_folder_is_refused(image_folder, tmp_path):
    workdir = tmp_path / "run"
    with running(image_folder, workdir, ENDLESS) as first:
        second = run(image_folder, workdir, ENDLESS)
        assert second.returncode == 2
        message = one_line(second.stderr)
        assert f"in use by process {first.pid} on {socket.gethostname()} since 20" in message
        assert first.poll() is None
        first.kill()
        first.communicate()
        # The operating system has released the lock of the killed run.
        third = run(image_folder, workdir, "--config.train.epochs=1")
        assert "is in use" not in third.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_during_compilation(image_folder, tmp_path, signum):
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    flags = [flag for flag in command(image_folder, tmp_path / "run", ENDLESS) if "=16" not in flag]
    # This network takes a long time to compile.
    process = subprocess.Popen(
        [*flags, "--config.model.features=(8,8,8,8)"],
        cwd=REPOSITORY,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("results"):
            break
    time.sleep(0.5)
    process.send_signal(signum)
    for line in process.stderr:
        if "interrupt again to stop at once" in line:
            break
    began = time.monotonic()
    process.send_signal(signum)
    process.communicate()
    # The process usually ends much faster, but the machine may be busy.
    assert time.monotonic() - began < 5
    assert process.returncode == 128 + signum


@pytest.mark.parametrize("delay", [0.6, 0.9, 1.2, 1.3, 1.4, 1.6, 2.0])
def test_a_signal_before_the_first_step_exits_with_75(image_folder, tmp_path, delay):
    """A signal during imports, JAX's start, or the scan of the data ends the run with status 75."""
    process = start(image_folder, tmp_path / "run", ENDLESS)
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate()
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("interrupted")


def test_worker_processes_end_when_the_run_is_killed(image_folder, tmp_path):
    flags = (ENDLESS, "--config.data.workers=2", "--config.data.cache=none")
    with running(image_folder, tmp_path / "run", *flags) as process:
        pids = workers(process)
        assert len(pids) == 2
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        while any(map(is_alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_alive, pids))


def test_a_killed_worker_process_is_a_one_line_error(image_folder, tmp_path, undisturbed):
    flags = ("--config.data.workers=2", "--config.data.cache=none")
    workdir = tmp_path / "run"
    with running(image_folder, workdir, *flags, "--config.train.epochs=200") as process:
        os.kill(workers(process)[0], signal.SIGKILL)
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert "a worker process that reads the data was killed" in one_line(stderr)
    assert "continues from the latest checkpoint" in stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_image_is_named_and_the_run_resumes_later(images, tmp_path, undisturbed, workers):
    workdir = tmp_path / "run"
    flags = (f"--config.data.workers={workers}", "--config.data.cache=none")
    gone = tmp_path / "gone"
    with running(images, workdir, *flags, "--config.optimizer.decay_epochs=6", ENDLESS) as process:
        (images / "red").rename(gone)
        _, stderr = process.communicate()
    assert process.returncode == 1
    assert re.search(r"red/\d+\.png cannot be read: No such file or directory", one_line(stderr))
    again = run(images, workdir, *flags, ENDLESS)
    assert "the data has changed" in one_line(again.stderr)
    gone.rename(images / "red")
    # The first run may have finished more than six epochs before the images were moved.
    epochs = 6 + len((workdir / "metrics.jsonl").read_text().splitlines())
    last = run(images, workdir, *flags, f"--config.train.epochs={epochs}")
    assert last.returncode == 0, last.stderr
    records, expected = results(workdir)[0], results(undisturbed)[0]
    assert len(records) == epochs
    assert records[:6] == expected


def test_a_damaged_checkpoint_is_reported_and_its_predecessor_is_used(
    image_folder, tmp_path, undisturbed
):
    """The latest of four checkpoints is damaged; the results equal those of an undamaged run."""
    workdir = tmp_path / "run"
    flags = ("--config.optimizer.decay_epochs=6",)
    assert run(image_folder, workdir, *flags, "--config.train.epochs=4").returncode == 0
    latest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    rng = random.Random(0)
    file = max((latest / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 0x10
    file.write_bytes(content)
    process = run(image_folder, workdir, *flags, "--config.train.epochs=6")
    assert process.returncode == 0, process.stderr
    assert f"warning     the checkpoint of step {latest.name} is damaged" in process.stderr
    assert f"continues from step {int(latest.name) - 6}" in process.stderr
    assert [path.name for path in (workdir / "damaged").iterdir()] == [latest.name]
    assert results(workdir) == results(undisturbed)


@contextlib.contextmanager
def small_disk(folder, size):
    """A context in which an in-memory file system of the given size is mounted at `folder`."""
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True
    )
    if mount.returncode:
        pytest.skip("only root may mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def test_a_full_disk_is_reported_and_the_run_resumes_later(image_folder, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    with small_disk(disk, "8m"):
        workdir = disk / "run"
        flags = ("--config.optimizer.decay_epochs=6",)
        with running(image_folder, workdir, *flags, ENDLESS) as process:
            filler = disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb") as file:
                while True:
                    file.write(b"x" * 4096)
                    file.flush()
            _, stderr = process.communicate()
        assert process.returncode == 1
        assert "No space left on device" in one_line(stderr)
        assert str(workdir) in one_line(stderr)
        filler.unlink()
        epochs = 6 + len((workdir / "metrics.jsonl").read_text().splitlines())
        process = run(image_folder, workdir, *flags, f"--config.train.epochs={epochs}")
        assert process.returncode == 0, process.stderr
        records = results(workdir)[0]
        assert len(records) == epochs
        assert records[:6] == results(undisturbed)[0]


def test_a_full_disk_for_events_raises_in_the_run(tmp_path):
    """A disk error is raised in the run itself; in a writer thread it would not be noticed.

    With a writer thread, the run would block at the tenth event.
    """
    with small_disk(tmp_path / "disk", "4k"):
        (tmp_path / "tensorboard").symlink_to(tmp_path / "disk")
        threads = threading.active_count()
        log = EpochLog(tmp_path, [])
        with pytest.raises(OSError, match="No space left on device") as raised:
            log.append({"epoch": 1, "step": 10, "train_" + 5000 * "x": 0.5})
        assert raised.value.filename == str(tmp_path / "tensorboard")
        assert threading.active_count() == threads
        with pytest.raises(OSError, match="No space left on device"):
            log.close()


def test_a_full_disk_for_results_is_reported(image_folder, tmp_path, undisturbed):
    """If the disk of the report folder is full, the run ends with an error message of one line."""
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "report")
    with small_disk(tmp_path / "disk", "4k"):
        (workdir / "report").symlink_to(tmp_path / "disk")
        process = run(image_folder, workdir, "--config.train.epochs=6")
        assert process.returncode == 1
        assert "No space left on device" in one_line(process.stderr)
        assert str(workdir / "report") in one_line(process.stderr)
    (workdir / "report").unlink()
    assert run(image_folder, workdir, "--config.train.epochs=6").returncode == 0
    assert results(workdir) == results(undisturbed)


def test_a_bundle_that_does_not_fit_keeps_the_old_bundle(tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "64k"):
        write_bundle(make_bundle(), disk / "bundle")
        before = (disk / "bundle" / "weights.safetensors").read_bytes()
        with contextlib.suppress(OSError):
            (disk / "filler").write_bytes(b"x" * 65536)
        with pytest.raises(OSError, match="No space left on device") as error:
            write_bundle(make_bundle(), disk / "bundle")
        assert str(disk) in str(error.value.filename)
        assert (disk / "bundle" / "weights.safetensors").read_bytes() == before
        assert sorted(path.name for path in disk.iterdir()) == ["bundle", "filler"]


def test_a_read_only_folder_is_reported_before_the_data_is_read(image_folder, tmp_path):
    disk = tmp_path / "disk"
    with small_disk(disk, "8m"):
        assert run(image_folder, disk / "run", "--config.train.epochs=1").returncode == 0
        remount(disk, "ro")
        for workdir in (disk / "run", disk / "other"):
            process = run(image_folder, workdir, "--config.train.epochs=1")
            assert process.returncode == 2
            assert one_line(process.stderr) == process.stderr.strip()
            assert "cannot use" in process.stderr
            assert "Read-only file system" in process.stderr


def test_a_too_large_batch_is_reported_before_the_first_step(image_folder, tmp_path):
    """A batch that does not fit into memory is refused before the first step.

    The default network needs about 3 MB for each image of 64 x 64 pixels.
    """
    flags = [flag for flag in command(image_folder, tmp_path / "run") if "model" not in flag]
    flags.remove("--config.data.image_size=16")
    process = subprocess.run(
        [
            *(*flags, "--config.data.cache=device", "--config.augment.place=device"),
            f"--config.train.batch_size={2**17}",
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 1
    message = one_line(process.stderr)
    assert "out of memory: a training step with train.batch_size=131072 needs about" in message
    advice = r"train\.batch_size that fits is about (\d+), and train\.accumulation_steps=(\d+)"
    largest, parts = map(int, re.search(advice, message).groups())
    assert 2**17 / parts <= largest < 2**17
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_running_out_of_memory_is_a_one_line_error(image_folder, tmp_path):
    """If memory runs out after the compilation, the run ends with an error message of one line."""
    code = (
        "import pathlib, resource, sys\n"
        "from cnn_jax import main\n"
        "from cnn_jax.system import cli\n"
        "from cnn_jax.training import memory\n"
        "check = memory.Memory.check\n"
        "def limited(self, *arguments):\n"
        "    check(self, *arguments)\n"
        "    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])\n"
        "    limit = pages * resource.getpagesize() + 100_000_000\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "memory.Memory.check = limited\n"
        "cli.run(main.main)\n"
    )
    flags = command(image_folder, tmp_path / "run", "--config.train.epochs=1")[3:]
    flags += ["--config.data.cache=device", "--config.augment.place=device"]
    process = subprocess.run(
        [sys.executable, "-c", code, *flags, "--config.train.batch_size=65536"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1, process.stderr
    message = one_line(process.stderr)
    assert re.search(r"needs about [\d,.]+ .B of each device, which now has \d+ MB; ", message)
