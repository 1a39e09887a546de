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
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cnn_jax.data.decode import looks_like_an_image
from cnn_jax.data.source import SPLIT_NAMES, Source
from cnn_jax.errors import DataError

IMAGE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Images that people have, and that are not read.
_OTHER_SUFFIXES = frozenset(
    (".arw", ".avif", ".cr2", ".dng", ".heic", ".heif", ".jp2", ".jxl", ".nef")
)
_OTHER_FORMAT = "images of other formats"
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


def list_files(
    root: pathlib.Path, allow_outside: bool = False
) -> tuple[list[File], dict[str, int]]:
    """All regular files anywhere below a folder, and what else is there.

    Hidden files and folders are left out. A link is followed if what it leads
    to lies in the folder (or `allow_outside`) and has not been listed yet, so
    that no file comes twice and no loop of links is endless.

    Returns:
      The files, sorted by path, and how many things of each kind were left out.
    """
    return _Walk(root, allow_outside).run()


class _Walk:
    def __init__(self, root: pathlib.Path, allow_outside: bool):
        self._root = os.path.realpath(root)
        self._allow_outside = allow_outside
        self._files: list[File] = []
        self._ignored: Counter[str] = Counter()
        self._links: list[tuple[str, str]] = []
        self._seen: set[tuple[int, int]] = set()  # (device, inode)

    def run(self) -> tuple[list[File], dict[str, int]]:
        self._add_folder(self._root, "")
        # Links last: what a link leads to may be listed under its own name.
        while self._links:
            links, self._links = sorted(self._links), []
            for name, link in links:
                self._follow(name, link)
        return sorted(self._files, key=lambda file: file.path), dict(self._ignored)

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
                continue
            self._seen.add((status.st_dev, status.st_ino))
            for entry in found:
                below = f"{name}/{entry.name}" if name else entry.name
                if entry.name.startswith("."):
                    self._ignored[_HIDDEN] += 1
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


def is_image_file(root: pathlib.Path, path: str) -> bool:
    """By the ending of its name, or else by how its content begins."""
    if pathlib.PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with (root / path).open("rb") as file:
            return looks_like_an_image(file.read(16))
    except OSError:
        return False


def list_images(
    root: pathlib.Path, allow_outside: bool = False
) -> tuple[list[File], dict[str, int]]:
    """The files of `list_files` that are images, or should be, judging by their names."""
    files, ignored = list_files(root, allow_outside)
    images, others = [], 0
    for file in files:
        if is_image_file(root, file.path):
            images.append(file)
        elif pathlib.PurePosixPath(file.path).suffix.lower() in _OTHER_SUFFIXES:
            others += 1
    if others:
        ignored[_OTHER_FORMAT] = others
    if strays := len(files) - len(images) - others:
        ignored[_NO_IMAGE] = strays
    return images, ignored


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
    """`class/**/image`, or the same below `train`, `val`, `valid` or `validation`, and `test`.

    The classes are the sub-folders that have images, sorted by name; of a folder
    that is divided already, those of all its parts together. No image is opened.

    Args:
      path: The folder.
      name: Of the source; by default `folder:PATH`.
      allow_outside: Whether links may lead out of the folder.

    Raises:
      DataError: There is no such folder, or no class in it.
    """
    name = name or f"folder:{path}"
    root = pathlib.Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{name}: there is no folder {root}")
    images, ignored = list_images(root, allow_outside)
    remarks = []
    parts, unlabelled = _parts_of_a_divided_folder(images)
    for part in unlabelled:
        remarks.append(
            f"the folder {part} has a single sub-folder, which is no class of the training part: "
            "its images are taken for unlabelled and left out"
        )
    # A class is the name of the folder at this depth.
    depth = 1 if parts else 0
    examples = [
        file
        for file in images
        if len(file.parts) > depth + 1 and (not parts or file.parts[0] in parts)
    ]
    if len(examples) < len(images):
        ignored[_NO_CLASS] = len(images) - len(examples)
    if not examples:
        hint = "it has images, but no sub-folders" if images else "there are no images in it"
        raise DataError(
            f"{name}: {root} needs a sub-folder of images for each class; {hint}"
            + describe_ignored(ignored)
        )
    class_of_each = [file.parts[depth] for file in examples]
    with_images = set(class_of_each)
    for folder in _folders_at(root, list(parts) if parts else [""]):
        if folder.rpartition("/")[2] not in with_images:
            remarks.append(
                f"the folder {folder} has no images, so there is no such class; add some, or "
                "remove the folder"
            )
    if _OTHER_FORMAT in ignored:
        remarks.append(
            f"{ignored[_OTHER_FORMAT]:,} images are of formats that are not read, such as HEIC or "
            "AVIF, and are left out: convert them to JPEG or PNG"
        )
    if _OUTSIDE in ignored:
        remarks.append(f"{ignored[_OUTSIDE]:,} links lead out of the folder: {_ALLOW}")
    source = _make_source(
        name,
        root,
        examples,
        class_of_each,
        [parts[file.parts[0]] if parts else "" for file in examples],
    )
    return dataclasses.replace(source, ignored=ignored, remarks=[*source.remarks, *remarks])


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
            for names in _nearly_equal(class_names)
        ],
    )


