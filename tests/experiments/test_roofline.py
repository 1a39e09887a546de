"""Tests of `roofline.py`: counts of operations and bytes, and the lower bounds of the time."""

import collections

import jax
import pytest

from cnn_jax.models.cnn import CNN
from cnn_jax.models.network import count_parameters, forward_flops, make_model
from experiments.benchmarks import roofline

MODEL = CNN(num_classes=10)
# This network is so small that its operations and bytes can be counted by hand.
TINY = CNN(num_classes=5, features=(2, 3), dense=4)


@pytest.mark.parametrize("image_size", [32, 64, 224])
def test_flops_equal_a_hand_count(image_size: int) -> None:
    pixels = image_size**2
    convolutions = (
        2 * 27 * 32 * pixels,
        2 * 288 * 64 * pixels // 4,
        2 * 576 * 128 * pixels // 16,
    )
    dense = 2 * (128 * 256 + 256 * 10)
    forward = sum(convolutions) + dense
    assert roofline.total(roofline.inference_passes(MODEL, image_size, 7, 4)).flops == 7 * forward
    assert roofline.total(roofline.training_passes(MODEL, image_size, 7, 4)).flops == 7 * (
        3 * forward - convolutions[0]
    )


def test_flops_equal_the_known_ones() -> None:
    training = [
        roofline.total(roofline.training_passes(MODEL, size, 1, 4)).flops for size in (32, 64, 224)
    ]
    # The known values count three matrix products for each layer. The training step needs only two
    # for the first convolution, because the images need no gradient.
    assert training == pytest.approx([62e6, 250e6, 3030e6], rel=0.04)
    assert roofline.total(roofline.inference_passes(MODEL, 224, 1, 4)).flops == pytest.approx(
        1.01e9, rel=0.01
    )


@pytest.mark.parametrize("image_size", [32, 224])
def test_flops_equal_those_of_xla_without_padding(image_size: int) -> None:
    layers = roofline.layers(MODEL, image_size)
    # On a row of n pixels, a kernel of width 3 multiplies 3 n values, of which 2 are padding.
    on_image = [
        ((3 * side - 2) / (3 * side)) ** 2 for side in (image_size // 2**i for i in range(3))
    ]
    without_padding = sum(
        layer.flops * share for layer, share in zip(layers, [*on_image, 1, 1], strict=True)
    )
    # XLA's FLOP count excludes padding, but includes biases, ReLU, BatchNorm and pooling.
    xla_flops = forward_flops(MODEL, (image_size, image_size))
    assert without_padding < xla_flops < 1.04 * without_padding


def test_flops_at_224_pixels_nearly_equal_those_of_xla() -> None:
    xla_flops = forward_flops(MODEL, (224, 224))
    assert roofline.total(roofline.inference_passes(MODEL, 224, 1, 4)).flops == pytest.approx(
        xla_flops, rel=0.03
    )


def test_layers_have_the_parameters_of_the_network() -> None:
    config = {"name": "cnn", "features": [8, 16], "dense": 24, "dropout": 0.5, "batch_norm": True}
    model = make_model(config, 7, "bfloat16")
    assert isinstance(model, CNN)
    parameters = sum(layer.parameters for layer in roofline.layers(model, 17))
    assert parameters == count_parameters(model, (17, 17))


def test_shapes_are_those_of_the_network() -> None:
    # The first block pools a side of 17 pixels to 8 pixels. The last block averages over the image.
    model = CNN(num_classes=7, features=(8, 16))
    layers = roofline.layers(model, 17)
    assert [layer.inputs for layer in layers] == [17 * 17 * 3, 8 * 8 * 8, 16, 256]
    assert [layer.products for layer in layers] == [17 * 17 * 8, 8 * 8 * 16, 256, 7]
    assert [layer.outputs for layer in layers] == [8 * 8 * 8, 16, 256, 7]


def bytes_by_layer(passes: list[roofline.Pass]) -> dict[str, float]:
    found: collections.Counter[str] = collections.Counter()
    for each in passes:
        found[each.name.split()[0]] += each.work.bytes
    return dict(found)


@pytest.mark.parametrize("width", [4, 2])
def test_bytes_of_inference_by_hand(width: int) -> None:
    # The input is two images of 4 x 4 x 3 values. For each image, the first block outputs 2 x 2 x 2
    # values, the second block 3 values, the dense layer 4 values, and the head 5 values. The
    # numbers of weights, biases, BatchNorm parameters and batch statistics are 54 + 2 + 4 + 4 in
    # the first block, and 54 + 3 + 6 + 6 in the second. The dense layer has 12 weights and 4
    # biases, and the head has 20 weights and 5 biases.
    assert bytes_by_layer(roofline.inference_passes(TINY, 4, 2, width)) == {
        "conv1": 2 * (48 + 8 * width) + 4 * 64,
        "conv2": 2 * (8 + 3) * width + 4 * 69,
        "dense": 2 * (3 + 4) * width + 4 * 16,
        "head": 2 * (4 * width + 5 * 4) + 4 * 25,
    }


@pytest.mark.parametrize("width", [4, 2])
def test_bytes_of_training_by_hand(width: int) -> None:
    # The layers have 60, 63, 16 and 25 parameters. The forward pass, the backward pass (except in
    # the first layer) and Adam read each parameter, and Adam writes each parameter. The backward
    # pass writes each gradient, and Adam reads it. Adam reads and writes two moments. The next
    # comments count the accesses (reads and writes) of the other arrays.
    assert bytes_by_layer(roofline.training_passes(TINY, 4, 2, width)) == {
        # Number of accesses: 2 for the images, 3 for the 4 x 4 x 2 outputs, 2 for their gradients,
        # 1 for the 2 x 2 x 2 pooled outputs, 1 for their gradients, and 2 for the 4 batch
        # statistics.
        "conv1": 2 * (2 * 48 + (5 * 32 + 2 * 8) * width) + 4 * (9 * 60 + 2 * 4),
        # Number of accesses: 3 for the 8 inputs, 1 for their gradients, 3 for the 2 x 2 x 3
        # outputs, 3 for their gradients, 1 for the 3 averages, 1 for their gradients, and 2 for the
        # 6 batch statistics.
        "conv2": 2 * (4 * 8 + 6 * 12 + 2 * 3) * width + 4 * (10 * 63 + 2 * 6),
        # Number of accesses: 3 for the 3 inputs, 1 for their gradients, 1 for the 4 outputs, and 2
        # for their gradients.
        "dense": 2 * (4 * 3 + 3 * 4) * width + 4 * 10 * 16,
        # Number of accesses: 3 for the 4 inputs, 1 for their gradients, and 3 for the gradients of
        # the 5 logits. The logits themselves cause no memory traffic.
        "head": 2 * (4 * 4 * width + 3 * 5 * 4) + 4 * 10 * 25,
    }


@pytest.mark.parametrize("kind", roofline.KINDS)
def test_passes_read_what_was_written(kind: str) -> None:
    given = {"images", "parameters", "moments", "statistics"}
    sizes: dict[str, int] = {}
    unread: set[str] = set()
    for each in roofline.KINDS[kind](MODEL, 32, 8, 2):
        for tensor, size in each.reads.items():
            assert tensor in sizes or tensor.split()[-1] in given, tensor
            assert sizes.setdefault(tensor, size) == size, tensor
            unread.discard(tensor)
        for tensor, size in each.writes.items():
            # A tensor may be written twice only if the pass also reads it (an update in place).
            assert tensor not in sizes or tensor in each.reads, tensor
            sizes[tensor] = size
            unread.add(tensor)
    left = {tensor for tensor in unread if tensor.split()[-1] not in given}
    assert left == ({"head output"} if kind == "inference" else set())


def test_network_without_batch_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="BatchNorm"):
        roofline.layers(CNN(num_classes=2, batch_norm=False), 32)


