"""Tests that hostile requests cause no internal error and no memory growth."""

import collections
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import pathlib
import random
import re
import threading
import time

import hypothesis
import numpy as np
import pytest
import requests
import schemathesis
from bundles import make_bundle
from PIL import Image
from schemathesis import checks
from schemathesis.specs.openapi import checks as openapi_checks
from servers import Served

from cnn_jax.inference.bundle import write_bundle

_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_TOKEN = "token-of-a-keeper-01"
AS_ADMIN = {"Authorization": f"Bearer {_TOKEN}"}
post = functools.partial(requests.post, headers=AS_ADMIN)
# The memory of a server may grow by this number of megabytes after the server is ready.
_MOST_MEGABYTES = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_bundle(make_bundle(), folder / "bundle")
    (folder / "tokens").write_text(f"predict {_TOKEN}\n")
    flags = (
        f"--bundle={folder}/bundle",
        "--model=default",
        "--max_batch=4",
        f"--tokens={folder}/tokens",
    )
    with Served(folder, *flags) as server:
        post(f"{server.url}/predict?explain=grad_cam", encode("PNG"), timeout=30)
        yield server
        assert server.end() == 0
        assert all(line["level"] != "error" for line in server.log())


def encode(kind, size=(40, 60)):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def peak_megabytes(server):
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000


