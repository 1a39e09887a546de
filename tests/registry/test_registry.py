import copy
import datetime
import getpass
import json
import os
import pathlib
import shutil
import socket
import threading
import time
import types

import pytest
from bundles import make_bundle
from registry_log import append_unknown_entry
from registry_tools import (
    Killed,
    Wrapped,
    aliases,
    dying_at,
    figures,
    on,
    outline,
    vary,
    wrapped,
)
from test_registry_ledger import make_evidence

from cnn_jax.inference.bundle import digest, read_bundle, write_bundle
from cnn_jax.registry import ledger
from cnn_jax.registry import registry as registries
from cnn_jax.registry.ledger import Gates, RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.store import NoAnswerError, Store, StoreError
from cnn_jax.system.errors import BundleError, ConfigError

pytest_plugins = ["registry_fixtures"]


@pytest.fixture(scope="module")
def bundles(bundle, tmp_path_factory):
    """Five bundles with the accuracies 0.5, 0.6, 0.7, 0.8 and 0.9."""
    folder = tmp_path_factory.mktemp("five")
    return [
        vary(bundle, folder / str(i), temperature=1.0 + i, metrics=figures(0.5 + i / 10, f1=0.4))
        for i in range(5)
    ]


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """Disables fsync, which is slow on a busy disk and only protects against power failures."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def prepared(bundles, tmp_path_factory):
    registry = Registry(tmp_path_factory.mktemp("prepared") / "registry")
    for path in bundles[:3]:
        registry.add("flowers", path)
    for version, alias in ((1, "champion"), (2, "champion"), (3, "mine")):
        registry.promote("flowers", version, alias)
    return pathlib.Path(registry.url)


@pytest.fixture
def registry(prepared, tmp_path):
    """A registry with three versions. Alias champion has moved from 1 to 2; alias mine is at 3."""
    registry = Registry(shutil.copytree(prepared, tmp_path / "registry"))
    registry.refresh()
    return registry


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(registries, "_PAUSE", 0.001)


def files(registry):
    """Returns the paths of all files of a registry that is stored in a local folder."""
    root = pathlib.Path(registry.url)
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_fetch_returns_an_added_bundle(place, bundles, tmp_path):
    registry = Registry(place)
    for i, path in enumerate(bundles[:2], 1):
        added = registry.add("flowers", path, f"note {i}")
        assert added.is_new
        assert added.version.number == i
        assert added.version.bundle.digest == digest(path)
    reader = Registry(place)
    assert outline(reader) == outline(registry)
    for i, path in enumerate(bundles[:2], 1):
        version = reader.resolve("flowers", i)
        folder = reader.fetch(version, tmp_path / "downloads")
        assert {file.name for file in folder.iterdir()} == {"bundle.json", "weights.safetensors"}
        for file in path.iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes()
        assert version.note == f"note {i}"
        assert version.bundle.test_metric("accuracy") == pytest.approx(0.4 + i / 10)
        assert version.bundle.size == sum(file.stat().st_size for file in path.iterdir())
        assert (version.bundle.classes, version.bundle.image_size) == (3, (16, 16))
        assert read_bundle(folder).temperature == i


def test_all_changes_work_on_all_stores(place, bundles):
    registry = Registry(place)
    for path in bundles[:3]:
        registry.add("flowers", path)
    registry.promote("flowers", 1)
    entry = registry.promote("flowers", 3, note="better")
    assert (entry.version, entry.before, entry.note) == (3, 1, "better")
    assert registry.promote("flowers", 3) is None
    registry.promote("flowers", "champion", "mine")
    entry = registry.rollback("flowers")
    assert (entry.version, entry.before) == (1, 3)
    registry.remove("flowers", 2)
    registry.remove_alias("flowers", "mine")
    registry.remove("flowers", 3)
    added = registry.add("flowers", bundles[1])
    assert added.version.number == 4
    expected = {"flowers": ({1: digest(bundles[0]), 4: digest(bundles[1])}, {"champion": (1,)}, 4)}
    for one in (registry, Registry(place)):
        assert outline(one) == expected
        assert [entry.action for entry in one.log] == [
            *("add", "add", "add", "promote", "promote", "promote"),
            *("rollback", "remove", "remove", "remove", "add"),
        ]
    store = Store(place)
    assert store.names("bundles") == sorted(
        version.bundle.path.removeprefix("bundles/")
        for version in registry.models["flowers"].versions.values()
    )
    assert store.names("tmp") == []


def test_the_log_has_user_change_and_time(registry, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "ann")
    monkeypatch.setattr(socket, "gethostname", lambda: "desk")
    before = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    entry = registry.promote("flowers", 1, "mine", Gates(min_accuracy=0.5), "猫 \udcff")
    assert (entry.user, entry.host, entry.note) == ("ann", "desk", "猫 \udcff")
    assert entry.gates == ("min_accuracy=0.5: test accuracy is 0.5",)
    time = datetime.datetime.fromisoformat(entry.time)
    assert before <= time <= datetime.datetime.now(datetime.UTC)
    assert time.utcoffset() == datetime.timedelta(0)
    assert Registry(registry.url).log[-1] == entry


@pytest.mark.parametrize("error", [KeyError("uid"), OSError("no user"), ImportError("pwd")])
def test_an_unknown_user_is_named_unknown(registry, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(getpass, "getuser", fail)
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    entry = registry.promote("flowers", 1, "mine")
    assert (entry.user, entry.host) == ("unknown", "unknown")


def test_the_same_bundle_is_added_once(registry, bundles):
    before = files(registry)
    added = registry.add("flowers", bundles[1])
    assert (added.version.number, added.is_new) == (2, False)
    assert files(registry) == before
    other = registry.add("birds", bundles[1])
    assert (other.version.number, other.is_new) == (1, True)
    assert other.version.bundle.path != added.version.bundle.path
    registry.remove("birds", 1)
    registry.fetch(registry.resolve("flowers", 2), "unused")
    again = registry.add("birds", bundles[1])
    assert (again.version.number, again.is_new) == (2, True)


def test_refresh_reads_only_new_entries(registry, bundles):
    store = wrapped(pathlib.Path(registry.url))
    reader = on(store)
    assert reader.refresh()
    store.calls.clear()
    assert not reader.refresh()
    assert store.calls == [("read", "log/00000007.json")]
    registry.rollback("flowers")
    assert aliases(reader)["champion"] == 2
    assert reader.refresh()
    assert aliases(reader)["champion"] == 1
    assert not reader.refresh()


def test_a_long_log_is_read_in_parallel(tmp_path, bundles):
    registry = Registry(tmp_path)
    for path in bundles[:2]:
        registry.add("flowers", path)
    for i in range(100):
        registry.promote("flowers", 1 + i % 2)
    store = wrapped(tmp_path)
    reader = on(store)
    assert outline(reader) == outline(registry)
    assert len(reader.models["flowers"].aliases["champion"]) == 100
    assert store.calls.count(("names", "log")) == 1
    assert sum(call == "read" for call, _ in store.calls) == 1 + 102 + 1


def test_failed_gates_refuse_a_promotion(registry):
    before = files(registry)
    with pytest.raises(RegistryError, match=r"min_accuracy=0.65: test accuracy is 0.6$"):
        registry.promote("flowers", 2, "mine", Gates(min_accuracy=0.65))
    with pytest.raises(RegistryError, match=r"f1 is 0.4$"):
        registry.promote("flowers", 3, "champion", Gates(min_accuracy=0.65, min_f1=0.5))
    assert files(registry) == before
    assert registry.promote("flowers", 3, gates=Gates(min_accuracy=0.65))
    assert aliases(registry) == {"champion": 3, "mine": 3}


def test_repeated_rollbacks_go_further_back(registry):
    registry.promote("flowers", 3)
    assert registry.rollback("flowers").version == 2
    assert registry.rollback("flowers").version == 1
    with pytest.raises(RegistryError, match="and has no previous version"):
        registry.rollback("flowers")
    registry.promote("flowers", 3)
    assert registry.rollback("flowers").version == 1
    with pytest.raises(RegistryError, match="no alias chamption; did you mean champion"):
        registry.rollback("flowers", "chamption")


def test_remove_deletes_files_and_keeps_the_number_used(registry, bundles):
    path = registry.resolve("flowers", 1).bundle.path
    with pytest.raises(RegistryError, match="flowers/2 is not removed, because it is champion"):
        registry.remove("flowers", 2)
    registry.remove("flowers", 1)
    assert not (pathlib.Path(registry.url) / path).exists()
    assert registry.models["flowers"].aliases["champion"] == (2,)
    with pytest.raises(RegistryError, match=r"has no version 1 \(it was removed\)"):
        registry.remove("flowers", 1)
    assert registry.add("flowers", bundles[0]).version.number == 4


def test_hostile_names_access_no_file(tmp_path, bundles):
    registry = Registry(tmp_path / "registry")
    for name in ("../x", "a/b", ""):
        with pytest.raises(ConfigError, match=r"^model: must be"):
            registry.add(name, bundles[0])
    assert not (tmp_path / "registry").exists()
    registry.add("flowers", bundles[0])
    for alias in ("../x", "7"):
        with pytest.raises(ConfigError, match=r"^alias: must"):
            registry.promote("flowers", 1, alias)
    for call in (registry.rollback, lambda name: registry.remove(name, 1)):
        with pytest.raises(RegistryError, match=r"^there is no model \.\./x"):
            call("../x")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: shutil.rmtree(path),
        lambda path: (path / "weights.safetensors").write_bytes(b"x"),
        lambda path: (path / "bundle.json").write_text("{}"),
        lambda path: (path / "weights.safetensors").unlink(),
    ],
)
def test_a_folder_without_a_bundle_is_not_added(tmp_path, bundles, damage):
    shutil.copytree(bundles[0], tmp_path / "bundle")
    damage(tmp_path / "bundle")
    with pytest.raises(BundleError, match=rf"^{tmp_path}/bundle"):
        Registry(tmp_path / "registry").add("flowers", tmp_path / "bundle")
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": 3},
        {"data": []},
        {"preprocessing": {"image_size": ["a", "b"]}},
        {"preprocessing": {"image_size": [float("inf"), 16]}},
    ],
)
def test_a_bundle_with_invalid_metadata_is_not_added(tmp_path, bundles, changes):
    if "preprocessing" in changes:
        description = json.loads((bundles[0] / "bundle.json").read_text())
        changes = {"preprocessing": description["preprocessing"] | changes["preprocessing"]}
    path = vary(bundles[0], tmp_path / "bundle", **changes)
    with pytest.raises(BundleError, match=rf"^{path} is not a bundle"):
        Registry(tmp_path / "registry").add("flowers", path)
    assert not (tmp_path / "registry").exists()


def test_a_bundle_without_metrics_passes_no_gate(tmp_path, bundles):
    path = vary(bundles[0], tmp_path / "bundle", metrics={"test": None})
    registry = Registry(tmp_path / "registry")
    assert registry.add("flowers", path).version.bundle.metrics == {}
    with pytest.raises(RegistryError, match="test f1 is not in the bundle"):
        registry.promote("flowers", 1, gates=Gates(min_f1=0.0))


@pytest.mark.parametrize("file", ["bundle.json", "weights.safetensors"])
def test_a_bundle_replaced_during_reading_is_not_added(tmp_path, bundles, monkeypatch, file):
    path = tmp_path / "bundle"
    shutil.copytree(bundles[0], path)
    other = tmp_path / "other"
    write_bundle(make_bundle(seed=5), other)
    read = pathlib.Path.read_bytes

    def read_bytes(one):
        return read(other / file if one == path / file else one)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    with pytest.raises(BundleError, match="changed while it was read"):
        Registry(tmp_path / "registry").add("flowers", path)


def test_the_first_add_creates_the_registry(tmp_path, bundles):
    registry = Registry(tmp_path / "registry")
    for call in (
        registry.refresh,
        lambda: registry.models,
        lambda: registry.log,
        lambda: registry.promote("flowers", 1),
        lambda: registry.rollback("flowers"),
        lambda: registry.remove("flowers", 1),
    ):
        with pytest.raises(
            RegistryError, match=rf"^there is no registry at {registry.url}; the fi"
        ):
            call()
    assert not (tmp_path / "registry").exists()
    registry.add("flowers", bundles[0])
    assert registry.resolve("flowers", 1).number == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not describe a registry"),
        ("[]", "does not describe a registry"),
        ('{"format": "x"}', "does not describe a registry"),
        ('{"id": 1}', "does not describe a registry"),
        ('{"format": 2}', "has a later format"),
    ],
)
def test_an_invalid_registry_json_is_reported(tmp_path, bundles, text, message):
    (tmp_path / "registry.json").write_text(text)
    for call in (
        lambda registry: registry.refresh(),
        lambda registry: registry.add("flowers", bundles[0]),
    ):
        with pytest.raises(RegistryError, match=message):
            call(Registry(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["registry.json"]


def test_a_log_without_registry_json_is_not_changed(registry, bundles):
    (pathlib.Path(registry.url) / "registry.json").unlink()
    before = files(registry)
    with pytest.raises(RegistryError, match=r"is damaged: it has a log but no registry\.json"):
        Registry(registry.url).add("flowers", bundles[3])
    assert files(registry) == before


def _replace(old, new):
    def damage(path):
        path.chmod(0o644)
        data = path.read_bytes()
        assert old in data
        path.write_bytes(data.replace(old, new))

    return damage


def _rewrite(**changes):
    """Returns a function that changes fields of a log entry and updates the entry's sha256."""

    def damage(path):
        path.chmod(0o644)
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(fields | {"sha256": ledger.fields_digest(fields)}))

    return damage


