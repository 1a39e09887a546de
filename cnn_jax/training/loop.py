"""The training loop on the host, from restoring a checkpoint to writing the results."""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Int, PyTree

from cnn_jax.config import schema
from cnn_jax.config.resolve import resolve
from cnn_jax.config.schema import Config
from cnn_jax.data import Track, pipeline
from cnn_jax.data import dataset as datasets
from cnn_jax.data.augment import Augmentation
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.data.sources import open_source
from cnn_jax.data.splits import Division
from cnn_jax.models.network import Network, make_model
from cnn_jax.models.pretrained import PretrainedWeights
from cnn_jax.system import signals
from cnn_jax.system.console import Console, TrainingDisplay
from cnn_jax.system.errors import (
    BundleError,
    ConfigError,
    DataError,
    DivergedError,
    Interrupted,
    TrainingError,
)
from cnn_jax.system.signals import Interruption
from cnn_jax.training import (
    initial_weights,
    probe,
    results,
    run_directory,
    sharding,
    summary,
)
from cnn_jax.training.backup import Backup
from cnn_jax.training.checkpoint import Checkpoints, History, best_record
from cnn_jax.training.distillation import open_teachers
from cnn_jax.training.memory import Memory
from cnn_jax.training.metrics import Metrics
from cnn_jax.training.optimizer import make_schedule
from cnn_jax.training.profiling import Trace
from cnn_jax.training.programs import Programs, default_execution_length, make_programs
from cnn_jax.training.run_directory import Heartbeat
from cnn_jax.training.step import TrainState

# The number of training images from which BatchNorm's statistics are estimated after each
# epoch. Eight times as many images give the same accuracy (experiments/RESULTS.md).
STATISTICS_IMAGES = 1024


def train_and_evaluate(
    config: Config,
    workdir: str | os.PathLike[str],
    console: Console | None = None,
    *,
    profile: bool = False,
    on_epoch: Callable[[History], None] | None = None,
    on_metrics: Callable[[Mapping[str, Any]], None] | None = None,
    deadline: float | None = None,
    backup: Backup | None = None,
) -> dict[str, Any]:
    """Trains a network and writes checkpoints, a log, metrics and a bundle to `workdir`.

    The same call with the same folder resumes from the latest checkpoint. On a CPU, the result is
    bitwise the same as without an interruption; for other devices, see docs/runs.md. If
    `sharding.start_processes` has connected several processes, all of them must make this call,
    with a folder that they share.

    Args:
      config: A configuration, for example the result of `get_config()` of a file in `configs/`.
      workdir: The run's folder; created if it does not exist.
      console: Shows the progress; by default on the terminal.
      profile: Whether to record a trace of a few steps in `workdir/profile`.
      on_epoch: A function of the records of all finished epochs. It is called before the
        first step, and after each epoch when the epoch is saved. An error that it raises ends
        the run, which the same call can resume.
      on_metrics: A function of the content of `report/metrics.json`. It is called when this file
        is written, before the bundle is written.
      deadline: The value of `time.monotonic()`, in seconds, at which the run is saved and
        stopped as after Ctrl-C.
      backup: A copy of `workdir`, from which a run without its folder is restored.

    Returns:
      The content of `report/metrics.json`.

    Raises:
      ConfigError: A key is wrong, or the folder is in use or contains a run with another
        configuration.
      DataError: The data cannot be used, or has become unreadable.
      TrainingError: The loss is not finite, the memory is not enough, or a checkpoint
        cannot be saved or restored.
      StoreError: The backup cannot be read, or cannot be completed.
      Interrupted: The run was saved and stopped after Ctrl-C, SIGTERM or the deadline.
    """
    console = console or Console(is_silent=not sharding.is_primary())
    workdir = pathlib.Path(workdir)
    with contextlib.ExitStack() as stack:
        interrupted = stack.enter_context(signals.listen(deadline))
        schema.validate(config, jax.device_count())
        with sharding.synchronized_errors():
            if sharding.is_primary():
                run_directory.check_apart(workdir, config.data.source)
                stack.enter_context(run_directory.lock(workdir))
                if backup is not None:
                    backup.restore(workdir)
        heartbeat = Heartbeat(workdir)
        track = heartbeat.wrap(console.track)
        with sharding.synchronized_errors():
            folder = open_folder(config, workdir)
            config = folder.config
            heartbeat.beat("opening data")
            stopping = interrupted.stopping(
                track, "nothing is lost; run the same command to continue"
            )
            dataset = open_dataset(config, stopping)
        set_execution_length(config, dataset)
        # All processes must compile the same programs, so their configuration and data must be
        # equal.
        sharding.check_equal("another configuration", schema.digest(config))
        sharding.check_equal("other data", dataset.fingerprint)
        residency = "01" if dataset.loader.on_device else "00"
        sharding.check_equal("another place of images (set data.cache)", residency)
        model = make_network(config, dataset)
        checkpoints = Checkpoints(
            workdir / "checkpoints", config.train.monitor, config.checkpoint.keep
        )
        with contextlib.closing(checkpoints):
            checkpoints.check_data(dataset.fingerprint)
            summary.show_plan(
                console, config, workdir, dataset, model, folder.changes, folder.pretrained
            )
            run = make_run(config, workdir, dataset, model, checkpoints, console, heartbeat)
            progress = restore_or_start(run, folder, stopping)
            folder.write(dataset)
            with sharding.synchronized_errors():
                if backup is not None and sharding.is_primary():
                    stack.enter_context(backup.running())
            trace = Trace(workdir / "profile" if profile and sharding.is_primary() else None)
            _train(run, progress, interrupted, trace, on_epoch or (lambda history: None))
            variables, best_epoch = best_variables(run, progress)
        track = interrupted.stopping(
            track, "training is done; run the same command to write the results"
        )
        return write_results(run, variables, best_epoch, track, on_metrics)


