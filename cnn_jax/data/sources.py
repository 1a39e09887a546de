"""The function that opens a source by its name, such as `folder:PATH` or `tfds:NAME`.

shapes[:N]          the generated data set, or its first N images
folder:PATH         a folder with one sub-folder of images per class, or with splits of such folders
classes:PATH        a folder in which each sub-folder is a class, even if it is named as a split
splits:PATH         a folder in which each sub-folder is a split
csv:PATH            a table with the columns path, label and optionally split
tfds:NAME[:SPLIT]   a data set of TensorFlow Datasets
SOURCE+log:DIR      one of these, and the labelled images of a request log or of a snapshot of it
"""

import dataclasses
import pathlib

from cnn_jax.config.schema import LOG_MARK, SOURCE_FORMS, SOURCE_PATTERN, source_hint
from cnn_jax.data import Track, no_track, shapes
from cnn_jax.data.files import open_csv, open_folder
from cnn_jax.data.source import Source
from cnn_jax.data.tfds import open_tfds
from cnn_jax.system.errors import ConfigError

_FOLDERS = ("folder", "classes", "splits")


def absolute(name: str) -> str:
    """Makes the paths in a source's name absolute, so that any working directory can be used.

    A name that `open_source` refuses is unchanged.
    """
    if not SOURCE_PATTERN.fullmatch(name):
        return name
    base, *logs = name.split(LOG_MARK)
    kind, _, path = base.partition(":")
    if kind in (*_FOLDERS, "csv"):
        base = f"{kind}:{_absolute_path(path)}"
    return LOG_MARK.join([base, *(str(_absolute_path(log)) for log in logs)])


def _absolute_path(path: str) -> pathlib.Path:
    return pathlib.Path(path).expanduser().absolute()


def listed_folder(name: str) -> pathlib.Path | None:
    """Returns the folder from which a source lists images; None if the source is not a folder."""
    kind, _, path = name.partition(LOG_MARK)[0].partition(":")
    return pathlib.Path(path).expanduser() if kind in _FOLDERS and path else None


def open_source(name: str, track: Track = no_track, allow_outside: bool = False) -> Source:
    """Opens a source by the name given in `data.source` or `--source`.

    Args:
      name: One of `SOURCE_FORMS`, and `+log:DIR` for each request log.
      track: Shows progress.
      allow_outside: Whether links in a folder, and paths in a table, may lead to files outside
        the folder.

    Raises:
      ConfigError: The name has none of the `SOURCE_FORMS`.
      DataError: The source does not exist, or is not a set of labelled images.
    """
    if not SOURCE_PATTERN.fullmatch(name):
        raise ConfigError(f"a source must be {SOURCE_FORMS}, got {name!r}{source_hint(name)}")
    base, *logs = name.split(LOG_MARK)
    source = _open_base(base, track, allow_outside)
    if not logs:
        return source
    # Importing pyarrow would delay every command, and few sources have a log.
    from cnn_jax.data.labelled_log import open_log

    folders = [pathlib.Path(log).expanduser() for log in logs]
    return dataclasses.replace(source, log=open_log(folders, source.class_names))


def _open_base(name: str, track: Track, allow_outside: bool) -> Source:
    """Opens a source without request logs."""
    kind, _, rest = name.partition(":")
    if kind in _FOLDERS:
        return open_folder(rest, name, allow_outside)
    if kind == "csv":
        return open_csv(rest, allow_outside)
    if kind == "tfds":
        return open_tfds(rest, track)
    num_images = int(rest) if rest else shapes.NUM_IMAGES
    return open_folder(shapes.generate(num_images, track=track) / "images", name)
