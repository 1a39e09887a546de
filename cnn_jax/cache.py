"""What is kept between runs, and how to be rid of it.

    python -m cnn_jax.cache [--clear]

prints the folder and the size of each kind of thing in it; --clear removes all of it.
Everything there can be made again.
"""

import argparse
import pathlib
import shutil
from collections.abc import Sequence

from cnn_jax import cli
from cnn_jax.data.cache import OWN_ENTRY, cache_dir


def sizes(folder: pathlib.Path) -> dict[str, int]:
    """Bytes below each entry of the cache folder that this package has made."""
    if not folder.is_dir():
        return {}
    return {
        entry.name: sum(
            path.lstat().st_size for path in [entry, *entry.rglob("*")] if path.is_file()
        )
        for entry in sorted(folder.iterdir())
        if OWN_ENTRY.match(entry.name)
    }


def clear(folder: pathlib.Path) -> None:
    """Removes what this package has made in the cache folder, and nothing else.

    Raises:
      OSError: Something cannot be removed.
    """
    for name in sizes(folder):
        entry = folder / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m cnn_jax.cache", description="Show or clear what is kept between runs."
    )
    parser.add_argument("--clear", action="store_true", help="remove all of it")
    flags = parser.parse_args(argv)

    folder = cache_dir()
    for name, size in sizes(folder).items():
        print(f"{size / 1e6:>12,.1f} MB  {folder / name}")
    if flags.clear:
        clear(folder)
        print(f"removed all of it from {folder}")


if __name__ == "__main__":
    cli.run(main)
