"""A registry of bundles in a folder, or in an object store such as S3.

    registry.json               {"format": 1, "id": ...}
    log/00000001.json, ...      one file per change, never modified; see `ledger`
    bundles/DIGEST-TIME-ID/     one folder per version, written before its log entry
    added/NUMBER-DIGEST-TIME-ID one empty file per `add`: entry number and bundle folder
    tmp/                        temporary files, also of killed processes

The log contains the whole state of the registry. The empty files in `added/`, called markers, show
whether the log has lost its last `add` entry. If so, the registry cannot be read or changed.

A change creates the next file of the log, in which only one writer can succeed. A writer that fails
reads the new entry and decides again. Therefore a change is atomic, even if processes are killed.
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

from cnn_jax.inference.bundle_files import file_sha256, listed_files
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
from cnn_jax.registry.split import Experiment, Split
from cnn_jax.registry.store import NoAnswerError, Store, StoreError, unique_name
from cnn_jax.system.errors import BundleError, UserError, printable

logger = logging.getLogger(__name__)

_IDENTITY = "registry.json"
_LOG = "log"
_BUNDLES = "bundles"
_ADDED = "added"
_DESCRIPTION = "bundle.json"
# A change fails after this many consecutive failed attempts. A new entry by another writer restarts
# the count.
_MAX_FAILURES = 6
# The base of the wait between attempts, in seconds: after n >= 2 failures, the wait is at most
# _PAUSE * 2**n.
_PAUSE = 0.1
# Minimum seconds between two checks that registry.json is unchanged.
_IDENTITY_SECONDS = 60.0

# A function that takes the current state of the registry, and returns the fields of the log entry
# to add, or None if nothing changes.
Decide = Callable[[ledger.Models], dict[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Addition:
    """The result of `Registry.add`."""

    version: Version  # The version with the bundle.
    is_new: bool  # Whether a version was added; False if the model already had the bundle.
    is_new_registry: bool = False  # Whether the call created the registry.


class Registry:
    """A registry of bundles with names, versions and aliases.

    The registry caches the log: `models` and `log` read the log at their first use. `refresh` and
    every change read new entries. Several threads may use an instance.

    Every method raises `RegistryError` if the registry is missing or damaged, or if a
    requested version does not exist, or if a requested change is refused. Every method raises
    `StoreError` if files cannot be read or written.

    Attributes:
      url: The location of the registry for messages: without passwords, and in one line.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Creates the object for a registry, without reading or writing files.

        Args:
          url: A folder, or a URL such as s3://BUCKET/PATH.

        Raises:
          ConfigError: The URL is invalid.
        """
        self._store = Store(url)
        self.url = self._store.url
        self._lock = threading.RLock()
        self._identity: bytes | None = None
        self._identity_read_at = -math.inf
        self._reset()

    def _reset(self) -> None:
        """Clears the cache of data that was read from the registry."""
        self._is_read = False
        self._is_create_checked = False
        # The largest entry number in the log, and the largest entry number of a marker file in
        # `added/`.
        self._last_listed = 0
        self._last_marked = 0
        self._entries: list[Entry] = []
        self._last_digest = ""
        self._models: dict[str, Model] = {}

    @property
    def models(self) -> Mapping[str, Model]:
        """All models by name, as of the last read of the log."""
        self._read_once()
        return self._models

    @property
    def log(self) -> list[Entry]:
        """All entries of the log, oldest first, as of the last read."""
        self._read_once()
        return list(self._entries)

    def _read_once(self) -> None:
        if not self._is_read:
            self.refresh()

    def resolve(self, model: str, selector: str | int = CHAMPION) -> Version:
        """Returns the version that a number or alias selects, as of the last read of the log."""
        return ledger.resolve(self.models, model, selector)

    def refresh(self) -> bool:
        """Reads new entries of the log; returns whether there were new entries.

        Without new entries this method requests one file, and once a minute also registry.json. If
        registry.json has changed, another registry has replaced the earlier registry, and the whole
        log is read again. Only the first call compares the log with the files in `added/`.
        """
        with self._lock:
            last_digest = self._last_digest
            self._check_identity()
            if not self._entries:
                self._read_listed()
            while self._read_next():
                pass
            missing = _log_name(len(self._entries) + 1)
            if len(self._entries) < self._last_listed:
                raise RegistryError(
                    f"{self.url} is damaged: {missing} is missing, but later entries exist"
                )
            if len(self._entries) < self._last_marked:
                raise RegistryError(
                    f"{self.url} is damaged: according to {_ADDED}/ the end of its log is "
                    f"missing, at least from {missing} to {_log_name(self._last_marked)}; restore "
                    "these files from a copy of the registry"
                )
            self._is_read = True
            return self._last_digest != last_digest

    def _check_identity(self) -> None:
        """Reads registry.json, at most once a minute; clears the cache if the file has changed."""
        now = time.monotonic()
        if now < self._identity_read_at + _IDENTITY_SECONDS:
            return
        identity = self._read_identity()
        if self._identity is not None and identity != self._identity:
            logger.warning("%s was replaced by another registry, which is read now", self.url)
            self._reset()
        self._identity, self._identity_read_at = identity, now

    def _read_identity(self) -> bytes:
        try:
            identity = self._store.read(_IDENTITY)
        except FileNotFoundError:
            if self._identity is not None:
                message = f"{self.url} no longer exists: its {_IDENTITY} was deleted"
                raise RegistryError(message) from None
            raise RegistryError(
                f"there is no registry at {self.url}; the first `registry add` creates it"
            ) from None
        try:
            is_later = json.loads(identity)["format"] > ledger.FORMAT
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise RegistryError(f"{self.url}/{_IDENTITY} does not describe a registry") from error
        if is_later:
            raise RegistryError(
                f"{self.url} has a later format than this version of cnn_jax reads: upgrade cnn_jax"
            )
        return identity

    def _read_listed(self) -> None:
        """Reads, in parallel, all entries of the log up to the first missing number.

        A missing number does not prove damage. If other processes add entries during the listing,
        the listing may contain a new entry, but not the entry before it.
        """
        # List the markers before the log. Then the log contains the entry of every listed marker,
        # and a missing entry was lost.
        self._last_marked = max((int(name[:8]) for name in self._markers()), default=0)
        numbers = {int(name[:8]) for name in self._store.names(_LOG) if _is_entry(name)}
        self._last_listed = max(numbers, default=0)
        names = [
            _log_name(number)
            for number in itertools.takewhile(numbers.__contains__, itertools.count(1))
        ]
        for name, data in zip(names, self._store.read_all(names), strict=True):
            if data is None:
                raise RegistryError(f"{self.url} is damaged: {name} is listed but cannot be read")
            self._apply(data)

    def _markers(self) -> list[str]:
        """Returns the names of the marker files in `added/`."""
        return [name for name in self._store.names(_ADDED) if _is_marker(name)]

    def _read_next(self) -> bool:
        try:
            data = self._store.read(_log_name(len(self._entries) + 1))
        except FileNotFoundError:
            return False
        self._apply(data)
        return True

    def _apply(self, data: bytes) -> None:
        """Parses the next entry and applies it to the state."""
        number = len(self._entries) + 1
        file = f"{self.url}/{_log_name(number)}"
        try:
            entry = ledger.parse(data)
            if entry.number != number:
                raise ValueError(f"its number is {entry.number}")
            if entry.previous != self._last_digest:
                raise ValueError('its field "previous" does not match the entry before it')
            models = ledger.apply(self._models, entry)
        except RegistryError as error:
            raise RegistryError(f"{file} {error}") from error
        except ValueError as error:
            raise RegistryError(f"{file} is damaged: {error}") from error
        self._models, self._last_digest = models, hashlib.sha256(data).hexdigest()
        self._entries.append(entry)

    def add(self, model: str, path: str | os.PathLike[str], note: str = "") -> Addition:
        """Adds a bundle as the next version of a model.

        The model and the registry are created if they do not exist. If the model already has the
        bundle, no version is added, but damaged files of the existing version are restored.

        Args:
          model: The model's name.
          path: The bundle's folder.
          note: A text for the log.

        Raises:
          ConfigError: The name is not allowed.
          BundleError: The folder has no bundle, or the bundle is damaged.
        """
        from cnn_jax.inference.bundle import digest

        ledger.check_name("model", model)
        bundle_digest = digest(path)
        facts, contents = _read(pathlib.Path(path), bundle_digest)
        is_new_registry = self._create_registry()
        self.refresh()
        if existing := ledger.find_digest(self._models, model, bundle_digest):
            self._restore(existing, contents)
            return Addition(existing, is_new=False)

        def decide(models: ledger.Models) -> dict[str, Any] | None:
            if ledger.find_digest(models, model, bundle_digest):
                return None
            number = models[model].last + 1 if model in models else 1
            return {"action": "add", "model": model, "version": number, "bundle": facts}

        try:
            for name, content in contents.items():
                self._store.write(f"{facts.path}/{name}", content)
            entry = self._commit(decide, note)
        except UserError as error:
            # Keep the files after NoAnswerError, because the entry may have been written.
            if not isinstance(error, NoAnswerError):
                self._delete(facts.path)
            raise
        if entry is None:  # Another process has added the bundle in the meantime.
            self._delete(facts.path)
        else:
            self._mark(entry)
        version = ledger.find_digest(self._models, model, bundle_digest)
        if version is None:
            raise RegistryError(f"another process has removed this bundle from {model} just now")
        return Addition(version, entry is not None, is_new_registry)

    def _restore(self, version: Version, contents: Mapping[str, bytes]) -> None:
        """Writes the files of a version again if the files are damaged."""
        try:
            self.verify(version)
        except BundleError as error:
            logger.warning("%s; its files are restored", error)
            for name, content in contents.items():
                self._store.write(f"{version.bundle.path}/{name}", content)

    def _mark(self, entry: Entry) -> None:
        """Creates the marker file of an `add` entry; an error is only a warning."""
        assert entry.bundle is not None
        bundle = entry.bundle.path.removeprefix(f"{_BUNDLES}/")
        try:
            self._store.write(f"{_ADDED}/{entry.number:08d}-{bundle}", b"")
        except StoreError as error:
            logger.warning("the loss of the new log entry could not be detected: %s", error)

    def promote(
        self,
        model: str,
        selector: str | int,
        alias: str = CHAMPION,
        gates: Gates = Gates(),  # noqa: B008 (immutable)
        note: str = "",
    ) -> Entry | None:
        """Points an alias to a version that meets the conditions `gates` and is not damaged.

        Args:
          model: The model's name.
          selector: The number of the version, or an alias that is resolved once, at the start.
          alias: The alias to change or create.
          gates: Conditions on the version.
          note: A text for the log.

        Returns:
          The new entry of the log; None if the alias already points to the version.

        Raises:
          ConfigError: The alias is not allowed.
          BundleError: The version's files are damaged.
        """
        ledger.check_name("alias", alias)
        self.refresh()
        number = ledger.resolve(self._models, model, selector).number

        def decide(models: ledger.Models) -> dict[str, Any] | None:
            version = ledger.resolve(models, model, number)
            passed = gates.check(models, version, alias)
            before = models[model].alias_target(alias)
            if before == version.number:
                return None
            return {
                "action": "promote",
                "model": model,
                "version": version.number,
                "alias": alias,
                "before": before,
                "gates": passed,
                "evidence": gates.evidence and dataclasses.asdict(gates.evidence),
            }

        # Check the gates before `verify`, because `verify` may have to download the bundle.
        if decide(self._models) is None:
            return None
        self.verify(self.resolve(model, number))
        return self._commit(decide, note)

    def rollback(
        self, model: str, alias: str = CHAMPION, note: str = "", current: int | None = None
    ) -> Entry:
        """Points an alias to its previous version; a second rollback goes back one more version.

        The version's files are not verified, so that a rollback is fast. If `current` is given, the
        alias must point to this version now.

        Returns:
          The new entry of the log.
        """
        self.refresh()
        number = ledger.resolve(self._models, model, alias).number
        if current is not None and number != current:
            raise RegistryError(f"no rollback: {model}@{alias} is {number}, not {current}")

        def decide(models: ledger.Models) -> dict[str, Any]:
            previous = ledger.previous_version(models, model, alias)
            # Two users who see the same bad version may roll back at the same time. Together, the
            # two rollbacks must go back by only one version.
            if models[model].alias_target(alias) != number:
                raise RegistryError(
                    f"another process has just moved {model}@{alias} from {number} to "
                    f"{models[model].alias_target(alias)}: check whether a rollback is still needed"
                )
            return {
                "action": "rollback",
                "model": model,
                "version": previous.number,
                "alias": alias,
                "before": number,
            }

        entry = self._commit(decide, note)
        assert entry is not None
        return entry

    def remove(self, model: str, version: int, note: str = "") -> Entry:
        """Removes a version and its files, if no alias points to it; returns the log entry.

        The number of the removed version is never used again.
        """
        path = ""

        def decide(models: ledger.Models) -> dict[str, Any]:
            nonlocal path
            path = ledger.removable_version(models, model, version).bundle.path
            return {"action": "remove", "model": model, "version": version}

        entry = self._commit(decide, note)
        assert entry is not None
        self._delete(path)
        return entry

    def remove_alias(self, model: str, alias: str, note: str = "") -> Entry:
        """Removes an alias and its history, but no version; returns the log entry."""

        def decide(models: ledger.Models) -> dict[str, Any]:
            number = ledger.resolve(models, model, alias).number
            return {"action": "remove", "model": model, "alias": alias, "before": number}

        entry = self._commit(decide, note)
        assert entry is not None
        return entry

    def start_experiment(
        self, model: str, challenger: str | int, split: Split, alias: str = CHAMPION, note: str = ""
    ) -> Experiment:
        """Splits the requests of an alias between its version and another version.

        The experiment cannot be changed. It ends with `end_experiment`, or if the alias moves.

        Args:
          model: The model's name.
          challenger: The number of the other version, or an alias of it.
          split: The description of the experiment.
          alias: The alias.
          note: A text for the log.

        Raises:
          RegistryError: An experiment of the model is running, the name was used before, or the
            challenger is the version of the alias.
          BundleError: The challenger's files are damaged.
        """
        ledger.check_name("experiment", split.name)
        self.refresh()
        number = ledger.resolve(self._models, model, challenger).number

        def decide(models: ledger.Models) -> dict[str, Any]:
            version = ledger.resolve(models, model, number)
            champion = ledger.resolve(models, model, alias)
            running = models[model].running_experiment
            if running is not None:
                raise RegistryError(
                    f"the experiment {running.name} of {model} has been running since "
                    f"{running.start} and cannot be changed; to end it: cnn_jax experiment end "
                    f"{model}"
                )
            if split.name in models[model].experiments:
                raise RegistryError(
                    f"{model} has had an experiment {split.name}; choose another name, because the "
                    "request log has rows with this name"
                )
            if champion.number == number:
                raise RegistryError(f"{version} is {alias}: choose another version to compare")
            return {
                "action": "split",
                "model": model,
                "version": number,
                "alias": alias,
                "before": champion.number,
                "split": dataclasses.asdict(split),
            }

        decide(self._models)
        self.verify(self.resolve(model, number))
        self._commit(decide, note)
        return self._models[model].experiments[split.name]

    def end_experiment(self, model: str, note: str = "") -> Experiment:
        """Ends the running experiment of a model; the version of the alias answers all requests.

        Raises:
          RegistryError: No experiment of the model is running.
        """
        name = ""

        def decide(models: ledger.Models) -> dict[str, Any]:
            nonlocal name
            running = ledger.find(models, model).running_experiment
            if running is None:
                raise RegistryError(f"no experiment of {model} is running")
            name = running.name
            return {"action": "unsplit", "model": model, "split": {"name": name}}

        self._commit(decide, note)
        return self._models[model].experiments[name]

    def verify(self, version: Version) -> None:
        """Reads the files of a version, and raises BundleError if their digests are wrong."""
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
        """Returns a local folder with a version's verified bundle; a remote bundle is downloaded.

        Args:
          version: A version of this registry.
          directory: The directory for downloads. A bundle is downloaded into a folder that is named
            after the digest, unless this folder already has the bundle.
          is_copy: Whether to copy the bundle even if the registry is local. Otherwise the returned
            folder may belong to the registry, and must not be modified.

        Raises:
          BundleError: The bundle is damaged, or was removed in the meantime.
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
        partial = target.with_name(f".{unique_name()}")
        try:
            partial.mkdir(parents=True)
            description = self._store.read(f"{facts.path}/{_DESCRIPTION}")
            (partial / _DESCRIPTION).write_bytes(description)
            is_changed = hashlib.sha256(description).hexdigest() != facts.digest
            for name in () if is_changed else _listed_files(description):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(self._store.read(f"{facts.path}/{name}"))
            _verify(partial, facts.digest, f"{self.url}/{facts.path}")
            _install(partial, target)
        except FileNotFoundError as error:
            raise BundleError(f"{version} is no longer in {self.url}: {error}") from error
        except OSError as error:
            raise StoreError(
                f"{printable(str(directory))}: cannot write {version} there: {error}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _create_registry(self) -> bool:
        """Creates the registry if it does not exist; returns whether this call created it."""
        with self._lock:
            if self._identity is not None:
                return False
            # List the log before reading registry.json, because another process may be creating the
            # registry at the same time.
            log = [*self._store.names(_LOG), *self._markers()]
            with contextlib.suppress(FileNotFoundError):
                self._store.read(_IDENTITY)
                return False
            if log:
                raise RegistryError(f"{self.url} is damaged: it has a log but no {_IDENTITY}")
            identity = {"format": ledger.FORMAT, "id": uuid.uuid4().hex}
            # If another process creates the registry at the same time, only one process succeeds.
            with contextlib.suppress(FileExistsError):
                self._store.create(_IDENTITY, json.dumps(identity).encode())
                return True
            return False

    def _check_create(self) -> None:
        """Checks, before the first change, that the store refuses to overwrite an existing file.

        Some servers with the interface of S3 ignore the condition and overwrite the file. The check
        writes the content that the file already has, so that no data is lost.
        """
        if self._is_create_checked:
            return
        assert self._identity is not None
        with contextlib.suppress(FileExistsError):
            self._store.create(_IDENTITY, self._identity)
            raise RegistryError(
                f"{self.url} lets two writers create the same file, so it cannot contain a "
                "registry: use a folder, or a store that supports the header If-None-Match"
            )
        self._is_create_checked = True

    def _commit(self, decide: Decide, note: str) -> Entry | None:
        """Appends an entry to the log exactly once, even if answers of the store are lost.

        Args:
          decide: Returns the fields of the entry. It is called again after another writer has added
            an entry.
          note: A text for the log.

        Returns:
          The entry, or None if `decide` returned None.

        Raises:
          NoAnswerError: The entry may have been written, because the store gave no clear answer,
            or because the log cannot be read since the entry was sent.
          UserError: The entry has not been written.
        """
        entry_id, failures, problem = uuid.uuid4().hex, 0, ""
        # The number under which an attempt may have written the entry. The outcome is unclear until
        # the entry with this number has been read.
        sent_number = 0
        # Read registry.json again. If another registry has replaced this registry, the entry would
        # damage the log of the other registry.
        self._identity_read_at = -math.inf
        while failures < _MAX_FAILURES:
            if failures > 1:
                time.sleep(random.uniform(0.5, 1) * _PAUSE * 2**failures)
            try:
                with self._lock:
                    # If an earlier attempt succeeded, but the store's response was lost, the log
                    # already contains the entry.
                    failures = 0 if self.refresh() else failures
                    if (written := self._find_entry(entry_id)) is not None:
                        return written
                    fields = decide(self._models)
                    if fields is None:
                        return None
                    self._check_last_entry()
                    self._check_create()
                    number = len(self._entries) + 1
                    try:
                        self._create_entry(entry_id, note, fields)
                    except (FileExistsError, NoAnswerError):
                        # A retry inside obstore raises FileExistsError if the first request has
                        # written the entry.
                        sent_number = number
                        raise
            except FileExistsError:
                name = _log_name(sent_number)
                problem = f"{name} exists according to the store, but the store cannot find it"
            except UserError as error:
                is_unclear = len(self._entries) < sent_number
                if (written := self._find_entry(entry_id)) is not None:
                    return written
                if not is_unclear:
                    raise
                problem = str(error)
                if not isinstance(error, StoreError):  # The next attempt would fail as well.
                    break
            failures += 1
        raise NoAnswerError(
            f"{self.url} does not report whether the change was made ({problem}): check with "
            "`registry show` before you repeat it"
        )

    def _check_last_entry(self) -> None:
        """Checks that the last entry that this process has read is still in the log, unchanged.

        Otherwise the new entry would follow an entry that no other process can read.
        """
        if not self._entries:
            return
        name = _log_name(len(self._entries))
        try:
            data = self._store.read(name)
        except FileNotFoundError:
            raise RegistryError(
                f"{self.url} is damaged: {name}, which this process has read before, is missing; "
                "restore this file from a copy of the registry"
            ) from None
        if hashlib.sha256(data).hexdigest() != self._last_digest:
            raise RegistryError(
                f"{self.url} is damaged: {name} has changed since this process read it before"
            )

    def _find_entry(self, entry_id: str) -> Entry | None:
        return next((entry for entry in reversed(self._entries) if entry.id == entry_id), None)

    def _create_entry(self, entry_id: str, note: str, fields: Mapping[str, Any]) -> None:
        user, host = _author()
        entry = Entry(
            number=len(self._entries) + 1,
            previous=self._last_digest,
            id=entry_id,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            user=user,
            host=host,
            note=note,
            **fields,
        )
        self._store.create(_log_name(entry.number), ledger.serialise(entry))

    def _delete(self, path: str) -> None:
        """Deletes a bundle's folder; an error is only a warning, because the log is correct."""
        try:
            self._store.remove(path)
        except StoreError as error:
            logger.warning("not deleted: %s", error)

    def unused_bundles(self) -> list[str]:
        """Returns the folders of bundles that belong to no version, relative to the registry.

        A killed `add` or `remove` leaves such a folder. A running `add` has one for a short time.
        """
        # List the folders before the log is read. Otherwise, the folder of a version that is added
        # in between would not be in the log.
        paths = [f"{_BUNDLES}/{name}" for name in self._store.names(_BUNDLES)]
        self.refresh()
        versions = [one for model in self._models.values() for one in model.versions.values()]
        return sorted({*paths} - {version.bundle.path for version in versions})


def _is_entry(name: str) -> bool:
    return re.fullmatch(r"\d{8}\.json", name) is not None


def _is_marker(name: str) -> bool:
    return re.fullmatch(r"\d{8}-[0-9a-f]{64}-\d{8}T\d{6}Z-[0-9a-f]{16}", name) is not None


def _log_name(number: int) -> str:
    return f"{_LOG}/{number:08d}.json"


def _author() -> tuple[str, str]:
    """Returns the names of the current user and machine, or "unknown" for a missing name."""
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # The user id has no name, and $USER is not set.
        user = "unknown"
    try:
        host = socket.gethostname()
    except OSError:
        host = ""
    return user, host or "unknown"


def _read(path: pathlib.Path, digest: str) -> tuple[BundleFacts, dict[str, bytes]]:
    """Reads a bundle; returns the metadata for the log, and the contents of all files by name.

    Raises:
      BundleError: The folder has no bundle, a damaged bundle, or a bundle with another digest.
    """
    from cnn_jax.inference.bundle import read_description, read_networks

    bundle = read_description(path)
    if "export" not in bundle:
        read_networks(path)  # Also checks that this version of cnn_jax knows the networks.
    try:
        names = (_DESCRIPTION, *bundle["files"])
        contents = {name: (path / name).read_bytes() for name in names}
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if sums != {_DESCRIPTION: digest, **_listed_files(contents[_DESCRIPTION])}:
        raise BundleError(f"{path} changed while it was read: run the command again")
    try:
        height, width = map(int, bundle["preprocessing"]["image_size"])
        facts = BundleFacts(
            path=f"{_BUNDLES}/{digest}-{unique_name()}",
            digest=digest,
            size=sum(map(len, contents.values())),
            classes=len(bundle["class_names"]),
            image_size=(height, width),
            metrics=ledger.finite_metrics(bundle["metrics"]),
            fingerprint=str(bundle["data"].get("fingerprint", "")),
        )
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a bundle: {error!r}") from error
    return facts, contents


def _listed_files(description: bytes) -> dict[str, str]:
    """Returns the sha256 of each file that a bundle.json lists, by name."""
    try:
        return listed_files(json.loads(description))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"a {_DESCRIPTION} is damaged: {error!r}") from error


def _verify(folder: pathlib.Path, digest: str, origin: str | None = None) -> None:
    """Raises BundleError if the files of a bundle do not have the expected digest.

    An error message names the location `origin`, by default the folder.
    """
    origin = origin or printable(str(folder))
    try:
        is_changed = file_sha256(folder / _DESCRIPTION) != digest
        files = {} if is_changed else _listed_files((folder / _DESCRIPTION).read_bytes())
        is_changed |= any(file_sha256(folder / name) != files[name] for name in files)
    except OSError as error:
        raise BundleError(f"{origin} is damaged: {error}") from error
    if is_changed:
        raise BundleError(
            f"{origin} is damaged: its digest differs from that in the registry's log"
        )


def _install(partial: pathlib.Path, target: pathlib.Path) -> None:
    """Moves a verified download to the target folder, unless this folder has an undamaged copy."""
    try:
        partial.rename(target)
    except OSError:
        try:
            _verify(target, target.name)
        except BundleError:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