def test_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    peaks = roofline.Peaks(flops_per_second=100, bytes_per_second=10)
    arithmetic, memory = roofline.Work(500, 20), roofline.Work(100, 30)
    assert roofline.floor_seconds(arithmetic, peaks) == 5
    assert roofline.floor_seconds(memory, peaks) == 3
    # Arithmetic and memory transfers overlap within a pass, but two passes do not overlap.
    assert roofline.floor_seconds(arithmetic + memory, peaks) == 6
    passes = [
        roofline.Pass("a", 500, {"x": 10}, {"y": 10}),
        roofline.Pass("b", 100, {"y": 10, "z": 10}, {"z": 10}),
    ]
    assert roofline.total(passes) == arithmetic + memory
    assert roofline.floor_seconds_by_pass(passes, peaks) == 8


def test_table_has_a_training_and_an_inference_of_each_shape() -> None:
    peaks = roofline.Peaks(flops_per_second=1e9, bytes_per_second=1e12)
    training, inference = roofline.table(MODEL, [(32, 8)], "bfloat16", peaks)
    assert (training["kind"], inference["kind"]) == ("training", "inference")
    for row in (training, inference):
        assert row["floor_ms"] == row["compute_ms"] == pytest.approx(row["flops"] / 1e6)
        assert row["memory_ms"] == pytest.approx(row["bytes"] / 1e9)
        assert row["floor_by_pass_ms"] >= row["floor_ms"] * (1 - 1e-9)
        assert row["images_per_second"] == pytest.approx(8e3 / row["floor_ms"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_peaks_are_of_the_work_that_is_done(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This fake timer calls each function once and reports two seconds. The largest product has
    # 2 x 2048^3 operations, and the array of 256 MiB is read and written once.
    def best_seconds(run):
        jax.block_until_ready(run())
        return 2.0

    # The test needs only the shapes of the matrices, so a fast sum replaces their product.
    monkeypatch.setattr(roofline.jnp, "matmul", lambda a, b, **_: a[:1] + b[:1])
    monkeypatch.setattr(roofline, "_best_seconds", best_seconds)
    monkeypatch.setattr(roofline.jax, "default_backend", lambda: "cpu")
    peaks = roofline.measure_peaks(precision)
    assert peaks == roofline.Peaks(2048**3, 2**28)
