"""Tests of counts that are equal on all machines: operations, bytes, transfers, compilations."""

import collections
import dataclasses
import json
import math
import types
from unittest import mock

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require_cpu

from cnn_jax.data import augment
from cnn_jax.data.pipeline import Loader
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.models.cnn import CNN
from cnn_jax.system import runtime
from cnn_jax.system.errors import TrainingError
from cnn_jax.training import loop, memory, programs, sharding
from cnn_jax.training.loop import train_and_evaluate
from cnn_jax.training.optimizer import make_optimizer, make_schedule
from cnn_jax.training.step import TrainStep
from experiments.benchmarks import roofline


@pytest.fixture(scope="module")
def lower_step():
    """A function that lowers a training step of the default network for given compiler options.

    The batch has 8 images of 64 x 64 pixels.
    """
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
    """The training step, compiled without oneDNN: XLA does not count oneDNN's operations."""
    options = runtime.compiler_options()
    counted = {name: value for name, value in options.items() if "onednn" not in name}
    return lower_step(counted).compile()


def test_a_step_does_nearly_the_minimum_of_operations(compiled_step):
    minimum = roofline.total(
        roofline.training_passes(CNN(num_classes=10), 64, 8, activation_bytes=4)
    )
    # XLA omits the products with the zeros of the padding, which are 4 % of all products.
    assert compiled_step.cost_analysis()["flops"] == pytest.approx(minimum.flops, rel=0.05)


def test_a_step_moves_about_twice_the_minimum_of_bytes(compiled_step):
    """The ratio of accessed bytes to minimum bytes was 2.06 when this test was written."""
    minimum = roofline.total(
        roofline.training_passes(CNN(num_classes=10), 64, 8, activation_bytes=4)
    )
    assert compiled_step.cost_analysis()["bytes accessed"] < 2.2 * minimum.bytes


def test_a_step_needs_little_more_memory_than_its_activations(compiled_step):
    """A step needed 1.7 MB for each image when this test was written; 1.1 MB are activations."""
    assert compiled_step.memory_analysis().temp_size_in_bytes / 8 < 1.8e6


@pytest.mark.parametrize("parts", [1, 2])
def test_xla_uses_onednn_for_convolutions_where_it_is_faster(lower_step, parts):
    """XLA calls the same libraries with and without gradient accumulation."""
    options = runtime.compiler_options()
    assert options
    compiled = lower_step(options, accumulation_steps=parts).compile()
    lines = compiled.as_text().splitlines()
    eigen_lines = [line for line in lines if " convolution(" in line]
    onednn_lines = [line for line in lines if '"__onednn$convolution"' in line]
    # The eight convolutions are three forward passes, two gradients of inputs, and three gradients
    # of kernels. Eigen always computes the gradients of kernels. No convolution is inside a fusion,
    # which another library would execute.
    assert (len(eigen_lines), len(onednn_lines)) in ((8, 0), (3, 5))
    assert not any("(%param_" in line for line in eigen_lines)


def test_an_option_that_xla_lacks_is_left_out(monkeypatch):
    require_cpu()
    known = runtime.compiler_options()
    assert set(known) == set(runtime._CPU_OPTIONS)
    monkeypatch.setattr(runtime, "_CPU_OPTIONS", {"xla_cpu_removed": True, **known})
    assert runtime.compiler_options.__wrapped__() == known


@pytest.mark.parametrize("image_size", [(8, 16), (5, 7)])
def test_images_are_unpacked_unchanged(image_size):
    """An image of 8 x 16 pixels fills three rows exactly; an image of 5 x 7 pixels is padded."""
    images = np.random.default_rng(0).integers(0, 256, (6, *image_size, 3), np.uint8)
    packed = programs.pack(images)
    assert packed.shape == (6, math.ceil(images[0].size / 128), 128)
    rows = np.array([4, 0, 4])
    batch = programs._with_images({"row": jnp.asarray(rows)}, jnp.asarray(packed), image_size)
    np.testing.assert_array_equal(batch["image"], images[rows])


def test_packing_copies_no_images_of_the_usual_sizes():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    assert np.shares_memory(programs.pack(images), images)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_a_data_set_is_sent_to_the_devices_in_pieces(monkeypatch, count):
    """A piece has four images of 5 x 7 pixels."""
    images = np.random.default_rng(0).integers(0, 256, (count, 5, 7, 3), np.uint8)
    expected, pack, sizes = programs.pack(images), programs.pack, []
    monkeypatch.setattr(programs, "pack", lambda piece: sizes.append(len(piece)) or pack(piece))
    monkeypatch.setattr(programs, "_PIECE_BYTES", 4 * images[0].nbytes)
    loader = mock.Mock(spec=Loader, on_device=True, pixels=images)
    layout = sharding.Layout(sharding.make_mesh(), 8)
    sent = programs.Programs.send_pixels(types.SimpleNamespace(layout=layout), loader)
    np.testing.assert_array_equal(sent, expected)
    assert sent.sharding == layout.replicated
    assert max(sizes) == min(count, 4)


