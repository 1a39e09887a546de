"""The folder in which JAX keeps compiled programs between runs.

JAX itself writes and finds the programs, by a digest of the program, the options, the version
of JAX and the kind of processor. This module chooses the folder, limits the size of the folder,
and removes files that a killed process or a full disk has left incomplete.
"""

import contextlib
import os
import re
import time
import warnings
from typing import Any

import jax

from cnn_jax.data.cache import COMPILED, SECONDS_KEPT, cache_dir, own_entries

_MAX_BYTES = 256_000_000  # The programs of one run need about half a megabyte.
_WRITABLE_BY_OTHERS = 0o022
# Matches JAX's warning about a file of the cache; the group is the name of the program.
_FILE_WARNING = re.compile(
    r"Error (?:reading|writing) persistent compilation cache entry for '(.+?)':"
)
_UNWRITABLE = "Error writing persistent compilation cache entry .*MemoryError: std::bad_alloc"


def keep_compiled() -> None:
    """Enables the cache of compiled programs in this process.

    A command calls this function after `sharding.start_processes` and before it compiles
    anything. The function changes nothing if the user has configured JAX's cache (an empty
    JAX_COMPILATION_CACHE_DIR disables the cache) or if the folder cannot be used.
    """
    # XLA cannot write programs that use oneDNN (`runtime.py`). The warning needs no action.
    warnings.filterwarnings("ignore", message=_UNWRITABLE)
    # A run with several processes does not use the cache. When XLA compiles for GPUs, the processes
    # exchange measurements. If only some processes found a program in the cache, the processes
    # that compile the program would wait for measurements of the processes that do not compile.
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if configured is not None or jax.distributed.is_initialized():
        return
    folder = cache_dir() / COMPILED
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError:
        return
    # The programs in the folder will be executed, so no other user may write to the folder.
    if status.st_uid != os.getuid() or status.st_mode & _WRITABLE_BY_OTHERS:
        return
    _sweep()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # XLA's own caches of program parts are not needed, because JAX caches whole programs.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _repair_silently()


def _sweep() -> None:
    """Removes programs that were not used for a long time, and limits the size of the cache.

    The least recently used programs are removed first. JAX can limit the size of the folder
    itself, but then needs an additional package, and reads the whole folder for each new file.
    """
    found = []
    for path in own_entries().get(COMPILED, []):
        with contextlib.suppress(OSError):  # Another process may have removed the file.
            status = path.stat()
            # Most systems update a file's access time only once a day, and some systems never do,
            # so the modification time is used too.
            found.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = 0
    for used, size, path in sorted(found, reverse=True):
        total += size
        if total > _MAX_BYTES or time.time() - used > SECONDS_KEPT:
            with contextlib.suppress(OSError):
                path.unlink()


def _repair_silently() -> None:
    """Removes unusable files from the cache when JAX warns about them, and hides the warning.

    After such a warning, JAX compiles the program as if no file existed, but never replaces
    an incomplete file.
    """
    show = warnings.showwarning

    def show_others(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        warning = _FILE_WARNING.match(str(message))
        if warning is None:
            show(message, *args, **kwargs)
            return
        for path in own_entries().get(COMPILED, []):
            if path.name.startswith(f"{warning[1]}-"):
                with contextlib.suppress(OSError):
                    path.unlink()

    warnings.showwarning = show_others
