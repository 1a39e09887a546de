"""Why a network decides as it does.

    python -m cnn_jax.explain --bundle=RUN/bundle --input=FILE_OR_FOLDER --output=DIR
        [--method=grad_cam,...|all] [--class=NAME]

writes a map over each image at its own resolution, the feature maps of the first ones, the
network's filters, explanations.json, and index.html that shows it all and says which checks
each method passes on these images.
"""

import argparse
from collections.abc import Sequence

from cnn_jax import cli, runtime
from cnn_jax.compiled import keep_compiled
from cnn_jax.console import Console
from cnn_jax.errors import DataError
from cnn_jax.explain.maps import METHODS
from cnn_jax.explain.pictures import choose_class, choose_methods, explain
from cnn_jax.predict import Predictor, list_images


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cnn_jax.explain", description="Show why a network decides as it does."
    )
    path = cli.path
    parser.add_argument("--bundle", required=True, type=path, help="the bundle, RUN/bundle")
    parser.add_argument("--input", required=True, type=path, help="an image, or a folder of them")
    parser.add_argument("--output", required=True, type=path, help="the folder to write to")
    parser.add_argument(
        "--method",
        default="grad_cam",
        help=f"one or more of {', '.join(METHODS)} with commas between, or all",
    )
    parser.add_argument(
        "--class", dest="class_name", help="the class to explain; the predicted one if not given"
    )
    parser.add_argument(
        "--allow_outside", action="store_true", help="follow links out of the folder"
    )
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    predictor = Predictor.load(flags.bundle)
    methods = choose_methods(predictor, flags.method.split(","))
    if flags.class_name is not None:
        choose_class(predictor, flags.class_name)
    paths = list_images(flags.input, flags.allow_outside)
    track = Console().track
    result = explain(predictor, paths, flags.output, methods, flags.class_name, track)
    if result["no_verdict"]:
        print(result["no_verdict"])
    else:
        for name, method in result["methods"].items():
            print(f"{name}: {method['verdict']}")
    print(f"{flags.output}/index.html")
    num_errors = sum(image["error"] is not None for image in result["images"])
    if num_errors:
        raise DataError(f"{num_errors} of {len(paths)} images could not be read")


if __name__ == "__main__":
    cli.run(main)
