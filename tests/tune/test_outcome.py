import ast
import csv
import fcntl
import json
import os
import pathlib
import shlex
import threading
import types

import optuna
import pytest
from fakes import make_plan
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from cnn_jax.config import files, schema
from cnn_jax.tune import outcome, storage
from cnn_jax.tune.outcome import (
    best_config_text,
    best_trial,
    conclude,
    show_outcome,
    summarize,
    table,
    write_outcome,
)
from cnn_jax.tune.space import configured
from cnn_jax.tune.storage import StorageError

SPACE = {
    "model.dropout": FloatDistribution(0.0, 0.5),
    "model.features": CategoricalDistribution(["(4, 8)", "(8,)"]),
}
# Each trial has a state, a curve and attributes. Pruned, running and void trials have the highest
# values, so a test fails if such a trial is chosen as the best.
TRIALS = [
    (TrialState.COMPLETE, [0.5, 0.7, 0.6], {"seconds": 6.0, "host": "one"}),
    (TrialState.PRUNED, [0.4], {"seconds": 2.0, "host": "two"}),
    (TrialState.FAIL, [0.3], {"seconds": 2.5, "error": 'not "finite", at\\n 3'}),
    (TrialState.COMPLETE, [0.7, 0.6, 0.5], {"seconds": 6.0}),
    (TrialState.RUNNING, [0.9, 0.95], {"seconds": 4.0}),
    (TrialState.PRUNED, [0.8], {"seconds": 2.0}),
    (TrialState.FAIL, [0.99], {"seconds": 9.0, "void": "lost", "error": "lost"}),
    (TrialState.COMPLETE, [0.99], {"seconds": 9.0, "void": "surplus"}),
    (TrialState.FAIL, [], {"error": "odd"}),
]


def make_study(plan, trials=TRIALS, features=("(4, 8)",)):
    study = optuna.create_study(direction=plan.direction)
    study.set_user_attr("definition", {"data": "of the data"})
    best = max if plan.monitor != "validation_loss" else min
    # The value of a pruned trial is its last reported value, as in Optuna.
    state_values = {TrialState.COMPLETE: best, TrialState.PRUNED: lambda curve: curve[-1]}
    for number, (state, curve, attributes) in enumerate(trials):
        study.add_trial(
            create_trial(
                state=state,
                value=state_values.get(state, lambda curve: None)(curve),
                params={
                    "model.dropout": number / 100,
                    "model.features": features[number % len(features)],
                },
                distributions=SPACE,
                intermediate_values=dict(enumerate(curve, start=1)),
                user_attrs=attributes,
            )
        )
    return study


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path / "s", space=SPACE, config_file="configs/some.py", trials=7)


@pytest.fixture
def summary(plan):
    return summarize(plan, make_study(plan))


@pytest.fixture
def no_page(monkeypatch):
    """Disables the report page of a study, because its charts take seconds."""
    monkeypatch.setattr(outcome, "write_study_page", lambda study, folder: None)


def test_the_cost_includes_all_counted_trials(summary):
    assert summary["cost"] | {"started": None, "ended": None} == {
        **{"complete": 2, "pruned": 2, "failed": 2, "running": 1},
        "epochs": 3 + 1 + 1 + 3 + 2 + 1,
        "epochs_without_pruning": 11 + 2 * (3 - 1),
        "seconds": 22.5,
        **{"started": None, "ended": None},
    }
    assert summary["cost"]["started"] <= summary["cost"]["ended"]


def test_the_summary_of_a_trial(summary):
    assert [trial["number"] for trial in summary["trials"]] == [0, 1, 2, 3, 4, 5, 8]
    assert summary["trials"][0] == {
        "number": 0,
        "state": "complete",
        "value": 0.7,
        "epochs": 3,
        "seconds": 6.0,
        "params": {"model.dropout": 0.0, "model.features": "(4, 8)"},
        "curve": [0.5, 0.7, 0.6],
        "error": "",
        "host": "one",
        "folder": "trials/0000",
    }
    failed = summary["trials"][-1]
    assert failed["state"] == "failed"
    assert failed["error"] == "odd"
    assert (failed["value"], failed["epochs"], failed["seconds"]) == (None, 0, 0.0)


