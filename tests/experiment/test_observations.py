"""Tests that read the observations of experiments from request logs."""

import hashlib

import pytest
from logs import DAY, START, Log, experiment

from cnn_jax.experiment.observations import read_observations
from cnn_jax.system.errors import DataError

NOW = START + 30 * DAY


def read(log):
    log.write()
    return read_observations(log.running, [log.folder], NOW)


def test_arm_of_a_unit_is_a_hash_of_salt_and_unit():
    running = experiment(fraction=0.25)
    found = {f"user-{n}": running.arm(f"user-{n}") for n in range(4000)}
    for unit, arm in found.items():
        digest = hashlib.sha256(f"salt/{unit}".encode()).hexdigest()
        assert (arm == "challenger") == (int(digest[:16], 16) / 2**64 < 0.25)
    assert 0.23 < sum(arm == "challenger" for arm in found.values()) / 4000 < 0.27
    moved = experiment(fraction=0.25, salt="other")
    assert sum(moved.arm(unit) != arm for unit, arm in found.items()) > 1000


def test_outcome_is_the_mean_reward_of_the_images_in_the_window(tmp_path):
    log = Log(tmp_path / "log", experiment(window=100.0))
    first = log.request("a", 10)
    log.request("a", 20)  # An image without feedback has the outcome 0.
    third = log.request("a", 30)
    outside = log.request("a", 111)
    log.feedback(first, 15, reward=0.2)
    log.feedback(first, 16, reward=1.0)  # The latest reward is valid.
    log.feedback(third, 111, reward=1.0)  # This reward arrives after the window.
    log.feedback(outside, 112, reward=1.0)
    (unit,) = read(log).units
    assert (unit.start, unit.arm) == (START + 10, log.running.arm("a"))
    assert unit.outcome("reward") == pytest.approx(1 / 3)
    assert unit.outcome("rating") == pytest.approx(1.0)


def test_feedback_after_the_window_replaces_no_earlier_feedback(tmp_path):
    log = Log(tmp_path / "log", experiment(window=100.0))
    request = log.request("a", 10)
    log.feedback(request, 15, reward=1.0)
    log.feedback(request, 111, reward=0.0)
    (unit,) = read(log).units
    assert unit.outcome("reward") == 1.0


def test_unit_without_feedback_has_no_rating(tmp_path):
    log = Log(tmp_path / "log", experiment(outcome="rating"))
    log.request("a", 0)
    (unit,) = read(log).units
    assert unit.outcome("rating") is None
    assert unit.outcome("reward") == 0.0


def test_outcome_of_labels_is_the_accuracy(tmp_path):
    log = Log(tmp_path / "log", experiment(outcome="label"))
    for label in ("rose", "tulip", "rose", None):
        request = log.request("a", 0)
        if label:
            log.feedback(request, 5, label=label)
    (unit,) = read(log).units
    assert unit.outcome("label") == pytest.approx(2 / 3)


def test_units_of_two_logs_are_joined_by_time(tmp_path):
    running = experiment()
    logs = [Log(tmp_path / name, running) for name in ("one", "two")]
    logs[0].request("a", 50, request_id="1" * 32)
    logs[1].request("a", 40, request_id="2" * 32, milliseconds=70.0)
    logs[1].request("b", 45, request_id="3" * 32)
    folders = [log.write().folder for log in logs]
    units = read_observations(running, folders, NOW).units
    assert [unit.start - START for unit in units] == [40, 45]
    assert units[0].milliseconds == 70.0


def test_failures_count_for_the_unit(tmp_path):
    log = Log(tmp_path / "log", experiment())
    log.request("a", 10)
    log.failure("b", 5)
    log.failure("a", 20)
    found = read(log)
    assert [(unit.start - START, unit.failures) for unit in found.units] == [(5, 1), (10, 1)]
    arms = [log.running.arm(unit) for unit in ("a", "b")]
    assert found.failures == {arm: arms.count(arm) for arm in ("champion", "challenger")}


