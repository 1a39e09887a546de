"""The list of commands of this package, and the function that starts them.

    cnn_jax COMMAND [FLAG ...]

or `python -m cnn_jax COMMAND`; `python -m cnn_jax.MODULE` is the same command.
"""

import gc
import runpy
import sys
from typing import NoReturn

from cnn_jax.system.errors import did_you_mean

# The module of each command, and a description of what the command does.
COMMANDS = {
    "train": ("main", "train, measure and bundle a classifier"),
    "inspect": ("inspect", "look at a data set before training"),
    "predict": ("predict", "classify images"),
    "evaluate": ("evaluate", "measure a bundle on a split"),
    "ensemble": ("ensemble", "average the predictions of several networks"),
    "report": ("report", "write the report of a run or an ensemble"),
    "explain": ("explain", "show what a network looks at"),
    "compress": ("compress", "make a smaller and faster network"),
    "export": ("export", "write a model for other runtimes"),
    "robustness": ("robustness", "measure a bundle on corrupted images"),
    "soup": ("soup", "average continuations of a run"),
    "lr_range": ("lr_range", "suggest a learning rate"),
    "tune": ("tune", "search for better hyper-parameters"),
    "registry": ("registry", "keep versions of bundles under names"),
    "compare": ("compare", "compare two versions by logged images"),
    "experiment": ("experiment", "compare two versions by live requests"),
    "serve": ("serve", "answer requests over HTTP"),
    "monitor": ("monitor", "find drift and lost accuracy while serving"),
    "label": ("label", "label images of the request log"),
    "retrain": ("retrain", "retrain on labels, and promote by evidence"),
    "cache": ("cache", "show or clear the files kept between runs"),
}


def main() -> NoReturn:
    """Runs the command that the command line names, and exits."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in (None, "-h", "--help", "help"):
        print(_usage())
        sys.exit(0 if name else 2)
    if name == "--version":
        print(f"cnn_jax {sys.modules['cnn_jax'].__version__}")
        sys.exit()
    command = "train" if name == "main" else name
    if command not in COMMANDS:
        _fail(
            f"there is no command {name!r}{did_you_mean(name, COMMANDS)}; cnn_jax --help lists them"
        )
    module = f"cnn_jax.{COMMANDS[command][0]}"
    del sys.argv[1]
    gc.disable()  # See `cnn_jax._check_start`.
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


def check_module(name: str) -> None:
    """Exits with an error if the module that `python -m` names is not a command.

    Args:
      name: The full name of a module of this package.
    """
    commands = {f"{__package__}.{module}" for module, _ in COMMANDS.values()}
    if name.removesuffix(".__main__") in {*commands, __package__}:
        return
    if name == f"{__package__}.train":
        _fail(f"{name} is not a module; python -m {__package__} train starts training")
    _fail(f"{name} is not a command; python -m {__package__} lists the commands")


def _usage() -> str:
    lines = [f"  {name:<12}{purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: cnn_jax COMMAND [FLAG ...]",
            "",
            *lines,
            "",
            "cnn_jax COMMAND --help lists the flags of a command.",
        ]
    )


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
