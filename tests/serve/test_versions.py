"""Tests that load and unload versions while clients send requests."""

import asyncio
import concurrent.futures
import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from bundles import make_bundle
from conftest import REPOSITORY
from object_stores import BUCKET, s3_service
from PIL import Image
from registry_log import append_unknown_entry
from servers import Served, until

from cnn_jax.data.request_log import class_names, read_feedback, read_requests
from cnn_jax.explain import maps
from cnn_jax.explain.features import embeddings
from cnn_jax.inference.bundle import write_bundle
from cnn_jax.inference.images import preprocess_for_inference
from cnn_jax.inference.predictor import BundlePredictor, predict_batch
from cnn_jax.registry.registry import Registry
from cnn_jax.serve import loader as loader_module
from cnn_jax.serve.engine import Engine
from cnn_jax.serve.limits import Limits, Refused
from cnn_jax.serve.loader import DesiredState, Loader, Source
from cnn_jax.serve.metrics import ServerMetrics
from cnn_jax.serve.service import AVAILABLE, END, LOADING, Models, Service
from cnn_jax.serve.versions import Version, make_version
from cnn_jax.system.errors import BundleError

PREDICT = "token-of-a-client-01"
AS_CLIENT = {"Authorization": f"Bearer {PREDICT}"}


def encode(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def add(registry, folder, seed, model="shapes"):
    """Adds a bundle with other weights as the next version; returns the version's number."""
    path = folder / f"bundle-{model}-{seed}"
    write_bundle(make_bundle(seed), path)
    return registry.add(model, path).version.number


@pytest.fixture
def registry(tmp_path):
    registry = Registry(tmp_path / "registry")
    add(registry, tmp_path, 1)
    add(registry, tmp_path, 2)
    registry.promote("shapes", 1)
    return registry


@pytest.fixture
def serve(tmp_path, registry):
    (tmp_path / "tokens").write_text(f"predict {PREDICT}\n")

    def serve(*flags, folder=tmp_path, **options):
        common = [f"--registry={registry.url}", "--poll=0.1", "--max_batch=2"]
        return Served(folder, *common, f"--tokens={tmp_path}/tokens", *flags, **options)

    return serve


def version_of(server, query=""):
    answer = server.post(f"/predict?top=3{query}", encode(), headers=AS_CLIENT)
    return answer.json()["version"] if answer.ok else answer.status_code


def states_of(server, model="shapes"):
    found = server.get(f"/v1/models/{model}", headers=AS_CLIENT).json()["model_version_status"]
    return {int(one["version"]): one["state"] for one in found}


class StubSource(Source):
    """A source whose state and bundles are the results of functions."""

    def __init__(self, desired, open_bundle):
        self._desired, self._open = desired, open_bundle

    def desired(self):
        return dict(self._desired())

    def open(self, model, number):
        return self._open(number)


def make_loader(desired, open_bundle=make_bundle, **options):
    """Returns a service without versions, and a loader of versions with the batch size 1.

    Args:
      desired: A function that returns the desired state.
      open_bundle: A function that returns the bundle of a version number.
      **options: Further arguments of `Loader`.
    """
    service = Service(Models(), Engine(9), Limits(), ServerMetrics())
    return service, Loader(service, StubSource(desired, open_bundle), (1,), **options)


def test_an_alias_moves_without_a_failed_request(serve, registry, tmp_path):
    """The probabilities in each response are those of the version that the response names.

    While clients send requests, an alias is moved to version 2 and back; only these moves change
    the version.
    """
    expected = {}
    for number in (1, 2):
        (prediction,) = predict_batch(BundlePredictor(make_bundle(number)), [encode()])
        expected[number] = prediction.probabilities
    with serve() as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        is_over = threading.Event()

        def ask():
            versions = []
            while not is_over.is_set():
                answer = server.post("/predict?top=3", encode(), headers=AS_CLIENT)
                assert answer.status_code == 200
                found = answer.json()
                shares = {
                    one["class"]: one["probability"] for one in found["predictions"][0]["top"]
                }
                of_version = [shares[name] for name in ("blue", "green", "red")]
                np.testing.assert_allclose(of_version, expected[found["version"]], atol=1e-6)
                versions.append(found["version"])
            return versions

        asking = [pool.submit(ask) for _ in range(4)]
        time.sleep(0.5)
        registry.promote("shapes", 2)
        until(lambda: version_of(server) == 2)
        time.sleep(0.3)
        registry.rollback("shapes")
        until(lambda: version_of(server) == 1)
        time.sleep(0.3)
        is_over.set()
        for future in asking:
            versions = future.result()
            changes = np.flatnonzero(np.diff(versions))
            assert [versions[0], *(versions[i + 1] for i in changes)] == [1, 2, 1]
        until(lambda: states_of(server) == {1: "AVAILABLE", 2: "END"})
        assert server.end() == 0


def test_a_server_follows_a_registry_that_has_later_entries(serve, registry):
    """A newer tool has written an entry whose action the server does not know."""
    with serve() as server:
        assert version_of(server) == 1
        append_unknown_entry(registry)
        registry.promote("shapes", 2)
        until(lambda: version_of(server) == 2)
        append_unknown_entry(registry, skippable=False)
        server.wait_for_log("quarantine.*upgrade cnn_jax")
        assert version_of(server) == 2


def test_a_broken_version_leaves_the_old_version(serve, registry, tmp_path):
    nan = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), make_bundle().variables)
    write_bundle(dataclasses.replace(make_bundle(), variables=nan), tmp_path / "nan")
    without_numbers = registry.add("shapes", tmp_path / "nan").version.number
    registry.promote("shapes", 2)
    registry.promote("shapes", 1)
    with serve() as server:
        # Damage version 2: flip a bit of its weights in the registry.
        path = tmp_path / "registry" / registry.resolve("shapes", 2).bundle.path
        weights = bytearray((path / "weights.safetensors").read_bytes())
        weights[-1] ^= 1
        (path / "weights.safetensors").chmod(0o644)
        (path / "weights.safetensors").write_bytes(weights)
        for number, reason in ((2, "the log says why"), (without_numbers, "not probabilities")):
            # `promote` refuses a damaged version, but a rollback may select a damaged version.
            registry.rollback("shapes") if number == 2 else registry.promote("shapes", number)
            until(lambda number=number: states_of(server).get(number) == "END")
            server.wait_for_log(f"version {number}: not loaded; the loaded versions stay")
            assert version_of(server) == 1
            assert version_of(server, "&alias=champion") == 1
            assert server.get("/readyz").status_code == 200
            status = server.get(f"/v1/models/shapes/versions/{number}", headers=AS_CLIENT).json()
            assert reason in status["model_version_status"][0]["status"]["error_message"]
        failed = 'cnn_jax_loads_total{model="shapes",outcome="failed"}'
        text = server.get("/metrics", headers=AS_CLIENT).text
        assert float(text.partition(failed)[2].split()[0]) >= 2
        # The next version is intact, and is loaded.
        registry.promote("shapes", add(registry, tmp_path, 4))
        until(lambda: version_of(server) == 4)
        assert server.end() == 0


