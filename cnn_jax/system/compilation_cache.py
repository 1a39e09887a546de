"""Programs that XLA has compiled are kept between runs.

JAX itself keeps and finds them, by a digest of the program, the options, its own version
and the kind of processor; here it is told where. What it does not do by itself: keep to a
size, and be rid of a file that a killed process or a full disk has left incomplete.
"""

import contextlib
import os
import re
import time
import warnings
from typing import Any

import jax

from cnn_jax.data.cache import COMPILED, SECONDS_KEPT, cache_dir, own_entries

_MOST_BYTES = 256_000_000  # The programs of a run are half a megabyte.
_WRITABLE_BY_OTHERS = 0o022
# How JAX warns of a file, with the name of the program.
_TROUBLE = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '(.+?)':")
_UNWRITABLE = "Error writing persistent compilation cache entry .*MemoryError: std::bad_alloc"


def keep_compiled() -> None:
    """Keeps what this process compiles from now on, and takes what others have kept.

    To be called by a command, after `sharding.start_processes` and before anything is
    compiled. Nothing is done where the user has told JAX what to do (an empty
    JAX_COMPILATION_CACHE_DIR says that nothing is to be kept) or the folder cannot be
    used: no command fails for want of it.
    """
    # It is no business of the user's, wherever the folder is, that XLA cannot write a program with
    # oneDNN's convolutions (`runtime.py`), which leaves no file.
    warnings.filterwarnings("ignore", message=_UNWRITABLE)
    # Of several processes some would find a program and others not, and XLA, which shares
    # among processes what it measures on GPUs, would let those wait for the first.
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if told is not None or jax.distributed.is_initialized():
        return
    folder = cache_dir() / COMPILED
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return
    # What lies there will be run. A cache that is shared is one user's in this part.
    if status.st_uid != os.getuid() or status.st_mode & _WRITABLE_BY_OTHERS:
        return
    _sweep()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # These would keep parts of programs, of no use where the whole is kept.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _mend_in_silence()


def _sweep() -> None:
    """Removes what was not used for long, and of what is too much the oldest.

    JAX can keep to a size itself, if one more package is installed, by reading the whole
    folder whenever it writes a file.
    """
    found = []
    for path in own_entries().get(COMPILED, []):
        with contextlib.suppress(OSError):  # Another process has removed it.
            status = path.stat()
            # When it was read is noted once a day on most systems, and on some never.
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = 0
    for used, size, path in sorted(found, reverse=True):
        total += size
        if total > _MOST_BYTES or time.time() - used > SECONDS_KEPT:
            with contextlib.suppress(OSError):
                path.unlink()


def _mend_in_silence() -> None:
    """Where JAX would warn of a file that it cannot read or write, that program's are removed.

    JAX compiles the program then, as if there had been no file, but would leave an
    incomplete one as it is for ever. It is no business of the user's.
    """
    show = warnings.showwarning

    def show_others(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        trouble = _TROUBLE.match(str(message))
        if trouble is None:
            show(message, *args, **kwargs)
            return
        for path in own_entries().get(COMPILED, []):
            if path.name.startswith(f"{trouble[1]}-"):
                with contextlib.suppress(OSError):
                    path.unlink()

    warnings.showwarning = show_others
