"""Writes the results of `gpu_report.sh` to the files results.json and report.md.

python experiments/benchmarks/gpu_table.py WORK FOLDER      collect the parts in WORK/parts.jsonl
python experiments/benchmarks/gpu_table.py --facts FILE     device and versions; fails without a GPU
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

# The exit statuses of the command `timeout` after SIGTERM and after SIGKILL.
_TIMED_OUT = (124, 137)


def facts() -> dict[str, Any]:
    """Returns a description of the device, and the versions of the libraries.

    Raises:
      SystemExit: JAX uses the CPU although JAX_PLATFORMS does not select it.
    """
    import jax

    device = jax.devices()[0]
    if device.platform == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        sys.exit(
            "JAX sees no GPU; to try all on the CPU: "
            "bash experiments/benchmarks/gpu_report.sh --try all"
        )
    found: dict[str, Any] = {
        "device": device.device_kind,
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    for package in ("jax", "flax", "optax", "torch", "triton", "jax-cuda13-plugin"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv"]
        found["nvidia-smi"] = subprocess.check_output(query, text=True).splitlines()[-1]
    except (OSError, subprocess.CalledProcessError):
        pass
    return found


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats rows as a Markdown table; numbers get at least three significant digits."""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def roofline_table(found: Mapping[str, Any]) -> str:
    peaks = found["peaks"]
    line = (
        f"{found['precision']} matrix products: {peaks['flops_per_second'] / 1e12:.4g} TFLOP/s; "
        f"memory: {peaks['bytes_per_second'] / 1e12:.3g} TB/s\n\n"
    )
    columns = ("kind", "image_size", "batch_size", "floor_ms", "floor_by_pass_ms")
    headers = ("", "pixels", "batch", "floor ms", "floor by pass ms")
    return line + markdown(headers, ([row[key] for key in columns] for row in found["rows"]))