def test_several_versions_and_models_at_once(serve, registry, tmp_path):
    registry.promote("shapes", 2, alias="challenger")
    add(registry, tmp_path, 7, "others")
    registry.promote("others", 1)
    with serve("--versions=challenger,9") as server:
        # Two models are loaded, but the request names no model.
        assert version_of(server) == 400
        assert version_of(server, "&model=shapes") == 1
        assert version_of(server, "&model=shapes&alias=challenger") == 2
        assert version_of(server, "&model=shapes&version=2") == 2
        assert version_of(server, "&model=others") == 1
        assert version_of(server, "&model=others&version=2") == 404
        found = server.get("/models", headers=AS_CLIENT).json()["models"]
        assert {one["name"]: one["aliases"] for one in found} == {
            "shapes": {"champion": 1, "challenger": 2},
            "others": {"champion": 1},
        }
        assert server.end() == 0


def test_a_version_rolled_back_while_loading_is_not_served(monkeypatch):
    """If the alias is rolled back while a version is loaded, the loaded version is not served."""
    desired = {"shapes": DesiredState({1: "1"}, {"champion": 1})}

    def open_bundle(number):
        if number == 2:
            # This assignment simulates a rollback of the alias.
            desired["shapes"] = DesiredState({1: "1"}, {"champion": 1})
        return make_bundle(number)

    async def run():
        service, loader = make_loader(lambda: desired, open_bundle)
        await loader.synchronize()
        assert service.models.default("shapes").number == 1
        seen = []
        set_aliases = service.models.set_aliases
        monkeypatch.setattr(
            service.models,
            "set_aliases",
            lambda *args: (seen.append(args[1]), set_aliases(*args)),
        )
        desired["shapes"] = DesiredState({2: "2"}, {"champion": 2})
        await loader.synchronize()
        assert {"champion": 2} not in seen
        assert service.models.default("shapes").number == 1
        assert set(service.models.loaded("shapes")) == {1}
        # A loaded version is replaced if the registry now has another bundle under its number.
        desired["shapes"] = DesiredState({1: "other"}, {"champion": 1})
        await loader.synchronize()
        assert service.models.default("shapes").digest == "other"

    asyncio.run(run())


