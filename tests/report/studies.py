"""Example studies in the format of the tune command, for tests of a study's report page."""

import math

import numpy as np

HOSTILE = "<script>alert('1')</script> \"&amp; {{ 7 * 7 }}\nline 猫 \udcff $x^$"

# The search space of the studies. A study with n parameters has the first n keys.
SPACE = {
    "optimizer.learning_rate": {"kind": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "train.batch_size": {"kind": "categorical", "choices": [16, 32, 64]},
    "model.features": {"kind": "categorical", "choices": ["(16, 32, 64)", "(32, 64, 128)"]},
    "model.dense": {"kind": "int", "low": 64, "high": 512, "log": True},
    "model.dropout": {"kind": "float", "low": 0.0, "high": 0.6, "log": False},
    "loss.label_smoothing": {"kind": "float", "low": 0.0, "high": 0.2, "log": False},
    "optimizer.weight_decay": {"kind": "float", "low": 1e-6, "high": 1e-2, "log": True},
    "augment.rotation": {"kind": "float", "low": 0.0, "high": 0.25, "log": False},
    "augment.flip": {"kind": "categorical", "choices": ["none", "horizontal", "both"]},
    "augment.zoom": {"kind": "float", "low": 0.0, "high": 0.5, "log": False},
    "augment.dropout": {"kind": "float", "low": 0.0, "high": 0.5, "log": False},
    "optimizer.warmup_epochs": {"kind": "int", "low": 0, "high": 5, "log": False},
    "model.normalize": {"kind": "categorical", "choices": [False, True]},
    "optimizer.algorithm": {"kind": "categorical", "choices": ["adamw", "sgd", "lion", "lamb"]},
}


def _drawn(rng, range_):
    if range_["kind"] == "categorical":
        return range_["choices"][rng.integers(len(range_["choices"]))]
    low, high = range_["low"], range_["high"]
    share = rng.random()
    value = low * (high / low) ** share if range_["log"] else low + (high - low) * share
    return round(value) if range_["kind"] == "int" else value


def make_study(
    trials=40,
    parameters=8,
    monitor="validation_accuracy",
    states=("complete", "pruned", "pruned", "complete", "pruned", "failed"),
):
    """Returns a study in the format of the tune command; the learning rate matters most."""
    rng = np.random.default_rng(0)
    space = dict(list(SPACE.items())[:parameters])
    is_loss = monitor.endswith("loss")
    made = []
    for number in range(trials):
        state = states[number % len(states)]
        params = {key: _drawn(rng, range_) for key, range_ in space.items()}
        rate = abs(math.log10(params.get("optimizer.learning_rate", 1e-3) / 2e-3))
        end = 0.97 - 0.06 * rate**2 - 0.02 * rng.random() - 0.5 * (rng.random() < 0.05)
        epochs = {"complete": 15, "failed": 0}.get(state, int(rng.choice([1, 1, 3, 5])))
        curve = [
            round(end * (1 - math.exp(-0.7 * e)) + 0.005 * rng.normal(), 6)
            for e in range(1, epochs + 1)
        ]
        if is_loss:
            curve = [-2 * math.log(min(max(value, 0.01), 0.999)) for value in curve]
        made.append(
            {
                "number": number,
                "state": state,
                "value": (min if is_loss else max)(curve) if curve else None,
                "epochs": epochs,
                "seconds": 8.3 * epochs + 2,
                "params": params if state != "failed" else dict(list(params.items())[:1]),
                "curve": curve,
                "error": "TrainingError: the loss is not finite" if state == "failed" else "",
                "host": f"host{number % 2}",
                "folder": f"trials/{number:04d}",
            }
        )
    complete = [trial for trial in made if trial["state"] == "complete"]
    best = (min if is_loss else max)(complete, key=lambda trial: trial["value"], default=None)
    shares = {key: 0.5 ** (i + 1) for i, key in enumerate(space)}
    return {
        "name": "eurosat",
        "monitor": monitor,
        "direction": "minimize" if is_loss else "maximize",
        "max_epochs": 15,
        "trials_wanted": 50,
        "data": {"source": "folder:/data/eurosat", "fingerprint": "0f3a" * 8},
        "versions": {"cnn_jax": "0.1.0", "jax": "0.10.0", "optuna": "4.5.0"},
        "config_file": "configs/eurosat.py",
        "space": space,
        "trials": made,
        "best": best["number"] if best else None,
        "best_config": "best.py",
        "importance": shares if len(complete) > 3 else None,
        "importance_note": "" if len(complete) > 3 else "There are too few complete trials.",
        "cost": {
            **{
                state: sum(trial["state"] == state for trial in made)
                for state in ("complete", "pruned", "failed", "running")
            },
            "epochs": sum(trial["epochs"] for trial in made),
            "epochs_without_pruning": 15 * sum(trial["state"] != "failed" for trial in made),
            "seconds": sum(trial["seconds"] for trial in made),
            "started": "2025-05-01T10:00:00+00:00",
            "ended": "2025-05-01T13:26:10+00:00",
        },
    }


def all_alike(study):
    """Changes a study so that all trials have the value 0.9 in every epoch."""
    for trial in study["trials"]:
        if trial["curve"]:
            trial["value"] = 0.9
            trial["curve"] = [0.9] * len(trial["curve"])
    return study
