"""Computes the shortest possible time of a training step and of an inference on this machine.

    python experiments/benchmarks/roofline.py
        [--shapes=224x32,64x128] [--precision=float32] [--peaks=FILE] [--passes] [--json=FILE]

The roofline model (Williams, Waterman and Patterson 2009): a computation takes at least its
operations divided by the rate of arithmetic, and at least its bytes divided by the memory's
bandwidth; the larger of the two is its floor. "By pass" is the tighter floor of a program
whose passes over memory run one after the other, each at its own limit. Both rates are
measured here, on JAX's default device. Run it on an idle machine: other load during the
measurement raises the floor.

Only the operations of convolutions and dense layers are counted, as direct convolutions
compute them, with the zeros of the padding; a multiply-add is two operations. (XLA's
`cost_analysis` leaves these out: 10 % of a forward pass at 32 pixels, 2 % at 224.)

Bytes are counted under these assumptions:

- A matrix product (also a convolution) reads each operand once and writes its result once:
  patches of an image are never in memory, and the cache holds all data that is reused.
- An elementwise operation or a sum needs no bytes if it is fused to the end of the product or
  pass that has its operands: bias, ReLU, the statistics of BatchNorm, dropout (its draws are
  computed where they are used), softmax and loss. The normalisation of the uint8 images and
  the conversion of parameters are fused to the pass that reads them.
- Nothing is kept in the cache from one product or pass to the next.
- In training, BatchNorm's statistics need the whole batch before anything can be
  normalised. So a convolution's output is written to memory and read again by one pass that
  normalises and pools, and once more in the backward pass. In the backward pass, the two sums
  for BatchNorm's gradient are computed from the pooled activations and their gradient, at the
  end of the product that computes this gradient, because the gradient is zero at all pixels
  that were not pooled (if no scale is zero). One more pass computes the gradient of the
  convolution's output, which is written once and read by the products for the gradients of
  the weights and of the inputs.
- In inference the statistics are constants, and a layer reads its input once and writes its
  pooled output once.
- Parameters, their gradients and Adam's two moments are float32, and so are the values after the
  last layer. All other activations are of the given width.
- Labels and metrics are left out, and so is augmentation.

This is a floor for programs of this kind, not for all. A program that recomputes values
instead of storing them moves fewer bytes (a convolution that runs twice need not store its
output, and the next product could normalise and pool as it reads), and Winograd's convolution
does fewer multiplications.
`--passes` prints each pass with the tensors that it reads and writes. `--peaks` takes the two
rates from the JSON of another run instead of measuring them.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cnn_jax.models.cnn import CNN

ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2}

_FLOAT32 = 4
_KERNEL_PIXELS = 9
_REPETITIONS = 10


@dataclass(frozen=True)
class Work:
    """The work of a computation: floating-point operations, and bytes moved to or from memory."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Peaks:
    """The measured peak arithmetic rate and peak memory bandwidth of a device."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Pass:
    """One pass over memory: a matrix product with its fused operations, or an elementwise pass.

    Attributes:
      name: The layer and the purpose of the pass.
      flops: Floating-point operations of the matrix product; 0 for an elementwise pass.
      reads: Bytes of each tensor that the pass reads once, by name.
      writes: Bytes of each tensor that the pass writes once, by name.
    """

    name: str
    flops: int
    reads: Mapping[str, int]
    writes: Mapping[str, int]

    @property
    def work(self) -> Work:
        return Work(self.flops, sum(self.reads.values()) + sum(self.writes.values()))


@dataclass(frozen=True)
class Layer:
    """The sizes of a convolution with BatchNorm and pooling, or of a dense layer, for one image.

    Attributes:
      name: The name of the module in the network.
      inputs: Number of input values.
      products: Number of results of the matrix product.
      outputs: Number of output values, after pooling.
      fan_in: Number of values in the weighted sum of each product.
      parameters: Number of trainable parameters: kernel, bias, BatchNorm's scale and bias.
      statistics: Number of BatchNorm's statistics.
    """

    name: str
    inputs: int
    products: int
    outputs: int
    fan_in: int
    parameters: int
    statistics: int = 0

    @property
    def flops(self) -> int:
        """The number of floating-point operations in one matrix product for one image.

        The product for each of the two gradients needs the same number of operations.
        """
        return 2 * self.fan_in * self.products


def layers(model: CNN, image_size: int) -> list[Layer]:
    """Returns the layers of the network for square images, from the first layer to the last."""
    if not model.batch_norm:
        raise ValueError("The bytes are counted for a network with BatchNorm.")
    found = []
    side, channels = image_size, 3
    for i, features in enumerate(model.features, start=1):
        # The last convolution has no 2 x 2 pooling: its output is averaged over the whole image.
        pooled_side = side // 2 if i < len(model.features) else 1
        fan_in = _KERNEL_PIXELS * channels
        found.append(
            Layer(
                name=f"conv{i}",
                inputs=side**2 * channels,
                products=side**2 * features,
                outputs=pooled_side**2 * features,
                fan_in=fan_in,
                parameters=(fan_in + 3) * features,
                statistics=2 * features,
            )
        )
        side, channels = pooled_side, features
    for name, inputs, outputs in (
        ("dense", channels, model.dense),
        ("head", model.dense, model.num_classes),
    ):
        found.append(Layer(name, inputs, outputs, outputs, inputs, (inputs + 1) * outputs))
    return found


def training_passes(
    model: CNN, image_size: int, batch_size: int, activation_bytes: int
) -> list[Pass]:
    """Returns the passes over memory in a training step.

    The assumptions are listed at the top of this file.
    """
    forward: list[Pass] = []
    backward: list[Pass] = []  # These passes go from the last layer to the first.
    update: list[Pass] = []
    all_layers = layers(model, image_size)
    before = ""
    for layer in all_layers:
        name, last = layer.name, layer is all_layers[-1]
        flops = batch_size * layer.flops
        products = batch_size * layer.products * (_FLOAT32 if last else activation_bytes)
        inputs = _inputs(layer, before, batch_size, activation_bytes)
        parameters = {f"{name} parameters": layer.parameters * _FLOAT32}
        gradients = {f"{name} gradient of parameters": layer.parameters * _FLOAT32}
        moments = {f"{name} moments": 2 * layer.parameters * _FLOAT32}
        output = {f"{name} output": batch_size * layer.outputs * activation_bytes}
        gradient_of_output = {f"{name} gradient of output": sum(output.values())}
        layer_passes: list[Pass] = []
        if layer.statistics:
            convolved = {f"{name} convolved": products}
            gradient = {f"{name} gradient of convolved": products}
            statistics = {f"{name} statistics": layer.statistics * _FLOAT32}
            forward += [
                Pass(f"{name} product", flops, inputs | parameters, convolved),
                Pass(f"{name} normalise", 0, convolved | statistics, output | statistics),
            ]
            layer_passes.append(
                Pass(f"{name} normalise's gradient", 0, convolved | gradient_of_output, gradient)
            )
        elif last:
            # The loss and its gradient are fused with the matrix product, so memory never holds the
            # logits.
            gradient = {f"{name} gradient of logits": products}
            forward.append(Pass(f"{name} product and loss", flops, inputs | parameters, gradient))
        else:
            # The backward pass of the next layer already applies the gradients of this layer's ReLU
            # and dropout.
            gradient = gradient_of_output
            forward.append(Pass(f"{name} product", flops, inputs | parameters, output))
        layer_passes.append(Pass(f"{name} weights' gradient", flops, inputs | gradient, gradients))
        if before:  # The first layer is skipped, because the images need no gradient.
            # The matrix product is fused with an operation that also reads the inputs: the sums for
            # the previous layer's BatchNorm, or the gradients of the previous layer's ReLU and
            # dropout.
            input_gradient = {f"{before} gradient of output": sum(inputs.values())}
            layer_passes.append(
                Pass(
                    f"{name} inputs' gradient",
                    flops,
                    gradient | parameters | inputs,
                    input_gradient,
                )
            )
        backward = layer_passes + backward
        update.append(
            Pass(f"{name} Adam", 0, parameters | gradients | moments, parameters | moments)
        )
        before = name
    return forward + backward + update


def inference_passes(
    model: CNN, image_size: int, batch_size: int, activation_bytes: int
) -> list[Pass]:
    """Returns the passes over memory in an inference.

    The assumptions are listed at the top of this file.
    """
    passes: list[Pass] = []
    all_layers = layers(model, image_size)
    before = ""
    for layer in all_layers:
        inputs = _inputs(layer, before, batch_size, activation_bytes)
        constants = (layer.parameters + layer.statistics) * _FLOAT32
        width = _FLOAT32 if layer is all_layers[-1] else activation_bytes
        passes.append(
            Pass(
                f"{layer.name} all of it",
                batch_size * layer.flops,
                inputs | {f"{layer.name} parameters and statistics": constants},
                {f"{layer.name} output": batch_size * layer.outputs * width},
            )
        )
        before = layer.name
    return passes


def _inputs(layer: Layer, before: str, batch_size: int, activation_bytes: int) -> dict[str, int]:
    """Returns the name and the bytes of a layer's input: the previous output, or the images."""
    if before:
        return {f"{before} output": batch_size * layer.inputs * activation_bytes}
    return {"images": batch_size * layer.inputs}


