"""Loads the versions of models from a bundle or a registry, and follows changes of the registry."""

import abc
import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import random
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cnn_jax.inference.bundle import Bundle, Ensemble, digest
from cnn_jax.inference.exported import OnnxPredictor, read_model
from cnn_jax.registry import ledger
from cnn_jax.registry.ledger import CHAMPION, RegistryError
from cnn_jax.registry.split import Experiment
from cnn_jax.serve.service import END, LOADING, Service
from cnn_jax.serve.versions import Version, make_version
from cnn_jax.system.errors import UserError

if TYPE_CHECKING:  # Importing obstore would delay the start of a server without a registry.
    from cnn_jax.registry.registry import Registry

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds until the first retry after a failed load, and the maximum number of seconds until a
# retry. Each failure doubles the time until the next retry.
_FIRST_RETRY, _MAX_RETRY = 5.0, 300.0
# While the registry does not answer, a warning is logged every _SLOW_SECONDS seconds. While the
# registry reports the same error, the error is logged every _REPEAT_SECONDS seconds.
_SLOW_SECONDS, _REPEAT_SECONDS = 30.0, 600.0
# The niceness (scheduling priority) of the thread that loads versions. The threads that answer
# requests have niceness 0.
_NICENESS = 10


@dataclasses.dataclass(frozen=True)
class DesiredState:
    """The versions of a model that should be loaded, and the model's aliases."""

    versions: Mapping[int, str]  # Bundle digests by version number.
    aliases: Mapping[str, int]  # Version numbers by alias. The first alias is the default one.
    experiment: Experiment | None = None  # Splits the requests of the first alias.


class Source(abc.ABC):
    """A source of model versions to serve. All methods may wait for a disk or a network."""

    def check(self) -> None:  # noqa: B027 (optional)
        """Raises UserError if the source cannot be served; called before the server starts."""

    @abc.abstractmethod
    def desired(self) -> dict[str, DesiredState]:
        """Returns, by model name, the versions and aliases that should be loaded.

        Raises:
          UserError: The source does not answer.
        """

    @abc.abstractmethod
    def open(self, model: str, number: int) -> Bundle | Ensemble | OnnxPredictor:
        """Reads and verifies the bundle, the ensemble or the ONNX export of a version.

        Raises:
          UserError: The bundle cannot be read or is damaged.
        """


class BundleSource(Source):
    """A source with one bundle from a folder; the bundle is served as version 1 of a model."""

    def __init__(self, path: pathlib.Path, model: str):
        """Reads the bundle from a folder.

        Args:
          path: The bundle's folder.
          model: The name of the model.

        Raises:
          BundleError: The folder has no bundle, or the bundle is damaged.
        """
        self._model = model
        self._bundle = read_model(path)
        self._digest = digest(path)

    def desired(self) -> dict[str, DesiredState]:
        return {self._model: DesiredState({1: self._digest}, {"default": 1})}

    def open(self, model: str, number: int) -> Bundle | Ensemble | OnnxPredictor:
        return self._bundle


class RegistrySource(Source):
    """The version with a given alias of each model of a registry, and extra versions."""

    def __init__(
        self,
        registry: "Registry",
        models: Sequence[str],
        alias: str,
        extra: Sequence[int | str],
    ):
        """Creates the source of model versions; does not read the registry yet.

        Args:
          registry: The registry.
          models: The names of the models to serve, if they have the alias. If empty, all models
            that have the alias are served.
          alias: The alias of the default version.
          extra: Numbers and aliases of additional versions to load. A model that lacks such a
            version or alias is served without it.
        """
        self._registry = registry
        self._models = tuple(models)
        self._alias = alias
        self._extra = tuple(extra)

    def check(self) -> None:
        self._registry.refresh()
        for name in self._models:
            if ledger.find(self._registry.models, name).alias_target(self._alias) is None:
                raise RegistryError(f"{name} has no alias {self._alias}; {self._advice(name)}")
        desired = self._desired()
        if not desired:
            raise RegistryError(
                f"{self._registry.url} has no model with an alias {self._alias}; "
                f"{self._advice('MODEL')}"
            )
        for version in self._extra:
            if not any(self._number(name, version) for name in desired):
                logger.warning("--versions: there is no version %s yet", version)

    def _advice(self, model: str) -> str:
        """Returns the end of an error message: the command that creates the alias."""
        alias = "" if self._alias == CHAMPION else f" --alias={self._alias}"
        return (
            f"to create it: cnn_jax registry promote {model} VERSION{alias} "
            f"--registry={self._registry.url}"
        )

    def desired(self) -> dict[str, DesiredState]:
        self._registry.refresh()
        return self._desired()

    def _desired(self) -> dict[str, DesiredState]:
        models = self._registry.models
        names = self._models or models
        return {
            name: self._desired_versions(name)
            for name in names
            if name in models and models[name].alias_target(self._alias)
        }

    def _number(self, name: str, version: int | str) -> int | None:
        """Returns the number of a version, given by number or alias; None if it does not exist."""
        model = self._registry.models[name]
        number = version if isinstance(version, int) else model.alias_target(version)
        return number if number in model.versions else None

    def _desired_versions(self, name: str) -> DesiredState:
        # The default version must come first, because the code below takes the default version from
        # `found[0]`.
        model = self._registry.models[name]
        experiment = model.running_experiment
        if experiment is not None and experiment.alias != self._alias:
            experiment = None
        challengers = [] if experiment is None else [experiment.challenger]
        found = [self._number(name, one) for one in (self._alias, *self._extra, *challengers)]
        numbers = dict.fromkeys(number for number in found if number is not None)
        aliases = {self._alias: found[0]}
        aliases |= {alias: model.alias_target(alias) for alias in model.aliases}
        return DesiredState(
            {number: model.versions[number].bundle.digest for number in numbers},
            {alias: number for alias, number in aliases.items() if number in numbers},
            experiment,
        )

    def open(self, model: str, number: int) -> Bundle | Ensemble | OnnxPredictor:
        version = self._registry.resolve(model, number)
        with tempfile.TemporaryDirectory(prefix="cnn_jax-") as folder:
            return read_model(self._registry.fetch(version, folder))