@pytest.mark.parametrize(
    ("number", "damage", "message"),
    [
        (3, pathlib.Path.unlink, "/registry is damaged: log/00000006.json is missing"),
        (1, pathlib.Path.unlink, "/registry is damaged: log/00000006.json is missing"),
        (3, _replace(b"{", b""), "/log/00000003.json is damaged: "),
        (6, _replace(b"}", b""), "/log/00000006.json is damaged: "),
        (3, _replace(b'"number": 3', b'"number": 4'), "/00000003.json is damaged: its sha256"),
        (5, _replace(b'"version": 2', b'"version": 3'), "/00000005.json is damaged: its sha256"),
        (6, _replace(b'"version": 3', b'"version": 1'), "/00000006.json is damaged: its sha256"),
        (1, _replace(b"16,", b"Infinity,"), "/00000001.json is damaged: its sha256"),
        (3, _rewrite(number=4), "/00000003.json is damaged: its number is 4"),
        (5, _rewrite(version=3), "/00000006.json is damaged: its field .previous."),
        (6, _rewrite(version=9), "/00000006.json is damaged: there is no ver"),
        (4, _rewrite(action="prosper"), "/00000004.json has the action prosper, which"),
        (6, _replace(b'"format": 1', b'"format": 2'), "/00000006.json has format 2, but this"),
    ],
)
def test_a_damaged_log_is_one_clear_error(registry, bundles, number, damage, message):
    path = pathlib.Path(registry.url) / "log" / f"{number:08d}.json"
    damage(path)
    if damage is pathlib.Path.unlink:
        message = message.replace("6", str(number))
    before = files(registry)
    for call in (
        lambda one: one.refresh(),
        lambda one: one.models,
        lambda one: one.rollback("flowers"),
        lambda one: one.add("flowers", bundles[4]),
    ):
        damaged = Registry(registry.url)
        # After an error, a second call on the same registry must raise the same error.
        for _ in range(2):
            with pytest.raises(RegistryError, match=message) as raised:
                call(damaged)
            assert "\n" not in str(raised.value)
    assert files(registry) == before


