"""Checkpoints: what training needs to go on, saved by Orbax.

A checkpoint at step s holds the train state, the metrics summed so far in the
epoch under way, and the history: one record for each finished epoch. All else
(the place in the data, the best epoch, the patience used up) follows from these.
The latest checkpoint and that of the best epoch are kept.
"""

import math
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint import checkpoint_managers

from cnn_jax.errors import TrainingError

History = list[dict[str, Any]]


def best_record(history: History, monitor: str) -> dict[str, Any] | None:
    """The record with the best value of `monitor`, the earliest of equals; None if none."""
    return max(history, key=lambda record: goodness(record, monitor), default=None)


def goodness(record: dict[str, Any], monitor: str) -> float:
    """The monitored value, turned so that more is better; a NaN is worse than all."""
    value = record[monitor]
    if math.isnan(value):
        return -math.inf
    return -value if monitor.endswith("loss") else value


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, path: str | os.PathLike[str], monitor: str):
        """Opens the folder, and makes it if it is not there.

        Args:
          path: Folder of the checkpoints.
          monitor: Key of the epoch records that says which epoch is best.
        """

        # Orbax only compares what this gives. Any, because it declares a float.
        def rank(metrics: dict[str, float]) -> Any:
            return metrics["goodness"], -metrics["step"]  # The earliest of equals.

        self._monitor = monitor
        self._manager = ocp.CheckpointManager(
            pathlib.Path(path).resolve(),
            options=ocp.CheckpointManagerOptions(
                best_fn=rank,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(1),
                        # One saved within an epoch has no metrics, and is never best.
                        checkpoint_managers.BestN(
                            get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False
                        ),
                    ]
                ),
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self, step: int, state: PyTree, epoch_metrics: PyTree, history: History, fingerprint: str
    ) -> None:
        """Starts to save; training goes on meanwhile.

        Args:
          step: Steps taken.
          state: Arrays; they may be donated as soon as this returns.
          epoch_metrics: Arrays; what is summed in the unfinished epoch.
          history: A record for each finished epoch. The last one's metrics rank
            this checkpoint if it stands at the end of that epoch.
          fingerprint: Of the data; `restore` wants the same.
        """
        ended_epoch = bool(history) and history[-1]["step"] == step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                epoch_metrics=ocp.args.StandardSave(epoch_metrics),
                progress=ocp.args.JsonSave({"history": history, "fingerprint": fingerprint}),
            ),
            metrics={"goodness": goodness(history[-1], self._monitor), "step": step}
            if ended_epoch
            else None,
        )

    def restore(
        self, step: int, state: PyTree, epoch_metrics: PyTree, fingerprint: str
    ) -> tuple[PyTree, PyTree, History]:
        """Reads what `save` was given.

        Args:
          step: A step that was saved.
          state: Arrays of the shapes and shardings to restore to.
          epoch_metrics: Likewise.
          fingerprint: Of the data that training is to go on with.

        Raises:
          TrainingError: The checkpoint is damaged, or of other data.
        """
        self.check_data(fingerprint)
        state, epoch_metrics = jax.tree.map(ocp.utils.to_shape_dtype_struct, (state, epoch_metrics))
        restored = self._restore(
            step,
            state=ocp.args.StandardRestore(state),
            epoch_metrics=ocp.args.StandardRestore(epoch_metrics),
            progress=ocp.args.JsonRestore(),
        )
        return restored["state"], restored["epoch_metrics"], restored["progress"]["history"]

    def check_data(self, fingerprint: str) -> None:
        """Raises TrainingError if there is a checkpoint, and it is of other data."""
        step = self.latest_step()
        if step is None:
            return
        progress = self._restore(step, progress=ocp.args.JsonRestore())["progress"]
        if progress["fingerprint"] != fingerprint:
            raise TrainingError(
                f"the data has changed since the checkpoints in {self._manager.directory} were "
                "made: bring the files back, or use another --workdir"
            )

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise TrainingError(
                f"{self._manager.directory / str(step)} cannot be restored ({error}); "
                "use another --workdir to start anew"
            ) from error

    def close(self) -> None:
        """Waits for what is being saved."""
        self._manager.close()
