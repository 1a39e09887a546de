"""cnn_jax trains an image classifier on a folder of labelled images, and evaluates it.

    import cnn_jax

    run = cnn_jax.train("PATH", epochs=10)
    run.predict("x.jpg")
    run.report

or, on the command line, `cnn_jax train`; `cnn_jax --help` lists all commands.
"""

import gc
import importlib
import re
import sys
from typing import Any

__version__ = "0.1.0"
__all__ = ["Report", "Run", "load", "train"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Imports `cnn_jax.api` on first use, because importing JAX takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("cnn_jax.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _check_start() -> None:
    """Raises an error on Windows, or if `python -m` names a module that is not a command.

    Raises:
      ImportError: The system is Windows, and a program imports the package.
      SystemExit: The system is Windows, and the package was started as a command; or
        `python -m` names a module that is not a command and would therefore do nothing.
    """
    # Python replaces "-m" in sys.argv with the path of the module only after this package is
    # imported.
    is_module_run = sys.argv[:1] == ["-m"]
    if sys.platform == "win32":
        message = "cnn_jax does not run on Windows; run it on Linux or macOS, or in WSL 2"
        is_script = re.search(r"\bcnn_jax(\.exe)?$", sys.argv[0]) if sys.argv else None
        if is_module_run or is_script:
            raise SystemExit(f"error: {message}")
        raise ImportError(message)
    if is_module_run:
        from cnn_jax.commands import check_module

        named = (re.fullmatch(r"(?:-\w*m)?(cnn_jax[\w.]*)", text) for text in sys.orig_argv[1:])
        if module := next(filter(None, named), None):
            check_module(module[1])
            # The collector would visit all imported objects many times; `cli.run` enables it.
            gc.disable()


_check_start()
