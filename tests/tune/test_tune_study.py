"""Tests of one worker of a study, or of several workers that interfere at a chosen moment."""

import contextlib
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import types

import pytest
from fakes import (
    SECONDS,
    SPACE,
    Killed,
    Log,
    counted,
    install,
    make_plan,
    outline,
    raising,
    run,
    states,
)
from optuna.distributions import FloatDistribution
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState

from cnn_jax.config import schema
from cnn_jax.system.errors import ConfigError, DataError, TrainingError
from cnn_jax.tune import search, storage
from cnn_jax.tune import study as studies
from cnn_jax.tune.storage import StorageError


@pytest.fixture
def log(monkeypatch):
    """Puts the storage of all studies in memory, with retries that do not sleep."""
    log = Log()
    monkeypatch.setattr(storage, "open_storage", log.open)
    clock = itertools.count(step=0.1)
    patient = types.SimpleNamespace(monotonic=clock.__next__, sleep=lambda seconds: None)
    monkeypatch.setattr(storage, "time", patient)
    return log


@pytest.fixture
def trainer(monkeypatch):
    return install(monkeypatch.setattr)


@pytest.fixture
def clock(monkeypatch):
    """A fake clock of studies, which changes only when a test sets `now`."""
    clock = types.SimpleNamespace(now=1e9)
    patched = types.SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(studies, "time", patched)
    return clock


@pytest.fixture
def undisturbed(tmp_path, monkeypatch, trainer):
    """A function that returns the result of a study without interruptions."""

    def undisturbed(**changes):
        with monkeypatch.context() as patch:
            patch.setattr(storage, "open_storage", Log().open)
            return outline(run(make_plan(tmp_path / "undisturbed", **changes)))

    return undisturbed


def once(operation, action):
    """Returns a function for `Log.before` that calls `action` before the first entry of a kind."""
    done = []

    def before(*entries):
        if not done and any(entry["op_code"] == operation for entry in entries):
            done.append(True)
            action()

    return before


# Tests of the result of a study.


@pytest.mark.parametrize("monitor", ["validation_accuracy", "validation_loss"])
def test_a_study_runs_all_its_trials(tmp_path, log, trainer, monitor):
    plan = make_plan(tmp_path, trials=13, config={"train.monitor": monitor, "train.epochs": 9})
    study = run(plan)
    assert set(states(study)) == {"complete", "pruned"}
    assert len(study.trials) == 13
    for trial in study.trials:
        curve = list(trial.intermediate_values.values())
        assert list(trial.intermediate_values) == list(range(1, len(curve) + 1))
        assert trial.user_attrs["seconds"] == SECONDS * len(curve)
        bracket = search.bracket_number(trial.number, 9, 3)
        if trial.state == TrialState.COMPLETE:
            assert len(curve) == 9
            assert trial.value == (max if monitor == "validation_accuracy" else min)(curve)
        else:
            assert len(curve) in search.rungs(9, bracket)
    # The learning rates of the last trials are near the best learning rate.
    rates = [trial.params["optimizer.learning_rate"] for trial in study.trials[10:]]
    assert all(3e-4 < rate < 3e-2 for rate in rates)
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == [
        f"{number:04d}" for number in range(13)
    ]


def test_a_trial_does_not_use_the_test_split(tmp_path, log, trainer):
    plan = make_plan(tmp_path, config={"model.features": (4, 8)})
    study = run(plan)
    base = schema.flat(plan.config)
    assert len(trainer.configs) == 5
    for number, config in trainer.configs.items():
        own = {
            "report.splits": ("validation",),
            "report.detail": "none",
            "report.reference": False,
        }
        assert schema.flat(config) == base | study.trials[number].params | own
    assert study.trials[0].params.keys() == SPACE.keys()
    # The first trial has the configuration's values, except for its batch size, which is not in the
    # space.
    first = {"model.dropout": 0.5, "optimizer.learning_rate": 1e-3}
    assert study.trials[0].params.items() >= first.items()


@pytest.mark.parametrize(("pruner", "judged"), [("none", False), ("halving", True)])
def test_all_pruners_run(tmp_path, log, trainer, pruner, judged):
    study = run(make_plan(tmp_path, trials=9, pruner=pruner))
    assert ("pruned" in states(study)) == judged


def test_a_study_can_be_extended(tmp_path, log, trainer, undisturbed):
    assert len(run(make_plan(tmp_path / "s", trials=3)).trials) == 3
    expected = undisturbed(trials=6)
    assert outline(run(make_plan(tmp_path / "s", trials=6))) == expected
    assert outline(run(make_plan(tmp_path / "s", trials=2))) == expected