def mutate(content, rng):
    """Returns the content with random bytes changed, removed or inserted."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(content) + 1)
        action = rng.randrange(4)
        if action == 0 and place < len(content):
            content[place] = rng.randrange(256)
        elif action == 1:
            del content[place : place + rng.randrange(1, 50)]
        elif action == 2:
            content[place:place] = rng.randbytes(rng.randrange(1, 50))
        else:
            content = content[: max(place, 1)]
    return bytes(content)


def test_mutated_images_and_bodies(server):
    """Sends 1,000 mutated images and bodies; the variable CNN_JAX_MUTATED changes this number.

    With `pytest -s`, the test prints the number of responses with each status.
    """
    count = int(os.environ.get("CNN_JAX_MUTATED", "1000"))
    rng, before = random.Random(0), peak_megabytes(server)
    images = [encode(kind) for kind in _KINDS]
    tensor = {"name": "a", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": list(range(12))}
    bodies = {
        "/v1/models/default:predict": {"instances": [np.zeros((3, 4, 3), int).tolist()]},
        "/v2/models/default/infer": {"id": "a", "inputs": [tensor]},
    }
    session = requests.Session()
    session.headers.update(AS_ADMIN)
    statuses = collections.Counter()
    for number in range(count):
        if number % 10 < 7:
            path, content = "/predict", rng.choice(images)
        else:
            path, body = rng.choice(list(bodies.items()))
            content = json.dumps(body).encode()
        mutated = mutate(content, rng)
        answer = session.post(f"{server.url}{path}", mutated, timeout=30)
        statuses[answer.status_code] += 1
        assert answer.status_code in (200, 400, 413, 415, 422), (path, mutated, answer.text)
    assert {200, 400, 415, 422} <= statuses.keys()
    grown = peak_megabytes(server) - before
    print(f"{count} mutated images and bodies: {dict(statuses)}; {grown:.0f} MB more at the peak")
    assert grown < _MOST_MEGABYTES


def bomb(kind):
    """Returns a small file of an image with very many pixels."""
    file = io.BytesIO()
    Image.new("L", (20_000, 8_000)).save(file, kind, **({"quality": 1} if kind == "JPEG" else {}))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_bombs_are_refused_by_their_headers(server, kind):
    before = peak_megabytes(server)
    answer = post(f"{server.url}/predict", bomb(kind), timeout=60)
    assert (answer.status_code, answer.json()["reason"]) in (
        (413, "too_many_pixels"),
        (413, "too_large"),
    )
    assert peak_megabytes(server) - before < _MOST_MEGABYTES


def test_deep_and_wide_json(server):
    before = peak_megabytes(server)
    for body in (
        b'{"instances": ' + b"[" * 1_000_000,
        b'{"instances": [' + b"0," * 5_000_000 + b"0]}",
        b'{"instances": [' + b"[[0,0,0]]," * 500_000 + b"0]}",
        b'{"inputs": {"image": [' + b'{"b64": ""},' * 300_000 + b"0]}}",
        b'{"instances": [' + b"1" * 5_000_000 + b"]}",
        b'{"instances": [' + b"[]," * 6_000_000 + b"0]}",
        b'{"instances": [' + b'"ab",' * 2_300_000 + b"0]}",
        b'{"instances": [' + b"300," * 2_300_000 + b"0]}",
        b'{"instances": {' + b",".join(b'"%d":0' % n for n in range(800_000)) + b"}}",
        # A NumPy array of strings would need the memory of the longest string for each element.
        b'{"instances": [["' + b"x" * 1_000_000 + b'"' + b',""' * 200_000 + b"]]}",
        b'{"instances": [{"b64": "' + "é".encode() * 5_000_000 + b'"}]}',
    ):
        answer = post(f"{server.url}/v1/models/default:predict", body, timeout=60)
        assert answer.status_code in (400, 413), answer.text
    assert peak_megabytes(server) - before < _MOST_MEGABYTES


def test_very_many_images_are_refused_before_they_are_converted(server):
    """To convert six million images would take up to a minute and a gigabyte."""
    count = 6_000_000
    before = peak_megabytes(server)
    heads = [{"datatype": "UINT8", "shape": [count, 1, 1, 3]}]
    heads.append({"datatype": "BYTES", "shape": [4_500_000]})
    requests_ = [
        ("/v2/models/default/infer", json.dumps({"inputs": [head]}).encode(), b"\0" * 3 * count)
        for head in heads
    ]
    instances = b'{"instances": [' + b"[[2]]," * 300_000 + b"[[2]]]}"
    requests_.append(("/v1/models/default:predict", instances, b""))
    for path, head, binary in requests_:
        headers = AS_ADMIN | {"Inference-Header-Content-Length": str(len(head))}
        answer = post(f"{server.url}{path}", head + binary, headers=headers, timeout=60)
        assert (answer.status_code, answer.json()["reason"]) == (413, "too_many"), answer.text
    assert peak_megabytes(server) - before < _MOST_MEGABYTES


def test_numbers_and_shapes_of_any_size(server):
    for tensor in (
        {"shape": [10**4000, 10**4000, 1, 3], "data": [1]},
        {"shape": [1] * 100_000, "data": [1]},
        {"shape": [1, 1, 1, 3], "data": [1, 2, 10**400]},
        {"shape": [1, 1, 1, 3], "data": ["x" * 1_000_000, 2, 3]},
    ):
        body = json.dumps({"inputs": [{"name": "image", "datatype": "UINT8", **tensor}]})
        answer = post(f"{server.url}/v2/models/default/infer", body, timeout=60)
        assert answer.status_code == 400, answer.text
        assert len(answer.text) < 1_000


@pytest.mark.parametrize(
    ("filename", "answered"), [(b"", (400, "form")), (b'; filename=""', (413, "too_many"))]
)
def test_forms_of_very_many_parts(server, filename, answered):
    field = b"--B\r\nContent-Disposition: form-data; name=f" + filename + b"\r\n\r\n\r\n"
    start = time.monotonic()
    answer = post(
        f"{server.url}/predict",
        field * 300_000 + b"--B--\r\n",
        headers=AS_ADMIN | {"Content-Type": "multipart/form-data; boundary=B"},
        timeout=60,
    )
    assert (answer.status_code, answer.json()["reason"]) == answered
    assert time.monotonic() - start < 5


def test_a_part_of_very_many_headers_is_refused(server):
    body = b"--B\r\n" + b"a:b\r\n" * 3_000_000 + b"\r\n\r\n--B--\r\n"
    start = time.monotonic()
    headers = AS_ADMIN | {"Content-Type": "multipart/form-data; boundary=B"}
    answer = post(f"{server.url}/predict", body, headers=headers, timeout=60)
    assert (answer.status_code, answer.json()["reason"]) == (400, "form")
    assert time.monotonic() - start < 1


def test_many_large_images_do_not_block_small_requests(server):
    black = io.BytesIO()
    Image.new("RGB", (4_000, 4_000)).save(black, "PNG")
    files = [("file", (f"{n}.png", black.getvalue())) for n in range(8)]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(post, f"{server.url}/predict", files=files, timeout=60)
        time.sleep(0.2)
        start = time.monotonic()
        assert post(f"{server.url}/predict", encode("PNG"), timeout=30).ok
        took = time.monotonic() - start
        assert not slow.done()
        assert slow.result().status_code == 200
    assert took < 2


@pytest.fixture(scope="module")
def open_server(tmp_path_factory):
    """A server without tokens; each request names its client in the header X-Forwarded-For."""
    folder = tmp_path_factory.mktemp("open")
    write_bundle(make_bundle(), folder / "bundle")
    with Served(folder, f"--bundle={folder}/bundle", "--max_batch=4") as server:
        yield server
        assert server.end() == 0


@pytest.mark.parametrize(
    ("clients", "images", "side", "allowed"),
    [
        # 64 images of 25 megapixels have more pixels than one client may ever use.
        (4, 64, 5_000, {413}),
        (4, 8, 5_000, {200, 429, 503}),
        (12, 16, 1_999, {200, 429, 503}),
    ],
)
def test_small_requests_are_answered_beside_large_images(
    open_server, clients, images, side, allowed
):
    """Small requests are answered while other clients send forms with many pixels."""
    file = io.BytesIO()
    Image.new("L", (side, side)).save(file, "PNG")
    files = [("file", (f"{n}.png", file.getvalue())) for n in range(images)]
    is_over = threading.Event()
    statuses = collections.Counter()

    def send(client, **options):
        headers = {"X-Forwarded-For": f"10.0.0.{client}"}
        return requests.post(f"{open_server.url}/predict", headers=headers, timeout=60, **options)

    def attack(number):
        while not is_over.is_set():
            statuses[send(number // 2, files=files).status_code] += 1

    times = []
    with concurrent.futures.ThreadPoolExecutor(2 * clients) as pool:
        attacks = [pool.submit(attack, number) for number in range(2 * clients)]
        time.sleep(2)
        end = time.monotonic() + 6
        while time.monotonic() < end:
            start = time.monotonic()
            answer = send(255, data=encode("PNG"))
            times.append(time.monotonic() - start)
            if answer.status_code != 200:
                break
        is_over.set()
        for one in attacks:
            one.result()
    print(f"{len(times)} small requests, the slowest {max(times):.2f} s; attack: {dict(statuses)}")
    assert answer.status_code == 200, answer.text
    assert len(times) > 1
    assert statuses.keys() <= allowed
    assert allowed & {413, 429} <= statuses.keys()


CHECKS = [
    checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_requests_generated_from_the_openapi_description(server, mode):
    """Schemathesis generates valid and invalid requests from the OpenAPI description."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 15
    asked = collections.Counter()
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=5,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def check(case):
            answer = case.call_and_validate(checks=CHECKS, headers=AS_ADMIN, timeout=30)
            asked[case.operation.label] += 1
            assert answer.status_code != 500

        # For some operations there are no invalid requests.
        with contextlib.suppress(hypothesis.errors.Unsatisfiable):
            check()
    assert len(asked) > 8
