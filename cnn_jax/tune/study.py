"""A study: a number of trials, each of which is a run that can be interrupted and resumed.

Any number of workers make the same call, one after the other or at the same time, on one
machine or on many machines. A worker locks the file of its trial in the study's folder. The
operating system releases the lock when the process ends, so another worker can continue the
trial of a killed worker, and two workers never run the same trial.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import gc
import json
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from cnn_jax.config import schema
from cnn_jax.config.resolve import resolve
from cnn_jax.config.schema import Config
from cnn_jax.data.findings import count
from cnn_jax.system import cli
from cnn_jax.system.atomic import write_text
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, DataError, TrainingError, printable
from cnn_jax.training.checkpoint import History
from cnn_jax.training.loop import open_dataset, train_and_evaluate
from cnn_jax.training.run_directory import INDIFFERENT_KEYS, check_apart
from cnn_jax.tune import search, storage
from cnn_jax.tune.space import Space, base_values, configured, describe, short

# A trial fails after this number of starts without a new checkpoint. Without this limit, a trial
# that needs more memory than the machine has would kill every worker.
_MAX_STARTS = 10
# The study ends if at least this number of trials has finished and all finished trials have failed.
_MAX_FAILURES = 10
# The operating system's messages about a disk that is full or not writable.
_DISK_MESSAGES = tuple(
    map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES))
)
# A trial on another machine counts as lost after this number of hours without a report.
_LOST_AFTER = 6.0

T = TypeVar("T")


class Pruned(Exception):  # noqa: N818  (a pruned trial is not an error)
    """The exception that ends a trial early, because other trials were better at the same epoch."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The definition of a study, and the limits of this worker.

    Attributes:
      name: The name of the study in its storage.
      config: The configuration that all trials share, not resolved.
      space: The distribution of each key that differs between trials.
      folder: The folder of the trials and results.
      storage: The URL of the storage, in one of the forms `storage.FORMS`; by default a
        SQLite file in the folder.
      config_file: The name of the configuration file, for the report.
      trials: The total number of completed, pruned and failed trials.
      pruner: The name of a pruner in `tune.PRUNERS`.
      storage_timeout: The time for which an unavailable storage is retried, in seconds.
      deadline: The value of `time.monotonic()` at which this worker ends; None for no deadline.
    """

    name: str
    config: Config
    space: Space
    folder: pathlib.Path
    storage: str = ""
    config_file: str = ""
    trials: int = 50
    pruner: str = "hyperband"
    storage_timeout: float = 60.0
    deadline: float | None = None

    @property
    def monitor(self) -> str:
        """The metric by which trials are compared, such as "validation_accuracy"."""
        return self.config.train.monitor

    @property
    def direction(self) -> StudyDirection:
        """Whether a smaller or a larger value of the monitored metric is better."""
        is_loss = self.monitor.endswith("loss")
        return StudyDirection.MINIMIZE if is_loss else StudyDirection.MAXIMIZE

    @property
    def brackets(self) -> int:
        """The number of brackets of the pruner; 0 without pruning."""
        counts = {"hyperband": search.num_brackets(self.config.train.epochs), "halving": 1}
        return counts.get(self.pruner, 0)

    def is_over(self) -> bool:
        """Returns whether the deadline of this worker has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline


def run_study(plan: Plan, console: Console | None = None) -> Study:
    """Runs trials of a study until the study has enough trials or the deadline has passed.

    Args:
      plan: The study; only the folder, deadline and timeout may differ between workers.
      console: The console that shows the progress; by default on stderr.

    Returns:
      The study in its storage; other workers may still add trials.

    Raises:
      ConfigError: A key is wrong, or the storage has a study of this name with another
        configuration, space or data.
      DataError: The data cannot be used.
      StorageError: The storage does not answer.
      TrainingError: The first trials have all failed.
      KeyboardInterrupt: Ctrl-C or SIGTERM was received; the current trial is saved.
    """
    console = console or Console()
    schema.validate(plan.config, jax.device_count())
    check_apart(plan.folder, plan.config.data.source)
    definition = _define(plan, console)  # If this call fails, no folder is created.
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if plan.folder.is_file() else error.strerror
        raise ConfigError(f"--workdir: cannot use {plan.folder}: {reason}") from error
    folder_id = _read_folder_id(plan)
    study = open_study(plan)
    worker = _Worker(plan, study, console, folder_id)
    worker.check_definition(definition)
    worker.check_folder()
    console.facts(_describe(plan))
    console.print()
    worker.work()
    return study