def test_a_skippable_entry_of_a_later_version_is_skipped(registry, bundles):
    """The registry stays readable and writable, and the later entry stays in the log."""
    before = outline(registry)
    # The fields have known names, but values that this version could not parse.
    append_unknown_entry(registry, version="all", alias=["champion"], bundle=3)
    assert registry.refresh()
    assert outline(registry) == before == outline(Registry(registry.url))
    assert registry.log[-1].action == "quarantine"
    registry.promote("flowers", 1, "mine")
    assert aliases(Registry(registry.url)) == {"champion": 2, "mine": 1}


def test_only_a_lost_add_at_the_end_is_detected(registry):
    """The last log entry, a promotion, is lost; only processes that had read it detect the loss.

    Only an `add` entry has a marker in `added/`, so a new reader cannot detect the loss.
    """
    (pathlib.Path(registry.url) / "log" / "00000006.json").unlink()
    other = Registry(registry.url)
    assert aliases(other) == {"champion": 2}
    other.promote("flowers", 1, "mine")
    other.promote("flowers", 1, "yours")
    with pytest.raises(RegistryError, match=r'7\.json is damaged: its field "previous" does not'):
        registry.refresh()


def _promote_and_lose_the_last_entry(place, bundles):
    """Returns a registry that has read entry 4 of its log; the entry is then deleted."""
    registry = Registry(place)
    for path in bundles[:2]:
        registry.add("flowers", path)
    registry.promote("flowers", 1)
    registry.promote("flowers", 2)
    registry._store.remove("log/00000004.json")
    return registry


@pytest.mark.parametrize("action", ["add", "promote", "remove"])
def test_no_change_follows_a_lost_last_entry(place, bundles, action):
    registry = _promote_and_lose_the_last_entry(place, bundles)
    for _ in range(2):
        with pytest.raises(
            RegistryError, match=r" is damaged: log/00000004\.json, which this .* is mi"
        ):
            CHANGES[action](registry, bundles)
    assert len(Store(place).names("bundles")) == 2
    reader = Registry(place)
    assert aliases(reader) == {"champion": 1}
    assert reader.promote("flowers", 2).number == 4


def test_no_change_follows_a_replaced_last_entry(place, bundles):
    registry = _promote_and_lose_the_last_entry(place, bundles)
    Registry(place).promote("flowers", 2, "mine")
    with pytest.raises(RegistryError, match=r" is damaged: log/00000004\.json has changed since"):
        registry.promote("flowers", 1, "yours")
    assert aliases(Registry(place)) == {"champion": 1, "mine": 2}


def marks(store):
    """Returns a dict from entry number to bundle folder, read from the markers in `added/`."""
    return {int(name[:8]): f"bundles/{name[9:]}" for name in store.names("added")}


