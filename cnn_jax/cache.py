"""What is kept between runs, and how to be rid of it.

    cnn_jax cache [--clear]

prints the folder and the size of each kind of thing in it; --clear removes all of it.
Everything there can be made again.
"""

import pathlib
from collections.abc import Sequence

from cnn_jax.data.cache import cache_dir, clear, own_entries
from cnn_jax.system import cli


def _size(path: pathlib.Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(one.lstat().st_size for one in [path, *path.rglob("*")] if one.is_file())


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(
        prog="cnn_jax cache", description="Show or clear what is kept between runs."
    )
    parser.add_argument("--clear", action="store_true", help="remove all of it")
    flags = parser.parse_args(argv)

    folder = cache_dir()
    for kind, paths in own_entries().items():
        print(f"{sum(map(_size, paths)) / 1e6:>12,.1f} MB  {folder / kind}")
    if flags.clear:
        clear()
        print(f"removed all of it from {folder}")


if __name__ == "__main__":
    cli.run(main)
