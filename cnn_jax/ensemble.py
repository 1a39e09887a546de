"""Makes an ensemble: a bundle that averages the predictions of several networks or views.

    cnn_jax ensemble --bundles RUN RUN ... --output=DIR [--flip=horizontal] [--shift=PIXELS]
        [--source=folder:PATH]

copies the bundles, fits one temperature to the validation split, and measures the ensemble on all
splits. With one bundle and --flip or --shift, the result is test-time augmentation. The networks
must have been trained on the same splits: see data.split_seed.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from cnn_jax.config.schema import FLIPS, SOURCE_FORMS
from cnn_jax.data import Track, no_track
from cnn_jax.data.splits import SPLITS
from cnn_jax.inference.bundle import (
    Bundle,
    Ensemble,
    check_output,
    digest,
    find_bundle,
    read_bundle,
    write_ensemble,
)
from cnn_jax.inference.calibration import apply_temperature, fit_temperature
from cnn_jax.inference.ensemble import EnsemblePredictor
from cnn_jax.inference.evaluation import (
    bundle_metrics,
    check_unseen,
    open_as_trained,
    predict_split,
    score,
)
from cnn_jax.system import cli, runtime
from cnn_jax.system.compilation_cache import keep_compiled
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError
from cnn_jax.system.text import percent, table


def make_ensemble(
    bundles: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    flip: str = "none",
    shift: int = 0,
    source: str | None = None,
    track: Track = no_track,
) -> Ensemble:
    """Makes an ensemble of bundles, measures it on all splits, and writes it.

    The probabilities of the members are averaged over the views, and one temperature is fitted to
    the validation split. The written bytes are a function of the arguments and the data, so the
    same call after an interruption gives the same ensemble.

    Args:
      bundles: Bundles, or runs that have a bundle. One bundle needs `flip` or `shift`.
      output: The folder to write. An earlier ensemble in this folder is replaced.
      flip: The axes along which images are also flipped, one of `schema.FLIPS`.
      shift: The number of pixels by which images are also shifted; see `ensemble.views`.
      source: The name of the training data; by default the name in the first bundle.
      track: Shows progress.

    Returns:
      The ensemble with its metrics.

    Raises:
      ConfigError: The bundles cannot form an ensemble, or the output has other files.
      BundleError: There is no bundle, or a bundle is damaged.
      DataError: The data is not the training data, or a member was trained on images that the
        ensemble is to be measured with.
    """
    check_output(output, "ensemble")
    paths = [find_bundle(path) for path in bundles]
    members = [read_bundle(path) for path in paths]
    _check_members(paths, members)
    first = members[0]
    if len(members) == 1 and flip == "none" and not shift:
        raise ConfigError("--bundles: name two bundles or more, or use --flip or --shift")
    if shift >= min(first.preprocessing.image_size):
        side = min(first.preprocessing.image_size)
        raise ConfigError(f"--shift: must be below {side}, the side of the images, got {shift}")
    ensemble = Ensemble(
        members=members,
        flip=flip,
        shift=shift,
        class_names=first.class_names,
        preprocessing=first.preprocessing,
        temperature=1.0,
        data=first.data,
        metrics={},
    )
    predictor = EnsemblePredictor(ensemble)
    dataset = open_as_trained(predictor, source, track)
    for path, member in zip(paths, predictor.members, strict=True):
        check_unseen(member, path, dataset, source, track)
    labels = {split: dataset.source.labels[dataset.splits[split]] for split in SPLITS}
    uncalibrated = {
        split: predict_split(
            predictor, dataset.loader, dataset.splits[split], track, f"measuring {split}"
        )
        for split in SPLITS
    }
    temperature = fit_temperature(uncalibrated["validation"], labels["validation"])
    report = {
        split: score(
            apply_temperature(probabilities, temperature).astype(np.float32),
            labels[split],
            ensemble.class_names,
        )
        for split, probabilities in uncalibrated.items()
    }
    ensemble = dataclasses.replace(
        ensemble, temperature=temperature, metrics=bundle_metrics(report)
    )
    write_ensemble(ensemble, paths, output)
    return ensemble


def _check_members(paths: Sequence[pathlib.Path], members: Sequence[Bundle]) -> None:
    """Raises ConfigError if two bundles are equal, or differ in their classes or their images."""
    digests: dict[str, pathlib.Path] = {}
    for path in paths:
        if (other := digests.setdefault(digest(path), path)) is not path:
            raise ConfigError(f"--bundles: {other} and {path} are the same bundle; name one only")
    first = members[0]
    for path, member in zip(paths, members, strict=True):
        if member.class_names != first.class_names:
            is_order = sorted(member.class_names) == sorted(first.class_names)
            different = "another order of the classes" if is_order else "other classes"
            raise ConfigError(
                f"--bundles: {path} has {different} than {paths[0]}; train both on the same data"
            )
        for field in dataclasses.fields(member.preprocessing):
            # Each member normalises the pixels itself.
            if field.name in ("mean", "std"):
                continue
            own, wanted = (getattr(one.preprocessing, field.name) for one in (member, first))
            if own != wanted:
                raise ConfigError(
                    f"--bundles: {path} was trained with data.{field.name} = {own}, and {paths[0]} "
                    f"with {wanted}; the members of an ensemble need the same images"
                )


def describe(ensemble: Ensemble, names: Sequence[str], width: int | None) -> str:
    """Returns a table of the metrics of the members and of the ensemble.

    Args:
      ensemble: The ensemble.
      names: The names of the members.
      width: The width of the terminal, in columns.
    """
    rows = []
    for name, one in zip([*names, "ensemble"], [*ensemble.members, ensemble], strict=True):
        # The metrics of a member with other splits are of other images.
        is_same = one.data["fingerprint"] == ensemble.data["fingerprint"]
        metrics = one.metrics if is_same else {}
        rows.append(
            (
                name,
                *(
                    percent(metrics[split]["accuracy"], 2) if split in metrics else ""
                    for split in ("validation", "test")
                ),
                f"{metrics['test']['loss']:.4f}" if "test" in metrics else "",
            )
        )
    return table(("", "validation accuracy", "test accuracy", "test loss"), rows, width)


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax ensemble",
        description="Average the predictions of several networks, or of one for several views.",
    )
    parser.add_argument(
        "--bundles",
        required=True,
        nargs="+",
        action="extend",
        type=cli.path,
        metavar="RUN",
        help="the folders of runs or bundles",
    )
    parser.add_argument(
        "--output", required=True, type=cli.path, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--flip",
        default="none",
        choices=FLIPS,
        metavar="AXES",
        help=f"also predict flipped images: {', '.join(FLIPS)} (none)",
    )
    parser.add_argument(
        "--shift",
        default=0,
        type=cli.natural,
        metavar="PIXELS",
        help="also predict images shifted up, down, left and right; 0: not (0)",
    )
    parser.add_argument("--source", help=f"{SOURCE_FORMS}: the training data, if it was moved")
    flags = parser.parse_args(argv)

    runtime.keep_freed_memory()
    keep_compiled()
    ensemble = make_ensemble(
        flags.bundles,
        flags.output,
        flip=flags.flip,
        shift=flags.shift,
        source=flags.source,
        track=Console().track,
    )
    print(describe(ensemble, flags.bundles, cli.columns()))
    print(f"{flags.output}/bundle.json")


if __name__ == "__main__":
    cli.run(main)
