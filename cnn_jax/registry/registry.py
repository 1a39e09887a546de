"""A registry of bundles in a folder, or in any place that fsspec reaches.

    registry.json               {"format": 1, "id": ...}
    log/00000001.json, ...      one file for each change, never changed; see `ledger`
    bundles/DIGEST-TIME-ID/     one folder for each version, written before its log entry
    added/NUMBER-DIGEST-TIME-ID an empty file for each `add`: its entry and its bundle's folder
    tmp/                        what is being written, or was when its writer died

The log is all the state there is, and `added/` tells of a log that has lost its end: then nothing
is changed, and no bundle is swept. A change is made by creating the next file of the log, which
one writer alone can do; who comes second reads what is new and decides again. So a change has
happened or not, whoever is killed when.
"""

import contextlib
import dataclasses
import datetime
import getpass
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import random
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from cnn_jax.registry import ledger
from cnn_jax.registry.ledger import (
    CHAMPION,
    BundleFacts,
    Entry,
    Gates,
    Model,
    RegistryError,
    Version,
)
from cnn_jax.registry.store import (
    ASIDE,
    AwayError,
    StoreError,
    made_at,
    open_store,
    prove,
    unique,
)
from cnn_jax.system.errors import BundleError, UserError

logger = logging.getLogger(__name__)

_IDENTITY = "registry.json"
_LOG = "log"
_BUNDLES = "bundles"
_ADDED = "added"
_DESCRIPTION, _WEIGHTS = _FILES = ("bundle.json", "weights.safetensors")
# Nothing that is as old as this is still being written. An upload must be done in half of it.
_STALE = datetime.timedelta(days=1)
# How often a change is tried while nobody else makes one, and what grows between two tries.
_MOST_FAILURES = 6
_PAUSE = 0.1  # Seconds.
# Seconds after which it is looked whether the registry is still the same one.
_SAME_FOR = 60.0

