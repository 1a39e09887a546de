"""The command line of a registry of bundles.

    cnn_jax registry add MODEL RUN --registry=DIR
    cnn_jax registry list [MODEL] --registry=DIR [--json]
    cnn_jax registry show MODEL[@ALIAS|/VERSION] --registry=DIR [--json]
    cnn_jax registry promote MODEL VERSION --registry=DIR [--alias=champion] [GATES]
    cnn_jax registry promote MODEL VERSION --registry=DIR --not_worse_than=champion --on=SOURCE
    cnn_jax registry rollback MODEL --registry=DIR [--alias=champion] [--from=VERSION]
    cnn_jax registry remove MODEL VERSION --registry=DIR
    cnn_jax registry remove MODEL --alias=ALIAS --registry=DIR
    cnn_jax registry verify [MODEL] --registry=DIR
    cnn_jax registry fetch MODEL[@ALIAS|/VERSION] FOLDER --registry=DIR
    cnn_jax registry export MODEL[@ALIAS|/VERSION] --registry=DIR --mlflow=URI

DIR is a folder, or a URL such as s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH. Without
--registry, DIR is the value of the environment variable CNN_JAX_REGISTRY. A command that changes
the registry prints one line. `verify` reads the files of all versions, reports each version as
unchanged or damaged, and exits with 1 if a version is damaged; it also names folders that belong to
no version. `fetch` copies a bundle into FOLDER and prints the path of the copy. `export` registers
a version and its aliases in MLflow, so that `mlflow.pyfunc.load_model` and `mlflow models serve`
answer with it. For `fetch` and `export`, MODEL without a version is the version with the alias
"champion".
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnn_jax.config.schema import SOURCE_FORMS
from cnn_jax.registry import ledger
from cnn_jax.registry.flags import add_registry_flag, location, margin, required_registry
from cnn_jax.registry.ledger import CHAMPION, Entry, Evidence, Gates, Model, RegistryError, Version
from cnn_jax.registry.registry import Registry
from cnn_jax.system import cli
from cnn_jax.system.errors import BundleError, ConfigError, printable
from cnn_jax.system.text import facts as align
from cnn_jax.system.text import terminal_width, wrap

_MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
_DIGITS = 12  # The number of digest digits that the commands print.


def main(argv: Sequence[str]) -> None:
    flags = _parser().parse_args(argv)
    flags.command(Registry(required_registry(flags)), flags)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="cnn_jax registry",
        description="A registry of bundles with names, versions and aliases.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable, description: str) -> argparse.ArgumentParser:
        command_parser = commands.add_parser(name, help=description, description=f"{description}.")
        command_parser.set_defaults(command=run)
        add_registry_flag(command_parser)
        return command_parser

    add = command("add", _add, "add a bundle as the next version of a model")
    add.add_argument("model", type=_model, metavar="MODEL")
    add.add_argument("bundle", type=cli.path, metavar="RUN", help="a run, or its bundle RUN/bundle")
    list_ = command("list", _list, "list the versions of all models, or of one model")
    list_.add_argument("model", type=_model, nargs="?", metavar="MODEL")
    show = command("show", _show, "show a model or version, and its log of changes")
    _promote_flags(command("promote", _promote, "point an alias to a version"))
    rollback = command("rollback", _rollback, "point an alias to its previous version")
    rollback.add_argument("model", type=_model, metavar="MODEL")
    remove = command("remove", _remove, "remove a version without an alias, or an alias")
    remove.add_argument("model", type=_model, metavar="MODEL")
    remove.add_argument("version", type=ledger.parse_version, nargs="?", metavar="VERSION")
    verify = command("verify", _verify, "check the files of all versions, or of one model")
    verify.add_argument("model", type=_model, nargs="?", metavar="MODEL")
    fetch = command("fetch", _fetch, "copy a version's bundle into a folder, and print its path")
    export = command("export", _export, "register a version and its aliases in MLflow")

    for subparser in (show, fetch, export):
        subparser.add_argument(
            "reference", type=ledger.parse_reference, metavar="MODEL[@ALIAS|/VERSION]"
        )
    fetch.add_argument(
        "folder", type=cli.path, metavar="FOLDER", help="created if it does not exist"
    )
    for subparser in (list_, show):
        subparser.add_argument("--json", action="store_true", help="print JSON")
    export.add_argument(
        "--mlflow",
        type=location,
        default=os.environ.get(_MLFLOW_VARIABLE) or None,
        metavar="URI",
        help=f"the MLflow server or database (${_MLFLOW_VARIABLE})",
    )
    _alias_flag(rollback)
    rollback.add_argument(
        "--from",
        dest="current",
        type=ledger.parse_version,
        metavar="VERSION",
        help="refuse unless the alias points to this version now",
    )
    remove.add_argument("--alias", type=_alias, help="the alias to remove, instead of a version")
    for name in ("add", "promote", "rollback", "remove"):
        commands.choices[name].add_argument(
            "--note", default="", metavar="TEXT", help="a note for the log"
        )
    return parser


def _alias_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--alias", type=_alias, default=CHAMPION, help=f"the alias to move ({CHAMPION})"
    )


def _promote_flags(promote: argparse.ArgumentParser) -> None:
    promote.add_argument("model", type=_model, metavar="MODEL")
    promote.add_argument(
        "version",
        type=ledger.parse_version_or_alias,
        metavar="VERSION",
        help="the number of the version, or one of its aliases",
    )
    _alias_flag(promote)
    for metric in ("accuracy", "precision", "recall", "f1"):
        text = f"refuse a version with a lower test {metric}, 0 to 1"
        names = f"--min_{metric}", f"--min-{metric}"
        promote.add_argument(*names, type=cli.fraction, metavar="FRACTION", help=text)
    text = "refuse a version with a higher test loss"
    names = "--max_loss", "--max-loss"
    promote.add_argument(*names, type=cli.not_negative, metavar="LOSS", help=text)
    promote.add_argument(
        "--not_worse_than",
        "--not-worse-than",
        type=_alias,
        metavar="ALIAS",
        help="refuse a version unless tests on the images of --on show that it is not worse than "
        "the version of this alias; not checked if --alias names the same alias, and the alias "
        "does not exist yet",
    )
    promote.add_argument(
        "--on", metavar="SOURCE", help=f"the images for --not_worse_than: {SOURCE_FORMS}"
    )
    promote.add_argument(
        "--split",
        choices=("test", "all"),
        metavar="SPLIT",
        help="test: only images that are in the test split of both versions; all: all images of "
        "--on, which neither version may have seen (test)",
    )
    promote.add_argument(
        "--margin",
        type=margin,
        metavar="FRACTION",
        help="the difference in accuracy that --not_worse_than accepts, at least 0.0001 and below "
        "1 (0.01)",
    )


def _model(text: str) -> str:
    return ledger.check_name("model", text)


def _alias(text: str) -> str:
    return ledger.check_name("alias", text)


def _add(registry: Registry, flags: argparse.Namespace) -> None:
    from cnn_jax.inference.bundle import find_bundle

    added = registry.add(flags.model, find_bundle(flags.bundle), flags.note)
    version = added.version
    if not added.is_new:
        _print(f"{version.model} already has this bundle: it is {version}")
        return
    metrics = ", ".join(f"{name} {text}" for name, text in _metrics(version).items())
    created = f"; created a registry at {printable(registry.url)}" * added.is_new_registry
    _print(f"added {version}: {metrics}, digest {version.bundle.digest[:_DIGITS]}{created}")


def _promote(registry: Registry, flags: argparse.Namespace) -> None:
    if (flags.not_worse_than is None) != (flags.on is None):
        raise ConfigError("--not_worse_than and --on must be given together")
    for name in ("split", "margin"):
        if flags.not_worse_than is None and getattr(flags, name) is not None:
            raise ConfigError(f"--{name} needs --not_worse_than and --on")
    limits = ("min_accuracy", "min_precision", "min_recall", "min_f1", "max_loss")
    gates = Gates(**{name: getattr(flags, name) for name in limits})
    if flags.not_worse_than is not None:
        found = _evidence(registry, flags, gates)
        gates = dataclasses.replace(gates, not_worse_than=flags.not_worse_than, evidence=found)
    entry = registry.promote(flags.model, flags.version, flags.alias, gates, flags.note)
    if entry is None:
        version = registry.resolve(flags.model, flags.alias)
        _print(f"{flags.model}@{flags.alias} is already version {version.number}")
        return
    _print(_alias_change(registry, entry))


def _evidence(registry: Registry, flags: argparse.Namespace, gates: Gates) -> Evidence | None:
    """Compares the version with the version that --not_worse_than names.

    Returns None if this version does not exist or is the same version.
    """
    version = registry.resolve(flags.model, flags.version)
    target = registry.models[flags.model].alias_target(flags.not_worse_than)
    if flags.not_worse_than == flags.alias and target in (None, version.number):
        if target is None:
            missing = f"{flags.model}@{flags.alias}"
            line = f"nothing is compared, because {missing} does not exist yet"
            print(cli.fit(line, sys.stderr), file=sys.stderr)
        return None
    gates.check(registry.models, version, flags.alias)  # The other gates need no predictions.
    from cnn_jax.registry.evidence import compare_versions
    from cnn_jax.system.compilation_cache import keep_compiled
    from cnn_jax.system.console import Console
    from cnn_jax.system.runtime import keep_freed_memory

    keep_freed_memory()
    keep_compiled()
    return compare_versions(
        registry,
        version,
        flags.not_worse_than,
        flags.on,
        0.01 if flags.margin is None else flags.margin,
        flags.split or "test",
        Console().track,
    )


def _rollback(registry: Registry, flags: argparse.Namespace) -> None:
    entry = registry.rollback(flags.model, flags.alias, flags.note, flags.current)
    _print(_alias_change(registry, entry))


def _alias_change(registry: Registry, entry: Entry) -> str:
    """Returns a line of text that describes the change of an alias."""
    before = f"previously {entry.before}" if entry.before else "new"
    gates = f"; passed: {'; '.join(entry.gates)}" if entry.gates else ""
    experiments = registry.models[entry.model].experiments.values()
    ended = "".join(
        f"; the experiment {one.name} has ended" for one in experiments if one.end == entry.time
    )
    return f"{entry.model}@{entry.alias} is now version {entry.version} ({before}){gates}{ended}"


def _remove(registry: Registry, flags: argparse.Namespace) -> None:
    if (flags.version is None) == (flags.alias is None):
        raise ConfigError("remove: give either VERSION or --alias")
    if flags.alias is not None:
        entry = registry.remove_alias(flags.model, flags.alias, flags.note)
        _print(f"removed {entry.model}@{entry.alias}, which was version {entry.before}")
        return
    registry.remove(flags.model, flags.version, flags.note)
    _print(f"removed {flags.model}/{flags.version}")


def _verify(registry: Registry, flags: argparse.Namespace) -> None:
    versions = [
        version
        for model in _selected(registry, flags.model)
        for _, version in sorted(model.versions.items())
    ]
    damaged = []
    for version in versions:
        try:
            registry.verify(version)
            line = f"{version} is unchanged"
        except BundleError as error:
            damaged.append(str(version))
            line = f"{version}: {error}"
        except RegistryError as error:
            registry.refresh()  # This call raises an error if the whole registry is unreadable.
            line = f"{version} was not verified: {error}"
        _print(printable(line))
    if flags.model is None:
        for path in registry.unused_bundles():
            _print(f"{path} belongs to no version: delete it, unless an `add` is running")
    if damaged:
        raise RegistryError(
            f"{len(damaged)} of {len(versions)} versions are damaged: {', '.join(damaged)}; add "
            "the same bundle again to restore its files"
        )
    if not versions:
        print(f"{registry.url}: no versions")


def _fetch(registry: Registry, flags: argparse.Namespace) -> None:
    print(registry.fetch(_version(registry, flags), flags.folder, is_copy=True))


def _export(registry: Registry, flags: argparse.Namespace) -> None:
    from cnn_jax.registry import mlflow

    if flags.mlflow is None:
        raise ConfigError(f"--mlflow is required, unless ${_MLFLOW_VARIABLE} is set")
    for line in mlflow.export_version(registry, _version(registry, flags), flags.mlflow):
        _print(line)


def _version(registry: Registry, flags: argparse.Namespace) -> Version:
    """Returns the version that the reference in the flags names, by default the champion."""
    name, selector = flags.reference
    return registry.resolve(name, CHAMPION if selector is None else selector)


def _list(registry: Registry, flags: argparse.Namespace) -> None:
    models = _selected(registry, flags.model)
    if flags.json:
        _print_json({model.name: _model_as_json(model) for model in models})
        return
    rows = [row for model in models for row in _rows(model)]
    print(_table(rows, terminal_width(sys.stdout)) if rows else f"{registry.url}: no versions")


def _selected(registry: Registry, name: str | None) -> list[Model]:
    """Returns the named model in a list, or all models sorted by name if `name` is None."""
    if name is not None:
        return [ledger.find(registry.models, name)]
    return [model for _, model in sorted(registry.models.items())]


def _show(registry: Registry, flags: argparse.Namespace) -> None:
    name, selector = flags.reference
    model = ledger.find(registry.models, name)
    log = [entry for entry in registry.log if entry.model == name]
    width = terminal_width(sys.stdout)
    if selector is None:
        as_json = _model_as_json(model)
        text = [_describe_model(model, width), _table(_rows(model), width)]
    else:
        version = registry.resolve(name, selector)
        log = [entry for entry in log if version.number in (entry.version, entry.before)]
        as_json = _version_as_json(model, version)
        text = [_describe(model, version, registry.url, width)]
    if flags.json:
        entries = [_without_empty(dataclasses.asdict(entry)) for entry in log]
        _print_json(as_json | {"log": entries})
        return
    lines = [part for entry in log for part in wrap(f"  {_line(entry)}", width, indent=9)]
    text.append("\n".join(["log", *lines]))
    print("\n\n".join(filter(None, text)))


def _print(line: str) -> None:
    """Prints text, wrapped to the width of the terminal."""
    print("\n".join(wrap(line, terminal_width(sys.stdout))), flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=True))


def _without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in (None, "", ())}


def _model_as_json(model: Model) -> dict[str, Any]:
    """Converts a model to JSON types.

    The last version in an alias's history is the alias's current version.
    """
    return {
        "model": model.name,
        "aliases": {
            alias: {"version": history[-1], "history": history}
            for alias, history in sorted(model.aliases.items())
        },
        "versions": [
            _version_as_json(model, version) for _, version in sorted(model.versions.items())
        ],
    }


def _version_as_json(model: Model, version: Version) -> dict[str, Any]:
    fields = dataclasses.asdict(version)
    return {**fields, "aliases": model.version_aliases(version.number)}


def _rows(model: Model) -> list[dict[str, str]]:
    """Returns the rows of a table, one row per version of a model."""
    return [
        {
            "version": str(version),
            "aliases": ", ".join(model.version_aliases(version.number)) or "-",
            "added (UTC)": _minute(version.time),
            **_metrics(version),
            "classes": str(version.bundle.classes),
            "pixels": _pixels(version),
            "size": _size(version),
            "digest": version.bundle.digest[:_DIGITS],
            "by": _author(version),
        }
        for _, version in sorted(model.versions.items())
    ]


def _metrics(version: Version) -> dict[str, str]:
    """Returns the test accuracy and F1 of a version as text."""
    bundle = version.bundle
    values = {"accuracy": bundle.test_metric("accuracy"), "F1": bundle.test_metric("f1")}
    return {name: "-" if value is None else f"{value:.2%}" for name, value in values.items()}


def _pixels(version: Version) -> str:
    height, width = version.bundle.image_size
    return f"{height} x {width}"


def _size(version: Version) -> str:
    size = version.bundle.size
    return f"{size / 1e3:.1f} kB" if size < 1e5 else f"{size / 1e6:,.1f} MB"


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _author(item: Version | Entry) -> str:
    return printable(f"{item.user}@{item.host}")


def _table(rows: Sequence[Mapping[str, str]], width: int | None) -> str:
    """Formats rows as a table, or as paragraphs if the table is wider than the terminal."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = [dict(zip(names, names, strict=True)), *rows]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    text = ["  ".join(line[name].ljust(widths[name]) for name in names).rstrip() for line in lines]
    if width is None or max(map(len, text)) <= width:
        return "\n".join(text)
    return "\n\n".join(_facts(row, width) for row in rows)