def make_hanging(registry, number):
    """Replaces the weights of a version with a pipe, so that reading the version never ends."""
    folder = pathlib.Path(registry.url) / registry.resolve("shapes", number).bundle.path
    folder.chmod(0o755)
    (folder / "weights.safetensors").unlink()
    os.mkfifo(folder / "weights.safetensors")


def test_a_rollback_overtakes_a_load_that_hangs(serve, registry, tmp_path):
    third = add(registry, tmp_path, 3)
    registry.promote("shapes", 2)
    registry.promote("shapes", 1)
    make_hanging(registry, 2)
    with serve() as server:
        registry.rollback("shapes")  # The alias points to version 2.
        server.wait_for_log("shapes, version 2: loading")
        time.sleep(1)
        ready = server.get("/readyz")
        assert ready.status_code == 200
        (loading,) = ready.json()["loading"]
        assert (loading["model"], loading["version"]) == ("shapes", 2)
        assert loading["seconds"] >= 0.9
        name = 'cnn_jax_version_loading_seconds{model="shapes",version="2"} '
        metrics = server.get("/metrics", headers=AS_CLIENT).text
        assert float(metrics.partition(name)[2].split()[0]) >= 0.9
        assert states_of(server)[2] == "LOADING"
        assert version_of(server) == 1
        start = time.monotonic()
        registry.promote("shapes", third)
        until(lambda: version_of(server) == third)
        assert time.monotonic() - start < 10
        server.wait_for_log("shapes, version 2: no longer wanted; not loaded")
        assert server.get("/readyz").json()["loading"] == []
        assert states_of(server)[2] == "END"
        registry.rollback("shapes")
        registry.promote("shapes", 1)
        until(lambda: version_of(server) == 1)
        assert server.end() == 0


def test_a_load_that_hangs_times_out(serve, registry):
    make_hanging(registry, 2)
    with serve("--versions=2", "--load_timeout=8", wait=False) as server:
        server.wait_for_log(
            "version 2: not loaded; the loaded versions stay: it was not loaded within"
        )
        server.wait_until_ready()
        assert version_of(server) == 1
        assert states_of(server)[2] == "END"
        failed = 'cnn_jax_loads_total{model="shapes",outcome="failed"} '
        text = server.get("/metrics", headers=AS_CLIENT).text
        assert float(text.partition(failed)[2].split()[0]) >= 1  # The server tries again.
        assert server.end() == 0


def test_a_slow_load_delays_no_other_version(monkeypatch, caplog):
    monkeypatch.setattr(loader_module, "_SLOW_SECONDS", 0.2)
    gate = threading.Event()
    desired = {"shapes": DesiredState({1: "1"}, {"champion": 1})}
    opened = []

    def open_bundle(number):
        opened.append(number)
        assert number != 2 or gate.wait(20)
        return make_bundle(number)

    async def run():
        service, loader = make_loader(lambda: desired, open_bundle, poll=0.05)
        await loader.synchronize()
        # Version 2 is loaded first, because it is the default version.
        desired["shapes"] = DesiredState({2: "2", 1: "1", 3: "3"}, {"champion": 2})
        following = asyncio.ensure_future(loader.follow())
        while 3 not in service.models.loaded("shapes"):
            await asyncio.sleep(0.01)
        assert opened == [1, 2, 3]
        assert service.models.states("shapes")[2] == (LOADING, "")
        # The version is not loaded a second time, because the result of the thread can be used.
        desired["shapes"] = DesiredState({1: "1"}, {"champion": 1})
        await asyncio.sleep(0.3)
        desired["shapes"] = DesiredState({2: "2", 1: "1"}, {"champion": 2})
        await asyncio.sleep(0.3)
        assert opened == [1, 2, 3]
        gate.set()
        while service.models.default("shapes").number != 2:
            await asyncio.sleep(0.01)
        assert opened == [1, 2, 3]
        following.cancel()

    asyncio.run(run())
    assert "shapes, version 2: still loading after" in caplog.text