def test_the_summary_of_the_study(summary):
    assert summary["name"] == "fake"
    assert (summary["monitor"], summary["direction"]) == ("validation_accuracy", "maximize")
    assert (summary["max_epochs"], summary["trials_wanted"]) == (3, 7)
    assert summary["data"] == {"source": "shapes", "fingerprint": "of the data"}
    assert summary["config_file"] == "configs/some.py"
    assert summary["space"]["model.features"]["choices"] == ["(4, 8)", "(8,)"]
    assert json.loads(json.dumps(summary)) == summary


def test_the_first_of_equal_complete_trials_is_the_best(plan, summary):
    """The trials with larger values are pruned, void or running, and so cannot be the best."""
    assert summary["best"] == 0
    swapped = [TRIALS[3], *TRIALS[1:3], TRIALS[0]]
    assert best_trial(plan, make_study(plan, swapped)).number == 0


def test_the_smallest_loss_is_the_best(tmp_path):
    plan = make_plan(tmp_path, space=SPACE, config={"train.monitor": "validation_loss"})
    summary = summarize(plan, make_study(plan))
    assert summary["best"] == 0
    assert [trial["value"] for trial in summary["trials"]] == [0.5, 0.4, 0.3, 0.5, 0.9, 0.8, None]
    higher = [(TrialState.COMPLETE, [0.6, 0.55], {}), *TRIALS]
    assert best_trial(plan, make_study(plan, higher)).number == 1


def test_without_a_complete_trial_there_is_no_best(plan, no_page, capsys):
    summary = summarize(plan, make_study(plan, TRIALS[4:]))
    assert summary["best"] is None
    plan.folder.mkdir()
    write_outcome(plan, summary)
    assert not (plan.folder / "best.py").exists()
    # The file best.py of an earlier result is removed.
    (plan.folder / "best.py").touch()
    write_outcome(plan, summary)
    assert not (plan.folder / "best.py").exists()
    show_outcome(summarize(plan, make_study(plan, TRIALS[-1:])), plan.folder)
    output = capsys.readouterr().out
    assert "0 complete, 0 pruned, 1 failed, 0 running" in output
    assert "best" not in output


# The values of these four complete trials depend only on the dropout.
DECIDED = [(TrialState.COMPLETE, [number / 10], {}) for number in range(1, 5)]


@pytest.mark.parametrize(
    "trials",
    [TRIALS, DECIDED[:3], [(TrialState.COMPLETE, [0.5], {})] * 9],
    ids=["two", "three", "all equal"],
)
def test_importance_needs_enough_trials(plan, trials):
    summary = summarize(plan, make_study(plan, trials))
    assert summary["importance"] is None
    assert summary["importance_note"].startswith("Too few trials completed")


def test_the_parameter_that_decides_is_the_most_important(plan):
    summary = summarize(plan, make_study(plan, DECIDED))
    assert summary["importance"].keys() == {"model.dropout", "model.features"}
    assert summary["importance"]["model.dropout"] > 0.99
    assert sum(summary["importance"].values()) == pytest.approx(1)
    assert summary["importance_note"] == ""


def test_importance_is_deterministic(plan):
    trials = [(TrialState.COMPLETE, [number * 7 % 10 / 10], {}) for number in range(10)]
    study = make_study(plan, trials, features=("(4, 8)", "(8,)", "(8,)"))
    shares = summarize(plan, study)["importance"]
    assert 0.05 < shares["model.dropout"] < 0.95
    assert summarize(plan, study)["importance"] == shares


