"""Checkpoints: what training needs to go on, saved by Orbax.

A checkpoint at step s holds the train state, the metrics summed so far in the
epoch under way, and the history: one record for each finished epoch. All else
(the place in the data, the best epoch, the patience used up) follows from these.
The latest checkpoints are kept, that of the best epoch, and the one before that.

Orbax would not notice a flipped bit in an array. So each checkpoint holds checksums
of its arrays, and one that is damaged is known before anything is made of it.
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
    """A checkpoint is not, or not wholly, what was saved."""


def best_record(history: History, monitor: str) -> dict[str, Any] | None:
    """The record with the best value of `monitor`, the earliest of equals; None if none."""
    return max(history, key=lambda record: goodness(record, monitor), default=None)


def goodness(record: dict[str, Any], monitor: str) -> float:
    """The monitored value, turned so that more is better; a NaN is worse than all."""
    value = record[monitor]
    if math.isnan(value):
        return -math.inf
    return -value if monitor.endswith("loss") else value


@jax.jit
def checksums(tree: PyTree) -> UInt32[Array, " arrays"]:
    """A checksum of the bits of each array, however it is divided among devices.

    The sum, modulo 2**32, of a hash of each element's bits and place. Damage to one
    element always changes it; damage to several goes unnoticed with a probability of
    about 2**-32.
    """
    return jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(tree)])


def _checksum(array: Num[Array, "..."]) -> UInt32[Array, ""]:
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    return jnp.sum(_mix(bits ^ _mix(place + jnp.uint32(1))), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3: one to one, and each bit of it depends on all."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


class _LatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoints, that of the best epoch, and the one before that.

    So, whichever of them is damaged, there is one to go back to.
    """

    def __init__(self, keep: int):
        self.best: int | None = None  # The step of that epoch's checkpoint.
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        return [
            i >= len(steps) - self._keep or self.best in steps[i : i + 2] for i in range(len(steps))
        ]


