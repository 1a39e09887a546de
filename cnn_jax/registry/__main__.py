"""A registry of bundles, on the command line.

    cnn_jax registry add MODEL RUN --registry=DIR
    cnn_jax registry list [MODEL] --registry=DIR [--json]
    cnn_jax registry show MODEL[@ALIAS|/VERSION] --registry=DIR [--json]
    cnn_jax registry promote MODEL VERSION --registry=DIR [--alias=champion] [GATES]
    cnn_jax registry rollback MODEL --registry=DIR [--alias=champion] [--from=VERSION]
    cnn_jax registry remove MODEL VERSION --registry=DIR
    cnn_jax registry remove MODEL --alias=ALIAS --registry=DIR
    cnn_jax registry verify [MODEL] --registry=DIR
    cnn_jax registry fetch MODEL[@ALIAS|/VERSION] FOLDER --registry=DIR
    cnn_jax registry export MODEL[@ALIAS|/VERSION] --registry=DIR --mlflow=URI
    cnn_jax registry import MODEL[@ALIAS|/VERSION] --registry=DIR --mlflow=URI

DIR is a folder or a URL of fsspec, such as s3://BUCKET/PATH; the variable CNN_JAX_REGISTRY
stands for it. What a command has done is one line on stdout. `verify` reads the files of all
versions, says of each whether it is as it was added, and exits with 1 if one is not. `fetch`
copies a bundle into FOLDER and prints where it is; MODEL alone is its champion. `export` and
`import` copy to and from an MLflow registry, and `import --no_aliases` leaves the aliases here as
they are.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnn_jax.registry import ledger
from cnn_jax.registry.ledger import CHAMPION, Entry, Gates, Model, RegistryError, Version
from cnn_jax.registry.registry import Registry
from cnn_jax.system import cli
from cnn_jax.system.errors import BundleError, ConfigError, printable

_VARIABLE = "CNN_JAX_REGISTRY"
_MLFLOW_VARIABLE = "MLFLOW_TRACKING_URI"
_DIGITS = 12  # Of a digest: enough to tell two bundles apart.


def main(argv: Sequence[str]) -> None:
    flags = _parser().parse_args(argv)
    if flags.registry is None:
        raise ConfigError(f"--registry: is needed, or the variable {_VARIABLE}")
    flags.command(Registry(flags.registry), flags)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="cnn_jax registry",
        description="Bundles with names, versions and aliases, and a log of every change.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=description, description=f"{description}.")
        made.set_defaults(command=run)
        made.add_argument(
            "--registry",
            type=_place,
            default=os.environ.get(_VARIABLE) or None,
            metavar="DIR",
            help=f"a folder, or a URL such as s3://BUCKET/PATH (the variable {_VARIABLE})",
        )
        return made

    add = command("add", _add, "add a bundle as the next version of a model")
    add.add_argument("model", type=_model, metavar="MODEL")
    add.add_argument("bundle", type=cli.path, metavar="RUN", help="a run, or its bundle RUN/bundle")
    show_all = command("list", _list, "list the versions of all models, or of one")
    show_all.add_argument("model", type=_model, nargs="?", metavar="MODEL")
    show = command("show", _show, "show all of a model or version, and its changes")
    _promote_flags(command("promote", _promote, "point an alias to a version"))
    rollback = command("rollback", _rollback, "point an alias to where it pointed before")
    rollback.add_argument("model", type=_model, metavar="MODEL")
    remove = command("remove", _remove, "remove a version to which no alias points, or an alias")
    remove.add_argument("model", type=_model, metavar="MODEL")
    remove.add_argument("version", type=_version, nargs="?", metavar="VERSION")
    verify = command("verify", _verify, "read all files of all versions, or of one model's")
    verify.add_argument("model", type=_model, nargs="?", metavar="MODEL")
    fetch = command("fetch", _fetch, "copy a version's bundle into a folder, and print where it is")
    export = command("export", _export, "copy versions and aliases to an MLflow registry")
    bring = command("import", _import, "copy versions and aliases from an MLflow registry")

    for one in (show, fetch, export, bring):
        one.add_argument("reference", type=_reference, metavar="MODEL[@ALIAS|/VERSION]")
    fetch.add_argument("folder", type=cli.path, metavar="FOLDER", help="made if it is not there")
    for one in (show_all, show):
        one.add_argument("--json", action="store_true", help="as JSON")
    for one in (export, bring):
        one.add_argument(
            "--mlflow",
            type=_place,
            default=os.environ.get(_MLFLOW_VARIABLE) or None,
            metavar="URI",
            help=f"the MLflow server or database (the variable {_MLFLOW_VARIABLE})",
        )
    bring.add_argument(
        "--no_aliases",
        "--no-aliases",
        action="store_true",
        help="the versions alone, and leave the aliases here as they are",
    )
    _alias_flag(rollback)
    rollback.add_argument(
        "--from",
        dest="present",
        type=_version,
        metavar="VERSION",
        help="refuse if the alias is not at this version now",
    )
    remove.add_argument("--alias", type=_alias, help="remove this alias, and no version")
    for name in ("add", "promote", "rollback", "remove"):
        commands.choices[name].add_argument(
            "--note", default="", metavar="TEXT", help="what to keep in the log with it"
        )
    return parser


def _alias_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--alias", type=_alias, default=CHAMPION, help=f"the alias to move ({CHAMPION})"
    )


def _promote_flags(promote: argparse.ArgumentParser) -> None:
    promote.add_argument("model", type=_model, metavar="MODEL")
    promote.add_argument(
        "version", type=_which, metavar="VERSION", help="its number, or an alias that it has"
    )
    _alias_flag(promote)
    for figure in ("accuracy", "precision", "recall", "f1"):
        promote.add_argument(
            f"--min_{figure}",
            f"--min-{figure}",
            type=cli.fraction,
            metavar="SHARE",
            help=f"refuse a version whose test {figure} is less, 0 to 1",
        )
    promote.add_argument(
        "--max_loss",
        "--max-loss",
        type=_loss,
        metavar="LOSS",
        help="refuse a version whose test loss is more",
    )
    promote.add_argument(
        "--not_below",
        "--not-below",
        type=_alias,
        metavar="ALIAS",
        help="refuse a version whose test accuracy is less than that of this alias's version",
    )


def _place(text: str) -> str:
    """The argparse type of a folder or URL: not empty."""
    return text if "://" in text else cli.path(text)


def _argparse_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type whose errors are those of `parse`."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


_model = _argparse_type(lambda text: ledger.check_name("model", text))
_alias = _argparse_type(lambda text: ledger.check_name("alias", text))
_which = _argparse_type(ledger.parse_which)
_version = _argparse_type(ledger.parse_version)
_reference = _argparse_type(ledger.parse_reference)


def _loss(text: str) -> float:
    """The argparse type of a number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text!r}")
    return value


