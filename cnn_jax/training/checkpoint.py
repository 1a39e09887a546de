"""Checkpoints, from which training can resume. Orbax writes and reads the files.

A checkpoint at step s contains the train state, the metrics of the unfinished epoch, and
the history: one record for each finished epoch. The position in the data, the best epoch, and the
number of epochs without improvement are computed from this content. A run keeps the latest
checkpoints, the checkpoint of the best epoch, and the checkpoint before the best.

Orbax does not detect a flipped bit in an array. Each checkpoint therefore contains checksums
of its arrays, which are verified before the arrays are used.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, Num, PyTree, UInt32
from orbax.checkpoint import checkpoint_managers

from cnn_jax.system.errors import ConfigError, TrainingError
from cnn_jax.training import sharding

History = list[dict[str, Any]]


class DamagedCheckpointError(TrainingError):
    """Raised if the content of a checkpoint differs from the content that was saved."""


def best_record(history: History, monitor: str) -> dict[str, Any] | None:
    """Returns the earliest record with the best value of `monitor`.

    Args:
      history: One record for each finished epoch.
      monitor: The key of the monitored metric.

    Returns:
      The record, or None if the history is empty.
    """
    return max(history, key=lambda record: monitored_score(record, monitor), default=None)


def monitored_score(record: dict[str, Any], monitor: str) -> float:
    """Returns the monitored metric, negated if it is a loss, so that a larger score is better.

    If the metric is NaN, the score is -inf.
    """
    value = record[monitor]
    if math.isnan(value):
        return -math.inf
    return -value if monitor.endswith("loss") else value


@jax.jit
def checksums(tree: PyTree) -> UInt32[Array, " arrays"]:
    """Returns a checksum of each array; the sharding of an array does not affect its checksum.

    A checksum is the sum, modulo 2**32, of a hash of each element's bits and position. Damage
    to one element always changes the checksum. Damage to several elements leaves it unchanged
    with a probability of about 2**-32.
    """
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(array: Num[Array, "..."]) -> UInt32[Array, ""]:
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, array.shape, axis
        )
    return jnp.sum(_mix(bits ^ _mix(position + jnp.uint32(1))), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Applies the finalizer of MurmurHash3, a bijection that mixes all bits of the input."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoints, the best checkpoint, and the last checkpoint before the best.

    If any of these is damaged, the run can resume from an earlier checkpoint.
    """

    def __init__(self, keep: int):
        """Creates a policy that keeps the latest `keep` checkpoints."""
        self.best: int | None = None  # The step of the best epoch's checkpoint.
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        return [
            i >= len(steps) - self._keep or self.best in steps[i : i + 2] for i in range(len(steps))
        ]