def test_each_add_has_a_marker(place, bundles):
    registry = Registry(place)
    for path in bundles[:2]:
        registry.add("flowers", path)
        registry.promote("flowers", "champion" if registry.models["flowers"].aliases else 1)
    registry.add("birds", bundles[0])
    registry.remove("birds", 1)
    adds = [entry for entry in registry.log if entry.action == "add"]
    assert [entry.number for entry in adds] == [1, 3, 4]
    assert marks(Store(place)) == {entry.number: entry.bundle.path for entry in adds}


@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_truncated_log_refuses_changes(registry, bundles, first):
    root = pathlib.Path(registry.url)
    for number in range(first, 7):
        (root / "log" / f"{number:08d}.json").unlink()
    before = files(registry)
    damaged = Registry(root)
    for call in (
        damaged.refresh,
        lambda: damaged.models,
        lambda: damaged.rollback("flowers"),
        lambda: damaged.add("flowers", bundles[4]),
        lambda: damaged.remove("flowers", 1),
    ):
        with pytest.raises(
            RegistryError,
            match=rf"^{root} is damaged: according to added/ the end of its log is missing, at "
            rf"least from log/0000000{first}\.json to log/00000003\.json; restore",
        ):
            call()
    assert files(registry) == before


def test_a_truncated_log_is_detected_on_all_stores(place, bundles):
    registry, store = Registry(place), Store(place)
    for path in bundles[:2]:
        registry.add("flowers", path)
    store.remove("log/00000002.json")
    with pytest.raises(RegistryError, match=r"at least from log/00000002\.json to log/00000002"):
        Registry(place).refresh()
    store.remove("log")
    with pytest.raises(RegistryError, match=r"at least from log/00000001\.json to log/00000002"):
        Registry(place).refresh()
    store.remove("registry.json")
    with pytest.raises(RegistryError, match="it has a log but no registry"):
        Registry(place).add("flowers", bundles[2])


