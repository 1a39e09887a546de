"""Computes the state of a registry (versions and aliases) from the registry's log.

All functions are pure: they read and write no files. An entry is a JSON object:

    sha256                      sha256 of the other fields, to detect damage
    format, number, previous    1, the entry's number, sha256 of the previous entry's file or ""
    id                          a random id, so that a writer recognises its own entry
    time, user, host, note      time (UTC), user and host of the change; a note by the user
    action                      add, promote, rollback, remove, split or unsplit
    skippable                   true if a reader that does not know the action may skip the entry
    model, version              the changed model and version
    alias, before               the changed alias, and the version it pointed to before
    gates                       for promote: the gates that the version passed
    evidence                    for promote: the comparison with another version; see `Evidence`
    split                       for split: the experiment that starts; see `Split`. Its challenger
                                is `version`, and its champion is `before`. For unsplit: its name
    bundle                      for add: the path and the metadata of the bundle
"""

import dataclasses
import datetime
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from cnn_jax.quality.comparison import Comparison
from cnn_jax.registry.split import Experiment, Split
from cnn_jax.system.errors import ConfigError, UserError, did_you_mean, printable

FORMAT = 1
CHAMPION = "champion"
METRICS = ("accuracy", "precision", "recall", "f1", "loss")
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_DIGEST = r"[0-9a-f]{64}"
# The fields that the entry of each action needs; the removal of an alias needs others.
_NEEDED_FIELDS = {
    "add": ("version", "bundle"),
    "promote": ("version", "alias"),
    "rollback": ("version", "alias", "before"),
    "remove": ("version",),
    "split": ("version", "alias", "before", "split"),
    "unsplit": ("split",),
}
# The actions that earlier versions of this package may skip: their servers answer all requests with
# the version of the alias.
_SKIPPABLE = ("split", "unsplit")
# The pattern of a bundle's path is strict, because removing a version deletes the folder at this
# path, and a damaged log could contain any path.
_PATH = rf"bundles/{_DIGEST}-\d{{8}}T\d{{6}}Z-[0-9a-f]{{16}}"


class RegistryError(UserError):
    """Raised if a registry is missing or damaged, or cannot fulfil a request."""


@dataclasses.dataclass(frozen=True)
class BundleFacts:
    """The metadata that the log stores for a bundle."""

    path: str  # The bundle's folder, relative to the registry.
    digest: str  # The bundle's digest, 64 hexadecimal digits.
    size: int  # The total size of the files in bytes.
    classes: int  # The number of classes.
    image_size: tuple[int, int]  # (height, width) of the network's input.
    metrics: dict[str, dict[str, float]]  # Finite metrics, by split and name.
    fingerprint: str  # Identifies the training data and its splits; "" if unknown.

    def test_metric(self, metric: str) -> float | None:
        """Returns a metric of the test split, or None if it is unknown."""
        return self.metrics.get("test", {}).get(metric)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A log entry, which describes a change of the registry.

    The docstring of this module explains the fields. Missing fields are None or empty. An entry
    with an unknown action, of a later version of this package, has only the fields up to `action`;
    it changes nothing.
    """

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
    evidence: dict[str, Any] | None = None
    split: dict[str, Any] | None = None
    bundle: BundleFacts | None = None


@dataclasses.dataclass(frozen=True)
class Evidence(Comparison):
    """The comparison of a version with the version of an alias, on the same images."""

    candidate: int  # The number of the version to promote.
    alias: str  # The alias that the candidate is compared with.
    reference: int  # The number of the alias's version.
    source: str  # The name of the source of the images.
    split: str  # "test" or "all".
    # This comparison without the images from a request log; None if there are no such images.
    without_log: "Evidence | None" = None
    # The comparison with the best earlier version of the alias, if the present one is not the best.
    best: "Evidence | None" = None

    @property
    def comparisons(self) -> dict[str, bool]:
        """The description of each comparison, and whether the candidate is not worse in it."""
        return self._compare(f"not_worse_than={self.alias}")

    def _compare(self, condition: str) -> dict[str, bool]:
        found = {self._describe(condition): self.is_not_worse}
        if self.without_log is not None:
            found |= self.without_log._compare(f"{condition} without the logged images")
        if self.best is not None:
            found |= self.best._compare(f"not worse than the best earlier {self.alias}")
        return found

    def _describe(self, condition: str) -> str:
        text = (
            f"{condition}: {self.candidate_correct / self.images:.2%} of "
            f"{self.images:,} images of {printable(self.source)} are correct, and "
            f"{self.reference_correct / self.images:.2%} with version {self.reference} "
            f"(margin {self.margin:g}, p = {self.p_value:.2g})"
        )
        if self.worse_classes:
            return f"{text}; worse in {', '.join(map(printable, self.worse_classes))}"
        if not self.is_not_worse and self.images < self.images_needed:
            needed = f"{self.images_needed:,}"
            return f"{text}; an equal version would pass 80 % of the time with {needed} images"
        return text


@dataclasses.dataclass(frozen=True)
class Version:
    """A version of a model: a bundle with a number."""

    model: str
    number: int  # 1, 2, ...; a number is never used twice.
    # The fields of the log entry that added the version:
    time: str
    user: str
    host: str
    note: str
    bundle: BundleFacts

    def __str__(self) -> str:
        return f"{self.model}/{self.number}"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with versions and aliases."""

    name: str
    # The versions that were not removed, by number.
    versions: dict[int, Version] = dataclasses.field(default_factory=dict)
    # The history of each alias: the last number is the current version, the number before it is the
    # target of a rollback.
    aliases: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    last: int = 0  # The largest number that was ever used.
    # All experiments by name, oldest first.
    experiments: dict[str, Experiment] = dataclasses.field(default_factory=dict)

    @property
    def running_experiment(self) -> Experiment | None:
        """The experiment that has not ended; a model has at most one."""
        return next((one for one in self.experiments.values() if not one.end), None)

    def alias_target(self, alias: str) -> int | None:
        """Returns the number of an alias's current version, or None if the alias does not exist."""
        return self.aliases[alias][-1] if alias in self.aliases else None

    def version_aliases(self, version: int) -> list[str]:
        """Returns the sorted names of the aliases that point to a version."""
        return sorted(alias for alias in self.aliases if self.alias_target(alias) == version)