def _add(registry: Registry, flags: argparse.Namespace) -> None:
    from cnn_jax.inference.bundle import find_bundle

    added = registry.add(flags.model, find_bundle(flags.bundle), flags.note)
    version = added.version
    if not added.is_new:
        print(f"{version.model} has this bundle already: it is {version}")
        return
    figures = ", ".join(f"{name} {text}" for name, text in _figures(version).items())
    made = f"; made a registry at {printable(registry.url)}" * added.has_begun
    print(f"added {version}: {figures}, digest {version.bundle.digest[:_DIGITS]}{made}")


def _promote(registry: Registry, flags: argparse.Namespace) -> None:
    gates = Gates(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Gates)})
    entry = registry.promote(flags.model, flags.version, flags.alias, gates, flags.note)
    if entry is None:
        version = registry.resolve(flags.model, flags.alias)
        print(f"{flags.model}@{flags.alias} is version {version.number} already")
        return
    print(_moved(entry))


def _rollback(registry: Registry, flags: argparse.Namespace) -> None:
    print(_moved(registry.rollback(flags.model, flags.alias, flags.note, flags.present)))


def _moved(entry: Entry) -> str:
    """What has happened to an alias."""
    before = f"before {entry.before}" if entry.before else "new"
    held = f"; held: {'; '.join(entry.gates)}" if entry.gates else ""
    return f"{entry.model}@{entry.alias} is version {entry.version} now ({before}){held}"


