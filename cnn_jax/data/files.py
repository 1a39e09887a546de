"""Sources of image files: a folder with one sub-folder per class, or a CSV table.

Only regular files are opened, and nothing in a folder is executed or changed. A symbolic link to
a target outside the folder is followed only if the caller allows it.
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
# The suffixes of common image formats that are not supported.
_OTHER_SUFFIXES = frozenset(
    (".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef")
)
# Names, in lower case, of folders and files that NAS and desktop systems create, for example for
# thumbnails, deleted files and snapshots.
_SYSTEM_FOLDERS = frozenset(
    (
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "@sharebin"),
        *("#recycle", "#snapshot", "~snapshot", "$recycle.bin", "system volume information"),
        *("lost+found", "lost.dir", "found.000", "__macosx", "network trash folder"),
        *("temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    )
)
# A folder counts as an output of this project if it contains all names in one of these sets. The
# sets in _OUTPUTS_WITHOUT_PICTURES do not apply to a folder that directly contains images: such a
# folder may be a class folder into which a run was written.
_OUTPUTS_WITHOUT_PICTURES = (
    frozenset(("lock", "heartbeat.json")),  # The folder of a run that has just started.
    frozenset(("config.json", "metrics.jsonl")),
    frozenset(("bundle.json", "weights.safetensors")),
)
_OUTPUTS_WITH_PICTURES = (
    frozenset(("metrics.json", "predictions.csv")),  # The report folder of a run.
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
# The names, singular and plural, that messages use for each kind of ignored file or folder. The
# kinds are also keys in JSON outputs.
_IN_WORDS = {
    _OTHER_FORMAT: ("image of another format", "images of other formats"),
    _SYSTEM: ("file or folder of another program", "files or folders of other programs"),
    _OUTPUT: ("folder that cnn_jax wrote", "folders that cnn_jax wrote"),
    _HIDDEN: ("hidden file or folder", "hidden files or folders"),
    _NO_IMAGE: ("file that is not an image", "files that are not images"),
    _SPECIAL: ("special file, such as a pipe", "special files, such as pipes"),
    _UNREADABLE_FOLDER: ("folder that cannot be read", "folders that cannot be read"),
    _DANGLING: ("broken link", "broken links"),
    _OUTSIDE: ("link out of the folder", "links out of the folder"),
    _SEEN: ("link to a file that is listed", "links to files that are listed"),
    _NO_CLASS: ("image outside the class folders", "images outside the class folders"),
    # The module `tfds` uses the following kinds.
    "without a label": ("example without a label", "examples without a label"),
    "in other splits": ("example in another split", "examples in other splits"),
    # The modules `labelled_log` and `join` use the following kinds.
    "labels of images that were not stored": (
        "label of an image that was not stored",
        "labels of images that were not stored",
    ),
    "labels of images that no log has": (
        "label of an image that no log has",
        "labels of images that no log has",
    ),
    "labelled images of models with other classes": (
        "labelled image of a model with other classes",
        "labelled images of models with other classes",
    ),
    "damaged labelled images": ("damaged labelled image", "damaged labelled images"),
    "copies of other logged images": (
        "copy of another logged image",
        "copies of other logged images",
    ),
    "copies of images of the data": (
        "copy of an image of the data",
        "copies of images of the data",
    ),
    "logged images of a class that the data lacks": (
        "logged image of a class that the data lacks",
        "logged images of classes that the data lacks",
    ),
    "logged images of another size": (
        "logged image of another size",
        "logged images of other sizes",
    ),
}


@dataclasses.dataclass(frozen=True)
class File:
    """A regular file below a folder.

    Attributes:
      path: The path relative to the folder, with "/" between its parts.
      size: The size in bytes.
      version: A text that changes when the content changes. It consists of the size, the times
        of modification and of status change, and the inode. (A file that is replaced by a moved
        file may keep its time of modification.)
    """

    path: str
    size: int
    version: str

    @classmethod
    def from_status(cls, path: str, status: os.stat_result) -> "File":
        """Creates the object from a path, relative to the folder, and the result of `stat`."""
        changed = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return cls(path, status.st_size, "-".join(map(str, changed)))


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files below a folder, and the counts of ignored files and folders.

    Attributes:
      files: Regular files, sorted by path.
      ignored: The number of ignored files and folders, by kind.
      folders: The paths of the listed folders, except symbolic links.
      outputs: The paths of the folders that this project wrote, which are ignored.
    """

    files: list[File]
    ignored: dict[str, int]
    folders: list[str]
    outputs: list[str]


