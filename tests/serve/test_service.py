"""Tests of overload, timeouts and disconnects, with a simulated device that the tests control."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import pathlib
import re
import socket
import sys
import threading
import time

import numpy as np
import pytest
import requests
from bundles import make_bundle
from conftest import TRAINING_MODULES, imported_modules
from PIL import Image
from servers import until

import cnn_jax.serve
from cnn_jax.data.request_log import read_failures, read_requests
from cnn_jax.registry.split import Experiment
from cnn_jax.serve import app, http
from cnn_jax.serve.app import make_app, make_health_app
from cnn_jax.serve.engine import Engine, Program
from cnn_jax.serve.limits import Limits, Refused
from cnn_jax.serve.metrics import ServerMetrics
from cnn_jax.serve.request_log import RequestLog
from cnn_jax.serve.service import END, LOADING, Models, Service
from cnn_jax.serve.versions import Output, make_version


def encode(value=0):
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


class Gated:
    """A server in a thread, with a simulated device that waits until `gate` is set.

    Attributes:
      batches: The grey levels of the images of each batch.
    """

    def __init__(self, version, limits, queue, request_log=None):
        self.gate = threading.Event()
        self.batches = []

        def run(images):
            assert self.gate.wait(20)
            self.batches.append([int(image[0, 0, 0]) for image in images])
            # No network returns these embeddings, so a test can see where they are used.
            return [
                Output(row, np.full(2, index))
                for index, row in enumerate(version.predictor(images))
            ]

        version = dataclasses.replace(version, predict_program=Program(run, {1: 1.0}))
        self.engine = Engine(queue, decoders=2)
        self.service = Service(Models(), self.engine, limits, ServerMetrics(), request_log)
        self.service.models.add_model("default", is_required=True)
        self.service.models.add_version(version)
        self.service.models.set_aliases("default", {"default": 1})

        @contextlib.asynccontextmanager
        async def lifespan(_):
            self.engine.start()
            yield
            self.engine.close()

        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._server = http.make_server(
            make_app(self.service, None, lifespan), 0, 1, self.service.begin_shutdown
        )
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._server.serve([self._listener]))
        )
        self._thread.start()
        until(lambda: self._server.started)

    def end(self):
        self.gate.set()
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()

    def post(self, value=0):
        return requests.post(f"{self.url}/predict?top=1", encode(value), timeout=30)

    def refused(self, reason):
        return self.count(f'cnn_jax_refused_total{{reason="{reason}"}}')

    def count(self, metric):
        name = f"{metric} "
        text = requests.get(f"{self.url}/metrics", timeout=30).text
        return float(text.partition(name)[2].split("\n")[0] or 0)


@pytest.fixture(scope="module")
def version():
    return make_version("default", 1, make_bundle(), "0", 1_000_000, (1,))


@pytest.fixture
def serve(version):
    with contextlib.ExitStack() as stack:

        def serve(queue=100, request_log=None, **limits):
            gated = Gated(version, Limits(**limits), queue, request_log)
            stack.callback(gated.end)
            return gated

        yield serve


@pytest.fixture
def pool():
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        yield pool


def test_an_overloaded_server_sends_retry_after(serve, pool):
    server = serve(queue=6)
    held = [pool.submit(server.post, value) for value in range(3)]
    until(lambda: server.engine.in_flight == 3)
    for _ in range(3):
        answer = server.post(9)
        assert answer.status_code == 429
        assert answer.json()["reason"] == "busy"
        assert int(answer.headers["retry-after"]) >= 1
    assert requests.get(f"{server.url}/readyz", timeout=10).status_code == 200
    server.gate.set()
    assert [future.result().status_code for future in held] == [200] * 3
    assert server.post(4).status_code == 200
    assert sorted(value for batch in server.batches for value in batch) == [0, 1, 2, 4]
    assert server.engine.in_flight == 0


def test_more_images_than_the_queue_are_refused(serve):
    server = serve(queue=7)
    files = [("file", (f"{n}.png", encode(n))) for n in range(4)]
    answer = requests.post(f"{server.url}/predict", files=files, timeout=30)
    assert answer.status_code == 429


def test_a_timed_out_request_is_dropped(serve, pool):
    server = serve(seconds=0.6)
    first = pool.submit(server.post, 1)
    until(lambda: server.engine.in_flight == 1)
    late = [pool.submit(server.post, value) for value in (2, 3)]
    until(lambda: server.engine.in_flight == 3)
    time.sleep(0.8)
    server.gate.set()
    for future in late:
        answer = future.result()
        assert answer.status_code == 503
        assert answer.json()["reason"] == "late"
        assert answer.headers["retry-after"] == "1"
    # The first request also times out, although its batch is already running.
    assert first.result().json()["reason"] == "late"
    assert server.post(4).status_code == 200
    assert server.batches == [[1], [4]]


def test_images_of_a_disconnected_client_are_not_computed(serve, pool):
    server = serve()
    first = pool.submit(server.post, 1)
    until(lambda: server.engine.in_flight == 1)
    image = encode(2)
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(image)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + image)
        until(lambda: server.engine.in_flight == 2)
    until(lambda: server.engine.in_flight == 1)
    last = pool.submit(server.post, 3)
    until(lambda: server.engine.in_flight == 2)
    server.gate.set()
    assert first.result().status_code == last.result().status_code == 200
    assert server.batches == [[1], [3]]
    assert server.refused("client_left") == 1


def test_a_missing_body_times_out(serve):
    server = serve(seconds=0.5)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        start = time.monotonic()
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\nx")
        version = server.service.models.find()
        # The request keeps the version in use, so the version is not unloaded before the body
        # arrives.
        until(lambda: version.in_use == 1)
        # The loop ends when the server closes the connection.
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"reason":"slow"' in answer
        assert 0.4 < time.monotonic() - start < 5
    assert server.service._bodies.num_bytes == 0
    assert version.in_use == 0


def test_bodies_are_limited_for_each_client(serve):
    server = serve(body_bytes=2_000_000, all_bytes=6_000_000)

    def post(client, size):
        # The server trusts this header from a proxy on its own machine.
        headers = {"X-Forwarded-For": client}
        return requests.post(f"{server.url}/predict", b"x" * size, headers=headers, timeout=10)

    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 10.0.0.1\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as one:
        one.sendall(head + b"Content-Length: 2000000\r\n\r\n" + b"x" * 1_999_999)
        until(lambda: server.service._bodies.num_bytes == 1_999_999)
        answer = post("10.0.0.1", 1_100_000)
        assert (answer.status_code, answer.json()["reason"]) == (429, "busy")
        assert post("10.0.0.1", 900_000).status_code == 415
        assert post("10.0.0.2", 2_000_000).status_code == 415
    until(lambda: server.service._bodies.num_bytes == 0)


def test_a_prediction_that_the_challenger_skips_is_counted(serve, version):
    server = serve()
    server.gate.set()
    quota = server.service._bodies._quota

    def run(images):
        quota.limit = 0  # From now on, no body fits.
        return [Output(row, np.zeros(2)) for row in version.predictor(images)]

    champion = dataclasses.replace(version, predict_program=Program(run, {1: 1.0}))
    server.service.models.add_version(champion)
    server.service.models.add_version(dataclasses.replace(version, number=2))
    running = make_experiment("default", is_shadow=True)
    server.service.models.set_experiment("default", running)
    unit = next(unit for unit in map(str, range(99)) if running.arm(unit) == "challenger")
    headers = {"X-Unit-Id": unit}
    answer = requests.post(f"{server.url}/predict", encode(), headers=headers, timeout=10)
    assert answer.status_code == 200
    until(lambda: server.count('cnn_jax_shadow_skipped_total{model="default"}') == 1, 5)


def test_images_are_limited_for_each_client(serve, pool):
    server = serve(queue=6)

    def post(client, value):
        headers = {"X-Forwarded-For": client}
        body = encode(value)
        return requests.post(f"{server.url}/predict", body, headers=headers, timeout=30)

    held = [pool.submit(post, "10.0.0.1", value) for value in range(3)]
    until(lambda: server.engine.in_flight == 3)
    assert post("10.0.0.1", 9).status_code == 429
    held.append(pool.submit(post, "10.0.0.2", 3))
    until(lambda: server.engine.in_flight == 4)
    server.gate.set()
    assert [future.result().status_code for future in held] == [200] * 4


def test_ipv6_addresses_with_64_equal_bits_are_one_client(serve, pool):
    server = serve(queue=2)

    def post(client):
        headers = {"X-Forwarded-For": client}
        return requests.post(f"{server.url}/predict", encode(), headers=headers, timeout=30)

    held = pool.submit(post, "2001:db8::1")
    until(lambda: server.engine.in_flight == 1)
    for client in ("2001:db8::9:1", "2001:db8:0:0:ffff::1"):
        assert post(client).status_code == 429
    server.gate.set()
    assert held.result().status_code == 200
    keys = {app._client_network(f"::ffff:10.0.0.{number}") for number in (1, 1, 2)}
    assert keys == {"10.0.0.1", "10.0.0.2"}
    assert app._client_network("fe80::1%eth0") == app._client_network("fe80::2%eth0")
    assert app._client_network("unix:") == "unix:"


def test_a_file_with_more_pixels_than_it_says_is_refused(serve):
    """The first frame of this GIF has more pixels than the header of the file says."""
    server = serve()
    file = io.BytesIO()
    Image.new("L", (900, 900)).save(file, "GIF")
    content = bytearray(file.getvalue())
    content[6:10] = b"\x10\0\x10\0"
    answer = requests.post(f"{server.url}/predict", bytes(content), timeout=10)
    assert (answer.status_code, answer.json()["reason"]) == (413, "too_many_pixels")


def test_internal_errors_have_no_details(serve, version, caplog):
    server = serve()

    def fail(images):
        raise RuntimeError("secret of the device")

    broken = dataclasses.replace(version, predict_program=Program(fail, {1: 1.0}))
    server.service.models.add_version(broken)
    answer = server.post()
    assert answer.status_code == 500
    assert answer.json()["reason"] == "internal"
    assert "secret" not in answer.text
    until(lambda: any("secret of the device" in str(one.exc_info) for one in caplog.records))
    assert server.service.engine.in_flight == 0
    assert requests.get(f"{server.url}/healthz", timeout=10).status_code == 200


def test_the_log_computes_nothing_again(serve, tmp_path):
    """The recorded embedding is the one that the batch of the answer returned."""
    log = RequestLog(tmp_path / "log")
    server = serve(request_log=log)
    server.gate.set()
    for value in range(3):
        answer = server.post(value)
        assert answer.status_code == 200
    log.close()
    assert server.batches == [[0], [1], [2]]
    rows = read_requests(tmp_path / "log").to_pylist()
    assert [row["embedding"] for row in rows] == [[0.0, 0.0]] * 3
    assert rows[-1]["request_id"] == answer.json()["request_id"]


# Tests of the states of models and versions.


def test_open_inference_reports_readiness(serve):
    server = serve()

    def status(path):
        return requests.get(f"{server.url}/v2/{path}", timeout=10).status_code

    server.service.models.set_state("default", 2, LOADING)
    assert requests.get(f"{server.url}/readyz", timeout=10).json()["loading"][0]["version"] == 2
    found = requests.get(f"{server.url}/v2/models/default", timeout=10).json()
    assert found["versions"] == ["1"]  # Only loaded versions are listed.
    own = "models/default/versions"
    assert [status(f"{own}/{number}/ready") for number in (1, 2, 3)] == [200, 503, 404]
    ready = ("health/ready", "models/default/ready", f"{own}/1/ready")
    assert [status(path) for path in ready] == [200] * 3
    server.service.begin_shutdown()
    assert [status(path) for path in ready] == [503] * 3
    assert status("health/live") == 200


def test_readyz_names_the_versions_that_load(serve):
    server = serve()
    server.service.models.set_aliases("default", {"default": 2})
    server.service.models.set_state("default", 2, LOADING)
    answer = requests.get(f"{server.url}/readyz", timeout=10)
    assert answer.status_code == 503
    assert re.search(r"version 2 of default has been loading for \d+ s", answer.json()["error"])
    server.service.models.set_state("default", 2, END)
    answer = requests.get(f"{server.url}/readyz", timeout=10)
    assert "no version is loading" in answer.json()["error"]


def test_metrics_can_be_read_by_several_threads(version, pool):
    """Threads that read the metrics at the same time all see the versions being loaded."""
    engine = Engine(9)
    service = Service(Models(), engine, Limits(), ServerMetrics())
    for number in range(50):
        service.models.set_state("default", number, LOADING)

    def read(_):
        return [service.expose().count(b"cnn_jax_version_loading_seconds{") for _ in range(50)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # The threads take turns often.
    try:
        assert {count for counts in pool.map(read, range(4)) for count in counts} == {50}
    finally:
        sys.setswitchinterval(interval)


def test_a_hanging_event_loop_fails_the_health_check(monkeypatch):
    monkeypatch.setattr("cnn_jax.serve.engine._HANGING_SECONDS", 0.3)
    monkeypatch.setattr("cnn_jax.serve.engine._BEAT_SECONDS", 0.05)
    engine = Engine(9)
    service = Service(Models(), engine, Limits(), ServerMetrics())
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/healthz"

    async def run():
        engine.start()
        await asyncio.sleep(0.5)
        assert await asyncio.to_thread(lambda: requests.get(url, timeout=10).status_code) == 200
        time.sleep(0.6)  # The event loop hangs, while the thread of the health checks answers.
        assert requests.get(url, timeout=10).json()["reason"] == "hanging"
        await asyncio.sleep(0.2)
        assert await asyncio.to_thread(lambda: requests.get(url, timeout=10).status_code) == 200
        engine.close()

    with listener, http.serving_in_thread(make_health_app(service), listener):
        asyncio.run(run())


def test_models_are_found_by_name_number_and_alias(version):
    models = Models()
    assert not models.is_ready()
    models.add_model("one", is_required=True)
    assert models.names == ["one"]
    assert not models.is_ready()

    def refused(*arguments, **options):
        with pytest.raises(Refused) as caught:
            models.find(*arguments, **options)
        return caught.value.status

    assert refused() == 503
    models.set_state("one", 3, LOADING)
    assert models.states("one") == {3: (LOADING, "")}
    three = dataclasses.replace(version, model="one", number=3)
    five = dataclasses.replace(version, model="one", number=5)
    models.add_version(three)
    assert refused("one") == 503  # No alias selects a version yet.
    models.set_aliases("one", {"champion": 3, "challenger": 5})
    assert models.is_ready()
    assert models.find() is models.find("one") is models.find(alias="champion") is three
    assert models.find("one", 3) is three
    assert models.aliases("one") == {"champion": 3}
    assert refused(alias="challenger") == refused("one", 5) == refused("two") == 404
    models.add_version(five)
    assert models.find(alias="challenger") is five
    models.set_aliases("one", {"champion": 5})
    assert models.find() is five
    assert models.remove_version("one", 3) is three
    assert refused("one", 3) == 404
    models.add_model("two", is_required=False)
    assert models.find() is five  # Only the model "one" has a default version.
    assert models.is_ready()
    assert not models.is_ready("two")
    two = dataclasses.replace(version, model="two", number=1)
    models.add_version(two)
    models.set_aliases("two", {"champion": 1})
    assert refused() == 400
    models.remove_model("two")
    assert models.find() is five
    assert models.names == ["one"]
    for number in range(100):
        models.set_state("one", number, END)
    assert len(models.states("one")) < 30


def make_experiment(model, is_shadow=False):
    return Experiment(
        name="blue",
        salt="s",
        fraction=0.5,
        outcome="reward",
        window=1.0,
        is_shadow=is_shadow,
        model=model,
        alias="champion",
        champion=1,
        challenger=2,
        start="now",
    )


@pytest.mark.parametrize("is_shadow", [False, True])
def test_failures_of_the_challenger_are_recorded(serve, version, tmp_path, is_shadow):
    log = RequestLog(tmp_path / "log")
    server = serve(request_log=log)
    server.gate.set()

    def fail(images):
        raise RuntimeError("broken")

    broken = dataclasses.replace(version, number=2, predict_program=Program(fail, {1: 1.0}))
    server.service.models.add_version(broken)
    running = make_experiment("default", is_shadow)
    server.service.models.set_experiment("default", running)
    arms = {unit: running.arm(unit) for unit in map(str, range(8))}
    for unit, arm in arms.items():
        headers = {"X-Unit-Id": unit}
        answer = requests.post(f"{server.url}/predict", encode(), headers=headers, timeout=30)
        is_failure = arm == "challenger" and not is_shadow
        assert answer.status_code == (500 if is_failure else 200)
    count = sum(arm == "challenger" for arm in arms.values())
    assert 0 < count < 8
    until(lambda: not server.service._shadow_tasks)
    log.close()
    found = read_failures(tmp_path / "log").to_pylist()
    units = [unit for unit, arm in arms.items() if arm == "challenger"]
    assert sorted(row["unit"] for row in found) == units
    assert {(row["arm"], row["reason"]) for row in found} == {("blue/challenger", "internal")}
    rows = read_requests(tmp_path / "log").to_pylist()
    assert len(rows) == (8 if is_shadow else 8 - count)
    assert {row["version"] for row in rows} == {1}


def test_the_images_of_a_shadow_count_as_bodies(serve, version):
    """The challenger may still compute long after the request was answered."""
    server, gate = serve(), threading.Event()
    server.gate.set()

    def run(images):
        assert gate.wait(20)
        return [Output(row, np.zeros(2)) for row in version.predictor(images)]

    slow = dataclasses.replace(version, number=2, predict_program=Program(run, {1: 1.0}))
    server.service.models.add_version(slow)
    running = make_experiment("default", is_shadow=True)
    server.service.models.set_experiment("default", running)
    unit = next(unit for unit in map(str, range(99)) if running.arm(unit) == "challenger")

    image = encode()
    answer = requests.post(f"{server.url}/predict", image, headers={"X-Unit-Id": unit}, timeout=10)
    assert answer.status_code == 200
    until(lambda: server.service._bodies.num_bytes == len(image), 5)
    gate.set()
    until(lambda: server.service._bodies.num_bytes == 0)


def test_experiment_needs_both_versions(version):
    models = Models()
    models.add_model("one", is_required=True)
    one, two, three = (
        dataclasses.replace(version, model="one", number=number) for number in (1, 2, 3)
    )
    running = make_experiment("one")
    models.set_experiment("one", running)
    assert models.experiment("one") is None
    models.add_version(one)
    models.set_aliases("one", {"champion": 1})
    assert models.experiment("one") is None
    models.add_version(two)
    assert models.experiment("one") == (running, two)
    # The alias has moved before this server has read the end of the experiment.
    models.add_version(three)
    models.set_aliases("one", {"champion": 3})
    assert models.experiment("one") is None
    models.set_aliases("one", {"champion": 1})
    models.set_experiment("one", None)
    assert models.experiment("one") is None


def test_serving_imports_no_training_code():
    folder = pathlib.Path(cnn_jax.serve.__file__).parent
    # The request log is imported only with --request_log, because it needs more libraries.
    left_out = ("__main__", "request_log")
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem not in left_out)
    names = [f"cnn_jax.serve.{module}" for module in modules] + ["cnn_jax.registry.registry"]
    assert not imported_modules(*names) & {*TRAINING_MODULES, "mlflow", "pyarrow"}
