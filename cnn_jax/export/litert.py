"""LiteRT models, which a Python of another environment converts and runs."""

import json
import pathlib
import subprocess
import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
from jax.extend import core
from jaxtyping import Float, UInt8

from cnn_jax.export.function import ExportError, stable_hlo_text
from cnn_jax.inference.predictor import Predictor, check_images
from cnn_jax.system.errors import ConfigError

PACKAGES = "litert-converter litert-quantizer ai-edge-litert"
_WORKER = str(pathlib.Path(__file__).with_name("litert_worker.py"))


def check_python(python: str | None) -> tuple[str, dict[str, str]]:
    """Returns the path of a Python with LiteRT, and the versions of LiteRT's packages.

    Raises:
      ConfigError: No Python is named, or it lacks a package.
    """
    if python is None:
        raise ConfigError(
            "--format=litert: --converter_python is required, a Python of its own environment; to "
            f"create it: python -m venv litert && litert/bin/pip install {PACKAGES}"
        )
    code = (
        "import json, importlib.metadata, litert_converter, ai_edge_litert.interpreter\n"
        f"names = {PACKAGES.split()}\n"
        "print(json.dumps({name: importlib.metadata.version(name) for name in names}))"
    )
    try:
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"--converter_python: {python}: {error.strerror}") from error
    if result.returncode:
        raise ConfigError(
            f"--converter_python: {python} lacks a package ({_last_line(result.stderr)}); install "
            f"{PACKAGES} there"
        )
    return python, json.loads(_last_line(result.stdout))


def convert(
    function: core.ClosedJaxpr,
    image_size: tuple[int, int],
    python: str,
    *,
    int8: bool = False,
    batches: Iterable[np.ndarray] | None = None,
) -> bytes:
    """Converts a flat function to a LiteRT model for one image.

    Args:
      function: The flat function.
      image_size: The height and the width of the image.
      python: The Python with LiteRT.
      int8: Whether to store the weights with 8 bits, and to compute with them.
      batches: For `int8`: images of the training data, uint8 [batch, height, width, 3], that
        determine the ranges of the activations. By default, the model measures the ranges of each
        image.

    Raises:
      ExportError: The conversion fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "model.mlir"), pathlib.Path(folder, "model.tflite")
        source.write_text(stable_hlo_text(function, image_size))
        arguments = ["convert", str(source), str(target), "dynamic" if int8 else "float32"]
        if batches is not None:
            images = pathlib.Path(folder, "images.npy")
            np.save(images, np.concatenate(list(batches)))
            arguments[-1:] = ["static", str(images)]
        result = subprocess.run(
            [python, _WORKER, *arguments], capture_output=True, text=True, check=False
        )
        if result.returncode or not target.exists():
            raise ExportError(f"LiteRT cannot convert the network: {_error_line(result.stderr)}")
        return target.read_bytes()


class LitertPredictor(Predictor):
    """A predictor that runs a LiteRT model in a subprocess, with a Python that has LiteRT.

    Attributes:
      class_names: The classes in the order of the probabilities.
      preprocessing: The preprocessing from an image to the model's input.
      pid: The id of the process.
    """

    def __init__(self, predictor: Predictor, model: bytes, python: str):
        """Starts the process; `predictor` has the class names and the preprocessing."""
        self.class_names = predictor.class_names
        self.preprocessing = predictor.preprocessing
        self._file = tempfile.NamedTemporaryFile(suffix=".tflite")  # noqa: SIM115
        self._file.write(model)
        self._file.flush()
        # The log is a file, because an unread pipe would block a process that prints much.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, _WORKER, "run", self._file.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self.pid = self._process.pid

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        """Returns the class probabilities of preprocessed images; see `Predictor`.

        Raises:
          ExportError: The process has ended.
          ValueError: The images are not uint8, or their size is not the model's.
        """
        check_images(images, self.preprocessing)
        shape = (len(images), len(self.class_names))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(len(images).to_bytes(4, "little") + images.tobytes())
            self._process.stdin.flush()
            content = self._process.stdout.read(4 * shape[0] * shape[1])
            return np.frombuffer(content, np.float32).reshape(shape)
        except (BrokenPipeError, ValueError) as error:
            self._process.wait()
            self._log.seek(0)
            reason = _error_line(self._log.read())
            raise ExportError(f"LiteRT cannot run the exported model: {reason}") from error

    def close(self) -> None:
        """Ends the worker process, and deletes its temporary files."""
        with self._file, self._log:
            # Unlike `stdin.close`, this method raises no BrokenPipeError if the process has died.
            self._process.communicate()


def _error_line(text: str) -> str:
    """Returns the first line of the error's message at the end of a traceback."""
    errors = [line for line in text.splitlines() if "Error: " in line]
    return errors[0] if errors else _last_line(text)


def _last_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines()
    return lines[-1] if lines else "no message"
