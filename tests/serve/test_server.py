"""Tests of the server's protocols over the network."""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import signal
import socket
import time

import numpy as np
import pytest
import requests
from bundles import make_bundle
from PIL import Image
from servers import Served

import cnn_jax
from cnn_jax.inference.bundle import digest, write_bundle
from cnn_jax.inference.predictor import BundlePredictor, predict_batch

KINDS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"]


def encode(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def picture(seed=0, size=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "bundle"
    write_bundle(make_bundle(), path)
    return path


@pytest.fixture(scope="module")
def predictor(bundle):
    return BundlePredictor.load(bundle)


@pytest.fixture(scope="module")
def server(bundle):
    with Served(
        bundle.parent,
        f"--bundle={bundle}",
        "--model=shapes",
        "--max_body_mb=1",
        "--max_images=8",
        "--max_pixels=250000",
        "--max_batch=8",
    ) as server:
        yield server
        assert server.end() == 0
        for line in server.log():
            assert line["level"] in ("info", "warning"), line


def expected_of(predictor, image):
    (prediction,) = predict_batch(predictor, [image])
    return prediction.probabilities


def error_of(answer):
    """Returns the status and the reason of an error response, and checks its JSON keys."""
    found = answer.json()
    assert found.keys() == {"error", "reason", "request_id"}
    assert found["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    return answer.status_code, found["reason"]


# Tests of the server's own protocol.


@pytest.mark.parametrize("kind", KINDS)
def test_answers_equal_the_predictor(server, predictor, kind):
    image = encode(picture(), kind)
    answer = server.post("/predict?top=3", image)
    assert answer.status_code == 200
    found = answer.json()
    assert (found["model"], found["version"]) == ("shapes", 1)
    (prediction,) = found["predictions"]
    expected = expected_of(predictor, image)
    order = np.argsort(-expected)
    assert [one["class"] for one in prediction["top"]] == [predictor.class_names[i] for i in order]
    np.testing.assert_allclose(
        [one["probability"] for one in prediction["top"]], expected[order], atol=1e-6
    )
    assert prediction["class"] == prediction["top"][0]["class"]
    assert prediction["probability"] == prediction["top"][0]["probability"]
    assert 0 < found["milliseconds"]["total"] < 10_000


def test_each_image_of_a_form_gets_its_answer(server, predictor):
    images = {f"{seed}.png": encode(picture(seed, (9 + seed, 40))) for seed in range(6)}
    files = [("file", item) for item in images.items()]
    files[2] = ("file", ("2.png", b"no image"))
    found = server.post("/predict?top=1", files=files).json()["predictions"]
    assert [one["name"] for one in found] == list(images)
    for one in found:
        if one["name"] == "2.png":
            assert one.keys() == {"name", "error", "reason"}
            assert one["reason"] == "format"
        else:
            expected = expected_of(predictor, images[one["name"]])
            assert one["class"] == predictor.class_names[int(expected.argmax())]
            assert one["probability"] == pytest.approx(expected.max(), abs=1e-6)


@pytest.mark.parametrize("spelling", ["grad_cam", "gradcam", "Grad-CAM"])
def test_a_map_as_png(server, predictor, spelling):
    answer = server.post(f"/predict?explain={spelling}", encode(picture()))
    found = answer.json()["predictions"][0]
    assert found["explanation"]["method"] == "grad_cam"
    with Image.open(io.BytesIO(base64.b64decode(found["explanation"]["png"]))) as shown:
        assert (shown.format, shown.size) == ("PNG", (16, 16))
        assert len(np.unique(np.asarray(shown).reshape(-1, 3), axis=0)) > 10
    expected = expected_of(predictor, encode(picture()))
    assert found["probability"] == pytest.approx(expected.max(), abs=1e-6)


def tensor(shape, datatype, data):
    """Returns a request body of the Open Inference Protocol, with one tensor."""
    return json.dumps({"inputs": [{"shape": shape, "datatype": datatype, "data": data}]})


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/predict", b"", (400, "no_image")),
        ("/predict", b"text", (415, "format")),
        ("/predict", encode(picture())[:-40], (422, "damaged")),
        ("/predict", encode(np.zeros((600, 600, 3), np.uint8)), (413, "too_many_pixels")),
        ("/predict", b"x" * 1_000_001, (413, "too_large")),
        ("/predict?top=0", b"x", (400, "parameter")),
        ("/predict?top=x", b"x", (400, "parameter")),
        ("/predict?explain=magic", b"x", (400, "parameter")),
        ("/predict?explain=occlusion", b"x", (400, "parameter")),
        ("/predict?version=0", b"x", (400, "parameter")),
        ("/predict?topk=3", b"x", (400, "parameter")),
        ("/predict?top=3&top=4", b"x", (400, "parameter")),
        ("/predict/?top=3", b"x", (404, "route")),
        ("/predict?version=2", b"x", (404, "no_version")),
        ("/predict?alias=champion", b"x", (404, "no_version")),
        ("/predict?model=other", b"x", (404, "no_model")),
        ("/nothing", b"x", (404, "route")),
        ("/healthz", b"x", (405, "route")),
        ("/feedback", b"{}", (400, "json")),
        ("/feedback", b"{}" + b" " * 10_000, (413, "too_large")),
        ("/feedback", b'{"request_id": "0", "label": "a"}', (400, "json")),
        ("/feedback", b'{"request_id": "%032d"}' % 0, (400, "json")),
        ("/feedback", b'{"request_id": "%032d", "label": "a", "lable": "b"}' % 0, (400, "json")),
        ("/feedback", b'{"request_id": "%032d", "reward": NaN}' % 0, (400, "json")),
        ("/feedback", b'{"request_id": "%032d", "label": "a"}' % 0, (404, "no_log")),
        ("/v1/models/other:predict", b"{}", (404, "no_model")),
        ("/v1/models/shapes/versions/7:predict", b"{}", (404, "no_version")),
        ("/v1/models/shapes/versions/x:predict", b"{}", (400, "parameter")),
        ("/v1/models/shapes:predict", b"[]", (400, "json")),
        ("/v1/models/shapes:predict", b"{}", (400, "json")),
        ("/v1/models/shapes:predict", b'{"instances": [], "inputs": []}', (400, "json")),
        ("/v1/models/shapes:predict", b'{"instances": []}', (400, "no_image")),
        ("/v1/models/shapes:predict", b'{"instances": [{"b64": "eA=="}]}', (415, "format")),
        ("/v1/models/shapes:predict", b'{"instances": [{"b32": "eA=="}]}', (400, "image")),
        ("/v1/models/shapes:predict", b'{"instances": [1]}', (400, "image")),
        ("/v1/models/shapes:predict", b'{"instances": 1}', (400, "json")),
        ("/v1/models/shapes:predict", b'{"signature_name": "a", "inputs": []}', (400, "signature")),
        ("/v1/models/shapes:classify", b"{}", (400, "signature")),
        ("/v1/models/shapes/versions/1:regress", b"{}", (400, "signature")),
        ("/v1/models/shapes/labels/default:classify", b"{}", (400, "signature")),
        ("/v1/models/shapes:prdict", b"{}", (404, "route")),
        ("/v1/models/shapes:predict", b'{"instances": [[[0.0, 1.0]]]}', (400, "image")),
        ("/v1/models/shapes:predict", b'{"instances": [{"image": [[2]], "size": 3}]}',
         (400, "image")),
        ("/v1/models/shapes:predict", b'{"inputs": {"image": [[[2]]], "a": 3}}', (400, "json")),
        ("/v1/models/shapes:predict", b'{"instances": [[[NaN]]]}', (400, "image")),
        ("/v2/models/other/infer", b"{}", (404, "no_model")),
        ("/v2/models/shapes/versions/7/infer", b"{}", (404, "no_version")),
        ("/v2/models/shapes/infer", b"{}", (400, "json")),
        ("/v2/models/shapes/infer", b'{"inputs": [1]}', (400, "json")),
        ("/v2/models/shapes/infer", tensor([1], "BYTES", []), (400, "json")),
        ("/v2/models/shapes/infer", tensor([1], "FP32", [1]), (400, "json")),
        ("/v2/models/shapes/infer", tensor([-1], "UINT8", []), (400, "json")),
        ("/v2/models/shapes/infer", tensor([1, 1, 1, 3], "UINT8", [1, 2]), (400, "image")),
        ("/v2/models/shapes/infer", tensor([1, 1, 1, 3], "UINT8", [1, 2, 256]), (400, "image")),
        ("/v2/models/shapes/infer", tensor([1, 1, 1, 3], "UINT8", [1, 0.5, 2]), (400, "image")),
        ("/v2/models/shapes/infer", tensor([2, 1, 1, 3], "UINT8", [9, 9, 9, 1, 0, 1]),
         (400, "image")),
        ("/v2/models/shapes/infer", tensor([1, 1, 1, 3], "FP32", [1, 0.5, 2]), (400, "json")),
        ("/v2/models/shapes/infer", tensor([10**9, 10**9, 9, 3], "UINT8", [1]), (400, "image")),
    ],
)  # fmt: skip
def test_invalid_requests_get_status_and_reason(server, path, body, expected):
    assert error_of(server.post(path, body)) == expected


def test_every_route_names_a_misspelt_parameter(server):
    """Every route refuses a misspelt parameter, and the error message names the parameter.

    Without the error, the server would answer a different request.
    """
    description = server.get("/openapi.json").json()["paths"]
    paths = [(method, path) for path, methods in description.items() for method in methods]
    paths += [("get", path) for path in ("/", "/docs", "/openapi.json", "/healthz", "/readyz")]
    assert len(paths) > 20
    values = {"model": "shapes", "version": 1, "alias": "default"}
    for method, path in paths:
        url = f"{server.url}{path.format_map(values)}?Explian=grad_cam"
        answer = requests.request(method, url, timeout=30)
        assert error_of(answer) == (400, "parameter"), path
        message = answer.json()["error"]
        assert "there is no parameter 'Explian'" in message
        hint = "did you mean explain?" if path == "/predict" else "this path takes no parameters"
        assert hint in message, path
    answer = server.post("/predict?nonsense", b"x")
    assert "use model, version, alias, top, explain" in answer.json()["error"]
    # Each documented parameter is accepted.
    for parameter in description["/predict"]["post"]["parameters"]:
        message = server.post(f"/predict?{parameter['name']}=", b"x").json()["error"]
        assert "there is no parameter" not in message


def test_router_errors_name_the_alternative(server):
    for method, path, status, words in (
        ("GET", "/predict", 405, "this path does not support GET; use POST"),
        ("GET", "/v1/models/shapes:predict", 405, "this path does not support GET; use POST"),
        ("POST", "/v1/models/shapes", 405, "use GET"),
        ("POST", "/predict/", 404, "no path ends with a slash"),
        ("GET", "/nothing", 404, "/docs lists the paths"),
        ("POST", "/v1/models/shapes:clasify", 404, "there is no :clasify; use :predict"),
        ("POST", "/v1/models/shapes:classify", 400, "send images to :predict"),
    ):
        answer = requests.request(method, server.url + path, timeout=30)
        assert answer.status_code == status, path
        assert words in answer.json()["error"]


def test_a_form_without_files_is_explained(server):
    answer = server.post("/predict", files={"file": (None, encode(picture()))})
    assert error_of(answer) == (400, "form")
    assert "the form's field 'file' is not a file" in answer.json()["error"]


def test_errors_name_the_index_of_an_instance(server):
    instances = [picture().tolist(), (picture() > 127).astype(float).tolist()]
    answer = server.post("/v1/models/shapes:predict", json.dumps({"instances": instances}))
    assert error_of(answer) == (400, "image")
    assert answer.json()["error"].startswith("instance 1: an image's numbers are all 0 or 1")


def test_too_many_images(server):
    files = [("file", (f"{n}.png", encode(picture()))) for n in range(9)]
    assert error_of(server.post("/predict", files=files)) == (413, "too_many")
    instances = [{"b64": base64.b64encode(encode(picture())).decode()}] * 9
    answer = server.post("/v1/models/shapes:predict", json.dumps({"instances": instances}))
    assert error_of(answer) == (413, "too_many")


def test_a_body_of_unknown_length_is_limited(server, predictor):
    image = encode(picture())
    answer = server.post("/predict?top=1", iter([image[:50], image[50:]]))
    assert answer.json()["predictions"][0]["probability"] == pytest.approx(
        expected_of(predictor, image).max(), abs=1e-6
    )
    # The server may refuse the request and close the connection before the whole body is sent.
    with contextlib.suppress(requests.ConnectionError):
        assert error_of(server.post("/predict", (b"x" * 100_000 for _ in range(20)))) == (
            413,
            "too_large",
        )


# Tests of the protocol of TensorFlow Serving.


def test_tensorflow_serving_in_rows_and_columns(server, predictor):
    images = [picture(seed, (12, 16)) for seed in range(3)]
    expected = [expected_of(predictor, image) for image in images]
    coded = [{"b64": base64.b64encode(encode(image)).decode()} for image in images]
    mixed = [coded[0], images[1].tolist(), {"image": coded[2]}]
    for path in ("shapes", "shapes/versions/1", "shapes/labels/default"):
        found = server.post(f"/v1/models/{path}:predict", json.dumps({"instances": mixed})).json()
        assert found.keys() == {"predictions"}
        np.testing.assert_allclose(found["predictions"], expected, atol=1e-6)
    for inputs in (coded, {"image": coded}):
        found = server.post("/v1/models/shapes:predict", json.dumps({"inputs": inputs})).json()
        assert found.keys() == {"outputs"}
        np.testing.assert_allclose(found["outputs"], expected, atol=1e-6)


def test_tensorflow_serving_status_and_metadata(server):
    status = {
        "version": "1",
        "state": "AVAILABLE",
        "status": {"error_code": "OK", "error_message": ""},
    }
    for path in ("shapes", "shapes/versions/1", "shapes/labels/default"):
        assert server.get(f"/v1/models/{path}").json() == {"model_version_status": [status]}
        metadata = server.get(f"/v1/models/{path}/metadata").json()
        assert metadata["model_spec"] == {"name": "shapes", "signature_name": "", "version": "1"}
        signature = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
        assert signature["outputs"]["probabilities"]["tensor_shape"]["dim"][1]["size"] == "3"
    assert error_of(server.get("/v1/models/shapes/versions/2")) == (404, "no_version")


# Tests of the Open Inference Protocol.


@pytest.mark.parametrize("nested", [False, True])
def test_open_inference_of_pixels(server, predictor, nested):
    images = np.stack([picture(seed, (10, 14)) for seed in range(3)])
    data = images.tolist() if nested else images.ravel().tolist()
    tensor = {"name": "image", "datatype": "UINT8", "shape": list(images.shape), "data": data}
    found = server.post(
        "/v2/models/shapes/infer", json.dumps({"id": "a", "inputs": [tensor]})
    ).json()
    assert (found["model_name"], found["model_version"], found["id"]) == ("shapes", "1", "a")
    probabilities, names = found["outputs"]
    assert (probabilities["name"], probabilities["datatype"]) == ("probabilities", "FP32")
    rows = np.reshape(probabilities["data"], probabilities["shape"])
    expected = np.stack([expected_of(predictor, image) for image in images])
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    assert names["shape"] == [3]
    assert names["data"] == [predictor.class_names[row.argmax()] for row in expected]


def test_open_inference_of_files(server, predictor):
    images = [encode(picture(seed)) for seed in range(2)]
    data = [base64.b64encode(image).decode() for image in images]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [2], "data": data}
    for path in ("shapes", "shapes/versions/1"):
        answer = server.post(f"/v2/models/{path}/infer", json.dumps({"inputs": [tensor]})).json()
        assert "id" not in answer
        rows = np.reshape(answer["outputs"][0]["data"], answer["outputs"][0]["shape"])
        np.testing.assert_allclose(
            rows, [expected_of(predictor, image) for image in images], atol=1e-6
        )