# Tests of changes that a study allows or refuses.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"optimizer.l2": 0.25}}, "config.optimizer.l2: 0.0001 -> 0.25"),
        ({"config": {"train.epochs": 4}}, "config.train.epochs: 3 -> 4"),
        ({"config": {"data.image_size": 64}}, "config.data.image_size: [32, 32] -> [64, 64]"),
        ({"config": {"seed": 1}}, "config.seed: 0 -> 1"),
        ({"config": {"train.patience": 2}}, "config.train.patience: 10 -> 2"),
        ({"config": {"checkpoint.init_from": "/a"}}, 'checkpoint.init_from: "" -> "/a"'),
        ({"pruner": "none"}, "pruner: hyperband -> none"),
        (
            {"space": SPACE | {"model.dropout": FloatDistribution(0.0, 0.5)}},
            '"low": 0.0, "high": 0.6, "log": false}} -> {"name": "FloatDistribution", '
            '"attributes": {"step": null, "low": 0.0, "high": 0.5, "log": false}}',
        ),
        (
            {"space": {"model.dropout": SPACE["model.dropout"]}},
            "config.optimizer.learning_rate: absent -> 0.001; config.train.batch_size: absent -> "
            "32; space.optimizer.learning_rate: {",
        ),
        (
            {"space": SPACE | {"optimizer.l2": FloatDistribution(0.0, 0.5)}},
            "config.optimizer.l2: 0.0001 -> absent; space.optimizer.l2: absent -> {",
        ),
    ],
)
def test_a_different_study_with_the_same_name_is_refused(tmp_path, log, trainer, changes, message):
    run(make_plan(tmp_path))
    lines = list(log.lines)
    with pytest.raises(ConfigError) as raised:
        run(make_plan(tmp_path, trials=9, **changes))
    assert message in str(raised.value)
    assert str(raised.value).startswith("--study: fake exists with another definition (")
    assert str(raised.value).endswith("); choose another name")
    assert log.lines[: len(lines)] == lines
    assert len(run(make_plan(tmp_path, trials=9)).trials) == 9


def test_a_study_from_before_a_key_existed_goes_on(tmp_path, log, trainer):
    study = run(make_plan(tmp_path, trials=2))
    definition = dict(study.user_attrs["definition"])
    assert definition.pop("config.data.split_seed") == "-1"
    study.set_user_attr("definition", definition)
    assert len(run(make_plan(tmp_path, trials=3)).trials) == 3
    with pytest.raises(ConfigError, match=r"\(config.data.split_seed: -1 -> 5\)"):
        run(make_plan(tmp_path, trials=4, config={"data.split_seed": 5}))


def test_different_data_is_refused(tmp_path, log, monkeypatch):
    install(monkeypatch.setattr, fingerprint="of red images")
    run(make_plan(tmp_path))
    install(monkeypatch.setattr, fingerprint="of blue images")
    with pytest.raises(ConfigError, match=r"\(data: of red images -> of blue images\)"):
        run(make_plan(tmp_path))


def test_keys_that_change_no_result_may_change(tmp_path, log, trainer, undisturbed):
    run(make_plan(tmp_path / "s", trials=3))
    free = {
        "data.source": "folder:/elsewhere",
        "data.workers": 3,
        "data.cache": "disk",
        "data.max_unreadable": 0.5,
        "train.steps_per_execution": 2,
        "checkpoint.keep": 5,
        "report.detail": "figures",
    }
    plan = make_plan(tmp_path / "s", config=free, storage_timeout=9.0, config_file="other.py")
    assert outline(run(plan)) == undisturbed()


def test_two_studies_in_one_storage_are_independent(tmp_path, log, trainer, undisturbed):
    run(make_plan(tmp_path / "a", name="a"))
    study = run(make_plan(tmp_path / "b", name="b"))
    assert outline(study) == undisturbed()


def test_a_folder_with_trials_of_another_storage_is_refused(tmp_path, log, trainer):
    run(make_plan(tmp_path))
    log.lines.clear()
    with pytest.raises(ConfigError, match=rf"--workdir: {tmp_path}/trials/0000 is a trial that"):
        run(make_plan(tmp_path))
    assert not any("CREATE_TRIAL" in line for line in log.lines)


