"""What is compiled, counted and not timed: a slip in speed fails here on any machine."""

import collections
import dataclasses
import json
import math

import jax
import jax.monitoring
import numpy as np
import pytest
from conftest import require_cpu

from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models.cnn import CNN
from cnn_jax.system import runtime
from cnn_jax.training import loop, sharding
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.optimizer import make_optimizer, make_schedule
from cnn_jax.training.step import TrainStep
from experiments.benchmarks import roofline


@pytest.fixture(scope="module")
def lower_step():
    """The specification's training step on a batch of 8 at 64 x 64 pixels, by compiler options."""
    require_cpu()
    step = TrainStep(
        model=CNN(num_classes=10),
        optimizer=make_optimizer(make_schedule(1e-3, 1e-4, total_steps=10), l2=1e-4),
        preprocessing=Preprocessing(image_size=(64, 64)),
        label_smoothing=0.1,
    )
    state = jax.eval_shape(step.init_state)
    batch = {
        "image": jax.ShapeDtypeStruct((8, 64, 64, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((8,), np.int32),
        "mask": jax.ShapeDtypeStruct((8,), bool),
    }

    def lower(options, **kwargs):
        function = dataclasses.replace(step, **kwargs)
        return jax.jit(function, donate_argnums=0, compiler_options=options).lower(state, batch)

    return lower


@pytest.fixture(scope="module")
def compiled_step(lower_step):
    """As it is compiled for this CPU, but for oneDNN, whose work XLA does not count."""
    options = runtime.compiler_options()
    counted = {name: value for name, value in options.items() if "onednn" not in name}
    return lower_step(counted).compile()


def test_a_step_does_few_operations_beyond_the_least(compiled_step):
    least = roofline.training_work(CNN(num_classes=10), 64, 8, activation_bytes=4)
    # XLA leaves out the products with the zeros of the padding: 4 % of them here.
    assert compiled_step.cost_analysis()["flops"] == pytest.approx(least.flops, rel=0.05)


def test_a_step_moves_some_twice_the_least_bytes(compiled_step):
    """2.06 times when written."""
    least = roofline.training_work(CNN(num_classes=10), 64, 8, activation_bytes=4)
    assert compiled_step.cost_analysis()["bytes accessed"] < 2.2 * least.bytes


def test_a_step_takes_the_memory_of_its_activations(compiled_step):
    """1.7 MB an image when written; activations alone are 1.1 MB."""
    assert compiled_step.memory_analysis().temp_size_in_bytes / 8 < 1.8e6


@pytest.mark.parametrize("parts", [1, 2])
def test_xla_is_told_whose_convolutions_to_take(lower_step, parts):
    """Within the loop over the parts of a batch, too."""
    options = runtime.compiler_options()
    assert options
    compiled = lower_step(options, accumulation_steps=parts).compile()
    lines = compiled.as_text().splitlines()
    by_eigen = [line for line in lines if " convolution(" in line]
    by_onednn = [line for line in lines if '"__onednn$convolution"' in line]
    # Three forward, two gradients by inputs and, always Eigen's, three by weights; none as a
    # fusion of another library's.
    assert (len(by_eigen), len(by_onednn)) in ((8, 0), (3, 5))
    assert not any("(%param_" in line for line in by_eigen)


def test_an_option_that_xla_lacks_takes_no_other_with_it(monkeypatch):
    require_cpu()
    known = runtime.compiler_options()
    assert set(known) == set(runtime._CPU_OPTIONS)
    monkeypatch.setattr(runtime, "_CPU_OPTIONS", {"xla_cpu_removed": True, **known})
    assert runtime.compiler_options.__wrapped__() == known


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_step_is_one_transfer_each_way_and_nothing_is_compiled_twice(
    tiny_config, tmp_path, monkeypatch, place
):
    """What a run of three epochs sends, reads back and compiles."""
    jax.clear_caches()
    tiny_config.augment.place = place
    sent: list[dict[str, tuple[int, ...]]] = []
    read = collections.Counter()
    compiled_after_first_epoch = []
    compiled = collections.Counter()
    epochs = []
    real_send, real_get, real_save = sharding.Layout.to_devices, jax.device_get, loop._save

    def send_that_counts(layout, batch):
        sent.append({name: array.shape for name, array in batch.items()})
        return real_send(layout, batch)

    def get_that_counts(tree):
        read["training" if len(epochs) < tiny_config.train.epochs else "after"] += 1
        return real_get(tree)

    def save_that_counts(*args):
        real_save(*args)
        epochs.append(len(sent))

    def listen(event, seconds, **details):
        if not event.endswith("backend_compile_duration"):
            return
        compiled[details.get("fun_name")] += 1
        if 0 < len(epochs) < 3:
            compiled_after_first_epoch.append((len(epochs), details))

    monkeypatch.setattr(sharding.Layout, "to_devices", send_that_counts)
    monkeypatch.setattr(loop, "_save", save_that_counts)
    monkeypatch.setattr(jax, "device_get", get_that_counts)
    jax.monitoring.register_event_duration_secs_listener(listen)
    train_and_evaluate(tiny_config, tmp_path / "run")

    assert len(epochs) == tiny_config.train.epochs
    assert compiled_after_first_epoch == []
    steps = {name: count for name, count in compiled.items() if "training" in str(name)}
    assert list(steps.values()) == [1], compiled
    # Batches of training have draws where the device moves the pixels, and nothing else more.
    names = {"image", "label", "mask"} | ({"matrix", "contrast"} if place == "device" else set())
    batches = [batch for batch in sent if set(batch) == names]
    assert batches
    steps_per_epoch, validations = _batches_per_epoch(tmp_path / "run", tiny_config)
    # An epoch's images, once to train and once for BatchNorm's statistics; then validation.
    assert len(sent) == 3 * (2 * steps_per_epoch + validations)
    # One loss a step, one set of sums for each split and epoch.
    assert read["training"] <= 3 * (steps_per_epoch + 2 + 1)


def _batches_per_epoch(run, config):
    report = json.loads((run / "report" / "metrics.json").read_text())
    counts = {split: sum(map(sum, report[split]["confusion"])) for split in ("train", "validation")}
    size = config.train.batch_size
    return math.ceil(counts["train"] / size), math.ceil(counts["validation"] / size)
