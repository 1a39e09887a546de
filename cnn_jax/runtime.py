"""What XLA and the C library are told so that a CPU trains faster. No number changes."""

import ctypes
import functools
import sys

import jax

# `mallopt` of glibc, malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_CPU_OPTIONS = {
    # JAX 0.10 to 0.12 give convolutions to YNNPACK, which knows of no weight gradients (three
    # to five times the time) and, in 0.10, keeps most convolutions to one core. Without it they
    # are Eigen's. Single matrix products stay with YNNPACK, as by default.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # From 0.12 on XLA comes with oneDNN, which takes convolutions with their bias, at half to
    # nine tenths of Eigen's time. Before, this does nothing. Such a program cannot be kept for
    # the next process (`compiled.py`), but is soon compiled.
    "xla_cpu_experimental_onednn_custom_call": True,
}


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """Options of `jax.jit` for the default backend; none where this JAX does not know them."""
    if jax.default_backend() != "cpu":
        return {}
    program = jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS)
    try:
        program.lower().compile()
    except jax.errors.JaxRuntimeError:  # Experimental, so they may go with any version.
        return {}
    return dict(_CPU_OPTIONS)


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
