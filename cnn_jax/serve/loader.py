"""Loads the versions of models from a bundle or a registry, and follows changes of the registry."""

import abc
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import random
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from cnn_jax.inference.bundle import Bundle, Ensemble, digest
from cnn_jax.inference.exported import OnnxPredictor, read_model
from cnn_jax.registry import ledger
from cnn_jax.registry.ledger import CHAMPION, RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.split import Experiment
from cnn_jax.serve.service import END, LOADING, Service
from cnn_jax.serve.versions import Version, make_version
from cnn_jax.system.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds until the first retry after a failed load, and the maximum number of seconds until a
# retry. Each failure doubles the time until the next retry.
_FIRST_RETRY, _MAX_RETRY = 5.0, 300.0
# If a version has this number of hanging threads, it is tried again only after _HANGING_RETRY
# seconds, because each thread may keep memory.
_MAX_HANGING, _HANGING_RETRY = 3, 3600.0
# While the registry does not answer, a warning is logged every _SLOW_SECONDS seconds. While the
# registry reports the same error, the error is logged every _REPEAT_SECONDS seconds.
_SLOW_SECONDS, _REPEAT_SECONDS = 30.0, 600.0
# The niceness (scheduling priority) of the thread that loads versions. The threads that answer
# requests have niceness 0.
_NICENESS = 10


