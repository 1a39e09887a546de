"""Tests of the choice of images to label, of the page, and of labels that come back."""

import json
import re
import time

import cv2
import numpy as np
import pytest
from monitor_logs import DIGEST, NAMES, make_reference, simulate, write_labels, write_log

from cnn_jax.data.request_log import read_feedback
from cnn_jax.label import main
from cnn_jax.monitor import __main__ as monitor
from cnn_jax.monitor.labels import add_labels, choose, read_labels
from cnn_jax.monitor.rows import random_order, random_sample, read_rows
from cnn_jax.quality import trust
from cnn_jax.system.errors import ConfigError, DataError

PNG = cv2.imencode(".png", np.full((8, 8, 3), 200, np.uint8))[1].tobytes()


@pytest.fixture
def log(tmp_path):
    rng = np.random.default_rng(0)
    write_log(tmp_path / "log", simulate(rng, rng.integers(3, size=60), 0.3), image=PNG)
    return tmp_path / "log"


def _item(key, label, new_class=False, line=2):
    return {"key": key, "label": label, "new_class": new_class, "line": line}


def test_chosen_images_are_random_unusual_and_uncertain(log):
    rows, reference = read_rows([log], DIGEST), make_reference()
    chosen = choose(rows, rows.labels < 0, reference, 20, 0.5)
    assert [reason for _, reason in chosen] == ["random"] * 10 + ["unusual"] * 5 + ["uncertain"] * 5
    positions = [row for row, _ in chosen]
    assert len(set(positions)) == 20
    order = random_order(rows.keys)
    assert positions[:10] == np.argsort(order)[:10].tolist()
    rest = np.setdiff1d(np.arange(60), positions[:10])
    distances = trust.Distances(reference.class_means, reference.covariance)
    distance = trust.statistics(distances, rows.predictions)[:, 0]
    assert set(positions[10:15]) == set(rest[np.argsort(-distance[rest])[:5]])
    rest = np.setdiff1d(rest, positions[10:15])
    confidence = rows.predictions.probabilities.max(axis=1)
    assert set(positions[15:]) == set(rest[np.argsort(confidence[rest])[:5]])


def test_labelled_images_are_not_chosen_again(log):
    rows = read_rows([log], DIGEST)
    first = choose(rows, rows.labels < 0, None, 30, 0.5)
    assert "unusual" not in {reason for _, reason in first}
    write_labels(log, {rows.keys[row]: "star" for row, _ in first})
    rows = read_rows([log], DIGEST)
    second = choose(rows, rows.labels < 0, None, 100, 0.5)
    assert len(second) == 30
    assert not {row for row, _ in first} & {row for row, _ in second}
    # The labelled random images, and perhaps more, are a random sample.
    assert random_sample(rows.keys, rows.labels >= 0).sum() >= 15


def test_labels_are_stored_by_request_and_index(log):
    keys = read_rows([log], DIGEST).keys
    items = [_item(keys[0], "star"), _item(keys[1], "fish", new_class=True)]
    assert add_labels([log], items) == 2
    np.testing.assert_array_equal(read_rows([log], DIGEST).labels[:3], [2, 3, -1])
    assert {path.suffix for path in (log / "feedback").iterdir()} == {".parquet"}
    assert add_labels([log], []) == 0


def test_the_name_of_a_class_may_start_with_a_space(tmp_path):
    keys = write_log(tmp_path / "log", simulate(np.random.default_rng(0), np.zeros(2, int)))
    classes = tmp_path / "log" / "models" / f"{DIGEST}.json"
    classes.write_text(json.dumps({"class_names": [" star", "square", "circle"]}))
    rows = [
        f'{request},{index},"{label}"'
        for (request, index), label in zip(keys, (" star", " square "), strict=True)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["request_id,image_index,label", *rows]))
    add_labels([tmp_path / "log"], read_labels(tmp_path / "labels.csv"))
    assert read_feedback(tmp_path / "log")["label"].to_pylist() == [" star", "square"]


