"""Compares fine-tuning in this project with fine-tuning in PyTorch, with the same weights.

    python experiments/studies/finetune_beside_timm.py --folder=PATH --pretrained=FILE --output=DIR
        --peer_python=PATH [--images=200] [--seeds=3] [--image_size=64] [--epochs=10]

--folder has one sub-folder for each class, and --pretrained contains weights of the network
tf_efficientnet_lite0. --peer_python is the interpreter of an environment with torch, timm and
Pillow. Both programs get the same training, validation and test images (see `few_images.py`).

Both use AdamW, batches of 32, BatchNorm's stored statistics, dropout, the learning rates of the
configuration `finetune`, label smoothing, bicubic resizing, and random mirror images, rotation,
zoom and contrast. In both, the head starts from zero, and the test accuracy is that of the epoch
with the best validation accuracy. "probe" is this project's default, in which the head starts
from a probe.

Results that are in DIR/results.json already are not computed again.

Each run is a separate process on one core. The time is the processor time of the whole run, with
decoding, compilation and evaluation.
"""

import argparse
import csv
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from experiments.checks import reference_logits
from experiments.studies.ablation_table import percent

NETWORK = "tf_efficientnet_lite0"
BATCH_SIZE = 32
PROGRAMS = ("timm", "cnn_jax", "cnn_jax, probe")


def train_with_cnn_jax(flags: argparse.Namespace, probe: bool) -> dict[str, Any]:
    """Fine-tunes with the configuration `finetune`; returns the test accuracy."""
    from cnn_jax.system.console import Console
    from cnn_jax.system.runtime import keep_freed_memory
    from cnn_jax.training.loop import train_and_evaluate
    from experiments.studies.few_images import make_config

    keep_freed_memory()
    config = make_config("finetune", flags, flags.table, flags.seed)
    config.data.interpolation = "bicubic"
    config.train.epochs = flags.epochs
    config.train.patience = flags.epochs
    config.train.batch_size = BATCH_SIZE
    config.train.probe = probe
    workdir = flags.output / f"{flags.answer}-{flags.seed}".replace(", ", "-")
    report = train_and_evaluate(config, workdir, Console(is_silent=True))
    return {"accuracy": report["test"]["accuracy"]}


def train_with_timm(flags: argparse.Namespace) -> dict[str, Any]:
    """Fine-tunes timm's network in PyTorch; returns the test accuracy."""
    import torch  # pyright: ignore
    from PIL import Image
    from safetensors.torch import load_file  # pyright: ignore
    from torch.nn import functional  # pyright: ignore

    torch.manual_seed(flags.seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(flags.seed)
    with flags.table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = sorted({row["label"] for row in rows})
    size = (flags.image_size, flags.image_size)
    splits = {}
    for split in ("train", "validation", "test"):
        chosen = [row for row in rows if row["split"] == split]
        pixels = [
            np.asarray(
                Image.open(row["path"]).convert("RGB").resize(size, Image.Resampling.BICUBIC)
            )
            for row in chosen
        ]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        labels = torch.tensor([classes.index(row["label"]) for row in chosen])
        splits[split] = images.contiguous(memory_format=torch.channels_last), labels

    timm = reference_logits.import_timm()
    model = timm.create_model(NETWORK, num_classes=len(classes), drop_rate=0.2)
    state = load_file(flags.pretrained)
    state = {name: value for name, value in state.items() if not name.startswith("classifier")}
    model.load_state_dict(state, strict=False)
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    model = model.to(memory_format=torch.channels_last)

    # The stages are the stem, seven groups of blocks, and the last convolution.
    stages = {"conv_stem": 0, "bn1": 0, "conv_head": 8, "bn2": 8, "classifier": 8}
    groups = []
    for name, parameter in model.named_parameters():
        first, second = name.split(".")[:2]
        stage = 1 + int(second) if first == "blocks" else stages[first]
        decay = 0.01 if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "factor": 0.7 ** (8 - stage), "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, lr=1e-3)

    def evaluate(split: str) -> float:
        images, labels = splits[split]
        model.eval()
        with torch.inference_mode():
            parts = [model(part / 127.5 - 1).argmax(1) for part in images.split(128)]
        return float((torch.cat(parts) == labels).float().mean())

    images, labels = splits["train"]
    steps_per_epoch = math.ceil(len(images) / BATCH_SIZE)
    total, warmup = flags.epochs * steps_per_epoch, steps_per_epoch // 2
    step, best = 0, (-1.0, -1.0)
    for _ in range(flags.epochs):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        for indices in torch.from_numpy(rng.permutation(len(images))).split(BATCH_SIZE):
            cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / (total - warmup))
            rate = 1e-3 * step / warmup if step < warmup else 1e-5 + (1e-3 - 1e-5) * cosine
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            batch = _augment(torch, rng, images[indices].float())
            optimizer.zero_grad()
            logits = model(batch / 127.5 - 1)
            functional.cross_entropy(logits, labels[indices], label_smoothing=0.1).backward()
            optimizer.step()
            step += 1
        validation = evaluate("validation")
        if validation > best[0]:
            best = validation, evaluate("test")
    return {"accuracy": best[1]}


