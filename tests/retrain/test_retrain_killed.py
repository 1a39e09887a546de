"""Kills real passes; see also `experiments/checks/chaos_retrain.py`, which kills many more."""

import random
import shutil
import time

from experiments.checks import chaos_retrain


def test_killed_passes_give_the_same_bundle_and_one_promotion(tmp_path):
    chaos_retrain.prepare(tmp_path / "template")
    world = tmp_path / "world"  # The bundle records the path of its data.
    shutil.copytree(tmp_path / "template", world)
    start = time.monotonic()
    _, writes = chaos_retrain.finish(chaos_retrain.start(world))
    seconds = time.monotonic() - start
    expected = chaos_retrain.results(world)
    assert [action for action, *_ in expected["changes"]] == 2 * ["add", "promote"]

    shutil.rmtree(world)
    shutil.copytree(tmp_path / "template", world)
    seed = time.time_ns()
    print(f"seed of the kills: {seed}")  # pytest shows it if the test fails.
    rng = random.Random(seed)
    aims = ["write", "time", "write", "write"]
    done = chaos_retrain.kill_repeatedly(world, writes, seconds, aims, rng)
    assert done, "the pass was over before it was killed"
    assert chaos_retrain.results(world) == expected, f"after {done}"
    output, _ = chaos_retrain.finish(chaos_retrain.start(world))
    assert "nothing to do" in output
    assert chaos_retrain.results(world) == expected