@pytest.mark.parametrize("error", [ImportError, ValueError, RuntimeError])
def test_a_failure_of_importance_is_explained(plan, monkeypatch, error):
    """If the importance cannot be computed (without scikit-learn, for example), a note says why."""

    def fail(**options):
        raise error("no forest")

    monkeypatch.setattr(outcome, "FanovaImportanceEvaluator", fail)
    summary = summarize(plan, make_study(plan, DECIDED))
    assert summary["importance"] is None
    assert summary["importance_note"] == "They could not be computed: no forest"


def test_the_table_has_a_row_for_each_trial(summary):
    rows = list(csv.reader(table(summary).splitlines()))
    assert rows[0] == [
        *("number", "state", "value", "epochs", "seconds", "model.dropout", "model.features"),
        *("host", "error"),
    ]
    assert rows[1] == ["0", "complete", "0.7", "3", "6.0", "0.0", "(4, 8)", "one", ""]
    assert rows[3] == [
        *("2", "failed", "0.3", "1", "2.5", "0.02", "(4, 8)", "", 'not "finite", at\\n 3'),
    ]
    assert rows[7][:5] == ["8", "failed", "", "0", "0.0"]
    assert len(rows) == 8


def test_the_printed_result_of_a_study(plan, summary, capsys):
    show_outcome(summary, plan.folder)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:8] == [
        "trial     state  validation_accuracy  epochs  seconds  dropout  features",
        "0      complete               0.7000       3        6        0    (4, 8)",
        "3      complete               0.7000       3        6     0.03    (4, 8)",
        "4       running               0.9500       2        4     0.04    (4, 8)",
        "5        pruned               0.8000       1        2     0.05    (4, 8)",
        "1        pruned               0.4000       1        2     0.01    (4, 8)",
        "2        failed               0.3000       1        2     0.02    (4, 8)",
        "8        failed                            0        0     0.08    (4, 8)",
    ]
    assert lines[9:11] == [
        "cost        2 complete, 2 pruned, 2 failed, 1 running; 11 epochs, of 15 without "
        "pruning; training took 22 s",
        f"page        {plan.folder}/index.html",
    ]
    # The folder of the best trial is on another machine.
    assert lines[13:] == [
        "            the run of this trial is on one, in trials/0000 of the study's folder "
        "on that host"
    ]
    (plan.folder / "trials/0000").mkdir(parents=True)
    (plan.folder / "trials/0000/config.json").touch()
    show_outcome(summary, plan.folder)
    assert capsys.readouterr().out.splitlines()[11:] == [
        "best        trial 0: validation_accuracy 0.7000",
        f"train       cnn_jax train --config={plan.folder}/best.py --workdir=runs/fake",
        f"or measure  cnn_jax train --config={plan.folder}/best.py "
        f"--workdir={plan.folder}/trials/0000",
    ]


