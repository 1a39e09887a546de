"""Tests of the script `gpu_report.sh` without a GPU: measurements, time limits and failures."""

import argparse
import json
import os
import pathlib
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

from experiments.benchmarks import common, gpu_table

SCRIPT = REPOSITORY / "experiments" / "benchmarks" / "gpu_report.sh"
# A GPU host can be used for LEASE seconds, of which START seconds pass while the host starts and
# while files are transferred.
LEASE, START = 900, 120
LONGEST_COMMAND = 600


def _list_parts():
    lines = subprocess.check_output(["bash", SCRIPT, "--list"], text=True).splitlines()
    fields = (line.split("\t") for line in lines)
    return {name: (group, int(limit), shlex.split(call)) for name, group, limit, call in fields}


PARTS = _list_parts()


@pytest.fixture
def experiments_on_path(monkeypatch):
    """Adds the folder of the benchmarks to sys.path, so that the scripts can import each other."""
    monkeypatch.syspath_prepend(REPOSITORY / "experiments" / "benchmarks")


def test_the_limits_fit_into_the_lease():
    seconds = dict.fromkeys(("first", "second"), 0)
    for group, limit, _ in PARTS.values():
        seconds[group] += limit
    # 30 seconds are reserved for installing the wheels and for writing the tables.
    assert seconds["first"] <= LONGEST_COMMAND - 30
    assert sum(seconds.values()) + START <= LEASE


def test_every_part_has_a_table():
    assert list(PARTS) == list(gpu_table.PARTS)


class _ParsedError(Exception):
    """An error that ends a script right after the script has parsed its flags."""


@pytest.mark.parametrize("name", PARTS)
def test_programs_and_flags_of_the_parts_exist(name, experiments_on_path, monkeypatch):
    call = PARTS[name][2]
    if name == "tests":
        paths = [argument for argument in call if argument.startswith("tests/")]
        assert paths
        assert all((REPOSITORY / path).exists() for path in paths)
        return
    script, *flags = call[1:]
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments):
        parse_args(parser, *arguments)
        raise _ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    # The list of commands does not quote the name "plain Linen", so `split` would cut the name in
    # two. The underscore prevents this.
    call = " ".join(flags).replace("plain Linen", "plain_Linen").split()
    flags = [flag.replace("plain_Linen", "plain Linen") for flag in call]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(_ParsedError):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")


# This fake Python interpreter fails when it runs check_step.py, and writes results when it runs
# roofline.py.
_STUB = """#!/usr/bin/env bash
case "$*" in
  *--facts*) echo '{"device": "stub"}' > "$3" ;;
  *gpu_table.py*) exec REAL "$@" ;;
  *check_step.py*) echo it breaks >&2; exit 3 ;;
  *roofline.py*)
    for last; do :; done
    echo '{"precision": "bfloat16", "rows": [],
      "peaks": {"flops_per_second": 8e14, "bytes_per_second": 3e12}}' > "${last#--json=}" ;;
  *-c*import*torch*) exit 1 ;;
  *) printf '%s\\n' "PYTHONPATH=$PYTHONPATH" ;;
esac
"""