def _describe(plan: Plan) -> dict[str, str]:
    """Returns the description that is printed before the first trial of a study."""
    train = plan.config.train
    spaces = []
    for key, distribution in plan.space.items():
        description = describe(distribution)
        if "choices" in description:
            values = " ".join(map(str, description["choices"]))
        else:
            values = (
                f"{description['low']:g} to {description['high']:g}"
                + ", logarithmic" * description["log"]
            )
        spaces.append(f"{key:<{max(map(len, plan.space))}}  {values}")
    judged = [" ".join(map(str, search.rungs(train.epochs, n))) for n in range(plan.brackets)]
    pruning = f"{plan.pruner}, judged after epochs {'; or '.join(filter(None, judged))}"
    pruning += "; or never" * ("" in judged)
    return {
        "study": f"{plan.name}: {count(plan.trials, 'trial')} of at most "
        f"{count(train.epochs, 'epoch')}, best by {plan.monitor}",
        "data": f"{printable(plan.config.data.source)}; the test split is not used",
        "space": "\n".join(spaces),
        "pruning": pruning if any(judged) else "none",
        "results": str(plan.folder),
    }


def open_study(plan: Plan) -> Study:
    """Opens a study in its storage, and creates the study if it does not exist.

    Raises:
      ConfigError: The URL of the storage is wrong.
      StorageError: The storage cannot be opened.
    """
    # Optuna would warn of failures that `call_with_retries` handles.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    opened = storage.open_storage(
        plan.storage or storage.sqlite_url(plan.folder.resolve() / "study.db")
    )
    first = base_values(plan.config, plan.space)
    return storage.call_with_retries(
        lambda: optuna.create_study(
            storage=opened,
            study_name=plan.name,
            direction=plan.direction,
            sampler=search.SeededSampler(plan.space, plan.config.seed, first),
            pruner=search.SuccessiveHalving(plan.config.train.epochs, plan.brackets),
            load_if_exists=True,
        ),
        plan.storage_timeout,
        "No trial was started",
    )


def _define(plan: Plan, console: Console) -> dict[str, str]:
    """Returns a dictionary of all settings that affect the results of a study."""
    resolved = resolve(plan.config)
    dataset = open_dataset(resolved, console.track)
    keys = {
        f"config.{key}": json.dumps(value)
        for key, value in schema.flat(resolved).items()
        if key not in plan.space and key not in INDIFFERENT_KEYS
    }
    spaces = {f"space.{key}": distribution_to_json(space) for key, space in plan.space.items()}
    return {**keys, **spaces, "data": dataset.fingerprint, "pruner": plan.pruner}


def _read_folder_id(plan: Plan) -> str:
    """Returns the random id of the study's folder, and creates the id if the folder is new.

    Machines without a shared file system have different folders for the same study.

    Raises:
      ConfigError: The folder belongs to another study.
    """
    path = plan.folder / "place"
    if not path.exists():
        # Two machines may share the folder, so the name of the temporary file is unique.
        temporary = path.with_name(f".place.{uuid.uuid4().hex}")
        write_text(temporary, f"{uuid.uuid4().hex} {plan.name}\n")
        with contextlib.suppress(FileExistsError):  # Another worker may have created the file.
            os.link(temporary, path)
        temporary.unlink()
    folder_id, _, name = path.read_text(encoding="utf-8").strip().partition(" ")
    if name != plan.name:
        raise ConfigError(f"--workdir: {plan.folder} is the folder of the study {name}")
    return folder_id