def make_fake_version(model, number, bundle, digest, *_):
    """Returns a version without programs, in place of `make_version`."""
    version = object.__new__(Version)
    predictor = types.SimpleNamespace(class_names=["a"])
    version.__dict__.update(
        model=model, number=number, digest=digest, predictor=predictor, in_use=0
    )
    return version


_FAILED_ONCE = b'cnn_jax_loads_total{model="shapes",outcome="failed"} 1.0'


@pytest.mark.parametrize("error", [None, BundleError("it is damaged"), KeyboardInterrupt()])
def test_a_late_load_is_used_or_tried_again(monkeypatch, caplog, error):
    """A load that hangs is not started again. If it ends at last, its version is served.

    A panic in the Rust code of obstore is a BaseException, as KeyboardInterrupt is.
    """
    monkeypatch.setattr(loader_module, "_FIRST_RETRY", 0.1)
    monkeypatch.setattr(loader_module, "make_version", make_fake_version)
    gate, opened = threading.Event(), []

    def open_bundle(number):
        opened.append(number)
        assert gate.wait(60)
        if error and len(opened) == 1:
            raise error

    async def run():
        desired = {"shapes": DesiredState({1: "1"}, {"champion": 1})}
        service, loader = make_loader(lambda: desired, open_bundle, poll=0.02, load_timeout=0.2)
        following = asyncio.ensure_future(loader.follow())
        while service.models.names == [] or service.models.states("shapes")[1][0] != END:
            await asyncio.sleep(0.01)
        assert b"cnn_jax_hanging_loads 1.0" in service.expose()
        await asyncio.sleep(0.5)
        assert opened == [1]
        loader._load_timeout = 60.0
        gate.set()
        while not service.models.is_ready():
            await asyncio.sleep(0.01)
        assert opened == [1, 1][: 1 + bool(error)]
        assert b"cnn_jax_hanging_loads 0.0" in service.expose()
        assert _FAILED_ONCE in service.expose()
        following.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert "it was not loaded within 0.2 s" in caplog.text
    assert "next try when this load ends" in caplog.text


def test_a_late_load_that_is_no_longer_wanted_is_not_used(monkeypatch):
    monkeypatch.setattr(loader_module, "make_version", make_fake_version)
    gate, wanted = threading.Event(), [2]

    def desired():
        number = wanted[-1]
        return {"shapes": DesiredState({number: str(number)}, {"champion": number})}

    def open_bundle(number):
        wanted.append(1)  # The alias moves while version 2 loads.
        assert number == 1 or gate.wait(60)

    async def run():
        service, loader = make_loader(desired, open_bundle, poll=0.02, load_timeout=0.5)
        following = asyncio.ensure_future(loader.follow())
        while not service.models.is_ready():
            await asyncio.sleep(0.01)
        while b"cnn_jax_hanging_loads 1.0" not in service.expose():
            await asyncio.sleep(0.01)
        # If the version is wanted again after the time limit, its load counts as failed.
        assert _FAILED_ONCE not in service.expose()
        wanted.append(2)
        while _FAILED_ONCE not in service.expose():
            await asyncio.sleep(0.01)
        state, message = service.models.states("shapes")[2]
        assert (state, message.partition(";")[0]) == (END, "it was not loaded within 0.5 s")
        wanted.append(1)
        while service.models.states("shapes")[2] != (END, ""):
            await asyncio.sleep(0.01)
        gate.set()
        while b"cnn_jax_hanging_loads 0.0" not in service.expose():
            await asyncio.sleep(0.01)
        assert set(service.models.loaded("shapes")) == {1}
        following.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))


_SLOW_PROGRAM = """
import sys, time
from cnn_jax.serve import loader
from cnn_jax.serve.__main__ import main
loader._SLOW_SECONDS = 0.2
open_ = loader.BundleSource.open
loader.BundleSource.open = lambda *args: (time.sleep(2), open_(*args))[1]
main(sys.argv[1:])
"""


