import json

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from cnn_jax import run_directory
from cnn_jax.errors import ConfigError
from configs import default


def test_the_same_run_may_go_on_and_another_may_not(tmp_path):
    config = default.get_config()
    run_directory.claim(tmp_path / "run", config)
    assert list((tmp_path / "run").iterdir()) == []  # Nothing is decided yet.
    run_directory.write_config(tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["epochs"] == 22
    config.data.workers = 2  # No number depends on it.
    run_directory.claim(tmp_path / "run", config)
    config.train.epochs = 3
    config.optimizer.l2 = 0.5
    with pytest.raises(ConfigError) as error:
        run_directory.claim(tmp_path / "run", config)
    assert "optimizer.l2: 0.0001 -> 0.5; train.epochs: 22 -> 3" in str(error.value)


def test_a_folder_that_cannot_be_one_is_explained(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--workdir: cannot use"):
        run_directory.claim(tmp_path / "file" / "run", default.get_config())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not a configuration"):
        run_directory.claim(tmp_path, default.get_config())


def _record(epoch):
    return {"epoch": epoch, "step": 10 * epoch, "train_loss": 1 / epoch, "validation_f1": 0.5}


def _events(folder):
    events = []
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:  # Length, its checksum, the event, its checksum.
            length = int.from_bytes(content[:8], "little")
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            events += [(value.tag, event.step) for value in event.summary.value]
            content = content[16 + length :]
    return sorted(events)


def test_the_log_has_each_epoch_once_also_after_a_restart(tmp_path):
    log = run_directory.EpochLog(tmp_path, [])
    for epoch in (1, 2, 3):
        log.append(_record(epoch))
    log.close()
    log = run_directory.EpochLog(tmp_path, [_record(1), _record(2)])  # 3 was lost.
    log.append(_record(3))
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [_record(epoch) for epoch in (1, 2, 3)]
    expected = [(tag, step) for tag in ("f1/validation", "loss/train") for step in (10, 20, 30)]
    assert _events(tmp_path / "tensorboard") == expected


def test_confidences_round_trip(tmp_path):
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 50).astype(np.float32)
    labels = np.arange(50) % 3
    run_directory.write_predictions(
        tmp_path, [f"x/{i}" for i in range(50)], labels, probabilities, ["a", "b", "c"]
    )
    lines = (tmp_path / "report" / "predictions.csv").read_text().splitlines()
    assert lines[0] == "id,label,predicted,confidence"
    confidences = np.array([line.split(",")[3] for line in lines[1:]], np.float32)
    np.testing.assert_array_equal(confidences, probabilities.max(axis=1))