def total(passes: Iterable[Pass]) -> Work:
    """Returns the floating-point operations and the memory traffic of all passes."""
    return sum((each.work for each in passes), Work(0, 0))


def compute_seconds(work: Work, peaks: Peaks) -> float:
    return work.flops / peaks.flops_per_second


def memory_seconds(work: Work, peaks: Peaks) -> float:
    return work.bytes / peaks.bytes_per_second


def floor_seconds(work: Work, peaks: Peaks) -> float:
    """Returns the shortest time of a computation whose arithmetic and memory transfers overlap."""
    return max(compute_seconds(work, peaks), memory_seconds(work, peaks))


def floor_seconds_by_pass(passes: Iterable[Pass], peaks: Peaks) -> float:
    """Returns the shortest possible total time of consecutive passes over memory."""
    return sum(floor_seconds(each.work, peaks) for each in passes)


def measure_peaks(precision: str) -> Peaks:
    """Measures the peak arithmetic rate and the peak memory bandwidth of JAX's default device.

    The arithmetic rate is that of a large matrix product; the bandwidth is that of scaling a large
    array.

    These are the rates that XLA reaches on JAX's default device, not the vendor's specifications.
    The products are of square matrices of the given precision ("float32" or "bfloat16"),
    with JAX's default for the arithmetic (on NVIDIA's GPUs, TF32 for float32), as the
    network's are; sums are float32. The array is scaled in place, so that each
    byte is read once and written once and no memory is allocated meanwhile.
    """
    on_cpu = jax.default_backend() == "cpu"
    # No matrix size is the fastest on all processors, so the best rate of several sizes is used.
    # The array of 256 MiB does not fit into a CPU's caches. On an accelerator all sizes are
    # larger, so that the computation takes much longer than the launch of its kernel.
    sides, length = ((1024, 1536, 2048), 2**26) if on_cpu else ((4096, 6144, 8192), 2**28)

    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))

    def product_rate(side: int) -> float:
        keys = jax.random.split(jax.random.key(0))
        a, b = (jax.random.normal(key, (side, side), jnp.dtype(precision)) for key in keys)
        return 2 * side**3 / _best_seconds(lambda: product(a, b))

    flops_per_second = max(product_rate(side) for side in sides)

    array = jnp.ones(length, jnp.float32)
    scale = jax.jit(jnp.multiply, donate_argnums=0)
    factor = jnp.float32(1)  # XLA would remove a product with the constant 1.

    def scale_in_place() -> jax.Array:
        nonlocal array
        array = scale(array, factor)
        return array

    bytes_per_second = 2 * _FLOAT32 * length / _best_seconds(scale_in_place)
    return Peaks(flops_per_second, bytes_per_second)


