"""The host loop: restore, step, validate, save, stop early, write the results."""

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from cnn_jax import configuration, run_directory, sharding
from cnn_jax.bundle import Bundle, write_bundle
from cnn_jax.checkpoint import Checkpoints, History, best_record
from cnn_jax.configuration import Config
from cnn_jax.console import Console
from cnn_jax.data import dataset as datasets
from cnn_jax.data import pipeline
from cnn_jax.data.augment import Augmentation
from cnn_jax.data.dataset import Dataset
from cnn_jax.data.sources import open_source
from cnn_jax.data.splits import SPLITS, Division
from cnn_jax.errors import TrainingError
from cnn_jax.evaluate import predict_split, score
from cnn_jax.loss import balanced_weights
from cnn_jax.metrics import HEADLINE, Metrics
from cnn_jax.models import make_model
from cnn_jax.optimizer import make_optimizer, make_schedule
from cnn_jax.predict import Predictor
from cnn_jax.preprocessing import Preprocessing
from cnn_jax.step import INIT, TrainState, eval_step, init_state, random_key, train_step
from cnn_jax.summary import show_plan, show_results


def train_and_evaluate(
    config: Config, workdir: str | os.PathLike[str], console: Console | None = None
) -> dict[str, Any]:
    """Trains as `config` says and leaves everything in `workdir`.

    The same call on the same folder goes on from the latest checkpoint, bit for
    bit where it stopped.

    Args:
      config: As a file under `configs/` gives it.
      workdir: The run's folder; made if it is not there.
      console: Where to show progress.

    Returns:
      The content of `report/metrics.json`.

    Raises:
      ConfigError: A key is wrong, or the folder holds a run of another configuration.
      DataError: The data cannot be used.
      TrainingError: The loss is not finite, or a checkpoint cannot be restored.
      KeyboardInterrupt: After Ctrl-C or SIGTERM, once the run is saved.
    """
    console = console or Console()
    workdir = pathlib.Path(workdir)
    configuration.validate(config, jax.device_count())
    config = configuration.resolve(config)
    run_directory.claim(workdir, config)
    preprocessing = Preprocessing(
        image_size=config.data.image_size,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        max_pixels=config.data.max_pixels,
    )
    dataset = _open_dataset(config, preprocessing, console)
    model = make_model(config.model.to_dict(), len(dataset.source.class_names), config.precision)
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.monitor)
    with _interruption() as interrupted:
        with contextlib.closing(checkpoints):
            checkpoints.check_data(dataset.fingerprint)  # Before anything is written.
            run_directory.write_config(workdir, config)
            run_directory.write_unreadable(workdir, dataset.findings.unreadable)
            show_plan(console, config, workdir, dataset, model)
            variables = _train(config, workdir, dataset, model, checkpoints, console, interrupted)
        report = _write_results(config, workdir, dataset, variables, console, interrupted)
    show_results(workdir, report)
    return report


def _open_dataset(config: Config, preprocessing: Preprocessing, console: Console) -> Dataset:
    """Opens what is to be trained on.

    Raises:
      DataError: It cannot be used, or cannot be trained on.
    """
    data = config.data
    listing = open_source(data.source, console.track, data.allow_outside)
    datasets.check_classes(listing)  # Rather now than after the scan.
    # Only what is augmented on the device can be there beforehand.
    device_bytes = sharding.accelerator_bytes() if config.augment.place == "device" else 0
    dataset = datasets.open_dataset(
        listing,
        Division.from_config(data, config.seed),
        preprocessing,
        max_unreadable=data.max_unreadable,
        residency=datasets.choose_residency(data.cache, listing, preprocessing, device_bytes),
        workers=data.workers,
        track=console.track,
    )
    datasets.check_trainable(dataset)
    return dataset


@dataclasses.dataclass(frozen=True)
class _Programs:
    """What runs on the devices, each compiled once."""

    init_state: Callable[[], TrainState]
    empty_metrics: Callable[[], Metrics]
    train_step: Callable[[TrainState, dict, PyTree], tuple[TrainState, Metrics]]
    eval_step: Callable[[Any, dict, PyTree], Metrics]
    merge: Callable[[Metrics, Metrics], Metrics]
    is_finite: Callable[[TrainState], jax.Array]
    to_devices: Callable[[dict], dict[str, jax.Array]]
    to_all_devices: Callable[[np.ndarray], jax.Array]