def _remove(registry: Registry, flags: argparse.Namespace) -> None:
    if (flags.version is None) == (flags.alias is None):
        raise ConfigError("remove: takes a VERSION or an --alias, one of them")
    if flags.alias is not None:
        entry = registry.remove_alias(flags.model, flags.alias, flags.note)
        print(f"removed {entry.model}@{entry.alias}, which was version {entry.before}")
        return
    registry.remove(flags.model, flags.version, flags.note)
    print(f"removed {flags.model}/{flags.version}")


def _verify(registry: Registry, flags: argparse.Namespace) -> None:
    versions = [
        version
        for model in _chosen(registry, flags.model)
        for _, version in sorted(model.versions.items())
    ]
    damaged = []
    for version in versions:
        try:
            registry.verify(version)
            line = f"{version} is as it was added"
        except BundleError as error:
            damaged.append(str(version))
            line = f"{version}: {error}"
        except RegistryError as error:
            registry.refresh()  # Which fails if it is not the version alone.
            line = f"{version} was not verified: {error}"
        print(printable(line), flush=True)
    if damaged:
        raise RegistryError(
            f"{len(damaged)} of {len(versions)} versions are damaged: {', '.join(damaged)}; to add "
            "the same bundle again puts its files back"
        )
    if not versions:
        print(f"{registry.url}: no versions")


def _fetch(registry: Registry, flags: argparse.Namespace) -> None:
    name, which = flags.reference
    version = registry.resolve(name, CHAMPION if which is None else which)
    print(registry.fetch(version, flags.folder, is_copy=True))


def _export(registry: Registry, flags: argparse.Namespace) -> None:
    from cnn_jax.registry import mlflow

    name, which = flags.reference
    for line in mlflow.export(registry, name, which, _mlflow_uri(flags)):
        print(line, flush=True)


def _import(registry: Registry, flags: argparse.Namespace) -> None:
    from cnn_jax.registry import mlflow

    name, which = flags.reference
    for line in mlflow.bring(registry, name, which, _mlflow_uri(flags), not flags.no_aliases):
        print(line, flush=True)


def _mlflow_uri(flags: argparse.Namespace) -> str:
    if flags.mlflow is None:
        raise ConfigError(f"--mlflow: is needed, or the variable {_MLFLOW_VARIABLE}")
    return flags.mlflow


def _list(registry: Registry, flags: argparse.Namespace) -> None:
    models = _chosen(registry, flags.model)
    if flags.json:
        _print_json({model.name: _model_as_json(model) for model in models})
        return
    rows = [row for model in models for row in _rows(model)]
    print(_table(rows, _width()) if rows else f"{registry.url}: no versions")


def _chosen(registry: Registry, name: str | None) -> list[Model]:
    """The model of this name, or all of them in their order."""
    if name is not None:
        return [ledger.find(registry.models, name)]
    return [model for _, model in sorted(registry.models.items())]


def _show(registry: Registry, flags: argparse.Namespace) -> None:
    name, which = flags.reference
    model = ledger.find(registry.models, name)
    log = [entry for entry in registry.log if entry.model == name]
    if which is None:
        as_json = _model_as_json(model)
        text = [_describe_model(model), _table(_rows(model), _width())]
    else:
        version = registry.resolve(name, which)
        log = [entry for entry in log if version.number in (entry.version, entry.before)]
        as_json = _version_as_json(model, version)
        text = [_describe(model, version, registry.url)]
    if flags.json:
        _print_json(as_json | {"log": [_without_empty(dataclasses.asdict(one)) for one in log]})
        return
    text.append("\n".join(["log", *(f"  {_line(entry)}" for entry in log)]))
    print("\n\n".join(filter(None, text)))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=True))


def _without_empty(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in (None, "", ())}