def _best_seconds(run: Callable[[], jax.Array]) -> float:
    jax.block_until_ready(run())  # The first call compiles the program, so it is not timed.
    seconds = []
    for _ in range(_REPETITIONS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


KINDS = {"training": training_passes, "inference": inference_passes}


def table(
    model: CNN, shapes: Iterable[tuple[int, int]], precision: str, peaks: Peaks
) -> list[dict[str, Any]]:
    """Returns two rows for each shape: one for the training step and one for inference."""
    rows = []
    for image_size, batch_size in shapes:
        for kind, count_passes in KINDS.items():
            passes = count_passes(model, image_size, batch_size, ACTIVATION_BYTES[precision])
            work = total(passes)
            rows.append(
                {
                    "kind": kind,
                    "image_size": image_size,
                    "batch_size": batch_size,
                    "flops": work.flops,
                    "bytes": work.bytes,
                    "compute_ms": 1e3 * compute_seconds(work, peaks),
                    "memory_ms": 1e3 * memory_seconds(work, peaks),
                    "floor_ms": 1e3 * floor_seconds(work, peaks),
                    "floor_by_pass_ms": 1e3 * floor_seconds_by_pass(passes, peaks),
                    "images_per_second": batch_size / floor_seconds(work, peaks),
                }
            )
    return rows


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """Parses a text such as "32x256,224x32"; an argparse type.

    Returns:
      Pairs of the side of an image in pixels and the batch size.
    """
    pairs = (shape.split("x") for shape in text.split(","))
    return tuple((int(side), int(batch_size)) for side, batch_size in pairs)


def _print_passes(passes: Iterable[Pass]) -> None:
    print(f"{'pass':<26} {'GFLOP':>7}  {'':<5} {'tensor':<31} {'KB':>9}")
    for each in passes:
        start = f"{each.name:<26} {each.flops / 1e9:>7.3f}"
        for what, tensors in (("read", each.reads), ("write", each.writes)):
            for tensor, size in tensors.items():
                print(f"{start:<34}  {what:<5} {tensor:<31} {size / 1e3:>9,.1f}")
                start = ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--shapes", type=parse_shapes, default="32x256,64x128,224x32", help="side x batch size"
    )
    parser.add_argument("--precision", choices=sorted(ACTIVATION_BYTES), default="float32")
    parser.add_argument("--peaks", type=Path, metavar="FILE", help="the JSON of another run")
    parser.add_argument("--passes", action="store_true", help="print the tensors of each pass, too")
    parser.add_argument("--json", type=Path, help="write the metrics to this file, too")
    flags = parser.parse_args()
    model = CNN(num_classes=10)
    if flags.peaks:
        measured = json.loads(flags.peaks.read_text())
        if measured["precision"] != flags.precision:
            parser.error(f"{flags.peaks} was measured with --precision={measured['precision']}")
        device, peaks = measured["device"], Peaks(**measured["peaks"])
    else:
        device, peaks = jax.devices()[0].device_kind, measure_peaks(flags.precision)
    rows = table(model, flags.shapes, flags.precision, peaks)

    print(
        f"{device}, {os.cpu_count()} cores, JAX {jax.__version__}, {flags.precision}: "
        f"{peaks.flops_per_second / 1e9:,.0f} GFLOP/s, "
        f"{peaks.bytes_per_second / 1e9:,.1f} GB/s\n"
    )
    print(
        f"{'':<9}  {'pixels':>6}  {'batch':>5}  {'MFLOP/image':>11}  {'MB/image':>8}  "
        f"{'compute ms':>10}  {'memory ms':>9}  {'floor ms':>8}  {'by pass ms':>10}  "
        f"{'images/s':>9}"
    )
    for row in rows:
        images = row["batch_size"]
        print(
            f"{row['kind']:<9}  {row['image_size']:>6}  {images:>5}  "
            f"{row['flops'] / images / 1e6:>11,.1f}  {row['bytes'] / images / 1e6:>8.3f}  "
            f"{row['compute_ms']:>10.3f}  {row['memory_ms']:>9.3f}  {row['floor_ms']:>8.3f}  "
            f"{row['floor_by_pass_ms']:>10.3f}  {row['images_per_second']:>9,.0f}"
        )
    if flags.passes:
        for image_size, batch_size in flags.shapes:
            for kind, count_passes in KINDS.items():
                print(f"\n{kind}, {image_size} pixels, {batch_size} images")
                width = ACTIVATION_BYTES[flags.precision]
                _print_passes(count_passes(model, image_size, batch_size, width))
    if flags.json:
        values = {
            "device": device,
            "cores": os.cpu_count(),
            "jax": jax.__version__,
            "precision": flags.precision,
            "peaks": asdict(peaks),
            "rows": rows,
        }
        flags.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
