"""Compares the exported models of a network with its predictor and with other exports.

    pip install -e '.[onnx]'
    python experiments/benchmarks/bench_export.py [--bundle=RUN | --network=resnet18 --size=224]
        [--converter_python=PATH] [--peer_python=PATH] [--peer_models=FILE ...] [--repeats=15]
        [--npm_package=FILE]

With --bundle, the models are compared on the validation split and the test split of the bundle's
data. With --network, the weights are random and only the time and the size are measured. The time
is CPU time of one thread in milliseconds per image; all models take turns, and the median counts.

"quantize_static" is ONNX Runtime's own quantization of the float32 model, with the same images. The
LiteRT models run in a process of --converter_python. "torch.onnx" is the same network in PyTorch
with random weights (for a pretrained network: timm's network), exported by PyTorch; --peer_python
names a Python with torch, timm, onnx and onnxscript. --peer_models are ONNX files of other
projects, with the input float32 [batch, 3, size, size].

With --npm_package, the rows "page" are the pages of `cnn_jax export --format=web`, in headless
Chromium: the CPU time of the page's thread for `pixels.onnx`, which resizes the image too. This
needs selenium, chromium and chromedriver; FILE is described in docs/export.md.
"""

import argparse
import os

# XLA and ONNX Runtime get one thread, so that CPU time can be compared.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import contextlib
import dataclasses
import functools
import http.server
import json
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from common import one_thread_session, random_bundle
from onnxruntime import quantization

from cnn_jax.config.schema import default_config
from cnn_jax.export import certificate, litert, web
from cnn_jax.export.exporter import FunctionPredictor
from cnn_jax.export.function import flat_function
from cnn_jax.export.onnx_model import images_model, pixels_model
from cnn_jax.export.quantize import quantize
from cnn_jax.inference.bundle import find_bundle, read_bundle
from cnn_jax.inference.evaluation import evenly_spaced, image_batches, open_as_trained
from cnn_jax.inference.predictor import BundlePredictor
from cnn_jax.models import NETWORKS

# A page computes each image this number of times in one call of WebDriver, so that the CPU time of
# the call itself is a small part of the measurement.
_RUNS_IN_PAGE = 5
_RUN_IN_PAGE = """
const [count, height, width, done] = arguments;
(async () => {
  const { ort, session } = await import("./page.js");
  const noise = Uint8Array.from({ length: height * width * 3 }, (_, i) => (i * 2654435761) % 251);
  window.pixels ??= new ort.Tensor("uint8", noise, [height, width, 3]);
  for (let i = 0; i < count; i++) await session.run({ pixels: window.pixels });
})().then(() => done(""), (error) => done(String(error)));
"""
_TIMM = """
import sys, timm, torch
name, size, path = sys.argv[1:]
if name == "cnn":
    layers, channels = [], 3
    for features in (32, 64, 128):
        layers += [torch.nn.Conv2d(channels, features, 3, padding=1), torch.nn.ReLU()]
        layers += [torch.nn.BatchNorm2d(features), torch.nn.MaxPool2d(2)]
        channels = features
    layers[-1] = torch.nn.AdaptiveAvgPool2d(1)
    layers += [torch.nn.Flatten(), torch.nn.Linear(128, 256), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(256, 10)).eval()
else:
    model = timm.create_model(name, num_classes=10).eval()
images = torch.zeros(2, 3, int(size), int(size))
batch = torch.export.Dim("batch", min=1, max=4096)
shapes = ({0: batch},)
torch.onnx.export(model, (images,), path, dynamo=True, dynamic_shapes=shapes, opset_version=18)
"""


@dataclasses.dataclass
class _Model:
    """A model that the benchmark measures."""

    name: str
    run: Callable[[np.ndarray], Any]
    bytes: int
    takes_floats: bool = False  # Whether the input is float32 [batch, 3, height, width].
    has_results: bool = True  # Whether `run` returns the probabilities of images of the data.
    clock: Callable[[], float] = time.process_time  # The CPU time in seconds.