def trial_folder(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Returns the folder of a trial in the folder of its study."""
    return folder / "trials" / f"{number:04d}"


def counts(trial: FrozenTrial) -> bool:
    """Returns whether a trial counts towards `Plan.trials`; a surplus or lost trial does not."""
    return "void" not in trial.user_attrs


class _TrialConsole(Console):
    """A console that shows the progress bar of a trial, but no other output of the run."""

    def write_line(self, line: str, style: str | None = None) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Worker:
    """A process that runs trials of a study.

    Attributes:
      plan: The definition of the study.
      study: The study in its storage.
      console: The console that shows the progress.
      folder_id: The id of the study's folder; see `_read_folder_id`.
    """

    plan: Plan
    study: Study
    console: Console
    folder_id: str

    def _retry(self, call: Callable[[], T]) -> T:
        return storage.call_with_retries(
            call,
            self.plan.storage_timeout,
            f"No finished trial is lost, and the current one is saved in {self.plan.folder}",
        )

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._retry(lambda: self.study.get_trials(deepcopy=False, states=states or None))

    def check_definition(self, definition: Mapping[str, str]) -> None:
        """Stores the definition of a new study, or checks an existing study against the definition.

        Raises:
          ConfigError: The definitions differ.
        """
        if "definition" not in self._retry(lambda: self.study.user_attrs):
            self._retry(lambda: self.study.set_user_attr("definition", dict(definition)))
        # Two workers may have written a definition at the same time. Each worker then reads the
        # definition that was written last.
        stored = self._retry(lambda: self.study.user_attrs)["definition"]
        # A key that did not exist when the study was created had its default value.
        defaults = {
            f"config.{key}": json.dumps(declared.default)
            for key, declared in schema.keys(self.plan.config.model.name).items()
            if f"space.{key}" not in stored and f"config.{key}" in definition
        }
        stored = defaults | stored
        differences = [
            f"{key}: {stored.get(key, 'absent')} -> {definition.get(key, 'absent')}"
            for key in sorted(stored.keys() | definition.keys())
            if stored.get(key) != definition.get(key)
        ]
        if differences:
            raise ConfigError(
                f"--study: {self.plan.name} exists with another definition "
                f"({'; '.join(differences)}); choose another name"
            )

    def check_folder(self) -> None:
        """Raises ConfigError if the folder has a trial that the storage does not have."""
        # The folder is listed before the storage is read, because another worker may add a trial
        # in between.
        names = [path.name for path in (self.plan.folder / "trials").glob("*")]
        own = {t.number for t in self._trials() if t.user_attrs.get("place") == self.folder_id}
        if unknown := sorted({int(name) for name in names if name.isdecimal()} - own):
            folder = trial_folder(self.plan.folder, unknown[0])
            raise ConfigError(
                f"--workdir: {folder} is a trial that the study in its storage does not have; use "
                "another folder, or the storage of that study"
            )

    def work(self) -> None:
        """Runs trials until the study has enough trials or the deadline has passed."""
        while not self.plan.is_over():
            self._check_failures()
            with contextlib.ExitStack() as held:
                number = self._claim(held)
                if number is None:
                    return
                try:
                    self._run(number)
                except UpdateFinishedTrialError:
                    # This machine was asleep for hours, so another worker ended the trial as lost.
                    self._say(number, "another worker has marked it as lost")
            with cli.blocked_interrupts():  # JAX's callbacks would suppress a KeyboardInterrupt.
                # The next trial compiles new programs, so the memory of the old programs is freed.
                jax.clear_caches()
                gc.collect()

    def _check_failures(self) -> None:
        """Raises TrainingError if all finished trials, at least `_MAX_FAILURES`, have failed."""
        trials = [trial for trial in self._trials() if counts(trial) and trial.state.is_finished()]
        failed = [trial for trial in trials if trial.state == TrialState.FAIL]
        if len(failed) == len(trials) >= _MAX_FAILURES:
            raise TrainingError(
                f"the first {len(failed)} trials have all failed; the error of the last one: "
                f"{failed[-1].user_attrs.get('error', '')}"
            )

    def _claim(self, held: contextlib.ExitStack) -> int | None:
        """Locks an unfinished trial that has no worker, or else creates and locks a new trial.

        Args:
          held: The stack that holds the lock until the stack is closed.

        Returns:
          The number of the trial; None if there are enough trials.
        """
        self._fail_lost_trials()
        while True:
            for trial in self._trials(TrialState.RUNNING):
                if trial.user_attrs.get("place") == self.folder_id and self._take(
                    trial.number, held
                ):
                    if counts(self._trials()[trial.number]):
                        return trial.number
                    # A worker created this surplus trial, and was killed before it ended the trial.
                    self._end(self._open(trial.number), TrialState.FAIL)
            if sum(map(counts, self._trials())) >= self.plan.trials:
                return None
            number = self._new_trial()
            # Another worker may find the new trial and lock the trial first.
            if not self._take(number, held):
                continue
            if sum(map(counts, self._trials()[:number])) < self.plan.trials:
                return number
            # Several workers created the last trial at the same time, so this trial is surplus.
            self._end(self._open(number), TrialState.FAIL, void="surplus")

    def _take(self, number: int, held: contextlib.ExitStack) -> bool:
        """Tries to lock an unfinished trial, and returns whether this worker has locked it."""
        lock = self.plan.folder / "locks" / f"{number:04d}"
        is_held = held.enter_context(_locked(lock))
        # Another worker may have finished the trial after the list of trials was read.
        return is_held and self._trials()[number].state == TrialState.RUNNING

    def _new_trial(self) -> int:
        """Adds a trial that belongs to this folder, and returns the number of the trial."""
        claim = uuid.uuid4().hex
        attributes = {
            **{"place": self.folder_id, "claim": claim, "host": socket.gethostname()},
            "seen": time.time(),
        }
        new = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes)

        def numbers() -> list[int]:
            trials = self.study.get_trials(deepcopy=False)
            return [t.number for t in trials if t.user_attrs.get("claim") == claim]

        def add() -> int:
            # An earlier attempt may have added the trial before the connection failed.
            if not numbers():
                self.study.add_trial(new)
            return numbers()[0]

        return self._retry(add)

    def _fail_lost_trials(self) -> None:
        """Marks trials on other machines as failed if they have not reported for several hours."""
        for trial in self._trials(TrialState.RUNNING):
            seen = trial.user_attrs.get("seen")
            if trial.user_attrs.get("place") == self.folder_id or seen is None:
                continue
            if time.time() - seen > 3600 * _LOST_AFTER:
                error = f"its worker has not reported for {_LOST_AFTER:g} hours"
                self._end(self._open(trial.number), TrialState.FAIL, void="lost", error=error)

    def _open(self, number: int) -> Trial:
        """Returns the Optuna `Trial` with the given number; a `Trial` can report values."""
        trial_id = self._trials()[number]._trial_id  # Optuna has no public attribute for the id.
        return self._retry(lambda: Trial(self.study, trial_id))

    def _run(self, number: int) -> None:
        """Starts or resumes the training of a trial, and stores its result.

        Raises:
          KeyboardInterrupt: Ctrl-C or SIGTERM was received; the trial is saved.
        """
        trial = self._open(number)
        params = {
            key: self._retry(functools.partial(_suggest, trial, key, distribution))
            for key, distribution in self.plan.space.items()
        }
        reported = set(self._trials()[number].intermediate_values)
        # The pruner judges the last reported epoch again, because the worker may have been killed
        # before the pruner's decision.
        judged = reported - {max(reported, default=0)}
        saved = _saved_step(trial_folder(self.plan.folder, number))
        starts = [*trial.user_attrs.get("starts", []), saved]
        self._say(
            number,
            *(f"{key}={short(value)}" for key, value in params.items()),
            f"(continues after epoch {len(reported)})" * bool(reported),
        )
        if starts.count(saved) > _MAX_STARTS:
            error = f"its process was killed {_MAX_STARTS} times after the saved step {saved:,}"
            self._end(trial, TrialState.FAIL, error=error)
            return
        self._note(trial, starts=starts, seen=time.time())
        try:
            train_and_evaluate(
                self._trial_config(params),
                trial_folder(self.plan.folder, number),
                _TrialConsole(),
                on_epoch=lambda history: self._report(trial, history, reported, judged),
                deadline=self.plan.deadline,
            )
        except Pruned:
            self._end(trial, TrialState.PRUNED)
        except (TrainingError, ConfigError) as error:
            if _is_disk_error(error):
                self._note(trial, starts=starts[:-1])
                raise  # All other trials would fail because of the disk too.
            self._end(trial, TrialState.FAIL, error=printable(str(error)))
        except (DataError, OSError):
            self._note(trial, starts=starts[:-1])
            raise
        except KeyboardInterrupt:
            # An interrupted start does not count as a failed start.
            self._note(trial, starts=starts[:-1])
            if not self.plan.is_over():
                raise
            self._say(
                number, "the time is over; the trial is saved, and the next start continues it"
            )
        else:
            self._end(trial, TrialState.COMPLETE)

    def _trial_config(self, params: Mapping[str, Any]) -> Config:
        """Returns the configuration of a trial; only the validation split is evaluated."""
        return configured(
            self.plan.config,
            {
                **params,
                "report.detail": "none",
                "report.splits": ("validation",),
                "report.reference": False,
            },
        )

    def _report(self, trial: Trial, history: History, reported: set[int], judged: set[int]) -> None:
        """Reports new epochs of a trial to the study.

        Args:
          trial: The trial.
          history: The records of all epochs of the trial.
          reported: The epochs whose values the study has; the function adds the new epochs.
          judged: The epochs after which the trial was allowed to continue; the function adds
            the new epochs. No epoch is judged twice, because other trials may have become
            better in the meantime.

        Raises:
          Pruned: The trial must end.
        """
        for record in history:
            epoch = record["epoch"]
            if epoch in judged:
                continue
            if epoch not in reported:
                self._retry(functools.partial(trial.report, record[self.plan.monitor], epoch))
                reported.add(epoch)
            judged.add(epoch)
            seconds = sum(done["seconds"] for done in history[:epoch])
            self._note(trial, seconds=seconds, seen=time.time())
            if self._retry(trial.should_prune):
                raise Pruned

    def _note(self, trial: Trial, **attributes: Any) -> None:
        for key, value in attributes.items():
            self._retry(functools.partial(trial.set_user_attr, key, value))

    def _end(self, trial: Trial, state: TrialState, **attributes: Any) -> None:
        """Stores the final state of a trial, and prints a line about the trial.

        If another worker has stored a final state, that state is kept.
        """
        curve = self._trials()[trial.number].intermediate_values
        best = search.best_value(curve, self.plan.direction)
        value = best if state == TrialState.COMPLETE else None
        with contextlib.suppress(UpdateFinishedTrialError):
            self._note(trial, **attributes)
            self._retry(lambda: self.study.tell(trial.number, value, state, skip_if_finished=True))
        how = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(state, "failed")
        self._say(
            trial.number,
            "" if best is None else f"{best:.4f}",
            f"{how} after {count(len(curve), 'epoch')}",
            attributes.get("error", ""),
        )

    def _say(self, number: int, *parts: str) -> None:
        self.console.print(f"{f'trial {number}':<12}{'  '.join(filter(None, parts))}")


def _saved_step(folder: pathlib.Path) -> int:
    """Returns the step of the latest checkpoint of a trial, or 0 if there is no checkpoint."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _suggest(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    """Returns the trial's value of a key; draws the value if the trial does not have it yet."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(
            key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
        )
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(
        key, distribution.low, distribution.high, step=distribution.step, log=distribution.log
    )


def _is_disk_error(error: BaseException | None) -> bool:
    """Returns whether a run failed because a disk is full or not writable."""
    while error is not None:
        # TensorStore does not raise OSError, but the message of its error contains the message of
        # the operating system.
        if isinstance(error, OSError) or any(words in str(error) for words in _DISK_MESSAGES):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Locks a file inside the context, and yields whether the lock was acquired.

    The operating system releases the lock when the process ends for any reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
