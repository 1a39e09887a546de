"""The whole loop with a real server: drift, labels, retraining, a refusal and a rollback."""

import json
import sys
import time

import numpy as np
import pytest
import requests
from conftest import REPOSITORY

from cnn_jax.data.request_log import read_requests
from cnn_jax.inference.bundle import read_reference
from cnn_jax.monitor.labels import add_labels
from cnn_jax.monitor.rows import read_rows
from cnn_jax.monitor.windows import measure
from cnn_jax.registry.registry import Registry
from cnn_jax.retrain import __main__ as command
from experiments.checks.chaos_retrain import CLASSES, draw, train, write_images

sys.path.insert(0, str(REPOSITORY / "tests" / "serve"))
from servers import Served


class World:
    """A server of a model, the images that its users send, and the people who label them."""

    def __init__(self, folder, server, registry):
        self.folder, self.server, self.registry = folder, server, registry
        self.log = folder / "log"
        self._session = requests.Session()
        self._rng = np.random.default_rng(2)
        self._sent = 0

    def send(self, count, noise):
        """Sends images with growing noise; returns their classes and predictions by request id.

        Args:
          count: The number of images.
          noise: The noise of the first and of the last image.
        """
        answers = {}
        for strength in np.linspace(*noise, count):
            label = int(self._rng.integers(3))
            image = draw(self._rng, label, strength)
            answer = self._session.post(f"{self.server.url}/predict", image, timeout=60).json()
            answers[answer["request_id"]] = label, answer["predictions"][0]["class"]
        self._sent += count
        end = time.monotonic() + 60
        while read_requests(self.log, ["time"]).num_rows < self._sent:
            assert time.monotonic() < end
            time.sleep(0.1)
        return answers

    def label(self, answers, names=CLASSES):
        """Adds labels to the log; other names than `CLASSES` are wrong labels."""
        add_labels(
            [self.log],
            [
                {
                    "key": (request_id, 0),
                    "label": names[label],
                    "new_class": False,
                    "line": 0,
                }
                for request_id, (label, _) in answers.items()
            ],
        )

    def retrain(self, capsys, *flags):
        """Makes one pass; returns the exit code and the printed JSON."""
        code = 0
        try:
            command.main(
                [
                    f"--registry={self.registry.url}",
                    "--model=colours",
                    f"--source=folder:{self.folder / 'images'}",
                    f"--log={self.log}",
                    f"--state={self.folder / 'state'}",
                    "--margin=0.1",  # The data has only 37 test images.
                    "--window=100",
                    "--config.train.batch_size=8",
                    "--config.report.detail=none",
                    "--json",
                    *flags,
                ]
            )
        except SystemExit as end:
            code = end.code
        self.registry.refresh()
        return code, json.loads(capsys.readouterr().out)

    def wait_for(self, version):
        """Waits until the server answers with a version; returns this answer, as `send` does."""
        end = time.monotonic() + 60
        while True:
            image = draw(self._rng, 0)
            answer = self._session.post(f"{self.server.url}/predict", image, timeout=60).json()
            self._sent += 1
            if answer["version"] == version:
                return {answer["request_id"]: (0, answer["predictions"][0]["class"])}
            assert time.monotonic() < end
            time.sleep(0.2)


def accuracy(answers):
    return np.mean([CLASSES[label] == predicted for label, predicted in answers.values()])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    write_images(folder / "images", per_class=80)
    registry = Registry(folder / "registry")
    registry.add("colours", train(folder / "images", folder / "run"))
    registry.promote("colours", 1)
    flags = (f"--registry={registry.url}", "--poll=0.2")
    log = (f"--request_log={folder / 'log'}", "--request_log_images")
    with Served(folder, *flags, *log) as server:
        yield World(folder, server, registry)


def test_the_loop_repairs_a_drifted_model(world, capsys):
    quiet = world.send(400, noise=(0, 0))
    assert accuracy(quiet) > 0.9
    code, result = world.retrain(capsys)
    assert (code, result["action"]) == (0, "nothing")
    assert "no labelled image" in result["text"]

    noisy = world.send(500, noise=(0.5, 1.5))
    assert accuracy(noisy) < 0.7
    champion = world.registry.resolve("colours").bundle.digest
    reference = read_reference(world.folder / "run" / "bundle")
    found = measure(read_rows([world.log], champion), reference, window=100)
    assert [window["alarm"] for window in found["windows"]][3::5] == [False, True]

    world.label(dict(list(noisy.items())[300:]))
    code, result = world.retrain(capsys, "--when=harm")
    assert (code, result["action"]) == (0, "promoted"), result
    assert result["attempt"]["triggers"] == ["harm"]
    assert result["attempt"]["labelled"] == result["attempt"]["new"] == 200
    assert world.registry.resolve("colours").number == 2
    assert world.registry.log[-1].evidence == result["attempt"]["evidence"]
    world.wait_for(2)

    recovered = world.send(300, noise=(1.2, 1.2))
    assert accuracy(recovered) > 0.9

    # A learning rate that destroys the network: its successor is refused, once.
    world.label(dict(list(recovered.items())[:50]))
    bad = ("--when=always", "--config.optimizer.learning_rate=0.5", "--config.train.epochs=1")
    code, result = world.retrain(capsys, *bad)
    assert (code, result["action"]) == (3, "refused"), result
    entries = len(world.registry.log)
    code, again = world.retrain(capsys, *bad)
    assert (code, again["action"]) == (0, "nothing")
    assert "the same data and configuration were refused" in again["text"]
    assert len(world.registry.log) == entries

    # Wrong labels, also in the test split, let a bad version pass; right labels withdraw it.
    mislabelled = world.send(600, noise=(1.2, 1.2))
    world.label(mislabelled, ("green", "blue", "red"))
    flags = ("--when=labels", "--config.train.epochs=12", "--config.train.batch_size=16")
    code, result = world.retrain(capsys, *flags)
    assert (code, result["action"]) == (0, "promoted"), result
    bad_version = result["attempt"]["version"]
    first = world.wait_for(bad_version)
    disappointed = world.send(150, noise=(1.2, 1.2))
    assert accuracy(disappointed) < 0.7
    # All images of the version have a label, so all are in the random sample.
    world.label(first | disappointed)
    code, result = world.retrain(capsys)
    assert (code, result["action"]) == (3, "rolled_back"), result
    assert world.registry.resolve("colours").number == 2
    assert world.registry.log[-1].action == "rollback"
    assert "worse than version 2 on" in world.registry.log[-1].note
    code, result = world.retrain(capsys, "--when=harm")
    assert (code, result["action"]) == (0, "nothing"), result
    actions = [entry.action for entry in world.registry.log]
    assert actions.count("rollback") == 1
    world.wait_for(2)
    assert accuracy(world.send(100, noise=(1.2, 1.2))) > 0.9