def test_other_files_among_the_trials_are_ignored(tmp_path, log, trainer):
    for name in ("0007 (copy)", "notes", "0007.tar", ".hidden"):
        (tmp_path / "trials" / name).mkdir(parents=True)
    assert len(run(make_plan(tmp_path)).trials) == 5


def test_a_trial_added_by_another_worker_is_known(tmp_path, log, trainer, monkeypatch):
    """A worker counts a trial that another worker adds after this worker has read the trials."""
    run(make_plan(tmp_path, trials=1))
    read, rivals = studies._Worker._trials, []

    def read_and_add(self, *chosen):
        trials = read(self, *chosen)
        if not rivals:
            rivals.append(self)
            run(make_plan(tmp_path, trials=2))
        return trials

    monkeypatch.setattr(studies._Worker, "_trials", read_and_add)
    assert len(run(make_plan(tmp_path, trials=3)).trials) == 3


def test_two_workers_agree_on_the_id_of_a_folder(tmp_path, monkeypatch):
    link = os.link

    def be_late(source, target):
        pathlib.Path(target).write_text("the-other's fake\n")
        link(source, target)

    monkeypatch.setattr(os, "link", be_late)
    assert studies._read_folder_id(make_plan(tmp_path)) == "the-other's"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_folder_belongs_to_one_study(tmp_path, log, trainer):
    run(make_plan(tmp_path / "s"))
    with pytest.raises(ConfigError, match=r"^--workdir: .*/s is the folder of the study fake$"):
        run(make_plan(tmp_path / "s", name="other"))


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, log, trainer):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"--workdir: cannot use {tmp_path}/file/s: Not a dir"):
        run(make_plan(tmp_path / "file" / "s"))


# Tests of killed and restarted workers.


def test_a_study_killed_at_any_call_has_the_same_result(tmp_path, log, trainer, undisturbed):
    """Simulates SIGKILL before a write to the storage, for many writes of a study.

    The writes are the first ones of the study, and all writes from the tenth trial on: the last
    random trials and the first trials of TPE.
    """
    expected, folder = undisturbed(trials=12), tmp_path / "s"
    moments = []

    def remember(*entries):
        if entries and (len(log.lines) < 40 or len(list(folder.glob("trials/*"))) >= 10):
            copy = shutil.copytree(folder, tmp_path / str(len(moments)))
            moments.append((copy, list(log.lines)))

    log.before = remember
    assert outline(run(make_plan(folder, trials=12))) == expected
    log.before = lambda *entries: None
    assert len(moments) > 70
    for copy, lines in moments:
        log.lines = lines
        assert outline(run(make_plan(copy, trials=12))) == expected, len(lines)


def test_a_study_killed_in_each_epoch_has_the_same_result(tmp_path, log, trainer, undisturbed):
    deaths = []

    def die_three_times(*moment):
        if deaths.count(moment) < 3:
            deaths.append(moment)
            raise Killed

    expected = undisturbed()
    trainer.before_epoch = die_three_times
    while len(set(deaths)) < 50:
        try:
            study = run(make_plan(tmp_path / "s"))
            break
        except Killed:
            pass
    assert outline(study) == expected
    assert len(deaths) == 3 * sum(len(curve) for *_, curve, _ in expected)


@pytest.mark.parametrize(("epoch", "deaths"), [(1, 4), (2, 5)])
def test_a_trial_that_kills_its_process_repeatedly_fails(
    tmp_path, log, trainer, epoch, deaths, monkeypatch
):
    """A trial fails after its process was killed 4 times without finishing a further epoch."""
    monkeypatch.setattr(studies, "_MAX_STARTS", 4)
    trainer.before_epoch = raising(Killed, 1, epoch, times=100)
    plan = make_plan(tmp_path)
    for _ in range(deaths):
        with pytest.raises(Killed):
            run(plan)
    study = run(plan)
    failed = study.trials[1]
    assert failed.state == TrialState.FAIL
    assert failed.user_attrs["error"] == (
        f"its process was killed 4 times after the saved step {10 * (epoch - 1)}"
    )
    assert len(failed.intermediate_values) == epoch - 1
    assert len(counted(study)) == 5
    assert states(study).count("fail") == 1