def test_a_failed_part_stops_no_other_part(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(_STUB.replace("REAL", sys.executable))
    stub.chmod(0o755)
    result = subprocess.run(
        ["bash", SCRIPT, "first", tmp_path / "out"],
        env=os.environ | {"PYTHON": str(stub), "PYTHONPATH": "elsewhere", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout.endswith("failed or out of time: check (exit 3); \n")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    # PyTorch is not installed, so the comparison with torch.compile is skipped.
    expected = [n for n, (group, *_) in PARTS.items() if group == "first" and n != "train_compiled"]
    assert list(found["parts"]) == expected
    assert found["parts"]["check"]["exit"] == 3
    report = (tmp_path / "out" / "report.md").read_text()
    assert "800 TFLOP/s; memory: 3 TB/s" in report
    assert "failed with exit status 3" in report
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "log.txt",
        "report.md",
        "results.json",
    }
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "it breaks" in log
    path = next(line for line in log.splitlines() if line.startswith("PYTHONPATH="))
    folders = path.removeprefix("PYTHONPATH=").split(os.pathsep)
    assert folders[0] == str(REPOSITORY)
    assert folders[-1] == "elsewhere"


@pytest.mark.parametrize("arguments", [[], ["third"]])
def test_wrong_arguments_are_refused(arguments):
    result = subprocess.run(
        ["bash", SCRIPT, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "gpu_report.sh first" in result.stderr


def test_a_computer_without_a_gpu_is_refused():
    code = "import sys; sys.argv[1:] = ['--facts', '/dev/null']; import runpy\n"
    code += "runpy.run_path('experiments/benchmarks/gpu_table.py', run_name='__main__')"
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "JAX sees no GPU" in result.stderr


def test_outcomes_are_read_from_the_output_of_pytest():
    log = """
tests/test_a.py::test_one PASSED   [ 25%]
tests/test_a.py::test_two[a b] FAILED [ 50%]
[gw0] [ 75%] SKIPPED tests/test_b.py::test_three
[gw1] [100%] PASSED tests/test_b.py::test_four[x y]
tests/test_b.py::test_four[x y]
FAILED tests/test_a.py::test_two[a b] - assert 1 == 2
"""
    assert gpu_table.tests_summary(log) == {
        "passed": 2,
        "failed": 1,
        "error": 0,
        "skipped": 1,
        "failures": ["tests/test_a.py::test_two[a b]"],
    }


def test_a_report_shows_the_finished_parts(tmp_path):
    parts = [
        {"name": "train", "exit": 124, "seconds": 100, "limit": 100},
        {"name": "run", "exit": 0, "seconds": 60, "limit": 150},
        {"name": "inference", "exit": 1, "seconds": 3, "limit": 60},
    ]
    (tmp_path / "parts.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))
    (tmp_path / "facts.json").write_text(json.dumps({"device": "H100", "jax": "0.11.2"}))
    step = {"image_size": 224, "batch_size": 32, "floor_ms": 0.5, "ms": {"cnn_jax": 1, "other": 2}}
    (tmp_path / "train.json").write_text(json.dumps([step]))
    run = {"config": "spec_224", "batch_size": 32, "epochs_done": 3, "validation_accuracy": 0.5}
    (tmp_path / "run.json").write_text(json.dumps([run]))
    report = gpu_table.report(gpu_table.collect(tmp_path))
    assert report.startswith("device H100; jax 0.11.2\n")
    assert "(ended at its limit of 100 s)" in report
    assert "| 224 | 32 | other | 2 | 16,000 | 0.5 | 4 |" in report
    assert "| spec_224 | 32 | 3 |  |  |  |  |  | 50.00% |  |" in report
    assert "(3 s, failed with exit status 1)" in report


def test_children_find_the_repository_before_the_callers_packages(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "a:b")
    found = common.child_environment()["PYTHONPATH"].split(os.pathsep)
    assert found == [str(REPOSITORY), "a", "b"]
    monkeypatch.delenv("PYTHONPATH")
    assert common.child_environment()["PYTHONPATH"] == str(REPOSITORY)
    assert common.child_environment(pathlib.Path("/other"))["PYTHONPATH"] == "/other"


def test_actions_take_turns():
    calls, now = [], iter(range(100))
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = common.seconds_in_turns(actions, 2, clock=now.__next__)
    assert "".join(calls) == "ababab"
    assert times == {"a": [1, 1], "b": [1, 1]}


def test_a_library_that_fails_is_left_out(experiments_on_path, capsys):
    import bench_train

    def start(name, program):
        process = bench_train.PeerProcess(name, peer_python=program)
        process.send(do="open")
        return process

    # The program `cat` answers each request with the request itself, and `false` ends at once.
    working, failing = start("PyTorch", "false"), start("torch.compile", "false")
    echo = ["cat"]
    working._process = subprocess.Popen(echo, stdin=-1, stdout=-1, text=True)
    working.send(do="open")
    try:
        found = bench_train.without_failures([working, failing], lambda each: each.receive())
        assert found == [working]
        assert "left out: torch.compile failed" in capsys.readouterr().out
        with pytest.raises(SystemExit, match=r"torch\.compile"):
            bench_train.exit_if_left_out([working, failing], found)
    finally:
        working.close()
    alone = start("PyTorch", "false")
    with pytest.raises(SystemExit, match="nothing can be compared"):
        bench_train.without_failures([alone], lambda each: each.receive())


def test_names_of_libraries_are_checked(experiments_on_path):
    import bench_train

    assert bench_train.peer_names("cnn_jax,plain Linen") == ["cnn_jax", "plain Linen"]
    with pytest.raises(argparse.ArgumentTypeError, match="PyToch"):
        bench_train.peer_names("cnn_jax,PyToch")


def test_a_state_is_compared_bit_for_bit_and_without_tf32(experiments_on_path, tmp_path):
    import bench_train
    import jax
    import peers

    bench_train.write_data(tmp_path / "data.npz", side=8, batch_size=2)
    task = peers.load_task(tmp_path / "data.npz", "float32", dropout=0.5)
    first, second = peers.Ours(task), peers.Ours(task)
    second._step = first._step  # The jitted step is shared, so that JAX compiles only once.
    assert first.digest() == second.digest()
    first.train()
    assert first.digest() != second.digest()
    second.train()
    assert first.digest() == second.digest()
    with first.exact():
        assert jax.config.jax_default_matmul_precision == "highest"


@pytest.mark.parametrize("name", ["plain Linen", "cnn_jax with nn.BatchNorm"])
def test_a_variant_computes_the_same_gradients(experiments_on_path, tmp_path, monkeypatch, name):
    import bench_train
    import peers

    from cnn_jax.models import cnn

    bench_train.write_data(tmp_path / "data.npz", side=8, batch_size=4)
    task = peers.load_task(tmp_path / "data.npz", "float32", dropout=0)
    loss, gradients = peers.Ours(task).loss_and_gradients()
    for layer in ("Conv", "BatchNorm", "max_pool_2x2"):  # Variants change the module.
        monkeypatch.setattr(cnn, layer, getattr(cnn, layer))
    other_loss, other_gradients = peers.PEERS[name](task).loss_and_gradients()
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for key, gradient in gradients.items():
        np.testing.assert_allclose(other_gradients[key], gradient, rtol=1e-3, atol=1e-5)


def test_rates_are_taken_from_a_file(experiments_on_path, tmp_path):
    import bench_train

    peaks = tmp_path / "peaks.json"
    content = {"device": "x", "precision": "bfloat16"}
    content["peaks"] = {"flops_per_second": 1e9, "bytes_per_second": 1e12}
    peaks.write_text(json.dumps(content))
    floors = bench_train.floor_milliseconds(((32, 8), (16, 4)), "bfloat16", peaks)
    assert list(floors) == [(32, 8), (16, 4)]
    # The first shape has twice as many images, and each image has four times as many pixels.
    assert floors[32, 8] == pytest.approx(8 * floors[16, 4], rel=0.05)
    with pytest.raises(subprocess.CalledProcessError):
        bench_train.floor_milliseconds(((32, 8),), "float32", peaks)
