"""Plans a run on many chips: step time, input, storage, checkpoints and cost.

    python experiments/checks/aot.py --topology=v5e:8x8 --programs=train_step --top=0 \
        --json=aot.json --classes=1000 --config.model.name=resnet50 \
        --config.data.image_size=224 --config.data.cache=disk
    python experiments/studies/scaling_plan.py --aot=aot.json --images=10000000

Each row of the table is a calculation. Its numbers come from the compiled program, from the data
set or from the assumptions at the top of the table, which are flags. The time of a step is a lower
bound, because XLA does not estimate all kernels: if you have measured a step, pass --step_ms.
"""

import argparse
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

# The default and the meaning of each flag. The rates of a chip are those of a TPU v5e.
ASSUMED = {
    "clock_ghz": (1.5, "GHz, clock of a chip"),
    "peak_tflops": (197.0, "TFLOP/s of a chip in bfloat16"),
    "memory_gbps": (819.0, "GB/s, main memory of a chip"),
    "memory_gb": (16.0, "GB, main memory of a chip"),
    "link_gbps": (45.0, "GB/s, one link between two chips in one direction"),
    "copy_gbps": (10.0, "GB/s, from a chip to its host"),
    "ram_gb": (192.0, "GB, RAM of a host"),
    "cores": (112.0, "cores of a host"),
    "network_gbps": (1.0, "GB/s, between a host and the object storage"),
    "file_kb": (100.0, "kB, mean size of an image file"),
    "decode_ms": (2.3, "ms of one core to decode and resize a file"),
    "epochs": (90.0, "epochs"),
    "uptime_hours": (6.0, "h, mean time between two preemptions"),
    "restart_minutes": (10.0, "min, from a preemption to the next step"),
    "price": (1.0, "price of a chip for an hour"),
}


def plan(
    aot: Mapping[str, Any], images: int, a: argparse.Namespace, step_ms: float | None = None
) -> Iterator[tuple[str, str, float, str]]:
    """Yields the name, the calculation, the value and the unit of each row.

    `aot` is the JSON of aot.py, and `a` has a value for each name in `ASSUMED`. If `step_ms` is
    None, a step takes the lower bound.
    """
    program, chips, hosts = aot["programs"]["train_step"], aot["devices"], aot["hosts"]
    batch, (height, width), state = aot["batch_per_device"], aot["image_size"], aot["state_bytes"]

    def total(kernels: str, key: str) -> float:
        return sum(each["calls"] * (each[key] or 0) for each in program[kernels])

    cycles, flops, traffic = total("kernels", "cycles"), program["flops"], total("kernels", "bytes")
    bounds = cycles / a.clock_ghz / 1e6, flops / a.peak_tflops / 1e9, traffic / a.memory_gbps / 1e6
    yield "step, by cycles", f"{cycles / 1e6:,.1f} M / clock", bounds[0], "ms"
    yield "step, by operations", f"{flops / 1e9:,.0f} GFLOP / peak", bounds[1], "ms"
    yield "step, by memory", f"{traffic / 1e9:,.2f} GB / main memory", bounds[2], "ms"
    # In a ring, each chip sends almost twice the bytes of the sum.
    sums = program["exchanged"]
    exchange = 2 * sums / a.link_gbps / 1e6
    yield "sums over the chips", f"2 x {sums / 1e6:,.1f} MB / link", exchange, "ms"
    step = (step_ms or max(bounds) + exchange) / 1e3
    yield "step", "measured" if step_ms else "longest of the three + sums", step * 1e3, "ms"
    image, rate = height * width * 3, batch / step
    yield "image", f"{height} x {width} x 3 bytes", image / 1e3, "kB"
    yield "images of a chip", f"{batch} / step", rate, "images/s"
    yield "input of a chip", "images x image", rate * image / 1e6, "MB/s"
    rate *= chips / hosts
    yield "images of a host", f"x {chips} chips / {hosts} hosts", rate, "images/s"
    yield "input of a host, decoded", "images x image", rate * image / 1e6, "MB/s"
    yield "input of a host, files", "images x file", rate * a.file_kb / 1e3, "MB/s"
    yield "cores to decode the files", "images x time to decode", rate * a.decode_ms / 1e3, "cores"
    yield "all images, decoded", f"{images:,} x image", images * image / 1e9, "GB"
    yield "data.cache=device up to", "memory / 4 / image", a.memory_gb * 1e9 / 4 // image, "images"
    yield "data.cache=memory up to", "RAM / 4 / image", a.ram_gb * 1e9 / 4 // image, "images"
    download = images * a.file_kb / a.network_gbps / 1e6 / 60
    yield "copy all files to a host", f"{images:,} x file / network", download, "min"
    decode = images * a.decode_ms / 1e3 / a.cores / 60
    yield "decode all files once", f"{images:,} x time to decode / cores", decode, "min"
    steps = math.ceil(0.7 * images / (batch * chips))
    yield "steps of an epoch", f"70 % of {images:,} / ({batch} x {chips})", steps, ""
    # A forward pass has about a third of the operations of a training step.
    epoch = (steps + 0.2 * images / (batch * chips) / 3) * step
    yield "epoch", "steps + validation of 20 %, at a third", epoch / 60, "min"
    wait, upload = state / a.copy_gbps / 1e9, state / a.network_gbps / 1e9
    yield "checkpoint", "the train state", state / 1e6, "MB"
    yield "training waits", "checkpoint / copy to the host", wait * 1e3, "ms"
    yield "upload in the background", "checkpoint / network", upload, "s"
    # Young 1974, "A first order approximation to the optimum checkpoint interval".
    interval = max(math.sqrt(2 * wait * a.uptime_hours * 3600), upload)
    yield "time between checkpoints", "sqrt(2 x wait x uptime), at least upload", interval, "s"
    yield "checkpoint.every_steps", "time between checkpoints / step", interval // step, ""
    lost = interval / 2 + a.restart_minutes * 60
    yield "lost by a preemption", "half the time between + restart", lost / 60, "min"
    hours = a.epochs * epoch / 3600 * (1 + wait / interval + lost / 3600 / a.uptime_hours)
    yield "run", "epochs + waits + losses", hours, "h"
    yield "cost", f"run x {chips} x price", hours * chips * a.price, ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--aot", required=True, type=pathlib.Path, help="the JSON of aot.py")
    parser.add_argument("--images", required=True, type=int)
    parser.add_argument("--step_ms", type=float, help="the measured time of a step")
    for name, (default, meaning) in ASSUMED.items():
        parser.add_argument(f"--{name}", type=float, default=default, help=meaning)
    flags = parser.parse_args()
    print("| | calculation | value |\n| --- | --- | --- |")
    for name, (_, meaning) in ASSUMED.items():
        print(f"| assumed: {meaning} | `--{name}` | {getattr(flags, name):g} |")
    rows = plan(json.loads(flags.aot.read_text()), flags.images, flags, flags.step_ms)
    for name, calculation, value, unit in rows:
        text = f"{value:,.{1 if value < 100 else 0}f} {unit}"
        print(f"| {name} | {calculation} | {text.strip()} |")


if __name__ == "__main__":
    main()