def test_a_bundle_that_loads_slowly_is_served(tmp_path):
    write_bundle(make_bundle(), tmp_path / "bundle")
    flags = (f"--bundle={tmp_path}/bundle", "--max_batch=1")
    with Served(tmp_path, *flags, program=("-c", _SLOW_PROGRAM)) as server:
        server.wait_for_log("default, version 1: still loading after")
        assert version_of(server) == 1
        assert server.end() == 0


def test_pauses_between_reads_are_random():
    _, loader = make_loader(dict, poll=2.0)
    pauses = [loader._pause() for _ in range(1_000)]
    assert 1.0 <= min(pauses) < 1.1
    assert 2.9 < max(pauses) <= 3.0


def test_a_failing_source_is_read_again(caplog):
    errors = [RuntimeError("a fault")]

    def desired():
        if errors:
            raise errors.pop()
        return {"shapes": DesiredState({1: "1"}, {"champion": 1})}

    async def run():
        service, loader = make_loader(desired, poll=0.01)
        following = asyncio.ensure_future(loader.follow())
        while not service.models.is_ready():
            await asyncio.sleep(0.01)
        assert not following.done()
        following.cancel()

    asyncio.run(run())
    assert "cannot read the registry" in caplog.text


def test_another_alias_does_not_replace_a_default_version_that_is_not_loaded(monkeypatch):
    monkeypatch.setattr(loader_module, "make_version", make_fake_version)
    monkeypatch.setattr(loader_module, "_FIRST_RETRY", 0.05)
    is_damaged = True

    def desired():
        aliases = {"champion": 1, "challenger": 2}
        return {"shapes": DesiredState({1: "1", 2: "2"}, aliases)}

    def open_bundle(number):
        if number == 1 and is_damaged:
            raise BundleError("it is damaged")

    async def run():
        nonlocal is_damaged
        service, loader = make_loader(desired, open_bundle, poll=0.01)
        models = service.models
        following = asyncio.ensure_future(loader.follow())
        while not models.loaded("shapes"):
            await asyncio.sleep(0.01)
        assert not models.is_ready()
        with pytest.raises(Refused, match="shapes is not ready"):
            models.find()
        assert models.find(alias="challenger").number == 2
        assert models.aliases("shapes") == {"challenger": 2}
        is_damaged = False
        while not models.is_ready():
            await asyncio.sleep(0.01)
        assert models.find().number == models.find(alias="champion").number == 1
        assert models.default_alias("shapes") == "champion"
        following.cancel()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_the_time_until_a_retry_is_limited():
    _, loader = make_loader(dict)
    key = "shapes", 1, "1"
    waits = []
    for _ in range(1_100):  # 2**1024 is no float.
        loader._fail(key, BundleError("it is damaged"))
        wait, retry_at = loader._failures[key]
        assert retry_at - time.monotonic() == pytest.approx(wait, abs=1.0)
        waits.append(wait)
    assert waits[:7] == [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0]
    assert set(waits[7:]) == {300.0}


def test_a_repaired_version_that_is_wanted_again_is_loaded_at_once(monkeypatch):
    monkeypatch.setattr(loader_module, "make_version", make_fake_version)
    monkeypatch.setattr(loader_module, "_FIRST_RETRY", 300.0)
    wanted, damaged = [1], {2}

    def desired():
        return {"shapes": DesiredState({wanted[0]: "digest"}, {"champion": wanted[0]})}

    def open_bundle(number):
        if number in damaged:
            raise BundleError("it is damaged")

    async def run():
        service, loader = make_loader(desired, open_bundle, poll=0.01)
        for wanted[0], expected in ((1, 1), (2, 1), (1, 1)):
            await loader.synchronize()
            assert service.models.default("shapes").number == expected
        damaged.clear()
        wanted[0] = 2
        await loader.synchronize()
        assert service.models.default("shapes").number == 2

    asyncio.run(asyncio.wait_for(run(), 60))