def test_the_log_of_an_earlier_version_has_no_failures(tmp_path):
    log = Log(tmp_path / "log", experiment())
    log.request("a", 10)
    (log.write().folder / "failures").rmdir()
    found = read_observations(log.running, [log.folder], NOW)
    assert found.failures == {"champion": 0, "challenger": 0}
    assert [unit.failures for unit in found.units] == [0]


def test_rows_of_other_arms_and_models_are_ignored(tmp_path):
    log = Log(tmp_path / "log", experiment())
    log.request("a", 0)
    log.request("b", 0, arm="champion")
    log.request("c", 0, arm="green/champion")
    log.request("d", 0, model="trees")
    assert len(read(log).units) == 1


def test_log_of_another_model_is_one_error(tmp_path):
    log = Log(tmp_path / "log", experiment())
    log.request("a", 0, model="trees")
    with pytest.raises(DataError, match=r"experiment blue of flowers; .* models trees$"):
        read(log)


def test_duplicated_ids_are_one_error(tmp_path):
    log = Log(tmp_path / "log", experiment())
    log.request("a", 0, request_id="7" * 32)
    log.request("b", 1, request_id="7" * 32)
    with pytest.raises(DataError, match=f"image 0 of request {'7' * 32} is recorded twice"):
        read(log)


def test_rewards_outside_the_range_are_one_error(tmp_path):
    log = Log(tmp_path / "log", experiment())
    log.feedback(log.request("a", 0), 5, reward=5.0)
    with pytest.raises(DataError, match=r"the reward 5 of image 0 .* is not from 0 to 1"):
        read(log)


@pytest.mark.parametrize(
    ("request_time", "feedback_time", "skew"),
    [(100, 130, None), (100, 40, 60), (-90, 5, 90), (30 * DAY + 20, 30 * DAY + 30, 20)],
)
def test_clock_skew_is_measured(tmp_path, request_time, feedback_time, skew):
    log = Log(tmp_path / "log", experiment())
    log.feedback(log.request("a", request_time), feedback_time, reward=1.0)
    found = read(log).skew
    assert found == pytest.approx(skew, abs=0.01) if skew else found <= 0


def test_wrong_arms_and_versions_are_counted(tmp_path):
    log = Log(tmp_path / "log", experiment())
    other = {"champion": "challenger", "challenger": "champion"}[log.running.arm("a")]
    log.request("a", 0, arm=log.running.column(other), version=log.running.versions[other])
    log.request("b", 1, version=9)
    log.request("c", 2)
    assert read(log).misplaced == 2


@pytest.mark.parametrize(
    ("times", "pairs"),
    [
        ((30, 10, 20), [(True, True), (True, False), (False, True)]),
        # The labels of a file have equal times. The order of the images decides, not the outcome.
        ((30, 30, 30), [(False, True), (True, True), (True, False)]),
    ],
)
def test_pairs_of_a_shadow_are_in_the_order_of_the_labels(tmp_path, times, pairs):
    log = Log(tmp_path / "log", experiment(is_shadow=True, outcome="label"))
    champion = {"arm": "blue/champion", "version": 1}
    challenger = {"arm": "blue/challenger", "version": 2}
    requests = []
    for time, (first, second) in enumerate([("rose", "tulip"), ("rose", "rose"), ("iris", "rose")]):
        requests.append(log.request(None, time, **champion, **{"class": first}))
        log.request(None, time, **challenger, **{"class": second}, shadow_of=requests[-1])
    log.request(None, 5, **challenger, shadow_of="9" * 32)  # The champion's row was lost.
    for request, time in zip(requests, times, strict=True):
        log.feedback(request, time, label="rose")
    found = read(log)
    assert found.pairs == pairs  # Each pair is (challenger, champion).
    assert found.agreements == [False, True, False]
    assert found.misplaced == 0
