"""What a registry's log says: which versions there are, and where each alias points.

Everything here is a pure function of log entries. An entry is a JSON object:

    sha256                      of its other fields, by which a damaged entry is known
    format, number, previous    1, its place in the log, sha256 of the entry before it or ""
    id                          of the change, by which who made it knows it again
    time, user, host, note      when (UTC), by whom and where from; what they had to say
    action                      add, promote, rollback or remove
    model, version              what it was done to
    alias, before               the alias that was moved or removed, and where it pointed
    gates                       of a promotion: what was asked for and held
    bundle                      of an addition: where the bundle is and what is known of it
"""

import dataclasses
import datetime
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from cnn_jax.system.errors import ConfigError, UserError, did_you_mean, printable

FORMAT = 1
CHAMPION = "champion"
FIGURES = ("accuracy", "precision", "recall", "f1", "loss")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_DIGEST = r"[0-9a-f]{64}"
# A path from a log is removed with all that is below it, so it may lead nowhere else.
_PATH = rf"bundles/{_DIGEST}-\d{{8}}T\d{{6}}Z-[0-9a-f]{{16}}"


class RegistryError(UserError):
    """A registry is not there or damaged, or does not have or allow what was asked for."""


@dataclasses.dataclass(frozen=True)
class BundleFacts:
    """What a log knows of a bundle.

    Attributes:
      path: Its folder, below the registry.
      digest: Of the bundle, 64 hexadecimal digits.
      size: Bytes of its files.
      classes: How many there are.
      image_size: (height, width) of an input.
      metrics: Figures by split, as the bundle has them; only finite numbers.
      fingerprint: Of the data it was trained on, with its splits; "" if not known.
    """

    path: str
    digest: str
    size: int
    classes: int
    image_size: tuple[int, int]
    metrics: dict[str, dict[str, float]]
    fingerprint: str

    def test(self, figure: str) -> float | None:
        """A figure of the test split, if the bundle has it."""
        return self.metrics.get("test", {}).get(figure)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One change; see the top of this file. What an action does not have is None or empty."""

    number: int
    previous: str
    id: str
    time: str
    user: str
    host: str
    note: str
    action: str
    model: str
    version: int | None = None
    alias: str | None = None
    before: int | None = None
    gates: tuple[str, ...] = ()
    bundle: BundleFacts | None = None


@dataclasses.dataclass(frozen=True)
class Version:
    """One bundle of a model.

    Attributes:
      model: The model's name.
      number: From 1 on; never given twice.
      time, user, host, note: Of its addition.
      bundle: What is known of the bundle.
    """

    model: str
    number: int
    time: str
    user: str
    host: str
    note: str
    bundle: BundleFacts

    def __str__(self) -> str:
        return f"{self.model}/{self.number}"


@dataclasses.dataclass(frozen=True)
class Model:
    """A name with its versions.

    Attributes:
      name: The name.
      versions: By number, those that were not removed.
      aliases: By alias, the versions it has pointed to: the last is where it points, the one
        before is where a rollback leads.
      last: The largest number that was ever given.
    """

    name: str
    versions: dict[int, Version] = dataclasses.field(default_factory=dict)
    aliases: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    last: int = 0

    def present(self, alias: str) -> int | None:
        """The version that an alias points to."""
        return self.aliases[alias][-1] if alias in self.aliases else None

    def aliases_of(self, version: int) -> list[str]:
        """The aliases that point to a version, sorted."""
        return sorted(alias for alias in self.aliases if self.present(alias) == version)


Models = Mapping[str, Model]


def check_name(kind: str, name: str) -> str:
    """A model's name or an alias, if it may be one.

    Raises:
      ConfigError: It may not.
    """
    if not re.fullmatch(_NAME, name):
        raise ConfigError(
            f"{kind}: must be 1 to 100 letters, digits, -, _ and . and begin with a letter or "
            f"digit, got {name!r}"
        )
    if kind == "alias" and name.isdecimal():
        raise ConfigError(f"alias: must not be a number, as versions are, got {name!r}")
    return name


def parse_reference(text: str) -> tuple[str, str | int | None]:
    """MODEL, MODEL@ALIAS or MODEL/VERSION as the model's name and an alias, a number or None.

    Raises:
      ConfigError: It is none of these.
    """
    name, separator, rest = re.fullmatch(r"([^@/]*)([@/]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    check_name("model", name)
    if separator == "@":
        return name, check_name("alias", rest)
    if separator == "/":
        return name, parse_version(rest)
    return name, None


def parse_which(text: str) -> str | int:
    """A version's number, or an alias.

    Raises:
      ConfigError: It is neither.
    """
    return parse_version(text) if text.isdecimal() else check_name("alias", text)


def parse_version(text: str) -> int:
    """A version's number, which need not be there, however large it is.

    Raises:
      ConfigError: It is no number.
    """
    # Of far more digits Python makes no int.
    if not re.fullmatch(r"[0-9]{1,1000}", text):
        raise ConfigError(f"version: must be a number, got {text!r}")
    return int(text)


def find(models: Models, name: str) -> Model:
    """A model by its name.

    Raises:
      RegistryError: There is none.
    """
    if name not in models:
        raise RegistryError(f"there is no model {printable(name)}{_near(name, models)}")
    return models[name]


def resolve(models: Models, name: str, which: str | int = CHAMPION) -> Version:
    """A version by its number, or the one that an alias points to.

    Raises:
      RegistryError: There is no such model, version or alias.
    """
    model = find(models, name)
    if isinstance(which, str):
        if which not in model.aliases:
            advice = _near(which, model.aliases)
            raise RegistryError(f"{name} has no alias {printable(which)}{advice}")
        which = model.aliases[which][-1]
    if which not in model.versions:
        removed = " any more" * (0 < which <= model.last)
        there = ", ".join(map(str, sorted(model.versions))) or "none"
        raise RegistryError(f"{name} has no version {which}{removed}; there are: {there}")
    return model.versions[which]


def with_digest(models: Models, name: str, digest: str) -> Version | None:
    """The version of a model that is this bundle, if there is one."""
    versions = models[name].versions.values() if name in models else ()
    return next((version for version in versions if version.bundle.digest == digest), None)


def _near(name: str, known: Iterable[str]) -> str:
    """What may have been meant, for the end of a message."""
    known = sorted(known)
    return (
        did_you_mean(name, known, 3)
        or f"; there are: {', '.join(known[:10]) or 'none'}{', ...' * (len(known) > 10)}"
    )


def removal(models: Models, name: str, number: int) -> Version:
    """The version that is to be removed.

    Raises:
      RegistryError: There is none, or an alias points to it.
    """
    version = resolve(models, name, number)
    if aliases := models[name].aliases_of(number):
        raise RegistryError(
            f"{version} is {' and '.join(aliases)}, so it stays: promote another version first, "
            f"or take the alias away (remove {name} --alias={aliases[0]})"
        )
    return version


def version_before(models: Models, name: str, alias: str) -> Version:
    """The version that a rollback leads to.

    Raises:
      RegistryError: There is none.
    """
    version = resolve(models, name, alias)
    history = models[name].aliases[alias]
    if len(history) == 1:
        raise RegistryError(f"{name}@{alias} is {version.number}, and was nothing before")
    return models[name].versions[history[-2]]


@dataclasses.dataclass(frozen=True)
class Gates:
    """What a promotion asks of a version's figures on the test split.

    Attributes:
      min_accuracy, min_precision, min_recall, min_f1: 0 to 1, at least; None asks nothing.
      max_loss: 0 or more, at most.
      not_below: An alias to whose version's test accuracy that of this one must come up.
    """

    min_accuracy: float | None = None
    min_precision: float | None = None
    min_recall: float | None = None
    min_f1: float | None = None
    max_loss: float | None = None
    not_below: str | None = None

    def check(self, models: Models, version: Version, alias: str) -> tuple[str, ...]:
        """Holds a version to them.

        Args:
          models: The registry as it is.
          version: The version to promote.
          alias: Where to. `not_below` the same alias asks nothing of its first version.

        Returns:
          What was asked for and holds.

        Raises:
          RegistryError: One or several do not hold, or cannot be told.
        """
        held, failed = [], []
        for figure in FIGURES:
            name = "max_loss" if figure == "loss" else f"min_{figure}"
            limit = getattr(self, name)
            if limit is not None:
                value = version.bundle.test(figure)
                holds = value is not None and (
                    value <= limit if figure == "loss" else value >= limit
                )
                text = f"{name}={limit:g}: test {figure} is {_figure(value)}"
                (held if holds else failed).append(text)
        is_first = self.not_below == alias and alias not in models[version.model].aliases
        if self.not_below is not None and not is_first:
            text, holds = self._compare(models, version)
            (held if holds else failed).append(text)
        if failed:
            raise RegistryError(f"{version} does not become {alias}: {'; '.join(failed)}")
        return tuple(held)

    def _compare(self, models: Models, version: Version) -> tuple[str, bool]:
        assert self.not_below is not None
        present = resolve(models, version.model, self.not_below)
        one, other = version.bundle, present.bundle
        if version.number != present.number and (
            not one.fingerprint or one.fingerprint != other.fingerprint
        ):
            return (
                f"not_below={self.not_below}: {version.number} and {present.number} were "
                "measured on other test splits, as their data differs; measure both on one with "
                "cnn_jax evaluate --source, or ask for --min_accuracy",
                False,
            )
        accuracy, least = one.test("accuracy"), other.test("accuracy")
        text = (
            f"not_below={self.not_below}: test accuracy is {_figure(accuracy)}, that of "
            f"{present.number} is {_figure(least)}"
        )
        return text, accuracy is not None and least is not None and accuracy >= least


def _figure(value: float | None) -> str:
    return "not in the bundle" if value is None else f"{value:.6g}"


def apply(models: Models, entry: Entry) -> dict[str, Model]:
    """The state after an entry.

    Args:
      models: The state before it, which is left as it is.
      entry: One that follows from it.

    Raises:
      ValueError: It does not.
    """
    change = {"add": _add, "promote": _promote, "rollback": _roll_back, "remove": _remove}
    model = models.get(entry.model, Model(entry.model))
    return {**models, entry.model: change[entry.action](model, entry)}


def _add(model: Model, entry: Entry) -> Model:
    _expect(entry.version == model.last + 1, f"it adds {entry.version} after {model.last}")
    assert entry.version is not None
    assert entry.bundle is not None
    version = Version(
        model.name,
        entry.version,
        entry.time,
        entry.user,
        entry.host,
        entry.note,
        entry.bundle,
    )
    versions = {**model.versions, entry.version: version}
    return dataclasses.replace(model, versions=versions, last=entry.version)


def _promote(model: Model, entry: Entry) -> Model:
    _expect(entry.version in model.versions, f"there is no version {entry.version}")
    return _move(model, entry, (*model.aliases.get(str(entry.alias), ()), entry.version))


def _roll_back(model: Model, entry: Entry) -> Model:
    history = model.aliases.get(str(entry.alias), ())[:-1]
    _expect(history[-1:] == (entry.version,), f"{entry.alias} was not {entry.version} before")
    return _move(model, entry, history)


def _move(model: Model, entry: Entry, history: tuple[Any, ...]) -> Model:
    """A model whose alias has this history."""
    alias = str(entry.alias)
    _expect(entry.before == model.present(alias), f"{alias} was not {entry.before}")
    return dataclasses.replace(model, aliases={**model.aliases, alias: history})


def _remove(model: Model, entry: Entry) -> Model:
    if entry.alias is not None:
        _expect(entry.alias in model.aliases, f"there is no alias {entry.alias}")
        aliases = {k: history for k, history in model.aliases.items() if k != entry.alias}
        return dataclasses.replace(model, aliases=aliases)
    number = entry.version
    _expect(number in model.versions, f"there is no version {number}")
    _expect(number not in map(model.present, model.aliases), f"an alias points to {number}")
    versions = {k: version for k, version in model.versions.items() if k != number}
    aliases = {alias: _without(history, number) for alias, history in model.aliases.items()}
    return dataclasses.replace(model, versions=versions, aliases=aliases)


def _without(history: tuple[int, ...], number: int | None) -> tuple[int, ...]:
    """An alias's history without a version, in which no step leads from a version to itself."""
    left = [version for version in history if version != number]
    return tuple(version for i, version in enumerate(left) if i == 0 or version != left[i - 1])


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def serialise(entry: Entry) -> bytes:
    """An entry as JSON; what is empty is left out.

    Raises:
      ValueError: A number is not finite.
    """
    fields = {"format": FORMAT} | dataclasses.asdict(entry)
    fields = {key: value for key, value in fields.items() if value not in (None, "", ())}
    fields["sha256"] = digest_of(fields)
    text = json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False)
    # Text that is not UTF-8 has surrogates, which become JSON's own escapes.
    return f"{text}\n".encode("utf-8", "backslashreplace")