@pytest.mark.parametrize("kind", ["UINT8", "BYTES"])
def test_open_inference_of_binary_tensors(server, predictor, kind):
    """The clients of Triton send binary tensors by default."""
    if kind == "UINT8":
        images = list(np.stack([picture(seed) for seed in range(2)]))
        shape, binary = [2, 20, 30, 3], np.stack(images).tobytes()
    else:
        images = [encode(picture(seed)) for seed in range(2)]
        shape = [2]
        binary = b"".join(len(one).to_bytes(4, "little") + one for one in images)
    tensor = {
        "name": "image",
        "datatype": kind,
        "shape": shape,
        "parameters": {"binary_data_size": len(binary)},
    }
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    head = json.dumps({"inputs": [tensor], "outputs": outputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    found = server.post("/v2/models/shapes/infer", head + binary, headers=headers).json()
    (output,) = found["outputs"]
    assert output["name"] == "probabilities"
    rows = np.reshape(output["data"], output["shape"])
    np.testing.assert_allclose(rows, [expected_of(predictor, one) for one in images], atol=1e-6)
    cut = server.post("/v2/models/shapes/infer", (head + binary)[:-9], headers=headers)
    assert error_of(cut) == (400, "image")
    if kind == "UINT8":
        mask = (np.frombuffer(binary, np.uint8) > 127).astype(np.uint8).tobytes()
        answer = server.post("/v2/models/shapes/infer", head + mask, headers=headers)
        assert error_of(answer) == (400, "image")


@pytest.mark.parametrize("is_binary", [True, False])
def test_tritons_own_client(server, predictor, is_binary):
    """The test needs `tritonclient[http]`, which is no test dependency: it pins old libraries."""
    http = pytest.importorskip("tritonclient.http")
    client = http.InferenceServerClient(server.url.partition("//")[2])
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("shapes")
    assert client.get_model_metadata("shapes")["inputs"][0]["name"] == "image"
    images = np.stack([picture(seed) for seed in range(2)])
    pixels = http.InferInput("image", list(images.shape), "UINT8")
    pixels.set_data_from_numpy(images, binary_data=is_binary)
    encoded = np.array([encode(image) for image in images], object)
    files = http.InferInput("image", [2], "BYTES")
    files.set_data_from_numpy(encoded, binary_data=True)
    expected = [expected_of(predictor, image) for image in images]
    for asked in (pixels, files):
        found = client.infer("shapes", [asked], request_id="mine")
        assert found.get_response()["id"] == "mine"
        np.testing.assert_allclose(found.as_numpy("probabilities"), expected, atol=1e-6)
        best = [predictor.class_names[row.argmax()] for row in np.stack(expected)]
        assert found.as_numpy("class").tolist() == best
    with pytest.raises(Exception, match="there is no model 'other' here"):
        client.infer("other", [pixels])
    client.close()


def test_open_inference_of_other_names(server):
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    for wrong in (
        {"inputs": [tensor | {"name": "pixels"}]},
        {"inputs": [tensor], "outputs": [{"name": "logits"}]},
        {"inputs": [tensor], "outputs": "class"},
        {
            "inputs": [tensor],
            "outputs": [{"name": "probabilities", "parameters": {"classification": 2}}],
        },
    ):
        answer = server.post("/v2/models/shapes/infer", json.dumps(wrong))
        assert error_of(answer) == (400, "json")
    asked = {"inputs": [tensor], "outputs": [{"name": "class"}]}
    found = server.post("/v2/models/shapes/infer", json.dumps(asked)).json()
    assert [one["name"] for one in found["outputs"]] == ["class"]


def test_open_inference_metadata(server):
    assert server.get("/v2").json()["name"] == "cnn_jax"
    assert server.get("/v2/health/live").json() == {"live": True}
    assert server.get("/v2/health/ready").json() == {"ready": True}
    for path in ("shapes", "shapes/versions/1"):
        metadata = server.get(f"/v2/models/{path}").json()
        assert (metadata["name"], metadata["versions"]) == ("shapes", ["1"])
        assert metadata["inputs"][0]["shape"] == [-1, -1, -1, 3]
        assert server.get(f"/v2/models/{path}/ready").json()["ready"] is True
    assert error_of(server.get("/v2/models/other/ready")) == (404, "no_model")


# Tests of batching, limits, health and logs.


def test_batching_does_not_change_answers(server, predictor):
    """If many clients send different images at the same time, all predictions are correct."""
    images = [encode(picture(seed)) for seed in range(200)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda image: server.post("/predict?top=3", image), images))
    for image, answer in zip(images, answers, strict=True):
        (found,) = answer.json()["predictions"]
        expected = dict(zip(predictor.class_names, expected_of(predictor, image), strict=True))
        for one in found["top"]:
            assert one["probability"] == pytest.approx(expected[one["class"]], abs=1e-6)


def test_encoded_bodies_are_refused(server):
    answer = server.post("/predict", encode(picture()), headers={"Content-Encoding": "gzip"})
    assert error_of(answer) == (415, "encoding")
    assert answer.headers["accept-encoding"] == "identity"


def test_the_number_of_maps_is_limited(server):
    files = [("file", (f"{n}.png", encode(picture()))) for n in range(8)]
    found = server.post("/predict?explain=grad_cam", files=files).json()["predictions"]
    assert all(one["explanation"]["png"] for one in found)


def test_no_answer_redirects(server):
    answer = server.get("/healthz/", allow_redirects=False)
    assert error_of(answer) == (404, "route")
    for path in ("/", "/healthz", "/readyz"):
        answer = requests.head(server.url + path, timeout=10)
        assert (answer.status_code, answer.text) == (200, "")


@pytest.mark.parametrize("host", ["elsewhere.example", "127.0.0.1.example:80", "127.1", ""])
def test_other_names_of_the_server_are_refused(server, host):
    """Without tokens, a web page must not reach the server through a name of its own site."""
    for path in ("/", "/models", "/nothing"):
        answer = server.get(path, headers={"Host": host})
        assert error_of(answer) == (421, "host")
    for own in ("localhost.", "LOCALHOST:80", "127.0.0.9", f"[::1]:{server.port}", "10.0.0.1:80"):
        assert server.get("/models", headers={"Host": own}).status_code == 200


def test_web_pages_of_given_origins_may_send_requests(bundle, tmp_path):
    own, proxy = "https://page.example", "Server.example"
    flags = (f"--cors_origins={own}", f"--allowed_hosts={proxy}", "--trusted_proxies=10.0.0.1")
    (tmp_path / "tokens").write_text("predict token-of-a-client-01\n")
    tokens = f"--tokens={tmp_path}/tokens"
    with Served(tmp_path, f"--bundle={bundle}", "--max_batch=1", *flags, tokens) as server:
        asked = {"Access-Control-Request-Method": "POST"}
        asked |= {"Access-Control-Request-Headers": "authorization, x-unit-id"}
        for origin, status, allowed in ((own, 200, own), ("https://other.example", 400, None)):
            answer = requests.options(
                f"{server.url}/predict", headers={"Origin": origin, **asked}, timeout=10
            )
            assert answer.status_code == status
            assert answer.headers.get("access-control-allow-origin") == allowed
        sent = {"Origin": own, "Authorization": "Bearer token-of-a-client-01", "Host": proxy}
        answer = server.post("/predict", encode(picture()), headers=sent)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == own
        assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
        answer = server.post("/predict", encode(picture()), headers={"Origin": own})
        assert error_of(answer) == (401, "token")
        assert server.get("/healthz", headers={"Host": "x"}).status_code == 421
        assert server.end() == 0


def test_a_refusal_before_the_body_is_the_only_answer(server):
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(head)
        for _ in range(10):
            time.sleep(0.02)
            connection.sendall(b"x" * 10_000)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer


def test_health_metrics_and_descriptions(server, bundle):
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready", "loading": []}
    before = server.measure('cnn_jax_refused_total{reason="format"}')
    server.post("/predict", b"text")
    server.post("/predict", encode(picture()))
    assert server.measure('cnn_jax_refused_total{reason="format"}') == before + 1
    text = server.get("/metrics").text
    for name in (
        "requests_total",
        "request_seconds_bucket",
        "batch_images_bucket",
        "images_in_flight",
        "predictions_total",
        "version_loaded",
    ):
        assert f"\ncnn_jax_{name}" in text
    assert "process_resident_memory_bytes" in text
    (model,) = server.get("/models").json()["models"]
    assert model["versions"][0]["digest"] == digest(bundle)
    assert model["default"] == 1
    description = server.get("/openapi.json").json()
    assert description["info"]["version"] == cnn_jax.__version__
    assert {"/predict", "/v1/models/{model}:predict", "/v2/models/{model}/infer"} <= description[
        "paths"
    ].keys()
    docs = server.get("/docs").text
    assert "POST /v2/models/{model}/infer" in docs
    assert "http" not in re.sub(r"<title>.*", "", docs).replace("http-equiv", "")


def test_unknown_paths_share_one_metric(server):
    for number in range(5):
        server.get(f"/nothing/{number}")
        server.get(f"/v1/models/nothing-{number}")
    text = server.get("/metrics").text
    assert "nothing" not in text


def test_answers_have_security_headers(server):
    for path in ("/", "/docs", "/predict", "/nothing"):
        headers = server.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert re.fullmatch("[0-9a-f]{32}", headers["x-request-id"])
        assert "server" not in headers
    policy = server.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_harmless_headers_of_clients_are_logged(server):
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for number, (given, parent, is_kept) in enumerate(
        [
            ("abc-1.2:3_Z", trace, True),
            ("a b", trace[:-1], False),
            ("x" * 101, trace.upper(), False),
            ("<script>", f"{trace}-{trace}", False),
            ("", "", False),
        ]
    ):
        headers = {"X-Request-Id": given, "traceparent": parent}
        answer = server.get(f"/nothing/{number}", headers=headers)
        # The server gives each request an id of its own, because clients may repeat theirs.
        request_id = answer.headers["x-request-id"]
        assert re.fullmatch("[0-9a-f]{32}", request_id)
        server.wait_for_log(request_id)
        (line,) = [one for one in server.log() if one.get("request_id") == request_id]
        assert line.get("client_request_id") == (given if is_kept else None)
        assert line.get("traceparent") == (parent if is_kept else None)


def test_the_log_has_requests_without_image_content(server):
    secret = b"secret-content-of-an-image"
    answer = server.post("/predict?top=1", secret, headers={"X-Request-Id": "of-the-log"})
    assert answer.status_code == 415
    server.post("/predict?top=1", encode(picture()), headers={"X-Request-Id": "of-the-log-2"})
    server.wait_for_log("of-the-log-2")
    lines = {line.get("client_request_id"): line for line in server.log()}
    refused, answered = lines["of-the-log"], lines["of-the-log-2"]
    assert (refused["status"], refused["reason"], refused["path"]) == (415, "format", "/predict")
    assert (answered["status"], answered["model"], answered["version"]) == (200, "shapes", 1)
    assert answered["images"] == 1
    assert answered["milliseconds"] > 0
    assert secret.decode() not in json.dumps(server.log())


# Tests with hostile clients, and with clients that have slow connections.


def speak(server, *parts, wait=0.0, seconds=20):
    """Sends bytes; returns all received bytes until the connection is closed or times out."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        found = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(wait)
            while piece := connection.recv(65_536):
                found += piece
        except (TimeoutError, ConnectionError):
            pass
        return found


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 40_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 40_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        + b"".join(b"X%d: a\r\n" % n for n in range(5_000)),
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 400 + b"\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
        b"Content-Length: 6\r\n\r\nhello",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n",
    ],
)  # fmt: skip
def test_invalid_http_is_refused(server, request_bytes):
    answer = speak(server, request_bytes)
    assert re.match(rb"HTTP/1\.1 4\d\d ", answer) or not answer
    assert server.get("/healthz").status_code == 200


def test_a_short_body_leaves_no_memory(server):
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"x" * 1000)
    deadline = time.monotonic() + 10
    while server.measure("cnn_jax_body_bytes") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.measure("cnn_jax_body_bytes") == 0
    assert server.measure("cnn_jax_images_in_flight") == 0
    assert server.measure('cnn_jax_refused_total{reason="client_left"}') >= 20


def test_one_connection_serves_many_requests(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    image = encode(picture())
    for _ in range(5):
        connection.request("POST", "/predict", image)
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read()
    connection.close()
    # The client sends several requests without waiting for answers (pipelining).
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert speak(server, one * 3 + last).count(b"HTTP/1.1 200") == 4


def test_a_slow_request_does_not_delay_others(server):
    image = encode(picture())
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(image)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(head + image[:10])
    start = time.monotonic()
    assert server.post("/predict", image).status_code == 200
    assert time.monotonic() - start < 5
    for connection in slow:
        connection.sendall(image[10:])
    for connection in slow:
        with connection:
            connection.settimeout(20)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")


def test_requests_in_flight_are_answered_after_a_signal(bundle, tmp_path):
    image = encode(picture())
    with Served(tmp_path, f"--bundle={bundle}", "--max_batch=1") as server:
        head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(
            image
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head + image[:10])
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            with pytest.raises(requests.ConnectionError):
                server.get("/healthz")
            connection.sendall(image[10:])
            answer = connection.recv(65_536)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in answer
        assert server.process.wait(30) == 0


def test_readyz_fails_while_draining(bundle, tmp_path):
    with Served(tmp_path, f"--bundle={bundle}", "--max_batch=1", "--drain=2") as server:
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert error_of(server.get("/readyz")) == (503, "leaving")
        assert server.post("/predict", encode(picture())).status_code == 200
        assert server.process.wait(30) == 0


def test_health_checks_are_answered_beside_stalled_bodies(bundle, tmp_path):
    """1,200 clients send a part of a body and then nothing, and hold their connections open.

    With `pytest -s`, the test prints the number of checks and the slowest check.
    """
    flags = (f"--bundle={bundle}", "--max_batch=1", "--health_port=0")
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nx"
    times = {}
    with Served(tmp_path, *flags) as server, contextlib.ExitStack() as stack:
        health = server.wait_for_log(r"health checks on http://[\d.:]+/").split()[-1][:-1]
        for _ in range(1_200):
            address = ("127.0.0.1", server.port)
            stack.enter_context(socket.create_connection(address)).sendall(head)
        time.sleep(1.5)  # A client counts as stalled after a second.
        end = time.monotonic() + 6
        while time.monotonic() < end:
            # On the port of the traffic, a stalled request is aborted for each new connection.
            for url in (health, server.url):
                for path in ("/healthz", "/readyz", "/metrics"):
                    start = time.monotonic()
                    assert requests.get(url + path, timeout=5).status_code == 200
                    times.setdefault(url, []).append(time.monotonic() - start)
        for url, name in ((health, "health"), (server.url, "traffic")):
            print(f"port of {name}: {len(times[url])} checks, slowest {max(times[url]):.3f} s")
            assert max(times[url]) < 2
            assert len(times[url]) > 15
        assert requests.get(f"{health}/models", timeout=5).status_code == 404
        for host, status in (("elsewhere.example", 421), ("10.0.0.1", 200)):
            answer = requests.get(f"{health}/metrics", headers={"Host": host}, timeout=5)
            assert answer.status_code == status
        assert server.end() == 0
