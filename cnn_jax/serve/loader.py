"""Brings versions in and lets them go, as a folder or a registry says."""

import abc
import asyncio
import contextlib
import dataclasses
import logging
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from cnn_jax.inference.bundle import Bundle, digest, read_bundle
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.serve.service import END, LOADING, Service
from cnn_jax.serve.versions import Version, make_version
from cnn_jax.system.errors import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds until a version that could not be loaded is tried again: doubled each time.
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 300.0
# Seconds after which a registry that does not answer is spoken of, and spoken of again.
_PATIENCE, _SAY_AGAIN = 30.0, 600.0
# Of the thread that loads; 0 is as important as those that serve.
_NICENESS = 10


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What of a model should be there.

    Attributes:
      versions: Digests by number.
      aliases: Numbers by alias, the first of them the one that the model answers by.
    """

    versions: Mapping[int, str]
    aliases: Mapping[str, int]


class Source(abc.ABC):
    """Where versions come from. All of it may wait for a disk or a network."""

    def check(self) -> None:  # noqa: B027 (there may be nothing to say)
        """Says what is wrong before anything is started; UserError."""

    @abc.abstractmethod
    def wanted(self) -> dict[str, Wanted]:
        """What should be there now, by model; UserError if that cannot be known."""

    @abc.abstractmethod
    def open(self, model: str, number: int) -> Bundle:
        """A version's bundle, verified; UserError if it cannot be had."""

    @abc.abstractmethod
    def want(self, model: str, number: int, is_wanted: bool) -> None:
        """Has a version be there besides, or not any more; UserError if there is none."""


class OneBundle(Source):
    """A bundle in a folder, as version 1 of a model."""

    def __init__(self, path: pathlib.Path, model: str):
        """Reads it.

        Raises:
          BundleError: It is no bundle, or a damaged one.
        """
        self._model = model
        self._bundle = read_bundle(path)
        self._digest = digest(path)

    def wanted(self) -> dict[str, Wanted]:
        return {self._model: Wanted({1: self._digest}, {"default": 1})}

    def open(self, model: str, number: int) -> Bundle:
        return self._bundle

    def want(self, model: str, number: int, is_wanted: bool) -> None:
        raise RegistryError("the server has one bundle, and no registry")


class FromRegistry(Source):
    """What an alias of a registry points to, and other versions besides."""

    def __init__(
        self, registry: Registry, models: Sequence[str], alias: str, others: Sequence[int | str]
    ):
        """Follows a registry.

        Args:
          registry: Which one.
          models: Those that are served, while they have the alias; none: all that have it.
          alias: By which a model answers who names no version.
          others: Numbers and aliases that can be asked besides, where a model has them.
        """
        self._registry = registry
        self._models = tuple(models)
        self._alias = alias
        self._others = tuple(others)
        self._besides: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def check(self) -> None:
        self._registry.refresh()
        for name in self._models:
            self._registry.resolve(name, self._alias)
        found = self._wanted()
        if not found:
            raise RegistryError(f"{self._registry.url} has no model with an alias {self._alias!r}")
        for other in self._others:
            if not any(self._number_of(name, other) for name in found):
                logger.warning("--versions: there is no version %s yet", other)

    def wanted(self) -> dict[str, Wanted]:
        self._registry.refresh()
        return self._wanted()

    def _wanted(self) -> dict[str, Wanted]:
        models = self._registry.models
        names = self._models or models
        return {
            name: self._wanted_of(name)
            for name in names
            if name in models and models[name].present(self._alias)
        }

    def _number_of(self, name: str, which: int | str) -> int | None:
        """The version of a model that a number or an alias means, if it is there."""
        model = self._registry.models[name]
        number = which if isinstance(which, int) else model.present(which)
        return number if number in model.versions else None

    def _wanted_of(self, name: str) -> Wanted:
        with self._lock:
            besides = [number for of, number in self._besides if of == name]
        # The first one is that by which the model answers.
        found = [self._number_of(name, which) for which in (self._alias, *self._others, *besides)]
        numbers = dict.fromkeys(number for number in found if number is not None)
        model = self._registry.models[name]
        aliases = {self._alias: found[0]} | {alias: model.present(alias) for alias in model.aliases}
        return Wanted(
            {number: model.versions[number].bundle.digest for number in numbers},
            {alias: number for alias, number in aliases.items() if number in numbers},
        )

    def open(self, model: str, number: int) -> Bundle:
        version = self._registry.resolve(model, number)
        with tempfile.TemporaryDirectory(prefix="cnn_jax-") as folder:
            return read_bundle(self._registry.fetch(version, folder))

    def want(self, model: str, number: int, is_wanted: bool) -> None:
        if model not in self.wanted():
            raise RegistryError(f"{model} is not served here")
        if is_wanted:
            self._registry.resolve(model, number)
        with self._lock:
            if is_wanted:
                self._besides.add((model, number))
            else:
                self._besides.discard((model, number))


