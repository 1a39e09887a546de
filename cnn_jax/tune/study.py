"""A study: trials until there are enough, each a run that goes on wherever it was cut off.

Any number of workers, one after the other or side by side, on one machine or many, make the
same call. A trial belongs to who holds its file in the study's folder, which the system gives
up with the process; so nobody's death leaves one behind, and no two ever run the same one.
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

# Starts of a trial, without a step saved in between, after which nothing is hoped of it: as
# one that takes more memory than there is would end its worker for ever.
_MOST_STARTS = 10
# Trials that fail one after the other, from the first on, before the study is given up.
_MOST_FAILURES = 10
# How the system says that a disk takes nothing more.
_OF_THE_DISK = tuple(
    map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES))
)
# Hours after which a trial in a folder that this worker does not see counts as lost.
_LOST_AFTER = 6.0

T = TypeVar("T")


class Pruned(Exception):  # noqa: N818  (it is no error)
    """A trial is given up for what others have reached by this epoch."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study is.

    Attributes:
      name: Of the study, in its storage.
      config: What all trials have in common, as a file under `configs/` gives it.
      space: What differs.
      folder: Where trials and results are.
      storage: A URL of `storage.FORMS`; by default a file in the folder.
      config_file: Where `config` is from; to be shown.
      trials: How many, finished, pruned and failed together.
      pruner: One of `tune.PRUNERS`.
      storage_timeout: Seconds for which a storage that is away is tried again.
      deadline: When to end, in seconds of `time.monotonic`; None: with the last trial.
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
        return self.config.train.monitor

    @property
    def direction(self) -> StudyDirection:
        is_loss = self.monitor.endswith("loss")
        return StudyDirection.MINIMIZE if is_loss else StudyDirection.MAXIMIZE

    @property
    def brackets(self) -> int:
        counts = {"hyperband": search.num_brackets(self.config.train.epochs), "halving": 1}
        return counts.get(self.pruner, 0)

    def is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline


def run_study(plan: Plan, console: Console | None = None) -> Study:
    """Works at a study until it has its trials, or time is up.

    Args:
      plan: The same for every worker, but for its folder, deadline and timeout.
      console: Where to show progress.

    Returns:
      The study as Optuna has it, to which others may still be adding.

    Raises:
      ConfigError: A key is wrong, or there is a study of this name with another
        configuration, space or data.
      DataError: The data cannot be used.
      StorageError: The storage does not answer.
      TrainingError: The first trials have all failed.
      KeyboardInterrupt: After Ctrl-C or SIGTERM; the trial under way is saved.
    """
    console = console or Console()
    schema.validate(plan.config, jax.device_count())
    check_apart(plan.folder, plan.config.data.source)
    definition = _define(plan, console)  # Before the folder is made, which it may prevent.
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if plan.folder.is_file() else error.strerror
        raise ConfigError(f"--workdir: cannot use {plan.folder}: {reason}") from error
    place = _place(plan)
    study = open_study(plan)
    worker = _Worker(plan, study, console, place)
    worker.agree_on(definition)
    worker.check_folder()
    console.facts(_describe(plan))
    console.print()
    worker.work()
    return study


def _describe(plan: Plan) -> dict[str, str]:
    """What will happen, in words."""
    train = plan.config.train
    spaces = []
    for key, distribution in plan.space.items():
        of_key = describe(distribution)
        if "choices" in of_key:
            values = " ".join(map(str, of_key["choices"]))
        else:
            values = f"{of_key['low']:g} to {of_key['high']:g}" + ", logarithmic" * of_key["log"]
        spaces.append(f"{key:<{max(map(len, plan.space))}}  {values}")
    judged = [" ".join(map(str, search.rungs(train.epochs, n))) for n in range(plan.brackets)]
    pruning = f"{plan.pruner}, judged after epochs {'; or '.join(filter(None, judged))}"
    pruning += "; or never" * ("" in judged)
    return {
        "study": f"{plan.name}: {count(plan.trials, 'trial')} of at most "
        f"{count(train.epochs, 'epoch')}, best by {plan.monitor}",
        "data": f"{printable(plan.config.data.source)}; the test split is not looked at",
        "space": "\n".join(spaces),
        "pruning": pruning if any(judged) else "none",
        "results": str(plan.folder),
    }


