"""Kills a study many times, and compares its results with an undisturbed study.

    python experiments/checks/chaos_study.py [--kills=3] [--trials=12] [--epochs=9] [--rounds=1]
        [--seed=0] [--workdir=DIR]

A study of a small network on 600 images of `shapes`, pruned by Hyperband, is run once
undisturbed. In each round, the same study is run by a process that gets SIGKILL at --kills
random times and is restarted each time. Both studies must be equal: each trial's state,
parameters and validation accuracy after each epoch, the best configuration, and all bits of
the weights of the best trial. The exit code is 1 if something differs.
"""

import argparse
import json
import pathlib
import random
import runpy
import subprocess
import sys
import tempfile
import time
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

SPACE = """
from optuna.distributions import CategoricalDistribution, FloatDistribution


def get_space():
    return {
        "optimizer.learning_rate": FloatDistribution(1e-3, 3e-2, log=True),
        "model.dropout": FloatDistribution(0.0, 0.6),
        "train.batch_size": CategoricalDistribution([16, 32]),
    }
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path)
    flags = parser.parse_args()
    workdir = flags.workdir or pathlib.Path(tempfile.mkdtemp())
    workdir.mkdir(parents=True, exist_ok=True)
    seconds = run_undisturbed(workdir / "undisturbed", flags.trials, flags.epochs)
    expected = outcome(workdir / "undisturbed")
    print(f"undisturbed: {seconds:.0f} s, {describe(expected)}", flush=True)
    rng = random.Random(flags.seed)
    differing, kills = 0, 0
    for number in range(flags.rounds):
        folder = workdir / f"killed-{number}"
        moments = kill(folder, flags.trials, flags.epochs, flags.kills, seconds, rng)
        kills += len(moments)
        found = outcome(folder)
        differences = [key for key in expected if found[key] != expected[key]]
        differing += bool(differences)
        outcome_text = f"{', '.join(differences)} differ" if differences else "the same"
        times = ", ".join(f"{moment:.1f}" for moment in moments)
        print(f"killed {times} s after it had continued: {outcome_text}", flush=True)
    print(f"{kills} kills, {differing} of {flags.rounds} studies differ")
    sys.exit(bool(differing))


def begin(folder: pathlib.Path, trials: int, epochs: int) -> subprocess.Popen:
    """Starts or resumes the study in `folder`, in a new process."""
    folder.mkdir(parents=True, exist_ok=True)
    space = folder / "space.py"
    space.write_text(SPACE)
    command = [
        *(sys.executable, "-m", "cnn_jax.tune", "--study=chaos", f"--space={space}"),
        *(f"--workdir={folder}", f"--trials={trials}", f"--config.train.epochs={epochs}"),
        *("--config.data.source=shapes:600", "--config.data.image_size=16"),
        *("--config.model.features=(4,8)", "--config.model.dense=16"),
    ]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_undisturbed(folder: pathlib.Path, trials: int, epochs: int) -> float:
    """Runs a whole study in `folder`; returns the seconds from its first trial to its end."""
    process = begin(folder, trials, epochs)
    wait_for_trial(process)
    start = time.monotonic()
    end(process)
    return time.monotonic() - start


def wait_for_trial(process: subprocess.Popen) -> None:
    """Waits until the process prints the first line about a trial, or ends."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("trial"):
            return


def end(process: subprocess.Popen) -> None:
    """Waits until a study ends; exits with an error message if the study failed."""
    _, stderr = process.communicate()
    if process.returncode:
        sys.exit(f"a study ended with {process.returncode}: {stderr[-2000:]}")


def kill(
    folder: pathlib.Path, trials: int, epochs: int, kills: int, seconds: float, rng: random.Random
) -> list[float]:
    """Runs a study that is killed at random times, and resumes the study after each kill.

    Args:
      folder: The folder of the study.
      trials: Number of trials.
      epochs: Number of epochs of a trial.
      kills: Number of kills.
      seconds: Duration of the undisturbed study, from its first trial to its end.
      rng: The generator of the random times.

    Returns:
      For each kill, the seconds from the start of the first trial of the process to the kill.
    """
    moments = []
    for _ in range(kills):
        process = begin(folder, trials, epochs)
        wait_for_trial(process)
        # On average, all kills happen in the first half of the study, so the study rarely ends
        # before the last kill.
        moment = rng.uniform(0, seconds / (kills + 1))
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            moments.append(moment)
    end(begin(folder, trials, epochs))
    return moments


def outcome(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the results that must be the same in a killed study and in an undisturbed study."""
    study = json.loads((folder / "study.json").read_text())
    best = folder / "trials" / f"{study['best']:04d}"
    trials = [
        {key: trial[key] for key in ("number", "state", "params", "curve")}
        for trial in study["trials"]
    ]
    return {
        "best": study["best"],
        "configuration": runpy.run_path(str(folder / "best.py"))["get_config"]().to_dict(),
        "trials": trials,
        "weights": (best / "bundle" / "weights.safetensors").read_bytes(),
    }


def describe(found: dict[str, Any]) -> str:
    """Describes the result of a study in one line."""
    states = [trial["state"] for trial in found["trials"]]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    curve = found["trials"][found["best"]]["curve"]
    return f"{counts}; the best is trial {found['best']} with {max(curve):.4f}"


if __name__ == "__main__":
    main()
