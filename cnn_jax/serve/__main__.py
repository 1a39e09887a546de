"""Serves a bundle, or models of a registry, over HTTP.

    cnn_jax serve --bundle=RUN [--port=8000]
    cnn_jax serve --registry=DIR [--model=NAME] [--alias=champion]

http://127.0.0.1:8000/ is a web page on which people can upload images. Programs send images to
POST /predict, or use existing clients of TensorFlow Serving (/v1) or of the Open Inference Protocol
(/v2).
"""

import argparse
import pathlib
import re
from collections.abc import Sequence

from cnn_jax.registry.flags import add_registry_flag
from cnn_jax.registry.ledger import CHAMPION, check_name, parse_version_or_alias
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError

_NEEDED = ("fastapi", "httptools", "prometheus_client", "python_multipart", "uvicorn")

# The flags that have an effect only together with another flag, by this other flag.
_NEEDED_BY = {
    "registry": ("alias", "versions"),
    "request_log": ("request_log_fraction", "request_log_mb", "request_log_images"),
}
# The limits on all requests, and the limits on one request.
_LIMITS = (
    ("queue", "max_images"),
    ("queue_pixels", "max_pixels"),
    ("max_bodies_mb", "max_body_mb"),
)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError("must be names, separated by commas")
    return names


def _origins(text: str) -> list[str]:
    names = _names(text)
    for name in names:
        if name != "*" and not re.fullmatch(r"https?://[^/\s]+", name):
            raise argparse.ArgumentTypeError(
                f"must be origins, such as https://example.com without a path, got {name!r}"
            )
    return names


def _versions(text: str) -> list[int | str]:
    return [parse_version_or_alias(name) for name in _names(text)]


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text!r}")
    return int(text)


_positive = cli.number("above 0", lambda value: value > 0)
_fraction = cli.number("above 0 and at most 1", lambda value: 0 < value <= 1)

# The flags that are off by default: name, type, metavar and help.
_OPTIONAL = (
    ("model", _names, "NAME,...", "models to serve (all), or the name of the bundle's model"),
    ("versions", _versions, "V,...", "further versions or aliases to serve"),
    ("health_port", _port, None, "second port, only for /healthz, /readyz and /metrics"),
    ("tokens", cli.path, "FILE", "file of access tokens: lines `predict TOKEN`"),
    ("allowed_hosts", _names, "NAME,...", "further names for the Host header"),
    ("cors_origins", _origins, "URL,...", "origins whose web pages may use the server; or *"),
    ("trusted_proxies", _names, "ADDRESS,...", "proxies whose X-Forwarded-For is believed"),
    ("request_log", cli.path, "DIR", "folder for answers and feedback; servers may share it"),
    ("request_log_fraction", _fraction, None, "fraction of the images to record, at random (1)"),
    ("request_log_mb", _positive, None, "maximum MB of the rows without feedback (1000)"),
)
# The flags with a number: name, type, default and help.
_NUMBERS = (
    ("poll", _positive, 2.0, "mean seconds between reads of the registry"),
    ("load_timeout", _positive, 600.0, "seconds until the loading of a version counts as failed"),
    ("max_batch", cli.positive, 32, "maximum images in a batch"),
    ("max_wait_ms", cli.not_negative, 0.0, "maximum milliseconds to wait for a full batch"),
    ("queue", cli.positive, 256, "maximum images in flight"),
    ("queue_pixels", cli.positive, 500_000_000, "maximum pixels of the images in flight"),
    ("timeout", _positive, 30.0, "seconds until a request times out"),
    ("max_body_mb", _positive, 20.0, "maximum MB of a request's body"),
    ("max_bodies_mb", _positive, 100.0, "maximum MB of the bodies of all unanswered requests"),
    ("max_pixels", cli.positive, 25_000_000, "maximum pixels of an image"),
    ("max_images", cli.positive, 64, "maximum images in a request"),
    ("drain", cli.not_negative, 0.0, "seconds that /readyz reports 503 before shutdown"),
)