def test_labels_go_to_the_log_that_has_the_image(log, tmp_path):
    rng = np.random.default_rng(1)
    other = tmp_path / "other"
    (key,) = write_log(other, simulate(rng, np.zeros(1, int)))
    keys = read_rows([log], DIGEST).keys
    assert add_labels([log, other], [_item(key, "star"), _item(keys[0], "square")]) == 2
    assert read_feedback(other)["label"].to_pylist() == ["star"]
    assert read_feedback(log)["label"].to_pylist() == ["square"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "stars"}, r"line 3: the model has no class 'stars'; did you mean 'star'\? for"),
        ({"key": ("f" * 32, 0)}, "line 3: .* has no image 0 of request f{32}"),
        (
            {"label": "circle", "key": None},
            "line 3: image 0 of request .* has two labels, 'star' and 'circle'",
        ),
    ],
)
def test_one_wrong_label_stores_none(log, change, message):
    keys = read_rows([log], DIGEST).keys
    items = [_item(keys[0], "star"), _item(keys[1], "star", line=3) | change]
    items[1]["key"] = items[1]["key"] or keys[0]
    with pytest.raises(DataError, match=message):
        add_labels([log], items)
    assert read_feedback(log).num_rows == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("request_id,image_index\nab,0\n", "the column label is missing"),
        ("request_id,image_index,label\nab,x,star\n", "line 2: image_index must be a number"),
    ],
)
def test_a_wrong_table_of_labels_is_an_error(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_labels(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "nowhere.csv")


def test_a_table_of_labels_may_lack_columns_and_labels(tmp_path):
    (tmp_path / "labels.csv").write_text("\ufefflabel,request_id\r\nstar,ab\r\n,cd\r\n")
    assert read_labels(tmp_path / "labels.csv") == [_item(("ab", 0), "star")]


def _bundle(tmp_path, log, monkeypatch):
    """Makes the command use the digest of the simulated log for any bundle."""
    from cnn_jax.monitor.flags import Served

    monkeypatch.setattr("cnn_jax.label.open_version", lambda _: Served("m/1", DIGEST, None))


def test_the_page_has_the_images_and_no_predictions(tmp_path, log, monkeypatch, capsys):
    _bundle(tmp_path, log, monkeypatch)
    page = tmp_path / "label.html"
    main([f"--log={log}", "--bundle=b", f"--page={page}", "--count=10", "--random=0.3"])
    assert capsys.readouterr().out == f"wrote {page}: 3 random, 7 uncertain\n"
    text = page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["classes"] == NAMES
    assert len(data["items"]) == 10
    assert set(data["items"][0]) == {"request_id", "image_index", "reason", "image"}


def test_images_without_pixels_are_not_chosen(tmp_path, log, monkeypatch, capsys):
    """The server was first started without --request_log_images."""
    rng = np.random.default_rng(1)
    write_log(tmp_path / "log", simulate(rng, rng.integers(3, size=200)), time.time() - 900)
    _bundle(tmp_path, log, monkeypatch)
    page = tmp_path / "label.html"
    main([f"--log={log}", "--bundle=b", f"--page={page}", "--count=20"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"wrote {page}: 10 random, 10 uncertain"
    assert printed[1].startswith("200 images cannot be labelled, because the log has no pixels")
    other = tmp_path / "other"
    write_log(other, simulate(rng, rng.integers(3, size=5)))
    with pytest.raises(DataError, match="start the server with --request_log_images"):
        main([f"--log={other}", "--bundle=b", f"--page={page}"])


def test_keys_on_the_page_make_a_table_of_labels(tmp_path, log, monkeypatch, browser):
    """A browser labels two images; the saved table is stored in the log."""
    _bundle(tmp_path, log, monkeypatch)
    page = tmp_path / "label.html"
    main([f"--log={log}", "--bundle=b", f"--page={page}", "--count=3", "--random=1"])
    browser.get(page.as_uri())
    saved = browser.execute_script(
        """
        let table;
        const original = Blob;
        window.Blob = function (parts, options) {
          table = parts[0];
          return new original(parts, options);
        };
        const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key}));
        press("2"); press("ArrowRight"); press("3"); press("1"); press("Delete"); press("3");
        document.getElementById("save").click();
        return table;
        """
    )
    (tmp_path / "labels.csv").write_text(saved, newline="")
    labels = read_labels(tmp_path / "labels.csv")
    assert [item["label"] for item in labels] == ["square", "star"]
    main([f"--log={log}", f"--labels={tmp_path / 'labels.csv'}"])
    assert sorted(read_feedback(log)["label"].to_pylist()) == ["square", "star"]
    assert not browser.get_log("browser")


@pytest.mark.parametrize(("flag", "least"), [("--window", 20), ("--last", 2)])
def test_windows_without_a_possible_alarm_are_refused(flag, least):
    with pytest.raises(ConfigError, match=f"{flag}: must be {least} or more, got {least - 1}"):
        monitor.main(["--bundle=b", "--log=l", f"{flag}={least - 1}"])


def test_wrong_flags_of_label_are_errors(log):
    for flags, message in (
        ([], "--log must be given"),
        ([f"--log={log}"], "either --page or --labels"),
        ([f"--log={log}", "--page=p"], "--bundle, or --registry and --model"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(flags)
