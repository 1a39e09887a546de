"""Tests in which several processes use one registry at the same time, and some are killed."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from registry_tools import figures, outline, vary

from cnn_jax.inference.bundle import read_bundle
from cnn_jax.registry.registry import Registry

pytest_plugins = ["registry_fixtures"]

# A worker process waits for a line on stdin, then adds bundles and prints a line for each bundle.
WORKER = """
import json, pathlib, sys
from cnn_jax.inference import bundle
from cnn_jax.system.errors import UserError
from cnn_jax.registry.registry import Registry

registry = Registry(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for path in sys.argv[2:]:
    added = registry.add("flowers", path)
    print(json.dumps([path, added.version.number, added.is_new]), flush=True)
    registry.promote("flowers", added.version.number, "mine")
    try:
        registry.promote("flowers", added.version.number)
        registry.rollback("flowers")
    except UserError:
        pass
    if added.version.number % 3 == 0:
        try:
            registry.remove("flowers", added.version.number)
        except UserError:
            pass
"""


@pytest.fixture
def workers():
    """Starts processes, waits until all are ready, and lets them begin at the same time."""
    processes = []

    def start(*arguments):
        for one in arguments:
            command = [sys.executable, "-c", WORKER, *map(str, one)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            processes.append(process)
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return processes

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def bundles(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    return [
        vary(bundle, folder / str(i), temperature=1.0 + i, metrics=figures(0.5)) for i in range(20)
    ]


def test_concurrent_processes_write_one_history(workers, bundles, tmp_path):
    """Each of three processes adds six bundles: two that all processes add, and four of its own."""
    root = tmp_path / "registry"
    shares = [[*bundles[:2], *bundles[2 + 4 * i : 6 + 4 * i]] for i in range(3)]
    processes = workers(*([root, *share] for share in shares))
    said = []
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        said += map(json.loads, output.splitlines())

    registry = Registry(root)
    added = [entry for entry in registry.log if entry.action == "add"]
    assert [entry.version for entry in added] == list(range(1, len(added) + 1))
    assert [entry.number for entry in registry.log] == list(range(1, len(registry.log) + 1))
    assert len({entry.id for entry in registry.log}) == len(registry.log)
    new = sorted(number for _, number, is_new in said if is_new)
    assert new == [entry.version for entry in added]
    # A bundle that is already in the registry is not added again until it has been removed.
    digests = {}
    for entry in registry.log:
        if entry.action == "add":
            assert entry.bundle.digest not in digests.values()
            digests[entry.version] = entry.bundle.digest
        elif entry.action == "remove":
            del digests[entry.version]
    model = registry.models["flowers"]
    assert digests == {number: version.bundle.digest for number, version in model.versions.items()}
    for version in model.versions.values():
        read_bundle(registry.fetch(version, "unused"))
    folders = {f"bundles/{path.name}" for path in (root / "bundles").iterdir()}
    assert folders == {version.bundle.path for version in model.versions.values()}
    assert not list((root / "tmp").iterdir())


def test_killed_processes_leave_a_usable_registry(workers, bundles, tmp_path):
    """Kills three of four processes at random moments; the fourth process continues."""
    root = tmp_path / "registry"
    shares = [bundles[5 * i : 5 * i + 5] for i in range(4)]
    processes = workers(*([root, *share] for share in shares))
    randomly = random.Random(0)
    for process in processes[:3]:
        time.sleep(randomly.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        state = outline(Registry(root)) if (root / "registry.json").exists() else {}
        assert not state or state["flowers"][2] > 0
    output, _ = processes[3].communicate(timeout=120)
    assert processes[3].returncode == 0
    assert len(output.splitlines()) == 5
    assert sum(process.wait() == -signal.SIGKILL for process in processes[:3]) >= 2

    registry = Registry(root)
    for version in registry.models["flowers"].versions.values():
        read_bundle(registry.fetch(version, "unused"))
    for path in bundles:
        registry.add("flowers", path)
    registry.promote("flowers", registry.models["flowers"].last)
    digests = {version.bundle.digest for version in registry.models["flowers"].versions.values()}
    assert len(digests) == len(bundles)
    assert outline(Registry(root)) == outline(registry)
    shutil.rmtree(root)