def test_a_broken_new_model_does_not_affect_others(serve, registry, tmp_path):
    nan = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), make_bundle().variables)
    write_bundle(dataclasses.replace(make_bundle(), variables=nan), tmp_path / "nan")
    registry.add("birds", tmp_path / "nan")
    with serve() as server:
        registry.promote("birds", 1)
        server.wait_for_log("birds, version 1: not loaded")
        assert server.get("/readyz").status_code == 200
        # The request needs no model name, because only one model is loaded.
        assert version_of(server) == 1
        registry.promote("shapes", 2)
        until(lambda: version_of(server) == 2)
        # The broken model can be removed from the server.
        registry.remove_alias("birds", "champion")
        server.wait_for_log("birds: unloaded, because")
        assert server.get("/v1/models/birds", headers=AS_CLIENT).status_code == 404
        assert server.end() == 0


def test_a_model_without_its_alias_is_unloaded(serve, registry, tmp_path):
    add(registry, tmp_path, 7, "others")
    registry.promote("others", 1)
    with serve("--model=shapes,others") as server:
        assert version_of(server, "&model=others") == 1
        registry.remove_alias("others", "champion")
        until(lambda: version_of(server, "&model=others") == 404)
        assert server.get("/readyz").status_code == 200
        registry.promote("shapes", 2)
        until(lambda: version_of(server, "&model=shapes") == 2)
        registry.promote("others", 1)
        until(lambda: version_of(server, "&model=others") == 1)
        assert server.end() == 0


def test_a_version_loaded_again_while_in_use_is_available():
    async def run():
        desired = {"shapes": DesiredState({1: "1"}, {"champion": 1})}
        service, loader = make_loader(lambda: desired)
        await loader.synchronize()
        first = service.models.default("shapes")
        with first.hold():
            desired["shapes"] = DesiredState({2: "2"}, {"champion": 2})
            await loader.synchronize()
            desired["shapes"] = DesiredState({1: "1"}, {"champion": 1})
            await loader.synchronize()
        await asyncio.sleep(0.2)
        assert service.models.states("shapes")[1] == (AVAILABLE, "")
        assert service.models.states("shapes")[2] == (END, "")

    asyncio.run(run())


def test_a_missing_registry_does_not_stop_the_server(serve, registry, tmp_path):
    with serve() as server:
        (tmp_path / "registry").rename(tmp_path / "away")
        time.sleep(0.5)
        assert version_of(server) == 1
        (tmp_path / "away").rename(tmp_path / "registry")
        registry.promote("shapes", 2)
        until(lambda: version_of(server) == 2)
        assert server.end() == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--registry={tmp}/none"], "none"),
        (
            ["--registry={tmp}/registry", "--alias=challenger"],
            "promote MODEL VERSION --alias=challenger --reg",
        ),
        (["--registry={tmp}/registry", "--model=other"], "other"),
        (
            ["--registry={tmp}/registry", "--model=birds"],
            "birds has no alias champion; to create it: cnn_jax registry promote birds VERSION",
        ),
        (["--bundle={tmp}/none"], "is not a bundle"),
        ([], "--bundle or --registry"),
        (["--bundle={tmp}/bundle-shapes-1", "--host=256.0.0.1"], "cannot listen"),
        (["--bundle={tmp}/bundle-shapes-1", "--model=a,b"], "--bundle is one model"),
        (["--bundle={tmp}/bundle-shapes-1", "--tokens={tmp}/none"], "--tokens"),
        (["--bundle={tmp}/bundle-shapes-1", "--request_log={tmp}/none/log"], "--request_log"),
        (["--bundle={tmp}/bundle-shapes-1", "--max_batch=0"], "--max_batch"),
        (["--bundle={tmp}/bundle-shapes-1", "--port=70000"], "--port"),
        (["--bundle={tmp}/bundle-shapes-1", "--cors_origins=example.com"], "--cors_origins"),
        (["--bundle={tmp}/bundle-shapes-1", "--queue_pixels=9"], "--queue_pixels"),
        (["--bundle={tmp}/bundle-shapes-1", "--alias=mine"], "--alias needs --registry"),
        (["--bundle={tmp}/bundle-shapes-1", "--request_log_mb=9"], "_mb needs --request_log"),
        (["--bundle={tmp}/bundle-shapes-1", "--queue=127"], "--queue: must be at least twice"),
    ],
)
def test_a_wrong_start_is_one_error_line(registry, tmp_path, flags, message):
    add(registry, tmp_path, 1, "birds")
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    with Served(tmp_path, *flags, wait=False) as server:
        assert server.process.wait(60) in (1, 2)
        text = (tmp_path / "server.log").read_text()
        assert "Traceback" not in text
        assert message in text.splitlines()[-1]