# A version to load: the model, the number of the version, and the digest of its bundle.
_Key = tuple[str, int, str]


@dataclasses.dataclass
class _Load:
    """A version that is being loaded."""

    task: "asyncio.Task[None]"  # Waits for the thread, which cannot be interrupted.
    start: float  # In seconds of `time.monotonic`.
    is_wanted: bool = True  # Whether the source still requests the version.
    is_late: bool = False  # Whether the load has exceeded the time limit.

    @property
    def delays_others(self) -> bool:
        """Returns whether other versions wait until this version is loaded."""
        is_slow = self.is_late or time.monotonic() - self.start > _SLOW_SECONDS
        return self.is_wanted and not is_slow


class Loader:
    """Keeps the loaded versions of a service in sync with the versions that a source requests.

    Attributes:
      problem: The error message of the last load that failed; "" if no load has failed.
      is_settled: Whether all versions that were desired first are loaded, or failed, or are slow.
    """

    def __init__(
        self,
        service: Service,
        source: Source,
        sizes: Sequence[int],
        poll: float = 2.0,
        load_timeout: float = 600.0,
    ):
        """Creates the loader, without loading any version.

        Args:
          service: The service whose versions are loaded and unloaded.
          source: The source of the versions.
          sizes: The batch sizes to compile.
          poll: Mean seconds between two reads of the source.
          load_timeout: Seconds after which the loading of a version counts as failed.
        """
        self._service = service
        self._source = source
        self._sizes = sizes
        self._poll = poll
        self._load_timeout = load_timeout
        self._loads: dict[_Key, _Load] = {}
        service.metrics.hanging_loads.set_function(
            lambda: sum(load.is_late for load in list(self._loads.values()))
        )
        # The seconds until the next retry, and its time, for each version that could not be loaded.
        self._failures: dict[_Key, tuple[float, float]] = {}
        self._has_synchronized = False
        self.problem = ""
        self.is_settled = False
        # The last logged error of the source, and the time at which it was logged.
        self._logged_problem, self._logged_at = "", 0.0
        self._num_running = 0
        # Keep references to running tasks, because the event loop keeps only weak references to
        # tasks.
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_busy(self) -> bool:
        """Returns whether a thread of the loader, which cannot be interrupted, is running."""
        return self._num_running > 0

    async def follow(self) -> None:
        """Calls `synchronize` again and again until the task is cancelled."""
        while True:
            await self.synchronize()
            self.is_settled = True
            await asyncio.sleep(self._pause())

    def _pause(self) -> float:
        """Returns the seconds until the next read of the source.

        They are random, so that replicas do not load a new version at the same moment.
        """
        return self._poll * random.uniform(0.5, 1.5)

    async def synchronize(self) -> None:
        """Loads and unloads versions until the service matches the desired state of the source.

        A load of more than `_SLOW_SECONDS` continues in the background.
        """
        while (desired := await self._read_source()) is not None:
            self._apply(desired)
            self._start_load(desired)
            running = [load.task for load in self._loads.values() if load.delays_others]
            if not running:
                return
            # During a load, continue to read the source: a rollback must not wait for the load.
            await asyncio.wait(running, timeout=self._pause(), return_when=asyncio.FIRST_COMPLETED)

    def _apply(self, desired: Mapping[str, DesiredState]) -> None:
        """Moves aliases, unloads versions, and marks the loads that are no longer wanted."""
        self._remove_models(desired)
        for model, state in desired.items():
            self._service.models.add_model(model, is_required=not self._has_synchronized)
            self._update_aliases(model, state)
            self._unload(model, state.versions)
        self._has_synchronized = True
        wanted = {
            (model, number, digest_)
            for model, state in desired.items()
            for number, digest_ in state.versions.items()
        }
        # If a version is no longer wanted, forget its failures, because its files may be repaired
        # before the version is wanted again.
        kept = wanted | self._loads.keys()
        self._failures = {key: self._failures[key] for key in kept & self._failures.keys()}
        for key, load in self._loads.items():
            model, number, _ = key
            was_wanted, load.is_wanted = load.is_wanted, key in wanted
            if was_wanted and not load.is_wanted:
                if model in desired:
                    self._service.models.set_state(model, number, END)
                self._service.metrics.loads.labels(model, "abandoned").inc()
                logger.warning("%s, version %d: no longer wanted; not loaded", model, number)
            elif load.is_wanted and not was_wanted:
                self._service.models.set_state(model, number, LOADING)
                if load.is_late:
                    self._fail_late(key)

    def _start_load(self, desired: Mapping[str, DesiredState]) -> None:
        """Starts to load the next missing version, unless another load has just been started."""
        key = next(self._missing(desired), None)
        if key is not None and not any(load.delays_others for load in self._loads.values()):
            self._loads[key] = _Load(self._start_task(self._load(key)), time.monotonic())

    def _start_task(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _read_source(self) -> dict[str, DesiredState] | None:
        """Reads the desired state from the source; on an error, logs the error and returns None."""
        start = time.monotonic()
        reading = asyncio.ensure_future(self._run_on_thread(self._source.desired))
        try:
            while not (await asyncio.wait({reading}, timeout=_SLOW_SECONDS))[0]:
                waited = time.monotonic() - start
                logger.warning("the registry has not answered for %.0f s", waited)
            desired = reading.result()
        except UserError as error:
            self._log_problem(str(error))
            return None
        except Exception:
            # Catch every exception: if this task ended, the server would never load a new version.
            logger.exception("cannot read the registry")
            return None
        self._logged_problem = ""
        self._service.metrics.last_read.set_to_current_time()
        return desired

    def _log_problem(self, problem: str) -> None:
        """Logs an error of the source; logs the same error again only after `_REPEAT_SECONDS`."""
        now = time.monotonic()
        if problem != self._logged_problem or now - self._logged_at > _REPEAT_SECONDS:
            self._logged_problem, self._logged_at = problem, now
            logger.warning("cannot read the registry; the loaded versions stay: %s", problem)

    def _missing(self, desired: Mapping[str, DesiredState]) -> Iterator[_Key]:
        """Yields (model, number, digest) of each version to load, default versions first."""
        for is_default in (True, False):
            for model, state in desired.items():
                loaded = self._service.models.loaded(model)
                default = next(iter(state.aliases.values()), None)
                for number, digest_ in state.versions.items():
                    is_loaded = number in loaded and loaded[number].digest == digest_
                    key = model, number, digest_
                    if (number == default) == is_default and not is_loaded and self._is_due(key):
                        yield key

    def _is_due(self, key: _Key) -> bool:
        """Returns whether a load may start: none is running, and it is not too early to retry."""
        _, retry_at = self._failures.get(key, (0.0, 0.0))
        return key not in self._loads and time.monotonic() >= retry_at

    def _update_aliases(self, model: str, state: DesiredState) -> None:
        """Points the aliases of a model to the desired versions, if these versions are loaded."""
        models = self._service.models
        loaded = models.loaded(model)
        before = models.aliases(model)
        # Until the new version of an alias is loaded, the alias still points to the old version. An
        # alias without a loaded version stays in the mapping, because the first alias determines
        # the default version.
        targets = {
            alias: number if number in loaded else before.get(alias, number)
            for alias, number in state.aliases.items()
        }
        models.set_aliases(model, targets)
        models.set_experiment(model, state.experiment)

    def _remove_models(self, desired: Mapping[str, DesiredState]) -> None:
        """Unloads the models that the desired state does not contain."""
        models = self._service.models
        for model in set(models.names) - desired.keys():
            models.set_aliases(model, {})
            self._unload(model, ())
            models.remove_model(model)
            logger.warning("%s: unloaded, because it has no version with the served alias", model)

    def _unload(self, model: str, numbers: Collection[int]) -> None:
        """Unloads a model's versions, except versions with the given numbers or with an alias."""
        models = self._service.models
        kept = {*numbers, *models.aliases(model).values()}
        for number in models.loaded(model).keys() - kept:
            version = models.remove_version(model, number)
            self._service.metrics.loaded.remove(model, number)
            logger.info("%s, version %d: no longer served", model, number)
            self._start_task(self._end_when_unused(version))

    async def _end_when_unused(self, version: Version) -> None:
        """Waits until no request uses an unloaded version, then sets its state to END.

        After that, the version's memory is freed.
        """
        while version.in_use:
            await asyncio.sleep(0.05)
        models = self._service.models
        if version.model in models.names and version.number not in models.loaded(version.model):
            models.set_state(version.model, version.number, END)
            self._service.metrics.remove_version(version.model, version.number, version.class_names)

    async def _load(self, key: _Key) -> None:
        """Loads a version on a thread, and adds the version if it is still wanted.

        A load that exceeds the time limit counts as failed. The thread cannot be interrupted, so no
        other load of the version is started, and the version is used if the load ends after all.
        """
        model, number, _ = key
        models, metrics = self._service.models, self._service.metrics
        models.set_state(model, number, LOADING)
        logger.info("%s, version %d: loading", model, number)
        loaded = [version for name in models.names for version in models.loaded(name).values()]
        start = time.monotonic()
        making = asyncio.ensure_future(self._run_on_thread(self._make, *key, loaded))
        waited = 0.0
        while waited < self._load_timeout:
            pause = min(_SLOW_SECONDS, self._load_timeout - waited)
            if (await asyncio.wait({making}, timeout=pause))[0]:
                break
            waited = time.monotonic() - start
            logger.warning("%s, version %d: still loading after %.0f s", model, number, waited)
        load = self._loads[key]
        if not making.done():
            load.is_late = True
            if load.is_wanted:
                self._fail_late(key)
        try:
            version = await making
        except Exception as error:
            # Catch every exception, because a bad new version must not stop the server.
            del self._loads[key]
            if load.is_wanted:
                self._fail(key, error, is_counted=load.is_late)
            return
        del self._loads[key]
        if not load.is_wanted:
            return
        self._failures.pop(key, None)
        models.add_version(version)
        metrics.loads.labels(model, "loaded").inc()
        metrics.loaded.labels(model, number).set(1)
        seconds = time.monotonic() - start
        logger.info("%s, version %d: ready after %.1f s", model, number, seconds)

    def _fail_late(self, key: _Key) -> None:
        message = f"it was not loaded within {self._load_timeout:g} s"
        self._fail(key, UserError(f"{message}; --load_timeout is this limit"))

    def _fail(self, key: _Key, error: Exception, is_counted: bool = False) -> None:
        """Reports a version that could not be loaded, and sets the time of the next try.

        A late load that fails at last is reported twice, and is counted as one failure.
        """
        model, number, _ = key
        wait, _ = self._failures.get(key, (0.0, 0.0))
        if not is_counted:
            wait = min(2 * wait, _MAX_RETRY) or _FIRST_RETRY
        self._failures[key] = wait, time.monotonic() + wait
        self.problem = str(error) if isinstance(error, UserError) else repr(error)
        self._service.models.set_state(model, number, END, _public_message(error))
        self._service.metrics.loads.labels(model, "failed").inc(not is_counted)
        next_try = "next try when this load ends" if key in self._loads else ""
        logger.error(
            "%s, version %d: not loaded; the loaded versions stay: %s; %s",
            model,
            number,
            self.problem,
            next_try or f"next try in {wait:.0f} s",
        )

    def _make(self, model: str, number: int, digest_: str, loaded: Sequence[Version]) -> Version:
        bundle = self._source.open(model, number)
        pixels = self._service.limits.pixels
        return make_version(model, number, bundle, digest_, pixels, self._sizes, loaded)

    async def _run_on_thread(self, function: Callable[..., T], *args: Any) -> T:
        """Runs a function on a new thread, because the function may wait for a disk or a compiler.

        If this coroutine is cancelled, the thread continues. The thread is a daemon thread. Unlike
        a thread of an executor, it does not delay the end of the process.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: Exception | None) -> None:
            self._num_running -= 1
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
            _lower_thread_priority()
            result, error = None, None
            try:
                result = function(*args)
            except Exception as raised:
                error = raised
            except BaseException as raised:  # For example, a panic in the Rust code of obstore.
                error = RuntimeError(repr(raised))
            with contextlib.suppress(RuntimeError):  # The event loop may already be closed.
                loop.call_soon_threadsafe(finish, result, error)

        self._num_running += 1
        threading.Thread(target=run, name="load", daemon=True).start()
        return await future


def _public_message(error: Exception) -> str:
    """Returns an error message for clients, without the paths and addresses that the log shows."""
    message = str(error) if isinstance(error, UserError) else ""
    return message if message and "/" not in message else "it cannot be loaded; the log says why"


def _lower_thread_priority() -> None:
    """Gives this thread a lower priority than the threads that answer requests.

    Only some operating systems, such as Linux, have a priority for each thread.
    """
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
