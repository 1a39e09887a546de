"""Trains several networks that differ only in their seeds, in one compiled program.

A small network does not fill a GPU. So the training steps of all members are one program;
everything else is done for one member after the other. Each member is an ordinary run in a folder
of its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from cnn_jax.config import schema
from cnn_jax.config.schema import Config
from cnn_jax.data import Track, pipeline
from cnn_jax.system import signals
from cnn_jax.system.console import Console
from cnn_jax.system.errors import ConfigError, Interrupted
from cnn_jax.system.signals import Interruption
from cnn_jax.training import loop, run_directory, summary
from cnn_jax.training.checkpoint import Checkpoints, best_record
from cnn_jax.training.loop import Execution, Folder, Progress, Run
from cnn_jax.training.run_directory import EpochLog, Heartbeat


def train_members(
    config: Config,
    workdir: str | os.PathLike[str],
    members: int,
    console: Console | None = None,
    *,
    deadline: float | None = None,
) -> dict[pathlib.Path, dict[str, Any]]:
    """Trains several networks that differ only in their seeds, all at the same time.

    The members have the seeds `seed`, `seed + 1` and so on, and the same splits. Each member takes
    the steps of a separate run with its seed, except for rounding. It has its own early stopping,
    best epoch, checkpoints and bundle. The same call with the same folder resumes all members.

    Args:
      config: A configuration. If `data.split_seed` is -1, the members have the splits of the first
        seed.
      workdir: The folder of the members. A member is the run in its sub-folder `seed-SEED`.
      members: The number of members, 2 or more.
      console: Shows the progress; by default on the terminal.
      deadline: The value of `time.monotonic()`, in seconds, at which the members are saved and
        stopped as after Ctrl-C.

    Returns:
      The content of `report/metrics.json` of each member, by the folder of the member.

    Raises:
      ConfigError: A key is wrong or cannot be used with members, or a folder is in use or has
        another run.
      DataError: The data cannot be used, or has become unreadable.
      TrainingError: The loss of a member is not finite, the memory is not enough, or a checkpoint
        cannot be saved or restored.
      Interrupted: The members were saved and stopped after Ctrl-C, SIGTERM or the deadline.
    """
    console, workdir = console or Console(), pathlib.Path(workdir)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(signals.listen(deadline))
        schema.validate(config, jax.device_count())
        _check(config, workdir)
        run_directory.check_apart(workdir, config.data.source)
        folders = []
        for member in _member_configs(config, members):
            folder = workdir / f"seed-{member.seed}"
            stack.enter_context(run_directory.lock(folder))
            folders.append(loop.open_folder(member, folder))
        stopping = interrupted.stopping(
            console.track, "nothing is lost; run the same command to continue"
        )
        with contextlib.ExitStack() as open_checkpoints:
            runs = _make_runs(folders, workdir, console, stopping, open_checkpoints)
            progresses = _restore(runs, folders, stopping)
            for folder in folders:
                folder.write(runs[0].dataset)
            _train(runs, progresses, interrupted)
            trained = []
            for run, progress in zip(runs, progresses, strict=True):
                console.print(f"seed {run.config.seed}")
                trained.append((run, *loop.best_variables(run, progress)))
        stopping = interrupted.stopping(
            console.track, "training is done; run the same command to write the results"
        )
        return {
            run.workdir: loop.write_results(
                run, variables, best_epoch, run.heartbeat.wrap(stopping)
            )
            for run, variables, best_epoch in trained
        }


def _check(config: Config, workdir: pathlib.Path) -> None:
    """Raises ConfigError if the configuration or the folder cannot be used with members."""
    if jax.process_count() > 1:
        raise ConfigError("--members: the members are trained by one process; start only one")
    if config.mesh.model > 1:
        raise ConfigError("--members: needs mesh.model=1")
    if config.checkpoint.restore_step:
        raise ConfigError(
            "--members: checkpoint.restore_step cannot be used; use it in the run of one member"
        )
    if (workdir / "config.json").exists():
        raise ConfigError(
            f"--workdir: {workdir} is the folder of a single run; name another folder for the "
            "members"
        )


def _member_configs(config: Config, members: int) -> list[Config]:
    """Returns the configuration of each member; only the seeds differ."""
    split_seed = config.seed if config.data.split_seed < 0 else config.data.split_seed
    configs = []
    for number in range(members):
        member = config.copy_and_resolve_references()
        member.seed = (config.seed + number) % 2**32
        member.data.split_seed = split_seed
        configs.append(member)
    return configs


def _make_runs(
    folders: Sequence[Folder],
    workdir: pathlib.Path,
    console: Console,
    track: Track,
    stack: contextlib.ExitStack,
) -> list[Run]:
    """Opens the data, prints the plan, and makes the runs, which share all that has no seed.

    The checkpoints of the runs are closed when `stack` is closed.
    """
    config = folders[0].config
    dataset = loop.open_dataset(config, track)
    model = loop.make_network(config, dataset)
    all_checkpoints = []
    for folder in folders:
        loop.set_execution_length(folder.config, dataset)
        # After SIGKILL, some members may have one checkpoint less than others; see `_restore`.
        keep = max(folder.config.checkpoint.keep, 2)
        checkpoints = Checkpoints(folder.workdir / "checkpoints", config.train.monitor, keep)
        stack.enter_context(contextlib.closing(checkpoints))
        checkpoints.check_data(dataset.fingerprint)
        all_checkpoints.append(checkpoints)
    summary.show_plan(
        console, config, workdir, dataset, model, folders[0].changes, folders[0].pretrained
    )
    seeds = ", ".join(str(folder.config.seed) for folder in folders)
    console.print(f"{len(folders)} networks are trained together, with the seeds {seeds}")
    heartbeat = Heartbeat(folders[0].workdir)
    first = loop.make_run(
        config, folders[0].workdir, dataset, model, all_checkpoints[0], console, heartbeat
    )
    others = [
        dataclasses.replace(
            first,
            config=folder.config,
            workdir=folder.workdir,
            programs=first.programs.with_seed(folder.config.seed),
            checkpoints=checkpoints,
            heartbeat=Heartbeat(folder.workdir),
        )
        for folder, checkpoints in zip(folders[1:], all_checkpoints[1:], strict=True)
    ]
    return [first, *others]


def _restore(runs: Sequence[Run], folders: Sequence[Folder], track: Track) -> list[Progress]:
    """Restores all members, so that all unfinished members are at the same step.

    A process that was killed may have saved the latest checkpoint of some members only. Members
    that are ahead go back to a checkpoint of the same step as a checkpoint of the others.

    Raises:
      ConfigError: There is no step to which all unfinished members can go back.
    """
    progresses = [
        loop.restore_or_start(run, folder, track) for run, folder in zip(runs, folders, strict=True)
    ]
    while True:
        pairs = list(zip(runs, progresses, strict=True))
        unfinished = [
            number for number, pair in enumerate(pairs) if not pair[0].is_finished(pair[1])
        ]
        common = _common_step([pairs[number] for number in unfinished])
        ahead = [number for number in unfinished if progresses[number].step > common]
        if not ahead:
            return progresses
        for number in ahead:
            run = runs[number]
            run.console.print(
                f"seed {run.config.seed} goes back from step {progresses[number].step:,} to "
                f"{common:,}, which the other members have reached"
            )
            run.checkpoints.delete_after(common)
            folder = loop.open_folder(folders[number].config, folders[number].workdir)
            progresses[number] = loop.restore_or_start(run, folder, track)


def _common_step(members: Sequence[tuple[Run, Progress]]) -> int:
    """Returns the latest step to which all members can go back.

    A member whose only checkpoint is its first one can start again; so at most the steps between
    two checkpoints are repeated.

    Raises:
      ConfigError: There is no such step.
    """
    reachable = []
    for run, progress in members:
        saved = [step for step in run.checkpoints.steps() if step <= progress.step]
        reachable.append({progress.step, *saved} | ({0} if len(saved) < 2 else set()))
    common = set.intersection(*reachable) if reachable else {0}
    if common:
        return max(common)
    steps = ", ".join(f"seed {run.config.seed}: {progress.step:,}" for run, progress in members)
    run, _ = members[0]
    raise ConfigError(
        f"--members: the members have no checkpoint of the same step ({steps}), for example "
        "because --members or train.patience is larger than before; use the earlier value, or "
        f"train each member alone with --workdir=DIR/seed-SEED --config.seed=SEED "
        f"--config.data.split_seed={run.config.data.split_seed}"
    )


@dataclasses.dataclass
class _Member:
    """A member during training.

    Attributes:
      run, progress: The run and its progress. The state and the totals of the progress are valid
        only after `_split`.
      log: The log of the run.
      batches: The training batches of the run.
      is_active: Whether training has not ended for this member.
    """

    run: Run
    progress: Progress
    log: EpochLog
    batches: Iterator[pipeline.NumpyBatch]
    is_active: bool

    @property
    def name(self) -> str:
        return f"seed {self.run.config.seed}"


def _train(runs: Sequence[Run], progresses: Sequence[Progress], interrupted: Interruption) -> None:
    """Trains until training has ended for all members, or until an interruption.

    The progresses are updated. A member for which training has ended stays in the program, so that
    a resumed run executes the same program; its results are ignored.

    Raises:
      Interrupted: A signal or the deadline ended the runs, which are saved.
    """
    leader, config = runs[0], runs[0].config
    pairs = list(zip(runs, progresses, strict=True))
    steps = {progress.step for run, progress in pairs if not run.is_finished(progress)}
    if not steps:
        leader.console.print("training is finished already")
        return
    if leader.teacher_error is not None:
        raise leader.teacher_error
    (start,) = steps  # All unfinished members are at the same step; see `_restore`.
    program = leader.programs.member_steps(
        [run.config.seed for run in runs], vectorize=jax.default_backend() == "gpu"
    )
    with contextlib.ExitStack() as stack:
        members = []
        for run, progress in pairs:
            log = stack.enter_context(contextlib.closing(EpochLog(run.workdir, progress.history)))
            stream = loop.training_batches(run.config, run.dataset, start=start)
            batches = stack.enter_context(stream)
            member = _Member(run, progress, log, batches, not run.is_finished(progress))
            members.append(member)
            if progress.history and not run.checkpoints.steps():
                loop.save(run, progress)  # The probe counts as epoch 0.
        display = stack.enter_context(
            leader.console.training(config.train.epochs, leader.steps_per_epoch)
        )
        display.start([], (), start)
        states, totals = _stack(members)
        step, in_flight = start, None
        for number in itertools.count():
            active = [member for member in members if member.is_active]
            if not active:
                return
            length = leader.execution_length(step)
            with jax.transfer_guard("disallow"), leader.memory.explained():
                arrays = _send(members, length)
                if number == 0:
                    leader.memory.check(program, states, arrays, leader.pixels, leader.teachers)
                states, metrics = program(states, arrays, leader.pixels, leader.teachers)
                totals = leader.programs.merge(totals, metrics)
            images = length * leader.programs.layout.batch_size
            execution = Execution(metrics, step, length, images)
            step += length
            for member in active:
                member.progress.step = step
                member.run.heartbeat.beat("training", step)
                if number == 0:
                    member.progress.clock.restart()
            # Read the losses of the previous steps while the devices compute the new steps.
            if in_flight is not None:
                losses = _read(members, in_flight)
                speed = sum(member.progress.clock.images_per_second() for member in active)
                display.step(execution.first_step, float(losses.mean()), speed)
            in_flight = execution
            is_due = interrupted.is_due(number)
            ends_epoch = step % leader.steps_per_epoch == 0
            if not (ends_epoch or is_due or loop.saves_within_epoch(leader, execution)):
                continue

            _read(members, execution)
            in_flight = None
            _split(members, states, totals)
            for member in active:
                if not leader.programs.is_finite(member.progress.state):
                    raise loop.not_finite(
                        f"a parameter of {member.name}", execution, leader.schedule
                    )
                # The steps of two members may differ by one checkpoint only; see `_restore`.
                member.run.checkpoints.wait()
            for member in active:
                run, progress = member.run, member.progress
                if ends_epoch:
                    record = loop.end_epoch(run, progress, execution)
                    member.log.append(record)
                    is_best = record is best_record(progress.history, config.train.monitor)
                    display.epoch(record, is_best=is_best, note=member.name)
                    member.is_active = not run.is_finished(progress)
                loop.save(run, progress)
            if is_due:
                for member in active:
                    member.run.checkpoints.wait()
                raise Interrupted(f"saved after step {step:,}; run the same command to continue")
            states, totals = _stack(members)
            if ends_epoch:  # The measured speed excludes the validation of the other members.
                for member in active:
                    member.progress.clock.restart()


def _send(members: Sequence[_Member], length: int) -> dict[str, jax.Array]:
    """Sends the next batches of all members to the devices, [member, step, row, ...].

    A member for which training has ended gets the batches of another member.
    """
    batches = [
        list(itertools.islice(member.batches, length)) if member.is_active else None
        for member in members
    ]
    some = next(own for own in batches if own is not None)
    stacked = {
        name: np.stack([[batch[name] for batch in own or some] for own in batches])
        for name in some[0]
    }
    return members[0].run.programs.layout.to_devices(stacked, stacked=2)


def _read(members: Sequence[_Member], execution: Execution) -> Float[np.ndarray, " active"]:
    """Waits for dispatched steps to finish; returns the mean loss of each active member.

    Raises:
      TrainingError: A loss is infinite or not a number, or the memory was not enough.
    """
    leader = members[0].run
    with leader.memory.explained():
        losses = jax.device_get(execution.metrics.loss_sum).sum(axis=1) / execution.images
    for member, loss in zip(members, losses.tolist(), strict=True):
        if not member.is_active:
            continue
        if not math.isfinite(loss):
            raise loop.not_finite(f"the loss of {member.name}", execution, leader.schedule)
        member.progress.clock.count(execution.images)
    return losses[[member.is_active for member in members]]


def _stack(members: Sequence[_Member]) -> tuple[PyTree, PyTree]:
    """Returns the states and the totals of all members as arrays [member, ...]."""
    parts = [(member.progress.state, member.progress.totals) for member in members]
    return members[0].run.programs.gather(_stack_trees(*parts))


def _split(members: Sequence[_Member], states: PyTree, totals: PyTree) -> None:
    """Divides the stacked train states and metric sums, and gives each active member its part."""
    parts = members[0].run.programs.gather(_split_tree((states, totals), len(members)))
    for member, (state, own_totals) in zip(members, parts, strict=True):
        if member.is_active:
            member.progress.state, member.progress.totals = state, own_totals


@jax.jit
def _stack_trees(*trees: PyTree) -> PyTree:
    """Stacks the arrays of trees along a new first dimension."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def _split_tree(tree: PyTree, count: int) -> list[PyTree]:
    """Splits a tree of arrays [count, ...] into `count` trees."""

    def part(number: int) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[number], tree)

    return [part(number) for number in range(count)]