def _with_images(batch: Mapping[str, Array], pixels: Array | None) -> Mapping[str, Array]:
    """The batch itself, or, if all pixels are on the device, with its images."""
    return batch if pixels is None else {**batch, "image": pixels[batch["row"]]}


def _make_programs(
    config: Config, model: nn.Module, schedule: optax.Schedule, dataset: Dataset
) -> _Programs:
    preprocessing = dataset.loader.preprocessing
    mesh = sharding.make_mesh()
    everywhere, by_example = sharding.replicated(mesh), sharding.split_by_example(mesh)
    optimizer = make_optimizer(schedule, config.optimizer.l2)
    init = functools.partial(
        init_state,
        random_key(config.seed, INIT),
        model=model,
        optimizer=optimizer,
        image_size=preprocessing.image_size,
    )

    def train(
        state: TrainState, batch: Mapping[str, Array], pixels: Array | None
    ) -> tuple[TrainState, Metrics]:
        return train_step(
            state,
            _with_images(batch, pixels),
            model=model,
            optimizer=optimizer,
            preprocessing=preprocessing,
            seed=config.seed,
            label_smoothing=config.train.label_smoothing,
            class_weights=class_weights,
        )

    def evaluate(variables: PyTree, batch: Mapping[str, Array], pixels: Array | None) -> Metrics:
        batch = _with_images(batch, pixels)
        return eval_step(variables, batch, model=model, preprocessing=preprocessing)

    class_weights = None
    if config.train.balance == "loss":
        class_weights = balanced_weights(dataset.findings.counts["train"]).tolist()
    shardings = {"in_shardings": (everywhere, by_example, everywhere), "out_shardings": everywhere}
    return _Programs(
        init_state=jax.jit(init, out_shardings=everywhere),
        empty_metrics=jax.jit(
            functools.partial(Metrics.empty, model.num_classes), out_shardings=everywhere
        ),
        train_step=jax.jit(train, donate_argnums=0, **shardings),
        eval_step=jax.jit(evaluate, **shardings),
        is_finite=jax.jit(_all_finite, out_shardings=everywhere),
        merge=jax.jit(Metrics.merge, donate_argnums=0, out_shardings=everywhere),
        to_devices=functools.partial(sharding.to_devices, sharding=by_example),
        to_all_devices=functools.partial(jax.device_put, device=everywhere),
    )


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _train(
    config: Config,
    workdir: pathlib.Path,
    dataset: Dataset,
    model: nn.Module,
    checkpoints: Checkpoints,
    console: Console,
    interrupted: threading.Event,
) -> PyTree:
    """Trains to the end; returns the best epoch's variables, on the host."""
    train = config.train
    steps_per_epoch = math.ceil(len(dataset.splits["train"]) / train.batch_size)
    last_step = train.epochs * steps_per_epoch
    schedule = make_schedule(
        config.optimizer.learning_rate,
        config.optimizer.final_learning_rate,
        total_steps=last_step,
        warmup_steps=round(config.optimizer.warmup_epochs * steps_per_epoch),
    )
    programs = _make_programs(config, model, schedule, dataset)
    on_device, pixels = dataset.loader.on_device, dataset.loader.pixels
    pixels = programs.to_all_devices(pixels) if on_device and pixels is not None else None
    state, totals = programs.init_state(), programs.empty_metrics()
    # Figures are those of the data, in whatever proportions it is drawn.
    drawn_from = dataset.findings.counts["train"] if train.balance == "sampling" else None
    history: History = []
    first_step = checkpoints.latest_step() or 0
    if first_step:
        state, totals, history = checkpoints.restore(first_step, state, totals, dataset.fingerprint)
    if _patience_is_over(history, config):
        last_step = first_step
    stream = _training_batches(config, dataset, first_step)
    log = run_directory.EpochLog(workdir, history)
    display = console.training(train.epochs, steps_per_epoch)
    with contextlib.closing(log), stream as batches, display:
        display.start(history, best_record(history, train.monitor), first_step)
        clock = _Clock()
        in_flight: Metrics | None = None
        for step in range(first_step, last_step):
            with jax.transfer_guard("disallow"):
                batch = programs.to_devices(next(batches))
                state, metrics = programs.train_step(state, batch, pixels)
                totals = programs.merge(totals, metrics)
                if step == first_step:
                    clock.restart()  # It was compiled just now.
                # Step n - 1 is read while step n runs: the device never waits.
                if in_flight is not None:
                    loss = _finite_loss(in_flight, step - 1, schedule, train.batch_size)
                    clock.count(train.batch_size)
                    display.step(step, loss, clock.images_per_second())
            in_flight = metrics
            ends_epoch = (step + 1) % steps_per_epoch == 0
            if not (ends_epoch or interrupted.is_set()):
                continue

            _finite_loss(in_flight, step, schedule, train.batch_size)
            clock.count(train.batch_size)
            in_flight = None
            # That loss was computed before the step's update; the update counts too.
            if not programs.is_finite(state):
                raise _not_finite("a parameter", step, schedule)
            if ends_epoch:
                validation = _validate(programs, state, pixels, dataset, train.batch_size)
                if not math.isfinite(validation["loss"]):
                    raise _not_finite("the validation loss", step, schedule)
                training = totals.compute(drawn_from)
                record = {
                    "epoch": len(history) + 1,
                    "step": step + 1,
                    "seconds": clock.seconds(),
                    "images_per_second": clock.images_per_second(),
                    "learning_rate": _learning_rate(schedule, step),
                    **{f"train_{key}": value for key, value in training.items()},
                    **{f"validation_{key}": value for key, value in validation.items()},
                }
                history.append(record)
                totals, clock = programs.empty_metrics(), _Clock()
                log.append(record)
                display.epoch(record, is_best=record is best_record(history, train.monitor))
            checkpoints.save(step + 1, state, totals, history, dataset.fingerprint)
            if interrupted.is_set():
                raise KeyboardInterrupt(
                    f"saved after step {step + 1:,}; the same command goes on from there"
                )
            if _patience_is_over(history, config):
                break

    best = best_record(history, train.monitor)
    assert best is not None  # train.epochs is at least 1.
    console.print(_why_it_ended(history, best, config))
    if best["step"] != history[-1]["step"]:
        state, _, _ = checkpoints.restore(best["step"], state, totals, dataset.fingerprint)
    return jax.device_get(state.variables)


