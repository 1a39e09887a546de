"""Why a network decides as it does.

    cnn_jax explain --bundle=RUN --input FILE_FOLDER_OR_PATTERN ... --output=DIR
        [--method=grad_cam,...|all] [--class=NAME]

writes a map over each image at its own resolution, the feature maps of the first ones, the
network's filters, explanations.json, and index.html that shows it all and says which checks
each method passes on these images.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from cnn_jax.explain.maps import METHODS
from cnn_jax.explain.pictures import choose_class, choose_methods, explain
from cnn_jax.inference.images import list_inputs, searched_folder
from cnn_jax.inference.predictor import Predictor
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, DataError


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax explain", description="Show why a network decides as it does."
    )
    cli.add_input_flags(parser)
    parser.add_argument("--output", required=True, type=cli.path, help="the folder to write to")
    parser.add_argument(
        "--method",
        default="grad_cam",
        help=f"one or more of {', '.join(METHODS)} with commas between, or all",
    )
    parser.add_argument(
        "--class", dest="class_name", help="the class to explain; the predicted one if not given"
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    predictor = Predictor.load(flags.bundle)
    methods = choose_methods(predictor, flags.method.split(","))
    if flags.class_name is not None:
        choose_class(predictor, flags.class_name)
    paths = list_inputs(flags.input, flags.allow_outside)
    _check_output(flags.output, flags.input, paths)
    track = Console().track
    result = explain(predictor, paths, flags.output, methods, flags.class_name, track)
    verdicts = [f"{name}: {method['verdict']}" for name, method in result["methods"].items()]
    for line in [result["no_verdict"]] if result["no_verdict"] else verdicts:
        print(cli.fit(line, sys.stdout))
    print(f"{flags.output}/index.html")
    num_errors = sum(image["error"] is not None for image in result["images"])
    if num_errors:
        raise DataError(f"{num_errors} of {len(paths)} images could not be read")


def _check_output(output: str, inputs: Sequence[str], paths: Sequence[pathlib.Path]) -> None:
    """Checks that the maps do not mix with the images.

    Args:
      output: The folder for the maps; it need not be there.
      inputs: The files, folders and patterns.
      paths: The images that these name.

    Raises:
      ConfigError: A later call with these inputs could take the maps for images, since the
        folder lies in what the inputs name and has some of the images in it.
    """
    folder = os.path.realpath(output)
    is_searched = False
    for text in inputs:
        searched = os.path.realpath(searched_folder(text))
        is_file = pathlib.Path(text).is_file()
        is_searched |= folder == searched if is_file else _is_in(folder, searched)
    if is_searched and any(_is_in(os.path.realpath(path.parent), folder) for path in paths):
        raise ConfigError(
            f"--output: {output} holds images of the input, and the maps would be taken for more "
            "of them; name another folder"
        )


def _is_in(path: str, folder: str) -> bool:
    """Whether a path is a folder's own or leads into it."""
    return os.path.commonpath([path, folder]) == folder


if __name__ == "__main__":
    cli.run(main)
