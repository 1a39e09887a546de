"""Compiles the programs of a run for accelerators that this machine does not have.

    pip install -e '.[tpu]'        # for TPUs; XLA's compiler for TPUs is a part of libtpu
    pip install jax-cuda13-plugin jax-cuda13-pjrt    # for GPUs; no other CUDA package is needed
    python experiments/checks/aot.py --topology=v5e:2x2 [--config=configs/default.py]
        [--batch_per_device=128] [--images=10000] [--classes=10] [--programs=train_step,prediction]
        [--top=10] [--json=FILE] [--hlo=FOLDER] [--config.KEY=VALUE ...]

XLA compiles a program for a description of devices (`jax.experimental.topologies`) without the
devices. The topology is a group of TPUs, such as v5e:2x2, v4:2x2x1 or v6e:4x4, or one GPU (h100),
or eight GPUs of one host (h100:8). No program runs, so this program measures no time. It prints
what the optimized programs contain:

- the memory that each device needs;
- the floating-point operations of a device;
- the kernels (the operations that are not inside a fusion), and the bytes of their operands and
  results in the device's main memory. An operand from which a kernel gathers rows counts with the
  gathered rows only. A loop counts as often as it runs;
- the collective operations, with their dtypes;
- the arrays that are copied only to change their layout;
- for TPUs, XLA's own estimate of the cycles of each kernel. XLA does not estimate gathers, scatters
  and select-and-scatters, so the number of kernels without an estimate is printed too.

On a GPU, XLA normally measures several implementations of each convolution and takes the
fastest. Without a GPU it takes a default, so a run may use other kernels.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from cnn_jax.config import files, schema
from cnn_jax.config.resolve import resolve
from cnn_jax.config.schema import Config, image_size
from cnn_jax.data import augment
from cnn_jax.data.augment import Augmentation
from cnn_jax.data.preprocessing import Preprocessing
from cnn_jax.inference.batching import BATCH_SIZE
from cnn_jax.inference.predictor import jit_prediction
from cnn_jax.models.network import make_model
from cnn_jax.system import cli
from cnn_jax.system.errors import UserError
from cnn_jax.training.optimizer import make_schedule
from cnn_jax.training.programs import default_execution_length, make_programs, pack

PROGRAMS = ("train_step", "train_steps", "update_statistics", "eval_step", "prediction")

# The description of an H100 for XLA, in the text format of `GpuTargetConfigProto`.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def topology_devices(topology: str) -> Sequence[Any]:
    """Returns the devices of a topology, for which programs can be compiled but not run.

    Args:
      topology: "h100", "h100:N" for N GPUs of one host, or a name of libtpu such as "v5e:2x2".

    Raises:
      UserError: The plug-in of the platform is not installed, or does not know the topology.
    """
    name, _, count = topology.partition(":")
    is_gpu = name == "h100"
    # Without these variables, libtpu looks for the TPU of this machine, and only one process may
    # use libtpu.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        if is_gpu:
            shape = f"1x1x{count or 1}"
            return topologies.get_topology_desc(
                "", "cuda", target_config=_H100, topology=shape
            ).devices
        return topologies.get_topology_desc(topology, "tpu").devices
    except Exception as error:  # JAX and the plug-ins raise errors of many types.
        packages = "jax-cuda13-plugin jax-cuda13-pjrt" if is_gpu else "'cnn_jax[tpu]'"
        raise UserError(
            f"--topology={topology}: {str(error).partition(chr(10))[0]} (pip install {packages})"
        ) from error


def abstract_programs(
    config: Config,
    devices: Sequence[Any],
    *,
    images: int = 10_000,
    classes: int = 10,
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Returns the jitted functions of a run, by name, and abstract arguments of each function.

    Args:
      config: The configuration, with the size of the global batch.
      devices: The devices of the run.
      images: The number of images in the data set. They are kept on the devices if `data.cache` is
        "auto" or "device".
      classes: The number of classes.
    """
    platform = devices[0].platform
    config = resolve(config, platform=platform)
    preprocessing = Preprocessing.from_config(config.data)
    model = make_model(config.model.to_dict(), classes, config.precision, config.train.from_stage)
    programs = make_programs(
        config,
        model,
        make_schedule(config.optimizer.learning_rate, 0.0, total_steps=1000),
        preprocessing,
        np.full(classes, images // classes),
        devices=devices,
    )
    batch_size, size = config.train.batch_size, preprocessing.image_size
    on_device = config.data.cache in ("auto", "device")
    length = config.train.steps_per_execution or default_execution_length(on_device, platform)

    state = jax.eval_shape(programs.init_state)
    pixels = None
    batch = {"label": ((), np.int32), "mask": ((), bool)}
    if on_device:
        one = pack(np.zeros((1, *size, 3), np.uint8))
        pixels = jax.ShapeDtypeStruct((images, *one.shape[1:]), np.uint8)
        batch["row"] = ((), np.int32)
    else:
        batch["image"] = ((*size, 3), np.uint8)
    draws = {}
    augmentation = Augmentation.from_config(config.augment)
    if config.augment.place == "device" and not augmentation.is_identity():
        arrays = augment.draw(np.random.default_rng(0), augmentation, 1, size)
        draws = {name: (array.shape[1:], array.dtype) for name, array in arrays.items()}

    def shapes(arrays: Mapping[str, Any], *leading: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((*leading, *shape), dtype)
            for name, (shape, dtype) in arrays.items()
        }

    trained, evaluated = batch | draws, shapes(batch, batch_size)
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    on_first = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    variables = jax.tree.map(lambda leaf: on_first(leaf.shape, leaf.dtype), state.variables)
    return {
        "train_step": (programs.train_step, (state, shapes(trained, batch_size), pixels, None)),
        "train_steps": (
            programs.train_steps,
            (state, shapes(trained, length, batch_size), pixels, None),
        ),
        "update_statistics": (
            programs.update_statistics,
            (jax.eval_shape(programs.empty_statistics), state.variables, evaluated, pixels),
        ),
        "eval_step": (programs.eval_step, (state.variables, evaluated, pixels)),
        "prediction": (
            jit_prediction(model, preprocessing, platform),
            (variables, on_first((), np.float32), on_first((BATCH_SIZE, *size, 3), np.uint8)),
        ),
    }


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An operation of an optimized program that is not a part of a fusion.

    Attributes:
      name: The name of the operation.
      opcode: The opcode, such as "fusion"; for a call of a library, the name of the function.
      source: The JAX operation that the kernel was compiled from.
      type: The dtype, the shape and the layout of the results.
      calls: The number of executions in one execution of the program.
      bytes: The bytes of operands and results in main memory, in one execution of the kernel.
      cycles: XLA's estimate for one execution of the kernel; None if there is no estimate.
    """

    name: str
    opcode: str
    source: str
    type: str
    calls: int
    bytes: int
    cycles: int | None

    @property
    def is_collective(self) -> bool:
        """Whether the kernel exchanges data between devices."""
        return self.opcode.startswith(_COLLECTIVES)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The contents of a program that was compiled for a device.

    Attributes:
      memory: The bytes of arguments, results that are no arguments, and temporary arrays.
      flops: Floating-point operations, as XLA counts them; None if XLA does not count them.
      kernels: The kernels.
      collectives: The operations that exchange data between devices.
      exchanged: The bytes of the results of the collectives, in any memory of a device.
      copies: The kernels that only change the layout of an array.
    """

    memory: Mapping[str, int]
    flops: float | None
    kernels: Sequence[Kernel]
    collectives: Sequence[Kernel]
    exchanged: int
    copies: Sequence[Kernel]

    @property
    def bytes(self) -> int:
        """The bytes that all kernels read and write in main memory."""
        return sum(kernel.calls * kernel.bytes for kernel in self.kernels)

    @property
    def cycles(self) -> int:
        """The sum of XLA's estimates of cycles; 0 if there are none."""
        return sum(kernel.calls * (kernel.cycles or 0) for kernel in self.kernels)


def analyse(compiled: jax.stages.Compiled) -> Analysis:
    """Returns the memory, FLOPs, kernels, collectives and copies of a compiled program."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    costs = compiled.cost_analysis() or {}
    module = Module(text)
    kernels = list(module.kernels())
    collectives = [kernel for kernel in kernels if kernel.is_collective]
    return Analysis(
        memory={
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
        flops=costs.get("flops"),
        kernels=kernels,
        collectives=collectives,
        exchanged=sum(each.calls * _size(each.type, main_only=False) for each in collectives),
        copies=[kernel for kernel in kernels if module.changes_layout(kernel.name)],
    )


_ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16, "token": 0}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# These operations do nothing when the program runs, or their operands count elsewhere.
_NO_KERNELS = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "partition-id", "replica-id", "iota"),
}
_SLICES = ("gather", "dynamic-slice", "slice")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """The names of the operands."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, name: str) -> str | None:
        """Returns the name of the HLO computation that an attribute such as "calls" refers to."""
        found = re.search(rf"\b{name}=%?([\w.-]+)", self.attributes)
        return found and found[1]


class Module:
    """The computations of an optimized HLO module, parsed from its text."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, _Instruction]] = {}
        self.entry = ""
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                current = self.computations[found[1]] = {}
                if line.startswith("ENTRY"):
                    self.entry = found[1]
            elif found := _INSTRUCTION.match(line):
                name, result, opcode, rest = found.groups()
                end = _closing(rest)
                is_root = line.lstrip().startswith("ROOT")
                current[name] = _Instruction(name, result, opcode, rest[:end], rest[end:], is_root)
        self._by_name = {
            name: instruction
            for computation in self.computations.values()
            for name, instruction in computation.items()
        }

    def kernels(self) -> Iterator[Kernel]:
        """Yields the kernels of the entry computation, of its loops and of its calls."""
        yield from self._kernels(self.entry, 1)

    def _kernels(self, computation: str, calls: int) -> Iterator[Kernel]:
        instructions = self.computations[computation]
        for each in instructions.values():
            opcode = each.opcode
            if opcode in _NO_KERNELS or opcode.endswith(("-done", "-update")):
                continue
            if opcode == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', each.attributes)
                body = each.attribute("body")
                assert body is not None
                yield from self._kernels(body, calls * int(trips[1]) if trips else calls)
                continue
            inner = each.attribute("to_apply" if opcode == "call" else "calls")
            if inner and opcode in ("call", "async-start"):
                yield from self._kernels(inner, calls)
                continue
            target = re.search(r'custom_call_target="([^"]+)"', each.attributes)
            cycles = re.search(r'"estimated_cycles":"(\d+)"', each.attributes)
            source = re.search(r'op_name="([^"]+)"', each.attributes)
            yield Kernel(
                name=each.name,
                opcode=target[1] if target else opcode,
                source=source[1] if source else "",
                type=each.type,
                calls=calls,
                bytes=self._bytes(instructions, each),
                cycles=int(cycles[1]) if cycles else None,
            )

    def _bytes(self, instructions: Mapping[str, _Instruction], each: _Instruction) -> int:
        called = each.attribute("calls") if each.opcode == "fusion" else None
        total = 0
        if each.opcode in _SLICES:
            total = 2 * _size(each.type)
        elif each.opcode.endswith("-start"):  # The result repeats the operands.
            total = 2 * sum(_size(instructions[name].type) for name in each.operands[:1])
        else:
            total = _size(each.type)
            for index, name in enumerate(each.operands):
                size = _size(instructions[name].type) if name in instructions else 0
                total += min(size, self._read_bytes(called, index)) if called else size
        return total

    def _read_bytes(self, computation: str, index: int) -> int:
        """Returns the bytes of a parameter that a fusion reads."""
        instructions = self.computations[computation]
        names = {
            each.name
            for each in instructions.values()
            if each.opcode == "parameter" and each.arguments == str(index)
        }
        users = [each for each in instructions.values() if names & set(each.operands)]
        if users and all(each.opcode in _SLICES for each in users):
            return sum(_size(each.type) for each in users)
        return sys.maxsize

    def changes_layout(self, name: str) -> bool:
        """Returns whether an instruction only copies its operand to another layout."""
        each = self._by_name[name]
        called = each.attribute("calls") if each.opcode == "fusion" else None
        if called:
            inner = self.computations[called].values()
            work = {i.opcode for i in inner if i.opcode not in _NO_KERNELS}
            return bool(work) and work <= {"copy", "transpose", "reshape"}
        return each.opcode in ("copy", "transpose")


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes an open one before the text."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return index
    return len(text)


def _size(type_text: str, main_only: bool = True) -> int:
    """Returns the bytes of the arrays of an HLO type, by default only of those in main memory."""
    total = 0
    for dtype, sides, layout in _ARRAY.findall(type_text):
        # Another memory space, such as the vector memory of a TPU core.
        if main_only and "S(" in layout:
            continue
        bits = re.search(r"\d+", dtype)
        item = _ITEM_BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
        total += int(item * np.prod([int(side) for side in sides.split(",") if side], dtype=float))
    return total


def report(analysis: Analysis, top: int) -> str:
    """Describes a program in a few lines, with its largest kernels.

    Args:
      analysis: The contents of the program.
      top: The number of kernels with the most bytes, and the number of kernels with the most
        cycles, that are listed in the order of the program.
    """
    memory = ", ".join(f"{key} {size / 1e6:,.1f} MB" for key, size in analysis.memory.items())
    flops = "unknown" if analysis.flops is None else f"{analysis.flops / 1e9:,.1f} GFLOP"
    exchanged = f"results {analysis.exchanged / 1e6:,.1f} MB"
    lines = [
        f"  memory       {memory}",
        f"  operations   {flops}",
        f"  kernels      {_total(analysis.kernels)}",
        f"  collectives  {_total(analysis.collectives)}; {exchanged}",
        f"  new layouts  {_total(analysis.copies)}",
    ]
    if analysis.cycles:
        unknown = [kernel for kernel in analysis.kernels if kernel.cycles is None]
        lines.append(
            f"  cycles       {analysis.cycles / 1e6:,.1f} M; not estimated: {_total(unknown)}"
        )
    if top:
        lines.append(f"  {'calls':>5} {'MB':>9} {'kcycles':>9}  kernel")
    for kernel in _largest(analysis.kernels, top):
        cycles = "" if kernel.cycles is None else f"{kernel.cycles / 1e3:,.0f}"
        lines.append(
            f"  {kernel.calls:>5} {kernel.bytes / 1e6:>9,.1f} {cycles:>9}  "
            f"{kernel.name} {kernel.type} {kernel.source}"
        )
    return "\n".join(lines)


def _total(kernels: Sequence[Kernel]) -> str:
    size = sum(kernel.calls * kernel.bytes for kernel in kernels)
    return f"{len(kernels):,}, {size / 1e9:,.3f} GB"


def _largest(kernels: Sequence[Kernel], top: int) -> list[Kernel]:
    """Returns the kernels with the most bytes or the most cycles, in their order."""

    def names(weight: Callable[[Kernel], int]) -> set[str]:
        return {kernel.name for kernel in sorted(kernels, key=weight)[:top]}

    most_bytes = names(lambda kernel: -kernel.calls * kernel.bytes)
    most_cycles = names(lambda kernel: -kernel.calls * (kernel.cycles or 0))
    chosen = most_bytes | most_cycles
    return [kernel for kernel in kernels if kernel.name in chosen]


def main(argv: Sequence[str]) -> None:
    parser = files.ConfigParser(prog="aot.py", description=__doc__)
    parser.add_argument("--topology", required=True, help="such as v5e:2x2, h100 or h100:8")
    parser.add_argument(
        "--batch_per_device", type=cli.positive, default=128, help="number of images"
    )
    parser.add_argument("--images", type=cli.positive, default=10_000, help="in the data set")
    parser.add_argument("--classes", type=cli.positive, default=10)
    parser.add_argument("--programs", default=",".join(PROGRAMS), help="separated by commas")
    parser.add_argument("--top", type=cli.natural, default=10, help="number of kernels to print")
    parser.add_argument("--json", type=pathlib.Path, help="write the analyses to this file, too")
    parser.add_argument("--hlo", type=pathlib.Path, help="write the programs to this folder, too")
    flags, overrides = parser.parse_with_overrides(argv)
    jax.config.update("jax_platforms", "cpu")
    config = files.load(flags.config, overrides)
    names = flags.programs.split(",")
    for name in names:
        if name not in PROGRAMS:
            raise UserError(f"--programs: must be among {', '.join(PROGRAMS)}, got {name!r}")
    devices = topology_devices(flags.topology)
    config.train.batch_size = flags.batch_per_device * len(devices) // config.mesh.model
    schema.validate(config, len(devices))
    programs = abstract_programs(config, devices, images=flags.images, classes=flags.classes)
    hosts = len({device.process_index for device in devices})
    state = jax.tree.leaves(programs["train_step"][1][0])
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
    print(
        f"JAX {jax.__version__}, {len(devices)} x {devices[0].device_kind} of {hosts} hosts, "
        f"{flags.batch_per_device} images each; the train state has {state_bytes / 1e6:,.1f} MB"
    )
    results = {}
    for name in names:
        function, arguments = programs[name]
        start = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        seconds = time.perf_counter() - start
        results[name] = analyse(compiled)
        print(f"\n{name}, compiled in {seconds:.0f} s")
        print(report(results[name], flags.top), flush=True)
        if flags.hlo:
            flags.hlo.mkdir(parents=True, exist_ok=True)
            (flags.hlo / f"{name}.txt").write_text(str(compiled.as_text()))
    if flags.json:
        values = {
            "devices": len(devices),
            "hosts": hosts,
            "batch_per_device": flags.batch_per_device,
            "image_size": image_size(config),
            "state_bytes": state_bytes,
            "programs": {name: dataclasses.asdict(result) for name, result in results.items()},
        }
        flags.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
