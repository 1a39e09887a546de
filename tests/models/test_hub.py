import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import REPOSITORY
from fake_hub import COMMIT, FakeHub

from cnn_jax.models import hub as hub_module
from cnn_jax.models import pretrained
from cnn_jax.system.errors import ConfigError

MODEL = "timm/resnet50.a1_in1k"
WEIGHTS = safetensors.numpy.save({"fc.bias": np.arange(3000, dtype=np.float32)})
CONFIG = {"architecture": "resnet50", "num_classes": 3000}
CARD = b"---\nlicense: apache-2.0\ntags: [timm]\n---\n# A model card\n"
# This program downloads models, and prints a line of JSON for each model. It replaces `time.sleep`,
# so that huggingface_hub does not wait between two attempts.
DRIVER = """
import dataclasses, json, sys, time
time.sleep = lambda seconds: None
from cnn_jax.models import hub
from cnn_jax.system.errors import UserError
for name in sys.argv[1:]:
    try:
        print(json.dumps(dataclasses.asdict(hub.download(name)), default=str))
    except UserError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.fixture
def hub():
    with FakeHub() as hub:
        files = {"model.safetensors": WEIGHTS, "config.json": json.dumps(CONFIG).encode()}
        hub.models[MODEL] = {**files, "README.md": CARD}
        yield hub


@pytest.fixture
def download(hub, tmp_path):
    """Returns a function that downloads models in a new process, to a cache in `tmp_path`."""
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

    def run(*names, **variables):
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), *sys.path])),
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **variables,
        }
        result = subprocess.run(
            [sys.executable, "-c", DRIVER, *names],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not result.returncode, result.stderr
        assert "Retrying" not in result.stderr
        results = [json.loads(line) for line in result.stdout.splitlines()]
        for outcome in results:
            assert not isinstance(outcome, list) or "\n" not in outcome[1]
        return results

    return run


def test_a_model_is_downloaded_once_and_keeps_its_revision(download, hub):
    (first,) = download(MODEL)
    assert first["name"] == f"{MODEL}@{COMMIT}"
    assert first["config"] == CONFIG
    assert first["license"] == "apache-2.0"
    assert first["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert pathlib.Path(first["weights"]).read_bytes() == WEIGHTS
    # No request is sent for a name with a commit, and no request is sent in offline mode.
    before = len(hub.requests)
    assert download(first["name"]) == [first]
    assert download(MODEL, HF_HUB_OFFLINE="1") == [first]
    assert len(hub.requests) == before
    # If the hub does not answer, the cache is used.
    assert download(MODEL, HF_ENDPOINT="http://127.0.0.1:9") == [first]


def test_a_revision_can_be_a_tag_and_files_may_be_missing(download, hub):
    hub.models["timm/bare"] = {"model.safetensors": WEIGHTS}
    tag, bare, unknown = download(f"{MODEL}@v1", "timm/bare", f"{MODEL}@v2")
    assert tag["name"] == f"{MODEL}@{COMMIT}"
    assert (bare["config"], bare["license"]) == ({}, "")
    assert bare["name"] == f"timm/bare@{COMMIT}"
    assert unknown[0] == "ConfigError"
    assert f"{MODEL} has no revision v2" in unknown[1]


def test_refusals_say_what_to_do(download, hub):
    hub.models["timm/pickle"] = {"pytorch_model.bin": b"", "config.json": b"{}"}
    hub.errors["owner/gated"] = 401, {"X-Error-Code": "GatedRepo"}
    hub.errors["owner/broken"] = 403, {}
    outcomes = download(
        *("timm/resnet50.a1_in1", "timm/resnet50", "timm/resnt50.a1_in1k", "owner/name"),
        *("timm/pickle", "owner/gated", "owner/broken"),
    )
    kinds, messages = zip(*outcomes, strict=True)
    assert kinds == ("ConfigError",) * 6 + ("WeightsError",)
    for message in messages[:3]:
        assert f"has no such model; did you mean {MODEL}?" in message
    assert "there is no path owner/name" in messages[3]
    assert "hf auth login" in messages[3]
    assert "timm/pickle has no model.safetensors" in messages[4]
    assert f"owner/gated has terms of use; accept them at {hub.url}/owner/gated" in messages[5]
    assert "refused owner/broken" in messages[6]


def test_a_download_that_is_cut_off_continues_or_says_so(download, hub):
    hub.cut_after, hub.cuts = 5000, 1
    (outcome,) = download(MODEL)
    assert outcome["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    hub.models["timm/other"], hub.cuts = hub.models[MODEL], 1000
    (outcome,) = download("timm/other")
    assert outcome[0] == "WeightsError"
    assert "the download of model.safetensors of timm/other was cut off (" in outcome[1]
    assert outcome[1].endswith("start the same command again")
    hub.cuts = 0
    (outcome,) = download("timm/other")
    assert outcome["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()


def test_without_a_connection_the_message_names_the_cache(download, tmp_path):
    ((kind, message),) = download(MODEL, HF_HUB_OFFLINE="1")
    assert kind == "WeightsError"
    assert f"{MODEL} is not in {tmp_path / 'cache'}" in message
    assert "HF_HUB_OFFLINE is set" in message
    ((kind, message),) = download(MODEL, HF_ENDPOINT="http://127.0.0.1:9")
    assert kind == "WeightsError"
    assert "http://127.0.0.1:9 does not answer (" in message


def test_a_damaged_file_in_the_cache_is_found(download):
    (first,) = download(MODEL)
    blob = pathlib.Path(first["weights"]).resolve()
    blob.write_bytes(WEIGHTS.replace(b"\1", b"\2"))
    ((kind, message),) = download(MODEL)
    assert kind == "WeightsError"
    assert f"its sha256 differs from the hub's; delete {blob}" in message
    blob.unlink()
    assert download(MODEL) == [first]


def test_the_message_names_the_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"needs pip install 'cnn_jax\[hub\]'; or set the path"):
        pretrained.open_weights(MODEL)


def test_which_names_are_model_ids(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "local").mkdir()
    assert hub_module.is_model_id("timm/resnet50.a1_in1k")
    assert hub_module.is_model_id(f"timm/resnet50.a1_in1k@{COMMIT}")
    for name in ("timm/local", "./timm/x", "~/x", "a/b/c", "resnet50", "a/b.safetensors", "/a/b"):
        assert not hub_module.is_model_id(name)
    assert hub_module.is_model_id("a/b@refs/pr/1")
    assert hub_module.absolute("timm/resnet50.a1_in1k") == "timm/resnet50.a1_in1k"
    assert hub_module.absolute("timm/local") == str(tmp_path / "timm" / "local")
