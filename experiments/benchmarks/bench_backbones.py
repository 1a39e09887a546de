"""Compares the speed of the networks in `cnn_jax/models/` with timm's in eager PyTorch.

    python experiments/benchmarks/bench_backbones.py [--networks=resnet18,...] [--peer_python=PATH]

--peer_python is the interpreter of an environment with torch and timm. Each library runs in a
separate process, and the processes take turns, so that other load on the machine affects both.
Both keep freed memory (`cnn_jax.system.runtime.keep_freed_memory`). timm's images have the memory
format channels_last. A time is the median of all calls, each until its end, without compilation.
The compile time is stated beside it; without oneDNN later processes find the compiled program in
the cache.

"features" computes the embeddings of a batch of float32 images, with the same random weights;
first, both libraries must agree on the embeddings. "training" is a step of Adam on all
parameters with cross-entropy, on uint8 images. BatchNorm uses its stored statistics.

--one_core runs both libraries on one core and takes the time of the processor instead of the
time of the clock. Use it on a machine with other load, on which PyTorch's threads wait for each
other.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from common import CLASSES, KEPT, Process, answer_requests, seconds_of_each

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from experiments.checks import reference_logits

LEARNING_RATE = 1e-4


class Ours:
    """A network of this project, with the project's compiler options and training step."""

    def __init__(self, name: str, state_shapes: Mapping[str, Any]):
        from cnn_jax.config.schema import default_config
        from cnn_jax.models.network import make_model
        from cnn_jax.models.pretrained import convert
        from cnn_jax.system import runtime

        runtime.keep_freed_memory()
        self._options = runtime.compiler_options()
        section = default_config(name).model.to_dict()
        if "batch_norm_statistics" in section:
            section["batch_norm_statistics"] = "frozen"
        self._model = make_model(section, CLASSES, "float32")
        self._variables = convert(reference_logits.random_state(state_shapes))

    def features(self, images: np.ndarray) -> tuple[Callable[[], np.ndarray], float]:
        """Returns a function that computes the embeddings, and its compile time in seconds."""
        import jax

        def compute(variables: Any, images: jax.Array) -> jax.Array:
            outputs: Any = self._model.apply(variables, images, method="stages")
            return outputs["embedding"]

        variables, batch = jax.device_put((self._variables, images))
        compiled, seconds = self._compile(jax.jit(compute), variables, batch)
        return lambda: np.asarray(compiled(variables, batch)), seconds

    def training(self, images: np.ndarray, labels: np.ndarray) -> tuple[Callable[[], None], float]:
        """Returns a function that runs a training step, and its compile time in seconds."""
        import jax

        from cnn_jax.data.preprocessing import Preprocessing
        from cnn_jax.training.optimizer import make_optimizer, make_schedule
        from cnn_jax.training.step import TrainState, TrainStep

        optimizer = make_optimizer(make_schedule(LEARNING_RATE, LEARNING_RATE, 1), l2=0.0)
        preprocessing = Preprocessing(image_size=images.shape[1:3])
        step = TrainStep(model=self._model, optimizer=optimizer, preprocessing=preprocessing)
        params = self._variables["params"]
        batch_stats = self._variables.get("batch_stats", {})
        state, batch = jax.device_put(
            (
                TrainState(np.int32(0), params, batch_stats, optimizer.init(params)),
                {"image": images, "label": labels, "mask": np.ones(len(labels), bool)},
            )
        )
        compiled, seconds = self._compile(jax.jit(step, donate_argnums=0), state, batch)

        def train() -> None:
            nonlocal state
            state, _ = compiled(state, batch)
            jax.block_until_ready(state)

        return train, seconds

    def _compile(self, function: Any, *inputs: Any) -> tuple[Any, float]:
        start = time.perf_counter()
        compiled = function.lower(*inputs).compile(self._options)
        return compiled, time.perf_counter() - start


class Timm:
    """A network of timm in eager PyTorch, with the same methods as `Ours`."""

    def __init__(self, name: str, state_shapes: Mapping[str, Any]):
        import torch  # pyright: ignore

        reference = reference_logits.NETWORKS[name]
        timm = reference_logits.import_timm()
        model = timm.create_model(name, num_classes=CLASSES, **reference.arguments)
        state = reference_logits.random_state(state_shapes)
        model.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
        self._torch = torch
        self._model = model.to(memory_format=torch.channels_last)

    def features(self, images: np.ndarray) -> tuple[Callable[[], np.ndarray], float]:
        batch = self._torch.from_numpy(images).permute(0, 3, 1, 2)
        model = self._model.eval()

        def compute() -> np.ndarray:
            with self._torch.inference_mode():
                return model.forward_head(model.forward_features(batch), pre_logits=True).numpy()

        return compute, 0.0

    def training(self, images: np.ndarray, labels: np.ndarray) -> tuple[Callable[[], None], float]:
        torch = self._torch
        model = self._model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
        batch = torch.from_numpy(images).permute(0, 3, 1, 2)
        targets = torch.from_numpy(labels.astype(np.int64))

        def train() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch / 127.5 - 1), targets).backward()
            optimizer.step()

        return train, 0.0