def _facts(facts: Mapping[str, str], width: int | None) -> str:
    """Formats names and descriptions as two aligned columns, wrapped to a width."""
    return "\n".join(align(facts, width, max(map(len, facts)) + 2))


def _describe_model(model: Model, width: int | None) -> str:
    """Formats a model's name and the history of each alias, latest version first."""
    aliases = {
        f"@{alias}": " <- ".join(map(str, reversed(history)))
        for alias, history in sorted(model.aliases.items())
    }
    return _facts({"model": model.name, **aliases}, width)


def _describe(model: Model, version: Version, url: str, width: int | None) -> str:
    """Returns the description of a version that `show` prints."""
    bundle = version.bundle
    facts = {
        "version": str(version),
        "aliases": ", ".join(model.version_aliases(version.number)) or "-",
        "added": f"{version.time} by {_author(version)}",
        "note": printable(version.note) or "-",
        "classes": str(bundle.classes),
        "pixels": _pixels(version),
        "size": _size(version),
        "digest": bundle.digest,
        "data": printable(bundle.fingerprint) or "-",
        "bundle": printable(f"{url}/{bundle.path}"),
    }
    for split, metrics in bundle.metrics.items():
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        facts[printable(split)] = printable(text)
    return _facts(facts, width)


def _line(entry: Entry) -> str:
    """Formats an entry of the log as one line."""
    target = {
        "add": f"{entry.version}",
        "promote": f"{entry.alias} -> {entry.version}",
        "rollback": f"{entry.alias} -> {entry.version}",
        "remove": f"{entry.version or entry.alias}",
        "split": f"{entry.alias} into {entry.before} and {entry.version}",
        "unsplit": "",
    }.get(entry.action, "(skipped, because this version of cnn_jax does not know the action)")
    before = f" (previously {entry.before})" * (entry.before is not None)
    if entry.split is not None:
        before = f" experiment {entry.split.get('name')}"
    gates = "".join(f"  {gate}" for gate in entry.gates)
    note = f"  # {entry.note}" * bool(entry.note)
    time = re.sub(r"\+00:00$", "Z", entry.time)
    change = f"{entry.action} {target}{before}{gates}{note}"
    return printable(f"{entry.number:>5}  {time}  {_author(entry)}  {change}")


if __name__ == "__main__":
    cli.run(main)