def main(argv: Sequence[str]) -> None:
    flags = _parse(argv)
    for name in _NEEDED:
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"serving needs {name}, which is not installed: pip install 'cnn_jax[serve]'"
            ) from error
    # The modules below need the packages in `_NEEDED`, so the modules are imported after the check.
    from cnn_jax.inference.bundle import find_bundle
    from cnn_jax.serve.limits import Limits
    from cnn_jax.serve.loader import BundleSource, RegistrySource
    from cnn_jax.serve.logs import start_logging
    from cnn_jax.serve.server import run
    from cnn_jax.serve.tokens import Tokens
    from cnn_jax.system import runtime

    runtime.keep_freed_memory()
    start_logging(flags.log_level)
    if flags.bundle:
        source = BundleSource(find_bundle(flags.bundle), (flags.model or ["default"])[0])
    else:
        # Importing obstore would delay the start of a server without a registry.
        from cnn_jax.registry.registry import Registry

        source = RegistrySource(
            Registry(flags.registry),
            flags.model or (),
            flags.alias or CHAMPION,
            flags.versions or (),
        )
    source.check()
    request_log = None
    if flags.request_log:
        # Importing pyarrow would delay the start of a server without a request log.
        from cnn_jax.serve.request_log import RequestLog

        request_log = RequestLog(
            pathlib.Path(flags.request_log),
            flags.request_log_fraction or 1.0,
            round(1e6 * (flags.request_log_mb or 1000.0)),
            bool(flags.request_log_images),
        )
    limits = Limits(
        body_bytes=round(1e6 * flags.max_body_mb),
        all_bytes=round(1e6 * flags.max_bodies_mb),
        pixels=flags.max_pixels,
        all_pixels=flags.queue_pixels,
        images=flags.max_images,
        seconds=flags.timeout,
    )
    tokens = Tokens(pathlib.Path(flags.tokens)) if flags.tokens else None
    run(source, flags, limits, tokens, request_log)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="cnn_jax serve",
        description="Serve a bundle, or versions of a registry. Defaults are in parentheses.",
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    text = "a run, or its bundle RUN/bundle"
    source.add_argument("--bundle", type=cli.path, metavar="RUN", help=text)
    add_registry_flag(source)
    add("--alias", help=f"alias of the version that answers ({CHAMPION})")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=_port, default=8000, help="port to listen on; 0 chooses a free port (8000)")
    for name, kind, metavar, text in _OPTIONAL:
        add(f"--{name}", type=kind, metavar=metavar, help=text)
    text = "record the images as well"
    add("--request_log_images", action="store_true", default=None, help=text)
    for name, kind, default, text in _NUMBERS:
        add(f"--{name}", type=kind, default=default, help=f"{text} ({default:.12g})")
    levels = ("debug", "info", "warning", "error")
    text = "lowest level of log messages (info)"
    add("--log_level", default="info", choices=levels, help=text)
    flags = parser.parse_args(argv)
    if flags.bundle:
        flags.registry = None  # The value of the environment variable has no effect.
    if not flags.bundle and not flags.registry:
        raise ConfigError("--bundle or --registry must be given")
    if flags.bundle and len(flags.model or ()) > 1:
        raise ConfigError("--model: must be one name, because --bundle is one model")
    for name in flags.model or ():
        check_name("--model", name)
    if flags.alias is not None:
        check_name("alias", flags.alias)
    for needed, names in _NEEDED_BY.items():
        for name in names:
            if getattr(flags, name) is not None and not getattr(flags, needed):
                raise ConfigError(f"--{name} needs --{needed}")
    # One client may use half of each limit on all requests.
    for total, one in _LIMITS:
        if getattr(flags, total) < 2 * getattr(flags, one):
            raise ConfigError(f"--{total}: must be at least twice --{one}")
    return flags


if __name__ == "__main__":
    cli.run(main)
