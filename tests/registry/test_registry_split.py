"""Tests of experiments in the log of a registry."""

import dataclasses
import json

import pytest
from registry_tools import vary

from cnn_jax.experiment import __main__ as command
from cnn_jax.registry import __main__ as registry_command
from cnn_jax.registry import ledger
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.registry.split import Split
from cnn_jax.system.errors import ConfigError

pytest_plugins = ["registry_fixtures"]


def make_split(name="blue", **changes):
    values = {"salt": "s", "fraction": 0.5, "outcome": "reward", "window": 60.0}
    return Split(**({"name": name, "is_shadow": False} | values | changes))


@pytest.fixture
def registry(bundle, tmp_path):
    registry = Registry(tmp_path / "registry")
    for number in range(3):
        registry.add("flowers", vary(bundle, tmp_path / str(number), temperature=1.0 + number))
    registry.promote("flowers", 1)
    return registry


def running(registry):
    return registry.models["flowers"].running_experiment


def test_experiment_is_stored_and_ends(registry):
    started = registry.start_experiment("flowers", 2, make_split())
    assert (started.champion, started.challenger, started.end) == (1, 2, "")
    other = Registry(registry.url)
    assert running(other) == started
    ended = other.end_experiment("flowers")
    assert ended == dataclasses.replace(started, end=ended.end)
    assert ended.end
    registry.refresh()
    assert running(registry) is None
    with pytest.raises(RegistryError, match="no experiment of flowers is running"):
        registry.end_experiment("flowers")


def test_running_experiment_cannot_be_changed(registry):
    registry.start_experiment("flowers", 2, make_split())
    with pytest.raises(RegistryError, match="blue of flowers has been running since"):
        registry.start_experiment("flowers", 2, make_split("red", fraction=0.6))
    registry.end_experiment("flowers")
    with pytest.raises(RegistryError, match="flowers has had an experiment blue; choose another"):
        registry.start_experiment("flowers", 2, make_split())


def test_version_cannot_be_compared_with_itself(registry):
    with pytest.raises(RegistryError, match="flowers/1 is champion"):
        registry.start_experiment("flowers", 1, make_split())


def test_version_of_a_running_experiment_is_not_removed(registry):
    registry.start_experiment("flowers", 2, make_split())
    with pytest.raises(RegistryError, match="the experiment blue uses it"):
        registry.remove("flowers", 2)
    registry.remove("flowers", 3)
    registry.end_experiment("flowers")
    registry.remove("flowers", 2)


@pytest.mark.parametrize("change", ["promote", "rollback", "remove_alias"])
def test_move_of_the_alias_ends_the_experiment(registry, change):
    registry.promote("flowers", 2)
    registry.start_experiment("flowers", 3, make_split())
    registry.promote("flowers", 1, alias="other")
    assert running(registry)
    if change == "promote":
        registry.promote("flowers", 3)
    elif change == "rollback":
        registry.rollback("flowers")
    else:
        registry.remove_alias("flowers", "champion")
    assert running(registry) is None
    assert registry.models["flowers"].experiments["blue"].end
    assert running(Registry(registry.url)) is None


def test_earlier_versions_skip_the_entries(registry, monkeypatch):
    registry.start_experiment("flowers", 2, make_split())
    registry.end_experiment("flowers")
    registry.start_experiment("flowers", 2, make_split("red"))
    for action in ("split", "unsplit"):
        monkeypatch.delitem(ledger._NEEDED_FIELDS, action)
    real = ledger.apply

    def apply(models, entry):
        return dict(models) if "split" in entry.action else real(models, entry)

    monkeypatch.setattr(ledger, "apply", apply)
    earlier = Registry(registry.url)
    assert earlier.resolve("flowers").number == 1
    earlier.remove("flowers", 2)  # An earlier version does not know that an experiment uses it.
    monkeypatch.undo()
    later = Registry(registry.url)
    assert running(later) is None
    assert later.models["flowers"].experiments["red"].end


@pytest.mark.parametrize(
    "changes",
    [{"fraction": 1.0}, {"fraction": "half"}, {"outcome": "clicks"}, {"window": 0}, {"color": 1}],
)
def test_damaged_split_is_one_error(registry, changes):
    registry.start_experiment("flowers", 2, make_split())
    path = max((registry._store.local("log")).iterdir())
    fields = json.loads(path.read_text())
    fields["split"] |= changes
    path.write_text(json.dumps(fields | {"sha256": ledger.fields_digest(fields)}))
    with pytest.raises(RegistryError, match="is damaged"):
        Registry(registry.url).refresh()


def test_commands_print_one_line(registry, capsys):
    flag = f"--registry={registry.url}"
    command.main(["start", "flowers", "blue", "--challenger=2", "--fraction=0.1", flag])
    assert capsys.readouterr().out == (
        "experiment blue of flowers@champion: version 2 answers 0.1 of the units, and version 1 "
        "answers the others\n"
    )
    command.main(["end", "flowers", flag])
    assert "blue of flowers has ended" in capsys.readouterr().out
    command.main(["start", "flowers", "red", "--challenger=2", "--shadow", flag])
    assert "version 2 also predicts the images of 0.5" in capsys.readouterr().out
    registry_command.main(["promote", "flowers", "3", flag])
    assert capsys.readouterr().out.endswith("; the experiment red has ended\n")
    registry_command.main(["show", "flowers", flag])
    log = capsys.readouterr().out
    assert "split champion into 1 and 2 experiment blue" in log
    assert "unsplit  experiment blue" in log


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["start", "flowers", "blue", "--challenger=9"], "flowers has no version 9"),
        (["start", "flowers", "a/b", "--challenger=2"], "experiment: must be 1 to 100"),
        (["start", "flowers", "blue", "--challenger=2", "--fraction=1"], "above 0 and below 1"),
        (["start", "flowers", "blue", "--challenger=2", "--window=0"], "must be a time"),
        (["start", "flowers", "blue", "--challenger=2", "--outcome=x"], "there is no 'x'"),
        (["show", "flowers", "--log=x"], "flowers has had no experiment"),
        (["show", "trees", "--log=x"], "there is no model trees"),
        (["end", "flowers"], "no experiment of flowers is running"),
    ],
)
def test_invalid_command_is_one_error(registry, flags, message):
    with pytest.raises((ConfigError, RegistryError), match=message) as caught:
        command.main([*flags, f"--registry={registry.url}"])
    assert "\n" not in str(caught.value)