def _training_batches(
    config: Config, dataset: Dataset, start: int
) -> contextlib.closing[Generator[pipeline.NumpyBatch, None, None]]:
    augmentation = Augmentation(
        flip=config.augment.flip,
        rotation=config.augment.rotation,
        zoom=config.augment.zoom,
        contrast=config.augment.contrast,
    )
    return pipeline.training_batches(
        dataset.loader,
        dataset.splits["train"],
        batch_size=config.train.batch_size,
        augmentation=augmentation,
        place=config.augment.place,
        seed=config.seed,
        start=start,
        balanced=config.train.balance == "sampling",
    )


class _Clock:
    """Time since it was made, and the rate at which images are trained on."""

    def __init__(self) -> None:
        self._made = time.perf_counter()
        self._images = 0
        self.restart()

    def restart(self) -> None:
        """Counts images from now on: what came before was not training."""
        self._start = self._last_step = time.perf_counter()

    def count(self, images: int) -> None:
        """A step on so many images has ended."""
        self._last_step = time.perf_counter()
        self._images += images

    def images_per_second(self) -> float:
        return self._images / max(self._last_step - self._start, 1e-9)

    def seconds(self) -> float:
        return time.perf_counter() - self._made


def _finite_loss(metrics: Metrics, step: int, schedule: optax.Schedule, batch_size: int) -> float:
    """The mean loss of a training batch.

    Raises:
      TrainingError: It is infinite or not a number.
    """
    loss = float(jax.device_get(metrics.loss_sum).sum()) / batch_size
    if not math.isfinite(loss):
        raise _not_finite("the loss", step, schedule)
    return loss


