"""Tests a study with real training that is killed; see also `experiments/checks/chaos_study.py`."""

import random
import time

from experiments.checks import chaos_study


def test_a_study_killed_three_times_equals_an_undisturbed_one(tmp_path):
    seconds = chaos_study.run_undisturbed(tmp_path / "undisturbed", trials=2, epochs=3)
    expected = chaos_study.outcome(tmp_path / "undisturbed")
    assert {trial["state"] for trial in expected["trials"]} <= {"complete", "pruned"}
    rng = random.Random(time.time_ns())
    # The undisturbed study also compiles the programs, and the machine may have been busier then.
    # If a study ended before its third kill, another one is killed earlier.
    for attempt in range(6):
        folder = tmp_path / f"killed-{attempt}"
        moments = chaos_study.kill(folder, 2, 3, 3, seconds / 2**attempt, rng)
        assert chaos_study.outcome(folder) == expected, f"killed after {moments} s"
        if len(moments) == 3:
            return
    raise AssertionError("each study ended before it was killed three times")