def open_study(plan: Plan) -> Study:
    """The study in its storage, made if it is not there.

    Raises:
      ConfigError: The storage's URL is wrong.
      StorageError: It cannot be opened.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # It warns of what is tried again here.
    opened = storage.open_storage(
        plan.storage or storage.in_file(plan.folder.resolve() / "study.db")
    )
    first = base_values(plan.config, plan.space)
    return storage.patiently(
        lambda: optuna.create_study(
            storage=opened,
            study_name=plan.name,
            direction=plan.direction,
            sampler=search.SeededSampler(plan.space, plan.config.seed, first),
            pruner=search.SuccessiveHalving(plan.config.train.epochs, plan.brackets),
            load_if_exists=True,
        ),
        plan.storage_timeout,
        "Nothing was begun",
    )


def _define(plan: Plan, console: Console) -> dict[str, str]:
    """All that the figures of a study depend on, every key flat, as text."""
    resolved = resolve(plan.config)
    dataset = open_dataset(resolved, console.track)
    keys = {
        f"config.{key}": json.dumps(value)
        for key, value in schema.leaves(resolved)
        if key not in plan.space and key not in INDIFFERENT_KEYS
    }
    spaces = {f"space.{key}": distribution_to_json(space) for key, space in plan.space.items()}
    return {**keys, **spaces, "data": dataset.fingerprint, "pruner": plan.pruner}


def _place(plan: Plan) -> str:
    """What tells this folder from the same study's on a machine that does not share it.

    Raises:
      ConfigError: The folder is another study's.
    """
    path = plan.folder / "place"
    if not path.exists():
        aside = path.with_name(f".place.{uuid.uuid4().hex}")  # Two machines may share it.
        write_text(aside, f"{uuid.uuid4().hex} {plan.name}\n")
        with contextlib.suppress(FileExistsError):  # Another worker was first.
            os.link(aside, path)
        aside.unlink()
    place, _, name = path.read_text(encoding="utf-8").strip().partition(" ")
    if name != plan.name:
        raise ConfigError(f"--workdir: {plan.folder} is the folder of the study {name}")
    return place


def trial_folder(folder: pathlib.Path, number: int) -> pathlib.Path:
    return folder / "trials" / f"{number:04d}"


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those that were asked for, and not surplus or lost."""
    return "void" not in trial.user_attrs