def step_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the step times of several libraries as a Markdown table, one row for each library."""
    headers = ("pixels", "batch", "", "ms", "images/s", "/ cnn_jax", "/ floor")
    lines = []
    for row in rows:
        ours = next(iter(row["ms"].values()))
        for name, ms in row["ms"].items():
            shape, rate = (row["image_size"], row["batch_size"]), 1e3 * row["batch_size"] / ms
            lines.append((*shape, name, ms, rate, ours / ms, ms / row["floor_ms"]))
    return markdown(headers, lines)


def run_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "config": "config",
        "batch": "batch_size",
        "epochs": "epochs_done",
        "images/s": "images_per_second",
        "bare images/s": "bare",
        "epochs s": "seconds",
        "all s": "wall_seconds",
        "peak MB": "peak_megabytes",
        "validation accuracy": "validation_accuracy",
        "test accuracy": "test_accuracy",
    }
    lines = []
    for row in rows:
        row = dict(row)
        for key in ("validation_accuracy", "test_accuracy"):
            row[key] = f"{row[key]:.2%}" if key in row else None
        lines.append([row.get(key) for key in columns.values()])
    return markdown(tuple(columns), lines)


def check_table(found: Mapping[str, Any]) -> str:
    columns = {
        "ms a step": "ms",
        "20 steps again are equal": "same_in_process",
        "in another process": "same_in_other_process",
        "peak MB": "peak_megabytes",
    }
    variants = found["variants"].items()
    lines = [[name, *(row.get(key) for key in columns.values())] for name, row in variants]
    text = markdown((f"{found['image_size']} px, {found['batch_size']} images", *columns), lines)
    if differences := found.get("gradient_differences"):
        rows = (
            (name, f"{difference:.2e}")
            for name, difference in sorted(differences.items(), key=lambda item: -item[1])
        )
        text += "\n\n" + markdown(("bfloat16 gradient against float32", "difference"), rows)
    return text


def serve_table(found: Mapping[str, Any]) -> str:
    columns = {"concurrency": "concurrency", "images/s": "per_second", "p50 ms": "p50"}
    columns |= {"p99 ms": "p99"}
    text = markdown(tuple(columns), ([s[k] for k in columns.values()] for s in found["servers"]))
    return f"without a server: {found['bare_milliseconds']:.2f} ms an image\n\n{text}"


def seeds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    headers = ("pixels", "batch", "networks", "single ms", "lax.map ms", "vmap ms")
    keys = ("image_size", "batch_size", "networks")
    return markdown(headers, ([*(row[key] for key in keys), *row["ms"].values()] for row in rows))


def tests_summary(log: str) -> dict[str, Any]:
    """Parses the output of `pytest -v`; returns test counts by outcome, and the failed tests."""
    outcomes: dict[str, str] = {}
    for line in log.splitlines():
        # pytest prints "tests/a.py::b PASSED [ 10%]"; with xdist, it prints
        # "[gw0] [ 10%] PASSED tests/a.py::b".
        test = re.search(r"tests/\S+::.*?(?=\s+(?:PASSED|FAILED|ERROR|SKIPPED)|$)", line)
        outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if test and outcome and not line.startswith(("FAILED", "ERROR", "SKIPPED")):
            outcomes[test[0].strip()] = outcome[1].lower()
    counts: dict[str, int] = dict.fromkeys(("passed", "failed", "error", "skipped"), 0)
    for outcome in outcomes.values():
        counts[outcome] += 1
    failures = [test for test, outcome in outcomes.items() if outcome in ("failed", "error")]
    return {**counts, "failures": failures}


def tests_table(found: Mapping[str, Any]) -> str:
    counts = [f"{found[name]} {name}" for name in ("passed", "failed", "error", "skipped")]
    return "\n".join([", ".join(counts), *(f"- {test}" for test in found["failures"])])


PARTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "roofline": ("Peaks and floors", roofline_table),
    "train": ("Training step, bfloat16", step_table),
    "train_compiled": ("Training step beside torch.compile, bfloat16", step_table),
    "run": ("The whole specification run", run_table),
    "check": ("Checks of the training step", check_table),
    "run_fast": ("The same run by configs/fast.py", run_table),
    "inference": ("Inference, bfloat16", step_table),
    "tests": ("Tests on this device", tests_table),
    "serve": ("Server", serve_table),
    "train_small": ("Training step at 32 and 64 pixels, bfloat16", step_table),
    "seeds": ("Several seeds at once, milliseconds of a step of one network", seeds_table),
}


def collect(work: pathlib.Path) -> dict[str, Any]:
    """Reads the results of all finished measurements from the folder `work`."""
    parts = {}
    for line in (work / "parts.jsonl").read_text().splitlines():
        part = json.loads(line)
        name = part.pop("name")
        file = work / f"{name}.json"
        if name == "tests":
            part["found"] = tests_summary((work / "tests.log").read_text())
        elif file.exists():
            part["found"] = json.loads(file.read_text())
        parts[name] = part
    return {"facts": json.loads((work / "facts.json").read_text()), "parts": parts}


def report(results: Mapping[str, Any]) -> str:
    """Returns a Markdown report with a table for each measurement."""
    known = {key: value for key, value in results["facts"].items() if value is not None}
    text = ["; ".join(f"{key} {value}" for key, value in known.items())]
    for name, part in results["parts"].items():
        title, table = PARTS[name]
        outcome = f"{part['seconds']} s"
        if part["exit"] in _TIMED_OUT:
            outcome = f"ended at its limit of {part['limit']} s"
        elif part["exit"]:
            outcome += f", failed with exit status {part['exit']}"
        text.append(f"### {title}\n\n({outcome})")
        if "found" in part:
            text.append(table(part["found"]))
    return "\n\n".join(text) + "\n"


def main() -> None:
    first, second = sys.argv[1:]
    if first == "--facts":
        pathlib.Path(second).write_text(json.dumps(facts()) + "\n")
        return
    folder = pathlib.Path(second)
    results = collect(pathlib.Path(first))
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.md").write_text(report(results))


if __name__ == "__main__":
    main()