@dataclasses.dataclass(frozen=True)
class DesiredState:
    """The versions of a model that should be loaded, and the model's aliases.

    Attributes:
      versions: Bundle digests by version number.
      aliases: Version numbers by alias. The version of the first alias is the default version.
      experiment: The experiment that splits the requests of the first alias; None without one.
    """

    versions: Mapping[int, str]
    aliases: Mapping[str, int]
    experiment: Experiment | None = None


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

    @abc.abstractmethod
    def set_extra(self, model: str, number: int, is_extra: bool) -> None:
        """Adds an extra version to the desired state, or removes an extra version.

        An extra version is served even if no alias points to the version.

        Raises:
          UserError: The version does not exist.
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

    def set_extra(self, model: str, number: int, is_extra: bool) -> None:
        raise RegistryError("the server has one bundle, and no registry")


class RegistrySource(Source):
    """A source that provides, for each model of a registry, the version with a given alias.

    Extra versions of these models can be served too.
    """

    def __init__(
        self,
        registry: Registry,
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
        # The (model, number) of each version that an administrator has added.
        self._admin_extra: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

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
        """Returns advice for an error message: the command that creates the alias."""
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
        """Returns the number of the selected version, or None if the version does not exist.

        `version` is a number or an alias.
        """
        model = self._registry.models[name]
        number = version if isinstance(version, int) else model.alias_target(version)
        return number if number in model.versions else None

    def _desired_versions(self, name: str) -> DesiredState:
        with self._lock:
            admin_extra = [number for model, number in self._admin_extra if model == name]
        # The default version must come first, because the code below takes the default version from
        # `found[0]`.
        model = self._registry.models[name]
        experiment = model.running_experiment
        if experiment is not None and experiment.alias != self._alias:
            experiment = None
        challengers = [] if experiment is None else [experiment.challenger]
        extra = (*self._extra, *admin_extra, *challengers)
        found = [self._number(name, one) for one in (self._alias, *extra)]
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

    def set_extra(self, model: str, number: int, is_extra: bool) -> None:
        if model not in self.desired():
            raise RegistryError(f"{model} is not served here")
        if is_extra:
            self._registry.resolve(model, number)
        with self._lock:
            if is_extra:
                self._admin_extra.add((model, number))
            else:
                self._admin_extra.discard((model, number))


class LoadTimeoutError(UserError):
    """Raised if a version was not loaded in time."""


# A version to load: the model, the number of the version, and the digest of its bundle.
_Key = tuple[str, int, str]


@dataclasses.dataclass(frozen=True)
class _Load:
    """A version that is being loaded; `start` is in seconds of `time.monotonic`."""

    task: "asyncio.Task[None]"
    start: float

    @property
    def is_slow(self) -> bool:
        return time.monotonic() - self.start > _SLOW_SECONDS


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
          load_timeout: Maximum seconds that the loading of a version may take.
        """
        self._service = service
        self._source = source
        self._sizes = sizes
        self._poll = poll
        self._load_timeout = load_timeout
        self._loads: dict[_Key, _Load] = {}
        # The start times of the threads that load a version. A thread cannot be interrupted, so it
        # may still run after its load was abandoned or timed out.
        self._thread_starts: dict[_Key, list[float]] = {}
        service.metrics.hanging_loads.set_function(self._num_hanging)
        # The number of failures and the time of the next retry, for each version that could not be
        # loaded.
        self._failures: dict[_Key, tuple[int, float]] = {}
        self._lock = asyncio.Lock()
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
        """Returns whether a thread of the loader is running.

        Such a thread cannot be interrupted.
        """
        return self._num_running > 0

    async def follow(self) -> None:
        """Calls `synchronize` again and again until the task is cancelled."""
        while True:
            await self.synchronize()
            self.is_settled = True
            await asyncio.sleep(self._pause())

    def _pause(self) -> float:
        """Returns the seconds until the next read of the source.

        They are random, so that the servers of a registry do not load a new version at the same
        moment.
        """
        return self._poll * random.uniform(0.5, 1.5)

    async def synchronize(self) -> None:
        """Loads and unloads versions until the service matches the desired state of the source.

        A load of more than `_SLOW_SECONDS` continues in the background.
        """
        while True:
            async with self._lock:
                desired = await self._read_source()
                if desired is None:
                    return
                self._apply(desired)
                self._start_load(desired)
                running = [load.task for load in self._loads.values() if not load.is_slow]
            if not running:
                return
            # During a load, continue to read the source: a rollback must not wait for the load.
            await asyncio.wait(running, timeout=self._pause(), return_when=asyncio.FIRST_COMPLETED)

    def _apply(self, desired: Mapping[str, DesiredState]) -> None:
        """Moves aliases, unloads versions, and abandons loads that are no longer desired."""
        self._remove_models(desired)
        for model, state in desired.items():
            self._service.models.add_model(model, is_required=not self._has_synchronized)
            self._update_aliases(model, state)
            self._unload(model, state.versions)
        self._has_synchronized = True
        for key, load in list(self._loads.items()):
            model, number, digest_ = key
            if model not in desired or desired[model].versions.get(number) != digest_:
                load.task.cancel()
                del self._loads[key]
                if model in desired:
                    self._service.models.set_state(model, number, END)
                self._service.metrics.loads.labels(model, "abandoned").inc()
                logger.warning("%s, version %d: no longer wanted; not loaded", model, number)

    def _start_load(self, desired: Mapping[str, DesiredState]) -> None:
        """Starts to load the next missing version, unless another load has just been started.

        A slow load does not delay the load of another version.
        """
        key = next(self._missing(desired), None)
        if key is not None and all(load.is_slow for load in self._loads.values()):
            self._loads[key] = _Load(self._start_task(self._load(key)), time.monotonic())

    async def synchronize_now(self, seconds: float) -> bool:
        """Calls `synchronize` and retries failed loads at once; returns False after a timeout.

        `seconds` is the maximum time to wait.
        """
        self._failures.clear()
        return await self._finishes(seconds, self.synchronize())

    async def set_extra(self, model: str, number: int, is_extra: bool, seconds: float) -> bool:
        """Loads or unloads an extra version; returns False after a timeout of `seconds`.

        Args:
          model: The name of the model.
          number: The number of the version.
          is_extra: True to load the version, False to unload the version.
          seconds: The maximum time to wait. After this time, the work continues in the background.

        Raises:
          UserError: The version does not exist.
        """

        async def set_and_synchronize() -> None:
            await self._run_on_thread(self._source.set_extra, model, number, is_extra)
            self._failures.clear()
            await self.synchronize()

        return await self._finishes(seconds, set_and_synchronize())

    async def _finishes(self, seconds: float, work: Coroutine[Any, Any, None]) -> bool:
        """Waits at most `seconds` seconds for a coroutine; returns whether the coroutine ended.

        If the coroutine did not end, it continues in the background.
        """
        task = self._start_task(work)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        for ended in done:
            ended.result()
        return bool(done)

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
        """Returns whether a load may start: none is running, and it is not too early to retry.

        A thread that has exceeded the time limit does not count as running.
        """
        _, retry_at = self._failures.get(key, (0, 0.0))
        starts, now = self._thread_starts.get(key, []), time.monotonic()
        is_running = key in self._loads or any(now - t < self._load_timeout for t in starts)
        if len(starts) >= _MAX_HANGING:
            retry_at = max(retry_at, starts[-1] + _HANGING_RETRY)
        return not is_running and now >= retry_at

    def _update_aliases(self, model: str, state: DesiredState) -> None:
        """Points the aliases of a model to the desired versions, if these versions are loaded."""
        models = self._service.models
        loaded = models.loaded(model)
        before = models.aliases(model)
        # Until the new version of an alias is loaded, the alias still points to the old version.
        targets = {
            alias: number if number in loaded else before.get(alias)
            for alias, number in state.aliases.items()
        }
        models.set_aliases(
            model, {a: number for a, number in targets.items() if number is not None}
        )
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
        """Waits until no request uses an unloaded version, then sets the version's state to END.

        After that, the version's memory is freed.
        """
        while version.in_use:
            await asyncio.sleep(0.05)
        models = self._service.models
        if version.model in models.names and version.number not in models.loaded(version.model):
            models.set_state(version.model, version.number, END)
            self._service.metrics.remove_version(version.model, version.number, version.class_names)

    async def _load(self, key: _Key) -> None:
        model, number, _ = key
        models = self._service.models
        models.set_state(model, number, LOADING)
        logger.info("%s, version %d: loading", model, number)
        start = time.monotonic()
        try:
            version = await self._make_in_time(key)
        except Exception as error:
            # Catch every exception, because a bad new version must not stop the server.
            self._fail(key, error)
            return
        del self._loads[key]
        self._failures.pop(key, None)
        models.add_version(version)
        self._service.metrics.loads.labels(model, "loaded").inc()
        self._service.metrics.loaded.labels(model, number).set(1)
        seconds = time.monotonic() - start
        logger.info("%s, version %d: ready after %.1f s", model, number, seconds)

    async def _make_in_time(self, key: _Key) -> Version:
        """Makes a version on a thread; logs a warning while this takes long.

        Raises:
          LoadTimeoutError: The version was not made in time. Its thread cannot be interrupted.
        """
        models = self._service.models
        loaded = [version for name in models.names for version in models.loaded(name).values()]
        start = time.monotonic()
        self._thread_starts.setdefault(key, []).append(start)
        on_end = functools.partial(self._end_thread, key, start)
        making = asyncio.ensure_future(self._run_on_thread(self._make, *key, loaded, on_end=on_end))
        try:
            while True:
                left = start + self._load_timeout - time.monotonic()
                done, _ = await asyncio.wait({making}, timeout=min(_SLOW_SECONDS, max(left, 0.0)))
                if done:
                    return making.result()
                waited = time.monotonic() - start
                if waited >= self._load_timeout:
                    raise LoadTimeoutError(
                        f"it was not loaded within {self._load_timeout:g} s; --load_timeout is "
                        "this limit"
                    )
                logger.warning("%s, version %d: still loading after %.0f s", *key[:2], waited)
        finally:
            making.cancel()

    def _end_thread(self, key: _Key, start: float) -> None:
        self._thread_starts[key].remove(start)
        if not self._thread_starts[key]:
            del self._thread_starts[key]

    def _num_hanging(self) -> int:
        """Returns the number of threads beyond the time limit; may be called in any thread."""
        end = time.monotonic() - self._load_timeout
        starts = itertools.chain.from_iterable(list(self._thread_starts.values()))
        return sum(start <= end for start in starts)

    def _fail(self, key: _Key, error: Exception) -> None:
        """Reports a version that could not be loaded, and sets the time of the next try."""
        model, number, _ = key
        del self._loads[key]
        count = self._failures.get(key, (0, 0.0))[0] + 1
        wait = min(_FIRST_RETRY * 2 ** (count - 1), _MAX_RETRY)
        self._failures[key] = count, time.monotonic() + wait
        self.problem = str(error) if isinstance(error, UserError) else repr(error)
        self._service.models.set_state(model, number, END, _public_message(error))
        self._service.metrics.loads.labels(model, "failed").inc()
        next_try = f"next try in {wait:.0f} s"
        if len(self._thread_starts.get(key, ())) >= _MAX_HANGING:
            next_try = f"next try in {_HANGING_RETRY:.0f} s, or when one of its hanging loads ends"
        logger.error(
            "%s, version %d: not loaded; the loaded versions stay: %s; %s",
            model,
            number,
            self.problem,
            next_try,
        )

    def _make(self, model: str, number: int, digest_: str, loaded: Sequence[Version]) -> Version:
        bundle = self._source.open(model, number)
        pixels = self._service.limits.pixels
        return make_version(model, number, bundle, digest_, pixels, self._sizes, loaded)

    async def _run_on_thread(
        self,
        function: Callable[..., T],
        *args: Any,
        on_end: Callable[[], None] = lambda: None,
    ) -> T:
        """Runs a function on a new thread, because the function may wait for a disk or a compiler.

        If this coroutine is cancelled, the thread continues. `on_end` is called in the event loop
        when the thread ends. The thread is a daemon thread. Unlike a thread of an executor, it does
        not delay the end of the process.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: Exception | None) -> None:
            self._num_running -= 1
            on_end()
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
