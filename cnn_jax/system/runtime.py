"""Options of XLA and of the C library with which a CPU trains faster; no result changes."""

import ctypes
import functools
import sys

import jax

# `mallopt` of glibc, malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_CPU_OPTIONS = {
    # JAX 0.10 to 0.12 give convolutions to YNNPACK, which has no fast weight gradients (three to
    # five times the time) and, in 0.10, runs most convolutions on one core. With this option
    # Eigen computes them. Single matrix products stay with YNNPACK, as by default.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # From JAX 0.11 on, XLA includes oneDNN, which computes a convolution with its bias in half to
    # nine tenths of Eigen's time. In 0.10 this option does nothing. Such a program cannot be kept
    # for the next process (`compilation_cache.py`), but compiles quickly.
    "xla_cpu_experimental_onednn_custom_call": True,
}


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """The options of `jax.jit` for the default backend, without those that this JAX lacks."""
    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in _CPU_OPTIONS.items() if _is_known(name, value)}


def _is_known(name: str, value: str | bool) -> bool:
    """Whether XLA accepts a compiler option: these are experimental and may be removed."""
    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def keep_freed_memory() -> None:
    """Lets this process keep the memory that a step on the CPU frees, for the next one.

    By default glibc gives each large array back to the system, which must then clear new
    pages for the next step: a tenth to a half of a step's time. Nothing is done where the C
    library is another one. To be called before JAX starts its threads, which would get
    arenas of their own, from which every large array is mapped by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # Such as macOS and musl.
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
