"""Shows or clears the cache.

    cnn_jax cache [--clear]

prints the folder and the size of each kind of cached data. --clear removes all cached data, which
later commands create again when they need it.
"""

import pathlib
from collections.abc import Sequence

from cnn_jax.data.cache import cache_dir, clear, own_entries
from cnn_jax.system import cli


def _size(path: pathlib.Path) -> int:
    """Returns the size in bytes of a file, or of all files in a folder and its sub-folders."""
    return sum(file.lstat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def main(argv: Sequence[str]) -> None:
    parser = cli.Parser(prog="cnn_jax cache", description="Show or clear the cache.")
    parser.add_argument("--clear", action="store_true", help="remove all cached data")
    flags = parser.parse_args(argv)

    folder = cache_dir()
    for kind, paths in own_entries().items():
        print(f"{sum(map(_size, paths)) / 1e6:>12,.1f} MB  {folder / kind}")
    if flags.clear:
        clear()
        print(f"removed all cached data from {folder}")


if __name__ == "__main__":
    cli.run(main)