def test_a_trial_with_new_checkpoints_may_be_killed_often(tmp_path, log, trainer, monkeypatch):
    monkeypatch.setattr(studies, "_MAX_STARTS", 2)
    plan, steps = make_plan(tmp_path), iter(range(1, 10))

    def save_and_die(number, epoch):
        if (number, epoch) == (0, 1) and (step := next(steps, None)):
            (tmp_path / "trials/0000/checkpoints" / str(step)).mkdir(parents=True)
            raise Killed

    trainer.before_epoch = save_and_die
    for _ in range(9):
        with pytest.raises(Killed):
            run(plan)
    assert "fail" not in states(run(plan))


def test_ctrl_c_between_two_trials_ends_the_study(tmp_path, log, trainer, monkeypatch):
    """Ctrl-C ends the study even during a JAX callback that suppresses exceptions."""

    def collect():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(studies, "gc", types.SimpleNamespace(collect=collect))
    # A shell starts background processes with SIGINT ignored, so the test sets the default handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(make_plan(tmp_path))
    finally:
        signal.signal(signal.SIGINT, before)
    assert states(studies.open_study(make_plan(tmp_path))) == ["complete"]


def test_a_study_ends_if_its_first_trials_all_fail(tmp_path, log, trainer):
    def fail(number, epoch):
        raise TrainingError(f"trial {number} is odd")

    trainer.before_epoch = fail
    plan = make_plan(tmp_path, trials=40)
    with pytest.raises(TrainingError, match=r"the first 10 trials have all failed.*trial 9 is odd"):
        run(plan)
    assert len(studies.open_study(plan).trials) == 10


def test_kills_in_different_epochs_fail_no_trial(tmp_path, log, trainer, undisturbed):
    """In each epoch, a trial is interrupted nine times and killed once, and does not fail."""
    expected = undisturbed()
    for number, epoch in [(0, 1), (0, 2), (0, 3)]:
        for error in [KeyboardInterrupt] * 5 + [Killed] + [KeyboardInterrupt] * 4:
            trainer.before_epoch = raising(error, number, epoch)
            with pytest.raises(error):
                run(make_plan(tmp_path / "s"))
    assert outline(run(make_plan(tmp_path / "s"))) == expected


def test_a_pruned_trial_stays_pruned_after_a_kill(tmp_path, log, trainer, undisturbed):
    """After SIGKILL, the trial is not trained further: the storage already has its last epoch."""
    expected = undisturbed()
    number, epoch = next((n, max(c)) for n, s, _, _, c, _ in expected if s == TrialState.PRUNED)

    def die():
        raise Killed

    def die_at_its_end(number_then, epoch_then):
        if number_then == number:
            assert epoch_then <= epoch
            log.before = once(JournalOperation.SET_TRIAL_STATE_VALUES, die)

    trainer.before_epoch = die_at_its_end
    with pytest.raises(Killed):
        run(make_plan(tmp_path / "s"))
    assert outline(run(make_plan(tmp_path / "s"))) == expected


# Tests of errors that end a trial, and of errors that end the study.


@pytest.mark.parametrize("error", [TrainingError("the loss is\nnot finite"), ConfigError("odd")])
def test_the_study_continues_after_a_failed_trial(tmp_path, log, trainer, error):
    trainer.before_epoch = raising(error, 1, 2, times=2)
    study = run(make_plan(tmp_path))
    assert states(study)[1] == "fail"
    assert states(study).count("fail") == 1
    assert len(study.trials) == 5
    assert study.trials[1].user_attrs["error"] == str(error).replace("\n", "\\n")
    assert study.trials[1].value is None
    assert list(study.trials[1].intermediate_values) == [1]


def caused_by(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        DataError("red/1.png cannot be read"),
        OSError(28, "No space left on device"),
        TrainingError("cannot save a checkpoint: write failed: No space left on device [28]"),
        TrainingError("cannot save a checkpoint: Disk quota exceeded"),
        caused_by(TrainingError("cannot save"), ValueError("Read-only file system")),
        caused_by(ConfigError("--workdir: cannot use it"), PermissionError(13, "denied")),
        caused_by(ConfigError("--workdir: it is in use"), BlockingIOError(11, "locked")),
    ],
    ids=repr,
)
def test_an_error_of_data_or_disk_fails_no_trial(tmp_path, log, trainer, undisturbed, error):
    expected = undisturbed()
    trainer.before_epoch = raising(error, 1, 1, times=6)
    for _ in range(6):
        with pytest.raises(type(error)):
            run(make_plan(tmp_path / "s"))
    assert outline(run(make_plan(tmp_path / "s"))) == expected


