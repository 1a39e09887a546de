"""Where generated and downloaded data is kept between runs."""

import os
import pathlib


def cache_dir() -> pathlib.Path:
    """`$CNN_JAX_CACHE`, else `cnn_jax` in the user's cache folder."""
    if path := os.environ.get("CNN_JAX_CACHE"):
        return pathlib.Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "cnn_jax"
