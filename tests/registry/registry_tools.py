"""Helpers for tests of the registry: bundles without training, and stores that fail."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil

import obstore
import pytest

from cnn_jax.registry.registry import Registry
from cnn_jax.registry.store import Store


class Killed(BaseException):
    """An exception that simulates SIGKILL in a process that uses a registry."""


def vary(bundle, target, **changes):
    """Copies a bundle with changes in bundle.json, so that the copy has a different digest."""
    shutil.copytree(bundle, target)
    description = json.loads((target / "bundle.json").read_text())
    (target / "bundle.json").write_text(json.dumps(description | changes))
    return target


def figures(accuracy, **others):
    return {"test": {"accuracy": accuracy, **others}}


def outline(registry):
    """Returns the state of a registry for comparisons: without IDs, times and file names."""
    return {
        name: (
            {number: version.bundle.digest for number, version in model.versions.items()},
            model.aliases,
            model.last,
        )
        for name, model in registry.models.items()
    }


def aliases(registry, name="flowers"):
    return {alias: history[-1] for alias, history in registry.models[name].aliases.items()}


def on(store):
    """Returns a registry whose files are in the given store."""
    registry = Registry(pathlib.Path("unused"))
    registry._store, registry.url = store, store.url
    return registry


class Wrapped(Store):
    """A store that forwards each call to another store, with hooks before and after each call.

    Attributes:
      calls: The names of the methods that were called.
    """

    def __init__(self, store):
        self._store = store
        self.url = store.url
        self.calls = []
        self.before = lambda call, name: None
        self.after = lambda call, name: None

    def _pass(self, call, name, *arguments):
        self.calls.append((call, name))
        self.before(call, name)
        result = getattr(self._store, call)(name, *arguments)
        self.after(call, name)
        return result

    def create(self, name, data):
        return self._pass("create", name, data)

    def write(self, name, data):
        return self._pass("write", name, data)

    def read(self, name):
        return self._pass("read", name)

    def names(self, folder):
        return self._pass("names", folder)

    def remove(self, name):
        return self._pass("remove", name)

    def local(self, name):
        return self._store.local(name)


def wrapped(path):
    return Wrapped(Store(path))


@contextlib.contextmanager
def dying_at(moment):
    """Raises `Killed` inside the context, before a chosen call that changes files.

    Args:
      moment: The index of the call, from 0. This call and all later calls are not made, as after
        SIGKILL.
    """
    calls = itertools.count()

    def dying(function):
        def call(*arguments, **options):
            if next(calls) >= moment:
                raise Killed
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, names in (
            (obstore, ("put", "rename")),
            (os, ("unlink", "rmdir", "chmod", "fsync", "open")),
        ):
            for name in names:
                patch.setattr(module, name, dying(getattr(module, name)))
        yield