def is_output(names: Collection[str]) -> bool:
    """Returns whether a folder that contains `names` is an output of this project."""
    names = set(names)
    if any(marks <= names for marks in _OUTPUTS_WITHOUT_PICTURES):
        return not any(map(_has_image_suffix, names))
    return any(marks <= names for marks in _OUTPUTS_WITH_PICTURES)


def check_output(flag: str, output: pathlib.Path, data: pathlib.Path) -> None:
    """Checks that an output folder contains no images of a data set.

    Args:
      flag: The flag of the output folder, for the message.
      output: The output folder, which need not exist.
      data: The data set's folder.

    Raises:
      ConfigError: The output folder is the data set's folder, or contains some of its images.
    """
    folder, root = (os.path.realpath(path) for path in (output, data))
    if os.path.commonpath([root, folder]) != root or not pathlib.Path(folder).is_dir():
        return
    is_earlier = folder != root and is_output(os.listdir(folder))  # noqa: PTH208
    if is_earlier or not list_images(pathlib.Path(folder)).files:
        return
    raise ConfigError(
        f"{flag}: {output} holds images of the data, and output files in it would become part of "
        "the data; name another folder"
    )


def list_files(root: pathlib.Path, allow_outside: bool = False) -> Listing:
    """Lists all regular files below a folder, and counts the ignored files and folders.

    The ignored files and folders are: hidden files and folders, the folders of NAS and desktop
    systems, and folders that this project wrote (runs, bundles, reports, explanations). A symbolic
    link is followed if its target is in the folder (or `allow_outside` is True) and is not listed
    yet. So each file is listed once, and a cycle of links does no harm.
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
        # The (device, inode) of each file and folder that was visited.
        self._seen: set[tuple[int, int]] = set()

    def run(self) -> Listing:
        self._add_folder(self._root, "")
        # Symbolic links are followed last. So a file in the folder is listed under its own path,
        # not under the path of a link to the file.
        while self._links:
            links, self._links = sorted(self._links), []
            for name, link in links:
                self._follow(name, link)
        files = sorted(self._files, key=lambda file: file.path)
        return Listing(files, dict(self._ignored), self._folders, self._outputs)

    def _add_folder(self, folder: str, name: str, *, linked: bool = False) -> None:
        """Adds the files of a folder and of its sub-folders to the listing.

        Symbolic links are collected, to be followed later.

        Args:
          folder: The path of the folder on disk.
          name: The path of the folder in the list, relative to the root; "" for the root.
          linked: Whether a symbolic link led to the folder. Files that are already listed are
            then ignored.
        """
        waiting = [(folder, name)]
        while waiting:
            folder, name = waiting.pop()
            try:
                # The path ends with "/.", so that a folder without search permission raises an
                # error here.
                status = os.stat(f"{folder}/.")  # noqa: PTH116
                with os.scandir(folder) as entries:
                    found = sorted(entries, key=lambda entry: entry.name)
            except OSError:
                self._ignored[_UNREADABLE_FOLDER] += 1
                if not linked:
                    self._folders.append(name)
                continue
            self._seen.add((status.st_dev, status.st_ino))
            # The root folder is read even if it is an output of this project, because the user
            # named the root folder.
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
                    except OSError:  # The file was removed after the folder was listed.
                        continue
                    if linked and (status.st_dev, status.st_ino) in self._seen:
                        self._ignored[_SEEN] += 1
                    else:
                        self._add_file(below, status)
                else:
                    self._ignored[_SPECIAL] += 1

    def _add_file(self, name: str, status: os.stat_result) -> None:
        self._seen.add((status.st_dev, status.st_ino))
        self._files.append(File.from_status(name, status))

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
    """Returns whether the suffix or the first bytes of a file are those of an image."""
    if _has_image_suffix(path):
        return True
    try:
        with (root / path).open("rb") as file:
            return looks_like_an_image(file.read(16))
    except OSError:
        return False


def list_images(root: pathlib.Path, allow_outside: bool = False) -> Listing:
    """Lists the images below a folder: the files of `list_files` that `is_image_file` accepts."""
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
    """A picklable function that reads the bytes of a regular file below a folder."""

    root: pathlib.Path

    def __call__(self, path: str) -> bytes:
        try:
            # Without O_NONBLOCK, opening a pipe that has no writer would wait forever.
            descriptor = os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_NONBLOCK)  # noqa: PTH118
        except ValueError as error:
            raise OSError(errno.EINVAL, "is not a valid file name") from error
        with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            return file.readall()


def open_folder(
    path: str | os.PathLike[str], name: str = "", allow_outside: bool = False
) -> Source:
    """Creates a source from a folder with images in `CLASS/**` or in `SPLIT/CLASS/**`.

    `find_layout` describes how splits are recognized. The classes are the sub-folders with images,
    sorted by name; in a divided folder, the classes of all splits. No image is decoded.

    Args:
      path: The folder.
      name: The name of the source; `folder:PATH` by default. With `classes:PATH` each
        sub-folder is a class, with `splits:PATH` each is a split.
      allow_outside: Whether links may lead out of the folder.

    Raises:
      DataError: The folder does not exist or has no class, or its layout is ambiguous.
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
    if 0 < len(examples) < len(images):
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
    """Returns a hint for a folder without classes if the folder contains a table or an archive."""
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
    """Returns a warning for each class folder that contains no images."""
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
    """Creates a source from files below a folder; the classes are sorted by name."""
    class_names = sorted(set(class_of_each))
    class_labels = {class_name: label for label, class_name in enumerate(class_names)}
    paths = [file.path for file in files]
    return Source(
        name=name,
        class_names=class_names,
        ids=paths,
        labels=np.array([class_labels[class_name] for class_name in class_of_each], np.int32),
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


def count_ignored(ignored: Mapping[str, int]) -> str:
    """Formats the counts of ignored files and folders as text, such as "2 broken links"."""
    return ", ".join(
        f"{number:,} {_IN_WORDS.get(kind, (kind, kind))[number != 1]}"
        for kind, number in ignored.items()
    )


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """Returns the end of a message, with the counts of ignored files; "" if no file was ignored."""
    if not ignored:
        return ""
    advice = f": {_ALLOW}" if _OUTSIDE in ignored else ""
    return f" (left out: {count_ignored(ignored)}{advice})"


def open_csv(path: str | os.PathLike[str], allow_outside: bool = False) -> Source:
    """Creates a source from a CSV file with the columns `path`, `label` and optionally `split`.

    Paths are relative to the table's folder; absolute paths in this folder are made relative.
    A split is one of `SPLIT_NAMES`, or empty. Spaces around cells are removed.

    Args:
      path: The CSV file in UTF-8, with a header.
      allow_outside: Whether paths may lead out of the table's folder.

    Raises:
      DataError: The file does not exist, or a row is wrong; the message has the line number.
    """
    name = f"csv:{path}"
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
                if None in row:  # DictReader stores the cells of surplus columns under None.
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
    """Removes "./", "//" and a leading `root` from a path."""
    plain = pathlib.PurePosixPath(path)
    return str(plain.relative_to(root) if plain.is_relative_to(root) else plain)


def _is_inside(folder: str, path: str) -> bool:
    try:
        real = os.path.realpath(os.path.join(folder, path))  # noqa: PTH118
        return os.path.commonpath([folder, real]) == folder
    except ValueError:  # The file name is invalid. Reading the file will raise an error.
        return True


def _status(root: pathlib.Path, path: str) -> File:
    """Returns the `File` for a path in a table.

    If the file does not exist, its size is 0; an error follows when the file is read.
    """
    try:
        return File.from_status(path, (root / path).stat())
    except (OSError, ValueError):
        return File(path, 0, "")