def _explain(message):
    """Raises the error of the memory check for an error message of XLA."""
    step = TrainStep(
        model=CNN(num_classes=2, features=(4,)),
        optimizer=make_optimizer(make_schedule(1e-3, 1e-4, total_steps=10), l2=0.0),
        preprocessing=Preprocessing(image_size=(8, 8)),
        accumulation_steps=2,
    )
    with memory.Memory(programs.Programs(step, 64)).explained():
        raise jax.errors.JaxRuntimeError(message)


def test_a_program_too_large_for_a_tpu_is_a_one_line_error():
    # This is the message of libtpu 0.0.50.
    text = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.51G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    with pytest.raises(TrainingError) as error:
        _explain(text)
    assert str(error.value) == (
        "out of memory: a training step with train.batch_size=64 needs 20.51G of the 15.75G of "
        "each device; use a smaller train.batch_size, or a larger train.accumulation_steps"
    )


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: other words", "INTERNAL: other"])
def test_other_errors_before_the_first_step_stay_as_they_are(message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        _explain(message)


def test_a_group_that_does_not_fit_is_not_one_image():
    estimate = memory.MemoryEstimate(1e9, 8e9, 1024, data_devices=1, parts=1, group=128)
    assert estimate.largest_batch(1.5e9) == 0
    assert "not even 128 images on each device fit" in str(estimate.error(1.5e9))


@pytest.mark.parametrize("group", [1, 128])
def test_suggested_batches_fit_and_larger_ones_do_not(group):
    """A device has 512 of 1,024 images, and needs 4 bytes for each image of a complete group."""
    estimate = memory.MemoryEstimate(10.0, 4.0 * 512, 1024, data_devices=2, parts=1, group=group)
    assert estimate.total == 10 + 4 * 512
    available = 10 + 4 * 300
    assert estimate.largest_batch(available) == 2 * (296 if group == 1 else 256)
    assert estimate.fewest_parts(available) == 2
    # An eighth of the batch, 64 images, needs as much as 128 images if they are a group.
    assert estimate.fewest_parts(10 + 4 * 64) == (8 if group == 1 else None)
    assert estimate.largest_batch(9) == 0


def test_less_than_a_group_of_images_needs_memory_for_each_image():
    estimate = memory.MemoryEstimate(0.0, 320.0, 64, data_devices=2, parts=1, group=128)
    assert estimate.largest_batch(160) == 2 * 16
    assert estimate.fewest_parts(160) == 2


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_step_is_one_transfer_and_is_compiled_once(tiny_config, tmp_path, monkeypatch, place):
    """Counts transfers to and from the device, and compilations, in a run of three epochs."""
    jax.clear_caches()
    tiny_config.augment.place = place
    sent: list[dict[str, tuple[int, ...]]] = []
    read = collections.Counter()
    compiled_after_first_epoch = []
    compiled = collections.Counter()
    epochs = []
    real_send, real_get, real_save = sharding.Layout.to_devices, jax.device_get, loop.save

    def counting_send(layout, batch):
        sent.append({name: array.shape for name, array in batch.items()})
        return real_send(layout, batch)

    def counting_get(tree):
        read["training" if len(epochs) < tiny_config.train.epochs else "after"] += 1
        return real_get(tree)

    def counting_save(*args):
        real_save(*args)
        epochs.append(len(sent))

    def listen(event, seconds, **details):
        if not event.endswith("backend_compile_duration"):
            return
        compiled[details.get("fun_name")] += 1
        if 0 < len(epochs) < 3:
            compiled_after_first_epoch.append((len(epochs), details))

    monkeypatch.setattr(sharding.Layout, "to_devices", counting_send)
    monkeypatch.setattr(loop, "save", counting_save)
    monkeypatch.setattr(jax, "device_get", counting_get)
    jax.monitoring.register_event_duration_secs_listener(listen)
    train_and_evaluate(tiny_config, tmp_path / "run")

    assert len(epochs) == tiny_config.train.epochs
    assert compiled_after_first_epoch == []
    steps = {name: count for name, count in compiled.items() if "training" in str(name)}
    assert list(steps.values()) == [1], compiled
    # If the device augments images, a training batch also has the random parameters of the
    # augmentation, but no other array.
    draws = augment.identity_draws(1, (8, 8)) if place == "device" else {}
    names = {"image", "label", "mask", *draws}
    batches = [batch for batch in sent if set(batch) == names]
    assert batches
    steps_per_epoch, validations = _batches_per_epoch(tmp_path / "run", tiny_config)
    # Each training batch is sent twice: for training, and for the statistics of BatchNorm.
    assert len(sent) == 3 * (2 * steps_per_epoch + validations)
    # The host reads one loss for each step, and one set of sums for each split and epoch.
    assert read["training"] <= 3 * (steps_per_epoch + 2 + 1)


def _batches_per_epoch(run, config):
    report = json.loads((run / "report" / "metrics.json").read_text())
    counts = {split: sum(map(sum, report[split]["confusion"])) for split in ("train", "validation")}
    size = config.train.batch_size
    return math.ceil(counts["train"] / size), math.ceil(counts["validation"] / size)