class _Calibration(quantization.CalibrationDataReader):
    """Gives ONNX Runtime the images that determine the ranges."""

    def __init__(self, batches: list[np.ndarray]):
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray]:
        batch = next(self._batches, None)
        return {} if batch is None else {"images": batch}


def make_models(
    predictor: BundlePredictor,
    batches: list[np.ndarray],
    timm_name: str,
    flags: argparse.Namespace,
    folder: pathlib.Path,
    stack: contextlib.ExitStack,
) -> Iterator[_Model]:
    """Yields the predictor, the exported models and the models of the peers."""
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(predictor.variables))
    yield _Model("predictor", predictor, weights)
    start = time.perf_counter()
    function = flat_function(predictor)
    exact = images_model(function, predictor)
    print(f"translation: {time.perf_counter() - start:.2f} s")
    rounded = quantize(exact, batches)
    for name, model in (("onnx", exact), ("onnx int8", rounded)):
        content = model.SerializeToString()
        session = one_thread_session(content)
        yield _Model(name, lambda x, s=session: s.run(None, {"images": x})[0], len(content))
    before, after = folder / "exact.onnx", folder / "static.onnx"
    before.write_bytes(exact.SerializeToString())
    quantization.quantize_static(
        before,
        after,
        _Calibration(batches),
        per_channel=True,
        quant_format=quantization.QuantFormat.QDQ,
    )
    session = one_thread_session(str(after))
    yield _Model(
        "quantize_static", lambda x: session.run(None, {"images": x})[0], after.stat().st_size
    )
    if flags.npm_package:
        for name, model in (("page", exact), ("page int8", rounded)):
            content = pixels_model(model, predictor).SerializeToString()
            page = web.page_files(flags.npm_package) | {
                "pixels.onnx": content,
                "bundle.json": json.dumps({"class_names": predictor.class_names}).encode(),
                "certificate.json": b'{"golden": []}',
            }
            run, clock = stack.enter_context(_opened_page(page, folder / name))
            yield _Model(name, run, len(content), has_results=False, clock=clock)
    if flags.converter_python:
        kinds: dict[str, dict[str, Any]] = {
            "litert": {},
            "litert int8": {"int8": True},
            "litert int8 static": {"int8": True, "batches": batches},
        }
        for name, options in kinds.items():
            size, python = predictor.preprocessing.image_size, flags.converter_python
            content = litert.convert(function, size, python, **options)
            process = litert.LitertPredictor(predictor, content, python)
            run = stack.enter_context(contextlib.closing(process))
            yield _Model(name, run, len(content), clock=_process_clock(run.pid))
    if flags.peer_python:
        path = folder / "timm.onnx"
        size = str(predictor.preprocessing.image_size[0])
        subprocess.run([flags.peer_python, "-c", _TIMM, timm_name, size, str(path)], check=True)
        yield _peer("torch.onnx", path)
    for name in flags.peer_models:
        yield _peer(pathlib.Path(name).name, pathlib.Path(name))


def _peer(name: str, path: pathlib.Path) -> _Model:
    """Returns a model with floats as input; the weights may be in a second file."""
    session = one_thread_session(str(path))
    key = session.get_inputs()[0].name
    size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
    return _Model(
        name, lambda x: session.run(None, {key: x})[0], size, takes_floats=True, has_results=False
    )


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a page."""

    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript"
    }

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Prints nothing."""