LIBRARIES = {"cnn_jax": Ours, "timm": Timm}


class Answers:
    """Answers the requests to a library; see `common.answer_requests`."""

    def __init__(self, library: str, clock: Callable[[], float]):
        self._library, self._clock = LIBRARIES[library], clock

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        if request["do"] == "open":
            self._network = self._library(request["name"], request["shapes"])
            return {}
        if request["do"] == "features":
            images = rng.normal(size=request["images"]).astype(np.float32)
            self._action, seconds = self._network.features(images)
            embedding = self._action().astype(float).tolist()
            return {"compile_seconds": seconds, "embedding": embedding}
        if request["do"] == "training":
            images = rng.integers(0, 256, request["images"], np.uint8)
            labels = rng.integers(0, CLASSES, request["images"][0]).astype(np.int32)
            self._action, seconds = self._network.training(images, labels)
            return {"compile_seconds": seconds}
        return {"seconds": seconds_of_each(self._action, request["times"], self._clock)}


def measure(processes: list[Process], do: str, shape: list[int], seconds: float) -> dict[str, Any]:
    """Returns the milliseconds per image of each library, and this project's compile time."""
    replies = [process.ask(do=do, images=shape) for process in processes]
    if do == "features":
        ours, timm = (np.asarray(reply["embedding"]) for reply in replies)
        difference = np.abs(ours - timm).max() / np.abs(timm).max()
        if not difference < 1e-4:  # Unlike `>=`, this condition is true for NaN.
            sys.exit(f"the embeddings differ by {difference:.1e}")
    times: list[list[float]] = []
    counts = []
    for process in processes:
        process.ask(do="run", times=2)
        step = statistics.median(process.ask(do="run", times=2)["seconds"])
        counts.append(max(1, round(min(1.0, seconds) / step)))
        times.append([])
    for _ in range(max(3, round(seconds))):
        for process, count, values in zip(processes, counts, times, strict=True):
            # The first call of a turn is not counted, because the processor's caches hold the data
            # of the other process.
            values += process.ask(do="run", times=1 + count)["seconds"][1:]
    ours, timm = (1e3 * statistics.median(values) / shape[0] for values in times)
    return {"ours": ours, "timm": timm, "compile_seconds": replies[0]["compile_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--networks", default=",".join(reference_logits.NETWORKS))
    parser.add_argument("--peer_python", default=sys.executable, metavar="PATH")
    parser.add_argument("--features", type=int, nargs=2, default=(224, 16), metavar=("PX", "BATCH"))
    parser.add_argument("--training", type=int, nargs=2, default=(64, 32), metavar=("PX", "BATCH"))
    parser.add_argument("--seconds", type=float, default=8, help="for each library and row")
    parser.add_argument("--one_core", action="store_true", help="see above")
    parser.add_argument("--answer", choices=LIBRARIES, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one_core:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    if flags.answer:
        clock = time.process_time if flags.one_core else time.perf_counter
        answer_requests(Answers(flags.answer, clock))
        return
    # PyTorch's environment need not have this project's dependencies.
    from cnn_jax.models import NETWORKS

    print("milliseconds of an image; ratio: timm's time divided by ours\n")
    print(f"{'network':<24}{'':<22}{'ours':>8}{'timm':>8}{'ratio':>7}{'compile s':>11}")
    for name in flags.networks.split(","):
        shapes = reference_logits.load_reference(name)["shapes"]
        with contextlib.ExitStack() as stack:
            processes = [
                Process(
                    library,
                    [python, __file__, f"--answer={library}", *["--one_core"] * flags.one_core],
                    KEPT,
                )
                for library, python in (("cnn_jax", sys.executable), ("timm", flags.peer_python))
            ]
            for process in processes:
                stack.callback(process.close)
                process.ask(do="open", name=name, shapes=shapes)
            for do, (side, batch) in (("features", flags.features), ("training", flags.training)):
                if not batch:
                    continue
                side -= side % NETWORKS[name].size_divisor({})
                row = measure(processes, do, [batch, side, side, 3], flags.seconds)
                print(
                    f"{name:<24}{f'{do}, {side} px x {batch}':<22}{row['ours']:>8.2f}"
                    f"{row['timm']:>8.2f}{row['timm'] / row['ours']:>7.2f}"
                    f"{row['compile_seconds']:>11.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