def _not_finite(what: str, step: int, schedule: optax.Schedule) -> TrainingError:
    return TrainingError(
        f"{what} is infinite or not a number at step {step + 1:,}, where the learning rate is "
        f"{_learning_rate(schedule, step):.2g}. Try a lower optimizer.learning_rate, "
        "optimizer.warmup_epochs=1 or precision=float32, in another --workdir. The last good "
        "checkpoint is kept"
    )


def _learning_rate(schedule: optax.Schedule, step: int) -> float:
    with jax.transfer_guard("allow"):
        return np.asarray(schedule(step)).item()


def _validate(
    programs: _Programs,
    state: TrainState,
    pixels: Array | None,
    dataset: Dataset,
    batch_size: int,
) -> dict[str, float]:
    """Exact figures of the whole validation split."""
    totals = programs.empty_metrics()
    indices = dataset.splits["validation"]
    with pipeline.evaluation_batches(dataset.loader, indices, batch_size) as batches:
        for batch in batches:
            with jax.transfer_guard("disallow"):
                metrics = programs.eval_step(state.variables, programs.to_devices(batch), pixels)
                totals = programs.merge(totals, metrics)
    return totals.compute()


def _patience_is_over(history: History, config: Config) -> bool:
    best = best_record(history, config.train.monitor)
    return best is not None and len(history) - best["epoch"] >= config.train.patience


def _why_it_ended(history: History, best: dict[str, Any], config: Config) -> str:
    monitor = config.train.monitor
    return (
        f"{'stopped early' if len(history) < config.train.epochs else 'done'}: the best of "
        f"{len(history)} epochs is {best['epoch']}, with {monitor} {best[monitor]:.4f}"
    )


@contextlib.contextmanager
def _interruption() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, for the run to end at the next good moment.

    A second one ends it at once. (An exception in the middle of a compilation
    would crash JAX.)
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # Only the main thread may handle signals.
        return

    previous = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for name, handler in previous.items():
            signal.signal(name, handler)

    def handle(signum: int, frame: object) -> None:
        interrupted.set()
        restore()

    for name in previous:
        signal.signal(name, handle)
    try:
        yield interrupted
    finally:
        restore()


def _write_results(
    config: Config,
    workdir: pathlib.Path,
    dataset: Dataset,
    variables: PyTree,
    console: Console,
    interrupted: threading.Event,
) -> dict[str, Any]:
    """Measures the best network on every split; writes the report and the bundle."""
    source = dataset.source
    bundle = Bundle(
        model=config.model.to_dict(),
        precision=config.precision,
        class_names=source.class_names,
        preprocessing=dataset.loader.preprocessing,
        temperature=1.0,
        data={
            "source": config.data.source,
            "division": dataclasses.asdict(Division.from_config(config.data, config.seed)),
            "max_unreadable": config.data.max_unreadable,
            "allow_outside": config.data.allow_outside,
            "fingerprint": dataset.fingerprint,
        },
        metrics={},
        variables=variables,
    )

    def track(items: Iterable, description: str, total: int) -> Iterator:
        for item in console.track(items, description, total):
            if interrupted.is_set():
                raise KeyboardInterrupt("training is done; the same command goes on from there")
            yield item

    predictor = Predictor(bundle)
    loader = dataclasses.replace(dataset.loader, on_device=False)
    report = {}
    for split in SPLITS:
        indices = dataset.splits[split]
        probabilities = predict_split(predictor, loader, indices, track, f"measuring {split}")
        report[split] = score(probabilities, source.labels[indices], source.class_names)
        if split == "test":
            ids = [source.ids[i] for i in indices]
            run_directory.write_predictions(
                workdir, ids, source.labels[indices], probabilities, source.class_names
            )
    run_directory.write_metrics(workdir, report)
    headline = {split: {key: report[split][key] for key in HEADLINE} for split in SPLITS}
    write_bundle(dataclasses.replace(bundle, metrics=headline), workdir / "bundle")
    return report