def _model_as_json(model: Model) -> dict[str, Any]:
    """What --json says of a model; an alias's history ends where it points."""
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
    return {**fields, "aliases": model.aliases_of(version.number)}


def _rows(model: Model) -> list[dict[str, str]]:
    """The lines of a table, one for each version of a model."""
    return [
        {
            "version": str(version),
            "aliases": ", ".join(model.aliases_of(version.number)) or "-",
            "added (UTC)": _minute(version.time),
            **_figures(version),
            "classes": str(version.bundle.classes),
            "pixels": _pixels(version),
            "size": _size(version),
            "digest": version.bundle.digest[:_DIGITS],
            "by": _by(version),
        }
        for _, version in sorted(model.versions.items())
    ]


def _figures(version: Version) -> dict[str, str]:
    """The two figures of the test split by which a version is known."""
    values = {"accuracy": version.bundle.test("accuracy"), "F1": version.bundle.test("f1")}
    return {name: "-" if value is None else f"{value:.2%}" for name, value in values.items()}


def _pixels(version: Version) -> str:
    height, width = version.bundle.image_size
    return f"{height} x {width}"


def _size(version: Version) -> str:
    size = version.bundle.size
    return f"{size / 1e3:.1f} kB" if size < 1e5 else f"{size / 1e6:,.1f} MB"


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _by(what: Version | Entry) -> str:
    return printable(f"{what.user}@{what.host}")


def _width() -> float:
    """Columns of the terminal; of a file there is no end to them."""
    if sys.stdout is None or not sys.stdout.isatty():
        return math.inf
    with contextlib.suppress(OSError):
        return os.get_terminal_size(sys.stdout.fileno()).columns or math.inf
    return math.inf


def _table(rows: Sequence[Mapping[str, str]], width: float) -> str:
    """A table, or where that is too wide for the terminal, a paragraph for each row."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = [dict(zip(names, names, strict=True)), *rows]
    widths = {name: max(len(line[name]) for line in lines) for name in names}
    text = ["  ".join(line[name].ljust(widths[name]) for name in names).rstrip() for line in lines]
    if max(map(len, text)) <= width:
        return "\n".join(text)
    return "\n\n".join(_facts(list(row.items())) for row in rows)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    """Aligned `name  text` lines."""
    width = max(len(name) for name, _ in facts)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in facts)


def _describe_model(model: Model) -> str:
    """A model's name, and for each alias where it points and where it did before."""
    aliases = [
        (f"@{alias}", " <- ".join(map(str, reversed(history))))
        for alias, history in sorted(model.aliases.items())
    ]
    return _facts([("model", model.name), *aliases])


def _describe(model: Model, version: Version, url: str) -> str:
    """All that is known of a version."""
    bundle = version.bundle
    facts = [
        ("version", str(version)),
        ("aliases", ", ".join(model.aliases_of(version.number)) or "-"),
        ("added", f"{version.time} by {_by(version)}"),
        ("note", printable(version.note) or "-"),
        ("classes", str(bundle.classes)),
        ("pixels", _pixels(version)),
        ("size", _size(version)),
        ("digest", bundle.digest),
        ("data", printable(bundle.fingerprint) or "-"),
        ("bundle", printable(f"{url}/{bundle.path}")),
    ]
    for split, figures in bundle.metrics.items():
        text = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        facts.append((printable(split), printable(text)))
    return _facts(facts)


def _line(entry: Entry) -> str:
    """A line of the log."""
    target = {
        "add": f"{entry.version}",
        "promote": f"{entry.alias} -> {entry.version}",
        "rollback": f"{entry.alias} -> {entry.version}",
        "remove": f"{entry.version or entry.alias}",
    }[entry.action]
    before = f" (before {entry.before})" * (entry.before is not None)
    gates = "".join(f"  {gate}" for gate in entry.gates)
    note = f"  # {entry.note}" * bool(entry.note)
    when = re.sub(r"\+00:00$", "Z", entry.time)
    text = f"{entry.number:>5}  {when}  {_by(entry)}  {entry.action} {target}{before}{gates}{note}"
    return printable(text)


if __name__ == "__main__":
    cli.run(main)