class _Manager(ocp.CheckpointManager):
    """Orbax's checkpoint manager, without the check for preemption.

    The training loop checks JAX's preemption service itself. The service counts the calls, so
    additional calls by Orbax would change the step at which the service reports a preemption.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Saved:
    """The content of a checkpoint.

    Attributes:
      step: The number of steps taken.
      state: The train state.
      epoch_metrics: The metrics of the unfinished epoch.
      history: One record for each finished epoch.
      seconds: The time spent in the unfinished epoch before the checkpoint, in seconds.
    """

    step: int
    state: PyTree
    epoch_metrics: PyTree
    history: History
    seconds: float


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, path: str | os.PathLike[str], monitor: str, keep: int = 2):
        """Opens the folder of the checkpoints, and creates the folder if it does not exist.

        Args:
          path: The folder of the checkpoints.
          monitor: The key of the monitored metric, which decides which epoch is the best.
          keep: The number of latest checkpoints to keep, in addition to the checkpoint of the
            best epoch and the checkpoint before the best.
        """
        self._path = pathlib.Path(path).resolve()
        self._monitor = monitor
        self._policy = _LatestAndBest(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy)
        self._manager = _Manager(self._path, options=options)

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in descending order."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self,
        step: int,
        state: PyTree,
        epoch_metrics: PyTree,
        history: History,
        fingerprint: str,
        seconds: float = 0.0,
    ) -> None:
        """Starts to save a checkpoint in the background.

        Args:
          step: The number of steps taken, larger than the step of every saved checkpoint.
          state: The train state. Its arrays may be donated after this call has returned.
          epoch_metrics: The metrics of the unfinished epoch.
          history: One record for each finished epoch.
          fingerprint: The fingerprint of the data set, for `check_data`.
          seconds: The time spent in the unfinished epoch until now, in seconds.

        Raises:
          TrainingError: This checkpoint or the previous checkpoint cannot be written.
        """
        best = best_record(history, self._monitor)
        self._policy.best = None if best is None else best["step"]
        content = {
            "history": list(history),  # Orbax writes this copy later, while `history` may grow.
            "fingerprint": fingerprint,
            "seconds": seconds,
            "checksums": jax.device_get(checksums((state, epoch_metrics))).tolist(),
        }
        with self._failure_to_save():
            is_saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    epoch_metrics=ocp.args.StandardSave(epoch_metrics),
                    progress=ocp.args.JsonSave(content | {"sha256": _sha256(content)}),
                ),
            )
        # Orbax silently skips a step that is not newer than the latest step.
        assert is_saved, f"Orbax skipped step {step}"

    def wait(self) -> None:
        """Waits until all checkpoints are saved.

        Raises:
          TrainingError: A checkpoint cannot be written.
        """
        with self._failure_to_save():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all checkpoints are saved, and frees the resources of Orbax.

        Raises:
          TrainingError: A checkpoint cannot be written.
        """
        with self._failure_to_save():
            self._manager.close()

    @contextlib.contextmanager
    def _failure_to_save(self) -> Iterator[None]:
        """Converts an error of Orbax inside the context to a one-line TrainingError.

        Orbax raises the error of a background save at the next call of one of Orbax's methods.
        """
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many types of errors.
            raise sharding.lost_process(error) or TrainingError(
                f"cannot save a checkpoint in {self._path}: {_reason(error)}. Earlier checkpoints "
                "are complete: remove the cause, then run the same command to continue"
            ) from error

    def check_data(self, fingerprint: str) -> None:
        """Checks that the latest readable checkpoint was saved with the same data set.

        Args:
          fingerprint: The fingerprint of the data set.

        Raises:
          TrainingError: The checkpoint contains a different fingerprint.
        """
        for step in self.steps():
            try:
                progress = self._read_progress(step)
            except DamagedCheckpointError:
                continue
            if progress["fingerprint"] != fingerprint:
                raise TrainingError(
                    f"the data has changed since the checkpoints in {self._path} were made; "
                    "restore the files, or use another --workdir"
                )
            return

    def restore(self, step: int, state: PyTree, epoch_metrics: PyTree) -> Saved:
        """Reads and verifies the checkpoint of a step.

        Args:
          step: The step of a checkpoint in `steps()`.
          state: Arrays or abstract arrays with the shapes and the shardings of the result.
            The shardings may differ from the saved ones.
          epoch_metrics: Arrays or abstract arrays with the shapes and the shardings of the
            restored metrics.

        Raises:
          DamagedCheckpointError: The content differs from the saved content.
        """
        progress = self._read_progress(step)
        state, epoch_metrics = jax.tree.map(ocp.utils.to_shape_dtype_struct, (state, epoch_metrics))
        restored = self._read(
            step,
            state=ocp.args.StandardRestore(state),
            epoch_metrics=ocp.args.StandardRestore(epoch_metrics),
        )
        state, epoch_metrics = restored["state"], restored["epoch_metrics"]
        if jax.device_get(checksums((state, epoch_metrics))).tolist() != progress["checksums"]:
            raise self._damaged(step, "its arrays do not match the saved checksums")
        return Saved(step, state, epoch_metrics, progress["history"], progress["seconds"])

    def restore_latest(
        self, state: PyTree, epoch_metrics: PyTree
    ) -> tuple[Saved | None, list[int]]:
        """Reads the latest checkpoint from which the run can resume.

        The checkpoint and the checkpoint of the best epoch in its history must both be intact.
        If the best epoch's checkpoint is damaged, an earlier checkpoint is used, and the best
        epoch is trained again. All later checkpoints are moved to the folder `damaged` beside
        the checkpoints, because checkpoints of the same steps will be saved again.

        Args:
          state: Arrays or abstract arrays with the shapes and the shardings of the train state.
          epoch_metrics: Arrays or abstract arrays with the shapes and the shardings of the
            metrics.

        Returns:
          The content of the checkpoint, or None if there are no checkpoints; and the steps of
          the checkpoints that were moved.

        Raises:
          DamagedCheckpointError: There are checkpoints, but none is intact. No checkpoint is
            moved.
        """
        reasons: list[str] = []
        steps = self.steps()
        for step in steps:
            try:
                saved = self.restore(step, state, epoch_metrics)
                best = best_record(saved.history, self._monitor)
                # If the best epoch's checkpoint is missing, it was deleted because a later epoch
                # was better. The run trains that later epoch again.
                if best is not None and best["step"] != step and best["step"] in steps:
                    self.restore(best["step"], state, epoch_metrics)
            except DamagedCheckpointError as error:
                reasons.append(str(error))
                continue
            later = steps[: steps.index(step)]
            self._move_aside(later)
            return saved, later
        if reasons:
            raise DamagedCheckpointError(
                f"no checkpoint in {self._path} is intact ({'; '.join(reasons)}); use another "
                "--workdir to start a new run"
            )
        return None, []

    def rewind(self, step: int, state: PyTree, epoch_metrics: PyTree) -> Saved:
        """Reads the checkpoint of a step, and deletes all later checkpoints.

        Args:
          step: The number of steps taken at the checkpoint.
          state: Arrays or abstract arrays with the shapes and the shardings of the train state.
          epoch_metrics: Arrays or abstract arrays with the shapes and the shardings of the
            metrics.

        Raises:
          ConfigError: There is no checkpoint of this step.
          DamagedCheckpointError: The checkpoint is damaged. No checkpoint is deleted.
        """
        steps = self.steps()
        if step not in steps:
            kept = ", ".join(map(str, sorted(steps))) or "none"
            raise ConfigError(
                f"config.checkpoint.restore_step: there is no checkpoint of step {step} in "
                f"{self._path}; the steps of its checkpoints are {kept}"
            )
        saved = self.restore(step, state, epoch_metrics)
        self.delete_after(step)
        return saved

    def delete_after(self, step: int) -> None:
        """Deletes all checkpoints of later steps."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def _move_aside(self, steps: Sequence[int]) -> None:
        """Moves the checkpoints of the given steps to the folder `damaged`."""
        if not steps:
            return
        if sharding.is_primary():
            target = self._path.parent / "damaged"
            target.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(target / str(step), ignore_errors=True)
                (self._path / str(step)).rename(target / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are moved")
        self._manager.reload()

    def _read_progress(self, step: int) -> dict[str, Any]:
        """Reads and verifies the parts of a checkpoint that are not arrays."""
        progress = self._read(step, progress=ocp.args.JsonRestore())["progress"]
        content = {key: value for key, value in progress.items() if key != "sha256"}
        if progress.get("sha256") != _sha256(content):
            raise self._damaged(step, "its progress does not match the saved sha256")
        return content

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise many types of errors.
            raise sharding.lost_process(error) or self._damaged(step, _reason(error)) from error

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self._path / str(step)} is damaged: {reason}")


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """Returns the first line of an error's message.

    For a full disk, the result is the message of the operating system.
    """
    text = str(error)
    if os.strerror(errno.ENOSPC) in text:
        return os.strerror(errno.ENOSPC)
    return text.splitlines()[0][:200] if text else type(error).__name__