# What a change adds to the log, from the state that it meets; None if there is nothing to do.
Decide = Callable[[ledger.Models], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Added:
    """What came of an addition.

    Attributes:
      version: The version that is this bundle.
      is_new: False if the model had the bundle already, and nothing was added.
      has_begun: Whether there was no registry before, and this has made it.
    """

    version: Version
    is_new: bool
    has_begun: bool = False


class NoRegistryError(RegistryError):
    """There is no registry yet."""


class Registry:
    """Bundles with names, versions and aliases.

    What is known of the log is kept: `models` and `log` read it once, `refresh` and every
    change read what is new. An instance may be used by several threads.

    Every method raises `RegistryError` if the registry is not there or damaged, or does not
    have or allow what was asked for, and `StoreError` if it cannot be read or written.

    Attributes:
      url: The registry's place, without a password.
    """

    def __init__(
        self, url: str | os.PathLike[str], options: Mapping[str, Any] | None = None
    ) -> None:
        """Nothing is read or written yet.

        Args:
          url: A folder, or a URL of fsspec, such as s3://BUCKET/PATH.
          options: What fsspec is to know of it besides, such as {"endpoint_url": ...}.

        Raises:
          ConfigError: It is no such place, or what reaches it is not installed.
        """
        self._store = open_store(url, options)
        self.url = self._store.url
        self._lock = threading.RLock()
        self._identity: bytes | None = None
        self._looked = -math.inf
        self._forget()

    def _forget(self) -> None:
        """Knows nothing of the log."""
        self._is_read = False
        self._is_proven = False
        self._listed = 0
        self._marked = 0
        self._entries: list[Entry] = []
        self._last_digest = ""
        self._models: dict[str, Model] = {}

    @property
    def models(self) -> Mapping[str, Model]:
        """All models by name, as they were at the last look."""
        self._look_once()
        return self._models

    @property
    def log(self) -> list[Entry]:
        """All changes, the first one first, as they were at the last look."""
        self._look_once()
        return list(self._entries)

    def _look_once(self) -> None:
        if not self._is_read:
            self.refresh()

    def resolve(self, model: str, which: str | int = CHAMPION) -> Version:
        """A version by its number or an alias, as they were at the last look."""
        return ledger.resolve(self.models, model, which)

    def refresh(self) -> bool:
        """Reads what is new in the log, and returns whether anything was.

        When nothing is, this is one question for one file, and once a minute for another: where
        somebody has put another registry in this one's place, all of it is read anew.

        The first time it notices if the end of the log is missing with an `add` in it. Where only
        other changes are gone, that is as if they had never been.
        """
        with self._lock:
            known = self._last_digest
            self._open()
            if not self._entries:
                self._read_listed()
            while self._read_next():
                pass
            missing = _log_name(len(self._entries) + 1)
            if len(self._entries) < self._listed:
                raise RegistryError(
                    f"{self.url} is damaged: {missing} is missing, and later entries are there"
                )
            if len(self._entries) < self._marked:
                raise RegistryError(
                    f"{self.url} is damaged: the end of its log is missing, from {missing} to "
                    f"{_log_name(self._marked)} at least, as {_ADDED}/ says; put it back from a "
                    "copy of the registry"
                )
            self._is_read = True
            return self._last_digest != known

    def _open(self) -> None:
        """Looks whether the registry is there, and is the one that it was a minute ago."""
        now = time.monotonic()
        if now < self._looked + _SAME_FOR:
            return
        identity = self._read_identity()
        if self._identity is not None and identity != self._identity:
            logger.warning("%s is another registry than before: it is read anew", self.url)
            self._forget()
        self._identity, self._looked = identity, now

    def _read_identity(self) -> bytes:
        try:
            identity = self._store.read(_IDENTITY)
        except FileNotFoundError:
            if self._identity is not None:
                raise RegistryError(
                    f"{self.url} is not there any more: its {_IDENTITY} is gone"
                ) from None
            raise NoRegistryError(
                f"there is no registry at {self.url}; its first `add` makes it"
            ) from None
        try:
            later = json.loads(identity)["format"] > ledger.FORMAT
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise RegistryError(f"{self.url}/{_IDENTITY} is not that of a registry") from error
        if later:
            raise RegistryError(
                f"{self.url} is a registry of a later format than this version of cnn_jax "
                "reads: upgrade it"
            )
        return identity

    def _read_listed(self) -> None:
        """Reads what the log's folder lists without a gap, many files at once.

        A folder that is written to may be listed with a gap where there is none: an entry that
        was made during the listing, and not the one that was made before it.
        """
        # Before the log: of what is marked now the entries are there already.
        self._marked = max((int(name[:8]) for name in self._marks()), default=0)
        numbers = {int(name[:8]) for name in self._store.names(_LOG) if _is_of_log(name)}
        self._listed = max(numbers, default=0)
        names = [
            _log_name(number)
            for number in itertools.takewhile(numbers.__contains__, itertools.count(1))
        ]
        for name, data in zip(names, self._store.read_all(names), strict=True):
            if data is None:
                raise RegistryError(f"{self.url} is damaged: {name} is listed, and not there")
            self._follow(data)

    def _marks(self) -> list[str]:
        """The names in `added/`."""
        return [name for name in self._store.names(_ADDED) if _is_mark(name)]

    def _read_next(self) -> bool:
        try:
            data = self._store.read(_log_name(len(self._entries) + 1))
        except FileNotFoundError:
            return False
        self._follow(data)
        return True

    def _follow(self, data: bytes) -> None:
        """Takes the next entry into the state."""
        number = len(self._entries) + 1
        where = f"{self.url}/{_log_name(number)}"
        try:
            entry = ledger.parse(data)
            if entry.number != number:
                raise ValueError(f"it says that it is {entry.number}")
            if entry.previous != self._last_digest:
                raise ValueError("the entry before it is not the one that it was written after")
            models = ledger.apply(self._models, entry)
        except RegistryError as error:
            raise RegistryError(f"{where} {error}") from error
        except ValueError as error:
            raise RegistryError(f"{where} is damaged: {error}") from error
        self._models, self._last_digest = models, hashlib.sha256(data).hexdigest()
        self._entries.append(entry)

    def add(self, model: str, path: str | os.PathLike[str], note: str = "") -> Added:
        """Adds a bundle as the model's next version; the first one makes model and registry.

        Where the model has it already, its files are put back if they are damaged.

        Args:
          model: The model's name.
          path: The bundle's folder.
          note: Anything that is worth keeping in the log.

        Raises:
          ConfigError: The name is none.
          BundleError: There is no bundle, or a damaged one.
        """
        from cnn_jax.inference.bundle import digest

        ledger.check_name("model", model)
        wanted = digest(path)
        facts, contents = _read(pathlib.Path(path), wanted)
        has_begun = self._begin()
        self.refresh()
        if there := ledger.with_digest(self._models, model, wanted):
            self._mend(there, contents)
            return Added(there, is_new=False)
        start = time.time()

        def decide(models: ledger.Models) -> dict[str, Any] | None:
            if ledger.with_digest(models, model, wanted):
                return None
            if time.time() - start > _STALE.total_seconds() / 2:
                raise RegistryError(f"adding {path} took too long: give the command again")
            if missing := {*_FILES} - {*self._store.names(facts.path)}:
                raise RegistryError(
                    f"{' and '.join(sorted(missing))} of {path} was removed while it was added: "
                    "give the command again, and look whether the clocks of all machines are right"
                )
            number = models[model].last + 1 if model in models else 1
            return {"action": "add", "model": model, "version": number, "bundle": facts}

        try:
            for name, content in contents.items():
                self._store.write(f"{facts.path}/{name}", content)
            entry = self._commit(decide, note)
        except UserError as error:
            if not isinstance(error, AwayError):  # Then it may have been added after all.
                self._delete(facts.path)
            raise
        if entry is None:  # Somebody else has added it in the meantime.
            self._delete(facts.path)
        else:
            self._mark(entry)
        self._sweep()
        version = ledger.with_digest(self._models, model, wanted)
        if version is None:
            raise RegistryError(f"{model} had this bundle for a moment: somebody has removed it")
        return Added(version, entry is not None, has_begun)

    def _mend(self, version: Version, contents: Mapping[str, bytes]) -> None:
        """Puts a version's files back if they are damaged."""
        try:
            self.verify(version)
        except BundleError as error:
            logger.warning("%s; its files are put back", error)
            for name, content in contents.items():
                self._store.remove(f"{version.bundle.path}/{name}")
                self._store.write(f"{version.bundle.path}/{name}", content)

    def _mark(self, entry: Entry) -> None:
        """Notes beside the log that it has an addition; if that fails, a later sweep does it."""
        try:
            with contextlib.suppress(FileExistsError):
                self._store.create(f"{_ADDED}/{_mark_name(entry)}", b"")
        except StoreError as error:
            logger.warning("not marked, a later add or remove will try again: %s", error)

    def promote(
        self,
        model: str,
        which: str | int,
        alias: str = CHAMPION,
        gates: Gates = Gates(),  # noqa: B008 (it is immutable)
        note: str = "",
    ) -> Entry | None:
        """Points an alias to a version, if that holds what the gates ask and is not damaged.

        Args:
          model: The model's name.
          which: A version's number, or another alias that points to it when this begins.
          alias: The alias; it need not be there yet.
          gates: What the version's figures must be.
          note: Anything that is worth keeping in the log.

        Returns:
          What was added to the log; None if the alias points there already.

        Raises:
          ConfigError: The alias is no name.
          BundleError: The version's files are damaged.
        """
        ledger.check_name("alias", alias)
        self.refresh()
        number = ledger.resolve(self._models, model, which).number

        def decide(models: ledger.Models) -> dict[str, Any] | None:
            version = ledger.resolve(models, model, number)
            held = gates.check(models, version, alias)
            before = models[model].present(alias)
            if before == version.number:
                return None
            return {
                "action": "promote",
                "model": model,
                "version": version.number,
                "alias": alias,
                "before": before,
                "gates": held,
            }

        # What is refused anyway need not be downloaded before.
        if decide(self._models) is None:
            return None
        self.verify(self.resolve(model, number))
        return self._commit(decide, note)

    def rollback(
        self, model: str, alias: str = CHAMPION, note: str = "", present: int | None = None
    ) -> Entry:
        """Points an alias to the version that it pointed to before; again, to the one before that.

        That version's files are not verified, so that it is quick.

        Args:
          model: The model's name.
          alias: The alias.
          note: Anything that is worth keeping in the log.
          present: The version that the alias must point to now; None asks nothing.

        Returns:
          What was added to the log.

        Raises:
          RegistryError: It pointed to none before, points to another version than `present`, or
            somebody else moves it at the same time.
        """
        self.refresh()
        now = ledger.resolve(self._models, model, alias).number
        if present is not None and now != present:
            raise RegistryError(f"{model}@{alias} is {now} and not {present}, so it stays")
        present = now

        def decide(models: ledger.Models) -> dict[str, Any]:
            before = ledger.version_before(models, model, alias)
            # Two who see the same bad version and go back at once mean one step, not two.
            if models[model].present(alias) != present:
                raise RegistryError(
                    f"somebody else has just moved {model}@{alias} from {present} to "
                    f"{models[model].present(alias)}: look whether it is to be moved again"
                )
            return {
                "action": "rollback",
                "model": model,
                "version": before.number,
                "alias": alias,
                "before": present,
            }

        entry = self._commit(decide, note)
        assert entry is not None
        return entry

    def remove(self, model: str, version: int, note: str = "") -> Entry:
        """Removes a version to which no alias points, and its files. Its number stays used.

        Returns:
          What was added to the log.
        """
        path = ""

        def decide(models: ledger.Models) -> dict[str, Any]:
            nonlocal path
            path = ledger.removal(models, model, version).bundle.path
            return {"action": "remove", "model": model, "version": version}

        entry = self._commit(decide, note)
        assert entry is not None
        self._delete(path)
        self._sweep()
        return entry

    def remove_alias(self, model: str, alias: str, note: str = "") -> Entry:
        """Removes an alias with its history; the versions stay.

        Returns:
          What was added to the log.
        """

        def decide(models: ledger.Models) -> dict[str, Any]:
            present = ledger.resolve(models, model, alias).number
            return {"action": "remove", "model": model, "alias": alias, "before": present}

        entry = self._commit(decide, note)
        assert entry is not None
        return entry

    def with_digest(self, model: str, digest: str) -> Version | None:
        """The version of a model that is this bundle, if there is one; reads what is new."""
        with contextlib.suppress(NoRegistryError):
            self.refresh()
        return ledger.with_digest(self._models, model, digest)

    def verify(self, version: Version) -> None:
        """Reads all of a version's files.

        Raises:
          BundleError: They are damaged.
          RegistryError: It was removed in the meantime.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="cnn_jax-") as directory:
                self.fetch(version, directory)
        except BundleError:
            self.refresh()
            self.resolve(version.model, version.number)
            raise

    def fetch(
        self, version: Version, directory: str | os.PathLike[str], is_copy: bool = False
    ) -> pathlib.Path:
        """A version's bundle on this machine, verified.

        Args:
          version: One of this registry's.
          directory: Where to download it to, into a folder that is named by its digest, if the
            registry is elsewhere. What is there already is not downloaded again.
          is_copy: Whether to do so as well where the registry is on this machine.

        Returns:
          The bundle's folder, which is not to be changed unless it is a copy: it may be the
          registry's own.

        Raises:
          BundleError: It is damaged, or was removed in the meantime.
          StoreError: It cannot be read, or not be put into the directory.
        """
        facts = version.bundle
        own = self._store.local(facts.path)
        if own is not None and not is_copy:
            _verify(own, facts.digest)
            return own
        target = pathlib.Path(directory) / facts.digest
        with contextlib.suppress(BundleError):
            _verify(target, facts.digest)
            return target
        aside = target.with_name(f".{unique()}")
        try:
            aside.mkdir(parents=True)
            for name in _FILES:
                self._store.download(f"{facts.path}/{name}", aside / name)
            _verify(aside, facts.digest, f"{self.url}/{facts.path}")
            _put(aside, target)
        except FileNotFoundError as error:
            raise BundleError(f"{version} is not in {self.url} any more: {error}") from error
        except OSError as error:
            raise StoreError(f"{directory}: {version} cannot be put there: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return target

    def _begin(self) -> bool:
        """Makes a registry where there is none, and returns whether it has."""
        with self._lock:
            if self._identity is not None:
                return False
            # In this order: somebody else may be making them at this moment.
            log = [*self._store.names(_LOG), *self._marks()]
            with contextlib.suppress(FileNotFoundError):
                self._store.read(_IDENTITY)
                return False
            if log:
                raise RegistryError(f"{self.url} is damaged: it has a log and no {_IDENTITY}")
            prove(self._store)
            identity = {"format": ledger.FORMAT, "id": uuid.uuid4().hex}
            # Of several who begin at once, one makes it.
            with contextlib.suppress(FileExistsError):
                self._store.create(_IDENTITY, json.dumps(identity).encode())
                return True
            return False

    def _prove_once(self) -> None:
        """Sees before a first change that this process, too, cannot make a file that is there.

        Another version of the same library may let it. Then the file is as it was.
        """
        if self._is_proven:
            return
        assert self._identity is not None
        with contextlib.suppress(FileExistsError):
            self._store.create(_IDENTITY, self._identity)
            raise RegistryError(
                f"{self.url} lets this process overwrite what is there: use the version of "
                "fsspec's library for it that has made the registry, or a later one"
            )
        self._is_proven = True

    def _commit(self, decide: Decide, note: str) -> Entry | None:
        """Makes a change, once.

        Args:
          decide: What to add to the log. Called anew when somebody else was first.
          note: For the log.

        Returns:
          The entry, or None if there was nothing to do.

        Raises:
          AwayError: The store does not answer; if it was asked for the change, that may have
            happened. After any other error it has not.
        """
        change, failures, is_asked, in_doubt = uuid.uuid4().hex, 0, False, False
        problem = "it shows no file that it has said is there"
        # Who goes on with the log of a registry that is another by now would damage that one.
        self._looked = -math.inf
        while failures < _MOST_FAILURES:
            if failures > 1:
                time.sleep(random.uniform(0.5, 1) * _PAUSE * 2**failures)
            try:
                with self._lock:
                    # News may be this very change, made by a call whose answer was lost.
                    failures = 0 if self.refresh() else failures
                    if (own := self._made(change)) is not None:
                        return own
                    fields = decide(self._models)
                    if fields is None:
                        return None
                    self._prove_once()
                    is_asked = True
                    self._create(change, note, fields)
            except FileExistsError:
                pass
            except StoreError as error:
                in_doubt = in_doubt or (is_asked and isinstance(error, AwayError))
                if not in_doubt:
                    raise
                problem = str(error)
            failures += 1
        raise AwayError(
            f"{self.url} does not say whether the change was made ({problem}): look with `show` "
            "before you make it again"
        )

    def _made(self, change: str) -> Entry | None:
        return next((entry for entry in reversed(self._entries) if entry.id == change), None)

    def _create(self, change: str, note: str, fields: Mapping[str, Any]) -> None:
        user, host = _who()
        entry = Entry(
            number=len(self._entries) + 1,
            previous=self._last_digest,
            id=change,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            user=user,
            host=host,
            note=note,
            **fields,
        )
        self._store.create(_log_name(entry.number), ledger.serialise(entry))

    def _delete(self, path: str) -> None:
        """Removes a version's files; if that fails, a later sweep does it."""
        try:
            self._store.remove(path)
        except StoreError as error:
            logger.warning("not removed, a later add or remove will try again: %s", error)

    def _sweep(self) -> None:
        """Removes what is of no version and a day old: somebody was killed who wrote it.

        What is marked as added is left where it is if the log does not know of it: then the log
        is not whole.
        """
        try:
            # Listed before the log is read, which then has all that was added until then.
            found = [
                f"{folder}/{name}"
                for folder in (_BUNDLES, ASIDE)
                for name in self._store.names(folder)
            ]
            marks = {*self._marks()}
            self.refresh()
        except StoreError as error:
            logger.warning("what is left over was not looked for: %s", error)
            return
        for entry in self._entries:
            if entry.bundle and _mark_name(entry) not in marks:
                self._mark(entry)
        used = {v.bundle.path for model in self._models.values() for v in model.versions.values()}
        added = {entry.bundle.path for entry in self._entries if entry.bundle}
        used |= {f"{_BUNDLES}/{mark[9:]}" for mark in marks} - added
        now = datetime.datetime.now(datetime.UTC)
        for path in found:
            made = made_at(path.rpartition("/")[2])
            if path not in used and made is not None and now - made > _STALE:
                self._delete(path)


def _is_of_log(name: str) -> bool:
    return re.fullmatch(r"\d{8}\.json", name) is not None


def _is_mark(name: str) -> bool:
    return re.fullmatch(r"\d{8}-[0-9a-f]{64}-\d{8}T\d{6}Z-[0-9a-f]{16}", name) is not None


def _mark_name(entry: Entry) -> str:
    """What an addition is marked by: its entry's number and the name of its bundle's folder."""
    assert entry.bundle is not None
    return f"{entry.number:08d}-{entry.bundle.path.removeprefix(f'{_BUNDLES}/')}"


def _log_name(number: int) -> str:
    return f"{_LOG}/{number:08d}.json"


def _who() -> tuple[str, str]:
    """The names of this user and this machine, as far as they can be had."""
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # No such user id, and no variable that names it.
        user = "unknown"
    try:
        host = socket.gethostname()
    except OSError:
        host = ""
    return user, host or "unknown"


def _read(path: pathlib.Path, wanted: str) -> tuple[BundleFacts, dict[str, bytes]]:
    """What the log is to know of a bundle, and the contents of its files.

    Args:
      path: The bundle's folder.
      wanted: Its digest.

    Raises:
      BundleError: It is no bundle, a damaged one, or one that has just been replaced.
    """
    from cnn_jax.inference.bundle import read_bundle

    bundle = read_bundle(path)
    try:
        contents = {name: (path / name).read_bytes() for name in _FILES}
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if sums != {_DESCRIPTION: wanted, _WEIGHTS: _weights_digest(contents[_DESCRIPTION])}:
        raise BundleError(f"{path} has changed while it was read: give the command again")
    try:
        height, width = map(int, bundle.preprocessing.image_size)
        facts = BundleFacts(
            path=f"{_BUNDLES}/{wanted}-{unique()}",
            digest=wanted,
            size=sum(map(len, contents.values())),
            classes=len(bundle.class_names),
            image_size=(height, width),
            metrics=ledger.finite_figures(bundle.metrics),
            fingerprint=str(bundle.data.get("fingerprint", "")),
        )
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a bundle: {error!r}") from error
    return facts, contents


def _weights_digest(description: bytes) -> str:
    return json.loads(description)["files"][_WEIGHTS]["sha256"]


def _verify(folder: pathlib.Path, wanted: str, origin: str | None = None) -> None:
    """Raises BundleError if a folder is not the bundle of a digest.

    Args:
      folder: The bundle's folder.
      wanted: Its digest.
      origin: What is said to be damaged if it is not; by default the folder.
    """
    try:
        description = (folder / _DESCRIPTION).read_bytes()
        with (folder / _WEIGHTS).open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{origin or folder} is damaged: {error}") from error
    found = hashlib.sha256(description).hexdigest()
    if found != wanted or weights != _weights_digest(description):
        raise BundleError(
            f"{origin or folder} is damaged: its digest is not the one in the registry's log"
        )


def _put(aside: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a verified download to its place, where a damaged one may be, or another's."""
    try:
        aside.rename(target)
    except OSError:
        try:
            _verify(target, target.name)
        except BundleError:
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
