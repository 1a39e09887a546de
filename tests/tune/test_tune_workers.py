"""Tests of several worker processes of a study, with a storage file or a PostgreSQL server."""

import contextlib
import multiprocessing
import os
import pathlib
import pwd
import shutil
import subprocess
import tempfile
import time
from multiprocessing import forkserver

import fakes
import pytest
from conftest import REPOSITORY, free_port
from fakes import counted, install, make_plan, outline, run, states, work


@pytest.fixture(scope="module")
def processes():
    """A multiprocessing context that forks a process in which all modules are already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fakes"])
    folders = [pathlib.Path(fakes.__file__).parent, REPOSITORY]
    with pytest.MonkeyPatch.context() as patch:
        # The fork server is a new Python process. It gets PYTHONPATH, but not the sys.path of this
        # process.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


@pytest.fixture
def begin(processes, tmp_path):
    """A function that starts a worker process for each plan, all at the same moment."""
    workers = []

    def begin(*plans, pause=0.0):
        at_once = processes.Barrier(len(plans) + 1)
        for plan in plans:
            output = tmp_path / f"worker-{len(workers)}"
            worker = processes.Process(target=work, args=(plan, pause, at_once, output))
            worker.start()
            worker.output = output
            workers.append(worker)
        at_once.wait(60)
        return workers[-len(plans) :]

    yield begin
    for worker in workers:
        worker.kill()
        worker.join()


def finish(workers):
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0, worker.output.read_text()


def wait_for(path, worker):
    """Waits until a file exists; fails if the worker ends first."""
    while not path.exists():
        assert worker.is_alive(), worker.output.read_text()
        time.sleep(0.005)


def check(study, trials):
    """Checks that a study has the given number of finished trials, with all epochs in order."""
    assert len(counted(study)) == trials
    assert all(trial.state.is_finished() for trial in study.trials), states(study)
    assert "fail" not in [trial.state.name.lower() for trial in counted(study)]
    for trial in study.trials:
        assert list(trial.intermediate_values) == list(range(1, len(trial.intermediate_values) + 1))


def epochs(*folders):
    """Returns the number of trained epochs. The fake trainer fails if it trains an epoch twice."""
    return sum(len(list(folder.glob("trials/*/epoch-*"))) for folder in folders)


@pytest.fixture
def trainer(monkeypatch):
    return install(monkeypatch.setattr)


def test_four_workers_start_together_with_a_journal(begin, tmp_path, trainer):
    """Four workers complete a study in two folders, as if two ran on another machine."""
    folders = (tmp_path / "a", tmp_path / "b")
    changes = {"storage": f"journal:{tmp_path}/journal", "trials": 12, "storage_timeout": 30.0}
    plans = [make_plan(folder, **changes) for folder in folders * 2]
    finish(begin(*plans, pause=0.02))
    study = run(plans[0])
    check(study, 12)
    assert epochs(*folders) == sum(len(trial.intermediate_values) for trial in counted(study))
    # This process trains no trial, because all trials are finished.
    assert not trainer.configs


def test_another_worker_continues_the_trial_of_a_killed_one(begin, tmp_path, trainer):
    """One of two workers that share a new SQLite file is killed; the other continues its trial."""
    plan = make_plan(tmp_path / "s", trials=6, storage_timeout=30.0)
    first, second = begin(plan, plan, pause=0.1)
    wait_for(tmp_path / "s/trials/0000/epoch-0001", first)
    first.kill()
    second.join(60)
    assert second.exitcode == 0, second.output.read_text()
    study = run(plan)
    check(study, 6)
    assert epochs(tmp_path / "s") == sum(len(trial.intermediate_values) for trial in study.trials)


def find_programs():
    """Returns the folder of initdb and pg_ctl; skips the test without PostgreSQL."""
    folders = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in [*map(pathlib.Path, os.get_exec_path()), *folders]:
        if all(os.access(folder / name, os.X_OK) for name in ("initdb", "pg_ctl")):
            return folder
    pytest.skip("there is no PostgreSQL server: no initdb and pg_ctl")


class Server:
    """A PostgreSQL server for these tests, without protection against power failures."""

    def __init__(self, folder):
        self._programs, self._folder = find_programs(), folder
        self._user = {}
        if os.geteuid() == 0:  # PostgreSQL does not start as root.
            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("root starts no PostgreSQL server, and there is no user postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._port = free_port()
        self._run("initdb", "--username=tester", "--auth=trust", "--encoding=UTF8", "--no-sync")

    def _run(self, program, *arguments):
        with (self._folder / "output").open("w+") as output:
            code = subprocess.run(
                [self._programs / program, "-D", self._folder / "data", *arguments],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=60,
                **self._user,
            ).returncode
            output.seek(0)
            if code and program == "initdb":
                pytest.skip(f"initdb has failed: {output.read()[-500:]}")
            assert not code, output.read()

    def start(self):
        # The option -k '' prevents a socket file.
        options = f"-h 127.0.0.1 -p {self._port} -k '' -F"
        log = self._folder / "log"
        self._run("pg_ctl", "--wait", f"--log={log}", f"--options={options}", "start")

    def stop(self):
        """Stops the server at once, without a clean shutdown, as SIGKILL would."""
        self._run("pg_ctl", "--wait", "--mode=immediate", "stop")

    def url(self):
        return f"postgresql://tester@127.0.0.1:{self._port}/postgres"


@pytest.fixture(scope="module")
def server():
    # If root runs the tests, the server's user cannot access the folders of pytest.
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        server = Server(folder)
        server.start()
        yield server
        with contextlib.suppress(AssertionError):  # A failed test may have stopped the server.
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_two_workers_start_together_with_a_server(begin, tmp_path, server, trainer):
    folders = (tmp_path / "a", tmp_path / "b")
    plans = [
        make_plan(folder, name="two", storage=server.url(), trials=12, storage_timeout=30.0)
        for folder in folders
    ]
    finish(begin(*plans, pause=0.02))
    study = run(plans[0])
    check(study, 12)
    assert epochs(*folders) == sum(len(trial.intermediate_values) for trial in counted(study))
    assert not trainer.configs
    assert all(epochs(folder) for folder in folders)


def test_workers_wait_for_a_server_that_restarts(begin, tmp_path, server, trainer):
    plan = make_plan(
        tmp_path / "s", name="away", storage=server.url(), trials=8, storage_timeout=60.0
    )
    workers = begin(plan, plan, pause=0.05)
    wait_for(tmp_path / "s/trials/0003/epoch-0001", workers[0])
    server.stop()
    time.sleep(2)
    server.start()
    finish(workers)
    output = "".join(worker.output.read_text() for worker in workers)
    assert "Traceback" not in output
    # Optuna logs warnings that contain long queries.
    assert "[W " not in output
    study = run(plan)
    check(study, 8)
    assert epochs(tmp_path / "s") == sum(len(trial.intermediate_values) for trial in study.trials)


def test_a_server_timeout_loses_no_trial(begin, tmp_path, server, trainer):
    """After the restart of the server, the study has the same result as an undisturbed study."""
    changes = {"storage": server.url(), "trials": 5}
    expected = outline(run(make_plan(tmp_path / "undisturbed", name="undisturbed", **changes)))
    plan = make_plan(tmp_path / "s", name="gone", storage_timeout=1.0, **changes)
    (worker,) = begin(plan, pause=0.05)
    wait_for(tmp_path / "s/trials/0001/epoch-0001", worker)
    server.stop()
    start = time.monotonic()
    worker.join(60)
    took = time.monotonic() - start
    server.start()
    lines = worker.output.read_text().splitlines()
    assert worker.exitcode == 1
    assert lines[-1].startswith("error: the study's storage has not answered for 1 s (")
    assert f"the current one is saved in {tmp_path}/s; start the same command again" in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert took < 20  # Optuna itself retries adding a trial for several seconds.
    assert outline(run(plan)) == expected
