"""Handling of Ctrl-C and SIGTERM: all processes of a run end together after the current step."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Collection, Iterable, Iterator

import jax
from jax.experimental import multihost_utils

from cnn_jax.data import Track
from cnn_jax.system import cli
from cnn_jax.system.errors import Interrupted

_NOTICE = b"\ninterrupted: stops as soon as it is safe; interrupt again to stop at once\n"
_STDERR = 2  # The file descriptor of stderr.


class Interruption:
    """A request to end a run, from a signal or from a deadline."""

    def __init__(self, deadline: float | None = None) -> None:
        """Creates a request that is made by a signal or at a deadline; see `listen`."""
        self._event = threading.Event()
        self._deadline = deadline

    def request(self) -> None:
        """Requests the end of the run."""
        self._event.set()

    def _is_requested(self) -> bool:
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return is_late or self._event.is_set()

    def is_due(self, count: int) -> bool:
        """Returns whether the run must save its state after this step, and then end.

        With several processes, JAX's preemption service gives all processes the same answer at
        the same step, if each process calls this function at every step.

        Args:
          count: The number of earlier calls in this process, from 0. (JAX's service would
            wait forever if steps of an earlier start were counted.)
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(count)
        return self._is_requested()

    def stopping(self, track: Track, message: str) -> Track:
        """Wraps `track`, so that the iteration raises Interrupted if an interruption is requested.

        The function is used for parts of a run that have no state to save. With several
        processes, the function never raises Interrupted, because one process must not end
        before the other processes.

        Args:
          track: The function to wrap.
          message: The message of the exception.
        """

        def tracked(items: Iterable, description: str, total: int) -> Iterator:
            for item in track(items, description, total):
                if self._is_requested() and jax.process_count() == 1:
                    raise Interrupted(message)
                yield item

        return tracked


@contextlib.contextmanager
def listen(deadline: float | None = None) -> Iterator[Interruption]:
    """Converts the first Ctrl-C or SIGTERM inside the context to a request to end the run.

    An exception could crash JAX in the middle of a compilation. The second signal ends a
    command at once; in a notebook, the second signal raises KeyboardInterrupt.

    Args:
      deadline: The value of `time.monotonic()` from which the end is requested without a
        signal; None for no deadline.
    """
    interruption = Interruption(deadline)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # Only the main thread may install signal handlers.
        return

    # With several processes, JAX handles SIGTERM and informs all processes.
    is_distributed = jax.process_count() > 1
    signals = [signal.SIGINT] if is_distributed else [signal.SIGINT, signal.SIGTERM]
    previous = {signum: signal.getsignal(signum) for signum in signals}
    # `cli.interrupt` sets SIG_DFL and raises KeyboardInterrupt at a command's first signal. If
    # SIG_DFL is set here, a callback of JAX has suppressed the exception.
    was_suppressed = previous[signal.SIGINT] is signal.SIG_DFL
    is_command = was_suppressed or cli.interrupt in previous.values()
    if was_suppressed:
        interruption.request()

    def restore() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    def handle(signum: int, frame: object) -> None:
        interruption.request()
        if is_distributed:
            signal.raise_signal(signal.SIGTERM)
        if not is_command:
            restore()

    with _exit_on_second_signal(signals) if is_command else contextlib.nullcontext():
        for signum in signals:
            signal.signal(signum, handle)
        try:
            yield interruption
        finally:
            restore()


@contextlib.contextmanager
def _exit_on_second_signal(signals: Collection[int]) -> Iterator[None]:
    """Ends the process when a second signal from `signals` arrives inside the context.

    Python runs a signal handler only after the main thread has returned from JAX, which
    may compile for minutes. But Python writes a byte to a pipe for each signal at once,
    and a thread reads the pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # `signal.set_wakeup_fd` accepts only a non-blocking pipe.

    def watch() -> None:
        is_first = True
        while signum := os.read(reading, 1):
            if signum[0] not in signals:
                continue
            if not is_first:
                os._exit(128 + signum[0])
            is_first = False
            with contextlib.suppress(OSError):  # stderr may be closed.
                os.write(_STDERR, _NOTICE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    previous = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writing)
        watcher.join()
        os.close(reading)