def digest_of(fields: Mapping[str, Any]) -> str:
    """The sha256 of an entry's fields but for itself, in whatever order they are written."""
    others = {key: value for key, value in fields.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def parse(data: bytes) -> Entry:
    """The entry that JSON holds.

    Raises:
      RegistryError: It is of a later format.
      ValueError: It is no entry.
    """
    try:
        fields = json.loads(data)
        if _take(fields, "format", int) > FORMAT:
            raise RegistryError(
                f"is of format {fields['format']}, and this version of cnn_jax reads {FORMAT}: "
                "upgrade it"
            )
        if _take(fields, "sha256", str) != digest_of(fields):
            raise ValueError("its sha256 is not that of its other fields")
        entry = Entry(
            number=_take(fields, "number", int),
            previous=_take(fields, "previous", str, ""),
            id=_take(fields, "id", str),
            time=_time(fields),
            user=_take(fields, "user", str, ""),
            host=_take(fields, "host", str, ""),
            note=_take(fields, "note", str, ""),
            action=_take(fields, "action", str),
            model=check_name("model", _take(fields, "model", str)),
            version=_take(fields, "version", int, None),
            alias=check_name("alias", _take(fields, "alias", str)) if "alias" in fields else None,
            before=_take(fields, "before", int, None),
            gates=tuple(map(str, _take(fields, "gates", list, []))),
            bundle=_facts(fields["bundle"]) if "bundle" in fields else None,
        )
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except (AttributeError, ConfigError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error
    _check_shape(entry)
    return entry


def _check_shape(entry: Entry) -> None:
    """Raises ValueError if an entry does not have what its action needs, and that alone."""
    needs = {
        "add": ("version", "bundle"),
        "promote": ("version", "alias"),
        "rollback": ("version", "alias", "before"),
        "remove": ("version",) if entry.alias is None else ("alias", "before"),
    }
    _expect(entry.action in needs, f"its action is {entry.action}")
    optional = {"promote": ("before",)}.get(entry.action, ())
    for field in ("version", "alias", "before", "bundle"):
        has, needed = getattr(entry, field) is not None, field in needs[entry.action]
        _expect(has == needed or field in optional, f"its {field} is not as {entry.action} has it")


def _facts(fields: Mapping[str, Any]) -> BundleFacts:
    path, digest = _take(fields, "path", str), _take(fields, "digest", str)
    _expect(re.fullmatch(_PATH, path) is not None, f"its path is {path}")
    _expect(path.startswith(f"bundles/{digest}-"), f"its digest is {digest}")
    height, width = map(int, _take(fields, "image_size", list))
    return BundleFacts(
        path=path,
        digest=digest,
        size=_take(fields, "size", int),
        classes=_take(fields, "classes", int),
        image_size=(height, width),
        metrics=finite_figures(_take(fields, "metrics", dict)),
        fingerprint=_take(fields, "fingerprint", str, ""),
    )


def finite_figures(metrics: Any) -> dict[str, dict[str, float]]:
    """The figures by split that are finite numbers, of whatever a bundle says of them."""
    if not isinstance(metrics, dict):
        return {}
    return {
        str(split): {
            str(name): float(value)
            for name, value in figures.items()
            if type(value) in (int, float) and abs(value) <= sys.float_info.max
        }
        for split, figures in metrics.items()
        if isinstance(figures, dict)
    }


def _time(fields: Mapping[str, Any]) -> str:
    time = _take(fields, "time", str)
    datetime.datetime.fromisoformat(time)
    return time


_NEEDED = object()


def _take(fields: Mapping[str, Any], key: str, kind: type, default: Any = _NEEDED) -> Any:
    """A field of the right type, or the default if it is not there."""
    if default is not _NEEDED and key not in fields:
        return default
    value = fields[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"its {key} is no {kind.__name__}")
    return value
