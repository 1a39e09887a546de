"""Tests of experiments with real servers: two replicas, one registry and one request log."""

import contextlib
import json
import time

import numpy as np
import pytest
from bundles import encode_png, make_registry
from servers import Served

from cnn_jax.data.request_log import read_requests
from cnn_jax.experiment import __main__ as command


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
    return encode_png(pixels)


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return make_registry(tmp_path_factory.mktemp("split"), "shapes")


@pytest.fixture(scope="module")
def replicas(registry, tmp_path_factory):
    """Two servers that share the registry and the request log."""
    log = tmp_path_factory.mktemp("logs") / "log"
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                Served(
                    tmp_path_factory.mktemp("replica"),
                    f"--registry={registry.url}",
                    f"--request_log={log}",
                    "--poll=0.2",
                    "--max_batch=1",
                )
            )
            for _ in range(2)
        ]
        yield servers, log


def experiment(registry, *arguments):
    command.main([*arguments, f"--registry={registry.url}"])


def wait_for_arm(server, has_arm, unit="probe"):
    """Waits until a server has read the start or the end of an experiment."""
    end = time.monotonic() + 60
    while True:
        answer = server.post("/predict", picture(0), headers={"X-Unit-Id": unit})
        if ("x-arm" in answer.headers) == has_arm:
            return
        assert time.monotonic() < end
        time.sleep(0.2)


def show(registry, log, name, capfd):
    """Returns the result of the command, when all rows are written."""
    time.sleep(1)
    capfd.readouterr()
    experiment(registry, "show", "shapes", name, f"--log={log}", "--json")
    return json.loads(capfd.readouterr().out)


def test_replicas_agree_and_the_log_has_the_arms(registry, replicas, capfd):
    servers, log = replicas
    experiment(registry, "start", "shapes", "first", "--challenger=2", "--window=1s")
    for server in servers:
        wait_for_arm(server, True)
    arms = {}
    for number in range(30):
        unit = f"user-{number}"
        found, fields = [], {}
        for server in servers:
            answer = server.post("/predict", picture(number), headers={"X-Unit-Id": unit})
            fields = answer.json()
            found.append((answer.headers["x-arm"], fields["version"]))
        assert found[0] == found[1]
        arms[unit] = found[0]
        reward = {"request_id": fields["request_id"], "reward": float(fields["version"] == 2)}
        assert servers[0].post("/feedback", json.dumps(reward)).status_code in (200, 404)
    assert {*arms.values()} == {("first/champion", 1), ("first/challenger", 2)}
    time.sleep(1)
    rows = read_requests(log, ["unit", "arm", "version", "milliseconds"]).to_pylist()
    split = [row for row in rows if (row["unit"] or "").startswith("user-")]
    assert len(split) == 60
    assert all(arms[row["unit"]] == (row["arm"], row["version"]) for row in split)
    assert all(row["milliseconds"] > 0 for row in split)
    result = show(registry, log, "first", capfd)
    assert all(check["passed"] for check in result["checks"])
    units = {arm: values["units"] for arm, values in result["arms"].items()}
    assert sum(units.values()) == 31  # With the unit of `wait_for_arm`.
    for arm, version in (("champion", 1), ("challenger", 2)):
        with_arm = sum(value == (f"first/{arm}", version) for value in arms.values())
        assert with_arm <= units[arm] <= with_arm + 1
    metric = 'cnn_jax_arm_request_seconds_count{arm="first/challenger",status="200"}'
    assert servers[0].measure(metric) > 0


def test_other_protocols_send_the_arm(registry, replicas):
    server = replicas[0][0]
    body = {"inputs": [{"name": "image", "shape": [1, 4, 4, 3], "datatype": "UINT8"}]}
    body["inputs"][0]["data"] = [100] * 48
    for path, content in (
        ("/v2/models/shapes/infer", body),
        ("/v1/models/shapes:predict", {"instances": [[[[100] * 3] * 4] * 4]}),
    ):
        answer = server.post(path, json.dumps(content), headers={"X-Unit-Id": "user-1"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-arm"].startswith("first/")


def test_requests_outside_the_experiment_have_no_arm(registry, replicas):
    server = replicas[0][0]
    for path, unit in (
        ("/predict", None),
        ("/predict", "not an id"),
        ("/predict?version=2", "user-1"),
        ("/predict?alias=champion", "user-1"),
    ):
        answer = server.post(path, picture(1), headers={"X-Unit-Id": unit} if unit else {})
        assert "x-arm" not in answer.headers
        assert answer.json()["version"] == (2 if "version" in path else 1)


def test_shadow_predicts_without_answering(registry, replicas, capfd):
    servers, log = replicas
    experiment(registry, "end", "shapes")
    wait_for_arm(servers[0], False)
    flags = ("--challenger=2", "--shadow", "--fraction=0.99")
    experiment(registry, "start", "shapes", "second", *flags)
    wait_for_arm(servers[0], True, "user-1")
    ids = []
    for number in range(20):
        answer = servers[0].post("/predict", picture(number))
        assert answer.json()["version"] == 1
        if "x-arm" in answer.headers:
            assert answer.headers["x-arm"] == "second/champion"
            ids.append(answer.json()["request_id"])
    assert len(ids) >= 15
    time.sleep(1)
    label = json.dumps({"request_id": ids[0], "label": "red"})
    assert servers[0].post("/feedback", label).status_code == 200
    rows = read_requests(log, ["request_id", "arm", "version", "shadow_of"]).to_pylist()
    shadows = [row for row in rows if row["shadow_of"] in ids]
    assert sorted(row["shadow_of"] for row in shadows) == sorted(ids)
    assert {(row["arm"], row["version"]) for row in shadows} == {("second/challenger", 2)}
    assert not {row["request_id"] for row in shadows} & set(ids)
    result = show(registry, log, "second", capfd)
    assert result["images"] == 1
    assert result["arms"]["challenger"]["images"] >= 15
    assert 0 <= result["agreement"] <= 1


def test_promotion_ends_the_experiment(registry, replicas):
    servers, _ = replicas
    registry.promote("shapes", 2)
    wait_for_arm(servers[0], False, "user-1")
    assert registry.models["shapes"].running_experiment is None
    assert servers[0].post("/predict", picture(1)).json()["version"] == 2
