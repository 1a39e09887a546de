import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from registry_log import append_unknown_entry
from registry_tools import aliases, figures, vary

from cnn_jax.inference.bundle import digest, read_bundle
from cnn_jax.registry import __main__ as command
from cnn_jax.registry import flags
from cnn_jax.registry.ledger import RegistryError
from cnn_jax.registry.registry import Registry
from cnn_jax.system.errors import BundleError, ConfigError, UserError, printable

pytest_plugins = ["registry_fixtures"]


@pytest.fixture(scope="module")
def bundles(bundle, tmp_path_factory):
    """Two bundles with the accuracies 0.9 and 0.8 and the same data fingerprint."""
    folder = tmp_path_factory.mktemp("two")
    return [
        vary(bundle, folder / str(i), metrics=figures(0.9 - i / 10, f1=0.75, loss=0.5))
        for i in range(2)
    ]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a registry. The environment variable CNN_JAX_REGISTRY is set to its path."""
    monkeypatch.setenv("CNN_JAX_REGISTRY", str(tmp_path / "registry"))
    return tmp_path / "registry"


@pytest.fixture
def registry(place, bundles):
    """A registry with two versions of the model flowers. Alias champion has moved from 1 to 2."""
    registry = Registry(place)
    for i, path in enumerate(bundles, 1):
        registry.add("flowers", path, f"notę {i}")
        registry.promote("flowers", i)
    return registry


def call(capsys, *arguments):
    command.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


def run(*arguments, **variables):
    """Runs a registry command in a new process; returns exit code, stdout and stderr."""
    result = subprocess.run(
        [sys.executable, "-m", "cnn_jax.registry", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    return result.returncode, result.stdout, result.stderr


def test_a_session_with_all_commands(place, bundles):
    """Runs the commands of a typical session, and compares their output with the expected text."""
    digest = r"[0-9a-f]{12}"
    assert run("list") == (
        1,
        "",
        f"error: there is no registry at {place}; the first `registry add` creates it\n",
    )
    for i, (path, accuracy) in enumerate(zip(bundles, ("90.00", "80.00"), strict=True), 1):
        code, output, error = run("add", "flowers", path, "--note=first")
        assert (code, error) == (0, "")
        made = f"; created a registry at {re.escape(str(place))}" * (i == 1)
        expected = rf"added flowers/{i}: accuracy {accuracy}%, F1 75.00%, digest {digest}{made}\n"
        assert re.fullmatch(expected, output)
    assert run("promote", "flowers", 2, "--min-accuracy=0.85") == (
        1,
        "",
        "error: flowers/2 does not become champion: min_accuracy=0.85: test accuracy is 0.8\n",
    )
    assert run("promote", "flowers", 1, "--min_accuracy=0.85") == (
        0,
        "flowers@champion is now version 1 (new); "
        "passed: min_accuracy=0.85: test accuracy is 0.9\n",
        "",
    )
    assert run("promote", "flowers", 2, f"--registry={place}")[:2] == (
        0,
        "flowers@champion is now version 2 (previously 1)\n",
    )
    assert run("rollback", "flowers") == (
        0,
        "flowers@champion is now version 1 (previously 2)\n",
        "",
    )
    assert run("remove", "flowers", 1)[:2] == (1, "")
    assert run("remove", "flowers", 2) == (0, "removed flowers/2\n", "")
    code, output, error = run("show", "flowers@champion")
    assert (code, error) == (0, "")
    assert output.startswith("version  flowers/1\n")
    code, output, error = run("list")
    assert (code, error) == (0, "")
    assert len(output.splitlines()) == 2
    code, output, error = run("show", "flower")
    assert (code, output, error) == (
        1,
        "",
        "error: there is no model flower; did you mean flowers?\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND: is required"),
        (["adopt"], "there is no command 'adopt'"),
        (["add", "flowers"], "RUN: is required"),
        (["add", "../x", "bundle"], "model: must be 1 to 100 of the characters"),
        (
            ["add", "кошки", "bundle"],
            "0-9, -, _ and ., and begin with a letter or digit; got 'кошки'",
        ),
        (["add", "flowers", ""], "RUN: must not be empty"),
        (["show", "flowers@7"], "alias: must not be a number"),
        (["show", "../x"], "model: must be"),
        (["promote", "flowers", "1", "--alias=7"], "alias: must not be a numb"),
        (["promote", "flowers", "1", "--min_f1=95"], "must be from 0 to 1, got '95'"),
        (["promote", "flowers", "1", "--max-loss=nan"], "must be 0 or more, got 'nan'"),
        (["promote", "flowers", "1", "--max-loss=x"], "must be 0 or more, got 'x'"),
        (["promote", "flowers", "../1"], "alias: must be"),
        (["promote", "flowers", "1", "--min_acc=0.5"], "did you mean --min_accuracy=0.5?"),
        (["remove", "flowers", "-1"], "version: must be a number, got '-1'"),
        (["remove", "flowers", "१"], "version: must be a number, got '१'"),
        (["promote", "flowers", "१"], "version: must be a number, got '१'"),
        (["rollback", "flowers", "--from=x"], "version: must be a number"),
        (["fetch", "flowers", ""], "FOLDER: must not be empty"),
        (["list", "--registry="], "--registry: must not be empty"),
    ],
)
def test_usage_errors_exit_with_2(place, capsys, arguments, message):
    with pytest.raises(ConfigError) as error:
        command.main(arguments)
    assert capsys.readouterr().out == ""
    assert message in str(error.value)


@pytest.mark.parametrize(
    "arguments", [["remove", "flowers"], ["remove", "flowers", "1", "--alias=a"]]
)
def test_remove_takes_either_version_or_alias(registry, arguments):
    with pytest.raises(ConfigError, match="give either VERSION or --alias"):
        command.main(arguments)


def test_the_registry_is_required(monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("CNN_JAX_REGISTRY", raising=False)
        if value is not None:
            monkeypatch.setenv("CNN_JAX_REGISTRY", value)
        with pytest.raises(ConfigError, match=r"^--registry is required, unless \$CNN_JAX_"):
            command.main(["list"])


def test_the_flag_overrides_the_variable(registry, tmp_path, bundles, capsys):
    other = f"--registry={tmp_path / 'other'}"
    call(capsys, "add", "birds", bundles[0], other)
    assert "birds/1" in call(capsys, "list", other)
    assert "birds" not in call(capsys, "list")


def test_a_url_is_not_changed():
    assert flags.location("s3://bucket//a") == "s3://bucket//a"
    assert flags.location("~/a") == os.path.expanduser("~/a")  # noqa: PTH111


def test_adding_twice_names_the_version(registry, bundles, capsys):
    output = call(capsys, "add", "flowers", bundles[1])
    assert output == "flowers already has this bundle: it is flowers/2\n"


def test_promoting_twice_is_reported(registry, capsys):
    assert call(capsys, "promote", "flowers", 2) == "flowers@champion is already version 2\n"


def test_an_alias_may_be_promoted_to_another(registry, capsys):
    output = call(capsys, "promote", "flowers", "champion", "--alias", "mine")
    assert output == "flowers@mine is now version 2 (new)\n"
    assert call(capsys, "rollback", "flowers").startswith("flowers@champion is now version 1")
    output = call(capsys, "remove", "flowers", "--alias", "mine")
    assert output == "removed flowers@mine, which was version 2\n"
    registry.refresh()
    assert aliases(registry) == {"champion": 1}


@pytest.mark.parametrize("hyphen", ["_", "-"])
def test_gates_have_two_spellings(registry, capsys, hyphen):
    gates = ["--min_accuracy=0.9", "--min_f1=0.75", "--max_loss=0.5"]
    gates = [gate.replace("_", hyphen) for gate in gates]
    assert call(capsys, "promote", "flowers", 1, *gates) == (
        "flowers@champion is now version 1 (previously 2); passed: min_accuracy=0.9: "
        "test accuracy is 0.9; min_f1=0.75: test f1 is 0.75; max_loss=0.5: test loss is 0.5\n"
    )
    for gate in ("--min_precision=0.1", "--min_recall=0.1"):
        with pytest.raises(UserError, match=r"is not in the bundle$"):
            command.main(["promote", "flowers", "2", gate.replace("_", hyphen)])


def test_the_table(registry, capsys):
    registry.promote("flowers", 1, "mine")
    registry.promote("flowers", 2, "yours")
    head, *rows = call(capsys, "list").splitlines()
    assert re.split("  +", head) == [
        *("version", "aliases", "added (UTC)", "accuracy", "F1", "classes", "pixels", "size"),
        *("digest", "by"),
    ]
    version, entry = registry.resolve("flowers"), registry.log[2]
    assert re.split("  +", rows[1]) == [
        *("flowers/2", "champion, yours", entry.time[:16].replace("T", " "), "80.00%", "75.00%"),
        *(
            "3",
            "16 x 16",
            command._size(version),
            version.bundle.digest[:12],
            f"{entry.user}@{entry.host}",
        ),
    ]
    starts = [re.search(name, head).start() for name in ("aliases", "digest", "by$")]
    assert rows[0][starts[0] :].startswith("mine ")
    assert all(row[start - 1] == " " for row in rows for start in starts)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 kB"),
        (4_660, "4.7 kB"),
        (99_999, "100.0 kB"),
        (100_000, "0.1 MB"),
        (1_234_567_890, "1,234.6 MB"),
    ],
)
def test_sizes_are_formatted(registry, size, text):
    version = registry.resolve("flowers", 1)
    facts = dataclasses.replace(version.bundle, size=size)
    assert command._size(dataclasses.replace(version, bundle=facts)) == text


@pytest.mark.parametrize("number", ["0", "3", "9" * 30])
def test_all_commands_report_an_unknown_version_alike(registry, number):
    for arguments in (["remove", "flowers"], ["promote", "flowers"]):
        with pytest.raises(
            UserError, match=rf"^flowers has no version {number}; known versions: 1, 2$"
        ):
            command.main([*arguments, number])


def test_rollback_from_refuses_another_version(registry, capsys):
    with pytest.raises(UserError, match=r"^no rollback: flowers@champion is 2, not 1$"):
        command.main(["rollback", "flowers", "--from=1"])
    output = call(capsys, "rollback", "flowers", "--from=2")
    assert output == "flowers@champion is now version 1 (previously 2)\n"
    with pytest.raises(UserError, match=r"^no rollback: flowers@champion is 1, not 2$"):
        command.main(["rollback", "flowers", "--from=2"])


def damage(registry, number):
    path = registry.resolve("flowers", number).bundle.path
    file = pathlib.Path(registry.url, path, "weights.safetensors")
    file.chmod(0o644)
    file.write_bytes(b"x" + file.read_bytes()[1:])


def test_all_versions_are_verified(registry, bundles, capsys):
    good = ["flowers/1 is unchanged", "flowers/2 is unchanged"]
    assert call(capsys, "verify").splitlines() == good
    call(capsys, "add", "birds", bundles[0])
    assert call(capsys, "verify", "flowers").splitlines() == good
    damage(registry, 1)
    for arguments, count in ((["verify"], 3), (["verify", "flowers"], 2)):
        with pytest.raises(RegistryError, match=rf"^1 of {count} versions are damaged: flowers/1;"):
            command.main(arguments)
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == count
        assert re.match(r"flowers/1: \S+ is damaged: its digest differs", lines[-2])
        assert lines[-1] == good[1]
    call(capsys, "verify", "birds")
    with pytest.raises(UserError, match=r"^there is no model bird; did you mean birds\?$"):
        command.main(["verify", "bird"])


def test_verify_tolerates_a_removal(registry, capsys, monkeypatch):
    verify = Registry.verify

    def meanwhile(self, version):
        if version.number == 1:
            registry.remove("flowers", 1)
        verify(self, version)

    monkeypatch.setattr(Registry, "verify", meanwhile)
    first, second = call(capsys, "verify").splitlines()
    assert first.startswith("flowers/1 was not verified: flowers has no version 1 (it was removed)")
    assert second == "flowers/2 is unchanged"


@pytest.mark.parametrize(
    ("reference", "number"), [("flowers", 2), ("flowers@mine", 1), ("flowers/1", 1)]
)
def test_fetch_copies_the_bundle(registry, capsys, tmp_path, reference, number):
    registry.promote("flowers", 1, "mine")
    for _ in range(2):
        folder = pathlib.Path(call(capsys, "fetch", reference, tmp_path / "new" / "in").rstrip())
        assert folder.parent == tmp_path / "new" / "in"
        assert digest(folder) == registry.resolve("flowers", number).bundle.digest
        read_bundle(folder)
    (folder / "weights.safetensors").write_bytes(b"")
    registry.verify(registry.resolve("flowers", number))
    damage(registry, number)
    with pytest.raises(BundleError, match="is damaged"):
        command.main(["fetch", reference, str(tmp_path / "new" / "in")])


def test_help_explains_the_alias(capsys):
    for name in ("promote", "rollback"):
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        assert "the alias to move (champion)" in " ".join(capsys.readouterr().out.split())


def test_models_are_sorted_and_selectable(registry, bundles, capsys):
    call(capsys, "add", "birds", bundles[0])
    names = [line.split()[0] for line in call(capsys, "list").splitlines()[1:]]
    assert names == ["birds/1", "flowers/1", "flowers/2"]
    names = [line.split()[0] for line in call(capsys, "list", "birds").splitlines()[1:]]
    assert names == ["birds/1"]
    with pytest.raises(UserError, match=r"^there is no model bird; did you mean birds\?$"):
        command.main(["list", "bird"])


def test_an_empty_registry_is_reported(registry, place, capsys):
    call(capsys, "remove", "flowers", "--alias=champion")
    for number in (1, 2):
        call(capsys, "remove", "flowers", number)
    assert call(capsys, "list") == f"{place}: no versions\n"
    assert call(capsys, "list", "flowers") == f"{place}: no versions\n"
    assert call(capsys, "show", "flowers").startswith("model  flowers\n\nlog\n")
    assert json.loads(call(capsys, "list", "--json"))["flowers"]["versions"] == []


def test_the_list_as_json(registry, capsys):
    (model,) = json.loads(call(capsys, "list", "--json")).values()
    assert model["aliases"] == {"champion": {"version": 2, "history": [1, 2]}}
    first, second = model["versions"]
    assert (first["number"], first["aliases"], first["note"]) == (1, [], "notę 1")
    assert second["aliases"] == ["champion"]
    assert second["bundle"]["metrics"]["test"]["accuracy"] == pytest.approx(0.8)
    assert second["bundle"]["image_size"] == [16, 16]
    assert json.loads(call(capsys, "list", "flowers", "--json")) == {"flowers": model}


def test_all_of_a_model(registry, capsys):
    call(capsys, "promote", "flowers", 1, "--note=back\x1b[31m\nagain", "--min_f1=0.7")
    first, table, log = call(capsys, "show", "flowers").split("\n\n")
    assert first.splitlines() == ["model      flowers", "@champion  1 <- 2 <- 1"]
    assert table == call(capsys, "list").rstrip("\n")
    head, *lines = log.splitlines()
    assert head == "log"
    (entry,) = Registry(registry.url).log[-1:]
    assert lines[-1] == (
        f"      5  {entry.time[:19]}Z  {printable(entry.user)}@{entry.host}  promote champion -> 1 "
        r"(previously 2)  min_f1=0.7: test f1 is 0.75  # back\x1b[31m\nagain"
    )
    assert len(lines) == 5
    as_json = json.loads(call(capsys, "show", "flowers", "--json"))
    assert [entry["action"] for entry in as_json["log"]] == [
        *("add", "promote", "add", "promote", "promote")
    ]
    assert as_json["log"][-1]["note"] == "back\x1b[31m\nagain"
    assert as_json["log"][-1]["gates"] == ["min_f1=0.7: test f1 is 0.75"]


@pytest.mark.parametrize("reference", ["flowers@champion", "flowers/2"])
def test_all_of_a_version(registry, capsys, reference):
    facts, log = call(capsys, "show", reference).split("\n\n")
    facts = dict(re.split("  +", line, maxsplit=1) for line in facts.splitlines())
    version = registry.resolve("flowers", 2)
    assert facts["version"] == "flowers/2"
    assert facts["aliases"] == "champion"
    assert facts["note"] == "notę 2"
    assert facts["digest"] == version.bundle.digest
    assert facts["bundle"] == f"{registry.url}/{version.bundle.path}"
    assert facts["test"] == "accuracy 0.8000  f1 0.7500  loss 0.5000"
    assert [line.split()[3] for line in log.splitlines()[1:]] == ["add", "promote"]
    as_json = json.loads(call(capsys, "show", reference, "--json"))
    assert as_json["number"] == 2
    assert as_json["aliases"] == ["champion"]
    assert [entry["number"] for entry in as_json["log"]] == [3, 4]


def test_foreign_text_stays_on_one_line(place, bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "ann\n\x1b[31m")
    monkeypatch.setattr("socket.gethostname", lambda: "desk\r")
    path = vary(bundle, tmp_path / "hostile", metrics={"te\nst": {"accu\x07racy": 1.0}})
    call(capsys, "add", "flowers", path)
    for arguments in (["list"], ["show", "flowers"], ["show", "flowers/1"]):
        output = call(capsys, *arguments)
        assert all(line.isprintable() for line in output.splitlines())
        assert r"ann\n\x1b[31m@desk\r" in output
    assert r"te\nst" in output
    assert r"accu\x07racy" in output


def test_a_narrow_terminal_gets_paragraphs():
    rows = [{"version": f"flowers/{n}", "digest": "0123", "by": "a"} for n in (1, 2)]
    table = "version    digest  by\nflowers/1  0123    a\nflowers/2  0123    a"
    assert command._table(rows, 21) == table
    paragraph = "version  flowers/{}\ndigest   0123\nby       a"
    assert command._table(rows, 20) == f"{paragraph.format(1)}\n\n{paragraph.format(2)}"


def test_all_output_wraps_at_columns(registry, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    call(capsys, "promote", "flowers", 1, "--min_f1=0.7", "--note=" + 20 * "word ")
    for arguments in (["list"], ["show", "flowers"], ["show", "flowers/1"], ["verify"]):
        for line in call(capsys, *arguments).splitlines():
            assert len(line) <= 60 or len(line.split()[-1]) > 40, line


def test_read_commands_import_no_heavy_package(registry):
    code = (
        "import sys\n"
        "from cnn_jax.registry import __main__\n"
        "for arguments in (['list'], ['show', 'flowers'], ['promote', 'flowers', '1'], "
        "['rollback', 'flowers'], ['verify']):\n"
        "    __main__.main(arguments)\n"
        "print(*sys.modules)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    heavy = {"jax", "flax", "numpy", "boto3", "mlflow"}
    assert not heavy & set(output.splitlines()[-1].split())


def test_show_lists_skipped_entries(registry, capsys):
    """The log has an entry of a later version of the package, whose action is unknown."""
    append_unknown_entry(registry)
    line = call(capsys, "show", "flowers").splitlines()[-1]
    assert line.split("  ")[-1] == (
        "quarantine (skipped, because this version of cnn_jax does not know the action)"
    )
    assert '"action": "quarantine"' in call(capsys, "show", "flowers", "--json")


def test_verify_names_folders_that_belong_to_no_version(registry, capsys):
    (pathlib.Path(registry.url) / "bundles" / "left").mkdir()
    (pathlib.Path(registry.url) / "bundles" / "left" / "bundle.json").touch()
    unused = "bundles/left belongs to no version: delete it, unless an `add` is running"
    assert call(capsys, "verify").splitlines()[-1] == unused
    assert "left" not in call(capsys, "verify", "flowers")