def test_an_unexpected_error_is_raised(tmp_path, log, trainer):
    trainer.before_epoch = raising(ZeroDivisionError, 1, 1)
    with pytest.raises(ZeroDivisionError):
        run(make_plan(tmp_path))


def test_a_trial_is_resumed_after_the_deadline(tmp_path, log, trainer, clock, undisturbed):
    expected = undisturbed()
    deadline = clock.now + 60

    def pass_time(number, epoch):
        clock.now += 70 * ((number, epoch) == (1, 2))

    trainer.before_epoch = pass_time
    study = run(make_plan(tmp_path / "s", deadline=deadline))
    assert states(study) == ["complete", "running"]
    assert len(list((tmp_path / "s/trials/0001").glob("epoch-*"))) == 2
    # The list is empty, because no process was killed.
    assert study.trials[1].user_attrs["starts"] == []
    assert len(run(make_plan(tmp_path / "s", deadline=deadline)).trials) == 2
    assert trainer.configs.keys() >= {0, 1}
    later = make_plan(tmp_path / "s", deadline=clock.now + 600)
    assert outline(run(later)) == expected


def test_a_trial_is_resumed_after_ctrl_c(tmp_path, log, trainer, undisturbed):
    expected = undisturbed()
    trainer.before_epoch = raising(KeyboardInterrupt("saved"), 1, 2)
    with pytest.raises(KeyboardInterrupt, match="saved"):
        run(make_plan(tmp_path / "s", deadline=float("inf")))
    assert outline(run(make_plan(tmp_path / "s"))) == expected


# Tests with a storage that is unavailable.


def test_short_storage_failures_change_no_result(tmp_path, log, trainer, undisturbed):
    """If half of the storage calls fail during the trials, the result of a study is unchanged."""
    expected = undisturbed(trials=12)
    rng, failures = random.Random(0), []

    def be_away(*entries):
        if rng.random() < 0.5:
            failures.append(entries)
            raise OSError("away")

    def begin(number, epoch):
        log.before = be_away

    trainer.before_epoch = begin
    study = run(make_plan(tmp_path / "s", trials=12, storage_timeout=1e9))
    log.before = lambda *entries: None
    assert outline(study) == expected
    assert sum(map(bool, failures)) > 100  # Many of the failed calls are writes.


def test_lost_answers_change_no_result(tmp_path, log, trainer, undisturbed):
    """A call may fail after its entry was written, so the worker may write the entry twice."""
    expected = undisturbed(trials=6)
    answers, claims = itertools.count(), set()

    def lose(entry):
        # Only an entry that adds a trial has the attribute "claim", a unique ID.
        claim = entry.get("user_attrs", {}).get("claim")
        is_lost = claim not in claims if claim else next(answers) % 2 == 0
        claims.add(claim)
        if is_lost:
            raise OSError("the connection was lost")

    log.after = lose
    assert outline(run(make_plan(tmp_path / "s", trials=6))) == expected
    assert len(claims) == 7


def test_a_storage_timeout_loses_no_trial(tmp_path, log, trainer, undisturbed):
    """No trial is lost if all storage calls after a certain call fail (call 60, 70, 80, ...)."""
    expected = undisturbed()
    for last in itertools.count(60, step=10):
        folder, calls = tmp_path / str(last), itertools.count()
        log.lines.clear()

        def be_gone(*entries, calls=calls, last=last):
            if next(calls) > last:
                raise OSError("gone")

        log.before = be_gone
        try:
            run(make_plan(folder))
            break
        except StorageError as error:
            message = str(error)
        finally:
            log.before = lambda *entries: None
        assert re.fullmatch(
            r"the study's storage has not answered for 0 s \(gone\)\. No finished trial is lost, "
            rf"and the current one is saved in {folder}; start the same command again .*",
            message,
        )
        assert outline(run(make_plan(folder))) == expected
    assert last > 200


# Tests of race conditions between several workers.


def test_a_locked_trial_is_not_taken(tmp_path, log, trainer):
    """While a worker trains a trial, no other worker takes it, in the same or another folder."""
    rivals = []

    def be_joined(number, epoch):
        if not rivals:
            rivals.append(number)
            assert states(run(make_plan(tmp_path / "s", trials=3)))[0] == "running"
            assert states(run(make_plan(tmp_path / "other", trials=4)))[0] == "running"

    trainer.before_epoch = be_joined
    study = run(make_plan(tmp_path / "s", trials=6))
    assert len(study.trials) == 6
    assert all(trial.state.is_finished() for trial in study.trials)
    assert [path.name for path in (tmp_path / "other/trials").iterdir()] == ["0003"]


