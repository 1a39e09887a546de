"""A profiler trace of a few training steps, which Perfetto or XProf can show."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

# The number of steps before the trace, and the number of steps in the trace. During the steps
# before the trace, programs are compiled and queues are filled.
_WARM_UP_STEPS, _TRACED_STEPS = 10, 5


class Trace:
    """Records a trace of a few training steps and writes it to a folder."""

    def __init__(self, folder: pathlib.Path | None):
        """Creates a trace, without starting it.

        Args:
          folder: The folder of the trace; None records nothing.
        """
        self._folder = folder
        self._warmed_up = self._traced = 0
        self._is_recording = False

    @contextlib.contextmanager
    def steps(self, first: int, count: int) -> Iterator[None]:
        """Records the training steps dispatched in the `with` block, until the trace is complete.

        Args:
          first: The step number of the execution's first step.
          count: The number of steps in the execution.
        """
        if self._folder is None or self._traced >= _TRACED_STEPS:
            yield
            return
        if self._warmed_up >= _WARM_UP_STEPS and not self._is_recording:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=first):
            yield
        if not self._is_recording:
            self._warmed_up += count
            return
        self._traced += count
        if self._traced >= _TRACED_STEPS:
            self.close()

    def close(self) -> None:
        """Stops the recording and writes the trace."""
        if self._is_recording:
            self._is_recording = False
            jax.profiler.stop_trace()

    def describe(self) -> str | None:
        """Returns a message about the trace for the user; None if no trace was requested."""
        if self._folder is None:
            return None
        if not self._traced:
            return "no trace: there were too few steps"
        return f"a trace of {self._traced} steps is in {self._folder}"
