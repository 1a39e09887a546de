"""An estimate of the memory that a training step needs, and the errors if it is not enough."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from cnn_jax.system.errors import TrainingError
from cnn_jax.training import sharding
from cnn_jax.training.programs import Programs
from cnn_jax.training.step import TrainState

# The number of images on a device is rounded down to a multiple of this number in a suggestion.
_ROUND_BATCH = 8


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """The memory that a training step needs on one device, in bytes, as reported by XLA.

    Attributes:
      fixed: The memory of the state, and of the pixels if they are on the device.
      temporary: The memory for the examples of the batch part that is being computed.
      batch_size: The number of examples in a global batch.
      data_devices: The number of devices that share a batch.
      parts: The number of parts of a batch that are computed one after the other.
      group: The number of examples that a device computes together. An incomplete group needs
        about as much memory as a complete one.
    """

    fixed: float
    temporary: float
    batch_size: int
    data_devices: int
    parts: int
    group: int = 1

    @property
    def total(self) -> float:
        """The total memory that a training step needs on one device, in bytes."""
        return self.fixed + self.temporary

    @property
    def _unit(self) -> int:
        """The number of examples in whose multiples memory is counted."""
        # A batch of less than a group uses another layout, whose memory grows with the batch.
        examples = self.batch_size / (self.data_devices * self.parts)
        return self.group if examples > self.group else 1

    @property
    def _per_unit(self) -> float:
        """The memory for `_unit` examples, in bytes."""
        examples = self.batch_size / (self.data_devices * self.parts)
        return self.temporary / math.ceil(examples / self._unit)

    def largest_batch(self, available: float) -> int:
        """Returns the largest global batch size that fits into `available` bytes, or 0."""
        examples = max(0, int((available - self.fixed) / self._per_unit)) * self._unit
        if examples >= 2 * _ROUND_BATCH:
            examples -= examples % _ROUND_BATCH
        return examples * self.data_devices * self.parts

    def fewest_parts(self, available: float) -> int | None:
        """Returns the smallest train.accumulation_steps with which a step fits into memory.

        The number of parts must divide the number of examples on a device. The result is None
        if the step needs more than `available` bytes with every number of parts.
        """
        examples = self.batch_size // self.data_devices
        for parts in range(1, examples + 1):
            needed = self.fixed + self._per_unit * math.ceil(examples / parts / self._unit)
            if examples % parts == 0 and needed <= available:
                return parts
        return None

    def error(self, available: float, has: str = "has") -> TrainingError:
        """Returns an out-of-memory error that suggests settings with which a step would fit.

        Args:
          available: The memory of the device, in bytes.
          has: The verb in the message before the number of available bytes.
        """
        if largest := self.largest_batch(available):
            advice = f"the largest train.batch_size that fits is about {largest}"
            if parts := self.fewest_parts(available):
                advice += f", and train.accumulation_steps={parts} computes it in {parts} parts"
        elif self._unit > 1:
            advice = (
                f"not even {self._unit} images on each device fit; use a smaller "
                "train.batch_size, data.image_size or model"
            )
        else:
            advice = "a batch of one image does not fit; use a smaller data.image_size or model"
        return TrainingError(
            f"out of memory: a training step with train.batch_size={self.batch_size} needs about "
            f"{_size(self.total)} of each device, which {has} {_size(available)}; {advice}"
        )


class Memory:
    """Checks that the devices have enough memory for training."""

    def __init__(self, programs: Programs):
        """Creates the memory check of a run.

        Args:
          programs: The jitted functions of the run.
        """
        self._programs = programs
        self._estimate: MemoryEstimate | None = None

    def check(
        self,
        program: Any,
        state: TrainState,
        batch: Mapping[str, jax.Array],
        pixels: Any,
        extra: Any = None,
    ) -> None:
        """Compiles a training function and checks that each device has enough memory for it.

        Args:
          program: `Programs.train_step` or `Programs.train_steps`.
          state: The train state, or abstract arrays with its shapes and shardings.
          batch: The arrays of the batch or batches of one execution.
          pixels: The images of the whole data set on the devices, or None.
          extra: The last argument of the training function.

        Raises:
          TrainingError: The program needs more memory than a device has.
        """
        programs = self._programs
        analysis = program.lower(state, batch, pixels, extra).compile().memory_analysis()
        if analysis is None:  # On some devices, XLA does not report how much memory is needed.
            return
        layout, parts = programs.layout, programs.accumulation_steps
        batch_bytes = sum(array.nbytes for array in batch.values()) / layout.data_devices
        self._estimate = MemoryEstimate(
            fixed=max(analysis.argument_size_in_bytes - batch_bytes, 0.0),
            temporary=analysis.temp_size_in_bytes + batch_bytes,
            batch_size=layout.batch_size,
            data_devices=layout.data_devices,
            parts=parts,
            group=layout.batch_multiple // layout.data_devices or 1,
        )
        available = sharding.device_bytes()
        if available and self._estimate.total > available:
            raise self._estimate.error(available)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Converts a JAX runtime error within the context to a one-line TrainingError.

        Raises:
          TrainingError: A device has no memory left (other programs may use it), or
            another process of the run has ended.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if lost := sharding.lost_process(error):
                raise lost from error
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            if self._estimate is None:
                # XLA does not compile a program that needs more memory than a TPU has.
                sizes = re.search(
                    r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)", str(error)
                )
                if sizes is None:
                    raise
                needed, available = sizes.groups()
                raise TrainingError(
                    "out of memory: a training step with "
                    f"train.batch_size={self._programs.layout.batch_size} needs {needed} of the "
                    f"{available} of each device; use a smaller train.batch_size, or a larger "
                    "train.accumulation_steps"
                ) from error
            free = sharding.free_device_bytes() + self._estimate.fixed
            raise self._estimate.error(free, "now has") from error


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
