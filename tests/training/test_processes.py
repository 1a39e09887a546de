"""Compares runs of several processes on this machine with a run of one process."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest
from conftest import REPOSITORY, free_port
from test_faults import command, one_line, wait_for_epochs

EPOCHS = "--config.train.epochs=4"


def _environment(devices):
    return os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}


@contextlib.contextmanager
def _processes(source, workdir, *flags, count=2, devices=2, environments=None, caches=None):
    """A context with `count` processes of one run, each with `devices` devices.

    The processes use the cache folders `caches`; by default all use the same folder.
    """
    port = free_port()
    processes = []
    for process_id in range(count):
        own = [
            f"--coordinator=localhost:{port}",
            f"--process_id={process_id}",
            f"--process_count={count}",
        ]
        processes.append(
            subprocess.Popen(
                command(source, workdir, *flags, *([] if environments else own)),
                cwd=REPOSITORY,
                env=_environment(devices)
                | (environments(process_id, port) if environments else {})
                | ({"CNN_JAX_CACHE": str(caches[process_id])} if caches else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _finish(processes):
    """Waits for processes to end; returns their exit codes and their output on stderr."""
    outputs = [process.communicate(timeout=300)[1] for process in processes]
    return [process.returncode for process in processes], outputs


def _run_one_process(source, workdir, *flags, devices):
    process = subprocess.run(
        command(source, workdir, *flags),
        cwd=REPOSITORY,
        env=_environment(devices),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process


def _history(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def _assert_same_to_rounding(first, second):
    """Checks that two runs have equal losses and test predictions, except for rounding."""
    for a, b in zip(_history(first), _history(second), strict=True):
        for key in ("epoch", "step", "learning_rate"):
            assert a[key] == b[key]
        for key in ("train_loss", "validation_loss"):
            assert a[key] == pytest.approx(b[key], rel=2e-4)
    rows = [
        [row.split(",") for row in (run / "report" / "predictions.csv").read_text().splitlines()]
        for run in (first, second)
    ]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    confidences = [np.array([row[3] for row in lines[1:]], float) for lines in rows]
    np.testing.assert_allclose(*confidences, atol=2e-3)


@pytest.fixture(scope="module")
def one_process_run(image_folder, tmp_path_factory):
    """The folder of a run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one_process_run") / "run"
    _run_one_process(image_folder, workdir, EPOCHS, devices=4)
    return workdir


def test_two_processes_of_two_devices_equal_one_of_four(image_folder, tmp_path, one_process_run):
    with _processes(image_folder, tmp_path / "run", EPOCHS) as processes:
        codes, outputs = _finish(processes)
    assert codes == [0, 0], outputs
    _assert_same_to_rounding(tmp_path / "run", one_process_run)
    # Only the first process prints and writes.
    assert "4 x cpu, float32, in 2 processes" in outputs[0]
    assert "epoch" not in outputs[1]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    report = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert report["train"]["count"] == 45


def test_parameters_may_be_divided_between_processes(image_folder, tmp_path, one_process_run):
    flags = (EPOCHS, "--config.mesh.model=4", "--config.mesh.data=1")
    with _processes(image_folder, tmp_path / "run", *flags) as processes:
        codes, outputs = _finish(processes)
    assert codes == [0, 0], outputs
    assert "4 for each copy of the network" in outputs[0]
    _assert_same_to_rounding(tmp_path / "run", one_process_run)


def test_processes_start_from_trained_weights_and_a_probe(image_folder, tmp_path, one_process_run):
    flags = (
        "--config.train.epochs=2",
        f"--config.checkpoint.init_from={one_process_run}",
        "--config.train.probe=True",
    )
    _run_one_process(image_folder, tmp_path / "one", *flags, devices=4)
    # Only the first process has the features of the run of one process in its cache.
    caches = [os.environ["CNN_JAX_CACHE"], tmp_path / "cache"]
    stored = sorted(pathlib.Path(caches[0], "features").iterdir())
    with _processes(image_folder, tmp_path / "two", *flags, caches=caches) as processes:
        codes, outputs = _finish(processes)
    assert codes == [0, 0], outputs
    assert stored == sorted(pathlib.Path(caches[0], "features").iterdir()) != []
    assert "the probe fitted the head" in outputs[0]
    assert "the probe fitted the head" not in outputs[1]
    assert [row["epoch"] for row in _history(tmp_path / "two")] == [0, 1, 2]
    _assert_same_to_rounding(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_processes_stop_at_the_same_step_and_resume(
    image_folder, tmp_path, one_process_run, signum
):
    """One process gets a signal; the run resumes with one device, then with four devices."""
    workdir = tmp_path / "run"
    endless = ("--config.train.epochs=100000", "--config.optimizer.decay_epochs=4")
    with _processes(image_folder, workdir, *endless) as processes:
        wait_for_epochs(workdir, 1, processes)
        processes[1].send_signal(signum)
        codes, outputs = _finish(processes)
    assert codes == [75, 75], outputs
    stopped = [text.splitlines()[-1] for text in outputs]
    assert "interrupted: saved after step" in stopped[0]
    assert stopped[0] == stopped[1]
    done = len(_history(workdir))
    for devices, epochs in ((1, done + 1), (4, done + 2)):
        _run_one_process(image_folder, workdir, f"--config.train.epochs={epochs}", devices=devices)
        assert len(_history(workdir)) == epochs
    for a, b in zip(_history(workdir), _history(one_process_run), strict=False):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-4)