class Loader:
    """Keeps a service at what a source wants."""

    def __init__(self, service: Service, source: Source, sizes: Sequence[int]):
        """Nothing is loaded yet.

        Args:
          service: Which one.
          source: Of the versions.
          sizes: Numbers of images that are computed at once.
        """
        self._service = service
        self._source = source
        self._sizes = sizes
        # Versions that could not be loaded: how often, and when they are tried again.
        self._failures: dict[tuple[str, int, str], tuple[int, float]] = {}
        self._turn = asyncio.Lock()
        self._has_looked = False
        # Of the last version that could not be loaded.
        self.problem = ""
        # What was last said of the source, and when.
        self._said, self._said_at = "", 0.0
        self._busy = 0
        # The loop itself keeps no task alive.
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether something is under way that nothing can interrupt."""
        return self._busy > 0

    async def follow(self, seconds: float) -> None:
        """Looks again and again, with so much time between; until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(seconds)

    async def look(self) -> None:
        """Brings everything to what the source wants now, as far as it can be had."""
        async with self._turn:
            # After each load the source is asked again: it may want something else by now.
            while (wanted := await self._ask()) is not None:
                self._forget(wanted)
                for model, of_model in wanted.items():
                    self._service.models.expect(model, is_required=not self._has_looked)
                    self._point(model, of_model)
                    self._let_go(model, of_model.versions)
                self._has_looked = True
                missing = next(self._missing(wanted), None)
                if missing is None:
                    return
                await self._load(*missing)

    async def look_again(self, seconds: float) -> bool:
        """Looks now, whatever failed before; whether that was done in so many seconds."""
        self._failures.clear()
        return await self._within(seconds, self.look())

    async def want(self, model: str, number: int, is_wanted: bool, seconds: float) -> bool:
        """Has a version be there besides, or not any more; whether it was seen to in time.

        Raises:
          UserError: There is no such version.
        """

        async def want() -> None:
            async with self._turn:
                await self._on_thread(self._source.want, model, number, is_wanted)
            self._failures.clear()
            await self.look()

        return await self._within(seconds, want())

    async def _within(self, seconds: float, work: Coroutine[Any, Any, None]) -> bool:
        """Whether work is done in so many seconds; in any case it goes on."""
        task = self._keep(work)
        done, _ = await asyncio.wait({task}, timeout=seconds)
        for one in done:
            one.result()
        return bool(done)

    def _keep(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _ask(self) -> dict[str, Wanted] | None:
        """What the source wants; None, and a word of it, if that cannot be known."""
        start = time.monotonic()
        asking = asyncio.ensure_future(self._on_thread(self._source.wanted))
        try:
            while not (await asyncio.wait({asking}, timeout=_PATIENCE))[0]:
                waited = time.monotonic() - start
                logger.warning("the registry has not answered for %.0f s", waited)
            wanted = asking.result()
        except UserError as error:
            self._say(str(error))
            return None
        except Exception:
            # Of any kind: who does not look any more would serve an old version for ever.
            logger.exception("cannot look for versions")
            return None
        self._said = ""
        self._service.measures.last_look.set_to_current_time()
        return wanted

    def _say(self, problem: str) -> None:
        """Logs why nothing can be known, when it is new and from time to time."""
        now = time.monotonic()
        if problem != self._said or now - self._said_at > _SAY_AGAIN:
            self._said, self._said_at = problem, now
            logger.warning("cannot look for versions, and what is served goes on: %s", problem)

    def _missing(self, wanted: Mapping[str, Wanted]) -> Iterator[tuple[str, int, str]]:
        """Model, number and digest of what is to be loaded; what answers first comes first."""
        for is_default in (True, False):
            for model, of_model in wanted.items():
                present = self._service.models.present(model)
                default = next(iter(of_model.aliases.values()), None)
                for number, digest_ in of_model.versions.items():
                    is_there = number in present and present[number].digest == digest_
                    key = model, number, digest_
                    if (number == default) == is_default and not is_there and self._is_time(key):
                        yield key

    def _is_time(self, key: tuple[str, int, str]) -> bool:
        _, again = self._failures.get(key, (0, 0.0))
        return time.monotonic() >= again

    def _point(self, model: str, wanted: Wanted) -> None:
        """Turns the aliases to what is there."""
        models = self._service.models
        present = models.present(model)
        before = models.aliases(model)
        # An alias whose new version could not be loaded stays where it was.
        pointed = {
            alias: number if number in present else before.get(alias)
            for alias, number in wanted.aliases.items()
        }
        models.point(model, {a: number for a, number in pointed.items() if number is not None})

    def _forget(self, wanted: Mapping[str, Wanted]) -> None:
        """Lets models go that are not wanted any more."""
        models = self._service.models
        for model in set(models.names) - wanted.keys():
            models.point(model, {})
            self._let_go(model, ())
            models.forget(model)
            logger.warning("%s: has no alias any more by which it would answer", model)

    def _let_go(self, model: str, wanted: Collection[int]) -> None:
        models = self._service.models
        kept = {*wanted, *models.aliases(model).values()}
        for number in models.present(model).keys() - kept:
            version = models.drop(model, number)
            self._service.measures.loaded.remove(model, number)
            logger.info("%s, version %d: no longer served", model, number)
            self._keep(self._until_unused(version))

    async def _until_unused(self, version: Version) -> None:
        """Waits for the requests that are under way; what it holds is freed with the last."""
        while version.in_use:
            await asyncio.sleep(0.05)
        models = self._service.models
        if version.model in models.names and version.number not in models.present(version.model):
            models.note(version.model, version.number, END)
            self._service.measures.forget(version.model, version.number, version.class_names)

    async def _load(self, model: str, number: int, digest_: str) -> None:
        key = model, number, digest_
        models = self._service.models
        models.note(model, number, LOADING)
        start = time.monotonic()
        served = [one for name in models.names for one in models.present(name).values()]
        try:
            version = await self._on_thread(self._make, model, number, digest_, served)
        except Exception as error:
            # Of any kind: what serves must go on, whatever is wrong with what was to come.
            count = self._failures.get(key, (0, 0.0))[0] + 1
            wait = min(_FIRST_WAIT * 2 ** (count - 1), _LONGEST_WAIT)
            self._failures[key] = count, time.monotonic() + wait
            self.problem = str(error) if isinstance(error, UserError) else repr(error)
            models.note(model, number, END, _for_clients(error))
            self._service.measures.loads.labels(model, "failed").inc()
            logger.error(
                "%s, version %d: not loaded, and what was served goes on: %s; tried "
                "again in %.0f s",
                model,
                number,
                self.problem,
                wait,
            )
            return
        self._failures.pop(key, None)
        models.bring(version)
        self._service.measures.loads.labels(model, "loaded").inc()
        self._service.measures.loaded.labels(model, number).set(1)
        seconds = time.monotonic() - start
        logger.info("%s, version %d: ready after %.1f s", model, number, seconds)

    def _make(self, model: str, number: int, digest_: str, served: Sequence[Version]) -> Version:
        bundle = self._source.open(model, number)
        pixels = self._service.limits.pixels
        return make_version(model, number, bundle, digest_, pixels, self._sizes, served)

    async def _on_thread(self, function: Callable[..., T], *args: Any) -> T:
        """What a function returns that may wait for a disk, a network or a compiler.

        On a thread that holds up no end of the process, unlike those of an executor.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def tell(result: T | None, error: Exception | None) -> None:
            self._busy -= 1
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)  # type: ignore[arg-type]
            else:
                future.set_exception(error)

        def run() -> None:
            _be_nice()
            result, error = None, None
            try:
                result = function(*args)
            except Exception as failed:
                error = failed
            with contextlib.suppress(RuntimeError):  # The loop has ended meanwhile.
                loop.call_soon_threadsafe(tell, result, error)

        self._busy += 1
        threading.Thread(target=run, name="load", daemon=True).start()
        return await future


def _for_clients(error: Exception) -> str:
    """What is wrong with a version; paths and addresses are for the log alone."""
    message = str(error) if isinstance(error, UserError) else ""
    return message if message and "/" not in message else "it cannot be loaded; the log says why"


def _be_nice() -> None:
    """Lets the threads that serve go first, where threads have priorities of their own."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