class _Manager(ocp.CheckpointManager):
    """Orbax's, without its own look out for preemption.

    It would ask JAX's preemption service as well, at other steps than the training
    loop does, and the service's answer counts the questions.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a checkpoint holds.

    Attributes:
      step: Steps taken.
      state: The train state.
      epoch_metrics: What was summed in the unfinished epoch.
      history: A record for each finished epoch.
      seconds: What the unfinished epoch had taken.
    """

    step: int
    state: PyTree
    epoch_metrics: PyTree
    history: History
    seconds: float


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, path: str | os.PathLike[str], monitor: str, keep: int = 2):
        """Opens the folder, and makes it if it is not there.

        Args:
          path: Folder of the checkpoints.
          monitor: Key of the epoch records that says which epoch is best.
          keep: How many of the latest are kept, beside that of the best epoch and the
            one before it.
        """
        self._path = pathlib.Path(path).resolve()
        self._monitor = monitor
        self._policy = _LatestAndBest(keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=self._policy)
        self._manager = _Manager(self._path, options=options)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, the latest first."""
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
        """Starts to save; training goes on meanwhile.

        Args:
          step: Steps taken, more than at any checkpoint that is there.
          state: Arrays; they may be donated as soon as this returns.
          epoch_metrics: Arrays; what is summed in the unfinished epoch.
          history: A record for each finished epoch.
          fingerprint: Of the data; `check_data` wants the same.
          seconds: What the unfinished epoch has taken so far.

        Raises:
          TrainingError: This one, or the one before, cannot be written.
        """
        best = best_record(history, self._monitor)
        self._policy.best = None if best is None else best["step"]
        content = {
            "history": list(history),  # It is written later, when the caller's may have grown.
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
        assert is_saved, f"Orbax left out step {step}"  # As it does with one not above the latest.

    def wait(self) -> None:
        """Returns once everything is saved.

        Raises:
          TrainingError: It cannot be written.
        """
        with self._failure_to_save():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved.

        Raises:
          TrainingError: It cannot be written.
        """
        with self._failure_to_save():
            self._manager.close()

    @contextlib.contextmanager
    def _failure_to_save(self) -> Iterator[None]:
        """Says in one line why a checkpoint cannot be written.

        What was saved in the background may only fail here.
        """
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise what they please.
            raise sharding.lost_process(error) or TrainingError(
                f"cannot save a checkpoint in {self._path}: {_reason(error)}. Those before it are "
                "complete: mend that, and the same command goes on from the latest"
            ) from error

    def check_data(self, fingerprint: str) -> None:
        """Raises TrainingError if the latest checkpoint is of other data.

        One that cannot be read says nothing of that.
        """
        for step in self.steps():
            try:
                progress = self._read_progress(step)
            except DamagedCheckpointError:
                continue
            if progress["fingerprint"] != fingerprint:
                raise TrainingError(
                    f"the data has changed since the checkpoints in {self._path} were made: bring "
                    "the files back, or use another --workdir"
                )
            return

    def restore(self, step: int, state: PyTree, epoch_metrics: PyTree) -> Saved:
        """Reads what `save` was given.

        Args:
          step: One of `steps`.
          state: Arrays, or their shapes, with the shardings to restore to, whatever
            those were on which they were saved.
          epoch_metrics: Likewise.

        Raises:
          DamagedCheckpointError: It is not what was saved.
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
            raise self._damaged(step, "its arrays do not have the checksums that were saved")
        return Saved(step, state, epoch_metrics, progress["history"], progress["seconds"])

    def restore_latest(
        self, state: PyTree, epoch_metrics: PyTree
    ) -> tuple[Saved | None, list[int]]:
        """Reads the latest checkpoint that is intact.

        That of its best epoch must be intact as well; if it is not, the run has to
        go back before that epoch and train it again. Checkpoints later than the one
        returned are moved aside, into `damaged` beside the folder, to make room for
        those that will be saved in their place.

        Args:
          state: As for `restore`.
          epoch_metrics: Likewise.

        Returns:
          What it holds, or None if there is no checkpoint at all; and the steps of
          those that were moved aside.

        Raises:
          DamagedCheckpointError: There are some, and none is intact. They stay.
        """
        reasons: list[str] = []
        steps = self.steps()
        for step in steps:
            try:
                saved = self.restore(step, state, epoch_metrics)
                best = best_record(saved.history, self._monitor)
                # One that is gone was given up for a better one, which will come again if
                # all is as it was.
                if best is not None and best["step"] != step and best["step"] in steps:
                    self.restore(best["step"], state, epoch_metrics)
            except DamagedCheckpointError as error:
                reasons.append(str(error))
                continue
            later = steps[: steps.index(step)]
            self._put_aside(later)
            return saved, later
        if reasons:
            raise DamagedCheckpointError(
                f"no checkpoint in {self._path} is intact ({'; '.join(reasons)}); use another "
                "--workdir to start anew"
            )
        return None, []

    def go_back(self, step: int, state: PyTree, epoch_metrics: PyTree) -> Saved:
        """Reads the checkpoint of this step, and forgets all after it.

        Args:
          step: Steps taken.
          state: As for `restore`.
          epoch_metrics: Likewise.

        Raises:
          ConfigError: There is none of this step.
          DamagedCheckpointError: It is damaged. None is forgotten.
        """
        steps = self.steps()
        if step not in steps:
            kept = ", ".join(map(str, sorted(steps))) or "none"
            raise ConfigError(
                f"config.checkpoint.restore_step: there is no checkpoint of step {step} in "
                f"{self._path}; kept are {kept}"
            )
        saved = self.restore(step, state, epoch_metrics)
        for later in steps[: steps.index(step)]:
            self._manager.delete(later)
        return saved

    def _put_aside(self, steps: Sequence[int]) -> None:
        if not steps:
            return
        if sharding.is_primary():
            aside = self._path.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for step in steps:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                (self._path / str(step)).rename(aside / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints put aside")
        self._manager.reload()

    def _read_progress(self, step: int) -> dict[str, Any]:
        progress = self._read(step, progress=ocp.args.JsonRestore())["progress"]
        content = {key: value for key, value in progress.items() if key != "sha256"}
        if progress.get("sha256") != _sha256(content):
            raise self._damaged(step, "its progress does not have the sha256 that was saved")
        return content

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax and TensorStore raise what they please.
            raise sharding.lost_process(error) or self._damaged(step, _reason(error)) from error

    def _damaged(self, step: int, reason: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self._path / str(step)} is damaged: {reason}")


def _sha256(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reason(error: BaseException) -> str:
    """The first line of an error; of one about a full disk, what everybody knows it by."""
    text = str(error)
    if os.strerror(errno.ENOSPC) in text:
        return os.strerror(errno.ENOSPC)
    return text.splitlines()[0][:200] if text else type(error).__name__
