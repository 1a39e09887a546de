"""Brings versions in and lets them go, as a folder or a registry says."""

import abc
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import logging
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from cnn_jax.bundle import Bundle, digest, read_bundle
from cnn_jax.errors import UserError
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.serve.service import END, LOADING, Service
from cnn_jax.serve.versions import Version, make_version

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds until a version that could not be loaded is tried again: doubled each time.
_FIRST_WAIT, _LONGEST_WAIT = 5.0, 300.0
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
        self, registry: Registry, models: Sequence[str], alias: str, others: Sequence[str]
    ):
        """Follows a registry.

        Args:
          registry: Which one.
          models: Those that are served; none: all that have the alias.
          alias: By which a model answers who names no version.
          others: Aliases and numbers that can be asked besides, where a model has them.
        """
        self._registry = registry
        self._models = tuple(models)
        self._alias = alias
        self._others = tuple(others)
        self._besides: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def wanted(self) -> dict[str, Wanted]:
        self._registry.refresh()
        models = self._registry.models
        names = self._models or [n for n, model in models.items() if model.present(self._alias)]
        if not names:
            raise RegistryError(f"{self._registry.url} has no model with an alias {self._alias!r}")
        return {name: self._wanted_of(name) for name in names}

    def _wanted_of(self, name: str) -> Wanted:
        present = self._registry.resolve(name, self._alias)
        model = self._registry.models[name]
        versions = {present.number: present}
        for other in self._others:
            number = int(other) if other.isdecimal() else model.present(other)
            if number in model.versions:
                versions[number] = model.versions[number]
        with self._lock:
            besides = [number for of, number in self._besides if of == name]
        versions |= {n: model.versions[n] for n in besides if n in model.versions}
        # The first one is that by which the model answers.
        aliases = {self._alias: present.number} | {
            alias: history[-1]
            for alias, history in model.aliases.items()
            if history[-1] in versions
        }
        digests = {number: version.bundle.digest for number, version in versions.items()}
        return Wanted(digests, aliases)

    def open(self, model: str, number: int) -> Bundle:
        version = self._registry.resolve(model, number)
        with tempfile.TemporaryDirectory(prefix="cnn_jax-") as folder:
            return read_bundle(self._registry.fetch(version, folder))

    def want(self, model: str, number: int, is_wanted: bool) -> None:
        self._registry.refresh()
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
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "load", initializer=_be_nice)
        # Versions that could not be loaded: how often, and when they are tried again.
        self._failures: dict[tuple[str, int, str], tuple[int, float]] = {}
        self._turn = asyncio.Lock()
        # The loop itself keeps no task alive.
        self._ending: set[asyncio.Task[None]] = set()

    async def follow(self, seconds: float) -> None:
        """Looks again and again, with so much time between; until it is cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(seconds)

    async def look(self) -> None:
        """Brings everything to what the source wants now, as far as it can be had."""
        async with self._turn:
            try:
                wanted = await self._on_thread(self._source.wanted)
            except UserError as error:
                # What is there goes on.
                logger.warning("cannot look for versions: %s", error)
                return
            for model, of_model in wanted.items():
                await self._bring(model, of_model)
                self._let_go(model, of_model)

    async def want(self, model: str, number: int, is_wanted: bool) -> None:
        """Has a version be there besides, or not any more, and sees to it.

        Raises:
          UserError: There is no such version.
        """
        await self._on_thread(self._source.want, model, number, is_wanted)
        await self.look()

    async def _bring(self, model: str, wanted: Wanted) -> None:
        """Loads what is missing, and turns the aliases to what is there."""
        models = self._service.models
        models.expect(model)
        for number, digest_ in wanted.versions.items():
            if number not in models.present(model) and self._is_time(model, number, digest_):
                await self._load(model, number, digest_)
        present = models.present(model)
        before = models.aliases(model)
        # An alias whose new version could not be loaded stays where it was.
        pointed = {
            alias: number if number in present else before.get(alias)
            for alias, number in wanted.aliases.items()
        }
        models.point(model, {a: number for a, number in pointed.items() if number is not None})

    def _let_go(self, model: str, wanted: Wanted) -> None:
        models = self._service.models
        kept = {*wanted.versions, *models.aliases(model).values()}
        for number in models.present(model).keys() - kept:
            version = models.drop(model, number)
            self._service.measures.loaded.remove(model, number)
            logger.info("%s, version %d: no longer served", model, number)
            task = asyncio.ensure_future(self._until_unused(version))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _until_unused(self, version: Version) -> None:
        """Waits for the requests that are under way; what it holds is freed with the last."""
        while version.in_use:
            await asyncio.sleep(0.05)
        self._service.models.note(version.model, version.number, END)

    def _is_time(self, model: str, number: int, digest_: str) -> bool:
        _, again = self._failures.get((model, number, digest_), (0, 0.0))
        return time.monotonic() >= again

    async def _load(self, model: str, number: int, digest_: str) -> None:
        key = model, number, digest_
        self._service.models.note(model, number, LOADING)
        start = time.monotonic()
        try:
            models = self._service.models
            served = [one for name in models.names for one in models.present(name).values()]
            version = await self._on_thread(self._make, model, number, digest_, served)
        except Exception as error:
            # Of any kind: what serves must go on, whatever is wrong with what was to come.
            count = self._failures.get(key, (0, 0.0))[0] + 1
            wait = min(_FIRST_WAIT * 2 ** (count - 1), _LONGEST_WAIT)
            self._failures[key] = count, time.monotonic() + wait
            message = str(error) if isinstance(error, UserError) else repr(error)
            self._service.models.note(model, number, END, message)
            self._service.measures.loads.labels(model, "failed").inc()
            logger.error(
                "%s, version %d: not loaded, and what was served goes on: %s; tried "
                "again in %.0f s",
                model,
                number,
                message,
                wait,
            )
            return
        self._failures.pop(key, None)
        self._service.models.bring(version)
        self._service.measures.loads.labels(model, "loaded").inc()
        self._service.measures.loaded.labels(model, number).set(1)
        seconds = time.monotonic() - start
        logger.info("%s, version %d: ready after %.1f s", model, number, seconds)

    def _make(self, model: str, number: int, digest_: str, served: Sequence[Version]) -> Version:
        bundle = self._source.open(model, number)
        pixels = self._service.limits.pixels
        return make_version(model, number, bundle, digest_, pixels, self._sizes, served)

    async def _on_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _be_nice() -> None:
    """Lets the threads that serve go first, where threads have priorities of their own."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