def _nearly_equal(class_names: Sequence[str]) -> list[list[str]]:
    """Sets of names that a person would read as one."""
    names_of: dict[str, list[str]] = defaultdict(list)
    for name in class_names:
        folded = unicodedata.normalize("NFKC", name).casefold()
        names_of["".join(folded.split())].append(name)
    return [names for names in names_of.values() if len(names) > 1]


def describe_ignored(ignored: Mapping[str, int]) -> str:
    """What is not there because it was left out, as the end of a message; "" if nothing was."""
    if not ignored:
        return ""
    counts = ", ".join(f"{number:,} {kind}" for kind, number in ignored.items())
    return f" (left out: {counts}" + (f": {_ALLOW})" if _OUTSIDE in ignored else ")")


def _parts_of_a_divided_folder(images: Sequence[File]) -> tuple[dict[str, str], list[str]]:
    """For each folder that is a split, the split's name, and folders of unlabelled images.

    Both are empty if the folder is not divided. It is divided if the images of a
    part lie in sub-folders, and it is the training part beside another one, or there
    are only parts. (A class may be called "train" or "test", but then has the images
    itself. Test images without classes, as competitions have them, are no part, not
    even in a sub-folder: that has the name of no class.)
    """
    tops = {file.parts[0] for file in images if len(file.parts) > 1}
    named = {top: SPLIT_NAMES[top.lower()] for top in tops if top.lower() in SPLIT_NAMES}
    nested = {file.parts[0] for file in images if len(file.parts) > 2}
    parts = {top: split for top, split in named.items() if top in nested}
    if "train" not in parts.values():
        return (parts if tops == nested == set(named) else {}), []
    if len(named) == 1:
        return {}, []
    classes_of: dict[str, set[str]] = defaultdict(set)
    for file in images:
        if len(file.parts) > 2:
            classes_of[file.parts[0]].add(file.parts[1])
    known = set[str]().union(*(classes_of[top] for top in parts if parts[top] == "train"))
    unlabelled = [
        top
        for top, split in sorted(parts.items())
        if split == "test" and len(classes_of[top]) == 1 and not classes_of[top] & known
    ]
    return {top: split for top, split in parts.items() if top not in unlabelled}, unlabelled


def _folders_at(root: pathlib.Path, parts: Sequence[str]) -> Iterator[str]:
    """The folders directly in each of these parts of the root, hidden ones left out."""
    for part in parts:
        for entry in sorted((root / part).iterdir()):
            if entry.is_dir() and not entry.is_symlink() and not entry.name.startswith("."):
                yield f"{part}/{entry.name}" if part else entry.name


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
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{name} is not a CSV file in UTF-8: {error}") from error
    if not lines:
        raise DataError(f"{name} has no rows")
    return _make_source(name, root, [_status(root, image) for image in lines], labels, own_splits)


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
