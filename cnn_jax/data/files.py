"""Images in files: a folder with a sub-folder for each class, or a CSV of paths and labels.

Nothing found in a folder is executed or written to, only regular files are
opened, and no link leads out of the folder unless the caller allows it.
"""

import csv
import dataclasses
import errno
import os
import pathlib
import stat
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from cnn_jax.data.decode import looks_like_an_image
from cnn_jax.data.layout import Layout, find_layout, nearly_equal
from cnn_jax.data.source import SPLIT_NAMES, Source, named_splits
from cnn_jax.system.errors import ConfigError, DataError, MissingDataError

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Images that people have, and that are not read.
_OTHER_SUFFIXES = frozenset(
    (".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef")
)
# Thumbnails, bins and snapshots of NAS and desktop systems, in lower case.
_SYSTEM_FOLDERS = frozenset(
    (
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "@sharebin"),
        *("#recycle", "#snapshot", "~snapshot", "$recycle.bin", "system volume information"),
        *("lost+found", "lost.dir", "found.000", "__macosx", "network trash folder"),
        *("temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
# Names that are found together in a folder that this project wrote. Where such a folder has
# pictures, they lie beside these files, or else below: a run in a class's folder hides no class.
_OUTPUTS_WITHOUT_PICTURES = (
    frozenset(("lock", "heartbeat.json")),  # A run that has just been started.
    frozenset(("config.json", "metrics.jsonl")),
    frozenset(("bundle.json", "weights.safetensors")),
)
_OUTPUTS_WITH_PICTURES = (
    frozenset(("metrics.json", "predictions.csv")),  # The report of a run.
    frozenset(("explanations.json",)),
    frozenset(("inspection.json",)),
    frozenset(("study.json", "trials.csv")),
)
_OTHER_FORMAT = "images of other formats"
_SYSTEM = "thumbnails, bins and the like of other programs"
_OUTPUT = "folders that cnn_jax wrote"
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar")
_HIDDEN = "hidden"
_NO_IMAGE = "not images"
_SPECIAL = "neither files nor folders"
_UNREADABLE_FOLDER = "folders that cannot be read"
_DANGLING = "links that lead nowhere"
_OUTSIDE = "links out of the folder"
_ALLOW = "data.allow_outside=True (--allow_outside) follows them"
_SEEN = "links to what is there already"
_NO_CLASS = "outside the class folders"


@dataclasses.dataclass(frozen=True)
class File:
    """A regular file below a folder.

    Attributes:
      path: From the folder, with "/" between its parts.
      size: Bytes.
      version: Changes with the content: size, times of change and inode. (The time
        of modification alone stays when a file is moved to another's place.)
    """

    path: str
    size: int
    version: str

    @classmethod
    def of(cls, path: str, status: os.stat_result) -> "File":
        changed = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return cls(path, status.st_size, "-".join(map(str, changed)))

    @property
    def parts(self) -> list[str]:
        return self.path.split("/")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The content of a folder.

    Attributes:
      files: Regular files, sorted by path.
      ignored: How many things of each kind were left out.
      folders: Paths of the folders that were looked into and are no links.
      outputs: Paths of the folders that this project wrote, which are left out.
    """

    files: list[File]
    ignored: dict[str, int]
    folders: list[str]
    outputs: list[str]


def is_output(names: Collection[str]) -> bool:
    """Whether a folder with these entries was written by this project."""
    names = set(names)
    if any(marks <= names for marks in _OUTPUTS_WITHOUT_PICTURES):
        return not any(map(_has_image_suffix, names))
    return any(marks <= names for marks in _OUTPUTS_WITH_PICTURES)


def check_output(flag: str, output: pathlib.Path, data: pathlib.Path) -> None:
    """Checks that what is written to a folder does not mix with the images of a data set.

    Args:
      flag: That names the folder, for the message.
      output: The folder; it need not be there.
      data: The data set's folder.

    Raises:
      ConfigError: The folder is the data set's, or has some of its images in it.
    """
    folder, root = (os.path.realpath(path) for path in (output, data))
    if os.path.commonpath([root, folder]) != root or not pathlib.Path(folder).is_dir():
        return
    is_earlier = folder != root and is_output(os.listdir(folder))  # noqa: PTH208
    if is_earlier or not list_images(pathlib.Path(folder)).files:
        return
    raise ConfigError(
        f"{flag}: {output} holds images of the data, and what is written there would be taken for "
        "more of them; name another folder"
    )


def list_files(root: pathlib.Path, allow_outside: bool = False) -> Listing:
    """All regular files anywhere below a folder, and what else is there.

    Left out are hidden files and folders, those that a NAS or a desktop system makes for
    itself, and folders that this project wrote: runs, bundles, reports, explanations. A link
    is followed if what it leads to lies in the folder (or `allow_outside`) and has not been
    listed yet, so that no file comes twice and no loop of links is endless.
    """
    return _Walk(root, allow_outside).run()


class _Walk:
    def __init__(self, root: pathlib.Path, allow_outside: bool):
        self._root = os.path.realpath(root)
        self._allow_outside = allow_outside
        self._files: list[File] = []
        self._ignored: Counter[str] = Counter()
        self._folders: list[str] = []
        self._outputs: list[str] = []
        self._links: list[tuple[str, str]] = []
        self._seen: set[tuple[int, int]] = set()  # (device, inode)

    def run(self) -> Listing:
        self._add_folder(self._root, "")
        # Links last: what a link leads to may be listed under its own name.
        while self._links:
            links, self._links = sorted(self._links), []
            for name, link in links:
                self._follow(name, link)
        files = sorted(self._files, key=lambda file: file.path)
        return Listing(files, dict(self._ignored), self._folders, self._outputs)

    def _add_folder(self, folder: str, name: str, *, linked: bool = False) -> None:
        """Lists a folder under a name, "" for the root, without following links.

        Of a linked folder, what has been listed already is left out.
        """
        waiting = [(folder, name)]
        while waiting:
            folder, name = waiting.pop()
            try:
                # Through the folder: one whose files cannot be reached is unreadable too.
                status = os.stat(f"{folder}/.")  # noqa: PTH116
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError:
                self._ignored[_UNREADABLE_FOLDER] += 1
                if not linked:
                    self._folders.append(name)
                continue
            self._seen.add((status.st_dev, status.st_ino))
            # The root itself is always read, because the user has named it.
            if name and is_output([entry.name for entry in found]):
                self._ignored[_OUTPUT] += 1
                self._outputs.append(name)
                continue
            if not linked:
                self._folders.append(name)
            for entry in found:
                below = f"{name}/{entry.name}" if name else entry.name
                if entry.name.startswith("."):
                    self._ignored[_HIDDEN] += 1
                elif entry.name.lower() in _SYSTEM_FOLDERS:
                    self._ignored[_SYSTEM] += 1
                elif entry.is_symlink():
                    self._links.append((below, entry.path))
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, below))
                elif entry.is_file(follow_symlinks=False):
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:  # It has gone since the folder was listed.
                        continue
                    if linked and (status.st_dev, status.st_ino) in self._seen:
                        self._ignored[_SEEN] += 1
                    else:
                        self._add_file(below, status)
                else:
                    self._ignored[_SPECIAL] += 1

    def _add_file(self, name: str, status: os.stat_result) -> None:
        self._seen.add((status.st_dev, status.st_ino))
        self._files.append(File.of(name, status))

    def _follow(self, name: str, link: str) -> None:
        try:
            target = os.path.realpath(link, strict=True)
            status = pathlib.Path(target).stat()
        except OSError:
            self._ignored[_DANGLING] += 1
            return
        is_inside = os.path.commonpath([self._root, target]) == self._root
        if (status.st_dev, status.st_ino) in self._seen:
            self._ignored[_SEEN] += 1
        elif not (is_inside or self._allow_outside):
            self._ignored[_OUTSIDE] += 1
        elif stat.S_ISDIR(status.st_mode):
            self._add_folder(target, name, linked=True)
        elif stat.S_ISREG(status.st_mode):
            self._add_file(name, status)
        else:
            self._ignored[_SPECIAL] += 1


def _has_image_suffix(name: str) -> bool:
    return pathlib.PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def is_image_file(root: pathlib.Path, path: str) -> bool:
    """Whether a file is an image by the ending of its name, or else by how its content begins."""
    if _has_image_suffix(path):
        return True
    try:
        with (root / path).open("rb") as file:
            return looks_like_an_image(file.read(16))
    except OSError:
        return False


def list_images(root: pathlib.Path, allow_outside: bool = False) -> Listing:
    """The files of `list_files` that are images, or should be, judging by their names."""
    listing = list_files(root, allow_outside)
    images, others, ignored = [], 0, dict(listing.ignored)
    for file in listing.files:
        if is_image_file(root, file.path):
            images.append(file)
        elif pathlib.PurePosixPath(file.path).suffix.lower() in _OTHER_SUFFIXES:
            others += 1
    if others:
        ignored[_OTHER_FORMAT] = others
    if strays := len(listing.files) - len(images) - others:
        ignored[_NO_IMAGE] = strays
    return dataclasses.replace(listing, files=images, ignored=ignored)


@dataclasses.dataclass(frozen=True)
class FileReader:
    """Reads regular files below a folder; it can be sent to another process."""

    root: pathlib.Path

    def __call__(self, path: str) -> bytes:
        try:
            # Without waiting: nobody may write to a pipe.
            descriptor = os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_NONBLOCK)  # noqa: PTH118
        except ValueError as error:
            raise OSError(errno.EINVAL, "is no name that a file can have") from error
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            return file.readall()


def open_folder(
    path: str | os.PathLike[str], name: str = "", allow_outside: bool = False
) -> Source:
    """`class/**/image`, or the same below folders for the splits; see `layout.find_layout`.

    The classes are the sub-folders that have images, sorted by name; of a folder
    that is divided already, those of all its parts together. No image is opened.

    Args:
      path: The folder.
      name: Of the source; by default `folder:PATH`. With `classes:PATH` each sub-folder is a
        class, with `splits:PATH` each is a split, whatever `find_layout` makes of their names.
      allow_outside: Whether links may lead out of the folder.

    Raises:
      DataError: There is no such folder, or no class in it, or its layout is ambiguous.
    """
    name = name or f"folder:{path}"
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise MissingDataError(f"{name}: there is no folder {root}")
    listing = list_images(root, allow_outside)
    images, ignored = listing.files, dict(listing.ignored)
    layout = find_layout((image.path for image in images), name)
    examples = [
        (image, place) for image in images if (place := layout.classify(image.path)) is not None
    ]
    if len(examples) < len(images):
        ignored[_NO_CLASS] = len(images) - len(examples)
    if not examples:
        hint = "it has images, but no sub-folders" if images else "there are no images in it"
        raise DataError(
            f"{name}: {root} needs a sub-folder of images for each class; {hint}"
            + _other_ways(root)
            + describe_ignored(ignored)
        )
    source = _make_source(
        name,
        root,
        [file for file, _ in examples],
        [class_name for _, (class_name, _) in examples],
        [split for _, (_, split) in examples],
    )
    remarks = [*layout.remarks, *_classes_without_images(listing, layout, source)]
    if _OTHER_FORMAT in ignored:
        remarks.append(
            f"{ignored[_OTHER_FORMAT]:,} images are of formats that are not read, such as HEIC or "
            "AVIF, and are left out: convert them to JPEG or PNG"
        )
    if _OUTSIDE in ignored:
        remarks.append(f"{ignored[_OUTSIDE]:,} links lead out of the folder: {_ALLOW}")
    return dataclasses.replace(
        source,
        ignored=ignored,
        remarks=[*source.remarks, *remarks],
        split_folders={folder: split for folder, split in layout.parts.items() if folder},
    )


def _other_ways(root: pathlib.Path) -> str:
    """Tables and archives that lie directly in a folder without classes, as part of a message."""
    found = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    tables = [entry for entry in found if entry.lower().endswith(".csv")]
    archives = [entry for entry in found if entry.lower().endswith(_ARCHIVES)]
    hint = ""
    if tables:
        hint += (
            f"; csv:{root / tables[0]} takes the labels from a table with columns path and label"
        )
    if archives:
        hint += f"; {archives[0]} is an archive to be extracted first"
    return hint


def _classes_without_images(listing: Listing, layout: Layout, source: Source) -> list[str]:
    """A remark for each folder where a class would be and that has no images."""
    remarks = []
    for folder in sorted(filter(None, listing.folders)):
        parent, _, name = folder.rpartition("/")
        is_class = layout.spellings.get(folder, name) in source.class_names
        has_outputs = any(output.startswith(f"{folder}/") for output in listing.outputs)
        if parent in layout.parts and not (is_class or has_outputs):
            remarks.append(
                f"the folder {folder} has no images, so there is no such class; add some, or "
                "remove the folder"
            )
    return remarks


def _make_source(
    name: str,
    root: pathlib.Path,
    files: Sequence[File],
    class_of_each: Sequence[str],
    own_splits: list[str],
) -> Source:
    """A source of files below a folder; the classes are sorted by name."""
    class_names = sorted(set(class_of_each))
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    paths = [file.path for file in files]
    return Source(
        name=name,
        class_names=class_names,
        ids=paths,
        labels=np.array([label_of[class_name] for class_name in class_of_each], np.int32),
        read=FileReader(root),
        keys=paths,
        sizes=[file.size for file in files],
        versions=[file.version for file in files],
        own_splits=own_splits,
        remarks=[
            f"the classes {' and '.join(names)} differ only in case, spaces or how their accents "
            "are written: give them one name if they are one class"
            for names in nearly_equal(class_names)
        ],
    )


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """What is not there because it was left out, as the end of a message; "" if nothing was."""
    if not ignored:
        return ""
    counts = ", ".join(f"{number:,} {kind}" for kind, number in ignored.items())
    return f" (left out: {counts}" + (f": {_ALLOW})" if _OUTSIDE in ignored else ")")


def open_csv(path: str | os.PathLike[str], name: str = "", allow_outside: bool = False) -> Source:
    """A table with the columns `path`, `label` and, if wanted, `split`.

    Paths are relative to the table's folder; an absolute one that lies in it counts as
    relative. A split is one of `SPLIT_NAMES`, or empty. Spaces around a cell do not
    count.

    Args:
      path: The CSV file, UTF-8, with a header.
      name: Of the source; by default `csv:PATH`.
      allow_outside: Whether paths may lead out of the table's folder.

    Raises:
      DataError: There is no such file, or a row of it is wrong; the message has
        the line.
    """
    name = name or f"csv:{path}"
    table = pathlib.Path(path).expanduser()
    root = table.absolute().parent
    folder = os.path.realpath(root)
    lines: dict[str, int] = {}
    labels, own_splits = [], []
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = reader.fieldnames = [column.strip() for column in reader.fieldnames or []]
            if not {"path", "label"} <= set(columns):
                raise DataError(
                    f"{name}: the first line must name the columns path and label, and perhaps "
                    f"split; it has {', '.join(columns) or 'nothing'}"
                )
            for row in reader:
                where = f"{name}: line {reader.line_num}"
                if None in row:  # Where DictReader puts what is too much.
                    raise DataError(
                        f"{where} has more than {len(columns)} columns; a comma within a cell "
                        'needs quotes around it, as in "salmon, smoked"'
                    )
                image, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                split = (row.get("split") or "").strip()
                if not image or not label:
                    raise DataError(f"{where} has no {'label' if image else 'path'}")
                image = _plain_path(root, image)
                if image in lines:
                    raise DataError(f"{where} has {image} again, as line {lines[image]}")
                if split and split.lower() not in SPLIT_NAMES:
                    raise DataError(
                        f"{where}: the split must be one of {', '.join(SPLIT_NAMES)}, or empty, "
                        f"got {split!r}"
                    )
                if not allow_outside and not _is_inside(folder, image):
                    raise DataError(
                        f"{where}: {image} lies outside the table's folder, {root}; "
                        "data.allow_outside=True (--allow_outside) allows it"
                    )
                lines[image] = reader.line_num
                labels.append(label)
                own_splits.append(SPLIT_NAMES[split.lower()] if split else "")
    except FileNotFoundError as error:
        raise MissingDataError(f"{name}: {error.strerror}") from error
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name} is not a CSV file in UTF-8: {error}") from error
    if not lines:
        raise DataError(f"{name} has no rows")
    files = [_status(root, image) for image in lines]
    source = _make_source(name, root, files, labels, own_splits)
    return dataclasses.replace(source, split_folders=named_splits(lines))


def _plain_path(root: pathlib.Path, path: str) -> str:
    """One spelling for a path: without "./" and "//", and relative if it can be."""
    plain = pathlib.PurePosixPath(path)
    return str(plain.relative_to(root) if plain.is_relative_to(root) else plain)


def _is_inside(folder: str, path: str) -> bool:
    try:
        real = os.path.realpath(os.path.join(folder, path))  # noqa: PTH118
        return os.path.commonpath([folder, real]) == folder
    except ValueError:  # A name that no file can have; reading it will say so.
        return True


def _status(root: pathlib.Path, path: str) -> File:
    """A file of a table; of no size if it is not there, which reading it will tell."""
    try:
        return File.of(path, (root / path).stat())
    except (OSError, ValueError):
        return File(path, 0, "")
