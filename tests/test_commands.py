"""Tests of the command `cnn_jax`, and of `python -m` with modules that are not commands."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

from cnn_jax.commands import COMMANDS

PACKAGE = REPOSITORY / "cnn_jax"


def _python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0)])
def test_every_command_is_listed_on_one_line(arguments, code):
    result = _python("-m", "cnn_jax", *arguments)
    assert result.returncode == code
    for name, (module, purpose) in COMMANDS.items():
        assert f"  {name:<12}{purpose}" in result.stdout.splitlines()
        assert any((PACKAGE / path).exists() for path in (f"{module}.py", f"{module}/__main__.py"))
    assert all(len(line) <= 60 for line in result.stdout.splitlines())
    runnable = {path.stem for path in PACKAGE.glob("*.py") if "cli.run(" in path.read_text()}
    runnable |= {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    assert runnable - {"cli"} == {module for module, _ in COMMANDS.values()}


def test_a_command_is_started_with_its_flags():
    result = _python("-m", "cnn_jax", "cache", "--help")
    assert result.returncode == 0, result.stderr
    assert "--clear" in result.stdout


@pytest.mark.parametrize(
    ("name", "hint"), [("tran", "; did you mean train?"), ("--workdir=x", ""), ("xyz", "")]
)
def test_an_unknown_command_is_one_line(name, hint):
    result = _python("-m", "cnn_jax", name)
    assert result.returncode == 2
    assert result.stdout == ""
    expected = f"error: there is no command {name!r}{hint}; cnn_jax --help lists them\n"
    assert result.stderr == expected


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            ("-m", "cnn_jax.train"),
            "error: cnn_jax.train is not a module; python -m cnn_jax train starts training\n",
        ),
        (
            ("-W", "error", "-m", "cnn_jax.training.step"),
            "error: cnn_jax.training.step is not a command; python -m cnn_jax lists the commands\n",
        ),
        (
            ("-mcnn_jax.data.scan",),
            "error: cnn_jax.data.scan is not a command; python -m cnn_jax lists the commands\n",
        ),
    ],
)
def test_a_module_that_would_do_nothing_is_refused(flag, message):
    result = _python(*flag, "--config=folder")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_a_misspelt_key_or_flag_is_reported_before_jax_is_imported():
    for flag in ("--config.train.epoch=3", "--wrokdir=x", "--config=fodler"):
        code = (
            "import sys; from cnn_jax import commands\n"
            f"sys.argv = ['cnn_jax', 'train', '--workdir=x', {flag!r}]\n"
            "try: commands.main()\n"
            "except SystemExit as end: assert end.code == 2\n"
            "assert not {'jax', 'numpy'} & sys.modules.keys()\n"
        )
        result = _python("-c", code)
        assert result.returncode == 0, result.stderr
        assert "did you mean" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, cnn_jax; assert not {'jax', 'numpy', 'cnn_jax.api'} & sys.modules.keys()\n"
        "assert 'train' in dir(cnn_jax)\n"
        "try: cnn_jax.fit\n"
        "except AttributeError as error: assert 'cnn_jax' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    assert _python("-c", code).returncode == 0


def test_windows_is_refused_in_one_line():
    message = "cnn_jax does not run on Windows; run it on Linux or macOS, or in WSL 2"
    start = "import sys; sys.platform = 'win32'; sys.argv = [{!r}]; import cnn_jax"
    for program in ("-m", "C:\\venv\\Scripts\\cnn_jax.exe"):
        result = _python("-c", start.format(program))
        assert (result.returncode, result.stderr) == (1, f"error: {message}\n")
    result = _python("-c", start.format("-c"))
    assert result.stderr.splitlines()[-1] == f"ImportError: {message}"