@dataclasses.dataclass(frozen=True)
class Folder:
    """The folder of a run before the run starts.

    Attributes:
      workdir: The folder.
      config: The resolved configuration.
      previous: The values of the configuration at the last start, by key; None for a new run.
      changes: A line for each key that has changed since the last start.
      weights: The weights with which a new run starts; None for random weights.
      pretrained: The content of pretrained.json; None for random weights.
    """

    workdir: pathlib.Path
    config: Config
    previous: Mapping[str, Any] | None
    changes: list[str]
    weights: PretrainedWeights | None
    pretrained: Mapping[str, Any] | None

    def write(self, dataset: Dataset) -> None:
        """Writes config.json and the other files of a run that is known to start."""
        run_directory.write_pretrained(self.workdir, self.pretrained)
        run_directory.write_config(self.workdir, self.config)
        run_directory.write_unreadable(self.workdir, dataset.findings.unreadable)


def open_folder(config: Config, workdir: pathlib.Path) -> Folder:
    """Resolves the configuration of a run; if the folder already has a run, compares the two.

    Raises:
      ConfigError: The folder has a run with another configuration, or the initial weights cannot
        be used.
    """
    previous = run_directory.read_config(workdir)
    config = resolve(config, previous)
    changes = run_directory.changes(workdir, previous, config)
    if previous is None:
        weights = initial_weights.open_initial_weights(config)
        record = weights and weights.record()
    else:
        weights, record = None, run_directory.read_pretrained(workdir)
        initial_weights.check_unchanged(config, record)
    return Folder(workdir, config, previous, changes, weights, record)


def make_network(config: Config, dataset: Dataset) -> Network:
    """Constructs the network of a configuration, for the classes of a data set."""
    return make_model(
        config.model.to_dict(),
        len(dataset.source.class_names),
        config.precision,
        config.train.from_stage,
    )


def set_execution_length(config: Config, dataset: Dataset) -> None:
    """Sets `train.steps_per_execution` if it is 0, which means automatic."""
    if not config.train.steps_per_execution:
        config.train.steps_per_execution = default_execution_length(
            dataset.loader.on_device, jax.default_backend()
        )