def _augment(torch: Any, rng: np.random.Generator, images: Any) -> Any:
    """Mirrors, rotates and zooms images, and changes their contrast, all at random."""
    count = len(images)
    angle = 2 * np.pi * rng.uniform(-0.03, 0.03, count)
    window = rng.uniform(0.8, 1.2, count)
    mirror = rng.choice([-1.0, 1.0], count)
    matrix = np.zeros((count, 2, 3), np.float32)
    matrix[:, 0, 0], matrix[:, 0, 1] = mirror * window * np.cos(angle), -window * np.sin(angle)
    matrix[:, 1, 0], matrix[:, 1, 1] = mirror * window * np.sin(angle), window * np.cos(angle)
    functional = torch.nn.functional
    grid = functional.affine_grid(torch.from_numpy(matrix), list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    factor = torch.from_numpy(rng.uniform(0.8, 1.2, (count, 1, 1, 1)).astype(np.float32))
    mean = images.mean((2, 3), keepdim=True)
    return ((images - mean) * factor + mean).clamp(0, 255)


def run(flags: argparse.Namespace, program: str, seed: int, table: pathlib.Path) -> dict[str, Any]:
    """Runs one program; returns the test accuracy, and the seconds of one core."""
    python = flags.peer_python if program == "timm" else sys.executable
    arguments = [
        f"--answer={program}",
        f"--seed={seed}",
        f"--table={table}",
        *(f"--{name}={getattr(flags, name)}" for name in ("pretrained", "output", "folder")),
        *(f"--{name}={getattr(flags, name)}" for name in ("image_size", "epochs")),
    ]
    process = subprocess.Popen([python, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    lines = process.stdout.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{program} failed; its last lines are above")
    return {**json.loads(lines[-1]), "seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    """Runs both libraries with each seed in turn, and prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--pretrained", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--peer_python", default=sys.executable)
    parser.add_argument("--images", type=int, default=200, help="training images of each class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--answer", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if flags.answer:
        if flags.answer == "timm":
            result = train_with_timm(flags)
        else:
            result = train_with_cnn_jax(flags, probe="probe" in flags.answer)
        print(json.dumps(result))
        return
    # The environment of timm need not have this project's dependencies.
    from experiments.studies.few_images import write_table

    for name in ("folder", "pretrained", "output"):
        setattr(flags, name, getattr(flags, name).resolve())
    flags.output.mkdir(parents=True, exist_ok=True)
    path = flags.output / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(flags.seeds):
        table = flags.output / f"{seed}.csv"
        write_table(flags.folder, flags.images, seed, table)
        for program in PROGRAMS:
            key = f"{program}-{seed}"
            if key not in results:
                results[key] = run(flags, program, seed, table)
                path.write_text(json.dumps(results, indent=1))
                print(key, results[key], file=sys.stderr, flush=True)
    print("| program | test accuracy | core-seconds of a run |")
    print("| --- | --- | --- |")
    for program in PROGRAMS:
        rows = [results[f"{program}-{seed}"] for seed in range(flags.seeds)]
        accuracy = percent([row["accuracy"] for row in rows])
        seconds = statistics.median(row["seconds"] for row in rows)
        print(f"| {program} | {accuracy} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