class _TrialConsole(Console):
    """The bar of a trial's run, without the lines, of which the study has its own."""

    def write_line(self, line: str, style: str | None = None) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One process that works at a study.

    Attributes:
      plan: The study.
      study: The same, in its storage.
      console: Where to show progress.
      place: Of the study's folder.
    """

    plan: Plan
    study: Study
    console: Console
    place: str

    def _patiently(self, call: Callable[[], T]) -> T:
        return storage.patiently(
            call,
            self.plan.storage_timeout,
            f"No finished trial is lost, and the one under way is saved in {self.plan.folder}",
        )

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._patiently(lambda: self.study.get_trials(deepcopy=False, states=states or None))

    def agree_on(self, definition: Mapping[str, str]) -> None:
        """Notes what the study is, or compares.

        Raises:
          ConfigError: It is another.
        """
        if "definition" not in self._patiently(lambda: self.study.user_attrs):
            self._patiently(lambda: self.study.set_user_attr("definition", dict(definition)))
        # Read in any case: of two workers that begin at once, one was the last to write.
        present = self._patiently(lambda: self.study.user_attrs)["definition"]
        differences = [
            f"{key}: {present.get(key, 'absent')} -> {definition.get(key, 'absent')}"
            for key in sorted(present.keys() | definition.keys())
            if present.get(key) != definition.get(key)
        ]
        if differences:
            raise ConfigError(
                f"--study: {self.plan.name} was begun otherwise ({'; '.join(differences)}); give "
                "this one another name"
            )

    def check_folder(self) -> None:
        """Raises ConfigError if the folder has trials that this study knows nothing of."""
        # In this order: another worker may be adding one.
        names = [path.name for path in (self.plan.folder / "trials").glob("*")]
        own = {t.number for t in self._trials() if t.user_attrs.get("place") == self.place}
        if strange := sorted({int(name) for name in names if name.isdecimal()} - own):
            folder = trial_folder(self.plan.folder, strange[0])
            raise ConfigError(
                f"--workdir: {folder} is a trial that the study in its storage does not have; use "
                "another folder, or the storage of that study"
            )

    def work(self) -> None:
        """Runs trials until there are enough, or time is up."""
        while not self.plan.is_over():
            self._check_failures()
            with contextlib.ExitStack() as held:
                number = self._claim(held)
                if number is None:
                    return
                try:
                    self._run(number)
                except UpdateFinishedTrialError:
                    # Nothing was heard of it for hours, as of a machine that slept.
                    self._say(number, "another worker has given it up")
            with cli.blocked_interrupts():  # Which JAX's own callbacks would swallow.
                # Programs of a trial are of no use to the next one.
                jax.clear_caches()
                gc.collect()

    def _check_failures(self) -> None:
        """Raises TrainingError if all that there has been, and that not once, has failed."""
        trials = [trial for trial in self._trials() if counts(trial) and trial.state.is_finished()]
        failed = [trial for trial in trials if trial.state == TrialState.FAIL]
        if len(failed) == len(trials) >= _MOST_FAILURES:
            raise TrainingError(
                f"the first {len(failed)} trials have all failed, the last one so: "
                f"{failed[-1].user_attrs.get('error', '')}"
            )

    def _claim(self, held: contextlib.ExitStack) -> int | None:
        """A trial that is this worker's alone until `held` is closed; None if there are enough.

        One that was left behind comes before a new one.
        """
        self._give_up_what_is_lost()
        while True:
            for trial in self._trials(TrialState.RUNNING):
                if trial.user_attrs.get("place") == self.place and self._take(trial.number, held):
                    if counts(self._trials()[trial.number]):
                        return trial.number
                    # Whoever had made it for nothing was gone before it was ended.
                    self._end(self._open(trial.number), TrialState.FAIL)
            if sum(map(counts, self._trials())) >= self.plan.trials:
                return None
            number = self._new_trial()
            # Another worker may take it for one that was left behind, and be first.
            if not self._take(number, held):
                continue
            if sum(map(counts, self._trials()[:number])) < self.plan.trials:
                return number
            # Two workers have made the last one.
            self._end(self._open(number), TrialState.FAIL, void="surplus")

    def _take(self, number: int, held: contextlib.ExitStack) -> bool:
        """Whether this worker holds an unfinished trial, as none can while another does."""
        lock = self.plan.folder / "locks" / f"{number:04d}"
        is_held = held.enter_context(_locked(lock))
        # Its holder may have finished it after the list was made.
        return is_held and self._trials()[number].state == TrialState.RUNNING

    def _new_trial(self) -> int:
        """Adds a trial that belongs to this place from the first moment; its number."""
        claim = uuid.uuid4().hex
        attributes = {
            **{"place": self.place, "claim": claim, "host": socket.gethostname()},
            "seen": time.time(),
        }
        new = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attributes)

        def numbers() -> list[int]:
            trials = self.study.get_trials(deepcopy=False)
            return [t.number for t in trials if t.user_attrs.get("claim") == claim]

        def add() -> int:
            if not numbers():  # It may be there, and only the answer have been lost.
                self.study.add_trial(new)
            return numbers()[0]

        return self._patiently(add)

    def _give_up_what_is_lost(self) -> None:
        """Fails trials of other places of which nothing has been heard for long."""
        for trial in self._trials(TrialState.RUNNING):
            seen = trial.user_attrs.get("seen")
            if trial.user_attrs.get("place") == self.place or seen is None:
                continue
            if time.time() - seen > 3600 * _LOST_AFTER:
                error = f"nothing was heard of it for {_LOST_AFTER:g} hours"
                self._end(self._open(trial.number), TrialState.FAIL, void="lost", error=error)

    def _open(self, number: int) -> Trial:
        """A trial of the study, to be told of."""
        trial_id = self._trials()[number]._trial_id  # There is no public name for it.
        return self._patiently(lambda: Trial(self.study, trial_id))

    def _run(self, number: int) -> None:
        """Trains a trial to its end, from wherever it is, and tells how it went.

        Raises:
          KeyboardInterrupt: After Ctrl-C or SIGTERM; the trial is saved.
        """
        trial = self._open(number)
        params = {
            key: self._patiently(functools.partial(_suggest, trial, key, distribution))
            for key, distribution in self.plan.space.items()
        }
        told = set(self._trials()[number].intermediate_values)
        # The last one may have been told without having been judged.
        judged = told - {max(told, default=0)}
        saved = _saved_step(trial_folder(self.plan.folder, number))
        starts = [*trial.user_attrs.get("starts", []), saved]
        self._say(
            number,
            *(f"{key}={short(value)}" for key, value in params.items()),
            f"(goes on after epoch {len(told)})" * bool(told),
        )
        if starts.count(saved) > _MOST_STARTS:
            error = f"its process ended {_MOST_STARTS} times after step {saved:,}, the last saved"
            self._end(trial, TrialState.FAIL, error=error)
            return
        self._note(trial, starts=starts, seen=time.time())
        try:
            train_and_evaluate(
                self._configured(params),
                trial_folder(self.plan.folder, number),
                _TrialConsole(),
                on_epoch=lambda history: self._report(trial, history, told, judged),
                deadline=self.plan.deadline,
            )
        except Pruned:
            self._end(trial, TrialState.PRUNED)
        except (TrainingError, ConfigError) as error:
            if _is_of_the_disk(error):
                self._note(trial, starts=starts[:-1])
                raise  # It would be the same with all others.
            self._end(trial, TrialState.FAIL, error=printable(str(error)))
        except (DataError, OSError):
            self._note(trial, starts=starts[:-1])
            raise
        except KeyboardInterrupt:
            self._note(trial, starts=starts[:-1])  # This end is not the trial's fault.
            if not self.plan.is_over():
                raise
            self._say(number, "time is up; it is saved, and goes on at the next start")
        else:
            self._end(trial, TrialState.COMPLETE)

    def _configured(self, params: Mapping[str, Any]) -> Config:
        """A trial's configuration: an ordinary run's, which leaves the test split alone."""
        return configured(
            self.plan.config, {**params, "report.detail": "none", "report.splits": ("validation",)}
        )

    def _report(self, trial: Trial, history: History, told: set[int], judged: set[int]) -> None:
        """Tells the study what epochs have come to that it does not know of.

        Args:
          trial: Whose they are.
          history: All of them.
          told: The epochs that the study knows of; those that are told now are added.
          judged: The epochs after which it was decided to go on; likewise. None is judged
            twice: others may have become better in the meantime.

        Raises:
          Pruned: They are not worth going on.
        """
        for record in history:
            epoch = record["epoch"]
            if epoch in judged:
                continue
            if epoch not in told:
                self._patiently(functools.partial(trial.report, record[self.plan.monitor], epoch))
                told.add(epoch)
            judged.add(epoch)
            seconds = sum(done["seconds"] for done in history[:epoch])
            self._note(trial, seconds=seconds, seen=time.time())
            if self._patiently(trial.should_prune):
                raise Pruned

    def _note(self, trial: Trial, **attributes: Any) -> None:
        for key, value in attributes.items():
            self._patiently(functools.partial(trial.set_user_attr, key, value))

    def _end(self, trial: Trial, state: TrialState, **attributes: Any) -> None:
        """Finishes a trial, unless another worker has, and says so."""
        curve = self._trials()[trial.number].intermediate_values
        best = search.best_value(curve, self.plan.direction)
        value = best if state == TrialState.COMPLETE else None
        with contextlib.suppress(UpdateFinishedTrialError):
            self._note(trial, **attributes)
            self._patiently(
                lambda: self.study.tell(trial.number, value, state, skip_if_finished=True)
            )
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
    """The step of a trial's latest checkpoint; 0 if there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _suggest(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    """The trial's value for a key, drawn if it is not there."""
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


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Whether a run has failed for what it cannot write, and not for its configuration."""
    while error is not None:
        # TensorStore has errors of its own, with the system's words.
        if isinstance(error, OSError) or any(words in str(error) for words in _OF_THE_DISK):
            return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[bool]:
    """Whether this process has the file for itself within.

    The system gives it up with the process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
