"""Ctrl-C and SIGTERM: a run ends at its next good moment, in all its processes at once."""

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

_NOTICE = b"\ninterrupted: stops as soon as it is safe; once more to leave at once\n"
_STDERR = 2  # The file descriptor.


class Interruption:
    """Whether somebody wants this run to end."""

    def __init__(self, deadline: float | None = None) -> None:
        self._event = threading.Event()
        self._deadline = deadline

    def request(self) -> None:
        self._event.set()

    def _is_wanted(self) -> bool:
        is_over = self._deadline is not None and time.monotonic() >= self._deadline
        return is_over or self._event.is_set()

    def is_due(self, count: int) -> bool:
        """Whether to save after this step and end.

        Several processes all get the same answer at the same step, from JAX's
        preemption service, if each of them asks at every step.

        Args:
          count: How often this was asked before. (JAX's service counts from 0, and
            would wait for a number that has passed if steps of an earlier start counted.)
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(count)
        return self._is_wanted()

    def stopping(self, track: Track, message: str) -> Track:
        """A `track` that ends the run, with this message, where nothing is to be saved.

        Not if there are several processes, of which one must not end alone.
        """

        def tracked(items: Iterable, description: str, total: int) -> Iterator:
            for item in track(items, description, total):
                if self._is_wanted() and jax.process_count() == 1:
                    raise Interrupted(message)
                yield item

        return tracked


@contextlib.contextmanager
def listen(deadline: float | None = None) -> Iterator[Interruption]:
    """Makes the first Ctrl-C or SIGTERM a request, and the second one final.

    From `deadline` on, of `time.monotonic`, there is a request without any signal.

    The first cannot simply raise an exception, which in the middle of a compilation
    would crash JAX. The second ends a command at once; in a notebook it raises
    KeyboardInterrupt.
    """
    interruption = Interruption(deadline)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # Only the main thread may handle signals.
        return

    # With several processes SIGTERM is JAX's, which tells all of them.
    is_distributed = jax.process_count() > 1
    signals = [signal.SIGINT] if is_distributed else [signal.SIGINT, signal.SIGTERM]
    previous = {signum: signal.getsignal(signum) for signum in signals}
    # JAX may have swallowed the exception of a command's first signal in a callback.
    was_swallowed = previous[signal.SIGINT] is signal.SIG_DFL
    is_command = was_swallowed or cli.interrupt in previous.values()
    if was_swallowed:
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

    with _leave_at_the_second(signals) if is_command else contextlib.nullcontext():
        for signum in signals:
            signal.signal(signum, handle)
        try:
            yield interruption
        finally:
            restore()


@contextlib.contextmanager
def _leave_at_the_second(signals: Collection[int]) -> Iterator[None]:
    """Ends the process at the second of these signals, whatever it is doing.

    Python runs a handler only when the main thread is back from JAX, which may
    compile for minutes. But it writes a byte for each signal at once, for a thread
    to read.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # As Python wants it.

    def watch() -> None:
        is_first = True
        while signum := os.read(reading, 1):
            if signum[0] not in signals:
                continue
            if not is_first:
                os._exit(128 + signum[0])
            is_first = False
            with contextlib.suppress(OSError):  # There may be no stderr any more.
                os.write(_STDERR, _NOTICE)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        watcher.join()
        os.close(reading)
