"""Explains predictions with saliency maps, which show the evidence for a class in an image.

    cnn_jax explain --bundle=RUN --input FILE_FOLDER_OR_PATTERN ... --output=DIR
        [--method=grad_cam,...|all] [--class=NAME]

writes each image with its map drawn over it, in the image's resolution; the feature maps of the
first images; the network's filters; and explanations.json. index.html shows all of them, and says
which checks each method passes on these images.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from cnn_jax.explain.maps import METHODS
from cnn_jax.explain.pictures import choose_class, choose_methods, explain
from cnn_jax.inference.images import list_inputs, searched_folder
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, DataError


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax explain",
        description="Explain predictions by maps of the evidence in each image.",
    )
    cli.add_input_flags(parser)
    parser.add_argument(
        "--output", required=True, type=cli.path, help="folder for the maps and the page"
    )
    parser.add_argument(
        "--method",
        default="grad_cam",
        help=f"one or more of {', '.join(METHODS)}, separated by commas; or all (grad_cam)",
    )
    parser.add_argument(
        "--class",
        dest="class_name",
        help="class to explain; by default each image's predicted class",
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    predictor = BundlePredictor.load(flags.bundle)
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
    """Checks that a later call with the same inputs would not read the new maps as input images.

    Args:
      output: The folder for the maps; it need not exist.
      inputs: The files, folders and patterns.
      paths: The images that the inputs name.

    Raises:
      ConfigError: The output folder contains some of the images, and a folder or pattern among
        the inputs includes the output folder.
    """
    folder = os.path.realpath(output)
    is_searched = False
    for text in inputs:
        searched = os.path.realpath(searched_folder(text))
        is_file = pathlib.Path(text).is_file()
        is_searched |= folder == searched if is_file else _is_in(folder, searched)
    if is_searched and any(_is_in(os.path.realpath(path.parent), folder) for path in paths):
        raise ConfigError(
            f"--output: {output} holds images of the input, and the next call would read the maps "
            "as images; name another folder"
        )


def _is_in(path: str, folder: str) -> bool:
    """Returns whether `path` is `folder` itself or lies inside `folder`."""
    return os.path.commonpath([path, folder]) == folder


if __name__ == "__main__":
    cli.run(main)