Models = Mapping[str, Model]


def check_name(kind: str, name: str) -> str:
    """Returns the name of a model or of an alias; `kind` is "model" or "alias".

    Raises:
      ConfigError: The name is not allowed.
    """
    if not re.fullmatch(_NAME, name):
        raise ConfigError(
            f"{kind}: must be 1 to 100 of the characters A-Z, a-z, 0-9, -, _ and ., and begin "
            f"with a letter or digit; got {name!r}"
        )
    if kind == "alias" and name.isdecimal():
        raise ConfigError(f"alias: must not be a number, because versions are; got {name!r}")
    return name


def parse_reference(text: str) -> tuple[str, str | int | None]:
    """Parses MODEL, MODEL@ALIAS or MODEL/VERSION to a name and an alias, a number or None.

    Raises:
      ConfigError: The text has none of these forms.
    """
    name, separator, rest = re.fullmatch(r"([^@/]*)([@/]?)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    check_name("model", name)
    if separator == "@":
        return name, check_name("alias", rest)
    if separator == "/":
        return name, parse_version(rest)
    return name, None


def parse_version_or_alias(text: str) -> str | int:
    """Parses a version number or an alias; raises ConfigError for other texts."""
    return parse_version(text) if text.isdecimal() else check_name("alias", text)


def parse_version(text: str) -> int:
    """Parses a version number; raises ConfigError if the text is not a number."""
    # The number of digits is limited, because Python's int() raises ValueError above 4,300 digits.
    if not re.fullmatch(r"[0-9]{1,1000}", text):
        raise ConfigError(f"version: must be a number, got {text!r}")
    return int(text)


def find(models: Models, name: str) -> Model:
    """Returns the model with a given name; raises RegistryError if it does not exist."""
    if name not in models:
        raise RegistryError(f"there is no model {printable(name)}{_suggestion(name, models)}")
    return models[name]


def resolve(models: Models, name: str, selector: str | int = CHAMPION) -> Version:
    """Returns the version of a model that a number or an alias selects.

    Raises:
      RegistryError: The model, version or alias does not exist.
    """
    model = find(models, name)
    if isinstance(selector, str):
        if selector not in model.aliases:
            advice = _suggestion(selector, model.aliases)
            raise RegistryError(f"{name} has no alias {printable(selector)}{advice}")
        selector = model.aliases[selector][-1]
    if selector not in model.versions:
        was_removed = 0 < selector <= model.last
        known = ", ".join(map(str, sorted(model.versions))) or "none"
        raise RegistryError(
            f"{name} has no version {selector}{' (it was removed)' * was_removed}; known "
            f"versions: {known}"
        )
    return model.versions[selector]


def find_digest(models: Models, name: str, digest: str) -> Version | None:
    """Returns the version of a model with a given bundle digest, or None if there is none."""
    versions = models[name].versions.values() if name in models else ()
    return next((version for version in versions if version.bundle.digest == digest), None)


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Returns a hint for an error message: names similar to an unknown name, or all known names."""
    known = sorted(known)
    names = f"{', '.join(known[:10]) or 'none'}{', ...' * (len(known) > 10)}"
    return did_you_mean(name, known, 3) or f"; known names: {names}"


def removable_version(models: Models, name: str, number: int) -> Version:
    """Returns a version; raises RegistryError if an alias or a running experiment uses it."""
    version = resolve(models, name, number)
    experiment = models[name].running_experiment
    if experiment is not None and number in experiment.versions.values():
        raise RegistryError(
            f"{version} is not removed, because the experiment {experiment.name} uses it: end the "
            f"experiment first (cnn_jax experiment end {name})"
        )
    if aliases := models[name].version_aliases(number):
        raise RegistryError(
            f"{version} is not removed, because it is {' and '.join(aliases)}: promote another "
            f"version, or remove the alias first (remove {name} --alias={aliases[0]})"
        )
    return version


def previous_version(models: Models, name: str, alias: str) -> Version:
    """Returns the version that an alias would point to after a rollback.

    Raises:
      RegistryError: The alias does not exist, or has no previous version.
    """
    version = resolve(models, name, alias)
    history = models[name].aliases[alias]
    if len(history) == 1:
        raise RegistryError(f"{name}@{alias} is {version.number} and has no previous version")
    return models[name].versions[history[-2]]


@dataclasses.dataclass(frozen=True)
class Gates:
    """The conditions that a version must meet before it is promoted.

    Attributes:
      min_accuracy, min_precision, min_recall, min_f1: The least test metric, 0 to 1; None for no
        condition.
      max_loss: The largest test loss, 0 or more; None for no condition.
      not_worse_than: An alias. Unless the alias is missing, or points to the version, `evidence`
        must be a comparison with the alias's version. None for no condition.
      evidence: A comparison in which the version must not be worse; see
        `evidence.compare_versions`.
      no_experiment: Whether the promotion is refused if it would end a running experiment.
    """

    min_accuracy: float | None = None
    min_precision: float | None = None
    min_recall: float | None = None
    min_f1: float | None = None
    max_loss: float | None = None
    not_worse_than: str | None = None
    evidence: Evidence | None = None
    no_experiment: bool = False

    def check(self, models: Models, version: Version, alias: str) -> tuple[str, ...]:
        """Checks that a version meets all conditions before an alias is pointed to it.

        Returns:
          A description of each condition that the version meets.

        Raises:
          RegistryError: The version misses a condition, the metric is unknown, the evidence is
            about other versions, or an experiment is running.
        """
        running = models[version.model].running_experiment
        if self.no_experiment and running is not None and running.alias == alias:
            raise RegistryError(
                f"{version} does not become {alias}: this would end the experiment {running.name}"
            )
        passed, failed = [], []
        for metric in METRICS:
            name = "max_loss" if metric == "loss" else f"min_{metric}"
            limit = getattr(self, name)
            if limit is not None:
                value = version.bundle.test_metric(metric)
                passes = value is not None and (
                    value <= limit if metric == "loss" else value >= limit
                )
                text = f"{name}={limit:g}: test {metric} is {_metric_text(value)}"
                (passed if passes else failed).append(text)
        reference = self.evidence.alias if self.evidence else self.not_worse_than
        if reference is not None:
            current = models[version.model].alias_target(reference)
            if self.evidence is None:
                is_compared = current in (None, version.number)  # There is nothing to compare.
            else:
                pair = (self.evidence.candidate, self.evidence.reference)
                is_compared = pair == (version.number, current)
            if not is_compared:
                raise RegistryError(
                    f"{version} was not compared with version {current}, which is now "
                    f"{version.model}@{reference}: run the command again"
                )
        if self.evidence is not None:
            for text, is_passed in self.evidence.comparisons.items():
                (passed if is_passed else failed).append(text)
        if failed:
            raise RegistryError(f"{version} does not become {alias}: {'; '.join(failed)}")
        return tuple(passed)


def _metric_text(value: float | None) -> str:
    return "not in the bundle" if value is None else f"{value:.6g}"


def apply(models: Models, entry: Entry) -> dict[str, Model]:
    """Returns the state after an entry; the state before, `models`, is not modified.

    Raises:
      ValueError: The entry is not valid in this state.
    """
    change = {
        "add": _add,
        "promote": _promote,
        "rollback": _roll_back,
        "remove": _remove,
        "split": _split,
        "unsplit": _unsplit,
    }
    if entry.action not in change:
        return dict(models)
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
    """Returns a copy of a model in which the entry's alias has a new history."""
    alias = str(entry.alias)
    _expect(entry.before == model.alias_target(alias), f"{alias} was not {entry.before}")
    model = dataclasses.replace(model, aliases={**model.aliases, alias: history})
    return _end_experiment(model, entry, alias == getattr(model.running_experiment, "alias", None))


def _split(model: Model, entry: Entry) -> Model:
    split = Split(**(entry.split or {}))
    _expect(model.running_experiment is None, "another experiment is running")
    _expect(split.name not in model.experiments, f"there was an experiment {split.name} before")
    _expect(entry.version in model.versions, f"there is no version {entry.version}")
    _expect(entry.before == model.alias_target(str(entry.alias)), f"{entry.alias} was another")
    _expect(entry.before != entry.version, "both versions are the same")
    experiment = Experiment(
        **dataclasses.asdict(split),
        model=model.name,
        alias=str(entry.alias),
        champion=entry.before,  # type: ignore[arg-type]
        challenger=entry.version,  # type: ignore[arg-type]
        start=entry.time,
    )
    return dataclasses.replace(model, experiments={**model.experiments, split.name: experiment})


def _unsplit(model: Model, entry: Entry) -> Model:
    name = (entry.split or {}).get("name")
    running = model.running_experiment
    _expect(running is not None and running.name == name, f"there is no running experiment {name}")
    return _end_experiment(model, entry)


def _end_experiment(model: Model, entry: Entry, is_affected: bool = True) -> Model:
    """Ends the running experiment of a model, if there is one and the entry affects it."""
    running = model.running_experiment
    if running is None or not is_affected:
        return model
    ended = dataclasses.replace(running, end=entry.time)
    return dataclasses.replace(model, experiments={**model.experiments, running.name: ended})


def _remove(model: Model, entry: Entry) -> Model:
    if entry.alias is not None:
        _expect(entry.alias in model.aliases, f"there is no alias {entry.alias}")
        aliases = {k: history for k, history in model.aliases.items() if k != entry.alias}
        is_affected = entry.alias == getattr(model.running_experiment, "alias", None)
        model = dataclasses.replace(model, aliases=aliases)
        return _end_experiment(model, entry, is_affected)
    number = entry.version
    _expect(number in model.versions, f"there is no version {number}")
    _expect(number not in map(model.alias_target, model.aliases), f"an alias points to {number}")
    versions = {k: version for k, version in model.versions.items() if k != number}
    aliases = {alias: _without(history, number) for alias, history in model.aliases.items()}
    # An earlier version of this package, which skips experiments, may remove the challenger.
    is_affected = number == getattr(model.running_experiment, "challenger", None)
    model = dataclasses.replace(model, versions=versions, aliases=aliases)
    return _end_experiment(model, entry, is_affected)


def _without(history: tuple[int, ...], number: int | None) -> tuple[int, ...]:
    """Removes a version from an alias's history, and merges adjacent equal versions."""
    left = [version for version in history if version != number]
    return tuple(version for i, version in enumerate(left) if i == 0 or version != left[i - 1])


def _expect(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def serialise(entry: Entry) -> bytes:
    """Converts an entry to JSON bytes, without empty fields.

    Raises:
      ValueError: A number is not finite.
    """
    fields = {"format": FORMAT} | dataclasses.asdict(entry)
    fields = {key: value for key, value in fields.items() if value not in (None, "", ())}
    if entry.action in _SKIPPABLE:
        fields["skippable"] = True
    fields["sha256"] = fields_digest(fields)
    text = json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False)
    # Text from the command line may contain surrogates for bytes that are not UTF-8. Surrogates are
    # written as JSON escapes.
    return f"{text}\n".encode("utf-8", "backslashreplace")


def fields_digest(fields: Mapping[str, Any]) -> str:
    """Returns the sha256 of all fields except "sha256"; the order of the fields does not matter."""
    others = {key: value for key, value in fields.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def parse(data: bytes) -> Entry:
    """Parses the JSON bytes of an entry.

    Raises:
      RegistryError: A later version of this package wrote the entry in a new format, or with an
        action that is unknown and not skippable.
      ValueError: The data is not a valid entry.
    """
    try:
        fields = json.loads(data)
        if _take(fields, "format", int) > FORMAT:
            raise RegistryError(
                f"has format {fields['format']}, but this version of cnn_jax reads format "
                f"{FORMAT}: upgrade cnn_jax"
            )
        if _take(fields, "sha256", str) != fields_digest(fields):
            raise ValueError("its sha256 does not match its other fields")
        action = _take(fields, "action", str)
        common: dict[str, Any] = {
            "number": _take(fields, "number", int),
            "previous": _take(fields, "previous", str, ""),
            "id": _take(fields, "id", str),
            "time": _time(fields),
            "user": _take(fields, "user", str, ""),
            "host": _take(fields, "host", str, ""),
            "note": _take(fields, "note", str, ""),
            "action": action,
        }
        if action not in _NEEDED_FIELDS:
            if fields.get("skippable") is True:
                return Entry(**common, model=_take(fields, "model", str, ""))
            raise RegistryError(
                f"has the action {printable(action)}, which this version of cnn_jax does not know: "
                "upgrade cnn_jax"
            )
        entry = Entry(
            **common,
            model=check_name("model", _take(fields, "model", str)),
            version=_take(fields, "version", int, None),
            alias=check_name("alias", _take(fields, "alias", str)) if "alias" in fields else None,
            before=_take(fields, "before", int, None),
            gates=tuple(map(str, _take(fields, "gates", list, []))),
            evidence=_take(fields, "evidence", dict, None),
            split=_take(fields, "split", dict, None),
            bundle=_facts(fields["bundle"]) if "bundle" in fields else None,
        )
        if action == "split":
            Split(**fields.get("split", {}))
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except (AttributeError, ConfigError, OverflowError, RecursionError, TypeError) as error:
        raise ValueError(str(error)) from error
    needed = ("alias", "before") if entry.alias and action == "remove" else _NEEDED_FIELDS[action]
    for field in ("version", "alias", "before", "split", "bundle"):
        is_set, is_needed = getattr(entry, field) is not None, field in needed
        problem = f"its {field} is {'missing' if is_needed else 'not allowed'} for {action}"
        _expect(is_set == is_needed or (action, field) == ("promote", "before"), problem)
    return entry


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
        metrics=finite_metrics(_take(fields, "metrics", dict)),
        fingerprint=_take(fields, "fingerprint", str, ""),
    )


def finite_metrics(metrics: Any) -> dict[str, dict[str, float]]:
    """Returns the finite metrics in unchecked JSON, by split and metric name."""
    if not isinstance(metrics, dict):
        return {}
    return {
        str(split): {
            str(name): float(value)
            for name, value in values.items()
            if type(value) in (int, float) and abs(value) <= sys.float_info.max
        }
        for split, values in metrics.items()
        if isinstance(values, dict)
    }


def _time(fields: Mapping[str, Any]) -> str:
    time = _take(fields, "time", str)
    datetime.datetime.fromisoformat(time)
    return time


_REQUIRED = object()


def _take(fields: Mapping[str, Any], key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """Returns the value of a field, or the default if the field is missing.

    Raises:
      KeyError: The field is missing and has no default.
      TypeError: The field has another type.
    """
    if default is not _REQUIRED and key not in fields:
        return default
    value = fields[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"its {key} is not of type {kind.__name__}")
    return value