def test_a_signal_before_the_first_resumed_step_is_obeyed(image_folder, tmp_path):
    workdir = tmp_path / "run"
    endless = "--config.train.epochs=100000"
    _run_one_process(image_folder, workdir, "--config.train.epochs=2", devices=2)
    with _processes(image_folder, workdir, endless, devices=1) as processes:
        for line in processes[0].stderr:
            if line.startswith("continues from step"):
                break
        for process in processes:
            process.send_signal(signal.SIGTERM)
        codes, outputs = _finish(processes)
    assert codes == [75, 75], outputs
    assert "interrupted: saved after step" in outputs[1]


def test_only_the_first_process_writes_a_trace(image_folder, tmp_path):
    flags = (EPOCHS, "--profile")
    with _processes(image_folder, tmp_path / "run", *flags, devices=1) as processes:
        codes, outputs = _finish(processes)
    assert codes == [0, 0], outputs
    assert len(list((tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz"))) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_if_one_process_is_killed_the_other_ends(image_folder, tmp_path, one_process_run, victim):
    workdir = tmp_path / "run"
    endless = ("--config.train.epochs=100000", "--config.optimizer.decay_epochs=4")
    with _processes(image_folder, workdir, *endless) as processes:
        # After three epochs, at least one checkpoint is complete.
        wait_for_epochs(workdir, 3, processes)
        began = time.monotonic()
        processes[victim].kill()
        _, stderr = processes[1 - victim].communicate(timeout=120)
        assert time.monotonic() - began < 60
        assert processes[1 - victim].returncode != 0
    # JAX ends the process with a message of its own. If a collective operation fails first, the
    # message is from cnn_jax.
    assert "another task died" in stderr or "another process of this run" in one_line(stderr)
    done = len(_history(workdir))
    with _processes(image_folder, workdir, f"--config.train.epochs={done + 1}") as processes:
        codes, outputs = _finish(processes)
    assert codes == [0, 0], outputs
    assert "continues from step" in outputs[0]
    assert len(_history(workdir)) == done + 1


def test_a_failed_start_of_one_process_ends_all_processes(image_folder, tmp_path):
    (tmp_path / "run" / "checkpoints" / "6").mkdir(parents=True)
    # The folder contains the configuration of another run.
    (tmp_path / "run" / "config.json").write_text("{}")
    with _processes(image_folder, tmp_path / "run", EPOCHS) as processes:
        codes, outputs = _finish(processes)
    assert codes == [2, 2]
    for text in outputs:
        assert "contains a run with another configuration" in one_line(text)


def test_the_primary_process_reports_a_folder_in_use(image_folder, tmp_path):
    from cnn_jax.training import run_directory

    with (
        run_directory.lock(tmp_path / "run"),
        _processes(image_folder, tmp_path / "run", EPOCHS) as processes,
    ):
        codes, outputs = _finish(processes)
    assert codes == [2, 1]
    assert f"is in use by process {os.getpid()}" in one_line(outputs[0])
    assert "process 0 could not start; see its message" in one_line(outputs[1])


def test_processes_with_different_configurations_are_refused(image_folder, tmp_path):
    port = free_port()
    processes = [
        subprocess.Popen(
            command(
                *(image_folder, tmp_path / "run", f"--config.seed={process_id}"),
                *(f"--coordinator=localhost:{port}", f"--process_id={process_id}"),
                "--process_count=2",
            ),
            cwd=REPOSITORY,
            env=_environment(1),
            stderr=subprocess.PIPE,
            text=True,
        )
        for process_id in range(2)
    ]
    codes, outputs = _finish(processes)
    assert codes == [1, 1]
    for text in outputs:
        assert "process 1 has another configuration than process 0" in one_line(text)


def _slurm(process_id, port):
    return {
        "SLURM_JOB_ID": str(port),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process_id),
        "SLURM_LOCALID": str(process_id),
    }


def _open_mpi(process_id, port):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{port * 2**12}.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(process_id),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process_id),
    }


@pytest.mark.parametrize("environments", [_slurm, _open_mpi])
def test_jax_detects_processes_of_slurm_and_open_mpi(image_folder, tmp_path, environments):
    flags = "--config.train.epochs=1"
    with _processes(
        image_folder, tmp_path / "run", flags, devices=1, environments=environments
    ) as processes:
        codes, outputs = _finish(processes)
    assert codes == [0, 0], outputs
    assert "2 x cpu, float32, in 2 processes" in outputs[0]
