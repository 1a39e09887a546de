"""The layout of a folder of images: which sub-folders are classes, and which are splits.

The layout is found from the paths of the images; no file is opened.
"""

import dataclasses
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from cnn_jax.data.source import SPLIT_NAMES
from cnn_jax.system.errors import DataError, printable

_PREDICTION = "prediction"
# The words in folder names that mean a split, and the split that each word means. "Evaluation"
# means validation, because such images are often used to choose a network, and the test split must
# not influence any choice.
_SPLIT_OF_WORD = {
    **SPLIT_NAMES,
    "trainval": "train",
    **dict.fromkeys(("dev", "eval", "evaluation"), "validation"),
    "holdout": "test",
    **dict.fromkeys(("pred", "predict", "prediction", "predictions", "inference"), _PREDICTION),
    **dict.fromkeys(("unlabeled", "unlabelled", "submission"), _PREDICTION),
}
# Words in folder names that say only that the folder contains data.
_PLAIN_WORDS = frozenset(
    (
        *("image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "pic"),
        *("pics", "jpg", "jpeg", "jpegs", "png", "data", "dataset", "datasets", "set", "sets"),
        *("file", "files", "folder", "folders", "dir", "split", "splits"),
    )
)
# Names of folders in data sets for detection or segmentation. Such a data set has one folder for
# each kind of file.
_KINDS_OF_FILES = frozenset(
    (
        *("image", "images", "img", "imgs", "mask", "masks", "label", "labels"),
        *("annotation", "annotations", "groundtruth", "segmentation", "segmentations"),
    )
)
# The names in _KINDS_OF_FILES that mean annotations, for example masks, and not images.
_ANNOTATIONS = _KINDS_OF_FILES - _PLAIN_WORDS
_MAX_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """The class folders and splits of a data set.

    Attributes:
      parts: The split of each folder that contains class folders, such as
        {"seg_train/seg_train": "train"}; {"": ""} if the data is not divided.
      spellings: The class of each class folder whose name has another spelling than the
        class, such as {"test/cat": "Cat"}.
      remarks: Warnings, one sentence each.
    """

    parts: Mapping[str, str]
    spellings: Mapping[str, str]
    remarks: list[str]

    def classify(self, path: str) -> tuple[str, str] | None:
        """Returns the class and the split of an image; None if the image is in no class folder."""
        for folder, split in self.parts.items():
            prefix = f"{folder}/" if folder else ""
            if path.startswith(prefix):
                name, slash, _ = path[len(prefix) :].partition("/")
                if slash:
                    return self.spellings.get(f"{prefix}{name}", name), split
        return None


def find_layout(paths: Iterable[str], source: str) -> Layout:
    """Finds the layout of a folder from the paths of the images in it.

    A folder is a split if its name contains a word for a split (`train`, `data_val`,
    `seg_test`), it contains class folders but no images directly, and its classes agree with those
    of the other splits. With classes:PATH no folder is a split; with splits:PATH each folder is a
    split if its name contains such a word.

    Args:
      paths: The paths of the images, relative to the folder, with "/" between the parts.
      source: The source's name: folder:PATH, classes:PATH or splits:PATH.

    Raises:
      DataError: The folders may be classes or splits, or there are no class folders.
    """
    form = source.partition(":")[0]
    tree = _Tree(paths)
    parts, remarks = {"": ""}, []
    if form != "classes":
        parts, remarks = _find_parts(tree, source, are_splits=form == "splits")
    spellings, renamed = _common_spelling(tree, parts)
    layout = Layout(parts, spellings, [*remarks, *renamed])
    layout.remarks.extend(_look_below_the_classes(tree, layout, source))
    return layout


class _Tree:
    """The tree of the folders that contain images.

    Attributes:
      images: The number of images directly in each folder.
    """

    def __init__(self, paths: Iterable[str]):
        self.images = Counter(path.rpartition("/")[0] for path in paths)
        self._folders: dict[str, set[str]] = defaultdict(set)
        for folder in self.images:
            while folder:
                parent, _, name = folder.rpartition("/")
                if name in self._folders[parent]:
                    break
                self._folders[parent].add(name)
                folder = parent

    def folders(self, folder: str) -> set[str]:
        """Returns the names of a folder's sub-folders that contain images, at any depth."""
        return self._folders.get(folder, set())

    def count(self, folder: str) -> int:
        """Returns the number of images in a folder, at any depth."""
        below = f"{folder}/"
        return sum(n for name, n in self.images.items() if name == folder or name.startswith(below))


def _words(name: str) -> list[str]:
    """Returns a folder name's words in lower case: train, set and 2017 for "TrainSet_2017"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", unicodedata.normalize("NFKC", name))
    words = []
    joined = re.sub(r"(?<![^\W_])hold[\W_]+out(?![^\W_])", "holdout", spaced.casefold())
    for word in re.findall(r"[^\W\d_]+|\d+", joined):
        words += _two_words(word) or [word]
    return words


def _two_words(word: str) -> list[str] | None:
    """Returns the two words of a compound such as "testset"; None if the word is not a compound."""
    if word in _SPLIT_OF_WORD:
        return None
    for split_word in _SPLIT_OF_WORD:
        for rest, parts in (
            (word.removeprefix(split_word), (split_word, word.removeprefix(split_word))),
            (word.removesuffix(split_word), (word.removesuffix(split_word), split_word)),
        ):
            if rest in _PLAIN_WORDS and rest != word:
                return list(parts)
    return None


def _is_plain(word: str) -> bool:
    """Returns whether a word, such as "images" or "2017", names neither a class nor a split."""
    return word in _PLAIN_WORDS or bool(re.fullmatch(r"\d{1,2}|(19|20)\d\d", word))


@dataclasses.dataclass(frozen=True)
class _SplitName:
    """A parsed folder name: the split that one of its words means, and the remaining words.

    Attributes:
      split: "train", "validation", "test" or "prediction".
      affix: The other words of the name, without plain words such as "images".
    """

    split: str
    affix: tuple[str, ...]


def _parse(name: str) -> _SplitName | None:
    """Returns the split that a folder name denotes; None if it denotes no split or several splits.

    A name with words for training and validation, such as train_val, is a training split.
    """
    words = _words(name)
    found = [word for word in words if word in _SPLIT_OF_WORD]
    splits = sorted(_SPLIT_OF_WORD[word] for word in found)
    if len(splits) != 1 and splits != ["train", "validation"]:
        return None
    affix = tuple(word for word in words if word not in found and not _is_plain(word))
    return _SplitName(splits[0], affix)


def _find_parts(tree: _Tree, source: str, *, are_splits: bool) -> tuple[dict[str, str], list[str]]:
    """Finds the folders that contain class folders; returns their splits, and warnings.

    Without splits, the result is {"": ""}: the root contains the class folders.

    Raises:
      DataError: The folders may be classes or splits, or there are no class folders.
    """
    tops = sorted(tree.folders(""))
    names = {top: name for top in tops if (name := _parse(top)) is not None}
    if are_splits:
        chosen = {top: name.split for top, name in names.items()}
    else:
        chosen = _choose(tree, tops, names, source)
    training = [_inner_folder(tree, top) for top, split in chosen.items() if split == "train"]
    classes = set[str]().union(*map(tree.folders, training))
    has_classes = any(tree.folders(_inner_folder(tree, top)) for top in chosen)
    if not classes and (training or not has_classes):
        # A folder such as train/ that has no sub-folders is a class, unless all folders are named
        # after splits.
        affixes = {name.affix for name in names.values()}
        several = len({name.split for name in names.values()}) > 1
        are_only_splits = len(names) == len(tops) and (chosen or (several and affixes == {()}))
        if are_splits or are_only_splits or any(names[top].affix for top in chosen):
            raise DataError(_without_classes(source, sorted(chosen) or tops))
        _check_classes_are_no_splits(tree, tops, names, source)
        return {"": ""}, _taken_for_classes(tree, tops, names, source)

    parts: dict[str, str] = {}
    left_out: dict[str, list[str]] = defaultdict(list)
    are_certain = are_splits or sum(top.lower() in SPLIT_NAMES for top in chosen) > 1
    for top in tops:
        split = names[top].split if top in names else ""
        folder = _inner_folder(tree, top, () if split == "train" else classes)
        below = tree.folders(folder)
        agrees = not classes or _agree(below, classes)
        if split == _PREDICTION and below:
            left_out["their names say that they have no labels"].append(top)
        elif split == _PREDICTION or (top in chosen and not below):
            left_out["they have no class folders"].append(top)
        elif top in chosen and split == "test" and len(below) == 1 and not agrees:
            left_out["their one sub-folder is no class of the training part"].append(top)
        elif top in chosen and (agrees or are_splits or top.lower() in SPLIT_NAMES):
            parts[folder] = split
        elif top in chosen and not are_certain:
            why = f"in {top} are {'the same' if agrees else 'other'} sub-folders"
            raise DataError(_ambiguous(source, sorted(chosen), why))
        elif agrees and classes and not are_splits and not _ANNOTATIONS & set(_words(top)):
            # The images in this folder have labels, so the user must decide whether to leave them
            # out.
            why = f"in {top} are the same sub-folders"
            raise DataError(_ambiguous(source, sorted(chosen), why, () if split else (top,)))
        else:
            left_out["their folder is no split"].append(top)
    return parts, [
        f"the images in {_listed(folders)} ({sum(map(tree.count, folders)):,}) are left out, "
        f"because {reason}"
        for reason, folders in left_out.items()
    ]


def _choose(
    tree: _Tree, tops: Sequence[str], names: Mapping[str, _SplitName], source: str
) -> dict[str, str]:
    """Chooses the split folders by their names; returns the split of each split folder.

    The first rule that applies decides:

    1. If the names without an affix include a training split and another split, these folders
       are the splits: train/ and test/.
    2. If the names with one affix include a training split and another split, these folders are
       the splits: seg_train/ and seg_test/. If this holds for several affixes, the layout is
       ambiguous.
    3. If all folders are named as splits, without an affix, and have sub-folders, all are splits.
    4. If all folders are named as splits, with different affixes, and their sub-folders agree,
       the layout is ambiguous.
    5. Otherwise there are no splits.

    Raises:
      DataError: The names are ambiguous.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for top, name in names.items():
        groups[name.affix][top] = name.split
    pairs = [
        group
        for group in groups.values()
        if "train" in group.values() and len(set(group.values())) > 1
    ]
    plain = groups.get((), {})
    if plain in pairs:
        # If train/ exists, a folder such as train_images/ is not a split.
        exact = {split for top, split in plain.items() if top.lower() in SPLIT_NAMES}
        is_needed = {top: top.lower() in SPLIT_NAMES or plain[top] not in exact for top in plain}
        return {top: split for top, split in plain.items() if is_needed[top]}
    if len(pairs) == 1:
        return pairs[0]
    if pairs:
        folders = sorted(top for group in pairs for top in group)
        raise DataError(_ambiguous(source, folders, "there are several for the same split"))
    has_folders = {top: bool(tree.folders(_inner_folder(tree, top))) for top in tops}
    if len(plain) == len(tops) and all(has_folders.values()):
        is_training_only = list(plain.values()) == ["train"]
        return {} if is_training_only or _PREDICTION in plain.values() else plain
    if len(names) == len(tops):
        training = [top for top in tops if names[top].split == "train" and has_folders[top]]
        classes = set[str]().union(*(tree.folders(_inner_folder(tree, top)) for top in training))
        for top in tops:
            below = tree.folders(_inner_folder(tree, top))
            is_like_a_split = _agree(below, classes) if below else bool(plain)
            if training and names[top].split != "train" and is_like_a_split:
                why = f"in {top} are {'the same' if below else 'no'} sub-folders"
                raise DataError(_ambiguous(source, tops, why))
    return {}


def _inner_folder(tree: _Tree, top: str, classes: Collection[str] = ()) -> str:
    """Returns the folder that directly contains a split's class folders, such as train/images.

    Args:
      tree: The tree of folders.
      top: The split's folder.
      classes: The known class names. A folder with such a name is a class folder.
    """
    folder = top
    while not tree.images[folder] and len(tree.folders(folder)) == 1:
        (inner,) = tree.folders(folder)
        parsed, words = _parse(inner), _words(inner)
        is_same_split = parsed is not None and parsed == _parse(top)
        is_plain = any(word in _PLAIN_WORDS for word in words) and all(map(_is_plain, words))
        if inner in classes or not (is_same_split or is_plain):
            break
        folder = f"{folder}/{inner}"
    return folder


def _fold(name: str) -> str:
    """Normalizes the case, the spaces and the Unicode form of a class name, for comparisons."""
    return "".join(unicodedata.normalize("NFKC", name).casefold().split())


def nearly_equal(names: Iterable[str]) -> list[list[str]]:
    """Returns the sets of names that differ only in case, spaces or Unicode form."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[_fold(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _agree(names: Collection[str], classes: Collection[str]) -> bool:
    """Returns whether at least half of the names are names of classes."""
    folded = set(map(_fold, classes))
    return bool(names) and 2 * sum(_fold(name) in folded for name in names) >= len(names)


def _common_spelling(tree: _Tree, parts: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Finds class folders whose names are spelled differently in the training split.

    Returns:
      The class of each such folder, and remarks.
    """
    training = [folder for folder, split in parts.items() if split == "train"]
    classes: dict[str, set[str]] = defaultdict(set)
    for folder in training:
        for name in tree.folders(folder):
            classes[_fold(name)].add(name)
    spellings: dict[str, str] = {}
    for folder in parts.keys() - set(training):
        for name in tree.folders(folder):
            known = classes[_fold(name)]
            if len(known) == 1 and name not in known:
                (spellings[f"{folder}/{name}"],) = known
    return spellings, [
        f"the folder {folder} is taken for the class {name}, from which it differs only in case, "
        "spaces or how its accents are written"
        for folder, name in sorted(spellings.items())
    ]


def _check_classes_are_no_splits(
    tree: _Tree, tops: Sequence[str], names: Mapping[str, _SplitName], source: str
) -> None:
    """Raises DataError if it is unclear whether a folder is a class or a split.

    The error is raised if all other folders have the same sub-folders.
    """
    below = {top: tree.folders(_inner_folder(tree, top)) for top in tops}
    known = [top for top in names if names[top].split != _PREDICTION]
    for top in known:
        others = [other for other in tops if other != top]
        if others and all(_agree(below[other], below[top]) for other in others):
            why = f"in {_listed(others)} are the same sub-folders"
            unknown = [other for other in others if other not in known]
            raise DataError(_ambiguous(source, known, why, unknown))


def _taken_for_classes(
    tree: _Tree, tops: Sequence[str], names: Mapping[str, _SplitName], source: str
) -> list[str]:
    """Returns a warning about folders that are named after splits but are treated as classes."""
    plain = [top for top in names if not names[top].affix]
    are_several = len({names[top].split for top in plain}) > 1

    def looks_like_a_split(top: str) -> bool:
        """Returns whether the folder is probably a split, not a class with the name of a split."""
        has_classes = not tree.images[top] and len(tree.folders(top)) > 1
        return are_several or has_classes or names[top].split == _PREDICTION

    suspects = list(filter(looks_like_a_split, plain))
    others = [top for top in tops if top not in suspects]
    if not suspects or not others:
        return []
    return [
        f"beside {_listed(others)}, "
        + (
            f"{_listed(suspects)} are taken for classes: if they are splits or have no labels, "
            if len(suspects) > 1
            else f"{_listed(suspects)} is taken for a class: if it is a split or has no labels, "
        )
        + f"move the folder elsewhere, or use the source splits:{_path(source)}"
    ]


def _look_below_the_classes(tree: _Tree, layout: Layout, source: str) -> list[str]:
    """Returns warnings about class folders whose sub-folders may be the actual classes.

    Raises:
      DataError: The folders are named as kinds of files, such as images and masks.
    """
    below: dict[str, set[str]] = defaultdict(set)
    for folder in layout.parts:
        prefix = f"{folder}/" if folder else ""
        for name in tree.folders(folder):
            class_name = layout.spellings.get(f"{prefix}{name}", name)
            below[class_name] |= tree.folders(f"{prefix}{name}")
    if len(below) < 2:
        return []
    if not source.startswith("classes:") and all(
        set(_words(name)) <= _KINDS_OF_FILES and _words(name) for name in below
    ):
        raise DataError(
            f"{source}: {_listed(sorted(below))} are kinds of files and not classes; a table "
            "(csv:PATH) with the columns path and label says what the images show, and the source "
            f"classes:{_path(source)} takes the folders for classes all the same"
        )
    remarks = []
    common = sorted(set.intersection(*below.values()))
    if len(common) > 1 or (common and not all(map(_is_plain, _words(common[0])))):
        remarks.append(
            f"every class has the same sub-folders, {_listed(common)}: if these are the classes "
            "or splits, say so in a table (csv:PATH, with the columns path, label and split); if "
            "they are series of like images, data.group={class}/{series}/ keeps each together"
        )
    else:
        for name, folders in sorted(below.items()):
            if len(inside := sorted(folders & below.keys())) > 1:
                remarks.append(
                    f"the class {name} has sub-folders that are called as the classes "
                    f"{_listed(inside)}: if it is a second copy of the data, remove it"
                )
    return remarks


def _ambiguous(source: str, folders: Sequence[str], why: str, left_out: Sequence[str] = ()) -> str:
    """Returns the error message for an ambiguous layout; suggests sources that are unambiguous.

    Args:
      source: The source's name.
      folders: The folders that may be classes or splits.
      why: The reason.
      left_out: The folders that splits:PATH would leave out.
    """
    path = _path(source)
    without = f" and leaves out {_listed(left_out)}" if left_out else ""
    return (
        f"{source}: {_listed(folders)} may be classes or splits, because {why}: the source "
        f"classes:{path} takes them for classes, splits:{path} for splits{without}"
    )


def _without_classes(source: str, folders: Sequence[str]) -> str:
    return (
        f"{source}: there are no class folders in the training part of {_listed(folders)}; make "
        "one for each class, as in train/CLASS, or name the label of each image in a table "
        f"(csv:PATH); the source classes:{_path(source)} takes the folders for classes"
    )


def _path(source: str) -> str:
    return source.partition(":")[2]


def _listed(names: Sequence[str]) -> str:
    """Joins names to a text such as "a, b and c" or "a, b, c and 9 more"."""
    shown = [printable(name) for name in names[:_MAX_NAMED]]
    if len(names) > _MAX_NAMED:
        shown[_MAX_NAMED - 1 :] = [f"{len(names) - _MAX_NAMED + 1:,} more"]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