@contextlib.contextmanager
def _opened_page(
    files: Mapping[str, bytes], folder: pathlib.Path
) -> Iterator[tuple[Callable[[np.ndarray], None], Callable[[], float]]]:
    """Opens a page in Chromium; yields functions that classify and that return the time needed."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    handler = functools.partial(_Handler, directory=str(folder))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = webdriver.Chrome(options=options, service=service)
        try:
            browser.set_script_timeout(600)
            browser.get(f"http://127.0.0.1:{server.server_address[1]}/")
            status = "return document.getElementById('check').textContent"
            WebDriverWait(browser, 120).until(lambda _: "ready" in browser.execute_script(status))
            browser.execute_cdp_cmd("Performance.enable", {})

            def run(images: np.ndarray) -> None:
                count, height, width, _ = images.shape
                arguments = (_RUNS_IN_PAGE * count, height, width)
                if error := browser.execute_async_script(_RUN_IN_PAGE, *arguments):
                    raise RuntimeError(error)

            def clock() -> float:
                metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
                values = {metric["name"]: metric["value"] for metric in metrics}
                return values["ThreadTime"] / _RUNS_IN_PAGE

            yield run, clock
        finally:
            browser.quit()
            server.shutdown()


def _process_clock(pid: int) -> Callable[[], float]:
    """Returns the clock of the CPU time of another process, on Linux."""
    # Linux numbers these clocks: ~pid << 3, plus 2 for the scheduler's time of all threads.
    return lambda: time.clock_gettime((~pid << 3) | 2)


def measure(models: list[_Model], size: tuple[int, int], batch: int, repeats: int) -> list[float]:
    """Returns the median CPU time of each model, in milliseconds per image."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, *size, 3), np.uint8)
    floats = (images.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).astype(np.float32)
    seconds: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 1):
        for model, times in zip(models, seconds, strict=True):
            start = model.clock()
            model.run(floats if model.takes_floats else images)
            if repeat:  # The first call compiles.
                times.append(model.clock() - start)
    return [1000 * float(np.median(times)) / batch for times in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle")
    parser.add_argument("--network", default="cnn", choices=NETWORKS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--converter_python")
    parser.add_argument("--peer_python")
    parser.add_argument("--peer_models", nargs="+", default=[])
    parser.add_argument("--npm_package")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    flags = parser.parse_args()
    if flags.bundle:
        bundle = read_bundle(find_bundle(flags.bundle))
        predictor = BundlePredictor(dataclasses.replace(bundle, precision="float32"))
        timm_name = bundle.model["name"]
        dataset = open_as_trained(predictor)
        chosen = evenly_spaced(dataset.splits["train"], 256)
        batches = list(image_batches(dataset.loader, chosen))
    else:
        section = default_config(flags.network).model.to_dict()
        predictor = BundlePredictor(random_bundle(section, flags.size))
        timm_name, dataset = flags.network, None
        rng = np.random.default_rng(0)
        batches = [rng.integers(0, 256, (8, flags.size, flags.size, 3), np.uint8)]
    size = predictor.preprocessing.image_size
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        models = list(
            make_models(predictor, batches, timm_name, flags, pathlib.Path(folder), stack)
        )
        times = {batch: measure(models, size, batch, flags.repeats) for batch in flags.batches}
        heads = [
            "model",
            "bytes",
            *(f"ms, batch {b}" for b in times),
            *(f"ratio, {b}" for b in times),
        ]
        print(" | ".join(heads))
        for i, model in enumerate(models):
            own = [f"{values[i]:.2f}" for values in times.values()]
            ratios = [f"{values[0] / values[i]:.2f}" for values in times.values()]
            print(" | ".join([model.name, f"{model.bytes:,}", *own, *ratios]))
        if dataset is None:
            return
        for model in models[1:]:
            if not model.has_results:
                continue
            run = FunctionPredictor(predictor, model.run)
            for split, values in certificate.compare(predictor, run, dataset).items():
                lost = values["accuracy_lost"]
                low, high = (100 * bound for bound in lost["interval"])
                print(
                    f"{model.name}, {split}: accuracy {100 * values['after']['accuracy']:.2f} %, "
                    f"lost {100 * lost['mean']:.2f} points ({low:.2f} to {high:.2f}), agreement "
                    f"{100 * values['agreement']:.2f} %, largest difference "
                    f"{values['largest_difference']:.1e}"
                )


if __name__ == "__main__":
    main()
