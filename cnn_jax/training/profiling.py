"""A trace of a few steady training steps, for Perfetto or XProf."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

# The first steps compile and fill the queues; those after them are steady.
_WARM_UP, _TRACED = 10, 5


class Trace:
    """Records steps of a run into a folder."""

    def __init__(self, folder: pathlib.Path | None):
        """A trace in this folder, or none at all."""
        self._folder = folder
        self._warmed_up = self._traced = 0
        self._is_recording = False

    @contextlib.contextmanager
    def steps(self, first: int, count: int) -> Iterator[None]:
        """Surrounds training steps that are executed together, from this number on."""
        if self._folder is None or self._traced >= _TRACED:
            yield
            return
        if self._warmed_up >= _WARM_UP and not self._is_recording:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=first):
            yield
        if not self._is_recording:
            self._warmed_up += count
            return
        self._traced += count
        if self._traced >= _TRACED:
            self.close()

    def close(self) -> None:
        """Writes what was recorded."""
        if self._is_recording:
            self._is_recording = False
            jax.profiler.stop_trace()

    def describe(self) -> str | None:
        """What a person is told of it, once all steps are done; None if nothing was wanted."""
        if self._folder is None:
            return None
        if not self._traced:
            return "no trace: there were too few steps"
        return f"a trace of {self._traced} steps is in {self._folder}"