def test_a_surplus_last_trial_is_void(tmp_path, log, trainer):
    rival = make_plan(tmp_path / "other", trials=1)
    log.before = once(JournalOperation.CREATE_TRIAL, lambda: run(rival))
    study = run(make_plan(tmp_path / "s", trials=1))
    assert states(study) == ["complete", "fail"]
    assert study.trials[1].user_attrs["void"] == "surplus"
    assert len(counted(study)) == 1
    assert trainer.configs.keys() == {0}
    assert not (tmp_path / "s/trials").exists()


def test_a_void_trial_is_never_trained(tmp_path, log, trainer):
    rival = make_plan(tmp_path / "other", trials=1)

    def die():
        raise Killed

    def be_late_and_die():
        run(rival)
        log.before = once(JournalOperation.SET_TRIAL_STATE_VALUES, die)

    log.before = once(JournalOperation.CREATE_TRIAL, be_late_and_die)
    with pytest.raises(Killed):
        run(make_plan(tmp_path / "s", trials=1))
    study = run(make_plan(tmp_path / "s", trials=1))
    assert states(study) == ["complete", "fail"]
    assert trainer.configs.keys() == {0}


HOURS = 3600.0


def test_a_trial_of_another_folder_is_lost_after_hours(tmp_path, log, trainer, clock):
    trainer.before_epoch = raising(Killed, 1, 2)
    with pytest.raises(Killed):
        run(make_plan(tmp_path / "lost", trials=3))
    seen = clock.now
    clock.now = seen + 5.9 * HOURS
    study = run(make_plan(tmp_path / "s", trials=4))
    assert states(study)[1] == "running"
    assert len(study.trials) == 4
    clock.now = seen + 6.1 * HOURS
    study = run(make_plan(tmp_path / "s", trials=4))
    assert states(study)[1] == "fail"
    assert study.trials[1].user_attrs["void"] == "lost"
    assert study.trials[1].user_attrs["error"] == "its worker has not reported for 6 hours"
    assert len(counted(study)) == 4
    # A new trial replaced the lost trial, so a worker in the old folder has nothing to do.
    assert len(study.trials) == 5
    assert len(run(make_plan(tmp_path / "lost", trials=4)).trials) == 5


def test_a_trial_without_any_report_is_also_lost(tmp_path, log, trainer, clock):
    """A trial also fails if its worker's machine was lost right after the trial was created."""

    def die():
        raise Killed

    log.before = once(JournalOperation.SET_TRIAL_PARAM, die)
    with pytest.raises(Killed):
        run(make_plan(tmp_path / "lost", trials=1))
    clock.now += 6.1 * HOURS
    study = run(make_plan(tmp_path / "s", trials=1))
    assert states(study) == ["fail", "complete"]


def test_a_trial_of_this_folder_is_never_lost(tmp_path, log, trainer, clock, undisturbed):
    expected = undisturbed()
    trainer.before_epoch = raising(Killed, 1, 2)
    with pytest.raises(Killed):
        run(make_plan(tmp_path / "s"))
    clock.now += 1000 * HOURS
    assert outline(run(make_plan(tmp_path / "s"))) == expected


def test_a_worker_continues_after_losing_its_trial(tmp_path, log, trainer, clock):
    def sleep(number, epoch):
        if (number, epoch) == (1, 2) and len(trainer.configs) == 2:
            clock.now += 7 * HOURS
            run(make_plan(tmp_path / "other", trials=3))

    trainer.before_epoch = sleep
    study = run(make_plan(tmp_path / "s", trials=5))
    assert states(study)[1] == "fail"
    assert len(counted(study)) == 5
    assert all(trial.state.is_finished() for trial in study.trials)


def test_two_workers_can_fail_the_same_lost_trial(tmp_path, log, trainer, clock):
    trainer.before_epoch = raising(Killed, 0, 2)
    with pytest.raises(Killed):
        run(make_plan(tmp_path / "lost", trials=1))
    clock.now += 7 * HOURS
    rival = make_plan(tmp_path / "other", trials=1)
    # The other worker runs after this worker has counted the trials, and before this worker marks
    # the lost trial as "void".
    log.before = once(JournalOperation.SET_TRIAL_USER_ATTR, lambda: run(rival))
    study = run(make_plan(tmp_path / "s", trials=2))
    assert study.trials[0].state == TrialState.FAIL
    assert len(counted(study)) == 2