HOSTILE = [
    "plain",
    'it\'s "quoted" """ and \\n \\',
    "a b $HOME `ls` {x} %s #",
    "übung 图片 🐦",
    os.fsdecode(b"not utf-8 \xff"),
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error::SyntaxWarning", "ignore:the load_module")
def test_the_best_configuration_is_a_file_that_runs(tmp_path, name, no_page):
    """The file has the values of the plan, with the best parameters and an absolute path."""
    source = f"folder:{tmp_path}/data {name}"
    changes = {"data.source": source, "data.group": "{class}/'\"\\\\", "data.image_size": (16,)}
    plan = make_plan(tmp_path / name, space=SPACE, config=changes)
    plan.folder.mkdir()
    summary = summarize(plan, make_study(plan))
    write_outcome(plan, summary)
    assert json.loads((plan.folder / "study.json").read_text())["best"] == 0
    file = plan.folder / "best.py"
    loaded = files.load(str(file))
    params = {"model.dropout": 0.0, "model.features": "(4, 8)"}
    expected = schema.flat(configured(plan.config, params))
    found = schema.flat(loaded)
    assert found == expected
    assert list(found) == list(expected)
    assert list(map(type, found.values())) == list(map(type, expected.values()))
    # The file uses all splits, although the study uses only the validation split.
    assert found["report.splits"] == ("train", "validation", "test")
    # The file contains a command that a shell can run.
    text = ast.get_docstring(ast.parse(file.read_bytes()))
    command = next(line for line in text.splitlines() if "cnn_jax train" in line)
    arguments = shlex.split(command)
    assert arguments[2:] == [f"--config={file}", "--workdir=runs/fake"]


def test_the_best_configuration_names_its_study_and_tuned_keys(plan, summary):
    text = best_config_text(plan, summary, pathlib.Path("s/best.py"))
    assert text.startswith(
        '"""The best of 7 trials of the study fake.\n\n'
        "    cnn_jax train --config=s/best.py --workdir=runs/fake\n\n"
        "Number 0, with validation_accuracy 0.7000 after 3 epochs.\n"
        "The test split was not used.\n"
        '"""\n'
    )
    tuned = [line.strip() for line in text.splitlines() if "# Tuned." in line]
    assert tuned == ['"dropout": 0.0,  # Tuned.', '"features": (4, 8),  # Tuned.']
    assert all(len(line) <= 100 for line in text.splitlines())


def test_a_relative_source_becomes_absolute(tmp_path, monkeypatch, plan, summary):
    monkeypatch.chdir(tmp_path)
    with plan.config.ignore_type():
        plan.config.data.source = "folder:data"
    assert f'"source": "folder:{tmp_path}/data"' in best_config_text(plan, summary, tmp_path)


@pytest.mark.parametrize("name", ["weights/model.safetensors", "timm/resnet18.a1_in1k", "auto"])
def test_relative_paths_of_pretrained_weights_become_absolute(
    tmp_path, monkeypatch, plan, summary, name
):
    monkeypatch.chdir(tmp_path)
    with plan.config.unlocked():
        plan.config.model.pretrained = name
    expected = f"{tmp_path}/{name}" if name.startswith("weights") else name
    assert f'"pretrained": "{expected}"' in best_config_text(plan, summary, tmp_path)


def test_the_page_is_written(plan, no_page, monkeypatch):
    made = []
    monkeypatch.setattr(outcome, "write_study_page", lambda *arguments: made.append(arguments))
    plan.folder.mkdir()
    summary = conclude(plan, make_study(plan))
    assert made == [(summary, plan.folder)]
    assert json.loads((plan.folder / "study.json").read_text()) == summary
    assert (plan.folder / "trials.csv").read_text() == table(summary)
    assert sorted(path.name for path in plan.folder.iterdir()) == [
        *("best.py", "locks", "study.json", "trials.csv"),
    ]


def test_only_one_worker_writes_the_result_at_a_time(plan, no_page):
    (plan.folder / "locks").mkdir(parents=True)
    study = make_study(plan)
    with (plan.folder / "locks/outcome").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        worker = threading.Thread(target=conclude, args=(plan, study), daemon=True)
        worker.start()
        worker.join(0.2)
        assert worker.is_alive()
        assert not (plan.folder / "study.json").exists()
    worker.join(20)
    assert (plan.folder / "study.json").exists()


def test_the_result_waits_for_an_unavailable_storage(plan, no_page, monkeypatch):
    patient = types.SimpleNamespace(monotonic=iter(range(100)).__next__, sleep=lambda s: None)
    monkeypatch.setattr(storage, "time", patient)
    plan.folder.mkdir()
    study, failures = make_study(plan), [OSError("gone")] * 3
    read = study.get_trials

    def be_away(**options):
        if failures:
            raise failures.pop()
        return read(**options)

    monkeypatch.setattr(study, "get_trials", be_away)
    object.__setattr__(plan, "storage_timeout", 50.0)
    assert conclude(plan, study)["best"] == 0
    failures = [OSError("gone")] * 100
    with pytest.raises(StorageError, match=r"for 50 s \(gone\)\. No finished trial is lost"):
        conclude(plan, study)
