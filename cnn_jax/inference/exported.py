"""The predictor of a model that was exported to ONNX, and `load_predictor` for any folder.

Importing this module imports neither ONNX Runtime nor JAX.
"""

import os
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from cnn_jax.data.scan import num_cores
from cnn_jax.inference.bundle import (
    Bundle,
    Ensemble,
    find_bundle,
    read_description,
    read_networks,
    read_preprocessing,
    reading,
)
from cnn_jax.inference.protocol import TrainedPredictor, check_images
from cnn_jax.system.errors import BundleError, ConfigError

ONNX_MODEL = "model.onnx"
# ONNX Runtime computes this number of pixels at once for each core. Its memory grows with the
# number of pixels, and more pixels at once are not faster.
_PIXELS_OF_CORE = 32_768


class OnnxPredictor(TrainedPredictor):
    """A predictor that runs an exported model in ONNX Runtime.

    Attributes:
      class_names: The classes in the order of the probabilities.
      preprocessing: The preprocessing from an image to the model's input.
      temperature: The temperature by which the model divides the logits.
      data: The description of the training data; see `Bundle`.
      metrics: The metrics of the exported model by split.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads an exported model and verifies all files.

        Args:
          path: The folder that `cnn_jax export` wrote.

        Raises:
          BundleError: There is no exported model, it is damaged, or it is not an ONNX model.
          ConfigError: ONNX Runtime is not installed.
        """
        path = pathlib.Path(path)
        description = read_description(path)
        with reading(path):
            if ONNX_MODEL not in description["files"]:
                raise BundleError(
                    f"{path} is an export to {description['export']['format']}, which cnn_jax does "
                    "not load; name a bundle or an export to onnx"
                )
            self.class_names = description["class_names"]
            self.preprocessing = read_preprocessing(description)
            self.temperature = description["temperature"]
            self.data = description["data"]
            self.metrics = description["metrics"]
            self._session = self._open(path / ONNX_MODEL)

    @property
    def images_at_once(self) -> int:
        """The largest number of images that the model computes together."""
        height, width = self.preprocessing.image_size
        return max(1, _PIXELS_OF_CORE * num_cores() // (height * width))

    def _open(self, path: pathlib.Path) -> Any:
        """Returns the session of a model, whose shapes must be those in bundle.json."""
        try:
            session = open_session(path.read_bytes())
        except (ConfigError, OSError):
            raise
        except Exception as error:  # ONNX Runtime raises many classes of exceptions.
            reason = str(error).partition("\n")[0]
            raise BundleError(f"{path} cannot be loaded by ONNX Runtime: {reason}") from error
        described = [
            ("images", "tensor(uint8)", [*self.preprocessing.image_size, 3]),
            ("probabilities", "tensor(float)", [len(self.class_names)]),
        ]
        found = [
            (value.name, value.type, value.shape[1:])
            for value in (*session.get_inputs(), *session.get_outputs())
        ]
        if found != described:
            raise BundleError(
                f"{path} does not fit bundle.json: the model has {found}, and bundle.json "
                f"describes {described}"
            )
        return session

    def __call__(
        self, images: UInt8[np.ndarray, "batch height width 3"]
    ) -> Float[np.ndarray, "batch classes"]:
        """Returns the class probabilities of preprocessed images; see `Predictor`.

        Raises:
          ValueError: The images are not uint8, or their size is not the model's.
        """
        check_images(images, self.preprocessing)
        step = self.images_at_once
        parts = [
            self._session.run(None, {"images": np.ascontiguousarray(images[start : start + step])})
            for start in range(0, max(1, len(images)), step)
        ]
        return np.concatenate([probabilities for (probabilities,) in parts])


def open_session(model: bytes) -> Any:
    """Returns an ONNX Runtime session on the CPU; errors and warnings are raised, not printed.

    Raises:
      ConfigError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ConfigError("onnxruntime is not installed: pip install 'cnn_jax[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # With memory patterns, ONNX Runtime reserves memory again for each batch size, twice as much
    # in all, and is not faster.
    options.enable_mem_pattern = False
    # By default, the threads wait for work in a loop, which doubles the CPU time of an image.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def read_model(path: str | os.PathLike[str]) -> Bundle | Ensemble | OnnxPredictor:
    """Reads a bundle, an ensemble or an ONNX export, and verifies all files.

    Raises:
      BundleError: There is none of these, or a file is damaged.
      ConfigError: ONNX Runtime is needed and not installed.
    """
    return OnnxPredictor(path) if "export" in read_description(path) else read_networks(path)


def load_predictor(path: str | os.PathLike[str], runs_once: bool = False) -> TrainedPredictor:
    """Returns the predictor of a bundle, an ensemble, a run that has a bundle, or an ONNX export.

    Args:
      path: The folder.
      runs_once: See `BundlePredictor`.

    Raises:
      BundleError: There is none of these, or a file is damaged.
      ConfigError: ONNX Runtime is needed and not installed.
    """
    model = read_model(find_bundle(path))
    if isinstance(model, OnnxPredictor):
        return model
    from cnn_jax.inference.ensemble import make_predictor

    return make_predictor(model, runs_once)
