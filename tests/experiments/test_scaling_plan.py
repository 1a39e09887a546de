import json
import sys

import pytest

from experiments.studies import scaling_plan

KERNEL = {"calls": 2, "cycles": 3_000_000, "bytes": 1_000_000_000}
AOT = {
    "devices": 8,
    "hosts": 2,
    "batch_per_device": 100,
    "image_size": [10, 10],
    "state_bytes": 1_000_000_000,
    "programs": {
        "train_step": {
            "flops": 1e12,
            "kernels": [KERNEL, {"calls": 1, "cycles": None, "bytes": 0}],
            "exchanged": 200_000_000,
        }
    },
}
FLAGS = {
    "clock_ghz": 1,
    "peak_tflops": 100,
    "memory_gbps": 100,
    "memory_gb": 1.2,
    "link_gbps": 40,
    "copy_gbps": 10,
    "ram_gb": 2.4,
    "cores": 50,
    "network_gbps": 0.5,
    "file_kb": 30,
    "decode_ms": 3,
    "epochs": 100,
    "uptime_hours": 2,
    "restart_minutes": 1,
    "price": 2,
}


def table(tmp_path, monkeypatch, capsys, *more):
    """Returns the value of each row of the printed table, by the row's name."""
    path = tmp_path / "aot.json"
    path.write_text(json.dumps(AOT))
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    monkeypatch.setattr(
        sys, "argv", ["scaling_plan.py", f"--aot={path}", "--images=1000000", *flags, *more]
    )
    scaling_plan.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    return {name: value for name, _, value in rows}


def test_the_rows_are_those_computed_by_hand(tmp_path, monkeypatch, capsys):
    assert FLAGS.keys() == scaling_plan.ASSUMED.keys()
    rows = table(tmp_path, monkeypatch, capsys)
    found = {name: value for name, value in rows.items() if not name.startswith("assumed: ")}
    assert len(rows) == len(found) + len(FLAGS)
    assert found == {
        "step, by cycles": "6.0 ms",  # 2 * 3 M / 1 GHz
        "step, by operations": "10.0 ms",  # 1 TFLOP / 100 TFLOP/s
        "step, by memory": "20.0 ms",  # 2 GB / 100 GB/s
        "sums over the chips": "10.0 ms",  # 2 * 0.2 GB / 40 GB/s
        "step": "30.0 ms",
        "image": "0.3 kB",
        "images of a chip": "3,333 images/s",
        "input of a chip": "1.0 MB/s",
        "images of a host": "13,333 images/s",
        "input of a host, decoded": "4.0 MB/s",
        "input of a host, files": "400 MB/s",
        "cores to decode the files": "40.0 cores",
        "all images, decoded": "0.3 GB",
        "data.cache=device up to": "1,000,000 images",
        "data.cache=memory up to": "2,000,000 images",
        "copy all files to a host": "1.0 min",  # 30 GB / 0.5 GB/s
        "decode all files once": "1.0 min",  # 3,000 s / 50
        "steps of an epoch": "875",  # 700,000 / 800
        "epoch": "0.5 min",  # (875 + 250 / 3) * 30 ms = 28.75 s
        "checkpoint": "1,000 MB",
        "training waits": "100 ms",
        "upload in the background": "2.0 s",
        "time between checkpoints": "37.9 s",  # sqrt(2 * 0.1 * 7,200)
        "checkpoint.every_steps": "1,264",
        "lost by a preemption": "1.3 min",  # 18.97 s + 60 s
        "run": "0.8 h",  # 2,875 s * (1 + 0.1 / 37.95 + 78.97 / 7,200) = 2,914 s
        "cost": "13.0",  # 0.8095 h * 8 * 2
    }


def test_a_measured_step_replaces_the_lower_bound(tmp_path, monkeypatch, capsys):
    rows = table(tmp_path, monkeypatch, capsys, "--step_ms=60")
    assert rows["step"] == "60.0 ms"
    assert rows["input of a chip"] == "0.5 MB/s"
    assert float(rows["cost"]) == pytest.approx(2 * 13, abs=0.2)
