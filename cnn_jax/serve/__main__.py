"""Serves a bundle, or what a registry says, over HTTP.

    cnn_jax serve --bundle=RUN [--port=8000]
    cnn_jax serve --registry=DIR [--model=NAME] [--alias=champion]

http://127.0.0.1:8000/ is for people, POST /predict for programs; those who have a client of
TensorFlow Serving (/v1) or of the Open Inference Protocol (/v2) use it as it is.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from cnn_jax.registry.ledger import check_name, parse_which
from cnn_jax.system import cli
from cnn_jax.system.errors import ConfigError

_NEEDED = ("fastapi", "httptools", "prometheus_client", "python_multipart", "uvicorn")


def main(argv: Sequence[str]) -> None:
    flags = _parse(argv)
    for name in _NEEDED:
        try:
            __import__(name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"serving needs {name}, which is not installed: pip install 'cnn_jax[serve]'"
            ) from error
    # All of them need what may be missing.
    from cnn_jax.inference.bundle import find_bundle
    from cnn_jax.registry.registry import Registry
    from cnn_jax.serve.limits import Limits
    from cnn_jax.serve.loader import FromRegistry, OneBundle
    from cnn_jax.serve.logs import start_logging
    from cnn_jax.serve.request_log import RequestLog
    from cnn_jax.serve.server import Options, run
    from cnn_jax.serve.tokens import Tokens
    from cnn_jax.system import runtime
    from cnn_jax.system.compilation_cache import keep_compiled

    runtime.keep_freed_memory()
    keep_compiled()
    start_logging(flags.log_level)
    if flags.bundle:
        source = OneBundle(find_bundle(flags.bundle), (flags.model or ["default"])[0])
    else:
        source = FromRegistry(
            Registry(flags.registry), flags.model or (), flags.alias, flags.versions or ()
        )
    source.check()  # What cannot be had now is said before anything is started.
    request_log = flags.request_log and RequestLog(
        pathlib.Path(flags.request_log),
        flags.request_log_share,
        round(1e6 * flags.request_log_mb),
        flags.request_log_images,
    )
    limits = Limits(
        body_bytes=round(1e6 * flags.max_body_mb),
        all_bytes=round(1e6 * flags.max_bodies_mb),
        pixels=flags.max_pixels,
        images=flags.max_images,
        seconds=flags.timeout,
    )
    run(
        source,
        Options(
            host=flags.host,
            port=flags.port,
            limits=limits,
            queue=flags.queue,
            max_batch=flags.max_batch,
            max_wait=flags.max_wait_ms / 1000,
            poll=flags.poll,
            drain=flags.drain,
        ),
        Tokens(pathlib.Path(flags.tokens)) if flags.tokens else None,
        request_log or None,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.Parser(
        prog="cnn_jax serve", description="Serve a bundle, or versions of a registry."
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--bundle", type=cli.path, metavar="RUN", help="a run, or its bundle RUN/bundle"
    )
    what.add_argument(
        "--registry",
        default=os.environ.get("CNN_JAX_REGISTRY"),
        help="a registry's folder or URL (CNN_JAX_REGISTRY)",
    )
    add("--model", type=_names, metavar="NAME,...", help="models of the registry (all)")
    add("--alias", default="champion", help="the version that answers (champion)")
    add("--versions", type=_versions, metavar="V,...", help="further numbers or aliases to serve")
    add("--poll", type=_positive, default=2.0, help="seconds between looks at the registry (2)")
    add("--host", default="127.0.0.1", help="the address to listen on (127.0.0.1)")
    add("--port", type=_port, default=8000, help="0 for any free one (8000)")
    add("--tokens", type=cli.path, metavar="FILE", help="who may ask; lines of ROLE TOKEN")
    add("--max_batch", type=cli.positive, default=32, help="images computed at once (32)")
    add("--max_wait_ms", type=_not_negative, default=0.0, help="held back for others to join (0)")
    add("--queue", type=cli.positive, default=256, help="images in the house at once (256)")
    add("--timeout", type=_positive, default=30.0, help="seconds for a request (30)")
    add("--max_body_mb", type=_positive, default=20.0, help="of a request (20)")
    add("--max_bodies_mb", type=_positive, default=50.0, help="of all requests at once (50)")
    add("--max_pixels", type=cli.positive, default=25_000_000, help="of an image (25000000)")
    add("--max_images", type=cli.positive, default=64, help="of a request (64)")
    add("--drain", type=_not_negative, default=0.0, help="seconds unready before the end (0)")
    add("--request_log", type=cli.path, metavar="FILE", help="an SQLite file for answers")
    add("--request_log_share", type=_share, default=1.0, help="of the images, sampled (1)")
    add("--request_log_mb", type=_positive, default=1000.0, help="of the file (1000)")
    add("--request_log_images", action="store_true", help="keep the images as well")
    add("--log_level", default="info", choices=("debug", "info", "warning", "error"))
    flags = parser.parse_args(argv)
    if not flags.bundle and not flags.registry:
        raise ConfigError("--bundle or --registry must be given")
    if flags.bundle and len(flags.model or ()) > 1:
        raise ConfigError("--model: a bundle is one model")
    for name in flags.model or ():
        check_name("model", name)
    check_name("alias", flags.alias)
    if flags.queue < flags.max_images:
        raise ConfigError("--queue: must be --max_images or more")
    if flags.max_bodies_mb < flags.max_body_mb:
        raise ConfigError("--max_bodies_mb: must be --max_body_mb or more")
    return flags


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError("must be names with commas between them")
    return names


def _versions(text: str) -> list[int | str]:
    return [parse_which(one) for one in _names(text)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from error


def _positive(text: str) -> float:
    if not 0 < (number := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text!r}")
    return number


def _not_negative(text: str) -> float:
    if not 0 <= (number := _number(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text!r}")
    return number


def _share(text: str) -> float:
    if not 0 < (number := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return number


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text!r}")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