def write_results(
    run: "Run",
    variables: PyTree,
    best_epoch: int,
    track: Track,
    on_metrics: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Writes the metrics and the bundle of a run; see `results.write_results`.

    Args:
      run: The run.
      variables: The variables of the best epoch, arrays on the host.
      best_epoch: The number of the best epoch; 0 is the probe.
      track: Shows the progress of a loop.
      on_metrics: A function of the content of `report/metrics.json`.
    """
    config, dataset = run.config, run.dataset
    features = None
    if best_epoch == 0 or (config.train.probe and config.train.from_stage == "head"):
        # The layers below the head are unchanged since the probe, so the stored features are used
        # again.
        features = probe.embeddings(run.programs.model, variables, config, dataset, track)
    report = results.write_results(
        config, run.workdir, dataset, variables, track, features, on_metrics
    )
    run.heartbeat.beat("done")
    return report


def open_dataset(config: Config, track: Track) -> Dataset:
    """Opens the data set of a resolved configuration.

    Args:
      config: The resolved configuration.
      track: Shows the progress of a loop.

    Raises:
      DataError: The data cannot be read, or is not enough for training.
    """
    data = config.data
    preprocessing = Preprocessing.from_config(data)
    listing = open_source(data.source, track, data.allow_outside)
    # The classes are checked before the images are scanned, because the scan may take long.
    datasets.check_classes(listing)
    # Images that are stored on the device can be augmented only on the device.
    device_bytes = sharding.accelerator_bytes() if config.augment.place == "device" else 0
    dataset = datasets.open_dataset(
        listing,
        Division.from_config(data, config.seed),
        preprocessing,
        max_unreadable=data.max_unreadable,
        residency=datasets.choose_residency(data.cache, listing, preprocessing, device_bytes),
        workers=data.workers,
        track=track,
    )
    datasets.check_trainable(dataset)
    return dataset


@dataclasses.dataclass(frozen=True)
class Run:
    """The objects of a run that are the same for all training steps.

    Attributes:
      config: The resolved configuration.
      workdir: The run's folder.
      dataset: The data set of the run.
      pixels: All images of the data set on the devices, or None.
      teachers: The variables of each teacher on the devices; None without distillation.
      teacher_error: The error if the teachers cannot be opened, else None.
      programs: The jitted functions.
      memory: The check of the devices' memory.
      schedule: A function from the step to the learning rate.
      steps_per_epoch: The number of steps in an epoch. The last batch of an epoch may
        contain images of the next pass over the data.
      checkpoints: The run's checkpoints.
      console: Shows progress.
      heartbeat: Records that the run is alive.
    """

    config: Config
    workdir: pathlib.Path
    dataset: Dataset
    pixels: Array | None
    teachers: PyTree
    teacher_error: Exception | None
    programs: Programs
    memory: Memory
    schedule: optax.Schedule
    steps_per_epoch: int
    checkpoints: Checkpoints
    console: Console
    heartbeat: Heartbeat

    def execution_length(self, step: int) -> int:
        """Returns the number of steps to dispatch together, starting at `step`.

        The number is train.steps_per_execution if an execution of this length starts at this
        step and ends within the epoch, else 1. The number depends only on the step, so that a
        resumed run dispatches the same executions.
        """
        step_in_epoch, length = step % self.steps_per_epoch, self.config.train.steps_per_execution
        fits = step_in_epoch % length == 0 and step_in_epoch + length <= self.steps_per_epoch
        return length if fits else 1

    def is_finished(self, progress: "Progress") -> bool:
        """Returns whether the last epoch or early stopping has ended the training."""
        last_step = self.config.train.epochs * self.steps_per_epoch
        return progress.step >= last_step or _patience_is_over(progress.history, self.config)


def make_run(
    config: Config,
    workdir: pathlib.Path,
    dataset: Dataset,
    model: Network,
    checkpoints: Checkpoints,
    console: Console,
    heartbeat: Heartbeat,
) -> Run:
    """Creates the learning-rate schedule and the jitted functions of a run.

    The arguments are attributes of `Run`; `model` is the network.

    Raises:
      BundleError, ConfigError, DataError: The teachers cannot be used; see `open_teachers`. If the
        run has checkpoints, the first and the last error are stored in `Run.teacher_error` instead.
    """
    steps_per_epoch = math.ceil(len(dataset.splits["train"]) / config.train.batch_size)
    schedule = make_schedule(
        config.optimizer.learning_rate,
        config.optimizer.final_learning_rate,
        total_steps=config.optimizer.decay_epochs * steps_per_epoch,
        warmup_steps=round(config.optimizer.warmup_epochs * steps_per_epoch),
        shape=config.optimizer.schedule,
    )
    distillation = teachers = teacher_error = None
    try:
        distillation, teachers = open_teachers(config, dataset) or (None, None)
    except (BundleError, DataError) as error:
        # A finished run needs no teachers.
        if not checkpoints.steps():
            raise
        teacher_error = error
    programs = make_programs(
        config,
        model,
        schedule,
        dataset.loader.preprocessing,
        dataset.findings.counts["train"],
        distillation,
    )
    return Run(
        config=config,
        workdir=workdir,
        dataset=dataset,
        pixels=programs.send_pixels(dataset.loader),
        teachers=jax.tree.map(programs.layout.to_all_devices, teachers),
        teacher_error=teacher_error,
        programs=programs,
        memory=Memory(programs),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        checkpoints=checkpoints,
        console=console,
        heartbeat=heartbeat,
    )


@dataclasses.dataclass
class Progress:
    """The part of a run's state that a checkpoint stores.

    Attributes:
      step: The number of steps taken.
      state: The train state.
      totals: The metrics of the current epoch.
      history: A record for each finished epoch.
      clock: Measures the time and the speed of the current epoch.
    """

    step: int
    state: TrainState
    totals: Metrics
    history: History
    clock: "Clock"


@dataclasses.dataclass(frozen=True)
class Execution:
    """Training steps that were dispatched to the devices together, and may still be running.

    Attributes:
      metrics: The metrics of all steps of the execution.
      first_step: The step number of the first step.
      steps: The number of steps in the execution.
      images: The number of images in all steps of the execution.
    """

    metrics: Metrics
    first_step: int
    steps: int
    images: int

    @property
    def last_step(self) -> int:
        """The step number of the last dispatched step."""
        return self.first_step + self.steps - 1


def _train(
    run: Run,
    progress: Progress,
    interrupted: Interruption,
    trace: Trace,
    on_epoch: Callable[[History], None],
) -> None:
    """Trains until the last epoch, early stopping, or an interruption.

    Raises:
      Interrupted: A signal or the deadline ended the run, which is saved.
    """
    train, monitor = run.config.train, run.config.train.monitor
    last_step = train.epochs * run.steps_per_epoch
    is_finished = run.is_finished(progress)
    if run.teacher_error is not None and not is_finished:
        raise run.teacher_error
    log = run_directory.EpochLog(run.workdir, progress.history)
    display = run.console.training(train.epochs, run.steps_per_epoch)
    rows = run.programs.layout.rows
    stream = training_batches(run.config, run.dataset, rows, start=progress.step)
    with contextlib.closing(log), stream as batches, display, contextlib.closing(trace):
        improvements = _improvements(progress.history, monitor)
        display.start(progress.history, improvements, progress.step, is_finished)
        run.heartbeat.beat("starting", progress.step)
        if progress.history and not run.checkpoints.steps():
            save(run, progress)  # The probe counts as epoch 0, which may be the best epoch.
        on_epoch(progress.history)
        reader = _DelayedReader(run, progress, display)
        for number in itertools.count():
            if is_finished or progress.step >= last_step:
                break
            length = run.execution_length(progress.step)
            with trace.steps(progress.step, length):
                execution = _dispatch(run, progress, batches, length, is_first=number == 0)
                # Read the loss of the previous steps while the devices compute the new steps.
                reader.follow(execution)
            run.heartbeat.beat("training", progress.step)
            is_due = interrupted.is_due(number)
            ends_epoch = progress.step % run.steps_per_epoch == 0
            if not (ends_epoch or is_due or saves_within_epoch(run, execution)):
                continue

            reader.finish()
            # The loss was computed before the last update of the parameters, so the updated
            # parameters are checked too.
            if not run.programs.is_finite(progress.state):
                raise not_finite("a parameter", execution, run.schedule)
            if ends_epoch:
                record = end_epoch(run, progress, execution)
                log.append(record)
                display.epoch(record, is_best=record is best_record(progress.history, monitor))
            save(run, progress)
            if is_due:
                run.checkpoints.wait()
                raise Interrupted(
                    f"saved after step {progress.step:,}; run the same command to continue"
                )
            if ends_epoch:
                on_epoch(progress.history)
                if _patience_is_over(progress.history, run.config):
                    break

    if message := trace.describe():  # A trace can be described only after it is closed.
        run.console.print(message)


def _dispatch(
    run: Run,
    progress: Progress,
    batches: Iterator[pipeline.NumpyBatch],
    length: int,
    is_first: bool,
) -> Execution:
    """Sends the next batches to the devices and dispatches a training step for each batch.

    The devices compute after this function has returned. The first execution of a process
    compiles the programs and checks the memory that they need.

    Raises:
      TrainingError: The memory is not enough, or another process has ended.
      DataError: An image cannot be read any more.
    """
    programs, memory = run.programs, run.memory
    with jax.transfer_guard("disallow"), memory.explained():
        execution_batches = list(itertools.islice(batches, length))
        program, arrays = programs.send(execution_batches)
        if is_first:
            run.heartbeat.beat("compiling", progress.step)
            memory.check(program, progress.state, arrays, run.pixels, run.teachers)
            # If too few steps are left at the end of an epoch, these steps are dispatched one at a
            # time. The program for a single step is therefore compiled too.
            if run.steps_per_epoch % length:
                single_step, single_batch = programs.send(execution_batches[:1])
                single_step.lower(progress.state, single_batch, run.pixels, run.teachers).compile()
        progress.state, metrics = program(progress.state, arrays, run.pixels, run.teachers)
        progress.totals = programs.merge(progress.totals, metrics)
        if is_first:
            progress.clock.restart()  # The measured speed excludes the time of compilation.
    first_step = progress.step
    progress.step += length
    return Execution(metrics, first_step, length, length * programs.layout.batch_size)


def saves_within_epoch(run: Run, execution: Execution) -> bool:
    """Returns whether `checkpoint.every_steps` requires a checkpoint after the given steps."""
    every = run.config.checkpoint.every_steps
    if not every:
        return False
    return (execution.last_step + 1) // every > execution.first_step // every


class _DelayedReader:
    """Reads the loss of dispatched steps while the devices compute the next steps."""

    def __init__(self, run: Run, progress: Progress, display: TrainingDisplay) -> None:
        self._run, self._progress, self._display = run, progress, display
        self._in_flight: Execution | None = None

    def follow(self, execution: Execution) -> None:
        """Reads the loss of the previously dispatched steps, and remembers the new steps.

        Raises:
          TrainingError: The loss is infinite or not a number, or the memory was not enough.
        """
        previous, self._in_flight = self._in_flight, execution
        if previous is not None:
            loss = self._read(previous)
            images_per_second = self._progress.clock.images_per_second()
            self._display.step(execution.first_step, loss, images_per_second)

    def finish(self) -> None:
        """Reads the loss of the most recently dispatched steps.

        Raises:
          TrainingError: The loss is infinite or not a number, or the memory was not enough.
        """
        assert self._in_flight is not None
        self._read(self._in_flight)
        self._in_flight = None

    def _read(self, execution: Execution) -> float:
        """Waits for dispatched steps to finish; returns the mean loss of their images."""
        run = self._run
        with run.memory.explained():
            loss = float(jax.device_get(execution.metrics.loss_sum).sum()) / execution.images
        if not math.isfinite(loss):
            raise not_finite("the loss", execution, run.schedule)
        self._progress.clock.count(execution.images)
        return loss


def restore_or_start(run: Run, folder: Folder, track: Track) -> Progress:
    """Restores the progress of the run from a checkpoint, or starts at step 0.

    Args:
      run: The run.
      folder: The folder of the run, as it was before this start.
      track: Shows the progress of a loop.

    Raises:
      ConfigError: More epochs are finished than `train.epochs`, or a path or step is wrong.
      TrainingError: There are checkpoints, but none is intact.
    """
    config, checkpoints = run.config, run.checkpoints
    state, totals = run.programs.init_state(), run.programs.empty_metrics()
    # Rewind only if `restore_step` is new, because a scheduler may repeat the same command.
    restore_step = config.checkpoint.restore_step
    if restore_step and restore_step != (folder.previous or {}).get("checkpoint.restore_step"):
        saved = checkpoints.rewind(restore_step, state, totals)
    else:
        saved, damaged = checkpoints.restore_latest(state, totals)
        if damaged:
            steps = " and ".join(f"{step:,}" for step in damaged)
            run.console.warn(
                f"the checkpoint of step {steps} is damaged, or later than a damaged one, and was "
                f"moved to {run.workdir / 'damaged'}; an earlier checkpoint is intact"
            )
    if saved is None:
        if folder.weights is not None:
            state, description = initial_weights.start_from(
                folder.weights, config, state, run.dataset.source.class_names
            )
            run.console.print(f"starts from {description}")
        history: History = []
        if config.train.probe:
            clock = Clock()
            state, fitted = probe.fit_head(config, run.dataset, run.programs, state, track)
            clock.count(len(run.dataset.source))
            run.console.print(
                f"the probe fitted the head to the features, with an L2 of {fitted.l2:g}"
            )
            metrics = fitted.metrics
            history.append(_record(run, 0, 0, clock, metrics["train"], metrics["validation"]))
        return Progress(0, state, totals, history, Clock())
    if (finished := _last_epoch(saved.history)) > config.train.epochs:
        raise ConfigError(
            f"config.train.epochs: must be at least {finished}, the number of finished epochs, "
            f"got {config.train.epochs}"
        )
    clock = Clock(saved.seconds)
    return Progress(saved.step, saved.state, saved.epoch_metrics, saved.history, clock)


def _record(
    run: Run,
    epoch: int,
    step: int,
    clock: "Clock",
    training: Mapping[str, float],
    validation: Mapping[str, float],
) -> dict[str, Any]:
    """Returns the record of a finished epoch.

    Args:
      run: The run.
      epoch: The number of the epoch; 0 is the probe.
      step: The number of steps taken.
      clock: The clock of the epoch.
      training: The metrics of the training images.
      validation: The metrics of the validation images.
    """
    return {
        "epoch": epoch,
        "step": step,
        "seconds": clock.seconds(),
        "images_per_second": clock.images_per_second(),
        "learning_rate": _learning_rate(run.schedule, max(step - 1, 0)),
        **{f"train_{key}": value for key, value in training.items()},
        **{f"validation_{key}": value for key, value in validation.items()},
    }


def _last_epoch(history: History) -> int:
    """Returns the number of the last finished epoch; 0 if no epoch is finished."""
    return history[-1]["epoch"] if history else 0


def training_batches(
    config: Config,
    dataset: Dataset,
    rows: Int[np.ndarray, " rows"] | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    augmentation: Augmentation | None = None,
) -> contextlib.closing[Generator[pipeline.NumpyBatch, None, None]]:
    """Returns the stream of training batches that a configuration describes.

    Args:
      config: The resolved configuration.
      dataset: The data set of the run.
      rows: The rows of each batch that this process loads; None: all rows.
      start: The number of the first batch.
      stop: The number after the last batch; None: the stream is endless.
      augmentation: Replaces the augmentation of the configuration; None: nothing is replaced.
    """
    if augmentation is None:
        augmentation = Augmentation.from_config(config.augment)
    return pipeline.training_batches(
        dataset.loader,
        dataset.splits["train"],
        batch_size=config.train.batch_size,
        augmentation=augmentation,
        place=config.augment.place,
        seed=config.seed,
        start=start,
        stop=stop,
        balanced=config.train.balance == "sampling",
        rows=rows,
    )


def end_epoch(run: Run, progress: Progress, last_execution: Execution) -> dict[str, Any]:
    """Validates the network, and returns the record of the finished epoch.

    The metrics and the clock are reset for the next epoch.

    Raises:
      TrainingError: The validation loss is not finite.
    """
    progress.state = _estimate_statistics(run, progress.state)
    validation = _validate(run, progress.state)
    if not math.isfinite(validation["loss"]):
        raise not_finite("the validation loss", last_execution, run.schedule)
    # If classes are sampled evenly, the metrics are reweighted to the data's class frequencies.
    is_sampled = run.config.train.balance == "sampling"
    training = progress.totals.compute(run.dataset.findings.counts["train"] if is_sampled else None)
    epoch = _last_epoch(progress.history) + 1
    record = _record(run, epoch, progress.step, progress.clock, training, validation)
    progress.history.append(record)
    progress.totals, progress.clock = run.programs.empty_metrics(), Clock()
    return record


def save(run: Run, progress: Progress) -> None:
    """Starts to save a checkpoint in the background."""
    run.checkpoints.save(
        progress.step,
        progress.state,
        progress.totals,
        progress.history,
        run.dataset.fingerprint,
        progress.clock.seconds(),
    )


def best_variables(run: Run, progress: Progress) -> tuple[PyTree, int]:
    """Returns the network's variables after the best epoch, as arrays on the host.

    Raises:
      TrainingError: There is no checkpoint at the end of an epoch, or the checkpoint is damaged.
    """
    monitor = run.config.train.monitor
    best = best_record(progress.history, monitor)
    assert best is not None  # The history has at least one epoch; the probe is epoch 0.
    run.console.print(_describe_end(progress.history, best, run.config))
    if best["step"] == progress.step:
        return jax.device_get(run.programs.gather(progress.state.variables)), best["epoch"]
    run.checkpoints.wait()
    kept = set(run.checkpoints.steps())
    if best["step"] not in kept:
        # The checkpoint was deleted when a later epoch was better. The run then resumed from an
        # earlier step. The later epoch was not better this time, for example because of another
        # mesh, or was not reached, for example because of fewer epochs.
        best = best_record([r for r in progress.history if r["step"] in kept], monitor)
        if best is None:
            raise TrainingError(
                f"{run.workdir / 'checkpoints'} has no checkpoint at the end of an epoch; set a "
                "larger train.epochs to train another epoch"
            )
        run.console.warn(
            f"the checkpoint of that epoch is missing; the result is the best epoch with a "
            f"checkpoint, {best['epoch']}, with {monitor} {best[monitor]:.4f}"
        )
    saved = run.checkpoints.restore(best["step"], progress.state, progress.totals)
    return jax.device_get(run.programs.gather(saved.state.variables)), best["epoch"]


class Clock:
    """Measures the duration of an epoch and the training speed in images per second."""

    def __init__(self, seconds: float = 0.0) -> None:
        """Starts to measure the duration and the speed of an epoch.

        Args:
          seconds: The time already spent in this epoch before an interruption.
        """
        self._made = time.perf_counter() - seconds
        self._images = 0
        self.restart()

    def restart(self) -> None:
        """Restarts the measurement of the training speed."""
        self._start = self._last_step = time.perf_counter()

    def count(self, images: int) -> None:
        """Adds the number of images in the training steps that have just finished."""
        self._last_step = time.perf_counter()
        self._images += images

    def images_per_second(self) -> float:
        """Returns the training speed in images per second.

        The speed is measured from the last restart to the last finished execution.
        """
        return self._images / max(self._last_step - self._start, 1e-9)

    def seconds(self) -> float:
        """Returns the time spent in the current epoch so far, in seconds."""
        return time.perf_counter() - self._made


def not_finite(name: str, execution: Execution, schedule: optax.Schedule) -> DivergedError:
    """Returns the error for a loss or a parameter that is not finite.

    Args:
      name: The name of the value, for the message.
      execution: The execution that computed the value.
      schedule: The learning rate by step.
    """
    first, last = execution.first_step + 1, execution.last_step + 1
    steps = f"step {last:,}" if first == last else f"one of steps {first:,} to {last:,}"
    learning_rate = _learning_rate(schedule, execution.last_step)
    return DivergedError(
        f"{name} is infinite or not a number at {steps}, where the learning rate is "
        f"{learning_rate:.2g}. Try a lower optimizer.learning_rate, "
        "optimizer.warmup_epochs=1 or precision=float32, in another --workdir. The latest "
        "checkpoint has finite parameters"
    )


def _learning_rate(schedule: optax.Schedule, step: int) -> float:
    """Returns the learning rate of a step as a Python float."""
    with jax.transfer_guard("allow"):
        return np.asarray(schedule(step)).item()


def _estimate_statistics(run: Run, state: TrainState) -> TrainState:
    """Returns the train state with new BatchNorm statistics for the current parameters.

    The statistics come from training images without augmentation. The images are always the
    same, so that an interrupted run gives the same results as an uninterrupted one.
    """
    programs = run.programs
    if not programs.updates_statistics:
        return state
    count = min(math.ceil(STATISTICS_IMAGES / programs.layout.batch_size), run.steps_per_epoch)
    statistics = programs.empty_statistics()
    # Worker processes would take longer to start than these few batches take to load.
    loader = dataclasses.replace(run.dataset.loader, workers=0)
    dataset, rows = dataclasses.replace(run.dataset, loader=loader), programs.layout.rows
    stream = training_batches(run.config, dataset, rows, stop=count, augmentation=Augmentation())
    with stream as batches:
        for batch in batches:
            run.heartbeat.beat("estimating statistics")
            with jax.transfer_guard("disallow"):
                batch = programs.layout.to_devices(batch)
                statistics = programs.update_statistics(
                    statistics, state.variables, batch, run.pixels
                )
    return dataclasses.replace(state, batch_stats=statistics.batch_stats)


def _validate(run: Run, state: TrainState) -> dict[str, float]:
    """Returns the metrics of the whole validation split."""
    programs, indices = run.programs, run.dataset.splits["validation"]
    totals = programs.empty_metrics()
    stream = pipeline.evaluation_batches(
        run.dataset.loader, indices, programs.layout.batch_size, programs.layout.rows
    )
    with stream as batches:
        for batch in batches:
            run.heartbeat.beat("validating")
            with jax.transfer_guard("disallow"):
                batch = programs.layout.to_devices(batch)
                metrics = programs.eval_step(state.variables, batch, run.pixels)
                totals = programs.merge(totals, metrics)
    return totals.compute()


def _improvements(history: History, monitor: str) -> set[int]:
    """Returns the numbers of the epochs that were better than all earlier epochs."""
    best_until = (best_record(history[: end + 1], monitor) for end in range(len(history)))
    return {record["epoch"] for record in best_until if record is not None}


def _patience_is_over(history: History, config: Config) -> bool:
    """Returns whether the monitored metric did not improve in the last `train.patience` epochs."""
    best = best_record(history, config.train.monitor)
    return best is not None and _last_epoch(history) - best["epoch"] >= config.train.patience


def _describe_end(history: History, best: dict[str, Any], config: Config) -> str:
    """Returns a line for the user that says how training ended and which epoch was best."""
    monitor, epochs = config.train.monitor, _last_epoch(history)
    if not epochs:
        return f"done: the probe has {monitor} {best[monitor]:.4f}"
    which = f"epoch {best['epoch']}" if best["epoch"] else "the probe before epoch 1"
    return (
        f"{'stopped early' if epochs < config.train.epochs else 'done'}: {which} of {epochs} is "
        f"the best, with {monitor} {best[monitor]:.4f}"
    )
