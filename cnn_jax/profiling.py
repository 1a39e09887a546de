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
        self._seen = 0
        self._is_recording = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Surrounds one training step, which has this number."""
        if self._folder is None or self._seen >= _WARM_UP + _TRACED:
            yield
            return
        if self._seen == _WARM_UP:
            jax.profiler.start_trace(str(self._folder), create_perfetto_trace=True)
            self._is_recording = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self._seen += 1
        if self._seen == _WARM_UP + _TRACED:
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
        if self._seen <= _WARM_UP:
            return f"no trace: there were fewer than {_WARM_UP + 1} steps"
        return f"a trace of {min(self._seen - _WARM_UP, _TRACED)} steps is in {self._folder}"
