"""Options of XLA and of the C library that make training and inference on a CPU faster.

Importing this module does not import JAX.
"""

import ctypes
import functools
import sys

# Parameters of glibc's function `mallopt`, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_ONEDNN = "xla_cpu_experimental_onednn_custom_call"
_CPU_OPTIONS = {
    # JAX 0.10 to 0.12 pass convolutions to YNNPACK. For weight gradients, YNNPACK takes three to
    # five times as long as Eigen. In JAX 0.10, YNNPACK runs most convolutions on one core. With
    # this option, Eigen computes the convolutions, and YNNPACK still computes single matrix
    # products.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # From JAX 0.11 on, XLA includes oneDNN, which computes a convolution with its bias in 50 to
    # 90 % of Eigen's time. In JAX 0.10, this option does nothing. A program with oneDNN cannot be
    # cached for the next process (`compilation_cache.py`), but compiles quickly.
    _ONEDNN: True,
}


@functools.cache
def compiler_options(
    platform: str | None = None, is_storable: bool = False
) -> dict[str, str | bool]:
    """Returns the compiler options for `jax.jit`; they change no result.

    Options that this version of JAX does not know are left out.

    Args:
      platform: The platform of the devices, such as "tpu"; None for JAX's default backend.
      is_storable: Whether the cache must be able to store the program. The program is then slower.
    """
    import jax

    if (platform or jax.default_backend()) != "cpu":
        return {}
    return {
        name: value
        for name, value in _CPU_OPTIONS.items()
        if not (is_storable and name == _ONEDNN) and _is_known(name, value)
    }


@functools.cache
def quick_compiler_options(platform: str | None = None) -> dict[str, str | bool]:
    """Returns the compiler options for a program that runs only once.

    Without optimisation, XLA compiles it in a sixth of the time. Rounding errors differ.

    Args:
      platform: See `compiler_options`.
    """
    import jax

    if (platform or jax.default_backend()) != "cpu":
        return {}
    options = {"xla_backend_optimization_level": "0"}
    return {name: value for name, value in options.items() if _is_known(name, value)}


def _is_known(name: str, value: str | bool) -> bool:
    """Returns whether the installed XLA accepts a compiler option.

    A later XLA may no longer have an experimental option.
    """
    import jax

    try:
        jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compute_in_calling_thread() -> None:
    """Makes JAX run a program on a CPU in the thread that calls it, and not in another thread.

    A prediction of one small image then takes up to a third less time. The function must be called
    before JAX uses a device. Training does not use it, because the training loop prepares the next
    batch during a step.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory() -> None:
    """Makes the C library reuse the memory that a step on the CPU frees.

    By default, glibc returns each large array to the system, which then clears new pages for
    the next step. This exchange of memory takes 10 to 50 % of a step's time. With another C
    library, the function does nothing. The function must be called before JAX starts its
    threads, because each thread gets an arena, and glibc maps every large array of such an
    arena separately.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:  # macOS and musl, for example, have no `mallopt`.
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
