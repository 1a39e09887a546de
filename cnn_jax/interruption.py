"""Ctrl-C and SIGTERM: a run ends at its next good moment, in all its processes at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from cnn_jax import cli

_NOTICE = b"\ninterrupted: stops as soon as it is safe; once more to leave at once\n"
_STDERR = 2  # The file descriptor.


class Interruption:
    """Whether somebody wants this run to end."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step and end.

        Several processes all get the same answer at the same step, from JAX's
        preemption service, if each of them asks at every step.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._event.is_set()

    def is_due_now(self) -> bool:
        """Whether to end where processes do not wait for each other, and one must not end alone."""
        return self._event.is_set() and jax.process_count() == 1

    def request(self) -> None:
        self._event.set()


@contextlib.contextmanager
def listen() -> Iterator[Interruption]:
    """Makes the first Ctrl-C or SIGTERM a request, and lets the second one work as ever.

    A command ends at the second one at once, whatever it is doing. (An exception
    in the middle of a compilation would crash JAX; so even the first cannot
    simply raise one.)
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # Only the main thread may handle signals.
        return

    # With several processes SIGTERM is JAX's, which tells all of them.
    is_distributed = jax.process_count() > 1
    names = [signal.SIGINT] if is_distributed else [signal.SIGINT, signal.SIGTERM]
    previous = {name: signal.getsignal(name) for name in names}

    def handle(signum: int, frame: object) -> None:
        interruption.request()
        for name, handler in previous.items():
            signal.signal(name, signal.SIG_DFL if handler is cli.interrupt else handler)
        if is_distributed:
            signal.raise_signal(signal.SIGTERM)
        with contextlib.suppress(OSError):  # There may be no stderr any more.
            os.write(_STDERR, _NOTICE)

    for name in names:
        signal.signal(name, handle)
    try:
        yield interruption
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