def test_a_bundle_that_cannot_answer_ends_the_server(tmp_path):
    nan = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), make_bundle().variables)
    write_bundle(dataclasses.replace(make_bundle(), variables=nan), tmp_path / "nan")
    with Served(tmp_path, f"--bundle={tmp_path}/nan", wait=False) as server:
        assert server.process.wait(60) == 1
        assert "not probabilities" in (tmp_path / "server.log").read_text().splitlines()[-1]


def test_the_request_log_records_answers(serve, registry, tmp_path):
    """Two servers record answers in one folder, and each takes feedback to answers of the other."""
    folder = tmp_path / "log"
    flags = (f"--request_log={folder}", "--request_log_images", "--versions=2")
    ids = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    def post(server, path, body):
        headers = AS_CLIENT | {"X-Unit-Id": "user-7"}
        return server.post(path, body, headers=headers)

    def feedback(server, request_id, **fields):
        body = json.dumps({"request_id": request_id, **fields})
        return server.post("/feedback", body, headers=AS_CLIENT)

    with (
        serve(*flags, folder=tmp_path / "one") as one,
        serve(*flags, folder=tmp_path / "two") as two,
    ):
        for seed, (server, query) in enumerate(
            [(one, ""), (two, ""), (one, "?version=2"), (two, "?alias=champion")]
        ):
            ids.append(post(server, f"/predict{query}", encode(seed)).json()["request_id"])
        post(one, "/predict", b"no image")
        files = {f"{seed}.png": encode(seed) for seed in (7, 8)} | {"a.png": b"no image"}
        form = [("file", item) for item in files.items()]
        form.reverse()
        answer = one.post("/predict", files=form, headers=AS_CLIENT)
        ids += [answer.headers["x-request-id"]] * 2
        assert feedback(one, ids[0], label="red").status_code == 200
        until(lambda: len(read_requests(folder)) == 6)
        assert feedback(one, ids[1], label="red", reward=0.5).json()["request_id"] == ids[1]
        assert feedback(two, ids[4], label="blue", image_index=2).status_code == 200
        for request_id, fields, status, reason in (
            (ids[4], {"label": "blue", "image_index": 0}, 404, "no_request"),
            (ids[0], {"label": "rde"}, 400, "label"),
            ("f" * 32, {"reward": 1}, 404, "no_request"),
        ):
            answer = feedback(two, request_id, **fields)
            assert (answer.status_code, answer.json()["reason"]) == (status, reason)
        assert server.post("/feedback", "{}").status_code == 401
        assert one.end() == two.end() == 0
    rows = read_requests(folder).sort_by([("time", "ascending")]).to_pylist()
    assert [row["request_id"] for row in rows] == ids
    assert [row["image_index"] for row in rows] == [0, 0, 0, 0, 1, 2]
    assert [row["arm"] for row in rows] == ["champion", "champion", None, *["champion"] * 3]
    assert [row["unit"] for row in rows] == ["user-7"] * 4 + [None] * 2
    assert [row["version"] for row in rows] == [1, 1, 2, 1, 1, 1]
    for row, seed in zip(rows, (0, 1, 2, 3, 8, 7), strict=True):
        bundle = make_bundle(row["version"])
        predictor = BundlePredictor(bundle)
        pixels = preprocess_for_inference(encode(seed), predictor.preprocessing)[None]
        expected = predictor(pixels)[0]
        assert abs(row["time"].timestamp() - time.time()) < 600
        assert row["model"] == "shapes"
        assert row["digest"] == registry.resolve("shapes", row["version"]).bundle.digest
        assert class_names(folder, row["digest"]) == predictor.class_names
        assert row["class"] == predictor.class_names[int(expected.argmax())]
        assert row["confidence"] == pytest.approx(expected.max(), abs=1e-6)
        np.testing.assert_allclose(row["probabilities"], expected, atol=1e-6)
        own = embeddings(predictor, pixels)[0]
        np.testing.assert_allclose(row["embedding"], own, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(Image.open(io.BytesIO(row["image"])), pixels[0])
    found = read_feedback(folder).sort_by("time").to_pylist()
    assert [
        (one["request_id"], one["image_index"], one["label"], one["reward"]) for one in found
    ] == [
        (ids[0], 0, "red", None),
        (ids[1], 0, "red", 0.5),
        (ids[4], 2, "blue", None),
    ]


def test_a_known_network_is_not_timed_again():
    def make(number, bundle, served=()):
        return make_version("shapes", number, bundle, "digest", 10**6, (1, 2), served)

    first = make(1, make_bundle(1))
    second = make(2, make_bundle(2), [first])
    assert second.predict_program.seconds is first.predict_program.seconds
    image = np.zeros((2, 16, 16, 3), np.uint8)
    rows = [output.probabilities for output in second.predict_program.run(image)]
    np.testing.assert_allclose(rows, BundlePredictor(make_bundle(2))(image), atol=1e-6)
    (own,), (other,) = (version.explain_program.run(image[:1]) for version in (second, first))
    assert not np.array_equal(own.explanation, other.explanation)
    wider = make(3, make_bundle(3, ("a", "b", "c", "d")), [first, second])
    assert wider.predict_program.seconds is not first.predict_program.seconds
    larger = make_version("shapes", 4, make_bundle(1), "digest", 10**6, (1, 2, 4), [first])
    assert set(larger.predict_program.seconds) == {1, 2, 4}


def test_maps_are_compiled_before_a_version_serves(monkeypatch):
    counts = []

    def mean_grad_cam(members, images, classes):
        counts.append(len(images))
        return np.zeros((len(images), 16, 16), np.float32)

    monkeypatch.setattr(maps, "mean_grad_cam", mean_grad_cam)
    make_version("shapes", 1, make_bundle(), "digest", 10**6, (1,))
    assert counts == [1]


def test_with_every_flag_and_a_registry_on_s3(tmp_path, monkeypatch):
    (tmp_path / "tokens").write_text(f"predict {PREDICT}\n")
    with s3_service() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        registry = Registry(f"s3://{BUCKET}/registry")
        for seed in (1, 2):
            add(registry, tmp_path, seed)
        registry.promote("shapes", 1, "stable")
        flags = {
            "registry": registry.url,
            "model": "shapes",
            "alias": "stable",
            "versions": "2",
            "poll": "0.2",
            "load_timeout": "100",
            "health_port": "0",
            "host": "127.0.0.1",
            "tokens": tmp_path / "tokens",
            "max_batch": "4",
            "max_wait_ms": "50",
            "queue": "16",
            "queue_pixels": "20000",
            "timeout": "20",
            "max_body_mb": "0.5",
            "max_bodies_mb": "1",
            "max_pixels": "10000",
            "max_images": "4",
            "drain": "0.1",
            "allowed_hosts": "server.example",
            "cors_origins": "https://page.example",
            "trusted_proxies": "10.0.0.1",
            "request_log": tmp_path / "answers",
            "request_log_fraction": "0.5",
            "request_log_mb": "5",
            "log_level": "debug",
        }
        given = [f"--{name}={value}" for name, value in flags.items()]
        with Served(tmp_path, *given, "--request_log_images") as server:
            assert version_of(server) == 1
            assert version_of(server, "&version=2") == 2
            registry.promote("shapes", 2, "stable")
            until(lambda: version_of(server) == 2)
            start = time.monotonic()
            assert server.post("/predict", encode(), headers=AS_CLIENT).ok
            # The server waited for more requests before it computed the batch.
            assert time.monotonic() - start > 0.05
            too_much = server.post("/predict", b"x" * 600_000, headers=AS_CLIENT)
            assert too_much.status_code == 413
            help_ = subprocess.run(
                [sys.executable, "-m", "cnn_jax.serve", "--help"],
                capture_output=True,
                text=True,
                check=True,
                cwd=REPOSITORY,
            ).stdout
            every = set(re.findall(r"^  --(\w+)", help_, re.MULTILINE))
            assert every - flags.keys() <= {"help", "bundle", "port", "request_log_images"}
            assert server.end() == 0
        assert len(read_requests(flags["request_log"], ["image"]).drop_null()) > 0


def test_the_log_is_json(serve):
    with serve() as server:
        version_of(server)
        assert server.end() == 0
        assert json.dumps(server.log())