@pytest.mark.parametrize("moment", [("names", "added"), ("names", "log"), ("read", "log")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_add_during_the_first_read_is_not_damage(registry, bundles, moment, when):
    store = wrapped(pathlib.Path(registry.url))
    done = _meanwhile(store, moment, lambda: registry.add("flowers", bundles[3]), when)
    on(store).refresh()
    assert done


def damage(registry, number=1, file="weights.safetensors", model="flowers"):
    """Flips one bit in a stored file of a model version."""
    name = f"{registry.resolve(model, number).bundle.path}/{file}"
    content = bytearray(registry._store.read(name))
    content[len(content) // 2] ^= 1
    registry._store.remove(name)
    registry._store.write(name, bytes(content))


def test_a_marker_that_is_not_written_is_a_warning(registry, bundles, caplog):
    store = wrapped(pathlib.Path(registry.url))
    failing(store, ("write", "added"), happens=False)
    on(store).add("flowers", bundles[3])
    (record,) = caplog.records
    assert "could not be detected" in record.getMessage()
    assert aliases(Registry(registry.url)) == {"champion": 2, "mine": 3}


def test_a_store_that_overwrites_files_is_refused(tmp_path, bundles):
    """Simulates a server that ignores the condition of a write, as old S3-compatible servers do."""

    class Careless(Wrapped):
        def create(self, name, data):
            self._store.write(name, data)

    careless = on(Careless(Store(tmp_path / "registry")))
    with pytest.raises(RegistryError, match="lets two writers create the same file"):
        careless.add("flowers", bundles[0])
    assert files(careless) == ["registry.json"]
    careful = Registry(careless.url)
    careful.add("flowers", bundles[0])
    before = {name: (tmp_path / "registry" / name).read_bytes() for name in files(careful)}
    with pytest.raises(RegistryError, match="lets two writers create the same file"):
        on(Careless(Store(tmp_path / "registry"))).promote("flowers", 1)
    assert {name: (tmp_path / "registry" / name).read_bytes() for name in before} == before


def test_bundles_of_killed_processes_are_reported(registry):
    root = pathlib.Path(registry.url)
    assert registry.unused_bundles() == []
    (root / "bundles" / "left").mkdir()
    (root / "bundles" / "left" / "weights.safetensors").touch()
    assert registry.unused_bundles() == ["bundles/left"]


@pytest.mark.parametrize("file", ["bundle.json", "weights.safetensors"])
def test_a_damaged_version_is_not_promoted(place, bundles, file):
    registry = Registry(place)
    for path in bundles[:2]:
        registry.add("flowers", path)
    registry.promote("flowers", 1, "mine")
    damage(registry, 1, file)
    for which in (1, "mine"):
        with pytest.raises(BundleError, match=r"bundles/\S+ is damaged: its digest differs"):
            registry.promote("flowers", which)
    assert len(Registry(place).log) == 3
    registry.promote("flowers", 2)
    registry.promote("flowers", 2, "mine")
    assert registry.rollback("flowers", "mine").version == 1, "to be quick, it looks at no file"


def _is_download(call, name):
    return call == "read" and name.startswith("bundles/")


def test_a_version_that_fails_gates_is_not_downloaded(registry):
    store = wrapped(pathlib.Path(registry.url))
    # A remote registry has no local files, so bundles must be downloaded.
    store.local = lambda name: None
    other = on(store)
    with pytest.raises(RegistryError, match="does not become champion"):
        other.promote("flowers", 1, gates=Gates(min_accuracy=0.9))
    assert other.promote("flowers", 2) is None
    other.rollback("flowers")
    assert not [one for one in store.calls if _is_download(*one)]
    other.promote("flowers", 3)
    assert len([one for one in store.calls if _is_download(*one)]) == 2


def test_a_version_removed_during_verify_is_not_damaged(registry):
    store = wrapped(pathlib.Path(registry.url))
    store.local = lambda name: None
    moment = ("read", "bundles")
    assert not _meanwhile(store, moment, lambda: registry.remove("flowers", 1))
    with pytest.raises(RegistryError, match=r"flowers has no version 1 \(it was removed\)"):
        on(store).promote("flowers", 1, "yours")


@pytest.mark.parametrize("file", ["bundle.json", "weights.safetensors"])
def test_adding_a_bundle_again_restores_its_files(place, bundles, caplog, file):
    registry = Registry(place)
    version = registry.add("flowers", bundles[0]).version
    for spoil in (
        lambda: damage(registry, 1, file),
        lambda: registry._store.remove(f"{version.bundle.path}/{file}"),
        lambda: registry._store.remove(version.bundle.path),
    ):
        spoil()
        with pytest.raises(BundleError):
            registry.verify(version)
        caplog.clear()
        added = registry.add("flowers", bundles[0])
        assert (added.version, added.is_new) == (version, False)
        (record,) = caplog.records
        assert record.getMessage().endswith("; its files are restored")
        registry.verify(version)
    caplog.clear()
    registry.add("flowers", bundles[0])
    assert not caplog.records
    assert len(registry.log) == 1


@pytest.fixture
def clock(monkeypatch):
    """A fake clock: a list with one number, the time in seconds, which a test may change."""
    now = [time.monotonic()]
    fake = types.SimpleNamespace(monotonic=lambda: now[0], time=time.time, sleep=time.sleep)
    monkeypatch.setattr(registries, "time", fake)
    return now


def test_the_identity_is_read_once_a_minute(registry, clock):
    store = wrapped(pathlib.Path(registry.url))
    reader = on(store)
    for _ in range(100):
        reader.refresh()
        clock[0] += 1.25
    assert store.calls.count(("read", "registry.json")) == 3
    assert store.calls.count(("names", "added")) == 1


def test_a_replaced_registry_is_read_again(registry, bundles, clock, caplog):
    root = pathlib.Path(registry.url)
    shutil.rmtree(root)
    other = Registry(root)
    other.add("birds", bundles[0])
    assert not registry.refresh()
    clock[0] += 61
    assert registry.refresh()
    (record,) = caplog.records
    assert record.getMessage() == f"{root} was replaced by another registry, which is read now"
    assert outline(registry) == outline(other)
    assert [entry.number for entry in registry.log] == [1]
    clock[0] += 61
    assert not registry.refresh()
    registry.promote("birds", 1)
    other.refresh()
    assert aliases(other, "birds") == {"champion": 1}


def test_a_longer_replacement_is_read_again(tmp_path, bundles, clock):
    """A reader loads a new registry that replaced the old one, even if the new log is longer."""
    reader = Registry(tmp_path / "registry")
    reader.add("flowers", bundles[0])
    shutil.rmtree(tmp_path / "registry")
    other = Registry(tmp_path / "registry")
    for path in bundles[1:4]:
        other.add("flowers", path)
    clock[0] += 61
    assert reader.refresh()
    assert outline(reader) == outline(other)


def test_a_replaced_registry_gets_no_entry_of_the_old(registry, bundles, clock):
    """Until registry.json is read again, a write that would leave a gap in the log is refused."""
    root = pathlib.Path(registry.url)
    shutil.rmtree(root)
    other = Registry(root)
    other.add("birds", bundles[0])
    with pytest.raises(RegistryError, match="there is no model flowers"):
        registry.rollback("flowers")
    assert [path.name for path in (root / "log").iterdir()] == ["00000001.json"]


def test_a_deleted_registry_is_reported_and_may_return(registry, bundles, clock):
    root = pathlib.Path(registry.url)
    aside = root.rename(root.with_name("aside"))
    clock[0] += 61
    for call in (
        registry.refresh,
        registry.refresh,
        lambda: registry.rollback("flowers"),
        lambda: registry.add("flowers", bundles[3]),
    ):
        with pytest.raises(RegistryError, match=rf"^{root} no longer exists: its registry"):
            call()
    assert aliases(registry) == {"champion": 2, "mine": 3}
    shutil.rmtree(root, ignore_errors=True)
    aside.rename(root)
    registry.rollback("flowers")
    assert aliases(Registry(root)) == aliases(registry) == {"champion": 1, "mine": 3}


def test_a_registry_deleted_during_add_is_not_created_again(registry, bundles, clock):
    store = wrapped(pathlib.Path(registry.url))
    adder = on(store)
    adder.refresh()
    _meanwhile(store, ("write", "bundles"), lambda: shutil.rmtree(registry.url))
    with pytest.raises(RegistryError, match="no longer exists"):
        adder.add("flowers", bundles[3])
    assert files(registry) == []


def test_add_reports_a_new_registry(tmp_path, bundles):
    registry = Registry(tmp_path / "registry")
    assert [registry.add("flowers", path).is_new_registry for path in bundles[:2]] == [True, False]
    assert not Registry(tmp_path / "registry").add("flowers", bundles[2]).is_new_registry


def test_a_conditional_rollback_checks_the_current_version(registry):
    with pytest.raises(RegistryError, match=r"^no rollback: flowers@champion is 2, not 1$"):
        registry.rollback("flowers", current=1)
    assert registry.rollback("flowers", current=2).version == 1


def test_unknown_files_are_ignored(registry, bundles):
    root = pathlib.Path(registry.url)
    others = ("log/notes.txt", "log/.nfs0001", "bundles/notes.txt", "tmp/notes.txt", "notes")
    for name in (*others, "added/notes.txt", "added/00000099-notes"):
        (root / name).write_text("x")
    other = Registry(registry.url)
    assert outline(other) == outline(registry)
    other.add("flowers", bundles[3])
    assert (root / "bundles" / "notes.txt").exists()


@pytest.mark.parametrize("file", ["bundle.json", "weights.safetensors"])
def test_a_damaged_bundle_is_not_fetched(place, bundles, tmp_path, file):
    registry = Registry(place)
    version = registry.add("flowers", bundles[0]).version
    store = Store(place)
    name = f"{version.bundle.path}/{file}"
    content = bytearray(store.read(name))
    content[len(content) // 2] ^= 1
    store.remove(name)
    store.write(name, bytes(content))
    with pytest.raises(BundleError, match=f"{version.bundle.path} is (damaged|not a bundle)"):
        registry.fetch(version, tmp_path / "downloads")
    store.remove(name)
    with pytest.raises(BundleError, match=r"is (damaged|not a bundle)|no longer in"):
        registry.fetch(version, tmp_path / "downloads")
    assert not list((tmp_path / "downloads").glob("*"))


def test_a_download_is_reused_and_replaced_if_damaged(bundles, tmp_path):
    store = wrapped(tmp_path / "registry")
    on(store).add("flowers", bundles[0])
    # A remote registry has no local files, so bundles must be downloaded.
    store.local = lambda name: None
    registry = on(store)
    version = registry.resolve("flowers", 1)

    def fetch():
        store.calls.clear()
        folder = registry.fetch(version, tmp_path / "downloads")
        assert digest(folder) == version.bundle.digest
        read_bundle(folder)
        assert [path.name for path in (tmp_path / "downloads").iterdir()] == [folder.name]
        return len(store.calls)

    assert [fetch(), fetch()] == [2, 0]
    for damage in (
        lambda folder: (folder / "weights.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "weights.safetensors").unlink(),
        lambda folder: (folder / "bundle.json").write_text("{}"),
    ):
        folder = tmp_path / "downloads" / version.bundle.digest
        for file in folder.iterdir():
            file.chmod(0o644)
        damage(folder)
        assert [fetch(), fetch()] == [2, 0]


def test_two_processes_download_at_once(bundles, tmp_path):
    store = wrapped(tmp_path / "registry")
    version = on(store).add("flowers", bundles[0]).version
    store.local = lambda name: None
    other = on(store)
    other.refresh()

    def meanwhile(call, name):
        if _is_download(call, name) and name.endswith("weights.safetensors"):
            store.after = lambda *arguments: None
            other.fetch(version, tmp_path / "downloads")

    store.after = meanwhile
    folder = on(store).fetch(version, tmp_path / "downloads")
    assert digest(folder) == version.bundle.digest
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == [folder.name]


def test_an_unwritable_download_folder_is_reported(bundles, tmp_path):
    store = wrapped(tmp_path / "registry")
    version = on(store).add("flowers", bundles[0]).version
    store.local = lambda name: None
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot write flowers/1 there"):
        on(store).fetch(version, tmp_path / "file")


def test_a_full_local_disk_is_not_damage(bundles, tmp_path):
    """If the local disk is full, a download fails, but the stored version is not damaged."""
    store = wrapped(tmp_path / "registry")
    registry = on(store)
    registry.add("flowers", bundles[0])
    store.local = lambda name: None
    store.calls.clear()

    def fail(call, name):
        if _is_download(call, name):
            raise OSError(28, "No space left on device")

    store.before = fail
    for call in (
        lambda: registry.verify(registry.resolve("flowers", 1)),
        lambda: registry.add("flowers", bundles[0]),
        lambda: registry.promote("flowers", 1),
    ):
        with pytest.raises(StoreError, match="No space left on device"):
            call()
    assert not {"write", "remove", "create"} & {call for call, _ in store.calls}


def _meanwhile(store, moment, change, when="before"):
    """Lets another writer make a change before or after the first matching call to a store."""
    is_done = []

    def hook(call, name):
        if (call, name.partition("/")[0]) == moment and not is_done:
            is_done.append(True)
            change()

    setattr(store, when, hook)
    return is_done


LOG = ("create", "log")


def test_the_second_writer_decides_again(registry, bundles):
    store = wrapped(pathlib.Path(registry.url))
    slow = on(store)
    done = _meanwhile(store, LOG, lambda: registry.add("flowers", bundles[3]))
    assert slow.add("flowers", bundles[4]).version.number == 5
    assert done
    assert outline(slow) == outline(Registry(registry.url))


def test_two_writers_add_the_same_bundle_once(registry, bundles):
    store = wrapped(pathlib.Path(registry.url))
    slow = on(store)
    _meanwhile(store, LOG, lambda: registry.add("flowers", bundles[3]))
    added = slow.add("flowers", bundles[3])
    assert (added.version.number, added.is_new) == (4, False)
    assert len(list((pathlib.Path(registry.url) / "bundles").iterdir())) == 4
    registry.fetch(added.version, "unused")


def test_gates_use_the_latest_state(registry, bundles):
    """Evidence is checked again after another writer has moved the alias."""
    store = wrapped(pathlib.Path(registry.url))
    slow = on(store)
    _meanwhile(store, LOG, lambda: registry.promote("flowers", 3))
    gates = Gates(evidence=make_evidence(candidate=1, reference=2))
    with pytest.raises(
        RegistryError, match="flowers/1 was not compared with version 3, which is now flowers@"
    ):
        slow.promote("flowers", 1, "next", gates)
    assert aliases(registry) == {"champion": 3, "mine": 3}


def test_a_version_is_not_removed_under_a_new_alias(registry):
    store = wrapped(pathlib.Path(registry.url))
    slow = on(store)
    _meanwhile(store, LOG, lambda: registry.promote("flowers", 1, "mine"))
    with pytest.raises(RegistryError, match="flowers/1 is not removed, because it is mine"):
        slow.remove("flowers", 1)
    registry.fetch(registry.resolve("flowers", 1), "unused")


def test_a_version_is_not_promoted_while_it_is_removed(registry):
    store = wrapped(pathlib.Path(registry.url))
    slow = on(store)
    _meanwhile(store, LOG, lambda: registry.remove("flowers", 1))
    with pytest.raises(RegistryError, match=r"has no version 1 \(it was removed\)"):
        slow.promote("flowers", 1)


def test_two_rollbacks_at_once_are_one_step(registry):
    registry.promote("flowers", 3)
    store = wrapped(pathlib.Path(registry.url))
    slow = on(store)
    _meanwhile(store, LOG, lambda: registry.rollback("flowers"))
    with pytest.raises(RegistryError, match=r"process has just moved .*champion from 3 to 2"):
        slow.rollback("flowers")
    assert aliases(slow)["champion"] == 2


def test_several_processes_create_a_registry_at_once(tmp_path, bundles):
    store = wrapped(tmp_path / "registry")
    slow = on(store)
    first = ("create", "registry.json")
    _meanwhile(store, first, lambda: Registry(tmp_path / "registry").add("flowers", bundles[0]))
    assert slow.add("flowers", bundles[1]).version.number == 2
    assert outline(slow) == outline(Registry(tmp_path / "registry"))


@pytest.mark.parametrize(
    ("when", "moment"),
    [
        ("before", ("read", "registry.json")),
        ("before", ("names", "log")),
        ("after", ("names", "log")),
    ],
)
def test_a_registry_created_during_reading_is_not_damage(tmp_path, bundles, when, moment):
    store = wrapped(tmp_path / "registry")
    slow = on(store)
    other = Registry(tmp_path / "registry")
    assert not _meanwhile(store, moment, lambda: other.add("flowers", bundles[0]), when)
    assert slow.add("flowers", bundles[1]).version.number == 2


@pytest.mark.parametrize("hidden", [{1}, {2}, {6}, {2, 3, 5}, {1, 2, 3, 4, 5, 6}])
def test_a_listing_during_writes_may_have_gaps(registry, hidden):
    """A listing may omit files that are created during the listing, as readdir does."""

    class Gaps(Wrapped):
        def names(self, folder):
            names = super().names(folder)
            return [name for name in names if name not in {f"{i:08d}.json" for i in hidden}]

    reader = on(Gaps(Store(registry.url)))
    assert outline(reader) == outline(registry)


def test_threads_share_a_registry(registry):
    problems = []

    def work(alias):
        try:
            for i in range(10):
                registry.promote("flowers", 1 + i % 3, alias)
                registry.refresh()
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(f"alias-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(registry.log) == 6 + 40
    assert outline(registry) == outline(Registry(registry.url))


def test_decision_and_change_are_atomic_among_threads(registry, monkeypatch):
    """While a thread checks and writes a change, no other thread reads new log entries."""
    other, shared = Registry(registry.url), registry
    who = registries._author

    def meanwhile():
        monkeypatch.setattr(registries, "_author", who)
        other.remove("flowers", 1)
        reader = threading.Thread(target=shared.refresh)
        reader.start()
        reader.join(timeout=0.2)
        return who()

    monkeypatch.setattr(registries, "_author", meanwhile)
    with pytest.raises(RegistryError, match=r"has no version 1 \(it was removed\)"):
        shared.promote("flowers", 1)
    assert outline(Registry(registry.url)) == outline(other)


CHANGES = {
    "add": lambda registry, bundles: registry.add("flowers", bundles[3]),
    "promote": lambda registry, bundles: registry.promote("flowers", 1, "mine"),
    "rollback": lambda registry, bundles: registry.rollback("flowers"),
    "remove": lambda registry, bundles: registry.remove("flowers", 1),
    "remove_alias": lambda registry, bundles: registry.remove_alias("flowers", "mine"),
}


def failing(store, moment, happens, times=1, error=None):
    """Makes calls to a store fail: before they are performed, or after if `happens` is True."""
    left = [times]

    def hook(call, name):
        if (call, name.partition("/")[0]) == moment and left[0]:
            left[0] -= 1
            raise error or NoAnswerError(f"{store.url}/{name}: no answer")

    setattr(store, "after" if happens else "before", hook)


@pytest.mark.parametrize("action", CHANGES)
@pytest.mark.parametrize("happens", [True, False])
@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_answer_does_not_repeat_the_change(registry, bundles, fast, action, happens, times):
    store = wrapped(pathlib.Path(registry.url))
    failing(store, LOG, happens, times)
    flaky = on(store)
    CHANGES[action](flaky, bundles)
    after = Registry(registry.url)
    assert len(after.log) == 7
    assert outline(after) == outline(flaky)


def test_a_lost_answer_is_found_before_later_entries(registry, bundles, fast):
    """If the answer for a written entry is lost, the entry is found, even before a later entry."""
    store = wrapped(pathlib.Path(registry.url))
    other = copy.copy(registry)

    def lose(call, name):
        if call == "create" and name.startswith("log"):
            store.after = lambda *arguments: None
            other.promote("flowers", 1, "mine")
            raise NoAnswerError("no answer")

    store.after = lose
    assert on(store).rollback("flowers").number == 7
    assert len(Registry(registry.url).log) == 8


@pytest.mark.parametrize("happens", [True, False])
def test_a_store_without_answer_reports_an_unclear_outcome(registry, fast, happens):
    store = wrapped(pathlib.Path(registry.url))
    flaky = on(store)

    def fail(call, name):
        raise NoAnswerError("no answer")

    def lose(call, name):
        if call == "create" and name.startswith("log"):
            store.before = fail
            raise NoAnswerError("no answer")

    setattr(store, "after" if happens else "before", lose)
    with pytest.raises(NoAnswerError, match=r"report whether the change was made \(no answer\)"):
        flaky.rollback("flowers")
    assert len(Registry(registry.url).log) == 6 + happens


def test_a_missing_store_is_reported_at_once(registry):
    store = wrapped(pathlib.Path(registry.url))
    flaky = on(store)
    failing(store, ("read", "log"), happens=False, times=100)
    with pytest.raises(NoAnswerError, match=r"^\S+/log/0000000\d.json: no answer$"):
        flaky.rollback("flowers")
    assert len(store.calls) < 10


def test_a_store_that_hides_files_ends_the_retries(registry, fast):
    store = wrapped(pathlib.Path(registry.url))
    blind = on(store)
    blind.refresh()
    registry.promote("flowers", 1, "yours")

    def hide(call, name):
        if name == "log/00000007.json" and call == "read":
            raise FileNotFoundError(name)

    store.before = hide
    with pytest.raises(
        NoAnswerError, match="exists according to the store, but the store cannot find"
    ):
        blind.rollback("flowers")


@pytest.mark.parametrize("error", [StoreError("x: Permission denied"), KeyboardInterrupt()])
def test_other_errors_are_not_retried(registry, error):
    store = wrapped(pathlib.Path(registry.url))
    failing(store, LOG, happens=False, times=100, error=error)
    with pytest.raises(type(error)):
        on(store).rollback("flowers")
    assert store.calls.count(("create", "log/00000007.json")) == 1


def check_after_a_kill(root, before, after, bundle):
    """Checks that a registry is usable, and is in the state before or the state after a change."""
    registry = Registry(root)
    state = outline(registry) if (root / "registry.json").exists() else {}
    assert state in (before, after)
    added = registry.add("flowers", bundle)
    registry.promote("flowers", added.version.number, "last")
    assert outline(Registry(root)) == outline(registry)
    for version in registry.models["flowers"].versions.values():
        read_bundle(registry.fetch(version, "unused"))
    return state


@pytest.mark.parametrize("action", ["begin", *CHANGES])
def test_a_kill_at_any_moment_is_atomic(registry, bundles, tmp_path, action):
    """If a process is killed at any call, a change is made completely or not at all.

    The folders that a killed process leaves can be deleted.
    """
    source, change = pathlib.Path(registry.url), CHANGES.get(action, CHANGES["add"])
    if action == "begin":
        shutil.rmtree(source)
        source.mkdir()
    before = outline(registry) if action != "begin" else {}
    whole = shutil.copytree(source, tmp_path / "whole")
    change(Registry(whole), bundles)
    after = outline(Registry(whole))

    states, is_killed = [], True
    while is_killed:
        root = shutil.copytree(source, tmp_path / f"killed-{len(states)}")
        victim, is_killed = Registry(root), False
        with dying_at(len(states)):
            try:
                change(victim, bundles)
            except Killed:
                is_killed = True
        states.append(check_after_a_kill(root, before, after, bundles[4]))
    assert len(states) > 10
    assert states[0] == before
    assert states[-1] == after
    for root in tmp_path.glob("killed-*"):
        for path in Registry(root).unused_bundles():
            shutil.rmtree(root / path)
        registry = Registry(root)
        assert registry.unused_bundles() == []
        for version in registry.models["flowers"].versions.values():
            read_bundle(registry.fetch(version, "unused"))


def leftovers(registry):
    """Returns the names of the unused files and folders of a registry."""
    root = pathlib.Path(registry.url)
    used = {v.bundle.path for m in registry.models.values() for v in m.versions.values()}
    existing = [f"bundles/{path.name}" for path in (root / "bundles").iterdir()]
    return sorted({*existing} - used) + [path.name for path in (root / "tmp").iterdir()]


@pytest.mark.parametrize(
    ("moment", "error", "left"),
    [
        (("write", "bundles"), StoreError("No space left on device"), 0),
        (LOG, StoreError("No space left on device"), 0),
        (LOG, RegistryError("whatever else is wrong"), 0),
        (LOG, NoAnswerError("no answer"), 1),
        (LOG, KeyboardInterrupt(), 1),
    ],
)
def test_a_failed_add_deletes_its_files(registry, bundles, fast, moment, error, left):
    """A failed `add` deletes its files, but keeps them if the log entry may have been written."""
    store = wrapped(pathlib.Path(registry.url))
    failing(store, moment, happens=False, times=100, error=error)
    with pytest.raises(type(error)):
        on(store).add("flowers", bundles[3])
    assert len(leftovers(registry)) == left
    assert outline(Registry(registry.url)) == outline(registry)


def test_an_unclear_outcome_stays_unclear_after_an_error(registry, bundles, fast):
    """If the answer is lost and later calls fail, the error says that the outcome is unclear."""
    store = wrapped(pathlib.Path(registry.url))

    def refuse(call, name):
        raise StoreError("Permission denied")

    def lose(call, name):
        if (call, name.partition("/")[0]) == LOG:
            store.before = refuse
            raise NoAnswerError("no answer")

    store.after = lose
    with pytest.raises(NoAnswerError, match=r"whether the change was made \(Permission denied\)"):
        on(store).add("flowers", bundles[3])
    after = Registry(registry.url)
    after.fetch(after.resolve("flowers", 4), "unused")


def test_a_file_that_exists_may_be_the_entry(registry, bundles, fast):
    """If an answer is lost, obstore sends the request again, and then finds its own file."""
    store = wrapped(pathlib.Path(registry.url))

    def refuse(call, name):
        raise StoreError("Permission denied")

    def repeat(call, name):
        if (call, name.partition("/")[0]) == LOG:
            store.before = refuse
            raise FileExistsError(name)

    store.after = repeat
    with pytest.raises(NoAnswerError, match=r"whether the change was made \(Permission denied\)"):
        on(store).add("flowers", bundles[3])
    after = Registry(registry.url)
    after.fetch(after.resolve("flowers", 4), "unused")


@pytest.mark.parametrize("happens", [True, False])
@pytest.mark.parametrize("error", [NoAnswerError("no answer"), FileExistsError("log/7")])
def test_an_unreadable_entry_after_add_keeps_the_bundle(registry, bundles, happens, error):
    """While the outcome of `add` is unclear, a later version of cnn_jax changes the log."""
    store = wrapped(pathlib.Path(registry.url))

    def append_and_lose(call, name):
        if (call, name.partition("/")[0]) == LOG:
            append_unknown_entry(registry, skippable=False)
            raise error

    setattr(store, "after" if happens else "before", append_and_lose)
    if happens:
        version = on(store).add("flowers", bundles[3]).version
        assert (version.number, marks(registry._store)[7]) == (4, version.bundle.path)
        registry.fetch(version, "unused")
    else:
        with pytest.raises(NoAnswerError, match=r"was made \(\S+7\.json has the action quarantine"):
            on(store).add("flowers", bundles[3])
    assert len(leftovers(registry)) == 1, "the bundle, which `registry` has not read in the log"


def test_errors_with_an_unprintable_path_are_one_line(prepared, tmp_path):
    root = shutil.copytree(prepared, tmp_path / "a\u2028b")
    registry = Registry(root)
    damage(registry)
    with pytest.raises(
        BundleError, match=rf"^{tmp_path}/a\\u2028b/bundles/\S+ is damaged"
    ) as damaged:
        registry.promote("flowers", 1)
    shutil.rmtree(root)
    with pytest.raises(
        RegistryError, match=rf"^there is no registry at {tmp_path}/a\\u2028b;"
    ) as missing:
        Registry(root).refresh()
    assert len(f"{damaged.value}{missing.value}".splitlines()) == 1


def test_files_that_cannot_be_removed_are_a_warning(registry, caplog):
    store = wrapped(pathlib.Path(registry.url))
    failing(store, ("remove", "bundles"), happens=False)
    on(store).remove("flowers", 1)
    assert "not deleted: " in caplog.text
    assert list(Registry(registry.url).models["flowers"].versions) == [2, 3]
