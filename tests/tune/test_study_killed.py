"""Tests a study with real training that is killed; see also `experiments/checks/chaos_study.py`."""

import random
import time

from experiments.checks import chaos_study


def test_a_study_killed_three_times_equals_an_undisturbed_one(tmp_path):
    start = time.monotonic()
    chaos_study.end(chaos_study.begin(tmp_path / "undisturbed", trials=2, epochs=3))
    seconds = time.monotonic() - start
    rng = random.Random(time.time_ns())
    moments = chaos_study.kill(tmp_path / "killed", 2, 3, 3, seconds, rng)
    assert len(moments) == 3, "it was over before it was killed"
    expected = chaos_study.outcome(tmp_path / "undisturbed")
    assert chaos_study.outcome(tmp_path / "killed") == expected, f"killed after {moments} s"
    assert {trial["state"] for trial in expected["trials"]} <= {"complete", "pruned"}
