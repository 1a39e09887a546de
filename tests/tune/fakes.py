"""Fakes for studies without training: a trainer that writes metrics, and a storage in memory."""

import fcntl
import json
import math
import os
import time
import types
import uuid

from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend

from cnn_jax.system import cli
from cnn_jax.system.console import Console
from cnn_jax.system.errors import Interrupted
from cnn_jax.tune import study as studies
from cnn_jax.tune.study import Plan
from configs import default

SPACE = {
    "model.dropout": FloatDistribution(0.0, 0.6),
    "optimizer.learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "train.batch_size": CategoricalDistribution([8, 16, 24]),
}
# The fake trainer reports this duration of an epoch, in seconds.
SECONDS = 2.0


class Killed(BaseException):
    """An exception that simulates SIGKILL in a process."""


def make_plan(folder, **changes):
    """Returns the plan of a study of a few short trials; `config` changes configuration keys."""
    config = default.get_config()
    config.train.epochs = 3
    with config.ignore_type():
        for key, value in changes.pop("config", {}).items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
    options = {"name": "fake", "space": SPACE, "trials": 5, "storage_timeout": 0.2, **changes}
    return Plan(config=config, folder=folder, **options)


def value_of(config, epoch):
    """Returns a fake validation accuracy, which is best at learning rate 3e-3 and dropout 0."""
    off = math.log10(config.optimizer.learning_rate / 3e-3)
    end = 0.95 - 0.15 * off**2 - 0.2 * config.model.dropout**2 - config.train.batch_size / 500
    return end - 0.3 * math.exp(-0.7 * epoch)


class Trainer:
    """A fake `train_and_evaluate` that resumes after the last epoch recorded in the run's folder.

    It is an error to train a trial twice at the same time, or to train an epoch twice.

    Attributes:
      before_epoch: A function that is called with a trial's number and the epoch that begins.
      pause: Seconds that an epoch takes.
      configs: The configuration of each trial, by its number.
    """

    def __init__(self, pause=0.0):
        self.before_epoch = lambda number, epoch: None
        self.pause = pause
        self.configs = {}

    def __call__(self, config, workdir, console=None, *, on_epoch, deadline=None):
        number = int(workdir.name)
        self.configs[number] = config
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "busy").open("a") as busy:
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
            history = [json.loads(path.read_text()) for path in sorted(workdir.glob("epoch-*"))]
            on_epoch(history)
            for epoch in range(len(history) + 1, config.train.epochs + 1):
                self.before_epoch(number, epoch)
                time.sleep(self.pause)
                accuracy = value_of(config, epoch)
                record = {"epoch": epoch, "seconds": SECONDS, "validation_accuracy": accuracy}
                history.append(record | {"validation_loss": 1 - accuracy})
                _write_once(workdir / f"epoch-{epoch:04d}", json.dumps(history[-1]))
                (workdir / "checkpoints" / str(10 * epoch)).mkdir(parents=True)
                if deadline is not None and studies.time.monotonic() >= deadline:
                    raise Interrupted("saved")
                on_epoch(history)
        return {}


def raising(error, number, epoch, times=1):
    """Returns a `Trainer.before_epoch` that raises an error in its first `times` calls.

    Only calls for the given trial and epoch count.
    """
    left = [times]

    def before_epoch(*moment):
        if moment == (number, epoch) and left[0]:
            left[0] -= 1
            raise error

    return before_epoch


def _write_once(path, text):
    aside = path.with_name(uuid.uuid4().hex)
    aside.write_text(text)
    os.link(aside, path)
    aside.unlink()


def install(patch, pause=0.0, fingerprint="of the data"):
    """Replaces the training and the data with fakes; `patch` is a function like `setattr`."""
    trainer = Trainer(pause)
    dataset = types.SimpleNamespace(fingerprint=fingerprint)
    patch(studies, "train_and_evaluate", trainer)
    patch(studies, "open_dataset", lambda config, track: dataset)
    # The fake collects no garbage, because a collection in the test process takes longer than a
    # study.
    patch(studies, "gc", types.SimpleNamespace(collect=lambda: None))
    patch(studies.jax, "clear_caches", lambda: None)
    return trainer


class Log(BaseJournalBackend):
    """A journal storage in memory whose calls may fail.

    Attributes:
      lines: The written entries, as JSON.
      before: A function that is called before each read, and with the entries before each write.
      after: A function that is called with the entries after each write.
    """

    def __init__(self, lines=()):
        self.lines = list(lines)
        self.before = lambda *entries: None
        self.after = lambda *entries: None

    def read_logs(self, log_number_from):
        self.before()
        return map(json.loads, self.lines[log_number_from:])

    def append_logs(self, logs):
        self.before(*logs)
        self.lines.extend(map(json.dumps, logs))
        self.after(*logs)

    def open(self, url=""):
        """Opens the storage as a new process does."""
        return JournalStorage(self)


def run(plan):
    return studies.run_study(plan, Console(is_silent=True))


def work(plan, pause, at_once, output):
    """Runs a study as a worker process, and writes stderr to the file `output`."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    install(setattr, pause)
    at_once.wait()
    cli.run(lambda arguments: run(plan))


def outline(study):
    """Returns the part of a study that must be equal with and without interruptions."""
    return [
        (t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs.get("error"))
        for t in study.trials
    ]


def states(study):
    return [trial.state.name.lower() for trial in study.trials]


def counted(study):
    return list(filter(studies.counts, study.trials))
